"""What is asked of models besides answers: counts of tokens, embeddings; and the built-in model."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from support import PROTOCOLS, TOOL, Answer, Reply, after, heard, path_of, request_of, warned

# Counts of tokens.

COUNT_PATHS = {
    "R": "/v1/responses/input_tokens",
    "M": "/v1/messages/count_tokens",
    "G": "/v1beta/models/{model}:countTokens",
}
COUNTED = {
    "R": {"object": "response.input_tokens", "input_tokens": 42},
    "M": {"input_tokens": 42},
    "G": {"totalTokens": 42},
}
ESTIMATED = ["estimated;field=input_tokens"]
TEXT = "x" * 400  # a hundred tokens, by the rule of thumb


async def count(h: Any, **more: Any) -> Answer:
    body = request_of(h.client, TEXT) | ({} if h.client == "G" else {"model": h.model}) | more
    if h.client == "M":
        del body["max_tokens"]
    path = COUNT_PATHS[h.client].format(model=h.model)
    answer = await h.caller.post(path, body)
    assert isinstance(answer, Answer)
    return answer


def counted(client: str, answer: Answer) -> int:
    """The count, if it has its protocol's shape."""
    assert answer.status == 200, answer.body
    body = answer.json()
    if client == "R":
        assert body.pop("object") == "response.input_tokens"
    [(name, value)] = body.items()
    assert name == ("totalTokens" if client == "G" else "input_tokens")
    assert isinstance(value, int)
    return value


NATIVE = {
    # caller and provider -> the provider's name, and where it is asked
    "RR": ("up", "/v1/responses/input_tokens"),
    "MM": ("up", "/v1/messages/count_tokens"),
    "GG": ("up", "/v1beta/models/m:countTokens"),
    "RM": ("up", "/v1/messages/count_tokens"),
    "RG": ("up", "/v1beta/models/m:countTokens"),
    "MG": ("up", "/v1beta/models/m:countTokens"),
    "GM": ("up", "/v1/messages/count_tokens"),
    "MR": ("openai", "/v1/responses/input_tokens"),
    "GR": ("openai", "/v1/responses/input_tokens"),
}


@pytest.mark.parametrize("pair", NATIVE)
async def test_who_can_count_is_asked_to(hop: Any, pair: str) -> None:
    name, path = NATIVE[pair]
    async with hop(pair, Reply(body=COUNTED[pair[1]]), name=name, model=f"{name}/m") as h:
        answer = await count(h)
        [seen] = h.up.seen
    assert (counted(pair[0], answer), seen.path) == (42, path)
    assert not warned(answer) and TEXT in seen.body.decode()
    assert {"max_tokens", "stream", "store", "max_output_tokens"}.isdisjoint(seen.json())


@pytest.mark.parametrize("pair", NATIVE)
async def test_a_count_is_explained_as_it_is_asked_for(hop: Any, pair: str) -> None:
    name, _ = NATIVE[pair]
    async with hop(pair, Reply(body=COUNTED[pair[1]]), name=name, model=f"{name}/m") as h:
        body = request_of(h.client, TEXT) | ({} if h.client == "G" else {"model": h.model})
        answer = await h.caller.post(
            COUNT_PATHS[h.client].format(model=h.model), body, x_bitrouter_explain="1"
        )
        [seen] = h.up.seen
    first = json.loads(answer.headers["x-bitrouter-explain"])["first"]
    assert (first["url"], first["body"]) == (h.up.base + seen.path, seen.json())


async def test_a_count_that_nobody_makes_is_explained_as_an_estimate(hop: Any) -> None:
    async with hop("MC", Reply(body={})) as h:
        body = request_of("M", TEXT) | {"model": h.model}
        answer = await h.caller.post(COUNT_PATHS["M"], body, x_bitrouter_explain="1")
        assert not h.up.seen
    first = json.loads(answer.headers["x-bitrouter-explain"])["first"]
    assert "nothing is sent" in first["error"]


WRITTEN_AS: dict[str, Callable[[Any], Any]] = {
    "M": lambda sent: (sent["system"], sent["tools"][0]["name"]),
    "G": lambda sent: (
        sent["generateContentRequest"]["systemInstruction"]["parts"][0]["text"],
        sent["generateContentRequest"]["tools"][0]["functionDeclarations"][0]["name"],
    ),
}
TOOLS: dict[str, list[dict[str, Any]]] = {
    "R": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    "M": [{"name": "f", "input_schema": {"type": "object"}}],
    "G": [{"functionDeclarations": [{"name": "f"}]}],
}
SYSTEM: dict[str, dict[str, Any]] = {
    "R": {"instructions": "Be brief."},
    "M": {"system": "Be brief."},
    "G": {"systemInstruction": {"parts": [{"text": "Be brief."}]}},
}


