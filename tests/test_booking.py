"""What is left of a request: receipts, sums, metrics, spans, the live page; end to end."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from fractions import Fraction
from typing import Any

import pytest
from support import (
    CHAT_ANSWER,
    CHAT_STREAM,
    MESSAGES_ANSWER,
    MESSAGES_STREAM,
    Answer,
    FakeProvider,
    Reply,
    ask,
    receipt,
    stream,
)
from test_steering import server  # noqa: F401  a fixture

import bitrouter

OK = Reply(body=CHAT_ANSWER)
MEMORY = '[state]\nurl = "memory:"\n'
PRICED = """
[providers.up]
api_base = "{0}/v1"
models = [{{id = "m", pricing = {{input = 2.5, output = 10}}}}, {{id = "free"}}]
"""
AND_A_SECOND = """
[providers.down]
api_base = "{0}/v1"
models = [{{id = "m"}}]
[models.both]
endpoints = [{{provider = "down", service_id = "m"}}, {{provider = "up", service_id = "m"}}]
[upstream.retry]
max = 0
"""


@pytest.fixture
def books(provider: Any, gateway: Any) -> Callable[..., Any]:
    """A gateway before a provider `up` (and `down`), which keeps its books in memory."""

    @asynccontextmanager
    async def start(
        *script: Reply, down: Reply | None = None, toml: str = "", **environ: str
    ) -> AsyncIterator[tuple[Any, FakeProvider]]:
        async with provider(*script) as up, provider(down or Reply(500)) as other:
            text = '[state]\nurl = "memory:"\n' + toml + PRICED.format(up.base)
            text += AND_A_SECOND.format(other.base) if down else ""
            async with gateway(text, environ) as gw:
                gw.app.keep_books()
                yield gw, up

    return start


async def said(
    gw: Any, body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str
) -> Answer:
    async with gw.caller() as caller:
        answer: Answer = await caller.post(path, body, **headers)
        return answer


async def got(gw: Any, path: str, **headers: str) -> Answer:
    async with gw.caller() as caller:
        answer: Answer = await caller.get(path, **headers)
        return answer


async def receipts(gw: Any, query: str = "") -> list[dict[str, Any]]:
    answer = await got(gw, f"/v1/requests?{query}")
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def until(is_so: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not is_so():  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.005)


# Receipts.


async def test_a_receipt_says_who_asked_who_answered_and_what_it_cost(books: Any) -> None:
    busy = Reply(429, {"error": {"message": "slow down"}})
    async with books(OK, down=busy) as (gw, _):
        answer = await said(
            gw, ask(model="both"), user_agent="openai-python/3.57.0 x", x_session_id="s-1",
            x_bitrouter_tags="team=search, env=prod,,=x", x_bitrouter_request_id="mine",
        )  # fmt: skip
        assert answer.status == 200
        [one] = await receipts(gw)
        wanted = {
            "id": "mine", "op": "chat_completions", "caller": "openai-python/3.57.0", "key": "",
            "asked": "both", "provider": "up", "model": "m", "account": "", "status": 200,
            "code": "", "stream": False, "cost_nano": 11 * 2500 + 7 * 10_000,
            "finish": "stop", "session": "s-1", "tags": {"team": "search", "env": "prod"},
        }  # fmt: skip
        assert {name: one[name] for name in wanted} == wanted
        assert one["usage"]["input_tokens"] == 11 and one["usage"]["output_tokens"] == 7
        assert one["usage"]["estimated"] is False
        assert one["price"]["input"] == 2.5 and one["cost_usd"] == pytest.approx(97_500e-9)
        attempts = [(a["provider"], a["status"], a["code"]) for a in one["attempts"]]
        assert attempts == [("down", 429, "rate_limit_exceeded"), ("up", 200, "")]
        first, second = one["attempts"]
        assert 0 <= first["began_ms"] <= second["began_ms"] <= one["took_ms"]
        assert 0 <= one["overhead_ms"] < one["took_ms"]
        assert "Hello" not in json.dumps(one)


SPOKEN = {
    "/v1/chat/completions": (Reply(body=CHAT_ANSWER), stream(*CHAT_STREAM), "stop"),
    "/v1/messages": (Reply(body=MESSAGES_ANSWER), stream(*MESSAGES_STREAM), "stop"),
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("path", SPOKEN)
async def test_streams_and_whole_answers_leave_the_same_receipt(
    books: Any, path: str, streams: bool
) -> None:
    whole, events, finish = SPOKEN[path]
    kind = "messages" if "messages" in path else "chat_completions"
    text = f'[providers.up]\napi_protocol = "{kind}"\n'
    async with books(events if streams else whole) as (gw, up):
        gw.app.configure(bitrouter.parse_config(
            '[state]\nurl = "memory:"\n' + PRICED.format(up.base).replace(
                "[providers.up]\n", text), {}).config)  # fmt: skip
        body = {**ask(model="m"), "max_tokens": 9, "stream": streams}
        answer = await said(gw, body, path)
        assert answer.status == 200
        [one] = await receipts(gw)
        assert (one["finish"], one["cost_nano"], one["stream"]) == (finish, 97_500, streams)
        assert one["ttft_ms"] <= one["took_ms"]


async def test_a_stream_that_is_cut_costs_what_it_seems_to_have_used(books: Any) -> None:
    cut = stream(*CHAT_STREAM[:3], ending="cut")
    async with books(cut) as (gw, _):
        await said(gw, ask("x" * 400, model="m", stream=True))
        [one] = await receipts(gw)
        assert one["code"] == "upstream_disconnected" and one["usage"]["estimated"] is True
        used = one["usage"]
        assert used["input_tokens"] >= 100 and 1 <= used["output_tokens"] <= 3
        assert one["cost_nano"] == used["input_tokens"] * 2500 + used["output_tokens"] * 10_000


async def test_a_caller_who_hangs_up_leaves_a_receipt(books: Any) -> None:
    async with books(stream(*CHAT_STREAM[:2], ending="hang")) as (gw, up):
        async with gw.caller() as caller:
            caller.send(b"")
            task = asyncio.ensure_future(
                caller.post("/v1/chat/completions", ask(model="m", stream=True))
            )
            await until(lambda: up.seen)
            await asyncio.sleep(0.02)
            task.cancel()
        await until(gw.lines)
        [one] = await receipts(gw)
        assert (one["status"], one["code"]) == (499, "caller_gone")
        assert one["attempts"][0]["code"] == "caller_gone"
        assert gw.app.in_flight == 0


async def test_unknown_prices_are_never_zero(books: Any) -> None:
    async with books(OK) as (gw, _):
        await said(gw, ask(model="free"))
        [one] = await receipts(gw)
        assert one["cost_nano"] is None and one["cost_usd"] is None
        total = (await got(gw, "/v1/usage")).json()["total"]
        assert (total["unpriced"], total["cost_usd"], total["input_tokens"]) == (1, None, 11)


# fmt: off
@pytest.mark.parametrize(("body", "status", "code"), [
    (ask(model="nope"),                      404, "model_not_found"),
    ({"model": "m", "messages": 5},          200, ""),
    ({"messages": []},                       400, "missing_required_parameter"),
    (b"{",                                   400, "invalid_request"),
])  # fmt: skip
async def test_what_is_refused_leaves_a_receipt_too(
    books: Any, body: Any, status: int, code: str
) -> None:
    async with books(OK) as (gw, _):
        assert (await said(gw, body)).status == status
        [one] = await receipts(gw)
        assert (one["status"], one["code"]) == (status, code)
        assert gw.app.in_flight == 0


async def test_a_key_that_is_not_known_leaves_none(books: Any) -> None:
    key = '[server]\nauth = "required"\n[keys.ci]\nkey = "sk-of-the-ci-runner"\n'
    async with books(OK, toml=key) as (gw, _):
        assert (await said(gw, ask(model="m"), authorization="Bearer no")).status == 401
        good = {"authorization": "Bearer sk-of-the-ci-runner"}
        assert (await said(gw, ask(model="m"), **good)).status == 200
        answer = await got(gw, "/v1/requests", **good)
        assert [one["key"] for one in answer.json()["data"]] == ["ci"]
        for path in ("/v1/usage", "/v1/requests", "/metrics", "/api/events", "/api/status"):
            assert (await got(gw, path)).status == 401
        assert (await got(gw, "/")).status == 200
        assert b"sk-of-the" not in (await got(gw, "/", **good)).body


HANGS = Reply(hangs=True)


async def test_of_two_attempts_at_once_the_loser_is_no_fault_and_time_counts_once(
    books: Any,
) -> None:
    async with books(OK, down=HANGS, toml="[upstream]\nhedge_after_ms = 40\n") as (gw, _):
        assert (await said(gw, ask(model="both"))).status == 200
        [one] = await receipts(gw)
        assert [(a["provider"], a["code"]) for a in one["attempts"]] == [
            ("down", "hedge_lost"), ("up", "")]  # fmt: skip
        assert 0 <= one["overhead_ms"] < 40
        text = (await got(gw, "/metrics")).body.decode()
        assert not re.search(r"(?m)^bitrouter_fallbacks_total{", text)


async def test_what_a_cut_stream_said_at_its_start_is_not_what_it_used(books: Any) -> None:
    deltas = [MESSAGES_STREAM[2]] * 30
    cut = stream(*MESSAGES_STREAM[:2], *deltas, ending="cut")
    toml = "[providers.up]\napi_protocol = 'messages'\n"
    async with books(cut) as (gw, up):
        text = MEMORY + PRICED.format(up.base).replace("[providers.up]\n", toml)
        gw.app.configure(bitrouter.parse_config(text, {}).config)
        for path in ("/v1/messages", "/v1/chat/completions"):
            await said(gw, {**ask(model="m"), "max_tokens": 99, "stream": True}, path)
        for one in await receipts(gw):
            assert one["usage"]["estimated"] is True and one["usage"]["input_tokens"] == 11
            assert one["usage"]["output_tokens"] >= 30
        usage = (await got(gw, "/v1/usage")).json()
        assert usage["total"]["errors"] == 2  # though their status is 200
        assert len(await receipts(gw, "status=error")) == 2


async def test_choices_that_are_made_one_by_one_are_waited_for_at_once(books: Any) -> None:
    toml = "[providers.up]\napi_protocol = 'messages'\n"
    async with books(Reply(body=MESSAGES_ANSWER, after_s=0.03)) as (gw, up):
        text = MEMORY + PRICED.format(up.base).replace("[providers.up]\n", toml)
        gw.app.configure(bitrouter.parse_config(text, {}).config)
        assert (await said(gw, ask(model="m", n=3))).status == 200
        [one] = await receipts(gw)
        assert one["took_ms"] >= 30 and 0 <= one["overhead_ms"] < 30
        assert one["finish"] == "stop" and one["usage"]["output_tokens"] == 21


async def test_tokens_that_another_protocol_counts_have_a_provider(books: Any) -> None:
    toml = "[providers.up]\napi_protocol = 'messages'\n"
    async with books(Reply(body={"input_tokens": 42})) as (gw, up):
        text = MEMORY + PRICED.format(up.base).replace("[providers.up]\n", toml)
        gw.app.configure(bitrouter.parse_config(text, {}).config)
        await said(gw, {"model": "m", "input": "Hi"}, "/v1/responses/input_tokens")
        [one] = await receipts(gw)
        assert (one["provider"], one["attempts"][0]["status"]) == ("up", 200)


async def test_what_others_make_up_is_bounded(books: Any) -> None:
    async with books(OK) as (gw, _):
        odd: dict[str, Any] = {f"field_{n}": 1 for n in range(3000)}
        odd["temperature"] = "A" * 100_000
        await said(gw, ask(model="echo/echo", **odd), x_bitrouter_tags="a=1,a=2," + "b" * 9000,
                   user_agent="u" * 9000)  # fmt: skip
        [one] = await receipts(gw)
        assert len(json.dumps(one)) < 8000 and one["tags"]["a"] == "2"


async def test_a_bug_of_ours_is_one_line_and_one_receipt(
    books: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with books(OK) as (gw, _):
        monkeypatch.setattr(gw.app.router, "resolve", lambda *_: 1 / 0)
        answer = await said(gw, ask(model="m"))
        assert answer.status == 500 and "its log has the details" in answer.body.decode()
        [line] = gw.lines()
        assert (line["status"], line["code"]) == (500, "internal_error")
        [one] = await receipts(gw)
        assert (one["status"], one["code"]) == (500, "internal_error")
        assert gw.app.in_flight == 0


# Questions.


async def test_usage_is_added_up_in_groups_as_json_and_csv(books: Any) -> None:
    async with books(OK) as (gw, _):
        for team in ("a", "a", "b"):
            await said(gw, ask(model="m"), x_bitrouter_tags=f"team={team}")
        told = (await got(gw, "/v1/usage?group_by=tag&from=24h")).json()
        assert [(one["group"], one["requests"], one["cost_nano"]) for one in told["data"]] == [
            ("team=a", 2, 195_000), ("team=b", 1, 97_500)]  # fmt: skip
        assert told["total"]["cost_nano"] == 292_500
        for how in ({"path": "/v1/usage?format=csv"}, {"path": "/v1/usage", "accept": "text/csv"}):
            answer = await got(gw, **how)
            assert answer.headers["content-type"].startswith("text/csv")
            assert answer.body.startswith(b"group,requests,") and b"\r\nm,3," in answer.body
        rows = (await got(gw, "/v1/requests?format=csv&limit=2")).body.splitlines()
        assert len(rows) == 3


@pytest.mark.parametrize(
    ("query", "param"),
    [("group_by=x", "group_by"), ("grup=day", "grup"), ("from=soon", "from"), ("to=1&to=2", "to")],
)
async def test_an_odd_question_is_told_what_is_odd(books: Any, query: str, param: str) -> None:
    async with books(OK) as (gw, _):
        answer = await got(gw, f"/v1/usage?{query}")
        error = answer.json()["error"]
        assert (answer.status, error["param"]) == (400, param)
        assert error["message"].startswith(f"{param}: ")


async def test_one_key_s_receipts_can_be_asked_for(books: Any) -> None:
    names = ("alice", "bob")
    keys = "".join(f'[keys.{name}]\nkey = "sk-of-{name}-0123"\n' for name in names)
    async with books(OK, toml='[server]\nauth = "required"\n' + keys) as (gw, _):
        for name in names:
            await said(gw, ask(model="m"), authorization=f"Bearer sk-of-{name}-0123")
        alice = {"authorization": "Bearer sk-of-alice-0123"}
        for path in ("/v1/requests", "/v1/usage"):
            told = (await got(gw, f"{path}?key=bob", **alice)).json()
            assert len(told["data"]) == 1
            told = (await got(gw, f"{path}?key=sk-of-alice-0123")).json()  # there it opens the door
            assert len(told["data"]) == (2 if path == "/v1/requests" else 1)
            assert (await got(gw, f"{path}?key=no")).json()["error"]["code"] == "invalid_api_key"


async def test_too_many_parameters_are_refused(books: Any) -> None:
    async with books(OK) as (gw, _):
        answer = await got(gw, "/v1/usage?" + "&".join(f"a{n}=1" for n in range(101)))
        assert (answer.status, answer.json()["error"]["code"]) == (400, "invalid_request")


# Metrics.


async def test_metrics_count_what_happened(books: Any) -> None:
    busy = Reply(500, {"error": {"message": "no"}})
    async with books(OK, down=busy) as (gw, _):
        await said(gw, ask(model="both"))
        answer = await got(gw, "/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.body.decode()
        who = 'gen_ai_operation_name="chat",gen_ai_provider_name="up",gen_ai_request_model="m"'
        for line in (
            f'bitrouter_requests_total{{{who},http_response_status_code="200"}} 1',
            f'bitrouter_tokens_total{{{who},gen_ai_token_type="input"}} 11',
            f"bitrouter_cost_usd_total{{{who}}} 9.75e-05",
            f"bitrouter_attempts_total{{{who}}} 1",
            "bitrouter_in_flight 0",
            'bitrouter_overhead_seconds_count{gen_ai_operation_name="chat"} 1',
        ):
            assert f"\n{line}\n" in text, line
        assert 'error_type="upstream_error"} 1' in text
        newer = await got(gw, "/metrics", accept="application/openmetrics-text; version=1.0.0")
        assert newer.headers["content-type"].startswith("application/openmetrics-text")
        assert newer.body.endswith(b"# EOF\n")


# The live page.


async def test_watchers_see_requests_begin_and_end_and_are_sent_home_at_the_end(
    books: Any,
) -> None:
    async with books(OK) as (gw, _), gw.caller() as watcher:
        task = asyncio.ensure_future(watcher.get("/api/events"))
        await until(lambda: gw.app.watchers)
        await said(gw, ask(model="m"))
        await asyncio.wait({asyncio.ensure_future(gw.listener.drain(1)), task})
        answer = task.result()
        assert answer.headers["content-type"] == "text/event-stream"
        begun, ended = answer.events()
        assert begun["asked"] == "m" and begun["id"] == ended["id"]
        assert ended["status"] == 200 and ended["cost_nano"] == 97_500
        assert re.findall(rb"event: (\w+)", answer.body) == [b"begun", b"request"]
        assert not gw.app.watchers


async def test_the_head_of_the_events_is_all_there_is(books: Any) -> None:
    async with books(OK) as (gw, _), gw.caller() as caller:
        caller.send(b"HEAD /api/events HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert (await caller.answer(bodiless=True)).status == 200
        assert (await caller.get("/health")).status == 200
        assert not gw.app.watchers


async def test_of_very_many_requests_watchers_see_some_and_know_it(books: Any) -> None:
    async with books(OK) as (gw, _), gw.caller() as watcher:
        task = asyncio.ensure_future(watcher.get("/api/events"))
        await until(lambda: gw.app.watchers)
        for _ in range(80):
            gw.app.tell_watchers("request", lambda: {"id": "x"})
        gw.app.end_watching()
        answer = await task
        assert len(answer.events()) == 51 and answer.events()[-1] == {"missed": 30}


async def test_watchers_are_sent_home_when_keys_change(books: Any) -> None:
    async with books(OK) as (gw, up), gw.caller() as watcher:
        task = asyncio.ensure_future(watcher.get("/api/events"))
        await until(lambda: gw.app.watchers)
        text = MEMORY + PRICED.format(up.base) + '[keys.ci]\nkey = "sk-of-the-ci-runner"\n'
        gw.app.configure(bitrouter.parse_config(text, {}).config)
        assert (await task).status == 200 and not gw.app.watchers


async def test_the_page_may_load_nothing_but_itself(books: Any) -> None:
    async with books(OK) as (gw, _):
        answer = await got(gw, "/")
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        for tag in (b"style", b"script"):
            for inside in re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), answer.body, re.DOTALL):
                digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
                assert f"'sha256-{digest}'" in policy
        assert "unsafe" not in policy
        assert (await got(gw, "/", host="evil.example")).status == 403


# Spans.

ACCEPTED = Reply(body=b"{}")
JSON_TRACES = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json", "OTEL_BSP_SCHEDULE_DELAY": "10"}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def to(collector: FakeProvider, **more: str) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.base, **JSON_TRACES, **more}


def spans(collector: FakeProvider) -> list[dict[str, Any]]:
    found = []
    for seen in collector.seen:
        if seen.path == "/v1/traces":
            packed = seen.headers.get("content-encoding") == "gzip"
            told = json.loads(gzip.decompress(seen.body) if packed else seen.body)
            found += told["resourceSpans"][0]["scopeSpans"][0]["spans"]
    return found


def attributes(span: dict[str, Any]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}


async def test_a_request_is_a_span_with_one_below_it_for_each_attempt(
    books: Any, provider: Any
) -> None:
    busy = Reply(500, {"error": {"message": "no"}})
    async with provider(ACCEPTED) as collector:
        more = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20sk-otel-secret"}
        more |= {"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_SERVICE_NAME": "gate"}
        async with books(OK, down=busy, **to(collector, **more)) as (gw, up):
            await said(gw, ask(model="both", temperature=0.5), traceparent=PARENT, tracestate="a=1")
            await until(lambda: collector.seen)
            root, failed, answered = spans(collector)
            [seen] = up.seen
            assert collector.seen[0].headers["authorization"] == "Bearer sk-otel-secret"
            assert "sk-otel" not in gw.written.getvalue() + json.dumps(
                (await got(gw, "/api/status")).json()
            )
    assert root["name"] == "POST /v1/chat/completions" and root["kind"] == 2
    assert (root["traceId"], root["parentSpanId"]) == tuple(PARENT.split("-")[1:3])
    assert failed["parentSpanId"] == answered["parentSpanId"] == root["spanId"]
    assert failed["status"]["code"] == 2 and attributes(failed)["error.type"] == "upstream_error"
    told = attributes(answered)
    assert told["gen_ai.usage.input_tokens"] == "11" and told["gen_ai.provider.name"] == "up"
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["bitrouter.cost_usd"] == pytest.approx(97_500e-9)
    assert seen.headers["traceparent"] == f"00-{root['traceId']}-{answered['spanId']}-01"
    assert seen.headers["tracestate"] == "a=1"
    assert "Hi" not in json.dumps([root, failed, answered])


async def test_without_a_collector_a_callers_trace_goes_on_as_it_is(books: Any) -> None:
    async with books(OK) as (gw, up):
        await said(gw, ask(model="m"), traceparent=PARENT, baggage="a=b")
        assert up.seen[0].headers["traceparent"] == PARENT
        assert up.seen[0].headers["baggage"] == "a=b"
        assert (await receipts(gw))[0]["trace"] == ""


async def test_what_is_not_sampled_is_not_sent_and_says_so(books: Any, provider: Any) -> None:
    async with provider(ACCEPTED) as collector:
        environ = to(collector, OTEL_TRACES_SAMPLER="always_off")
        async with books(OK, **environ) as (gw, up):
            await said(gw, ask(model="m"))
            assert up.seen[0].headers["traceparent"].endswith("-00")
        assert not spans(collector)


async def test_what_was_said_goes_along_only_when_asked_for(books: Any, provider: Any) -> None:
    toml = "[otel]\ncontent = 'full'\ncontent_max_bytes = 200\n"
    async with provider(ACCEPTED) as collector:
        for script, more in ((OK, {}), (stream(*CHAT_STREAM), {"stream": True})):
            collector.seen.clear()
            async with books(script, toml=toml, **to(collector)) as (gw, _):
                await said(gw, ask("What is up? " + "x" * 500, model="m", **more))
                await until(lambda: spans(collector))
                told = attributes(spans(collector)[-1])
                assert "What is up?" in told["gen_ai.input.messages"]
                assert len(told["gen_ai.input.messages"].encode()) <= 200
                assert json.loads(told["gen_ai.output.messages"]) == [{
                    "role": "assistant", "parts": [{"type": "text", "content": "Hello!"}],
                    "finish_reason": "stop"}]  # fmt: skip


async def test_a_collector_that_is_busy_is_asked_again(books: Any, provider: Any) -> None:
    busy = Reply(503, b"", {"retry-after": "0.01"})
    async with provider(busy, ACCEPTED) as collector, books(OK, **to(collector)) as (gw, _):
        await said(gw, ask(model="m"))
        await until(lambda: len(collector.seen) >= 2)
        assert collector.seen[0].body == collector.seen[1].body
        await until(lambda: gw.app.exporter.sent["traces"] == 2)
        assert not gw.app.exporter.errors


@pytest.mark.parametrize("said_so", [Reply(400, b'{"message": "no such tenant"}'), None])
async def test_a_collector_that_refuses_or_is_gone_costs_spans_and_no_request(
    books: Any, provider: Any, said_so: Reply | None
) -> None:
    async with provider(said_so or OK) as collector:
        environ = to(collector, OTEL_BSP_EXPORT_TIMEOUT="1")
        if said_so is None:
            environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
        async with books(OK, **environ) as (gw, _):
            assert (await said(gw, ask(model="m"))).status == 200
            await until(lambda: gw.app.exporter.dropped["traces"] == 2)
            assert (await said(gw, ask(model="m"))).status == 200
            [line] = gw.lines("export_failed")
            assert ("no such tenant" if said_so else "could not be reached") in line["message"]
            assert (await got(gw, "/health")).json()["degraded"] == ["traces are not exported"]
            [why] = (await got(gw, "/api/status")).json()["degraded"]
            assert why.startswith("traces are not exported: the collector ")
            text = (await got(gw, "/metrics")).body.decode()
            assert re.search(r'queue_dropped_total{bitrouter_queue="traces"} [24]\n', text)


async def test_the_queue_keeps_the_newest(provider: Any) -> None:
    async with provider(ACCEPTED) as collector:
        settings = bitrouter.otel_settings(to(collector, OTEL_BSP_MAX_QUEUE_SIZE="4"))
        pool = bitrouter.Pool(bitrouter.Sweeper(), {}, 0.0)
        exporter = bitrouter.Exporter(settings, bitrouter.Metrics(), pool)
        for n in range(5):
            exporter.put(receipt(id=f"r{n}", trace="a" * 32, span=f"{n:016x}"), ())
        assert (exporter.dropped["traces"], exporter.waiting) == (6, 4)
        await exporter.finish(lambda: None)
        roots = [attributes(span) for span in spans(collector) if span["kind"] == 2]
        assert [one["bitrouter.request_id"] for one in roots] == ["r3", "r4"]
        assert (exporter.sent["traces"], exporter.waiting) == (4, 0)


async def test_what_a_collector_says_is_told_without_our_keys(books: Any, provider: Any) -> None:
    key = "sk-otel-0123456789"
    refuses = Reply(401, json.dumps({"message": f"bad credentials Bearer {key}"}).encode())
    async with provider(refuses) as collector:
        more = {"OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{key}"}
        async with books(OK, **to(collector, **more)) as (gw, _):
            await said(gw, ask(model="m"))
            await until(lambda: gw.app.exporter.errors)
            told = [(await got(gw, path)).body for path in ("/health", "/api/status", "/metrics")]
            assert b"bad credentials [redacted]" in told[1]
            assert key not in gw.written.getvalue() + str(told)


async def test_of_a_batch_that_is_taken_in_part_the_rest_is_dropped(
    books: Any, provider: Any
) -> None:
    partial = {"partialSuccess": {"rejectedSpans": "1", "errorMessage": "too old"}}
    async with provider(Reply(body=partial)) as collector, books(OK, **to(collector)) as (gw, _):
        await said(gw, ask(model="m"))
        await until(lambda: gw.app.exporter.errors)
        assert (gw.app.exporter.sent["traces"], gw.app.exporter.dropped["traces"]) == (1, 1)
        assert "rejected 1: too old" in gw.app.exporter.errors["traces"]


async def test_a_collector_that_trickles_is_not_waited_for(books: Any, provider: Any) -> None:
    slow = Reply(body=b"", chunks=(b"x", None) * 50, gap_s=0.02)
    async with provider(slow) as collector:
        more = {"OTEL_EXPORTER_OTLP_TIMEOUT": "60", "OTEL_BSP_EXPORT_TIMEOUT": "50"}
        async with books(OK, **to(collector, **more)) as (gw, _):
            await said(gw, ask(model="m"))
            await until(lambda: gw.app.exporter.errors)
            assert "took longer than 0.06 s" in gw.app.exporter.errors["traces"]


async def test_headers_of_traces_can_be_kept_from_a_provider(books: Any, provider: Any) -> None:
    gone, kept = "{name = 'traceparent', delete = true}", "{name = 'baggage', value = 'x'}"
    drop = f"extra_headers = [{gone}, {kept}]"
    async with provider(ACCEPTED) as collector, books(OK, **to(collector)) as (gw, up):
        text = MEMORY + PRICED.format(up.base).replace("models =", f"{drop}\nmodels =")
        gw.app.configure(bitrouter.parse_config(text, {}).config)
        await said(gw, ask(model="m"), traceparent=PARENT, baggage="a=b", tracestate="c=d")
        seen = up.seen[0].headers
        assert "traceparent" not in seen and seen["baggage"] == "x" and seen["tracestate"] == "c=d"


def test_each_process_is_an_instance_of_its_own() -> None:
    told = [dict(bitrouter.otel_of(bitrouter.Config(), {}).resource) for _ in range(2)]
    assert told[0] == told[1] and re.fullmatch("[0-9a-f]{32}", str(told[0]["service.instance.id"]))


@pytest.mark.parametrize("endpoint", ["localhost:4318", "file:///etc/passwd", "http://"])
def test_an_address_that_is_none_is_told_when_the_file_is_read(endpoint: str) -> None:
    [problem] = bitrouter.parse_config(f'[otel]\nendpoint = "{endpoint}"', {}).problems
    assert problem.startswith("bitrouter.toml:2: otel.endpoint: expected an address such as http")


@pytest.mark.parametrize("text", ["[otel]", "[otel]\ntraces = true", "[otel]\nmetrics = true"])
def test_a_section_alone_turns_the_export_on(text: str) -> None:
    settings = bitrouter.otel_of(bitrouter.parse_config(text, {}).config, {})
    assert settings.traces and settings.traces.url == "http://localhost:4318/v1/traces"
    nothing = bitrouter.otel_of(bitrouter.parse_config("", {}).config, {})
    assert nothing.traces is None and nothing.metrics is None


async def test_metrics_are_pushed_with_their_units(books: Any, provider: Any) -> None:
    async with provider(ACCEPTED) as collector:
        environ = to(collector, OTEL_METRIC_EXPORT_INTERVAL="20", OTEL_TRACES_EXPORTER="none")
        async with books(OK, **environ) as (gw, _):
            await said(gw, ask(model="m"))
            done = len(collector.seen)
            await until(lambda: len(collector.seen) > done + 1)
        assert {seen.path for seen in collector.seen} == {"/v1/metrics"}
        told = json.loads(collector.seen[-1].body)["resourceMetrics"][0]["scopeMetrics"][0]
        units = {metric["name"]: metric["unit"] for metric in told["metrics"]}
        assert units["gen_ai.server.request.duration"] == "s"
        assert units["bitrouter.requests"] == "{request}"


async def test_a_reload_changes_where_spans_and_receipts_go(
    books: Any, provider: Any, tmp_path: Any
) -> None:
    async with provider(ACCEPTED) as first, provider(ACCEPTED) as second:
        async with books(OK, toml=f"[otel]\nendpoint = '{first.base}'\n") as (gw, up):
            await said(gw, ask(model="m"))
            text = f"[otel]\nendpoint = '{second.base}'\n[state]\nurl = '{tmp_path}/new.db'\n"
            loaded = bitrouter.parse_config(text + PRICED.format(up.base), {})
            gw.app.configure(loaded.config)
            await until(lambda: first.seen)  # what was waiting has gone where it was meant to
            await said(gw, ask(model="m"))
            assert len(await receipts(gw)) == 1
        assert {seen.path for seen in second.seen} == {"/v1/traces", "/v1/metrics"}
        assert (tmp_path / "new.db").exists()


async def test_a_lost_variable_turns_the_export_off_and_nothing_else(books: Any) -> None:
    text = "[otel]\nendpoint = 'http://127.0.0.1:9'\nheaders = {a = '${NOT_THERE}'}\n"
    loaded = bitrouter.parse_config(text, {})
    assert not loaded.problems and not loaded.fatal
    settings = bitrouter.otel_of(loaded.config, {})
    assert settings.traces is None and settings.metrics is None
    assert "NOT_THERE" in settings.warnings[0]


# The command line.


async def test_nothing_is_lost_at_a_signal_and_the_command_line_adds_it_up(
    server: Any,  # noqa: F811
    provider: Any,
) -> None:
    async with provider(OK) as up, provider(ACCEPTED) as collector, server() as s:
        s.environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.base}
        s.environ |= {"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"}
        s.write(PRICED.format(up.base))
        await s.start()
        for _ in range(3):
            await s.served("m")
        status, told, _ = await s.run("observe", "status")
        assert (status, told["traces"]["url"]) == (0, f"{collector.base}/v1/traces")
        status, told, _ = await s.run("doctor")
        found = {one["about"]: one["level"] for one in told["findings"]}
        assert (status, found["otel"], found["server"]) == (0, "ok", "ok")
        assert b"bitrouter doctor" in gzip.decompress(collector.seen[-1].body)
        assert await s.stop() == 0
        assert {"/v1/traces", "/v1/metrics"} <= {seen.path for seen in collector.seen}
        status, told, _ = await s.run("usage", "--group-by", "provider")
        assert status == 0
        assert [(one["group"], one["requests"]) for one in told["data"]] == [("up", 3)]
        assert told["total"]["cost_nano"] == 3 * 97_500
        status, told, _ = await s.run("requests", "--limit", "2", "--status", "200")
        assert len(told["data"]) == 2 and told["has_more"]
        status, _, words = await s.run("requests", "--status", "9")
        assert status == 1 and "status: expected" in words


async def test_quiet_servers_log_no_requests_and_loud_ones_each_attempt(
    server: Any,  # noqa: F811
    provider: Any,
) -> None:
    async with provider(OK) as up, server() as s:
        s.write(PRICED.format(up.base))
        await s.start("-v")
        await s.served("m")
        assert await s.stop() == 0
        assert [line["event"] for line in s.lines].count("attempt") == 1
        for odd in ("loud", "2"):
            status, _, words = await s.run("serve", BITROUTER_LOG=odd)
            assert status == 1 and "BITROUTER_LOG: expected one of debug, info" in words


def test_prices_are_multiplied_exactly() -> None:
    price = bitrouter.Price(0.0375, 0.1, 0.01, 0.3)
    for tokens in (1, 3, 5, 7, 999_999_937):
        usage = bitrouter.Usage(tokens, tokens)
        wanted = round(Fraction(tokens * 37_500 + tokens * 100_000, 1000))
        assert bitrouter.cost_nanousd(usage, price) == wanted
