"""OpenAI Chat Completions: requests, answers, errors, the signs of life of a stream."""

from __future__ import annotations

import base64
import copy
import io
import json
import wave
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
from support import state_after

from bitrouter import (
    CHAT,
    PCM,
    RESPONSES,
    AnswerLabel,
    ApiProtocol,
    BadRequest,
    BitrouterError,
    Block,
    Choice,
    Citation,
    Codec,
    Content,
    Delta,
    Finish,
    Finished,
    Gatherer,
    Kind,
    Loss,
    Losses,
    Media,
    Message,
    Opaque,
    Open,
    OutputFormat,
    Prompt,
    Reasoning,
    Refusal,
    Sampling,
    SseEvent,
    StreamPart,
    StreamState,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Traits,
    UpstreamError,
    UpstreamUnfit,
    Usage,
    Voice,
    parts_of,
)

noted = partial(state_after, CHAT)


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


USAGES = [
    # usage as sent                                                  inclusive counts
    ({"prompt_tokens": 9, "completion_tokens": 4}, Usage(9, 4)),
    (
        {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}},
        Usage(9, 4, 6),
    ),
    (
        {
            "prompt_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 5},
        },
        Usage(9, 0, 0, 5),
    ),
    (
        {"completion_tokens": 30, "completion_tokens_details": {"reasoning_tokens": 24}},
        Usage(0, 30, 0, 0, 24),
    ),
    ({"prompt_tokens": 9, "completion_tokens": 4, "prompt_cache_hit_tokens": 8}, Usage(9, 4, 8)),
    ({"input_tokens": 12, "output_tokens": 3}, Usage(12, 3)),
    ({"prompt_tokens": 9, "total_tokens": 9, "completion_tokens_details": None}, Usage(9)),
    ({"prompt_tokens": "many", "completion_tokens": -1, "prompt_tokens_details": []}, Usage()),
    (None, None),
    (7, None),
]


@pytest.mark.parametrize(("usage", "wanted"), USAGES)
def test_usage_is_read_inclusively(usage: Any, wanted: Usage | None) -> None:
    assert CHAT.usage({"usage": usage}) == wanted


