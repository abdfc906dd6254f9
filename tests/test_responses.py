"""OpenAI Responses: usage, errors, the signs of life of a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import named_event, read_wire

from bitrouter import (
    RESPONSES,
    Kind,
    SseEvent,
    StreamRelay,
    StreamState,
    UpstreamError,
    Usage,
    parse_event,
)

BROKEN = UpstreamError("the line went dead", code="upstream_disconnected")


def noted(*events: Any) -> StreamState:
    state = StreamState()
    for event in events:
        RESPONSES.note(state, event)
    return state


def item(kind: str, **more: Any) -> dict[str, Any]:
    added = {"type": "response.output_item.added", "output_index": 0}
    return {**added, "item": {"type": kind, **more}}


USAGES = [
    ({"input_tokens": 9, "output_tokens": 4, "total_tokens": 13}, Usage(9, 4)),
    ({"input_tokens": 9, "input_tokens_details": {"cached_tokens": 6}}, Usage(9, 0, 6)),
    ({"input_tokens": 9, "input_tokens_details": {"cache_write_tokens": 5}}, Usage(9, 0, 0, 5)),
    ({"output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 7}}, Usage(0, 9, 0, 0, 7)),
    ({"input_tokens": None, "output_tokens_details": 5}, Usage()),
    (None, None),
    ([], None),
]


@pytest.mark.parametrize(("usage", "wanted"), USAGES)
def test_usage_is_read_inclusively(usage: Any, wanted: Usage | None) -> None:
    assert RESPONSES.usage({"usage": usage}) == wanted


SUBSTANCE = {
    "a reasoning item": item("reasoning", summary=[]),
    "a call": item("function_call", name="f", arguments=""),
    "a custom call": item("custom_tool_call", name="f"),
    "a web search": item("web_search_call"),
    "text": {"type": "response.output_text.delta", "delta": "a"},
    "a refusal": {"type": "response.refusal.delta", "delta": "a"},
    "arguments": {"type": "response.function_call_arguments.delta", "delta": "{"},
    "a summary": {"type": "response.reasoning_summary_text.delta", "delta": "a"},
    "reasoning text": {"type": "response.reasoning_text.delta", "delta": "a"},
    "the end": {"type": "response.completed", "response": {"output": []}},
    "an early end": {"type": "response.incomplete", "response": {"output": []}},
}
NO_SUBSTANCE = {
    "created": {"type": "response.created", "response": {"id": "r"}},
    "in_progress": {"type": "response.in_progress", "response": {"id": "r"}},
    "queued": {"type": "response.queued", "response": {"id": "r"}},
    "an empty message": item("message", content=[]),
    "an empty part": {"type": "response.content_part.added", "part": {"type": "output_text"}},
    "a failure": {"type": "response.failed", "response": {"error": {"message": "x"}}},
    "an error": {"type": "error", "message": "x"},
    "no type": {"response": {}},
}


@pytest.mark.parametrize("event", SUBSTANCE.values(), ids=SUBSTANCE)
def test_substance_starts_a_stream(event: Any) -> None:
    assert noted(event).started


@pytest.mark.parametrize("event", NO_SUBSTANCE.values(), ids=NO_SUBSTANCE)
def test_what_is_not_substance_does_not(event: Any) -> None:
    assert not noted(event).started


def test_a_message_that_opens_does_not_undo_a_start() -> None:
    assert noted(item("reasoning"), item("message")).started


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete"])
def test_a_complete_response_finishes_and_ends(kind: str) -> None:
    response = {"output": [], "usage": {"input_tokens": 3, "output_tokens": 2}}
    state = noted({"type": kind, "response": response})
    assert state.finished and state.ended and state.usage == Usage(3, 2)


def test_a_finished_item_finishes_no_response() -> None:
    state = noted(item("message"), {"type": "response.output_item.done", "item": {}})
    assert not state.finished and not state.ended


IN_BAND = {
    "failed": {
        "type": "response.failed",
        "response": {"error": {"code": "rate_limit_exceeded", "message": "slow down"}},
    },
    "flat": {"type": "error", "code": "rate_limit_exceeded", "message": "slow down"},
    "nested": {
        "type": "error",
        "error": {"code": "rate_limit_exceeded", "message": "slow down"},
    },
}


@pytest.mark.parametrize("event", IN_BAND.values(), ids=IN_BAND)
def test_an_error_is_understood_in_each_of_its_forms(event: Any) -> None:
    state = noted(event)
    assert state.error is not None and not state.finished
    assert state.error.message == "slow down" and "rate_limit_exceeded" in state.error.words


@pytest.mark.parametrize("event", IN_BAND.values(), ids=IN_BAND)
def test_an_error_in_a_stream_stands_for_its_status(event: Any) -> None:
    state = noted(event)
    assert state.error is not None and state.error.status == 429


@pytest.mark.parametrize(
    "event", [{"type": "response.failed"}, {"type": "response.failed", "response": None}]
)
def test_a_failure_that_says_nothing_is_a_failure(event: Any) -> None:
    assert noted(event).error is not None


ERRORS = [
    (Kind.INVALID_REQUEST, 400, "invalid_request_error"),
    (Kind.RATE_LIMIT, 429, "rate_limit_error"),
    (Kind.OVERLOADED, 503, "service_unavailable_error"),
    (Kind.BAD_GATEWAY, 502, "server_error"),
]


@pytest.mark.parametrize(("kind", "status", "word"), ERRORS)
def test_an_error_has_openai_s_shape(kind: Kind, status: int, word: str) -> None:
    error = UpstreamError("said", status=status, kind=kind, code="c", param="p")
    shape = {"message": "said", "type": word, "param": "p", "code": "c"}
    assert RESPONSES.render_error(error) == {"error": shape}
    assert RESPONSES.render_status(error) == status


def test_openai_knows_no_529() -> None:
    assert RESPONSES.render_status(UpstreamError("x", status=529, kind=Kind.OVERLOADED)) == 503


STRICT = {
    "one": b'event: a\ndata: {"a":1}\n\n',
    "two": b'event: a\ndata: {"a":1}\n\nevent: b\ndata: {"b":1}\n\n',
}
NOT_STRICT = {
    "no event line": b'data: {"a":1}\n\n',
    "one without an event line": b'event: a\ndata: {"a":1}\n\ndata: {"b":1}\n\n',
    "CRLF": b'event: a\r\ndata: {"a":1}\r\n\r\n',
    "no space": b'event: a\ndata:{"a":1}\n\n',
    "no space after event": b'event:a\ndata: {"a":1}\n\n',
    "data first": b'data: {"a":1}\nevent: a\n\n',
    "an id line": b'event: a\ndata: {"a":1}\nid: 1\n\n',
    "an id line first": b'id: 1\nevent: a\ndata: {"a":1}\n\n',
    "two data lines": b'event: a\ndata: {"a":\ndata: 1}\n\n',
    "a comment": b': c\n\nevent: a\ndata: {"a":1}\n\n',
    "no data": b'event: a\n\nevent: b\ndata: {"b":1}\n\n',
    "an end mark": b'event: a\ndata: {"a":1}\n\ndata: [DONE]\n\n',
}


@pytest.mark.parametrize("block", STRICT.values(), ids=STRICT)
def test_the_form_that_all_sdks_read_is_strict(block: bytes) -> None:
    assert RESPONSES.strict(block)


@pytest.mark.parametrize("block", NOT_STRICT.values(), ids=NOT_STRICT)
def test_any_other_form_is_not(block: bytes) -> None:
    assert not RESPONSES.strict(block)


NAMED = [
    (b'{"type":"response.created","a":1}', "", "response.created"),
    (b'{"a":1, "type" : "response.failed"}', "", "response.failed"),
    (b'{"type":"x"}', "kept", "kept"),
    (b'{"part":{"type":"output_text"},"type":"response.content_part.added"}', "",
     "response.content_part.added"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "event", "name"), NAMED)
def test_an_event_is_named_by_its_own_type(data: bytes, event: str, name: str) -> None:
    framed = RESPONSES.frame(SseEvent(data, event))
    assert parse_event(framed) == SseEvent(data, name) and RESPONSES.strict(framed)


OF_NOTE = ["response.completed", "response.incomplete", "response.failed", "error"]


@pytest.mark.parametrize("kind", OF_NOTE)
@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")], ids=["tight", "loose"])
def test_what_is_of_note_is_never_called_dull(kind: str, spaces: tuple[str, str]) -> None:
    dull = named_event({"type": "response.output_text.delta", "delta": "a"})
    event = json.dumps({"type": kind, "response": {}}, separators=spaces).encode()
    assert RESPONSES.dull(dull)
    assert not RESPONSES.dull(dull + b"event: x\ndata: " + event + b"\n\n")


# --- a stream that fails


def events_of(raw: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]


def ending(raw: bytes) -> Any:
    [event] = events_of(raw)
    return event


WIRE = read_wire("responses/text")["stream"]
EVENTS = [event + b"\n\n" for event in WIRE.split(b"\n\n")[:-1]]


@pytest.mark.parametrize("count", range(5, len(EVENTS)))
@pytest.mark.parametrize("at_once", [True, False])
def test_sequence_numbers_go_on_where_the_stream_broke(count: int, at_once: bool) -> None:
    relay = StreamRelay(RESPONSES)
    for piece in [b"".join(EVENTS[:count])] if at_once else EVENTS[:count]:
        relay.feed(piece)
    event = ending(relay.fail(BROKEN))
    assert (event["type"], event["sequence_number"]) == ("response.failed", count)


def test_a_stream_fails_with_the_response_that_it_began() -> None:
    relay = StreamRelay(RESPONSES)
    relay.feed(b"".join(EVENTS[:6]))
    response = ending(relay.fail(BROKEN))["response"]
    assert (response["id"], response["model"], response["status"]) == ("resp_w2", "m", "failed")
    assert response["error"] == {"code": "server_error", "message": "the line went dead"}


def test_a_stream_that_told_nothing_fails_from_number_0() -> None:
    event = ending(RESPONSES.fail_stream(BROKEN, StreamState(), b""))
    assert event["sequence_number"] == 0 and event["response"]["status"] == "failed"


def test_a_number_that_the_model_wrote_is_no_sequence_number() -> None:
    relay = StreamRelay(RESPONSES)
    relay.feed(b"".join(EVENTS[:5]))
    said = {"type": "response.output_text.delta", "delta": '"sequence_number":999', "x": 1}
    relay.feed(named_event({**said, "sequence_number": 5}))
    assert ending(relay.fail(BROKEN))["sequence_number"] == 6


def test_the_failure_is_named_and_in_strict_form() -> None:
    raw = RESPONSES.fail_stream(BROKEN, StreamState(), b"")
    assert RESPONSES.strict(raw) and raw.startswith(b"event: response.failed\n")


def test_a_keepalive_is_a_comment_and_there_is_no_end_mark() -> None:
    assert RESPONSES.comments and RESPONSES.heartbeat == b": keepalive\n\n"
    assert RESPONSES.end_mark == b""


@pytest.mark.parametrize("body", [{}, {"output": None}, {"output": {}}, {"choices": []}])
def test_an_answer_without_output_is_no_answer(body: Any) -> None:
    assert RESPONSES.what_is_missing(body) == "output"


def test_an_empty_output_is_an_answer() -> None:
    assert RESPONSES.what_is_missing({"output": []}) == ""
