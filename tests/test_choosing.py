"""What a request needs, which conversation it belongs to, and who of a route is asked first."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from support import router_of

from bitrouter import (
    CHAT_OP,
    EFFORTS,
    NO_WISHES,
    BadRequest,
    Breaker,
    Chosen,
    Health,
    Limits,
    Meter,
    Needs,
    RateLimit,
    Speed,
    Target,
    UpstreamBroken,
    UpstreamKeyRefused,
    Wishes,
    choose,
    needs_of,
    rooms_in,
    session_of,
    share_of,
)

FLEET = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
models = [
  {id = "m", context = 1000, pricing = {input = 5, output = 5}},
  {id = "c", capabilities = ["tools", "reasoning"], reasoning_effort = {levels = ["low", "high"]}},
  {id = "t", pricing = {input = 1, output = 1}},
]
[providers.bb]
api_base = "http://10.0.0.2/v1"
accounts = [{api_key = "k1", label = "1"}, {api_key = "k2", label = "2"}]
models = [
  {id = "m", context = 8000, pricing = {input = 1, output = 2}},
  {id = "c", capabilities = ["image_input", "structured_outputs"]},
  {id = "t", pricing = {input = 1, output = 1}},
]
[providers.cc]
api_base = "http://10.0.0.3/v1"
models = [
  {id = "m"},
  {id = "c"},
  {id = "t", pricing = {input = 1, output = 1}},
  {id = "limited", rate_limits = {requests_per_minute = 3, tokens_per_minute = 1000}},
  {id = "few", rate_limits = {requests_per_minute = 1}},
  {id = "short", rate_limits = {tokens_per_minute = 100}},
]
[models.shared]
strategy = "balance"
endpoints = [
  {provider = "aa", service_id = "m", weight = 5},
  {provider = "bb", service_id = "m", weight = 2},
  {provider = "cc", service_id = "m", weight = 1},
]
[presets.drawn]
candidates = [
  {model = "aa:m", weight = 6}, {model = "bb:m", weight = 3}, {model = "cc:m", weight = 1},
]
fallbacks = ["cc:other"]
[presets.either]
candidates = [{model = "aa:m", weight = 3}, {model = "bb:m"}]
"""
NOW = 10_000.0


class Fleet:
    def __init__(self, **environ: str) -> None:
        self.router = router_of(FLEET, environ)
        self.health = Health(Breaker(failures=3, window_s=60, cooldown_s=30))

    def choose(
        self,
        model: str | tuple[str, ...] = "m",
        needs: Needs | None = None,
        wishes: Wishes = NO_WISHES,
        now: float = NOW,
        **more: Any,
    ) -> Chosen:
        found = self.router.resolve(model, CHAT_OP, wishes)
        return choose(found, needs, self.health, now, **more)

    def order(self, model: str | tuple[str, ...] = "m", **more: Any) -> str:
        """The first letter of each provider that is asked, in order, without its accounts."""
        chain = self.choose(model, **more).chain
        return "".join(key for key, _ in itertools.groupby(t.provider[0] for t in chain))

    def target(self, provider: str, model: str = "m") -> Target:
        return self.router.resolve(f"{provider}:{model}", CHAT_OP).chain[0]

    def measure(self, provider: str, ttft_s: float, rate: float | None, model: str = "t") -> None:
        self.health.meter.answered(self.target(provider, model), True, ttft_s, rate, NOW - 1)

    def failed(self, provider: str, times: int, model: str = "t") -> None:
        for _ in range(times):
            self.health.meter.failed(self.target(provider, model), NOW - 1)


# --- what a request needs

