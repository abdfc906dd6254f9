"""Four protocols by four: what a caller says in one, and what arrives in another.

python tests/test_matrix.py --write puts the table of losses into the README.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if __name__ == "__main__":  # python tests/test_matrix.py --write
    sys.path.insert(0, str(Path(__file__).parent.parent))

from bitrouter import (
    CODECS,
    AnswerLabel,
    ApiProtocol,
    BadRequest,
    Loss,
    Losses,
    Traits,
    Translation,
    Undo,
    UpstreamBroken,
    UpstreamGarbled,
    UpstreamUnfit,
    adapt,
    compact,
    parse_event,
    split_events,
)

CC, RE, ME, GC = ApiProtocol
PAIRS = [(caller, upstream) for caller in ApiProtocol for upstream in ApiProtocol]
CROSS = [(caller, upstream) for caller, upstream in PAIRS if caller is not upstream]
SHORT = {CC: "chat", RE: "responses", ME: "messages", GC: "gemini"}

# What is asked of here takes all that its protocol can say.
OPENAI = Traits(
    "openai",
    official=True,
    max_tokens_field="max_completion_tokens",
    efforts=("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    developer_role=True,
    custom_tools=True,
)
TRAITS = {
    CC: OPENAI._replace(vendor="chat:openai"),
    RE: OPENAI,
    ME: Traits("anthropic", official=True, thinking="adaptive", efforts=OPENAI.efforts[2:]),
    GC: Traits("google", official=True, thinking="level", efforts=OPENAI.efforts[1:5]),
}


def holds(value: Any, fragment: Any) -> bool:
    """Whether JSON holds a fragment: each of its fields, each of its items somewhere in order."""
    if isinstance(fragment, re.Pattern):
        return isinstance(value, str) and fragment.search(value) is not None
    if isinstance(fragment, dict):
        return isinstance(value, dict) and all(
            key in value and holds(value[key], inner) for key, inner in fragment.items()
        )
    if isinstance(fragment, list):
        rest: Iterator[Any] = iter(value if isinstance(value, list) else ())
        return all(any(holds(one, inner) for one in rest) for inner in fragment)
    return bool(value == fragment) and isinstance(value, bool) == isinstance(fragment, bool)


# ---------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------
# A feature is a fragment of a request in each protocol that can say it. The same fragment is what
# a caller sends and what a provider of that protocol must get; ARRIVES says where they differ.

Fragment = dict[str, Any]
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADU"
    "lEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PDF = "JVBERi0xLjQK"
WAV = "UklGRiQAAABXQVZF"
URL = "https://example.com/cat.png"
PDF_URL = "https://example.com/paper.pdf"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
CLOSED = {**SCHEMA, "additionalProperties": False}
FLAT = {"name": "f", "description": "Does f.", "parameters": SCHEMA}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":"x"}'}}
CALLED = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a":"x"}'}
USED = {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": "x"}}
CALLING = {"functionCall": {"id": "call_1", "name": "f", "args": {"a": "x"}}}


def said(role: str, content: Any) -> Fragment:
    return {"messages": [{"role": role, "content": content}]}


def asked(*parts: Any) -> dict[ApiProtocol, Fragment]:
    """What a user says, part by part: in the order of the protocols, None for what has none."""
    chat, responses, messages, gemini = parts
    spelt = {
        CC: said("user", [chat]),
        RE: {"input": [{"role": "user", "content": [responses]}]},
        ME: said("user", [messages]),
        GC: {"contents": [{"role": "user", "parts": [gemini]}]},
    }
    return {p: spelt[p] for p, part in zip(ApiProtocol, parts, strict=True) if part is not None}


def settings(**fields: Any) -> Fragment:
    return {"generationConfig": fields}


def tooled(**more: Any) -> dict[ApiProtocol, Fragment]:
    """A function on offer, and what is said of it in each protocol."""
    function = {"type": "function", **FLAT}
    declared = {"name": "f", "description": "Does f.", "parametersJsonSchema": SCHEMA}
    offered: dict[str, Fragment] = {
        "chat": {"tools": [{"type": "function", "function": FLAT}]},
        "responses": {"tools": [function]},
        "messages": {"tools": [{"name": "f", "description": "Does f.", "input_schema": SCHEMA}]},
        "gemini": {"tools": [{"functionDeclarations": [declared]}]},
    }
    return {p: {**offered[SHORT[p]], **more[SHORT[p]]} for p in ApiProtocol if SHORT[p] in more}


def after_call(result: Any, *, calls: int = 1) -> dict[ApiProtocol, Fragment]:
    """A conversation in which a tool was called: in the order of the protocols, its result."""
    chat, responses, messages, gemini = result
    ids = [f"call_{n + 1}" for n in range(calls)]
    user = {"role": "user", "content": "Hi"}
    spelt = {
        CC: [
            user,
            {"role": "assistant", "tool_calls": [{**CALL, "id": i} for i in ids]},
            *({"role": "tool", "tool_call_id": i, "content": chat} for i in ids),
        ],
        RE: [
            user,
            *({**CALLED, "call_id": i} for i in ids),
            *({"type": "function_call_output", "call_id": i, "output": responses} for i in ids),
        ],
        ME: [
            user,
            {"role": "assistant", "content": [{**USED, "id": i} for i in ids]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": i, **messages} for i in ids],
            }
            if messages
            else None,
        ],
        GC: [
            {"role": "user", "parts": [{"text": "Hi"}]},
            {
                "role": "model",
                "parts": [{"functionCall": {**CALLING["functionCall"], "id": i}} for i in ids],
            },
            {
                "role": "user",
                "parts": [{"functionResponse": {"id": i, "name": "f", **gemini}} for i in ids],
            }
            if gemini
            else None,
        ],
    }
    where = {CC: "messages", RE: "input", ME: "messages", GC: "contents"}
    given = zip(ApiProtocol, result, strict=True)
    return {p: {where[p]: spelt[p]} for p, one in given if one is not None}


FEATURES: dict[str, dict[ApiProtocol, Fragment]] = {
    "text": {
        CC: said("user", "Zwölf Enten 🦆"),
        RE: {"input": [{"role": "user", "content": "Zwölf Enten 🦆"}]},
        ME: said("user", "Zwölf Enten 🦆"),
        GC: {"contents": [{"role": "user", "parts": [{"text": "Zwölf Enten 🦆"}]}]},
    },
    "system prompt": {
        CC: {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]},
        RE: {"instructions": "S", "input": [{"role": "user", "content": "Hi"}]},
        ME: {"system": "S", **said("user", "Hi")},
        GC: {
            "systemInstruction": {"parts": [{"text": "S"}]},
            "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
        },
    },
    "later system messages": {
        CC: {"messages": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "S"}]},
        RE: {"input": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "S"}]},
    },
    "streaming": {p: {"stream": True} for p in (CC, RE, ME)},
    "max_tokens": {
        CC: {"max_completion_tokens": 99},
        RE: {"max_output_tokens": 99},
        ME: {"max_tokens": 99},
        GC: settings(maxOutputTokens=99),
    },
    "temperature": {p: {"temperature": 0.5} for p in (CC, RE, ME)}
    | {GC: settings(temperature=0.5)},
    "top_p": {p: {"top_p": 0.5} for p in (CC, RE, ME)} | {GC: settings(topP=0.5)},
    "top_k": {ME: {"top_k": 7}, GC: settings(topK=7)},
    "seed": {CC: {"seed": 7}, GC: settings(seed=7)},
    "penalties": {
        CC: {"presence_penalty": 0.5, "frequency_penalty": 0.25},
        GC: settings(presencePenalty=0.5, frequencyPenalty=0.25),
    },
    "logit bias": {CC: {"logit_bias": {"50256": -100}}},
    "log probabilities": {
        CC: {"logprobs": True, "top_logprobs": 2},
        RE: {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        GC: settings(responseLogprobs=True, logprobs=2),
    },
    "stop sequences": {
        CC: {"stop": ["END"]},
        ME: {"stop_sequences": ["END"]},
        GC: settings(stopSequences=["END"]),
    },
    "several choices": {CC: {"n": 2}, GC: settings(candidateCount=2)},
    "tools": tooled(chat={}, responses={}, messages={}, gemini={}),
    "tools at will": tooled(
        chat={"tool_choice": "auto"},
        responses={"tool_choice": "auto"},
        messages={"tool_choice": {"type": "auto"}},
        gemini={"toolConfig": {"functionCallingConfig": {"mode": "AUTO"}}},
    ),
    "no tool": tooled(
        chat={"tool_choice": "none"},
        responses={"tool_choice": "none"},
        messages={"tool_choice": {"type": "none"}},
        gemini={"toolConfig": {"functionCallingConfig": {"mode": "NONE"}}},
    ),
    "any tool": tooled(
        chat={"tool_choice": "required"},
        responses={"tool_choice": "required"},
        messages={"tool_choice": {"type": "any"}},
        gemini={"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}},
    ),
    "one tool": tooled(
        chat={"tool_choice": {"type": "function", "function": {"name": "f"}}},
        responses={"tool_choice": {"type": "function", "name": "f"}},
        messages={"tool_choice": {"type": "tool", "name": "f"}},
        gemini={
            "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}}
        },
    ),
    "one call at a time": tooled(
        chat={"tool_choice": "auto", "parallel_tool_calls": False},
        responses={"tool_choice": "auto", "parallel_tool_calls": False},
        messages={"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ),
    "strict tools": {
        CC: {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": CLOSED} | {"strict": True},
                }
            ]
        },
        RE: {"tools": [{"type": "function", "name": "f", "parameters": CLOSED, "strict": True}]},
        ME: {"tools": [{"name": "f", "input_schema": CLOSED, "strict": True}]},
    },
    "custom tools": {
        CC: {"tools": [{"type": "custom", "custom": {"name": "f", "description": "Does f."}}]},
        RE: {"tools": [{"type": "custom", "name": "f", "description": "Does f."}]},
    },
    "web search": {
        CC: {"web_search_options": {}},
        RE: {"tools": [{"type": "web_search"}]},
        ME: {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        GC: {"tools": [{"googleSearch": {}}]},
    },
    "other hosted tools": {
        RE: {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]},
        ME: {"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]},
        GC: {"tools": [{"codeExecution": {}}]},
    },
    "calls and results": after_call(
        ("done", "done", {"content": "done"}, {"response": {"output": "done"}})
    ),
    "parallel calls": after_call(
        ("done", "done", {"content": "done"}, {"response": {"output": "done"}}), calls=2
    ),
    "failed results": after_call(
        (None, None, {"content": "boom", "is_error": True}, {"response": {"error": "boom"}})
    ),
    "images in results": after_call(
        (
            None,
            [{"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}],
            {
                "content": [
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                    }
                ]
            },
            {
                "response": {"output": ""},
                "parts": [{"inlineData": {"mimeType": "image/png", "data": PNG}}],
            },
        )
    ),
    "JSON mode": {
        CC: {"response_format": {"type": "json_object"}},
        RE: {"text": {"format": {"type": "json_object"}}},
        GC: settings(responseMimeType="application/json"),
    },
    "JSON schemas": {
        CC: {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "response", "schema": CLOSED},
            }
        },
        RE: {"text": {"format": {"type": "json_schema", "name": "response", "schema": CLOSED}}},
        ME: {"output_config": {"format": {"type": "json_schema", "schema": CLOSED}}},
        GC: settings(responseMimeType="application/json", responseJsonSchema=CLOSED),
    },
    "reasoning effort": {
        CC: {"reasoning_effort": "high"},
        RE: {"reasoning": {"effort": "high"}},
        ME: {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
        GC: settings(thinkingConfig={"thinkingLevel": "HIGH"}),
    },
    "reasoning budget": {
        ME: {"thinking": {"type": "enabled", "budget_tokens": 4096}},
        GC: settings(thinkingConfig={"thinkingBudget": 4096}),
    },
    "visible reasoning": {
        RE: {"reasoning": {"effort": "low", "summary": "auto"}},
        ME: {
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {"effort": "low"},
        },
        GC: settings(thinkingConfig={"thinkingLevel": "LOW", "includeThoughts": True}),
    },
    "verbosity": {CC: {"verbosity": "low"}, RE: {"text": {"verbosity": "low"}}},
    "metadata": {
        CC: {"metadata": {"team": "a"}},
        RE: {"metadata": {"team": "a"}},
        GC: {"labels": {"team": "a"}},
    },
    "end user": {
        CC: {"safety_identifier": "u1"},
        RE: {"safety_identifier": "u1"},
        ME: {"metadata": {"user_id": "u1"}},
    },
    "cache key": {CC: {"prompt_cache_key": "k"}, RE: {"prompt_cache_key": "k"}},
    "cache marks": {
        CC: said(
            "user",
            [{"type": "text", "text": "Hi", "prompt_cache_breakpoint": {"mode": "explicit"}}],
        ),
        RE: {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "input_text",
                            "text": "Hi",
                            "prompt_cache_breakpoint": {"mode": "explicit"},
                        }
                    ],
                }
            ]
        },
        ME: said("user", [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]),
    },
    "storing": {CC: {"store": True}, RE: {"store": True}},
    "priority tier": {
        CC: {"service_tier": "priority"},
        RE: {"service_tier": "priority"},
        GC: {"serviceTier": "priority"},
    },
    "flex tier": {
        CC: {"service_tier": "flex"},
        RE: {"service_tier": "flex"},
        GC: {"serviceTier": "flex"},
    },
    "fast tier": {
        CC: {"service_tier": "fast"},
        RE: {"service_tier": "fast"},
        ME: {"speed": "fast"},
    },
    "standard tier": {
        CC: {"service_tier": "default"},
        RE: {"service_tier": "default"},
        ME: {"service_tier": "standard_only"},
        GC: {"serviceTier": "standard"},
    },
    "names of speakers": {CC: {"messages": [{"role": "user", "content": "Hi", "name": "ann"}]}},
    "refusals": {
        CC: {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "refusal": "No."},
                {"role": "user", "content": "?"},
            ]
        },
        RE: {
            "input": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                {"role": "user", "content": "?"},
            ]
        },
    },
    "image": asked(
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
        {"inlineData": {"mimeType": "image/png", "data": PNG}},
    ),
    "image at a URL": asked(
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "input_image", "image_url": URL},
        {"type": "image", "source": {"type": "url", "url": URL}},
        {"fileData": {"fileUri": URL, "mimeType": "image/png"}},
    ),
    "image detail": asked(
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        {"type": "input_image", "image_url": URL, "detail": "low"},
        None,
        None,
    ),
    "PDF": asked(
        {
            "type": "file",
            "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"},
        },
        {
            "type": "input_file",
            "filename": "a.pdf",
            "file_data": f"data:application/pdf;base64,{PDF}",
        },
        {
            "type": "document",
            "title": "a.pdf",
            "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
        },
        {"inlineData": {"mimeType": "application/pdf", "data": PDF}},
    ),
    "PDF at a URL": asked(
        None,
        {"type": "input_file", "file_url": PDF_URL},
        {"type": "document", "source": {"type": "url", "url": PDF_URL}},
        {"fileData": {"fileUri": PDF_URL, "mimeType": "application/pdf"}},
    ),
    "text document": asked(
        None,
        None,
        {
            "type": "document",
            "source": {"type": "text", "media_type": "text/plain", "data": "Once"},
        },
        {"inlineData": {"mimeType": "text/plain", "data": "T25jZQ=="}},
    ),
    "audio": asked(
        {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}},
        None,
        None,
        {"inlineData": {"mimeType": "audio/wav", "data": WAV}},
    ),
    "video": asked(
        None, None, None, {"inlineData": {"mimeType": "video/mp4", "data": "AAAAGGZ0eXA="}}
    ),
    "file ids": asked(
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "input_file", "file_id": "file-1"},
        {"type": "document", "source": {"type": "file", "file_id": "file-1"}},
        {"fileData": {"fileUri": "files/1", "mimeType": "application/pdf"}},
    ),
    "predictions": {CC: {"prediction": {"type": "content", "content": "x"}}},
    "truncation": {RE: {"truncation": "auto"}},
    "context management": {
        RE: {"context_management": [{"type": "compaction"}]},
        ME: {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
    },
    "safety settings": {
        GC: {
            "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}]
        }
    },
    "image output": {
        CC: {"modalities": ["text", "image"]},
        GC: settings(responseModalities=["TEXT", "IMAGE"]),
    },
    "audio output": {
        CC: {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
        GC: settings(responseModalities=["AUDIO"]),
    },
    "cached contents": {GC: {"cachedContent": "cachedContents/1"}},
    "containers": {ME: {"container": "c1"}},
    "MCP servers": {
        ME: {"mcp_servers": [{"type": "url", "url": "https://example.com", "name": "x"}]}
    },
    "background": {RE: {"background": True}},
    "stored prompts": {RE: {"prompt": {"id": "pmpt_1"}}},
}

# How else a feature may arrive, where a protocol says it in other words, or we see to it ourselves:
# `stops` is what we look for in the answer, `n` how often we ask.
REMINDER = re.compile("<system-reminder>\nS\n</system-reminder>")
SHOWN = {"role": "user", "content": [{"type": "image_url"}]}
OTHERWISE: dict[str, dict[ApiProtocol, Fragment]] = {
    "system prompt": {RE: {"input": [{"role": "system", "content": "S"}, {"role": "user"}]}},
    "later system messages": {
        ME: said("user", [{"text": "Hi"}, {"text": REMINDER}]),
        GC: {"contents": [{"role": "user", "parts": [{"text": "Hi"}, {"text": REMINDER}]}]},
    },
    "streaming": {GC: {"stream": True}},
    "stop sequences": {RE: {"stops": ("END",)}},
    "several choices": {RE: {"n": 2}, ME: {"n": 2}},
    "strict tools": {GC: {"toolConfig": {"functionCallingConfig": {"mode": "VALIDATED"}}}},
    "custom tools": {
        ME: {"tools": [{"name": "f", "input_schema": {"required": ["input"]}}]},
        GC: {
            "tools": [{"functionDeclarations": [{"parametersJsonSchema": {"required": ["input"]}}]}]
        },
    },
    "failed results": {
        CC: {"messages": [{"role": "tool", "content": "Error: boom"}]},
        RE: {"input": [{"type": "function_call_output", "output": "Error: boom"}]},
    },
    "images in results": {
        CC: {"messages": [{"role": "tool", "content": re.compile("next user message")}, SHOWN]},
        GC: {
            "contents": [
                {"parts": [{"functionResponse": {"parts": [{"inlineData": {"data": PNG}}]}}]}
            ]
        },
    },
    "JSON mode": {ME: {"system": re.compile("^Answer with one JSON object")}},
    "reasoning budget": {
        CC: {"reasoning_effort": "low"},
        RE: {"reasoning": {"effort": "low"}},
        ME: {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
        GC: settings(thinkingConfig={"thinkingLevel": "LOW"}),
    },
    "visible reasoning": {CC: {"reasoning_effort": "low"}},  # what is shown is up to the server
    "priority tier": {ME: {"service_tier": "auto"}},
    "image detail": {GC: settings(mediaResolution="MEDIA_RESOLUTION_LOW")},
    "image output": {RE: {"tools": [{"type": "image_generation"}]}},
    "audio output": {CC: {"modalities": ["text", "audio"], "audio": {"format": "pcm16"}}},
    "standard tier": {GC: {}},  # as it is when nothing is said
    "refusals": {
        RE: {"input": [{"role": "assistant", "content": "No."}]},
        ME: said("assistant", "No."),
        GC: {"contents": [{"role": "model", "parts": [{"text": "No."}]}]},
    },
    "PDF": {
        CC: said("user", [{"file": {"file_data": f"data:application/pdf;base64,{PDF}"}}]),
        RE: {"input": [{"content": [{"file_data": f"data:application/pdf;base64,{PDF}"}]}]},
        ME: said("user", [{"source": {"media_type": "application/pdf", "data": PDF}}]),
    },
    "PDF at a URL": {CC: said("user", [{"file": {"file_data": PDF_URL}}])},  # fetched on the way
    "text document": {
        CC: said("user", "Once"),
        RE: {"input": [{"role": "user", "content": "Once"}]},
    },
}

# What a request is without a feature, if more than the feature's fields are needed to say it.
WITHOUT = {"one call at a time": "tools at will", "image detail": "image at a URL"}

BASES: dict[ApiProtocol, Fragment] = {
    CC: {"model": "m", **said("user", "Hi")},
    RE: {"model": "m", "input": "Hi"},
    ME: {"model": "m", "max_tokens": 64, **said("user", "Hi")},
    GC: {"model": "m", "contents": [{"role": "user", "parts": [{"text": "Hi"}]}]},
}


class Sent(NamedTuple):
    """A request as it reaches a provider, and what was told of its losses."""

    body: Fragment
    aside: Fragment
    losses: list[Loss]


def sent(caller: ApiProtocol, upstream: ApiProtocol, fragment: Fragment) -> Sent | None:
    """A caller's request on its way to a provider; None if it is refused."""
    body, losses, traits = BASES[caller] | fragment, Losses(), TRAITS[upstream]
    prompt = CODECS[caller].parse_request(json.loads(json.dumps(body)))
    try:
        prompt, undo = adapt(prompt, upstream, traits, losses)
        rendered = CODECS[upstream].render_request(prompt, traits, losses)
    except (UpstreamUnfit, BadRequest):
        return None
    aside = {"stops": undo.stops, "n": prompt.sampling.n, "stream": prompt.stream}
    return Sent(json.loads(json.dumps(rendered)), aside, losses.found)


