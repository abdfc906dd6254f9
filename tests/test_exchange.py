"""One request to one target in another protocol: what goes up, what comes back, what is kept."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from support import (
    CLAUDE,
    CROSS,
    LIST_OF,
    PAIRS,
    PROTOCOLS,
    SMART,
    TOOL,
    USED,
    Answer,
    Call,
    Hop,
    Reply,
    Thought,
    after,
    answer_of,
    begun_of,
    blocks_of,
    chat_after,
    chat_chunk,
    chat_message_of,
    events_of,
    gemini_event,
    heard,
    last_error,
    lazy_caller,
    named_event,
    path_of,
    provider_toml,
    pusher,
    request_bytes,
    request_of,
    responses_items_of,
    says,
    stalled,
    stream,
    turn_after,
    until,
    warned,
)

import bitrouter


def forget(h: Hop) -> None:
    """Let nothing be remembered, so that what travels with the caller shows."""
    h.gateway.app.states = bitrouter.Memory(1, 1, 1.0)


# Envelopes of ours on the way to a target of the caller's own protocol.

STATE = "c3RhdGUgb2YgdGhlIG1vZGVs"


async def two_turns(
    hop: Any, provider: Any, pair: str, first_model: str, model: str, **more: Any
) -> tuple[Any, Any]:
    """The first turn is had at a provider of another protocol, the second at one of the caller's.
    Returns what the caller sent then, and what arrived."""
    client, other = pair[0], pair[1]
    async with provider(says(other, Thought("Hmm.", STATE), Call("f"))) as elsewhere:
        toml = provider_toml(elsewhere, other, "elsewhere")
        async with hop(client * 2, says(client, "hi"), model=f"up/{model}", toml=toml) as h:
            answer = await h.ask(model=f"elsewhere/{first_model}")
            forget(h)
            body = after(client, answer, foo={"kept": [1]}, **more)
            assert heard(client, await h.ask(body)).text == "hi"
            return body, h.sent


MODEL_OF = {"C": "some-model", "R": "gpt-5-1", "M": "claude-sonnet-4-6", "G": "gemini-3-pro"}


@pytest.mark.parametrize("pair", CROSS)
async def test_another_vendor_s_state_is_withheld_and_all_else_is_kept(
    hop: Any, provider: Any, pair: str
) -> None:
    client, other = pair[0], pair[1]
    body, sent = await two_turns(hop, provider, pair, MODEL_OF[other], MODEL_OF[client])
    text = json.dumps(sent)
    assert "br1." not in text and STATE not in text and "bitrouter" not in text
    assert sent["foo"] == {"kept": [1]} and "YnIxL" not in text  # how an envelope begins in base64
    assert client == "G" or sent["model"] == MODEL_OF[client]
    before, arrived = body[LIST_OF[client]], sent[LIST_OF[client]]
    assert (arrived[0], arrived[-1]) == (before[0], before[-1])


UNSEALED = {
    # a model of one lab, behind two protocols
    "Gemini for a caller of Messages": ("MG", "gemini-3-pro"),
    "Claude for a caller of Gemini": ("GM", "claude-sonnet-4-6"),
    "GPT for a caller of Messages": ("MR", "gpt-5-1"),
    "GPT for a caller of Gemini": ("GR", "gpt-5-1"),
}


@pytest.mark.parametrize(("pair", "model"), UNSEALED.values(), ids=UNSEALED)
async def test_a_vendor_s_own_state_is_unsealed_for_it(
    hop: Any, provider: Any, pair: str, model: str
) -> None:
    _, sent = await two_turns(hop, provider, pair, model, model)
    assert json.dumps(sent).count(STATE) == 1 and sent["foo"] == {"kept": [1]}


@pytest.mark.parametrize("way", ["MRC", "CMR", "RMG", "GMC", "CGM"])
async def test_state_withheld_from_a_third_vendor_is_told(
    hop: Any, provider: Any, way: str
) -> None:
    client, first, second = way[0], way[1], way[2]
    async with provider(says(first, Thought("Hmm.", STATE), Call("f"))) as elsewhere:
        toml = provider_toml(elsewhere, first, "elsewhere")
        model = f"up/{MODEL_OF[second]}"
        async with hop(client + second, says(second, "hi"), model=model, toml=toml) as h:
            body = after(client, await h.ask(model=f"elsewhere/{MODEL_OF[first]}"))
            forget(h)
            assert "withheld;field=reasoning" in warned(await h.ask(body))
            assert STATE not in str(h.sent) and "br1." not in str(h.sent)


@pytest.mark.parametrize("client", PROTOCOLS)
async def test_a_request_that_only_mentions_an_envelope_keeps_every_byte(
    hop: Any, client: str
) -> None:
    body = request_of(client, 'What is "br1.abc"? And "bitrouter:" or "YnIxL"?', x=[1.50])
    body |= {} if client == "G" else {"model": "m"}
    raw = json.dumps(body, indent=3).encode()
    async with hop(client * 2, says(client, "hi")) as h:
        sent = raw.replace(b'"m"', b'"up/m"')
        await h.caller.post(path_of(client, "up/m"), sent)
        assert h.up.seen[0].body == raw


@pytest.mark.parametrize("garbage", ["br1.", "br1.!!!", "br1.bm90IEpTT04", "br1.W10", "br1.e30"])
async def test_a_broken_envelope_is_withheld(hop: Any, garbage: str) -> None:
    thinking = {"type": "thinking", "thinking": "Hmm.", "signature": garbage}
    said = {"role": "assistant", "content": [thinking, {"type": "text", "text": "ho"}]}
    user = {"role": "user", "content": "hi"}
    for pair in ("MM", "MC", "MR"):
        async with hop(pair, says(pair[1], "hi"), model=CLAUDE) as h:
            await h.ask(request_of("M") | {"messages": [user, said, user]})
            assert "br1." not in str(h.sent) and "ho" in str(h.sent)


# Headers.

THEIRS = {
    "C": {"openai-organization": "org", "openai-beta": "x=1", "x-openai-actor": "a"},
    "R": {"openai-project": "proj", "openai-beta": "responses=v1"},
    "M": {"anthropic-beta": "a-1,b-2", "anthropic-version": "2026-10-21", "anthropic-x": "1"},
    "G": {"x-goog-api-client": "genai/3", "x-goog-user-project": "p"},
}
CREDENTIALS = {
    "authorization": "Bearer theirs",
    "x-api-key": "theirs",
    "x-goog-api-key": "theirs",
    "api-key": "theirs",
    "cookie": "theirs=1",
}


@pytest.mark.parametrize("pair", CROSS)
async def test_a_protocol_s_own_headers_stay_with_it(hop: Any, pair: str) -> None:
    async with hop(pair, says(pair[1], "hi")) as h:
        told = await h.ask(user_agent="SDK/1", traceparent="00-1", **THEIRS[pair[0]])
        [seen] = h.up.seen
    kept = {k: v for k, v in seen.headers.items() if THEIRS[pair[0]].get(k) == v}
    assert not kept and told.status == 200 and not warned(told)
    assert (seen.headers["user-agent"], seen.headers["traceparent"]) == ("SDK/1", "00-1")
    assert (seen.headers.get("anthropic-version") == "2023-06-01") is (pair[1] == "M")


@pytest.mark.parametrize("pair", PAIRS)
async def test_a_caller_s_credentials_reach_nobody(hop: Any, pair: str) -> None:
    async with hop(pair, says(pair[1], "hi")) as h:
        path = path_of(pair[0], "up/m") + "?key=theirs"
        body = request_of(pair[0]) | ({} if pair[0] == "G" else {"model": "up/m"})
        assert (await h.caller.post(path, body, **CREDENTIALS)).status == 200
        [seen] = h.up.seen
    assert "theirs" not in str(seen)
    assert sum("sk-the-key-of-up" in value for value in seen.headers.values()) == 1


@pytest.mark.parametrize("pair", CROSS)
async def test_an_answer_in_another_protocol_says_who_served_it(hop: Any, pair: str) -> None:
    reply = Reply(body=answer_of(pair[1], "hi"), headers={"x-request-id": "r1", "set-cookie": "a"})
    async with hop(pair, reply) as h:
        told = (await h.ask()).headers
    assert (told["x-bitrouter-provider"], told["x-bitrouter-model"]) == ("up", "m")
    assert told["x-request-id"] == "r1" and "set-cookie" not in told


# Losses.


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
async def test_losses_are_told_in_the_answer_s_head_and_the_log(hop: Any, streams: bool) -> None:
    body = request_of("C", seed=1, logit_bias={"1": 1}, foo=1)
    async with hop("CM", says("M", "hi", streams=streams)) as h:
        told = await h.ask(body, streams=streams)
        assert warned(told) == [
            "dropped;field=seed",
            "dropped;field=logit_bias",
            "dropped;field=foo",
        ]
        [line] = h.gateway.lines()
        assert line["warnings"] == "dropped:seed,dropped:logit_bias,dropped:foo"


@pytest.mark.parametrize("pair", PAIRS)
async def test_nothing_is_warned_of_when_nothing_is_lost(hop: Any, pair: str) -> None:
    async with hop(pair, says(pair[1], "hi")) as h:
        assert warned(await h.ask()) == []


LOSSES: dict[str, tuple[str, dict[str, Any], str]] = {
    "C": ("CM", {"seed": 1}, "seed"),
    "R": ("RM", {"text": {"verbosity": "low"}}, "verbosity"),
    "M": ("MC", {"top_k": 5}, "top_k"),
    "G": ("GM", {"generationConfig": {"seed": 1}}, "seed"),
}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("pair", "more", "field"), LOSSES.values(), ids=LOSSES)
async def test_who_is_strict_is_refused_in_the_words_of_the_protocol(
    hop: Any, pair: str, more: dict[str, Any], field: str, streams: bool
) -> None:
    async with hop(pair, says(pair[1], "hi")) as h:
        answer = await h.ask(request_of(pair[0], **more), streams=streams, x_bitrouter_strict="1")
        assert answer.status == 400 and h.up.seen == []
    error = answer.json()["error"]
    assert field in error["message"]
    if pair[0] in "CR":
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")


async def test_who_is_strict_is_told_the_field_google_s_way(hop: Any) -> None:
    body = request_of("G", generationConfig={"seed": 1})
    async with hop("GM", says("M", "hi")) as h:
        error = (await h.ask(body, x_bitrouter_strict="1")).json()["error"]
    [bad] = [d for d in error["details"] if d["@type"].endswith("google.rpc.BadRequest")]
    assert [violation["field"] for violation in bad["fieldViolations"]] == ["seed"]


HARMLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "a cache key": ("CM", {"prompt_cache_key": "k"}),
    "a safety setting": ("GC", {"safetySettings": [{"category": "X", "threshold": "Y"}]}),
    "json mode": ("CM", {"response_format": {"type": "json_object"}}),
    "two choices": ("CM", {"n": 2}),
}


@pytest.mark.parametrize(("pair", "more"), HARMLESS.values(), ids=HARMLESS)
async def test_who_is_strict_may_lose_what_the_answer_does_not_depend_on(
    hop: Any, pair: str, more: dict[str, Any]
) -> None:
    async with hop(pair, says(pair[1], "hi")) as h:
        answer = await h.ask(request_of(pair[0], **more), x_bitrouter_strict="1")
        assert answer.status == 200


async def test_a_chain_goes_on_to_a_target_that_loses_nothing(hop: Any, provider: Any) -> None:
    async with provider(says("C", "from next")) as other:
        toml = SMART.format() + provider_toml(other, "C", "next")
        async with hop("CM", says("M", "hi"), toml=toml, model="smart") as h:
            told = await h.hear(request_of("C", seed=1), x_bitrouter_strict="1")
            assert told.text == "from next" and h.up.seen == []


async def test_a_header_of_warnings_has_its_bound(hop: Any) -> None:
    body = request_of("C") | {f"field_{n:04}": 1 for n in range(500)}
    async with hop("CM", says("M", "hi")) as h:
        told = (await h.ask(body)).headers["x-bitrouter-warnings"]
    assert 1000 < len(told) <= 2048


# What a model refuses is learned.


def refusal(upstream: str, text: str) -> Reply:
    error: dict[str, Any] = {"message": text, "type": "invalid_request_error"}
    error |= {"code": 400, "status": "INVALID_ARGUMENT"} if upstream == "G" else {}
    return Reply(400, {"type": "error", "error": error})


LEARNED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    # pair, what is asked for, what the model says to it, the field that goes
    "temperature": ("MC", {"temperature": 0.5}, "Unsupported value: 'temperature'", "temperature"),
    "service_tier": (
        "CR",
        {"service_tier": "flex"},
        "Unknown parameter: 'service_tier'.",
        "service_tier",
    ),
    "metadata": ("CM", {"user": "u"}, "`metadata.user_id`: not allowed", "metadata"),
    "effort": (
        "MC",
        {"output_config": {"effort": "low"}},
        "Unrecognized: `reasoning_effort`",
        "reasoning_effort",
    ),
}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("pair", "more", "text", "field"), LEARNED.values(), ids=LEARNED)
async def test_a_field_that_a_model_refuses_is_left_out_from_then_on(
    hop: Any, pair: str, more: dict[str, Any], text: str, field: str, streams: bool
) -> None:
    good = says(pair[1], "hi", streams=streams)
    async with hop(pair, refusal(pair[1], text), good) as h:
        for _ in range(2):
            answer = await h.ask(request_of(pair[0], **more), streams=streams)
            assert heard(pair[0], answer).text == "hi"
            assert any(one.endswith(f"field={field}") for one in warned(answer))
        assert [field in seen.json() for seen in h.up.seen] == [True, False, False]


async def test_what_one_model_refuses_another_may_take(hop: Any) -> None:
    text, body = "Unsupported value: 'temperature'", request_of("M", temperature=0.5)
    async with hop("MC", refusal("C", text), says("C", "hi")) as h:
        await h.ask(body)
        await h.ask(body, model="up/other")
        assert ["temperature" in seen.json() for seen in h.up.seen] == [True, False, True]


@pytest.mark.parametrize(
    ("first", "second"),
    [("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")],
)
async def test_the_other_name_of_the_limit_is_tried(hop: Any, first: str, second: str) -> None:
    text = f"Unsupported parameter: '{first}' is not supported. Use '{second}' instead."
    model = "up/gpt-5-1" if first == "max_completion_tokens" else "up/m"
    async with hop("MC", refusal("C", text), says("C", "hi"), model=model) as h:
        for _ in range(2):
            assert (await h.hear()).text == "hi"
        sent = [seen.json() for seen in h.up.seen]
        assert [first in one for one in sent] == [True, False, False]
        assert [one.get(second) for one in sent] == [None, 64, 64]


REFUSED_SCHEMAS = {
    "unknown": "Unknown field `output_config`: Extra inputs are not permitted",
    "too complex": "output_config.format.schema: Schema is too complex.",
    "too large": "The compiled grammar is too large; simplify your schema.",
}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("text", REFUSED_SCHEMAS.values(), ids=REFUSED_SCHEMAS)
async def test_a_schema_that_is_refused_is_a_tool_s(hop: Any, text: str, streams: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    good = says("M", Call("json_output", '{"a": 1}', "toolu_1"), streams=streams)
    async with hop("CM", refusal("M", text), good, model=CLAUDE) as h:
        for _ in range(2):
            told = await h.hear(request_of("C", response_format=form), streams=streams)
            assert (json.loads(told.text), told.finish) == ({"a": 1}, "stop")
        assert ["output_config" in seen.json() for seen in h.up.seen] == [True, False, False]
        assert h.sent["tools"][0]["input_schema"]["properties"] == schema["properties"]


NOT_OURS = {
    "no field named": "Something is wrong with your request",
    "the model": "'model' is not known to us; see 'messages'",
    "an odd field": "`messages.0.content` must not be empty",
}


@pytest.mark.parametrize("text", NOT_OURS.values(), ids=NOT_OURS)
async def test_a_refusal_of_what_the_caller_said_is_the_answer(hop: Any, text: str) -> None:
    async with hop("MC", refusal("C", text)) as h:
        answer = await h.ask()
        assert answer.status == 400 and len(h.up.seen) == 1
    assert text in answer.json()["error"]["message"]


async def test_a_field_that_is_refused_again_is_the_answer(hop: Any) -> None:
    async with hop("MC", refusal("C", "Unsupported: 'temperature'")) as h:
        answer = await h.ask(request_of("M", temperature=0.5))
        assert answer.status == 400 and len(h.up.seen) == 2


async def test_a_caller_s_own_field_in_its_own_protocol_is_not_taken_away(hop: Any) -> None:
    async with hop("CC", refusal("C", "Unsupported value: 'temperature'")) as h:
        answer = await h.ask(request_of("C", temperature=0.5))
        assert answer.status == 400 and len(h.up.seen) == 1


async def test_reasoning_that_is_bound_elsewhere_is_left_out(hop: Any) -> None:
    thinks = says("M", Thought("Hmm.", STATE), Call("f", "{}", "toolu_1"))
    bound = refusal(
        "M", "messages.1: thinking block signature is bound to a different conversation"
    )
    async with hop("CM", thinks, bound, says("M", "hi"), model=CLAUDE) as h:
        answer = await h.ask(request_of("C", tools=[TOOL]))
        told = await h.hear(after("C", answer, tools=[TOOL]))
        first, second = (seen.json() for seen in h.up.seen[1:])
    assert STATE in str(first) and STATE not in str(second) and told.text == "hi"
    assert "'tool_use'" in str(second)


# Several choices from a target that makes one at a time.


def choice_texts(answer: Answer, *, streams: bool) -> list[str]:
    texts: dict[int, str] = {}
    for chunk in answer.events()[:-1] if streams else [answer.json()]:
        for choice in chunk["choices"]:
            said = choice["delta" if streams else "message"].get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + said
    return [texts[n] for n in sorted(texts)]


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("upstream", ["R", "M"])
async def test_choices_are_asked_for_at_once_and_told_together(
    hop: Any, upstream: str, streams: bool
) -> None:
    replies = [says(upstream, text) for text in ("a", "b", "c")]
    options = {"stream_options": {"include_usage": True}} if streams else {}
    async with hop("C" + upstream, *replies) as h:
        answer = await h.ask(request_of("C", n=3, **options), streams=streams)
        assert h.up.connections == 3 and warned(answer) == ["fanned_out;field=n"]
        assert not any("n" in seen.json() or "stream" in seen.json() for seen in h.up.seen)
        [line] = h.gateway.lines()
        assert (line["in"], line["out"]) == (33, 21)
    assert sorted(choice_texts(answer, streams=streams)) == ["a", "b", "c"]
    assert (answer.events()[-2] if streams else answer.json())["usage"]["completion_tokens"] == 21


async def test_no_more_than_eight_choices_are_asked_for(hop: Any) -> None:
    async with hop("CM", says("M", "a")) as h:
        refused = await h.ask(request_of("C", n=9))
        assert (refused.status, refused.json()["error"]["param"], h.up.seen) == (400, "n", [])
        assert len((await h.ask(request_of("C", n=8))).json()["choices"]) == 8 == len(h.up.seen)


async def test_candidates_are_asked_for_one_by_one_too(hop: Any) -> None:
    async with hop("GM", says("M", "a")) as h:
        answer = await h.ask(request_of("G", generationConfig={"candidateCount": 2}))
        assert len(h.up.seen) == 2
    assert [one["index"] for one in answer.json()["candidates"]] == [0, 1]


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
async def test_one_choice_that_fails_fails_them_all(hop: Any, streams: bool) -> None:
    slow = Reply(body=answer_of("M", "a"), after_s=0.05)
    async with hop("CM", slow, Reply(500), slow) as h:
        answer = await h.ask(request_of("C", n=3), streams=streams)
        assert answer.status in (500, 502) and "choices" not in answer.json()
        await h.up.hung_up.wait()  # nobody goes on to ask for the others


async def test_who_hangs_up_ends_all_the_choices(hop: Any) -> None:
    async with hop("CM", Reply(hangs=True)) as h:
        body = request_of("C", n=2) | {"model": h.model}
        h.caller.send(request_bytes("POST", path_of("C", h.model), body))
        await until(lambda: len(h.up.seen) == 2)
        h.caller.writer.transport.abort()
        await h.up.hung_up.wait()


# What we remember for clients: turns behind a response id, and state that clients drop.


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("upstream", ["C", "M", "G"])
async def test_a_response_s_id_stands_for_its_turns(hop: Any, upstream: str, streams: bool) -> None:
    first = request_of("R", "My name is Ada.", instructions="Be brief.")
    async with hop("R" + upstream, says(upstream, "Hello Ada!", streams=streams)) as h:
        told = await h.hear(first, streams=streams)
        await h.ask(request_of("R", "And?", previous_response_id=told.id), streams=streams)
        text = json.dumps(h.sent)
    assert text.index("My name is Ada.") < text.index("Hello Ada!") < text.index("And?")
    assert "previous_response_id" not in text and "resp_" not in text


async def test_turns_add_up_over_several_responses(hop: Any) -> None:
    async with hop("RM", says("M", "a1"), says("M", "a2"), says("M", "a3")) as h:
        ident = (await h.hear(request_of("R", "q1"))).id
        ident = (await h.hear(request_of("R", "q2", previous_response_id=ident))).id
        await h.hear(request_of("R", "q3", previous_response_id=ident))
        turns = [json.dumps(message["content"]) for message in h.sent["messages"]]
    assert [said in turn for said, turn in zip(["q1", "a1", "q2", "a2", "q3"], turns, strict=True)]


async def test_a_call_s_result_may_come_with_the_response_s_id_alone(hop: Any) -> None:
    async with hop("RM", says("M", Call("f", '{"a": 1}', "toolu_1")), says("M", "hi")) as h:
        ident = (await h.hear()).id
        told = {"type": "function_call_output", "call_id": "toolu_1", "output": "4"}
        assert (await h.hear({"input": [told], "previous_response_id": ident})).text == "hi"
        _, said, result = h.sent["messages"]
    assert said["content"][0]["input"] == {"a": 1}
    assert result["content"][0]["tool_use_id"] == "toolu_1"


async def test_instructions_are_not_carried_over_to_the_next_response(hop: Any) -> None:
    """wire: platform.openai.com: with previous_response_id the instructions are not carried."""
    async with hop("RM", says("M", "hi")) as h:
        ident = (await h.hear(request_of("R", instructions="Be brief."))).id
        await h.ask(request_of("R", instructions="Be long.", previous_response_id=ident))
        assert "Be brief." not in str(h.sent) and "Be long." in str(h.sent["system"])


async def test_an_unknown_response_is_refused(hop: Any) -> None:
    async with hop("RM", says("M", "hi")) as h:
        body = request_of("R", previous_response_id="resp_br0123456789abcdef")
        answer = await h.ask(body)
        assert answer.status == 400 and h.up.seen == []
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (
        "previous_response_not_found",
        "previous_response_id",
    )


@pytest.mark.parametrize("upstream", ["C", "M", "G"])
async def test_a_response_of_openai_s_own_is_unknown_elsewhere(hop: Any, upstream: str) -> None:
    async with hop("R" + upstream, says(upstream, "hi")) as h:
        answer = await h.ask(request_of("R", previous_response_id="resp_68f0"))
        assert answer.status == 400 and h.up.seen == []
    assert "previous_response_id" in answer.json()["error"]["message"]


async def test_a_response_of_openai_s_own_is_openai_s_to_know(hop: Any) -> None:
    async with hop("RR", says("R", "hi")) as h:
        await h.ask(request_of("R", previous_response_id="resp_68f0"))
        assert h.sent["previous_response_id"] == "resp_68f0"


async def test_a_response_of_ours_can_go_on_at_openai(hop: Any, provider: Any) -> None:
    async with (
        provider(says("M", "Hello Ada!")) as other,
        hop("RR", says("R", "hi"), toml=provider_toml(other, "M", "other")) as h,
    ):
        ident = (await h.hear(request_of("R", "I am Ada."), model="other/m")).id
        assert (await h.hear(request_of("R", "And?", previous_response_id=ident))).text == "hi"
        text = json.dumps(h.sent)
    assert text.index("I am Ada.") < text.index("Hello Ada!") < text.index("And?")
    assert ident not in text


TWO_KEYS = """
[server]
auth = "required"
[keys.ada]
key = "br-key-of-ada-0123"
[keys.bob]
key = "br-key-of-bob-0123"
"""


async def test_nobody_can_go_on_from_another_caller_s_response(hop: Any) -> None:
    ada, bob = ({"x_api_key": f"br-key-of-{name}-0123"} for name in ("ada", "bob"))
    async with hop("RM", says("M", "hi"), toml=TWO_KEYS) as h:
        ident = (await h.hear(**ada)).id
        body = request_of("R", previous_response_id=ident)
        assert (await h.ask(body, **bob)).json()["error"]["code"] == "previous_response_not_found"
        assert (await h.ask(body, **ada)).status == 200


async def test_what_shall_not_be_stored_is_not(hop: Any) -> None:
    async with hop("RM", says("M", "hi")) as h:
        ident = (await h.hear(request_of("R", store=False))).id
        assert (await h.ask(request_of("R", previous_response_id=ident))).status == 400


async def test_a_stream_that_broke_is_nothing_to_go_on_from(hop: Any) -> None:
    async with hop("RM", stream(*begun_of("M"), None, ending="cut")) as h:
        [first, *_] = (await h.ask(streams=True)).events()
        body = request_of("R", previous_response_id=first["response"]["id"])
        assert (await h.ask(body)).status == 400


def stripped(message: dict[str, Any]) -> dict[str, Any]:
    """A message as clients keep it that know OpenAI's own fields alone."""
    calls = [{k: c[k] for k in ("id", "type", "function")} for c in message["tool_calls"]]
    return {"role": "assistant", "content": message.get("content"), "tool_calls": calls}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("upstream", ["R", "M", "G"])
