"""A provider's stream on its way to the caller: what passes, what waits, what is put right."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from support import (
    CHAT_STREAM,
    DONE,
    MESSAGES_STREAM,
    chat_chunk,
    named_event,
    read_wire,
    slices,
    telling_cuts,
    wire_names,
)

from bitrouter import (
    CHAT,
    GEMINI,
    MESSAGES,
    RESPONSES,
    StreamRelay,
    UpstreamError,
    Usage,
    split_events,
)

CODECS = {"chat": CHAT, "responses": RESPONSES, "messages": MESSAGES, "gemini": GEMINI}
WIRES = [name for name in wire_names() if "stream" in read_wire(name)]
BROKEN = UpstreamError("the line went dead", code="upstream_disconnected")


def relay_of(wire: str, **more: Any) -> StreamRelay:
    return StreamRelay(CODECS[wire.partition("/")[0]], **more)


def stream_of(wire: str) -> bytes:
    raw = read_wire(wire)["stream"]
    return raw.replace(b"\n", b"\r\n") if wire.startswith("gemini/") else raw


def passed(relay: StreamRelay, pieces: Iterable[bytes]) -> bytes:
    """All that a caller gets."""
    return b"".join([*(relay.feed(piece) for piece in pieces), relay.finish()])


def cuts(data: bytes) -> list[Iterable[bytes]]:
    return [*telling_cuts(data), list(slices(data, 1)), list(slices(data, 100))]


def data_of(raw: bytes) -> list[Any]:
    lines = raw.replace(b"\r\n", b"\n").split(b"\n")
    data = [line[6:] for line in lines if line.startswith(b"data: ")]
    return [json.loads(text) for text in data if text != b"[DONE]"]


def google(text: str = "a", **more: Any) -> bytes:
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, **more}
    return b"data: %b\r\n\r\n" % json.dumps({"candidates": [candidate]}).encode()


ROLE, HEL, LO, STOP, USAGE, _ = CHAT_STREAM
CHAT_RAW = b"".join(CHAT_STREAM)
MESSAGES_RAW = b"".join(MESSAGES_STREAM)
GOOGLE_RAW = google("Ha") + google("lló 🧊") + google("", finishReason="STOP")

# --- streams from the wire


@pytest.mark.parametrize("name", WIRES)
def test_wherever_a_stream_is_cut_it_passes_whole_and_is_understood(name: str) -> None:
    raw, seen = stream_of(name), json.loads(read_wire(name)["seen"])
    usage = Usage(*seen["usage"]) if seen["usage"] else None
    for pieces in cuts(raw):
        relay = relay_of(name)
        assert passed(relay, pieces) == raw
        state = relay.state
        assert (state.finished, state.ended) == (seen["finished"], seen["ended"])
        assert (state.usage, state.error and state.error.message) == (usage, seen.get("error"))


@pytest.mark.parametrize("name", WIRES)
def test_nothing_goes_out_before_there_is_substance(name: str) -> None:
    relay, opens_at = relay_of(name), json.loads(read_wire(name)["seen"])["opens_at"]
    opened = []
    for raw in split_events(stream_of(name)):
        out = relay.feed(raw)
        opened.append(relay.open)
        assert bool(out) is relay.open
    assert opened.index(True) + 1 == opens_at


@pytest.mark.parametrize("name", [n for n in WIRES if n.startswith("gemini/")])
def test_an_array_holds_the_events_of_the_stream_at_every_cut(name: str) -> None:
    raw = stream_of(name)
    for pieces in cuts(raw):
        out = passed(relay_of(name, as_array=True), pieces)
        assert json.loads(out) == data_of(raw)


# --- what is put right

EVENT, OTHER = '{"choices":[{"delta":{"content":"a"}}]}', '{"choices":[{"delta":{"content":"b"}}]}'
UNTIDY = {
    "CRLF": f"data: {EVENT}\r\n\r\ndata: {OTHER}\r\n\r\n",
    "CR": f"data: {EVENT}\r\rdata: {OTHER}\r\r",
    "no space": f"data:{EVENT}\n\ndata:{OTHER}\n\n",
    "id lines": f"id: 1\ndata: {EVENT}\n\ndata: {OTHER}\nid: 2\n\nid: 3\n\n",
    "retry lines": f"retry: 3000\n\nretry: 3000\ndata: {EVENT}\n\ndata: {OTHER}\n\n",
    "event lines": f"event: message\ndata: {EVENT}\n\nevent: x\ndata: {OTHER}\n\nevent: lonely\n\n",
    "events without data": f"data: {EVENT}\n\nevent: ping\ndata:\n\ndata: {OTHER}\n\n",
    "a byte order mark": f"\ufeffdata: {EVENT}\n\ndata: {OTHER}\n\n",
    "blank lines": f"\n\ndata: {EVENT}\n\n\n\n\ndata: {OTHER}\n\n\n",
    "no last blank line": f"data: {EVENT}\n\ndata: {OTHER}",
    "a comment within": f": c\ndata: {EVENT}\n: c\n\ndata: {OTHER}\n\n",
}


@pytest.mark.parametrize("text", UNTIDY.values(), ids=UNTIDY)
def test_framing_that_sdks_do_not_survive_is_put_right(text: str) -> None:
    wanted = f"data: {EVENT}\n\ndata: {OTHER}\n\n".encode()
    for pieces in cuts(text.encode()):
        assert passed(StreamRelay(CHAT), pieces) == wanted


LINES = 'data: {"candidates":\ndata:  [{"content":\ndata:  {"parts":[{"text":"a b"}]}}]}\n\n'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_several_data_lines_become_one(end: str) -> None:
    for pieces in cuts(LINES.replace("\n", end).encode()):
        out = passed(StreamRelay(GEMINI), pieces)
        assert out.count(b"data: ") == 1 and out.count(b"\n") == 2
        assert data_of(out)[0]["candidates"][0]["content"]["parts"] == [{"text": "a b"}]


@pytest.mark.parametrize(("codec", "kept"), [(CHAT, True), (GEMINI, False)])
def test_comments_travel_only_where_they_are_survived(codec: Any, kept: bool) -> None:
    event = google("a") if codec is GEMINI else HEL
    for pieces in cuts(event + b": PROCESSING\n\n" + event):
        out = passed(StreamRelay(codec), pieces)
        assert out == event + b": PROCESSING\n\n" * kept + event


def test_google_s_callers_get_no_event_lines_and_no_end_mark() -> None:
    untidy = b"event: message\n" + google("a") + b"id: 1\n\n" + google("b") + DONE
    for pieces in cuts(untidy):
        assert passed(StreamRelay(GEMINI), pieces) == google("a") + google("b")


@pytest.mark.parametrize(("codec", "wire"), [(MESSAGES, "messages"), (RESPONSES, "responses")])
def test_events_without_a_name_are_named(codec: Any, wire: str) -> None:
    raw = stream_of(f"{wire}/text")
    nameless = b"".join(line + b"\n" for line in raw.split(b"\n")[:-1] if line[:6] != b"event:")
    for pieces in cuts(nameless):
        assert passed(StreamRelay(codec), pieces) == raw


def test_a_name_that_the_provider_gave_is_kept() -> None:
    event = named_event({"type": "content_block_delta"}).replace(
        b"event: content_block_", b"event:"
    )
    out = passed(StreamRelay(MESSAGES), [event])
    assert out == b'event: delta\ndata: {"type":"content_block_delta"}\n\n'


# --- the usage that we asked for and the caller did not

NULLS = [chunk.replace(b"]}\n", b'],"usage":null}\n') for chunk in (ROLE, HEL, LO, STOP)]
LOOSE = [
    b"data: " + json.dumps({**json.loads(chunk[6:]), "usage": None}).encode() + b"\n\n"
    for chunk in (ROLE, HEL, LO, STOP)
]


@pytest.mark.parametrize(
    "chunks", [[ROLE, HEL, LO, STOP], NULLS, LOOSE], ids=["no", "tight", "loose"]
)
def test_usage_not_asked_for_is_noted_and_withheld(chunks: list[bytes]) -> None:
    raw = b"".join([*chunks, USAGE, DONE])
    for pieces in cuts(raw):
        relay = StreamRelay(CHAT, hide_usage=True)
        out = passed(relay, pieces)
        assert b'"usage"' not in out and out.count(b"data: ") == 5 and out.endswith(DONE)
        assert relay.state.usage == Usage(11, 7)


def test_hiding_usage_leaves_everything_else_alone() -> None:
    out = passed(StreamRelay(CHAT, hide_usage=True), [b"".join([*NULLS, USAGE, DONE])])
    assert out == b"".join([ROLE, HEL, LO, STOP, DONE])


def test_a_chunk_without_choices_that_is_no_usage_passes() -> None:
    filtered = b'data: {"choices":[],"prompt_filter_results":[{"prompt_index":0}]}\n\n'
    out = passed(StreamRelay(CHAT, hide_usage=True), [filtered + HEL + STOP + USAGE + DONE])
    assert out == filtered + HEL + STOP + DONE


def test_usage_that_the_model_talks_about_is_text() -> None:
    said = chat_chunk({"content": ',"usage":null, "usage": null'})
    for pieces in cuts(HEL + said):
        assert passed(StreamRelay(CHAT, hide_usage=True), pieces) == HEL + said


def test_usage_asked_for_passes_as_it_came() -> None:
    raw = b"".join([*NULLS, USAGE, DONE])
    assert passed(StreamRelay(CHAT), [raw]) == raw


def test_of_running_totals_the_last_one_counts_wherever_the_stream_is_cut() -> None:
    def event(n: int, **more: Any) -> bytes:
        told: dict[str, Any] = {"candidates": [{"content": {"parts": [{"text": "b"}]}, **more}]}
        told["usageMetadata"] = {"promptTokenCount": 9, "candidatesTokenCount": n}
        return b"data: %b\r\n\r\n" % json.dumps(told).encode()

    events = [*(event(n) for n in range(1, 6)), event(6, finishReason="STOP")]
    for cut in range(1, 7):
        relay = StreamRelay(GEMINI)
        for one in events[:cut]:
            relay.feed(one)
        relay.settle()
        assert relay.state.usage == Usage(9, cut)
        assert relay.state.events == cut


def test_a_running_total_is_known_though_the_last_event_does_not_repeat_it() -> None:
    total = (
        b'data: {"candidates":[{"content":{"parts":[{"text":"b"}]}}],"usageMetadata":%b}\r\n\r\n'
    )
    counts = b'{"promptTokenCount":9,"candidatesTokenCount":4,"totalTokenCount":13}'
    relay = StreamRelay(GEMINI)
    passed(relay, [google("a"), total % counts, google("", finishReason="STOP")])
    assert relay.state.usage == Usage(9, 4)


def test_a_running_total_is_known_when_a_stream_breaks() -> None:
    total = (
        b'data: {"candidates":[{"content":{"parts":[{"text":"b"}]}}],"usageMetadata":%b}\r\n\r\n'
    )
    relay = StreamRelay(GEMINI)
    relay.feed(google("a"))
    relay.feed(total % b'{"promptTokenCount":9,"totalTokenCount":9}')
    relay.fail(BROKEN)
    assert relay.state.usage == Usage(9)


# --- ends


def test_a_missing_end_mark_is_added_when_the_model_had_finished() -> None:
    for pieces in cuts(CHAT_RAW.removesuffix(DONE)):
        assert passed(StreamRelay(CHAT), pieces) == CHAT_RAW
    unended = MESSAGES_RAW.removesuffix(MESSAGES_STREAM[-1])
    assert passed(StreamRelay(MESSAGES), [unended]) == MESSAGES_RAW


CUT_OFF = [(CHAT, ROLE + HEL), (MESSAGES, b"".join(MESSAGES_STREAM[:4])), (GEMINI, google("a"))]


@pytest.mark.parametrize(("codec", "raw"), CUT_OFF)
def test_no_end_is_made_up_for_a_stream_that_was_cut_off(codec: Any, raw: bytes) -> None:
    relay = StreamRelay(codec)
    assert passed(relay, [raw]) == raw
    assert not relay.state.finished and not relay.state.ended


def test_nothing_passes_after_the_end() -> None:
    late = chat_chunk({"content": "late"}) + b": late\n\n" + DONE
    for pieces in cuts(CHAT_RAW + late):
        assert passed(StreamRelay(CHAT), pieces) == CHAT_RAW


def test_an_end_mark_alone_is_an_empty_stream() -> None:
    relay = StreamRelay(CHAT)
    assert passed(relay, [ROLE + DONE]) == b"" and not relay.open and relay.state.ended


def test_a_last_event_without_its_blank_line_passes() -> None:
    for pieces in cuts(CHAT_RAW.removesuffix(b"\n\n")):
        assert passed(StreamRelay(CHAT), pieces) == CHAT_RAW


# --- errors and garbage

OOPS = {
    "words": b"data: oops\n\n",
    "half an object": b'data: {"choices":[\n\n',
    "HTML": b"data: <html>\n\n",
    "JSON without end": b"data: " + b"[" * 100_000 + b"\n\n",
}


@pytest.mark.parametrize("oops", OOPS.values(), ids=OOPS)
def test_what_is_not_json_stops_the_stream_and_does_not_travel(oops: bytes) -> None:
    head = ROLE + HEL + LO
    raw = head + oops + STOP + DONE
    for pieces in cuts(raw) if len(oops) < 100 else [[raw], slices(raw, 1000)]:
        relay = StreamRelay(CHAT)
        assert passed(relay, pieces) == head
        assert relay.garbled is not None and relay.garbled.code == "upstream_bad_json"


def test_half_an_event_at_the_end_of_the_stream_does_not_travel() -> None:
    relay = StreamRelay(CHAT)
    assert passed(relay, [ROLE + HEL + LO[:-10]]) == ROLE + HEL
    assert relay.garbled is not None and not relay.state.finished


def test_garbage_before_the_first_token_opens_nothing() -> None:
    relay = StreamRelay(CHAT)
    assert passed(relay, [ROLE + OOPS["words"] + HEL]) == b""
    assert relay.garbled is not None and not relay.open


ERRORS = [
    (CHAT, HEL, b'data: {"error":{"message":"m","code":503}}\n\n'),
    (RESPONSES, named_event({"type": "response.output_text.delta", "delta": "a"}),
     named_event({"type": "error", "message": "m"})),
    (MESSAGES, MESSAGES_STREAM[2],
     named_event({"type": "error", "error": {"type": "api_error", "message": "m"}})),
    (GEMINI, google("a"), b'data: {"error":{"code":503,"message":"m"}}\r\n\r\n'),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "event", "error"), ERRORS)
def test_an_error_in_mid_stream_is_the_last_that_passes(
    codec: Any, event: bytes, error: bytes
) -> None:
    for pieces in cuts(event + event + error + event):
        relay = StreamRelay(codec)
        assert passed(relay, pieces) == event + event + error
        assert relay.state.error is not None and relay.state.error.message == "m"


@pytest.mark.parametrize(("codec", "event", "error"), ERRORS)
def test_an_error_before_the_first_token_opens_nothing(
    codec: Any, event: bytes, error: bytes
) -> None:
    for pieces in cuts(error + event):
        relay = StreamRelay(codec)
        assert passed(relay, pieces) == b"" and not relay.open
        assert relay.state.error is not None


@pytest.mark.parametrize(("codec", "event", "_"), ERRORS)
def test_a_stream_that_we_fail_ends_in_an_error_of_its_protocol(
    codec: Any, event: bytes, _: bytes
) -> None:
    relay, told = StreamRelay(codec), StreamRelay(codec)
    out = relay.feed(event) + relay.fail(BROKEN)
    assert passed(told, [out]) == out
    assert told.state.error is not None and told.state.error.message == "the line went dead"


def test_a_late_error_does_not_swallow_the_events_before_it() -> None:
    relay = StreamRelay(CHAT)
    relay.feed(HEL + LO[:20])
    assert data_of(relay.fail(BROKEN))[0]["error"]["code"] == "upstream_disconnected"


# --- Google's array


def test_an_array_is_json_at_every_cut() -> None:
    for pieces in cuts(GOOGLE_RAW):
        out = passed(StreamRelay(GEMINI, as_array=True), pieces)
        assert json.loads(out) == data_of(GOOGLE_RAW)


def test_an_array_closes_when_the_provider_says_done() -> None:
    for pieces in cuts(GOOGLE_RAW + DONE):
        out = passed(StreamRelay(GEMINI, as_array=True), pieces)
        assert json.loads(out) == data_of(GOOGLE_RAW)


@pytest.mark.parametrize("count", [1, 2])
def test_an_array_that_we_fail_ends_in_an_error_and_is_json(count: int) -> None:
    relay = StreamRelay(GEMINI, as_array=True)
    out = relay.feed(google("a") * count) + relay.fail(BROKEN)
    *items, error = json.loads(out)
    assert len(items) == count and error["error"]["message"] == "the line went dead"


def test_an_array_with_an_error_in_it_is_json_at_every_cut() -> None:
    error = b'data: {"error":{"code":503,"message":"m"}}\r\n\r\n'
    for pieces in cuts(google("a") + error + google("late")):
        out = passed(StreamRelay(GEMINI, as_array=True), pieces)
        assert json.loads(out) == data_of(google("a") + error)


def test_an_array_holds_no_comments_and_no_keepalives() -> None:
    raw = google("a") + b": c\n\n\r\n" + google("b", finishReason="STOP") + b"\r\n"
    for pieces in cuts(raw):
        assert len(json.loads(passed(StreamRelay(GEMINI, as_array=True), pieces))) == 2


# --- many and large


def test_a_large_event_after_a_thousand_small_ones_passes() -> None:
    small = b'data:{"choices":[{"delta":{"content":"a"}}]}\n\n'
    large = chat_chunk({"content": "x" * 100_000})
    relay = StreamRelay(CHAT)
    relay.feed(small)
    out = relay.feed(small * 2000 + large)
    assert relay.garbled is None and out.count(b"\n\n") == 2001


def test_a_response_that_repeats_a_thousand_small_deltas_passes() -> None:
    delta = {"type": "response.output_text.delta", "delta": "a"}
    deltas = [named_event({**delta, "sequence_number": i}) for i in range(1500)]
    response = {"output": [], "text": "a" * 200_000}
    raw = b"".join([*deltas, named_event({"type": "response.completed", "response": response})])
    relay = StreamRelay(RESPONSES)
    assert passed(relay, [raw]) == raw and relay.state.finished


def test_an_event_of_8_mb_passes_in_pieces() -> None:
    raw = chat_chunk({"content": "x" * (8 << 20)})
    assert passed(StreamRelay(CHAT), slices(HEL + raw, 64 << 10)) == HEL + raw


def test_an_event_too_large_stops_the_stream() -> None:
    relay, piece = StreamRelay(CHAT), b"x" * (1 << 16)
    out = passed(relay, [HEL, b"data: ", *(piece for _ in range(1030)), b"\n\n", LO])
    assert out == HEL
    assert relay.garbled is not None and relay.garbled.code == "upstream_event_too_large"


def test_what_is_held_back_is_bounded() -> None:
    empty = chat_chunk({"content": ""}, padding="x" * 10_000)
    relay = StreamRelay(CHAT)
    out = b"".join([relay.feed(empty) for _ in range(500)])
    assert relay.open and out == empty * 500
