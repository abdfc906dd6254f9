"""Where a model id leads: every form of it, who is asked first, presets, variants and
wishes, and what is said when nobody is left."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from support import router_of

import bitrouter
from bitrouter import (
    CHAT_OP,
    GEMINI_VERBS,
    MESSAGES_OP,
    NO_WISHES,
    OPERATIONS,
    PROVIDERS,
    RESPONSES_OP,
    SORTS,
    ApiProtocol,
    BadRequest,
    BitrouterError,
    Breaker,
    Health,
    KeyMissing,
    Leg,
    NotFound,
    Operation,
    Price,
    ProtocolUnsupported,
    Route,
    Router,
    Target,
    Unset,
    Wishes,
    active_providers,
    choose,
    narrowed,
    parse_config,
    wishes_in,
)

GOOGLE_OP = GEMINI_VERBS["generateContent"]
COMPLETIONS_OP, EMBEDDINGS_OP = OPERATIONS["/completions"], OPERATIONS["/embeddings"]
OPS = (CHAT_OP, RESPONSES_OP, MESSAGES_OP, GOOGLE_OP)
VARIABLES = {ident: provider.env[0] for ident, provider in PROVIDERS.items()}

CLUSTER = """
[providers.mine]
api_base = "http://10.0.0.5:8000/v1"
models = [
  {id = "my-team/llama", provider_model_id = "llama-3.1-8b", pricing = {input = 1, output = 2}},
  {id = "gpt-4o"},
]
"""
SMART = """
[models.smart]
endpoints = [
  {provider = "anthropic", service_id = "claude-sonnet-4-6"},
  {provider = "gemini", service_id = "gemini-3.8-flash"},
  {provider = "openai", service_id = "gpt-4o"},
  {provider = "openai", service_id = "gpt-4o-mini"},
]
"""


def keys(*idents: str) -> dict[str, str]:
    """An environment in which these providers have a key."""
    return {VARIABLES[ident]: f"sk-{ident}" for ident in idents}


def router(toml: str = "", *idents: str, **environ: str) -> Router:
    return router_of(toml, {**keys(*idents), **environ})


def chain(route: Route) -> list[str]:
    """A chain as `provider model`, in order."""
    return [f"{target.name} {target.model}" for target in route.chain]


def resolved(model: str, *idents: str, op: Operation = CHAT_OP, toml: str = "") -> list[str]:
    return chain(router(toml, *idents).resolve(model, op))


# fmt: off
FORMS = [
    # model id                        keys                       provider and its own id
    ("openai/gpt-4o-mini",            ["openai"],                ["openai gpt-4o-mini"]),
    ("openai/GPT-4o-Mini",            ["openai"],                ["openai gpt-4o-mini"]),
    ("openai/gpt-99",                 ["openai"],                ["openai gpt-99"]),
    ("openai/gpt-4o-2024-08-06",      ["openai"],                ["openai gpt-4o-2024-08-06"]),
    ("openai/ft:gpt-4o:acme::1a",     ["openai"],                ["openai ft:gpt-4o:acme::1a"]),
    ("openai:gpt-4o-mini",            ["openai"],                ["openai gpt-4o-mini"]),
    ("openai:ft:gpt-4o:acme::1a",     ["openai"],                ["openai ft:gpt-4o:acme::1a"]),
    ("openai:some/thing",             ["openai"],                ["openai some/thing"]),
    ("openai:gpt-4o",                 ["openai", "openrouter"],  ["openai gpt-4o"]),
    ("gemini/gemini-3.8-flash",       ["google"],                ["google gemini-3.8-flash"]),
    ("google/gemini-99",              ["google"],                ["google gemini-99"]),
    ("models/gemini-3.8-flash",       ["google"],                ["google gemini-3.8-flash"]),
    ("models/gemini-99-ultra",        ["google"],                ["google gemini-99-ultra"]),
    ("xai/grok-4.5",                  ["xai"],                   ["xai grok-4.5"]),
    ("x-ai/grok-4.5",                 ["xai"],                   ["xai grok-4.5"]),
    ("z-ai/glm-5.1",                  ["zai"],                   ["zai glm-5.1"]),
    ("qwen/qwen3.7-max",              ["alibaba"],               ["alibaba qwen3.7-max"]),
    ("grok-4.20",                     ["xai"],       ["xai grok-4.20-0309-non-reasoning"]),
    ("openrouter/meta-llama/llama-4", ["openrouter"],            ["openrouter meta-llama/llama-4"]),
    ("openrouter/x/y:free",           ["openrouter"],            ["openrouter x/y:free"]),
    ("openrouter:x/y:free",           ["openrouter"],            ["openrouter x/y:free"]),
    ("openrouter/gpt-4o",             ["openrouter", "openai"],  ["openrouter gpt-4o"]),
    ("openrouter/openai/gpt-4o",      ["openrouter", "openai"],  ["openrouter openai/gpt-4o"]),
    ("groq/openai/gpt-oss-120b",      ["groq", "openrouter"],    ["groq openai/gpt-oss-120b"]),
    ("groq/some/new:thing",           ["groq"],                  ["groq some/new:thing"]),
    ("together_ai/a/b",               ["together"],              ["together a/b"]),
    ("meta/l-4:free",                 ["openrouter"],            ["openrouter meta/l-4:free"]),
    ("gpt-4o-mini",                   ["openai"],                ["openai gpt-4o-mini"]),
    ("GPT-4o-mini",                   ["openai"],                ["openai gpt-4o-mini"]),
    ("gpt-4o-2024-08-06",             ["openai"],                ["openai gpt-4o-2024-08-06"]),
    ("gpt-99-turbo",                  ["openai"],                ["openai gpt-99-turbo"]),
    ("ft:gpt-4o:acme::1a",            ["openai"],                ["openai ft:gpt-4o:acme::1a"]),
    ("grok-99",                       ["xai"],                   ["xai grok-99"]),
    ("azure/my-deployment",           ["azure"],                 ["azure my-deployment"]),
]
CLAUDES = [
    # what the caller writes                    what Anthropic is asked for
    ("claude-sonnet-4.6",                       "claude-sonnet-4-6"),
    ("claude-sonnet-4-6",                       "claude-sonnet-4-6"),
    ("anthropic/claude-sonnet-4.6",             "claude-sonnet-4-6"),
    ("anthropic/Claude-Sonnet-4-6",             "claude-sonnet-4-6"),
    ("claude-sonnet-4-5-20250929",              "claude-sonnet-4-5-20250929"),
    ("anthropic/claude-sonnet-4-5-20250929",    "claude-sonnet-4-5-20250929"),
    ("claude-next-99",                          "claude-next-99"),
    ("anthropic:claude-sonnet-4-6",             "claude-sonnet-4-6"),
    ("anthropic:claude-sonnet-4.6",             "claude-sonnet-4.6"),
    ("anthropic:Anything at all",               "Anything at all"),
]
# fmt: on


@pytest.mark.parametrize(("model", "idents", "wanted"), FORMS)
def test_a_model_id_leads_to_its_provider(model: str, idents: list[str], wanted: list[str]) -> None:
    assert chain(router("", *idents, AZURE_OPENAI_RESOURCE="r").resolve(model, CHAT_OP)) == wanted


@pytest.mark.parametrize(("model", "own"), CLAUDES)
def test_claude_is_known_by_dots_dashes_and_dates(model: str, own: str) -> None:
    assert resolved(model, "anthropic", op=MESSAGES_OP) == [f"anthropic {own}"]


# fmt: off
ORDERS = [
    # the lab's own provider, then those who carry it, then gateways, then those who take any id
    ("openai/gpt-5.4", ["bitrouter", "azure", "openrouter", "openai"],
     ["openai gpt-5.4", "azure gpt-5.4", "bitrouter openai/gpt-5.4", "openrouter openai/gpt-5.4"]),
    ("gpt-5.4", ["openrouter", "azure"], ["azure gpt-5.4", "openrouter openai/gpt-5.4"]),
    ("openai/gpt-4o-mini", ["openrouter"], ["openrouter openai/gpt-4o-mini"]),
    ("openai/gpt-99", ["bitrouter", "openrouter"],
     ["openrouter openai/gpt-99", "bitrouter openai/gpt-99"]),
    ("anthropic/claude-sonnet-4-6", ["openrouter"], ["openrouter anthropic/claude-sonnet-4.6"]),
    ("claude-sonnet-4-5-20250929", ["openrouter"], ["openrouter anthropic/claude-sonnet-4.5"]),
    ("xai/grok-4.5", ["openrouter"], ["openrouter x-ai/grok-4.5"]),
    ("zai/glm-5.1", ["atlascloud", "chutes", "fireworks", "zai"],
     ["zai glm-5.1", "chutes zai-org/GLM-5.1-TEE",
      "fireworks accounts/fireworks/models/glm-5p1", "atlascloud zai-org/glm-5.1"]),
    ("openai/gpt-oss-120b", ["groq", "cerebras", "deepinfra"],
     ["cerebras gpt-oss-120b", "deepinfra openai/gpt-oss-120b", "groq openai/gpt-oss-120b"]),
]
# fmt: on


@pytest.mark.parametrize(("model", "idents", "wanted"), ORDERS)
def test_others_who_carry_a_model_come_after_its_own_provider(
    model: str, idents: list[str], wanted: list[str]
) -> None:
    environ = {"AZURE_OPENAI_RESOURCE": "r"}
    assert chain(router("", *idents, **environ).resolve(model, CHAT_OP)) == wanted


def test_every_target_has_a_reason_and_the_others_are_accounted_for() -> None:
    route = router("", "openai", "openrouter").resolve("openai/gpt-5.4", CHAT_OP)
    assert len(route.reasons) == len(route.chain) == 2
    assert "bitrouter: BITROUTER_API_KEY is not set" in route.left_out
    assert not any("openai" in left for left in route.left_out)


def test_who_does_not_speak_the_protocol_is_asked_in_its_own() -> None:
    route = router("", "anthropic", "openrouter").resolve("claude-sonnet-5", CHAT_OP)
    assert [(t.provider, t.protocol) for t in route.chain] == [
        ("anthropic", ApiProtocol.MESSAGES),
        ("openrouter", ApiProtocol.CHAT_COMPLETIONS),
    ]


def test_who_has_nothing_of_the_kind_is_left_out_and_says_what_it_speaks() -> None:
    route = router("", "anthropic", "openrouter").resolve("claude-sonnet-5", COMPLETIONS_OP)
    assert chain(route) == ["openrouter anthropic/claude-sonnet-5"]
    assert "anthropic: speaks messages" in route.left_out


def test_a_subscription_is_never_used_unless_it_is_named() -> None:
    plans = [ident for ident, provider in PROVIDERS.items() if provider.kind == "plan"]
    ours = router("", *plans)
    for model in bitrouter.catalogue():
        with pytest.raises((KeyMissing, NotFound)):
            ours.resolve(model, CHAT_OP)


@pytest.mark.parametrize("ident", PROVIDERS)
def test_every_provider_takes_ids_that_nobody_knows(ident: str) -> None:
    ours = router("", ident, AZURE_OPENAI_RESOURCE="r")
    [op] = [op for op in OPS if op.protocol == next(iter(PROVIDERS[ident].bases))]
    for model in (f"{ident}/what-ever-9", f"{ident}:what-ever-9"):
        first = ours.resolve(model, op).chain[0]
        assert (first.provider, first.model, first.price) == (
            ident,
            "what-ever-9",
            bitrouter.FREE if PROVIDERS[ident].kind == "local" else Price(),
        )


def test_a_virtual_model_is_its_endpoints_in_their_order() -> None:
    wanted = ["google gemini-3.8-flash", "openai gpt-4o", "openai gpt-4o-mini"]
    assert resolved("smart", "openai", "google", toml=SMART) == wanted


def test_a_virtual_model_goes_to_nobody_else() -> None:
    assert resolved("smart", "openrouter", "openai", toml=SMART) == [
        "openai gpt-4o",
        "openai gpt-4o-mini",
    ]


def test_a_virtual_model_comes_before_the_catalogue() -> None:
    toml = SMART.replace("smart", "'openai/gpt-4o'")
    assert resolved("openai/gpt-4o", "google", "openai", toml=toml)[0] == "google gemini-3.8-flash"


def test_a_declared_model_goes_by_the_providers_own_name_for_it() -> None:
    assert resolved("my-team/llama", toml=CLUSTER) == ["mine llama-3.1-8b"]
    assert resolved("mine/my-team/llama", toml=CLUSTER) == ["mine llama-3.1-8b"]
    assert resolved("mine:my-team/llama", toml=CLUSTER) == ["mine llama-3.1-8b"]


def test_a_declared_model_costs_what_the_file_says() -> None:
    [target] = router(CLUSTER).resolve("my-team/llama", CHAT_OP).chain
    assert target.price == Price(1.0, 2.0)


def test_who_declares_a_model_comes_first() -> None:
    assert resolved("gpt-4o", "openai", toml=CLUSTER) == ["mine gpt-4o", "openai gpt-4o"]


def test_a_model_that_only_looks_like_a_labs_stays_where_it_is_declared() -> None:
    toml = CLUSTER.replace('"gpt-4o"', '"deepseek-r1:8b"')
    assert resolved("deepseek-r1:8b", "deepseek", "openrouter", toml=toml) == [
        "mine deepseek-r1:8b"
    ]


def test_a_virtual_model_may_name_a_declared_one() -> None:
    toml = CLUSTER + "[models.m]\nendpoints = [{provider = 'mine', service_id = 'my-team/llama'}]"
    assert resolved("m", toml=toml) == ["mine llama-3.1-8b"]


def test_accounts_stand_side_by_side_in_the_chain() -> None:
    ours = router("", OPENAI_API_KEY="k1,k2", OPENROUTER_API_KEY="k3")
    route = ours.resolve("openai/gpt-4o", CHAT_OP)
    assert [t.name for t in route.chain] == ["openai:1", "openai:2", "openrouter"]
    assert [t.secret.reveal() for t in route.chain] == ["k1", "k2", "k3"]


@pytest.mark.parametrize("op", [CHAT_OP, MESSAGES_OP])
def test_echo_answers_by_its_name(op: Operation) -> None:
    [target] = router().resolve("echo/echo", op).chain
    assert (target.provider, target.model, target.protocol) == ("echo", "echo", op.protocol)
    assert target.price == bitrouter.FREE


@pytest.mark.parametrize("model", ["echo", "echo:echo", "echo/other", "echo/echo/echo"])
def test_echo_answers_to_nothing_but_its_name(model: str) -> None:
    with pytest.raises(NotFound):
        router("", "openai", "anthropic").resolve(model, CHAT_OP)


@pytest.mark.parametrize("path", ["/completions", "/embeddings", "/moderations"])
def test_echo_says_what_it_does_not_do(path: str) -> None:
    with pytest.raises(ProtocolUnsupported, match=r"/v1/chat/completions, /v1/responses"):
        router().resolve("echo/echo", OPERATIONS[path])


# fmt: off
MISSING = [
    # model id                    the variable to set          provider
    ("openai/gpt-4o-mini",        "OPENAI_API_KEY",            "openai"),
    ("gpt-4o-mini",               "OPENAI_API_KEY",            "openai"),
    ("openai:gpt-99",             "OPENAI_API_KEY",            "openai"),
    ("gemini-3.8-flash",          "GEMINI_API_KEY",            "google"),
    ("claude-sonnet-4-6",         "ANTHROPIC_API_KEY",         "anthropic"),
    ("openrouter/a/b",            "OPENROUTER_API_KEY",        "openrouter"),
    ("groq/x",                    "GROQ_API_KEY",              "groq"),
    ("zai_coding_plan/glm-5.1",   "ZAI_CODING_PLAN_API_KEY",   "zai_coding_plan"),
]
# fmt: on


@pytest.mark.parametrize(("model", "variable", "provider"), MISSING)
def test_a_missing_key_is_named(model: str, variable: str, provider: str) -> None:
    with pytest.raises(KeyMissing, match=f"set {variable} ") as found:
        router("", "cohere").resolve(model, CHAT_OP)
    assert found.value.extra == {"provider": provider, "env": variable}
    assert (found.value.param, found.value.code) == ("model", "provider_key_missing")
    assert "configured now: cohere" in found.value.message


# fmt: off
TYPOS = [
    # model id               what was meant
    ("claud-sonnet-4.6",     "anthropic/claude-sonnet-4.6"),
    ("antropic/claude-sonnet-4.6", "anthropic/claude-sonnet-4.6"),
    ("smrt",                 "smart"),
    ("my-team/lama",         "my-team/llama"),
]
# fmt: on


@pytest.mark.parametrize(("model", "meant"), TYPOS)
def test_a_model_that_nobody_serves_has_near_misses(model: str, meant: str) -> None:
    with pytest.raises(NotFound, match=f"did you mean .*{meant}") as found:
        router(CLUSTER + SMART, "openai").resolve(model, CHAT_OP)
    assert (found.value.param, found.value.code) == ("model", "model_not_found")


def test_an_absurd_model_id_is_shown_safely_and_in_short() -> None:
    with pytest.raises(NotFound) as found:
        router("", "openai").resolve("\x1b[31m\r\n" + "x" * 10_000, CHAT_OP)
    assert found.value.message.isprintable() and len(found.value.message) < 500


# fmt: off
UNSPOKEN = [
    # model id                 key           asked in        what would work
    ("claude-sonnet-5",        "anthropic",  COMPLETIONS_OP, "POST /v1/messages (anthropic)"),
    ("gemini-3.8-flash",       "vertex",     COMPLETIONS_OP,
     "POST /v1beta/models/{model}:generateContent (vertex)"),
    ("claude-sonnet-5",        "anthropic",  EMBEDDINGS_OP,  "POST /v1/messages (anthropic)"),
]
# fmt: on


@pytest.mark.parametrize(("model", "ident", "op", "works"), UNSPOKEN)
def test_what_nobody_can_translate_names_what_would_work(
    model: str, ident: str, op: Operation, works: str
) -> None:
    with pytest.raises(ProtocolUnsupported) as found:
        router("", ident).resolve(model.replace("gemini", "vertex:gemini"), op)
    assert works in found.value.message and (found.value.status, found.value.param) == (
        501,
        "model",
    )


def test_nobody_is_asked_in_a_protocol_that_the_file_rules_out() -> None:
    toml = "[providers.openai]\napi_protocol = 'chat_completions'"
    [target] = router(toml, "openai").resolve("openai/gpt-4o", RESPONSES_OP).chain
    assert target.protocol is ApiProtocol.CHAT_COMPLETIONS


def test_a_models_own_protocol_comes_before_its_providers() -> None:
    toml = """[providers.mine]
        api_base = "http://10.0.0.5/v1"
        api_protocol = "chat_completions"
        models = [{id = "a", api_protocol = "messages"}, {id = "b"}]"""
    assert resolved("a", toml=toml, op=MESSAGES_OP) == ["mine a"]
    assert resolved("b", toml=toml) == ["mine b"]
    [target] = router(toml).resolve("a", CHAT_OP).chain
    assert target.protocol is ApiProtocol.MESSAGES


@pytest.mark.parametrize("ident", PROVIDERS)
def test_what_is_listed_can_be_asked_for(ident: str) -> None:
    ours = router(CLUSTER + SMART, ident, AZURE_OPENAI_RESOURCE="r")
    for listed in ours.listing():
        assert any(resolves(ours, listed.id, op, listed.providers) for op in OPS)


def resolves(ours: Router, model: str, op: Operation, providers: tuple[str, ...]) -> bool:
    """Whether a model can be had in a protocol, first of all from who is said to serve it."""
    try:
        return ours.resolve(model, op).chain[0].provider in providers
    except ProtocolUnsupported:
        return False


def test_the_listing_holds_what_is_on_and_nothing_else() -> None:
    listed = {one.id: one.providers for one in router(CLUSTER + SMART, "openai").listing()}
    assert listed["openai/gpt-4o-mini"] == ("openai",)
    assert listed["my-team/llama"] == ("mine",) and listed["smart"] == ("openai",)
    assert listed["echo/echo"] == ("echo",)
    assert not any(ident.startswith("anthropic/") for ident in listed)


def test_the_listing_is_sorted_and_leaves_out_subscriptions() -> None:
    ids = [one.id for one in router("", "zai_coding_plan", "openai").listing()]
    assert ids == sorted(ids) and not any(ident.startswith("z-ai/") for ident in ids)


def test_nothing_is_listed_without_keys_but_the_built_in_model() -> None:
    assert [one.id for one in router(SMART).listing()] == ["echo/echo"]


# fmt: off
HEADS = [
    # provider       asked in       the line that carries the key
    ("openai",       CHAT_OP,       "authorization: Bearer sk-openai"),
    ("openai",       RESPONSES_OP,  "authorization: Bearer sk-openai"),
    ("anthropic",    MESSAGES_OP,   "x-api-key: sk-anthropic"),
    ("google",       GOOGLE_OP,     "x-goog-api-key: sk-google"),
    ("google",       CHAT_OP,       "authorization: Bearer sk-google"),
    ("vertex",       GOOGLE_OP,     "x-goog-api-key: sk-vertex"),
    ("openrouter",   CHAT_OP,       "authorization: Bearer sk-openrouter"),
    ("openrouter",   MESSAGES_OP,   "authorization: Bearer sk-openrouter"),
    ("deepseek",     CHAT_OP,       "authorization: Bearer sk-deepseek"),
    ("deepseek",     MESSAGES_OP,   "x-api-key: sk-deepseek"),
    ("minimax",      MESSAGES_OP,   "x-api-key: sk-minimax"),
    ("mine",         CHAT_OP,       "authorization: Bearer sk-mine"),
    ("mine",         MESSAGES_OP,   "x-api-key: sk-mine"),
    ("mine",         GOOGLE_OP,     "x-goog-api-key: sk-mine"),
]
MINE = """
[providers.mine]
api_base = "https://mine.example/v1"
api_key = "sk-mine"
api_protocol = ["chat_completions", "messages", "generate_content"]
"""
# fmt: on


@pytest.mark.parametrize(("ident", "op", "line"), HEADS)
def test_each_protocol_carries_the_key_in_its_own_header(
    ident: str, op: Operation, line: str
) -> None:
    ours = router(MINE, *({ident} - {"mine"}))
    target = ours.resolve(f"{ident}:m", op).chain[0]
    lines = target.head.reveal().split("\r\n")
    assert [one for one in lines if "sk-" in one] == [line]


def test_the_head_names_the_host_and_the_headers_of_the_file() -> None:
    toml = "[providers.openai]\napi_base = 'https://p.example:8443/v1'\nextra_headers = {X-A = 'b'}"
    [target] = router(toml, "openai").resolve("openai:m", CHAT_OP).chain
    assert target.head.reveal() == (
        "host: p.example:8443\r\nx-a: b\r\nauthorization: Bearer sk-openai\r\n"
    )


def test_a_server_without_a_key_is_sent_none() -> None:
    [target] = router(CLUSTER).resolve("mine/x", CHAT_OP).chain
    assert target.head.reveal() == "host: 10.0.0.5:8000\r\n"


@pytest.mark.parametrize("show", [repr, str, "{}".format, lambda route: repr(vars_of(route))])
def test_no_key_shows_in_a_route(show: Any) -> None:
    ours = router("", OPENAI_API_KEY="sk-a-very-long-secret-key-1,sk-short", ANTHROPIC_API_KEY="k")
    route = ours.resolve("openai/gpt-4o", CHAT_OP)
    for text in (show(route), show(route.chain[0]), repr(ours.active)):
        assert "sk-a-very" not in text and "sk-short" not in text


def vars_of(thing: Any) -> list[Any]:
    """Every attribute of a thing, slots or not."""
    return [getattr(thing, name) for name in dir(thing) if not name.startswith("__")]


def test_a_route_is_remembered() -> None:
    ours = router("", "openai")
    assert ours.resolve("openai/gpt-4o", CHAT_OP) is ours.resolve("openai/gpt-4o", CHAT_OP)


def test_what_is_remembered_is_bounded() -> None:
    ours = router("", "openai")
    for n in range(bitrouter._MAX_REMEMBERED + 10):
        ours.resolve(f"openai:{n}", CHAT_OP)
    assert len(ours._remembered) <= bitrouter._MAX_REMEMBERED


def test_a_remembered_refusal_does_not_gather_tracebacks() -> None:
    ours = router("", "openai")
    depths = []
    for _ in range(3):
        with pytest.raises(NotFound) as found:
            ours.resolve("no-such-model", CHAT_OP)
        depths.append(len(found.traceback))
    assert depths[1] == depths[2]


# --- servers that were found on this machine, and that nobody named

LISTS = ["openai/gpt-4o-mini", "gpt-4o-mini", "us/own"]


def with_found(*idents: str) -> Router:
    """A router for which a local server was found that lists all of LISTS."""
    configured = active_providers(parse_config("", {}).config, keys(*idents))[0]
    facts = PROVIDERS["vllm"]
    account = bitrouter.Account("", bitrouter.Secret(""), dict(facts.bases))
    models = tuple(bitrouter.DeclaredModel(ident) for ident in LISTS)
    found = bitrouter.ActiveProvider(facts, (account,), "found", models=models, found=True)
    return Router(parse_config("", {}).config, {"vllm": found, **configured})


@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "gpt-4o-mini"])
def test_a_server_that_was_found_comes_after_the_lab_s_own(model: str) -> None:
    route = with_found("openai").resolve(model, CHAT_OP)
    assert chain(route) == ["openai gpt-4o-mini", f"vllm {model}"]


@pytest.mark.parametrize("model", LISTS)
def test_a_server_that_was_found_serves_what_nobody_else_does(model: str) -> None:
    assert chain(with_found("anthropic").resolve(model, CHAT_OP)) == [f"vllm {model}"]


# --- a fleet with presets, variants and virtual models

FLEET = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
tags = ["eu", "quick"]
params = {seed = 7}
models = [{id = "m", pricing = {input = 5, output = 5}}, {id = "only-aa"}]
[providers.bb]
api_base = "http://10.0.0.2/v1"
tags = ["eu"]
models = [
  {id = "m", provider_model_id = "m-of-bb", pricing = {input = 1, output = 9}},
  {id = "odd:cost"},
]
[providers.cc]
api_base = "http://10.0.0.3/v1"
models = [{id = "m"}, {id = "n", pricing = {input = 2, output = 2}}]

[presets.main]
model = "m"
system_prompt = "Main."
params = {temperature = 0.5, seed = 1}
routing = {sort = "latency", ignore = ["cc"]}
[presets.bare]
system_prompt = "Bare."
system_mode = "prepend"
[presets.inner]
model = "n:throughput"
params = {seed = 2, top_p = 0.5}
system_prompt = "Inner."
[presets.plain]
model = "only-aa"
[presets.chain]
model = "m:cheap"
params = {user = "chain"}
routing = {only = ["aa", "bb"]}
fallbacks = ["cc:n", "@inner", "@plain"]
[presets.drawn]
params = {user = "drawn", seed = 3}
candidates = [
  {model = "m:cost", weight = 3}, {preset = "inner"}, {model = "only-aa", weight = 0},
]
fallbacks = ["cc:other"]

[variants.eu.routing]
require_tags = ["eu"]
[variants.cheap.routing]
sort = "floor"
max_price = {input = 2}
[variants.not-bb.routing]
ignore = ["bb"]
[variants.cc-first.routing]
order = ["cc", "bb"]
[variants.pinned.routing]
only = ["bb"]
allow_fallbacks = false
[variants."v2".routing]
sort = "price"

[models.declared]
endpoints = [{provider = "cc", service_id = "m"}, {provider = "aa", service_id = "m"}]
[models.ranked]
strategy = "cascade"
endpoints = [{provider = "cc", service_id = "m"}, {provider = "aa", service_id = "m"}]
[models.shared]
strategy = "balance"
params = {user = "shared"}
endpoints = [
  {provider = "aa", service_id = "m", name = "first", weight = 3},
  {provider = "bb", service_id = "m", weight = 0.5},
]
[models."by-name:latency"]
endpoints = [{provider = "cc", service_id = "n"}]
"""