SUBSTANCE = {
    "text": delta(content="a"),
    "a space": delta(content=" "),
    "reasoning_content": delta(reasoning_content="hm"),
    "reasoning": delta(reasoning="hm"),
    "reasoning_details": delta(reasoning_details=[{"index": 0, "type": "reasoning.encrypted"}]),
    "a refusal": delta(refusal="no"),
    "a tool call": delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": ""}}]),
    "a legacy call": delta(function_call={"name": "f"}),
    "audio": delta(audio={"data": "AAAA"}),
    "a second choice": {"choices": [{"delta": {}}, {"delta": {"content": "a"}}]},
    "legacy text": {"choices": [{"text": "a", "index": 0}]},
    "a finish": delta(finish="stop"),
}
NO_SUBSTANCE = {
    "a role": delta(role="assistant", content=""),
    "a role without text": delta(role="assistant", content=None),
    "an empty delta": delta(),
    "no delta": {"choices": [{"index": 0, "delta": None, "finish_reason": None}]},
    "no choice": {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
    "no choices": {"choices": None},
    "usage alone": {"choices": [], "usage": {"prompt_tokens": 1}},
    "an empty list of calls": delta(tool_calls=[]),
    "empty reasoning": delta(reasoning_content=""),
    "an error": {"error": {"message": "x"}},
}


@pytest.mark.parametrize("chunk", SUBSTANCE.values(), ids=SUBSTANCE)
def test_substance_starts_a_stream(chunk: Any) -> None:
    assert noted(chunk).started


@pytest.mark.parametrize("chunk", NO_SUBSTANCE.values(), ids=NO_SUBSTANCE)
def test_what_is_not_substance_does_not(chunk: Any) -> None:
    assert not noted(chunk).started


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter", "eos"])
def test_any_finish_reason_finishes(reason: str) -> None:
    state = noted(delta(content="a"), delta(finish=reason))
    assert state.finished and not state.ended


def test_a_null_finish_reason_finishes_nothing() -> None:
    assert not noted(delta(content="a")).finished


def test_the_last_usage_told_counts() -> None:
    state = noted({"choices": [], "usage": {"prompt_tokens": 1}}, {"usage": {"prompt_tokens": 3}})
    CHAT.note(state, {"choices": [], "usage": None})
    assert state.usage == Usage(3)


# kind -> status and type of the error object
ERRORS = [
    (Kind.INVALID_REQUEST, 400, "invalid_request_error"),
    (Kind.AUTH, 401, "invalid_request_error"),
    (Kind.BILLING, 402, "billing_error"),
    (Kind.PERMISSION, 403, "permission_error"),
    (Kind.NOT_FOUND, 404, "invalid_request_error"),
    (Kind.TOO_LARGE, 413, "invalid_request_error"),
    (Kind.RATE_LIMIT, 429, "rate_limit_error"),
    (Kind.OVERLOADED, 503, "service_unavailable_error"),
    (Kind.INTERNAL, 500, "server_error"),
    (Kind.BAD_GATEWAY, 502, "server_error"),
    (Kind.TIMEOUT, 504, "server_error"),
    (Kind.UNSUPPORTED, 501, "invalid_request_error"),
]


OPENAI = pytest.mark.parametrize("codec", [CHAT, RESPONSES], ids=["chat", "responses"])


@OPENAI
@pytest.mark.parametrize(("kind", "status", "word"), ERRORS)
def test_an_error_has_openai_s_shape(codec: Codec, kind: Kind, status: int, word: str) -> None:
    error = UpstreamError("said", status=status, kind=kind, code="c", param="p")
    shape = {"message": "said", "type": word, "param": "p", "code": "c"}
    assert codec.render_error(error) == {"error": shape}
    assert codec.render_status(error) == status


def test_all_four_keys_are_there_even_when_one_says_nothing() -> None:
    error = CHAT.render_error(BitrouterError("said"))["error"]
    assert error["param"] is None and set(error) == {"message", "type", "param", "code"}


def test_further_facts_go_beside_the_message() -> None:
    error = CHAT.render_error(BadRequest("said", extra={"variable": "K"}))["error"]
    assert error["variable"] == "K" and error["message"] == "said"


@OPENAI
def test_openai_knows_no_529(codec: Codec) -> None:
    assert codec.render_status(UpstreamError("x", status=529, kind=Kind.OVERLOADED)) == 503


PARSED = [
    # body                                                      message, words, status
    (
        {"error": {"message": "m", "type": "T", "param": "p", "code": "C"}},
        ("m", {"t", "c", "p"}, 0),
    ),
    ({"error": {"message": "m", "code": 429}}, ("m", set(), 429)),
    ({"error": {"message": "m", "status": 503, "code": "x"}}, ("m", {"x"}, 503)),
    ({"error": {"message": "m", "code": 1234}}, ("m", set(), 0)),
    ({"error": {"detail": "m"}}, ("m", set(), 0)),
    ({"error": "just text"}, ("just text", set(), 0)),
    ({"error": {"message": None, "type": None}}, ("", set(), 0)),
]


@pytest.mark.parametrize(("body", "wanted"), PARSED)
def test_many_likenesses_of_an_error_are_understood(body: Any, wanted: Any) -> None:
    facts = CHAT.parse_error(body)
    assert facts is not None
    assert (facts.message, facts.words, facts.status) == wanted


@pytest.mark.parametrize("body", [{}, {"error": None}, {"error": ""}, {"error": {}}])
def test_no_error_is_no_error(body: Any) -> None:
    assert CHAT.parse_error(body) is None


STANDS_FOR = [
    # wire: platform.openai.com/docs/guides/error-codes: what an error inside a 200 stands for
    ({"type": "rate_limit_error", "code": "rate_limit_exceeded"}, 429),
    ({"type": "insufficient_quota", "code": "insufficient_quota"}, 429),
    ({"type": "service_unavailable_error", "code": "server_is_overloaded"}, 503),
    ({"type": "invalid_request_error", "code": "context_length_exceeded"}, 400),
]


@pytest.mark.parametrize(("error", "status"), STANDS_FOR)
def test_an_error_in_a_stream_stands_for_its_status(error: Any, status: int) -> None:
    state = noted({"error": {"message": "m", **error}})
    assert state.error is not None and state.error.status == status


def test_a_framed_event_is_one_data_line() -> None:
    framed = CHAT.frame(SseEvent(b'{"a":1}', "completion"))
    assert framed == b'data: {"a":1}\n\n' and CHAT.strict(framed)


OF_NOTE = [
    delta(finish="stop"),
    {"choices": [], "usage": {"prompt_tokens": 1}},
    {"error": {"message": "m"}},
]


@pytest.mark.parametrize("chunk", OF_NOTE)
@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")], ids=["tight", "loose"])
def test_what_is_of_note_is_never_called_dull(chunk: Any, spaces: tuple[str, str]) -> None:
    dull = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}],"usage":null}\n\n'
    assert CHAT.dull(dull)
    assert not CHAT.dull(dull + f"data: {json.dumps(chunk, separators=spaces)}\n\n".encode())
    assert not CHAT.dull(dull + CHAT.end_mark)


def test_a_stream_fails_with_an_error_object_and_no_end_mark() -> None:
    raw = CHAT.fail_stream(UpstreamError("broke", code="upstream_disconnected"), StreamState(), b"")
    event = json.loads(raw.removeprefix(b"data: "))
    assert raw.endswith(b"}\n\n") and raw.count(b"\n") == 2 and b"[DONE]" not in raw
    assert event["error"]["code"] == "upstream_disconnected"


def test_a_keepalive_is_a_comment() -> None:
    assert CHAT.comments and CHAT.heartbeat.startswith(b":") and CHAT.heartbeat.endswith(b"\n\n")


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None}, {"object": "list"}])
def test_an_answer_without_choices_is_no_answer(body: Any) -> None:
    assert CHAT.what_is_missing(body) == "choices"


# --- requests that come in

PORT: dict[str, Any] = {"type": "object", "properties": {"port": {}}, "required": ["port"]}
SCHEMA = {**PORT, "additionalProperties": False}
FUNCTION = {"name": "tide", "description": "d", "parameters": SCHEMA, "strict": True}
TIDE = Tool("tide", "d", SCHEMA, True)
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: A"}
SPELT_GRAMMAR = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: A"}}
SQL = Tool("sql", kind="custom", format=GRAMMAR)
CUSTOM = {"type": "custom", "custom": {"name": "sql", "format": SPELT_GRAMMAR}}
PNG = "iVBORw0KGgo="
WAV = Media("audio", "audio/wav", "UklGRg==")
PDF = Media("document", "application/pdf", "JVBERi0=", name="a.pdf")
GIF = Media("image", "image/gif", url="https://x.example/a.gif")