PNG = "data:image/png;base64,AAAA"
TOOL_SCHEMA = {"type": "object", "properties": {"a": {"type": "image"}}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


# One way to say each thing in each protocol.
NEEDS: dict[str, dict[str, dict[str, Any]]] = {
    "image_input": {
        "chat": {"messages": [user({"type": "image_url", "image_url": {"url": PNG}})]},
        "responses": {"input": [user({"type": "input_image", "image_url": PNG})]},
        "messages": {"messages": [user({"type": "image", "source": {"type": "base64"}})]},
        "messages, in a tool's result": {
            "messages": [user({"type": "tool_result", "content": [{"type": "image"}]})]
        },
        "gemini": {"contents": [{"parts": [{"inlineData": {"mimeType": "image/webp"}}]}]},
        "gemini, by name": {"contents": [{"parts": [{"fileData": {"mimeType": "image/png"}}]}]},
        "gemini, its other names": {
            "contents": [{"parts": [{"inline_data": {"mime_type": "image/png"}}]}]
        },
        "gemini, one part alone": {"contents": {"parts": {"inlineData": {"mimeType": "image/x"}}}},
    },
    "audio_input": {
        "chat": {"messages": [user({"type": "input_audio", "input_audio": {"data": "A"}})]},
        "responses": {"input": [user({"type": "input_audio", "data": "A"})]},
        "gemini": {"contents": [{"parts": [{"inlineData": {"mimeType": "audio/wav"}}]}]},
    },
    "video_input": {
        "chat": {"messages": [user({"type": "video_url", "video_url": {"url": "x"}})]},
        "gemini": {"contents": [{"parts": [{"fileData": {"mimeType": "video/mp4"}}]}]},
    },
    "file_input": {
        "chat": {"messages": [user({"type": "file", "file": {"file_id": "f"}})]},
        "responses": {"input": [user({"type": "input_file", "file_id": "f"})]},
        "messages": {"messages": [user({"type": "document", "source": {}})]},
        "gemini": {"contents": [{"parts": [{"inlineData": {"mimeType": "application/pdf"}}]}]},
    },
    "tools": {
        "chat": {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "chat, the old way": {"functions": [{"name": "f"}]},
        "responses": {"tools": [{"type": "function", "name": "f"}]},
        "messages": {"tools": [{"name": "f", "input_schema": TOOL_SCHEMA}]},
        "gemini": {"tools": [{"functionDeclarations": [{"name": "f", "parameters": TOOL_SCHEMA}]}]},
    },
    "structured_outputs": {
        "chat": {"response_format": {"type": "json_schema", "json_schema": {}}},
        "responses": {"text": {"format": {"type": "json_schema", "schema": {}}}},
        "messages": {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
        "gemini": {"generationConfig": {"responseSchema": {"type": "OBJECT"}}},
        "gemini, as JSON Schema": {"generationConfig": {"responseJsonSchema": {"type": "object"}}},
        "gemini, its other name": {"generation_config": {"response_schema": {"type": "OBJECT"}}},
    },
    "reasoning": {
        "chat": {"reasoning_effort": "low"},
        "chat, as OpenRouter": {"reasoning": {"effort": "low"}},
        "responses": {"reasoning": {"effort": "low", "summary": "auto"}},
        "messages": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        "messages, adaptive": {"thinking": {"type": "adaptive"}},
        "messages, by effort": {"output_config": {"effort": "low"}},
        "gemini": {"generationConfig": {"thinkingConfig": {"thinkingLevel": "LOW"}}},
    },
}


@pytest.mark.parametrize(
    ("able", "body"),
    [
        pytest.param(able, body, id=f"{able}-{how}")
        for able, ways in NEEDS.items()
        for how, body in ways.items()
    ],
)
def test_each_need_is_seen_in_each_protocol_and_nothing_else(
    able: str, body: dict[str, Any]
) -> None:
    assert needs_of(body).able == {able}


NOTHING: list[dict[str, Any]] = [
    {},
    {"messages": None, "input": 5, "contents": "text", "tools": [], "functions": []},
    {"messages": [{"role": "user", "content": "type: image_url, input_audio, document"}]},
    {"messages": [user({"type": "text", "text": '{"type": "image"}'})]},
    {"messages": [user({"type": ["image"]}, {"type": {"type": "x"}}, {"type": None})]},
    {"messages": [user({"type": "tool_use", "name": "f", "input": {"type": "image"}})]},
    {"contents": [{"parts": [{"functionCall": {"args": {"inlineData": {"mimeType": "a/b"}}}}]}]},
    {"contents": [{"parts": [{"inlineData": {"mimeType": 5}}, {"inlineData": None}]}]},
    {"response_format": {"type": "json_object"}},
    {"text": {"format": {"type": "text"}}},
    {"generationConfig": {"responseMimeType": "application/json"}},
    {"generationConfig": 5},
    {"reasoning_effort": "none"},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {"effort": "gigantic"}},
    {"reasoning_effort": ["low"]},
    {"thinking": {"type": "disabled"}},
]


@pytest.mark.parametrize("body", NOTHING)
def test_what_only_looks_like_a_need_is_none(body: dict[str, Any]) -> None:
    assert needs_of(body)[:2] == (frozenset(), "")


def test_needs_add_up() -> None:
    both = NEEDS["image_input"]["chat"] | NEEDS["tools"]["chat"] | NEEDS["reasoning"]["chat"]
    assert needs_of(both).able == {"image_input", "tools", "reasoning"}


@pytest.mark.parametrize("effort", [one for one in EFFORTS if one != "none"])
def test_the_effort_is_read_as_it_is_said(effort: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"reasoning_effort": effort},
        {"reasoning": {"effort": effort}},
        {"output_config": {"effort": effort}},
        {"generationConfig": {"thinkingConfig": {"thinkingLevel": effort.upper()}}},
    ]
    assert [needs_of(body).effort for body in bodies] == [effort] * 4


TEXT = "word " * 8000  # 40,000 characters
LONG: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": TEXT}]},
    {"messages": [user({"type": "text", "text": TEXT})]},
    {"instructions": TEXT, "input": "Hi"},
    {"input": TEXT},
    {"system": [{"type": "text", "text": TEXT}], "messages": []},
    {"systemInstruction": {"parts": [{"text": TEXT}]}},
    {"system_instruction": {"parts": [{"text": TEXT}]}},
    {"contents": [{"parts": [{"text": TEXT}]}]},
    {"tools": [{"function": {"name": "f", "description": TEXT}}]},
    {"messages": [user({"type": "tool_use", "input": {"file": TEXT}})]},
    {"messages": [{"content": TEXT[:20_000]}, {"content": TEXT[20_000:]}]},
]


@pytest.mark.parametrize("body", LONG)
def test_a_long_prompt_counts_wherever_it_stands(body: dict[str, Any]) -> None:
    assert needs_of(body).tokens == pytest.approx(10_000, rel=0.01)


def test_a_picture_counts_the_same_however_many_bytes_it_has() -> None:
    def tokens(url: str) -> int:
        return needs_of(
            {"messages": [user({"type": "image_url", "image_url": {"url": url}})]}
        ).tokens

    assert tokens(PNG) == tokens(PNG + "A" * 1_000_000) > 100


def test_needs_of_any_json_are_read_without_a_crash() -> None:
    rng = random.Random(2)
    names = ["type", "content", "inlineData", "mimeType", "parts", "input", "tools", "effort"]
    tops = [
        "messages", "input", "contents", "system", "tools", "reasoning", "thinking", "text",
        "generationConfig", "output_config", "response_format", "reasoning_effort",
    ]  # fmt: skip

    def some(depth: int = 0) -> Any:
        kind = rng.randrange(5 if depth > 3 else 7)
        if kind == 5:
            return {rng.choice(names): some(depth + 1) for _ in range(rng.randrange(4))}
        if kind == 6:
            return [some(depth + 1) for _ in range(rng.randrange(4))]
        return [None, True, 3, "image_url", "json_schema"][kind]

    for _ in range(1500):
        body = {rng.choice(tops): some() for _ in range(4)}
        needs = needs_of(body)
        assert needs.tokens >= 0 and needs.effort in ("", *EFFORTS)
        session_of({}, body, "")


# --- which conversation it is

# fmt: off
NAMES: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"x-session-id": "s"},              {},                                    "s"),
    ({"session_id": "s"},                {},                                    "s"),
    ({"session-id": "s"},                {},                                    "s"),
    ({"x-claude-code-session-id": "s"},  {},                                    "s"),
    ({"x-bitrouter-session": "s"},       {},                                    "s"),
    ({"conversation_id": "s"},           {},                                    "s"),
    ({"thread-id": "s"},                 {},                                    "s"),
    ({},                                 {"prompt_cache_key": "s"},             "s"),
    ({},                                 {"session_id": "s"},                   "s"),
    ({},                                 {"metadata": {"user_id": "s"}},        "s"),
    ({"x-session-id": "s"},              {"prompt_cache_key": "other"},         "s"),
    ({"x-session-id": "", "session_id": "s"}, {},                               "s"),
    ({},                                 {"prompt_cache_key": "", "session_id": "s"}, "s"),
    ({},                                 {"prompt_cache_key": 5, "session_id": "s"},  "s"),
]
# fmt: on
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(("headers", "fields", "name"), NAMES)
def test_a_conversation_has_the_name_that_its_caller_gives_it(
    headers: dict[str, str], fields: dict[str, Any], name: str
) -> None:
    found = session_of(headers, {**HELLO, **fields}, "me")
    assert (found.key, found.named, found.goes_on) == (f"me {name}", True, False)
    assert session_of(headers, {"input": "else", **fields}, "me").key == found.key
    assert session_of(headers, {**HELLO, **fields}, "you").key != found.key


