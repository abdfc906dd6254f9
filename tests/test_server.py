"""The listener's life, and its door: addresses, keys, hosts, origins, local servers, draining."""

from __future__ import annotations

import asyncio
import errno
import gzip
import http.client
import io
import json
import logging
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    CHAT_ANSWER,
    CHAT_STREAM,
    Answer,
    Caller,
    Reply,
    ask,
    request_bytes,
    stream,
    until,
)

import bitrouter

CHAT = "/v1/chat/completions"
KEY = "br-secret-caller-key"
KEYS = {"BITROUTER_KEYS": KEY}
REQUIRED = '[server]\nauth = "required"\n'


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def everything(sock: socket.socket) -> AsyncIterator[bytes]:
    """What comes until the other side closes."""
    while piece := await asyncio.get_running_loop().sock_recv(sock, 2**20):
        yield piece


async def get(gw: Any, path: str, **headers: str) -> Answer:
    async with gw.caller() as caller:
        answer = await caller.get(path, **headers)
        assert isinstance(answer, Answer)
        return answer


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, raw: bytes) -> Answer:
    """One exchange over any kind of connection."""
    caller = Caller(0)
    caller.reader, caller.writer = reader, writer
    caller.send(raw)
    answer = await caller.answer()
    writer.close()
    await writer.wait_closed()
    return answer


# Draining.