def routed(toml: str = FLEET, name: str = "bitrouter.toml", **environ: str) -> Router:
    return router_of(toml, environ, name)


def ask(model: str | tuple[str, ...], wishes: Wishes = NO_WISHES, **environ: str) -> Route:
    return routed(**environ).resolve(model, CHAT_OP, wishes)


def refusal(
    router: Router, model: str | tuple[str, ...], wishes: Wishes = NO_WISHES
) -> BitrouterError:
    with pytest.raises(BitrouterError) as refused:
        router.resolve(model, CHAT_OP, wishes)
    return refused.value


def place(target: Target) -> str:
    return f"{target.provider}:{target.model}"


def who(route: Route | Leg) -> list[str]:
    return [place(t) for t in (route.chain if isinstance(route, Route) else route.targets)]


# --- the grammar of presets

MAIN = {"temperature": 0.5, "seed": 1}
# fmt: off
PRESETS: list[tuple[str, list[str], str, str, dict[str, Any]]] = [
    # asked for              chain                    order         system    params of the first
    ("@main",                ["aa:m", "bb:m-of-bb"],  "latency",    "Main.",  MAIN),
    ("@main:cost",           ["aa:m", "bb:m-of-bb"],  "cost",       "Main.",  MAIN),
    ("@main:floor",          ["aa:m", "bb:m-of-bb"],  "cost",       "Main.",  MAIN),
    ("@main:nitro",          ["aa:m", "bb:m-of-bb"],  "throughput", "Main.",  MAIN),
    ("@main:balanced",       ["aa:m", "bb:m-of-bb"],  "balanced",   "Main.",  MAIN),
    ("@main:not-bb",         ["aa:m"],                "latency",    "Main.",  MAIN),
    ("@main:cheap",          ["bb:m-of-bb"],          "cost",       "Main.",  MAIN),
    ("@main/only-aa",        ["aa:only-aa"],          "latency",    "Main.",  MAIN),
    ("@main/only-aa:cost",   ["aa:only-aa"],          "cost",       "Main.",  MAIN),
    ("@main/aa/new/one",     ["aa:new/one"],          "latency",    "Main.",  MAIN),
    ("@main/bb:new:free",    ["bb:new:free"],         "latency",    "Main.",  MAIN),
    ("@main/bb:new:free:v2", ["bb:new:free"],         "cost",       "Main.",  MAIN),
    ("@main/bb:cost",        ["bb:cost"],             "latency",    "Main.",  MAIN),
    ("@main/bb:m",           ["bb:m-of-bb"],          "latency",    "Main.",  MAIN),
    ("@main/odd:cost",       ["bb:odd:cost"],         "latency",    "Main.",  MAIN),
    ("@main/odd:cost:cost",  ["bb:odd:cost"],         "cost",       "Main.",  MAIN),
    ("@main/declared:eu",    ["aa:m"],                "declared",   "Main.",  MAIN),
    ("@bare/cc/n",           ["cc:n"],                "balanced",   "Bare.",  {}),
    ("@bare/cc/n:latency",   ["cc:n"],                "latency",    "Bare.",  {}),
    ("@inner",               ["cc:n"],                "throughput", "Inner.", {"seed": 2,
                                                                               "top_p": 0.5}),
    ("@inner:latency",       ["cc:n"],                "latency",    "Inner.", {"seed": 2,
                                                                               "top_p": 0.5}),
    ("@plain",               ["aa:only-aa"],          "balanced",   "",       {"seed": 7}),
]
# fmt: on


