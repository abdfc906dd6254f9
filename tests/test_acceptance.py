"""The acceptance cases of translation, by number: a caller of one protocol, a provider of another.

A case is named by its pair: CM is a Chat Completions caller in front of a Messages provider. What
comes back is read here by a small reader per protocol, which asserts what the protocol's own SDKs
would stumble over; nothing of the product takes part in the reading.
"""

from __future__ import annotations

import gzip
import json
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from support import (
    DONE,
    Answer,
    Caller,
    FakeProvider,
    Reply,
    chat_chunk,
    named_event,
    request_bytes,
    slices,
    stream,
)

PROTOCOLS = {"C": "chat_completions", "R": "responses", "M": "messages", "G": "generate_content"}
PAIRS = [client + upstream for client in PROTOCOLS for upstream in PROTOCOLS]
CROSS = [pair for pair in PAIRS if pair[0] != pair[1]]
KEY = "sk-the-key-of-up-0123456789"


# What providers say.


class Call(NamedTuple):
    name: str
    arguments: str = "{}"
    id: str = "call_1"


class Thought(NamedTuple):
    text: str
    state: str = "c3RhdGU="  # base64: Google's SDK insists on that
    id: str = "rs_up"


class Said(NamedTuple):
    """A text that is streamed in these pieces."""

    pieces: tuple[str, ...]


Block = str | Said | Call | Thought
USED = (11, 7)  # tokens in and out


def _pieces(block: Block) -> tuple[str, ...]:
    """How what grows in a block is streamed."""
    if isinstance(block, Said):
        return block.pieces
    text = {Call: "arguments", Thought: "text"}.get(type(block))
    whole = str(getattr(block, text)) if text else str(block)
    return (whole[:2], whole[2:]) if len(whole) > 2 else (whole,)


def _joined(block: Block) -> str:
    return "".join(_pieces(block))


def answer_of(protocol: str, *blocks: Block, finish: str = "", n: int = 1) -> dict[str, Any]:
    """A whole answer in a protocol. finish: in the protocol's own word."""
    return _ANSWERS[protocol](blocks, finish, n)


def _called(blocks: Sequence[Block]) -> bool:
    return any(isinstance(block, Call) for block in blocks)


def _chat_answer(blocks: Sequence[Block], finish: str, n: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for block in blocks:
        if isinstance(block, Call):
            message.setdefault("tool_calls", []).append(_chat_call(block))
        elif isinstance(block, Thought):
            message["reasoning_content"] = block.text
        else:
            message["content"] = (message["content"] or "") + _joined(block)
    finish = finish or ("tool_calls" if _called(blocks) else "stop")
    choices = [{"index": i, "message": message, "finish_reason": finish} for i in range(n)]
    head = {"id": "chatcmpl-up", "object": "chat.completion", "created": 1, "model": "m"}
    return {**head, "choices": choices, "usage": CHAT_USED}


CHAT_USED = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
RESPONSES_USED = {
    "input_tokens": 11,
    "output_tokens": 7,
    "total_tokens": 18,
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}
GEMINI_USED = {"promptTokenCount": 11, "candidatesTokenCount": 7, "totalTokenCount": 18}


def _chat_call(call: Call, **more: Any) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function, **more}


def _responses_item(block: Block, n: int) -> dict[str, Any]:
    if isinstance(block, Call):
        facts = {"call_id": block.id, "name": block.name, "arguments": block.arguments}
        return {"type": "function_call", "id": f"fc_{n}", **facts, "status": "completed"}
    if isinstance(block, Thought):
        summary = [{"type": "summary_text", "text": block.text}] if block.text else []
        facts = {"id": block.id, "summary": summary}
        return {"type": "reasoning", **facts, "encrypted_content": block.state}
    part = {"type": "output_text", "text": _joined(block), "annotations": []}
    fixed = {"type": "message", "id": f"msg_{n}", "role": "assistant", "status": "completed"}
    return {**fixed, "content": [part]}


