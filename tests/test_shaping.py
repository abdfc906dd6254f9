"""JSON changed in place, and what the configuration puts into requests and takes out of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from support import router_of

from bitrouter import (
    CHAT_OP,
    PLAIN,
    ApiProtocol,
    BadRequest,
    BodyEdit,
    Change,
    ChatCompatibility,
    Document,
    Shape,
    Target,
    finished,
    shaped,
)

CC, RE, ME, GC = ApiProtocol
Body = dict[str, Any]


def changed(text: str, *changes: Change) -> str:
    return Document(text.encode()).changed(changes).raw.decode()


def put(pointer: str, value: Any = 0) -> Change:
    return Change(pointer, value)


def gone(pointer: str) -> Change:
    return Change(pointer, delete=True)


def before(pointer: str, value: Any = 0) -> Change:
    return Change(pointer, value, insert=True)


# --- JSON changed in place

LIST = '{"a" : [ 1.0,\t2e3 , [3, 4] ]}'
# fmt: off
CHANGES = [
    # the body                        the change                  the body then
    # set
    ('{"a":1.50,"b" : [ ] }',         put("/a"),                  '{"a":0,"b" : [ ] }'),
    ('{"a":1.50,"b" : [ ] }',         put("/b", {}),              '{"a":1.50,"b" : {} }'),
    ('\r\n{\t"a"\n:\r1\t}\n',         put("/a"),                  '\r\n{\t"a"\n:\r0\t}\n'),
    ('{"a":{"b":{"c":1e2}},"d":1}',   put("/a/b/c"),              '{"a":{"b":{"c":0}},"d":1}'),
    ('{"a":{"b":{"c":1e2}},"d":1}',   put("/a/b"),                '{"a":{"b":0},"d":1}'),
    ('{"a":1}',                       put("/a", None),            '{"a":null}'),
    ('{"a":1}',                       put("/a", "é\n"),           '{"a":"\\u00e9\\n"}'),
    ('{"a":1}',                       put("/a", "\ud83d"),        '{"a":"\\ud83d"}'),
    (LIST,                            put("/a/0"),                '{"a" : [ 0,\t2e3 , [3, 4] ]}'),
    (LIST,                            put("/a/1"),                '{"a" : [ 1.0,\t0 , [3, 4] ]}'),
    (LIST,                            put("/a/2"),                '{"a" : [ 1.0,\t2e3 , 0 ]}'),
    (LIST,                            put("/a/2/1"),          '{"a" : [ 1.0,\t2e3 , [3, 0] ]}'),
    # add
    ('{}',                            put("/a"),                  '{"a":0}'),
    (' { } ',                         put("/a"),                  ' {"a":0 } '),
    ('{"a":1 }',                      put("/b"),                  '{"a":1,"b":0 }'),
    ('{"a":{}}',                      put("/a/b"),                '{"a":{"b":0}}'),
    ('{"a":{"x":1}}',                 put("/a/b"),                '{"a":{"x":1,"b":0}}'),
    ('{"":1}',                        put("/"),                   '{"":0}'),
    ('{"a":1}',                       put("/"),                   '{"a":1,"":0}'),
    # append
    ('{"a":[]}',                      put("/a/-"),                '{"a":[0]}'),
    ('{"a":[ ]}',                     put("/a/-"),                '{"a":[0 ]}'),
    (LIST,                            put("/a/-"),       '{"a" : [ 1.0,\t2e3 , [3, 4],0 ]}'),
    (LIST,                            put("/a/2/-"),     '{"a" : [ 1.0,\t2e3 , [3, 4,0] ]}'),
    (LIST,                            put("/a/-/b"), '{"a" : [ 1.0,\t2e3 , [3, 4],{"b":0} ]}'),
    (LIST,                            put("/a/3"),       '{"a" : [ 1.0,\t2e3 , [3, 4],0 ]}'),
    ('{"a":{"-":1}}',                 put("/a/-"),                '{"a":{"-":0}}'),
    # insert
    (LIST,                            before("/a/0"),    '{"a" : [ 0,1.0,\t2e3 , [3, 4] ]}'),
    (LIST,                            before("/a/1"),    '{"a" : [ 1.0,\t0,2e3 , [3, 4] ]}'),
    (LIST,                            before("/a/2/0"),  '{"a" : [ 1.0,\t2e3 , [0,3, 4] ]}'),
    ('{"a":[]}',                      before("/a/0"),             '{"a":[0]}'),
    ('{"a":{"0":1}}',                 before("/a/0"),             '{"a":{"0":0}}'),
    # what is missing on the way is made
    ('{}',                            put("/a/b/c"),              '{"a":{"b":{"c":0}}}'),
    ('{"a":{}}',                      put("/a/b/-"),              '{"a":{"b":[0]}}'),
    ('{"a":{}}',                      put("/a/b/-/c"),            '{"a":{"b":[{"c":0}]}}'),
    ('{}',                            put("/a~1b/é"),             '{"a/b":{"\\u00e9":0}}'),
    # escapes
    ('{"a/b":1,"a~1b":2}',            put("/a~1b"),               '{"a/b":0,"a~1b":2}'),
    ('{"a/b":1,"a~1b":2}',            put("/a~01b"),              '{"a/b":1,"a~1b":0}'),
    ('{"~":{"/":1}}',                 put("/~0/~1"),              '{"~":{"/":0}}'),
    ('{"~0":1}',                      put("/~00"),                '{"~0":0}'),
    ('{"a b%20":1}',                  put("/a b%20"),             '{"a b%20":0}'),
    ('{"\\u0061\\/b":1}',             put("/a~1b"),               '{"\\u0061\\/b":0}'),
    ('{"\\"":1}',                     put('/"'),                  '{"\\"":0}'),
    # delete: the first, one in the middle, the last, the only one
    ('{ "a":1, "b":2, "c":3 }',       gone("/a"),                 '{ "b":2, "c":3 }'),
    ('{ "a":1, "b":2, "c":3 }',       gone("/b"),                 '{ "a":1, "c":3 }'),
    ('{ "a":1, "b":2, "c":3 }',       gone("/c"),                 '{ "a":1, "b":2 }'),
    ('{ "a":1 }',                     gone("/a"),                 '{ }'),
    ('{"a":{"b":1}}',                 gone("/a/b"),               '{"a":{}}'),
    (LIST,                            gone("/a/0"),               '{"a" : [ 2e3 , [3, 4] ]}'),
    (LIST,                            gone("/a/1"),               '{"a" : [ 1.0 , [3, 4] ]}'),
    (LIST,                            gone("/a/2"),               '{"a" : [ 1.0,\t2e3 ]}'),
    (LIST,                            gone("/a/2/0"),      '{"a" : [ 1.0,\t2e3 , [4] ]}'),
    (LIST,                            gone("/a/2/1"),      '{"a" : [ 1.0,\t2e3 , [3] ]}'),
    ('{"a":[ 1 ]}',                   gone("/a/0"),               '{"a":[ ]}'),
    # what is not there need not be taken out
    ('{"a":1}',                       gone("/b"),                 '{"a":1}'),
    ('{"a":1}',                       gone("/b/c/d"),             '{"a":1}'),
    ('{"a":[1]}',                     gone("/a/1"),               '{"a":[1]}'),
    ('{"a":[1]}',                     gone("/a/-"),               '{"a":[1]}'),
    ('{"a":[{"b":1}]}',               gone("/a/0/c"),             '{"a":[{"b":1}]}'),
    # what looks like the structure of the text and is not
    ('{"a":"}],{\\"b\\":1","b":[2]}', put("/b/0"),        '{"a":"}],{\\"b\\":1","b":[0]}'),
    ('{"x":{"b":1},"b":2}',           put("/b"),                  '{"x":{"b":1},"b":0}'),
    ('{"x":"\\"b\\":9","b":2}',       gone("/b"),                 '{"x":"\\"b\\":9"}'),
    ('{"é":"日本","a":"𝄞","b":1}',     put("/a"),                  '{"é":"日本","a":0,"b":1}'),
    ('{"é":[{"ü":1}]}',               put("/é/0/ü"),              '{"é":[{"ü":0}]}'),
    # a number of 30 digits, and one that is given twice elsewhere, stay as they are
    ('{"n":123456789012345678901234567890,"a":1}', gone("/a"),
     '{"n":123456789012345678901234567890}'),
    ('{"x":{"d":1,"d":2},"a":1}',     put("/a"),                  '{"x":{"d":1,"d":2},"a":0}'),
]
# fmt: on


@pytest.mark.parametrize(("text", "change", "wanted"), CHANGES)
def test_a_change_changes_its_place_and_no_other_byte(
    text: str, change: Change, wanted: str
) -> None:
    assert changed(text, change) == wanted


# fmt: off
REFUSED = [
    ('{"a":1}',                 put("/a/b"),        "/a/b: the body has no object or list at /a"),
    ('{"a":"s"}',               put("/a/0"),        "/a/0: the body has no object or list at /a"),
    ('{"a":true}',              gone("/a/b/c"),     "no object or list at /a"),
    ('{"a":{"b":[1]}}',         put("/a/b/0/c"),    "no object or list at /a/b/0"),
    ('{"a":1,"b":2,"a":3}',     put("/a"),          "a: this field is given twice"),
    ('{"a":1,"a":3}',           gone("/a"),         "a: this field is given twice"),
    ('{"a":{},"a":{}}',         put("/a/b"),        "a: this field is given twice"),
    ('{"a":1,"\\u0061":3}',     put("/a"),          "a: this field is given twice"),
    ('{"a":[{"b":1,"b":1}]}',   put("/a/0/b"),      "b: this field is given twice"),
]
# fmt: on


@pytest.mark.parametrize(("text", "change", "said"), REFUSED)
def test_a_change_that_leads_nowhere_is_refused(text: str, change: Change, said: str) -> None:
    document = Document(text.encode())
    with pytest.raises(BadRequest, match=said):
        document.changed([change])
    assert document.raw.decode() == text


def test_changes_are_made_one_after_the_other() -> None:
    steps = [put("/a", [1]), put("/a/-", 2), before("/a/0", 3), gone("/a/1"), put("/b/c", 4)]
    assert changed("{}", *steps) == '{"a":[3,2],"b":{"c":4}}'
    assert changed('{"a":1}', gone("/a"), put("/a", 2)) == '{"a":2}'
    assert changed('{"a":[1,2,3]}', *[gone("/a/0")] * 3) == '{"a":[]}'
    assert changed('{"a":1}') == '{"a":1}'


def test_the_document_that_is_changed_stays_as_it_was() -> None:
    document = Document(b'{"a": 1}')
    later = document.changed([put("/b", [1])])
    assert (document.raw, document.value) == (b'{"a": 1}', {"a": 1})
    assert later.value == {"a": 1, "b": [1]} and later.encoded() == later.raw
    later.set("a", 2)
    assert later.encoded() == b'{"a": 2,"b":[1]}'


def test_a_mark_of_byte_order_goes() -> None:
    assert Document(b'\xef\xbb\xbf{"a":1}').changed([put("/a")]).raw == b'{"a":0}'


KEYS = ["a", "b", "0", "1", "-", "", "a/b", "~", "~1", "é", "日本", '"', "\\", "\n", "{", "x y"]


def some_json(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(4 if depth > 3 else 7)
    if kind in (4, 5):
        return {key: some_json(rng, depth + 1) for key in rng.sample(KEYS, rng.randrange(5))}
    if kind == 6:
        return [some_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    leaf = [rng.choice([0, -1, 1.5, 1e300, 10**30]), rng.choice(KEYS) * 3, None, True]
    return leaf[kind]


def some_text(rng: random.Random, value: Any) -> str:
    """JSON with white space where it may stand, and characters escaped or not."""

    def space() -> str:
        return rng.choice(["", "", "", " ", "\n\t"])

    if isinstance(value, dict):
        pairs = (
            f"{space()}{some_text(rng, key)}{space()}:{space()}{some_text(rng, one)}{space()}"
            for key, one in value.items()
        )
        return "{" + (",".join(pairs) or space()) + "}"
    if isinstance(value, list):
        return "[" + (",".join(f"{space()}{some_text(rng, x)}{space()}" for x in value)) + "]"
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def escaped(*parts: str | int) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def some_change(rng: random.Random, body: Any) -> tuple[Change, Any]:
    """A change, and what it makes of a body in plain Python."""
    body = json.loads(json.dumps(body))
    holder, path = body, list[str | int]()
    while True:
        inner = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
        deeper = [(key, one) for key, one in inner if isinstance(one, dict | list)]
        if not deeper or rng.random() < 0.35:
            break
        key, holder = rng.choice(deeper)
        path.append(key)
    change = some_change_of_object if isinstance(holder, dict) else some_change_of_list
    return change(rng, holder, escaped(*path), some_json(rng, 2)), body


def some_change_of_object(rng: random.Random, holder: Body, at: str, new: Any) -> Change:
    key = rng.choice([*holder, rng.choice(KEYS)])
    at, what = at + escaped(key), rng.randrange(5)
    if what == 0:
        holder.pop(key, None)
        return gone(at)
    if what == 1 and key not in holder:
        holder[key] = {"made": {"up": new}}
        return put(f"{at}/made/up", new)
    holder[key] = new
    return put(at, new)


def some_change_of_list(rng: random.Random, holder: list[Any], at: str, new: Any) -> Change:
    n, what = rng.randrange(len(holder) or 1), rng.randrange(5)
    if what == 0 or not holder:
        holder.append(new)
        return put(f"{at}/-", new)
    if what == 1:
        del holder[n]
        return gone(f"{at}/{n}")
    if what == 2:
        holder.insert(n, new)
        return before(f"{at}/{n}", new)
    if what == 3:
        holder.append([new])
        return put(f"{at}/-/-", new)
    holder[n] = new
    return put(f"{at}/{n}", new)


@pytest.mark.parametrize("seed", range(40))
def test_any_changes_make_of_any_json_what_they_would_of_plain_objects(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        body: Any = {key: some_json(rng) for key in rng.sample(KEYS, rng.randrange(5))}
        document = Document(some_text(rng, body).encode())
        changes = []
        for _ in range(rng.randrange(1, 5)):
            change, body = some_change(rng, body)
            changes.append(change)
        after = document.changed(changes)
        assert after.value == body and list(after.value) == list(body)
        assert json.loads(after.raw) == body


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_put_and_taken_out_again_leaves_every_byte_as_it_was(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        body = {key: some_json(rng) for key in rng.sample(KEYS, rng.randrange(1, 6))}
        text = some_text(rng, body)
        key = rng.choice(KEYS)
        if key in body:
            # another value in its place: what stands before and after it stays
            marked = changed(text, put(escaped(key), "MARK"))
            left, _, right = marked.partition('"MARK"')
            assert text.startswith(left) and text.endswith(right)
            assert json.loads(text[len(left) : len(text) - len(right)]) == body[key]
        else:
            with_it = changed(text, put(escaped(key), some_json(rng)))
            assert changed(with_it, gone(escaped(key))) == text


# --- fields for requests that lack them


def shape_of(body: dict[str, Any], shape: Shape, protocol: ApiProtocol) -> Any:
    raw = json.dumps(body).encode()
    document = Document(raw)
    found = shaped(document, shape, protocol)
    assert document.raw == raw  # a retry begins with the request as it came
    return found.value


def given(pointer: str, value: Any) -> dict[str, Any]:
    """An object with a value at a place."""
    for part in reversed(pointer.split("/")[1:]):
        value = {part: value}
    return dict(value)


GEN = "/generationConfig"
# fmt: off
PLACES: list[tuple[str, Any, list[str]]] = [
    # the field, its value            Chat Completions, Responses, Messages, Gemini
    ("temperature", 0.5,       ["/temperature", "/temperature", "/temperature",
                                f"{GEN}/temperature"]),
    ("top_p", 0.5,             ["/top_p", "/top_p", "/top_p", f"{GEN}/topP"]),
    ("top_k", 5,               ["/top_k", "", "/top_k", f"{GEN}/topK"]),
    ("max_tokens", 5,          ["/max_tokens", "/max_output_tokens", "/max_tokens",
                                f"{GEN}/maxOutputTokens"]),
    ("max_completion_tokens", 5, ["/max_completion_tokens", "/max_output_tokens", "/max_tokens",
                                  f"{GEN}/maxOutputTokens"]),
    ("stop", ["X"],            ["/stop", "", "/stop_sequences", f"{GEN}/stopSequences"]),
    ("seed", 5,                ["/seed", "", "", f"{GEN}/seed"]),
    ("presence_penalty", 1,    ["/presence_penalty", "", "", f"{GEN}/presencePenalty"]),
    ("frequency_penalty", 1,   ["/frequency_penalty", "", "", f"{GEN}/frequencyPenalty"]),
    ("reasoning_effort", "low", ["/reasoning_effort", "/reasoning/effort", "/output_config/effort",
                                 f"{GEN}/thinkingConfig/thinkingLevel"]),
    ("verbosity", "low",       ["/verbosity", "/text/verbosity", "", ""]),
    ("of_its_own", {"a": [1]}, ["/of_its_own"] * 4),
    ("a/b~c", 1,               ["/a~1b~0c"] * 4),
]
# fmt: on
PLACED = [
    pytest.param(protocol, name, value, pointer, id=f"{protocol}-{name}")
    for name, value, pointers in PLACES
    for protocol, pointer in zip(ApiProtocol, pointers, strict=True)
]


@pytest.mark.parametrize(("protocol", "name", "value", "pointer"), PLACED)
def test_each_field_goes_where_its_protocol_has_it_unless_it_is_there(
    protocol: ApiProtocol, name: str, value: Any, pointer: str
) -> None:
    shape = Shape({name: value})
    there = {name: value} if "~" in pointer else given(pointer, value) if pointer else {}
    assert shape_of({}, shape, protocol) == there
    if pointer and "~" not in pointer:
        others: list[Any] = [0, False, "", [], "own"]
        for own in others:
            assert shape_of(given(pointer, own), shape, protocol) == given(pointer, own)
        assert shape_of(given(pointer, None), shape, protocol) == there  # null says nothing


# fmt: off
OTHER_NAMES: list[tuple[ApiProtocol, dict[str, Any], dict[str, Any]]] = [
    # a request                                                  a field that it has already
    (CC, {"max_completion_tokens": 9},                           {"max_tokens": 5}),
    (CC, {"max_tokens": 9},                                      {"max_completion_tokens": 5}),
    (RE, {"max_output_tokens": 9},                               {"max_tokens": 5}),
    (RE, {"reasoning": {"effort": "high"}},                      {"reasoning_effort": "low"}),
    (ME, {"max_tokens": 9},                                      {"max_completion_tokens": 5}),
    (ME, {"stop_sequences": ["Y"]},                              {"stop": "X"}),
    (GC, {"generationConfig": {"maxOutputTokens": 9}},           {"max_tokens": 5}),
    (GC, {"generationConfig": {"max_output_tokens": 9}},         {"max_tokens": 5}),
    (GC, {"generation_config": {"maxOutputTokens": 9}},          {"max_tokens": 5}),
    (GC, {"generation_config": {"max_output_tokens": 9}},        {"max_completion_tokens": 5}),
    (GC, {"generationConfig": {"top_p": 0.9}},                   {"top_p": 0.1}),
    (GC, {"generation_config": {"stop_sequences": ["Y"]}},       {"stop": "X"}),
    (GC, {"generationConfig": {"thinking_config": {"thinking_level": "high"}}},
     {"reasoning_effort": "low"}),
]
# fmt: on


@pytest.mark.parametrize(("protocol", "body", "params"), OTHER_NAMES)
def test_a_request_that_has_a_field_under_another_name_keeps_it(
    protocol: ApiProtocol, body: dict[str, Any], params: dict[str, Any]
) -> None:
    assert shape_of(body, Shape(params), protocol) == body


# fmt: off
JOINED: list[tuple[ApiProtocol, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # a request with something beside it, the field, and both together
    (RE, {"reasoning": {"summary": "auto"}}, {"reasoning_effort": "low"},
     {"reasoning": {"summary": "auto", "effort": "low"}}),
    (RE, {"text": {"format": {"type": "text"}}}, {"verbosity": "low"},
     {"text": {"format": {"type": "text"}, "verbosity": "low"}}),
    (ME, {"output_config": {"format": {}}}, {"reasoning_effort": "low"},
     {"output_config": {"format": {}, "effort": "low"}}),
    (GC, {"generationConfig": {"topK": 1}}, {"seed": 2},
     {"generationConfig": {"topK": 1, "seed": 2}}),
    (GC, {"generation_config": {"top_k": 1}}, {"top_k": 5, "seed": 2},
     {"generation_config": {"top_k": 1, "seed": 2}}),
    (GC, {"generationConfig": {"thinkingConfig": {"includeThoughts": True}}},
     {"reasoning_effort": "low"},
     {"generationConfig": {"thinkingConfig": {"includeThoughts": True, "thinkingLevel": "low"}}}),
]
# fmt: on


@pytest.mark.parametrize(("protocol", "body", "params", "both"), JOINED)
def test_a_field_joins_what_stands_beside_it(
    protocol: ApiProtocol, body: dict[str, Any], params: dict[str, Any], both: dict[str, Any]
) -> None:
    assert shape_of(body, Shape(params), protocol) == both


def test_one_word_to_stop_at_is_a_list_where_the_protocol_wants_one() -> None:
    stops = [shape_of({}, Shape({"stop": "X"}), protocol) for protocol in ApiProtocol]
    assert stops == [
        {"stop": "X"},
        {},
        {"stop_sequences": ["X"]},
        {"generationConfig": {"stopSequences": ["X"]}},
    ]


def test_nothing_to_put_in_leaves_the_very_document() -> None:
    for protocol in ApiProtocol:
        document = Document(b'{"temperature":1,"generationConfig":{"temperature":1}}')
        assert shaped(document, PLAIN, protocol) is document
        assert shaped(document, Shape({"temperature": 0}), protocol) is document


def test_a_request_with_fields_put_in_keeps_every_byte_of_its_own() -> None:
    raw = b'{ "model":"m",\n "messages" : [ {"role":"user","content":"\xc3\xa9"} ], "n":1.0 }'
    shape = Shape({"temperature": 0.5, "user": "u"}, "S")
    after = shaped(Document(raw), shape, CC).raw
    assert after == (
        b'{ "model":"m",\n "messages" : [ {"role":"system","content":"S"},'
        b'{"role":"user","content":"\xc3\xa9"} ], "n":1.0,"temperature":0.5,"user":"u" }'
    )


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TOOLS: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


def test_tools_are_said_in_each_protocols_words_and_only_to_who_has_none() -> None:
    told = {protocol: shape_of({}, Shape(TOOLS), protocol) for protocol in ApiProtocol}
    assert told[CC] == TOOLS
    assert (told[RE]["tools"][0]["name"], told[RE]["parallel_tool_calls"]) == ("f", False)
    assert told[ME]["tools"][0]["name"] == "f" and told[ME]["tool_choice"]["type"] == "any"
    assert told[GC]["tools"][0]["functionDeclarations"][0]["name"] == "f"
    assert told[GC]["toolConfig"]["functionCallingConfig"]["mode"] == "ANY"
    assert all("messages" not in body and "model" not in body for body in told.values())
    for protocol in ApiProtocol:
        own: Body = {"tools": [{"own": 1}], "tool_choice": "auto", "toolConfig": {}}
        own["parallel_tool_calls"] = True
        assert shape_of(own, Shape(TOOLS), protocol)["tools"] == [{"own": 1}]
        assert shape_of(own, Shape(TOOLS), protocol)["tool_choice"] == "auto"


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


def test_a_format_is_said_in_the_words_of_each_protocol() -> None:
    wanted = {"name": "r", "strict": True, "schema": SCHEMA}
    params = {"response_format": {"type": "json_schema", "json_schema": wanted}}
    told = {protocol: shape_of({}, Shape(params), protocol) for protocol in ApiProtocol}
    assert told[CC] == params
    assert told[RE]["text"]["format"]["schema"] == SCHEMA
    assert told[ME]["output_config"]["format"]["schema"] == SCHEMA
    assert told[GC]["generationConfig"]["responseJsonSchema"] == SCHEMA


# --- system prompts


def says(role: str, content: Any = "Hi") -> dict[str, Any]:
    return {"role": role, "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": [*messages]}


def gemini(*words: str, name: str = "systemInstruction", **more: Any) -> dict[str, Any]:
    return {name: {**more, "parts": [{"text": one} for one in words]}}


USER, OURS = says("user"), says("system", "P")
# fmt: off
SYSTEMS: list[tuple[Any, ...]] = [
    # a request; with our prompt to fill in; before theirs; in place of theirs
    (CC, chat(USER), chat(OURS, USER), chat(OURS, USER), chat(OURS, USER)),
    (CC, chat(), chat(OURS), chat(OURS), chat(OURS)),
    (CC, chat(says("system", "S"), USER), chat(says("system", "S"), USER),
     chat(says("system", "P\n\nS"), USER), chat(OURS, USER)),
    (CC, chat(says("developer", "S"), USER), chat(says("developer", "S"), USER),
     chat(says("developer", "P\n\nS"), USER), chat(OURS, USER)),
    (CC, chat(says("system", [text("S"), text("T")]), USER),
     chat(says("system", [text("S"), text("T")]), USER),
     chat(says("system", [text("P"), text("S"), text("T")]), USER), chat(OURS, USER)),
    (CC, chat(says("system", [])), chat(says("system", [])), chat(says("system", [text("P")])),
     chat(OURS)),
    (CC, chat(says("system", ""), USER), chat(says("system", ""), USER), chat(OURS, USER),
     chat(OURS, USER)),
    (CC, chat({"role": "system"}, USER), chat({"role": "system"}, USER), chat(OURS, USER),
     chat(OURS, USER)),
    # several, and one that comes late
    (CC, chat(says("system", "S"), USER, says("developer", "T"), USER),
     chat(says("system", "S"), USER, says("developer", "T"), USER),
     chat(says("system", "P\n\nS"), USER, says("developer", "T"), USER), chat(OURS, USER, USER)),
    (CC, chat(USER, says("system", "S")), chat(USER, says("system", "S")),
     chat(USER, says("system", "P\n\nS")), chat(OURS, USER)),
    (CC, chat("odd", None, USER), chat(OURS, "odd", None, USER), chat(OURS, "odd", None, USER),
     chat(OURS, "odd", None, USER)),

    (RE, {"input": "Hi"}, *[{"input": "Hi", "instructions": "P"}] * 3),
    (RE, {"instructions": ""}, *[{"instructions": "P"}] * 3),
    (RE, {"instructions": None}, *[{"instructions": "P"}] * 3),
    (RE, {"instructions": "S"}, {"instructions": "S"}, {"instructions": "P\n\nS"},
     {"instructions": "P"}),
    (RE, {"input": [says("system", "S"), USER, says("developer", "T")]},
     {"input": [says("system", "S"), USER, says("developer", "T")]},
     {"input": [says("system", "S"), USER, says("developer", "T")], "instructions": "P"},
     {"input": [USER], "instructions": "P"}),
    (RE, {"instructions": "R", "input": [says("developer", "S"), USER]},
     {"instructions": "R", "input": [says("developer", "S"), USER]},
     {"instructions": "P\n\nR", "input": [says("developer", "S"), USER]},
     {"instructions": "P", "input": [USER]}),

    (ME, chat(USER), *[chat(USER) | {"system": "P"}] * 3),
    (ME, {"system": ""}, *[{"system": "P"}] * 3),
    (ME, {"system": []}, *[{"system": "P"}] * 3),
    (ME, {"system": "S"}, {"system": "S"}, {"system": "P\n\nS"}, {"system": "P"}),
    (ME, {"system": [text("S") | {"cache_control": {"type": "ephemeral"}}]},
     {"system": [text("S") | {"cache_control": {"type": "ephemeral"}}]},
     {"system": [text("P"), text("S") | {"cache_control": {"type": "ephemeral"}}]},
     {"system": "P"}),

    (GC, {"contents": []}, *[{"contents": []} | gemini("P")] * 3),
    (GC, gemini("S", "T"), gemini("S", "T"), gemini("P", "S", "T"), gemini("P")),
    (GC, gemini("S", role="user"), gemini("S", role="user"), gemini("P", "S", role="user"),
     gemini("P")),
    (GC, gemini("S", name="system_instruction"), gemini("S", name="system_instruction"),
     gemini("P", "S", name="system_instruction"), gemini("P", name="system_instruction")),
    (GC, {"systemInstruction": "S"}, {"systemInstruction": "S"}, {"systemInstruction": "P\n\nS"},
     gemini("P")),
    (GC, {"systemInstruction": {}}, *[gemini("P")] * 3),
    (GC, {"systemInstruction": {"role": "user"}}, {"systemInstruction": {"role": "user"}},
     gemini("P", role="user"), gemini("P")),
    (GC, {"systemInstruction": {"parts": {"text": "S"}}},
     {"systemInstruction": {"parts": {"text": "S"}}}, gemini("P", "S"), gemini("P")),
]
# fmt: on
MODES = ("fill", "prepend", "replace")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", SYSTEMS)
def test_a_system_prompt_is_filled_in_put_first_or_put_in_place(
    row: tuple[Any, ...], mode: str
) -> None:
    protocol, body, *wanted = row
    assert (
        shape_of(body, Shape(system="P", system_mode=mode), protocol) == wanted[MODES.index(mode)]
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("body", [{}, {"messages": None}, {"messages": "Hi"}, {"messages": {}}])
def test_a_chat_without_messages_gets_none(body: Body, mode: str) -> None:
    assert shape_of(body, Shape(system="P", system_mode=mode), CC) == body


def test_without_a_prompt_the_mode_says_nothing() -> None:
    for mode in MODES:
        document = Document(json.dumps(chat(says("system", "S"), USER)).encode())
        assert shaped(document, Shape(system_mode=mode), CC) is document


def test_fields_and_a_prompt_come_together() -> None:
    shape = Shape({"temperature": 0.5}, "P", "replace")
    assert shape_of(chat(says("system", "S"), USER), shape, CC) == {
        **chat(OURS, USER),
        "temperature": 0.5,
    }
    assert shape_of(gemini("S"), shape, GC) == {
        **gemini("P"),
        "generationConfig": {"temperature": 0.5},
    }


# --- what the provider gets

LAYERS = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
extra_body = [{pointer = "/provider", value = 1}, {pointer = "/who", value = "provider"}]
params = {temperature = 0.1, top_p = 0.1, seed = 1, user = "provider"}
[[providers.aa.models]]
id = "m"
extra_body = [{pointer = "/who", value = "model"}, {pointer = "/gone", delete = true}]
params = {temperature = 0.2, top_p = 0.2, seed = 2}
[models.v]
extra_body = [{pointer = "/virtual", value = [1]}, {pointer = "/who", value = "virtual"}]
params = {temperature = 0.4}
[[models.v.endpoints]]
provider = "aa"
service_id = "m"
extra_body = [{pointer = "/who", value = "endpoint"}]
params = {top_p = 0.3}
[presets.p]
model = "v"
extra_body = [{pointer = "/preset", value = 1}, {pointer = "/who", value = "preset"}]
params = {temperature = 0.5}
"""


