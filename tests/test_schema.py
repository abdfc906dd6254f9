"""The dialects of JSON Schema that providers take."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bitrouter import (
    BadRequest,
    Loss,
    Losses,
    for_claude,
    for_gemini,
    for_old_gemini,
    from_gemini,
    is_recursive,
    object_schema,
    openai_schema,
    strict_for_openai,
)

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}


def an_object(**properties: Schema) -> Schema:
    """An object whose properties are all required."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def closed(**properties: Schema) -> Schema:
    return {**an_object(**properties), "additionalProperties": False}


NODE: Schema = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": []}
SCHEMAS: dict[str, Schema] = {
    "nothing": {},
    "a text": {"type": "string", "maxLength": 3, "pattern": "^a", "default": "a"},
    "an object": an_object(a=STRING, b={"type": "integer", "minimum": 1, "exclusiveMinimum": 0}),
    "optional fields": {
        "type": "object",
        "properties": {"a": STRING, "b": STRING},
        "required": ["a"],
    },
    "a map": {"type": "object", "additionalProperties": STRING},
    "a list": {"type": "array", "items": an_object(a=STRING), "minItems": 2, "uniqueItems": True},
    "a tuple": {"type": "array", "prefixItems": [STRING, {"const": 1}]},
    "choices": {"oneOf": [STRING, an_object(a={"enum": [1, 2, None]})]},
    "maybe a text": {"type": ["string", "null"], "format": "date-time"},
    "maybe an object": {"anyOf": [an_object(a=STRING), {"type": "null"}]},
    "a reference": {
        **an_object(a={"$ref": "#/$defs/x", "description": "An x."}),
        "$defs": {"x": an_object(b={"$ref": "#/$defs/y"}), "y": {"type": "number"}},
        "$schema": "https://json-schema.org/draft/2020-12/schema",
    },
    "an old reference": {
        **an_object(a={"allOf": [{"$ref": "#/definitions/x"}]}),
        "definitions": {"x": an_object(b=STRING)},
    },
    "names like keywords": an_object(
        const=STRING, properties=an_object(type=STRING), definitions=STRING, any_of=STRING
    ),
    "a pattern": {
        "type": "object",
        "patternProperties": {"^a": STRING},
        "not": {"required": ["z"]},
    },
    "a condition": {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": False},
    "booleans": {"type": "object", "properties": {"a": True, "b": False}},
    "odd values": {"type": 7, "properties": [], "required": "a", "enum": "x", "anyOf": {"a": 1}},
}
RECURSIVE: dict[str, Schema] = {
    "to itself": {"type": "object", "properties": {"next": {"$ref": "#"}}},
    "by a definition": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "in a circle": {
        "$ref": "#/$defs/a",
        "$defs": {"a": an_object(b={"$ref": "#/$defs/b"}), "b": an_object(a={"$ref": "#/$defs/a"})},
    },
    "the older way": {
        "$ref": "#/definitions/node",
        "definitions": {"node": {"items": {"$ref": "#/definitions/node"}}},
    },
}
DIALECTS: dict[str, Callable[[Any], Any]] = {
    "OpenAI, strict": strict_for_openai,
    "Claude": for_claude,
    "Gemini": for_gemini,
    "old Gemini": for_old_gemini,
    "from Gemini": from_gemini,
}
by_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


@by_dialect
@pytest.mark.parametrize(
    "schema", [*SCHEMAS.values(), *RECURSIVE.values()], ids=[*SCHEMAS, *RECURSIVE]
)
def test_a_schema_is_rewritten_without_being_changed(schema: Schema, dialect: Any) -> None:
    before = copy.deepcopy(schema)
    first = dialect(schema)
    assert schema == before
    assert dialect(schema) == first


@by_dialect
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_in_a_dialect_already_stays_as_it_is(name: str, dialect: Any) -> None:
    once = dialect(SCHEMAS[name])
    assert once is None or dialect(once) == once


def nested(depth: int) -> Schema:
    schema = STRING
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("depth", [70, 900])
@by_dialect
def test_a_schema_that_is_too_deep_is_refused(dialect: Any, depth: int) -> None:
    for key in ("items", "not", "anyOf", "properties"):
        schema: Any = STRING
        for _ in range(depth):
            inner = [schema] if key == "anyOf" else {"p": schema} if key == "properties" else schema
            schema = {"type": "object", key: inner}
        with pytest.raises(BadRequest, match="nested too deeply") as refused:
            dialect(schema)
        assert refused.value.param == "schema"


@by_dialect
def test_a_schema_of_sixty_levels_is_none_too_deep(dialect: Any) -> None:
    kept = dialect(an_object(a=nested(60)))
    assert kept is not None and json.dumps(kept).count("items") == 60


# Recursion.


@pytest.mark.parametrize("schema", RECURSIVE.values(), ids=RECURSIVE)
def test_a_schema_that_refers_to_itself_is_known_to(schema: Schema) -> None:
    assert is_recursive(schema)
    assert for_claude(schema) is None


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_can_be_written_out_is_not_recursive(schema: Schema) -> None:
    assert not is_recursive(schema)


def test_two_references_to_one_definition_are_no_recursion() -> None:
    twice = an_object(a={"$ref": "#/$defs/x"}, b={"$ref": "#/$defs/x"})
    assert not is_recursive({**twice, "$defs": {"x": STRING}})


def test_a_definition_that_is_called_like_a_recursive_one_is_not_it() -> None:
    assert not is_recursive({"$defs": {"a": {"properties": {"$ref": STRING}}}})


# Tools.

OBJECTS: list[tuple[Schema | None, Schema]] = [
    (None, {"type": "object", "properties": {}}),
    ({}, {"type": "object", "properties": {}}),
    ({"properties": {"a": STRING}}, {"type": "object", "properties": {"a": STRING}}),
    (an_object(a=STRING), an_object(a=STRING)),
    ({"$ref": "#/$defs/x"}, {"$ref": "#/$defs/x"}),
    ({"anyOf": [STRING]}, {"anyOf": [STRING]}),
]


@pytest.mark.parametrize(("schema", "wanted"), OBJECTS)
def test_a_tool_s_input_is_an_object(schema: Schema | None, wanted: Schema) -> None:
    assert object_schema(schema) == wanted


# OpenAI's strict subset.

STRICT: list[tuple[Schema, Schema | None]] = [
    # schema                                                            as strict mode takes it
    (an_object(a=STRING), closed(a=STRING)),
    (closed(a=STRING), closed(a=STRING)),
    (an_object(a=an_object(b=STRING)), closed(a=closed(b=STRING))),
    (
        an_object(a={"type": "array", "items": an_object(b=STRING)}),
        closed(a={"type": "array", "items": closed(b=STRING)}),
    ),
    (
        an_object(a={"anyOf": [STRING, {"type": "null"}]}),
        closed(a={"anyOf": [STRING, {"type": "null"}]}),
    ),
    (
        {**an_object(a={"$ref": "#/$defs/x"}), "$defs": {"x": an_object(b=STRING)}},
        {**closed(a={"$ref": "#/$defs/x"}), "$defs": {"x": closed(b=STRING)}},
    ),
    ({"type": "object"}, {"type": "object", "additionalProperties": False}),
    (
        {**an_object(a={"$ref": "#"}), "title": "Again"},
        {**closed(a={"$ref": "#"}), "title": "Again"},
    ),
    ({"type": "object", "properties": {"a": STRING}}, None),
    ({**an_object(a=STRING), "additionalProperties": True}, None),
    ({**an_object(a=STRING), "additionalProperties": STRING}, None),
    (STRING, None),
    ({"type": "array", "items": STRING}, None),
    ({**an_object(a=STRING), "anyOf": [STRING]}, None),
    (an_object(a={"oneOf": [STRING]}), None),
    (an_object(a={"allOf": [STRING]}), None),
    (an_object(a={"not": STRING}), None),
    (an_object(a={"if": STRING, "then": STRING}), None),
    (an_object(a={"type": "object", "patternProperties": {"x": STRING}}), None),
    ({}, None),
]
LOOSE: list[Schema] = [
    an_object(a={"$ref": "#/$defs/x", "description": "An x."}) | {"$defs": {"x": STRING}},
    an_object(a={**an_object(), "dependentRequired": {"b": ["c"]}}),
    an_object(a={**an_object(), "dependentSchemas": {"b": an_object()}}),
]


@pytest.mark.parametrize(("schema", "wanted"), STRICT)
def test_a_schema_is_strict_only_if_it_means_the_same(
    schema: Schema, wanted: Schema | None
) -> None:
    losses = Losses()
    assert strict_for_openai(schema) == wanted
    found = openai_schema(schema, True, losses, "here")
    assert found == ((schema, False) if wanted is None else (wanted, True))
    assert losses.found == ([Loss("strict_schema_unsupported", "here")] if wanted is None else [])


@pytest.mark.parametrize("schema", LOOSE, ids=["a reference with words", "required", "schemas"])
def test_what_openai_refuses_in_a_strict_schema_is_not_sent_as_one(schema: Schema) -> None:
    found = strict_for_openai(schema)
    assert found is None or not any(
        ("$ref" in node and len(node) > 1) or any("dependent" in key for key in node)
        for node in nodes(found)
    )


def test_required_names_that_are_no_texts_make_no_strict_schema() -> None:
    assert strict_for_openai({**an_object(a=STRING), "required": [{"a": 1}]}) is None


@pytest.mark.parametrize("strict", [False, None])
def test_a_schema_that_is_not_strict_is_left_alone(strict: bool | None) -> None:
    losses = Losses()
    assert openai_schema(SCHEMAS["a map"], strict, losses, "") == (SCHEMAS["a map"], strict)
    assert losses.found == []


# Anthropic's subset.


def nodes(schema: Any) -> Iterator[Schema]:
    """Every schema within a schema."""
    if not isinstance(schema, dict):
        return
    yield schema
    inner: list[Any] = [schema.get(k) for k in ("items", "additionalProperties", "not")]
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        inner += schema[key] if isinstance(schema.get(key), list) else []
    for key in ("properties", "$defs", "definitions"):
        inner += schema[key].values() if isinstance(schema.get(key), dict) else []
    for one in inner:
        yield from nodes(one)


CLAUDE: list[tuple[Schema, Schema]] = [
    # schema                                      as Claude takes it
    ({"type": "string", "maxLength": 3}, {"type": "string", "description": "maxLength: 3"}),
    (
        {"type": "integer", "minimum": 1, "maximum": 9, "description": "How many."},
        {"type": "integer", "description": "How many. (minimum: 1; maximum: 9)"},
    ),
    ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
    ({"type": "string", "format": "iban"}, {"type": "string", "description": 'format: "iban"'}),
    ({"type": "string", "default": "a"}, {"type": "string", "description": 'default: "a"'}),
    (
        {"type": "array", "items": STRING, "minItems": 1},
        {"type": "array", "items": STRING, "minItems": 1},
    ),
    ({"type": "array", "minItems": 2}, {"type": "array", "description": "minItems: 2"}),
    ({"oneOf": [STRING, {"type": "null"}]}, {"anyOf": [STRING, {"type": "null"}]}),
    ({"type": "string", "enum": ["a"]}, {"enum": ["a"]}),
    ({"type": "string", "const": "a"}, {"const": "a"}),
    (an_object(a=STRING), closed(a=STRING)),
    ({**an_object(a=STRING), "additionalProperties": True}, closed(a=STRING)),
    (
        an_object(a={"$ref": "#/$defs/x", "description": "An x."}) | {"$defs": {"x": an_object()}},
        closed(a={"$ref": "#/$defs/x"}) | {"$defs": {"x": closed()}},
    ),
    (
        {"$schema": "x", "$id": "y", "type": "string", "title": "T"},
        {"type": "string", "title": "T"},
    ),
]


@pytest.mark.parametrize(("schema", "wanted"), CLAUDE)
def test_what_claude_lacks_is_said_in_words(schema: Schema, wanted: Schema) -> None:
    assert for_claude(schema) == wanted


CLAUDE_KNOWS = {
    "type", "enum", "const", "anyOf", "allOf", "$defs", "definitions", "$ref", "properties",
    "required", "items", "description", "title", "additionalProperties", "format", "minItems",
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_claude_gets_only_what_it_knows(name: str) -> None:
    for node in nodes(for_claude(SCHEMAS[name])):
        assert set(node) <= CLAUDE_KNOWS
        assert node.get("additionalProperties") in (None, False)


BEYOND = [
    # how many   what each is                      whether Claude takes them
    (24, {"optional": True}, True),
    (25, {"optional": True}, False),
    (16, {"anyOf": [STRING, {"type": "null"}]}, True),
    (17, {"anyOf": [STRING, {"type": "null"}]}, False),
    (17, {"oneOf": [STRING, {"type": "null"}]}, False),
    (17, {"type": ["string", "null"]}, False),
    (100, STRING, True),
]


@pytest.mark.parametrize(("count", "each", "taken"), BEYOND)
def test_claude_takes_so_many_options_and_no_more(count: int, each: Schema, taken: bool) -> None:
    optional = each.get("optional", False)
    schema = an_object(**{f"p{n}": STRING if optional else each for n in range(count)})
    if optional:
        schema["required"] = []
    assert (for_claude(schema) is not None) == taken


# Gemini, newer and older.

GEMINI: list[tuple[Schema, Schema]] = [
    # schema                                      as newer models take it
    ({"$schema": "x", **an_object(a=STRING)}, an_object(a=STRING)),
    ({"const": "a"}, {"enum": ["a"]}),
    ({"type": "string", "maxLength": 3, "default": "a"}, {"type": "string"}),
    ({"allOf": [an_object(a=STRING), an_object(b=STRING)]}, an_object(a=STRING, b=STRING)),
    ({"type": "array", "prefixItems": [STRING]}, {"type": "array", "prefixItems": [STRING]}),
    (
        an_object(a={"$ref": "#/definitions/x", "title": "X"}) | {"definitions": {"x": STRING}},
        an_object(a={"$ref": "#/$defs/x"}) | {"$defs": {"x": STRING}},
    ),
    (closed(a=STRING), closed(a=STRING)),
    (
        {**an_object(a=STRING), "propertyOrdering": ["a"]},
        {**an_object(a=STRING), "propertyOrdering": ["a"]},
    ),
    (RECURSIVE["by a definition"], {"$ref": "#/$defs/node", "$defs": {"node": NODE}}),
]


@pytest.mark.parametrize(("schema", "wanted"), GEMINI)
def test_a_newer_gemini_takes_json_schema(schema: Schema, wanted: Schema) -> None:
    assert for_gemini(schema) == wanted


def test_a_reference_that_was_alone_in_all_of_has_no_neighbours_for_gemini() -> None:
    """As some generators write a field with a description and a type of its own."""
    field = {"description": "An x.", "allOf": [{"$ref": "#/$defs/x"}]}
    found = for_gemini(an_object(a=field) | {"$defs": {"x": STRING}})
    assert all(set(node) <= {"$ref", "$defs"} for node in nodes(found) if "$ref" in node)


OLD_GEMINI: list[tuple[Schema, Schema]] = [
    # schema                                      as older models take it
    (
        an_object(a=STRING),
        {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}, "required": ["a"]},
    ),
    (closed(), {"type": "OBJECT", "properties": {}, "required": []}),
    ({"type": ["string", "null"]}, {"type": "STRING", "nullable": True}),
    ({"anyOf": [STRING, {"type": "null"}]}, {"type": "STRING", "nullable": True}),
    (
        {"oneOf": [STRING, {"type": "integer"}, {"type": "null"}]},
        {"anyOf": [{"type": "STRING"}, {"type": "INTEGER"}], "nullable": True},
    ),
    ({"enum": [1, 2]}, {"type": "STRING", "format": "enum", "enum": ["1", "2"]}),
    ({"const": "a"}, {"type": "STRING", "format": "enum", "enum": ["a"]}),
    (
        {"type": ["string", "null"], "enum": ["a", None]},
        {"type": "STRING", "format": "enum", "enum": ["a"], "nullable": True},
    ),
    ({"type": "integer", "exclusiveMinimum": 3}, {"type": "INTEGER", "minimum": 3}),
    ({"type": "string", "format": "date-time"}, {"type": "STRING", "format": "date-time"}),
    ({"type": "string", "format": "email"}, {"type": "STRING"}),
    ({"type": "string", "default": "a", "examples": ["b"]}, {"type": "STRING"}),
    (
        SCHEMAS["a reference"],
        {
            "type": "OBJECT",
            "required": ["a"],
            "properties": {
                "a": {
                    "type": "OBJECT",
                    "description": "An x.",
                    "required": ["b"],
                    "properties": {"b": {"type": "NUMBER"}},
                }
            },
        },
    ),
    ({"$ref": "#/$defs/gone"}, {"type": "OBJECT"}),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": STRING}}, {"type": "STRING"}),
]


@pytest.mark.parametrize(("schema", "wanted"), OLD_GEMINI)
def test_an_older_gemini_takes_its_own_kind_of_schema(schema: Schema, wanted: Schema) -> None:
    assert for_old_gemini(schema) == wanted


@pytest.mark.parametrize("schema", RECURSIVE.values(), ids=RECURSIVE)
def test_a_recursive_schema_is_written_out_for_some_levels(schema: Schema) -> None:
    found = for_old_gemini(schema)
    assert not any("$ref" in node for node in nodes(found))
    assert 3 < len([*nodes(found)]) < 40


def test_references_that_multiply_are_written_out_up_to_a_bound() -> None:
    doubled = {
        f"d{n}": an_object(**{c: {"$ref": f"#/$defs/d{n + 1}"} for c in "abcdefgh"})
        for n in range(8)
    }
    assert len(json.dumps(for_old_gemini({"$ref": "#/$defs/d0", "$defs": doubled}))) < 4_000_000


FROM_GEMINI: list[tuple[Any, Schema]] = [
    # as Google's callers write it                        JSON Schema
    (
        {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}},
        {"type": "object", "properties": {"a": STRING}},
    ),
    ({"type": "STRING", "nullable": True}, {"type": ["string", "null"]}),
    ({"type": "STRING", "nullable": False}, STRING),
    ({"type": "TYPE_UNSPECIFIED"}, {}),
    (
        {"type": "STRING", "format": "enum", "enum": ["a"], "nullable": True},
        {"type": ["string", "null"], "enum": ["a", None]},
    ),
    ({"any_of": [{"type": "STRING"}]}, {"anyOf": [STRING]}),
    (
        {"anyOf": [{"type": "STRING"}, {"type": "INTEGER"}], "nullable": True},
        {"anyOf": [STRING, {"type": "integer"}, {"type": "null"}]},
    ),
    (
        {"type": "ARRAY", "min_items": "2", "maxItems": 3},
        {"type": "array", "minItems": 2, "maxItems": 3},
    ),
    ({"type": "OBJECT", "property_ordering": ["a"]}, {"type": "object", "propertyOrdering": ["a"]}),
    (
        {"type": "OBJECT", "properties": {"any_of": {"type": "STRING", "max_length": "3"}}},
        {"type": "object", "properties": {"any_of": {"type": "string", "maxLength": 3}}},
    ),
    (an_object(a=STRING), an_object(a=STRING)),
    (None, {}),
    ("x", {}),
]


@pytest.mark.parametrize(("schema", "wanted"), FROM_GEMINI)
def test_google_s_own_kind_of_schema_is_read(schema: Any, wanted: Schema) -> None:
    assert from_gemini(schema) == wanted


BACK = ["a text", "an object", "optional fields", "maybe a text", "a reference"]


@pytest.mark.parametrize("name", BACK)
def test_what_an_older_gemini_is_told_reads_as_what_was_meant(name: str) -> None:
    meant = from_gemini(for_old_gemini(SCHEMAS[name]))
    assert meant["type"] == SCHEMAS[name]["type"]
    assert meant.get("required") == SCHEMAS[name].get("required")
    assert meant.get("properties", {}).keys() == SCHEMAS[name].get("properties", {}).keys()
