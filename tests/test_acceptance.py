"""The acceptance cases of translation, by number: a caller of one protocol, a provider of another.

A case is named by its pair: CM is a Chat Completions caller in front of a Messages provider.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from support import (
    CHAT_USED,
    CLAUDE,
    CROSS,
    DONE,
    GEMINI_USED,
    PROTOCOLS,
    SMART,
    TOOL,
    USED,
    Answer,
    Call,
    Hop,
    Reply,
    Said,
    Thought,
    answer_of,
    begun_of,
    blocks_of,
    chat_after,
    chat_call,
    chat_chunk,
    chat_message_of,
    crossed,
    events_by_name,
    events_of,
    gemini_event,
    heard,
    last_error,
    named_event,
    path_of,
    provider_toml,
    request_bytes,
    request_of,
    responses_items_of,
    says,
    slices,
    stream,
    warned,
)

import bitrouter

# E.2: every pair.

ID_PREFIXES = {"C": "chatcmpl-", "R": "resp_", "M": "msg_", "G": ""}
SAID = "Zwölf Enten 🦆"


@pytest.mark.parametrize("streams", [False, True], ids=["E19-whole", "E19-stream"])
@pytest.mark.parametrize("pair", CROSS)
async def test_a_text_is_heard_as_it_was_said(hop: Any, pair: str, streams: bool) -> None:
    async with hop(pair, says(pair[1], SAID, streams=streams)) as h:
        told = await h.hear(streams=streams)
    assert (told.text, told.role) == (SAID, "model" if pair[0] == "G" else "assistant")
    assert told.model == "m" and told.id.startswith(ID_PREFIXES[pair[0]]) and len(told.id) > 5
    assert not told.calls and not told.thought


@pytest.mark.parametrize("pair", CROSS)
async def test_words_travel_as_they_come_e20(hop: Any, pair: str) -> None:
    said = Said(("Eins ", "zwei ", "drei"))
    first, *rest = _at_text(events_of(pair[1], said))
    go_on = asyncio.Event()
    async with hop(pair, stream(first, go_on, *rest)) as h:
        h.caller.send(_asking(h))
        _, headers = await h.caller.head()
        begun = await h.caller.chunk()
        go_on.set()
        pieces = [begun, *[piece async for piece in h.caller._chunks()]]
        told = heard(pair[0], Answer(200, headers, b"".join(pieces)))
    assert told.deltas == list(said.pieces)
    assert b"Eins" in begun and b"zwei" not in begun


def _at_text(events: list[bytes]) -> list[bytes]:
    """A stream in as many pieces as it has events of text, cut behind each."""
    pieces, piece = [], b""
    for event in events:
        piece += event
        if re.search(rb"Eins|zwei", event):
            pieces.append(piece)
            piece = b""
    return [*pieces, piece]


def _asking(h: Hop) -> bytes:
    path = path_of(h.client, h.model, streams=True)
    body = request_of(h.client) | ({} if h.client == "G" else {"model": h.model, "stream": True})
    return request_bytes("POST", path, body)


@pytest.mark.parametrize("client", PROTOCOLS)
async def test_an_unknown_field_travels_verbatim_in_its_own_protocol_e22(
    hop: Any, client: str
) -> None:
    answer = {**answer_of(client, "hi"), "bar": {"b": [1.50]}}
    async with hop(client * 2, Reply(body=answer)) as h:
        told = await h.ask({**request_of(client), "foo": {"a": 1}})
        assert h.sent["foo"] == {"a": 1} and told.json() == answer and not warned(told)


@pytest.mark.parametrize("pair", CROSS)
async def test_an_unknown_field_is_dropped_with_a_warning_e23(hop: Any, pair: str) -> None:
    async with hop(pair, says(pair[1], "hi")) as h:
        told = await h.ask({**request_of(pair[0]), "foo": {"a": 1}})
        assert "foo" not in h.sent and warned(told) == ["dropped;field=foo"]


MODELS = ["gpt-x:free", "anthropic/claude-x:beta", "a@b.c"]


@pytest.mark.parametrize("model", MODELS, ids=[f"E25-{model}" for model in MODELS])
@pytest.mark.parametrize("pair", CROSS)
async def test_any_model_id_reaches_the_other_protocol(hop: Any, pair: str, model: str) -> None:
    async with hop(pair, says(pair[1], "hi"), model=f"up/{model}") as h:
        assert (await h.hear()).text == "hi"
        [seen] = h.up.seen
        assert (
            seen.path == f"/v1beta/models/{model}:generateContent"
            if pair[1] == "G"
            else (h.sent["model"] == model)
        )


# E.1: streams as providers send them, on their way to another protocol.


def _in_three_lines(raw: bytes) -> bytes:
    """Each event's JSON over several data lines, as a pretty printer would break it."""
    return re.sub(rb'data: {("\w+":)', rb"data: {\ndata: \1\ndata: ", raw)


def _with_line_ends(raw: bytes, end: bytes) -> bytes:
    return raw.replace(b"\r\n", b"\n").replace(b"\n", end)


CRLF = b"\r\n"
ODD_WIRES: dict[str, Callable[[bytes], list[bytes]]] = {
    "E2-CRLF": lambda raw: [_with_line_ends(raw, CRLF)],
    "E2-CR-apart-from-LF": lambda raw: re.split(rb"(?<=\r)", _with_line_ends(raw, CRLF)),
    "E3-CR": lambda raw: [_with_line_ends(raw, b"\r")],
    "E5-three-data-lines": lambda raw: [_in_three_lines(raw)],
    "E9-BOM": lambda raw: [b"\xef\xbb\xbf" + raw],
    "E10-no-last-blank-line": lambda raw: [raw.rstrip(CRLF)],
    "E11-empty-ping": lambda raw: [b"event: ping\ndata:\n\n" + raw],
    "E2-byte-by-byte": lambda raw: [raw[i : i + 1] for i in range(len(raw))],
}
CLIENT_OF = {"C": "M", "R": "C", "M": "G", "G": "R"}  # one that is not of the upstream's kind


@pytest.mark.parametrize("case", ODD_WIRES)
@pytest.mark.parametrize("upstream", PROTOCOLS)
async def test_an_odd_stream_is_read_all_the_same(hop: Any, upstream: str, case: str) -> None:
    raw = b"".join(events_of(upstream, SAID, Call("f", '{"a": 1}')))
    async with hop(CLIENT_OF[upstream] + upstream, stream(*ODD_WIRES[case](raw))) as h:
        told = await h.hear(streams=True)
    assert told.text == SAID and [json.loads(c.arguments) for c in told.calls] == [{"a": 1}]


SEPARATORS = {"E8-U+2028": "\u2028", "E8-U+0085": "\x85", "E8-VT": "\v", "E8-FF": "\f"}


@pytest.mark.parametrize(("upstream", "case"), crossed(PROTOCOLS, SEPARATORS))
async def test_a_line_ends_where_sse_says(hop: Any, upstream: str, case: str) -> None:
    mark = SEPARATORS[case]
    raw = b"".join(events_of(upstream, Said(("a|b", "c|d")))).replace(b"|", mark.encode())
    async with hop(CLIENT_OF[upstream] + upstream, stream(raw)) as h:
        assert (await h.hear(streams=True)).text == f"a{mark}bc{mark}d"


@pytest.mark.parametrize("upstream", PROTOCOLS)
async def test_an_event_of_8_mb_is_translated_e7(hop: Any, upstream: str) -> None:
    large = "x" * 2 ** (22 if upstream == "R" else 23)  # which says it five times over
    raw = b"".join(events_of(upstream, Said((large,))))
    async with hop(CLIENT_OF[upstream] + upstream, stream(*slices(raw, 99_991))) as h:
        assert (await h.hear(streams=True)).text == large


@pytest.mark.parametrize("upstream", PROTOCOLS)
async def test_an_error_object_instead_of_a_stream_has_its_status_e14(
    hop: Any, upstream: str
) -> None:
    error = {"message": "slow down", "type": "rate_limit_error", "code": 429, "status": "X"}
    error |= {"status": "RESOURCE_EXHAUSTED"} if upstream == "G" else {}
    async with hop(CLIENT_OF[upstream] + upstream, Reply(body={"error": error})) as h:
        answer = await h.ask(streams=True)
    assert answer.status == 429 and "slow down" in answer.json()["error"]["message"]
    assert answer.headers["content-type"].startswith("application/json")


