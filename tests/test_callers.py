"""Connections from callers: requests in any form and any pieces, and what is no request."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
import socket
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support import (
    CHAT_ANSWER,
    CHAT_STREAM,
    DONE,
    MESSAGES_STREAM,
    Answer,
    Caller,
    Reply,
    ask,
    every_cut,
    lazy_caller,
    named_event,
    request_bytes,
    slices,
    stream,
    until,
)

import bitrouter

CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
)
GEMINI = "/v1beta/models/google/gemini-2.5-flash:streamGenerateContent"


def echo(text: str = "Hi") -> bytes:
    return json.dumps(ask(text, model="echo/echo")).encode()


def said(answer: Answer) -> str:
    assert answer.status == 200, answer
    return str(answer.json()["choices"][0]["message"]["content"])


def chunked(body: bytes, size: int = 7) -> bytes:
    pieces = (b"%X\r\n%b\r\n" % (len(piece), piece) for piece in slices(body, size))
    return b"".join(pieces) + b"0\r\n\r\n"


async def send_in_pieces(caller: Caller, pieces: Any) -> None:
    for piece in pieces:
        caller.send(piece)
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # so that what is cut here arrives cut


def only_connection(gw: Any) -> bitrouter.CallerConnection:
    """The one connection that is open: its deadlines cannot be shortened from outside."""
    [connection] = gw.listener._opened
    assert isinstance(connection, bitrouter.CallerConnection)
    return connection


# Requests, one after another.


async def test_a_connection_serves_many_requests(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        answers = [said(await caller.post(CHAT, json.loads(echo(str(i))))) for i in range(3)]
        assert (answers, gw.listener.connections) == (["0", "1", "2"], 1)


async def test_a_caller_may_ask_for_the_end_of_the_connection(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        answer = await caller.get("/health", connection="close")
        assert answer.headers["connection"] == "close"
        assert await caller.closed()


async def test_pipelined_requests_are_answered_in_order(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    slow = Reply(body=CHAT_ANSWER, after_s=0.02)
    async with provider(slow) as up, gateway(environ=openai_env(up)) as gw, gw.caller() as caller:
        echoes = [request_bytes("POST", CHAT, echo(text)) for text in "ab"]
        caller.send(echoes[0] + request_bytes("POST", CHAT, ask()) + echoes[1] + HEALTH)
        answers = [said(await caller.answer()) for _ in range(3)]
        assert answers == ["a", "Hello!", "b"]
        assert (await caller.answer()).json()["status"] == "ok"


async def test_a_thousand_requests_in_one_write_are_all_answered(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(HEALTH * 1000)
        assert [(await caller.answer()).status for _ in range(1000)] == [200] * 1000
        assert len(gw.lines()) == 1000


async def test_what_is_sent_ahead_is_held_back_and_then_served(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    slow = Reply(body=CHAT_ANSWER, after_s=0.04)
    async with provider(slow) as up, gateway(environ=openai_env(up)) as gw, gw.caller() as caller:
        text = "x" * 8_000_000
        caller.send(request_bytes("POST", CHAT, ask()) + request_bytes("POST", CHAT, echo(text)))
        await until(lambda: up.seen)
        await asyncio.sleep(0.02)
        assert len(only_connection(gw)._inbox) < 1_000_000
        assert [said(await caller.answer()) for _ in range(2)] == ["Hello!", text]


async def test_empty_lines_between_requests_are_skipped(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(b"\r\n" + HEALTH + b"\r\n\r\n" + HEALTH)
        assert [(await caller.answer()).status for _ in range(2)] == [200, 200]


# Bodies, in all forms and pieces.

BODY = echo("Grüße")
SENT = {
    "length": HEAD + b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY),
    "chunked": HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(BODY),
    "extensions": HEAD
    + b"Transfer-Encoding: Chunked\r\n\r\n%x;a=b \r\n%b\r\n000;c\r\nx-sum: 1\r\n\r\n"
    % (len(BODY), BODY),
}


@pytest.mark.parametrize("raw", SENT.values(), ids=SENT)
async def test_a_request_is_understood_at_every_cut(gateway: Any, raw: bytes) -> None:
    async with gateway() as gw, gw.caller() as caller:
        for cut in every_cut(raw):
            await send_in_pieces(caller, cut)
            assert said(await caller.answer()) == "Grüße"


@pytest.mark.parametrize("raw", SENT.values(), ids=SENT)
async def test_a_request_is_understood_byte_by_byte(gateway: Any, raw: bytes) -> None:
    async with gateway() as gw, gw.caller() as caller:
        await send_in_pieces(caller, slices(raw + HEALTH, 1))
        assert said(await caller.answer()) == "Grüße"
        assert (await caller.answer()).status == 200


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": ("gzip", gzip.compress(BODY)),
    "x-gzip": ("x-gzip", gzip.compress(BODY)),
    "deflate": ("deflate", zlib.compress(BODY)),
    "raw deflate": ("deflate", raw_deflate(BODY)),
    "identity": ("identity", BODY),
}


@pytest.mark.parametrize(("coding", "body"), PACKED.values(), ids=PACKED)
async def test_packed_bodies_are_unpacked(gateway: Any, coding: str, body: bytes) -> None:
    async with gateway() as gw, gw.caller() as caller:
        assert said(await caller.post(CHAT, body, content_encoding=coding)) == "Grüße"


BAD_PACKS = {
    "broken": ("gzip", BODY, 400),
    "short": ("gzip", gzip.compress(BODY)[:-4], 400),
    "unknown": ("br", BODY, 400),
    "bomb": ("gzip", gzip.compress(b" " * 2_000_000), 413),
    "deflate bomb": ("deflate", zlib.compress(b" " * 2_000_000), 413),
}


@pytest.mark.parametrize(("coding", "body", "status"), BAD_PACKS.values(), ids=BAD_PACKS)
async def test_what_cannot_be_unpacked_is_refused(
    gateway: Any, coding: str, body: bytes, status: int
) -> None:
    async with gateway("[server]\nmax_body_mb = 1\n") as gw, gw.caller() as caller:
        answer = await caller.post(CHAT, body, content_encoding=coding)
        assert answer.status == status
        assert await caller.closed()


# Expect: 100-continue.

EXPECTING = b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % len(BODY)


async def test_a_body_is_asked_for_when_the_caller_waits_to_be_asked(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(HEAD + EXPECTING)
        assert (await caller.head())[0] == 100
        caller.send(BODY)
        assert said(await caller.answer()) == "Grüße"


async def test_a_body_that_comes_along_needs_no_asking(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(HEAD + EXPECTING + BODY)
        assert (await caller.head())[0] == 200


ASKING = b"POST /v1/chat/completions HTTP/1.1\r\n"
SHORT = b"content-length: 9\r\n"
EVIL = b"origin: https://evil.test\r\n"
REFUSED_EARLY = {
    "unknown path": (b"POST /v1/nothing HTTP/1.1\r\n", SHORT, 404),
    "wrong method": (b"POST /health HTTP/1.1\r\n", SHORT, 405),
    "too large": (ASKING, b"content-length: 2000000\r\n", 413),
    "wrong origin": (ASKING, SHORT + EVIL, 403),
    "other expect": (ASKING, SHORT + b"expect: magic\r\n", 400),
}


@pytest.mark.parametrize("expect", [b"", b"expect: 100-continue\r\n"], ids=["", "expect"])
@pytest.mark.parametrize(("first", "more", "status"), REFUSED_EARLY.values(), ids=REFUSED_EARLY)
async def test_what_will_be_refused_is_refused_before_its_body(
    gateway: Any, first: bytes, more: bytes, status: int, expect: bytes
) -> None:
    async with gateway("[server]\nmax_body_mb = 1\n") as gw, gw.caller() as caller:
        expect = b"" if b"expect" in more else expect
        caller.send(first + b"host: 127.0.0.1\r\n" + more + expect + b"\r\n")
        assert (await caller.head())[0] == status


async def test_a_refused_body_that_comes_anyway_does_not_eat_the_answer(gateway: Any) -> None:
    async with gateway("[server]\nmax_body_mb = 1\n") as gw, gw.caller() as caller:
        caller.send(HEAD + b"content-length: 3000000\r\n\r\n" + b" " * 3_000_000)
        assert (await caller.answer()).status == 413
        assert await caller.closed()


# Limits.


def shape(body: Any) -> str:
    """Which protocol's error an error is."""
    if body.get("type") == "error":
        return "messages"
    return "google" if isinstance(body["error"]["code"], int) else "openai"