def _responses_answer(blocks: Sequence[Block], finish: str, n: int) -> dict[str, Any]:
    status = "completed" if finish in ("", "completed") else "incomplete"
    return {
        "id": "resp_up",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": status,
        "error": None,
        "incomplete_details": None if status == "completed" else {"reason": finish},
        "output": [_responses_item(block, i) for i, block in enumerate(blocks)],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": RESPONSES_USED,
    }


def _messages_block(block: Block) -> dict[str, Any]:
    if isinstance(block, Call):
        facts = {"id": block.id, "name": block.name, "input": json.loads(block.arguments)}
        return {"type": "tool_use", **facts}
    if isinstance(block, Thought):
        return {"type": "thinking", "thinking": block.text, "signature": block.state}
    return {"type": "text", "text": _joined(block)}


def _messages_answer(blocks: Sequence[Block], finish: str, n: int) -> dict[str, Any]:
    return {
        "id": "msg_up",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [_messages_block(block) for block in blocks],
        "stop_reason": finish or ("tool_use" if _called(blocks) else "end_turn"),
        "stop_sequence": None,
        "usage": {"input_tokens": 11, "output_tokens": 7},
    }


def _gemini_part(block: Block) -> dict[str, Any]:
    if isinstance(block, Call):
        called: dict[str, Any] = {"name": block.name, "args": json.loads(block.arguments)}
        return {"functionCall": called | ({"id": block.id} if block.id else {})}
    if isinstance(block, Thought):
        signed = {"thoughtSignature": block.state} if block.state else {}
        return {"text": block.text, "thought": True, **signed}
    return {"text": _joined(block)}


def _gemini_answer(blocks: Sequence[Block], finish: str, n: int) -> dict[str, Any]:
    content = {"role": "model", "parts": [_gemini_part(block) for block in blocks]}
    one = {"content": content, "finishReason": finish or "STOP"}
    candidates = [{**one, "index": i} for i in range(n)]
    return {"candidates": candidates, "usageMetadata": GEMINI_USED, "modelVersion": "m"}


_ANSWERS: dict[str, Callable[[Sequence[Block], str, int], dict[str, Any]]] = {
    "C": _chat_answer,
    "R": _responses_answer,
    "M": _messages_answer,
    "G": _gemini_answer,
}


def events_of(protocol: str, *blocks: Block, finish: str = "") -> list[bytes]:
    """The same answer as events, each growing block in two pieces or in those it names."""
    return _EVENTS[protocol](blocks, finish)


def _chat_events(blocks: Sequence[Block], finish: str) -> list[bytes]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    index = 0
    for block in blocks:
        if isinstance(block, Call):
            opening = _chat_call(block._replace(arguments=""), index=index)
            deltas.append({"tool_calls": [opening]})
            grown = [{"index": index, "function": {"arguments": p}} for p in _pieces(block)]
            deltas += [{"tool_calls": [one]} for one in grown]
            index += 1
        else:
            name = "reasoning_content" if isinstance(block, Thought) else "content"
            deltas += [{name: piece} for piece in _pieces(block)]
    finish = finish or ("tool_calls" if index else "stop")
    end = [chat_chunk({}, finish=finish), chat_chunk(None, usage=CHAT_USED), DONE]
    return [*(chat_chunk(delta) for delta in deltas), *end]


def numbered(events: list[dict[str, Any]]) -> list[bytes]:
    return [named_event({**event, "sequence_number": n}) for n, event in enumerate(events)]


def _responses_events(blocks: Sequence[Block], finish: str) -> list[bytes]:
    whole = _responses_answer(blocks, finish, 1)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    for n, block in enumerate(blocks):
        item = whole["output"][n]
        here = {"item_id": item["id"], "output_index": n}
        empty = {"content": []} if item["type"] == "message" else {}
        empty |= {"arguments": ""} if item["type"] == "function_call" else {}
        empty |= {"summary": []} if item["type"] == "reasoning" else {}
        added = {**item, **empty, "status": "in_progress"}
        events.append({"type": "response.output_item.added", "output_index": n, "item": added})
        events += [{**event, **here} for event in _responses_growth(block, item)]
        events.append({"type": "response.output_item.done", "output_index": n, "item": item})
    kind = "response.completed" if whole["status"] == "completed" else "response.incomplete"
    return numbered([*events, {"type": kind, "response": whole}])


