"""Whole events out of any bytes."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from support import every_cut, slices

from bitrouter import (
    MAX_EVENT_BYTES,
    EventCutter,
    SseEvent,
    UpstreamGarbled,
    parse_event,
    split_events,
    sse_encode,
)

BOM = b"\xef\xbb\xbf"


def events_of(pieces: Iterable[bytes]) -> list[SseEvent]:
    """What a stream says, however it is cut."""
    cutter = EventCutter()
    blocks = [*(cutter.feed(piece) for piece in pieces), cutter.finish()]
    found = [parse_event(raw) for block in blocks for raw in split_events(block)]
    return [event for event in found if event]


def lines(*text: str, end: str = "\n") -> bytes:
    return "".join(line + end for line in text).encode()


TWO = [SseEvent(b'{"a":1}', "x"), SseEvent(b'{"b":2}')]
STREAMS = {
    "LF": (lines("event: x", 'data: {"a":1}', "", 'data: {"b":2}', ""), TWO),
    "CRLF": (lines("event: x", 'data: {"a":1}', "", 'data: {"b":2}', "", end="\r\n"), TWO),
    "CR": (lines("event: x", 'data: {"a":1}', "", 'data: {"b":2}', "", end="\r"), TWO),
    "LF, then CRLF": (b'event: x\ndata: {"a":1}\n\r\ndata: {"b":2}\n\r\n', TWO),
    "CRLF, then LF": (b'event: x\r\ndata: {"a":1}\r\n\ndata: {"b":2}\r\n\n', TWO),
    "CRLF, then CR": (b'event: x\r\ndata: {"a":1}\r\n\rdata: {"b":2}\r\n\r', TWO),
    "CR, then CRLF": (b'event: x\rdata: {"a":1}\r\r\ndata: {"b":2}\r\r\n', TWO),
    "CR, then LF": (b'event: x\rdata: {"a":1}\r\r\rdata: {"b":2}\r\r', TWO),
    "each its own": (b'event: x\rdata: {"a":1}\n\ndata: {"b":2}\r\n\r\n', TWO),
    "many blank lines": (b'\n\nevent: x\ndata: {"a":1}\n\n\n\n\ndata: {"b":2}\n\n\n', TWO),
    "a byte order mark": (BOM + lines("event: x", 'data: {"a":1}', "", 'data: {"b":2}', ""), TWO),
    "no last blank line": (lines("event: x", 'data: {"a":1}', "", 'data: {"b":2}'), TWO),
    "no last line end": (b'event: x\ndata: {"a":1}\n\ndata: {"b":2}', TWO),
    "no last blank line, CRLF": (b'event: x\r\ndata: {"a":1}\r\n\r\ndata: {"b":2}\r\n', TWO),
    "comments": (b': hi\n\n:\nevent: x\n: hi\ndata: {"a":1}\n\ndata: {"b":2}\n:\n\n: bye\n\n', TWO),
    "ids and retries": (
        b'id: 1\nevent: x\nretry: 5\ndata: {"a":1}\n\nid\n\ndata: {"b":2}\n\n',
        TWO,
    ),
    "no space": (b'event:x\ndata:{"a":1}\n\ndata:{"b":2}\n\n', TWO),
    "data in several lines": (
        b'data: {"a":\ndata:  "b",\ndata: "c":1}\n\n',
        [SseEvent(b'{"a":  "b", "c":1}')],
    ),
    "an event without data": (b"event: ping\n\nevent: ping\ndata\n\nevent: ping\ndata: \n\n", []),
    "separators that end no line": (
        'data: {"t":"a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"}\n\n'.encode(),
        [SseEvent('{"t":"a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"}'.encode())],
    ),
    "characters of four bytes": (
        "event: é\ndata: 🦆🦆\n\n".encode(),
        [SseEvent("🦆🦆".encode(), "é")],
    ),
    "a second byte order mark": (b"data: 1\n\n" + BOM + b"data: 2\n\n", [SseEvent(b"1")]),
    "one space more": (b"data:  x \n\n", [SseEvent(b" x ")]),
    "a colon in the data": (b"data: a: b\n\n", [SseEvent(b"a: b")]),
    "names that only begin alike": (b"database: x\nDATA: y\n data: z\n\n", []),
    "nothing": (b"", []),
}


@pytest.mark.parametrize(("wire", "wanted"), STREAMS.values(), ids=STREAMS)
def test_events_survive_every_cut(wire: bytes, wanted: list[SseEvent]) -> None:
    for cut in [*every_cut(wire), slices(wire, 1), slices(wire, 2), slices(wire, 3)]:
        assert events_of(cut) == wanted


CANONICAL = ["LF", "CRLF", "CR", "comments", "characters of four bytes"]


@pytest.mark.parametrize("name", CANONICAL)
def test_a_cutter_adds_no_byte_and_loses_none(name: str) -> None:
    wire = STREAMS[name][0]
    for cut in [*every_cut(wire), slices(wire, 1)]:
        cutter = EventCutter()
        assert b"".join([*map(cutter.feed, cut), cutter.finish()]) == wire


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_a_cutter_gives_back_whole_events_only(end: bytes) -> None:
    wire = b"".join(b"data: %d%b%b" % (i, end, end) for i in range(3))
    for left, _ in every_cut(wire):
        given = EventCutter().feed(left)
        assert wire.startswith(given) and (not given or given.endswith(end + end))


def test_an_event_goes_on_as_soon_as_it_is_whole() -> None:
    cutter = EventCutter()
    assert cutter.feed(b"data: 1\n\ndata: 2\r\n\r\ndata: 3") == b"data: 1\n\ndata: 2\r\n\r\n"
    assert cutter.feed(b"\r\rdata") == b"data: 3\r\r"


def test_a_last_event_is_ended_properly_and_once() -> None:
    cutter = EventCutter()
    cutter.feed(b"data: 1\r\n")
    assert (cutter.finish(), cutter.finish()) == (b"data: 1\n\n", b"")


@pytest.mark.parametrize("seed", range(30))
def test_events_survive_random_line_ends_and_reads(seed: int) -> None:
    rng = random.Random(seed)
    wanted = [SseEvent(b"%d" % rng.randrange(10**9), rng.choice(["", "e"])) for _ in range(40)]
    wire = b""
    for data, event in wanted:
        end = rng.choice([b"\n", b"\r\n", b"\r"])
        named = b"event: %b%b" % (event.encode(), end) if event else b""
        wire += rng.choice([b"", b": c" + end + end]) + named + b"data: %b%b%b" % (data, end, end)
    assert events_of(slices(wire, rng.choice([1, 2, 5, 11, 64]))) == wanted


def test_an_event_of_8_mb_passes_in_pieces() -> None:
    wire = b"data: " + b"x" * (8 << 20) + b"\n\n"
    cutter = EventCutter()
    given = [cutter.feed(piece) for piece in slices(wire, 64 << 10)]
    assert given[-1] == wire and not any(given[:-1])


def test_an_event_of_1_mb_passes_in_tiny_pieces() -> None:
    wire = b"data: " + b"x" * (1 << 20) + b"\n\n"
    cutter = EventCutter()
    assert b"".join([cutter.feed(piece) for piece in slices(wire, 7)]) == wire


@pytest.mark.parametrize("size", [64 << 10, 256 << 10, MAX_EVENT_BYTES + 1])
def test_an_event_beyond_all_bounds_is_garbled(size: int) -> None:
    piece = b"x" * size
    with pytest.raises(UpstreamGarbled, match="more than 64 MB") as caught:
        events_of(piece for _ in range(MAX_EVENT_BYTES // size + 2))
    assert caught.value.code == "upstream_event_too_large"


def test_many_events_may_be_more_than_one_may_be() -> None:
    cutter, piece = EventCutter(), b"data: " + b"x" * (4 << 20) + b"\n\n"
    given = sum(len(cutter.feed(piece)) for _ in range(MAX_EVENT_BYTES // len(piece) + 2))
    assert given > MAX_EVENT_BYTES


def test_a_block_is_split_without_losing_a_byte() -> None:
    for wire, _ in STREAMS.values():
        assert b"".join(split_events(wire)) == wire


def test_an_encoded_event_reads_back() -> None:
    assert parse_event(sse_encode(b'{"a":1}', "x")) == (b'{"a":1}', "x")
    assert sse_encode(b'{"a":1}') == b'data: {"a":1}\n\n'