def test_a_very_long_name_is_kept_short_and_apart_from_others() -> None:
    keys = {session_of({"x-session-id": "s" * n}, HELLO, "me").key for n in (128, 129, 4000, 4001)}
    assert len(keys) == 4 and max(map(len, keys)) <= 3 + 128


@pytest.mark.parametrize("fields", [{"metadata": "x"}, {"prompt_cache_key": {}}, {"user": "u"}])
def test_what_is_no_name_leaves_the_conversation_without_one(fields: dict[str, Any]) -> None:
    assert not session_of({}, {**HELLO, **fields}, "me").named


def chat_turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def gemini_turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}]}


def responses_turn(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"role": role, "content": [{"type": kind, "text": text}]}


TURNS: list[tuple[str, Callable[[str, str], dict[str, Any]], str, dict[str, Any]]] = [
    ("messages", chat_turn, "assistant", {}),
    ("messages", chat_turn, "assistant", {"system": "S"}),
    ("messages", chat_turn, "assistant", {"system": [{"type": "text", "text": "S"}]}),
    ("messages", responses_turn, "assistant", {}),
    ("input", responses_turn, "assistant", {"instructions": "S"}),
    ("contents", gemini_turn, "model", {"systemInstruction": {"parts": [{"text": "S"}]}}),
    ("contents", gemini_turn, "model", {"system_instruction": {"parts": [{"text": "S"}]}}),
]


@pytest.mark.parametrize(("key", "turn", "answerer", "more"), TURNS)
@pytest.mark.parametrize("system", [[], ["system"], ["developer"]])
def test_every_later_turn_of_a_conversation_has_the_key_of_the_first(
    key: str,
    turn: Callable[[str, str], dict[str, Any]],
    answerer: str,
    more: dict[str, Any],
    system: list[str],
) -> None:
    turns = [*(turn(role, "S") for role in system), turn("user", "Hello")]
    first = session_of({}, {key: turns, **more}, "me")
    assert first.key and not first.goes_on
    for n in range(5):
        turns = [*turns, turn(answerer, f"Answer {n}"), turn("user", f"Question {n}")]
        later = session_of({}, {key: turns, **more, "temperature": n}, "me")
        assert later == first._replace(goes_on=True)
    named = session_of({"x-session-id": "s"}, {key: turns, **more}, "me")
    assert named.goes_on


def test_what_a_tool_was_asked_and_said_is_a_later_turn() -> None:
    first = {"input": [responses_turn("user", "Hello")]}
    later = [{"type": "function_call", "name": "f"}, {"type": "function_call_output"}]
    gone_on = {"input": [*first["input"], *later]}
    assert session_of({}, gone_on, "me") == session_of({}, first, "me")._replace(goes_on=True)


def test_conversations_that_begin_otherwise_have_other_keys() -> None:
    bodies: list[dict[str, Any]] = [
        HELLO,
        {"messages": [chat_turn("user", "Hello!")]},
        {"messages": [chat_turn("system", "S"), chat_turn("user", "Hello")]},
        {"messages": [chat_turn("system", "T"), chat_turn("user", "Hello")]},
        {"system": "U", **HELLO},
        {"messages": [chat_turn("user", "x" * 2000 + "a")]},
        {"messages": [chat_turn("user", "x" * 2000 + "b")]},
        {"input": "Hi"},
    ]
    keys = [session_of({}, body, caller).key for body in bodies for caller in ("me", "you", "")]
    assert len(set(keys)) == len(keys)


# fmt: off
GOES_ON: list[tuple[dict[str, Any], bool]] = [
    ({"messages": [chat_turn("user", "a")]},                                           False),
    ({"messages": [chat_turn("user", "a"), chat_turn("user", "b")]},                   False),
    ({"messages": [chat_turn("user", "a"), chat_turn("assistant", "b")]},              True),
    ({"input": "a"},                                                                   False),
    ({"input": "a", "previous_response_id": "resp_1"},                                 True),
    ({"input": "a", "previous_response_id": None},                                     False),
    ({"input": [{"type": "function_call"}, {"type": "function_call_output"}]},         True),
    ({"input": [{"type": "reasoning", "summary": []}]},                                True),
    ({"input": [{"type": "message", "role": "user", "content": "a"}]},                 False),
    ({"contents": [gemini_turn("model", "a")]},                                        True),
    ({"contents": [{"parts": [{"text": "a"}]}]},                                       False),
    ({"messages": ["assistant", None, 5]},                                             False),
    ({"messages": [chat_turn("assistant", "a"), *[chat_turn("tool", "b")] * 9]},       True),
]
# fmt: on


@pytest.mark.parametrize(("body", "goes_on"), GOES_ON)
def test_a_conversation_goes_on_once_something_was_answered(
    body: dict[str, Any], goes_on: bool
) -> None:
    assert session_of({}, body, "me").goes_on is goes_on


# --- who can

# fmt: off
ABLE: list[tuple[str, Needs, str]] = [
    # model   what is needed                                    who is asked
    ("c",     Needs(),                                          "abc"),
    ("c",     Needs(frozenset({"tools"})),                      "ac"),
    ("c",     Needs(frozenset({"image_input"})),                "bc"),
    ("c",     Needs(frozenset({"tools", "image_input"})),       "c"),
    ("c",     Needs(frozenset({"reasoning"}), "high"),          "ac"),
    ("c",     Needs(frozenset(), "high"),                       "abc"),
    ("c",     Needs(frozenset(), "medium"),                     "bc"),
    ("m",     Needs(tokens=1000),                               "abc"),
    ("m",     Needs(tokens=1001),                               "bc"),
    ("m",     Needs(tokens=8001),                               "c"),
    ("aa:m",  Needs(tokens=8001),                               "a"),
]
# fmt: on