def _responses_growth(block: Block, item: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(block, Call):
        name, first, last, place = "function_call_arguments", [], [], {}
        done = {"arguments": block.arguments}
    elif isinstance(block, Thought):
        if not block.text:
            return []
        name, place = "reasoning_summary_text", {"summary_index": 0}
        part: dict[str, Any] = {"type": "summary_text", "text": ""}
        first = [{"type": "response.reasoning_summary_part.added", "part": part, **place}]
        part = {**part, "text": block.text}
        last = [{"type": "response.reasoning_summary_part.done", "part": part, **place}]
        done = {"text": block.text}
    else:
        name, place = "output_text", {"content_index": 0}
        [part] = item["content"]
        empty = {**part, "text": ""}
        first = [{"type": "response.content_part.added", "part": empty, **place}]
        last = [{"type": "response.content_part.done", "part": part, **place}]
        done = {"text": part["text"]}
    grown = [{"type": f"response.{name}.delta", "delta": p, **place} for p in _pieces(block)]
    return [*first, *grown, {"type": f"response.{name}.done", **done, **place}, *last]


_GROWTH = {Call: ("input_json_delta", "partial_json"), Thought: ("thinking_delta", "thinking")}


def _messages_events(blocks: Sequence[Block], finish: str) -> list[bytes]:
    whole = _messages_answer(blocks, finish, 1)
    used = {"input_tokens": 11, "output_tokens": 1}
    begun = {**whole, "content": [], "stop_reason": None, "usage": used}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
    for n, block in enumerate(blocks):
        item = {**whole["content"][n]}
        for key, empty in (("text", ""), ("thinking", ""), ("signature", ""), ("input", {})):
            item |= {key: empty} if key in item else {}
        events.append({"type": "content_block_start", "index": n, "content_block": item})
        kind, name = _GROWTH.get(type(block), ("text_delta", "text"))
        deltas = [{"type": kind, name: piece} for piece in _pieces(block)]
        if isinstance(block, Thought):
            deltas = [delta for delta in deltas if delta["thinking"]]
            deltas.append({"type": "signature_delta", "signature": block.state})
        events += [{"type": "content_block_delta", "index": n, "delta": one} for one in deltas]
        events.append({"type": "content_block_stop", "index": n})
    stop = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    events.append({"type": "message_delta", "delta": stop, "usage": {"output_tokens": 7}})
    return [named_event(event) for event in [*events, {"type": "message_stop"}]]


def gemini_event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\r\n\r\n"


def _gemini_events(blocks: Sequence[Block], finish: str) -> list[bytes]:
    parts = []
    for block in blocks:
        if isinstance(block, Call):
            parts.append(_gemini_part(block))
        elif isinstance(block, Thought):
            parts += [{"text": piece, "thought": True} for piece in _pieces(block)]
            parts[-1] |= {"thoughtSignature": block.state} if block.state else {}
        else:
            parts += [{"text": piece} for piece in _pieces(block)]
    contents = [{"content": {"role": "model", "parts": [part]}, "index": 0} for part in parts]
    chunks: list[dict[str, Any]] = [{"candidates": [content]} for content in contents]
    chunks[-1]["candidates"][0]["finishReason"] = finish or "STOP"
    chunks[-1]["usageMetadata"] = GEMINI_USED
    return [gemini_event(chunk) for chunk in chunks]


_EVENTS: dict[str, Callable[[Sequence[Block], str], list[bytes]]] = {
    "C": _chat_events,
    "R": _responses_events,
    "M": _messages_events,
    "G": _gemini_events,
}


def says(
    protocol: str, *blocks: Block, streams: bool = False, finish: str = "", n: int = 1
) -> Reply:
    """A provider's reply that says this."""
    if streams:
        return stream(*events_of(protocol, *blocks, finish=finish))
    return Reply(body=answer_of(protocol, *blocks, finish=finish, n=n))


# What callers hear.


@dataclass
class Heard:
    """An answer as the protocol's own SDK would put it together."""

    id: str = ""
    model: str = ""
    role: str = ""
    text: str = ""
    thought: str = ""
    refusal: str = ""
    calls: list[Call] = field(default_factory=list)
    finish: str = ""
    used: tuple[int, int] | None = None
    deltas: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.text += text
        self.deltas.append(text)


def heard(client: str, answer: Answer) -> Heard:
    """Read an answer, whole or streamed, as strictly as the SDKs do."""
    assert answer.status == 200, answer.body
    if answer.headers["content-type"].startswith("application/json"):
        return _WHOLE[client](answer.json())
    assert answer.headers["content-type"].startswith("text/event-stream")
    return _STREAMED[client](answer)


def _hear_chat(body: dict[str, Any]) -> Heard:
    choice = body["choices"][0]
    message, used = choice["message"], body["usage"]
    assert body["object"] == "chat.completion" and isinstance(body["created"], int)
    calls = [
        Call(c["function"]["name"], c["function"]["arguments"], c["id"])
        for c in message.get("tool_calls") or []
    ]
    thought = message.get("reasoning_content") or ""
    heard = Heard(body["id"], body["model"], message["role"], message["content"] or "", thought)
    heard.refusal, heard.calls = message.get("refusal") or "", calls
    heard.finish = choice["finish_reason"]
    heard.used = (used["prompt_tokens"], used["completion_tokens"])
    return heard


def _hear_chat_stream(answer: Answer) -> Heard:
    """wire: SDKs add up strings, so role, id and name come once; usage is the last chunk."""
    lines = [line for line in answer.body.split(b"\n") if line and not line.startswith(b":")]
    assert all(line.startswith(b"data: ") for line in lines)
    *chunks, last = answer.events()
    assert last == "[DONE]"
    heard, calls = Heard(chunks[0]["id"], chunks[0]["model"]), list[dict[str, str]]()
    for n, chunk in enumerate(chunks):
        assert (chunk["object"], chunk["id"]) == ("chat.completion.chunk", heard.id)
        if not chunk["choices"]:
            assert chunk["usage"] and n == len(chunks) - 1
            used = chunk["usage"]
            heard.used = (used["prompt_tokens"], used["completion_tokens"])
        for choice in chunk["choices"]:
            if choice["index"] == 0:
                _hear_chat_delta(heard, calls, choice["delta"])
                heard.finish += choice["finish_reason"] or ""
    heard.calls = [Call(c["name"], c["arguments"], c["id"]) for c in calls]
    return heard


def _hear_chat_delta(heard: Heard, calls: list[dict[str, str]], delta: dict[str, Any]) -> None:
    heard.role += delta.get("role") or ""
    heard.thought += delta.get("reasoning_content") or ""
    heard.refusal += delta.get("refusal") or ""
    if delta.get("content"):
        heard.say(delta["content"])
    for key in ("tool_calls", "reasoning_details", "annotations"):
        assert all(isinstance(one["index"], int) for one in delta.get(key) or [])
    for call in delta.get("tool_calls") or []:
        assert call["index"] <= len(calls)
        if call["index"] == len(calls):
            assert call["type"] == "function"
            calls.append({"id": "", "name": "", "arguments": ""})
        known = calls[call["index"]]
        known["id"] += call.get("id") or ""
        for key in ("name", "arguments"):
            known[key] += call["function"].get(key) or ""


def _hear_response(body: dict[str, Any]) -> Heard:
    assert body["object"] == "response" and isinstance(body["created_at"], int)
    assert {"parallel_tool_calls", "tool_choice", "tools"} <= body.keys()
    reason = (body.get("incomplete_details") or {}).get("reason")
    heard = Heard(body["id"], body["model"], finish=reason or body["status"])
    for item in body["output"]:
        if item["type"] == "function_call":
            heard.calls.append(Call(item["name"], item["arguments"], item["call_id"]))
        elif item["type"] == "reasoning":
            heard.thought += "".join(part["text"] for part in item["summary"])
        elif item["type"] == "message":
            heard.role = item["role"]
            for part in item["content"]:
                heard.text += part["text"] if part["type"] == "output_text" else ""
                heard.refusal += part["refusal"] if part["type"] == "refusal" else ""
    used = body["usage"]
    assert isinstance(used["input_tokens_details"]["cached_tokens"], int)
    assert isinstance(used["input_tokens_details"]["cache_write_tokens"], int)
    assert isinstance(used["output_tokens_details"]["reasoning_tokens"], int)
    assert used["total_tokens"] == used["input_tokens"] + used["output_tokens"]
    heard.used = (used["input_tokens"], used["output_tokens"])
    return heard


def _named(answer: Answer) -> list[dict[str, Any]]:
    """Events whose `event:` line says what their `type` says."""
    events = []
    for raw in answer.body.decode().split("\n\n"):
        if raw and not raw.startswith(":"):
            name, data = raw.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            events.append(event)
    assert answer.body.endswith(b"\n\n")
    return events


def _hear_responses_stream(answer: Answer) -> Heard:
    """wire: created first, one id, items added before they grow, and the end repeats them all."""
    events = _named(answer)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert {e["response"]["id"] for e in events if "response" in e} == {events[0]["response"]["id"]}
    heard, done, added = _hear_response(events[-1]["response"]), [], set()
    deltas, grown = [], ""
    for event in events[:-1]:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(added) == len(done)
            added.add(event["item"]["id"])
        elif event["type"] == "response.output_item.done":
            done.append(event["item"])
        elif event["type"].endswith(".delta"):
            assert event["item_id"] in added
            if event["type"] == "response.output_text.delta":
                deltas.append(event["delta"])
            grown += event["delta"]
    assert done == events[-1]["response"]["output"]
    assert "".join(deltas) == heard.text
    heard.deltas = deltas
    return heard


def _hear_message(body: dict[str, Any]) -> Heard:
    assert body["type"] == "message"
    heard = Heard(body["id"], body["model"], body["role"], finish=body["stop_reason"] or "")
    for block in body["content"]:
        if block["type"] == "tool_use":
            assert isinstance(block["input"], dict)
            heard.calls.append(Call(block["name"], json.dumps(block["input"]), block["id"]))
        heard.thought += block.get("thinking", "")
        heard.text += block.get("text", "")
    heard.used = (body["usage"]["input_tokens"], body["usage"]["output_tokens"])
    return heard


_GROWN = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}


