"""A configuration at work, end to end: what presets change, whom requests reach, what happens when
providers fail in the middle of it, and servers whose configuration changes while they serve."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import stat
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support import (
    CHAT_ANSWER,
    CHAT_STREAM,
    DONE,
    Answer,
    Caller,
    FakeProvider,
    Reply,
    Seen,
    chat_chunk,
    request_bytes,
    stream,
    until,
)
from test_attempts import CHAT_PATH, SPOKEN, no

import bitrouter

PROTOCOLS = tuple(SPOKEN)
NO_RETRY = "[upstream.retry]\nmax = 0\n"
HELLO = [{"role": "user", "content": "Hi"}]
GOING_ON = [*HELLO, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "More"}]
OK = Reply(body=CHAT_ANSWER)
OK_STREAM = stream(*CHAT_STREAM)
ROLE = chat_chunk({"role": "assistant", "content": ""})
HANGS = Reply(hangs=True)


def path_of(protocol: str, model: str, *, streams: bool = False) -> str:
    if protocol != "generate_content":
        return SPOKEN[protocol].path
    return f"/v1beta/models/{model}:" + (
        "streamGenerateContent?alt=sse" if streams else "generateContent"
    )


def said_in(protocol: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A conversation in the words of a protocol."""
    if protocol == "responses":
        return {"input": turns}
    if protocol == "generate_content":
        roles = {"assistant": "model"}
        contents = [
            {"role": roles.get(turn["role"], turn["role"]), "parts": [{"text": turn["content"]}]}
            for turn in turns
        ]
        return {"contents": contents}
    more = {"max_tokens": 9} if protocol == "messages" else {}
    return {"messages": turns, **more}


@dataclass
class Fleet:
    """A gateway before providers `a`, `b` and so on, each of which declares a model `m`."""

    gw: Any
    ups: list[FakeProvider]
    protocol: str

    async def ask(
        self,
        model: str = "m",
        *,
        protocol: str = "",
        turns: list[dict[str, Any]] = HELLO,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> Answer:
        """Without a model in the body if it is ""."""
        protocol = protocol or self.protocol
        google = protocol == "generate_content"
        streams = google and more.pop("stream", False)
        body = {} if google or not model else {"model": model}
        body |= {**said_in(protocol, turns), **more}
        async with self.gw.caller() as caller:
            path = path_of(protocol, model, streams=streams)
            answer: Answer = await caller.post(path, body, **(headers or {}))
            return answer

    async def served(self, model: str = "m", **more: Any) -> str:
        answer = await self.ask(model, **more)
        assert answer.status == 200, answer.body
        return answer.headers["x-bitrouter-provider"]

    @property
    def counts(self) -> list[int]:
        return [len(up.seen) for up in self.ups]

    @property
    def seen(self) -> Seen:
        """The one request that came to a provider."""
        [seen] = [seen for up in self.ups for seen in up.seen]
        return seen


def tables(ups: list[FakeProvider], protocols: list[str], own: dict[str, str] | None = None) -> str:
    """A table for each provider. own: more of it, by name."""
    parts = []
    for name, up, protocol in zip("abcdef", ups, protocols, strict=False):
        more = (own or {}).get(name, "")
        models = "" if "models =" in more else 'models = [{id = "m"}]\n'
        version = "v1beta" if protocol == "generate_content" else "v1"
        parts.append(
            f'[providers.{name}]\napi_base = "{up.base}/{version}"\napi_protocol = "{protocol}"\n'
            f"{models}{more}\n"
        )
    return "\n".join(parts)


@pytest.fixture
def fleet(provider: Any, gateway: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(
        *scripts: Reply | list[Reply],
        toml: str = "",
        own: dict[str, str] | None = None,
        protocol: str = "chat_completions",
        theirs: list[str] | None = None,
        rules: str = NO_RETRY,
        **more: Any,
    ) -> AsyncIterator[Fleet]:
        """protocol: of the caller. theirs: of the providers, if it is another one."""
        async with AsyncExitStack() as stack:
            ups = []
            for script in scripts:
                replies = script if isinstance(script, list) else [script]
                ups.append(await stack.enter_async_context(provider(*replies)))
            spoken = theirs or [protocol] * len(ups)
            text = f"{rules}\n{tables(ups, spoken, own)}\n{toml}"
            gw = await stack.enter_async_context(gateway(text, **more))
            yield Fleet(gw, ups, protocol)

    return start


def well(protocol: str = "chat_completions", *, streams: bool = False) -> Reply:
    spoken = SPOKEN[protocol]
    return stream(*spoken.events) if streams else Reply(body=spoken.answer)


# What presets change, in each protocol.

SHAPED = """
[presets.p]
model = "m"
system_prompt = "Be terse."
system_mode = "MODE"
params = {temperature = 0.25, max_tokens = 77, stop = "END", seed = 5}
extra_body = [
  {pointer = "/user", delete = true}, {pointer = "/labels/team", value = "red"},
  {pointer = "/nobody/here", delete = true},
]
extra_headers = [{name = "x-team", value = "red"}, {name = "user-agent", delete = true}]
"""
# fmt: off
CHAT_RAW = (
    b'{ "model":"@p", "x":[1.0,1e3 , "\xc3\xa9\\u00e9"],"user":"u",  "seed" : 7,\n'
    b'"messages" : [ {"role":"user","content":"Hi"} ] }'
)
RESPONSES_RAW = (
    b'{ "model":"@p", "x":[1.0,1e3 , "\xc3\xa9\\u00e9"],"user":"u",  "temperature" : 1.50,\n'
    b'"input" : "Hi" }'
)
MESSAGES_RAW = (
    b'{ "model":"@p", "x":[1.0,1e3 , "\xc3\xa9\\u00e9"],"user":"u",  "max_tokens" : 9,\n'
    b'"messages" : [ {"role":"user","content":"Hi"} ] }'
)
GEMINI_RAW = (
    b'{ "x":[1.0,1e3 , "\xc3\xa9\\u00e9"],"user":"u", "generationConfig" : { "topK": 3.0 },\n'
    b'"contents" : [ {"parts":[{"text":"Hi"}]} ] }'
)
# The caller's bytes, and what they become: each a cut, or an insertion.
CHANGED: dict[str, tuple[bytes, list[tuple[bytes, bytes]]]] = {
    "chat_completions": (CHAT_RAW, [
        (b'"@p"', b'"m"'),
        (b'"user":"u",  ', b""),
        (b'[ {"role"', b'[ {"role":"system","content":"Be terse."},{"role"'),
        (b"] }", b'] ,"temperature":0.25,"max_tokens":77,"stop":"END","labels":{"team":"red"}}'),
    ]),
    "responses": (RESPONSES_RAW, [
        (b'"@p"', b'"m"'),
        (b'"user":"u",  ', b""),
        (b'"Hi" }', (b'"Hi" ,"max_output_tokens":77,"instructions":"Be terse.",'
                    b'"labels":{"team":"red"}}')),
    ]),
    "messages": (MESSAGES_RAW, [
        (b'"@p"', b'"m"'),
        (b'"user":"u",  ', b""),
        (b"] }", (b'] ,"temperature":0.25,"stop_sequences":["END"],"system":"Be terse.",'
                 b'"labels":{"team":"red"}}')),
    ]),
    "generate_content": (GEMINI_RAW, [
        (b'"user":"u", ', b""),
        (b'3.0 }', (b'3.0 ,"temperature":0.25,"maxOutputTokens":77,"stopSequences":["END"],'
                   b'"seed":5}')),
        (b"] }", (b'] ,"systemInstruction":{"parts":[{"text":"Be terse."}]},'
                 b'"labels":{"team":"red"}}')),
    ]),
}
# fmt: on


def without_space(text: bytes) -> bytes:
    """JSON without the white space between its tokens (no text here holds any but `Be terse.`)."""
    return text.replace(b" ", b"").replace(b"\n", b"")


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_preset_changes_what_it_names_and_no_other_byte(
    fleet: Any, protocol: str, streams: bool
) -> None:
    raw, changes = CHANGED[protocol]
    if streams and protocol != "generate_content":
        raw = raw.replace(b'"x":', b'"stream": true, "x":')
        if protocol == "chat_completions":
            raw = raw.replace(b'"x":', b'"stream_options": {"include_usage": true},"x":')
    wanted = raw
    for old, new in changes:
        assert wanted.count(old) >= 1
        head, _, tail = wanted.rpartition(old)
        wanted = head + new + tail
    toml = SHAPED.replace("MODE", "fill")
    async with fleet(well(protocol, streams=streams), toml=toml, protocol=protocol) as f:
        async with f.gw.caller() as caller:
            path = path_of(protocol, "@p", streams=streams)
            answer = await caller.post(path, raw, user_agent="me", x_team="mine")
        assert answer.status == 200
        assert without_space(f.seen.body) == without_space(wanted)
        assert f.seen.headers["x-team"] == "red" and "user-agent" not in f.seen.headers


OWN_SYSTEM: dict[str, dict[str, Any]] = {
    "chat_completions": {"messages": [{"role": "system", "content": "Mine."}, *HELLO]},
    "responses": {"instructions": "Mine.", "input": "Hi"},
    "messages": {"system": "Mine.", "max_tokens": 9, "messages": HELLO},
    "generate_content": {
        "systemInstruction": {"parts": [{"text": "Mine."}]},
        "contents": [{"parts": [{"text": "Hi"}]}],
    },
}


def system_in(body: dict[str, Any]) -> str:
    """The system prompt of a request in any protocol."""
    told = body.get("system") or body.get("instructions")
    turns = body.get("messages") or body.get("input")
    if isinstance(turns, list) and not told:
        told = [one["content"] for one in turns if one["role"] in ("system", "developer")]
    if "contents" in body:
        told = [part["text"] for part in body["systemInstruction"]["parts"]]
    parts = told if isinstance(told, list) else [told]
    parts = [one for part in parts for one in (part if isinstance(part, list) else [part])]
    texts = [part["text"] if isinstance(part, dict) else str(part) for part in parts]
    return "\n\n".join(texts)


@pytest.mark.parametrize(
    ("mode", "told"),
    [("fill", "Mine."), ("prepend", "Be terse.\n\nMine."), ("replace", "Be terse.")],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_request_s_own_system_prompt_is_treated_as_the_mode_says(
    fleet: Any, protocol: str, mode: str, told: str
) -> None:
    toml = SHAPED.replace("MODE", mode)
    async with fleet(well(protocol), toml=toml, protocol=protocol) as f:
        answer = await f.ask("@p", **OWN_SYSTEM[protocol])
        assert answer.status == 200
        assert system_in(f.seen.json()) == told


PAIRS = [(mine, theirs) for mine in PROTOCOLS for theirs in PROTOCOLS if mine != theirs]
TEMPERATURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "chat_completions": lambda body: body["temperature"],
    "responses": lambda body: body["temperature"],
    "messages": lambda body: body["temperature"],
    "generate_content": lambda body: body["generationConfig"]["temperature"],
}


@pytest.mark.parametrize(("mine", "theirs"), PAIRS)
async def test_what_a_preset_says_is_translated_with_the_request(
    fleet: Any, mine: str, theirs: str
) -> None:
    toml = SHAPED.replace("MODE", "fill")
    async with fleet(well(theirs), toml=toml, protocol=mine, theirs=[theirs]) as f:
        answer = await f.ask("@p")
        assert answer.status == 200, answer.body
        body = f.seen.json()
        assert system_in(body) == "Be terse."
        assert TEMPERATURES[theirs](body) == 0.25
        assert body["labels"] == {"team": "red"}
        assert f.seen.headers["x-team"] == "red"


async def test_edits_reach_into_lists_and_odd_names(fleet: Any) -> None:
    toml = """
[presets.p]
model = "m"
extra_body = [
  {pointer = "/messages/0", delete = true}, {pointer = "/messages/0/content", value = "Ho"},
  {pointer = "/stop/-", value = "END"}, {pointer = "/a~1b/c~0d", value = {x = [1, 2.5, true]}},
  {pointer = "/metadata", delete = true}, {pointer = "/metadata/deep/er", value = "on"},
]
"""
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi", "name": "n"}]
    async with fleet(OK, toml=toml) as f:
        answer = await f.ask("@p", turns=turns, stop=["A"], metadata={"k": "v"})
        assert answer.status == 200, answer.body
        assert f.seen.json() == {
            "model": "m",
            "messages": [{"role": "user", "content": "Ho", "name": "n"}],
            "stop": ["A", "END"],
            "a/b": {"c~d": {"x": [1, 2.5, True]}},
            "metadata": {"deep": {"er": "on"}},
        }


async def test_a_preset_leaves_alone_what_holds_no_talk(fleet: Any) -> None:
    async with fleet(OK, toml=SHAPED.replace("MODE", "fill")) as f, f.gw.caller() as caller:
        body = {"model": "@p", "input": "x", "user": "u"}
        assert (await caller.post("/v1/embeddings", body)).status == 200
        assert f.seen.json() == {**body, "model": "m"}


async def test_a_count_is_of_what_would_be_sent(provider: Any, gateway: Any) -> None:
    async with provider(Reply(body={"input_tokens": 7})) as up:
        own = {"a": 'api_key = "request:x-team-key"'}
        toml = '[presets.p]\nmodel = "m"\nsystem_prompt = "P"\n'
        async with gateway(tables([up], ["messages"], own) + toml) as gw, gw.caller() as caller:
            body = {"model": "@p", "messages": HELLO}
            answer = await caller.post("/v1/messages/count_tokens", body, x_team_key="sk-mine")
            assert answer.json() == {"input_tokens": 7}
        assert up.seen[0].json()["system"] == "P"
        assert up.seen[0].headers["x-api-key"] == "sk-mine"


async def test_each_target_gets_its_own_edits_and_not_those_of_the_one_before(fleet: Any) -> None:
    own = {
        "a": 'extra_body = [{pointer = "/user", delete = true}, {pointer = "/a", value = 1}]\n'
        'extra_headers = [{name = "x-a", value = "1"}, {name = "user-agent", delete = true}]',
        "b": 'extra_headers = [{name = "x-b", value = "1"}]\nparams = {seed = 3}',
    }
    async with fleet(no(500), OK, own=own) as f:
        answer = await f.ask(user="u", headers={"user_agent": "me"})
        assert answer.status == 200
        first, second = f.ups[0].seen[0], f.ups[1].seen[0]
        assert first.json() == {"model": "m", "messages": HELLO, "a": 1}
        assert second.json() == {"model": "m", "messages": HELLO, "user": "u", "seed": 3}
        assert (first.headers.get("x-a"), first.headers.get("x-b")) == ("1", None)
        assert (second.headers.get("x-a"), second.headers.get("x-b")) == (None, "1")
        assert "user-agent" not in first.headers and second.headers["user-agent"] == "me"


# What is meant for us.


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_routing_fields_never_reach_a_provider(
    fleet: Any, protocol: str, streams: bool
) -> None:
    toml = '[presets.p]\nmodel = "m"\nparams = {temperature = 0.25}\n'
    ours = {"models": ["a:m"], "provider": {"only": ["a"], "sort": "cost"}, "preset": "p"}
    more = {"stream": True} if streams else {}
    async with fleet(well(protocol, streams=streams), toml=toml, protocol=protocol) as f:
        assert await f.served(**ours, **more) == "a"
        body = f.seen.json()
        assert not {"models", "provider", "preset"} & body.keys()
        assert TEMPERATURES[protocol](body) == 0.25
        if protocol != "generate_content":
            assert body["model"] == "m"
        else:
            assert f.seen.path.startswith("/v1beta/models/m:") and "model" not in body


@pytest.mark.parametrize("protocol", ["chat_completions", "responses", "messages"])
async def test_a_model_id_may_be_left_out_beside_a_preset_or_models(
    fleet: Any, protocol: str
) -> None:
    toml = '[presets.p]\nmodel = "m"\n'
    async with fleet(well(protocol), toml=toml, protocol=protocol) as f:
        for ours in ({"preset": "p"}, {"models": ["m"]}, {"preset": "@p", "models": ["a:m"]}):
            assert await f.served("", **ours) == "a"
        for seen in f.ups[0].seen:
            assert seen.json() == {**said_in(protocol, HELLO), "model": "m"}


async def test_a_list_of_models_goes_before_the_one_beside_it(fleet: Any) -> None:
    async with fleet(OK, OK) as f:
        assert await f.served("x", models=["b:m", "a:m"]) == "b"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"models": ["m"] * 9}, "models"),
        ({"models": [3]}, "models"),
        ({"models": "m", "provider": []}, "provider"),
        ({"provider": {"only": ["zz"]}}, "provider.only"),
        ({"preset": "nope"}, "model"),
        ({"preset": 1}, "preset"),
    ],
)
async def test_wishes_that_make_no_sense_are_refused_before_any_call(
    fleet: Any, body: dict[str, Any], param: str
) -> None:
    async with fleet(OK) as f:
        answer = await f.ask(**body)
        assert (answer.status, f.counts) == (400, [0])
        assert answer.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize("model", ["openrouter/x/z", "openrouter:x/z"])