async def test_state_is_remembered_for_clients_that_strip_it(
    hop: Any, upstream: str, streams: bool
) -> None:
    thinks = says(upstream, Thought("Hmm.", STATE), Call("f"), streams=streams)
    model = f"up/{MODEL_OF[upstream]}"
    async with hop("C" + upstream, thinks, says(upstream, "hi"), model=model) as h:
        said = chat_message_of(await h.ask(request_of("C", tools=[TOOL]), streams=streams))
        told = {"role": "tool", "tool_call_id": "call_1", "content": "4"}
        user = {"role": "user", "content": "hi"}
        await h.ask({"messages": [user, stripped(said), told], "tools": [TOOL]})
    assert json.dumps(h.sent).count(STATE) == 1


async def test_state_is_remembered_for_its_caller_alone(hop: Any) -> None:
    ada, bob = ({"x_api_key": f"br-key-of-{name}-0123"} for name in ("ada", "bob"))
    thinks = says("M", Thought("Hmm.", STATE), Call("f"))
    async with hop("CM", thinks, says("M", "hi"), toml=TWO_KEYS, model=CLAUDE) as h:
        said = chat_message_of(await h.ask(request_of("C", tools=[TOOL]), **ada))
        told = {"role": "tool", "tool_call_id": "call_1", "content": "4"}
        body = {"messages": [{"role": "user", "content": "hi"}, stripped(said), told]}
        await h.ask(body, **bob)
        assert STATE not in str(h.sent)
        await h.ask(body, **ada)
        assert STATE in str(h.sent)