def _hear_messages_stream(answer: Answer) -> Heard:
    """wire: every event is named, blocks are numbered from 0, usage is in both places."""
    first, *events, last = [e for e in _named(answer) if e["type"] != "ping"]
    assert first["type"] == "message_start" and last["type"] == "message_stop"
    message = first["message"]
    assert message["content"] == [] and message["usage"]["output_tokens"] >= 0
    blocks: list[dict[str, Any]] = []
    deltas, is_open = [], False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks) and not is_open
                blocks.append({**event["content_block"], "partial_json": ""})
                is_open = True
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1 and is_open
                name = _GROWN[event["delta"]["type"]]
                blocks[-1][name] = blocks[-1].get(name, "") + event["delta"][name]
                deltas += [event["delta"]["text"]] if name == "text" else []
            case "content_block_stop":
                is_open = False
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
                assert event["usage"]["output_tokens"] >= 0
    assert not is_open
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["partial_json"] or "{}")
    heard = _hear_message({**message, "content": blocks})
    heard.deltas = deltas
    return heard


def _hear_gemini(body: dict[str, Any]) -> Heard:
    candidate, used = body["candidates"][0], body["usageMetadata"]
    heard = Heard(body["responseId"], body["modelVersion"], finish=candidate["finishReason"])
    _hear_gemini_parts(heard, candidate)
    heard.used = (used["promptTokenCount"], used["candidatesTokenCount"])
    return heard