async def test_a_gateway_that_is_named_gets_its_own_options(
    provider: Any, gateway: Any, model: str
) -> None:
    raw = (
        b'{"model": "%b", "models" : ["x/y"], "provider":{"data_collection":"deny"}, '
        b'"preset": "theirs", "messages": []}' % model.encode()
    )
    async with provider(OK) as up:
        environ = {"OPENROUTER_API_KEY": "k", "OPENROUTER_BASE_URL": f"{up.base}/v1"}
        async with gateway("", environ) as gw, gw.caller() as caller:
            assert (await caller.post(CHAT_PATH, raw)).status == 200
        assert up.seen[0].body == raw.replace(model.encode(), b"x/z")


# Models that stand in for each other.

TOO_LONG = no(400, "This model's maximum context length is 8192 tokens", "context_length_exceeded")
FILTERED = no(400, "The response was filtered", "content_filter")
CUT = stream(ROLE, ending="cut")
SAYS_ERROR = stream(b'data: {"error":{"message":"no","code":"server_error"}}\n\n')
WORTH_ANOTHER = {
    "429": no(429),
    "429 for an hour": no(429, retry_after="3600"),
    "500": no(500),
    "503": no(503),
    "529": no(529),
    "408": no(408),
    "a timeout": HANGS,
    "a prompt that is too long": TOO_LONG,
    "a content filter": FILTERED,
    "no answer": Reply(chunks=(b"",), headers={"content-length": "99"}, ending="cut"),
    "a page": Reply(body=b"<html>"),
}
IN_STREAMS = {
    "a stream that breaks before its first token": CUT,
    "a stream with an error before its first token": SAYS_ERROR,
    "a stream with nothing in it": stream(DONE),
    "a stream that goes quiet before its first token": stream(ROLE, ending="hang"),
}
TIGHT = "timeouts = {first_token_s = 0.04, total_s = 0.04, idle_s = 0.04}"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("failure", WORTH_ANOTHER)
async def test_the_next_model_answers_when_the_first_says(
    fleet: Any, failure: str, streams: bool
) -> None:
    async with fleet(WORTH_ANOTHER[failure], OK_STREAM if streams else OK, own={"a": TIGHT}) as f:
        more = {"stream": True} if streams else {}
        answer = await f.ask("", models=["a:m", "b:other"], **more)
        assert answer.status == 200, answer.body
        told = [answer.headers[f"x-bitrouter-{name}"] for name in ("provider", "model", "attempts")]
        assert told == ["b", "other", "2"]
        assert f.counts == [1, 1] and f.ups[1].seen[0].json()["model"] == "other"
        assert f.ups[0].seen[0].json()["model"] == "m"
        if streams:
            assert answer.events()[-1] == "[DONE]"


@pytest.mark.parametrize("failure", IN_STREAMS)
async def test_the_next_model_streams_after(fleet: Any, failure: str) -> None:
    async with fleet(IN_STREAMS[failure], OK_STREAM, own={"a": TIGHT}) as f:
        answer = await f.ask("", models=["a:m", "b:m"], stream=True)
        assert answer.headers["x-bitrouter-provider"] == "b"
        words = [event["choices"][0]["delta"].get("content", "")
                 for event in answer.events()[:-1] if event["choices"]]  # fmt: skip
        assert "".join(words) == "Hello!" and answer.events()[-1] == "[DONE]"


async def test_all_models_of_a_chain_get_the_preset_that_is_asked_for(fleet: Any) -> None:
    async with fleet(no(500), OK, toml='[presets.p]\nsystem_prompt = "P"\n') as f:
        assert await f.served("", preset="p", models=["a:m", "b:m"]) == "b"
        assert system_in(f.ups[1].seen[0].json()) == "P"


async def test_the_fallbacks_of_a_preset_come_last(fleet: Any) -> None:
    toml = SHAPED.replace("MODE", "fill") + 'routing = {ignore = ["b"]}\nfallbacks = ["b:other"]\n'
    async with fleet(no(500), OK, toml=toml) as f:
        assert await f.served("@p") == "b"
        body = f.ups[1].seen[0].json()
        assert (body["model"], system_in(body)) == ("other", "Be terse.")