SHAPES = {
    "/v1/chat/completions": "openai",
    "/v1/responses": "openai",
    "/v1/messages": "messages",
    "/v1beta/models/x/y:generateContent": "google",
}
TOO_LARGE = {
    "length": b"content-length: 2000000\r\n\r\n",
    "chunked": b"transfer-encoding: chunked\r\n\r\n" + chunked(b" " * 1_100_000, 50_000),
}


@pytest.mark.parametrize("body", TOO_LARGE.values(), ids=TOO_LARGE)
@pytest.mark.parametrize(("path", "protocol"), SHAPES.items())
async def test_too_large_a_body_is_refused_in_the_shape_of_its_path(
    gateway: Any, path: str, protocol: str, body: bytes
) -> None:
    async with gateway("[server]\nmax_body_mb = 1\n") as gw, gw.caller() as caller:
        head = b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\n" % path.encode()
        caller.send(head + b"content-type: application/json\r\n" + body)
        answer = await caller.answer()
        assert (answer.status, shape(answer.json())) == (413, protocol)
        assert await caller.closed()


LONG_HEADS = {
    "a long field": HEALTH[:-2] + b"x: " + b"x" * 70_000 + b"\r\n\r\n",
    "no end": HEALTH[:-2] + b"x: " + b"x" * 70_000,
    "a long target": b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "many fields": HEALTH[:-2] + b"x: y\r\n" * 300 + b"\r\n",
}