HEADS: dict[str, dict[str, str]] = {
    "E15-charset": {"content-type": "text/event-stream; charset=utf-8"},
    "E15-no-type": {"content-type": ""},
    "E15-gzip": {"content-encoding": "gzip"},
    "E15-deflate": {"content-encoding": "deflate"},
}
PACKED: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("headers", HEADS.values(), ids=HEADS)
async def test_a_stream_may_come_in_other_wrappings(hop: Any, headers: dict[str, str]) -> None:
    raw = b"".join(events_of("M", "hi"))
    pack = PACKED.get(headers.get("content-encoding", ""), bytes)
    async with hop("CM", stream(pack(raw), headers=headers)) as h:
        assert (await h.hear(streams=True)).text == "hi"
        assert h.up.seen[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("pair", CROSS)
async def test_what_is_not_json_ends_a_stream_in_an_error_e16(hop: Any, pair: str) -> None:
    async with hop(pair, stream(*begun_of(pair[1]), None, b"data: oops\n\n")) as h:
        answer = await h.ask(streams=True)
    error, wanted = last_error(pair[0], answer), SPELT[pair[0]]
    assert b"Eins" in answer.body and "not JSON" in error["message"] and wanted in str(error)


# wire: Responses knows a few codes only, and this is not one of them
SPELT = {
    "C": "upstream_bad_json",
    "R": "server_error",
    "M": "upstream_bad_json",
    "G": "UPSTREAM_BAD_JSON",
}


# E.3: callers of Chat Completions.

TWO_CALLS = (Call("f", '{"a": 1}', "toolu_1"), Call("g", '{"b": [2]}', "toolu_2"))
NO_ID = Call("f", "{}", "")


async def test_two_calls_are_told_apart_e27(hop: Any) -> None:
    async with hop("CM", says("M", "Well.", *TWO_CALLS, streams=True)) as h:
        told = await h.hear(streams=True)
    assert [(c.id, c.name, json.loads(c.arguments)) for c in told.calls] == [
        ("toolu_1", "f", {"a": 1}),
        ("toolu_2", "g", {"b": [2]}),
    ]
    assert (told.text, told.finish) == ("Well.", "tool_calls")


@pytest.mark.parametrize("streams", [False, True], ids=["E29-whole", "E29-stream"])
async def test_calls_without_ids_get_some(hop: Any, streams: bool) -> None:
    async with hop("CG", says("G", NO_ID, NO_ID, streams=streams)) as h:
        first = await h.hear(streams=streams)
        made = [call.id for call in first.calls]
        assert len(set(made)) == 2 and all(re.fullmatch(r"[\w-]{1,64}", one) for one in made)
        for _ in range(2):
            await h.ask(chat_after(first.calls, "4"))
        assert h.up.seen[1].body == h.up.seen[2].body
        assert str(h.sent).count("functionResponse'") == 2


@pytest.mark.parametrize("streams", [False, True], ids=["E30-whole", "E30-stream"])
@pytest.mark.parametrize("args", [{"args": {}}, {}], ids=["empty", "missing"])
async def test_a_call_without_arguments_has_an_object(
    hop: Any, streams: bool, args: dict[str, Any]
) -> None:
    answer = answer_of("G", "x")
    answer["candidates"][0]["content"]["parts"] = [{"functionCall": {"name": "f", **args}}]
    reply = stream(gemini_event(answer)) if streams else Reply(body=answer)
    async with hop("CG", reply) as h:
        assert [c.arguments for c in (await h.hear(streams=streams)).calls] == ["{}"]


async def test_usage_is_told_last_and_null_before_e32(hop: Any) -> None:
    wanted = request_of("C", stream_options={"include_usage": True})
    async with hop("CM", says("M", "hi", streams=True)) as h:
        *chunks, usage, done = (await h.ask(wanted, streams=True)).events()
    assert (usage["choices"], usage["usage"]["total_tokens"], done) == ([], 18, "[DONE]")
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
@pytest.mark.parametrize("pair", ["CR", "CM", "CG"])
async def test_usage_is_metered_but_told_to_nobody_who_did_not_ask_e33(
    hop: Any, pair: str, options: Any
) -> None:
    async with hop(pair, says(pair[1], "hi", streams=True)) as h:
        answer = await h.ask(request_of("C", **options), streams=True)
        assert b'"usage"' not in answer.body
        [line] = h.gateway.lines()
        assert (line["in"], line["out"]) == USED


def _delta(**delta: Any) -> bytes:
    return chat_chunk(delta)


def _call_delta(**call: Any) -> bytes:
    return _delta(tool_calls=[call])


_USAGE_CHUNK = chat_chunk(None, usage=CHAT_USED)
_ENDS = (chat_chunk({}, finish="tool_calls"), _USAGE_CHUNK, DONE)
_ROLE = _delta(role="assistant", content="")
_F = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
_G = {"type": "function", "function": {"name": "g", "arguments": "{}"}}
ACCENTS: dict[str, tuple[bytes, ...]] = {
    "E34-chunk-after-usage": (
        _ROLE,
        _call_delta(index=0, id="a", **_F),
        _call_delta(index=1, id="b", **_G),
        *_ENDS[:2],
        chat_chunk(None),
        DONE,
    ),
    "E35-all-repeated": (
        _delta(
            role="assistant",
            tool_calls=[
                {"index": 0, "id": "a", **_F | {"function": {"name": "f", "arguments": "{"}}}
            ],
        ),
        _delta(
            role="assistant",
            tool_calls=[
                {"index": 0, "id": "a", **_F | {"function": {"name": "f", "arguments": "}"}}}
            ],
        ),
        _delta(role="assistant", tool_calls=[{"index": 1, "id": "b", **_G}]),
        *_ENDS,
    ),
    "E36-no-index": (_ROLE, _call_delta(id="a", **_F), _call_delta(id="b", **_G), *_ENDS),
    "E37-one-index-for-all": (
        _ROLE,
        _call_delta(index=0, id="a", **_F),
        _call_delta(index=0, id="b", **_G),
        *_ENDS,
    ),
    "E38-stop-after-calls": (
        _ROLE,
        _call_delta(index=0, id="a", **_F),
        _call_delta(index=1, id="b", **_G),
        chat_chunk({}, finish="stop"),
        *_ENDS[1:],
    ),
}


CALLED_FINISH = {"C": "tool_calls", "R": "completed", "M": "tool_use", "G": "STOP"}


@pytest.mark.parametrize(("client", "case"), crossed(PROTOCOLS, ACCENTS))
async def test_a_compatible_server_s_accent_is_mended(hop: Any, client: str, case: str) -> None:
    body = request_of(client)
    body |= {"stream_options": {"include_usage": True}} if client == "C" else {}
    async with hop(client + "C", stream(*ACCENTS[case])) as h:
        told = await h.hear(body, streams=True)
    assert [(c.id, c.name) for c in told.calls] == [("a", "f"), ("b", "g")]
    assert (told.role or "assistant") in ("assistant", "model") and told.used == USED
    assert told.finish == CALLED_FINISH[client]


async def test_stop_after_calls_is_mended_in_a_whole_answer_e38(hop: Any) -> None:
    async with hop("CC", says("C", Call("f"), finish="stop")) as h:
        assert (await h.hear()).finish == "tool_calls"


@pytest.mark.parametrize("streams", [False, True], ids=["E39-whole", "E39-stream"])
@pytest.mark.parametrize("upstream", ["R", "M"])
async def test_two_choices_are_asked_for_one_by_one(hop: Any, upstream: str, streams: bool) -> None:
    wanted = request_of("C", n=2, stream_options={"include_usage": True})
    wanted |= {} if streams else {"stream_options": None}
    async with hop("C" + upstream, says(upstream, "hi")) as h:
        answer = await h.ask(wanted, streams=streams)
        assert len(h.up.seen) == 2 and "n" not in h.sent
    chunks = [one for one in answer.events() if one != "[DONE]"] if streams else [answer.json()]
    indices = [c["index"] for chunk in chunks for c in chunk["choices"]]
    assert list(dict.fromkeys(indices)) == [0, 1]
    assert chunks[-1]["usage"] | CHAT_USED | {"total_tokens": 36} == chunks[-1]["usage"] | {
        "prompt_tokens": 11,
        "completion_tokens": 7,
    }


STOPPED = ["abcE", "NDdef"], ["abcENDdef"], ["ab", "c", "E", "N", "D", "def"], ["abc", "END"]


@pytest.mark.parametrize("pieces", STOPPED, ids=["E40-" + "|".join(one) for one in STOPPED])
async def test_a_stop_sequence_is_looked_for_by_us(hop: Any, pieces: list[str]) -> None:
    async with hop("CR", says("R", Said(tuple(pieces)), streams=True)) as h:
        told = await h.hear(request_of("C", stop=["END"]), streams=True)
        assert "stop" not in h.sent
    assert (told.text, told.finish) == ("abc", "stop")


async def test_what_only_looks_like_a_stop_sequence_is_text_e40(hop: Any) -> None:
    async with hop("CR", says("R", Said(("abcE", "NE", "N")), streams=True)) as h:
        told = await h.hear(request_of("C", stop=["END"]), streams=True)
    assert (told.text, told.finish) == ("abcENEN", "stop")


async def test_a_stop_sequence_ends_a_whole_answer_e40(hop: Any) -> None:
    async with hop("CR", says("R", "abcENDdef")) as h:
        told = await h.hear(request_of("C", stop=["END"]))
    assert (told.text, told.finish) == ("abc", "stop")


async def test_more_stop_sequences_than_google_takes_are_looked_for_by_us_e41(hop: Any) -> None:
    async with hop("CG", says("G", "one six seven")) as h:
        told = await h.hear(request_of("C", stop=["a1", "b2", "c3", "d4", "e5", "six"]))
        assert h.sent["generationConfig"]["stopSequences"] == ["a1", "b2", "c3", "d4", "e5"]
    assert (told.text, told.finish) == ("one ", "stop")


async def test_the_results_of_functions_find_their_calls_e43(hop: Any) -> None:
    called = {"role": "assistant", "content": None, "function_call": _F["function"]}
    told = [{"role": "function", "name": "f", "content": said} for said in ("one", "two")]
    history = [{"role": "user", "content": "hi"}, called, told[0], called, told[1]]
    async with hop("CM", says("M", "hi")) as h:
        await h.ask({"messages": history, "functions": [{"name": "f", "parameters": {}}]})
        blocks = [block for m in h.sent["messages"][1:] for block in m["content"]]
    uses, results = blocks[::2], blocks[1::2]
    assert [use["id"] for use in uses] == [result["tool_use_id"] for result in results]
    assert uses[0]["id"] != uses[1]["id"] and "two" in str(results[1]["content"])


async def test_who_speaks_of_functions_is_told_of_functions_e43(hop: Any) -> None:
    async with hop("CM", says("M", Call("f", '{"a": 1}'))) as h:
        answer = await h.ask(request_of("C", functions=[{"name": "f", "parameters": {}}]))
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "function_call"
    assert json.loads(choice["message"]["function_call"]["arguments"]) == {"a": 1}


async def test_a_compatible_server_is_told_system_and_not_developer_e44(hop: Any) -> None:
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    async with hop("RC", says("C", "hi")) as h:
        await h.ask({"input": said})
        assert [message["role"] for message in h.sent["messages"]] == ["system", "user"]


async def test_a_temperature_is_clamped_for_claude_e46(hop: Any) -> None:
    async with hop("CM", says("M", "hi"), model="up/claude-sonnet-4-5") as h:
        told = await h.ask(request_of("C", temperature=1.7))
        assert h.sent["temperature"] == 1.0 and warned(told) == ["clamped;field=temperature"]


async def test_a_temperature_is_dropped_for_a_newer_claude_e46(hop: Any) -> None:
    async with hop("CM", says("M", "hi"), model="up/claude-opus-4-8") as h:
        told = await h.ask(request_of("C", temperature=1.7))
        assert "temperature" not in h.sent and warned(told) == ["dropped;field=temperature"]


async def test_a_temperature_is_refused_where_losses_are_e46(hop: Any) -> None:
    async with hop("CM", says("M", "hi"), model="up/claude-opus-4-8") as h:
        told = await h.ask(request_of("C", temperature=1.7), x_bitrouter_strict="1")
        assert h.up.seen == [] and told.status == 400
    error = told.json()["error"]
    assert (error["param"], error["code"]) == ("temperature", "unsupported_parameter")


async def test_a_bias_is_dropped_for_google_e48(hop: Any) -> None:
    async with hop("CG", says("G", "hi")) as h:
        told = await h.ask(request_of("C", logit_bias={"50256": -100}))
        assert "50256" not in str(h.sent) and warned(told) == ["dropped;field=logit_bias"]


async def test_a_claude_that_cannot_be_forced_may_choose_e49(hop: Any) -> None:
    choice = {"type": "function", "function": {"name": "f"}}
    async with hop("CM", says("M", Call("f")), model="up/claude-opus-5-5") as h:
        told = await h.ask(request_of("C", tools=[TOOL], tool_choice=choice))
        assert h.sent["tool_choice"] == {"type": "auto"}
    assert warned(told) == ["forced_tool_choice_unsupported;field=tool_choice"]


@pytest.mark.parametrize("streams", [False, True], ids=["E50-whole", "E50-stream"])
async def test_tools_of_a_newer_gpt_go_to_responses(hop: Any, streams: bool) -> None:
    reply = says("R", Call("f", '{"a": 1}'), streams=streams)
    async with hop("CC", reply, model="openai/gpt-6") as h:
        told = await h.hear(request_of("C", tools=[TOOL]), streams=streams)
        assert h.up.seen[0].path == "/v1/responses" and "input" in h.sent
    assert (told.calls, told.finish) == ([Call("f", '{"a": 1}')], "tool_calls")


async def test_a_newer_gpt_without_tools_stays_in_chat_e50(hop: Any) -> None:
    async with hop("CC", says("C", "hi"), model="openai/gpt-6") as h:
        await h.hear()
        assert h.up.seen[0].path == "/v1/chat/completions"


NO_TOOLS_HERE = {
    "message": "Function tools with reasoning_effort are not supported for gpt-9 in "
    "/v1/chat/completions. Please use /v1/responses instead.",
    "type": "invalid_request_error",
    "param": "reasoning_effort",
    "code": None,
}


@pytest.mark.parametrize("streams", [False, True], ids=["E51-whole", "E51-stream"])
async def test_tools_that_chat_refuses_go_to_responses_from_then_on(
    hop: Any, streams: bool
) -> None:
    refusal, answer = Reply(400, {"error": NO_TOOLS_HERE}), says("R", Call("f"), streams=streams)
    async with hop("CC", refusal, answer, model="openai/gpt-9") as h:
        for _ in range(2):
            told = await h.hear(request_of("C", tools=[TOOL]), streams=streams)
            assert told.calls == [Call("f")]
        paths = [seen.path.removeprefix("/v1/") for seen in h.up.seen]
        assert paths == ["chat/completions", "responses", "responses"]


async def test_a_call_without_words_is_a_call_alone_e54(hop: Any) -> None:
    async with hop("CM", says("M", "hi")) as h:
        await h.ask(chat_after([Call("f"), Call("g", "{}", "call_2")], "4"))
        _, said, results = h.sent["messages"]
    assert [block["type"] for block in said["content"]] == ["tool_use"] * 2
    assert [block["type"] for block in results["content"]] == ["tool_result"] * 2


# E.4: callers of Responses.

FRAME = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


@pytest.mark.parametrize("upstream", ["C", "M", "G"])
async def test_a_text_has_its_whole_frame_e57(hop: Any, upstream: str) -> None:
    async with hop("R" + upstream, says(upstream, "Hello", streams=True)) as h:
        answer = await h.ask(streams=True)
    assert [event["type"] for event in events_by_name(answer)] == FRAME
    assert heard("R", answer).text == "Hello"


async def test_items_follow_each_other_e58(hop: Any) -> None:
    async with hop("RM", says("M", "Well.", *TWO_CALLS, streams=True)) as h:
        answer = await h.ask(streams=True)
    told, last = heard("R", answer), events_by_name(answer)[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["message", *["function_call"] * 2]
    assert [json.loads(call.arguments) for call in told.calls] == [{"a": 1}, {"b": [2]}]
    assert [call.id for call in told.calls] == ["toolu_1", "toolu_2"]


FILTERED = {"C": "content_filter", "M": "refusal", "G": "SAFETY"}


@pytest.mark.parametrize("streams", [False, True], ids=["E60-whole", "E60-stream"])
@pytest.mark.parametrize("upstream", FILTERED)
async def test_a_filtered_answer_is_incomplete(hop: Any, upstream: str, streams: bool) -> None:
    reply = says(upstream, "Well", finish=FILTERED[upstream], streams=streams)
    async with hop("R" + upstream, reply) as h:
        answer = await h.ask(streams=streams)
    last = events_by_name(answer)[-1]["response"] if streams else answer.json()
    assert last["incomplete_details"] == {"reason": "content_filter"}
    assert last["status"] == "incomplete" and heard("R", answer).text == "Well"
    assert not streams or events_by_name(answer)[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize("upstream", ["C", "M", "G"])
async def test_a_stream_that_dies_is_a_failed_response_e61(hop: Any, upstream: str) -> None:
    async with hop("R" + upstream, stream(*begun_of(upstream), None, ending="cut")) as h:
        answer = await h.ask(streams=True)
    assert last_error("R", answer)["code"] == "server_error"
    assert b"response.completed" not in answer.body and b"response.incomplete" not in answer.body


OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


@pytest.mark.parametrize("streams", [False, True], ids=["E62-whole", "E62-stream"])
@pytest.mark.parametrize("client", ["C", "R"])
async def test_openai_s_word_for_overloaded_is_503(hop: Any, client: str, streams: bool) -> None:
    async with hop(client + "M", Reply(529, OVERLOADED)) as h:
        answer = await h.ask(streams=streams)
    error = answer.json()["error"]
    assert answer.status == 503 and "Overloaded" in error["message"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "server_is_overloaded")


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8)).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(8)).decode()