def without(feature: str, caller: ApiProtocol, upstream: ApiProtocol) -> Sent:
    plain = sent(caller, upstream, FEATURES.get(WITHOUT.get(feature, ""), {}).get(caller, {}))
    assert plain is not None
    return plain


def fate(feature: str, caller: ApiProtocol, upstream: ApiProtocol) -> str:
    """What becomes of a feature: kept, lost, refused; or garbled, which is none of these."""
    there = sent(caller, upstream, FEATURES[feature][caller])
    if there is None:
        return "refused"
    ways = [table.get(feature, {}).get(upstream) for table in (FEATURES, OTHERWISE)]
    if any(way is not None and holds(there.body | there.aside, way) for way in ways):
        return "kept"
    return "lost" if there.body == without(feature, caller, upstream).body else "garbled"


def told(feature: str, caller: ApiProtocol, upstream: ApiProtocol) -> bool:
    there = sent(caller, upstream, FEATURES[feature][caller])
    assert there is not None
    return any(loss not in without(feature, caller, upstream).losses for loss in there.losses)


Table = dict[tuple[ApiProtocol, ApiProtocol], frozenset[str]]


def table(text: str) -> Table:
    """A table of pairs, written `caller -> provider: feature, feature`."""
    protocols = {word: protocol for protocol, word in SHORT.items()}
    pairs: Table = {}
    for row in re.split(r"\n(?! )", text.strip()):
        caller, upstream, words = re.split(r" -> |:\s*", row)
        named = {" ".join(word.split()) for word in words.split(",")} - {""}
        pairs[protocols[caller], protocols[upstream]] = frozenset(named)
    return pairs