async def test_nothing_is_tried_elsewhere_after_the_first_token(fleet: Any) -> None:
    broken = stream(ROLE, chat_chunk({"content": "Hel"}), ending="cut")
    async with fleet(broken, OK_STREAM) as f:
        answer = await f.ask("", models=["a:m", "b:m"], stream=True)
        assert answer.headers["x-bitrouter-provider"] == "a"
        assert "error" in answer.events()[-1] and f.counts == [1, 0]


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_what_the_request_is_to_blame_for_ends_a_chain_of_models(
    fleet: Any, status: int
) -> None:
    async with fleet(no(status, "it is you"), OK) as f:
        answer = await f.ask("", models=["a:m", "b:m"])
        assert (answer.status, f.counts) == (status, [1, 0])
        assert answer.json()["error"]["message"] == "it is you"


async def test_each_model_s_providers_are_tried_before_the_next_model(fleet: Any) -> None:
    own = {"a": 'models = [{id = "one"}]', "b": 'models = [{id = "one"}, {id = "two"}]',
           "c": 'models = [{id = "two"}]'}  # fmt: skip
    async with fleet(no(500), no(500), no(500), own=own) as f:
        answer = await f.ask("", models=["one", "two"])
        assert answer.status == 500 and f.counts == [1, 2, 1]
        asked = [seen.json()["model"] for seen in f.ups[1].seen]
        assert asked == ["one", "two"]
        assert answer.headers["x-bitrouter-attempts"] == "4"


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_an_unknown_model_among_several_is_a_400_before_any_call(
    fleet: Any, protocol: str
) -> None:
    async with fleet(well(protocol), protocol=protocol) as f:
        answer = await f.ask(models=["m", "nobody-has-this"])
        assert answer.status == 400 and f.counts == [0]
        assert "nobody-has-this" in answer.body.decode() and "models[1]" in answer.body.decode()
        error = answer.json()["error"]
        if protocol == "messages":
            assert (answer.json()["type"], error["type"]) == ("error", "invalid_request_error")
        elif protocol == "generate_content":
            assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
        else:
            assert (error["type"], error["param"]) == ("invalid_request_error", "models[1]")


# Whom a request asks for.

PRICED = {
    "a": 'models = [{id = "m", pricing = {input = 5, output = 5}}]',
    "b": 'models = [{id = "m", pricing = {input = 1, output = 20}}]',
    "c": 'models = [{id = "m", pricing = {input = 2, output = 4}}]\ntags = ["eu"]',
    "d": "",
}
# fmt: off
WISHES = [
    # provider                                             who is asked, if all fail
    ({},                                                   "abcd"),
    ({"only": ["b", "c"]},                                 "bc"),
    ({"only": ["C"]},                                      "c"),
    ({"ignore": ["a", "c"]},                               "bd"),
    ({"only": ["a", "b"], "ignore": ["a"]},                "b"),
    ({"order": ["c", "b"]},                                "cbad"),
    ({"order": ["d"], "allow_fallbacks": False},           "d"),
    ({"order": ["c", "b"], "allow_fallbacks": False},      "cb"),
    ({"allow_fallbacks": False},                           "a"),
    ({"sort": "cost"},                                     "cabd"),
    ({"sort": "price"},                                    "cabd"),
    ({"sort": {"by": "cost"}},                             "cabd"),
    ({"sort": "cost", "order": ["b"]},                     "bcad"),
    ({"sort": "cost", "allow_fallbacks": False},           "c"),
    ({"max_price": {"input": 3}},                          "bc"),
    ({"max_price": {"prompt": "3", "completion": "10"}},   "c"),
    ({"max_price": {"input": 5, "output": 5}},             "ac"),
    ({"tags": ["eu"]},                                     "c"),
]
# fmt: on


@pytest.mark.parametrize(("asked", "who"), WISHES)
async def test_a_request_says_whom_it_wants(fleet: Any, asked: dict[str, Any], who: str) -> None:
    async with fleet(*[no(500)] * 4, own=PRICED) as f:
        await f.ask(provider=asked)
        order = [line["target"][0] for line in f.gw.lines("attempt_failed")]
        assert "".join(order) == who
        assert sum(f.counts) == len(who)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"only": ["d"], "ignore": ["d"]}, "d: in `ignore`"),
        ({"max_price": {"input": 0.5}}, "a: costs 5 per million input tokens"),
        ({"tags": ["asia"]}, "lacks the tag asia"),
    ],
)
async def test_wishes_that_leave_nobody_are_a_400_that_says_why(
    fleet: Any, asked: dict[str, Any], said: str
) -> None:
    async with fleet(*[OK] * 4, own=PRICED) as f:
        answer = await f.ask(provider=asked)
        assert (answer.status, f.counts) == (400, [0] * 4)
        assert answer.json()["error"]["code"] == "no_eligible_provider"
        assert said in answer.json()["error"]["message"]


async def test_who_would_lose_something_is_passed_over_if_that_is_asked_for(fleet: Any) -> None:
    theirs = ["messages", "chat_completions"]
    async with fleet(well("messages"), OK, theirs=theirs) as f:
        assert await f.served(logit_bias={"5": 1}) == "a"
        strict = {"require_parameters": True}
        assert await f.served(logit_bias={"5": 1}, provider=strict) == "b"
        assert await f.served(provider=strict) == "a"
        assert f.counts == [2, 1]
        answer = await f.ask(logit_bias={"5": 1}, provider={**strict, "only": ["a"]})
        assert answer.status == 400 and answer.json()["error"]["param"] == "logit_bias"
        assert f.counts == [2, 1]


async def test_measured_speed_decides_who_goes_first(fleet: Any) -> None:
    slow = stream(None, *CHAT_STREAM, gap_s=0.03)
    async with fleet(slow, OK_STREAM) as f:
        ask = {"stream": True, "provider": {"sort": "latency"}}
        # each is measured once, and then the faster one is asked
        assert [await f.served(**ask) for _ in range(4)] == ["a", "b", "b", "b"]
        assert await f.served("m:latency", stream=True) == "b"
        assert await f.served(stream=True) == "a"


# Conversations.

TRIAL = """
[presets.trial]
candidates = [{model = "a:m", weight = 3}, {model = "b:m", weight = 2}, {model = "c:m"}]
"""
NAMED: dict[str, Callable[[str], dict[str, Any]]] = {
    "a header": lambda name: {"headers": {"x_session_id": name}},
    "a cache key": lambda name: {"prompt_cache_key": name},
    "a user id": lambda name: {"protocol": "messages", "metadata": {"user_id": name}},
    "a header of Claude Code": lambda name: {"headers": {"x_claude_code_session_id": name}},
}


@pytest.mark.parametrize("way", NAMED)
async def test_a_conversation_that_is_named_keeps_its_candidate(fleet: Any, way: str) -> None:
    async with fleet(OK, OK, OK, toml=TRIAL) as f:
        firsts = Counter[str]()
        for n in range(24):
            asked = [await f.served("@trial", **NAMED[way](f"chat {n}")) for _ in range(3)]
            assert len(set(asked)) == 1
            firsts[asked[0]] += 1
        assert set(firsts) == {"a", "b", "c"}


async def test_any_gateway_draws_the_same_candidate_for_a_name(fleet: Any) -> None:
    drawn = []
    for _ in range(2):
        async with fleet(OK, OK, OK, toml=TRIAL) as f:
            names = [NAMED["a cache key"](str(n)) for n in range(12)]
            drawn.append([await f.served("@trial", **name) for name in names])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_conversation_without_a_name_is_known_by_its_beginning(
    fleet: Any, protocol: str
) -> None:
    async with fleet(*[well(protocol)] * 3, toml=TRIAL, protocol=protocol) as f:
        f.gw.app.random.seed(5)
        firsts = Counter[str]()
        for n in range(16):
            begun = [{"role": "user", "content": f"Chat {n}"}]
            first = await f.served("@trial", turns=begun)
            later = [*begun, *GOING_ON[1:]]
            still_later = [*later, *GOING_ON[1:]]
            assert await f.served("@trial", turns=later) == first
            assert await f.served("@trial", turns=still_later) == first
            firsts[first] += 1
        assert set(firsts) == {"a", "b", "c"}


async def test_a_candidate_that_fails_is_stood_in_for_by_the_others(fleet: Any) -> None:
    async with fleet(OK, no(500), no(500), toml=TRIAL) as f:
        for n in range(12):
            assert await f.served("@trial", headers={"x_session_id": str(n)}) == "a"


def warm(**usage: Any) -> Reply:
    told = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107, **usage}
    return Reply(body={**CHAT_ANSWER, "usage": told})


CACHED = warm(prompt_tokens_details={"cached_tokens": 64})
WARM = {"cached tokens": CACHED, "a prompt that is long enough": warm(prompt_tokens=5000)}


@pytest.mark.parametrize("usage", WARM)
async def test_a_conversation_stays_where_its_cache_is_warm_until_that_fails(
    fleet: Any, usage: str
) -> None:
    rules = NO_RETRY + "[upstream.breaker]\nfailures = 2\n"
    async with fleet([no(500), WARM[usage]], WARM[usage], rules=rules) as f:
        going_on = {"turns": GOING_ON}
        assert [await f.served(**going_on) for _ in range(3)] == ["b", "b", "b"]
        other = [{"role": "user", "content": "Another one begins where it is best."}]
        assert await f.served(turns=other) == "a"
        f.ups[1].script[:] = [no(500)]
        assert [await f.served(**going_on) for _ in range(3)] == ["a", "a", "a"]
        assert f.counts == [5, 4]  # and then nobody asks b first


async def test_a_short_prompt_is_cached_nowhere(fleet: Any) -> None:
    async with fleet([no(500), OK], OK) as f:
        assert [await f.served(turns=GOING_ON) for _ in range(2)] == ["b", "a"]


async def test_a_warm_cache_does_not_widen_a_choice(fleet: Any) -> None:
    async with fleet([no(500), CACHED], CACHED) as f:
        assert await f.served(turns=GOING_ON) == "b"
        assert await f.served(turns=GOING_ON, provider={"ignore": ["b"]}) == "a"
        assert await f.served("a:m", turns=GOING_ON) == "a"