def target_of(model: str, toml: str = LAYERS) -> Target:
    [target] = router_of(toml).resolve(model, CHAT_OP).chain
    return target


def sent(body: Body, target: Target, *more: BodyEdit) -> Any:
    return json.loads(finished(json.dumps(body).encode(), target, more))


# fmt: off
LAST_WORDS: list[tuple[str, dict[str, Any]]] = [
    ("aa:other", {"gone": 1, "provider": 1, "who": "provider"}),
    ("aa:m",     {"provider": 1, "who": "model"}),
    ("v",        {"virtual": [1], "provider": 1, "who": "endpoint"}),
    ("@p",       {"preset": 1, "virtual": [1], "provider": 1, "who": "endpoint"}),
    ("@p/aa:m",  {"preset": 1, "provider": 1, "who": "model"}),
]
# fmt: on


@pytest.mark.parametrize(("model", "body"), LAST_WORDS)
def test_edits_of_the_body_are_made_from_the_preset_inwards_and_the_last_one_holds(
    model: str, body: dict[str, Any]
) -> None:
    target = target_of(model)
    assert sent({"gone": 1}, target) == body
    own = BodyEdit("/who", "request"), BodyEdit("/provider", delete=True)
    after = {name: value for name, value in body.items() if name != "provider"}
    assert sent({"gone": 1}, target, *own) == after | {"who": "request"}