# What is dropped on the way from a caller to a provider, and what is refused because an answer
# without it would be no answer.
LOSSES = table("""
chat -> responses: seed, penalties, logit bias, cache marks, names of speakers, predictions
chat -> messages: seed, penalties, logit bias, log probabilities, verbosity, metadata, cache
    key, storing, flex tier, names of speakers, image detail, predictions, image output
chat -> gemini: logit bias, one call at a time, verbosity, metadata, end user, cache key, cache
    marks, storing, fast tier, names of speakers, predictions
responses -> chat: web search, other hosted tools, cache marks, truncation, context management
responses -> messages: log probabilities, other hosted tools, verbosity, metadata, cache key,
    storing, flex tier, image detail, truncation, context management
responses -> gemini: one call at a time, other hosted tools, verbosity, metadata, end user,
    cache key, cache marks, storing, fast tier, truncation, context management
messages -> chat: top_k, web search, other hosted tools, cache marks, context management
messages -> responses: top_k, other hosted tools, cache marks, context management
messages -> gemini: one call at a time, other hosted tools, end user, cache marks, fast tier,
    context management
gemini -> chat: top_k, web search, other hosted tools, safety settings
gemini -> responses: top_k, seed, penalties, other hosted tools, safety settings
gemini -> messages: seed, penalties, log probabilities, other hosted tools, metadata, flex tier,
    safety settings, image output
""")
REFUSED = table("""
chat -> responses: audio, audio output
chat -> messages: audio, file ids, audio output
chat -> gemini: file ids
responses -> chat: background, stored prompts
responses -> messages: file ids, background, stored prompts
responses -> gemini: file ids, background, stored prompts
messages -> chat: file ids, containers, MCP servers
messages -> responses: file ids, containers, MCP servers
messages -> gemini: file ids, containers, MCP servers
gemini -> chat: video, file ids, cached contents
gemini -> responses: audio, video, file ids, audio output, cached contents
gemini -> messages: audio, video, file ids, audio output, cached contents
""")

