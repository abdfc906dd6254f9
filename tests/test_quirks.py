"""What single models take and refuse."""

from __future__ import annotations

from typing import Any

import pytest

from bitrouter import (
    ApiProtocol,
    Traits,
    may_prefer_responses,
    prefers_responses,
    traits_of,
)

CC, RE, ME, GC = ApiProtocol

# Claude by groups: its way of thinking, whether it can be told not to, whether it takes sampling,
# an order to call a tool, an answer begun for it, and a schema natively.
CLAUDES = [
    # model                       thinking    stop   sampling force  prefill schema
    ("claude-opus-5-5",           "adaptive", False, False,   False, False,  "native"),
    ("claude-sonnet-5-5",         "adaptive", True,  False,   False, False,  "native"),
    ("claude-haiku-5-5",          "adaptive", True,  False,   True,  False,  "native"),
    ("claude-fable-5-1",          "adaptive", False, False,   False, False,  "native"),
    ("claude-mythos-5-1",         "adaptive", False, False,   False, False,  "native"),
    ("claude-fable-5",            "adaptive", False, False,   True,  False,  "native"),
    ("claude-mythos-5",           "adaptive", False, False,   True,  False,  "native"),
    ("claude-mythos-preview",     "adaptive", False, False,   True,  False,  "native"),
    ("claude-opus-5",             "adaptive", True,  False,   True,  False,  "native"),
    ("claude-sonnet-5",           "adaptive", True,  False,   True,  False,  "native"),
    ("claude-opus-4-8",           "adaptive", True,  False,   True,  False,  "native"),
    ("claude-opus-4-7",           "adaptive", True,  False,   True,  False,  "native"),
    ("claude-opus-4-6",           "adaptive", True,  True,    True,  False,  "native"),
    ("claude-sonnet-4-6",         "adaptive", True,  True,    True,  False,  "native"),
    ("claude-opus-4-5",           "budget",   True,  True,    True,  True,   "native"),
    ("claude-sonnet-4-5",         "budget",   True,  True,    True,  True,   "native"),
    ("claude-haiku-4-5",          "budget",   True,  True,    True,  True,   "native"),
    ("claude-opus-4-1",           "budget",   True,  True,    True,  True,   "tool"),
    ("claude-sonnet-4",           "budget",   True,  True,    True,  True,   "tool"),
    ("claude-sonnet-4-20250514",  "budget",   True,  True,    True,  True,   "tool"),
    ("claude-3-7-sonnet-latest",  "budget",   True,  True,    True,  True,   "tool"),
    ("claude-3-5-haiku-20241022", "",         True,  True,    True,  True,   "tool"),
]  # fmt: skip


@pytest.mark.parametrize("row", CLAUDES, ids=[row[0] for row in CLAUDES])
def test_a_claude_takes_what_its_group_does(row: Any) -> None:
    model, thinking, *rest = row
    found = traits_of("anthropic", model, ME)
    flags = [found.can_stop_thinking, found.sampling, found.forced_tools, found.prefill]
    assert (found.thinking, *flags, found.schema) == (thinking, *rest)
    assert (found.vendor, found.official) == ("anthropic", True)


INLINE = [
    ("claude-opus-5-5", True),
    ("claude-opus-5", True),
    ("claude-opus-4-8", True),
    ("claude-opus-4-7", False),
    ("claude-sonnet-4-6", False),
    ("claude-haiku-4-5", False),
]


@pytest.mark.parametrize(("model", "inline"), INLINE)
def test_a_newer_opus_takes_system_messages_in_the_middle(model: str, inline: bool) -> None:
    assert traits_of("anthropic", model, ME).inline_system == inline


SPELLINGS = ["claude-opus-5.5", "Claude-Opus-5-5", "anthropic/claude-opus-5.5", "claude_opus_5_5"]
SPELLINGS += ["claude-opus-5-5-20261001"]


@pytest.mark.parametrize("spelt", SPELLINGS)
def test_a_model_is_known_however_its_id_is_spelt(spelt: str) -> None:
    assert not traits_of("anthropic", spelt, ME).forced_tools


MOST_OUTPUT = [("claude-opus-4-6", 128_000), ("claude-sonnet-4-5", 64_000), ("claude-unknown", 0)]


