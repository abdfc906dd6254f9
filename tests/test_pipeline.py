"""One request's life: what goes up, what comes back, what is written down."""

from __future__ import annotations

from typing import Any

from support import CHAT_ANSWER, CHAT_STREAM, Reply, ask, stream


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