async def test_an_older_gemini_call_of_unknown_origin_gets_no_signature(hop: Any) -> None:
    async with hop("CG", says("G", "hi"), model="up/gemini-2.0-flash") as h:
        await h.ask(chat_after([Call("f")], "4"))
        assert "thoughtSignature" not in str(h.sent)


async def test_a_gemini_3_call_of_unknown_origin_gets_the_signature_that_passes(hop: Any) -> None:
    async with hop("CG", says("G", "hi"), model="up/gemini-3-pro") as h:
        await h.ask(chat_after([Call("f"), Call("g", "{}", "call_2")], "4"))
        parts = h.sent["contents"][1]["parts"]
    signatures = [part.get("thoughtSignature") for part in parts]
    assert signatures == ["c2tpcF90aG91Z2h0X3NpZ25hdHVyZV92YWxpZGF0b3I=", None]


# Pauses. (What they come to is in the acceptance cases.)


def searched(*, streams: bool) -> Reply:
    """Claude has searched the web, and pauses."""
    use = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"q": "x"}}
    found = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
    answer = answer_of("M", "Let me see. ", finish="pause_turn")
    answer["content"] += [use, found]
    if not streams:
        return Reply(body=answer)
    *events, delta, stop = events_of("M", "Let me see. ", finish="pause_turn")
    deltas = [{"type": "input_json_delta", "partial_json": json.dumps(use["input"])}]
    for n, (block, grown) in enumerate([(use | {"input": {}}, deltas), (found, [])], 1):
        here = {"index": n}
        events.append(named_event({"type": "content_block_start", **here, "content_block": block}))
        events += [
            named_event({"type": "content_block_delta", **here, "delta": one}) for one in grown
        ]
        events.append(named_event({"type": "content_block_stop", **here}))
    return stream(*events, delta, stop)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("client", ["C", "R", "G"])
