"""The built-in model: words, tool calls, the smallest instance of a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bitrouter import (
    Close,
    Delta,
    Finish,
    Finished,
    Gatherer,
    Message,
    Open,
    OutputFormat,
    Prompt,
    Reasoning,
    StreamPart,
    Text,
    Thinking,
    Tool,
    ToolCall,
    Usage,
    echo_parts,
)

WEATHER = (Tool("weather"), Tool("clock"))


def prompt_of(text: str, tools: tuple[Tool, ...] = (), **more: Any) -> Prompt:
    return Prompt("echo/echo", (Message("user", (Text(text),)),), tools=tools, **more)


def parts_for(text: str, tools: tuple[Tool, ...] = (), **more: Any) -> list[StreamPart]:
    return echo_parts(prompt_of(text, tools, **more))[0]


def answer_to(prompt: Prompt) -> tuple[Any, ...]:
    gatherer = Gatherer()
    for part in echo_parts(prompt)[0]:
        gatherer.add(part)
    return gatherer.choices()[0].content


def said(text: str, tools: tuple[Tool, ...] = (), **more: Any) -> str:
    """What comes back as text."""
    content = answer_to(prompt_of(text, tools, **more))
    return "".join(block.text for block in content if isinstance(block, Text))


def shaped(schema: Any) -> str:
    """What comes back as text if it has to follow a schema."""
    return said("hello", output=OutputFormat("json_schema", schema=schema))


def called(text: str, tools: tuple[Tool, ...] = WEATHER) -> list[tuple[str, Any]]:
    """Which tools are called, and with what."""
    content = answer_to(prompt_of(text, tools))
    return [(b.name, json.loads(b.arguments)) for b in content if isinstance(b, ToolCall)]


TEXTS = [
    "hello",
    "two words",
    "  led by spaces",
    "ended by some \n",
    "a\n\nb\tc",
    "é 漢字 🙂",
    "a" * 9999,
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_answer_is_what_was_said(text: str) -> None:
    assert said(text) == text


def test_the_answer_comes_word_by_word() -> None:
    opened, *words, closed, _ = parts_for("one two  three ")
    assert words == [Delta(0, "one"), Delta(0, " two"), Delta(0, "  three ")]
    assert (opened, closed) == (Open(0, Text()), Close(0))


def test_a_text_of_any_length_comes_back_whole_and_in_bounds() -> None:
    text = "a b " * 40_000
    assert said(text) == text and len(parts_for(text)) < 60_000


def test_only_what_the_user_said_last_comes_back() -> None:
    messages = (
        Message("system", (Text("sys"),)),
        Message("user", (Text("one"),)),
        Message("assistant", (Text("two"),)),
        Message("user", (Text("three"), Text("four"))),
        Message("assistant", (Text("five"),)),
    )
    assert answer_to(Prompt("e", messages)) == (Text("three\nfour"),)
    assert answer_to(Prompt("e", messages[:1])) == (Text("(nothing was said)"),)


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_nothing_said_is_answered_all_the_same(text: str) -> None:
    assert said(text) == "(nothing was said)"


@pytest.mark.parametrize("text", ["hello", "call weather {}", ""])
def test_the_last_part_ends_the_answer(text: str) -> None:
    parts = parts_for(text, WEATHER)
    assert [isinstance(part, Finished) for part in parts] == [False] * (len(parts) - 1) + [True]


def finish_of(text: str) -> Finish:
    last = parts_for(text, WEATHER)[-1]
    assert isinstance(last, Finished)
    return last.finish


def test_the_finish_tells_a_call_from_a_text() -> None:
    assert finish_of("hello") is Finish.STOP
    assert finish_of("call clock") is Finish.TOOL_CALLS


# fmt: off
USAGES = [
    # the conversation, text     tokens
    ("",       "",               Usage(0, 5)),
    ("",       "hi",             Usage(1, 1)),
    ("",       "hell",           Usage(1, 1)),
    ("",       "hello",          Usage(2, 2)),
    ("b" * 359, "a" * 41,        Usage(100, 11)),
]
# fmt: on


@pytest.mark.parametrize(("before", "text", "usage"), USAGES)
def test_tokens_are_counted_by_four_characters(before: str, text: str, usage: Usage) -> None:
    messages = (Message("system", (Text(before),)), Message("user", (Text(text),)))
    assert echo_parts(Prompt("e", messages))[1] == usage


# fmt: off
CALLS = [
    # text                                        what is called
    ("call weather",                              [("weather", {})]),
    ("call weather {}",                           [("weather", {})]),
    ('Please call weather {"city": "Oslo"} now',  [("weather", {"city": "Oslo"})]),
    ('call weather {"a": {"b": [1, "}"]}} {x}',   [("weather", {"a": {"b": [1, "}"]}})]),
    ('call weather\n{"city":\n"Oslo"}',           [("weather", {"city": "Oslo"})]),
    ('call me later, but call clock {"at": 5}',   [("clock", {"at": 5})]),
    ("call nobody {}",                            []),
    ("call weather {broken}",                     []),
    ("recall weather {}",                         []),
    ("weather {}",                                []),
]
# fmt: on


@pytest.mark.parametrize(("text", "calls"), CALLS)
def test_a_tool_is_called_when_the_text_says_so(text: str, calls: list[tuple[str, Any]]) -> None:
    assert called(text) == calls
    assert bool(said(text, WEATHER)) is not bool(calls)


def test_a_call_is_counted_by_its_arguments() -> None:
    assert echo_parts(prompt_of("call clock", WEATHER))[1] == Usage(3, 1)


def test_a_tool_that_takes_free_text_gets_the_rest_of_it() -> None:
    tool = Tool("sql", kind="custom", namespace="db")
    [call] = answer_to(prompt_of("call sql select 1", (tool,)))
    assert call == ToolCall("call_echo_1", "sql", "select 1", True, namespace="db")


# fmt: off
WAYS_TO_ASK = [
    (Thinking(),                            False),
    (Thinking("none", visible=False),       False),
    (Thinking("low"),                       True),
    (Thinking(visible=True),                True),
    (Thinking(budget=1024, visible=False),  False),
]
# fmt: on


@pytest.mark.parametrize(("thinking", "seen"), WAYS_TO_ASK)
def test_who_asks_for_reasoning_sees_some(thinking: Thinking, seen: bool) -> None:
    first, *rest = answer_to(prompt_of("hello", thinking=thinking))
    assert isinstance(first, Reasoning) is seen and [first, *rest][-1] == Text("hello")
    assert not seen or first.text


def test_json_without_a_schema_holds_what_was_said() -> None:
    assert json.loads(said("hello", output=OutputFormat("json_object"))) == {"text": "hello"}


def test_a_tool_that_is_not_on_offer_is_not_called() -> None:
    assert called("call weather {}", ()) == []


# fmt: off
SCHEMAS = [
    # schema                                                                smallest instance
    ({"type": "string"},                                                    ""),
    ({"type": "string", "minLength": 3},                                    "xxx"),
    ({"type": "integer"},                                                   0),
    ({"type": "integer", "minimum": 3},                                     3),
    ({"type": "integer", "minimum": -3},                                    0),
    ({"type": "number", "minimum": 0.5},                                    0.5),
    ({"type": "integer", "minimum": 2.5},                                   3),
    ({"type": "boolean"},                                                   False),
    ({"type": "null"},                                                      None),
    ({"type": ["string", "null"]},                                          ""),
    ({"const": 7},                                                          7),
    ({"const": None},                                                       None),
    ({"enum": ["red", "green"]},                                            "red"),
    ({"type": "string", "enum": ["b", "a"], "minLength": 9},                "b"),
    ({"type": "array", "items": {"type": "string"}},                        []),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2},        [0, 0]),
    ({"type": "array", "minItems": 2, "items": {"type": "array", "minItems": 1,
      "items": {"enum": [5]}}},                                             [[5], [5]]),
    ({"type": "object"},                                                    {}),
    ({"type": "object", "properties": {"a": {"type": "string"}}},           {}),
    ({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}},
      "required": ["b"]},                                                   {"b": 0}),
    ({"properties": {"a": {"type": "boolean"}}, "required": ["a"]},         {"a": False}),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]},                    0),
    ({"oneOf": [{"const": "x"}]},                                           "x"),
    ({"allOf": [{"type": "string"}]},                                       ""),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"const": 1}}}, 1),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "string"}}},        ""),
    ({"$ref": "#/$defs/two words", "$defs": {"two words": {"const": 2}}},   2),
    ({"type": "object", "required": ["list"], "properties": {"list": {"$ref": "#/definitions/l"}},
      "definitions": {"l": {"type": "array", "minItems": 1, "items": {"$ref": "#/definitions/i"}},
                      "i": {"anyOf": [{"$ref": "#/definitions/e"}, {"type": "null"}]},
                      "e": {"enum": ["one", "two"]}}},                      {"list": ["one"]}),
    ({"$ref": "#/nowhere"},                                                 None),
    ({},                                                                    None),
]
# fmt: on


@pytest.mark.parametrize(("schema", "instance"), SCHEMAS, ids=range(len(SCHEMAS)))
def test_a_schema_is_answered_with_its_smallest_instance(schema: Any, instance: Any) -> None:
    assert json.loads(shaped(schema)) == instance


# fmt: off
ODD_SCHEMAS: list[Any] = [
    {"type": 3}, {"type": []}, {"enum": []}, {"anyOf": []}, {"anyOf": {}}, {"anyOf": [3]},
    {"$ref": 3}, {"$ref": ""}, {"$ref": "#"}, {"type": "array", "minItems": 10**12},
    {"type": "string", "minLength": 10**12}, {"type": "object", "properties": 3},
    {"type": "object", "properties": [], "required": 3}, {"type": "array", "minItems": "x"},
    {"type": "object", "properties": {"a": 3}, "required": ["a"]},
    {"type": "integer", "minimum": "x"},
]
# fmt: on


@pytest.mark.parametrize("schema", ODD_SCHEMAS, ids=repr)
def test_an_odd_schema_is_answered_with_something_bounded(schema: Any) -> None:
    assert len(shaped(schema)) < 20_000


def test_a_schema_without_end_is_answered_all_the_same() -> None:
    inner = {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#/$defs/x"}}}
    answer = json.loads(shaped({"$ref": "#/$defs/x", "$defs": {"x": inner}}))
    assert isinstance(answer["a"], dict)


# fmt: off
GROWING: list[Any] = [
    {"type": "array", "minItems": 2, "items": {"$ref": "#/$defs/a"}},
    {"type": "object", "required": ["b", "c"],
     "properties": {"b": {"$ref": "#/$defs/a"}, "c": {"$ref": "#/$defs/a"}}},
]
# fmt: on


@pytest.mark.parametrize("schema", GROWING, ids=["array", "object"])
def test_a_schema_that_doubles_at_every_step_is_answered_in_bounds(schema: Any) -> None:
    looped = {"$ref": "#/$defs/a", "$defs": {"a": schema}}
    assert len(shaped(looped)) < 20_000


def test_a_call_that_the_text_asks_for_comes_before_the_schema() -> None:
    output = OutputFormat("json_schema", schema={"type": "string"})
    [block] = answer_to(prompt_of("call clock {}", WEATHER, output=output))
    assert isinstance(block, ToolCall)


def test_a_hosted_tool_is_not_called() -> None:
    assert called("call weather {}", (Tool("weather", kind="hosted"),)) == []