# Losses that nobody is told of, since no answer depends on them.
SILENT = {"end user", "cache key", "cache marks", "storing", "image detail"}
SILENT_AT = {("safety settings", CC)}


def pair_id(value: Any) -> str:
    return SHORT[value] if isinstance(value, ApiProtocol) else str(value)


def fates(caller: ApiProtocol, upstream: ApiProtocol) -> dict[str, str]:
    return {f: fate(f, caller, upstream) for f, ways in FEATURES.items() if caller in ways}


@pytest.mark.parametrize(("caller", "upstream"), CROSS, ids=pair_id)
def test_a_request_loses_what_the_table_says_and_nothing_else(
    caller: ApiProtocol, upstream: ApiProtocol
) -> None:
    found = fates(caller, upstream)
    wanted = dict.fromkeys(LOSSES[caller, upstream], "lost")
    wanted |= dict.fromkeys(REFUSED[caller, upstream], "refused")
    assert found == dict.fromkeys(found, "kept") | wanted


@pytest.mark.parametrize(("caller", "upstream"), CROSS, ids=pair_id)
def test_what_a_request_loses_is_told_unless_it_does_not_matter(
    caller: ApiProtocol, upstream: ApiProtocol
) -> None:
    lost = {f for f, what in fates(caller, upstream).items() if what == "lost"}
    silent = {f for f in lost if f in SILENT or (f, upstream) in SILENT_AT}
    assert {f for f in lost if not told(f, caller, upstream)} == silent


SEARCH_TOOL: Fragment = {"tools": [{"type": "web_search_preview"}]}
MUST_SEARCH = SEARCH_TOOL | {"tool_choice": {"type": "web_search_preview"}}
SEARCHED_THERE: list[tuple[ApiProtocol, Fragment | None]] = [
    # who is asked, and how; None if it is refused
    (RE, {"tool_choice": {"type": "web_search_preview"}}),
    (ME, {"tool_choice": {"type": "tool", "name": "web_search"}}),
    (GC, {"tools": [{"googleSearch": {}}]}),  # which cannot be forced
    (CC, None),
]


