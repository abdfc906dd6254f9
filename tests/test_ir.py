"""The neutral form of answers, and what every codec makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from support import read_wire, slices, telling_cuts, wire_names

from bitrouter import (
    CODECS,
    MAX_EVENT_BYTES,
    AnswerLabel,
    ApiProtocol,
    Block,
    Choice,
    Citation,
    Close,
    Delta,
    EventCutter,
    Finish,
    Finished,
    Gatherer,
    InOrder,
    Loss,
    Losses,
    Media,
    Opaque,
    Open,
    Prompt,
    Reasoning,
    Refusal,
    SseEvent,
    StreamPart,
    StreamRelay,
    StreamState,
    Text,
    ToolCall,
    UpstreamGarbled,
    Usage,
    parse_event,
    parts_of,
    split_events,
    text_of,
    with_text,
)

CC, RE, ME, GC = ApiProtocol
FOLDERS = {"chat": CC, "responses": RE, "messages": ME, "gemini": GC}
VENDORS = {CC: "chat:v", RE: "openai", ME: "anthropic", GC: "google"}
LABEL = AnswerLabel("abc", 1_764_000_000, "m", 5)
STOP, SPENT = Finished(Finish.STOP), Usage(5, 2)


def test_a_protocol_is_spelled_as_the_configuration_spells_it() -> None:
    spelt = ["chat_completions", "responses", "messages", "generate_content"]
    assert [str(p) for p in ApiProtocol] == spelt
    assert dict.fromkeys(ApiProtocol, 1).keys() == set(spelt)


def test_a_new_stream_has_shown_nothing() -> None:
    state = StreamState()
    assert not (state.started or state.finished or state.ended or state.error or state.usage)


def test_two_streams_remember_apart() -> None:
    one, other = StreamState(), StreamState()
    one.memo["x"] = 1
    assert other.memo == {}


def test_no_usage_is_no_tokens_at_all() -> None:
    assert {*Usage()} == {0}


def test_a_loss_is_told_once() -> None:
    losses = Losses()
    for name in ("seed", "seed", "top_k"):
        losses.add("dropped", name)
    losses.add("dropped", "seed", harmful=False)
    told = [Loss("dropped", "seed"), Loss("dropped", "top_k"), Loss("dropped", "seed", False)]
    assert losses.found == told


# --- blocks, and the parts that they come in

STATE = Opaque("anthropic", "signature", "c2ln")
CITED = Citation("https://tides.example/", "Tides", 4, 8)
PROB = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
IMAGE = Media("image", "image/png", "iVBORw0KGgo=")
BLOCKS: list[Block] = [
    Text("some words", (CITED,), logprobs=(PROB,)),
    Text(""),
    Refusal("no"),
    Reasoning("hm", STATE),
    Reasoning("", STATE),
    Reasoning("hm"),
    IMAGE,
    ToolCall("c", "f", '{"a":1}', opaque=STATE, namespace="ns"),
    ToolCall("c", "f", "free text", custom=True),
]


def gathered(parts: Iterable[StreamPart]) -> list[Choice]:
    gatherer = Gatherer()
    for part in parts:
        gatherer.add(part)
    return gatherer.choices()


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_a_block_taken_apart_is_put_together_again(block: Block) -> None:
    parts = list(parts_of(block, 7))
    assert gathered([*parts, STOP]) == [Choice((block,), STOP)]
    assert isinstance(parts[0], Open) and isinstance(parts[-1], Close)
    assert text_of(parts[0].block) == "" and {getattr(part, "key", 0) for part in parts} == {7}


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_a_block_keeps_all_but_its_text_when_its_text_changes(block: Block) -> None:
    assert with_text(with_text(block, "x"), text_of(block)) == block


def test_choices_come_in_order_each_with_its_own_finish() -> None:
    parts: list[StreamPart] = [Open(1, Text(), 1), Open(0, Text(), 0), Delta(1, "b"), Delta(0, "a")]
    ends = [Finished(Finish.LENGTH, 1), Finished(Finish.STOP, 0), Finished(Finish.STOP, 1)]
    assert gathered([*parts, *ends]) == [
        Choice((Text("a"),), Finished(Finish.STOP, 0)),
        Choice((Text("b"),), Finished(Finish.LENGTH, 1)),
    ]


def test_an_answer_of_nothing_is_one_choice_of_nothing() -> None:
    assert gathered([]) == [Choice((), STOP)]


# A capital opens a block, a small letter lets it grow, a digit closes it: A, a, 0; B, b, 1.
# fmt: off
ORDERS = [
    # as they come    one at a time
    ("Aa0Bb1",        "Aa0Bb1"),
    ("AaBba01",       "Aaa0Bb1"),
    ("ABCc2b1a0",     "Aa0Bb1Cc2"),
    ("ABCb2a0b1",     "Aa0Bbb1C2"),
    ("ABba",          "Aa"),
    ("A0",            "A0"),
]
# fmt: on


def part_of(letter: str) -> StreamPart:
    if letter.isdigit():
        return Close(int(letter))
    key = "ABC".index(letter.upper())
    return Open(key, Text()) if letter.isupper() else Delta(key, letter)


@pytest.mark.parametrize(("given", "wanted"), ORDERS)
def test_blocks_that_overlap_come_out_one_after_the_other(given: str, wanted: str) -> None:
    in_order = InOrder()
    told = [one for letter in given for one in in_order.feed(part_of(letter))]
    assert told == [part_of(letter) for letter in wanted]


def test_a_finish_waits_for_nothing() -> None:
    in_order = InOrder()
    in_order.feed(Open(0, Text()))
    assert in_order.feed(STOP) == [STOP]


def test_what_waits_is_bounded() -> None:
    in_order = InOrder()
    for part in (Open(0, Text()), Open(1, Text()), Delta(1, "x" * MAX_EVENT_BYTES)):
        in_order.feed(part)
    with pytest.raises(UpstreamGarbled):
        in_order.feed(Delta(1, "x"))


# --- every codec alike: answers that come in


def events_in(pieces: Iterable[bytes]) -> tuple[SseEvent, ...]:
    cutter = EventCutter()
    blocks = [*(cutter.feed(piece) for piece in pieces), cutter.finish()]
    found = (parse_event(raw) for block in blocks for raw in split_events(block))
    return tuple(event for event in found if event)


def streamed(protocol: ApiProtocol, events: Iterable[SseEvent]) -> list[Choice]:
    decoder = CODECS[protocol].decoder(VENDORS[protocol])
    values = [json.loads(event.data) for event in events if event.data != b"[DONE]"]
    fed = [part for value in values for part in decoder.feed(value)]
    return gathered([*fed, *decoder.finish()])


def whole(protocol: ApiProtocol, answer: Any) -> list[Choice]:
    return gathered(CODECS[protocol].decoder(VENDORS[protocol]).whole(answer))


def stream_of(name: str) -> bytes:
    raw = read_wire(name)["stream"]
    return raw.replace(b"\n", b"\r\n") if name.startswith("gemini/") else raw


def protocol_of(name: str) -> ApiProtocol:
    return FOLDERS[name.partition("/")[0]]


ANSWERED = [name for name in wire_names() if {"stream", "answer"} <= read_wire(name).keys()]


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_is_the_same_whole_and_streamed_wherever_it_is_cut(name: str) -> None:
    protocol, raw = protocol_of(name), stream_of(name)
    answer = whole(protocol, json.loads(read_wire(name)["answer"]))
    cuts = {events_in(pieces) for pieces in [*telling_cuts(raw), slices(raw, 1)]}
    assert [streamed(protocol, events) for events in cuts] == [answer]


LOW = Citation("https://tides.example/", "Tides", 0, 3)


def call_of(ident: str, port: str, **more: Any) -> ToolCall:
    return ToolCall(ident, "tide", f'{{"port":"{port}"}}', **more)


def prob(token: str, logprob: float, *others: Any) -> Any:
    facts = {"token": token, "logprob": logprob, "bytes": list(token.encode())}
    return {**facts, "top_logprobs": list(others)} if others else facts


# What the wire files say, where it is more than a text.
MEANT: dict[str, tuple[Block, ...]] = {
    "chat/details": (
        Reasoning("Neap tide.", Opaque("chat:v", "reasoning.text|anthropic-claude-v1", "c2lnbmVk")),
        Reasoning("", Opaque("chat:v", "reasoning.encrypted|openai-responses-v1", "b3BhcXVl",
                             id="rs_w9")),
        Text("Low.", (LOW,)),
    ),
    "chat/side_by_side": (
        call_of("call_k1", "Brest"), ToolCall("call_k2", "moon", '{"on":"Friday"}'),
    ),
    "chat/choices": (
        Text("Heads", logprobs=({**prob("Heads", -0.5), "top_logprobs": []},)),
    ),
    "responses/summary_calls": (
        Reasoning("Two ports.\n\nAsk both.",
                  Opaque("openai", "encrypted", "b3BhcXVl", id="rs_w4")),
        call_of("call_w7", "Brest"), call_of("call_w8", "Vigo"),
    ),
    "responses/custom_call": (ToolCall("call_w6", "sql", "select 1", custom=True),),
    "responses/cited": (
        Text("Low.", (LOW,), logprobs=({**prob("Low.", -0.5), "top_logprobs": []},)),
    ),
    "messages/calls": (
        Reasoning("Two ports.", Opaque("anthropic", "signature", "c2lnbmVk")),
        Reasoning("", Opaque("anthropic", "redacted", "c2VjcmV0")),
        Text("Let me see."), call_of("toolu_w1", "Brest"), call_of("toolu_w2", "Vigo"),
    ),
    "messages/searched": (Text("Low.", (LOW._replace(end=4),)),),
    "gemini/calls": (
        Reasoning("Two ports."),
        call_of("w11", "Brest", opaque=Opaque("google", "thought", "b3BhcXVl", "m")),
        call_of("w12", "Vigo"),
    ),
    "gemini/grounded": (
        Text("Ääh Flut", (LOW._replace(start=4, end=8),), logprobs=(
            prob("Flut", -0.5, prob("Flut", -0.5), prob("Ebbe", -1.5)),)),
    ),
    "gemini/image": (Text("Voilà."), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), MEANT.items(), ids=MEANT)
def test_an_answer_says_what_it_says(name: str, content: tuple[Block, ...]) -> None:
    assert whole(protocol_of(name), json.loads(read_wire(name)["answer"]))[0].content == content


@pytest.mark.parametrize("name", ANSWERED)
def test_the_name_of_the_model_is_learned(name: str) -> None:
    for feed in ("whole", "stream"):
        decoder = CODECS[protocol_of(name)].decoder("v")
        assert decoder.model == ""
        if feed == "whole":
            decoder.whole(json.loads(read_wire(name)["answer"]))
        else:
            decoder.feed(json.loads(events_in([stream_of(name)])[0].data))
        assert decoder.model == "m"


LEFT_OUT = {
    "chat/text": set(),
    "responses/cited": {"web_search_call"},
    "messages/searched": {"server_tool_use", "web_search_tool_result"},
    "gemini/thoughts": set(),
}  # fmt: skip


@pytest.mark.parametrize(("name", "lost"), LEFT_OUT.items())
def test_what_an_answer_holds_besides_is_named(name: str, lost: set[str]) -> None:
    one, other = (CODECS[protocol_of(name)].decoder("v") for _ in range(2))
    one.whole(json.loads(read_wire(name)["answer"]))
    for event in events_in([stream_of(name)]):
        if event.data != b"[DONE]":
            other.feed(json.loads(event.data))
    assert one.lost == other.lost == lost


@pytest.mark.parametrize("name", ANSWERED)
def test_what_is_open_when_a_stream_breaks_off_is_closed(name: str) -> None:
    events = events_in([stream_of(name)])
    for end in range(len(events)):
        decoder = CODECS[protocol_of(name)].decoder("v")
        values = [json.loads(e.data) for e in events[:end] if e.data != b"[DONE]"]
        parts = [*(p for v in values for p in decoder.feed(v)), *decoder.finish()]
        opened = [part.key for part in parts if isinstance(part, Open)]
        assert sorted(opened) == sorted(p.key for p in parts if isinstance(p, Close))


# --- every codec alike: answers that go out

OWN = {
    CC: Opaque("chat:v", "reasoning.text|x", "c2ln"),
    RE: Opaque("openai", "encrypted", "c2ln", id="rs_abc_0"),
    ME: Opaque("anthropic", "signature", "c2ln"),
    GC: Opaque("google", "thought", "c2ln", "m"),
}
SAID: dict[str, tuple[set[ApiProtocol], tuple[Block, ...]]] = {
    # where it survives as it is
    "a text": ({CC, RE, ME, GC}, (Text("Grüezi 🏔 \u2028 mitenand"),)),
    "a text and two calls": (
        {CC, RE, ME},
        (Text("Ah."), ToolCall("c1", "tide", '{"port":"Brest"}'), ToolCall("c2", "now", "{}")),
    ),
    "signed calls": (
        {GC},
        tuple(ToolCall(f"c{n}", "tide", '{"a":[1]}', opaque=OWN[GC]) for n in (1, 2)),
    ),
    "a refusal": ({CC, RE}, (Refusal("I cannot."),)),
    "a call in free text": ({CC, RE}, (ToolCall("c1", "sql", "select 1", custom=True),)),
    "a namespace": ({RE}, (ToolCall("c1", "tide", "{}", namespace="sea"),)),
    "a source": ({CC, RE, GC}, (Text("Ääh Flut", (CITED,)),)),
    "logprobs": ({CC, RE, GC}, (Text("a", logprobs=(PROB,)),)),
    "an image": ({CC, RE, GC}, (Text("Voilà"), IMAGE)),
    "two texts": ({RE, ME}, (Text("one"), Text("two"))),
    "plain reasoning": ({CC, GC}, (Reasoning("hm"), Text("a"))),
    "nothing": ({CC, RE, ME, GC}, ()),
}
SURVIVES = [(p, blocks) for where, blocks in SAID.values() for p in ApiProtocol if p in where]
SURVIVES_IDS = [
    f"{name}-{p}" for name, (where, _) in SAID.items() for p in ApiProtocol if p in where
]


def in_pieces(block: Block, key: int, choice: int = 0) -> Iterator[StreamPart]:
    """The parts of a block whose text comes by three characters."""
    for part in parts_of(block, key, choice):
        if isinstance(part, Delta) and not part.logprobs:
            text = part.text
            yield from (Delta(key, text[at : at + 3]) for at in range(0, len(text), 3))
        else:
            yield part


def encoded(protocol: ApiProtocol, choices: list[Choice], usage: Usage = SPENT) -> bytes:
    encoder = CODECS[protocol].encoder(Prompt("m", ()), LABEL)
    keys, out = iter(range(99)), []
    for content, finished in choices:
        parts = (p for block in content for p in in_pieces(block, next(keys), finished.choice))
        out += [encoder.encode(part) for part in parts] + [encoder.encode(finished)]
    return b"".join([*out, encoder.end(usage)])


def rendered(protocol: ApiProtocol, choices: list[Choice], usage: Usage = SPENT) -> Any:
    render = CODECS[protocol].render_response
    answer = render(Prompt("m", ()), LABEL, choices, usage, Losses())
    return json.loads(json.dumps(answer))


def content_of(choices: list[Choice]) -> list[tuple[Block, ...]]:
    """What was said; no arguments are an object with nothing in it."""
    return [
        tuple(
            b._replace(arguments=b.arguments or "{}") if isinstance(b, ToolCall) else b for b in c
        )
        for c, _ in choices
    ]


def said(blocks: tuple[Block, ...]) -> list[Choice]:
    called = any(isinstance(block, ToolCall) for block in blocks)
    return [Choice(blocks, Finished(Finish.TOOL_CALLS) if called else STOP)]


@pytest.mark.parametrize(("protocol", "blocks"), SURVIVES, ids=SURVIVES_IDS)
def test_an_answer_survives_its_own_protocol(
    protocol: ApiProtocol, blocks: tuple[Block, ...]
) -> None:
    raw, answer = encoded(protocol, said(blocks)), rendered(protocol, said(blocks))
    assert content_of(streamed(protocol, events_in([raw]))) == [blocks]
    assert content_of(whole(protocol, answer)) == [blocks]


@pytest.mark.parametrize("protocol", [CC, RE, ME])
def test_reasoning_and_its_state_survive_their_own_protocol(protocol: ApiProtocol) -> None:
    blocks = (Reasoning("hm hm", OWN[protocol]), Text("a"))
    raw, answer = encoded(protocol, said(blocks)), rendered(protocol, said(blocks))
    assert content_of(whole(protocol, answer)) == [blocks]
    assert content_of(streamed(protocol, events_in([raw]))) == [blocks]


@pytest.mark.parametrize("protocol", [CC, GC])
def test_several_choices_survive_where_there_can_be_several(protocol: ApiProtocol) -> None:
    takes = [Choice((Text(f"take {n}"),), Finished(Finish.STOP, n)) for n in range(3)]
    raw, answer = encoded(protocol, takes), rendered(protocol, takes)
    for choices in (streamed(protocol, events_in([raw])), whole(protocol, answer)):
        assert content_of(choices) == content_of(takes)
        assert [choice.finished.choice for choice in choices] == [0, 1, 2]


@pytest.mark.parametrize(("protocol", "blocks"), SURVIVES, ids=SURVIVES_IDS)
def test_a_stream_of_ours_is_one_that_we_would_pass_on(
    protocol: ApiProtocol, blocks: tuple[Block, ...]
) -> None:
    codec = CODECS[protocol]
    raw, relay = encoded(protocol, said(blocks)), StreamRelay(codec)
    assert b"".join([relay.feed(piece) for piece in slices(raw, 50)]) == raw
    assert relay.state.finished and relay.state.usage == SPENT
    assert relay.state.ended is (protocol is not GC) and relay.state.error is None


USAGES = [
    Usage(),
    Usage(9, 4),
    Usage(9, 4, cached_tokens=6),
    Usage(9, 40, reasoning_tokens=36),
    Usage(99, 40, 60, 30, 36),
]


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("protocol", ApiProtocol)
def test_usage_survives_every_protocol(protocol: ApiProtocol, usage: Usage) -> None:
    codec, state = CODECS[protocol], StreamState()
    answer = said((Text("a"),))
    for event in events_in([encoded(protocol, answer, usage)]):
        if event.data != b"[DONE]":
            codec.note(state, json.loads(event.data))
    wanted = usage._replace(cache_write_tokens=0) if protocol is GC else usage
    assert state.usage == codec.usage(rendered(protocol, answer, usage)) == wanted


def test_overlapping_blocks_come_one_at_a_time_where_they_must() -> None:
    calls = [ToolCall(f"c{n}", "tide", '{"a":1}') for n in range(3)]
    parts = [list(in_pieces(call, n)) for n, call in enumerate(calls)]
    mixed = [part for step in zip(*parts, strict=True) for part in step]
    for protocol in (CC, RE, ME):
        encoder = CODECS[protocol].encoder(Prompt("m", ()), LABEL)
        raw = b"".join([*map(encoder.encode, mixed), encoder.encode(STOP), encoder.end(Usage())])
        assert content_of(streamed(protocol, events_in([raw]))) == [tuple(calls)]
