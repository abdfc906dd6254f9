"""Presets, variants, chains of models and what a request's `provider` asks for."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bitrouter import (
    CHAT_OP,
    NO_WISHES,
    BadRequest,
    BitrouterError,
    Breaker,
    Health,
    KeyMissing,
    Listed,
    ModelFilter,
    NotFound,
    Price,
    Route,
    Router,
    Unset,
    Wishes,
    active_providers,
    choose,
    model_filter,
    narrowed,
    parse_config,
    wishes_in,
)

FLEET = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
tags = ["eu", "fast"]
models = [
  {id = "m", pricing = {input = 5, output = 5}},
  {id = "only-aa", capabilities = ["tools"]},
]
[providers.bb]
api_base = "http://10.0.0.2/v1"
tags = ["eu"]
models = [{id = "m", pricing = {input = 1, output = 2}}, {id = "gpt-4o:free"}]
[providers.cc]
api_base = "http://10.0.0.3/v1"
models = [{id = "m"}, {id = "n", pricing = {input = 1, output = 1}}]

[presets.fast]
model = "m"
system_prompt = "Be terse."
params = {temperature = 0.2}
routing = {sort = "latency", ignore = ["cc"]}
[presets.bare]
system_prompt = "Hm."
[presets.chain]
model = "m:eu"
fallbacks = ["cc:n", "@fast"]
[presets.trial]
params = {seed = 1, top_p = 1}
candidates = [{model = "aa:m", weight = 3}, {preset = "inner", weight = 1}]
[presets.inner]
model = "cc:n"
params = {seed = 2}
system_prompt = "Inner."
[variants.eu.routing]
require_tags = ["eu"]
[models.smart]
endpoints = [{provider = "cc", service_id = "m"}, {provider = "aa", service_id = "m"}]
[models.ranked]
strategy = "cascade"
endpoints = [{provider = "cc", service_id = "m"}, {provider = "aa", service_id = "m"}]
[models.shared]
strategy = "balance"
endpoints = [
  {provider = "aa", service_id = "m", weight = 3},
  {provider = "bb", service_id = "m", weight = 1},
]
"""


def fleet(toml: str = FLEET, **environ: str) -> Router:
    loaded = parse_config(toml, environ)
    assert loaded.problems == []
    return Router(loaded.config, active_providers(loaded.config, environ)[0])


def route(model: str | tuple[str, ...], wishes: Wishes = NO_WISHES, **environ: str) -> Route:
    return fleet(**environ).resolve(model, CHAT_OP, wishes)


def who(found: Route) -> list[str]:
    return [f"{target.provider}:{target.model}" for target in found.chain]


# fmt: off
NAMES = [
    # asked for                 chain                              how its legs are ordered
    ("m",                       ["aa:m", "bb:m", "cc:m"],          ["balanced"]),
    ("m:cost",                  ["aa:m", "bb:m", "cc:m"],          ["cost"]),
    ("m:floor",                 ["aa:m", "bb:m", "cc:m"],          ["cost"]),
    ("m:nitro",                 ["aa:m", "bb:m", "cc:m"],          ["throughput"]),
    ("m:fast",                  ["aa:m", "bb:m", "cc:m"],          ["latency"]),
    ("m:balanced",              ["aa:m", "bb:m", "cc:m"],          ["balanced"]),
    ("m:eu",                    ["aa:m", "bb:m"],                  ["balanced"]),
    ("gpt-4o:free",             ["bb:gpt-4o:free"],                ["balanced"]),
    ("aa:m:latency",            ["aa:m"],                          ["latency"]),
    ("aa:cost",                 ["aa:cost"],                       ["balanced"]),
    ("@fast",                   ["aa:m", "bb:m"],                  ["latency"]),
    ("@fast:cost",              ["aa:m", "bb:m"],                  ["cost"]),
    ("@fast/n",                 None,                              None),
    ("@fast/aa/anything",       ["aa:anything"],                   ["latency"]),
    ("@fast/aa/x:throughput",   ["aa:x"],                          ["throughput"]),
    ("@bare/cc:n",              ["cc:n"],                          ["balanced"]),
    ("@chain",                  ["aa:m", "bb:m", "cc:n", "aa:m", "bb:m"],
     ["balanced", "balanced", "latency"]),
    ("@trial",                  ["aa:m", "cc:n"],                  ["balanced", "balanced"]),
    ("smart",                   ["cc:m", "aa:m"],                  ["declared"]),
    ("smart:cost",              ["cc:m", "aa:m"],                  ["declared"]),
    ("ranked",                  ["cc:m", "aa:m"],                  ["balanced"]),
    ("ranked:cost",             ["cc:m", "aa:m"],                  ["cost"]),
    ("shared",                  ["aa:m", "bb:m"],                  ["balance"]),
    (("cc:n", "m:cost"),        ["cc:n", "aa:m", "bb:m", "cc:m"],  ["balanced", "cost"]),
]
REFUSED = [
    ("@nope",                   "preset_not_found",      "@fast"),
    ("@fats",                   "preset_not_found",      "did you mean @fast?"),
    ("@bare",                   "preset_without_model",  "@bare/PROVIDER/MODEL"),
    ("@fast:nope",              "variant_not_found",     "throughput"),
    ("@fast/cc:m",              "no_eligible_provider",  "cc: in `ignore`"),
    (("nobody-has-this", "m"),  "model_not_found",       "models[0]"),
]
# fmt: on