@pytest.mark.parametrize(("upstream", "wanted"), SEARCHED_THERE)
def test_a_search_that_must_be_done_is_asked_for_by_its_own_name(
    upstream: ApiProtocol, wanted: Fragment | None
) -> None:
    there = sent(RE, upstream, MUST_SEARCH)
    assert (there is None) == (wanted is None)
    if there is not None:
        assert holds(there.body, wanted)
        assert "web_search_preview" not in json.dumps(there.body.get("toolConfig"))


@pytest.mark.parametrize("upstream", [RE, ME, GC], ids=pair_id)
def test_an_effort_that_a_model_does_not_know_is_stepped_down_and_told(
    upstream: ApiProtocol,
) -> None:
    traits, losses = TRAITS[upstream]._replace(efforts=("low", "medium", "high")), Losses()
    asked_for = BASES[CC] | {"reasoning_effort": "xhigh"}
    prompt, _ = adapt(CODECS[CC].parse_request(asked_for), upstream, traits, losses)
    body = CODECS[upstream].render_request(prompt, traits, losses)
    assert "xhigh" not in json.dumps(body).lower()
    assert losses.found


def test_a_conversation_of_ours_is_said_again_in_its_own_protocol() -> None:
    """Only of Responses: what stands behind a previous_response_id of ours has to be written."""
    found = fates(RE, RE)
    assert {feature for feature, what in found.items() if what != "kept"} == {"cache marks"}


# ---------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------
# As with requests: what a provider answers in its protocol, whole and as events, is what a caller
# of that protocol must get; SEEN says where a caller gets it in other words.


class Answer(NamedTuple):
    whole: Fragment
    events: list[Fragment]


def chat(message: Fragment, *deltas: Fragment, finish: str = "stop", **more: Any) -> Answer:
    """An answer in Chat Completions; more: what else stands in its choice."""
    whole_choice = {"message": message, "finish_reason": finish, **more}
    events: list[Fragment] = [{"choices": [{"delta": delta}]} for delta in deltas]
    last = {"choices": [{"delta": {}, "finish_reason": finish}]}
    return Answer({"choices": [whole_choice]}, [*events, last])


def responses(*items: tuple[Fragment, list[Fragment]], **more: Any) -> Answer:
    """An answer in Responses: items, each with the events between its start and its end."""
    events: list[Fragment] = []
    for n, (item, growing) in enumerate(items):
        grown = {"arguments": "", "content": [], "summary": []}
        started = item | {key: empty for key, empty in grown.items() if key in item}
        if "result" in started:
            started.pop("result")
        edges = [{"type": f"response.output_item.{word}"} for word in ("added", "done")]
        first, last = edges[0] | {"item": started}, edges[1] | {"item": item}
        events += [one | {"output_index": n} for one in (first, *growing, last)]
    whole = {"status": "completed", "output": [item for item, _ in items], **more}
    end = {"type": f"response.{whole['status']}", "response": whole}
    return Answer(whole, [*events, end])


def messages(*blocks: tuple[Fragment, list[Fragment]], stop: str = "end_turn") -> Answer:
    """An answer in Messages: blocks, each with the deltas between its start and its end."""
    events: list[Fragment] = []
    for n, (block, deltas) in enumerate(blocks):
        grown = {"text": "", "thinking": "", "input": {}}
        started = {k: grown.get(k, v) for k, v in block.items() if k != "citations"}
        events.append({"type": "content_block_start", "index": n, "content_block": started})
        events += [{"type": "content_block_delta", "index": n, "delta": one} for one in deltas]
        events.append({"type": "content_block_stop", "index": n})
    end = {"type": "message_delta", "delta": {"stop_reason": stop}}
    return Answer({"content": [block for block, _ in blocks], "stop_reason": stop}, [*events, end])


def gemini(
    *parts: Fragment, finish: str = "STOP", pieces: Iterable[Fragment] = (), **more: Any
) -> Answer:
    """An answer in generateContent; pieces: its parts as they are streamed, if otherwise."""
    events: list[Fragment] = [
        {"candidates": [{"content": {"parts": [p]}}]} for p in pieces or parts
    ]
    end = {"candidates": [{"finishReason": finish, **more}]}
    whole = {"content": {"parts": list(parts)}, "finishReason": finish, **more}
    return Answer({"candidates": [whole]}, [*events, end])


TEXT, PIECES = "Zwölf Enten 🦆", ("Zwölf ", "Enten 🦆")
ARGUMENTS = '{"a":"x"}'


def output_text(text: str, pieces: Iterable[str], **more: Any) -> tuple[Fragment, list[Fragment]]:
    part = {"type": "output_text", "text": text, **more}
    item = {"type": "message", "role": "assistant", "content": [part]}
    growing = [
        {"type": "response.output_text.delta", "content_index": 0, "delta": p} for p in pieces
    ]
    return item, growing


def annotated(text: str, note: Fragment) -> tuple[Fragment, list[Fragment]]:
    item, growing = output_text(text, [text], annotations=[note])
    kind = "response.output_text.annotation.added"
    return item, [*growing, {"type": kind, "content_index": 0, "annotation": note}]


def block_text(text: str, pieces: Iterable[str]) -> tuple[Fragment, list[Fragment]]:
    return {"type": "text", "text": text}, [{"type": "text_delta", "text": p} for p in pieces]


def call_in_chat(n: int) -> list[Fragment]:
    function = {"name": "f", "arguments": ""}
    opening = {"index": n, "id": f"call_{n}", "type": "function", "function": function}
    return [
        {"tool_calls": [opening]},
        {"tool_calls": [{"index": n, "function": {"arguments": ARGUMENTS}}]},
    ]


def call_in_responses(n: int) -> tuple[Fragment, list[Fragment]]:
    item = {"type": "function_call", "call_id": f"call_{n}", "name": "f", "arguments": ARGUMENTS}
    return item, [{"type": "response.function_call_arguments.delta", "delta": ARGUMENTS}]


def call_in_messages(n: int) -> tuple[Fragment, list[Fragment]]:
    block = {"type": "tool_use", "id": f"call_{n}", "name": "f", "input": {"a": "x"}}
    return block, [{"type": "input_json_delta", "partial_json": ARGUMENTS}]


def call_in_gemini(n: int) -> Fragment:
    return {"functionCall": {"id": f"call_{n}", "name": "f", "args": {"a": "x"}}}


def short(**more: Any) -> dict[ApiProtocol, Answer]:
    """A text, and how it ended: in the order of the protocols."""
    return {
        CC: chat({"content": "Hi"}, {"content": "Hi"}, finish=more["chat"]),
        RE: responses(output_text("Hi", ["Hi"]), **more["responses"]),
        ME: messages(block_text("Hi", ["Hi"]), stop=more["messages"]),
        GC: gemini({"text": "Hi"}, finish=more["gemini"]),
    }