async def test_a_warm_cache_of_a_stream_counts_too(fleet: Any) -> None:
    usage = {"prompt_tokens": 2000, "completion_tokens": 7, "total_tokens": 2007}
    told = stream(*CHAT_STREAM[:-2], chat_chunk(None, usage=usage), DONE)
    async with fleet([no(500), told], told) as f:
        ask = {"turns": GOING_ON, "stream": True}
        assert [await f.served(**ask) for _ in range(2)] == ["b", "b"]


# Shares and limits.

SHARED = """
[models.shared]
strategy = "balance"
endpoints = [
  {provider = "a", service_id = "m", weight = 5}, {provider = "b", service_id = "m", weight = 3},
  {provider = "c", service_id = "m", weight = 2},
]
"""


async def test_shares_hold_in_every_stretch_whatever_is_asked_at_once(fleet: Any) -> None:
    async with fleet(OK, OK, OK, toml=SHARED) as f:
        for _ in range(3):
            served = await asyncio.gather(*(f.served("shared") for _ in range(20)))
            assert Counter(served) == {"a": 10, "b": 6, "c": 4}


async def test_who_fails_gives_its_share_to_the_others(fleet: Any) -> None:
    async with fleet(no(500), OK, OK, toml=SHARED) as f:
        served = Counter([await f.served("shared") for _ in range(20)])
        assert set(served) == {"b", "c"} and sum(served.values()) == 20


def limited(n: int, what: str = "requests") -> str:
    return f'rate_limits = {{"*" = {{{what}_per_minute = {n}}}}}'


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_what_is_over_a_limit_spills_over_and_then_is_a_429(
    fleet: Any, protocol: str
) -> None:
    own = {"a": limited(2), "b": limited(1)}
    async with fleet(well(protocol), well(protocol), own=own, protocol=protocol) as f:
        assert [await f.served() for _ in range(3)] == ["a", "a", "b"]
        answer = await f.ask()
        assert answer.status == 429 and f.counts == [2, 1]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        error = answer.json()["error"]
        kinds = {"messages": error.get("type"), "generate_content": error.get("status")}
        assert kinds.get(protocol, error.get("code")) in (
            "rate_limit_error", "RESOURCE_EXHAUSTED", "rate_limit_exceeded",
        )  # fmt: skip


async def test_who_was_passed_over_for_a_limit_is_named(fleet: Any) -> None:
    async with fleet(OK, OK, own={"a": limited(1)}) as f:
        first, second = await f.ask(), await f.ask()
        assert "x-bitrouter-skipped" not in first.headers
        assert second.headers["x-bitrouter-skipped"].startswith("a/m (over its limit for ")
        assert second.headers["x-bitrouter-attempts"] == "1"
        assert "a/m (over its limit" in f.gw.lines()[1]["skipped"]
        assert f.gw.app.health.limits.used(0.0)


async def test_limits_are_exact_whatever_is_asked_at_once(fleet: Any) -> None:
    async with fleet(OK, OK, own={"a": limited(2)}) as f:
        served = await asyncio.gather(*(f.served() for _ in range(20)))
        assert Counter(served) == {"a": 2, "b": 18}


async def test_streams_and_retries_count_against_a_limit(fleet: Any) -> None:
    rules = "[upstream.retry]\nmax = 1\nbase_ms = 1\n"
    again = no(429, retry_after_ms="1")
    async with fleet([again, OK_STREAM], OK_STREAM, own={"a": limited(2)}, rules=rules) as f:
        assert await f.served(stream=True) == "a"
        assert f.counts == [2, 0]
        assert await f.served(stream=True) == "b"


async def test_tokens_are_counted_as_they_were_used(fleet: Any) -> None:
    # an answer takes 18 tokens, whatever its prompt was thought to take
    async with fleet(OK, OK, own={"a": limited(40, "tokens")}) as f:
        assert [await f.served() for _ in range(4)] == ["a", "a", "a", "b"]


async def test_a_limit_of_one_model_is_not_another_s(fleet: Any) -> None:
    own = {"a": 'rate_limits = {"m" = {requests_per_minute = 1}, '
                '"n*" = {requests_per_minute = 2}}'}  # fmt: skip
    async with fleet(OK, own=own) as f:
        statuses = [(await f.ask(model)).status for model in ("a:m", "a:m", "a:n1", "a:n1", "a:x")]
        assert statuses == [200, 429, 200, 200, 200]


@pytest.mark.parametrize(
    "told",
    [
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "60",
         "x-ratelimit-reset-requests": "1m0s"},
        {"x-ratelimit-remaining-tokens": "90", "x-ratelimit-limit-tokens": "100000",
         "x-ratelimit-reset-tokens": "30s"},
        {"anthropic-ratelimit-input-tokens-remaining": "10",
         "anthropic-ratelimit-input-tokens-limit": "50000",
         "anthropic-ratelimit-input-tokens-reset": "2099-01-01T00:00:00Z"},
    ],
    ids=["requests", "tokens", "a date"],
)  # fmt: skip
@pytest.mark.parametrize("streams", [False, True])
async def test_who_is_near_its_vendor_s_limit_goes_later(
    fleet: Any, told: dict[str, str], streams: bool
) -> None:
    first = stream(*CHAT_STREAM, headers=told) if streams else Reply(body=CHAT_ANSWER, headers=told)
    more = {"stream": True} if streams else {}
    async with fleet(first, OK_STREAM if streams else OK) as f:
        assert [await f.served(**more) for _ in range(2)] == ["a", "b"]
        answer = await f.ask(**more)
        assert answer.headers["x-bitrouter-skipped"] == "a/m (near its vendor's limit)"
        f.ups[1].script[:] = [no(500)]
        assert await f.served(**more) == "a"  # it goes later, and is not out


async def test_a_target_is_back_when_its_vendor_s_limit_is_reset(fleet: Any) -> None:
    told = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "60",
            "x-ratelimit-reset-requests": "40ms"}  # fmt: skip
    async with fleet([Reply(body=CHAT_ANSWER, headers=told), OK], OK) as f:
        assert [await f.served() for _ in range(2)] == ["a", "b"]
        async with asyncio.timeout(3):
            while await f.served() != "a":  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.01)


# Hedging.

HEDGE = NO_RETRY + "[upstream]\nhedge_after_ms = 20\n"


@pytest.fixture
def hedged(fleet: Any) -> Callable[..., Any]:
    def start(*scripts: Reply, **more: Any) -> Any:
        return fleet(*scripts, rules=HEDGE, **more)

    return start


async def hung_up(up: FakeProvider) -> None:
    async with asyncio.timeout(1):
        await up.hung_up.wait()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_the_faster_of_two_answers_and_the_other_is_cancelled(
    hedged: Any, protocol: str, streams: bool
) -> None:
    fast = well(protocol, streams=streams)
    more = {"stream": True} if streams else {}
    async with hedged(HANGS, fast, OK, protocol=protocol) as f:
        answer = await f.ask(**more)
        assert (answer.status, answer.headers["x-bitrouter-provider"]) == (200, "b")
        assert answer.headers["x-bitrouter-attempts"] == "2"  # both were asked, one was heard
        if not streams:
            assert answer.json() == SPOKEN[protocol].answer
        await hung_up(f.ups[0])
        assert f.counts == [1, 1, 0]
        [line] = f.gw.lines()
        assert (line["status"], line["target"]) == (200, "b/m")


@pytest.mark.parametrize("streams", [False, True])
async def test_a_first_target_that_answers_late_but_first_cancels_the_second(
    hedged: Any, streams: bool
) -> None:
    late = Reply(body=CHAT_ANSWER, after_s=0.045)
    late_stream = stream(ROLE, None, *CHAT_STREAM[1:], gap_s=0.045)
    async with hedged(late_stream if streams else late, HANGS) as f:
        assert await f.served(stream=streams) == "a"
        await hung_up(f.ups[1])
        assert f.counts == [1, 1]


async def test_of_two_streams_the_caller_sees_one(hedged: Any) -> None:
    late, go_on = asyncio.Event(), asyncio.Event()
    words = [chat_chunk({"content": word}) for word in ("one ", "two ", "three")]
    slow = stream(ROLE, late, chat_chunk({"content": "wrong"}), ending="hang")
    fast = stream(ROLE, words[0], go_on, *words[1:], *CHAT_STREAM[3:])
    async with hedged(slow, fast) as f, f.gw.caller() as caller:
        body = {"model": "m", "messages": HELLO, "stream": True}
        caller.send(request_bytes("POST", CHAT_PATH, body))
        assert (await caller.head())[1]["x-bitrouter-provider"] == "b"
        late.set()
        await hung_up(f.ups[0])  # while the faster one still streams
        go_on.set()
        seen = b"".join([piece async for piece in caller._chunks()])
        assert b"".join(words) in seen and b"wrong" not in seen and seen.endswith(DONE)


async def test_a_hedge_goes_on_down_the_chain(hedged: Any) -> None:
    async with hedged(HANGS, no(500), no(429), OK) as f:
        assert await f.served() == "d"
        await hung_up(f.ups[0])
        assert f.counts == [1, 1, 1, 1]


async def test_a_first_target_that_fails_leaves_the_rest_to_the_hedge(hedged: Any) -> None:
    late = Reply(500, {"error": {"message": "no"}}, after_s=0.04)
    slow = Reply(body=CHAT_ANSWER, after_s=0.05)
    async with hedged(late, slow, OK) as f:
        assert await f.served() == "b"
        assert f.counts == [1, 1, 0]


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (Reply(503, {"error": {"message": "busy"}}, after_s=0.04), no(500), 503),
        (Reply(500, {"error": {"message": "no"}}, after_s=0.04), no(500), 500),
        (Reply(429, {"error": {"message": "no"}}, {"retry-after": "9"}, after_s=0.04),
         no(429, retry_after="5"), 429),
    ],
    ids=["different", "the same", "limits"],
)  # fmt: skip
@pytest.mark.parametrize("streams", [False, True])
async def test_when_both_fail_one_error_names_both(
    hedged: Any, first: Reply, second: Reply, status: int, streams: bool
) -> None:
    async with hedged(first, second) as f:
        answer = await f.ask(stream=streams)
        assert answer.status == status
        said = answer.json()["error"]["message"]
        assert "all 2 attempts failed" in said
        assert answer.headers["x-bitrouter-attempts"] == "2"
        assert f.gw.lines()[-1]["attempts"] == 2
        assert f"a answered {first.status}" in said and f"b answered {second.status}" in said
        assert answer.headers.get("retry-after") == ("5" if status == 429 else None)
        assert len(f.gw.lines("attempt_failed")) == 2