@pytest.mark.parametrize("raw", LONG_HEADS.values(), ids=LONG_HEADS)
async def test_too_large_a_head_is_refused(gateway: Any, raw: bytes) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(raw)
        answer = await caller.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (431, "headers_too_large")
        assert await caller.closed()


# What is no request.

HOST = b"host: 127.0.0.1\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"
TE = b"transfer-encoding: chunked\r\n"
SMUGGLED = {
    "both lengths": POST + HOST + TE + b"content-length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": POST + HOST + b"content-length: 0\r\ncontent-length: 44\r\n\r\n",
    "equal lengths": POST + HOST + b"content-length: 0\r\ncontent-length: 0\r\n\r\n",
    "listed lengths": POST + HOST + b"content-length: 0, 0\r\n\r\n",
    "signed length": POST + HOST + b"content-length: +0\r\n\r\n",
    "hex length": POST + HOST + b"content-length: 0x0\r\n\r\n",
    "empty length": POST + HOST + b"content-length:\r\n\r\n",
    "two codings": POST + HOST + TE + TE + b"\r\n0\r\n\r\n",
    "gzip, chunked": POST + HOST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": POST + HOST + b"transfer-encoding: identity\r\n\r\n",
    "vertical tab": POST + HOST + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"POST / HTTP/1.0\r\n" + TE + b"\r\n0\r\n\r\n",
    "bare lf line": POST + b"host: 127.0.0.1\ncontent-length: 0\r\n\r\n",
    "bare lf head": POST[:-2] + b"\nhost: 127.0.0.1\n\n",
    "bare cr": POST + HOST + b"x: a\rb\r\n\r\n",
    "folded": POST + HOST + b"x: a\r\n b\r\n\r\n",
    "folded by tab": POST + HOST + b"x: a\r\n\tb\r\n\r\n",
    "space before colon": POST + HOST + b"content-length : 0\r\n\r\n",
    "space before name": POST + b" " + HOST + b"\r\n",
    "no colon": POST + HOST + b"what\r\n\r\n",
    "empty name": POST + HOST + b": x\r\n\r\n",
    "nul": POST + HOST + b"x: a\x00b\r\n\r\n",
    "no host": POST + b"\r\n",
    "two hosts": POST + HOST + HOST + b"\r\n",
    "odd host": POST + b"host: a b\r\n\r\n",
    "user in host": POST + b"host: 127.0.0.1@evil.test\r\n\r\n",
    "bad chunk size": POST + HOST + TE + b"\r\nzz\r\n\r\n0\r\n\r\n",
    "signed chunk size": POST + HOST + TE + b"\r\n-1\r\n\r\n0\r\n\r\n",
    "spaced chunk size": POST + HOST + TE + b"\r\n 0\r\n\r\n",
    "0x chunk size": POST + HOST + TE + b"\r\n0x1\r\na\r\n0\r\n\r\n",
    "huge chunk size": POST + HOST + TE + b"\r\n" + b"f" * 17 + b"\r\n",
    "chunk too long": POST + HOST + TE + b"\r\n1\r\nabc\r\n0\r\n\r\n",
    "bare lf chunk": POST + HOST + TE + b"\r\n1\na\n0\n\n",
    "lower-case method": b"get /health HTTP/1.1\r\n" + HOST + b"\r\n",
    "two spaces": b"GET  /health HTTP/1.1\r\n" + HOST + b"\r\n",
    "no version": b"GET /health\r\n" + HOST + b"\r\n",
    "other version": b"GET /health HTTP/2.0\r\n" + HOST + b"\r\n",
    "http/1.10": b"GET /health HTTP/1.10\r\n" + HOST + b"\r\n",
    "no path": b"GET health HTTP/1.1\r\n" + HOST + b"\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "authority": b"CONNECT a.test:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "tls hello": b"\x16\x03\x01\x00\xf1\x01\r\n\r\n",
}


