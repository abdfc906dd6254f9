"""Clients of TensorZero go on unchanged: its names, its fields, its native API."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support import CHAT_ANSWER, CHAT_STREAM, MESSAGES_ANSWER, Reply, chat_chunk, stream

from bitrouter import (
    BadRequest,
    Bridge,
    JoinedUsage,
    NotFound,
    bridge_of,
    filled_messages,
    migrate_tensorzero,
    native_as_chat,
    parse_config,
    uuid7,
)

HELLO = [{"role": "user", "content": "Hi"}]
EPISODE = "01890000-0000-7000-8000-000000000001"
FUNCTION, MODEL = "tensorzero::function_name::", "tensorzero::model_name::"
CHAT = "/openai/v1/chat/completions"
FILES = {
    "system.minijinja": "You are {{ name }}.\n",
    "user.minijinja": "Say {{ x }}!",
    "plain.minijinja": "<<{{ user_text }}>>",
    "static.txt": "Be terse.\n",
    "bare.minijinja": "S {{ system_text }}",
    "out.json": '{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}',
    "tool.json": '{"type": "object", "properties": {"a": {"type": "string"}}}',
}
TENSORZERO = """
[models.m]
routing = ["p"]
[models.m.providers.p]
type = "openai"
model_name = "up-m"
api_base = "BASE/v1"
api_key_location = "none"
extra_body = [{pointer = "/prov", value = 1}]
cost = [
  {pointer = "/usage/prompt_tokens", cost_per_million = 1},
  {pointer = "/usage/completion_tokens", cost_per_million = 2},
]
[models.claude]
routing = ["c"]
[models.claude.providers.c]
type = "anthropic"
model_name = "claude-x"
api_base = "BASE/v1/messages"
api_key_location = "dynamic::team"
[embedding_models.e]
routing = ["p"]
[embedding_models.e.providers.p]
type = "openai"
model_name = "emb"
api_base = "BASE/v1"
api_key_location = "none"
[tools.t]
description = "Does t"
parameters = "tool.json"
[functions.plain]
type = "chat"
[functions.plain.variants.v1]
type = "chat_completion"
model = "m"
temperature = 0.3
max_tokens = 50
extra_body = [{pointer = "/var", value = "v"}]
extra_headers = [{name = "x-var", value = "v"}]
[functions.static.variants.v]
type = "chat_completion"
model = "m"
system_template = "static.txt"
[functions.filled.variants.v]
type = "chat_completion"
model = "m"
system_template = "system.minijinja"
user_template = "user.minijinja"
[functions.wrapped.variants.v]
type = "chat_completion"
model = "m"
user_template = "plain.minijinja"
[functions.bare.variants.v]
type = "chat_completion"
model = "m"
system_template = "bare.minijinja"
[functions.tools]
type = "chat"
tools = ["t"]
tool_choice = "required"
[functions.tools.variants.v]
type = "chat_completion"
model = "m"
[functions.json]
type = "json"
output_schema = "out.json"
[functions.json.variants.strict]
type = "chat_completion"
model = "m"
json_mode = "strict"
[functions.json.variants.tool]
type = "chat_completion"
model = "m"
json_mode = "tool"
[functions.many.variants.a]
type = "chat_completion"
model = "m"
[functions.many.variants.b]
type = "chat_completion"
model = "m"
[functions.many.variants.c]
type = "chat_completion"
model = "m"
[functions.weights]
experimentation = {type = "static", candidate_variants = {a = 0.7, b = 0.3}}
[functions.weights.variants.a]
type = "chat_completion"
model = "m"
[functions.weights.variants.b]
type = "chat_completion"
model = "m"
"""
OK = Reply(body=CHAT_ANSWER)
TOOL_CALL = {
    "id": "call_1", "type": "function", "function": {"name": "t", "arguments": '{"a":"x"}'},
}  # fmt: skip


def answering(message: dict[str, Any], finish: str = "stop") -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return Reply(body={**CHAT_ANSWER, "choices": [choice]})


class World:
    def __init__(self, up: Any, gw: Any) -> None:
        self.up, self.gw = up, gw

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        async with self.gw.caller() as caller:
            return await caller.post(path, body, **headers)

    async def chat(self, model: str, **more: Any) -> Any:
        return await self.post(CHAT, {"model": model, "messages": HELLO, **more})

    @property
    def sent(self) -> Any:
        """What the provider got last."""
        return self.up.seen[-1].json()


@pytest.fixture
def world(provider: Any, gateway: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(*replies: Reply) -> Any:
        async with provider(*(replies or (OK,))) as up:
            text = TENSORZERO.replace("BASE", up.base)
            moved = migrate_tensorzero([("t.toml", text)], lambda _, name: FILES[name])
            assert moved.is_clean
            async with gateway(moved.text, {}) as gw:
                yield World(up, gw)

    return start


# --- what the upstream gets: recorded from TensorZero 2026.6.0 with the same file, but for what it
# corrupts (floats through 32 bits, `stream: false`, a client's system message dropped)

UPSTREAM: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (MODEL + "m", {"temperature": 0.3, "max_tokens": 9},
     {"messages": HELLO, "temperature": 0.3, "max_completion_tokens": 9}),
    (FUNCTION + "plain", {"temperature": 0.9},
     {"messages": HELLO, "temperature": 0.9, "max_completion_tokens": 50, "var": "v"}),
    (FUNCTION + "static", {}, {"messages": [{"role": "system", "content": "Be terse."}, *HELLO]}),
    (FUNCTION + "static", {"messages": [{"role": "system", "content": "S"}, *HELLO]},
     {"messages": [{"role": "system", "content": "Be terse.\n\nS"}, *HELLO]}),
    (FUNCTION + "filled",
     {"messages": [
         {"role": "system", "content": [{"type": "text", "tensorzero::arguments": {"name": "Al"}}]},
         {"role": "user", "content": [{"type": "text", "tensorzero::arguments": {"x": "hey"}}]}]},
     {"messages": [{"role": "system", "content": "You are Al."},
                   {"role": "user", "content": "Say hey!"}]}),
    (FUNCTION + "filled",
     {"messages": [
         {"role": "system", "content": [{"name": "Al"}]},
         {"role": "user", "content": [
             {"type": "tensorzero::template", "name": "user", "arguments": {"x": "a"}},
             {"type": "tensorzero::raw_text", "value": "RAW"}]}]},
     {"messages": [{"role": "system", "content": "You are Al."},
                   {"role": "user", "content": [{"type": "text", "text": "Say a!"},
                                                {"type": "text", "text": "RAW"}]}]}),
    (FUNCTION + "wrapped", {}, {"messages": [{"role": "user", "content": "<<Hi>>"}]}),
    (FUNCTION + "bare", {}, {"messages": [{"role": "system", "content": "S none"}, *HELLO]}),
    (FUNCTION + "tools", {"tools": [{"type": "function", "function": {"name": "mine"}}],
                          "tool_choice": "auto"},
     {"messages": HELLO, "tool_choice": "auto", "tools": [
         {"type": "function", "function": {"name": "t", "description": "Does t",
                                           "parameters": json.loads(FILES["tool.json"])}},
         {"type": "function", "function": {"name": "mine"}}]}),
    (FUNCTION + "plain", {
        "tensorzero::extra_body": [
            {"pointer": "/req", "value": 1},
            {"variant_name": "v1", "pointer": "/var", "value": "w"},
            {"variant_name": "v2", "pointer": "/no", "value": 1},
            {"model_name": "m", "pointer": "/mm", "value": 2},
            {"model_name": "x", "pointer": "/no", "value": 1},
            {"model_name": "m", "provider_name": "p", "pointer": "/pp", "value": 3}],
        "tensorzero::params": {"chat_completion": {"temperature": 0.75}},
        "tensorzero::tags": {"k": "v"}, "tensorzero::dryrun": True, "tensorzero::foo": 1},
     {"messages": HELLO, "temperature": 0.75, "max_completion_tokens": 50, "var": "w", "req": 1,
      "mm": 2, "pp": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "body", "wanted"), UPSTREAM)
async def test_the_upstream_gets_what_tensorzero_would_send(
    world: Any, model: str, body: dict[str, Any], wanted: dict[str, Any]
) -> None:
    async with world() as w:
        assert (await w.chat(model, **body)).status == 200
        assert w.sent == {"model": "up-m", "prov": 1, **wanted}


async def test_a_schema_by_way_of_a_tool_is_asked_for_in_its_words(world: Any) -> None:
    call = {**TOOL_CALL, "function": {"name": "respond", "arguments": '{"a":"x"}'}}
    async with world(answering({"content": None, "tool_calls": [call]}, "tool_calls")) as w:
        answer = await w.chat(FUNCTION + "json", **{"tensorzero::variant_name": "tool"})
        choice = answer.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a":"x"}', "stop")
        [tool] = w.sent["tools"]
        assert tool["function"]["name"] == "respond"
        assert w.sent["tool_choice"] == {"type": "function", "function": {"name": "respond"}}
        assert "response_format" not in w.sent


async def test_headers_and_credentials_of_a_request_reach_its_target(world: Any) -> None:
    async with world(OK) as w:
        headers = [{"name": "x-req", "value": "r"}, {"name": "x-var", "delete": True}]
        await w.chat(FUNCTION + "plain", **{"tensorzero::extra_headers": headers})
        assert w.up.seen[-1].headers["x-req"] == "r"
        w.up.script[:] = [Reply(body=MESSAGES_ANSWER)]
        named = {"tensorzero::credentials": {"team": "sk-team"}}
        answer = await w.chat(MODEL + "claude", max_tokens=9, **named)
        assert answer.json()["model"] == MODEL + "claude"
        assert w.up.seen[-1].headers["x-api-key"] == "sk-team"
        assert (await w.chat(MODEL + "claude", max_tokens=9)).status == 401
        assert "sk-team" not in w.gw.written.getvalue()


# --- what the client gets


async def test_answers_go_back_under_tensorzero_s_names(world: Any) -> None:
    async with world() as w:
        answer = (await w.chat(FUNCTION + "plain", **{"tensorzero::episode_id": EPISODE})).json()
        assert answer["model"] == "tensorzero::function_name::plain::variant_name::v1"
        assert (answer["episode_id"], answer["system_fingerprint"]) == (EPISODE, "")
        assert answer["id"][14] == "7" and answer["service_tier"] is None
        assert answer["usage"] == {**CHAT_ANSWER["usage"], "tensorzero_cost": 2.5e-05}  # type: ignore[dict-item]
        assert answer["choices"] == CHAT_ANSWER["choices"]
        other = (await w.chat(MODEL + "m")).json()
        assert other["model"] == MODEL + "m" and other["episode_id"] != EPISODE
        here = (
            await w.post("/v1/chat/completions", {"model": MODEL + "m", "messages": HELLO})
        ).json()
        assert here["model"] == MODEL + "m"
        plain = (await w.chat("m")).json()
        assert plain == CHAT_ANSWER


@pytest.mark.parametrize("usage", [True, False])
async def test_streams_do_too_in_every_event(world: Any, usage: bool) -> None:
    async with world(stream(*CHAT_STREAM)) as w:
        more: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
        answer = await w.chat(FUNCTION + "plain", stream=True, **more)
        *events, end = answer.events()
        assert end == "[DONE]"
        assert {event["model"] for event in events} == {
            "tensorzero::function_name::plain::variant_name::v1"
        }
        assert len({(event["id"], event["episode_id"]) for event in events}) == 1
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        assert text == "Hello!"
        told = [event for event in events if event.get("usage")]
        assert [one["usage"]["tensorzero_cost"] for one in told] == [2.5e-05] * usage
        assert [one["choices"][0]["finish_reason"] for one in told] == ["stop"] * usage


SAID = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
ENDED = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
ALSO_ENDED = ENDED.replace(b'"index":0', b'"index":1')
USED = b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
JOINED = ENDED.replace(b"]}\n", b'],"usage":{"total_tokens":3}}\n')
DONE = b"data: [DONE]\n\n"

ENDINGS = [
    # what comes, what goes on, what is still held
    ([SAID, ENDED, USED, DONE], [SAID, JOINED, DONE], b""),
    ([SAID, ENDED, b": ping\n\n", USED, DONE], [SAID, b": ping\n\n", JOINED, DONE], b""),
    ([SAID, ENDED, DONE], [SAID, ENDED, DONE], b""),
    ([ENDED, ALSO_ENDED, USED, DONE],
     [ENDED, JOINED.replace(b'"index":0', b'"index":1'), DONE], b""),
    ([ENDED, SAID, DONE], [ENDED, SAID, DONE], b""),
    ([JOINED, DONE], [JOINED, DONE], b""),
    ([USED, DONE], [USED, DONE], b""),
    ([SAID, ENDED], [SAID], ENDED),
    ([ENDED, b'data: {"error":{}}\n\n'], [ENDED, b'data: {"error":{}}\n\n'], b""),
]  # fmt: skip


@pytest.mark.parametrize(("events", "wanted", "held"), ENDINGS)
def test_usage_goes_into_the_chunk_that_ends_the_answer(
    events: list[bytes], wanted: list[bytes], held: bytes
) -> None:
    for pieces in (events, [b"".join(events)]):
        joined = JoinedUsage()
        assert b"".join([joined.feed(piece) for piece in pieces]) == b"".join(wanted)
        assert joined.held == held


async def test_raw_parts_are_shown_to_those_who_want_them(world: Any) -> None:
    async with world() as w:
        wants = dict.fromkeys(
            (f"tensorzero::include_{part}" for part in ("raw_usage", "raw_response")), True
        )
        wants["tensorzero::include_original_response"] = True
        answer = (await w.chat(MODEL + "m", **wants)).json()
        assert json.loads(answer["tensorzero_original_response"]) == CHAT_ANSWER
        assert answer["tensorzero_raw_usage"][0]["data"] == CHAT_ANSWER["usage"]
        assert json.loads(answer["tensorzero_raw_response"][0]["data"]) == CHAT_ANSWER


async def test_embeddings_have_their_names_too(world: Any) -> None:
    told = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
            "model": "emb", "usage": {"prompt_tokens": 3, "total_tokens": 3}}  # fmt: skip
    async with world(Reply(body=told)) as w:
        for name in ("tensorzero::embedding_model_name::e", "e"):
            answer = await w.post("/openai/v1/embeddings", {"model": name, "input": "x"})
            assert answer.status == 200 and w.sent == {"model": "emb", "input": "x"}
            assert answer.json()["data"] == told["data"]
            assert answer.json()["model"] == (name if "::" in name else "emb")


REFUSED = [
    ({"model": FUNCTION + "zz"}, 404, "Unknown function: zz"),
    ({"model": FUNCTION + "plian"}, 404, "did you mean plain?"),
    ({"model": FUNCTION + "plain", "tensorzero::variant_name": "zz"}, 404, "Unknown variant: zz"),
    ({"model": FUNCTION + "plain", "tensorzero::episode_id": "x"}, 400, "UUID of version 7"),
    ({"model": FUNCTION + "plain", "tensorzero::episode_id": EPISODE.replace("-7", "-4")}, 400,
     "UUID of version 7"),
    ({"model": FUNCTION + "plain", "tensorzero::deny_unknown_fields": True, "foo": 1}, 400, "foo"),
    ({"model": FUNCTION + "plain", "tensorzero::extra_body": [{"pointer": "x", "value": 1}]}, 400,
     "pointer"),
    ({"model": FUNCTION + "plain", "tensorzero::extra_headers": [{"name": "host", "value": ""}]},
     400, "not yours to set"),
    ({"model": FUNCTION + "plain", "tensorzero::extra_headers": [{"name": "a", "value": "x\r\ny"}]},
     400, "not fit"),
    ({"model": FUNCTION + "plain", "tensorzero::internal_dynamic_variant_config": {}}, 400,
     "not shipped"),
    ({"model": FUNCTION + "filled"}, 400, "`x` is not defined"),
    ({"model": MODEL + "zz"}, 404, "nobody here serves"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "said"), REFUSED)
async def test_what_makes_no_sense_is_refused_before_any_call(
    world: Any, body: dict[str, Any], status: int, said: str
) -> None:
    async with world() as w:
        answer = await w.chat(**{"messages": HELLO, **body})
        assert answer.status == status and said in answer.json()["error"]["message"]
        assert w.up.seen == []


async def test_other_protocols_are_told_where_the_names_belong(world: Any) -> None:
    async with world() as w:
        body = {"model": FUNCTION + "plain", "max_tokens": 9, "messages": HELLO}
        answer = await w.post("/v1/messages", body)
        assert answer.status == 400 and "migrate tensorzero" in answer.json()["error"]["message"]


# --- which variant


# Drawn by TensorZero 2026.6.0 for the episodes ...-8000-{n * 7919 + 1:012x}, n from 0.
DRAWN = {
    "many": "bbbcbbacccbaaccbabbbbacbabacbbcabbbcaabc",
    "weights": "aaaaaaabbabaababaabaaabaabbaaaabaabaaaba",
}


@pytest.mark.parametrize("function", DRAWN)
async def test_an_episode_gets_the_variant_that_tensorzero_would_draw(
    world: Any, function: str
) -> None:
    async with world() as w:
        for n, variant in enumerate(DRAWN[function]):
            episode = f"01890000-0000-7000-8000-{n * 7919 + 1:012x}"
            answer = await w.chat(FUNCTION + function, **{"tensorzero::episode_id": episode})
            assert answer.json()["model"].endswith(f"::variant_name::{variant}")


async def test_without_an_episode_variants_are_drawn_by_weight(world: Any) -> None:
    async with world() as w:
        w.gw.app.random.seed(1)
        drawn = Counter(
            [(await w.chat(FUNCTION + "weights")).json()["model"][-1] for _ in range(60)]
        )
        assert 30 < drawn["a"] < 55 and drawn["b"] > 5


def test_ids_are_of_version_7() -> None:
    ident = uuid7(0x0190_0000_0000, 2**80 - 1)
    assert ident == "01900000-0000-7fff-bfff-ffffffffffff"


# --- the native API


async def native(w: World, name: str, **more: Any) -> Any:
    body = {"function_name": name, "input": {"messages": HELLO}, **more}
    return await w.post("/inference", {k: v for k, v in body.items() if v is not None})


async def test_the_native_api_answers_in_its_own_form(world: Any) -> None:
    async with world() as w:
        answer = (await native(w, "plain", episode_id=EPISODE, tags={"a": "b"})).json()
        assert answer.pop("inference_id")[14] == "7"
        assert answer == {
            "episode_id": EPISODE,
            "variant_name": "v1",
            "content": [{"type": "text", "text": "Hello!"}],
            "usage": {"input_tokens": 11, "output_tokens": 7, "cost": 2.5e-05},
            "finish_reason": "stop",
        }
        given = {"system": "S", "messages": [{"role": "user", "content": [
            {"type": "text", "text": "Hi"},
            {"type": "file", "file_type": "url", "url": "https://x.example/a.png"}]}]}  # fmt: skip
        answer = (await native(w, None, model_name="m", input=given)).json()  # type: ignore[arg-type]
        assert answer["variant_name"] == "m"
        assert w.sent["messages"] == [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [
                {"type": "text", "text": "Hi"},
                {"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}]},
        ]  # fmt: skip


async def test_calls_and_json_have_their_native_forms(world: Any) -> None:
    called = answering({"content": None, "tool_calls": [TOOL_CALL]}, "tool_calls")
    async with world(called, answering({"content": '{"a":"x"}'})) as w:
        answer = (await native(w, "tools")).json()
        assert answer["finish_reason"] == "tool_call"
        assert answer["content"] == [
            {
                "type": "tool_call", "id": "call_1", "raw_name": "t", "name": "t",
                "raw_arguments": '{"a":"x"}', "arguments": {"a": "x"},
            }
        ]  # fmt: skip
        answer = (await native(w, "json", variant_name="strict")).json()
        assert answer["output"] == {"raw": '{"a":"x"}', "parsed": {"a": "x"}}
        assert "content" not in answer


async def test_native_streams_end_with_usage(world: Any) -> None:
    calls = [
        chat_chunk({"tool_calls": [{"index": 0, "id": "call_1", "type": "function",
                                    "function": {"name": "t", "arguments": ""}}]}),
        chat_chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}),
        chat_chunk({}, finish="tool_calls"), *CHAT_STREAM[-2:],
    ]  # fmt: skip
    async with world(stream(*CHAT_STREAM), stream(*calls), stream(*CHAT_STREAM)) as w:
        *events, last, end = (await native(w, "plain", stream=True)).events()
        texts = [event["content"] for event in events]
        assert texts == [[{"type": "text", "id": "0", "text": text}] for text in ("Hel", "lo!")]
        assert (last["content"], last["finish_reason"], end) == ([], "stop", "[DONE]")
        assert last["usage"] == {"input_tokens": 11, "output_tokens": 7, "cost": 2.5e-05}
        first, second, last, _ = (await native(w, "tools", stream=True)).events()
        assert first["content"][0]["raw_name"] == "t"
        assert second["content"][0] == {
            "type": "tool_call", "id": "call_1", "raw_name": "", "raw_arguments": '{"a":1}',
        }  # fmt: skip
        assert last["finish_reason"] == "tool_call"
        *raws, last, _ = (await native(w, "json", stream=True, variant_name="strict")).events()
        assert [event["raw"] for event in raws] == ["Hel", "lo!"] and last["raw"] == ""


NATIVE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"input": {"messages": [{"role": "user", "content": {"x": 1}}]}},
     {"messages": [{"role": "user", "content": [{"tensorzero::arguments": {"x": 1}}]}]}),
    ({"input": {"system": {"n": 1}, "messages": []}},
     {"messages": [{"role": "system", "content": [{"tensorzero::arguments": {"n": 1}}]}]}),
    ({"input": {"messages": [
        {"role": "assistant", "content": [
            {"type": "thought", "text": "hm"}, {"type": "text", "value": "a"},
            {"type": "tool_call", "id": "c", "name": "t", "arguments": {"a": "é"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "id": "c", "name": "t", "result": "ok"},
            {"type": "raw_text", "value": "r"},
            {"type": "unknown", "data": {"type": "text", "text": "u"}}]}]}},
     {"messages": [
         {"role": "assistant", "content": [{"type": "text", "text": "a"}],
          "reasoning_content": "hm",
          "tool_calls": [{"id": "c", "type": "function",
                          "function": {"name": "t", "arguments": '{"a":"\\u00e9"}'}}]},
         {"role": "tool", "tool_call_id": "c", "content": "ok"},
         {"role": "user", "content": [{"type": "tensorzero::raw_text", "value": "r"},
                                      {"type": "text", "text": "u"}]}]}),
    ({"input": {"messages": HELLO}, "stream": True, "parallel_tool_calls": False,
      "tool_choice": {"specific": "t"}, "dryrun": True, "output_schema": {"type": "object"},
      "additional_tools": [{"name": "t", "description": "d", "parameters": {}, "strict": True}]},
     {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True},
      "parallel_tool_calls": False, "tensorzero::dryrun": True,
      "tool_choice": {"type": "function", "function": {"name": "t"}},
      "tools": [{"type": "function", "function": {
          "name": "t", "description": "d", "parameters": {}, "strict": True}}],
      "response_format": {"type": "json_schema", "json_schema": {
          "name": "response", "strict": True, "schema": {"type": "object"}}}}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "wanted"), NATIVE)
def test_a_native_request_becomes_one_of_chat_completions(
    body: dict[str, Any], wanted: dict[str, Any]
) -> None:
    chat = native_as_chat({"function_name": "f", **body})
    assert chat == {"model": FUNCTION + "f", **wanted}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"zz": 1}, "zz"),
        ({}, "model_name"),
        ({"function_name": "f", "model_name": "m"}, "model_name"),
        ({"function_name": "f"}, "input"),
        ({"function_name": "f", "input": {"messages": [{"role": "x"}]}}, "input.messages[0].role"),
        (
            {"function_name": "f", "input": {"messages": [
                {"role": "user", "content": [{"type": "smell"}]}]}},
            "input.messages[0].content[0].type",
        ),
    ],
)  # fmt: skip
def test_a_native_request_that_makes_no_sense_is_refused_by_name(
    body: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        native_as_chat(body)
    assert refused.value.param == param


async def test_native_errors_are_as_its_clients_know_them(world: Any) -> None:
    async with world(Reply(429, {"error": {"message": "slow"}}, {"retry-after": "99"})) as w:
        assert (await native(w, "zz")).json() == {"error": "Unknown function: zz"}
        answer = await native(w, "plain")
        assert answer.status == 429 and answer.json()["error"].endswith("answered 429: slow")
        feedback = await w.post("/feedback", {"metric_name": "x", "value": 1})
        assert feedback.status == 501 and isinstance(feedback.json()["error"], str)


# --- names


def named(model: str, config_text: str = "", **options: Any) -> tuple[Bridge, str]:
    config = parse_config(config_text, {}).config
    body = {f"tensorzero::{name}": value for name, value in options.items()}
    return bridge_of(body, model, config, lambda: EPISODE)


PRESETS = """
[presets.f]
candidates = [{preset = "f.v"}]
[presets."f.v"]
model = "openai/gpt-4o"
[models."embedding/e"]
endpoints = [{provider = "openai", service_id = "x"}]
[models.own]
endpoints = [{provider = "openai", service_id = "x"}]
"""
NAMES = [
    (MODEL + "own", "own"),
    (MODEL + "openai::gpt-4o-mini", "openai/gpt-4o-mini"),
    (MODEL + "openai::responses::gpt-5-codex", "openai/gpt-5-codex"),
    (MODEL + "google_ai_studio_gemini::gemini-2.5-pro", "google/gemini-2.5-pro"),
    (MODEL + "openrouter::a/b", "openrouter/a/b"),
    (MODEL + "openai::ft:gpt-4o:tensorzero::1", "openai/ft:gpt-4o:tensorzero::1"),
    (FUNCTION + "f", "@f"),
    ("tensorzero::f", "@f"),
    ("tensorzero::embedding_model_name::e", "embedding/e"),
    ("tensorzero::embedding_model_name::own", "own"),
    ("tensorzero::embedding_model_name::openai::text-embedding-3-small",
     "openai/text-embedding-3-small"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "ours"), NAMES)
def test_every_form_of_a_name_is_understood(model: str, ours: str) -> None:
    bridge, found = named(model, PRESETS)
    assert found == ours
    assert bridge.responses is ("responses::" in model)


def test_a_variant_may_be_pinned() -> None:
    assert named(FUNCTION + "f", PRESETS, variant_name="v")[1] == "@f.v"
    with pytest.raises(NotFound):
        named(FUNCTION + "f", PRESETS, variant_name="w")


def test_messages_without_anything_to_fill_in_are_left_alone() -> None:
    body = {"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}]}
    assert filled_messages(body, {}) is None
    assert filled_messages({"messages": HELLO}, {"other": "x"}) is None
