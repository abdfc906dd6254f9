"""One upstream call, and the loop of retries and fallbacks around it."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from support import (
    CHAT_ANSWER,
    CHAT_STREAM,
    DONE,
    MESSAGES_ANSWER,
    MESSAGES_STREAM,
    Answer,
    Caller,
    FakeProvider,
    Reply,
    ask,
    chat_chunk,
    named_event,
    request_bytes,
    stream,
    until,
)

CHAT_PATH = "/v1/chat/completions"
KEY = "sk-the-key-of-a-0123456789"  # of the first provider of a chain

RESPONSES_ANSWER = {
    "id": "resp_1",
    "object": "response",
    "status": "completed",
    "error": None,
    "output": [{"type": "message", "id": "msg_1", "content": []}],
    "usage": {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18},
}
_RESPONSES_EVENTS: tuple[dict[str, Any], ...] = (
    {"type": "response.created", "response": {**RESPONSES_ANSWER, "status": "in_progress"}},
    {"type": "response.output_item.added", "item": {"type": "message", "id": "msg_1"}},
    {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "Hello!"},
    {"type": "response.completed", "response": RESPONSES_ANSWER},
)
RESPONSES_STREAM = tuple(
    named_event({**event, "sequence_number": i}) for i, event in enumerate(_RESPONSES_EVENTS)
)


def gemini_event(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\r\n\r\n"


def gemini_chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, **more}]}


GEMINI_USAGE = {"promptTokenCount": 11, "candidatesTokenCount": 7, "totalTokenCount": 18}
GEMINI_ANSWER = {**gemini_chunk("Hello!", finishReason="STOP"), "usageMetadata": GEMINI_USAGE}
GEMINI_STREAM = (gemini_event(gemini_chunk("Hel")), gemini_event(GEMINI_ANSWER))


class Spoken(NamedTuple):
    """A protocol as a caller meets it. `begun`: how many events make a first token."""

    path: str
    body: dict[str, Any]
    answer: dict[str, Any]
    events: tuple[bytes, ...]
    begun: int
    stream_path: str = ""


_CONTENTS = {"contents": [{"parts": [{"text": "Hi"}]}]}
SPOKEN = {
    "chat_completions": Spoken(CHAT_PATH, ask(model="smart"), CHAT_ANSWER, CHAT_STREAM, 2),
    "responses": Spoken(
        "/v1/responses", {"model": "smart", "input": "Hi"}, RESPONSES_ANSWER, RESPONSES_STREAM, 3
    ),
    "messages": Spoken(
        "/v1/messages", ask(model="smart", max_tokens=9), MESSAGES_ANSWER, MESSAGES_STREAM, 3
    ),
    "generate_content": Spoken(
        "/v1beta/models/smart:generateContent",
        _CONTENTS,
        GEMINI_ANSWER,
        GEMINI_STREAM,
        1,
        "/v1beta/models/smart:streamGenerateContent?alt=sse",
    ),
}


def chain(
    *ups: FakeProvider,
    protocol: str = "chat_completions",
    timeouts: str = "",
    toml: str = "",
    **more: str,
) -> str:
    """A configuration in which `smart` is served by these providers: a, then b, and so on.

    timeouts: of the first.
    """
    parts = [toml]
    for name, up in zip("abcd", ups, strict=False):
        parts += [
            f"[providers.{name}]",
            f'api_base = "{up.base}/v1"',
            f'api_key = "sk-the-key-of-{name}-0123456789"',
            f'api_protocol = "{protocol}"',
            f"timeouts = {{{timeouts if name == 'a' else ''}}}",
            *(f"{key} = {value}" for key, value in more.items()),
        ]
    endpoints = [f'{{provider = "{name}", service_id = "m"}}' for name in "abcd"[: len(ups)]]
    return "\n".join([*parts, "[models.smart]", f"endpoints = [{', '.join(endpoints)}]"])


@dataclass
class World:
    """A gateway whose model `smart` is served by provider a and then by b, and a caller."""

    a: FakeProvider
    b: FakeProvider
    gateway: Any
    caller: Caller
    protocol: str = "chat_completions"

    async def ask(self, **more: Any) -> Answer:
        spoken = SPOKEN[self.protocol]
        streamed = more.get("stream") and spoken.stream_path
        body = {**spoken.body, **more}
        return await self.caller.post(streamed or spoken.path, body)

    @property
    def asked(self) -> tuple[int, int]:
        """How often each provider was asked."""
        return len(self.a.seen), len(self.b.seen)


def script(replies: Reply | list[Reply]) -> list[Reply]:
    return replies if isinstance(replies, list) else [replies]


@pytest.fixture
def world(provider: Any, gateway: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(
        a: Reply | list[Reply],
        b: Reply | list[Reply] | None = None,
        protocol: str = "chat_completions",
        **more: Any,
    ) -> AsyncIterator[World]:
        """Without b, there is one provider only."""
        ok = [Reply(body=SPOKEN[protocol].answer)]
        async with provider(*script(a)) as first, provider(*script(b or ok)) as second:
            ups = [first] if b is None else [first, second]
            toml = chain(*ups, protocol=protocol, **more)
            async with gateway(toml) as gw, gw.caller() as caller:
                yield World(first, second, gw, caller, protocol)

    return start


@pytest.fixture
def one_openai(provider: Any, gateway: Any, openai_env: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(*replies: Reply, toml: str = "", key: str = "sk-x") -> AsyncIterator[World]:
        """OpenAI alone, which is a."""
        async with (
            provider(*replies) as up,
            gateway(toml, openai_env(up, key)) as gw,
            gw.caller() as caller,
        ):
            yield World(up, up, gw, caller)

    return start


OK = Reply(body=CHAT_ANSWER)
OK_STREAM = stream(*CHAT_STREAM)
NO_RETRY = "[upstream.retry]\nmax = 0"


def no(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """A refusal in OpenAI's shape."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    error = {"message": message, "type": "some_error", "param": None, "code": code}
    return Reply(status=status, body={"error": error}, headers=named)


# Which failures are worth another target.

SHORT = {"content-length": "999"}  # a length that the body does not reach
TOO_LONG = no(400, "This model's maximum context length is 8192 tokens", "context_length_exceeded")
REFUSALS = {
    "408": no(408),
    "429": no(429),
    "500": no(500),
    "502": no(502),
    "503": no(503),
    "504": no(504),
    "529": no(529),
    "402": no(402),
    "a quota in a 429": no(429, code="insufficient_quota"),
    "a balance in a 400": no(400, "Your credit balance is too low to access the API"),
    "a spend limit in a 403": no(403, code="organization_spend_limit_exceeded"),
    "401": no(401),
    "403": no(403),
    "a bad key in a 400": no(400, code="invalid_api_key"),
    "a redirect": Reply(status=307, headers={"location": "https://example.com/"}),
    "too long": TOO_LONG,
    "too long, in words": no(400, "prompt is too long: 212000 tokens > 200000 maximum"),
    "filtered": no(400, code="content_filter"),
    "an unknown model": no(404, code="model_not_found"),
    "an unknown model, in words": no(404, "The model `m` does not exist"),
    "an error page": Reply(status=502, body=b"<html>", headers={"content-type": "text/html"}),
}
WHOLE_FAILURES = {
    **REFUSALS,
    "a page": Reply(body=b"<html>welcome</html>", headers={"content-type": "text/html"}),
    "nothing": Reply(body=b""),
    "a list": Reply(body=b"[]"),
    "half a document": Reply(body=b'{"choices": ['),
    "an error in a 200": Reply(body={"error": {"message": "overloaded", "code": 503}}),
    "no choices": Reply(body={"id": "x", "choices": []}),
    "a 204": Reply(status=204, body=b""),
    "a cut answer": Reply(body=b"{", framing="close", headers=SHORT, ending="cut"),
    "a reset": Reply(body=b"{", framing="close", headers=SHORT, ending="reset"),
    "half of the chunks": Reply(body=CHAT_ANSWER, framing="chunked", ending="cut"),
    "silence": Reply(hangs=True),
    "silence in the body": Reply(body=b"{", framing="close", headers=SHORT, ending="hang"),
    "broken gzip": Reply(body=b"not gzip", headers={"content-encoding": "gzip"}),
}
ROLE = CHAT_STREAM[0]  # is no substance yet
STREAM_FAILURES = {
    **REFUSALS,
    "no event": stream(b""),
    "only comments": stream(b": hello\n\n"),
    "only a role": stream(ROLE),
    "only the end": stream(DONE),
    "a cut before the first token": stream(ROLE, ending="cut"),
    "a reset before the first token": stream(ROLE, ending="reset"),
    "an error before the first token": stream(ROLE, b'data: {"error":{"message":"no"}}\n\n'),
    "an error that is a string": stream(b'data: {"error":"out of memory"}\n\n'),
    "an event that is not JSON": stream(ROLE, b"data: {oops\n\n"),
    "an error in a 200": Reply(body={"error": {"message": "overloaded", "code": 503}}),
    "a page": Reply(body=b"<html>", headers={"content-type": "text/html; charset=utf-8"}),
    "silence": Reply(hangs=True),
    "silence after the head": stream(ROLE, ending="hang"),
}