@pytest.mark.parametrize("pair", ["RM", "RG", "MG", "GM"])
async def test_all_that_costs_tokens_is_counted(hop: Any, pair: str) -> None:
    async with hop(pair, Reply(body=COUNTED[pair[1]])) as h:
        await count(h, tools=TOOLS[pair[0]], **SYSTEM[pair[0]])
        assert WRITTEN_AS[pair[1]](h.sent) == ("Be brief.", "f")
        assert pair[1] != "G" or h.sent["generateContentRequest"]["model"] == "models/m"


async def test_a_whole_google_request_may_stand_in_the_question(hop: Any) -> None:
    inner = request_of("G", TEXT) | {"model": "models/whatever"} | SYSTEM["G"]
    async with hop("GM", Reply(body=COUNTED["M"])) as h:
        path = COUNT_PATHS["G"].format(model=h.model)
        answer = await h.caller.post(path, {"generateContentRequest": inner})
        assert counted("G", answer) == 42 and h.sent["system"] == "Be brief."
        assert h.sent["model"] == "m" and TEXT in str(h.sent["messages"])


@pytest.mark.parametrize("pair", ["RC", "MC", "GC", "MR", "GR"])
async def test_who_cannot_count_is_not_asked_to(hop: Any, pair: str) -> None:
    async with hop(pair, Reply(500)) as h:
        answer = await count(h)
        assert h.up.seen == []
        [line] = h.gateway.lines()
    assert (counted(pair[0], answer), warned(answer)) == (100, ESTIMATED)
    assert line["warnings"] == "estimated:input_tokens"


FAILURES = {
    "an error": Reply(500),
    "a limit": Reply(429),
    "no such path": Reply(404, {"error": {"message": "Not Found"}}),
    "no such method": Reply(405),
    "our key refused": Reply(401),
    "no JSON": Reply(body=b"<html>"),
    "silence": Reply(hangs=True),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("pair", ["MM", "MG", "RM", "GM", "GG", "RR"])
async def test_a_count_that_fails_is_estimated(hop: Any, pair: str, failure: str) -> None:
    toml = "[upstream]\ntimeouts = {total_s = 0.04}\n" if failure == "silence" else ""
    async with hop(pair, FAILURES[failure], toml=toml) as h:
        answer = await count(h)
    assert (counted(pair[0], answer), warned(answer)) == (100, ESTIMATED)


@pytest.mark.parametrize("pair", ["MG", "RM", "GM"])
async def test_an_answer_without_a_count_is_none(hop: Any, pair: str) -> None:
    async with hop(pair, Reply(body={"hello": "world"})) as h:
        assert (counted(pair[0], answer := await count(h)), warned(answer)) == (100, ESTIMATED)


@pytest.mark.parametrize("pair", ["MM", "MG", "GM"])
async def test_a_prompt_that_is_refused_is_not_estimated(hop: Any, pair: str) -> None:
    error = {"message": "messages.0: no", "type": "invalid_request_error"}
    async with hop(pair, Reply(400, {"type": "error", "error": error})) as h:
        answer = await count(h)
    assert answer.status == 400 and "messages.0: no" in answer.json()["error"]["message"]


@pytest.mark.parametrize("client", COUNT_PATHS)
async def test_the_built_in_model_counts_by_the_rule_of_thumb(hop: Any, client: str) -> None:
    async with hop(client + "C", Reply(), model="echo/echo") as h:
        answer = await count(h)
    assert (counted(client, answer), warned(answer)) == (100, ESTIMATED)


@pytest.mark.parametrize("pair", ["MC", "MG", "RC", "GC", "GM"])
async def test_a_count_of_nothing_readable_is_refused(hop: Any, pair: str) -> None:
    field = {"R": "input", "M": "messages", "G": "contents"}[pair[0]]
    async with hop(pair, Reply()) as h:
        answer = await count(h, **{field: 5})
        assert answer.status == 400 and field in answer.json()["error"]["message"]


# Embeddings, asked for in OpenAI's way of Google.

VECTORS = [[0.5, -0.25], [1.0, 2.0]]
GOOGLE_VECTORS = {"embeddings": [{"values": vector} for vector in VECTORS]}


async def embed(h: Any, **body: Any) -> Any:
    return await h.caller.post("/v1/embeddings", {"model": h.model, **body})


async def test_openai_s_texts_are_a_batch_at_google(hop: Any) -> None:
    async with hop("CG", Reply(body=GOOGLE_VECTORS)) as h:
        answer = await embed(h, input=["one", "two"], dimensions=2)
        [seen] = h.up.seen
    asked = [{"parts": [{"text": text}]} for text in ("one", "two")]
    more = {"model": "models/m", "outputDimensionality": 2}
    assert seen.path == "/v1beta/models/m:batchEmbedContents"
    assert seen.json() == {"requests": [{"content": content, **more} for content in asked]}
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", "m")
    assert [(one["object"], one["index"], one["embedding"]) for one in body["data"]] == [
        ("embedding", 0, VECTORS[0]),
        ("embedding", 1, VECTORS[1]),
    ]
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] >= 1