async def test_what_was_said_before_a_pause_is_sent_back_verbatim(
    hop: Any, client: str, streams: bool
) -> None:
    replies = searched(streams=streams), says("M", "Found.", streams=streams)
    async with hop(client + "M", *replies) as h:
        told = await h.hear(streams=streams)
        first, second = (seen.json() for seen in h.up.seen)
    assert told.text == "Let me see. Found."
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": searched(streams=False).body["content"]},
    ]
    assert second | {"messages": []} == first | {"messages": []}


async def test_a_pause_in_claude_s_own_protocol_is_the_caller_s_to_go_on_from(hop: Any) -> None:
    async with hop("MM", searched(streams=False)) as h:
        assert (await h.ask()).json()["stop_reason"] == "pause_turn" and len(h.up.seen) == 1


@pytest.mark.parametrize("pair", ["CM", "RM", "GM"])
async def test_a_stream_that_breaks_after_its_pause_ends_in_an_error(hop: Any, pair: str) -> None:
    broken = stream(*begun_of("M"), None, ending="cut")
    async with hop(pair, searched(streams=True), broken) as h:
        answer = await h.ask(streams=True)
        [line] = h.gateway.lines()
    assert last_error(pair[0], answer) and b"me see." in answer.body and b"Eins" in answer.body
    assert line["code"] and not ends(pair[0], answer)