def _hear_gemini_parts(heard: Heard, candidate: dict[str, Any]) -> None:
    heard.role = candidate["content"]["role"]
    for part in candidate["content"]["parts"]:
        called = part.get("functionCall")
        if called:
            heard.calls.append(Call(called["name"], json.dumps(called["args"]), called["id"]))
        elif part.get("thought"):
            heard.thought += part["text"]
        elif part.get("text"):
            heard.say(part["text"])


def _hear_gemini_stream(answer: Answer) -> Heard:
    """wire: nothing but data lines; each chunk has parts, or the SDK forgets the whole turn."""
    lines = answer.body.replace(b"\r\n", b"\n").split(b"\n")
    assert all(line.startswith(b"data: {") for line in lines if line)
    heard = Heard()
    for chunk in answer.events():
        heard.id, heard.model = chunk["responseId"], chunk["modelVersion"]
        assert chunk["candidates"][0]["content"]["parts"]
        _hear_gemini_parts(heard, chunk["candidates"][0])
        heard.finish += chunk["candidates"][0].get("finishReason") or ""
        if used := chunk.get("usageMetadata"):
            heard.used = (used["promptTokenCount"], used["candidatesTokenCount"])
    return heard


_WHOLE: dict[str, Callable[[dict[str, Any]], Heard]] = {
    "C": _hear_chat,
    "R": _hear_response,
    "M": _hear_message,
    "G": _hear_gemini,
}
_STREAMED: dict[str, Callable[[Answer], Heard]] = {
    "C": _hear_chat_stream,
    "R": _hear_responses_stream,
    "M": _hear_messages_stream,
    "G": _hear_gemini_stream,
}