@pytest.mark.parametrize(("model", "chain", "orders"), NAMES)
def test_a_name_leads_where_its_form_says(
    model: str | tuple[str, ...], chain: list[str] | None, orders: list[str]
) -> None:
    if chain is None:  # @fast ignores the only provider that has it
        with pytest.raises(BadRequest):
            route(model)
        return
    found = route(model)
    assert who(found) == chain
    assert [leg.order for leg in found.legs] == orders


@pytest.mark.parametrize(("model", "code", "said"), REFUSED)
def test_a_name_that_leads_nowhere_says_what_would(
    model: str | tuple[str, ...], code: str, said: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        route(model)
    assert refused.value.code == code and said in refused.value.message


def test_a_preset_shapes_its_targets_and_its_fallbacks() -> None:
    shapes = [target.shape for target in route("@chain").chain]
    assert [shape.system for shape in shapes] == ["", "", "", "Be terse.", "Be terse."]
    first, second = route("@trial").chain
    assert (first.shape.params, second.shape.params) == (
        {"seed": 1, "top_p": 1},
        {"seed": 2, "top_p": 1},
    )
    assert (second.shape.system, second.preset, first.preset) == ("Inner.", "inner", "trial")
    assert [leg.weight for leg in route("@trial").legs] == [3, 1]


def test_a_model_of_a_chain_that_lacks_its_key_is_left_out() -> None:
    found = route(("openai/gpt-4o", "cc:n"))
    assert who(found) == ["cc:n"]
    assert any("OPENAI_API_KEY" in left for left in found.left_out)
    with pytest.raises(KeyMissing):
        route(("openai/gpt-4o", "anthropic/claude-sonnet-5"))


WISHES = [
    # wishes                                          who is left
    (Wishes(only=("bb", "cc")), ["bb:m", "cc:m"]),
    (Wishes(ignore=("aa",)), ["bb:m", "cc:m"]),
    (Wishes(order=("cc", "bb")), ["cc:m", "bb:m", "aa:m"]),
    (Wishes(order=("cc",), allow_fallbacks=False), ["cc:m"]),
    (Wishes(tags=("fast",)), ["aa:m"]),
    (Wishes(max_input=2.0), ["bb:m"]),
    (Wishes(max_input=9.0, max_output=4.0), ["bb:m"]),
]


@pytest.mark.parametrize(("wishes", "chain"), WISHES)
def test_wishes_narrow_a_chain(wishes: Wishes, chain: list[str]) -> None:
    found = route("m", wishes)
    assert who(found) == chain
    assert len(found.chain) + len(found.left_out) == 3


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        (Wishes(only=("aaa",)), "provider.only: there is no provider 'aaa'; did you mean aa?"),
        (Wishes(max_input=0.5), "bb: costs 1 per million input tokens, and max_price.input is 0.5"),
        (Wishes(max_input=0.5), "cc: its price is not known"),
        (Wishes(tags=("asia",)), "aa: lacks the tag asia"),
    ],
)
def test_wishes_that_nobody_meets_say_why(wishes: Wishes, said: str) -> None:
    with pytest.raises(BadRequest, match="provider") as refused:
        route("m", wishes)
    assert said in refused.value.message