@pytest.mark.parametrize(("model", "needs", "asked"), ABLE)
def test_who_cannot_do_what_is_needed_is_not_asked(model: str, needs: Needs, asked: str) -> None:
    fleet = Fleet()
    assert fleet.order(model, needs=needs) == asked
    everybody = {place.split("/")[0] for place in fleet.choose(model, needs=needs).left_out}
    here = {target.name for target in fleet.router.resolve(model, CHAT_OP).chain}
    assert everybody == {name for name in here if name[0] not in asked}


def test_the_reason_for_leaving_a_target_out_is_told() -> None:
    fleet = Fleet()
    left = fleet.choose("c", needs=Needs(frozenset({"file_input"}))).left_out
    assert left[0] == "aa/c: cannot do file_input" and len(left) == 3
    left = fleet.choose("c", needs=Needs(effort="medium")).left_out
    assert left == ("aa/c: does not know the reasoning effort medium",)
    left = fleet.choose("m", needs=Needs(tokens=9000)).left_out
    assert left[0] == "aa/m: about 9000 tokens do not fit its context of 1000"


# fmt: off
NOBODY = [
    ("aa:c",           Needs(frozenset({"image_input"})),   "aa/c: cannot do image_input"),
    ("aa:c",           Needs(frozenset({"a", "b"})),        "aa/c: cannot do a, b"),
    ("aa:c",           Needs(frozenset(), "max"),           "the reasoning effort max"),
    (("aa:c", "bb:c"), Needs(frozenset({"audio_input"})),   "bb:1/c: cannot do audio_input"),
]
# fmt: on