def responses_after(output: Any) -> dict[str, Any]:
    call = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
    told = {"type": "function_call_output", "call_id": "call_1", "output": output}
    return {"input": [{"role": "user", "content": "hi"}, call, told]}


SHOWN = [
    {"type": "input_text", "text": "Look:"},
    {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"},
]


async def test_an_image_in_a_result_follows_it_in_chat_e65(hop: Any) -> None:
    async with hop("RC", says("C", "hi")) as h:
        await h.ask(responses_after(SHOWN))
        _, _, result, shown = h.sent["messages"]
    assert (result["role"], result["tool_call_id"], shown["role"]) == ("tool", "call_1", "user")
    assert "Look:" in str(result["content"])
    [image] = [part for part in shown["content"] if part["type"] == "image_url"]
    assert image["image_url"]["url"] == f"data:image/png;base64,{PNG}"


async def test_an_image_in_a_result_stays_in_it_for_claude_e65(hop: Any) -> None:
    async with hop("RM", says("M", "hi")) as h:
        await h.ask(responses_after(SHOWN))
        [result] = h.sent["messages"][-1]["content"]
    assert [part["type"] for part in result["content"]] == ["text", "image"]
    assert result["content"][1]["source"]["data"] == PNG


INPUTS = ["a", 'say "hi"\n\ttwice', "🦆 \\ back", "é\u2028"]


@pytest.mark.parametrize("text", INPUTS, ids=[f"E66-{n}" for n in range(len(INPUTS))])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("upstream", ["C", "M", "G"])
async def test_a_custom_tool_s_input_is_text_again(
    hop: Any, upstream: str, streams: bool, text: str
) -> None:
    tool = {"type": "custom", "name": "sh", "description": "Runs it."}
    call = Call("sh", json.dumps({"input": text}))
    async with hop("R" + upstream, says(upstream, call, streams=streams)) as h:
        answer = await h.ask(request_of("R", tools=[tool]), streams=streams)
        assert '"input"' in json.dumps(h.sent["tools"]) and "custom" not in h.sent["tools"][0]
    whole = events_by_name(answer)[-1]["response"] if streams else answer.json()
    [item] = whole["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "sh", text)
    deltas = [e.get("delta", "") for e in events_by_name(answer)] if streams else [text]
    assert "".join(deltas) == text


async def test_a_custom_tool_s_history_is_a_function_s_e66(hop: Any) -> None:
    call = {"type": "custom_tool_call", "call_id": "call_1", "name": "sh", "input": "ls"}
    told = {"type": "custom_tool_call_output", "call_id": "call_1", "output": "a b"}
    tool = {"type": "custom", "name": "sh"}
    async with hop("RM", says("M", "hi")) as h:
        await h.ask({"input": [{"role": "user", "content": "hi"}, call, told], "tools": [tool]})
        _, said, result = h.sent["messages"]
    assert said["content"][0]["input"] == {"input": "ls"}
    assert "a b" in str(result["content"][0]["content"])


GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: WORD+"}


async def test_a_grammar_is_told_in_words_and_warned_of_e66(hop: Any) -> None:
    tool = {"type": "custom", "name": "sh", "format": GRAMMAR}
    async with hop("RM", says("M", "hi")) as h:
        answer = await h.ask(request_of("R", tools=[tool]))
        [sent] = h.sent["tools"]
    assert "start: WORD+" in sent["input_schema"]["properties"]["input"]["description"]
    assert warned(answer) == ["grammar_not_enforced;field=tools"]


@pytest.mark.parametrize("streams", [False, True], ids=["E71-whole", "E71-stream"])
@pytest.mark.parametrize("upstream", ["C", "M", "G"])
async def test_usage_has_all_its_parts(hop: Any, upstream: str, streams: bool) -> None:
    async with hop("R" + upstream, says(upstream, "hi", streams=streams)) as h:
        assert (await h.hear(streams=streams)).used == USED  # the reader checks the details


async def test_a_hosted_search_is_claude_s_own_e72(hop: Any) -> None:
    async with hop("RM", says("M", "hi"), model="anthropic/claude-sonnet-4-5") as h:
        await h.ask(request_of("R", tools=[{"type": "web_search"}]))
        [tool] = h.sent["tools"]
    assert tool["name"] == "web_search" and re.fullmatch(r"web_search_20\d{6}", tool["type"])


async def test_a_hosted_tool_that_must_be_used_and_is_not_there_is_named_e72(hop: Any) -> None:
    wanted = {"tools": [{"type": "image_generation"}], "tool_choice": {"type": "image_generation"}}
    async with hop("RM", says("M", "hi")) as h:
        answer = await h.ask(request_of("R", **wanted))
        assert h.up.seen == []
    assert answer.status == 400 and "image_generation" in answer.json()["error"]["message"]


@pytest.mark.parametrize("streams", [False, True], ids=["E73-whole", "E73-stream"])
async def test_reasoning_is_an_item_with_its_state_sealed(hop: Any, streams: bool) -> None:
    wanted = request_of("R", reasoning={"effort": "low", "summary": "auto"})
    reply = says("M", Thought("Hmm."), "hi", streams=streams)
    async with hop("RM", reply, model="up/claude-sonnet-4-6") as h:
        answer = await h.ask(wanted, streams=streams)
        assert h.sent["thinking"] == {"type": "adaptive", "display": "summarized"}
    whole = events_by_name(answer)[-1]["response"] if streams else answer.json()
    assert heard("R", answer).thought == "Hmm."
    assert whole["output"][0]["type"] == "reasoning"
    assert whole["output"][0]["encrypted_content"].startswith("br1.")


# E.5: callers of Messages.

GUARDED = """
[server]
auth = "required"
[keys.bearer]
key = "br-key-of-the-bearer"
[keys.header]
key = "br-key-of-the-header"
"""
BEARER, HEADER = (
    {"authorization": "Bearer br-key-of-the-bearer"},
    {"x_api_key": "br-key-of-the-header"},
)
KEYS_GIVEN: dict[str, tuple[dict[str, str], int, str]] = {
    "E75-bearer": (BEARER, 200, "bearer"),
    "E75-header": (HEADER, 200, "header"),
    "E75-both": (BEARER | HEADER, 200, "header"),
    "E75-both-and-the-header-s-unknown": (BEARER | {"x_api_key": "br-unknown"}, 401, ""),
}


@pytest.mark.parametrize(("given", "status", "who"), KEYS_GIVEN.values(), ids=KEYS_GIVEN)
async def test_the_header_s_key_counts_before_the_bearer_s(
    hop: Any, given: dict[str, str], status: int, who: str
) -> None:
    async with hop("MC", says("C", "hi"), toml=GUARDED) as h:
        assert (await h.ask(**given)).status == status
        assert (h.gateway.lines()[0].get("caller") or "") == who


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21"], ids=["E76-old", "E76-new"])
async def test_a_temperature_is_used_whatever_the_version(hop: Any, version: str) -> None:
    async with hop("MC", says("C", "hi")) as h:
        await h.ask(request_of("M", temperature=0.5), anthropic_version=version)
        assert h.sent["temperature"] == 0.5 and "anthropic-version" not in h.up.seen[0].headers


async def test_a_version_and_a_temperature_reach_claude_as_they_are_e76(hop: Any) -> None:
    async with hop("MM", says("M", "hi"), model="up/claude-sonnet-4-5") as h:
        await h.ask(request_of("M", temperature=0.5), anthropic_version="2026-10-21")
        assert h.sent["temperature"] == 0.5
        assert h.up.seen[0].headers["anthropic-version"] == "2026-10-21"


@pytest.mark.parametrize("upstream", ["C", "R", "G"])
async def test_every_event_is_named_and_usage_stands_twice_e78(hop: Any, upstream: str) -> None:
    async with hop("M" + upstream, says(upstream, "Hello", streams=True)) as h:
        answer = await h.ask(streams=True)
    first, *_, delta, last = events_by_name(answer)
    assert first["type"] == "message_start" and last["type"] == "message_stop"
    assert {"input_tokens", "output_tokens"} <= first["message"]["usage"].keys()
    assert delta["usage"]["output_tokens"] == 7


async def test_usage_that_comes_at_the_end_is_told_at_the_end_e80(hop: Any) -> None:
    used = CHAT_USED | {"prompt_tokens_details": {"cached_tokens": 5}}
    events = [*events_of("C", "hi")[:-2], chat_chunk(None, usage=used), DONE]
    async with hop("MC", stream(*events)) as h:
        *_, delta, _ = events_by_name(await h.ask(streams=True))
    assert delta["usage"]["input_tokens"] == 6 and delta["usage"]["output_tokens"] == 7
    assert delta["usage"]["cache_read_input_tokens"] == 5


HALF = '{"a":'


async def test_broken_arguments_are_an_empty_input_with_a_warning_e82(hop: Any) -> None:
    async with hop("MC", says("C", Call("f", HALF))) as h:
        answer = await h.ask()
    [block] = answer.json()["content"]
    assert block["input"] == {} and [w for w in warned(answer) if "f" in w or "arguments" in w]


async def test_broken_arguments_stream_as_they_are_e82(hop: Any) -> None:
    async with hop("MC", says("C", Call("f", HALF), streams=True)) as h:
        events = events_by_name(await h.ask(streams=True))
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["partial_json"] for delta in deltas) == HALF


@pytest.mark.parametrize(
    "streams",
    [False, True],
    ids=["E83-whole", "E83-stream"],
)
async def test_arguments_that_are_a_list_are_wrapped(hop: Any, streams: bool) -> None:
    async with hop("MC", says("C", Call("f", "[1, 2]"), streams=streams)) as h:
        [call] = (await h.hear(streams=streams)).calls
    assert json.loads(call.arguments) == {"input": [1, 2]}


async def test_a_system_prompt_of_blocks_is_joined_e85(hop: Any) -> None:
    marked = {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}}
    async with hop("MC", says("C", "hi")) as h:
        await h.ask(request_of("M", system=[marked, {"type": "text", "text": "Two."}]))
        assert h.sent["messages"][0] == {"role": "system", "content": "One.\n\nTwo."}