@pytest.mark.parametrize(
    ("asked", "chain", "order", "system", "params"), PRESETS, ids=[row[0] for row in PRESETS]
)
def test_each_form_of_a_preset_leads_to_its_targets_and_shapes_them(
    asked: str, chain: list[str], order: str, system: str, params: dict[str, Any]
) -> None:
    found = ask(asked)
    [leg] = found.legs
    assert who(found) == chain
    assert (leg.order, leg.model, leg.weight, leg.group) == (order, asked, 0.0, 0)
    assert {target.preset for target in found.chain} == {asked[1:].split("/")[0].split(":")[0]}
    first = found.chain[0].shape
    assert (first.system, dict(first.params)) == (system, params)
    assert first.system_mode == ("prepend" if system == "Bare." else "fill")


# fmt: off
NOWHERE = [
    # asked for          what is wrong            what the message says
    ("@mian",            "preset_not_found",      "did you mean @main?"),
    ("@zzzzzzzz",        "preset_not_found",      "the configuration has @main"),
    ("@",                "preset_not_found",      "there is no preset @"),
    ("@main/",           "preset_not_found",      "did you mean @main"),
    ("@Main",            "preset_not_found",      "did you mean @main"),
    ("@zzz/aa/m:cost",   "preset_not_found",      "there is no preset @zzz"),
    ("@main:zzz",        "variant_not_found",     "no variant :zzz"),
    ("@main:zzz",        "variant_not_found",     "balanced, cost, latency, throughput"),
    ("@main:zzz",        "variant_not_found",     "not-bb"),
    ("@bare",            "preset_without_model",  "ask for @bare/PROVIDER/MODEL"),
    ("@bare:cost",       "preset_without_model",  "@bare has no model"),
    ("@main/cc:n",       "no_eligible_provider",  "cc: in `ignore`"),
    ("@main/zz-none",    "model_not_found",       "zz-none"),
]
# fmt: on