@pytest.mark.parametrize(("model", "needs", "said"), NOBODY)
def test_a_request_that_nobody_can_serve_by_the_files_own_word_is_refused(
    model: str | tuple[str, ...], needs: Needs, said: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        Fleet().choose(model, needs=needs)
    error = refused.value
    assert (error.code, error.param) == ("no_capable_provider", "model") and said in error.message


def test_the_word_of_the_catalogue_is_a_hint_that_only_ranks_while_somebody_is_left() -> None:
    fleet = Fleet(OPENAI_API_KEY="k", DEEPSEEK_API_KEY="k")
    image, video = Needs(frozenset({"image_input"})), Needs(frozenset({"video_input"}))
    models = ("deepseek:deepseek-v4-pro", "openai:gpt-4o")
    assert fleet.order(models) == "do"
    assert fleet.order(models, needs=image) == "o"
    assert fleet.order(models, needs=video) == "do"  # nobody is known for it: all are tried
    # a certain no is worth less than a doubt
    assert fleet.order(("aa:c", *models), needs=video) == "do"


# --- who goes first

# All three have the same price for `t`, so that only what was measured tells them apart.
Measured = tuple[
    float | None, float, int
]  # the first token's time (None: no answer), rate, failures
NEW: Measured = (None, 0, 0)
# fmt: off
RANKED: list[tuple[str, str, Measured, Measured, Measured, str]] = [
    # asked           by                            aa              bb              cc       order
    ("t:latency",    "the first token's time",      (0.3, 1, 0),    (0.1, 1, 0),    (0.2, 1, 0),
     "bca"),
    ("t:latency",    "then the rate",               (0.1, 10, 0),   (0.1, 30, 0),   (0.1, 20, 0),
     "bca"),
    ("t:latency",    "then the uptime",             (0.1, 10, 2),   (0.1, 10, 1),   (0.1, 10, 0),
     "cba"),
    ("t:latency",    "then the id",                 (0.1, 10, 1),   (0.1, 10, 1),   (0.1, 10, 1),
     "abc"),
    ("t:latency",    "new ones first",              (0.001, 99, 0), (0.002, 99, 0), NEW,
     "cab"),
    ("t:latency",    "not those that only fail",    (9.0, 1, 0),    (8.0, 1, 0),    (None, 0, 1),
     "bac"),
    ("t:throughput", "the rate",                    (0.1, 10, 0),   (0.1, 20, 0),   (0.1, 30, 0),
     "cba"),
    ("t:throughput", "then the first token's time", (0.3, 10, 0),   (0.2, 10, 0),   (0.1, 10, 0),
     "cba"),
    ("t:throughput", "then the uptime",             (0.1, 10, 1),   (0.1, 10, 0),   (0.1, 10, 2),
     "bac"),
    ("t:throughput", "new ones first",              (0.1, 999, 0),  NEW,            (0.1, 99, 0),
     "bac"),
    ("t:throughput", "not those that only fail",    (None, 0, 1),   (9.0, 1, 0),    (9.0, 2, 0),
     "cba"),
    ("t:cost",       "the uptime",                  (0.1, 99, 3),   (5.0, 1, 1),    (9.0, 1, 0),
     "cba"),
    ("t:cost",       "not the count of failures",   (None, 0, 1),   NEW,            (0.1, 99, 1),
     "bca"),
    ("t:cost",       "then the id",                 NEW,            NEW,            NEW,
     "abc"),
    ("m:cost",       "the price, unknown ones last", NEW,           (9.0, 1, 9),    (0.1, 99, 0),
     "bac"),
    ("t",            "nothing",                     (9.0, 1, 9),    (0.1, 99, 0),   NEW,
     "abc"),
]
# fmt: on


@pytest.mark.parametrize(
    ("model", "by", "aa", "bb", "cc", "asked"), RANKED, ids=[f"{r[0]}-{r[1]}" for r in RANKED]
)
def test_a_ranking_goes_by_what_was_measured(
    model: str, by: str, aa: Measured, bb: Measured, cc: Measured, asked: str
) -> None:
    fleet = Fleet()
    for provider, (ttft_s, rate, failures) in {"aa": aa, "bb": bb, "cc": cc}.items():
        fleet.failed(provider, failures, model[0])
        if ttft_s is not None:
            fleet.measure(provider, ttft_s, rate, model[0])
    assert fleet.order(model) == asked


def test_a_ranking_says_what_it_is_founded_on() -> None:
    fleet = Fleet()
    fleet.measure("aa", 0.25, 41.6)
    said = {model: fleet.choose(model).notes for model in ("t:latency", "t:throughput", "t:cost")}
    key, new = fleet.target("aa", "t").key, fleet.target("cc", "t").key
    assert said["t:latency"][key] == "first token after 250 ms"
    assert said["t:throughput"][key] == "42 tokens per second"
    assert said["t:cost"][key] == "$1 per million tokens"
    assert said["t:latency"][new] == said["t:throughput"][new] == "not measured yet"
    prices = fleet.choose("m:cost").notes
    assert prices[fleet.target("bb").key] == "$1.25 per million tokens"  # three to one
    assert prices[fleet.target("cc").key] == "its price is not known"


def test_a_requests_own_order_goes_before_any_ranking() -> None:
    fleet = Fleet()
    for sort in ("cost", "latency", "throughput", ""):
        assert fleet.order("t", wishes=Wishes(sort=sort, order=("cc", "bb"))) == "cba"
    assert fleet.order("m", wishes=Wishes(sort="cost", order=("cc",))) == "cba"


@pytest.mark.parametrize("sort", ["", "cost", "latency", "throughput"])
def test_without_fallbacks_one_model_at_one_provider_is_asked(sort: str) -> None:
    fleet = Fleet()
    wishes = Wishes(sort=sort, allow_fallbacks=False)
    fleet.measure("aa", 0.9, 1, "m")
    fleet.measure("bb", 0.1, 9, "m")
    fleet.measure("cc", 0.5, 5, "m")
    chain = fleet.choose("m", wishes=wishes).chain
    firsts = {"": ["aa"], "cost": ["bb:1", "bb:2"]}
    assert sorted(target.name for target in chain) == firsts.get(sort, ["bb:1", "bb:2"])
    # among those who can
    needs = Needs(tokens=5000)
    assert {t.provider for t in fleet.choose("m", needs=needs, wishes=wishes).chain} == {"bb"}
    # of several models, the first one
    assert fleet.order(("aa:m", "cc:t"), wishes=Wishes(allow_fallbacks=False)) == "a"
    # who is named in `order` is no fallback
    both = Wishes(sort=sort, order=("cc", "aa"), allow_fallbacks=False)
    assert fleet.order("m", wishes=both) == "ca"


# --- turns, draws, and staying where one is


def test_a_balanced_model_gives_each_endpoint_its_share_in_every_round() -> None:
    fleet = Fleet()
    firsts = "".join(fleet.order("shared")[0] for _ in range(8 * 40))
    for start in range(len(firsts) - 8):
        assert Counter(firsts[start : start + 8]) == {"a": 5, "b": 2, "c": 1}
    assert "aaaa" not in firsts and "bb" not in firsts
    assert fleet.order("shared")[1:] in ("bc", "ac", "ab")  # then the others, by weight


def test_two_balanced_models_do_not_take_each_others_turns() -> None:
    health = Health(Breaker())
    firsts: dict[str, list[str]] = {"x": [], "y": []}
    rng = random.Random(4)
    for _ in range(400):
        name = rng.choice("xy")
        firsts[name].append(health.share(name, {"a": 2.0, "b": 1.0, "c": 1.0})[0])
    for turns in firsts.values():
        whole = turns[: len(turns) // 4 * 4]
        assert Counter(whole) == {
            "a": len(whole) / 2,
            "b": len(whole) / 4,
            "c": len(whole) / 4,
        }


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_exact_and_evenly_spread_for_any_weights(seed: int) -> None:
    rng, health = random.Random(seed), Health(Breaker())
    weights = {name: float(rng.randrange(0, 7)) for name in "abcde"[: rng.randrange(1, 6)]}
    if not any(weights.values()):
        weights["a"] = 1.0
    total = int(sum(weights.values()))
    turns = [health.share("m", weights) for _ in range(3 * total)]
    assert all(sorted(turn) == sorted(weights) for turn in turns)
    for start in range(2 * total):
        seen = Counter(turn[0] for turn in turns[start : start + total])
        assert {name: seen[name] for name in weights} == weights


def test_the_others_of_a_turn_follow_by_their_weights() -> None:
    health, weights = Health(Breaker()), {"a": 1.0, "b": 5.0, "c": 0.0, "d": 3.0}
    for _ in range(10):
        _, *others = health.share("m", weights)
        assert others == sorted(others, key=lambda name: -weights[name])


def test_candidates_are_drawn_by_weight_and_the_same_number_draws_the_same() -> None:
    fleet = Fleet()

    def drawn(number: float) -> str:
        return fleet.order("@drawn", draw=lambda: number)

    draws = [drawn(n / 1000) for n in range(1000)]
    assert Counter(draw[0] for draw in draws) == {"a": 600, "b": 300, "c": 100}
    assert all(set(draw) == set("abc") for draw in draws)
    assert draws == [drawn(n / 1000) for n in range(1000)]
    assert drawn(0.999999999) == "cbac"  # and the fallback
    either = [fleet.order("@either", draw=lambda n=n: n / 400) for n in range(400)]
    assert Counter(either) == {"ab": 300, "ba": 100}


def test_the_fallbacks_of_a_preset_come_after_every_candidate() -> None:
    for n in range(20):
        chain = Fleet().choose("@drawn", draw=lambda n=n: n / 20).chain
        assert [target.model for target in chain][-1] == "other"
        assert {target.model for target in chain[:-1]} == {"m"}


def test_only_several_candidates_are_drawn_from() -> None:
    def never() -> float:
        raise AssertionError("nothing is to be drawn")

    fleet = Fleet()
    for model in ("m", "m:cost", "shared", ("m", "t")):
        assert fleet.choose(model, draw=never).chain


def test_conversations_are_spread_over_candidates_by_their_names() -> None:
    fleet = Fleet()
    firsts = Counter(
        fleet.order("@drawn", draw=lambda n=n: share_of(f"conversation {n}"))[0]
        for n in range(3000)
    )
    assert 1650 < firsts["a"] < 1950 and 780 < firsts["b"] < 1020 and 220 < firsts["c"] < 380


@pytest.mark.parametrize("model", ["m", "m:cost", "t:latency", "shared", "@drawn"])
def test_a_conversation_stays_where_it_is_and_the_others_follow_as_they_were(model: str) -> None:
    fleet, plain = Fleet(), Fleet()
    model_id = "t" if model.startswith("t") else "m"
    for provider in ("aa", "bb", "cc"):
        warm = fleet.target(provider, model_id).key
        with_first = [t.key for t in fleet.choose(model, first=warm).chain]
        without = [t.key for t in plain.choose(model).chain]
        assert with_first == [warm, *(key for key in without if key != warm)]


def test_a_place_that_is_not_in_the_chain_changes_nothing() -> None:
    fleet = Fleet()
    assert fleet.order("m", first=("zz", "", "m")) == "abc"


def test_who_cools_down_goes_last_even_if_a_conversation_is_there() -> None:
    fleet = Fleet()
    target = fleet.target("aa")
    fleet.health.failed(target, UpstreamKeyRefused("no"), NOW)
    for more in ({}, {"first": target.key}):
        assert fleet.order("m", **more) == "bca"
        assert fleet.order("m", wishes=Wishes(order=("aa",)), **more) == "bca"
    assert fleet.order("m", now=NOW + 30) == "abc"


def test_when_all_cool_down_all_are_asked_who_is_back_soonest_first() -> None:
    fleet = Fleet()
    for provider, at in (("aa", 3.0), ("cc", 1.0), ("bb", 2.0)):
        for target in fleet.router.resolve(f"{provider}:m", CHAT_OP).chain:
            fleet.health.failed(target, UpstreamKeyRefused("no"), NOW + at)
    assert fleet.order("m", now=NOW + 4) == "cba"


def test_a_failure_that_is_not_enough_for_the_breaker_moves_nobody() -> None:
    fleet = Fleet()
    for _ in range(2):
        fleet.health.failed(fleet.target("aa"), UpstreamBroken("no"), NOW)
    assert fleet.order("m") == "abc"
    fleet.health.failed(fleet.target("aa"), UpstreamBroken("no"), NOW)
    assert fleet.order("m") == "bca"


@pytest.mark.parametrize("seed", range(30))
def test_choosing_never_loses_or_doubles_a_target(seed: int) -> None:
    rng, fleet = random.Random(seed), Fleet()
    models: list[str | tuple[str, ...]] = [
        "m", "m:cost", "t:latency", "c:throughput", "shared", "@drawn", ("shared", "t:cost", "c"),
    ]  # fmt: skip
    for step in range(40):
        model = rng.choice(models)
        found = fleet.router.resolve(model, CHAT_OP)
        first = rng.choice([None, rng.choice(found.chain).key])
        chosen = fleet.choose(model, first=first, draw=rng.random, now=NOW + step)
        assert sorted(map(id, chosen.chain)) == sorted(map(id, found.chain))
        target = rng.choice(chosen.chain)
        if rng.random() < 0.5:
            fleet.health.failed(target, UpstreamBroken("no"), NOW + step)
            fleet.health.meter.failed(target, NOW + step)
        else:
            fleet.health.succeeded(target)
            fleet.health.meter.answered(target, True, rng.random(), rng.random(), NOW + step)


# --- limits of the configuration


def test_a_limit_of_requests_holds_over_every_minute_and_says_how_long_to_wait() -> None:
    limits, target = Limits(), Fleet().target("cc", "limited")
    taken = []
    for now in (0.0, 10.0, 20.0):
        assert limits.wait_s(target, 1, now) == 0
        limits.take(target, 1, now)
        taken.append(now)
    assert [limits.wait_s(target, 1, now) for now in (20.0, 59.0)] == [40.0, 1.0]
    assert limits.wait_s(target, 1, 60.0) == 0
    limits.take(target, 1, 60.0)
    assert limits.wait_s(target, 1, 60.0) == 10.0  # the one of 10.0 is the next to go
    assert limits.used(60.0) == {"cc/limited": {"requests": 3, "tokens": 3}}


def test_a_limit_of_tokens_waits_for_as_much_as_is_needed() -> None:
    limits, target = Limits(), Fleet().target("cc", "short")
    for tokens, now in ((50, 0.0), (30, 10.0), (20, 20.0)):
        assert limits.wait_s(target, tokens, now) == 0
        limits.take(target, tokens, now)
    waits = {tokens: limits.wait_s(target, tokens, 30.0) for tokens in (1, 50, 51, 80, 81, 100)}
    assert waits == {1: 30.0, 50: 30.0, 51: 40.0, 80: 40.0, 81: 50.0, 100: 50.0}
    assert limits.wait_s(target, 5000, 30.0) == 50.0  # more than the limit: when nothing else is
    assert limits.wait_s(target, 5000, 80.0) == 0


def test_each_kind_of_limit_holds_by_itself() -> None:
    fleet, limits = Fleet(), Limits()
    few, short = fleet.target("cc", "few"), fleet.target("cc", "short")
    limits.take(few, 10**9, 0.0)
    assert limits.wait_s(few, 0, 1.0) == 59.0
    for _ in range(50):
        limits.take(short, 1, 0.0)
    assert limits.wait_s(short, 50, 1.0) == 0 and limits.wait_s(short, 51, 1.0) == 59.0
    assert limits.wait_s(fleet.target("aa"), 10**9, 1.0) == 0  # without a limit


def test_accounts_have_a_limit_each() -> None:
    toml = FLEET.replace(
        "[providers.bb]", '[providers.bb]\nrate_limits = {"m*" = {requests_per_minute = 1}}'
    )
    one, two = router_of(toml).resolve("bb:m", CHAT_OP).chain
    limits = Limits()
    limits.take(one, 1, 0.0)
    assert (limits.wait_s(one, 1, 1.0), limits.wait_s(two, 1, 1.0)) == (59.0, 0.0)


def test_what_a_request_used_in_the_end_is_settled() -> None:
    limits, target = Limits(), Fleet().target("cc", "short")
    limits.take(target, 40, 0.0)
    limits.settle(target, 0, 0.0, 1.0)
    limits.settle(target, 30, 0.0, 10.0)  # 70 in all, of which 30 count from now on
    assert limits.used(10.0)["cc/short"]["tokens"] == 70
    assert limits.used(60.0)["cc/short"]["tokens"] == 30
    limits.take(target, 60, 60.0)
    limits.settle(target, -50, 60.0, 61.0)
    assert limits.used(61.0)["cc/short"]["tokens"] == 40
    limits.settle(target, -50, 60.0, 62.0)  # no more than it took is given back
    assert limits.used(62.0)["cc/short"]["tokens"] == 30
    limits.settle(target, -5, 0.0, 63.0)  # and nothing of what is forgotten
    assert limits.used(63.0)["cc/short"]["tokens"] == 30
    limits.settle(Fleet().target("aa"), 5, 0.0, 1.0)
    assert list(limits.used(200.0).values()) == [{"requests": 0, "tokens": 0}]


@pytest.mark.parametrize("seed", range(10))
def test_no_minute_ever_holds_more_than_its_limits(seed: int) -> None:
    rng, limits = random.Random(seed), Limits()
    target = Fleet().target("cc", "limited")
    [(_, rule)] = target.limits
    assert rule == RateLimit(requests_per_minute=3, tokens_per_minute=1000)
    now, sent = 0.0, list[tuple[float, int]]()
    for _ in range(300):
        now += rng.random() * 15
        tokens = rng.randrange(1, 700)
        wait_s = limits.wait_s(target, tokens, now)
        if wait_s and rng.random() < 0.5:
            now += wait_s
            wait_s = limits.wait_s(target, tokens, now)
            assert wait_s < 1e-6  # nobody else asked: it is its turn after that wait
            now += wait_s
        if not wait_s:
            limits.take(target, tokens, now)
            sent.append((now, tokens))
            last = [spent for at, spent in sent if at > now - 60 + 1e-6]
            assert len(last) <= 3 and sum(last) <= 1000
    assert len(sent) > 60


# --- what is measured


def test_nothing_is_known_of_who_was_never_asked() -> None:
    meter = Meter()
    assert meter.speed(Fleet().target("aa"), NOW) == Speed()
    assert meter.all(NOW) == {}


@pytest.mark.parametrize(
    ("waits", "median"),
    [([5.0], 5.0), ([3.0, 1.0, 2.0], 2.0), ([9.0, 0.1, 0.3, 0.2, 99.0], 0.3)],
)
def test_the_median_of_an_hour_counts(waits: list[float], median: float) -> None:
    meter, target = Meter(), Fleet().target("aa")
    for n, wait_s in enumerate(waits):
        meter.answered(target, True, wait_s, wait_s * 10, NOW + n)
    speed = meter.speed(target, NOW + 10)
    assert (speed.ttft_s, speed.tokens_per_s) == (median, median * 10)
    assert (speed.answers, speed.failures, speed.uptime) == (len(waits), 0, 1.0)


def test_the_uptime_is_the_share_of_attempts_that_were_answered() -> None:
    meter, target = Meter(), Fleet().target("aa")
    meter.failed(target, NOW)
    assert meter.speed(target, NOW) == Speed(None, None, 0.0, 0, 1)
    for _ in range(3):
        meter.answered(target, False, 1.0, None, NOW)
    assert meter.speed(target, NOW) == Speed(1.0, None, 0.75, 3, 1)
    assert meter.all(NOW)["aa/m"] == {
        "p50_ttft_ms": 1000.0,
        "tokens_per_s": None,
        "uptime": 0.75,
        "answers": 3,
        "failures": 1,
    }


def test_streams_alone_tell_the_first_tokens_time_once_there_are_some() -> None:
    meter, target = Meter(), Fleet().target("aa")
    for _ in range(9):
        meter.answered(target, False, 8.0, 5.0, NOW)
    assert meter.speed(target, NOW).ttft_s == 8.0
    meter.answered(target, True, 0.2, None, NOW)
    assert meter.speed(target, NOW)[:2] == (0.2, 5.0)


def test_accounts_of_a_provider_are_measured_together_and_models_apart() -> None:
    fleet, meter = Fleet(), Meter()
    one, two = fleet.router.resolve("bb:m", CHAT_OP).chain
    meter.answered(one, True, 0.5, 10, NOW)
    assert meter.speed(two, NOW).ttft_s == 0.5
    assert meter.speed(fleet.target("bb", "t"), NOW) == Speed()


def test_after_an_hour_what_was_measured_is_forgotten_bit_by_bit() -> None:
    fleet = Fleet()
    meter, target = fleet.health.meter, fleet.target("aa", "t")
    meter.failed(target, 0.0)
    meter.answered(target, True, 9.0, 1, 100.0)
    meter.answered(target, True, 0.1, 9, 1000.0)
    assert meter.speed(target, 3500.0).failures == 1
    assert meter.speed(target, 3650.0)[2:] == (1.0, 2, 0)
    assert meter.speed(target, 3800.0) == Speed(0.1, 9, 1.0, 1, 0)
    assert meter.speed(target, 4700.0) == Speed()
    assert meter.all(4700.0) == {}
    for provider in ("bb", "cc"):
        meter.answered(fleet.target(provider, "t"), True, 0.5, 1, 4700.0)
    assert fleet.order("t:latency", now=4700.0) == "abc"  # it is new again


def test_a_busy_targets_figures_are_never_more_than_a_second_old() -> None:
    meter, target = Meter(), Fleet().target("aa")
    for n in range(400):
        meter.answered(target, True, 1.0, 1, NOW + n / 1000)
    assert meter.speed(target, NOW + 1).ttft_s == 1.0
    for n in range(500):
        meter.answered(target, True, 0.1, 1, NOW + 1 + n / 1000)
        meter.speed(target, NOW + 1 + n / 1000)
    assert meter.speed(target, NOW + 2.6).ttft_s == 0.1


# --- what vendors say of their limits


def openai(
    what: str, left: float | str, limit: float | str = 100, reset: str = "30s"
) -> dict[str, str]:
    facts = {"remaining": left, "limit": limit, "reset": reset}
    return {f"x-ratelimit-{fact}-{what}": str(value) for fact, value in facts.items()}


def anthropic(what: str, left: float, reset: str, limit: float = 100) -> dict[str, str]:
    facts = {"remaining": left, "limit": limit, "reset": reset}
    return {f"anthropic-ratelimit-{what}-{fact}": str(value) for fact, value in facts.items()}


WALL = 1_794_990_400.0  # 2026-11-18T08:26:40Z
# fmt: off
ROOMS: list[tuple[dict[str, str], list[tuple[str, float, float, float]]]] = [
    # what a vendor says                              (what, left, limit, seconds to its reset)
    (openai("requests", 59, 60, "1s"),                [("requests", 59, 60, 1)]),
    (openai("tokens", 149984, 150000, "6m0s"),        [("tokens", 149984, 150000, 360)]),
    (openai("requests", 5, 10, "20ms"),               [("requests", 5, 10, 0.02)]),
    (openai("requests", 5, 10, "1h2m3.5s"),           [("requests", 5, 10, 3600)]),
    # Groq: requests by the day, tokens by the minute
    (openai("requests", 14370, 14400, "2m59.56s") | openai("tokens", 17997, 18000, "7.66s"),
     [("requests", 14370, 14400, 179.56), ("tokens", 17997, 18000, 7.66)]),
    (anthropic("requests", 999, "2026-11-18T08:26:41Z", 1000), [("requests", 999, 1000, 1)]),
    (anthropic("tokens", 8, "2026-11-18T08:27:40Z") | anthropic(
        "input-tokens", 7, "2026-11-18T08:27:40+00:00") | anthropic(
        "output-tokens", 6, "2026-11-18T09:27:10+01:00"),
     [("tokens", 8, 100, 60), ("input-tokens", 7, 100, 60), ("output-tokens", 6, 100, 30)]),
    ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "9"},
     [("requests", 5, 0, 9)]),
    (anthropic("requests", 0, "2026-11-18T08:26:39Z"), []),   # that was before
    (anthropic("requests", 0, "tomorrow"),             []),
    (openai("requests", "many"),                       []),
    (openai("requests", 5, "none"),                    []),
    (openai("requests", -1),                           []),
    (openai("requests", "inf"),                        []),
    (openai("requests", 0, 10, ""),                    []),
    (openai("images", 0),                              []),
    (openai("requests", "nan"),                        []),
    (openai("requests", 0, 10, "soon"),                []),
    ({"x-ratelimit-remaining-requests": "0"},          []),
    ({},                                               []),
]
# fmt: on