async def test_when_both_are_too_slow_it_is_a_timeout(hedged: Any) -> None:
    tight = "timeouts = {total_s = 0.05}"
    async with hedged(HANGS, HANGS, own={"a": tight, "b": tight}) as f:
        answer = await f.ask()
        assert answer.status == 504
        assert {"a sent no answer", "b sent no answer"} <= {
            said.partition(" within")[0]
            for said in answer.json()["error"]["message"].partition("failed: ")[2].split("; ")
        }


@pytest.mark.parametrize("streams", [False, True])
async def test_a_caller_who_hangs_up_cancels_both_calls(hedged: Any, streams: bool) -> None:
    slow = stream(ROLE, ending="hang") if streams else HANGS
    async with hedged(slow, slow) as f:
        async with f.gw.caller() as caller:
            body = {"model": "m", "messages": HELLO, "stream": streams}
            caller.send(request_bytes("POST", CHAT_PATH, body))
            await until(lambda: f.counts == [1, 1])
        for up in f.ups:
            await hung_up(up)
        await until(f.gw.lines)
        assert f.gw.lines()[0]["status"] == 499
        assert not f.gw.app.health.cooling(0.0)


async def test_who_is_cancelled_for_being_slower_is_not_blamed(hedged: Any) -> None:
    async with hedged(HANGS, OK) as f:
        for _ in range(6):
            assert await f.served() == "b"
        assert f.gw.app.health.cooling(0.0) == {} and f.counts == [6, 6]


async def test_who_only_loses_for_as_long_as_an_answer_may_take_is_out_of_order(
    hedged: Any,
) -> None:
    soon = "timeouts = {first_token_s = 0.05}"
    async with hedged(HANGS, OK, own={"a": soon}) as f:
        health = f.gw.app.health
        while not health.cooling(0.0):
            assert await f.served() == "b"
        asked = f.counts[0]
        assert 3 <= asked < 30  # one loss says nothing, and some thrice as long says enough
        assert await f.served() == "b" and f.counts[0] == asked
    async with hedged([HANGS, OK] * 6, OK, own={"a": soon}) as f:
        for _ in range(12):
            await f.served()
        assert not f.gw.app.health.cooling(0.0)


async def test_who_hangs_is_known_to_be_slow_after_a_lost_race(hedged: Any) -> None:
    async with hedged(HANGS, OK) as f:
        for _ in range(3):
            await f.ask(provider={"sort": "latency"})
        assert [len(up.seen) for up in f.ups] == [1, 3]


async def test_a_target_that_answers_in_time_is_not_hedged(fleet: Any) -> None:
    async with fleet(OK, OK, rules=NO_RETRY + "[upstream]\nhedge_after_ms = 5000\n") as f:
        assert [await f.served() for _ in range(3)] == ["a"] * 3
        assert f.counts == [3, 0]


async def test_a_hedge_that_fails_leaves_the_first_call_alone(hedged: Any) -> None:
    async with hedged(Reply(body=CHAT_ANSWER, after_s=0.04), no(500)) as f:
        assert await f.served() == "a"
        assert f.counts == [1, 1]


async def test_the_built_in_model_answers_only_if_nobody_else_has(hedged: Any) -> None:
    async with hedged(Reply(body=CHAT_ANSWER, after_s=0.04), OK) as f:
        assert await f.served("", models=["a:m", "echo/echo"]) == "echo"
        assert await f.served("b:m") == "b"


async def test_a_hedge_and_a_pause_ask_nobody_twice(fleet: Any) -> None:
    late = Reply(body=CHAT_ANSWER, after_s=0.05)
    rules = NO_RETRY + "[upstream]\nhedge_after_ms = 10\nfallback_backoff_ms = [25]\n"
    async with fleet(no(500), late, OK, rules=rules) as f:
        assert await f.served() == "b"
        assert f.counts == [1, 1, 0]


async def test_one_target_alone_is_not_hedged(hedged: Any) -> None:
    async with hedged(Reply(body=CHAT_ANSWER, after_s=0.04), OK) as f:
        assert await f.served("a:m") == "a"
        assert f.counts == [1, 0]


async def test_a_hedge_keeps_to_the_limits(hedged: Any) -> None:
    late = Reply(body=CHAT_ANSWER, after_s=0.04)
    async with hedged(late, OK, own={"b": limited(1)}) as f:
        assert [await f.served() for _ in range(3)] == ["b", "a", "a"]
        assert f.counts == [3, 1]


async def test_hedges_under_load_answer_everyone(hedged: Any) -> None:
    async with hedged(HANGS, OK, OK) as f:
        served = await asyncio.gather(*(f.served() for _ in range(60)))
        assert set(served) <= {"b", "c"}
        await until(lambda: len(f.gw.lines()) == 60)
        assert f.gw.listener.connections <= 60


async def test_a_fault_of_the_request_is_told_at_once_though_a_hedge_runs(hedged: Any) -> None:
    late = Reply(400, {"error": {"message": "it is you"}}, after_s=0.04)
    async with hedged(late, HANGS) as f:
        async with asyncio.timeout(2):
            answer = await f.ask()
        assert answer.status == 400 and b"it is you" in answer.body
        await hung_up(f.ups[1])


# Pauses.


async def test_pauses_before_fallbacks_grow_as_they_are_listed(fleet: Any) -> None:
    rules = NO_RETRY + "[upstream]\nfallback_backoff_ms = [1, 40]\n"
    async with fleet(no(500), no(500), no(500), OK, rules=rules) as f:
        loop = asyncio.get_running_loop()
        before = loop.time()
        assert await f.served() == "d"
        assert loop.time() - before >= 0.081  # 1, 40 and 40 again


# Keys that come with the request.

FROM_CALLER = 'api_key = "request:x-team"'


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_missing_key_is_a_401_in_the_caller_s_protocol(fleet: Any, protocol: str) -> None:
    async with fleet(well(protocol), own={"a": FROM_CALLER}, protocol=protocol) as f:
        answer = await f.ask()
        assert answer.status == 401 and f.counts == [0]
        error = answer.json()["error"]
        assert "x-team" in error["message"]
        told = {"messages": error.get("type"), "generate_content": error.get("status")}
        assert told.get(protocol, error.get("code")) in (
            "authentication_error", "UNAUTHENTICATED", "provider_key_missing",
        )  # fmt: skip


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_key_of_the_caller_travels_as_the_provider_wants_it(
    fleet: Any, protocol: str, streams: bool
) -> None:
    places = {"messages": ("x-api-key", ""), "generate_content": ("x-goog-api-key", "")}
    name, scheme = places.get(protocol, ("authorization", "Bearer "))
    own = {"a": f'{FROM_CALLER}\nauth = "native"'}
    more = {"stream": True} if streams else {}
    async with fleet(well(protocol, streams=streams), own=own, protocol=protocol) as f:
        assert await f.served(headers={"x_team": "sk-mine"}, **more) == "a"
        assert f.seen.headers[name] == f"{scheme}sk-mine"
        found = [name for name, value in f.seen.headers.items() if "sk-mine" in value]
        assert found == [name]


@pytest.mark.parametrize("name", ["openai-team", "x-goog-team", "x-team", "x-session-id"])
async def test_a_key_of_the_caller_goes_to_its_provider_alone(fleet: Any, name: str) -> None:
    own = {"a": f'api_key = "request:{name}"', "b": 'api_key = "sk-of-b"'}
    async with fleet(no(500), OK, own=own) as f:
        answer = await f.ask(headers={name: "sk-mine", "x_bitrouter_explain": "1"})
        assert answer.headers["x-bitrouter-provider"] == "b"
        first, second = f.ups[0].seen[0], f.ups[1].seen[0]
        assert first.headers["authorization"] == "Bearer sk-mine" and name not in first.headers
        assert "sk-mine" not in str(second.headers)
        told = json.loads(answer.headers["x-bitrouter-explain"])["first"]["headers"]
        assert "authorization: Bearer [redacted]" in told
        assert "sk-mine" not in str(answer.headers) + f.gw.written.getvalue()


async def test_without_the_caller_s_key_the_next_target_answers(fleet: Any) -> None:
    async with fleet(OK, OK, own={"a": FROM_CALLER}) as f:
        assert await f.served() == "b"
        assert f.counts == [0, 1]


@pytest.mark.parametrize("refusal", [no(401), no(403), no(402)], ids=["401", "403", "402"])
async def test_one_caller_s_bad_key_cools_nobody(fleet: Any, refusal: Reply) -> None:
    async with fleet([refusal] * 8 + [OK], OK, own={"a": FROM_CALLER}) as f:
        for _ in range(8):
            assert await f.served(headers={"x_team": "sk-bad"}) == "b"
        assert await f.served(headers={"x_team": "sk-good"}) == "a"
        assert f.gw.app.health.cooling(0.0) == {}


async def test_one_caller_s_limits_are_not_another_s(fleet: Any) -> None:
    near = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "60",
            "x-ratelimit-reset-requests": "1m0s"}  # fmt: skip
    script = [no(429, retry_after="3600"), Reply(body=CHAT_ANSWER, headers=near), OK]
    async with fleet(script, OK, own={"a": FROM_CALLER}) as f:
        served = [await f.served(headers={"x_team": f"sk-{n}"}) for n in range(3)]
        assert served == ["b", "a", "a"]


async def test_a_key_that_is_no_header_text_is_as_good_as_none(fleet: Any) -> None:
    async with fleet(OK, own={"a": FROM_CALLER}) as f:
        answer = await f.ask(headers={"x_team": "sk-\x80\xff"})
        assert answer.status in (401, 400) and f.counts == [0]


# What a request is told of the choice.