# A caller, a gateway and a provider.


def request_of(client: str, text: str = "hi", **more: Any) -> dict[str, Any]:
    """The least that a protocol takes for a request, without its model."""
    body: dict[str, Any]
    if client == "R":
        body = {"input": text}
    elif client == "G":
        body = {"contents": [{"role": "user", "parts": [{"text": text}]}]}
    else:
        body = {"messages": [{"role": "user", "content": text}]}
    return {**body, **({"max_tokens": 64} if client == "M" else {}), **more}


def path_of(client: str, model: str, *, streams: bool = False, array: bool = False) -> str:
    if client == "G":
        verb = "streamGenerateContent" if streams else "generateContent"
        return f"/v1beta/models/{model}:{verb}" + ("?alt=sse" if streams and not array else "")
    return {"C": "/v1/chat/completions", "R": "/v1/responses", "M": "/v1/messages"}[client]


@dataclass
class Hop:
    """A caller of one protocol, and a provider that speaks another."""

    client: str
    model: str
    up: FakeProvider
    gateway: Any
    caller: Caller

    async def ask(
        self,
        body: dict[str, Any] | None = None,
        *,
        streams: bool = False,
        array: bool = False,
        model: str = "",
        **headers: str,
    ) -> Answer:
        model, body = model or self.model, body or request_of(self.client)
        path = path_of(self.client, model, streams=streams, array=array)
        if self.client != "G":
            body = {"model": model, **body, **({"stream": True} if streams else {})}
        return await self.caller.post(path, body, **headers)

    async def hear(self, body: dict[str, Any] | None = None, **how: Any) -> Heard:
        return heard(self.client, await self.ask(body, **how))

    @property
    def sent(self) -> Any:
        """The last request that reached the provider."""
        return self.up.seen[-1].json()


def provider_toml(up: FakeProvider, upstream: str, name: str = "up") -> str:
    base = "v1beta" if upstream == "G" else "v1"
    return f"""
[providers.{name}]
api_base = "{up.base}/{base}"
api_protocol = "{PROTOCOLS[upstream]}"
api_key = "{KEY}"
"""


def vendors_at(up: FakeProvider) -> dict[str, str]:
    """An environment in which one provider is OpenAI, Anthropic and Google."""
    return {
        "OPENAI_API_KEY": "sk-openai-0123456789",
        "OPENAI_BASE_URL": f"{up.base}/v1",
        "ANTHROPIC_API_KEY": "sk-ant-0123456789",
        "ANTHROPIC_BASE_URL": up.base,
        "GEMINI_API_KEY": "AIza-0123456789",
        "GOOGLE_BASE_URL": up.base,
    }