@pytest.mark.parametrize(("asked", "code", "said"), NOWHERE)
def test_a_preset_that_leads_nowhere_says_what_is_wrong_with_it(
    asked: str, code: str, said: str
) -> None:
    error = refusal(routed(), asked)
    assert error.code == code and said in error.message
    assert error.param == ("provider" if code == "no_eligible_provider" else "model")


def test_a_preset_without_neighbours_says_that_there_are_none() -> None:
    assert "the configuration has none" in refusal(routed(""), "@main").message


# --- fallbacks and candidates


def test_fallbacks_follow_with_the_fields_of_the_preset_and_without_its_routing() -> None:
    found = ask("@chain")
    legs = [(*who(leg), leg.order, leg.weight, leg.targets[0].preset) for leg in found.legs]
    assert legs == [
        ("bb:m-of-bb", "cost", 0.0, "chain"),
        ("cc:n", "balanced", 0.0, "chain"),
        ("cc:n", "throughput", 0.0, "inner"),
        ("aa:only-aa", "balanced", 0.0, "plain"),
    ]
    assert all(target.shape.params["user"] == "chain" for target in found.chain)
    # of the preset's own model, whom its `only` and the variant leave out
    assert any(said.startswith("aa: costs 5") for said in found.left_out)
    assert "cc: not among `only`" in found.left_out


def test_a_fallback_that_is_a_preset_has_that_ones_shape_before_the_outer_one() -> None:
    toml = FLEET.replace('fallbacks = ["cc:n", "@inner", "@plain"]', 'fallbacks = ["@inner"]')
    _, inner = routed(toml).resolve("@chain", CHAT_OP).legs
    [target] = inner.targets
    assert target.shape.params == {"seed": 2, "top_p": 0.5, "user": "chain"}
    assert (target.shape.system, target.preset, inner.order) == ("Inner.", "inner", "throughput")


def test_the_requests_own_wishes_hold_for_fallbacks_too() -> None:
    found = ask("@chain", Wishes(ignore=("cc",)))
    assert who(found) == ["bb:m-of-bb", "aa:only-aa"]
    assert any("in `ignore`" in said and "n:" in said for said in found.left_out)


def test_when_the_presets_model_is_refused_its_fallbacks_serve() -> None:
    found = ask("@chain", Wishes(only=("cc",)))
    assert who(found) == ["cc:n", "cc:n"]
    assert any("not among `only`" in said for said in found.left_out)


def test_when_nobody_of_a_preset_is_left_the_first_reason_is_given() -> None:
    error = refusal(routed(), "@chain", Wishes(tags=("asia",)))
    assert error.code == "no_eligible_provider" and error.message.startswith("m: ")
    toml = '[presets.p]\nmodel = "openai/gpt-4o"\nfallbacks = ["anthropic/claude-sonnet-5"]\n'
    missing = refusal(routed(toml), "@p")
    assert isinstance(missing, KeyMissing) and "OPENAI_API_KEY" in missing.message


def test_a_fallback_that_lacks_its_key_is_left_out() -> None:
    toml = '[presets.p]\nmodel = "openai/gpt-4o"\nfallbacks = ["anthropic/claude-sonnet-5"]\n'
    for name, other in (("OPENAI", "ANTHROPIC"), ("ANTHROPIC", "OPENAI")):
        found = routed(toml, **{f"{name}_API_KEY": "k"}).resolve("@p", CHAT_OP)
        assert [target.provider for target in found.chain] == [name.lower()]
        assert any(f"{other}_API_KEY" in said for said in found.left_out)


def test_candidates_have_their_weights_and_fallbacks_have_none() -> None:
    found = ask("@drawn")
    *candidates, zero, fallback = found.legs
    assert [(leg.weight, who(leg)[0], leg.order) for leg in candidates] == [
        (3.0, "aa:m", "cost"),
        (1.0, "cc:n", "throughput"),
    ]
    assert 0 < zero.weight < 1e-6 and who(zero) == ["aa:only-aa"]
    assert fallback.weight == 0 and who(fallback) == ["cc:other"]
    assert not found.fixed
    shapes = [leg.targets[0].shape for leg in found.legs]
    assert [shape.params["user"] for shape in shapes] == ["drawn"] * 4
    assert [shape.params["seed"] for shape in shapes] == [3, 2, 3, 3]  # the inner one's counts
    assert [shape.system for shape in shapes] == ["", "Inner.", "", ""]


def test_another_base_takes_the_place_of_the_candidates() -> None:
    first, *_ = ask("@drawn/only-aa").legs
    assert who(first) == ["aa:only-aa"] and first.weight == 0


def test_a_variant_narrows_every_candidate() -> None:
    found = ask("@drawn:eu")
    drawn = [leg for leg in found.legs if leg.weight]
    assert [who(leg) for leg in drawn] == [["aa:m", "bb:m-of-bb"], ["aa:only-aa"]]
    assert any("lacks the tag eu" in said for said in found.left_out)


# --- variants