EXPLAIN = {"x_bitrouter_explain": "1"}
SECRETS = {
    "a": 'api_key = "sk-secret-a"\nextra_headers = [{name = "x-org", value = "org-secret"}]',
    "b": 'accounts = [{label = "one", api_key = "sk-secret-b"}]\ntags = ["eu"]',
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_live_request_is_told_what_an_explanation_says(
    fleet: Any, protocol: str, streams: bool
) -> None:
    toml = '[presets.p]\nmodel = "m"\nsystem_prompt = "Be terse."\nrouting = {ignore = ["c"]}\n'
    answer_of = well(protocol, streams=streams)
    more = {"stream": True} if streams else {}
    fleet_of = fleet(answer_of, answer_of, OK, toml=toml, own=SECRETS, protocol=protocol)
    async with fleet_of as f:
        answer = await f.ask("@p", headers=EXPLAIN, **more)
        assert answer.status == 200
        told = json.loads(answer.headers["x-bitrouter-explain"])
        google = protocol == "generate_content"
        body = {} if google else {"model": "@p", **more}
        raw = json.dumps({**body, **said_in(protocol, HELLO)}).encode()
        op = bitrouter.GENERATE[bitrouter.ApiProtocol(protocol)]
        if google and streams:
            op = bitrouter.GEMINI_VERBS["streamGenerateContent"]
        headers = {"content-type": "application/json", "x-bitrouter-explain": "1"}
        call = bitrouter.call_of(f.gw.app, op, "@p" if google else "", headers, raw)
        route = f.gw.app.router.resolve(call.model, call.op, call.wishes)
        bitrouter.pick(f.gw.app, call, route)
        assert told == json.loads(json.dumps(call.explained))
        seen = f.ups[0].seen[0]
        assert told["first"]["url"] == f.ups[0].base + seen.path
        assert told["first"]["body"] == seen.json()
        named = {line.partition(":")[0] for line in told["first"]["headers"]}
        assert named == seen.headers.keys() - {"content-length", "x-bitrouter-request-id"}
        assert [(step["provider"], step["position"]) for step in told["chain"]] == [
            ("a", 1), ("b", 2)]  # fmt: skip
        assert told["left_out"] == ["c: in `ignore`"]
        assert "secret" not in str(answer.headers)


async def test_an_explanation_says_what_a_translation_loses(fleet: Any) -> None:
    async with fleet(well("messages"), theirs=["messages"]) as f:
        answer = await f.ask(headers=EXPLAIN, logit_bias={"5": 1})
        told = json.loads(answer.headers["x-bitrouter-explain"])
        assert [loss["field"] for loss in told["first"]["losses"]] == ["logit_bias"]
        assert "logit_bias" in answer.headers["x-bitrouter-warnings"]
        assert told["first"]["body"] == f.seen.json()


async def test_an_explanation_comes_with_a_failure_too(fleet: Any) -> None:
    async with fleet(no(500), no(400), own=SECRETS) as f:
        answer = await f.ask(headers=EXPLAIN)
        told = json.loads(answer.headers["x-bitrouter-explain"])
        assert answer.status == 400 and len(told["chain"]) == 2


async def test_an_explanation_knows_who_rests_and_whose_cache_is_warm(fleet: Any) -> None:
    rules = NO_RETRY + "[upstream.breaker]\nfailures = 1\n"
    async with fleet(no(500), CACHED, CACHED, rules=rules) as f:
        await f.served(turns=GOING_ON)
        answer = await f.ask(turns=GOING_ON, headers=EXPLAIN)
        told = json.loads(answer.headers["x-bitrouter-explain"])
        assert [step["provider"] for step in told["chain"]] == ["b", "c", "a"]
        assert "prompt cache is warm" in told["chain"][0]["reason"]
        assert "cools down for" in told["chain"][2]["reason"]
        assert answer.headers["x-bitrouter-skipped"].startswith("a/m (cooling down for ")


@pytest.mark.parametrize("chars", [100, 9_000, 200_000])
async def test_an_explanation_is_bounded(fleet: Any, chars: int) -> None:
    async with fleet(OK, OK) as f:
        turns = [{"role": "user", "content": "x" * chars}]
        answer = await f.ask(turns=turns, headers=EXPLAIN)
        header = answer.headers["x-bitrouter-explain"]
        told = json.loads(header)
        assert len(header) <= 8192 and len(told["chain"]) == 2
        assert (told["first"]["body"] is None) is (chars > 8000)
        assert told["first"].get("body_omitted", False) is (chars > 8000)


async def test_an_explanation_is_bounded_as_it_is_written(fleet: Any) -> None:
    names = [f"a:{n}" + "\u00e9" * 500 for n in range(8)]
    async with fleet(OK) as f:
        for more in ({"turns": [{"role": "user", "content": "\u2603" * 1900}]}, {"models": names}):
            answer = await f.ask(headers=EXPLAIN, **more)
            header = answer.headers["x-bitrouter-explain"]
            assert len(header) <= 8192 and json.loads(header)


async def test_an_explanation_comes_with_a_refusal_of_our_own_too(fleet: Any) -> None:
    async with fleet(OK, own={"a": limited(1)}) as f:
        await f.ask()
        answer = await f.ask(headers=EXPLAIN)
        assert answer.status == 429
        assert "over its limit" in answer.headers["x-bitrouter-explain"]
        assert "over its limit" in answer.headers["x-bitrouter-skipped"]


async def test_who_did_not_ask_is_told_nothing(fleet: Any) -> None:
    async with fleet(OK, OK) as f:
        for headers in ({}, {"x_bitrouter_explain": "0"}):
            answer = await f.ask(headers=headers)
            assert "x-bitrouter-explain" not in answer.headers
            assert "x-bitrouter-skipped" not in answer.headers
        assert "x-bitrouter-explain" not in str([up.seen for up in f.ups])


async def test_what_was_skipped_is_bounded_and_clean(fleet: Any) -> None:
    rules = NO_RETRY + "[upstream.breaker]\nfailures = 1\n"
    async with fleet(no(500), OK, rules=rules) as f:
        names = [f"a:{n}{'x' * 480}\u00e9" for n in range(7)] + ["b:m"]
        assert (await f.ask("", models=names)).status == 200
        answer = await f.ask("", models=names)
        assert answer.status == 200
        skipped = answer.headers["x-bitrouter-skipped"]
        assert len(skipped) <= 1100 and skipped.isascii()


@pytest.mark.parametrize(
    "name", ["\x1b[1ma:m\x1b[0m", " a:m\r\n", "\x1b[38;5;1ma:\x1b[0mm", "\x07a:m\x9f"]
)
@pytest.mark.parametrize("where", ["model", "models", "path"])
async def test_names_from_a_terminal_are_cleaned(fleet: Any, name: str, where: str) -> None:
    protocol = "generate_content" if where == "path" else "chat_completions"
    async with fleet(well(protocol), protocol=protocol) as f:
        if where == "models":
            answer = await f.ask("", models=[name])
        else:
            answer = await f.ask(quote(name) if where == "path" else name)
        assert answer.status == 200, answer.body
        assert answer.headers["x-bitrouter-model"] == "m"
        assert "\x1b" not in f.gw.written.getvalue() and "u001b" not in f.gw.written.getvalue()


@pytest.mark.parametrize(
    ("model", "more"),
    [("a:..%2fx", {}), ("a:..", {}), ("m", {"models": ["m", "a:m/../x"]}),
     ("m", {"models": ["m", "a:.."]})],
)  # fmt: skip
async def test_a_name_of_a_chain_leads_nowhere_else(
    fleet: Any, model: str, more: dict[str, Any]
) -> None:
    google = "generate_content"
    async with fleet(well(google), protocol=google) as f:
        answer = await f.ask(model, **more)
        assert (answer.status, f.counts) == (400, [0])


@pytest.mark.parametrize(
    ("model", "models"),
    [
        ("a:..", []),
        ("a:../x", []),
        ("@p/a:..", []),
        ("", ["m", "a:m/../../x"]),
        ("", ["m", "a:.."]),
        ("", ["m", ""]),
        ("", ["m", "x" * 600]),
    ],
)
async def test_no_name_is_a_way_out_of_a_path(fleet: Any, model: str, models: list[str]) -> None:
    async with fleet(OK, toml='[presets.p]\nmodel = "m"\n') as f:
        answer = await f.ask(model, **({"models": models} if models else {}))
        field = "models[1]" if models else "model"
        assert (answer.status, answer.json()["error"]["param"]) == (400, field)
        assert f.counts == [0]


# A configuration that changes while requests run.


def configured(f: Fleet, toml: str, environ: dict[str, str] | None = None) -> bitrouter.Config:
    loaded = bitrouter.parse_config(toml, environ or {})
    assert loaded.problems == []
    loaded.config.server.listen = f.gw.app.config.server.listen
    return loaded.config


@asynccontextmanager
async def paced(provider: Any) -> AsyncIterator[tuple[FakeProvider, asyncio.Event]]:
    """A provider whose streams go on when they are told to."""
    go_on = asyncio.Event()
    async with provider(stream(*CHAT_STREAM[:2], go_on, *CHAT_STREAM[2:])) as up:
        yield up, go_on


async def test_a_stream_finishes_by_the_configuration_it_began_with(
    fleet: Any, provider: Any
) -> None:
    table = '[providers.slow]\napi_base = "{}/v1"\nmodels = [{{id = "s"}}]\n'
    async with paced(provider) as (up, go_on), fleet(OK, toml=table.format(up.base)) as f:
        async with f.gw.caller() as caller:
            body = {"model": "s", "messages": HELLO, "stream": True}
            caller.send(request_bytes("POST", CHAT_PATH, body))
            status, headers = await caller.head()
            assert (status, headers["x-bitrouter-provider"]) == (200, "slow")
            f.gw.app.configure(configured(f, NO_RETRY + tables(f.ups, [f.protocol])))
            assert (await f.ask("s")).status == 404
            assert await f.served() == "a"
            go_on.set()
            text = b"".join([piece async for piece in caller._chunks()])
            assert text.endswith(DONE) and b"lo!" in text
        await until(lambda: len(f.gw.lines()) == 3)
        assert {line["target"]: line["status"] for line in f.gw.lines() if "target" in line} == {
            "a/m": 200, "slow/s": 200}  # fmt: skip


async def test_a_request_falls_over_by_the_configuration_it_began_with(fleet: Any) -> None:
    late = Reply(500, {"error": {"message": "no"}}, after_s=0.04)
    async with fleet(late, OK) as f:
        asking = asyncio.gather(f.ask())
        await until(lambda: f.counts == [1, 0])
        f.gw.app.configure(configured(f, NO_RETRY + tables(f.ups[:1], [f.protocol])))
        [answer] = await asking
        assert (answer.status, answer.headers["x-bitrouter-provider"]) == (200, "b")
        assert (await f.ask()).status == 500


async def test_health_measures_limits_and_conversations_outlive_a_configuration(
    fleet: Any,
) -> None:
    rules = NO_RETRY + "[upstream.breaker]\nfailures = 1\n"
    own = {"b": limited(3)}
    async with fleet([no(500), CACHED], CACHED, CACHED, own=own, rules=rules, toml=TRIAL) as f:
        drawn = [await f.served("@trial", turns=[{"role": "user", "content": str(n)}],
                                provider={"ignore": ["a", "b"]}) for n in range(2)]  # fmt: skip
        assert drawn == ["c", "c"]
        assert await f.served(turns=GOING_ON) == "b"
        before = f.gw.app.health.meter.all(0.0)
        toml = rules + tables(f.ups, [f.protocol] * 3, own) + TRIAL.replace("weight", "weight ")
        f.gw.app.configure(configured(f, toml))
        assert f.gw.app.health.meter.all(0.0).keys() == before.keys()
        assert list(f.gw.app.health.cooling(0.0)) == ["a/m"]
        served = [await f.served(turns=GOING_ON) for _ in range(3)]
        assert served == ["b", "b", "c"]  # b has had its three requests, and a rests


async def test_a_candidate_that_was_drawn_outlives_a_configuration(fleet: Any) -> None:
    async with fleet(OK, OK, OK, toml=TRIAL) as f:
        begun = [[{"role": "user", "content": f"Chat {n}"}] for n in range(10)]
        f.gw.app.random.seed(3)
        first = [await f.served("@trial", turns=turns) for turns in begun]
        f.gw.app.configure(configured(f, NO_RETRY + tables(f.ups, [f.protocol] * 3) + TRIAL))
        later = [await f.served("@trial", turns=[*turns, *GOING_ON[1:]]) for turns in begun]
        assert later == first and len(set(first)) > 1


async def test_a_new_key_is_tried_at_once_and_only_where_it_is_new(fleet: Any) -> None:
    own = {"a": 'api_key = "old"', "b": 'api_key = "same"'}
    async with fleet([no(401), OK], no(401), OK, own=own) as f:
        assert await f.served() == "c"
        own["a"] = 'api_key = "new"'
        f.gw.app.configure(configured(f, NO_RETRY + tables(f.ups, [f.protocol] * 3, own)))
        assert list(f.gw.app.health.cooling(0.0)) == ["b/m"]
        assert await f.served() == "a"
        assert f.ups[0].seen[-1].headers["authorization"] == "Bearer new"


async def test_what_was_found_is_not_used_once_it_is_switched_off(fleet: Any) -> None:
    async with fleet(OK) as f:
        app, facts = f.gw.app, bitrouter.PROVIDERS["ollama"]
        base = dict.fromkeys(facts.bases, f"{f.ups[0].base}/v1")
        account = bitrouter.Account("", bitrouter.Secret(""), base)
        models = (bitrouter.DeclaredModel("found"),)
        provider = bitrouter.ActiveProvider(facts, (account,), "found", models=models, found=True)
        app.local = {"ollama": provider}
        app.reroute()
        assert await f.served("found") == "ollama"
        for toml in ("[providers.ollama]\nactive = false\n", "inherit_defaults = false\n"):
            app.configure(configured(f, toml))
            assert (await f.ask("found")).status in (402, 404)


async def test_configurations_that_change_under_load_fail_nobody(fleet: Any) -> None:
    async with fleet(OK, OK, OK) as f:

        async def change() -> None:
            for n in range(20):
                some = tables(f.ups[: 1 + n % 3], [f.protocol] * 3)
                f.gw.app.configure(configured(f, NO_RETRY + some))
                await asyncio.sleep(0.002)

        changing = asyncio.gather(change())
        statuses = [one.status for one in await asyncio.gather(*(f.ask() for _ in range(100)))]
        await changing
        assert statuses == [200] * 100


async def test_callers_keys_change_with_the_configuration(fleet: Any) -> None:
    door = '[server]\nauth = "required"\n[keys.{0}]\nkey = "sk-{0}"\n'
    async with fleet(OK, toml=door.format("one")) as f:
        assert (await f.ask(headers={"x_api_key": "sk-one"})).status == 200
        new = NO_RETRY + tables(f.ups, [f.protocol]) + door.format("two")
        f.gw.app.configure(configured(f, new))
        assert (await f.ask(headers={"x_api_key": "sk-one"})).status == 401
        assert (await f.ask(headers={"x_api_key": "sk-two"})).status == 200


# Upstreams that die and come back.


class Mortal:
    """A provider that can be killed, with all its connections, and revived at its port."""

    def __init__(self) -> None:
        self.port = 0
        self.served = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def revive(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, reuse_address=True
        )
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def kill(self) -> None:
        if self._server:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                body = await reader.readexactly(size)
                await asyncio.sleep(0.001 * (self.served % 5))
                self.served += 1
                writer.write(self._answer(streams=b'"stream":true' in body.replace(b" ", b"")))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, *, streams: bool) -> bytes:
        body = b"".join(CHAT_STREAM) if streams else json.dumps(CHAT_ANSWER).encode()
        kind = b"text/event-stream" if streams else b"application/json"
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
        return head % (kind, len(body)) + body


