"""Heads and bodies of HTTP/1.1: what is read, what is refused, wherever the bytes are cut."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from collections.abc import Iterable

import pytest
from support import every_cut, slices

from bitrouter import (
    CHUNKED,
    MAX_HEAD_BYTES,
    UNTIL_CLOSE,
    BadRequest,
    BodyDecoder,
    HeadTooLarge,
    Inflater,
    RequestHead,
    ResponseHead,
    UpstreamGarbled,
    parse_request_head,
    parse_response_head,
    render_head,
    request_framing,
    response_framing,
)


def head(*lines: str, first: str = "POST /v1/x HTTP/1.1", host: str = "Host: a") -> bytes:
    """A request's head; `lines` hold what comes after the Host header."""
    given = [first, *([host] if host else []), *lines]
    return "".join(f"{line}\r\n" for line in given).encode("latin-1") + b"\r\n"


def framed(*lines: str, first: str = "POST /v1/x HTTP/1.1") -> int:
    return request_framing(parse_request_head(head(*lines, first=first)))


def answer(*lines: str, first: str = "HTTP/1.1 200 OK") -> ResponseHead:
    return parse_response_head(head(*lines, first=first, host=""))


def read_body(pieces: Iterable[bytes], framing: int) -> tuple[bytes, bool, bytes]:
    """A body from its pieces: what it says, whether it is complete, what came after it."""
    decoder, out, rest = BodyDecoder(framing), b"", b""
    for piece in pieces:
        if decoder.done:
            rest += piece
        else:
            out += decoder.feed(piece)
    return out, decoder.done, decoder.rest + rest


def cuts(data: bytes) -> list[Iterable[bytes]]:
    """Every way of cutting in two, and byte by byte."""
    return [*every_cut(data), list(slices(data, 1))]


# --- request heads


def test_a_request_head_is_read() -> None:
    found = parse_request_head(head("X-Key:  spaced \t", "ACCEPT: a", "accept: b", "empty:"))
    assert found[:2] == ("POST", "/v1/x")
    assert found.headers == {"host": "a", "x-key": "spaced", "accept": "a, b", "empty": ""}


CONNECTIONS = [
    # first line             header                      kept alive
    ("GET / HTTP/1.1", "x: y", True),
    ("GET / HTTP/1.1", "Connection: close", False),
    ("GET / HTTP/1.1", "Connection: Close", False),
    ("GET / HTTP/1.1", "Connection: upgrade, close", False),
    ("GET / HTTP/1.0", "x: y", False),
    ("GET / HTTP/1.0", "Connection: Keep-Alive", True),
]


@pytest.mark.parametrize(("first", "line", "kept"), CONNECTIONS)
def test_a_connection_is_kept_as_its_version_and_header_say(
    first: str, line: str, kept: bool
) -> None:
    assert parse_request_head(head(line, first=first)).keep_alive is kept


TARGETS = [
    # as sent                                  path                host
    ("/v1/models?limit=1", "/v1/models?limit=1", "a"),
    ("/v1/models/openai%2Fgpt-x:free", "/v1/models/openai%2Fgpt-x:free", "a"),
    ("http://b:4356/v1?x=1", "/v1?x=1", "b:4356"),
    ("https://b", "/", "b"),
    ("http://b?x=1", "/?x=1", "b"),
    ("http://[::1]:80/", "/", "[::1]:80"),
]


@pytest.mark.parametrize(("target", "path", "host"), TARGETS)
def test_an_absolute_target_s_host_counts(target: str, path: str, host: str) -> None:
    found = parse_request_head(head(first=f"GET {target} HTTP/1.1"))
    assert (found.target, found.headers["host"]) == (path, host)


HOSTS = ["a", "a.b-c:80", "127.0.0.1:4356", "[::1]", "[::1]:4356", "my_host", ""]


