"""Google generateContent: usage, errors, the signs of life of a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bitrouter import (
    GEMINI,
    BadRequest,
    ErrorFacts,
    Kind,
    SseEvent,
    StreamState,
    UpstreamError,
    Usage,
)


def noted(*chunks: Any) -> StreamState:
    state = StreamState()
    for chunk in chunks:
        GEMINI.note(state, chunk)
    return state


def said(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"role": "model", "parts": list(parts)}, **more}]}


def tokens(prompt: int, candidates: int = 0, thoughts: int = 0, total: int = 0, **more: int) -> Any:
    counts = {"promptTokenCount": prompt, "candidatesTokenCount": candidates}
    return {**counts, "thoughtsTokenCount": thoughts, "totalTokenCount": total, **more}


USAGES = {
    "plain": (tokens(9, 4, total=13), Usage(9, 4)),
    "cached tokens are among the prompt's": (
        tokens(9, 4, total=13, cachedContentTokenCount=6),
        Usage(9, 4, 6),
    ),
    "thoughts beside the candidates": (tokens(9, 4, 30, 43), Usage(9, 34, 0, 0, 30)),
    "thoughts among the candidates": (tokens(9, 34, 30, 43), Usage(9, 34, 0, 0, 30)),
    "thoughts alone": (tokens(9, 0, 30, 39), Usage(9, 30, 0, 0, 30)),
    "thoughts and no total": (tokens(9, 4, 30), Usage(9, 34, 0, 0, 30)),
    "tool results are input": (tokens(9, 4, total=33, toolUsePromptTokenCount=20), Usage(29, 4)),
    "thoughts among the candidates, with tool results": (
        tokens(9, 34, 30, 63, toolUsePromptTokenCount=20),
        Usage(29, 34, 0, 0, 30),
    ),
    "a prompt alone": ({"promptTokenCount": 9, "totalTokenCount": 9}, Usage(9)),
    "nonsense": ({"promptTokenCount": "9"}, Usage()),
    "none": (None, None),
}


@pytest.mark.parametrize(("usage", "wanted"), USAGES.values(), ids=USAGES)
def test_usage_is_made_inclusive(usage: Any, wanted: Usage | None) -> None:
    assert GEMINI.usage({"usageMetadata": usage}) == wanted


SUBSTANCE = {
    "text": said({"text": "a"}),
    "a thought": said({"text": "a", "thought": True}),
    "a call": said({"functionCall": {"name": "f", "args": {}}}),
    "a signature": said({"text": "", "thoughtSignature": "b3BhcXVl"}),
    "an image": said({"inlineData": {"mimeType": "image/png", "data": "AAAA"}}),
    "a finish": {"candidates": [{"finishReason": "STOP"}]},
    "a blocked prompt": {"promptFeedback": {"blockReason": "SAFETY"}},
    "a second candidate": {"candidates": [{}, *said({"text": "a"})["candidates"]]},
}
NO_SUBSTANCE = {
    "nothing": {},
    "no candidate": {"candidates": []},
    "usage alone": {"usageMetadata": tokens(9)},
    "no part": said(),
    "no content": {"candidates": [{"index": 0}]},
    "harmless feedback": {"promptFeedback": {"safetyRatings": []}},
    "an error": {"error": {"code": 503}},
}


@pytest.mark.parametrize("chunk", SUBSTANCE.values(), ids=SUBSTANCE)
def test_substance_starts_a_stream(chunk: Any) -> None:
    assert noted(chunk).started


@pytest.mark.parametrize("chunk", NO_SUBSTANCE.values(), ids=NO_SUBSTANCE)
def test_what_is_not_substance_does_not(chunk: Any) -> None:
    assert not noted(chunk).started


@pytest.mark.parametrize("reason", ["STOP", "MAX_TOKENS", "SAFETY", "REASON_OF_TOMORROW"])
def test_any_finish_reason_finishes_and_none_ends(reason: str) -> None:
    state = noted(said({"text": "a"}), said({"text": ""}, finishReason=reason))
    assert state.finished and not state.ended


def test_a_part_finishes_nothing() -> None:
    assert not noted(said({"text": "a"})).finished


def test_a_blocked_prompt_is_a_finish() -> None:
    assert noted({"promptFeedback": {"blockReason": "SAFETY"}}).finished


def test_the_running_total_is_replaced_and_never_added() -> None:
    state = noted({"usageMetadata": tokens(9, 1)}, {"usageMetadata": tokens(9, 5)}, said())
    assert state.usage == Usage(9, 5)


def google_error(**facts: Any) -> dict[str, Any]:
    return {"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED", **facts}}


INFO = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.5s"}
QUOTA = {"violations": [{"quotaId": "GenerateRequestsPerDayPerProject"}]}
PARSED = [
    (google_error(), {"resource_exhausted"}, 429, None),
    (google_error(details=[INFO]), {"resource_exhausted", "api_key_invalid"}, 429, None),
    (google_error(details=[INFO, RETRY]), {"resource_exhausted", "api_key_invalid"}, 429, 1.5),
    (google_error(details=[QUOTA]),
     {"resource_exhausted", "generaterequestsperdayperproject"}, 429, None),
    (google_error(code=None, status=None), set(), 0, None),
    (google_error(details=[{"retryDelay": "soon"}]), {"resource_exhausted"}, 429, None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words", "status", "wait_s"), PARSED)
def test_an_error_and_its_details_are_understood(
    body: Any, words: set[str], status: int, wait_s: float | None
) -> None:
    facts = GEMINI.parse_error(body)
    assert facts == ErrorFacts("m", frozenset(words), status, wait_s)


@pytest.mark.parametrize("body", [{}, {"error": None}, {"error": {}}])
def test_no_error_is_no_error(body: Any) -> None:
    assert GEMINI.parse_error(body) is None and noted(body).error is None


ERRORS = [
    (Kind.INVALID_REQUEST, 400, "INVALID_ARGUMENT"),
    (Kind.AUTH, 401, "UNAUTHENTICATED"),
    (Kind.BILLING, 402, "FAILED_PRECONDITION"),
    (Kind.PERMISSION, 403, "PERMISSION_DENIED"),
    (Kind.NOT_FOUND, 404, "NOT_FOUND"),
    (Kind.TOO_LARGE, 413, "INVALID_ARGUMENT"),
    (Kind.RATE_LIMIT, 429, "RESOURCE_EXHAUSTED"),
    (Kind.OVERLOADED, 503, "UNAVAILABLE"),
    (Kind.INTERNAL, 500, "INTERNAL"),
    (Kind.TIMEOUT, 504, "DEADLINE_EXCEEDED"),
    (Kind.UNSUPPORTED, 501, "UNIMPLEMENTED"),
]


@pytest.mark.parametrize(("kind", "status", "word"), ERRORS)
def test_an_error_has_google_s_shape(kind: Kind, status: int, word: str) -> None:
    error = UpstreamError("said", status=status, kind=kind, code="c")
    shape = GEMINI.render_error(error)["error"]
    assert (shape["code"], shape["message"], shape["status"]) == (status, "said", word)
    assert GEMINI.render_status(error) == status


def test_google_knows_no_529() -> None:
    error = UpstreamError("x", status=529, kind=Kind.OVERLOADED)
    assert GEMINI.render_status(error) == GEMINI.render_error(error)["error"]["code"] == 503


def test_an_error_s_details_hold_its_code_and_its_facts() -> None:
    error = BadRequest("x", code="odd", extra={"variable": "K", "count": 3})
    [info] = GEMINI.render_error(error)["error"]["details"]
    assert info["@type"].endswith("google.rpc.ErrorInfo") and info["reason"] == "ODD"
    assert info["metadata"] == {"variable": "K", "count": "3"}


@pytest.mark.parametrize(("wait_s", "told"), [(7.0, "7s"), (1.5, "1.5s"), (0.0, "0s")])
def test_a_wait_is_told_as_retry_info_and_reads_back(wait_s: float, told: str) -> None:
    body = GEMINI.render_error(UpstreamError("x", status=429, retry_after_s=wait_s))
    assert body["error"]["details"][1]["retryDelay"] == told
    facts = GEMINI.parse_error(body)
    assert facts is not None and facts.retry_after_s == wait_s


STRICT = {
    "CRLF": b'data: {"a":1}\r\n\r\n',
    "two in CRLF": b'data: {"a":1}\r\n\r\ndata: {"a":2}\r\n\r\n',
    "LF": b'data: {"a":1}\n\n',
}
NOT_STRICT = {
    "no space": b'data:{"a":1}\r\n\r\n',
    "an event line": b'event: x\r\ndata: {"a":1}\r\n\r\n',
    "an id line": b'data: {"a":1}\r\nid: 1\r\n\r\n',
    "two data lines": b'data: {"a":\r\ndata: 1}\r\n\r\n',
    "a comment": b': c\r\n\r\ndata: {"a":1}\r\n\r\n',
    "[DONE]": b'data: {"a":1}\r\n\r\ndata: [DONE]\r\n\r\n',
    "bare CR": b'data: {"a":1}\r\r',
    "a bare CR among CRLF": b'data: {"a":1}\r\n\r\ndata: {"a":\r1}\r\n\r\n',
}


@pytest.mark.parametrize("block", STRICT.values(), ids=STRICT)
def test_the_form_that_all_sdks_read_is_strict(block: bytes) -> None:
    assert GEMINI.strict(block)


@pytest.mark.parametrize("block", NOT_STRICT.values(), ids=NOT_STRICT)
def test_any_other_form_is_not(block: bytes) -> None:
    assert not GEMINI.strict(block)


def test_a_framed_event_is_one_data_line_that_ends_in_crlf() -> None:
    framed = GEMINI.frame(SseEvent(b'{"a":1}', "message"))
    assert framed == b'data: {"a":1}\r\n\r\n' and GEMINI.strict(framed)


def test_the_end_mark_of_another_protocol_does_not_travel() -> None:
    assert GEMINI.frame(SseEvent(b"[DONE]")) == b"" == GEMINI.end_mark


OF_NOTE = [
    said({"text": ""}, finishReason="STOP"),
    {"promptFeedback": {"blockReason": "SAFETY"}},
    google_error(),
]


@pytest.mark.parametrize("chunk", OF_NOTE)
@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")], ids=["tight", "loose"])
def test_what_is_of_note_is_never_called_dull(chunk: Any, spaces: tuple[str, str]) -> None:
    dull = b'data: {"candidates":[{"content":{"parts":[{"text":"a"}]}}]}\r\n\r\n'
    assert GEMINI.dull(dull)
    assert not GEMINI.dull(dull + f"data: {json.dumps(chunk, separators=spaces)}\n\n".encode())


def test_a_stream_fails_with_the_error_as_its_first_key_and_a_whole_code() -> None:
    raw = GEMINI.fail_stream(UpstreamError("broke", status=502), StreamState(), b"")
    assert raw.startswith(b'data: {"error":{"code":502,') and raw.endswith(b"}\r\n\r\n")
    assert GEMINI.strict(raw)


def test_a_keepalive_is_a_bare_line_end() -> None:
    assert not GEMINI.comments and GEMINI.heartbeat == b"\r\n"


@pytest.mark.parametrize("body", [{}, {"candidates": []}, {"usageMetadata": tokens(9)}])
def test_an_answer_without_candidates_or_feedback_is_no_answer(body: Any) -> None:
    assert GEMINI.what_is_missing(body) == "candidates"


def test_a_blocked_prompt_is_an_answer() -> None:
    assert GEMINI.what_is_missing({"promptFeedback": {"blockReason": "SAFETY"}}) == ""