async def test_embeddings_elsewhere_are_explained_as_they_are_sent(hop: Any) -> None:
    async with hop("CG", Reply(body=GOOGLE_VECTORS)) as h:
        body = {"model": h.model, "input": ["one", "two"]}
        answer = await h.caller.post("/v1/embeddings", body, x_bitrouter_explain="1")
        [seen] = h.up.seen
    first = json.loads(answer.headers["x-bitrouter-explain"])["first"]
    assert (first["url"], first["body"]) == (h.up.base + seen.path, seen.json())


async def test_one_text_is_a_batch_of_one(hop: Any) -> None:
    async with hop("CG", Reply(body={"embeddings": [{"values": VECTORS[0]}]})) as h:
        answer = await embed(h, input="one", encoding_format="float")
        assert [r["content"]["parts"] for r in h.sent["requests"]] == [[{"text": "one"}]]
    assert [one["embedding"] for one in answer.json()["data"]] == [VECTORS[0]]


async def test_vectors_come_in_base64_to_who_asks_for_it(hop: Any) -> None:
    async with hop("CG", Reply(body=GOOGLE_VECTORS)) as h:
        answer = await embed(h, input=["one", "two"], encoding_format="base64")
    raw = [base64.b64decode(one["embedding"], validate=True) for one in answer.json()["data"]]
    assert [array("f", one).tolist() for one in raw] == VECTORS


NO_TEXTS: dict[str, Any] = {
    "tokens": [1, 2, 3],
    "lists of tokens": [[1, 2], [3]],
    "nothing": [],
    "null": None,
    "a number": 5,
    "an object": {"text": "one"},
}


@pytest.mark.parametrize("given", NO_TEXTS.values(), ids=NO_TEXTS)
async def test_google_embeds_texts_alone(hop: Any, given: Any) -> None:
    async with hop("CG", Reply(body=GOOGLE_VECTORS)) as h:
        answer = await embed(h, input=given)
        assert answer.status == 400 and h.up.seen == []
    assert "input" in answer.json()["error"]["param"]


async def test_tokens_pass_to_who_knows_them(hop: Any) -> None:
    async with hop("CC", Reply(body={"data": [], "usage": {"prompt_tokens": 3}})) as h:
        assert (await embed(h, input=[1, 2, 3])).status == 200 and h.sent["input"] == [1, 2, 3]


async def test_what_embedding_used_is_booked(hop: Any) -> None:
    async with hop("CG", Reply(body=GOOGLE_VECTORS)) as h:
        await embed(h, input=["x" * 400, "y" * 40])
        [line] = h.gateway.lines()
        assert (line["in"], line["out"]) == (110, 0)


# Embeddings, asked for in Google's way of OpenAI.

OPENAI_VECTORS: dict[str, Any] = {
    "object": "list",
    "data": [{"object": "embedding", "index": n, "embedding": v} for n, v in enumerate(VECTORS)],
    "model": "m",
    "usage": {"prompt_tokens": 9, "total_tokens": 9},
}


def content(text: str) -> dict[str, Any]:
    return {"content": {"parts": [{"text": text}]}}


async def test_one_content_is_a_text_at_openai(hop: Any) -> None:
    one = OPENAI_VECTORS | {"data": OPENAI_VECTORS["data"][:1]}
    async with hop("GC", Reply(body=one)) as h:
        body = {**content("one"), "outputDimensionality": 2, "taskType": "RETRIEVAL_QUERY"}
        answer = await h.caller.post("/v1beta/models/up/m:embedContent", body)
        [seen] = h.up.seen
        [line] = h.gateway.lines()
    assert seen.path == "/v1/embeddings" and line["in"] == 9
    assert seen.json() == {
        "model": "m",
        "input": ["one"],
        "encoding_format": "float",
        "dimensions": 2,
    }
    assert answer.json()["embedding"] == {"values": VECTORS[0]}


