"""The HTTP client: deadlines, the pool, answers in all their forms, TLS, proxies."""

from __future__ import annotations

import asyncio
import base64
import gzip
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import (
    CHAT_ANSWER,
    CHAT_STREAM,
    PIECE,
    PIECES,
    FakeProvider,
    Reply,
    ask,
    every_cut,
    lazy_caller,
    pusher,
    request_bytes,
    slices,
    stalled,
    stream,
    until,
)

import bitrouter
from bitrouter import Collector, Connection, Origin, Pool, ResponseHead, Sweeper, origin_of

TLS = Path(__file__).parent / "tls"  # its files say how they were made
CA = {"SSL_CERT_FILE": str(TLS / "ca.pem")}
REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
HERE = "127.0.0.1"


def tls_server() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem")
    return context


@dataclass
class Wire:
    """A server that sends exactly the bytes it is told, one answer for each request.

    An answer is a list of pieces, sent one by one. b"" as a piece closes the connection; so does
    the end of the script.
    """

    script: list[list[bytes]]
    port: int = 0
    connections: int = 0
    received: bytes = b""
    gone: int = 0
    _open: dict[asyncio.StreamWriter, asyncio.Task[Any]] = field(default_factory=dict)

    @property
    def origin(self) -> Origin:
        return Origin(HERE, self.port, False)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._open[writer] = task
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.received += head
                await self._answer(writer)
        except (OSError, asyncio.IncompleteReadError, IndexError):
            self.gone += 1
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        for piece in self.script.pop(0):
            if not piece:
                raise ConnectionError
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # so that what is cut here arrives cut

    async def stop(self) -> None:
        for writer in self._open:
            writer.transport.abort()
        await asyncio.gather(*self._open.values(), return_exceptions=True)


@asynccontextmanager
async def wire(
    *script: bytes | list[bytes], host: str = HERE, tls: bool = False
) -> AsyncIterator[Wire]:
    one = Wire([[answer] if isinstance(answer, bytes) else answer for answer in script])
    context = tls_server() if tls else None
    async with await asyncio.start_server(one.serve, host, 0, ssl=context) as server:
        one.port = server.sockets[0].getsockname()[1]
        try:
            yield one
        finally:
            await one.stop()


@asynccontextmanager
async def pool_of(environ: dict[str, str] | None = None, idle_s: float = 5) -> AsyncIterator[Pool]:
    sweeper = Sweeper(0.002)
    sweeper.start()
    pool = Pool(sweeper, environ or {}, idle_s)
    try:
        yield pool
    finally:
        pool.close()
        sweeper.stop()
        await asyncio.sleep(0)


async def lend(
    pool: Pool, origin: Origin, connect_s: float = 2.0, *, fresh: bool = False
) -> Connection:
    return await pool.lend("lab", origin, connect_s, fresh=fresh)


def send(connection: Connection) -> tuple[Collector, list[tuple[ResponseHead, bytes]]]:
    answers: list[tuple[ResponseHead, bytes]] = []
    sink = Collector(asyncio.get_running_loop().create_future(), lambda *a: answers.append(a))
    connection.start(REQUEST, sink)
    return sink, answers


async def fetch(pool: Pool, origin: Origin) -> tuple[ResponseHead, bytes]:
    """One exchange, over an idle connection if there is one."""
    async with asyncio.timeout(1):
        sink, answers = send(await lend(pool, origin))
        await sink.done
    return answers[0]


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind((HERE, 0))
        return int(sock.getsockname()[1])


def at(port: int, scheme: str = "http", host: str = HERE) -> dict[str, str]:
    """An environment in which OpenAI is somewhere else."""
    return {"OPENAI_API_KEY": "sk-test-key", "OPENAI_BASE_URL": f"{scheme}://{host}:{port}/v1"}


NO_RETRY = "[upstream.retry]\nmax = 0\n"


# Deadlines.


@dataclass(eq=False)
class Thing:
    sweeper: Sweeper
    deadline: float
    expired: asyncio.Event = field(default_factory=asyncio.Event)
    lag_s: float = 0.0

    def expire(self, now: float) -> None:
        assert now >= self.deadline
        self.deadline, self.lag_s = bitrouter.NEVER, self.sweeper.lag_s
        self.expired.set()


@asynccontextmanager
async def sweeping() -> AsyncIterator[Sweeper]:
    sweeper = Sweeper(0.001)
    sweeper.start()
    yield sweeper
    sweeper.stop()


def hold_up(seconds: float) -> None:
    time.sleep(seconds)


async def test_only_what_is_due_expires() -> None:
    async with sweeping() as sweeper:
        due, later = Thing(sweeper, sweeper.now), Thing(sweeper, sweeper.now + 60)
        sweeper.watch(later)
        sweeper.watch(due)
        await due.expired.wait()
        await asyncio.sleep(0.005)
    assert not later.expired.is_set()


async def test_what_is_forgotten_does_not_expire() -> None:
    async with sweeping() as sweeper:
        forgotten, other = Thing(sweeper, sweeper.now), Thing(sweeper, sweeper.now)
        sweeper.watch(forgotten)
        sweeper.watch(other)
        sweeper.forget(forgotten)
        await other.expired.wait()
    assert not forgotten.expired.is_set()


@dataclass(eq=False)
class Waker(Thing):
    other: Waker | None = None

    def expire(self, now: float) -> None:
        super().expire(now)
        assert self.other is not None
        self.other.deadline = now + 60  # put to use by what this one set going