@pytest.mark.parametrize("hedge", ["", "[upstream]\nhedge_after_ms = 3\n"])
async def test_no_caller_sees_a_failure_while_one_target_is_well(gateway: Any, hedge: str) -> None:
    ups = [Mortal() for _ in range(3)]
    for up in ups:
        await up.revive()
    toml = NO_RETRY + hedge + "[upstream.breaker]\ncooldown_s = 1\n"
    for name, up in zip("abc", ups, strict=True):
        toml += f'[providers.{name}]\napi_base = "http://127.0.0.1:{up.port}/v1"\n'
        toml += 'models = [{id = "m"}]\n'
    statuses = Counter[int]()
    broken = 0

    async def ask_many(gw: Any, n: int) -> None:
        nonlocal broken
        async with gw.caller() as caller:
            for i in range(7):
                streams = (n + i) % 2 == 0
                body = {"model": "m", "messages": HELLO, "stream": streams}
                answer = await caller.post(CHAT_PATH, body)
                statuses[answer.status] += 1
                broken += streams and answer.events()[-1] != "[DONE]"

    async def kill_and_revive(enough: asyncio.Event, *doomed: Mortal) -> None:
        for up in itertools.cycle(doomed):
            if enough.is_set():
                return
            await up.kill()
            await asyncio.sleep(0.01)
            await up.revive()
            await asyncio.sleep(0.002)

    async with gateway(toml) as gw:
        for well_one in ups:
            enough = asyncio.Event()
            doomed = [up for up in ups if up is not well_one]
            chaos = asyncio.gather(kill_and_revive(enough, *doomed))
            await asyncio.gather(*(ask_many(gw, n) for n in range(12)))
            enough.set()
            await chaos
    for up in ups:
        await up.kill()
    await asyncio.sleep(0.01)
    assert (statuses, broken) == ({200: 252}, 0)
    assert all(up.served for up in ups)


# A server of its own.

ROOT = Path(bitrouter.__file__).parent
# The installed command, in a greater hurry: it looks at its files and its workers more often.
HURRIED = """
import sys, bitrouter
bitrouter._WATCH_EVERY_S, bitrouter._RESTART_S = 0.05, 0.2
sys.exit(bitrouter.main())
"""
COMMAND = (sys.executable, "-c", HURRIED)


