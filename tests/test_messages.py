"""Anthropic Messages: requests, answers, errors, the signs of life of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
from support import named_event, read_wire, state_after

from bitrouter import (
    MESSAGES,
    AnswerLabel,
    ApiProtocol,
    BadRequest,
    Block,
    Choice,
    Content,
    Finish,
    Finished,
    Gatherer,
    Kind,
    Loss,
    Losses,
    Media,
    Message,
    Native,
    Opaque,
    OutputFormat,
    Prompt,
    Reasoning,
    Refusal,
    Sampling,
    SseEvent,
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
    parse_event,
    parts_of,
    seal,
)

noted = partial(state_after, MESSAGES)


def start(**usage: Any) -> dict[str, Any]:
    return {"type": "message_start", "message": {"content": [], "usage": usage}}


def block(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": 0, "content_block": {"type": kind, **more}}


def last(stop: str | None = "end_turn", **usage: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": usage}


USAGES = [
    ({"input_tokens": 9, "output_tokens": 4}, Usage(9, 4)),
    ({"input_tokens": 9, "cache_read_input_tokens": 100}, Usage(109, 0, 100)),
    ({"input_tokens": 9, "cache_creation_input_tokens": 50}, Usage(59, 0, 0, 50)),
    (
        {
            "input_tokens": 9,
            "cache_creation_input_tokens": 50,
            "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 30},
        },
        Usage(59, 0, 0, 50, 0, 30),
    ),
    (
        {"cache_creation_input_tokens": 5, "cache_creation": {"ephemeral_1h_input_tokens": 99}},
        Usage(5, 0, 0, 5, 0, 5),
    ),
    (
        {"input_tokens": 1, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 4},
        Usage(7, 0, 2, 4),
    ),
    ({"output_tokens": 9, "output_tokens_details": {"thinking_tokens": 7}}, Usage(0, 9, 0, 0, 7)),
    ({"input_tokens": 9, "cache_read_input_tokens": None}, Usage(9)),
    (None, None),
    ("none", None),
]


@pytest.mark.parametrize(("usage", "wanted"), USAGES)
def test_usage_is_made_inclusive(usage: Any, wanted: Usage | None) -> None:
    assert MESSAGES.usage({"usage": usage}) == wanted


RUNNING = {
    "the output is replaced": (
        start(input_tokens=9, output_tokens=1),
        {"output_tokens": 7},
        (9, 7),
    ),
    "the input comes last": (start(input_tokens=0, output_tokens=1), {"input_tokens": 5}, (5, 1)),
    "null says nothing": (
        start(input_tokens=9),
        {"input_tokens": None, "output_tokens": 7},
        (9, 7),
    ),
    "the cache is kept": (
        start(input_tokens=9, cache_read_input_tokens=100),
        {"output_tokens": 7},
        (109, 7, 100),
    ),
    "no start": ({"type": "ping"}, {"input_tokens": 9, "output_tokens": 7}, (9, 7)),
}


@pytest.mark.parametrize(("first", "usage", "wanted"), RUNNING.values(), ids=RUNNING)
def test_what_a_later_event_does_not_name_keeps_its_value(
    first: Any, usage: Any, wanted: Any
) -> None:
    assert noted(first, last(**usage)).usage == Usage(*wanted)


SUBSTANCE = {
    "thinking": block("thinking", thinking=""),
    "redacted thinking": block("redacted_thinking", data="b3BhcXVl"),
    "a tool": block("tool_use", name="f", input={}),
    "a server tool": block("server_tool_use", name="web_search"),
    "text": {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}},
    "a signature": {"type": "content_block_delta", "delta": {"type": "signature_delta"}},
    "a stop": last(output_tokens=0),
    "the end": {"type": "message_stop"},
}
NO_SUBSTANCE = {
    "message_start": start(input_tokens=9),
    "a ping": {"type": "ping"},
    "an empty text block": block("text", text=""),
    "the end of a block": {"type": "content_block_stop", "index": 0},
    "an error": {"type": "error", "error": {"type": "api_error", "message": "x"}},
    "an event of tomorrow": {"type": "message_metrics"},
    "no type": {},
}


@pytest.mark.parametrize("event", SUBSTANCE.values(), ids=SUBSTANCE)
def test_substance_starts_a_stream(event: Any) -> None:
    assert noted(event).started


@pytest.mark.parametrize("event", NO_SUBSTANCE.values(), ids=NO_SUBSTANCE)
def test_what_is_not_substance_does_not(event: Any) -> None:
    assert not noted(event).started


def test_a_text_block_that_opens_does_not_undo_a_start() -> None:
    assert noted(block("thinking"), block("text")).started


def test_a_stop_reason_finishes_and_message_stop_ends() -> None:
    state = noted(start(), last("max_tokens"))
    assert state.finished and not state.ended
    MESSAGES.note(state, {"type": "message_stop"})
    assert state.ended


def test_a_delta_without_a_stop_reason_finishes_nothing() -> None:
    assert not noted(last(None)).finished


STANDS_FOR = [
    ("invalid_request_error", 400),
    ("authentication_error", 401),
    ("billing_error", 402),
    ("permission_error", 403),
    ("not_found_error", 404),
    ("request_too_large", 413),
    ("rate_limit_error", 429),
    ("api_error", 500),
    ("timeout_error", 504),
    ("overloaded_error", 529),
    ("an_error_of_tomorrow", 0),
]


@pytest.mark.parametrize(("kind", "status"), STANDS_FOR)
def test_an_error_in_a_stream_stands_for_its_status(kind: str, status: int) -> None:
    error = noted({"type": "error", "error": {"type": kind, "message": "m"}}).error
    assert error is not None and (error.message, error.status) == ("m", status)
    assert error.words == {kind}


@pytest.mark.parametrize(
    "event", [{"type": "error"}, {"type": "error", "error": "x"}, {"error": {"message": "x"}}]
)
def test_an_error_in_an_odd_form_is_an_error(event: Any) -> None:
    assert noted(event).error is not None


def test_a_spend_limit_is_told_by_its_code() -> None:
    error = {"type": "rate_limit_error", "details": {"error_code": "Enforced_Spend_Limit_Reached"}}
    facts = MESSAGES.parse_error({"error": error})
    assert facts is not None and "enforced_spend_limit_reached" in facts.words


ERRORS = [
    (Kind.INVALID_REQUEST, 400, "invalid_request_error"),
    (Kind.AUTH, 401, "authentication_error"),
    (Kind.BILLING, 402, "billing_error"),
    (Kind.PERMISSION, 403, "permission_error"),
    (Kind.NOT_FOUND, 404, "not_found_error"),
    (Kind.TOO_LARGE, 413, "request_too_large"),
    (Kind.RATE_LIMIT, 429, "rate_limit_error"),
    (Kind.OVERLOADED, 529, "overloaded_error"),
    (Kind.INTERNAL, 500, "api_error"),
    (Kind.BAD_GATEWAY, 502, "api_error"),
    (Kind.TIMEOUT, 504, "timeout_error"),
    (Kind.UNSUPPORTED, 501, "invalid_request_error"),
]


@pytest.mark.parametrize(("kind", "status", "word"), ERRORS)
def test_an_error_has_anthropic_s_shape(kind: Kind, status: int, word: str) -> None:
    error = UpstreamError("said", status=status, kind=kind, code="c", extra={"variable": "K"})
    details = {"error_code": "c", "variable": "K"}
    shape = {"type": word, "message": "said", "details": details}
    assert MESSAGES.render_error(error) == {"type": "error", "error": shape}
    assert MESSAGES.render_status(error) == status


def test_an_overloaded_503_is_anthropic_s_529_and_any_other_is_not() -> None:
    assert MESSAGES.render_status(UpstreamError("x", status=503, kind=Kind.OVERLOADED)) == 529
    assert MESSAGES.render_status(UpstreamError("x", status=503)) == 503


NAMED = [
    (b'{"type":"message_stop"}', "", "message_stop"),
    (b'{"index":0, "type" : "content_block_stop"}', "", "content_block_stop"),
    (b'{"type":"ping"}', "kept", "kept"),
    (b'{"delta":{"type":"text_delta"},"type":"content_block_delta"}', "", "content_block_delta"),
]


@pytest.mark.parametrize(("data", "event", "name"), NAMED)
def test_an_event_is_named_by_its_own_type(data: bytes, event: str, name: str) -> None:
    framed = MESSAGES.frame(SseEvent(data, event))
    assert parse_event(framed) == SseEvent(data, name) and MESSAGES.strict(framed)


def test_the_end_mark_of_another_protocol_does_not_travel() -> None:
    assert MESSAGES.frame(SseEvent(b"[DONE]")) == b""


OF_NOTE = [start(input_tokens=1), last(), {"type": "message_stop"}, {"type": "error", "error": {}}]


@pytest.mark.parametrize("event", OF_NOTE)
@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")], ids=["tight", "loose"])
def test_what_is_of_note_is_never_called_dull(event: Any, spaces: tuple[str, str]) -> None:
    dull = named_event({"type": "content_block_delta", "delta": {"text": "a"}})
    data = json.dumps(event, separators=spaces).encode()
    assert MESSAGES.dull(dull)
    assert not MESSAGES.dull(dull + b"event: x\ndata: " + data + b"\n\n")


def test_a_stream_fails_with_an_error_event() -> None:
    raw = MESSAGES.fail_stream(UpstreamError("broke"), StreamState(), b"")
    event = parse_event(raw)
    assert event is not None and event.event == "error" and MESSAGES.strict(raw)
    assert json.loads(event.data)["error"]["type"] == "api_error"


def test_a_keepalive_is_a_ping() -> None:
    event = parse_event(MESSAGES.heartbeat)
    assert event is not None and event.event == "ping"
    assert json.loads(event.data) == {"type": "ping"}


@pytest.mark.parametrize("body", [{}, {"content": None}, {"content": "text"}])
def test_an_answer_without_content_is_no_answer(body: Any) -> None:
    assert MESSAGES.what_is_missing(body) == "content"


def test_an_empty_content_is_an_answer() -> None:
    assert MESSAGES.what_is_missing({"content": []}) == ""


# --- requests that come in

ME = ApiProtocol.MESSAGES
SCHEMA = {"type": "object", "properties": {"port": {}}, "required": ["port"]}
CLOSED = {**SCHEMA, "additionalProperties": False}
TIDE = Tool("tide", "d", SCHEMA)
FUNCTION = {"name": "tide", "description": "d", "input_schema": SCHEMA}
SEARCH = {"type": "web_search_20260209", "name": "web_search", "max_uses": 2}
MARK = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
OUTPUT = OutputFormat("json_schema", schema=CLOSED, strict=True)
SHAPE = {"type": "json_schema", "schema": CLOSED}
HI = Message("user", (Text("hi"),))


def asked(*content: Any, source: ApiProtocol = ME, **more: Any) -> Prompt:
    return Prompt("m", (Message("user", content or (Text("hi"),)),), source, **more)


def parsed(*messages: Any, **fields: Any) -> Prompt:
    said = list(messages) or [{"role": "user", "content": "hi"}]
    return MESSAGES.parse_request({"model": "m", "messages": said, **fields})


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # what is asked, what it means
    ({"stream": True, "max_tokens": 5}, {"stream": True, "max_tokens": 5}),
    ({"temperature": 1, "top_p": 0.5, "top_k": 4, "stop_sequences": ["a", "b"]},
     {"sampling": Sampling(1, 0.5, 4, stop=("a", "b"))}),
    ({"system": "s"}, {"messages": (Message("system", (Text("s"),)), HI)}),
    ({"system": ""}, {}),
    ({"system": [{"type": "text", "text": "s", "cache_control": HOUR}]},
     {"messages": (Message("system", (Text("s", cache="1h"),)), HI)}),
    ({"system": [{"type": "text", "text": "x-anthropic-billing-header: x"}]}, {}),
    ({"tools": [FUNCTION, {**FUNCTION, "type": "custom", "strict": True, "cache_control": MARK}]},
     {"tools": (TIDE, TIDE._replace(strict=True, cache="5m"))}),
    ({"tools": [SEARCH]},
     {"tools": (Tool("web_search", kind="hosted", native=Native(ME, SEARCH)),)}),
    ({"tool_choice": {"type": "any"}}, {"tool_choice": ToolChoice("required")}),
    ({"tool_choice": {"type": "tool", "name": "f"}}, {"tool_choice": ToolChoice("named", ("f",))}),
    ({"tool_choice": {"type": "none"}}, {"tool_choice": ToolChoice("none")}),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
     {"tool_choice": ToolChoice("auto"), "parallel_tools": False}),
    ({"output_config": {"format": SHAPE, "effort": "low"}},
     {"output": OUTPUT, "thinking": Thinking("low")}),
    ({"output_format": SHAPE}, {"output": OUTPUT}),
    ({"thinking": {"type": "enabled", "budget_tokens": 4096}},
     {"thinking": Thinking("low", 4096, visible=True)}),
    ({"thinking": {"type": "adaptive", "display": "omitted"}},
     {"thinking": Thinking("", None, True, False)}),
    ({"thinking": {"type": "disabled"}}, {"thinking": Thinking("none", visible=False)}),
    ({"metadata": {"user_id": "u"}, "service_tier": "auto"}, {"user": "u", "tier": "auto"}),
    ({"cache_control": MARK}, {"cache": "5m"}),
    ({"container": "c", "foo": None}, {"extra": {"container": "c"}}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "meaning"), FIELDS)
def test_a_request_becomes_a_prompt(fields: Any, meaning: dict[str, Any]) -> None:
    assert parsed(**fields) == asked()._replace(**meaning)


def image(**source: Any) -> dict[str, Any]:
    return {"type": "image", "source": source}


def document(**source: Any) -> dict[str, Any]:
    return {"type": "document", "source": source, "title": "a.pdf"}


SIGNED = Opaque("anthropic", "signature", "c2ln")
JPEG, PDF = "/9j/4AAQ", "JVBERi0="
USE = {"type": "tool_use", "id": "t1", "name": "tide", "input": {"port": "Brest"}}
CALL = ToolCall("t1", "tide", '{"port":"Brest"}')
FOUND = {"type": "search_result", "title": "T", "source": "https://x.example/",
         "content": [{"type": "text", "text": "low"}]}  # fmt: skip
PAGES = [{"type": "text", "text": "one"}, image(type="url", url="https://x.example/a.png")]
SERVED = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
CONTENTS: list[tuple[Any, list[Content]]] = [
    ({"type": "text", "text": "t", "cache_control": HOUR}, [Text("t", cache="1h")]),
    # what it is declared to be is not what it is
    (image(type="base64", media_type="image/png", data=JPEG), [Media("image", "image/jpeg", JPEG)]),
    (image(type="url", url="https://x.example/a.png"),
     [Media("image", "image/png", url="https://x.example/a.png")]),
    (image(type="file", file_id="f"), [Media("image", file_id="f", vendor="anthropic")]),
    (document(type="base64", media_type="application/pdf", data=PDF),
     [Media("document", "application/pdf", PDF, name="a.pdf")]),
    (document(type="text", media_type="text/plain", data="é"),
     [Media("document", "text/plain", "w6k=", name="a.pdf")]),
    (document(type="content", content=PAGES),
     [Text("one"), Media("image", "image/png", url="https://x.example/a.png")]),
    (FOUND, [Text("T\nhttps://x.example/\n\nlow")]),
    (USE, [CALL]),
    ({**USE, "input": None}, [CALL._replace(arguments="{}")]),
    ({"type": "thinking", "thinking": "hm", "signature": "c2ln"}, [Reasoning("hm", SIGNED)]),
    ({"type": "thinking", "thinking": "", "signature": seal(Opaque("openai", "encrypted", "x"))},
     [Reasoning("", Opaque("openai", "encrypted", "x"))]),
    ({"type": "redacted_thinking", "data": "cmVk"},
     [Reasoning("", Opaque("anthropic", "redacted", "cmVk"))]),
    (SERVED, [Native(ME, SERVED)]),
]  # fmt: skip


@pytest.mark.parametrize(("block", "content"), CONTENTS)
def test_a_message_is_made_of_blocks(block: Any, content: list[Content]) -> None:
    for role in ("user", "assistant"):
        assert parsed({"role": role, "content": [block]}).messages == (
            Message(role, tuple(content)),
        )


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content, **more}


SHOWN = [{"type": "text", "text": "see"}, image(type="base64", media_type="image/jpeg", data=JPEG)]
RESULTS: list[tuple[Any, ToolResult]] = [
    (result("low"), ToolResult("t1", (Text("low"),), name="tide")),
    (result(None), ToolResult("t1", (), name="tide")),
    (result([], is_error=True), ToolResult("t1", (), True, "tide")),
    (result(SHOWN),
     ToolResult("t1", (Text("see"), Media("image", "image/jpeg", JPEG)), name="tide")),
    (result([FOUND]), ToolResult("t1", (Text("T\nhttps://x.example/\n\nlow"),), name="tide")),
]  # fmt: skip


@pytest.mark.parametrize(("block", "content"), RESULTS)
def test_a_result_knows_the_tool_that_it_comes_from(block: Any, content: ToolResult) -> None:
    said = {"role": "assistant", "content": [USE]}
    assert parsed(said, {"role": "user", "content": [block]}).messages[1].content == (content,)


def saying(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (saying("x"), "messages[0].content[0]"),
    (saying({"text": "x"}), "messages[0].content[0].type"),
    (saying({"type": "text"}), "messages[0].content[0].text"),
    (saying({"type": "image"}), "messages[0].content[0].source"),
    (saying(image(type="magic")), "messages[0].content[0].source.type"),
    (saying(image(type="base64", data=5)), "messages[0].content[0].source.data"),
    (saying({**USE, "id": 5}), "messages[0].content[0].id"),
    (saying(result("x")), "messages[0].content.tool_use_id"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image"}]}, "system[0].text"),
    ({"max_tokens": "x"}, "max_tokens"),
    ({"tools": [{"type": "custom"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"thinking": "hard"}, "thinking"),
    ({"stop_sequences": [5]}, "stop_sequences[0]"),
    ({"thread": {"id": "x"}}, "thread"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_cannot_be_read_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        MESSAGES.parse_request({"model": "m", **asked_plainly(), **fields})
    assert caught.value.param == param and param in caught.value.message


def asked_plainly() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}]}


# --- requests that go out

CONVERSATION = (
    Message("system", (Text("s", cache="1h"),)),
    Message("user", (Text("t", cache="5m"), Media("image", "image/jpeg", JPEG),
                     Media("document", "application/pdf", PDF, name="a.pdf"))),
    Message("assistant", (Reasoning("hm", SIGNED), Text("t"), CALL,
                          Reasoning("", Opaque("anthropic", "redacted", "cmVk")))),
    Message("user", (ToolResult("t1", (Text("see"), Media("image", url="https://x.example/")),
                                True, "tide", cache="5m"), Text("well?"))),
    Message("assistant", (Native(ME, SERVED),)),
    Message("user", (Text("go on"),)),
)  # fmt: skip
ADAPTIVE = Traits(thinking="adaptive", efforts=("low", "high"))
ROUND_TRIPS = {
    "sampling": asked(sampling=Sampling(0.5, 0.5, 4, stop=("a",)), max_tokens=16, stream=True),
    "tools": asked(tools=(TIDE._replace(cache="5m"),), parallel_tools=False,
                   tool_choice=ToolChoice("required")),
    "a named tool": asked(tools=(TIDE,), tool_choice=ToolChoice("named", ("tide",))),
    "no tool": asked(tools=(TIDE,), tool_choice=ToolChoice("none")),
    "a schema": asked(output=OUTPUT),
    "thinking": asked(thinking=Thinking("high", adaptive=True, visible=True)),
    "no thinking": asked(thinking=Thinking("none", visible=False)),
    "whose it is": asked(user="u", tier="auto", cache="1h", extra={"container": "c"}),
    "system in the middle": Prompt("m", (HI, Message("system", (Text("s"),)),
                                         Message("assistant", (Text("a"),))), ME),
    "a conversation": Prompt("m", CONVERSATION, ME, tools=(TIDE,)),
}  # fmt: skip


def sent(prompt: Prompt, traits: Traits = ADAPTIVE, losses: Losses | None = None) -> dict[str, Any]:
    body = MESSAGES.render_request(prompt, traits, losses or Losses())
    return dict(json.loads(json.dumps(body)))


@pytest.mark.parametrize("prompt", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_all_that_the_protocol_can_say_survives_it(prompt: Prompt) -> None:
    limit = prompt.max_tokens or 8192
    assert MESSAGES.parse_request(sent(prompt)) == prompt._replace(max_tokens=limit)


CC = ApiProtocol.CHAT_COMPLETIONS
BUDGET = Traits(thinking="budget", max_output=9000)
ALWAYS = ADAPTIVE._replace(can_stop_thinking=False)
ODD_SCHEMA = {"anyOf": [SCHEMA], "properties": {"a": {}}}


def thinks(effort: str = "", budget: int | None = None, **more: Any) -> Prompt:
    return asked(thinking=Thinking(effort, budget), **more)


def used(name: str, schema: Any, **more: Any) -> dict[str, Any]:
    return {"tools": [{"name": name, "input_schema": schema, **more}]}


def turned(*messages: Message) -> Prompt:
    return Prompt("m", messages, CC)


EMPTY = {"type": "object", "properties": {}}
ASSISTANT, RESULT = Message("assistant", (CALL,)), Message("user", (ToolResult("t1"),))
ASKED_FOR: list[tuple[Prompt, Traits, dict[str, Any]]] = [
    # prompt, target, what it is sent
    (asked(), Traits(max_output=64_000), {"max_tokens": 64_000}),
    (asked(), Traits(), {"max_tokens": 8192}),
    (asked(source=CC, extra={"foo": 1}), Traits(), {"foo": None}),
    (asked(tier="default"), Traits(), {"service_tier": "standard_only"}),
    (asked(tier="fast"), Traits(), {"speed": "fast", "service_tier": None}),
    (thinks("medium"), ADAPTIVE,
     {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}),
    (thinks("minimal"), ADAPTIVE, {"output_config": {"effort": "low"}}),
    (thinks("none"), ADAPTIVE, {"thinking": {"type": "disabled"}, "output_config": None}),
    (thinks("none"), ALWAYS, {"thinking": None, "output_config": {"effort": "low"}}),
    (thinks("low"), BUDGET, {"thinking": {"type": "enabled", "budget_tokens": 2048}}),
    (thinks("", 5000), BUDGET, {"thinking": {"type": "enabled", "budget_tokens": 5000}}),
    (thinks("", 500), BUDGET, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    (thinks("max"), BUDGET, {"thinking": {"type": "enabled", "budget_tokens": 8999}}),
    (thinks("max", max_tokens=1024), BUDGET, {"thinking": None}),
    (thinks("low", sampling=Sampling(0.5)), BUDGET, {"temperature": None}),
    (thinks("low", tools=(TIDE,), tool_choice=ToolChoice("required")), BUDGET, {"thinking": None}),
    (asked(output=OUTPUT, thinking=Thinking("low")), ADAPTIVE,
     {"output_config": {"effort": "low", "format": SHAPE}}),
    (asked(tools=(Tool("f"),)), Traits(), used("f", EMPTY)),
    (asked(tools=(TIDE._replace(strict=True, description=""),)), Traits(),
     used("tide", CLOSED, strict=True)),
    (asked(tools=(Tool("f", "", ODD_SCHEMA),)), Traits(),
     used("f", {"type": "object", "properties": {"a": {}}})),
    (asked(tools=(Tool("web_search", kind="hosted"),)), Traits(),
     {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    (asked(tools=(TIDE,), parallel_tools=False), Traits(),
     {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
    (asked(tools=(TIDE,), tool_choice=ToolChoice("none"), parallel_tools=False), Traits(),
     {"tool_choice": {"type": "none"}}),
    # tools that were called are declared, but not on offer
    (turned(HI, ASSISTANT, RESULT), Traits(),
     {**used("tide", EMPTY), "tool_choice": {"type": "none"}}),
    # a conversation begins with the user, in turns, and with something in each
    (turned(Message("system", (Text("s"),)), Message("developer", (Text("d"),)), HI), Traits(),
     {"system": "s\n\nd", "messages": [{"role": "user", "content": "hi"}]}),
    (turned(Message("assistant", (Text("a  \n"),))), Traits(),
     {"messages": [{"role": "user", "content": "."},
                   {"role": "assistant", "content": "a"}]}),
    (turned(HI, Message("system", (Text("s"),)), Message("developer", (Text("d"),))), Traits(),
     {"messages": [{"role": "user", "content": "hi"}, {"role": "system", "content": [
         {"type": "text", "text": "s"}, {"type": "text", "text": "d"}]}]}),
    (turned(HI, HI), Traits(), {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "hi"}, {"type": "text", "text": "hi"}]}]}),
    (asked(Media("image", file_id="f"), Media("document", "text/csv", "YSxi", name="a")), Traits(),
     {"messages": [{"role": "user", "content": [
         image(type="file", file_id="f"),
         {**document(type="text", media_type="text/plain", data="a,b"), "title": "a"}]}]}),
    (turned(Message("user", (Text(" "),))), Traits(),
     {"messages": [{"role": "user", "content": "."}]}),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "traits", "wanted"), ASKED_FOR)
def test_a_target_is_asked_in_its_own_way(prompt: Prompt, traits: Traits, wanted: Any) -> None:
    body = sent(prompt, traits)
    assert {key: body.get(key) for key in wanted} == wanted and None not in body.values()


LOST = [
    (asked(tier="flex"), Traits(), Loss("dropped", "service_tier")),
    (thinks("none"), ALWAYS, Loss("thinking_always_on", "reasoning_effort", False)),
    (thinks("low", max_tokens=1024), BUDGET, Loss("dropped", "reasoning_effort")),
    (thinks("low", sampling=Sampling(0.5)), BUDGET, Loss("dropped", "temperature")),
]


@pytest.mark.parametrize(("prompt", "traits", "loss"), LOST)
def test_what_is_lost_is_noted(prompt: Prompt, traits: Traits, loss: Loss) -> None:
    losses = Losses()
    sent(prompt, traits, losses)
    assert losses.found == [loss]


def test_results_come_first_in_their_turn() -> None:
    _, _, turn = sent(turned(HI, ASSISTANT, HI, RESULT))["messages"]
    assert [block["type"] for block in turn["content"]] == ["tool_result", "text"]


@pytest.mark.parametrize(
    ("media", "code"),
    [
        (Media("audio", "audio/wav", "AAAA"), "unsupported_modality"),
        (Media("document", "application/msword", "AAAA"), "unsupported_modality"),
        (Media("image", "image/svg+xml", "AAAA"), "unsupported_media_type"),
    ],
)
def test_media_that_have_no_place_make_the_target_unfit(media: Media, code: str) -> None:
    with pytest.raises(UpstreamUnfit) as caught:
        sent(asked(media))
    assert (caught.value.code, caught.value.param) == (code, media.kind)


# --- answers that come in


def decoded(events: Iterable[Any]) -> Choice:
    decoder, gatherer = MESSAGES.decoder("anthropic"), Gatherer()
    for event in events:
        for part in decoder.feed(event):
            gatherer.add(part)
    return gatherer.choices()[0]


def test_a_refusal_says_why() -> None:
    finished = decoded(events_of(read_wire("messages/refused")["stream"])).finished
    assert (finished.finish, finished.detail) == (Finish.CONTENT_FILTER, "Not that.")


def test_a_stop_sequence_is_told() -> None:
    stopped = {
        "type": "message_delta",
        "delta": {"stop_reason": "stop_sequence", "stop_sequence": "E"},
    }
    assert decoded([stopped]).finished == Finished(Finish.STOP_SEQUENCE, 0, "stop_sequence", "E")


@pytest.mark.parametrize("name", ["messages/paused", "messages/searched", "messages/calls"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_paused_turn_goes_on_with_the_blocks_as_they_were(name: str, streamed: bool) -> None:
    wire, decoder = read_wire(name), MESSAGES.decoder("anthropic")
    answer = json.loads(wire["answer"])
    if streamed:
        for event in events_of(wire["stream"]):
            decoder.feed(event)
    else:
        decoder.whole(answer)
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
    resumed = decoder.resume(body)
    assert resumed["messages"][1] == {"role": "assistant", "content": answer["content"]}
    assert resumed["model"] == "m" and len(body["messages"]) == 1


def test_a_sealed_signature_is_read_alike_whole_and_streamed() -> None:
    block = {
        "type": "thinking",
        "thinking": "hm",
        "signature": seal(Opaque("google", "thought", "x")),
    }
    start = {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking"}}
    deltas = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": f"{k}_delta", k: block[k]}}
        for k in ("thinking", "signature")
    ]
    gatherer = Gatherer()
    for part in MESSAGES.decoder("anthropic").whole({"content": [block]}):
        gatherer.add(part)
    stream = [start, *deltas, {"type": "content_block_stop", "index": 0}]
    assert decoded(stream).content == gatherer.choices()[0].content


# --- answers that go out

BLOCKS: tuple[Block, ...] = (
    Reasoning("hm", SIGNED),
    Reasoning("", Opaque("anthropic", "redacted", "cmVk")),
    Reasoning("so", Opaque("openai", "encrypted", "ZW5j", id="rs_1")),
    Text("Hello"),
    ToolCall("c1", "f", '{"a":1}', opaque=Opaque("google", "thought", "dGhv")),
    ToolCall("c2", "g"),
    Text("after"),
)
KINDS = ["thinking", "redacted_thinking", "thinking", "text", "redacted_thinking", "tool_use",
         "tool_use", "text"]  # fmt: skip
LABEL = AnswerLabel("abc", 1_764_000_000, "m", 10)
CALLED = Finished(Finish.TOOL_CALLS)


def told(blocks: Iterable[Block] = BLOCKS, finished: Finished = CALLED) -> list[Any]:
    """The events of a stream."""
    encoder = MESSAGES.encoder(asked(), LABEL)
    parts = [part for key, block in enumerate(blocks) for part in parts_of(block, key)]
    raw = b"".join([*map(encoder.encode, [*parts, finished]), encoder.end(Usage(9, 4, 3, 2, 1))])
    named = [line[7:].decode() for line in raw.split(b"\n") if line.startswith(b"event: ")]
    assert MESSAGES.strict(raw) and named == [event["type"] for event in events_of(raw)]
    return events_of(raw)


def events_of(raw: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]


def test_blocks_are_numbered_from_0_and_closed_before_the_next_opens() -> None:
    inside: int | None = None
    opened: list[str] = []
    for event in told():
        match event["type"]:
            case "content_block_start":
                assert inside is None and event["index"] == len(opened)
                inside = event["index"]
                opened.append(event["content_block"]["type"])
            case "content_block_delta":
                assert event["index"] == inside
            case "content_block_stop":
                assert event["index"] == inside
                inside = None
    assert opened == KINDS and inside is None


def test_the_frame_is_whole() -> None:
    first, *_, delta, last = told()
    assert [first["type"], delta["type"], last["type"]] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    assert first["message"]["usage"] == {"input_tokens": 10, "output_tokens": 1}
    assert (first["message"]["content"], first["message"]["stop_reason"]) == ([], None)
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"] == rendered(BLOCKS)["usage"]


def test_a_signature_is_the_last_that_comes_of_a_thought() -> None:
    deltas = [e["delta"]["type"] for e in told(BLOCKS[:1]) if e["type"] == "content_block_delta"]
    assert deltas == ["thinking_delta", "signature_delta"]


def test_an_answer_of_nothing_is_a_message_all_the_same() -> None:
    assert [e["type"] for e in told(())] == ["message_start", "message_delta", "message_stop"]


def test_a_stream_that_cannot_go_on_ends_with_an_error_event() -> None:
    encoder, error = MESSAGES.encoder(asked(), LABEL), UpstreamError("broke")
    encoder.encode(CALLED)
    assert encoder.fail(error) == MESSAGES.fail_stream(error, StreamState(), b"")


def rendered(
    blocks: tuple[Block, ...], finished: Finished = CALLED, losses: Losses | None = None
) -> Any:
    choices = [Choice(blocks, finished)]
    usage = Usage(9, 4, 3, 2, 1)
    answer = MESSAGES.render_response(asked(), LABEL, choices, usage, losses or Losses())
    return json.loads(json.dumps(answer))


def test_a_rendered_answer_has_all_that_sdks_require() -> None:
    answer = rendered(BLOCKS)
    head = {"id": "msg_abc", "type": "message", "role": "assistant", "model": "m"}
    assert {key: answer[key] for key in head} == head
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
    assert answer["usage"] == {
        "input_tokens": 4, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2,
        "output_tokens": 4, "output_tokens_details": {"thinking_tokens": 1},
    }  # fmt: skip
    assert [block["type"] for block in answer["content"]] == KINDS
    assert [b["input"] for b in answer["content"] if "input" in b] == [{"a": 1}, {}]
    assert answer["content"][0] == {"type": "thinking", "thinking": "hm", "signature": "c2ln"}


def test_a_stop_sequence_and_a_refusal_are_told_in_detail() -> None:
    stopped = rendered((), Finished(Finish.STOP_SEQUENCE, stop_sequence="E"))
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "E")
    refused = rendered((Refusal("no"),), Finished(Finish.REFUSAL, detail="why"))
    assert refused["content"] == [{"type": "text", "text": "no"}]
    assert (refused["stop_reason"], refused["stop_details"]["explanation"]) == ("refusal", "why")


def test_arguments_that_are_no_json_are_a_loss() -> None:
    losses = Losses()
    [use] = rendered((ToolCall("c", "f", '{"a":'),), losses=losses)["content"]
    assert use["input"] == {} and losses.found == [Loss("invalid_arguments", "tool_use.input")]
    [wrapped] = rendered((ToolCall("c", "f", "[1]"),))["content"]
    assert wrapped["input"] == {"input": [1]}


def test_a_call_that_the_limit_cut_off_is_left_out() -> None:
    losses = Losses()
    cut = (Text("a"), ToolCall("c", "f", '{"a":'))
    content = rendered(cut, Finished(Finish.LENGTH), losses)["content"]
    assert [block["type"] for block in content] == ["text"] and losses.found


def test_a_turn_of_foreign_thinking_alone_does_not_become_empty() -> None:
    state = seal(Opaque("google", "thought", "x"))
    said = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": state}]}
    assert MESSAGES.unseal({"messages": [said]}, "anthropic")
    assert said["content"] == [{"type": "text", "text": "."}]


def test_thinking_is_not_asked_for_where_none_is_left_before_a_call() -> None:
    thought = {
        "type": "thinking",
        "thinking": "hm",
        "signature": seal(Opaque("google", "thought", "x")),
    }
    said = {"role": "assistant", "content": [thought, USE]}
    body = {
        "messages": [
            {"role": "user", "content": "?"},
            said,
            {"role": "user", "content": [result("low")]},
        ],
        "thinking": {"type": "enabled", "budget_tokens": 2000},
    }
    assert MESSAGES.unseal(body, "anthropic")
    assert said["content"] == [USE] and "thinking" not in body
