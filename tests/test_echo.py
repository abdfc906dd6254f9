"""The built-in model: words, tool calls, the smallest instance of a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bitrouter import Finish, Finished, Prompt, TextDelta, ToolCall, Usage, echo_parts

WEATHER = ("weather", "clock")


def said(text: str, **more: Any) -> str:
    """What comes back as text."""
    parts = echo_parts(Prompt("echo/echo", text, **more))
    return "".join(part.text for part in parts if isinstance(part, TextDelta))


def called(text: str, tools: tuple[str, ...] = WEATHER) -> list[tuple[str, Any]]:
    """Which tools are called, and with what."""
    parts = echo_parts(Prompt("echo/echo", text, tools))
    return [(p.name, json.loads(p.arguments)) for p in parts if isinstance(p, ToolCall)]


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
    *words, _ = echo_parts(Prompt("echo/echo", "one two  three "))
    assert words == [TextDelta("one"), TextDelta(" two"), TextDelta("  three ")]


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_nothing_said_is_answered_all_the_same(text: str) -> None:
    assert said(text) == "(nothing was said)"


@pytest.mark.parametrize("text", ["hello", "call weather {}", ""])
def test_the_last_part_ends_the_answer(text: str) -> None:
    parts = echo_parts(Prompt("echo/echo", text, WEATHER))
    assert [isinstance(part, Finished) for part in parts] == [False] * (len(parts) - 1) + [True]


def finished(prompt: Prompt) -> Finished:
    last = echo_parts(prompt)[-1]
    assert isinstance(last, Finished)
    return last


def test_the_finish_tells_a_call_from_a_text() -> None:
    assert finished(Prompt("e", "hello", WEATHER)).finish is Finish.STOP
    assert finished(Prompt("e", "call clock", WEATHER)).finish is Finish.TOOL_CALLS


# fmt: off
USAGES = [
    # characters of the conversation, text     tokens
    (0,   "",              Usage(0, 5)),
    (1,   "hi",            Usage(1, 1)),
    (4,   "hell",          Usage(1, 1)),
    (5,   "hello",         Usage(2, 2)),
    (400, "a" * 41,        Usage(100, 11)),
]
# fmt: on


@pytest.mark.parametrize(("size", "text", "usage"), USAGES)
def test_tokens_are_counted_by_four_characters(size: int, text: str, usage: Usage) -> None:
    assert finished(Prompt("e", text, size=size)).usage == usage


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
    assert bool(said(text, tools=WEATHER)) is not bool(calls)


def test_a_call_is_counted_as_a_token() -> None:
    assert finished(Prompt("e", "call clock", WEATHER, size=9)).usage == Usage(3, 1)


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
    assert json.loads(said("hello", schema=schema)) == instance


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
    assert len(said("hello", schema=schema)) < 20_000


def test_a_schema_without_end_is_answered_all_the_same() -> None:
    inner = {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#/$defs/x"}}}
    answer = json.loads(said("hello", schema={"$ref": "#/$defs/x", "$defs": {"x": inner}}))
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
    assert len(said("hello", schema=looped)) < 20_000


def test_a_call_that_the_text_asks_for_comes_before_the_schema() -> None:
    parts = echo_parts(Prompt("e", "call clock {}", WEATHER, schema={"type": "string"}))
    assert isinstance(parts[0], ToolCall)