async def test_a_system_prompt_of_blocks_is_left_alone_for_claude_e85(hop: Any) -> None:
    marked = {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}}
    async with hop("MM", says("M", "hi")) as h:
        await h.ask(request_of("M", system=[marked]))
        assert h.sent["system"] == [marked]


def messages_after(**result: Any) -> dict[str, Any]:
    """A Messages conversation in which one call was answered."""
    said = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}
    told = {"type": "tool_result", "tool_use_id": "toolu_1", **result}
    turns = [("user", "hi"), ("assistant", [said]), ("user", [told])]
    return request_of("M") | {"messages": [{"role": r, "content": c} for r, c in turns]}


_TEXTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
RESULTS: dict[str, tuple[dict[str, Any], str]] = {
    "E87-error": ({"content": "no such file", "is_error": True}, "Error: no such file"),
    "E87-list": ({"content": _TEXTS}, "onetwo|one\ntwo|one\n\ntwo"),
    "E87-empty": ({"content": []}, ""),
    "E87-none": ({}, ""),
}


@pytest.mark.parametrize(("result", "wanted"), RESULTS.values(), ids=RESULTS)
async def test_a_result_is_text_in_chat(hop: Any, result: dict[str, Any], wanted: str) -> None:
    async with hop("MC", says("C", "hi")) as h:
        await h.ask(messages_after(**result))
        _, said, told = h.sent["messages"]
    assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert (told["role"], told["tool_call_id"]) == ("tool", "toolu_1")
    assert told["content"] in wanted.split("|")