CITED = {"url": URL, "title": "Cats"}
SPAN = {"start_index": 0, "end_index": 2}
GROUNDS = {
    "groundingChunks": [{"web": {"uri": URL, "title": "Cats"}}],
    "groundingSupports": [
        {"segment": {"startIndex": 0, "endIndex": 2}, "groundingChunkIndices": [0]}
    ],
}
FOUND = {"type": "web_search_result_location", **CITED, "cited_text": "Hi"}
LOGPROB = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
CHOSEN = {"chosenCandidates": [{"token": "Hi", "logProbability": -0.5}]}
PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
DRAWN = {"type": "image_generation_call", "result": PNG}
SEARCHED: Fragment = {"type": "web_search_call", "action": {"type": "search", "query": "cats"}}
SEARCHING: Fragment = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}}

ANSWERS: dict[str, dict[ApiProtocol, Answer]] = {
    "text": {
        CC: chat({"content": TEXT}, *({"content": piece} for piece in PIECES)),
        RE: responses(output_text(TEXT, PIECES)),
        ME: messages(block_text(TEXT, PIECES)),
        GC: gemini({"text": TEXT}, pieces=[{"text": piece} for piece in PIECES]),
    },
    "reasoning": {
        CC: chat({"reasoning_content": "Hm."}, {"reasoning_content": "Hm."}),
        RE: responses(
            (
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
                [
                    {
                        "type": "response.reasoning_summary_text.delta",
                        "summary_index": 0,
                        "delta": "Hm.",
                    }
                ],
            )
        ),
        ME: messages(
            (
                {"type": "thinking", "thinking": "Hm."},
                [{"type": "thinking_delta", "thinking": "Hm."}],
            )
        ),
        GC: gemini({"text": "Hm.", "thought": True}),
    },
    "parallel calls": {
        CC: chat(
            {
                "tool_calls": [
                    {
                        "id": f"call_{n}",
                        "type": "function",
                        "function": {"name": "f", "arguments": ARGUMENTS},
                    }
                    for n in (0, 1)
                ]
            },
            *call_in_chat(0),
            *call_in_chat(1),
            finish="tool_calls",
        ),
        RE: responses(call_in_responses(0), call_in_responses(1)),
        ME: messages(call_in_messages(0), call_in_messages(1), stop="tool_use"),
        GC: gemini(call_in_gemini(0), call_in_gemini(1)),
    },
    "the end": short(chat="stop", responses={}, messages="end_turn", gemini="STOP"),
    "no tokens left": short(
        chat="length",
        responses={"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
        messages="max_tokens",
        gemini="MAX_TOKENS",
    ),
    "a filter": short(
        chat="content_filter",
        responses={"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
        messages="refusal",
        gemini="SAFETY",
    ),
    "refusals": {
        CC: chat({"refusal": "No."}, {"refusal": "No."}),
        RE: responses(
            (
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "refusal", "refusal": "No."}],
                },
                [{"type": "response.refusal.delta", "content_index": 0, "delta": "No."}],
            )
        ),
    },
    "citations": {
        CC: chat(
            {
                "content": "Hi",
                "annotations": [{"type": "url_citation", "url_citation": CITED | SPAN}],
            },
            {"content": "Hi"},
            {"annotations": [{"index": 0, "type": "url_citation", "url_citation": CITED | SPAN}]},
        ),
        RE: responses(annotated("Hi", {"type": "url_citation"} | CITED | SPAN)),
        ME: messages(
            (
                {"type": "text", "text": "Hi", "citations": [FOUND]},
                [
                    {"type": "text_delta", "text": "Hi"},
                    {"type": "citations_delta", "citation": FOUND},
                ],
            )
        ),
        GC: gemini({"text": "Hi"}, groundingMetadata=GROUNDS),
    },
    "log probabilities": {
        CC: chat({"content": "Hi"}, logprobs={"content": [LOGPROB]}),
        RE: responses(output_text("Hi", [], logprobs=[LOGPROB])),
        GC: gemini({"text": "Hi"}, logprobsResult=CHOSEN),
    },
    "image output": {
        CC: chat(
            {"content": "Hi", "images": [PICTURE]},
            {"content": "Hi"},
            {"images": [{"index": 0, **PICTURE}]},
        ),
        RE: responses(output_text("Hi", ["Hi"]), (DRAWN, [])),
        GC: gemini({"text": "Hi"}, {"inlineData": {"mimeType": "image/png", "data": PNG}}),
    },
    "steps of hosted tools": {
        RE: responses((SEARCHED, []), output_text("Hi", ["Hi"])),
        ME: messages((SEARCHING, []), block_text("Hi", ["Hi"])),
        GC: gemini({"executableCode": {"language": "PYTHON", "code": "1"}}, {"text": "Hi"}),
    },
}

# Log probabilities come with the text that they are of.
LIKELY: dict[ApiProtocol, Fragment] = {
    CC: {"choices": [{"delta": {"content": "Hi"}, "logprobs": {"content": [LOGPROB]}}]},
    RE: {
        "type": "response.output_text.delta",
        "output_index": 0,
        "content_index": 0,
        "delta": "Hi",
        "logprobs": [LOGPROB],
    },
    GC: {"candidates": [{"content": {"parts": [{"text": "Hi"}]}, "logprobsResult": CHOSEN}]},
}
for protocol, likely in LIKELY.items():
    events = [likely, ANSWERS["the end"][protocol].events[-1]]
    answer = ANSWERS["log probabilities"][protocol]._replace(events=events)
    ANSWERS["log probabilities"][protocol] = answer

# Where a caller gets something in other words, or in another place.
SEEN: dict[str, dict[ApiProtocol, Answer]] = {
    "refusals": {
        ME: messages(block_text("No.", ["No."]), stop="refusal"),
        GC: gemini({"text": "No."}, finish="SAFETY"),
    },
    "log probabilities": {  # Google may tell them after the text
        p: ANSWERS["log probabilities"][p]._replace(events=[before, after])
        for p, before, after in (
            (
                CC,
                {"choices": [{"delta": {"content": "Hi"}}]},
                {"choices": [{"delta": {"content": ""}, "logprobs": {"content": [LOGPROB]}}]},
            ),
            (
                RE,
                {"type": "response.output_text.delta", "delta": "Hi"},
                {"type": "response.output_text.delta", "delta": "", "logprobs": [LOGPROB]},
            ),
        )
    },
}
COUNTS: dict[ApiProtocol, Fragment] = {
    CC: {
        "prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 3},
    },
    RE: {
        "input_tokens": 9, "output_tokens": 5, "total_tokens": 14,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens_details": {"reasoning_tokens": 3},
    },
    ME: {
        "input_tokens": 5, "output_tokens": 5, "cache_read_input_tokens": 4,
        "output_tokens_details": {"thinking_tokens": 3},
    },
    GC: {
        "promptTokenCount": 9, "candidatesTokenCount": 2, "totalTokenCount": 14,
        "cachedContentTokenCount": 4, "thoughtsTokenCount": 3,
    },
}  # fmt: skip