@pytest.mark.parametrize("name", ["outputDimensionality", "output_dimensionality"])
async def test_a_batch_is_a_list_of_texts_at_openai(hop: Any, name: str) -> None:
    body = {"requests": [content(t) | {"model": "models/x", name: 2} for t in ("one", "two")]}
    async with hop("GC", Reply(body=OPENAI_VECTORS)) as h:
        answer = await h.caller.post("/v1beta/models/up/m:batchEmbedContents", body)
        assert (h.sent["input"], h.sent["dimensions"]) == (["one", "two"], 2)
    assert answer.json()["embeddings"] == [{"values": vector} for vector in VECTORS]


async def test_vectors_have_the_order_of_their_texts(hop: Any) -> None:
    """wire: OpenAI's answer numbers its vectors; nothing says that they come in order."""
    shuffled = OPENAI_VECTORS | {"data": OPENAI_VECTORS["data"][::-1]}
    body = {"requests": [content("one"), content("two")]}
    async with hop("GC", Reply(body=shuffled)) as h:
        answer = await h.caller.post("/v1beta/models/up/m:batchEmbedContents", body)
    assert answer.json()["embeddings"] == [{"values": vector} for vector in VECTORS]


@pytest.mark.parametrize("verb", ["embedContent", "batchEmbedContents"])
async def test_a_content_without_text_is_refused(hop: Any, verb: str) -> None:
    async with hop("GC", Reply(body=OPENAI_VECTORS)) as h:
        answer = await h.caller.post(f"/v1beta/models/up/m:{verb}", {"content": {"parts": []}})
        assert answer.status == 400 and h.up.seen == []


@pytest.mark.parametrize("pair", ["CM", "CR", "GM", "GR"])
async def test_who_embeds_nothing_is_not_asked_to(hop: Any, pair: str) -> None:
    path = "/v1/embeddings" if pair[0] == "C" else "/v1beta/models/up/m:embedContent"
    async with hop(pair, Reply()) as h:
        answer = await h.caller.post(path, {"model": "up/m", "input": "one", **content("one")})
        assert answer.status in (400, 404, 501) and h.up.seen == []


@pytest.mark.parametrize(("pair", "status"), [("CG", 500), ("GC", 500), ("CG", 429), ("GC", 429)])
async def test_a_refusal_to_embed_is_told_in_the_caller_s_words(
    hop: Any, pair: str, status: int
) -> None:
    error = {"error": {"message": "No!", "code": status, "status": "X", "type": "y"}}
    path = "/v1/embeddings" if pair[0] == "C" else "/v1beta/models/up/m:embedContent"
    async with hop(pair, Reply(status, error)) as h:
        answer = await h.caller.post(path, {"model": "up/m", "input": "one", **content("one")})
    told = answer.json()["error"]
    assert answer.status == status and "No!" in told["message"]
    assert ("status" in told) is (pair[0] == "G")


VECTORLESS: dict[str, Any] = {
    "no vectors": {"hello": "world"},
    "an empty list": {"data": [], "embeddings": []},
    "too many": {**OPENAI_VECTORS, **GOOGLE_VECTORS},
}


@pytest.mark.parametrize("body", VECTORLESS.values(), ids=VECTORLESS)
@pytest.mark.parametrize("pair", ["CG", "GC"])
async def test_an_answer_without_vectors_is_none(hop: Any, pair: str, body: Any) -> None:
    path = "/v1/embeddings" if pair[0] == "C" else "/v1beta/models/up/m:embedContent"
    async with hop(pair, Reply(body=body)) as h:
        answer = await h.caller.post(path, {"model": "up/m", "input": "one", **content("one")})
    assert answer.status == 502


# The built-in model, in all four protocols.

ECHO = "echo/echo"
WAYS = ["whole", "stream", "array"]
EACH = [(client, way) for client in PROTOCOLS for way in WAYS if way != "array" or client == "G"]


async def echoed(hop: Any, client: str, way: str, body: dict[str, Any]) -> Any:
    async with hop(client + "C", Reply(), model=ECHO) as h:
        answer = await h.ask(body, streams=way != "whole", array=way == "array")
        assert h.up.seen == [] and answer.headers["x-bitrouter-provider"] == "echo"
    if way != "array":
        return heard(client, answer)
    data = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in answer.json())
    return heard(client, Answer(200, {"content-type": "text/event-stream"}, data))