def asked(*content: Any, **more: Any) -> Prompt:
    return Prompt("m", (Message("user", content or (Text("hi"),)),), **more)


def parsed(*messages: Any, **fields: Any) -> Prompt:
    said = list(messages) or [{"role": "user", "content": "hi"}]
    return CHAT.parse_request({"model": "m", "messages": said, **fields})


def named(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


CHOSEN = ToolChoice("named", ("f",))
OUTPUT = OutputFormat("json_schema", "o", "d", SCHEMA, True)
SHAPE = {"name": "o", "description": "d", "schema": SCHEMA, "strict": True}
FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # what is asked, what it means
    ({"stream": True}, {"stream": True}),
    ({"stream_options": {"include_usage": True}}, {"wants_usage": True}),
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_tokens": 5, "max_completion_tokens": 0}, {"max_tokens": 0}),
    ({"stop": "END"}, {"sampling": Sampling(stop=("END",))}),
    (
        {"temperature": 0, "top_p": 0.5, "top_k": 4, "seed": -1, "n": 2, "stop": ["a", "b"],
         "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"5": 1}},
        {"sampling": Sampling(0, 0.5, 4, -1, -1, 2, {"5": 1}, ("a", "b"), 2)},
    ),
    ({"logprobs": True}, {"sampling": Sampling(logprobs=0)}),
    ({"logprobs": True, "top_logprobs": 3}, {"sampling": Sampling(logprobs=3)}),
    ({"logprobs": False, "n": None, "seed": None}, {}),
    ({"tools": [{"type": "function", "function": FUNCTION}, CUSTOM]}, {"tools": (TIDE, SQL)}),
    ({"tool_choice": "required"}, {"tool_choice": ToolChoice("required")}),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"tool_choice": CHOSEN}),
    ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, {"tool_choice": CHOSEN}),
    ({"tool_choice": named("f", "g")}, {"tool_choice": ToolChoice("allowed", ("f", "g"))}),
    ({"tool_choice": named("f", mode="required")},
     {"tool_choice": ToolChoice("allowed", ("f",), True)}),
    ({"parallel_tool_calls": False}, {"parallel_tools": False}),
    ({"functions": [FUNCTION], "function_call": {"name": "tide"}},
     {"tools": (TIDE,), "tool_choice": ToolChoice("named", ("tide",)), "legacy_functions": True}),
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"output": OutputFormat("json_object")}),
    ({"response_format": {"type": "json_schema", "json_schema": SHAPE}}, {"output": OUTPUT}),
    ({"reasoning_effort": "low"}, {"thinking": Thinking("low", visible=True)}),
    ({"reasoning_effort": "none"}, {"thinking": Thinking("none", visible=False)}),
    ({"reasoning": {"max_tokens": 9, "exclude": True}},
     {"thinking": Thinking("", 9, visible=False)}),
    ({"reasoning": {"enabled": False}}, {"thinking": Thinking("none", visible=False)}),
    ({"verbosity": "low", "service_tier": "flex"}, {"verbosity": "low", "tier": "flex"}),
    ({"user": "u", "safety_identifier": "s"}, {"user": "s"}),
    ({"user": "u", "prompt_cache_key": "k"}, {"user": "u", "cache_key": "k"}),
    ({"metadata": {"a": "b"}, "store": True}, {"metadata": {"a": "b"}, "store": True}),
    ({"foo": {"a": 1}, "bar": None}, {"extra": {"foo": {"a": 1}}}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "meaning"), FIELDS)
def test_a_request_becomes_a_prompt(fields: Any, meaning: dict[str, Any]) -> None:
    assert parsed(**fields) == asked(wants_usage=False)._replace(**meaning)