@pytest.mark.parametrize(("headers", "rooms"), ROOMS)
def test_what_vendors_say_of_their_limits_is_read(
    headers: dict[str, str], rooms: list[tuple[str, float, float, float]]
) -> None:
    found = [
        (room.what, room.left, room.limit, room.until - NOW)
        for room in rooms_in(headers, NOW, WALL)
    ]
    assert [one[:3] for one in found] == [one[:3] for one in rooms]
    assert [one[3] for one in found] == pytest.approx([one[3] for one in rooms])


# fmt: off
NEAR = [
    # what a vendor says                                near?
    (openai("requests", 100, 100),                      False),
    (openai("requests", 3, 100),                        False),
    (openai("requests", 2, 100),                        True),
    (openai("requests", 0, 100),                        True),
    (openai("requests", 2, 0),                          False),
    (openai("requests", 1, 0),                          True),
    (openai("tokens", 2000, 100_000),                   True),
    (openai("tokens", 2001, 100_000),                   False),
    (openai("requests", 90) | openai("tokens", 0),      True),
    (anthropic("output-tokens", 2, "2026-11-18T08:27:10Z"), True),
    (anthropic("output-tokens", 3, "2026-11-18T08:27:10Z"), False),
]
# fmt: on


@pytest.mark.parametrize(("headers", "near"), NEAR)
def test_who_has_next_to_nothing_left_goes_after_the_others_until_its_reset(
    headers: dict[str, str], near: bool
) -> None:
    fleet = Fleet()
    target = fleet.target("aa")
    fleet.health.saw(target, headers, NOW, WALL)
    assert fleet.health.is_near_limit(target, NOW + 1) is near
    assert fleet.order("m", now=NOW + 1) == ("bca" if near else "abc")
    assert fleet.order("m", now=NOW + 1, first=target.key) == ("bca" if near else "abc")
    assert fleet.health.room(NOW + 1)["aa/m"]
    assert fleet.order("m", now=NOW + 31) == "abc"
    assert not fleet.health.is_near_limit(target, NOW + 31) and fleet.health.room(NOW + 31) == {}
    assert not fleet.health.troubled