# fmt: off
VARIANTS = [
    # asked for                     chain                             order
    ("m",                           ["aa:m", "bb:m-of-bb", "cc:m"],   "balanced"),
    ("m:balanced",                  ["aa:m", "bb:m-of-bb", "cc:m"],   "balanced"),
    ("m:cost",                      ["aa:m", "bb:m-of-bb", "cc:m"],   "cost"),
    ("m:price",                     ["aa:m", "bb:m-of-bb", "cc:m"],   "cost"),
    ("m:floor",                     ["aa:m", "bb:m-of-bb", "cc:m"],   "cost"),
    ("m:latency",                   ["aa:m", "bb:m-of-bb", "cc:m"],   "latency"),
    ("m:fast",                      ["aa:m", "bb:m-of-bb", "cc:m"],   "latency"),
    ("m:throughput",                ["aa:m", "bb:m-of-bb", "cc:m"],   "throughput"),
    ("m:nitro",                     ["aa:m", "bb:m-of-bb", "cc:m"],   "throughput"),
    ("m:v2",                        ["aa:m", "bb:m-of-bb", "cc:m"],   "cost"),
    ("m:eu",                        ["aa:m", "bb:m-of-bb"],           "balanced"),
    ("m:cheap",                     ["bb:m-of-bb"],                   "cost"),
    ("m:not-bb",                    ["aa:m", "cc:m"],                 "balanced"),
    ("m:cc-first",                  ["cc:m", "bb:m-of-bb", "aa:m"],   "balanced"),
    ("m:pinned",                    ["bb:m-of-bb"],                   "balanced"),
    ("aa:m:latency",                ["aa:m"],                         "latency"),
    ("aa/m:latency",                ["aa:m"],                         "latency"),
    ("declared:eu",                 ["aa:m"],                         "declared"),
    ("declared:cost",               ["cc:m", "aa:m"],                 "declared"),
    ("ranked:cost",                 ["cc:m", "aa:m"],                 "cost"),
    ("shared:cost",                 ["aa:m", "bb:m-of-bb"],           "balance"),
    # suffixes that are no variants, or that belong to a name
    ("aa:free",                     ["aa:free"],                      "balanced"),
    ("aa:cost",                     ["aa:cost"],                      "balanced"),
    ("aa:x:free",                   ["aa:x:free"],                    "balanced"),
    ("aa/lab/x:free",               ["aa:lab/x:free"],                "balanced"),
    ("aa/lab/x:free:fast",          ["aa:lab/x:free"],                "latency"),
    ("aa:x:COST",                   ["aa:x:COST"],                    "balanced"),
    ("aa:x:",                       ["aa:x:"],                        "balanced"),
    ("odd:cost",                    ["bb:odd:cost"],                  "balanced"),
    ("odd:cost:nitro",              ["bb:odd:cost"],                  "throughput"),
    ("by-name:latency",             ["cc:n"],                         "declared"),
    ("by-name:latency:eu",          None,                             ""),
    ("ft:gpt-4o:us:it:Ab1",         ["openai:ft:gpt-4o:us:it:Ab1"],   "balanced"),
    ("openai/ft:gpt-4o:us::A:fast", ["openai:ft:gpt-4o:us::A"],       "latency"),
    ("openai:ft:gpt-4o:us::A",      ["openai:ft:gpt-4o:us::A"],       "balanced"),
    ("openai/gpt-4o:free",          ["openai:gpt-4o:free"],           "balanced"),
]
# fmt: on


@pytest.mark.parametrize(
    ("asked", "chain", "order"), VARIANTS, ids=[str(row[0]) for row in VARIANTS]
)
def test_a_suffix_is_a_variant_only_if_there_is_one_of_that_name(
    asked: str, chain: list[str] | None, order: str
) -> None:
    router = routed(OPENAI_API_KEY="k")
    if chain is None:
        assert refusal(router, asked).code == "no_eligible_provider"
        return
    found = router.resolve(asked, CHAT_OP)
    assert who(found) == chain
    assert [leg.order for leg in found.legs] == [order]


def test_every_ranking_is_a_variant_and_only_ranks() -> None:
    router = routed()
    plain = who(router.resolve("m", CHAT_OP))
    for sort in SORTS:
        found = router.resolve(f"m:{sort}", CHAT_OP)
        assert who(found) == plain
        assert found.legs[0].order == sort
        assert found.fixed is (sort == "balanced")


def test_a_variant_narrows_what_the_request_wishes() -> None:
    assert who(ask("m:eu", Wishes(ignore=("aa",)))) == ["bb:m-of-bb"]
    assert who(ask("m:not-bb", Wishes(max_input=5.0))) == ["aa:m"]
    assert refusal(routed(), "m:pinned", Wishes(only=("aa",))).code == "no_eligible_provider"


# --- what a request wishes

READABLE: list[tuple[str, Any, Wishes]] = [
    ("sort", None, NO_WISHES),
    ("sort", {"by": None}, NO_WISHES),
    ("sort", "balanced", Wishes(sort="balanced")),
    ("sort", "floor", Wishes(sort="cost")),
    ("sort", "price", Wishes(sort="cost")),
    ("sort", {"by": "latency", "partition": "none"}, Wishes(sort="latency")),
    ("order", "aa", Wishes(order=("aa",))),
    ("order", ["b", "a", "b"], Wishes(order=("b", "a", "b"))),
    ("order", [" Anthropic ", "GEMINI"], Wishes(order=("anthropic", "google"))),
    ("only", [], NO_WISHES),
    ("only", ["MyCluster"], Wishes(only=("MyCluster",))),
    ("ignore", "grok", Wishes(ignore=("xai",))),
    ("tags", ["eu", "Quick"], Wishes(tags=("eu", "Quick"))),
    ("tags", "eu", Wishes(tags=("eu",))),
    ("require_tags", ["eu"], Wishes(tags=("eu",))),
    ("allow_fallbacks", True, NO_WISHES),
    ("allow_fallbacks", None, NO_WISHES),
    ("allow_fallbacks", False, Wishes(allow_fallbacks=False)),
    ("require_parameters", False, NO_WISHES),
    ("require_parameters", True, Wishes(require_parameters=True)),
    ("max_price", {}, NO_WISHES),
    ("max_price", {"input": 0}, Wishes(max_input=0.0)),
    ("max_price", {"completion": 2, "prompt": None}, Wishes(max_output=2.0)),
    ("max_price", {"input": "0.25", "output": "1e1"}, Wishes(max_input=0.25, max_output=10.0)),
]


@pytest.mark.parametrize(("field", "value", "wishes"), READABLE)
def test_each_field_of_provider_is_read(field: str, value: Any, wishes: Wishes) -> None:
    assert wishes_in({field: value}) == wishes


NEITHER_LIST_NOR_STRING: tuple[Any, ...] = (5, True, {}, {"a": 1}, [None], ["a", 5], [["a"]])
WRONG: dict[str, tuple[Any, ...]] = {
    "sort": (5, False, ["cost"], "fastest", "Cost", "", {"by": "fastest"}, {"by": 5}),
    "order": NEITHER_LIST_NOR_STRING,
    "only": NEITHER_LIST_NOR_STRING,
    "ignore": NEITHER_LIST_NOR_STRING,
    "tags": NEITHER_LIST_NOR_STRING,
    "allow_fallbacks": (0, 1, "false", [], {}),
    "require_parameters": (0, 1, "true", [], {}),
    "max_price": (5, "5", [1], True),
    "max_price.input": (-1, "-1", "x", "", True, [], {}, 1e12, "nan", "inf"),
    "max_price.output": (-0.5, "1,5", False),
    "max_price.prompt": (-1,),
    "max_price.completion": (-1,),
    "max_price.request": (1, None),
    "max_price.": (1,),
    "orders": (["a"], None),
    "data_collection": ("deny",),
    "": (1,),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG.items() for value in values]
)
def test_a_value_that_cannot_be_meant_is_refused_with_its_fields_name(
    field: str, value: Any
) -> None:
    outer, dot, inner = field.partition(".")
    with pytest.raises(BadRequest) as refused:
        wishes_in({"only": ["aa"], outer: {inner: value} if dot else value})
    error = refused.value
    assert error.param is not None and error.param.partition("[")[0] == f"provider.{field}"
    assert error.message.startswith(f"provider.{field}") and error.status == 400


def test_an_option_that_is_not_known_gets_a_near_miss_or_all_that_are() -> None:
    with pytest.raises(BadRequest, match="did you mean ignore") as near:
        wishes_in({"ingore": ["aa"]})
    with pytest.raises(BadRequest, match="known are allow_fallbacks, ignore, max_price, only"):
        wishes_in({"zzzz": 1})
    assert near.value.param == "provider.ingore"


@pytest.mark.parametrize(
    "provider",
    [{"tags": ["x" * 129]}, {"ignore": ["openai"] * 65}, {"only": ["y" * 10_000_000]}],
)
def test_wishes_are_bounded(provider: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="at most 64 names of 128 characters"):
        wishes_in(provider)


# fmt: off
NARROW = [
    # wishes                                       who is left, in order              of "m"
    (Wishes(only=("cc", "aa")),                    ["aa:m", "cc:m"]),
    (Wishes(only=("aa",), ignore=("bb",)),         ["aa:m"]),
    (Wishes(ignore=("zai",)),                      ["aa:m", "bb:m-of-bb", "cc:m"]),
    (Wishes(order=("bb",)),                        ["bb:m-of-bb", "aa:m", "cc:m"]),
    (Wishes(order=("cc", "bb", "aa")),             ["cc:m", "bb:m-of-bb", "aa:m"]),
    (Wishes(order=("zai", "cc")),                  ["cc:m", "aa:m", "bb:m-of-bb"]),
    (Wishes(order=("cc", "bb"), allow_fallbacks=False), ["cc:m", "bb:m-of-bb"]),
    (Wishes(order=("cc",), only=("aa", "cc")),     ["cc:m", "aa:m"]),
    (Wishes(order=("cc",), ignore=("cc",)),        ["aa:m", "bb:m-of-bb"]),
    (Wishes(tags=("eu",)),                         ["aa:m", "bb:m-of-bb"]),
    (Wishes(tags=("eu", "quick")),                 ["aa:m"]),
    (Wishes(max_input=5.0),                        ["aa:m", "bb:m-of-bb"]),
    (Wishes(max_input=4.99),                       ["bb:m-of-bb"]),
    (Wishes(max_output=5.0),                       ["aa:m"]),
    (Wishes(max_input=5.0, max_output=9.0),        ["aa:m", "bb:m-of-bb"]),
    (Wishes(sort="cost", require_parameters=True), ["aa:m", "bb:m-of-bb", "cc:m"]),
    (Wishes(allow_fallbacks=False),                ["aa:m", "bb:m-of-bb", "cc:m"]),
]
# fmt: on


