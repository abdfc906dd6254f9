#!/usr/bin/env python3
"""BitRouter: an LLM gateway in one file, with nothing but the standard library.

A request's journey, with the section that does each step:

    bytes in     callers    read one HTTP/1.1 request, strictly and under a deadline
    door         pipeline   check Host and Origin, find what the path asks for, check the key
    read         pipeline   content type; the body as a Document: JSON that keeps its bytes
    route        routing    model id -> chain of Targets, first choice first
    order        health     accounts take turns; targets that cool down go last
    attempt      attempts   for each Target in turn, until one answers
    ask          exchange   the caller's bytes, with model and key put in; in another protocol the
                            codec's Prompt, fitted by adapt and written anew by the target's codec
    watch        relay      pass the events on; the codec notes usage, finish and errors
    or turn      translate  the target's events into StreamParts, and those into the caller's events
    bytes out    callers    the answer, or events as they come, with back-pressure
    book         pipeline   one log line: who, what, where, how long, how many tokens, how much

Contents

     1. errors      what can go wrong, and what the caller is told
     2. basics      secrets, JSON we did not write and must not rewrite, words for people
     3. http        HTTP/1.1 heads and bodies
     4. sse         Server-Sent Events: whole events out of any bytes
     5. ir          the neutral form of requests and answers, and what a Codec is
     6. rosetta     what the protocols call the same thing, and what their codecs share
     7. schema      the dialects of JSON Schema that providers take
     8. chat        OpenAI Chat Completions
     9. responses   OpenAI Responses
    10. messages    Anthropic Messages
    11. gemini      Google generateContent
    12. codecs      the table of protocols, and the operations that each one has
    13. embeddings  OpenAI's and Google's ways to ask for vectors
    14. adapt       a prompt as its target can take it, and what to undo in the answer
    15. relay       a provider's stream on its way to the caller
    16. translate   an answer from one protocol to another
    17. registry    the providers and models we know, and what they cost
    18. quirks      what single models take and refuse
    19. config      bitrouter.toml and the environment -> Config
    20. routing     model id to chain of targets
    21. health      which targets are failing, and until when to spare them
    22. choosing    which of a route's targets a request goes to, and in what order
    23. shaping     what the configuration puts into requests and takes out of them
    24. templates   text with places to fill in
    25. migrate     a TensorZero configuration -> ours
    26. bridge      TensorZero's clients, unchanged
    27. echo        the built-in model
    28. logs        one line per event, for people or for machines
    29. transport   the HTTP client: pool, TLS, proxies, deadlines
    30. memory      what is kept of conversations, for a while
    31. fetch       media at a URL, for targets that want the bytes
    32. runtime     App: everything a request needs
    33. callers     connections from callers
    34. exchange    one request to one target, and its answer on its way to the caller
    35. side        what is asked of models besides answers: counts of tokens, embeddings, the echo
    36. attempts    the loop of retries and fallbacks
    37. explain     whom a request goes to, and why
    38. pipeline    one request's life; the handlers
    39. server      listening, finding local servers, draining
    40. cli         the command line

A section uses its own names and those of the sections before it, never those after it, and a
name that starts with an underscore is private to its section. Sections marked (pure) do no
I/O, read no clock and await nothing. tests/test_layout.py holds us to all of it.

Short names used throughout: `op` is an Operation, `part` a StreamPart, `target` one place to
send to, `who` its name in a message, `said` what a message says, `head` an HTTP head, `ident` a
provider's id, `now` the monotonic clock in seconds.
"""

from __future__ import annotations

import asyncio
import base64
import enum
import errno
import functools
import hashlib
import hmac
import io
import itertools
import json
import logging
import os
import random
import re
import socket
import struct
import sys
import time
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

if TYPE_CHECKING:
    import argparse
    import http.client
    import ssl
    from concurrent.futures import Executor

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


class NobodyWanted(BadRequest):
    """All who could serve the request are ones that it, or the configuration, does not want."""

    code = "no_eligible_provider"


class KeyMissing(BitrouterError):
    """The model is known, but nobody who serves it has a key here."""

    status, kind, code = 402, Kind.BILLING, "provider_key_missing"


class Unset(BitrouterError):
    """The configuration needs a variable or a file that is not there."""

    status, code = 503, "configuration_incomplete"


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


class LimitReached(BitrouterError):
    """A limit of the configuration, on all targets of a chain."""

    status, kind, code = 429, Kind.RATE_LIMIT, "rate_limit_exceeded"


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


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(strict=False)  # some servers leave control characters as they are
_STRICT_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # callers send no NaN
_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_ASCII = json.JSONEncoder(separators=(",", ":")).encode
JSON_TYPES = {
    dict: "an object", list: "an array", str: "a string", bool: "true or false",
    int: "a whole number",
}  # fmt: skip


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


class Change(NamedTuple):
    """One change of a JSON document. pointer: RFC 6901; a last part of `-` appends to a list.
    insert: before the list's entry of that number, not in its place."""

    pointer: str
    value: Json = None
    delete: bool = False
    insert: bool = False


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
            value = _STRICT_DECODER.decode(self._text)
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

    def changed(self, changes: Iterable[Change]) -> Document:
        """A new document with values replaced, added or taken out, and all else as it was.

        Raises BadRequest if a pointer leads through something that has nothing in it.
        """
        text = self._text
        for pointer, value, delete, insert in changes:
            text = _spliced(text, pointer, None if delete else _ASCII(value), insert=insert)
        return Document(text.encode())

    @property
    def raw(self) -> bytes:
        """The document as it came."""
        return self._raw

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


class _Member(NamedTuple):
    """An entry of an object or a list: where it begins (with its key), its value, and its end."""

    key: str
    begin: int
    value: int
    end: int


def _members(text: str, start: int) -> list[_Member]:
    """The entries of the valid JSON object or list at `start`."""
    is_object = text[start] == "{"
    closing = "}" if is_object else "]"
    members: list[_Member] = []
    at = _skip(text, start + 1)
    while text[at] != closing:
        begin, key = at, str(len(members))
        if is_object:
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
        end = _DECODER.raw_decode(text, at)[1]
        members.append(_Member(key, begin, at, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return members


def _spliced(text: str, pointer: str, new: str | None, *, insert: bool) -> str:
    """JSON text with the value at a pointer replaced or added, or taken out (new: None). Objects
    that are missing on the way there are made."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    at = _skip(text, 0)
    for n, part in enumerate(parts):
        above = "/".join(["", *parts[:n]])
        if n and text.startswith("null", at):  # as good as absent
            return text if new is None else text[:at] + _wrapped(parts[n:], new) + text[at + 4 :]
        if text[at] not in "{[":
            raise BadRequest(f"{pointer}: the body has no object or list at {above}")
        members = _members(text, at)
        found = [i for i, member in enumerate(members) if member.key == part]
        if text[at] == "[" and new is not None and not found and part not in _ends(members):
            said = f"{pointer}: {above} is a list of {len(members)}; expected `-` or an index"
            raise BadRequest(f"{said} of at most {len(members)}, got {show_json(part)}")
        if len(found) > 1:
            raise BadRequest(f"{part}: this field is given twice", param=part)
        last = n == len(parts) - 1
        if found and not last:
            at = members[found[0]].value
        elif found and not (insert and text[at] == "["):
            return _put(text, at, members, found[0], new)
        elif new is None:
            return text
        else:
            return _added(text, at, members, part, _wrapped(parts[n + 1 :], new))
    return text


def _ends(members: list[_Member]) -> tuple[str, str]:
    """What a pointer may call the place behind a list's last entry (RFC 6901, 4)."""
    return "-", str(len(members))


def _wrapped(parts: list[str], value: str) -> str:
    """JSON text in which a value stands at a pointer, and nothing else."""
    for part in reversed(parts):
        value = f"[{value}]" if part == "-" else f"{{{_ASCII(part)}:{value}}}"
    return value


def _put(text: str, at: int, members: list[_Member], n: int, new: str | None) -> str:
    member = members[n]
    if new is not None:
        return text[: member.value] + new + text[member.end :]
    if n:
        return text[: members[n - 1].end] + text[member.end :]
    if len(members) > 1:
        return text[: member.begin] + text[members[1].begin :]
    return text[: at + 1] + text[member.end :]


def _added(text: str, at: int, members: list[_Member], part: str, new: str) -> str:
    """An entry put into a list before the one that has its number, or else at the end."""
    entry = f"{_ASCII(part)}:{new}" if text[at] == "{" else new
    before = next((m for m in members if text[at] == "[" and m.key == part), None)
    if before:
        return text[: before.begin] + entry + "," + text[before.begin :]
    if members:
        return text[: members[-1].end] + "," + entry + text[members[-1].end :]
    return text[: at + 1] + entry + text[at + 1 :]


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
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = show_json(value)
        raise BadRequest(f"{key}: expected {JSON_TYPES[kind]}, got {found}", param=key)
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


def near_misses(word: str, known: Iterable[str], count: int = 3, least: float = 0.5) -> list[str]:
    """What was probably meant, best first. least: how alike it must be, of 1."""
    import difflib  # 10 ms, and only wanted when something is wrong

    word = word[:_LONG_WORD]  # what is longer is no slip of the pen
    names = [name for name in known if len(name) <= 2 * _LONG_WORD]
    if len(names) > _MANY_NAMES:  # each comparison costs 50 us: only what shares pairs of letters
        pairs = {word[i : i + 2] for i in range(len(word) - 1)}

        def shared(name: str) -> int:
            return sum(pair in name for pair in pairs)

        names = sorted(names, key=shared, reverse=True)[:_MANY_NAMES]
    return difflib.get_close_matches(word, names, count, least)


_MANY_NAMES, _LONG_WORD = 200, 128


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
# 5. ir: the neutral form of requests and answers, and what a Codec is (pure)
# ---------------------------------------------------------------------------------------------
# A request that goes to a provider of its own protocol keeps its bytes; of its answer we only
# read what we must: has it begun, is it finished, did it fail, what did it use.
#
# Any other request becomes a Prompt, and its answer a sequence of StreamParts: blocks that open,
# grow and close, each with a key of its own, and at the end why the model stopped. A whole
# answer is the same sequence with larger pieces. Nothing here belongs to one protocol; what a
# protocol alone can say travels as Native, and only to its own kind.


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
    STOP_SEQUENCE = enum.auto()
    TOOL_CALLS = enum.auto()
    LENGTH = enum.auto()
    CONTEXT_WINDOW = enum.auto()
    CONTENT_FILTER = enum.auto()
    REFUSAL = enum.auto()
    PAUSE = enum.auto()
    MALFORMED = enum.auto()


# What messages and answers are made of.


class Opaque(NamedTuple):
    """State that a provider wants back and nobody else may see or change.

    Attributes:
        vendor: who minted it: anthropic, openai, google, or the lab of the model.
        kind: what it is there: signature, redacted, encrypted, thought.
        data: exactly as it came.
        id: the item it belongs to, where the vendor names items.
    """

    vendor: str
    kind: str
    data: str
    model: str = ""
    id: str = ""


class Citation(NamedTuple):
    """A source of a text; start and end are characters of that text."""

    url: str
    title: str = ""
    start: int = 0
    end: int = 0


class Text(NamedTuple):
    """cache: the time to live of a cache mark that stands on it, such as "5m"; "" for none."""

    text: str = ""
    citations: tuple[Citation, ...] = ()
    cache: str = ""
    logprobs: tuple[JsonObject, ...] = ()


class Refusal(NamedTuple):
    text: str = ""


class Reasoning(NamedTuple):
    text: str = ""
    opaque: Opaque | None = None


class Media(NamedTuple):
    """An image, a document, a recording or a film.

    Attributes:
        kind: image, document, audio, video.
        mime: "" if it is not known.
        data: standard base64, padded; "" if it is at `url` or known to its vendor as `file_id`.
        vendor: whose file_id it is.
    """

    kind: str
    mime: str = ""
    data: str = ""
    url: str = ""
    file_id: str = ""
    vendor: str = ""
    name: str = ""
    detail: str = ""
    cache: str = ""


class ToolCall(NamedTuple):
    """A call: its arguments are JSON text as it came, or any text if the tool is a custom one."""

    id: str
    name: str
    arguments: str = ""
    custom: bool = False
    opaque: Opaque | None = None
    namespace: str = ""
    cache: str = ""


class Native(NamedTuple):
    """Something that only its own protocol can say."""

    protocol: ApiProtocol
    value: JsonObject


class ToolResult(NamedTuple):
    call_id: str
    content: tuple[Text | Media, ...] = ()
    is_error: bool = False
    name: str = ""
    custom: bool = False
    cache: str = ""


Content: TypeAlias = Text | Refusal | Reasoning | Media | ToolCall | ToolResult | Native
Block: TypeAlias = Text | Refusal | Reasoning | Media | ToolCall


class Message(NamedTuple):
    """role: system, developer, user or assistant; tool results are the user's."""

    role: str
    content: tuple[Content, ...]
    name: str = ""


# What a request asks for besides.


class Tool(NamedTuple):
    """A tool on offer.

    Attributes:
        kind: function, custom (its input is free text), or hosted (the provider runs it).
        format: the grammar of a custom tool's input, as OpenAI spells it.
        native: a hosted tool as its protocol spells it.
    """

    name: str
    description: str = ""
    schema: JsonObject | None = None
    strict: bool | None = None
    kind: str = "function"
    format: JsonObject | None = None
    native: Native | None = None
    cache: str = ""
    namespace: str = ""


class ToolChoice(NamedTuple):
    """mode: auto, none, required, named (names[0]), or allowed (one of names, if `must`)."""

    mode: str
    names: tuple[str, ...] = ()
    must: bool = False


class OutputFormat(NamedTuple):
    """kind: json_object, or json_schema with its schema."""

    kind: str
    name: str = "response"
    description: str = ""
    schema: JsonObject | None = None
    strict: bool | None = None


class Thinking(NamedTuple):
    """How much the model may reason.

    Attributes:
        effort: none, minimal, low, medium, high, xhigh, max; "" if nothing was said.
        budget: tokens, where the caller counted them.
        adaptive: the caller leaves it to the model.
        visible: whether the caller wants to read it; None if nothing was said.
    """

    effort: str = ""
    budget: int | None = None
    adaptive: bool = False
    visible: bool | None = None


class Voice(NamedTuple):
    """How a spoken answer should sound. form: wav, pcm16 and so on, as OpenAI calls them."""

    name: str = ""
    form: str = "pcm16"


class Sampling(NamedTuple):
    """logprobs: None for none, else how many alternatives per token."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: JsonObject | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None


class Prompt(NamedTuple):
    """A request to a model, in no protocol in particular.

    Attributes:
        wants_usage: the caller wants it in a stream (Chat Completions asks).
        cache: time to live of a cache mark on the whole prompt.
        legacy_functions: the caller speaks of functions rather than of tools.
        makes: what the answer may be made of, where it is more than text: text, image, audio.
        extra: fields that have no neutral form, as the caller spelt them.
    """

    model: str
    messages: tuple[Message, ...]
    source: ApiProtocol = ApiProtocol.CHAT_COMPLETIONS
    stream: bool = False
    wants_usage: bool = True
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    parallel_tools: bool | None = None
    output: OutputFormat | None = None
    thinking: Thinking = Thinking()
    verbosity: str = ""
    tier: str = ""
    user: str = ""
    cache_key: str = ""
    cache: str = ""
    metadata: JsonObject | None = None
    store: bool | None = None
    legacy_functions: bool = False
    makes: tuple[str, ...] = ()
    voice: Voice | None = None
    extra: JsonObject = {}  # noqa: RUF012  a NamedTuple's default, never changed


class Traits(NamedTuple):
    """What a target's model takes, as far as it is known; an unknown one takes everything.

    Attributes:
        vendor: who reads the opaque state that is sent there, and mints what comes back.
        official: the protocol's own vendor is behind it, not a server that is compatible.
        max_output: tokens; 0 if unknown.
        max_tokens_field: how Chat Completions spells it there.
        efforts: the levels of reasoning effort that it knows, lowest first.
        thinking: Claude's and Gemini's way of asking: adaptive, budget, level, or "" for none.
        can_stop_thinking: it takes an order not to reason.
        sampling: it takes temperature and the like.
        stops: it takes stop sequences.
        forced_tools: it takes an order to call a tool.
        schema: its way to structured output: native, tool, prompt, or legacy (Gemini's Schema).
        inline_system: it takes system messages in the middle of a conversation.
        prefill: the conversation may end with the assistant.
        developer_role: it knows that role.
        custom_tools: it knows tools whose input is free text.
        call_ids: it wants function calls to keep their ids.
        fetches_urls: it gets media by URL itself.
        answer_tool: what to call a tool whose input is the answer.
        many: it makes several choices in one answer.
        echoes_reasoning: it wants its plain reasoning back.
        breakpoints: it takes marks of what to keep in its prompt cache (OpenAI's protocols).
        draws: it is known to make images.
    """

    vendor: str = ""
    official: bool = False
    max_output: int = 0
    max_tokens_field: str = "max_tokens"
    efforts: tuple[str, ...] = ()
    thinking: str = ""
    can_stop_thinking: bool = True
    sampling: bool = True
    stops: bool = True
    forced_tools: bool = True
    schema: str = "native"
    inline_system: bool = False
    prefill: bool = True
    developer_role: bool = False
    custom_tools: bool = False
    call_ids: bool = True
    fetches_urls: bool = True
    answer_tool: str = "json_output"
    many: bool = True
    echoes_reasoning: bool = False
    breakpoints: bool = False
    draws: bool = False


# What a model answers.


class Open(NamedTuple):
    """A block begins: with no text yet, but with all else that is known of it."""

    key: int
    block: Block
    choice: int = 0


class Delta(NamedTuple):
    """More text of a block, or more of a call's arguments."""

    key: int
    text: str
    logprobs: tuple[JsonObject, ...] = ()


class Cite(NamedTuple):
    key: int
    citation: Citation


class Close(NamedTuple):
    """A block is complete."""

    key: int
    opaque: Opaque | None = None


class Finished(NamedTuple):
    """A choice is complete.

    Attributes:
        raw: the provider's own word for it.
        stop_sequence: the one that was hit, if the provider says.
        detail: more of it, for people.
        goes_on: whether the model says more if it is asked to: StreamDecoder.resume.
    """

    finish: Finish
    choice: int = 0
    raw: str = ""
    stop_sequence: str | None = None
    detail: str = ""
    goes_on: bool = False


StreamPart: TypeAlias = Open | Delta | Cite | Close | Finished


class Choice(NamedTuple):
    """One answer, put together from its parts."""

    content: tuple[Block, ...]
    finished: Finished


class AnswerLabel(NamedTuple):
    """What an answer that we render is called, when it was made (epoch seconds), and by what.

    Attributes:
        input_tokens: of the request, as far as is known when the answer begins.
    """

    id: str
    created: int
    model: str
    input_tokens: int = 0


class Loss(NamedTuple):
    """Something that a translation dropped, bent or emulated.

    Attributes:
        harmful: the answer may differ by it; `x-bitrouter-strict` makes it an error.
    """

    code: str
    field: str
    harmful: bool = True


class Losses:
    """What a translation could not carry over."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[Loss] = []

    def add(self, code: str, name: str, *, harmful: bool = True) -> None:
        loss = Loss(code, name, harmful)
        if loss not in self.found:
            self.found.append(loss)


class StreamState:
    """What a stream has shown so far.

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


class StreamDecoder(Protocol):
    """A provider's answer -> StreamParts.

    Attributes:
        model: what the provider calls the model that answers; "" until it says.
        lost: kinds of content that have no neutral form and were passed over.
    """

    model: str
    lost: set[str]

    def feed(self, value: JsonObject) -> list[StreamPart]:
        """One event's JSON."""
        ...

    def finish(self) -> list[StreamPart]:
        """The stream has ended as it should: what is open closes, what is due is said."""
        ...

    def whole(self, value: JsonObject) -> list[StreamPart]:
        """An answer that came in one piece."""
        ...

    def resume(self, body: JsonObject) -> JsonObject:
        """The request that goes on where the model has paused. body: the one that it answered."""
        ...


class StreamEncoder(Protocol):
    """StreamParts -> the bytes of a protocol's event stream."""

    def encode(self, part: StreamPart) -> bytes: ...

    def end(self, usage: Usage) -> bytes:
        """What ends a stream in order."""
        ...

    def fail(self, error: BitrouterError) -> bytes:
        """What ends a stream that went wrong."""
        ...


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
        mend: an answer or an event of a server that speaks the protocol with an accent, as the
            SDKs can read it: None if it is well as it is, an empty object if it must not travel.
        parse_request: a caller's request -> Prompt. Raises BadRequest, naming the field.
        render_request: Prompt -> a provider's request; what is lost on the way is added to Losses.
        render_response: an answer for a caller, whole.
        decoder: reads a provider's answers; takes the vendor whose opaque state they hold.
        encoder: writes a caller's stream.
        names: what a tool may be called.
        sealed: whether a request to a provider of its own protocol may hold an envelope of ours.
        unseal: open what belongs to the vendor and take out the rest; whether there was any.
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
    mend: Callable[[StreamState, JsonObject], JsonObject | None]
    fail_stream: Callable[[BitrouterError, StreamState, bytes], bytes]
    parse_request: Callable[[JsonObject], Prompt]
    render_request: Callable[[Prompt, Traits, Losses], JsonObject]
    render_response: Callable[[Prompt, AnswerLabel, list[Choice], Usage, Losses], JsonObject]
    decoder: Callable[[str], StreamDecoder]
    encoder: Callable[[Prompt, AnswerLabel], StreamEncoder]
    names: re.Pattern[str]
    sealed: Callable[[JsonObject], bool]
    unseal: Callable[[JsonObject, str], bool]


# Between blocks and parts.


def text_of(block: Block) -> str:
    """What grows in a block: its text, or a call's arguments."""
    if isinstance(block, ToolCall):
        return block.arguments
    return "" if isinstance(block, Media) else block.text


def with_text(block: Block, text: str) -> Block:
    if isinstance(block, ToolCall):
        return block._replace(arguments=text)
    return block if isinstance(block, Media) else block._replace(text=text)


def parts_of(block: Block, key: int, choice: int = 0) -> Iterator[StreamPart]:
    """A block that came whole, as the parts of a stream."""
    text, opaque = text_of(block), None
    empty = with_text(block, "")
    logprobs: tuple[JsonObject, ...] = ()
    if isinstance(empty, Text):
        logprobs, empty = empty.logprobs, Text()
    elif isinstance(empty, Reasoning):
        opaque, empty = empty.opaque, Reasoning()
    yield Open(key, empty, choice)
    if text or logprobs:
        yield Delta(key, text, logprobs)
    for citation in block.citations if isinstance(block, Text) else ():
        yield Cite(key, citation)
    yield Close(key, opaque)


class Gatherer:
    """StreamParts -> Choices."""

    __slots__ = ("_blocks", "_cited", "_finished", "_grown", "_logprobs")

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[int, Block]] = {}
        self._grown: dict[int, list[str]] = {}
        self._cited: dict[int, list[Citation]] = {}
        self._logprobs: dict[int, list[JsonObject]] = {}
        self._finished: dict[int, Finished] = {}

    def add(self, part: StreamPart) -> None:
        match part:
            case Delta(key, text, logprobs):
                self._grown[key].append(text)
                if logprobs:
                    self._logprobs.setdefault(key, []).extend(logprobs)
            case Open(key, block, choice):
                self._blocks[key] = (choice, block)
                self._grown[key] = []
            case Cite(key, citation):
                self._cited.setdefault(key, []).append(citation)
            case Close(key, opaque):
                choice, block = self._blocks[key]
                if opaque and isinstance(block, Reasoning):
                    self._blocks[key] = (choice, block._replace(opaque=opaque))
            case Finished():
                self._finished.setdefault(part.choice, part)

    def choices(self) -> list[Choice]:
        """What has come so far; never empty."""
        contents: dict[int, list[Block]] = {index: [] for index in self._finished or (0,)}
        for key, (choice, block) in self._blocks.items():
            block = with_text(block, "".join(self._grown[key]))
            if isinstance(block, Text):
                cited, logprobs = self._cited.get(key, ()), self._logprobs.get(key, ())
                block = block._replace(citations=tuple(cited), logprobs=tuple(logprobs))
            contents.setdefault(choice, []).append(block)
        return [
            Choice(tuple(blocks), self._finished.get(index, Finished(Finish.STOP, index)))
            for index, blocks in sorted(contents.items())
        ]


class InOrder:
    """Parts in which blocks overlap -> parts in which one closes before the next one opens.

    Chat Completions lets calls grow side by side; the other protocols do not. What belongs to a
    later block waits, up to a bound.
    """

    __slots__ = ("_at", "_waiting", "_waiting_chars")

    def __init__(self) -> None:
        self._at: int | None = None
        self._waiting: dict[int, list[StreamPart]] = {}
        self._waiting_chars = 0

    def feed(self, part: StreamPart) -> list[StreamPart]:
        """Raises UpstreamGarbled when too much waits."""
        if isinstance(part, Finished):
            return [part]
        if self._at is None and isinstance(part, Open):
            self._at = part.key
        if part.key == self._at:
            return [part, *self._next()] if isinstance(part, Close) else [part]
        self._waiting.setdefault(part.key, []).append(part)
        self._waiting_chars += len(part.text) if isinstance(part, Delta) else 0
        if self._waiting_chars > MAX_EVENT_BYTES:
            raise UpstreamGarbled("the provider lets too many blocks grow at once")
        return []

    def _next(self) -> list[StreamPart]:
        """What waited, in the order in which it began, up to a block that is not complete."""
        out: list[StreamPart] = []
        self._at = None
        while self._waiting and self._at is None:
            key, parts = next(iter(self._waiting.items()))
            del self._waiting[key]
            out += parts
            self._at = None if isinstance(parts[-1], Close) else key
        self._waiting_chars = self._waiting_chars if self._waiting else 0
        return out


# ---------------------------------------------------------------------------------------------
# 6. rosetta: what the protocols call the same thing, and what their codecs share (pure)
# ---------------------------------------------------------------------------------------------


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

# Why a model stopped. The first row with a meaning is how it is written; every row is read.
# For Responses: its status, or the reason that makes it incomplete.
# wire: the references of the four APIs, read 2026-11
FINISH_ROSETTA = (
    # canonical              Chat              Responses            Messages         generateContent
    (Finish.STOP,            "stop",           "completed",         "end_turn",      "STOP"),
    (Finish.STOP_SEQUENCE,   "stop",           "completed",         "stop_sequence", "STOP"),
    (Finish.TOOL_CALLS,      "tool_calls",     "completed",         "tool_use",      "STOP"),
    (Finish.TOOL_CALLS,      "function_call",  "",                  "",              ""),
    (Finish.LENGTH,          "length",         "max_output_tokens", "max_tokens",    "MAX_TOKENS"),
    (Finish.LENGTH,          "",               "max_messages",      "", "CONTINUATION"),
    (Finish.CONTEXT_WINDOW,  "length",         "max_output_tokens",
     "model_context_window_exceeded", "MAX_TOKENS"),
    (Finish.CONTENT_FILTER,  "content_filter", "content_filter",    "refusal",       "SAFETY"),
    (Finish.REFUSAL,         "stop",           "completed",         "refusal",       "SAFETY"),
    (Finish.PAUSE,           "length",         "max_output_tokens", "pause_turn",    "OTHER"),
    (Finish.MALFORMED,       "",               "",                  "", "MALFORMED_FUNCTION_CALL"),
    (Finish.MALFORMED,       "",               "",                  "",     "MALFORMED_RESPONSE"),
    (Finish.MALFORMED,       "",               "",                  "",     "UNEXPECTED_TOOL_CALL"),
    (Finish.MALFORMED,       "",               "",                  "",     "TOO_MANY_TOOL_CALLS"),
    (Finish.STOP,            "",               "steered", "", "FINISH_REASON_UNSPECIFIED"),
    *((Finish.CONTENT_FILTER, "", "", "", reason) for reason in (
        "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "IMAGE_OTHER", "NO_IMAGE", "ESCALATION",
        "MODEL_ARMOR", "PUP_LIMITED_DISABLED",
    )),
)

# How much a model may reason, for models that count tokens instead of knowing levels: the budget
# that a level becomes at Claude and at Gemini 2.5, and the highest budget that is read as it.
EFFORT_ROSETTA = (
    # effort     Claude  Gemini  read up to
    ("none",          0,      0,         0),
    ("minimal",   1_024,    512,     1_024),
    ("low",       2_048,  2_048,     4_096),
    ("medium",    8_192,  8_192,    12_288),
    ("high",     16_384, 24_576,    24_576),
    ("xhigh",    24_576, 32_768,    32_768),
    ("max",      32_000, 32_768, 1_000_000_000),
)
# fmt: on
ERROR_WORDS = {kind: ErrorWords(*words) for kind, *words in _ERROR_ROSETTA}
EFFORTS = tuple(row[0] for row in EFFORT_ROSETTA)


def finish_words(column: int) -> tuple[dict[Finish, str], dict[str, Finish]]:
    """How one protocol writes each finish, and what each of its words means."""
    written: dict[Finish, str] = {}
    read: dict[str, Finish] = {}
    for row in FINISH_ROSETTA:
        written.setdefault(row[0], row[column])
        if row[column]:
            read.setdefault(row[column], row[0])
    return written, read


def effort_of(budget: int) -> str:
    """The level that a budget of reasoning tokens stands for; "" for a dynamic one (-1)."""
    if budget < 0:
        return ""
    return next(effort for effort, *_, up_to in EFFORT_ROSETTA if budget <= up_to)


def nearest_effort(effort: str, known: tuple[str, ...]) -> str:
    """The level itself, or the next lower one that is known, or else the lowest."""
    if not known or effort in known:
        return effort
    if effort not in EFFORTS:
        return ""
    below = [level for level in known if EFFORTS.index(level) < EFFORTS.index(effort)]
    return below[-1] if below else known[0]


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


def nothing_to_mend(state: StreamState, value: JsonObject) -> None:
    """For protocols whose servers are not known for an accent."""


def words_of(*values: Json) -> frozenset[str]:
    return frozenset(value.lower() for value in values if isinstance(value, str))


def type_of(data: bytes) -> str:
    """The `type` of an event's JSON, which names the event in two of the protocols."""
    with suppress(ValueError, RecursionError):
        name = dig(parse_json(data), "type")
        if isinstance(name, str) and re.fullmatch(r"[\w.]+", name):
            return name
    return "message"


# Opaque state on its way through a caller of another protocol. It travels in an envelope, where
# that protocol keeps its own state; only the vendor who minted it gets it back.

ENVELOPE = "br1."

# What stands for the state of reasoning that came with none: so sealed, it is known as ours when it
# comes back, and is not shown to a vendor who never signed it.
UNSIGNED = Opaque("", "none", "")
_MAX_SEALED_CHARS = 1024 * 1024


def seal(opaque: Opaque) -> str:
    """Opaque state as text of URL-safe base64."""
    facts = {"v": opaque.vendor, "m": opaque.model, "k": opaque.kind, "id": opaque.id}
    sealed = base64.urlsafe_b64encode(compact({**facts, "d": opaque.data}))
    return ENVELOPE + sealed.decode().rstrip("=")


def unseal(text: Json) -> Opaque | None:
    """What is in an envelope of ours; None if it is not one, or not whole."""
    if not isinstance(text, str) or not text.startswith(ENVELOPE):
        return None
    if len(text) > _MAX_SEALED_CHARS:
        return None
    with suppress(ValueError, RecursionError):
        facts = parse_json(from_base64(text[len(ENVELOPE) :]))
        told = [dig(facts, key) for key in ("v", "k", "d", "m", "id")]
        if all(isinstance(one, str) for one in told):
            return Opaque(*told)
    return None


def minted(text: Json, vendor: str, kind: str, ident: str = "") -> Opaque | None:
    """State that a provider sends: its own, whatever it looks like."""
    return Opaque(vendor, kind, text, id=ident) if isinstance(text, str) and text else None


def opaque_from(text: Json, vendor: str, kind: str, ident: str = "") -> Opaque | None:
    """State that a caller sends back: sealed by us, or its own protocol's vendor's."""
    if isinstance(text, str) and text.startswith(ENVELOPE):
        return unseal(text)
    return minted(text, vendor, kind, ident)


def sealed_for(opaque: Opaque, vendor: str, kind: str) -> str:
    """State as a caller gets it: bare if it is of the protocol's own vendor and kind."""
    return opaque.data if (opaque.vendor, opaque.kind) == (vendor, kind) else seal(opaque)


def from_base64(text: str) -> bytes:
    """Bytes from base64 of either alphabet, padded or not. Raises ValueError."""
    plain = re.sub(r"\s+", "", text).replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def standard_base64(text: str) -> str:
    """The same bytes in the standard alphabet, padded."""
    if "-" in text or "_" in text or len(text) % 4:
        plain = text.replace("-", "+").replace("_", "/").rstrip("=")
        return plain + "=" * (-len(plain) % 4)
    return text


# Media.

# wire: the formats' own signatures, as PNG, JPEG, GIF, WEBP and PDF files begin
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"),
    (b"%PDF-", "application/pdf"),
)  # fmt: skip
MIME_BY_SUFFIX = {
    "png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "gif": "image/gif",
    "webp": "image/webp", "pdf": "application/pdf", "txt": "text/plain", "md": "text/markdown",
    "csv": "text/csv", "html": "text/html", "json": "application/json", "wav": "audio/wav",
    "mp3": "audio/mp3", "mp4": "video/mp4", "heic": "image/heic",
}  # fmt: skip


def sniff(start: bytes) -> str:
    """The media type that a file's first bytes show; "" if they show none that we know."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "image/webp"
    return next((mime for mark, mime in _SIGNATURES if start.startswith(mark)), "")


def media_of_bytes(kind: str, mime: str, data: Json, where: str, **more: Any) -> Media:
    """Media whose bytes are here, in base64; what they are counts, not what they are called."""
    if not isinstance(data, str) or not data:
        raise BadRequest(f"{where}: expected base64 data", param=where)
    data = standard_base64(data)
    with suppress(ValueError):
        mime = sniff(from_base64(data[:64])) or mime
    return Media(kind, mime.partition(";")[0], data, **more)


def media_at(kind: str, url: Json, where: str, **more: Any) -> Media:
    """Media at a URL, or in it (RFC 2397). Raises BadRequest."""
    if not isinstance(url, str) or not url:
        raise BadRequest(f"{where}: expected a URL, got {show_json(url)}", param=where)
    if not url.startswith("data:"):
        return Media(kind, more.pop("mime", "") or mime_of_path(url), url=url, **more)
    head, comma, data = url[5:].partition(",")
    if not comma:
        raise BadRequest(f"{where}: this data URL has no comma, so no data", param=where)
    mime, *flags = head.split(";")
    if "base64" not in flags:
        data = base64.b64encode(unquote_to_bytes(data)).decode()
    more.pop("mime", None)
    return media_of_bytes(kind, mime or "text/plain", data, where, **more)


def openai_file(file: JsonObject, data: Json, where: str, cache: str) -> Media:
    """A file as OpenAI's two protocols spell it. data: a URL, or bare base64."""
    name = str(file.get("filename") or "")
    if isinstance(file.get("file_id"), str):
        return Media("document", file_id=file["file_id"], vendor="openai", name=name, cache=cache)
    if isinstance(data, str) and not data.startswith(("data:", "http:", "https:")):
        data = f"data:{mime_of_path('file://x/' + name) or 'application/pdf'};base64,{data}"
    return media_at("document", data, f"{where}.file_data", name=name, cache=cache)


def mime_of_path(url: str) -> str:
    with suppress(ValueError):  # what is no URL has no suffix either
        suffix = urlsplit(url).path.rpartition(".")[2].lower() if "://" in url else ""
        return MIME_BY_SUFFIX.get(suffix, "")
    return ""


def data_url(media: Media) -> str:
    return f"data:{media.mime or 'application/octet-stream'};base64,{media.data}"


# wire: ai.google.dev/gemini-api/docs/speech-generation and OpenAI's pcm16, read 2026-11: both are
# 24 kHz, mono, 16 bits, the low byte first
PCM = "audio/L16;codec=pcm;rate=24000"


def as_wav(media: Media) -> Media:
    """A recording of bare samples as a file that says what it is."""
    samples = from_base64(media.data)
    rate = int(found[1]) if (found := re.search(r"rate=(\d{4,6})", media.mime)) else 24_000
    chunks = (
        (b"WAVEfmt ", 16, struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)),
        (b"data", len(samples), samples),
    )
    told = b"".join(name + struct.pack("<I", size) + content for name, size, content in chunks)
    file = b"RIFF" + struct.pack("<I", len(told)) + told
    return media._replace(mime="audio/wav", data=base64.b64encode(file).decode())


def kind_of_mime(mime: str) -> str:
    first = mime.partition("/")[0]
    return first if first in ("image", "audio", "video") else "document"


def text_in(media: Media) -> str | None:
    """The text of a plain document; None if it is none."""
    if not media.data or not (media.mime.startswith("text/") or media.mime == "application/json"):
        return None
    with suppress(ValueError):
        return from_base64(media.data).decode("utf-8", "replace")
    return None


def made_of(modalities: Json, where: str) -> tuple[str, ...]:
    """What an answer may be made of, where a request says so and it is not just text."""
    found = tuple(one.lower() for one in strings_in(modalities, where))
    return () if set(found) <= {"text"} else found


# Reading requests. `where` is the place of a value, such as messages[2].content[0].


def typed(value: Json, kind: type[T], where: str) -> T:
    """The value, if it has that type. Raises BadRequest."""
    if not isinstance(value, kind):
        raise BadRequest(
            f"{where}: expected {JSON_TYPES[kind]}, got {show_json(value)}", param=where
        )
    return value


def each_object(value: Json, where: str) -> Iterator[tuple[str, JsonObject]]:
    """The objects of a list, each with its place; nothing for null. Raises BadRequest."""
    for n, item in enumerate(typed(value, list, where) if value is not None else ()):
        here = f"{where}[{n}]"
        yield here, typed(item, dict, here)


def number(body: JsonObject, key: str) -> float | None:
    """A number, or None for none. Raises BadRequest."""
    value = body.get(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -1e300 < value < 1e300:
        raise BadRequest(f"{key}: expected a number, got {show_json(value)}", param=key)
    return float(value) if isinstance(value, float) else int(value)


def count_in(body: JsonObject, key: str) -> int | None:
    """A whole number from 0, or None for none. Raises BadRequest."""
    value = number(body, key)
    if value is None:
        return None
    if value < 0 or value > 1e15 or value != int(value):
        found = show_json(value)
        raise BadRequest(f"{key}: expected a whole number from 0, got {found}", param=key)
    return int(value)


def strings_in(value: Json, where: str) -> tuple[str, ...]:
    """A string or a list of them. Raises BadRequest."""
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else typed(value, list, where)
    return tuple(typed(one, str, f"{where}[{n}]") for n, one in enumerate(values))


def the_rest(body: JsonObject, known: frozenset[str]) -> JsonObject:
    """Fields that have no neutral form and hold something."""
    return {k: v for k, v in body.items() if k not in known and v is not None}


def no_nulls(fields: JsonObject) -> JsonObject:
    """Fields without those that have no value: absent is not null to every server."""
    return {key: value for key, value in fields.items() if value is not None}


def object_in(text: str) -> JsonObject | None:
    """The object that a call's arguments hold, where they must be one; None for other text."""
    if not text.strip():
        return {}
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
        return {"input": value}
    return None


_MAX_USER_CHARS = 64  # wire: platform.openai.com, safety_identifier, read 2026-11


def short_user(user: str) -> str:
    """A name for the end user as OpenAI takes it: one that is too long as its hash."""
    if len(user) <= _MAX_USER_CHARS:
        return user
    return hashlib.sha256(user.encode("utf-8", "replace")).hexdigest()


def without_cut_call(choice: Choice, losses: Losses) -> Choice:
    """A choice without the call in whose middle the tokens ran out: to protocols whose arguments
    are objects it would look whole."""
    if choice.finished.finish is not Finish.LENGTH:
        return choice
    whole_blocks = tuple(
        b
        for b in choice.content
        if not isinstance(b, ToolCall) or object_in(b.arguments) is not None
    )
    if len(whole_blocks) < len(choice.content):
        losses.add("dropped", "tool_call", harmful=False)
    return choice._replace(content=whole_blocks)


def joined_text(content: Iterable[Content], between: str = "\n\n") -> str:
    return between.join(part.text for part in content if isinstance(part, Text))


def size_of(prompt: Prompt) -> int:
    """Characters of a conversation, to count tokens by: about four make one."""
    size = sum(len(tool.description) + len(str(tool.schema or "")) for tool in prompt.tools)
    for message in prompt.messages:
        for part in message.content:
            inner = part.content if isinstance(part, ToolResult) else (part,)
            size += sum(_size_of_part(one) for one in inner)
    return size


def _size_of_part(part: Content) -> int:
    match part:
        case Text() | Refusal() | Reasoning():
            return len(part.text)
        case ToolCall():
            return len(part.name) + len(part.arguments)
        case Media():
            return 4 * 1024  # about what an image costs, whatever its size
    return 0


def weight_of(content: Iterable[Content]) -> int:
    """Characters that content holds in memory, media and state included."""
    weight = 0
    for part in content:
        match part:
            case ToolResult():
                weight += weight_of(part.content)
            case Media():
                weight += len(part.data) + len(part.url)
            case Native():
                weight += len(str(part.value))
            case _:
                weight += len(text_of(part))
        opaque = part.opaque if isinstance(part, Reasoning | ToolCall) else None
        weight += len(opaque.data) if opaque else 0
    return weight


def turns(messages: Iterable[Message]) -> list[Message]:
    """Messages of one role in a row as one, the results of tools first in it."""
    merged: list[Message] = []
    run: list[Content] = []
    role = ""
    for message in messages:
        if message.role != role:
            if run:
                merged.append(Message(role, _results_first(run)))
            run, role = [], message.role
        run += message.content
    if run:
        merged.append(Message(role, _results_first(run)))
    return merged


def _results_first(content: list[Content]) -> tuple[Content, ...]:
    results = [part for part in content if isinstance(part, ToolResult)]
    if not results:
        return tuple(content)
    return (*results, *(part for part in content if not isinstance(part, ToolResult)))


def with_named_results(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Messages in which each result has the name of its tool. Raises BadRequest for a result that
    no call before it asked for."""
    names: dict[str, str] = {}
    done: list[Message] = []
    for message in messages:
        content = list(message.content)
        for n, part in enumerate(content):
            if isinstance(part, ToolCall):
                names[part.id] = part.name
            elif isinstance(part, ToolResult) and part.call_id not in names:
                found = show_json(part.call_id)
                raise BadRequest(f"input: no call before has the id {found}", param="call_id")
            elif isinstance(part, ToolResult) and not part.name:
                content[n] = part._replace(name=names[part.call_id])
        done.append(message._replace(content=tuple(content)))
    return tuple(done)


# wire: platform.openai.com/docs/guides/prompt-caching, read 2026-11; the one time to live there is
OPENAI_BREAKPOINT: JsonObject = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}

# How a hosted web search is asked for, where it is.
WEB_SEARCH = "web_search"


def refuse_part(part: Media, target: str) -> UpstreamUnfit:
    """What to raise for media that a protocol has no place for."""
    shown = part.mime or part.kind
    return UpstreamUnfit(
        f"{part.kind} input ({shown}) cannot be sent to a model behind {target}; "
        "ask a model that takes it",
        code="unsupported_modality",
        param=part.kind,
    )


# ---------------------------------------------------------------------------------------------
# 7. schema: the dialects of JSON Schema that providers take (pure)
# ---------------------------------------------------------------------------------------------
# Each function gives back a new schema and leaves the old one alone. Depth is bounded: schemas
# come from strangers.
#
# wire: platform.openai.com/docs/guides/structured-outputs, docs.claude.com/en/docs/build-with-
# claude/structured-outputs, ai.google.dev/gemini-api/docs/structured-output; read 2026-11

_MAX_DEPTH = 64
_MAX_INLINED = 8  # levels of $ref that are written out for a dialect without them
_MAX_NODES = 20_000

# Keywords whose value is a schema, a list of them, or an object of them.
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")


def mapped(schema: Json, change: Callable[[JsonObject], JsonObject], depth: int = 0) -> Json:
    """A schema in which every schema is changed, the innermost first. Raises BadRequest."""
    if not isinstance(schema, dict):
        return schema
    if depth > _MAX_DEPTH:
        raise BadRequest("a JSON schema is nested too deeply", param="schema")
    new = dict(schema)
    for key in _ONE:
        if isinstance(new.get(key), dict):
            new[key] = mapped(new[key], change, depth + 1)
    for key in _MANY:
        if isinstance(new.get(key), list):
            new[key] = [mapped(one, change, depth + 1) for one in new[key]]
    for key in _NAMED:
        if isinstance(new.get(key), dict):
            new[key] = {name: mapped(one, change, depth + 1) for name, one in new[key].items()}
    return change(new)


def object_schema(schema: JsonObject | None) -> JsonObject:
    """A schema for a tool's input, which must be an object."""
    if not schema:
        return {"type": "object", "properties": {}}
    if "type" not in schema and not any(key in schema for key in (*_MANY, "$ref")):
        return {"type": "object", **schema}
    return schema


def is_recursive(schema: Json) -> bool:
    """Whether a schema refers to itself, so that it cannot be written out."""
    targets = _definitions(schema)
    edges = {name: _references(target) for name, target in targets.items()}

    def reaches(name: str, goal: str, seen: set[str]) -> bool:
        for following in edges.get(name, ()):
            if following == goal:
                return True
            if following not in seen:
                seen.add(following)
                if reaches(following, goal, seen):
                    return True
        return False

    return "#" in _references(schema) or any(reaches(name, name, set()) for name in edges)


def _definitions(schema: Json) -> dict[str, Json]:
    return {
        f"#/{key}/{name}": one
        for key in ("$defs", "definitions")
        for name, one in as_object(dig(schema, key)).items()
    }


def _references(schema: Json) -> set[str]:
    found: set[str] = set()

    def note(one: JsonObject) -> JsonObject:
        if isinstance(one.get("$ref"), str):
            found.add(one["$ref"])
        return one

    mapped(schema, note)
    return found


# OpenAI's strict subset.

_NOT_STRICT = ("oneOf", "allOf", "not", "if", "patternProperties")


def strict_for_openai(schema: Json) -> JsonObject | None:
    """The schema as OpenAI's strict mode takes it; None if that would change what it means."""
    allowed = True

    def close(one: JsonObject) -> JsonObject:
        nonlocal allowed
        if one.get("type") == "object" or "properties" in one:
            properties = as_object(one.get("properties"))
            required = as_list(one.get("required"))
            if set(properties) != {name for name in required if isinstance(name, str)}:
                allowed = False
            if not all(isinstance(name, str) for name in required):
                allowed = False
            if one.get("additionalProperties") not in (None, False):
                allowed = False
            one = {**one, "additionalProperties": False}
        if any(key in _NOT_STRICT or key.startswith("dependent") for key in one):
            allowed = False
        if "$ref" in one and len(one) > 1:
            allowed = False
        return one

    new = mapped(schema, close)
    root_is_object = dig(new, "type") == "object" and "anyOf" not in new
    return new if allowed and root_is_object else None


def openai_schema(
    schema: JsonObject, strict: bool | None, losses: Losses, where: str
) -> tuple[JsonObject, bool | None]:
    """A schema and whether it is strict, as OpenAI takes them: strict only if it can be."""
    if not strict:
        return schema, strict
    fitting = strict_for_openai(schema)
    if fitting is None:
        losses.add("strict_schema_unsupported", where)
        return schema, False
    return fitting, True


# Anthropic's subset: what it lacks is said in words.

_CLAUDE_KEEPS = {
    "type", "enum", "const", "anyOf", "allOf", "$defs", "definitions", "$ref", "properties",
    "required", "items", "description", "title", "additionalProperties",
}  # fmt: skip
_CLAUDE_FORMATS = {
    "date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid",
}  # fmt: skip
_CLAUDE_UNSAID = ("$schema", "$id", "oneOf", "type")
_CLAUDE_MAX_OPTIONAL = 24
_CLAUDE_MAX_UNIONS = 16


def for_claude(schema: JsonObject) -> JsonObject | None:
    """The schema as `output_config.format` takes it; None if it is beyond what it takes."""
    if is_recursive(schema):
        return None
    optional = unions = 0

    def change(one: JsonObject) -> JsonObject:
        nonlocal optional, unions
        properties = as_object(one.get("properties"))
        optional += len(set(properties) - set(map(str, as_list(one.get("required")))))
        one = _for_claude(one)
        unions += "anyOf" in one or isinstance(one.get("type"), list)
        return one

    new: JsonObject = mapped(schema, change)
    return new if optional <= _CLAUDE_MAX_OPTIONAL and unions <= _CLAUDE_MAX_UNIONS else None


def _for_claude(one: JsonObject) -> JsonObject:
    if "$ref" in one:
        return {key: one[key] for key in ("$ref", "$defs", "definitions") if key in one}
    new = {key: value for key, value in one.items() if key in _CLAUDE_KEEPS}
    if "oneOf" in one:
        new.setdefault("anyOf", one["oneOf"])
    if str(one.get("format")) in _CLAUDE_FORMATS:
        new["format"] = one["format"]
    if one.get("minItems") in (0, 1):
        new["minItems"] = one["minItems"]
    if "enum" in new or "const" in new:
        new.pop("type", None)
    if new.get("type") == "object" or "properties" in new:
        new["additionalProperties"] = False
    else:
        new.pop("additionalProperties", None)
    lost = {k: v for k, v in one.items() if k not in new and k not in _CLAUDE_UNSAID}
    if lost:
        said = "; ".join(f"{key}: {show_json(value)}" for key, value in lost.items())
        new["description"] = f"{new['description']} ({said})" if "description" in new else said
    return new


# Gemini's two dialects: JSON Schema for newer models, an OpenAPI subset for older ones.

_GEMINI_KEEPS = {
    "$id", "$defs", "$ref", "$anchor", "type", "format", "title", "description", "enum", "items",
    "prefixItems", "minItems", "maxItems", "minimum", "maximum", "anyOf", "oneOf", "properties",
    "additionalProperties", "required", "propertyOrdering",
}  # fmt: skip


def for_gemini(schema: JsonObject) -> JsonObject:
    """The schema as `responseJsonSchema` and `parametersJsonSchema` take it."""
    if "definitions" in schema:
        defs = {**as_object(schema.get("definitions")), **as_object(schema.get("$defs"))}
        schema = {**{k: v for k, v in schema.items() if k != "definitions"}, "$defs": defs}

    def change(one: JsonObject) -> JsonObject:
        one = _without_all_of(_without_const(one))
        if isinstance(one.get("$ref"), str):
            target = one["$ref"].replace("#/definitions/", "#/$defs/")
            return {"$ref": target, **({"$defs": one["$defs"]} if "$defs" in one else {})}
        return {key: value for key, value in one.items() if key in _GEMINI_KEEPS}

    return as_object(mapped(schema, change))


def _without_const(one: JsonObject) -> JsonObject:
    if "const" not in one:
        return one
    return {**{k: v for k, v in one.items() if k != "const"}, "enum": [one["const"]]}


def _without_all_of(one: JsonObject) -> JsonObject:
    if "allOf" not in one:
        return one
    new = {k: v for k, v in one.items() if k != "allOf"}
    for part in as_list(one["allOf"]):
        for key, value in as_object(part).items():
            if key == "properties":
                new[key] = {**as_object(new.get(key)), **as_object(value)}
            elif key == "required":
                new[key] = list(dict.fromkeys([*as_list(new.get(key)), *as_list(value)]))
            else:
                new.setdefault(key, value)
    return new


_LEGACY_KEEPS = {
    "type", "format", "title", "description", "enum", "items", "minItems", "maxItems", "minimum",
    "maximum", "anyOf", "properties", "required", "propertyOrdering", "nullable", "minLength",
    "maxLength", "pattern",
}  # fmt: skip
_LEGACY_FORMATS = {"date-time", "enum", "int32", "int64", "float", "double"}


def for_old_gemini(schema: JsonObject) -> JsonObject:
    """The schema as `responseSchema` and `parameters` take it: types in capitals, no references."""
    nodes = [_MAX_NODES]

    def inline(one: Json, refs: int, depth: int) -> Json:
        nodes[0] -= 1
        if not isinstance(one, dict):
            return one
        target = one.get("$ref")
        if isinstance(target, str):
            found = dig(schema, *_steps(target))
            if refs >= _MAX_INLINED or nodes[0] < 0 or not isinstance(found, dict):
                return {"type": "object"}
            said = {k: v for k, v in one.items() if k not in ("$ref", "$defs", "definitions")}
            return inline({**found, **said}, refs + 1, depth + 1)
        if depth > _MAX_DEPTH:
            raise BadRequest("a JSON schema is nested too deeply", param="schema")
        new = {k: v for k, v in one.items() if k not in ("$defs", "definitions")}
        for key in ("items", "additionalProperties"):
            if isinstance(new.get(key), dict):
                new[key] = inline(new[key], refs, depth + 1)
        for key in _MANY:
            if isinstance(new.get(key), list):
                new[key] = [inline(each, refs, depth + 1) for each in new[key]]
        if isinstance(new.get("properties"), dict):
            named = new["properties"].items()
            new["properties"] = {name: inline(each, refs, depth + 1) for name, each in named}
        return new

    return as_object(mapped(inline(schema, 0, 0), _for_old_gemini))


def _steps(reference: str) -> list[str]:
    steps = reference.removeprefix("#").strip("/").split("/")
    return [step.replace("~1", "/").replace("~0", "~") for step in steps if step]


def _for_old_gemini(one: JsonObject) -> JsonObject:
    one = _without_all_of(_without_const(one))
    if "oneOf" in one:
        one = {**one, "anyOf": one["oneOf"]}
    one = _nullable(one)
    if "exclusiveMinimum" in one:
        one.setdefault("minimum", one["exclusiveMinimum"])
    new = {key: value for key, value in one.items() if key in _LEGACY_KEEPS}
    if isinstance(new.get("enum"), list):
        values = [value for value in new["enum"] if value is not None]
        new |= {"nullable": True} if len(values) < len(new["enum"]) else {}
        new["enum"] = [v if isinstance(v, str) else json.dumps(v) for v in values]
        new |= {"type": "string", "format": "enum"}
    elif str(new.get("format")) not in _LEGACY_FORMATS:
        new.pop("format", None)
    if isinstance(new.get("type"), str):
        new["type"] = new["type"].upper()
    return new


def _nullable(one: JsonObject) -> JsonObject:
    """Null among the types, or among the choices, as a flag beside them."""
    kinds, choices = one.get("type"), one.get("anyOf")
    if isinstance(kinds, list):
        named = [kind for kind in kinds if kind != "null"]
        one = {**one, "type": named[0] if named else "string"}
        one |= {"nullable": True} if len(named) < len(kinds) else {}
    if isinstance(choices, list):
        others = [choice for choice in choices if str(dig(choice, "type")).lower() != "null"]
        if len(others) < len(choices):
            one = {**{k: v for k, v in one.items() if k != "anyOf"}, "nullable": True}
            one |= as_object(others[0]) if len(others) == 1 else {"anyOf": others}
    return one


_GEMINI_NAMES = {
    "any_of": "anyOf", "min_items": "minItems", "max_items": "maxItems",
    "property_ordering": "propertyOrdering", "min_length": "minLength", "max_length": "maxLength",
    "min_properties": "minProperties", "max_properties": "maxProperties",
    "additional_properties": "additionalProperties",
}  # fmt: skip


def from_gemini(schema: Json) -> JsonObject:
    """JSON Schema from Gemini's `Schema`: small letters, null among the types."""
    if not isinstance(schema, dict):
        return {}
    respelt = _respelt(schema, 0)

    def change(one: JsonObject) -> JsonObject:
        new = dict(one)
        if isinstance(new.get("type"), str):
            new["type"] = new["type"].lower()
        if new.get("type") == "type_unspecified":
            del new["type"]
        nullable = new.pop("nullable", False)
        if nullable and "type" not in new and isinstance(new.get("anyOf"), list):
            new["anyOf"] = [*new["anyOf"], {"type": "null"}]
        elif nullable and "type" in new:
            new["type"] = [new["type"], "null"]
            if isinstance(new.get("enum"), list):
                new["enum"] = [*new["enum"], None]
        if new.get("format") == "enum":
            del new["format"]
        for key in ("minItems", "maxItems", "minLength", "maxLength"):  # wire: int64 as a string
            if isinstance(new.get(key), str) and new[key].isdigit():
                new[key] = int(new[key])
        return new

    return as_object(mapped(respelt, change))


def _respelt(schema: Json, depth: int) -> Json:
    if depth > 2 * _MAX_DEPTH:
        raise BadRequest("a JSON schema is nested too deeply", param="schema")
    if isinstance(schema, list):
        return [_respelt(one, depth + 1) for one in schema]
    if not isinstance(schema, dict):
        return schema
    new = {}
    for key, value in schema.items():
        if key in ("properties", "$defs") and isinstance(value, dict):
            new[key] = {name: _respelt(one, depth + 1) for name, one in value.items()}
        else:
            new[_GEMINI_NAMES.get(key, key)] = _respelt(value, depth + 1)
    return new


# ---------------------------------------------------------------------------------------------
# 8. chat: OpenAI Chat Completions (pure)
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
        and b'"tool_calls":[' not in block
        and b'"role"' not in block
        and b'"choices":[]' not in block
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


def _chat_mend(state: StreamState, chunk: JsonObject) -> JsonObject | None:
    """wire: some compatible servers leave out the role of calls, or repeat role, id or name, which
    SDKs add up; leave out a call's index, or give every call the same; say `stop` after
    calls; or send one more chunk after the usage, which makes SDKs forget it."""
    changed = False
    choices = as_list(chunk.get("choices"))
    for choice in choices:
        delta = dig(choice, "delta")
        place = f"choice {whole(dig(choice, 'index'))}"
        seen = state.memo.setdefault(place, {"role": False, "calls": {}})
        if isinstance(delta, dict):
            if seen["role"] and delta.pop("role", None) is not None:
                changed = True
            elif not seen["role"] and delta.get("tool_calls") and "role" not in delta:
                delta["role"] = "assistant"
                changed = True
            seen["role"] = True
            for call in as_list(delta.get("tool_calls")):
                changed = _chat_mend_call(seen["calls"], as_object(call)) or changed
        called = seen["calls"] or dig(choice, "message", "tool_calls")
        if called and dig(choice, "finish_reason") == "stop":
            choice["finish_reason"] = "tool_calls"
            changed = True
    if state.memo.get("usage") and not choices and not chunk.get("usage"):
        return {}
    state.memo["usage"] = state.memo.get("usage") or (bool(chunk.get("usage")) and not choices)
    return chunk if changed else None


def _chat_mend_call(calls: dict[Json, int], call: JsonObject) -> bool:
    """Give a call's delta its place. calls: ids, and given indices, of calls so far -> places."""
    ident, given = call.get("id"), call.get("index")
    given = given if isinstance(given, int) else None
    known = ident in calls if isinstance(ident, str) and ident else given in calls
    if known:
        place = calls[ident if isinstance(ident, str) and ident else given]
    elif isinstance(ident, str) and ident:
        place = len({*calls.values()})
        calls[ident] = calls[given] = place
    else:
        place = max(calls.values(), default=0)
        calls.setdefault(given, place)
    changed = given != place
    call["index"] = place
    function = as_object(call.get("function"))
    if known and (ident or function.get("name")):
        call.pop("id", None)
        call.pop("type", None)
        function.pop("name", None)
        changed = True
    return changed


def _chat_frame(event: SseEvent) -> bytes:
    return sse_encode(event.data)


def _chat_fail_stream(error: BitrouterError, state: StreamState, last: bytes) -> bytes:  # noqa: ARG001
    return sse_encode(compact(openai_render_error(error)))


# A caller's request, read.

_CHAT_KNOWN = frozenset({
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "top_k", "n", "stop", "seed", "presence_penalty", "frequency_penalty",
    "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
    "functions", "function_call", "response_format", "verbosity", "reasoning_effort", "reasoning",
    "service_tier", "user", "safety_identifier", "prompt_cache_key", "metadata", "store",
    "web_search_options", "modalities", "audio",
})  # fmt: skip


def _chat_parse_request(body: JsonObject) -> Prompt:
    messages = [
        _chat_message(one, here) for here, one in each_object(body.get("messages"), "messages")
    ]
    if not messages:
        raise BadRequest("messages: expected a list with at least one message", param="messages")
    limit = count_in(body, "max_completion_tokens")
    return Prompt(
        model=str(body.get("model")),
        messages=_chat_named_results(messages),
        source=ApiProtocol.CHAT_COMPLETIONS,
        stream=body.get("stream") is True,
        wants_usage=dig(body, "stream_options", "include_usage") is True,
        max_tokens=limit if limit is not None else count_in(body, "max_tokens"),
        sampling=_chat_sampling(body),
        tools=_chat_tools(body),
        tool_choice=_chat_tool_choice(body),
        parallel_tools=maybe(body, "parallel_tool_calls", bool),
        output=_chat_output(body),
        thinking=_chat_thinking(body),
        verbosity=maybe(body, "verbosity", str) or "",
        tier=maybe(body, "service_tier", str) or "",
        user=maybe(body, "safety_identifier", str) or maybe(body, "user", str) or "",
        cache_key=maybe(body, "prompt_cache_key", str) or "",
        metadata=maybe(body, "metadata", dict),
        store=maybe(body, "store", bool),
        legacy_functions=bool(body.get("functions")) and not body.get("tools"),
        makes=made_of(body.get("modalities"), "modalities"),
        voice=_chat_voice(maybe(body, "audio", dict)),
        extra=the_rest(body, _CHAT_KNOWN),
    )


def _chat_sampling(body: JsonObject) -> Sampling:
    wants_logprobs = maybe(body, "logprobs", bool)
    return Sampling(
        temperature=number(body, "temperature"),
        top_p=number(body, "top_p"),
        top_k=count_in(body, "top_k"),
        seed=maybe(body, "seed", int),
        presence_penalty=number(body, "presence_penalty"),
        frequency_penalty=number(body, "frequency_penalty"),
        logit_bias=maybe(body, "logit_bias", dict),
        stop=strings_in(body.get("stop"), "stop"),
        n=count_in(body, "n") or 1,
        logprobs=count_in(body, "top_logprobs") or 0 if wants_logprobs else None,
    )


def _chat_voice(audio: JsonObject | None) -> Voice | None:
    if audio is None:
        return None
    name, form = audio.get("voice"), audio.get("format")
    name = dig(name, "id") if isinstance(name, dict) else name
    return Voice(str(name or ""), typed(form, str, "audio.format"))


def _chat_thinking(body: JsonObject) -> Thinking:
    # wire: `reasoning` is OpenRouter's; openrouter.ai/docs/use-cases/reasoning-tokens, 2026-11
    effort = maybe(body, "reasoning_effort", str) or ""
    more = as_object(body.get("reasoning"))
    effort = effort or (more["effort"] if isinstance(more.get("effort"), str) else "")
    budget = whole(more.get("max_tokens")) or None
    if more.get("enabled") is False:
        effort = "none"
    visible = None if not effort and budget is None else effort != "none"
    return Thinking(effort, budget, visible=False if more.get("exclude") is True else visible)


def _chat_tools(body: JsonObject) -> tuple[Tool, ...]:
    tools = [_chat_tool(tool, here) for here, tool in each_object(body.get("tools"), "tools")]
    if body.get("web_search_options") is not None:
        tools.append(Tool(WEB_SEARCH, kind="hosted"))
    legacy = each_object(body.get("functions"), "functions")
    return (*tools, *(_chat_function(function, here) for here, function in legacy))


def _chat_tool(tool: JsonObject, where: str) -> Tool:
    kind = tool.get("type")
    if kind == "function":
        return _chat_function(typed(tool.get("function"), dict, f"{where}.function"), where)
    if kind == "custom":
        custom = typed(tool.get("custom"), dict, f"{where}.custom")
        grammar = as_object(custom.get("format"))
        flat = {**grammar, **as_object(grammar.get("grammar"))}
        flat.pop("grammar", None)
        return Tool(
            name=typed(custom.get("name"), str, f"{where}.custom.name"),
            description=str(custom.get("description") or ""),
            kind="custom",
            format=flat or None,
        )
    return Tool(str(kind), kind="hosted", native=Native(ApiProtocol.CHAT_COMPLETIONS, tool))


def _chat_function(function: JsonObject, where: str) -> Tool:
    return Tool(
        name=typed(function.get("name"), str, f"{where}.name"),
        description=maybe(function, "description", str) or "",
        schema=maybe(function, "parameters", dict),
        strict=maybe(function, "strict", bool),
    )


def _chat_tool_choice(body: JsonObject) -> ToolChoice | None:
    choice = body.get("tool_choice", body.get("function_call"))
    if choice is None:
        return None
    if choice in ("auto", "none", "required"):
        return ToolChoice(choice)
    typed(choice, dict, "tool_choice")
    if "allowed_tools" in choice:
        allowed = as_object(choice["allowed_tools"])
        tools = as_list(allowed.get("tools"))
        names = [dig(t, "function", "name") or dig(t, "custom", "name") for t in tools]
        must = allowed.get("mode") == "required"
        return ToolChoice("allowed", tuple(n for n in names if isinstance(n, str)), must)
    name = dig(choice, "function", "name") or dig(choice, "custom", "name") or choice.get("name")
    return ToolChoice("named", (typed(name, str, "tool_choice.function.name"),))


def _chat_output(body: JsonObject) -> OutputFormat | None:
    wanted = maybe(body, "response_format", dict) or {}
    if wanted.get("type") == "json_object":
        return OutputFormat("json_object")
    if wanted.get("type") != "json_schema":
        return None
    here = "response_format.json_schema"
    facts = typed(wanted.get("json_schema"), dict, here)
    return OutputFormat(
        "json_schema",
        name=str(facts.get("name") or "response"),
        description=str(facts.get("description") or ""),
        schema=typed(facts.get("schema", {}), dict, f"{here}.schema"),
        strict=maybe(facts, "strict", bool),
    )


_CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def _chat_message(message: JsonObject, where: str) -> Message:
    role = message.get("role")
    if role not in _CHAT_ROLES:
        known = ", ".join(_CHAT_ROLES)
        raise BadRequest(
            f"{where}.role: expected one of {known}; got {show_json(role)}", param=f"{where}.role"
        )
    content = _chat_content(message.get("content"), f"{where}.content")
    name = message.get("name") if isinstance(message.get("name"), str) else ""
    if role in ("tool", "function"):
        call_id = message.get("tool_call_id") if role == "tool" else f"name:{name}"
        call_id = typed(call_id, str, f"{where}.tool_call_id")
        results = tuple(part for part in content if isinstance(part, Text | Media))
        return Message("user", (ToolResult(call_id, results, name=name or ""),))
    if role == "assistant":
        if message.get("audio") and not content:
            raise BadRequest(
                f"{where}.audio: what was said is not kept here; send its transcript as `content`",
                param=f"{where}.audio",
            )
        content = (*_chat_reasoning(message), *content, *_chat_calls(message, where))
        if isinstance(message.get("refusal"), str) and message["refusal"]:
            content = (*content, Refusal(message["refusal"]))
    return Message(str(role), content, name or "")


def _chat_content(content: Json, where: str) -> tuple[Content, ...]:
    if content is None or content == "":
        return ()
    if isinstance(content, str):
        return (Text(content),)
    parts = (_chat_part(part, here) for here, part in each_object(content, where))
    return tuple(part for part in parts if part is not None)


def _chat_part(part: JsonObject, where: str) -> Content | None:
    mark = part.get("cache_control") or part.get("prompt_cache_breakpoint")
    cache = str(dig(mark, "ttl") or "5m") if mark else ""
    match part.get("type"):
        case "text":
            return Text(typed(part.get("text"), str, f"{where}.text"), cache=cache)
        case "refusal":
            return Refusal(typed(part.get("refusal"), str, f"{where}.refusal"))
        case "image_url":
            image = part.get("image_url")
            url, detail = (
                (image, "")
                if isinstance(image, str)
                else (dig(image, "url"), dig(image, "detail") or "")
            )
            return media_at("image", url, f"{where}.image_url.url", detail=str(detail), cache=cache)
        case "input_audio":
            audio = typed(part.get("input_audio"), dict, f"{where}.input_audio")
            mime = f"audio/{audio.get('format') or 'wav'}"
            return media_of_bytes("audio", mime, audio.get("data"), f"{where}.input_audio.data")
        case "file":
            file = typed(part.get("file"), dict, f"{where}.file")
            return openai_file(file, file.get("file_data"), f"{where}.file", cache)
        case "thinking":  # wire: Mistral's reasoning models; docs.mistral.ai, read 2026-11
            return None
    raise BadRequest(
        f"{where}.type: expected text, image_url, input_audio, file or refusal; "
        f"got {show_json(part.get('type'))}",
        param=f"{where}.type",
    )


def _chat_calls(message: JsonObject, where: str, vendor: str = "chat:?") -> Iterator[ToolCall]:
    for here, call in each_object(message.get("tool_calls"), f"{where}.tool_calls"):
        custom = call.get("type") == "custom"
        facts = typed(call.get("custom" if custom else "function"), dict, f"{here}.function")
        text = facts.get("input" if custom else "arguments")
        yield ToolCall(
            id=typed(call.get("id"), str, f"{here}.id"),
            name=typed(facts.get("name"), str, f"{here}.name"),
            arguments=text if isinstance(text, str) else json.dumps(text or {}),
            custom=custom,
            opaque=_chat_google_state(call, vendor),
        )
    legacy = message.get("function_call")
    if isinstance(legacy, dict):
        name = typed(legacy.get("name"), str, f"{where}.function_call.name")
        yield ToolCall(f"name:{name}", name, str(legacy.get("arguments") or ""))


def _chat_google_state(call: JsonObject, vendor: str) -> Opaque | None:
    """vendor: who minted it, unless it is marked as having come by way of us.

    wire: ai.google.dev/gemini-api/docs/openai: Google's own place for it, read 2026-11
    """
    signature = dig(call, "extra_content", "google", "thought_signature")
    via = str(dig(call, "extra_content", "via") or "")
    vendor = via.removeprefix(_CHAT_VIA) if via.startswith(_CHAT_VIA) else vendor
    return opaque_from(signature, vendor, "thought")


def _chat_named_results(messages: list[Message]) -> tuple[Message, ...]:
    """Results with the names of the tools that they come from; old functions get call ids."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    done: list[Message] = []
    for n, message in enumerate(messages):
        content: list[Content] = []
        for part in message.content:
            if isinstance(part, ToolCall):
                if part.id.startswith("name:"):
                    counts[part.name] = counts.get(part.name, -1) + 1
                    part = part._replace(id=f"call_{part.name}_{counts[part.name]}")
                names[part.id] = part.name
            elif isinstance(part, ToolResult):
                part = _chat_named_result(part, names, counts, f"messages[{n}]")
            content.append(part)
        done.append(message._replace(content=tuple(content)))
    return tuple(done)


def _chat_named_result(
    part: ToolResult, names: dict[str, str], counts: dict[str, int], where: str
) -> ToolResult:
    ident = part.call_id
    if ident.startswith("name:"):
        name = ident.removeprefix("name:")
        ident = f"call_{name}_{counts.get(name, 0)}"
    if ident not in names:
        raise BadRequest(
            f"{where}.tool_call_id: no call before it has the id {show_json(ident)}",
            param=f"{where}.tool_call_id",
        )
    return part._replace(call_id=ident, name=names[ident])


# Opaque state and visible reasoning travel in `reasoning_details`, as OpenRouter spells it, and
# the reasoning's plain text in `reasoning_content` too. What we put there says so in `via`: that
# is how it is told from what a server of this protocol minted itself.
# wire: openrouter.ai/docs/use-cases/reasoning-tokens#preserving-reasoning-blocks, read 2026-11

_CHAT_FORMATS = {
    "anthropic": "anthropic-claude-v1", "openai": "openai-responses-v1",
    "google": "google-gemini-v1",
}  # fmt: skip
_CHAT_KINDS = {"anthropic": "redacted", "openai": "encrypted", "google": "thought"}
_CHAT_VIA = "bitrouter:"
_CHAT_OWN = "chat:"  # how the names of vendors begin that speak Chat Completions itself


def _chat_reasoning(message: JsonObject, vendor: str = "chat:?") -> list[Reasoning]:
    """The reasoning in a message, with its state. vendor: who minted what is not marked as ours."""
    found: list[Reasoning] = []
    ident = None
    for entry in as_list(message.get("reasoning_details")):
        one = _chat_detail(as_object(entry), vendor)
        if one is None:
            continue
        if one.opaque and found and found[-1].opaque is None and ident == entry.get("id"):
            found[-1] = Reasoning(found[-1].text + one.text, one.opaque)
        else:
            found.append(one)
        ident = entry.get("id")
    plain = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(plain, str) and plain and not any(one.text for one in found):
        state = found[0].opaque if found else None
        if state and state.kind.startswith(("signature", "reasoning.text")):
            found[0] = Reasoning(plain, state)
        else:
            found.insert(0, Reasoning(plain))
    return found


def _chat_detail(entry: JsonObject, vendor: str) -> Reasoning | None:
    kind, via = str(entry.get("type")), str(entry.get("via") or "")
    ident = entry["id"] if isinstance(entry.get("id"), str) else ""
    text = entry.get("summary" if kind == "reasoning.summary" else "text")
    text = text if isinstance(text, str) else ""
    state = entry.get("signature" if kind == "reasoning.text" else "data")
    if not isinstance(state, str) or not state:
        return Reasoning(text) if text else None
    if state.startswith(ENVELOPE):
        return Reasoning(text, unseal(state))
    if via.startswith(_CHAT_VIA):
        vendor = via.removeprefix(_CHAT_VIA)
        known = _CHAT_KINDS.get(vendor, "")
        return Reasoning(text, Opaque(vendor, "signature" if text else known, state, id=ident))
    spelt = f"{kind}|{entry.get('format') or ''}"
    return Reasoning(text, Opaque(vendor, spelt, state, id=ident))


def _chat_details(block: Reasoning, index: int) -> list[JsonObject]:
    """A block's state as entries of `reasoning_details`."""
    opaque = block.opaque
    if opaque is None:
        return []
    more: JsonObject = {"id": opaque.id} if opaque.id else {}
    kind, _, spelt = opaque.kind.partition("|")
    data = opaque.data
    if opaque.vendor.startswith(_CHAT_OWN):
        more |= {"format": spelt} if spelt else {}
    else:
        more["via"] = _CHAT_VIA + opaque.vendor
        more["format"] = _CHAT_FORMATS.get(opaque.vendor, "unknown")
        signed = kind == "signature" and opaque.vendor == "anthropic"
        if not signed and kind != _CHAT_KINDS.get(opaque.vendor):
            data = seal(opaque)
        kind = "reasoning.text" if signed and block.text else "reasoning.encrypted"
        if signed and not block.text:
            data = seal(opaque)
    if kind == "reasoning.text":
        entry = {"type": kind, "text": block.text, "signature": data, **more}
        return [{"index": index, **entry}]
    entries = [{"type": "reasoning.encrypted", "data": data, **more}]
    if block.text:
        entries.insert(0, {"type": "reasoning.summary", "summary": block.text, **more})
    return [{"index": index + n, **entry} for n, entry in enumerate(entries)]


# A request for a provider, written.


def _chat_render_request(prompt: Prompt, traits: Traits, losses: Losses) -> JsonObject:
    same = prompt.source is ApiProtocol.CHAT_COMPLETIONS
    sampling, tools = prompt.sampling, [_chat_render_tool(tool, losses) for tool in prompt.tools]
    effort = prompt.thinking.effort
    body = {
        "model": prompt.model,
        "messages": _chat_render_messages(prompt, traits),
        "stream": True if prompt.stream else None,
        "stream_options": {"include_usage": True} if prompt.stream else None,
        traits.max_tokens_field: prompt.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "n": sampling.n if sampling.n > 1 else None,
        "stop": list(sampling.stop) or None,
        "seed": sampling.seed,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": sampling.logit_bias,
        "logprobs": None if sampling.logprobs is None else True,
        "top_logprobs": sampling.logprobs or None,
        "tools": tools or None,
        "tool_choice": _chat_render_choice(prompt) if tools else None,
        "parallel_tool_calls": prompt.parallel_tools if tools else None,
        "response_format": _chat_render_output(prompt.output, losses),
        "verbosity": prompt.verbosity or None,
        "reasoning_effort": nearest_effort(effort, traits.efforts) or None,
        "service_tier": prompt.tier or None,
        "safety_identifier" if traits.official else "user": short_user(prompt.user) or None,
        "prompt_cache_key": prompt.cache_key or None,
        "metadata": prompt.metadata,
        "store": prompt.store,
        "modalities": list(prompt.makes) or None,
        "audio": _chat_render_voice(prompt.voice) if "audio" in prompt.makes else None,
        **(prompt.extra if same else {}),
    }
    return no_nulls(body)


def _chat_render_voice(voice: Voice | None) -> JsonObject:
    voice = voice or Voice()
    return {"voice": voice.name or _CHAT_VOICE, "format": voice.form}


_CHAT_VOICE = "alloy"


def _chat_render_tool(tool: Tool, losses: Losses) -> JsonObject:
    if tool.native:
        return tool.native.value
    if tool.kind == "custom":
        grammar = tool.format or {}
        spelt: JsonObject = {"type": grammar.get("type", "text")}
        if spelt["type"] == "grammar":
            spelt["grammar"] = {k: v for k, v in grammar.items() if k != "type"}
        facts = {"name": tool.name, "description": tool.description or None}
        return {"type": "custom", "custom": {**no_nulls(facts), "format": spelt}}
    schema, strict = openai_schema(object_schema(tool.schema), tool.strict, losses, "tools.strict")
    function = {
        "name": tool.name,
        "description": tool.description or None,
        "parameters": schema,
        "strict": strict,
    }
    return {"type": "function", "function": no_nulls(function)}


def _chat_render_choice(prompt: Prompt) -> Json:
    choice = prompt.tool_choice
    if choice is None:
        return None
    kinds = {tool.name: tool.kind for tool in prompt.tools}
    named = [(kinds.get(name, "function"), name) for name in choice.names]
    tools = [{"type": kind, kind: {"name": name}} for kind, name in named]
    if choice.mode == "named":
        return tools[0]
    if choice.mode == "allowed":
        mode = "required" if choice.must else "auto"
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
    return choice.mode


def _chat_render_output(output: OutputFormat | None, losses: Losses) -> JsonObject | None:
    if output is None:
        return None
    if output.kind == "json_object":
        return {"type": "json_object"}
    schema, strict = openai_schema(output.schema or {}, output.strict, losses, "response_format")
    facts = {
        "name": re.sub(r"[^a-zA-Z0-9_-]", "_", output.name)[:64] or "response",
        "description": output.description or None,
        "schema": schema,
        "strict": strict,
    }
    return {"type": "json_schema", "json_schema": no_nulls(facts)}


def _chat_render_messages(prompt: Prompt, traits: Traits) -> list[JsonObject]:
    rendered: list[JsonObject] = []
    shown: list[JsonObject] = []  # images from tool results, until all results have been told
    for message in prompt.messages:
        results = [part for part in message.content if isinstance(part, ToolResult)]
        if shown and not results:
            rendered.append({"role": "user", "content": shown})
            shown = []
        rendered += [_chat_result(result, shown) for result in results]
        if message.role == "user":
            content = [_chat_render_part(p) for p in message.content if isinstance(p, Text | Media)]
            if content or not message.content:
                told = [*shown, *content] or ""
                rendered.append(_chat_named("user", told, message.name))
                shown = []
        elif message.role == "assistant":
            rendered += _chat_render_assistant(message, traits)
        else:
            role = message.role if traits.developer_role else "system"
            text: Json = joined_text(message.content)
            if any(isinstance(part, Text) and part.cache for part in message.content):
                text = [_chat_render_part(p) for p in message.content if isinstance(p, Text)]
            rendered.append(_chat_named(role, text, message.name))
    if shown:
        rendered.append({"role": "user", "content": shown})
    return rendered


def _chat_named(role: str, content: Json, name: str) -> JsonObject:
    if isinstance(content, list) and len(content) == 1 and {*content[0]} == {"type", "text"}:
        content = content[0]["text"]
    return {"role": role, "content": content, **({"name": name} if name else {})}


def _chat_result(result: ToolResult, shown: list[JsonObject]) -> JsonObject:
    """A tool's result. Images have no place in it: they are shown after the last one."""
    texts, media = [], 0
    for part in result.content:
        plain = part.text if isinstance(part, Text) else text_in(part)
        if plain is not None:
            texts.append(plain)
        elif isinstance(part, Media):
            media += 1
            shown.append(_chat_render_part(part))
    if media:
        noun = "file" if media == 1 else f"{media} files"
        texts.append(f"[the {noun} of this result: in the next user message]")
        shown.insert(
            len(shown) - media, {"type": "text", "text": f"From tool call {result.call_id}:"}
        )
    text = "\n".join(texts)
    if result.is_error:
        text = f"Error: {text}"
    told = [_chat_render_part(Text(text, cache=result.cache))] if result.cache else text
    return {"role": "tool", "tool_call_id": result.call_id, "content": told}


def _chat_render_part(part: Text | Media) -> JsonObject:
    """A part; what is marked to be cached says so."""
    rendered = _chat_render_plain_part(part)
    return {**rendered, **OPENAI_BREAKPOINT} if part.cache else rendered


def _chat_render_plain_part(part: Text | Media) -> JsonObject:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    where = part.url or (data_url(part) if part.data else "")
    if part.kind == "image" and where:
        image = {"url": where, **({"detail": part.detail} if part.detail else {})}
        return {"type": "image_url", "image_url": image}
    if part.kind == "audio" and part.data:
        form = {"audio/mpeg": "mp3", "audio/x-wav": "wav"}.get(part.mime) or part.mime[6:]
        return {"type": "input_audio", "input_audio": {"data": part.data, "format": form}}
    if part.kind == "document":
        plain = text_in(part)
        if plain is not None:
            return {"type": "text", "text": plain}
        if part.file_id:
            return {"type": "file", "file": {"file_id": part.file_id}}
        return {"type": "file", "file": {"filename": part.name or "file.pdf", "file_data": where}}
    raise refuse_part(part, "Chat Completions")


def _chat_render_assistant(message: Message, traits: Traits) -> list[JsonObject]:
    text = joined_text(message.content, "")
    calls = [_chat_call(part) for part in message.content if isinstance(part, ToolCall)]
    refusal = "".join(part.text for part in message.content if isinstance(part, Refusal))
    if not (text or calls or refusal):
        return []
    rendered: JsonObject = _chat_named("assistant", text or None, message.name)
    if refusal:
        rendered["refusal"] = refusal
    if calls:
        rendered["tool_calls"] = calls
    reasoning = [part for part in message.content if isinstance(part, Reasoning)]
    if traits.echoes_reasoning and any(part.text for part in reasoning):
        rendered["reasoning_content"] = "".join(part.text for part in reasoning)
    details: list[JsonObject] = []
    for one in reasoning:
        details += _chat_details(one, len(details))
    if details:
        rendered["reasoning_details"] = details
    return [rendered]


# An answer, for a caller.


def _chat_render_response(
    prompt: Prompt,
    label: AnswerLabel,
    choices: list[Choice],
    usage: Usage,
    losses: Losses,  # noqa: ARG001  nothing is lost
) -> JsonObject:
    rendered = [_chat_render_answer(prompt, label, choice) for choice in choices]
    return {
        "id": f"chatcmpl-{label.id}",
        "object": "chat.completion",
        "created": label.created,
        "model": label.model,
        "choices": rendered,
        "usage": _chat_render_usage(usage),
    }


def _chat_render_answer(prompt: Prompt, label: AnswerLabel, choice: Choice) -> JsonObject:
    message: JsonObject = {"role": "assistant", "content": None, "refusal": None}
    texts = [part for part in choice.content if isinstance(part, Text)]
    message["content"] = "".join(part.text for part in texts) or None
    message["refusal"] = "".join(p.text for p in choice.content if isinstance(p, Refusal)) or None
    calls = [_chat_call(part) for part in choice.content if isinstance(part, ToolCall)]
    finish = _chat_finish(prompt, choice.finished)
    if calls and prompt.legacy_functions:
        message["function_call"] = calls[0]["function"]
    elif calls:
        message["tool_calls"] = calls
    if reasoning := "".join(p.text for p in choice.content if isinstance(p, Reasoning)):
        message["reasoning_content"] = reasoning
    details: list[JsonObject] = []
    images: list[JsonObject] = []
    spoken = [p for p in choice.content if isinstance(p, Media) and p.kind == "audio"]
    for part in choice.content:
        if isinstance(part, Reasoning):
            details += _chat_details(part, len(details))
        elif isinstance(part, Media) and part.kind != "audio":
            images.append({"type": "image_url", "image_url": {"url": data_url(part)}})
    more = {
        "reasoning_details": details,
        "images": images,
        "annotations": _chat_annotations(texts),
        "audio": _chat_audio(prompt, label, spoken) if spoken else None,
    }
    message |= {key: value for key, value in more.items() if value}
    logprobs = [one for part in texts for one in part.logprobs]
    return {
        "index": choice.finished.choice,
        "message": message,
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        "finish_reason": finish,
        **_chat_native_finish(choice.finished),
    }


_CHAT_AUDIO_KEPT_S = 3600


def _chat_audio(prompt: Prompt, label: AnswerLabel, spoken: list[Media]) -> JsonObject:
    """What was said, in one piece, in the form that the caller asked for. The id is one that
    nobody can look up: what was said is not kept."""
    samples = b"".join(from_base64(one.data) for one in spoken)
    whole_of_it = spoken[0]._replace(data=base64.b64encode(samples).decode())
    if prompt.voice and prompt.voice.form == "wav" and whole_of_it.mime.startswith("audio/L16"):
        whole_of_it = as_wav(whole_of_it)
    facts = {"id": f"audio_{label.id}", "data": whole_of_it.data, "transcript": ""}
    return {**facts, "expires_at": label.created + _CHAT_AUDIO_KEPT_S}


def _chat_annotations(texts: list[Text]) -> list[JsonObject]:
    found, before = [], 0
    for text in texts:
        for cited in text.citations:
            facts: JsonObject = {"url": cited.url, "title": cited.title}
            facts |= {"start_index": cited.start + before, "end_index": cited.end + before}
            found.append({"type": "url_citation", "url_citation": facts})
        before += len(text.text)
    return found


_CHAT_FINISHES, _CHAT_MEANINGS = finish_words(1)


def _chat_finish(prompt: Prompt, finished: Finished) -> str:
    if finished.finish is Finish.TOOL_CALLS and prompt.legacy_functions:
        return "function_call"
    return _CHAT_FINISHES[finished.finish]


def _chat_native_finish(finished: Finished) -> JsonObject:
    return {"native_finish_reason": finished.raw} if finished.raw else {}


def _chat_call(call: ToolCall) -> JsonObject:
    if call.custom:
        custom = {"name": call.name, "input": call.arguments}
        return {"id": call.id, "type": "custom", "custom": custom}
    function = {"name": call.name, "arguments": call.arguments or "{}"}
    rendered: JsonObject = {"id": call.id, "type": "function", "function": function}
    if call.opaque:
        own = call.opaque.vendor.startswith(_CHAT_OWN)
        signature = call.opaque.data if own else sealed_for(call.opaque, "google", "thought")
        google = {"google": {"thought_signature": signature}}
        rendered["extra_content"] = google if own else {**google, "via": _CHAT_VIA + "google"}
    return rendered


def _chat_render_usage(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


class _ChatEncoder:
    """wire: role, id and name once; indices from 0; usage in the last chunk; then [DONE]."""

    def __init__(self, prompt: Prompt, label: AnswerLabel) -> None:
        head = {
            "id": f"chatcmpl-{label.id}",
            "object": "chat.completion.chunk",
            "created": label.created,
            "model": label.model,
        }
        self._prompt = prompt
        self._label = label
        self._head = head
        self._usage = {"usage": None} if prompt.wants_usage else {}
        # key -> block, choice, and a call's index or the characters of text before a text
        self._blocks: dict[int, tuple[Block, int, int]] = {}
        self._grown: dict[int, list[str]] = {}  # reasoning, to be told whole with its state
        self._listed: dict[tuple[int, str], int] = {}  # choice and list -> entries so far
        self._said: dict[int, int] = {}  # choice -> characters of text so far
        self._opened = 0  # choices that have had their first chunk
        # wire: OpenAI's Python SDK fails on strict tools whose calls grow side by side (3.57.0)
        self._in_order: dict[int, InOrder] = {}
        self._choices: dict[int, int] = {}

    def encode(self, part: StreamPart) -> bytes:
        if isinstance(part, Open):
            self._choices[part.key] = part.choice
        choice = part.choice if isinstance(part, Finished) else self._choices[part.key]
        in_order = self._in_order.setdefault(choice, InOrder())
        return b"".join([self._encode(one) for one in in_order.feed(part)])

    def _encode(self, part: StreamPart) -> bytes:
        match part:
            case Delta():
                return self._delta(part)
            case Open():
                return self._opening(part.choice) + self._open(part)
            case Close():
                return self._close(part)
            case Cite():
                _, choice, before = self._blocks[part.key]
                told = part.citation
                told = told._replace(start=told.start + before, end=told.end + before)
                [noted] = _chat_annotations([Text(citations=(told,))])
                at = self._next_in(choice, "annotations")
                return self._chunk(choice, {"annotations": [{"index": at, **noted}]})
            case Finished():
                out = self._opening(part.choice)
                finish = _chat_finish(self._prompt, part)
                return out + self._chunk(part.choice, {}, finish, **_chat_native_finish(part))

    def end(self, usage: Usage) -> bytes:
        chunk = {**self._head, "choices": [], "usage": _chat_render_usage(usage)}
        told = sse_encode(compact(chunk)) if self._prompt.wants_usage else b""
        return told + CHAT.end_mark

    def fail(self, error: BitrouterError) -> bytes:
        return sse_encode(compact(openai_render_error(error)))

    def _next_in(self, choice: int, name: str) -> int:
        """The index of the next entry of a list: SDKs add up what has the same one."""
        at = self._listed.get((choice, name), 0)
        self._listed[choice, name] = at + 1
        return at

    def _opening(self, choice: int) -> bytes:
        """The first chunks of all choices up to this one, in order."""
        out = b""
        while self._opened <= choice:
            out += self._chunk(self._opened, {"role": "assistant", "content": ""})
            self._opened += 1
        return out

    def _open(self, part: Open) -> bytes:
        block, choice = part.block, part.choice
        index = self._said.get(choice, 0)
        if isinstance(block, ToolCall):
            index = self._next_in(choice, "tool_calls")
        self._blocks[part.key] = (block, choice, index)
        if isinstance(block, Reasoning):
            self._grown[part.key] = []
        if isinstance(block, Media) and block.kind == "audio":
            audio = {"id": f"audio_{self._label.id}", "data": block.data}
            return self._chunk(choice, {"audio": audio})
        if isinstance(block, Media):
            at = self._next_in(choice, "images")
            image = {"index": at, "type": "image_url", "image_url": {"url": data_url(block)}}
            return self._chunk(choice, {"images": [image]})
        if not isinstance(block, ToolCall):
            return b""
        if self._prompt.legacy_functions:
            return self._chunk(choice, {"function_call": {"name": block.name, "arguments": ""}})
        opening = _chat_call(block)
        if not block.custom:
            opening["function"]["arguments"] = ""
        return self._chunk(choice, {"tool_calls": [{"index": index, **opening}]})

    def _delta(self, part: Delta) -> bytes:
        block, choice, index = self._blocks[part.key]
        if isinstance(block, Text):
            more: JsonObject = {}
            self._said[choice] = self._said.get(choice, 0) + len(part.text)
            if part.logprobs:
                more["logprobs"] = {"content": list(part.logprobs), "refusal": None}
            return self._chunk(choice, {"content": part.text}, **more)
        if isinstance(block, Reasoning):
            self._grown[part.key].append(part.text)
            return self._chunk(choice, {"reasoning_content": part.text})
        if isinstance(block, Refusal):
            return self._chunk(choice, {"refusal": part.text})
        if self._prompt.legacy_functions:
            return self._chunk(choice, {"function_call": {"arguments": part.text}})
        self._blocks[part.key] = (with_text(block, "x"), choice, index)
        inner = (
            {"custom": {"input": part.text}}
            if isinstance(block, ToolCall) and block.custom
            else {"function": {"arguments": part.text}}
        )
        return self._chunk(choice, {"tool_calls": [{"index": index, **inner}]})

    def _close(self, part: Close) -> bytes:
        block, choice, index = self._blocks.pop(part.key)
        if isinstance(block, ToolCall):
            if block.arguments or block.custom or self._prompt.legacy_functions:
                return b""
            # wire: OpenAI's TypeScript SDK gives "" for a call that has had no arguments
            call = {"index": index, "function": {"arguments": "{}"}}
            return self._chunk(choice, {"tool_calls": [call]})
        if part.opaque is None or not isinstance(block, Reasoning):
            return b""
        text = "".join(self._grown.pop(part.key, ()))
        details = _chat_details(Reasoning(text, part.opaque), 0)
        for detail in details:
            detail["index"] = self._next_in(choice, "reasoning_details")
        return self._chunk(choice, {"reasoning_details": details})

    def _chunk(
        self, choice: int, delta: JsonObject, finish: str | None = None, **more: Json
    ) -> bytes:
        facts = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        return sse_encode(compact({**self._head, "choices": [facts], **self._usage}))


# A provider's answer, read.


class _ChatDecoder:
    def __init__(self, vendor: str) -> None:
        self.model = ""
        self.lost: set[str] = set()
        self._vendor = vendor
        self._keys = itertools.count()
        self._open: dict[int, dict[str, int]] = {}  # choice -> what is open in it -> key
        self._calls: dict[tuple[int, int | None], int] = {}  # choice, index (None: last) -> key
        self._ids: dict[int, str] = {}  # key -> call id
        self._states: dict[int, list[Reasoning]] = {}
        self._plain: set[int] = set()  # choices whose reasoning comes as plain text

    def feed(self, value: JsonObject) -> list[StreamPart]:
        if not self.model and isinstance(value.get("model"), str):
            self.model = value["model"]
        out: list[StreamPart] = []
        for choice in as_list(value.get("choices")):
            index = whole(dig(choice, "index"))
            delta = dig(choice, "delta")
            if isinstance(delta, dict):
                self._delta(out, index, delta, dig(choice, "logprobs", "content"))
            finish = dig(choice, "finish_reason")
            if isinstance(finish, str) and finish:
                out += self._end_choice(index, finish)
        return out

    def finish(self) -> list[StreamPart]:
        return [part for index in list(self._open) for part in self._close_all(index)]

    def resume(self, body: JsonObject) -> JsonObject:
        return body  # no model of this protocol pauses

    def whole(self, value: JsonObject) -> list[StreamPart]:
        self.model = str(value.get("model") or "")
        out: list[StreamPart] = []
        for choice in as_list(value.get("choices")):
            index = whole(dig(choice, "index"))
            message = as_object(dig(choice, "message"))
            logprobs = dig(choice, "logprobs", "content")
            for block in _chat_answer_blocks(message, self._vendor, logprobs):
                out += parts_of(block, next(self._keys), index)
            finish = str(dig(choice, "finish_reason") or "")
            meaning = _CHAT_MEANINGS.get(finish, Finish.STOP)
            refused = isinstance(message.get("refusal"), str) and message["refusal"]
            out.append(Finished(Finish.REFUSAL if refused else meaning, index, finish))
        return out

    def _delta(self, out: list[StreamPart], choice: int, delta: JsonObject, logprobs: Json) -> None:
        self._reasoning(out, choice, delta)
        content = delta.get("content")
        if isinstance(content, list):  # wire: Mistral's thinking; docs.mistral.ai, read 2026-11
            for part in content:
                self._listed(out, choice, as_object(part))
        elif isinstance(content, str) and content:
            told = tuple(one for one in as_list(logprobs) if isinstance(one, dict))
            out += self._grow(choice, "text", Text(), content, told)
        if isinstance(delta.get("refusal"), str) and delta["refusal"]:
            out += self._grow(choice, "refusal", Refusal(), delta["refusal"])
        for cited in as_list(delta.get("annotations")):
            if (citation := _chat_citation(cited)) and "text" in self._open.get(choice, {}):
                out.append(Cite(self._open[choice]["text"], citation))
        for call in as_list(delta.get("tool_calls")):
            self._call(out, choice, as_object(call))
        if isinstance(delta.get("function_call"), dict):
            legacy = delta["function_call"]
            self._call(out, choice, {"index": 0, "function": legacy})
        for image in as_list(delta.get("images")):
            out += self._image(choice, image)
        transcript, samples = (dig(delta, "audio", name) for name in ("transcript", "data"))
        if isinstance(transcript, str) and transcript:
            out += self._grow(choice, "text", Text(), transcript)
        if isinstance(samples, str) and samples:
            out += self._close_all(choice, calls_too=False)
            out += parts_of(Media("audio", PCM, samples), next(self._keys), choice)

    def _reasoning(self, out: list[StreamPart], choice: int, delta: JsonObject) -> None:
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if reasoning:
            self._plain.add(choice)
        for entry in as_list(delta.get("reasoning_details")):
            reasoning = self._detail(choice, as_object(entry), reasoning)
        if isinstance(reasoning, str) and reasoning:
            out += self._grow(choice, "reasoning", Reasoning(), reasoning)

    def _grow(
        self, choice: int, kind: str, block: Block, text: str, logprobs: tuple[JsonObject, ...] = ()
    ) -> list[StreamPart]:
        open_here = self._open.setdefault(choice, {})
        if kind in open_here:
            return [Delta(open_here[kind], text, logprobs)]
        out = self._close_all(choice, calls_too=False)
        key = next(self._keys)
        self._open[choice][kind] = key
        return [*out, Open(key, block, choice), Delta(key, text, logprobs)]

    def _listed(self, out: list[StreamPart], choice: int, part: JsonObject) -> None:
        if part.get("type") == "thinking":
            text = "".join(str(dig(one, "text") or "") for one in as_list(part.get("thinking")))
            out += self._grow(choice, "reasoning", Reasoning(), text) if text else []
        elif isinstance(part.get("text"), str) and part["text"]:
            out += self._grow(choice, "text", Text(), part["text"])

    def _detail(self, choice: int, entry: JsonObject, plain: Json) -> Json:
        """Remember an entry's state; its text counts if it came in no plainer way."""
        one = _chat_detail(entry, self._vendor)
        if one and one.opaque:
            self._states.setdefault(choice, []).append(Reasoning("", one.opaque))
        return plain or (one.text if one and choice not in self._plain else None)

    def _call(self, out: list[StreamPart], choice: int, call: JsonObject) -> None:
        """One delta of a call. Some servers leave out the index, repeat it for the next call, or
        repeat id and name: a new id is a new call, whatever its index says."""
        ident = call["id"] if isinstance(call.get("id"), str) else ""
        index = call["index"] if isinstance(call.get("index"), int) else None
        facts = as_object(call.get("custom") or call.get("function"))
        key = self._key_of(choice, index, ident)
        if key is None:
            key = next(self._keys)
            out += self._close_all(choice, calls_too=False)
            state = _chat_google_state(call, self._vendor)
            block = ToolCall(ident, str(facts.get("name") or ""), "", "custom" in call, state)
            self._open.setdefault(choice, {})[f"call {key}"] = key
            out.append(Open(key, block, choice))
        self._calls[choice, index] = self._calls[choice, None] = key
        self._ids[key] = self._ids.get(key) or ident
        text = facts.get("input" if "custom" in call else "arguments")
        text = json.dumps(text) if isinstance(text, dict) else text
        if isinstance(text, str) and text:
            out.append(Delta(key, text))

    def _key_of(self, choice: int, index: int | None, ident: str) -> int | None:
        """The call that a delta belongs to; None if it begins one."""
        key = self._calls.get((choice, index))
        if key is None or not ident or self._ids[key] in ("", ident):
            return None if index is None and ident and key is None else key
        mine = {k for (c, _), k in self._calls.items() if c == choice}
        return next((k for k in mine if self._ids[k] == ident), None)

    def _image(self, choice: int, image: Json) -> Iterator[StreamPart]:
        url = dig(image, "image_url", "url")
        if isinstance(url, str) and url:
            yield from self._close_all(choice, calls_too=False)
            yield from parts_of(media_at("image", url, "images"), next(self._keys), choice)

    def _close_all(self, choice: int, *, calls_too: bool = True) -> list[StreamPart]:
        out: list[StreamPart] = []
        open_here = self._open.setdefault(choice, {})
        for kind in [k for k in open_here if calls_too or not k.startswith("call ")]:
            states = self._states.pop(choice, []) if kind == "reasoning" else []
            key = open_here.pop(kind)
            out.append(Close(key, states[0].opaque if states else None))
            for state in states[1:]:
                out += parts_of(state, next(self._keys), choice)
        for state in self._states.pop(choice, []):
            out += parts_of(state, next(self._keys), choice)
        return out

    def _end_choice(self, choice: int, finish: str) -> list[StreamPart]:
        refused = "refusal" in self._open.get(choice, {})
        out = self._close_all(choice)
        meaning = _CHAT_MEANINGS.get(finish, Finish.STOP)
        return [*out, Finished(Finish.REFUSAL if refused else meaning, choice, finish)]


def _chat_answer_blocks(message: JsonObject, vendor: str, logprobs: Json) -> Iterator[Block]:
    yield from _chat_reasoning(message, vendor)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(dig(p, "text") or "") for p in content)
    if isinstance(content, str) and content:
        cited = [_chat_citation(one) for one in as_list(message.get("annotations"))]
        told = tuple(one for one in as_list(logprobs) if isinstance(one, dict))
        yield Text(content, tuple(c for c in cited if c), logprobs=told)
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        yield Refusal(message["refusal"])
    for image in as_list(message.get("images")):
        if isinstance(dig(image, "image_url", "url"), str):
            yield media_at("image", image["image_url"]["url"], "images")
    transcript, samples = (dig(message, "audio", name) for name in ("transcript", "data"))
    if isinstance(transcript, str) and transcript:
        yield Text(transcript)
    if isinstance(samples, str) and samples:
        yield Media("audio", PCM, samples)
    yield from _chat_calls(_chat_with_ids(message), "message", vendor)


def _chat_with_ids(message: JsonObject) -> JsonObject:
    """A message whose calls all have ids; some compatible servers leave them out."""
    calls = as_list(message.get("tool_calls"))
    if all(dig(call, "id") for call in calls):
        return message
    return {**message, "tool_calls": [{"id": "", **no_nulls(as_object(call))} for call in calls]}


def _chat_citation(cited: Json) -> Citation | None:
    facts = as_object(dig(cited, "url_citation") or cited)
    if not isinstance(facts.get("url"), str):
        return None
    start, end = whole(facts.get("start_index")), whole(facts.get("end_index"))
    return Citation(facts["url"], str(facts.get("title") or ""), start, end)


def _chat_sealed(body: JsonObject) -> bool:
    for message in as_list(body.get("messages")):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        if "reasoning_details" in message:
            return True
        if any("extra_content" in as_object(one) for one in as_list(message.get("tool_calls"))):
            return True
    return False


def _chat_unseal(body: JsonObject, vendor: str) -> bool:
    changed = False
    for message in as_list(body.get("messages")):
        for call in as_list(dig(message, "tool_calls")):
            if dig(call, "extra_content", "via"):
                del call["extra_content"]
                changed = True
        details = dig(message, "reasoning_details")
        if not isinstance(details, list):
            continue
        kept: list[Json] = []
        for entry in details:
            one = _chat_detail(as_object(entry), "")
            state = str(dig(entry, "data") or dig(entry, "signature"))
            if not dig(entry, "via") and not state.startswith(ENVELOPE):
                kept.append(entry)
            elif one and one.opaque and one.opaque.vendor == vendor:
                kept += _chat_details(one, len(kept))
        changed = changed or kept != details
        message["reasoning_details"] = kept
        if not kept:
            del message["reasoning_details"]
    return changed


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
    mend=_chat_mend,
    fail_stream=_chat_fail_stream,
    parse_request=_chat_parse_request,
    render_request=_chat_render_request,
    render_response=_chat_render_response,
    decoder=_ChatDecoder,
    encoder=_ChatEncoder,
    names=re.compile(r"[A-Za-z0-9_-]{1,64}"),
    sealed=_chat_sealed,
    unseal=_chat_unseal,
)


# ---------------------------------------------------------------------------------------------
# 9. responses: OpenAI Responses (pure)
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


# A caller's request, read.

_RESPONSES_KNOWN = frozenset({
    "model", "input", "instructions", "stream", "stream_options", "max_output_tokens",
    "temperature", "top_p", "top_logprobs", "include", "tools", "tool_choice",
    "parallel_tool_calls", "text", "reasoning", "service_tier", "user", "safety_identifier",
    "prompt_cache_key", "metadata", "store", "client_metadata", "previous_response_id",
})  # fmt: skip
_RESPONSES_LOGPROBS = "message.output_text.logprobs"
_RESPONSES_STATE = "reasoning.encrypted_content"


def _responses_parse_request(body: JsonObject) -> Prompt:
    messages, more_tools = _responses_input(body.get("input"))
    instructions = maybe(body, "instructions", str)
    if instructions:
        messages.insert(0, Message("system", (Text(instructions),)))
    if not any(message.role in ("user", "assistant", "developer") for message in messages):
        raise BadRequest("input: expected a text or a list with at least one item", param="input")
    text = maybe(body, "text", dict) or {}
    tools = [*each_object(body.get("tools"), "tools"), *more_tools]
    wants_logprobs = _RESPONSES_LOGPROBS in as_list(body.get("include"))
    top_logprobs = count_in(body, "top_logprobs")
    return Prompt(
        model=str(body.get("model")),
        messages=tuple(messages),
        source=ApiProtocol.RESPONSES,
        stream=body.get("stream") is True,
        max_tokens=count_in(body, "max_output_tokens"),
        sampling=Sampling(
            temperature=number(body, "temperature"),
            top_p=number(body, "top_p"),
            logprobs=top_logprobs or 0 if wants_logprobs or top_logprobs else None,
        ),
        tools=tuple(tool for here, one in tools for tool in _responses_tools(one, here)),
        tool_choice=_responses_tool_choice(body.get("tool_choice")),
        parallel_tools=maybe(body, "parallel_tool_calls", bool),
        output=_responses_output(text.get("format")),
        thinking=_responses_thinking(maybe(body, "reasoning", dict) or {}),
        verbosity=text["verbosity"] if isinstance(text.get("verbosity"), str) else "",
        tier=maybe(body, "service_tier", str) or "",
        user=maybe(body, "safety_identifier", str) or maybe(body, "user", str) or "",
        cache_key=maybe(body, "prompt_cache_key", str) or "",
        metadata=maybe(body, "metadata", dict),
        store=maybe(body, "store", bool),
        extra=the_rest(body, _RESPONSES_KNOWN),
    )


def _responses_thinking(reasoning: JsonObject) -> Thinking:
    effort, summary = reasoning.get("effort"), reasoning.get("summary")
    visible = None if summary is None else summary != "none"
    return Thinking(effort if isinstance(effort, str) else "", visible=visible)


def _responses_output(wanted: Json) -> OutputFormat | None:
    facts = as_object(wanted)
    if facts.get("type") == "json_object":
        return OutputFormat("json_object")
    if facts.get("type") != "json_schema":
        return None
    return OutputFormat(
        "json_schema",
        name=str(facts.get("name") or "response"),
        description=str(facts.get("description") or ""),
        schema=typed(facts.get("schema"), dict, "text.format.schema"),
        strict=maybe(facts, "strict", bool),
    )


def _responses_tools(tool: JsonObject, where: str, namespace: str = "") -> Iterator[Tool]:
    kind = tool.get("type")
    if kind == "namespace":
        # wire: as Codex 0.169 sends it: a list of functions under one name
        name = typed(tool.get("name"), str, f"{where}.name")
        for here, inner in each_object(tool.get("tools"), f"{where}.tools"):
            yield from _responses_tools(inner, here, name)
    elif kind in ("function", "custom"):
        yield Tool(
            name=typed(tool.get("name"), str, f"{where}.name"),
            description=maybe(tool, "description", str) or "",
            schema=maybe(tool, "parameters", dict),
            strict=maybe(tool, "strict", bool),
            kind=kind,
            format=maybe(tool, "format", dict),
            namespace=namespace,
        )
    else:
        name = WEB_SEARCH if str(kind).startswith("web_search") else str(kind)
        yield Tool(name, kind="hosted", native=Native(ApiProtocol.RESPONSES, tool))


def _responses_tool_choice(choice: Json) -> ToolChoice | None:
    if choice is None:
        return None
    if choice in ("auto", "none", "required"):
        return ToolChoice(choice)
    typed(choice, dict, "tool_choice")
    if choice.get("type") == "allowed_tools":
        names = [dig(tool, "name") for tool in as_list(choice.get("tools"))]
        must = choice.get("mode") == "required"
        return ToolChoice("allowed", tuple(n for n in names if isinstance(n, str)), must)
    name = typed(choice.get("name") or choice.get("type"), str, "tool_choice.name")
    return ToolChoice("named", (WEB_SEARCH if name.startswith("web_search") else name,))


def _responses_input(given: Json) -> tuple[list[Message], list[tuple[str, JsonObject]]]:
    """The messages of an input, and the tools that stand in it."""
    if isinstance(given, str):
        return [Message("user", (Text(given),))], []
    runs: list[tuple[str, list[Content]]] = []  # what the assistant says in a row is one message
    tools: list[tuple[str, JsonObject]] = []
    names: dict[str, str] = {}
    for where, item in each_object(given, "input"):
        if item.get("type") == "additional_tools":
            tools += each_object(item.get("tools"), f"{where}.tools")
            continue
        message = _responses_item(item, where, names)
        if runs and runs[-1][0] == message.role == "assistant":
            runs[-1][1].extend(message.content)
        else:
            runs.append((message.role, list(message.content)))
    return [Message(role, tuple(content)) for role, content in runs], tools


def _responses_item(item: JsonObject, where: str, names: dict[str, str]) -> Message:
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        return _responses_message(item, where)
    if kind in ("function_call", "custom_tool_call"):
        call = _responses_call(item, where)
        names[call.id] = call.name
        return Message("assistant", (call,))
    if kind in ("function_call_output", "custom_tool_call_output"):
        return Message("user", (_responses_result(item, where, names),))
    if kind == "reasoning":
        return Message("assistant", (_responses_reasoning(item, "openai", opaque_from),))
    if kind == "item_reference":
        raise BadRequest(
            f"{where}: item_reference points to what only the provider that stored it knows; "
            "send the item itself",
            param=where,
        )
    if not isinstance(kind, str):
        raise BadRequest(f"{where}.type: expected a kind of item", param=f"{where}.type")
    return Message("assistant", (Native(ApiProtocol.RESPONSES, item),))


def _responses_call(item: JsonObject, where: str) -> ToolCall:
    custom = item.get("type") == "custom_tool_call"
    text = item.get("input" if custom else "arguments")
    return ToolCall(
        id=typed(item.get("call_id"), str, f"{where}.call_id"),
        name=typed(item.get("name"), str, f"{where}.name"),
        arguments=text if isinstance(text, str) else "",
        custom=custom,
        namespace=item["namespace"] if isinstance(item.get("namespace"), str) else "",
    )


def _responses_result(item: JsonObject, where: str, names: dict[str, str]) -> ToolResult:
    ident = typed(item.get("call_id"), str, f"{where}.call_id")
    content = _responses_content(item.get("output"), f"{where}.output")
    told = tuple(part for part in content if isinstance(part, Text | Media))
    custom = item.get("type") == "custom_tool_call_output"
    # The call may stand in the conversation behind previous_response_id: who joins them checks.
    return ToolResult(ident, told, name=names.get(ident, ""), custom=custom)


def _responses_reasoning(
    item: JsonObject, vendor: str, read: Callable[[Json, str, str, str], Opaque | None]
) -> Reasoning:
    """read: what makes state of the item's text, a caller's or a provider's."""
    parts = as_list(item.get("summary")) or as_list(item.get("content"))
    text = "\n\n".join(p["text"] for p in parts if isinstance(dig(p, "text"), str))
    ident = item["id"] if isinstance(item.get("id"), str) else ""
    return Reasoning(text, read(item.get("encrypted_content"), vendor, "encrypted", ident))


_RESPONSES_ROLES = ("user", "assistant", "system", "developer")


def _responses_message(item: JsonObject, where: str) -> Message:
    role = item.get("role")
    if role not in _RESPONSES_ROLES:
        known = ", ".join(_RESPONSES_ROLES)
        raise BadRequest(
            f"{where}.role: expected one of {known}; got {show_json(role)}", param=f"{where}.role"
        )
    return Message(str(role), _responses_content(item.get("content"), f"{where}.content"))


def _responses_content(content: Json, where: str) -> tuple[Content, ...]:
    if content is None or content == "":
        return ()
    if isinstance(content, str):
        return (Text(content),)
    return tuple(_responses_part(part, here) for here, part in each_object(content, where))


def _responses_part(part: JsonObject, where: str) -> Content:
    cache = "5m" if part.get("prompt_cache_breakpoint") else ""
    match part.get("type"):
        case "input_text" | "output_text" | "text" | "summary_text":
            return Text(typed(part.get("text"), str, f"{where}.text"), cache=cache)
        case "refusal":
            return Refusal(typed(part.get("refusal"), str, f"{where}.refusal"))
        case "input_image":
            if isinstance(part.get("file_id"), str):
                return Media("image", file_id=part["file_id"], vendor="openai", cache=cache)
            detail = str(part.get("detail") or "")
            url = part.get("image_url")
            return media_at("image", url, f"{where}.image_url", detail=detail, cache=cache)
        case "input_file":
            data = part.get("file_data") or part.get("file_url")
            return openai_file(part, data, where, cache)
        case "input_audio":
            audio = typed(part.get("input_audio"), dict, f"{where}.input_audio")
            mime = f"audio/{audio.get('format') or 'wav'}"
            return media_of_bytes("audio", mime, audio.get("data"), f"{where}.input_audio.data")
    raise BadRequest(
        f"{where}.type: expected input_text, input_image, input_file or output_text; "
        f"got {show_json(part.get('type'))}",
        param=f"{where}.type",
    )


# A request for a provider, written.

_RESPONSES_LEAST_TOKENS = 16  # wire: platform.openai.com, max_output_tokens, read 2026-11


def _responses_render_request(prompt: Prompt, traits: Traits, losses: Losses) -> JsonObject:
    same = prompt.source is ApiProtocol.RESPONSES
    messages = list(prompt.messages)
    instructions = []
    while prompt.source not in _OPENAI_PROTOCOLS and messages and messages[0].role == "system":
        if any(isinstance(part, Text) and part.cache for part in messages[0].content):
            break  # a string has no place for a mark
        instructions.append(joined_text(messages.pop(0).content))
    tools = [_responses_render_tool(tool, losses) for tool in prompt.tools]
    logprobs = prompt.sampling.logprobs
    limit = prompt.max_tokens
    if limit is not None and limit < _RESPONSES_LEAST_TOKENS:
        losses.add("raised", "max_tokens", harmful=False)
        limit = _RESPONSES_LEAST_TOKENS
    effort = nearest_effort(prompt.thinking.effort, traits.efforts)
    summary = "auto" if prompt.thinking.visible else None
    include = [_RESPONSES_STATE, *([] if logprobs is None else [_RESPONSES_LOGPROBS])]
    body = {
        "model": prompt.model,
        "input": [item for m in messages for item in _responses_items(m, traits)],
        "instructions": "\n\n".join(instructions) or None,
        "stream": True if prompt.stream else None,
        "max_output_tokens": limit,
        "temperature": prompt.sampling.temperature,
        "top_p": prompt.sampling.top_p,
        "top_logprobs": logprobs or None,
        "include": include,
        "tools": tools or None,
        "tool_choice": _responses_render_choice(prompt) if tools else None,
        "parallel_tool_calls": prompt.parallel_tools if tools else None,
        "text": _responses_render_text(prompt, losses) or None,
        "reasoning": no_nulls({"effort": effort or None, "summary": summary}) or None,
        "service_tier": prompt.tier or None,
        "safety_identifier" if traits.official else "user": short_user(prompt.user) or None,
        "prompt_cache_key": prompt.cache_key or None,
        "metadata": prompt.metadata,
        "store": prompt.store is True,
        **(prompt.extra if same else {}),
    }
    return no_nulls(body)


_OPENAI_PROTOCOLS = (ApiProtocol.CHAT_COMPLETIONS, ApiProtocol.RESPONSES)


def _responses_render_tool(tool: Tool, losses: Losses) -> JsonObject:
    if tool.kind == "hosted":
        own = tool.native and tool.native.protocol is ApiProtocol.RESPONSES
        return tool.native.value if tool.native and own else {"type": tool.name}
    named = no_nulls({"name": tool.name, "description": tool.description or None})
    if tool.kind == "custom":
        return {"type": "custom", **named, "format": tool.format or {"type": "text"}}
    schema, strict = openai_schema(object_schema(tool.schema), tool.strict, losses, "tools.strict")
    # wire: without `strict` the server tries to make the schema strict by itself
    return {"type": "function", **named, "parameters": schema, "strict": bool(strict)}


def _responses_render_choice(prompt: Prompt) -> Json:
    choice = prompt.tool_choice
    if choice is None:
        return None
    by_name = {tool.name: tool for tool in prompt.tools}
    hosted = by_name.get(choice.names[0]) if choice.names else None
    if choice.mode == "named" and hosted and hosted.kind == "hosted":
        own = hosted.native and hosted.native.protocol is ApiProtocol.RESPONSES
        return {"type": hosted.native.value["type"] if hosted.native and own else hosted.name}
    kinds = {tool.name: tool.kind for tool in prompt.tools}
    tools = [{"type": kinds.get(name, "function"), "name": name} for name in choice.names]
    if choice.mode == "named":
        return tools[0]
    if choice.mode == "allowed":
        mode = "required" if choice.must else "auto"
        return {"type": "allowed_tools", "mode": mode, "tools": tools}
    return choice.mode


def _responses_render_text(prompt: Prompt, losses: Losses) -> JsonObject:
    text: JsonObject = {}
    output = prompt.output
    if prompt.verbosity:
        text["verbosity"] = prompt.verbosity
    if output and output.kind == "json_object":
        text["format"] = {"type": "json_object"}
    elif output:
        schema, strict = openai_schema(output.schema or {}, output.strict, losses, "text.format")
        facts: JsonObject = {"type": "json_schema"}
        facts["name"] = re.sub(r"[^a-zA-Z0-9_-]", "_", output.name)[:64] or "response"
        if output.description:
            facts["description"] = output.description
        text["format"] = {**facts, "schema": schema, "strict": bool(strict)}
    return text


def _responses_items(message: Message, traits: Traits) -> list[JsonObject]:
    if message.role == "assistant":
        return _responses_said(message)
    items: list[JsonObject] = []
    plain: list[JsonObject] = []
    for part in message.content:
        if isinstance(part, ToolResult):
            kind = "custom_tool_call_output" if part.custom else "function_call_output"
            output = _responses_output_of(part)
            items.append({"type": kind, "call_id": part.call_id, "output": output})
        elif isinstance(part, Text | Media):
            plain.append(_responses_render_part(part))
    if not message.content and message.role == "user":
        plain.append({"type": "input_text", "text": ""})
    if plain:
        alone = len(plain) == 1 and {*plain[0]} == {"type", "text"}
        role = message.role
        if role == "developer" and not traits.developer_role:
            role = "system"
        items.append({"role": role, "content": plain[0]["text"] if alone else plain})
    return items


def _responses_output_of(result: ToolResult) -> Json:
    parts = [_responses_render_part(part) for part in result.content]
    if result.is_error:
        parts.insert(0, {"type": "input_text", "text": "Error: "})
    if parts and result.cache:
        parts[-1] |= OPENAI_BREAKPOINT
    if all({*part} == {"type", "text"} for part in parts):
        between = "" if result.is_error else "\n"
        return between.join(part["text"] for part in parts)
    return parts


def _responses_render_part(part: Text | Media) -> JsonObject:
    """A part; what is marked to be cached says so."""
    rendered = _responses_render_plain_part(part)
    return {**rendered, **OPENAI_BREAKPOINT} if part.cache else rendered


def _responses_render_plain_part(part: Text | Media) -> JsonObject:
    if isinstance(part, Text):
        return {"type": "input_text", "text": part.text}
    where = part.url or (data_url(part) if part.data else "")
    if part.kind == "image":
        image = {"file_id": part.file_id} if part.file_id else {"image_url": where}
        return {"type": "input_image", "detail": part.detail or "auto", **image}
    if part.kind == "document":
        plain = text_in(part)
        if plain is not None:
            return {"type": "input_text", "text": plain}
        if part.file_id:
            return {"type": "input_file", "file_id": part.file_id}
        if part.url:
            return {"type": "input_file", "file_url": part.url}
        return {"type": "input_file", "filename": part.name or "file.pdf", "file_data": where}
    raise refuse_part(part, "Responses")


def _responses_said(message: Message) -> list[JsonObject]:
    """What the assistant said, as items. Reasoning goes only before the item that it led to."""
    items: list[JsonObject] = []
    waiting: list[JsonObject] = []
    for part in message.content:
        item: JsonObject | None = None
        match part:
            case Reasoning(text, opaque) if opaque is not None:
                summary = [{"type": "summary_text", "text": text}] if text else []
                state = {"summary": summary, "encrypted_content": opaque.data}
                ident = {"id": opaque.id} if opaque.id else {}
                waiting.append({"type": "reasoning", **ident, **state})
            case Text(text) | Refusal(text) if text:
                item = {"role": "assistant", "content": text}
            case ToolCall():
                item = _responses_render_call(part)
            case Native():
                item = part.value
        if item is not None:
            items += [*waiting, item]
            waiting = []
    return items


def _responses_render_call(call: ToolCall) -> JsonObject:
    named = {"call_id": call.id, "name": call.name}
    if call.custom:
        return {"type": "custom_tool_call", **named, "input": call.arguments}
    within = {"namespace": call.namespace} if call.namespace else {}
    return {"type": "function_call", **named, **within, "arguments": call.arguments or "{}"}


# An answer, for a caller.

_RESPONSES_FINISHES, _RESPONSES_MEANINGS = finish_words(2)


def _responses_render_response(
    prompt: Prompt,
    label: AnswerLabel,
    choices: list[Choice],
    usage: Usage,
    losses: Losses,  # noqa: ARG001  nothing is lost
) -> JsonObject:
    answer = choices[0]
    items: list[JsonObject] = []
    for block in _responses_blocks(answer.content):
        items.append(_responses_render_block(block, f"{label.id}_{len(items)}"))
    frame = _responses_frame_of(prompt, label)
    return {**frame, **_responses_end(answer.finished), "output": items} | {
        "usage": _responses_render_usage(usage)
    }


def _responses_blocks(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks, with the state of calls as reasoning before them: items have no other place."""
    for block in blocks:
        if isinstance(block, ToolCall) and block.opaque:
            yield Reasoning("", block.opaque)
        yield block


def _responses_frame_of(prompt: Prompt, label: AnswerLabel) -> JsonObject:
    """A response with nothing in it. wire: OpenAI's SDK wants each of these fields."""
    return {
        "id": f"resp_br{label.id}",
        "object": "response",
        "created_at": label.created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": prompt.max_tokens,
        "model": label.model,
        "output": [],
        "parallel_tool_calls": prompt.parallel_tools is not False,
        "previous_response_id": None,
        "reasoning": {"effort": prompt.thinking.effort or None, "summary": None},
        "store": prompt.store is not False,
        "temperature": prompt.sampling.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": prompt.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "metadata": prompt.metadata or {},
    }


def _responses_end(finished: Finished) -> JsonObject:
    word = _RESPONSES_FINISHES[finished.finish]
    if word == "completed":
        return {"status": word}
    return {"status": "incomplete", "incomplete_details": {"reason": word}}


def _responses_render_usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def _responses_render_block(block: Block, ident: str, status: str = "completed") -> JsonObject:
    """A block as an output item."""
    match block:
        case Reasoning(text, opaque):
            summary = [{"type": "summary_text", "text": text}] if text else []
            item: JsonObject = {"id": f"rs_{ident}", "type": "reasoning", "summary": summary}
            if status == "completed":
                state = sealed_for(opaque or UNSIGNED, "openai", "encrypted")
                item["encrypted_content"] = state
            return item
        case ToolCall():
            kind = "ctc" if block.custom else "fc"
            return {"id": f"{kind}_{ident}", **_responses_render_call(block), "status": status}
        case Media():
            item = {"id": f"ig_{ident}", "type": "image_generation_call", "status": status}
            return {**item, "result": block.data}
    content = [_responses_text_part(block)]
    item = {"id": f"msg_{ident}", "type": "message", "status": status, "role": "assistant"}
    return {**item, "content": content}


def _responses_text_part(block: Text | Refusal) -> JsonObject:
    if isinstance(block, Refusal):
        return {"type": "refusal", "refusal": block.text}
    cited = [_responses_annotation(citation) for citation in block.citations]
    part = {"type": "output_text", "text": block.text, "annotations": cited}
    return {**part, "logprobs": list(block.logprobs)}


def _responses_annotation(cited: Citation) -> JsonObject:
    facts = {"url": cited.url, "title": cited.title}
    return {"type": "url_citation", **facts, "start_index": cited.start, "end_index": cited.end}


class _ResponsesEncoder:
    """wire: one item closes before the next opens; ids and indices stay; every event is numbered;
    the last one holds the whole answer."""

    def __init__(self, prompt: Prompt, label: AnswerLabel) -> None:
        self._response = _responses_frame_of(prompt, label)
        self._label = label
        self._number = 0
        self._in_order = InOrder()
        self._items: list[JsonObject] = []
        self._block: Block = Text()
        self._at: JsonObject = {}  # where the open block is: item_id, output_index
        self._grown: list[str] = []
        self._cited: list[Citation] = []
        self._logprobs: list[JsonObject] = []
        self._finished = Finished(Finish.STOP)

    def encode(self, part: StreamPart) -> bytes:
        if isinstance(part, Finished):
            self._finished = part
            return self._opening()
        return self._opening() + b"".join([self._encode(p) for p in self._in_order.feed(part)])

    def end(self, usage: Usage) -> bytes:
        response = {**self._response, **_responses_end(self._finished), "output": self._items}
        response["usage"] = _responses_render_usage(usage)
        return self._event(f"response.{response['status']}", response=response)

    def fail(self, error: BitrouterError) -> bytes:
        why = {"code": "server_error", "message": error.message}
        response = {**self._response, "status": "failed", "error": why, "output": self._items}
        return self._opening() + self._event("response.failed", response=response)

    def _opening(self) -> bytes:
        if self._number:
            return b""
        return self._event("response.created", response=self._response) + self._event(
            "response.in_progress", response=self._response
        )

    def _encode(self, part: StreamPart) -> bytes:
        match part:
            case Delta(_, text, logprobs):
                return self._delta(text, logprobs)
            case Open(_, block):
                return self._open(block)
            case Cite(_, citation):
                self._cited.append(citation)
                note = _responses_annotation(citation)
                where = {**self._at, "content_index": 0, "annotation_index": len(self._cited) - 1}
                kind = "response.output_text.annotation.added"
                return self._event(kind, **where, annotation=note)
            case Close(_, opaque):
                return self._close(opaque)
        return b""

    def _open(self, block: Block) -> bytes:
        out = b""
        if isinstance(block, ToolCall) and block.opaque:
            out = self._open(Reasoning()) + self._close(block.opaque)
        self._block = block
        self._grown, self._cited, self._logprobs = [], [], []
        ident = f"{self._label.id}_{len(self._items)}"
        item = _responses_render_block(block, ident, "in_progress")
        if isinstance(block, ToolCall) and not block.custom:
            item["arguments"] = ""
        elif isinstance(block, Text | Refusal):
            item["content"] = []
        self._at = {"item_id": item["id"], "output_index": len(self._items)}
        out += self._event("response.output_item.added", output_index=len(self._items), item=item)
        if isinstance(block, Text | Refusal):
            part = _responses_text_part(block)
            kind = "response.content_part.added"
            out += self._event(kind, **self._at, content_index=0, part=part)
        return out

    def _delta(self, text: str, logprobs: tuple[JsonObject, ...]) -> bytes:
        first = not self._grown
        self._grown.append(text)
        match self._block:
            case Text():
                self._logprobs += logprobs
                where = {**self._at, "content_index": 0, "logprobs": list(logprobs)}
                return self._event("response.output_text.delta", **where, delta=text)
            case Refusal():
                return self._event(
                    "response.refusal.delta", **self._at, content_index=0, delta=text
                )
            case ToolCall():
                kind = "custom_tool_call_input" if self._block.custom else "function_call_arguments"
                return self._event(f"response.{kind}.delta", **self._at, delta=text)
        where = {**self._at, "summary_index": 0}
        out = b""
        if first:
            part = {"type": "summary_text", "text": ""}
            out = self._event("response.reasoning_summary_part.added", **where, part=part)
        return out + self._event("response.reasoning_summary_text.delta", **where, delta=text)

    def _close(self, opaque: Opaque | None) -> bytes:
        text = "".join(self._grown)
        block = with_text(self._block, text)
        out = b""
        match block:
            case Text():
                told = (tuple(self._cited), tuple(self._logprobs))
                block = block._replace(citations=told[0], logprobs=told[1])
                kind, more = "output_text", {"text": text, "logprobs": self._logprobs}
                out = self._event(f"response.{kind}.done", **self._at, content_index=0, **more)
            case Refusal():
                out = self._event(
                    "response.refusal.done", **self._at, content_index=0, refusal=text
                )
            case ToolCall(name=name, custom=False):
                kind, text = "response.function_call_arguments.done", text or "{}"
                if not self._grown:
                    out = self._event(
                        "response.function_call_arguments.delta", **self._at, delta=text
                    )
                out += self._event(kind, **self._at, name=name, arguments=text)
            case ToolCall():
                out = self._event("response.custom_tool_call_input.done", **self._at, input=text)
            case Reasoning():
                block = Reasoning(text, opaque)
                out = self._close_summary(text) if text else b""
        if isinstance(block, Text | Refusal):
            part = _responses_text_part(block)
            kind = "response.content_part.done"
            out += self._event(kind, **self._at, content_index=0, part=part)
        item = _responses_render_block(block, f"{self._label.id}_{len(self._items)}")
        self._items.append(item)
        index = self._at["output_index"]
        return out + self._event("response.output_item.done", output_index=index, item=item)

    def _close_summary(self, text: str) -> bytes:
        where = {**self._at, "summary_index": 0}
        part = {"type": "summary_text", "text": text}
        return self._event(
            "response.reasoning_summary_text.done", **where, text=text
        ) + self._event("response.reasoning_summary_part.done", **where, part=part)

    def _event(self, kind: str, **facts: Json) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **facts}
        self._number += 1
        return sse_encode(compact(event), kind)


# A provider's answer, read.

_RESPONSES_GROWING = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "refusal",
    "response.function_call_arguments.delta": "call",
    "response.custom_tool_call_input.delta": "call",
    "response.reasoning_summary_text.delta": "reasoning",
    "response.reasoning_text.delta": "reasoning",
}
_RESPONSES_EMPTY: dict[str, Block] = {
    "text": Text(),
    "refusal": Refusal(),
    "reasoning": Reasoning(),
}


class _ResponsesDecoder:
    def __init__(self, vendor: str) -> None:
        self.model = ""
        self.lost: set[str] = set()
        self._vendor = vendor
        self._keys = itertools.count()
        self._open: dict[tuple[int, int], int] = {}  # output and content index -> key
        self._grown: set[int] = set()  # keys that have had text
        self._summary: dict[int, int] = {}  # key -> the part of its summary that grows
        self._shown = self._refused = self._over = False

    def feed(self, value: JsonObject) -> list[StreamPart]:
        kind = str(value.get("type"))
        grows = _RESPONSES_GROWING.get(kind)
        if grows:
            return self._grow(grows, value)
        if kind == "response.output_item.added":
            return self._item_added(value)
        if kind == "response.output_item.done":
            return self._item_done(value)
        if kind == "response.output_text.annotation.added":
            key = self._open.get(self._place("text", value))
            citation = _responses_citation(value.get("annotation"))
            return [Cite(key, citation)] if citation and key is not None else []
        if kind in ("response.completed", "response.incomplete"):
            return self._end(as_object(value.get("response")))
        if not self.model and isinstance(dig(value, "response", "model"), str):
            self.model = value["response"]["model"]
        return []

    def finish(self) -> list[StreamPart]:
        return [Close(self._open.pop(place)) for place in list(self._open)]

    def resume(self, body: JsonObject) -> JsonObject:
        return body  # no model of this protocol pauses

    def whole(self, value: JsonObject) -> list[StreamPart]:
        self.model = str(value.get("model") or "")
        return [*self._items(value), self._finished(value)]

    def _place(self, kind: str, value: JsonObject) -> tuple[int, int]:
        """Texts and refusals stand in an item by index; of the rest there is one to an item."""
        content = whole(value.get("content_index")) if kind in ("text", "refusal") else -1
        return whole(value.get("output_index")), content

    def _grow(self, kind: str, value: JsonObject) -> list[StreamPart]:
        place = self._place(kind, value)
        key = self._open.get(place)
        text = value["delta"] if isinstance(value.get("delta"), str) else ""
        if not text:
            return []
        self._shown = True
        if key is not None and kind != "reasoning":
            self._grown.add(key)
            told = value.get("logprobs")
            return [Delta(key, text, tuple(told) if isinstance(told, list) else ())]
        out: list[StreamPart] = []
        if key is None:
            if kind not in _RESPONSES_EMPTY:
                return []  # a call that never began
            self._refused = self._refused or kind == "refusal"
            key = self._open[place] = next(self._keys)
            out.append(Open(key, _RESPONSES_EMPTY[kind]))
        if kind == "reasoning":
            at = whole(value.get("summary_index"))
            if at > self._summary.get(key, 0):
                text = "\n\n" + text
            self._summary[key] = at
        self._grown.add(key)
        told = as_list(value.get("logprobs"))
        return [*out, Delta(key, text, tuple(one for one in told if isinstance(one, dict)))]

    def _item_added(self, value: JsonObject) -> list[StreamPart]:
        item = as_object(value.get("item"))
        block = self._block(item)
        if block is None or isinstance(block, Text | Refusal | Media):
            return []
        self._shown = True
        key = self._open[whole(value.get("output_index")), -1] = next(self._keys)
        opened = Reasoning() if isinstance(block, Reasoning) else with_text(block, "")
        return [Open(key, opened)]

    def _item_done(self, value: JsonObject) -> list[StreamPart]:
        item, index = as_object(value.get("item")), whole(value.get("output_index"))
        places = [place for place in self._open if place[0] == index]
        block = self._block(item)
        if not places:
            return self._said(item)
        out: list[StreamPart] = []
        for place in places:
            key = self._open.pop(place)
            state = block.opaque if isinstance(block, Reasoning) else None
            text = text_of(block) if block and not isinstance(block, Text | Refusal) else ""
            if text and key not in self._grown:
                out.append(Delta(key, text))
            out.append(Close(key, state))
        return out

    def _block(self, item: JsonObject) -> Block | None:
        """The item's block; a message's is any text, its own come by their parts."""
        match item.get("type"):
            case "message":
                return Text()
            case "function_call" | "custom_tool_call" if isinstance(item.get("call_id"), str):
                name = {"name": str(item.get("name") or "")}
                return _responses_call({**item, **name}, "item")
            case "reasoning":
                return _responses_reasoning(item, self._vendor, minted)
            case "image_generation_call" if isinstance(item.get("result"), str):
                return media_of_bytes("image", "image/png", item["result"], "result")
        return None

    def _said(self, item: JsonObject) -> list[StreamPart]:
        """An item that came whole."""
        block = self._block(item)
        if block is None:
            self.lost.add(str(item.get("type")))
        blocks = [block] if block else []
        if isinstance(block, Text):
            blocks = list(_responses_answer_texts(item))
            self._refused = self._refused or any(isinstance(b, Refusal) for b in blocks)
        self._shown = self._shown or bool(blocks)
        return [part for one in blocks for part in parts_of(one, next(self._keys))]

    def _items(self, response: JsonObject) -> list[StreamPart]:
        out: list[StreamPart] = []
        for item in as_list(response.get("output")):
            out += self._said(as_object(item))
        return out

    def _end(self, response: JsonObject) -> list[StreamPart]:
        if self._over:
            return []
        self._over = True
        out = [] if self._shown else self._items(response)
        return [*out, *self.finish(), self._finished(response)]

    def _finished(self, response: JsonObject) -> Finished:
        reason = str(dig(response, "incomplete_details", "reason") or "")
        status = str(response.get("status") or "completed")
        word = reason if status == "incomplete" else "completed"
        finish = _RESPONSES_MEANINGS.get(word, Finish.STOP)
        if finish is Finish.STOP and self._refused:
            finish = Finish.REFUSAL
        return Finished(finish, raw=reason or status)


def _responses_answer_texts(item: JsonObject) -> Iterator[Text | Refusal]:
    for part in as_list(item.get("content")):
        if dig(part, "type") == "refusal":
            yield Refusal(str(dig(part, "refusal") or ""))
        elif isinstance(dig(part, "text"), str):
            cited = [_responses_citation(one) for one in as_list(part.get("annotations"))]
            told = tuple(one for one in as_list(part.get("logprobs")) if isinstance(one, dict))
            yield Text(part["text"], tuple(c for c in cited if c), logprobs=told)


def _responses_citation(cited: Json) -> Citation | None:
    facts = as_object(cited)
    if facts.get("type") != "url_citation" or not isinstance(facts.get("url"), str):
        return None
    start, end = whole(facts.get("start_index")), whole(facts.get("end_index"))
    return Citation(facts["url"], str(facts.get("title") or ""), start, end)


def _responses_sealed(body: JsonObject) -> bool:
    return any(dig(item, "type") == "reasoning" for item in as_list(body.get("input")))


def _responses_unseal(body: JsonObject, vendor: str) -> bool:
    items, changed = as_list(body.get("input")), False
    kept: list[Json] = []
    for item in items:
        sealed = dig(item, "encrypted_content")
        if isinstance(sealed, str) and sealed.startswith(ENVELOPE):
            changed = True
            opaque = unseal(sealed)
            if opaque is None or (opaque.vendor, opaque.kind) != (vendor, "encrypted"):
                continue
            item["encrypted_content"] = opaque.data
            if opaque.id:
                item["id"] = opaque.id
        kept.append(item)
    if changed:
        body["input"] = kept
    return changed


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
    mend=nothing_to_mend,
    fail_stream=_responses_fail_stream,
    parse_request=_responses_parse_request,
    render_request=_responses_render_request,
    render_response=_responses_render_response,
    decoder=_ResponsesDecoder,
    encoder=_ResponsesEncoder,
    names=re.compile(r"[A-Za-z0-9_-]{1,64}"),
    sealed=_responses_sealed,
    unseal=_responses_unseal,
)


# ---------------------------------------------------------------------------------------------
# 10. messages: Anthropic Messages (pure)
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


# A caller's request, read.

_MESSAGES_KNOWN = frozenset({
    "model", "messages", "system", "max_tokens", "stream", "stop_sequences", "temperature",
    "top_p", "top_k", "tools", "tool_choice", "thinking", "output_config", "output_format",
    "metadata", "service_tier", "cache_control", "speed",
})  # fmt: skip
_MESSAGES_THREADS = "thread_unsupported_request"


def _messages_parse_request(body: JsonObject) -> Prompt:
    _messages_refuse_threads(body)
    messages = [
        _messages_message(m, here) for here, m in each_object(body.get("messages"), "messages")
    ]
    if not messages:
        raise BadRequest("messages: expected a list with at least one message", param="messages")
    system = _messages_system(body.get("system"))
    if system:
        messages.insert(0, Message("system", system))
    choice = maybe(body, "tool_choice", dict) or {}
    config = maybe(body, "output_config", dict) or {}
    return Prompt(
        model=str(body.get("model")),
        messages=_messages_named_results(messages),
        source=ApiProtocol.MESSAGES,
        stream=body.get("stream") is True,
        max_tokens=count_in(body, "max_tokens"),
        sampling=Sampling(
            temperature=number(body, "temperature"),
            top_p=number(body, "top_p"),
            top_k=count_in(body, "top_k"),
            stop=strings_in(body.get("stop_sequences"), "stop_sequences"),
        ),
        tools=tuple(_messages_tool(t, here) for here, t in each_object(body.get("tools"), "tools")),
        tool_choice=_messages_tool_choice(choice),
        parallel_tools=False if choice.get("disable_parallel_tool_use") is True else None,
        output=_messages_output(config.get("format") or body.get("output_format")),
        thinking=_messages_thinking(maybe(body, "thinking", dict) or {}, config.get("effort")),
        tier=_messages_read_tier(body),
        user=str(dig(body, "metadata", "user_id") or ""),
        cache=_messages_ttl(body),
        extra=the_rest(body, _MESSAGES_KNOWN),
    )


def _messages_read_tier(body: JsonObject) -> str:
    tier = maybe(body, "service_tier", str) or ""
    return "fast" if body.get("speed") == "fast" else {"standard_only": "default"}.get(tier, tier)


def _messages_refuse_threads(body: JsonObject) -> None:
    """wire: the SDK's tool runner repeats a request without threads when it is told so in these
    very words (anthropic 2.12.0, beta message-threads-2026-08-12)."""
    if "thread" in body:
        raise BadRequest(
            "thread: this model is reached through another protocol, which keeps no threads",
            code=_MESSAGES_THREADS,
            param="thread",
            extra={"unsupported": ["thread"]},
        )


def _messages_ttl(block: JsonObject) -> str:
    """The time to live of a cache mark; "" for none."""
    mark = block.get("cache_control")
    return str(mark.get("ttl") or "5m") if isinstance(mark, dict) else ""


def _messages_system(system: Json) -> tuple[Content, ...]:
    if isinstance(system, str):
        return (Text(system),) if system else ()
    texts = [
        Text(typed(block.get("text"), str, f"{here}.text"), cache=_messages_ttl(block))
        for here, block in each_object(system, "system")
    ]
    # wire: Claude Code's first block is about its billing, and nobody else's business
    return tuple(t for t in texts if t.text and not t.text.startswith("x-anthropic-billing-"))


def _messages_output(wanted: Json) -> OutputFormat | None:
    if dig(wanted, "type") != "json_schema":
        return None
    schema = typed(wanted.get("schema"), dict, "output_config.format.schema")
    return OutputFormat("json_schema", schema=schema, strict=True)


def _messages_thinking(thinking: JsonObject, effort: Json) -> Thinking:
    kind = thinking.get("type")
    if kind == "disabled":
        return Thinking("none", visible=False)
    budget = whole(thinking.get("budget_tokens")) or None if kind == "enabled" else None
    level = effort if isinstance(effort, str) and effort in EFFORTS else ""
    if not level and budget:
        level = effort_of(budget)
    visible = None if kind is None else thinking.get("display") != "omitted"
    return Thinking(level, budget, kind in ("adaptive", "between_tools"), visible)


def _messages_tool(tool: JsonObject, where: str) -> Tool:
    name = typed(tool.get("name"), str, f"{where}.name")
    if tool.get("type") not in (None, "custom"):
        spelt = WEB_SEARCH if str(tool["type"]).startswith("web_search_") else name
        return Tool(spelt, kind="hosted", native=Native(ApiProtocol.MESSAGES, tool))
    return Tool(
        name=name,
        description=maybe(tool, "description", str) or "",
        schema=maybe(tool, "input_schema", dict),
        strict=maybe(tool, "strict", bool),
        cache=_messages_ttl(tool),
    )


def _messages_tool_choice(choice: JsonObject) -> ToolChoice | None:
    match choice.get("type"):
        case None:
            return None
        case "any":
            return ToolChoice("required")
        case "tool":
            return ToolChoice("named", (typed(choice.get("name"), str, "tool_choice.name"),))
        case "auto" | "none" as mode:
            return ToolChoice(mode)
    found = show_json(choice.get("type"))
    raise BadRequest(
        f"tool_choice.type: expected auto, any, tool or none; got {found}", param="tool_choice.type"
    )


def _messages_message(message: JsonObject, where: str) -> Message:
    role = message.get("role")
    if role not in ("user", "assistant", "system"):
        raise BadRequest(
            f"{where}.role: expected user, assistant or system; got {show_json(role)}",
            param=f"{where}.role",
        )
    return Message(str(role), _messages_content(message.get("content"), f"{where}.content"))


def _messages_content(content: Json, where: str) -> tuple[Content, ...]:
    if content is None or content == "":
        return ()
    if isinstance(content, str):
        return (Text(content),)
    parts: list[Content] = []
    for here, block in each_object(content, where):
        source = as_object(block.get("source"))
        if block.get("type") == "document" and source.get("type") == "content":
            parts += _messages_content(source.get("content"), f"{here}.source.content")
        else:
            parts.append(_messages_block(block, here))
    return tuple(parts)


def _messages_block(block: JsonObject, where: str) -> Content:
    kind = block.get("type")
    if not isinstance(kind, str):
        raise BadRequest(f"{where}.type: expected a kind of block", param=f"{where}.type")
    read = _MESSAGES_BLOCKS.get(kind)
    return read(block, where) if read else Native(ApiProtocol.MESSAGES, block)


def _messages_text(block: JsonObject, where: str) -> Content:
    return Text(typed(block.get("text"), str, f"{where}.text"), cache=_messages_ttl(block))


def _messages_thought(block: JsonObject, where: str) -> Content:  # noqa: ARG001
    if block["type"] == "redacted_thinking":
        return Reasoning("", opaque_from(block.get("data"), "anthropic", "redacted"))
    opaque = opaque_from(block.get("signature"), "anthropic", "signature")
    return Reasoning(str(block.get("thinking") or ""), opaque)


def _messages_call(block: JsonObject, where: str) -> Content:
    given = block.get("input")
    return ToolCall(
        id=typed(block.get("id"), str, f"{where}.id"),
        name=typed(block.get("name"), str, f"{where}.name"),
        arguments=compact({} if given is None else given).decode(),
        cache=_messages_ttl(block),
    )


def _messages_result(block: JsonObject, where: str) -> Content:
    ident = typed(block.get("tool_use_id"), str, f"{where}.tool_use_id")
    inner = _messages_content(block.get("content"), f"{where}.content")
    plain = (Text(compact(p.value).decode()) if isinstance(p, Native) else p for p in inner)
    told = tuple(part for part in plain if isinstance(part, Text | Media))
    return ToolResult(ident, told, block.get("is_error") is True, cache=_messages_ttl(block))


def _messages_found(block: JsonObject, where: str) -> Content:
    texts = joined_text(_messages_content(block.get("content"), f"{where}.content"), "\n")
    head = f"{block.get('title')}\n{block.get('source')}"
    return Text(f"{head}\n\n{texts}", cache=_messages_ttl(block))


def _messages_media(block: JsonObject, where: str) -> Content:
    kind, cache = block["type"], _messages_ttl(block)
    source = typed(block.get("source"), dict, f"{where}.source")
    where = f"{where}.source"
    name = str(block.get("title") or "")
    mime = str(source.get("media_type") or "")
    match source.get("type"):
        case "base64":
            return media_of_bytes(
                kind, mime, source.get("data"), f"{where}.data", name=name, cache=cache
            )
        case "url":
            return media_at(kind, source.get("url"), f"{where}.url", name=name, cache=cache)
        case "file":
            ident = typed(source.get("file_id"), str, f"{where}.file_id")
            return Media(kind, file_id=ident, vendor="anthropic", name=name, cache=cache)
        case "text":
            text = typed(source.get("data"), str, f"{where}.data")
            data = base64.b64encode(text.encode("utf-8", "replace")).decode()
            return Media(kind, "text/plain", data, name=name, cache=cache)
    found = show_json(source.get("type"))
    raise BadRequest(
        f"{where}.type: expected base64, url, text, content or file; got {found}",
        param=f"{where}.type",
    )


_MESSAGES_BLOCKS: dict[str, Callable[[JsonObject, str], Content]] = {
    "text": _messages_text,
    "image": _messages_media,
    "document": _messages_media,
    "thinking": _messages_thought,
    "redacted_thinking": _messages_thought,
    "tool_use": _messages_call,
    "tool_result": _messages_result,
    "search_result": _messages_found,
}


def _messages_named_results(messages: list[Message]) -> tuple[Message, ...]:
    """Results with the names of the tools that they come from."""
    names = {p.id: p.name for m in messages for p in m.content if isinstance(p, ToolCall)}
    done = []
    for n, message in enumerate(messages):
        content: list[Content] = []
        for part in message.content:
            if isinstance(part, ToolResult):
                if part.call_id not in names:
                    where = f"messages[{n}].content.tool_use_id"
                    found = show_json(part.call_id)
                    raise BadRequest(f"{where}: no tool_use has the id {found}", param=where)
                part = part._replace(name=names[part.call_id])
            content.append(part)
        done.append(message._replace(content=tuple(content)))
    return tuple(done)


# A request for a provider, written.

_MESSAGES_UNKNOWN_MAX = 8192  # tokens, for a model of which nothing is known
_MESSAGES_LEAST_BUDGET = 1024
_MESSAGES_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def _messages_render_request(prompt: Prompt, traits: Traits, losses: Losses) -> JsonObject:
    same = prompt.source is ApiProtocol.MESSAGES
    limit = prompt.max_tokens
    if limit is None:
        limit = traits.max_output or _MESSAGES_UNKNOWN_MAX
    tools = [_messages_render_tool(tool) for tool in _messages_all_tools(prompt)]
    thinking, effort = _messages_render_thinking(prompt, traits, limit, losses)
    config: JsonObject = {"effort": effort} if effort else {}
    if prompt.output and prompt.output.kind == "json_schema":
        config["format"] = {"type": "json_schema", "schema": prompt.output.schema}
    sampling = prompt.sampling
    temperature = sampling.temperature
    if thinking and thinking["type"] == "enabled" and temperature not in (None, 1):
        losses.add("dropped", "temperature")  # wire: not together with thinking
        temperature = None
    system, messages = _messages_render_messages(prompt)
    body = {
        "model": prompt.model,
        "max_tokens": limit,
        "system": system or None,
        "messages": messages,
        "stream": True if prompt.stream else None,
        "stop_sequences": list(sampling.stop) or None,
        "temperature": temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "tools": tools or None,
        "tool_choice": _messages_render_choice(prompt) if tools else None,
        "thinking": thinking,
        "output_config": config or None,
        "metadata": {"user_id": prompt.user} if prompt.user else None,
        **_messages_tier(prompt, losses),
        "cache_control": _messages_mark(prompt.cache) or None,
        **(prompt.extra if same else {}),
    }
    return no_nulls(body)


# wire: docs.claude.com/en/api/service-tiers, read 2026-11
_MESSAGES_TIERS = {
    "auto": "auto", "default": "standard_only", "standard": "standard_only", "priority": "auto",
    "standard_only": "standard_only",
}  # fmt: skip


def _messages_tier(prompt: Prompt, losses: Losses) -> JsonObject:
    if not prompt.tier:
        return {}
    if prompt.tier in ("fast", "ultrafast"):
        return {"speed": "fast"}
    if prompt.tier not in _MESSAGES_TIERS:
        losses.add("dropped", "service_tier")
        return {}
    return {"service_tier": _MESSAGES_TIERS[prompt.tier]}


def _messages_mark(ttl: str) -> JsonObject:
    if not ttl:
        return {}
    return {"type": "ephemeral", **({"ttl": "1h"} if ttl in ("1h", "12h") else {})}


def _messages_all_tools(prompt: Prompt) -> tuple[Tool, ...]:
    """The tools on offer, and if there are none those that were called: wire: a conversation with
    calls in it needs their tools declared."""
    if prompt.tools:
        return prompt.tools
    called = [p.name for m in prompt.messages for p in m.content if isinstance(p, ToolCall)]
    return tuple(Tool(name) for name in dict.fromkeys(called))


def _messages_render_tool(tool: Tool) -> JsonObject:
    if tool.kind == "hosted":
        own = tool.native and tool.native.protocol is ApiProtocol.MESSAGES
        search = {"type": "web_search_20250305", "name": WEB_SEARCH}
        return tool.native.value if tool.native and own else search
    schema = object_schema(tool.schema)
    if any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref")) or "type" not in schema:
        schema = {"type": "object", **{k: v for k, v in schema.items() if k != "type"}}
        schema = {k: v for k, v in schema.items() if k not in ("anyOf", "oneOf", "allOf")}
    rendered: JsonObject = {"name": tool.name}
    if tool.description:
        rendered["description"] = tool.description
    rendered["input_schema"] = schema
    if tool.strict and (fitting := for_claude(schema)) is not None:
        rendered |= {"strict": True, "input_schema": fitting}
    if tool.cache:
        rendered["cache_control"] = _messages_mark(tool.cache)
    return rendered


def _messages_render_choice(prompt: Prompt) -> JsonObject | None:
    choice, one_at_a_time = prompt.tool_choice, prompt.parallel_tools is False
    rendered: JsonObject | None = None
    match choice.mode if choice else None:
        case "required":
            rendered = {"type": "any"}
        case "named" if choice:
            rendered = {"type": "tool", "name": choice.names[0]}
        case "auto" | "none" as mode:
            rendered = {"type": mode}
    if one_at_a_time and (rendered is None or rendered["type"] != "none"):
        rendered = {**(rendered or {"type": "auto"}), "disable_parallel_tool_use": True}
    if choice is None and not prompt.tools and not one_at_a_time:
        return {"type": "none"}  # tools declared for the history's sake alone
    return rendered


def _messages_render_thinking(
    prompt: Prompt, traits: Traits, limit: int, losses: Losses
) -> tuple[JsonObject | None, str]:
    """The `thinking` and the effort that ask for as much reasoning as the caller did."""
    wanted = prompt.thinking
    if wanted.effort == "none":
        if traits.can_stop_thinking:
            return ({"type": "disabled"} if traits.thinking else None), ""
        losses.add("thinking_always_on", "reasoning_effort", harmful=False)
        return None, "low"
    if not wanted.effort and wanted.budget is None and not wanted.adaptive:
        return None, ""
    if traits.thinking == "adaptive":
        thinking: JsonObject = {"type": "adaptive"}
        if wanted.visible:
            thinking["display"] = "summarized"
        return thinking, nearest_effort(wanted.effort, traits.efforts)
    return _messages_budget(prompt, limit, losses), ""


def _messages_budget(prompt: Prompt, limit: int, losses: Losses) -> JsonObject | None:
    """Thinking for models that want it counted in tokens."""
    wanted = prompt.thinking
    by_effort = {effort: claude for effort, claude, *_ in EFFORT_ROSETTA}
    budget = wanted.budget or by_effort.get(wanted.effort or "medium", 8192)
    budget = min(max(budget, _MESSAGES_LEAST_BUDGET), limit - 1)
    if budget < _MESSAGES_LEAST_BUDGET:
        losses.add("dropped", "reasoning_effort")
        return None
    if _messages_forces(prompt) or _messages_lacks_thinking(prompt.messages):
        losses.add("thinking_off_for_tools", "reasoning_effort", harmful=False)
        return None
    return {"type": "enabled", "budget_tokens": budget}


def _messages_forces(prompt: Prompt) -> bool:
    return bool(prompt.tool_choice and prompt.tool_choice.mode in ("required", "named"))


def _messages_lacks_thinking(messages: Iterable[Message]) -> bool:
    """Whether a turn with calls is going on that has no thinking of Claude's in it: with budgeted
    thinking on, Claude refuses to go on with it."""
    for message in reversed(list(messages)):
        if message.role == "user" and not any(isinstance(p, ToolResult) for p in message.content):
            return False
        kinds = [type(part) for part in message.content]
        if message.role == "assistant" and ToolCall in kinds and Reasoning not in kinds:
            return True
    return False


def _messages_render_messages(prompt: Prompt) -> tuple[Json, list[JsonObject]]:
    messages = list(prompt.messages)
    system: list[Content] = []
    while messages and messages[0].role in ("system", "developer"):
        system += messages.pop(0).content
    rendered: list[JsonObject] = []
    for turn in turns(messages):
        content = [_messages_render_part(part) for part in turn.content]
        blocks = [block for block in content if block is not None]
        if turn.role == "assistant" and not blocks:
            continue
        blocks = blocks or [{"type": "text", "text": "."}]
        role = "system" if turn.role == "developer" else turn.role
        if rendered and rendered[-1]["role"] == role:
            rendered[-1]["content"] += blocks
        else:
            rendered.append({"role": role, "content": blocks})
    if not rendered or rendered[0]["role"] != "user":
        rendered.insert(0, {"role": "user", "content": [{"type": "text", "text": "."}]})
    last = rendered[-1]
    if last["role"] == "assistant" and last["content"][-1]["type"] == "text":
        last["content"][-1]["text"] = last["content"][-1]["text"].rstrip() or "."
    for message in rendered:
        if [*message["content"][0]] == ["type", "text"] and len(message["content"]) == 1:
            message["content"] = message["content"][0]["text"]
    if any(isinstance(part, Text) and part.cache for part in system):
        told = [_messages_render_part(part) for part in system]
        return [block for block in told if block is not None], rendered
    return joined_text(system).strip() and joined_text(system), rendered


def _messages_render_part(part: Content) -> JsonObject | None:
    """A block; None for what has none: empty text, reasoning that nobody signed."""
    rendered: JsonObject | None = None
    match part:
        case Text(text) | Refusal(text) if text.strip():
            rendered = {"type": "text", "text": text}
        case Media():
            rendered = _messages_render_media(part)
        case ToolCall():
            given = object_in(part.arguments)
            given = {"input": part.arguments} if given is None else given
            rendered = {"type": "tool_use", "id": part.id, "name": part.name, "input": given}
        case ToolResult():
            rendered = _messages_render_result(part)
        case Reasoning(text, opaque) if opaque is not None:
            rendered = _messages_render_reasoning(text, opaque)
        case Native():
            rendered = part.value
    cache = part.cache if isinstance(part, Text | Media | ToolCall | ToolResult) else ""
    if rendered is not None and cache:
        rendered["cache_control"] = _messages_mark(cache)
    return rendered


def _messages_render_result(part: ToolResult) -> JsonObject:
    result: JsonObject = {"type": "tool_result", "tool_use_id": part.call_id}
    inner = [one for each in part.content if (one := _messages_render_part(each)) is not None]
    if [[*one] for one in inner] == [["type", "text"]]:
        result["content"] = inner[0]["text"]
    elif inner:
        result["content"] = inner
    return {**result, **({"is_error": True} if part.is_error else {})}


def _messages_render_reasoning(text: str, opaque: Opaque) -> JsonObject:
    if opaque.kind == "signature":
        return {"type": "thinking", "thinking": text, "signature": opaque.data}
    return {"type": "redacted_thinking", "data": opaque.data}


def _messages_render_media(media: Media) -> JsonObject:
    if media.kind not in ("image", "document"):
        raise refuse_part(media, "Messages")
    titled = {"title": media.name} if media.name and media.kind == "document" else {}
    if media.file_id:
        source = {"type": "file", "file_id": media.file_id}
    elif media.url:
        source = {"type": "url", "url": media.url}
    elif media.kind == "document" and media.mime != "application/pdf":
        text = text_in(media)
        if text is None:
            raise refuse_part(media, "Messages")
        source = {"type": "text", "media_type": "text/plain", "data": text}
    elif media.kind == "image" and media.mime not in _MESSAGES_IMAGES:
        raise UpstreamUnfit(
            f"images of type {media.mime or 'unknown'} are not taken by Messages; "
            f"send one of {', '.join(_MESSAGES_IMAGES)}",
            code="unsupported_media_type",
            param="image",
        )
    else:
        source = {"type": "base64", "media_type": media.mime, "data": media.data}
    return {"type": media.kind, "source": source, **titled}


# An answer, for a caller.

_MESSAGES_FINISHES, _MESSAGES_MEANINGS = finish_words(3)


def _messages_render_response(
    prompt: Prompt,  # noqa: ARG001  Messages echoes nothing of it
    label: AnswerLabel,
    choices: list[Choice],
    usage: Usage,
    losses: Losses,
) -> JsonObject:
    answer = without_cut_call(choices[0], losses)
    content = [_messages_answer_block(block, losses) for block in _messages_blocks(answer.content)]
    message = _messages_skeleton(label)
    return {
        **message,
        "content": [block for block in content if block is not None],
        **_messages_stop(answer.finished),
        "usage": _messages_render_usage(usage),
    }


def _messages_blocks(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks, with the state of calls as reasoning before them: tool_use has no place for it.
    State after the last words is left out: it is worth nothing there, and clients show what comes
    last."""
    waiting: list[Block] = []
    for block in blocks:
        if _messages_is_bare(block):
            waiting.append(block)
            continue
        yield from waiting
        waiting = []
        if isinstance(block, ToolCall) and block.opaque:
            yield Reasoning("", block.opaque)
        yield block


def _messages_is_bare(block: Block) -> bool:
    """Whether a block is nothing but the state that Gemini leaves behind a text."""
    return (
        isinstance(block, Reasoning)
        and not block.text
        and (block.opaque is not None and block.opaque.kind == "thought")
    )


def _messages_answer_block(block: Block, losses: Losses) -> JsonObject | None:
    match block:
        case Reasoning(text, opaque):
            return _messages_sealed(text, opaque)
        case ToolCall():
            given = object_in(block.arguments)
            if given is None:
                losses.add("invalid_arguments", "tool_use.input")
            return {"type": "tool_use", "id": block.id, "name": block.name, "input": given or {}}
        case Media():
            losses.add("dropped", "image")
            return None
        case Text(text) | Refusal(text):
            return {"type": "text", "text": text} if text else None


def _messages_sealed(text: str, opaque: Opaque | None) -> JsonObject:
    """Reasoning as a caller keeps it. It is always sealed, or else the vendor's own: a block with
    no signature would be refused when the conversation goes on at Claude itself."""
    opaque = opaque or UNSIGNED
    if text or opaque.kind == "signature":
        signature = sealed_for(opaque, "anthropic", "signature")
        return {"type": "thinking", "thinking": text, "signature": signature}
    return {"type": "redacted_thinking", "data": sealed_for(opaque, "anthropic", "redacted")}


def _messages_stop(finished: Finished) -> JsonObject:
    reason = _MESSAGES_FINISHES[finished.finish]
    stop: JsonObject = {"stop_reason": reason, "stop_sequence": finished.stop_sequence}
    if reason == "refusal" and finished.detail:
        facts = {"type": "refusal", "category": None, "explanation": finished.detail}
        stop["stop_details"] = facts
    return stop


def _messages_render_usage(usage: Usage) -> JsonObject:
    fresh = usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens
    rendered: JsonObject = {
        "input_tokens": max(0, fresh),
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }
    if usage.reasoning_tokens:
        rendered["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return rendered


def _messages_skeleton(label: AnswerLabel) -> JsonObject:
    return {
        "id": f"msg_{label.id}",
        "type": "message",
        "role": "assistant",
        "model": label.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": label.input_tokens, "output_tokens": 1},
    }


class _MessagesEncoder:
    """wire: one block closes before the next opens; block indices from 0; usage in the first and
    in the last event but one; message_stop always."""

    def __init__(self, prompt: Prompt, label: AnswerLabel) -> None:  # noqa: ARG002
        self._message = _messages_skeleton(label)
        self._in_order = InOrder()
        self._index = -1
        self._block: Block = Text()
        self._is_open = self._opened = False
        self._odd: list[str] = []  # arguments that are no object
        self._fresh = True  # whether the arguments have not begun
        self._waiting: list[Opaque] = []  # state that goes before the next block, if there is one
        self._finished = Finished(Finish.STOP)

    def encode(self, part: StreamPart) -> bytes:
        if isinstance(part, Finished):
            self._finished = part
            return self._opening()
        return self._opening() + b"".join([self._encode(p) for p in self._in_order.feed(part)])

    def end(self, usage: Usage) -> bytes:
        counts = _messages_render_usage(usage)
        event = {"type": "message_delta", "delta": _messages_stop(self._finished), "usage": counts}
        return self._opening() + _messages_event(event) + MESSAGES.end_mark

    def fail(self, error: BitrouterError) -> bytes:
        return sse_encode(compact(_messages_render_error(error)), "error")

    def _opening(self) -> bytes:
        if self._opened:
            return b""
        self._opened = True
        return _messages_event({"type": "message_start", "message": self._message})

    def _encode(self, part: StreamPart) -> bytes:
        match part:
            case Delta(_, text):
                return self._delta(text)
            case Open(_, block):
                return self._open(block)
            case Close(_, opaque):
                return self._close(opaque)
        return b""

    def _open(self, block: Block) -> bytes:
        """A block begins. Texts and thoughts wait for their first words."""
        self._block, self._is_open, self._fresh = block, False, True
        if not isinstance(block, ToolCall):
            return b""
        out = (
            self._begin(_messages_sealed("", block.opaque)) + self._stop() if block.opaque else b""
        )
        use = {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
        return out + self._begin(use)

    def _begin(self, block: JsonObject) -> bytes:
        out = b""
        while self._waiting:
            state = self._waiting.pop(0)
            out += self._begin(_messages_sealed("", state)) + self._stop()
        self._index += 1
        self._is_open = True
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return out + _messages_event(start)

    def _delta(self, text: str) -> bytes:
        if not text:  # only what Chat Completions calls logprobs
            return b""
        match self._block:
            case ToolCall():
                if self._odd or (self._fresh and text.lstrip()[:1] not in ("{", "")):
                    self._odd.append(text)  # an input must be an object
                    return b""
                self._fresh = self._fresh and not text.strip()
                return self._event({"type": "input_json_delta", "partial_json": text})
            case Reasoning():
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                out = b"" if self._is_open else self._begin(empty)
                return out + self._event({"type": "thinking_delta", "thinking": text})
            case Text() | Refusal():
                out = b"" if self._is_open else self._begin({"type": "text", "text": ""})
                return out + self._event({"type": "text_delta", "text": text})
        return b""

    def _close(self, opaque: Opaque | None) -> bytes:
        out = b""
        if isinstance(self._block, Reasoning):
            opaque = opaque or UNSIGNED
            if not self._is_open and opaque.kind == "thought":
                self._waiting.append(opaque)
                return b""
            if not self._is_open and opaque.kind != "signature":
                return (
                    self._begin(_messages_sealed("", opaque)) + self._stop() if opaque.data else b""
                )
            empty = {"type": "thinking", "thinking": "", "signature": ""}
            out = b"" if self._is_open else self._begin(empty)
            signature = sealed_for(opaque, "anthropic", "signature")
            out += self._event({"type": "signature_delta", "signature": signature})
        if self._odd:
            text = "".join(self._odd)
            self._odd = []
            given = json.dumps(object_in(text) or {"input": text})
            out += self._event({"type": "input_json_delta", "partial_json": given})
        return out + self._stop() if self._is_open else b""

    def _event(self, delta: JsonObject) -> bytes:
        event = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return _messages_event(event)

    def _stop(self) -> bytes:
        self._is_open = False
        return _messages_event({"type": "content_block_stop", "index": self._index})


def _messages_event(event: JsonObject) -> bytes:
    return sse_encode(compact(event), event["type"])


# A provider's answer, read.

_MESSAGES_GROWING = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "input_json_delta": "partial_json",
}


class _MessagesDecoder:
    def __init__(self, vendor: str) -> None:
        self.model = ""
        self.lost: set[str] = set()
        self._vendor = vendor
        self._keys = itertools.count()
        self._open: dict[int, int] = {}  # block's index -> key
        self._states: dict[int, Opaque] = {}
        self._late: dict[int, str] = {}  # key -> arguments that came with the block's start
        self._chars: dict[int, int] = {}  # key -> characters of text so far, for citations
        self._cited: dict[int, list[Json]] = {}  # key -> what its text, when whole, cites
        self._said: list[JsonObject] = []  # the blocks as they are, to go on after a pause

    def feed(self, value: JsonObject) -> list[StreamPart]:
        index = whole(value.get("index"))
        _messages_keep(self._said, value)
        match value.get("type"):
            case "content_block_delta":
                return self._delta(self._open.get(index), as_object(value.get("delta")))
            case "content_block_start":
                return self._start(index, as_object(value.get("content_block")))
            case "content_block_stop":
                return self._stop(index)
            case "message_start":
                self.model = str(dig(value, "message", "model") or "")
            case "message_delta":
                delta = as_object(value.get("delta"))
                if delta.get("stop_reason"):
                    return [*self.finish(), _messages_finished(delta)]
        return []

    def finish(self) -> list[StreamPart]:
        return [part for index in list(self._open) for part in self._stop(index)]

    def resume(self, body: JsonObject) -> JsonObject:
        said = {"role": "assistant", "content": self._said}
        self._said = []
        return {**body, "messages": [*body["messages"], said]}

    def whole(self, value: JsonObject) -> list[StreamPart]:
        self.model = str(value.get("model") or "")
        out: list[StreamPart] = []
        self._said = as_list(value.get("content"))
        for item in self._said:
            block = self._block(as_object(item))
            out += parts_of(block, next(self._keys)) if block is not None else ()
        return [*out, _messages_finished(value)]

    def _block(self, item: JsonObject) -> Block | None:
        match item.get("type"):
            case "text":
                text = str(item.get("text") or "")
                cited = [
                    _messages_citation(one, len(text)) for one in as_list(item.get("citations"))
                ]
                return Text(text, tuple(one for one in cited if one))
            case "tool_use":
                given = item.get("input")
                arguments = compact(given).decode() if given else ""
                return ToolCall(str(item.get("id") or ""), str(item.get("name") or ""), arguments)
            case "thinking":
                signature = minted(item.get("signature"), self._vendor, "signature")
                return Reasoning(str(item.get("thinking") or ""), signature)
            case "redacted_thinking":
                return Reasoning("", minted(item.get("data"), self._vendor, "redacted"))
        self.lost.add(str(item.get("type")))
        return None

    def _start(self, index: int, item: JsonObject) -> list[StreamPart]:
        block = self._block(item)
        if block is None:
            return []
        key = self._open[index] = next(self._keys)
        if isinstance(block, Reasoning) and block.opaque:
            self._states[key] = block.opaque
        text, block = text_of(block), with_text(block, "")
        if isinstance(block, ToolCall):
            self._late[key] = text
            return [Open(key, block)]
        opened = Open(key, Reasoning() if isinstance(block, Reasoning) else Text())
        return [opened, Delta(key, text)] if text else [opened]

    def _delta(self, key: int | None, delta: JsonObject) -> list[StreamPart]:
        kind = delta.get("type")
        if key is None:
            return []
        if kind == "signature_delta":
            said = self._states.get(key, Opaque(self._vendor, "signature", ""))
            more = delta["signature"] if isinstance(delta.get("signature"), str) else ""
            self._states[key] = said._replace(data=said.data + more)
            return []
        if kind == "citations_delta":
            self._cited.setdefault(key, []).append(delta.get("citation"))
            return []
        text = delta.get(_MESSAGES_GROWING.get(str(kind), ""))
        if not isinstance(text, str) or not text:
            return []
        self._late.pop(key, None)
        if kind == "text_delta":
            self._chars[key] = self._chars.get(key, 0) + len(text)
        return [Delta(key, text)]

    def _stop(self, index: int) -> list[StreamPart]:
        key = self._open.pop(index, None)
        if key is None:
            return []
        late = self._late.pop(key, "")
        state = self._states.pop(key, None)
        out: list[StreamPart] = [Delta(key, late)] if late else []
        for cited in self._cited.pop(key, ()):
            citation = _messages_citation(cited, self._chars.get(key, 0))
            out += [Cite(key, citation)] if citation else []
        return [*out, Close(key, state if state and state.data else None)]


_MESSAGES_KEPT = {
    "text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature",
    "input_json_delta": "partial_json",
}  # fmt: skip


_MESSAGES_PIECES = "pieces"  # of a kept block, while it grows


def _messages_keep(said: list[JsonObject], event: JsonObject) -> None:
    """Put the blocks of a stream together again, the provider's own tools included."""
    kind = event.get("type")
    if kind == "content_block_start":
        said.append(dict(as_object(event.get("content_block"))))
    if not said or kind not in ("content_block_delta", "content_block_stop"):
        return
    block, delta = said[-1], as_object(event.get("delta"))
    name = _MESSAGES_KEPT.get(str(delta.get("type")))
    if name:
        block.setdefault(_MESSAGES_PIECES, {}).setdefault(name, []).append(str(delta.get(name)))
    elif delta.get("type") == "citations_delta":
        block["citations"] = as_list(block.get("citations"))
        block["citations"].append(delta.get("citation"))
    elif kind == "content_block_stop":
        for grown, pieces in block.pop(_MESSAGES_PIECES, {}).items():
            block[grown] = str(block.get(grown) or "") + "".join(pieces)
        partial = block.pop("partial_json", None)
        block |= {} if partial is None else {"input": object_in(partial) or {}}


def _messages_finished(facts: JsonObject) -> Finished:
    raw = str(facts.get("stop_reason") or "")
    sequence = facts.get("stop_sequence")
    finish = _MESSAGES_MEANINGS.get(raw, Finish.STOP)
    return Finished(
        finish,
        raw=raw,
        stop_sequence=sequence if isinstance(sequence, str) else None,
        detail=str(dig(facts, "stop_details", "explanation") or ""),
        goes_on=finish is Finish.PAUSE,
    )


def _messages_citation(cited: Json, end: int) -> Citation | None:
    url = dig(cited, "url") or dig(cited, "source")
    if not isinstance(url, str) or "://" not in url:
        return None  # a place in a document of the caller's own
    return Citation(url, str(dig(cited, "title") or ""), 0, end)


def _messages_sealed_in(body: JsonObject) -> bool:
    for message in as_list(body.get("messages")):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        for block in as_list(message.get("content")):
            if dig(block, "type") in ("thinking", "redacted_thinking"):
                return True
    return False


def _messages_unseal(body: JsonObject, vendor: str) -> bool:
    changed = _messages_open(body, vendor)
    if changed and dig(body, "thinking", "type") == "enabled":
        messages = [_messages_message(m, here) for here, m in each_object(body["messages"], "m")]
        if _messages_lacks_thinking(messages):
            del body["thinking"]
    return changed


_MESSAGES_STATES = {"thinking": "signature", "redacted_thinking": "data"}


def _messages_open(body: JsonObject, vendor: str) -> bool:
    changed = False
    for message in as_list(body.get("messages")):
        content = dig(message, "content")
        kept: list[Json] = []
        for block in as_list(content):
            name = _MESSAGES_STATES.get(str(dig(block, "type")), "")
            sealed = dig(block, name)
            if isinstance(sealed, str) and sealed.startswith(ENVELOPE):
                changed = True
                opaque = unseal(sealed)
                if opaque is None or opaque.vendor != vendor:
                    continue
                block = _messages_render_reasoning(str(block.get("thinking") or ""), opaque)
            kept.append(block)
        if isinstance(content, list) and len(kept) <= len(content):
            message["content"] = kept or [{"type": "text", "text": "."}]
    return changed


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
    mend=nothing_to_mend,
    fail_stream=_messages_fail_stream,
    parse_request=_messages_parse_request,
    render_request=_messages_render_request,
    render_response=_messages_render_response,
    decoder=_MessagesDecoder,
    encoder=_MessagesEncoder,
    names=re.compile(r"[A-Za-z0-9_-]{1,128}"),
    sealed=_messages_sealed_in,
    unseal=_messages_unseal,
)


# ---------------------------------------------------------------------------------------------
# 11. gemini: Google generateContent (pure)
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
    if error.param and status == 400:
        violation = {"field": error.param, "description": error.message}
        bad = "type.googleapis.com/google.rpc.BadRequest"
        details.append({"@type": bad, "fieldViolations": [violation]})
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


# A caller's request, read. Every field may come in camelCase or in snake_case, in one body.

_GEMINI_KNOWN = frozenset({
    "contents", "systemInstruction", "tools", "toolConfig", "generationConfig", "serviceTier",
    "labels", "model", "store",
})  # fmt: skip
_GEMINI_SETTINGS = frozenset({
    "maxOutputTokens", "temperature", "topP", "topK", "stopSequences", "candidateCount", "seed",
    "presencePenalty", "frequencyPenalty", "responseLogprobs", "logprobs", "responseMimeType",
    "responseSchema", "responseJsonSchema", "thinkingConfig", "responseModalities",
    "speechConfig",
})  # fmt: skip
# What these hold has names of the caller's own.
_GEMINI_FREE = {
    "args", "response", "parameters", "parametersJsonSchema", "responseSchema",
    "responseJsonSchema", "labels",
}  # fmt: skip
_GEMINI_MAX_DEPTH = 32


def _gemini_respelt(value: Json, depth: int = 0) -> Json:
    """JSON with its field names in camelCase. Raises BadRequest."""
    if depth > _GEMINI_MAX_DEPTH:
        raise BadRequest("the body's JSON is nested too deeply")
    if isinstance(value, list):
        return [_gemini_respelt(one, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    new = {}
    for key, inner in value.items():
        name = _gemini_camel(key) if "_" in key else key
        new[name] = inner if name in _GEMINI_FREE else _gemini_respelt(inner, depth + 1)
    return new


@functools.lru_cache(maxsize=512)
def _gemini_camel(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in rest)


def _gemini_parse_request(raw: JsonObject) -> Prompt:
    body = _gemini_respelt(raw)
    messages = _gemini_messages(body.get("contents"))
    if not messages:
        raise BadRequest("contents: expected a list with at least one content", param="contents")
    system = body.get("systemInstruction")
    if system:
        given = {"parts": [{"text": system}]} if isinstance(system, str) else system
        said, _ = _gemini_content(typed(given, dict, "systemInstruction"), "systemInstruction", {})
        messages.insert(0, Message("system", said))
    settings = maybe(body, "generationConfig", dict) or {}
    asked = as_object(raw.get("generationConfig", raw.get("generation_config")))
    extra = _gemini_rest(raw, _GEMINI_KNOWN) | _gemini_rest(asked, _GEMINI_SETTINGS)
    speech = maybe(settings, "speechConfig", dict)
    voice = str(dig(speech, *_GEMINI_VOICE) or "")
    if speech and speech != _gemini_speech(voice):  # several voices, or a language
        extra["speechConfig"] = speech
    return Prompt(
        model=str(body.get("model") or ""),
        messages=tuple(messages),
        source=ApiProtocol.GENERATE_CONTENT,
        max_tokens=count_in(settings, "maxOutputTokens"),
        sampling=_gemini_sampling(settings),
        tools=tuple(_gemini_tools(body.get("tools"))),
        tool_choice=_gemini_tool_choice(dig(body, "toolConfig", "functionCallingConfig")),
        output=_gemini_output(settings),
        thinking=_gemini_thinking(as_object(settings.get("thinkingConfig"))),
        tier=_GEMINI_READ_TIERS.get(tier := str(body.get("serviceTier") or "").lower(), tier),
        metadata=maybe(body, "labels", dict),
        makes=made_of(settings.get("responseModalities"), "generationConfig.responseModalities"),
        voice=Voice(voice) if voice else None,
        extra=extra,
    )


_GEMINI_VOICE = ("voiceConfig", "prebuiltVoiceConfig", "voiceName")


def _gemini_speech(voice: str) -> JsonObject:
    return {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": voice}}}


def _gemini_rest(fields: JsonObject, known: frozenset[str]) -> JsonObject:
    """Fields that have no neutral form, as the caller spelt them."""
    return {k: v for k, v in fields.items() if v is not None and _gemini_camel(k) not in known}


def _gemini_sampling(settings: JsonObject) -> Sampling:
    alternatives = count_in(settings, "logprobs") or 0
    return Sampling(
        temperature=number(settings, "temperature"),
        top_p=number(settings, "topP"),
        top_k=count_in(settings, "topK"),
        seed=maybe(settings, "seed", int),
        presence_penalty=number(settings, "presencePenalty"),
        frequency_penalty=number(settings, "frequencyPenalty"),
        stop=strings_in(settings.get("stopSequences"), "generationConfig.stopSequences"),
        n=count_in(settings, "candidateCount") or 1,
        logprobs=alternatives if settings.get("responseLogprobs") else None,
    )


def _gemini_output(settings: JsonObject) -> OutputFormat | None:
    schema = settings.get("responseJsonSchema")
    if isinstance(schema, dict):
        return OutputFormat("json_schema", schema=schema)
    if isinstance(settings.get("responseSchema"), dict):
        return OutputFormat("json_schema", schema=from_gemini(settings["responseSchema"]))
    wants_json = settings.get("responseMimeType") == "application/json"
    return OutputFormat("json_object") if wants_json else None


def _gemini_thinking(config: JsonObject) -> Thinking:
    level = str(config.get("thinkingLevel") or "").lower()
    budget = config.get("thinkingBudget")
    visible = config.get("includeThoughts")
    effort = level if level in EFFORTS else ""
    if not effort and type(budget) is int:
        effort = effort_of(budget)
    counted = budget if type(budget) is int and budget > 0 else None
    return Thinking(effort, counted, visible=visible if isinstance(visible, bool) else None)


def _gemini_tools(tools: Json) -> Iterator[Tool]:
    for where, tool in each_object(tools, "tools"):
        for here, one in each_object(
            tool.get("functionDeclarations"), f"{where}.functionDeclarations"
        ):
            schema = one.get("parametersJsonSchema")
            if not isinstance(schema, dict):
                schema = from_gemini(one["parameters"]) if one.get("parameters") else None
            name = typed(one.get("name"), str, f"{here}.name")
            yield Tool(name, str(one.get("description") or ""), schema)
        for kind, value in tool.items():
            if kind != "functionDeclarations" and value is not None:
                name = WEB_SEARCH if kind in ("googleSearch", "googleSearchRetrieval") else kind
                native = Native(ApiProtocol.GENERATE_CONTENT, {kind: value})
                yield Tool(name, kind="hosted", native=native)


_GEMINI_READ_TIERS = {"standard": "default", "service_tier_unspecified": ""}
_GEMINI_MODES = {"AUTO": "auto", "NONE": "none", "ANY": "required", "VALIDATED": "auto"}


def _gemini_tool_choice(config: Json) -> ToolChoice | None:
    mode = _GEMINI_MODES.get(str(dig(config, "mode") or "").upper())
    if mode is None:
        return None
    names = strings_in(config.get("allowedFunctionNames"), "toolConfig.allowedFunctionNames")
    if not names or mode == "none":
        return ToolChoice(mode)
    if mode == "required" and len(names) == 1:
        return ToolChoice("named", names)
    return ToolChoice("allowed", names, mode == "required")


def _gemini_messages(contents: Json) -> list[Message]:
    """Messages; calls without ids get some, and results find theirs by name, in order."""
    runs: list[tuple[str, list[Content]]] = []
    waiting: dict[str, list[str]] = {}  # tool's name -> ids of its calls that await a result
    given = [contents] if isinstance(contents, dict) else contents
    for turn, (where, content) in enumerate(each_object(given, "contents")):
        role = content.get("role") or "user"
        if not content.get("parts") and role == "user":
            raise BadRequest(f"{where}.parts: expected a part at least", param=f"{where}.parts")
        if role not in ("user", "model", "function"):
            found = show_json(role)
            raise BadRequest(
                f"{where}.role: expected user or model; got {found}", param=f"{where}.role"
            )
        parts, called = _gemini_content(content, where, waiting, turn)
        for name, ident in called:
            waiting.setdefault(name, []).append(ident)
        if role == "model" and runs and runs[-1][0] == "assistant":
            runs[-1][1].extend(parts)
        else:
            runs.append(("assistant" if role == "model" else "user", list(parts)))
    return [
        Message(role, _gemini_joined(parts) if role == "assistant" else tuple(parts))
        for role, parts in runs
    ]


def _gemini_content(
    content: JsonObject, where: str, waiting: dict[str, list[str]], turn: int = 0
) -> tuple[tuple[Content, ...], list[tuple[str, str]]]:
    """The parts of a content, and the calls in it: names and ids."""
    parts: list[Content] = []
    called: list[tuple[str, str]] = []
    for here, part in each_object(content.get("parts"), f"{where}.parts"):
        state = _gemini_state(part.get("thoughtSignature"))
        if "functionCall" in part:
            call = typed(part["functionCall"], dict, f"{here}.functionCall")
            name = typed(call.get("name"), str, f"{here}.functionCall.name")
            ident = str(call.get("id") or f"call_g{turn}_{len(called)}")
            called.append((name, ident))
            google = state if state and state.kind == "thought" else None
            if state and not google:
                parts.append(Reasoning("", state))
            arguments = compact(as_object(call.get("args"))).decode()
            parts.append(ToolCall(ident, name, arguments, opaque=google))
        elif "functionResponse" in part:
            parts.append(
                _gemini_result(part["functionResponse"], f"{here}.functionResponse", waiting)
            )
        elif part.get("thought"):
            parts.append(Reasoning(str(part.get("text") or ""), state))
        else:
            one = _gemini_part(part, here)
            parts += [one] if one else []
            parts += [Reasoning("", state)] if state else []
    return tuple(parts), called


def _gemini_joined(parts: list[Content]) -> tuple[Content, ...]:
    """Texts and thoughts that were streamed in pieces, as one, with the state that came last. wire:
    the `chats` of google-genai keep each chunk as a content of its own."""
    joined: list[Content] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning) and not last.opaque:
            joined[-1] = Reasoning(last.text + part.text, part.opaque)
        elif isinstance(part, Reasoning) and part.opaque and part.opaque.vendor != "google":
            _gemini_put_back(joined, part)
        else:
            joined.append(part)
    return tuple(joined)


def _gemini_put_back(content: list[Content], state: Reasoning) -> None:
    """Put another vendor's reasoning where it was: before the words that led to its call."""
    at = len(content)
    while at and isinstance(content[at - 1], Text):
        at -= 1
    before = content[at - 1] if at else None
    if isinstance(before, Reasoning) and not before.opaque:
        content[at - 1] = Reasoning(before.text + state.text, state.opaque)
    else:
        content.insert(at, state)


def _gemini_state(signature: Json) -> Opaque | None:
    """A signature as Gemini minted it, or what we sealed into one. wire: base64 of either
    alphabet; google-genai sends back the URL-safe one."""
    if not isinstance(signature, str) or not signature:
        return None
    if standard_base64(signature) == _GEMINI_NO_SIGNATURE:
        return None
    with suppress(ValueError):
        raw = from_base64(signature)
        if raw.startswith(ENVELOPE.encode()):
            return unseal(raw.decode("latin-1"))
    return Opaque("google", "thought", standard_base64(signature))


def _gemini_sealed(opaque: Opaque) -> str:
    if (opaque.vendor, opaque.kind) == ("google", "thought"):
        return opaque.data
    return base64.b64encode(seal(opaque).encode()).decode()


def _gemini_part(part: JsonObject, where: str) -> Content | None:
    if "text" in part:
        text = typed(part["text"], str, f"{where}.text")
        return Text(text) if text else None
    if "inlineData" in part:
        blob = typed(part["inlineData"], dict, f"{where}.inlineData")
        mime = str(blob.get("mimeType") or "")
        name = str(blob.get("displayName") or "")
        here = f"{where}.inlineData.data"
        media = media_of_bytes(kind_of_mime(mime), mime, blob.get("data"), here, name=name)
        return media._replace(kind=kind_of_mime(media.mime))
    if "fileData" in part:
        file = typed(part["fileData"], dict, f"{where}.fileData")
        mime = str(file.get("mimeType") or mime_of_path(str(file.get("fileUri"))))
        uri = typed(file.get("fileUri"), str, f"{where}.fileData.fileUri")
        if uri.startswith(("gs://", "files/")) or "generativelanguage" in uri:
            return Media(kind_of_mime(mime), mime, file_id=uri, vendor="google")
        return media_at(kind_of_mime(mime), uri, f"{where}.fileData.fileUri", mime=mime)
    if not part:
        return None
    return Native(ApiProtocol.GENERATE_CONTENT, part)


def _gemini_result(result: Json, where: str, waiting: dict[str, list[str]]) -> ToolResult:
    typed(result, dict, where)
    name = typed(result.get("name"), str, f"{where}.name")
    open_calls = waiting.get(name, [])
    ident = result.get("id")
    if not isinstance(ident, str) or not ident:
        if not open_calls:
            raise BadRequest(f"{where}: no call of {show_json(name)} awaits a result", param=where)
        ident = open_calls[0]
    elif ident not in open_calls:
        found = show_json(ident)
        raise BadRequest(f"{where}.id: no call before it has the id {found}", param=f"{where}.id")
    open_calls.remove(ident)
    response = result.get("response")
    is_error = isinstance(response, dict) and [*response] == ["error"]
    if isinstance(response, dict) and len(response) == 1 and not {*response} - _GEMINI_WRAPPERS:
        response = next(iter(response.values()))
    text = response if isinstance(response, str) else compact(response).decode()
    content: list[Text | Media] = [Text(text)] if text else []
    for here, part in each_object(result.get("parts"), f"{where}.parts"):
        one = _gemini_part(part, here)
        content += [one] if isinstance(one, Text | Media) else []
    return ToolResult(ident, tuple(content), is_error, name)


_GEMINI_WRAPPERS = {"output", "error", "result"}


# A request for a provider, written.

# wire: ai.google.dev/gemini-api/docs/thought-signatures, read 2026-11: for calls that no Gemini
# model made, so that nobody could sign them
_GEMINI_NO_SIGNATURE = base64.b64encode(b"skip_thought_signature_validator").decode()
_GEMINI_TIERS = {
    "": None, "auto": None, "default": "standard", "flex": "flex", "priority": "priority",
}  # fmt: skip


def _gemini_render_request(prompt: Prompt, traits: Traits, losses: Losses) -> JsonObject:
    same = prompt.source is ApiProtocol.GENERATE_CONTENT
    messages = list(prompt.messages)
    system: list[Content] = []
    while messages and messages[0].role in ("system", "developer"):
        system += messages.pop(0).content
    contents = []
    for turn in turns(messages):
        parts = _gemini_render_turn(turn, traits, losses)
        if parts:
            role = "model" if turn.role == "assistant" else "user"
            contents.append({"role": role, "parts": parts})
    if not contents or contents[0]["role"] == "model":
        contents.insert(0, {"role": "user", "parts": [{"text": "."}]})
    tools = _gemini_render_tools(prompt.tools, traits)
    if prompt.tier not in _GEMINI_TIERS:
        losses.add("dropped", "service_tier")
    choice = _gemini_render_choice(prompt.tool_choice) if tools else None
    if any(tool.strict for tool in prompt.tools) and (choice or {"mode": "AUTO"})["mode"] == "AUTO":
        choice = {"mode": "VALIDATED"}
    body = {
        "contents": contents,
        "systemInstruction": {"parts": [{"text": joined_text(system)}]} if system else None,
        "tools": tools or None,
        "toolConfig": {"functionCallingConfig": choice} if choice else None,
        "generationConfig": _gemini_render_settings(prompt, traits) or None,
        "serviceTier": _GEMINI_TIERS.get(prompt.tier),
        **(prompt.extra if same else {}),
    }
    return no_nulls(body)


def _gemini_render_settings(prompt: Prompt, traits: Traits) -> JsonObject:
    sampling, output = prompt.sampling, prompt.output
    settings: JsonObject = {
        "maxOutputTokens": prompt.max_tokens,
        "temperature": sampling.temperature,
        "topP": sampling.top_p,
        "topK": sampling.top_k,
        "stopSequences": list(sampling.stop) or None,
        "candidateCount": sampling.n if sampling.n > 1 else None,
        "seed": sampling.seed,
        "presencePenalty": sampling.presence_penalty,
        "frequencyPenalty": sampling.frequency_penalty,
        "responseLogprobs": None if sampling.logprobs is None else True,
        "logprobs": sampling.logprobs or None,
        "thinkingConfig": _gemini_render_thinking(prompt.thinking, traits) or None,
        "mediaResolution": _gemini_resolution(prompt),
        "responseModalities": [kind.upper() for kind in prompt.makes] or None,
    }
    if "audio" in prompt.makes and prompt.voice and prompt.voice.name:
        settings["speechConfig"] = _gemini_speech(prompt.voice.name)
    if output:
        settings["responseMimeType"] = "application/json"
    if output and output.schema is not None:
        if traits.schema == "legacy":
            settings["responseSchema"] = for_old_gemini(output.schema)
        else:
            settings["responseJsonSchema"] = for_gemini(output.schema)
    return no_nulls(settings)


def _gemini_resolution(prompt: Prompt) -> str | None:
    """How closely to look at images; wire: one setting for all of them."""
    details = {p.detail for m in prompt.messages for p in m.content if isinstance(p, Media)}
    known = [level for level in ("high", "low") if level in details]
    return f"MEDIA_RESOLUTION_{known[0].upper()}" if known else None


def _gemini_render_thinking(wanted: Thinking, traits: Traits) -> JsonObject:
    config: JsonObject = {}
    if wanted.visible is not None:
        config["includeThoughts"] = wanted.visible and wanted.effort != "none"
    if traits.thinking == "budget" and (wanted.effort or wanted.budget):
        by_effort = {effort: gemini for effort, _, gemini, _ in EFFORT_ROSETTA}
        least = 0 if traits.can_stop_thinking else 128
        config["thinkingBudget"] = max(least, wanted.budget or by_effort.get(wanted.effort, 0))
    elif wanted.effort:
        level = nearest_effort(wanted.effort, traits.efforts)
        config |= {"thinkingLevel": level.upper()} if level in EFFORTS else {}
    return config


def _gemini_render_tools(tools: tuple[Tool, ...], traits: Traits) -> list[JsonObject]:
    declared: list[JsonObject] = []
    hosted: list[JsonObject] = []
    for tool in tools:
        if tool.kind == "hosted":
            own = tool.native and tool.native.protocol is ApiProtocol.GENERATE_CONTENT
            hosted.append(tool.native.value if tool.native and own else {"googleSearch": {}})
            continue
        one: JsonObject = {"name": tool.name, "description": tool.description or tool.name}
        schema = tool.schema or {}
        if schema.get("properties") or any(key in schema for key in ("$ref", "anyOf")):
            if traits.schema == "legacy":
                one["parameters"] = for_old_gemini(object_schema(schema))
            else:
                one["parametersJsonSchema"] = for_gemini(object_schema(schema))
        declared.append(one)
    return ([{"functionDeclarations": declared}] if declared else []) + hosted


def _gemini_render_choice(choice: ToolChoice | None) -> JsonObject | None:
    match choice.mode if choice else None:
        case "auto" | "none" as mode:
            return {"mode": mode.upper()}
        case "required":
            return {"mode": "ANY"}
        case "named" | "allowed" if choice:
            return {"mode": "ANY", "allowedFunctionNames": list(choice.names)}
    return None


def _gemini_render_turn(turn: Message, traits: Traits, losses: Losses) -> list[JsonObject]:
    """The parts of a turn. A signature stands on the part that it came with, or else on the next
    one; the first call of a turn must have one."""
    parts: list[JsonObject] = []
    waiting: Opaque | None = None
    signed = False
    for part in turn.content:
        if isinstance(part, Reasoning):
            if part.opaque and part.text:
                thought = {"text": part.text, "thought": True}
                parts.append({**thought, "thoughtSignature": part.opaque.data})
            waiting = part.opaque if not part.text else waiting
            continue
        rendered = _gemini_render_part(part, traits)
        if not rendered:
            continue
        if turn.role == "assistant" and isinstance(part, Text | ToolCall):
            state = part.opaque if isinstance(part, ToolCall) else None
            state, waiting = (state, waiting) if state else (waiting, None)
            if state:
                rendered[0]["thoughtSignature"] = state.data
            elif isinstance(part, ToolCall) and not signed and traits.call_ids:
                losses.add("signature_missing", "thoughtSignature", harmful=False)
                rendered[0]["thoughtSignature"] = _GEMINI_NO_SIGNATURE
            signed = signed or isinstance(part, ToolCall)
        parts += rendered
    if waiting:
        parts.append({"text": "", "thoughtSignature": waiting.data})
    return parts


def _gemini_render_part(part: Content, traits: Traits) -> list[JsonObject]:
    match part:
        case Text(text) | Refusal(text):
            return [{"text": text}] if text else []
        case Media():
            return [_gemini_render_media(part)]
        case ToolCall():
            given = object_in(part.arguments)
            call: JsonObject = {"name": part.name}
            call["args"] = {"input": part.arguments} if given is None else given
            return [{"functionCall": {**({"id": part.id} if traits.call_ids else {}), **call}}]
        case ToolResult():
            return _gemini_render_result(part, traits)
        case Native():
            return [part.value]
    return []


def _gemini_render_result(result: ToolResult, traits: Traits) -> list[JsonObject]:
    texts = [p.text if isinstance(p, Text) else text_in(p) for p in result.content]
    text = "\n".join(one for one in texts if one is not None)
    value: Json = text
    with suppress(ValueError, RecursionError):
        value = json.loads(text) if text.lstrip().startswith(("{", "[")) else text
    response = {"error" if result.is_error else "output": value}
    media = [p for p in result.content if isinstance(p, Media) and text_in(p) is None]
    shown = [_gemini_render_media(one) for one in media]
    rendered: JsonObject = {"id": result.call_id} if traits.call_ids else {}
    rendered |= {"name": result.name, "response": response}
    if shown and traits.call_ids:
        rendered["parts"] = shown
        shown = []
    return [{"functionResponse": rendered}, *shown]


def _gemini_render_media(media: Media) -> JsonObject:
    if media.data:
        blob = {"mimeType": media.mime or "application/octet-stream", "data": media.data}
        return {"inlineData": blob}
    mime = media.mime or {"image": "image/jpeg", "document": "application/pdf"}.get(media.kind, "")
    file = {"fileUri": media.url or media.file_id, **({"mimeType": mime} if mime else {})}
    return {"fileData": file}


# An answer, for a caller.

_GEMINI_FINISHES, _GEMINI_MEANINGS = finish_words(4)


def _gemini_render_response(
    prompt: Prompt,  # noqa: ARG001  generateContent echoes nothing of it
    label: AnswerLabel,
    choices: list[Choice],
    usage: Usage,
    losses: Losses,
) -> JsonObject:
    candidates = []
    for choice in choices:
        blocks = _gemini_stated(without_cut_call(choice, losses).content)
        parts: list[JsonObject] = []
        cited: list[tuple[str, Citation, int, int]] = []
        for block in blocks:
            citations = block.citations if isinstance(block, Text) else ()
            cited += [(text_of(block), citation, len(parts), 0) for citation in citations]
            parts += _gemini_answer_parts(block, losses)
        candidate = _gemini_candidate(choice.finished.choice, parts or [{"text": ""}])
        candidate |= _gemini_finish(choice.finished)
        texts = [block for block in choice.content if isinstance(block, Text)]
        candidate |= _gemini_grounding(cited)
        candidate |= _gemini_logprobs([one for text in texts for one in text.logprobs])
        candidates.append(candidate)
    return {"candidates": candidates, **_gemini_head(label), **_gemini_counts(usage)}


def _gemini_stated(blocks: tuple[Block, ...]) -> list[Block]:
    """Blocks with the state of reasoning on the call that follows it, if one does."""
    stated = list(blocks)
    for n, block in enumerate(stated):
        if isinstance(block, Reasoning) and block.opaque:
            following = enumerate(stated[n + 1 :], n + 1)
            at = next((k for k, b in following if isinstance(b, ToolCall | Reasoning)), -1)
            call = stated[at]
            if at > n and isinstance(call, ToolCall) and not call.opaque:
                stated[at] = call._replace(opaque=block.opaque)
                stated[n] = Reasoning(block.text)
    return [b for b in stated if not isinstance(b, Reasoning) or b.text or b.opaque]


def _gemini_head(label: AnswerLabel) -> JsonObject:
    return {"modelVersion": label.model, "responseId": label.id}


def _gemini_candidate(index: int, parts: list[JsonObject]) -> JsonObject:
    return {"content": {"role": "model", "parts": parts}, "index": index}


def _gemini_finish(finished: Finished) -> JsonObject:
    facts: JsonObject = {"finishReason": _GEMINI_FINISHES[finished.finish]}
    if finished.detail:
        facts["finishMessage"] = finished.detail
    return facts


def _gemini_counts(usage: Usage) -> JsonObject:
    counts = {
        "promptTokenCount": usage.input_tokens,
        "candidatesTokenCount": max(0, usage.output_tokens - usage.reasoning_tokens),
        "totalTokenCount": usage.input_tokens + usage.output_tokens,
    }
    if usage.cached_tokens:
        counts["cachedContentTokenCount"] = usage.cached_tokens
    if usage.reasoning_tokens:
        counts["thoughtsTokenCount"] = usage.reasoning_tokens
    return {"usageMetadata": counts}


def _gemini_answer_parts(block: Block, losses: Losses) -> list[JsonObject]:
    match block:
        case Reasoning(text, opaque):
            thought: JsonObject = {"text": text, "thought": True}
            if opaque:
                thought["thoughtSignature"] = _gemini_sealed(opaque)
            return [thought]
        case ToolCall():
            given = object_in(block.arguments)
            if given is None:
                losses.add("invalid_arguments", "functionCall.args")
            facts = {"id": block.id, "name": block.name, "args": given or {}}
            # Without one, the conversation could not go on at Gemini itself.
            signature = _gemini_sealed(block.opaque) if block.opaque else _GEMINI_NO_SIGNATURE
            return [{"functionCall": facts, "thoughtSignature": signature}]
        case Media():
            return [{"inlineData": {"mimeType": block.mime, "data": block.data}}]
    return [{"text": block.text}]


def _gemini_grounding(cited: list[tuple[str, Citation, int, int]]) -> JsonObject:
    """Citations, each with its text, that text's part and the bytes before it there, as grounding.
    wire: its indices count bytes, not characters."""
    if not cited:
        return {}
    chunks: list[JsonObject] = []
    supports = []
    for text, one, place, before in cited:
        web = {"web": {"uri": one.url, "title": one.title}}
        if web not in chunks:
            chunks.append(web)
        start, end = (before + _gemini_size(text[:at]) for at in (one.start, one.end))
        segment: JsonObject = {"partIndex": place} if place else {}
        segment |= {"startIndex": start, "endIndex": end, "text": text[one.start : one.end]}
        supports.append({"segment": segment, "groundingChunkIndices": [chunks.index(web)]})
    return {"groundingMetadata": {"groundingChunks": chunks, "groundingSupports": supports}}


def _gemini_size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _gemini_logprobs(told: Iterable[JsonObject]) -> JsonObject:
    chosen = [{"token": one.get("token"), "logProbability": one.get("logprob")} for one in told]
    return {"logprobsResult": {"chosenCandidates": chosen}} if chosen else {}


class _GeminiEncoder:
    """wire: one line of data to an event; a part in every chunk; calls whole; the finish and the
    usage on the last chunk, which has a part too."""

    def __init__(self, prompt: Prompt, label: AnswerLabel) -> None:  # noqa: ARG002
        self._head = _gemini_head(label)
        self._blocks: dict[int, tuple[Block, int]] = {}
        self._arguments: dict[int, list[str]] = {}
        self._texts: dict[int, list[str]] = {}  # key -> what a citation points into
        self._spoken: dict[int, int] = {}  # choice -> bytes of text so far
        self._before: dict[int, int] = {}  # key -> bytes of text before it
        self._cited: dict[int, list[tuple[int, Citation]]] = {}  # choice -> key and citation
        self._states: dict[int, Opaque] = {}  # choice -> state that waits for a call to stand on
        self._botched: list[tuple[int, Block]] = []  # calls whose arguments are no object
        self._finished: dict[int, Finished] = {}

    def encode(self, part: StreamPart) -> bytes:
        match part:
            case Delta():
                return self._delta(part)
            case Open(key, block, choice):
                self._blocks[key] = (block, choice)
                self._arguments[key] = []
                return b""
            case Cite(key, citation):
                self._cited.setdefault(self._blocks[key][1], []).append((key, citation))
            case Close(key, opaque):
                return self._close(key, opaque)
            case Finished():
                self._finished[part.choice] = part
        return b""

    def end(self, usage: Usage) -> bytes:
        out = b""
        for choice, call in self._botched:
            finished = self._finished.get(choice)
            if finished is None or finished.finish is not Finish.LENGTH:
                out += self._chunk(choice, _gemini_answer_parts(call, Losses()))
        candidates = []
        for index, finished in sorted(self._finished.items()):
            last: JsonObject = {"text": ""}
            if index in self._states:
                last["thoughtSignature"] = _gemini_sealed(self._states[index])
            candidate = _gemini_candidate(index, [last]) | _gemini_finish(finished)
            kept = self._cited.get(index, ())
            cited = [
                ("".join(self._texts.get(key, ())), one, 0, self._before.get(key, 0))
                for key, one in kept
            ]
            candidates.append(candidate | _gemini_grounding(cited))
        last_chunk = {"candidates": candidates, **self._head, **_gemini_counts(usage)}
        return out + self._event(last_chunk)

    def fail(self, error: BitrouterError) -> bytes:
        return self._event(_gemini_render_error(error))

    def _delta(self, part: Delta) -> bytes:
        block, choice = self._blocks[part.key]
        if isinstance(block, ToolCall):
            self._arguments[part.key].append(part.text)
            return b""
        if not part.text:
            return b""
        if isinstance(block, Text):
            self._before.setdefault(part.key, self._spoken.get(choice, 0))
            self._spoken[choice] = self._spoken.get(choice, 0) + _gemini_size(part.text)
            self._texts.setdefault(part.key, []).append(part.text)
        thought = {"thought": True} if isinstance(block, Reasoning) else {}
        more = _gemini_logprobs(part.logprobs)
        return self._chunk(choice, [{"text": part.text, **thought}], more)

    def _close(self, key: int, opaque: Opaque | None) -> bytes:
        block, choice = self._blocks[key]
        if isinstance(block, Reasoning):
            return self._keep_state(choice, opaque) if opaque else b""
        if isinstance(block, ToolCall) and not block.opaque:
            block = block._replace(opaque=self._states.pop(choice, None))
        if not isinstance(block, ToolCall | Media):
            return b""
        block = with_text(block, "".join(self._arguments[key]))
        if isinstance(block, ToolCall) and object_in(block.arguments) is None:
            self._botched.append((choice, block))  # unless the tokens ran out in its middle
            return b""
        return self._chunk(choice, _gemini_answer_parts(block, Losses()))

    def _keep_state(self, choice: int, opaque: Opaque) -> bytes:
        """wire: state stands on the first call after it, as Gemini's own does: clients that drop
        thoughts keep it there. Only one fits on a call."""
        before = self._states.get(choice)
        self._states[choice] = opaque
        if before is None:
            return b""
        thought = {"text": "", "thought": True, "thoughtSignature": _gemini_sealed(before)}
        return self._chunk(choice, [thought])

    def _chunk(self, choice: int, parts: list[JsonObject], more: JsonObject | None = None) -> bytes:
        candidate = {**_gemini_candidate(choice, parts), **(more or {})}
        return self._event({"candidates": [candidate], **self._head})

    def _event(self, value: JsonObject) -> bytes:
        return b"data: %b\r\n\r\n" % compact(value)


# A provider's answer, read.


class _GeminiDecoder:
    def __init__(self, vendor: str) -> None:
        self.model = ""
        self.lost: set[str] = set()
        self._vendor = vendor
        self._keys = itertools.count()
        self._open: dict[int, tuple[str, int]] = {}  # choice -> what is open in it, and its key
        self._texts: dict[int, tuple[int, list[str]]] = {}  # choice -> its last text: key, words
        self._over: set[int] = set()
        self._token = ""  # by which Gemini knows where to go on

    def feed(self, value: JsonObject) -> list[StreamPart]:
        if not self.model:
            self.model = str(value.get("modelVersion") or "")
        out: list[StreamPart] = []
        for candidate in as_list(value.get("candidates")):
            self._candidate(out, as_object(candidate))
        reason = dig(value, "promptFeedback", "blockReason")
        if isinstance(reason, str) and reason and 0 not in self._over:
            self._over.add(0)
            detail = str(dig(value, "promptFeedback", "blockReasonMessage") or "")
            out.append(Finished(Finish.CONTENT_FILTER, raw=reason, detail=detail))
        return out

    def finish(self) -> list[StreamPart]:
        return [part for choice in list(self._open) for part in self._close(choice)]

    def resume(self, body: JsonObject) -> JsonObject:
        self._over.discard(0)
        return {**body, "continuationToken": self._token}

    def whole(self, value: JsonObject) -> list[StreamPart]:
        return [*self.feed(value), *self.finish()]

    def _candidate(self, out: list[StreamPart], candidate: JsonObject) -> None:
        choice = whole(candidate.get("index"))
        for part in as_list(dig(candidate, "content", "parts")):
            self._part(out, choice, as_object(part))
        logprobs = _gemini_read_logprobs(candidate.get("logprobsResult"))
        if self._open.get(choice, ("",))[0] == "text":
            key, words = self._texts[choice]
            out += [Delta(key, "", logprobs)] if logprobs else []
            grounding = as_object(candidate.get("groundingMetadata"))
            cited = _gemini_citations(grounding, "".join(words)) if grounding else ()
            out += [Cite(key, citation) for citation in cited]
        reason = candidate.get("finishReason")
        if isinstance(reason, str) and reason and choice not in self._over:
            self._over.add(choice)
            out += self._close(choice)
            detail = str(candidate.get("finishMessage") or "")
            meaning, goes_on = self._meaning(choice, reason), self._goes_on(choice, candidate)
            out.append(Finished(meaning, choice, reason, detail=detail, goes_on=goes_on))

    def _goes_on(self, choice: int, candidate: JsonObject) -> bool:
        """wire: google-genai 3.6.1, types.py: the first candidate's token alone is good for it."""
        token = candidate.get("continuationToken")
        if choice or not isinstance(token, str) or candidate["finishReason"] != "CONTINUATION":
            return False
        self._token = token
        return bool(token)

    def _meaning(self, choice: int, reason: str) -> Finish:
        if reason == "OTHER":
            return Finish.STOP if choice in self._texts else Finish.CONTENT_FILTER
        return _GEMINI_MEANINGS.get(reason, Finish.STOP)

    def _part(self, out: list[StreamPart], choice: int, part: JsonObject) -> None:
        signature = part.get("thoughtSignature")
        state = None
        if isinstance(signature, str) and signature:
            state = Opaque(self._vendor, "thought", standard_base64(signature), self.model)
        call, blob = part.get("functionCall"), part.get("inlineData")
        if isinstance(call, dict):
            arguments = compact(as_object(call.get("args"))).decode()
            block = ToolCall(str(call.get("id") or ""), str(call.get("name") or ""), arguments)
            out += self._close(choice)
            out += parts_of(block._replace(opaque=state), next(self._keys), choice)
        elif isinstance(blob, dict) and isinstance(blob.get("data"), str):
            mime = str(blob.get("mimeType") or "")
            out += self._close(choice)
            media = Media(kind_of_mime(mime), mime, standard_base64(blob["data"]))
            out += parts_of(media, next(self._keys), choice)
        elif not isinstance(part.get("text"), str):
            self.lost |= {key for key in part if key != "thoughtSignature"}
        else:
            self._grow(out, choice, part["text"], thought=part.get("thought") is True, state=state)

    def _grow(
        self, out: list[StreamPart], choice: int, text: str, *, thought: bool, state: Opaque | None
    ) -> None:
        kind = "thought" if thought else "text"
        if text:
            if choice not in self._open or self._open[choice][0] != kind:
                out += self._close(choice)
                key = next(self._keys)
                self._open[choice] = (kind, key)
                out.append(Open(key, Reasoning() if thought else Text(), choice))
                if not thought:
                    self._texts[choice] = (key, [])
            key = self._open[choice][1]
            out.append(Delta(key, text))
            if not thought:
                self._texts[choice][1].append(text)
        if state and thought and self._open.get(choice, ("",))[0] == "thought":
            out += self._close(choice, state)
        elif state:
            out += self._close(choice)
            out += parts_of(Reasoning("", state), next(self._keys), choice)

    def _close(self, choice: int, state: Opaque | None = None) -> list[StreamPart]:
        kind, key = self._open.pop(choice, ("", 0))
        return [Close(key, state)] if kind else []


def _gemini_read_logprobs(result: Json) -> tuple[JsonObject, ...]:
    """Log probabilities as OpenAI spells them; its `bytes` are the token's, in UTF-8."""
    chosen = as_list(dig(result, "chosenCandidates"))
    tops = [as_list(dig(one, "candidates")) for one in as_list(dig(result, "topCandidates"))]
    told = []
    for n, one in enumerate(chosen):
        facts = _gemini_logprob(one)
        others = [_gemini_logprob(other) for other in (tops[n] if n < len(tops) else ())]
        told.append({**facts, "top_logprobs": others})
    return tuple(told)


def _gemini_logprob(one: Json) -> JsonObject:
    token = str(dig(one, "token") or "")
    value = dig(one, "logProbability")
    spelt = list(token.encode("utf-8", "replace"))
    return {
        "token": token,
        "logprob": value if isinstance(value, int | float) else 0,
        "bytes": spelt,
    }


def _gemini_citations(grounding: JsonObject, text: str) -> Iterator[Citation]:
    """wire: indices count bytes, not characters."""
    chunks = as_list(grounding.get("groundingChunks"))
    raw = text.encode("utf-8", "replace")
    for support in as_list(grounding.get("groundingSupports")):
        ends = [whole(dig(support, "segment", key)) for key in ("startIndex", "endIndex")]
        start, end = (len(raw[:at].decode("utf-8", "ignore")) for at in ends)
        for index in as_list(dig(support, "groundingChunkIndices")):
            web = as_object(dig(chunks, whole(index), "web"))
            if isinstance(web.get("uri"), str):
                yield Citation(web["uri"], str(web.get("title") or ""), start, end)


def _gemini_sealed_in(body: JsonObject) -> bool:
    for content in as_list(body.get("contents")):
        for part in as_list(dig(content, "parts")):
            if isinstance(part, dict) and not part.keys().isdisjoint(_GEMINI_STATES):
                return True
    return False


_GEMINI_STATES = ("thoughtSignature", "thought_signature")


def _gemini_unseal(body: JsonObject, vendor: str) -> bool:
    changed = False
    for content in as_list(body.get("contents")):
        for part in as_list(dig(content, "parts")):
            if not isinstance(part, dict):
                continue
            for name in _GEMINI_STATES:
                signature = part.get(name)
                if not isinstance(signature, str) or not signature.startswith(_GEMINI_SEALED):
                    continue
                changed = True
                state = _gemini_state(signature)
                if state and state.vendor == vendor:
                    part[name] = state.data
                elif "functionCall" in part or "function_call" in part:
                    part[name] = _GEMINI_NO_SIGNATURE
                else:
                    del part[name]
    return changed


_GEMINI_SEALED = base64.b64encode(b"br1.")[:5].decode()  # how an envelope begins in base64


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
    mend=nothing_to_mend,
    fail_stream=_gemini_fail_stream,
    parse_request=_gemini_parse_request,
    render_request=_gemini_render_request,
    render_response=_gemini_render_response,
    decoder=_GeminiDecoder,
    encoder=_GeminiEncoder,
    names=re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,127}"),
    sealed=_gemini_sealed_in,
    unseal=_gemini_unseal,
)


# ---------------------------------------------------------------------------------------------
# 12. codecs: the table of protocols, and the operations that each one has (pure)
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
        translates: it can be asked for in another protocol.
        counts: it counts tokens; what the provider cannot count is estimated.
        embeds: it embeds texts.
        raw: the answer may be anything (audio, a file): it is passed on as it comes.
    """

    name: str
    protocol: ApiProtocol
    suffix: str
    generates: bool = False
    raw: bool = False
    translates: bool = False
    counts: bool = False
    embeds: bool = False


_CC, _GC = ApiProtocol.CHAT_COMPLETIONS, ApiProtocol.GENERATE_CONTENT

CHAT_OP = Operation("chat", _CC, "/chat/completions", generates=True, translates=True)
RESPONSES_OP = Operation(
    "responses", ApiProtocol.RESPONSES, "/responses", generates=True, translates=True
)
MESSAGES_OP = Operation(
    "messages", ApiProtocol.MESSAGES, "/messages", generates=True, translates=True
)

# path below /v1 -> what is asked there
OPERATIONS: dict[str, Operation] = {
    op.suffix: op
    for op in (
        CHAT_OP,
        RESPONSES_OP,
        MESSAGES_OP,
        Operation("input_tokens", ApiProtocol.RESPONSES, "/responses/input_tokens", counts=True),
        Operation("count_tokens", ApiProtocol.MESSAGES, "/messages/count_tokens", counts=True),
        Operation("embeddings", _CC, "/embeddings", embeds=True),
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
    verb: Operation(
        verb,
        _GC,
        "/models/{model}:" + verb,
        generates=verb in _GENERATING_VERBS,
        translates=verb in _GENERATING_VERBS,
        counts=verb == "countTokens",
        embeds=verb.endswith(("embedContent", "EmbedContents")),
    )
    for verb in (*_GENERATING_VERBS, "countTokens", "embedContent", "batchEmbedContents")
}
EMBEDDING_PROTOCOLS = (_CC, _GC)

# Where a protocol counts tokens, for providers that do.
COUNT_SUFFIXES = {
    ApiProtocol.RESPONSES: "/responses/input_tokens",
    ApiProtocol.MESSAGES: "/messages/count_tokens",
    ApiProtocol.GENERATE_CONTENT: "/models/{model}:countTokens",
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
    if verdict is UpstreamUnfit and not code and _TOO_LONG_TEXT.search(facts.message):
        code = "context_length_exceeded"
    if kind is Kind.OVERLOADED:
        code = code or "server_is_overloaded"
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
# 13. embeddings: OpenAI's and Google's ways to ask for vectors (pure)
# ---------------------------------------------------------------------------------------------
# wire: platform.openai.com/docs/api-reference/embeddings, ai.google.dev/api/embeddings; 2026-11


def embeddings_for_gemini(body: JsonObject, model: str) -> tuple[list[str], JsonObject]:
    """OpenAI's request as batchEmbedContents, and its texts. Raises BadRequest."""
    texts = list(strings_in(body.get("input"), "input"))
    if not texts:
        raise BadRequest("input: expected a text or a list of texts", param="input")
    size = count_in(body, "dimensions")
    more = {"outputDimensionality": size} if size else {}
    named = f"models/{model}"
    asked = [{"model": named, "content": {"parts": [{"text": t}]}, **more} for t in texts]
    return texts, {"requests": asked}


def embeddings_as_openai(
    body: JsonObject, value: JsonObject, model: str, usage: Usage
) -> JsonObject:
    """wire: OpenAI's SDK asks for base64 of little-endian floats unless told otherwise."""
    vectors = [as_list(dig(one, "values")) for one in as_list(value.get("embeddings"))]
    if body.get("encoding_format") == "base64":
        spelt: list[Json] = [
            base64.b64encode(array("f", one).tobytes()).decode() for one in vectors
        ]
    else:
        spelt = list(vectors)
    data = [{"object": "embedding", "index": n, "embedding": one} for n, one in enumerate(spelt)]
    counts = {"prompt_tokens": usage.input_tokens, "total_tokens": usage.input_tokens}
    return {"object": "list", "data": data, "model": model, "usage": counts}


def embeddings_for_openai(body: JsonObject, model: str) -> tuple[list[str], JsonObject]:
    """Google's request, for one text or many, as OpenAI's, and its texts. Raises BadRequest."""
    requests = [one for _, one in each_object(body.get("requests"), "requests")] or [body]
    texts = []
    for one in requests:
        parts = as_list(dig(one, "content", "parts"))
        text = "\n".join(str(dig(part, "text") or "") for part in parts)
        if not text:
            raise BadRequest("content.parts: expected a text", param="content.parts")
        texts.append(text)
    size = requests[0].get("outputDimensionality", requests[0].get("output_dimensionality"))
    asked = {"model": model, "input": texts, "encoding_format": "float"}
    return texts, {**asked, **({"dimensions": size} if size else {})}


def embeddings_as_gemini(value: JsonObject, *, one: bool) -> JsonObject:
    data = sorted(as_list(value.get("data")), key=lambda item: whole(dig(item, "index")))
    vectors = [{"values": as_list(dig(item, "embedding"))} for item in data]
    return {"embedding": vectors[0]} if one else {"embeddings": vectors}


# ---------------------------------------------------------------------------------------------
# 14. adapt: a prompt as its target can take it, and what to undo in the answer (pure)
# ---------------------------------------------------------------------------------------------
# What a target's protocol or model cannot say is dropped, bent or emulated here, before its codec
# writes the request: Prompt in, Prompt out. Every loss is noted; what was emulated is undone in
# the answer, part by part, so that the caller never sees it.


class Undo(NamedTuple):
    """What must be undone in an answer.

    Attributes:
        names: a tool's name as it went out -> its namespace and the name that the caller gave it.
        custom: tools (as they went out) whose free text went out as a string called `input`.
        answer_tool: a tool whose input is the answer.
        wrapped: and the answer is in its field `value`.
        json_only: the text is JSON, whatever the model wrote around it.
        stops: stop sequences that we have to look for ourselves.
    """

    names: Mapping[str, tuple[str, str]] = {}
    custom: frozenset[str] = frozenset()
    answer_tool: str = ""
    wrapped: bool = False
    json_only: bool = False
    stops: tuple[str, ...] = ()


# What becomes of a field: `-` it is sent; W dropped with a warning; s dropped without one, since
# nothing in the answer depends on it.
# fmt: off
_CARRIED: tuple[tuple[str, bool, str, str], ...] = (
    # field                 in Sampling: its attribute    Chat, Responses, Messages, Gemini
    ("seed",                True, "seed",                 "-WW-"),
    ("presence_penalty",    True, "presence_penalty",     "-WW-"),
    ("frequency_penalty",   True, "frequency_penalty",    "-WW-"),
    ("logit_bias",          True, "logit_bias",           "-WWW"),
    ("logprobs",            True, "logprobs",             "--W-"),
    ("top_k",               True, "top_k",                "WW--"),
    ("verbosity",           False, "verbosity",           "--WW"),
    ("metadata",            False, "metadata",            "--WW"),
    ("parallel_tool_calls", False, "parallel_tools",      "---W"),
    ("prompt_cache_key",    False, "cache_key",           "--ss"),
    ("cache_control",       False, "cache",               "ss-s"),
    ("user",                False, "user",                "---s"),
    ("store",               False, "store",               "--ss"),
)
# fmt: on
_CARRIED_BY = {protocol: n for n, protocol in enumerate(ApiProtocol)}

# Fields without a neutral form, in small letters, by what their loss would mean. All others are
# dropped with a warning.
_ONLY_THERE = {
    "background", "conversation", "prompt", "cachedcontent", "container", "mcpservers",
    "speechconfig", "continuationtoken",
}  # fmt: skip
_OF_NO_MATTER_AT = {(ApiProtocol.CHAT_COMPLETIONS, "safetysettings")}
_OF_NO_MATTER = {
    "streamoptions", "clientmetadata", "diagnostics", "safeguards",
    "anthropicbeta", "betas", "mediaresolution", "usage", "moderation",
}  # fmt: skip

# How many stop sequences a request may hold. wire: the four references, read 2026-11
_MAX_STOPS = {
    ApiProtocol.CHAT_COMPLETIONS: 4, ApiProtocol.RESPONSES: 0, ApiProtocol.MESSAGES: 1000,
    ApiProtocol.GENERATE_CONTENT: 5,
}  # fmt: skip

_OBJECT_ONLY = "Answer with one JSON object and nothing else: no code fence, no words around it."
_NO_RESULT = "[no result: the call was not answered]"


def adapt(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits, losses: Losses
) -> tuple[Prompt, Undo]:
    """A prompt for a target. Raises UpstreamUnfit for what it cannot take and cannot do without,
    BadRequest for what nobody could take."""
    prompt = _without_lost_fields(prompt, protocol, losses)
    prompt = _within_limits(prompt, protocol, traits, losses)
    prompt = _with_output_kinds(prompt, protocol, traits, losses)
    prompt = _withheld(prompt, traits, losses)
    prompt = _with_own_files(prompt, protocol, traits)
    if protocol is not ApiProtocol.GENERATE_CONTENT:
        prompt = _without_own_pictures(prompt, losses)
    prompt, custom = _without_custom_tools(prompt, traits, losses)
    prompt = _with_known_tools(prompt, protocol, traits, losses)
    prompt, names = _renamed(prompt, protocol)
    prompt = _with_possible_choice(prompt, protocol, traits, losses)
    prompt, undo = _with_output(prompt, protocol, traits, losses)
    if protocol in (ApiProtocol.MESSAGES, ApiProtocol.GENERATE_CONTENT):
        prompt = _with_placed_system(prompt, traits, losses)
        prompt = _with_all_results(prompt, losses)
    if not traits.prefill and prompt.messages and prompt.messages[-1].role == "assistant":
        losses.add("prefill_unsupported", "messages")
        asked = Message("user", (Text("Continue."),))
        prompt = prompt._replace(messages=(*prompt.messages, asked))
    prompt = _with_fitting_ids(prompt, protocol, traits)
    prompt = _with_fitting_marks(prompt, protocol, traits, losses)
    most = _MAX_STOPS[protocol] if traits.stops else 0
    # wire: Messages refuses blank ones; they go last, and past the bound
    blank = [s for s in prompt.sampling.stop if not s.strip()]
    if protocol is ApiProtocol.MESSAGES and blank:
        most = len(prompt.sampling.stop) - len(blank)
    stops = tuple(sorted((s for s in prompt.sampling.stop if s), key=lambda s: not s.strip()))
    prompt = prompt._replace(sampling=prompt.sampling._replace(stop=stops[:most]))
    wire_names = {wire: own for own, wire in names.items()}
    went_out = frozenset(names.get(own, own[1]) for own in custom)
    return prompt, undo._replace(names=wire_names, custom=went_out, stops=stops[most:])


def _without_lost_fields(prompt: Prompt, protocol: ApiProtocol, losses: Losses) -> Prompt:
    column = _CARRIED_BY[protocol]
    for name, in_sampling, attribute, verdicts in _CARRIED:
        value = getattr(prompt.sampling if in_sampling else prompt, attribute)
        empty = value is None or value == "" or (name == "parallel_tool_calls" and value)
        if verdicts[column] == "-" or empty:
            continue
        if verdicts[column] == "W":
            losses.add("dropped", name)
        cleared: dict[str, Any] = {attribute: "" if isinstance(value, str) else None}
        if in_sampling:
            prompt = prompt._replace(sampling=prompt.sampling._replace(**cleared))
        else:
            prompt = prompt._replace(**cleared)
    if protocol is not ApiProtocol.CHAT_COMPLETIONS and any(m.name for m in prompt.messages):
        losses.add("dropped", "name", harmful=False)
    if prompt.source is not protocol:
        _judge_extra(prompt, protocol, losses)
    return prompt


def _judge_extra(prompt: Prompt, protocol: ApiProtocol, losses: Losses) -> None:
    for name, value in prompt.extra.items():
        plain = name.replace("_", "").lower()
        if value in (False, [], {}, ""):
            continue  # it asks for nothing
        if plain in _ONLY_THERE:
            raise _no_counterpart(name, f"`{name}`")
        if plain not in _OF_NO_MATTER and (protocol, plain) not in _OF_NO_MATTER_AT:
            losses.add("dropped", printable(name, 64))


def _no_counterpart(field_name: str, what: str) -> UpstreamUnfit:
    return UpstreamUnfit(
        f"{field_name}: {what} has no counterpart in the protocol of the model's provider; "
        "leave it out, or ask a provider that speaks the protocol of this request",
        code="unsupported_parameter",
        param=field_name,
    )


def _within_limits(prompt: Prompt, protocol: ApiProtocol, traits: Traits, losses: Losses) -> Prompt:
    """Sampling as the model takes it."""
    sampling = prompt.sampling
    if not traits.sampling:
        for name in ("temperature", "top_p", "top_k"):
            value = getattr(sampling, name)
            if value is not None:
                if value != 1:
                    losses.add("dropped", name)
                cleared: dict[str, Any] = {name: None}
                sampling = sampling._replace(**cleared)
    wanted = prompt.thinking.effort
    if wanted and not (wanted == "none" and protocol in _STOPPED_OTHERWISE):
        effort = nearest_effort(wanted, traits.efforts)
        if effort != wanted:
            losses.add("lowered", "reasoning_effort", harmful=False)
        prompt = prompt._replace(thinking=prompt.thinking._replace(effort=effort))
    if protocol is ApiProtocol.MESSAGES and (sampling.temperature or 0) > 1:
        losses.add("clamped", "temperature")
        sampling = sampling._replace(temperature=1.0)
    return prompt._replace(sampling=sampling)


# Where reasoning is turned off in another way than by a level of effort.
_STOPPED_OTHERWISE = (ApiProtocol.MESSAGES, ApiProtocol.GENERATE_CONTENT)


# Pictures and speech.

# wire: platform.openai.com/docs/guides/audio and ai.google.dev/gemini-api/docs/speech-generation,
# read 2026-11
_VOICES = {
    ApiProtocol.CHAT_COMPLETIONS: frozenset((
        "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx",
        "sage", "shimmer", "verse",
    )),
    ApiProtocol.GENERATE_CONTENT: frozenset((
        "Achernar", "Achird", "Algenib", "Algieba", "Alnilam", "Aoede", "Autonoe", "Callirrhoe",
        "Charon", "Despina", "Enceladus", "Erinome", "Fenrir", "Gacrux", "Iapetus", "Kore",
        "Laomedeia", "Leda", "Orus", "Puck", "Pulcherrima", "Rasalgethi", "Sadachbia",
        "Sadaltager", "Schedar", "Sulafat", "Umbriel", "Vindemiatrix", "Zephyr", "Zubenelgenubi",
    )),
}  # fmt: skip
_DRAWING_TOOL = "image_generation"
# The field that asks for other things than text, as a caller knows it.
_MAKES_FIELD = {
    ApiProtocol.CHAT_COMPLETIONS: "modalities",
    ApiProtocol.GENERATE_CONTENT: "responseModalities",
}


def _with_output_kinds(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits, losses: Losses
) -> Prompt:
    """A prompt that asks for pictures and speech in the target's way."""
    if protocol is prompt.source:
        return prompt
    name, wanted = _MAKES_FIELD.get(prompt.source, "tools"), {*prompt.makes} - {"text"}
    if "audio" in wanted:
        return _spoken(prompt, protocol, name, losses)
    drawing = [tool for tool in prompt.tools if tool.name == _DRAWING_TOOL]
    if drawing and drawing[0].kind == "hosted" and traits.draws and protocol in _MAKES_FIELD:
        others = tuple(tool for tool in prompt.tools if tool not in drawing)
        prompt, wanted = prompt._replace(tools=others), {"image"}
    if "image" in wanted and protocol is ApiProtocol.RESPONSES:
        native = Native(protocol, {"type": _DRAWING_TOOL})
        tool = Tool(_DRAWING_TOOL, kind="hosted", native=native)
        return prompt._replace(makes=(), tools=(*prompt.tools, tool))
    if wanted and (wanted != {"image"} or protocol is ApiProtocol.MESSAGES):
        losses.add("dropped", name)
        wanted = set()
    return prompt._replace(makes=("text", "image") if wanted else (), voice=None)


def _spoken(prompt: Prompt, protocol: ApiProtocol, name: str, losses: Losses) -> Prompt:
    if protocol not in _VOICES:
        raise _no_counterpart(name, "audio output")
    voice = prompt.voice or Voice()
    if voice.name and voice.name not in _VOICES[protocol]:
        losses.add("dropped", "audio.voice" if name == "modalities" else "speechConfig")
        voice = voice._replace(name="")
    if protocol is ApiProtocol.CHAT_COMPLETIONS:
        return prompt._replace(makes=("text", "audio"), voice=voice._replace(form="pcm16"))
    possible = ("pcm16",) if prompt.stream else ("wav", "pcm16")
    if voice.form not in possible:
        raise UpstreamUnfit(
            f"audio.format: {show_json(voice.form)} cannot be made from what the model's provider "
            f"gives; expected {' or '.join(possible)}",
            code="unsupported_parameter",
            param="audio.format",
        )
    # wire: a model that speaks takes no text beside it
    return prompt._replace(makes=("audio",), voice=voice)


# Opaque state, and files that only their vendor has.


def _withheld(prompt: Prompt, traits: Traits, losses: Losses) -> Prompt:
    """A prompt without the state of other vendors than the target's."""

    def keep(part: Content) -> Content | None:
        if isinstance(part, Reasoning):
            if part.opaque and part.opaque.vendor == traits.vendor:
                return part
            if part.opaque and part.opaque.data:
                losses.add("withheld", "reasoning", harmful=False)
            return Reasoning(part.text) if part.text else None
        if isinstance(part, ToolCall) and part.opaque and part.opaque.vendor != traits.vendor:
            losses.add("withheld", "reasoning", harmful=False)
            return part._replace(opaque=None)
        return part

    return _each_part(prompt, keep)


def _each_part(prompt: Prompt, change: Callable[[Content], Content | None]) -> Prompt:
    """A prompt with each part changed, or dropped for None; empty messages of the assistant go."""
    messages = []
    for message in prompt.messages:
        content = tuple(new for part in message.content if (new := change(part)) is not None)
        if content or message.role != "assistant":
            messages.append(message._replace(content=content))
    return prompt._replace(messages=tuple(messages))


def _with_own_files(prompt: Prompt, protocol: ApiProtocol, traits: Traits) -> Prompt:
    """Raises UpstreamUnfit for a file that the target does not have."""
    vendors = {traits.vendor}
    if traits.official and protocol in (ApiProtocol.CHAT_COMPLETIONS, ApiProtocol.RESPONSES):
        vendors.add("openai")
    for message in prompt.messages:
        for part in message.content:
            for one in part.content if isinstance(part, ToolResult) else (part,):
                if isinstance(one, Media) and one.file_id and one.vendor not in vendors:
                    raise _no_counterpart("file_id", f"a file that only {one.vendor} has")
    return prompt


def _without_own_pictures(prompt: Prompt, losses: Losses) -> Prompt:
    """Only Gemini takes back what a model drew."""
    messages = []
    for message in prompt.messages:
        if message.role == "assistant" and any(isinstance(p, Media) for p in message.content):
            losses.add("dropped", "image")
            kept = tuple(p for p in message.content if not isinstance(p, Media))
            message = message._replace(content=kept)
        if message.content or message.role != "assistant":
            messages.append(message)
    return prompt._replace(messages=tuple(messages))


# Tools.


def _without_custom_tools(
    prompt: Prompt, traits: Traits, losses: Losses
) -> tuple[Prompt, frozenset[tuple[str, str]]]:
    """Tools whose input is free text become functions with one string. Returns which did, by
    namespace and name."""
    names = frozenset((t.namespace, t.name) for t in prompt.tools if t.kind == "custom")
    if traits.custom_tools:
        return prompt, frozenset()
    if any(tool.format and tool.format.get("type") == "grammar" for tool in prompt.tools):
        losses.add("grammar_not_enforced", "tools")
    tools = [_as_function(tool) if tool.kind == "custom" else tool for tool in prompt.tools]

    def plain(part: Content) -> Content:
        if isinstance(part, ToolCall) and part.custom:
            return part._replace(arguments=json.dumps({"input": part.arguments}), custom=False)
        if isinstance(part, ToolResult) and part.custom:
            return part._replace(custom=False)
        return part

    return _each_part(prompt._replace(tools=tuple(tools)), plain), names


def _as_function(tool: Tool) -> Tool:
    grammar = str((tool.format or {}).get("definition") or "")
    said = f"Text that follows this grammar:\n{grammar}" if grammar else "The input, as it is."
    schema = {
        "type": "object",
        "properties": {"input": {"type": "string", "description": said}},
        "required": ["input"],
        "additionalProperties": False,
    }
    return tool._replace(kind="function", schema=schema, format=None)


def _with_known_tools(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits, losses: Losses
) -> Prompt:
    """Without tools that another vendor hosts; a web search is asked for in the target's way."""
    searches = protocol is not ApiProtocol.CHAT_COMPLETIONS and traits.vendor in _SEARCHING
    tools = []
    wanted = prompt.tool_choice.names if prompt.tool_choice else ()
    for tool in prompt.tools:
        own = tool.native is not None and tool.native.protocol is protocol
        if tool.kind != "hosted" or own or (tool.name == WEB_SEARCH and searches):
            tools.append(tool)
        elif tool.name in wanted:
            raise _no_counterpart("tools", f"the hosted tool {tool.name}")
        else:
            losses.add("dropped", f"tools.{printable(tool.name, 64)}")

    def ours(part: Content) -> Content | None:
        if isinstance(part, Native) and part.protocol is not protocol:
            losses.add("dropped", printable(str(part.value.get("type") or "part"), 64))
            return None
        return part

    return _each_part(prompt._replace(tools=tuple(tools)), ours)


_SEARCHING = ("openai", "anthropic", "google")


def _renamed(prompt: Prompt, protocol: ApiProtocol) -> tuple[Prompt, dict[tuple[str, str], str]]:
    """Tools under names that the target allows: a namespace goes in front; what is too long is cut
    and told apart by a hash. Returns the names that changed: namespace and name -> new name."""
    allowed = CODECS[protocol].names
    given = [(tool.namespace, tool.name) for tool in prompt.tools if tool.kind != "hosted"]
    doubled = [name for (_, name), count in Counter(given).items() if count > 1]
    if doubled:
        name = min(doubled)
        raise BadRequest(f"tools: two tools are called {show_json(name)}", param="tools")
    called = [
        (p.namespace, p.name) for m in prompt.messages for p in m.content if isinstance(p, ToolCall)
    ]
    names: dict[tuple[str, str], str] = {}
    hosted = {tool.name for tool in prompt.tools if tool.kind == "hosted"}
    taken = {name for space, name in given if not space and allowed.fullmatch(name)} | hosted
    for space, name in dict.fromkeys([*given, *called]):
        if not space and allowed.fullmatch(name) and name not in hosted:
            continue
        names[space, name] = wire = _legal(f"{space}__{name}" if space else name, allowed, taken)
        taken.add(wire)
    if not names:
        return prompt, names

    by_id: dict[str, str] = {}

    def rename(part: Content) -> Content:
        if isinstance(part, ToolCall):
            by_id[part.id] = wire = names.get((part.namespace, part.name), part.name)
            return part._replace(name=wire, namespace="")
        if isinstance(part, ToolResult):
            return part._replace(name=by_id.get(part.call_id, part.name))
        return part

    tools = tuple(
        t._replace(name=names.get((t.namespace, t.name), t.name), namespace="")
        if t.kind != "hosted"
        else t
        for t in prompt.tools
    )
    choice = prompt.tool_choice
    if choice:
        spaced = {own: names.get((space, own), own) for space, own in given}
        by_name = spaced | {own: names.get(("", own), own) for space, own in given if not space}
        choice = choice._replace(names=tuple(by_name.get(n, n) for n in choice.names))
    return _each_part(prompt._replace(tools=tools, tool_choice=choice), rename), names


def _legal(name: str, allowed: re.Pattern[str], taken: set[str]) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if allowed.fullmatch(plain) and plain not in taken:
        return plain
    mark = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{plain[:50]}_{mark}" if plain[:1].isalpha() else f"t_{plain[:50]}_{mark}"


def _with_possible_choice(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits, losses: Losses
) -> Prompt:
    choice = prompt.tool_choice
    if choice is None or not prompt.tools:
        return prompt._replace(tool_choice=None)
    if choice.mode == "allowed" and not _allows(protocol, choice, traits):
        kept = tuple(tool for tool in prompt.tools if tool.name in choice.names)
        losses.add("tools_filtered", "tool_choice", harmful=False)
        prompt = prompt._replace(tools=kept)
        choice = ToolChoice("required" if choice.must else "auto")
    hosted = {tool.name for tool in prompt.tools if tool.kind == "hosted"}
    unnamed = protocol is ApiProtocol.GENERATE_CONTENT and not hosted.isdisjoint(choice.names)
    if choice.mode in ("required", "named") and (unnamed or not traits.forced_tools):
        losses.add("forced_tool_choice_unsupported", "tool_choice")
        choice = ToolChoice("auto")
    return prompt._replace(tool_choice=choice)


def _allows(protocol: ApiProtocol, choice: ToolChoice, traits: Traits) -> bool:
    """Whether the target can be told that only some of the tools may be called."""
    if protocol is ApiProtocol.GENERATE_CONTENT:
        return choice.must
    return protocol is not ApiProtocol.MESSAGES and traits.official


# Structured output.


def _with_output(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits, losses: Losses
) -> tuple[Prompt, Undo]:
    output = prompt.output
    if output is None:
        return prompt, Undo()
    if output.kind == "json_object":
        return _with_json_object(prompt, protocol, traits, losses)
    schema, way = output.schema or {}, traits.schema
    if protocol is ApiProtocol.MESSAGES and way == "native":
        fitting = for_claude(schema)
        if fitting is None:
            losses.add("schema_emulated", "response_format", harmful=False)
            way = "tool"
        else:
            return prompt._replace(output=output._replace(schema=fitting)), Undo()
    if protocol is ApiProtocol.GENERATE_CONTENT and prompt.tools and not traits.call_ids:
        way = "tool"  # wire: before Gemini 3, no JSON mode beside functions
    if way == "tool" and traits.forced_tools:
        return _with_answer_tool(prompt, schema, traits)
    if way in ("tool", "prompt"):
        losses.add("schema_not_enforced", "response_format")
        shown = json.dumps(schema, ensure_ascii=False)
        said = f"{_OBJECT_ONLY} It must follow this JSON schema:\n{shown}"
        return _with_instruction(prompt._replace(output=None), said), Undo(json_only=True)
    return prompt, Undo()


def _with_json_object(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits, losses: Losses
) -> tuple[Prompt, Undo]:
    old_gemini = protocol is ApiProtocol.GENERATE_CONTENT and not traits.call_ids
    emulated = protocol is ApiProtocol.MESSAGES or traits.schema == "prompt"
    emulated = emulated or (old_gemini and bool(prompt.tools))
    if emulated:
        losses.add("json_emulated", "response_format", harmful=False)
        told = _with_instruction(prompt._replace(output=None), _OBJECT_ONLY)
        return told, Undo(json_only=not prompt.tools)
    said = (p.text for m in prompt.messages for p in m.content if isinstance(p, Text))
    openai = protocol is not ApiProtocol.GENERATE_CONTENT
    if openai and not any("json" in text.lower() for text in said):
        # wire: OpenAI refuses JSON mode unless the conversation speaks of JSON
        prompt = _with_instruction(prompt, "Answer with a JSON object.")
    return prompt, Undo()


def _with_answer_tool(prompt: Prompt, schema: JsonObject, traits: Traits) -> tuple[Prompt, Undo]:
    """The answer as the input of a tool that the model must call."""
    wrapped = schema.get("type") != "object" or any(
        k in schema for k in ("anyOf", "oneOf", "allOf")
    )
    given: JsonObject = schema
    if wrapped:
        definitions = {str(k): schema[k] for k in ("$defs", "definitions") if k in schema}
        inner = {k: v for k, v in schema.items() if k not in definitions}
        given = {"type": "object", "properties": {"value": inner}, "required": ["value"]}
        given |= definitions
    name = traits.answer_tool
    while any(tool.name == name for tool in prompt.tools):
        name += "_"
    tool = Tool(name, "Respond to the user using the output schema provided.", given)
    choice = ToolChoice("named", (name,))
    if prompt.tools:
        said = f"Give your final answer by calling {name}."
        prompt, choice = _with_instruction(prompt, said), ToolChoice("required")
    prompt = prompt._replace(tools=(*prompt.tools, tool), tool_choice=choice, output=None)
    return prompt, Undo(answer_tool=name, wrapped=wrapped)


def _with_instruction(prompt: Prompt, text: str) -> Prompt:
    """A prompt with one more sentence in its system prompt."""
    first = prompt.messages[0]
    if first.role in ("system", "developer"):
        told = first._replace(content=(*first.content, Text(text)))
        return prompt._replace(messages=(told, *prompt.messages[1:]))
    return prompt._replace(messages=(Message("system", (Text(text),)), *prompt.messages))


# Conversations.


def _with_placed_system(prompt: Prompt, traits: Traits, losses: Losses) -> Prompt:
    """System messages where the target has a place for them: at the start, or, if it can, between
    a user's turn and the assistant's. Others become reminders in the user's turn: what they say
    depends on nothing that comes later, so caches of the start stay good."""
    messages, leading = [], True
    for n, message in enumerate(prompt.messages):
        is_system = message.role in ("system", "developer")
        leading = leading and is_system
        if is_system and not leading:
            after = prompt.messages[n - 1].role
            before = prompt.messages[n + 1].role if n + 1 < len(prompt.messages) else "assistant"
            if not (traits.inline_system and after == "user" and before == "assistant"):
                losses.add("system_as_reminder", "messages", harmful=False)
                said = f"<system-reminder>\n{joined_text(message.content)}\n</system-reminder>"
                message = Message("user", (Text(said),))
        messages.append(message)
    return prompt._replace(messages=tuple(messages))


def _with_all_results(prompt: Prompt, losses: Losses) -> Prompt:
    """A conversation in which each call of an earlier turn has its result."""
    merged = turns(prompt.messages)
    for n, turn in enumerate(merged[:-1]):
        calls = {p.id: p for p in turn.content if isinstance(p, ToolCall)}
        following = merged[n + 1]
        for part in following.content:
            if isinstance(part, ToolResult):
                calls.pop(part.call_id, None)
        if calls and turn.role == "assistant" and following.role == "user":
            losses.add("result_missing", "messages", harmful=False)
            missing = [
                ToolResult(i, (Text(_NO_RESULT),), is_error=True, name=call.name)
                for i, call in calls.items()
            ]
            merged[n + 1] = following._replace(content=(*missing, *following.content))
    return prompt._replace(messages=tuple(merged))


# wire: docs.claude.com/en/docs/build-with-claude/prompt-caching and
# platform.openai.com/docs/guides/prompt-caching, read 2026-11
_MAX_MARKS = 4


def _with_fitting_marks(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits, losses: Losses
) -> Prompt:
    """A prompt with no more cache marks than its target takes; the last ones cover the most."""
    surplus = 0
    if protocol is ApiProtocol.MESSAGES:
        surplus = bool(prompt.cache) - _MAX_MARKS
    else:  # tools have no place for a mark, nor has what the assistant said
        takers = ("system", "developer", "user") if traits.breakpoints else ()
        prompt = prompt._replace(
            tools=tuple(tool._replace(cache="") for tool in prompt.tools),
            messages=tuple(
                message._replace(content=tuple(map(fit, message.content)))
                for message in prompt.messages
                for fit in [_hoisted if message.role in takers else _unmarked]
            ),
        )
        surplus = -_MAX_MARKS
    marked = [tool for tool in prompt.tools if tool.cache]
    marks = sum(bool(_mark_of(part)) for m in prompt.messages for part in m.content)
    if marks and protocol is not ApiProtocol.MESSAGES and not prompt.cache_key:
        prompt = prompt._replace(cache_key=short_user(prompt.user))
    surplus += len(marked) + marks
    if surplus <= 0:
        return prompt
    losses.add("dropped", "cache_control", harmful=False)

    def unmark(part: Content) -> Content:
        nonlocal surplus
        if surplus > 0 and isinstance(part, Text | Media | ToolCall | ToolResult) and part.cache:
            surplus -= 1
            return _unmarked(part)
        return part

    return _each_part(prompt, unmark)


def _unmarked(part: Content) -> Content:
    if isinstance(part, ToolResult):
        inner = tuple(one._replace(cache="") for one in part.content)
        return part._replace(content=inner, cache="")
    if isinstance(part, Text | Media | ToolCall):
        return part._replace(cache="")
    return part


def _hoisted(part: Content) -> Content:
    """A result that bears the mark of what is in it."""
    if not isinstance(part, ToolResult):
        return part
    cache = part.cache or next((one.cache for one in part.content if one.cache), "")
    inner = tuple(one._replace(cache="") for one in part.content)
    return part._replace(content=inner, cache=cache)


def _mark_of(part: Content) -> str:
    return part.cache if isinstance(part, Text | Media | ToolCall | ToolResult) else ""


_FITTING_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _with_fitting_ids(prompt: Prompt, protocol: ApiProtocol, traits: Traits) -> Prompt:
    """Call ids as the target takes them. Servers that are only compatible keep theirs: some models
    know their own ids by their form."""
    lenient = protocol is ApiProtocol.GENERATE_CONTENT or (
        protocol is ApiProtocol.CHAT_COMPLETIONS and not traits.official
    )
    if lenient:
        return prompt

    def fit(part: Content) -> Content:
        if isinstance(part, ToolCall):
            return part._replace(id=_fitting_id(part.id))
        if isinstance(part, ToolResult):
            return part._replace(call_id=_fitting_id(part.call_id))
        return part

    return _each_part(prompt, fit)


def _fitting_id(ident: str) -> str:
    if _FITTING_ID.fullmatch(ident):
        return ident
    return "call_" + hashlib.sha256(ident.encode("utf-8", "replace")).hexdigest()[:32]


# Undoing, in the answer.


class Undoing:
    """Parts as the target sent them -> parts as the caller shall see them."""

    def __init__(self, undo: Undo, seed: str) -> None:
        """seed: what ids of calls are made of, where the target gave none."""
        self._undo = undo
        self._seed = seed
        self._held: dict[int, list[str]] = {}  # blocks that are held back until they are whole
        self._tails: dict[int, str] = {}  # text that may be the beginning of a stop sequence
        self._inputs: dict[int, _InputReader] = {}
        self._answers: dict[int, bool] = {}  # calls that are the answer -> whether it has begun
        self._answered: set[int] = set()  # choices that have one
        self._asides: dict[int, list[StreamPart]] = {}  # texts that count if no answer comes
        self._choices: dict[int, int] = {}
        self._texts: set[int] = set()
        self._called: set[int] = set()  # choices in which the caller's own tools were called
        self._stopped: dict[int, str] = {}  # choice -> the stop sequence that ended it
        self._count = 0

    def feed(self, part: StreamPart) -> list[StreamPart]:
        if isinstance(part, Finished):
            return self._finish(part)
        if self._keeps_back(part):
            return []
        match part:
            case Delta():
                return self._delta(part)
            case Open():
                return [self._open(part)]
            case Close():
                return self._close(part)
        return [part]

    def _keeps_back(self, part: Open | Delta | Cite | Close) -> bool:
        """Whether a part waits, or shall not be seen: after a stop sequence, after its block."""
        if isinstance(part, Open):
            self._choices[part.key] = part.choice
            if self._undo.answer_tool and isinstance(part.block, Text):
                self._asides[part.key] = []
        if part.key in self._asides:
            self._asides[part.key].append(part)
            return True
        choice = self._choices.get(part.key)
        return choice is None or choice in self._stopped

    def _open(self, part: Open) -> Open:
        undo, block = self._undo, part.block
        if isinstance(block, Text):
            self._texts.add(part.key)
            if undo.json_only:
                self._held[part.key] = []
        if not isinstance(block, ToolCall):
            return part
        if undo.answer_tool and block.name == undo.answer_tool:
            self._answers[part.key] = False
            self._answered.add(part.choice)
            if undo.wrapped:
                self._held[part.key] = []
            return Open(part.key, Text(), part.choice)
        self._called.add(part.choice)
        custom = block.name in undo.custom
        if custom:
            self._inputs[part.key] = _InputReader()
        space, name = undo.names.get(block.name, (block.namespace, block.name))
        self._count += 1
        ident = block.id or f"call_{self._seed}{self._count}"
        named = block._replace(id=ident, name=name, namespace=space, custom=custom or block.custom)
        return Open(part.key, named, part.choice)

    def _delta(self, part: Delta) -> list[StreamPart]:
        if part.key in self._held:
            self._held[part.key].append(part.text)
            return []
        if part.key in self._inputs:
            text = self._inputs[part.key].feed(part.text)
            return [Delta(part.key, text)] if text else []
        if self._undo.stops and part.key in self._texts:
            return self._look_for_stop(part)
        if part.key in self._answers:
            self._answers[part.key] = True
        return [part]

    def _look_for_stop(self, part: Delta) -> list[StreamPart]:
        text = self._tails.pop(part.key, "") + part.text
        found = [(text.index(s) + len(s), s) for s in self._undo.stops if s in text]
        if found:  # the one that is complete first, however the text is cut
            end, stop = min(found, key=lambda one: (one[0], -len(one[1])))
            at = end - len(stop)
            self._stopped[self._choices[part.key]] = stop
            choice = self._choices[part.key]
            said: list[StreamPart] = [Delta(part.key, text[:at])] if at else []
            closing = [key for key, of in self._choices.items() if of == choice]
            for key in closing:
                del self._choices[key]
            return [*said, *(Close(key) for key in closing)]
        tail = max((_overlap(text, stop) for stop in self._undo.stops), default=0)
        self._tails[part.key] = text[len(text) - tail :]
        text = text[: len(text) - tail]
        return [Delta(part.key, text, part.logprobs)] if text or part.logprobs else []

    def _close(self, part: Close) -> list[StreamPart]:
        text = ""
        del self._choices[part.key]
        if part.key in self._held:
            text = "".join(self._held.pop(part.key))
            text = _unwrapped(text) if part.key in self._answers else json_in(text)
        elif part.key in self._inputs:
            text = self._inputs.pop(part.key).finish()
        elif self._answers.get(part.key) is False:
            text = "{}"  # a call without arguments
        else:
            text = self._tails.pop(part.key, "")
        return [Delta(part.key, text), part] if text else [part]

    def _finish(self, part: Finished) -> list[StreamPart]:
        """wire: some servers say `stop` after calls; whoever called a tool of the caller's must say
        so, and whoever did not must not."""
        mine = [key for key in self._asides if self._choices.get(key) == part.choice]
        held = [one for key in mine for one in self._asides.pop(key)]
        asides = [] if part.choice in self._answered else held
        if part.choice in self._stopped:
            stop = self._stopped[part.choice]
            part = part._replace(finish=Finish.STOP_SEQUENCE, stop_sequence=stop)
        elif part.choice in self._called and part.finish in (Finish.STOP, Finish.STOP_SEQUENCE):
            part = part._replace(finish=Finish.TOOL_CALLS)
        elif part.choice not in self._called and part.finish is Finish.TOOL_CALLS:
            part = part._replace(finish=Finish.STOP)
        return [*asides, part]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop sequence."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _unwrapped(text: str) -> str:
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict) and "value" in value:
            return json.dumps(value["value"], ensure_ascii=False)
    return text


def json_in(text: str) -> str:
    """The JSON value in a text, without a fence or words around it; the text if there is none."""
    for start in itertools.islice(re.finditer(r"[{\[]", text), 3):
        with suppress(ValueError, RecursionError):
            _, end = json.JSONDecoder().raw_decode(text, start.start())
            return text[start.start() : end]
    return text


class _InputReader:
    """Reads the string of `{"input": "..."}` while it comes in, unescaped."""

    _START = re.compile(r'\s*\{\s*"input"\s*:\s*"')
    _WHOLE = re.compile(r'(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
    _HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}$")  # the first half of a character
    _LONGEST_START = 1024

    def __init__(self) -> None:
        self._text = ""  # what has not been read yet
        self._begun = False
        self._other: list[str] = []  # the pieces of what is no such object

    def feed(self, text: str) -> str:
        if self._other:
            self._other.append(text)
            return ""
        self._text += text
        if not self._begun:
            begins = self._START.match(self._text)
            if begins is None:
                if len(self._text) > self._LONGEST_START:
                    self._other.append(self._text)
                return ""
            self._text, self._begun = self._text[begins.end() :], True
        found = self._WHOLE.match(self._text)
        end = found.end() if found else 0
        half = self._HALF.search(self._text, max(0, end - 6), end)
        if half and self._text[end : end + 1] in ("", "\\"):
            end = half.start()
        piece, self._text = self._text[:end], self._text[end:]
        return str(json.loads(f'"{piece}"', strict=False)) if piece else ""

    def finish(self) -> str:
        """What is left, if it was no such object."""
        if self._begun:
            return ""
        text = "".join(self._other) or self._text
        value = object_in(text) or {}
        return str(value.get("input", text))


# ---------------------------------------------------------------------------------------------
# 15. relay: a provider's stream on its way to the caller (pure)
# ---------------------------------------------------------------------------------------------
# Bytes in, bytes out. Until something of substance has come, everything is held back, so that
# an attempt that fails early can be forgotten. After that a block of events which is in strict
# form and holds nothing of note goes on as it is: that is all but two or three of a stream's
# blocks, and costs half a microsecond. The others are looked at event by event.

MAX_HELD_BYTES = 4 * 1024 * 1024


class ArrayFramer:
    """Events -> the items of one JSON array, for Google's callers who want that."""

    def __init__(self) -> None:
        self._items = 0

    def feed(self, events: bytes) -> bytes:
        parsed = (parse_event(raw) for raw in split_events(events))
        return b"".join([self.item(event.data) for event in parsed if event])

    def item(self, data: bytes) -> bytes:
        self._items += 1
        return (b"[" if self._items == 1 else b",\r\n") + data

    def end(self) -> bytes:
        return b"]" if self._items else b"[]"


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
        self._framer = ArrayFramer() if as_array else None
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
            out += self._codec.end_mark + (self._framer.end() if self._framer else b"")
        return out

    def fail(self, error: BitrouterError) -> bytes:
        """The protocol's own way to end a stream that went wrong."""
        self.settle()
        if self._framer:
            told = compact(self._codec.render_error(error))
            return self._framer.item(told) + self._framer.end()
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
            if self.state.started or self._held_bytes > MAX_HELD_BYTES:
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
        if not self._framer and codec.dull(block) and codec.strict(block):
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
        if self._framer:
            item = self._framer.item(event.data) if value is not None else b""
            return item + self._framer.end() if self.over else item
        if self._hide_usage and value and value.get("usage") and not value.get("choices"):
            return b""
        out = self._in_form(raw, event, value)
        return self._without_null_usage(out) if self._hide_usage else out

    def _in_form(self, raw: bytes, event: SseEvent, value: JsonObject | None) -> bytes:
        """An event as the protocol's own SDKs can read it: as it came, if they can."""
        mended = self._codec.mend(self.state, value) if value else None
        if mended is not None:
            return self._codec.frame(event._replace(data=compact(mended))) if mended else b""
        return raw if self._codec.strict(raw) else self._codec.frame(event)

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


# ---------------------------------------------------------------------------------------------
# 16. translate: an answer from one protocol to another (pure)
# ---------------------------------------------------------------------------------------------
# A Translation is made for each attempt whose target speaks another protocol than the caller. It
# takes what the target sends, whole or streamed, and gives back what the caller gets. For a
# stream it looks like a StreamRelay to whoever feeds it.


_MAX_PAUSES = 5
_MAX_CHOICES = 128  # as many as OpenAI makes


class Translation:
    """One answer on its way from a target's protocol to the caller's.

    Attributes:
        state, open, garbled, over: as in StreamRelay.
        paused: the model wants to be asked to go on.
        losses: what the answer lost, added to what the request did.
    """

    def __init__(
        self,
        theirs: Codec,
        ours: Codec,
        prompt: Prompt,
        undo: Undo,
        label: AnswerLabel,
        vendor: str,
        explain: Callable[[ErrorFacts], BitrouterError],
        *,
        as_array: bool = False,
        pauses: int = _MAX_PAUSES,
    ) -> None:
        """explain: makes of a provider's error inside a stream what the caller is told.

        pauses: how often the model may be asked to go on.
        """
        self.state = StreamState()
        self.open = self.over = self.paused = False
        self.garbled: UpstreamGarbled | None = None
        self.losses = Losses()
        self._spent = Usage()  # before the last pause
        self._pauses_left = pauses
        self._theirs, self._ours = theirs, ours
        self._prompt, self._label = prompt, label
        self._explain = explain
        self._decoder = theirs.decoder(vendor)
        self._undoing = Undoing(undo, label.id[:16])
        self._encoder: StreamEncoder | None = None
        self._gatherer = Gatherer()
        self._finished: set[int] = set()
        self._chars = 0
        self._halves: dict[int, str] = {}  # key -> the first half of a character
        self._cutter = EventCutter()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._framer = ArrayFramer() if as_array else None

    @property
    def answer_id(self) -> str:
        """What a caller of Responses knows the answer by."""
        return f"resp_br{self._label.id}"

    # A whole answer.

    def resume(self, body: JsonObject) -> JsonObject:
        """The request that lets the model go on. body: the one that it paused in."""
        self._spent = self._usage()
        self._pauses_left -= 1
        self.state = StreamState()
        self._cutter = EventCutter()
        self.paused = self.over = False
        return self._decoder.resume(body)

    def take_whole(self, value: JsonObject, choice: int = 0) -> None:
        """Read an answer, or one choice of it. Raises UpstreamGarbled for a botched call."""
        for part in self._parts_of_whole(value, choice):
            for told in self._told(part):
                self._gatherer.add(told)
        if self.garbled:
            raise self.garbled

    def whole(self) -> JsonObject:
        """The caller's answer, of all that was read."""
        self.state.usage, self._spent = self._usage(), Usage()
        self._note_lost()
        return self._ours.render_response(
            self._prompt, self._named(), self.choices(), self.state.usage, self.losses
        )

    def _parts_of_whole(self, value: JsonObject, n: int) -> Iterator[StreamPart]:
        used = self._theirs.usage(value)
        if used:
            so_far = self.state.usage or Usage()
            self.state.usage = Usage(*map(sum, zip(so_far, used, strict=True)))
        for part in self._decoded(self._decoder.whole, value):
            yield part._replace(choice=n) if n and isinstance(part, Open | Finished) else part

    def choices(self) -> list[Choice]:
        """What was answered, to be remembered."""
        return self._gatherer.choices()

    # A stream.

    def feed(self, chunk: bytes) -> bytes:
        try:
            block = self._cutter.feed(chunk)
            out = self._take(block) if block else []
        except UpstreamGarbled as error:
            self.garbled, self.over = error, True
            out = []
        return self._release(b"".join(out))

    def finish(self) -> bytes:
        """What is left when the provider has closed a stream that it had finished."""
        rest = self._cutter.finish()
        out: list[bytes] = []
        try:
            out = self._take(rest) if rest else []
            if self.state.finished and not self.over:
                out.append(self._end())
        except UpstreamGarbled as error:
            self.garbled, self.over = error, True
        return self._release(b"".join(out))

    def whole_as_stream(self, value: JsonObject) -> bytes:
        """A whole answer, for a caller who asked for a stream. Raises UpstreamGarbled."""
        return self.many_as_stream([value])

    def many_as_stream(self, values: list[JsonObject]) -> bytes:
        self.state.started = self.state.finished = True
        out: list[bytes] = []
        for n, value in enumerate(values):
            out += [self._encode(part) for part in self._parts_of_whole(value, n)]
        if self.garbled:
            raise self.garbled
        out += [] if self.paused else [self._end()]
        return self._release(b"".join(out))

    def fail(self, error: BitrouterError) -> bytes:
        told = self._encode_with().fail(error)
        return self._framer.feed(told) + self._framer.end() if self._framer else told

    def settle(self) -> None:
        """Usage is noted as it comes; there is nothing to make up for."""

    def _take(self, block: bytes) -> list[bytes]:
        out: list[bytes] = []
        for raw in split_events(block):
            if self.over:
                break
            event = parse_event(raw)
            if event is None:
                continue
            if event.data == b"[DONE]":
                self.state.ended = True
            else:
                self._event(event.data, out)
            if self.garbled or self.paused:
                self.over = True
            elif self.state.error is not None:
                self.over = True
                if self.open:
                    out.append(self._encode_with().fail(self._explain(self.state.error)))
            elif self.state.ended and self.state.finished:
                out.append(self._end())
            elif self.state.ended:
                said = "the provider ended the stream without saying why the model stopped"
                self.garbled = UpstreamGarbled(said, code="upstream_disconnected")
                self.over = True
        return out

    def _event(self, data: bytes, out: list[bytes]) -> None:
        try:
            value = parse_json(data)
        except (ValueError, RecursionError):
            shown = printable(data[:200].decode("utf-8", "replace"))
            said = "the provider sent an event that is not JSON"
            self.garbled = UpstreamGarbled(said, code="upstream_bad_json", detail=shown)
            return
        if isinstance(value, dict):
            self._theirs.note(self.state, value)
            if self.state.error is None:
                parts = self._decoded(self._decoder.feed, value)
                out += [self._encode(part) for part in parts]

    def _decoded(
        self, decode: Callable[[JsonObject], list[StreamPart]], value: JsonObject
    ) -> list[StreamPart]:
        try:
            return decode(value)
        except BadRequest as error:  # what reads a caller's messages reads a provider's too
            said = f"the provider's answer makes no sense: {error.message}"
            raise UpstreamGarbled(said) from None

    def _encode(self, part: StreamPart) -> bytes:
        """A part as the caller gets it, after what was done to the request is undone."""
        encoder = self._encode_with()
        out = b""
        for told in self._told(part):
            self._gatherer.add(told)
            out += encoder.encode(told)
        return out

    def _told(self, part: StreamPart) -> Iterator[StreamPart]:
        """What the caller shall see of a part."""
        if isinstance(part, Open | Finished) and part.choice >= _MAX_CHOICES:
            raise UpstreamGarbled(f"the provider numbers a choice {part.choice}")
        if isinstance(part, Delta):
            part = self._in_whole_characters(part)
        for told in self._undoing.feed(part):
            if isinstance(told, Finished):
                self._finish_seen(told)
                if self.garbled or self.paused:
                    return
            elif isinstance(told, Delta):
                self._chars += len(told.text)
            yield told

    def _in_whole_characters(self, part: Delta) -> Delta:
        """wire: some servers cut between the two halves of a UTF-16 surrogate pair."""
        text = self._halves.pop(part.key, "") + part.text if self._halves else part.text
        if text and "\ud800" <= text[-1] <= "\udbff":
            self._halves[part.key] = text[-1]
            text = text[:-1]
        if text is not part.text:
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            return part._replace(text=text)
        return part

    def _finish_seen(self, part: Finished) -> None:
        if part.goes_on and self._pauses_left:
            self.paused = True
        else:
            self._finished.add(part.choice)
            if part.raw == "MISSING_THOUGHT_SIGNATURE":
                said = "the provider misses the signature of a call in the conversation"
                kind = Kind.INVALID_REQUEST
                self.garbled = UpstreamGarbled(said, status=400, kind=kind, code="bad_signature")
            elif part.finish is Finish.MALFORMED:
                said = f"the model botched a tool call ({printable(part.raw, 60)})"
                self.garbled = UpstreamGarbled(said, code="upstream_malformed_tool_call")

    def _end(self) -> bytes:
        """The end of a stream that ended well; a finish that never came is made up."""
        self.over = self.state.ended = True
        out = [self._encode(part) for part in self._decoder.finish()]
        if not self._finished:
            out.append(self._encode(Finished(Finish.STOP)))
        self.state.usage, self._spent = self._usage(), Usage()
        self._note_lost()
        return b"".join([*out, self._encode_with().end(self.state.usage)])

    def _note_lost(self) -> None:
        for kind in sorted(self._decoder.lost):
            self.losses.add("dropped", printable(kind, 64), harmful=False)

    def _encode_with(self) -> StreamEncoder:
        if self._encoder is None:
            self._encoder = self._ours.encoder(self._prompt, self._named())
        return self._encoder

    def _named(self) -> AnswerLabel:
        model, usage = self._decoder.model or self._label.model, self.state.usage
        known = usage.input_tokens if usage else 0
        return self._label._replace(model=model, input_tokens=known or self._label.input_tokens)

    def _usage(self) -> Usage:
        """As reported, or else by the rule that four characters make a token."""
        used = self.state.usage
        if used is None:
            self.losses.add("estimated", "usage", harmful=False)
            used = Usage(self._label.input_tokens, -(-self._chars // 4))
        return Usage(*map(sum, zip(self._spent, used, strict=True)))

    def _release(self, out: bytes) -> bytes:
        """What may go on to the caller: nothing until something of substance has come."""
        if self.open:
            return self._framed(out)
        self._held.append(out)
        self._held_bytes += len(out)
        if not self.state.started and self._held_bytes < MAX_HELD_BYTES:
            return b""
        self.open = not self.garbled and self.state.error is None
        held = b"".join(self._held) if self.open else b""
        self._held.clear()
        return self._framed(held)

    def _framed(self, out: bytes) -> bytes:
        if self._framer is None:
            return out
        ended = self.over and not (self.garbled or self.paused)
        return self._framer.feed(out) + (self._framer.end() if ended else b"")


# ---------------------------------------------------------------------------------------------
# 17. registry: the providers and models we know, and what they cost (pure)
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
        like: the provider of this table whose models, prices and ways it shares, if not its own.
        headers: sent with every request, by the configuration's wish.
    """

    id: str
    bases: dict[ApiProtocol, str]
    env: tuple[str, ...] = ()
    kind: str = "api"
    auth: str = "native"
    full_ids: bool = False
    like: str = ""
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
         "GEMINI_API_KEY GOOGLE_API_KEY GOOGLE_AI_STUDIO_API_KEY",
         c="https://generativelanguage.googleapis.com/v1beta/openai"),
    _row("vertex", "g", "https://aiplatform.googleapis.com/v1/publishers/google",
         "VERTEX_EXPRESS_API_KEY"),
    _row("azure", "cr", "https://${AZURE_OPENAI_RESOURCE}.openai.azure.com/openai/v1",
         "AZURE_OPENAI_API_KEY AZURE_API_KEY", "bearer"),
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


def family_of(model: str) -> str:
    """Whose model a bare id is, by how it begins; "" if that tells nothing."""
    return next((ident for ident, starts in FAMILIES if model.startswith(starts)), "")


@functools.lru_cache(maxsize=4096)
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
# 18. quirks: what single models take and refuse (pure)
# ---------------------------------------------------------------------------------------------
# Hints again: a model that no row fits gets what its protocol allows, and what it refuses then is
# learned from its refusal. Ids are compared in normal form: small letters, dashes for dots.
#
# wire: platform.openai.com/docs/models, docs.claude.com/en/docs/build-with-claude/extended-
# thinking and /effort, ai.google.dev/gemini-api/docs/thinking; read 2026-11

_CLAUDE_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_GEMINI_LEVELS = ("minimal", "low", "medium", "high")

# First match decides. `no`: what the model does not take.
_CLAUDES: tuple[tuple[str, str, str], ...] = (
    # model                                    thinking    no
    (r"claude-opus-5-5",                       "adaptive", "stop sampling force prefill"),
    (r"claude-sonnet-5-5",                     "adaptive", "sampling force prefill"),
    (r"claude-haiku-5-5",                      "adaptive", "sampling prefill"),
    (r"claude-(fable|mythos)-5-1",             "adaptive", "stop sampling force prefill inline"),
    (r"claude-(fable|mythos)",                 "adaptive", "stop sampling prefill inline"),
    (r"claude-opus-5",                         "adaptive", "sampling prefill"),
    (r"claude-sonnet-5",                       "adaptive", "sampling prefill inline"),
    (r"claude-opus-4-8",                       "adaptive", "sampling prefill"),
    (r"claude-opus-4-7",                       "adaptive", "sampling prefill inline"),
    (r"claude-(opus|sonnet)-4-6",              "adaptive", "prefill inline"),
    (r"claude-(opus|sonnet|haiku)-4-5",        "budget",   "inline"),
    (r"claude-(opus|sonnet)-4|claude-3-7",     "budget",   "inline schema"),
    (r"claude-",                               "",         "inline schema"),
)  # fmt: skip

_REASONS = r"o[134]|gpt-[5-9]|gpt-oss|codex"
_OPENAI_EFFORTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"gpt-6-astra", ("low", "medium", "high", "xhigh", "max")),
    (r"gpt-6", ("none", "low", "medium", "high", "xhigh", "max")),
    (r"gpt-5-[2-9]", ("none", "low", "medium", "high", "xhigh")),
    (r"gpt-5-1", ("none", "low", "medium", "high")),
    (r"gpt-5", ("minimal", "low", "medium", "high")),
    (r"o[134]|gpt-oss", ("low", "medium", "high")),
)
# Only the Responses API has these, or tools together with reasoning for the second group.
_RESPONSES_ONLY = re.compile(r"(o\d|gpt-5(-\d)?|gpt-6(-\d)?)-pro|.*-codex|.*-deep-research|codex-")
_TOOLS_ON_RESPONSES = re.compile(r"gpt-5-[4-9]|gpt-6")

# What a lab's models want back of their own plain reasoning.
_ECHOES = {"deepseek", "moonshotai", "zai", "z-ai", "xiaomi", "minimax", "openrouter"}
_NO_FETCHING = {"aws-bedrock", "vertex", "ollama", "lmstudio", "llamacpp", "vllm"}
_OFFICIAL = {
    ApiProtocol.CHAT_COMPLETIONS: ("openai", "azure"),
    ApiProtocol.RESPONSES: ("openai", "azure"),
    ApiProtocol.MESSAGES: ("anthropic",),
    ApiProtocol.GENERATE_CONTENT: ("google", "vertex"),
}
_VENDORS = {
    ApiProtocol.RESPONSES: "openai",
    ApiProtocol.MESSAGES: "anthropic",
    ApiProtocol.GENERATE_CONTENT: "google",
}


@functools.lru_cache(maxsize=4096)
def traits_of(provider: str, model: str, protocol: ApiProtocol) -> Traits:
    """What a model takes at a provider, in a protocol."""
    facts = find_model(model) or find_model(f"{provider}/{model}")
    bare = normal_id(model.rpartition("/")[2])
    lab = facts.id.partition("/")[0] if facts else family_of(bare)
    openai = protocol in _OPENAI_SPOKEN and provider in _OFFICIAL[protocol]
    traits = Traits(
        vendor=f"chat:{provider}" if protocol in _UNSIGNING else lab or _VENDORS[protocol],
        official=provider in _OFFICIAL[protocol],
        max_output=facts.max_output if facts else 0,
        echoes_reasoning=provider in _ECHOES or lab in _ECHOES,
        fetches_urls=provider not in _NO_FETCHING,
        custom_tools=protocol is ApiProtocol.RESPONSES or openai,
        developer_role=openai,
        breakpoints=openai and bool(re.match(_MARKABLE, bare)),
        draws=bool(facts and "i" in facts.outputs) or "-image" in bare,
    )
    if protocol is ApiProtocol.MESSAGES:
        return _claude_traits(traits, bare, lab)
    if protocol is ApiProtocol.GENERATE_CONTENT:
        return _gemini_traits(traits, bare)
    return _openai_traits(traits, bare, protocol)


# OpenAI's models that take marks in their prompts. wire: platform.openai.com/docs/guides/
# prompt-caching, read 2026-11
_MARKABLE = r"gpt-(5-([6-9]|\d\d)|[6-9])"

# A protocol without opaque state of its own: what its servers mint is nobody else's business.
_UNSIGNING = (ApiProtocol.CHAT_COMPLETIONS,)
_OPENAI_SPOKEN = (ApiProtocol.CHAT_COMPLETIONS, ApiProtocol.RESPONSES)


def _claude_traits(traits: Traits, bare: str, lab: str) -> Traits:
    if lab not in ("anthropic", ""):
        return traits._replace(schema="tool", thinking="budget")
    found = next((row for row in _CLAUDES if re.match(row[0], bare)), None)
    if found is None:
        return traits._replace(thinking="budget")
    _, thinking, refused = found
    no = set(refused.split())
    return traits._replace(
        thinking=thinking,
        efforts=_CLAUDE_EFFORTS if thinking == "adaptive" else (),
        can_stop_thinking="stop" not in no,
        sampling="sampling" not in no,
        forced_tools="force" not in no,
        prefill="prefill" not in no,
        inline_system="inline" not in no,
        schema="tool" if "schema" in no else "native",
    )


def _gemini_traits(traits: Traits, bare: str) -> Traits:
    version = re.match(r"gemini-(\d+)(?:-(\d+))?", bare)
    major, minor = (int(n or 0) for n in version.groups()) if version else (3, 0)
    if major >= 3:
        levels = _GEMINI_LEVELS[1:] if "pro" in bare else _GEMINI_LEVELS
        return traits._replace(thinking="level", efforts=levels)
    return traits._replace(
        thinking="budget" if (major, minor) >= (2, 5) else "",
        can_stop_thinking="pro" not in bare,
        call_ids=False,
        fetches_urls=False,
        schema="native" if (major, minor) >= (2, 5) else "legacy",
    )


def _openai_traits(traits: Traits, bare: str, protocol: ApiProtocol) -> Traits:
    reasons = _reasons(bare)
    efforts = next((levels for start, levels in _OPENAI_EFFORTS if re.match(start, bare)), ())
    new_name = traits.official or reasons
    return traits._replace(
        efforts=efforts if reasons else (),
        sampling=not (reasons and "gpt-oss" not in bare),
        stops=not (reasons and "gpt-oss" not in bare and protocol is ApiProtocol.CHAT_COMPLETIONS),
        max_tokens_field="max_completion_tokens" if new_name else "max_tokens",
    )


def _reasons(bare: str) -> bool:
    return bool(re.match(_REASONS, bare)) and "chat" not in bare


def can_reason(model: str) -> bool:
    """Whether a model of the catalogue is known to reason before it answers."""
    lab, _, bare = normal_id(model).partition("/")
    if lab == "anthropic":
        return any(thinking for start, thinking, _ in _CLAUDES if re.match(start, bare))
    if lab == "google":
        return re.match(r"gemini-(2-5|[3-9])", bare) is not None
    return _reasons(bare) if lab == "openai" else re.search(_REASONING_OF_OTHERS, bare) is not None


_REASONING_OF_OTHERS = (
    r"reason|think|deepseek-v[3-9]|glm-[4-9]|kimi-k[2-9]|qwen3|grok-[4-9]|minimax-m|mimo"
)


def may_prefer_responses(model: str) -> bool:
    """Whether it can be that a model is better asked on the Responses API."""
    bare = normal_id(model.rpartition("/")[2])
    return bool(_RESPONSES_ONLY.match(bare) or _reasons(bare))


def prefers_responses(model: str, asked_in: ApiProtocol, body: JsonObject) -> bool:
    """Whether OpenAI serves a request to a model on its Responses API alone, or better there.

    wire: platform.openai.com/docs/guides/migrate-to-responses, read 2026-11: newer models refuse
    function tools together with reasoning on Chat Completions, which also keeps no reasoning from
    one turn to the next: callers of other protocols can.
    """
    bare = normal_id(model.rpartition("/")[2])
    if _RESPONSES_ONLY.match(bare):
        return True
    if asked_in is not ApiProtocol.CHAT_COMPLETIONS:
        return _reasons(bare)
    reasons = body.get("reasoning_effort") != "none" or "astra" in bare
    return bool(body.get("tools") and reasons and _TOOLS_ON_RESPONSES.match(bare))


# ---------------------------------------------------------------------------------------------
# 19. config: bitrouter.toml and the environment -> Config (pure)
# ---------------------------------------------------------------------------------------------
# The dataclasses below are the schema: one reader walks them and a parsed file side by side, and
# reports everything that does not fit, each with its line. Adding a key is adding a field.


ECHO_MODEL = "echo/echo"  # the built-in model; nobody else may be called so


def _limited(
    default: T,
    *,
    low: float | None = None,
    high: float = 1e12,
    words: Iterable[str] = (),
    key: str = "",
) -> T:
    """A field with limits: a least and a greatest value, or the words that it may be (or, of a
    list, that its entries may be). key: its name in the file, where Python reserves it."""
    limits = {"low": low, "high": high, "words": tuple(words), "key": key}
    return field(default=default, metadata=limits)


def matches_glob(glob: str, model: str) -> bool:
    """Whether a model id is the one that a rule names, or begins as a rule with a * does."""
    return glob in ("*", model) or (glob.endswith("*") and model.startswith(glob[:-1]))


class ProtocolRules(NamedTuple):
    """Which protocols a provider speaks for which models: (glob, protocols), first match wins."""

    rules: tuple[tuple[str, tuple[ApiProtocol, ...]], ...] = ()

    def spoken(self, model: str) -> tuple[ApiProtocol, ...]:
        for glob, protocols in self.rules:
            if matches_glob(glob, model):
                return protocols
        return ()


_SPEAKS_AS_KNOWN = ProtocolRules()


class HeaderEdits(NamedTuple):
    """Header lines to add to a request, or put in place of others, and names to leave out."""

    put: Mapping[str, str] = {}
    drop: tuple[str, ...] = ()


_NO_HEADERS = HeaderEdits()


@dataclass(slots=True)
class BodyEdit:
    """One change of a request's body before it is sent. pointer: RFC 6901; a last part of `-`
    appends to a list."""

    pointer: str
    value: Json = None
    delete: bool = False


@dataclass(slots=True)
class RateLimit:
    """How much may be asked for in any 60 seconds."""

    requests_per_minute: int | None = _limited(None, low=1)
    tokens_per_minute: int | None = _limited(None, low=1)


class RateRules(NamedTuple):
    """Limits by model: (glob, limit); the first match counts."""

    rules: tuple[tuple[str, RateLimit], ...] = ()


_NO_LIMITS = RateRules()


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


@dataclass(slots=True, kw_only=True)
class Shaping:
    """What is made of a request on its way: fields that it gets where it lacks them (in Chat
    Completions' names, put where its own protocol has them), changes of the body that the provider
    gets, header lines, deadlines, retries."""

    params: dict[str, Json] = field(default_factory=dict)
    extra_body: tuple[BodyEdit, ...] = ()
    extra_headers: HeaderEdits = _NO_HEADERS
    timeouts: SomeTimeouts = field(default_factory=SomeTimeouts)
    retry: Retry | None = None


@dataclass(slots=True)
class Breaker:
    """So many failures in a row within a window, and the target is spared for a while."""

    failures: int = _limited(5, low=1)
    window_s: float = _limited(60.0, low=0.01)
    cooldown_s: float = _limited(30.0, low=0.01)


@dataclass(slots=True)
class Server:
    """workers: processes that share the port."""

    listen: str = "127.0.0.1:4356"
    workers: int = _limited(1, low=1, high=256)
    auth: str = _limited("auto", words=("auto", "none", "required"))
    base_path: str = ""
    max_body_mb: float = _limited(100.0, low=0.001)
    log_format: str = _limited("auto", words=("auto", "text", "json"))
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    health_listen: str = ""


@dataclass(slots=True)
class Upstream:
    """
    Attributes:
        fallback_backoff_ms: pauses before the second, third ... target; the last one repeats.
        hedge_after_ms: silence after which the next target is asked, too; the first to answer wins.
    """

    timeouts: Timeouts = field(default_factory=Timeouts)
    fallback_backoff_ms: tuple[float, ...] = _limited((), low=0)
    hedge_after_ms: float | None = _limited(None, low=1)
    retry: Retry = field(default_factory=Retry)
    breaker: Breaker = field(default_factory=Breaker)


@dataclass(slots=True)
class AccountConfig:
    api_key: Secret
    label: str = ""
    api_base: str = ""


@dataclass(slots=True)
class Rates:
    """US dollars per million tokens."""

    input: float | None = _limited(None, low=0)
    output: float | None = _limited(None, low=0)
    cache_read: float | None = _limited(None, low=0)
    cache_write: float | None = _limited(None, low=0)


@dataclass(slots=True)
class ContextTier(Rates):
    """The rates of prompts that are longer than so many tokens."""

    above_input_tokens: int = _limited(0, low=0)


@dataclass(slots=True)
class Pricing(Rates):
    context_tiers: tuple[ContextTier, ...] = ()


# What a model may be able to do, as `capabilities` names it.
CAPABILITIES = (
    "tools", "structured_outputs", "reasoning", "image_input", "audio_input", "video_input",
    "file_input", "image_output", "audio_output", "embeddings",
)  # fmt: skip


@dataclass(slots=True)
class ReasoningEffort:
    levels: tuple[str, ...] = _limited((), words=EFFORTS)
    default: str = _limited("", words=("", *EFFORTS))


@dataclass(slots=True)
class ChatCompatibility:
    token_limit_field: str = _limited("", words=("", "max_tokens", "max_completion_tokens"))
    supports_store: bool = True
    supports_stream_options: bool = True


@dataclass(slots=True)
class Compatibility:
    """How a server departs from the protocol that it speaks."""

    chat_completions: ChatCompatibility = field(default_factory=ChatCompatibility)


@dataclass(slots=True)
class DeclaredModel(Shaping):
    """A model that a provider of the file serves, under our name for it and its own.

    Attributes:
        capabilities: all that it can do; empty if nothing is said of it.
    """

    id: str
    provider_model_id: str = ""
    api_protocol: ProtocolRules = _SPEAKS_AS_KNOWN
    context: int = _limited(0, low=0)
    max_output: int = _limited(0, low=0)
    pricing: Pricing = field(default_factory=Pricing)
    capabilities: tuple[str, ...] = _limited((), words=CAPABILITIES)
    reasoning_effort: ReasoningEffort = field(default_factory=ReasoningEffort)
    rate_limits: RateLimit = field(default_factory=RateLimit)
    compatibility: Compatibility = field(default_factory=Compatibility)


# In what order providers of a kind are asked for a model, unless `provider_priority` or a
# provider's own `priority` says otherwise.
CLASSES = ("first-party-api", "third-party-api", "local", "gateway", "bitrouter-cloud")
# Used only where it is named: by the model id, by `only`, or as who declares the model.
_SUBSCRIPTION = "subscription"


@dataclass(slots=True)
class ProviderConfig(Shaping):
    """
    Attributes:
        derives: a provider whose protocols, models and prices this one shares, but not its key.
        protocol_endpoints: protocol -> the base where it is spoken, if it is another.
        priority: its rank among those who carry a model, 0 first.
        auth: how its key travels: `native` as each protocol's own vendor wants it, `bearer`.
        auto_discover: ask it at start what it serves.
        active: whether it is used at all.
    """

    api_base: str = ""
    api_key: Secret | None = None
    accounts: tuple[AccountConfig, ...] = ()
    account_strategy: str = _limited("failover", words=("failover", "balance"))
    api_protocol: ProtocolRules = _SPEAKS_AS_KNOWN
    protocol_endpoints: dict[str, str] = field(default_factory=dict)
    models: tuple[DeclaredModel, ...] = ()
    derives: str = ""
    tags: tuple[str, ...] = ()
    class_: str = _limited("", words=("", *CLASSES, _SUBSCRIPTION), key="class")
    priority: int | None = _limited(None, low=0)
    auth: str = _limited("", words=("", "native", "bearer"))
    rate_limits: RateRules = _NO_LIMITS
    compatibility: Compatibility = field(default_factory=Compatibility)
    auto_discover: bool = False
    active: bool = True


@dataclass(slots=True)
class Endpoint(Shaping):
    """
    Attributes:
        name: what TensorZero's clients call it, where they say so.
        weight: its share where the strategy is to balance.
    """

    provider: str
    service_id: str
    name: str = ""
    weight: float = _limited(1.0, low=0)
    rate_limits: RateLimit = field(default_factory=RateLimit)


@dataclass(slots=True)
class VirtualModel(Shaping):
    """A name over endpoints: in their order, by their weights, or ranked as for any model."""

    endpoints: tuple[Endpoint, ...]
    strategy: str = _limited("priority", words=("priority", "balance", "cascade"))
    pricing: Pricing = field(default_factory=Pricing)


SORTS = ("balanced", "cost", "latency", "throughput")
SORT_ALIASES = {
    "floor": "cost", "price": "cost", "nitro": "throughput", "fast": "latency",
}  # fmt: skip


@dataclass(slots=True)
class MaxPrice:
    """US dollars per million tokens."""

    input: float | None = _limited(None, low=0)
    output: float | None = _limited(None, low=0)


@dataclass(slots=True)
class Routing:
    """Whom to choose among those who can serve a model, as a request's `provider` says it."""

    sort: str = _limited("", words=("", *SORTS, *SORT_ALIASES))
    order: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    require_tags: tuple[str, ...] = ()
    allow_fallbacks: bool = True
    require_parameters: bool = False
    max_price: MaxPrice = field(default_factory=MaxPrice)


@dataclass(slots=True)
class Candidate:
    """One of several to draw from: a model or a preset, by weight."""

    model: str = ""
    preset: str = ""
    weight: float = _limited(1.0, low=0)


@dataclass(slots=True)
class Preset(Shaping):
    """Asked for as @NAME, @NAME/MODEL or @NAME:VARIANT.

    Attributes:
        output: json if TensorZero's own clients are to get the answer as JSON, too.
        structured: tool asks for answers that follow a schema by way of a tool that the model must
            call, whatever else its provider has.
        system_mode: fill gives the system prompt to requests that have none, prepend puts it
            before theirs, replace in its place.
        templates: text by role (system, user, assistant) or name, filled in with the arguments
            that requests send: see the section `templates`.
        fallbacks: models, or @presets, to go on with when all else has failed.
        candidates: one is drawn for each conversation, the others follow.
    """

    model: str = ""
    system_prompt: str = ""
    system_mode: str = _limited("fill", words=("fill", "prepend", "replace"))
    templates: dict[str, str] = field(default_factory=dict)
    structured: str = _limited("", words=("", "tool"))
    output: str = _limited("", words=("", "json"))
    routing: Routing = field(default_factory=Routing)
    fallbacks: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()


@dataclass(slots=True)
class Variant:
    routing: Routing = field(default_factory=Routing)


@dataclass(slots=True)
class KeyConfig:
    """A key that callers may use, when auth is on. Its name is what the log calls them."""

    key: Secret


@dataclass(slots=True)
class Config:
    """
    Attributes:
        provider_priority: classes of providers, in the order in which they are asked.
        inherit_defaults: whether providers whose key is in the environment are on unasked.
        broken: what cannot be used, as (section, name) -> why: a variable is not set, or a file
            cannot be read.
    """

    server: Server = field(default_factory=Server)
    upstream: Upstream = field(default_factory=Upstream)
    keys: dict[str, KeyConfig] = field(default_factory=dict)
    providers: dict[str, ProviderConfig] = field(default_factory=dict)
    models: dict[str, VirtualModel] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)
    provider_priority: tuple[str, ...] = _limited((), words=CLASSES)
    inherit_defaults: bool = True
    broken: dict[tuple[str, str], str] = field(default_factory=dict, metadata={"inner": True})


class Loaded(NamedTuple):
    """A configuration, and what should be said about it.

    Attributes:
        unset: variables that the file names and the environment lacks, and files that it names
            and that cannot be read, each with where.
        fatal: those of them without which nothing can be served.
        origins: where each value of the file stands, as `file:line`, by its dotted name.
        files: the files that it takes keys from.
    """

    config: Config
    problems: list[str]
    unset: list[str]
    fatal: list[str] = []  # noqa: RUF012  a NamedTuple's default, never changed
    origins: Mapping[str, str] = {}
    files: tuple[str, ...] = ()


_KeyPath: TypeAlias = tuple[str | int, ...]  # where in the file: ("providers", "openai", "api_key")


def parse_config(
    text: str,
    environ: Mapping[str, str],
    name: str = "bitrouter.toml",
    read_file: Callable[[str], str] | None = None,
) -> Loaded:
    """Read a configuration: TOML, or JSON if its name ends in .json. Never raises.

    Args:
        read_file: gives a key file's text, or raises OSError; None reads none.
    """
    try:
        raw = _parse_text(text, name)
    except (ValueError, RecursionError) as exc:
        return Loaded(Config(), [f"{name}: {exc}"], [])
    reader = _Reader(environ, read_file)
    config = reader.table(Config, raw, ())
    _check_references(config, reader)
    where = _Lines(text, name)
    fatal: list[tuple[_KeyPath, str]] = []
    for path, said in reader.unset:
        if path[0] in _SPARED and len(path) > 1:
            section = "accounts" if path[2:3] == ("accounts",) else str(path[0])
            config.broken.setdefault((section, str(path[1])), said)
        else:
            fatal.append((path, said))

    def shown(found: list[tuple[_KeyPath, str]]) -> list[str]:
        return [f"{where.of(path)}: {_dotted(path)}: {said}" for path, said in found]

    problems = shown(reader.found)
    if not problems:
        _forget_broken(config, reader)
    origins = _Lazily(lambda: _Origins(where, raw))
    return Loaded(config, problems, shown(reader.unset), shown(fatal), origins, reader.files)


# Sections of which one entry may be out of order while the rest serves.
_SPARED = ("providers", "models", "presets", "variants", "keys")


def _forget_broken(config: Config, reader: _Reader) -> None:
    """Keys that callers were to use and that are not there are nobody's."""
    for path, _ in reader.unset:
        if path[0] == "keys":
            config.keys.pop(str(path[1]), None)


class _Lazily(Mapping[str, str]):
    """A mapping that is made when it is first looked at."""

    def __init__(self, make: Callable[[], Mapping[str, str]]) -> None:
        self._make = functools.cache(make)

    def __getitem__(self, name: str) -> str:
        return self._make()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._make())

    def __len__(self) -> int:
        return len(self._make())


class _Origins(Mapping[str, str]):
    """Where each value of a file stands: looked up when somebody asks."""

    def __init__(self, where: _Lines, raw: JsonObject) -> None:
        self._where = where
        self._paths = dict(_leaves(raw, ()))
        self._named = {_dotted(path): path for path in self._paths}

    def __getitem__(self, name: str) -> str:
        path = self._named[name]
        value = self._paths[path]
        text = json.dumps(value, default=str) if isinstance(value, str | list) else ""
        from_where = dict.fromkeys(re.findall(r"(?<!\$)\$\{(\w+)", text))
        return ", from ".join([self._where.of(path), *from_where])

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


def _leaves(value: Json, path: _KeyPath) -> Iterator[tuple[_KeyPath, Json]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, one in inner:
        here = (*path, name)
        if isinstance(one, dict | list):
            yield from _leaves(one, here)
        yield here, one


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

    def __init__(
        self, environ: Mapping[str, str], read_file: Callable[[str], str] | None = None
    ) -> None:
        self.found: list[tuple[_KeyPath, str]] = []
        self.unset: list[tuple[_KeyPath, str]] = []
        self.files: tuple[str, ...] = ()
        self._environ = environ
        self._read_file = read_file

    def table(self, kind: Callable[..., T], raw: Json, path: _KeyPath) -> T:
        """A dataclass from a table; fields that are wrong keep their defaults."""
        specs = _specs(kind)
        values: dict[str, Any] = {}
        if not isinstance(raw, dict):
            self._mismatch(path, "a table", raw)
            raw = {}
        for name, value in raw.items():
            spec = specs.get(name)
            if spec is None:
                self.problem((*path, name), f"unknown key; {_near(name, specs)}")
                continue
            at = (*path, name)
            given = self.value(spec.kind, value, at)
            if given is not None:
                if spec.limits:
                    self._limits(spec.limits, given, at)
                values[spec.field] = given
        for name, spec in specs.items():
            if spec.required and spec.field not in values:
                if name not in raw:
                    self.problem((*path, name), "this key is required")
                values[spec.field] = _EMPTY.get(spec.kind, "")
        return kind(**values)

    def value(self, kind: Any, raw: Json, path: _KeyPath) -> Any:
        """A value of a field's type, or None after noting what is wrong."""
        from typing import get_args, get_origin

        if kind in _PLAIN_NAMES:
            return self._plain(kind, raw, path)
        options = [option for option in get_args(kind) if option is not type(None)]
        if get_origin(kind) in (tuple, dict):
            return self._several(get_origin(kind), options, raw, path)
        if options:  # `X | None`: TOML has no null
            kind = options[0]
        if kind in _READERS:
            return _READERS[kind](self, raw, path)
        if is_dataclass(kind):
            return self.table(kind, raw, path)  # type: ignore[arg-type]  # it is a type
        return self._plain(kind, raw, path)

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
        if wanted is str and "${" in raw:
            raw = self._substituted(raw, path)
        if kind is Secret:
            return Secret(self._from_file(raw, path))
        return raw

    def _from_file(self, text: str, path: _KeyPath) -> str:
        """A secret that is given as file:PATH."""
        if not text.startswith("file:"):
            return text
        place = text.removeprefix("file:")
        self.files = (*self.files, place)
        if self._read_file is None:
            return ""
        try:
            return self._read_file(place).strip()
        except (OSError, UnicodeDecodeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            self.unset.append((path, f"the file {printable(place)} cannot be read: {why}"))
            return ""

    def anything(self, raw: Json, path: _KeyPath) -> Json:
        """JSON of any form, with the variables in its strings put in."""
        if isinstance(raw, str):
            return self._substituted(raw, path) if "${" in raw else raw
        if isinstance(raw, list):
            return [self.anything(one, (*path, i)) for i, one in enumerate(raw)]
        if isinstance(raw, dict):
            return {key: self.anything(one, (*path, key)) for key, one in raw.items()}
        if isinstance(raw, bool | int) or (isinstance(raw, float) and abs(raw) < float("inf")):
            return raw
        self.problem(path, "expected JSON, which has no such value")  # a date, infinity
        return None

    def header_edits(self, raw: Json, path: _KeyPath) -> HeaderEdits:
        """A table of headers, or a list of {name, value} and {name, delete}."""
        put: dict[str, str] = {}
        drop: list[str] = []
        entries: list[tuple[_KeyPath, Json, Json]]
        if isinstance(raw, dict):
            entries = [((*path, name), name, value) for name, value in raw.items()]
        elif isinstance(raw, list):
            entries = []
            for i, one in enumerate(raw):
                facts, at = as_object(one), (*path, i)
                for key in {*facts} - {"name", "value", "delete"}:
                    self.problem((*at, key), "unknown key; allowed here: name, value, delete")
                name, value = facts.get("name"), facts.get("value")
                if not isinstance(name, str) or (value is None) is not (
                    facts.get("delete") is True
                ):
                    self.problem(at, "expected {name, value} or {name, delete = true}")
                else:
                    entries.append((at, name, value))
        else:
            self._mismatch(path, "a table or a list", raw)
            entries = []
        for at, name, value in entries:
            if value is None:
                drop.append(name.lower())
            elif (text := self._plain(str, value, at)) is not None:
                put[name] = text
            self._check_header(at, name, put.get(name, ""))
        return HeaderEdits(put, tuple(drop))

    def _check_header(self, path: _KeyPath, name: str, value: str) -> None:
        if not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) or not is_header_text(value):
            self.problem(path, "not fit for an HTTP header")
        elif name.lower() in OUR_HEADERS:
            self.problem(path, "this header is not yours to set")

    def rate_rules(self, raw: Json, path: _KeyPath) -> RateRules:
        """A table of globs, or a list of tables with one glob each."""
        rules: list[tuple[str, RateLimit]] = []
        tables = raw if isinstance(raw, list) else [raw]
        for table in tables:
            if not isinstance(table, dict):
                self._mismatch(path, "a table of model globs", table)
                continue
            for glob, limit in table.items():
                rules.append((glob, self.table(RateLimit, limit, (*path, glob))))
        # the longest glob wins, as the most particular one
        return RateRules(tuple(sorted(rules, key=lambda rule: ("*" in rule[0], -len(rule[0])))))

    def protocols(self, raw: Json, path: _KeyPath) -> ProtocolRules:
        table = raw if isinstance(raw, dict) else {"*": raw}
        if isinstance(raw, list) and raw and all(isinstance(one, dict) for one in raw):
            # as the original spells it: a list of tables with one glob each
            table = {glob: names for one in raw for glob, names in one.items()}
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
        low, high, words = limits.get("low"), limits.get("high", 1e12), limits.get("words")
        for one in value if isinstance(value, tuple) else (value,):
            if low is not None and not low <= one <= high:
                bound = f"{high:g} or less" if high < one < 1e12 else f"{low:g} or more"
                self.problem(path, f"expected {bound}, got {show_json(one)}")
            if words and one not in words:
                got = "something else" if path[-1] == "auth" else show_json(one)
                said = f"expected one of {', '.join(filter(None, words))}, got {got}"
                near = near_misses(one, words, 1) if isinstance(one, str) else []
                self.problem(path, f"{said}; did you mean {near[0]}?" if near else said)

    def _substituted(self, text: str, path: _KeyPath) -> str:
        expanded, missing = expand(text, self._environ)
        for name in missing:
            said = f"the environment variable {name} is not set"
            self.unset.append((path, said))
        return expanded

    def problem(self, path: _KeyPath, said: str) -> None:
        if not self.is_unset(path):  # nothing can be said of what is not there
            self.found.append((path, said))

    def is_unset(self, path: _KeyPath) -> bool:
        return any(path == where for where, _ in self.unset)

    def _mismatch(self, path: _KeyPath, wanted: str, raw: Json) -> None:
        # Below these two, a value in the wrong place may well be a key.
        secret = path[:1] in (("providers",), ("keys",)) or "extra_headers" in path
        # No key is a number where none of text is wanted.
        harmless = isinstance(raw, int | float) and "string" not in wanted
        hidden = secret and not (harmless and "extra_headers" not in path)
        shown = _JSON_KINDS.get(type(raw), "another value") if hidden else show_json(raw)
        self.problem(path, f"expected {wanted}, got {shown}")


_JSON_KINDS: dict[type, str] = {
    str: "a string", list: "a list", dict: "a table", int: "a number", float: "a number",
    bool: "true or false",
}  # fmt: skip
_EMPTY = {Secret: Secret(""), str: "", tuple[Endpoint, ...]: ()}
_READERS: dict[Any, Callable[[_Reader, Json, _KeyPath], Any]] = {
    ProtocolRules: _Reader.protocols,
    HeaderEdits: _Reader.header_edits,
    RateRules: _Reader.rate_rules,
    Any: _Reader.anything,
}
_PLAIN_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}

PROTOCOL_NAMES = {
    **{str(protocol): protocol for protocol in ApiProtocol},
    "openai": ApiProtocol.CHAT_COMPLETIONS,
    "anthropic": ApiProtocol.MESSAGES,
    "google": ApiProtocol.GENERATE_CONTENT,
}


class _Spec(NamedTuple):
    """A key of a table: the field that holds it, its type, its limits."""

    field: str
    kind: Any
    limits: Mapping[str, Any]
    required: bool


@functools.cache
def _specs(kind: Any) -> dict[str, _Spec]:
    """The keys that a table of a kind may have."""
    from typing import get_type_hints

    hints = get_type_hints(kind)
    return {
        spec.metadata.get("key") or spec.name: _Spec(
            spec.name,
            hints[spec.name],
            spec.metadata,
            spec.default is MISSING and spec.default_factory is MISSING,
        )
        for spec in fields(kind)
        if not spec.metadata.get("inner")
    }


def config_schema() -> JsonObject:
    """A JSON Schema (draft 2020-12) of the configuration, for editors."""
    definitions: dict[str, JsonObject] = {}
    schema = _schema_of_table(Config, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bitrouter",
        **schema,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema_of_table(kind: Any, definitions: dict[str, JsonObject]) -> JsonObject:
    specs = _specs(kind)
    schema: JsonObject = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: _schema_of(spec.kind, spec.limits, definitions) for name, spec in specs.items()
        },
    }
    if required := [name for name, spec in specs.items() if spec.required]:
        schema["required"] = required
    said = (kind.__doc__ or "").split("Attributes:")[0].strip()
    if said and not said.startswith(kind.__name__ + "("):  # what dataclasses write of themselves
        schema["description"] = " ".join(said.split())
    return schema


def _schema_of(
    kind: Any, limits: Mapping[str, Any], definitions: dict[str, JsonObject]
) -> JsonObject:
    from typing import get_args, get_origin

    options = [option for option in get_args(kind) if option is not type(None)]
    origin = get_origin(kind)
    if origin is tuple:
        return {"type": "array", "items": _schema_of(options[0], limits, definitions)}
    if origin is dict:
        inner = _schema_of(options[1], {}, definitions)
        return {"type": "object", "additionalProperties": inner}
    kind = options[0] if options else kind
    if kind in _SCHEMAS:
        return dict(_SCHEMAS[kind])
    if is_dataclass(kind):
        name = str(getattr(kind, "__name__", kind))
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = _schema_of_table(kind, definitions)
        return {"$ref": f"#/$defs/{name}"}
    schema: JsonObject = {"type": _JSON_NAMES[kind]}
    if words := limits.get("words"):
        return {"anyOf": [{"enum": list(words)}, _SCHEMA_OF_A_VARIABLE]}
    if limits.get("low") is not None:
        schema["minimum"] = limits["low"]
    if limits.get("high", 1e12) < 1e12:
        schema["maximum"] = limits["high"]
    return schema


_SCHEMA_OF_A_VARIABLE: JsonObject = {"type": "string", "pattern": r"\$\{"}
_JSON_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_PROTOCOL_SCHEMA: JsonObject = {"enum": list(PROTOCOL_NAMES)}
_PROTOCOLS_SCHEMA: JsonObject = {
    "anyOf": [_PROTOCOL_SCHEMA, {"type": "array", "items": _PROTOCOL_SCHEMA}]
}
_RATE_SCHEMA: JsonObject = {
    "type": "object", "additionalProperties": {"$ref": "#/$defs/RateLimit"},
}  # fmt: skip
_SCHEMAS: dict[Any, JsonObject] = {
    Secret: {"type": "string", "description": "a key, ${VARIABLE}, file:PATH or request:HEADER"},
    Any: {},
    ProtocolRules: {
        "anyOf": [
            *_PROTOCOLS_SCHEMA["anyOf"],
            {"type": "object", "additionalProperties": _PROTOCOLS_SCHEMA},
            {
                "type": "array",
                "items": {"type": "object", "additionalProperties": _PROTOCOLS_SCHEMA},
            },
        ]
    },
    HeaderEdits: {
        "anyOf": [
            {"type": "object", "additionalProperties": {"type": "string"}},
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "value": {"type": "string"},
                        "delete": {"const": True},
                    },
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
        ]
    },
    RateRules: {"anyOf": [_RATE_SCHEMA, {"type": "array", "items": _RATE_SCHEMA}]},
}


class Setting(NamedTuple):
    """One value of a configuration, to look at. origin: `file:line`, or `default`."""

    key: str
    value: Json
    origin: str


def settings_of(loaded: Loaded) -> Iterator[Setting]:
    """Every value that is in force, without secrets."""
    yield from _settings(loaded.config, "", loaded.origins)


def _settings(
    value: Any, at: str, origins: Mapping[str, str], above: str = "default"
) -> Iterator[Setting]:
    """above: the origin of what the file does not spell as we keep it."""
    if isinstance(value, HeaderEdits | ProtocolRules | RateRules):
        above = origins.get(at, above)
    if isinstance(value, HeaderEdits):
        value = {**dict.fromkeys(value.put, "[redacted]"), **dict.fromkeys(value.drop)}
    elif isinstance(value, ProtocolRules | RateRules):
        value = dict(value.rules)
    if is_dataclass(value) and not isinstance(value, type):
        for name, spec in _specs(type(value)).items():
            inner = f"{at}.{name}".lstrip(".")
            yield from _settings(getattr(value, spec.field), inner, origins)
    elif isinstance(value, dict) and value:
        for name, one in value.items():
            yield from _settings(one, f"{at}.{name}".lstrip("."), origins, above)
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        for i, one in enumerate(value):
            yield from _settings(one, f"{at}[{i}]", origins, above)
    else:
        shown = "[redacted]" if isinstance(value, Secret) and value else value
        shown = list(shown) if isinstance(shown, tuple) else None if shown == {} else shown
        if isinstance(shown, Secret):
            shown = "(not set)"
        origin = origins.get(at, above)
        secretive = isinstance(value, Secret) or not _MAY_HOLD_KEYS.isdisjoint(
            re.split(r"[.\[]", at)
        )
        if ", from " in origin and secretive:
            shown = f"[from {origin.partition(', from ')[2]}]"
        yield Setting(at, shown, origin)


# Where people put keys that are no Secret of ours: in addresses and in what is sent as it is.
_MAY_HOLD_KEYS = frozenset(
    {"api_base", "protocol_endpoints", "params", "extra_body", "extra_headers"}
    | {"system_prompt", "templates", "proxy"}
)


def expand(text: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Put variables in place of ${VAR} and ${VAR:-default}; also say which are not set. $${ is
    how ${ itself is written."""
    missing: list[str] = []

    def value(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        if name is None:
            return "${"
        if environ.get(name):
            return environ[name]
        if default is None:
            missing.append(name)
        return default or ""

    pattern = r"\$\$\{|\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}"
    return re.sub(pattern, value, text), missing


def _near(name: str, known: Iterable[str]) -> str:
    near = near_misses(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(known)}"


def _dotted(path: _KeyPath) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


class _Lines:
    """Where things stand in a file: tomllib does not say, so this looks for itself."""

    def __init__(self, text: str, name: str) -> None:
        self._text, self._lines, self._name = text, text.split("\n"), name

    def of(self, path: _KeyPath) -> str:
        """`file:line` of a key, of the nearest thing around it, or of the file."""
        at = self._json(path) if self._name.endswith(".json") else self._toml(path)
        return f"{self._name}:{at}" if at else self._name

    def _toml(self, path: _KeyPath) -> int:
        for length in range(len(path), 0, -1):
            if number := self._places.get(path[:length]):
                rest = path[length:]
                return self._entry(rest[0], number) if rest and isinstance(rest[0], int) else number
        return 0

    @functools.cached_property
    def _places(self) -> dict[_KeyPath, int]:
        """The line of every table and key; of a table that is not named itself, the first in it."""
        places: dict[_KeyPath, int] = {}
        entries: dict[_KeyPath, int] = {}  # of the lists in `[[...]]`: the newest's index
        table: _KeyPath = ()
        quotes = ""  # what ends the text of several lines that this line stands in
        for number, line in enumerate(self._lines, 1):
            if quotes:
                quotes = "" if quotes in line else quotes
                continue
            if header := re.match(r"\s*(\[\[?)\s*(.+?)\s*\]\]?\s*(#.*)?$", line):
                table = _table_at(_split_key(header[2]), entries, header[1] == "[[")
                here = table
            elif key := re.match(rf"\s*({_TOML_KEY}(?:\s*\.\s*{_TOML_KEY})*)\s*=", line):
                here = (*table, *_split_key(key[1]))
                quotes = next((q for q in ('"""', "'''") if line.count(q) % 2), "")
            else:
                continue
            for length in range(len(here), 0, -1):
                places.setdefault(here[:length], number)
        return places

    def _entry(self, index: int, start: int) -> int:
        """The line of the i-th entry of a list that begins at a line, if its entries are in
        braces; otherwise that of the list."""
        seen, depth = -1, 0
        for number in range(start, len(self._lines) + 1):
            line = re.sub(r"\$\{[^}]*\}", "", self._lines[number - 1])
            if number > start and not depth and re.match(rf"\s*(\[|{_TOML_KEY}\s*=)", line):
                break
            for sign in re.findall(r"[{}]", line):
                seen += sign == "{" and depth == 0
                depth += 1 if sign == "{" else -1
                if seen >= index:
                    return number
        return start

    def _json(self, path: _KeyPath) -> int:
        at = 0
        for name in path:
            if isinstance(name, str):
                at = max(self._text.find(json.dumps(name), at), at)
        return self._text.count("\n", 0, at) + 1 if at else 0


def _table_at(names: list[str], entries: dict[_KeyPath, int], begins: bool) -> _KeyPath:
    """The path that a header opens. begins: whether it adds an entry to a list of tables."""
    path: _KeyPath = ()
    for n, name in enumerate(names, 1):
        path = (*path, name)
        if begins and n == len(names):
            entries[path] = entries.get(path, -1) + 1
        if path in entries:
            path = (*path, entries[path])
    return path


_TOML_KEY = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""


def _split_key(text: str) -> list[str]:
    parts = re.findall(_TOML_KEY, text)
    return [part.strip("\"'") for part in parts]


# What the reader cannot see in one value: names that must exist, addresses that must make sense.


def _check_references(config: Config, reader: _Reader) -> None:
    for ident, provider in config.providers.items():
        _check_provider(ident, provider, config, reader)
    names: dict[str, str] = {}
    for ident in config.providers:
        other = names.setdefault(provider_id(ident), ident)
        if other != ident or ident == "echo":
            said = f"is the same provider as {other}" if other != ident else "is built in"
            reader.problem(("providers", ident), f"{ident} {said}")
    checker = _Checker(config, reader)
    for name, model in config.models.items():
        checker.model(name, model)
    for name, preset in config.presets.items():
        checker.preset(name, preset)
    for name, variant in config.variants.items():
        checker.variant(name, variant)
    if len(set(config.provider_priority)) != len(config.provider_priority):
        reader.problem(("provider_priority",), "a class stands in it twice")
    _check_server(config.server, reader)


_SLIP = 0.85  # how alike a provider's name and another word are if the word is meant to be it
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


class _Checker:
    """Names that stand for something else must lead somewhere."""

    def __init__(self, config: Config, reader: _Reader) -> None:
        self._config = config
        self._problem = reader.problem
        self._told = {path[:2] for path, _ in reader.found}
        self._providers = {*config.providers, *PROVIDERS, *ALIASES, "echo"}
        self._declared = {one.id for p in config.providers.values() for one in p.models}

    def model(self, name: str, model: VirtualModel) -> None:
        at: _KeyPath = ("models", name)
        if name == ECHO_MODEL:
            self._problem(at, "this model is built in")
        if name.startswith("@") or not name.strip():
            self._problem(at, "no request could ask for it: names with @ are presets")
        if not model.endpoints and at not in self._told:
            self._problem((*at, "endpoints"), "expected at least one")
        for i, endpoint in enumerate(model.endpoints):
            here = (*at, "endpoints", i)
            if endpoint.provider:
                self._provider(endpoint.provider, (*here, "provider"))
            self._shaping(endpoint, here)
            if not endpoint.service_id and at not in self._told:
                self._problem((*here, "service_id"), "expected the model's name at the provider")
        if model.endpoints and not any(endpoint.weight for endpoint in model.endpoints):
            self._problem((*at, "endpoints"), "expected a weight above 0 for one of them")
        self._shaping(model, at)

    def preset(self, name: str, preset: Preset) -> None:
        at: _KeyPath = ("presets", name)
        if not _NAME.fullmatch(name):
            self._problem(at, "expected a name of letters, digits, `.`, `_`, `+` and `-`")
        if preset.model:
            self._model_id(preset.model, (*at, "model"))
        for i, model in enumerate(preset.fallbacks):
            if model.startswith("@"):
                self._inner_preset(name, model[1:], (*at, "fallbacks", i))
            else:
                self._model_id(model, (*at, "fallbacks", i))
        if not preset.system_prompt and preset.system_mode != "fill":
            self._problem((*at, "system_mode"), "says nothing without a system_prompt")
        if preset.candidates and preset.model:
            self._problem((*at, "candidates"), "give model or candidates, not both")
        for i, candidate in enumerate(preset.candidates):
            self._candidate(name, candidate, (*at, "candidates", i))
        if preset.candidates and not any(candidate.weight for candidate in preset.candidates):
            self._problem((*at, "candidates"), "expected a weight above 0 for one of them")
        self._routing(preset.routing, (*at, "routing"))
        self._shaping(preset, at)

    def variant(self, name: str, variant: Variant) -> None:
        at: _KeyPath = ("variants", name)
        if name in SORTS or name in SORT_ALIASES:
            self._problem(at, "this variant is built in")
        elif not _NAME.fullmatch(name):
            self._problem(at, "expected a name of letters, digits, `.`, `_`, `+` and `-`")
        self._routing(variant.routing, (*at, "routing"))

    def _candidate(self, name: str, candidate: Candidate, at: _KeyPath) -> None:
        if bool(candidate.model) is bool(candidate.preset):
            self._problem(at, "expected model or preset, one of them")
        elif candidate.model:
            self._model_id(candidate.model, (*at, "model"))
        else:
            self._inner_preset(name, candidate.preset, (*at, "preset"))

    def _inner_preset(self, name: str, inner: str, at: _KeyPath) -> None:
        other = self._config.presets.get(inner)
        if other is None:
            near = near_misses(inner, self._config.presets, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self._problem(at, f"there is no preset {show_json(inner)}{hint}")
        elif inner == name or not other.model:
            self._problem(at, "expected another preset that has a model")

    def _model_id(self, model: str, at: _KeyPath) -> None:
        """Whether a model id may lead somewhere: any provider may serve what we do not know."""
        if self._is_known(model):
            return
        base = model
        place, separator, _ = split_place(model)
        if separator == ":" and place not in self._providers:
            base = model.rpartition(":")[0]
        place, separator, _ = split_place(base)
        if base.startswith("@"):
            self._problem(at, "expected a model, not a preset")
            return
        if self._is_known(base):
            return
        if separator:
            near = near_misses(place, self._providers, 1, _SLIP)
            if separator == ":" or (near and place not in self._providers):
                self._provider(place, at)
            return
        near = near_misses(base, [*self._config.models, *self._declared, *catalogue()], 1)
        hint = f"did you mean {near[0]}?" if near else "`bitrouter models --all` lists them"
        self._problem(at, f"nobody serves a model {show_json(base)}; {hint}")

    def _is_known(self, model: str) -> bool:
        ours = model in self._config.models or model in self._declared or model == ECHO_MODEL
        family = family_of(model.lower().removeprefix("ft:"))
        return ours or bool(find_model(model) or family)

    def _provider(self, name: str, at: _KeyPath) -> None:
        if name not in self._providers:
            near = near_misses(name, self._providers, 1)
            hint = f"did you mean {near[0]}?" if near else "`bitrouter providers` lists them"
            self._problem(at, f"there is no provider {name!r}; {hint}")

    def _routing(self, routing: Routing, at: _KeyPath) -> None:
        for key in ("order", "only", "ignore"):
            for i, name in enumerate(getattr(routing, key)):
                self._provider(name, (*at, key, i))
        only = {provider_id(name) for name in routing.only}
        if only and only <= {provider_id(name) for name in routing.ignore}:
            self._problem((*at, "ignore"), "nobody is left of `only`")
        tags = {tag for p in self._config.providers.values() for tag in p.tags}
        for i, tag in enumerate(routing.require_tags):
            if tag not in tags:
                self._problem((*at, "require_tags", i), f"no provider has the tag {show_json(tag)}")

    def _shaping(self, shaping: Shaping, at: _KeyPath) -> None:
        _check_edits(shaping.extra_body, at, self._problem)
        _check_params(shaping.params, at, self._problem)


# What only the request itself can say.
_NOT_PARAMS = {
    "model", "messages", "input", "contents", "system", "instructions", "stream", "stream_options",
    "models", "provider", "preset", "previous_response_id",
}  # fmt: skip


def _check_params(
    params: JsonObject, at: _KeyPath, problem: Callable[[_KeyPath, str], None]
) -> None:
    for name in sorted(_NOT_PARAMS & set(params)):
        problem((*at, "params", name), "only the request itself can say this")
    known = {name: value for name, value in params.items() if name not in _NOT_PARAMS}
    if known:
        least = {"model": "m", "messages": [{"role": "user", "content": "."}]}
        try:
            CHAT.parse_request({**least, **known})
        except BadRequest as error:
            problem((*at, "params"), error.message)


def _check_edits(
    edits: tuple[BodyEdit, ...], at: _KeyPath, problem: Callable[[_KeyPath, str], None]
) -> None:
    for i, edit in enumerate(edits):
        here = (*at, "extra_body", i)
        if not re.fullmatch(r"(/([^~/]|~[01])*)+", edit.pointer):
            said = f"expected a JSON pointer such as /a/b, got {show_json(edit.pointer)}"
            problem((*here, "pointer"), said)
        if edit.delete is (edit.value is not None):
            problem(here, "expected a value, or delete = true")


def _check_provider(ident: str, provider: ProviderConfig, config: Config, reader: _Reader) -> None:
    at: _KeyPath = ("providers", ident)
    if not re.fullmatch(r"[\w.-]+", ident):
        reader.problem(at, "expected an id of letters, digits, `.`, `_` and `-`")
    if provider.derives:
        _check_derives(ident, provider.derives, config, reader)
    elif not (provider_id(ident) in PROVIDERS or provider.api_base) and not reader.is_unset(
        (*at, "api_base")
    ):
        near = near_misses(ident, [*PROVIDERS, *ALIASES], 1)
        hint = f"did you mean {near[0]}?" if near else "one of your own needs an api_base"
        reader.problem(at, f"this provider is not known; {hint}")
    if provider.api_key and provider.accounts:
        reader.problem(at, "give api_key or accounts, not both")
    _check_bases(at, provider, reader)
    labels = [_label(account, i) for i, account in enumerate(provider.accounts, 1)]
    for label in {label for label in labels if labels.count(label) > 1}:
        where = (*at, "accounts")
        reader.problem(where, f"two accounts are labelled {show_json(label)}")
    _check_declared(at, provider, reader)
    _check_edits(provider.extra_body, at, reader.problem)
    _check_params(provider.params, at, reader.problem)
    keys = [provider.api_key, *(account.api_key for account in provider.accounts)]
    if not all(is_header_text(key.reveal()) for key in keys if key):
        reader.problem(at, "a key holds a character that no header may hold")
    for key in keys:
        name = header_of(key) if key else None
        if name is not None and (
            not re.fullmatch(r"[!#$%&'*+.^_`|~0-9a-z-]+", name)
            or name in {*OUR_HEADERS, "authorization"}
        ):
            reader.problem(at, f"request:{name} is no header that a key could come in")


def _check_bases(at: _KeyPath, provider: ProviderConfig, reader: _Reader) -> None:
    bases: list[tuple[_KeyPath, str]] = [((*at, "api_base"), provider.api_base)]
    for i, account in enumerate(provider.accounts):
        bases.append(((*at, "accounts", i, "api_base"), account.api_base))
    for name, base in provider.protocol_endpoints.items():
        bases.append(((*at, "protocol_endpoints", name), base))
        if name not in PROTOCOL_NAMES:
            said = f"expected one of {', '.join(ApiProtocol)}, got {show_json(name)}"
            reader.problem((*at, "protocol_endpoints", name), said)
    for where, base in bases:
        if base and (wrong := base_problem(base)):
            reader.problem(where, wrong)


def _check_declared(at: _KeyPath, provider: ProviderConfig, reader: _Reader) -> None:
    ids = Counter(model.id for model in provider.models)
    for i, model in enumerate(provider.models):
        here = (*at, "models", i)
        if ids[model.id] > 1:
            said = f"{show_json(model.id)} is declared {ids[model.id]} times"
            reader.problem((*here, "id"), said)
            ids[model.id] = 1
        if model.extra_body or model.params:
            _check_edits(model.extra_body, here, reader.problem)
            _check_params(model.params, here, reader.problem)
        if model.id.startswith("@") or model.id != model.id.strip():
            reader.problem((*here, "id"), "no request could ask for it by this name")
        levels = model.reasoning_effort
        if levels.default and levels.levels and levels.default not in levels.levels:
            said = f"expected one of levels, got {show_json(levels.default)}"
            reader.problem((*here, "reasoning_effort", "default"), said)


def _check_derives(ident: str, base: str, config: Config, reader: _Reader) -> None:
    at = ("providers", ident, "derives")
    seen = [ident]
    while base:
        if base in seen:
            reader.problem(at, f"goes round in a circle: {' -> '.join([*seen, base])}")
            return
        seen.append(base)
        given = config.providers.get(base)
        if given is None and provider_id(base) not in PROVIDERS:
            near = near_misses(base, [*config.providers, *PROVIDERS, *ALIASES], 1)
            hint = f"did you mean {near[0]}?" if near else "`bitrouter providers` lists them"
            reader.problem(at, f"there is no provider {base!r}; {hint}")
            return
        base = given.derives if given else ""


OUR_HEADERS = {
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


def split_place(model: str) -> tuple[str, str, str]:
    """`provider/model` or `provider:model`, at whichever comes first."""
    found = re.match(r"([^/:]+)([/:])(.+)", model, re.DOTALL)
    return (found[1], found[2], found[3]) if found else (model, "", "")


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
        given: what the file says of it.
    """

    facts: Provider
    accounts: tuple[Account, ...]
    enabled_by: str
    balanced: bool = False
    models: tuple[DeclaredModel, ...] = ()
    rules: ProtocolRules = _SPEAKS_AS_KNOWN
    timeouts: Timeouts = Timeouts()
    found: bool = False
    given: ProviderConfig = ProviderConfig()

    @property
    def like(self) -> str:
        """The provider of the registry whose models and ways it shares."""
        return self.facts.like or self.facts.id


def active_providers(
    config: Config, environ: Mapping[str, str]
) -> tuple[dict[str, ActiveProvider], list[str]]:
    """Who can be used, and warnings about who cannot although it looks wanted."""
    active: dict[str, ActiveProvider] = {}
    warnings: list[str] = []
    own = {provider_id(ident): provider for ident, provider in config.providers.items()}
    broken, lacking = (
        {provider_id(name): why for (kind, name), why in config.broken.items() if kind == section}
        for section in ("providers", "accounts")
    )
    known = PROVIDERS if config.inherit_defaults else [i for i in PROVIDERS if i in own]
    for ident in (*known, *(ident for ident in own if ident not in PROVIDERS)):
        given = own.get(ident)
        if given and not given.active:
            continue
        facts = PROVIDERS.get(ident) or _unknown_provider(ident, own)
        if ident in broken:  # with a part of it missing, its key might go to the wrong place
            warnings.append(f"{ident} is off: {broken[ident]}")
            continue
        found = _activate(facts, _with_what_it_derives(given, own), config, environ, warnings)
        if found and given:
            found = found._replace(given=given)
        if found is None and ident in lacking:
            warnings.append(f"{ident} is off: {lacking[ident]}")
        if found:
            active[ident] = found
    return active, warnings


def _with_what_it_derives(
    given: ProviderConfig | None, own: Mapping[str, ProviderConfig]
) -> ProviderConfig | None:
    """A provider of the file with the models and the protocols of the one that it derives from,
    where it has none of its own."""
    above = given
    for _ in own:
        above = own.get(provider_id(above.derives)) if above and above.derives else None
        if given is None or above is None:
            break
        given = replace(
            given,
            models=given.models or above.models,
            api_protocol=given.api_protocol if given.api_protocol.rules else above.api_protocol,
        )
    return given


def _unknown_provider(ident: str, own: Mapping[str, ProviderConfig]) -> Provider:
    """A provider that only the file knows: it speaks what the file says, or Chat Completions; one
    that derives from another speaks what that one speaks."""
    given = own[ident]
    env = (ident.upper().replace("-", "_") + "_API_KEY",)
    if given.derives:
        base = provider_id(given.derives)
        above = PROVIDERS.get(base) or _unknown_provider(base, own)
        # A base of its own in the file is ours to move; a key is never shared.
        return above._replace(id=ident, like=above.like or above.id, env=env)
    spoken = {p for _, protocols in given.api_protocol.rules for p in protocols}
    spoken |= {PROTOCOL_NAMES[name] for name in given.protocol_endpoints if name in PROTOCOL_NAMES}
    for model in given.models:
        spoken |= {p for _, protocols in model.api_protocol.rules for p in protocols}
    ordered = [p for p in ApiProtocol if p in spoken] or [_protocol_of_host(given.api_base)]
    return Provider(ident, dict.fromkeys(ordered, given.api_base), env)


def _protocol_of_host(base: str) -> ApiProtocol:
    host = urlsplit(base).hostname or ""
    if host.endswith("anthropic.com"):
        return ApiProtocol.MESSAGES
    google = host.endswith("googleapis.com")
    return ApiProtocol.GENERATE_CONTENT if google else ApiProtocol.CHAT_COMPLETIONS


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
    own_base = known.kind == "local" or known.id not in PROVIDERS
    if not keys and own_base and override and not (given and (given.api_key or given.accounts)):
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
    for name, base in given.protocol_endpoints.items():
        bases[PROTOCOL_NAMES[name]] = base.rstrip("/")
    own_bases = {_label(a, i): a.api_base.rstrip("/") for i, a in enumerate(given.accounts, 1)}
    accounts = tuple(
        Account(label, key, _rebased(known, own) if (own := own_bases.get(label)) else bases)
        for label, key in keys
    )
    kind = _KIND_OF_CLASS.get(given.class_, known.kind)
    headers = {**known.headers, **_lowered(given.extra_headers.put)}
    return ActiveProvider(
        facts=known._replace(
            bases=bases, headers=headers, kind=kind, auth=given.auth or known.auth
        ),
        accounts=accounts,
        enabled_by=enabled_by,
        balanced=given.account_strategy == "balance",
        models=given.models,
        rules=given.api_protocol,
        timeouts=with_limits(config.upstream.timeouts, given.timeouts),
        given=given,
    )


# Classes that the file may give a provider, as kinds of the registry.
_KIND_OF_CLASS = {
    "first-party-api": "api", "third-party-api": "api", "local": "local", "gateway": "gateway",
    "bitrouter-cloud": "gateway", _SUBSCRIPTION: "plan",
}  # fmt: skip


def with_limits(timeouts: Timeouts, some: SomeTimeouts) -> Timeouts:
    limits = {k: v for k in _specs(SomeTimeouts) if (v := getattr(some, k)) is not None}
    return replace(timeouts, **limits) if limits else timeouts


def _lowered(headers: Mapping[str, str]) -> Headers:
    return {name.lower(): value for name, value in headers.items()}


def _keys(
    known: Provider, given: ProviderConfig | None, environ: Mapping[str, str]
) -> tuple[list[tuple[str, Secret]], str]:
    if given and given.accounts:
        named = [(_label(a, i), a.api_key) for i, a in enumerate(given.accounts, 1)]
        return [(label, key) for label, key in named if key], "the configuration"
    if given and given.api_key:
        text = given.api_key.reveal()
        if text.startswith(_FROM_CALLER):
            header = text.removeprefix(_FROM_CALLER)
            return [("", given.api_key)], f"the caller's header {printable(header, 64)}"
        return _split_keys(text), "the configuration"
    for name in known.env:
        if keys := _split_keys(environ.get(name, "")):
            return keys, name
    return [], ""


def _label(account: AccountConfig, number: int) -> str:
    return account.label or str(number)


_FROM_CALLER = "request:"


def header_of(key: Secret) -> str | None:
    """The caller's header that a key is taken from; None if it is a key."""
    text = key.reveal()
    return text.removeprefix(_FROM_CALLER).lower() if text.startswith(_FROM_CALLER) else None


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
# 20. routing: model id to chain of targets (pure)
# ---------------------------------------------------------------------------------------------
# One resolver, for serving, for listing and for `bitrouter route`:
#
#     name in [models]     its endpoints
#     @preset              its model, or its candidates; then its fallbacks
#     @preset/model        another model, with all else of the preset
#     ...:variant          the same, ranked or narrowed by a variant
#     echo/echo            the built-in model
#     provider:model       exactly that provider, the model verbatim
#     lab/model            the lab's own provider, then whoever else carries the model
#     gateway/rest         that gateway, the rest verbatim
#     model                whoever declares it, then as lab/model
#
# Who may serve is decided here, on names and on what was configured, and remembered: a model id
# costs one look-up from its second use on. Who goes first is decided anew for each request, in
# `choosing`.

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


class Wishes(NamedTuple):
    """Whom a request wants to be served by, among those who can.

    Attributes:
        sort: one of SORTS; "" for none.
        order: providers that go first, in this order.
        allow_fallbacks: if not, those in `order` alone are asked; without one, the first alone.
        max_input, max_output: US dollars per million tokens.
        first_alone: as without fallbacks and `order`, whatever `order` says.
    """

    sort: str = ""
    order: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    allow_fallbacks: bool = True
    require_parameters: bool = False
    max_input: float | None = None
    max_output: float | None = None
    first_alone: bool = False

    @property
    def for_one(self) -> bool:
        """Whether only the first who can serve the request may be asked."""
        return self.first_alone or not (self.allow_fallbacks or self.order)


NO_WISHES = Wishes()


def wishes_of(routing: Routing) -> Wishes:
    return Wishes(
        SORT_ALIASES.get(routing.sort, routing.sort),
        tuple(provider_id(name) for name in routing.order),
        tuple(provider_id(name) for name in routing.only),
        tuple(provider_id(name) for name in routing.ignore),
        routing.require_tags,
        routing.allow_fallbacks,
        routing.require_parameters,
        routing.max_price.input,
        routing.max_price.output,
    )


def wishes_in(provider: JsonObject) -> Wishes:
    """What a request's `provider` asks for. Raises BadRequest, naming the field.

    wire: openrouter.ai/docs/features/provider-routing, read 2026-11: prices are per million
    tokens there, too.
    """
    unknown = sorted(set(provider) - _WISH_FIELDS)
    if unknown:
        near = near_misses(unknown[0], _WISH_FIELDS, 1)
        hint = (
            f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(_WISH_FIELDS))}"
        )
        said = f"provider.{printable(unknown[0], 64)}: this option is not known here; {hint}"
        raise BadRequest(said, param=f"provider.{printable(unknown[0], 64)}")
    sort = provider.get("sort")
    sort = dig(sort, "by") if isinstance(sort, dict) else sort
    sort = SORT_ALIASES.get(sort, sort) if isinstance(sort, str) else sort
    if sort is not None and sort not in SORTS:
        said = f"provider.sort: expected one of {', '.join(SORTS)}; got {show_json(sort)}"
        raise BadRequest(said, param="provider.sort")
    price = _option(provider, "max_price", dict) or {}
    extra = sorted(set(price) - {"input", "output", "prompt", "completion"})
    if extra:
        where = f"provider.max_price.{printable(extra[0], 64)}"
        raise BadRequest(f"{where}: expected input (or prompt) and output", param=where)
    told = "tags" if provider.get("require_tags") is None else "require_tags"
    fallbacks = _option(provider, "allow_fallbacks", bool)
    return Wishes(
        sort or "",
        _named_providers(provider, "order"),
        _named_providers(provider, "only"),
        _named_providers(provider, "ignore"),
        _bounded_names(provider.get(told), f"provider.{told}"),
        fallbacks is not False,
        _option(provider, "require_parameters", bool) is True,
        _price_in(price, "input", "prompt"),
        _price_in(price, "output", "completion"),
    )


_WISH_FIELDS = {
    "order", "only", "ignore", "sort", "allow_fallbacks", "max_price", "require_parameters",
    "tags", "require_tags",
}  # fmt: skip


def _option(provider: JsonObject, key: str, kind: type[T]) -> T | None:
    value = provider.get(key)
    return None if value is None else typed(value, kind, f"provider.{key}")


def _named_providers(provider: JsonObject, key: str) -> tuple[str, ...]:
    names = _bounded_names(provider.get(key), f"provider.{key}")
    lowered = [provider_id(name.strip().lower()) for name in names]
    # An id of the file's own is as the file has it.
    return tuple(
        known if known in PROVIDERS else name.strip()
        for name, known in zip(names, lowered, strict=True)
    )


_MAX_NAMES, _MAX_NAME_CHARS = 64, 128


def _bounded_names(value: Json, where: str) -> tuple[str, ...]:
    names = strings_in(value, where)
    if len(names) > _MAX_NAMES or any(len(name) > _MAX_NAME_CHARS for name in names):
        said = f"expected at most {_MAX_NAMES} names of {_MAX_NAME_CHARS} characters"
        raise BadRequest(f"{where}: {said}", param=where)
    return names


def _price_in(price: JsonObject, *names: str) -> float | None:
    for name in names:
        value = price.get(name)
        with suppress(ValueError):
            value = float(value) if isinstance(value, str) else value
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
            where = f"provider.max_price.{name}"
            said = f"{where}: expected US dollars per million tokens, got {show_json(value)}"
            raise BadRequest(said, param=where)
        return float(value)
    return None


def narrowed(wide: Wishes, more: Wishes) -> Wishes:
    """Both sets of wishes at once: what one forbids, the other does not allow."""
    if more is NO_WISHES or wide is NO_WISHES:
        return wide if more is NO_WISHES else more
    wide, more = _permitting(wide), _permitting(more)
    fallbacks = wide.allow_fallbacks and more.allow_fallbacks
    order = more.order or wide.order if fallbacks else (*more.order, *wide.order)
    unordered = any(not (one.allow_fallbacks or one.order) for one in (wide, more))
    first_alone = wide.first_alone or more.first_alone or (unordered and bool(order))
    only = tuple(name for name in more.only if name in wide.only)
    if bool(wide.only) is not bool(more.only):
        only = wide.only or more.only
    elif wide.only and not only:
        only = ("",)  # nobody
    return Wishes(
        more.sort or wide.sort,
        order,
        only,
        (*wide.ignore, *more.ignore),
        (*wide.tags, *more.tags),
        fallbacks,
        wide.require_parameters or more.require_parameters,
        _least(wide.max_input, more.max_input),
        _least(wide.max_output, more.max_output),
        first_alone,
    )


def _permitting(wishes: Wishes) -> Wishes:
    """Without fallbacks, an order is a permission, too: one that another order must not undo."""
    if wishes.allow_fallbacks or not wishes.order:
        return wishes
    named = tuple(name for name in wishes.order if not wishes.only or name in wishes.only)
    return wishes._replace(only=named or ("",))


def _least(one: float | None, other: float | None) -> float | None:
    return min((x for x in (one, other) if x is not None), default=None)


class Shape(NamedTuple):
    """What is made of a request on its way to a target.

    Attributes:
        params: fields that it gets where it lacks them; the nearest one's first.
        templates: what is filled in with the arguments that it sends.
        structured: `tool` for answers that follow a schema by way of a tool.
        edits: changes of the body that goes out.
        drop: names of headers that do not travel.
    """

    params: Mapping[str, Json] = {}
    system: str = ""
    system_mode: str = "fill"
    templates: Mapping[str, str] = {}
    structured: str = ""
    edits: tuple[BodyEdit, ...] = ()
    drop: tuple[str, ...] = ()


PLAIN = Shape()


@dataclass(slots=True, eq=False)
class Target:
    """One place that can serve one model: what an attempt is made at.

    Attributes:
        model: the provider's own id for it.
        protocol: what is spoken to it: the caller's own if the provider speaks that.
        base: where the protocol is spoken there.
        others: the provider's bases for the other protocols that it speaks.
        may_need_responses: OpenAI may serve the model on its Responses API alone.
        head: header lines that go with every request to it, the key among them.
        price: per million tokens; all None if it is not known.
        like: the provider whose ways it has.
        weight: its share where several are balanced.
        limits: what it may be asked for in a minute: (whose limit, limit).
        able: all that its model can do, if the file says so; None if nobody said anything.
        inputs, context: what the model reads, in the catalogue's letters, and how much of it, in
            tokens; "" and 0 if that is not known.
        levels: of reasoning effort, if the file names them.
        max_output: tokens, if the file says so.
        key_from: the caller's header that holds the key.
        retry: of this target, where it differs.
        preset: the name of the preset by which it was come to.
        virtual, endpoint: the names of the virtual model and of the endpoint in it.
        exacting: it is not to be asked for less than the whole request says.
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
    auth: str = "native"
    others: Mapping[ApiProtocol, str] = field(default_factory=dict)
    may_need_responses: bool = False
    like: str = ""
    shape: Shape = PLAIN
    weight: float = 1.0
    limits: tuple[tuple[tuple[str, ...], RateLimit], ...] = ()
    able: frozenset[str] | None = None
    inputs: str = ""
    context: int = 0
    max_output: int = 0
    levels: tuple[str, ...] = ()
    key_from: str = ""
    compatibility: ChatCompatibility | None = None
    retry: Retry | None = None
    preset: str = ""
    virtual: str = ""
    endpoint: str = ""
    exacting: bool = False

    @property
    def traits(self) -> Traits:
        traits = traits_of(self.like or self.provider, self.model, self.protocol)
        if self.max_output:
            traits = traits._replace(max_output=self.max_output)
        if self.shape.structured:
            # as TensorZero calls it, whose models may have been trained on it
            traits = traits._replace(schema=self.shape.structured, answer_tool="respond")
        if self.compatibility and self.compatibility.token_limit_field:
            traits = traits._replace(max_tokens_field=self.compatibility.token_limit_field)
        return traits

    @property
    def key(self) -> tuple[str, str, str]:
        return self.provider, self.account, self.model

    @property
    def name(self) -> str:
        return f"{self.provider}:{self.account}" if self.account else self.provider


class _Place(NamedTuple):
    """A provider and its own id for a model, before protocol and account are chosen.

    Attributes:
        rank: who goes first, unless a ranking is asked for; 0 first.
        whose: the shaping of the endpoint and of its virtual model, if it stands in one.
    """

    provider: str
    model: str
    reason: str
    rank: int = 0
    whose: tuple[VirtualModel, Endpoint] | tuple[()] = ()
    number: int = 0


class Leg(NamedTuple):
    """The targets for one model id of a chain.

    Attributes:
        order: `declared`, `balance`, or one of SORTS.
        weight: its share among the legs of which one is drawn; 0 for one that has its place.
        group: which entry of a request's `models` it comes of.
        wishes: what was asked of the choice among them: by the request, preset and variant.
    """

    model: str
    targets: tuple[Target, ...]
    reasons: tuple[str, ...]
    order: str = "balanced"
    weight: float = 0.0
    group: int = 0
    wishes: Wishes = NO_WISHES


class Route(NamedTuple):
    """What a model id comes to.

    Attributes:
        chain: targets in order of preference, as far as names and prices tell.
        reasons: why each is among them.
        left_out: who else was considered, and why not.
        legs: the same targets, by model.
        wishes: what the request asked of the choice among all of them.
        fixed: nothing is left to choose but what health says.
        picky: some of the targets may not be able to do what a request needs.
    """

    model: str
    chain: tuple[Target, ...]
    reasons: tuple[str, ...]
    left_out: tuple[str, ...]
    legs: tuple[Leg, ...] = ()
    wishes: Wishes = NO_WISHES
    fixed: bool = True
    picky: bool = False


class Listed(NamedTuple):
    """A model that can be asked for.

    Attributes:
        able: what it can do, in the words of CAPABILITIES.
    """

    id: str
    providers: tuple[str, ...]
    facts: Model | None
    context: int = 0
    max_output: int = 0
    able: tuple[str, ...] = ()
    price: Price = Price()


class _Named(NamedTuple):
    """A model id, taken apart.

    Attributes:
        asked: the request's own wishes, with those of the variant that it names; `wishes` are the
            preset's, too.
    """

    base: str
    wishes: Wishes
    asked: Wishes
    preset: Preset | None = None
    preset_name: str = ""


class _Way(NamedTuple):
    """One way in which a preset may be served: a leg before its targets are known.

    Attributes:
        shapes: the presets whose fields it gets, the nearest one first.
        preset: the name of that one.
    """

    base: str
    wishes: Wishes
    shapes: tuple[Preset, ...]
    preset: str


class Router:
    """Resolves model ids against one configuration. Replaced whole when that changes."""

    def __init__(self, config: Config, active: Mapping[str, ActiveProvider]) -> None:
        self.config = config
        self.active = dict(active)
        given = {provider_id(name) for name in config.providers}
        self._places = frozenset({*PROVIDERS, *active, *given})  # what may stand before a model
        self._known_providers = frozenset({*self._places, *config.providers, "echo", ""})
        self._remembered: dict[Any, Route | BitrouterError] = {}
        self._listing: list[Listed] | None = None
        self._own: dict[str, dict[str, DeclaredModel]] = {}  # provider -> its ids -> what it says
        self._by_id: dict[str, list[tuple[str, DeclaredModel]]] = {}  # our id -> who declares it
        for ident, provider in self.active.items():
            own = self._own[ident] = {}
            for declared in provider.models:
                own.setdefault(declared.provider_model_id or declared.id, declared)
                own[declared.id] = declared
                if provider.given.models or provider.found or self._shares(ident):
                    self._by_id.setdefault(declared.id, []).append((ident, declared))
        ranks = [
            *config.provider_priority,
            *(c for c in CLASSES if c not in config.provider_priority),
        ]
        self._ranks = {name: rank for rank, name in enumerate(ranks)}
        if "bitrouter-cloud" not in config.provider_priority:  # a gateway like the others
            self._ranks["bitrouter-cloud"] = self._ranks["gateway"]
        # The callers' headers that hold keys: none of them is for anybody but its provider.
        self.key_headers = frozenset(
            header_of(account.api_key) or "" for one in active.values() for account in one.accounts
        )
        # Who shares the models of a provider of the registry, itself among them.
        self._alike: dict[str, list[str]] = {}
        for ident, provider in self.active.items():
            if self._shares(ident):
                self._alike.setdefault(provider.like, []).append(ident)

    def _shares(self, ident: str) -> bool:
        """Whether a provider is asked for the models of the one that it derives from: only by its
        own name, unless it has a rank."""
        provider = self.active[ident]
        ranked = provider.given.priority is not None or bool(provider.given.class_)
        return provider.like == ident or ranked

    def resolve(
        self, model: str | tuple[str, ...], op: Operation, wishes: Wishes = NO_WISHES
    ) -> Route:
        """What a model id, or a chain of them, leads to.

        Raises NotFound, KeyMissing, ProtocolUnsupported or BadRequest, each with what would work.
        """
        asked = (model, op.name, wishes)
        route = self._remembered.get(asked)
        if route is None:
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            try:
                route = self._resolve(model, op, wishes)
            except BitrouterError as error:
                route = copy(error)
            self._remembered[asked] = route
        if isinstance(route, BitrouterError):
            raise copy(route)  # a traceback would keep the request alive for as long as the name
        return route

    def _resolve(self, model: str | tuple[str, ...], op: Operation, wishes: Wishes) -> Route:
        if model == ECHO_MODEL:
            return self._echo_route(op)
        wishes = self._spelled(wishes)
        left_out: list[str] = []
        if isinstance(model, str):
            legs, asked = self._legs(model, op, wishes, left_out), model
        else:
            legs, asked = self._several(model, op, wishes, left_out), ", ".join(model)
        legs = _once_each(legs)
        placed = [
            (target, reason)
            for leg in legs
            for target, reason in zip(leg.targets, leg.reasons, strict=True)
        ]
        chosen_anew = any(
            leg.weight or leg.wishes.for_one or leg.order not in ("declared", "balanced")
            for leg in legs
        )
        return Route(
            asked,
            tuple(target for target, _ in placed),
            tuple(reason for _, reason in placed),
            tuple(dict.fromkeys(left_out)),
            tuple(legs),
            wishes,
            fixed=len(placed) == 1 or not (chosen_anew or wishes.for_one),
            picky=_differ([target for target, _ in placed]),
        )

    def _several(
        self, models: tuple[str, ...], op: Operation, wishes: Wishes, left_out: list[str]
    ) -> list[Leg]:
        """The chain of a request's own `models`: an unknown id is an error before any call."""
        legs: list[Leg] = []
        first: BitrouterError | None = None
        for i, model in enumerate(models):
            try:
                found = self._legs(model, op, wishes, left_out)
                legs += [leg._replace(group=i) for leg in found]
            except (KeyMissing, ProtocolUnsupported, Unset, NobodyWanted) as error:
                left_out.append(f"{printable(model)}: {error.message}")
                first = first or error
            except (NotFound, BadRequest) as error:
                said = f"models[{i}]: {error.message.removeprefix('model: ')}"
                raise BadRequest(said, code=error.code, param=f"models[{i}]") from None
        if not legs:
            raise first or BadRequest("models: expected a model id", param="models")
        return legs

    def _named(self, model: str, wishes: Wishes) -> _Named:
        """A model id taken apart. Raises BadRequest for a preset that is not there."""
        if not model.startswith("@"):
            base, wishes = self._without_variant(model, wishes)
            return _Named(base, wishes, wishes)
        found = re.match(r"@([^/:]*)(?:/(.+?))?(?::([^:/]+))?$", model, re.DOTALL)
        name, base, variant = found.groups("") if found else (model[1:], "", "")
        preset = self.config.presets.get(name)
        if preset is None:
            near = near_misses(name, self.config.presets, 2)
            hint = (
                f"did you mean {' or '.join('@' + n for n in near)}?"
                if near
                else f"the configuration has {_some(['@' + n for n in self.config.presets])}"
            )
            said = f"model: there is no preset @{printable(name, 64)}; {hint}"
            raise BadRequest(said, code="preset_not_found", param="model")
        self._check_whole("presets", name)
        if base:
            base, wishes = self._without_variant(f"{base}:{variant}" if variant else base, wishes)
        elif variant:
            ranked = self._variant(variant)
            if ranked is None:
                known = _some([*SORTS, *SORT_ALIASES, *self.config.variants])
                said = f"model: there is no variant :{printable(variant, 64)}; known are {known}"
                raise BadRequest(said, code="variant_not_found", param="model")
            wishes = narrowed(wishes, ranked)
        return _Named(base, narrowed(wishes_of(preset.routing), wishes), wishes, preset, name)

    def _without_variant(self, model: str, wishes: Wishes) -> tuple[str, Wishes]:
        """A model id without the suffix that is a variant; any other suffix belongs to it."""
        base, colon, suffix = model.rpartition(":")
        if not colon or model in self.config.models or model in self._by_id:
            return model, wishes
        place, separator, rest = split_place(model)
        ident = provider_id(place)
        if separator and rest in self._own.get(ident, ()):
            return model, wishes  # the suffix is part of the id that the provider declares
        if separator == ":" and base == place and (ident in PROVIDERS or ident in self.active):
            return model, wishes  # provider:model, whatever the model is called
        ranked = self._variant(suffix)
        return (model, wishes) if ranked is None else (base, narrowed(wishes, ranked))

    def _variant(self, name: str) -> Wishes | None:
        if name in self.config.variants:
            self._check_whole("variants", name)
            return wishes_of(self.config.variants[name].routing)
        name = SORT_ALIASES.get(name, name)
        return Wishes(sort=name) if name in SORTS else None

    def _check_whole(self, section: str, name: str) -> None:
        """Raises Unset for something of the file that lacks a variable or a file."""
        why = self.config.broken.get((section, name))
        if why:
            said = f"{section}.{name} cannot be used: {why}; set it and reload"
            raise Unset(said, param="model")

    def _spelled(self, wishes: Wishes) -> Wishes:
        """The wishes with providers' names as the configuration spells them."""
        if wishes is NO_WISHES:
            return wishes
        return wishes._replace(
            order=self._providers_named("order", wishes.order),
            only=self._providers_named("only", wishes.only),
            ignore=self._providers_named("ignore", wishes.ignore),
        )

    def _providers_named(self, key: str, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            name if name in self._known_providers else self._provider_named(key, name)
            for name in names
        )

    def _provider_named(self, key: str, name: str) -> str:
        folded = {known.lower(): known for known in self._known_providers}
        if name.lower() in folded:
            return folded[name.lower()]
        near = near_misses(name, folded.values(), 1)
        hint = f"did you mean {near[0]}?" if near else "`bitrouter providers` lists them"
        said = f"provider.{key}: there is no provider {printable(name, 64)!r}; {hint}"
        raise BadRequest(said, param=f"provider.{key}")

    def _legs(self, model: str, op: Operation, wishes: Wishes, left_out: list[str]) -> list[Leg]:
        named = self._named(model, wishes)
        preset, name = named.preset, named.preset_name
        if preset is None:
            return [self._leg(named.base, op, named.wishes, (), left_out)._replace(model=model)]
        routing = wishes_of(preset.routing)
        ways: list[tuple[Callable[[], _Way], float]] = []
        if named.base:
            ways.append((partial(_Way, named.base, named.wishes, (preset,), name), 0.0))
        elif preset.model:
            own = Candidate(model=preset.model)
            ways.append((partial(self._candidate, own, preset, name, routing, named.asked), 0.0))
        elif preset.candidates:
            for one in preset.candidates:
                found = partial(self._candidate, one, preset, name, routing, named.asked)
                ways.append((found, max(one.weight, 1e-9)))
        else:
            said = f"model: @{name} has no model of its own; ask for @{name}/PROVIDER/MODEL"
            raise BadRequest(said, code="preset_without_model", param="model")
        for fallback in preset.fallbacks:
            inner = fallback[1:] if fallback.startswith("@") else ""
            one = Candidate(preset=inner) if inner else Candidate(model=fallback)
            found = partial(self._candidate, one, preset, name, NO_WISHES, named.asked)
            ways.append((found, 0.0))
        return self._usable(ways, op, model, left_out)

    def _candidate(
        self, one: Candidate, preset: Preset, name: str, routing: Wishes, asked: Wishes
    ) -> _Way:
        """Raises Unset for a preset or a variant that lacks something."""
        inner = self.config.presets.get(one.preset)
        shapes = (inner, preset) if inner else (preset,)
        if inner:
            self._check_whole("presets", one.preset)
            routing = narrowed(wishes_of(inner.routing), routing)
        base, routing = self._without_variant(inner.model if inner else one.model, routing)
        return _Way(base, narrowed(routing, asked), shapes, one.preset or name)

    def _usable(
        self,
        ways: list[tuple[Callable[[], _Way], float]],
        op: Operation,
        asked: str,
        left_out: list[str],
    ) -> list[Leg]:
        """The legs of a preset that lead somewhere; an error if none does."""
        found: list[Leg] = []
        first: BitrouterError | None = None
        for make, weight in ways:
            try:
                way = make()
                leg = self._leg(way.base, op, way.wishes, way.shapes, left_out)
            except BitrouterError as error:
                left_out.append(f"{asked}: {error.message}")
                first = first or error
                continue
            for target in leg.targets:
                target.preset = way.preset
            found.append(leg._replace(model=asked, weight=weight))
        if not found and first:
            raise first
        return found

    def _leg(
        self,
        model: str,
        op: Operation,
        wishes: Wishes,
        shapes: tuple[Shaping, ...],
        left_out: list[str],
    ) -> Leg:
        """The targets for one model, in their usual order."""
        if model == ECHO_MODEL:
            echo = self._echo_route(op)
            return Leg(model, echo.chain, echo.reasons)
        targets: list[Target] = []
        reasons: list[str] = []
        unwanted: list[str] = []
        for place in self._ranked(model, wishes):
            if place.provider == "echo":
                targets += self._echo_route(op).chain
                reasons.append(place.reason)
                continue
            provider = self.active.get(place.provider)
            if provider is None:
                left_out.append(f"{place.provider}: {self._why_off(place.provider)}")
                continue
            protocol = spoken_for(op, self._spoken(provider, place.model))
            if protocol is None:
                left_out.append(f"{place.provider}: {_what_it_speaks(provider)}")
                continue
            price = self._price(provider, place.model)
            if place.whose and place.whose[0].pricing.input is not None:
                price = _declared_price(place.whose[0].pricing)
            why_not = _unwanted(provider, price, wishes)
            if why_not:
                unwanted.append(f"{place.provider}: {why_not}")
                continue
            here = self._targets(provider, place, protocol, price, shapes)
            for target in here:
                target.exacting = wishes.require_parameters
                if place.whose:
                    target.virtual, target.endpoint = model, place.whose[1].name
            targets += here
            reasons += [place.reason] * len(here)
        left_out += unwanted
        if not targets:
            if unwanted:
                said = f"{printable(model)}: no provider is left that is wanted: "
                raise NobodyWanted(said + "; ".join(unwanted), param="provider")
            raise self._why_nobody(model, op)
        virtual = self.config.models.get(model)
        strategy = virtual.strategy if virtual else "cascade"
        order = {"priority": "declared", "balance": "balance"}.get(strategy, wishes.sort)
        return Leg(model, tuple(targets), tuple(reasons), order or "balanced", wishes=wishes)

    def _ranked(self, model: str, wishes: Wishes) -> Iterable[_Place]:
        """Who may serve a model, configured or not, as ranks and the request's `order` have it."""
        places = list(self._candidates(model, wishes))
        virtual = self.config.models.get(model)
        if virtual and virtual.strategy != "cascade":
            return places
        listed = {name: n for n, name in enumerate(wishes.order)}

        def rank(place: _Place) -> tuple[int, int]:
            provider = self.active.get(place.provider)
            given = provider.given.priority if provider else None
            known = place.rank if given is None else given
            return listed.get(place.provider, len(listed)), known

        return sorted(places, key=rank)

    def _candidates(self, model: str, wishes: Wishes = NO_WISHES) -> Iterator[_Place]:
        """Who may serve a model, best first, configured or not."""
        virtual = self.config.models.get(model)
        if virtual:
            self._check_whole("models", model)
            for n, endpoint in enumerate(virtual.endpoints, 1):
                ident = provider_id(endpoint.provider)
                own = self._own_id(ident, endpoint.service_id)
                rank = self._rank_of(ident, own=False)
                whose = (virtual, endpoint)
                yield _Place(ident, own, f"endpoint {n}", rank, whose, n)
            return
        seen = set()
        for found in self._by_name(model, wishes):
            if found.provider not in seen:
                seen.add(found.provider)
                yield found

    def _rank_of(self, ident: str, *, own: bool) -> int:
        """The rank of a provider's class. own: the model is its own lab's."""
        provider = self.active.get(ident)
        known = provider.facts if provider else PROVIDERS.get(ident)
        kind = known.kind if known else "api"
        if provider and provider.given.class_ in self._ranks:
            return self._ranks[provider.given.class_]
        if own:
            return self._ranks["first-party-api"]
        if ident == "bitrouter":
            return self._ranks["bitrouter-cloud"]
        classes = {"api": "third-party-api", "local": "local", "gateway": "gateway"}
        return self._ranks.get(classes.get(kind, ""), len(self._ranks))

    def _is_subscription(self, ident: str) -> bool:
        provider = self.active.get(ident)
        known = provider.facts if provider else PROVIDERS.get(ident)
        return known is not None and known.kind == "plan"

    def _by_name(self, model: str, wishes: Wishes) -> Iterator[_Place]:
        declared = list(self._declared(model, found=False))
        yield from declared
        yield from self._known(model, declared, wishes)
        # Who only happens to listen on this machine never goes before who was meant.
        yield from self._declared(model, found=True)

    def _known(self, model: str, declared: list[_Place], wishes: Wishes) -> Iterator[_Place]:
        model = model.removeprefix("models/")
        place, separator, rest = split_place(model)
        ident = provider_id(place)
        facts = find_model(model)
        if separator and ident in self._places:
            if separator == ":" or ident not in _LAB_OF:
                yield _Place(ident, self._declared_id(ident, rest), "named in the model id")
            else:
                yield from self._of_lab(ident, rest, wishes, named=ident)
        elif facts:
            lab, _, bare = facts.id.partition("/")
            own = next((p for p, name in _LAB_OF.items() if name == lab), "")
            as_written = bare if separator else model
            if own:
                yield from self._of_lab(own, as_written, wishes)
            else:
                yield from self._carriers(facts, "", wishes)
        elif separator == "/":
            yield from self._takers(model, wishes)
        elif not declared and not list(self._declared(model, found=True)):
            bare = model.lower().removeprefix("ft:")  # OpenAI's fine-tuned models
            family = family_of(bare)
            if family:
                yield from self._of_lab(family, model, wishes)

    def _takers(self, model: str, wishes: Wishes) -> Iterator[_Place]:
        for other in _OPEN_GATEWAYS:
            if not self._is_subscription(other) or other in wishes.only:
                yield _Place(other, model, _TAKES_ANY, self._rank_of(other, own=False))

    def _declared(self, model: str, *, found: bool) -> Iterator[_Place]:
        """Providers whose own list of models, in the file or found, has this very id."""
        for ident, declared in sorted(self._by_id.get(model, ()), key=lambda one: one[0]):
            if self.active[ident].found == found:
                own = declared.provider_model_id or declared.id
                class_ = self.active[ident].given.class_
                rank = len(self._ranks) + 1 if found else self._ranks.get(class_, 0)
                yield _Place(ident, own, "declares the model", rank)

    def _of_lab(self, ident: str, model: str, wishes: Wishes, named: str = "") -> Iterator[_Place]:
        """The lab's own provider first, then everybody else who carries the model. A subscription
        is asked only where it is named."""
        lab = _LAB_OF[ident]
        facts = find_model(f"{lab}/{model}")
        rank = self._rank_of(ident, own=True)
        for alike in sorted({ident, *self._alike.get(ident, ())}, key=lambda one: one != ident):
            if not self._is_subscription(alike) or alike in (named, *wishes.only):
                own = self._own_id(alike, model)
                yield _Place(alike, own, "the model's own provider", rank)
        if facts:
            yield from self._carriers(facts, ident, wishes)
        yield from self._takers(facts.id if facts else f"{lab}/{model}", wishes)

    def _carriers(self, facts: Model, own: str, wishes: Wishes) -> Iterator[_Place]:
        def rank(ident: str) -> tuple[int, str]:
            return _KIND_RANK[PROVIDERS[ident].kind], ident

        others = [ident for ident in facts.carried if ident in PROVIDERS and ident != own]
        for ident in sorted(others, key=rank):
            for alike in sorted({ident, *self._alike.get(ident, ())}):
                if not self._is_subscription(alike) or alike in wishes.only:
                    known = facts.carried[ident][0]
                    at = self._rank_of(alike, own=False)
                    yield _Place(alike, known, "carries the model", at)

    def _declared_id(self, ident: str, model: str) -> str:
        """A provider's own id for a model that the file declares; any other as it is."""
        declared = self._own.get(ident, {}).get(model)
        return (declared.provider_model_id or declared.id) if declared else model

    def _own_id(self, ident: str, model: str) -> str:
        """A provider's own spelling of a model that the caller spelt another way."""
        declared = self._declared_id(ident, model)
        if declared != model:
            return declared
        like = self._like(ident)
        lab = _LAB_OF.get(like)
        facts = find_model(f"{lab}/{model}") if lab else None
        if facts and like in facts.carried:
            own = facts.carried[like][0]
            if normal_id(model) in (normal_id(own), normal_id(facts.id.partition("/")[2])):
                return own
        return model

    def _like(self, ident: str) -> str:
        return self.active[ident].like if ident in self.active else ident

    def _spoken(self, provider: ActiveProvider, model: str) -> tuple[ApiProtocol, ...]:
        declared = self._own.get(provider.facts.id, {}).get(model)
        spoken = declared.api_protocol.spoken(model) if declared else ()
        return spoken or provider.rules.spoken(model) or tuple(provider.facts.bases)

    def _targets(
        self,
        provider: ActiveProvider,
        place: _Place,
        protocol: ApiProtocol,
        price: Price,
        shapes: tuple[Shaping, ...],
    ) -> list[Target]:
        facts, given = provider.facts, provider.given
        declared = self._own.get(facts.id, {}).get(place.model)
        virtual, endpoint = place.whose or (None, None)
        whole = (*shapes, virtual, given, declared, endpoint)
        headers, timeouts, shape = _shaping(provider, tuple(one for one in whole if one))
        if declared and declared.reasoning_effort.default:
            effort = {"reasoning_effort": declared.reasoning_effort.default}
            shape = shape._replace(params={**shape.params, **effort, **shape.params})
        like = provider.like
        known = find_model(f"{_LAB_OF[like]}/{place.model}" if like in _LAB_OF else place.model)
        told = declared or DeclaredModel("")
        compatible = _both_accents(given.compatibility, told.compatibility)
        return [
            with_head(
                Target(
                    provider=facts.id,
                    account=account.label,
                    model=place.model,
                    protocol=protocol,
                    base=account.bases.get(protocol) or next(iter(account.bases.values())),
                    secret=Secret("") if key_from else account.api_key,
                    headers=dict(headers),
                    timeouts=timeouts,
                    price=price,
                    balanced=provider.balanced,
                    auth=facts.auth,
                    others=account.bases,
                    like=like,
                    shape=shape,
                    weight=endpoint.weight if isinstance(endpoint, Endpoint) else 1.0,
                    limits=_limits_of(provider, account, place, declared, endpoint),
                    able=frozenset(told.capabilities) if told.capabilities else None,
                    inputs=known.inputs if known else "",
                    context=told.context or (known.context if known else 0),
                    levels=told.reasoning_effort.levels,
                    max_output=told.max_output,
                    compatibility=None if compatible == ChatCompatibility() else compatible,
                    key_from=key_from,
                    retry=next((one.retry for one in whole if one and one.retry), None),
                )
            )
            for account in provider.accounts
            for key_from in [header_of(account.api_key) or ""]
        ]

    def _price(self, provider: ActiveProvider, model: str) -> Price:
        declared = self._own.get(provider.facts.id, {}).get(model)
        if declared and declared.pricing.input is not None:
            return _declared_price(declared.pricing)
        ident = provider.like
        facts = find_model(f"{_LAB_OF[ident]}/{model}" if ident in _LAB_OF else model)
        if facts is None or ident not in facts.carried:
            return Price(0.0, 0.0, 0.0, 0.0) if provider.facts.kind == "local" else Price()
        return facts.carried[ident][1]

    def _echo_route(self, op: Operation) -> Route:
        if not (op.translates or op.counts):
            raise ProtocolUnsupported(
                f"{ECHO_MODEL} answers on {', '.join(GENERATE_PATHS.values())}", param="model"
            )
        none, free = Secret(""), Price(0.0, 0.0, 0.0, 0.0)
        protocol, timeouts = op.protocol, self.config.upstream.timeouts
        target = Target("echo", "", "echo", protocol, "", none, {}, timeouts, free)
        legs = (Leg(ECHO_MODEL, (target,), ("built in",)),)
        return Route(ECHO_MODEL, (target,), ("built in",), (), legs)

    # What to say when nobody can serve it.

    def _why_nobody(self, model: str, op: Operation) -> BitrouterError:
        candidates = list(self._candidates(model, NO_WISHES))
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

    def _unsupported(self, model: str, op: Operation, able: list[_Place]) -> ProtocolUnsupported:
        ways = [
            f"POST {GENERATE_PATHS[protocol]} ({found.provider})"
            for found in able
            for protocol in self._spoken(self.active[found.provider], found.model)
        ]
        names = ", ".join(found.provider for found in able)
        return ProtocolUnsupported(
            f"{printable(model)} is served by {names}, which has nothing like {op.suffix}; "
            f"ask for it at {' or '.join(dict.fromkeys(ways))}",
            param="model",
        )

    def _key_missing(self, model: str, first: _Place) -> KeyMissing:
        variable = _missing_variable(first.provider)
        others = _some([*self.active])
        why = self._unset(first.provider)
        found = re.search(r"environment variable (\w+)", why)
        variable = found[1] if found else variable
        what = f"cannot be used: {why}" if why else "key is not set"
        remedy = "set it" if why else f"set {variable}"
        whose = f"{first.provider}, which" if why else f"{first.provider}, whose"
        return KeyMissing(
            f"{printable(model)} is served by {whose} {what}: {remedy} in bitrouter's environment "
            f"and restart it (configured now: {others})",
            param="model",
            extra={"provider": first.provider, "env": variable},
        )

    def _why_off(self, ident: str) -> str:
        given = self.config.providers.get(ident)
        if given and not given.active:
            return "switched off in the configuration"
        if why := self._unset(ident):
            return why
        known = PROVIDERS.get(ident)
        if known and known.kind == "local":
            return "not running on this machine"
        return f"{_missing_variable(ident)} is not set"

    def _unset(self, ident: str) -> str:
        """What the file's entry for a provider lacks."""
        for (section, name), why in self.config.broken.items():
            if section in ("providers", "accounts") and provider_id(name) == ident:
                return why
        return ""

    def listing(self) -> list[Listed]:
        """Every model that can be asked for by name, sorted."""
        if self._listing is None:
            self._listing = []  # what is asked for on the way sees nothing, and asks no further
            self._listing = sorted(self._listed(), key=lambda one: one.id)
        return self._listing

    def _listed(self) -> Iterator[Listed]:
        listed: dict[str, Listed] = {}
        for model in catalogue().values():
            providers = tuple(
                alike for ident in model.carried for alike in self._alike.get(ident, ())
            )
            plans = all(self.active[ident].facts.kind == "plan" for ident in providers)
            if providers and not plans:
                able = _abilities(model)
                listed[model.id] = Listed(
                    model.id, providers, model, model.context, model.max_output, able, model.price
                )
        for ident, provider in self.active.items():
            for declared in provider.models:
                before = listed.get(declared.id)
                place = provider_id(split_place(declared.id)[0])
                also = (*(before.providers if before else ()), ident)
                also += (place,) if place in self.active and place not in also else ()
                facts = find_model(declared.id) if not declared.capabilities else None
                listed[declared.id] = Listed(
                    declared.id,
                    also,
                    None,
                    declared.context,
                    declared.max_output,
                    declared.capabilities or (_abilities(facts) if facts else ()),
                    self._price(provider, declared.provider_model_id or declared.id),
                )
        for name, virtual in self.config.models.items():
            ids = tuple(dict.fromkeys(provider_id(e.provider) for e in virtual.endpoints))
            listed[name] = Listed(name, tuple(ident for ident in ids if ident in self.active), None)
        for name in self.config.presets:
            with suppress(BitrouterError):  # one that leads nowhere cannot be asked for
                chain = self.resolve(f"@{name}", GENERATE[ApiProtocol.CHAT_COMPLETIONS]).chain
                ids = tuple(dict.fromkeys(target.provider for target in chain))
                listed[f"@{name}"] = Listed(f"@{name}", ids, None)
        listed[ECHO_MODEL] = Listed(
            ECHO_MODEL, ("echo",), None, able=("tools", "structured_outputs", "reasoning")
        )
        broken = {name for section, name in self.config.broken if section == "models"}
        return (one for one in listed.values() if one.providers and one.id not in broken)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_TOLD} more" if len(names) > _MAX_TOLD else ""
    return (", ".join(names[:_MAX_TOLD]) or "none") + more


_MAX_TOLD = 20


def _once_each(legs: list[Leg]) -> list[Leg]:
    """Legs in which no target stands twice: what has failed is not asked again."""
    seen: dict[tuple[str, str, str], list[Target]] = {}
    out: list[Leg] = []
    for leg in legs:
        kept = []
        for target, reason in zip(leg.targets, leg.reasons, strict=True):
            alike = seen.setdefault(target.key, [])
            if not any(_is_same(target, other) for other in alike):
                alike.append(target)
                kept.append((target, reason))
        if kept:
            targets, reasons = zip(*kept, strict=True)
            out.append(leg._replace(targets=targets, reasons=reasons))
    return out


def _is_same(one: Target, other: Target) -> bool:
    return (
        one.key == other.key
        and (one.preset, one.virtual, one.endpoint) == (other.preset, other.virtual, other.endpoint)
        and (one.protocol, one.base, one.headers) == (other.protocol, other.base, other.headers)
        and (one.shape, one.timeouts, one.limits) == (other.shape, other.timeouts, other.limits)
    )


def _differ(targets: list[Target]) -> bool:
    """Whether it depends on the request which targets can serve it."""
    if any(target.able is not None or target.levels for target in targets):
        return True
    return len({(target.inputs, target.context) for target in targets}) > 1


def _unwanted(provider: ActiveProvider, price: Price, wishes: Wishes) -> str:
    """Why a request's wishes leave a provider out, or nothing."""
    if wishes is NO_WISHES:
        return ""
    ident = provider.facts.id
    missing = [tag for tag in wishes.tags if tag not in provider.given.tags]
    reasons = (
        (bool(wishes.only) and ident not in wishes.only, "not among `only`"),
        (ident in wishes.ignore, "in `ignore`"),
        (
            not wishes.allow_fallbacks and bool(wishes.order) and ident not in wishes.order,
            "not in `order`, and allow_fallbacks is false",
        ),
        (bool(missing), f"lacks the tag {''.join(missing[:1])}"),
    )
    said = next((why for applies, why in reasons if applies), "")
    return (
        said
        or _too_dear("input", wishes.max_input, price.input)
        or _too_dear("output", wishes.max_output, price.output)
    )


def _too_dear(kind: str, most: float | None, rate: float | None) -> str:
    if most is None or (rate is not None and rate <= most):
        return ""
    if rate is None:
        return f"its price is not known, and max_price.{kind} is {most:g}"
    return f"costs {rate:g} per million {kind} tokens, and max_price.{kind} is {most:g}"


def _shaping(
    provider: ActiveProvider, order: tuple[Shaping, ...]
) -> tuple[Headers, Timeouts, Shape]:
    """Several shapings at once, the one that is nearest to the request first, as headers to send,
    deadlines, and a shape."""
    headers: Headers = dict(provider.facts.headers)
    timeouts = provider.timeouts
    for one in order:  # as bodies are edited: what comes later has the last word
        headers |= {name.lower(): value for name, value in one.extra_headers.put.items()}
        for name in one.extra_headers.drop:
            headers.pop(name, None)
        if one is not provider.given:  # whose own are in there already
            timeouts = with_limits(timeouts, one.timeouts)
    return headers, timeouts, _shape_of(order)


def _shape_of(order: tuple[Shaping, ...]) -> Shape:
    """Several shapings at once: of fields the first one's count, of edits the last one's."""
    params: dict[str, Json] = {}
    for one in order:
        params |= {name: value for name, value in one.params.items() if name not in params}
    presets = [one for one in order if isinstance(one, Preset) and one.system_prompt]
    system = presets[0] if presets else None
    shape = Shape(
        params,
        system.system_prompt if system else "",
        system.system_mode if system else "fill",
        next((one.templates for one in order if isinstance(one, Preset) and one.templates), {}),
        next((one.structured for one in order if isinstance(one, Preset) and one.structured), ""),
        tuple(edit for one in order for edit in one.extra_body),
        tuple(dict.fromkeys(name for one in order for name in one.extra_headers.drop)),
    )
    return PLAIN if shape == PLAIN else shape


def _limits_of(
    provider: ActiveProvider,
    account: Account,
    place: _Place,
    declared: DeclaredModel | None,
    endpoint: Shaping | None,
) -> tuple[tuple[tuple[str, ...], RateLimit], ...]:
    """What a target may be asked for: each account has its own share, as at the vendors."""
    ident = provider.facts.id
    limits: list[tuple[tuple[str, ...], RateLimit]] = []
    for glob, limit in provider.given.rate_limits.rules:
        if matches_glob(glob, place.model) or (declared and matches_glob(glob, declared.id)):
            limits.append(((ident, account.label, glob), limit))
            break
    if declared and declared.rate_limits != RateLimit():
        limits.append(((ident, account.label, "", declared.id), declared.rate_limits))
    if isinstance(endpoint, Endpoint) and endpoint.rate_limits != RateLimit():
        at = (ident, account.label, "endpoint", place.model, str(place.number))
        limits.append((at, endpoint.rate_limits))
    return tuple(limits)


def _both_accents(provider: Compatibility, model: Compatibility) -> ChatCompatibility:
    """How a provider departs from its protocol, and one of its models from that."""
    one, other = provider.chat_completions, model.chat_completions
    return ChatCompatibility(
        other.token_limit_field or one.token_limit_field,
        one.supports_store and other.supports_store,
        one.supports_stream_options and other.supports_stream_options,
    )


def _declared_price(told: Pricing) -> Price:
    tiers = tuple(
        (tier.above_input_tokens, Price(tier.input, tier.output, tier.cache_read, tier.cache_write))
        for tier in sorted(told.context_tiers, key=lambda tier: tier.above_input_tokens)
    )
    return Price(told.input, told.output, told.cache_read, told.cache_write, tiers)


def _abilities(model: Model) -> tuple[str, ...]:
    """What a model of the catalogue can do, in the words of CAPABILITIES."""
    words = {
        "i": "image_input", "a": "audio_input", "v": "video_input", "p": "file_input",
    }  # fmt: skip
    makes = {"i": "image_output", "a": "audio_output", "e": "embeddings"}
    found = [words[letter] for letter in model.inputs if letter in words]
    found += [makes[letter] for letter in model.outputs if letter in makes]
    if "t" in model.outputs:
        found += ["tools", "structured_outputs"]
    if can_reason(model.id):
        found.append("reasoning")
    return tuple(found)


def _missing_variable(ident: str) -> str:
    known = PROVIDERS.get(ident)
    return known.env[0] if known else ident.upper().replace("-", "_") + "_API_KEY"


def _what_it_speaks(provider: ActiveProvider) -> str:
    return "speaks " + ", ".join(provider.facts.bases)


# What each vendor's own API takes. wire: platform.openai.com/docs/api-reference/authentication,
# docs.claude.com/en/api/overview, ai.google.dev/gemini-api/docs/api-key; read 2026-11
_NATIVE_AUTH = {
    ApiProtocol.MESSAGES: "x-api-key",
    ApiProtocol.GENERATE_CONTENT: "x-goog-api-key",
}


def spoken_for(op: Operation, spoken: tuple[ApiProtocol, ...]) -> ApiProtocol | None:
    """In which protocol to ask a provider for something; None if it has no way to say it."""
    if op.protocol in spoken:
        return op.protocol
    if op.embeds:
        return next((one for one in EMBEDDING_PROTOCOLS if one in spoken), None)
    return spoken[0] if spoken and (op.translates or op.counts) else None


def at_protocol(target: Target, protocol: ApiProtocol) -> Target:
    """The same place, spoken to in another of its protocols."""
    return with_head(replace(target, protocol=protocol, base=target.others[protocol]))


def with_head(target: Target) -> Target:
    """Fill in the header lines that every request to a target has: host, key and its own."""
    target.may_need_responses = may_prefer_responses(target.model) and target.traits.official
    auth = target.auth
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
# 21. health: which targets are failing, and until when to spare them (pure)
# ---------------------------------------------------------------------------------------------
# A target that fails `failures` times within `window_s`, or says itself how long to stay away,
# cools down: it moves to the end of every chain. It is not taken out: when nobody better is
# left, an answer from a doubtful target is worth more than our own refusal. After the cool-down
# one request probes it; success closes the breaker, failure opens it again. A target whose vendor
# says that a limit is near moves behind those who have room; one that has used up a limit of the
# configuration is not asked at all. How fast and how reliable targets are is measured here, too.

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
        self.limits = Limits()
        self.meter = Meter()
        self._records: dict[tuple[str, str, str], _Record] = {}
        self._turns: dict[tuple[str, str], int] = {}  # whose account comes first, by model
        self._shares: dict[str, dict[str, float]] = {}  # how far each is behind its share
        self._room: dict[tuple[str, str, str], list[_Room]] = {}  # by what the vendors say
        self._silent: dict[tuple[str, str, str], float] = {}  # since when each has only lost races

    def order(
        self, chain: tuple[Target, ...], now: float, first: tuple[str, str, str] | None = None
    ) -> tuple[Target, ...]:
        """A chain as it should be tried now: turns taken, those who cool down last.

        Args:
            first: the target that goes first if nothing is wrong with it, by its key.
        """
        if len(chain) == 1:
            return chain
        if any(target.balanced for target in chain):
            chain = self._take_turns(chain)
        if first:
            chain = tuple(sorted(chain, key=lambda target: target.key != first))
        if not self._records and not self._room:
            return chain
        waits = [(self.cooling_s(t, now), self.is_near_limit(t, now)) for t in chain]
        return tuple(t for _, t in sorted(zip(waits, chain, strict=True), key=lambda pair: pair[0]))

    def share(self, model: str, weights: Mapping[str, float]) -> list[str]:
        """Whose turn it is, by weight, and then the others: out of any stretch of requests each
        gets its share, evenly spread (nginx's smooth weighted round robin). Where a request leaves
        some out, the turn is the others', and the next request goes on from there."""
        if len(self._shares) > _MAX_HEALTH:
            self._shares.clear()
        behind = self._shares.setdefault(model, {})
        total = sum(weights.values()) or 1.0
        for name, weight in weights.items():
            behind[name] = behind.get(name, 0.0) + weight / total
        # Equals are equal but for the last bits of thirds and sevenths.
        best = max(weights, key=lambda name: (weights[name] > 0, round(behind[name], 9)))
        behind[best] -= 1.0
        others = (name for name in weights if name != best)
        return [best, *sorted(others, key=lambda name: -weights[name])]

    def saw(self, target: Target, headers: Headers, now: float, wall_s: float) -> None:
        """Note what a vendor's answer says of its limits."""
        rooms = rooms_in(headers, now, wall_s)
        if rooms:
            if len(self._room) > _MAX_HEALTH:
                self._room.clear()
            self._room[target.key] = rooms

    def is_near_limit(self, target: Target, now: float) -> bool:
        """Whether the vendor is about to refuse the next request, by its own account."""
        rooms = self._room.get(target.key)
        if not rooms:
            return False
        if all(now >= room.until for room in rooms):
            del self._room[target.key]
            return False
        return any(now < room.until and room.left <= max(1.0, room.limit * _NEAR) for room in rooms)

    def room(self, now: float) -> dict[str, JsonObject]:
        """What is left of the vendors' limits, for status pages."""
        return {
            "/".join(filter(None, key)): {
                room.what: {
                    "left": int(room.left),
                    "limit": int(room.limit),
                    "resets_in_s": round(room.until - now, 1),
                }
                for room in rooms
                if room.until > now
            }
            for key, rooms in list(self._room.items())
        }

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
        for room in self._room.get(target.key, ()):
            room.left -= room.what == "requests"  # until the vendor says how much there is
        record = self._records.get(target.key)
        if record and record.open_until and now >= max(record.open_until, record.probing_until):
            record.probing_until = now + limit_s
            return True
        return False

    def succeeded(self, target: Target) -> bool:
        """Returns whether the target had been cooling down."""
        self._silent.pop(target.key, None)
        record = self._records.pop(target.key, None)
        return record is not None and record.open_until > 0

    def lost(self, target: Target, since: float, now: float) -> bool:
        """Note that somebody else was faster. Returns whether the target has been asked in vain
        for as long as an answer may take to begin: no single loss would show that it hangs."""
        if len(self._silent) > _MAX_HEALTH:
            self._silent.clear()
        silent_for = now - self._silent.setdefault(target.key, since)
        return silent_for >= target.timeouts.first_token_s and bool(self._silent.pop(target.key))

    def forget(self, provider: str, account: str) -> None:
        """A provider's account has a new key: what it did with the old one says nothing."""
        for key in [key for key in self._records if key[:2] == (provider, account)]:
            del self._records[key]

    def abandoned(self, target: Target) -> None:
        """The probe came to nothing that says anything about the target."""
        record = self._records.get(target.key)
        if record:
            record.probing_until = 0.0

    def failed(self, target: Target, error: UpstreamError, now: float) -> bool:
        """Returns whether the target begins to cool down."""
        record = self._records.setdefault(target.key, _Record())
        if len(self._records) > _MAX_HEALTH:
            self._records.pop(next(iter(self._records)))
        rules = self.breaker
        recent = [at for at in record.failed_at if now - at < rules.window_s]
        record.failed_at = [*recent[-rules.failures :], now]
        before = record.open_until
        was_half_open = bool(record.open_until) and now >= record.open_until
        record.probing_until = 0.0
        at_once = isinstance(error, UpstreamKeyRefused | UpstreamNoCredit)
        if at_once or was_half_open or len(record.failed_at) >= rules.failures:
            wait_s = max(rules.cooldown_s, min(error.retry_after_s or 0.0, 3600.0))
            record.open_until = max(record.open_until, now + wait_s)
        elif error.retry_after_s:
            record.open_until = max(record.open_until, now + min(error.retry_after_s, 3600.0))
        return record.open_until > max(now, before)

    @property
    def troubled(self) -> bool:
        """Whether anything is known that changes the order of targets."""
        return bool(self._records or self._room)

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


# What vendors say of their limits.

_NEAR = 0.02  # of a limit, left: then others go first


class _Room:
    """What is left of one limit until it is reset."""

    __slots__ = ("left", "limit", "until", "what")

    def __init__(self, what: str, left: float, limit: float, until: float) -> None:
        self.what, self.left, self.limit, self.until = what, left, limit, until


def rooms_in(headers: Headers, now: float, wall_s: float) -> list[_Room]:
    """wire: platform.openai.com/docs/guides/rate-limits, docs.claude.com/en/api/rate-limits and
    console.groq.com/docs/rate-limits, read 2026-11: OpenAI's reset is a duration, Anthropic's a
    date."""
    found = []
    for what, left, limit, reset in _ROOM_HEADERS:
        if left not in headers:
            continue
        until = _reset_s(headers.get(reset, ""), wall_s)
        try:
            counts = float(headers[left]), float(headers.get(limit, 0))
        except ValueError:
            continue
        if until and 0 <= counts[0] < 1e15 and 0 <= counts[1] < 1e15:
            found.append(_Room(what, *counts, now + min(until, 3600.0)))
    return found


_ROOM_HEADERS = tuple(
    (what, *(f"x-ratelimit-{fact}-{what}" for fact in ("remaining", "limit", "reset")))
    for what in ("requests", "tokens")
) + tuple(
    (what, f"anthropic-ratelimit-{what}-remaining", f"anthropic-ratelimit-{what}-limit",
     f"anthropic-ratelimit-{what}-reset")
    for what in ("requests", "tokens", "input-tokens", "output-tokens")
)  # fmt: skip


def _reset_s(text: str, wall_s: float) -> float:
    """Seconds until a reset that is told as a duration or as a date; 0 if it is not told."""
    seconds = seconds_of(text)
    if seconds is None and "T" in text:
        from datetime import datetime

        with suppress(ValueError):
            seconds = datetime.fromisoformat(text).timestamp() - wall_s
    return max(0.0, seconds or 0.0)


# The configuration's own limits.

_MINUTE_S = 60.0


class _Window:
    """What has been asked for in the last minute."""

    __slots__ = ("spent", "times", "total")

    def __init__(self) -> None:
        self.times: deque[float] = deque()
        self.spent: deque[list[float]] = deque()  # [when, tokens]
        self.total = 0

    def forget(self, now: float) -> None:
        while self.times and self.times[0] <= now - _MINUTE_S:
            self.times.popleft()
        while self.spent and self.spent[0][0] <= now - _MINUTE_S:
            self.total -= int(self.spent.popleft()[1])


class Limits:
    """Sliding windows of a minute, exact for this process."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, ...], _Window] = {}

    def wait_s(self, target: Target, tokens: int, now: float) -> float:
        """Seconds until a target may be asked for something; 0 if it may be now."""
        waits = [0.0]
        for whose, limit in target.limits:
            window = self._windows.get(whose)
            if window is None:
                continue
            window.forget(now)
            most = limit.requests_per_minute
            if most is not None and len(window.times) >= most:
                waits.append(window.times[len(window.times) - most] + _MINUTE_S - now)
            if limit.tokens_per_minute is not None:
                waits.append(_until_there_is_room(window, limit.tokens_per_minute, tokens, now))
        return max(waits)

    def take(self, target: Target, tokens: int, now: float) -> None:
        """A request goes out. tokens: an estimate, until it is settled."""
        for whose, limit in target.limits:
            window = self._windows.setdefault(whose, _Window())
            if limit.requests_per_minute is not None:
                window.times.append(now)
            if limit.tokens_per_minute is not None:
                window.spent.append([now, tokens])
                window.total += tokens

    def settle(self, target: Target, more: int, taken_at: float, now: float) -> None:
        """What a request has used beyond its estimate, or less than it, which is given back while
        the estimate counts."""
        for whose, limit in target.limits:
            window = self._windows.get(whose)
            if window is None or limit.tokens_per_minute is None or not more:
                continue
            window.forget(now)
            entry = next((one for one in window.spent if one[0] == taken_at), None)
            if more > 0:
                window.spent.append([now, more])
            elif entry is not None:
                more = max(more, -int(entry[1]))
                entry[1] += more
            else:
                continue
            window.total += more

    def used(self, now: float) -> dict[str, JsonObject]:
        """What has been used in the last minute, for status pages."""
        for window in self._windows.values():
            window.forget(now)
        return {
            "/".join(filter(None, whose)): {"requests": len(window.times), "tokens": window.total}
            for whose, window in self._windows.items()
        }


def _until_there_is_room(window: _Window, most: int, tokens: int, now: float) -> float:
    over = window.total + min(tokens, most) - most
    if over <= 0:
        return 0.0
    for at, spent in window.spent:
        over -= int(spent)
        if over <= 0:
            return at + _MINUTE_S - now
    return _MINUTE_S


# How fast and how reliable.

_HOUR_S = 3600.0
_MAX_SAMPLES = 512
_FEW_SAMPLES = 64


class Speed(NamedTuple):
    """How a target has done in the last hour.

    Attributes:
        ttft_s: the median time to the first token; None without an answer.
        tokens_per_s: the median rate of output after it.
        uptime: the share of attempts that were answered.
    """

    ttft_s: float | None = None
    tokens_per_s: float | None = None
    uptime: float = 1.0
    answers: int = 0
    failures: int = 0


class _Gauge:
    __slots__ = ("failures", "samples", "speed", "until")

    def __init__(self) -> None:
        self.samples: deque[tuple[float, bool, float, float | None]] = deque(maxlen=_MAX_SAMPLES)
        self.failures: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self.speed: Speed | None = None
        self.until = 0.0

    def changed(self, now: float) -> None:
        """What was worked out holds for a second more at most; of few samples, no more at all."""
        few = len(self.samples) + len(self.failures) < _FEW_SAMPLES
        self.until = 0.0 if few else min(self.until, now + 1.0)


class Meter:
    """Rolling figures of an hour, by provider and model."""

    def __init__(self) -> None:
        self._gauges: dict[tuple[str, str], _Gauge] = {}

    def answered(
        self, target: Target, stream: bool, ttft_s: float, rate: float | None, now: float
    ) -> None:
        """rate: output tokens per second, if it could be told."""
        gauge = self._gauge(target)
        gauge.samples.append((now, stream, ttft_s, rate))
        gauge.changed(now)

    def failed(self, target: Target, now: float) -> None:
        gauge = self._gauge(target)
        gauge.failures.append(now)
        gauge.changed(now)

    def speed(self, target: Target, now: float) -> Speed:
        gauge = self._gauges.get((target.provider, target.model))
        return _speed_of(gauge, now) if gauge else Speed()

    def all(self, now: float) -> dict[str, JsonObject]:
        """All figures, for status pages."""
        shown = {}
        for (provider, model), gauge in list(self._gauges.items()):
            speed = _speed_of(gauge, now)
            if speed.answers or speed.failures:
                shown[f"{provider}/{model}"] = {
                    "p50_ttft_ms": None if speed.ttft_s is None else round(speed.ttft_s * 1000, 1),
                    "tokens_per_s": speed.tokens_per_s and round(speed.tokens_per_s, 1),
                    "uptime": round(speed.uptime, 4),
                    "answers": speed.answers,
                    "failures": speed.failures,
                }
        return shown

    def _gauge(self, target: Target) -> _Gauge:
        key = target.provider, target.model
        gauge = self._gauges.get(key)
        if gauge is None:
            if len(self._gauges) > _MAX_HEALTH:
                self._gauges.pop(next(iter(self._gauges)))
            gauge = self._gauges[key] = _Gauge()
        return gauge


def _speed_of(gauge: _Gauge, now: float) -> Speed:
    if gauge.speed is not None and now < gauge.until:
        return gauge.speed
    recent = [sample for sample in gauge.samples if sample[0] > now - _HOUR_S]
    failures = sum(at > now - _HOUR_S for at in gauge.failures)
    # Of answers that came whole, the first token came with the last one: streams tell more.
    waits = [ttft for _, stream, ttft, _ in recent if stream] or [ttft for _, _, ttft, _ in recent]
    rates = [rate for *_, rate in recent if rate is not None]
    uptime = len(recent) / (len(recent) + failures) if recent or failures else 1.0
    gauge.speed = Speed(_median(waits), _median(rates), uptime, len(recent), failures)
    gauge.until = now + _MINUTE_S  # what has grown old is dropped once a minute
    return gauge.speed


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


# ---------------------------------------------------------------------------------------------
# 22. choosing: which of a route's targets a request goes to, and in what order (pure)
# ---------------------------------------------------------------------------------------------
# The second half of the resolver: what the request needs, what has been measured, whose turn it is,
# where the conversation has been before.


class Needs(NamedTuple):
    """What a request needs of a model.

    Attributes:
        able: in the words of CAPABILITIES.
        effort: of reasoning, as the request says it.
        tokens: about how long the prompt is.
    """

    able: frozenset[str] = frozenset()
    effort: str = ""
    tokens: int = 0


class Session(NamedTuple):
    """A conversation.

    Attributes:
        key: its name; "" if there is none.
        named: the caller gave it; otherwise it is made of how the conversation began.
        goes_on: something has been answered in it.
    """

    key: str = ""
    named: bool = False
    goes_on: bool = False


class Chosen(NamedTuple):
    """
    Attributes:
        left_out: targets of the route that cannot serve this request, and why.
        notes: what is to be said of a target's place, by its key.
    """

    chain: tuple[Target, ...]
    left_out: tuple[str, ...] = ()
    notes: Mapping[tuple[str, str, str], str] = {}


_MEDIA_TYPES = {
    "image_url": "image_input", "input_image": "image_input", "image": "image_input",
    "input_audio": "audio_input", "video_url": "video_input", "input_video": "video_input",
    "file": "file_input", "input_file": "file_input", "document": "file_input",
    "computer_screenshot": "image_input", "image_generation_call": "",
}  # fmt: skip
_MAX_WALK = 200_000  # values looked at; what comes after them counts as nothing


def needs_of(body: JsonObject) -> Needs:
    """What a request in any of the protocols needs."""
    able: set[str] = set()
    chars = _walked(body, able)
    settings = as_object(body.get("generationConfig", body.get("generation_config")))
    for one in (*as_list(body.get("modalities")), *as_list(settings.get("responseModalities"))):
        if str(one).lower() in ("audio", "image"):
            able.add(f"{one}_output".lower())
    if body.get("tools") or body.get("functions"):
        able.add("tools")
    formats = (
        dig(body, "response_format", "type"), dig(body, "text", "format", "type"),
        dig(body, "output_config", "format", "type"),
    )  # fmt: skip
    schemas = ("responseSchema", "responseJsonSchema", "response_schema", "response_json_schema")
    if "json_schema" in formats or any(settings.get(name) for name in schemas):
        able.add("structured_outputs")
    effort = body.get("reasoning_effort") or dig(body, "reasoning", "effort")
    effort = effort or dig(body, "output_config", "effort")
    effort = effort or str(dig(settings, "thinkingConfig", "thinkingLevel") or "").lower()
    effort = effort if effort in EFFORTS and effort != "none" else ""
    if effort or dig(body, "thinking", "type") in ("enabled", "adaptive"):
        able.add("reasoning")
    return Needs(frozenset(able), effort, chars // 4)


def _walked(body: JsonObject, able: set[str]) -> int:
    """The characters of a prompt, and what stands for its media; what its media ask of a model
    is added to `able`."""
    chars = 0
    waiting: list[Json] = [
        body.get(key)
        for key in ("messages", "input", "contents", "system", "instructions", "tools",
                    "systemInstruction", "system_instruction")
    ]  # fmt: skip
    for _ in range(_MAX_WALK):
        if not waiting:
            break
        value = waiting.pop()
        if isinstance(value, str):
            chars += len(value)
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            kind = _MEDIA_TYPES.get(value["type"]) if isinstance(value.get("type"), str) else None
            mime = "" if _BLOB_NAMES.isdisjoint(value) else _mime_of(value)
            if kind is not None or mime:
                if kind != "":
                    able.add(kind or _MEDIA_KINDS.get(mime.partition("/")[0], "file_input"))
                chars += 4 * _TOKENS_OF_MEDIA
                continue
            for name, inner in value.items():
                if name in _SEALED:
                    continue
                if name in _FREE and not isinstance(inner, str):
                    chars += len(repr(inner))  # what it holds has names of its own
                else:
                    waiting.append(inner)
    return chars


_SEALED = frozenset(("encrypted_content", "signature", "thoughtSignature", "thought_signature"))
_BLOB_NAMES = frozenset(("inlineData", "inline_data", "fileData", "file_data"))
_FREE = frozenset((
    "input", "args", "arguments", "parameters", "input_schema", "parametersJsonSchema", "response",
))  # fmt: skip


def _mime_of(part: JsonObject) -> str:
    """The media type of one of Google's blobs."""
    for name in _BLOB_NAMES:
        facts = as_object(part.get(name))
        mime = facts.get("mimeType", facts.get("mime_type"))
        if isinstance(mime, str):
            return mime
    return ""


_MEDIA_KINDS = {"image": "image_input", "audio": "audio_input", "video": "video_input"}
_TOKENS_OF_MEDIA = 500  # at least about as much as a picture costs
_READS = {
    "image_input": "i", "audio_input": "a", "video_input": "v", "file_input": "p",
}  # fmt: skip


def _cannot(target: Target, needs: Needs) -> tuple[str, bool]:
    """What a target cannot do of what is needed, or nothing; whether the file says so, or only
    the catalogue, whose word is a hint."""
    if target.able is not None and (missing := needs.able - target.able):
        return f"cannot do {', '.join(sorted(missing))}", True
    if target.levels and needs.effort and needs.effort not in target.levels:
        return f"does not know the reasoning effort {needs.effort}", True
    if target.context and needs.tokens > target.context:
        said = f"about {needs.tokens} tokens do not fit its context of {target.context}"
        return said, False
    if target.inputs:
        blind = sorted(word for word in needs.able & {*_READS} if _READS[word] not in target.inputs)
        if blind:
            return f"is not known for {blind[0]}", False
    return "", False


def session_of(headers: Headers, body: JsonObject, caller: str) -> Session:
    """Which conversation a request belongs to.

    wire: the headers and fields by which agents name theirs, as Codex 0.169, Claude Code 2.1 and
    OpenRouter's clients send them, 2026-11.
    """
    turns = [one for key in ("messages", "input", "contents") for one in as_list(body.get(key))]
    goes_on = bool(body.get("previous_response_id")) or any(
        dig(turn, "role") in ("assistant", "model") or dig(turn, "type") in _ANSWERED
        for turn in turns[-_RECENT:]
    )
    if named := _session_name(headers, body):
        return Session(f"{caller} {named}", named=True, goes_on=goes_on)
    first = next((turn for turn in turns if dig(turn, "role") in ("user", None)), body.get("input"))
    keys = ("system", "instructions", "systemInstruction", "system_instruction")
    begun = [body.get(key) for key in keys]
    begun += [turn for turn in turns[:1] if dig(turn, "role") in ("system", "developer")]
    words = [caller, *_beginning([*begun, first])]
    mark = hashlib.blake2b("\0".join(words).encode("utf-8", "replace"), digest_size=16).hexdigest()
    return Session(mark, goes_on=goes_on)


_RECENT = 64  # turns in which the last answer must be
_CHANGING = {"cache_control", "type", "role", "id", "status"}  # what a turn later is not the same
_BEGINNING = 32  # texts that tell conversations apart, and as many characters of each:
_BEGINNING_CHARS = 2048


def _beginning(values: list[Json]) -> Iterator[str]:
    """The first texts in a request."""
    waiting = list(reversed(values))
    for _ in range(_BEGINNING):
        while waiting and not isinstance(waiting[-1], str):
            value = waiting.pop()
            inner = [v for k, v in as_object(value).items() if k not in _CHANGING]
            waiting += (value if isinstance(value, list) else inner)[:_BEGINNING][::-1]
        if not waiting:
            return
        yield waiting.pop()[:_BEGINNING_CHARS]


def is_named_session(headers: Headers, body: JsonObject) -> bool:
    """Whether the caller says which conversation a request belongs to."""
    return bool(_session_name(headers, body))


def _session_name(headers: Headers, body: JsonObject) -> str:
    named = next((headers[name] for name in _SESSION_HEADERS if headers.get(name)), "")
    told = (body.get("prompt_cache_key"), body.get("session_id"), dig(body, "metadata", "user_id"))
    named = named or next((one for one in told if isinstance(one, str) and one), "")
    if len(named) <= _SESSION_CHARS:
        return named
    return hashlib.blake2b(named.encode("utf-8", "replace"), digest_size=16).hexdigest()


_SESSION_CHARS = 128  # thousands of them are kept; of longer ones, the digest

_SESSION_HEADERS = (
    "x-session-id", "session_id", "session-id", "x-claude-code-session-id", "x-bitrouter-session",
    "conversation_id", "thread-id",
)  # fmt: skip
_ANSWERED = ("function_call", "reasoning", "custom_tool_call", "local_shell_call")


def choose(
    route: Route,
    needs: Needs | None,
    health: Health,
    now: float,
    *,
    draw: Callable[[], float] = lambda: 0.0,
    first: tuple[str, str, str] | None = None,
) -> Chosen:
    """The targets for one request, in order. Raises BadRequest if nobody can do what it needs.

    Args:
        needs: None if they do not matter.
        draw: a number from [0, 1), the same one for the same conversation.
        first: the target at which the conversation is, by its key.
    """
    if route.fixed and not route.picky:
        return Chosen(health.order(route.chain, now, first))
    left_out: list[str] = []
    notes: dict[tuple[str, str, str], str] = {}
    legs = [
        (leg, target)
        for leg in _drawn(route.legs, draw)
        for target in _in_order(leg, health, now, notes)
    ]
    if needs is not None:
        able = _able([target for _, target in legs], needs, left_out)
        legs = [(leg, target) for leg, target in legs if target in able]
    chain = tuple(_permitted(legs, route.wishes))
    return Chosen(health.order(chain, now, first), tuple(left_out), notes)


def _permitted(legs: list[tuple[Leg, Target]], wishes: Wishes) -> Iterator[Target]:
    """Targets in order, without those that only a fallback would lead to where none is allowed:
    neither within a leg, nor among candidates, nor in the whole of a request."""
    firsts: dict[int, tuple[Leg, Target]] = {}
    for leg, target in legs:
        among = -1 if wishes.for_one else leg.group if leg.weight else id(leg)
        first_leg, first = firsts.setdefault(among, (leg, target))
        alike = (first.provider, first.model) == (target.provider, target.model)
        if not (wishes.for_one or leg.wishes.for_one) or (alike and first_leg is leg):
            yield target


def _drawn(legs: tuple[Leg, ...], draw: Callable[[], float]) -> list[Leg]:
    """The legs in their order; of those of one entry that have a weight, one is drawn, and then
    another."""
    out: list[Leg] = []
    for _, run in itertools.groupby(legs, key=lambda leg: leg.group):
        group = list(run)
        candidates = [leg for leg in group if leg.weight]
        at = draw() if len(candidates) > 1 else 0.0
        while candidates:
            point = at * sum(leg.weight for leg in candidates)
            for leg in candidates:
                point -= leg.weight
                if point < 0:
                    break
            out.append(leg)  # and the next one by the same number, among those that are left
            candidates.remove(leg)
        out += [leg for leg in group if not leg.weight]
    return out


def _in_order(
    leg: Leg, health: Health, now: float, notes: dict[tuple[str, str, str], str]
) -> list[Target]:
    targets = list(leg.targets)
    if len(targets) < 2 or leg.order in ("declared", "balanced"):
        return targets
    if leg.order == "balance":
        return _balanced(leg, health)
    listed = {name: n for n, name in enumerate(leg.wishes.order)}
    speeds = {target.key: health.meter.speed(target, now) for target in targets}

    def rank(target: Target) -> tuple[Any, ...]:
        speed = speeds[target.key]
        place = listed.get(target.provider, len(listed))
        return place, *_RANKED[leg.order](target, speed)  # equals stay in the configuration's order

    for target in targets:
        notes[target.key] = _measured(leg.order, target, speeds[target.key])
    return sorted(targets, key=rank)


def _balanced(leg: Leg, health: Health) -> list[Target]:
    """The endpoints of a virtual model, by their weights; an endpoint's accounts stay together."""
    runs: dict[str, list[Target]] = {}
    for target, reason in zip(leg.targets, leg.reasons, strict=True):
        runs.setdefault(reason, []).append(target)
    weights = {endpoint: run[0].weight for endpoint, run in runs.items()}
    return [target for name in health.share(leg.model, weights) for target in runs[name]]


def blended(price: Price) -> float | None:
    """US dollars per million tokens, three of four of them input."""
    if price.input is None or price.output is None:
        return None
    return (3 * price.input + price.output) / 4


def _by_cost(target: Target, speed: Speed) -> tuple[float, ...]:
    cost = blended(target.price)
    return (float("inf") if cost is None else cost, -speed.uptime, speed.failures)


# Who has not been measured goes first, once, so as to be measured.
def _by_latency(target: Target, speed: Speed) -> tuple[float, ...]:  # noqa: ARG001
    unknown = -1.0 if speed.failures == 0 else float("inf")
    wait = unknown if speed.ttft_s is None else speed.ttft_s
    return (wait, -(speed.tokens_per_s or 0.0), -speed.uptime)


def _by_throughput(target: Target, speed: Speed) -> tuple[float, ...]:  # noqa: ARG001
    unknown = float("-inf") if speed.answers + speed.failures == 0 else 0.0
    rate = unknown if speed.tokens_per_s is None else -speed.tokens_per_s
    return (rate, speed.ttft_s or 0.0, -speed.uptime)


_RANKED: dict[str, Callable[[Target, Speed], tuple[float, ...]]] = {
    "cost": _by_cost,
    "latency": _by_latency,
    "throughput": _by_throughput,
}


def _measured(order: str, target: Target, speed: Speed) -> str:
    """What a ranking is founded on."""
    if order == "cost":
        cost = blended(target.price)
        return "its price is not known" if cost is None else f"${cost:g} per million tokens"
    if order == "latency":
        wait = speed.ttft_s
        return "not measured yet" if wait is None else f"first token after {wait * 1000:.0f} ms"
    rate = speed.tokens_per_s
    return "not measured yet" if rate is None else f"{rate:.0f} tokens per second"


def _able(chain: list[Target], needs: Needs, left_out: list[str]) -> list[Target]:
    """Those who can do what is needed. What the catalogue says is believed only while somebody is
    left; what the file says always."""
    doubted: list[tuple[Target, str]] = []
    able: list[Target] = []
    refused: list[str] = []
    for target in chain:
        why, certain = _cannot(target, needs)
        if not why:
            able.append(target)
        elif certain:
            refused.append(f"{target.name}/{target.model}: {why}")
        else:
            doubted.append((target, why))
    if able:
        left_out += [*refused, *(f"{t.name}/{t.model}: {why}" for t, why in doubted)]
        return able
    if not doubted:
        raise BadRequest(
            f"no provider of this model can serve the request: {'; '.join(refused)}",
            code="no_capable_provider",
            param="model",
        )
    left_out += refused
    return [target for target, _ in doubted]


# ---------------------------------------------------------------------------------------------
# 23. shaping: what the configuration puts into requests and takes out of them (pure)
# ---------------------------------------------------------------------------------------------
# Fields and system prompts go into the caller's own request, in its own protocol, before anything
# else is made of it; `extra_body` changes what the provider gets. All by splicing: what is not
# named keeps its bytes.


# Where the protocols keep what Chat Completions calls so. Others keep nothing of the kind.
# fmt: off
_PARAMS: dict[str, tuple[str, str, str, str]] = {
    # Chat Completions        its pointer              Responses             Messages
    #                         generateContent
    "temperature":           ("/temperature",          "/temperature",       "/temperature",
                              "/generationConfig/temperature"),
    "top_p":                 ("/top_p",                "/top_p",             "/top_p",
                              "/generationConfig/topP"),
    "top_k":                 ("/top_k",                "",                   "/top_k",
                              "/generationConfig/topK"),
    "max_tokens":            ("/max_tokens",           "/max_output_tokens", "/max_tokens",
                              "/generationConfig/maxOutputTokens"),
    "max_completion_tokens": ("/max_completion_tokens", "/max_output_tokens", "/max_tokens",
                              "/generationConfig/maxOutputTokens"),
    "stop":                  ("/stop",                 "",                   "/stop_sequences",
                              "/generationConfig/stopSequences"),
    "seed":                  ("/seed",                 "",                   "",
                              "/generationConfig/seed"),
    "presence_penalty":      ("/presence_penalty",     "",                   "",
                              "/generationConfig/presencePenalty"),
    "frequency_penalty":     ("/frequency_penalty",    "",                   "",
                              "/generationConfig/frequencyPenalty"),
    "reasoning_effort":      ("/reasoning_effort",     "/reasoning/effort",
                              "/output_config/effort",
                              "/generationConfig/thinkingConfig/thinkingLevel"),
    "verbosity":             ("/verbosity",            "/text/verbosity",    "", ""),
}
# fmt: on
_COLUMNS = {protocol: n for n, protocol in enumerate(ApiProtocol)}
_LISTS = {"stop"}  # a list in every protocol but Chat Completions
_SAME = {
    "max_tokens": ("max_completion_tokens",),
    "max_completion_tokens": ("max_tokens",),
    "max_output_tokens": ("max_tokens",),
    "thinkingLevel": ("thinkingBudget",),
    "tools": ("functions",),
}
_SAME_ELSEWHERE = {"/reasoning_effort": "reasoning", "/output_config/effort": "thinking"}


def shaped(document: Document, shape: Shape, protocol: ApiProtocol) -> Document:
    """A caller's request with the fields and the system prompt of its shape."""
    body = document.value
    changes: list[Change] = []
    rewritten: JsonObject = {}
    said: set[str] = set()
    for name, value in shape.params.items():
        places = _PARAMS.get(name)
        if name in _REWRITTEN and protocol is not ApiProtocol.CHAT_COMPLETIONS:
            rewritten[name] = value
            continue
        pointer = places[_COLUMNS[protocol]] if places else f"/{_escaped(name)}"
        if not pointer or pointer in said or _is_set(body, pointer):
            continue
        said |= {pointer, *(f"/{other}" for other in _SAME.get(pointer[1:], ()))}
        if "generation_config" in body:
            pointer = pointer.replace("/generationConfig/", "/generation_config/")
        if (
            name in _LISTS
            and protocol is not ApiProtocol.CHAT_COMPLETIONS
            and not isinstance(value, list)
        ):
            value = [value]
        changes.append(Change(pointer, value))
    if rewritten:
        changes += _in_other_words(body, rewritten, protocol)
    if shape.system:
        changes += _SYSTEMS[protocol](body, shape.system, shape.system_mode)
    return document.changed(changes) if changes else document


# Fields that the other protocols build in another way: their codecs know how.
_REWRITTEN = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning")


def _in_other_words(
    body: JsonObject, fields_of_chat: JsonObject, protocol: ApiProtocol
) -> Iterator[Change]:
    """Fields of Chat Completions in a request of another protocol."""
    least: JsonObject = {"model": "m", "messages": [{"role": "user", "content": "."}]}
    codec, traits = CODECS[protocol], Traits(thinking="budget")
    prompts = [CHAT.parse_request({**least, **more}) for more in ({}, fields_of_chat)]
    without, with_them = (codec.render_request(one, traits, Losses()) for one in prompts)
    for key, new in with_them.items():
        if key == "generationConfig":
            inner = {k: v for k, v in new.items() if not _is_set(body, f"/{key}/{k}")}
            known = as_object(without.get(key))
            yield from (Change(f"/{key}/{k}", v) for k, v in inner.items() if known.get(k) != v)
        elif without.get(key) != new and body.get(key) is None and key != "max_tokens":
            yield Change(f"/{key}", new)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _is_set(body: JsonObject, pointer: str) -> bool:
    """Whether a request says something of a field, under any of its names."""
    *above, last = pointer.split("/")[1:]
    value: Json = body
    for part in above:
        value = as_object(value)
        value = value.get(part, value.get(_snake(part)))
    names = (last, *_SAME.get(last, ()))
    spelt = (*names, *map(_snake, names))
    here = any(as_object(value).get(name) is not None for name in spelt)
    return here or body.get(_SAME_ELSEWHERE.get(pointer, "")) is not None


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), name)


def _system_in_chat(body: JsonObject, text: str, mode: str) -> list[Change]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        return []  # the upstream says what is wrong with it
    theirs = [n for n, one in enumerate(messages) if dig(one, "role") in SYSTEM_ROLES]
    mine = Change("/messages/0", {"role": "system", "content": text}, insert=True)
    if not theirs:
        return [mine]
    if mode == "fill":
        return []
    if mode == "replace":
        return [*(Change(f"/messages/{n}", delete=True) for n in reversed(theirs)), mine]
    where, content = f"/messages/{theirs[0]}/content", messages[theirs[0]].get("content")
    return [_before(where, content, text, {"type": "text", "text": text})]


SYSTEM_ROLES = ("system", "developer")


def _system_in_responses(body: JsonObject, text: str, mode: str) -> list[Change]:
    own, items = body.get("instructions"), as_list(body.get("input"))
    theirs = [n for n, one in enumerate(items) if dig(one, "role") in SYSTEM_ROLES]
    if mode == "fill":
        return [] if own or theirs else [Change("/instructions", text)]
    if mode == "replace":
        gone = [Change(f"/input/{n}", delete=True) for n in reversed(theirs)]
        return [*gone, Change("/instructions", text)]
    return [Change("/instructions", f"{text}\n\n{own}" if isinstance(own, str) and own else text)]


def _system_in_messages(body: JsonObject, text: str, mode: str) -> list[Change]:
    own = body.get("system")
    if not own or mode == "replace":
        return [Change("/system", text)]
    part = {"type": "text", "text": text}
    return [] if mode == "fill" else [_before("/system", own, text, part)]


def _system_in_gemini(body: JsonObject, text: str, mode: str) -> list[Change]:
    name = "system_instruction" if body.get("system_instruction") else "systemInstruction"
    own = body.get(name)
    if not own or mode == "replace":
        return [Change(f"/{name}", {"parts": [{"text": text}]})]
    if mode == "fill":
        return []
    if isinstance(own, str):
        return [Change(f"/{name}", f"{text}\n\n{own}")]
    parts = dig(own, "parts")
    if not isinstance(parts, list):  # one part may stand there without a list
        return [Change(f"/{name}/parts", [{"text": text}, *([parts] if parts else [])])]
    return [_before(f"/{name}/parts", parts, text, {"text": text})]


def _before(pointer: str, own: Json, text: str, part: JsonObject) -> Change:
    """Our text in front of theirs: of a string, or of a list of parts."""
    if isinstance(own, list):
        return Change(f"{pointer}/0", part, insert=True)
    return Change(pointer, f"{text}\n\n{own}" if isinstance(own, str) and own else text)


_SYSTEMS: dict[ApiProtocol, Callable[[JsonObject, str, str], list[Change]]] = {
    ApiProtocol.CHAT_COMPLETIONS: _system_in_chat,
    ApiProtocol.RESPONSES: _system_in_responses,
    ApiProtocol.MESSAGES: _system_in_messages,
    ApiProtocol.GENERATE_CONTENT: _system_in_gemini,
}


def finished(body: bytes, target: Target, more: tuple[BodyEdit, ...] = ()) -> bytes:
    """A request's body as a target's configuration wants it, and then the request (more)."""
    edits, compatible = (*target.shape.edits, *more), target.compatibility
    if not edits and compatible is None:
        return body
    document = Document(body)
    if compatible and target.protocol is ApiProtocol.CHAT_COMPLETIONS:
        document = document.changed(_compatible(document.value, compatible))
    try:
        return document.changed(Change(edit.pointer, edit.value, edit.delete) for edit in edits).raw
    except BadRequest as error:
        raise BadRequest(f"extra_body of {target.name}: {error.message}") from None


def _compatible(body: JsonObject, wanted: ChatCompatibility) -> Iterator[Change]:
    """What a server of Chat Completions does not take, taken out or called by its other name."""
    if not wanted.supports_store:
        yield Change("/store", delete=True)
    if not wanted.supports_stream_options:
        yield Change("/stream_options", delete=True)
    for name in _SAME.get(wanted.token_limit_field, ()):
        if name in body:
            yield Change(f"/{name}", delete=True)
            if wanted.token_limit_field not in body:
                yield Change(f"/{wanted.token_limit_field}", body[name])


# ---------------------------------------------------------------------------------------------
# 24. templates: text with places to fill in (pure)
# ---------------------------------------------------------------------------------------------
# The part of minijinja that prompts use: {{ values }}, for, if, include, comments, whitespace
# control, a few filters. What is not defined is an error, as it is in TensorZero.
#
# wire: docs.rs/minijinja 2, and what TensorZero 2026.6.0 was seen to send: one newline at the end
# of a template is dropped; values are written as `true`, `[1, "a", none]`, `{"a": 1, "b": 2}`.

_MAX_TEMPLATE_DEPTH = 16
_MAX_RENDERED = 1_000_000  # characters
_TAG = re.compile(
    r"\{#(-?).*?(-?)#\}|\{\{([-+]?)(.*?)([-+]?)\}\}|\{%([-+]?)(.*?)([-+]?)%\}", re.DOTALL
)
_WORD = re.compile(
    r"\s*(?:(?P<text>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')|(?P<number>\d+(?:\.\d+)?)|"
    r"(?P<name>[A-Za-z_]\w*)|(?P<sign>==|!=|<=|>=|[-+*/%<>()\[\].,|~:]))"
)


class TemplateError(ValueError):
    """A template, or what it is filled in with, is not as it should be."""


class _Node(NamedTuple):
    """A piece of a template: text, print, for, if, include.

    Attributes:
        words: the expression, or (for) the variable's name and the expression.
        branches: of an if: (condition, body) each; of a for: its body, and its else.
    """

    kind: str
    text: str = ""
    words: tuple[tuple[str, str], ...] = ()
    branches: tuple[tuple[tuple[tuple[str, str], ...], tuple[Any, ...]], ...] = ()


@functools.lru_cache(maxsize=256)
def parse_template(text: str) -> tuple[_Node, ...]:
    """Raises TemplateError, with the construct that is not known."""
    if text.endswith("\n"):
        text = text[:-1].removesuffix("\r")
    parser = _TemplateParser(text)
    nodes, end = parser.block(())
    if end:
        raise TemplateError(f"unexpected {end}")
    return nodes


class _TemplateParser:
    def __init__(self, text: str) -> None:
        self._pieces: list[tuple[str, str]] = []
        at, trim = 0, False
        for found in _TAG.finditer(text):
            plain = text[at : found.start()]
            comment = found[3] is None and found[6] is None
            before = found[1] if comment else found[3] or found[6]
            after = found[2] if comment else found[5] or found[8]
            plain = plain.lstrip() if trim else plain
            self._pieces.append(("text", plain.rstrip() if before == "-" else plain))
            if not comment:
                kind = "print" if found[3] is not None else "tag"
                self._pieces.append((kind, (found[4] or found[7] or "").strip()))
            at, trim = found.end(), after == "-"
        rest = text[at:]
        self._pieces.append(("text", rest.lstrip() if trim else rest))
        self._at = 0

    def block(self, ends: tuple[str, ...]) -> tuple[tuple[_Node, ...], str]:
        """The nodes up to one of the tags that end them, and that tag."""
        nodes: list[_Node] = []
        while self._at < len(self._pieces):
            kind, text = self._pieces[self._at]
            self._at += 1
            if kind == "text":
                nodes += [_Node("text", text)] if text else []
            elif kind == "print":
                nodes.append(_Node("print", words=_words(text)))
            else:
                word, _, rest = text.partition(" ")
                if word in ends:
                    return tuple(nodes), text
                nodes.append(self._tag(word, rest.strip()))
        if ends:
            raise TemplateError(f"{ends[-1]} is missing")
        return tuple(nodes), ""

    def _tag(self, word: str, rest: str) -> _Node:
        if word == "for":
            found = re.fullmatch(r"([A-Za-z_]\w*)\s+in\s+(.+)", rest, re.DOTALL)
            if not found:
                raise TemplateError(f"cannot read `for {rest}`")
            body, end = self.block(("else", "endfor"))
            other, _ = self.block(("endfor",)) if end == "else" else ((), "")
            return _Node("for", found[1], _words(found[2]), (((), body), ((), other)))
        if word == "if":
            branches = []
            condition, end = _words(rest), "elif"
            while end.startswith("elif"):
                body, end = self.block(("elif", "else", "endif"))
                branches.append((condition, body))
                condition = _words(end.removeprefix("elif")) if end.startswith("elif") else ()
            if end == "else":
                body, _ = self.block(("endif",))
                branches.append(((("name", "true"),), body))
            return _Node("if", branches=tuple(branches))
        if word == "include":
            return _Node("include", words=_words(rest))
        raise TemplateError(f"the tag `{word}` is not known here")


def _words(text: str) -> tuple[tuple[str, str], ...]:
    words, at = [], 0
    while text[at:].strip():
        found = _WORD.match(text, at)
        if not found or not found.lastgroup:
            raise TemplateError(f"cannot read `{text.strip()}`")
        words.append((found.lastgroup, found[found.lastgroup]))
        at = found.end()
    return tuple(words)


def render_template(text: str, arguments: JsonObject, templates: Mapping[str, str] = {}) -> str:
    """A template, filled in. Raises TemplateError.

    Args:
        templates: those that it may include, by name.
    """
    try:
        return _render(parse_template(text), _sorted(arguments), templates, 0)
    except TemplateError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as exc:
        raise TemplateError(f"cannot be filled in: {exc}") from None


def _render(
    nodes: tuple[_Node, ...], scope: JsonObject, templates: Mapping[str, str], depth: int
) -> str:
    if depth > _MAX_TEMPLATE_DEPTH:
        raise TemplateError("templates are nested too deeply")
    out: list[str] = []
    for node in nodes:
        if node.kind == "text":
            out.append(node.text)
        elif node.kind == "print":
            out.append(_written_out(_Expression(node.words, scope).value()))
        elif node.kind == "include":
            name = str(_Expression(node.words, scope).value())
            if name not in templates:
                raise TemplateError(f"there is no template {name!r} to include")
            out.append(_render(parse_template(templates[name]), scope, templates, depth + 1))
        elif node.kind == "if":
            taken = (body for when, body in node.branches if _Expression(when, scope).truth())
            out.append(_render(next(taken, ()), scope, templates, depth + 1))
        else:
            out.append(_render_loop(node, scope, templates, depth))
        if sum(map(len, out)) > _MAX_RENDERED:
            raise TemplateError("the rendered text is too long")
    return "".join(out)


def _render_loop(node: _Node, scope: JsonObject, templates: Mapping[str, str], depth: int) -> str:
    values = _Expression(node.words, scope).value()
    items = list(values) if isinstance(values, list | dict | str) else None
    if items is None:
        raise TemplateError(f"cannot loop over {show_json(values)}")
    (_, body), (_, other) = node.branches
    out = [] if items else [_render(other, scope, templates, depth + 1)]
    for n, item in enumerate(items):
        loop = {
            "index": n + 1, "index0": n, "first": n == 0, "last": n == len(items) - 1,
            "length": len(items), "revindex": len(items) - n,
        }  # fmt: skip
        out.append(_render(body, {**scope, node.text: item, "loop": loop}, templates, depth + 1))
    return "".join(out)


def _sorted(value: Json) -> Json:
    """A value whose objects are in the order of their keys, as TensorZero's are."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, list) else value


def _written_out(value: Json) -> str:
    return value if isinstance(value, str) else _shown(value)


def _shown(value: Json) -> str:
    """A value as it is shown inside another one."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_shown(k)}: {_shown(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


class _Expression:
    """One expression of a template, read and worked out in one go."""

    def __init__(self, words: tuple[tuple[str, str], ...], scope: JsonObject) -> None:
        self._words = words
        self._scope = scope
        self._at = 0

    def value(self) -> Json:
        value = self._or()
        if self._at < len(self._words):
            raise TemplateError(f"cannot read `{self._words[self._at][1]}` here")
        return _known(value)

    def truth(self) -> bool:
        value = self._or()
        return bool(_known(value))

    def _next(self, *wanted: str) -> bool:
        if self._at < len(self._words) and self._words[self._at][1] in wanted:
            kind = self._words[self._at][0]
            if kind != "text":
                self._at += 1
                return True
        return False

    def _or(self) -> Json:
        value = self._and()
        while self._next("or"):
            other = self._and()
            value = _known(value) or other
        return value

    def _and(self) -> Json:
        value = self._not()
        while self._next("and"):
            other = self._not()
            value = _known(value) and other
        return value

    def _not(self) -> Json:
        return not _known(self._not()) if self._next("not") else self._compared()

    def _compared(self) -> Json:
        value = self._joined()
        while self._at < len(self._words):
            sign = self._words[self._at][1]
            if self._next("is"):
                negative = self._next("not")
                value = _tested(value, self._name()) is not negative
            elif self._next("in"):
                value = _known(value) in _known(self._joined())
            elif self._next("==", "!=", "<", ">", "<=", ">="):
                value = _COMPARED[sign](_known(value), _known(self._joined()))
            else:
                break
        return value

    def _joined(self) -> Json:
        value = self._filtered()
        while self._next("~"):
            value = _written_out(_known(value)) + _written_out(_known(self._filtered()))
        return value

    def _filtered(self) -> Json:
        value = self._reached()
        while self._next("|"):
            name, arguments = self._name(), []
            if self._next("("):
                while not self._next(")"):
                    arguments.append(_known(self._or()))
                    self._next(",")
                    if self._at >= len(self._words):
                        raise TemplateError(f"a bracket is missing after `{name}`")
            if name not in _FILTERS:
                raise TemplateError(f"the filter `{name}` is not known here")
            value = _FILTERS[name](value if name in _FOR_NOTHING else _known(value), *arguments)
        return value

    def _reached(self) -> Json:
        value = self._plain()
        while True:
            if self._next("."):
                value = _inside(value, self._name(number=True))
            elif self._next("["):
                value = _inside(value, _known(self._or()))
                self._expect("]")
            else:
                return value

    def _plain(self) -> Json:
        if self._next("("):
            value = self._or()
            self._expect(")")
            return value
        if self._next("["):
            values = []
            while not self._next("]"):
                values.append(_known(self._or()))
                if not self._next(","):
                    self._expect("]")
                    break
            return values
        if self._at >= len(self._words):
            raise TemplateError("an expression ends too early")
        kind, text = self._words[self._at]
        self._at += 1
        if kind == "text":
            return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), text[1:-1])
        if kind == "number":
            return float(text) if "." in text else int(text)
        if kind != "name":
            raise TemplateError(f"cannot read `{text}` here")
        return _CONSTANTS[text] if text in _CONSTANTS else self._scope.get(text, _Missing(text))

    def _name(self, *, number: bool = False) -> str:
        if self._at < len(self._words):
            kind, text = self._words[self._at]
            if kind == "name" or (number and kind == "number"):
                self._at += 1
                return text
        raise TemplateError("a name is missing")

    def _expect(self, sign: str) -> None:
        if not self._next(sign):
            raise TemplateError(f"`{sign}` is missing")


class _Missing(NamedTuple):
    """A value that is not defined."""

    name: str


def _known(value: Json) -> Json:
    if isinstance(value, _Missing):
        raise TemplateError(f"`{value.name}` is not defined")
    return value


def _inside(value: Json, key: Json) -> Json:
    value = _known(value)
    if isinstance(value, dict):
        return value.get(key, _Missing(str(key)))
    index = int(key) if isinstance(key, int) or (isinstance(key, str) and key.isdigit()) else None
    if isinstance(value, list | str) and index is not None and -len(value) <= index < len(value):
        return value[index]
    return _Missing(str(key))


def _tested(value: Json, test: str) -> bool:
    if test not in _TESTS:
        raise TemplateError(f"the test `is {test}` is not known here")
    return _TESTS[test](value)


_TESTS: dict[str, Callable[[Json], bool]] = {
    "defined": lambda value: not isinstance(value, _Missing),
    "undefined": lambda value: isinstance(value, _Missing),
    "none": lambda value: value is None,
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "sequence": lambda value: isinstance(value, list),
    "mapping": lambda value: isinstance(value, dict),
}
_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: bool(a == b), "!=": lambda a, b: bool(a != b),
    "<": lambda a, b: bool(a < b), ">": lambda a, b: bool(a > b),
    "<=": lambda a, b: bool(a <= b), ">=": lambda a, b: bool(a >= b),
}  # fmt: skip
_CONSTANTS = {
    "true": True,
    "false": False,
    "none": None,
    "True": True,
    "False": False,
    "None": None,
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_FOR_NOTHING = ("default", "d")  # filters that take what is not defined
_FILTERS: dict[str, Callable[..., Json]] = {
    "upper": lambda value: str(value).upper(),
    "lower": lambda value: str(value).lower(),
    "trim": lambda value: str(value).strip(),
    "title": lambda value: str(value).title(),
    "length": len,
    "count": len,
    "first": lambda value: value[0] if value else _Missing("first"),
    "last": lambda value: value[-1] if value else _Missing("last"),
    "join": lambda value, between="": between.join(map(_written_out, value)),
    "default": lambda value, other="": other if isinstance(value, _Missing) else value,
    "d": lambda value, other="": other if isinstance(value, _Missing) else value,
    "tojson": lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    "replace": lambda value, old, new: str(value).replace(old, new),
    "string": _written_out,
    "int": int,
    "float": float,
    "list": list,
    "items": lambda value: [[k, v] for k, v in value.items()],
    "indent": lambda value, n=4: str(value).replace("\n", "\n" + " " * n),
}


def is_static(text: str) -> bool:
    """Whether a template has nothing to fill in."""
    return not re.search(r"\{[{%#]", text)


# ---------------------------------------------------------------------------------------------
# 25. migrate: a TensorZero configuration -> ours (pure)
# ---------------------------------------------------------------------------------------------
# wire: TensorZero 2026.6.0, the last one: its configuration reference, and what its gateway was
# seen to send. Every key is taken, or noted: nothing is passed over in silence.


class MigrationError(ValueError):
    """What is there cannot be read as TensorZero's configuration at all."""


class Note(NamedTuple):
    """What became of a key.

    Attributes:
        level: info (nothing is lost), note (it means something else now), warning (it is not
            carried over), unknown (TensorZero does not know it either).
        where: `file: key`.
    """

    level: str
    where: str
    said: str


class Migration(NamedTuple):
    """
    Attributes:
        text: our configuration, as TOML.
        edits: model names that clients send -> what they may send instead.
    """

    text: str
    notes: tuple[Note, ...]
    counts: Mapping[str, int]
    edits: Mapping[str, str]

    @property
    def is_clean(self) -> bool:
        return not any(note.level in ("warning", "unknown") for note in self.notes)


class _TzType(NamedTuple):
    """A provider type of TensorZero.

    Attributes:
        ours: the provider of our registry; "" if it has none, so that each has a base.
        model_key: the field that holds the model's name there.
        env: where its key is unless the file says otherwise.
        limit: how it spells the limit of tokens upstream.
    """

    ours: str
    model_key: str
    env: str
    limit: str = ""


_TZ_TYPES = {
    "openai": _TzType("openai", "model_name", "OPENAI_API_KEY", "max_completion_tokens"),
    "anthropic": _TzType("anthropic", "model_name", "ANTHROPIC_API_KEY"),
    "google_ai_studio_gemini": _TzType("google", "model_name", "GOOGLE_AI_STUDIO_API_KEY"),
    "azure": _TzType("azure", "deployment_id", "AZURE_API_KEY", "max_completion_tokens"),
    "groq": _TzType("groq", "model_name", "GROQ_API_KEY"),
    "mistral": _TzType("mistral", "model_name", "MISTRAL_API_KEY"),
    "deepseek": _TzType("deepseek", "model_name", "DEEPSEEK_API_KEY"),
    "xai": _TzType("xai", "model_name", "XAI_API_KEY"),
    "together": _TzType("together", "model_name", "TOGETHER_API_KEY"),
    "fireworks": _TzType("fireworks", "model_name", "FIREWORKS_API_KEY"),
    "hyperbolic": _TzType("hyperbolic", "model_name", "HYPERBOLIC_API_KEY"),
    "openrouter": _TzType("openrouter", "model_name", "OPENROUTER_API_KEY"),
    "vllm": _TzType("", "model_name", "VLLM_API_KEY", "max_tokens"),
    "sglang": _TzType("", "model_name", "SGLANG_API_KEY", "max_tokens"),
    "tgi": _TzType("", "model_name", "TGI_API_KEY", "max_tokens"),
    "aws_bedrock": _TzType("aws-bedrock", "model_id", "AWS_BEARER_TOKEN_BEDROCK"),
    "gcp_vertex_gemini": _TzType("vertex", "model_id", "VERTEX_ACCESS_TOKEN"),
}
# Types that have no counterpart, and the nearest way out.
_TZ_WITHOUT = {
    "gcp_vertex_anthropic": "use type anthropic with an Anthropic key, or aws_bedrock",
    "aws_sagemaker": "put an OpenAI-compatible server before the endpoint and give its api_base",
    "dummy": "it answers nothing real; echo/echo is our built-in model",
}
# Types whose models count the tokens of their reasoning.
_TZ_BUDGETED = ("anthropic", "google_ai_studio_gemini", "gcp_vertex_gemini", "aws_bedrock")

# Keys without a counterpart, by the table that they stand in: level and what is said.
_NO_DATABASE = ("info", "not needed: there is no database to operate")
_THEIR_LOOP = ("warning", "needs TensorZero's feedback loop, which is not shipped")
_TZ_TOP: dict[str, tuple[str, str]] = {
    "clickhouse": _NO_DATABASE,
    "postgres": _NO_DATABASE,
    "object_storage": ("info", "not needed: files are passed on and not kept"),
    "metrics": _THEIR_LOOP,
    "evaluations": _THEIR_LOOP,
    "optimizers": _THEIR_LOOP,
    "autopilot": _THEIR_LOOP,
    "rate_limiting": (
        "warning", "limits by tag and key are not shipped yet; those of providers and models are"),
}  # fmt: skip
_TZ_GATEWAY: dict[str, tuple[str, str]] = {
    "observability": _NO_DATABASE,
    "debug": ("info", "`route --explain` and x-bitrouter-explain show what is sent"),
    "disable_pseudonymous_usage_analytics": ("info", "nothing phones home"),
    "unstable_disable_feedback_target_validation": _THEIR_LOOP,
    "unstable_error_json": ("info", "errors are structured"),
    "metrics": ("warning", "Prometheus metrics are not shipped yet"),
    "cache": ("warning", "there is no cache of answers"),
    "export": ("warning", "OpenTelemetry is not shipped yet"),
    "fetch_and_encode_input_files_before_inference": (
        "info", "media at URLs are fetched for providers that need the bytes"),
    "global_outbound_http_intra_stream_read_timeout_ms": ("info", "see upstream.timeouts.idle_s"),
    "template_filesystem_access": ("info", "templates are copied into the presets"),
}  # fmt: skip
_TZ_PROVIDER_KEYS: dict[str, tuple[str, str]] = {
    "discard_unknown_chunks": ("info", "chunks that are not known are passed on"),
    "parse_think_blocks": ("info", "reasoning is passed on as the provider sends it"),
    "include_encrypted_reasoning": ("info", "encrypted reasoning is always asked for and kept"),
    "beta_structured_outputs": ("info", "structured outputs are native where there are any"),
    "content_type_overrides": ("warning", "not carried over"),
    "batch_cost": ("warning", "there are no batches"),
    "region": ("info", "set AWS_REGION for another region than us-east-1"),
    "allow_auto_detect_region": ("info", "set AWS_REGION for another region than us-east-1"),
    "access_key_id": ("warning", "set AWS_BEARER_TOKEN_BEDROCK: requests are not signed"),
    "secret_access_key": ("warning", "set AWS_BEARER_TOKEN_BEDROCK: requests are not signed"),
    "session_token": ("warning", "set AWS_BEARER_TOKEN_BEDROCK: requests are not signed"),
    "endpoint_url": ("warning", "give the provider an api_base by hand"),
    "endpoint_id": ("warning", "tuned endpoints of Vertex are not carried over"),
}
_TZ_MODEL_KEYS: dict[str, tuple[str, str]] = {
    "skip_relay": ("info", "there is no relay to skip"),
    "namespace": ("warning", "there are no namespaces"),
}
_TZ_FUNCTION_KEYS: dict[str, tuple[str, str]] = {
    "description": ("info", "kept as a comment in your own file only"),
    "evaluators": _THEIR_LOOP,
    "system_schema": ("info", "arguments are not checked against a schema"),
    "user_schema": ("info", "arguments are not checked against a schema"),
    "assistant_schema": ("info", "arguments are not checked against a schema"),
    "schemas": ("info", "arguments are not checked against a schema"),
}  # fmt: skip
_TZ_VARIANTS_WITHOUT = {
    "experimental_best_of_n_sampling", "experimental_best_of_n", "experimental_mixture_of_n",
    "experimental_dynamic_in_context_learning", "experimental_chain_of_thought",
}  # fmt: skip

# A variant's fields that go into its preset's params, under their names there.
TZ_PARAMS = {
    "temperature": "temperature", "top_p": "top_p", "max_tokens": "max_tokens",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
    "seed": "seed", "stop_sequences": "stop", "reasoning_effort": "reasoning_effort",
    "service_tier": "service_tier", "verbosity": "verbosity",
}  # fmt: skip


def shorthand(name: str) -> tuple[str, bool]:
    """The model id for TensorZero's `type::model`, and whether Responses is spoken for it; ""
    if it is no shorthand."""
    kind, separator, model = name.partition("::")
    if not separator or kind not in _TZ_TYPES or not _TZ_TYPES[kind].ours:
        return "", False
    responses = kind == "openai" and model.startswith("responses::")
    model = model.removeprefix("responses::") if responses else model
    if kind == "gcp_vertex_gemini":
        model = model.rpartition("/")[2]
    return f"{_TZ_TYPES[kind].ours}/{model}", responses


def preset_name(name: str) -> str:
    """A function's name as a preset's."""
    plain = re.sub(r"[^\w.+-]", "_", name)
    return plain if plain[:1].isalnum() else f"f{plain}"


def migrate_tensorzero(
    files: list[tuple[str, str]], read_file: Callable[[str, str], str]
) -> Migration:
    """TensorZero's configuration as ours. Raises MigrationError.

    Args:
        files: name and text of each; they are merged as TensorZero merges them.
        read_file: the text of a file that one of them names, given both; raises OSError.
    """
    return _Migrator(*_merged(files), read_file).run()


_TzPath: TypeAlias = tuple[str, ...]


def _merged(files: list[tuple[str, str]]) -> tuple[JsonObject, dict[_TzPath, str]]:
    """One tree of several files, and which file each key comes from."""
    import tomllib

    tree: JsonObject = {}
    origins: dict[_TzPath, str] = {}
    for name, text in files:
        try:
            value = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as exc:
            raise MigrationError(f"{name}: {exc}") from None
        _merge(tree, value, (), name, origins)
    return tree, origins


def _merge(
    into: JsonObject, value: JsonObject, at: _TzPath, file: str, origins: dict[_TzPath, str]
) -> None:
    for key, one in value.items():
        here = (*at, key)
        if isinstance(one, dict) and isinstance(into.get(key), dict):
            _merge(into[key], one, here, file, origins)
        elif key in into:
            other = origins.get(here, "another file")
            raise MigrationError(f"{'.'.join(here)} is defined in {other} and again in {file}")
        else:
            into[key] = {} if isinstance(one, dict) else one
            origins[here] = file
            if isinstance(one, dict):
                _merge(into[key], one, here, file, origins)


class _Table:
    """One table of the file, whose keys are taken one by one; what is left is noted."""

    def __init__(self, owner: _Migrator, path: _TzPath, value: Json) -> None:
        self.owner = owner
        self.path = path
        self.is_table = isinstance(value, dict)
        self.left: JsonObject = dict(as_object(value))
        if not self.is_table:
            owner.note("warning", path, f"expected a table, got {show_json(value)}")

    def take(self, key: str, kind: type[T], default: T) -> T:
        """A key's value; the default if it has another type, which is noted."""
        if key not in self.left:
            return default
        value = self.left.pop(key)
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            said = f"expected {JSON_TYPES.get(kind, 'another value')}, got {show_json(value)}"
            self.owner.note("warning", (*self.path, key), said)
            return default
        return value

    def table(self, key: str) -> _Table:
        return _Table(self.owner, (*self.path, key), self.left.pop(key, {}))

    def tables(self) -> Iterator[tuple[str, _Table]]:
        """What is left, each a table, in order of their names."""
        for key in sorted(self.left):
            yield key, self.table(key)

    def end(self, without: Mapping[str, tuple[str, str]] = {}) -> None:
        for key in sorted(self.left):
            level, said = without.get(key, ("unknown", "TensorZero has no such key, nor have we"))
            self.owner.note(level, (*self.path, key), said)
        self.left = {}


class _Migrator:
    def __init__(
        self,
        tree: JsonObject,
        origins: Mapping[_TzPath, str],
        read_file: Callable[[str, str], str],
    ) -> None:
        self._tree = tree
        self._origins = origins
        self._read_file = read_file
        self._notes: list[Note] = []
        self._providers: dict[str, JsonObject] = {}
        self._reasons: dict[tuple[str, str], str] = {}  # section and name -> where it comes from
        self._identities: dict[str, str] = {}
        self._models: dict[str, JsonObject] = {}
        self._presets: dict[str, JsonObject] = {}
        self._server: JsonObject = {}
        self._timeouts: JsonObject = {}
        self._kinds: dict[str, str] = {}  # model -> the type of its first provider
        self._tools: dict[str, JsonObject] = {}
        self._defaults: dict[str, Json] = {}
        self._edits: dict[str, str] = {}
        self._relay = ""
        self._items = 0

    def run(self) -> Migration:
        top = _Table(self, (), self._tree)
        self._gateway(top.table("gateway"))
        for kind, table in top.table("provider_types").tables():
            self._provider_type(kind, table)
        models = top.table("models")
        embeddings = top.table("embedding_models")
        for name, table in models.tables():
            self._model(name, table, name)
        for name, table in embeddings.tables():
            ours = f"embedding/{name}" if name in self._models else name
            self._model(name, table, ours)
            old = f"tensorzero::embedding_model_name::{name}"
            if ours in self._models:
                self._edits[old] = ours
        for name, table in top.table("tools").tables():
            self._tool(name, table)
        for name, table in top.table("functions").tables():
            self._function(name, table)
        top.end(_TZ_TOP)
        self._check()
        text = self._written()
        counts = {
            "providers": len(self._providers), "models": len(self._models),
            "presets": len(self._presets),
        }  # fmt: skip
        return Migration(text, tuple(self._notes), counts, self._edits)

    # What is said.

    def note(self, level: str, path: _TzPath, said: str) -> None:
        self._notes.append(Note(level, self.where(path), said))

    def where(self, path: _TzPath) -> str:
        at = path
        while at and at not in self._origins:
            at = at[:-1]
        shown = ".".join(path) or "(top)"
        return f"{self._origins[at]}: {shown}" if at in self._origins else shown

    def _text_of(self, path: _TzPath, name: str) -> str | None:
        """A file that a key names, relative to the file in which it stands."""
        at = path
        while at and at not in self._origins:
            at = at[:-1]
        try:
            return self._read_file(self._origins.get(at, ""), name)
        except (OSError, ValueError) as exc:
            why = getattr(exc, "strerror", None) or exc
            self.note("warning", path, f"{printable(name)} cannot be read: {why}")
            return None

    def _json_of(self, path: _TzPath, name: str) -> JsonObject | None:
        text = self._text_of(path, name)
        if text is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as exc:
            self.note("warning", path, f"{printable(name)} is no JSON: {exc}")
            return None
        return as_object(value)

    # The gateway's own settings.

    def _gateway(self, table: _Table) -> None:
        bind = table.take("bind_address", str, "")
        if bind:
            self._server["listen"] = bind
            if not is_local(bind):
                said = "not loopback: give callers keys ([keys.NAME]), or listen on 127.0.0.1"
                self.note("note", (*table.path, "bind_address"), said)
        base = table.take("base_path", str, "").rstrip("/")
        if base:
            self._server["base_path"] = base if base.startswith("/") else f"/{base}"
        auth = table.table("auth")
        if auth.take("enabled", bool, False):
            self._server["auth"] = "required"
            said = "TensorZero's keys are stored as hashes: give callers new ones ([keys.NAME])"
            self.note("note", (*auth.path, "enabled"), said)
        auth.end({"cache": ("info", "keys are looked up in memory")})
        total = table.take("global_outbound_http_timeout_ms", float, 0.0)
        if total:
            self._timeouts["total_s"] = total / 1000
        relay = table.table("relay")
        url = relay.take("gateway_url", str, "").rstrip("/")
        if url:
            self._relay = "relay"
            key = self._key_of(relay, "api_key_location", "TENSORZERO_API_KEY", none=True)
            self._providers["relay"] = {"api_base": f"{url}/openai/v1", **key}
            self._reasons["providers", "relay"] = self.where(relay.path)
        relay.end()
        table.end(_TZ_GATEWAY)

    def _provider_type(self, kind: str, table: _Table) -> None:
        defaults = table.table("defaults")
        for key in ("api_key_location", "credential_location"):
            if key in defaults.left:
                self._defaults[kind] = defaults.left.pop(key)
        defaults.end()
        table.end({"sft": _THEIR_LOOP, "batch": ("warning", "there are no batches")})

    # Models and their providers.

    def _model(self, name: str, table: _Table, ours: str) -> None:
        routing = table.take("routing", list, [])
        providers = table.table("providers")
        endpoints: list[JsonObject] = []
        known = dict(providers.tables())
        for one in routing:
            if not isinstance(one, str) or one not in known:
                said = f"there is no provider {show_json(one)} in this model"
                self.note("warning", (*table.path, "routing"), said)
                continue
            self._kinds.setdefault(name, str(known[one].left.get("type")))
            endpoint = self._endpoint(name, one, known[one])
            endpoints += [endpoint] if endpoint else []
        for spare in sorted(set(known) - {str(one) for one in routing}):
            self.note("info", known[spare].path, "not in `routing`, so never used")
        timeouts = self._deadlines(table)
        skips = table.take("skip_relay", bool, False)
        table.end(_TZ_MODEL_KEYS)
        if self._relay and not skips:
            target = f"tensorzero::model_name::{name}"
            endpoints = [{"provider": self._relay, "service_id": target}]
        if not endpoints or ours.startswith("@") or not ours.strip():
            said = "no provider of this model could be carried over: it is left out"
            self.note("warning", table.path, said)
            return
        self._models[ours] = {"endpoints": endpoints, **timeouts}
        self._reasons["models", ours] = self.where(table.path)
        if table.path[0] == "models":
            self._edits[f"tensorzero::model_name::{name}"] = ours

    def _endpoint(self, model: str, name: str, table: _Table) -> JsonObject | None:
        kind = table.take("type", str, "")
        facts = _TZ_TYPES.get(kind)
        if facts is None:
            way_out = _TZ_WITHOUT.get(kind, "no provider type of TensorZero is called so")
            self.note("warning", (*table.path, "type"), f"{kind or '(none)'}: {way_out}")
            return None
        service = table.take(facts.model_key, str, "")
        if kind == "tgi":
            service = service or "tgi"
        if not service and "endpoint_id" not in table.left:
            self.note("warning", (*table.path, facts.model_key), "this key is required")
            return None
        provider = self._provider(model, name, kind, facts, table)
        if provider is None:
            return None
        endpoint: JsonObject = {"provider": provider, "service_id": service, "name": name}
        endpoint |= self._edits_of(table) | self._deadlines(table)
        tools = table.take("provider_tools", list, [])
        if tools:
            more = [{"pointer": "/tools/-", "value": tool} for tool in tools]
            endpoint["extra_body"] = [*endpoint.get("extra_body", ()), *more]
        params: JsonObject = {}
        for key in ("reasoning_format", "prompt_mode"):
            if key in table.left:
                params[key] = table.left.pop(key)
        if params:
            endpoint["params"] = params
        pricing = self._pricing(table)
        if pricing:
            self._price(provider, service, pricing)
        table.end(_TZ_PROVIDER_KEYS)
        return endpoint

    def _provider(
        self, model: str, name: str, kind: str, facts: _TzType, table: _Table
    ) -> str | None:
        """The provider of ours that stands for an instance of a type: base, protocol and key."""
        ours = facts.ours
        base = self._usable_base(kind, table, needed=not ours)
        if base is None:
            return None
        protocol = ""
        if kind == "openai" and table.take("api_type", str, "chat_completions") == "responses":
            protocol = "responses"
        table.left.pop("api_type", None)
        field_name = "credential_location" if kind == "gcp_vertex_gemini" else "api_key_location"
        if kind == "aws_bedrock" and "api_key" in table.left:
            table.left[field_name] = table.left.pop("api_key")
        given: JsonObject = {}
        default = self._defaults.get(kind)
        if field_name not in table.left and default is not None:
            table.left[field_name] = default
        own_key = field_name in table.left
        if own_key or base or protocol or not ours:
            given |= self._key_of(table, field_name, facts.env, none=bool(base))
        if base:
            given["api_base"] = base
        if protocol:
            given["api_protocol"] = protocol
        if kind == "gcp_vertex_gemini" and base:
            given |= {"auth": "bearer", "api_protocol": "generate_content"}
            self.note("note", table.path, "set VERTEX_ACCESS_TOKEN: an access token of yours")
        elif kind == "anthropic" and base:
            given["api_protocol"] = "messages"
        elif given and ours and (ours != "openai" or not base):
            given["derives"] = ours
        if facts.limit:
            limit = {"token_limit_field": facts.limit}
            given["compatibility"] = {"chat_completions": limit}
        return self._named_provider(model, name, ours, given, table.path)

    def _named_provider(
        self, model: str, name: str, ours: str, given: JsonObject, path: _TzPath
    ) -> str:
        """The name of a provider: one for each that differs in anything."""
        plain = set(given) <= {"compatibility"} and ours
        identity = f"{ours} {json.dumps(given, sort_keys=True)}"
        if identity in self._identities:
            return self._identities[identity]
        taken = {*self._providers, *PROVIDERS, *ALIASES, "echo"}
        stem, longer = (re.sub(r"[^\w.-]", "-", text) for text in (name, f"{model}-{name}"))
        choices = [stem, longer, *(f"{longer}-{n}" for n in range(2, 1000))]
        chosen = ours if plain else next(one for one in choices if one not in taken)
        self._identities[identity] = chosen
        if given:
            self._providers[chosen] = given
            self._reasons["providers", chosen] = self.where(path)
        return chosen

    def _usable_base(self, kind: str, table: _Table, *, needed: bool) -> str | None:
        base = self._base(kind, table)
        wrong = base_problem(base) if base and "${" not in base else ""
        if needed and not base:
            wrong = "this key is required"
        if wrong:
            self.note("warning", (*table.path, "api_base"), wrong)
        return None if wrong else base

    def _base(self, kind: str, table: _Table) -> str | None:
        """Where a provider is, if not at its usual place; None if that cannot be told."""
        base = table.take("api_base", str, "").rstrip("/")
        if kind == "anthropic":
            base = base.removesuffix("/messages")
        if kind == "azure":
            endpoint = table.left.pop("endpoint", "")
            source = self._source(endpoint, (*table.path, "endpoint"))
            if source.startswith(("request:", "file:")):
                said = "an endpoint is a URL or a variable here"
                self.note("warning", (*table.path, "endpoint"), said)
                return None
            base = f"{source.rstrip('/')}/openai/v1" if source else ""
        if kind == "gcp_vertex_gemini":
            place, project = table.take("location", str, ""), table.take("project_id", str, "")
            if project and place:
                host = "" if place == "global" else f"{place}-"
                base = (
                    f"https://{host}aiplatform.googleapis.com/v1/projects/{project}/locations/"
                    f"{place}/publishers/google"
                )
        return base

    def _source(self, text: Json, path: _TzPath) -> str:
        """A location as our configuration writes it: a literal, a variable, a file."""
        if not isinstance(text, str):
            return ""
        where, separator, name = text.partition("::")
        if not separator and text.startswith("env:"):  # as one page of its documentation has it
            where, name = "env", text.removeprefix("env:")
        if where == "dynamic":
            said = f"taken from each request: tensorzero::credentials.{name}, or a header {name}"
            self.note("note", path, said)
        elif text == "sdk":
            self.note("warning", path, "credentials of an SDK are not found: give a key")
        literal = text.replace("${", "$${") if "://" in text else ""
        return _TZ_SOURCES[where].format(name) if where in _TZ_SOURCES else literal

    def _key_of(self, table: _Table, name: str, env: str, *, none: bool) -> JsonObject:
        """How a provider's key is given. none: without a location it may have no key."""
        location = table.left.pop(name, f"env::{env}")
        path = (*table.path, name)
        if isinstance(location, dict):
            sources = [self._source(location.get(key), path) for key in ("default", "fallback")]
            accounts = [
                {"label": label, "api_key": source}
                for label, source in zip(("default", "fallback"), sources, strict=True)
                if source
            ]
            return {"accounts": accounts} if accounts else {}
        if location == "none":
            if not none:
                self.note("warning", path, "a key is needed here")
            return {}
        source = self._source(location, path)
        return {"api_key": source} if source else {}

    def _edits_of(self, table: _Table) -> JsonObject:
        """extra_body and extra_headers, which are the same here."""
        out: JsonObject = {}
        for name, first in (("extra_body", "pointer"), ("extra_headers", "name")):
            known = (first, "value", "delete")
            entries = []
            for i, one in enumerate(table.take(name, list, [])):
                kept = {key: value for key, value in as_object(one).items() if key in known}
                if kept.get("delete") is not True:
                    kept.pop("delete", None)
                name_is_good = (
                    re.fullmatch(r"(/([^~/]|~[01])*)+", str(kept.get(first)))
                    if first == "pointer"
                    else isinstance(kept.get("value", ""), str) and kept.get(first)
                )
                if not name_is_good or ("value" in kept) is ("delete" in kept):
                    said = f"expected {first}, and value or delete"
                    self.note("warning", (*table.path, f"{name}[{i}]"), said)
                    continue
                entries.append(_escaped_variables(kept))
            if entries:
                out[name] = entries
        return out

    def _deadlines(self, table: _Table) -> JsonObject:
        timeouts = table.table("timeouts")
        out: JsonObject = {}
        whole, streamed = timeouts.table("non_streaming"), timeouts.table("streaming")
        if total := whole.take("total_ms", float, 0.0):
            out["total_s"] = total / 1000
        if first := streamed.take("ttft_ms", float, 0.0):
            out["first_token_s"] = first / 1000
        if "total_ms" in streamed.left:
            del streamed.left["total_ms"]
            said = "a stream may go on for as long as something comes (upstream.timeouts.idle_s)"
            self.note("note", (*streamed.path, "total_ms"), said)
        whole.end()
        streamed.end()
        timeouts.end()
        if alone := table.take("timeout_ms", float, 0.0):
            out["total_s"] = alone / 1000
        return {"timeouts": out} if out else {}

    def _pricing(self, table: _Table) -> JsonObject:
        """US dollars per million tokens, of rates that point into a provider's answer."""
        rates: JsonObject = {}
        for i, one in enumerate(table.take("cost", list, [])):
            facts = as_object(one)
            pointer = str(
                facts.get("pointer")
                or facts.get("pointer_non_streaming")
                or facts.get("pointer_nonstreaming")
                or ""
            )
            rate = facts.get("cost_per_million")
            name = next((n for end, n in _TZ_COSTS.items() if pointer.endswith(end)), "")
            if not name or isinstance(rate, bool) or not isinstance(rate, int | float):
                said = f"a cost by {show_json(pointer)} has no counterpart; prices are per token"
                self.note("warning", (*table.path, f"cost[{i}]"), said)
                continue
            rates[name] = float(rate)
        if rates.get("cache_read", 0) < 0:  # a rebate on what counts as input, too
            rates["cache_read"] = round(rates["cache_read"] + rates.get("input", 0.0), 9)
        if any(rate < 0 for rate in rates.values()):
            self.note("warning", (*table.path, "cost"), "a negative rate has no counterpart")
            return {}
        return rates

    def _price(self, provider: str, service: str, pricing: JsonObject) -> None:
        given = self._providers.setdefault(provider, {})
        models = given.setdefault("models", [])
        if not any(one["id"] == service for one in models):
            models.append({"id": service, "pricing": pricing})

    # Functions, and the presets that they become.

    def _tool(self, name: str, table: _Table) -> None:
        schema = table.take("parameters", str, "")
        function: JsonObject = {"name": table.take("name", str, name)}
        function["description"] = table.take("description", str, "")
        function["parameters"] = self._json_of((*table.path, "parameters"), schema) or {}
        if table.take("strict", bool, False):
            function["strict"] = True
        table.end()
        self._tools[name] = _escaped_variables({"type": "function", "function": function})

    def _function(self, name: str, table: _Table) -> None:
        kind = table.take("type", str, "chat")
        shared: JsonObject = {}
        tools = [str(tool) for tool in table.take("tools", list, [])]
        for tool in tools:
            if tool not in self._tools:
                self.note("warning", (*table.path, "tools"), f"there is no tool {tool}")
        if known := [self._tools[tool] for tool in tools if tool in self._tools]:
            shared["tools"] = known
        if (choice := table.left.pop("tool_choice", None)) is not None and known:
            specific = dig(choice, "specific")
            shared["tool_choice"] = (
                {"type": "function", "function": {"name": specific}} if specific else choice
            )
        if "parallel_tool_calls" in table.left:
            shared["parallel_tool_calls"] = table.take("parallel_tool_calls", bool, True)
        schema = None
        if output := table.take("output_schema", str, ""):
            schema = self._json_of((*table.path, "output_schema"), output)
        weights, fallbacks = self._experiment(table)
        variants: dict[str, float] = {}
        for variant, inner in table.table("variants").tables():
            weight = inner.left.pop("weight", None)
            if self._variant(name, variant, inner, kind, schema, shared):
                variants[variant] = float(weight) if isinstance(weight, int | float) else 1.0
        table.end(_TZ_FUNCTION_KEYS)
        self._preset_of(name, kind, table.path, variants, weights, fallbacks)

    def _preset_of(
        self,
        name: str,
        kind: str,
        path: _TzPath,
        variants: Mapping[str, float],
        weights: Mapping[str, float] | None,
        fallbacks: list[str],
    ) -> None:
        if not variants:
            self.note("warning", path, "no variant could be carried over: it is left out")
            return
        if weights is None:
            chosen = {v: w for v, w in variants.items() if v not in fallbacks}
        else:
            chosen = {v: weights[v] for v in sorted(weights) if v in variants}
        if not any(chosen.values()):
            chosen = dict.fromkeys(chosen or variants, 1.0)
        ours = preset_name(name)
        preset: JsonObject = {"output": "json"} if kind == "json" else {}
        preset |= {
            "candidates": [
                {"preset": preset_name(f"{name}.{v}"), "weight": w} for v, w in chosen.items()
            ]
        }
        if later := [f"@{preset_name(f'{name}.{v}')}" for v in fallbacks if v in variants]:
            preset["fallbacks"] = later
        self._presets[ours] = preset
        self._reasons["presets", ours] = self.where(path)
        self._edits[f"tensorzero::function_name::{name}"] = f"@{ours}"

    def _experiment(self, table: _Table) -> tuple[dict[str, float] | None, list[str]]:
        """The weights of a function's variants, None for equal ones, and its fallbacks."""
        if "experimentation" not in table.left:
            return None, []
        given = table.table("experimentation")
        kind = given.take("type", str, "uniform")
        candidates = given.left.pop("candidate_variants", given.left.pop("candidates", None))
        fallbacks = [str(one) for one in given.take("fallback_variants", list, [])]
        if kind not in ("static", "uniform", "static_weights"):
            said = f"{kind}: nothing is learnt here; the candidates have equal weights"
            self.note("warning", (*given.path, "type"), said)
            for key in list(given.left):
                if key != "namespaces":
                    del given.left[key]
        given.end({"namespaces": ("warning", "there are no namespaces")})
        if isinstance(candidates, dict):
            return {
                str(v): float(w) if isinstance(w, int | float) else 1.0
                for v, w in candidates.items()
            }, fallbacks
        if isinstance(candidates, list) and candidates:
            return {str(variant): 1.0 for variant in candidates}, fallbacks
        return None, fallbacks

    def _variant(
        self,
        function: str,
        variant: str,
        table: _Table,
        kind: str,
        schema: JsonObject | None,
        shared: JsonObject,
    ) -> bool:
        """Whether a variant has become a preset."""
        sort = table.take("type", str, "chat_completion")
        if sort != "chat_completion":
            said = f"{sort}: not shipped; its candidates are presets of their own"
            if sort not in _TZ_VARIANTS_WITHOUT:
                said = f"{sort}: no type of variant is called so"
            self.note("warning", (*table.path, "type"), said)
            return False
        model = self._model_id(table.take("model", str, ""), (*table.path, "model"))
        preset: JsonObject = {"model": model} if model else {}
        params = self._sampling(table, model)
        params |= shared
        params |= self._format(table, kind, schema, preset)
        retries = table.table("retries")
        count, most = retries.take("num_retries", int, 0), retries.take("max_delay_s", float, 10.0)
        retries.end()
        if count:
            preset["retry"] = {"max": count, "max_ms": most * 1000}
        preset |= self._edits_of(table) | self._deadlines(table)
        if params:
            preset["params"] = params
        self._prompts(table, preset)
        table.end({
            "weight": ("info", "see the candidates"),
            "namespace": ("warning", "there are no namespaces"),
            "input_wrappers": ("warning", "wrap the text in the application"),
        })  # fmt: skip
        if not model:
            return False
        ours = preset_name(f"{function}.{variant}")
        self._presets[ours] = preset
        self._reasons["presets", ours] = self.where(table.path)
        return True

    def _model_id(self, name: str, path: _TzPath) -> str:
        if name in self._models:
            return name
        ours, responses = shorthand(name)
        if ours and responses:
            given = {"api_key": "${OPENAI_API_KEY}", "api_protocol": "responses"}
            given["derives"] = "openai"
            provider = self._named_provider("openai", "openai-responses", "openai", given, path)
            return f"{provider}:{ours.removeprefix('openai/')}"
        if ours:
            return ours
        self.note("warning", path, f"{show_json(name)} could not be carried over")
        return ""

    def _sampling(self, table: _Table, model: str) -> JsonObject:
        params: JsonObject = {}
        for theirs, ours in TZ_PARAMS.items():
            if theirs in table.left:
                params[ours] = table.left.pop(theirs)
        kind = self._kinds.get(model, "")
        budget = table.take("thinking_budget_tokens", int, 0)
        if budget and (kind in _TZ_BUDGETED or model.startswith(("anthropic/", "google/"))):
            params["reasoning"] = {"max_tokens": budget}
        elif budget:
            said = "the model's provider knows no budget, and was sent none"
            self.note("info", (*table.path, "thinking_budget_tokens"), said)
        spelt = _TZ_TYPES[kind].limit if kind in _TZ_TYPES else ""
        spelt_long = model.startswith(("openai/", "openai-responses:"))
        if "max_tokens" in params and (spelt_long or spelt == "max_completion_tokens"):
            params["max_completion_tokens"] = params.pop("max_tokens")
        return params

    def _format(
        self, table: _Table, kind: str, schema: JsonObject | None, preset: JsonObject
    ) -> JsonObject:
        mode = table.take("json_mode", str, "strict" if kind == "json" else "")
        if mode in ("strict", "tool") and (schema is not None or kind == "json"):
            told = {"name": "response", "strict": True, "schema": schema or {}}
            if mode == "tool":
                preset["structured"] = "tool"
            return {"response_format": {"type": "json_schema", "json_schema": told}}
        if mode == "on":
            return {"response_format": {"type": "json_object"}}
        return {}

    def _prompts(self, table: _Table, preset: JsonObject) -> None:
        templates: dict[str, str] = {}
        for role in ("system", "user", "assistant"):
            if (name := table.take(f"{role}_template", str, "")) and (
                text := self._text_of((*table.path, f"{role}_template"), name)
            ) is not None:
                templates[role] = text
        for name, inner in table.table("templates").tables():
            path = inner.take("path", str, "")
            text = self._text_of((*inner.path, "path"), path) if path else None
            inner.end()
            if text is not None:
                templates[name] = text
        self._include(table.path, templates)
        system = templates.get("system")
        if system is not None and is_static(system):
            del templates["system"]
            if system.removesuffix("\n"):
                preset["system_prompt"] = system.removesuffix("\n").replace("${", "$${")
                preset["system_mode"] = "prepend"
        for name, text in templates.items():
            try:
                parse_template(text)
            except TemplateError as exc:
                self.note(
                    "warning", table.path, f"the template {name} uses more than we have: {exc}"
                )
        if templates:
            preset["templates"] = {name: t.replace("${", "$${") for name, t in templates.items()}

    def _include(self, path: _TzPath, templates: dict[str, str]) -> None:
        """Templates that templates include."""
        waiting = list(templates.values())
        while waiting:
            for found in re.finditer(r"\{%-?\s*include\s+[\"']([^\"']+)[\"']", waiting.pop()):
                name = found[1]
                if name in templates or len(templates) > 100:
                    continue
                base = as_object(self._tree.get("gateway")).get("template_filesystem_access")
                root = str(dig(base, "base_path") or "")
                place = f"{root.rstrip('/')}/{name}" if root else name
                text = self._text_of(path, place)
                if text is not None:
                    templates[name] = text
                    waiting.append(text)

    # The result.

    def _check(self) -> None:
        """Leave out what no other part of our configuration could stand on."""
        for name in list(self._presets):
            kept = [
                one
                for one in self._presets[name].get("candidates", ())
                if one["preset"] in self._presets
            ]
            if "candidates" in self._presets[name]:
                self._presets[name]["candidates"] = kept

    def _written(self) -> str:
        sections: list[tuple[_TzPath, JsonObject, str]] = []
        if self._server:
            sections.append((("server",), self._server, self.where(("gateway",))))
        if self._timeouts:
            sections.append((("upstream", "timeouts"), self._timeouts, self.where(("gateway",))))
        for section, entries in (
            ("providers", self._providers), ("models", self._models), ("presets", self._presets),
        ):  # fmt: skip
            for name in sorted(entries):
                why = self._reasons.get((section, name), "")
                sections.append(((section, name), entries[name], why))
        head = (
            "# Written by `bitrouter migrate tensorzero`; keys are not in it, only their names.\n"
        )
        return head + "".join(_toml_section(*section) for section in sections)


# Where a credential or an endpoint comes from, as TensorZero says it and as we do.
_TZ_SOURCES = {
    "env": "${{{}}}", "path": "file:{}", "path_from_env": "file:${{{}}}", "dynamic": "request:{}",
}  # fmt: skip
_TZ_COSTS = {
    "/prompt_tokens": "input", "/input_tokens": "input", "/completion_tokens": "output",
    "/output_tokens": "output", "/cached_tokens": "cache_read",
    "/cache_read_input_tokens": "cache_read", "/cache_creation_input_tokens": "cache_write",
    "/promptTokenCount": "input", "/candidatesTokenCount": "output",
    "/cachedContentTokenCount": "cache_read",
}  # fmt: skip


def _escaped_variables(value: Json) -> Json:
    """JSON whose strings mean themselves in our configuration."""
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, list):
        return [_escaped_variables(one) for one in value]
    if isinstance(value, dict):
        return {key: _escaped_variables(one) for key, one in value.items()}
    return value


def _toml_section(path: _TzPath, table: JsonObject, why: str) -> str:
    name = ".".join(_toml_key(part) for part in path)
    lines = [f"\n[{name}]  # {printable(why)}" if why else f"\n[{name}]"]
    lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


_RAW = "'" * 3  # around text of several lines that means itself


def _toml_key(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _toml_value(text)


def _toml_value(value: Json) -> str:
    if isinstance(value, str):
        plain = not re.search(r"[^\t\n\x20-\x7e\x80-\U0010ffff]|'{3}", value)
        if "\n" in value and plain and not value.endswith("'"):
            return f"{_RAW}\n{value}{_RAW}"
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(one) for one in value if one is not None) + "]"
    if isinstance(value, dict):
        inner = (f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(inner) + "}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{value:.1f}"
    return json.dumps(value) if isinstance(value, bool | int | float) else json.dumps(str(value))


# ---------------------------------------------------------------------------------------------
# 26. bridge: TensorZero's clients, unchanged (pure)
# ---------------------------------------------------------------------------------------------
# Names and fields that begin with `tensorzero::`, and the native POST /inference, become requests
# of Chat Completions with wishes of their own; answers go back under TensorZero's names.
#
# wire: TensorZero 2026.6.0, as its gateway was seen to answer, and its API reference, 2026-11

_TZ = "tensorzero::"
NATIVE_PATH = "/inference"


class ScopedEdit(NamedTuple):
    """A change of the body or of the headers that a request asks for, and for which targets."""

    name: str  # a header, or a pointer
    value: Json = None
    delete: bool = False
    variant: str = ""
    model: str = ""
    endpoint: str = ""

    def fits(self, target: Target) -> bool:
        return (
            (not self.variant or target.preset.endswith(f".{self.variant}"))
            and (not self.model or self.model in (target.virtual, target.model))
            and (not self.endpoint or self.endpoint in (target.endpoint, target.provider))
        )


class Bridge(NamedTuple):
    """What a request in TensorZero's words asks for beside what Chat Completions can say.

    Attributes:
        ident: of the inference.
        asked: how the model was named, with its prefix.
        function: its name; "" for a model.
        native: it came to /inference.
        json: a native answer is JSON with its parsed form.
        wants: further parts of the answer.
        responses: OpenAI is to be asked by its Responses API.
    """

    ident: str
    episode: str
    asked: str
    function: str = ""
    native: bool = False
    json: bool = False
    credentials: Mapping[str, str] = {}
    body_edits: tuple[ScopedEdit, ...] = ()
    header_edits: tuple[ScopedEdit, ...] = ()
    wants: frozenset[str] = frozenset()
    responses: bool = False

    @property
    def share(self) -> float:
        """The number from [0, 1) by which an episode's variant is drawn."""
        mark = self.function.encode() + bytes.fromhex(self.episode.replace("-", ""))
        return int.from_bytes(hashlib.sha256(mark).digest()[:4]) / 2**32

    def variant(self, target: Target) -> str:
        if not self.function:
            return target.virtual or target.model
        return target.preset.removeprefix(f"{preset_name(self.function)}.")

    def echoed(self, target: Target) -> str:
        """The model's name in answers."""
        if not self.function:
            return self.asked
        inner = target.preset != preset_name(self.function)
        return f"{self.asked}::variant_name::{self.variant(target)}" if inner else self.asked


def is_bridged(body: JsonObject, model: str) -> bool:
    return model.startswith(_TZ) or any(name.startswith(_TZ) for name in body)


def bridge_of(
    body: JsonObject, model: str, config: Config, new_id: Callable[[], str], *, native: bool = False
) -> tuple[Bridge, str]:
    """What a request asks for, and our own id for its model. Raises BadRequest or NotFound."""
    options = {
        name.removeprefix(_TZ): value for name, value in body.items() if name.startswith(_TZ)
    }
    kind, name = _named_kind(model)
    variant = options.get("variant_name")
    responses = False
    if kind == "function_name":
        ours = _function(name, variant, config)
    elif kind == "embedding_model_name":
        ours = next((one for one in (f"embedding/{name}", name) if one in config.models), "")
        ours = ours or shorthand(name)[0] or name
    else:
        ours = name if name in config.models else ""
        if not ours:
            ours, responses = shorthand(name)
        ours = ours or name
    if options.get("internal_dynamic_variant_config") is not None:
        raise _not_shipped("internal_dynamic_variant_config")
    function = name if kind == "function_name" else ""
    preset = config.presets.get(preset_name(function)) if function else None
    return Bridge(
        new_id(),
        _episode(options.get("episode_id")) or new_id(),
        model if model.startswith(_TZ) else f"{_TZ}{kind}::{name}",
        function,
        native,
        preset is not None and preset.output == "json",
        _strings_of(options.get("credentials"), "credentials"),
        _scoped(options.get("extra_body"), "extra_body", "pointer") + _tools(options),
        _scoped(options.get("extra_headers"), "extra_headers", "name"),
        frozenset(w for w in _TZ_WANTS if options.get(f"include_{w}") is True),
        responses,
    ), ours


_TZ_WANTS = ("raw_response", "raw_usage", "original_response")
_TZ_KINDS = ("function_name", "model_name", "embedding_model_name")


def _named_kind(model: str) -> tuple[str, str]:
    rest = model.removeprefix(_TZ)
    for kind in _TZ_KINDS:
        if model.startswith(_TZ) and rest.startswith(f"{kind}::"):
            return kind, rest.removeprefix(f"{kind}::")
    # as clients of before 2025-02 name functions
    return ("function_name", rest) if model.startswith(_TZ) else ("model_name", model)


def _function(name: str, variant: Json, config: Config) -> str:
    ours = preset_name(name)
    if ours not in config.presets:
        near = near_misses(name, config.presets, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise NotFound(f"Unknown function: {printable(name, 64)}{hint}", param="model")
    if variant is None:
        return f"@{ours}"
    pinned = preset_name(f"{name}.{variant}")
    if pinned not in config.presets:
        raise NotFound(
            f"Unknown variant: {printable(str(variant), 64)}", param=f"{_TZ}variant_name"
        )
    return f"@{pinned}"


def _episode(value: Json) -> str:
    """An episode's id, which is a UUID of version 7."""
    if value is None:
        return ""
    where = f"{_TZ}episode_id"
    plain = value.lower() if isinstance(value, str) else ""
    plain = plain.removeprefix("urn:uuid:").strip("{}").replace("-", "")
    if not re.fullmatch(r"[0-9a-f]{12}7[0-9a-f]{19}", plain):
        raise BadRequest(
            f"{where}: expected a UUID of version 7, got {show_json(value)}", param=where
        )
    return "-".join((plain[:8], plain[8:12], plain[12:16], plain[16:20], plain[20:]))


def uuid7(now_ms: int, random_bits: int) -> str:
    """RFC 9562, 5.7."""
    number = (now_ms & (2**48 - 1)) << 80 | random_bits & (2**80 - 1)
    number = number & ~(0xF << 76) | 7 << 76
    number = number & ~(0x3 << 62) | 2 << 62
    plain = f"{number:032x}"
    return "-".join((plain[:8], plain[8:12], plain[12:16], plain[16:20], plain[20:]))


def _strings_of(value: Json, name: str) -> dict[str, str]:
    if value is None:
        return {}
    given = typed(value, dict, f"{_TZ}{name}")
    return {str(key).lower(): str(one) for key, one in given.items()}


def _scoped(value: Json, option: str, first: str) -> tuple[ScopedEdit, ...]:
    edits = []
    for where, one in each_object(value, f"{_TZ}{option}"):
        name = typed(one.get(first), str, f"{where}.{first}")
        delete = one.get("delete") is True
        if delete is ("value" in one):
            raise BadRequest(f"{where}: expected value, or delete = true", param=where)
        if first == "pointer" and not name.startswith("/"):
            raise BadRequest(f"{where}.pointer: expected a JSON pointer", param=where)
        if first == "name":
            _check_header(name, one.get("value"), where)
        edits.append(ScopedEdit(
            name, one.get("value"), delete, str(one.get("variant_name") or ""),
            str(one.get("model_name") or ""),
            str(one.get("provider_name") or one.get("model_provider_name") or ""),
        ))  # fmt: skip
    return tuple(edits)


def _check_header(name: str, value: Json, where: str) -> None:
    text = "" if value is None else typed(value, str, f"{where}.value")
    if not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) or not is_header_text(text):
        raise BadRequest(f"{where}: not fit for an HTTP header", param=where)
    if name.lower() in OUR_HEADERS:
        raise BadRequest(f"{where}: this header is not yours to set", param=where)


def _tools(options: JsonObject) -> tuple[ScopedEdit, ...]:
    """Tools that a provider runs itself, for some of the targets."""
    edits = []
    for where, one in each_object(options.get("provider_tools"), f"{_TZ}provider_tools"):
        scope = as_object(one.get("scope"))
        tool = typed(one.get("tool"), dict, f"{where}.tool")
        model, provider = str(scope.get("model_name") or ""), scope.get("provider_name")
        endpoint = str(provider or scope.get("model_provider_name") or "")
        edits.append(ScopedEdit("/tools/-", tool, model=model, endpoint=endpoint))
    return tuple(edits)


def _not_shipped(what: str) -> BadRequest:
    return BadRequest(f"{_TZ}{what}: this is not shipped", param=f"{_TZ}{what}")


# A request, without what only TensorZero understands.

# What its OpenAI route knows. wire: TensorZero 2026.6.0, seen to refuse all others
_TZ_FIELDS = {
    "model", "messages", "frequency_penalty", "max_tokens", "max_completion_tokens",
    "presence_penalty", "response_format", "seed", "stream", "stream_options", "temperature",
    "tools", "tool_choice", "top_p", "parallel_tool_calls", "stop", "reasoning_effort",
    "service_tier", "verbosity",
}  # fmt: skip


def bridged_changes(body: JsonObject, model: str, preset: Preset | None) -> Iterator[Change]:
    """What makes of a request one of Chat Completions. preset: that of its function."""
    if body.get(f"{_TZ}deny_unknown_fields") is True:
        known = {name for name in body if name.startswith(_TZ)} | _TZ_FIELDS
        if unknown := sorted(set(body) - known):
            said = f"{_TZ}deny_unknown_fields is set, and these fields are not known: "
            raise BadRequest(said + ", ".join(map(printable, unknown)), param=printable(unknown[0]))
    for name in body:
        if name.startswith(_TZ):
            yield Change(f"/{name}", delete=True)
    yield Change("/model", model)
    wanted = as_object(dig(body, f"{_TZ}params", "chat_completion"))
    for theirs, value in wanted.items():
        ours = TZ_PARAMS.get(theirs)
        if ours and value is not None:
            if ours == "max_tokens" and "max_completion_tokens" in body:
                ours = "max_completion_tokens"
            yield Change(f"/{ours}", value)
    shared = preset.params.get("tools") if preset else None
    if isinstance(shared, list) and isinstance(body.get("tools"), list):
        yield Change("/tools", [*shared, *body["tools"]])


# The native request, as one of Chat Completions.

_NATIVE_FIELDS = {
    "function_name", "model_name", "input", "episode_id", "stream", "params", "variant_name",
    "dryrun", "tags", "allowed_tools", "additional_tools", "tool_choice", "parallel_tool_calls",
    "provider_tools", "output_schema", "cache_options", "credentials", "extra_body",
    "extra_headers", "namespace", "include_raw_response", "include_raw_usage",
    "include_original_response", "include_aggregated_response", "internal_dynamic_variant_config",
    "internal",
}  # fmt: skip
_NATIVE_OPTIONS = _NATIVE_FIELDS - {
    "function_name", "model_name", "input", "stream", "additional_tools", "tool_choice",
    "parallel_tool_calls", "output_schema", "allowed_tools",
}  # fmt: skip


def native_as_chat(body: JsonObject) -> JsonObject:
    """POST /inference as a request of Chat Completions with fields of TensorZero's. Raises
    BadRequest, naming the field."""
    if unknown := sorted(set(body) - _NATIVE_FIELDS):
        near = near_misses(unknown[0], _NATIVE_FIELDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        name = printable(unknown[0], 64)
        raise BadRequest(f"{name}: this field is not known{hint}", param=name)
    function, model = maybe(body, "function_name", str), maybe(body, "model_name", str)
    if bool(function) is bool(model):
        raise BadRequest("expected function_name or model_name, one of them", param="model_name")
    given = typed(body.get("input"), dict, "input")
    name = f"function_name::{function}" if function else f"model_name::{model}"
    chat: JsonObject = {"model": _TZ + name, "messages": list(_native_messages(given))}
    chat |= {_TZ + key: body[key] for key in _NATIVE_OPTIONS if body.get(key) is not None}
    if body.get("stream") is True:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    if tools := [_native_tool(one, where) for where, one in each_object(
        body.get("additional_tools"), "additional_tools")]:  # fmt: skip
        chat["tools"] = tools
    if (choice := body.get("tool_choice")) is not None:
        specific = dig(choice, "specific")
        named = {"type": "function", "function": {"name": specific}}
        chat["tool_choice"] = named if specific else choice
    if body.get("parallel_tool_calls") is not None:
        chat["parallel_tool_calls"] = body["parallel_tool_calls"]
    if schema := maybe(body, "output_schema", dict):
        told = {"name": "response", "strict": True, "schema": schema}
        chat["response_format"] = {"type": "json_schema", "json_schema": told}
    return chat


def _native_tool(tool: JsonObject, where: str) -> JsonObject:
    function: JsonObject = {"name": typed(tool.get("name"), str, f"{where}.name")}
    function["description"] = maybe(tool, "description", str) or ""
    function["parameters"] = maybe(tool, "parameters", dict) or {}
    if tool.get("strict") is True:
        function["strict"] = True
    return {"type": "function", "function": function}


def _native_messages(given: JsonObject) -> Iterator[JsonObject]:
    system = given.get("system")
    if system is not None:
        content = [{_ARGUMENTS: system}] if isinstance(system, dict) else system
        yield {"role": "system", "content": content}
    for where, message in each_object(given.get("messages"), "input.messages"):
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            said = f"{where}.role: expected user or assistant, got {show_json(role)}"
            raise BadRequest(said, param=f"{where}.role")
        if isinstance(content, str):
            yield {"role": role, "content": content}
        elif isinstance(content, dict):
            yield {"role": role, "content": [{_ARGUMENTS: content}]}
        else:
            yield from _native_turn(str(role), content, f"{where}.content")


def _native_turn(role: str, content: Json, where: str) -> Iterator[JsonObject]:
    """One message; results of tools are messages of their own in Chat Completions."""
    parts: list[JsonObject] = []
    calls: list[JsonObject] = []
    thoughts = ""
    for here, block in each_object(content, where):
        kind = block.get("type")
        if kind == "tool_call":
            arguments = block.get("raw_arguments", block.get("arguments"))
            text = arguments if isinstance(arguments, str) else _ASCII_JSON_OF(arguments or {})
            name = str(block.get("name") or block.get("raw_name") or "")
            function = {"name": name, "arguments": text}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif kind == "tool_result":
            result = block.get("result")
            text = result if isinstance(result, str) else _ASCII_JSON_OF(result)
            yield {"role": "tool", "tool_call_id": str(block.get("id")), "content": text}
        elif kind == "thought":
            thoughts += str(block.get("text") or "")
        else:
            parts.append(_native_part(block, here))
    if parts or calls or thoughts:
        message: JsonObject = {"role": role, "content": parts or None}
        message |= {"tool_calls": calls} if calls else {}
        message |= {"reasoning_content": thoughts} if thoughts else {}
        yield message


_ASCII_JSON_OF = json.JSONEncoder(separators=(",", ":")).encode


def _native_part(block: JsonObject, where: str) -> JsonObject:
    kind = block.get("type")
    if kind in _NATIVE_PARTS:
        return _NATIVE_PARTS[kind](block, where)
    raise BadRequest(
        f"{where}.type: expected {', '.join(_NATIVE_PARTS)}, tool_call, tool_result or thought; "
        f"got {show_json(kind)}",
        param=f"{where}.type",
    )


def _native_text(block: JsonObject, where: str) -> JsonObject:
    given = block.get("arguments", block.get("text", block.get("value")))
    if isinstance(given, dict):
        return {_ARGUMENTS: given}
    return {"type": "text", "text": typed(given, str, f"{where}.text")}


def _native_file(block: JsonObject, where: str) -> JsonObject:
    mime, data = str(block.get("mime_type") or ""), block.get("data")
    url = data_url(Media("", mime, data)) if isinstance(data, str) else block.get("url")
    url = typed(url, str, f"{where}.url")
    if (mime or mime_of_path(url) or "image/").startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    name = str(block.get("filename") or "file")
    return {"type": "file", "file": {"file_data": url, "filename": name}}


_NATIVE_PARTS: dict[Any, Callable[[JsonObject, str], JsonObject]] = {
    "text": _native_text,
    "raw_text": lambda block, _: {"type": f"{_TZ}raw_text", "value": block.get("value")},
    "template": lambda block, _: {**block, "type": f"{_TZ}template"},
    "file": _native_file,
    "image": _native_file,
    "unknown": lambda block, where: typed(block.get("data"), dict, f"{where}.data"),
}


# Templates, filled in with the arguments that a request sends.

_ARGUMENTS = f"{_TZ}arguments"


def filled_messages(body: JsonObject, templates: Mapping[str, str]) -> list[Json] | None:
    """A request's messages with its templates filled in; None if nothing is to be. Raises
    BadRequest for what a template lacks."""
    messages = as_list(body.get("messages"))
    new: list[Json] = []
    for n, message in enumerate(messages):
        role = str(dig(message, "role"))
        where = f"messages[{n}].content"
        content = dig(message, "content")
        if isinstance(content, str) and role in templates:
            text = _filled(templates, role, {f"{role}_text": content}, where)
            new.append({**message, "content": text})
        elif isinstance(content, list):
            parts = [
                _filled_part(part, role, templates, f"{where}[{i}]")
                for i, part in enumerate(content)
            ]
            told = parts[0]["text"] if len(parts) == 1 and _is_text(parts[0]) else parts
            new.append({**message, "content": content if parts == content else told})
        else:
            new.append(message)
    if "system" in templates and not any(dig(m, "role") in SYSTEM_ROLES for m in messages):
        text = _filled(templates, "system", {"system_text": None}, "messages")
        new.insert(0, {"role": "system", "content": text})
    return None if new == messages else new


def _is_text(part: Json) -> bool:
    return isinstance(part, dict) and {*part} == {"type", "text"} and part["type"] == "text"


def _filled_part(part: Json, role: str, templates: Mapping[str, str], where: str) -> Json:
    facts = as_object(part)
    kind = facts.get("type")
    if kind == f"{_TZ}raw_text":
        return {"type": "text", "text": typed(facts.get("value"), str, f"{where}.value")}
    name, given = role, facts  # as clients of before 2025 send arguments
    if kind == f"{_TZ}template":
        name = typed(facts.get("name"), str, f"{where}.name")
        given = maybe(facts, "arguments", dict) or {}
    elif _ARGUMENTS in facts:
        given = typed(facts[_ARGUMENTS], dict, f"{where}.{_ARGUMENTS}")
    elif _is_text(part) and role in templates:
        given = {f"{role}_text": facts["text"]}
    elif not facts or "type" in facts:
        return part
    return {"type": "text", "text": _filled(templates, name, given, where)}


def _filled(templates: Mapping[str, str], name: str, given: JsonObject, where: str) -> str:
    if name not in templates:
        raise BadRequest(f"{where}: there is no template {printable(name, 64)}", param=where)
    try:
        return render_template(templates[name], given, templates)
    except TemplateError as error:
        raise BadRequest(f"{where}: the template {name}: {error}", param=where) from None


# Answers.


def bridged_answer(
    value: JsonObject, bridge: Bridge, target: Target, cost_usd: float | None
) -> JsonObject:
    """An answer, or an event, of Chat Completions under TensorZero's names."""
    if "choices" not in value and "data" not in value:
        return value
    told: JsonObject = {**value, "model": bridge.echoed(target)}
    if "choices" in value:
        told |= {"id": bridge.ident, "episode_id": bridge.episode}
        told["system_fingerprint"] = value.get("system_fingerprint") or ""
        told["service_tier"] = value.get("service_tier")
    if isinstance(value.get("usage"), dict):
        told["usage"] = {**value["usage"], "tensorzero_cost": cost_usd}
    return told


class BridgedEncoder:
    """The encoder of Chat Completions, with each event's names changed."""

    def __init__(self, inner: StreamEncoder, change: Callable[[JsonObject], JsonObject]) -> None:
        self._inner = inner
        self._change = change

    def encode(self, part: StreamPart) -> bytes:
        return self._changed(self._inner.encode(part))

    def end(self, usage: Usage) -> bytes:
        return self._changed(self._inner.end(usage))

    def fail(self, error: BitrouterError) -> bytes:
        return self._inner.fail(error)

    def _changed(self, events: bytes) -> bytes:
        out = []
        for raw in split_events(events):
            event = parse_event(raw)
            value = object_in(event.data.decode()) if event else None
            changed = value is not None and "choices" in value
            out.append(sse_encode(compact(self._change(value or {}))) if changed else raw)
        return b"".join(out)


_NATIVE_FINISHES = {
    Finish.STOP: "stop", Finish.STOP_SEQUENCE: "stop_sequence", Finish.LENGTH: "length",
    Finish.CONTEXT_WINDOW: "length", Finish.TOOL_CALLS: "tool_call",
    Finish.CONTENT_FILTER: "content_filter", Finish.REFUSAL: "content_filter",
}  # fmt: skip


def native_answer(
    choices: list[Choice], usage: Usage, bridge: Bridge, variant: str, cost_usd: float | None
) -> JsonObject:
    """An answer as POST /inference gives it."""
    [choice, *_] = choices
    facts: JsonObject = {
        "inference_id": bridge.ident, "episode_id": bridge.episode, "variant_name": variant,
    }  # fmt: skip
    if bridge.json:
        raw = "".join(block.text for block in choice.content if isinstance(block, Text))
        facts["output"] = {"raw": raw, "parsed": object_in(raw)}
    else:
        facts["content"] = [_native_block(block) for block in choice.content]
    facts["usage"] = _native_usage(usage, cost_usd)
    facts["finish_reason"] = _NATIVE_FINISHES.get(choice.finished.finish, "unknown")
    return facts


def _native_usage(usage: Usage, cost_usd: float | None) -> JsonObject:
    counts = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
    return {**counts, "cost": cost_usd}


def _native_block(block: Block) -> JsonObject:
    match block:
        case ToolCall():
            parsed = object_in(block.arguments or "{}")
            call = {"type": "tool_call", "id": block.id, "raw_name": block.name}
            call |= {"raw_arguments": block.arguments or "{}", "name": block.name}
            return {**call, "arguments": parsed}
        case Reasoning(text, opaque):
            return {"type": "thought", "text": text, "signature": opaque.data if opaque else None}
        case Media():
            return {"type": "unknown", "data": {"mime_type": block.mime}}
    return {"type": "text", "text": block.text}


class NativeEncoder:
    """The events of a streamed POST /inference."""

    def __init__(self, bridge: Bridge, variant: str, cost: Callable[[Usage], float | None]) -> None:
        self._bridge = bridge
        self._cost = cost
        self._head: JsonObject = {
            "inference_id": bridge.ident, "episode_id": bridge.episode, "variant_name": variant,
        }  # fmt: skip
        self._blocks: dict[int, Block] = {}
        self._finish = "stop"

    def encode(self, part: StreamPart) -> bytes:
        match part:
            case Open(key, block):
                self._blocks[key] = block
                return self._call(block, "") if isinstance(block, ToolCall) else b""
            case Delta(key, text):
                return self._grown(key, self._blocks[key], text)
            case Finished():
                self._finish = _NATIVE_FINISHES.get(part.finish, "unknown")
        return b""

    def end(self, usage: Usage) -> bytes:
        last: JsonObject = {"usage": _native_usage(usage, self._cost(usage))}
        last["finish_reason"] = self._finish
        return self._event(last, [], "") + b"data: [DONE]\n\n"

    def fail(self, error: BitrouterError) -> bytes:
        return sse_encode(compact({"error": error.message}))

    def _grown(self, key: int, block: Block, text: str) -> bytes:
        if isinstance(block, ToolCall):
            return self._call(block, text)
        if self._bridge.json and isinstance(block, Text):
            return self._event({}, [], text)
        kind = "thought" if isinstance(block, Reasoning) else "text"
        return self._event({}, [{"type": kind, "id": str(key), "text": text}], "")

    def _call(self, call: ToolCall, text: str) -> bytes:
        name = "" if text else call.name
        told = {"type": "tool_call", "id": call.id, "raw_name": name, "raw_arguments": text}
        return self._event({}, [told], "")

    def _event(self, more: JsonObject, content: list[JsonObject], raw: str) -> bytes:
        inner = {"raw": raw} if self._bridge.json else {"content": content}
        return sse_encode(compact({**self._head, **inner, **more}))


# ---------------------------------------------------------------------------------------------
# 27. echo: the built-in model (pure)
# ---------------------------------------------------------------------------------------------
# For trying things out with no key and no network. It repeats what the user said last, word by
# word; `call NAME {json}` makes it call that tool; a JSON schema makes it return the schema's
# smallest instance; who asks it to reason sees it reason.

_CALL = re.compile(r"\bcall\s+([\w.-]{1,128})\s*")
_MAX_SCHEMA_NODES = 1000
_MAX_CALLS_TRIED = 8
_MAX_ECHOED_CHARS = 100_000  # word by word; what is beyond that comes in one piece


def echo_parts(prompt: Prompt) -> tuple[list[StreamPart], Usage]:
    """What the built-in model answers, and the usage that it counts."""
    blocks = _echo_answer(prompt)
    parts: list[StreamPart] = []
    if prompt.thinking.visible or prompt.thinking.effort not in ("", "none"):
        parts += parts_of(Reasoning("The user shall hear what the user said."), -1)
    for key, words in enumerate(blocks):
        if isinstance(words, ToolCall):
            parts += parts_of(words, key)
        else:
            parts += [Open(key, Text()), *(Delta(key, word) for word in words), Close(key)]
    said = sum(len(part.text) for part in parts if isinstance(part, Delta))
    called = any(isinstance(words, ToolCall) for words in blocks)
    usage = Usage(input_tokens=-(-size_of(prompt) // 4), output_tokens=max(1, -(-said // 4)))
    parts.append(Finished(Finish.TOOL_CALLS if called else Finish.STOP))
    return parts, usage


def _echo_answer(prompt: Prompt) -> list[ToolCall | list[str]]:
    """A call, or words."""
    said = [m for m in prompt.messages if m.role == "user"]
    asked = joined_text(said[-1].content, "\n") if said else ""
    tools = {tool.name: tool for tool in prompt.tools if tool.kind != "hosted"}
    for wanted in itertools.islice(_CALL.finditer(asked), _MAX_CALLS_TRIED):
        if wanted[1] in tools:
            with suppress(ValueError, RecursionError):
                rest = asked[wanted.end() : wanted.end() + _MAX_ECHOED_CHARS] or "{}"
                value = first_json(rest if rest.startswith("{") else "{}")
                return [_echo_call(tools[wanted[1]], value, rest)]
    if prompt.output is not None:
        schema = prompt.output.schema
        value = smallest(schema) if schema is not None else {"text": asked}
        return [[json.dumps(value)]]
    text = asked[:_MAX_ECHOED_CHARS]
    told = text.rstrip() or "(nothing was said)"
    *words, last = re.findall(r"\s*\S+", told)
    rest = text[len(told) :] + asked[_MAX_ECHOED_CHARS:]
    return [[*words, last + rest]]


def _echo_call(tool: Tool, value: Json, text: str) -> ToolCall:
    custom = tool.kind == "custom"
    arguments = text if custom else json.dumps(value)
    return ToolCall("call_echo_1", tool.name, arguments, custom, namespace=tool.namespace)


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
# 28. logs: one line per event, for people or for machines
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
# 29. transport: the HTTP client: pool, TLS, proxies, deadlines
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
        self.idle_s = pool_idle_s
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
        if len(idle) < _MAX_IDLE_PER_ORIGIN and self.idle_s > 0:
            idle.append(connection)
            connection.idle_s = connection.limit = NEVER
            connection.deadline = self.sweeper.now + self.idle_s
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
# 30. memory: what is kept of conversations, for a while (pure)
# ---------------------------------------------------------------------------------------------


class Memory:
    """A bounded map whose entries grow old. The least recently used go first."""

    def __init__(self, entries: int, size: int, age_s: float) -> None:
        """entries, size: how much fits in (size is counted by who puts something in); age_s:
        seconds after which an entry is gone."""
        self._entries, self._size, self._age_s = entries, size, age_s
        self._kept: dict[Any, tuple[float, int, Any]] = {}
        self._used = 0

    def put(self, key: Any, value: Any, now: float, size: int) -> None:
        self._drop(key)
        self._kept[key] = (now + self._age_s, size, value)
        self._used += size
        while self._kept and (len(self._kept) > self._entries or self._used > self._size):
            self._drop(next(iter(self._kept)))

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Any, now: float) -> Any:
        """The value; None if there is none."""
        until, _, value = self._kept.get(key, (0.0, 0, None))
        if value is None or until < now:
            self._drop(key)
            return None
        self._kept[key] = self._kept.pop(key)  # to the end: it was used last
        return value

    def _drop(self, key: Any) -> None:
        dropped = self._kept.pop(key, None)
        if dropped:
            self._used -= dropped[1]


# ---------------------------------------------------------------------------------------------
# 31. fetch: media at a URL, for targets that want the bytes
# ---------------------------------------------------------------------------------------------
# A URL in a prompt is a stranger's wish that we connect somewhere. So: https alone, to addresses of
# the public Internet alone, looked up once and then connected to as looked up; few redirects,
# each judged anew; a bound on bytes and on time.

_FETCH_S = 10.0
_FETCH_BYTES = 20 * 1024 * 1024
_FETCH_HOPS = 4
_FETCH_URLS = 20
_FETCH_TOTAL_BYTES = 64 * 1024 * 1024
_FETCHING_AT_ONCE = 8


async def with_fetched_media(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits, allowed: Callable[[str], bool]
) -> Prompt:
    """A prompt without URLs that its target would not follow. Raises BadRequest.

    Args:
        allowed: whether an IP address may be connected to.
    """
    urls = {
        media.url
        for message in prompt.messages
        for part in message.content
        for media in (part.content if isinstance(part, ToolResult) else (part,))
        if isinstance(media, Media) and media.url and _wants_bytes(media, protocol, traits)
    }
    if not urls:
        return prompt
    if len(urls) > _FETCH_URLS:
        said = f"at most {_FETCH_URLS} URLs are fetched for one request; send the bytes instead"
        raise BadRequest(said, code="media_not_fetched")
    fetched = {}
    left = _FETCH_TOTAL_BYTES
    for url in sorted(urls):
        mime, data = await _in_a_thread(fetch_media, url, allowed, min(left, _FETCH_BYTES))
        left -= len(data)
        fetched[url] = (mime, base64.b64encode(data).decode())

    def put(part: Content) -> Content:
        if isinstance(part, ToolResult):
            inner = tuple(put(one) for one in part.content)
            return part._replace(content=tuple(p for p in inner if isinstance(p, Text | Media)))
        if isinstance(part, Media) and part.url in fetched:
            mime, data = fetched[part.url]
            return part._replace(url="", mime=mime or part.mime, data=data)
        return part

    messages = [m._replace(content=tuple(put(p) for p in m.content)) for m in prompt.messages]
    return prompt._replace(messages=tuple(messages))


@functools.cache
def _fetchers() -> Executor:
    """Threads of their own: slow servers must not hold up the look-ups of names."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(_FETCHING_AT_ONCE, "fetch")


async def _in_a_thread(work: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(_fetchers(), work, *args)


def _wants_bytes(media: Media, protocol: ApiProtocol, traits: Traits) -> bool:
    on_chat = protocol is ApiProtocol.CHAT_COMPLETIONS and media.kind != "image"
    return on_chat or not traits.fetches_urls


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet, and any that stands in it too."""
    import ipaddress

    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if int(ip) >> 32 in (0, _NAT64):  # IPv4-compatible (RFC 4291), translated (RFC 6052)
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip.ipv4_mapped or int(ip) >> 32 == _NAT64:
            ip = ipaddress.IPv6Address("2600::")  # the one inside counts
    return all(one is None or (one.is_global and not one.is_multicast) for one in (ip, *inner))


_NAT64 = 0x0064FF9B << 64  # 64:ff9b::/96, without its last 32 bits


def fetch_media(
    url: str, allowed: Callable[[str], bool], most: int = _FETCH_BYTES
) -> tuple[str, bytes]:
    """The media type and the bytes at a URL, at most so many. Blocks. Raises BadRequest."""
    until = time.monotonic() + _FETCH_S
    for _ in range(_FETCH_HOPS):
        status, headers, body = _fetch_once(url, allowed, until, most)
        if status in (301, 302, 303, 307, 308) and headers.get("location"):
            with suppress(ValueError):
                url = urljoin(url, headers["location"])
            continue
        if status != 200:
            raise _unfetched(url, f"the server answered {status}")
        return sniff(body[:64]) or headers.get("content-type", "").partition(";")[0], body
    raise _unfetched(url, "it is redirected too often")


def _fetch_once(
    url: str, allowed: Callable[[str], bool], until: float, most: int
) -> tuple[int, Headers, bytes]:
    import http.client
    import ssl
    import threading

    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises, too
    except ValueError as exc:
        raise _unfetched(url, f"it is no URL: {exc}") from None
    if parts.scheme != "https" or not parts.hostname:
        raise _unfetched(url, "only https:// URLs are fetched", "blocked_url")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
        addresses = [str(info[4][0]) for info in found]
        if not addresses or not all(allowed(address) for address in addresses):
            raise _unfetched(url, "it leads to an address that is not public", "blocked_url")
        left_s = max(0.1, until - time.monotonic())
        plain = socket.create_connection((addresses[0], parts.port or 443), left_s)
        # A timeout of a socket begins anew with every byte; this one does not.
        watch = threading.Timer(left_s, _hang_up, (sockets := [plain],))
        watch.start()
        try:
            context = ssl.create_default_context()
            with context.wrap_socket(plain, server_hostname=parts.hostname) as tls:
                sockets.append(tls)
                connection = http.client.HTTPConnection(parts.hostname, parts.port or 443)
                connection.sock = tls
                path = quote(parts.path or "/", safe=_IN_A_PATH)
                query = f"?{quote(parts.query, safe=_IN_A_PATH + '?')}" if parts.query else ""
                asking = {"accept": "*/*", "user-agent": "bitrouter"}
                connection.request("GET", path + query, headers=asking)
                with connection.getresponse() as response:
                    headers = {name.lower(): value for name, value in response.getheaders()}
                    try:
                        return response.status, headers, _read_until(response, until, url, most)
                    finally:
                        _hang_up(sockets)
        finally:
            watch.cancel()
            plain.close()
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise _unfetched(url, f"{exc.__class__.__name__}: {exc}") from None


_IN_A_PATH = "/%:@!$&'()*+,;=~"


def _hang_up(sockets: list[socket.socket]) -> None:
    with suppress(OSError):
        sockets[-1].shutdown(socket.SHUT_RDWR)


def _read_until(response: http.client.HTTPResponse, until: float, url: str, most: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := response.read1(64 * 1024):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise _unfetched(url, f"there is more than {most >> 20} MB")
        if time.monotonic() > until:
            raise _unfetched(url, f"it takes more than {_FETCH_S:g} s")
    if response.length or time.monotonic() > until:
        raise _unfetched(url, "it breaks off")
    return b"".join(pieces)


def _unfetched(url: str, why: str, code: str = "media_not_fetched") -> BadRequest:
    said = (
        f"{printable(url, 120)} could not be fetched: {printable(why, 120)}; send the bytes instead"
    )
    return BadRequest(said, code=code)


# ---------------------------------------------------------------------------------------------
# 32. runtime: App: everything a request needs
# ---------------------------------------------------------------------------------------------


class App:
    """Put together once, by the command line or by a test.

    Attributes:
        router: replaced whole when local servers come and go.
        no_usage_option: providers that refuse `stream_options`; learned from their refusals.
        refused: provider and its model -> fields that it refused, to be left out from then on.
        states: caller and id of a call -> the reasoning and the state that came with it.
        turns: caller and id of a response -> the messages up to and with it.
        conversations: caller, model and conversation -> the number that was drawn for it, and
            the target that has its prompt cache warm, by its key.
        local: the providers that were found on this machine.
        reload: reads the configuration anew; None if there is nothing to read it from.
        variables: the names of those of the environment that a reload may bring anew.
        may_fetch_from: whether media may be fetched from an address.
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
        self.environ = environ
        self.writer = writer
        self.heartbeat_s = heartbeat_s
        self.local: dict[str, ActiveProvider] = {}
        self.health = Health(config.upstream.breaker)
        self.reloads = 0
        self.reload: Callable[[Mapping[str, str]], Awaitable[JsonObject]] | None = None
        self.variables: Callable[[], Iterable[str]] = tuple
        self.router = Router(config, {})
        self.sweeper = Sweeper(tick_s)
        self.pool = Pool(self.sweeper, environ, config.upstream.timeouts.pool_idle_s)
        self.random = random.Random()  # noqa: S311  ids and jitter, not secrets
        self.started_at = time.monotonic()
        self.no_usage_option: set[str] = set()
        self.refused = Memory(4_096, 4_096, 3600.0)
        self.states = Memory(20_000, 64 * 1024 * 1024, 3600.0)
        self.turns = Memory(2_000, 64 * 1024 * 1024, 3600.0)
        self.conversations = Memory(20_000, 20_000, 3600.0)
        self.may_fetch_from: Callable[[str], bool] = is_public
        self.draining = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Serve by a configuration from now on. Requests that run finish by the old one; what is
        known of targets' health stays, but for those who have another key now."""
        before = self.router.active
        self.config = config
        self.health.breaker = config.upstream.breaker
        self.pool.idle_s = config.upstream.timeouts.pool_idle_s
        self.callers = caller_keys(config, self.environ)
        self.auth_required = auth_required(config)
        self.reroute()
        for ident, now in self.router.active.items():
            old = (
                {one.label: one.api_key for one in before[ident].accounts}
                if ident in before
                else {}
            )
            for account in now.accounts:
                if old.get(account.label, account.api_key) != account.api_key:
                    self.health.forget(ident, account.label)

    def reroute(self) -> None:
        """Resolve anew: by the configuration, and by what was found on this machine."""
        active, self.warnings = active_providers(self.config, self.environ)
        for ident, found in self.local.items():
            given = active.get(ident)
            if given is None:
                if found.found and self.may_find(ident):
                    active[ident] = found
            else:
                known = {model.id for model in given.models}
                more = tuple(model for model in found.models if model.id not in known)
                active[ident] = given._replace(models=(*given.models, *more))
        self.writer.hide(_secrets(self.config, active))
        self.router = Router(self.config, active)

    def may_find(self, ident: str) -> bool:
        """Whether a server on this machine that nobody named may be used."""
        own = {provider_id(name): given for name, given in self.config.providers.items()}
        return self.config.inherit_defaults and (ident not in own or own[ident].active)

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
    shapings: list[Shaping] = [*config.providers.values(), *config.presets.values()]
    shapings += [one for provider in config.providers.values() for one in provider.models]
    shapings += [*config.models.values()]
    shapings += [one for model in config.models.values() for one in model.endpoints]
    yield from (Secret(text) for one in shapings for text in one.extra_headers.put.values())
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
# 33. callers: connections from callers
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
# 34. exchange: one request to one target, and its answer on its way to the caller
# ---------------------------------------------------------------------------------------------
# A target that speaks the caller's protocol gets the caller's bytes, but for model, key and usage,
# and its answer goes back as it is. For any other target the request is read once, adapted and
# written anew, and a Translation brings the answer back. Nothing reaches the caller before the
# answer has brought something of substance.

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
_MAX_WHOLE_BYTES = MAX_EVENT_BYTES  # of a whole answer to a request for a stream


class Attempt(NamedTuple):
    """What one call to one target came to."""

    target: Target
    error: UpstreamError


@dataclass(slots=True, eq=False)
class Call:
    """One request to a model, from its arrival to its log line.

    Attributes:
        caller: who asks: what is remembered of a conversation is remembered for them alone.
        document: the body, if it is JSON; `body` otherwise.
        form_type: the content type of a body that is not JSON.
        hide_usage: the caller does not want the usage chunk that we do.
        asked_for_usage: and in this attempt we asked for it.
        as_array: the caller reads Google's JSON array instead of events.
        strict: the caller would rather have an error than a loss.
        given: the document as the caller sent it, without what was meant for us; `document` has
            the fields and the system prompt of the target's shape.
        taken_at: when it was last counted against a limit.
        withheld: its headers that hold keys for some provider or other.
        several: there is a choice of targets, so that a conversation had better stay at one.
        rules: how upstreams are dealt with, as it was when the request came.
        needs: what it needs of a model, where that matters.
        skipped: targets that would have gone first, and why they did not.
        bridge: what it asks for in TensorZero's words.
        native: it came in the words of TensorZero's own API.
        race: where several attempts run at once, what decides which one answers.
        place: where in the chain the target stands.
        history: the messages that `previous_response_id` stands for, if we know them.
        no_reasoning: a target has refused the reasoning in the conversation.
        failed: attempts that came to nothing.
        target: who is being asked, or who answered.
        losses: what the request to that target, and its answer, could not carry.
        broke: the answer had begun when this went wrong.
    """

    id: str
    op: Operation
    model: str
    headers: Headers
    started_at: float
    caller: str = ""
    document: Document | None = None
    body: bytes = b""
    form_type: str = ""
    query: str = ""
    stream: bool = False
    as_array: bool = False
    hide_usage: bool = False
    asked_for_usage: bool = False
    strict: bool = False
    given: Document | None = None
    rules: Upstream = field(default_factory=Upstream)
    wishes: Wishes = NO_WISHES
    models: tuple[str, ...] = ()
    needs: Needs | None = None
    session: Session | None = None
    several: bool = False
    taken_at: float = 0.0
    withheld: frozenset[str] = frozenset()
    explain: bool = False
    explained: JsonObject | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    bridge: Bridge | None = None
    native: bool = False
    race: Race | None = None
    place: int = 0
    shape: Shape = PLAIN
    told_headers: Headers = field(default_factory=dict)
    history: tuple[Message, ...] | None = None
    no_reasoning: bool = False
    failed: list[Attempt] = field(default_factory=list)
    target: Target | None = None
    attempts: int = 0
    losses: Losses = field(default_factory=Losses)
    first_at: float | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    broke: BitrouterError | None = None
    _prompt: Prompt | None = None

    @property
    def attempts_made(self) -> int:
        return self.race.asked if self.race else self.attempts

    def begin(self, target: Target) -> None:
        """Count an attempt."""
        self.target = target
        self.attempts += 1
        if self.race:
            self.race.asked += 1

    @property
    def codec(self) -> Codec:
        codec = CODECS[self.op.protocol]
        return codec if self.bridge is None else _bridged_codec(self, codec)

    def cost_of(self, usage: Usage) -> float | None:
        """US dollars, if the target's prices are known."""
        cost = cost_nanousd(usage, self.target.price) if self.target else None
        return None if cost is None else cost / 1e9

    @property
    def prompt(self) -> Prompt:
        """The request in neutral form. Raises BadRequest."""
        if self._prompt is None:
            if self.document is None:
                raise BadRequest("this path takes a JSON body")
            prompt = self.codec.parse_request(self.document.value)
            messages = prompt.messages
            if self.op is RESPONSES_OP:
                told = 1 if self.document.value.get("instructions") else 0
                joined = (*messages[:told], *(self.history or ()), *messages[told:])
                messages = with_named_results(joined)
            self._prompt = prompt._replace(model=self.model, stream=self.stream, messages=messages)
        return self._prompt

    def take_shape(self, shape: Shape) -> None:
        """Give the request the fields that go with a target. Raises BadRequest."""
        if (shape is self.shape and self.bridge is None) or self.given is None:
            return
        if not (self.op.translates or self.op.counts):  # embeddings and the like hold no talk
            self.shape = shape
            return
        changes = any(one.params or one.system or one.templates for one in (self.shape, shape))
        self.shape = shape
        if changes or self.bridge:
            document = self.given
            if self.op is CHAT_OP and (shape.templates or self.bridge):
                messages = filled_messages(document.value, shape.templates)
                if messages is not None:
                    document = document.changed([Change("/messages", messages)])
            self.document = shaped(document, shape, self.op.protocol)
            self._prompt = None

    def own_edits(self, target: Target) -> tuple[tuple[BodyEdit, ...], dict[str, str | None]]:
        """What the request itself wants changed in what a target gets: of the body, and headers,
        with None for those to leave out."""
        if self.bridge is None:
            return (), {}
        body = [one for one in self.bridge.body_edits if one.fits(target)]
        headers = [one for one in self.bridge.header_edits if one.fits(target)]
        return (
            tuple(BodyEdit(one.name, one.value, one.delete) for one in body),
            {one.name.lower(): None if one.delete else str(one.value) for one in headers},
        )

    def translates(self, target: Target) -> bool:
        """Whether a target must be asked in other words than the caller's."""
        other = target.protocol is not self.op.protocol or self.history is not None
        if self.bridge and self.bridge.native:
            return True
        return other or (target.shape.structured != "" and self.op.translates)

    def book(self, usage: Usage | None) -> None:
        """Note what was used, and what it cost if that is known."""
        self.usage = usage
        if usage is not None:
            self.cost_usd = self.cost_of(usage)


def _bridged_codec(call: Call, codec: Codec) -> Codec:
    """The codec by which TensorZero's clients are answered."""
    bridge = call.bridge
    assert bridge is not None  # noqa: S101  this is what is asked before

    def change(value: JsonObject) -> JsonObject:
        if call.target is None:
            return value
        usage = codec.usage(value) if value.get("usage") else None
        return bridged_answer(value, bridge, call.target, call.cost_of(usage) if usage else None)

    if bridge.native:
        variant = bridge.variant(call.target) if call.target else ""
        return codec._replace(
            render_response=lambda *given: native_answer(
                given[2], given[3], bridge, variant, call.cost_of(given[3])
            ),
            encoder=lambda *_: NativeEncoder(bridge, variant, call.cost_of),
            render_error=lambda error: {"error": error.message},
        )

    def mend(state: StreamState, value: JsonObject) -> JsonObject | None:
        mended = codec.mend(state, value)
        return {} if mended == {} else change(value if mended is None else mended)

    return codec._replace(
        dull=lambda _: False,
        mend=mend,
        render_response=lambda *given: change(codec.render_response(*given)),
        encoder=lambda prompt, label: BridgedEncoder(codec.encoder(prompt, label), change),
    )


class Race:
    """Which of two attempts at one request answers it: the first that has something to say.

    Attributes:
        leader: the attempt that began first.
        second: the other one runs.
        asked: how many attempts both have made.
    """

    __slots__ = ("asked", "leader", "on_won", "second", "winner")

    def __init__(self, leader: Call, on_won: Callable[[Call], None]) -> None:
        self.leader = leader
        self.winner: Call | None = None
        self.second = False
        self.asked = 0
        self.on_won = on_won

    def won_by(self, call: Call) -> bool:
        if self.winner is None:
            self.winner = call
            self.on_won(call)
        return self.winner is call


def lost_race(call: Call) -> UpstreamError | None:
    """What an attempt ends with when another one has answered in the meantime."""
    if call.race is None or call.race.won_by(call):
        return None
    return UpstreamUnfit("another attempt was faster", code="hedge_lost")


class _Outgoing(NamedTuple):
    """A request as it goes to a target, and what will bring the answer back."""

    raw: bytes
    translation: Translation | None = None
    body: JsonObject = {}  # noqa: RUF012  a NamedTuple's default, never changed
    times: int = 1  # how often it is sent, for as many choices


async def exchange(app: App, call: Call, reply: Reply, target: Target) -> None:
    """Ask a target and answer the caller. Raises UpstreamError while nothing has been answered."""
    if call.translates(target) and not call.op.counts:
        outgoing = await _translated(app, call, target)
        if outgoing.times > 1:
            await _fan_out(app, call, reply, target, outgoing)
            return
    else:
        outgoing = _untranslated(app, call, target)
    try:
        await _send(app, call, reply, target, outgoing)
    except StaleConnection:  # no byte had come back, so nobody has seen the request
        await _send(app, call, reply, target, outgoing, fresh=True)
    translation = outgoing.translation
    if translation is None:
        return
    while translation.paused:
        outgoing = _resumed(call, target, outgoing, translation)
        await _go_on(app, call, reply, target, outgoing)
    if call.broke is None:
        _remember(app, call, translation)


async def _go_on(app: App, call: Call, reply: Reply, target: Target, outgoing: _Outgoing) -> None:
    """Let a model go on that has paused. If that fails, a stream that has begun ends with it."""
    try:
        await _send(app, call, reply, target, outgoing, fresh=True)
    except UpstreamError as error:
        if outgoing.translation is None or not reply.status:
            raise
        reply.write(outgoing.translation.fail(error))
        reply.end()
        call.broke = error


def _untranslated(app: App, call: Call, target: Target) -> _Outgoing:
    if call.failed:
        call.losses = Losses()  # of the target that was asked before
    body, content_type = _body_for(app, call, target)
    return _Outgoing(_request(call, target, call.op.suffix, call.query, body, content_type))


def _resumed(call: Call, target: Target, sent: _Outgoing, translation: Translation) -> _Outgoing:
    """The request that lets a model go on that has paused."""
    body = translation.resume(sent.body)
    raw = request_to(call, target, GENERATE[target.protocol].suffix, body)
    return sent._replace(raw=raw, body=body)


async def _send(
    app: App,
    call: Call,
    reply: Reply,
    target: Target,
    outgoing: _Outgoing,
    *,
    fresh: bool = False,
) -> None:
    """Send a request, and wait until its sink has had all of the answer."""
    origin, _ = origin_of(target.base)
    connection = await app.pool.lend(target.name, origin, target.timeouts.connect_s, fresh=fresh)
    sink = _sink_for(call, reply, target, connection, outgoing.translation)
    _set_deadlines(connection, target.timeouts, stream=call.stream)
    try:
        connection.start(outgoing.raw, sink)
        await sink.done
    except UpstreamError:
        raise  # the connection has taken care of itself
    except BaseException:
        connection.give_up(sink)
        if isinstance(sink, _StreamSink):
            sink.book()  # what was used up to here has its price
        raise


def _set_deadlines(connection: Connection, timeouts: Timeouts, *, stream: bool) -> None:
    now = time.monotonic()
    if stream:
        connection.waiting = f"sent no first token within {timeouts.first_token_s:g} s"
        connection.deadline = connection.limit = now + timeouts.first_token_s
    else:
        connection.waiting = f"sent no answer within {timeouts.total_s:g} s"
        connection.deadline = connection.limit = now + timeouts.total_s
    connection.idle_s = timeouts.idle_s


def _sink_for(
    call: Call,
    reply: Reply,
    target: Target,
    connection: Connection,
    translation: Translation | None,
) -> Collector | _StreamSink | _RawSink:
    if call.op.raw:
        return _RawSink(call, reply, target, connection)
    if call.stream:
        return _StreamSink(call, reply, target, connection, translation)
    done = connection.loop.create_future()
    return Collector(done, partial(_answer, call, reply, target, translation))


def _request(
    call: Call, target: Target, suffix: str, query: str, body: bytes, content_type: str
) -> bytes:
    """A request as it goes to a target."""
    _, path = origin_of(target.base)
    if "{model}" in suffix:
        suffix = suffix.replace("{model}", quote(target.model, safe="/-._~:@"))
    query = f"?{query}" if query else ""
    edits, headers = call.own_edits(target) if call.bridge else ((), {})
    # Edits are for what generates; for embeddings only where an endpoint of the file asks for it.
    if call.op.generates or (call.op.embeds and target.virtual):
        body = finished(body, target, edits) if content_type == "application/json" else body
    lines = [f"POST {path}{suffix}{query} HTTP/1.1\r\n", target.head.reveal()]
    own_protocol = target.protocol is call.op.protocol
    for name, value in call.headers.items():
        by_prefix = own_protocol and name.startswith(_FORWARDED_PREFIXES)
        if by_prefix and _CREDENTIAL.search(name):
            continue
        if (by_prefix or name in _FORWARDED) and name not in target.headers:
            if name in target.shape.drop or name in call.withheld or name in headers:
                continue
            lines.append(f"{name}: {value}\r\n")
    lines += [f"{name}: {value}\r\n" for name, value in headers.items() if value is not None]
    given = (own_protocol and "anthropic-version" in call.headers) or (
        "anthropic-version" in target.headers
    )
    given = given or "anthropic-version" in target.shape.drop
    if target.protocol is ApiProtocol.MESSAGES and not given:
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
    if call.op.translates and call.codec.sealed(document.value):
        opened = _unsealed_body(app, call, target, document)
        if opened:
            return opened, "application/json"
    named = document.value.get("model")
    wanted = target.model
    if call.op.protocol is ApiProtocol.GENERATE_CONTENT:
        wanted = f"models/{target.model}"  # wire: as embedContent spells it; the path has it bare
    if named is not None and named != wanted:
        document.set("model", wanted)
    call.asked_for_usage = _asks_for_usage(app, call, target)
    if call.asked_for_usage:
        document.set_in("stream_options", "include_usage", True)
    return document.encoded(), "application/json"


def _asks_for_usage(app: App, call: Call, target: Target) -> bool:
    """Whether to ask for the usage that the caller did not ask for."""
    known = target.compatibility
    takes = known is None or known.supports_stream_options
    return call.hide_usage and takes and target.provider not in app.no_usage_option


def _unsealed_body(app: App, call: Call, target: Target, document: Document) -> bytes:
    """The body of a conversation that has been at another vendor's: what we sealed is opened for
    whom it belongs to, and withheld from everybody else. Empty if there was nothing of ours."""
    body = parse_json(document.raw)
    if not call.codec.unseal(body, target.traits.vendor):
        return b""
    if "model" in body:
        body["model"] = target.model
    call.asked_for_usage = _asks_for_usage(app, call, target)
    if call.asked_for_usage:
        body["stream_options"] = {**as_object(body.get("stream_options")), "include_usage": True}
    return compact(body)


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


# Requests in another protocol.


async def _translated(app: App, call: Call, target: Target) -> _Outgoing:
    """The caller's request in a target's words. Raises UpstreamUnfit if they cannot say it."""
    prompt, undo, traits = _adapted(app, call, target)
    prompt = await with_fetched_media(prompt, target.protocol, traits, app.may_fetch_from)
    return _written(app, call, target, prompt, undo, traits)


def _adapted(app: App, call: Call, target: Target) -> tuple[Prompt, Undo, Traits]:
    prompt, protocol, traits = call.prompt, target.protocol, target.traits
    losses = call.losses = Losses()
    if call.history is None and call.document and call.document.value.get("previous_response_id"):
        raise UpstreamUnfit(
            "previous_response_id: only the provider that gave it knows it, and this is another; "
            "send the conversation in `input`",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    prompt = _recalled(app, call, prompt)
    refused = refused_by(app, target)
    if "schema" in refused:
        other_way = "tool" if protocol is ApiProtocol.MESSAGES else "prompt"
        traits = traits._replace(schema=other_way)
    if "max_tokens_field" in refused:
        other = {"max_tokens": "max_completion_tokens"}
        name = other.get(traits.max_tokens_field, "max_tokens")
        traits = traits._replace(max_tokens_field=name)
    prompt, undo = adapt(prompt._replace(model=target.model), protocol, traits, losses)
    return prompt, undo, traits


def _written(
    app: App, call: Call, target: Target, prompt: Prompt, undo: Undo, traits: Traits
) -> _Outgoing:
    protocol, losses, count = target.protocol, call.losses, 1
    if prompt.sampling.n > _MAX_FAN_OUT and protocol is not ApiProtocol.CHAT_COMPLETIONS:
        said = f"n: at most {_MAX_FAN_OUT} choices can be had of this model's provider"
        raise UpstreamUnfit(said, code="unsupported_parameter", param="n")
    if prompt.sampling.n > 1 and not (protocol in _MAKE_MANY and traits.many):
        count = prompt.sampling.n
        losses.add("fanned_out", "n", harmful=False)
        prompt = prompt._replace(stream=False, sampling=prompt.sampling._replace(n=1))
    body = CODECS[protocol].render_request(prompt, traits, losses)
    for name in refused_by(app, target):
        if body.pop(name, None) is not None:
            losses.add("refused_by_model", name)
    _refuse_losses(call, target, losses)
    op, query = GENERATE[protocol], ""
    if protocol is ApiProtocol.GENERATE_CONTENT and prompt.stream:
        op, query = GEMINI_VERBS["streamGenerateContent"], "alt=sse"
    raw = _request(call, target, op.suffix, query, compact(body), "application/json")
    return _Outgoing(raw, _translation(app, call, target, undo, count), body, count)


def first_request(app: App, call: Call, target: Target) -> bytes:
    """What `exchange` would send, but for media that it would fetch. Raises BitrouterError."""
    if call.translates(target) and call.op.translates:
        return _written(app, call, target, *_adapted(app, call, target)).raw
    return _untranslated(app, call, target).raw


def refused_by(app: App, target: Target) -> frozenset[str]:
    """The fields that a target's model has refused of late."""
    known = app.refused.get((target.provider, target.model), time.monotonic())
    return known or frozenset()


_MAKE_MANY = (ApiProtocol.CHAT_COMPLETIONS, ApiProtocol.GENERATE_CONTENT)
_MAX_FAN_OUT = 8


def _refuse_losses(call: Call, target: Target, losses: Losses) -> None:
    harmful = [loss for loss in losses.found if loss.harmful]
    if (call.strict or target.exacting) and harmful:
        loss = harmful[0]
        raise UpstreamUnfit(
            f"{loss.field}: the model's provider cannot have it ({loss.code}), and "
            + ("x-bitrouter-strict" if call.strict else "provider.require_parameters")
            + " asks for no losses",
            code="unsupported_parameter",
            param=loss.field,
        )


def _translation(app: App, call: Call, target: Target, undo: Undo, times: int) -> Translation:
    return Translation(
        CODECS[target.protocol],
        call.codec,
        call.prompt,
        undo,
        AnswerLabel(app.new_id(), time.time_ns() // 10**9, target.model, size_of(call.prompt) // 4),
        target.traits.vendor,
        partial(_told_in_band, target),
        as_array=call.as_array,
        **({} if times == 1 else {"pauses": 0}),
    )


# What clients forget: the state that came with calls, and the turns behind a response id.


def _recalled(app: App, call: Call, prompt: Prompt) -> Prompt:
    """A prompt with the reasoning that led to its calls, where the caller's client dropped it."""
    messages = []
    for message in prompt.messages:
        if message.role == "assistant":
            message = _with_state(app, call, message)
        if call.no_reasoning:
            kept = tuple(p for p in message.content if not isinstance(p, Reasoning))
            message = message._replace(content=kept)
        if message.content or message.role != "assistant":
            messages.append(message)
    return prompt._replace(messages=tuple(messages))


def _with_state(app: App, call: Call, message: Message) -> Message:
    """The assistant's message with what we remember of its calls: reasoning goes first in it, or
    else right before the call that it led to. What the client kept counts, unless all is known:
    some protocols do not keep the order."""
    calls = [part for part in message.content if isinstance(part, ToolCall)]
    kept = any(isinstance(part, Reasoning) for part in message.content)
    now = time.monotonic()
    known = {c.id: app.states.get((call.caller, c.id), now) for c in calls}
    if not any(known.values()) or (kept and (len(calls) == 1 or not all(known.values()))):
        return message
    content: list[Content] = []
    first = True
    for part in message.content:
        if isinstance(part, ToolCall):
            before, state = known[part.id] or ((), None)
            content = [*before, *content] if first else [*content, *before]
            part, first = part._replace(opaque=part.opaque or state), False
        if not isinstance(part, Reasoning):
            content.append(part)
    return message._replace(content=tuple(content))


def _remember(app: App, call: Call, translation: Translation) -> None:
    now = time.monotonic()
    answer = translation.choices()[0].content
    before: list[Reasoning] = []
    for block in answer:
        if isinstance(block, ToolCall):
            if block.opaque or any(one.opaque for one in before):
                kept = (tuple(before), block.opaque)
                app.states.put((call.caller, block.id), kept, now, weight_of([*before, block]))
            before = []
        elif isinstance(block, Reasoning):
            before.append(block)
    if call.op is RESPONSES_OP and call.prompt.store is not False:
        # wire: instructions hold for one response; the next one brings its own
        body = call.document.value if call.document else {}
        said = call.prompt.messages[1 if body.get("instructions") else 0 :]
        turn = (*said, Message("assistant", answer))
        size = sum(weight_of(message.content) for message in turn)
        app.turns.put((call.caller, translation.answer_id), turn, now, size)


# Several choices from a target that makes one at a time.


async def _fan_out(app: App, call: Call, reply: Reply, target: Target, outgoing: _Outgoing) -> None:
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(ask(app, call, target, outgoing.raw)) for _ in range(outgoing.times)]
    try:
        values = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    translation = outgoing.translation
    assert translation is not None  # noqa: S101  only translated requests fan out
    headers = JSON_HEADERS | served_by(call, target)
    if lost := lost_race(call):
        raise lost
    call.first_at = time.monotonic()
    if call.stream:
        told = translation.many_as_stream(values)
        call.book(translation.state.usage)
        reply.begin(200, headers | _stream_headers(call) | _warnings(call, translation), told)
        reply.end()
        return
    for n, value in enumerate(values):
        translation.take_whole(value, n)
    answer = compact(translation.whole())
    call.book(translation.state.usage)
    reply.send(200, answer, headers | _cost_header(call) | _warnings(call, translation))


async def ask(app: App, call: Call, target: Target, raw: bytes) -> JsonObject:
    """Send a request and return what comes back, whole. Raises UpstreamError."""
    answers: list[JsonObject] = []

    def use(head: ResponseHead, body: bytes) -> None:
        if not 200 <= head.status < 300:
            raise _refusal(call, target, head, body)
        answers.append(_read_answer(call, target, body))

    origin, _ = origin_of(target.base)
    connection = await app.pool.lend(target.name, origin, target.timeouts.connect_s)
    sink = Collector(connection.loop.create_future(), use)
    _set_deadlines(connection, target.timeouts, stream=False)
    try:
        connection.start(raw, sink)
        await sink.done
    except UpstreamError:
        raise
    except BaseException:
        connection.give_up(sink)
        raise
    return answers[0]


def request_to(call: Call, target: Target, suffix: str, body: JsonObject) -> bytes:
    """A request of our own making, in the course of a call."""
    return _request(call, target, suffix, "", compact(body), "application/json")


# Answers, whole.


def _answer(
    call: Call,
    reply: Reply,
    target: Target,
    translation: Translation | None,
    head: ResponseHead,
    body: bytes,
) -> None:
    """Pass a whole answer on, or raise what is wrong with it."""
    if not 200 <= head.status < 300:
        raise _refusal(call, target, head, body)
    value = _read_answer(call, target, body)
    if lost := lost_race(call):
        raise lost
    headers = _answer_headers(call, target, head)
    if translation:
        translation.take_whole(value)
        if translation.paused:
            return
        whole_answer = translation.whole()
        body = compact(_with_wanted(whole_answer, call, body) if call.bridge else whole_answer)
        headers |= JSON_HEADERS | _warnings(call, translation)
        call.book(translation.state.usage)
    else:
        call.book(call.codec.usage(value))
        if call.bridge:
            body = compact(_with_wanted(call.codec.mend(StreamState(), value) or value, call, body))
        elif call.op.translates and b'"tool_calls"' in body:
            mended = call.codec.mend(StreamState(), value)
            body = body if mended is None else compact(mended)
    headers |= _cost_header(call)
    call.first_at = time.monotonic()
    reply.send(head.status, body, headers)


def _with_wanted(value: JsonObject, call: Call, raw: bytes) -> JsonObject:
    """An answer for a client of TensorZero, with what it wants to see of the provider's own."""
    bridge, target = call.bridge, call.target
    if bridge is None or target is None or not bridge.wants:
        return value
    kind = {ApiProtocol.RESPONSES: "responses"}.get(target.protocol, "chat_completions")
    facts = {"model_inference_id": bridge.ident, "provider_type": target.like or target.provider}
    facts["api_type"] = kind
    text = raw.decode("utf-8", "replace")
    prefix = "" if bridge.native else "tensorzero_"
    parts: JsonObject = {}
    if "raw_usage" in bridge.wants:
        answer = as_object(parse_json(raw))
        told = answer.get("usage", answer.get("usageMetadata"))
        parts["raw_usage"] = [{**facts, "data": told}]
    if "raw_response" in bridge.wants:
        parts["raw_response"] = [{**facts, "data": text}]
    if "original_response" in bridge.wants:
        parts["original_response"] = text
    return {**value, **{prefix + name: part for name, part in parts.items()}}


def _cost_header(call: Call) -> Headers:
    return {} if call.cost_usd is None else {"x-bitrouter-cost-usd": f"{call.cost_usd:.9f}"}


def _warnings(call: Call, translation: Translation | None) -> Headers:
    """What was lost, as a header: `code;field=name` for each loss, at most 2 KB."""
    for loss in translation.losses.found if translation else ():
        call.losses.add(loss.code, loss.field, harmful=loss.harmful)
    told = ", ".join(f"{loss.code};field={printable(loss.field, 80)}" for loss in call.losses.found)
    return {"x-bitrouter-warnings": told[:2048]} if told else {}


def _read_answer(call: Call, target: Target, body: bytes) -> JsonObject:
    if len(body) > _MAX_ERROR_BYTES and not call.op.generates and not call.translates(target):
        return _usage_at_end(body)  # embeddings: megabytes of numbers that are nobody's business
    try:
        value = parse_json(body)
    except (ValueError, RecursionError):
        shown = printable(body[:200].decode("utf-8", "replace"))
        said = f"{target.name} answered 200 with what is not JSON"
        raise UpstreamGarbled(said, detail=shown) from None
    if not isinstance(value, dict):
        raise UpstreamGarbled(f"{target.name} answered 200 with JSON that is not an object")
    codec = CODECS[target.protocol]
    facts = codec.parse_error(value) if value.get("error") else None
    if facts:
        raise _told_in_band(target, facts)
    missing = codec.what_is_missing(value) if call.op.generates else ""
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
    error = upstream_error(target.name, head.status, head.headers, body, target.protocol, wall_s)
    if target.protocol is not call.op.protocol:
        error.body = b""  # in another protocol's words
    return error


def _without_key(target: Target, body: bytes) -> bytes:
    # Latin-1 takes any bytes there and back, and a key is ASCII.
    return target.secret.redact(body.decode("latin-1")).encode("latin-1")


def _answer_headers(call: Call, target: Target, head: ResponseHead) -> Headers:
    """The provider's headers that concern the caller, and ours that say who served it."""
    call.told_headers = head.headers
    headers = returned_headers(head.headers)
    headers.setdefault("content-type", "application/json")
    return headers | served_by(call, target)


def _stream_headers(call: Call) -> Headers:
    kind = "application/json" if call.as_array else "text/event-stream"
    return {"content-type": f"{kind}; charset=utf-8", "cache-control": "no-cache"}


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
        "x-bitrouter-attempts": str(call.attempts_made),
        **(told_of_the_choice(call) if call.skipped or call.explained else {}),
    }


def told_of_the_choice(call: Call) -> Headers:
    """Who would have gone first, and why not; and the whole explanation, if it was asked for."""
    headers: Headers = {}
    if call.skipped:
        told = ", ".join(f"{name} ({why})" for name, why in call.skipped.items())
        headers["x-bitrouter-skipped"] = printable(told)[:1024]
    if call.explained:
        headers["x-bitrouter-explain"] = _ASCII_JSON(call.explained)
    return headers


_ASCII_JSON = json.JSONEncoder(separators=(",", ":")).encode


# Answers, streamed.


class _StreamSink:
    """A sink that relays a stream of events to the caller, once it has substance.

    `done` gets no value when the caller has all it will get, also if that ends in an error; it
    gets an UpstreamError if the caller has nothing yet.
    """

    def __init__(
        self,
        call: Call,
        reply: Reply,
        target: Target,
        connection: Connection,
        translation: Translation | None,
    ) -> None:
        self.done: asyncio.Future[None] = connection.loop.create_future()
        self._call = call
        self._reply = reply
        self._target = target
        self._connection = connection
        self._codec = call.codec
        self._translation = translation
        self._relay: StreamRelay | Translation = translation or StreamRelay(
            call.codec, hide_usage=call.asked_for_usage, as_array=call.as_array
        )
        self._head: ResponseHead | None = None
        self._refused: list[bytes] | None = None  # the body of a response that is no stream
        self._refused_bytes = 0
        self._open = bool(reply.status)  # already, if the model has paused in its answer
        if self._open:
            reply.on_flow = connection.follow

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
            ok = self._head is not None and self._head.status == 200
            if self._refused_bytes <= (_MAX_WHOLE_BYTES if ok else _MAX_ERROR_BYTES):
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
        elif self._translation and self._translation.paused:
            self._reply.on_flow = None
            self._connection.detach()
            self.done.set_result(None)
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
            try:
                self._read_whole(self._head, b"".join(self._refused))
            except UpstreamError as error:
                fail_future(self.done, error)
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
        if lost := lost_race(call):
            self._fail(lost)
            return
        call.first_at = time.monotonic()
        headers = _answer_headers(call, self._target, self._head) | _stream_headers(call)
        headers |= _warnings(call, self._translation)
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

    def _read_whole(self, head: ResponseHead, body: bytes) -> None:
        """A whole answer where a stream was asked for: an error, or one to be made a stream of."""
        if head.status != 200:
            raise _refusal(self._call, self._target, head, body)
        value = _read_answer(self._call, self._target, body)
        translation = self._translation
        if translation is None:
            if not self._call.op.translates:
                said = f"{self._target.name} answered a request for a stream with a whole answer"
                raise UpstreamGarbled(said)
            translation = self._as_stream()
        out = translation.whole_as_stream(value)
        self._relay = translation
        if self._open:
            self._reply.write(out)
        else:
            self._begin(out)
        if self.done.done():
            return
        if translation.paused:
            self.done.set_result(None)
        else:
            self._finish(None)

    def _as_stream(self) -> Translation:
        """What makes a stream of an answer in the caller's own protocol."""
        call, target = self._call, self._target
        label = AnswerLabel(call.id, time.time_ns() // 10**9, target.model)
        explain = partial(_told_in_band, target)
        return Translation(
            self._codec,
            self._codec,
            call.prompt,
            Undo(),
            label,
            target.traits.vendor,
            explain,
            as_array=call.as_array,
        )


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
        if lost := lost_race(self._call):
            self._refused = []
            fail_future(self.done, lost)
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


# ---------------------------------------------------------------------------------------------
# 35. side: what is asked of models besides answers: counts of tokens, embeddings, the echo
# ---------------------------------------------------------------------------------------------


async def count_tokens(
    app: App,
    call: Call,
    reply: Reply,
    chain: tuple[Target, ...],
    prepared: Callable[[App, Call, Target], Target],
) -> None:
    """Count a prompt's tokens: as a provider does, or else by a rule of thumb that says so.

    Args:
        prepared: makes of a target one that this request can be sent to; raises UpstreamUnfit.
    """
    for target in app.health.order(chain, time.monotonic()):
        call.target = target
        call.attempts += 1
        if target.provider == "echo" or target.protocol not in COUNT_SUFFIXES:
            continue
        try:
            target = call.target = prepared(app, call, target)
            if target.protocol is call.op.protocol:
                await exchange(app, call, reply, target)
                return
            count = await _counted_there(app, call, target)
        except UpstreamError as error:
            if error.status in _ABOUT_THE_PROMPT:
                raise
            log.info("tokens_not_counted target=%s reason=%s", target.name, error.message)
        else:
            headers = JSON_HEADERS | served_by(call, target)
            reply.send(200, compact(_rendered_count(call, count)), headers)
            return
    call.losses.add("estimated", "input_tokens", harmful=False)
    count = -(-size_of(_prompt_to_count(call)) // 4)
    headers = JSON_HEADERS | served_by(call, call.target or chain[0]) | _estimated()
    reply.send(200, compact(_rendered_count(call, count)), headers)


_ABOUT_THE_PROMPT = (400, 413, 422)  # a refusal to count with another status is about counting


def _estimated() -> Headers:
    return {"x-bitrouter-warnings": "estimated;field=input_tokens"}


def _prompt_to_count(call: Call) -> Prompt:
    """What a count is asked of. wire: Google's may stand in `generateContentRequest`."""
    body = call.document.value if call.document else {}
    inner = body.get("generateContentRequest", body.get("generate_content_request"))
    body = as_object(inner) or body
    return call.codec.parse_request(body)._replace(model=call.model, stream=False)


async def _counted_there(app: App, call: Call, target: Target) -> int:
    value = await ask(app, call, target, _count_request(call, target))
    count = value.get("totalTokens", value.get("input_tokens"))
    if not whole(count):
        raise UpstreamGarbled(f"{target.name} answered 200 without a count")
    return whole(count)


def _count_request(call: Call, target: Target) -> bytes:
    prompt, protocol = _prompt_to_count(call), target.protocol
    if protocol is ApiProtocol.RESPONSES and not target.traits.official:
        raise UpstreamGarbled("of those who speak Responses, only OpenAI itself counts tokens")
    losses = call.losses = Losses()
    prompt, _ = adapt(prompt._replace(model=target.model), protocol, target.traits, losses)
    body = CODECS[protocol].render_request(prompt, target.traits, losses)
    for name in ("max_tokens", "stream", "metadata", "service_tier", "include", "store"):
        body.pop(name, None)
    if protocol is ApiProtocol.GENERATE_CONTENT:
        body = {"generateContentRequest": {"model": f"models/{target.model}", **body}}
    return request_to(call, target, COUNT_SUFFIXES[protocol], body)


def _rendered_count(call: Call, count: int) -> JsonObject:
    match call.op.protocol:
        case ApiProtocol.GENERATE_CONTENT:
            return {"totalTokens": count}
        case ApiProtocol.RESPONSES:
            return {"object": "response.input_tokens", "input_tokens": count}
    return {"input_tokens": count}


async def embed(app: App, call: Call, reply: Reply, target: Target) -> None:
    """Embed texts at a provider that spells it the other way. Raises UpstreamError."""
    body = call.document.value if call.document else {}
    texts, raw = _embedding_request(call, target)
    value = await ask(app, call, target, raw)
    found = as_list(value.get("embeddings", value.get("data")))
    if len(found) != len(texts) or not all(isinstance(one, dict) for one in found):
        said = f"{target.name} answered with {len(found)} vectors for {len(texts)} texts"
        raise UpstreamGarbled(said)
    usage = CODECS[target.protocol].usage(value) or Usage(sum(map(len, texts)) // 4)
    call.book(usage)
    try:
        if call.op.protocol is ApiProtocol.GENERATE_CONTENT:
            answer = embeddings_as_gemini(value, one=call.op.name == "embedContent")
        else:
            answer = embeddings_as_openai(body, value, target.model, usage)
    except (TypeError, OverflowError):
        raise UpstreamGarbled(f"{target.name} answered with vectors that hold no numbers") from None
    call.first_at = time.monotonic()
    reply.send(200, compact(answer), JSON_HEADERS | served_by(call, target))


def _embedding_request(call: Call, target: Target) -> tuple[list[str], bytes]:
    body = call.document.value if call.document else {}
    if call.op.protocol is ApiProtocol.GENERATE_CONTENT:
        texts, asked = embeddings_for_openai(body, target.model)
        return texts, request_to(call, target, "/embeddings", asked)
    texts, asked = embeddings_for_gemini(body, target.model)
    return texts, request_to(call, target, "/models/{model}:batchEmbedContents", asked)


def preview(app: App, call: Call, target: Target) -> bytes:
    """The request that a target would get; what it would lose is in the call's losses. Opens no
    socket: media at a URL stay where they are. Raises BitrouterError."""
    call.take_shape(target.shape)
    if call.op.embeds and call.translates(target):
        return _embedding_request(call, target)[1]
    if call.op.counts and target.protocol not in COUNT_SUFFIXES:
        raise UpstreamUnfit(f"{target.name} counts no tokens: nothing is sent, they are estimated")
    if call.op.counts and target.protocol is not call.op.protocol:
        return _count_request(call, target)
    return first_request(app, call, target)


async def echo(app: App, call: Call, reply: Reply, target: Target) -> None:
    """The built-in model's turn."""
    codec, prompt = call.codec, call.prompt
    parts, usage = echo_parts(prompt)
    label = AnswerLabel(app.new_id(), time.time_ns() // 10**9, ECHO_MODEL, usage.input_tokens)
    if lost := lost_race(call):
        raise lost
    call.book(usage)
    call.first_at = time.monotonic()
    headers = served_by(call, target)
    if not prompt.stream:
        gatherer = Gatherer()
        for part in parts:
            gatherer.add(part)
        answer = codec.render_response(prompt, label, gatherer.choices(), usage, Losses())
        headers |= {**JSON_HEADERS, "x-bitrouter-cost-usd": "0"}
        reply.send(200, compact(answer), headers)
        return
    encoder = codec.encoder(prompt, label)
    framer = ArrayFramer() if call.as_array else None
    kind = "application/json" if call.as_array else "text/event-stream"
    headers |= {"content-type": f"{kind}; charset=utf-8", "cache-control": "no-cache"}
    reply.begin(200, headers, b"")
    for part in parts:
        await reply.drained()
        out = encoder.encode(part)
        reply.write(framer.feed(out) if framer else out)
    out = encoder.end(usage)
    reply.write(framer.feed(out) + framer.end() if framer else out)
    reply.end()


# ---------------------------------------------------------------------------------------------
# 36. attempts: the loop of retries and fallbacks
# ---------------------------------------------------------------------------------------------
# For each target of the chain, in order: send; on a failure that another try may mend, wait a
# little and try the same target again, or go on to the next. Once something has reached the
# caller there is no going back, and a failure is shown as one, in the way of the caller's protocol.


async def attempt_chain(app: App, call: Call, reply: Reply, chain: tuple[Target, ...]) -> None:
    """Answer from the first target that can. Raises UpstreamError when none did."""
    hedge_ms = call.rules.hedge_after_ms
    if call.op.counts:
        await count_tokens(app, call, reply, chain, _prepared)
    elif hedge_ms is not None and len(chain) > 1 and call.op.generates:
        await _hedged(app, call, reply, chain, hedge_ms / 1000)
    else:
        await _in_turn(app, call, reply, chain)


async def _in_turn(app: App, call: Call, reply: Reply, chain: tuple[Target, ...]) -> None:
    waits: list[float] = []
    asked = 0
    for place, target in enumerate(chain):
        if asked:
            await _back_off(call, asked)
        race = call.race
        if race and race.second and call is race.leader:
            break  # the other attempt goes on from here
        call.place, retries = place, 0
        while True:
            wait_s = _take(app, call, target)
            if wait_s:
                waits.append(wait_s)
                break
            asked += 1
            error = await _attempt(app, call, reply, target)
            if error is None:
                return
            pause_s = _pause_s(app, call, error, retries) if error.retryable else None
            then = "retry" if pause_s is not None else "next" if error.retryable else "give_up"
            _note_failure(app, call, error, then)
            if not error.retryable:
                raise error
            if pause_s is None:
                break
            retries += 1
            await asyncio.sleep(pause_s)
    if not call.failed and waits:
        told = "; ".join(f"{name}: {why}" for name, why in call.skipped.items())
        raise LimitReached(
            f"all that could serve this is over its limit: {told}", retry_after_s=min(waits)
        )
    raise _sum_up(call)


def _take(app: App, call: Call, target: Target) -> float:
    """Count a request against a target's limits; seconds to wait if that would be over them."""
    if not target.limits:
        return 0.0
    now = time.monotonic()
    if call.needs is None:
        call.needs = needs_of(call.document.value) if call.document else Needs()
    wait_s = app.health.limits.wait_s(target, call.needs.tokens, now)
    if wait_s:
        call.skipped[f"{target.name}/{target.model}"] = f"over its limit for {wait_s:.0f} s"
        return max(wait_s, 0.001)
    app.health.limits.take(target, call.needs.tokens, now)
    call.taken_at = now
    return 0.0


async def _back_off(call: Call, asked: int) -> None:
    pauses = call.rules.fallback_backoff_ms
    if pauses:
        await asyncio.sleep(pauses[min(asked, len(pauses)) - 1] / 1000)


async def _hedged(
    app: App, call: Call, reply: Reply, chain: tuple[Target, ...], after_s: float
) -> None:
    """As in turn; but if nothing has come for a while, the next target is asked, too, and who
    answers first answers. The other one is cancelled: nobody pays for what nobody reads."""
    tasks: dict[asyncio.Task[None], Call] = {}

    def won(winner: Call) -> None:
        for task, racer in tasks.items():
            if racer is not winner:
                task.cancel()

    leader = replace(call)
    leader.race = race = Race(leader, won)
    loop = asyncio.get_running_loop()
    tasks[loop.create_task(_in_turn(app, leader, reply, chain))] = leader
    try:
        await asyncio.wait(tasks, timeout=after_s)
        rest = chain[leader.place + 1 :]
        if race.winner is None and rest and not all(task.done() for task in tasks):
            race.second = True
            second = replace(leader, failed=list(leader.failed), skipped=dict(leader.skipped))
            tasks[loop.create_task(_in_turn(app, second, reply, rest))] = second
        await _one_of(tasks, race)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _adopt(call, race.winner or leader)
    if race.winner is None:
        errors = [task.exception() for task in tasks if not task.cancelled()]
        for racer in tasks.values():
            call.failed = [*call.failed, *(one for one in racer.failed if one not in call.failed)]
        surfaced = next((e for e in errors if e and not isinstance(e, AllAttemptsFailed)), None)
        raise surfaced if surfaced and len(tasks) == 1 else _sum_up(call)


async def _one_of(tasks: Mapping[asyncio.Task[None], Call], race: Race) -> None:
    """Wait until one has answered, or all have failed."""
    waiting = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled() and (error := task.exception()):
                if _ends_the_race(error) or tasks[task] is race.winner:
                    race.winner = tasks[task]
                    raise error
            elif tasks[task] is race.winner:
                return


def _ends_the_race(error: BaseException) -> bool:
    """Whether another attempt would come to nothing better: the request is to blame, or we are."""
    if isinstance(error, UpstreamError):
        return not error.retryable and not isinstance(error, AllAttemptsFailed)
    return not isinstance(error, LimitReached)


def _adopt(call: Call, winner: Call) -> None:
    """What is known of the attempt that counted is known of the request."""
    for spec in fields(Call):
        setattr(call, spec.name, getattr(winner, spec.name))


async def _attempt(app: App, call: Call, reply: Reply, target: Target) -> UpstreamError | None:
    """Try one target once. The caller has its answer, or nothing at all and we have an error."""
    call.begin(target)
    try:
        target = call.target = _prepared(app, call, target)
    except UpstreamUnfit as error:
        return error
    if target.provider == "echo":
        return await _echoed(app, call, reply, target)
    started_at = time.monotonic()
    probes = call.op.generates and app.health.begin(target, started_at, target.timeouts.total_s)
    try:
        if call.op.embeds and call.translates(target):
            await embed(app, call, reply, target)
        else:
            await exchange(app, call, reply, target)
    except UpstreamError as error:
        if call.op.generates and _is_the_targets_fault(error):
            _blame(app, target, error)
        elif probes:
            app.health.abandoned(target)
        if _refuses_usage_option(app, call, target, error) or _learned(app, call, target, error):
            return await _attempt(app, call, reply, target)
        return error
    except BaseException:
        if probes:
            app.health.abandoned(target)
        _note_loss(app, call, target, started_at)
        raise
    broke = call.broke
    if broke is None:
        _credit(app, call, target, started_at)
    elif call.op.generates and isinstance(broke, UpstreamError) and _is_the_targets_fault(broke):
        _blame(app, target, broke)
    return None


def _note_loss(app: App, call: Call, target: Target, started_at: float) -> None:
    """How long a race's first target was waited for in vain is the least that it would have taken.

    Were it not noted, one that always hangs would never be measured, and go first for that.
    """
    if call.race and call.race.leader is call and call.race.winner not in (None, call):
        now = time.monotonic()
        app.health.meter.answered(target, call.stream, now - started_at, None, now)
        if app.health.lost(target, started_at, now):
            said = f"{target.name} has answered nothing for {target.timeouts.first_token_s:g} s"
            _blame(app, target, UpstreamTimeout(said))


async def _echoed(app: App, call: Call, reply: Reply, target: Target) -> UpstreamError | None:
    try:
        await echo(app, call, reply, target)
    except UpstreamUnfit as error:  # another attempt was faster
        return error
    return None


def _prepared(app: App, call: Call, target: Target) -> Target:
    """The target as this request is to be sent to it; the request gets its shape. Raises
    BadRequest, or UpstreamUnfit if the request lacks the key."""
    call.take_shape(target.shape)
    target = _where_it_works(app, call, target)
    bridge = call.bridge
    if bridge and bridge.responses and ApiProtocol.RESPONSES in target.others:
        target = at_protocol(target, ApiProtocol.RESPONSES)
    name = target.key_from
    if not name:
        return target
    given = call.headers.get(name) or call.headers.get(f"x-bitrouter-key-{name}")
    given = (bridge.credentials.get(name) if bridge else None) or given
    if not given or not is_header_text(given):
        said = f"{target.name} takes its key from the request's header {name}, and it has none"
        raise UpstreamUnfit(said, status=401, kind=Kind.AUTH, code="provider_key_missing")
    return with_head(replace(target, secret=Secret(given)))


def _blame(app: App, target: Target, error: UpstreamError) -> None:
    now = time.monotonic()
    of_the_key = UpstreamKeyRefused | UpstreamNoCredit | UpstreamLimited
    if target.key_from and isinstance(error, of_the_key):
        return  # one caller's key says nothing about the next one's
    app.health.meter.failed(target, now)
    if app.health.failed(target, error, now):
        facts = {"target": f"{target.name}/{printable(target.model)}"}
        cooling_s = round(app.health.cooling_s(target, now), 1)
        app.writer.event("cooling", {**facts, "seconds": cooling_s, "code": error.code})


def _credit(app: App, call: Call, target: Target, started_at: float) -> None:
    """An attempt has answered: note what it says of the target."""
    now, usage = time.monotonic(), call.usage
    if call.told_headers and not target.key_from:
        app.health.saw(target, call.told_headers, now, time.time_ns() / 1e9)
    if not call.op.generates:
        return
    if app.health.succeeded(target):
        app.writer.event("recovered", {"target": f"{target.name}/{printable(target.model)}"})
    if target.limits and usage and call.needs:
        more = usage.input_tokens + usage.output_tokens - call.needs.tokens
        app.health.limits.settle(target, more, call.taken_at, now)
    first_at = call.first_at or now
    took_s = now - (first_at if call.stream else started_at)
    rate = usage.output_tokens / took_s if usage and usage.output_tokens and took_s > 0 else None
    app.health.meter.answered(target, call.stream, first_at - started_at, rate, now)
    warm = usage is not None and _is_warm(usage)
    if call.several and (warm or call.session or _names_its_session(call)):
        body = call.given.value if call.given else {}
        session = call.session or session_of(call.headers, body, call.caller)
        if not (warm or session.named):
            return
        at = (call.model, session.key)
        drawn, _ = app.conversations.get(at, now) or (None, None)
        app.conversations.put(at, (drawn, target.key), now, 1)


def _names_its_session(call: Call) -> bool:
    body = call.given.value if call.given else {}
    return is_named_session(call.headers, body)


_LEAST_CACHED = 1024  # tokens; shorter prompts are cached nowhere


def _is_warm(usage: Usage) -> bool:
    return usage.input_tokens >= _LEAST_CACHED or usage.cached_tokens > 0


def _is_the_targets_fault(error: UpstreamError) -> bool:
    return error.retryable and not isinstance(error, UpstreamUnfit)


def _refuses_usage_option(app: App, call: Call, target: Target, error: UpstreamError) -> bool:
    """Whether a refusal is about the one thing that we added; it is not added again then."""
    ours = call.asked_for_usage and isinstance(error, UpstreamRejected)
    if not ours or "stream_options" not in error.message:
        return False
    app.no_usage_option.add(target.provider)
    return True


def _where_it_works(app: App, call: Call, target: Target) -> Target:
    """The target, spoken to in the protocol in which its model does what is asked."""
    other = ApiProtocol.RESPONSES
    if not (target.may_need_responses or len(app.refused)) or not call.op.translates:
        return target
    on_chat = target.protocol is ApiProtocol.CHAT_COMPLETIONS
    if other not in target.others or not on_chat:
        return target
    learned = _TOOLS_REFUSED in refused_by(app, target)
    body = call.document.value if call.document else {}
    known = target.may_need_responses and prefers_responses(target.model, call.op.protocol, body)
    return at_protocol(target, other) if learned or known else target


_TOOLS_REFUSED = "tools with reasoning"
_TOOLS_REFUSED_TEXT = re.compile(
    r"tools with reasoning_effort (are|is) not supported", re.IGNORECASE
)
_BOUND_TEXT = re.compile(
    r"signature|bound to a different|thinking.{0,40}block", re.IGNORECASE | re.DOTALL
)
_FORMATS = {"response_format", "text", "output_config", "responseSchema", "responseJsonSchema"}
# wire: docs.claude.com/en/docs/build-with-claude/structured-outputs, read 2026-11
_SCHEMA_TEXT = re.compile(r"schema is too complex|compiled grammar is too large", re.IGNORECASE)
# A refusal of a field, not of its value.
_UNKNOWN_TEXT = re.compile(
    r"unsupported|not support|unknown|unrecognized|unexpected|extra inputs|not permitted|"
    r"not allowed|no longer|deprecated|does not (take|accept|exist)|cannot (find field|be used)",
    re.IGNORECASE,
)
_QUOTED_NAME = re.compile(r"[`'\"]([A-Za-z_]+)(?:\.[A-Za-z_.]+)?[`'\"]")
_NEEDED = {"model", "messages", "input", "contents", "tools", "stream", "system", "instructions"}


def _learned(app: App, call: Call, target: Target, error: UpstreamError) -> bool:
    """Whether a refusal is about something that we chose or spelt, so that it can be done without;
    what a model has refused is not sent to it again."""
    if not isinstance(error, UpstreamRejected) or error.status != 400:
        return False
    known, more = refused_by(app, target), frozenset[str]()
    if _TOOLS_REFUSED_TEXT.search(error.message):
        on_chat = target.protocol is ApiProtocol.CHAT_COMPLETIONS
        if on_chat and ApiProtocol.RESPONSES in target.others:
            more = frozenset({_TOOLS_REFUSED})
    elif not call.translates(target):
        return False
    elif target.protocol is ApiProtocol.MESSAGES and _BOUND_TEXT.search(error.message):
        again, call.no_reasoning = not call.no_reasoning, True
        return again
    elif _UNKNOWN_TEXT.search(error.message) or _SCHEMA_TEXT.search(error.message):
        more = _fields_to_do_without(error.message, target)
    if more <= known:
        return False
    key = (target.provider, target.model)
    app.refused.put(key, known | more, time.monotonic(), 1)
    return True


def _fields_to_do_without(message: str, target: Target) -> frozenset[str]:
    names = {found[1] for found in _QUOTED_NAME.finditer(message)} - _NEEDED
    limits = {"max_tokens", "max_completion_tokens"}
    if names & limits and target.protocol is ApiProtocol.CHAT_COMPLETIONS:
        return frozenset({"max_tokens_field"})
    if names & _FORMATS or _SCHEMA_TEXT.search(message):
        return frozenset({"schema"})
    return frozenset(name for name in names - limits if name in _OPTIONAL)


# Fields that we may have written of our own accord or spelt in our own way.
_OPTIONAL = {
    "temperature", "top_p", "top_k", "stop", "seed", "presence_penalty", "frequency_penalty",
    "logit_bias", "logprobs", "top_logprobs", "parallel_tool_calls", "verbosity",
    "reasoning_effort", "reasoning", "service_tier", "safety_identifier", "user",
    "prompt_cache_key", "metadata", "store", "stream_options", "include", "thinking",
    "stop_sequences", "cache_control", "tool_choice", "generationConfig",
    "serviceTier", "toolConfig",
}  # fmt: skip


def _note_failure(app: App, call: Call, error: UpstreamError, then: str) -> None:
    target = call.target
    assert target is not None  # noqa: S101  an attempt has one
    call.failed.append(Attempt(target, error))
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


def _pause_s(app: App, call: Call, error: UpstreamError, retries: int) -> float | None:
    """How long to wait before the same target is tried again; None if it is not."""
    rules = call.target.retry if call.target and call.target.retry else call.rules.retry
    if retries >= rules.max and not (retries == 0 and error.code == "upstream_malformed_tool_call"):
        return None
    jitter_s = app.random.uniform(0, min(rules.max_ms, rules.base_ms * 2**retries)) / 1000
    if isinstance(error, UpstreamUnreachable) and error.code == UpstreamUnreachable.code:
        return jitter_s  # not a byte came back: as good as never sent
    if error.code == "upstream_malformed_tool_call":
        return jitter_s if retries == 0 else None
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


# ---------------------------------------------------------------------------------------------
# 37. explain: whom a request goes to, and why
# ---------------------------------------------------------------------------------------------


def pick(app: App, call: Call, route: Route) -> tuple[Target, ...]:
    """The targets for a request, in order. Raises BadRequest if none can do what it needs."""
    if len(route.chain) == 1 and not route.picky and not call.explain:
        return route.chain
    now = time.monotonic()
    body = call.document.value if call.document else {}
    if route.picky:
        call.needs = needs_of(body)
    first: tuple[str, str, str] | None = None
    drawn: float | None = None
    weighed = any(leg.weight for leg in route.legs)
    call.several = call.op.generates and len(route.chain) > 1
    if call.several and (weighed or len(app.conversations)):
        session = call.session = session_of(call.headers, body, call.caller)
        at = (call.model, session.key)
        if session.named or session.goes_on:
            drawn, first = app.conversations.get(at, now) or (None, None)
        if weighed and call.bridge and call.bridge.function:
            drawn = call.bridge.share
        if weighed and drawn is None:
            drawn = share_of(session.key) if session.named else app.random.random()
            app.conversations.put(at, (drawn, first), now, 1)
    chosen = choose(route, call.needs, app.health, now, draw=lambda: drawn or 0.0, first=first)
    if app.health.troubled:
        for target in chosen.chain:
            if wait_s := app.health.cooling_s(target, now):
                call.skipped[f"{target.name}/{target.model}"] = f"cooling down for {wait_s:.0f} s"
            elif app.health.is_near_limit(target, now):
                call.skipped[f"{target.name}/{target.model}"] = "near its vendor's limit"
    if call.explain:
        call.explained = _bounded(explanation(app, call, route, chosen, first))
    return chosen.chain


def share_of(name: str) -> float:
    """A number from [0, 1) that a conversation always gets, whoever asks."""
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def explanation(
    app: App, call: Call, route: Route, chosen: Chosen, first: tuple[str, str, str] | None = None
) -> JsonObject:
    """The chain in order with the reason for each place, who was left out and why, and what the
    first target would get. Opens no socket."""
    now = time.monotonic()
    reasons = {(t.key, id(t.shape)): why for t, why in zip(route.chain, route.reasons, strict=True)}
    chain = []
    for n, target in enumerate(chosen.chain, 1):
        why = [reasons.get((target.key, id(target.shape)), ""), chosen.notes.get(target.key, "")]
        why += ["this conversation's prompt cache is warm there" if target.key == first else ""]
        if wait_s := app.health.cooling_s(target, now):
            why.append(f"cools down for {wait_s:.0f} s")
        elif app.health.is_near_limit(target, now):
            why.append("near its vendor's limit")
        if target.limits and app.health.limits.wait_s(target, 0, now):
            why.append("over its limit: not asked")
        step: JsonObject = {"position": n, "provider": target.provider}
        step |= {"account": target.account} if target.account else {}
        step |= {"model": target.model, "protocol": target.protocol}
        chain.append({**step, "reason": "; ".join(filter(None, why))})
    facts: JsonObject = {"model": route.model, "protocol": call.op.protocol, "chain": chain}
    facts["left_out"] = [*route.left_out, *chosen.left_out]
    if chosen.chain:
        facts["first"] = _first_request(app, call, chosen.chain[0])
    return facts


def _first_request(app: App, call: Call, target: Target) -> JsonObject:
    if target.provider == "echo":
        return {"url": None, "losses": []}
    trial = replace(call, losses=Losses(), skipped={}, explain=False)
    if target.key_from:
        known = call.headers.get(target.key_from) or "[from the request]"
        target = with_head(replace(target, secret=Secret(known)))
    try:
        raw = preview(app, trial, target)
    except BitrouterError as error:
        return {"error": error.message, "code": error.code}
    head, _, body = raw.partition(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    origin, _ = origin_of(target.base)
    scheme = urlsplit(target.base).scheme
    headers = [_redacted(line, target) for line in lines if not line.startswith(_PASSING)]
    return {
        "url": f"{scheme}://{urlsplit(target.base).netloc or origin.host}{line.split(' ')[1]}",
        "headers": headers,
        "body": _shown_body(body),
        "losses": [loss._asdict() for loss in trial.losses.found],
    }


def _shown_body(body: bytes) -> Json:
    try:
        return parse_json(body)
    except (ValueError, RecursionError):
        return f"{len(body)} bytes"


def _redacted(line: str, target: Target) -> str:
    """A header line to look at: of the file's own headers, too, the value may be a secret."""
    name, _, value = line.partition(": ")
    hidden = target.secret.redact(value)
    if hidden != value:
        return f"{name}: {hidden}"
    return f"{name}: [redacted]" if name in target.headers and name not in _SHOWN else line


_SHOWN = ("host", "anthropic-version")
_PASSING = ("content-length", "x-bitrouter-request-id")  # they say nothing of the choice
_MAX_EXPLAINED = 8192  # bytes of a header: what clients' parsers take without being told to


def _bounded(facts: JsonObject) -> JsonObject:
    """An explanation that fits into a header: without the body if that is what is too long."""
    if _fits(facts):
        return facts
    if "body" in as_object(facts.get("first")):
        facts = {**facts, "first": {**facts["first"], "body": None, "body_omitted": True}}
    if _fits(facts):
        return facts
    names = {"model": printable(facts["model"], 200), "protocol": facts["protocol"], "cut": True}
    for count in (10, 3, 1):
        few = [
            {name: printable(str(step[name]), 200) for name in ("provider", "model", "reason")}
            for step in facts["chain"][:count]
        ]
        left = [printable(said, 200) for said in facts["left_out"][:count]]
        short = {**names, "chain": few, "left_out": left}
        if _fits(short):
            return short
    return names


def _fits(facts: JsonObject) -> bool:
    return len(json.dumps(facts, separators=(",", ":"))) <= _MAX_EXPLAINED


# ---------------------------------------------------------------------------------------------
# 38. pipeline: one request's life; the handlers
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
            call = _read_call(app, request, asked, caller, request_id, started_at)
            route = app.router.resolve(call.models or call.model, call.op, call.wishes)
            await attempt_chain(app, call, reply, pick(app, call, route))
            error = call.broke
    except BitrouterError as exc:
        error = exc
        refuse(app, request, reply, exc, call)
    except asyncio.CancelledError:
        error = error if reply.ended else CallerGone("the caller hung up")
        raise
    finally:
        line = _line(request, reply, call, error)
        app.writer.event("request", {"id": request_id, "caller": caller or None, **line})
        error = None  # it holds this frame, and this frame would hold it, and the body with it


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
        if error.body and not call.native:
            # One provider, one answer: the caller gets its very bytes, in its very status.
            reply.send(error.status, error.body, headers)
            return
    elif call:
        headers |= told_of_the_choice(call)
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = str(error.extra.get("allow", ""))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = 'Bearer realm="bitrouter"'
    told = codec.render_error(error)
    if request and _read_path(app, request).below in (NATIVE_PATH, "/feedback"):
        told = {"error": error.message}
    reply.send(codec.render_status(error), compact(told), headers)


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
        facts |= {
            "target": f"{target.name}/{printable(target.model)}",
            "attempts": call.attempts_made,
        }
    if call.first_at is not None:
        facts["ttft_ms"] = round((call.first_at - call.started_at) * 1000, 1)
    if call.skipped:
        facts["skipped"] = ", ".join(f"{name} ({why})" for name, why in call.skipped.items())
    if usage:
        facts |= {"in": usage.input_tokens, "out": usage.output_tokens}
        facts["cached"] = usage.cached_tokens
        facts["cost_usd"] = call.cost_usd
    facts["warnings"] = _warned_of(call)
    facts["duration_ms"] = round((time.monotonic() - call.started_at) * 1000, 1)
    return facts


def _warned_of(call: Call) -> str | None:
    told = "usage_unknown" if _usage_is_missing(call) else None
    if not call.losses.found:
        return told
    lost = [f"{loss.code}:{loss.field}" for loss in call.losses.found]
    return ",".join([*lost, told] if told else lost)


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
    app: App, request: HttpRequest, asked: _Asked, caller: str, request_id: str, started_at: float
) -> Call:
    """Understand a request to a model. Raises BadRequest, naming the field."""
    op, model = asked.op, asked.model
    assert op is not None  # noqa: S101  what is asked is no page
    content_type = request.headers.get("content-type", "")
    media = content_type.partition(";")[0].strip().lower()
    call = Call(request_id, op, model, request.headers, started_at, caller)
    call.strict = request.headers.get("x-bitrouter-strict", "").lower() in ("1", "true")
    call.explain = request.headers.get("x-bitrouter-explain", "").lower() in ("1", "true")
    call.rules = app.config.upstream
    call.withheld = app.router.key_headers
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
        if asked.native:
            call.native = True
            call.document = Document(compact(native_as_chat(call.document.value)))
        if not model:
            call.model = maybe(call.document.value, "model", str) or ""
        _read_wishes(app, call)
    else:
        shown = printable(content_type, 60)
        raise UnsupportedMedia(f"content-type: expected application/json, got {shown!r}")
    call.model = _model_id(call.model, "model")
    call.models = tuple(_model_id(one, f"models[{n}]") for n, one in enumerate(call.models))
    call.stream = _streams(call)
    call.history = _history(app, call)
    return call


def _model_id(text: str, where: str) -> str:
    """A model id as it was meant. Raises BadRequest."""
    text = _UNSEEN.sub("", text).strip()
    if {".", ".."} & set(re.split("[/:]", text)):  # it may become part of a path
        raise BadRequest(f"{where}: `.` and `..` are no part of a model id", param=where)
    if not text or len(text) > _MAX_MODEL_CHARS:
        raise BadRequest(
            f"{where}: expected a model id such as openai/gpt-4o-mini; GET /v1/models lists them",
            code="missing_required_parameter",
            param=where,
        )
    return text


# Terminals' escape sequences and control characters, which come with models copied from one.
_UNSEEN = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f]")
_FOR_US = ("models", "provider", "preset")
_MAX_MODELS = 8


def call_of(app: App, op: Operation, model: str, headers: Headers, body: bytes) -> Call:
    """A request to a model that came in no connection. Raises BadRequest."""
    request = HttpRequest(
        RequestHead("POST", "/", headers, keep_alive=True, minor=1), "/", "", body
    )
    asked = _Asked(op, model)
    return _read_call(app, request, asked, "", app.new_id(), time.monotonic())


def _cross_bridge(app: App, call: Call, document: Document) -> None:
    """Make of a request in TensorZero's words one in ours. Raises BadRequest or NotFound."""
    if call.op.protocol is not ApiProtocol.CHAT_COMPLETIONS:
        raise BadRequest(
            "model: names that begin with tensorzero:: are for /v1/chat/completions and "
            "/v1/embeddings; `bitrouter migrate tensorzero` lists their names here",
            param="model",
        )
    now_ms = time.time_ns() // 10**6

    def new_id() -> str:
        return uuid7(now_ms, app.random.getrandbits(80))

    native = call.native
    bridge, ours = bridge_of(document.value, call.model, app.config, new_id, native=native)
    name = preset_name(bridge.function)
    preset = app.config.presets.get(name) if bridge.function else None
    if preset and preset.candidates and preset.candidates[0].preset:
        preset = app.config.presets.get(preset.candidates[0].preset)
    call.bridge, call.model = bridge, ours
    call.document = document.changed(bridged_changes(document.value, ours, preset))


def _read_wishes(app: App, call: Call) -> None:
    """Take what is meant for us out of a request: `models`, `provider` and `preset`. A gateway
    that the model id names gets them itself. Raises BadRequest, naming the field."""
    document = call.document
    if document is not None and is_bridged(document.value, call.model):
        _cross_bridge(app, call, document)
        document = call.document
    if document is None or not any(name in document.value for name in _FOR_US):
        call.given = document
        return
    body = document.value
    place, _, _ = split_place(call.model)
    known = PROVIDERS.get(provider_id(place))
    if known and known.kind == "gateway":
        call.given = document
        return
    models = strings_in(body.get("models"), "models")
    if len(models) > _MAX_MODELS:
        raise BadRequest(
            f"models: expected at most {_MAX_MODELS} model ids, got {len(models)}", param="models"
        )
    if models:
        call.models, call.model = models, models[0]
    preset = maybe(body, "preset", str)
    if preset:
        name = preset.removeprefix("@")
        call.model = f"@{name}/{call.model}" if call.model else f"@{name}"
        call.models = tuple(f"@{name}/{one}" for one in models)
    wanted = maybe(body, "provider", dict)
    if wanted:
        call.wishes = wishes_in(wanted)
    changes = [Change(f"/{name}", delete=True) for name in _FOR_US if name in body]
    if "model" not in body and call.op.protocol is not ApiProtocol.GENERATE_CONTENT:
        changes.append(Change("/model", call.model))
    call.given = call.document = document.changed(changes)


def _history(app: App, call: Call) -> tuple[Message, ...] | None:
    """The conversation behind `previous_response_id`, if it was we who answered it."""
    if call.op is not RESPONSES_OP or call.document is None:
        return None
    ident = maybe(call.document.value, "previous_response_id", str)
    if not ident or not ident.startswith("resp_br"):
        return None
    known: tuple[Message, ...] | None = app.turns.get((call.caller, ident), time.monotonic())
    if known is None:
        raise BadRequest(
            f"previous_response_id: {printable(ident, 64)} is not known here (any more); "
            "send the conversation in `input`",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    return known


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
    wanted_ones = _query_filter(request.query[:1024], tuple(app.router.active))
    kept = [one for one in listed if wanted_ones(one)]
    reply.send(200, compact(shape.all(kept, request.query)), JSON_HEADERS)


class ModelFilter(NamedTuple):
    """Which models of a list are wanted.

    Attributes:
        max_price: US dollars per million tokens of input.
        min_context: tokens.
    """

    provider: str = ""
    capability: str = ""
    modality: str = ""
    max_price: float | None = None
    min_context: int = 0

    def __call__(self, one: Listed) -> bool:
        words = {"text", *(word.partition("_")[0] for word in one.able if word.endswith("put"))}
        words |= {"pdf"} if "file_input" in one.able else set()
        context = one.context or (one.facts.context if one.facts else 0)
        dear = self.max_price is not None and (
            one.price.input is None or one.price.input > self.max_price
        )
        return (
            (not self.provider or self.provider in one.providers)
            and (not self.capability or self.capability in one.able)
            and (not self.modality or self.modality in words)
            and not dear
            and context >= self.min_context
        )


MODALITIES = ("text", "image", "audio", "video", "file", "pdf")


def model_filter(asked: Mapping[str, str], known: Iterable[str]) -> ModelFilter:
    """A filter from its fields as text. Raises BadRequest, naming the field."""
    provider = provider_id(asked.get("provider", ""))
    capability, modality = asked.get("capability", ""), asked.get("modality", "")
    for name, value, allowed in (
        ("provider", provider, (*PROVIDERS, *known)),
        ("capability", capability, CAPABILITIES),
        ("modality", modality, MODALITIES),
    ):
        if value and value not in allowed:
            near = near_misses(value, allowed, 2)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else (f"known are {', '.join(allowed[:20])}")
            )
            said = f"{name}: {printable(value, 64)!r} is not known; {hint}"
            raise BadRequest(said, param=name)
    numbers: list[float | None] = []
    for name in ("max_price", "min_context"):
        text = asked.get(name, "")
        if text and not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text):
            raise BadRequest(f"{name}: expected a number, got {printable(text, 64)!r}", param=name)
        numbers.append(float(text) if text else None)
    return ModelFilter(provider, capability, modality, numbers[0], int(numbers[1] or 0))


@functools.lru_cache(maxsize=256)
def _query_filter(query: str, known: tuple[str, ...]) -> ModelFilter:
    pairs = dict(pair.partition("=")[::2] for pair in query.split("&"))
    return model_filter({name: unquote(value) for name, value in pairs.items()}, known)


class _ModelShape(NamedTuple):
    one: Callable[[Listed], JsonObject]
    all: Callable[[list[Listed], str], JsonObject]  # of a query: a page, where there are pages


def _extras(one: Listed) -> JsonObject:
    """What we know beyond the protocol's own fields; clients ignore keys they do not know."""
    facts, price = one.facts, one.price
    extras: JsonObject = {"providers": list(one.providers)}
    if one.context or (facts and facts.context):
        extras["context_length"] = one.context or (facts.context if facts else 0)
    if one.max_output or (facts and facts.max_output):
        extras["max_output_tokens"] = one.max_output or (facts.max_output if facts else 0)
    rates = {"input": price.input, "output": price.output}
    rates |= {"cache_read": price.cache_read, "cache_write": price.cache_write}
    if known := {k: v for k, v in rates.items() if v is not None}:
        extras["pricing_usd_per_million"] = known
    if one.able:
        extras["capabilities"] = list(one.able)
    if facts:
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
        "lifecycle": "active",
        "max_input_tokens": extras.get("context_length"),
        "max_tokens": extras.get("max_output_tokens"),
        # wire: `capabilities` is an object of Anthropic's own; anthropic 2.13
        **{name: value for name, value in extras.items() if name != "capabilities"},
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


def _openai_list(models: list[Listed], query: str) -> JsonObject:  # noqa: ARG001
    return {"object": "list", "data": [_openai_model(one) for one in models]}


def _anthropic_list(models: list[Listed], query: str) -> JsonObject:
    """wire: docs.claude.com/en/api/models-list, read 2026-11: limit 1-1000, 20 unless told."""
    asked = dict(pair.partition("=")[::2] for pair in query.split("&"))
    limit = _count(asked, "limit", 20)
    ids = [model.id for model in models]
    after, before = unquote(asked.get("after_id", "")), unquote(asked.get("before_id", ""))
    start = ids.index(after) + 1 if after in ids else 0
    end = ids.index(before) if before in ids else len(ids)
    size = max(1, min(limit, 1000))
    page = models[start:end][-size:] if before in ids else models[start:end][:size]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    told = [_anthropic_model(one) for one in page]
    more = len(page) < end - start
    return {"data": told, "has_more": more, "first_id": first, "last_id": last}


def _count(asked: Mapping[str, str], name: str, default: int) -> int:
    return int(asked[name]) if re.fullmatch(r"[0-9]{1,9}", asked.get(name, "")) else default


def _google_list(models: list[Listed], query: str) -> JsonObject:
    asked = dict(pair.partition("=")[::2] for pair in query.split("&"))
    size, start = _count(asked, "pageSize", 50), _count(asked, "pageToken", 0)
    end = start + max(1, min(size, 1000))
    token = {"nextPageToken": str(end)} if end < len(models) else {}
    return {"models": [_google_model(one) for one in models[start:end]], **token}


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


def status_facts(app: App) -> JsonObject:
    """What runs here and how it does, for people and for dashboards. No secrets."""
    now = time.monotonic()
    return {
        **health_facts(app),
        "pid": os.getpid(),
        "listen": app.config.server.listen,
        "reloads": app.reloads,
        "warnings": list(app.warnings),
        "active": {
            ident: {"enabled_by": one.enabled_by, "accounts": len(one.accounts)}
            for ident, one in app.router.active.items()
        },
        "limits": app.health.limits.used(now),
        "vendor_limits": app.health.room(now),
        "targets": app.health.meter.all(now),
    }


async def _get_status(app: App, request: HttpRequest, reply: Reply) -> None:  # noqa: ARG001
    reply.send(200, compact(status_facts(app)), JSON_HEADERS)


# What is served where. Paths are below /v1 and /v1beta; models have OPERATIONS and GEMINI_VERBS.

_PAGES: dict[str, Handler] = {
    "/health": _get_health,
    "/models": _list_models,
    "/api/status": _get_status,
}

_GOOGLE_PATH = re.compile(r"/(?:models/)?([^/:].*):(\w+)")


class _Asked(NamedTuple):
    """What a path and a method come to: an operation on a model, or a page."""

    op: Operation | None = None
    model: str = ""
    page: Handler | None = None
    native: bool = False  # in the words of TensorZero's own API


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
    if below == NATIVE_PATH:
        _check_method(method, "POST")
        return _Asked(CHAT_OP, native=True)
    if below == "/feedback":
        raise ProtocolUnsupported(
            "feedback is not shipped: keep it in your own store, by the ids that answers carry",
        )
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
# 39. server: listening, finding local servers, draining
# ---------------------------------------------------------------------------------------------

_DRAIN_S = 30.0
_BACKLOG = 2048
_DISCOVER_EVERY_S = 30.0
_DISCOVER_WAIT_S = 1.0


async def serve(
    app: App,
    greet: Callable[[App, Listener], None],
    *,
    find_local: bool = True,
    control: str = "",
    watched: Callable[[], tuple[str, ...]] = tuple,
    parent: int = 0,
    answers_health: bool = True,
) -> None:
    """Listen until SIGTERM or Ctrl-C, then drain. A second signal cuts everything at once.

    Args:
        control: the unix socket at which the command line finds us; "" for none.
        watched: the files whose change means to read the configuration anew.
        parent: the process with which this one is to end; 0 for none.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    listener = Listener(app)
    await listener.open()
    listens = app.config.server.health_listen and answers_health
    stop_health = start_health_listener(app) if listens else None
    app.writer.attach(loop)
    _on_signals(app, loop, stop)
    controller = await _open_control(app, control) if control else None
    greet(app, listener)
    raise_descriptor_limit()
    _collect_less()
    if find_local:
        app.spawn(_discover_for_ever(app))
    app.spawn(_watch(app, watched))
    if parent:
        app.spawn(_end_with(parent, stop))
    await stop.wait()
    app.writer.event("draining", {"connections": listener.connections})
    draining = app.spawn(listener.drain())
    stop.clear()
    again = loop.create_task(stop.wait())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if controller:
        controller.close()
        with suppress(OSError):
            os.unlink(control)  # noqa: PTH108
    if stop_health:
        stop_health()
    app.writer.event("stopped", {})
    app.writer.attach(None)


# A configuration that changes.

_WATCH_EVERY_S = 0.5


def _stamp_of(path: str) -> tuple[int, int, int] | None:
    """What shows that a file has changed; None if it is not there."""
    try:
        facts = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


async def _watch(app: App, watched: Callable[[], tuple[str, ...]]) -> None:
    """Reload when a file has changed and is at rest again: editors write in several steps."""
    known = {path: _stamp_of(path) for path in watched()}
    before = known
    while True:
        await asyncio.sleep(_WATCH_EVERY_S)
        now = {path: _stamp_of(path) for path in watched()}
        settled, before = now == before, now
        there = all(list(now.values())[:1])  # the file itself, if not its keys
        if settled and there and now != known and app.reload:
            await app.reload({})
            before = known = {path: _stamp_of(path) for path in watched()}


async def _end_with(parent: int, stop: asyncio.Event) -> None:
    """Drain when the process that started this one is gone: nobody could tell it anything."""
    while os.getppid() == parent:  # noqa: ASYNC110  nothing else tells of it
        await asyncio.sleep(_WATCH_EVERY_S)
    stop.set()


async def _reload_on_signal(app: App) -> None:
    if app.reload:
        await app.reload({})


# The socket by which the command line talks to us: for this user alone.


async def _open_control(app: App, path: str) -> asyncio.Server | None:
    opened = OpenConnections()
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120
        with suppress(FileNotFoundError):
            if not answers_at(path):
                os.unlink(path)  # noqa: PTH108  of one that was killed
        return await _listen_on_path(path, lambda: CallerConnection(app, CONTROL, opened))
    except (OSError, AttributeError) as exc:  # AttributeError: Windows has no unix sockets
        log.warning("no_control_socket path=%s reason=%s", path, exc)
        return None


def answers_at(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


async def _control(app: App, request: HttpRequest, reply: Reply) -> None:
    """Serve the command line. Who can open the socket is the user that we run as."""
    if request.path == "/status":
        reply.send(200, compact(status_facts(app)), JSON_HEADERS)
    elif request.path == "/variables":
        reply.send(200, compact({"names": sorted(app.variables())}), JSON_HEADERS)
    elif request.path == "/reload" and request.head.method == "POST" and app.reload:
        try:
            given = as_object(parse_json(request.body or b"{}"))
        except (ValueError, RecursionError) as exc:
            _refuse_control(app, request, reply, BadRequest(f"the body is not JSON: {exc}"))
            return
        taken = given.keys() & set(app.variables())
        environ = {name: str(given[name]) for name in taken}
        reply.send(200, compact(await app.reload(environ)), JSON_HEADERS)
    else:
        reply.send(404, b"{}", JSON_HEADERS)


def _refuse_control(
    app: App,  # noqa: ARG001
    request: HttpRequest | None,  # noqa: ARG001
    reply: Reply,
    error: BitrouterError,
) -> None:
    reply.send(error.status, compact({"error": error.message}), JSON_HEADERS)


CONTROL = Service(lambda *_: None, _control, _refuse_control)


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
        check_safety(app.config, app.environ)

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
                several = True if app.config.server.workers > 1 else None
                self._server = await loop.create_server(
                    accept, host, int(port), backlog=_BACKLOG, reuse_port=several
                )
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


def check_safety(config: Config, environ: Mapping[str, str]) -> None:
    """Refuse to serve other machines without keys. Raises ConfigError."""
    keys_hint = (
        'give callers keys ([keys.NAME] key = "..." in bitrouter.toml, or BITROUTER_KEYS=key,... '
        "in the environment)"
    )
    listen, required = config.server.listen, auth_required(config)
    if not is_local(listen) and not required:
        raise ConfigError(
            f"server.listen: {listen} can be reached by other machines, and auth is off: "
            f'{keys_hint} and set server.auth = "required"'
        )
    if required and not caller_keys(config, environ):
        raise ConfigError(f"server.auth: keys are required and there are none: {keys_hint}")


# Servers on this machine: looked for after we listen, and again from time to time.


async def _discover_for_ever(app: App) -> None:
    for n in itertools.count():
        await discover(app, everyone=n % _REMOTE_EVERY == 0)
        await asyncio.sleep(_DISCOVER_EVERY_S)


_REMOTE_EVERY = 20  # rounds: servers elsewhere (`auto_discover`) are asked every ten minutes


async def discover(app: App, *, everyone: bool = True) -> None:
    """Find out which local servers run and what they serve, and what those serve that the file
    wants to be asked; replace the router if that changed."""
    configured, _ = active_providers(app.config, app.environ)
    asked = {
        ident: configured.get(ident)
        for ident, facts in PROVIDERS.items()
        if facts.kind == "local" and (ident in configured or app.may_find(ident))
    }
    if everyone:
        asked |= {ident: one for ident, one in configured.items() if one.given.auto_discover}
    found = await asyncio.gather(
        *(_look(app, given.facts if given else PROVIDERS[i], given) for i, given in asked.items())
    )
    local = {i: one for i, one in app.local.items() if i not in asked and i in configured}
    local |= {ident: one for ident, one in zip(asked, found, strict=True) if one}
    if {i: one.models for i, one in local.items()} != {
        i: one.models for i, one in app.local.items()
    }:
        app.local = local
        app.reroute()
        names = [f"{ident}:{len(one.models)}" for ident, one in local.items() if one.models]
        app.writer.event("local_servers", {"found": ",".join(names) or "none"})


async def _look(app: App, facts: Provider, given: ActiveProvider | None) -> ActiveProvider | None:
    """A provider with the models that it says it serves; None if it says nothing."""
    if given is None:
        account = Account("", Secret(""), dict(facts.bases))
        where = urlsplit(next(iter(facts.bases.values()))).netloc
        given = ActiveProvider(facts, (account,), f"found on {where}", found=True)
        if app.config.server.listen.endswith(f":{where.rpartition(':')[2]}"):
            return None  # that is ourselves
    ids = await _model_ids(app, given)
    return given._replace(models=ids) if ids else None


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
    ids = [name for name in ids if re.fullmatch(r"[\w.][\w ./:+@-]{0,254}", name)]
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


def _on_signals(app: App, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    import signal

    with suppress(NotImplementedError, AttributeError):  # Windows has no SIGHUP
        loop.add_signal_handler(signal.SIGHUP, lambda: app.spawn(_reload_on_signal(app)))

    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError):  # Windows: Ctrl-C still arrives as KeyboardInterrupt
            loop.add_signal_handler(number, stop.set)


# Several processes that share the port: each has its own connections, health and limits.

_RESTART_S = 1.0


def serve_many(count: int, serve_one: Callable[[int], int]) -> int:
    """Run so many processes, start those anew that die, and stop all on SIGTERM or Ctrl-C.

    Args:
        serve_one: serves, as the n-th from 1; returns its exit status.
    """
    import signal

    pids: dict[int, tuple[int, float]] = {}
    stopping = False

    def start(n: int) -> None:
        pid = os.fork()
        if pid:
            pids[pid] = (n, time.monotonic())
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can read its configuration anew
        status = 1
        try:
            status = serve_one(n)
        except BitrouterError as error:
            log.error("worker_failed worker=%d error=%s", n, error.message)  # noqa: TRY400
        finally:
            os._exit(status)

    def tell(number: int, frame: object) -> None:  # noqa: ARG001
        nonlocal stopping
        stopping = stopping or number != signal.SIGHUP
        for pid in list(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, number if number == signal.SIGHUP else signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, tell)
    for n in range(1, count + 1):
        start(n)
    failed = 0
    while pids:
        pid, status = os.waitpid(-1, 0)
        n, born_at = pids.pop(pid, (0, 0.0))
        if n == 0 or stopping:
            continue
        if time.monotonic() - born_at < _RESTART_S:
            failed = os.waitstatus_to_exitcode(status) or 1
            tell(signal.SIGTERM, None)  # it cannot even start: no use in trying for ever
            continue
        log.error("worker_died worker=%d status=%d", n, os.waitstatus_to_exitcode(status))
        start(n)
    return abs(failed)


def raise_descriptor_limit() -> None:
    """A stream needs two descriptors: take as many as we may have."""
    with suppress(ImportError, ValueError, OSError):  # Windows has neither limit nor module
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---------------------------------------------------------------------------------------------
# 40. cli: the command line
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
            text = file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from None
    folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH120, PTH100

    def read_file(name: str) -> str:
        with open(os.path.join(folder, os.path.expanduser(name)), encoding="utf-8") as file:  # noqa: PTH118, PTH111, PTH123
            return file.read(_MAX_KEY_FILE)

    loaded = parse_config(text, environ, path, read_file)
    files = (os.path.join(folder, os.path.expanduser(name)) for name in loaded.files)  # noqa: PTH118, PTH111
    return loaded._replace(files=(path, *files)), path


_MAX_KEY_FILE = 65_536


def _checked_config(given: str, environ: Mapping[str, str]) -> Loaded:
    """A configuration to serve with. Raises ConfigError with all that is wrong."""
    loaded, _ = _load_config(given, environ)
    wrong = [*loaded.problems, *loaded.fatal]
    if wrong:
        raise ConfigError("the configuration has problems:\n  " + "\n  ".join(wrong))
    return loaded


def _usable_config(given: str, environ: Mapping[str, str]) -> Config:
    return _checked_config(given, environ).config


def command_serve(args: argparse.Namespace) -> int:
    loaded = _checked_config(args.config, os.environ)
    config = loaded.config
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
    workers = config.server.workers
    if workers == 1:
        return _serve_one(args.config, loaded, writer, 0)
    if not hasattr(os, "fork") or not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("server.workers: this system cannot share a port between processes")
    _check_free(config.server.listen)
    return serve_many(workers, lambda n: _serve_one(args.config, loaded, writer, n))


def _check_free(listen: str) -> None:
    """Workers would share the port with anybody who has it. Raises ConfigError."""
    host, _, port = listen.rpartition(":")
    if listen.startswith("unix:") or port == "0":
        raise ConfigError("server.workers: several processes need HOST:PORT to listen on")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, int(port)), family=family).close()
    except OSError as exc:
        said = f"cannot listen on {listen}: {exc.strerror or exc}"
        raise ConfigError(f"{said}; another server has it: choose another with --port") from None


def _serve_one(given: str, loaded: Loaded, writer: LogWriter, worker: int) -> int:
    """worker: 0 if this process is the only one."""
    if worker:  # it may stand in for one that died: the file may be another by now
        with suppress(ConfigError):
            listen, loaded = loaded.config.server.listen, _checked_config(given, os.environ)
            loaded.config.server.listen = listen
    timeouts = loaded.config.upstream.timeouts
    shortest_s = min(timeouts.first_token_s, timeouts.idle_s, timeouts.total_s)
    app = App(loaded.config, os.environ, writer, tick_s=max(0.02, min(0.5, shortest_s / 4)))
    reloader = _Reloader(app, given, loaded)
    app.reload, app.variables = reloader.reload, reloader.variables
    control = control_path(loaded.config.server.listen, os.environ, worker)
    with suppress(KeyboardInterrupt):
        asyncio.run(
            serve(
                app,
                greet if worker < 2 else (lambda *_: None),
                control=control,
                watched=lambda: reloader.files,
                parent=os.getppid() if worker else 0,
                answers_health=worker < 2,
            )
        )
    return 0


def control_path(listen: str, environ: Mapping[str, str], worker: int = 0) -> str:
    """The socket at which the command line finds the server that listens at an address."""
    home = environ.get("BITROUTER_HOME") or os.path.expanduser("~/.bitrouter")  # noqa: PTH111
    port = listen.rpartition(":")[2]
    if not port.isdigit():
        port = hashlib.sha256(listen.encode()).hexdigest()[:8]
    return os.path.join(home, f"{port}.{worker}.sock" if worker else f"{port}.sock")  # noqa: PTH118


_AT_START = ("listen", "workers", "health_listen", "log_format")  # what no reload changes


class _Reloader:
    """Reads the configuration anew. What is broken changes nothing."""

    def __init__(self, app: App, given: str, loaded: Loaded) -> None:
        self.files = loaded.files
        self._app = app
        self._given = given
        self._overlay: dict[str, str] = {}
        self._busy = asyncio.Lock()

    def variables(self) -> set[str]:
        """Those that the file names, those of its providers, and those of other providers that are
        on already: nobody's shell turns on a provider that nobody named."""
        loaded, path = _load_config(self._given, self._app.environ)
        own = {provider_id(name) for name in loaded.config.providers}
        names = {f"{ident.upper().replace('-', '_')}_API_KEY" for ident in own}
        for known in PROVIDERS.values():
            if known.id in own or known.id in self._app.router.active:
                names |= {*known.env, *base_variables(known)}
        if path:
            with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:  # noqa: PTH123
                names |= set(re.findall(r"\$\{([A-Za-z_]\w*)", file.read()))
        return names

    async def reload(self, environ: Mapping[str, str]) -> JsonObject:
        """environ: variables that count from now on, beside those of this process."""
        async with self._busy:
            app = self._app
            overlay = {**self._overlay, **environ}
            seen = {**os.environ, **overlay}
            before = app.config.server
            told: list[str] = []
            try:
                loaded = await asyncio.to_thread(_checked_config, self._given, seen)
                for name in _AT_START:
                    if getattr(loaded.config.server, name) != getattr(before, name):
                        told += [f"server.{name} changes with the next start"] * bool(loaded.files)
                        setattr(loaded.config.server, name, getattr(before, name))
                check_safety(loaded.config, seen)
            except ConfigError as error:
                problems = error.message.split("\n  ")
                problems = problems[1:] or problems
                app.writer.event("reload_failed", {"error": "; ".join(problems)}, level="error")
                return {"reloaded": False, "errors": problems}
            self.files = loaded.files or self.files
            self._overlay = overlay
            told += loaded.unset
            app.environ = seen
            app.configure(loaded.config)
            app.reloads += 1
            for warning in [*told, *app.warnings]:
                log.warning("configuration %s", warning)
            facts = {"file": self.files[0] if self.files else None}
            app.writer.event("reloaded", {**facts, "providers": ",".join(app.router.active)})
            return {"reloaded": True, "warnings": [*told, *app.warnings]}


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


# A server that runs, asked by way of its control socket.


def _controls(args: argparse.Namespace) -> list[str]:
    """The control sockets of the server that the command means. Raises ConfigError for none."""
    loaded, _ = _load_config(args.config, os.environ)
    listen = loaded.config.server.listen
    listen = args.listen or (f"127.0.0.1:{args.port}" if args.port is not None else listen)
    plain = control_path(listen, os.environ)
    stem = plain.removesuffix(".sock")
    found = [plain, *(f"{stem}.{n}.sock" for n in range(1, 257))]
    found = [path for path in found if os.path.exists(path) and answers_at(path)]  # noqa: PTH110
    if not found:
        raise ConfigError(f"no server answers for {listen}; start one with `bitrouter serve`")
    return found


def _ask_control(path: str, method: str, target: str, body: bytes = b"") -> JsonObject:
    import http.client

    connection = http.client.HTTPConnection("localhost", timeout=30)
    if os.stat(path).st_uid != os.getuid():  # noqa: PTH116
        raise ConfigError(f"{path} belongs to another user: it is not asked, nor told any key")
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(path)
        connection.request(method, target, body, {"content-type": "application/json"})
        answer: JsonObject = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise ConfigError(f"the server at {path} does not answer: {exc}") from None
    finally:
        connection.close()
    return answer


def command_reload(args: argparse.Namespace) -> int:
    """The variables that the server asks for go along: they are how keys are rotated."""
    answers = []
    for path in _controls(args):
        names = _ask_control(path, "GET", "/variables").get("names", ())
        told = json.dumps({name: os.environ[name] for name in names if name in os.environ})
        answers.append(_ask_control(path, "POST", "/reload", told.encode()))
    worst = next((answer for answer in answers if not answer.get("reloaded")), answers[0])
    rows = [("error", said) for said in worst.get("errors", ())]
    rows += [("warning", said) for said in worst.get("warnings", ())]
    show(args, worst, rows or [("reloaded", "")])
    return 0 if worst.get("reloaded") else 1


def command_status(args: argparse.Namespace) -> int:
    answers = [_ask_control(path, "GET", "/status") for path in _controls(args)]
    facts = answers[0] if len(answers) == 1 else {"workers": answers}
    rows: list[tuple[str, str]] = []
    for one in answers:
        rows.append((f"pid {one['pid']}", f"{one['status']} on {one['listen']}"))
        rows.append(("up", f"{one['uptime_s']:.0f} s, {one['reloads']} reloads"))
        rows += [(ident, on["enabled_by"]) for ident, on in one["active"].items()]
        rows += [("cooling", f"{name} for {s:.0f} s") for name, s in one["cooling_s"].items()]
        rows += [("warning", said) for said in one["warnings"]]
        rows += [
            (name, ", ".join(f"{k} {v}" for k, v in told.items() if v is not None))
            for name, told in one["targets"].items()
        ]
    show(args, facts, rows)
    return 0


def command_models(args: argparse.Namespace) -> int:
    config = _usable_config(args.config, os.environ)
    active, _ = active_providers(config, os.environ)
    listed = Router(config, active).listing()
    if args.all:
        everybody = {
            ident: ActiveProvider(facts, (), "") for ident, facts in PROVIDERS.items()
        } | active
        listed = [one for one in Router(config, everybody).listing() if one.facts]
    asked = {name: str(getattr(args, name) or "") for name in ModelFilter._fields}
    try:
        wanted = model_filter(asked, active)
    except BadRequest as error:
        raise ConfigError(f"--{error.message.replace('_', '-', 1)}") from None
    listed = [one for one in listed if wanted(one)]
    rows = [_model_row(one) for one in listed]
    show(args, {"models": rows}, [(r["id"], _dollars(r), ",".join(r["providers"])) for r in rows])
    return 0


def _model_row(one: Listed) -> JsonObject:
    price = one.price
    return {
        "id": one.id,
        "providers": list(one.providers),
        "context": one.context or None,
        "capabilities": list(one.able),
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
    """Resolve as the server would; nothing is sent."""
    if not args.model and not args.body:
        args.refuse("name a model, or a request with --body FILE")
    config = _usable_config(args.config, os.environ)
    app = App(config, os.environ, LogWriter(io.StringIO(), as_json=True))
    call = _call_to_explain(args, app)
    wanted = call.models or call.model
    if call.document is None and not args.protocol:
        call.op = _op_for(app.router, call)
    route = app.router.resolve(wanted, call.op, call.wishes)
    if call.document is None:
        facts = _without_body(app, call, route)
    else:
        body = call.document.value
        call.needs = needs_of(body)
        session = session_of(call.headers, body, "")
        share = share_of(session.key)
        chosen = choose(route, call.needs, app.health, time.monotonic(), draw=lambda: share)
        facts = explanation(app, call, route, chosen)
    if not args.explain:
        facts = {name: facts[name] for name in ("model", "protocol", "chain")}
    show(args, facts, _route_rows(facts))
    return 0


def _without_body(app: App, call: Call, route: Route) -> JsonObject:
    """An explanation for any request: without what it would hold."""
    chosen = choose(route, None, app.health, time.monotonic())
    call.given = call.document = Document(
        compact({"model": call.model, **_LEAST[call.op.protocol]})
    )
    facts = explanation(app, call, route, chosen)
    first = facts.get("first", {})
    for name in ("body", "losses"):
        first.pop(name, None)
    return facts


# The least request of each protocol, to see where one would go.
_LEAST: dict[ApiProtocol, JsonObject] = {
    ApiProtocol.CHAT_COMPLETIONS: {"messages": [{"role": "user", "content": "."}]},
    ApiProtocol.RESPONSES: {"input": "."},
    ApiProtocol.MESSAGES: {"max_tokens": 1, "messages": [{"role": "user", "content": "."}]},
    ApiProtocol.GENERATE_CONTENT: {"contents": [{"parts": [{"text": "."}]}]},
}


def _call_to_explain(args: argparse.Namespace, app: App) -> Call:
    protocol = PROTOCOL_NAMES.get(args.protocol)
    raw = _read_body(args.body) if args.body else b""
    document = Document(raw) if raw else None
    protocol = protocol or _protocol_of(document.value if document else {})
    op = GENERATE[protocol]
    headers = {"content-type": "application/json", "x-bitrouter-explain": "1"}
    if document is None:
        return Call(app.new_id(), op, args.model, headers, time.monotonic())
    if args.model:
        document = document.changed(
            [Change("/model", args.model), Change("/models", delete=True)]
            if op.protocol is not ApiProtocol.GENERATE_CONTENT
            else [Change("/models", delete=True)]
        )
    model = args.model if op.protocol is ApiProtocol.GENERATE_CONTENT else ""
    return call_of(app, op, model, headers, document.raw)


def _read_body(name: str) -> bytes:
    """Raises ConfigError."""
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        with open(name, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError as exc:
        raise ConfigError(f"--body: {name} cannot be read: {exc.strerror or exc}") from None


def _protocol_of(body: JsonObject) -> ApiProtocol:
    """The protocol that a request's fields show; Chat Completions and Messages look alike, but
    only Messages must say `max_tokens` and has its system prompt apart."""
    if "contents" in body:
        return ApiProtocol.GENERATE_CONTENT
    if "input" in body:
        return ApiProtocol.RESPONSES
    kinds = (dig(tool, "input_schema") for tool in as_list(body.get("tools")))
    if "system" in body or "thinking" in body or any(kinds):
        return ApiProtocol.MESSAGES
    return ApiProtocol.CHAT_COMPLETIONS


def _op_for(router: Router, call: Call) -> Operation:
    """The operation of the protocol that most of a model's targets speak themselves."""
    routes = []
    for op in GENERATE.values():
        with suppress(ProtocolUnsupported):
            routes.append((router.resolve(call.model, op), op))
    if not routes:
        return call.op
    return max(routes, key=lambda r: sum(t.protocol is r[1].protocol for t in r[0].chain))[1]


def _route_rows(facts: JsonObject) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for step in facts["chain"]:
        who = f"{step['provider']}:{step['account']}" if "account" in step else step["provider"]
        rows.append((f"{step['position']}.", who, f"{step['model']}: {step['reason']}"))
    for left in facts.get("left_out", ()):
        rows += [("-", *left.partition(": ")[::2])]
    first = facts.get("first", {})
    if first.get("url"):
        rows += [("", "", ""), ("", "sends", f"POST {first['url']}")]
        rows += [("", "", line) for line in first["headers"]]
    if first.get("error"):
        rows.append(("", "error", first["error"]))
    if "body" in first:
        rows.append(("", "body", json.dumps(first["body"], ensure_ascii=False)))
    rows += [("", "loses", f"{loss['field']} ({loss['code']})") for loss in first.get("losses", ())]
    return rows


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
        "presets": len(loaded.config.presets),
        "variants": len(loaded.config.variants),
    }
    rows = [("error", said) for said in loaded.problems]
    rows += [("warning", said) for said in loaded.unset]
    show(args, facts, rows or [("ok", path)])
    return 1 if loaded.problems else 0


def command_schema(args: argparse.Namespace) -> int:  # noqa: ARG001
    say(json.dumps(config_schema(), indent=2))
    return 0


def command_show(args: argparse.Namespace) -> int:
    """What is in force, and where each value comes from."""
    loaded, path = _load_config(args.config, os.environ)
    if loaded.problems:
        raise ConfigError("the configuration has problems:\n  " + "\n  ".join(loaded.problems))
    active, warnings = active_providers(loaded.config, os.environ)
    settings = list(settings_of(loaded))
    facts = {
        "path": path or None,
        "settings": [setting._asdict() for setting in settings],
        "providers": {ident: on.enabled_by for ident, on in active.items()},
        "warnings": [*loaded.unset, *warnings],
    }
    rows = [(one.key, json.dumps(one.value), one.origin) for one in settings]
    rows += [(f"providers.{ident}", "on", on.enabled_by) for ident, on in active.items()]
    rows += [("warning", said, "") for said in [*loaded.unset, *warnings]]
    show(args, facts, rows)
    return 0


_EXIT_WARNED, _EXIT_UNREADABLE = 3, 2


def command_migrate(args: argparse.Namespace) -> int:
    """Exit 0 when all was carried over, 3 with warnings, 2 if the files cannot be read, and 1 if
    our own configuration would not be valid or --strict forbids the warnings."""
    try:
        moved = migrate_tensorzero(_files_of(args.paths), _beside)
    except (MigrationError, OSError, UnicodeDecodeError) as exc:
        say(f"bitrouter: {exc}", to_stderr=True)
        return _EXIT_UNREADABLE
    problems = parse_config(moved.text, {}, args.output or "bitrouter.toml").problems
    facts = {
        "converted": dict(moved.counts),
        "notes": [note._asdict() for note in moved.notes],
        "model_names": dict(moved.edits),
        "problems": problems,
        "output": args.output or None,
    }
    if args.report:
        as_json = args.report.endswith(".json")
        told = json.dumps(facts, indent=2) if as_json else _migration_report(moved)
        _write_file(args.report, told)
    refused = bool(problems) or (args.strict and not moved.is_clean)
    if not args.check and not refused:
        if args.output:
            _write_file(args.output, moved.text)
        elif not args.json:
            say(moved.text)
    if args.json:
        say(json.dumps({**facts, "text": moved.text}, indent=2))
    for note in moved.notes:
        say(f"{note.level}: {note.where}: {note.said}", to_stderr=True)
    for problem in problems:
        say(f"error: {problem}", to_stderr=True)
    told = ", ".join(f"{count} {name}" for name, count in moved.counts.items())
    warned = sum(note.level in ("warning", "unknown") for note in moved.notes)
    say(f"converted {told}; {warned} warnings", to_stderr=True)
    if refused:
        return 1
    return 0 if moved.is_clean else _EXIT_WARNED


def _files_of(paths: list[str]) -> list[tuple[str, str]]:
    """The files that paths and globs name, each once. Raises MigrationError for none."""
    import glob

    names: dict[str, None] = {}
    for path in paths:
        magic = glob.has_magic(path)
        found = sorted(glob.glob(path, recursive=True)) if magic else [path]  # noqa: PTH207
        if not found:
            raise MigrationError(f"no file matches {path}")
        names |= dict.fromkeys(name for name in found if os.path.isfile(name) or name == path)  # noqa: PTH113
    texts = []
    for name in names:
        with open(name, encoding="utf-8") as file:  # noqa: PTH123
            texts.append((name, file.read()))
    return texts


def _beside(file: str, name: str) -> str:
    """The text of a file that another one names."""
    place = os.path.join(os.path.dirname(file), name)  # noqa: PTH118, PTH120
    with open(place, encoding="utf-8") as found:  # noqa: PTH123
        return found.read()


def _write_file(name: str, text: str) -> None:
    """Raises ConfigError."""
    try:
        with open(name, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
    except OSError as exc:
        raise ConfigError(f"{name} cannot be written: {exc.strerror or exc}") from None


def _migration_report(moved: Migration) -> str:
    lines = ["# From TensorZero to BitRouter", ""]
    lines += [f"- {count} {name}" for name, count in moved.counts.items()]
    for level, title in (
        ("warning", "Not carried over"), ("unknown", "Not known to TensorZero either"),
        ("note", "Means something else now"), ("info", "Not needed"),
    ):  # fmt: skip
        said = [f"- `{note.where}`: {note.said}" for note in moved.notes if note.level == level]
        lines += ["", f"## {title}", "", *said] if said else []
    lines += ["", "## Model names", "", "Old names go on working; new clients may send:", ""]
    lines += [f"- `{old}`: `{new}`" for old, new in moved.edits.items()]
    return "\n".join(lines) + "\n"


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
    Command("reload", "read the configuration and the keys anew", command_reload,
            (*_CONFIG, *_LISTEN, *_OUTPUT)),
    Command("status", "show how a running server does", command_status,
            (*_CONFIG, *_LISTEN, *_OUTPUT)),
    Command("route", "show where a model id leads, in order, and why", command_route, (
        (("model",), {"help": "such as openai/gpt-4o-mini", "nargs": "?", "default": ""}),
        (("--explain",), {"action": "store_true",
                          "help": "also who was left out, and what the first would be sent"}),
        (("--body",), {"default": "", "metavar": "FILE", "help": "the request; - for stdin"}),
        (("--protocol",), _PROTOCOL), *_CONFIG, *_OUTPUT)),
    Command("models", "list the models that can be asked for now", command_models, (
        (("-p", "--provider"), {"default": "", "help": "only this provider's"}),
        (("--all",), {"action": "store_true", "help": "the whole catalogue, keys or not"}),
        (("--capability",), {"default": "", "help": f"one of {', '.join(CAPABILITIES)}"}),
        (("--modality",), {"default": "", "help": f"one of {', '.join(MODALITIES)}"}),
        (("--max-price",), {"default": "", "help": "US dollars per million input tokens"}),
        (("--min-context",), {"default": "", "help": "tokens"}),
        *_CONFIG, *_OUTPUT)),
    Command("providers", "list providers, and the variable that turns each on", command_providers,
            (*_CONFIG, *_OUTPUT)),
    Command("config validate", "check the configuration file; needs no secrets", command_validate,
            (*_CONFIG, *_OUTPUT)),
    Command("migrate tensorzero", "turn TensorZero's configuration into ours", command_migrate, (
        (("paths",), {"nargs": "+", "metavar": "PATH", "help": "its files, or globs of them"}),
        (("-o", "--output"), {"default": "", "metavar": "FILE", "help": "instead of stdout"}),
        (("--report",), {"default": "", "metavar": "FILE",
                         "help": "what became of each key, as Markdown or .json"}),
        (("--check",), {"action": "store_true", "help": "write no configuration"}),
        (("--strict",), {"action": "store_true", "help": "fail if there is a warning"}),
        *_OUTPUT)),
    Command("config schema", "print a JSON Schema of the configuration file", command_schema),
    Command("config show", "show what is in force, and where each value comes from", command_show,
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
        sub.set_defaults(run=command.run, refuse=sub.error)
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