@pytest.mark.parametrize("raw", SMUGGLED.values(), ids=SMUGGLED)
async def test_what_could_be_read_in_two_ways_is_refused(gateway: Any, raw: bytes) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(raw + HEALTH)
        answer = await caller.answer()
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert answer.json()["error"]["code"] == "malformed_http"
        assert await caller.closed()  # and nothing that followed was served


async def test_what_follows_a_refused_request_is_not_served(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(b"what?\r\n\r\n")
        assert (await caller.answer()).status == 400
        await send_in_pieces(caller, [HEALTH, HEALTH])  # while we linger, to let it read that
        assert await caller.closed()
        assert len(gw.lines()) == 1


async def test_what_is_no_request_gets_its_line_in_the_log(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(b"what?\r\n\r\n")
        answer = await caller.answer()
        [line] = gw.lines()
        assert (line["status"], line["code"]) == (400, "malformed_http")
        assert line["id"] == answer.headers["x-bitrouter-request-id"]


def mutated(seed: int) -> bytes:
    rng = random.Random(seed)
    raw = bytearray(SENT[rng.choice(sorted(SENT))])
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(raw)) for _ in range(2))
        piece = bytes(raw[i : min(j, i + 20)])
        change = rng.choice([b"", piece * 2, piece[::-1], rng.randbytes(3), b"\r\n", b"\x00", b":"])
        raw[i : i + len(piece)] = change
    return bytes(raw)