def call(name: str = "tide", ident: str = "c1", text: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": text}, **more}


def said(content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def a(kind: str, **facts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": kind, **facts}]}


IMAGE = Media("image", "image/png", PNG, detail="low")
IMAGE_URL = {"url": f"data:image/png;base64,{PNG}", "detail": "low"}
DATA_URL = "data:application/pdf;base64,JVBERi0="
SQL_CALL = {"id": "c", "type": "custom", "custom": {"name": "sql", "input": "select"}}
SIGNED = {"google": {"thought_signature": "c2ln"}}
MESSAGES: list[tuple[dict[str, Any], list[Content]]] = [
    (a("text", text="t"), [Text("t")]),
    ({"role": "user", "content": None}, []),
    (a("text", text="t", cache_control={"type": "ephemeral"}), [Text("t", cache="5m")]),
    (a("image_url", image_url=IMAGE_URL), [IMAGE]),
    (a("image_url", image_url="https://x.example/a.gif"), [GIF]),
    (a("input_audio", input_audio={"data": "UklGRg==", "format": "wav"}), [WAV]),
    (a("file", file={"file_data": DATA_URL, "filename": "a.pdf"}), [PDF]),
    (a("file", file={"file_data": "JVBERi0=", "filename": "a.pdf"}), [PDF]),
    (a("file", file={"file_id": "f"}), [Media("document", file_id="f", vendor="openai")]),
    (said(refusal="no"), [Refusal("no")]),
    (said([{"type": "refusal", "refusal": "no"}]), [Refusal("no")]),
    (said("t", reasoning_content="hm"), [Reasoning("hm"), Text("t")]),
    # what SDKs add to a message of theirs
    (said("t", refusal=None, annotations=None, audio=None, function_call=None, parsed=None),
     [Text("t")]),
    (said(tool_calls=[call(index=0, parsed=None)]), [ToolCall("c1", "tide", "{}")]),
    (said(tool_calls=[call(text={"a": 1})]), [ToolCall("c1", "tide", '{"a": 1}')]),
    (said(tool_calls=[SQL_CALL]), [ToolCall("c", "sql", "select", True)]),
    (said(tool_calls=[call(extra_content={**SIGNED, "via": "bitrouter:google"})]),
     [ToolCall("c1", "tide", "{}", opaque=Opaque("google", "thought", "c2ln"))]),
]  # fmt: skip


@pytest.mark.parametrize(("message", "content"), MESSAGES)
def test_a_message_is_made_of_parts(message: Any, content: list[Any]) -> None:
    assert parsed(message).messages == (Message(message["role"], tuple(content)),)


def test_results_know_the_tools_that_they_come_from() -> None:
    calls = {"role": "assistant", "tool_calls": [call(), call("moon", "c2")]}
    results = [
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "full"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "low"},
    ]
    _, moon, tide = parsed(calls, *results).messages
    assert moon == Message("user", (ToolResult("c2", (Text("full"),), name="moon"),))
    assert tide == Message("user", (ToolResult("c1", (Text("low"),), name="tide"),))


def test_a_function_s_result_belongs_to_its_latest_call() -> None:
    def turn(said: str) -> list[dict[str, Any]]:
        legacy = {"name": "tide", "arguments": said}
        answer = {"role": "function", "name": "tide", "content": said}
        return [{"role": "assistant", "content": None, "function_call": legacy}, answer]

    contents = [m.content[0] for m in parsed(*turn("1"), *turn("2")).messages]
    ids = [getattr(one, "id", getattr(one, "call_id", "")) for one in contents]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_roles_and_names_are_kept_in_place() -> None:
    given = [
        {"role": role, "content": role, "name": "n"} for role in ("user", "system", "developer")
    ]
    assert [(m.role, m.name) for m in parsed(*given).messages] == [(m["role"], "n") for m in given]


USER = {"role": "user", "content": "hi"}
ORPHAN = {"role": "tool", "tool_call_id": "c", "content": "x"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [USER, 5]}, "messages[1]"),
    ({"messages": [USER, {"role": "robot"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [a("image_url", image_url={})]}, "messages[0].content[0].image_url.url"),
    ({"messages": [a("input_audio", input_audio={})]}, "messages[0].content[0].input_audio.data"),
    ({"messages": [a("film")]}, "messages[0].content[0].type"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ({"messages": [USER, ORPHAN]}, "messages[1].tool_call_id"),
    ({"messages": [said(tool_calls=[{"function": {"name": "f"}}])]},
     "messages[0].tool_calls[0].id"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"n": 1.5}, "n"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"logit_bias": []}, "logit_bias"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].name"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom.name"),
    ({"tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"reasoning_effort": 5}, "reasoning_effort"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_cannot_be_read_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        CHAT.parse_request({"model": "m", "messages": [USER], **fields})
    assert caught.value.param == param and param in caught.value.message


# --- requests that go out

ALL_SAMPLING = Sampling(1.5, 0.5, None, 7, -1.0, 1.0, {"5": 1}, ("END",), 2, 3)
STATE = Opaque("chat:?", "reasoning.text|x", "c2ln")
CONVERSATION = (
    Message("system", (Text("s"),)),
    Message("developer", (Text("d"),), "n"),
    Message("user", (Text("t"), IMAGE, WAV, PDF)),
    Message("assistant", (Reasoning("hm", STATE), Text("t"), ToolCall("c1", "tide", "{}"))),
    Message("user", (ToolResult("c1", (Text("low"),), name="tide"),)),
    Message("assistant", (ToolCall("c2", "sql", "select", True),)),
    Message("user", (ToolResult("c2", (Text("1"),), name="sql"),)),
    Message("assistant", (Refusal("no"),)),
)
ROUND_TRIPS = {
    "sampling": asked(sampling=ALL_SAMPLING, max_tokens=9),
    "a stream": asked(stream=True),
    "tools": asked(tools=(TIDE, SQL), tool_choice=ToolChoice("auto"), parallel_tools=False),
    "a named tool": asked(tools=(TIDE,), tool_choice=ToolChoice("named", ("tide",))),
    "allowed tools": asked(tools=(TIDE,), tool_choice=ToolChoice("allowed", ("tide",), True)),
    "a schema": asked(output=OUTPUT),
    "JSON": asked(output=OutputFormat("json_object")),
    "how to answer": asked(thinking=Thinking("low", visible=True), verbosity="high", tier="flex"),
    "whose it is": asked(user="u", cache_key="k", metadata={"a": "b"}, store=False),
    "an unknown field": asked(extra={"foo": [1]}),
    "a conversation": Prompt("m", CONVERSATION),
}
OFFICIAL = Traits(official=True, developer_role=True, max_tokens_field="max_completion_tokens")


def sent(prompt: Prompt, traits: Traits = OFFICIAL, losses: Losses | None = None) -> dict[str, Any]:
    body = CHAT.render_request(prompt, traits, losses or Losses())
    return dict(json.loads(json.dumps(body)))


@pytest.mark.parametrize("prompt", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_all_that_the_protocol_can_say_survives_it(prompt: Prompt) -> None:
    back = CHAT.parse_request(sent(prompt))
    assert back == prompt._replace(wants_usage=prompt.stream)


def test_a_custom_tool_is_chosen_as_one() -> None:
    prompt = asked(tools=(SQL,), tool_choice=ToolChoice("named", ("sql",)))
    assert sent(prompt)["tool_choice"] == {"type": "custom", "custom": {"name": "sql"}}


NO_ARGUMENTS = {"name": "f", "parameters": {"type": "object", "properties": {}}}
THOUGHT = Prompt("m", (Message("assistant", (Reasoning("hm"), Text("t"))),))
WITH_TRAITS: list[tuple[Prompt, Traits, dict[str, Any]]] = [
    # prompt, target, what it is sent
    (asked(max_tokens=5), Traits(), {"max_tokens": 5}),
    (asked(max_tokens=5), OFFICIAL, {"max_completion_tokens": 5}),
    (asked(user="u"), Traits(), {"user": "u"}),
    (asked(user="u"), OFFICIAL, {"safety_identifier": "u"}),
    (asked(thinking=Thinking("max")), Traits(efforts=("low",)), {"reasoning_effort": "low"}),
    (asked(thinking=Thinking("none")), Traits(efforts=("high",)), {"reasoning_effort": "high"}),
    (asked(stream=True, wants_usage=False), Traits(), {"stream_options": {"include_usage": True}}),
    (asked(extra={"foo": 1}), Traits(), {"foo": 1}),
    (asked(tools=(Tool("f"),)), Traits(),
     {"tools": [{"type": "function", "function": NO_ARGUMENTS}]}),
    (asked(tools=(Tool("sql", kind="custom"),)), Traits(),
     {"tools": [{"type": "custom", "custom": {"name": "sql", "format": {"type": "text"}}}]}),
    (Prompt("m", (Message("developer", (Text("d"),)),)), Traits(),
     {"messages": [{"role": "system", "content": "d"}]}),
    (THOUGHT, Traits(), {"messages": [said("t")]}),
    (asked(Media("document", file_id="f"), Media("document", "text/csv", "YSxi")), Traits(),
     {"messages": [{"role": "user", "content": [
         {"type": "file", "file": {"file_id": "f"}}, {"type": "text", "text": "a,b"}]}]}),
    (THOUGHT, Traits(echoes_reasoning=True), {"messages": [said("t", reasoning_content="hm")]}),
    (Prompt("m", (Message("assistant", (ToolCall("c", "f"),)),)), Traits(),
     {"messages": [said(tool_calls=[call("f", "c")])]}),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "traits", "wanted"), WITH_TRAITS)
def test_a_target_is_asked_in_its_own_way(prompt: Prompt, traits: Traits, wanted: Any) -> None:
    body = sent(prompt, traits)
    assert {key: body.get(key) for key in wanted} == wanted
    spare = {"max_tokens", "max_completion_tokens", "user", "safety_identifier"} - {*wanted}
    assert spare.isdisjoint(body) and None not in body.values()


@pytest.mark.parametrize("field", ["tool_choice", "parallel_tool_calls", "foo"])
def test_what_makes_no_sense_there_is_not_sent(field: str) -> None:
    prompt = asked(source=ApiProtocol.MESSAGES, tool_choice=ToolChoice("auto"))
    assert field not in sent(prompt._replace(parallel_tools=False, extra={"foo": 1}))


def test_a_strict_schema_is_closed_or_else_not_strict() -> None:
    losses, open_ended = Losses(), {"type": "object", "properties": {"a": {}}}
    output = OUTPUT._replace(schema=PORT)
    closed = sent(asked(output=output), losses=losses)["response_format"]["json_schema"]
    assert closed["schema"] == SCHEMA and not losses.found
    output = OUTPUT._replace(schema=open_ended, name="two words")
    loose = sent(asked(output=output), losses=losses)["response_format"]["json_schema"]
    assert (loose["name"], loose["strict"], loose["schema"]) == ("two_words", False, open_ended)
    assert losses.found == [Loss("strict_schema_unsupported", "response_format")]


def test_what_a_result_shows_comes_after_the_last_result() -> None:
    failed = ToolResult("c2", (Text("no"),), is_error=True)
    results = Message("user", (ToolResult("c1", (Text("see"), IMAGE)), failed))
    messages = (results, Message("user", (Text("well?"),)))
    one, other, shown, after = sent(Prompt("m", messages))["messages"]
    assert one["content"].startswith("see\n[the file") and other["content"] == "Error: no"
    assert [part["type"] for part in shown["content"]] == ["text", "image_url"]
    assert (one["role"], other["role"], shown["role"]) == ("tool", "tool", "user")
    assert after == {"role": "user", "content": "well?"}


@pytest.mark.parametrize(
    "media", [Media("video", "video/mp4", "AAAA"), Media("image", file_id="f")]
)
def test_media_that_have_no_place_make_the_target_unfit(media: Media) -> None:
    with pytest.raises(UpstreamUnfit) as caught:
        sent(asked(media))
    assert (caught.value.code, caught.value.param) == ("unsupported_modality", media.kind)


# --- answers that come in: accents of compatible servers


def tool_delta(**facts: Any) -> dict[str, Any]:
    return delta(role="assistant", tool_calls=[facts])


def function(text: str, name: str | None = None) -> dict[str, Any]:
    return {"arguments": text, **({"name": name} if name else {})}


def gathered(parts: Iterable[StreamPart]) -> tuple[Block, ...]:
    gatherer = Gatherer()
    for part in parts:
        gatherer.add(part)
    return gatherer.choices()[0].content


BOTH = (ToolCall("c1", "f", '{"a":1}'), ToolCall("c2", "g", "{}"))
ACCENTS = {
    "role, id and name in each chunk": [
        tool_delta(index=0, id="c1", type="function", function=function('{"a":', "f")),
        tool_delta(index=0, id="c1", type="function", function=function("1}", "f")),
        tool_delta(index=1, id="c2", type="function", function=function("{}", "g")),
    ],
    "no index": [
        tool_delta(id="c1", function=function('{"a":', "f")),
        tool_delta(function=function("1}")),
        tool_delta(id="c2", function=function("{}", "g")),
    ],
    "one index for all": [
        tool_delta(index=0, id="c1", function=function('{"a":1}', "f")),
        tool_delta(index=0, id="c2", function=function("{}", "g")),
    ],
    "indices from 1": [
        tool_delta(index=1, id="c1", function=function('{"a":1}', "f")),
        tool_delta(index=2, id="c2", function=function("{}", "g")),
    ],
    "the name again, without its id": [
        tool_delta(index=0, id="c1", function=function('{"a":', "f")),
        tool_delta(index=0, id=None, function=function("1}", "f")),
        tool_delta(index=1, id="c2", function=function("{}", "g")),
    ],
    "both calls in one chunk": [
        delta(tool_calls=[
            {"index": 0, "id": "c1", "function": function('{"a":1}', "f")},
            {"index": 0, "id": "c2", "function": function("{}", "g")},
        ]),
    ],
}  # fmt: skip
ENDING = delta(finish="stop")


@pytest.mark.parametrize("chunks", ACCENTS.values(), ids=ACCENTS)
def test_an_accent_is_understood(chunks: list[Any]) -> None:
    decoder = CHAT.decoder("v")
    assert gathered(p for c in [*copy.deepcopy(chunks), ENDING] for p in decoder.feed(c)) == BOTH


def accumulated(chunks: Iterable[Any]) -> dict[str, Any]:
    """The message that OpenAI's SDK makes of a stream: what has no index or type is added up."""

    def add(old: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, list):
                entries = old.setdefault(key, [])
                for entry in value:
                    entries += [{}] if entry["index"] == len(entries) else []
                    add(entries[entry["index"]], entry)
            elif isinstance(value, dict):
                add(old.setdefault(key, {}), value)
            elif key in ("index", "type") or old.get(key) is None:
                old[key] = value
            elif value is not None:
                old[key] += value

    message: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            add(message, choice["delta"])
    return message


@pytest.mark.parametrize("chunks", ACCENTS.values(), ids=ACCENTS)
def test_an_accent_is_mended_for_sdks(chunks: list[Any]) -> None:
    state, mended = StreamState(), []
    for chunk in copy.deepcopy([*chunks, ENDING]):
        changed = CHAT.mend(state, chunk)
        mended.append(chunk if changed is None else changed)
    message = accumulated(mended)
    calls = [
        ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"])
        for c in message["tool_calls"]
    ]
    assert tuple(calls) == BOTH and message["role"] == "assistant"
    assert mended[-1]["choices"][0]["finish_reason"] == "tool_calls"


def mended_all(*chunks: Any) -> list[Any]:
    state = StreamState()
    return [CHAT.mend(state, chunk) for chunk in chunks]


def test_what_is_well_stays_as_it_is() -> None:
    first = delta(
        role="assistant", tool_calls=[{"index": 0, "id": "c1", "function": function("", "f")}]
    )
    more = delta(tool_calls=[{"index": 0, "function": function("{}")}])
    usage = {"choices": [], "usage": {"prompt_tokens": 1}}
    assert mended_all(first, more, delta(finish="tool_calls"), usage) == [None] * 4


def test_a_role_that_a_call_lacks_is_put_in_and_one_repeated_is_taken_out() -> None:
    first = delta(tool_calls=[{"index": 0, "id": "c1", "function": function("{}", "f")}])
    put_in, taken_out = mended_all(first, delta(role="assistant", content="b"))
    assert put_in["choices"][0]["delta"]["role"] == "assistant"
    assert taken_out["choices"][0]["delta"] == {"content": "b"}


def test_nothing_travels_after_the_usage() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 1}}
    assert mended_all(usage, {"choices": []}, dict(usage)) == [None, {}, None]


def test_stop_after_calls_in_a_whole_answer_is_mended() -> None:
    answer = {"choices": [{"message": {"tool_calls": [call()]}, "finish_reason": "stop"}]}
    [changed] = mended_all(answer)
    assert changed["choices"][0]["finish_reason"] == "tool_calls"


ODD_DELTAS: list[tuple[list[dict[str, Any]], tuple[Block, ...]]] = [
    ([{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]},
      {"content": [{"type": "text", "text": "t"}]}], (Reasoning("hm"), Text("t"))),
    ([{"reasoning": "h"}, {"reasoning_content": "m"}, {"content": "t"}],
     (Reasoning("hm"), Text("t"))),
    ([{"content": "t"}, {"reasoning": "hm"}], (Text("t"), Reasoning("hm"))),
    ([{"function_call": {"name": "f", "arguments": "{"}}, {"function_call": {"arguments": "}"}}],
     (ToolCall("", "f", "{}"),)),
    ([{"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": {"a": 1}}}]}],
     (ToolCall("c", "f", '{"a": 1}'),)),
    ([{"tool_calls": [{"index": 0, "id": "c", "custom": {"name": "f", "input": "a"}}]},
      {"tool_calls": [{"index": 0, "custom": {"input": "b"}}]}], (ToolCall("c", "f", "ab", True),)),
    ([{"content": None, "refusal": "n"}, {"refusal": "o"}], (Refusal("no"),)),
]  # fmt: skip


