"""Changes of a request's body by JSON pointer, and what the configuration puts into requests."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from typing import Any

import pytest

from bitrouter import (
    CHAT_OP,
    ApiProtocol,
    BadRequest,
    BodyEdit,
    Change,
    ChatCompatibility,
    Document,
    Router,
    Shape,
    Target,
    active_providers,
    finished,
    parse_config,
    shaped,
)

CC, RE, ME, GC = ApiProtocol


def changed(text: str, *changes: Change) -> str:
    return Document(text.encode()).changed(changes).raw.decode()


# fmt: off
CHANGES = [
    # the body                   the change                               the body then
    ('{"a" : 1.0}',              Change("/a", 2),                         '{"a" : 2}'),
    ('{"a" : 1.0}',              Change("/b", [True]),                    '{"a" : 1.0,"b":[true]}'),
    ('{}',                       Change("/a", "é"),                       '{"a":"\\u00e9"}'),
    ('{ }',                      Change("/a/b/c", 1),                     '{"a":{"b":{"c":1}} }'),
    ('{"a":{}}',                 Change("/a/b/-", 1),                     '{"a":{"b":[1]}}'),
    ('{"a":[1, 2]}',             Change("/a/-", 3),                       '{"a":[1, 2,3]}'),
    ('{"a":[1, 2]}',             Change("/a/1", 3),                       '{"a":[1, 3]}'),
    ('{"a":[1, 2]}',             Change("/a/0", 3, insert=True),          '{"a":[3,1, 2]}'),
    ('{"a":[]}',                 Change("/a/0", 3, insert=True),          '{"a":[3]}'),
    ('{"a":[1, {"b": 2}]}',      Change("/a/1/b", None),                  '{"a":[1, {"b": null}]}'),
    ('{"a":1, "b":2, "c":3}',    Change("/a", delete=True),               '{"b":2, "c":3}'),
    ('{"a":1, "b":2, "c":3}',    Change("/b", delete=True),               '{"a":1, "c":3}'),
    ('{"a":1, "b":2, "c":3}',    Change("/c", delete=True),               '{"a":1, "b":2}'),
    ('{ "a" : 1 }',              Change("/a", delete=True),               '{ }'),
    ('{"a":[1, 2, 3]}',          Change("/a/1", delete=True),             '{"a":[1, 3]}'),
    ('{"a":1}',                  Change("/x/y", delete=True),             '{"a":1}'),
    ('{"a/b":1,"c~d":2}',        Change("/a~1b", 3),                      '{"a/b":3,"c~d":2}'),
    ('{"a/b":1,"c~d":2}',        Change("/c~0d", delete=True),            '{"a/b":1}'),
    ('{"é":"ü","a":{"b":1}}',    Change("/a/b", 2),                       '{"é":"ü","a":{"b":2}}'),
    ('{"a":"}]{","b":[{"c":1}]}', Change("/b/0/c", 2),                 '{"a":"}]{","b":[{"c":2}]}'),
    ('{"\\u0061":1}',            Change("/a", 2),                         '{"\\u0061":2}'),
]
# fmt: on


@pytest.mark.parametrize(("text", "change", "wanted"), CHANGES)
def test_only_what_is_named_changes(text: str, change: Change, wanted: str) -> None:
    assert changed(text, change) == wanted


@pytest.mark.parametrize(
    ("text", "change", "said"),
    [
        ('{"a":1}', Change("/a/b", 1), "no object or list at /a"),
        ('{"a":"text"}', Change("/a/0", 1), "no object or list at /a"),
        ('{"a":1,"a":2}', Change("/a", 3), "given twice"),
        ('{"a":{"b":1,"b":2}}', Change("/a/b", delete=True), "given twice"),
    ],
)
def test_what_cannot_be_changed_is_refused(text: str, change: Change, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        changed(text, change)


def some_json(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(4 if depth > 2 else 6)
    if kind == 4:
        return {rng.choice('abc"/~é'): some_json(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 5:
        return [some_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return [rng.choice([1, 1.5, -0.0]), 'x"{[,]}:é', None, True][kind]


def places(value: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """Every pointer into a value, with what holds it and the key there."""
    found = []
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        part = str(key).replace("~", "~0").replace("/", "~1")
        found.append((f"{at}/{part}", value, key))
        if isinstance(inner, dict | list):
            found += places(inner, f"{at}/{part}")
    return found


def test_any_change_is_what_it_would_be_in_a_plain_tree() -> None:
    rng = random.Random(11)
    for _ in range(800):
        body = {"k": some_json(rng), "l": some_json(rng)}
        text = json.dumps(body, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        wanted = copy.deepcopy(body)
        pointer, holder, key = rng.choice(places(wanted))
        if rng.random() < 0.4:
            del holder[key]
            got = changed(text, Change(pointer, delete=True))
        else:
            new = some_json(rng)
            holder[key] = new
            got = changed(text, Change(pointer, new))
        assert json.loads(got) == wanted


# --- fields and system prompts

PARAMS = {"temperature": 0.5, "max_tokens": 9, "stop": "X", "reasoning_effort": "low", "own": 1}
PLACED: list[tuple[ApiProtocol, dict[str, Any], dict[str, Any]]] = [
    (CC, {"messages": []}, PARAMS),
    (CC, {"max_completion_tokens": 5, "temperature": 0, "stop": ["a"]},
     {"reasoning_effort": "low", "own": 1}),
    (CC, {"temperature": None}, PARAMS),
    (RE, {"input": "x"}, {"temperature": 0.5, "max_output_tokens": 9, "own": 1,
                          "reasoning": {"effort": "low"}}),
    (RE, {"reasoning": {"summary": "auto"}, "max_output_tokens": 1},
     {"temperature": 0.5, "own": 1, "reasoning": {"summary": "auto", "effort": "low"}}),
    (ME, {"max_tokens": 5}, {"temperature": 0.5, "stop_sequences": ["X"], "own": 1,
                             "output_config": {"effort": "low"}}),
    (GC, {"contents": []}, {"generationConfig": {
        "temperature": 0.5, "maxOutputTokens": 9, "stopSequences": ["X"],
        "thinkingConfig": {"thinkingLevel": "low"}}, "own": 1}),
    (GC, {"generation_config": {"max_output_tokens": 3, "temperature": 1}},
     {"generation_config": {"max_output_tokens": 3, "temperature": 1, "stopSequences": ["X"],
                            "thinkingConfig": {"thinkingLevel": "low"}}, "own": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("protocol", "body", "wanted"), PLACED)
def test_fields_go_where_their_protocol_has_them_if_the_request_lacks_them(
    protocol: ApiProtocol, body: dict[str, Any], wanted: dict[str, Any]
) -> None:
    document = Document(json.dumps(body).encode())
    assert shaped(document, Shape(PARAMS), protocol).value == {**body, **wanted}
    assert document.value == body


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
WHOLE: dict[str, Any] = {
    "tools": [TOOL],
    "tool_choice": "required",
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "r", "strict": True, "schema": SCHEMA},
    },
}


def test_tools_and_formats_are_said_in_the_words_of_each_protocol() -> None:
    def told(protocol: ApiProtocol) -> Any:
        return shaped(Document(b'{"model":"m"}'), Shape(WHOLE), protocol).value

    assert told(CC) == {"model": "m", **WHOLE}
    responses = told(RE)
    assert responses["tools"][0]["name"] == "f" and responses["tool_choice"] == "required"
    assert responses["text"]["format"]["schema"] == SCHEMA
    messages = told(ME)
    assert messages["tools"][0]["input_schema"] and messages["tool_choice"] == {"type": "any"}
    assert messages["output_config"]["format"]["schema"] == SCHEMA
    gemini = told(GC)
    assert gemini["tools"][0]["functionDeclarations"][0]["name"] == "f"
    assert gemini["generationConfig"]["responseJsonSchema"] == SCHEMA


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


USER = said("user", "Hi")
P = {"type": "text", "text": "P"}
SYSTEMS: list[tuple[Any, ...]] = [
    # a request                            with fill            with prepend        with replace
    (CC, {"messages": [USER]}, *[{"messages": [said("system", "P"), USER]}] * 3),
    (CC, {"messages": [said("developer", "S"), USER]},
     {}, {"messages": [said("developer", "P\n\nS"), USER]},
     {"messages": [said("system", "P"), USER]}),
    (CC, {"messages": [said("system", [{"type": "text", "text": "S"}]), USER, said("system", "T")]},
     {}, {"messages": [said("system", [P, {"type": "text", "text": "S"}]), USER,
                       said("system", "T")]},
     {"messages": [said("system", "P"), USER]}),
    (RE, {"input": "Hi"}, *[{"instructions": "P"}] * 3),
    (RE, {"instructions": "S", "input": "Hi"},
     {}, {"instructions": "P\n\nS"}, {"instructions": "P"}),
    (RE, {"input": [said("system", "S"), USER]},
     {}, {"instructions": "P"}, {"instructions": "P", "input": [USER]}),
    (ME, {"messages": []}, *[{"system": "P"}] * 3),
    (ME, {"system": "S"}, {}, {"system": "P\n\nS"}, {"system": "P"}),
    (ME, {"system": [{"type": "text", "text": "S"}]},
     {}, {"system": [P, {"type": "text", "text": "S"}]}, {"system": "P"}),
    (GC, {"contents": []}, *[{"systemInstruction": {"parts": [{"text": "P"}]}}] * 3),
    (GC, {"system_instruction": {"parts": [{"text": "S"}]}},
     {}, {"system_instruction": {"parts": [{"text": "P"}, {"text": "S"}]}},
     {"system_instruction": {"parts": [{"text": "P"}]}}),
    (GC, {"systemInstruction": "S"}, {}, {"systemInstruction": "P\n\nS"},
     {"systemInstruction": {"parts": [{"text": "P"}]}}),
    (GC, {"systemInstruction": {"parts": {"text": "S"}}},
     {}, {"systemInstruction": {"parts": [{"text": "P"}, {"text": "S"}]}},
     {"systemInstruction": {"parts": [{"text": "P"}]}}),
    (GC, {"systemInstruction": {"role": "system"}},
     {}, {"systemInstruction": {"role": "system", "parts": [{"text": "P"}]}},
     {"systemInstruction": {"parts": [{"text": "P"}]}}),
    # what is wrong with these, the upstream says
    (CC, {}, {}, {}, {}),
    (CC, {"messages": "Hi"}, {}, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["fill", "prepend", "replace"])
@pytest.mark.parametrize("row", SYSTEMS)
def test_a_system_prompt_goes_where_its_protocol_has_it(row: Any, mode: str) -> None:
    protocol, body, *wanted = row
    found = shaped(Document(json.dumps(body).encode()), Shape({}, "P", mode), protocol).value
    assert found == body | wanted[("fill", "prepend", "replace").index(mode)]


# --- what the provider gets


def a_target(edits: tuple[BodyEdit, ...] = (), chat: ChatCompatibility | None = None) -> Target:
    environ = {"OPENAI_API_KEY": "k"}
    loaded = parse_config("", environ)
    router = Router(loaded.config, active_providers(loaded.config, environ)[0])
    [target] = router.resolve("openai:m", CHAT_OP).chain
    return replace(target, shape=Shape(edits=edits), compatibility=chat)


def test_edits_are_made_in_their_order_and_nothing_else_changes() -> None:
    edits = (
        BodyEdit("/a", 1),
        BodyEdit("/a", 2),
        BodyEdit("/user", delete=True),
        BodyEdit("/tools/-", {"type": "x"}),
    )
    body = b'{"m": 1.0,  "user":"u","tools":[]}'
    assert finished(body, a_target(edits)) == b'{"m": 1.0,"tools":[{"type":"x"}],"a":2}'
    assert finished(body, a_target()) is body


def test_an_edit_that_cannot_be_made_says_whose_it_is() -> None:
    with pytest.raises(BadRequest, match="extra_body of openai: /a/b"):
        finished(b'{"a":1}', a_target((BodyEdit("/a/b", 1),)))


COMPATIBLE = [
    (ChatCompatibility(supports_store=False), {"store": True, "a": 1}, {"a": 1}),
    (ChatCompatibility(supports_stream_options=False), {"stream_options": {}, "a": 1}, {"a": 1}),
    (ChatCompatibility("max_tokens"), {"max_completion_tokens": 3}, {"max_tokens": 3}),
    (ChatCompatibility("max_completion_tokens"), {"max_tokens": 3}, {"max_completion_tokens": 3}),
    (ChatCompatibility("max_tokens"), {"max_tokens": 3}, {"max_tokens": 3}),
    (ChatCompatibility("max_tokens"), {"a": 1}, {"a": 1}),
]


@pytest.mark.parametrize(("chat", "body", "wanted"), COMPATIBLE)
def test_a_server_with_an_accent_gets_what_it_takes(
    chat: ChatCompatibility, body: dict[str, Any], wanted: dict[str, Any]
) -> None:
    got = finished(json.dumps(body).encode(), a_target(chat=chat))
    assert json.loads(got) == wanted
