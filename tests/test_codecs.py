"""The table of protocols, and what a provider's refusal means."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import read_wire, wire_names

from bitrouter import (
    CHAT,
    CODECS,
    GEMINI_VERBS,
    GENERATE_PATHS,
    MESSAGES,
    OPERATIONS,
    ApiProtocol,
    Codec,
    ErrorFacts,
    Headers,
    Kind,
    StreamState,
    UpstreamBroken,
    UpstreamError,
    UpstreamGarbled,
    UpstreamKeyRefused,
    UpstreamLimited,
    UpstreamNoCredit,
    UpstreamRejected,
    UpstreamUnfit,
    Usage,
    judge,
    kind_of,
    retry_after,
    upstream_error,
)

CC, RE, ME, GC = ApiProtocol
FOLDERS = {"chat": CC, "responses": RE, "messages": ME, "gemini": GC}
WIRES = wire_names()


def codec_of(wire: str) -> Codec:
    return CODECS[FOLDERS[wire.partition("/")[0]]]


def with_section(section: str) -> list[str]:
    return [name for name in WIRES if section in read_wire(name)]


def refused(
    protocol: ApiProtocol, status: int, body: Any, headers: Headers | None = None
) -> UpstreamError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return upstream_error("openai/m", status, headers or {}, raw, protocol, 0.0)


# --- the tables


def test_every_protocol_has_a_codec_and_a_path() -> None:
    assert list(CODECS) == list(GENERATE_PATHS) == list(ApiProtocol)


def test_every_protocol_can_be_generated_in() -> None:
    operations = [*OPERATIONS.values(), *GEMINI_VERBS.values()]
    assert {o.protocol for o in operations if o.generates and not o.raw} == set(ApiProtocol)


PASSED_THROUGH = [
    # path                       protocol  generates  raw
    ("/chat/completions", CC, True, False),
    ("/responses", RE, True, False),
    ("/responses/input_tokens", RE, False, False),
    ("/messages", ME, True, False),
    ("/messages/count_tokens", ME, False, False),
    ("/embeddings", CC, False, False),
    ("/completions", CC, True, False),
    ("/moderations", CC, False, False),
    ("/images/generations", CC, False, True),
    ("/audio/speech", CC, False, True),
    ("/audio/transcriptions", CC, False, True),
]


@pytest.mark.parametrize(("path", "protocol", "generates", "raw"), PASSED_THROUGH)
def test_a_path_is_asked_of_the_provider_under_its_own_name(
    path: str, protocol: ApiProtocol, generates: bool, raw: bool
) -> None:
    found = OPERATIONS[path]
    assert (found.protocol, found.generates, found.raw) == (protocol, generates, raw)
    assert found.suffix == path


def test_google_s_verbs_come_after_the_model() -> None:
    assert GEMINI_VERBS["countTokens"].suffix == "/models/{model}:countTokens"
    generating = {verb for verb, found in GEMINI_VERBS.items() if found.generates}
    assert generating == {"generateContent", "streamGenerateContent"}


# --- every codec alike


@pytest.mark.parametrize("name", with_section("answer"))
def test_an_answer_from_the_wire_is_whole_and_its_usage_is_read(name: str) -> None:
    wire, codec = read_wire(name), codec_of(name)
    answer = json.loads(wire["answer"])
    assert codec.what_is_missing(answer) == "" and codec.parse_error(answer) is None
    assert codec.usage(answer) == Usage(*json.loads(wire["seen"])["usage"])


@pytest.mark.parametrize("name", with_section("error"))
def test_an_error_from_the_wire_is_no_answer(name: str) -> None:
    body, codec = json.loads(read_wire(name)["error"]), codec_of(name)
    facts = codec.parse_error(body)
    assert facts is not None and facts.message == body["error"]["message"] and facts.words
    assert codec.what_is_missing(body)


@pytest.mark.parametrize("protocol", ApiProtocol)
@pytest.mark.parametrize("kind", Kind)
def test_an_error_that_we_render_reads_back(protocol: ApiProtocol, kind: Kind) -> None:
    codec = CODECS[protocol]
    error = UpstreamError("said", status=503, kind=kind, code="odd", retry_after_s=2.0)
    facts = codec.parse_error(json.loads(json.dumps(codec.render_error(error))))
    assert facts is not None and facts.message == "said" and facts.words


@pytest.mark.parametrize("protocol", ApiProtocol)
def test_a_failed_stream_reads_back_as_a_failure(protocol: ApiProtocol) -> None:
    codec, state = CODECS[protocol], StreamState()
    raw = codec.fail_stream(UpstreamError("the line\nwent dead 🦆"), StreamState(), b"")
    [data] = [line[6:] for line in raw.splitlines() if line.startswith(b"data: ")]
    codec.note(state, json.loads(data))
    assert state.error is not None and state.error.message == "the line\nwent dead 🦆"


JUNK: list[Any] = [None, True, 5, -1.5, "x", [], [5], [[]], ["x"], {}, {"a": 1}]


def spoiled(value: Any) -> Iterator[Any]:
    """The value with each of its parts in turn replaced by something of another shape."""
    yield from JUNK
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in list(keys):
        for bad in spoiled(value[key]):
            copy = value.copy()
            copy[key] = bad
            yield copy


def crashes(codec: Codec, body: Any) -> Iterator[str]:
    """How a codec fails to take what is no more than odd."""
    read: dict[str, Callable[[], object]] = {
        "note": lambda: codec.note(StreamState(), body),
        "usage": lambda: codec.usage(body),
        "parse_error": lambda: codec.parse_error(body),
        "what_is_missing": lambda: codec.what_is_missing(body),
    }
    for name, call in read.items():
        try:
            call()
        except Exception as exc:  # noqa: BLE001  whichever it is, a provider must not cause it
            yield f"{name}: {exc!r}"


def bodies_of(name: str) -> list[Any]:
    """All JSON of one exchange."""
    wire = read_wire(name)
    lines = wire.get("stream", b"").split(b"\n")
    whole = [wire[key] for key in ("answer", "error") if key in wire]
    events = [line[6:] for line in lines if line.startswith(b"data: {")]
    return [json.loads(text) for text in [*events, *whole]]


@pytest.mark.parametrize("name", WIRES)
def test_no_odd_json_from_a_provider_makes_a_codec_stumble(name: str) -> None:
    codec, found = codec_of(name), {}
    for body in bodies_of(name):
        for odd in spoiled(body):
            if isinstance(odd, dict):
                found.update(dict.fromkeys(crashes(codec, odd), odd))
    assert found == {}


GOOGLE_ODDITIES = [
    {"error": {"details": 5}},
    {"error": {"details": [{"violations": 5}]}},
    {"error": {"details": [{"violations": [5], "retryDelay": [5], "reason": {}}]}},
    {"error": [5]},
]


@pytest.mark.parametrize("body", GOOGLE_ODDITIES)
def test_no_odd_details_make_google_s_codec_stumble(body: Any) -> None:
    assert list(crashes(CODECS[GC], body)) == []


# --- what a refusal means


def openai(code: Any = None, message: str = "said", **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": code, **more}}


def anthropic(kind: str, message: str = "said", **more: Any) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message, **more}}


def google(code: int, word: str, message: str = "said", *details: Any) -> dict[str, Any]:
    error = {"code": code, "message": message, "status": word}
    return {"error": {**error, "details": list(details)} if details else error}


KEY_INVALID = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
QUOTA_TEXT = "You exceeded your current quota, please check your plan and billing details."
REFUSALS = {
    # out of credit, in its disguises
    "402": (CC, 402, openai(), UpstreamNoCredit),
    "a 402 of HTML": (ME, 402, b"<html>pay</html>", UpstreamNoCredit),
    "openai quota": (CC, 429, openai("insufficient_quota"), UpstreamNoCredit),
    "openai quota, type only": (
        CC,
        429,
        openai(None, type="insufficient_quota"),
        UpstreamNoCredit,
    ),
    "openai quota, text only": (RE, 429, openai(None, QUOTA_TEXT), UpstreamNoCredit),
    "openai spend limit": (RE, 429, openai("project_spend_limit_exceeded"), UpstreamNoCredit),
    "openai credit": (CC, 429, openai("credit_balance_exhausted"), UpstreamNoCredit),
    "openai inactive": (CC, 403, openai("billing_not_active"), UpstreamNoCredit),
    "anthropic balance": (
        ME,
        400,
        anthropic("invalid_request_error", "Your credit balance is too low to access the API."),
        UpstreamNoCredit,
    ),
    "anthropic billing": (ME, 402, anthropic("billing_error"), UpstreamNoCredit),
    "anthropic spend cap": (
        ME,
        429,
        anthropic("rate_limit_error", details={"error_code": "enforced_spend_limit_reached"}),
        UpstreamNoCredit,
    ),
    "deepseek balance": (CC, 402, openai("invalid_request_error", "Insufficient Balance"),
                         UpstreamNoCredit),
    "a 400 about balance": (CC, 400, openai(None, "insufficient balance"), UpstreamNoCredit),
    # our key
    "401": (CC, 401, openai("invalid_api_key"), UpstreamKeyRefused),
    "a 401 of text": (CC, 401, b"who are you", UpstreamKeyRefused),
    "403": (CC, 403, openai("unsupported_country_region_territory"), UpstreamKeyRefused),
    "anthropic key": (ME, 401, anthropic("authentication_error"), UpstreamKeyRefused),
    "anthropic permission": (ME, 403, anthropic("permission_error"), UpstreamKeyRefused),
    "google 403": (GC, 403, google(403, "PERMISSION_DENIED"), UpstreamKeyRefused),
    "google key": (
        GC,
        400,
        google(400, "INVALID_ARGUMENT", "API key not valid.", KEY_INVALID),
        UpstreamKeyRefused,
    ),
    "a 400 about the key": (CC, 400, openai("invalid_api_key"), UpstreamKeyRefused),
    # too much, too busy
    "openai limit": (CC, 429, openai("rate_limit_exceeded"), UpstreamLimited),
    "anthropic limit": (ME, 429, anthropic("rate_limit_error"), UpstreamLimited),
    "google limit": (GC, 429, google(429, "RESOURCE_EXHAUSTED"), UpstreamLimited),
    "a 429 of HTML": (GC, 429, b"<html>", UpstreamLimited),
    "408": (CC, 408, openai(), UpstreamBroken),
    "500": (CC, 500, openai(), UpstreamBroken),
    "502 of HTML": (CC, 502, b"<html>Bad Gateway</html>", UpstreamBroken),
    "503": (RE, 503, openai("server_is_overloaded"), UpstreamBroken),
    "google overload": (GC, 503, google(503, "UNAVAILABLE"), UpstreamBroken),
    "529": (ME, 529, anthropic("overloaded_error"), UpstreamBroken),
    "520": (CC, 520, b"", UpstreamBroken),
    # another model may do
    "openai too long": (CC, 400, openai("context_length_exceeded"), UpstreamUnfit),
    "vllm too long": (
        CC,
        400,
        openai(None, "This model's maximum context length is 4096 tokens."),
        UpstreamUnfit,
    ),
    "anthropic too long": (
        ME,
        400,
        anthropic("invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"),
        UpstreamUnfit,
    ),
    "google too long": (
        GC,
        400,
        google(400, "INVALID_ARGUMENT",
               "The input token count (1300000) exceeds the maximum number of tokens allowed"),
        UpstreamUnfit,
    ),
    "azure filter": (CC, 400, openai("content_filter"), UpstreamUnfit),
    "openai policy": (CC, 400, openai("content_policy_violation"), UpstreamUnfit),
    "a filter's 403": (CC, 403, openai("moderation"), UpstreamUnfit),
    "openai model": (CC, 404, openai("model_not_found"), UpstreamUnfit),
    "anthropic model": (ME, 404, anthropic("not_found_error", "model: claude-9"),
                        UpstreamUnfit),
    "google model": (
        GC,
        404,
        google(404, "NOT_FOUND", "models/gemini-9 is not found for API version v1beta"),
        UpstreamUnfit,
    ),
    "ollama model": (CC, 404, openai(None, "model 'x' not found"), UpstreamUnfit),
    # final
    "400": (CC, 400, openai("invalid_value"), UpstreamRejected),
    "another 404": (CC, 404, openai(None, "Unknown route"), UpstreamRejected),
    "a 404 of HTML": (CC, 404, b"<html>404 Not Found</html>", UpstreamRejected),
    "413": (ME, 413, anthropic("request_too_large"), UpstreamRejected),
    "422": (CC, 422, {"detail": "temperature is too high"}, UpstreamRejected),
    "google argument": (GC, 400, google(400, "INVALID_ARGUMENT"), UpstreamRejected),
    # no answer at all
    "a redirect": (CC, 302, b"", UpstreamGarbled),
    "a 204": (CC, 204, b"", UpstreamGarbled),
}  # fmt: skip


@pytest.mark.parametrize(("protocol", "status", "body", "wanted"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_means_what_it_means(
    protocol: ApiProtocol, status: int, body: Any, wanted: type[UpstreamError]
) -> None:
    assert type(refused(protocol, status, body)) is wanted


TOLD = [
    # status and body                               status  kind               code
    (CC, 429, openai("insufficient_quota"), 429, Kind.BILLING, "insufficient_quota"),
    (CC, 402, openai(), 402, Kind.BILLING, "upstream_payment_required"),
    (CC, 429, openai(), 429, Kind.RATE_LIMIT, "rate_limit_exceeded"),
    (CC, 401, openai(), 502, Kind.BAD_GATEWAY, "upstream_authentication_failed"),
    (CC, 400, openai("context_length_exceeded"), 400, Kind.INVALID_REQUEST,
     "context_length_exceeded"),
    (CC, 404, openai("model_not_found"), 404, Kind.NOT_FOUND, "model_not_found"),
    (CC, 413, openai(), 413, Kind.TOO_LARGE, "upstream_error"),
    (CC, 422, openai(), 422, Kind.INVALID_REQUEST, "upstream_error"),
    (CC, 408, openai(), 408, Kind.TIMEOUT, "upstream_error"),
    (CC, 500, openai(), 500, Kind.INTERNAL, "upstream_error"),
    (CC, 503, openai("server_is_overloaded"), 503, Kind.OVERLOADED, "server_is_overloaded"),
    (CC, 504, openai(), 504, Kind.TIMEOUT, "upstream_error"),
    (CC, 521, openai(), 521, Kind.BAD_GATEWAY, "upstream_error"),
    (ME, 529, anthropic("overloaded_error"), 529, Kind.OVERLOADED, "server_is_overloaded"),
    (CC, 302, b"", 502, Kind.BAD_GATEWAY, "upstream_invalid_response"),
]  # fmt: skip


@pytest.mark.parametrize(("protocol", "status", "body", "told", "kind", "code"), TOLD)
def test_a_refusal_keeps_its_status(
    protocol: ApiProtocol, status: int, body: Any, told: int, kind: Kind, code: str
) -> None:
    error = refused(protocol, status, body)
    assert (error.status, error.kind, error.code) == (told, kind, code)


def test_a_refusal_names_the_target_and_says_what_was_said() -> None:
    assert refused(CC, 400, openai(message="no such tool")).message == (
        "openai/m answered 400: no such tool"
    )


def test_the_provider_s_own_error_is_kept_for_the_caller() -> None:
    body = json.dumps(openai("invalid_value"), indent=4).encode()
    assert refused(CC, 400, body, {"x-request-id": "r"}).body == body
    assert refused(CC, 400, body, {"x-request-id": "r"}).headers == {"x-request-id": "r"}


@pytest.mark.parametrize("protocol", ApiProtocol)
def test_what_is_said_about_our_key_stays_with_us(protocol: ApiProtocol) -> None:
    error = refused(protocol, 401, openai("invalid_api_key", "Incorrect API key: sk-abc"))
    rendered = json.dumps(CODECS[protocol].render_error(error))
    assert "sk-abc" not in rendered + error.message + error.body.decode()
    assert "sk-abc" in error.detail


BODIES = {
    # body                                                 what is said
    "HTML": (b"<html>\n<h1>Bad\x00 Gateway</h1></html>", "<h1>Bad  Gateway</h1>"),
    "nothing": (b"", "openai/m answered 500"),
    "not UTF-8": (b"\xff\xfe broken", "broken"),
    "message at the top": (b'{"object":"error","message":"odd","code":"c"}', "500: odd"),
    "detail at the top": (b'{"detail":"odd"}', "500: odd"),
    "a text for an error": (b'{"error":"odd"}', "500: odd"),
    "an array": (b'[{"error":{"message":"odd","code":500}}]', "500: odd"),
    "an empty array": (b"[]", "500: []"),
    "a list of details": (b'{"detail":[{"loc":["body"]}]}', "loc"),
    "JSON nested without end": (b"[" * 100_000, "openai/m answered 500"),
}


@pytest.mark.parametrize(("body", "said"), BODIES.values(), ids=BODIES)
def test_a_body_of_any_kind_is_told_in_brief(body: bytes, said: str) -> None:
    message = refused(CC, 500, body).message
    assert said in message and len(message) < 2100 and "\n" not in message


def test_a_long_message_is_shortened() -> None:
    assert len(refused(CC, 500, openai(message="x" * 10**6)).message) < 2100
    assert len(refused(CC, 500, b"x" * 10**6).message) < 2100


@pytest.mark.parametrize("body", [b"<html>", b"", b"5", b"[]", b'"text"'])
def test_a_body_that_is_no_error_object_is_not_passed_on(body: bytes) -> None:
    assert refused(CC, 500, body).body == b""


def test_google_s_array_is_read_in_google_s_own_terms() -> None:
    body = [google(400, "INVALID_ARGUMENT", "API key not valid.", KEY_INVALID)]
    assert isinstance(refused(GC, 400, body), UpstreamKeyRefused)


IN_BAND = {
    "too long": ({"code": "context_length_exceeded", "message": "m"}, UpstreamUnfit),
    "too fast": ({"code": "rate_limit_exceeded", "message": "m"}, UpstreamLimited),
    "no credit": ({"code": "insufficient_quota", "message": "m"}, UpstreamNoCredit),
    "broken": ({"type": "server_error", "message": "m"}, UpstreamBroken),
    "a status for a code": ({"code": 429, "message": "m"}, UpstreamLimited),
}


@pytest.mark.parametrize(("error", "wanted"), IN_BAND.values(), ids=IN_BAND)
def test_an_error_inside_a_200_means_the_same(error: Any, wanted: type[UpstreamError]) -> None:
    facts = CHAT.parse_error({"error": error})
    assert facts is not None
    assert type(judge("openai/m", facts.status or 502, facts)) is wanted


def test_an_error_without_a_word_is_judged_by_its_status() -> None:
    assert judge("openai/m", 500, ErrorFacts("", frozenset())).message == "openai/m answered 500"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(418, Kind.INVALID_REQUEST), (409, Kind.INVALID_REQUEST), (521, Kind.BAD_GATEWAY)],
)
def test_a_status_that_we_do_not_know_has_its_class_s_kind(status: int, kind: Kind) -> None:
    assert kind_of(status) is kind


# --- how long to wait

WALL_S = 1_792_567_680.0  # Wed, 21 Oct 2026 07:28:00 GMT
WAITS = [
    ({"retry-after": "7"}, 7.0),
    ({"retry-after": "1.5"}, 1.5),
    ({"retry-after": "0"}, 0.0),
    ({"retry-after-ms": "1500"}, 1.5),
    ({"retry-after-ms": "20", "retry-after": "7"}, 0.02),
    ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
    ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, 30.0),
    ({"retry-after": "Wed, 21 Oct 2026 07:27:30 GMT"}, 0.0),
    ({"retry-after": "Wednesday, 21-Oct-26 07:29:00 GMT"}, 60.0),
    ({"retry-after": "Wed, 21 Oct 2026 09:28:05 +0200"}, 5.0),
    ({"retry-after": "Wed, 99 Oct 2026 07:28:30 GMT"}, None),
    ({"retry-after": "soon"}, None),
    ({"retry-after": "-5"}, None),
    ({"retry-after": ""}, None),
    ({}, None),
]


@pytest.mark.parametrize(("headers", "wanted"), WAITS)
def test_a_wait_is_read_as_seconds_or_as_a_date(headers: Headers, wanted: float | None) -> None:
    assert retry_after(headers, WALL_S) == wanted


def test_google_s_retry_info_counts_when_no_header_says_more() -> None:
    body = google(429, "RESOURCE_EXHAUSTED", "said", {"retryDelay": "37s"})
    assert refused(GC, 429, body).retry_after_s == 37.0
    assert refused(GC, 429, body, {"retry-after": "2"}).retry_after_s == 2.0


# The form of events that all SDKs of a protocol read, and near misses.

NAMED_STRICT = {
    "one": b'event: a\ndata: {"a":1}\n\n',
    "two": b'event: a\ndata: {"a":1}\n\nevent: b\ndata: {"b":1}\n\n',
}
NAMED_NOT_STRICT = {
    "no event line": b'data: {"a":1}\n\n',
    "one without an event line": b'event: a\ndata: {"a":1}\n\ndata: {"b":1}\n\n',
    "CRLF": b'event: a\r\ndata: {"a":1}\r\n\r\n',
    "no space": b'event: a\ndata:{"a":1}\n\n',
    "no space after event": b'event:a\ndata: {"a":1}\n\n',
    "data first": b'data: {"a":1}\nevent: a\n\n',
    "a bare CR": b'event: a\ndata: {"a":\r1}\n\n',
    "an id line": b'event: a\ndata: {"a":1}\nid: 1\n\n',
    "an id line first": b'id: 1\nevent: a\ndata: {"a":1}\n\n',
    "two data lines": b'event: a\ndata: {"a":\ndata: 1}\n\n',
    "a comment": b': c\n\nevent: a\ndata: {"a":1}\n\n',
    "no data": b'event: a\n\nevent: b\ndata: {"b":1}\n\n',
    "[DONE]": b'event: a\ndata: {"a":1}\n\ndata: [DONE]\n\n',
}
STRICT: dict[ApiProtocol, dict[str, bytes]] = {
    CC: {
        "one": b'data: {"a":1}\n\n',
        "two": b'data: {"a":1}\n\ndata: {"b":2}\n\n',
    },
    RE: NAMED_STRICT,
    ME: {**NAMED_STRICT, "a ping": MESSAGES.heartbeat, "the end mark": MESSAGES.end_mark},
    GC: {
        "CRLF": b'data: {"a":1}\r\n\r\n',
        "two in CRLF": b'data: {"a":1}\r\n\r\ndata: {"a":2}\r\n\r\n',
        "LF": b'data: {"a":1}\n\n',
    },
}
NOT_STRICT: dict[ApiProtocol, dict[str, bytes]] = {
    CC: {
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
    },
    RE: NAMED_NOT_STRICT,
    ME: NAMED_NOT_STRICT,
    GC: {
        "no space": b'data:{"a":1}\r\n\r\n',
        "an event line": b'event: x\r\ndata: {"a":1}\r\n\r\n',
        "an id line": b'data: {"a":1}\r\nid: 1\r\n\r\n',
        "two data lines": b'data: {"a":\r\ndata: 1}\r\n\r\n',
        "a comment": b': c\r\n\r\ndata: {"a":1}\r\n\r\n',
        "[DONE]": b'data: {"a":1}\r\n\r\ndata: [DONE]\r\n\r\n',
        "bare CR": b'data: {"a":1}\r\r',
        "a bare CR among CRLF": b'data: {"a":1}\r\n\r\ndata: {"a":\r1}\r\n\r\n',
    },
}


def forms(table: dict[ApiProtocol, dict[str, bytes]]) -> list[Any]:
    return [
        pytest.param(protocol, raw, id=f"{protocol}-{how}")
        for protocol, by_name in table.items()
        for how, raw in by_name.items()
    ]


@pytest.mark.parametrize(("protocol", "raw"), forms(STRICT))
def test_the_form_that_all_sdks_read_is_strict(protocol: ApiProtocol, raw: bytes) -> None:
    assert CODECS[protocol].strict(raw)


@pytest.mark.parametrize(("protocol", "raw"), forms(NOT_STRICT))
def test_any_other_form_is_not(protocol: ApiProtocol, raw: bytes) -> None:
    assert not CODECS[protocol].strict(raw)