async def test_what_an_expiry_puts_to_use_does_not_expire_in_the_same_sweep() -> None:
    async with sweeping() as sweeper:
        one, other = Waker(sweeper, sweeper.now), Waker(sweeper, sweeper.now)
        one.other, other.other = other, one
        sweeper.watch(one)
        sweeper.watch(other)
        await asyncio.sleep(0.02)
    assert one.expired.is_set() != other.expired.is_set()


async def test_deadlines_that_come_to_pass_later_are_seen_too() -> None:
    async with sweeping() as sweeper:
        thing = Thing(sweeper, sweeper.now + 0.02)
        sweeper.watch(thing)
        await thing.expired.wait()
        assert sweeper.now >= asyncio.get_running_loop().time() - 0.5


async def test_a_held_up_loop_shows_as_lag() -> None:
    async with sweeping() as sweeper:
        thing = Thing(sweeper, sweeper.now)
        sweeper.watch(thing)
        hold_up(0.03)
        await thing.expired.wait()
    assert thing.lag_s >= 0.025


async def test_nothing_expires_after_the_stop() -> None:
    async with sweeping() as sweeper:
        sweeper.stop()
        thing = Thing(sweeper, sweeper.now)
        sweeper.watch(thing)
        await asyncio.sleep(0.01)
    assert not thing.expired.is_set()


@dataclass(eq=False)
class Fleeting(Thing):
    def expire(self, now: float) -> None:
        assert now >= self.deadline
        self.sweeper.forget(self)
        self.expired.set()


async def test_what_expires_may_forget_itself() -> None:
    async with sweeping() as sweeper:
        things = [Fleeting(sweeper, sweeper.now) for _ in range(3)]
        for thing in things:
            sweeper.watch(thing)
        await asyncio.gather(*(thing.expired.wait() for thing in things))


# The pool.


async def test_two_requests_share_a_connection() -> None:
    async with wire(OK, OK) as server, pool_of() as pool:
        bodies = [(await fetch(pool, server.origin))[1] for _ in range(2)]
        assert (bodies, server.connections) == ([b"ok", b"ok"], 1)


async def test_the_youngest_idle_connection_is_lent_first() -> None:
    async with wire(OK, OK) as server, pool_of() as pool:
        older, younger = [await lend(pool, server.origin) for _ in range(2)]
        for connection in (older, younger):
            await send(connection)[0].done
        assert [await lend(pool, server.origin) for _ in range(2)] == [younger, older]
        older.abort()
        younger.abort()


async def test_a_fresh_connection_is_fresh_even_when_one_is_idle() -> None:
    async with wire(OK) as server, pool_of() as pool:
        await fetch(pool, server.origin)
        fresh = await lend(pool, server.origin, 2.0, fresh=True)
        assert not fresh.reused
        fresh.abort()


async def test_an_idle_connection_is_closed_when_its_time_is_up() -> None:
    async with wire(OK, OK) as server, pool_of(idle_s=0.01) as pool:
        await fetch(pool, server.origin)
        await until(lambda: server.gone == 1)
        await fetch(pool, server.origin)
        assert server.connections == 2


async def test_a_lent_connection_has_no_idle_deadline() -> None:
    async with wire(OK, OK) as server, pool_of(idle_s=0.01) as pool:
        await fetch(pool, server.origin)
        connection = await lend(pool, server.origin)
        await asyncio.sleep(0.03)
        await send(connection)[0].done
        assert server.connections == 1


async def test_no_connection_is_kept_when_their_idle_time_is_nought() -> None:
    async with wire(OK, OK) as server, pool_of(idle_s=0) as pool:
        await fetch(pool, server.origin)
        await fetch(pool, server.origin)
        assert server.connections == 2


@pytest.mark.parametrize("after", [b"", b"HTTP/1.1 408 x\r\n\r\n"], ids=["eof", "bytes"])
async def test_a_connection_that_ends_or_speaks_while_idle_is_dropped(after: bytes) -> None:
    async with wire([OK, after], OK) as server, pool_of() as pool:
        first = await lend(pool, server.origin)
        await send(first)[0].done
        await until(lambda: not first.usable)
        assert not (await lend(pool, server.origin)).reused
        pool.close()


ENDS_CONNECTION = {
    "close": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
    "http/1.0": b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "more bytes": OK + b"x",
}


@pytest.mark.parametrize("answer", ENDS_CONNECTION.values(), ids=ENDS_CONNECTION)
async def test_a_connection_that_cannot_be_kept_is_not_reused(answer: bytes) -> None:
    async with wire(answer, OK) as server, pool_of() as pool:
        assert (await fetch(pool, server.origin))[1] == b"ok"
        await fetch(pool, server.origin)
        assert server.connections == 2


async def test_a_refused_port_is_unreachable() -> None:
    async with pool_of() as pool:
        with pytest.raises(bitrouter.UpstreamUnreachable, match=r"could not be reached.*refused"):
            await lend(pool, Origin(HERE, closed_port(), False))


