"""Requests through a gateway whose configuration has something to say: presets, chains, limits,
conversations, hedges, explanations, and configurations that change under way."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support import CHAT_ANSWER, CHAT_STREAM, FakeProvider, Reply, chat_chunk, stream

import bitrouter
from bitrouter import parse_config

HELLO = [{"role": "user", "content": "Hi"}]
GOING_ON = [*HELLO, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "More"}]
OK = Reply(body=CHAT_ANSWER)
WARM = Reply(
    body={
        **CHAT_ANSWER,
        "usage": {"prompt_tokens": 5000, "completion_tokens": 7, "total_tokens": 5007},
    }
)
BROKEN = Reply(status=500, body={"error": {"message": "no"}})
NO_RETRY = "[upstream.retry]\nmax = 0\n"


class World:
    """A gateway before providers `a`, `b` and so on, each with a model `m`."""

    def __init__(self, gw: Any, fakes: list[FakeProvider]) -> None:
        self.gw, self.fakes = gw, fakes

    async def ask(self, model: str = "m", path: str = "/v1/chat/completions", **more: Any) -> Any:
        headers = more.pop("headers", {})
        body = {"model": model, "messages": HELLO, **more}
        async with self.gw.caller() as caller:
            return await caller.post(
                path, {k: v for k, v in body.items() if v is not ...}, **headers
            )

    async def served(self, model: str = "m", **more: Any) -> str:
        answer = await self.ask(model, **more)
        assert answer.status == 200, answer.body
        return str(answer.headers["x-bitrouter-provider"])

    @property
    def counts(self) -> list[int]:
        return [len(fake.seen) for fake in self.fakes]


@pytest.fixture
def world(provider: Any, gateway: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(
        *scripts: Reply | list[Reply],
        toml: str = "",
        own: dict[str, str] | None = None,
        **more: Any,
    ) -> AsyncIterator[World]:
        """own: by provider, more of its table."""
        async with provider(*_script(scripts[0])) as a:
            fakes = [a]
            others = [provider(*_script(one)) for one in scripts[1:]]
            fakes += [await other.__aenter__() for other in others]
            try:
                tables = [
                    f'[providers.{name}]\napi_base = "{fake.base}/v1"\nmodels = [{{id = "m"}}]\n'
                    + (own or {}).get(name, "")
                    for name, fake in zip("abcdef", fakes, strict=False)
                ]
                async with gateway(NO_RETRY + "\n".join(tables) + "\n" + toml, **more) as gw:
                    yield World(gw, fakes)
            finally:
                for other in others:
                    await other.__aexit__(None, None, None)

    return start


def _script(replies: Reply | list[Reply]) -> list[Reply]:
    return replies if isinstance(replies, list) else [replies]


PRESETS = """
[presets.fast]
model = "m"
system_prompt = "Be terse."
params = {temperature = 0.25}
extra_body = [{pointer = "/user", delete = true}, {pointer = "/metadata/team", value = "red"}]
extra_headers = [{name = "x-team", value = "red"}, {name = "user-agent", delete = true}]
routing = {ignore = ["b"]}
fallbacks = ["b:other"]
[presets.trial]
candidates = [{model = "a:m", weight = 3}, {model = "b:m"}]
[models.shared]
strategy = "balance"
endpoints = [
  {provider = "a", service_id = "m", weight = 3}, {provider = "b", service_id = "m", weight = 1},
]
"""


async def test_a_preset_changes_what_it_says_and_not_a_byte_more(world: Any) -> None:
    raw = (
        b'{"model": "@fast", "seed": 1.0,  "user": "u", "messages": [{"role":"user","content":1}]}'
    )
    async with world(OK, OK, toml=PRESETS) as w, w.gw.caller() as caller:
        answer = await caller.post("/v1/chat/completions", raw, user_agent="me")
        assert answer.status == 200
        [seen] = w.fakes[0].seen
        assert seen.body == (
            b'{"model": "m", "seed": 1.0, "messages": [{"role":"system","content":"Be terse."},'
            b'{"role":"user","content":1}],"temperature":0.25,"metadata":{"team":"red"}}'
        )
        assert seen.headers["x-team"] == "red" and "user-agent" not in seen.headers


async def test_what_is_meant_for_us_does_not_travel(world: Any) -> None:
    async with world(OK, OK, toml=PRESETS) as w:
        assert await w.served(..., preset="fast", provider={"sort": "cost"}) == "a"
        assert await w.served("x", models=["b:m", "a:m"]) == "b"
        assert await w.served(..., provider={"only": ["b"]}, models=["m"]) == "b"
        for seen in [*w.fakes[0].seen, *w.fakes[1].seen]:
            assert not {"models", "provider", "preset"} & set(seen.json())
            assert seen.json()["model"] == "m"


async def test_a_gateway_that_is_named_gets_its_own_options(provider: Any, gateway: Any) -> None:
    options = {"models": ["x/y"], "provider": {"data_collection": "deny"}}
    async with provider(OK) as up:
        environ = {"OPENROUTER_API_KEY": "k", "OPENROUTER_BASE_URL": f"{up.base}/v1"}
        async with gateway("", environ) as gw, gw.caller() as caller:
            body = {"model": "openrouter/x/z", "messages": HELLO, **options}
            assert (await caller.post("/v1/chat/completions", body)).status == 200
        assert up.seen[0].json() == {**body, "model": "x/z"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"models": ["m"] * 9}, "models"),
        ({"models": [3]}, "models"),
        ({"models": "m", "provider": []}, "provider"),
        ({"provider": {"only": ["zz"]}}, "provider.only"),
        ({"provider": {"max_price": {"input": 1}}}, "provider"),
        ({"preset": "nope"}, "model"),
        ({"preset": 1}, "preset"),
    ],
)
async def test_wishes_that_make_no_sense_are_refused_before_any_call(
    world: Any, body: dict[str, Any], param: str
) -> None:
    async with world(OK, OK) as w:
        answer = await w.ask(**body)
        assert answer.status == 400
        assert answer.json()["error"]["param"].startswith(param)
        assert w.counts == [0, 0]


async def test_the_models_of_a_chain_stand_in_for_each_other(world: Any) -> None:
    too_long = Reply(400, {"error": {"message": "x", "code": "context_length_exceeded"}})
    empty = stream(chat_chunk({"role": "assistant", "content": ""}), ending="cut")
    for first in (BROKEN, Reply(429, {"error": {"message": "no"}}), too_long, empty):
        second = stream(*CHAT_STREAM) if first is empty else OK
        async with world(first, second) as w:
            answer = await w.ask(models=["a:m", "b:m"], stream=first is empty)
            assert (answer.status, answer.headers["x-bitrouter-provider"]) == (200, "b")
            assert answer.headers["x-bitrouter-attempts"] == "2"


async def test_fallbacks_of_a_preset_come_last(world: Any) -> None:
    async with world(BROKEN, OK, toml=PRESETS) as w:
        assert await w.served("@fast") == "b"
        assert w.fakes[1].seen[0].json()["model"] == "other"
        assert w.fakes[1].seen[0].json()["messages"][0]["content"] == "Be terse."


async def test_candidates_are_drawn_by_weight_and_a_conversation_keeps_its_own(
    world: Any,
) -> None:
    async with world(OK, OK, toml=PRESETS) as w:
        w.gw.app.random.seed(3)
        firsts = Counter([await w.served("@trial") for _ in range(80)])
        assert 45 < firsts["a"] < 75 and firsts["b"]
        for name in ("one", "two", "three", "four", "five", "six", "seven"):
            for said in ({"headers": {"x-session-id": name}}, {"prompt_cache_key": name}):
                assert len({await w.served("@trial", **said) for _ in range(4)}) == 1
        for n in range(8):
            begun = [{"role": "user", "content": f"Hi {n}"}]
            first = await w.served("@trial", messages=begun)
            later = [*begun, *GOING_ON[1:]]
            assert {await w.served("@trial", messages=later) for _ in range(3)} == {first}


async def test_shares_are_kept_whatever_is_asked_at_once(world: Any) -> None:
    async with world(OK, OK, toml=PRESETS) as w:
        served = await asyncio.gather(*(w.served("shared") for _ in range(40)))
        assert Counter(served) == {"a": 30, "b": 10}


async def test_a_conversation_stays_where_its_prompt_cache_is_warm(world: Any) -> None:
    async with world([BROKEN, WARM], WARM) as w:
        assert await w.served(messages=GOING_ON) == "b"  # a has failed once
        assert await w.served(messages=GOING_ON) == "b"  # and would be well
        assert await w.served(messages=HELLO) == "a"
        w.fakes[1].script[:] = [BROKEN]
        for _ in range(6):
            assert await w.served(messages=GOING_ON) == "a"


async def test_a_short_prompt_is_cached_nowhere(world: Any) -> None:
    async with world([BROKEN, OK], OK) as w:
        assert await w.served(messages=GOING_ON) == "b"
        assert await w.served(messages=GOING_ON) == "a"


LIMITED = 'rate_limits = {"*" = {requests_per_minute = 2}}\n'


async def test_what_is_over_its_limit_spills_over_and_then_is_refused(world: Any) -> None:
    async with world(OK, OK, own={"a": LIMITED, "b": LIMITED}) as w:
        assert [await w.served() for _ in range(4)] == ["a", "a", "b", "b"]
        answer = await w.ask()
        assert (answer.status, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert "a/m (over its limit" in answer.headers["x-bitrouter-skipped"]
        assert w.counts == [2, 2]
        spilt = w.gw.lines()[2]
        assert "a/m (over its limit" in spilt["skipped"] and spilt["attempts"] == 1


async def test_limits_are_exact_whatever_is_asked_at_once(world: Any) -> None:
    async with world(OK, OK, own={"a": LIMITED}) as w:
        served = await asyncio.gather(*(w.served() for _ in range(20)))
        assert Counter(served) == {"a": 2, "b": 18}


async def test_who_is_near_its_vendor_s_limit_goes_later(world: Any) -> None:
    told = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "60",
            "x-ratelimit-reset-requests": "1m0s"}  # fmt: skip
    async with world(Reply(body=CHAT_ANSWER, headers=told), OK) as w:
        assert [await w.served() for _ in range(3)] == ["a", "b", "b"]
        answer = await w.ask()
        assert answer.headers["x-bitrouter-skipped"] == "a/m (near its vendor's limit)"


@pytest.fixture
def hedged(world: Any) -> Callable[..., Any]:
    def start(*scripts: Reply, **more: Any) -> Any:
        return world(*scripts, toml="[upstream.timeouts]\nfirst_token_s = 5\n", **more)

    return start


async def hedge(w: World) -> None:
    w.gw.app.config.upstream.hedge_after_ms = 20


async def test_a_silent_target_is_hedged_and_the_slower_call_is_cancelled(hedged: Any) -> None:
    for streamed in (False, True):
        answer = stream(*CHAT_STREAM) if streamed else OK
        async with hedged(Reply(hangs=True), answer) as w:
            await hedge(w)
            assert await w.served(stream=streamed) == "b"
            async with asyncio.timeout(2):
                await w.fakes[0].hung_up.wait()
            [line] = w.gw.lines()
            assert (line["status"], line["target"], line["attempts"]) == (200, "b/m", 2)


async def test_a_target_that_answers_in_time_is_not_hedged(hedged: Any) -> None:
    async with hedged(OK, OK) as w:
        w.gw.app.config.upstream.hedge_after_ms = 5000
        assert [await w.served() for _ in range(3)] == ["a"] * 3
        assert w.counts == [3, 0]


async def test_a_hedge_that_fails_leaves_the_first_call_alone(hedged: Any) -> None:
    late = Reply(body=CHAT_ANSWER, after_s=0.05)
    async with hedged(late, BROKEN) as w:
        await hedge(w)
        assert await w.served() == "a"
        assert w.counts == [1, 1]


async def test_when_both_fail_both_are_named(hedged: Any) -> None:
    late = Reply(status=503, body={"error": {"message": "busy"}}, after_s=0.05)
    async with hedged(late, BROKEN) as w:
        await hedge(w)
        answer = await w.ask()
        assert answer.status == 503
        assert b"a answered 503" in answer.body and b"b answered 500" in answer.body
        assert w.counts == [1, 1]


async def test_a_fault_of_the_request_is_told_at_once_though_a_hedge_runs(hedged: Any) -> None:
    late = Reply(400, {"error": {"message": "it is you"}}, after_s=0.04)
    async with hedged(late, Reply(hangs=True)) as w:
        await hedge(w)
        async with asyncio.timeout(2):
            answer = await w.ask()
            assert (answer.status, answer.json()) == (400, {"error": {"message": "it is you"}})
            await w.fakes[1].hung_up.wait()


async def test_a_caller_who_hangs_up_cancels_both(hedged: Any) -> None:
    async with hedged(Reply(hangs=True), Reply(hangs=True)) as w:
        await hedge(w)
        task = asyncio.create_task(w.ask())
        async with asyncio.timeout(3):
            while w.counts != [1, 1]:  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.01)
            task.cancel()
            for fake in w.fakes:
                await fake.hung_up.wait()


async def test_pauses_before_fallbacks_are_kept(world: Any) -> None:
    async with world(BROKEN, OK, toml="") as w:
        w.gw.app.config.upstream.fallback_backoff_ms = (30.0,)
        before = asyncio.get_running_loop().time()
        assert await w.served() == "b"
        assert asyncio.get_running_loop().time() - before >= 0.03


FROM_CALLER = 'api_key = "request:x-team-key"\n'


async def test_a_key_may_come_with_the_request(world: Any) -> None:
    refused = Reply(401, {"error": {"message": "bad key"}})
    async with world([OK, refused, OK], own={"a": FROM_CALLER}) as w:
        assert await w.served(headers={"x-team-key": "sk-mine"}) == "a"
        [seen] = w.fakes[0].seen
        assert seen.headers["authorization"] == "Bearer sk-mine"
        assert "x-team-key" not in seen.headers
        answer = await w.ask()
        assert answer.status == 401 and "x-team-key" in answer.json()["error"]["message"]
        assert (await w.ask(headers={"x-team-key": "sk-bad"})).status == 502
        assert await w.served(headers={"x-team-key": "sk-mine"}) == "a"  # nobody rests for it
        assert "sk-mine" not in w.gw.written.getvalue()


@pytest.mark.parametrize("name", ["openai-team", "x-goog-team", "x-session-id"])
async def test_a_key_of_the_caller_goes_to_its_provider_alone(world: Any, name: str) -> None:
    own = {"a": f'api_key = "request:{name}"\n'}
    async with world(BROKEN, OK, own=own) as w:
        headers = {name: "sk-mine", "x-bitrouter-explain": "1"}
        answer = await w.ask(headers=headers)
        assert answer.headers["x-bitrouter-provider"] == "b"
        assert w.fakes[0].seen[0].headers["authorization"] == "Bearer sk-mine"
        assert "sk-mine" not in str([fake.seen[0].headers for fake in w.fakes[1:]])
        told = json.loads(answer.headers["x-bitrouter-explain"])["first"]["headers"]
        assert "authorization: Bearer [redacted]" in told and "sk-mine" not in str(told)


async def test_an_explanation_is_never_too_long_for_a_header(world: Any) -> None:
    async with world(OK) as w:
        headers = {"x-bitrouter-explain": "1"}
        said = [{"role": "user", "content": "\U0001f600" * 1900}]
        names = [f"a:{n}" + "\u00e9" * 400 for n in range(8)]
        for more in ({"messages": said}, {"models": names}):
            answer = await w.ask(headers=headers, **more)
            assert answer.status == 200
            assert 0 < len(answer.headers["x-bitrouter-explain"]) <= 8192


async def test_a_live_request_explains_itself(world: Any) -> None:
    own = {"a": 'api_key = "sk-secret-a"\n', "b": 'api_key = "sk-secret-b"\n'}
    async with world(OK, OK, own=own, toml=PRESETS) as w:
        answer = await w.ask("@fast", headers={"x-bitrouter-explain": "1"}, user="u")
        facts = json.loads(answer.headers["x-bitrouter-explain"])
        assert [step["provider"] for step in facts["chain"]] == ["a", "b"]
        assert facts["left_out"] == ["b: in `ignore`"]
        assert facts["first"]["url"] == f"{w.fakes[0].base}/v1/chat/completions"
        assert facts["first"]["body"] == w.fakes[0].seen[0].json()
        assert "authorization: Bearer [redacted]" in facts["first"]["headers"]
        assert "sk-secret" not in answer.headers["x-bitrouter-explain"]
        said = [{"role": "user", "content": "Hi! " * 5000}]
        long = await w.ask("@fast", headers={"x-bitrouter-explain": "1"}, messages=said)
        assert len(long.headers["x-bitrouter-explain"]) < 9000
        assert json.loads(long.headers["x-bitrouter-explain"])["first"]["body_omitted"]


async def test_names_from_a_terminal_are_cleaned(world: Any) -> None:
    async with world(OK) as w:
        assert await w.served("\x1b[1m a:m\x1b[0m\r\n") == "a"
        assert await w.served(..., models=["\x1b[1m a:m\x1b[0m\r\n"]) == "a"


@pytest.mark.parametrize(
    "body",
    [
        {"model": "a:.."},
        {"model": "a:../x"},
        {"model": "@fast/a:.."},
        {"models": ["m", "a:m/../../x"]},
        {"models": ["m", "a:.."]},
        {"models": ["m", ""]},
        {"models": ["m", "x" * 600]},
    ],
)
async def test_no_name_is_a_way_out_of_a_path(world: Any, body: dict[str, Any]) -> None:
    async with world(OK) as w:
        answer = await w.ask(**body)
        field = "models[1]" if "models" in body else "model"
        assert (answer.status, answer.json()["error"]["param"]) == (400, field)
        assert w.counts == [0]


# --- a configuration that changes


def configuration(w: World, toml: str) -> bitrouter.Config:
    loaded = parse_config(toml, {})
    assert loaded.problems == []
    loaded.config.server.listen = w.gw.app.config.server.listen
    return loaded.config


async def test_what_runs_finishes_by_the_old_configuration_and_health_stays(world: Any) -> None:
    slow = stream(*CHAT_STREAM[:3], None, *CHAT_STREAM[3:], gap_s=0.05)
    async with world([BROKEN] * 6, slow) as w:
        for _ in range(5):
            await w.ask(provider={"only": ["a"]})
        assert w.gw.app.health.cooling(0.0)
        task = asyncio.create_task(w.ask(stream=True))
        async with asyncio.timeout(3):
            while not w.fakes[1].seen:  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.005)
        table = f'[providers.only]\napi_base = "{w.fakes[1].base}/v1"\nmodels = [{{id = "m"}}]\n'
        w.gw.app.configure(configuration(w, table))
        answer = await task
        assert answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n")
        assert await w.served(stream=True) == "only"
        assert w.gw.app.health.cooling(0.0)


async def test_a_new_key_is_tried_at_once(world: Any) -> None:
    refused = Reply(401, {"error": {"message": "expired"}})
    async with world([refused, OK], OK, own={"a": 'api_key = "old"\n'}) as w:
        assert await w.served() == "b" and await w.served() == "b"
        tables = "".join(
            f'[providers.{name}]\napi_base = "{fake.base}/v1"\nmodels = [{{id = "m"}}]\n{key}'
            for name, fake, key in zip("ab", w.fakes, ['api_key = "new"\n', ""], strict=True)
        )
        w.gw.app.configure(configuration(w, tables))
        assert await w.served() == "a"
        assert w.fakes[0].seen[-1].headers["authorization"] == "Bearer new"


async def test_nobody_sees_a_failure_while_one_target_is_well(world: Any) -> None:
    async with world(OK, OK, OK) as w:

        async def storm() -> list[int]:
            answers = await asyncio.gather(*(w.ask() for _ in range(40)))
            return [answer.status for answer in answers]

        for ill in (0, 1, 2, 0, 1):
            for n, fake in enumerate(w.fakes):
                fake.script[:] = [OK if n == (ill + 1) % 3 else BROKEN]
            assert set(await storm()) == {200}


async def test_status_is_for_those_with_a_key(gateway: Any) -> None:
    toml = '[server]\nauth = "required"\n[keys.me]\nkey = "sk-caller"\n'
    async with gateway(toml, {"OPENAI_API_KEY": "sk-secret"}) as gw, gw.caller() as caller:
        assert (await caller.get("/api/status")).status == 401
        answer = await caller.get("/api/status", authorization="Bearer sk-caller")
        assert answer.json()["active"]["openai"]["enabled_by"] == "OPENAI_API_KEY"
        assert b"sk-" not in answer.body


async def test_lists_of_models_are_narrowed(gateway: Any) -> None:
    environ = {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}
    async with gateway("", environ) as gw, gw.caller() as caller:
        everything = (await caller.get("/v1/models")).json()["data"]
        some = (await caller.get("/v1/models?provider=anthropic&capability=reasoning")).json()
        assert 0 < len(some["data"]) < len(everything)
        assert all("anthropic" in model["providers"] for model in some["data"])
        refused = await caller.get("/v1/models?capability=flying")
        assert refused.status == 400 and refused.json()["error"]["param"] == "capability"


async def test_a_preset_leaves_alone_what_holds_no_talk(world: Any) -> None:
    async with world(OK, OK, toml=PRESETS) as w, w.gw.caller() as caller:
        body = {"model": "@fast", "input": "x", "user": "u"}
        assert (await caller.post("/v1/embeddings", body)).status == 200
        assert w.fakes[0].seen[0].json() == {**body, "model": "m"}


async def test_all_models_of_a_chain_get_the_preset_that_is_asked_for(world: Any) -> None:
    async with world(BROKEN, OK, toml='[presets.p]\nsystem_prompt = "P"\n') as w:
        assert await w.served(..., preset="p", models=["a:m", "b:m"]) == "b"
        assert w.fakes[1].seen[0].json()["messages"][0] == {"role": "system", "content": "P"}


async def test_a_count_is_of_what_would_be_sent(provider: Any, gateway: Any) -> None:
    async with provider(Reply(body={"input_tokens": 7})) as up:
        toml = f"""
