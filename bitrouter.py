#!/usr/bin/env python3
"""BitRouter: an LLM gateway in one file, with nothing but the standard library.

A request's journey, with the section that does each step:

    bytes in     callers    read one HTTP/1.1 request, strictly and under a deadline
    door         pipeline   check Host and Origin, find what the path asks for, check the key
    read         pipeline   content type; the body as a Document: JSON that keeps its bytes
    route        routing    model id -> chain of Targets, first choice first
    order        health     accounts take turns; targets that cool down go last
    attempt      attempts   for each Target: put in model and key, send; fall back if nothing is out
    watch        relay      pass the events on; the codec notes usage, finish and errors
    bytes out    callers    the answer, or events as they come, with back-pressure
    book         pipeline   one log line: who, what, where, how long, how many tokens, how much

Contents

     1. errors     what can go wrong, and what the caller is told
     2. basics     secrets, JSON we did not write and must not rewrite, words for people
     3. http       HTTP/1.1 heads and bodies
     4. sse        Server-Sent Events: whole events out of any bytes
     5. ir         what all protocols have in common: Usage, StreamPart, Codec
     6. chat       OpenAI Chat Completions
     7. responses  OpenAI Responses
     8. messages   Anthropic Messages
     9. gemini     Google generateContent
    10. codecs     the table of protocols, and the operations that each one has
    11. relay      a provider's stream on its way to the caller
    12. registry   the providers and models we know, and what they cost
    13. config     bitrouter.toml and the environment -> Config
    14. routing    model id -> chain of targets
    15. health     which targets are failing, and until when to spare them
    16. echo       the built-in model
    17. logs       one line per event, for people or for machines
    18. transport  the HTTP client: pool, TLS, proxies, deadlines
    19. runtime    App: everything a request needs
    20. callers    connections from callers
    21. attempts   one upstream call, and the loop of retries and fallbacks around it
    22. pipeline   one request's life; the handlers
    23. server     listening, finding local servers, draining
    24. cli        the command line

A section uses its own names and those of the sections before it, never those after it, and a
name that starts with an underscore is private to its section. Sections marked (pure) do no
I/O, read no clock and await nothing. tests/test_layout.py holds us to all of it.

Short names used throughout: `op` is an Operation, `part` a StreamPart, `target` one place to
send to, `who` its name in a message, `said` what a message says, `head` an HTTP head, `ident` a
provider's id, `now` the monotonic clock in seconds.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import functools
import hashlib
import hmac
import itertools
import json
import logging
import os
import random
import re
import socket
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    import argparse
    import ssl

__version__ = "0.1.0"

Json: TypeAlias = Any  # what json.loads gives back
JsonObject: TypeAlias = dict[str, Any]
Headers: TypeAlias = dict[str, str]  # names in lower case; repeated fields joined with ", "
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------
# 1. errors: what can go wrong, and what the caller is told (pure)
# ---------------------------------------------------------------------------------------------
# To raise is to respond: the codec of the caller's protocol renders the error, by its `kind`.
# A kind is what an error means in no protocol in particular; each codec has its own word for it.


class Kind(enum.StrEnum):
    """What an error means to the caller, whatever its protocol calls it."""

    INVALID_REQUEST = enum.auto()
    AUTH = enum.auto()
    BILLING = enum.auto()
    PERMISSION = enum.auto()
    NOT_FOUND = enum.auto()
    TOO_LARGE = enum.auto()
    RATE_LIMIT = enum.auto()
    OVERLOADED = enum.auto()
    INTERNAL = enum.auto()
    BAD_GATEWAY = enum.auto()
    TIMEOUT = enum.auto()
    UNSUPPORTED = enum.auto()


class BitrouterError(Exception):
    """Anything we raise on purpose.

    Attributes:
        message: for the caller: what was found, what was expected, what to do. No secret.
        code: a stable word for programs.
        param: the request's field that is to blame, if one is.
        detail: for the log alone.
        retry_after_s: seconds after which trying again makes sense.
        extra: further facts for the error object, such as the variable that is not set.
    """

    status: int = 500
    kind: Kind = Kind.INTERNAL
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        param: str | None = None,
        detail: str = "",
        retry_after_s: float | None = None,
        extra: JsonObject | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.param = param
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.extra = extra or {}


class ConfigError(BitrouterError):
    """The configuration is wrong; the message holds one line per problem."""

    code = "config_invalid"


class BadRequest(BitrouterError):
    status, kind, code = 400, Kind.INVALID_REQUEST, "invalid_request"


class BadHttp(BadRequest):
    """The message itself is malformed, whatever it wanted to say."""

    code = "malformed_http"


class Unauthorized(BitrouterError):
    status, kind, code = 401, Kind.AUTH, "invalid_api_key"


class KeyMissing(BitrouterError):
    """The model is known, but nobody who serves it has a key here."""

    status, kind, code = 402, Kind.BILLING, "provider_key_missing"


class Forbidden(BitrouterError):
    status, kind, code = 403, Kind.PERMISSION, "forbidden"


class NotFound(BitrouterError):
    status, kind, code = 404, Kind.NOT_FOUND, "not_found"


class MethodNotAllowed(BitrouterError):
    status, kind, code = 405, Kind.INVALID_REQUEST, "method_not_allowed"


class RequestTimeout(BitrouterError):
    status, kind, code = 408, Kind.TIMEOUT, "request_timeout"


class TooLarge(BitrouterError):
    status, kind, code = 413, Kind.TOO_LARGE, "request_too_large"


class UnsupportedMedia(BitrouterError):
    status, kind, code = 415, Kind.INVALID_REQUEST, "unsupported_media_type"


class HeadTooLarge(BitrouterError):
    status, kind, code = 431, Kind.INVALID_REQUEST, "headers_too_large"


class ProtocolUnsupported(BitrouterError):
    """No target of the chain speaks the caller's protocol."""

    status, kind, code = 501, Kind.UNSUPPORTED, "protocol_unsupported"


class CallerGone(BitrouterError):
    """The caller hung up. Nobody reads this; the status is nginx's."""

    status, code = 499, "caller_gone"


class UpstreamError(BitrouterError):
    """A provider failed us.

    Attributes:
        status: the provider's own, when it gave one that a caller can use.
        retryable: whether another target may do better.
        body: the provider's own error body, when it is JSON of its protocol's shape.
        headers: the provider's response headers.
    """

    status, kind, code = 502, Kind.BAD_GATEWAY, "upstream_error"
    retryable: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        kind: Kind | None = None,
        body: bytes = b"",
        headers: Headers | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message, **more)
        self.status = status or self.status
        self.kind = kind or self.kind
        self.body = body
        self.headers = headers or {}


class UpstreamUnreachable(UpstreamError):
    status, code = 503, "upstream_unreachable"


class UpstreamTimeout(UpstreamError):
    status, kind, code = 504, Kind.TIMEOUT, "upstream_timeout"


class UpstreamLimited(UpstreamError):
    status, kind, code = 429, Kind.RATE_LIMIT, "rate_limit_exceeded"


class UpstreamNoCredit(UpstreamError):
    """The account is out of credit or over its spend limit; another one may not be."""

    status, kind, code = 402, Kind.BILLING, "upstream_payment_required"


class UpstreamKeyRefused(UpstreamError):
    """The provider refused our key: not the caller's fault, so the caller sees no 401."""

    code = "upstream_authentication_failed"


class UpstreamGarbled(UpstreamError):
    """The provider said 200, but what came is not an answer in its protocol."""

    code = "upstream_invalid_response"


class UpstreamBroken(UpstreamError):
    """The provider answered with a 408 or a 5xx."""


class UpstreamUnfit(UpstreamError):
    """This model cannot serve this prompt (too long, filtered, unknown there); another may."""

    status, kind = 400, Kind.INVALID_REQUEST


class UpstreamRejected(UpstreamError):
    """The provider understood the request and refused it: no other target will like it more."""

    status, kind, retryable = 400, Kind.INVALID_REQUEST, False


class AllAttemptsFailed(UpstreamError):
    """Every target was tried; the message names each attempt and what became of it."""

    status, code, retryable = 503, "all_attempts_failed", False


# ---------------------------------------------------------------------------------------------
# 2. basics: secrets, JSON we did not write and must not rewrite, words for people (pure)
# ---------------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\r\n]*")
_COLON = re.compile(r"[ \t\r\n]*:[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_ASCII = json.JSONEncoder(separators=(",", ":")).encode
_JSON_TYPES = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}


class Secret:
    """A key. Shown nowhere: not by repr, str, format or json; only `reveal` gives it away."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def redact(self, text: str) -> str:
        """A text without it."""
        return text.replace(self._text, "[redacted]") if self._text else text

    def __repr__(self) -> str:
        return f"Secret(...{self._text[-4:]})" if len(self._text) > 16 else "Secret(...)"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(
            self._text.encode(), other._text.encode()
        )

    def __hash__(self) -> int:
        return hash(self._text)


class Document:
    """A JSON object and its text, so that a value can be replaced without touching the rest.

    To parse and dump again would rewrite numbers, merge duplicate keys and break the prompt
    caches of providers, which compare bytes.
    """

    __slots__ = ("_added", "_edits", "_raw", "_text", "value")

    def __init__(self, raw: bytes) -> None:
        """Raises BadRequest when raw is not one JSON object in UTF-8."""
        try:
            self._raw = raw.removeprefix(b"\xef\xbb\xbf")
            self._text = self._raw.decode()
            value = _DECODER.decode(self._text)
        except UnicodeDecodeError as exc:
            raise BadRequest(f"the body is not UTF-8 (byte {exc.start})") from None
        except RecursionError:
            raise BadRequest("the body's JSON is nested too deeply") from None
        except ValueError as exc:
            raise BadRequest(f"the body is not valid JSON: {exc}") from None
        if not isinstance(value, dict):
            raise BadRequest(f"the body must be a JSON object, not {show_json(value)}")
        self.value: JsonObject = value
        self._edits: list[tuple[int, int, str]] = []
        self._added: list[str] = []

    def set(self, key: str, value: Json) -> None:
        """Replace a top-level value, or add it in front when there is none."""
        new = _ASCII(value)
        if key in self.value:
            try:
                self._edits.append((*self._span(key), new))
            except RecursionError:
                raise BadRequest("the body's JSON is nested too deeply") from None
        else:
            self._added.append(f"{json.dumps(key)}:{new}")

    def set_in(self, key: str, inner: str, value: Json) -> None:
        """Replace a value one level down, or add it there; key must hold an object or nothing."""
        outer = self.value.get(key)
        if not outer:
            self.set(key, {inner: value})
            return
        start, _ = self._span(key)
        new = _ASCII(value)
        if inner in outer:
            self._edits.append((*_spans(self._text, start, inner)[inner], new))
        else:
            self._edits.append((start + 1, start + 1, f"{json.dumps(inner)}:{new},"))

    def encoded(self) -> bytes:
        """The document with its edits, in UTF-8."""
        edits = self._edits
        if self._added:
            start = self._text.index("{") + 1
            comma = "," if self.value else ""
            edits = [*edits, (start, start, ",".join(self._added) + comma)]
        # In plain ASCII a place in the text is one in the bytes: they need not be made again.
        ascii_only = self._text.isascii()
        source = memoryview(self._raw if ascii_only else b"")
        pieces: list[bytes | memoryview] = []
        at = 0
        for start, end, new in sorted(edits):
            pieces += [source[at:start] if ascii_only else self._text[at:start].encode()]
            pieces += [new.encode()]
            at = end
        pieces += [source[at:] if ascii_only else self._text[at:].encode()]
        return b"".join(pieces)

    def forget_edits(self) -> None:
        self._edits.clear()
        self._added.clear()

    def _span(self, key: str) -> tuple[int, int]:
        """Where a value stands: most often near one end, with nothing nested on the way there."""
        text, quoted = self._text, f'"{key}"'
        if text.count(quoted) == 1:
            at = text.index(quoted)
            colon = _COLON.match(text, at + len(quoted))
            if colon:
                value, end = _DECODER.raw_decode(text, colon.end())
                outermost = _is_flat(text[:at], "{") or _is_flat(text[end:], "}")
                if outermost and value == self.value[key]:
                    return colon.end(), end
        return _spans(text, text.index("{"), key)[key]


def _is_flat(piece: str, brace: str) -> bool:
    """Whether an end of a JSON object holds no more than the object's own brace, and no escapes
    by which something might look like what it is not."""
    return (
        len(piece) <= 512
        and piece.count(brace) == 1
        and "[" not in piece
        and "]" not in piece
        and "\\" not in piece
    )


def _spans(text: str, start: int, wanted: str) -> dict[str, tuple[int, int]]:
    """Where each value of the valid JSON object at `start` starts and ends.

    Raises BadRequest if the wanted one is there twice: who reads it next may read the other.
    """
    spans: dict[str, tuple[int, int]] = {}
    at = _skip(text, start + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        begin = _skip(text, _skip(text, at) + 1)
        at = _DECODER.raw_decode(text, begin)[1]
        if key == wanted and key in spans:
            raise BadRequest(f"{key}: this field is given twice", param=key)
        spans[key] = (begin, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return spans


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def first_json(text: str) -> Json:
    """The value that a text begins with. Raises ValueError or RecursionError."""
    return _DECODER.raw_decode(text)[0]


def parse_json(raw: bytes) -> Json:
    """Raises ValueError for what is not JSON in UTF-8, RecursionError for what is too deep."""
    return _DECODER.decode(raw.decode())


def show_json(value: Json) -> str:
    """A value in an error message: short, on one line, without control characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def maybe(obj: JsonObject, key: str, kind: type[T]) -> T | None:
    """obj[key] if it has that type; None when it is absent or null. Raises BadRequest."""
    value = obj.get(key)
    if value is None:
        return None
    if not isinstance(value, kind):
        found = show_json(value)
        raise BadRequest(f"{key}: expected {_JSON_TYPES[kind]}, got {found}", param=key)
    return value


def as_list(value: Json) -> list[Json]:
    """A list from JSON of unknown shape; empty for anything else."""
    return value if isinstance(value, list) else []


def as_object(value: Json) -> JsonObject:
    """An object from JSON of unknown shape; empty for anything else."""
    return value if isinstance(value, dict) else {}


def dig(value: Json, *path: str | int) -> Json:
    """Follow a path into JSON of unknown shape; None as soon as it leads nowhere."""
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and len(value) > step else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def whole(value: Json) -> int:
    """A count from somebody else's JSON; 0 for anything that is not a sensible number."""
    if type(value) is int:
        return value if 0 < value < 1_000_000_000_000_000 else 0
    return int(value) if isinstance(value, float) and 0 < value < 1e15 else 0


def compact(value: Json) -> bytes:
    """JSON as short as it gets; what cannot be encoded becomes U+FFFD."""
    text = _COMPACT(value)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


def printable(text: str, limit: int = 200) -> str:
    """Text of unknown origin, fit for a header or a log line: visible ASCII, bounded."""
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    shown = text[:limit].encode("ascii", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f]", " ", shown)