async def test_a_running_stream_finishes_while_we_drain(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    slowly = stream(*CHAT_STREAM[:2], None, *CHAT_STREAM[2:])
    async with (
        provider(slowly) as up,
        gateway(environ=openai_env(up)) as gw,
        gw.caller() as caller,
    ):
        caller.send(request_bytes("POST", CHAT, ask(stream=True)))
        assert (await caller.head())[0] == 200
        drain = asyncio.get_running_loop().create_task(gw.listener.drain(5.0))
        body = b"".join([piece async for piece in caller._chunks()])
        assert body == b"".join(CHAT_STREAM[:4]) + CHAT_STREAM[5]
        assert await caller.closed()
        await drain


async def test_an_answer_that_begins_while_we_drain_is_the_connections_last(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    late = Reply(body=CHAT_ANSWER, after_s=0.03)
    async with provider(late) as up, gateway(environ=openai_env(up)) as gw, gw.caller() as caller:
        caller.send(request_bytes("POST", CHAT, ask()) * 2)
        await until(lambda: up.seen)
        drain = asyncio.get_running_loop().create_task(gw.listener.drain(5.0))
        answer = await caller.answer()
        assert (answer.json(), answer.headers["connection"]) == (CHAT_ANSWER, "close")
        assert await caller.closed() and len(up.seen) == 1
        await drain


async def test_idle_connections_close_when_we_drain(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as used, gw.caller() as unused:
        await used.get("/health")
        await until(lambda: gw.listener.connections == 2)
        await gw.listener.drain(5.0)
        assert await used.closed() and await unused.closed()


async def test_half_a_request_does_not_hold_up_the_drain(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(b"GET /hea")
        await until(lambda: [one for one in gw.listener._opened if one._inbox])
        await gw.listener.drain(5.0)
        assert await caller.closed()


async def test_no_connection_is_taken_once_we_drain(gateway: Any) -> None:
    async with gateway() as gw:
        await gw.listener.drain(5.0)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", gw.port)


async def test_what_takes_too_long_is_cut(gateway: Any, provider: Any, openai_env: Any) -> None:
    async with (
        provider(Reply(hangs=True)) as up,
        gateway(environ=openai_env(up)) as gw,
        gw.caller() as caller,
    ):
        caller.send(request_bytes("POST", CHAT, ask()))
        await until(lambda: up.seen)
        await gw.listener.drain(0.02)
        assert await caller.closed()
        await up.hung_up.wait()


async def test_an_answer_that_ends_as_we_drain_does_not_hold_it_up(
    gateway: Any, provider: Any, openai_env: Any
) -> None:
    async with (
        provider(Reply(body=CHAT_ANSWER)) as up,
        gateway(environ=openai_env(up)) as gw,
        gw.caller() as caller,
    ):
        caller.send(request_bytes("POST", CHAT, ask()))
        await caller.head()  # sent in this very turn of the loop, or the last
        async with asyncio.timeout(1.0):
            await gw.listener.drain(5.0)


# The life of a serving process.


def app_for(written: io.StringIO, listen: str = "127.0.0.1:0") -> bitrouter.App:
    config = bitrouter.Config()
    config.server.listen = listen
    writer = bitrouter.LogWriter(written, as_json=True)
    return bitrouter.App(config, {}, writer, tick_s=0.01)


def events(written: io.StringIO) -> list[str]:
    return [json.loads(line)["event"] for line in written.getvalue().splitlines()]


@pytest.mark.usefixtures("tmp_path")  # a server writes in its home
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_the_process(number: int) -> None:
    written, listening = io.StringIO(), asyncio.Event()
    greet = lambda *_: listening.set()  # noqa: E731
    serving = asyncio.get_running_loop().create_task(
        bitrouter.serve(app_for(written), greet, find_local=False)
    )
    await listening.wait()
    await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    await serving
    assert events(written) == ["draining", "stopped"]


@pytest.mark.usefixtures("tmp_path")  # a server writes in its home
async def test_a_second_signal_does_not_wait_for_answers(provider: Any) -> None:
    written, ports = io.StringIO(), list[int]()
    async with provider(Reply(hangs=True)) as up:
        environ = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": f"{up.base}/v1"}
        app = app_for(written)
        app.router = bitrouter.App(app.config, environ, app.writer).router
        greet = lambda _, at: ports.append(int(at.address.rpartition(":")[2]))  # noqa: E731
        loop = asyncio.get_running_loop()
        serving = loop.create_task(bitrouter.serve(app, greet, find_local=False))
        await until(lambda: ports)
        async with Caller(ports[0]) as caller:
            caller.send(request_bytes("POST", CHAT, ask()))
            await until(lambda: up.seen)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: app.draining)
            assert not serving.done()
            os.kill(os.getpid(), signal.SIGTERM)
            await serving
        await until(lambda: "request" in events(written))


def test_the_descriptor_limit_is_raised_to_the_most_there_is() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        bitrouter.raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Where we listen.


async def test_a_unix_socket_is_for_its_owner_alone(gateway: Any, tmp_path: Path) -> None:
    path = tmp_path / "br.sock"
    async with gateway(listen=f"unix:{path}") as gw:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert gw.listener.address == f"unix:{path}"
        answer = await talk(
            *await asyncio.open_unix_connection(path), request_bytes("GET", "/health", None)
        )
        assert answer.status == 200


async def test_a_dead_unix_socket_is_replaced(gateway: Any, tmp_path: Path) -> None:
    path = tmp_path / "br.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with gateway(listen=f"unix:{path}"):
        assert path.is_socket()


@pytest.mark.parametrize("listen", ["127.0.0.1:{}", "localhost:{}"])
async def test_a_port_in_use_is_an_error_that_says_what_to_do(gateway: Any, listen: str) -> None:
    async with gateway() as gw:
        other = bitrouter.Listener(app_for(io.StringIO(), listen.format(gw.port)))
        with pytest.raises(bitrouter.ConfigError, match=r"another server has it.*--port"):
            await other.open()


async def test_a_folder_that_is_not_there_is_an_error(gateway: Any, tmp_path: Path) -> None:
    other = bitrouter.Listener(app_for(io.StringIO(), f"unix:{tmp_path}/nowhere/x.sock"))
    with pytest.raises(bitrouter.ConfigError, match=os.strerror(errno.ENOENT)):
        await other.open()


# fmt: off
UNSAFE = [
    # listen         auth        keys  said
    ("0.0.0.0:0",    "none",     {},   "can be reached by other machines"),
    ("0.0.0.0:0",    "none",     KEYS, "can be reached by other machines"),
    ("0.0.0.0:0",    "auto",     {},   "there are none.*BITROUTER_KEYS"),
    ("[::]:0",       "auto",     {},   "there are none"),
    (":0",           "auto",     {},   "there are none"),
    ("127.0.0.1:0",  "required", {},   "there are none"),
]
# fmt: on


@pytest.mark.parametrize(("listen", "auth", "keys", "told"), UNSAFE)
async def test_other_machines_are_not_served_without_keys(
    gateway: Any, listen: str, auth: str, keys: dict[str, str], told: str
) -> None:
    with pytest.raises(bitrouter.ConfigError, match=told):
        async with gateway(f'[server]\nauth = "{auth}"\n', keys, listen=listen):
            pass


async def test_other_machines_are_served_with_keys(gateway: Any) -> None:
    async with gateway(environ=KEYS, listen="0.0.0.0:0") as gw:
        assert (await get(gw, "/v1/models")).status == 401
        assert (await get(gw, "/v1/models", x_api_key=KEY)).status == 200


# Keys.


def shape(body: Any) -> str:
    """Which protocol's error an error is."""
    if body.get("type") == "error":
        return f"messages {body['error']['type']}"
    error = body["error"]
    return f"google {error['status']}" if "status" in error else f"openai {error['code']}"


# fmt: off
SHAPES = [
    ("/v1/chat/completions",                "openai invalid_api_key"),
    ("/v1/responses",                       "openai invalid_api_key"),
    ("/v1/messages",                        "messages authentication_error"),
    ("/v1beta/models/x/y:generateContent",  "google UNAUTHENTICATED"),
]
# fmt: on


@pytest.mark.parametrize("given", [{}, {"authorization": "Bearer wrong"}], ids=["none", "wrong"])
@pytest.mark.parametrize(("path", "expected"), SHAPES)
async def test_without_a_key_the_answer_is_401_in_the_shape_of_the_path(
    gateway: Any, path: str, expected: str, given: dict[str, str]
) -> None:
    async with gateway(REQUIRED, KEYS) as gw, gw.caller() as caller:
        answer = await caller.post(path, ask(), **given)
        assert (answer.status, shape(answer.json())) == (401, expected)
        assert answer.headers["www-authenticate"].startswith("Bearer")


# fmt: off
WAYS = {
    "bearer":  ("/v1/models",                   {"authorization": f"Bearer {KEY}"}),
    "bEARER":  ("/v1/models",                   {"authorization": f"bEARER  {KEY}"}),
    "openai":  ("/v1/models",                   {"api-key": KEY}),
    "claude":  ("/v1/models",                   {"x-api-key": KEY}),
    "google":  ("/v1beta/models",               {"x-goog-api-key": KEY}),
    "query":   (f"/v1beta/models?key={KEY}",    {}),
    "query 2": (f"/v1/models?a=b&key={KEY}",    {}),
}
NO_WAYS = {
    "basic":        ("/v1/models",                  {"authorization": f"Basic {KEY}"}),
    "bare":         ("/v1/models",                  {"authorization": KEY}),
    "longer":       ("/v1/models",                  {"x-api-key": f"{KEY}x"}),
    "shorter":      ("/v1/models",                  {"x-api-key": KEY[:-1]}),
    "empty":        ("/v1/models",                  {"x-api-key": ""}),
    "other query":  (f"/v1/models?monkey={KEY}",    {}),
    "cookie":       ("/v1/models",                  {"cookie": f"key={KEY}"}),
}
# fmt: on


@pytest.mark.parametrize(("path", "headers"), WAYS.values(), ids=WAYS)
async def test_a_key_may_come_in_five_ways(
    gateway: Any, path: str, headers: dict[str, str]
) -> None:
    async with gateway(REQUIRED, KEYS) as gw:
        assert (await get(gw, path, **headers)).status == 200
        assert gw.lines()[0]["caller"] == "env-1"
        assert KEY not in gw.written.getvalue()


@pytest.mark.parametrize(("path", "headers"), NO_WAYS.values(), ids=NO_WAYS)
async def test_what_is_not_the_key_is_not_taken_for_it(
    gateway: Any, path: str, headers: dict[str, str]
) -> None:
    async with gateway(REQUIRED, KEYS) as gw:
        assert (await get(gw, path, **headers)).status == 401
        assert KEY[:-1] not in gw.written.getvalue()


async def test_health_needs_no_key(gateway: Any) -> None:
    async with gateway(REQUIRED, KEYS) as gw:
        assert (await get(gw, "/health")).json()["status"] == "ok"


async def test_a_body_without_a_key_is_not_asked_for(gateway: Any) -> None:
    async with gateway(REQUIRED, KEYS) as gw, gw.caller() as caller:
        head = request_bytes("POST", CHAT, None, content_length="9", expect="100-continue")
        caller.send(head)
        assert (await caller.head())[0] == 401


CARRIERS = [
    {"authorization": f"Bearer {KEY}"},
    {"x-api-key": KEY},
    {"x-goog-api-key": KEY},
    {"api-key": KEY},
]


@pytest.mark.parametrize("headers", CARRIERS, ids=[next(iter(one)) for one in CARRIERS])
async def test_the_callers_key_stays_here(
    gateway: Any, provider: Any, openai_env: Any, headers: dict[str, str]
) -> None:
    async with (
        provider(Reply(body=CHAT_ANSWER)) as up,
        gateway(REQUIRED, KEYS | openai_env(up)) as gw,
        gw.caller() as caller,
    ):
        assert (await caller.post(f"{CHAT}?key={KEY}", ask(), **headers)).status == 200
        assert KEY not in f"{up.seen}"


# Hosts and origins.

OPEN = '[server]\nallowed_hosts = ["br.lan"]\ncors_origins = ["https://app.test"]\n'
# fmt: off
DOORS = [
    # configuration, host, origin,                                                   status
    ("",    "127.0.0.1:4356",        None,                                           200),
    ("",    "localhost",             None,                                           200),
    ("",    "LOCALHOST:1",           None,                                           200),
    ("",    "[::1]:4356",            None,                                           200),
    ("",    "127.1.2.3",             None,                                           200),
    ("",    "evil.test",             None,                                           403),
    ("",    "127.0.0.1.evil.test",   None,                                           403),
    ("",    "localhost.evil.test",   None,                                           403),
    ("",    "",                      None,                                           403),
    ("",    "10.0.0.1",              None,                                           403),
    ("",    "localhost:4356",        "http://localhost:4356",                        200),
    ("",    "localhost:4356",        "http://LOCALHOST:4356",                        200),
    ("",    "localhost:4356",        "http://localhost:3000",                        403),
    ("",    "localhost:4356",        "https://evil.test",                            403),
    ("",    "localhost:4356",        "null",                                         403),
    (OPEN,  "br.lan:4356",           None,                                           200),
    (OPEN,  "BR.LAN",                None,                                           200),
    (OPEN,  "x.br.lan",              None,                                           403),
    (OPEN,  "localhost",             None,                                           200),
    (OPEN,  "localhost",             "https://app.test",                             200),
    (OPEN,  "localhost",             "https://app.test.evil.test",                   403),
    (OPEN,  "localhost",             "http://app.test",                              403),
]
# fmt: on


@pytest.mark.parametrize(("toml", "host", "origin", "status"), DOORS)
async def test_the_door_knows_hosts_and_origins(
    gateway: Any, toml: str, host: str, origin: str | None, status: int
) -> None:
    given = {"host": host} | ({"origin": origin} if origin else {})
    async with gateway(toml) as gw:
        assert (await get(gw, "/health", **given)).status == status


async def test_an_old_caller_without_a_host_is_let_in(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert (await caller.answer()).status == 200


async def test_a_refused_page_cannot_read_its_refusal(gateway: Any) -> None:
    async with gateway(OPEN) as gw:
        answer = await get(gw, "/health", origin="https://evil.test")
        assert not [name for name in answer.headers if name.startswith("access-control")]


PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


async def test_a_page_that_may_gets_its_preflight_answered(gateway: Any) -> None:
    async with gateway(f'{OPEN}auth = "required"\n', KEYS) as gw, gw.caller() as caller:
        caller.send(request_bytes("OPTIONS", CHAT, None, origin="https://app.test", **PREFLIGHT))
        answer = await caller.answer()
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == "https://app.test"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert answer.headers["vary"] == "Origin"


async def test_a_page_that_may_can_read_answers_and_errors(gateway: Any) -> None:
    async with gateway(OPEN) as gw:
        for path, status in (("/health", 200), ("/nothing", 404)):
            answer = await get(gw, path, origin="https://app.test")
            allowed = answer.headers["access-control-allow-origin"]
            assert (answer.status, allowed) == (status, "https://app.test")


async def test_any_page_may_if_the_user_says_so(gateway: Any) -> None:
    async with gateway('[server]\ncors_origins = ["*"]\n') as gw:
        answer = await get(gw, "/health", origin="https://any.test")
        assert answer.headers["access-control-allow-origin"] in ("*", "https://any.test")


@pytest.mark.parametrize("origin", [{}, {"origin": "https://evil.test"}], ids=["none", "evil"])
async def test_no_other_preflight_is_answered(gateway: Any, origin: dict[str, str]) -> None:
    async with gateway(OPEN) as gw, gw.caller() as caller:
        caller.send(request_bytes("OPTIONS", CHAT, None, **PREFLIGHT, **origin))
        answer = await caller.answer()
        assert answer.status == (403 if origin else 405)
        assert "access-control-allow-methods" not in answer.headers


async def test_a_wrong_method_is_told_the_right_ones(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        assert (await caller.get(CHAT)).headers["allow"] == "POST"
        assert (await caller.post("/health", {})).headers["allow"] == "GET, HEAD"


# Local servers.


def only_local(up: Any, variable: str = "VLLM_BASE_URL") -> dict[str, str]:
    """An environment with one local server, whatever else runs on this machine."""
    names = [facts.id for facts in bitrouter.PROVIDERS.values() if facts.kind == "local"]
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    found = {f"{name.upper()}_BASE_URL": nobody for name in names}
    assert variable in found
    return {**found, variable: f"{up.base}/v1"}


def models(*ids: Any) -> Reply:
    return Reply(body={"object": "list", "data": [{"id": ident} for ident in ids]})


async def listed(gw: Any) -> set[str]:
    models = (await get(gw, "/v1/models")).json()["data"]
    return {model["id"] for model in models}


@pytest.mark.parametrize("variable", ["VLLM_BASE_URL", "OLLAMA_BASE_URL"])
async def test_what_a_local_server_serves_can_be_called(
    gateway: Any, provider: Any, variable: str
) -> None:
    async with (
        provider(models("my/model"), Reply(body=CHAT_ANSWER)) as up,
        gateway(environ=only_local(up, variable)) as gw,
    ):
        await bitrouter.discover(gw.app)
        assert "my/model" in await listed(gw)
        async with gw.caller() as caller:
            assert (await caller.post(CHAT, ask(model="my/model"))).status == 200
        assert [seen.path for seen in up.seen] == ["/v1/models", "/v1/chat/completions"]
        assert up.seen[1].json()["model"] == "my/model"


async def test_a_local_server_is_looked_at_again(gateway: Any, provider: Any) -> None:
    async with (
        provider(models("us/a"), models("us/a"), models("us/b")) as up,
        gateway(environ=only_local(up)) as gw,
    ):
        found = []
        for _ in range(3):
            await bitrouter.discover(gw.app)
            found.append(await listed(gw) & {"us/a", "us/b"})
        assert found == [{"us/a"}, {"us/a"}, {"us/b"}]
        assert len(gw.lines("local_servers")) == 2  # said only when it changed


ODD_LISTS = {
    "503": Reply(503),
    "not json": Reply(body=b"<html>"),
    "not utf-8": Reply(body=b"\xff"),
    "a list": Reply(body=[]),
    "no data": Reply(body={}),
    "null": Reply(body={"data": None}),
    "a number": Reply(body={"data": 5}),
    "an object": Reply(body={"data": {"id": "x"}}),
    "a text": Reply(body={"data": "abc"}),
    "odd entries": Reply(body={"data": [1, None, {"id": 3}, {"x": 1}, []]}),
    "nested": Reply(body=b"[" * 100_000),
    "cut": Reply(framing="chunked", ending="cut"),
}


@pytest.mark.parametrize("reply", ODD_LISTS.values(), ids=ODD_LISTS)
async def test_an_odd_local_server_serves_nothing(
    gateway: Any, provider: Any, reply: Reply
) -> None:
    async with (
        provider(reply) as up,
        gateway(environ=only_local(up)) as gw,
    ):
        await bitrouter.discover(gw.app)
        assert await listed(gw) == {"echo/echo"}


async def test_a_local_server_gets_the_key_it_was_given(gateway: Any, provider: Any) -> None:
    async with provider(models("a")) as up:
        environ = {**only_local(up), "VLLM_API_KEY": "local-key"}
        async with gateway(environ=environ) as gw:
            await bitrouter.discover(gw.app)
        assert up.seen[0].headers["authorization"] == "Bearer local-key"


# Health, from a thread of its own.


def probe(port: int) -> tuple[int, Any]:
    """Ask for the health, and block the loop while we wait."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    return answer.status, told


async def test_health_is_told_while_the_loop_is_blocked(gateway: Any) -> None:
    port = free_port()
    async with gateway(f'[server]\nhealth_listen = "127.0.0.1:{port}"\n') as gw:
        stop = bitrouter.start_health_listener(gw.app)
        status, told = probe(port)
        stop()
    assert (status, told["status"]) == (200, "ok")


async def test_a_loop_that_is_held_up_for_long_shows_in_its_health(gateway: Any) -> None:
    port = free_port()
    async with gateway(f'[server]\nhealth_listen = "127.0.0.1:{port}"\n') as gw:
        stop = bitrouter.start_health_listener(gw.app)
        gw.app.sweeper.now -= 6  # as if the last sweep had been so long ago
        status, told = probe(port)
        stop()
    assert (status, told["status"]) == (503, "slow")
    assert told["loop_lag_ms"] > 5000


async def test_a_health_port_in_use_is_an_error(gateway: Any) -> None:
    async with gateway() as gw:
        gw.app.config.server.health_listen = f"127.0.0.1:{gw.port}"
        with pytest.raises(bitrouter.ConfigError, match=r"health_listen: cannot listen"):
            bitrouter.start_health_listener(gw.app)


async def test_health_says_that_we_drain(gateway: Any) -> None:
    async with gateway() as gw:
        gw.app.draining = True
        assert (await get(gw, "/health")).json()["status"] == "draining"


@pytest.fixture(autouse=True)
def quiet_log() -> Any:
    """serve() takes the log as it finds it."""
    log = logging.getLogger("bitrouter")
    before = log.handlers, log.propagate
    yield
    log.handlers, log.propagate = before


# Doors that were open once.


async def test_an_old_caller_with_a_foreign_host_is_refused(gateway: Any) -> None:
    async with gateway() as gw, gw.caller() as caller:
        caller.send(b"GET /health HTTP/1.0\r\nhost: evil.com\r\n\r\n")
        assert (await caller.answer()).status == 403


async def test_allowed_hosts_ignore_case(gateway: Any) -> None:
    async with gateway('[server]\nallowed_hosts = ["BR.Lan"]\n') as gw:
        assert (await get(gw, "/health", host="br.lan")).status == 200


CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n"
)


@pytest.mark.parametrize("expect", [b"", b"expect: 100-continue\r\n"], ids=["", "expect"])
async def test_a_chunked_request_without_a_key_is_refused_before_its_body(
    gateway: Any, expect: bytes
) -> None:
    async with gateway(REQUIRED, KEYS) as gw, gw.caller() as caller:
        caller.send(CHUNKED + expect + b"\r\n")
        assert (await caller.head())[0] == 401


async def test_a_packed_body_is_not_unpacked_for_who_has_no_key(gateway: Any) -> None:
    bomb = gzip.compress(bytes(2_000_000))
    async with gateway(REQUIRED + "max_body_mb = 1\n", KEYS) as gw, gw.caller() as caller:
        assert (await caller.post(CHAT, bomb, content_encoding="gzip")).status == 401


async def test_a_large_answer_is_read_to_its_end_while_we_drain(gateway: Any) -> None:
    loop, text = asyncio.get_running_loop(), "x" * 9_000_000  # more than a socket holds
    async with gateway() as gw:
        with socket.create_connection(("127.0.0.1", gw.port)) as sock:
            sock.setblocking(False)
            await loop.sock_sendall(sock, request_bytes("POST", CHAT, ask(text, "echo/echo")))
            await until(lambda: [one for one in gw.listener._opened if one.slow])
            drain = loop.create_task(gw.listener.drain(5.0))
            await asyncio.sleep(0.01)
            assert not drain.done()
            got = b"".join([piece async for piece in everything(sock)])
            await drain
        assert text.encode() in got