FINISHED = {"C": "stop", "R": "completed", "M": "end_turn", "G": "STOP"}
CALLED = FINISHED | {"C": "tool_calls", "M": "tool_use"}


@pytest.mark.parametrize(("client", "way"), EACH)
async def test_what_was_said_is_repeated(hop: Any, client: str, way: str) -> None:
    text = "Zwölf Enten 🦆 und\nmehr "
    told = await echoed(hop, client, way, request_of(client, text))
    assert (told.text, told.finish, told.calls) == (text, FINISHED[client], [])
    assert told.model == ECHO and told.thought == ""
    assert way == "whole" or len(told.deltas) > 3


TOOLS_OF = TOOLS | {"C": [TOOL]}


@pytest.mark.parametrize(("client", "way"), EACH)
async def test_a_tool_is_called_that_is_asked_for(hop: Any, client: str, way: str) -> None:
    body = request_of(
        client, 'Please call f {"city": "Oslo", "n": [1]} now', tools=TOOLS_OF[client]
    )
    told = await echoed(hop, client, way, body)
    [call] = told.calls
    assert (call.name, json.loads(call.arguments)) == ("f", {"city": "Oslo", "n": [1]})
    assert (told.finish, told.text) == (CALLED[client], "") and call.id


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 3}, "s": {"enum": ["x", "y"]}, "o": {}},
    "required": ["n", "s"],
}
FORMATS: dict[str, dict[str, Any]] = {
    "C": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    },
    "R": {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
    "M": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "G": {
        "generationConfig": {
            "responseMimeType": "application/json",
            "responseJsonSchema": SCHEMA,
        }
    },
}


@pytest.mark.parametrize(("client", "way"), EACH)
async def test_a_schema_is_filled_in(hop: Any, client: str, way: str) -> None:
    told = await echoed(hop, client, way, request_of(client, "hi", **FORMATS[client]))
    assert json.loads(told.text) == {"n": 3, "s": "x"}


REASONING: dict[str, dict[str, Any]] = {
    "C": {"reasoning_effort": "low"},
    "R": {"reasoning": {"effort": "low", "summary": "auto"}},
    "M": {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000},
    "G": {"generationConfig": {"thinkingConfig": {"includeThoughts": True}}},
}


@pytest.mark.parametrize(("client", "way"), EACH)
async def test_who_asks_for_reasoning_sees_some(hop: Any, client: str, way: str) -> None:
    body = request_of(client, "hi") | REASONING[client]
    told = await echoed(hop, client, way, body)
    assert told.text == "hi" and len(told.thought) > 5


@pytest.mark.parametrize("client", PROTOCOLS)
async def test_what_was_reasoned_may_be_sent_back(hop: Any, client: str) -> None:
    body = request_of(client, "call f {}", tools=TOOLS_OF[client]) | REASONING[client]
    async with hop(client + "C", Reply(), model=ECHO) as h:
        answer = await h.ask(body)
        again = after(client, answer, tools=TOOLS_OF[client])
        assert (await h.ask(again | REASONING[client])).status == 200


CUSTOM = {"type": "custom", "name": "sh"}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
async def test_a_custom_tool_gets_text(hop: Any, streams: bool) -> None:
    async with hop("RC", Reply(), model=ECHO) as h:
        answer = await h.ask(request_of("R", "call sh ls -l", tools=[CUSTOM]), streams=streams)
    body = answer.events()[-1]["response"] if streams else answer.json()
    [item] = body["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "sh", "ls -l")


@pytest.mark.parametrize("client", PROTOCOLS)
async def test_an_array_or_stream_of_echo_has_a_line(hop: Any, client: str) -> None:
    async with hop(client + "C", Reply(), model=ECHO) as h:
        await h.ask(request_of(client, "x" * 40), streams=True)
        [line] = h.gateway.lines()
    assert (line["status"], line["in"], line["out"], line["target"]) == (200, 10, 10, "echo/echo")


@pytest.mark.parametrize("client", PROTOCOLS)
async def test_a_conversation_without_a_turn_is_refused(hop: Any, client: str) -> None:
    body = {k: v for k, v in request_of(client).items() if k == "max_tokens"}
    async with hop(client + "C", Reply(), model=ECHO) as h:
        answer = await h.caller.post(path_of(client, ECHO), body | {"model": ECHO})
    assert answer.status == 400 and answer.json()["error"]["message"]