[providers.c]
api_base = "{up.base}/v1"
api_protocol = "messages"
api_key = "request:x-team-key"
[presets.p]
model = "c:m"
system_prompt = "P"
"""
        async with gateway(toml) as gw, gw.caller() as caller:
            body = {"model": "@p", "messages": HELLO}
            answer = await caller.post("/v1/messages/count_tokens", body, x_team_key="sk-mine")
            assert answer.json() == {"input_tokens": 7}
        assert up.seen[0].json()["system"] == "P"
        assert up.seen[0].headers["x-api-key"] == "sk-mine"


async def test_one_caller_s_limits_are_not_another_s(world: Any) -> None:
    limited = Reply(429, {"error": {"message": "slow"}}, {"retry-after": "3600"})
    near = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "60",
            "x-ratelimit-reset-requests": "1m0s"}  # fmt: skip
    script = [limited, Reply(body=CHAT_ANSWER, headers=near), OK]
    async with world(script, OK, own={"a": FROM_CALLER}) as w:
        assert await w.served(headers={"x-team-key": "sk-one"}) == "b"
        assert await w.served(headers={"x-team-key": "sk-two"}) == "a"
        assert await w.served(headers={"x-team-key": "sk-three"}) == "a"


async def test_the_built_in_model_answers_only_if_nobody_else_has(hedged: Any) -> None:
    late = Reply(body=CHAT_ANSWER, after_s=0.05)
    async with hedged(late, OK) as w, w.gw.caller() as caller:
        await hedge(w)
        body = {"models": ["a:m", "echo/echo"], "messages": HELLO}
        first = await caller.post("/v1/chat/completions", body)
        second = await caller.post("/v1/chat/completions", {"model": "b:m", "messages": HELLO})
        assert first.headers["x-bitrouter-provider"] == "echo"
        assert second.headers["x-bitrouter-provider"] == "b"


async def test_a_hedge_and_a_pause_ask_nobody_twice(world: Any) -> None:
    late = Reply(body=CHAT_ANSWER, after_s=0.15)
    async with world(BROKEN, late, OK) as w:
        w.gw.app.config.upstream.hedge_after_ms = 20
        w.gw.app.config.upstream.fallback_backoff_ms = (45.0,)
        assert await w.served() == "b"
        assert w.counts == [1, 1, 0]


async def test_no_target_is_asked_twice_in_one_pass(world: Any) -> None:
    async with world(BROKEN) as w:
        assert (await w.ask(models=["a:m", "m", "a:m"])).status == 500
        assert w.counts == [1]


async def test_what_was_found_is_not_used_once_it_is_switched_off(world: Any) -> None:
    async with world(OK) as w:
        app = w.gw.app
        facts = bitrouter.PROVIDERS["ollama"]
        base = dict.fromkeys(facts.bases, f"{w.fakes[0].base}/v1")
        account = bitrouter.Account("", bitrouter.Secret(""), base)
        models = (bitrouter.DeclaredModel("found"),)
        provider = bitrouter.ActiveProvider(facts, (account,), "found", models=models, found=True)
        app.local = {"ollama": provider}
        app.reroute()
        assert await w.served("found") == "ollama"
        for toml in ("[providers.ollama]\nactive = false\n", "inherit_defaults = false\n"):
            app.configure(configuration(w, toml))
            assert (await w.ask("found")).status in (402, 404)