def test_of_fields_the_one_that_is_nearest_to_the_request_holds() -> None:
    params = target_of("@p").shape.params
    assert params["temperature"] == 0.5 and params["user"] == "provider"
    assert target_of("v").shape.params["temperature"] == 0.4
    assert target_of("aa:other").shape.params == {
        "temperature": 0.1,
        "top_p": 0.1,
        "seed": 1,
        "user": "provider",
    }


def plain(edits: tuple[BodyEdit, ...] = (), **more: Any) -> Target:
    target = target_of("aa:other", '[providers.aa]\napi_base = "http://10.0.0.1/v1"\n')
    return replace(target, shape=Shape(edits=edits), **more)


def test_a_body_that_nothing_is_wanted_of_is_sent_as_it_is() -> None:
    raw = b'{ "a":1.0 , "a" : 2 }'
    assert finished(raw, plain()) is raw


def test_edits_see_what_those_before_them_have_made() -> None:
    edits = (
        BodyEdit("/list/-", 1),
        BodyEdit("/list/-", {"a": None}),
        BodyEdit("/list/1/b", 2),
        BodyEdit("/old", delete=True),
        BodyEdit("/old/inner", 3),
    )
    raw = b'{"list" : [ ],"old":1,"x":1.0}'
    assert (
        finished(raw, plain(edits)) == b'{"list" : [1,{"a":null,"b":2} ],"x":1.0,"old":{"inner":3}}'
    )


