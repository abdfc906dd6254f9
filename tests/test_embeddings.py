"""Vectors, asked for in OpenAI's words and in Google's."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest

from bitrouter import (
    BadRequest,
    Usage,
    embeddings_as_gemini,
    embeddings_as_openai,
    embeddings_for_gemini,
    embeddings_for_openai,
)

VECTORS = [[0.5, -0.25], [1.0, 0.0]]


def content(*texts: str, **more: Any) -> dict[str, Any]:
    return {"content": {"parts": [{"text": text} for text in texts]}, **more}


FOR_GEMINI = [
    # OpenAI's body                          texts           what each request says besides
    ({"input": "one"}, ["one"], {}),
    ({"input": ["one", "two"]}, ["one", "two"], {}),
    ({"input": ["one"], "dimensions": 64}, ["one"], {"outputDimensionality": 64}),
    ({"input": "one", "dimensions": None, "user": "u"}, ["one"], {}),
]


@pytest.mark.parametrize(("body", "texts", "more"), FOR_GEMINI)
def test_texts_are_a_batch_at_google(
    body: dict[str, Any], texts: list[str], more: dict[str, Any]
) -> None:
    found, asked = embeddings_for_gemini(body, "m")
    assert found == texts
    assert asked == {"requests": [{"model": "models/m", **content(text), **more} for text in texts]}


@pytest.mark.parametrize("given", [None, [], 7, [1, 2], [[1, 2]], [None], {"text": "a"}])
def test_google_embeds_nothing_but_texts(given: Any) -> None:
    with pytest.raises(BadRequest, match="input") as refused:
        embeddings_for_gemini({"input": given}, "m")
    assert str(refused.value.param).startswith("input")


@pytest.mark.parametrize("size", [-1, 1.5, "64"])
def test_dimensions_are_a_whole_number(size: Any) -> None:
    with pytest.raises(BadRequest, match="dimensions"):
        embeddings_for_gemini({"input": "one", "dimensions": size}, "m")


def test_google_s_vectors_are_openai_s_data() -> None:
    value = {"embeddings": [{"values": one} for one in VECTORS]}
    answer = embeddings_as_openai({}, value, "m", Usage(7))
    data = [{"object": "embedding", "index": n, "embedding": one} for n, one in enumerate(VECTORS)]
    assert answer == {
        "object": "list",
        "data": data,
        "model": "m",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


def test_vectors_in_base64_are_little_endian_floats() -> None:
    value = {"embeddings": [{"values": one} for one in VECTORS]}
    answer = embeddings_as_openai({"encoding_format": "base64"}, value, "m", Usage())
    raw = [base64.b64decode(one["embedding"]) for one in answer["data"]]
    assert [list(struct.unpack("<2f", one)) for one in raw] == VECTORS


FOR_OPENAI = [
    # Google's body                                              texts, dimensions
    (content("one"), ["one"], None),
    (content("one", "two"), ["one\ntwo"], None),
    (content("one", outputDimensionality=64), ["one"], 64),
    (content("one", output_dimensionality=64), ["one"], 64),
    ({"requests": [content("one"), content("two")]}, ["one", "two"], None),
    ({"requests": [content("one", outputDimensionality=64), content("two")]}, ["one", "two"], 64),
]


@pytest.mark.parametrize(("body", "texts", "size"), FOR_OPENAI)
def test_contents_are_texts_at_openai(
    body: dict[str, Any], texts: list[str], size: int | None
) -> None:
    found, asked = embeddings_for_openai(body, "m")
    more = {"dimensions": size} if size else {}
    assert found == texts
    assert asked == {"model": "m", "input": texts, "encoding_format": "float", **more}


EMPTY: list[dict[str, Any]] = [
    {},
    {"requests": []},
    content(),
    content(""),
    {"requests": [content("a"), content()]},
]


@pytest.mark.parametrize("body", EMPTY)
def test_a_content_without_a_text_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="expected a text"):
        embeddings_for_openai(body, "m")


def test_openai_s_data_are_google_s_vectors_in_their_order() -> None:
    data = [{"index": n, "embedding": one} for n, one in enumerate(VECTORS)]
    for ordered in (data, data[::-1]):
        answer = embeddings_as_gemini({"data": ordered}, one=False)
        assert answer == {"embeddings": [{"values": one} for one in VECTORS]}
    assert embeddings_as_gemini({"data": data}, one=True) == {"embedding": {"values": VECTORS[0]}}


def test_what_goes_to_google_and_back_is_what_was_asked() -> None:
    texts, asked = embeddings_for_gemini({"input": ["one", "two"], "dimensions": 8}, "m")
    again, body = embeddings_for_openai(asked, "m")
    assert (again, body["input"], body["dimensions"]) == (texts, ["one", "two"], 8)