def image_block(mime: str, data: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": mime, "data": data}}


async def test_images_in_results_come_after_all_results_e88(hop: Any) -> None:
    uses = [{"type": "tool_use", "id": f"toolu_{n}", "name": "f", "input": {}} for n in (1, 2)]
    shown = [image_block("image/png", PNG)]
    told = [{"type": "tool_result", "tool_use_id": u["id"], "content": shown} for u in uses]
    turns = [("user", "hi"), ("assistant", uses), ("user", told)]
    body = request_of("M") | {"messages": [{"role": r, "content": c} for r, c in turns]}
    async with hop("MC", says("C", "hi")) as h:
        await h.ask(body)
        messages = h.sent["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert all(message["content"] for message in messages[2:4])
    assert str(messages[4]["content"]).count(PNG) == 2


PDF = base64.b64encode(b"%PDF-1.7\n").decode()
DOCUMENTS: dict[str, Callable[[Any], Any]] = {
    "C": lambda sent: sent["messages"][0]["content"][0]["file"],
    "R": lambda sent: sent["input"][0]["content"][0],
    "G": lambda sent: sent["contents"][0]["parts"][0]["inlineData"],
}


@pytest.mark.parametrize("upstream", DOCUMENTS)
async def test_a_pdf_travels_e89(hop: Any, upstream: str) -> None:
    source = {"type": "base64", "media_type": "application/pdf", "data": PDF}
    block = {"type": "document", "source": source, "title": "a.pdf"}
    async with hop("M" + upstream, says(upstream, "hi")) as h:
        await h.ask(request_of("M") | {"messages": [{"role": "user", "content": [block]}]})
        found = DOCUMENTS[upstream](h.sent)
    if upstream == "G":
        assert found == {"mimeType": "application/pdf", "data": PDF}
    else:
        assert found["file_data"] == f"data:application/pdf;base64,{PDF}"
        assert found["filename"] == "a.pdf"


async def test_a_plain_document_is_a_text_in_chat_e90(hop: Any) -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "What it says."}
    blocks = [{"type": "document", "source": source}, {"type": "text", "text": "Sum it up."}]
    async with hop("MC", says("C", "hi")) as h:
        await h.ask(request_of("M") | {"messages": [{"role": "user", "content": blocks}]})
        [message] = h.sent["messages"]
    assert [part["type"] for part in message["content"]] == ["text", "text"]
    assert "What it says." in message["content"][0]["text"]


async def test_an_image_at_a_private_address_is_not_fetched_e91(hop: Any) -> None:
    block = {"type": "image", "source": {"type": "url", "url": "https://127.0.0.1/a.png"}}
    async with hop("MG", says("G", "hi"), model="up/gemini-2.0-flash") as h:
        body = request_of("M") | {"messages": [{"role": "user", "content": [block]}]}
        answer = await h.ask(body)
        assert h.up.seen == [] and answer.status == 400
    assert answer.json()["error"]["details"]["error_code"] == "blocked_url"


@pytest.mark.parametrize("upstream", ["C", "R", "G"])
async def test_an_image_is_what_its_bytes_are_e92(hop: Any, upstream: str) -> None:
    blocks = [image_block("image/png", JPEG)]
    async with hop("M" + upstream, says(upstream, "hi")) as h:
        await h.ask(request_of("M") | {"messages": [{"role": "user", "content": blocks}]})
        sent = json.dumps(h.sent)
    assert "image/jpeg" in sent and "image/png" not in sent and JPEG in sent


BUDGETS = {1024: "minimal", 2000: "low", 4096: "low", 10_000: "medium", 20_000: "high"}


@pytest.mark.parametrize("budget", BUDGETS, ids=[f"E93-{n}" for n in BUDGETS])
async def test_a_budget_is_an_effort(hop: Any, budget: int) -> None:
    thinking = {"type": "enabled", "budget_tokens": budget}
    async with hop("MR", says("R", "hi")) as h:
        await h.ask(request_of("M", thinking=thinking) | {"max_tokens": 32_000})
        assert h.sent["reasoning"] == {"effort": BUDGETS[budget], "summary": "auto"}


SIGNATURE = "EqQBCkYIBxgCKkBs+/w=="
THINKING = {"type": "thinking", "thinking": "Hmm.", "signature": SIGNATURE}
REDACTED = {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix/LafPsn4a"}
OMITTED = {"type": "thinking", "thinking": "", "signature": SIGNATURE}


def claude_thinks(*blocks: dict[str, Any], streams: bool) -> Reply:
    """Claude reasons in these blocks, and then calls f."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
    answer = answer_of("M", finish="tool_use") | {"content": [*blocks, use]}
    if not streams:
        return Reply(body=answer)
    begun = {"type": "message_start", "message": answer | {"content": [], "stop_reason": None}}
    events = [named_event(begun)]
    for n, block in enumerate(answer["content"]):
        events += [named_event(event) for event in _streamed_block(n, block)]
    return stream(*events, *events_of("M", "x", finish="tool_use")[-2:])


def _streamed_block(n: int, block: dict[str, Any]) -> list[dict[str, Any]]:
    empty = {key: "" for key in ("thinking", "signature") if key in block}
    events: list[dict[str, Any]] = [
        {"type": "content_block_start", "index": n, "content_block": block | empty}
    ]
    for key in empty:
        delta = {"type": f"{key}_delta", key: block[key]}
        events += (
            [{"type": "content_block_delta", "index": n, "delta": delta}] if block[key] else []
        )
    return [*events, {"type": "content_block_stop", "index": n}]


STATES = {
    "E94-signature": (THINKING,),
    "E95-redacted": (REDACTED,),
    "E95-redacted-after-thinking": (THINKING, REDACTED),
    "E97-omitted": (OMITTED,),
    "E97-omitted-twice": (OMITTED, THINKING),
}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", STATES)
async def test_claude_s_state_survives_a_caller_of_chat(hop: Any, case: str, streams: bool) -> None:
    async with hop("CM", claude_thinks(*STATES[case], streams=streams), model=CLAUDE) as h:
        said = chat_message_of(await h.ask(request_of("C", tools=[TOOL]), streams=streams))
        told = {"role": "tool", "tool_call_id": "toolu_1", "content": "4"}
        h.gateway.app.states = bitrouter.Memory(1, 1, 1.0)  # what we remember is another matter
        await h.ask({"messages": [{"role": "user", "content": "hi"}, said, told], "tools": [TOOL]})
        blocks = h.sent["messages"][1]["content"]
    assert blocks[:-1] == list(STATES[case]) and blocks[-1]["type"] == "tool_use"


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", STATES)
async def test_claude_s_state_survives_a_caller_of_responses(
    hop: Any, case: str, streams: bool
) -> None:
    async with hop("RM", claude_thinks(*STATES[case], streams=streams), model=CLAUDE) as h:
        items = responses_items_of(await h.ask(streams=streams))
        told = {"type": "function_call_output", "call_id": "toolu_1", "output": "4"}
        h.gateway.app.states = bitrouter.Memory(1, 1, 1.0)
        await h.ask({"input": [{"role": "user", "content": "hi"}, *items, told]})
        blocks = h.sent["messages"][1]["content"]
    assert blocks[:-1] == list(STATES[case]) and blocks[-1]["type"] == "tool_use"


@pytest.mark.parametrize("streams", [False, True], ids=["E96-whole", "E96-stream"])
async def test_another_vendor_s_state_is_withheld_from_claude(
    hop: Any, provider: Any, streams: bool
) -> None:
    async with provider(says("R", Thought("Hmm."), Call("f"), streams=streams)) as other:
        toml = provider_toml(other, "R", "other")
        async with hop("MM", says("M", "hi"), model=CLAUDE, toml=toml) as h:
            answer = await h.ask(model="other/gpt-x", streams=streams)
            said = blocks_of(answer)
            assert said[0]["signature"].startswith("br1.")
            result = {"type": "tool_result", "tool_use_id": "call_1", "content": "4"}
            turns = [("user", "hi"), ("assistant", said), ("user", [result])]
            await h.ask(
                request_of("M") | {"messages": [{"role": r, "content": c} for r, c in turns]}
            )
            assert "br1." not in str(h.sent) and "thinking" not in str(h.sent)
            assert h.sent["messages"][1]["content"][-1]["type"] == "tool_use"


@pytest.mark.parametrize("streams", [False, True], ids=["E98-whole", "E98-stream"])
@pytest.mark.parametrize("client", ["C", "R", "G"])
async def test_a_pause_is_gone_on_from(hop: Any, client: str, streams: bool) -> None:
    paused = says("M", "One ", finish="pause_turn", streams=streams)
    async with hop(client + "M", paused, paused, says("M", "two.", streams=streams)) as h:
        told = await h.hear(streams=streams)
        assert len(h.up.seen) == 3
        assert "One" in str(h.sent["messages"][-1])
    assert told.text == "One One two." and told.finish in ("stop", "completed", "STOP")
    if client != "C" or not streams:
        assert told.used == (33, 21)


@pytest.mark.parametrize("streams", [False, True], ids=["E98-whole", "E98-stream"])
async def test_a_model_that_never_stops_pausing_is_asked_five_times_more(
    hop: Any, streams: bool
) -> None:
    async with hop("CM", says("M", "a", finish="pause_turn", streams=streams)) as h:
        told = await h.hear(streams=streams)
        assert len(h.up.seen) == 6
    assert (told.text, told.finish) == ("aaaaaa", "length")


def continues(text: str, token: str, *, streams: bool) -> Reply:
    """Gemini has come to its limit for one request. wire: google-genai 3.6.1, types.Candidate"""
    answer = answer_of("G", text, finish="CONTINUATION")
    answer["candidates"][0]["continuationToken"] = token
    return stream(gemini_event(answer)) if streams else Reply(body=answer)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("client", ["C", "R", "M"])
async def test_a_continuation_of_gemini_s_is_gone_on_from_with_its_token(
    hop: Any, client: str, streams: bool
) -> None:
    first, second = (continues("One ", token, streams=streams) for token in ("dDE=", "dDI="))
    async with hop(client + "G", first, second, says("G", "two.", streams=streams)) as h:
        told = await h.hear(streams=streams)
        sent = [seen.json() for seen in h.up.seen]
    assert told.text == "One One two." and told.finish in ("stop", "completed", "end_turn")
    assert [one.pop("continuationToken", "") for one in sent] == ["", "dDE=", "dDI="]
    assert sent[0] == sent[1] == sent[2]
    if client != "C" or not streams:
        assert told.used == (33, 21)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("client", "word"), [("C", "length"), ("R", "max_output_tokens"), ("M", "max_tokens")]
)
async def test_a_continuation_without_end_or_token_is_a_length_stop(
    hop: Any, client: str, word: str, streams: bool
) -> None:
    for token, times in (("dDE=", 6), ("", 1)):
        async with hop(client + "G", continues("a", token, streams=streams)) as h:
            told = await h.hear(streams=streams)
            assert len(h.up.seen) == times
        assert (told.text, told.finish) == ("a" * times, word)


async def test_nobody_makes_up_a_stop_sequence_e99(hop: Any) -> None:
    for upstream in ("C", "G"):
        async with hop("M" + upstream, says(upstream, "hi")) as h:
            answer = (await h.ask(request_of("M", stop_sequences=["END"]))).json()
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)


async def test_a_stop_sequence_that_we_found_is_told_e99(hop: Any) -> None:
    async with hop("MR", says("R", "abENDcd")) as h:
        answer = (await h.ask(request_of("M", stop_sequences=["END"]))).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")
    assert answer["content"][0]["text"] == "ab"


async def test_a_later_system_message_is_a_reminder_to_an_older_claude_e102(hop: Any) -> None:
    turns = [("system", "A."), ("user", "hi"), ("assistant", "ho"), ("system", "B."), ("user", "x")]
    body = {"messages": [{"role": role, "content": text} for role, text in turns]}
    async with hop("CM", says("M", "hi"), model=CLAUDE) as h:
        await h.ask(body)
        assert "B." not in str(h.sent["system"]) and "A." in str(h.sent["system"])
        assert [message["role"] for message in h.sent["messages"]] == ["user", "assistant", "user"]
        assert "<system-reminder>\nB.\n</system-reminder>" in str(
            h.sent["messages"][2]["content"]
        ).replace("\\n", "\n")


async def test_a_later_system_message_keeps_its_place_at_a_newer_claude_e102(hop: Any) -> None:
    turns = [("user", "hi"), ("system", "B."), ("assistant", "ho"), ("user", "x")]
    body = {"messages": [{"role": role, "content": text} for role, text in turns]}
    async with hop("CM", says("M", "hi"), model="up/claude-opus-4-8") as h:
        await h.ask(body)
        roles = [message["role"] for message in h.sent["messages"]]
    assert roles == ["user", "system", "assistant", "user"]


MISPLACED = {
    "E102-before-a-user": ["user", "system", "user"],
    "E102-after-the-assistant": ["user", "assistant", "system", "user"],
}


@pytest.mark.parametrize("roles", MISPLACED.values(), ids=MISPLACED)
async def test_a_system_message_without_a_place_of_its_own_is_a_reminder(
    hop: Any, roles: list[str]
) -> None:
    body = {"messages": [{"role": role, "content": f"said by {role}"} for role in roles]}
    async with hop("CM", says("M", "hi"), model="up/claude-opus-4-8") as h:
        await h.ask(body)
        assert "system" not in [message["role"] for message in h.sent["messages"]]
        assert "system-reminder" in str(h.sent) and "said by system" in str(h.sent)


async def test_calls_one_at_a_time_are_asked_for_in_chat_e103(hop: Any) -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    async with hop("MC", says("C", "hi")) as h:
        await h.ask(request_of("M", tools=[tool], tool_choice=choice))
        assert h.sent["parallel_tool_calls"] is False and h.sent["tool_choice"] == "auto"


USERS = [
    pytest.param("user-1", id="E105-short"),
    pytest.param("u" * 300, id="E105-long"),
]


@pytest.mark.parametrize("user", USERS)
async def test_a_user_is_known_by_the_same_name_within_bounds(hop: Any, user: str) -> None:
    async with hop("MR", says("R", "hi"), model="openai/gpt-x", name="openai") as h:
        for _ in range(2):
            await h.ask(request_of("M", metadata={"user_id": user}))
        first, second = (seen.json()["safety_identifier"] for seen in h.up.seen)
        await h.ask(request_of("M", metadata={"user_id": user + "2"}))
        assert first == second != h.sent["safety_identifier"]
    assert len(first) <= 128 and (first == user or len(user) > 128)


IN_BAND: dict[str, dict[str, Any]] = {
    "overloaded_error": {
        "message": "Overloaded",
        "type": "service_unavailable_error",
        "code": "server_is_overloaded",
    },
    "api_error": {"message": "Oops", "type": "server_error", "code": None},
}


@pytest.mark.parametrize("kind", IN_BAND, ids=[f"E106-{kind}" for kind in IN_BAND])
async def test_an_error_in_mid_stream_has_its_kind(hop: Any, kind: str) -> None:
    error = b"data: " + json.dumps({"error": IN_BAND[kind]}).encode() + b"\n\n"
    async with hop("MC", stream(*begun_of("C"), None, error)) as h:
        answer = await h.ask(streams=True)
    told = last_error("M", answer)
    assert told["type"] == kind and IN_BAND[kind]["message"] in told["message"]
    assert b"message_stop" not in answer.body


async def test_an_overloaded_openai_is_an_overloaded_claude_e107(hop: Any) -> None:
    error = {"message": "Overloaded", "type": "service_unavailable_error", "code": None}
    async with hop("MC", Reply(503, {"error": error}), model="openai/gpt-x") as h:
        answer = await h.ask()
    assert (answer.status, answer.json()["error"]["type"]) == (529, "overloaded_error")


# E.6: callers of generateContent.

_BINARY = b"\xff\xd8\xff\xfb\xfe\xbf?>" + bytes(range(60))
URL_SAFE = base64.urlsafe_b64encode(_BINARY).decode().rstrip("=")


@pytest.mark.parametrize("spelt", [("inlineData", "mimeType"), ("inline_data", "mime_type")])
async def test_url_safe_base64_is_made_standard_e111(hop: Any, spelt: tuple[str, str]) -> None:
    assert "-" in URL_SAFE and "_" in URL_SAFE
    part = {spelt[0]: {spelt[1]: "image/jpeg", "data": URL_SAFE}}
    async with hop("GC", says("C", "hi")) as h:
        await h.ask({"contents": [{"parts": [part]}]})
        [shown] = h.sent["messages"][0]["content"]
    url = shown["image_url"]["url"]
    assert url == "data:image/jpeg;base64," + base64.b64encode(_BINARY).decode()


@pytest.mark.parametrize("upstream", ["C", "R", "M"])
async def test_the_last_chunk_says_all_that_ends_a_turn_e112(hop: Any, upstream: str) -> None:
    async with hop("G" + upstream, says(upstream, "Hello", streams=True)) as h:
        answer = await h.ask(streams=True)
        assert heard("G", answer).text == "Hello"
    last = answer.events()[-1]
    [candidate] = last["candidates"]
    assert candidate["content"]["parts"] == [{"text": ""}] and candidate["finishReason"] == "STOP"
    assert last["usageMetadata"]["totalTokenCount"] == 18


async def test_a_silent_stream_is_kept_alive_by_bare_lines_e113(hop: Any) -> None:
    begun = begun_of("M")
    rest = events_of("M", Said(("Eins ", "zwei ")))[len(begun) :]
    reply = stream(*begun, None, None, None, *rest, gap_s=0.03)
    async with hop("GM", reply, heartbeat_s=0.02) as h:
        answer = await h.ask(streams=True)
    assert heard("G", answer).text == "Eins zwei "
    assert answer.body.count(b"\r\n\r\n\r\n") >= 1 and answer.body[:1] != b":"


@pytest.mark.parametrize("upstream", ["C", "R", "M"])
async def test_an_array_is_one_json_value_e114(hop: Any, upstream: str) -> None:
    async with hop("G" + upstream, says(upstream, "Hello", Call("f"), streams=True)) as h:
        answer = await h.ask(streams=True, array=True)
    assert answer.headers["content-type"].startswith("application/json")
    parts = [p for chunk in answer.json() for p in chunk["candidates"][0]["content"]["parts"]]
    assert "".join(part.get("text", "") for part in parts) == "Hello"
    assert answer.json()[-1]["usageMetadata"]["totalTokenCount"] == 18


@pytest.mark.parametrize("upstream", ["C", "R", "M"])
async def test_an_array_that_breaks_ends_in_an_error_and_is_json_e114(
    hop: Any, upstream: str
) -> None:
    async with hop("G" + upstream, stream(*begun_of(upstream), None, ending="cut")) as h:
        answer = await h.ask(streams=True, array=True)
    *chunks, last = answer.json()
    assert "Eins " in str(chunks) and last["error"]["code"] >= 500
    assert not any("finishReason" in str(chunk) for chunk in chunks)


@pytest.mark.parametrize("streams", [False, True], ids=["E115-whole", "E115-stream"])
@pytest.mark.parametrize("upstream", ["C", "R", "M"])
async def test_parallel_calls_are_parts_with_objects(
    hop: Any, upstream: str, streams: bool
) -> None:
    async with hop("G" + upstream, says(upstream, *TWO_CALLS, streams=streams)) as h:
        told = await h.hear(streams=streams)
    assert [(call.name, json.loads(call.arguments)) for call in told.calls] == [
        ("f", {"a": 1}),
        ("g", {"b": [2]}),
    ]
    assert [call.id for call in told.calls] == ["toolu_1", "toolu_2"] and told.finish == "STOP"


BLOCKED = {
    "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
    "usageMetadata": {"promptTokenCount": 11, "totalTokenCount": 11},
    "modelVersion": "m",
}
BLOCKED_FINISH = {"C": "content_filter", "R": "content_filter", "M": "refusal"}


@pytest.mark.parametrize("streams", [False, True], ids=["E117-whole", "E117-stream"])
@pytest.mark.parametrize("client", BLOCKED_FINISH)
async def test_a_blocked_prompt_is_a_filtered_answer(hop: Any, client: str, streams: bool) -> None:
    reply = stream(gemini_event(BLOCKED)) if streams else Reply(body=BLOCKED)
    async with hop(client + "G", reply) as h:
        told = await h.hear(streams=streams)
        assert h.gateway.lines()[0]["in"] == 11
    assert (told.finish, told.text) == (BLOCKED_FINISH[client], "")


@pytest.mark.parametrize("streams", [False, True], ids=["E117-whole", "E117-stream"])
async def test_a_blocked_prompt_is_told_to_google_s_caller_verbatim(
    hop: Any, streams: bool
) -> None:
    reply = stream(gemini_event(BLOCKED)) if streams else Reply(body=BLOCKED)
    async with hop("GG", reply) as h:
        answer = await h.ask(streams=streams)
    assert (answer.events() if streams else [answer.json()]) == [BLOCKED]


@pytest.mark.parametrize("client", ["C", "R", "M", "G"])
async def test_an_answer_without_candidates_is_none_e118(
    hop: Any, provider: Any, client: str
) -> None:
    empty = Reply(body={"candidates": [], "usageMetadata": GEMINI_USED})
    async with provider(says("M", "hi"), empty) as other:
        toml = SMART.format() + provider_toml(other, "M", "next")
        async with hop(client + "G", empty, toml=toml, model="smart") as h:
            assert (await h.hear()).text == "hi"
            assert (await h.ask()).status == 502
            assert len(h.up.seen) == len(other.seen) == 2


BOTCHED = answer_of("G", "", finish="MALFORMED_FUNCTION_CALL")
del BOTCHED["candidates"][0]["content"]


def botched(streams: bool) -> Reply:
    return stream(gemini_event(BOTCHED)) if streams else Reply(body=BOTCHED)


NO_RETRIES = "[upstream.retry]\nmax = 0\nbase_ms = 1\n"


@pytest.mark.parametrize("streams", [False, True], ids=["E120-whole", "E120-stream"])
@pytest.mark.parametrize("client", ["C", "R", "M"])
async def test_a_botched_call_is_asked_for_once_more(hop: Any, client: str, streams: bool) -> None:
    good = says("G", Call("f"), streams=streams)
    async with hop(client + "G", botched(streams), good, toml=NO_RETRIES) as h:
        assert [call.name for call in (await h.hear(streams=streams)).calls] == ["f"]
        assert len(h.up.seen) == 2


@pytest.mark.parametrize("streams", [False, True], ids=["E120-whole", "E120-stream"])
@pytest.mark.parametrize("client", ["C", "R", "M"])
async def test_a_call_botched_twice_is_no_answer(hop: Any, client: str, streams: bool) -> None:
    async with hop(client + "G", botched(streams), toml=NO_RETRIES) as h:
        answer = await h.ask(streams=streams)
        assert answer.status == 502 and len(h.up.seen) == 2


@pytest.mark.parametrize("streams", [False, True], ids=["E120-whole", "E120-stream"])
async def test_a_missing_signature_is_the_request_s_fault(hop: Any, streams: bool) -> None:
    answer = BOTCHED | {"candidates": [{"finishReason": "MISSING_THOUGHT_SIGNATURE"}]}
    reply = stream(gemini_event(answer)) if streams else Reply(body=answer)
    async with hop("CG", reply) as h:
        assert (await h.ask(streams=streams)).status == 400


async def test_candidates_are_choices_e126(hop: Any) -> None:
    async with hop("GC", says("C", "hi", n=2)) as h:
        answer = await h.ask(request_of("G", generationConfig={"candidateCount": 2}))
        assert h.sent["n"] == 2
    candidates = answer.json()["candidates"]
    assert [candidate["index"] for candidate in candidates] == [0, 1]
    assert [c["content"]["parts"] for c in candidates] == [[{"text": "hi"}]] * 2


LIMITED = {"error": {"message": "Slow down", "type": "rate_limit_error", "code": None}}


async def test_a_wait_is_told_google_s_way_e128(hop: Any) -> None:
    async with hop("GC", Reply(429, LIMITED, headers={"retry-after": "7"})) as h:
        answer = await h.ask()
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["status"]) == (429, 429, "RESOURCE_EXHAUSTED")
    [info] = [d for d in error["details"] if d["@type"].endswith("google.rpc.RetryInfo")]
    assert info["retryDelay"] == "7s" and answer.headers["retry-after"] == "7"
    assert "Slow down" in error["message"]


# E.7: structured output and schemas.

RICH = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 3},
        "s": {"type": "string", "maxLength": 5, "format": "date"},
        "u": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        "c": {"type": "string", "format": "color"},
    },
    "required": ["n"],
}


def schema_of(client: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request for an answer that follows a schema."""
    match client:
        case "C":
            facts = {"name": "out", "schema": schema, **more}
            return request_of("C", response_format={"type": "json_schema", "json_schema": facts})
        case "R":
            named = {"type": "json_schema", "name": "out", "schema": schema, **more}
            return request_of("R", text={"format": named})
        case "M":
            return request_of(
                "M", output_config={"format": {"type": "json_schema", "schema": schema}}
            )
    config = {"responseMimeType": "application/json", "responseJsonSchema": schema}
    return request_of("G", generationConfig=config)


@pytest.mark.parametrize("client", ["C", "R", "G"])
async def test_a_schema_is_bent_for_claude_e132(hop: Any, client: str) -> None:
    async with hop(client + "M", says("M", "{}"), model=CLAUDE) as h:
        await h.ask(schema_of(client, RICH))
        sent = h.sent["output_config"]["format"]
    assert sent["type"] == "json_schema" and sent["schema"]["additionalProperties"] is False
    fields = sent["schema"]["properties"]
    assert "minimum" not in fields["n"] and "3" in fields["n"]["description"]
    assert "maxLength" not in fields["s"] and "5" in fields["s"]["description"]
    assert fields["s"]["format"] == "date" and "format" not in fields["c"]
    assert "oneOf" not in fields["u"] and len(fields["u"]["anyOf"]) == 2


TREE = {
    "type": "object",
    "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}, "v": {"type": "integer"}},
    "required": ["v"],
}
MANY = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(30)}}