@pytest.mark.parametrize(("deltas", "content"), ODD_DELTAS)
def test_a_delta_of_any_kind_is_read(deltas: Any, content: tuple[Block, ...]) -> None:
    decoder = CHAT.decoder("v")
    fed = [part for one in deltas for part in decoder.feed(delta(**one))]
    assert gathered([*fed, *decoder.finish()]) == content


# --- answers that go out

BLOCKS: list[Block] = [
    Reasoning("hm", Opaque("anthropic", "signature", "c2ln")),
    Text("Hello"),
    ToolCall("call_1", "f", '{"a":1}'),
    ToolCall("call_2", "g"),
]
LABEL = AnswerLabel("abc", 1_764_000_000, "m")
PLAIN = asked()


def encoded(prompt: Prompt = PLAIN, blocks: Iterable[Block] = BLOCKS) -> bytes:
    encoder = CHAT.encoder(prompt, LABEL)
    parts = [part for key, block in enumerate(blocks) for part in parts_of(block, key)]
    end = Finished(Finish.TOOL_CALLS)
    return b"".join([*map(encoder.encode, [*parts, end]), encoder.end(Usage(5, 2))])


def chunks_of(raw: bytes) -> list[Any]:
    *events, done, nothing = raw.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def deltas_of(raw: bytes) -> list[Any]:
    return [c["choices"][0]["delta"] for c in chunks_of(raw) if c["choices"]]


