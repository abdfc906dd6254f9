"""One line per event: logfmt for people, JSON for machines, never a secret, never a fuss."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from bitrouter import Kind, LogWriter, Secret

KEY = "sk-very-secret-0123456789"
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Counting(io.StringIO):
    """Counts how often it is written to."""

    writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


def written(writer: LogWriter) -> list[str]:
    writer.flush()
    stream = writer._stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue().splitlines()


def text_writer(*secrets: str) -> LogWriter:
    writer = LogWriter(io.StringIO(), as_json=False)
    writer.hide([Secret(text) for text in secrets])
    return writer


def json_writer(*secrets: str) -> LogWriter:
    writer = LogWriter(io.StringIO(), as_json=True)
    writer.hide([Secret(text) for text in secrets])
    return writer


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger of our own, without handlers."""
    log = logging.Logger("test", logging.INFO)  # noqa: LOG001  nobody else shall see it
    yield log
    log.handlers = []


def test_a_line_for_people_is_logfmt() -> None:
    writer = text_writer()
    writer.event("request", {"id": "a1", "status": 200, "ttft_ms": 12.34567, "caller": None})
    [line] = written(writer)
    assert re.fullmatch(rf"{STAMP} info request id=a1 status=200 ttft_ms=12.3457", line)


def test_a_line_for_machines_is_json() -> None:
    writer = json_writer()
    writer.event("request", {"id": "a1", "status": 200, "cost": 1.5e-05, "no": None}, "warning")
    [line] = written(writer)
    facts = json.loads(line)
    assert re.fullmatch(STAMP, facts.pop("ts"))
    assert facts == {"level": "warning", "event": "request", "id": "a1", "status": 200,
                     "cost": 1.5e-05}  # fmt: skip


# fmt: off
VALUES = [
    # value                   in logfmt
    ("plain",                 "plain"),
    ("openai/gpt-4o:free",    "openai/gpt-4o:free"),
    ("two words",             '"two words"'),
    ("",                      '""'),
    ('a"b',                   r'"a\"b"'),
    ("a=b",                   '"a=b"'),
    ("a\\b",                  r'"a\\b"'),
    ("one\ntwo\r\nthree",     r'"one\ntwo\r\nthree"'),
    ("\x1b[31mred\x00",       r'"\u001b[31mred\u0000"'),
    ("a\u2028b\x85c",         r'"a\u2028b\u0085c"'),
    ("\ud800",                r'"\ud800"'),
    (True,                    "True"),
    (0,                       "0"),
    (0.1 + 0.2,               "0.3"),
    (["a", 1],                '"[\'a\', 1]"'),
    (Kind.BILLING,            "billing"),
]
# fmt: on


@pytest.mark.parametrize(("value", "shown"), VALUES, ids=range(len(VALUES)))
def test_odd_values_are_quoted(value: Any, shown: str) -> None:
    writer = text_writer()
    writer.event("x", {"a": value, "b": 1})
    [line] = written(writer)
    assert line.partition(" info ")[2] == f"x a={shown} b=1"


@pytest.mark.parametrize("value", [value for value, _ in VALUES] + [{"a": [1, None]}], ids=repr)
def test_every_value_is_json_on_one_line(value: Any) -> None:
    writer = json_writer()
    writer.event("x", {"a": value})
    [line] = written(writer)
    assert json.loads(line)["a"] == value and line.isascii()


@pytest.mark.parametrize("make", [text_writer, json_writer])
def test_no_secret_goes_through_the_logger(make: Any, logger: logging.Logger) -> None:
    writer = make(KEY, "short")
    logger.addHandler(writer)
    logger.warning("refused key=%s short=%s", KEY, "short")
    [line] = written(writer)
    assert KEY not in line and "key=[redacted]" in line


@pytest.mark.parametrize("make", [text_writer, json_writer])
def test_no_secret_goes_through_an_event(make: Any) -> None:
    writer = make(KEY)
    writer.event("attempt_failed", {"reason": f"Incorrect API key provided: {KEY}."}, "warning")
    [line] = written(writer)
    assert KEY not in line and "[redacted]" in line