def near_misses(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """What was probably meant, best first."""
    import difflib  # 10 ms, and only wanted when something is wrong

    return difflib.get_close_matches(word, list(known), count, 0.5)


def seconds_of(text: str) -> float | None:
    """Seconds in a Retry-After or a vendor's duration: `2`, `1.5s`, `20ms`, `6m0s`, `1h2m`."""
    text = text.strip()
    try:
        plain = float(text)
        return plain if 0 <= plain < 1e9 else None
    except ValueError:
        parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?", text)
        if not text or parts is None:
            return None
        with suppress(ValueError):
            h, m, s, ms = (float(part or 0) for part in parts.groups())
            seconds = h * 3600 + m * 60 + s + ms / 1000
            return seconds if seconds < 1e9 else None
        return None


# ---------------------------------------------------------------------------------------------
# 3. http: HTTP/1.1 heads and bodies (pure)
# ---------------------------------------------------------------------------------------------
# RFC 9112. What we accept is strict, because a proxy and its neighbour that read one message
# differently is how requests are smuggled: no bare LF, no line folding, no space before a colon
# (5.1), no control characters, one Content-Length made of digits, never Content-Length together
# with Transfer-Encoding (6.1), and no transfer coding but chunked.
#
# One regular expression judges a whole head (2 us); the parsing after it can then be naive.

_MAX_FIELDS = 256
MAX_HEAD_BYTES = 64 * 1024  # nginx allows 32 KB by default, Node 16 KB; agents send long betas
_MAX_CHUNK_LINE = 4096
_MAX_TRAILER_BYTES = 16 * 1024

_FIELD = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*+\r\n"
_FIELDS = b"(?:" + _FIELD + rb")*+\r\n"
_REQUEST_HEAD = re.compile(rb"[A-Z]{1,20} [!-~]+ HTTP/1\.[01]\r\n" + _FIELDS)
_RESPONSE_HEAD = re.compile(rb"HTTP/1\.[01] [1-9]\d\d(?: [^\r\n]*+)?\r\n" + _FIELDS)
_HOST = re.compile(r"(?:(?:\[[0-9A-Fa-f:.]+\]|[\w.~-]+)(?::[0-9]{1,5})?)?", re.ASCII)
_REQUEST_LINE = re.compile(rb"[A-Z]{1,20} [!-~]+ HTTP/1\.[01]")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_WHOLE_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
_LENGTH = re.compile(r"\d{1,15}")

# A message with two of these is malformed; two of anything else are a list (RFC 9110, 5.3).
_ONLY_ONCE = {"content-length", "transfer-encoding", "host", "content-type", "content-encoding"}

REASONS = {
    200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized",
    402: "Payment Required", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 413: "Content Too Large", 415: "Unsupported Media Type",
    422: "Unprocessable Content", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
    502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 529: "Overloaded",
}  # fmt: skip


class RequestHead(NamedTuple):
    method: str
    target: str
    headers: Headers
    keep_alive: bool
    minor: int  # HTTP/1.0 or HTTP/1.1


class ResponseHead(NamedTuple):
    status: int
    headers: Headers
    keep_alive: bool


def parse_request_head(head: bytes) -> RequestHead:
    """Parse everything up to and including the blank line. Raises BadRequest."""
    if _REQUEST_HEAD.fullmatch(head) is None:
        raise BadHttp(_what_is_wrong(head))
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    headers = _headers(lines)
    if version == "HTTP/1.1" and "host" not in headers:
        raise BadHttp("an HTTP/1.1 request needs a Host header")
    if not target.startswith("/"):
        target, headers["host"] = _absolute(target)
    if _HOST.fullmatch(headers.get("host", "")) is None:
        shown = printable(headers["host"], 80)
        raise BadHttp(f"malformed host: {shown!r}")
    connection = headers.get("connection", "").lower()
    keep = "close" not in connection if version == "HTTP/1.1" else "keep-alive" in connection
    return RequestHead(method, target, headers, keep, int(version[-1]))


def _absolute(target: str) -> tuple[str, str]:
    """An absolute-form target: its host counts, whatever the Host header says (3.2.2)."""
    found = re.fullmatch(r"https?://([^/?#]+)(/[^#]*|\?[^#]*)?", target)
    if found is None:
        shown = printable(target, 80)
        raise BadHttp(f"malformed request target: {shown!r}")
    path = found[2] or "/"
    return (path if path.startswith("/") else f"/{path}"), found[1]


def parse_response_head(head: bytes) -> ResponseHead:
    """Parse a provider's head. Raises UpstreamGarbled."""
    if _RESPONSE_HEAD.fullmatch(head) is None:
        raise UpstreamGarbled("the provider did not answer in HTTP/1.1", detail=_show(head))
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    try:
        headers = _headers(lines)
    except BitrouterError as exc:
        raise UpstreamGarbled(f"the provider's response: {exc.message}") from None
    connection = headers.get("connection", "").lower()
    keep = "close" not in connection if first[7] == "1" else "keep-alive" in connection
    return ResponseHead(int(first[9:12]), headers, keep)


def render_head(first_line: str, headers: Mapping[str, str]) -> bytes:
    """A head ready to send. Values must hold no CR or LF: we never pass one on unparsed."""
    fields_ = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"{first_line}\r\n{fields_}\r\n".encode("latin-1", "replace")


def _headers(lines: list[str]) -> Headers:
    if len(lines) > _MAX_FIELDS:
        raise HeadTooLarge(f"there are {len(lines)} headers, at most {_MAX_FIELDS} are accepted")
    fields_ = [line.partition(":") for line in lines]
    headers = {name.lower(): value.strip(" \t") for name, _, value in fields_}
    if len(headers) == len(lines):
        return headers
    headers = {}
    for name, _, value in fields_:
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in _ONLY_ONCE:
                raise BadHttp(f"{name}: this header is given twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _what_is_wrong(head: bytes) -> str:
    first, *lines = head[:-4].split(b"\r\n")
    if _REQUEST_LINE.fullmatch(first) is None:
        return f"malformed request line: {_show(first)}"
    bad = next((line for line in lines if re.fullmatch(_FIELD, line + b"\r\n") is None), b"")
    return f"malformed header line: {_show(bad)}"


def _show(raw: bytes) -> str:
    return repr(raw[:80].decode("ascii", "backslashreplace"))


UNTIL_CLOSE, CHUNKED = -1, -2


def request_framing(head: RequestHead) -> int:
    """The length of a request's body in bytes, or CHUNKED. Raises BadRequest."""
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if coding is not None:
        if length is not None or coding.lower() != "chunked" or head.minor == 0:
            said = "with content-length" if length is not None else repr(printable(coding, 40))
            raise BadHttp(f"transfer-encoding {said} is not accepted")
        return CHUNKED
    return _length(length) if length is not None else 0


def response_framing(head: ResponseHead, method: str = "POST") -> int:
    """The length of a response's body in bytes, CHUNKED, or UNTIL_CLOSE (RFC 9112, 6.3)."""
    if head.status in (204, 304) or head.status < 200 or method == "HEAD":
        return 0
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            said = f"transfer-encoding {printable(coding, 40)!r}"
            said += " and content-length" if length is not None else ""
            raise UpstreamGarbled(f"the provider framed its answer with {said}")
        return CHUNKED
    return UNTIL_CLOSE if length is None else _length(length)


def _length(text: str) -> int:
    if _LENGTH.fullmatch(text) is None:
        raise BadHttp(f"content-length: expected digits, got {printable(text, 40)!r}")
    return int(text)


class BodyDecoder:
    """Takes the bytes of a connection, gives back those of one body.

    Attributes:
        done: the body is complete.
        rest: what came after its end: the next message.
    """

    __slots__ = ("_left", "_line", "_trailer", "done", "framing", "rest")

    def __init__(self, framing: int) -> None:
        self.framing = framing
        self.done = framing == 0
        self.rest = b""
        self._left = max(framing, 0)  # of this body, or of this chunk and its CRLF
        self._line = b""  # a chunk's size line that is not all there
        self._trailer = -1  # bytes of trailer read; -1 before the last chunk

    def feed(self, data: bytes) -> bytes:
        """Raises BadRequest when the chunked framing is broken."""
        if self.framing == CHUNKED:
            return self._feed_chunked(data)
        if self.framing == UNTIL_CLOSE:
            return data
        if len(data) >= self._left:
            self.done = True
            data, self.rest = data[: self._left], data[self._left :]
        self._left -= len(data)
        return data

    def _feed_chunked(self, data: bytes) -> bytes:
        if self._line:
            data, self._line = self._line + data, b""
        out: list[bytes] = []
        at, size = self._whole_chunks(data, out), len(data)
        while at < size and not self.done:
            if self._left > 2:
                piece = data[at : at + self._left - 2]
                out.append(piece)
                self._left -= len(piece)
                at += len(piece)
                continue
            if self._left:
                at = self._chunk_end(data, at)
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._line = data[at:]
                if len(self._line) > _MAX_CHUNK_LINE or b"\n" in self._line:
                    raise BadHttp("a chunk's size line has no end")
                break
            self._size_line(data[at:end])
            at = end + 2
        if self.done:
            self.rest = data[at:]
        return out[0] if len(out) == 1 else b"".join(out)

    def _whole_chunks(self, data: bytes, out: list[bytes]) -> int:
        """Take the chunks that are all there: in a busy stream these are hundreds a read."""
        at = 0
        if self._left or self._trailer >= 0:
            return at
        while found := _WHOLE_CHUNK.match(data, at):
            start = found.end()
            end = start + int(found[1], 16)
            if end == start or data[end : end + 2] != b"\r\n":
                break
            out.append(data[start:end])
            at = end + 2
        return at

    def _chunk_end(self, data: bytes, at: int) -> int:
        end = data[at : at + self._left]
        if end != b"\r\n"[2 - self._left :][: len(end)]:
            raise BadHttp("a chunk is longer than its size says")
        self._left -= len(end)
        return at + len(end)

    def _size_line(self, line: bytes) -> None:
        if self._trailer >= 0:
            self._trailer += len(line)
            if self._trailer > _MAX_TRAILER_BYTES or b"\n" in line:
                raise BadHttp("the trailer is malformed")
            self.done = not line
            return
        found = _CHUNK_LINE.fullmatch(line)
        if found is None:
            raise BadHttp(f"malformed chunk size: {_show(line)}")
        size = int(found[1], 16)
        if size:
            self._left = size + 2
        else:
            self._trailer = 0


_GZIP = 16 + zlib.MAX_WBITS
_SLICE_BYTES = 64 * 1024
_MAX_MEMBERS = 1000  # of one gzip body; each costs a copy of a slice


class Inflater:
    """Undoes a content-encoding. Raises what `fail` makes of a message."""

    def __init__(self, coding: str, limit: int, fail: Callable[[str], BitrouterError]) -> None:
        """limit: bytes that may come out in all: a bomb must not fill the memory."""
        self._limit, self._fail = limit, fail
        coding = {"x-gzip": "gzip"}.get(coding.strip().lower(), coding.strip().lower())
        if coding not in ("gzip", "deflate"):
            raise fail(f"content-encoding {printable(coding, 40)!r} is not known: use gzip")
        self._is_gzip, self._members = coding == "gzip", 1
        self._zip = zlib.decompressobj(_GZIP) if self._is_gzip else None
        self._start = b""

    def feed(self, data: bytes) -> bytes:
        if self._zip is None:
            self._start += data
            if len(self._start) < 2:
                return b""
            data = self._start
            self._zip = zlib.decompressobj(_deflate_window(data))
        # In slices: zlib copies what is left at the end of each member of a gzip file.
        slices = (data[at : at + _SLICE_BYTES] for at in range(0, len(data), _SLICE_BYTES))
        try:
            return b"".join([self._unpack(piece) for piece in slices])
        except zlib.error as exc:
            raise self._fail(f"the compressed body is broken: {exc}") from None

    def _unpack(self, data: bytes) -> bytes:
        out = []
        while data and self._zip:
            if self._zip.eof:
                self._members += 1
                if not self._is_gzip or self._members > _MAX_MEMBERS:
                    raise self._fail("the compressed body goes on after its end")
                self._zip = zlib.decompressobj(_GZIP)
            out.append(self._zip.decompress(data, self._limit + 1))
            data = self._zip.unused_data if self._zip.eof else b""
            self._limit -= len(out[-1])
            if self._limit < 0:
                raise self._fail("the compressed body is larger than allowed when unpacked")
        return b"".join(out)

    def finish(self) -> None:
        if self._zip is None or not self._zip.eof:
            raise self._fail("the compressed body ends too early")


def _deflate_window(start: bytes) -> int:
    """`deflate` should be zlib's format (RFC 1950); some senders mean raw deflate, as old browsers
    did. Only the former begins with a multiple of 31."""
    is_zlib = start[0] & 15 == 8 and int.from_bytes(start[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS


# ---------------------------------------------------------------------------------------------
# 4. sse: Server-Sent Events: whole events out of any bytes (pure)
# ---------------------------------------------------------------------------------------------
# https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
#
# Bytes come cut anywhere, even between CR and LF or inside a character. Only whole events go
# on: then a keep-alive may be written at any time, and a stream that breaks off leaves no half
# event to swallow the error that we write after it. Lines end in LF, CRLF or CR and in nothing
# else: U+2028 and its like stand unescaped inside JSON.

MAX_EVENT_BYTES = 64 * 1024 * 1024  # base64 images of 32 MB do occur
_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")


class SseEvent(NamedTuple):
    data: bytes  # without its line ends
    event: str = ""


class EventCutter:
    """Takes chunks, gives back as many whole events as there are, in their own bytes."""

    __slots__ = ("_first", "_held", "_held_bytes", "_tail")

    def __init__(self) -> None:
        self._held: list[bytes] = []  # what came since the last boundary
        self._held_bytes = 0
        self._tail = b""  # the last bytes of it, where a boundary may begin
        self._first = True

    def feed(self, chunk: bytes) -> bytes:
        """Whole events, or nothing yet. Raises UpstreamGarbled for an event beyond all bounds."""
        if not self._held and not self._first and chunk.endswith(b"\n\n"):
            return chunk
        if self._first:
            chunk = self._without_bom(chunk)
        seam = self._tail + chunk
        cut = _after(seam, b"\n\n")
        if b"\r" in seam:
            cut = max(cut, _after(seam, b"\n\r\n"), _after(seam, b"\r\r"))
        if not cut:
            return self._hold(chunk, seam)
        cut -= len(self._tail)
        whole_events = b"".join([*self._held, chunk[:cut]]) if self._held else chunk[:cut]
        self._held.clear()
        self._tail = b""
        if cut < len(chunk):
            self._hold(chunk[cut:], chunk[cut:])
        return whole_events

    def finish(self) -> bytes:
        """The last event, if its blank line never came; ended properly."""
        rest = b"".join(self._held)
        self._held.clear()
        self._tail = b""
        return rest and rest.rstrip(b"\r\n") + b"\n\n"

    def _hold(self, chunk: bytes, seam: bytes) -> bytes:
        self._held.append(chunk)
        self._held_bytes = self._held_bytes + len(chunk) if len(self._held) > 1 else len(chunk)
        self._tail = seam[-3:]
        if self._held_bytes > MAX_EVENT_BYTES:
            raise UpstreamGarbled(
                f"the provider sent an event of more than {MAX_EVENT_BYTES >> 20} MB",
                code="upstream_event_too_large",
            )
        return b""

    def _without_bom(self, chunk: bytes) -> bytes:
        chunk = b"".join([*self._held, chunk])
        self._held.clear()
        self._tail = b""
        self._first = len(chunk) < 3 and _BOM.startswith(chunk)
        return chunk.removeprefix(_BOM)


def _after(seam: bytes, mark: bytes) -> int:
    at = seam.rfind(mark)
    return at + len(mark) if at >= 0 else 0


def split_events(block: bytes) -> Iterator[bytes]:
    """The single events of a block of whole ones, each with its blank line."""
    at = 0
    for end in _EVENT_END.finditer(block):
        yield block[at : end.end()]
        at = end.end()
    if at < len(block):
        yield block[at:]


def parse_event(raw: bytes) -> SseEvent | None:
    """What an event says; None if it says nothing (comments, ids)."""
    event, data = "", []
    for line in _LINE_END.split(raw):
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name == b"event":
            event = value.removeprefix(b" ").decode("utf-8", "replace")
    return SseEvent(b" ".join(data), event) if any(data) else None


def sse_encode(data: bytes, event: str = "") -> bytes:
    """One event. data must be a single line, as all JSON of ours is."""
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data) if event else b"data: %b\n\n" % data


# ---------------------------------------------------------------------------------------------
# 5. ir: what all protocols have in common: Usage, StreamPart, Codec (pure)
# ---------------------------------------------------------------------------------------------
# A request that goes to a provider of its own protocol keeps its bytes; of its answer we only
# read what we must: has it begun, is it finished, did it fail, what did it use. What the
# built-in model says is made of StreamParts, which a codec turns into any protocol.


class ApiProtocol(enum.StrEnum):
    """The wire dialects, spelled as the configuration spells them."""

    CHAT_COMPLETIONS = enum.auto()
    RESPONSES = enum.auto()
    MESSAGES = enum.auto()
    GENERATE_CONTENT = enum.auto()


class Usage(NamedTuple):
    """Tokens of one answer. Inclusive: input counts cached ones, output counts reasoning."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


class Finish(enum.StrEnum):
    """Why the model stopped."""

    STOP = enum.auto()
    TOOL_CALLS = enum.auto()


class Prompt(NamedTuple):
    """A request to a model, in no protocol in particular, as far as the built-in model reads it.

    Attributes:
        text: what the user said last.
        tools: names of the tools on offer.
        schema: the JSON schema that the answer must follow, if one was given.
        size: characters of the whole conversation, to count tokens by.
    """

    model: str
    text: str
    tools: tuple[str, ...] = ()
    schema: JsonObject | None = None
    size: int = 0
    stream: bool = False
    wants_usage: bool = True


class TextDelta(NamedTuple):
    text: str


class ToolCall(NamedTuple):
    """A whole call: its arguments are JSON text."""

    id: str
    name: str
    arguments: str


class Finished(NamedTuple):
    """Always the last part."""

    finish: Finish
    usage: Usage


StreamPart: TypeAlias = TextDelta | ToolCall | Finished


class StreamState:
    """What a stream in passing has shown so far.

    Attributes:
        started: something that a caller would miss has come: text, reasoning, a call, a finish.
        finished: the model said why it stopped.
        ended: the protocol's own end mark has come.
        error: what the provider reported inside the stream.
        memo: what a codec must remember to end the stream in order.
    """

    __slots__ = ("ended", "error", "finished", "memo", "started", "usage")

    def __init__(self) -> None:
        self.started = self.finished = self.ended = False
        self.error: ErrorFacts | None = None
        self.usage: Usage | None = None
        self.memo: JsonObject = {}


class ErrorFacts(NamedTuple):
    """What a provider's error object says, whatever its protocol.

    Attributes:
        words: its type, code, status and reasons, in lower case.
        status: the HTTP status that it stands for, if it names one.
    """

    message: str
    words: frozenset[str]
    status: int = 0
    retry_after_s: float | None = None


class AnswerLabel(NamedTuple):
    """What an answer that we make ourselves is called, and when it was made (epoch seconds)."""

    id: str
    created: int


class ErrorWords(NamedTuple):
    """What the protocols call one kind of error."""

    openai: str
    messages: str
    gemini: str


# wire: platform.openai.com/docs/guides/error-codes, docs.claude.com/en/api/errors,
# cloud.google.com/apis/design/errors; read 2026-11
# fmt: off
_ERROR_ROSETTA = (
    # kind                OpenAI's two                Messages, generateContent
    (Kind.INVALID_REQUEST, "invalid_request_error",    "invalid_request_error", "INVALID_ARGUMENT"),
    (Kind.AUTH,            "invalid_request_error",    "authentication_error", "UNAUTHENTICATED"),
    (Kind.BILLING,         "billing_error",            "billing_error", "FAILED_PRECONDITION"),
    (Kind.PERMISSION,      "permission_error",         "permission_error", "PERMISSION_DENIED"),
    (Kind.NOT_FOUND,       "invalid_request_error",    "not_found_error", "NOT_FOUND"),
    (Kind.TOO_LARGE,       "invalid_request_error",    "request_too_large", "INVALID_ARGUMENT"),
    (Kind.RATE_LIMIT,      "rate_limit_error",         "rate_limit_error", "RESOURCE_EXHAUSTED"),
    (Kind.OVERLOADED,      "service_unavailable_error", "overloaded_error", "UNAVAILABLE"),
    (Kind.INTERNAL,        "server_error",             "api_error", "INTERNAL"),
    (Kind.BAD_GATEWAY,     "server_error",             "api_error", "UNAVAILABLE"),
    (Kind.TIMEOUT,         "server_error",             "timeout_error", "DEADLINE_EXCEEDED"),
    (Kind.UNSUPPORTED,     "invalid_request_error",    "invalid_request_error", "UNIMPLEMENTED"),
)
# fmt: on
ERROR_WORDS = {kind: ErrorWords(*words) for kind, *words in _ERROR_ROSETTA}


def status_but_529(error: BitrouterError) -> int:
    """An error's status, for protocols whose vendors do not know Anthropic's 529."""
    return 503 if error.status == 529 else error.status


def plainly_framed(block: bytes) -> bool:
    """Whether each event of a block is one line of data with an object, and nothing else."""
    events = block.count(b"\n\n")
    return (
        block.startswith(b"data: {")
        and block.count(b"\n\ndata: {") == events - 1
        and block.count(b"}\n\n") == events
        and block.count(b"\n") == 2 * events
        and b"\r" not in block
    )


def named_and_framed(block: bytes) -> bool:
    """Whether each event of a block has its name, then one line of data with an object."""
    events = block.count(b"\n\n")
    return (
        block.startswith(b"event: ")
        and block.count(b"\n\nevent: ") == events - 1
        and block.count(b"\ndata: {") == events
        and block.count(b"}\n\n") == events
        and block.count(b"\n") == 3 * events
        and b"\r" not in block
    )


class StreamEncoder(Protocol):
    """StreamParts -> the bytes of a protocol's event stream."""

    def encode(self, part: StreamPart) -> bytes: ...


class Codec(NamedTuple):
    """One protocol: everything about it that the rest of the file needs to know.

    Attributes:
        comments: whether the protocol's own SDKs survive comments in a stream.
        heartbeat: bytes that they survive between two events.
        end_mark: what ends a stream, for a provider that finished and forgot to say so.
        strict: whether a block of whole events is in the form that all SDKs of the protocol read.
        dull: whether a block holds nothing for `note`. May say no for nothing, never yes.
        note: look at one event, and write down in the StreamState what it means.
        frame: one event, in the form that `strict` asks for; b"" for one that must not travel.
    """

    render_error: Callable[[BitrouterError], JsonObject]
    render_status: Callable[[BitrouterError], int]
    parse_error: Callable[[JsonObject], ErrorFacts | None]
    usage: Callable[[JsonObject], Usage | None]
    what_is_missing: Callable[[JsonObject], str]
    comments: bool
    heartbeat: bytes
    end_mark: bytes
    strict: Callable[[bytes], bool]
    dull: Callable[[bytes], bool]
    note: Callable[[StreamState, JsonObject], None]
    frame: Callable[[SseEvent], bytes]
    fail_stream: Callable[[BitrouterError, StreamState, bytes], bytes]
    parse_request: Callable[[JsonObject], Prompt] | None = None
    render_response: Callable[[Prompt, AnswerLabel, list[StreamPart]], JsonObject] | None = None
    encoder: Callable[[Prompt, AnswerLabel], StreamEncoder] | None = None


def words_of(*values: Json) -> frozenset[str]:
    return frozenset(value.lower() for value in values if isinstance(value, str))


def prompt_from(
    body: JsonObject, tool_path: tuple[str, ...], schema_path: tuple[str, ...]
) -> Prompt:
    """What the built-in model reads of a request of either chat protocol. Raises BadRequest."""
    messages = maybe(body, "messages", list) or []
    if not messages:
        raise BadRequest("messages: expected a list with at least one message", param="messages")
    said = [m for m in messages if dig(m, "role") == "user"]
    tools = [dig(tool, *tool_path) for tool in maybe(body, "tools", list) or ()]
    schema = dig(body, *schema_path)
    contents = [body.get("system"), *(dig(m, "content") for m in messages)]
    return Prompt(
        model=str(body.get("model")),
        text=texts_of(dig(said[-1], "content")) if said else "",
        tools=tuple(name for name in tools if isinstance(name, str)),
        schema=schema if isinstance(schema, dict) else None,
        size=sum(len(texts_of(content)) for content in contents),
        stream=body.get("stream") is True,
    )


def type_of(data: bytes) -> str:
    """The `type` of an event's JSON, which names the event in two of the protocols."""
    with suppress(ValueError, RecursionError):
        name = dig(parse_json(data), "type")
        if isinstance(name, str) and re.fullmatch(r"[\w.]+", name):
            return name
    return "message"


def texts_of(content: Json) -> str:
    """The text in a message's content: a string, or a list of parts of which some are text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(p["text"] for p in parts if isinstance(dig(p, "text"), str))


# ---------------------------------------------------------------------------------------------
# 6. chat: OpenAI Chat Completions (pure)
# ---------------------------------------------------------------------------------------------
# wire: platform.openai.com/docs/api-reference/chat, read 2026-11. OpenAI's SDKs want every
# event to be one `data:` line and nothing else (an `id:` line makes each later blank line a
# crash), usage in the last chunk, and errors as `{"error": {...}}` with no [DONE] after it.


def openai_render_error(error: BitrouterError) -> JsonObject:
    """OpenAI's error object, for both of its protocols."""
    facts = {"message": error.message, "type": ERROR_WORDS[error.kind].openai}
    return {"error": {**facts, "param": error.param, "code": error.code, **error.extra}}


def openai_parse_error(body: JsonObject) -> ErrorFacts | None:
    """OpenAI's error object, and the many likenesses of it that compatible servers send."""
    error = body.get("error")
    if not error:
        return None
    if not isinstance(error, dict):
        return ErrorFacts(str(error), frozenset())
    message, code = error.get("message") or error.get("detail") or "", error.get("code")
    status = whole(code) or whole(error.get("status"))
    words = words_of(error.get("type"), code, error.get("status"), error.get("param"))
    if not 400 <= status <= 599:
        status = next((n for word, n in _OPENAI_STATUS.items() if word in words), 0)
    return ErrorFacts(str(message), words, status)


# wire: platform.openai.com/docs/guides/error-codes, read 2026-11: what an error object stands for
# where no status comes with it. First match decides: codes before types.
_OPENAI_STATUS = {
    "rate_limit_exceeded": 429, "insufficient_quota": 429, "slow_down": 429,
    "context_length_exceeded": 400, "content_filter": 400, "invalid_api_key": 401,
    "model_not_found": 404, "server_is_overloaded": 503, "overloaded": 503,
    "overloaded_error": 503, "service_unavailable_error": 503, "rate_limit_error": 429,
    "requests": 429, "tokens": 429, "authentication_error": 401, "permission_error": 403,
    "not_found_error": 404, "billing_error": 402, "timeout": 504, "server_error": 500,
    "invalid_request_error": 400,
}  # fmt: skip


def _chat_usage(body: JsonObject) -> Usage | None:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt = as_object(usage.get("prompt_tokens_details"))
    completion = as_object(usage.get("completion_tokens_details"))
    return Usage(
        whole(usage.get("prompt_tokens") or usage.get("input_tokens")),  # images say input_tokens
        whole(usage.get("completion_tokens") or usage.get("output_tokens")),
        # wire: DeepSeek counts hits beside the details; api-docs.deepseek.com, read 2026-11
        whole(prompt.get("cached_tokens") or usage.get("prompt_cache_hit_tokens")),
        whole(prompt.get("cache_write_tokens")),
        whole(completion.get("reasoning_tokens")),
    )


def _chat_what_is_missing(body: JsonObject) -> str:
    return "" if body.get("choices") else "choices"


def _chat_dull(block: bytes) -> bool:
    return (
        b'"error"' not in block
        and b"[DONE]" not in block
        and block.count(b'"finish_reason"') == block.count(b'"finish_reason":null')
        and block.count(b'"usage"') == block.count(b'"usage":null')
    )


_CHAT_SUBSTANCE = (
    "content", "reasoning_content", "reasoning", "reasoning_details", "refusal", "tool_calls",
    "function_call", "audio",
)  # fmt: skip


def _chat_note(state: StreamState, chunk: JsonObject) -> None:
    if error := openai_parse_error(chunk):
        state.error = error
    state.usage = _chat_usage(chunk) or state.usage
    for choice in as_list(chunk.get("choices")):
        if dig(choice, "finish_reason"):
            state.finished = state.started = True
        delta = as_object(dig(choice, "delta"))
        if any(dig(delta, key) for key in _CHAT_SUBSTANCE):
            state.started = True
        if dig(choice, "text"):  # the older /v1/completions
            state.started = True


def _chat_frame(event: SseEvent) -> bytes:
    return sse_encode(event.data)


def _chat_fail_stream(error: BitrouterError, state: StreamState, last: bytes) -> bytes:  # noqa: ARG001
    return sse_encode(compact(openai_render_error(error)))


def _chat_parse_request(body: JsonObject) -> Prompt:
    prompt = prompt_from(body, ("function", "name"), ("response_format", "json_schema", "schema"))
    return prompt._replace(wants_usage=dig(body, "stream_options", "include_usage") is True)


def _chat_render_response(
    prompt: Prompt, label: AnswerLabel, parts: list[StreamPart]
) -> JsonObject:
    message: JsonObject = {"role": "assistant", "content": None, "refusal": None}
    text = "".join(part.text for part in parts if isinstance(part, TextDelta))
    calls = [_chat_call(part) for part in parts if isinstance(part, ToolCall)]
    message["content"] = text or None
    if calls:
        message["tool_calls"] = calls
    last = parts[-1]
    assert isinstance(last, Finished)  # noqa: S101  a part list always ends so
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish}
    return {
        "id": f"chatcmpl-{label.id}",
        "object": "chat.completion",
        "created": label.created,
        "model": prompt.model,
        "choices": [choice],
        "usage": _chat_render_usage(last.usage),
    }


def _chat_call(call: ToolCall) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _chat_render_usage(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


class _ChatEncoder:
    def __init__(self, prompt: Prompt, label: AnswerLabel) -> None:
        self._head = {
            "id": f"chatcmpl-{label.id}",
            "object": "chat.completion.chunk",
            "created": label.created,
            "model": prompt.model,
        }
        self._wants_usage = prompt.wants_usage
        self._calls = 0
        self._opened = False

    def encode(self, part: StreamPart) -> bytes:
        opening = b"" if self._opened else self._chunk({"role": "assistant", "content": ""})
        self._opened = True
        match part:
            case TextDelta(text):
                return opening + self._chunk({"content": text})
            case ToolCall():
                self._calls += 1
                call = {"index": self._calls - 1, **_chat_call(part)}
                return opening + self._chunk({"tool_calls": [call]})
            case Finished(finish, usage):
                return opening + self._chunk({}, finish) + self._end(usage)

    def _chunk(self, delta: JsonObject, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return sse_encode(compact({**self._head, "choices": [choice]}))

    def _end(self, usage: Usage) -> bytes:
        chunk = {**self._head, "choices": [], "usage": _chat_render_usage(usage)}
        return (sse_encode(compact(chunk)) if self._wants_usage else b"") + CHAT.end_mark


CHAT = Codec(
    render_error=openai_render_error,
    render_status=status_but_529,
    parse_error=openai_parse_error,
    usage=_chat_usage,
    what_is_missing=_chat_what_is_missing,
    comments=True,
    heartbeat=b": keepalive\n\n",
    end_mark=b"data: [DONE]\n\n",
    strict=plainly_framed,
    dull=_chat_dull,
    note=_chat_note,
    frame=_chat_frame,
    fail_stream=_chat_fail_stream,
    parse_request=_chat_parse_request,
    render_response=_chat_render_response,
    encoder=_ChatEncoder,
)


# ---------------------------------------------------------------------------------------------
# 7. responses: OpenAI Responses (pure)
# ---------------------------------------------------------------------------------------------
# wire: platform.openai.com/docs/api-reference/responses-streaming, read 2026-11. Each event has
# an `event:` line equal to its data's type, and a sequence_number one above the last.

_RESPONSES_MARKS = tuple(
    b'"%b"' % word
    for word in (b"response.completed", b"response.incomplete", b"response.failed", b"error")
)

# Events by which we know that the model has begun. An item that opens is enough unless it is a
# message: reasoning may go on for minutes without another event.
_RESPONSES_FINISHED = {"response.completed", "response.incomplete"}


def _responses_usage(body: JsonObject) -> Usage | None:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    return Usage(
        whole(usage.get("input_tokens")),
        whole(usage.get("output_tokens")),
        whole(dig(usage, "input_tokens_details", "cached_tokens")),
        whole(dig(usage, "input_tokens_details", "cache_write_tokens")),
        whole(dig(usage, "output_tokens_details", "reasoning_tokens")),
    )


def _responses_what_is_missing(body: JsonObject) -> str:
    return "" if isinstance(body.get("output"), list) else "output"


def _responses_dull(block: bytes) -> bool:
    return not any(mark in block for mark in _RESPONSES_MARKS)


def _responses_note(state: StreamState, event: JsonObject) -> None:
    kind = str(event.get("type"))
    response = as_object(event.get("response"))
    if response:
        state.usage = _responses_usage(response) or state.usage
        state.memo["response"] = response
    state.memo["sequence_number"] = whole(event.get("sequence_number"))
    if kind in _RESPONSES_FINISHED:
        state.started = state.finished = state.ended = True
    elif kind == "response.failed":
        state.error = openai_parse_error(response) or ErrorFacts("", frozenset())
    elif kind == "error":
        # wire: flat in the documentation, nested in a `error` object from some servers
        state.error = openai_parse_error(event if event.get("error") else {"error": event})
    elif kind == "response.output_item.added":
        state.started = state.started or dig(event, "item", "type") != "message"
    elif kind.endswith(".delta"):
        state.started = True


def _responses_frame(event: SseEvent) -> bytes:
    return sse_encode(event.data, event.event or type_of(event.data))


def _responses_fail_stream(error: BitrouterError, state: StreamState, last: bytes) -> bytes:
    told = state.memo.get("response") or {"id": "resp_failed", "object": "response"}
    numbers = re.findall(rb'"sequence_number"\s*:\s*(\d{1,15})', last)
    number = max([state.memo.get("sequence_number", -1), *map(int, numbers)]) + 1
    why = {"code": "server_error", "message": error.message}
    response = {"output": [], **told, "status": "failed", "error": why}
    event = {"type": "response.failed", "sequence_number": number, "response": response}
    return sse_encode(compact(event), "response.failed")


RESPONSES = Codec(
    render_error=openai_render_error,
    render_status=status_but_529,
    parse_error=openai_parse_error,
    usage=_responses_usage,
    what_is_missing=_responses_what_is_missing,
    comments=True,
    heartbeat=b": keepalive\n\n",
    end_mark=b"",
    strict=named_and_framed,
    dull=_responses_dull,
    note=_responses_note,
    frame=_responses_frame,
    fail_stream=_responses_fail_stream,
)


# ---------------------------------------------------------------------------------------------
# 8. messages: Anthropic Messages (pure)
# ---------------------------------------------------------------------------------------------
# wire: docs.claude.com/en/api/messages-streaming, read 2026-11. Anthropic's SDKs drop an event
# without an `event:` line, and raise when message_stop is missing.

# wire: docs.claude.com/en/api/errors, read 2026-11: what an error event inside a 200 stands for
_MESSAGES_STATUS = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402,
    "permission_error": 403, "not_found_error": 404, "request_too_large": 413,
    "rate_limit_error": 429, "api_error": 500, "timeout_error": 504, "overloaded_error": 529,
}  # fmt: skip


def _messages_render_error(error: BitrouterError) -> JsonObject:
    facts = {"type": ERROR_WORDS[error.kind].messages, "message": error.message}
    details = {"error_code": error.code, **error.extra}
    return {"type": "error", "error": {**facts, "details": details}}


def _messages_render_status(error: BitrouterError) -> int:
    return 529 if error.status == 503 and error.kind is Kind.OVERLOADED else error.status


def _messages_parse_error(body: JsonObject) -> ErrorFacts | None:
    error = body.get("error")
    if not error:
        return None
    kind = dig(error, "type")
    words = words_of(kind, dig(error, "code"), dig(error, "details", "error_code"))
    status = _MESSAGES_STATUS.get(kind, 0) if isinstance(kind, str) else 0
    return ErrorFacts(str(dig(error, "message") or error), words, status)


def _messages_usage(body: JsonObject) -> Usage | None:
    return _messages_sum(body.get("usage"))


def _messages_sum(usage: Json) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    # wire: input_tokens leaves out what the cache served or stored (docs, prompt caching)
    read, written = (
        whole(usage.get(key)) for key in ("cache_read_input_tokens", "cache_creation_input_tokens")
    )
    return Usage(
        whole(usage.get("input_tokens")) + read + written,
        whole(usage.get("output_tokens")),
        read,
        written,
        whole(dig(usage, "output_tokens_details", "thinking_tokens")),
    )


def _messages_what_is_missing(body: JsonObject) -> str:
    return "" if isinstance(body.get("content"), list) else "content"


def _messages_dull(block: bytes) -> bool:
    return b'"message_' not in block and b'"error"' not in block


def _messages_note(state: StreamState, event: JsonObject) -> None:
    match event.get("type"):
        case "message_start":
            state.memo["usage"] = dict(as_object(dig(event, "message", "usage")))
            state.usage = _messages_sum(state.memo["usage"])
        case "content_block_start":
            state.started = state.started or dig(event, "content_block", "type") != "text"
        case "content_block_delta":
            state.started = True
        case "message_delta":
            state.started = True
            state.finished = state.finished or bool(dig(event, "delta", "stop_reason"))
            # wire: cumulative; what it does not name keeps its value from message_start
            told = {k: v for k, v in as_object(event.get("usage")).items() if v is not None}
            state.memo["usage"] = {**state.memo.get("usage", {}), **told}
            state.usage = _messages_sum(state.memo["usage"])
        case "message_stop":
            state.started = state.ended = True
        case "error":
            state.error = _messages_parse_error(event) or ErrorFacts("", frozenset())
        case _ if "error" in event:
            state.error = _messages_parse_error(event)


def _messages_frame(event: SseEvent) -> bytes:
    if event.data == b"[DONE]":
        return b""
    return sse_encode(event.data, event.event or type_of(event.data))


def _messages_fail_stream(error: BitrouterError, state: StreamState, last: bytes) -> bytes:  # noqa: ARG001
    return sse_encode(compact(_messages_render_error(error)), "error")


def _messages_parse_request(body: JsonObject) -> Prompt:
    return prompt_from(body, ("name",), ("output_config", "format", "schema"))


def _messages_render_response(
    prompt: Prompt, label: AnswerLabel, parts: list[StreamPart]
) -> JsonObject:
    content: list[JsonObject] = []
    text = "".join(part.text for part in parts if isinstance(part, TextDelta))
    if text:
        content.append({"type": "text", "text": text})
    for part in parts:
        if isinstance(part, ToolCall):
            call = {"id": part.id, "name": part.name, "input": json.loads(part.arguments)}
            content.append({"type": "tool_use", **call})
    last = parts[-1]
    assert isinstance(last, Finished)  # noqa: S101  a part list always ends so
    message = _messages_skeleton(prompt, label)
    usage = {"input_tokens": last.usage.input_tokens, "output_tokens": last.usage.output_tokens}
    return {
        **message,
        "content": content,
        "stop_reason": _MESSAGES_STOPS[last.finish],
        "usage": usage,
    }


_MESSAGES_STOPS = {Finish.STOP: "end_turn", Finish.TOOL_CALLS: "tool_use"}


def _messages_skeleton(prompt: Prompt, label: AnswerLabel) -> JsonObject:
    return {
        "id": f"msg_{label.id}",
        "type": "message",
        "role": "assistant",
        "model": prompt.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 1},
    }


class _MessagesEncoder:
    def __init__(self, prompt: Prompt, label: AnswerLabel) -> None:
        self._message = _messages_skeleton(prompt, label)
        self._message["usage"]["input_tokens"] = prompt.size // 4
        self._index = -1
        self._in_text = False
        self._opened = False

    def encode(self, part: StreamPart) -> bytes:
        out = (
            b""
            if self._opened
            else _messages_event({"type": "message_start", "message": self._message})
        )
        self._opened = True
        match part:
            case TextDelta(text):
                if not self._in_text:
                    out += self._open({"type": "text", "text": ""})
                    self._in_text = True
                return out + self._delta({"type": "text_delta", "text": text})
            case ToolCall(ident, name, arguments):
                out += self._close()
                out += self._open({"type": "tool_use", "id": ident, "name": name, "input": {}})
                out += self._delta({"type": "input_json_delta", "partial_json": arguments})
                return out + _messages_event({"type": "content_block_stop", "index": self._index})
            case Finished(finish, usage):
                return out + self._close() + self._end(finish, usage)

    def _open(self, block: JsonObject) -> bytes:
        self._index += 1
        event = {"type": "content_block_start", "index": self._index, "content_block": block}
        return _messages_event(event)

    def _delta(self, delta: JsonObject) -> bytes:
        return _messages_event(
            {"type": "content_block_delta", "index": self._index, "delta": delta}
        )

    def _close(self) -> bytes:
        if not self._in_text:
            return b""
        self._in_text = False
        return _messages_event({"type": "content_block_stop", "index": self._index})

    def _end(self, finish: Finish, usage: Usage) -> bytes:
        delta = {"stop_reason": _MESSAGES_STOPS[finish], "stop_sequence": None}
        counts = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
        event = {"type": "message_delta", "delta": delta, "usage": counts}
        return _messages_event(event) + MESSAGES.end_mark


def _messages_event(event: JsonObject) -> bytes:
    return sse_encode(compact(event), event["type"])


MESSAGES = Codec(
    render_error=_messages_render_error,
    render_status=_messages_render_status,
    parse_error=_messages_parse_error,
    usage=_messages_usage,
    what_is_missing=_messages_what_is_missing,
    comments=True,
    heartbeat=b'event: ping\ndata: {"type": "ping"}\n\n',
    end_mark=b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    strict=named_and_framed,
    dull=_messages_dull,
    note=_messages_note,
    frame=_messages_frame,
    fail_stream=_messages_fail_stream,
    parse_request=_messages_parse_request,
    render_response=_messages_render_response,
    encoder=_MessagesEncoder,
)


# ---------------------------------------------------------------------------------------------
# 9. gemini: Google generateContent (pure)
# ---------------------------------------------------------------------------------------------
# wire: ai.google.dev/api/generate-content, read 2026-11. google-genai's reader is no SSE reader:
# it dies on comments, `event:` lines and [DONE]; an error must have `error` as its first key and
# an integer code; a stream ends at EOF, and one without a finishReason was cut off.


def _gemini_render_error(error: BitrouterError) -> JsonObject:
    status = status_but_529(error)
    facts = {str(k): str(v) for k, v in error.extra.items()}
    info = "type.googleapis.com/google.rpc.ErrorInfo"
    details: list[JsonObject] = [
        {"@type": info, "reason": error.code.upper(), "domain": "bitrouter", "metadata": facts}
    ]
    if error.retry_after_s is not None:
        retry = "type.googleapis.com/google.rpc.RetryInfo"
        details.append({"@type": retry, "retryDelay": f"{error.retry_after_s:g}s"})
    name = ERROR_WORDS[error.kind].gemini
    return {"error": {"code": status, "message": error.message, "status": name, "details": details}}


def _gemini_parse_error(body: JsonObject) -> ErrorFacts | None:
    error = body.get("error")
    if not error:
        return None
    details = as_list(dig(error, "details"))
    words = [dig(error, "status"), *(dig(d, "reason") for d in details)]
    violations = [v for d in details for v in as_list(dig(d, "violations"))]
    words += [dig(v, "quotaId") for v in violations]
    delays = [seconds_of(str(dig(d, "retryDelay"))) for d in details if dig(d, "retryDelay")]
    retry_after_s = next((s for s in delays if s is not None), None)
    message = str(dig(error, "message") or error)
    return ErrorFacts(message, words_of(*words), whole(dig(error, "code")), retry_after_s)


def _gemini_usage(body: JsonObject) -> Usage | None:
    usage = body.get("usageMetadata")
    if not isinstance(usage, dict):
        return None
    names = ("promptTokenCount", "candidatesTokenCount", "toolUsePromptTokenCount")
    prompt, candidates, tool_use = (whole(usage.get(name)) for name in names)
    thoughts, total = whole(usage.get("thoughtsTokenCount")), whole(usage.get("totalTokenCount"))
    # Some answers count thoughts among the candidates already; the total tells.
    included = thoughts and prompt + candidates + tool_use == total
    output = candidates if included else candidates + thoughts
    cached = whole(usage.get("cachedContentTokenCount"))
    return Usage(prompt + tool_use, output, cached, 0, thoughts)


def _gemini_what_is_missing(body: JsonObject) -> str:
    return "" if body.get("candidates") or body.get("promptFeedback") else "candidates"


def _gemini_strict(block: bytes) -> bool:
    return plainly_framed(block.replace(b"\r\n", b"\n") if b"\r" in block else block)


def _gemini_dull(block: bytes) -> bool:
    return not any(
        mark in block for mark in (b'"finishReason"', b'"error"', b'"promptFeedback"', b"[DONE]")
    )


def _gemini_note(state: StreamState, chunk: JsonObject) -> None:
    if "error" in chunk:
        state.error = _gemini_parse_error(chunk)
    state.usage = _gemini_usage(chunk) or state.usage
    for candidate in as_list(chunk.get("candidates")):
        if dig(candidate, "finishReason"):
            state.started = state.finished = True
        if dig(candidate, "content", "parts"):
            state.started = True
    if dig(chunk, "promptFeedback", "blockReason"):
        state.started = state.finished = True


def _gemini_frame(event: SseEvent) -> bytes:
    return b"" if event.data == b"[DONE]" else b"data: %b\r\n\r\n" % event.data


def _gemini_fail_stream(error: BitrouterError, state: StreamState, last: bytes) -> bytes:  # noqa: ARG001
    return b"data: %b\r\n\r\n" % compact(_gemini_render_error(error))


GEMINI = Codec(
    render_error=_gemini_render_error,
    render_status=status_but_529,
    parse_error=_gemini_parse_error,
    usage=_gemini_usage,
    what_is_missing=_gemini_what_is_missing,
    comments=False,
    heartbeat=b"\r\n",
    end_mark=b"",
    strict=_gemini_strict,
    dull=_gemini_dull,
    note=_gemini_note,
    frame=_gemini_frame,
    fail_stream=_gemini_fail_stream,
)


# ---------------------------------------------------------------------------------------------
# 10. codecs: the table of protocols, and the operations that each one has (pure)
# ---------------------------------------------------------------------------------------------

CODECS: dict[ApiProtocol, Codec] = {
    ApiProtocol.CHAT_COMPLETIONS: CHAT,
    ApiProtocol.RESPONSES: RESPONSES,
    ApiProtocol.MESSAGES: MESSAGES,
    ApiProtocol.GENERATE_CONTENT: GEMINI,
}


class Operation(NamedTuple):
    """Something that a caller can ask of a model.

    Attributes:
        suffix: what follows the provider's base; `{model}` stands for the model's id there.
        generates: the answer is a completion: it is watched, and the target's health with it.
        raw: the answer may be anything (audio, a file): it is passed on as it comes.
    """

    name: str
    protocol: ApiProtocol
    suffix: str
    generates: bool = False
    raw: bool = False


_CC, _GC = ApiProtocol.CHAT_COMPLETIONS, ApiProtocol.GENERATE_CONTENT

CHAT_OP = Operation("chat", _CC, "/chat/completions", generates=True)
RESPONSES_OP = Operation("responses", ApiProtocol.RESPONSES, "/responses", generates=True)
MESSAGES_OP = Operation("messages", ApiProtocol.MESSAGES, "/messages", generates=True)

# path below /v1 -> what is asked there
OPERATIONS: dict[str, Operation] = {
    op.suffix: op
    for op in (
        CHAT_OP,
        RESPONSES_OP,
        MESSAGES_OP,
        Operation("input_tokens", ApiProtocol.RESPONSES, "/responses/input_tokens"),
        Operation("count_tokens", ApiProtocol.MESSAGES, "/messages/count_tokens"),
        Operation("embeddings", _CC, "/embeddings"),
        Operation("completions", _CC, "/completions", generates=True),
        Operation("moderations", _CC, "/moderations"),
        Operation("images_generations", _CC, "/images/generations", raw=True),
        Operation("images_edits", _CC, "/images/edits", raw=True),
        Operation("images_variations", _CC, "/images/variations", raw=True),
        Operation("audio_speech", _CC, "/audio/speech", raw=True),
        Operation("audio_transcriptions", _CC, "/audio/transcriptions", raw=True),
        Operation("audio_translations", _CC, "/audio/translations", raw=True),
    )
}

_GENERATING_VERBS = ("generateContent", "streamGenerateContent")

# the verb after the last colon of a Google path -> what is asked
GEMINI_VERBS: dict[str, Operation] = {
    verb: Operation(verb, _GC, "/models/{model}:" + verb, generates=verb in _GENERATING_VERBS)
    for verb in (
        *_GENERATING_VERBS,
        "countTokens",
        "embedContent",
        "batchEmbedContents",
    )
}


# How to generate in each protocol, and where: messages name the path when another would work.
GENERATE = {
    op.protocol: op for op in (CHAT_OP, RESPONSES_OP, MESSAGES_OP, GEMINI_VERBS["generateContent"])
}
GENERATE_PATHS = {
    protocol: ("/v1beta" if protocol is _GC else "/v1") + op.suffix
    for protocol, op in GENERATE.items()
}


# What a provider's refusal means, told by words that its error object holds or by its text.
# wire: platform.openai.com/docs/guides/error-codes, docs.claude.com/en/api/errors,
# ai.google.dev/gemini-api/docs/troubleshooting; read 2026-11
_NO_CREDIT_WORDS = {
    "insufficient_quota", "credit_balance_exhausted", "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded", "organization_usage_limit_exceeded", "billing_error",
    "billing_hard_limit_reached", "enforced_spend_limit_reached", "contract_spend_limit_reached",
    "ramp_limit_exceeded", "creditserror", "billing_not_active", "insufficient_balance",
}  # fmt: skip
_NO_CREDIT_TEXT = re.compile(
    r"credit balance is too low|insufficient (balance|credit|funds)|out of credit|"
    r"exceeded your current quota, please check your plan and billing",
    re.IGNORECASE,
)
_BAD_KEY_WORDS = {"api_key_invalid", "invalid_api_key", "authentication_error"}
_TOO_LONG_WORDS = {"context_length_exceeded", "model_context_window_exceeded"}
_TOO_LONG_TEXT = re.compile(
    r"maximum context length|prompt is too long|context window|input is too long|"
    r"(token count|number of tokens).{0,80}exceeds|exceeds the maximum number of tokens",
    re.IGNORECASE,
)
_FILTERED_WORDS = {
    "content_filter", "content_policy_violation", "safety_violation",
    "responsibleaipolicyviolation", "moderation",
}  # fmt: skip
_NO_MODEL_TEXT = re.compile(
    r"models?\b.{0,120}(not found|does not exist|not supported)|no such model|^model: ",
    re.IGNORECASE | re.DOTALL,
)
_KINDS = {
    400: Kind.INVALID_REQUEST, 402: Kind.BILLING, 403: Kind.PERMISSION, 404: Kind.NOT_FOUND,
    408: Kind.TIMEOUT, 413: Kind.TOO_LARGE, 429: Kind.RATE_LIMIT, 500: Kind.INTERNAL,
    503: Kind.OVERLOADED, 504: Kind.TIMEOUT, 529: Kind.OVERLOADED,
}  # fmt: skip


def kind_of(status: int) -> Kind:
    return _KINDS.get(status, Kind.BAD_GATEWAY if status >= 500 else Kind.INVALID_REQUEST)


def upstream_error(
    who: str, status: int, headers: Headers, body: bytes, protocol: ApiProtocol, wall_s: float
) -> UpstreamError:
    """What a provider's error response means.

    Args:
        who: names the target, for the message.
        wall_s: seconds since the epoch, to read a Retry-After that is a date.
    """
    facts = _error_facts(body, protocol)
    said = facts.message if facts else printable(body[:2000].decode("utf-8", "replace").strip())
    error = judge(who, status, facts or ErrorFacts(said, frozenset()))
    error.body = body if facts and not isinstance(error, UpstreamKeyRefused) else b""
    error.headers = headers
    told = retry_after(headers, wall_s)
    error.retry_after_s = told if told is not None else facts and facts.retry_after_s
    return error


def judge(who: str, status: int, facts: ErrorFacts) -> UpstreamError:
    """The error that a status and an error object stand for, in whatever way they came."""
    verdict = next(error for error, fits in _VERDICTS if fits(status, facts))
    said = facts.message[:2000]
    if verdict is UpstreamKeyRefused:  # what it says may show a part of the key
        return UpstreamKeyRefused(f"{who} refused our key ({status})", detail=said)
    if verdict is UpstreamGarbled:
        return UpstreamGarbled(f"{who} answered {status}, which is no answer", detail=said)
    message = f"{who} answered {status}" + (f": {said}" if said else "")
    kind = verdict.kind if verdict in (UpstreamNoCredit, UpstreamLimited) else kind_of(status)
    code = min(facts.words & _TELLING_WORDS, default="")
    if status == 429 and any("perday" in word for word in facts.words):
        code = "daily_quota_exceeded"  # wire: Google's QuotaFailure names `...PerDay...` quotas
    return verdict(message, status=status, kind=kind, code=code)


_TELLING_WORDS = _TOO_LONG_WORDS | _NO_CREDIT_WORDS | {"model_not_found", "server_is_overloaded"}


def _no_credit(status: int, said: ErrorFacts) -> bool:
    told = said.words & _NO_CREDIT_WORDS or _NO_CREDIT_TEXT.search(said.message)
    return status == 402 or bool(told)


def _bad_key(status: int, said: ErrorFacts) -> bool:
    ours = status in (401, 403) and not said.words & _FILTERED_WORDS
    return ours or (status == 400 and bool(said.words & _BAD_KEY_WORDS))


def _unfit(status: int, said: ErrorFacts) -> bool:
    words, text = said.words, said.message
    no_model = "model_not_found" in words or bool(_NO_MODEL_TEXT.search(text))
    too_long = words & _TOO_LONG_WORDS or _TOO_LONG_TEXT.search(text)
    return bool(words & _FILTERED_WORDS or too_long) or (status == 404 and no_model)


# First match decides.
_VERDICTS: tuple[tuple[type[UpstreamError], Callable[[int, ErrorFacts], bool]], ...] = (
    (UpstreamNoCredit, _no_credit),
    (UpstreamKeyRefused, _bad_key),
    (UpstreamLimited, lambda status, _: status == 429),
    (UpstreamBroken, lambda status, _: status == 408 or status >= 500),
    (UpstreamGarbled, lambda status, _: status < 400),
    (UpstreamUnfit, _unfit),
    (UpstreamRejected, lambda *_: True),
)


def _error_facts(body: bytes, protocol: ApiProtocol) -> ErrorFacts | None:
    try:
        value = parse_json(body)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and value:  # wire: Google wraps the error of an array stream
        value = value[0]
    if not isinstance(value, dict):
        return None
    facts = CODECS[protocol].parse_error(value)
    if facts is None and isinstance(value.get("message") or value.get("detail"), str):
        return ErrorFacts(value.get("message") or value["detail"], words_of(value.get("code")))
    return facts


def retry_after(headers: Headers, wall_s: float) -> float | None:
    """Seconds that a response asks us to wait, from `retry-after-ms` or `retry-after`."""
    if (ms := seconds_of(headers.get("retry-after-ms", "-"))) is not None:
        return ms / 1000
    text = headers.get("retry-after", "")
    seconds = seconds_of(text)
    if seconds is not None or not text:
        return seconds
    from email.utils import parsedate_to_datetime  # rare: nobody but gateways sends dates

    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - wall_s)
    return None


# ---------------------------------------------------------------------------------------------
# 11. relay: a provider's stream on its way to the caller (pure)
# ---------------------------------------------------------------------------------------------
# Bytes in, bytes out. Until something of substance has come, everything is held back, so that
# an attempt that fails early can be forgotten. After that a block of events which is in strict
# form and holds nothing of note goes on as it is: that is all but two or three of a stream's
# blocks, and costs half a microsecond. The others are looked at event by event.

_MAX_HELD_BYTES = 4 * 1024 * 1024


class StreamRelay:
    """One stream of one protocol, watched in passing.

    Attributes:
        state: what has been seen.
        open: substance has come: what `feed` returns must now reach the caller.
        garbled: what came is not the protocol.
        over: the stream has ended, in one way or another; nothing more is passed on.
    """

    def __init__(self, codec: Codec, *, hide_usage: bool = False, as_array: bool = False) -> None:
        """hide_usage: we asked for the usage chunk, the caller did not.

        as_array: the caller reads Google's JSON array instead of events.
        """
        self.state = StreamState()
        self.open = False
        self.garbled: UpstreamGarbled | None = None
        self.over = False
        self._codec = codec
        self._hide_usage = hide_usage
        self._as_array = as_array
        self._items = 0
        self._cutter = EventCutter()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._last = b""  # the last block that nobody looked into

    def feed(self, chunk: bytes) -> bytes:
        """What may go on to the caller now."""
        try:
            block = self._cutter.feed(chunk)
        except UpstreamGarbled as error:
            self.garbled, self.over = error, True
            return b""
        return self._take(block) if block else b""

    def finish(self) -> bytes:
        """What is left when the provider has closed a stream that it had finished."""
        rest = self._cutter.finish()
        out = self._take(rest) if rest else b""
        self.settle()
        if self.state.finished and not self.over:
            out += self._codec.end_mark + self._array_end()
        return out

    def fail(self, error: BitrouterError) -> bytes:
        """The protocol's own way to end a stream that went wrong."""
        self.settle()
        if self._as_array:
            return self._item(compact(self._codec.render_error(error))) + self._array_end()
        return self._codec.fail_stream(error, self.state, self._last)

    def settle(self) -> None:
        """Note the running total of usage in the last block that nobody looked into."""
        if self.state.usage is None:
            for raw in split_events(self._last):
                self._look(raw)

    def _take(self, block: bytes) -> bytes:
        if self.open:
            return self._sift(block)
        at = 0
        for raw in split_events(block):
            at += len(raw)
            out = self._pass(raw)
            self._held.append(out)
            self._held_bytes += len(out)
            if self.state.started or self._held_bytes > _MAX_HELD_BYTES:
                self.open = True
                break
        if not self.open:
            return b""
        opening = b"".join(self._held)
        self._held.clear()
        return opening + (self._sift(block[at:]) if at < len(block) else b"")

    def _sift(self, block: bytes) -> bytes:
        """Pass a block on, looking only into those events of it that are of note."""
        if self.over:
            return b""
        codec = self._codec
        if not self._as_array and codec.dull(block) and codec.strict(block):
            self._last = block
            return self._without_null_usage(block) if self._hide_usage else block
        half = len(block) // 2
        middle = block.find(b"\n\n", half) + 2
        if middle < 2 or middle >= len(block):
            middle = block.rfind(b"\n\n", 0, half) + 2
        if middle < 2:
            return b"".join([self._pass(raw) for raw in split_events(block)])
        return self._sift(block[:middle]) + self._sift(block[middle:])

    def _pass(self, raw: bytes) -> bytes:
        """One event that is looked into, as it goes on."""
        if self.over:
            return b""
        event, value = self._look(raw)
        self.over = self.state.ended or self.state.error is not None or self.garbled is not None
        if self.garbled:
            return b""
        if event is None:
            comment = raw.startswith(b":") and self._codec.comments
            return raw if comment and raw.count(b"\n") == 2 else b""
        if self._as_array:
            item = self._item(event.data) if value is not None else b""
            return item + self._array_end() if self.over else item
        if self._hide_usage and value and value.get("usage") and not value.get("choices"):
            return b""
        raw = raw if self._codec.strict(raw) else self._codec.frame(event)
        return self._without_null_usage(raw) if self._hide_usage else raw

    def _look(self, raw: bytes) -> tuple[SseEvent | None, JsonObject | None]:
        event = parse_event(raw)
        if event is None:
            return None, None
        if event.data == b"[DONE]":
            self.state.ended = True
            return event, None
        try:
            value = parse_json(event.data)
        except (ValueError, RecursionError):
            shown = printable(event.data[:200].decode("utf-8", "replace"))
            said = "the provider sent an event that is not JSON"
            self.garbled = UpstreamGarbled(said, code="upstream_bad_json", detail=shown)
            return event, None
        if isinstance(value, dict):
            self._codec.note(self.state, value)
            return event, value
        return event, {}

    def _without_null_usage(self, block: bytes) -> bytes:
        # We asked for the usage, so we take away what our asking added to every chunk.
        if b'"usage"' not in block:
            return block
        return block.replace(b',"usage":null', b"").replace(b', "usage": null', b"")

    def _item(self, data: bytes) -> bytes:
        self._items += 1
        return (b"[" if self._items == 1 else b",\r\n") + data

    def _array_end(self) -> bytes:
        if not self._as_array:
            return b""
        return b"]" if self._items else b"[]"


# ---------------------------------------------------------------------------------------------
# 12. registry: the providers and models we know, and what they cost (pure)
# ---------------------------------------------------------------------------------------------
# Hints, never a whitelist: `provider/anything` works for every provider below, priced or not.


class Provider(NamedTuple):
    """A company, or a server on this machine, that serves models.

    Attributes:
        bases: where each protocol is spoken; the first one is the provider's usual one.
        env: variables that may hold its key; the first one is named when a key is missing.
        kind: `api` sells its own or others' models, `gateway` passes on to many, `local` runs
            on this machine, `plan` is a subscription: used only when it is asked for by name.
        auth: `native` carries the key as each protocol's own vendor wants it, `bearer` always
            in Authorization.
        full_ids: its own model ids are spelled lab/model.
        headers: sent with every request, by the configuration's wish.
    """

    id: str
    bases: dict[ApiProtocol, str]
    env: tuple[str, ...] = ()
    kind: str = "api"
    auth: str = "native"
    full_ids: bool = False
    headers: Headers = {}  # noqa: RUF012  a NamedTuple's default, never changed


_PROTOCOL_LETTERS = {
    "c": ApiProtocol.CHAT_COMPLETIONS,
    "r": ApiProtocol.RESPONSES,
    "m": ApiProtocol.MESSAGES,
    "g": ApiProtocol.GENERATE_CONTENT,
}


def _row(ident: str, spoken: str, base: str, env: str = "", *kinds: str, **more: Any) -> Provider:
    """spoken: protocols by letter, the usual one first; m, c: another base for one of them."""
    own_env = (env or ident.upper().replace("-", "_") + "_API_KEY").split()
    bases = {_PROTOCOL_LETTERS[p]: more.get(p) or base for p in spoken}
    auth = "bearer" if "bearer" in kinds else "native"
    kind = next((k for k in kinds if k in ("gateway", "plan", "local")), "api")
    return Provider(ident, bases, tuple(own_env), kind, auth, "full" in kinds)


# wire: bases, protocols and auth from each provider's documentation, read 2026-11. Where a
# provider documents an Anthropic-compatible base without /v1, the /v1 is added here, since what
# follows is /messages.
# fmt: off
PROVIDERS: dict[str, Provider] = {p.id: p for p in (
    _row("openai", "cr", "https://api.openai.com/v1"),
    _row("anthropic", "m", "https://api.anthropic.com/v1"),
    _row("google", "gc", "https://generativelanguage.googleapis.com/v1beta",
         "GEMINI_API_KEY GOOGLE_API_KEY",
         c="https://generativelanguage.googleapis.com/v1beta/openai"),
    _row("vertex", "g", "https://aiplatform.googleapis.com/v1/publishers/google",
         "VERTEX_EXPRESS_API_KEY"),
    _row("azure", "cr", "https://${AZURE_OPENAI_RESOURCE}.openai.azure.com/openai/v1",
         "AZURE_OPENAI_API_KEY", "bearer"),
    _row("aws-bedrock", "cr", "https://bedrock-mantle.${AWS_REGION:-us-east-1}.api.aws/v1",
         "AWS_BEARER_TOKEN_BEDROCK", "bearer"),
    _row("xai", "rc", "https://api.x.ai/v1"),
    _row("deepseek", "crm", "https://api.deepseek.com", m="https://api.deepseek.com/anthropic/v1"),
    _row("mistral", "c", "https://api.mistral.ai/v1"),
    _row("groq", "cr", "https://api.groq.com/openai/v1"),
    _row("cerebras", "c", "https://api.cerebras.ai/v1"),
    _row("cohere", "c", "https://api.cohere.ai/compatibility/v1", "COHERE_API_KEY CO_API_KEY"),
    _row("perplexity", "c", "https://api.perplexity.ai", "PERPLEXITY_API_KEY PERPLEXITYAI_API_KEY"),
    _row("together", "c", "https://api.together.xyz/v1",
         "TOGETHER_API_KEY TOGETHERAI_API_KEY", "full"),
    _row("fireworks", "cr", "https://api.fireworks.ai/inference/v1",
         "FIREWORKS_API_KEY FIREWORKS_AI_API_KEY", "full"),
    _row("deepinfra", "c", "https://api.deepinfra.com/v1/openai",
         "DEEPINFRA_API_KEY DEEPINFRA_TOKEN", "full"),
    _row("huggingface", "c", "https://router.huggingface.co/v1",
         "HUGGINGFACE_API_KEY HF_TOKEN", "gateway", "full"),
    _row("nebius", "c", "https://api.studio.nebius.com/v1", "", "full"),
    _row("baseten", "c", "https://inference.baseten.co/v1", "", "full"),
    _row("sambanova", "c", "https://api.sambanova.ai/v1"),
    _row("hyperbolic", "c", "https://api.hyperbolic.xyz/v1", "", "full"),
    _row("nvidia", "c", "https://integrate.api.nvidia.com/v1",
         "NVIDIA_API_KEY NVIDIA_NIM_API_KEY", "full"),
    _row("alibaba", "crm", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
         "ALIBABA_API_KEY DASHSCOPE_API_KEY",
         m="https://dashscope-intl.aliyuncs.com/api/v2/apps/anthropic-compatible-mode/v1"),
    _row("alibaba_cn", "crm", "https://dashscope.aliyuncs.com/compatible-mode/v1",
         m="https://dashscope.aliyuncs.com/api/v2/apps/anthropic-compatible-mode/v1"),
    _row("alibaba_coding_plan", "c", "https://coding-intl.dashscope.aliyuncs.com/v1", "", "plan"),
    _row("ambient", "c", "https://api.ambient.xyz/v1", "", "full"),
    _row("byteplus", "c", "https://ark.ap-southeast.bytepluses.com/api/v3"),
    _row("chutes", "c", "https://llm.chutes.ai/v1", "", "full"),
    _row("minimax", "mc", "https://api.minimax.io/anthropic/v1", c="https://api.minimax.io/v1"),
    _row("minimax_cn", "mc", "https://api.minimaxi.com/anthropic/v1", c="https://api.minimaxi.com/v1"),
    _row("moonshotai", "cm", "https://api.moonshot.ai/v1", "MOONSHOTAI_API_KEY MOONSHOT_API_KEY",
         m="https://api.moonshot.ai/anthropic/v1"),
    _row("moonshotai_coding_plan", "c", "https://api.kimi.com/coding/v1", "", "plan"),
    _row("qianfan", "c", "https://api.baiduqianfan.ai/v1"),
    _row("qianfan_cn", "c", "https://qianfan.baidubce.com/v2"),
    _row("siliconflow", "c", "https://api.siliconflow.com/v1", "", "full"),
    _row("siliconflow_cn", "c", "https://api.siliconflow.cn/v1", "", "full"),
    _row("tencent", "cmr", "https://tokenhub-intl.tencentcloudmaas.com/v1"),
    _row("tencent_cn", "cmr", "https://tokenhub.tencentmaas.com/v1"),
    _row("tinfoil", "c", "https://inference.tinfoil.sh/v1"),
    _row("tiyuvta", "c", "https://api.tiyuvta.ai/v1", "", "bearer", "full"),
    _row("xiaomi", "crm", "https://api.xiaomimimo.com/v1", m="https://api.xiaomimimo.com/anthropic/v1"),
    _row("xiaomi_token_plan", "crm", "https://token-plan-sgp.xiaomimimo.com/v1", "", "plan",
         m="https://token-plan-sgp.xiaomimimo.com/anthropic/v1"),
    _row("xiaomi_token_plan_cn", "crm", "https://token-plan-cn.xiaomimimo.com/v1", "", "plan",
         m="https://token-plan-cn.xiaomimimo.com/anthropic/v1"),
    _row("xiaomi_token_plan_eu", "crm", "https://token-plan-ams.xiaomimimo.com/v1", "", "plan",
         m="https://token-plan-ams.xiaomimimo.com/anthropic/v1"),
    _row("zai", "cm", "https://api.z.ai/api/paas/v4", "ZAI_API_KEY Z_AI_API_KEY",
         m="https://api.z.ai/api/anthropic/v1"),
    _row("zai_coding_plan", "cm", "https://api.z.ai/api/coding/paas/v4", "", "plan",
         m="https://api.z.ai/api/anthropic/v1"),
    _row("openrouter", "crm", "https://openrouter.ai/api/v1", "", "bearer", "gateway", "full"),
    _row("novita", "crm", "https://api.novita.ai/openai/v1", "", "gateway", "full",
         m="https://api.novita.ai/anthropic/v1"),
    _row("opencode-zen", "c", "https://opencode.ai/zen/v1", "", "bearer", "gateway"),
    _row("opencode-go", "c", "https://opencode.ai/zen/go/v1",
         "OPENCODE_GO_API_KEY OPENCODE_ZEN_API_KEY", "bearer", "plan"),
    _row("atlascloud", "c", "https://api.atlascloud.ai/v1", "", "gateway", "full"),
    _row("gmicloud", "c", "https://api.gmi-serving.com/v1", "", "gateway", "full"),
    _row("phala", "c", "https://inference.phala.com/v1", "", "gateway", "full"),
    _row("redpill", "c", "https://api.redpill.ai/v1", "", "gateway", "full"),
    _row("bitrouter", "c", "https://api.bitrouter.ai/v1", "", "bearer", "gateway", "full"),
    _row("ollama", "cm", "http://127.0.0.1:11434/v1", "", "local"),
    _row("lmstudio", "cr", "http://127.0.0.1:1234/v1", "", "local"),
    _row("vllm", "cr", "http://127.0.0.1:8000/v1", "", "local"),
    _row("llamacpp", "c", "http://127.0.0.1:8080/v1", "", "local"),
)}

# other spellings of a provider, as peers and vendors write them
ALIASES = {
    "gemini": "google", "google_ai_studio": "google", "google-ai-studio": "google",
    "vertex_ai": "vertex", "azure-openai": "azure", "bedrock": "aws-bedrock", "x-ai": "xai",
    "grok": "xai", "z-ai": "zai", "zhipu": "zai", "moonshot": "moonshotai", "kimi": "moonshotai",
    "mistralai": "mistral", "qwen": "alibaba", "dashscope": "alibaba", "together_ai": "together",
    "togetherai": "together", "fireworks_ai": "fireworks", "fireworks-ai": "fireworks",
    "nvidia_nim": "nvidia", "hf": "huggingface", "lm_studio": "lmstudio", "pplx": "perplexity",
    "llama.cpp": "llamacpp", "llama_cpp": "llamacpp", "hosted_vllm": "vllm",
    "opencode": "opencode-zen",
}

# lab -> how the catalogue spells it, for models that are written with the provider's name
_LABS = {
    "xai": "x-ai", "zai": "z-ai", "mistral": "mistralai", "alibaba": "qwen", "gemini": "google",
}

# a bare id that the catalogue does not know still shows whose it is
FAMILIES = (
    ("openai", ("gpt-", "o1", "o3", "o4", "chatgpt-", "codex-", "text-embedding-", "dall-e-",
                "whisper-", "tts-", "omni-moderation-", "text-moderation-", "sora-",
                "computer-use-")),
    ("anthropic", ("claude-",)),
    ("google", ("gemini-", "imagen-", "veo-", "learnlm-")),
    ("xai", ("grok-",)),
    ("deepseek", ("deepseek-",)),
    ("mistral", ("mistral-", "codestral-", "ministral-", "magistral-", "pixtral-", "devstral-",
                 "voxtral-")),
    ("cohere", ("command-", "embed-v4", "c4ai-")),
    ("perplexity", ("sonar",)),
    ("moonshotai", ("kimi-",)),
    ("zai", ("glm-",)),
    ("minimax", ("minimax-",)),
    ("xiaomi", ("mimo-",)),
    ("alibaba", ("qwen",)),
)
# fmt: on


class Price(NamedTuple):
    """US dollars per million tokens; None where the price is not known.

    Attributes:
        tiers: for prompts of more than so many tokens, these rates for the whole request.
    """

    input: float | None = None
    output: float | None = None
    cache_read: float | None = None
    cache_write: float | None = None
    tiers: tuple[tuple[int, Price], ...] = ()


class Model(NamedTuple):
    """One row of the catalogue.

    Attributes:
        id: lab/model, dots in version numbers.
        context, max_output: tokens; 0 if unknown.
        inputs, outputs: modalities by letter: t text, i image, a audio, v video, p PDF, e vector.
        carried: provider id -> its own id for the model and its price there.
    """

    id: str
    context: int
    max_output: int
    price: Price
    inputs: str
    outputs: str
    carried: dict[str, tuple[str, Price]]


# id  context/max output  in/out[/cache read[/cache write]]  modalities  provider[=its id][@price]
# wire: github.com/bitrouter/bitrouter at 003f99ee (Apache-2.0), and vendors' prices by way of
# litellm 1.109.1 (MIT), read 2026-11-22. A provider without `=` spells the id its usual way; one
# without `@` charges the price in the third column. `+272000:` begins the rates above so many
# tokens.
_CATALOGUE = """\
anthropic/claude-fable-5 1000000/128000 10/50/1/12.5 tip>t anthropic
    aws-bedrock=anthropic.claude-fable-5 azure bitrouter opencode-zen openrouter
anthropic/claude-fable-5.1 1000000/128000 10/50/.25/12.5 tip>t anthropic
anthropic/claude-haiku-4.5 200000/64000 1/5/.1/1.25 tip>t anthropic azure bitrouter opencode-zen
    openrouter deepinfra=anthropic/claude-haiku-4-5@1/5
anthropic/claude-haiku-5.5 1000000/128000 .1/.5/.01/.125+100000:.5/2.5/.05/.625 tip>t anthropic
anthropic/claude-mythos-5 1000000/128000 10/50/1/12.5 tip>t anthropic
anthropic/claude-mythos-5.1 1000000/128000 10/50/.25/12.5 tip>t anthropic
anthropic/claude-opus-4.5 200000/64000 5/25/.5/6.25 tip>t anthropic
anthropic/claude-opus-4.6 1000000/128000 5/25/.5/6.25 tip>t anthropic azure bitrouter
    gmicloud@5/25/.5 opencode-zen openrouter
anthropic/claude-opus-4.7 1000000/128000 5/25/.5/6.25 tip>t anthropic
    aws-bedrock=anthropic.claude-opus-4-7 azure bitrouter@4.5/22.5/.45 gmicloud@4.5/22.5/.45
    opencode-zen openrouter deepinfra=anthropic/claude-opus-4-7@5/25
anthropic/claude-opus-4.8 1000000/128000 5/25/.5/6.25 tip>t anthropic
    aws-bedrock=anthropic.claude-opus-4-8 azure bitrouter gmicloud@5/25/.5 opencode-zen openrouter
anthropic/claude-opus-5 1000000/128000 5/25/.5/6.25 tip>t anthropic
    atlascloud=anthropic/claude-opus-5-ccmax@5/25/.5 aws-bedrock=anthropic.claude-opus-5 azure
    bitrouter opencode-zen openrouter deepinfra=anthropic/claude-opus-5@5/25
anthropic/claude-opus-5.5 1000000/128000 4/20/.2/5 tip>t anthropic
anthropic/claude-sonnet-4.5 200000/64000 3/15/.3/3.75 tip>t anthropic azure opencode-zen
    openrouter
anthropic/claude-sonnet-4.6 1000000/128000 3/15/.3/3.75 tip>t anthropic
    aws-bedrock=anthropic.claude-sonnet-4-6 azure bitrouter gmicloud@3/15/.3 opencode-zen
    openrouter deepinfra=anthropic/claude-sonnet-4-6@3/15
anthropic/claude-sonnet-5 1000000/128000 2/10/.2/2.5 tip>t anthropic
    aws-bedrock=anthropic.claude-sonnet-5 azure bitrouter opencode-zen openrouter
anthropic/claude-sonnet-5.5 1000000/128000 2/10/.1/2.5 tip>t anthropic
cohere/command-a 256000/8000 2.5/10 t>t cohere=command-a-03-2025
cohere/embed-v4.0 128000/0 .12/0 t>e cohere
deepseek/deepseek-flash 1000000/393216 .3/1.2/.006/0 ti>t deepseek
deepseek/deepseek-v3.1 131072/131072 .56/1.68 t>t byteplus sambanova=DeepSeek-V3.1@3/4.5
deepseek/deepseek-v3.2 163840/163840 .21/.315/.105 t>t
    atlascloud=deepseek-ai/deepseek-v3.2@.26/.38/.13 aws-bedrock=deepseek.v3.2@.62/1.85
    azure@.58/1.68 bitrouter chutes=deepseek-ai/DeepSeek-V3.2-TEE@1/1/.5 novita@.269/.4/.1345
    openrouter@.269/.4/.1345 qianfan@.252/.378/.0252 qianfan_cn@.28/.42+32000:.56/.83
    siliconflow=deepseek-ai/DeepSeek-V3.2@.27/.42 siliconflow_cn=deepseek-ai/DeepSeek-V3.2@.27/.42
    tencent@.57/1.71/.114 tencent_cn@.57/1.71/.114 deepinfra=deepseek-ai/DeepSeek-V3.2@.26/.38/.13
deepseek/deepseek-v4-flash 1000000/393216 .09/.18/.02 t>t alibaba_cn@.14/.28/.0028
    ambient@.14/.28/.028/0 atlascloud=deepseek-ai/deepseek-v4-flash@.14/.28/.028 azure@.19/.51
    bitrouter gmicloud=deepseek-ai/DeepSeek-V4-Flash@.112/.224/.022 novita@.14/.28/.028
    openrouter@.14/.28/.028 phala@.2/.4 qianfan@.14/.28/.028 qianfan_cn@.14/.28 redpill@.2/.4
    siliconflow=deepseek-ai/DeepSeek-V4-Flash@.14/.28/.028
    siliconflow_cn=deepseek-ai/DeepSeek-V4-Flash@.14/.28/.003 tencent@.14/.28/.028
    tencent_cn@.14/.28/.028 tinfoil@.7/1.9/.125 nebius=deepseek-ai/DeepSeek-V4-Flash@.14/.28
deepseek/deepseek-v4-flash-0731 1000000/393216 .3/1.2/.006/0 t>t alibaba@.2/.4/.04
    alibaba_cn@.14/.28/.028 ambient@.14/.28/.028/0
    atlascloud=deepseek-ai/deepseek-v4-flash-0731@.14/.28/.028 bitrouter@.14/.28/.028
    deepseek=deepseek-v4-flash novita@.14/.28/.028 opencode-go=deepseek-v4-flash@-
    opencode-zen=deepseek-v4-flash@.14/.28/.028 openrouter@.09/.18/.018 qianfan@.14/.28/.028
deepseek/deepseek-v4-pro 1000000/393216 .435/.87/.003625 t>t alibaba_cn
    atlascloud=deepseek-ai/deepseek-v4-pro@1.68/3.38/.13 azure@1.74/3.48 bitrouter
    gmicloud=deepseek-ai/DeepSeek-V4-Pro@1.392/2.784/.116 novita@1.6/3.2/.135 opencode-go@-
    opencode-zen@1.74/3.84/.145 openrouter phala@1.5/5.25 qianfan@1.69/3.38/.14
    qianfan_cn@1.67/3.33 redpill@1.5/5.25 siliconflow=deepseek-ai/DeepSeek-V4-Pro@1.74/3.48/.145
    siliconflow_cn=deepseek-ai/DeepSeek-V4-Pro@1.74/3.48/.145 tencent@1.74/3.48/.145
    tencent_cn@1.74/3.48/.145 tinfoil@1.5/5.25 deepinfra=deepseek-ai/DeepSeek-V4-Pro@1.3/2.6/.1
deepseek/deepseek-v4-pro-0813 1000000/393216 1.32/3.96/.044/0 t>t bitrouter@.435/.87/.003625
    deepseek=deepseek-v4-pro openrouter@.66/1.98/.022
google/gemini-2.5-flash 1048576/65536 .3/2.5/.03 tiap>t google
google/gemini-2.5-flash-lite 1048576/65536 .1/.4/.01 tiap>t google
google/gemini-2.5-pro 1048576/65536 1.25/10/.125+200000:2.5/15/.25 tiap>t google
google/gemini-2.5-pro-preview 1048576/65536 1.25/10/.125+200000:2.5/15/.25 tiap>t
    google=gemini-2.5-pro openrouter@1.25/10/.125/.375
google/gemini-3-flash 1048576/65536 .5/3/.05 tiap>t google=gemini-3-flash-preview
google/gemini-3-flash-preview 1048576/65536 .5/3/.05 tiap>t google
google/gemini-3.1-flash-lite 1048576/65536 .25/1.5/.025 tiap>t google
google/gemini-3.1-flash-lite-preview 1048576/65536 .25/1.5/.025 tiap>t bitrouter google
    openrouter@.25/1.5/.025/.083333 vertex
google/gemini-3.1-pro-preview 1048576/65536 2/12/.2+200000:4/18/.4 tiap>t bitrouter google
    openrouter@2/12/.2/.375 vertex
google/gemini-3.5-flash 1048576/65536 1.5/9/.15 tiap>t bitrouter google opencode-zen
    openrouter@1.5/9/.15/.083333 vertex deepinfra=google/gemini-3.5-flash@1.5/9
google/gemini-3.5-flash-lite 1048576/65536 .3/2.5/.03 tiap>t google
google/gemini-3.6-flash 1048576/65536 .75/3.75/.075 tiavp>t bitrouter@1.5/7.5/.15 google
    opencode-zen@1.5/7.5/.15 openrouter@.75/3.75/.075/.041667 vertex@1.5/7.5/.15
google/gemini-3.7-flash 1048576/65536 .75/3.75/.075 tiap>t google
google/gemini-3.8-flash 1048576/65536 .75/3.75/.075 tiap>t google
google/gemini-4-argon 1048576/1048576 2/10/.1 tiap>t google
google/gemini-embedding-001 2048/0 .15/0 t>e google
google/gemini-embedding-2 8192/0 .2/0 tia>e google
google/gemini-flash-latest 1048576/65536 .75/3.75/.075 tiap>t google
google/gemini-pro-latest 1048576/65536 2/12/.2+200000:4/18/.4 tiap>t google
meta-llama/llama-3.3-70b-instruct 131072/131072 - t>t sambanova=Meta-Llama-3.3-70B-Instruct@.6/1.2
    fireworks=accounts/fireworks/models/llama-v3p3-70b-instruct@.9/.9
    deepinfra=meta-llama/Llama-3.3-70B-Instruct@.23/.4
meta-llama/llama-4-maverick 1048576/1048576 - ti>t
    fireworks=accounts/fireworks/models/llama4-maverick-instruct-basic@.22/.88
    deepinfra=meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8@.2/.8
minimax/minimax-m2.5 196608/196608 .3/1.2/.03/.375 t>t alibaba_cn=MiniMax-M2.5@.3/1.2
    alibaba_coding_plan=MiniMax-M2.5@- atlascloud=minimaxai/minimax-m2.5@.295/1.2/.06
    aws-bedrock=minimax.minimax-m2.5@.3/1.2 bitrouter@.15/.9/.05
    chutes=MiniMaxAI/MiniMax-M2.5-TEE@.15/1.2/.075 minimax=MiniMax-M2.5 minimax_cn=MiniMax-M2.5
    novita@.3/1.2/.03 opencode-go@- opencode-zen@.3/1.2/.06 openrouter@.15/.9/.05
    qianfan_cn@.29/1.17 siliconflow=MiniMaxAI/MiniMax-M2.5@.3/1.2
    siliconflow_cn=Pro/MiniMaxAI/MiniMax-M2.5@.3/1.22 tencent@.3/1.2/.03 tencent_cn@.3/1.2/.03
minimax/minimax-m2.7 196608/196608 .3/1.2/.06/.375 t>t alibaba_cn=MiniMax/MiniMax-M2.7
    bitrouter@.225/.9/.045/.28125 minimax=MiniMax-M2.7 minimax_cn=MiniMax-M2.7 novita@.3/1.2/.06
    opencode-go@- opencode-zen@.3/1.2/.06 openrouter@.25/1/.05 tencent@.3/1.2/.06
    tencent_cn@.3/1.2/.06 sambanova=MiniMax-M2.7@.6/2.4 together=MiniMaxAI/MiniMax-M2.7@.3/1.2/.06
minimax/minimax-m3 1000000/128000 .3/1.2/.06+512000:.6/2.4/.12 ti>t
    atlascloud=minimaxai/minimax-m3 bitrouter minimax=MiniMax-M3 minimax_cn=MiniMax-M3
    opencode-go@- opencode-zen openrouter tencent@.6/2.4/.12+512000:1.2/4.8/.24
    tencent_cn@.6/2.4/.12+512000:1.2/4.8/.24 fireworks=accounts/fireworks/models/minimax-m3
mistralai/codestral-latest 128000/128000 .3/.9/.03 t>t mistral
mistralai/devstral-latest 256000/256000 .4/2/.04 t>t mistral
mistralai/mistral-embed 8192/0 .1/0 t>e mistral
mistralai/mistral-large-latest 262144/262144 .5/1.5/.05 ti>t mistral
mistralai/mistral-medium-latest 262144/262144 1.5/7.5/.15 ti>t mistral
mistralai/mistral-small-latest 262144/262144 .15/.6/.015 ti>t mistral
moonshotai/kimi-k2.5 262144/262144 .6/3/.1 ti>t alibaba_cn@.574/2.411 alibaba_coding_plan@-
    atlascloud@.49/2.5/.2 aws-bedrock=moonshotai.kimi-k2.5@.6/3 azure@.6/3 bitrouter@.375/2.025
    chutes=moonshotai/Kimi-K2.5-TEE@.44/2/.22 moonshotai novita opencode-go@-
    opencode-zen@.6/3/.08 openrouter@.57/2.85/.095 qianfan_cn@.56/2.92
    siliconflow=moonshotai/Kimi-K2.5@.45/2.25 siliconflow_cn=Pro/moonshotai/Kimi-K2.5@.45/2.25
    tencent tencent_cn fireworks=accounts/fireworks/models/kimi-k2p5
moonshotai/kimi-k2.6 262144/262144 .95/4/.16 ti>t alibaba_cn@.929/3.858 ambient@.95/4/.2/0
    atlascloud azure@.95/4 bitrouter@.7125/3/.12 chutes=moonshotai/Kimi-K2.6-TEE@.66/3.5/.33
    gmicloud=moonshotai/Kimi-K2.6@.855/3.6/.144 moonshotai novita@.8/3.4/.16 opencode-go@-
    opencode-zen openrouter@.589/2.48/.0992 phala@1.09/4.6/.37 qianfan redpill@1.09/4.6/.37
    siliconflow=moonshotai/Kimi-K2.6@.77/4/.2 siliconflow_cn=Pro/moonshotai/Kimi-K2.6 tencent
    tencent_cn tinfoil=kimi-k2-6@1.5/5.25 deepinfra=moonshotai/Kimi-K2.6@.75/3.5/.15
moonshotai/kimi-k2.7-code 262144/262144 .95/4/.19 ti>t ambient@.73/3.5/.15 atlascloud@.95/4/.16
    azure bitrouter@.7125/3/.1425 gmicloud=moonshotai/kimi-k2.7-code-highspeed@1.9/8/.38
    moonshotai novita opencode-go@- opencode-zen openrouter@.73/3.5/.15
moonshotai/kimi-k3 1048576/1048576 3/15/.3 ti>t bitrouter moonshotai
    moonshotai_coding_plan=kimi-for-coding@- novita opencode-go@- opencode-zen openrouter
    phala@3/15/1.5 redpill@3/15/1.5 tinfoil@2/6 together=moonshotai/Kimi-K3
moonshotai/kimi-k3.1-pro 1048576/1048576 2/10/.2/2 ti>t moonshotai
openai/gpt-4.1 1047576/32768 2/8/.5 tip>t openai
openai/gpt-4.1-mini 1047576/32768 .4/1.6/.1 tip>t openai
openai/gpt-4o 128000/16384 2.5/10/1.25 tip>t openai
openai/gpt-4o-mini 128000/16384 .15/.6/.075 tip>t openai
openai/gpt-5 272000/128000 1.25/10/.125 tip>t openai
openai/gpt-5-mini 272000/128000 .25/2/.025 tip>t openai
openai/gpt-5-nano 272000/128000 .05/.4/.005 tip>t openai
openai/gpt-5.1 272000/128000 1.25/10/.125 tip>t openai
openai/gpt-5.2 272000/128000 1.75/14/.175 tip>t openai
openai/gpt-5.3-codex 272000/128000 1.75/14/.175 tip>t openai
openai/gpt-5.4 1050000/128000 2.5/15/.25+272000:5/22.5/.5 tip>t
    aws-bedrock=openai.gpt-5.4@2.75/16.5/.275 azure bitrouter openai opencode-zen openrouter
openai/gpt-5.4-mini 272000/128000 .75/4.5/.075 tip>t azure bitrouter openai opencode-zen
    openrouter
openai/gpt-5.4-nano 272000/128000 .2/1.25/.02 tip>t openai
openai/gpt-5.4-pro 1050000/128000 30/180+272000:60/270 tip>t openai
openai/gpt-5.5 1050000/128000 5/30/.5+272000:10/45/1 tip>t aws-bedrock=openai.gpt-5.5@5.5/33/.55
    azure bitrouter gmicloud openai opencode-zen openrouter
openai/gpt-5.5-pro 1050000/128000 30/180+272000:60/270 tip>t openai
openai/gpt-5.6 922000/128000 4/20/.4/5+272000:8/30/.8/10 tip>t openai
openai/gpt-5.6-luna 922000/128000 .2/1.2/.02/.25+272000:.4/1.8/.04/.5 tip>t
    aws-bedrock=openai.gpt-5.6-luna@.22/1.32/.022/.275 azure@.2/1.2/.02 bitrouter@1/6/.1/1.25
    openai opencode-go@- opencode-zen openrouter@.1/.6/.01/.125
openai/gpt-5.6-sol 922000/128000 4/20/.4/5+272000:8/30/.8/10 tip>t
    aws-bedrock=openai.gpt-5.6-sol@5.5/33/.55/6.88 azure@5/30/.5
    bitrouter@5/30/.5/6.25+272000:10/45/1/12.5 openai
    opencode-zen@5/30/.5/6.25+272000:10/45/1/12.5 openrouter@5/30/.5/6.25+272000:10/45/1/12.5
openai/gpt-5.6-terra 922000/128000 2/12/.2/2.5+272000:4/18/.4/5 tip>t
    aws-bedrock=openai.gpt-5.6-terra@2.2/13.2/.22/2.75 azure@2/12/.2 bitrouter@2.5/15/.25/3.125
    openai opencode-zen@2.5/15/.25/3.125 openrouter@1/6/.1/1.25
openai/gpt-6-astra 922000/128000 10/50/1/12.5+272000:20/75/2/25 tip>t openai
openai/gpt-6-luna 922000/128000 .1/.5/.01/.125+272000:.2/.75/.02/.25 tip>t openai
openai/gpt-6-sol 922000/128000 2/10/.2/2.5+272000:4/15/.4/5 tip>t openai
openai/gpt-6.1-sol 922000/128000 2/10/.1/2.5+272000:4/15/.2/5 tip>t openai
openai/gpt-6.1-terra 922000/128000 1/5/.05/1.25+272000:2/7.5/.1/2.5 tip>t openai
openai/gpt-oss-120b 131072/131072 .037/.17 t>t aws-bedrock=openai.gpt-oss-120b@.15/.6
    cerebras@.35/.75 novita@.05/.25 openrouter siliconflow=openai/gpt-oss-120b@.05/.45
    sambanova@.22/.59 groq=openai/gpt-oss-120b@.15/.6/.075 together=openai/gpt-oss-120b@.15/.6
    deepinfra=openai/gpt-oss-120b nebius=openai/gpt-oss-120b@.15/.6
openai/gpt-oss-20b 131072/131072 - t>t groq=openai/gpt-oss-20b@.075/.3/.0375
    fireworks=accounts/fireworks/models/gpt-oss-20b@.07/.3/.035
    deepinfra=openai/gpt-oss-20b@.03/.14
openai/o3 200000/100000 2/8/.5 tip>t openai
openai/text-embedding-3-large 8191/0 .13/0 t>e openai
openai/text-embedding-3-small 8191/0 .02/0 t>e openai
openai/text-embedding-ada-002 8191/0 .1/0 t>e openai
perplexity/sonar 128000/128000 1/1 t>t perplexity
perplexity/sonar-deep-research 128000/128000 2/8 t>t perplexity
perplexity/sonar-pro 200000/8000 3/15 t>t perplexity
perplexity/sonar-reasoning-pro 128000/128000 2/8 t>t perplexity
qwen/qwen3.5-122b-a10b 262144/65536 .4/3.2 ti>t alibaba bitrouter@.26/2.08 novita
    openrouter@.26/2.08 siliconflow=Qwen/Qwen3.5-122B-A10B@.26/2.08
    siliconflow_cn=Qwen/Qwen3.5-122B-A10B@.29/2.32 deepinfra=Qwen/Qwen3.5-122B-A10B@.29/2.4
qwen/qwen3.5-27b 262144/65536 .3/2.4 ti>t alibaba bitrouter@.25/2 novita openrouter@.195/1.56
    siliconflow=Qwen/Qwen3.5-27B@.25/2 siliconflow_cn=Qwen/Qwen3.5-27B@.26/2.09
qwen/qwen3.6-27b 262144/65536 .6/3.6 ti>t alibaba bitrouter@.3/3.2 openrouter@.3/2/.15
    siliconflow=Qwen/Qwen3.6-27B@.3/3.2 tiyuvta=qwen/qwen3.6-27b@.28/2.69/.07
qwen/qwen3.6-35b-a3b 262144/65536 .248/1.485 ti>t alibaba bitrouter@.2/1.6 openrouter@.14/1
    siliconflow=Qwen/Qwen3.6-35B-A3B@.2/1.6 siliconflow_cn=Qwen/Qwen3.6-35B-A3B@.23/1.86
    tiyuvta=qwen/qwen3.6-35b-a3b@.12/1.03/.03 deepinfra=Qwen/Qwen3.6-35B-A3B@.1/.95
qwen/qwen3.6-flash 1000000/65536 .1875/1.125/-/.234375+256000:1/4 ti>t alibaba
    alibaba_cn@.1875/1.125/-/.234375+256000:.66/3.961 alibaba_coding_plan@- bitrouter@.165/.99
    openrouter
qwen/qwen3.6-plus 1000000/1000000 .5/3/.05/.625+256000:2/6 t>t alibaba
    alibaba_cn@.5/3/.05/.625+256000:1.101/6.602 alibaba_coding_plan@- opencode-go@- opencode-zen
    openrouter@.325/1.95/-/.40625 together=Qwen/Qwen3.6-Plus@.5/3
qwen/qwen3.7-max 1000000/65536 2.5/7.5/.5/3.125 t>t alibaba alibaba_cn alibaba_coding_plan@-
    atlascloud@2.5/7.5/.5 bitrouter@1.25/3.75/.25/1.5625
    gmicloud=Qwen/Qwen3.7-Max@2.5/7.5/.25/3.125 novita@1.25/3.75/.25/1.5625 opencode-go@-
    openrouter@1.475/4.425/.295/1.84375 together=Qwen/Qwen3.7-Max@1.5/4.5/.3
qwen/qwen3.7-plus 1000000/65536 .5/3/.05/.625+256000:1.2/4.8 ti>t alibaba
    alibaba_cn@.5/3/.05/.625+256000:.826/3.301 alibaba_coding_plan@-
    atlascloud@.4/1.6/.08+262144:1.2/4.8/.24 bitrouter@.276/1.101 opencode-go@-
    openrouter@.32/1.28/.064/.4 together=Qwen/Qwen3.7-Plus@.32/1.28
qwen/qwen3.8-27b 262144/262144 - ti>t cerebras=qwen-3.8-27b@.99/1.49 groq=qwen/qwen3.8-27b@.8/4
    deepinfra=Qwen/Qwen3.8-27B@.4/3/.04 nebius=Qwen/Qwen3.8-27B@.45/3
qwen/qwen3.8-max 1000000/131072 2/6/.25/2.5 tiv>t alibaba alibaba_cn@1.667/5/.167/2.083 bitrouter
    opencode-go@- openrouter fireworks=accounts/fireworks/models/qwen3p8-max@2/6/.25
x-ai/grok-4.20 1000000/1000000 1.25/2.5/.2+200000:2.5/5/.4 ti>t bitrouter openrouter
    xai=grok-4.20-0309-non-reasoning
x-ai/grok-4.20-multi-agent 1000000/1000000 1.25/2.5/.2+200000:2.5/5/.4 ti>t bitrouter openrouter
    xai=grok-4.20-multi-agent-0309
x-ai/grok-4.3 1000000/1000000 1.25/2.5/.2+200000:2.5/5/.4 ti>t atlascloud=xai/grok-4.3
    aws-bedrock=xai.grok-4.3 bitrouter openrouter xai
x-ai/grok-4.5 500000/500000 2/6/.3+200000:4/12/.6 ti>t bitrouter@2/6/.5 opencode-go@-
    opencode-zen@2/6/.5 openrouter xai
x-ai/grok-4.6 500000/500000 2/6/.5+200000:4/12/1 ti>t aws-bedrock=xai.grok-4.6@2.2/6.6/.55
    bitrouter opencode-zen openrouter xai
x-ai/grok-4.7 500000/500000 2/6/.5+200000:4/12/1 ti>t xai
x-ai/grok-build-0.1 256000/256000 1/2/.2+200000:2/4/.4 ti>t bitrouter opencode-zen openrouter xai
x-ai/grok-code-fast 256000/256000 1/2/.2+200000:2/4/.4 ti>t xai
xiaomi/mimo-v2-flash 0/0 .14/.28/.0028 t>t chutes=XiaomiMiMo/MiMo-V2-Flash-TEE@.09/.29/.045 xiaomi
xiaomi/mimo-v2-omni 0/0 .14/.28/.0028 t>t opencode-go@- xiaomi
xiaomi/mimo-v2-pro 0/0 .435/.87/.0036 t>t opencode-go@- xiaomi
xiaomi/mimo-v2.5 262144/32768 .14/.28/.0028 t>t ambient@.4/2/.08/0 bitrouter opencode-go@-
    openrouter xiaomi xiaomi_token_plan@- xiaomi_token_plan_cn@- xiaomi_token_plan_eu@-
xiaomi/mimo-v2.5-pro 262144/32768 .435/.87/.0036 t>t bitrouter opencode-go@- openrouter xiaomi
    xiaomi_token_plan@- xiaomi_token_plan_cn@- xiaomi_token_plan_eu@-
z-ai/glm-4.6 200000/128000 .6/2.2/.11/0 t>t zai together=zai-org/GLM-4.6@.6/2.2
z-ai/glm-4.7 200000/128000 .6/2.2/.11/0 t>t alibaba_coding_plan@- aws-bedrock=zai.glm-4.7@.6/2.2
    bitrouter@.6/2.2/.11 cerebras=zai-glm-4.7@2.25/2.75/2.25/0 novita=zai-org/glm-4.7@.6/2.2/.11
    opencode-zen@.6/2.2/.1 openrouter@.4/1.75/.08 zai zai_coding_plan@-
z-ai/glm-5 200000/128000 1/3.2/.2 t>t alibaba_cn@.86/3.15 alibaba_coding_plan@-
    aws-bedrock=zai.glm-5@1/3.2 bitrouter@.6/1.92/.12 chutes=zai-org/GLM-5-TEE@.95/2.55/.475
    gmicloud=zai-org/GLM-5-FP8@.6/1.92/.12 novita=zai-org/glm-5 opencode-go@- opencode-zen
    openrouter@.95/2.55/.2 qianfan@.7/2.24/.14 siliconflow=zai-org/GLM-5@.95/2.55
    siliconflow_cn=Pro/zai-org/GLM-5@1/3.2 tencent tencent_cn zai zai_coding_plan@-
z-ai/glm-5.1 200000/128000 1.4/4.4/.26 t>t alibaba_cn@.87/3.48/.17
    atlascloud=zai-org/glm-5.1@1.26/3.96/.234 bitrouter@.98/3.08/.182
    chutes=zai-org/GLM-5.1-TEE@.98/3.08/.49 gmicloud=zai-org/GLM-5.1-FP8@.98/3.08/.182
    novita=zai-org/glm-5.1@1.38/4.4/.26 opencode-go@- opencode-zen openrouter@.966/3.036/.1794
    phala@1.21/4.2/.6 qianfan qianfan_cn@.83/3.33+32000:1.11/3.89 redpill@1.21/4.2/.6
    siliconflow=zai-org/GLM-5.1@1.4/4.4 siliconflow_cn=Pro/zai-org/GLM-5.1@1.4/4.4 tencent
    tencent_cn zai zai_coding_plan@- fireworks=accounts/fireworks/models/glm-5p1
z-ai/glm-5.2 1000000/128000 1.4/4.4/.26 t>t alibaba@1.4/4.4/.28/0 alibaba_cn@1.1/3.851/.275/0
    ambient@1.05/4.4/.2/0 atlascloud=zai-org/glm-5.2 bitrouter@.979/3.08/.182
    gmicloud=zai-org/GLM-5.2-FP8@.979/3.08/.182 novita=zai-org/glm-5.2 opencode-go@- opencode-zen
    openrouter@1.12/3.52/.208 phala qianfan redpill siliconflow=zai-org/GLM-5.2@1.4/4.4
    siliconflow_cn=zai-org/GLM-5.2@1.4/4.4 tencent tencent_cn tinfoil=glm-5-2@1.5/5.25/.375 zai
    zai_coding_plan@- together=zai-org/GLM-5.2 deepinfra=zai-org/GLM-5.2@.75/2.4/.14
z-ai/glm-5.3 1000000/128000 1.4/4.4/.26/0 t>t zai together=zai-org/GLM-5.3@1.4/4.4/.26
z-ai/glm-5.3-flash 1048576/128000 .15/.5/.03/0 ti>t zai together=zai-org/GLM-5.3-Flash@.15/.5/.03
"""


@functools.cache
def catalogue() -> dict[str, Model]:
    """The models we know, by id."""
    records: list[str] = []
    for line in _CATALOGUE.splitlines():
        if line.startswith(" "):
            records[-1] += line[3:]
        elif line:
            records.append(line)
    return {model.id: model for model in map(_read_record, records)}


@functools.cache
def _by_bare_id() -> dict[str, str]:
    """Normalised model ids, with and without their lab -> the catalogue's id."""
    known: dict[str, str] = {}
    for model in catalogue().values():
        known.setdefault(normal_id(model.id.partition("/")[2]), model.id)
        known[normal_id(model.id)] = model.id
    for model in catalogue().values():
        for theirs, _ in model.carried.values():
            known.setdefault(normal_id(theirs.rpartition("/")[2]), model.id)
    return known


def find_model(text: str) -> Model | None:
    """The catalogue's model for an id as people write it: bare, dashed, dated, in capitals."""
    lab, slash, rest = text.removeprefix("models/").partition("/")
    wanted = normal_id(f"{_LABS.get(lab, lab)}/{rest}" if slash else lab)
    ident = _by_bare_id().get(wanted) or _by_bare_id().get(_undated(wanted))
    return catalogue()[ident] if ident else None


def normal_id(text: str) -> str:
    return text.lower().replace(".", "-").replace("_", "-")


def _undated(ident: str) -> str:
    """claude-sonnet-4-5-20250929 and gpt-4o-2024-08-06 without their dates."""
    return re.sub(r"-(20\d{6}|20\d\d-[01]\d-[0-3]\d|latest)$", "", ident)


def _read_record(record: str) -> Model:
    ident, limits, price, modalities, *carriers = record.split(" ")
    context, _, max_output = limits.partition("/")
    inputs, _, outputs = modalities.partition(">")
    listed = _read_price(price)
    carried = {}
    for carrier in carriers:
        name, _, own_price = carrier.partition("@")
        name, _, own_id = name.partition("=")
        own = _read_price(own_price) if own_price else listed
        carried[name] = (own_id or _usual_id(ident, name), own)
    return Model(ident, int(context), int(max_output), listed, inputs, outputs, carried)


def _usual_id(ident: str, provider: str) -> str:
    lab, _, bare = ident.partition("/")
    if provider in PROVIDERS and PROVIDERS[provider].full_ids:
        return ident
    return bare.replace(".", "-") if lab == "anthropic" else bare


def _read_price(text: str) -> Price:
    first, *above = text.split("+")
    rates = [None if rate in ("-", "") else float(rate) for rate in first.split("/")]
    plain, out, read, write = [*rates, None, None, None][:4]
    tiers = [tier.partition(":") for tier in above]
    above_tokens = tuple((int(n), _read_price(rates)) for n, _, rates in tiers)
    return Price(plain, out, read, write, above_tokens)


def cost_nanousd(usage: Usage, price: Price) -> int | None:
    """What an answer cost, in billionths of a dollar; None if a rate that it needs is unknown.

    Cached tokens are part of the input and reasoning is part of the output, so each token is
    charged once.
    """
    if price.input is None:
        return None
    if price.tiers:
        price = next((t for above, t in price.tiers[::-1] if usage.input_tokens > above), price)
    plain = usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens
    charged = (
        (plain, price.input),
        (usage.cached_tokens, price.cache_read),
        (usage.cache_write_tokens, price.cache_write),
        (usage.output_tokens, price.output),
    )
    if any(count < 0 or (count and rate is None) for count, rate in charged):
        return None
    return round(1000 * sum(count * (rate or 0) for count, rate in charged))


# ---------------------------------------------------------------------------------------------
# 13. config: bitrouter.toml and the environment -> Config (pure)
# ---------------------------------------------------------------------------------------------
# The dataclasses below are the schema: one reader walks them and a parsed file side by side, and
# reports everything that does not fit, each with its line. Adding a key is adding a field.


ECHO_MODEL = "echo/echo"  # the built-in model; nobody else may be called so


def _limited(default: T, *, low: float | None = None, words: tuple[str, ...] = ()) -> T:
    """A field with limits: a least value, or the words that it may be."""
    return field(default=default, metadata={"low": low, "words": words})


class ProtocolRules(NamedTuple):
    """Which protocols a provider speaks for which models: (glob, protocols), first match wins."""

    rules: tuple[tuple[str, tuple[ApiProtocol, ...]], ...] = ()

    def spoken(self, model: str) -> tuple[ApiProtocol, ...]:
        for glob, protocols in self.rules:
            if glob in ("*", model) or (glob.endswith("*") and model.startswith(glob[:-1])):
                return protocols
        return ()


_SPEAKS_AS_KNOWN = ProtocolRules()


@dataclass(slots=True)
class Timeouts:
    """Seconds. Each covers one stretch of an attempt; `total_s` bounds answers, not streams."""

    connect_s: float = _limited(10.0, low=0.01)
    first_token_s: float = _limited(120.0, low=0.01)
    idle_s: float = _limited(120.0, low=0.01)
    total_s: float = _limited(600.0, low=0.01)
    pool_idle_s: float = _limited(55.0, low=0.0)  # nginx and most edges close at 60 or 75


@dataclass(slots=True)
class SomeTimeouts:
    """A provider's own, where they differ."""

    connect_s: float | None = _limited(None, low=0.01)
    first_token_s: float | None = _limited(None, low=0.01)
    idle_s: float | None = _limited(None, low=0.01)
    total_s: float | None = _limited(None, low=0.01)


@dataclass(slots=True)
class Retry:
    """Of the same target: how often, and how long the first and the longest pause may be."""

    max: int = _limited(2, low=0)
    base_ms: float = _limited(250.0, low=0)
    max_ms: float = _limited(4000.0, low=0)


@dataclass(slots=True)
class Breaker:
    """So many failures within a window, and the target is spared for a while."""

    failures: int = _limited(5, low=1)
    window_s: float = _limited(60.0, low=0.01)
    cooldown_s: float = _limited(30.0, low=0.01)


@dataclass(slots=True)
class Server:
    listen: str = "127.0.0.1:4356"
    auth: str = _limited("auto", words=("auto", "none", "required"))
    base_path: str = ""
    max_body_mb: float = _limited(100.0, low=0.001)
    log_format: str = _limited("auto", words=("auto", "text", "json"))
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    health_listen: str = ""


@dataclass(slots=True)
class Upstream:
    timeouts: Timeouts = field(default_factory=Timeouts)
    retry: Retry = field(default_factory=Retry)
    breaker: Breaker = field(default_factory=Breaker)


@dataclass(slots=True)
class AccountConfig:
    api_key: Secret
    label: str = ""
    api_base: str = ""


@dataclass(slots=True)
class Pricing:
    """US dollars per million tokens."""

    input: float | None = _limited(None, low=0)
    output: float | None = _limited(None, low=0)
    cache_read: float | None = _limited(None, low=0)
    cache_write: float | None = _limited(None, low=0)


@dataclass(slots=True)
class DeclaredModel:
    """A model that a provider of the file serves, under our name for it and its own."""

    id: str
    provider_model_id: str = ""
    api_protocol: ProtocolRules = _SPEAKS_AS_KNOWN
    context: int = _limited(0, low=0)
    max_output: int = _limited(0, low=0)
    pricing: Pricing = field(default_factory=Pricing)


@dataclass(slots=True)
class ProviderConfig:
    api_base: str = ""
    api_key: Secret | None = None
    accounts: tuple[AccountConfig, ...] = ()
    account_strategy: str = _limited("failover", words=("failover", "balance"))
    api_protocol: ProtocolRules = _SPEAKS_AS_KNOWN
    models: tuple[DeclaredModel, ...] = ()
    extra_headers: dict[str, str] = field(default_factory=dict)
    timeouts: SomeTimeouts = field(default_factory=SomeTimeouts)


@dataclass(slots=True)
class Endpoint:
    provider: str
    service_id: str


@dataclass(slots=True)
class VirtualModel:
    endpoints: tuple[Endpoint, ...]
    strategy: str = _limited("priority", words=("priority",))


@dataclass(slots=True)
class KeyConfig:
    """A key that callers may use, when auth is on. Its name is what the log calls them."""

    key: Secret


@dataclass(slots=True)
class Config:
    server: Server = field(default_factory=Server)
    upstream: Upstream = field(default_factory=Upstream)
    keys: dict[str, KeyConfig] = field(default_factory=dict)
    providers: dict[str, ProviderConfig] = field(default_factory=dict)
    models: dict[str, VirtualModel] = field(default_factory=dict)


class Loaded(NamedTuple):
    """A configuration, and what should be said about it.

    Attributes:
        unset: variables that the file names and the environment lacks, with where.
    """

    config: Config
    problems: list[str]
    unset: list[str]


_KeyPath: TypeAlias = tuple[str | int, ...]  # where in the file: ("providers", "openai", "api_key")


def parse_config(text: str, environ: Mapping[str, str], name: str = "bitrouter.toml") -> Loaded:
    """Read a configuration: TOML, or JSON if its name ends in .json. Never raises."""
    try:
        raw = _parse_text(text, name)
    except (ValueError, RecursionError) as exc:
        return Loaded(Config(), [f"{name}: {exc}"], [])
    reader = _Reader(environ)
    config = reader.table(Config, raw, ())
    _check_references(config, reader)
    where = _Lines(text, name)

    def shown(found: list[tuple[_KeyPath, str]]) -> list[str]:
        return [f"{where.of(path)}: {_dotted(path)}: {said}" for path, said in found]

    return Loaded(config, shown(reader.found), shown(reader.unset))


def _parse_text(text: str, name: str) -> JsonObject:
    if name.endswith(".json"):
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {show_json(value)}")
        return value
    import tomllib  # only for those who have a file

    return tomllib.loads(text)


class _Reader:
    """Walks a dataclass and a parsed table together, and notes what does not fit."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.found: list[tuple[_KeyPath, str]] = []
        self.unset: list[tuple[_KeyPath, str]] = []
        self._environ = environ

    def table(self, kind: Callable[..., T], raw: Json, path: _KeyPath) -> T:
        """A dataclass from a table; fields that are wrong keep their defaults."""
        known = _hints(kind)
        values: dict[str, Any] = {}
        if not isinstance(raw, dict):
            self._mismatch(path, "a table", raw)
            raw = {}
        for name, value in raw.items():
            if name in known:
                values[name] = self.value(known[name], value, (*path, name))
            else:
                at = (*path, name)
                self.problem(at, f"unknown key; {_near(name, known)}")
        for spec in fields(kind):  # type: ignore[arg-type]  # kind is one of our dataclasses
            given = values.get(spec.name)
            if given is not None:
                self._limits(spec.metadata, given, (*path, spec.name))
            elif spec.default is MISSING and spec.default_factory is MISSING:
                if spec.name not in raw:
                    self.problem((*path, spec.name), "this key is required")
                values[spec.name] = _EMPTY.get(known[spec.name], "")
            else:
                values.pop(spec.name, None)
        return kind(**values)

    def value(self, kind: Any, raw: Json, path: _KeyPath) -> Any:
        """A value of a field's type, or None after noting what is wrong."""
        from typing import get_args, get_origin

        options = [option for option in get_args(kind) if option is not type(None)]
        if get_origin(kind) in (tuple, dict):
            return self._several(get_origin(kind), options, raw, path)
        if options:  # `X | None`: TOML has no null
            kind = options[0]
        if is_dataclass(kind):
            return self.table(kind, raw, path)  # type: ignore[arg-type]  # it is a type
        return self._protocols(raw, path) if kind is ProtocolRules else self._plain(kind, raw, path)

    def _several(self, kind: Any, options: list[Any], raw: Json, path: _KeyPath) -> Any:
        if kind is tuple and isinstance(raw, list):
            values = [self.value(options[0], one, (*path, i)) for i, one in enumerate(raw)]
            return tuple(value for value in values if value is not None)
        if kind is dict and isinstance(raw, dict):
            pairs = {key: self.value(options[1], one, (*path, key)) for key, one in raw.items()}
            return {key: value for key, value in pairs.items() if value is not None}
        return self._mismatch(path, "a list" if kind is tuple else "a table", raw)

    def _plain(self, kind: Any, raw: Json, path: _KeyPath) -> Any:
        wanted = str if kind is Secret else kind
        if kind is float and type(raw) is int and abs(raw) < 1e15:
            raw = float(raw)
        if not isinstance(raw, wanted) or (wanted is int and isinstance(raw, bool)):
            return self._mismatch(path, _PLAIN_NAMES[wanted], raw)
        if wanted is str:
            raw = self._substituted(raw, path)
            if kind is Secret:
                return Secret(raw)
        return raw

    def _protocols(self, raw: Json, path: _KeyPath) -> ProtocolRules:
        table = raw if isinstance(raw, dict) else {"*": raw}
        rules = []
        for glob, names in table.items():
            listed = names if isinstance(names, list) else [names]
            spoken = tuple(p for name in listed if (p := self._protocol(name, path)))
            rules.append((str(glob), spoken))
        # the longest glob wins, as the most particular one
        return ProtocolRules(tuple(sorted(rules, key=lambda rule: ("*" in rule[0], -len(rule[0])))))

    def _protocol(self, name: Json, path: _KeyPath) -> ApiProtocol | None:
        protocol = PROTOCOL_NAMES.get(name) if isinstance(name, str) else None
        if protocol is None:
            known = ", ".join(ApiProtocol)
            self.problem(path, f"expected one of {known}, got {show_json(name)}")
        return protocol

    def _limits(self, limits: Mapping[str, Any], value: Any, path: _KeyPath) -> None:
        low, words = limits.get("low"), limits.get("words")
        if low is not None and not low <= value < 1e12:
            self.problem(path, f"expected {low:g} or more, got {show_json(value)}")
        if words and value not in words:
            said = f"expected one of {', '.join(words)}, got {show_json(value)}"
            self.problem(path, f"{said}")

    def _substituted(self, text: str, path: _KeyPath) -> str:
        expanded, missing = expand(text, self._environ)
        for name in missing:
            said = f"the environment variable {name} is not set"
            self.unset.append((path, said))
        return expanded

    def problem(self, path: _KeyPath, said: str) -> None:
        self.found.append((path, said))

    def _mismatch(self, path: _KeyPath, wanted: str, raw: Json) -> None:
        # Below these two, a value in the wrong place may well be a key.
        hidden = path[:1] in (("providers",), ("keys",)) and type(raw) in _JSON_KINDS
        shown = _JSON_KINDS[type(raw)] if hidden else show_json(raw)
        self.problem(path, f"expected {wanted}, got {shown}")


_JSON_KINDS: dict[type, str] = {str: "a string", list: "a list", dict: "a table"}
_EMPTY = {Secret: Secret(""), str: "", tuple[Endpoint, ...]: ()}
_PLAIN_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}