@pytest.fixture
def hop(provider: Any, gateway: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(
        pair: str, *replies: Reply, model: str = "up/m", **more: Any
    ) -> AsyncIterator[Hop]:
        """model: of the provider `up`, which speaks the second of the pair, or of a vendor."""
        async with provider(*replies) as up:
            toml = more.pop("toml", "") + provider_toml(up, pair[1])
            async with gateway(toml, vendors_at(up), **more) as gw, gw.caller() as caller:
                yield Hop(pair[0], model, up, gw, caller)

    return start


def warned(answer: Answer) -> list[str]:
    """The warnings of an answer: code;field=name."""
    told = answer.headers.get("x-bitrouter-warnings", "")
    return told.split(", ") if told else []


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
    reply = stream(first, None, *rest, gap_s=0.04)
    async with hop(pair, reply) as h:
        h.caller.send(_asking(h))
        _, headers = await h.caller.head()
        begun = await h.caller.chunk()
        at = time.monotonic()
        rest_of_it = [begun, *[piece async for piece in h.caller._chunks()]]
        waited_s = time.monotonic() - at
        told = heard(pair[0], Answer(200, headers, b"".join(rest_of_it)))
    assert told.deltas == list(said.pieces)
    assert b"Eins" in begun and b"zwei" not in begun and waited_s > 0.02


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


MODELS = ["gpt-x:free", "anthropic/claude-x:nitro", "a@b.c"]


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


@pytest.mark.parametrize("mark", SEPARATORS.values(), ids=SEPARATORS)
@pytest.mark.parametrize("upstream", PROTOCOLS)
async def test_a_line_ends_where_sse_says(hop: Any, upstream: str, mark: str) -> None:
    raw = b"".join(events_of(upstream, Said(("a|b", "c|d")))).replace(b"|", mark.encode())
    async with hop(CLIENT_OF[upstream] + upstream, stream(raw)) as h:
        assert (await h.hear(streams=True)).text == f"a{mark}bc{mark}d"


@pytest.mark.parametrize("upstream", PROTOCOLS)
async def test_an_event_of_8_mb_is_translated_e7(hop: Any, upstream: str) -> None:
    large = "x" * 2**23
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
PACKED = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("headers", HEADS.values(), ids=HEADS)
async def test_a_stream_may_come_in_other_wrappings(hop: Any, headers: dict[str, str]) -> None:
    raw = b"".join(events_of("M", "hi"))
    pack = PACKED.get(headers.get("content-encoding", ""), bytes)
    async with hop("CM", stream(pack(raw), headers=headers)) as h:
        assert (await h.hear(streams=True)).text == "hi"
        assert h.up.seen[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("pair", CROSS)
async def test_what_is_not_json_ends_a_stream_in_an_error_e16(hop: Any, pair: str) -> None:
    begun = events_of(pair[1], Said(("Eins ", "zwei ")))[:-3] or events_of(pair[1], "Eins ")[:1]
    begun = begun if pair[1] != "G" else [gemini_event(answer_of("G", "Eins ") | {"x": 1})]
    async with hop(pair, stream(*begun, b"data: oops\n\n")) as h:
        answer = await h.ask(streams=True)
    assert b"Eins" in answer.body and "upstream_bad_json" in str(last_error(pair[0], answer))


def last_error(client: str, answer: Answer) -> dict[str, Any]:
    """The error that ends a stream, in the client protocol's own form, and nothing behind it."""
    last = answer.events()[-1]
    match client:
        case "R":
            assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
            error = last["response"]["error"]
        case "M":
            assert last["type"] == "error" and answer.body.rfind(b"event: error\n") > 0
            error = last["error"]
        case "G":
            assert list(last)[0] == "error" and isinstance(last["error"]["code"], int)
            error = last["error"]
        case _:
            assert last["error"].keys() >= {"message", "type", "param", "code"}
            error = last["error"]
    assert error["message"]
    return dict(error)


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


def chat_after(calls: list[Call], result: Any, **more: Any) -> dict[str, Any]:
    """A Chat Completions conversation in which calls were answered."""
    said = {"role": "assistant", "content": None, "tool_calls": [_chat_call(c) for c in calls]}
    told = [{"role": "tool", "tool_call_id": call.id, "content": result} for call in calls]
    return {"messages": [{"role": "user", "content": "hi"}, said, *told], **more}


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
_G = {"type": "function", "function": {"name": "g", "arguments": "[]"}}
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


@pytest.mark.parametrize("case", ACCENTS)
@pytest.mark.parametrize("client", PROTOCOLS)
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
