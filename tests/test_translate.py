"""Answers on their way from one protocol to another, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from support import read_wire, slices, telling_cuts, wire_names

from bitrouter import (
    CODECS,
    AnswerLabel,
    ApiProtocol,
    ArrayFramer,
    Finish,
    Loss,
    Prompt,
    Text,
    ToolCall,
    Translation,
    Undo,
    UpstreamBroken,
    UpstreamGarbled,
    Usage,
    parse_event,
    split_events,
)

CC, RE, ME, GC = ApiProtocol
FOLDERS = {"chat": CC, "responses": RE, "messages": ME, "gemini": GC}
SHORT = {protocol: folder for folder, protocol in FOLDERS.items()}
PAIRS = [
    (caller, upstream)
    for caller in ApiProtocol
    for upstream in ApiProtocol
    if caller is not upstream
]
WIRES = [(name, FOLDERS[name.partition("/")[0]]) for name in wire_names()]
CROSSED = [
    (name, caller) for name, upstream in WIRES for caller in ApiProtocol if caller is not upstream
]
VENDORS = {CC: "chat:v", RE: "openai", ME: "anthropic", GC: "google"}


def ident(value: Any) -> str:
    return SHORT[value] if isinstance(value, ApiProtocol) else str(value)


def between(
    caller: ApiProtocol, upstream: ApiProtocol, undo: Undo | None = None, **more: Any
) -> Translation:
    """A translation for a caller who wants to know what was used."""
    label = AnswerLabel("abc", 1_790_000_000, "asked-for", 20)
    prompt = Prompt("m", (), caller, stream=True)
    return Translation(
        CODECS[upstream], CODECS[caller], prompt, undo or Undo(), label, VENDORS[upstream],
        lambda facts: UpstreamBroken(facts.message), **more,
    )  # fmt: skip


def upstream_of(name: str) -> ApiProtocol:
    return FOLDERS[name.partition("/")[0]]


def json_of(out: bytes) -> list[Any]:
    """The JSON of each event."""
    found = [event.data for raw in split_events(out) if (event := parse_event(raw))]
    return [json.loads(data) for data in found if data != b"[DONE]"]


def chat(*deltas: Any, finish: str = "stop", end: bytes = b"data: [DONE]\n\n") -> bytes:
    """A stream of Chat Completions."""
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    if finish:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return b"".join(event(chunk) for chunk in chunks) + end


def run(translation: Translation, pieces: Iterable[bytes]) -> bytes:
    """What a caller gets of a stream that comes in pieces, and then is closed."""
    out = b"".join([translation.feed(piece) for piece in pieces])
    return out if translation.over else out + translation.finish()


def event(value: Any) -> bytes:
    name = f"event: {value['type']}\n" if "type" in value else ""
    return f"{name}data: {json.dumps(value)}\n\n".encode()


# In pieces.


@pytest.mark.parametrize(("name", "caller"), CROSSED, ids=ident)
def test_a_stream_may_come_a_byte_at_a_time(name: str, caller: ApiProtocol) -> None:
    stream, whole = read_wire(name)["stream"], between(caller, upstream_of(name))
    out = run(whole, split_events(stream))
    pieces = between(caller, upstream_of(name))
    assert run(pieces, slices(stream, 1)) == out
    assert (pieces.state.usage, pieces.choices()) == (whole.state.usage, whole.choices())


CUT = [
    ("messages/tool_call", CC),
    ("chat/tool_call", ME),
    ("gemini/call", RE),
    ("chat/refusal", GC),
]


@pytest.mark.parametrize(("name", "caller"), CUT, ids=ident)
def test_a_stream_may_be_cut_anywhere(name: str, caller: ApiProtocol) -> None:
    stream = read_wire(name)["stream"].replace(b"\n", b"\r\n")
    out = run(between(caller, upstream_of(name)), [stream])
    for cut in telling_cuts(stream):
        assert run(between(caller, upstream_of(name)), cut) == out


ANSWERED = [(name, caller) for name, caller in CROSSED if "answer" in read_wire(name)]


@pytest.mark.parametrize(("name", "caller"), ANSWERED, ids=ident)
def test_an_answer_is_the_same_whole_and_streamed(name: str, caller: ApiProtocol) -> None:
    wire, upstream = read_wire(name), upstream_of(name)
    whole, streamed = between(caller, upstream), between(caller, upstream)
    whole.take_whole(json.loads(wire["answer"]))
    run(streamed, [wire["stream"]])
    assert whole.choices() == streamed.choices()
    assert whole.paused == streamed.paused


@pytest.mark.parametrize(("name", "caller"), ANSWERED, ids=ident)
def test_a_whole_answer_is_streamed_to_who_asked_for_a_stream(
    name: str, caller: ApiProtocol
) -> None:
    wire, upstream = read_wire(name), upstream_of(name)
    whole, streamed = between(caller, upstream), between(caller, upstream)
    out = whole.whole_as_stream(json.loads(wire["answer"]))
    streamed.feed(wire["stream"])
    assert whole.choices() == streamed.choices() and whole.open and out
    mark = CODECS[CC].end_mark  # which is no event
    assert whole.paused or CODECS[caller].strict(out.removesuffix(mark))


# Refusals are texts elsewhere, and the input of a custom tool is no JSON.
PLAIN = [
    (name, caller) for name, caller in ANSWERED if not name.endswith(("refusal", "custom_call"))
]


@pytest.mark.parametrize(("name", "caller"), PLAIN, ids=ident)
def test_what_a_whole_answer_says_a_reader_of_its_protocol_reads(
    name: str, caller: ApiProtocol
) -> None:
    """As far as the protocol can say it: texts, calls and the tokens used."""
    whole = between(caller, upstream_of(name))
    whole.take_whole(json.loads(read_wire(name)["answer"]))
    answer = whole.whole()
    back = between(upstream_of(name), caller)
    back.take_whole(json.loads(json.dumps(answer)))
    assert spoken(back) == spoken(whole)
    written = CODECS[caller].usage(answer)
    assert written is not None and whole.state.usage is not None
    assert written[:3] == whole.state.usage[:3]


def spoken(translation: Translation) -> list[Any]:
    blocks = translation.choices()[0].content
    calls = [
        (b.id, b.name, json.loads(b.arguments or "{}")) for b in blocks if isinstance(b, ToolCall)
    ]
    return ["".join(b.text for b in blocks if isinstance(b, Text)), *calls]


# The beginning.


@pytest.mark.parametrize(("caller", "upstream"), PAIRS, ids=ident)
def test_nothing_is_let_out_before_something_of_substance(
    caller: ApiProtocol, upstream: ApiProtocol
) -> None:
    """An attempt that fails until then can be forgotten."""
    translation, out = between(caller, upstream), b""
    for raw in split_events(read_wire(f"{SHORT[upstream]}/text")["stream"]):
        out += translation.feed(raw)
        assert translation.open == translation.state.started == bool(out)
    assert translation.over or upstream is GC  # whose stream ends with the connection


def test_what_was_held_back_comes_first() -> None:
    translation = between(ME, CC)
    assert translation.feed(chat({"role": "assistant", "content": ""}, finish="", end=b"")) == b""
    kinds = [
        one["type"]
        for one in json_of(translation.feed(chat({"content": "Hi"}, finish="", end=b"")))
    ]
    assert kinds == ["message_start", "content_block_start", "content_block_delta"]


def test_an_answer_is_by_the_model_that_gave_it() -> None:
    for said, wanted in (("a-model-2026", "a-model-2026"), (None, "asked-for")):
        translation = between(ME, CC)
        translation.take_whole({"model": said, "choices": [{"message": {"content": "Hi"}}]})
        assert translation.whole()["model"] == wanted


def test_a_response_is_known_by_the_id_that_its_caller_sees() -> None:
    translation = between(RE, CC)
    translation.take_whole({"choices": [{"message": {"content": "Hi"}}]})
    assert translation.whole()["id"] == translation.answer_id


# The end.


@pytest.mark.parametrize("caller", [RE, ME, GC], ids=ident)
@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"], ids=["closed", "marked"])
def test_a_stream_that_finished_has_ended_with_or_without_its_mark(
    caller: ApiProtocol, end: bytes
) -> None:
    marked = between(caller, CC)
    out = marked.feed(chat({"content": "Hi"}))
    translation = between(caller, CC)
    assert run(translation, [chat({"content": "Hi"}, end=end)]) == out
    assert translation.over and translation.state.ended


@pytest.mark.parametrize("caller", [RE, ME, GC], ids=ident)
def test_a_stream_that_did_not_finish_is_not_made_to_look_as_if(caller: ApiProtocol) -> None:
    closed, marked = between(caller, CC), between(caller, CC)
    closed.feed(chat({"content": "Hi"}, finish="", end=b""))
    assert closed.finish() == b"" and not closed.state.finished
    marked.feed(chat({"content": "Hi"}, finish=""))
    assert marked.garbled is not None and marked.garbled.code == "upstream_disconnected"


def test_a_last_event_without_its_blank_line_is_read() -> None:
    translation = between(ME, CC)
    stream = chat({"content": "Hi"}, end=b"")
    assert json_of(run(translation, [stream[:-1]]))[-1]["type"] == "message_stop"


@pytest.mark.parametrize(("caller", "upstream"), PAIRS, ids=ident)
def test_nothing_comes_after_the_end(caller: ApiProtocol, upstream: ApiProtocol) -> None:
    stream = read_wire(f"{SHORT[upstream]}/text")["stream"]
    translation = between(caller, upstream)
    assert run(translation, [stream]) and translation.over
    assert translation.feed(stream) == b""


@pytest.mark.parametrize("caller", [RE, ME, GC], ids=ident)
def test_an_answer_of_nothing_has_an_end_too(caller: ApiProtocol) -> None:
    told = json_of(between(caller, CC).whole_as_stream({"model": "m", "choices": []}))
    ended = {
        RE: lambda: told[-1]["response"]["status"],
        ME: lambda: told[-2]["delta"]["stop_reason"],
        GC: lambda: told[-1]["candidates"][0]["finishReason"],
    }
    assert ended[caller]() in ("completed", "end_turn", "STOP")


# Errors.


@pytest.mark.parametrize(("caller", "upstream"), PAIRS, ids=ident)
def test_an_error_in_mid_stream_is_told_in_the_caller_s_words(
    caller: ApiProtocol, upstream: ApiProtocol
) -> None:
    name = "failed" if upstream is RE else "error_mid"
    stream = read_wire(f"{SHORT[upstream]}/{name}")["stream"]
    translation = between(caller, upstream)
    last = json_of(run(translation, split_events(stream)))[-1]
    assert translation.over and translation.state.error is not None
    error = last["response"]["error"] if caller is RE else last["error"]
    assert error["message"] == translation.state.error.message
    assert translation.feed(stream) == b""


def test_an_error_before_anything_of_substance_is_left_to_whoever_tries_elsewhere() -> None:
    translation = between(ME, CC)
    assert translation.feed(event({"error": {"message": "Too busy.", "code": "slow_down"}})) == b""
    assert translation.state.error is not None and translation.state.error.status == 429
    assert translation.over and not translation.open


@pytest.mark.parametrize("caller", ApiProtocol, ids=ident)
def test_a_stream_that_we_give_up_ends_in_the_caller_s_words(caller: ApiProtocol) -> None:
    upstream = CC if caller is not CC else ME
    translation = between(caller, upstream)
    translation.feed(read_wire(f"{SHORT[upstream]}/text")["stream"][:420])
    [told] = json_of(translation.fail(UpstreamBroken("It broke.")))
    error = told["response"]["error"] if caller is RE else told["error"]
    assert error["message"] == "It broke."


GARBLED = [
    # upstream, what it sends                                  what it is called
    (CC, b"data: oops\n\n", "upstream_bad_json"),
    (
        CC,
        event({"choices": [{"index": 128, "delta": {"content": "x"}}]}),
        "upstream_invalid_response",
    ),
    (
        CC,
        event({"choices": [{"index": 0, "delta": {"images": [{"image_url": {"url": "data:x"}}]}}]}),
        "upstream_invalid_response",
    ),
    (
        GC,
        event({"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}),
        "upstream_malformed_tool_call",
    ),
]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(("upstream", "raw", "code"), GARBLED)
def test_what_makes_no_sense_ends_a_stream(
    upstream: ApiProtocol, raw: bytes, code: str, opened: bool
) -> None:
    translation = between(ME, upstream)
    if opened:
        said = {"candidates": [{"content": {"parts": [{"text": "Hi"}]}}]} if upstream is GC else {}
        assert translation.feed(event(said or {"choices": [{"delta": {"content": "Hi"}}]}))
    assert b"message_" not in translation.feed(raw)  # no end; what is open may close
    assert translation.garbled is not None and translation.garbled.code == code
    assert translation.over and translation.feed(raw) == b""


@pytest.mark.parametrize("streams", [False, True])
def test_a_botched_call_is_no_answer(streams: bool) -> None:
    parts = {"parts": [{"text": "Hi"}]}
    value = {"candidates": [{"content": parts, "finishReason": "MALFORMED_FUNCTION_CALL"}]}
    translation = between(CC, GC)
    with pytest.raises(UpstreamGarbled, match="botched a tool call") as told:
        translation.whole_as_stream(value) if streams else translation.take_whole(value)
    assert told.value.code == "upstream_malformed_tool_call"


ODDITIES = [
    b": keepalive\n\n",
    b"event: ping\ndata: {}\n\n",
    b"event: lonely\n\n",
    b"data: 7\n\ndata: [1]\n\ndata: null\n\n",
    event({"type": "something.new", "x": 1}),
    event({"choices": [], "prompt_filter_results": []}),
    event({"choices": [None, 7, {"delta": 7}, {"delta": {"tool_calls": 7, "content": 7}}]}),
]


@pytest.mark.parametrize("odd", ODDITIES)
def test_what_says_nothing_is_passed_over(odd: bytes) -> None:
    plain, with_it = between(ME, CC), between(ME, CC)
    events = [*split_events(chat({"content": "H"}, {"content": "i"}))]
    out = run(plain, events)
    assert out and run(with_it, [odd + raw for raw in events]) == out


@pytest.mark.parametrize("cited", [None, {}, 7])
def test_a_text_that_begins_with_no_citations_can_be_cited(cited: Any) -> None:
    citation = {"type": "web_search_result_location", "url": "https://example.com", "title": "X"}
    text = {"type": "text", "text": "", "citations": cited}
    events = [
        {"type": "content_block_start", "index": 0, "content_block": text},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "citations_delta", "citation": citation},
        },
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
    ]
    translation = between(CC, ME)
    assert translation.feed(b"".join(event(one) for one in events))
    [block] = translation.choices()[0].content
    assert isinstance(block, Text) and [one.url for one in block.citations] == [citation["url"]]


# Arrays.


@pytest.mark.parametrize("upstream", [CC, RE, ME], ids=ident)
def test_an_array_is_one_value_however_its_stream_is_cut(upstream: ApiProtocol) -> None:
    stream = read_wire(f"{SHORT[upstream]}/text")["stream"]
    events = json_of(run(between(GC, upstream), [stream]))
    for size in (1, 7, len(stream)):
        translation = between(GC, upstream, as_array=True)
        assert json.loads(run(translation, slices(stream, size))) == events


def test_an_array_that_breaks_is_one_value_too() -> None:
    for begun in (b"", chat({"content": "Hi"}, finish="", end=b"")):
        translation = between(GC, CC, as_array=True)
        out = translation.feed(begun) + translation.fail(UpstreamBroken("It broke."))
        *before, last = json.loads(out)
        assert [*last] == ["error"] and last["error"]["message"] == "It broke."
        assert len(before) == bool(begun)


def test_an_error_in_mid_stream_ends_an_array() -> None:
    translation = between(GC, CC, as_array=True)
    error = event({"error": {"message": "No more."}})
    out = run(translation, [chat({"content": "Hi"}, finish="", end=b""), error])
    assert json.loads(out)[-1]["error"]["message"] == "No more."


def test_an_array_of_nothing_is_empty() -> None:
    assert ArrayFramer().end() == b"[]"


# What was used.


@pytest.mark.parametrize("caller", [RE, ME, GC], ids=ident)
@pytest.mark.parametrize("streams", [False, True])
def test_what_nobody_counted_is_estimated_and_told_to_be(
    caller: ApiProtocol, streams: bool
) -> None:
    translation = between(caller, CC)
    if streams:
        answer = json_of(translation.feed(chat({"content": "12345"}, {"content": "6789"})))[-1]
    else:
        translation.take_whole({"choices": [{"message": {"content": "123456789"}}]})
        answer = translation.whole()
    assert translation.state.usage == Usage(20, 3)  # as the label says; four characters a token
    assert translation.losses.found == [Loss("estimated", "usage", harmful=False)]
    assert answer


def test_what_was_counted_is_not_estimated() -> None:
    translation = between(ME, CC)
    counts = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
    translation.feed(chat({"content": "123456789"}, end=counts + b"data: [DONE]\n\n"))
    assert (translation.state.usage, translation.losses.found) == (Usage(7, 2), [])


# Pauses.

SEARCH = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "x"}}


def a_turn(text: str, stop: str) -> dict[str, Any]:
    blocks = [{"type": "text", "text": text}, *([SEARCH] if stop == "pause_turn" else [])]
    counts = {"input_tokens": 10, "output_tokens": 3}
    return {"model": "m", "content": blocks, "stop_reason": stop, "usage": counts}


def a_stream(text: str, stop: str) -> bytes:
    start = {"model": "m", "usage": {"input_tokens": 10, "output_tokens": 1}}
    search = {**SEARCH, "input": {}}
    partial = {"type": "input_json_delta", "partial_json": '{"query": "x"}'}
    events: list[Any] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": 0},
    ]
    if stop == "pause_turn":
        events += [
            {"type": "content_block_start", "index": 1, "content_block": search},
            {"type": "content_block_delta", "index": 1, "delta": partial},
            {"type": "content_block_stop", "index": 1},
        ]
    delta = {"stop_reason": stop, "stop_sequence": None}
    events.append({"type": "message_delta", "delta": delta, "usage": {"output_tokens": 3}})
    return b"".join(event(one) for one in [*events, {"type": "message_stop"}])


ASKED = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("caller", [CC, RE, GC], ids=ident)
def test_a_model_that_pauses_goes_on_where_it_was(caller: ApiProtocol, streams: bool) -> None:
    translation, out = between(caller, ME), b""
    for text, stop in (("One, ", "pause_turn"), ("two.", "end_turn")):
        if streams:
            out += translation.feed(a_stream(text, stop)) + translation.finish()
        else:
            translation.take_whole(a_turn(text, stop))
        assert translation.paused == (stop == "pause_turn")
        if translation.paused:
            body = translation.resume(ASKED)
            said = {"role": "assistant", "content": a_turn("One, ", stop)["content"]}
            assert body == {**ASKED, "messages": [*ASKED["messages"], said]}
    answer = json_of(out)[-1] if streams else translation.whole()
    assert (
        "".join(b.text for b in translation.choices()[0].content if isinstance(b, Text))
        == "One, two."
    )
    assert translation.choices()[0].finished.finish is Finish.STOP
    assert translation.state.usage == Usage(20, 6) and answer


def test_a_whole_answer_that_pauses_does_not_end_a_stream() -> None:
    translation = between(CC, ME)
    first = translation.whole_as_stream(a_turn("One, ", "pause_turn"))
    assert translation.paused and b"[DONE]" not in first and not translation.over
    translation.resume(ASKED)
    second = translation.whole_as_stream(a_turn("two.", "end_turn"))
    chunks = json_of(first + second)
    told = [choice["delta"].get("content") for one in chunks for choice in one["choices"]]
    assert "".join(filter(None, told)) == "One, two." and second.endswith(b"data: [DONE]\n\n")


def test_a_request_to_go_on_leaves_the_first_one_alone() -> None:
    before = json.dumps(ASKED)
    translation = between(CC, ME)
    translation.take_whole(a_turn("One, ", "pause_turn"))
    translation.resume(ASKED)
    assert json.dumps(ASKED) == before


@pytest.mark.parametrize("streams", [False, True])
def test_a_model_that_never_stops_pausing_is_stopped(streams: bool) -> None:
    translation, out = between(CC, ME, pauses=2), b""
    for n in range(3):
        if streams:
            out += translation.feed(a_stream(f"{n}.", "pause_turn"))
        else:
            translation.take_whole(a_turn(f"{n}.", "pause_turn"))
        assert translation.paused == (n < 2)
        if translation.paused:
            translation.resume(ASKED)
    assert (
        translation.state.usage is not None
        and translation.choices()[0].finished.raw == "pause_turn"
    )
    finishes = [c["finish_reason"] for one in json_of(out) for c in one["choices"]]
    assert not streams or finishes[-1] == "length"


# Several choices.


def test_choices_that_were_asked_for_one_by_one_are_told_as_one_answer() -> None:
    translation = between(CC, ME)
    for n, text in enumerate(("One.", "Two.")):
        translation.take_whole(a_turn(text, "end_turn"), n)
    answer = translation.whole()
    assert [(c["index"], c["message"]["content"]) for c in answer["choices"]] == [
        (0, "One."),
        (1, "Two."),
    ]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (20, 6)


@pytest.mark.parametrize("caller", [CC, GC], ids=ident)
def test_choices_that_were_asked_for_one_by_one_are_streamed_in_order(caller: ApiProtocol) -> None:
    translation = between(caller, ME)
    told = json_of(translation.many_as_stream([a_turn(t, "end_turn") for t in ("One.", "Two.")]))
    listed = "choices" if caller is CC else "candidates"
    first = [choice["index"] for one in told for choice in one[listed]]
    assert [*dict.fromkeys(first)] == [0, 1]
    assert [choice.content for choice in translation.choices()] == [
        (Text("One."),),
        (Text("Two."),),
    ]
    assert translation.state.usage == Usage(20, 6) and translation.over


# Small things.


def test_a_character_that_was_cut_in_two_is_whole_again() -> None:
    translation = between(ME, CC)
    out = translation.feed(chat({"content": "a \ud83e"}, {"content": "\udd86"}, {"content": " b"}))
    assert "�".encode() not in out
    assert translation.choices()[0].content == (Text("a 🦆 b"),)


def test_half_a_character_is_none() -> None:
    translation = between(ME, CC)
    out = translation.feed(chat({"content": "a \ud83e"}, {"content": "b"}))
    told = [one["delta"]["text"] for one in json_of(out) if one["type"] == "content_block_delta"]
    assert "".join(told) == "a �b"


def test_what_was_done_to_a_request_is_undone_in_its_answer() -> None:
    undo = Undo(names={"ns__f": ("ns", "f")})
    translation = between(RE, CC, undo)
    function = {"name": "ns__f", "arguments": "{}"}
    call = {"index": 0, "id": "c1", "type": "function", "function": function}
    last = json_of(translation.feed(chat({"tool_calls": [call]}, finish="tool_calls")))[-1]
    [item] = last["response"]["output"]
    assert (item["name"], item["namespace"]) == ("f", "ns")


def test_what_an_answer_held_and_no_other_protocol_can_say_is_told() -> None:
    for streams in (False, True):
        translation = between(CC, ME)
        if streams:
            translation.feed(a_stream("Hi", "pause_turn"))
            translation.resume(ASKED)
            translation.feed(a_stream("Hi", "end_turn"))
        else:
            translation.take_whole(a_turn("Hi", "pause_turn"))
            translation.resume(ASKED)
            translation.take_whole(a_turn("Hi", "end_turn"))
            translation.whole()
        assert translation.losses.found == [Loss("dropped", "server_tool_use", harmful=False)]


def test_the_words_of_an_answer_are_counted_as_the_caller_sees_them() -> None:
    """What is cut off at a stop sequence was never said."""
    translation = between(ME, CC, Undo(stops=("END",)))
    translation.feed(chat({"content": "12345678END and so on and on"}))
    assert translation.state.usage == Usage(20, 2)