def test_a_rendered_stream_says_each_role_id_and_name_once() -> None:
    deltas = deltas_of(encoded())
    calls = [call for d in deltas for call in d.get("tool_calls", [])]
    opened = [(c["index"], c["id"], c["type"], c["function"]["name"]) for c in calls if "id" in c]
    assert opened == [(0, "call_1", "function", "f"), (1, "call_2", "function", "g")]
    assert [d["role"] for d in deltas if "role" in d] == ["assistant"] and "role" in deltas[0]
    assert sum("name" in c["function"] or "type" in c for c in calls) == 2


def test_a_call_without_arguments_says_so() -> None:
    calls = accumulated(chunks_of(encoded()))["tool_calls"]
    assert [one["function"]["arguments"] for one in calls] == ['{"a":1}', "{}"]


def test_a_rendered_stream_keeps_its_id_and_model() -> None:
    chunks = chunks_of(encoded())
    facts = {(c["id"], c["object"], c["created"], c["model"]) for c in chunks}
    assert facts == {("chatcmpl-abc", "chat.completion.chunk", 1_764_000_000, "m")}
    assert all(isinstance(c["choices"], list) for c in chunks)


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_is_the_last_chunk_and_only_if_wanted(wanted: bool) -> None:
    *chunks, last = chunks_of(encoded(PLAIN._replace(wants_usage=wanted)))
    assert (last["choices"] == [] and CHAT.usage(last) == Usage(5, 2)) is wanted
    assert {chunk.get("usage", "no key") for chunk in chunks} == {None if wanted else "no key"}