@asynccontextmanager
async def full_backlog() -> AsyncIterator[int]:
    """A port whose backlog is full: the kernel lets further handshakes wait."""
    with socket.socket() as listening:
        listening.bind((HERE, 0))
        listening.listen(0)
        address = listening.getsockname()
        waiting = [socket.socket() for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(address)
        try:
            yield address[1]
        finally:
            for sock in waiting:
                sock.close()


async def test_a_dial_that_is_not_answered_times_out() -> None:
    async with full_backlog() as port, pool_of() as pool:
        with pytest.raises(bitrouter.UpstreamTimeout, match=r"reached within 0\.03 s") as caught:
            await lend(pool, Origin(HERE, port, False), 0.03)
        assert caught.value.code == "upstream_connect_timeout"


async def test_a_tls_handshake_that_is_not_answered_times_out() -> None:
    async with wire() as server, pool_of() as pool:
        with pytest.raises(bitrouter.UpstreamTimeout, match="could not be reached within"):
            await lend(pool, Origin(HERE, server.port, True), 0.03)
        await until(lambda: server.gone == 1)  # and the socket is closed


async def test_so_many_dials_at_once_and_no_more() -> None:
    async with wire() as server, pool_of() as pool:
        origin = Origin(HERE, server.port, True)  # it never answers the handshake
        loop = asyncio.get_running_loop()
        dials = [loop.create_task(lend(pool, origin, 9.0)) for _ in range(70)]
        await until(lambda: server.connections == 64)
        await asyncio.sleep(0.02)
        assert server.connections == 64
        dials[0].cancel()
        await until(lambda: server.connections == 65)
        await asyncio.sleep(0.02)  # asyncio loses the socket of a dial cancelled just now
        for dial in dials:
            dial.cancel()
        await asyncio.gather(*dials, return_exceptions=True)


@pytest.mark.parametrize(
    ("host", "base"), [("::1", "http://[::1]:{}"), (HERE, "http://localhost:{}")]
)
async def test_both_families_are_reached(host: str, base: str) -> None:
    async with wire(OK, host=host) as server, pool_of() as pool:
        origin, _ = origin_of(base.format(server.port))
        assert (await fetch(pool, origin))[1] == b"ok"


def localhost_families() -> set[int]:
    return {found[0] for found in socket.getaddrinfo("localhost", 80)}


@pytest.mark.skipif(len(localhost_families()) < 2, reason="localhost has one address here")
@pytest.mark.parametrize("host", ["::1", HERE])
async def test_localhost_is_reached_whichever_family_listens(host: str) -> None:
    async with wire(OK, host=host) as server, pool_of() as pool:
        assert (await fetch(pool, Origin("localhost", server.port, False)))[1] == b"ok"


BASES = [
    ("https://api.example.test/v1", Origin("api.example.test", 443, True), "/v1"),
    ("http://api.example.test", Origin("api.example.test", 80, False), ""),
    ("http://[::1]:8080/a/", Origin("::1", 8080, False), "/a"),
]


@pytest.mark.parametrize(("base", "origin", "path"), BASES)
def test_a_base_url_tells_where_to_dial(base: str, origin: Origin, path: str) -> None:
    assert origin_of(base) == (origin, path)


@pytest.mark.parametrize("turns", range(20))
async def test_a_dial_cancelled_at_any_moment_leaves_nothing_open(turns: int) -> None:
    async with wire() as server, pool_of() as pool:
        dial = asyncio.get_running_loop().create_task(lend(pool, server.origin))
        for _ in range(turns):
            await asyncio.sleep(0)
        if not dial.cancel():
            dial.result().abort()
        await asyncio.gather(dial, return_exceptions=True)
        await asyncio.sleep(0.01)
        async with asyncio.timeout(0.5):
            await until(lambda: server.gone == server.connections)


# Stale connections.

CHAT = b'{"choices": [{"message": {"content": "hi"}}]}'
CHAT_OK = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(CHAT), CHAT)


async def ask_twice(gw: Any) -> list[int]:
    async with gw.caller() as caller:
        return [(await caller.post("/v1/chat/completions", ask())).status for _ in range(2)]


async def test_a_stale_connection_is_replaced_without_a_word(gateway: Any) -> None:
    async with (
        wire(CHAT_OK, [b""], CHAT_OK) as server,
        gateway(NO_RETRY, environ=at(server.port)) as gw,
    ):
        assert await ask_twice(gw) == [200, 200]
        assert (server.connections, gw.lines("attempt_failed")) == (2, [])


async def test_a_stale_connection_is_replaced_once_only(gateway: Any) -> None:
    async with (
        wire(CHAT_OK, [b""], [b""], CHAT_OK) as server,
        gateway(NO_RETRY, environ=at(server.port)) as gw,
    ):
        assert await ask_twice(gw) == [200, 503]
        assert server.received.count(b"POST") == 3


async def test_a_request_is_not_sent_again_once_a_byte_came_back(gateway: Any) -> None:
    async with (
        wire(CHAT_OK, [b"H", b""], CHAT_OK) as server,
        gateway(NO_RETRY, environ=at(server.port)) as gw,
    ):
        assert await ask_twice(gw) == [200, 503]
        assert server.received.count(b"POST") == 2


async def test_a_first_connection_that_closes_is_not_called_stale() -> None:
    async with wire([b""]) as server, pool_of() as pool:
        with pytest.raises(bitrouter.UpstreamUnreachable, match="before answering") as caught:
            await fetch(pool, server.origin)
        assert not isinstance(caught.value, bitrouter.StaleConnection)


