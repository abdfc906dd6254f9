"""Media at a URL: where we connect and where we never do, and what comes of it."""

from __future__ import annotations

import asyncio
import base64
import gc
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import FakeProvider, Reply, ask, crossed, heard, provider_toml, request_of, says

import bitrouter
from bitrouter import BadRequest, fetch_media, is_public

TLS = Path(__file__).parent / "tls"
HERE = "127.0.0.1"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))


@dataclass
class Host:
    """A server on 127.0.0.1 that speaks TLS and follows a script."""

    fake: FakeProvider
    port: int

    @property
    def url(self) -> str:
        return f"https://{HERE}:{self.port}/a.png"

    @property
    def paths(self) -> list[str]:
        return [seen.path for seen in self.fake.seen]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "ca.pem"))

    @asynccontextmanager
    async def start(*script: Reply) -> AsyncIterator[Host]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(TLS / "server.pem")
        fake = FakeProvider(list(script))
        async with await asyncio.start_server(fake.serve, HERE, 0, ssl=context) as server:
            try:
                yield Host(fake, server.sockets[0].getsockname()[1])
            finally:
                await fake.hang_up()

    return start


def here(address: str) -> bool:
    return address == HERE


async def fetch(
    url: str, allowed: Callable[[str], bool] = here, most: int = 10_000
) -> tuple[str, bytes]:
    return await asyncio.to_thread(fetch_media, url, allowed, most)


async def refused(
    url: str, allowed: Callable[[str], bool] = here, most: int = 10_000
) -> BadRequest:
    with pytest.raises(BadRequest) as told:
        await fetch(url, allowed, most)
    return told.value


def image(body: bytes = PNG, kind: str = "image/png", **more: Any) -> Reply:
    return Reply(body=body, headers={"content-type": kind}, **more)


def moved(to: str, status: int = 302) -> Reply:
    return Reply(status, b"", headers={"location": to})


# Where we connect.