def test_the_finish_comes_with_an_empty_delta() -> None:
    *chunks, last, _ = chunks_of(encoded())
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "tool_calls")
    assert {c["choices"][0]["finish_reason"] for c in chunks} == {None}


def test_choices_are_introduced_in_order() -> None:
    encoder = CHAT.encoder(PLAIN, LABEL)
    parts: list[StreamPart] = [Open(0, Text(), 1), Delta(0, "b"), Open(1, Text(), 0), Delta(1, "a")]
    raw = b"".join([*map(encoder.encode, parts), encoder.end(Usage())])
    told = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in chunks_of(raw)[:-1]]
    role = {"role": "assistant", "content": ""}
    assert told == [(0, role), (1, role), (1, {"content": "b"}), (0, {"content": "a"})]


SECRET = Opaque("openai", "encrypted", "ZW5j", id="rs_1")
CITED = (Citation("https://a.example/", "A", 0, 3), Citation("https://b.example/", "B", 1, 2))
ADDED_UP: list[tuple[str, tuple[Block, ...]]] = [
    ("reasoning_details", (Reasoning("hm", SECRET), Reasoning("", SECRET))),
    ("annotations", (Text("one", CITED),)),
    ("annotations", (Text("one"), Text("two", CITED[:1]))),
    ("images", (IMAGE, IMAGE._replace(mime="image/gif"))),
]


def whole_message(blocks: Iterable[Block], prompt: Prompt = PLAIN) -> dict[str, Any]:
    choice = Choice(tuple(blocks), Finished(Finish.STOP))
    answer = CHAT.render_response(prompt, LABEL, [choice], Usage(), Losses())
    return dict(answer["choices"][0]["message"])


@pytest.mark.parametrize(("name", "blocks"), ADDED_UP)
def test_lists_add_up_to_what_a_whole_answer_says(name: str, blocks: tuple[Block, ...]) -> None:
    streamed, whole = accumulated(chunks_of(encoded(blocks=blocks))), whole_message(blocks)
    for one in [*streamed[name], *whole[name]]:
        one.pop("index", None)
    assert streamed[name] == whole[name]


# --- speech

SAMPLES = [b"\x01\x02" * 3, b"\x03\x04"]
SPOKEN = [Media("audio", PCM, base64.b64encode(one).decode()) for one in SAMPLES]