def patience(failure: str) -> str:
    """Short for silence only: a busy machine must not make a failure of another kind."""
    return "total_s = 0.04, first_token_s = 0.04" if "silence" in failure else ""


@pytest.mark.parametrize("failure", WHOLE_FAILURES)
async def test_the_next_target_answers_when_the_first_says(world: Any, failure: str) -> None:
    async with world(WHOLE_FAILURES[failure], OK, timeouts=patience(failure), toml=NO_RETRY) as w:
        answer = await w.ask()
        served = (answer.status, answer.headers["x-bitrouter-provider"], answer.json())
        assert served == (200, "b", CHAT_ANSWER)
        assert w.asked == (1, 1)


@pytest.mark.parametrize("failure", STREAM_FAILURES)
async def test_the_next_target_streams_when_the_first_says(world: Any, failure: str) -> None:
    async with world(
        STREAM_FAILURES[failure], OK_STREAM, timeouts=patience(failure), toml=NO_RETRY
    ) as w:
        answer = await w.ask(stream=True, stream_options={"include_usage": True})
        assert (answer.status, answer.headers["x-bitrouter-provider"]) == (200, "b")
        assert answer.body == b"".join(CHAT_STREAM)
        assert w.asked == (1, 1)


GOOGLE_ERROR = {"code": 503, "message": "no", "status": "UNAVAILABLE"}
GOOGLE_BAD_KEY = {
    "code": 400,
    "message": "API key not valid",
    "status": "INVALID_ARGUMENT",
    "details": [{"@type": "x", "reason": "API_KEY_INVALID"}],
}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}
ELSEWHERE_FAILURES = {
    ("messages", "an error event"): stream(MESSAGES_STREAM[0], named_event(OVERLOADED)),
    ("messages", "a start and no more"): stream(*MESSAGES_STREAM[:2]),
    ("messages", "a spend limit"): Reply(
        status=400, body={"error": {"type": "billing_error", "message": "no"}}
    ),
    ("responses", "a failed response"): stream(
        RESPONSES_STREAM[0],
        named_event({"type": "response.failed", "response": {"error": {"message": "no"}}}),
    ),
    ("responses", "a flat error event"): stream(
        RESPONSES_STREAM[0], named_event({"type": "error", "message": "no", "code": "x"})
    ),
    ("responses", "a start and no more"): stream(*RESPONSES_STREAM[:2]),
    ("generate_content", "an error event"): stream(gemini_event({"error": GOOGLE_ERROR})),
    ("generate_content", "an array with an error"): Reply(
        status=503, body=[{"error": GOOGLE_ERROR}]
    ),
    ("generate_content", "a bad key in a 400"): Reply(status=400, body={"error": GOOGLE_BAD_KEY}),
    ("generate_content", "usage alone"): stream(gemini_event({"usageMetadata": GEMINI_USAGE})),
}


@pytest.mark.parametrize(("protocol", "failure"), ELSEWHERE_FAILURES)
async def test_other_protocols_fall_over_too(world: Any, protocol: str, failure: str) -> None:
    events = SPOKEN[protocol].events
    first = ELSEWHERE_FAILURES[protocol, failure]
    async with world(first, stream(*events), protocol, toml=NO_RETRY) as w:
        answer = await w.ask(stream=True)
        assert (answer.headers["x-bitrouter-provider"], answer.body) == ("b", b"".join(events))


@pytest.mark.parametrize("protocol", SPOKEN)
async def test_an_answer_without_its_substance_is_none(world: Any, protocol: str) -> None:
    async with world(Reply(body={"id": "x"}), Reply(body=SPOKEN[protocol].answer), protocol) as w:
        answer = await w.ask()
        assert (answer.headers["x-bitrouter-provider"], answer.status) == ("b", 200)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
async def test_what_the_request_is_to_blame_for_is_said_at_once(
    world: Any, status: int, streams: bool
) -> None:
    said = b'{"error":  {"message": "temperature: not a number", "x": 1.0}}'
    async with world(Reply(status=status, body=said), OK) as w:
        answer = await w.ask(stream=streams)
        assert (answer.status, answer.body) == (status, said)
        assert w.asked == (1, 0)


@pytest.mark.parametrize("status", [400, 402, 404, 408, 429, 500, 502, 503, 529])
async def test_one_provider_alone_speaks_for_itself(world: Any, status: int) -> None:
    said = b'{"error":  {"message": "no",   "n": 1.50}}'
    async with world(Reply(status=status, body=said)) as w:
        answer = await w.ask()
        assert (answer.status, answer.body) == (status, said)
        assert answer.headers["x-bitrouter-provider"] == "a"


async def test_a_page_instead_of_an_error_is_quoted_in_one_of_ours(world: Any) -> None:
    page = Reply(status=500, body=b"<h1>It broke</h1>", headers={"content-type": "text/html"})
    async with world(page) as w:
        answer = await w.ask()
        assert answer.status == 500
        assert "<h1>It broke</h1>" in answer.json()["error"]["message"]


async def test_nobody_can_be_reached(gateway: Any) -> None:
    with socket.socket() as shut:
        shut.bind(("127.0.0.1", 0))
        gone = FakeProvider([], base=f"http://127.0.0.1:{shut.getsockname()[1]}")
        async with gateway(chain(gone)) as gw, gw.caller() as caller:
            answer = await caller.post(CHAT_PATH, ask(model="smart"))
    # The same attempt twice: refused, and refused again.
    assert (answer.status, answer.headers["x-bitrouter-attempts"]) == (503, "2")
    assert "a could not be reached: Connection refused (2 times)" in str(answer.json())


@pytest.mark.parametrize("streams", [False, True])
async def test_an_error_in_a_200_has_the_status_that_it_names(world: Any, streams: bool) -> None:
    async with world(Reply(body={"error": {"message": "slow down", "code": 429}})) as w:
        answer = await w.ask(stream=streams)
        assert (answer.status, answer.json()["error"]["type"]) == (429, "rate_limit_error")


async def test_an_error_event_before_the_first_token_has_the_status_it_stands_for(
    world: Any,
) -> None:
    async with world(stream(MESSAGES_STREAM[0], named_event(OVERLOADED)), protocol="messages") as w:
        answer = await w.ask(stream=True)
        assert (answer.status, answer.json()["error"]["type"]) == (529, "overloaded_error")


# Our own keys.