@pytest.mark.parametrize("pair", ["CM", "RM", "GM"])
async def test_a_refusal_after_a_pause_ends_in_an_error(hop: Any, pair: str) -> None:
    async with hop(pair, searched(streams=True), Reply(500)) as h:
        answer = await h.ask(streams=True)
    assert last_error(pair[0], answer) and not ends(pair[0], answer)


def ends(client: str, answer: Answer) -> bool:
    """Whether a stream claims to have ended well."""
    marks = {
        "C": rb'\[DONE\]|"finish_reason":"',
        "R": rb"response\.(completed|incomplete)",
        "M": rb"message_stop|message_delta",
        "G": rb"finishReason",
    }
    return bool(re.search(marks[client], answer.body))


# Whole answers to requests for a stream, and the other way round.


@pytest.mark.parametrize("pair", PAIRS)
async def test_a_whole_answer_to_a_request_for_a_stream_is_streamed(hop: Any, pair: str) -> None:
    reply = says(pair[1], "Hello", Call("f", '{"a": 1}'))
    async with hop(pair, reply) as h:
        answer = await h.ask(streams=True)
        [line] = h.gateway.lines()
    told = heard(pair[0], answer)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (told.text, told.calls[0].name, len(told.calls)) == ("Hello", "f", 1)
    assert json.loads(told.calls[0].arguments) == {"a": 1}
    assert (line["in"], line["out"]) == USED


@pytest.mark.parametrize("upstream", PROTOCOLS)
async def test_a_whole_answer_to_a_request_for_an_array_is_one(hop: Any, upstream: str) -> None:
    async with hop("G" + upstream, says(upstream, "Hello")) as h:
        chunks = (await h.ask(streams=True, array=True)).json()
    texts = [p.get("text", "") for c in chunks for p in c["candidates"][0]["content"]["parts"]]
    assert "".join(texts) == "Hello" and "finishReason" in str(chunks[-1])


@pytest.mark.parametrize("pair", CROSS)
async def test_a_whole_answer_in_pieces_is_streamed(hop: Any, pair: str) -> None:
    raw = json.dumps(answer_of(pair[1], "Hello")).encode()
    reply = Reply(chunks=(raw[:40], None, raw[40:]), framing="chunked")
    async with hop(pair, reply) as h:
        assert (await h.hear(streams=True)).text == "Hello"


@pytest.mark.parametrize("pair", CROSS)
async def test_a_whole_answer_that_is_none_is_no_stream(hop: Any, pair: str) -> None:
    async with hop(pair, Reply(body={"hello": "world"})) as h:
        assert (await h.ask(streams=True)).status == 502