@pytest.mark.parametrize("own", [True, False])
def test_an_edit_that_cannot_be_made_is_told_with_its_providers_name(own: bool) -> None:
    edit = BodyEdit("/a/b", 1)
    target = plain(() if own else (edit,))
    with pytest.raises(BadRequest, match=r"extra_body of aa: /a/b: the body has no object"):
        finished(b'{"a":"text"}', target, (edit,) if own else ())


OLD, NEW = "max_tokens", "max_completion_tokens"
# fmt: off
SWITCHES: list[tuple[ChatCompatibility, Body, Body]] = [
    # how a server departs from its protocol                 the body            what it gets
    (ChatCompatibility(),                                    {"store": True},    {"store": True}),
    (ChatCompatibility(supports_store=False),                {"store": True},    {}),
    (ChatCompatibility(supports_store=False),                {"store": None, "n": 1}, {"n": 1}),
    (ChatCompatibility(supports_store=False),  {"stream_options": {}}, {"stream_options": {}}),
    (ChatCompatibility(supports_stream_options=False),
     {"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}),
    (ChatCompatibility(OLD),                                 {NEW: 5},           {OLD: 5}),
    (ChatCompatibility(OLD),                                 {OLD: 5},           {OLD: 5}),
    (ChatCompatibility(OLD),                                 {NEW: 5, OLD: 6},   {OLD: 6}),
    (ChatCompatibility(NEW),                                 {OLD: 5},           {NEW: 5}),
    (ChatCompatibility(NEW),                                 {NEW: 5},           {NEW: 5}),
    (ChatCompatibility(NEW),                                 {NEW: 5, OLD: 6},   {NEW: 5}),
    (ChatCompatibility(NEW),                                 {"n": 1},           {"n": 1}),
    (ChatCompatibility(OLD, supports_store=False, supports_stream_options=False),
     {"store": 1, "stream_options": {}, NEW: 5},             {OLD: 5}),
]
# fmt: on


@pytest.mark.parametrize(("chat_switches", "body", "wanted"), SWITCHES)
def test_a_server_that_departs_from_its_protocol_gets_what_it_takes(
    chat_switches: ChatCompatibility, body: Body, wanted: Body
) -> None:
    target = plain(compatibility=chat_switches)
    assert sent(body, target) == wanted
    elsewhere = replace(target, protocol=RE)
    assert sent(body, elsewhere) == body  # they are about Chat Completions alone


def test_the_configurations_own_edits_come_after_the_switches() -> None:
    chat_switches = ChatCompatibility(OLD, supports_store=False)
    target = plain((BodyEdit("/store", True), BodyEdit(f"/{NEW}", 7)), compatibility=chat_switches)
    assert sent({"store": False, NEW: 5}, target) == {OLD: 5, "store": True, NEW: 7}


SWITCHED = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
[providers.aa.compatibility.chat_completions]
supports_store = false
token_limit_field = "max_tokens"
[[providers.aa.models]]
id = "m"
[providers.aa.models.compatibility.chat_completions]
supports_stream_options = false
token_limit_field = "max_completion_tokens"
"""


def test_the_switches_of_a_model_join_those_of_its_provider() -> None:
    body = {"store": 1, "stream_options": {}, OLD: 5}
    assert sent(body, target_of("aa:m", SWITCHED)) == {NEW: 5}
    assert sent(body, target_of("aa:other", SWITCHED)) == {"stream_options": {}, OLD: 5}
    assert target_of("aa:m", SWITCHED).traits.max_tokens_field == NEW
    assert target_of("aa:other", SWITCHED).traits.max_tokens_field == OLD