class Server:
    """The installed command with a configuration, in a home of its own."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.home = home
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}
        self.process: asyncio.subprocess.Process | None = None
        self.lines: list[dict[str, Any]] = []

    def write(self, toml: str, listen: str = "") -> None:
        listen = listen or f"127.0.0.1:{self.port}"
        new = self.home / "new.toml"
        new.write_text(f'[server]\nlisten = "{listen}"\n{toml}')
        new.replace(self.home / "bitrouter.toml")

    async def start(self, *args: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *COMMAND, *args, cwd=self.home, env=self.environ, stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        await self.said("listening")

    async def said(self, event: str) -> dict[str, Any]:
        """The next line of a kind in the log."""
        assert self.process and self.process.stderr
        while line := await self.process.stderr.readline():
            facts: dict[str, Any] = json.loads(line)
            self.lines.append(facts)
            if facts["event"].partition(" ")[0] == event:
                return facts
        raise AssertionError(f"the server has gone: {self.lines[-3:]}")

    async def run(self, *args: str, **environ: str) -> tuple[int, Any, str]:
        """A command in the same home: its status, its JSON and its words."""
        done = await asyncio.create_subprocess_exec(
            *COMMAND, *args, cwd=self.home, env={**self.environ, **environ},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await done.communicate()
        return done.returncode or 0, json.loads(out) if out else None, err.decode()

    async def served(self, model: str, **more: Any) -> Answer:
        async with Caller(self.port) as caller:
            return await caller.post(CHAT_PATH, {"model": model, "messages": HELLO, **more})

    def control(self, worker: int = 0) -> Path:
        name = f"{self.port}.{worker}.sock" if worker else f"{self.port}.sock"
        return self.home / ".bitrouter" / name

    async def asked(self, method: str, path: str, worker: int = 0, body: Any = None) -> Answer:
        """What the control socket answers."""
        caller = Caller(0)
        opened = await asyncio.open_unix_connection(str(self.control(worker)))
        caller.reader, caller.writer = opened
        try:
            given = {} if method == "POST" and body is None else body
            caller.send(request_bytes(method, path, given))
            return await caller.answer()
        finally:
            caller.writer.transport.abort()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        _, rest = await self.process.communicate()
        self.lines += [json.loads(line) for line in rest.splitlines()]
        return self.process.returncode or 0


@pytest.fixture
def server(tmp_path: Path) -> Callable[[], Any]:
    @asynccontextmanager
    async def start() -> AsyncIterator[Server]:
        one = Server(tmp_path)
        try:
            yield one
        finally:
            if one.process and one.process.returncode is None:
                os.killpg(one.process.pid, signal.SIGKILL)  # its workers, too
                await one.process.communicate()

    return start


def one_provider(base: str, key: str = "") -> str:
    key = f'api_key = "{key}"\n' if key else ""
    return f'[providers.up]\napi_base = "{base}"\n{key}models = [{{id = "m"}}]\n'


async def test_a_server_takes_up_what_changes_while_a_stream_runs(
    server: Any, provider: Any
) -> None:
    async with provider(OK) as up, paced(provider) as (slow, go_on), server() as s:
        table = f'[providers.slow]\napi_base = "{slow.base}/v1"\nmodels = [{{id = "s"}}]\n'
        (s.home / "key.txt").write_text("sk-file-one\n")
        mine = one_provider(f"{up.base}/v1", "file:key.txt")
        s.write(mine + table)
        await s.start()
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (s.control(), s.control().parent)]
        assert modes == [0o600, 0o700]
        async with Caller(s.port) as caller:
            body = {"model": "s", "messages": HELLO, "stream": True}
            caller.send(request_bytes("POST", CHAT_PATH, body))
            assert (await caller.head())[0] == 200
            assert (await s.served("m")).status == 200

            # the key's file alone
            (s.home / "key.txt").write_text("sk-file-two\n")
            await s.said("reloaded")
            assert (await s.served("m")).status == 200
            keys = [seen.headers["authorization"] for seen in up.seen]
            assert keys == ["Bearer sk-file-one", "Bearer sk-file-two"]

            # a file that is broken, by its change, by signal and by command
            s.write(mine + "[presets.p]\nmodle = 3\n")
            assert "did you mean model?" in (await s.said("reload_failed"))["error"]
            assert s.process
            s.process.send_signal(signal.SIGHUP)
            assert "presets.p.modle" in (await s.said("reload_failed"))["error"]
            status, told, _ = await s.run("reload")
            assert status == 1 and not told["reloaded"] and "modle" in told["errors"][0]
            assert (await s.served("m")).status == 200

            # a good one, without the provider whose stream runs
            s.write(mine + '[presets.p]\nmodel = "m"\n')
            s.process.send_signal(signal.SIGHUP)
            await s.said("reloaded")
            assert (await s.served("@p")).status == 200
            assert (await s.served("s")).status == 404

            # and the stream, that has seen none of it
            go_on.set()
            assert b"".join([piece async for piece in caller._chunks()]).endswith(DONE)
        facts = (await s.asked("GET", "/status")).json()
        assert facts["reloads"] >= 2 and facts["active"].keys() == {"up"}
        assert facts["targets"]["up/m"]["answers"] == 4
        assert await s.stop() == 0
        assert not s.control().exists()
        assert "sk-file" not in json.dumps([facts, s.lines])
        assert [line["event"] for line in s.lines][-2:] == ["draining", "stopped"]


async def test_keys_go_along_with_a_reload_that_is_asked_for(server: Any, provider: Any) -> None:
    async with provider(OK) as up, server() as s:
        s.environ["TEAM_KEY"] = "sk-of-the-shell-one"
        s.write(one_provider(f"{up.base}/v1", "${TEAM_KEY}"))
        await s.start()
        await s.served("m")
        status, told, _ = await s.run("reload", TEAM_KEY="sk-of-the-shell-two")
        assert (status, told) == (0, {"reloaded": True, "warnings": []})
        await s.served("m")
        await s.said("reloaded")
        # and they hold when something else is read anew later
        s.write(one_provider(f"{up.base}/v1", "${TEAM_KEY}") + '[presets.p]\nmodel = "m"\n')
        assert s.process
        s.process.send_signal(signal.SIGHUP)
        await s.said("reloaded")
        await s.served("@p")
        keys = [seen.headers["authorization"][-3:] for seen in up.seen]
        assert keys == ["one", "two", "two"]
        told = (await s.asked("GET", "/status")).json()
        assert told["active"]["up"]["accounts"] == 1
        assert "of-the-shell" not in json.dumps([told, s.lines])
        s.write("", listen=f"127.0.0.1:{s.port + 1}")
        s.process.send_signal(signal.SIGHUP)
        assert "next start" in (await s.said("configuration"))["message"]
        assert (await s.served("m")).status == 404  # all but the address has changed
        assert await s.stop(signal.SIGINT) == 0


async def test_a_reload_takes_no_keys_that_nobody_named(server: Any, provider: Any) -> None:
    async with provider(OK) as up, server() as s:
        s.environ["GROQ_API_KEY"] = "sk-of-the-service"
        text = one_provider(f"{up.base}/v1", "${TEAM_KEY:-none}")
        s.write(text + "[providers.mistral]\nparams = {seed = 1}\n")
        await s.start()
        more = {"OPENAI_API_KEY": "sk-of-the-admin", "MISTRAL_API_KEY": "sk-for-the-team"}
        more |= {"GROQ_API_KEY": "sk-rotated-for-all", "TEAM_KEY": "sk-team-two", "PATH2": "x"}
        wanted = (await s.asked("GET", "/variables")).json()["names"]
        assert {"GROQ_API_KEY", "MISTRAL_API_KEY", "TEAM_KEY", "GROQ_BASE_URL"} <= {*wanted}
        assert not {"OPENAI_API_KEY", "PATH2"} & {*wanted}
        status, told, _ = await s.run("reload", **more)
        assert (status, told["reloaded"]) == (0, True)
        active = (await s.asked("GET", "/status")).json()["active"]
        assert set(active) == {"groq", "mistral", "up"}
        body = json.dumps(more).encode()
        assert (await s.asked("POST", "/reload", body=body)).json()["reloaded"] is True
        assert "openai" not in (await s.asked("GET", "/status")).json()["active"]


async def test_commands_without_a_server_say_so(server: Any) -> None:
    async with server() as s:
        s.write("")
        for command in asyncio.as_completed((s.run("status"), s.run("reload"))):
            status, told, words = await command
            assert status == 1
            assert "bitrouter serve" in json.dumps(told) + words


async def test_a_reload_says_what_the_next_start_changes_and_only_that(server: Any) -> None:
    async with server() as s:
        s.write("", listen="127.0.0.1:1")
        await s.start("--port", str(s.port))
        said = (await s.asked("POST", "/reload")).json()
        assert (said["reloaded"], said["warnings"]) == (True, [])
        s.write('log_format = "text"', listen="127.0.0.1:2")
        said = (await s.asked("POST", "/reload")).json()
        assert said["warnings"] == ["server.log_format changes with the next start"]
        assert await s.stop() == 0


async def test_a_socket_that_a_dead_server_left_is_taken_over(server: Any) -> None:
    async with server() as s:
        s.write("")
        await s.start("--port", str(s.port))
        assert await s.stop(signal.SIGKILL) == -9
        assert s.control().exists()
        await s.start("--port", str(s.port))
        assert (await s.asked("GET", "/status")).json()["status"] == "ok"
        assert (await s.asked("GET", "/reload")).status == 404
        assert (await s.asked("POST", "/reload", body=b"{")).status == 400
        assert (await s.asked("POST", "/reload")).json()["reloaded"] is True
        assert await s.stop() == 0 and not s.control().exists()


def lives(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def test_two_workers_serve_and_one_that_is_killed_is_replaced(
    server: Any, provider: Any
) -> None:
    async with provider(OK) as up, server() as s:
        s.write(f"workers = 2\n{one_provider(f'{up.base}/v1')}")
        await s.start()
        await until(s.control(2).exists)
        facts = [(await s.asked("GET", "/status", n)).json() for n in (1, 2)]
        pids = {one["pid"] for one in facts}
        assert len(pids) == 2 and s.process and s.process.pid not in pids
        for _ in range(12):
            assert (await s.served("m")).status == 200
        status, told, _ = await s.run("status")
        assert status == 0 and {one["pid"] for one in told["workers"]} == pids
        assert sum(one["targets"].get("up/m", {}).get("answers", 0)
                   for one in told["workers"]) == 12  # fmt: skip
        while (await s.asked("GET", "/status", 2)).json()["uptime_s"] < 0.3:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        os.kill(facts[1]["pid"], signal.SIGKILL)
        await s.said("worker_died")
        new = 0
        while new in (0, facts[1]["pid"]):
            with suppress(OSError, asyncio.IncompleteReadError):
                new = (await s.asked("GET", "/status", 2)).json()["pid"]
            await asyncio.sleep(0.01)
        for _ in range(12):
            assert (await s.served("m")).status == 200
        assert await s.stop() == 0
        assert not any(lives(pid) for pid in (*pids, new))
        assert not list(s.control().parent.glob("*.sock"))


# What can be asked of a running server.


async def test_lists_of_models_are_narrowed_in_every_shape(gateway: Any) -> None:
    environ = {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}
    narrow = "?provider=anthropic&capability=reasoning&min_context=100000&max_price=5"
    async with gateway("", environ) as gw, gw.caller() as caller:
        everything = (await caller.get("/v1/models")).json()["data"]
        some = (await caller.get(f"/v1/models{narrow}")).json()["data"]
        assert 0 < len(some) < len(everything)
        wanted = [
            one["id"]
            for one in everything
            if "anthropic" in one["providers"]
            and "reasoning" in one["capabilities"]
            and one["context_length"] >= 100_000
            and one.get("pricing_usd_per_million", {}).get("input", 99) <= 5
        ]
        assert [one["id"] for one in some] == wanted
        theirs = await caller.get(f"/v1/models{narrow}&limit=1000", anthropic_version="2023-06-01")
        assert [one["id"] for one in theirs.json()["data"]] == wanted
        google = await caller.get(f"/v1beta/models{narrow}&pageSize=1000")
        assert [one["name"] for one in google.json()["models"]] == [f"models/{i}" for i in wanted]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("provider=opanai", "provider"),
        ("capability=flying", "capability"),
        ("modality=smell", "modality"),
        ("max_price=cheap", "max_price"),
        ("max_price=-1", "max_price"),
        ("min_context=1e99", "min_context"),
        ("min_context=nan", "min_context"),
    ],
)
async def test_a_filter_that_makes_no_sense_is_a_400(gateway: Any, query: str, param: str) -> None:
    async with gateway("", {"OPENAI_API_KEY": "k"}) as gw, gw.caller() as caller:
        answer = await caller.get(f"/v1/models?{query}")
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)


async def test_own_models_are_listed_with_what_the_file_says_of_them(fleet: Any) -> None:
    own = {"a": 'models = [{id = "m", context = 5000, capabilities = ["tools"], '
                'pricing = {input = 1, output = 2}}, {id = "n"}]'}  # fmt: skip
    async with fleet(OK, own=own) as f, f.gw.caller() as caller:
        for query, ids in (
            ("provider=a", {"m", "n"}),
            ("capability=tools&provider=a", {"m"}),
            ("min_context=5000&provider=a", {"m"}),
            ("min_context=5001&provider=a", set()),
            ("max_price=1&provider=a", {"m"}),
        ):
            listed = (await caller.get(f"/v1/models?{query}")).json()["data"]
            assert {one["id"] for one in listed} == ids, query


async def test_status_is_for_those_with_a_key_and_holds_none(fleet: Any) -> None:
    door = '[server]\nauth = "required"\n[keys.me]\nkey = "sk-secret-caller"\n'
    async with fleet(OK, OK, toml=door, own=SECRETS) as f, f.gw.caller() as caller:
        assert (await caller.get("/api/status")).status == 401
        assert (await caller.get("/api/status", x_api_key="sk-other")).status == 401
        assert await f.served(headers={"x_api_key": "sk-secret-caller"}) == "a"
        answer = await caller.get("/api/status", authorization="Bearer sk-secret-caller")
        assert answer.status == 200 and "secret" not in answer.body.decode()
        assert answer.json()["targets"]["a/m"]["answers"] == 1
        assert answer.json()["active"]["b"]["accounts"] == 1