@pytest.mark.parametrize("make", [text_writer, json_writer])
def test_no_secret_of_an_exception_is_shown(make: Any, logger: logging.Logger) -> None:
    writer = make(KEY)
    logger.addHandler(writer)
    try:
        int(KEY)
    except ValueError:
        logger.exception("it_failed")
    assert KEY not in "".join(written(writer)) and "ValueError" in "".join(written(writer))


def test_a_secret_with_quotes_is_no_secret_less(logger: logging.Logger) -> None:
    odd = 'sk-"quoted"-\\-key'
    writer = json_writer(odd)
    logger.addHandler(writer)
    logger.warning("refused key=%s", odd)
    assert "quoted" not in written(writer)[0]


@pytest.mark.parametrize("make", [text_writer, json_writer])
def test_a_message_cannot_forge_a_second_line(make: Any, logger: logging.Logger) -> None:
    writer = make()
    logger.addHandler(writer)
    logger.warning("odd path=%s", "/x\n2026-01-01T00:00:00.000Z info forged")
    assert len(written(writer)) == 1


def test_the_level_is_shown(logger: logging.Logger) -> None:
    writer = json_writer()
    logger.addHandler(writer)
    logger.error("it_failed status=%d", 500)
    facts = json.loads(written(writer)[0])
    assert (facts["level"], facts["event"], facts["message"]) == (
        "error",
        "it_failed",
        "status=500",
    )


def test_without_a_loop_each_line_is_written_at_once() -> None:
    stream = io.StringIO()
    LogWriter(stream, as_json=False).event("x", {})
    assert stream.getvalue().endswith(" info x\n")


async def test_with_a_loop_lines_are_gathered_and_written_together() -> None:
    stream = Counting()
    writer = LogWriter(stream, as_json=True)
    writer.attach(asyncio.get_running_loop())
    for n in range(100):
        writer.event("x", {"n": n})
    assert stream.getvalue() == ""
    while not stream.getvalue():  # noqa: ASYNC110  a stream has no event to wait for
        await asyncio.sleep(0.01)
    assert [json.loads(line)["n"] for line in written(writer)] == list(range(100))
    assert stream.writes == 1


async def test_on_a_terminal_lines_are_written_in_the_same_turn() -> None:
    stream = Terminal()
    writer = LogWriter(stream, as_json=False)
    writer.attach(asyncio.get_running_loop())
    writer.event("x", {})
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert " info x" in stream.getvalue()


async def test_a_warning_does_not_wait_and_takes_along_what_does() -> None:
    stream = io.StringIO()
    writer = LogWriter(stream, as_json=False)
    writer.attach(asyncio.get_running_loop())
    writer.event("first", {})
    writer.event("second", {}, "warning")
    assert [line.split(" ")[2] for line in stream.getvalue().splitlines()] == ["first", "second"]


async def test_letting_go_of_the_loop_writes_what_is_left() -> None:
    stream = io.StringIO()
    writer = LogWriter(stream, as_json=False)
    writer.attach(asyncio.get_running_loop())
    writer.event("first", {})
    writer.attach(None)
    writer.event("second", {})
    assert len(stream.getvalue().splitlines()) == 2


def test_a_stream_that_is_closed_is_no_reason_to_stop() -> None:
    stream = io.StringIO()
    writer = LogWriter(stream, as_json=False)
    stream.close()
    writer.event("x", {})
    writer.flush()


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(text)


def test_a_pipe_that_nobody_reads_is_no_reason_to_stop() -> None:
    writer = LogWriter(Broken(), as_json=True)
    writer.event("x", {})
    writer.event("y", {})


@pytest.mark.parametrize("as_json", [True, False])
def test_a_stream_without_unicode_is_no_reason_to_stop(as_json: bool) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as stream:
        writer = LogWriter(stream, as_json=as_json)
        writer.event("x", {"a": "é\ud800"})
        writer.event("y", {"a": "after"})
        assert b"after" in raw.getvalue()
