"""Anthropic Messages: usage, errors, the signs of life of a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import named_event, slices

from bitrouter import (
    MESSAGES,
    AnswerLabel,
    BadRequest,
    Finish,
    Finished,
    Kind,
    Prompt,
    SseEvent,
    StreamPart,
    StreamRelay,
    StreamState,
    TextDelta,
    ToolCall,
    UpstreamError,
    Usage,
    parse_event,
)


def noted(*events: Any) -> StreamState:
    state = StreamState()
    for event in events:
        MESSAGES.note(state, event)
    return state


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


STRICT = {
    "one": b'event: a\ndata: {"a":1}\n\n',
    "two": b'event: a\ndata: {"a":1}\n\nevent: b\ndata: {"b":1}\n\n',
    "a ping": MESSAGES.heartbeat,
    "the end mark": MESSAGES.end_mark,
}
NOT_STRICT = {
    "no event line": b'data: {"a":1}\n\n',
    "one without an event line": b'event: a\ndata: {"a":1}\n\ndata: {"b":1}\n\n',
    "CRLF": b'event: a\r\ndata: {"a":1}\r\n\r\n',
    "no space": b'event: a\ndata:{"a":1}\n\n',
    "data first": b'data: {"a":1}\nevent: a\n\n',
    "an id line": b'event: a\ndata: {"a":1}\nid: 1\n\n',
    "two data lines": b'event: a\ndata: {"a":\ndata: 1}\n\n',
    "a comment": b': c\n\nevent: a\ndata: {"a":1}\n\n',
    "no data": b'event: a\n\nevent: b\ndata: {"b":1}\n\n',
    "[DONE]": b'event: a\ndata: {"a":1}\n\ndata: [DONE]\n\n',
}


@pytest.mark.parametrize("raw", STRICT.values(), ids=STRICT)
def test_the_form_that_all_sdks_read_is_strict(raw: bytes) -> None:
    assert MESSAGES.strict(raw)


@pytest.mark.parametrize("raw", NOT_STRICT.values(), ids=NOT_STRICT)
def test_any_other_form_is_not(raw: bytes) -> None:
    assert not MESSAGES.strict(raw)


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


# --- what the built-in model says in this protocol

PARTS: list[StreamPart] = [
    TextDelta("He"),
    TextDelta("llo"),
    ToolCall("c1", "f", "{}"),
    ToolCall("c2", "g", '{"a":1}'),
]
END = Finished(Finish.TOOL_CALLS, Usage(5, 2))
LABEL = AnswerLabel("abc", 1_764_000_000)


def encoded(parts: list[Any]) -> bytes:
    assert MESSAGES.encoder is not None
    encoder = MESSAGES.encoder(Prompt("m", "hi", size=40), LABEL)
    return b"".join([encoder.encode(part) for part in [*parts, END]])


def events_of(raw: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]


def test_blocks_are_numbered_from_0_and_closed_before_the_next_opens() -> None:
    blocks = [
        (e["type"].removeprefix("content_block_"), e["index"])
        for e in events_of(encoded(PARTS))
        if "index" in e
    ]
    wanted = [("start", 0), ("delta", 0), ("delta", 0), ("stop", 0)]
    wanted += [(step, i) for i in (1, 2) for step in ("start", "delta", "stop")]
    assert blocks == wanted


def test_text_after_a_call_is_a_block_of_its_own() -> None:
    events = events_of(encoded([PARTS[2], TextDelta("after")]))
    opened = [(e["index"], e["content_block"]["type"]) for e in events if "content_block" in e]
    assert opened == [(0, "tool_use"), (1, "text")]


def test_a_rendered_stream_has_usage_in_both_places() -> None:
    events = events_of(encoded(PARTS))
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    assert events[0]["message"]["usage"] == {"input_tokens": 10, "output_tokens": 1}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_rendered_stream_is_one_that_we_would_pass_on() -> None:
    raw, relay = encoded(PARTS), StreamRelay(MESSAGES)
    assert b"".join([relay.feed(piece) for piece in slices(raw, 50)]) == raw
    state = relay.state
    assert (state.started, state.finished, state.ended) == (True, True, True)
    assert state.usage == Usage(5, 2)


def test_a_rendered_answer_says_the_same() -> None:
    assert MESSAGES.render_response is not None
    answer = MESSAGES.render_response(Prompt("m", "hi"), LABEL, [*PARTS, END])
    text, one, other = answer["content"]
    assert (text["text"], one["input"], other["input"]) == ("Hello", {}, {"a": 1})
    assert MESSAGES.usage(answer) == Usage(5, 2) and answer["stop_reason"] == "tool_use"


def test_a_request_becomes_a_prompt() -> None:
    assert MESSAGES.parse_request is not None
    said = {"role": "user", "content": [{"type": "text", "text": "three"}]}
    body = {"model": "m", "system": "four", "messages": [said], "tools": [{"name": "f"}, 5]}
    prompt = MESSAGES.parse_request(body)
    assert prompt[:3] == ("m", "three", ("f",)) and prompt.size == len("three") + len("four")


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": "hi"}, {"messages": None}])
def test_a_request_without_messages_is_refused(body: Any) -> None:
    assert MESSAGES.parse_request is not None
    with pytest.raises(BadRequest) as caught:
        MESSAGES.parse_request(body)
    assert caught.value.param == "messages"