# Callers who go, and providers who do.


@pytest.mark.parametrize("pair", CROSS)
async def test_who_hangs_up_in_mid_translation_ends_the_call_upstream(hop: Any, pair: str) -> None:
    async with hop(pair, stream(*begun_of(pair[1]), ending="hang")) as h:
        body = request_of(pair[0]) | ({} if pair[0] == "G" else {"model": h.model, "stream": True})
        path = path_of(pair[0], h.model, streams=True)
        h.caller.send(request_bytes("POST", path, body))
        await h.caller.head()
        await h.caller.chunk()
        h.caller.writer.transport.abort()
        await h.up.hung_up.wait()
        [line] = await until(h.gateway.lines)
        assert line["status"] == 499


@pytest.mark.parametrize("how", ["cut", "reset", "clean"])
@pytest.mark.parametrize("pair", CROSS)
async def test_a_stream_that_breaks_in_mid_translation_ends_in_the_caller_s_error(
    hop: Any, pair: str, how: str
) -> None:
    async with hop(pair, stream(*begun_of(pair[1]), None, ending=how)) as h:
        answer = await h.ask(streams=True)
        [line] = h.gateway.lines()
    assert last_error(pair[0], answer) and b"Eins" in answer.body
    assert line["code"] == "upstream_disconnected" or how != "clean"
    assert line["code"] and not ends(pair[0], answer)


IN_BAND: dict[str, bytes] = {
    "C": b'data: {"error":{"message":"Overloaded","type":"service_unavailable_error"}}\n\n',
    "R": named_event(
        {"type": "error", "code": "server_is_overloaded", "message": "Overloaded", "param": None}
    ),
    "M": named_event(
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    ),
    "G": gemini_event({"error": {"code": 503, "message": "Overloaded", "status": "UNAVAILABLE"}}),
}
OVERLOADED_WORD = {
    "C": "service_unavailable_error",
    "R": "server_error",
    "M": "overloaded_error",
    "G": "UNAVAILABLE",
}


@pytest.mark.parametrize("pair", CROSS)
async def test_a_provider_s_error_in_mid_stream_is_told_in_the_caller_s_words(
    hop: Any, pair: str
) -> None:
    async with hop(pair, stream(*begun_of(pair[1]), None, IN_BAND[pair[1]])) as h:
        answer = await h.ask(streams=True)
    error = last_error(pair[0], answer)
    assert "Overloaded" in error["message"] and OVERLOADED_WORD[pair[0]] in str(error)
    assert not ends(pair[0], answer)


@pytest.mark.parametrize("pair", CROSS)
async def test_a_provider_s_error_before_the_first_token_has_a_status(hop: Any, pair: str) -> None:
    async with hop(pair, stream(IN_BAND[pair[1]])) as h:
        answer = await h.ask(streams=True)
    assert answer.status == (529 if pair[0] == "M" else 503)
    assert "Overloaded" in answer.json()["error"]["message"]


@pytest.mark.parametrize("pair", CROSS)
async def test_our_key_in_an_error_in_mid_stream_stays_here(hop: Any, pair: str) -> None:
    key = b"sk-the-key-of-up-0123456789"
    error = IN_BAND[pair[1]].replace(b"Overloaded", b"bad key " + key)
    async with hop(pair, stream(*begun_of(pair[1]), None, error)) as h:
        answer = await h.ask(streams=True)
    assert b"bad key" in answer.body and key not in answer.body


# Errors, across protocols.


def error_of(upstream: str, status: int, text: str = "No!") -> Any:
    match upstream:
        case "M":
            kind = {529: "overloaded_error", 429: "rate_limit_error", 413: "request_too_large"}
            error = {"type": kind.get(status, "api_error"), "message": text}
            return {"type": "error", "error": error, "request_id": "req_1"}
        case "G":
            return {"error": {"code": status, "message": text, "status": "X"}}
    return {"error": {"message": text, "type": "x", "param": None, "code": None}}


# fmt: off
STATUSES = [
    # status, OpenAI's type        and Anthropic's, with its status  and Google's
    (400, "invalid_request_error",     400, "invalid_request_error", "INVALID_ARGUMENT"),
    (404, "invalid_request_error",     404, "not_found_error",       "NOT_FOUND"),
    (413, "invalid_request_error",     413, "request_too_large",     "INVALID_ARGUMENT"),
    (429, "rate_limit_error",          429, "rate_limit_error",      "RESOURCE_EXHAUSTED"),
    (500, "server_error",              500, "api_error",             "INTERNAL"),
    (503, "service_unavailable_error", 529, "overloaded_error",      "UNAVAILABLE"),
    (529, "service_unavailable_error", 529, "overloaded_error",      "UNAVAILABLE"),
    (504, "server_error",              504, "timeout_error",         "DEADLINE_EXCEEDED"),
]
# fmt: on


@pytest.mark.parametrize("case", STATUSES, ids=[str(case[0]) for case in STATUSES])
@pytest.mark.parametrize("pair", CROSS)
async def test_a_refusal_has_the_caller_s_status_and_word(
    hop: Any, pair: str, case: tuple[int, str, int, str, str]
) -> None:
    status, openai, anthropic_status, anthropic, google = case
    async with hop(pair, Reply(status, error_of(pair[1], status))) as h:
        answer = await h.ask()
    error, wanted = answer.json()["error"], 503 if status == 529 else status
    assert answer.status == (anthropic_status if pair[0] == "M" else wanted)
    assert "No!" in error["message"] and (pair[0] != "G" or error["code"] == wanted)
    word = {"M": anthropic, "G": google}.get(pair[0], openai)
    assert error["status" if pair[0] == "G" else "type"] == word


TOO_LONG = {
    "C": "This model's maximum context length is 8192 tokens",
    "R": "Your input exceeds the context window of this model",
    "M": "prompt is too long: 212000 tokens > 200000 maximum",
    "G": "The input token count (212000) exceeds the maximum number of tokens allowed (200000)",
}


@pytest.mark.parametrize("pair", CROSS)
async def test_a_prompt_too_long_is_told_as_such(hop: Any, pair: str) -> None:
    text = TOO_LONG[pair[1]]
    body = error_of(pair[1], 400, text)
    body["error"] |= {"code": "context_length_exceeded"} if pair[1] in "CR" else {}
    async with hop(pair, Reply(400, body)) as h:
        answer = await h.ask()
    error = answer.json()["error"]
    assert answer.status == 400 and text in error["message"]
    assert pair[0] not in "CR" or error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("pair", CROSS)