@pytest.mark.parametrize(("wishes", "chain"), NARROW)
def test_each_wish_narrows_the_chain_and_says_whom_it_left_out(
    wishes: Wishes, chain: list[str]
) -> None:
    found = ask("m", wishes)
    assert who(found) == chain
    assert len(found.left_out) == 3 - len(chain)


# fmt: off
LEFT_OUT = [
    (Wishes(only=("zai",)),                              "aa: not among `only`"),
    (Wishes(ignore=("aa", "bb", "cc")),                  "bb: in `ignore`"),
    (Wishes(order=("zai",), allow_fallbacks=False),      "allow_fallbacks is false"),
    (Wishes(tags=("quick", "slow")),                     "aa: lacks the tag slow"),
    (Wishes(max_input=0.5),                              "bb: costs 1 per million input tokens"),
    (Wishes(max_output=1.5),                             "max_price.output is 1.5"),
    (Wishes(max_input=0.0),                              "cc: its price is not known"),
]
# fmt: on


@pytest.mark.parametrize(("wishes", "said"), LEFT_OUT)
def test_wishes_that_leave_nobody_name_the_reason_for_each(wishes: Wishes, said: str) -> None:
    error = refusal(routed(), "m", wishes)
    assert (error.code, error.param, error.status) == ("no_eligible_provider", "provider", 400)
    assert said in error.message
    assert all(f"{ident}: " in error.message for ident in ("aa", "bb", "cc"))


@pytest.mark.parametrize("field", ["order", "only", "ignore"])
def test_a_provider_that_is_not_there_is_refused_with_its_fields_name(field: str) -> None:
    error = refusal(routed(), "m", wishes_in({field: "opanai"}))
    assert error.param == f"provider.{field}" and "did you mean openai?" in error.message
    error = refusal(routed(), "m", wishes_in({field: "qqqqqq"}))
    assert "`bitrouter providers` lists them" in error.message


# fmt: off
BOTH = [
    # the preset's                      the request's                      both
    (NO_WISHES,                         Wishes(only=("a",)),               Wishes(only=("a",))),
    (Wishes(only=("a",)),               NO_WISHES,                         Wishes(only=("a",))),
    (Wishes(only=("a", "b")),           Wishes(only=("b", "c")),           Wishes(only=("b",))),
    (Wishes(ignore=("a",)),             Wishes(ignore=("b",)),       Wishes(ignore=("a", "b"))),
    (Wishes(tags=("a",)),               Wishes(tags=("b",)),         Wishes(tags=("a", "b"))),
    (Wishes(max_input=2.0),             Wishes(max_input=3.0),             Wishes(max_input=2.0)),
    (Wishes(max_output=3.0),            Wishes(max_output=2.0),            Wishes(max_output=2.0)),
    (Wishes(max_input=2.0), Wishes(max_output=3.0), Wishes(max_input=2.0, max_output=3.0)),
    (Wishes(sort="cost"),               Wishes(sort="latency"),            Wishes(sort="latency")),
    (Wishes(sort="cost"),               Wishes(tags=("a",)),   Wishes(sort="cost", tags=("a",))),
    (Wishes(order=("a", "b")),          Wishes(order=("b",)),              Wishes(order=("b",))),
    (Wishes(order=("a",)),              Wishes(sort="cost"), Wishes(order=("a",), sort="cost")),
    (Wishes(allow_fallbacks=False),     Wishes(),                   Wishes(allow_fallbacks=False)),
    (Wishes(require_parameters=True),   Wishes(),                Wishes(require_parameters=True)),
]
# fmt: on


@pytest.mark.parametrize(("wide", "more", "both"), BOTH)
def test_two_sets_of_wishes_are_one_that_is_narrower_than_either(
    wide: Wishes, more: Wishes, both: Wishes
) -> None:
    assert narrowed(wide, more) == both


def test_what_two_sets_of_wishes_leave_is_what_both_leave() -> None:
    rng, router = random.Random(5), routed()

    def served(wishes: Wishes) -> set[str]:
        found = outcome(router, "m", wishes)
        return {t.provider for t in found.chain} if isinstance(found, Route) else set()

    for _ in range(150):
        one, other = (some_wishes(rng, ["aa", "bb", "cc"]) for _ in range(2))
        one, other = (w._replace(order=(), allow_fallbacks=True) for w in (one, other))
        assert served(narrowed(one, other)) == served(one) & served(other)


def test_two_lists_of_providers_with_nothing_in_common_leave_nobody() -> None:
    nobody = narrowed(Wishes(only=("aa",)), Wishes(only=("bb",)))
    assert refusal(routed(), "m", nobody).code == "no_eligible_provider"
    still = narrowed(nobody, Wishes(only=("aa", "bb", "cc")))
    assert refusal(routed(), "m", still).code == "no_eligible_provider"


LOCKED = """
[presets.locked]
model = "m"
routing = {order = ["aa"], allow_fallbacks = false}
[presets.single]
model = "m"
routing = {allow_fallbacks = false}
"""


@pytest.mark.parametrize(
    ("preset", "asked", "who"),
    [
        ("@locked", {}, ["aa"]),
        ("@locked", {"order": ["bb", "aa"]}, ["aa"]),
        ("@locked", {"order": ["bb"]}, ["aa"]),
        ("@locked", {"order": ["aa", "bb"], "allow_fallbacks": False}, ["aa"]),
        ("@locked", {"order": ["bb"], "allow_fallbacks": False}, []),
        ("@locked", {"only": ["bb"]}, []),
        ("@single", {"order": ["bb", "aa"]}, ["bb"]),
        ("@single", {"order": ["bb", "aa"], "allow_fallbacks": False}, ["bb"]),
    ],
)
def test_a_request_cannot_widen_a_preset_that_forbids_fallbacks(
    preset: str, asked: dict[str, Any], who: list[str]
) -> None:
    router, wishes = routed(FLEET + LOCKED), wishes_in(asked)
    if not who:
        assert refusal(router, preset, wishes).code == "no_eligible_provider"
        return
    chosen = choose(router.resolve(preset, CHAT_OP, wishes), None, Health(Breaker()), 0.0)
    assert [target.provider for target in chosen.chain] == who


# --- several models in one request


def test_the_models_of_a_request_are_tried_in_its_order() -> None:
    found = ask(("only-aa", "@inner", "m:cost", "shared"))
    assert [who(leg) for leg in found.legs] == [
        ["aa:only-aa"],
        ["cc:n"],
        ["aa:m", "bb:m-of-bb", "cc:m"],
        ["aa:m", "bb:m-of-bb"],
    ]
    assert [leg.group for leg in found.legs] == [0, 1, 2, 3]
    assert [leg.order for leg in found.legs] == ["balanced", "throughput", "cost", "balance"]
    assert found.model == "only-aa, @inner, m:cost, shared"


def test_no_target_stands_twice_in_the_chain_of_several_models() -> None:
    assert who(ask(("cc:m", "m", "cc:m", "bb:m"))) == ["cc:m", "aa:m", "bb:m-of-bb"]
    # the same place with another shape is another target
    assert who(ask(("aa:m", "@main/aa:m"))) == ["aa:m", "aa:m"]


def test_wishes_hold_for_each_of_several_models() -> None:
    assert who(ask(("m", "n"), Wishes(ignore=("aa", "bb")))) == ["cc:m", "cc:n"]


@pytest.mark.parametrize("at", range(4))
def test_an_unknown_model_among_several_is_refused_by_its_place(at: int) -> None:
    models = ["m", "n", "only-aa"]
    models.insert(at, "qqqq-none")
    error = refusal(routed(), tuple(models))
    assert (error.param, error.code, error.status) == (f"models[{at}]", "model_not_found", 400)
    assert error.message.startswith(f"models[{at}]: ") and "qqqq-none" in error.message


def test_models_whose_keys_are_missing_are_left_out_until_none_is_left() -> None:
    models = ("openai/gpt-4o", "anthropic/claude-sonnet-5", "n")
    found = ask(models, ANTHROPIC_API_KEY="k")
    assert [target.provider for target in found.chain] == ["anthropic", "cc"]
    error = refusal(routed(), models[:2])
    assert isinstance(error, KeyMissing) and "OPENAI_API_KEY" in error.message


def test_the_entries_of_a_chain_keep_their_order_whatever_is_drawn() -> None:
    found = ask(("cc:m", "@drawn"))
    assert [(leg.group, leg.weight) for leg in found.legs][:3] == [(0, 0.0), (1, 3.0), (1, 1.0)]
    chosen = choose(found, None, Health(Breaker()), 0.0, draw=lambda: 0.9)
    assert [place(target) for target in chosen.chain][:2] == ["cc:m", "cc:n"]
    assert place(chosen.chain[-1]) == "cc:other"


# --- virtual models


def test_each_strategy_of_a_virtual_model_has_its_order() -> None:
    router = routed()
    found = {name: router.resolve(name, CHAT_OP) for name in ("declared", "ranked", "shared")}
    assert {name: route.legs[0].order for name, route in found.items()} == {
        "declared": "declared",
        "ranked": "balanced",
        "shared": "balance",
    }
    first, second = found["shared"].chain
    assert (first.weight, second.weight) == (3.0, 0.5)
    assert (first.virtual, first.endpoint, second.endpoint) == ("shared", "first", "")
    # the endpoint's and the virtual model's fields go before the provider's
    assert first.shape.params == {"user": "shared", "seed": 7}
    assert found["declared"].reasons == ("endpoint 1", "endpoint 2")