@pytest.mark.parametrize("schema", [TREE, MANY], ids=["E133-recursive", "E134-30-optional"])
async def test_a_schema_that_claude_cannot_have_is_a_tool_s(
    hop: Any, schema: dict[str, Any]
) -> None:
    said = Call("json_output", '{"v": 1}', "toolu_1")
    async with hop("CM", says("M", said), model=CLAUDE) as h:
        answer = await h.ask(schema_of("C", schema))
        [tool] = h.sent["tools"]
        assert h.sent["tool_choice"] == {"type": "tool", "name": tool["name"]}
        assert "output_config" not in h.sent
    told = heard("C", answer)
    assert (json.loads(told.text), told.finish, told.calls) == ({"v": 1}, "stop", [])
    assert any("response_format" in one for one in warned(answer))


LIST = {"type": "array", "items": {"type": "integer"}}


@pytest.mark.parametrize("streams", [False, True], ids=["E135-whole", "E135-stream"])
@pytest.mark.parametrize("client", ["C", "R", "G"])
async def test_a_list_is_wrapped_and_unwrapped(hop: Any, client: str, streams: bool) -> None:
    said = Call("json_output", '{"value": [1, 2]}', "toolu_1")
    reply = says("M", said, streams=streams)
    async with hop(client + "M", reply, model="up/claude-sonnet-4-0") as h:
        told = await h.hear(schema_of(client, LIST), streams=streams)
        [tool] = h.sent["tools"]
        assert tool["input_schema"]["type"] == "object"
        assert tool["input_schema"]["properties"]["value"]["type"] == "array"
    assert json.loads(told.text) == [1, 2] and told.calls == []
    assert told.finish in ("stop", "completed", "STOP")


