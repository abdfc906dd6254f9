"""What all protocols have in common."""

from __future__ import annotations

from typing import Any

import pytest

from bitrouter import ApiProtocol, StreamState, Usage, texts_of, words_of

TEXTS = [
    ("plain", "plain"),
    ([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}], "a\nb"),
    ([{"text": 5}, "loose", None, {"text": "c"}], "c"),
    ([], ""),
    (None, ""),
    ({"text": "not a list"}, ""),
]


@pytest.mark.parametrize(("content", "wanted"), TEXTS)
def test_the_text_of_a_message_is_found(content: Any, wanted: str) -> None:
    assert texts_of(content) == wanted


def test_words_are_compared_in_lower_case_and_only_text_is_a_word() -> None:
    assert words_of("Rate_Limit", None, 429, ["x"], "CODE") == {"rate_limit", "code"}


def test_a_protocol_is_spelled_as_the_configuration_spells_it() -> None:
    assert [str(p) for p in ApiProtocol] == [
        "chat_completions",
        "responses",
        "messages",
        "generate_content",
    ]


def test_a_new_stream_has_shown_nothing() -> None:
    state = StreamState()
    assert not (state.started or state.finished or state.ended or state.error or state.usage)


def test_two_streams_remember_apart() -> None:
    one, other = StreamState(), StreamState()
    one.memo["x"] = 1
    assert other.memo == {}


def test_no_usage_is_no_tokens_at_all() -> None:
    assert Usage() == (0, 0, 0, 0, 0)