READ: list[tuple[dict[str, Any], Wishes]] = [
    ({}, NO_WISHES),
    ({"sort": "price"}, Wishes(sort="cost")),
    ({"sort": {"by": "throughput"}}, Wishes(sort="throughput")),
    ({"order": ["Gemini"], "only": "x-ai"}, Wishes(order=("google",), only=("xai",))),
    ({"ignore": ["a"], "tags": ["t"]}, Wishes(ignore=("a",), tags=("t",))),
    ({"allow_fallbacks": False}, Wishes(allow_fallbacks=False)),
    ({"require_parameters": True}, Wishes(require_parameters=True)),
    ({"max_price": {"prompt": "1.5", "output": 3}}, Wishes(max_input=1.5, max_output=3.0)),
]
UNREADABLE = [
    ({"olny": []}, "provider.olny"),
    ({"data_collection": "deny"}, "provider.data_collection"),
    ({"only": [1]}, "provider.only"),
    ({"order": {}}, "provider.order"),
    ({"sort": "speed"}, "provider.sort"),
    ({"sort": ["cost"]}, "provider.sort"),
    ({"allow_fallbacks": "no"}, "provider.allow_fallbacks"),
    ({"require_parameters": 1}, "provider.require_parameters"),
    ({"max_price": 3}, "provider.max_price"),
    ({"max_price": {"input": -1}}, "provider.max_price.input"),
    ({"max_price": {"input": True}}, "provider.max_price.input"),
    ({"max_price": {"image": 1}}, "provider.max_price.image"),
    ({"tags": 5}, "provider.tags"),
]


@pytest.mark.parametrize(("provider", "wishes"), READ)
def test_what_a_request_asks_of_the_choice_is_read(
    provider: dict[str, Any], wishes: Wishes
) -> None:
    assert wishes_in(provider) == wishes