@pytest.mark.parametrize(("model", "tokens"), MOST_OUTPUT)
def test_how_much_a_claude_can_say_is_known(model: str, tokens: int) -> None:
    assert traits_of("anthropic", model, ME).max_output == tokens


LEVELS = ("minimal", "low", "medium", "high")
GEMINIS = [
    # model                    thinking levels                         stop   ids    schema
    ("gemini-3-pro-preview",   "level",  ("low", "medium", "high"),    True,  True,  "native"),
    ("gemini-3.1-pro",         "level",  ("low", "medium", "high"),    True,  True,  "native"),
    ("gemini-3-flash",         "level",  LEVELS, True, True, "native"),
    ("gemini-2.5-pro",         "budget", (),                           False, False, "native"),
    ("gemini-2.5-flash",       "budget", (),                           True,  False, "native"),
    ("gemini-2.5-flash-lite",  "budget", (),                           True,  False, "native"),
    ("gemini-2.0-flash",       "",       (),                           True,  False, "legacy"),
    ("gemini-1.5-pro",         "",       (),                           False, False, "legacy"),
]  # fmt: skip


@pytest.mark.parametrize("row", GEMINIS, ids=[row[0] for row in GEMINIS])
def test_a_gemini_takes_what_its_generation_does(row: Any) -> None:
    model, *rest = row
    found = traits_of("google", model, GC)
    assert [
        found.thinking,
        found.efforts,
        found.can_stop_thinking,
        found.call_ids,
        found.schema,
    ] == rest
    assert (found.vendor, found.official) == ("google", True)


def test_a_gemini_before_the_third_fetches_nothing() -> None:
    fetches = [traits_of("google", f"gemini-{n}-flash", GC).fetches_urls for n in ("2.5", "3")]
    assert fetches == [False, True]


OPENAIS = [
    # model            the levels that it knows begin and end with    sampling, stops on Chat
    ("gpt-4.1",        "",        "",      True),
    ("gpt-4o",         "",        "",      True),
    ("gpt-5-chat",     "",        "",      True),
    ("o3",             "low",     "high",  False),
    ("o4-mini",        "low",     "high",  False),
    ("gpt-5",          "minimal", "high",  False),
    ("gpt-5-mini",     "minimal", "high",  False),
    ("gpt-5.1",        "none",    "high",  False),
    ("gpt-5.4",        "none",    "xhigh", False),
    ("gpt-6",          "none",    "max",   False),
    ("gpt-6-astra",    "low",     "max",   False),
    ("gpt-oss-120b",   "low",     "high",  True),
]  # fmt: skip


@pytest.mark.parametrize(("model", "least", "most", "free"), OPENAIS)
def test_an_openai_model_takes_what_its_generation_does(
    model: str, least: str, most: str, free: bool
) -> None:
    found = traits_of("openai", model, CC)
    assert (found.efforts or ("",))[0] == least and (found.efforts or ("",))[-1] == most
    assert (found.sampling, found.stops) == (free, free)
    assert found.max_tokens_field == "max_completion_tokens"


def test_stop_sequences_are_no_matter_of_the_model_on_responses() -> None:
    assert traits_of("openai", "gpt-5", RE).stops  # it has none of its own there


WHERE = [
    # provider      model                       asked in  what is special there
    (
        "openai",
        "gpt-5",
        CC,
        {"vendor": "chat:openai", "official": True, "developer_role": True, "custom_tools": True},
    ),
    (
        "openai",
        "gpt-5",
        RE,
        {"vendor": "openai", "official": True, "developer_role": True, "custom_tools": True},
    ),
    ("azure", "gpt-5", RE, {"vendor": "openai", "official": True}),
    (
        "openrouter",
        "openai/gpt-5",
        CC,
        {
            "vendor": "chat:openrouter",
            "official": False,
            "developer_role": False,
            "custom_tools": False,
            "max_tokens_field": "max_completion_tokens",
        },
    ),
    (
        "groq",
        "openai/gpt-oss-120b",
        CC,
        {"official": False, "sampling": True, "max_tokens_field": "max_completion_tokens"},
    ),
    ("deepseek", "deepseek-chat", CC, {"echoes_reasoning": True, "max_tokens_field": "max_tokens"}),
    ("mistral", "mistral-large", CC, {"echoes_reasoning": False, "developer_role": False}),
    ("minimax", "MiniMax-M2", ME, {"vendor": "minimax", "official": False, "schema": "tool"}),
    ("aws-bedrock", "anthropic.claude-sonnet-4-5", ME, {"fetches_urls": False}),
    ("vertex", "claude-sonnet-4-5", ME, {"vendor": "anthropic", "fetches_urls": False}),
    ("ollama", "llava", CC, {"fetches_urls": False, "vendor": "chat:ollama"}),
    ("xai", "grok-4", RE, {"official": False, "custom_tools": True, "developer_role": False}),
]