KEY_LEAKS = {
    "401": no(401, f"Incorrect API key provided: {KEY}"),
    "403": no(403, f"{KEY} may not do this"),
    "a page": Reply(status=401, body=f"<b>{KEY}</b>".encode()),
    "a 400": no(400, f"bad header: Bearer {KEY}"),
    "an error in a 200": Reply(body={"error": {"message": f"cannot serve {KEY}"}}),
    "a page in a 200": Reply(body=f"<b>{KEY}</b>".encode()),
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("leak", KEY_LEAKS)
async def test_a_key_that_the_provider_repeats_stays_here(
    world: Any, leak: str, streams: bool
) -> None:
    async with world(KEY_LEAKS[leak]) as w:
        answer = await w.ask(stream=streams)
        shown = f"{answer.headers}{answer.body!r}{w.gateway.written.getvalue()}"
        assert answer.status >= 400 and KEY not in shown


async def test_a_key_in_a_stream_s_own_error_stays_here(world: Any) -> None:
    event = b'data: {"error":{"message":"cannot serve %b"}}\n\n' % KEY.encode()
    async with world(stream(ROLE, event)) as w:
        answer = await w.ask(stream=True)
        assert KEY not in f"{answer.body!r}{w.gateway.written.getvalue()}"


async def test_a_key_in_an_error_in_mid_stream_stays_here(world: Any) -> None:
    event = b'data: {"error":{"message":"cannot serve %b"}}\n\n' % KEY.encode()
    async with world(stream(*CHAT_STREAM[:2], event)) as w:
        answer = await w.ask(stream=True)
        assert KEY not in f"{answer.body!r}{w.gateway.written.getvalue()}"
        assert answer.events()[-1]["error"]["message"] == "cannot serve [redacted]"


@pytest.mark.parametrize("status", [401, 403])
async def test_our_key_refused_is_no_fault_of_the_caller(world: Any, status: int) -> None:
    async with world(no(status)) as w:
        answer = await w.ask()
        code = answer.json()["error"]["code"]
        assert (answer.status, code) == (502, "upstream_authentication_failed")


async def test_several_keys_in_one_variable_stand_in_for_each_other(one_openai: Any) -> None:
    async with one_openai(no(429), OK, key="sk-one, sk-two") as w:
        answer = await w.caller.post(CHAT_PATH, ask())
        assert (answer.status, answer.headers["x-bitrouter-attempts"]) == (200, "2")
        used = [seen.headers["authorization"] for seen in w.a.seen]
        assert used == ["Bearer sk-one", "Bearer sk-two"]


ACCOUNTS = """
[providers.openai]
accounts = [{label = "x", api_key = "sk-x"}, {label = "y", api_key = "sk-y"}]
"""


@pytest.mark.parametrize(("strategy", "keys"), [("balance", "xyx"), ("failover", "xxx")])
async def test_accounts_take_turns_if_they_are_told_to(
    one_openai: Any, strategy: str, keys: str
) -> None:
    async with one_openai(OK, toml=f'{ACCOUNTS}account_strategy = "{strategy}"') as w:
        for _ in keys:
            await w.caller.post(CHAT_PATH, ask())
        used = [seen.headers["authorization"] for seen in w.a.seen]
        assert used == [f"Bearer sk-{key}" for key in keys]


# The same target again.


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("wait", "asked"),
    [
        ({"retry-after-ms": "5"}, (2, 0)),
        ({"retry-after": "0.005"}, (2, 0)),
        ({"retry-after": "30"}, (1, 1)),
        ({"retry-after": "Fri, 01 Jan 2100 00:00:00 GMT"}, (1, 1)),
        ({}, (1, 1)),
    ],
    ids=["ms", "seconds", "long", "date", "none"],
)
async def test_a_short_wait_is_waited_for(
    world: Any, status: int, wait: dict[str, str], asked: tuple[int, int]
) -> None:
    async with world([Reply(status=status, body=b"{}", headers=wait), OK], OK) as w:
        answer = await w.ask()
        assert (answer.status, w.asked) == (200, asked)


async def test_other_refusals_are_not_repeated_whatever_they_ask_for(world: Any) -> None:
    async with world(no(500, retry_after_ms="5"), OK) as w:
        await w.ask()
        assert w.asked == (1, 1)


@pytest.mark.parametrize("ending", ["cut", "reset"])
async def test_an_answer_that_breaks_off_is_not_asked_for_again(world: Any, ending: str) -> None:
    async with world([stream(ROLE, ending=ending), OK_STREAM], OK_STREAM) as w:
        answer = await w.ask(stream=True)
        assert (answer.headers["x-bitrouter-provider"], w.asked) == ("b", (1, 1))


async def test_a_target_is_not_tried_more_often_than_it_may(world: Any) -> None:
    retry = "[upstream.retry]\nmax = 2\nbase_ms = 1"
    async with world(no(429, retry_after_ms="1"), OK, toml=retry) as w:
        answer = await w.ask()
        assert (answer.headers["x-bitrouter-attempts"], w.asked) == ("4", (3, 1))


