"""Where a model id leads: every form of it, who is asked first, and what is said when nobody is."""

from __future__ import annotations

from typing import Any

import pytest
from support import router_of

import bitrouter
from bitrouter import (
    CHAT_OP,
    GEMINI_VERBS,
    MESSAGES_OP,
    OPERATIONS,
    PROVIDERS,
    RESPONSES_OP,
    ApiProtocol,
    KeyMissing,
    NotFound,
    Operation,
    Price,
    ProtocolUnsupported,
    Route,
    Router,
    active_providers,
    parse_config,
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


@pytest.mark.parametrize("separator", ["/", ":"])
def test_a_subscription_is_used_when_it_is_named(separator: str) -> None:
    model = f"zai_coding_plan{separator}glm-5.1"
    assert resolved(model, "zai_coding_plan", "zai") == ["zai_coding_plan glm-5.1"]


@pytest.mark.parametrize("ident", PROVIDERS)
def test_every_provider_takes_ids_that_nobody_knows(ident: str) -> None:
    ours = router("", ident, AZURE_OPENAI_RESOURCE="r")
    [op] = [op for op in OPS if op.protocol == next(iter(PROVIDERS[ident].bases))]
    for model in (f"{ident}/what-ever-9", f"{ident}:what-ever-9"):
        first = ours.resolve(model, op).chain[0]
        assert (first.provider, first.model, first.price) == (
            ident,
            "what-ever-9",
            Price(0.0, 0.0, 0.0, 0.0) if PROVIDERS[ident].kind == "local" else Price(),
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
    assert target.price == Price(0.0, 0.0, 0.0, 0.0)


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


# Servers that were found on this machine, and that nobody named.

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