@pytest.mark.parametrize(("provider", "model", "protocol", "wanted"), WHERE)
def test_a_model_takes_what_its_provider_lets_through(
    provider: str, model: str, protocol: ApiProtocol, wanted: dict[str, Any]
) -> None:
    found = traits_of(provider, model, protocol)._asdict()
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("protocol", ApiProtocol)
@pytest.mark.parametrize(
    "model", ["who-knows-1", "vendor/some-model:free", "", "acme-7b.Q4_K_M.gguf"]
)
def test_an_unknown_model_takes_everything(model: str, protocol: ApiProtocol) -> None:
    found, free = traits_of("somewhere", model, protocol), Traits()
    names = ["sampling", "stops", "forced_tools", "prefill", "can_stop_thinking", "call_ids"]
    names += ["fetches_urls", "many", "max_output"]
    assert [getattr(found, name) for name in names] == [getattr(free, name) for name in names]
    assert found.schema == "native"
    assert found.efforts == (() if protocol is not GC else LEVELS)


TOOLS = {"tools": [{"type": "function"}]}
CALM = {"reasoning_effort": "none"}
PREFERS = [
    # model                    asked in  the request    served on Responses
    ("gpt-5.4",                CC, TOOLS,        True),
    ("gpt-5.4-mini",           CC, TOOLS,        True),
    ("gpt-5.6",                CC, TOOLS,        True),
    ("gpt-6",                  CC, TOOLS,        True),
    ("openai/gpt-6",           CC, TOOLS,        True),
    ("GPT-6",                  CC, TOOLS,        True),
    ("gpt-6",                  CC, TOOLS | CALM, False),
    ("gpt-6-astra",            CC, TOOLS | CALM, True),
    ("gpt-6",                  CC, {},           False),
    ("gpt-6",                  CC, {"tools": []}, False),
    ("gpt-5.3",                CC, TOOLS,        False),
    ("gpt-5",                  CC, TOOLS,        False),
    ("gpt-4.1",                CC, TOOLS,        False),
    ("o3",                     CC, TOOLS,        False),
    ("o3-pro",                 CC, {},           True),
    ("gpt-5.2-pro",            CC, {},           True),
    ("gpt-6-pro",              CC, {},           True),
    ("gpt-5.2-codex",          CC, {},           True),
    ("gpt-5-codex",            CC, {},           True),
    ("codex-mini-latest",      CC, {},           True),
    ("o4-mini-deep-research",  CC, {},           True),
    ("gpt-5",                  ME, {},           True),
    ("o3",                     GC, {},           True),
    ("gpt-5-chat-latest",      ME, {},           False),
    ("gpt-4.1",                ME, TOOLS,        False),
    ("gpt-4o",                 GC, TOOLS,        False),
    ("gemini-3-pro",           CC, TOOLS,        False),
    ("my-pro",                 CC, TOOLS,        False),
]  # fmt: skip


@pytest.mark.parametrize(("model", "asked_in", "body", "wanted"), PREFERS)
def test_a_model_is_asked_where_it_does_what_is_asked(
    model: str, asked_in: ApiProtocol, body: dict[str, Any], wanted: bool
) -> None:
    assert prefers_responses(model, asked_in, body) == wanted
    assert may_prefer_responses(model) >= wanted  # whoever does not may not either


def test_most_models_need_no_second_look() -> None:
    models = ("gpt-4.1", "gpt-4o-mini", "claude-opus-5", "gemini-3-pro", "llama-4", "")
    assert not any(may_prefer_responses(model) for model in models)