# Answers.


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def packed(coding: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: {coding}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n"
ANSWERS = {
    "length": (OK, b"ok"),
    "no body": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", b"ok"),
    "chunked": (CHUNKED + b"\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\n\r\n", b"ok"),
    "trailer": (CHUNKED + b"\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n", b"ok"),
    "gzip": (packed("gzip", gzip.compress(b"ok", mtime=0)), b"ok"),
    "deflate": (packed("deflate", zlib.compress(b"ok")), b"ok"),
    "raw deflate": (packed("deflate", raw_deflate(b"ok")), b"ok"),
    "chunked gzip": (
        CHUNKED
        + b"content-encoding: gzip\r\n\r\n16\r\n%b\r\n0\r\n\r\n" % gzip.compress(b"ok", mtime=0),
        b"ok",
    ),
    "100": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
    "103 twice": (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 2 + OK, b"ok"),
}


@pytest.mark.parametrize(("raw", "body"), ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_is_understood_at_every_cut(raw: bytes, body: bytes) -> None:
    cuts = [[piece for piece in cut if piece] for cut in every_cut(raw)]
    async with wire(*cuts, list(slices(raw, 1))) as server, pool_of() as pool:
        for _ in range(len(cuts) + 1):
            assert (await fetch(pool, server.origin))[1] == body
        assert server.connections == 1


async def test_a_body_may_last_until_the_connection_ends() -> None:
    raw = b"HTTP/1.1 200 OK\r\n\r\nabc"
    cuts = [[*(piece for piece in cut if piece), b""] for cut in every_cut(raw)]
    async with wire(*cuts) as server, pool_of() as pool:
        for _ in cuts:
            assert (await fetch(pool, server.origin))[1] == b"abc"


GARBLED = {
    "not http": b"garbage\r\n\r\n",
    "http/2": b"HTTP/2 200 OK\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "bare lf": b"HTTP/1.1 200 OK\ncontent-length: 2\n\r\n\r\nok",
    "folded": b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\ncontent-length: 2\r\n\r\nok",
    "space before colon": b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\nok",
    "both lengths": CHUNKED + b"content-length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
    "bad length": b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok",
    "other coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nok",
    "bad chunk size": CHUNKED + b"\r\nzz\r\nok\r\n0\r\n\r\n",
    "chunk too long": CHUNKED + b"\r\n1\r\nok\r\n0\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\nx: " + b"x" * 70_000,
    "too many fields": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 300 + b"\r\n",
    "brotli": packed("br", b"ok"),
    "not gzip": packed("gzip", b"ok"),
    "short gzip": packed("gzip", gzip.compress(b"ok")[:-1]),
}


@pytest.mark.parametrize("raw", GARBLED.values(), ids=GARBLED)
async def test_an_answer_that_breaks_the_rules_is_garbled(raw: bytes) -> None:
    async with wire(raw, OK) as server, pool_of() as pool:
        with pytest.raises(bitrouter.UpstreamGarbled):
            await fetch(pool, server.origin)
        await fetch(pool, server.origin)
        assert server.connections == 2  # nothing more is believed from the first


CUT_SHORT = {
    "head": b"HTTP/1.1 200 OK\r\n",
    "length": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok",
    "chunk": CHUNKED + b"\r\n3\r\nok",
    "between chunks": CHUNKED + b"\r\n2\r\nok\r\n",
    "last chunk": CHUNKED + b"\r\n2\r\nok\r\n0\r\n",
}


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("raw", CUT_SHORT.values(), ids=CUT_SHORT)
async def test_an_answer_that_ends_too_early_is_no_answer(raw: bytes, tls: bool) -> None:
    async with wire([raw, b""], tls=tls) as server, pool_of(CA) as pool:
        with pytest.raises(bitrouter.UpstreamUnreachable, match="in the middle") as caught:
            await fetch(pool, Origin(HERE, server.port, tls))
        assert caught.value.code == "upstream_disconnected"


async def test_an_answer_that_does_not_come_is_a_timeout_that_says_what_was_missing() -> None:
    async with wire([b"HTTP/1.1 "], OK) as server, pool_of() as pool:
        connection = await lend(pool, server.origin)
        sink, _ = send(connection)
        connection.waiting = "sent no first token"
        connection.deadline = pool.sweeper.now + 0.01
        with pytest.raises(bitrouter.UpstreamTimeout, match="lab sent no first token"):
            await sink.done


async def test_each_byte_moves_the_idle_deadline_on_but_not_beyond_the_limit() -> None:
    async with wire([b"HTTP/1.1 "]) as server, pool_of() as pool:
        connection = await lend(pool, server.origin)
        connection.deadline, connection.idle_s, connection.limit = bitrouter.NEVER, 60.0, 1.0
        with pytest.raises(bitrouter.UpstreamTimeout):  # 1.0 is long ago
            await send(connection)[0].done


async def test_a_paused_answer_is_not_late() -> None:
    async with wire(OK) as server, pool_of() as pool:
        connection = await lend(pool, server.origin)
        sink, answers = send(connection)
        connection.pause()
        connection.deadline, connection.idle_s = 0.0, 60.0
        await until(lambda: connection.deadline > 0)
        assert not sink.done.done()
        connection.resume()
        await sink.done
        assert answers[0][1] == b"ok"


async def test_an_answer_larger_than_allowed_is_not_gathered() -> None:
    async with wire(OK) as server, pool_of() as pool:
        sink = Collector(asyncio.get_running_loop().create_future(), lambda *_: None, 1)
        (await lend(pool, server.origin)).start(REQUEST, sink)
        with pytest.raises(bitrouter.UpstreamGarbled, match="larger than we can hold"):
            await sink.done


async def test_a_bug_in_a_sink_becomes_an_error_for_who_waits(gateway: Any) -> None:
    def use(*_: Any) -> None:
        raise ZeroDivisionError

    async with gateway() as gw, wire(OK) as server:
        sink = Collector(asyncio.get_running_loop().create_future(), use)
        (await lend(gw.app.pool, server.origin)).start(REQUEST, sink)
        with pytest.raises(bitrouter.UpstreamError, match="failed to read the answer"):
            await sink.done
        assert len(gw.lines("answer_not_understood")) == 1


async def test_a_stream_whose_end_comes_late_leaves_its_connection_to_the_next(
    gateway: Any,
) -> None:
    events = [b"%x\r\n%b\r\n" % (len(event), event) for event in CHAT_STREAM]
    head = CHUNKED + b"content-type: text/event-stream\r\n\r\n"
    async with (
        wire([head, *events, b"0\r\n", b"\r\n"], CHAT_OK) as server,
        gateway(environ=at(server.port)) as gw,
        gw.caller() as caller,
    ):
        await caller.post("/v1/chat/completions", ask(stream=True))
        await asyncio.sleep(0.01)
        assert (await caller.post("/v1/chat/completions", ask())).status == 200
        assert server.connections == 1


async def test_dialled_sockets_do_not_wait_to_send() -> None:
    async with wire() as server, pool_of() as pool:
        connection = await lend(pool, server.origin)
        assert connection._transport
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.abort()


# Back-pressure.


SLOWLY = {"stream": "/v1/chat/completions", "raw": "/v1/audio/speech"}


@pytest.mark.parametrize("path", SLOWLY.values(), ids=SLOWLY)
async def test_a_caller_that_does_not_read_stalls_the_provider(gateway: Any, path: str) -> None:
    loop = asyncio.get_running_loop()
    async with (
        pusher() as push,
        gateway(environ=at(push.port)) as gw,
        lazy_caller(gw.port) as caller,
    ):
        body = ask(stream=True, input="x")
        await loop.sock_sendall(caller, request_bytes("POST", path, body, connection="close"))
        assert await stalled(push) < 12_000_000  # with what the kernel holds of two connections
        got = 0
        while data := await loop.sock_recv(caller, 2**20):
            got += data.count(b"x" * 1000 + b'"')
        assert PIECES - 64 <= got <= PIECES  # a read may have cut one in two
        assert push.pushed >= PIECES * len(PIECE)


# TLS.


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
async def test_a_ca_bundle_from_the_environment_is_trusted(variable: str) -> None:
    environ = {variable: str(TLS / "ca.pem")}
    async with wire(OK, OK, tls=True) as server, pool_of(environ) as pool:
        origin = Origin(HERE, server.port, True)
        assert [(await fetch(pool, origin))[1] for _ in range(2)] == [b"ok", b"ok"]
        assert server.connections == 1


DISTRUST = {
    "unknown authority": ({}, "localhost", "certificate verify failed|CERTIFICATE_VERIFY_FAILED"),
    "other name": (CA, "127.0.0.2", "CERTIFICATE_VERIFY_FAILED.*127.0.0.2"),
    "no such bundle": ({"SSL_CERT_FILE": "/nowhere.pem"}, HERE, r"CA bundle /nowhere\.pem"),
    "no bundle": ({"SSL_CERT_FILE": __file__}, HERE, "CA bundle .*test_transport"),
}


@pytest.mark.parametrize(("environ", "host", "said"), DISTRUST.values(), ids=DISTRUST)
async def test_a_certificate_that_cannot_be_trusted_is_refused_clearly(
    environ: dict[str, str], host: str, said: str
) -> None:
    async with wire(OK, host="0.0.0.0", tls=True) as server, pool_of(environ) as pool:
        with pytest.raises(bitrouter.UpstreamUnreachable, match=f"{said}"):
            await fetch(pool, Origin(host, server.port, True))
        assert server.received == b""


async def test_an_untrusted_certificate_names_the_way_out() -> None:
    async with wire(OK, tls=True) as server, pool_of() as pool:
        with pytest.raises(bitrouter.UpstreamUnreachable, match="SSL_CERT_FILE"):
            await fetch(pool, Origin(HERE, server.port, True))


@pytest.mark.parametrize("answer", [OK, b"\x15\x03\x01\x00\x02\x02\x28"], ids=["http", "alert"])
async def test_a_server_that_speaks_no_tls_is_unreachable(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, HERE, 0) as server, pool_of(CA) as pool:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(bitrouter.UpstreamUnreachable, match=f"TLS with {HERE} failed"):
            await lend(pool, Origin(HERE, port, True))


async def test_a_handshake_that_is_broken_off_is_unreachable() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async with await asyncio.start_server(serve, HERE, 0) as server, pool_of(CA) as pool:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(bitrouter.UpstreamUnreachable, match="during the handshake"):
            await lend(pool, Origin(HERE, port, True))


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_large_bodies_come_through_tls_intact(framing: str) -> None:
    body = bytes(range(256)) * 20_000  # 5 MB
    script = [Reply(chunks=tuple(slices(body, 99_991)), framing=framing)]
    fake = FakeProvider(script)
    async with (
        await asyncio.start_server(fake.serve, HERE, 0, ssl=tls_server()) as server,
        pool_of(CA) as pool,
    ):
        origin = Origin(HERE, server.sockets[0].getsockname()[1], True)
        assert (await fetch(pool, origin))[1] == body
        await fake.hang_up()


async def test_large_requests_go_through_tls_intact(gateway: Any) -> None:
    fake = FakeProvider([Reply(body=CHAT_ANSWER)])
    async with await asyncio.start_server(
        fake.serve, HERE, 0, ssl=tls_server(), limit=2**24
    ) as server:
        environ = at(server.sockets[0].getsockname()[1], "https") | CA
        async with gateway(environ=environ) as gw, gw.caller() as caller:
            text = "0123456789" * 300_000
            assert (await caller.post("/v1/chat/completions", ask(text))).status == 200
            assert fake.seen[0].json()["messages"][0]["content"] == text
        await fake.hang_up()


# Proxies.


@dataclass
class Proxy:
    """A CONNECT proxy that knows every name, for all lead to one port here.

    Attributes:
        answer: said instead of making way.
        slice: bytes passed on to the client at a time.
        heads: what was asked of it.
        passed: all that it could read, in both directions.
    """

    to_port: int
    answer: bytes | None = None
    slice: int = 65536
    made_way: bytes = b"HTTP/1.1 200 Connection established\r\nvia: test\r\n\r\n"
    port: int = 0
    heads: list[bytes] = field(default_factory=list)
    passed: bytes = b""
    _open: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.append(writer)
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        if self.answer is not None:
            writer.write(self.answer)
            if not self.answer:
                writer.close()
            return
        there, back = await asyncio.open_connection(HERE, self.to_port)
        self._open.append(back)
        writer.write(self.made_way)
        await asyncio.gather(self._pass(reader, back, 65536), self._pass(there, writer, self.slice))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int
    ) -> None:
        try:
            while data := await reader.read(size):
                self.passed += data
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        writer.close()

    async def stop(self) -> None:
        for writer in self._open:
            writer.transport.abort()
        await asyncio.sleep(0.002)


@asynccontextmanager
async def proxy_to(port: int, **more: Any) -> AsyncIterator[Proxy]:
    one = Proxy(port, **more)
    async with await asyncio.start_server(one.serve, HERE, 0) as server:
        one.port = server.sockets[0].getsockname()[1]
        try:
            yield one
        finally:
            await one.stop()


def by(proxy: Proxy | Wire) -> dict[str, str]:
    return {"HTTPS_PROXY": f"http://{HERE}:{proxy.port}", **CA}


FAR = Origin("llm.example.test", 443, True)  # a name that only the proxy knows


@pytest.mark.parametrize("size", [65536, 7, 1])
async def test_https_goes_through_a_tunnel(size: int) -> None:
    async with wire(OK, OK, tls=True) as server, proxy_to(server.port, slice=size) as proxy:
        async with pool_of(by(proxy)) as pool:
            assert [(await fetch(pool, FAR))[1] for _ in range(2)] == [b"ok", b"ok"]
        at_ = b"llm.example.test:443"
        assert proxy.heads == [b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (at_, at_)]


async def test_plain_http_goes_through_a_tunnel_too() -> None:
    async with wire(OK) as server, proxy_to(server.port) as proxy:
        async with pool_of({"http_proxy": f"{HERE}:{proxy.port}"}) as pool:
            assert (await fetch(pool, Origin("llm.example.test", 80, False)))[1] == b"ok"
        assert proxy.heads[0].startswith(b"CONNECT llm.example.test:80 HTTP/1.1\r\n")


async def test_a_proxy_is_told_its_credentials() -> None:
    async with wire(OK, tls=True) as server, proxy_to(server.port) as proxy:
        environ = {"HTTPS_PROXY": f"http://me:p%40ss@{HERE}:{proxy.port}", **CA}
        async with pool_of(environ) as pool:
            await fetch(pool, FAR)
        told = base64.b64encode(b"me:p@ss")
        assert b"\r\nProxy-Authorization: Basic %b\r\n" % told in proxy.heads[0]


async def test_the_key_does_not_travel_in_the_clear(gateway: Any) -> None:
    async with wire(CHAT_OK, tls=True) as server, proxy_to(server.port) as proxy:
        environ = at(443, "https", FAR.host) | {"ALL_PROXY": f"http://{HERE}:{proxy.port}", **CA}
        async with gateway(environ=environ) as gw, gw.caller() as caller:
            assert (await caller.post("/v1/chat/completions", ask())).status == 200
        assert b"Bearer sk-test-key" in server.received
        assert proxy.passed and b"sk-test-key" not in b"".join(proxy.heads) + proxy.passed


@pytest.mark.parametrize(
    "way",
    [
        b"HTTP/1.0 200 Connection established\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 201 so be it\r\n\r\n",  # RFC 9110, 9.3.6: any 2xx
    ],
)
async def test_a_proxy_makes_way_in_its_own_words(way: bytes) -> None:
    async with (
        wire(OK, tls=True) as server,
        proxy_to(server.port, made_way=way) as proxy,
        pool_of(by(proxy)) as pool,
    ):
        assert (await fetch(pool, FAR))[1] == b"ok"


REFUSALS = {
    "407": (b"HTTP/1.1 407 who are you\r\ncontent-length: 0\r\n\r\n", "the proxy answered 407"),
    "503": (b"HTTP/1.1 503 no\r\n\r\n", "the proxy answered 503 to CONNECT"),
    "garbage": (b"SSH-2.0-x\r\n\r\n", "proxy"),
    "endless": (b"HTTP/1.1 200 OK\r\nx: " + b"x" * 70_000, "the proxy's answer.*no end"),
    "closed": (b"", "closed the connection"),
}


@pytest.mark.parametrize(("answer", "said"), REFUSALS.values(), ids=REFUSALS)
async def test_a_proxy_that_makes_no_way_is_blamed(answer: bytes, said: str) -> None:
    async with proxy_to(0, answer=answer) as proxy, pool_of(by(proxy)) as pool:
        with pytest.raises(bitrouter.UpstreamError, match=said):
            await lend(pool, FAR)


async def test_a_proxy_that_does_not_answer_is_a_timeout() -> None:
    async with wire([]) as silent, pool_of(by(silent)) as pool:
        with pytest.raises(bitrouter.UpstreamTimeout, match="lab could not be reached within"):
            await lend(pool, FAR, 0.03)


async def test_loopback_is_never_proxied() -> None:
    nobody = f"http://{HERE}:{closed_port()}"
    async with wire(OK, OK) as server, pool_of({"HTTP_PROXY": nobody, "ALL_PROXY": nobody}) as pool:
        for host in (HERE, "localhost"):
            assert (await fetch(pool, Origin(host, server.port, False)))[1] == b"ok"


BAD_PROXIES = [
    "https://user:hunter2@proxy.test:443",
    "socks5://user:hunter2@proxy.test:1080",
    "socks5h://proxy.test",
    "http://",
    "http://user:hunter2@proxy.test:port",
    "http://user:hunter2@proxy.test:99999",
]


@pytest.mark.parametrize("url", BAD_PROXIES)
async def test_a_proxy_we_cannot_use_is_refused_clearly(url: str) -> None:
    async with pool_of({"HTTPS_PROXY": url}) as pool:
        with pytest.raises(bitrouter.UpstreamUnreachable, match=r"the proxy .*http://") as caught:
            await lend(pool, FAR)
        assert "hunter2" not in repr(caught.value) + caught.value.detail


# fmt: off
BYPASSES = [
    # NO_PROXY                      host                    by proxy
    ("",                            "llm.example.test",     True),
    ("other.test",                  "llm.example.test",     True),
    ("llm.example.test",            "llm.example.test",     False),
    ("example.test",                "llm.example.test",     False),
    (".example.test",               "llm.example.test",     False),
    ("EXAMPLE.test",                "llm.example.test",     False),
    ("ample.test",                  "llm.example.test",     True),
    ("a.test, example.test",        "llm.example.test",     False),
    ("*",                           "llm.example.test",     False),
    ("10.0.0.0/8",                  "10.20.30.40",          False),
    ("10.0.0.0/8",                  "11.20.30.40",          True),
    ("192.168.0.1/16, 10.0.0.0/8",  "10.0.0.1",             False),
    ("10.20.30.40",                 "10.20.30.40",          False),
    ("fd00::/8",                    "fd12::1",              False),
    ("fd00::/8",                    "10.0.0.1",             True),
    ("",                            "127.0.0.9",            False),
    ("",                            "::1",                  False),
]
# fmt: on


@pytest.mark.parametrize(("no_proxy", "host", "by_proxy"), BYPASSES)
async def test_no_proxy_is_heeded(no_proxy: str, host: str, by_proxy: bool) -> None:
    # Asked of a private helper: to dial these hosts would leave this machine.
    environ = {"HTTPS_PROXY": "http://proxy.test:3128", "NO_PROXY": no_proxy}
    async with pool_of(environ) as pool:
        assert bool(pool._proxy_for(Origin(host, 443, True))) is by_proxy


# fmt: off
CHOICES = [
    ({"HTTPS_PROXY": "a.test:1"},                               True,  ("a.test", 1)),
    ({"HTTPS_PROXY": "a.test:1"},                               False, None),
    ({"HTTP_PROXY": "a.test:1"},                                False, ("a.test", 1)),
    ({"HTTP_PROXY": "a.test:1"},                                True,  None),
    ({"ALL_PROXY": "http://a.test:1"},                          True,  ("a.test", 1)),
    ({"ALL_PROXY": "b.test:2", "https_proxy": "a.test:1"},      True,  ("a.test", 1)),
    ({"HTTPS_PROXY": "b.test:2", "https_proxy": "a.test:1"},    True,  ("a.test", 1)),
    ({"NO_PROXY": "example.test"},                              True,  None),
]
# fmt: on


@pytest.mark.parametrize(("environ", "tls", "chosen"), CHOICES)
async def test_the_scheme_chooses_the_proxy(
    environ: dict[str, str], tls: bool, chosen: tuple[str, int] | None
) -> None:
    async with pool_of(environ) as pool:
        found = pool._proxy_for(Origin("llm.example.test", 443, tls))
        assert (found[:2] if found else None) == chosen


async def test_a_stream_comes_through_proxy_and_tls(gateway: Any) -> None:
    fake = FakeProvider([stream(*CHAT_STREAM)])
    async with (
        await asyncio.start_server(fake.serve, HERE, 0, ssl=tls_server()) as server,
        proxy_to(server.sockets[0].getsockname()[1], slice=3) as proxy,
    ):
        environ = at(443, "https", FAR.host) | {"HTTPS_PROXY": f"{HERE}:{proxy.port}", **CA}
        async with gateway(environ=environ) as gw, gw.caller() as caller:
            answer = await caller.post("/v1/chat/completions", ask(stream=True))
            assert answer.body == b"".join(CHAT_STREAM[:4]) + CHAT_STREAM[5]
        await fake.hang_up()


# Connections with one owner at a time.


async def test_a_caller_that_goes_as_its_answer_comes_takes_nobody_s_connection_along(
    gateway: Any,
) -> None:
    loop, request = asyncio.get_running_loop(), request_bytes("POST", "/v1/chat/completions", ask())
    with socket.create_server((HERE, 0)) as listening:
        listening.setblocking(False)
        async with gateway(NO_RETRY, environ=at(listening.getsockname()[1])) as gw:
            going, staying = (socket.create_connection((HERE, gw.port)) for _ in range(2))
            await until(lambda: gw.listener.connections == 2)
            going.sendall(request)
            with (await loop.sock_accept(listening))[0] as lab, staying:
                lab.setblocking(False)
                staying.setblocking(False)
                await loop.sock_recv(lab, 65536)
                going.close()  # all of this is seen in one turn of the loop, in this order
                lab.send(CHAT_OK)
                staying.send(request)
                assert await loop.sock_recv(lab, 65536)
                lab.send(CHAT_OK)
                assert (await loop.sock_recv(staying, 65536)).startswith(b"HTTP/1.1 200")


async def test_a_connection_that_died_before_its_first_request_fails_it_at_once() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(serve, HERE, 0) as server, pool_of() as pool:
        origin = Origin(HERE, server.sockets[0].getsockname()[1], False)
        connection = await lend(pool, origin)
        await until(lambda: not connection.usable)
        sink, _ = send(connection)
        with pytest.raises(bitrouter.UpstreamUnreachable, match="before answering"):
            sink.done.result()


@dataclass(eq=False)
class Faulty:
    deadline: float = 0.0
    tried: bool = False

    def expire(self, now: float) -> None:
        self.tried, self.deadline = True, now + 60
        raise ZeroDivisionError


async def test_a_failure_at_one_deadline_leaves_the_others_theirs() -> None:
    async with sweeping() as sweeper:
        faulty, due = Faulty(), Thing(sweeper, 0.0)
        sweeper.watch(faulty)
        await until(lambda: faulty.tried)
        sweeper.watch(due)
        await due.expired.wait()


async def test_a_connection_with_half_a_request_unsent_is_not_reused() -> None:
    over = asyncio.Event()

    async def refuse_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK.replace(b"200 OK", b"413 x"))
        await over.wait()
        writer.transport.abort()

    async with await asyncio.start_server(refuse_early, HERE, 0) as server, pool_of() as pool:
        connection = await lend(pool, Origin(HERE, server.sockets[0].getsockname()[1], False))
        sink = Collector(asyncio.get_running_loop().create_future(), lambda *_: None)
        connection.start(REQUEST.replace(b": 0", b": 20000000") + bytes(20_000_000), sink)
        await sink.done
        again = await lend(pool, connection.origin)
        assert again is not connection
        again.abort()
        over.set()
        await asyncio.sleep(0.01)


