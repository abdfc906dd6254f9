"""One request's life: what goes up, what comes back, what is written down."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from support import (
    CHAT_ANSWER,
    CHAT_STREAM,
    MESSAGES_ANSWER,
    Answer,
    Caller,
    FakeProvider,
    Reply,
    ask,
    request_bytes,
    stream,
    until,
)

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
GEMINI = "/v1beta/models/gemini-2.5-flash:generateContent"
GEMINI_ANSWER = {"candidates": [{"content": {"parts": [{"text": "Hello!"}]}}]}

OPENAI_KEY, ANTHROPIC_KEY, GOOGLE_KEY = "sk-openai-0123456", "sk-ant-0123456", "AIza-0123456"
ALL_KEYS = (OPENAI_KEY, ANTHROPIC_KEY, GOOGLE_KEY)


@dataclass
class Front:
    """A gateway in front of one provider that is OpenAI, Anthropic and Google, and a caller."""

    up: FakeProvider
    gateway: Any
    caller: Caller


@pytest.fixture
def front(provider: Any, gateway: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(
        *replies: Reply, toml: str = "", keys: tuple[str, ...] = ("openai", "anthropic", "google")
    ) -> AsyncIterator[Front]:
        given = zip(("openai", "anthropic", "google"), ALL_KEYS, strict=True)
        environ = {f"{name.upper()}_API_KEY": key for name, key in given if name in keys}
        async with provider(*(replies or [Reply(body=CHAT_ANSWER)])) as up:
            environ |= {f"{name.upper()}_BASE_URL": up.base for name in keys}
            async with gateway(toml, environ) as gw, gw.caller() as caller:
                yield Front(up, gw, caller)

    return start


def told(answer: Answer) -> tuple[str, str]:
    """Whose error object an answer has, and our own word in it."""
    body = answer.json()
    error = body["error"]
    if body.get("type") == "error":
        return "anthropic", error["details"]["error_code"]
    if "details" in error:
        return "google", error["details"][0]["reason"].lower()
    assert error.keys() >= {"message", "type", "param", "code"}
    return "openai", error["code"]


SHAPES = {CHAT: "openai", RESPONSES: "openai", MESSAGES: "anthropic", GEMINI: "google"}
BODIES: dict[str, Any] = {
    CHAT: ask(model="openai/gpt-4o"),
    RESPONSES: {"model": "openai/gpt-4o", "input": "Hi"},
    MESSAGES: ask(model="claude-sonnet-4-6", max_tokens=9),
    GEMINI: {"contents": []},
}
OK = {CHAT: CHAT_ANSWER, MESSAGES: MESSAGES_ANSWER, GEMINI: GEMINI_ANSWER}


# Answers.


async def test_an_answer_passes_through_untouched(
    provider: Any, gateway: Any, openai_env: Any
) -> None:
    raw = b'{"choices": [{"message": {"content": "hi"}, "x": 1.50}], "usage":{"prompt_tokens":11}}'
    async with provider(Reply(body=raw)) as up, gateway(environ=openai_env(up)) as gw:
        async with gw.caller() as caller:
            answer = await caller.post("/v1/chat/completions", ask())
        assert (answer.status, answer.body) == (200, raw)
        assert answer.headers["x-bitrouter-provider"] == "openai"


async def test_a_stream_passes_and_its_usage_is_noted(
    provider: Any, gateway: Any, openai_env: Any
) -> None:
    async with provider(stream(*CHAT_STREAM)) as up, gateway(environ=openai_env(up)) as gw:
        async with gw.caller() as caller:
            answer = await caller.post("/v1/chat/completions", ask(stream=True))
        assert answer.body == b"".join(CHAT_STREAM[:4]) + CHAT_STREAM[5]
        [line] = gw.lines()
        assert (line["in"], line["out"], line["status"]) == (11, 7, 200)


async def test_an_answer_without_retries_is_logged_once(
    provider: Any, gateway: Any, openai_env: Any
) -> None:
    async with provider(Reply(body=CHAT_ANSWER)) as up, gateway(environ=openai_env(up)) as gw:
        async with gw.caller() as caller:
            await caller.post("/v1/chat/completions", ask(model="openai/gpt-4o-mini"))
        [line] = gw.lines()
        assert line["cost_usd"] == (11 * 0.15 + 7 * 0.6) / 1e6


async def test_what_an_answer_cost_is_in_a_header(front: Any) -> None:
    async with front() as f:
        answer = await f.caller.post(CHAT, ask(model="openai/gpt-4o-mini"))
        assert float(answer.headers["x-bitrouter-cost-usd"]) == (11 * 0.15 + 7 * 0.6) / 1e6


async def test_nobody_makes_up_a_cost(front: Any) -> None:
    async with front() as f:
        answer = await f.caller.post(CHAT, ask(model="openai/of-no-known-price"))
        assert "x-bitrouter-cost-usd" not in answer.headers


@pytest.mark.parametrize(
    ("given", "kept"),
    [("my-id_1", True), ("a b", False), ("x" * 129, False), ("\xe9", False), ("", False)],
    ids=["sane", "blank", "long", "not ASCII", "empty"],
)
async def test_a_caller_may_name_its_request(front: Any, given: str, kept: bool) -> None:
    async with front() as f:
        answer = await f.caller.post(CHAT, BODIES[CHAT], x_bitrouter_request_id=given)
        ident = answer.headers["x-bitrouter-request-id"]
        assert ident and (ident == given) is kept
        assert [line["id"] for line in f.gateway.lines()] == [ident]


async def test_requests_have_ids_of_their_own(front: Any) -> None:
    async with front() as f:
        answers = [await f.caller.get("/health") for _ in range(3)]
        assert len({answer.headers["x-bitrouter-request-id"] for answer in answers}) == 3


# Requests that are none.

UNREADABLE: dict[str, tuple[bytes, str, int, str]] = {
    "not JSON": (b'{"a": ', "application/json", 400, "invalid_request"),
    "nothing": (b"", "application/json", 400, "invalid_request"),
    "a list": (b"[1]", "application/json", 400, "invalid_request"),
    "not UTF-8": (b'{"a": "\xff"}', "application/json", 400, "invalid_request"),
    "too deep": (b'{"a":' + b"[" * 100_000, "application/json", 400, "invalid_request"),
    "plain text": (b"{}", "text/plain", 415, "unsupported_media_type"),
    "a form": (b"a=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    "a file": (b"{}", "multipart/form-data; boundary=x", 415, "unsupported_media_type"),
}


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("case", UNREADABLE)
async def test_an_unreadable_request_is_refused_in_the_path_s_shape(
    front: Any, case: str, path: str
) -> None:
    raw, content_type, status, code = UNREADABLE[case]
    async with front() as f:
        answer = await f.caller.post(path, raw, content_type=content_type)
        assert (answer.status, told(answer)) == (status, (SHAPES[path], code))
        assert f.up.seen == []


WRONG_FIELDS: dict[str, tuple[Any, str]] = {
    "no model": ({}, "missing_required_parameter"),
    "an empty model": ({"model": " "}, "missing_required_parameter"),
    "a null for a model": ({"model": None}, "missing_required_parameter"),
    "a number for a model": ({"model": 5}, "invalid_request"),
    "an endless model": ({"model": "x" * 513}, "missing_required_parameter"),
    "a word for stream": ({"model": "openai/m", "stream": "yes"}, "invalid_request"),
}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("case", WRONG_FIELDS)
async def test_a_wrong_field_is_named(front: Any, case: str, path: str) -> None:
    body, code = WRONG_FIELDS[case]
    async with front() as f:
        answer = await f.caller.post(path, body)
        assert (answer.status, told(answer)) == (400, (SHAPES[path], code))
        field = "stream" if "stream" in body else "model"
        assert answer.json()["error"]["message"].startswith(f"{field}: ")


async def test_a_field_in_doubt_is_not_guessed_at(front: Any) -> None:
    raw = b'{"model": "openai/m", "messages": [], "model": "openai/n"}'
    async with front() as f:
        answer = await f.caller.post(CHAT, raw)
        assert (answer.status, f.up.seen) == (400, [])


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"]
)
async def test_json_has_several_names(front: Any, content_type: str) -> None:
    async with front() as f:
        answer = await f.caller.post(CHAT, BODIES[CHAT], content_type=content_type)
        assert answer.status == 200


# Models that nobody serves.

NOBODYS = {
    **dict.fromkeys((CHAT, RESPONSES, MESSAGES), "claud-sonnet-4-6"),
    "/v1beta/models/claud-sonnet-4-6:generateContent": "",
}


@pytest.mark.parametrize("path", NOBODYS)
async def test_an_unknown_model_is_a_404_with_a_near_miss(front: Any, path: str) -> None:
    async with front() as f:
        answer = await f.caller.post(path, {"model": NOBODYS[path]})
        assert (answer.status, told(answer)[1]) == (404, "model_not_found")
        assert "claude-sonnet-4.6" in answer.json()["error"]["message"]


MISSING = {
    CHAT: "OPENAI_API_KEY",
    RESPONSES: "OPENAI_API_KEY",
    MESSAGES: "ANTHROPIC_API_KEY",
    GEMINI: "GEMINI_API_KEY",
}


@pytest.mark.parametrize("path", MISSING)
async def test_a_missing_key_is_a_402_that_names_its_variable(front: Any, path: str) -> None:
    async with front(keys=()) as f:
        answer = await f.caller.post(path, BODIES[path])
        assert (answer.status, told(answer)) == (402, (SHAPES[path], "provider_key_missing"))
        assert MISSING[path] in answer.json()["error"]["message"]


# What nobody can translate, and what the provider has instead.
FOREIGN = {
    "/v1/completions": (ask(model="anthropic/claude-sonnet-4.6"), MESSAGES),
    "/v1/moderations": (ask(model="anthropic/claude-sonnet-4.6"), MESSAGES),
    "/v1/embeddings": ({"model": "anthropic/claude-sonnet-4.6", "input": "a"}, MESSAGES),
}


@pytest.mark.parametrize("path", FOREIGN)
async def test_what_a_provider_has_nothing_of_is_a_501_that_names_what_works(
    front: Any, path: str
) -> None:
    body, works = FOREIGN[path]
    async with front(keys=("anthropic",)) as f:
        answer = await f.caller.post(path, body)
        assert (answer.status, told(answer)[1]) == (501, "protocol_unsupported")
        assert f"POST {works}" in answer.json()["error"]["message"]


# Paths and methods.

METHODS = [
    ("GET", CHAT, "POST"),
    ("HEAD", CHAT, "POST"),
    ("OPTIONS", CHAT, "POST"),
    ("DELETE", MESSAGES, "POST"),
    ("GET", GEMINI, "POST"),
    ("PUT", "/v1/models", "GET, HEAD"),
    ("POST", "/health", "GET, HEAD"),
    ("DELETE", "/v1/models/openai/gpt-4o", "GET, HEAD"),
]


@pytest.mark.parametrize(("method", "path", "allow"), METHODS)
async def test_a_wrong_method_is_told_the_right_one(
    front: Any, method: str, path: str, allow: str
) -> None:
    async with front() as f:
        f.caller.send(request_bytes(method, path, None))
        answer = await f.caller.answer(bodiless=method == "HEAD")
        assert (answer.status, answer.headers["allow"]) == (405, allow)
        if answer.body:
            assert told(answer) == (SHAPES.get(path, "openai"), "method_not_allowed")


@pytest.mark.parametrize(
    ("method", "path", "shape"),
    [
        ("GET", "/v1/nothing", "openai"),
        ("POST", "/v2/chat/completions", "openai"),
        ("POST", "/v1/chat/completions/extra", "openai"),
        ("POST", "/v1/responses/resp_1/cancel", "openai"),
        ("POST", "/v1/messages/batches", "anthropic"),
        ("GET", "/v1beta/nothing", "google"),
        ("POST", "/v1beta/models/m:frobnicate", "google"),
        ("GET", "/%2e%2e/etc/passwd", "openai"),
    ],
)
async def test_where_nothing_is_there_is_a_404_in_json(
    front: Any, method: str, path: str, shape: str
) -> None:
    async with front() as f:
        f.caller.send(request_bytes(method, path, {} if method == "POST" else None))
        answer = await f.caller.answer()
        assert (answer.status, told(answer)) == (404, (shape, "not_found"))


ALIASES = {
    "/chat/completions": CHAT,
    "/v1/v1/chat/completions": CHAT,
    "/openai/v1/chat/completions": CHAT,
    "/v1/chat/completions/": CHAT,
    "/responses": RESPONSES,
    "/messages": MESSAGES,
    "/v1/v1/messages": MESSAGES,
    "/v1/messages?beta=true": "/v1/messages?beta=true",
    "/v1/v1/messages/count_tokens": "/v1/messages/count_tokens",
    "/v1beta/v1/models/gemini-2.5-flash:generateContent": GEMINI,
}


@pytest.mark.parametrize("path", ALIASES)
async def test_what_clients_make_of_a_base_url_works(front: Any, path: str) -> None:
    said = {**CHAT_ANSWER, **MESSAGES_ANSWER, **GEMINI_ANSWER, "output": []}
    async with front(Reply(body=said)) as f:
        model = "claude-sonnet-4-6" if "messages" in path else "openai/gpt-4o"
        answer = await f.caller.post(path, {"model": model})
        upstream = f.up.seen[0].path
        assert answer.status == 200
        assert upstream.removeprefix("/v1") == ALIASES[path].removeprefix("/v1")


GEMINI_PATHS = {
    "/v1beta/models/gemini-x:generateContent": "gemini-x:generateContent",
    "/v1/models/gemini-x:generateContent": "gemini-x:generateContent",
    "/v1/models/google/gemini-x:generateContent": "gemini-x:generateContent",
    "/v1beta/models/google%2Fgemini-x:generateContent": "gemini-x:generateContent",
    "/v1beta/models/google:gemini-x:generateContent": "gemini-x:generateContent",
    "/v1beta/google/gemini-x:generateContent": "gemini-x:generateContent",
    "/v1/gemini-x:generateContent": "gemini-x:generateContent",
    "/v1/models/google/gemini-x:free:generateContent": "gemini-x:free:generateContent",
    "/v1/models/google/team/gemini-x:generateContent": "team/gemini-x:generateContent",
    "/v1beta/models/gemini-x:countTokens": "gemini-x:countTokens",
    "/v1beta/models/gemini-x:embedContent": "gemini-x:embedContent",
    "/v1beta/models/gemini-x:batchEmbedContents": "gemini-x:batchEmbedContents",
    "/v1beta/models/gemini-x:generateContent?key=theirs": "gemini-x:generateContent",
    "/v1beta/models/gemini-x:generateContent?key=theirs&x=1": "gemini-x:generateContent?x=1",
    "/v1beta/models/gemini-x:generateContent?x=1&key=theirs": "gemini-x:generateContent?x=1",
}


@pytest.mark.parametrize("path", GEMINI_PATHS)
async def test_a_google_path_holds_any_model(front: Any, path: str) -> None:
    async with front(Reply(body=GEMINI_ANSWER)) as f:
        answer = await f.caller.post(path, {"contents": []})
        assert answer.status == 200
        assert f.up.seen[0].path == f"/v1beta/models/{GEMINI_PATHS[path]}"


@pytest.mark.parametrize(
    ("query", "upstream"),
    [
        ("", "alt=sse"),
        ("?alt=sse", "alt=sse"),
        ("?alt=json", "alt=sse"),
        ("?alt=sse&key=theirs", "alt=sse"),
        ("?x=1&alt=sse", "x=1&alt=sse"),
    ],
)
async def test_google_is_always_asked_for_events(front: Any, query: str, upstream: str) -> None:
    event = b'data: {"candidates":[{"content":{"parts":[{"text":"a"}]},"finishReason":"STOP"}]}'
    async with front(stream(event + b"\r\n\r\n")) as f:
        answer = await f.caller.post(f"/v1beta/models/gemini-x:streamGenerateContent{query}", {})
        assert f.up.seen[0].path.rpartition("?")[2] == upstream
        assert answer.body.startswith(b"data: " if "alt=sse" in query else b"[{")


@pytest.mark.parametrize("path", ["/llm/health", "/llm/v1/models", "/llm/v1beta/models", "/health"])
async def test_everything_may_be_below_a_base_path(front: Any, path: str) -> None:
    async with front(toml='[server]\nbase_path = "/llm"') as f:
        answer = await f.caller.get(path)
        assert answer.status == 200


async def test_a_call_below_a_base_path_goes_to_the_provider_s_own_path(front: Any) -> None:
    async with front(toml='[server]\nbase_path = "/llm"') as f:
        answer = await f.caller.post("/llm/v1/chat/completions", BODIES[CHAT])
        assert (answer.status, "/llm" in f.up.seen[0].path) == (200, False)


# The door.

LOCKED = '[server]\nauth = "required"\n[keys.alice]\nkey = "our-key-for-alice"'


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("key", ["", "Bearer wrong", "Basic our-key-for-alice"])
async def test_without_one_of_our_keys_the_answer_is_401(front: Any, path: str, key: str) -> None:
    async with front(toml=LOCKED) as f:
        headers = {"authorization": key} if key else {}
        answer = await f.caller.post(path, BODIES[path], **headers)
        assert (answer.status, told(answer)) == (401, (SHAPES[path], "invalid_api_key"))
        assert f.up.seen == []


@pytest.mark.parametrize("where", ["authorization", "x-api-key", "x-goog-api-key", "api-key", "?"])
async def test_our_keys_are_taken_from_where_sdks_put_them(front: Any, where: str) -> None:
    key = "Bearer our-key-for-alice" if where == "authorization" else "our-key-for-alice"
    query, headers = ("?key=our-key-for-alice", {}) if where == "?" else ("", {where: key})
    async with front(toml=LOCKED) as f:
        answer = await f.caller.post(CHAT + query, BODIES[CHAT], **headers)
        [line] = f.gateway.lines()
        assert (answer.status, line["caller"]) == (200, "alice")
        assert "our-key" not in f"{f.up.seen}{f.gateway.written.getvalue()}"


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:1", None, 200),
        ("[::1]", None, 200),
        ("evil.example", None, 403),
        ("127.0.0.1.evil.example", None, 403),
        ("localhost:1", "http://localhost:1", 200),
        ("localhost:1", "http://evil.example", 403),
        ("localhost:1", "null", 403),
    ],
)
async def test_no_web_page_gets_in(front: Any, host: str, origin: str | None, status: int) -> None:
    headers = {"host": host, **({"origin": origin} if origin else {})}
    async with front() as f:
        answer = await f.caller.post(CHAT, BODIES[CHAT], **headers)
        assert (answer.status, len(f.up.seen)) == (status, int(status == 200))


# Lists.

GOOGLE_CALLER = {"x-goog-api-key": "theirs"}
ANTHROPIC_CALLER = {"anthropic-version": "2023-06-01"}
LISTS: dict[str, tuple[str, dict[str, str], set[str]]] = {
    "openai": ("/v1/models", {}, {"id", "object", "created", "owned_by"}),
    "openai, bare": ("/models", {}, {"id", "object", "created", "owned_by"}),
    "openai, doubled": ("/v1/v1/models", {}, {"id", "object", "created", "owned_by"}),
    "bridge": ("/openai/v1/models", {}, {"id", "object", "created", "owned_by"}),
    "anthropic": (
        "/v1/models?limit=1000",
        ANTHROPIC_CALLER,
        {"type", "id", "display_name", "created_at"},
    ),
    "google": ("/v1beta/models?pageSize=1000", {}, {"name", "supportedGenerationMethods"}),
    "google, by key": ("/v1/models?pageSize=1000", GOOGLE_CALLER, {"name", "inputTokenLimit"}),
    "google, by client": ("/v1/models?pageSize=1000", {"x-goog-api-client": "x"}, {"name"}),
    "google, by query": ("/v1/models?pageSize=1000&key=theirs", {}, {"name", "displayName"}),
    "google, doubled": ("/v1beta/v1/models?pageSize=1000", {}, {"name", "outputTokenLimit"}),
}


@pytest.mark.parametrize("case", LISTS)
async def test_models_are_listed_in_the_caller_s_shape(front: Any, case: str) -> None:
    path, headers, wanted = LISTS[case]
    async with front() as f:
        listing = (await f.caller.get(path, **headers)).json()
        models = listing.get("data") or listing["models"]
        assert all(model.keys() >= wanted for model in models)
        names = {model.get("id") or model["name"].removeprefix("models/") for model in models}
        assert names >= {"openai/gpt-4o-mini", "anthropic/claude-sonnet-4.6", "echo/echo"}


async def test_a_listed_model_says_what_it_costs_and_takes(front: Any) -> None:
    async with front() as f:
        listing = (await f.caller.get("/v1/models")).json()
        [mini] = [model for model in listing["data"] if model["id"] == "openai/gpt-4o-mini"]
        price = mini["pricing_usd_per_million"]
        assert (price["input"], price["output"], mini["context_length"]) == (0.15, 0.6, 128000)
        assert (mini["providers"], listing["object"]) == (["openai"], "list")


async def test_anthropic_s_list_comes_in_pages(front: Any) -> None:
    async with front() as f:
        whole = (await f.caller.get("/v1/models?limit=1000", **ANTHROPIC_CALLER)).json()
        ids, page = [], {"has_more": True, "last_id": ""}
        while page["has_more"]:
            path = f"/v1/models?limit=7&after_id={page['last_id']}"
            page = (await f.caller.get(path, **ANTHROPIC_CALLER)).json()
            ids += [model["id"] for model in page["data"]]
        assert ids == [model["id"] for model in whole["data"]]
        assert (whole["has_more"], len(ids) > 14) == (False, True)


async def test_anthropic_s_list_can_be_read_backwards(front: Any) -> None:
    async with front() as f:
        whole = (await f.caller.get("/v1/models?limit=1000", **ANTHROPIC_CALLER)).json()
        ids = [model["id"] for model in whole["data"]]
        path = f"/v1/models?limit=3&before_id={ids[10]}"
        page = (await f.caller.get(path, **ANTHROPIC_CALLER)).json()
        # wire: docs.claude.com: the page of results immediately before this object
        assert [model["id"] for model in page["data"]] == ids[7:10]


@pytest.mark.parametrize(("query", "count"), [("", 20), ("?limit=0", 1), ("?limit=x", 20)])
async def test_a_page_of_anthropic_s_list_has_its_bounds(
    front: Any, query: str, count: int
) -> None:
    async with front() as f:
        page = (await f.caller.get(f"/v1/models{query}", **ANTHROPIC_CALLER)).json()
        assert (len(page["data"]), page["has_more"]) == (count, True)
        assert page["first_id"] == page["data"][0]["id"]


async def test_google_s_list_comes_in_pages(front: Any) -> None:
    async with front() as f:
        whole = (await f.caller.get("/v1beta/models?pageSize=1000")).json()
        names, token = [], "0"
        while token:
            page = (await f.caller.get(f"/v1beta/models?pageSize=7&pageToken={token}")).json()
            names += [model["name"] for model in page["models"]]
            token = page.get("nextPageToken")
        assert names == [model["name"] for model in whole["models"]]
        assert "nextPageToken" not in whole and len(names) > 14


ASKED_AT = {"openai": CHAT, "anthropic": MESSAGES, "google": "", "echo": CHAT, "own": CHAT}
OWN = """
[providers.own]
api_base = "{base}/v1"
models = [{{id = "my-team/llama:free"}}]
[models.smart]
endpoints = [{{provider = "own", service_id = "x"}}]
"""


async def test_what_is_listed_can_be_asked_for(
    provider: Any, gateway: Any, openai_env: Any
) -> None:
    said = {**CHAT_ANSWER, **MESSAGES_ANSWER, **GEMINI_ANSWER, "output": []}
    async with provider(Reply(body=said)) as up:
        environ = {f"{name}_API_KEY": "sk" for name in ("OPENAI", "ANTHROPIC", "GOOGLE")}
        environ |= {f"{name}_BASE_URL": up.base for name in ("OPENAI", "ANTHROPIC", "GOOGLE")}
        async with gateway(OWN.format(base=up.base), environ) as gw, gw.caller() as caller:
            listed = (await caller.get("/v1/models")).json()["data"]
            for model in listed:
                path = ASKED_AT[model["providers"][0]]
                path = path or f"/v1/models/{model['id']}:generateContent"
                answer = await caller.post(path, ask(model=model["id"], max_tokens=9))
                assert (model["id"], answer.status) == (model["id"], 200)
    assert {"my-team/llama:free", "smart"} < {model["id"] for model in listed}


@pytest.mark.parametrize("headers", [{}, ANTHROPIC_CALLER, GOOGLE_CALLER])
async def test_what_is_listed_can_be_looked_up(front: Any, headers: dict[str, str]) -> None:
    async with front() as f:
        listing = (await f.caller.get("/v1/models?limit=999&pageSize=999", **headers)).json()
        for model in listing.get("data") or listing["models"]:
            name = model.get("id") or model["name"].removeprefix("models/")
            for path in (f"/v1/models/{name}", f"/v1/models/{name.replace('/', '%2F')}"):
                assert (await f.caller.get(path, **headers)).json() == model


@pytest.mark.parametrize(
    ("path", "headers", "shape"),
    [
        ("/v1/models/claud-x", {}, "openai"),
        ("/v1/models/claud-x", ANTHROPIC_CALLER, "anthropic"),
        ("/v1beta/models/claud-x", {}, "google"),
    ],
)
async def test_an_unknown_model_is_not_found_among_the_listed(
    front: Any, path: str, headers: dict[str, str], shape: str
) -> None:
    async with front() as f:
        answer = await f.caller.get(path, **headers)
        assert (answer.status, told(answer)) == (404, (shape, "model_not_found"))


async def test_a_model_beyond_the_catalogue_can_be_looked_up(front: Any) -> None:
    async with front() as f:
        found = (await f.caller.get("/v1/models/openai/brand-new")).json()
        assert (found["id"], found["providers"]) == ("openai/brand-new", ["openai"])


# Health.


async def test_health_needs_no_key(front: Any) -> None:
    async with front(toml=LOCKED) as f:
        answer = await f.caller.get("/health")
        facts = answer.json()
        assert (answer.status, facts["status"]) == (200, "ok")
        assert (facts["providers"], facts["cooling_s"]) == (["openai", "anthropic", "google"], {})


async def test_health_has_a_head(front: Any) -> None:
    async with front() as f:
        f.caller.send(request_bytes("HEAD", "/health", None))
        answer = await f.caller.answer(bodiless=True)
        assert answer.status == 200 and int(answer.headers["content-length"]) > 10
        assert (await f.caller.get("/health")).status == 200


async def test_health_names_the_targets_that_rest(front: Any) -> None:
    async with front(Reply(status=401, body={"error": {"message": "no"}})) as f:
        await f.caller.post(CHAT, BODIES[CHAT])
        facts = (await f.caller.get("/health")).json()
        assert list(facts["cooling_s"]) == ["openai/gpt-4o"]


# The log.

CACHED = {
    **CHAT_ANSWER,
    "usage": {
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    },
}


async def test_a_request_s_line_has_all_its_facts(front: Any) -> None:
    async with front(Reply(body=CACHED)) as f:
        await f.caller.post(CHAT, ask(model="gpt-4o-mini"), x_bitrouter_request_id="r1")
        [line] = f.gateway.lines()
        assert line.pop("ttft_ms") <= line.pop("duration_ms")
        assert abs(line.pop("cost_usd") - (7 * 0.15 + 4 * 0.075 + 7 * 0.6) / 1e6) < 1e-9
        assert {name: line[name] for name in line if name != "ts"} == {
            "level": "info",
            "event": "request",
            "id": "r1",
            "caller": "local",
            "method": "POST",
            "path": CHAT,
            "status": 200,
            "model": "gpt-4o-mini",
            "stream": False,
            "target": "openai/gpt-4o-mini",
            "attempts": 1,
            "in": 11,
            "out": 7,
            "cached": 4,
        }


@pytest.mark.parametrize("streams", [False, True])
async def test_an_answer_without_usage_is_marked(front: Any, streams: bool) -> None:
    whole = Reply(body={"choices": CHAT_ANSWER["choices"]})
    events = stream(*CHAT_STREAM[:4], CHAT_STREAM[5])
    async with front(events if streams else whole) as f:
        await f.caller.post(CHAT, ask(stream=streams))
        [line] = f.gateway.lines()
        assert line["warnings"] == "usage_unknown" and "in" not in line


async def test_a_line_of_a_failure_says_why(front: Any) -> None:
    async with front(Reply(status=500, body={"error": {"message": "disk full"}})) as f:
        await f.caller.post(CHAT, BODIES[CHAT])
        [line] = f.gateway.lines()
        assert (line["status"], line["target"], line["attempts"]) == (500, "openai/gpt-4o", 1)
        assert "disk full" in line["error"] and line["duration_ms"] > 0


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (request_bytes("GET", "/nothing", None), 404),
        (request_bytes("GET", CHAT, None), 405),
        (request_bytes("POST", CHAT, b"{"), 400),
        (request_bytes("POST", CHAT, {"model": "no-such"}), 404),
        (request_bytes("POST", CHAT, b"{}", content_type="text/plain"), 415),
        (request_bytes("GET", "/health", None, host="evil.example"), 403),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
    ],
)
async def test_every_refusal_has_one_line(front: Any, raw: bytes, status: int) -> None:
    async with front() as f:
        f.caller.send(raw)
        answer = await f.caller.answer()
        [line] = f.gateway.lines()
        assert (answer.status, line["status"], bool(line["code"])) == (status, status, True)
        assert line["id"] == answer.headers["x-bitrouter-request-id"]


SECRETS = ("my-secret-prompt", "my-own-key", *ALL_KEYS)
TELLTALES: dict[str, Reply] = {
    "whole": Reply(body={**CHAT_ANSWER, "x": "my-secret-prompt"}),
    "stream": stream(*CHAT_STREAM),
    "a refusal": Reply(status=400, body={"error": {"message": f"bad key {OPENAI_KEY}"}}),
    "a failure": Reply(status=500, body={"error": {"message": "no"}}),
    "a page": Reply(status=502, body=f"<p>{OPENAI_KEY}</p>".encode()),
    "a broken stream": stream(*CHAT_STREAM[:2], ending="cut"),
    "silence": Reply(hangs=True),
}


@pytest.mark.parametrize("case", TELLTALES)
async def test_no_line_holds_a_key_or_a_prompt(front: Any, case: str) -> None:
    given = {"authorization": "Bearer my-own-key", "x-api-key": "my-own-key"}
    request = ask("my-secret-prompt", stream="stream" in case)
    async with front(TELLTALES[case]) as f:
        async with f.gateway.caller() as caller:
            caller.send(request_bytes("POST", f"{CHAT}?key=my-own-key", request, **given))
            await (until(lambda: f.up.seen) if case == "silence" else caller.answer())
        await until(f.gateway.lines)
        written = f.gateway.written.getvalue()
        assert [secret for secret in SECRETS if secret in written] == []


@pytest.mark.parametrize(
    "body",
    [
        "my-secret-prompt",
        ["my-secret-prompt"],
        {"model": ["my-secret-prompt"]},
        {"model": "echo/echo", "messages": "my-secret-prompt"},
        {"model": "echo/echo", "messages": [{"role": "user", "content": "my-secret-prompt"}]},
        b'{"messages": "my-secret-prompt',
    ],
    ids=["text", "list", "model", "messages", "echo", "cut"],
)
async def test_no_line_quotes_what_it_could_not_read(front: Any, body: Any) -> None:
    async with front() as f:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        await f.caller.post(CHAT, raw)
        assert len(f.gateway.lines()) == 1
        assert "my-secret-prompt" not in f.gateway.written.getvalue()


async def test_a_model_s_name_cannot_forge_a_header_or_a_line(front: Any) -> None:
    async with front() as f:
        answer = await f.caller.post(CHAT, ask(model="openai/m\r\nx-evil: 1\n{}"))
        assert answer.status == 200 and "x-evil" not in answer.headers
        assert len(f.gateway.written.getvalue().splitlines()) == len(f.gateway.lines())


# The built-in model.


@pytest.mark.parametrize("text", ["Hello, router!", "a  b\n c ", "\u00e9\u2028\U0001f600"])
async def test_echo_repeats_what_it_is_told(front: Any, text: str) -> None:
    async with front(keys=()) as f:
        chat = (await f.caller.post(CHAT, ask(text, "echo/echo"))).json()
        messages = (await f.caller.post(MESSAGES, ask(text, "echo/echo"))).json()
        said = (chat["choices"][0]["message"]["content"], messages["content"][0]["text"])
        assert said == (text, text)


async def test_echo_has_the_headers_of_any_answer(front: Any) -> None:
    async with front(keys=()) as f:
        headers = (await f.caller.post(CHAT, ask("Hi", "echo/echo"))).headers
        ours = [headers[f"x-bitrouter-{n}"] for n in ("provider", "model", "attempts", "cost-usd")]
        assert ours == ["echo", "echo", "1", "0"]


async def test_echo_streams_chat_word_by_word(front: Any) -> None:
    async with front(keys=()) as f:
        answer = await f.caller.post(CHAT, ask("one two three", "echo/echo", stream=True))
        *events, end = answer.events()
        deltas = [event["choices"][0]["delta"] for event in events]
        words = [delta["content"] for delta in deltas[1:-1]]
        assert [word.strip() for word in words] == ["one", "two", "three"]
        assert "".join(words) == "one two three"
        assert (deltas[0]["role"], events[-1]["choices"][0]["finish_reason"]) == (
            "assistant",
            "stop",
        )
        assert end == "[DONE]"


async def test_echo_tells_usage_in_a_stream_only_if_asked(front: Any) -> None:
    async with front(keys=()) as f:
        more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        answer = await f.caller.post(CHAT, ask("12345678", "echo/echo", **more))
        last = answer.events()[-2]
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 4)


async def test_echo_streams_messages_in_order(front: Any) -> None:
    async with front(keys=()) as f:
        answer = await f.caller.post(MESSAGES, ask("one two", "echo/echo", stream=True))
        kinds = [event["type"] for event in answer.events()]
        block = ["content_block_start", *["content_block_delta"] * 2, "content_block_stop"]
        assert kinds == ["message_start", *block, "message_delta", "message_stop"]
        assert answer.body.count(b"event: ") == len(kinds)


CALL = 'Please call weather {"city": "Oslo"} now'
CHAT_TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("streams", [False, True])
async def test_echo_calls_a_tool_in_chat(front: Any, streams: bool) -> None:
    async with front(keys=()) as f:
        request = ask(CALL, "echo/echo", stream=streams, tools=[CHAT_TOOL])
        answer = await f.caller.post(CHAT, request)
        choices = [event["choices"][0] for event in answer.events()[:-1]]
        choice = choices[0] if streams else answer.json()["choices"][0]
        if streams:
            deltas = [c["delta"]["tool_calls"][0] for c in choices if "tool_calls" in c["delta"]]
            deltas[0]["function"]["arguments"] = "".join(
                delta["function"]["arguments"] for delta in deltas
            )
            choice = {"message": {"tool_calls": deltas[:1]}, **choices[-1]}
        [call] = choice["message"]["tool_calls"]
        made = (call["type"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        assert made == ("function", "weather", {"city": "Oslo"})
        assert choice["finish_reason"] == "tool_calls"


async def test_echo_calls_a_tool_in_messages(front: Any) -> None:
    async with front(keys=()) as f:
        answer = await f.caller.post(MESSAGES, ask(CALL, "echo/echo", tools=[{"name": "weather"}]))
        body = answer.json()
        [block] = body["content"]
        assert (block["type"], block["name"], block["input"]) == (
            "tool_use",
            "weather",
            {"city": "Oslo"},
        )
        assert body["stop_reason"] == "tool_use"


async def test_echo_streams_a_tool_call_in_messages(front: Any) -> None:
    async with front(keys=()) as f:
        request = ask(CALL, "echo/echo", stream=True, tools=[{"name": "weather"}])
        events = (await f.caller.post(MESSAGES, request)).events()
        [block] = [e["content_block"] for e in events if e["type"] == "content_block_start"]
        text = "".join(e["delta"]["partial_json"] for e in events if "content_block_d" in e["type"])
        assert (block["name"], block["input"], json.loads(text)) == (
            "weather",
            {},
            {"city": "Oslo"},
        )
        assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_echo_calls_no_tool_that_was_not_offered(front: Any) -> None:
    async with front(keys=()) as f:
        answer = await f.caller.post(CHAT, ask(CALL, "echo/echo"))
        assert answer.json()["choices"][0]["message"]["content"] == CALL


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 3}, "s": {"enum": ["x", "y"]}, "o": {}},
    "required": ["n", "s"],
}


async def test_echo_fills_in_a_schema(front: Any) -> None:
    chat_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    async with front(keys=()) as f:
        chat = await f.caller.post(CHAT, ask("Hi", "echo/echo", response_format=chat_format))
        messages = await f.caller.post(MESSAGES, ask("Hi", "echo/echo", output_config=config))
        said = [chat.json()["choices"][0]["message"], messages.json()["content"][0]]
        texts = [json.loads(said[0]["content"]), json.loads(said[1]["text"])]
        assert texts == [{"n": 3, "s": "x"}] * 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_echo_says_where_it_answers(front: Any, path: str) -> None:
    async with front(keys=()) as f:
        answer = await f.caller.post(path, {"model": "echo/echo"})
        assert (answer.status, told(answer)[1]) == (501, "protocol_unsupported")
        assert MESSAGES in answer.json()["error"]["message"]


async def test_echo_refuses_an_empty_conversation(front: Any) -> None:
    async with front(keys=()) as f:
        answer = await f.caller.post(MESSAGES, {"model": "echo/echo", "messages": []})
        assert (answer.status, told(answer)) == (400, ("anthropic", "invalid_request"))


# Numbers, depths and names that go too far.

ENDLESS = {
    "limit": ("/v1/models?limit=", {"anthropic-version": "2023-06-01"}),
    "pageSize": ("/v1beta/models?pageSize=", {}),
    "pageToken": ("/v1beta/models?pageToken=", {}),
}


@pytest.mark.parametrize(("path", "headers"), ENDLESS.values(), ids=ENDLESS)
async def test_an_endless_number_is_none(front: Any, path: str, headers: dict[str, str]) -> None:
    async with front() as f:
        answer = await f.caller.get(path + "9" * 5000, **headers)
        assert answer.status == 200


async def test_json_is_read_or_refused_at_any_depth(front: Any) -> None:
    async def status(depth: int) -> int:
        nested = b"[" * depth + b"]" * depth
        raw = b'{"x": %b, "model": "openai/m", "messages": [], "y": 1, "x": {}}' % nested
        return int((await f.caller.post(CHAT, raw)).status)

    async with front() as f:
        passes, fails = 1, 100_000
        while fails - passes > 1:
            depth = (passes + fails) // 2
            found = await status(depth)
            assert found in (200, 400), depth
            passes, fails = (depth, fails) if found == 200 else (passes, depth)
        assert {await status(passes - i) for i in range(20)} <= {200, 400}


@pytest.mark.parametrize("model", ["..", ".", "openai/../m", "openai/./m", "../openai/m", "a/.."])
async def test_a_model_id_leads_nowhere_else(front: Any, model: str) -> None:
    async with front() as f:
        answer = await f.caller.post(CHAT, ask(model=model))
        assert (answer.status, answer.json()["error"]["param"], f.up.seen) == (400, "model", [])


@pytest.mark.parametrize("model", ["google/../m", "google%2F..%2Fm", "google/%2e%2e/m", ".."])
async def test_a_google_path_leads_nowhere_else(front: Any, model: str) -> None:
    async with front() as f:
        answer = await f.caller.post(f"/v1beta/models/{model}:generateContent", {"contents": []})
        assert (answer.status, f.up.seen) == (400, [])