NESTED = {
    "type": "object",
    "properties": {
        "a": {"$ref": "#/$defs/A", "description": "first"},
        "b": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]},
        "c": {"type": ["string", "null"]},
        "k": {"const": "x"},
    },
    "$defs": {
        "A": {"type": "object", "properties": {"b": {"$ref": "#/$defs/B"}}},
        "B": {"type": "integer"},
    },
    "additionalProperties": False,
}


async def test_references_are_inlined_for_an_older_gemini_e136(hop: Any) -> None:
    async with hop("CG", says("G", "{}"), model="up/gemini-2.0-flash") as h:
        await h.ask(schema_of("C", NESTED))
        schema = h.sent["generationConfig"]["responseSchema"]
    assert "$" not in json.dumps(schema) and "additionalProperties" not in schema
    fields = schema["properties"]
    assert schema["type"] == "OBJECT" and fields["a"]["properties"]["b"]["type"] == "INTEGER"
    assert fields["b"]["type"] == "OBJECT" and fields["b"]["nullable"] is True
    assert fields["c"] == {"type": "STRING", "nullable": True}
    assert fields["k"]["enum"] == ["x"]


async def test_claude_s_way_to_a_schema_is_openai_s_e137(hop: Any) -> None:
    fields = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema = fields | {"additionalProperties": False}
    async with hop("MC", says("C", "{}")) as h:
        await h.ask(schema_of("M", schema))
        wanted = h.sent["response_format"]
    assert wanted["type"] == "json_schema" and wanted["json_schema"]["strict"] is True
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", wanted["json_schema"]["name"])
    assert wanted["json_schema"]["schema"] == schema


