"""One request to one target in another protocol: what goes up, what comes back, what is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from support import Answer, Reply
from test_acceptance import (
    CLAUDE,
    CROSS,
    PAIRS,
    PROTOCOLS,
    SMART,
    TOOL,
    Call,
    Hop,
    Thought,
    answer_of,
    heard,
    hops,
    path_of,
    provider_toml,
    request_of,
    says,
    warned,
)

import bitrouter


@pytest.fixture
def hop(provider: Any, gateway: Any) -> Callable[..., Any]:
    return hops(provider, gateway)


async def until(found: Callable[[], Any]) -> Any:
    while not (value := found()):  # noqa: ASYNC110  what we wait for has no event
        await asyncio.sleep(0.005)
    return value


def forget(h: Hop) -> None:
    """Let nothing be remembered, so that what travels with the caller shows."""
    h.gateway.app.states = bitrouter.Memory(1, 1, 1.0)


# Envelopes of ours on the way to a target of the caller's own protocol.

STATE = "c3RhdGUgb2YgdGhlIG1vZGVs"


def turn_after(client: str, answer: Answer) -> list[dict[str, Any]]:
    """What a client of a protocol sends back of an answer that called f, and the call's result."""
    body = answer.json()
    match client:
        case "C":
            said = body["choices"][0]["message"]
            ident = said["tool_calls"][0]["id"]
            return [said, {"role": "tool", "tool_call_id": ident, "content": "4"}]
        case "R":
            [call] = [item for item in body["output"] if item["type"] == "function_call"]
            told = {"type": "function_call_output", "call_id": call["call_id"], "output": "4"}
            return [*body["output"], told]
        case "M":
            [call] = [block for block in body["content"] if block["type"] == "tool_use"]
            result = {"type": "tool_result", "tool_use_id": call["id"], "content": "4"}
            said = {"role": "assistant", "content": body["content"]}
            return [said, {"role": "user", "content": [result]}]
    content = body["candidates"][0]["content"]
    [call] = [part["functionCall"] for part in content["parts"] if "functionCall" in part]
    told = {"name": call["name"], "id": call["id"], "response": {"output": "4"}}
    return [content, {"role": "user", "parts": [{"functionResponse": told}]}]


LIST_OF = {"C": "messages", "R": "input", "M": "messages", "G": "contents"}


def after(client: str, answer: Answer, **more: Any) -> dict[str, Any]:
    """A request that goes on from an answer."""
    name, body = LIST_OF[client], request_of(client, **more)
    first = [{"role": "user", "content": "hi"}] if client == "R" else body[name]
    return {**body, name: [*first, *turn_after(client, answer)]}


async def two_turns(
    hop: Any, provider: Any, pair: str, first_model: str, model: str, **more: Any
) -> tuple[Any, Any]:
    """The first turn is had at a provider of another protocol, the second at one of the caller's.
    Returns what the caller sent then, and what arrived."""
    client, other = pair
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
    client, other = pair
    body, sent = await two_turns(hop, provider, pair, MODEL_OF[other], MODEL_OF[client])
    text = json.dumps(sent)
    assert "br1." not in text and STATE not in text and "bitrouter" not in text
    assert sent["foo"] == {"kept": [1]} and "YnIxL" not in text  # how an envelope begins in base64
    before, arrived = body[LIST_OF[client]], sent[LIST_OF[client]]
    assert (arrived[0], arrived[-1]) == (before[0], before[-1])


UNSEALED: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    # a model of one lab, behind two protocols; and where its state must arrive
    "Gemini for a caller of Messages": (
        "MG",
        "gemini-3-pro",
        lambda sent: sent["messages"][1]["content"][0]["signature"],
    ),
    "Claude for a caller of Gemini": (
        "GM",
        "claude-sonnet-4-6",
        lambda sent: sent["contents"][1]["parts"][0]["thoughtSignature"],
    ),
    "GPT for a caller of Messages": (
        "MR",
        "gpt-5-1",
        lambda sent: sent["messages"][1]["content"][0]["signature"],
    ),
}


@pytest.mark.parametrize(("pair", "model", "found"), UNSEALED.values(), ids=UNSEALED)
async def test_a_vendor_s_own_state_is_unsealed_for_it(
    hop: Any, provider: Any, pair: str, model: str, found: Callable[[Any], Any]
) -> None:
    _, sent = await two_turns(hop, provider, pair, model, model)
    print(json.dumps(sent))
    assert found(sent) == STATE and sent["foo"] == {"kept": [1]}


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
        path = path_of(pair[0], "up/m") + ("?" if pair[0] != "G" else "?") + "key=theirs"
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
    if pair[0] == "G":
        [bad] = [d for d in error["details"] if d["@type"].endswith("google.rpc.BadRequest")]
        assert [violation["field"] for violation in bad["fieldViolations"]] == [field]


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
    match upstream:
        case "M":
            error = {"type": "invalid_request_error", "message": text}
            return Reply(400, {"type": "error", "error": error})
        case "G":
            return Reply(
                400, {"error": {"code": 400, "message": text, "status": "INVALID_ARGUMENT"}}
            )
    error = {"message": text, "type": "invalid_request_error", "param": None, "code": None}
    return Reply(400, {"error": error})


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


async def test_a_schema_that_is_refused_is_asked_for_in_words(hop: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    replies = (
        refusal("M", "output_config: `output_config.format` is too complex"),
        says("M", '```{"a": 1}```'),
    )
    async with hop("CM", *replies, model=CLAUDE) as h:
        told = await h.hear(request_of("C", response_format=form))
        assert "output_config" not in h.sent and '"integer"' in str(h.sent["system"])
    assert json.loads(told.text) == {"a": 1}


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