@pytest.mark.parametrize(("provider", "param"), UNREADABLE)
def test_what_cannot_be_read_is_refused_by_name(provider: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        wishes_in(provider)
    assert str(refused.value.param).startswith(param)
    assert refused.value.message.startswith(param)


def test_both_sets_of_wishes_hold_and_neither_widens_the_other() -> None:
    rng = random.Random(5)
    names = ("aa", "bb", "cc")
    ours = fleet()

    def some() -> tuple[str, ...]:
        return tuple(rng.sample(names, rng.randrange(3)))

    for _ in range(300):
        one, other = (
            Wishes(
                only=some(),
                ignore=some(),
                tags=tuple(rng.sample(("eu", "fast"), rng.randrange(2))),
                max_input=rng.choice([None, 2.0, 9.0]),
            )
            for _ in range(2)
        )
        found = []
        for wishes in (one, other, narrowed(one, other)):
            try:
                found.append({t.provider for t in ours.resolve("m", CHAT_OP, wishes).chain})
            except BadRequest:
                found.append(set())
        assert found[2] == found[0] & found[1]


RANKED = """
provider_priority = ["gateway", "first-party-api"]
[providers.special]
api_base = "http://10.0.0.9/v1"
derives = "openai"
priority = 0
"""


def test_ranks_decide_who_goes_first() -> None:
    environ = {"OPENAI_API_KEY": "k", "OPENROUTER_API_KEY": "k", "AZURE_OPENAI_API_KEY": "k"}
    environ |= {"AZURE_OPENAI_RESOURCE": "r"}
    plain = [target.provider for target in fleet("", **environ).resolve("gpt-5.4", CHAT_OP).chain]
    assert plain == ["openai", "azure", "openrouter"]
    ranked = fleet(RANKED, SPECIAL_API_KEY="k", **environ).resolve("gpt-5.4", CHAT_OP)
    assert [t.provider for t in ranked.chain] == ["special", "openrouter", "openai", "azure"]
    assert ranked.chain[0].price == ranked.chain[2].price


def test_a_subscription_is_used_only_where_it_is_named() -> None:
    environ = {"ZAI_API_KEY": "k", "ZAI_CODING_PLAN_API_KEY": "k"}
    ours = fleet("", **environ)
    assert [t.provider for t in ours.resolve("glm-4.7", CHAT_OP).chain] == ["zai"]
    named = ours.resolve("glm-4.7", CHAT_OP, Wishes(only=("zai_coding_plan",)))
    assert [t.provider for t in named.chain] == ["zai_coding_plan"]


def test_what_lacks_a_variable_names_it_and_the_rest_serves() -> None:
    toml = FLEET.replace('"Be terse."', '"${TONE}"').replace('["eu"]', '["${TAG:-eu}"]')
    ours = fleet(toml)
    with pytest.raises(Unset, match=r"presets\.fast .*TONE is not set"):
        ours.resolve("@fast", CHAT_OP)
    assert who(ours.resolve("@inner", CHAT_OP)) == ["cc:n"]


def test_what_is_listed_can_be_asked_for() -> None:
    ours = fleet(OPENAI_API_KEY="k")
    listed = ours.listing()
    assert {"m", "smart", "@fast", "@trial", "openai/gpt-4o-mini"} <= {one.id for one in listed}
    assert "@bare" not in {one.id for one in listed}
    for one in listed:
        chain = ours.resolve(one.id, CHAT_OP).chain if "embedding" not in one.id else ()
        assert {target.provider for target in chain} <= {*one.providers, "openrouter"}


def test_a_list_is_narrowed_by_each_field() -> None:
    mini = Listed("x", ("openai",), None, 1000, 0, ("tools", "image_input"), Price(2.0, 3.0))
    yes: list[dict[str, str]] = [
        {}, {"provider": "openai"}, {"capability": "tools"}, {"modality": "image"},
        {"max_price": "2"}, {"min_context": "1000"},
    ]  # fmt: skip
    no: list[dict[str, str]] = [
        {"provider": "groq"}, {"capability": "reasoning"}, {"modality": "pdf"},
        {"max_price": "1.99"}, {"min_context": "1001"},
    ]  # fmt: skip
    assert all(model_filter(asked, ())(mini) for asked in yes)
    assert not any(model_filter(asked, ())(mini) for asked in no)
    assert ModelFilter()(mini)


@pytest.mark.parametrize(
    "asked",
    [
        {"provider": "opnai"},
        {"capability": "tool"},
        {"modality": "smell"},
        {"max_price": "cheap"},
        {"min_context": "-1"},
    ],
)
def test_a_filter_that_makes_no_sense_is_refused_by_name(asked: dict[str, str]) -> None:
    with pytest.raises(BadRequest) as refused:
        model_filter(asked, ())
    assert refused.value.param == next(iter(asked))


def test_any_name_is_an_answer_or_a_clear_error() -> None:
    rng = random.Random(7)
    ours = fleet(OPENAI_API_KEY="k")
    pieces = ["@", "fast", "/", ":", "m", "cost", "aa", "openai", "gpt-4o", "::", ".", "é", "eu"]
    for _ in range(2000):
        name = "".join(rng.choices(pieces, k=rng.randrange(1, 7)))
        outcome: Route | BitrouterError
        try:
            outcome = ours.resolve(name, CHAT_OP)
        except BitrouterError as error:
            outcome = error
        told = outcome.chain if isinstance(outcome, Route) else outcome.message
        assert told
        assert isinstance(outcome, Route) or outcome.status in (400, 402, 404, 501)


def test_the_entries_of_a_chain_keep_their_order_whatever_is_drawn() -> None:
    legs = route(("cc:m", "@trial")).legs
    assert [(leg.group, leg.weight) for leg in legs] == [(0, 0.0), (1, 3.0), (1, 1.0)]
    chosen = choose(route(("cc:m", "@trial")), None, Health(Breaker()), 0.0, draw=lambda: 0.9)
    assert [target.provider for target in chosen.chain] == ["cc", "cc", "aa"]


def test_an_error_that_is_remembered_holds_on_to_nothing() -> None:
    ours = fleet()
    raised = []
    for _ in range(2):
        with pytest.raises(NotFound) as error:
            ours.resolve("nobody-has-this", CHAT_OP)
        raised.append(error.value)
    assert raised[0] is not raised[1] and raised[0].message == raised[1].message


def test_a_preset_that_leads_nowhere_is_not_listed_and_breaks_nothing() -> None:
    ours = fleet("[presets.p]\nmodel = 'nobodys/model'\n", OPENAI_API_KEY="k")
    assert "@p" not in {one.id for one in ours.listing()}
    for name in ("@p", "nothing-known"):
        with pytest.raises((NotFound, KeyMissing)):
            ours.resolve(name, CHAT_OP)


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


@pytest.mark.parametrize(
    "provider",
    [{"tags": ["x" * 129]}, {"ignore": ["openai"] * 65}, {"only": ["y" * 10_000_000]}],
)
def test_wishes_are_bounded(provider: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="at most 64 names of 128 characters"):
        wishes_in(provider)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params = {stream = true}", "params.stream: only the request itself can say this"),
        ("params = {temperature = nan}", "params.temperature: expected JSON"),
        ("params = {tools = 'x'}", "params: tools: expected"),
        ("model = 'opnai/gpt-4o'", "model: there is no provider 'opnai'; did you mean openai?"),
    ],
)
def test_a_preset_that_could_never_work_is_refused(text: str, said: str) -> None:
    problems = parse_config(f"[presets.p]\n{text}\n", {}).problems
    assert problems and said in problems[0]