@pytest.mark.parametrize("host", HOSTS)
def test_a_plain_host_is_accepted(host: str) -> None:
    assert parse_request_head(head(host=f"Host: {host}")).headers["host"] == host


def test_http_1_0_needs_no_host() -> None:
    assert parse_request_head(head(first="GET / HTTP/1.0", host="")).headers == {}


def test_text_beyond_ascii_is_allowed_in_a_value() -> None:
    assert parse_request_head(head("x: caf\xe9")).headers["x"] == "caf\xe9"


BAD_HEADS = {
    "bare LF after the first line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "bare LF after a field": b"GET / HTTP/1.1\r\nHost: a\nx: y\r\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: a\n\n",
    "bare CR inside a value": b"GET / HTTP/1.1\r\nHost: a\r\nx: y\rz: 1\r\n\r\n",
    "a folded line": head("x: a", " b"),
    "a line folded with a tab": head("x: a", "\tb"),
    "a space before the colon": head("Content-Length : 5"),
    "a tab before the colon": head("Transfer-Encoding\t: chunked"),
    "a space before the first field": head(" x: y", host=""),
    "no colon": head("nonsense"),
    "no name": head(": x"),
    "a space inside a name": head("x y: z"),
    "a letter beyond ASCII in a name": head("n\xe4me: x"),
    "NUL in a value": head("x: a\0b"),
    "a control character in a value": head("x: a\x0bb"),
    "DEL in a value": head("x: a\x7fb"),
    "NUL in the target": head(first="GET /\0 HTTP/1.1"),
    "a space in the target": head(first="GET /a b HTTP/1.1"),
    "two spaces": head(first="GET  / HTTP/1.1"),
    "a tab for a space": head(first="GET\t/ HTTP/1.1"),
    "a space at the end of the line": head(first="GET / HTTP/1.1 "),
    "a target beyond ASCII": head(first="GET /\xfc HTTP/1.1"),
    "a method in lower case": head(first="get / HTTP/1.1"),
    "no method": head(first="/ HTTP/1.1"),
    "no version": head(first="GET /"),
    "HTTP/2": head(first="GET / HTTP/2.0"),
    "HTTP/1.2": head(first="GET / HTTP/1.2"),
    "http in lower case": head(first="GET / http/1.1"),
    "an empty line first": b"\r\n" + head(),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
    "bytes after the head": head() + b"x",
    "no host": head(host=""),
    "two hosts": head("Host: a"),
    "two hosts, spelled apart": head("hOST: b"),
    "two types": head("Content-Type: a", "Content-Type: a"),
    "two encodings": head("Content-Encoding: gzip", "Content-Encoding: gzip"),
    "a user in the host": head(host="Host: me@a"),
    "a path in the host": head(host="Host: a/b"),
    "two ports": head(host="Host: a:1:2"),
    "a space in the host": head(host="Host: a b"),
    "a list of hosts": head(host="Host: a, b"),
    "a user in an absolute target": head(first="GET http://me@a/ HTTP/1.1"),
    "another scheme": head(first="GET ftp://a/ HTTP/1.1"),
    "a star": head(first="OPTIONS * HTTP/1.1"),
    "an authority": head(first="CONNECT a:443 HTTP/1.1"),
    "a relative path": head(first="GET v1/models HTTP/1.1"),
    "a body length given twice": head("Content-Length: 5", "Content-Length: 5"),
    "two body lengths": head("Content-Length: 5", "content-length: 6"),
    "two transfer codings": head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
}


@pytest.mark.parametrize("raw", BAD_HEADS.values(), ids=BAD_HEADS)
def test_a_head_that_could_be_read_two_ways_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request_head(raw)
    assert caught.value.code == "malformed_http"


def test_a_refused_head_is_shown_without_its_control_characters() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request_head(head("x: \x1b[2J\0" + "y" * 500))
    assert caught.value.message.isprintable() and len(caught.value.message) < 400


