"""Keys that stay secret, JSON that keeps its bytes, and small readings of other people's text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bitrouter import (
    BadRequest,
    Document,
    Secret,
    compact,
    dig,
    maybe,
    near_misses,
    printable,
    seconds_of,
    show_json,
    whole,
)

KEY = "sk-live-abcdefghijklmnop"


def edited(raw: str, key: str, value: Any) -> str:
    document = Document(raw.encode())
    document.set(key, value)
    return document.encoded().decode()


def raised(secret: Secret) -> str:
    error = ValueError(secret)
    return f"{error} {error!r} {error.args}"


SHOWN = {
    "repr": repr,
    "str": str,
    "f-string": lambda s: f"{s} {s!r} {s!s} {s:>40}",
    "percent": lambda s: "%s %r" % (s, s),  # noqa: UP031  logging formats so
    "in a list": lambda s: str([s, {"key": s}]),
    "in an exception": raised,
    "in an error message": show_json,
}


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("key", [KEY, "short-key", "sixteen-chars-id"])
def test_a_secret_is_never_shown(shown: Any, key: str) -> None:
    try:
        text = shown(Secret(key))
    except TypeError:  # a format that it refuses shows nothing
        text = ""
    assert key not in text and key[:-4] not in text and key[:8] not in text


def test_a_secret_cannot_be_dumped() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps({"key": Secret(KEY)})
    assert not hasattr(Secret(KEY), "__dict__")


def test_only_a_long_secret_shows_its_end() -> None:
    assert repr(Secret(KEY)) == "Secret(...mnop)"
    assert repr(Secret("short-key")) == "Secret(...)"


def test_a_secret_gives_its_text_to_who_asks_for_it() -> None:
    assert Secret(KEY).reveal() == KEY


def test_secrets_compare_by_their_text_and_only_with_secrets() -> None:
    assert Secret(KEY) == Secret(KEY) and Secret(KEY) != Secret("other")
    assert Secret(KEY) != KEY
    assert len({Secret(KEY), Secret(KEY), Secret("other")}) == 2
    assert Secret("x") and not Secret("")


EDITS = {
    "number spelling": (
        '{"n":1.50e+02,"model":"a","z":-0.0}',
        '{"n":1.50e+02,"model":"N","z":-0.0}',
    ),
    "big numbers": (
        '{"model":"a","n":12345678901234567890123}',
        '{"model":"N","n":12345678901234567890123}',
    ),
    "key order": ('{"z":1,"model":"a","b":2}', '{"z":1,"model":"N","b":2}'),
    "whitespace": (
        '\n{ "a" :\t1 ,\r\n  "model"  :  "a"  , "b":[ ] }\n',
        '\n{ "a" :\t1 ,\r\n  "model"  :  "N"  , "b":[ ] }\n',
    ),
    "duplicates of another key": (
        '{"a":1,"a":2,"model":"a","a":3}',
        '{"a":1,"a":2,"model":"N","a":3}',
    ),
    "unicode": ('{"a":"Zürich 🏔\u2028","model":"ä"}', '{"a":"Zürich 🏔\u2028","model":"N"}'),
    "escapes": (
        r'{"a":"\u00e9\/\"\\","model":"x\"y","b":"\ud83d\ude00"}',
        r'{"a":"\u00e9\/\"\\","model":"N","b":"\ud83d\ude00"}',
    ),
    "same name deeper, before": (
        '{"x":{"model":"deep"},"model":"a"}',
        '{"x":{"model":"deep"},"model":"N"}',
    ),
    "same name deeper, after": (
        '{"model":"a","x":[{"model":{"model":1}}]}',
        '{"model":"N","x":[{"model":{"model":1}}]}',
    ),
    "name as a value": ('{"a":"model","model":"a"}', '{"a":"model","model":"N"}'),
    "name inside a string": (
        r'{"a":"{\"model\": \"no\"}","model":"a"}',
        r'{"a":"{\"model\": \"no\"}","model":"N"}',
    ),
    "a value that is not a string": (
        '{"model":{"a":[1,{"b":"}"}]},"c":1}',
        '{"model":"N","c":1}',
    ),
    "absent": ('{"a":1}', '{"model":"N","a":1}'),
    "absent, only deeper": ('{"x":{"model":"deep"}}', '{"model":"N","x":{"model":"deep"}}'),
    "absent from nothing": ("{ }", '{"model":"N" }'),
    "a byte order mark": ('\ufeff{"model":"a"}', '{"model":"N"}'),
    "duplicates of another key, name deeper": (
        '{"a":1,"a":2,"model":"a","x":{"model":1}}',
        '{"a":1,"a":2,"model":"N","x":{"model":1}}',
    ),
    "name spelled with an escape": (
        r'{"m\u006fdel":"a","x":{"model":"deep"}}',
        r'{"m\u006fdel":"N","x":{"model":"deep"}}',
    ),
}


@pytest.mark.parametrize(("raw", "wanted"), EDITS.values(), ids=EDITS)
def test_an_edit_leaves_every_other_byte_alone(raw: str, wanted: str) -> None:
    assert edited(raw, "model", "N") == wanted


def test_without_edits_the_bytes_are_the_bytes() -> None:
    raw = b' {"model" : "a",  "n":1.0, "n":1e0}\r\n'
    assert Document(raw).encoded() == raw


def test_edits_in_any_order_land_in_their_places() -> None:
    document = Document(b'{"a":1, "b":2, "c":3}')
    for key in ("c", "a", "b"):
        document.set(key, key * 3)
    assert document.encoded() == b'{"a":"aaa", "b":"bbb", "c":"ccc"}'


@pytest.mark.parametrize("raw", [b"{}", b'{"z":0}'])
def test_two_values_can_be_added(raw: bytes) -> None:
    document = Document(raw)
    document.set("a", 1)
    document.set("b", 2)
    assert json.loads(document.encoded()) == {**json.loads(raw), "a": 1, "b": 2}


def test_an_edit_forgotten_is_an_edit_not_made() -> None:
    document = Document(b'{"model":"a"}')
    document.set("model", "first")
    document.forget_edits()
    document.set("model", "second")
    assert document.encoded() == b'{"model":"second"}'


INNER = {
    "inside": ('{"o":{"x":1, "u" : false}}', '{"o":{"x":1, "u" : true}}'),
    "beside": ('{"o": { "x":1.0}}', '{"o": {"u":true, "x":1.0}}'),
    "empty": ('{"o":{},"z":1}', '{"o":{"u":true},"z":1}'),
    "null": ('{"o":null}', '{"o":{"u":true}}'),
    "absent": ('{"z":1}', '{"o":{"u":true},"z":1}'),
    "same name deeper": ('{"o":{"x":{"u":0}}}', '{"o":{"u":true,"x":{"u":0}}}'),
    "same name outside": ('{"u":0,"o":{"u":1}}', '{"u":0,"o":{"u":true}}'),
}


@pytest.mark.parametrize(("raw", "wanted"), INNER.values(), ids=INNER)
def test_a_value_one_level_down_can_be_set(raw: str, wanted: str) -> None:
    document = Document(raw.encode())
    document.set_in("o", "u", True)
    assert document.encoded().decode() == wanted


TWICE = [
    '{"model":"a","model":"b"}',
    '{"model":"a","x":{"model":1},"model":"a"}',
    r'{"model":"a","m\u006fdel":"b"}',
]


@pytest.mark.parametrize("raw", TWICE)
def test_a_field_given_twice_is_not_edited_but_refused(raw: str) -> None:
    with pytest.raises(BadRequest, match="model: this field is given twice") as caught:
        edited(raw, "model", "N")
    assert caught.value.param == "model"


NOT_A_DOCUMENT = {
    "invalid UTF-8": (b'{"model":"\xff"}', r"not UTF-8 \(byte 10\)"),
    "half a character": ('{"model":"é'.encode()[:-1], r"not UTF-8"),
    "UTF-16": ('{"model":"a"}'.encode("utf-16"), "not UTF-8"),
    "nothing": (b"", "not valid JSON"),
    "half an object": (b'{"model":', "not valid JSON"),
    "two objects": (b'{"model":"a"}{}', "not valid JSON"),
    "single quotes": (b"{'model':'a'}", "not valid JSON"),
    "a trailing comma": (b'{"model":"a",}', "not valid JSON"),
    "a raw line end in a string": (b'{"model":"a\nb"}', "not valid JSON"),
    "a list": (b"[1,2]", r"must be a JSON object, not \[1, 2\]"),
    "a string": (b'"model"', "must be a JSON object"),
    "null": (b"null", "must be a JSON object, not null"),
    "a number beyond all bounds": (b'{"n":' + b"9" * 5000 + b"}", "not valid JSON"),
    "lists without end": (b'{"a":' + b"[" * 200_000, "nested too deeply|not valid JSON"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize(("raw", "said"), NOT_A_DOCUMENT.values(), ids=NOT_A_DOCUMENT)
def test_what_is_no_json_object_is_refused(raw: bytes, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        Document(raw)


def test_a_refusal_shows_no_more_than_a_glimpse_of_the_body() -> None:
    with pytest.raises(BadRequest) as caught:
        Document(json.dumps(["x" * 10_000]).encode())
    assert len(caught.value.message) < 200


SECONDS = [
    ("2", 2.0),
    (" 0 ", 0.0),
    ("0.25", 0.25),
    ("20ms", 0.02),
    ("1.5s", 1.5),
    ("37s", 37.0),
    ("6m0s", 360.0),
    ("2m", 120.0),
    ("1h2m", 3720.0),
    ("10h17m5.7s", 37025.7),
    ("1s500ms", 1.5),
    ("", None),
    ("-1", None),
    ("nan", None),
    ("inf", None),
    ("1e300", None),
    ("soon", None),
    ("..s", None),
    ("5 s", None),
    ("s", None),
    ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ("9" * 400 + "s", None),
]


@pytest.mark.parametrize(("text", "wanted"), SECONDS, ids=lambda v: repr(v)[:30])
def test_a_vendor_s_duration_is_read(text: str, wanted: float | None) -> None:
    assert seconds_of(text) == (None if wanted is None else pytest.approx(wanted))


WHOLE = [
    (7, 7), (7.0, 7), (7.9, 7), (0, 0), (-1, 0), (None, 0), ("7", 0), ([7], 0),
    (float("nan"), 0), (float("inf"), 0), (10**30, 0),
]  # fmt: skip


@pytest.mark.parametrize(("value", "wanted"), WHOLE)
def test_a_count_is_believed_only_when_it_is_sensible(value: Any, wanted: int) -> None:
    assert whole(value) == wanted


DUG = [
    (("a", 0, "b"), 1),
    (("a", 1, "b"), None),
    (("a", "b"), None),
    (("a", 0, "b", "c"), None),
    (("a", 0, 0), None),
    ((), {"a": [{"b": 1}]}),
]


@pytest.mark.parametrize(("path", "wanted"), DUG)
def test_digging_finds_the_value_or_nothing(path: tuple[str | int, ...], wanted: Any) -> None:
    assert dig({"a": [{"b": 1}]}, *path) == wanted


def test_a_field_of_the_wrong_type_is_named() -> None:
    with pytest.raises(BadRequest, match=r'tools: expected an array, got \{"a": 1\}') as caught:
        maybe({"tools": {"a": 1}}, "tools", list)
    assert caught.value.param == "tools"
    assert maybe({"tools": None}, "tools", list) is maybe({}, "tools", list) is None


def test_compact_json_has_no_spaces_and_no_escapes() -> None:
    assert compact({"a": ["é", 1, None]}) == '{"a":["é",1,null]}'.encode()


def test_what_cannot_be_encoded_does_not_stop_an_answer() -> None:
    assert json.loads(compact({"a": "x\ud800y"}))["a"] == "x\ufffdy"


PRINTABLE = [
    ("gpt-4o", "gpt-4o"),
    ("a\r\nx-evil: 1", "a  x-evil: 1"),
    ("nul\x00del\x7f", "nul del "),
    ("Zürich", r"Z\xfcrich"),
    ("x" * 300, "x" * 200),
]


@pytest.mark.parametrize(("text", "wanted"), PRINTABLE, ids=lambda v: repr(v)[:30])
def test_text_of_unknown_origin_is_made_fit_for_a_header(text: str, wanted: str) -> None:
    assert printable(text) == wanted


def test_a_near_miss_is_found_and_a_far_one_is_not() -> None:
    assert near_misses("gpt-4o-mni", ["gpt-4o-mini", "claude", "gpt-4o"])[0] == "gpt-4o-mini"
    assert near_misses("zzzz", ["gpt-4o-mini", "claude"]) == []