async def test_google_s_types_are_written_small_e138(hop: Any) -> None:
    properties = {"a": {"type": "STRING", "nullable": True}, "b": {"type": "INTEGER"}}
    schema = {"type": "OBJECT", "properties": properties, "property_ordering": ["b", "a"]}
    config = {"response_mime_type": "application/json", "response_schema": schema}
    async with hop("GR", says("R", "{}")) as h:
        await h.ask(request_of("G", generationConfig=config))
        wanted = h.sent["text"]["format"]
    assert wanted["type"] == "json_schema" and wanted["schema"]["type"] == "object"
    assert wanted["schema"]["properties"]["b"]["type"] == "integer"
    assert wanted["schema"]["properties"]["a"]["type"] == ["string", "null"]


FENCED = Said(("Here you are:\n```js", 'on\n{"a": "}"', "}\n``", "`\nBye."))


@pytest.mark.parametrize("streams", [False, True], ids=["E139-whole", "E139-stream"])
async def test_json_comes_without_its_fence(hop: Any, streams: bool) -> None:
    wanted = request_of("C", response_format={"type": "json_object"})
    async with hop("CM", says("M", FENCED, streams=streams)) as h:
        told = await h.hear(wanted, streams=streams)
        assert "JSON" in str(h.sent["system"])
    assert json.loads(told.text) == {"a": "}"}


STRICT_TOOLS: dict[str, Callable[[Any], Any]] = {
    "C": lambda sent: sent["tools"][0]["function"],
    "R": lambda sent: sent["tools"][0],
}


@pytest.mark.parametrize("upstream", STRICT_TOOLS, ids=["E141-C", "E141-R"])
async def test_a_strict_tool_is_as_strict_as_openai_wants(hop: Any, upstream: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    tool = {"name": "f", "strict": True, "input_schema": schema | {"required": ["a"]}}
    reply, name = says(upstream, "hi"), "openai"
    async with hop("M" + upstream, reply, model="openai/gpt-x", name=name) as h:
        answer = await h.ask(request_of("M", tools=[tool]))
        sent = STRICT_TOOLS[upstream](h.sent)
    if sent["strict"]:
        assert sent["parameters"]["additionalProperties"] is False
        assert sorted(sent["parameters"]["required"]) == ["a", "b"]
    else:
        assert any("tools" in one for one in warned(answer))


# E.8: errors, limits, lifecycle.


@pytest.mark.parametrize("pair", [pair for pair in CROSS if pair[1] in "CM"])
async def test_a_finished_stream_without_its_end_mark_is_finished_e149(hop: Any, pair: str) -> None:
    async with hop(pair, stream(*events_of(pair[1], "Hello")[:-1])) as h:
        assert (await h.hear(streams=True)).text == "Hello"
        [line] = h.gateway.lines()
    assert (line["in"], line["out"]) == USED and "error" not in line


NEST: Any = "x"
for _ in range(10_000):
    NEST = [NEST]
CONTENT_FIELD = {"C": "messages", "R": "input", "M": "messages", "G": "contents"}
MISSHAPEN: dict[str, Any] = {
    "E151-null": None,
    "E151-number": 5,
    "E151-empty": [],
    "E151-list-of-numbers": [5],
    "E151-no-such-role": [{"role": "wizard", "content": "x", "parts": 5}],
}


@pytest.mark.parametrize(("pair", "case"), crossed(CROSS, MISSHAPEN))
async def test_a_misshapen_conversation_is_refused_by_name(hop: Any, pair: str, case: str) -> None:
    name = CONTENT_FIELD[pair[0]]
    async with hop(pair, says(pair[1], "hi")) as h:
        answer = await h.ask({"max_tokens": 9, name: MISSHAPEN[case]})
        assert answer.status == 400 and name in answer.json()["error"]["message"]
        assert h.up.seen == []


@pytest.mark.parametrize("pair", CROSS)
async def test_a_conversation_of_ten_thousand_levels_is_refused_e151(hop: Any, pair: str) -> None:
    body = json.dumps({"model": "up/m", CONTENT_FIELD[pair[0]]: 5})
    deep = body.replace(": 5", ": " + "[" * 10_000 + "]" * 10_000).encode()
    async with hop(pair, says(pair[1], "hi")) as h:
        answer = await h.caller.post(path_of(pair[0], "up/m"), deep)
        assert answer.status == 400 and h.up.seen == []
        assert (await h.hear()).text == "hi"


async def test_a_call_that_was_never_answered_gets_a_result_e154(hop: Any) -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [chat_call(Call("f"))]}
    body = {"messages": [request_of("C")["messages"][0], said, {"role": "user", "content": "so?"}]}
    async with hop("CM", says("M", "hi")) as h:
        answer = await h.ask(body)
        result, text = h.sent["messages"][2]["content"]
    assert (result["type"], result["tool_use_id"], result["is_error"]) == (
        "tool_result",
        "call_1",
        True,
    )
    assert text == {"type": "text", "text": "so?"} and warned(answer)


TWICE: dict[str, list[Any]] = {
    "C": [TOOL, TOOL],
    "R": [{"type": "function", "name": "f", "parameters": {}}] * 2,
    "M": [{"name": "f", "input_schema": {"type": "object"}}] * 2,
    "G": [{"functionDeclarations": [{"name": "f"}, {"name": "f"}]}],
}


@pytest.mark.parametrize("pair", CROSS)
async def test_a_tool_s_name_is_its_own_e155(hop: Any, pair: str) -> None:
    async with hop(pair, says(pair[1], "hi")) as h:
        answer = await h.ask(request_of(pair[0], tools=TWICE[pair[0]]))
        assert answer.status == 400 and "tools" in str(answer.json()) and h.up.seen == []


ODD_NAME = "ns.tool:x"


@pytest.mark.parametrize("streams", [False, True], ids=["E156-whole", "E156-stream"])
@pytest.mark.parametrize("upstream", ["C", "R", "M"])
async def test_a_tool_s_odd_name_comes_back(hop: Any, upstream: str, streams: bool) -> None:
    declared = {"name": ODD_NAME, "parameters": {"type": "OBJECT", "properties": {}}}
    body = request_of("G", tools=[{"functionDeclarations": [declared]}])
    async with hop("G" + upstream, says(upstream, "hi")) as h:
        await h.ask(body)
        [wire] = re.findall(r'"name": "([^"]*)"', json.dumps(h.sent["tools"]))
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", wire)
        h.up.script[:] = [says(upstream, Call(wire, '{"a": 1}', "c1"), streams=streams)]
        [call] = (await h.hear(body, streams=streams)).calls
        assert (call.name, json.loads(call.arguments)) == (ODD_NAME, {"a": 1})
        history = [
            *body["contents"],
            {"role": "model", "parts": [{"functionCall": {"name": ODD_NAME, "args": {}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": ODD_NAME, "response": {}}}]},
        ]
        await h.ask(body | {"contents": history})
        assert ODD_NAME not in str(h.sent) and json.dumps(h.sent).count(f'"{wire}"') == 2


LONG_ID = "call_" + "x" * 85


async def test_a_long_call_id_is_cut_the_same_everywhere_e157(hop: Any) -> None:
    async with hop("CR", says("R", "hi"), model="openai/gpt-x", name="openai") as h:
        await h.ask(chat_after([Call("f", "{}", LONG_ID)], "4"))
        _, call, result = h.sent["input"]
    assert call["call_id"] == result["call_id"] != LONG_ID and len(call["call_id"]) <= 64


SPENT: dict[str, tuple[int, Any]] = {
    "C": (429, {"error": {"message": "No credit", "type": "x", "code": "insufficient_quota"}}),
    "M": (400, {"type": "error", "error": {"type": "billing_error", "message": "No credit"}}),
    "R": (402, {"error": {"message": "No credit", "type": "billing_error", "code": None}}),
}
OUT_OF_CREDIT = {"C": "billing_error", "R": "billing_error", "M": "billing_error"}


@pytest.mark.parametrize("pair", [pair for pair in CROSS if pair[1] in SPENT])
async def test_out_of_credit_is_not_worth_a_retry_e158(hop: Any, pair: str) -> None:
    status, body = SPENT[pair[1]]
    async with hop(pair, Reply(status, body)) as h:
        answer = await h.ask()
    error = answer.json()["error"]
    assert answer.status in (402, status) and answer.headers["x-should-retry"] == "false"
    assert error.get("type") == OUT_OF_CREDIT.get(pair[0]) and "No credit" in error["message"]


async def test_a_conversation_of_2000_messages_takes_less_than_a_second_e164(hop: Any) -> None:
    turns = [
        {"role": r, "content": f"message {n}"} for n in range(1000) for r in ("user", "assistant")
    ]
    async with hop("CM", says("M", "hi")) as h:
        started_at = time.monotonic()
        assert (await h.hear({"messages": [*turns, turns[0]]})).text == "hi"
        assert time.monotonic() - started_at < 1 and len(h.sent["messages"]) == 2001


@pytest.mark.parametrize(
    "name", ["a\r\nx-evil: 1", "a\nb", "é\x00", "x" * 3000], ids=[f"E165-{n}" for n in range(4)]
)
async def test_no_field_name_forges_a_header(hop: Any, name: str) -> None:
    async with hop("CM", says("M", "hi")) as h:
        answer = await h.ask(request_of("C") | {name: 1})
    assert "x-evil" not in answer.headers and answer.status == 200
    told = answer.headers["x-bitrouter-warnings"]
    assert told.isascii() and told.isprintable() and len(told) <= 2048
    assert told.startswith("dropped;field=")