async def all_that_comes(port: int, raw: bytes) -> bytes:
    """Send something, close our half, and read until the other side closes too."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    writer.write_eof()
    try:
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("seed", range(0, 200, 10))
async def test_no_mutation_of_a_request_hurts(gateway: Any, seed: int) -> None:
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with gateway() as gw:
        for one in range(seed, seed + 10):
            raw = mutated(one)
            came = await all_that_comes(gw.port, raw)
            statuses = {int(m) for m in re.findall(rb"(?m)^HTTP/1.1 (\d+)", came)}
            assert statuses <= {200, 100, 400, 403, 404, 405, 413, 415, 431, 501}, (one, raw)
        assert told == [] and "Traceback" not in gw.written.getvalue()


# Deadlines.

HALVES = {
    "request line": (b"POST /v1/ch", "head"),
    "head": (HEAD, "head"),
    "body": (HEAD + b"content-length: 9\r\n\r\n{", "body"),
    "chunked body": (HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{", "body"),
}


@pytest.mark.parametrize(("half", "missing"), HALVES.values(), ids=HALVES)
async def test_half_a_request_times_out(gateway: Any, half: bytes, missing: str) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(half)
        await until(lambda: only_connection(gw).deadline <= gw.app.sweeper.now + 31)
        only_connection(gw).deadline = 0.0  # as if it had passed
        answer = await caller.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert f"{missing} did not arrive" in answer.json()["error"]["message"]
        assert await caller.closed()


async def test_bytes_that_trickle_in_do_not_move_a_heads_deadline(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        await send_in_pieces(caller, slices(HEALTH[:10], 1))
        await until(lambda: only_connection(gw)._inbox == HEALTH[:10])
        deadline = only_connection(gw).deadline
        await asyncio.sleep(0.03)  # sweeps pass
        caller.send(HEALTH[10:20])
        await until(lambda: only_connection(gw)._inbox == HEALTH[:20])
        assert only_connection(gw).deadline == deadline


async def test_a_connection_idle_for_long_is_closed_without_a_word(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        await caller.get("/health")
        only_connection(gw).deadline = 0.0
        assert await caller.closed()


async def test_a_caller_that_reads_nothing_is_cut_in_the_end(gateway: Any) -> None:
    async with gateway() as gw:
        with socket.create_connection(("127.0.0.1", gw.port)) as sock:
            sock.setblocking(False)
            raw = request_bytes("POST", CHAT, echo("x" * 9_000_000))  # more than a socket holds
            await asyncio.get_running_loop().sock_sendall(sock, raw)
            await until(lambda: only_connection(gw).slow)
            only_connection(gw).deadline = 0.0
            await until(lambda: gw.listener.connections == 0)


# Old and odd forms.


@asynccontextmanager
async def old_caller(gw: Any, raw: bytes) -> AsyncIterator[Caller]:
    async with gw.caller() as caller:
        caller.send(raw)
        yield caller


OLD = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"content-length: %d\r\n" % len(BODY)


async def test_http_1_0_is_answered_and_closed(gateway: Any) -> None:
    async with gateway() as gw, old_caller(gw, OLD + b"\r\n" + BODY) as caller:
        assert said(await caller.answer()) == "Grüße"
        assert await caller.closed()


async def test_http_1_0_may_keep_its_connection(gateway: Any) -> None:
    raw = OLD + b"connection: keep-alive\r\n\r\n" + BODY
    async with gateway() as gw, old_caller(gw, raw + raw) as caller:
        assert [said(await caller.answer()) for _ in range(2)] == ["Grüße", "Grüße"]


async def test_http_1_0_gets_streams_without_chunks(gateway: Any) -> None:
    body = json.dumps(ask("a b", model="echo/echo", stream=True)).encode()
    head = OLD.replace(b"content-length: %d" % len(BODY), b"content-length: %d" % len(body))
    raw = head + b"connection: keep-alive\r\n\r\n" + body
    async with gateway() as gw, old_caller(gw, raw) as caller:
        answer = await caller.answer()
        assert "transfer-encoding" not in answer.headers
        assert answer.events()[-1] == "[DONE]"
        assert await caller.closed()


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/nothing", 404)])
async def test_head_has_the_headers_and_no_body(gateway: Any, path: str, status: int) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(request_bytes("HEAD", path, None) + HEALTH)
        answer = await caller.answer(bodiless=True)
        assert answer.status == status and int(answer.headers["content-length"]) > 0
        assert (await caller.answer()).json()["status"] == "ok"


# fmt: off
ABSOLUTE = [
    (b"GET http://127.0.0.1/health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",        200),
    (b"GET http://localhost:4356/health?x=1 HTTP/1.1\r\nhost: x.test\r\n\r\n",  200),
    (b"GET http://evil.test/health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",        403),
    (b"GET http://127.0.0.1/feedback HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",      501),
]
# fmt: on


@pytest.mark.parametrize(("raw", "status"), ABSOLUTE)
async def test_an_absolute_target_counts_for_more_than_the_host(
    gateway: Any, raw: bytes, status: int
) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(raw)
        assert (await caller.answer()).status == status


async def test_accepted_sockets_do_not_wait_to_send(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        await caller.get("/health")
        transport = only_connection(gw)._transport
        assert transport
        sock = transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# Callers that hang up.

WAITS = {
    "whole": (ask(), Reply(hangs=True)),
    "before the first token": (ask(stream=True), Reply(hangs=True)),
    "in the stream": (ask(stream=True), stream(*CHAT_STREAM[:2], ending="hang")),
    "in the body": (ask(), Reply(chunks=(b"{", b" "), framing="chunked", ending="hang")),
}


@pytest.mark.parametrize(("body", "reply"), WAITS.values(), ids=WAITS)
async def test_a_caller_that_hangs_up_cancels_the_call(
    gateway: Any, provider: Any, openai_env: Any, body: Any, reply: Reply
) -> None:
    async with provider(reply) as up, gateway(environ=openai_env(up)) as gw:
        async with gw.caller() as caller:
            caller.send(request_bytes("POST", CHAT, body))
            await until(lambda: up.seen)
            if reply.headers:
                await caller.head()
        await up.hung_up.wait()
        await until(gw.lines)
        [line] = gw.lines()
        assert (line["status"], line["code"]) == (499, "caller_gone")


async def test_half_a_hang_up_is_one(gateway: Any, provider: Any, openai_env: Any) -> None:
    async with (
        provider(Reply(hangs=True)) as up,
        gateway(environ=openai_env(up)) as gw,
        gw.caller() as caller,
    ):
        caller.send(request_bytes("POST", CHAT, ask()))
        await until(lambda: up.seen)
        caller.writer.write_eof()
        await up.hung_up.wait()


async def test_a_caller_that_hangs_up_ends_the_pause_before_a_retry(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    busy = Reply(429, b"{}", {"retry-after": "1"})
    async with provider(busy) as up, gateway(environ=openai_env(up)) as gw:
        async with gw.caller() as caller:
            caller.send(request_bytes("POST", CHAT, ask()))
            await until(lambda: gw.lines("attempt_failed"))
            assert gw.lines("attempt_failed")[0]["then"] == "retry"
        await until(gw.lines)
        assert gw.lines()[0]["status"] == 499 and len(up.seen) == 1


async def test_a_caller_that_hangs_up_ends_the_dialling(gateway: Any) -> None:
    dialled, dropped = asyncio.Event(), asyncio.Event()

    async def never_shakes_hands(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        dialled.set()
        await reader.read()
        dropped.set()
        writer.close()

    async with await asyncio.start_server(never_shakes_hands, "127.0.0.1", 0) as server:
        base = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with gateway(environ={"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": base}) as gw:
            async with gw.caller() as caller:
                caller.send(request_bytes("POST", CHAT, ask()))
                await dialled.wait()
            await dropped.wait()
            await until(gw.lines)


async def test_a_call_that_was_cancelled_leaves_the_next_one_alone(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    script = [Reply(hangs=True), Reply(body=CHAT_ANSWER)]
    async with provider(*script) as up, gateway(environ=openai_env(up)) as gw:
        async with gw.caller() as caller:
            caller.send(request_bytes("POST", CHAT, ask()))
            await until(lambda: up.seen)
        await up.hung_up.wait()
        async with gw.caller() as caller:
            assert said(await caller.post(CHAT, ask())) == "Hello!"


# Silence in a stream.

PING = b'event: ping\ndata: {"type": "ping"}\n\n'
RESPONSES_STREAM = (
    named_event({"type": "response.created", "response": {"id": "r", "output": []}}),
    named_event({"type": "response.output_text.delta", "delta": "Hi", "item_id": "i"}),
    named_event({"type": "response.completed", "response": {"id": "r", "output": []}}),
)


def gemini_chunk(text: str, **more: str) -> bytes:
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, **more}
    return b"data: " + json.dumps({"candidates": [candidate]}).encode() + b"\r\n\r\n"


GEMINI_STREAM = (gemini_chunk("Hi"), gemini_chunk("!", finishReason="STOP"))
SILENT = {
    "chat": (CHAT, ask(stream=True), (*CHAT_STREAM[:4], DONE), 2, b": keepalive\n\n"),
    "responses": (
        "/v1/responses",
        {"model": "openai/m", "input": "Hi", "stream": True},
        RESPONSES_STREAM,
        2,
        b": keepalive\n\n",
    ),
    "messages": (
        "/v1/messages",
        ask(model="anthropic/claude-haiku-4-5", max_tokens=9, stream=True),
        MESSAGES_STREAM,
        3,
        PING,
    ),
    "gemini": (f"{GEMINI}?alt=sse", {"contents": []}, GEMINI_STREAM, 1, b"}\r\n\r\n\r\n"),
}


def everyone_at(base: str) -> dict[str, str]:
    names = {"OPENAI": "/v1", "ANTHROPIC": "/v1", "GOOGLE": "/v1beta"}
    keys = {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k", "GOOGLE_API_KEY": "k"}
    return keys | {f"{name}_BASE_URL": base + path for name, path in names.items()}


@pytest.mark.parametrize(("path", "body", "events", "count", "mark"), SILENT.values(), ids=SILENT)
async def test_a_silent_stream_says_that_it_is_alive(
    gateway: Any, provider: Any, path: str, body: Any, events: Any, count: int, mark: bytes
) -> None:
    script = stream(*events[:count], *[None] * 6, *events[count:], gap_s=0.01)
    async with (
        provider(script) as up,
        gateway(environ=everyone_at(up.base), heartbeat_s=0.01) as gw,
        gw.caller() as caller,
    ):
        answer = await caller.post(path, body)
        assert answer.status == 200, answer
        alive = answer.body.index(mark)
        assert 0 < alive < answer.body.index(events[-1])


async def test_a_sign_of_life_never_cuts_an_event_in_two(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    half, rest = CHAT_STREAM[2][:20], CHAT_STREAM[2][20:]
    script = stream(
        *CHAT_STREAM[:2], half, *[None] * 6, rest, CHAT_STREAM[3], CHAT_STREAM[5], gap_s=0.01
    )
    async with (
        provider(script) as up,
        gateway(environ=openai_env(up), heartbeat_s=0.01) as gw,
        gw.caller() as caller,
    ):
        answer = await caller.post(CHAT, ask(stream=True))
        assert b": keepalive\n\n" in answer.body
        assert answer.body.replace(b": keepalive\n\n", b"") == b"".join(
            (*CHAT_STREAM[:4], CHAT_STREAM[5])
        )


async def test_nothing_is_said_before_the_first_token(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    script = stream(*CHAT_STREAM, after_s=0.05)
    async with (
        provider(script) as up,
        gateway(environ=openai_env(up), heartbeat_s=0.01) as gw,
        gw.caller() as caller,
    ):
        answer = await caller.post(CHAT, ask(stream=True))
        assert answer.body.startswith(CHAT_STREAM[0])


async def test_a_whole_answer_is_waited_for_in_silence(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    async with (
        provider(Reply(body=CHAT_ANSWER, after_s=0.05)) as up,
        gateway(environ=openai_env(up), heartbeat_s=0.01) as gw,
        gw.caller() as caller,
    ):
        assert (await caller.post(CHAT, ask())).json() == CHAT_ANSWER


async def test_a_stream_that_flows_needs_no_sign_of_life(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    spaced = [piece for event in CHAT_STREAM for piece in (event, None)]
    async with (
        provider(stream(*spaced, gap_s=0.02)) as up,
        gateway(environ=openai_env(up), heartbeat_s=5.0) as gw,
        gw.caller() as caller,
    ):
        assert b": keepalive" not in (await caller.post(CHAT, ask(stream=True))).body


# Callers that read slowly, or not at all.


@asynccontextmanager
async def choked_caller(gw: Any) -> AsyncIterator[socket.socket]:
    """A lazy caller, over sockets that hold next to nothing."""
    async with lazy_caller(gw.port, 4096) as sock:
        await until(lambda: gw.listener.connections)
        only_transport(gw).get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
        )
        yield sock


def only_transport(gw: Any) -> asyncio.Transport:
    transport = only_connection(gw)._transport
    assert transport
    return transport


async def read_to_end(sock: socket.socket) -> bytes:
    got = b""
    while piece := await asyncio.get_running_loop().sock_recv(sock, 2**20):
        got += piece
    return got


async def test_requests_wait_while_their_caller_reads_no_answers(gateway: Any) -> None:
    loop, last = asyncio.get_running_loop(), HEALTH[:-2] + b"connection: close\r\n\r\n"
    async with gateway() as gw, choked_caller(gw) as sock:
        await loop.sock_sendall(sock, HEALTH * 999 + last)
        await until(lambda: only_connection(gw).slow)
        assert only_transport(gw).get_write_buffer_size() < 100_000
        assert (await read_to_end(sock)).count(b"HTTP/1.1 200") == 1000


async def test_a_stream_waits_while_its_caller_reads_no_answers(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    async with (
        provider(stream(*CHAT_STREAM)) as up,
        gateway(environ=openai_env(up)) as gw,
        choked_caller(gw) as sock,
    ):
        first = request_bytes("POST", CHAT, echo("x" * 200_000))
        then = request_bytes("POST", CHAT, ask(stream=True), connection="close")
        await asyncio.get_running_loop().sock_sendall(sock, first + then)
        await until(lambda: only_connection(gw).slow)
        await asyncio.sleep(0.01)
        assert up.seen == []
        assert DONE in await read_to_end(sock)


async def test_a_caller_that_reads_slowly_is_not_cut(gateway: Any) -> None:
    loop, text = asyncio.get_running_loop(), "x" * 300_000
    async with gateway() as gw, choked_caller(gw) as sock:
        raw = request_bytes("POST", CHAT, echo(text), connection="close")
        await loop.sock_sendall(sock, raw)
        await until(lambda: only_connection(gw).slow)
        before, got = only_transport(gw).get_write_buffer_size(), b""
        while only_transport(gw).get_write_buffer_size() == before:
            got += await loop.sock_recv(sock, 2000)
        only_connection(gw).deadline = 0.0  # as if it had passed
        await until(lambda: only_connection(gw).deadline)
        assert text.encode() in got + await read_to_end(sock)


async def test_a_closing_connection_that_nobody_reads_is_dropped_in_the_end(gateway: Any) -> None:
    async with gateway() as gw, choked_caller(gw) as sock:
        raw = request_bytes("POST", CHAT, echo("x" * 50_000), connection="close")
        await asyncio.get_running_loop().sock_sendall(sock, raw)
        await until(lambda: only_transport(gw).is_closing())
        assert not only_connection(gw).slow  # what is left is too little for that
        only_connection(gw).deadline = 0.0  # as if it had passed
        await until(lambda: gw.listener.connections == 0)


# Requests that go too far.


async def test_nothing_is_done_after_the_last_request(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(request_bytes("GET", "/health", None, connection="close") + HEALTH)
        assert (await caller.answer()).headers["connection"] == "close"
        assert await caller.closed()
        assert len(gw.lines()) == 1


async def test_a_chunked_body_is_asked_for_when_the_caller_waits_to_be_asked(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(HEAD + b"transfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n")
        assert (await caller.head())[0] == 100
        caller.send(chunked(BODY))
        assert said(await caller.answer()) == "Grüße"


EXCESSIVE_PACKS = {
    "empty members": (gzip.compress(b"") * 2000 + gzip.compress(BODY), (400, 413)),
    "garbage": (gzip.compress(BODY) + b"garbage", (400,)),
    "two members": (gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]), (200,)),
}


@pytest.mark.parametrize(("body", "statuses"), EXCESSIVE_PACKS.values(), ids=EXCESSIVE_PACKS)
async def test_a_packed_body_has_some_members_and_an_end(
    gateway: Any, body: bytes, statuses: tuple[int, ...]
) -> None:
    async with gateway() as gw, gw.caller() as caller:
        assert (await caller.post(CHAT, body, content_encoding="gzip")).status in statuses


async def test_http_1_0_is_told_that_its_connection_is_kept(gateway: Any) -> None:
    raw = OLD + b"connection: keep-alive\r\n\r\n" + BODY
    async with gateway() as gw, old_caller(gw, raw) as caller:
        assert (await caller.answer()).headers["connection"] == "keep-alive"


async def test_a_request_may_come_after_any_number_of_empty_lines(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(b"\r\n" * 32_768 + HEALTH)
        assert (await caller.answer()).status == 200


async def test_echo_is_not_asked_to_call_a_tool_ten_thousand_times(gateway: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = "call f {" * 10_000
    async with gateway() as gw, gw.caller() as caller:
        assert said(await caller.post(CHAT, ask(text, "echo/echo", tools=tools))) == text