def test_only_a_ranked_virtual_model_takes_an_order_from_the_request() -> None:
    wishes = Wishes(order=("aa",))
    assert who(ask("ranked", wishes)) == ["aa:m", "cc:m"]
    assert who(ask("declared", wishes)) == ["cc:m", "aa:m"]
    assert who(ask("declared", Wishes(sort="cost"))) == ["cc:m", "aa:m"]


@pytest.mark.parametrize("name", ["declared", "ranked", "shared"])
def test_the_endpoints_of_a_virtual_model_are_narrowed_like_any(name: str) -> None:
    assert who(ask(name, Wishes(tags=("quick",)))) == ["aa:m"]
    assert refusal(routed(), name, Wishes(only=("zai",))).code == "no_eligible_provider"


def test_a_virtual_model_of_providers_without_keys_names_the_first_variable() -> None:
    toml = '[models.v]\nendpoints = [{provider = "groq", service_id = "x"}]\n'
    error = refusal(routed(toml), "v")
    assert isinstance(error, KeyMissing) and "GROQ_API_KEY" in error.message


# --- who goes first


def classed(classes: dict[str, str], **priority: int) -> str:
    tables = []
    for n, (ident, class_) in enumerate(classes.items()):
        table = f'[providers.{ident}]\napi_base = "http://10.0.0.{n + 1}/v1"\n'
        table += f'models = [{{id = "m"}}]\nclass = "{class_}"\n'
        table += f"priority = {priority[ident]}\n" if ident in priority else ""
        tables.append(table)
    return "\n".join(tables)


CLASSED = {
    "a": "gateway",
    "b": "local",
    "c": "third-party-api",
    "d": "first-party-api",
    "e": "third-party-api",
}
# fmt: off
RANKS: list[tuple[list[str], dict[str, int], str]] = [
    # provider_priority              priorities                                chain
    ([],                             {},                                       "dceba"),
    (["gateway"],                    {},                                       "adceb"),
    (["local", "third-party-api"],   {},                                       "bceda"),
    ([],                             {"a": 0, "d": 9},                         "acebd"),
    ([],                             {"e": 1, "c": 5},                         "debac"),
    (["gateway"],                    {"b": 1},                                 "abdce"),
    ([],                             dict.fromkeys("abcde", 3),                "abcde"),
    ([],                             {"a": 4, "b": 3, "c": 2, "d": 1, "e": 0}, "edcba"),
]
# fmt: on


@pytest.mark.parametrize(("order", "priority", "chain"), RANKS)
def test_classes_and_priorities_rank_whoever_declares_a_model(
    order: list[str], priority: dict[str, int], chain: str
) -> None:
    toml = f"provider_priority = {order}\n" + classed(CLASSED, **priority)
    found = routed(toml).resolve("m", CHAT_OP)
    assert "".join(target.provider for target in found.chain) == chain


def test_the_lab_goes_first_then_who_sells_it_then_gateways_and_the_rank_can_be_changed() -> None:
    keys = {
        f"{name}_API_KEY": "k" for name in ("ZAI", "NOVITA", "OPENROUTER", "CEREBRAS", "BITROUTER")
    }
    plain = [t.provider for t in routed("", **keys).resolve("glm-4.7", CHAT_OP).chain]
    assert plain[0] == "zai" and plain[1] == "cerebras"
    assert set(plain[2:]) == {"novita", "openrouter", "bitrouter"}
    turned = 'provider_priority = ["gateway"]\n[providers.cerebras]\npriority = 0\n'
    ranked = [t.provider for t in routed(turned, **keys).resolve("glm-4.7", CHAT_OP).chain]
    assert ranked[-1] == "zai" and sorted(ranked) == sorted(plain)
    asked = routed("", **keys).resolve("glm-4.7", CHAT_OP, Wishes(order=("novita", "zai")))
    assert [t.provider for t in asked.chain][:3] == ["novita", "zai", "cerebras"]


RANKED = """
provider_priority = ["gateway", "first-party-api"]
[providers.special]
api_base = "http://10.0.0.9/v1"
derives = "openai"
priority = 0
"""


def test_what_derives_serves_its_models_once_it_has_a_rank() -> None:
    environ = {f"{name}_API_KEY": "k" for name in ("OPENAI", "OPENROUTER", "SPECIAL")}
    chain = routed(RANKED, **environ).resolve("gpt-5.4", CHAT_OP).chain
    assert [target.provider for target in chain] == ["special", "openrouter", "openai"]
    assert chain[0].price == chain[2].price


# fmt: off
PLANS = [
    # the model        its plan                   the lab's own
    ("glm-4.7",        "zai_coding_plan",         "zai"),
    ("kimi-k3",        "moonshotai_coding_plan",  "moonshotai"),
    ("qwen3.7-max",    "alibaba_coding_plan",     "alibaba"),
]
# fmt: on


@pytest.mark.parametrize(("model", "plan", "lab"), PLANS)
def test_a_subscription_serves_only_who_names_it(model: str, plan: str, lab: str) -> None:
    keys = {f"{plan.upper()}_API_KEY": "k", f"{lab.upper()}_API_KEY": "k"}
    toml = f'[presets.p]\nmodel = "{model}"\nrouting = {{only = ["{plan}"]}}\n'
    toml += "[providers." + lab + ']\napi_key = "k"\n[providers.' + plan + ']\napi_key = "k"\n'
    router = routed(toml, **keys)

    def served(asked: str, wishes: Wishes = NO_WISHES) -> list[str]:
        return [target.provider for target in router.resolve(asked, CHAT_OP, wishes).chain]

    assert served(model) == [lab]
    assert served(model, Wishes(order=(plan,))) == [lab]
    assert served(model, Wishes(only=(plan,))) == [plan]
    assert sorted(served(model, Wishes(only=(plan, lab)))) == sorted([plan, lab])
    assert served(f"{plan}:{model}") == served(f"{plan}/{model}") == [plan]
    assert served("@p") == [plan]
    alone = routed("[providers." + plan + ']\napi_key = "k"\n')
    assert all(plan not in one.providers for one in alone.listing())


DERIVED = """
[providers.openai]
api_key = "theirs"
[providers.mine]
derives = "openai"
api_base = "http://10.0.0.1/v1"
api_key = "mine"
[providers.far]
api_base = "http://10.0.0.2/v1"
api_key = "far"
api_protocol = "messages"
[providers.farther]
derives = "far"
api_base = "http://10.0.0.3/v1"
api_key = "farther"
"""


def test_what_derives_shares_everything_but_the_key_and_the_base() -> None:
    router = routed(DERIVED)
    [mine] = router.resolve("mine/gpt-4o", CHAT_OP).chain
    [theirs] = router.resolve("openai/gpt-4o", CHAT_OP).chain
    assert (mine.secret.reveal(), mine.base) == ("mine", "http://10.0.0.1/v1")
    assert (theirs.secret.reveal(), theirs.provider) == ("theirs", "openai")
    assert mine.price == theirs.price and mine.context == theirs.context
    assert (mine.protocol, mine.like, mine.traits) == (theirs.protocol, "openai", theirs.traits)
    # it is asked by its own name alone
    assert [target.provider for target in router.resolve("gpt-4o", CHAT_OP).chain] == ["openai"]


def test_what_derives_from_a_provider_of_the_file_speaks_its_protocol_elsewhere() -> None:
    router = routed(DERIVED)
    [far] = router.resolve("far:deep", CHAT_OP).chain
    [farther] = router.resolve("farther:deep", CHAT_OP).chain
    assert far.protocol == farther.protocol == "messages"
    assert (far.base, farther.base) == ("http://10.0.0.2/v1", "http://10.0.0.3/v1")
    assert (far.secret.reveal(), farther.secret.reveal()) == ("far", "farther")


# --- what lacks a variable