async def test_a_connection_that_closes_without_a_byte_is_dialled_again(gateway: Any) -> None:
    async with wire([b""], CHAT_OK) as server, gateway(environ=at(server.port)) as gw:
        async with gw.caller() as caller:
            assert (await caller.post("/v1/chat/completions", ask())).status == 200
        assert [line["then"] for line in gw.lines("attempt_failed")] == ["retry"]


async def test_an_answer_that_breaks_in_the_middle_is_not_asked_for_again(gateway: Any) -> None:
    async with wire([CHAT_OK[:-9], b""], CHAT_OK) as server, gateway(environ=at(server.port)) as gw:
        async with gw.caller() as caller:
            assert (await caller.post("/v1/chat/completions", ask())).status == 503
        assert server.received.count(b"POST") == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_host_name_that_no_resolver_takes_is_unreachable(gateway: Any, path: str) -> None:
    base = f"https://{'x' * 70}.test/v1"
    environ = {
        f"{lab}_{what}": text
        for lab in ("OPENAI", "ANTHROPIC")
        for what, text in (("API_KEY", "k"), ("BASE_URL", base))
    }
    model = "anthropic/m" if "messages" in path else "openai/m"
    async with gateway(NO_RETRY, environ=environ) as gw, gw.caller() as caller:
        answer = await caller.post(path, ask(model=model))
        said = answer.json()
        assert (answer.status, said.get("type")) == (503, "error" if "anthropic" in model else None)
        assert "its host name is not known" in said["error"]["message"]


async def test_over_tls_an_answer_without_a_last_word_is_not_complete() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf of")
        await writer.drain()
        writer.transport.abort()  # without close_notify: as anyone on the way might do it

    server = await asyncio.start_server(cut, HERE, 0, ssl=tls_server())
    async with server, pool_of(CA) as pool:
        with pytest.raises(bitrouter.UpstreamUnreachable, match="in the middle"):
            await fetch(pool, Origin(HERE, server.sockets[0].getsockname()[1], True))