def counted(protocol: ApiProtocol, answer: Answer) -> Answer:
    """An answer that says what was used."""
    used = {"usageMetadata" if protocol is GC else "usage": COUNTS[protocol]}
    whole, (*events, last) = answer.whole | used, answer.events
    if protocol is CC:
        return Answer(whole, [*events, last, {"choices": [], **used}])
    return Answer(whole, [*events, last | ({"response": whole} if protocol is RE else used)])


ANSWERS["usage"] = {p: counted(p, ANSWERS["the end"][p]) for p in ApiProtocol}
FIRST: dict[ApiProtocol, list[Fragment]] = {
    CC: [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}],
    RE: [{"type": "response.created", "response": {"id": "resp_1", "model": "m", "output": []}}],
    ME: [
        {
            "type": "message_start",
            "message": {"model": "m", "usage": COUNTS[ME] | {"output_tokens": 1}},
        }
    ],
    GC: [],
}


def streamed(protocol: ApiProtocol, answer: Answer) -> bytes:
    """An answer as its provider streams it."""
    out = b""
    for event in [*FIRST[protocol], *answer.events]:
        name = f"event: {event['type']}\n" if "type" in event else ""
        out += f"{name}data: {json.dumps(event)}\n\n".encode()
    return out + CODECS[protocol].end_mark


def translation(caller: ApiProtocol, upstream: ApiProtocol, **more: Any) -> Translation:
    body = BASES[caller] | ({"stream_options": {"include_usage": True}} if caller is CC else {})
    return Translation(
        CODECS[upstream], CODECS[caller], CODECS[caller].parse_request(body), Undo(),
        AnswerLabel("abc", 1_790_000_000, "m"), TRAITS[upstream].vendor,
        lambda facts: UpstreamBroken(facts.message), **more,
    )  # fmt: skip


def heard(caller: ApiProtocol, upstream: ApiProtocol, answer: Answer, *, streams: bool) -> Any:
    """What a caller gets of a provider's answer: JSON, or the JSON of each event."""
    answer, between = counted(upstream, answer), translation(caller, upstream)
    if not streams:
        between.take_whole(json.loads(json.dumps(answer.whole)))
        return between.whole()
    out = between.feed(streamed(upstream, answer)) + between.finish()
    events = [event.data for raw in split_events(out) if (event := parse_event(raw))]
    return [json.loads(data) for data in events if data != b"[DONE]"]


def answer_fate(feature: str, caller: ApiProtocol, upstream: ApiProtocol, *, streams: bool) -> str:
    """What becomes of a feature of an answer: kept, lost; or garbled, which is neither."""
    found = heard(caller, upstream, ANSWERS[feature][upstream], streams=streams)
    ways = [table.get(feature, {}).get(caller) for table in (ANSWERS, SEEN)]
    if any(holds(found, way.events if streams else way.whole) for way in ways if way):
        return "kept"
    plain = heard(caller, upstream, ANSWERS["the end"][upstream], streams=streams)
    return "lost" if found == plain else "garbled"


ANSWER_LOSSES = table("""
chat -> responses: steps of hosted tools
chat -> messages: steps of hosted tools
chat -> gemini: steps of hosted tools
responses -> chat:
responses -> messages: steps of hosted tools
responses -> gemini: steps of hosted tools
messages -> chat: log probabilities, image output, citations
messages -> responses: log probabilities, image output, citations, steps of hosted tools
messages -> gemini: log probabilities, image output, citations, steps of hosted tools
gemini -> chat:
gemini -> responses: steps of hosted tools
gemini -> messages: steps of hosted tools
responses -> responses: steps of hosted tools
""")


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("caller", "upstream"), [*CROSS, (RE, RE)], ids=pair_id)
def test_an_answer_loses_what_the_table_says_and_nothing_else(
    caller: ApiProtocol, upstream: ApiProtocol, streams: bool
) -> None:
    features = [feature for feature, ways in ANSWERS.items() if upstream in ways]
    found = {f: answer_fate(f, caller, upstream, streams=streams) for f in features}
    lost = dict.fromkeys(ANSWER_LOSSES[caller, upstream], "lost")
    assert found == dict.fromkeys(features, "kept") | lost


def warned_of(feature: str, caller: ApiProtocol, upstream: ApiProtocol, *, streams: bool) -> bool:
    between, answer = translation(caller, upstream), counted(upstream, ANSWERS[feature][upstream])
    if streams:
        between.feed(streamed(upstream, answer))
    else:
        between.take_whole(answer.whole)
        between.whole()
    return any(loss.code == "dropped" for loss in between.losses.found)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("caller", "upstream"), CROSS, ids=pair_id)
def test_an_answer_warns_of_nothing_that_it_holds(
    caller: ApiProtocol, upstream: ApiProtocol, streams: bool
) -> None:
    features = [feature for feature, ways in ANSWERS.items() if upstream in ways]
    warned = {f for f in features if warned_of(f, caller, upstream, streams=streams)}
    assert warned <= ANSWER_LOSSES[caller, upstream]


# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------
# What a vendor minted for its own eyes goes back to it as it was, whichever protocol the caller
# speaks, and to nobody else.

SECRET = "c2lnbmVkIGJ5IG1l"
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": SECRET}
ITEM: Fragment = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": SECRET}
DETAIL = {"type": "reasoning.encrypted", "data": SECRET, "id": "r1", "format": "own"}
SIGNED = call_in_gemini(0) | {"thoughtSignature": SECRET}
MINTED: dict[ApiProtocol, Answer] = {
    CC: chat(
        {"reasoning_details": [DETAIL], "tool_calls": call_in_chat(0)[0]["tool_calls"]},
        {"reasoning_details": [{"index": 0, **DETAIL}]},
        *call_in_chat(0),
        finish="tool_calls",
    ),
    RE: responses((ITEM, []), call_in_responses(0)),
    ME: messages(
        (
            THOUGHT,
            [
                {"type": "thinking_delta", "thinking": "Hm."},
                {"type": "signature_delta", "signature": SECRET},
            ],
        ),
        call_in_messages(0),
        stop="tool_use",
    ),
    GC: gemini(SIGNED),
}
for event in MINTED[ME].events:  # a block starts without its signature
    if holds(event, {"content_block": {"signature": SECRET}}):
        event["content_block"]["signature"] = ""
RETURNED: dict[ApiProtocol, Fragment] = {
    CC: {"messages": [{"role": "assistant", "reasoning_details": [DETAIL]}]},
    RE: {"input": [ITEM, {"type": "function_call", "call_id": "call_0"}]},
    ME: said("assistant", [THOUGHT, {"type": "tool_use", "id": "call_0"}]),
    GC: {"contents": [{"role": "model", "parts": [SIGNED]}]},
}