# fmt: off
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"]
PRIVATE = {
    "loopback": "127.0.0.1",           "more of loopback": "127.8.8.8",
    "this host": "0.0.0.0",            "class A": "10.1.2.3",
    "class B": "172.16.0.1",           "the end of class B": "172.31.255.255",
    "class C": "192.168.1.1",          "link-local": "169.254.1.1",
    "metadata": "169.254.169.254",     "shared": "100.64.0.1",
    "documentation": "192.0.2.1",      "benchmarks": "198.18.0.1",
    "multicast": "224.0.0.1",          "global multicast": "239.1.1.1",
    "reserved": "240.0.0.1",           "broadcast": "255.255.255.255",
    "IPv6 loopback": "::1",            "IPv6 unspecified": "::",
    "IPv6 link-local": "fe80::1",      "IPv6 with a zone": "fe80::1%eth0",
    "IPv6 local": "fd00::1",           "IPv6 metadata": "fd00:ec2::254",
    "IPv6 multicast": "ff02::1",       "IPv6 documentation": "2001:db8::1",
    "mapped loopback": "::ffff:127.0.0.1", "mapped class A": "::ffff:10.0.0.1",
    "mapped metadata": "::ffff:a9fe:a9fe", "mapped multicast": "::ffff:224.0.0.1",
    "NAT64 loopback": "64:ff9b::7f00:1",   "NAT64 class A": "64:ff9b::a00:1",
    "6to4 loopback": "2002:7f00:1::1",     "compatible loopback": "::7f00:1",
}
# fmt: on


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_may_be_connected_to(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("case", crossed(PRIVATE))
def test_no_other_address_may(case: str) -> None:
    assert not is_public(PRIVATE[case])


LOCAL = [
    "https://127.0.0.1/a.png",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0177.0.0.1/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://localhost:1/",
    "https://user:secret@127.0.0.1/",
    "https://8.8.8.8@127.0.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://0.0.0.0/",
]


@pytest.mark.parametrize("url", LOCAL)
async def test_no_spelling_of_a_private_address_is_fetched_from(url: str) -> None:
    error = await refused(url, is_public)
    assert (error.code, error.status) == ("blocked_url", 400)


OTHER_SCHEMES = [
    "http://127.0.0.1/a.png",
    "HTTP://127.0.0.1/",
    "ftp://127.0.0.1/",
    "file:///etc/passwd",
    "gs://bucket/file",
    "//127.0.0.1/",
    "https:///a.png",
    "https://",
    "gopher://127.0.0.1:70/",
    "unix:/run/x",
    "",
]


@pytest.mark.parametrize("url", OTHER_SCHEMES)
async def test_nothing_but_https_is_fetched(url: str) -> None:
    assert (await refused(url, lambda _: True)).code == "blocked_url"


BROKEN = [
    "https://[::1",
    "https://a:port/",
    "https://127.0.0.1:99999/",
    "https://a\x00b/",
    "https://a..b/",
]


@pytest.mark.parametrize("url", BROKEN)
async def test_a_broken_url_is_the_caller_s_fault(url: str) -> None:
    error = await refused(url, lambda _: True)
    assert error.code in ("media_not_fetched", "blocked_url") and "\x00" not in error.message


async def test_a_name_is_allowed_only_if_all_its_addresses_are() -> None:
    looked_at: list[str] = []

    def allowed(address: str) -> bool:
        looked_at.append(address)
        return False

    assert (await refused("https://localhost/", allowed)).code == "blocked_url"
    assert set(looked_at) <= {HERE, "::1"} and looked_at


# What comes of it.


async def test_media_are_fetched(host: Any) -> None:
    async with host(image()) as site:
        assert await fetch(site.url) == ("image/png", PNG)
        [seen] = site.fake.seen
    assert (seen.method, seen.path, seen.body) == ("GET", "/a.png", b"")
    assert seen.headers["host"] == f"{HERE}:{site.port}"
    assert {"authorization", "cookie", "x-api-key"}.isdisjoint(seen.headers)


async def test_a_name_in_the_url_is_the_name_that_is_asked_for(host: Any) -> None:
    async with host(image()) as site:
        url = f"https://localhost:{site.port}/a"
        assert await fetch(url, lambda _: True) == ("image/png", PNG)
        assert site.fake.seen[0].headers["host"] == f"localhost:{site.port}"


TARGETS = {
    "a query": ("/a?b=c&d=%2F", "/a?b=c&d=%2F"),
    "no path": ("", "/"),
    "spaces": ("/a b.png", "/a%20b.png"),
    "letters": ("/é", "/%C3%A9"),
    "letters in a query": ("/a?q=é", "/a?q=%C3%A9"),
    "escapes": ("/a%20b", "/a%20b"),
    "a fragment": ("/a#b", "/a"),
}


@pytest.mark.parametrize("case", crossed(TARGETS))
async def test_a_path_arrives_as_it_was_meant(host: Any, case: str) -> None:
    given, arrives = TARGETS[case]
    async with host(image()) as site:
        await fetch(f"https://{HERE}:{site.port}{given}")
        assert site.paths == [arrives]


# fmt: off
KINDS = {
    "a PNG called a GIF": (PNG, "image/gif", "image/png"),
    "a JPEG called nothing": (b"\xff\xd8\xff\xe0" + bytes(9), "", "image/jpeg"),
    "a GIF called octets": (b"GIF89a" + bytes(9), "application/octet-stream", "image/gif"),
    "a WEBP called a PNG": (b"RIFF\0\0\0\0WEBPVP8 ", "image/png", "image/webp"),
    "a PDF called text": (b"%PDF-1.7\n", "text/plain; charset=utf-8", "application/pdf"),
    "a text": (b"hello", "text/plain; charset=utf-8", "text/plain"),
    "nothing at all": (b"", "image/png", "image/png"),
}
# fmt: on


@pytest.mark.parametrize(("body", "kind", "wanted"), KINDS.values(), ids=KINDS)
async def test_media_are_what_their_bytes_are(
    host: Any, body: bytes, kind: str, wanted: str
) -> None:
    async with host(image(body, kind)) as site:
        assert await fetch(site.url) == (wanted, body)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_media_may_come_in_any_framing(host: Any, framing: str) -> None:
    reply = Reply(chunks=(PNG[:9], None, PNG[9:]), framing=framing, gap_s=0.005)
    async with host(reply) as site:
        assert await fetch(site.url) == ("image/png", PNG)


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 403, 404, 500])
async def test_anything_but_200_is_no_media(host: Any, status: int) -> None:
    async with host(Reply(status, b"" if status in (204, 304) else PNG)) as site:
        error = await refused(site.url)
    assert error.code == "media_not_fetched" and str(status) in error.message