async def test_our_key_refused_is_no_fault_of_the_caller_s(
    hop: Any, pair: str, status: int
) -> None:
    async with hop(pair, Reply(status, error_of(pair[1], status, "bad key sk-…"))) as h:
        answer = await h.ask()
    assert answer.status == 502 and "bad key" not in answer.json()["error"]["message"]
    assert "upstream_authentication_failed" in answer.body.decode().lower()


@pytest.mark.parametrize("pair", CROSS)
async def test_a_wait_is_told_in_both_units(hop: Any, pair: str) -> None:
    reply = Reply(429, error_of(pair[1], 429), headers={"retry-after-ms": "2500"})
    async with hop(pair, reply) as h:
        answer = await h.ask()
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("3", "2500")


# From a target of one protocol to one of another.


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("client", PROTOCOLS)
@pytest.mark.parametrize("way", [a + b for a in PROTOCOLS for b in PROTOCOLS if a != b])
async def test_another_protocol_s_target_stands_in(
    hop: Any, provider: Any, client: str, way: str, streams: bool
) -> None:
    first, second = way[0], way[1]
    async with provider(says(second, "from next", streams=streams)) as other:
        toml = SMART.format() + provider_toml(other, second, "next")
        broken = (
            stream(begun_of(first)[0], ending="cut") if streams and first != "G" else Reply(500)
        )
        async with hop(client + first, broken, toml=toml, model="smart") as h:
            answer = await h.ask(streams=streams)
            assert heard(client, answer).text == "from next"
            assert answer.headers["x-bitrouter-provider"] == "next"
            assert len(h.up.seen) >= 1 and len(other.seen) == 1


async def test_losses_at_a_target_that_failed_are_forgotten(hop: Any, provider: Any) -> None:
    async with provider(says("C", "hi")) as other:
        toml = SMART.format() + provider_toml(other, "C", "next")
        async with hop("CM", Reply(500), toml=toml, model="smart") as h:
            answer = await h.ask(request_of("C", seed=5))
            assert warned(answer) == [] and other.seen[0].json()["seed"] == 5
            [line] = h.gateway.lines("request")
            assert not line.get("warnings")


async def test_nobody_stands_in_after_the_first_token(hop: Any, provider: Any) -> None:
    async with provider(says("C", "hi", streams=True)) as other:
        toml = SMART.format() + provider_toml(other, "C", "next")
        broken = stream(*begun_of("M"), None, ending="cut")
        async with hop("CM", broken, toml=toml, model="smart") as h:
            answer = await h.ask(streams=True)
            assert last_error("C", answer) and other.seen == []


async def test_a_request_that_no_target_can_have_is_said_to_be_so(hop: Any) -> None:
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    async with hop("CM", says("M", "hi")) as h:
        answer = await h.ask({"messages": [{"role": "user", "content": [audio]}]})
        assert answer.status == 400 and h.up.seen == []
    assert answer.json()["error"]["code"] == "unsupported_modality"


# State, on its way through callers of other protocols: what SDKs make of a stream is sent back.


def turn_made(client: str, answer: Answer) -> list[dict[str, Any]]:
    """What a client sends back of an answer, whole or streamed, with the result of its one call."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return turn_after(client, answer)
    match client:
        case "C":
            whole: Any = {"choices": [{"message": chat_message_of(answer)}]}
        case "R":
            whole = {"output": responses_items_of(answer)}
        case "M":
            whole = {"content": blocks_of(answer)}
        case _:
            parts = [p for c in answer.events() for p in c["candidates"][0]["content"]["parts"]]
            whole = {"candidates": [{"content": {"role": "model", "parts": parts}}]}
    return turn_after(client, Answer(200, {}, json.dumps(whole).encode()))


STATE_AT: dict[str, Callable[[Any], Any]] = {
    "R": lambda sent: [
        item["encrypted_content"] for item in sent["input"] if item.get("type") == "reasoning"
    ],
    "M": lambda sent: [
        block["signature"]
        for block in sent["messages"][1]["content"]
        if block["type"] == "thinking"
    ],
    "G": lambda sent: [
        part["thoughtSignature"]
        for part in sent["contents"][1]["parts"]
        if "thoughtSignature" in part
    ],
}


def thinks(upstream: str, text: str, *, streams: bool) -> Reply:
    """A model reasons, and calls f. Gemini's state is on the call itself."""
    if upstream != "G":
        return says(upstream, Thought(text, STATE), Call("f", '{"a": 1}'), streams=streams)
    answer = answer_of("G", *([Thought(text, "")] if text else []), Call("f", '{"a": 1}'))
    answer["candidates"][0]["content"]["parts"][-1]["thoughtSignature"] = STATE
    return stream(gemini_event(answer)) if streams else Reply(body=answer)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("text", ["Hmm.", ""], ids=["visible", "hidden"])
@pytest.mark.parametrize("pair", [pair for pair in CROSS if pair[1] != "C"])
async def test_state_survives_any_caller(hop: Any, pair: str, text: str, streams: bool) -> None:
    client, upstream = pair[0], pair[1]
    replies = thinks(upstream, text, streams=streams), says(upstream, "hi")
    async with hop(pair, *replies, model=f"up/{MODEL_OF[upstream]}") as h:
        answer = await h.ask(streams=streams)
        assert heard(client, answer).thought == text
        forget(h)
        first = {"role": "user", "content": "hi"}
        begun = [first] if client == "R" else request_of(client)[LIST_OF[client]]
        turns = [*begun, *turn_made(client, answer)]
        assert heard(client, await h.ask({**request_of(client), LIST_OF[client]: turns})).text
        assert STATE_AT[upstream](h.sent) == [STATE]
        text = json.dumps(h.sent).replace("\\", "").replace(" ", "")
        assert "br1." not in text and '{"a":1}' in text


# Calls that overlap or break off.


def interleaved() -> Reply:
    """Two calls that grow side by side, as Chat Completions allows."""
    opened = [
        {"index": n, "id": f"c{n}", "type": "function", "function": {"name": name, "arguments": ""}}
        for n, name in enumerate("fg")
    ]
    grown = [(0, '{"a"'), (1, '{"b"'), (0, ": 1}"), (1, ": 2}")]
    deltas = [{"index": n, "function": {"arguments": text}} for n, text in grown]
    calls = [*opened, *deltas]
    begun = chat_chunk({"role": "assistant", "content": None})
    chunks = [chat_chunk({"tool_calls": [one]}) for one in calls]
    return stream(begun, *chunks, *events_of("C", Call("f"))[-3:])


@pytest.mark.parametrize("client", PROTOCOLS)
async def test_calls_that_overlap_are_told_apart(hop: Any, client: str) -> None:
    async with hop(client + "C", interleaved()) as h:
        told = await h.hear(streams=True)
    assert [(call.name, json.loads(call.arguments)) for call in told.calls] == [
        ("f", {"a": 1}),
        ("g", {"b": 2}),
    ]


