#!/usr/bin/env python3
"""Benchmark of bitrouter.py on loopback: python tests/bench.py [--quick] [--json] [--rounds N]

A mock provider and the proxy run in child processes. The same load goes to the mock directly and
through the proxy, in turn, for several rounds; every figure is a median over the rounds, and every
ratio or difference is taken within one round. CPU per request is the steadiest figure on a busy
machine; judge requests/s by the ratio. CPU of the direct side is that of the mock. Each answer is
checked, and one bad answer makes exit code 1. On Linux with two cores or more, the proxy has one
to itself, and the mock and the load share the rest.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import platform
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if sys.platform != "win32":
    import resource

    TICKS_PER_S = os.sysconf("SC_CLK_TCK")
else:
    TICKS_PER_S = 100

if TYPE_CHECKING:
    from typing_extensions import override
else:

    def override(method: Callable[..., Any]) -> Callable[..., Any]:
        return method


HOST = "127.0.0.1"
BITROUTER = Path(__file__).resolve().parent.parent / "bitrouter.py"
MARKER = b"ID=###-#######;"  # replaced by one of the same length in every request
START_DEADLINE_S = 20.0
DRAIN_DEADLINE_S = 15.0
OPEN_STREAMS = 500
EVENTS = 2_000  # of each translated stream
FILLER = (
    "def settle(order, prices):\n    return sum(prices[item] for item in order)  # the total\n"
    'The quick brown fox said "jump" to the lazy dog, and the dog went on sleeping.\n'
)


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


# ---------------------------------------------------------------------- the mock provider


def mock_answer() -> bytes:
    """A whole HTTP answer of a chat completion with MARKER in its text, body about 600 bytes."""
    text = MARKER.decode() + " " + (FILLER * 2)[:270]
    message = {"role": "assistant", "content": text, "refusal": None}
    body = {
        "id": "chatcmpl-mock",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "mock",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 80, "completion_tokens": 70, "total_tokens": 150},
        "system_fingerprint": "fp_mock",
    }
    return http_answer(json.dumps(body, separators=(",", ":")).encode())


def http_answer(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def mock_event(**fields: object) -> bytes:
    event = {
        "id": "chatcmpl-mock",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "mock",
        **fields,
    }
    return http_chunk(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")


@functools.lru_cache
def mock_stream(tokens: int, with_usage: bool) -> list[bytes]:
    """HTTP chunks of a stream, one per event; the last one also closes the stream."""
    steps = []
    for number in range(tokens):
        delta = {"content": f"t{number}.{MARKER.decode()} "}
        if number == 0:
            delta = {"role": "assistant", **delta}
        steps.append(mock_event(choices=[{"index": 0, "delta": delta, "finish_reason": None}]))
    end = mock_event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if with_usage:
        usage = {"prompt_tokens": 80, "completion_tokens": tokens, "total_tokens": 80 + tokens}
        end += mock_event(choices=[], usage=usage)
    steps[-1] += end + http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    return steps


class MockConnection(asyncio.Protocol):
    """Answers chat completions at the least cost; reads only what it needs of a request."""

    answer = mock_answer()
    models = http_answer(b'{"object":"list","data":[{"id":"mock","object":"model"}]}')
    accepted = http_answer(b"{}")
    stream_head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    length_pattern = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
    stream_pattern = re.compile(rb'"stream"\s*:\s*true')
    model_pattern = re.compile(rb'mock-c(\d+)-d(\d+)"')

    def __init__(self) -> None:
        self.unread = b""
        self.transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        no_delay(transport)

    @override
    def connection_lost(self, _exc: Exception | None) -> None:
        self.transport = None

    @override
    def data_received(self, data: bytes) -> None:
        self.unread = self.unread + data if self.unread else data
        while (head_end := self.unread.find(b"\r\n\r\n")) >= 0:
            length = self.length_pattern.search(self.unread, 0, head_end)
            end = head_end + 4 + (int(length[1]) if length else 0)
            if len(self.unread) < end:
                return
            whole, self.unread = self.unread[:end], self.unread[end:]
            if whole.startswith((b"POST /v1/traces", b"POST /v1/metrics")) and self.transport:
                self.transport.write(self.accepted)
            else:
                self.reply(whole[head_end + 4 :])

    def reply(self, body: bytes) -> None:
        if self.transport is None:
            return
        start = body.rfind(b"ID=")
        marker = body[start : start + len(MARKER)]
        if not body:
            self.transport.write(self.models)
        elif start < 0 or not marker.endswith(b";"):
            self.transport.write(http_answer(b'{"error":{"message":"no marker"}}', "400 Bad"))
        elif (at := body.find(b'"stream"')) >= 0 and self.stream_pattern.match(body, at):
            self.stream(body, marker)
        else:
            self.transport.write(self.answer.replace(MARKER, marker))

    def stream(self, body: bytes, marker: bytes) -> None:
        assert self.transport is not None
        model = self.model_pattern.search(body)
        tokens, pause_us = (int(model[1]), int(model[2])) if model else (10, 0)
        steps = mock_stream(tokens, b"include_usage" in body)
        if pause_us:
            self.transport.write(self.stream_head)
            loop = asyncio.get_running_loop()
            self.step(loop, steps, marker, 0, (loop.time(), pause_us / 1e6))
        else:
            self.transport.write(self.stream_head + b"".join(steps).replace(MARKER, marker))

    def step(
        self,
        loop: asyncio.AbstractEventLoop,
        steps: list[bytes],
        marker: bytes,
        number: int,
        clock: tuple[float, float],
    ) -> None:
        if self.transport is None:
            return
        self.transport.write(steps[number].replace(MARKER, marker))
        number += 1
        if number < len(steps):
            loop.call_at(
                clock[0] + number * clock[1], self.step, loop, steps, marker, number, clock
            )


async def serve_mock() -> None:
    """Serve until standard input closes, so that the mock never outlives the benchmark."""
    server = await asyncio.get_running_loop().create_server(MockConnection, HOST, 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    threading.Thread(target=exit_with_stdin, daemon=True).start()
    await server.serve_forever()


def exit_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def no_delay(transport: asyncio.Transport) -> None:
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# ---------------------------------------------------------------------- what is asked


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    callers: int
    body_bytes: int = 350
    model: str = "mock"
    tokens: int = 0  # per stream; 0 asks for a plain answer
    answers_each: int = 0  # 0 asks for as long as the run lasts
    gap_s: float = 0.0  # between the first requests of two callers


SMALL_1 = Scenario("350 B body, 1 connection", 1)
SMALL_32 = Scenario("350 B body, 32 connections", 32)
SCENARIOS = [
    SMALL_1,
    SMALL_32,
    Scenario("64 KB body, 1 connection", 1, body_bytes=65536),
    Scenario("64 KB body, 32 connections", 32, body_bytes=65536),
    Scenario(
        "20 paced streams", 20, model="mock-c50-d20000", tokens=50, answers_each=1, gap_s=0.0473
    ),
    Scenario("flood, 20 streams", 20, model="mock-c200-d0", tokens=200),
]
HELD = Scenario("open streams", OPEN_STREAMS, model="mock-c4-d600000", tokens=4, answers_each=1)


def request_body(scenario: Scenario, model: str) -> bytes:
    """A chat request of about body_bytes with MARKER in the last message."""
    messages = [{"role": "system", "content": "You are a careful programmer."}]
    body: dict[str, object] = {"model": model, "messages": messages, "max_tokens": 256}
    if scenario.tokens:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    last = {"role": "user", "content": f"{MARKER.decode()} Go on."}

    def render() -> bytes:
        whole = {**body, "messages": [*messages, last]}
        return json.dumps(whole, separators=(",", ":")).encode()

    turn = (FILLER * 13)[:1900]
    roles = itertools.cycle(["user", "assistant"])
    while len(render()) + 2100 < scenario.body_bytes:
        messages.append({"role": next(roles), "content": turn})
    missing = scenario.body_bytes - len(render())
    last["content"] += "".join(itertools.islice(itertools.cycle(" lorem ipsum"), max(missing, 0)))
    return render()


@dataclass(slots=True)
class Plan:
    """One scenario aimed at one port; the request is cut where the marker goes."""

    scenario: Scenario
    port: int
    before: bytes
    after: bytes

    @classmethod
    def aim(cls, scenario: Scenario, port: int, prefix: str) -> "Plan":
        body = request_body(scenario, prefix + scenario.model)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\n"
            "User-Agent: bitrouter-bench\r\nAccept: */*\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        before, after = (head.encode() + body).split(MARKER)
        return cls(scenario, port, before, after)


# ---------------------------------------------------------------------- the load


@dataclass(slots=True)
class Tally:
    answers: int = 0
    events: int = 0
    waits: list[float] = field(default_factory=list)  # to the answer, or to a first token
    bad: Counter[str] = field(default_factory=Counter)
    stopping: bool = False


SERIAL = itertools.count(1)
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
TOKEN = re.compile(rb"t(\d+)\.ID=")


def unchunked(data: bytes) -> bytes | None:
    """The payload of a chunked body, or None where the framing is broken or cut short."""
    parts, at = [], 0
    try:
        while size := int(data[at : (line_end := data.index(b"\r\n", at))].partition(b";")[0], 16):
            parts.append(data[line_end + 2 : line_end + 2 + size])
            at = line_end + 2 + size + 2
            if data[at - 2 : at] != b"\r\n":
                return None
    except ValueError:
        return None
    return b"".join(parts) if data[line_end:] == b"\r\n\r\n" else None


def fault_of(scenario: Scenario, marker: bytes, payload: bytes | None) -> str:
    """What is wrong with the payload of an answer with status 200; empty if nothing is."""
    if payload is None:
        return "broken framing"
    count = payload.count(marker)
    if payload.count(b"ID=") != count or not count:
        return "wrong ID"
    if b'"usage"' not in payload:
        return "missing usage"
    return stream_fault_of(scenario, payload) if scenario.tokens else ""


def stream_fault_of(scenario: Scenario, payload: bytes) -> str:
    if [int(number) for number in TOKEN.findall(payload)] != list(range(scenario.tokens)):
        return "missing chunk"
    if b'"stop"' not in payload:
        return "missing finish"
    return "" if payload.rstrip().endswith(b"data: [DONE]") else "missing [DONE]"


class Caller(asyncio.Protocol):
    """One connection that asks, checks the answer and asks again until it is told to stop."""

    def __init__(self, number: int, plan: Plan, tally: Tally) -> None:
        self.number = number
        self.plan = plan
        self.tally = tally
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.transport: asyncio.Transport | None = None
        self.reopening: asyncio.Task[None] | None = None
        self.answered = 0
        self.forget()

    def forget(self) -> None:
        self.answer = bytearray()
        self.body_at = -1
        self.length = -1  # unknown: chunked, or until the connection closes
        self.chunked = False
        self.closes = False
        self.has_token = False

    async def open(self) -> None:
        await self.loop.create_connection(lambda: self, HOST, self.plan.port)

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        no_delay(transport)
        if self.answered or not self.plan.scenario.gap_s:
            self.ask()

    def ask(self) -> None:
        assert self.transport is not None
        self.marker = b"ID=%03d-%07d;" % (self.number, next(SERIAL))
        self.asked_at = time.perf_counter()
        self.transport.write(b"".join((self.plan.before, self.marker, self.plan.after)))

    @override
    def data_received(self, data: bytes) -> None:
        self.answer += data
        if self.body_at < 0 and not self.read_head():
            return
        if self.plan.scenario.tokens:
            self.note_events(data)
        if self.length >= 0:
            if len(self.answer) >= self.body_at + self.length:
                self.settle()
        elif self.chunked and self.answer.endswith(b"\r\n0\r\n\r\n"):
            self.settle()

    def read_head(self) -> bool:
        end = self.answer.find(b"\r\n\r\n")
        if end < 0:
            return False
        self.body_at = end + 4
        self.closes = CLOSES.search(self.answer, 0, end) is not None
        if length := LENGTH.search(self.answer, 0, end):
            self.length = int(length[1])
        elif CHUNKED.search(self.answer, 0, end):
            self.chunked = True
        return True

    def note_events(self, data: bytes) -> None:
        events = data.count(b"data:")
        self.tally.events += events
        if events and not self.has_token:
            self.has_token = True
            self.tally.waits.append(time.perf_counter() - self.asked_at)

    def settle(self) -> None:
        """Book the answer that has just come to its end, then ask again, reconnect or finish."""
        scenario = self.plan.scenario
        if not scenario.tokens:
            self.tally.waits.append(time.perf_counter() - self.asked_at)
        self.tally.answers += 1
        self.answered += 1
        status = bytes(self.answer[9:12])
        payload: bytes | None = bytes(self.answer[self.body_at :])
        if self.chunked and payload is not None:
            payload = unchunked(payload)
        fault = fault_of(scenario, self.marker, payload)
        if status != b"200":
            fault = f"status {status.decode('ascii', 'replace')}"
        if fault:
            self.tally.bad[fault] += 1
        closes = self.closes
        self.forget()
        if self.tally.stopping or self.answered == scenario.answers_each:
            self.finish()
        elif closes:
            self.hang_up()
            self.reopening = self.loop.create_task(self.reopen())
        else:
            self.ask()

    async def reopen(self) -> None:
        try:
            await self.open()
        except OSError:
            self.finish("connection refused")

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is None:
            return
        self.transport = None
        if exc is None and self.body_at >= 0 and self.length < 0 and not self.chunked:
            self.closes = True
            self.settle()
        else:
            self.finish("connection lost")

    def hang_up(self) -> None:
        if self.transport is not None:
            transport, self.transport = self.transport, None
            transport.abort()

    def finish(self, fault: str = "") -> None:
        self.hang_up()
        if self.done.done():
            return
        if fault:
            self.tally.bad[fault] += 1
        self.done.set_result(None)


@dataclass(slots=True)
class Sample:
    """What one run measured; answers, events and CPU are those of `seconds` only."""

    seconds: float
    answers: int
    events: int
    waits: list[float]
    cpu_s: float | None
    bad: Counter[str]


@contextlib.contextmanager
def crew(plan: Plan, tally: Tally) -> Iterator[list[Caller]]:
    callers = [Caller(number, plan, tally) for number in range(plan.scenario.callers)]
    try:
        yield callers
    finally:
        for caller in callers:
            caller.hang_up()


async def open_all(callers: Sequence[Caller]) -> None:
    for caller in callers:
        await caller.open()


async def start_in_turn(callers: Sequence[Caller], gap_s: float) -> None:
    """Let callers that are connected already ask one after the other, and wait for all answers."""
    for caller in callers:
        if caller.transport is not None:
            caller.ask()
        await asyncio.sleep(gap_s)
    await drain(callers)


async def drain(callers: Sequence[Caller]) -> None:
    """Wait for the answers on the way; those that never come are bad."""
    await asyncio.wait([caller.done for caller in callers], timeout=DRAIN_DEADLINE_S)
    for caller in callers:
        if not caller.done.done():
            caller.finish("no answer")


async def drive(plan: Plan, pids: Sequence[int], seconds: float) -> Sample:
    """Run the scenario for some seconds after a warm-up; with a gap, until all are served."""
    tally = Tally()
    gap_s = plan.scenario.gap_s
    with crew(plan, tally) as callers:
        await open_all(callers)
        await asyncio.sleep(seconds / 4)
        tally.waits.clear()
        before = (tally.answers, tally.events)
        cpu_before, started = cpu_seconds(pids), time.perf_counter()
        if gap_s:
            await start_in_turn(callers, gap_s)
        else:
            await asyncio.sleep(seconds)
        took = time.perf_counter() - started
        cpu_after = cpu_seconds(pids)
        answers, events = tally.answers - before[0], tally.events - before[1]
        waits = tally.waits.copy()
        tally.stopping = True
        await drain(callers)
    cpu_s = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
    return Sample(took, answers, events, waits, cpu_s, tally.bad)


async def hold(plan: Plan, pids: Sequence[int]) -> tuple[int, float | None, Counter[str]]:
    """Hold many slow streams open: how many at once, KB of memory for each, and bad answers."""
    tally = Tally()
    before = memory(pids)
    with crew(plan, tally) as callers:
        await open_all(callers)
        for _ in range(100):
            if len(tally.waits) == len(callers):
                break
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        after = memory(pids)
        held = sum(not caller.done.done() for caller in callers)
        await drain(callers)
    if before is None or after is None or not held:
        return held, None, tally.bad
    return held, (after.pss_mb - before.pss_mb) * 1024 / held, tally.bad


# ---------------------------------------------------------------------- processes


@dataclass(frozen=True, slots=True)
class Memory:
    rss_mb: float
    pss_mb: float


def family(leader: int) -> list[int]:
    """The processes of the session that leader leads; none where there is no /proc."""
    proc, pids = Path("/proc"), list[int]()
    for entry in proc.iterdir() if proc.exists() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
                if int(state[3]) == leader and state[0] != "Z":
                    pids.append(int(entry.name))
    return pids


def cpu_seconds(pids: Sequence[int]) -> float | None:
    return sum(map(cpu_seconds_of, pids)) if pids else None


def cpu_seconds_of(pid: int) -> float:
    """User and system time: in nanoseconds if the kernel tells them, else in ticks of 10 ms."""
    home = Path(f"/proc/{pid}")
    try:
        state = (home / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    ticks_s = (int(state[11]) + int(state[12])) / TICKS_PER_S
    try:
        threads = list((home / "task").iterdir())
        spent_ns = [int((one / "schedstat").read_text().split()[0]) for one in threads]
    except OSError:
        return ticks_s
    exact_s = sum(spent_ns) / 1e9
    return exact_s if abs(exact_s - ticks_s) < 0.05 else ticks_s  # ended threads are in ticks only


def memory(pids: Sequence[int]) -> Memory | None:
    totals: Counter[str] = Counter()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, amount = line.partition(":")
                totals[name] += int(amount.split()[0])
    return Memory(totals["Rss"] / 1024, totals["Pss"] / 1024) if totals["Rss"] else None


def pin(pid: int, core: int | None) -> None:
    if sys.platform == "linux" and core is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(pid, {core})


def cores() -> list[int]:
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    else:
        return list(range(os.cpu_count() or 1))


def core_plan(pinned: bool) -> tuple[int | None, int | None, int | None]:
    """Cores for the proxy, the mock and the load; None leaves the choice to the system."""
    have = cores()
    if not pinned or not hasattr(os, "sched_setaffinity") or len(have) < 2:
        return None, None, None
    return have[0], have[1], have[2] if len(have) > 2 else have[1]


def raise_file_limit() -> int:
    """Raise the limit of open files, for the children as well; return how many streams fit."""
    room = 2 * OPEN_STREAMS + 100
    if sys.platform != "win32":
        room, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else hard
        if room == resource.RLIM_INFINITY:
            room = wanted
        elif room < wanted:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                room = wanted
    return min(OPEN_STREAMS, (room - 100) // 2)


def signal_group(child: "subprocess.Popen[bytes]", name: str) -> None:
    if sys.platform == "win32":
        child.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, getattr(signal, name))


def stop(child: "subprocess.Popen[bytes]") -> None:
    """End a child and whatever it has started: politely, then for good."""
    try:
        signal_group(child, "SIGTERM")
        child.wait(3)
    except subprocess.TimeoutExpired:
        pass
    finally:
        signal_group(child, "SIGKILL")
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def running_mock(core: int | None) -> Iterator["Server"]:
    command = [sys.executable, "-I", __file__, "--serve-mock"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        pin(child.pid, core)
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise BenchError("the mock provider does not start")
        yield Server(int(line), family(child.pid), 0.0, 0.0)
    finally:
        stop(child)


@dataclass(frozen=True, slots=True)
class Server:
    port: int
    pids: Sequence[int]
    listening_s: float
    first_200_s: float


@contextlib.contextmanager
def running_proxy(
    command: str, upstream: str, core: int | None, environ: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start the proxy in a home of its own; when something fails, tell what it wrote."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bitrouter-bench-", ignore_cleanup_errors=True) as home:
        log_path = Path(home) / "proxy.log"
        with log_path.open("wb") as log:
            started = time.perf_counter()
            words = proxy_command(command, port, upstream)
            child = start_proxy(words, upstream, home, log, environ or {})
            try:
                pin(child.pid, core)
                listening_s, first_200_s = wait_until_served(child, port, started)
                yield Server(port, family(child.pid), listening_s, first_200_s)
            except (BenchError, OSError) as error:
                told = log_path.read_text("utf-8", "replace")[-2000:]
                raise BenchError(f"{error}\n--- the end of the proxy's log:\n{told}") from error
            finally:
                stop(child)


def proxy_command(template: str, port: int, upstream: str) -> list[str]:
    if not template:
        return [sys.executable, str(BITROUTER), "serve", "--port", str(port)]
    return [
        word.replace("{port}", str(port)).replace("{upstream}", upstream)
        for word in shlex.split(template)
    ]


def start_proxy(
    command: list[str], upstream: str, home: str, log: IO[bytes], environ: dict[str, str]
) -> "subprocess.Popen[bytes]":
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    settings = {"OPENAI_API_KEY": "sk-bench", "OPENAI_BASE_URL": upstream}
    try:
        return subprocess.Popen(
            command,
            env={**kept, **settings, **environ, "HOME": home, "USERPROFILE": home},
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except OSError as error:
        raise BenchError(f"cannot start {command[0]}: {error}") from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_until_served(
    child: "subprocess.Popen[bytes]", port: int, started: float
) -> tuple[float, float]:
    """Seconds from the start until the port accepts, and until the first 200."""
    plan = Plan.aim(SMALL_1, port, "openai/")
    request = plan.before + b"ID=000-0000000;" + plan.after
    listening_s, answer = 0.0, b""
    while time.perf_counter() - started < START_DEADLINE_S:
        if child.poll() is not None:
            raise BenchError(f"the proxy ended at start with code {child.returncode}")
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1.0) as caller:
            if caller.getsockname() == caller.getpeername():
                continue  # a free port can happen to connect to itself
            listening_s = listening_s or time.perf_counter() - started
            caller.settimeout(10)
            caller.sendall(request)
            answer = caller.recv(65536)
            if answer.startswith(b"HTTP/1.1 200"):
                return listening_s, time.perf_counter() - started
        time.sleep(0.02 if listening_s else 0.001)
    if not listening_s:
        raise BenchError(f"the proxy does not listen on port {port}")
    raise BenchError(f"the proxy serves no request; its last answer: {answer[:500]!r}")


# ---------------------------------------------------------------------- figures

Figures = dict[str, float | None]


def per(amount: float | None, count: float, scale: float = 1.0) -> float | None:
    return amount * scale / count if amount is not None and count else None


def figures_of(scenario: Scenario, sample: Sample) -> Figures:
    p50_us = statistics.median(sample.waits) * 1e6 if sample.waits else None
    if not scenario.tokens:
        return {
            "requests_per_s": per(sample.answers, sample.seconds),
            "p50_us": p50_us,
            "cpu_us_per_request": per(sample.cpu_s, sample.answers, 1e6),
        }
    cpu = {"cpu_us_per_event": per(sample.cpu_s, sample.events, 1e6)}
    if scenario.answers_each:
        return {"first_token_p50_us": p50_us, **cpu}
    return {"events_per_s": per(sample.events, sample.seconds), **cpu}


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@dataclass(slots=True)
class Line:
    """One figure of one scenario: medians over the rounds of both sides and of their relation."""

    scenario: str
    figure: str
    direct: float | None
    proxy: float | None
    ratio: float | None
    added: float | None


def lines_of(scenario: str, rounds: Sequence[tuple[Figures, Figures]]) -> Iterator[Line]:
    for figure in rounds[0][0]:
        pairs = [(direct[figure], proxy[figure]) for direct, proxy in rounds]
        ratios = [per(proxy, direct or 0) for direct, proxy in pairs]
        added = [
            None if direct is None or proxy is None else proxy - direct for direct, proxy in pairs
        ]
        yield Line(
            scenario,
            figure,
            middle([direct for direct, _ in pairs]),
            middle([proxy for _, proxy in pairs]),
            middle(ratios),
            middle(added) if "p50" in figure else None,
        )


@dataclass(slots=True)
class Report:
    machine: dict[str, object]
    settings: dict[str, object]
    start: Figures = field(default_factory=dict)
    memory: Figures = field(default_factory=dict)
    translation: Figures = field(default_factory=dict)
    books: Figures = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)

    def note_bad(self, where: str, faults: Counter[str]) -> None:
        for fault, count in faults.items():
            self.bad[f"{where}: {fault}"] += count


def machine() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        known = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = known[1] if known else model
    return {
        "platform": platform.platform(),
        "cpu": model,
        "cores": len(cores()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def as_json(report: Report) -> str:
    whole = asdict(replace(report, bad=Counter()))
    whole |= {"bad": dict(report.bad), "bad_total": report.bad.total()}

    def tidy(value: object) -> object:
        if isinstance(value, dict):
            return {key: tidy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [tidy(item) for item in value]
        return round(value, 4) if isinstance(value, float) else value

    return json.dumps(tidy(whole), indent=2) + "\n"


def shown(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}{unit}"


def spelled(name: str) -> str:
    return name.replace("_", " ")


def as_table(report: Report) -> str:
    rows = [("", "direct", "proxy", "proxy/direct", "added")]
    scenario = ""
    for line in report.lines:
        if line.scenario != scenario:
            scenario = line.scenario
            rows.append((scenario, "", "", "", ""))
        cells = (shown(line.direct), shown(line.proxy), shown(line.ratio, "x"), shown(line.added))
        rows.append(("  " + spelled(line.figure), *cells))
    text = [
        ", ".join(f"{name} {value}" for name, value in report.machine.items()),
        ", ".join(f"{spelled(name)} {value}" for name, value in report.settings.items()),
        "",
        *(
            f"{spelled(name):30}{shown(value):>12}"
            for group in (report.start, report.memory, report.translation, report.books)
            for name, value in group.items()
        ),
        "",
        *(f"{row[0]:30}{row[1]:>12}{row[2]:>12}{row[3]:>15}{row[4]:>12}".rstrip() for row in rows),
        "",
        f"bad answers: {report.bad.total()}",
        *(f"  {count} x {fault}" for fault, count in report.bad.most_common()),
    ]
    return "\n".join(text) + "\n"


# ---------------------------------------------------------------------- the benchmark


@dataclass(frozen=True, slots=True)
class Settings:
    command: str
    rounds: int
    seconds: float
    pinned: bool


def measure_start(settings: Settings, upstream: str, core: int | None, report: Report) -> None:
    """Start the proxy as often as there are rounds; the times are medians."""
    times = []
    for _ in range(settings.rounds):
        with running_proxy(settings.command, upstream, core) as proxy:
            times.append((proxy.listening_s, proxy.first_200_s))
    report.start = {
        "listening_s": middle([one[0] for one in times]),
        "first_200_s": middle([one[1] for one in times]),
    }


def translated_streams(product: Any) -> Iterator[float]:
    """CPU seconds per event of a stream of text, for each pair of different protocols."""
    protocols = list(product.ApiProtocol)
    prompt = product.Prompt("m", (product.Message("user", (product.Text("Hi"),)),), stream=True)
    label = product.AnswerLabel("0" * 24, 1, "m")
    words = [product.Delta(0, f"word {n} ") for n in range(EVENTS)]
    finished = product.Finished(product.Finish.STOP)
    for theirs, ours in itertools.permutations(protocols, 2):
        encoder = product.CODECS[theirs].encoder(prompt, label)
        parts = [product.Open(0, product.Text()), *words, product.Close(0), finished]
        events = [*map(encoder.encode, parts), encoder.end(product.Usage(1, 1))]
        translation = product.Translation(
            product.CODECS[theirs], product.CODECS[ours], prompt, product.Undo(), label, "", repr
        )
        started = time.process_time()
        told = sum(len(translation.feed(event)) for event in events) + len(translation.finish())
        yield (time.process_time() - started) / EVENTS
        if not told or not translation.over:
            raise BenchError(f"the stream from {theirs} to {ours} came to no end")


def translated_history(product: Any) -> Iterator[float]:
    """CPU seconds to read a conversation of 2,000 messages and write it for each protocol."""
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = [
        {"role": "user", "content": FILLER},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": FILLER},
        {"role": "assistant", "content": FILLER},
    ]
    body = json.dumps({"model": "m", "messages": turn * 500}).encode()
    for protocol in product.ApiProtocol:
        started = time.process_time()
        traits, losses = product.traits_of("bench", "m", protocol), product.Losses()
        chat = product.CODECS[product.ApiProtocol.CHAT_COMPLETIONS]
        prompt = chat.parse_request(product.Document(body).value)
        adapted, _ = product.adapt(prompt, protocol, traits, losses)
        product.compact(product.CODECS[protocol].render_request(adapted, traits, losses))
        yield time.process_time() - started


def measure_translation(rounds: int, report: Report) -> None:
    """Translation alone, in this process: the slowest pair of protocols, the best of the rounds."""
    sys.path.insert(0, str(BITROUTER.parent))
    import bitrouter

    streams = min(max(translated_streams(bitrouter)) for _ in range(rounds))
    history = min(max(translated_history(bitrouter)) for _ in range(rounds))
    report.translation = {
        "translated_event_cpu_us": streams * 1e6,
        "translated_2000_messages_ms": history * 1e3,
    }


def measure_memory(proxy: Server, streams: int, report: Report) -> None:
    """Memory of a proxy that has served little yet, and what each open stream adds."""
    time.sleep(0.3)
    idle = memory(proxy.pids)
    warm_up = asyncio.run(drive(Plan.aim(SMALL_1, proxy.port, "openai/"), proxy.pids, 0.2))
    report.note_bad("proxy, warm-up", warm_up.bad)
    plan = Plan.aim(replace(HELD, callers=streams), proxy.port, "openai/")
    held, stream_kb, bad = asyncio.run(hold(plan, proxy.pids))
    report.note_bad("proxy, open streams", bad)
    report.memory = {
        "idle_rss_mb": idle.rss_mb if idle else None,
        "idle_pss_mb": idle.pss_mb if idle else None,
        "open_streams": held,
        "kb_per_open_stream": stream_kb,
    }


def measure_scenario(
    scenario: Scenario, sides: Sequence[tuple[str, Plan, Server]], seconds: float, report: Report
) -> dict[str, Figures]:
    figures = {}
    for side, plan, server in sides:
        sample = asyncio.run(drive(plan, server.pids, seconds))
        report.note_bad(f"{side}, {scenario.name}", sample.bad)
        figures[side] = figures_of(scenario, sample)
    return figures


def measure_load(settings: Settings, mock: Server, proxy: Server, report: Report) -> None:
    rounds: dict[str, list[tuple[Figures, Figures]]] = {}
    for number in range(settings.rounds):
        sys.stderr.write(f"round {number + 1} of {settings.rounds}\n")
        for scenario in SCENARIOS:
            sides = [
                ("direct", Plan.aim(scenario, mock.port, ""), mock),
                ("proxy", Plan.aim(scenario, proxy.port, "openai/"), proxy),
            ]
            if number % 2:
                sides.reverse()
            figures = measure_scenario(scenario, sides, settings.seconds, report)
            rounds.setdefault(scenario.name, []).append((figures["direct"], figures["proxy"]))
    for name, pairs in rounds.items():
        report.lines.extend(lines_of(name, pairs))


def run(settings: Settings) -> Report:
    proxy_core, mock_core, load_core = core_plan(settings.pinned)
    report = Report(
        machine(),
        {
            "rounds": settings.rounds,
            "seconds_per_run": settings.seconds,
            "pinned_to_cores": proxy_core is not None,
        },
    )
    measure_translation(settings.rounds, report)
    streams = raise_file_limit()
    with running_mock(mock_core) as mock:
        pin(0, load_core)
        upstream = f"http://{HOST}:{mock.port}/v1"
        measure_start(settings, upstream, proxy_core, report)
        with running_proxy(settings.command, upstream, proxy_core) as proxy:
            measure_memory(proxy, streams, report)
            measure_load(settings, mock, proxy, report)
        if not settings.command:
            measure_books(settings, mock, proxy_core, report)
    return report


# The proxy without receipts, metrics and spans, and all of it as it is.
NO_BOOKS = f"""
import sys
sys.path.insert(0, {str(BITROUTER.parent)!r})
import bitrouter
bitrouter.book = lambda *_: None
bitrouter.App.keep_books = lambda _: None
sys.exit(bitrouter.main(["serve", "--port", sys.argv[1]]))
"""
BOOKS = NO_BOOKS.replace("bitrouter.book = lambda *_: None\n", "").replace(
    "bitrouter.App.keep_books = lambda _: None\n", ""
)


def measure_books(settings: Settings, mock: Server, core: int | None, report: Report) -> None:
    """What it costs to write receipts, count, and export spans and metrics to a collector."""
    upstream = f"http://{HOST}:{mock.port}/v1"
    collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{HOST}:{mock.port}"}
    python = shlex.quote(sys.executable)
    bare, full = (f"{python} -c {shlex.quote(code)} {{port}}" for code in (NO_BOOKS, BOOKS))
    rounds: list[tuple[Figures, Figures]] = []
    with (
        running_proxy(bare, upstream, core) as without,
        running_proxy(full, upstream, core, collector) as with_them,
    ):
        for number in range(2 * settings.rounds):
            sides = [(n, Plan.aim(SMALL_32, s.port, "openai/"), s)
                     for n, s in (("without", without), ("with", with_them))]  # fmt: skip
            if number % 2:
                sides.reverse()
            figures = measure_scenario(SMALL_32, sides, settings.seconds, report)
            rounds.append((figures["without"], figures["with"]))
    for line in lines_of(SMALL_32.name, rounds):
        if "p50" not in line.figure:
            report.books[f"{line.figure}_without_books"] = line.direct
            report.books[f"{line.figure}_with_books"] = line.proxy
            report.books[f"{line.figure}_ratio"] = line.ratio


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round, about 10 s in all")
    parser.add_argument("--rounds", type=int, default=0, help="3, or 1 with --quick")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--no-pin", action="store_true", help="let processes share the cores")
    parser.add_argument(
        "--command",
        default="",
        help="another proxy: a command with {port} and {upstream} (the base URL, ends in /v1); "
        "it runs in a temporary folder, so write absolute paths",
    )
    parser.add_argument("--serve-mock", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.serve_mock:
        asyncio.run(serve_mock())
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = Settings(
        command=arguments.command,
        rounds=max(arguments.rounds, 0) or (1 if arguments.quick else 3),
        seconds=0.3 if arguments.quick else 0.7,
        pinned=not arguments.no_pin,
    )
    try:
        report = run(settings)
    except BenchError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("bench: interrupted\n")
        return 130
    sys.stdout.write(as_json(report) if arguments.json else as_table(report))
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