TOO_SHORT = {"content-length": "9999"}
BROKEN_OFF: dict[str, Callable[[str], Reply]] = {
    "chunks": lambda how: Reply(chunks=(PNG, None), framing="chunked", ending=how),
    "length": lambda how: Reply(chunks=(PNG, None), framing="x", headers=TOO_SHORT, ending=how),
}


@pytest.mark.parametrize(("case", "ending"), crossed(BROKEN_OFF, ["cut", "reset"]))
async def test_media_that_break_off_are_none(host: Any, case: str, ending: str) -> None:
    async with host(BROKEN_OFF[case](ending)) as site:
        assert (await refused(site.url)).code == "media_not_fetched"


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_media_have_a_bound(host: Any, framing: str) -> None:
    async with host(Reply(chunks=(bytes(1000),), framing=framing)) as site:
        assert len((await fetch(site.url, most=1000))[1]) == 1000
        assert "more than" in (await refused(site.url, most=999)).message


async def test_the_bound_is_20_mb(host: Any) -> None:
    piece = bytes(2**20)
    async with host(Reply(chunks=(piece,) * 21, framing="chunked")) as site:
        started_at = time.monotonic()
        with pytest.raises(BadRequest, match="more than 20 MB"):
            await asyncio.to_thread(fetch_media, site.url, here)
        assert time.monotonic() - started_at < 5


# A test cannot wait for ten seconds; what it may wait for is an argument one step further down.


async def in_time(url: str, seconds: float) -> BadRequest:
    until, once = time.monotonic() + seconds, bitrouter._fetch_once
    with pytest.raises(BadRequest) as told:
        await asyncio.to_thread(once, url, here, until, 10_000)
    late_s, error = time.monotonic() - until, told.value
    if late_s > 0.3:
        del told, error
        gc.collect()  # a failure must not keep the socket open into the next test
    assert late_s < 0.3
    return error


async def test_media_that_trickle_are_given_up(host: Any) -> None:
    trickle: tuple[bytes | None, ...] = (b"x", None) * 100
    async with host(Reply(chunks=trickle, framing="chunked", gap_s=0.01)) as site:
        assert (await in_time(site.url, 0.1)).code == "media_not_fetched"


async def test_a_silent_server_is_given_up_and_hung_up_on(host: Any) -> None:
    async with host(Reply(hangs=True)) as site:
        assert (await in_time(site.url, 0.1)).code == "media_not_fetched"
        await site.fake.hung_up.wait()


STUCK = {
    "in the body": Reply(chunks=(b"x",), framing="chunked", ending="hang"),
    "after too much": Reply(chunks=(bytes(20_000),), framing="chunked", ending="hang"),
}


@pytest.mark.parametrize("case", STUCK)
async def test_who_is_given_up_in_the_body_is_hung_up_on(host: Any, case: str) -> None:
    async with host(STUCK[case]) as site:
        kept = [await in_time(site.url, 0.1)]  # as whoever answers with it keeps it for a while
        for _ in range(20):
            await asyncio.sleep(0.01)
        hung_up, code = site.fake.hung_up.is_set(), kept.pop().code
        gc.collect()  # nor must this one
    assert (hung_up, code) == (True, "media_not_fetched")


async def test_a_head_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch, host: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for letter in b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 4:
                writer.write(bytes([letter]))
                await writer.drain()
                await asyncio.sleep(0.015)
        finally:
            writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem")
    async with await asyncio.start_server(serve, HERE, 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        await in_time(f"https://{HERE}:{port}/", 0.1)


async def test_a_port_where_nobody_listens_is_said_to_be_so() -> None:
    with socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]
    assert (await refused(f"https://{HERE}:{port}/")).code == "media_not_fetched"