BROKEN = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
models = [{id = "m"}, {id = "n"}]
[presets.broken]
model = "m"
params = {user = "${WHO}"}
[presets.whole]
model = "n"
[models.vague]
endpoints = [{provider = "aa", service_id = "${SERVICE}"}]
[variants.somewhere.routing]
only = ["${PLACE}"]
[presets.somewhere]
model = "m:somewhere"
"""
# fmt: off
LACKING = [
    # asked for             who lacks what
    ("@broken",             "presets.broken",     "WHO"),
    ("@broken/n",           "presets.broken",     "WHO"),
    ("@broken:cost",        "presets.broken",     "WHO"),
    ("vague",               "models.vague",       "SERVICE"),
    ("vague:cost",          "models.vague",       "SERVICE"),
    ("m:somewhere",         "variants.somewhere", "PLACE"),
    ("@whole:somewhere",    "variants.somewhere", "PLACE"),
    ("@whole/m:somewhere",  "variants.somewhere", "PLACE"),
    ("@somewhere",          "variants.somewhere", "PLACE"),
    ("@whole/vague",        "models.vague",       "SERVICE"),
]
# fmt: on


@pytest.mark.parametrize(("asked", "owner", "variable"), LACKING)
def test_what_lacks_a_variable_is_refused_by_name(asked: str, owner: str, variable: str) -> None:
    error = refusal(routed(BROKEN), asked)
    assert isinstance(error, Unset) and error.message.startswith(f"{owner} cannot be used")
    assert f"{variable} is not set" in error.message


def test_what_lacks_nothing_serves_and_alone_is_listed() -> None:
    router = routed(BROKEN)
    assert who(router.resolve("@whole", CHAT_OP)) == ["aa:n"]
    assert who(router.resolve("m", CHAT_OP)) == ["aa:m"]
    assert {one.id for one in router.listing()} == {"m", "n", "@whole", "echo/echo"}
    whole = routed(BROKEN, WHO="me", SERVICE="n", PLACE="aa")
    assert who(whole.resolve("vague", CHAT_OP)) == ["aa:n"]
    assert whole.resolve("@broken", CHAT_OP).chain[0].shape.params == {"user": "me"}
    assert {"@broken", "@somewhere", "vague"} <= {one.id for one in whole.listing()}


@pytest.mark.parametrize(
    "text",
    [
        "[providers.openai]\napi_key = 'k'\napi_base = '${NOPE}'\n",
        "[providers.openai]\napi_key = 'k'\nextra_headers = {a = '${NOPE}'}\n",
        "[providers.openai]\naccounts = [{api_key = '${NOPE}'}]\n",
        "[providers.openai]\napi_key = 'file:nowhere'\n",
    ],
)
def test_a_provider_that_lacks_something_is_not_used_with_half_of_it(text: str) -> None:
    def nothing(name: str) -> str:
        raise FileNotFoundError(2, "No such file or directory", name)

    loaded = parse_config(text, {}, "c.toml", nothing)
    assert loaded.problems == [] and loaded.fatal == [] and len(loaded.unset) == 1
    active, warnings = active_providers(loaded.config, {})
    assert "openai" not in active and "openai is off" in warnings[0]
    with pytest.raises(KeyMissing, match=r"NOPE|nowhere"):
        Router(loaded.config, active).resolve("openai/gpt-4o", CHAT_OP)


def test_a_preset_that_leads_nowhere_is_not_listed_and_breaks_nothing() -> None:
    router = routed("[presets.p]\nmodel = 'nobodys/model'\n", OPENAI_API_KEY="k")
    listed = {one.id for one in router.listing()}
    assert "@p" not in listed and "openai/gpt-4o-mini" in listed
    assert refusal(router, "@p").code == "model_not_found"


# --- any configuration

IDS = ["m", "n", "x:free", "y:cost", "team/z", "p0/m", "openai/gpt-4o", "claude-sonnet-5"]
TAGS = ["eu", "us"]


def some_routing(rng: random.Random, idents: list[str]) -> dict[str, Any]:
    routing: dict[str, Any] = {}
    if rng.random() < 0.4:
        routing["sort"] = rng.choice([*SORTS, "floor", "nitro", "fast"])
    if rng.random() < 0.3:
        routing["only"] = rng.sample(idents, rng.randrange(1, len(idents) + 1))
    elif rng.random() < 0.3:
        routing["ignore"] = rng.sample(idents, 1)
    if rng.random() < 0.3:
        routing["max_price"] = {rng.choice(["input", "output"]): rng.choice([1, 3])}
    return routing


def some_provider(rng: random.Random, n: int) -> dict[str, Any]:
    models = []
    for model in rng.sample(IDS, rng.randrange(1, 5)):
        told: dict[str, Any] = {"id": model}
        if rng.random() < 0.6:
            told["pricing"] = {"input": rng.choice([0, 1, 4]), "output": rng.choice([1, 2])}
        if rng.random() < 0.3:
            told["provider_model_id"] = f"{model}@p{n}"
        models.append(told)
    given: dict[str, Any] = {"api_base": f"http://10.0.0.{n + 1}/v1", "models": models}
    given["tags"] = TAGS if n == 0 else rng.sample(TAGS, rng.randrange(3))
    given["active"] = rng.random() < 0.9
    if rng.random() < 0.2:
        given["accounts"] = [{"api_key": "k1"}, {"api_key": "k2"}]
    if rng.random() < 0.3:
        given["priority"] = rng.randrange(3)
    if rng.random() < 0.3:
        given["class"] = rng.choice(["gateway", "local", "first-party-api"])
    return given


def some_preset(rng: random.Random, n: int, idents: list[str], asked: list[str]) -> dict[str, Any]:
    preset: dict[str, Any] = {"routing": some_routing(rng, idents)}
    if n < 2 or rng.random() < 0.5:
        preset["model"] = rng.choice(asked)
    elif rng.random() < 0.7:
        preset["candidates"] = [
            {"model": rng.choice(asked), "weight": rng.choice([0, 1, 2.5])},
            {"preset": "q0"},
        ]
    if n >= 2 and rng.random() < 0.5:
        preset["fallbacks"] = [rng.choice(asked), rng.choice(["@q0", "@q1"])]
    return preset


def some_config(rng: random.Random) -> dict[str, Any]:
    """A configuration that is valid, whether or not all of it leads somewhere."""
    idents = [f"p{n}" for n in range(rng.randrange(1, 6))]
    providers = {ident: some_provider(rng, n) for n, ident in enumerate(idents)}
    declared = [one["id"] for given in providers.values() for one in given["models"]]
    declared = [name for name in declared if ":" not in name] or ["claude-sonnet-5"]
    virtual: dict[str, Any] = {}
    for n in range(rng.randrange(3)):
        endpoints = [
            {"provider": rng.choice(idents), "service_id": rng.choice(declared), "weight": weight}
            for weight in (1, 2)
        ]
        strategy = rng.choice(["priority", "balance", "cascade"])
        virtual[f"v{n}"] = {"strategy": strategy, "endpoints": endpoints}
    asked = [*declared, *virtual, f"{idents[0]}:any", f"{declared[0]}:here", f"{declared[0]}:cost"]
    return {
        "providers": providers,
        "models": virtual,
        "presets": {f"q{n}": some_preset(rng, n, idents, asked) for n in range(4)},
        "variants": {"here": {"routing": some_routing(rng, idents) | {"require_tags": ["eu"]}}},
        "inherit_defaults": rng.random() < 0.5,
    }


def some_wishes(rng: random.Random, idents: list[str]) -> Wishes:
    def some(least: int = 0) -> tuple[str, ...]:
        return tuple(rng.sample(idents, rng.randrange(least, len(idents) + 1)))

    return Wishes(
        rng.choice(["", *SORTS]),
        some() if rng.random() < 0.4 else (),
        some(1) if rng.random() < 0.4 else (),
        some() if rng.random() < 0.2 else (),
        tuple(rng.sample(TAGS, rng.randrange(3))) if rng.random() < 0.3 else (),
        rng.random() < 0.7,
        rng.random() < 0.1,
        rng.choice([None, None, 0.0, 2.0]),
        rng.choice([None, None, 1.0]),
    )


def outcome(router: Router, model: str | tuple[str, ...], wishes: Wishes) -> Route | BitrouterError:
    try:
        return router.resolve(model, CHAT_OP, wishes)
    except BitrouterError as error:
        return error


def satisfies(target: Target, wishes: Wishes, router: Router) -> bool:
    def within(most: float | None, rate: float | None) -> bool:
        return most is None or (rate is not None and rate <= most)

    ident = target.provider
    return (
        ident in (wishes.only or (ident,))
        and ident not in wishes.ignore
        and set(wishes.tags) <= set(router.active[ident].given.tags)
        and (wishes.allow_fallbacks or not wishes.order or ident in wishes.order)
        and within(wishes.max_input, target.price.input)
        and within(wishes.max_output, target.price.output)
    )


@pytest.mark.parametrize("seed", range(120))
def test_any_configuration_serves_what_it_lists_and_only_who_is_wished_for(seed: int) -> None:
    rng = random.Random(seed)
    config = some_config(rng)
    router = routed(json.dumps(config), "c.json")
    listed = [one for one in router.listing() if one.id != "echo/echo"]
    for one in listed:
        served = router.resolve(one.id, CHAT_OP)
        place, slash, _ = one.id.partition("/")
        known = {*one.providers, *([place] if slash else [])}
        assert served.chain and {target.provider for target in served.chain} <= known
    idents = list(config["providers"])
    names: list[str | tuple[str, ...]] = [
        *IDS, *config["models"], *(f"@{name}" for name in config["presets"]), "m:here",
        "@q0/n:cost", "@q1:here", tuple(one.id for one in listed[:3]),
    ]  # fmt: skip
    for name in names:
        wishes = some_wishes(rng, idents)
        found = outcome(router, name, wishes)
        if isinstance(found, BitrouterError):
            assert found.status in (400, 402, 404) and found.message
            continue
        assert found.chain == tuple(t for leg in found.legs for t in leg.targets)
        assert len(found.chain) == len(found.reasons)
        assert all(satisfies(target, wishes, router) for target in found.chain)


@pytest.mark.parametrize("seed", range(60))
def test_any_preset_narrows_its_own_model_as_its_routing_says(seed: int) -> None:
    rng = random.Random(1000 + seed)
    config = some_config(rng)
    router = routed(json.dumps(config), "c.json")
    for name in ("q0", "q1"):
        routing = config["presets"][name].get("routing", {})
        own = wishes_in(routing)
        wishes = some_wishes(rng, list(config["providers"]))
        for asked in (f"@{name}", f"@{name}/m", f"@{name}:here"):
            found = outcome(router, asked, wishes)
            if isinstance(found, BitrouterError):
                continue
            assert all(satisfies(target, own, router) for target in found.chain)
            assert all(satisfies(target, wishes, router) for target in found.chain)
            here = asked.endswith(":here") or config["presets"][name]["model"].endswith(":here")
            tags = ("eu",) if here and "/" not in asked else ()
            assert all(satisfies(target, Wishes(tags=tags), router) for target in found.chain)


def test_any_name_is_an_answer_or_a_clear_error() -> None:
    rng, router = random.Random(7), routed(OPENAI_API_KEY="k")
    pieces = ["@", "main", "/", ":", "m", "cost", "aa", "openai", "gpt-4o", "::", ".", "é", "eu"]
    for _ in range(400):
        found = outcome(router, "".join(rng.choices(pieces, k=rng.randrange(1, 7))), NO_WISHES)
        if isinstance(found, BitrouterError):
            assert found.message and found.status in (400, 402, 404, 501)
        else:
            assert found.chain
