"""OpenAI Responses: requests, answers, errors, the signs of life of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
from support import named_event, read_wire, state_after

from bitrouter import (
    RESPONSES,
    AnswerLabel,
    ApiProtocol,
    BadRequest,
    Block,
    Choice,
    Citation,
    Content,
    Delta,
    Finish,
    Finished,
    Gatherer,
    Loss,
    Losses,
    Media,
    Message,
    Native,
    Opaque,
    Open,
    OutputFormat,
    Prompt,
    Reasoning,
    Refusal,
    Sampling,
    SseEvent,
    StreamRelay,
    StreamState,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Traits,
    UpstreamError,
    UpstreamUnfit,
    Usage,
    parse_event,
    parts_of,
)

BROKEN = UpstreamError("the line went dead", code="upstream_disconnected")


noted = partial(state_after, RESPONSES)


def item(kind: str, **more: Any) -> dict[str, Any]:
    added = {"type": "response.output_item.added", "output_index": 0}
    return {**added, "item": {"type": kind, **more}}


USAGES = [
    ({"input_tokens": 9, "output_tokens": 4, "total_tokens": 13}, Usage(9, 4)),
    ({"input_tokens": 9, "input_tokens_details": {"cached_tokens": 6}}, Usage(9, 0, 6)),
    ({"input_tokens": 9, "input_tokens_details": {"cache_write_tokens": 5}}, Usage(9, 0, 0, 5)),
    ({"output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 7}}, Usage(0, 9, 0, 0, 7)),
    ({"input_tokens": None, "output_tokens_details": 5}, Usage()),
    (None, None),
    ([], None),
]


@pytest.mark.parametrize(("usage", "wanted"), USAGES)
def test_usage_is_read_inclusively(usage: Any, wanted: Usage | None) -> None:
    assert RESPONSES.usage({"usage": usage}) == wanted


SUBSTANCE = {
    "a reasoning item": item("reasoning", summary=[]),
    "a call": item("function_call", name="f", arguments=""),
    "a custom call": item("custom_tool_call", name="f"),
    "a web search": item("web_search_call"),
    "text": {"type": "response.output_text.delta", "delta": "a"},
    "a refusal": {"type": "response.refusal.delta", "delta": "a"},
    "arguments": {"type": "response.function_call_arguments.delta", "delta": "{"},
    "a summary": {"type": "response.reasoning_summary_text.delta", "delta": "a"},
    "reasoning text": {"type": "response.reasoning_text.delta", "delta": "a"},
    "the end": {"type": "response.completed", "response": {"output": []}},
    "an early end": {"type": "response.incomplete", "response": {"output": []}},
}
NO_SUBSTANCE = {
    "created": {"type": "response.created", "response": {"id": "r"}},
    "in_progress": {"type": "response.in_progress", "response": {"id": "r"}},
    "queued": {"type": "response.queued", "response": {"id": "r"}},
    "an empty message": item("message", content=[]),
    "an empty part": {"type": "response.content_part.added", "part": {"type": "output_text"}},
    "a failure": {"type": "response.failed", "response": {"error": {"message": "x"}}},
    "an error": {"type": "error", "message": "x"},
    "no type": {"response": {}},
}


@pytest.mark.parametrize("event", SUBSTANCE.values(), ids=SUBSTANCE)
def test_substance_starts_a_stream(event: Any) -> None:
    assert noted(event).started


@pytest.mark.parametrize("event", NO_SUBSTANCE.values(), ids=NO_SUBSTANCE)
def test_what_is_not_substance_does_not(event: Any) -> None:
    assert not noted(event).started


def test_a_message_that_opens_does_not_undo_a_start() -> None:
    assert noted(item("reasoning"), item("message")).started


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete"])
def test_a_complete_response_finishes_and_ends(kind: str) -> None:
    response = {"output": [], "usage": {"input_tokens": 3, "output_tokens": 2}}
    state = noted({"type": kind, "response": response})
    assert state.finished and state.ended and state.usage == Usage(3, 2)


def test_a_finished_item_finishes_no_response() -> None:
    state = noted(item("message"), {"type": "response.output_item.done", "item": {}})
    assert not state.finished and not state.ended


IN_BAND = {
    "failed": {
        "type": "response.failed",
        "response": {"error": {"code": "rate_limit_exceeded", "message": "slow down"}},
    },
    "flat": {"type": "error", "code": "rate_limit_exceeded", "message": "slow down"},
    "nested": {
        "type": "error",
        "error": {"code": "rate_limit_exceeded", "message": "slow down"},
    },
}


@pytest.mark.parametrize("event", IN_BAND.values(), ids=IN_BAND)
def test_an_error_is_understood_in_each_of_its_forms(event: Any) -> None:
    state = noted(event)
    assert state.error is not None and not state.finished
    assert state.error.message == "slow down" and "rate_limit_exceeded" in state.error.words


@pytest.mark.parametrize("event", IN_BAND.values(), ids=IN_BAND)
def test_an_error_in_a_stream_stands_for_its_status(event: Any) -> None:
    state = noted(event)
    assert state.error is not None and state.error.status == 429


@pytest.mark.parametrize(
    "event", [{"type": "response.failed"}, {"type": "response.failed", "response": None}]
)
def test_a_failure_that_says_nothing_is_a_failure(event: Any) -> None:
    assert noted(event).error is not None


NAMED = [
    (b'{"type":"response.created","a":1}', "", "response.created"),
    (b'{"a":1, "type" : "response.failed"}', "", "response.failed"),
    (b'{"type":"x"}', "kept", "kept"),
    (b'{"part":{"type":"output_text"},"type":"response.content_part.added"}', "",
     "response.content_part.added"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "event", "name"), NAMED)
def test_an_event_is_named_by_its_own_type(data: bytes, event: str, name: str) -> None:
    framed = RESPONSES.frame(SseEvent(data, event))
    assert parse_event(framed) == SseEvent(data, name) and RESPONSES.strict(framed)


OF_NOTE = ["response.completed", "response.incomplete", "response.failed", "error"]


@pytest.mark.parametrize("kind", OF_NOTE)
@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")], ids=["tight", "loose"])
def test_what_is_of_note_is_never_called_dull(kind: str, spaces: tuple[str, str]) -> None:
    dull = named_event({"type": "response.output_text.delta", "delta": "a"})
    event = json.dumps({"type": kind, "response": {}}, separators=spaces).encode()
    assert RESPONSES.dull(dull)
    assert not RESPONSES.dull(dull + b"event: x\ndata: " + event + b"\n\n")


# --- a stream that fails


def events_of(raw: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]


def ending(raw: bytes) -> Any:
    [event] = events_of(raw)
    return event


WIRE = read_wire("responses/text")["stream"]
EVENTS = [event + b"\n\n" for event in WIRE.split(b"\n\n")[:-1]]


@pytest.mark.parametrize("count", range(5, len(EVENTS)))
@pytest.mark.parametrize("at_once", [True, False])
def test_sequence_numbers_go_on_where_the_stream_broke(count: int, at_once: bool) -> None:
    relay = StreamRelay(RESPONSES)
    for piece in [b"".join(EVENTS[:count])] if at_once else EVENTS[:count]:
        relay.feed(piece)
    event = ending(relay.fail(BROKEN))
    assert (event["type"], event["sequence_number"]) == ("response.failed", count)


def test_a_stream_fails_with_the_response_that_it_began() -> None:
    relay = StreamRelay(RESPONSES)
    relay.feed(b"".join(EVENTS[:6]))
    response = ending(relay.fail(BROKEN))["response"]
    assert (response["id"], response["model"], response["status"]) == ("resp_w2", "m", "failed")
    assert response["error"] == {"code": "server_error", "message": "the line went dead"}


def test_a_stream_that_told_nothing_fails_from_number_0() -> None:
    event = ending(RESPONSES.fail_stream(BROKEN, StreamState(), b""))
    assert event["sequence_number"] == 0 and event["response"]["status"] == "failed"


def test_a_number_that_the_model_wrote_is_no_sequence_number() -> None:
    relay = StreamRelay(RESPONSES)
    relay.feed(b"".join(EVENTS[:5]))
    said = {"type": "response.output_text.delta", "delta": '"sequence_number":999', "x": 1}
    relay.feed(named_event({**said, "sequence_number": 5}))
    assert ending(relay.fail(BROKEN))["sequence_number"] == 6


def test_the_failure_is_named_and_in_strict_form() -> None:
    raw = RESPONSES.fail_stream(BROKEN, StreamState(), b"")
    assert RESPONSES.strict(raw) and raw.startswith(b"event: response.failed\n")


def test_a_keepalive_is_a_comment_and_there_is_no_end_mark() -> None:
    assert RESPONSES.comments and RESPONSES.heartbeat == b": keepalive\n\n"
    assert RESPONSES.end_mark == b""


@pytest.mark.parametrize("body", [{}, {"output": None}, {"output": {}}, {"choices": []}])
def test_an_answer_without_output_is_no_answer(body: Any) -> None:
    assert RESPONSES.what_is_missing(body) == "output"


def test_an_empty_output_is_an_answer() -> None:
    assert RESPONSES.what_is_missing({"output": []}) == ""


# --- requests that come in

PORT: dict[str, Any] = {"type": "object", "properties": {"port": {}}, "required": ["port"]}
SCHEMA = {**PORT, "additionalProperties": False}
TIDE = Tool("tide", "d", SCHEMA, True)
FUNCTION = {"type": "function", "name": "tide", "description": "d", "parameters": SCHEMA}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: A"}
SQL = Tool("sql", kind="custom", format=GRAMMAR)
CUSTOM = {"type": "custom", "name": "sql", "format": GRAMMAR}
SEARCH = {"type": "web_search_preview", "search_context_size": "low"}
OUTPUT = OutputFormat("json_schema", "o", "d", SCHEMA, True)
SHAPE = {"type": "json_schema", "name": "o", "description": "d", "schema": SCHEMA, "strict": True}
CHOSEN = ToolChoice("named", ("f",))


def asked(*content: Any, source: ApiProtocol = ApiProtocol.RESPONSES, **more: Any) -> Prompt:
    return Prompt("m", (Message("user", content or (Text("hi"),)),), source, **more)


def parsed(*items: Any, **fields: Any) -> Prompt:
    return RESPONSES.parse_request({"model": "m", "input": list(items) or "hi", **fields})


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # what is asked, what it means
    ({"stream": True, "max_output_tokens": 16}, {"stream": True, "max_tokens": 16}),
    ({"temperature": 0.5, "top_p": 1}, {"sampling": Sampling(0.5, 1)}),
    ({"include": ["message.output_text.logprobs"]}, {"sampling": Sampling(logprobs=0)}),
    ({"top_logprobs": 4}, {"sampling": Sampling(logprobs=4)}),
    ({"tools": [{**FUNCTION, "strict": True}, CUSTOM]}, {"tools": (TIDE, SQL)}),
    ({"tools": [{"type": "namespace", "name": "sea", "tools": [FUNCTION, CUSTOM]}]},
     {"tools": (TIDE._replace(strict=None, namespace="sea"), SQL._replace(namespace="sea"))}),
    ({"tools": [SEARCH]},
     {"tools": (Tool("web_search", kind="hosted", native=Native(ApiProtocol.RESPONSES, SEARCH)),)}),
    ({"tool_choice": "required"}, {"tool_choice": ToolChoice("required")}),
    ({"tool_choice": {"type": "function", "name": "f"}}, {"tool_choice": CHOSEN}),
    ({"tool_choice": {"type": "mcp"}}, {"tool_choice": ToolChoice("named", ("mcp",))}),
    ({"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"name": "f"}]}},
     {"tool_choice": ToolChoice("allowed", ("f",), True)}),
    ({"parallel_tool_calls": False}, {"parallel_tools": False}),
    ({"text": {"format": SHAPE, "verbosity": "low"}}, {"output": OUTPUT, "verbosity": "low"}),
    ({"text": {"format": {"type": "json_object"}}}, {"output": OutputFormat("json_object")}),
    ({"text": {"format": {"type": "text"}}}, {}),
    ({"reasoning": {"effort": "low", "summary": "auto"}},
     {"thinking": Thinking("low", visible=True)}),
    ({"reasoning": {"effort": "high"}}, {"thinking": Thinking("high")}),
    ({"service_tier": "flex", "prompt_cache_key": "k"}, {"tier": "flex", "cache_key": "k"}),
    ({"user": "u", "safety_identifier": "s"}, {"user": "s"}),
    ({"metadata": {"a": "b"}, "store": False}, {"metadata": {"a": "b"}, "store": False}),
    ({"truncation": "auto", "background": None}, {"extra": {"truncation": "auto"}}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "meaning"), FIELDS)
def test_a_request_becomes_a_prompt(fields: Any, meaning: dict[str, Any]) -> None:
    assert parsed(**fields) == asked()._replace(**meaning)


def test_a_hosted_search_is_chosen_by_the_name_that_it_has() -> None:
    prompt = parsed(tools=[SEARCH], tool_choice={"type": SEARCH["type"]})
    assert prompt.tool_choice == ToolChoice("named", (prompt.tools[0].name,))


def a(kind: str, role: str = "user", **facts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": kind, **facts}]}


def function_call(**more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": "c1", "name": "tide", "arguments": "{}", **more}


SECRET = Opaque("openai", "encrypted", "ZW5j", id="rs_1")
SUMMARY = [{"type": "summary_text", "text": "hm"}, {"type": "summary_text", "text": "so"}]
THINKING = {"type": "reasoning", "id": "rs_1", "summary": SUMMARY, "encrypted_content": "ZW5j"}
PNG = Media("image", "image/png", "iVBORw0KGgo=", detail="low")
PNG_URL = "data:image/png;base64,iVBORw0KGgo="
PDF = Media("document", "application/pdf", "JVBERi0=", name="a.pdf")
COMPACTION = {"type": "compaction", "encrypted_content": "eHh4"}
ITEMS: list[tuple[dict[str, Any], list[Content]]] = [
    ({"role": "user", "content": "t"}, [Text("t")]),
    (a("input_text", text="t"), [Text("t")]),
    (a("output_text", "assistant", text="t", annotations=[], logprobs=[]), [Text("t")]),
    (a("refusal", "assistant", refusal="no"), [Refusal("no")]),
    (a("input_image", image_url=PNG_URL, detail="low"), [PNG]),
    (a("input_image", file_id="f"), [Media("image", file_id="f", vendor="openai")]),
    (a("input_file", file_data="JVBERi0=", filename="a.pdf"), [PDF]),
    (a("input_file", file_url="https://x.example/a.pdf"),
     [Media("document", "application/pdf", url="https://x.example/a.pdf")]),
    (a("input_file", file_id="f"), [Media("document", file_id="f", vendor="openai")]),
    (function_call(id="fc_1", status="completed"), [ToolCall("c1", "tide", "{}")]),
    (function_call(namespace="sea"), [ToolCall("c1", "tide", "{}", namespace="sea")]),
    ({"type": "custom_tool_call", "call_id": "c", "name": "sql", "input": "select"},
     [ToolCall("c", "sql", "select", True)]),
    (THINKING, [Reasoning("hm\n\nso", SECRET)]),
    ({"type": "reasoning", "content": [{"type": "reasoning_text", "text": "raw"}], "summary": []},
     [Reasoning("raw")]),
    (COMPACTION, [Native(ApiProtocol.RESPONSES, COMPACTION)]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "content"), ITEMS)
def test_an_item_is_made_of_parts(given: Any, content: list[Content]) -> None:
    role = given.get("role", "assistant")
    before = {"role": "user", "content": "hi"}
    assert parsed(before, given).messages[1:] == (Message(role, tuple(content)),)


def test_what_the_assistant_says_in_a_row_is_one_message() -> None:
    output = {"type": "function_call_output", "call_id": "c1", "output": [
        {"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": PNG_URL},
    ]}  # fmt: skip
    text = {"role": "assistant", "content": "t", "phase": "commentary"}
    said, result = parsed(THINKING, text, function_call(), output).messages
    assert [type(part) for part in said.content] == [Reasoning, Text, ToolCall]
    shown = PNG._replace(detail="")
    assert result == Message("user", (ToolResult("c1", (Text("see"), shown), name="tide"),))


def test_instructions_come_first_and_tools_may_stand_in_the_input() -> None:
    more = {"type": "additional_tools", "tools": [CUSTOM]}
    prompt = parsed(more, {"role": "developer", "content": "d"}, instructions="i")
    assert [(m.role, m.content) for m in prompt.messages] == [
        ("system", (Text("i"),)),
        ("developer", (Text("d"),)),
    ]
    assert prompt.tools == (SQL,)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"text": "x"}]}, "input[0].type"),
    ({"input": [a("film")]}, "input[0].content[0].type"),
    ({"input": [a("input_image")]}, "input[0].content[0].image_url"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output"}]}, "input[0].call_id"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"instructions": 5}, "instructions"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]},
     "tools[0].tools[0].name"),
    ({"tool_choice": 5}, "tool_choice"),
    ({"max_output_tokens": "many"}, "max_output_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_cannot_be_read_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        RESPONSES.parse_request({"model": "m", "input": "hi", **fields})
    assert caught.value.param == param and param in caught.value.message


# --- requests that go out

CONVERSATION = (
    Message("system", (Text("s"),)),
    Message("developer", (Text("d"),)),
    Message("user", (Text("t"), PNG, PDF)),
    Message("assistant", (Reasoning("hm", SECRET), Text("t"), ToolCall("c1", "tide", "{}"))),
    Message("user", (ToolResult("c1", (Text("see"), PNG), name="tide"),)),
    Message("assistant", (ToolCall("c2", "sql", "select", True),)),
    Message("user", (ToolResult("c2", (Text("1"),), name="sql", custom=True),)),
)
ROUND_TRIPS = {
    "sampling": asked(sampling=Sampling(0.5, 0.5, logprobs=3), max_tokens=16, stream=True),
    "tools": asked(tools=(TIDE, SQL), tool_choice=ToolChoice("auto"), parallel_tools=False),
    "a named tool": asked(tools=(TIDE,), tool_choice=ToolChoice("named", ("tide",))),
    "allowed tools": asked(tools=(TIDE,), tool_choice=ToolChoice("allowed", ("tide",), True)),
    "a schema": asked(output=OUTPUT, verbosity="low"),
    "JSON": asked(output=OutputFormat("json_object")),
    "reasoning": asked(thinking=Thinking("low", visible=True), tier="flex"),
    "whose it is": asked(user="u", cache_key="k", metadata={"a": "b"}),
    "an unknown field": asked(extra={"truncation": "auto"}),
    "a conversation": Prompt("m", CONVERSATION, ApiProtocol.RESPONSES),
}
OFFICIAL = Traits(official=True, developer_role=True)


def sent(prompt: Prompt, traits: Traits = OFFICIAL, losses: Losses | None = None) -> dict[str, Any]:
    body = RESPONSES.render_request(prompt, traits, losses or Losses())
    return dict(json.loads(json.dumps(body)))


@pytest.mark.parametrize("prompt", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_all_that_the_protocol_can_say_survives_it(prompt: Prompt) -> None:
    assert RESPONSES.parse_request(sent(prompt)) == prompt._replace(store=False)


def test_a_custom_tool_is_chosen_as_one() -> None:
    prompt = asked(tools=(SQL,), tool_choice=ToolChoice("named", ("sql",)))
    assert sent(prompt)["tool_choice"] == {"type": "custom", "name": "sql"}


CLAUDES = ApiProtocol.MESSAGES
NO_ARGUMENTS = {"type": "object", "properties": {}}
TOLD = Prompt("m", (Message("system", (Text("s"),)), Message("user", (Text("t"),))), CLAUDES)
SAID = Message("assistant", (Text("t"), Reasoning("", SECRET)))
ASKED_FOR: list[tuple[Prompt, Traits, dict[str, Any]]] = [
    # prompt, target, what it is sent
    (asked(), Traits(), {"store": False, "include": ["reasoning.encrypted_content"]}),
    (asked(store=True), Traits(), {"store": True}),
    (asked(user="u"), Traits(), {"user": "u", "safety_identifier": None}),
    (asked(user="u"), OFFICIAL, {"user": None, "safety_identifier": "u"}),
    (asked(thinking=Thinking("max")), Traits(efforts=("low",)), {"reasoning": {"effort": "low"}}),
    (asked(thinking=Thinking(visible=True)), Traits(), {"reasoning": {"summary": "auto"}}),
    (asked(sampling=Sampling(logprobs=0)), Traits(), {"top_logprobs": None, "include": [
        "reasoning.encrypted_content", "message.output_text.logprobs"]}),
    # without `strict`, the server would change the schema
    (asked(tools=(Tool("f"),)), Traits(), {"tools": [
        {"type": "function", "name": "f", "parameters": NO_ARGUMENTS, "strict": False}]}),
    (asked(output=OUTPUT._replace(strict=None, description="")), Traits(), {"text": {"format": {
        "type": "json_schema", "name": "o", "schema": SCHEMA, "strict": False}}}),
    (asked(tool_choice=ToolChoice("auto"), parallel_tools=False), Traits(),
     {"tool_choice": None, "parallel_tool_calls": None}),
    (asked(tools=(Tool("web_search", kind="hosted"),)), Traits(),
     {"tools": [{"type": "web_search"}]}),
    (TOLD, Traits(), {"instructions": "s", "input": [{"role": "user", "content": "t"}]}),
    (Prompt("m", (Message("developer", (Text("d"),)),)), Traits(),
     {"instructions": None, "input": [{"role": "system", "content": "d"}]}),
    # reasoning goes only before what it led to
    (Prompt("m", (SAID,)), Traits(), {"input": [{"role": "assistant", "content": "t"}]}),
    (asked(ToolResult("c", (Text("no"),), is_error=True)), Traits(),
     {"input": [{"type": "function_call_output", "call_id": "c", "output": "Error: no"}]}),
    (asked(source=CLAUDES, extra={"truncation": "auto"}), Traits(), {"truncation": None}),
    (asked(Media("document", file_id="f"), Media("image", file_id="g")), Traits(),
     {"input": [{"role": "user", "content": [
         {"type": "input_file", "file_id": "f"},
         {"type": "input_image", "file_id": "g", "detail": "auto"}]}]}),
    (asked(Media("document", url="https://x.example/"), Media("document", "text/csv", "YSxi")),
     Traits(), {"input": [{"role": "user", "content": [
         {"type": "input_file", "file_url": "https://x.example/"},
         {"type": "input_text", "text": "a,b"}]}]}),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "traits", "wanted"), ASKED_FOR)
def test_a_target_is_asked_in_its_own_way(prompt: Prompt, traits: Traits, wanted: Any) -> None:
    body = sent(prompt, traits)
    assert {key: body.get(key) for key in wanted} == wanted and None not in body.values()


def test_a_limit_below_the_least_is_raised() -> None:
    losses = Losses()
    assert sent(asked(max_tokens=1), losses=losses)["max_output_tokens"] == 16
    assert losses.found == [Loss("raised", "max_tokens", harmful=False)]


def test_a_cache_mark_is_written_on_the_part_that_bears_it() -> None:
    mark = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}
    messages = (
        Message("system", (Text("s", cache="1h"),)),
        Message("user", (Text("a", cache="5m"),)),
        Message("assistant", (ToolCall("c", "f"),)),
        Message("user", (ToolResult("c", (Text("r"),), name="f", cache="5m"),)),
    )
    body = sent(Prompt("m", messages, source=ApiProtocol.MESSAGES))
    text = {"type": "input_text"}
    assert "instructions" not in body
    assert [item.get("content", item.get("output")) for item in body["input"]] == [
        [{**text, "text": "s", **mark}],
        [{**text, "text": "a", **mark}],
        None,
        [{**text, "text": "r", **mark}],
    ]


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_media_that_have_no_place_make_the_target_unfit(kind: str) -> None:
    with pytest.raises(UpstreamUnfit) as caught:
        sent(asked(Media(kind, f"{kind}/x", "AAAA")))
    assert (caught.value.code, caught.value.param) == ("unsupported_modality", kind)


# --- answers that come in


def gathered(*events: dict[str, Any]) -> Choice:
    decoder, gatherer = RESPONSES.decoder("openai"), Gatherer()
    for event in events:
        for part in decoder.feed(event):
            gatherer.add(part)
    return gatherer.choices()[0]


def grows(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", "output_index": 0, "item_id": "x", **more}


def ends(*output: Any, kind: str = "completed", **more: Any) -> dict[str, Any]:
    return {
        "type": f"response.{kind}",
        "response": {"status": kind, "output": list(output), **more},
    }


SPOKEN = {"type": "message", "content": [{"type": "output_text", "text": "t"}]}
RAW = grows("reasoning_text.delta", content_index=0, delta="hm")
DRAWN = {"type": "image_generation_call", "status": "completed", "result": "iVBORw0KGgo="}
CALLED = ToolCall("c1", "tide", '{"a":1}')
HEARD: list[tuple[list[dict[str, Any]], tuple[Block, ...]]] = [
    ([ends()], ()),
    ([ends(SPOKEN)], (Text("t"),)),
    ([grows("output_text.delta", delta="t"), ends(SPOKEN)], (Text("t"),)),
    ([grows("output_item.done", item=SPOKEN), ends(SPOKEN)], (Text("t"),)),
    ([RAW, RAW, grows("output_item.done", item={"type": "reasoning"})], (Reasoning("hmhm"),)),
    ([grows("output_item.done", item=DRAWN)], (PNG._replace(detail=""),)),
    ([grows("output_item.added", item=function_call(arguments="")),
      grows("output_item.done", item=function_call(arguments='{"a":1}'))], (CALLED,)),
    ([grows("function_call_arguments.delta", delta="{}")], ()),
    ([grows("code_interpreter_call.in_progress"), {"type": "response.of_tomorrow"}], ()),
]  # fmt: skip


@pytest.mark.parametrize(("events", "content"), HEARD)
def test_a_stream_in_any_form_is_read(events: Any, content: tuple[Block, ...]) -> None:
    assert gathered(*events).content == content


def test_an_end_that_comes_twice_is_one_end() -> None:
    decoder = RESPONSES.decoder("openai")
    assert decoder.feed(ends()) and not decoder.feed(ends())


# --- answers that go out

BLOCKS: tuple[Block, ...] = (
    Reasoning("hm", Opaque("anthropic", "signature", "c2ln")),
    Text("Low tide.", (Citation("https://tides.example/", "Tides", 0, 3),)),
    Refusal("no"),
    ToolCall("c1", "tide", '{"port":"Brest"}', opaque=Opaque("google", "thought", "dGhv")),
    ToolCall("c2", "moon"),
    ToolCall("c3", "sql", "select 1", custom=True),
    Media("image", "image/png", "iVBORw0KGgo="),
)
LABEL = AnswerLabel("abc", 1_764_000_000, "m")


def told(blocks: Iterable[Block] = BLOCKS, finish: Finish = Finish.STOP) -> list[Any]:
    """The events of a stream."""
    encoder = RESPONSES.encoder(asked(), LABEL)
    parts = [part for key, block in enumerate(blocks) for part in parts_of(block, key)]
    raw = b"".join([*map(encoder.encode, [*parts, Finished(finish)]), encoder.end(Usage(5, 2))])
    named = [line[7:].decode() for line in raw.split(b"\n") if line.startswith(b"event: ")]
    events = events_of(raw)
    assert RESPONSES.strict(raw) and named == [event["type"] for event in events]
    return events


def short(kind: str) -> str:
    return kind.removeprefix("response.").removeprefix("output_item.")


GROWTH = {
    # how an item grows, between its being added and being done
    Text("a"): ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"],
    Refusal("a"): ["content_part.added", "refusal.delta", "refusal.done", "content_part.done"],
    ToolCall("c", "f", "{}"): ["function_call_arguments.delta", "function_call_arguments.done"],
    ToolCall("c", "f"): ["function_call_arguments.delta", "function_call_arguments.done"],
    ToolCall("c", "f", "a", True): ["custom_tool_call_input.delta", "custom_tool_call_input.done"],
    Reasoning("a"): [
        "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.done", "reasoning_summary_part.done",
    ],
    Reasoning(""): [],
}  # fmt: skip


@pytest.mark.parametrize(("block", "growth"), GROWTH.items())
def test_an_item_grows_step_by_step(block: Block, growth: list[str]) -> None:
    created, begun, *steps, end = [short(event["type"]) for event in told([block])]
    assert (created, begun, end) == ("created", "in_progress", "completed")
    assert steps == ["added", *growth, "done"]


def test_every_event_has_the_next_number() -> None:
    events = told()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_an_item_is_the_same_when_added_while_growing_and_when_done() -> None:
    events = told()
    added = [e for e in events if e["type"] == "response.output_item.added"]
    done = [e for e in events if e["type"] == "response.output_item.done"]
    growing = [e for e in events if "item_id" in e]
    assert [e["output_index"] for e in added] == [e["output_index"] for e in done] == [*range(8)]
    for one, other in zip(added, done, strict=True):
        same = ("id", "type", "call_id", "name")
        assert [one["item"].get(k) for k in same] == [other["item"].get(k) for k in same]
        assert one["item"].get("status", "in_progress") == "in_progress"
    assert {e["item_id"] for e in growing} <= {e["item"]["id"] for e in added}
    assert all(e["item_id"] == added[e["output_index"]]["item"]["id"] for e in growing)
    assert len({e["item"]["id"] for e in added}) == len(added)


def test_what_grows_says_where() -> None:
    for event in told():
        kind = short(event["type"])
        if kind.startswith(("content_part", "output_text", "refusal")):
            assert event["content_index"] == 0
        if kind.startswith("reasoning_summary"):
            assert event["summary_index"] == 0
        if kind.endswith("annotation.added"):
            assert (event["annotation_index"], event["annotation"]["start_index"]) == (0, 0)
        if kind == "output_text.delta":
            assert event["logprobs"] == []


def test_an_item_is_done_before_the_next_is_added() -> None:
    steps = [short(event["type"]) for event in told() if "item" in event]
    assert steps == ["added", "done"] * 8


def test_the_last_event_holds_all_that_was_told() -> None:
    *events, last = told()
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert last["response"]["output"] == done and last["response"]["status"] == "completed"
    lifecycle = [e["response"]["id"] for e in (*events, last) if "response" in e]
    assert lifecycle == ["resp_brabc"] * 3


def test_what_grew_adds_up_to_what_is_done() -> None:
    text = "".join(e["delta"] for e in told() if e["type"] == "response.output_text.delta")
    [part] = [e["part"] for e in told() if short(e["type"]) == "content_part.done"][:1]
    assert text == part["text"] == "Low tide." and part["annotations"][0]["title"] == "Tides"


@pytest.mark.parametrize("finish", [Finish.LENGTH, Finish.CONTENT_FILTER])
def test_an_answer_cut_short_is_incomplete(finish: Finish) -> None:
    reason = {"reason": "max_output_tokens" if finish is Finish.LENGTH else "content_filter"}
    *_, last = told([Text("a")], finish)
    whole = rendered((Text("a"),), Finished(finish))
    for response in (last["response"], whole):
        assert (response["status"], response["incomplete_details"]) == ("incomplete", reason)
    assert last["type"] == "response.incomplete" and gathered(last).finished.finish is finish


def test_a_stream_that_cannot_go_on_ends_with_what_was_told_so_far() -> None:
    encoder = RESPONSES.encoder(asked(), LABEL)
    parts = [*parts_of(Text("a"), 0), Open(1, Text()), Delta(1, "b")]
    raw = b"".join(map(encoder.encode, parts))
    last = ending(encoder.fail(BROKEN))
    assert last["sequence_number"] == len(events_of(raw))
    response = last["response"]
    assert (last["type"], response["status"], response["id"]) == (
        "response.failed", "failed", "resp_brabc",
    )  # fmt: skip
    assert response["error"] == {"code": "server_error", "message": BROKEN.message}
    assert [item["content"][0]["text"] for item in response["output"]] == ["a"]


def test_a_stream_that_fails_at_once_has_begun_all_the_same() -> None:
    events = events_of(RESPONSES.encoder(asked(), LABEL).fail(BROKEN))
    assert [short(event["type"]) for event in events] == ["created", "in_progress", "failed"]
    assert [event["sequence_number"] for event in events] == [0, 1, 2]


def rendered(blocks: tuple[Block, ...], finished: Finished = Finished(Finish.STOP)) -> Any:  # noqa: B008
    choices = [Choice(blocks, finished)]
    answer = RESPONSES.render_response(asked(), LABEL, choices, Usage(9, 4, 3, 2, 1), Losses())
    return json.loads(json.dumps(answer))


def test_a_rendered_answer_has_all_that_sdks_require() -> None:
    answer = rendered(BLOCKS)
    for key in ("parallel_tool_calls", "tool_choice", "tools", "error", "metadata"):
        assert key in answer
    head = {"id": "resp_brabc", "object": "response", "created_at": LABEL.created, "model": "m"}
    assert {key: answer[key] for key in head} == head and answer["status"] == "completed"
    assert answer["usage"] == {
        "input_tokens": 9, "output_tokens": 4, "total_tokens": 13,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
        "output_tokens_details": {"reasoning_tokens": 1},
    }  # fmt: skip


def test_a_rendered_answer_says_what_the_stream_says() -> None:
    output = rendered(BLOCKS)["output"]
    assert told()[-1]["response"]["output"] == output
    kinds = ["reasoning", "message", "message", "reasoning", "function_call", "function_call"]
    assert [one["type"] for one in output] == [*kinds, "custom_tool_call", "image_generation_call"]
    assert output[5]["arguments"] == "{}" and output[6]["input"] == "select 1"
    assert output[0]["encrypted_content"].startswith("br1.")