async def test_a_provider_that_closes_without_a_byte_is_tried_again(gateway: Any) -> None:
    dialled = []

    async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    async with await asyncio.start_server(slam, "127.0.0.1", 0) as server:
        up = FakeProvider([], base=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with gateway(chain(up)) as gw, gw.caller() as caller:
            answer = await caller.post(CHAT_PATH, ask(model="smart"))
    assert (answer.status, len(dialled)) == (503, 2)


# When all have failed.

SUMS: dict[str, tuple[Reply, Reply, int, str]] = {
    "limits": (no(429, retry_after="30"), no(429, retry_after="20"), 429, "20"),
    "one wait unknown": (no(429), no(429, retry_after="20"), 429, "20"),
    "timeouts": (Reply(hangs=True), Reply(hangs=True), 504, ""),
    "the same": (no(500), no(500), 500, ""),
    "no credit": (no(402), no(402), 402, ""),
    "keys": (no(401), no(403), 502, ""),
    "mixed": (no(500), no(502), 503, ""),
    "mixed with a limit": (no(500), no(429, retry_after="20"), 503, ""),
}


@pytest.mark.parametrize("case", SUMS)
async def test_a_chain_of_failures_has_one_status(world: Any, case: str) -> None:
    a, b, status, wait = SUMS[case]
    toml = "[upstream.timeouts]\ntotal_s = 0.04" if a.hangs else ""
    async with world(a, b, toml=toml) as w:
        answer = await w.ask()
        assert (answer.status, answer.headers.get("retry-after", "")) == (status, wait)


async def test_each_failed_attempt_is_named(world: Any) -> None:
    async with world(no(500, "disk full"), no(429, "slow down")) as w:
        error = (await w.ask()).json()["error"]
        assert error["code"] == "all_attempts_failed"
        assert "a answered 500: disk full; b answered 429: slow down" in error["message"]


@pytest.mark.parametrize("first", ["500", "too long"])
@pytest.mark.parametrize("streams", [False, True])
async def test_the_last_target_s_words_on_the_prompt_reach_the_caller(
    world: Any, first: str, streams: bool
) -> None:
    async with world(REFUSALS[first], TOO_LONG) as w:
        answer = await w.ask(stream=streams)
        # Agents compact their history when they read this, and only then.
        assert (answer.status, answer.json()) == (400, TOO_LONG.body)


async def test_out_of_credit_everywhere_is_not_worth_a_retry(world: Any) -> None:
    async with world(no(402), no(402)) as w:
        answer = await w.ask()
        kind = answer.json()["error"]["type"]
        assert (kind, answer.headers.get("x-should-retry")) == ("billing_error", "false")


# The breaker.

SPARED = "[upstream.breaker]\nfailures = 2\nwindow_s = 5\ncooldown_s = 5"
BRIEFLY = "[upstream.breaker]\nfailures = 1\ncooldown_s = 0.04"


async def test_a_target_that_keeps_failing_goes_last(world: Any) -> None:
    async with world(no(500), OK, toml=SPARED) as w:
        for _ in range(4):
            await w.ask()
        assert w.asked == (2, 4)


async def test_the_last_resort_is_tried_though_it_cools_down(world: Any) -> None:
    async with world([no(500), OK], [OK, no(500)], toml=SPARED.replace("2", "1", 1)) as w:
        served = [(await w.ask()).headers["x-bitrouter-provider"] for _ in range(2)]
        assert served == ["b", "a"]


@pytest.mark.parametrize("refusal", ["401", "403", "402", "a quota in a 429"])
async def test_a_target_without_key_or_credit_rests_at_once(world: Any, refusal: str) -> None:
    async with world(REFUSALS[refusal], OK) as w:
        await w.ask()
        await w.ask()
        assert w.asked == (1, 2)


async def test_a_target_stays_away_for_as_long_as_it_said(world: Any) -> None:
    async with world([no(429, retry_after="30"), OK], OK) as w:
        await w.ask()
        await w.ask()
        assert w.asked == (1, 2)


async def test_a_failure_outside_the_window_is_forgotten(world: Any) -> None:
    toml = "[upstream.breaker]\nfailures = 2\nwindow_s = 0.03\ncooldown_s = 5"
    async with world(no(500), OK, toml=toml) as w:
        for _ in range(3):
            await w.ask()
            await asyncio.sleep(0.04)
        assert w.asked == (3, 3)


@pytest.mark.parametrize(("probe", "asked"), [(OK, (3, 1)), (no(500), (2, 3))])
async def test_one_probe_decides_after_the_rest(
    world: Any, probe: Reply, asked: tuple[int, int]
) -> None:
    toml = "[upstream.breaker]\nfailures = 9\ncooldown_s = 0.04"
    async with world([no(401), probe], OK, toml=toml) as w:
        await w.ask()
        await asyncio.sleep(0.045)
        w.gateway.app.health.breaker.cooldown_s = 5  # a rest that begins now outlasts this test
        await w.ask()
        await w.ask()
        assert w.asked == asked


async def test_only_one_at_a_time_may_probe(world: Any) -> None:
    async with world([no(500), Reply(hangs=True)], OK, toml=BRIEFLY) as w:
        await w.ask()
        await asyncio.sleep(0.045)
        async with w.gateway.caller() as probing:
            probing.send(request_bytes("POST", CHAT_PATH, ask(model="smart")))
            await until(lambda: len(w.a.seen) == 2)
            answer = await w.ask()
        assert (answer.headers["x-bitrouter-provider"], w.asked) == ("b", (2, 2))


@pytest.mark.parametrize("refusal", [no(400), TOO_LONG, no(404, code="model_not_found")])
async def test_what_the_request_is_to_blame_for_is_not_held_against_a_target(
    world: Any, refusal: Reply
) -> None:
    async with world([refusal, refusal, OK], OK, toml=SPARED.replace("2", "1", 1)) as w:
        await w.ask()
        await w.ask()
        await w.ask()
        assert len(w.a.seen) == 3


async def test_a_stream_that_breaks_counts_as_a_failure(world: Any) -> None:
    broken = stream(*CHAT_STREAM[:2], ending="cut")
    async with world(broken, OK_STREAM, toml=SPARED.replace("2", "1", 1)) as w:
        await w.ask(stream=True)
        answer = await w.ask(stream=True)
        assert (answer.headers["x-bitrouter-provider"], len(w.a.seen)) == ("b", 1)


# Side operations say nothing about how a model is doing.

SIDE = {
    "messages": ("/v1/messages/count_tokens", {"input_tokens": 3}),
    "generate_content": ("/v1beta/models/smart:countTokens", {"totalTokens": 3}),
    "chat_completions": ("/v1/embeddings", {"data": [], "usage": {"prompt_tokens": 1}}),
}


@pytest.mark.parametrize("protocol", SIDE)
async def test_a_failed_side_operation_is_not_held_against_a_target(
    world: Any, protocol: str
) -> None:
    (path, _), ok = SIDE[protocol], Reply(body=SPOKEN[protocol].answer)
    toml = SPARED.replace("2", "1", 1)
    async with world([no(500), ok], ok, protocol, toml=toml) as w:
        await w.caller.post(path, SPOKEN[protocol].body)
        answer = await w.ask()
        assert answer.headers["x-bitrouter-provider"] == "a"


@pytest.mark.parametrize("protocol", SIDE)
async def test_a_side_operation_does_not_make_a_target_well(world: Any, protocol: str) -> None:
    (path, said), ok = SIDE[protocol], Reply(body=SPOKEN[protocol].answer)
    toml = SPARED.replace("2", "1", 1)
    async with world([no(500), Reply(body=said), ok], [ok, no(500), ok], protocol, toml=toml) as w:
        await w.ask()
        counted = await w.caller.post(path, SPOKEN[protocol].body)
        answer = await w.ask()
        assert (counted.json(), answer.headers["x-bitrouter-provider"]) == (said, "b")


@pytest.mark.parametrize("protocol", SIDE)
async def test_a_side_operation_passes_through(world: Any, protocol: str) -> None:
    path, said = SIDE[protocol]
    async with world(Reply(body=said), protocol=protocol) as w:
        answer = await w.caller.post(path, SPOKEN[protocol].body)
        assert (answer.status, answer.json()) == (200, said)
        upstream = w.a.seen[0].path.rpartition("/")[2]
        assert upstream == path.rpartition("/")[2].replace("smart", "m")


# The one thing that we add to a Chat request.


async def test_usage_is_asked_for_and_kept_from_who_did_not_ask(world: Any) -> None:
    async with world(OK_STREAM) as w:
        answer = await w.ask(stream=True)
        assert w.a.seen[0].json()["stream_options"] == {"include_usage": True}
        assert answer.body == b"".join(CHAT_STREAM[:4]) + DONE


async def test_other_stream_options_stay(world: Any) -> None:
    async with world(OK_STREAM) as w:
        await w.ask(stream=True, stream_options={"include_obfuscation": False})
        options = w.a.seen[0].json()["stream_options"]
        assert options == {"include_usage": True, "include_obfuscation": False}


NULLS = (
    chat_chunk({"content": "a"}, usage=None),
    chat_chunk({"content": "b"}, usage=None),
    chat_chunk({}, finish="stop", usage=None),
    *CHAT_STREAM[4:],
)


async def test_who_asks_for_usage_gets_every_byte(world: Any) -> None:
    async with world(stream(*NULLS)) as w:
        request = ask(model="smart", stream=True, stream_options={"include_usage": True})
        answer = await w.caller.post(CHAT_PATH, request)
        assert w.a.seen[0].json() == {**request, "model": "m"}
        assert answer.body == b"".join(NULLS)


@pytest.mark.parametrize("size", [1, 40, 10_000])
async def test_what_our_asking_added_is_taken_away_again(world: Any, size: int) -> None:
    data = b"".join(NULLS)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    async with world(stream(*pieces)) as w:
        answer = await w.ask(stream=True)
        expected = b"".join(event.replace(b',"usage":null', b"") for event in NULLS[:3])
        assert answer.body == expected + DONE
        assert w.gateway.lines()[0]["in"] == 11


async def test_usage_on_a_chunk_with_choices_is_not_withheld(world: Any) -> None:
    events = (*CHAT_STREAM[:3], chat_chunk({}, finish="stop", usage={"prompt_tokens": 3}), DONE)
    async with world(stream(*events)) as w:
        answer = await w.ask(stream=True)
        assert answer.body == b"".join(events)


COMPLETION = (
    b'data: {"object":"text_completion","choices":[{"text":"Hi","index":0}],"usage":null}\n\n',
    b'data: {"choices":[{"text":"","index":0,"finish_reason":"stop"}],"usage":null}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":1}}\n\n',
    DONE,
)


async def test_the_older_completions_hide_their_usage_too(world: Any) -> None:
    async with world(stream(*COMPLETION)) as w:
        request = {"model": "smart", "prompt": "Say hi", "stream": True}
        answer = await w.caller.post("/v1/completions", request)
        bare = b"".join(COMPLETION[:2]).replace(b',"usage":null', b"")
        assert answer.body == bare + DONE
        assert (w.a.seen[0].path, w.gateway.lines()[0]["in"]) == ("/v1/completions", 5)


REFUSED_OPTION = no(400, "Unrecognized request argument supplied: stream_options")


async def test_a_refused_stream_option_is_left_out_and_remembered(world: Any) -> None:
    async with world([REFUSED_OPTION, OK_STREAM]) as w:
        answers = [await w.ask(stream=True) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
        assert ["stream_options" in s.json() for s in w.a.seen] == [True, False, False]


async def test_a_caller_s_own_stream_option_is_refused_in_the_provider_s_words(world: Any) -> None:
    async with world(REFUSED_OPTION, OK_STREAM) as w:
        answer = await w.ask(stream=True, stream_options={"include_usage": True})
        assert (answer.json(), w.asked) == (REFUSED_OPTION.body, (1, 0))


async def test_an_option_that_is_refused_again_is_the_provider_s_answer(world: Any) -> None:
    async with world(REFUSED_OPTION) as w:
        answer = await w.ask(stream=True)
        assert (answer.status, len(w.a.seen)) == (400, 2)


# Streams that go wrong after the first token.

BREAKS: dict[str, Callable[[tuple[bytes, ...]], Reply]] = {
    "cut": lambda events: stream(*events, ending="cut"),
    "reset": lambda events: stream(*events, None, ending="reset"),
    "closed": lambda events: stream(*events),
    "silent": lambda events: stream(*events, ending="hang"),
    "garbled": lambda events: stream(*events, b"event: x\ndata: {oops\n\n"),
    "half an event": lambda events: stream(*events, b'data: {"candidates": [', ending="cut"),
}
ERROR_MARKS: dict[str, Callable[[Any], bool]] = {
    "chat_completions": lambda last: last["error"]["code"].startswith("upstream_"),
    "responses": lambda last: (
        (last["type"], last["sequence_number"], last["response"]["id"])
        == ("response.failed", 3, "resp_1")
    ),
    "messages": lambda last: last["type"] == "error" and "message" in last["error"],
    "generate_content": lambda last: (
        next(iter(last)) == "error" and isinstance(last["error"]["code"], int)
    ),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("protocol", SPOKEN)
async def test_a_broken_stream_ends_in_the_protocol_s_own_error(
    world: Any, protocol: str, how: str
) -> None:
    begun = SPOKEN[protocol].events[: SPOKEN[protocol].begun]
    timeouts = "idle_s = 0.03" if how == "silent" else ""
    async with world(BREAKS[how](begun), protocol=protocol, timeouts=timeouts) as w:
        answer = await w.ask(stream=True)
        assert answer.body.startswith(b"".join(begun))
        assert ERROR_MARKS[protocol](answer.events()[-1])
        assert len(answer.events()) == len(begun) + 1
        assert (await w.caller.get("/health")).status == 200  # the connection is good for more


@pytest.mark.parametrize("how", BREAKS)
async def test_a_broken_array_ends_in_an_error_and_is_still_json(world: Any, how: str) -> None:
    reply, timeouts = BREAKS[how](GEMINI_STREAM[:1]), "idle_s = 0.03" if how == "silent" else ""
    async with world(reply, protocol="generate_content", timeouts=timeouts) as w:
        answer = await w.caller.post("/v1beta/models/smart:streamGenerateContent", _CONTENTS)
        first, last = answer.json()
        assert (first, isinstance(last["error"]["code"], int)) == (gemini_chunk("Hel"), True)


@pytest.mark.parametrize("protocol", ["chat_completions", "messages"])
async def test_a_broken_stream_has_no_made_up_end(world: Any, protocol: str) -> None:
    spoken = SPOKEN[protocol]
    async with world(stream(*spoken.events[: spoken.begun], ending="cut"), protocol=protocol) as w:
        body = (await w.ask(stream=True)).body
        assert b"[DONE]" not in body and b"message_stop" not in body and b'"stop"' not in body


async def test_a_broken_stream_is_not_tried_elsewhere(world: Any) -> None:
    async with world(stream(*CHAT_STREAM[:2], ending="cut"), OK_STREAM) as w:
        await w.ask(stream=True)
        assert w.asked == (1, 0)


async def test_a_broken_messages_stream_names_its_error_event(world: Any) -> None:
    async with world(stream(*MESSAGES_STREAM[:3], ending="cut"), protocol="messages") as w:
        body = (await w.ask(stream=True)).body
        assert body.rpartition(b"\n\nevent: ")[2].startswith(b"error\ndata: ")


INNER_ERRORS = {
    "chat_completions": b'data: {"error": {"message": "no", "x": 1.50}}\n\n',
    "responses": named_event({"type": "error", "message": "no", "sequence_number": 3}),
    "messages": named_event(OVERLOADED),
    "generate_content": gemini_event({"error": GOOGLE_ERROR}),
}


@pytest.mark.parametrize("protocol", SPOKEN)
@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one read"])
async def test_a_provider_s_own_error_in_a_stream_is_its_last_word(
    world: Any, protocol: str, together: bool
) -> None:
    spoken = SPOKEN[protocol]
    passed = (*spoken.events[: spoken.begun], INNER_ERRORS[protocol])
    sent = (*passed, *spoken.events[spoken.begun :])
    reply = stream(b"".join(sent)) if together else stream(*sent)
    async with world(reply, protocol=protocol) as w:
        answer = await w.ask(stream=True)
        assert answer.body == b"".join(passed)


async def test_a_provider_s_own_error_closes_the_array(world: Any) -> None:
    reply = stream(GEMINI_STREAM[0], INNER_ERRORS["generate_content"], GEMINI_STREAM[1])
    async with world(reply, protocol="generate_content") as w:
        answer = await w.caller.post("/v1beta/models/smart:streamGenerateContent", _CONTENTS)
        assert answer.json() == [gemini_chunk("Hel"), {"error": GOOGLE_ERROR}]


END_MARKS = {
    "chat_completions": (CHAT_STREAM[:4], DONE),
    "messages": (MESSAGES_STREAM[:5], b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
    "generate_content": (GEMINI_STREAM, b""),
}


@pytest.mark.parametrize("ending", ["clean", "cut"])
@pytest.mark.parametrize("protocol", END_MARKS)
async def test_a_finished_stream_gets_the_end_mark_that_it_lacks(
    world: Any, protocol: str, ending: str
) -> None:
    events, mark = END_MARKS[protocol]
    async with world(stream(*events, ending=ending), protocol=protocol) as w:
        answer = await w.ask(stream=True)
        assert answer.body == b"".join(events) + mark
        assert "error" not in w.gateway.lines()[0]


async def test_a_stream_s_last_event_may_lack_its_blank_line(world: Any) -> None:
    async with world(stream(*CHAT_STREAM[:4], DONE.rstrip())) as w:
        answer = await w.ask(stream=True)
        assert answer.body == b"".join(CHAT_STREAM[:4]) + DONE


async def test_google_s_sdk_sees_nothing_that_it_cannot_read(world: Any) -> None:
    alien = (b": hello\n\n", b"event: x\nid: 1\n" + GEMINI_STREAM[1], DONE)
    async with world(stream(GEMINI_STREAM[0], *alien), protocol="generate_content") as w:
        answer = await w.ask(stream=True)
        assert answer.body == b"".join(GEMINI_STREAM)


async def test_a_stream_may_be_an_array(world: Any) -> None:
    async with world(stream(*GEMINI_STREAM), protocol="generate_content") as w:
        answer = await w.caller.post("/v1beta/models/smart:streamGenerateContent", _CONTENTS)
        assert answer.json() == [gemini_chunk("Hel"), GEMINI_ANSWER]
        assert answer.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize("protocol", SPOKEN)
async def test_a_stream_of_its_own_protocol_keeps_every_byte(world: Any, protocol: str) -> None:
    events = SPOKEN[protocol].events
    async with world(stream(*events), protocol=protocol) as w:
        answer = await w.ask(stream=True, stream_options={"include_usage": True})
        assert answer.body == b"".join(events)
        [line] = w.gateway.lines()
        assert (line["in"], line["out"]) == (11, 7)


@pytest.mark.parametrize("protocol", SPOKEN)
async def test_an_answer_of_its_own_protocol_keeps_every_byte(world: Any, protocol: str) -> None:
    said = json.dumps(SPOKEN[protocol].answer, indent=3).encode()
    async with world(Reply(body=said), protocol=protocol) as w:
        answer = await w.ask()
        [line] = w.gateway.lines()
        assert (answer.body, line["in"], line["out"]) == (said, 11, 7)


async def test_a_request_keeps_every_byte_but_the_model(world: Any) -> None:
    raw = b'{ "temperature":1.50,"model" : "smart", "messages":[], "z":"\xc3\xa9\\u00e9", "n":1e3 }'
    async with world(OK) as w:
        await w.caller.post(CHAT_PATH, raw)
        assert w.a.seen[0].body == raw.replace(b'"smart"', b'"m"')


# Deadlines.


@pytest.mark.parametrize(
    ("limit", "reply", "streams", "said"),
    [
        ("first_token_s", stream(ROLE, ending="hang"), True, "sent no first token within 0.04 s"),
        ("total_s", Reply(hangs=True), False, "sent no answer within 0.04 s"),
        ("total_s", stream(*[b" ", None] * 90), False, "sent no answer within 0.04 s"),
        ("first_token_s", stream(*[ROLE, None] * 90), True, "sent no first token within 0.04 s"),
    ],
    ids=["first token", "total", "total of a trickle", "first token of a trickle"],
)
async def test_a_deadline_is_a_504_that_says_which(
    world: Any, limit: str, reply: Reply, streams: bool, said: str
) -> None:
    async with world(reply, timeouts=f"{limit} = 0.04") as w:
        answer = await w.ask(stream=streams)
        assert answer.status == 504
        assert f"a {said}" in answer.json()["error"]["message"]


async def test_a_stream_may_last_longer_than_any_limit(world: Any) -> None:
    slow = stream(*CHAT_STREAM[:2], *[b": wait\n\n", None] * 9, *CHAT_STREAM[2:])
    limits = "total_s = 0.01, first_token_s = 0.15, idle_s = 0.15"
    async with world(slow, timeouts=limits) as w:
        answer = await w.ask(stream=True)
        assert answer.events()[-1] == "[DONE]"


async def test_a_silent_stream_says_what_it_waited_for(world: Any) -> None:
    reply = stream(*CHAT_STREAM[:2], ending="hang")
    async with world(reply, timeouts="idle_s = 0.03") as w:
        error = (await w.ask(stream=True)).events()[-1]["error"]
        assert (error["code"], error["message"]) == (
            "upstream_timeout",
            "a sent nothing for 0.03 s",
        )


# Callers who hang up.


@pytest.mark.parametrize(
    ("reply", "streams"),
    [(Reply(hangs=True), False), (Reply(hangs=True), True), (stream(ROLE, ending="hang"), True)],
    ids=["whole", "stream without a head", "stream without a token"],
)
async def test_who_hangs_up_ends_the_call_upstream(world: Any, reply: Reply, streams: bool) -> None:
    async with world(reply) as w:
        async with w.gateway.caller() as caller:
            caller.send(request_bytes("POST", CHAT_PATH, ask(model="smart", stream=streams)))
            await until(lambda: w.a.seen)
        await w.a.hung_up.wait()
        [line] = await until(w.gateway.lines)
        assert (line["status"], line["code"]) == (499, "caller_gone")


async def test_who_hangs_up_in_mid_stream_ends_the_call_upstream(world: Any) -> None:
    async with world(stream(*CHAT_STREAM[:2], ending="hang")) as w:
        async with w.gateway.caller() as caller:
            caller.send(request_bytes("POST", CHAT_PATH, ask(model="smart", stream=True)))
            await caller.head()
        await w.a.hung_up.wait()
        [line] = await until(w.gateway.lines)
        assert line["status"] == 499


async def test_nobody_is_asked_again_for_who_hung_up(world: Any) -> None:
    async with world(no(503, retry_after="1"), OK) as w:
        async with w.gateway.caller() as caller:
            caller.send(request_bytes("POST", CHAT_PATH, ask(model="smart")))
            await until(lambda: w.gateway.lines("attempt_failed"))
        [line] = await until(w.gateway.lines)
        assert (line["code"], w.asked) == ("caller_gone", (1, 0))


async def test_a_caller_who_hangs_up_says_nothing_about_the_target(world: Any) -> None:
    reply = [Reply(hangs=True), OK]
    async with world(reply, OK, toml=SPARED.replace("2", "1", 1)) as w:
        async with w.gateway.caller() as caller:
            caller.send(request_bytes("POST", CHAT_PATH, ask(model="smart")))
            await until(lambda: w.a.seen)
        await until(w.gateway.lines)
        assert (await w.ask()).headers["x-bitrouter-provider"] == "a"


# Answers that may be anything.

SPEECH = {"model": "smart", "input": "Hi", "voice": "alloy"}
SOUND = bytes(range(256)) * 300


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_sound_passes_as_it_comes(world: Any, framing: str) -> None:
    reply = Reply(body=SOUND, headers={"content-type": "audio/mpeg"}, framing=framing)
    async with world(reply) as w:
        answer = await w.caller.post("/v1/audio/speech", SPEECH)
        assert (answer.body, answer.headers["content-type"]) == (SOUND, "audio/mpeg")
        assert (w.a.seen[0].path, w.a.seen[0].json()["model"]) == ("/v1/audio/speech", "m")


async def test_the_length_of_sound_is_told(world: Any) -> None:
    async with world(Reply(body=SOUND, headers={"content-type": "audio/mpeg"})) as w:
        answer = await w.caller.post("/v1/audio/speech", SPEECH)
        assert answer.headers.get("content-length") == str(len(SOUND))


FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="model.wav"\r\n'
    b'Content-Type: audio/wav\r\n\r\n\x00\xff\r\n--xy\r\nname="model"\r\n\r\nnot it\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nMODEL\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nsmart\r\n--xyz--\r\n'
)
FORM_TYPE = "multipart/form-data; boundary=xyz"


async def test_a_form_keeps_every_byte_but_the_model(world: Any) -> None:
    async with world(Reply(body={"text": "Hi"})) as w:
        path, form = "/v1/audio/transcriptions", FORM.replace(b"MODEL", b"smart")
        answer = await w.caller.post(path, form, content_type=FORM_TYPE)
        [seen] = w.a.seen
        assert (answer.json(), seen.path) == ({"text": "Hi"}, path)
        assert (seen.body, seen.headers["content-type"]) == (
            FORM.replace(b"MODEL", b"m"),
            FORM_TYPE,
        )


async def test_a_form_without_a_model_is_refused(world: Any) -> None:
    async with world(OK) as w:
        form = FORM.replace(b'name="model"\r\n\r\nMODEL', b'name="other"\r\n\r\nMODEL')
        answer = await w.caller.post("/v1/images/edits", form, content_type=FORM_TYPE)
        assert (answer.status, answer.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("refusal", ["500", "429", "401", "a redirect"])
async def test_a_refusal_of_sound_goes_to_the_next(world: Any, refusal: str) -> None:
    sound = Reply(body=SOUND, headers={"content-type": "audio/mpeg"})
    async with world(REFUSALS[refusal], sound) as w:
        answer = await w.caller.post("/v1/audio/speech", SPEECH)
        assert (answer.body, answer.headers["x-bitrouter-provider"]) == (SOUND, "b")


async def test_a_refusal_of_sound_is_passed_on_in_its_own_words(world: Any) -> None:
    async with world(no(400, "no such voice")) as w:
        answer = await w.caller.post("/v1/audio/speech", SPEECH)
        assert (answer.status, answer.json()["error"]["message"]) == (400, "no such voice")


BROKEN_SOUND = {
    "sized": Reply(body=SOUND, framing="close", headers={"content-length": "99999"}, ending="cut"),
    "chunked": Reply(body=SOUND, framing="chunked", ending="cut"),
    "gzip": Reply(body=gzip.compress(SOUND)[:-9], headers={"content-encoding": "gzip"}),
}


@pytest.mark.parametrize("how", BROKEN_SOUND)
async def test_broken_sound_is_cut_off_and_not_ended(world: Any, how: str) -> None:
    async with world(BROKEN_SOUND[how]) as w:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await w.caller.post("/v1/audio/speech", SPEECH)
        [line] = await until(w.gateway.lines)
        assert line["code"].startswith("upstream_")


async def test_who_hangs_up_on_sound_ends_the_call_upstream(world: Any) -> None:
    async with world(Reply(body=SOUND, framing="chunked", ending="hang")) as w:
        async with w.gateway.caller() as caller:
            caller.send(request_bytes("POST", "/v1/audio/speech", SPEECH))
            await caller.head()
        await w.a.hung_up.wait()


# Bodies that are packed, or large.

PACKED: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("coding", PACKED)
async def test_a_packed_answer_is_unpacked(world: Any, coding: str) -> None:
    body = PACKED[coding](json.dumps(CHAT_ANSWER).encode())
    async with world(Reply(body=body, headers={"content-encoding": coding})) as w:
        answer = await w.ask()
        assert (answer.json(), answer.headers.get("content-encoding")) == (CHAT_ANSWER, None)
        assert w.a.seen[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("coding", PACKED)
async def test_a_packed_stream_is_unpacked(world: Any, coding: str) -> None:
    data = PACKED[coding](b"".join(CHAT_STREAM))
    pieces = [data[i : i + 7] for i in range(0, len(data), 7)]
    async with world(stream(*pieces, headers={"content-encoding": coding})) as w:
        answer = await w.ask(stream=True)
        assert answer.body == b"".join(CHAT_STREAM[:4]) + DONE


async def test_packed_sound_is_unpacked(world: Any) -> None:
    reply = Reply(body=gzip.compress(SOUND), headers={"content-encoding": "gzip"})
    async with world(reply) as w:
        answer = await w.caller.post("/v1/audio/speech", SPEECH)
        assert (answer.body, answer.headers.get("content-encoding")) == (SOUND, None)


@pytest.mark.parametrize("numbers", [3, 300_000])
async def test_embeddings_of_any_size_are_booked(world: Any, numbers: int) -> None:
    vector = ",".join(["0.125"] * numbers)
    usage = b'"model": "m", "usage": {"prompt_tokens": 5, "total_tokens": 5}}'
    said = b'{"data": [{"embedding": [%b]}], %b' % (vector.encode(), usage)
    async with world(Reply(body=said)) as w:
        answer = await w.caller.post("/v1/embeddings", {"model": "smart", "input": "Hi"})
        [line] = w.gateway.lines()
        assert (answer.body == said, line["in"]) == (True, 5)


# Headers, on their way up.

TRAVELS = {
    "anthropic-beta": "a-1,b-2",
    "anthropic-version": "2026-10-21",
    "openai-organization": "org-1",
    "openai-project": "proj-1",
    "idempotency-key": "i-1",
    "traceparent": "00-1-2-03",
    "tracestate": "x=1",
    "user-agent": "SDK/1.0",
    "accept": "application/json",
    "x-stainless-lang": "python",
    "x-goog-api-client": "genai/3",
    "x-client-request-id": "c-1",
}
STAYS = {
    "authorization": "Bearer theirs",
    "x-api-key": "theirs",
    "x-goog-api-key": "theirs",
    "api-key": "theirs",
    "openai-api-key": "theirs",
    "cookie": "theirs=1",
    "proxy-authorization": "Basic theirs",
    "x-forwarded-for": "10.9.8.7",
    "forwarded": "for=theirs",
    "te": "trailers",
    "keep-alive": "theirs",
    "x-bitrouter-strict": "theirs",
    "accept-encoding": "gzip",
    "origin": "http://127.0.0.1",
}


@pytest.mark.parametrize("protocol", SPOKEN)
async def test_a_caller_s_headers_travel(world: Any, protocol: str) -> None:
    async with world(Reply(body=SPOKEN[protocol].answer), protocol=protocol) as w:
        await w.caller.post(SPOKEN[protocol].path, SPOKEN[protocol].body, **TRAVELS)
        [seen] = w.a.seen
        assert {name: seen.headers.get(name) for name in TRAVELS} == TRAVELS


@pytest.mark.parametrize("protocol", SPOKEN)
async def test_a_caller_s_credentials_and_its_way_here_stay(world: Any, protocol: str) -> None:
    async with world(Reply(body=SPOKEN[protocol].answer), protocol=protocol) as w:
        await w.caller.post(SPOKEN[protocol].path, SPOKEN[protocol].body, **STAYS)
        [seen] = w.a.seen
        assert "theirs" not in str(seen)
        assert {"x-forwarded-for", "te", "origin", "connection"}.isdisjoint(seen.headers)
        assert seen.headers["host"] == w.a.base.removeprefix("http://")


CREDENTIALS = {
    "chat_completions": ("authorization", f"Bearer {KEY}"),
    "responses": ("authorization", f"Bearer {KEY}"),
    "messages": ("x-api-key", KEY),
    "generate_content": ("x-goog-api-key", KEY),
}


@pytest.mark.parametrize("protocol", SPOKEN)
async def test_a_provider_gets_one_credential_of_the_right_kind(world: Any, protocol: str) -> None:
    async with world(Reply(body=SPOKEN[protocol].answer), protocol=protocol) as w:
        await w.ask()
        shown = [pair for pair in w.a.seen[0].headers.items() if KEY in pair[1]]
        assert shown == [CREDENTIALS[protocol]]


async def test_messages_have_a_version(world: Any) -> None:
    async with world(Reply(body=MESSAGES_ANSWER), protocol="messages") as w:
        await w.ask()
        assert w.a.seen[0].headers["anthropic-version"] == "2023-06-01"


@pytest.mark.parametrize("header", ["user-agent", "anthropic-beta", "anthropic-version", "x-own"])
@pytest.mark.parametrize("from_caller", [{}, {"user-agent": "SDK", "anthropic-beta": "b"}])
async def test_the_configuration_s_headers_win(
    world: Any, header: str, from_caller: dict[str, str]
) -> None:
    own = f'{{"{header}" = "mine"}}'
    reply = Reply(body=MESSAGES_ANSWER)
    async with world(reply, protocol="messages", extra_headers=own) as w:
        await w.caller.post("/v1/messages", SPOKEN["messages"].body, **from_caller)
        assert w.a.seen[0].headers[header] == "mine"


async def test_our_id_of_a_request_goes_along(world: Any) -> None:
    async with world(OK) as w:
        answer = await w.ask()
        [seen] = w.a.seen
        ident = answer.headers["x-bitrouter-request-id"]
        assert seen.headers["x-bitrouter-request-id"] == ident


# And on their way back.

COMES_BACK = {
    "request-id": "r-1",
    "x-request-id": "r-2",
    "openai-processing-ms": "12",
    "anthropic-organization-id": "o-1",
    "x-ratelimit-remaining-tokens": "99",
    "anthropic-ratelimit-requests-remaining": "9",
}
KEPT_BACK = {"set-cookie": "a=1", "server": "cloud", "via": "1.1 x", "alt-svc": "h3", "x-own": "1"}


@pytest.mark.parametrize(
    ("reply", "streams"),
    [(OK, False), (OK_STREAM, True), (no(500), False), (no(400), True)],
    ids=["whole", "stream", "error", "refused stream"],
)
async def test_ids_and_rate_limits_come_back_and_nothing_else(
    world: Any, reply: Reply, streams: bool
) -> None:
    given = Reply(**{**vars(reply), "headers": {**reply.headers, **COMES_BACK, **KEPT_BACK}})
    async with world(given) as w:
        headers = (await w.ask(stream=streams)).headers
        assert KEPT_BACK.keys().isdisjoint(headers)
        wanted = COMES_BACK.keys() - ({"openai-processing-ms"} if reply.status != 200 else set())
        assert {name: headers.get(name) for name in wanted} == {n: COMES_BACK[n] for n in wanted}


@pytest.mark.parametrize(
    ("reply", "streams"), [(OK, False), (OK_STREAM, True), (no(400), False), (no(400), True)]
)
async def test_every_answer_says_who_served_it(world: Any, reply: Reply, streams: bool) -> None:
    async with world(no(500), reply) as w:
        headers = (await w.ask(stream=streams)).headers
        ours = [headers[f"x-bitrouter-{name}"] for name in ("provider", "model", "attempts")]
        assert ours == ["b", "m", "2"]


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        ({"retry-after-ms": "1500.0"}, ("2", "1500", None)),
        ({"retry-after": "7"}, ("7", "7000", None)),
        ({"retry-after": "0"}, ("1", "0", None)),
        ({"retry-after": "61"}, ("61", "61000", "false")),
        ({}, (None, None, None)),
        ({"retry-after": "soon"}, (None, None, None)),
    ],
    ids=["ms", "s", "zero", "long", "none", "nonsense"],
)
async def test_a_wait_is_told_in_both_units(
    world: Any, wait: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    async with world(Reply(status=429, body=b"{}", headers=wait), toml=NO_RETRY) as w:
        headers = (await w.ask()).headers
        names = ("retry-after", "retry-after-ms", "x-should-retry")
        assert tuple(headers.get(name) for name in names) == expected


async def test_google_s_own_way_of_telling_a_wait_is_understood(world: Any) -> None:
    retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "37.5s"}
    error = {"code": 429, "message": "no", "status": "RESOURCE_EXHAUSTED", "details": [retry]}
    reply = Reply(status=429, body={"error": error})
    async with world(reply, protocol="generate_content", toml=NO_RETRY) as w:
        assert (await w.ask()).headers["retry-after"] == "38"


# What is written down.


async def test_each_failed_attempt_has_a_line(world: Any) -> None:
    async with world(no(500, "disk full"), [no(429, retry_after_ms="1"), OK]) as w:
        answer = await w.ask()
        lines = w.gateway.lines("attempt_failed")
        said = [(line["target"], line["status"], line["then"]) for line in lines]
        assert said == [("a/m", 500, "next"), ("b/m", 429, "retry")]
        assert lines[0]["reason"] == "a answered 500: disk full"
        assert {line["id"] for line in lines} == {answer.headers["x-bitrouter-request-id"]}


@pytest.mark.parametrize(
    ("last", "code", "reason"),
    [
        (b"", "upstream_disconnected", "a closed the stream before it was finished"),
        (INNER_ERRORS["chat_completions"], "upstream_error", "a answered 502: no"),
    ],
    ids=["closed", "in-band"],
)
async def test_a_stream_that_broke_has_its_reason_in_the_line(
    world: Any, last: bytes, code: str, reason: str
) -> None:
    async with world(stream(*CHAT_STREAM[:2], last)) as w:
        await w.ask(stream=True)
        [line] = w.gateway.lines()
        assert (line["status"], line["code"], line["error"]) == (200, code, reason)


# Faults that were mended once.

HIDDEN_KEYS = ["x-openai-api-key", "anthropic-api-key", "x-session-token", "x-gemini-api-key"]


async def test_no_header_with_a_key_in_it_travels(world: Any) -> None:
    given = {**dict.fromkeys(HIDDEN_KEYS, "theirs"), "idempotency-key": "i-1"}
    async with world(OK) as w:
        await w.caller.post(CHAT_PATH, ask(model="smart"), **given)
        [seen] = w.a.seen
        assert "theirs" not in str(seen)
        assert seen.headers["idempotency-key"] == "i-1"


@pytest.mark.parametrize("name", ["access_token", "api_key", "%6bey", "KEY", "token", "api-key"])
async def test_no_query_with_a_key_in_it_travels(world: Any, name: str) -> None:
    async with world(OK) as w:
        await w.caller.post(f"{CHAT_PATH}?x=1&{name}=theirs&y=2", ask(model="smart"))
        assert w.a.seen[0].path == f"{CHAT_PATH}?x=1&y=2"


@pytest.mark.parametrize("given", ["models/m", "models/smart", "smart", "m"])
async def test_an_embedding_names_its_model_as_google_does(world: Any, given: str) -> None:
    raw = b'{"model": "%b",  "content": {"parts": []}}' % given.encode()
    said = Reply(body={"embedding": {"values": []}})
    async with world(said, protocol="generate_content") as w:
        await w.caller.post("/v1beta/models/smart:embedContent", raw)
        assert w.a.seen[0].body == raw.replace(b'"%b"' % given.encode(), b'"models/m"')


async def test_an_option_that_is_refused_twice_at_once_harms_neither(world: Any) -> None:
    refused = Reply(**{**vars(REFUSED_OPTION), "after_s": 0.03})
    async with world([refused, refused, OK_STREAM]) as w, w.gateway.caller() as other:
        raw = request_bytes("POST", CHAT_PATH, ask(model="smart", stream=True))
        w.caller.send(raw)
        other.send(raw)
        await until(lambda: len(w.a.seen) == 2)
        assert [(await one.answer()).status for one in (w.caller, other)] == [200, 200]


FILTERED = b'data: {"error": {"message": "no", "code": "content_filter"}}\n\n'


async def test_a_stream_that_a_filter_ends_is_not_held_against_a_target(world: Any) -> None:
    broken = stream(*CHAT_STREAM[:2], FILTERED)
    async with world(broken, OK_STREAM, toml=SPARED.replace("2", "1", 1)) as w:
        await w.ask(stream=True)
        await w.ask(stream=True)
        assert w.asked == (2, 0)


async def test_a_side_operation_does_not_end_a_probe(world: Any) -> None:
    a, b = [no(500), Reply(hangs=True), no(400), OK], [OK, no(500), OK]
    async with world(a, b, toml=BRIEFLY) as w:
        await w.ask()
        await asyncio.sleep(0.045)
        async with w.gateway.caller() as probing:
            probing.send(request_bytes("POST", CHAT_PATH, ask(model="smart")))
            await until(lambda: len(w.a.seen) == 2)
            await w.caller.post("/v1/embeddings", {"model": "smart", "input": "Hi"})
            answer = await w.ask()
        assert (answer.headers["x-bitrouter-provider"], w.asked) == ("b", (3, 3))


async def test_a_form_with_two_models_is_refused(world: Any) -> None:
    part = b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n'
    form = part % b"smart" + part % b"openai/m" + b"--xyz--\r\n"
    async with world(OK) as w:
        answer = await w.caller.post("/v1/images/edits", form, content_type=FORM_TYPE)
        assert (answer.status, answer.json()["error"]["param"], w.a.seen) == (400, "model", [])


async def test_what_only_looks_like_a_boundary_is_none(world: Any) -> None:
    decoy = "multipart/form-data; xboundary=abc; boundary=xyz"
    async with world(Reply(body={"text": "Hi"})) as w:
        form = FORM.replace(b"MODEL", b"smart")
        await w.caller.post("/v1/audio/transcriptions", form, content_type=decoy)
        assert w.a.seen[0].body == FORM.replace(b"MODEL", b"m")


async def test_who_hangs_up_on_a_stream_pays_for_what_was_used(world: Any) -> None:
    reply = stream(*MESSAGES_STREAM[:3], ending="hang")
    async with world(reply, protocol="messages") as w:
        async with w.gateway.caller() as caller:
            body = {**SPOKEN["messages"].body, "stream": True}
            caller.send(request_bytes("POST", "/v1/messages", body))
            await caller.head()
            await caller.chunk()
        [line] = await until(w.gateway.lines)
        assert (line["status"], line["in"]) == (499, 11)
