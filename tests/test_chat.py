"""OpenAI Chat Completions: usage, errors, the signs of life of a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import slices

from bitrouter import (
    CHAT,
    AnswerLabel,
    BadRequest,
    BitrouterError,
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
)


def noted(*chunks: Any) -> StreamState:
    state = StreamState()
    for chunk in chunks:
        CHAT.note(state, chunk)
    return state


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


@pytest.mark.parametrize(("kind", "status", "word"), ERRORS)
def test_an_error_has_openai_s_shape(kind: Kind, status: int, word: str) -> None:
    error = UpstreamError("said", status=status, kind=kind, code="c", param="p")
    shape = {"message": "said", "type": word, "param": "p", "code": "c"}
    assert CHAT.render_error(error) == {"error": shape}
    assert CHAT.render_status(error) == status


def test_all_four_keys_are_there_even_when_one_says_nothing() -> None:
    error = CHAT.render_error(BitrouterError("said"))["error"]
    assert error["param"] is None and set(error) == {"message", "type", "param", "code"}


def test_further_facts_go_beside_the_message() -> None:
    error = CHAT.render_error(BadRequest("said", extra={"variable": "K"}))["error"]
    assert error["variable"] == "K" and error["message"] == "said"


def test_openai_knows_no_529() -> None:
    assert CHAT.render_status(UpstreamError("x", status=529, kind=Kind.OVERLOADED)) == 503


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


STRICT = {
    "one": b'data: {"a":1}\n\n',
    "two": b'data: {"a":1}\n\ndata: {"b":2}\n\n',
}
NOT_STRICT = {
    "CRLF": b'data: {"a":1}\r\n\r\n',
    "no space": b'data:{"a":1}\n\n',
    "an event line": b'event: x\ndata: {"a":1}\n\n',
    "an id line": b'id: 1\ndata: {"a":1}\n\n',
    "an id line later": b'data: {"a":1}\n\nid: 1\ndata: {"a":1}\n\n',
    "an id line last": b'data: {"a":1}\nid: 1\n\n',
    "two data lines": b'data: {"a":\ndata: 1}\n\n',
    "two data lines, each with braces": b'data: {"a":{}\ndata: }\n\n',
    "a comment": b': c\n\ndata: {"a":1}\n\n',
    "the end mark": b'data: {"a":1}\n\ndata: [DONE]\n\n',
    "a blank line too many": b'data: {"a":1}\n\n\n',
    "a blank line missing": b'data: {"a":1}\n',
    "not an object": b"data: 1\n\n",
    "an object that is cut off": b'data: {"a"\n\n',
    "a bare CR": b'data: {"a":1}\r\rdata: {"a":1}\n\n',
}


@pytest.mark.parametrize("block", STRICT.values(), ids=STRICT)
def test_the_form_that_all_sdks_read_is_strict(block: bytes) -> None:
    assert CHAT.strict(block)


@pytest.mark.parametrize("block", NOT_STRICT.values(), ids=NOT_STRICT)
def test_any_other_form_is_not(block: bytes) -> None:
    assert not CHAT.strict(block)


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


# --- what the built-in model says in this protocol

PARTS: list[StreamPart] = [
    TextDelta("He"),
    TextDelta("llo"),
    ToolCall("call_1", "f", "{}"),
    ToolCall("call_2", "g", "{}"),
]
END = Finished(Finish.TOOL_CALLS, Usage(5, 2))
LABEL = AnswerLabel("abc", 1_764_000_000)


def encoded(prompt: Prompt) -> bytes:
    assert CHAT.encoder is not None
    encoder = CHAT.encoder(prompt, LABEL)
    return b"".join([encoder.encode(part) for part in [*PARTS, END]])


def chunks_of(raw: bytes) -> list[Any]:
    return [json.loads(e.removeprefix(b"data: ")) for e in raw.split(b"\n\n")[:-2]]


def deltas_of(raw: bytes) -> list[Any]:
    return [c["choices"][0]["delta"] for c in chunks_of(raw) if c["choices"]]


def test_a_rendered_stream_says_each_role_id_and_name_once() -> None:
    deltas = deltas_of(encoded(Prompt("m", "hi")))
    calls = [call for d in deltas for call in d.get("tool_calls", [])]
    assert [d["role"] for d in deltas if "role" in d] == ["assistant"] and "role" in deltas[0]
    assert [(c["index"], c["id"], c["function"]["name"]) for c in calls] == [
        (0, "call_1", "f"),
        (1, "call_2", "g"),
    ]


def test_a_rendered_stream_keeps_its_id_and_model() -> None:
    chunks = chunks_of(encoded(Prompt("m", "hi")))
    facts = {(c["id"], c["object"], c["created"], c["model"]) for c in chunks}
    assert facts == {("chatcmpl-abc", "chat.completion.chunk", 1_764_000_000, "m")}


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_is_the_last_chunk_and_only_if_wanted(wanted: bool) -> None:
    chunks = chunks_of(encoded(Prompt("m", "hi", wants_usage=wanted)))
    usages = [c.get("usage") for c in chunks if c.get("usage")]
    assert len(usages) == wanted and (chunks[-1]["choices"] == []) is wanted


def test_a_rendered_stream_is_one_that_we_would_pass_on() -> None:
    raw = encoded(Prompt("m", "hi"))
    relay = StreamRelay(CHAT)
    assert b"".join([relay.feed(piece) for piece in slices(raw, 50)]) == raw
    state = relay.state
    assert (state.started, state.finished, state.ended) == (True, True, True)
    assert state.usage == Usage(5, 2)


def test_a_rendered_answer_says_the_same() -> None:
    assert CHAT.render_response is not None
    answer = CHAT.render_response(Prompt("m", "hi"), LABEL, [*PARTS, END])
    message = answer["choices"][0]["message"]
    assert message["content"] == "Hello"
    assert [c["id"] for c in message["tool_calls"]] == ["call_1", "call_2"]
    assert CHAT.usage(answer) == Usage(5, 2) and not CHAT.what_is_missing(answer)


def test_a_request_becomes_a_prompt() -> None:
    assert CHAT.parse_request is not None
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "custom"}]
    last = {"role": "user", "content": [{"type": "text", "text": "three"}]}
    body = {"model": "m", "messages": [*said, last], "tools": tools, "stream": True}
    prompt = CHAT.parse_request(body)
    assert prompt[:3] == ("m", "three", ("f",))
    assert (prompt.stream, prompt.wants_usage) == (True, False)


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": "hi"}, {"messages": None}])
def test_a_request_without_messages_is_refused(body: Any) -> None:
    assert CHAT.parse_request is not None
    with pytest.raises(BadRequest) as caught:
        CHAT.parse_request(body)
    assert caught.value.param == "messages"