HALF_CALL = Call("f", '{"a": [1, ')
LENGTH = {"C": "length", "R": "max_output_tokens", "M": "max_tokens", "G": "MAX_TOKENS"}


@pytest.mark.parametrize("upstream", ["C", "R"])
@pytest.mark.parametrize("client", ["C", "R"])
async def test_half_a_call_is_passed_on_where_arguments_are_text(
    hop: Any, client: str, upstream: str
) -> None:
    reply = says(upstream, "Well.", HALF_CALL, finish=LENGTH[upstream])
    async with hop(client + upstream, reply) as h:
        told = await h.hear()
    assert (told.text, told.finish) == ("Well.", LENGTH[client])
    assert [call.arguments for call in told.calls] == ['{"a": [1, ']


@pytest.mark.parametrize("upstream", ["C", "R"])
@pytest.mark.parametrize("client", ["M", "G"])
async def test_half_a_call_is_dropped_where_arguments_are_an_object(
    hop: Any, client: str, upstream: str
) -> None:
    reply = says(upstream, "Well.", HALF_CALL, finish=LENGTH[upstream])
    async with hop(client + upstream, reply) as h:
        answer = await h.ask()
    told = heard(client, answer)
    assert (told.text, told.finish, told.calls) == ("Well.", LENGTH[client], [])
    assert warned(answer)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("pair", CROSS)
async def test_an_answer_that_is_too_long_says_so(hop: Any, pair: str, streams: bool) -> None:
    async with hop(pair, says(pair[1], "We", finish=LENGTH[pair[1]], streams=streams)) as h:
        told = await h.hear(streams=streams)
    assert (told.text, told.finish) == ("We", LENGTH[pair[0]])


async def test_who_speaks_of_functions_hears_of_them_in_a_stream(hop: Any) -> None:
    body = request_of("C", functions=[{"name": "f", "parameters": {}}])
    async with hop("CM", says("M", Call("f", '{"a": 1}'), streams=True)) as h:
        *chunks, _ = (await h.ask(body, streams=True)).events()
    deltas = [chunk["choices"][0]["delta"].get("function_call", {}) for chunk in chunks]
    assert "".join(delta.get("name", "") for delta in deltas) == "f"
    assert json.loads("".join(delta.get("arguments", "") for delta in deltas)) == {"a": 1}
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"
    assert "tool_calls" not in str(chunks)


# Time, and what the answer costs.

IMPATIENT = "[upstream]\ntimeouts = {first_token_s = 0.02, idle_s = 0.02, total_s = 0.02}\n"


@pytest.mark.parametrize("pair", CROSS)
async def test_silence_in_mid_translation_ends_in_the_caller_s_error(hop: Any, pair: str) -> None:
    async with hop(pair, stream(*begun_of(pair[1]), ending="hang"), toml=IMPATIENT) as h:
        answer = await h.ask(streams=True)
        await h.up.hung_up.wait()
    assert "sent nothing for" in last_error(pair[0], answer)["message"]
    assert not ends(pair[0], answer)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("pair", CROSS)
async def test_silence_before_the_first_token_is_a_504(hop: Any, pair: str, streams: bool) -> None:
    async with hop(pair, Reply(hangs=True), toml=IMPATIENT) as h:
        assert (await h.ask(streams=streams)).status == 504


@pytest.mark.parametrize("ending", ["cut", "reset"])
@pytest.mark.parametrize("pair", CROSS)
async def test_how_a_finished_stream_s_connection_ends_is_no_matter(
    hop: Any, pair: str, ending: str
) -> None:
    events = events_of(pair[1], "Hello")
    finished = events if pair[1] in "RG" else events[:-1]
    async with hop(pair, stream(*finished, None, ending=ending)) as h:
        assert (await h.hear(streams=True)).text == "Hello"


@pytest.mark.parametrize("pair", ["CM", "RM", "GM"])
async def test_an_answer_in_another_protocol_has_its_price(hop: Any, pair: str) -> None:
    async with hop(pair, says("M", "hi"), model="anthropic/claude-sonnet-4-5") as h:
        answer = await h.ask()
        [line] = h.gateway.lines()
    assert float(answer.headers["x-bitrouter-cost-usd"]) == line["cost_usd"] == (33 + 105) / 1e6


async def test_openai_is_told_of_json_when_nobody_has_spoken_of_it(hop: Any) -> None:
    wanted = {"responseMimeType": "application/json"}
    async with hop("GC", says("C", "{}")) as h:
        await h.ask(request_of("G", generationConfig=wanted))
        assert h.sent["response_format"] == {"type": "json_object"}
        assert "json" in str(h.sent["messages"]).lower() and len(h.sent["messages"]) == 2
        await h.ask(request_of("G", "Say it in JSON.", generationConfig=wanted))
        assert len(h.sent["messages"]) == 1


async def test_a_caller_that_does_not_read_stalls_a_translation(gateway: Any) -> None:
    loop = asyncio.get_running_loop()
    async with pusher() as push:
        environ = {"OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": f"http://127.0.0.1:{push.port}/v1"}
        async with gateway(environ=environ) as gw, lazy_caller(gw.port) as caller:
            body = request_of("M") | {"model": "openai/m", "stream": True}
            request = request_bytes("POST", path_of("M", ""), body, connection="close")
            await loop.sock_sendall(caller, request)
            assert await stalled(push) < 12_000_000  # with what the kernel holds


# Files that only their vendor has.


def shown_by_id(client: str) -> dict[str, Any]:
    match client:
        case "R":
            part: dict[str, Any] = {"type": "input_image", "file_id": "file-1"}
            return {"input": [{"role": "user", "content": [part]}]}
        case "C":
            part = {"type": "file", "file": {"file_id": "file-1"}}
            return {"messages": [{"role": "user", "content": [part]}]}
    part = {"type": "document", "source": {"type": "file", "file_id": "file-1"}}
    return request_of("M") | {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize("pair", ["RM", "RG", "RC", "CM", "CG", "MC", "MR", "MG"])
async def test_a_file_that_only_its_vendor_has_is_refused(hop: Any, pair: str) -> None:
    async with hop(pair, says(pair[1], "hi")) as h:
        answer = await h.ask(shown_by_id(pair[0]))
        assert answer.status == 400 and h.up.seen == []
    assert "file" in answer.json()["error"]["message"]


async def test_a_file_of_openai_s_is_known_to_both_of_its_protocols(hop: Any) -> None:
    async with hop("CR", says("R", "hi"), model="openai/gpt-x", name="openai") as h:
        assert (await h.ask(shown_by_id("C"))).status == 200 and "file-1" in str(h.sent)