def test_requests_that_are_on_their_way_count_against_what_is_left() -> None:
    fleet = Fleet()
    target = fleet.target("aa")
    fleet.health.saw(target, openai("requests", 4), NOW, WALL)
    for _ in range(2):
        assert not fleet.health.is_near_limit(target, NOW + 1)
        fleet.health.begin(target, NOW + 1, 5.0)
    assert fleet.health.is_near_limit(target, NOW + 1)


def test_the_newest_word_of_a_vendor_counts() -> None:
    fleet = Fleet()
    target = fleet.target("aa")
    for left, near in ((0, True), (50, False), (1, True)):
        fleet.health.saw(target, openai("requests", left), NOW, WALL)
        assert fleet.health.is_near_limit(target, NOW) is near
    fleet.health.saw(target, {}, NOW, WALL)  # an answer that says nothing changes nothing
    assert fleet.health.is_near_limit(target, NOW)
    said = fleet.health.room(NOW + 10)
    assert said == {"aa/m": {"requests": {"left": 1, "limit": 100, "resets_in_s": 20.0}}}


def test_each_limit_of_a_vendor_counts_until_its_own_reset() -> None:
    fleet = Fleet()
    target = fleet.target("aa")
    told = openai("requests", 0, reset="10s") | openai("tokens", 50, reset="1m")
    fleet.health.saw(target, told, NOW, WALL)
    assert fleet.health.is_near_limit(target, NOW + 9)
    assert not fleet.health.is_near_limit(target, NOW + 11)
    assert list(fleet.health.room(NOW + 11)["aa/m"]) == ["tokens"]


def test_who_cools_down_goes_after_who_is_near_a_limit() -> None:
    fleet = Fleet()
    fleet.health.saw(fleet.target("bb"), openai("requests", 0), NOW, WALL)
    fleet.health.failed(fleet.target("aa"), UpstreamKeyRefused("no"), NOW)
    names = [target.name for target in fleet.choose("m").chain]
    assert names == ["bb:2", "cc", "bb:1", "aa"]


def test_a_json_of_the_status_page_can_be_written() -> None:
    fleet = Fleet()
    fleet.health.saw(fleet.target("aa"), openai("tokens", 5), NOW, WALL)
    fleet.health.limits.take(fleet.target("cc", "limited"), 5, NOW)
    fleet.measure("aa", 0.5, 10)
    health = fleet.health
    shown = json.dumps([health.room(NOW), health.limits.used(NOW), health.meter.all(NOW)])
    assert "aa/m" in shown and "cc/limited" in shown and "aa/t" in shown