def test_there_is_a_limit_to_the_number_of_fields() -> None:
    assert parse_request_head(head(*(f"x{i}: y" for i in range(255)))).method == "POST"
    with pytest.raises(HeadTooLarge, match="there are 257 headers"):
        parse_request_head(head(*(f"x{i}: y" for i in range(256))))


@pytest.mark.parametrize("unit", [b"x: y\r\n", b"x: " + b"y" * 60_000 + b"\r\n", b"a" * 60_000])
def test_the_longest_of_bad_heads_is_judged_without_backtracking(unit: bytes) -> None:
    raw = head().removesuffix(b"\r\n") + unit * (MAX_HEAD_BYTES // len(unit)) + b"\x00\r\n\r\n"
    with pytest.raises(BadRequest, match="malformed header line"):
        parse_request_head(raw)


# --- framings

FRAMINGS = [
    ([], 0),
    (["Content-Length: 0"], 0),
    (["Content-Length: 42"], 42),
    (["Content-Length:  007 "], 7),
    (["Transfer-Encoding: chunked"], CHUNKED),
    (["Transfer-Encoding: Chunked"], CHUNKED),
]


@pytest.mark.parametrize(("lines", "wanted"), FRAMINGS)
def test_a_request_says_how_long_its_body_is(lines: list[str], wanted: int) -> None:
    assert framed(*lines) == wanted


SMUGGLED = {
    "both": ["Content-Length: 5", "Transfer-Encoding: chunked"],
    "both, the other way round": ["Transfer-Encoding: chunked", "Content-Length: 5"],
    "an empty length beside a coding": ["Transfer-Encoding: chunked", "Content-Length:"],
    "gzip": ["Transfer-Encoding: gzip"],
    "gzip, chunked": ["Transfer-Encoding: gzip, chunked"],
    "chunked twice": ["Transfer-Encoding: chunked, chunked"],
    "chunked, identity": ["Transfer-Encoding: chunked, identity"],
    "identity": ["Transfer-Encoding: identity"],
    "an empty coding": ["Transfer-Encoding:"],
    "a coding in quotes": ['Transfer-Encoding: "chunked"'],
    "a coding with a vertical look-alike": ["Transfer-Encoding: chunked\xa0"],
    "a sign": ["Content-Length: +5"],
    "a negative length": ["Content-Length: -5"],
    "hex": ["Content-Length: 0x5"],
    "a list": ["Content-Length: 5, 5"],
    "a fraction": ["Content-Length: 5.0"],
    "an underscore": ["Content-Length: 1_0"],
    "a space inside": ["Content-Length: 1 0"],
    "nothing": ["Content-Length:"],
    "superscript": ["Content-Length: \xb2"],
    "too many digits": ["Content-Length: " + "9" * 16],
}


@pytest.mark.parametrize("lines", SMUGGLED.values(), ids=SMUGGLED)
def test_a_body_that_could_end_in_two_places_is_refused(lines: list[str]) -> None:
    with pytest.raises(BadRequest) as caught:
        framed(*lines)
    assert caught.value.code == "malformed_http"


def test_http_1_0_knows_no_chunks() -> None:
    with pytest.raises(BadRequest, match="is not accepted"):
        framed("Transfer-Encoding: chunked", first="POST / HTTP/1.0")


# --- response heads


def test_a_response_head_is_read() -> None:
    found = answer("Retry-After: 2", "Set-Cookie: a", "set-cookie: b", first="HTTP/1.1 429 Slow")
    assert found == (429, {"retry-after": "2", "set-cookie": "a, b"}, True)


STATUS_LINES = [
    ("HTTP/1.1 200 OK", 200, True),
    ("HTTP/1.1 200 ", 200, True),
    ("HTTP/1.1 529", 529, True),
    ("HTTP/1.0 200 OK", 200, False),
    ("HTTP/1.1 404 Nicht gefunden \xfc", 404, True),
]


@pytest.mark.parametrize(("first", "status", "kept"), STATUS_LINES)
def test_a_reason_phrase_may_be_anything(first: str, status: int, kept: bool) -> None:
    found = answer(first=first)
    assert (found.status, found.keep_alive) == (status, kept)


def test_a_provider_may_close_its_connection() -> None:
    assert not answer("Connection: close").keep_alive
    assert answer("Connection: keep-alive", first="HTTP/1.0 200 OK").keep_alive


BAD_ANSWERS = {
    "not HTTP": b"220 smtp ready\r\n\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nx: y\r\n\r\n",
    "a folded line": b"HTTP/1.1 200 OK\r\nx: y\r\n z\r\n\r\n",
    "a space before a colon": b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "too many fields": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 257 + b"\r\n",
}


@pytest.mark.parametrize("raw", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_provider_s_bad_head_is_the_provider_s_fault(raw: bytes) -> None:
    with pytest.raises(UpstreamGarbled):
        parse_response_head(raw)


ANSWER_FRAMINGS = [
    (200, [], "POST", UNTIL_CLOSE),
    (200, ["Content-Length: 3"], "POST", 3),
    (200, ["Transfer-Encoding: CHUNKED"], "POST", CHUNKED),
    (204, ["Content-Length: 3"], "POST", 0),
    (304, [], "GET", 0),
    (100, [], "POST", 0),
    (200, ["Content-Length: 3"], "HEAD", 0),
]


@pytest.mark.parametrize(("status", "lines", "method", "wanted"), ANSWER_FRAMINGS)
def test_an_answer_says_how_long_its_body_is(
    status: int, lines: list[str], method: str, wanted: int
) -> None:
    assert response_framing(answer(*lines, first=f"HTTP/1.1 {status} x"), method) == wanted


@pytest.mark.parametrize(
    "lines", [["Transfer-Encoding: gzip"], ["Transfer-Encoding: chunked", "Content-Length: 3"]]
)
def test_an_answer_framed_in_two_ways_is_garbled(lines: list[str]) -> None:
    with pytest.raises(UpstreamGarbled, match="framed its answer"):
        response_framing(answer(*lines))


def test_a_head_that_is_rendered_can_be_read_back() -> None:
    raw = render_head("POST /v1/x HTTP/1.1", {"host": "a", "x-text": "caf\xe9", "x-odd": "\u2028"})
    found = {"host": "a", "x-text": "caf\xe9", "x-odd": "?"}
    assert parse_request_head(raw) == RequestHead("POST", "/v1/x", found, True, 1)


# --- bodies

NEXT = b"GET / HTTP/1.1\r\n"
BODIES = {
    # framing, bytes on the wire, what they say, what is left for the next message
    "no body": (0, NEXT, b"", NEXT),
    "sized": (5, b"hello" + NEXT, b"hello", NEXT),
    "sized, with line ends": (6, b"\r\n\r\n\r\n", b"\r\n\r\n\r\n", b""),
    "one chunk": (CHUNKED, b"5\r\nhello\r\n0\r\n\r\n" + NEXT, b"hello", NEXT),
    "chunks": (CHUNKED, b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello", b""),
    "no chunk": (CHUNKED, b"0\r\n\r\n" + NEXT, b"", NEXT),
    "leading zeros": (CHUNKED, b"0005\r\nhello\r\n000\r\n\r\n", b"hello", b""),
    "hex in both cases": (CHUNKED, b"a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n",
                          b"01234567890123456789a", b""),
    "line ends inside": (CHUNKED, b"6\r\n\r\n0\r\n\r\r\n0\r\n\r\n", b"\r\n0\r\n\r", b""),
    "extensions": (CHUNKED, b'5;a=b;c="d e"\r\nhello\r\n0;last\r\n\r\n', b"hello", b""),
    "spaces before an extension": (CHUNKED, b"5 \t;a\r\nhello\r\n0 \r\n\r\n", b"hello", b""),
    "trailers": (CHUNKED, b"5\r\nhello\r\n0\r\nx: y\r\nz: w\r\n\r\n" + NEXT, b"hello", NEXT),
}  # fmt: skip


@pytest.mark.parametrize(("framing", "wire", "said", "left"), BODIES.values(), ids=BODIES)
def test_a_body_survives_every_cut(framing: int, wire: bytes, said: bytes, left: bytes) -> None:
    for pieces in cuts(wire):
        assert read_body(pieces, framing) == (said, True, left)


UNFINISHED = {
    "sized": (5, b"hell"),
    "no last chunk": (CHUNKED, b"5\r\nhello\r\n"),
    "half a chunk": (CHUNKED, b"5\r\nhel"),
    "half a size": (CHUNKED, b"5\r\nhello\r\n0\r"),
    "no blank line": (CHUNKED, b"5\r\nhello\r\n0\r\n"),
    "an open trailer": (CHUNKED, b"5\r\nhello\r\n0\r\nx: y\r\n"),
    "until the end": (UNTIL_CLOSE, b"hello"),
}


@pytest.mark.parametrize(("framing", "wire"), UNFINISHED.values(), ids=UNFINISHED)
def test_a_body_that_is_not_all_there_is_not_done(framing: int, wire: bytes) -> None:
    for pieces in cuts(wire):
        said, done, _ = read_body(pieces, framing)
        assert b"hello".startswith(said) and said and not done


BAD_CHUNKS = {
    "no size": b"\r\nhello\r\n",
    "not hex": b"g\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "a negative size": b"-5\r\nhello\r\n0\r\n\r\n",
    "an underscore": b"1_0\r\nhello\r\n0\r\n\r\n",
    "a space first": b" 5\r\nhello\r\n0\r\n\r\n",
    "too many digits": b"0000000000005\r\nhello\r\n0\r\n\r\n",
    "bare LF after the size": b"5\nhello\r\n0\r\n\r\n",
    "bare CR after the size": b"5\rhello\r\n0\r\n\r\n",
    "bare LF in an extension": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "bare LF after the data": b"5\r\nhello\n0\r\n\r\n",
    "longer than it says": b"5\r\nhello!\r\n0\r\n\r\n",
    "shorter than it says": b"5\r\nhell\r\n0\r\n\r\n",
    "an endless extension": b"5;" + b"a" * 5000,
    "an endless trailer line": b"0\r\nx: " + b"a" * 5000,
    "an endless trailer": b"0\r\n" + b"x: 0123456789\r\n" * 1500,
    "bare LF in a trailer": b"0\r\nx: a\nb: c\r\n\r\n",
}


@pytest.mark.parametrize("wire", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_broken_chunks_are_refused_at_every_cut(wire: bytes) -> None:
    pieces = cuts(wire) if len(wire) < 100 else [[wire], slices(wire, 1), slices(wire, 777)]
    for cut in pieces:
        with pytest.raises(BadRequest):
            read_body(cut, CHUNKED)


@pytest.mark.parametrize("seed", range(20))
def test_a_body_survives_random_chunks_and_reads(seed: int) -> None:
    rng = random.Random(seed)
    chunks = [rng.randbytes(rng.choice([1, 2, 17, 300])) for _ in range(rng.randint(1, 30))]
    wire = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n" + NEXT
    reads, at = [], 0
    while at < len(wire):
        size = rng.choice([1, 2, 3, 50, 1000])
        reads.append(wire[at : at + size])
        at += size
    assert read_body(reads, CHUNKED) == (b"".join(chunks), True, NEXT)


# --- content codings

TEXT = b'{"model":"m","text":"' + b"hello " * 20 + b'"}'


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": ("gzip", gzip.compress(TEXT, mtime=0)),
    "x-gzip": ("X-GZip", gzip.compress(TEXT, mtime=0)),
    "deflate": ("deflate", zlib.compress(TEXT)),
    "raw deflate": (" Deflate ", raw_deflate(TEXT)),
}


def inflate(coding: str, pieces: Iterable[bytes], limit: int = 10_000) -> bytes:
    inflater = Inflater(coding, limit, BadRequest)
    out = b"".join([inflater.feed(piece) for piece in pieces])
    inflater.finish()
    return out


@pytest.mark.parametrize(("coding", "packed"), PACKED.values(), ids=PACKED)
def test_a_packed_body_survives_every_cut(coding: str, packed: bytes) -> None:
    for pieces in cuts(packed):
        assert inflate(coding, pieces) == TEXT


@pytest.mark.parametrize(("coding", "packed"), PACKED.values(), ids=PACKED)
def test_a_packed_body_that_ends_too_early_is_refused(coding: str, packed: bytes) -> None:
    for end in range(len(packed)):
        with pytest.raises(BadRequest, match="ends too early"):
            inflate(coding, [packed[:end]])


@pytest.mark.parametrize(("coding", "packed"), PACKED.values(), ids=PACKED)
def test_a_body_may_be_as_large_as_the_limit_and_no_larger(coding: str, packed: bytes) -> None:
    assert inflate(coding, [packed], limit=len(TEXT)) == TEXT
    with pytest.raises(BadRequest, match="larger than allowed"):
        inflate(coding, [packed], limit=len(TEXT) - 1)


@pytest.mark.parametrize("size", [1, 1000, 10**6])
def test_a_bomb_is_refused_before_it_fills_the_memory(size: int) -> None:
    bomb = gzip.compress(bytes(20 * 10**6), 9)
    tracemalloc.start()
    with pytest.raises(BadRequest, match="larger than allowed"):
        inflate("gzip", slices(bomb, size), limit=10**6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 10**6


BROKEN = {
    "not gzip": ("gzip", b"plain text"),
    "not deflate": ("deflate", b"plain text, not packed"),
    "a wrong checksum": ("gzip", gzip.compress(TEXT)[:-8] + bytes(8)),
}


@pytest.mark.parametrize(("coding", "packed"), BROKEN.values(), ids=BROKEN)
def test_a_broken_packed_body_is_refused(coding: str, packed: bytes) -> None:
    for pieces in cuts(packed):
        with pytest.raises(BadRequest, match="is broken"):
            inflate(coding, pieces)


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "", "compress"])
def test_an_unknown_coding_is_refused_in_our_own_words(coding: str) -> None:
    with pytest.raises(UpstreamGarbled, match="is not known: use gzip"):
        Inflater(coding, 1000, UpstreamGarbled)


def test_a_gzip_file_of_several_members_is_read_whole() -> None:
    packed = gzip.compress(TEXT) + gzip.compress(b"") + gzip.compress(b"more")
    for pieces in cuts(packed):
        assert inflate("gzip", pieces) == TEXT + b"more"


AFTER_THE_END = {
    "garbage": ("gzip", gzip.compress(TEXT) + b"garbage"),
    "half a member": ("gzip", gzip.compress(TEXT) + gzip.compress(TEXT)[:12]),
    "deflate": ("deflate", zlib.compress(TEXT) + b"x"),
    "raw deflate": ("deflate", raw_deflate(TEXT) + b"x"),
}


@pytest.mark.parametrize(("coding", "packed"), AFTER_THE_END.values(), ids=AFTER_THE_END)
def test_what_comes_after_the_end_of_a_packed_body_is_refused(coding: str, packed: bytes) -> None:
    for pieces in cuts(packed):
        with pytest.raises(BadRequest):
            inflate(coding, pieces)


@pytest.mark.parametrize("size", [1000, 10**6])
def test_a_gzip_file_of_nothing_but_empty_members_is_refused(size: int) -> None:
    with pytest.raises(BadRequest):
        inflate("gzip", slices(gzip.compress(b"") * 2000, size))