async def test_a_certificate_that_nobody_signed_is_not_trusted(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(image()) as site:
        monkeypatch.delenv("SSL_CERT_FILE")
        error = await refused(site.url)
        assert error.code == "media_not_fetched" and site.fake.seen == []


async def test_a_certificate_of_another_name_is_not_trusted(host: Any) -> None:
    async with host(image()) as site:
        url = f"https://localhost.localdomain:{site.port}/"
        assert (await refused(url, lambda _: True)).code == "media_not_fetched"
        assert site.fake.seen == []


# Redirections.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("to", ["/b.png", "b.png", "//127.0.0.1:{port}/b.png", "{base}/b.png"])
async def test_a_redirection_is_followed(host: Any, status: int, to: str) -> None:
    async with host(image()) as site:
        where = to.format(port=site.port, base=f"https://{HERE}:{site.port}")
        site.fake.script[:] = [moved(where, status), image()]
        assert await fetch(site.url) == ("image/png", PNG)
        assert site.paths == ["/a.png", "/b.png"]


@pytest.mark.parametrize(
    "to",
    [
        "https://127.0.0.2:{port}/",
        "https://[::1]:{port}/",
        "https://[::ffff:127.0.0.1]:{port}/",
        "https://169.254.169.254/latest",
        "https://10.0.0.1/",
        "http://127.0.0.1:{port}/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
    ],
)
async def test_a_redirection_leads_nowhere_else(host: Any, to: str) -> None:
    async with host(image()) as site:
        site.fake.script[:] = [moved(to.format(port=site.port)), image()]
        assert (await refused(site.url)).code == "blocked_url"
        assert site.paths == ["/a.png"]


async def test_a_few_redirections_are_followed_and_no_more(host: Any) -> None:
    async with host(moved("/1"), moved("/2"), moved("/3"), image(), moved("/round")) as site:
        assert (await fetch(site.url))[1] == PNG
        error = await refused(site.url)
        assert error.code == "media_not_fetched" and "redirected" in error.message
        assert len(site.paths) == 8


async def test_a_redirection_to_nowhere_is_no_media(host: Any) -> None:
    for reply in (Reply(302, b""), moved("https://[::1"), moved("https://a:b/")):
        async with host(reply) as site:
            assert (await refused(site.url)).status == 400


# In a request.


def image_at(client: str, url: str) -> dict[str, Any]:
    """A request that shows an image at a URL."""
    match client:
        case "C":
            shown: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
            return {"messages": [{"role": "user", "content": [shown]}]}
        case "R":
            shown = {"type": "input_image", "image_url": url}
            return {"input": [{"role": "user", "content": [shown]}]}
    shown = {"type": "image", "source": {"type": "url", "url": url}}
    return request_of("M") | {"messages": [{"role": "user", "content": [shown]}]}


OLD = "up/gemini-2.0-flash"  # which follows no URL


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("client", ["C", "R", "M"])
async def test_an_image_is_fetched_for_who_does_not_fetch(
    host: Any, hop: Any, client: str, streams: bool
) -> None:
    async with (
        host(image(kind="image/gif")) as site,
        hop(client + "G", says("G", "hi", streams=streams), model=OLD) as h,
    ):
        h.gateway.app.may_fetch_from = here
        answer = await h.ask(image_at(client, site.url), streams=streams)
        assert heard(client, answer).text == "hi"
        [part] = h.sent["contents"][0]["parts"]
    assert part == {"inlineData": {"mimeType": "image/png", "data": base64.b64encode(PNG).decode()}}


@pytest.mark.parametrize("client", ["C", "R", "M"])
async def test_a_url_is_passed_on_to_who_follows_it(host: Any, hop: Any, client: str) -> None:
    async with host(image()) as site, hop(client + "G", says("G", "hi")) as h:
        h.gateway.app.may_fetch_from = here
        await h.ask(image_at(client, site.url))
        [part] = h.sent["contents"][0]["parts"]
        assert part["fileData"]["fileUri"] == site.url and site.fake.seen == []


async def test_a_document_is_fetched_for_chat(host: Any, hop: Any) -> None:
    pdf = b"%PDF-1.7\n"
    async with host(image(pdf, "application/pdf")) as site, hop("MC", says("C", "hi")) as h:
        h.gateway.app.may_fetch_from = here
        block = {"type": "document", "source": {"type": "url", "url": site.url}, "title": "a.pdf"}
        await h.ask(request_of("M") | {"messages": [{"role": "user", "content": [block]}]})
        [part] = h.sent["messages"][0]["content"]
    data = base64.b64encode(pdf).decode()
    assert part["file"]["file_data"] == f"data:application/pdf;base64,{data}"


async def test_an_image_in_a_result_is_fetched_too(host: Any, hop: Any) -> None:
    async with host(image()) as site, hop("MG", says("G", "hi"), model=OLD) as h:
        h.gateway.app.may_fetch_from = here
        shown = {"type": "image", "source": {"type": "url", "url": site.url}}
        result = {"type": "tool_result", "tool_use_id": "t1", "content": [shown]}
        use = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
        turns = [("user", "hi"), ("assistant", [use]), ("user", [result])]
        await h.ask(request_of("M") | {"messages": [{"role": r, "content": c} for r, c in turns]})
        assert base64.b64encode(PNG).decode() in str(h.sent) and site.url not in str(h.sent)


async def test_one_url_is_fetched_once(host: Any, hop: Any) -> None:
    async with host(image()) as site, hop("CG", says("G", "hi"), model=OLD) as h:
        h.gateway.app.may_fetch_from = here
        [message] = image_at("C", site.url)["messages"]
        await h.ask({"messages": [message, message]})
        assert len(site.fake.seen) == 1 and str(h.sent).count("inlineData") == 2


@pytest.mark.parametrize("client", ["C", "R", "M"])
async def test_a_private_url_is_refused_in_the_caller_s_words(hop: Any, client: str) -> None:
    async with hop(client + "G", says("G", "hi"), model=OLD) as h:
        answer = await h.ask(image_at(client, "https://169.254.169.254/latest"))
        assert answer.status == 400 and h.up.seen == []
    assert "blocked_url" in answer.body.decode() and "169.254" in answer.json()["error"]["message"]


async def test_an_image_that_is_not_there_is_the_caller_s_fault(host: Any, hop: Any) -> None:
    async with host(Reply(404)) as site, hop("CG", says("G", "hi"), model=OLD) as h:
        h.gateway.app.may_fetch_from = here
        answer = await h.ask(image_at("C", site.url))
        assert h.up.seen == []
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (400, "media_not_fetched") and "404" in error[
        "message"
    ]


async def test_there_is_an_end_to_the_urls_of_a_request(host: Any, hop: Any) -> None:
    async with host(image()) as site, hop("CG", says("G", "hi"), model=OLD) as h:
        h.gateway.app.may_fetch_from = here
        parts = [image_at("C", f"{site.url}?{n}")["messages"][0]["content"][0] for n in range(21)]
        body = {"messages": [{"role": "user", "content": parts}]}
        assert (await h.ask(body)).status == 400 and site.fake.seen == []
        body["messages"][0]["content"] = parts[:20]
        assert (await h.ask(body)).status == 200 and len(site.fake.seen) == 20


async def test_others_are_served_while_media_are_fetched(host: Any, hop: Any) -> None:
    async with (
        host(image(after_s=0.05)) as site,
        hop("CG", says("G", "hi"), model=OLD) as h,
        h.gateway.caller() as other,
    ):
        h.gateway.app.may_fetch_from = here
        fetching = asyncio.get_running_loop().create_task(h.ask(image_at("C", site.url)))
        while not site.fake.seen:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        answer = await other.post("/v1/chat/completions", ask("Hi", "echo/echo"))
        assert answer.status == 200 and not fetching.done()
        assert (await fetching).status == 200


async def test_the_next_target_may_follow_the_url_itself(
    host: Any, hop: Any, provider: Any
) -> None:
    toml = '[models.smart]\nendpoints = [{provider = "up", service_id = "gemini-2.0-flash"}, '
    toml += '{provider = "next", service_id = "m"}]\nstrategy = "priority"\n'
    async with host(image()) as site, provider(says("R", "hi")) as other:
        toml += provider_toml(other, "R", "next")
        async with hop("CG", Reply(500), model="smart", toml=toml) as h:
            h.gateway.app.may_fetch_from = here
            assert (await h.hear(image_at("C", site.url))).text == "hi"
            [item] = other.seen[0].json()["input"]
            assert item["content"][0]["image_url"] == site.url