PROTOCOL_NAMES = {
    **{str(protocol): protocol for protocol in ApiProtocol},
    "openai": ApiProtocol.CHAT_COMPLETIONS,
    "anthropic": ApiProtocol.MESSAGES,
    "google": ApiProtocol.GENERATE_CONTENT,
}


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    from typing import get_type_hints

    hints = get_type_hints(kind)
    return {spec.name: hints[spec.name] for spec in fields(kind)}


def expand(text: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Put variables in place of ${VAR} and ${VAR:-default}; also say which are not set."""
    missing: list[str] = []

    def value(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        if environ.get(name):
            return environ[name]
        if default is None:
            missing.append(name)
        return default or ""

    return re.sub(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}", value, text), missing


def _near(name: str, known: Iterable[str]) -> str:
    near = near_misses(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(known)}"


def _dotted(path: _KeyPath) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


class _Lines:
    """Where things stand in a file: tomllib does not say, so this looks for itself."""

    def __init__(self, text: str, name: str) -> None:
        self._lines = text.split("\n")
        self._name = name

    def of(self, path: _KeyPath) -> str:
        """`file:line` of a key, of the nearest thing around it, or of the file."""
        names = [str(part) for part in path if isinstance(part, str)]
        at = self._toml(names) if not self._name.endswith(".json") else self._json(names)
        if at and not self._name.endswith(".json") and any(isinstance(p, int) for p in path):
            at = self._nth(path, at)
        return f"{self._name}:{at}" if at else self._name

    def _toml(self, names: list[str]) -> int:
        best, depth, table = 0, -1, list[str]()
        for number, line in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[\[?\s*(.+?)\s*\]\]?\s*(#.*)?$", line):
                table = _split_key(header[1])
                here = table
            elif key := re.match(rf"\s*({_TOML_KEY}(?:\s*\.\s*{_TOML_KEY})*)\s*=", line):
                here = [*table, *_split_key(key[1])]
            else:
                continue
            rest = names[len(here) :]
            inner = any(re.search(rf"\b{re.escape(name)}\b", line) for name in rest)
            score = 2 * len(here) + inner
            if here == names[: len(here)] and score > depth:
                best, depth = number, score
        return best

    def _nth(self, path: _KeyPath, start: int) -> int:
        """The line of the i-th entry of the list that begins at a line, as far as it can be told:
        entries are tables, in `[[...]]` or in braces."""
        index = next(part for part in path if isinstance(part, int))
        above = [str(part) for part in path[: path.index(index)]]
        headers = [
            number
            for number, line in enumerate(self._lines, 1)
            if (found := re.match(r"\s*\[\[\s*(.+?)\s*\]\]", line))
            and _split_key(found[1]) == above
        ]
        if headers:
            within = headers[index] if index < len(headers) else start
            last = [re.match(rf"\s*{re.escape(str(path[-1]))}\s*=", line) for line in self._lines]
            return next((n + 1 for n in range(within, len(last)) if last[n]), within)
        seen = -1
        for number in range(start, len(self._lines) + 1):
            seen += self._lines[number - 1].count("{")
            if seen >= index:
                return number
        return start

    def _json(self, names: list[str]) -> int:
        at = 0
        for name in names:
            found = "\n".join(self._lines).find(json.dumps(name), at)
            at = max(found, at)
        return "\n".join(self._lines)[:at].count("\n") + 1 if at else 0


_TOML_KEY = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""


def _split_key(text: str) -> list[str]:
    parts = re.findall(_TOML_KEY, text)
    return [part.strip("\"'") for part in parts]


# What the reader cannot see in one value: names that must exist, addresses that must make sense.


def _check_references(config: Config, reader: _Reader) -> None:
    for ident, provider in config.providers.items():
        _check_provider(ident, provider, reader)
    at: _KeyPath
    names: dict[str, str] = {}
    for ident in config.providers:
        other = names.setdefault(provider_id(ident), ident)
        if other != ident or ident == "echo":
            said = f"is the same provider as {other}" if other != ident else "is built in"
            reader.problem(("providers", ident), f"{ident} {said}")
    told = {path[:2] for path, _ in reader.found}
    for name, model in config.models.items():
        if name == ECHO_MODEL:
            reader.problem(("models", name), "this model is built in")
        if not model.endpoints and ("models", name) not in told:
            at = ("models", name, "endpoints")
            reader.problem(at, "expected at least one")
        for i, endpoint in enumerate(model.endpoints):
            known = {*config.providers, *PROVIDERS, *ALIASES}
            if endpoint.provider not in known:
                at = ("models", name, "endpoints", i, "provider")
                near = near_misses(endpoint.provider, known, 1)
                hint = f"did you mean {near[0]}?" if near else "`bitrouter providers` lists them"
                said = f"there is no provider {endpoint.provider!r}; {hint}"
                reader.problem(at, f"{said}")
    _check_server(config.server, reader)


def _check_provider(ident: str, provider: ProviderConfig, reader: _Reader) -> None:
    at: _KeyPath = ("providers", ident)
    if provider_id(ident) not in PROVIDERS and not provider.api_base:
        near = near_misses(ident, [*PROVIDERS, *ALIASES], 1)
        hint = f"did you mean {near[0]}?" if near else "one of your own needs an api_base"
        reader.problem(at, f"this provider is not known; {hint}")
    if provider.api_key and provider.accounts:
        reader.problem(at, "give api_key or accounts, not both")
    bases: list[tuple[_KeyPath, str]] = [((*at, "api_base"), provider.api_base)]
    for i, account in enumerate(provider.accounts):
        bases.append(((*at, "accounts", i, "api_base"), account.api_base))
    for where, base in bases:
        if base and (wrong := base_problem(base)):
            reader.problem(where, wrong)
    labels = [_label(account, i) for i, account in enumerate(provider.accounts, 1)]
    for label in {label for label in labels if labels.count(label) > 1}:
        where = (*at, "accounts")
        reader.problem(where, f"two accounts are labelled {show_json(label)}")
    for name, value in provider.extra_headers.items():
        if not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) or not is_header_text(value):
            where = (*at, "extra_headers", name)
            reader.problem(where, "not fit for an HTTP header")
        elif name.lower() in _OUR_HEADERS:
            where = (*at, "extra_headers", name)
            reader.problem(where, "this header is not yours to set")
    keys = [provider.api_key, *(account.api_key for account in provider.accounts)]
    if not all(is_header_text(key.reveal()) for key in keys if key):
        reader.problem(at, "a key holds a character that no header may hold")


_OUR_HEADERS = {
    "host", "content-length", "transfer-encoding", "connection", "content-type", "te", "upgrade",
    "expect", "trailer", "accept-encoding", "content-encoding",
}  # fmt: skip


def _check_server(server: Server, reader: _Reader) -> None:
    for key in ("listen", "health_listen"):
        text = getattr(server, key)
        if text and (wrong := listen_problem(text)):
            reader.problem(("server", key), wrong)
    if server.base_path and not re.fullmatch(r"(/[\w.~-]+)+", server.base_path):
        said = f"expected a path such as /llm, got {show_json(server.base_path)}"
        reader.problem(("server", "base_path"), said)


def is_header_text(text: str) -> bool:
    return re.fullmatch(r"[\x20-\x7e]*", text) is not None


def provider_id(name: str) -> str:
    return ALIASES.get(name, name)


def listen_problem(text: str) -> str:
    """What is wrong with `host:port` or `unix:/path`, or nothing."""
    if text.startswith("unix:/"):
        return ""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        return f"expected HOST:PORT or unix:/PATH, got {show_json(text)}"
    return ""


def base_problem(base: str) -> str:
    """What is wrong with a provider's base URL, or nothing."""
    try:
        url = urlsplit(base)
        host, _ = url.hostname or "", url.port
    except ValueError as exc:
        return f"not a URL: {exc}"
    if url.scheme not in ("http", "https") or not host or not is_header_text(base) or " " in base:
        return (
            f"expected http(s)://HOST/PATH, got {url.scheme or '?'}://{printable(host) or '?'}/..."
        )
    if url.query or url.fragment or url.username:
        return "a base has no query, fragment or user; use extra_headers or api_key"
    if url.scheme == "http" and not _is_near(host):
        return f"http:// would send your key in clear text to {host}; use https://"
    return ""


def _is_near(host: str) -> bool:
    """Whether a host is this machine or its private network, as far as its name tells."""
    import ipaddress

    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_private or address.is_loopback or address.is_link_local
    if re.fullmatch(r"[0-9.]+|0x[0-9a-f.]+", host):  # an address in disguise
        return False
    local = (".local", ".internal", ".lan", ".localhost", ".home", ".intranet", ".svc")
    return "." not in host or host.endswith((*local, ".cluster.local"))


def is_local(listen: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    return listen.startswith("unix:") or is_loopback(listen.rpartition(":")[0])


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1", "[::1]") or re.fullmatch(r"127\.[\d.]+", host) is not None


# The environment decides which providers of the registry are on.


class Account(NamedTuple):
    label: str
    api_key: Secret
    bases: dict[ApiProtocol, str]


class ActiveProvider(NamedTuple):
    """A provider that can be used now: catalogue, file and environment put together.

    Attributes:
        enabled_by: the variable that holds its key, or what else turned it on.
        rules: protocols by model, where the file says so; empty means what `bases` has.
        found: nobody named it; it listens where such servers do.
    """

    facts: Provider
    accounts: tuple[Account, ...]
    enabled_by: str
    balanced: bool = False
    models: tuple[DeclaredModel, ...] = ()
    rules: ProtocolRules = _SPEAKS_AS_KNOWN
    timeouts: Timeouts = Timeouts()
    found: bool = False


def active_providers(
    config: Config, environ: Mapping[str, str]
) -> tuple[dict[str, ActiveProvider], list[str]]:
    """Who can be used, and warnings about who cannot although it looks wanted."""
    active: dict[str, ActiveProvider] = {}
    warnings: list[str] = []
    own = {provider_id(ident): provider for ident, provider in config.providers.items()}
    for ident in (*PROVIDERS, *(ident for ident in own if ident not in PROVIDERS)):
        known = PROVIDERS.get(ident) or _unknown_provider(ident, own[ident])
        found = _activate(known, own.get(ident), config, environ, warnings)
        if found:
            active[ident] = found
    return active, warnings


def _unknown_provider(ident: str, given: ProviderConfig) -> Provider:
    """A provider that only the file knows: it speaks what the file says, or Chat Completions."""
    spoken = {p for _, protocols in given.api_protocol.rules for p in protocols}
    for model in given.models:
        spoken |= {p for _, protocols in model.api_protocol.rules for p in protocols}
    ordered = [p for p in ApiProtocol if p in spoken] or [ApiProtocol.CHAT_COMPLETIONS]
    env = (ident.upper().replace("-", "_") + "_API_KEY",)
    return Provider(ident, dict.fromkeys(ordered, given.api_base), env)


def _activate(
    known: Provider,
    given: ProviderConfig | None,
    config: Config,
    environ: Mapping[str, str],
    warnings: list[str],
) -> ActiveProvider | None:
    keys, enabled_by = _keys(known, given, environ)
    if not all(is_header_text(key.reveal()) for _, key in keys):
        warnings.append(f"{enabled_by} is ignored: it holds a character that no header may hold")
        keys = []
    override, by_base = _base_override(known, given, config, environ, warnings)
    if not keys and (known.kind == "local" or known.id not in PROVIDERS) and override:
        keys, enabled_by = [("", Secret(""))], by_base
    if not keys:
        return None
    bases = _rebased(known, override) if override else dict(known.bases)
    for protocol, base in bases.items():
        bases[protocol], missing = expand(base, environ)
        if missing:
            warnings.append(f"{known.id} is off: {enabled_by} is set, but {missing[0]} is not")
            return None
    given = given or ProviderConfig()
    own_bases = {_label(a, i): a.api_base.rstrip("/") for i, a in enumerate(given.accounts, 1)}
    accounts = tuple(
        Account(label, key, _rebased(known, own) if (own := own_bases.get(label)) else bases)
        for label, key in keys
    )
    limits = {k: v for k in _hints(SomeTimeouts) if (v := getattr(given.timeouts, k)) is not None}
    facts = known._replace(bases=bases, headers={**known.headers, **_lowered(given.extra_headers)})
    return ActiveProvider(
        facts=facts,
        accounts=accounts,
        enabled_by=enabled_by,
        balanced=given.account_strategy == "balance",
        models=given.models,
        rules=given.api_protocol,
        timeouts=replace(config.upstream.timeouts, **limits),
    )


def _lowered(headers: dict[str, str]) -> Headers:
    return {name.lower(): value for name, value in headers.items()}


def _keys(
    known: Provider, given: ProviderConfig | None, environ: Mapping[str, str]
) -> tuple[list[tuple[str, Secret]], str]:
    if given and given.accounts:
        named = [(_label(a, i), a.api_key) for i, a in enumerate(given.accounts, 1)]
        return [(label, key) for label, key in named if key], "the configuration"
    if given and given.api_key:
        return _split_keys(given.api_key.reveal()), "the configuration"
    for name in known.env:
        if keys := _split_keys(environ.get(name, "")):
            return keys, name
    return [], ""


def _label(account: AccountConfig, number: int) -> str:
    return account.label or str(number)


def _split_keys(text: str) -> list[tuple[str, Secret]]:
    """Several keys for one provider may stand in one variable, with commas between them."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) == 1:
        return [("", Secret(parts[0]))]
    return [(str(i), Secret(part)) for i, part in enumerate(parts, 1)]


def base_variables(known: Provider) -> list[str]:
    """The variables that may hold another base: OPENAI_BASE_URL; GOOGLE_ or GEMINI_BASE_URL."""
    stems = [known.id.upper().replace("-", "_")]
    stems += [name.removesuffix("_API_KEY") for name in known.env[:1] if name.endswith("_API_KEY")]
    return [f"{stem}_BASE_URL" for stem in dict.fromkeys(stems)]


def _base_override(
    known: Provider,
    given: ProviderConfig | None,
    config: Config,
    environ: Mapping[str, str],
    warnings: list[str],
) -> tuple[str, str]:
    name = next((name for name in base_variables(known) if environ.get(name)), "")
    base = environ.get(name, "").strip().rstrip("/")
    if given and given.api_base:
        name, base = f"providers.{known.id}.api_base", given.api_base.rstrip("/")
    if not base:
        return "", ""
    if wrong := base_problem(base):
        warnings.append(f"{name} is ignored: {wrong}")
        return "", ""
    url = urlsplit(base)
    port = url.port or (443 if url.scheme == "https" else 80)
    if is_loopback(url.hostname or "") and config.server.listen.endswith(f":{port}"):
        # People export ANTHROPIC_BASE_URL to point their agent here, and then start us.
        warnings.append(f"{name} is ignored: it points at this server itself")
        return "", ""
    if given and given.api_base:
        return base, "the configuration"
    return (base if url.path else base + _path_of(next(iter(known.bases.values())))), name


def _path_of(base: str) -> str:
    return urlsplit(base).path.rstrip("/")


def _rebased(known: Provider, override: str) -> dict[ApiProtocol, str]:
    """Every base of a provider moved to another host: no key may stay behind at the old one."""
    usual = _path_of(next(iter(known.bases.values())))
    url = urlsplit(override)
    moved = {}
    for protocol, base in known.bases.items():
        path = _path_of(base)
        if known.id not in PROVIDERS:  # only the file knows it: one base for all
            moved[protocol] = override
        elif path.startswith(usual):
            moved[protocol] = override + path[len(usual) :]
        else:
            moved[protocol] = f"{url.scheme}://{url.netloc}{path}"
        if protocol is ApiProtocol.MESSAGES and not re.search(r"/v\d\w*$", moved[protocol]):
            moved[protocol] += "/v1"  # Anthropic's SDKs, and so people, leave it out
    return moved


# ---------------------------------------------------------------------------------------------
# 14. routing: model id to chain of targets (pure)
# ---------------------------------------------------------------------------------------------
# One resolver, for serving, for listing and for `bitrouter route`:
#
#     name in [models]     that chain
#     echo/echo            the built-in model
#     provider:model       exactly that provider, the model verbatim
#     lab/model            the lab's own provider, then whoever else carries the model
#     gateway/rest         that gateway, the rest verbatim
#     model                whoever declares it, then as lab/model
#
# It decides on text alone, and remembers: a model id costs one look-up from its second use on.

_MAX_REMEMBERED = 4096

# Providers that make models, and how the catalogue spells the lab. The others serve other
# people's, so `groq/...` is a place and not a maker: nobody else is tried for it.
_LAB_OF = {
    "openai": "openai", "anthropic": "anthropic", "google": "google", "xai": "x-ai",
    "deepseek": "deepseek", "mistral": "mistralai", "cohere": "cohere", "zai": "z-ai",
    "perplexity": "perplexity", "moonshotai": "moonshotai", "minimax": "minimax",
    "xiaomi": "xiaomi", "alibaba": "qwen",
}  # fmt: skip

# Gateways that take any lab/model id as it is, known here or not.
_OPEN_GATEWAYS = ("openrouter", "bitrouter")
_TAKES_ANY = "takes any id"
_KIND_RANK = {"api": 0, "local": 0, "gateway": 1, "plan": 2}


@dataclass(slots=True, eq=False)
class Target:
    """One place that can serve one model: what an attempt is made at.

    Attributes:
        model: the provider's own id for it.
        base: where the protocol of the request is spoken there.
        head: header lines that go with every request to it, the key among them.
        price: per million tokens; all None if it is not known.
        key: what health is kept by.
    """

    provider: str
    account: str
    model: str
    protocol: ApiProtocol
    base: str
    secret: Secret
    headers: Headers  # the configuration's own: they go before the caller's
    timeouts: Timeouts
    price: Price
    balanced: bool = False
    head: Secret = field(default_factory=lambda: Secret(""))

    @property
    def key(self) -> tuple[str, str, str]:
        return self.provider, self.account, self.model

    @property
    def name(self) -> str:
        return f"{self.provider}:{self.account}" if self.account else self.provider


class _Candidate(NamedTuple):
    """A provider and its own id for a model, before protocol and account are chosen."""

    provider: str
    model: str
    reason: str


class Route(NamedTuple):
    """What a model id comes to.

    Attributes:
        chain: targets in order of preference.
        left_out: who else was considered, and why not.
    """

    model: str
    chain: tuple[Target, ...]
    reasons: tuple[str, ...]
    left_out: tuple[str, ...]


class Listed(NamedTuple):
    """A model that can be asked for."""

    id: str
    providers: tuple[str, ...]
    facts: Model | None
    context: int = 0
    max_output: int = 0


class Router:
    """Resolves model ids against one configuration. Replaced whole when that changes."""

    def __init__(self, config: Config, active: Mapping[str, ActiveProvider]) -> None:
        self.config = config
        self.active = dict(active)
        self._remembered: dict[tuple[str, str], Route | BitrouterError] = {}

    def resolve(self, model: str, op: Operation) -> Route:
        """Raises NotFound, KeyMissing or ProtocolUnsupported, each with what would work."""
        asked = (model, op.name)
        route = self._remembered.get(asked)
        if route is None:
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            try:
                route = self._resolve(model, op)
            except BitrouterError as error:
                route = error
            self._remembered[asked] = route
        if isinstance(route, BitrouterError):
            raise route.with_traceback(None)
        return route

    def _resolve(self, model: str, op: Operation) -> Route:
        if model == ECHO_MODEL:
            return self._echo_route(op)
        chain: list[Target] = []
        reasons, left_out = [], []
        for found in self._candidates(model):
            provider = self.active.get(found.provider)
            if provider is None:
                left_out.append(f"{found.provider}: {_why_off(found.provider)}")
                continue
            if op.protocol not in self._spoken(provider, found.model):
                left_out.append(f"{found.provider}: {_what_it_speaks(provider)}")
                continue
            targets = self._targets(provider, found.model, op.protocol)
            chain += targets
            reasons += [found.reason] * len(targets)
        if chain:
            return Route(model, tuple(chain), tuple(reasons), tuple(left_out))
        raise self._why_nobody(model, op)

    def _candidates(self, model: str) -> Iterator[_Candidate]:
        """Who may serve a model, best first, configured or not."""
        virtual = self.config.models.get(model)
        if virtual:
            for n, endpoint in enumerate(virtual.endpoints, 1):
                ident = provider_id(endpoint.provider)
                yield _Candidate(ident, self._own_id(ident, endpoint.service_id), f"endpoint {n}")
            return
        seen = set()
        for found in self._by_name(model):
            if found.provider not in seen:
                seen.add(found.provider)
                yield found

    def _by_name(self, model: str) -> Iterator[_Candidate]:
        declared = list(self._declared(model, found=False))
        yield from declared
        yield from self._known(model, declared)
        # Who only happens to listen on this machine never goes before who was meant.
        yield from self._declared(model, found=True)

    def _known(self, model: str, declared: list[_Candidate]) -> Iterator[_Candidate]:
        model = model.removeprefix("models/")
        place, separator, rest = _split_place(model)
        ident = provider_id(place)
        facts = find_model(model)
        if separator and (ident in PROVIDERS or ident in self.active):
            if separator == ":" or ident not in _LAB_OF:
                yield _Candidate(ident, self._declared_id(ident, rest), "named in the model id")
            else:
                yield from self._of_lab(ident, rest)
        elif facts:
            lab, _, bare = facts.id.partition("/")
            own = next((p for p, name in _LAB_OF.items() if name == lab), "")
            as_written = bare if separator else model
            yield from self._of_lab(own, as_written) if own else self._carriers(facts, "")
        elif separator == "/":
            yield from (_Candidate(other, model, _TAKES_ANY) for other in _OPEN_GATEWAYS)
        elif not declared and not list(self._declared(model, found=True)):
            bare = model.lower().removeprefix("ft:")  # OpenAI's fine-tuned models
            family = next((p for p, starts in FAMILIES if bare.startswith(starts)), "")
            if family:
                yield from self._of_lab(family, model)

    def _declared(self, model: str, *, found: bool) -> Iterator[_Candidate]:
        """Providers whose own list of models, in the file or found, has this very id."""
        for ident, provider in self.active.items():
            for declared in provider.models if provider.found == found else ():
                if declared.id == model:
                    own = declared.provider_model_id or declared.id
                    yield _Candidate(ident, own, "declares the model")

    def _of_lab(self, ident: str, model: str) -> Iterator[_Candidate]:
        """The lab's own provider first, then everybody else who carries the model."""
        lab = _LAB_OF[ident]
        facts = find_model(f"{lab}/{model}")
        yield _Candidate(ident, self._own_id(ident, model), "the model's own provider")
        if facts:
            yield from self._carriers(facts, ident)
        known_as = facts.id if facts else f"{lab}/{model}"
        yield from (_Candidate(other, known_as, _TAKES_ANY) for other in _OPEN_GATEWAYS)

    def _carriers(self, facts: Model, own: str) -> Iterator[_Candidate]:
        def rank(ident: str) -> tuple[int, str]:
            return _KIND_RANK[PROVIDERS[ident].kind], ident

        others = [ident for ident in facts.carried if ident in PROVIDERS and ident != own]
        for ident in sorted(others, key=rank):
            if PROVIDERS[ident].kind != "plan":
                yield _Candidate(ident, facts.carried[ident][0], "carries the model")

    def _declared_id(self, ident: str, model: str) -> str:
        """A provider's own id for a model that the file declares; any other as it is."""
        for declared in self.active[ident].models if ident in self.active else ():
            if declared.id == model:
                return declared.provider_model_id or declared.id
        return model

    def _own_id(self, ident: str, model: str) -> str:
        """A provider's own spelling of a model that the caller spelt another way."""
        declared = self._declared_id(ident, model)
        if declared != model:
            return declared
        lab = _LAB_OF.get(ident)
        facts = find_model(f"{lab}/{model}") if lab else None
        if facts and ident in facts.carried:
            own = facts.carried[ident][0]
            if normal_id(model) in (normal_id(own), normal_id(facts.id.partition("/")[2])):
                return own
        return model

    def _spoken(self, provider: ActiveProvider, model: str) -> tuple[ApiProtocol, ...]:
        for declared in provider.models:
            if model in (declared.id, declared.provider_model_id) and (
                spoken := declared.api_protocol.spoken(model)
            ):
                return spoken
        return provider.rules.spoken(model) or tuple(provider.facts.bases)

    def _targets(self, provider: ActiveProvider, model: str, protocol: ApiProtocol) -> list[Target]:
        facts = provider.facts
        price = self._price(provider, model)
        return [
            with_head(
                Target(
                    provider=facts.id,
                    account=account.label,
                    model=model,
                    protocol=protocol,
                    base=account.bases.get(protocol) or next(iter(account.bases.values())),
                    secret=account.api_key,
                    headers=dict(facts.headers),
                    timeouts=provider.timeouts,
                    price=price,
                    balanced=provider.balanced,
                ),
                facts.auth,
            )
            for account in provider.accounts
        ]

    def _price(self, provider: ActiveProvider, model: str) -> Price:
        for declared in provider.models:
            if model in (declared.id, declared.provider_model_id):
                told = declared.pricing
                if told.input is not None:
                    return Price(told.input, told.output, told.cache_read, told.cache_write)
        ident = provider.facts.id
        facts = find_model(f"{_LAB_OF[ident]}/{model}" if ident in _LAB_OF else model)
        if facts is None or ident not in facts.carried:
            return Price(0.0, 0.0, 0.0, 0.0) if provider.facts.kind == "local" else Price()
        return facts.carried[ident][1]

    def _echo_route(self, op: Operation) -> Route:
        if CODECS[op.protocol].encoder is None or not op.generates or op.suffix == "/completions":
            raise ProtocolUnsupported(
                f"{ECHO_MODEL} answers on {GENERATE_PATHS[ApiProtocol.CHAT_COMPLETIONS]} "
                f"and {GENERATE_PATHS[ApiProtocol.MESSAGES]}",
                param="model",
            )
        none, free = Secret(""), Price(0.0, 0.0, 0.0, 0.0)
        protocol, timeouts = op.protocol, self.config.upstream.timeouts
        target = Target("echo", "", "echo", protocol, "", none, {}, timeouts, free)
        return Route(ECHO_MODEL, (target,), ("built in",), ())

    # What to say when nobody can serve it.

    def _why_nobody(self, model: str, op: Operation) -> BitrouterError:
        candidates = list(self._candidates(model))
        able = [c for c in candidates if c.provider in self.active]
        if able:
            return self._unsupported(model, op, able)
        named = [c for c in candidates if c.reason != _TAKES_ANY]
        if named:
            return self._key_missing(model, named[0])
        names = {m.id for m in self.listing()} | set(catalogue())
        bare = {name.rpartition("/")[2]: name for name in names}
        near = near_misses(model, names) or [
            bare[hit] for hit in near_misses(model.rpartition("/")[2], bare)
        ]
        hint = f"did you mean {' or '.join(near)}?" if near else "GET /v1/models lists all"
        shown = printable(model)
        return NotFound(
            f"nobody here serves the model {shown!r}; {hint}", code="model_not_found", param="model"
        )

    def _unsupported(
        self, model: str, op: Operation, able: list[_Candidate]
    ) -> ProtocolUnsupported:
        ways = [
            f"POST {GENERATE_PATHS[protocol]} ({found.provider})"
            for found in able
            for protocol in self._spoken(self.active[found.provider], found.model)
        ]
        names = ", ".join(found.provider for found in able)
        return ProtocolUnsupported(
            f"{printable(model)} is served by {names}, which does not speak {op.protocol}, and "
            f"translation is not built in yet; ask for it at {' or '.join(dict.fromkeys(ways))}",
            param="model",
        )

    def _key_missing(self, model: str, first: _Candidate) -> KeyMissing:
        variable = _missing_variable(first.provider)
        others = ", ".join(self.active) or "nothing"
        return KeyMissing(
            f"{printable(model)} is served by {first.provider}, whose key is not set: set "
            f"{variable} in bitrouter's environment and restart it (configured now: {others})",
            param="model",
            extra={"provider": first.provider, "env": variable},
        )

    def listing(self) -> list[Listed]:
        """Every model that can be asked for by name, sorted."""
        listed: dict[str, Listed] = {}
        for model in catalogue().values():
            providers = tuple(ident for ident in model.carried if ident in self.active)
            plans = all(PROVIDERS[ident].kind == "plan" for ident in providers)
            if providers and not plans:
                listed[model.id] = Listed(
                    model.id, providers, model, model.context, model.max_output
                )
        for ident, provider in self.active.items():
            for declared in provider.models:
                before = listed.get(declared.id)
                also = (*(before.providers if before else ()), ident)
                listed[declared.id] = Listed(
                    declared.id, also, None, declared.context, declared.max_output
                )
        for name, virtual in self.config.models.items():
            ids = tuple(dict.fromkeys(provider_id(e.provider) for e in virtual.endpoints))
            listed[name] = Listed(name, tuple(ident for ident in ids if ident in self.active), None)
        listed[ECHO_MODEL] = Listed(ECHO_MODEL, ("echo",), None)
        return sorted((one for one in listed.values() if one.providers), key=lambda one: one.id)


def _split_place(model: str) -> tuple[str, str, str]:
    """`provider/model` or `provider:model`, at whichever comes first."""
    found = re.match(r"([^/:]+)([/:])(.+)", model, re.DOTALL)
    return (found[1], found[2], found[3]) if found else (model, "", "")


def _missing_variable(ident: str) -> str:
    known = PROVIDERS.get(ident)
    return known.env[0] if known else ident.upper().replace("-", "_") + "_API_KEY"


def _why_off(ident: str) -> str:
    known = PROVIDERS.get(ident)
    if known and known.kind == "local":
        return "not running on this machine"
    return f"{_missing_variable(ident)} is not set"


def _what_it_speaks(provider: ActiveProvider) -> str:
    return "speaks " + ", ".join(provider.facts.bases)


# What each vendor's own API takes. wire: platform.openai.com/docs/api-reference/authentication,
# docs.claude.com/en/api/overview, ai.google.dev/gemini-api/docs/api-key; read 2026-11
_NATIVE_AUTH = {
    ApiProtocol.MESSAGES: "x-api-key",
    ApiProtocol.GENERATE_CONTENT: "x-goog-api-key",
}


def with_head(target: Target, auth: str) -> Target:
    """Fill in the header lines that every request to a target has: host, key and its own."""
    headers = {"host": urlsplit(target.base).netloc, **target.headers}
    key = target.secret.reveal()
    if key:
        if auth == "native":
            auth = _NATIVE_AUTH.get(target.protocol, "bearer")
        name, value = ("authorization", f"Bearer {key}") if auth == "bearer" else (auth, key)
        headers[name] = value
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    target.head = Secret("".join(lines))
    return target


# ---------------------------------------------------------------------------------------------
# 15. health: which targets are failing, and until when to spare them (pure)
# ---------------------------------------------------------------------------------------------
# A target that fails `failures` times within `window_s`, or says itself how long to stay away,
# cools down: it moves to the end of every chain. It is not taken out: when nobody better is
# left, an answer from a doubtful target is worth more than our own refusal. After the cool-down
# one request probes it; success closes the breaker, failure opens it again.

_MAX_HEALTH = 10_000  # targets remembered; the oldest go first


class _Record:
    __slots__ = ("failed_at", "open_until", "probing_until")

    def __init__(self) -> None:
        self.failed_at: list[float] = []
        self.open_until = 0.0
        self.probing_until = 0.0


class Health:
    """Exact for this process: everything happens between two awaits."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        self._records: dict[tuple[str, str, str], _Record] = {}
        self._turns: dict[tuple[str, str], int] = {}  # whose account comes first, by model

    def order(self, chain: tuple[Target, ...], now: float) -> tuple[Target, ...]:
        """A chain as it should be tried now: turns taken, those who cool down last."""
        if len(chain) == 1:
            return chain
        if any(target.balanced for target in chain):
            chain = self._take_turns(chain)
        if not self._records:
            return chain
        waits = [self.cooling_s(target, now) for target in chain]
        return tuple(t for _, t in sorted(zip(waits, chain, strict=True), key=lambda pair: pair[0]))

    def cooling_s(self, target: Target, now: float) -> float:
        """Seconds until a target should be tried again; 0 if it may be now."""
        record = self._records.get(target.key)
        if record is None or not record.open_until:
            return 0.0
        if now >= record.open_until:  # half open: one at a time may probe
            return max(0.0, record.probing_until - now)
        return record.open_until - now

    def begin(self, target: Target, now: float, limit_s: float) -> bool:
        """An attempt starts. Returns whether it is the probe of a target that is half open."""
        record = self._records.get(target.key)
        if record and record.open_until and now >= max(record.open_until, record.probing_until):
            record.probing_until = now + limit_s
            return True
        return False

    def succeeded(self, target: Target) -> None:
        self._records.pop(target.key, None)

    def abandoned(self, target: Target) -> None:
        """The probe came to nothing that says anything about the target."""
        record = self._records.get(target.key)
        if record:
            record.probing_until = 0.0

    def failed(self, target: Target, error: UpstreamError, now: float) -> None:
        record = self._records.setdefault(target.key, _Record())
        if len(self._records) > _MAX_HEALTH:
            self._records.pop(next(iter(self._records)))
        rules = self.breaker
        recent = [at for at in record.failed_at if now - at < rules.window_s]
        record.failed_at = [*recent[-rules.failures :], now]
        was_half_open = bool(record.open_until) and now >= record.open_until
        record.probing_until = 0.0
        at_once = isinstance(error, UpstreamKeyRefused | UpstreamNoCredit)
        if at_once or was_half_open or len(record.failed_at) >= rules.failures:
            wait_s = max(rules.cooldown_s, min(error.retry_after_s or 0.0, 3600.0))
            record.open_until = max(record.open_until, now + wait_s)
        elif error.retry_after_s:
            record.open_until = max(record.open_until, now + min(error.retry_after_s, 3600.0))

    def cooling(self, now: float) -> dict[str, float]:
        """Seconds left for every target that cools down, for status pages."""
        return {
            "/".join(filter(None, key)): round(record.open_until - now, 1)
            for key, record in list(self._records.items())  # the health thread asks, too
            if record.open_until > now
        }

    def _take_turns(self, chain: tuple[Target, ...]) -> tuple[Target, ...]:
        """Rotate each provider's run of accounts, so that each comes first in its turn."""
        out: list[Target] = []
        at = 0
        while at < len(chain):
            provider, model = chain[at].provider, chain[at].model
            end = at
            while end < len(chain) and (chain[end].provider, chain[end].model) == (provider, model):
                end += 1
            run = chain[at:end]
            if run[0].balanced and len(run) > 1:
                turn = self._turns.get((provider, model), 0)
                if len(self._turns) > _MAX_HEALTH:
                    self._turns.clear()
                self._turns[provider, model] = (turn + 1) % len(run)
                run = run[turn % len(run) :] + run[: turn % len(run)]
            out += run
            at = end
        return tuple(out)


# ---------------------------------------------------------------------------------------------
# 16. echo: the built-in model (pure)
# ---------------------------------------------------------------------------------------------
# For trying things out with no key and no network. It repeats what the user said last, word by
# word; `call NAME {json}` makes it call that tool; a JSON schema makes it return the schema's
# smallest instance.

_CALL = re.compile(r"\bcall\s+([\w.-]{1,128})\s*")
_MAX_SCHEMA_NODES = 1000
_MAX_CALLS_TRIED = 8
_MAX_ECHOED_CHARS = 100_000  # word by word; what is beyond that comes in one piece


def echo_parts(prompt: Prompt) -> list[StreamPart]:
    """What the built-in model answers."""
    words = _echo_answer(prompt)
    said = sum(len(part.text) for part in words if isinstance(part, TextDelta))
    called = any(isinstance(part, ToolCall) for part in words)
    usage = Usage(input_tokens=-(-prompt.size // 4), output_tokens=max(1, -(-said // 4)))
    return [*words, Finished(Finish.TOOL_CALLS if called else Finish.STOP, usage)]


def _echo_answer(prompt: Prompt) -> list[StreamPart]:
    calls = itertools.islice(_CALL.finditer(prompt.text), _MAX_CALLS_TRIED)
    for wanted in calls:
        if wanted[1] in prompt.tools:
            with suppress(ValueError, RecursionError):
                rest = prompt.text[wanted.end() : wanted.end() + _MAX_ECHOED_CHARS] or "{}"
                value = first_json(rest if rest.startswith("{") else "{}")
                return [ToolCall("call_echo_1", wanted[1], json.dumps(value))]
    if prompt.schema is not None:
        return [TextDelta(json.dumps(smallest(prompt.schema)))]
    text = prompt.text[:_MAX_ECHOED_CHARS]
    said = text.rstrip() or "(nothing was said)"
    *words, last = re.findall(r"\s*\S+", said)
    rest = text[len(said) :] + prompt.text[_MAX_ECHOED_CHARS:]
    return [TextDelta(word) for word in (*words, last + rest)]


def smallest(schema: JsonObject) -> Json:
    """The smallest value that a JSON schema allows, as far as it can be told simply."""
    return _smallest(schema, schema, [_MAX_SCHEMA_NODES], 0)


def _smallest(schema: Json, root: JsonObject, left: list[int], depth: int) -> Json:
    """left: how many more values may be made, for schemas that double at every step."""
    left[0] -= 1
    if not isinstance(schema, dict) or depth > 32 or left[0] < 0:
        return None
    if "const" in schema or (isinstance(schema.get("enum"), list) and schema["enum"]):
        return schema["const"] if "const" in schema else schema["enum"][0]
    other = _stands_for(schema, root)
    if other is not None:
        return _smallest(other, root, left, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else None)
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        required = schema.get("required")
        wanted = required if isinstance(required, list) else []
        return {
            name: _smallest(dig(schema, "properties", name), root, left, depth + 1)
            for name in wanted
            if isinstance(name, str)
        }
    if kind == "array":
        count = min(whole(schema.get("minItems")), 16)
        return [_smallest(schema.get("items"), root, left, depth + 1) for _ in range(count)]
    return _smallest_scalar(kind, schema)


def _smallest_scalar(kind: Json, schema: JsonObject) -> Json:
    least = schema.get("minimum")
    match kind:
        case "string":
            return "x" * min(whole(schema.get("minLength")), 1000)
        case "integer":
            return -int(-least // 1) if isinstance(least, int | float) and 0 < least < 1e15 else 0
        case "number":
            return least if isinstance(least, int | float) and 0 < least < 1e15 else 0
    return False if kind == "boolean" else None


def _stands_for(schema: JsonObject, root: JsonObject) -> Json:
    """The schema that a reference or a choice leads to."""
    if isinstance(schema.get("$ref"), str):
        steps = schema["$ref"].removeprefix("#").strip("/").split("/")
        unescaped = [step.replace("~1", "/").replace("~0", "~") for step in steps if step]
        return dig(root, *unescaped) or {}
    choices = [schema[word] for word in ("anyOf", "oneOf", "allOf") if schema.get(word)]
    return dig(choices, 0, 0)


# ---------------------------------------------------------------------------------------------
# 17. logs: one line per event, for people or for machines
# ---------------------------------------------------------------------------------------------
# `logging` is the front: one logger, `%`-arguments. The line of each request takes a short cut
# past it (a LogRecord costs 8 us), to the same writer. Lines are gathered and written together:
# at once on a terminal, within a twentieth of a second elsewhere.

log = logging.getLogger("bitrouter")

_FLUSH_S = 0.05
_PLAIN = re.compile(r"[\w.:/@+\-%$~]+")


class LogWriter(logging.Handler):
    """Formats events as logfmt or JSON and writes them to a stream, gathered."""

    def __init__(self, stream: Any, *, as_json: bool) -> None:
        super().__init__()
        self._stream = stream
        self._as_json = as_json
        self._secrets: list[str] = []
        self._lines: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._delay_s = 0.0 if stream.isatty() else _FLUSH_S
        self._second = -1
        self._stamp = ""

    def attach(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Gather lines while a loop runs; without one, each is written at once."""
        self.flush()
        self._loop = loop

    def hide(self, secrets: Iterable[Secret]) -> None:
        """Never write any of these, wherever they turn up."""
        self._secrets = [s.reveal() for s in secrets if len(s.reveal()) >= 8]

    def event(self, name: str, facts: Mapping[str, Any], level: str = "info") -> None:
        """Write one line. Facts that are None are left out."""
        stamp = self._now()
        if self._as_json:
            told = _ENCODE({k: v for k, v in facts.items() if v is not None})
            comma = ", " if len(told) > 2 else ""
            line = f'{{"ts": "{stamp}", "level": "{level}", "event": "{name}"{comma}{told[1:]}'
        else:
            pairs = [f" {k}={_logfmt(v)}" for k, v in facts.items() if v is not None]
            line = f"{stamp} {level} {name}{''.join(pairs)}"
        if level != "info" or "error" in facts:
            line = self._redacted(line)
        self._put(line, urgent=level != "info")

    def emit(self, record: logging.LogRecord) -> None:
        """What comes by way of `logging`: the message is `event key=value ...` already."""
        said = record.getMessage()
        if not self._as_json:
            said = said.replace("\r", "\\r").replace("\n", "\\n")
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            said += "\n    " + trace.replace("\n", "\n    ")
        said = self._redacted(said)
        level = record.levelname.lower()
        if self._as_json:
            self._put(json.dumps({"ts": self._now(), "level": level, "event": said}), urgent=True)
        else:
            self._put(f"{self._now()} {level} {said}", urgent=True)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            with suppress(OSError, ValueError):  # nobody reads the log: no reason to stop serving
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()

    def _redacted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[redacted]")
        return text

    def _put(self, line: str, *, urgent: bool) -> None:
        self._lines.append(line)
        if self._loop is None or urgent:
            self.flush()
        elif len(self._lines) == 1:
            self._loop.call_later(self._delay_s, self.flush)

    def _now(self) -> str:
        millis = time.time_ns() // 1_000_000
        if millis // 1000 != self._second:
            self._second = millis // 1000
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self._second))
        return f"{self._stamp}.{millis % 1000:03}Z"


_ENCODE = json.JSONEncoder(default=str).encode


def _logfmt(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


# ---------------------------------------------------------------------------------------------
# 18. transport: the HTTP client: pool, TLS, proxies, deadlines
# ---------------------------------------------------------------------------------------------
# asyncio's protocols rather than its streams, on both sides, because measurement says so: with
# streams every event of an upstream wakes a task (+6 us) and every TLS connection holds a buffer
# of 256 KB (317 KB per open stream, against 55 KB with the layer below). A response goes straight
# from `data_received` into a sink; the coroutine that asked sleeps until the sink is done.
#
# Deadlines are kept by one sweep over all connections, not by a timer per read.

_READ_BYTES = 64 * 1024  # of one recv: asyncio's 256 KB page-faults on every call
_MAX_IDLE_PER_ORIGIN = 512
_MAX_DIALS_PER_ORIGIN = 64
_STALE_S = 1.0  # a pooled connection that dies later than this has had the request
_EYEBALLS_S = 0.25  # RFC 8305 recommends 250 ms between address families
NEVER = float("inf")


class Watched(Protocol):
    """Something with a deadline. `expire` must move the deadline on, or the thing away."""

    deadline: float

    def expire(self, now: float) -> None: ...


class Sweeper:
    """Looks after everyone's deadlines a few times a second.

    Attributes:
        now: the time of the last sweep: the clock for whoever can live with that.
        lag_s: how late the last sweep came: how long something held up the loop.
    """

    def __init__(self, tick_s: float = 0.5) -> None:
        self.tick_s = tick_s
        self.now = time.monotonic()
        self.lag_s = 0.0
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, thing: Watched) -> None:
        self._watched.add(thing)

    def forget(self, thing: Watched) -> None:
        self._watched.discard(thing)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time()
        self._timer = loop.call_later(self.tick_s, self._sweep, loop)

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self.lag_s = max(0.0, now - self.now - self.tick_s)
        self.now = now
        self._timer = loop.call_later(self.tick_s, self._sweep, loop)
        for thing in [thing for thing in self._watched if thing.deadline <= now]:
            try:
                thing.expire(now)
            except Exception:  # one bug must not take everybody else's deadlines along
                log.exception("deadline_failed")
                self.forget(thing)


class Origin(NamedTuple):
    host: str
    port: int
    tls: bool


class Sink(Protocol):
    """Where a response goes. After on_end or on_fail nothing more comes."""

    def on_head(self, head: ResponseHead) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_fail(self, error: UpstreamError) -> None: ...


class StaleConnection(UpstreamUnreachable):
    """A pooled connection turned out to be dead before a single byte of answer came."""


class Connection(asyncio.Protocol):
    """One connection to a provider, kept alive between exchanges.

    Attributes:
        deadline: when to give up on whatever it is waiting for.
        idle_s: seconds by which each byte received moves the deadline on,
        limit: but never beyond this.
        waiting: what it is waiting for, to say so when it does not come.
        who: the target that it serves just now, as errors name it.
    """

    def __init__(self, pool: Pool, origin: Origin, who: str) -> None:
        self.origin = origin
        self.who = who
        self.deadline = NEVER
        self.idle_s = self.limit = NEVER
        self.waiting = ""
        self.reused = False
        self.loop = asyncio.get_running_loop()  # a system call on 3.11: once, not per exchange
        self.ready: asyncio.Future[None] = self.loop.create_future()
        self._pool = pool
        self._sweeper = pool.sweeper
        self._transport: asyncio.Transport | None = None
        self._tls: _Tls | None = None
        self._tunnel = False  # waiting for a proxy to answer CONNECT
        self._sink: Sink | None = None
        self._inbox = b""
        self._decoder: BodyDecoder | None = None
        self._inflater: Inflater | None = None
        self._heard = False  # a byte of the current answer has come
        self._sent_at = 0.0
        self._keep = True
        self._paused = False

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  we dial TCP only
        self._transport = tune(transport)
        self._sweeper.watch(self)

    def data_received(self, data: bytes) -> None:
        try:
            if self._tls:
                data = self._decrypt(self._tls, data)
            if data:
                self._received(data)
        except UpstreamError as error:
            self._fail(error)
        except Exception as bug:  # whoever waits for this answer must not wait for ever
            log.exception("answer_not_understood host=%s", self.origin.host)
            self._fail(UpstreamError("bitrouter failed to read the answer", detail=repr(bug)))

    def eof_received(self) -> bool:
        return False  # the transport closes, and connection_lost sorts it out

    def connection_lost(self, exc: Exception | None) -> None:
        self._sweeper.forget(self)
        self._pool.discard(self)
        self._transport = None
        if not self.ready.done():
            said = f"{self.who} closed the connection during the handshake"
            self.ready.set_exception(UpstreamUnreachable(said, detail=repr(exc)))
            self.ready.exception()  # seen here, for when nobody waits any more
        if self._sink is None:
            return
        decoder = self._decoder
        ended = exc is None and (self._tls is None or self._tls.said_goodbye)
        if decoder and decoder.framing == UNTIL_CLOSE and ended:
            self._finish()
        elif self.reused and not self._heard and self.loop.time() - self._sent_at < _STALE_S:
            self._fail(StaleConnection(f"{self.who} had closed the connection"))
        else:
            stage = "the middle of its answer" if self._heard else "answering"
            where = "in" if self._heard else "before"
            said = f"{self.who} closed the connection {where} {stage}"
            code = "upstream_disconnected" if self._heard else ""
            self._fail(UpstreamUnreachable(said, code=code, detail=repr(exc)))

    # The pool and the attempts call these.

    def start(self, request: bytes, sink: Sink) -> None:
        """Send a request; its answer goes to the sink."""
        if not self.usable:  # it was closed between the handshake and now
            said = f"{self.who} closed the connection before answering"
            sink.on_fail(UpstreamUnreachable(said))
            return
        self._sent_at = self.loop.time()
        self._sink, self._decoder, self._inflater = sink, None, None
        self._heard = False
        self._write(request)

    def tunnel(self, request: bytes) -> None:
        """Ask a proxy for a way through; `ready` tells when there is one."""
        self._tunnel = True
        self._write(request)

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Begin the handshake; `ready` tells when it is over."""
        self._tls = _Tls(context, self.origin.host)
        self._handshake(self._tls)

    def pause(self) -> None:
        if self._transport and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport and self._paused:
            self._paused = False
            self._transport.resume_reading()

    def follow(self, slow: bool) -> None:
        """Read no faster than the caller does."""
        if slow:
            self.pause()
        else:
            self.resume()

    def detach(self) -> None:
        """Nobody wants the rest of this answer, if any: what does not end at once is cut."""
        if self._sink is not None:
            self._sink = _NOWHERE
            self.deadline = min(self.deadline, self._sweeper.now + 1.0)
            self.idle_s = NEVER
            self.resume()

    def give_up(self, sink: Sink) -> None:
        """Drop the connection, unless it has finished with this sink and serves another."""
        if self._sink is sink:
            self.abort()

    def abort(self) -> None:
        """Drop the connection now, without awaiting: safe in the middle of a cancellation."""
        self._sink = None
        if self._transport:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def expire(self, now: float) -> None:
        if self._sink is not None and self._paused:
            self.deadline = now + self.idle_s  # the caller is slow, not the provider
        elif self._sink is not None:
            self._fail(UpstreamTimeout(f"{self.who} {self.waiting}"))
        else:
            self.abort()

    # An answer, as it comes.

    def _received(self, data: bytes) -> None:
        if self._tunnel:
            self._tunnel_answer(data)
            return
        if self._sink is None:
            self.abort()  # it speaks out of turn: nothing that follows could be trusted
            return
        self._heard = True
        if self.idle_s is not NEVER:
            sweeper = self._sweeper
            self.deadline = min(self.limit, sweeper.now + sweeper.tick_s + self.idle_s)
        if self._decoder is None:
            data = self._take_head(self._inbox + data)
            if self._decoder is None:
                return
        if data or self._decoder.done:
            self._take_body(data)

    def _take_head(self, data: bytes) -> bytes:
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            self._inbox = data
            if len(data) > MAX_HEAD_BYTES:
                raise UpstreamGarbled(f"{self.who} sent a response head without end")
            return b""
        self._inbox = b""
        head = parse_response_head(data[:end])
        if head.status < 200:  # 100 Continue, 103 Early Hints
            return self._take_head(data[end:])
        self._keep = head.keep_alive
        if self.limit > self.deadline:  # an answer: now every further piece has a deadline, too
            self.waiting = f"sent nothing more for {self.idle_s:g} s"
        try:
            self._decoder = BodyDecoder(response_framing(head))
        except BadRequest as exc:
            raise UpstreamGarbled(f"{self.who}: {exc.message}") from None
        coding = head.headers.get("content-encoding", "identity")
        if coding.lower() not in ("", "identity"):
            self._inflater = Inflater(coding, _MAX_ANSWER_BYTES, UpstreamGarbled)
        sink = self._sink
        if sink:
            sink.on_head(head)
        return data[end:]

    def _take_body(self, data: bytes) -> None:
        decoder = self._decoder
        assert decoder is not None  # noqa: S101  set by _take_head
        try:
            body = decoder.feed(data)
        except BadRequest as exc:
            raise UpstreamGarbled(f"{self.who}: {exc.message}") from None
        if self._inflater and body:
            body = self._inflater.feed(body)
        if body and self._sink:
            self._sink.on_body(body)
        if decoder.done:
            self._finish()

    def _finish(self) -> None:
        """The answer is complete: back to the pool, then tell."""
        sink, self._sink = self._sink, None
        decoder, self._decoder = self._decoder, None
        if sink is None:
            return
        if self._inflater:
            try:
                self._inflater.finish()
            except UpstreamError as error:
                self.abort()
                sink.on_fail(error)
                return
        self.resume()
        self.deadline = NEVER
        unsent = self._transport.get_write_buffer_size() if self._transport else 0
        whole = decoder and decoder.framing != UNTIL_CLOSE and not decoder.rest
        if self._keep and whole and not unsent:
            self._pool.give_back(self)
        else:
            self.abort()
        try:
            sink.on_end()
        except Exception as bug:
            log.exception("answer_not_understood host=%s", self.origin.host)
            sink.on_fail(UpstreamError("bitrouter failed to read the answer", detail=repr(bug)))

    def _fail(self, error: UpstreamError) -> None:
        sink, self._sink = self._sink, None
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()
        self.abort()
        if sink:
            sink.on_fail(error)

    def _tunnel_answer(self, data: bytes) -> None:
        self._inbox += data
        end = self._inbox.find(b"\r\n\r\n") + 4
        if end >= 4:
            self._tunnel = False
            try:
                head, self._inbox = parse_response_head(self._inbox[:end]), b""
            except UpstreamGarbled as exc:
                said = "the proxy did not answer CONNECT in HTTP/1.1"
                raise UpstreamUnreachable(said, detail=exc.detail) from None
            if not 200 <= head.status < 300:
                raise UpstreamUnreachable(f"the proxy answered {head.status} to CONNECT")
            self.ready.set_result(None)
        elif len(self._inbox) > MAX_HEAD_BYTES:
            raise UpstreamGarbled("the proxy's answer to CONNECT has no end")

    # TLS, between the socket and all of the above.

    def _write(self, data: bytes) -> None:
        if self._transport is None:
            return
        if self._tls:
            import ssl

            left = memoryview(data)
            try:
                while left:  # one record of 16 KB at a time is all that a call takes
                    left = left[self._tls.object.write(left) :]
            except ssl.SSLError as exc:
                said = f"TLS with {self.origin.host} broke: {exc.reason}"
                self._fail(UpstreamUnreachable(said, code="upstream_disconnected"))
                return
            data = self._tls.outgoing.read()
        self._transport.write(data)

    def _say_goodbye(self, tls: _Tls) -> None:
        """That was their last word, and no truncation: what may come after it is not read."""
        tls.said_goodbye = True
        if self._transport:
            self._transport.close()

    def _handshake(self, tls: _Tls) -> None:
        import ssl

        try:
            tls.object.do_handshake()
            tls.done = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            said = f"TLS with {self.origin.host} failed: {exc.reason or exc}"
            if isinstance(exc, ssl.SSLCertVerificationError):
                said += f" ({exc.verify_message}); SSL_CERT_FILE names another CA bundle"
            raise UpstreamUnreachable(said) from None
        if self._transport and (pending := tls.outgoing.read()):
            self._transport.write(pending)
        if tls.done and not self.ready.done():
            self.ready.set_result(None)

    def _decrypt(self, tls: _Tls, data: bytes) -> bytes:
        import ssl

        tls.incoming.write(data)
        if not tls.done:
            self._handshake(tls)
            if not tls.done:
                return b""
        pieces = []
        try:
            while piece := tls.object.read(_READ_BYTES):
                pieces.append(piece)
            self._say_goodbye(tls)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._say_goodbye(tls)
        except ssl.SSLError as exc:
            raise UpstreamUnreachable(f"TLS with {self.origin.host} broke: {exc.reason}") from None
        if self._transport and tls.outgoing.pending:
            self._transport.write(tls.outgoing.read())  # a key update wants an answer
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _Tls:
    """A TLS session over memory: asyncio's own would allocate 256 KB for each."""

    __slots__ = ("done", "incoming", "object", "outgoing", "said_goodbye")

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        import ssl

        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self.incoming, self.outgoing, server_hostname=host)
        self.done = self.said_goodbye = False


class _Nowhere:
    def on_head(self, head: ResponseHead) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_fail(self, error: UpstreamError) -> None: ...


_NOWHERE = _Nowhere()
_MAX_ANSWER_BYTES = 1024 * 1024 * 1024  # of one unpacked answer, streamed or not


def tune(transport: asyncio.Transport) -> asyncio.Transport:
    """No Nagle (it and delayed ACKs cost 40 ms a stream), and reads of a size that fits."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(transport, "max_size"):
        transport.max_size = _READ_BYTES
    return transport


class Pool:
    """Connections to providers: lends them, and keeps the idle ones, the youngest on top."""

    def __init__(self, sweeper: Sweeper, environ: Mapping[str, str], pool_idle_s: float) -> None:
        self.sweeper = sweeper
        self._environ = environ
        self._pool_idle_s = pool_idle_s
        self._idle: dict[Origin, list[Connection]] = {}
        self._dials: dict[Origin, asyncio.Semaphore] = {}
        self._proxies = _proxies(environ)
        self._context: ssl.SSLContext | None = None

    async def lend(
        self, who: str, origin: Origin, connect_s: float, *, fresh: bool = False
    ) -> Connection:
        """An idle connection or a new one. Raises UpstreamUnreachable or UpstreamTimeout."""
        idle = self._idle.get(origin)
        while idle and not fresh:
            connection = idle.pop()
            if connection.usable:
                connection.reused = True
                connection.who = who
                connection.deadline = NEVER
                return connection
        limit = asyncio.timeout(connect_s)
        # A task of its own: there is none around us, and asyncio.timeout wants one (see Errand).
        dialling = asyncio.get_running_loop().create_task(self._dial_within(limit, who, origin))
        try:
            return await dialling
        except asyncio.CancelledError:
            dialling.add_done_callback(_drop)
            raise
        except TimeoutError:
            if not limit.expired():  # the kernel's ETIMEDOUT, not our deadline
                raise UpstreamUnreachable(f"{who} could not be reached") from None
            said = f"{who} could not be reached within {connect_s:g} s"
            raise UpstreamTimeout(said, code="upstream_connect_timeout") from None
        except (OSError, ValueError) as exc:  # ValueError: a name that no resolver takes
            said = f"{who} could not be reached: {_reason(exc)}"
            where = f"{origin.host}:{origin.port} {exc!r}"
            raise UpstreamUnreachable(said, detail=where) from None

    async def _dial_within(self, limit: asyncio.Timeout, who: str, origin: Origin) -> Connection:
        async with limit, self._dial_slot(origin):
            return await self._dial(who, origin)

    def give_back(self, connection: Connection) -> None:
        idle = self._idle.setdefault(connection.origin, [])
        if len(idle) < _MAX_IDLE_PER_ORIGIN and self._pool_idle_s > 0:
            idle.append(connection)
            connection.idle_s = connection.limit = NEVER
            connection.deadline = self.sweeper.now + self._pool_idle_s
        else:
            connection.abort()

    def discard(self, connection: Connection) -> None:
        idle = self._idle.get(connection.origin)
        if idle and connection in idle:
            idle.remove(connection)

    def close(self) -> None:
        for idle in self._idle.values():
            for connection in idle:
                connection.abort()
        self._idle.clear()

    def tls_context(self) -> ssl.SSLContext:
        """One for the process, made when first needed: the CA bundle takes 25 ms to read."""
        if self._context is None:
            import ssl

            env = self._environ
            bundle = env.get("SSL_CERT_FILE") or env.get("REQUESTS_CA_BUNDLE")
            try:
                self._context = ssl.create_default_context(cafile=bundle or None)
            except (OSError, ssl.SSLError) as exc:
                raise UpstreamUnreachable(f"the CA bundle {bundle} cannot be read: {exc}") from None
            self._context.set_alpn_protocols(["http/1.1"])
        return self._context

    def _dial_slot(self, origin: Origin) -> asyncio.Semaphore:
        return self._dials.setdefault(origin, asyncio.Semaphore(_MAX_DIALS_PER_ORIGIN))

    async def _dial(self, who: str, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        proxy = self._proxy_for(origin)
        host, port = (proxy.host, proxy.port) if proxy else (origin.host, origin.port)
        # An address has no second family to race; and a race that is cancelled may leave a socket
        # to the garbage collector (Python 3.11).
        race_s = None if _is_address(host) else _EYEBALLS_S
        _, connection = await loop.create_connection(
            lambda: Connection(self, origin, who), host, port, happy_eyeballs_delay=race_s
        )
        try:
            if proxy:
                connection.tunnel(proxy.connect(origin))
                await connection.ready
                connection.ready = loop.create_future()
            if origin.tls:
                connection.start_tls(self.tls_context())
                await connection.ready
        except BaseException:
            connection.abort()
            raise
        if not connection.ready.done():
            connection.ready.set_result(None)
        return connection

    def _proxy_for(self, origin: Origin) -> _Proxy | None:
        if not self._proxies or is_loopback(origin.host):
            return None
        if _bypassed(origin.host, self._proxies.get("no", "")):
            return None
        url = self._proxies.get("https" if origin.tls else "http") or self._proxies.get("all")
        return _read_proxy(url) if url else None


def _is_address(host: str) -> bool:
    return ":" in host or re.fullmatch(r"[0-9.]+", host) is not None


def _drop(dialled: asyncio.Task[Connection]) -> None:
    """Nobody waits for this connection any more, but it may have come about all the same."""
    if not dialled.cancelled() and dialled.exception() is None:
        dialled.result().abort()


def _reason(exc: OSError | ValueError) -> str:
    """`Connection refused`, without the numbers and addresses that the loop puts around it."""
    if isinstance(exc, socket.gaierror | ValueError):
        return "its host name is not known"
    return os.strerror(exc.errno) if exc.errno else "no address answered"


class _Proxy(NamedTuple):
    host: str
    port: int
    auth: Secret

    def connect(self, origin: Origin) -> bytes:
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        at = f"{host}:{origin.port}"
        auth = self.auth.reveal()
        line = f"Proxy-Authorization: Basic {auth}\r\n" if auth else ""
        return f"CONNECT {at} HTTP/1.1\r\nHost: {at}\r\n{line}\r\n".encode()


def _proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment's proxies by scheme; lower case wins, as in curl."""
    found = {}
    for scheme in ("http", "https", "all", "no"):
        name = f"{scheme}_proxy"
        if value := environ.get(name) or environ.get(name.upper()):
            found[scheme] = value
    return found if set(found) - {"no"} else {}


def _bypassed(host: str, no_proxy: str) -> bool:
    import ipaddress
    import urllib.request  # 40 ms: only for those behind a proxy

    # typeshed does not know this function; it has been there since Python 2.
    bypass: Callable[[str, dict[str, str]], bool] = vars(urllib.request)["proxy_bypass_environment"]
    if bypass(host, {"no": no_proxy}):
        return True
    for entry in no_proxy.split(","):
        with suppress(ValueError):  # `10.0.0.0/8`, which the standard library does not read
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip(), strict=False):
                return True
    return False


def _read_proxy(url: str) -> _Proxy:
    import base64

    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or 8080
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        shown = f"{parts.scheme}://{parts.hostname or '?'}"
        raise UpstreamUnreachable(f"the proxy {shown} is not supported: use http://HOST:PORT")
    user = ""
    if parts.username:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    auth = Secret(base64.b64encode(user.encode()).decode() if user else "")
    return _Proxy(parts.hostname, port, auth)


def fail_future(future: asyncio.Future[None], error: Exception) -> None:
    """Fail it, unless it is settled. Looked at here, for when nobody waits any more."""
    if not future.done():
        future.set_exception(error)
        future.exception()


class Collector:
    """A sink that gathers a whole answer and hands it to `use`.

    `done` gets no value once `use` has had its way; an UpstreamError if it raised one, or if the
    answer never came.
    """

    def __init__(
        self,
        done: asyncio.Future[None],
        use: Callable[[ResponseHead, bytes], None],
        limit: int = 256 * 1024 * 1024,
    ) -> None:
        self.done = done
        self._use = use
        self._limit = limit
        self._head: ResponseHead | None = None
        self._pieces: list[bytes] = []

    def on_head(self, head: ResponseHead) -> None:
        self._head = head

    def on_body(self, data: bytes) -> None:
        self._limit -= len(data)
        if self._limit < 0:
            raise UpstreamGarbled("the provider's answer is larger than we can hold")
        self._pieces.append(data)

    def on_end(self) -> None:
        if self.done.done() or self._head is None:
            return
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        try:
            self._use(self._head, body)
        except UpstreamError as error:
            self.on_fail(error)
        else:
            self.done.set_result(None)

    def on_fail(self, error: UpstreamError) -> None:
        fail_future(self.done, error)


@functools.lru_cache(maxsize=1024)
def origin_of(base: str) -> tuple[Origin, str]:
    """Where a base URL leads, and the path below which it serves."""
    url = urlsplit(base)
    tls = url.scheme == "https"
    return Origin(url.hostname or "", url.port or (443 if tls else 80), tls), url.path.rstrip("/")


# ---------------------------------------------------------------------------------------------
# 19. runtime: App: everything a request needs
# ---------------------------------------------------------------------------------------------


class App:
    """Put together once, by the command line or by a test.

    Attributes:
        router: replaced whole when local servers come and go.
        no_usage_option: providers that refuse `stream_options`; learned from their refusals.
        draining: no new requests; running ones finish.
    """

    def __init__(
        self,
        config: Config,
        environ: Mapping[str, str],
        writer: LogWriter,
        *,
        tick_s: float = 0.5,
        heartbeat_s: float = 15.0,
    ) -> None:
        """tick_s: how exact deadlines are. heartbeat_s: silence after which a stream says so."""
        self.config = config
        self.environ = environ
        self.writer = writer
        self.heartbeat_s = heartbeat_s
        active, self.warnings = active_providers(config, environ)
        writer.hide(_secrets(config, active))
        self.router = Router(config, active)
        self.health = Health(config.upstream.breaker)
        self.sweeper = Sweeper(tick_s)
        self.pool = Pool(self.sweeper, environ, config.upstream.timeouts.pool_idle_s)
        self.callers = caller_keys(config, environ)
        self.auth_required = auth_required(config)
        self.random = random.Random()  # noqa: S311  ids and jitter, not secrets
        self.started_at = time.monotonic()
        self.no_usage_option: set[str] = set()
        self.draining = False
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something in the background, keep hold of it, and report it if it fails."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def stop(self) -> None:
        """Cancel what runs in the background and close what is open."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.sweeper.stop()
        self.pool.close()

    def new_id(self) -> str:
        """96 random bits: for people to tell requests apart, not for secrets."""
        return f"{self.random.getrandbits(96):024x}"

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("background_task_failed error=%r", error, exc_info=error)


class Errand:
    """A coroutine that begins at once and goes on without a task.

    A task would begin in the loop's next turn and wake by way of it again: a fifth of what we add
    to a request. This does what `asyncio.Task(..., eager_start=True)` does from Python 3.12 on,
    and less: there is no current task in it. What needs one (asyncio.timeout) is to be spawned.
    """

    __slots__ = ("_cancelled", "_finished", "_loop", "_waiting_for", "_work", "done")

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
        self.done = False
        self._work = work
        self._loop = loop
        self._waiting_for: asyncio.Future[Any] | None = None
        self._finished: asyncio.Future[None] | None = None
        self._cancelled = False
        self._go_on()

    def cancel(self) -> None:
        """Raise CancelledError where the coroutine waits, or else at its next step."""
        self._cancelled = True
        waiting_for, self._waiting_for = self._waiting_for, None
        if waiting_for is not None:
            waiting_for.cancel()
            self._go_on()

    async def finished(self) -> None:
        """Wait until the coroutine is through."""
        if self._finished is None:
            self._finished = self._loop.create_future()
        if not self.done:
            await self._finished

    def _go_on(self, woken_by: asyncio.Future[Any] | None = None) -> None:
        if self.done or woken_by is not self._waiting_for:
            return  # a wake-up that was on its way when the errand was cancelled
        self._waiting_for = None
        try:
            if self._cancelled:
                self._cancelled = False
                step = self._work.throw(asyncio.CancelledError())
            else:
                step = self._work.send(None)
        except BaseException as end:
            self.done = True
            if self._finished and not self._finished.done():
                self._finished.set_result(None)
            if not isinstance(end, StopIteration | asyncio.CancelledError):
                raise  # a bug: the loop reports it
            return
        if step is None:  # asyncio.sleep(0)
            self._loop.call_soon(self._go_on)
            return
        # The handshake between a future and who awaits it, as asyncio.Task does it.
        step._asyncio_future_blocking = False  # noqa: SLF001
        step.add_done_callback(self._go_on)
        self._waiting_for = step
        if self._cancelled:  # while it ran
            self.cancel()


def _secrets(config: Config, active: Mapping[str, ActiveProvider]) -> Iterator[Secret]:
    """All that must not be seen in a log."""
    yield from (key.key for key in config.keys.values())
    for provider in active.values():
        yield from (account.api_key for account in provider.accounts)
        yield from (Secret(value) for value in provider.facts.headers.values())


def caller_keys(config: Config, environ: Mapping[str, str]) -> dict[bytes, str]:
    """SHA-256 of each key that callers may use -> what the log calls them."""
    keys = {name: key.key.reveal() for name, key in config.keys.items()}
    for i, text in enumerate(environ.get("BITROUTER_KEYS", "").split(","), 1):
        keys.setdefault(f"env-{i}", text.strip())
    return {hashlib.sha256(text.encode()).digest(): name for name, text in keys.items() if text}


def auth_required(config: Config) -> bool:
    """`auto` means: not on this machine's own addresses, yes on all others."""
    mode = config.server.auth
    return not is_local(config.server.listen) if mode == "auto" else mode == "required"


# ---------------------------------------------------------------------------------------------
# 20. callers: connections from callers
# ---------------------------------------------------------------------------------------------
# A connection assembles one whole request, then one coroutine serves it: the handler. While it
# runs we go on reading, for that is how we learn that the caller hung up; what a caller sends
# ahead is kept up to a bound. Every state has a deadline.

_HEAD_S = 15.0  # from the first byte of a head to its last
_BODY_S = 30.0  # between two reads of a body
_KEEP_ALIVE_S = 180.0  # between requests: longer than any client keeps a connection in its pool
_STALL_S = 120.0  # a caller that reads nothing of its answer
_LINGER_S = 1.0
_MAX_PIECES = 1024
_MAX_AHEAD_BYTES = 256 * 1024


class HttpRequest(NamedTuple):
    """One request, whole. `path` has no query and no base path."""

    head: RequestHead
    path: str
    query: str
    body: bytes

    @property
    def headers(self) -> Headers:
        return self.head.headers


class Reply:
    """The way to answer one request: whole, or begun, written and ended.

    Attributes:
        status: of the answer; 0 until it has begun.
        extra: headers for whatever answer comes.
        on_flow: called with True when the caller reads too slowly, and with False when it has
            caught up.
        heartbeat: what to send when a stream has been silent; b"" for not at all.
    """

    __slots__ = (
        "_body_wanted",
        "_chunked",
        "_connection",
        "_minor",
        "ended",
        "extra",
        "heartbeat",
        "keep_alive",
        "on_flow",
        "status",
    )  # fmt: skip

    def __init__(self, connection: CallerConnection, head: RequestHead) -> None:
        self.status = 0
        self.ended = False
        self.extra: Headers = {}
        self.on_flow: Callable[[bool], None] | None = None
        self.heartbeat = b""
        self.keep_alive = head.keep_alive
        self._connection = connection
        self._minor = head.minor
        self._body_wanted = head.method != "HEAD"
        self._chunked = False

    def send(self, status: int, body: bytes, headers: Headers = {}) -> None:  # noqa: B006
        """Answer whole."""
        sized = {"content-length": str(len(body))} if body or status != 204 else {}
        head = self._head(status, {**headers, **sized})
        self.ended = True
        self._connection.write(head + body if self._body_wanted else head)

    def begin(self, status: int, headers: Mapping[str, str], first: bytes) -> None:
        """Start an answer of unknown length, unless the headers tell it; head and first bytes
        leave together."""
        more = dict(headers)
        if "content-length" not in more:
            self._chunked = self._minor == 1
            self.keep_alive = self.keep_alive and self._chunked
            if self._chunked:
                more["transfer-encoding"] = "chunked"
        self._connection.write(self._head(status, more) + self._framed(first))

    def write(self, data: bytes) -> None:
        if data:
            self._connection.write(self._framed(data))

    def end(self, last: bytes = b"") -> None:
        self.ended = True
        self._connection.write(self._framed(last) + (b"0\r\n\r\n" if self._chunked else b""))

    def cut(self) -> None:
        """Break off: the only honest end for an answer whose length was promised."""
        self.ended = True
        self.keep_alive = False
        self._connection.abort()

    @property
    def slow(self) -> bool:
        """Whether the caller has not read what it was sent."""
        return self._connection.slow

    async def drained(self) -> None:
        """Wait until the caller has caught up."""
        await self._connection.drained()

    def _framed(self, data: bytes) -> bytes:
        if not self._chunked or not data:
            return data
        return b"%x\r\n%b\r\n" % (len(data), data)

    def _head(self, status: int, headers: Headers) -> bytes:
        self.status = status
        if self._connection.app.draining:
            self.keep_alive = False
        more = {**headers, **self.extra}
        if not self.keep_alive or self._minor == 0:
            more["connection"] = "keep-alive" if self.keep_alive else "close"
        return render_head(f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}", more)


Handler: TypeAlias = Callable[[App, HttpRequest, Reply], Awaitable[None]]


class Service(NamedTuple):
    """What is done with requests.

    Attributes:
        screen: looks at a request whose body is still to come; raises if it will be refused.
        handler: serves a request.
        refuse: answers what is no proper request.
    """

    screen: Callable[[App, HttpRequest], None]
    handler: Handler
    refuse: Callable[[App, HttpRequest | None, Reply, BitrouterError], None]


class OpenConnections:
    """The connections of a listener, and a way to wait until there are none."""

    def __init__(self) -> None:
        self._open: set[CallerConnection] = set()
        self._none = asyncio.Event()

    def add(self, connection: CallerConnection) -> None:
        self._open.add(connection)
        self._none.clear()

    def discard(self, connection: CallerConnection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._none.set()

    def __iter__(self) -> Iterator[CallerConnection]:
        return iter(tuple(self._open))

    def __len__(self) -> int:
        return len(self._open)

    async def gone(self) -> None:
        if self._open:
            await self._none.wait()


class CallerConnection(asyncio.Protocol):
    """One caller's connection, for as many requests as it likes, one at a time.

    Attributes:
        errand: what serves the current request; None between requests.
        slow: the caller has not read what it was sent.
    """

    def __init__(self, app: App, service: Service, opened: OpenConnections) -> None:
        self.app = app
        self.slow = False
        self.deadline = NEVER
        self._screen, self._handler, self._refuse = service
        self._opened = opened
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._inbox = b""
        self._head: RequestHead | None = None
        self._decoder: BodyDecoder | None = None
        self._body: list[bytes] = []
        self._joined: list[bytes] = []
        self._body_bytes = 0
        self._advancing = False
        self._deaf = False
        self.errand: Errand | None = None
        self._reply: Reply | None = None
        self._silent_since = 0.0
        self._unsent = 0  # bytes that a slow caller had not read when last looked at
        self._reading = True
        self._waiter: asyncio.Future[None] | None = None

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  we listen on TCP and unix
        self._transport = tune(transport)
        self.app.sweeper.watch(self)
        self._opened.add(self)
        self.deadline = self.app.sweeper.now + _KEEP_ALIVE_S

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._inbox = self._inbox + data if self._inbox else data
        if self.errand is None and not self.slow:
            self._advance()
        elif len(self._inbox) > _MAX_AHEAD_BYTES and self._reading and self._transport:
            self._reading = False
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        return False  # a caller that closes its half has hung up, as far as HTTP clients go

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.app.sweeper.forget(self)
        self._opened.discard(self)
        self._transport = None
        self.resume_writing()
        if self.errand:
            self.errand.cancel()

    def pause_writing(self) -> None:
        self.slow = True
        self._unsent = self._transport.get_write_buffer_size() if self._transport else 0
        self.deadline = self.app.sweeper.now + _STALL_S
        if self._reply and self._reply.on_flow:
            self._reply.on_flow(True)

    def resume_writing(self) -> None:
        self.slow = False
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)
        self.deadline = self.app.sweeper.now + self.app.heartbeat_s
        if self._reply and self._reply.on_flow:
            self._reply.on_flow(False)
        if self.errand is None:
            self._go_on()

    # Handlers call these, by way of Reply.

    def write(self, data: bytes) -> None:
        if self._transport:
            self._silent_since = self.app.sweeper.now
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    async def drained(self) -> None:
        while self.slow:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    # The server calls these.

    def close_if_idle(self) -> None:
        if self.errand is None:
            self._close()

    def expire(self, now: float) -> None:
        unsent = self._transport.get_write_buffer_size() if self._transport else 0
        if self.slow and unsent < self._unsent:  # it reads, if slowly
            self._unsent = unsent
            self.deadline = now + _STALL_S
        elif self.slow or self._deaf:
            self.abort()
        elif self.errand:
            self._beat(now)
        elif self._head or self._inbox:
            self.app.writer.event("request_timed_out", {"received": len(self._inbox)})
            what = "body" if self._head else "head"
            self._reject(RequestTimeout(f"the request's {what} did not arrive in time"))
        else:
            self._close()

    def _beat(self, now: float) -> None:
        silent_s = now - self._silent_since
        wait_s = self.app.heartbeat_s
        reply = self._reply
        if reply and reply.heartbeat and reply.status and not reply.ended and silent_s >= wait_s:
            reply.write(reply.heartbeat)
        self.deadline = now + wait_s / 2

    # A request, as it comes.

    def _advance(self) -> None:
        """Serve requests for as long as there is one, whole, and none is being served."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._ready() and self._one_request():
                pass
        except BitrouterError as error:
            self._reject(error)
        finally:
            self._advancing = False

    def _ready(self) -> bool:
        return self.errand is None and not self.slow and not self._deaf

    def _one_request(self) -> bool:
        head = self._head or self._take_head()
        if head is None or not self._take_body():
            return False
        body = self._unpacked(head, b"".join([*self._joined, *self._body]))
        self._head, self._decoder, self._body_bytes = None, None, 0
        self._joined, self._body = [], []
        self._serve(head, body)
        return True

    def _take_head(self) -> RequestHead | None:
        inbox = self._inbox
        if inbox.startswith(b"\r\n"):  # RFC 9112, 2.2: from clients that end bodies with one
            inbox = self._inbox = inbox.lstrip(b"\r\n")
        if not inbox:
            self.deadline = self.app.sweeper.now + _KEEP_ALIVE_S
            return None
        end = inbox.find(b"\r\n\r\n") + 4
        if end < 4 or end > MAX_HEAD_BYTES:
            if len(inbox) > MAX_HEAD_BYTES:
                raise HeadTooLarge(f"the request's head exceeds {MAX_HEAD_BYTES // 1024} KB")
            if re.search(rb"(?<!\r)\n", inbox):
                raise BadHttp("lines of a head end in CR LF")
            self.deadline = min(self.deadline, self.app.sweeper.now + _HEAD_S)
            return None
        self._head = head = parse_request_head(inbox[:end])
        self._inbox = inbox[end:]
        framing = request_framing(head)
        limit = self._max_body()
        if framing > limit:
            raise TooLarge(f"the body has {framing} bytes, at most {limit} are accepted")
        self._decoder = BodyDecoder(framing)
        if framing == CHUNKED or len(self._inbox) < framing:
            self._before_body(head)
        return head

    def _before_body(self, head: RequestHead) -> None:
        """A body is still to come: refuse it now, if it will be refused, or ask for it."""
        self._screen(self.app, self._request(head, b""))
        expect = head.headers.get("expect") if head.minor else None
        if expect and expect.lower() != "100-continue":
            raise BadRequest(f"expect: {printable(expect, 40)!r} is not known")
        if expect and not self._inbox and self._transport:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _request(self, head: RequestHead, body: bytes) -> HttpRequest:
        path, _, query = head.target.partition("?")
        return HttpRequest(head, path, query, body)

    def _take_body(self) -> bool:
        """Whether the body is all there."""
        decoder = self._decoder
        if decoder is None or not decoder.framing:
            return True
        piece, self._inbox = decoder.feed(self._inbox), b""
        self._body.append(piece)
        self._body_bytes += len(piece)
        if len(self._body) > _MAX_PIECES:  # sent in drops
            self._joined.append(b"".join(self._body))
            self._body.clear()
        if self._body_bytes > self._max_body():
            raise TooLarge(f"the body exceeds {self._max_body()} bytes")
        self._inbox = decoder.rest
        if not decoder.done:
            self.deadline = self.app.sweeper.now + _BODY_S
        return decoder.done

    def _unpacked(self, head: RequestHead, body: bytes) -> bytes:
        coding = head.headers.get("content-encoding", "identity").lower()
        if coding in ("identity", "") or not body:
            return body
        self._screen(self.app, self._request(head, b""))
        inflater = Inflater(coding, self._max_body(), _body_error)
        body = inflater.feed(body)
        inflater.finish()
        return body

    def _max_body(self) -> int:
        return int(self.app.config.server.max_body_mb * 1024 * 1024)

    def _serve(self, head: RequestHead, body: bytes) -> None:
        request = self._request(head, body)
        self._reply = Reply(self, head)
        self.deadline = self.app.sweeper.now + self.app.heartbeat_s
        errand = Errand(self._loop, self._run(request, self._reply))
        self.errand = None if errand.done else errand

    async def _run(self, request: HttpRequest, reply: Reply) -> None:
        try:
            await self._handler(self.app, request, reply)
        except Exception:  # whatever it is, this caller gets a 500 and others go on
            log.exception("handler_failed path=%s", printable(request.path))
            if reply.status:
                reply.cut()
            else:
                said = "something went wrong inside bitrouter; its log has the details"
                self._refuse(self.app, request, reply, BitrouterError(said))
        finally:
            self.errand = self._reply = None
        self._next(reply)

    def _next(self, reply: Reply) -> None:
        if self._transport is None:
            return
        if not reply.keep_alive or self.app.draining:
            self._close()
        elif not self.slow:
            self._go_on()

    def _go_on(self) -> None:
        """On to the next request, if there is one."""
        if self._transport is None or self._deaf:
            return
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()
        self.deadline = self.app.sweeper.now + _KEEP_ALIVE_S
        if self._inbox:
            self._advance()  # unless it is _advance that brought us here

    def _close(self) -> None:
        """No more requests; what is written still leaves, if the caller reads it."""
        self._deaf, self._inbox = True, b""
        self.deadline = self.app.sweeper.now + _STALL_S
        if self._transport:
            self._transport.close()

    def _reject(self, error: BitrouterError) -> None:
        """Answer a request that is not one, and close: what follows cannot be understood."""
        head = self._head or RequestHead("GET", "/", {}, False, 1)
        request = self._request(head, b"")
        reply = Reply(self, head._replace(keep_alive=False))
        self._inbox = b""
        self._refuse(self.app, request if self._head else None, reply, error)
        self._head = None
        self._linger()

    def _linger(self) -> None:
        """Close our half and read on for a moment: a close with bytes unread would send a reset,
        which may overtake the answer (RFC 9112, 9.6)."""
        self._deaf = True
        self.deadline = self.app.sweeper.now + _LINGER_S
        if self._transport and self._transport.can_write_eof():
            self._transport.write_eof()


def _body_error(message: str) -> BitrouterError:
    if "larger" in message:
        return TooLarge(message)
    return BadRequest(message, code="bad_content_encoding")


# ---------------------------------------------------------------------------------------------
# 21. attempts: one upstream call, and the loop of retries and fallbacks around it
# ---------------------------------------------------------------------------------------------
# For each target of the chain, in order: send; on a failure that another try may mend, wait a
# little and try the same target again, or go on to the next. Nothing reaches the caller before
# an attempt has brought something of substance; from then on there is no going back, and a
# failure is shown as one, in the way of the caller's protocol.

# Headers of the caller that travel on; credentials and hop-by-hop headers are not among them.
_FORWARDED = {
    "accept", "user-agent", "idempotency-key", "traceparent", "tracestate", "baggage",
    "originator", "session-id", "session_id", "thread-id", "conversation_id", "version",
    "http-referer", "x-title", "x-app", "x-server-timeout", "x-interaction-id",
}  # fmt: skip
_FORWARDED_PREFIXES = (
    "anthropic-", "openai-", "x-stainless-", "x-goog-", "x-codex-", "x-session-",
    "x-client-request-", "x-openai-", "x-anthropic-", "x-claude-", "x-gemini-", "x-ds-",
)  # fmt: skip
_CREDENTIAL = re.compile(r"api-?key|key$|token$|secret$|authorization")  # among those by prefix

# Headers of the provider that travel back.
_RETURNED = {"content-type", "request-id", "x-request-id", "content-disposition", "server-timing"}
_RETURNED_PREFIXES = ("openai-", "anthropic-", "x-ratelimit-", "x-goog-", "x-groq-", "cf-ray")

_ANTHROPIC_VERSION = "2023-06-01"  # the one that accepts all fields; a caller's own goes first
JSON_HEADERS = {"content-type": "application/json"}
_MAX_ERROR_BYTES = 1024 * 1024


class _Attempt(NamedTuple):
    """What one call to one target came to."""

    target: Target
    error: UpstreamError


@dataclass(slots=True, eq=False)
class Call:
    """One request to a model, from its arrival to its log line.

    Attributes:
        document: the body, if it is JSON; `body` otherwise.
        form_type: the content type of a body that is not JSON.
        hide_usage: the caller does not want the usage chunk that we do.
        asked_for_usage: and in this attempt we asked for it.
        as_array: the caller reads Google's JSON array instead of events.
        failed: attempts that came to nothing.
        target: who is being asked, or who answered.
        broke: the answer had begun when this went wrong.
    """

    id: str
    op: Operation
    model: str
    headers: Headers
    started_at: float
    document: Document | None = None
    body: bytes = b""
    form_type: str = ""
    query: str = ""
    stream: bool = False
    as_array: bool = False
    hide_usage: bool = False
    asked_for_usage: bool = False
    failed: list[_Attempt] = field(default_factory=list)
    target: Target | None = None
    attempts: int = 0
    first_at: float | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    broke: BitrouterError | None = None

    @property
    def codec(self) -> Codec:
        return CODECS[self.op.protocol]

    def book(self, usage: Usage | None) -> None:
        """Note what was used, and what it cost if that is known."""
        self.usage = usage
        if usage is not None and self.target is not None:
            cost = cost_nanousd(usage, self.target.price)
            self.cost_usd = None if cost is None else cost / 1e9


async def attempt_chain(app: App, call: Call, reply: Reply, chain: tuple[Target, ...]) -> None:
    """Answer from the first target that can. Raises UpstreamError when none did."""
    for target in app.health.order(chain, time.monotonic()):
        retries = 0
        while True:
            error = await _attempt(app, call, reply, target)
            if error is None:
                return
            pause_s = _pause_s(app, error, retries) if error.retryable else None
            then = "retry" if pause_s is not None else "next" if error.retryable else "give_up"
            _note_failure(app, call, error, then)
            if not error.retryable:
                raise error
            if pause_s is None:
                break
            retries += 1
            await asyncio.sleep(pause_s)
    raise _sum_up(call)


async def _attempt(app: App, call: Call, reply: Reply, target: Target) -> UpstreamError | None:
    """Try one target once. The caller has its answer, or nothing at all and we have an error."""
    call.target = target
    call.attempts += 1
    if target.provider == "echo":
        await _echo(app, call, reply)
        return None
    probes = call.op.generates and app.health.begin(
        target, time.monotonic(), target.timeouts.total_s
    )
    try:
        await _exchange(app, call, reply, target)
    except UpstreamError as error:
        if call.op.generates and _is_the_targets_fault(error):
            app.health.failed(target, error, time.monotonic())
        elif probes:
            app.health.abandoned(target)
        if _refuses_usage_option(app, call, target, error):
            return await _attempt(app, call, reply, target)
        return error
    except BaseException:
        if probes:
            app.health.abandoned(target)
        raise
    if call.op.generates:
        if call.broke is None:
            app.health.succeeded(target)
        elif isinstance(call.broke, UpstreamError) and _is_the_targets_fault(call.broke):
            app.health.failed(target, call.broke, time.monotonic())
    return None


def _is_the_targets_fault(error: UpstreamError) -> bool:
    return error.retryable and not isinstance(error, UpstreamUnfit)


def _refuses_usage_option(app: App, call: Call, target: Target, error: UpstreamError) -> bool:
    """Whether a refusal is about the one thing that we added; it is not added again then."""
    ours = call.asked_for_usage and isinstance(error, UpstreamRejected)
    if not ours or "stream_options" not in error.message:
        return False
    app.no_usage_option.add(target.provider)
    return True


def _note_failure(app: App, call: Call, error: UpstreamError, then: str) -> None:
    target = call.target
    assert target is not None  # noqa: S101  an attempt has one
    call.failed.append(_Attempt(target, error))
    facts = {
        "id": call.id,
        "attempt": call.attempts,
        "target": f"{target.name}/{printable(target.model)}",
        "status": error.status,
        "code": error.code,
        "then": then,
        "reason": printable(error.message, 500),
        "detail": printable(error.detail, 500) or None,
    }
    app.writer.event("attempt_failed", facts, level="warning")


def _pause_s(app: App, error: UpstreamError, retries: int) -> float | None:
    """How long to wait before the same target is tried again; None if it is not."""
    rules = app.config.upstream.retry
    if retries >= rules.max:
        return None
    jitter_s = app.random.uniform(0, min(rules.max_ms, rules.base_ms * 2**retries)) / 1000
    if isinstance(error, UpstreamUnreachable) and error.code == UpstreamUnreachable.code:
        return jitter_s  # not a byte came back: as good as never sent
    if error.status in (429, 503) and error.retry_after_s is not None and error.retryable:
        short = error.retry_after_s * 1000 <= rules.max_ms
        return error.retry_after_s + min(jitter_s, 0.1 * error.retry_after_s) if short else None
    return None


def _sum_up(call: Call) -> UpstreamError:
    """One error for a chain of failures, with the status that fits them all."""
    errors = [attempt.error for attempt in call.failed]
    if len(errors) == 1 or isinstance(errors[-1], UpstreamUnfit):
        return errors[-1]
    named = "; ".join(_counted([error.message for error in errors]))
    waits = [e.retry_after_s for e in errors if e.retry_after_s is not None]
    statuses = {error.status for error in errors}
    status, kind = (statuses.pop(), errors[-1].kind) if len(statuses) == 1 else (0, None)
    if len({type(error) for error in errors}) == 1 and isinstance(errors[0], UpstreamNoCredit):
        kind = Kind.BILLING
    all_limited = all(error.status == 429 for error in errors)
    return AllAttemptsFailed(
        f"all {len(errors)} attempts failed: {named}",
        status=status,
        kind=kind or Kind.BAD_GATEWAY,
        code=errors[-1].code if status else "",
        retry_after_s=min(waits) if waits and (all_limited or len(waits) == len(errors)) else None,
    )


def _counted(messages: list[str]) -> list[str]:
    counts = {message: messages.count(message) for message in messages}
    return [said if n == 1 else f"{said} ({n} times)" for said, n in counts.items()]


# One exchange with a provider.


async def _exchange(app: App, call: Call, reply: Reply, target: Target) -> None:
    origin, path = origin_of(target.base)
    request = _build_request(app, call, target, path)
    try:
        await _send(app, call, reply, target, origin, request)
    except StaleConnection:  # no byte had come back, so nobody has seen the request
        await _send(app, call, reply, target, origin, request, fresh=True)


async def _send(
    app: App,
    call: Call,
    reply: Reply,
    target: Target,
    origin: Origin,
    request: bytes,
    *,
    fresh: bool = False,
) -> None:
    """Send a request, and wait until its sink has had all of the answer."""
    connection = await app.pool.lend(target.name, origin, target.timeouts.connect_s, fresh=fresh)
    sink = _sink_for(call, reply, target, connection)
    _set_deadlines(connection, call, target.timeouts)
    try:
        connection.start(request, sink)
        await sink.done
    except UpstreamError:
        raise  # the connection has taken care of itself
    except BaseException:
        connection.give_up(sink)
        if isinstance(sink, _StreamSink):
            sink.book()  # what was used up to here has its price
        raise


def _set_deadlines(connection: Connection, call: Call, timeouts: Timeouts) -> None:
    now = time.monotonic()
    if call.stream:
        connection.waiting = f"sent no first token within {timeouts.first_token_s:g} s"
        connection.deadline = connection.limit = now + timeouts.first_token_s
    else:
        connection.waiting = f"sent no answer within {timeouts.total_s:g} s"
        connection.deadline = connection.limit = now + timeouts.total_s
    connection.idle_s = timeouts.idle_s


def _sink_for(
    call: Call, reply: Reply, target: Target, connection: Connection
) -> Collector | _StreamSink | _RawSink:
    if call.op.raw:
        return _RawSink(call, reply, target, connection)
    if call.stream:
        return _StreamSink(call, reply, target, connection)
    done = connection.loop.create_future()
    return Collector(done, functools.partial(_answer, call, reply, target))


def _build_request(app: App, call: Call, target: Target, path: str) -> bytes:
    """A request as it goes to a target: the caller's bytes, but for model, key and usage."""
    body, content_type = _body_for(app, call, target)
    suffix = call.op.suffix
    if "{model}" in suffix:
        suffix = suffix.replace("{model}", quote(target.model, safe="/-._~:@"))
    query = f"?{call.query}" if call.query else ""
    lines = [f"POST {path}{suffix}{query} HTTP/1.1\r\n", target.head.reveal()]
    for name, value in call.headers.items():
        by_prefix = name.startswith(_FORWARDED_PREFIXES) and not _CREDENTIAL.search(name)
        if (by_prefix or name in _FORWARDED) and name not in target.headers:
            lines.append(f"{name}: {value}\r\n")
    given = "anthropic-version" in call.headers or "anthropic-version" in target.headers
    if call.op.protocol is ApiProtocol.MESSAGES and not given:
        lines.append(f"anthropic-version: {_ANTHROPIC_VERSION}\r\n")
    lines.append(
        f"content-type: {content_type}\r\naccept-encoding: identity\r\n"
        f"x-bitrouter-request-id: {call.id}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return "".join(lines).encode("latin-1", "replace") + body


def _body_for(app: App, call: Call, target: Target) -> tuple[bytes, str]:
    document = call.document
    if document is None:
        body, _ = set_form_field(call.body, call.form_type, "model", target.model)
        return body, call.form_type
    document.forget_edits()
    named = document.value.get("model")
    wanted = target.model
    if call.op.protocol is ApiProtocol.GENERATE_CONTENT:
        wanted = f"models/{target.model}"  # wire: as embedContent spells it; the path has it bare
    if named is not None and named != wanted:
        document.set("model", wanted)
    call.asked_for_usage = call.hide_usage and target.provider not in app.no_usage_option
    if call.asked_for_usage:
        document.set_in("stream_options", "include_usage", True)
    return document.encoded(), "application/json"


def set_form_field(
    body: bytes, content_type: str, name: str, value: str = ""
) -> tuple[bytes, str | None]:
    """A multipart body with one field's text replaced, and what the text was (None: no field).

    Only the field's own bytes change. RFC 7578.
    """
    boundary = re.search(r'(?:^|;)\s*boundary="?([^";,\s]{1,70})"?', content_type)
    if boundary is None:
        return body, None
    mark = b"--" + boundary[1].encode("latin-1")
    disposition = re.compile(
        rb'(?i)\r\ncontent-disposition:[^\r\n]*[; ]name="?' + name.encode() + rb'"?(?=[;\r])'
    )
    at = body.find(mark)
    while at >= 0:
        head_end = body.find(b"\r\n\r\n", at)
        end = body.find(b"\r\n" + mark, at)
        if head_end < 0 or end < head_end:
            return body, None
        if disposition.search(body, at, head_end + 2):
            found = body[head_end + 4 : end].decode("utf-8", "replace")
            if disposition.search(body, end):
                raise BadRequest(f"{name}: this field is given twice", param=name)
            return body[: head_end + 4] + value.encode() + body[end:], found
        at = end + 2
    return body, None


# Answers, whole.


def _answer(call: Call, reply: Reply, target: Target, head: ResponseHead, body: bytes) -> None:
    """Pass a whole answer on, or raise what is wrong with it."""
    if not 200 <= head.status < 300:
        raise _refusal(call, target, head, body)
    value = _read_answer(call, target, body)
    call.book(call.codec.usage(value))
    headers = _answer_headers(call, target, head)
    if call.cost_usd is not None:
        headers["x-bitrouter-cost-usd"] = f"{call.cost_usd:.9f}"
    call.first_at = time.monotonic()
    reply.send(head.status, body, headers)


def _read_answer(call: Call, target: Target, body: bytes) -> JsonObject:
    if len(body) > _MAX_ERROR_BYTES and not call.op.generates:
        return _usage_at_end(body)  # embeddings: megabytes of numbers that are nobody's business
    try:
        value = parse_json(body)
    except (ValueError, RecursionError):
        shown = printable(body[:200].decode("utf-8", "replace"))
        said = f"{target.name} answered 200 with what is not JSON"
        raise UpstreamGarbled(said, detail=shown) from None
    if not isinstance(value, dict):
        raise UpstreamGarbled(f"{target.name} answered 200 with JSON that is not an object")
    facts = call.codec.parse_error(value) if value.get("error") else None
    if facts:
        raise _told_in_band(target, facts)
    missing = call.codec.what_is_missing(value) if call.op.generates else ""
    if missing:
        raise UpstreamGarbled(f"{target.name} answered 200 without {missing}")
    return value


def _told_in_band(target: Target, facts: ErrorFacts) -> UpstreamError:
    """What an error inside a 200 means."""
    said = target.secret.redact(facts.message)
    return judge(target.name, facts.status or 502, facts._replace(message=said))


def _usage_at_end(body: bytes) -> JsonObject:
    at = body.rfind(b'"usage"')
    with suppress(ValueError):
        text = body[at:].decode("utf-8", "replace")
        return {"usage": first_json(text[text.index("{") :])} if at >= 0 else {}
    return {}


def _refusal(call: Call, target: Target, head: ResponseHead, body: bytes) -> UpstreamError:
    body = _without_key(target, body)
    wall_s = time.time_ns() / 1e9
    protocol = call.op.protocol
    return upstream_error(target.name, head.status, head.headers, body, protocol, wall_s)


def _without_key(target: Target, body: bytes) -> bytes:
    # Latin-1 takes any bytes there and back, and a key is ASCII.
    return target.secret.redact(body.decode("latin-1")).encode("latin-1")


def _answer_headers(call: Call, target: Target, head: ResponseHead) -> Headers:
    """The provider's headers that concern the caller, and ours that say who served it."""
    headers = returned_headers(head.headers)
    headers.setdefault("content-type", "application/json")
    return headers | served_by(call, target)


def returned_headers(headers: Headers) -> Headers:
    """Those of a provider's headers that concern the caller."""
    return {
        name: value
        for name, value in headers.items()
        if name in _RETURNED or name.startswith(_RETURNED_PREFIXES)
    }


def served_by(call: Call, target: Target) -> Headers:
    return {
        "x-bitrouter-provider": target.provider,
        "x-bitrouter-model": printable(target.model),
        "x-bitrouter-attempts": str(call.attempts),
    }


# Answers, streamed.


class _StreamSink:
    """A sink that relays a stream of events to the caller, once it has substance.

    `done` gets no value when the caller has all it will get, also if that ends in an error; it
    gets an UpstreamError if the caller has nothing yet.
    """

    def __init__(self, call: Call, reply: Reply, target: Target, connection: Connection) -> None:
        self.done: asyncio.Future[None] = connection.loop.create_future()
        self._call = call
        self._reply = reply
        self._target = target
        self._connection = connection
        self._codec = call.codec
        hide = call.asked_for_usage
        self._relay = StreamRelay(call.codec, hide_usage=hide, as_array=call.as_array)
        self._head: ResponseHead | None = None
        self._refused: list[bytes] | None = None  # the body of a response that is no stream
        self._refused_bytes = 0
        self._open = False

    def on_head(self, head: ResponseHead) -> None:
        self._head = head
        is_json = head.headers.get("content-type", "").startswith(("application/json", "text/html"))
        if head.status != 200 or is_json:
            self._refused = []

    def on_body(self, data: bytes) -> None:
        if self.done.done():
            return
        if self._refused is not None:
            self._refused_bytes += len(data)
            if self._refused_bytes <= _MAX_ERROR_BYTES:
                self._refused.append(data)
            return
        self._pass_on(self._relay.feed(data))
        if self._relay.over:
            self._end_early()

    def _pass_on(self, out: bytes) -> None:
        if self._relay.state.error:  # the provider's own words, and it may have put our key in them
            out = _without_key(self._target, out)
        if self._open:
            self._reply.write(out)
        elif self._relay.open:
            self._begin(out)

    def _end_early(self) -> None:
        """The provider has said its last word, or one that is not the protocol's."""
        told, garbled = self._relay.state.error, self._relay.garbled
        if garbled:
            self._fail(garbled)
        elif not told:
            self._finish(None) if self._open else self._fail(self._nothing_came())
        elif self._open:  # the caller has had the provider's own words already
            self._finish(_told_in_band(self._target, told))
        else:
            self._fail(_told_in_band(self._target, told))

    def on_end(self) -> None:
        if self.done.done() or self._head is None:
            return
        if self._refused is not None:
            fail_future(self.done, self._what_was_refused(self._head, b"".join(self._refused)))
            return
        self._pass_on(self._relay.finish())
        if self._relay.over:
            self._end_early()
        elif not self._open:
            self._fail(self._nothing_came())
        elif self._relay.state.finished:
            self._finish(None)
        else:
            said = f"{self._target.name} closed the stream before it was finished"
            self._fail(UpstreamGarbled(said, code="upstream_disconnected"))

    def book(self) -> None:
        """Note what has been used so far, when the caller has gone."""
        self._relay.settle()
        self._call.book(self._relay.state.usage)

    def on_fail(self, error: UpstreamError) -> None:
        if self._open and self._relay.state.finished:
            self.on_end()  # the model had said all; how the connection ended is no matter
        else:
            self._fail(error)

    def _nothing_came(self) -> UpstreamError:
        said = f"{self._target.name} ended the stream before its first token"
        return UpstreamGarbled(said, code="upstream_empty_stream")

    def _begin(self, out: bytes) -> None:
        """The first bytes: from here on this target's answer is the answer."""
        assert self._head is not None  # noqa: S101  a body comes after its head
        call, reply = self._call, self._reply
        call.first_at = time.monotonic()
        headers = _answer_headers(call, self._target, self._head)
        headers["content-type"] = "text/event-stream; charset=utf-8"
        headers["cache-control"] = "no-cache"
        if call.as_array:
            headers["content-type"] = "application/json; charset=utf-8"
        reply.heartbeat = self._codec.heartbeat
        reply.on_flow = self._connection.follow
        self._open = True
        timeouts = self._target.timeouts
        self._connection.waiting = f"sent nothing for {timeouts.idle_s:g} s"
        self._connection.limit = NEVER
        self._connection.deadline = call.first_at + timeouts.idle_s
        reply.begin(200, headers, out)

    def _fail(self, error: UpstreamError) -> None:
        if self.done.done():
            return
        if self._open:
            self._reply.write(self._relay.fail(error))
            self._finish(error)
        else:
            self._connection.detach()
            fail_future(self.done, error)

    def _finish(self, error: UpstreamError | None) -> None:
        self._reply.on_flow = None
        self._call.book(self._relay.state.usage)
        self._call.broke = error
        self._reply.end()
        self._connection.detach()
        self.done.set_result(None)

    def _what_was_refused(self, head: ResponseHead, body: bytes) -> UpstreamError:
        if head.status != 200:
            return _refusal(self._call, self._target, head, body)
        try:
            _read_answer(self._call, self._target, body)
        except UpstreamError as error:
            return error
        said = f"{self._target.name} answered a request for a stream with a whole answer"
        return UpstreamGarbled(said)


class _RawSink:
    """A sink that passes whatever comes to the caller, if the provider said yes."""

    def __init__(self, call: Call, reply: Reply, target: Target, connection: Connection) -> None:
        self.done: asyncio.Future[None] = connection.loop.create_future()
        self._call = call
        self._reply = reply
        self._target = target
        self._connection = connection
        self._head: ResponseHead | None = None
        self._refused: list[bytes] | None = None
        self._refused_bytes = 0

    def on_head(self, head: ResponseHead) -> None:
        self._head = head
        if not 200 <= head.status < 300:
            self._refused = []
            return
        headers = _answer_headers(self._call, self._target, head)
        length = head.headers.get("content-length")
        if length and "content-encoding" not in head.headers:
            headers["content-length"] = length
        self._call.first_at = time.monotonic()
        self._reply.on_flow = self._connection.follow
        self._reply.begin(head.status, headers, b"")

    def on_body(self, data: bytes) -> None:
        if self._refused is None:
            self._reply.write(data)
            if self._reply.slow:
                self._connection.pause()
            return
        self._refused_bytes += len(data)
        if self._refused_bytes <= _MAX_ERROR_BYTES:
            self._refused.append(data)

    def on_end(self) -> None:
        if self._head and self._refused is not None:
            body = b"".join(self._refused)
            fail_future(self.done, _refusal(self._call, self._target, self._head, body))
        elif not self.done.done():
            self._reply.on_flow = None
            self._reply.end()
            self.done.set_result(None)

    def on_fail(self, error: UpstreamError) -> None:
        if self._reply.status and not self.done.done():
            self._reply.on_flow = None
            self._call.broke = error
            self.done.set_result(None)
            self._reply.cut()
        else:
            fail_future(self.done, error)


async def _echo(app: App, call: Call, reply: Reply) -> None:
    """The built-in model's turn."""
    codec, target = call.codec, call.target
    # The route to echo leads here only with JSON, and only in a protocol that has all of these.
    if not (call.document and target and codec.parse_request and codec.encoder):
        raise ProtocolUnsupported(f"{ECHO_MODEL} takes a JSON body")
    prompt = codec.parse_request(call.document.value)
    parts = echo_parts(prompt)
    label = AnswerLabel(app.new_id(), int(time.time_ns() // 1_000_000_000))
    last = parts[-1]
    call.book(last.usage if isinstance(last, Finished) else None)
    call.first_at = time.monotonic()
    headers = served_by(call, target)
    if not prompt.stream:
        answer = compact(
            codec.render_response(prompt, label, parts) if codec.render_response else {}
        )
        reply.send(200, answer, {**JSON_HEADERS, **headers, "x-bitrouter-cost-usd": "0"})
        return
    encoder = codec.encoder(prompt, label)
    headers |= {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
    reply.begin(200, headers, encoder.encode(parts[0]))
    for part in parts[1:]:
        await reply.drained()
        reply.write(encoder.encode(part))
    reply.end()


# ---------------------------------------------------------------------------------------------
# 22. pipeline: one request's life; the handlers
# ---------------------------------------------------------------------------------------------
# Every handler has the same shape: (app, request, reply). They raise; `handle` turns what they
# raise into the error object of the protocol that the path belongs to.

_MAX_MODEL_CHARS = 512
_TOO_LONG_A_WAIT_S = 60.0
_SLOW_LOOP_S = 5.0


async def handle(app: App, request: HttpRequest, reply: Reply) -> None:
    """Serve one request, whatever it asks for, and write its line in the log."""
    started_at = time.monotonic()
    request_id = _request_id(app, request)
    reply.extra["x-bitrouter-request-id"] = request_id
    call: Call | None = None
    caller, error = "", None
    try:
        reply.extra |= _check_origin(app, request)
        if _is_preflight(request, reply):
            reply.send(204, b"", _PREFLIGHT)
            return
        asked, caller = _admit(app, request)
        if asked.page:
            await asked.page(app, request, reply)
        elif asked.op:
            call = _read_call(request, asked.op, asked.model, request_id, started_at)
            route = app.router.resolve(call.model, call.op)
            await attempt_chain(app, call, reply, route.chain)
            error = call.broke
    except BitrouterError as exc:
        error = exc
        refuse(app, request, reply, exc, call)
    except asyncio.CancelledError:
        error = CallerGone("the caller hung up")
        raise
    finally:
        line = _line(request, reply, call, error)
        app.writer.event("request", {"id": request_id, "caller": caller or None, **line})


class Path(NamedTuple):
    """A request's path, understood.

    Attributes:
        below: what is left after the base path and any number of /v1 and /v1beta.
        google: a /v1beta was among them, or the caller says that it speaks Google.
    """

    below: str
    google: bool
    protocol: ApiProtocol


def _read_path(app: App, request: HttpRequest | None) -> Path:
    """Which protocol a path belongs to, also when there is nothing at it.

    wire: clients add what their base URL has already, and leave out what it lacks:
    /v1/v1/messages, /v1beta/v1/models, /chat/completions (SDKs of 2026-11).
    """
    if request is None:
        return Path("/", False, ApiProtocol.CHAT_COMPLETIONS)
    google, anthropic = _is_google_caller(request), "anthropic-version" in request.headers
    look_up = _path_for if len(request.path) < 1024 else _path_for.__wrapped__
    return look_up(app.config.server.base_path, request.path, google, anthropic)


@functools.lru_cache(maxsize=1024)
def _path_for(base_path: str, path: str, google: bool, anthropic: bool) -> Path:
    beta, below = _below(base_path, path)
    google = beta or google
    if below.rpartition(":")[2] in GEMINI_VERBS or (google and below not in OPERATIONS):
        return Path(below, True, ApiProtocol.GENERATE_CONTENT)
    if below.startswith("/messages") or anthropic:
        return Path(below, False, ApiProtocol.MESSAGES)
    if below.startswith("/responses"):
        return Path(below, False, ApiProtocol.RESPONSES)
    return Path(below, False, ApiProtocol.CHAT_COMPLETIONS)


def _below(base_path: str, path: str) -> tuple[bool, str]:
    """Whether a path goes through /v1beta, and what is left of it below that or /v1."""
    path = path[len(base_path) :] if base_path and path.startswith(base_path + "/") else path
    found = re.match(r"(?:/openai(?=/v1/))?(?:/v1beta(?=/|$)|/v1(?=/|$))*", path)
    prefix = found[0] if found else ""
    return "/v1beta" in prefix, path[len(prefix) :] or "/"


def _is_google_caller(request: HttpRequest) -> bool:
    headers, query = request.headers, request.query
    by_query = query.startswith("key=") or "&key=" in query
    return "x-goog-api-key" in headers or "x-goog-api-client" in headers or by_query


_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST",
    "access-control-allow-headers": "*, authorization",
    "access-control-max-age": "600",
}


def _is_preflight(request: HttpRequest, reply: Reply) -> bool:
    return (
        request.head.method == "OPTIONS"
        and "access-control-request-method" in request.headers
        and "access-control-allow-origin" in reply.extra
    )


def refuse(
    app: App,
    request: HttpRequest | None,
    reply: Reply,
    error: BitrouterError,
    call: Call | None = None,
) -> None:
    """Answer with an error, in the protocol of the path that was asked for."""
    if reply.status:
        reply.cut()  # the answer had begun: nothing more can be said in it
        return
    codec = CODECS[_read_path(app, request).protocol]
    headers = {**JSON_HEADERS, **_retry_headers(error)}
    if isinstance(error, UpstreamError) and call and call.target:
        headers = returned_headers(error.headers) | served_by(call, call.target) | headers
        if error.body:
            # One provider, one answer: the caller gets its very bytes, in its very status.
            reply.send(error.status, error.body, headers)
            return
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = str(error.extra.get("allow", ""))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = 'Bearer realm="bitrouter"'
    reply.send(codec.render_status(error), compact(codec.render_error(error)), headers)


def _refuse_unread(
    app: App, request: HttpRequest | None, reply: Reply, error: BitrouterError
) -> None:
    """Answer what was no proper request, and write its line."""
    request_id = app.new_id()
    reply.extra["x-bitrouter-request-id"] = request_id
    refuse(app, request, reply, error)
    app.writer.event("request", {"id": request_id, "status": reply.status, "code": error.code})


def _retry_headers(error: BitrouterError) -> Headers:
    headers: Headers = {}
    wait_s = error.retry_after_s
    if wait_s is not None:
        headers["retry-after"] = str(max(1, -int(-wait_s // 1)))
        headers["retry-after-ms"] = str(max(0, round(wait_s * 1000)))
    # Anthropic's SDK would sleep for as long as it is told, OpenAI's would try in vain.
    per_day = error.code == "daily_quota_exceeded"
    no_credit = isinstance(error, UpstreamError) and error.kind is Kind.BILLING
    if no_credit or per_day or (wait_s or 0) > _TOO_LONG_A_WAIT_S:
        headers["x-should-retry"] = "false"
    return headers


def _line(
    request: HttpRequest, reply: Reply, call: Call | None, error: BitrouterError | None
) -> JsonObject:
    """What the log says about a request."""
    facts: JsonObject = {
        "method": request.head.method,
        "path": printable(request.path),
        "status": error.status if isinstance(error, CallerGone) else reply.status,
    }
    if call:
        facts |= _call_facts(call)
    if isinstance(error, BadRequest):  # its message may quote the prompt
        facts |= {"code": error.code, "param": error.param}
    elif error:
        facts |= {"code": error.code, "error": printable(error.message, 500)}
        facts["detail"] = printable(error.detail, 500) or None
    return facts


def _call_facts(call: Call) -> dict[str, Any]:
    target, usage = call.target, call.usage
    facts: dict[str, Any] = {"model": printable(call.model), "stream": call.stream}
    if target:
        facts |= {"target": f"{target.name}/{printable(target.model)}", "attempts": call.attempts}
    if call.first_at is not None:
        facts["ttft_ms"] = round((call.first_at - call.started_at) * 1000, 1)
    if usage:
        facts |= {"in": usage.input_tokens, "out": usage.output_tokens}
        facts["cached"] = usage.cached_tokens
        facts["cost_usd"] = call.cost_usd
    facts["warnings"] = "usage_unknown" if _usage_is_missing(call) else None
    facts["duration_ms"] = round((time.monotonic() - call.started_at) * 1000, 1)
    return facts


def _usage_is_missing(call: Call) -> bool:
    return call.usage is None and call.first_at is not None and call.op.generates


# The door.


def screen(app: App, request: HttpRequest) -> None:
    """Raise now what would refuse the request after its body had come in vain."""
    _check_origin(app, request)
    _admit(app, request)


def _admit(app: App, request: HttpRequest) -> tuple[_Asked, str]:
    """What is asked for, and by whom. Raises NotFound, MethodNotAllowed or Unauthorized."""
    asked = _what_is_asked(_read_path(app, request), request.head.method)
    return asked, "" if asked.page is _get_health else authenticate(app, request)


def _check_origin(app: App, request: HttpRequest) -> Headers:
    """Let no web page use us: neither by a name rebound to our address, nor across origins.

    Returns:
        the headers that tell a page which may that it may.
    """
    server, headers = app.config.server, request.headers
    host = headers.get("host", "")
    told = request.head.minor == 1 or "host" in headers
    if told and not _may_be_called(host, server.listen, server.allowed_hosts):
        raise Forbidden(
            f"host {printable(host, 100)!r} is not allowed; add it to server.allowed_hosts",
            code="host_not_allowed",
        )
    origin = headers.get("origin")
    if origin is None:
        return {}
    if origin in server.cors_origins or "*" in server.cors_origins:
        return {"access-control-allow-origin": origin, "vary": "Origin"}
    if origin.partition("://")[2].lower() != host.lower():
        raise Forbidden(
            f"origin {printable(origin, 100)!r} is not allowed; add it to server.cors_origins",
            code="origin_not_allowed",
        )
    return {}


@functools.lru_cache(maxsize=256)
def _may_be_called(host: str, listen: str, allowed: tuple[str, ...]) -> bool:
    """Whether a Host header is one of our names, and not one that was rebound to our address."""
    name = re.sub(r":\d*$", "", host).lower()
    if is_loopback(name) or name in {other.lower() for other in allowed}:
        return True
    here = listen.rpartition(":")[0]
    return not allowed and (listen.startswith("unix:") or not is_loopback(here))


def authenticate(app: App, request: HttpRequest) -> str:
    """The caller's name. Raises Unauthorized when a key is asked for and none of ours came."""
    if not app.auth_required:
        return "local"
    given = _credential(request)
    digest = hashlib.sha256(given.encode()).digest()
    # Compared as digests, each to its end: time tells nothing about any key.
    names = [name for known, name in app.callers.items() if hmac.compare_digest(known, digest)]
    if not given or not names:
        said = "this key is not known here" if given else "no key was given"
        raise Unauthorized(f"{said}; send one of bitrouter's keys as Authorization: Bearer KEY")
    return names[0]


def _credential(request: HttpRequest) -> str:
    headers = request.headers
    for name in ("x-api-key", "x-goog-api-key", "api-key"):
        if name in headers:
            return headers[name]
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    found = re.search(r"(?:^|&)key=([^&]+)", request.query)
    return unquote(found[1]) if found else ""


def _request_id(app: App, request: HttpRequest) -> str:
    given = request.headers.get("x-bitrouter-request-id")
    return given if given and _REQUEST_ID.fullmatch(given) else app.new_id()


_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


# Requests to a model.


def _read_call(
    request: HttpRequest, op: Operation, model: str, request_id: str, started_at: float
) -> Call:
    """Understand a request to a model. Raises BadRequest, naming the field."""
    content_type = request.headers.get("content-type", "")
    media = content_type.partition(";")[0].strip().lower()
    call = Call(request_id, op, model, request.headers, started_at)
    call.query = "&".join(
        pair
        for pair in request.query.split("&")
        if pair and unquote(pair.partition("=")[0]).lower() not in _QUERY_CREDENTIALS
    )
    if op.raw and media == "multipart/form-data":
        call.body, call.form_type = request.body, content_type
        _, named = set_form_field(request.body, content_type, "model")
        call.model = named or ""
    elif media == "application/json" or media.endswith("+json"):
        call.document = Document(request.body)
        if not model:
            call.model = maybe(call.document.value, "model", str) or ""
    else:
        shown = printable(content_type, 60)
        raise UnsupportedMedia(f"content-type: expected application/json, got {shown!r}")
    call.model = call.model.strip()
    if {".", ".."} & set(call.model.split("/")):  # it may become part of a path
        raise BadRequest("model: `.` and `..` are no part of a model id", param="model")
    if not call.model or len(call.model) > _MAX_MODEL_CHARS:
        raise BadRequest(
            "model: expected a model id such as openai/gpt-4o-mini; GET /v1/models lists them",
            code="missing_required_parameter",
            param="model",
        )
    call.stream = _streams(call)
    return call


_QUERY_CREDENTIALS = {"key", "api_key", "api-key", "apikey", "access_token", "token"}


def _streams(call: Call) -> bool:
    """Whether an answer is wanted as a stream; also sets up what that asks of us."""
    if call.op.protocol is ApiProtocol.GENERATE_CONTENT:
        if call.op.name != "streamGenerateContent":
            return False
        pairs = [pair for pair in call.query.split("&") if pair]
        call.as_array = "alt=sse" not in pairs
        others = [pair for pair in pairs if not pair.startswith("alt=")]
        call.query = "&".join([*others, "alt=sse"])
        return True
    if call.document is None or not call.op.generates:
        return False
    stream = maybe(call.document.value, "stream", bool) or False
    if stream and call.op.protocol is ApiProtocol.CHAT_COMPLETIONS:
        options = maybe(call.document.value, "stream_options", dict) or {}
        call.hide_usage = options.get("include_usage") is not True
    return stream


# Lists and status.


async def _list_models(app: App, request: HttpRequest, reply: Reply) -> None:
    """GET /v1/models and /v1/models/{id}, in the shape of the caller's protocol."""
    path = _read_path(app, request)
    wanted = unquote(path.below.removeprefix("/models").strip("/"))
    shape = _MODEL_SHAPES[path.protocol]
    listed = app.router.listing()
    if len(wanted) > _MAX_MODEL_CHARS:
        raise BadRequest("this model id is too long to be one", param="model")
    if wanted:
        found = next((one for one in listed if one.id == wanted), None)
        if found is None:
            who = app.router.resolve(wanted, GENERATE[path.protocol]).chain
            providers = tuple(dict.fromkeys(target.provider for target in who))
            found = Listed(wanted, providers, find_model(wanted))
        reply.send(200, compact(shape.one(found)), JSON_HEADERS)
        return
    reply.send(
        200, compact(shape.all([shape.one(one) for one in listed], request.query)), JSON_HEADERS
    )


class _ModelShape(NamedTuple):
    one: Callable[[Listed], JsonObject]
    all: Callable[[list[JsonObject], str], JsonObject]


def _extras(one: Listed) -> JsonObject:
    """What we know beyond the protocol's own fields; clients ignore keys they do not know."""
    facts = one.facts
    extras: JsonObject = {"providers": list(one.providers)}
    if one.context or (facts and facts.context):
        extras["context_length"] = one.context or (facts.context if facts else 0)
    if one.max_output or (facts and facts.max_output):
        extras["max_output_tokens"] = one.max_output or (facts.max_output if facts else 0)
    if facts:
        price = facts.price
        rates = {"input": price.input, "output": price.output}
        rates |= {"cache_read": price.cache_read, "cache_write": price.cache_write}
        extras["pricing_usd_per_million"] = {k: v for k, v in rates.items() if v is not None}
        extras["input_modalities"] = [_MODALITIES[letter] for letter in facts.inputs]
        extras["output_modalities"] = [_MODALITIES[letter] for letter in facts.outputs]
    return extras


_MODALITIES = {
    "t": "text", "i": "image", "a": "audio", "v": "video", "p": "pdf", "e": "embedding",
}  # fmt: skip

_LISTED_AT = 1_700_000_000  # `created` is required by OpenAI's type, and nobody knows it


def _openai_model(one: Listed) -> JsonObject:
    owner = one.id.partition("/")[0] if "/" in one.id else "bitrouter"
    fixed = {"id": one.id, "object": "model", "created": _LISTED_AT, "owned_by": owner}
    return {**fixed, **_extras(one)}


def _anthropic_model(one: Listed) -> JsonObject:
    extras = _extras(one)
    return {
        "type": "model",
        "id": one.id,
        "display_name": one.id,
        "created_at": "2023-11-14T22:13:20Z",
        "max_input_tokens": extras.get("context_length"),
        "max_tokens": extras.get("max_output_tokens"),
        **extras,
    }


def _google_model(one: Listed) -> JsonObject:
    extras = _extras(one)
    return {
        "name": f"models/{one.id}",
        "displayName": one.id,
        "version": "1",
        "inputTokenLimit": extras.get("context_length", 0),
        "outputTokenLimit": extras.get("max_output_tokens", 0),
        "supportedGenerationMethods": ["generateContent", "countTokens"],
    }


def _openai_list(models: list[JsonObject], query: str) -> JsonObject:  # noqa: ARG001
    return {"object": "list", "data": models}


def _anthropic_list(models: list[JsonObject], query: str) -> JsonObject:
    """wire: docs.claude.com/en/api/models-list, read 2026-11: limit 1-1000, 20 unless told."""
    asked = dict(pair.partition("=")[::2] for pair in query.split("&"))
    limit = _count(asked, "limit", 20)
    ids = [model["id"] for model in models]
    after, before = unquote(asked.get("after_id", "")), unquote(asked.get("before_id", ""))
    start = ids.index(after) + 1 if after in ids else 0
    end = ids.index(before) if before in ids else len(ids)
    size = max(1, min(limit, 1000))
    page = models[start:end][-size:] if before in ids else models[start:end][:size]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(page) < end - start
    return {"data": page, "has_more": more, "first_id": first, "last_id": last}


def _count(asked: Mapping[str, str], name: str, default: int) -> int:
    return int(asked[name]) if re.fullmatch(r"[0-9]{1,9}", asked.get(name, "")) else default


def _google_list(models: list[JsonObject], query: str) -> JsonObject:
    asked = dict(pair.partition("=")[::2] for pair in query.split("&"))
    size, start = _count(asked, "pageSize", 50), _count(asked, "pageToken", 0)
    end = start + max(1, min(size, 1000))
    token = {"nextPageToken": str(end)} if end < len(models) else {}
    return {"models": models[start:end], **token}


_MODEL_SHAPES = {
    ApiProtocol.CHAT_COMPLETIONS: _ModelShape(_openai_model, _openai_list),
    ApiProtocol.RESPONSES: _ModelShape(_openai_model, _openai_list),
    ApiProtocol.MESSAGES: _ModelShape(_anthropic_model, _anthropic_list),
    ApiProtocol.GENERATE_CONTENT: _ModelShape(_google_model, _google_list),
}


async def _get_health(app: App, request: HttpRequest, reply: Reply) -> None:  # noqa: ARG001
    reply.send(200, compact(health_facts(app)), JSON_HEADERS)


def health_facts(app: App) -> JsonObject:
    lag_s = max(app.sweeper.lag_s, time.monotonic() - app.sweeper.now - app.sweeper.tick_s)
    now = time.monotonic()
    return {
        "status": "slow" if lag_s > _SLOW_LOOP_S else "draining" if app.draining else "ok",
        "version": __version__,
        "uptime_s": round(now - app.started_at, 1),
        "loop_lag_ms": round(max(0.0, lag_s) * 1000, 1),
        "providers": list(app.router.active),
        "cooling_s": app.health.cooling(now),
    }


# What is served where. Paths are below /v1 and /v1beta; models have OPERATIONS and GEMINI_VERBS.

_PAGES: dict[str, Handler] = {
    "/health": _get_health,
    "/models": _list_models,
}

_GOOGLE_PATH = re.compile(r"/(?:models/)?([^/:].*):(\w+)")


class _Asked(NamedTuple):
    """What a path and a method come to: an operation on a model, or a page."""

    op: Operation | None = None
    model: str = ""
    page: Handler | None = None


@functools.lru_cache(maxsize=1024)
def _what_is_asked(path: Path, method: str) -> _Asked:
    """Raises NotFound or MethodNotAllowed."""
    below = path.below.rstrip("/")
    google = _GOOGLE_PATH.fullmatch(path.below)
    if google and google[2] in GEMINI_VERBS:
        _check_method(method, "POST")
        return _Asked(GEMINI_VERBS[google[2]], unquote(google[1]))
    if below in OPERATIONS:
        _check_method(method, "POST")
        return _Asked(OPERATIONS[below])
    page = _PAGES.get("/models" if below.startswith("/models/") else below)
    if page is None or (google and method == "POST"):
        known = [*GENERATE_PATHS.values(), "/v1/models", "/health"]
        said = f"there is nothing at {printable(path.below)}; this server has {', '.join(known)}"
        raise NotFound(said)
    _check_method(method, "GET")
    return _Asked(page=page)


def _check_method(method: str, allowed: str) -> None:
    if method != allowed and not (method == "HEAD" and allowed == "GET"):
        words = "GET, HEAD" if allowed == "GET" else allowed
        raise MethodNotAllowed(f"this path takes {words}, not {method}", extra={"allow": words})


SERVICE = Service(screen, handle, _refuse_unread)


# ---------------------------------------------------------------------------------------------
# 23. server: listening, finding local servers, draining
# ---------------------------------------------------------------------------------------------

_DRAIN_S = 30.0
_BACKLOG = 2048
_DISCOVER_EVERY_S = 30.0
_DISCOVER_WAIT_S = 1.0


async def serve(
    app: App, greet: Callable[[App, Listener], None], *, find_local: bool = True
) -> None:
    """Listen until SIGTERM or Ctrl-C, then drain. A second signal cuts everything at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    listener = Listener(app)
    await listener.open()
    stop_health = start_health_listener(app) if app.config.server.health_listen else None
    app.writer.attach(loop)
    _on_signals(loop, stop)
    greet(app, listener)
    raise_descriptor_limit()
    _collect_less()
    if find_local:
        app.spawn(_discover_for_ever(app))
    await stop.wait()
    app.writer.event("draining", {"connections": listener.connections})
    draining = app.spawn(listener.drain())
    stop.clear()
    again = loop.create_task(stop.wait())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if stop_health:
        stop_health()
    app.writer.event("stopped", {})
    app.writer.attach(None)


def _collect_less() -> None:
    """What is loaded now stays: no garbage collection has to walk through it again."""
    import gc

    catalogue()
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 100)


class Listener:
    """The listening socket and the connections that came through it."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.address = ""
        self._server: asyncio.Server | None = None
        self._opened = OpenConnections()

    async def open(self) -> None:
        """Listen. Raises ConfigError when the address cannot be had or would be unsafe."""
        app, loop = self.app, asyncio.get_running_loop()
        _check_safety(app)

        def accept() -> CallerConnection:
            return CallerConnection(app, SERVICE, self._opened)

        listen = app.config.server.listen
        try:
            if listen.startswith("unix:"):
                self._server = await _listen_on_path(listen.removeprefix("unix:"), accept)
                self.address = listen
            else:
                host, _, port = listen.rpartition(":")
                host = host.strip("[]")
                self._server = await loop.create_server(accept, host, int(port), backlog=_BACKLOG)
                bound = self._server.sockets[0].getsockname()[1]
                self.address = f"http://{listen.rpartition(':')[0]}:{bound}"
        except OSError as exc:
            taken = exc.errno == errno.EADDRINUSE
            hint = "another server has it: choose another with --port" if taken else ""
            said = f"cannot listen on {listen}: {exc.strerror or exc}"
            raise ConfigError(f"{said}; {hint}" if hint else said) from None
        app.sweeper.start()

    async def drain(self, seconds: float = _DRAIN_S) -> None:
        """Take no more connections, let running answers finish, cut what takes longer."""
        self.app.draining = True
        if self._server:
            self._server.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.sleep(0)  # who was just accepted counts, too
                for connection in self._opened:
                    connection.close_if_idle()
                await self._opened.gone()
        for connection in self._opened:
            connection.abort()
        await self.app.stop()

    @property
    def connections(self) -> int:
        return len(self._opened)


async def _listen_on_path(path: str, accept: Callable[[], CallerConnection]) -> asyncio.Server:
    """A unix socket for this user alone, unless somebody answers there already."""
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    before = os.umask(0o177)
    try:
        loop = asyncio.get_running_loop()
        return await loop.create_unix_server(accept, path, backlog=_BACKLOG)
    finally:
        os.umask(before)


def _check_safety(app: App) -> None:
    """Refuse to serve other machines without keys. Raises ConfigError."""
    server = app.config.server
    keys_hint = (
        'give callers keys ([keys.NAME] key = "..." in bitrouter.toml, or BITROUTER_KEYS=key,... '
        "in the environment)"
    )
    if not is_local(server.listen) and not app.auth_required:
        raise ConfigError(
            f"server.listen: {server.listen} can be reached by other machines, and auth is off: "
            f'{keys_hint} and set server.auth = "required"'
        )
    if app.auth_required and not app.callers:
        raise ConfigError(f"server.auth: keys are required and there are none: {keys_hint}")


# Servers on this machine: looked for after we listen, and again from time to time.


async def _discover_for_ever(app: App) -> None:
    while True:
        await discover(app)
        await asyncio.sleep(_DISCOVER_EVERY_S)


async def discover(app: App) -> None:
    """Find out which local servers run and what they serve; replace the router if that changed."""
    configured, _ = active_providers(app.config, app.environ)
    local = [facts for facts in PROVIDERS.values() if facts.kind == "local"]
    found = await asyncio.gather(*(_look(app, facts, configured.get(facts.id)) for facts in local))
    active = dict(configured)
    for facts, provider in zip(local, found, strict=True):
        if provider:
            active[facts.id] = provider
    before = {ident: provider.models for ident, provider in app.router.active.items()}
    if before != {ident: provider.models for ident, provider in active.items()}:
        app.router = Router(app.config, active)
        names = [f"{p.facts.id}:{len(p.models)}" for p in found if p and p.models]
        app.writer.event("local_servers", {"found": ",".join(names) or "none"})


async def _look(app: App, facts: Provider, given: ActiveProvider | None) -> ActiveProvider | None:
    if given is None:
        account = Account("", Secret(""), dict(facts.bases))
        where = urlsplit(next(iter(facts.bases.values()))).netloc
        given = ActiveProvider(facts, (account,), f"found on {where}", found=True)
        if app.config.server.listen.endswith(f":{where.rpartition(':')[2]}"):
            return None  # that is ourselves
        ids = await _model_ids(app, given)
        return given._replace(models=ids) if ids else None
    ids = await _model_ids(app, given)
    known = {model.id for model in given.models}
    return given._replace(models=(*given.models, *(m for m in ids if m.id not in known)))


async def _model_ids(app: App, provider: ActiveProvider) -> tuple[DeclaredModel, ...]:
    """What a local server says it serves; nothing if nobody is there."""
    account = provider.accounts[0]
    origin, path = origin_of(next(iter(account.bases.values())))
    key = account.api_key.reveal()
    auth = f"authorization: Bearer {key}\r\n" if key else ""
    request = f"GET {path}/models HTTP/1.1\r\nhost: {origin.host}:{origin.port}\r\n{auth}\r\n"
    connection: Connection | None = None
    sink: Collector | None = None
    try:
        async with asyncio.timeout(_DISCOVER_WAIT_S):
            connection = await app.pool.lend(provider.facts.id, origin, _DISCOVER_WAIT_S)
            answers: list[tuple[ResponseHead, bytes]] = []
            done = connection.loop.create_future()
            sink = Collector(done, lambda *answer: answers.append(answer), 4 * 1024 * 1024)
            connection.start(request.encode(), sink)
            await sink.done
        head, body = answers[0]
        found = as_list(dig(parse_json(body), "data")) if head.status == 200 else []
    except (UpstreamError, TimeoutError, ValueError, RecursionError):
        if connection and sink:
            connection.give_up(sink)
        return ()
    ids = [name for model in found if isinstance(name := dig(model, "id"), str)]
    return tuple(DeclaredModel(ident) for ident in sorted(ids)[:1000])


# A second listener on a thread: it answers even when the loop does not, and tells how late that is.


def start_health_listener(app: App) -> Callable[[], None]:
    """Serve GET /health on `server.health_listen`. Returns what stops it."""
    import http.server
    import threading

    class Probe(http.server.BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            facts = health_facts(app)
            body = compact(facts)
            self.send_response(503 if facts["status"] == "slow" else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Liveness probes are not worth a line."""

    host, _, port = app.config.server.health_listen.rpartition(":")
    try:
        server = http.server.ThreadingHTTPServer((host.strip("[]"), int(port)), Probe)
    except OSError as exc:
        said = f"server.health_listen: cannot listen on {host}:{port}: {exc.strerror or exc}"
        raise ConfigError(said) from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), name="health", daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop


def _on_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    import signal

    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError):  # Windows: Ctrl-C still arrives as KeyboardInterrupt
            loop.add_signal_handler(number, stop.set)


def raise_descriptor_limit() -> None:
    """A stream needs two descriptors: take as many as we may have."""
    with suppress(ImportError, ValueError, OSError):  # Windows has neither limit nor module
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---------------------------------------------------------------------------------------------
# 24. cli: the command line
# ---------------------------------------------------------------------------------------------
# Data on stdout, talk on stderr. JSON when stdout is no terminal, or with --json. Exit 0 when it
# worked, 1 when it failed, 2 when the command was not understood.


def say(text: str, *, to_stderr: bool = False) -> None:
    """The one place that writes to the terminal."""
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(text + "\n")


def find_config(given: str, environ: Mapping[str, str]) -> str:
    """The configuration file to use, or "" for none. Raises ConfigError."""
    if given:
        if not os.path.isfile(given):  # noqa: PTH113  pathlib costs 8 ms of every start
            raise ConfigError(f"there is no file {given}")
        return given
    home = environ.get("BITROUTER_HOME", "")
    if os.path.isfile("bitrouter.toml"):  # noqa: PTH113
        return "bitrouter.toml"
    place = os.path.join(home or os.path.expanduser("~/.bitrouter"), "bitrouter.toml")  # noqa: PTH111, PTH118
    if os.path.isfile(place):  # noqa: PTH113
        return place
    if home:
        raise ConfigError(f"BITROUTER_HOME is {home}, but there is no bitrouter.toml in it")
    return ""


def _load_config(given: str, environ: Mapping[str, str]) -> tuple[Loaded, str]:
    """Read the configuration. Raises ConfigError only when the file cannot be read at all."""
    path = find_config(given, environ)
    if not path:
        return Loaded(Config(), [], []), ""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            return parse_config(file.read(), environ, path), path
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from None


def _usable_config(given: str, environ: Mapping[str, str]) -> Config:
    """A configuration to serve with. Raises ConfigError with all that is wrong."""
    loaded, _ = _load_config(given, environ)
    wrong = [*loaded.problems, *loaded.unset]
    if wrong:
        raise ConfigError("the configuration has problems:\n  " + "\n  ".join(wrong))
    return loaded.config


def command_serve(args: argparse.Namespace) -> int:
    config = _usable_config(args.config, os.environ)
    listen = args.listen or (f"127.0.0.1:{args.port}" if args.port is not None else "")
    if listen:
        if wrong := listen_problem(listen):
            raise ConfigError(f"{'--listen' if args.listen else '--port'}: {wrong}")
        config.server.listen = listen
    form = config.server.log_format
    as_json = form == "json" or (form == "auto" and not sys.stderr.isatty())
    writer = LogWriter(sys.stderr, as_json=as_json)
    log.handlers, log.propagate = [writer], False
    log.setLevel(logging.INFO)
    timeouts = config.upstream.timeouts
    shortest_s = min(timeouts.first_token_s, timeouts.idle_s, timeouts.total_s)
    app = App(config, os.environ, writer, tick_s=max(0.02, min(0.5, shortest_s / 4)))
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(app, greet))
    return 0


def greet(app: App, listener: Listener) -> None:
    """Say where we are and who is on: a banner for people, an event for machines."""
    active = app.router.active
    for warning in app.warnings:
        log.warning("configuration %s", warning)
    if not sys.stderr.isatty():
        enabled = ",".join(f"{ident}={provider.enabled_by}" for ident, provider in active.items())
        facts = {"address": listener.address, "version": __version__, "providers": enabled}
        app.writer.event("listening", facts)
        app.writer.flush()
        return
    width = max([4, *map(len, active)])
    lines = [f"bitrouter {__version__} listens on {listener.address}", ""]
    lines += [f"  {ident:{width}}  {provider.enabled_by}" for ident, provider in active.items()]
    lines += [f"  {'echo':{width}}  built in"]
    if not active:
        lines += ["", "  No provider has a key yet: set OPENAI_API_KEY, ANTHROPIC_API_KEY, ..."]
    lines += ["", "  Try it:", "", _example_curl(app, listener.address), ""]
    say("\n".join(lines), to_stderr=True)


def _example_curl(app: App, address: str) -> str:
    """A request to paste, to the first model that speaks Chat Completions."""
    chat = ApiProtocol.CHAT_COMPLETIONS
    able = [ident for ident, p in app.router.active.items() if chat in p.facts.bases]
    served = [one.id for one in app.router.listing() if set(one.providers) & set(able)]
    model = next((ident for ident in served if ident == "openai/gpt-4o-mini"), None)
    model = model or next(iter(served), ECHO_MODEL)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    return (
        f"  curl {address}{app.config.server.base_path}/v1/chat/completions \\\n"
        f"    -H 'content-type: application/json' \\\n    -d '{body}'"
    )


def command_models(args: argparse.Namespace) -> int:
    config = _usable_config(args.config, os.environ)
    active, _ = active_providers(config, os.environ)
    listed = Router(config, active).listing()
    if args.all:
        listed = [Listed(m.id, tuple(m.carried), m, m.context) for m in catalogue().values()]
    if args.provider:
        wanted = provider_id(args.provider)
        if wanted not in PROVIDERS and wanted not in active:
            near = near_misses(wanted, [*PROVIDERS, *active])
            hint = f"did you mean {' or '.join(near)}?" if near else "`providers` lists them all"
            raise ConfigError(f"there is no provider {wanted!r}; {hint}")
        listed = [one for one in listed if wanted in one.providers]
    rows = [_model_row(one) for one in listed]
    show(args, {"models": rows}, [(r["id"], _dollars(r), ",".join(r["providers"])) for r in rows])
    return 0


def _model_row(one: Listed) -> JsonObject:
    price = one.facts.price if one.facts else Price()
    return {
        "id": one.id,
        "providers": list(one.providers),
        "context": one.context or None,
        "usd_per_million_input": price.input,
        "usd_per_million_output": price.output,
    }


def _dollars(row: JsonObject) -> str:
    rates = row["usd_per_million_input"], row["usd_per_million_output"]
    return "-" if None in rates else f"${rates[0]:g} / ${rates[1]:g}"


def command_providers(args: argparse.Namespace) -> int:
    config = _usable_config(args.config, os.environ)
    active, warnings = active_providers(config, os.environ)
    rows: list[JsonObject] = []
    for ident in (*active, *(ident for ident in PROVIDERS if ident not in active)):
        on = active.get(ident)
        facts = on.facts if on else PROVIDERS[ident]
        rows.append(
            {
                "id": ident,
                "active": on is not None,
                "enabled_by": on.enabled_by if on else None,
                "env": list(facts.env),
                "protocols": list(facts.bases),
                "api_base": next(iter(facts.bases.values())),
                "accounts": len(on.accounts) if on else 0,
            }
        )
    for warning in warnings:
        say(f"bitrouter: {warning}", to_stderr=True)
    table = [
        (r["id"], r["enabled_by"] or f"set {r['env'][0]}", ",".join(r["protocols"])) for r in rows
    ]
    show(args, {"providers": rows}, table)
    return 0


def command_route(args: argparse.Namespace) -> int:
    config = _usable_config(args.config, os.environ)
    active, _ = active_providers(config, os.environ)
    router = Router(config, active)
    route, op = _route_for(router, args.model, args.protocol)
    reasoned = zip(route.chain, route.reasons, strict=True)
    steps = [_step(target, reason, op, args.explain) for target, reason in reasoned]
    facts: JsonObject = {"model": args.model, "protocol": op.protocol, "chain": steps}
    if args.explain:
        facts["left_out"] = list(route.left_out)
    show(args, facts, _route_rows(steps, route.left_out if args.explain else ()))
    return 0


def _route_rows(steps: list[JsonObject], left_out: Iterable[str]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for i, step in enumerate(steps, 1):
        rows.append((f"{i}.", step["provider"], f"{step['model']}: {step['reason']}"))
        if "url" in step:
            rows += [("", "", step["url"]), *(("", "", line) for line in step["headers"])]
    return [*rows, *(("-", *left.partition(": ")[::2]) for left in left_out)]


def _route_for(router: Router, model: str, protocol: str) -> tuple[Route, Operation]:
    """Resolve for the protocol asked for, or for the one that most targets speak."""
    ops = list(GENERATE.values())
    if protocol:
        ops = [op for op in ops if op.protocol == PROTOCOL_NAMES[protocol]]
    routes = []
    for op in ops:
        with suppress(ProtocolUnsupported):
            routes.append((router.resolve(model, op), op))
    if not routes:
        return router.resolve(model, ops[0]), ops[0]
    return max(routes, key=lambda found: len(found[0].chain))


def _step(target: Target, reason: str, op: Operation, explain: bool) -> JsonObject:
    step: JsonObject = {"provider": target.provider, "model": target.model, "reason": reason}
    if target.account:
        step["account"] = target.account
    if explain:
        step["url"] = target.base + op.suffix.replace("{model}", target.model)
        lines = target.head.reveal().split("\r\n")
        step["headers"] = [_redacted(line, target.secret) for line in lines if line]
    return step


def _redacted(line: str, secret: Secret) -> str:
    """A header line to look at: of the file's own headers, too, the value may be a secret."""
    name, _, value = line.partition(": ")
    if secret.redact(value) != value:
        return f"{name}: {secret.redact(value)}"
    return line if name in ("host", "anthropic-version") else f"{name}: [redacted]"


def command_validate(args: argparse.Namespace) -> int:
    loaded, path = _load_config(args.config, os.environ)
    if not path:
        raise ConfigError("there is no configuration file to validate; -c FILE names one")
    facts = {
        "valid": not loaded.problems,
        "path": path,
        "errors": loaded.problems,
        "warnings": loaded.unset,
        "providers": len(loaded.config.providers),
        "models": len(loaded.config.models),
    }
    rows = [("error", said) for said in loaded.problems]
    rows += [("warning", said) for said in loaded.unset]
    show(args, facts, rows or [("ok", path)])
    return 1 if loaded.problems else 0


def show(args: argparse.Namespace, facts: JsonObject, rows: Iterable[Iterable[str]]) -> None:
    """JSON for machines, aligned columns for people."""
    if args.json or not (args.human or sys.stdout.isatty()):
        say(json.dumps(facts, indent=2))
        return
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=False)]
    for row in table:
        say("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=False)).rstrip())


class Command(NamedTuple):
    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()


_OUTPUT = (
    (("--json",), {"action": "store_true", "help": "JSON, also on a terminal"}),
    (("--human",), {"action": "store_true", "help": "columns, also in a pipe"}),
)
_CONFIG = ((("-c", "--config"), {"default": "", "metavar": "FILE", "help": "configuration file"}),)
_LISTEN = (
    (("--listen",), {"default": "", "metavar": "HOST:PORT", "help": "address to serve on"}),
    (("--port",), {"type": int, "metavar": "N", "help": "port on 127.0.0.1 to serve on"}),
)
_PROTOCOL = {"default": "", "choices": tuple(PROTOCOL_NAMES), "help": "protocol of the request"}

# fmt: off
COMMANDS: tuple[Command, ...] = (
    Command("serve", "serve in the foreground (the default)", command_serve, (*_CONFIG, *_LISTEN)),
    Command("route", "show where a model id leads, in order, and why", command_route, (
        (("model",), {"help": "such as openai/gpt-4o-mini"}),
        (("--explain",), {"action": "store_true", "help": "also URLs, headers, who was left out"}),
        (("--protocol",), _PROTOCOL), *_CONFIG, *_OUTPUT)),
    Command("models", "list the models that can be asked for now", command_models, (
        (("-p", "--provider"), {"default": "", "help": "only this provider's"}),
        (("--all",), {"action": "store_true", "help": "the whole catalogue, keys or not"}),
        *_CONFIG, *_OUTPUT)),
    Command("providers", "list providers, and the variable that turns each on", command_providers,
            (*_CONFIG, *_OUTPUT)),
    Command("config validate", "check the configuration file; needs no secrets", command_validate,
            (*_CONFIG, *_OUTPUT)),
)
# fmt: on


def _build_parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="bitrouter",
        description="An LLM gateway in one file, for OpenAI, Anthropic and Google clients.",
        epilog="example: OPENAI_API_KEY=sk-... bitrouter, then use http://127.0.0.1:4356/v1",
    )
    parser.add_argument("--version", action="version", version=f"bitrouter {__version__}")
    groups = {"": parser.add_subparsers(metavar="COMMAND")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            above = groups[""].add_parser(group, help=command.help)
            groups[group] = above.add_subparsers(metavar="COMMAND", required=True)
        sub = groups[group].add_parser(name, help=command.help, description=command.help)
        sub.set_defaults(run=command.run)
        for flags, settings in command.arguments:
            sub.add_argument(*flags, **settings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; without one, serve. Returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help", "--version")):
        given = ["serve", *given]
    args = _build_parser().parse_args(given)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads on: `bitrouter models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BitrouterError as error:
        if getattr(args, "json", False):
            fault = {"kind": error.kind, "code": error.code, "message": error.message}
            say(json.dumps({"error": fault}, indent=2))
        say(f"bitrouter: {error.message}", to_stderr=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
