"""Google generateContent: requests, answers, errors, the signs of life of a stream."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
from support import state_after

from bitrouter import (
    GEMINI,
    AnswerLabel,
    ApiProtocol,
    BadRequest,
    Block,
    Choice,
    Citation,
    Content,
    ErrorFacts,
    Finish,
    Finished,
    Gatherer,
    Kind,
    Loss,
    Losses,
    Media,
    Message,
    Native,
    Opaque,
    OutputFormat,
    Prompt,
    Reasoning,
    Refusal,
    Sampling,
    SseEvent,
    StreamState,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Traits,
    UpstreamError,
    Usage,
    Voice,
    parts_of,
    seal,
)

noted = partial(state_after, GEMINI)


def said(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"role": "model", "parts": list(parts)}, **more}]}


def tokens(prompt: int, candidates: int = 0, thoughts: int = 0, total: int = 0, **more: int) -> Any:
    counts = {"promptTokenCount": prompt, "candidatesTokenCount": candidates}
    return {**counts, "thoughtsTokenCount": thoughts, "totalTokenCount": total, **more}


USAGES = {
    "plain": (tokens(9, 4, total=13), Usage(9, 4)),
    "cached tokens are among the prompt's": (
        tokens(9, 4, total=13, cachedContentTokenCount=6),
        Usage(9, 4, 6),
    ),
    "thoughts beside the candidates": (tokens(9, 4, 30, 43), Usage(9, 34, 0, 0, 30)),
    "thoughts among the candidates": (tokens(9, 34, 30, 43), Usage(9, 34, 0, 0, 30)),
    "thoughts alone": (tokens(9, 0, 30, 39), Usage(9, 30, 0, 0, 30)),
    "thoughts and no total": (tokens(9, 4, 30), Usage(9, 34, 0, 0, 30)),
    "tool results are input": (tokens(9, 4, total=33, toolUsePromptTokenCount=20), Usage(29, 4)),
    "thoughts among the candidates, with tool results": (
        tokens(9, 34, 30, 63, toolUsePromptTokenCount=20),
        Usage(29, 34, 0, 0, 30),
    ),
    "a prompt alone": ({"promptTokenCount": 9, "totalTokenCount": 9}, Usage(9)),
    "nonsense": ({"promptTokenCount": "9"}, Usage()),
    "none": (None, None),
}


@pytest.mark.parametrize(("usage", "wanted"), USAGES.values(), ids=USAGES)
def test_usage_is_made_inclusive(usage: Any, wanted: Usage | None) -> None:
    assert GEMINI.usage({"usageMetadata": usage}) == wanted


SUBSTANCE = {
    "text": said({"text": "a"}),
    "a thought": said({"text": "a", "thought": True}),
    "a call": said({"functionCall": {"name": "f", "args": {}}}),
    "a signature": said({"text": "", "thoughtSignature": "b3BhcXVl"}),
    "an image": said({"inlineData": {"mimeType": "image/png", "data": "AAAA"}}),
    "a finish": {"candidates": [{"finishReason": "STOP"}]},
    "a blocked prompt": {"promptFeedback": {"blockReason": "SAFETY"}},
    "a second candidate": {"candidates": [{}, *said({"text": "a"})["candidates"]]},
}
NO_SUBSTANCE = {
    "nothing": {},
    "no candidate": {"candidates": []},
    "usage alone": {"usageMetadata": tokens(9)},
    "no part": said(),
    "no content": {"candidates": [{"index": 0}]},
    "harmless feedback": {"promptFeedback": {"safetyRatings": []}},
    "an error": {"error": {"code": 503}},
}


@pytest.mark.parametrize("chunk", SUBSTANCE.values(), ids=SUBSTANCE)
def test_substance_starts_a_stream(chunk: Any) -> None:
    assert noted(chunk).started


@pytest.mark.parametrize("chunk", NO_SUBSTANCE.values(), ids=NO_SUBSTANCE)
def test_what_is_not_substance_does_not(chunk: Any) -> None:
    assert not noted(chunk).started


@pytest.mark.parametrize("reason", ["STOP", "MAX_TOKENS", "SAFETY", "REASON_OF_TOMORROW"])
def test_any_finish_reason_finishes_and_none_ends(reason: str) -> None:
    state = noted(said({"text": "a"}), said({"text": ""}, finishReason=reason))
    assert state.finished and not state.ended


def test_a_part_finishes_nothing() -> None:
    assert not noted(said({"text": "a"})).finished


def test_a_blocked_prompt_is_a_finish() -> None:
    assert noted({"promptFeedback": {"blockReason": "SAFETY"}}).finished


def test_the_running_total_is_replaced_and_never_added() -> None:
    state = noted({"usageMetadata": tokens(9, 1)}, {"usageMetadata": tokens(9, 5)}, said())
    assert state.usage == Usage(9, 5)


def google_error(**facts: Any) -> dict[str, Any]:
    return {"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED", **facts}}


INFO = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.5s"}
QUOTA = {"violations": [{"quotaId": "GenerateRequestsPerDayPerProject"}]}
PARSED = [
    (google_error(), {"resource_exhausted"}, 429, None),
    (google_error(details=[INFO]), {"resource_exhausted", "api_key_invalid"}, 429, None),
    (google_error(details=[INFO, RETRY]), {"resource_exhausted", "api_key_invalid"}, 429, 1.5),
    (google_error(details=[QUOTA]),
     {"resource_exhausted", "generaterequestsperdayperproject"}, 429, None),
    (google_error(code=None, status=None), set(), 0, None),
    (google_error(details=[{"retryDelay": "soon"}]), {"resource_exhausted"}, 429, None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words", "status", "wait_s"), PARSED)
def test_an_error_and_its_details_are_understood(
    body: Any, words: set[str], status: int, wait_s: float | None
) -> None:
    facts = GEMINI.parse_error(body)
    assert facts == ErrorFacts("m", frozenset(words), status, wait_s)


@pytest.mark.parametrize("body", [{}, {"error": None}, {"error": {}}])
def test_no_error_is_no_error(body: Any) -> None:
    assert GEMINI.parse_error(body) is None and noted(body).error is None


ERRORS = [
    (Kind.INVALID_REQUEST, 400, "INVALID_ARGUMENT"),
    (Kind.AUTH, 401, "UNAUTHENTICATED"),
    (Kind.BILLING, 402, "FAILED_PRECONDITION"),
    (Kind.PERMISSION, 403, "PERMISSION_DENIED"),
    (Kind.NOT_FOUND, 404, "NOT_FOUND"),
    (Kind.TOO_LARGE, 413, "INVALID_ARGUMENT"),
    (Kind.RATE_LIMIT, 429, "RESOURCE_EXHAUSTED"),
    (Kind.OVERLOADED, 503, "UNAVAILABLE"),
    (Kind.INTERNAL, 500, "INTERNAL"),
    (Kind.TIMEOUT, 504, "DEADLINE_EXCEEDED"),
    (Kind.UNSUPPORTED, 501, "UNIMPLEMENTED"),
]


@pytest.mark.parametrize(("kind", "status", "word"), ERRORS)
def test_an_error_has_google_s_shape(kind: Kind, status: int, word: str) -> None:
    error = UpstreamError("said", status=status, kind=kind, code="c")
    shape = GEMINI.render_error(error)["error"]
    assert (shape["code"], shape["message"], shape["status"]) == (status, "said", word)
    assert GEMINI.render_status(error) == status


def test_google_knows_no_529() -> None:
    error = UpstreamError("x", status=529, kind=Kind.OVERLOADED)
    assert GEMINI.render_status(error) == GEMINI.render_error(error)["error"]["code"] == 503


def test_an_error_s_details_hold_its_code_and_its_facts() -> None:
    error = BadRequest("x", code="odd", extra={"variable": "K", "count": 3})
    [info] = GEMINI.render_error(error)["error"]["details"]
    assert info["@type"].endswith("google.rpc.ErrorInfo") and info["reason"] == "ODD"
    assert info["metadata"] == {"variable": "K", "count": "3"}


@pytest.mark.parametrize(("wait_s", "told"), [(7.0, "7s"), (1.5, "1.5s"), (0.0, "0s")])
def test_a_wait_is_told_as_retry_info_and_reads_back(wait_s: float, told: str) -> None:
    body = GEMINI.render_error(UpstreamError("x", status=429, retry_after_s=wait_s))
    assert body["error"]["details"][1]["retryDelay"] == told
    facts = GEMINI.parse_error(body)
    assert facts is not None and facts.retry_after_s == wait_s


def test_a_framed_event_is_one_data_line_that_ends_in_crlf() -> None:
    framed = GEMINI.frame(SseEvent(b'{"a":1}', "message"))
    assert framed == b'data: {"a":1}\r\n\r\n' and GEMINI.strict(framed)


def test_the_end_mark_of_another_protocol_does_not_travel() -> None:
    assert GEMINI.frame(SseEvent(b"[DONE]")) == b"" == GEMINI.end_mark


OF_NOTE = [
    said({"text": ""}, finishReason="STOP"),
    {"promptFeedback": {"blockReason": "SAFETY"}},
    google_error(),
]


@pytest.mark.parametrize("chunk", OF_NOTE)
@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")], ids=["tight", "loose"])
def test_what_is_of_note_is_never_called_dull(chunk: Any, spaces: tuple[str, str]) -> None:
    dull = b'data: {"candidates":[{"content":{"parts":[{"text":"a"}]}}]}\r\n\r\n'
    assert GEMINI.dull(dull)
    assert not GEMINI.dull(dull + f"data: {json.dumps(chunk, separators=spaces)}\n\n".encode())


def test_a_stream_fails_with_the_error_as_its_first_key_and_a_whole_code() -> None:
    raw = GEMINI.fail_stream(UpstreamError("broke", status=502), StreamState(), b"")
    assert raw.startswith(b'data: {"error":{"code":502,') and raw.endswith(b"}\r\n\r\n")
    assert GEMINI.strict(raw)


def test_a_keepalive_is_a_bare_line_end() -> None:
    assert not GEMINI.comments and GEMINI.heartbeat == b"\r\n"


@pytest.mark.parametrize("body", [{}, {"candidates": []}, {"usageMetadata": tokens(9)}])
def test_an_answer_without_candidates_or_feedback_is_no_answer(body: Any) -> None:
    assert GEMINI.what_is_missing(body) == "candidates"


def test_a_blocked_prompt_is_an_answer() -> None:
    assert GEMINI.what_is_missing({"promptFeedback": {"blockReason": "SAFETY"}}) == ""


# --- requests that come in

GC = ApiProtocol.GENERATE_CONTENT
SCHEMA = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
GOOGLE_SCHEMA = {"type": "OBJECT", "properties": {"port": {"type": "STRING"}}, "required": ["port"]}
TIDE = Tool("tide", "d", SCHEMA)
DECLARED = {"name": "tide", "description": "d"}
USER = {"role": "user", "parts": [{"text": "hi"}]}
SEARCH = Tool("web_search", kind="hosted", native=Native(GC, {"googleSearch": {}}))


def asked(*content: Any, source: ApiProtocol = GC, **more: Any) -> Prompt:
    return Prompt("m", (Message("user", content or (Text("hi"),)),), source, **more)


def parsed(*contents: Any, **fields: Any) -> Prompt:
    return GEMINI.parse_request({"model": "m", "contents": list(contents) or [USER], **fields})


def settings(**fields: Any) -> dict[str, Any]:
    return {"generationConfig": fields}


SPEECH = {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": "Kore"}}}


def calling(mode: str, *names: str) -> dict[str, Any]:
    config = {"mode": mode, "allowedFunctionNames": list(names)}
    return {"toolConfig": {"functionCallingConfig": config}}


def declared(**more: Any) -> dict[str, Any]:
    return {"tools": [{"functionDeclarations": [{**DECLARED, **more}]}]}


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # what is asked, what it means
    (settings(maxOutputTokens=5, temperature=0.5, topP=1, topK=4, stopSequences=["a"], seed=7,
              candidateCount=2, presencePenalty=-1, frequencyPenalty=1),
     {"max_tokens": 5, "sampling": Sampling(0.5, 1, 4, 7, -1, 1, None, ("a",), 2)}),
    (settings(responseLogprobs=True, logprobs=3), {"sampling": Sampling(logprobs=3)}),
    ({"generation_config": {"max_output_tokens": 5, "top_k": 4}},
     {"max_tokens": 5, "sampling": Sampling(top_k=4)}),
    (declared(parametersJsonSchema=SCHEMA), {"tools": (TIDE,)}),
    (declared(parameters=GOOGLE_SCHEMA), {"tools": (TIDE,)}),
    ({"tools": [{"function_declarations": [{**DECLARED, "parameters_json_schema": SCHEMA}]}]},
     {"tools": (TIDE,)}),
    ({"tools": [{"googleSearch": {}}]}, {"tools": (SEARCH,)}),
    (calling("AUTO"), {"tool_choice": ToolChoice("auto")}),
    (calling("NONE"), {"tool_choice": ToolChoice("none")}),
    (calling("ANY"), {"tool_choice": ToolChoice("required")}),
    (calling("ANY", "f"), {"tool_choice": ToolChoice("named", ("f",))}),
    (calling("ANY", "f", "g"), {"tool_choice": ToolChoice("allowed", ("f", "g"), True)}),
    (calling("VALIDATED", "f"), {"tool_choice": ToolChoice("allowed", ("f",))}),
    (settings(responseMimeType="application/json"), {"output": OutputFormat("json_object")}),
    (settings(responseMimeType="application/json", responseJsonSchema=SCHEMA),
     {"output": OutputFormat("json_schema", schema=SCHEMA)}),
    (settings(responseSchema=GOOGLE_SCHEMA),
     {"output": OutputFormat("json_schema", schema=SCHEMA)}),
    (settings(thinkingConfig={"thinkingLevel": "LOW", "includeThoughts": True}),
     {"thinking": Thinking("low", visible=True)}),
    (settings(thinkingConfig={"thinkingBudget": 2048}), {"thinking": Thinking("low", 2048)}),
    (settings(thinkingConfig={"thinkingBudget": 0}), {"thinking": Thinking("none")}),
    (settings(thinkingConfig={"thinkingBudget": -1}), {}),
    ({"serviceTier": "STANDARD"}, {"tier": "default"}),
    ({"serviceTier": "FLEX", "labels": {"a_b": "c"}}, {"tier": "flex", "metadata": {"a_b": "c"}}),
    ({"safetySettings": [1]}, {"extra": {"safetySettings": [1]}}),
    (settings(responseModalities=["TEXT"]), {}),
    (settings(responseModalities=["IMAGE"]), {"makes": ("image",)}),
    (settings(responseModalities=["AUDIO"], speechConfig=SPEECH),
     {"makes": ("audio",), "voice": Voice("Kore")}),
    (settings(speechConfig={"languageCode": "de"}),
     {"extra": {"speechConfig": {"languageCode": "de"}}}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "meaning"), FIELDS)
def test_a_request_becomes_a_prompt(fields: Any, meaning: dict[str, Any]) -> None:
    assert parsed(**fields) == asked()._replace(**meaning)


@pytest.mark.parametrize("system", ["s", {"parts": [{"text": "s"}]}])
@pytest.mark.parametrize("name", ["systemInstruction", "system_instruction"])
def test_the_system_s_words_come_first(name: str, system: Any) -> None:
    assert parsed(**{name: system}).messages[0] == Message("system", (Text("s"),))


STATE = Opaque("google", "thought", "-_8=".replace("-", "+").replace("_", "/"))
PNG = "iVBORw0KGgo="
IMAGE_HERE = Media("image", "image/png", PNG)
CODE = {"executableCode": {"language": "PYTHON", "code": "1"}}
FOREIGN = Opaque("anthropic", "signature", "c2ln")
SEALED = base64.urlsafe_b64encode(seal(FOREIGN).encode()).decode()
CALLED = {"functionCall": {"id": "c1", "name": "tide", "args": {"a_b": 1}}}
CALL = ToolCall("c1", "tide", '{"a_b":1}')
URI = "https://x.example/a.mp4"
PARTS: list[tuple[list[dict[str, Any]], list[Content]]] = [
    ([{"text": "t"}, {"text": ""}, {}], [Text("t")]),
    ([{"inlineData": {"mimeType": "image/png", "data": PNG}}], [IMAGE_HERE]),
    # google-genai mixes spellings, and sends the other alphabet of base64
    ([{"inlineData": {"mime_type": "audio/x", "data": "-_8"}}],
     [Media("audio", "audio/x", "+/8=")]),
    ([{"inline_data": {"mimeType": "application/pdf", "data": "JVBERi0=", "displayName": "a.pdf"}}],
     [Media("document", "application/pdf", "JVBERi0=", name="a.pdf")]),
    ([{"fileData": {"fileUri": URI}}], [Media("video", "video/mp4", url=URI)]),
    ([{"fileData": {"fileUri": "gs://b/a", "mimeType": "image/png"}}],
     [Media("image", "image/png", file_id="gs://b/a", vendor="google")]),
    ([CALLED], [CALL]),
    ([{**CALLED, "thoughtSignature": "-_8"}], [CALL._replace(opaque=STATE)]),
    ([{"text": "hm", "thought": True}], [Reasoning("hm")]),
    ([{"text": "t"}, {"text": "", "thought_signature": "-_8"}], [Text("t"), Reasoning("", STATE)]),
    ([{"text": "h", "thought": True}, {"text": "m", "thought": True}, {"text": "a"}, {"text": "b"}],
     [Reasoning("hm"), Text("ab")]),
    ([{"text": "hm", "thought": True}, {"text": "t"}, {**CALLED, "thoughtSignature": SEALED}],
     [Reasoning("hm", FOREIGN), Text("t"), CALL]),
    ([{"text": "t", "thoughtSignature": SEALED}], [Reasoning("", FOREIGN), Text("t")]),
    ([CODE], [Native(GC, CODE)]),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "content"), PARTS)
def test_a_content_is_made_of_parts(parts: Any, content: list[Content]) -> None:
    said = {"role": "model", "parts": parts}
    assert parsed(USER, said).messages[1] == Message("assistant", tuple(content))


def called(name: str, ident: str | None = None) -> dict[str, Any]:
    return {"functionCall": {"name": name, "args": {}, **({"id": ident} if ident else {})}}


def answered(name: str, response: Any, ident: str | None = None) -> dict[str, Any]:
    facts = {"name": name, "response": response, **({"id": ident} if ident else {})}
    return {"functionResponse": facts}


def test_results_without_ids_find_their_calls_by_name_and_in_order() -> None:
    turn = [
        {"role": "model", "parts": [called("f"), called("g"), called("f")]},
        {"role": "user", "parts": [answered("g", {"a": 1}), answered("f", {"output": "x"})]},
        {"role": "user", "parts": [answered("f", {"error": "no"})]},
    ]
    prompt = parsed(USER, *turn)
    _, said, first, second = prompt.messages
    one, two, three = [p.id for p in said.content if isinstance(p, ToolCall)]
    assert len({one, two, three}) == 3 and "" not in (one, two, three)
    assert first.content == (
        ToolResult(two, (Text('{"a":1}'),), name="g"),
        ToolResult(one, (Text("x"),), name="f"),
    )
    assert second.content == (ToolResult(three, (Text("no"),), True, "f"),)
    assert parsed(USER, *turn) == prompt


def test_a_result_with_an_id_and_an_image_is_read() -> None:
    image = {"inlineData": {"mimeType": "image/png", "data": PNG}}
    result = answered("f", {"result": [1]}, "c1")
    result["functionResponse"]["parts"] = [image]
    said = {"role": "model", "parts": [called("f", "c1")]}
    [part] = parsed(USER, said, {"role": "user", "parts": [result]}).messages[2].content
    assert part == ToolResult("c1", (Text("[1]"), Media("image", "image/png", PNG)), name="f")


def saying(*parts: Any) -> dict[str, Any]:
    return {"contents": [{"role": "user", "parts": list(parts)}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"contents": None}, "contents"),
    ({"contents": []}, "contents"),
    ({"contents": "hi"}, "contents"),
    ({"contents": [5]}, "contents[0]"),
    ({"contents": [{"role": "robot", "parts": [{"text": "x"}]}]}, "contents[0].role"),
    ({"contents": [{"role": "user"}]}, "contents[0].parts"),
    (saying(5), "contents[0].parts[0]"),
    (saying({"text": 5}), "contents[0].parts[0].text"),
    (saying({"inlineData": {"data": 5}}), "contents[0].parts[0].inlineData.data"),
    (saying({"fileData": {}}), "contents[0].parts[0].fileData.fileUri"),
    (saying({"functionCall": {}}), "contents[0].parts[0].functionCall.name"),
    (saying(answered("f", {})), "contents[0].parts[0].functionResponse"),
    (saying(answered("f", {}, "c1")), "contents[0].parts[0].functionResponse.id"),
    ({"systemInstruction": 5}, "systemInstruction"),
    ({"generationConfig": 5}, "generationConfig"),
    (settings(topK="x"), "topK"),
    (settings(stopSequences=[5]), "generationConfig.stopSequences[0]"),
    ({"tools": [{"functionDeclarations": [{}]}]}, "tools[0].functionDeclarations[0].name"),
    ({"tools": 5}, "tools"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_cannot_be_read_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        GEMINI.parse_request({"contents": [USER], **fields})
    assert caught.value.param == param and param in caught.value.message


def test_a_request_nested_without_end_is_refused() -> None:
    deep: Any = {}
    for _ in range(500):
        deep = {"a": deep}
    with pytest.raises(BadRequest):
        parsed(safety_settings=deep)


# --- requests that go out

CONVERSATION = (
    Message("system", (Text("s"),)),
    Message("user", (Text("t"), IMAGE_HERE, Media("video", "video/mp4", url=URI))),
    Message("assistant", (Reasoning("hm", STATE), Text("t"), CALL._replace(opaque=STATE))),
    Message("user", (ToolResult("c1", (Text("low"), IMAGE_HERE), name="tide"),)),
    Message("assistant", (ToolCall("c2", "tide", "{}", opaque=STATE), Native(GC, CODE))),
    Message("user", (ToolResult("c2", (Text("no"),), True, "tide"), Text("well?"))),
    Message("assistant", (Text("so"), Reasoning("", STATE))),
)  # fmt: skip
LEVELS = Traits(thinking="level", efforts=("low", "high"))
LEGACY = Traits(schema="legacy", call_ids=False)
ROUND_TRIPS = {
    "sampling": asked(sampling=Sampling(0.5, 1, 4, 7, -1, 1, None, ("a",), 2, 3), max_tokens=16),
    "tools": asked(tools=(TIDE, SEARCH), tool_choice=ToolChoice("auto")),
    "a named tool": asked(tools=(TIDE,), tool_choice=ToolChoice("named", ("tide",))),
    "allowed tools": asked(tools=(TIDE,), tool_choice=ToolChoice("allowed", ("f", "g"), True)),
    "no tool": asked(tools=(TIDE,), tool_choice=ToolChoice("none")),
    "a schema": asked(output=OutputFormat("json_schema", schema=SCHEMA)),
    "JSON": asked(output=OutputFormat("json_object")),
    "thinking": asked(thinking=Thinking("high", visible=True), tier="flex"),
    "an unknown field": asked(extra={"safetySettings": [1]}),
    "a conversation": Prompt("m", CONVERSATION, GC),
}


def sent(prompt: Prompt, traits: Traits = LEVELS, losses: Losses | None = None) -> dict[str, Any]:
    body = GEMINI.render_request(prompt, traits, losses or Losses())
    return dict(json.loads(json.dumps(body)))


@pytest.mark.parametrize("prompt", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_all_that_the_protocol_can_say_survives_it(prompt: Prompt) -> None:
    assert GEMINI.parse_request({"model": "m", **sent(prompt)}) == prompt


def thinks(effort: str = "", budget: int | None = None, **more: Any) -> Prompt:
    return asked(thinking=Thinking(effort, budget, **more))


CC = ApiProtocol.CHAT_COMPLETIONS
BUDGETS = Traits(thinking="budget")
ALWAYS = BUDGETS._replace(can_stop_thinking=False)
NO_SIGNATURE = "c2tpcF90aG91Z2h0X3NpZ25hdHVyZV92YWxpZGF0b3I="
ODD_SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": ["integer", "null"]}, "k": {"const": 5}},
}


def config_of(prompt: Prompt, traits: Traits) -> Any:
    return sent(prompt, traits).get("generationConfig", {})


SET: list[tuple[Prompt, Traits, dict[str, Any]]] = [
    # prompt, target, its generationConfig
    (asked(), LEVELS, {}),
    (thinks("max"), LEVELS, {"thinkingConfig": {"thinkingLevel": "HIGH"}}),
    (thinks("none", visible=False), LEVELS,
     {"thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": False}}),
    (thinks("high"), BUDGETS, {"thinkingConfig": {"thinkingBudget": 24_576}}),
    (thinks("", 99), BUDGETS, {"thinkingConfig": {"thinkingBudget": 99}}),
    (thinks("none"), BUDGETS, {"thinkingConfig": {"thinkingBudget": 0}}),
    (thinks("none"), ALWAYS, {"thinkingConfig": {"thinkingBudget": 128}}),
    (thinks(visible=True), LEVELS, {"thinkingConfig": {"includeThoughts": True}}),
    (asked(sampling=Sampling(logprobs=0)), LEVELS, {"responseLogprobs": True}),
    (asked(output=OutputFormat("json_schema", schema=ODD_SCHEMA)), LEGACY,
     {"responseMimeType": "application/json", "responseSchema": {"type": "OBJECT", "properties": {
         "n": {"type": "INTEGER", "nullable": True}, "k": {"enum": ["5"], "format": "enum",
                                                          "type": "STRING"}}}}),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "traits", "wanted"), SET)
def test_a_model_is_set_in_its_own_way(prompt: Prompt, traits: Traits, wanted: Any) -> None:
    assert config_of(prompt, traits) == wanted


def turned(*messages: Message) -> Prompt:
    return Prompt("m", (Message("user", (Text("?"),)), *messages), CC)


def assistant(*content: Content) -> Message:
    return Message("assistant", content)


def result(ident: str = "c1", *content: Any, **more: Any) -> Message:
    return Message("user", (ToolResult(ident, content, name="tide", **more),))


BARE = {"name": "tide", "args": {"a_b": 1}}
IMAGE = {"inlineData": {"mimeType": "image/png", "data": PNG}}
TURNS: list[tuple[Prompt, Traits, list[dict[str, Any]]]] = [
    # prompt, target, the parts of its last content
    (turned(assistant(CALL)), LEVELS,
     [{"functionCall": {"id": "c1", **BARE}, "thoughtSignature": NO_SIGNATURE}]),
    (turned(assistant(CALL, CALL)), LEVELS,
     [{"functionCall": {"id": "c1", **BARE}, "thoughtSignature": NO_SIGNATURE},
      {"functionCall": {"id": "c1", **BARE}}]),
    (turned(assistant(CALL)), LEGACY, [{"functionCall": BARE}]),
    (turned(assistant(Reasoning("", STATE), CALL)), LEVELS,
     [{"functionCall": {"id": "c1", **BARE}, "thoughtSignature": "+/8="}]),
    (turned(assistant(Reasoning("hm"), Text("t"))), LEVELS, [{"text": "t"}]),
    (turned(assistant(Refusal("no"))), LEVELS, [{"text": "no"}]),
    (turned(assistant(ToolCall("c1", "tide", '{"a":'))), LEGACY,
     [{"functionCall": {"name": "tide", "args": {"input": '{"a":'}}}]),
    (turned(assistant(CALL), result("c1", Text('{"a":1}'))), LEVELS,
     [{"functionResponse": {"id": "c1", "name": "tide", "response": {"output": {"a": 1}}}}]),
    (turned(assistant(CALL), result("c1", Text("no"), is_error=True)), LEGACY,
     [{"functionResponse": {"name": "tide", "response": {"error": "no"}}}]),
    (turned(assistant(CALL), result("c1", IMAGE_HERE)), LEVELS,
     [{"functionResponse": {"id": "c1", "name": "tide", "response": {"output": ""},
                            "parts": [IMAGE]}}]),
    (turned(assistant(CALL), result("c1", IMAGE_HERE)), LEGACY,
     [{"functionResponse": {"name": "tide", "response": {"output": ""}}}, IMAGE]),
    (turned(Message("user", (Media("image", url="https://x.example/"),))), LEVELS,
     [{"text": "?"}, {"fileData": {"fileUri": "https://x.example/", "mimeType": "image/jpeg"}}]),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "traits", "parts"), TURNS)
def test_a_turn_is_said_in_parts(prompt: Prompt, traits: Traits, parts: list[Any]) -> None:
    assert sent(prompt, traits)["contents"][-1]["parts"] == parts


def test_a_missing_signature_is_noted() -> None:
    losses = Losses()
    sent(turned(assistant(CALL)), losses=losses)
    assert losses.found == [Loss("signature_missing", "thoughtSignature", False)]


def test_a_tier_of_others_is_a_loss() -> None:
    losses = Losses()
    sent(asked(tier="scale"), losses=losses)
    assert losses.found == [Loss("dropped", "service_tier")]


def test_a_conversation_begins_with_the_user_and_alternates() -> None:
    hi = Message("user", (Text("hi"),))
    prompt = Prompt("m", (Message("developer", (Text("d"),)), assistant(Text("a")), hi, hi), CC)
    body = sent(prompt)
    assert body["systemInstruction"] == {"parts": [{"text": "d"}]}
    assert [content["role"] for content in body["contents"]] == ["user", "model", "user"]


TOOLED: list[tuple[Prompt, Traits, dict[str, Any]]] = [
    # prompt, target, what it is sent
    (asked(tools=(Tool("f"),)), LEVELS,
     {"tools": [{"functionDeclarations": [{"name": "f", "description": "f"}]}]}),
    (asked(tools=(TIDE,)), LEGACY, declared(parameters=GOOGLE_SCHEMA)),
    (asked(tools=(Tool("web_search", kind="hosted"), TIDE)), LEVELS,
     {"tools": [*declared(parametersJsonSchema=SCHEMA)["tools"], {"googleSearch": {}}]}),
    (asked(tool_choice=ToolChoice("required")), LEVELS, {"tools": None, "toolConfig": None}),
    (asked(tools=(TIDE,), tool_choice=ToolChoice("required")), LEVELS,
     {"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}),
    (asked(tools=(TIDE._replace(strict=True),)), LEVELS,
     {"toolConfig": {"functionCallingConfig": {"mode": "VALIDATED"}}}),
    (asked(tier="priority"), LEVELS, {"serviceTier": "priority"}),
    (asked(tier="default"), LEVELS, {"serviceTier": "standard"}),
    (asked(tier="scale"), LEVELS, {"serviceTier": None}),
    (asked(tier="auto"), LEVELS, {"serviceTier": None}),
    (asked(source=CC, extra={"foo": 1}), LEVELS, {"foo": None}),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "traits", "wanted"), TOOLED)
def test_a_target_is_asked_in_its_own_way(prompt: Prompt, traits: Traits, wanted: Any) -> None:
    body = sent(prompt, traits)
    assert {key: body.get(key) for key in wanted} == wanted and None not in body.values()


# --- answers that come in


def decoded(*chunks: Any) -> list[Choice]:
    decoder, gatherer = GEMINI.decoder("google"), Gatherer()
    for part in [*(p for chunk in chunks for p in decoder.feed(chunk)), *decoder.finish()]:
        gatherer.add(part)
    return gatherer.choices()


HEARD: list[tuple[list[Any], tuple[Block, ...], Finish]] = [
    ([said({"text": "a"}), said({"text": "b"}, finishReason="STOP")], (Text("ab"),), Finish.STOP),
    ([said(finishReason="OTHER")], (), Finish.CONTENT_FILTER),
    ([said({"text": "a"}), said(finishReason="OTHER")], (Text("a"),), Finish.STOP),
    ([said({"functionCall": {"name": "f"}}, finishReason="STOP")], (ToolCall("", "f", "{}"),),
     Finish.STOP),
    ([said({"text": "hm", "thought": True, "thoughtSignature": "-_8"}), said({"text": "a"})],
     (Reasoning("hm", STATE), Text("a")), Finish.STOP),
    ([said({"text": "a"}, {"text": "", "thoughtSignature": "-_8"}, {"text": "b"})],
     (Text("a"), Reasoning("", STATE), Text("b")), Finish.STOP),
    ([said(CODE, {"text": "a"})], (Text("a"),), Finish.STOP),
    ([{"promptFeedback": {"blockReason": "SAFETY"}}], (), Finish.CONTENT_FILTER),
]  # fmt: skip


@pytest.mark.parametrize(("chunks", "content", "finish"), HEARD)
def test_a_stream_is_read(chunks: Any, content: tuple[Block, ...], finish: Finish) -> None:
    [choice] = decoded(*chunks)
    assert (choice.content, choice.finished.finish) == (content, finish)


def test_a_finish_is_told_in_detail() -> None:
    [choice] = decoded(said(finishReason="SAFETY", finishMessage="why"))
    assert choice.finished == Finished(Finish.CONTENT_FILTER, 0, "SAFETY", None, "why")


# --- answers that go out

BLOCKS: tuple[Block, ...] = (
    Reasoning("hm", FOREIGN),
    Text("Ääh Flut", (Citation("https://tides.example/", "Tides", 4, 8),)),
    ToolCall("c1", "f", '{"a":1}'),
    ToolCall("c2", "g"),
    Media("image", "image/png", PNG),
)
LABEL = AnswerLabel("abc", 1_764_000_000, "m")
DONE = Finished(Finish.TOOL_CALLS, detail="why")
SPENT = Usage(9, 4, 3, 0, 1)


def told(blocks: Iterable[Block] = BLOCKS, *finishes: Finished) -> list[Any]:
    """The chunks of a stream."""
    encoder = GEMINI.encoder(asked(), LABEL)
    parts = [part for key, block in enumerate(blocks) for part in parts_of(block, key)]
    ends = [encoder.encode(one) for one in finishes or (DONE,)]
    raw = b"".join([*map(encoder.encode, parts), *ends, encoder.end(SPENT)])
    assert GEMINI.strict(raw) and b"[DONE]" not in raw and b"event:" not in raw
    assert raw.count(b"\n") == raw.count(b"\r\n") == 2 * raw.count(b"data: {")
    return [json.loads(line[6:]) for line in raw.splitlines() if line]


def test_every_chunk_has_a_part_and_a_name() -> None:
    for chunk in told():
        for candidate in chunk["candidates"]:
            assert candidate["content"]["role"] == "model" and candidate["index"] == 0
            assert all(candidate["content"]["parts"]) and candidate["content"]["parts"]
        assert (chunk["modelVersion"], chunk["responseId"]) == ("m", "abc")


def test_the_finish_and_the_usage_are_on_the_last_chunk_alone() -> None:
    *chunks, last = told()
    [candidate] = last["candidates"]
    assert candidate["content"]["parts"] == [{"text": ""}]
    assert (candidate["finishReason"], candidate["finishMessage"]) == ("STOP", "why")
    assert GEMINI.usage(last) == SPENT
    assert not any("usageMetadata" in c or "finishReason" in c["candidates"][0] for c in chunks)


def test_all_candidates_finish_on_the_last_chunk() -> None:
    last = told((), Finished(Finish.LENGTH, 1), Finished(Finish.STOP, 0))[-1]
    finished = [(one["index"], one["finishReason"]) for one in last["candidates"]]
    assert finished == [(0, "STOP"), (1, "MAX_TOKENS")]


def parts_told(chunks: list[Any]) -> list[Any]:
    return [part for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]


def test_a_call_is_told_whole_with_a_signature_on_it() -> None:
    calls = [part for part in parts_told(told()) if "functionCall" in part]
    assert [call["functionCall"] for call in calls] == [
        {"id": "c1", "name": "f", "args": {"a": 1}},
        {"id": "c2", "name": "g", "args": {}},
    ]
    state, none = [base64.b64decode(call["thoughtSignature"]) for call in calls]
    assert state.decode() == seal(FOREIGN) and none == b"skip_thought_signature_validator"


SOURCE = Citation("https://tides.example/", "Tides", 0, 3)


def pointed_at(grounding: Any, texts: list[str]) -> list[str]:
    """What the sources point at. texts: of each part."""
    segments = [support["segment"] for support in grounding["groundingSupports"]]
    raw = [texts[one.get("partIndex", 0)].encode() for one in segments]
    return [r[s["startIndex"] : s["endIndex"]].decode() for r, s in zip(raw, segments, strict=True)]


POINTED: list[tuple[tuple[Block, ...], str]] = [
    ((Reasoning("hm"), BLOCKS[1]), "Flut"),
    ((Text("one"), Text("two", (SOURCE,))), "two"),
    ((Text("ab"), Text("c"), Text("ab", (SOURCE._replace(end=1),))), "a"),
]


@pytest.mark.parametrize(("blocks", "words"), POINTED)
def test_a_source_points_at_its_part(blocks: tuple[Block, ...], words: str) -> None:
    [candidate] = rendered(blocks)["candidates"]
    grounding = candidate["groundingMetadata"]
    texts = [part["text"] for part in candidate["content"]["parts"]]
    cited = [n for n, block in enumerate(blocks) if isinstance(block, Text) and block.citations]
    [support] = grounding["groundingSupports"]
    assert support["segment"]["partIndex"] == cited[0] and support["segment"]["text"] == words
    assert pointed_at(grounding, texts) == [words]
    assert grounding["groundingChunks"][0]["web"]["uri"] == "https://tides.example/"


@pytest.mark.parametrize(("blocks", "words"), POINTED[:2])
def test_a_source_in_a_stream_points_into_all_its_text(
    blocks: tuple[Block, ...], words: str
) -> None:
    chunks = told(blocks)
    spoken = "".join(part["text"] for part in parts_told(chunks) if not part.get("thought"))
    grounding = chunks[-1]["candidates"][0]["groundingMetadata"]
    assert pointed_at(grounding, [spoken]) == [words]


def test_a_stream_that_cannot_go_on_ends_with_an_error() -> None:
    encoder, error = GEMINI.encoder(asked(), LABEL), UpstreamError("broke", status=502)
    assert encoder.fail(error) == GEMINI.fail_stream(error, StreamState(), b"")


def rendered(
    blocks: tuple[Block, ...], finished: Finished = DONE, losses: Losses | None = None
) -> Any:
    choices = [Choice(blocks, finished)]
    answer = GEMINI.render_response(asked(), LABEL, choices, SPENT, losses or Losses())
    return json.loads(json.dumps(answer))


def test_a_rendered_answer_says_what_the_stream_says() -> None:
    answer, chunks = rendered(BLOCKS), told()
    [candidate] = answer["candidates"]
    assert candidate["content"]["parts"] == parts_told(chunks)[:-1]
    assert (candidate["finishReason"], candidate["index"]) == ("STOP", 0)
    assert answer["usageMetadata"] == chunks[-1]["usageMetadata"] == {
        "promptTokenCount": 9, "candidatesTokenCount": 3, "thoughtsTokenCount": 1,
        "cachedContentTokenCount": 3, "totalTokenCount": 13,
    }  # fmt: skip
    assert (answer["modelVersion"], answer["responseId"]) == ("m", "abc")


def test_an_answer_of_nothing_has_a_part_all_the_same() -> None:
    assert rendered(())["candidates"][0]["content"]["parts"] == [{"text": ""}]


def test_arguments_that_are_no_json_are_a_loss() -> None:
    losses, botched = Losses(), (ToolCall("c", "f", '{"a":'),)
    [part] = rendered(botched, losses=losses)["candidates"][0]["content"]["parts"]
    assert part["functionCall"]["args"] == {}
    assert losses.found == [Loss("invalid_arguments", "functionCall.args")]


def test_a_call_that_the_limit_cut_off_is_left_out() -> None:
    cut, limit = (Text("a"), ToolCall("c", "f", '{"a":')), Finished(Finish.LENGTH)
    assert rendered(cut, limit)["candidates"][0]["content"]["parts"] == [{"text": "a"}]
    assert parts_told(told(cut, limit)) == [{"text": "a"}, {"text": ""}]
    assert any("functionCall" in part for part in parts_told(told(cut)))


@pytest.mark.parametrize("name", ["thoughtSignature", "thought_signature"])
@pytest.mark.parametrize(("vendor", "kept"), [("google", None), ("anthropic", "c2ln")])
def test_a_call_never_loses_its_signature(name: str, vendor: str, kept: str | None) -> None:
    part = {"functionCall": {"name": "f"}, name: SEALED}
    body = {"contents": [{"role": "model", "parts": [part]}]}
    assert GEMINI.sealed(body) and GEMINI.unseal(body, vendor)
    assert part[name] == (kept or NO_SIGNATURE)