def added_up(caller: ApiProtocol, events: list[Any]) -> Any:
    """What a client makes of a stream: what it will send back with its next request."""
    if caller is RE:
        return events[-1]["response"]["output"]
    if caller is GC:
        return [p for event in events for p in event["candidates"][0]["content"]["parts"]]
    return _blocks(events) if caller is ME else _message(events)


def _blocks(events: list[Any]) -> list[Any]:
    blocks: list[Any] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        delta = event.get("delta", {})
        for name in ("text", "thinking", "signature"):
            if name in delta:
                blocks[-1][name] += delta[name]
        if "partial_json" in delta:
            blocks[-1]["input"] = json.loads(delta["partial_json"])
    return blocks


def _message(events: list[Any]) -> Fragment:
    message: Fragment = {"role": "assistant", "content": None, "reasoning_content": ""}
    for delta in (choice["delta"] for event in events for choice in event["choices"]):
        message["reasoning_content"] += delta.get("reasoning_content", "")
        message.setdefault("reasoning_details", []).extend(delta.get("reasoning_details", []))
        for call in delta.get("tool_calls", []):
            known = message.setdefault("tool_calls", [])
            if "id" in call:
                known.append(call)
            else:
                known[-1]["function"]["arguments"] += call["function"]["arguments"]
    return message


def remembered(caller: ApiProtocol, answer: Any) -> Any:
    """The same of a whole answer."""
    if caller is CC:
        return answer["choices"][0]["message"]
    if caller is GC:
        return answer["candidates"][0]["content"]["parts"]
    return answer["output" if caller is RE else "content"]


def next_request(caller: ApiProtocol, kept: Any) -> Fragment:
    """What a client asks next: what it kept of the answer, and the result of the call in it."""
    user: Fragment = {"role": "user", "content": "Hi"}
    if caller is RE:
        item = {"type": "function_call_output", "call_id": "call_0", "output": "done"}
        return {"input": [user, *kept, item]}
    if caller is CC:
        told = {"role": "tool", "tool_call_id": "call_0", "content": "done"}
        return {"messages": [user, kept, told]}
    if caller is ME:
        block = {"type": "tool_result", "tool_use_id": "call_0", "content": "done"}
        back = {"role": "user", "content": [block]}
        return {"messages": [user, {"role": "assistant", "content": kept}, back]}
    part = {"functionResponse": {"id": "call_0", "name": "f", "response": {"output": "done"}}}
    turns = [("user", [{"text": "Hi"}]), ("model", kept), ("user", [part])]
    return {"contents": [{"role": role, "parts": parts} for role, parts in turns]}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("caller", "minter"), CROSS, ids=pair_id)
def test_state_goes_back_to_who_minted_it_and_to_nobody_else(
    caller: ApiProtocol, minter: ApiProtocol, streams: bool
) -> None:
    got = heard(caller, minter, MINTED[minter], streams=streams)
    kept = added_up(caller, got) if streams else remembered(caller, got)
    for upstream in ApiProtocol:
        there = sent(caller, upstream, next_request(caller, kept))
        assert there is not None and "br1." not in json.dumps(there.body)
        assert holds(there.body, RETURNED[minter]) == (upstream is minter)
        assert (SECRET in json.dumps(there.body)) == (upstream is minter)


# ---------------------------------------------------------------------------------------------
# Nonsense
# ---------------------------------------------------------------------------------------------

JUNK = ["null", "7", "-1", "1.5", '"x"', '""', "[]", "{}", "[{}]", "[null]", "true", '"\\ud800"']


def mangled(value: Any, rng: random.Random) -> Any:
    """JSON in which one value or two are gone, or are something else."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2))):
        place = value
        while isinstance(place, dict | list) and place:
            key = rng.choice([*place] if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
                place[key] = json.loads(rng.choice(JUNK))
                break
            place = place[key]
    return value


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("caller", ApiProtocol, ids=pair_id)
def test_a_mangled_request_is_read_or_refused(caller: ApiProtocol, seed: int) -> None:
    rng = random.Random(seed)
    for ways in FEATURES.values():
        body = mangled(BASES[caller] | ways.get(caller, {}), rng)
        with suppress(BadRequest, UpstreamUnfit):
            prompt = CODECS[caller].parse_request(body)
            upstream = rng.choice(list(ApiProtocol))
            there, _ = adapt(prompt, upstream, TRAITS[upstream], Losses())
            compact(CODECS[upstream].render_request(there, TRAITS[upstream], Losses()))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("upstream", ApiProtocol, ids=pair_id)
def test_a_mangled_answer_is_read_or_garbled(upstream: ApiProtocol, seed: int) -> None:
    rng = random.Random(seed)
    for ways in [*ANSWERS.values(), MINTED]:
        answer = counted(upstream, ways.get(upstream, MINTED[upstream]))
        caller = rng.choice([protocol for protocol in ApiProtocol if protocol is not upstream])
        between = translation(caller, upstream)
        with suppress(UpstreamGarbled):
            between.take_whole(mangled(answer.whole, rng))
            compact(between.whole())
        events = [mangled(one, rng) if rng.random() < 0.3 else one for one in answer.events]
        stream = [f"data: {json.dumps(one)}\n\n".encode() for one in [*FIRST[upstream], *events]]
        between = translation(caller, upstream)
        for raw in stream:
            between.feed(raw)
        assert between.over or between.finish() or not between.state.finished


# ---------------------------------------------------------------------------------------------
# The table in the README
# ---------------------------------------------------------------------------------------------

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- losses: written by tests/test_matrix.py -->", "<!-- end of losses -->"
NAMES = {CC: "Chat Completions", RE: "Responses", ME: "Messages", GC: "generateContent"}


def losses_table() -> str:
    """What each pair loses, and what it refuses, in Markdown."""
    rows = [["the caller speaks", *NAMES.values()], ["---"] * (1 + len(NAMES))]
    for caller, name in NAMES.items():
        rows.append([name, *(losses_cell(caller, upstream) for upstream in NAMES)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def losses_cell(caller: ApiProtocol, upstream: ApiProtocol) -> str:
    if caller is upstream:
        return "nothing"
    pair, order = (caller, upstream), [*FEATURES, *(f for f in ANSWERS if f not in FEATURES)]
    lost = [f for f in order if f in LOSSES[pair] | ANSWER_LOSSES[pair]]
    refused = [f for f in order if f in REFUSED[pair]]
    return f"{', '.join(lost)}; refused: {', '.join(refused)}"


def test_the_readme_holds_the_table_of_losses() -> None:
    _, begin, rest = README.read_text().partition(f"{BEGIN}\n")
    table_there, end, _ = rest.partition(END)
    assert begin and end
    assert table_there.strip() == losses_table().strip()


def write_readme() -> None:
    """Put the table where it belongs."""
    text = README.read_text()
    assert text.count(f"{BEGIN}\n") == text.count(END) == 1
    before, rest = text.split(f"{BEGIN}\n")
    README.write_text(f"{before}{BEGIN}\n\n{losses_table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write_readme()