def test_speech_comes_back_in_the_form_that_was_asked_for() -> None:
    raw = whole_message(SPOKEN, PLAIN._replace(voice=Voice("alloy", "pcm16")))["audio"]
    assert base64.b64decode(raw["data"]) == b"".join(SAMPLES)
    assert (raw["transcript"], raw["expires_at"] > LABEL.created) == ("", True)
    told = whole_message(SPOKEN, PLAIN._replace(voice=Voice("alloy", "wav")))["audio"]
    with wave.open(io.BytesIO(base64.b64decode(told["data"]))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        assert file.readframes(99) == b"".join(SAMPLES)


def test_speech_is_streamed_piece_by_piece_under_one_id() -> None:
    pieces = [d["audio"] for d in deltas_of(encoded(blocks=SPOKEN)) if "audio" in d]
    assert [base64.b64decode(piece["data"]) for piece in pieces] == SAMPLES
    assert len({piece["id"] for piece in pieces}) == 1


def test_speech_that_a_provider_sends_is_read_with_its_transcript() -> None:
    data = SPOKEN[0].data
    whole = {"message": {"audio": {"id": "a", "data": data, "transcript": "Hi"}}}
    parts = CHAT.decoder("chat:x").whole({"choices": [{**whole, "finish_reason": "stop"}]})
    assert gathered(parts) == (Text("Hi"), SPOKEN[0])
    decoder = CHAT.decoder("chat:x")
    streamed = [delta(audio={"id": "a", "transcript": "H"}), delta(audio={"transcript": "i"})]
    streamed += [delta(audio={"data": one.data}) for one in SPOKEN]
    parts = [part for chunk in streamed for part in decoder.feed(chunk)]
    assert gathered([*parts, *decoder.finish()]) == (Text("Hi"), *SPOKEN)


def test_speech_that_was_not_kept_cannot_be_spoken_of_again() -> None:
    turn = {"role": "assistant", "audio": {"id": "audio_1"}}
    with pytest.raises(BadRequest, match="transcript") as refused:
        CHAT.parse_request({"model": "m", "messages": [turn]})
    assert refused.value.param == "messages[0].audio"


# --- cache marks

MARK = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}


def test_a_cache_mark_is_written_on_the_part_that_bears_it() -> None:
    messages = (
        Message("system", (Text("s"), Text("t", cache="1h"))),
        Message("user", (Text("a", cache="5m"),)),
        Message("assistant", (ToolCall("c", "f"),)),
        Message("user", (ToolResult("c", (Text("r"),), name="f", cache="5m"), Text("b"))),
    )
    prompt = PLAIN._replace(messages=messages, source=ApiProtocol.MESSAGES)
    body = CHAT.render_request(prompt, Traits(), Losses())
    text = {"type": "text"}
    assert [message.get("content") for message in body["messages"]] == [
        [{**text, "text": "s"}, {**text, "text": "t", **MARK}],
        [{**text, "text": "a", **MARK}],
        None,
        [{**text, "text": "r", **MARK}],
        "b",
    ]


def test_a_stream_that_cannot_go_on_ends_with_an_error_object() -> None:
    encoder = CHAT.encoder(PLAIN, LABEL)
    encoder.encode(Open(0, Text()))
    error = UpstreamError("broke", code="upstream_disconnected")
    assert encoder.fail(error) == CHAT.fail_stream(error, StreamState(), b"")


def rendered(prompt: Prompt, *choices: Choice) -> Any:
    return CHAT.render_response(prompt, LABEL, list(choices), Usage(5, 2), Losses())


def test_a_rendered_answer_has_all_that_sdks_require() -> None:
    finished = Finished(Finish.TOOL_CALLS, raw="tool_use")
    answer = rendered(PLAIN, Choice(tuple(BLOCKS), finished))
    head = {"id": "chatcmpl-abc", "object": "chat.completion", "created": 1_764_000_000}
    assert {key: answer[key] for key in head} == head and answer["model"] == "m"
    [choice] = answer["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "tool_calls")
    assert (choice["native_finish_reason"], choice["logprobs"]) == ("tool_use", None)
    message = choice["message"]
    plain = {"role": "assistant", "content": "Hello", "refusal": None, "reasoning_content": "hm"}
    assert {key: message[key] for key in plain} == plain
    assert [c["id"] for c in message["tool_calls"]] == ["call_1", "call_2"]


def test_who_speaks_of_functions_is_answered_in_functions() -> None:
    prompt = PLAIN._replace(legacy_functions=True)
    answer = rendered(prompt, Choice((BLOCKS[2],), Finished(Finish.TOOL_CALLS)))["choices"][0]
    called = {"name": "f", "arguments": '{"a":1}'}
    assert answer["message"]["function_call"] == called and "tool_calls" not in answer["message"]
    chunks = chunks_of(encoded(prompt, BLOCKS[2:3]))
    assert accumulated(chunks)["function_call"] == called
    assert answer["finish_reason"] == chunks[-2]["choices"][0]["finish_reason"] == "function_call"


@pytest.mark.parametrize(("ours", "kept"), [({}, SIGNED), ({"via": "bitrouter:google"}, None)])
def test_state_on_calls_goes_back_to_its_vendor_alone(ours: Any, kept: Any) -> None:
    one = call(extra_content={**SIGNED, **ours})
    body = {"messages": [said(tool_calls=[one])]}
    assert CHAT.sealed(body) and CHAT.unseal(body, "chat:v") is (kept is None)
    assert one.get("extra_content") == kept
