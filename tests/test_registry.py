"""The tables of providers and models, how ids are recognised, and what an answer costs."""

from __future__ import annotations

import re
from collections import Counter
from urllib.parse import urlsplit

import pytest

import bitrouter
from bitrouter import ALIASES, FAMILIES, PROVIDERS, Model, Price, Provider, Usage, catalogue

KINDS = {"api", "gateway", "local", "plan"}
MODALITIES = re.compile(r"[tiavp]+>[tiave]+")


def records() -> list[list[str]]:
    """The catalogue's own text, one list of words for each model."""
    joined = bitrouter._CATALOGUE.replace("\n    ", " ")
    return [line.split(" ") for line in joined.splitlines()]


def prices(model: Model) -> list[Price]:
    """Every price of a model, wherever it is served and however long the prompt."""
    plain = [model.price, *(price for _, price in model.carried.values())]
    return plain + [tier for price in plain for _, tier in price.tiers]


def test_every_line_of_the_catalogue_becomes_a_model() -> None:
    assert [words[0] for words in records()] == list(catalogue())


def test_the_catalogue_lists_models_in_order() -> None:
    ids = [words[0] for words in records()]
    assert ids == sorted(ids)


@pytest.mark.parametrize("words", records(), ids=lambda words: str(words[0]))
def test_a_catalogue_line_names_known_providers_once(words: list[str]) -> None:
    names = Counter(re.split("[=@]", carrier)[0] for carrier in words[4:])
    assert names and max(names.values()) == 1 and set(names) <= set(PROVIDERS)


@pytest.mark.parametrize("words", records(), ids=lambda words: str(words[0]))
def test_a_catalogue_line_has_limits_and_modalities(words: list[str]) -> None:
    model = catalogue()[words[0]]
    assert MODALITIES.fullmatch(words[3])
    assert 0 <= model.max_output <= model.context <= 20_000_000


@pytest.mark.parametrize("model", catalogue().values(), ids=lambda model: str(model.id))
def test_prices_are_sane(model: Model) -> None:
    for price in prices(model):
        rates = [rate for rate in price[:4] if rate is not None]
        assert all(0 <= rate <= 1000 for rate in rates)
        if price.input is not None and price.cache_read is not None:
            assert price.cache_read <= price.input


@pytest.mark.parametrize("model", catalogue().values(), ids=lambda model: str(model.id))
def test_longer_prompts_never_cost_less(model: Model) -> None:
    for price in [model.price, *(price for _, price in model.carried.values())]:
        starts = [above for above, _ in price.tiers]
        rates = [price.input or 0, *(tier.input or 0 for _, tier in price.tiers)]
        assert starts == sorted(set(starts)) and rates == sorted(rates)


@pytest.mark.parametrize("model", catalogue().values(), ids=lambda model: str(model.id))
def test_a_model_is_found_by_every_spelling_of_its_id(model: Model) -> None:
    bare = model.id.partition("/")[2]
    spellings = [model.id, bare, bare.upper(), bare.replace(".", "-"), f"models/{bare}"]
    found = [bitrouter.find_model(spelling) for spelling in spellings]
    assert [one.id if one else None for one in found] == [model.id] * len(spellings)


# fmt: off
SPELLINGS = [
    ("gpt-4o-mini-2024-07-18",               "openai/gpt-4o-mini"),
    ("openai/gpt-4o-2024-08-06",             "openai/gpt-4o"),
    ("claude-sonnet-4-5-20250929",           "anthropic/claude-sonnet-4.5"),
    ("anthropic/claude-sonnet-4-5-20250929", "anthropic/claude-sonnet-4.5"),
    ("claude-sonnet-4-6-latest",             "anthropic/claude-sonnet-4.6"),
    ("Claude-Sonnet-4.6",                    "anthropic/claude-sonnet-4.6"),
    ("xai/grok-4.5",                         "x-ai/grok-4.5"),
    ("zai/glm-5.1",                          "z-ai/glm-5.1"),
    ("alibaba/qwen3.7-max",                  "qwen/qwen3.7-max"),
    ("mistral/codestral-latest",             "mistralai/codestral-latest"),
    ("Qwen/Qwen3.7-Max",                     "qwen/qwen3.7-max"),
    ("anthropic.claude-sonnet-4-6",          "anthropic/claude-sonnet-4.6"),
    ("gpt-4o-minimal",                       None),
    ("openai/claude-sonnet-4.6",             None),
    ("gpt-4o-2024",                          None),
    ("",                                     None),
    ("/",                                    None),
]
# fmt: on


@pytest.mark.parametrize(("text", "ident"), SPELLINGS)
def test_ids_are_recognised_as_people_write_them(text: str, ident: str | None) -> None:
    found = bitrouter.find_model(text)
    assert (found.id if found else None) == ident


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=lambda p: str(p.id))
def test_a_provider_has_a_safe_base_for_each_protocol(provider: Provider) -> None:
    assert provider.bases and provider.kind in KINDS
    for base in provider.bases.values():
        url = urlsplit(base)
        loopback = provider.kind == "local" and url.hostname == "127.0.0.1"
        assert url.scheme == ("http" if loopback else "https") and url.hostname
        assert not base.endswith("/") and not (url.query or url.fragment or url.username)


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=lambda p: str(p.id))
def test_a_provider_has_variables_for_its_key(provider: Provider) -> None:
    assert provider.env
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]+", name) for name in provider.env)


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=lambda p: str(p.id))
def test_a_base_for_messages_ends_in_a_version(provider: Provider) -> None:
    base = provider.bases.get(bitrouter.ApiProtocol.MESSAGES, "/v1")
    assert re.search(r"/v\d+$", base)


def test_a_key_turns_on_one_pay_as_you_go_provider() -> None:
    ours = [name for p in PROVIDERS.values() if p.kind != "plan" for name in p.env]
    assert max(Counter(ours).values()) == 1


# fmt: off
WANTED = [
    "openai", "anthropic", "google", "groq", "together", "fireworks", "mistral", "cohere",
    "perplexity", "deepinfra", "huggingface", "nebius", "baseten", "sambanova", "hyperbolic",
    "nvidia", "ollama", "lmstudio", "vllm", "llamacpp",
]
# fmt: on


@pytest.mark.parametrize("ident", WANTED)
def test_a_promised_provider_is_in_the_table(ident: str) -> None:
    assert PROVIDERS[ident].id == ident


@pytest.mark.parametrize(("alias", "ident"), ALIASES.items())
def test_an_alias_means_a_provider_and_hides_none(alias: str, ident: str) -> None:
    assert alias not in PROVIDERS and bitrouter.provider_id(alias) in PROVIDERS


def test_families_belong_to_known_providers() -> None:
    assert {ident for ident, _ in FAMILIES} <= set(PROVIDERS)


FLAT = Price(2.0, 8.0, 0.5, 2.5)
HOURLY = FLAT._replace(cache_write_1h=4.0)
TIERED = Price(1.0, 4.0, 0.1, None, ((100, Price(2.0, 6.0, 0.2)), (200, Price(3.0, 9.0, 0.3))))

# fmt: off
COSTS = [
    # usage (input, output, cached, written)  price   billionths of a dollar
    (Usage(1000, 0),                          FLAT,   2_000_000),
    (Usage(0, 1000),                          FLAT,   8_000_000),
    (Usage(1000, 0, 400),                     FLAT,   600 * 2000 + 400 * 500),
    (Usage(1000, 0, 400, 100),                FLAT,   500 * 2000 + 400 * 500 + 100 * 2500),
    (Usage(1000, 0, 900, 100, 0, 70),         HOURLY, 900 * 500 + 30 * 2500 + 70 * 4000),
    (Usage(10, 7, reasoning_tokens=5),        FLAT,   10 * 2000 + 7 * 8000),
    (Usage(),                                 FLAT,   0),
    (Usage(11, 7),                            Price(0.15, 0.6), 11 * 150 + 7 * 600),
    (Usage(1, 0),                             Price(0.037, 0.17), 37),
    (Usage(5, 5),                             Price(0.0, 0.0), 0),
    (Usage(100, 1),                           TIERED, 100 * 1000 + 4000),
    (Usage(101, 1),                           TIERED, 101 * 2000 + 6000),
    (Usage(200, 1),                           TIERED, 200 * 2000 + 6000),
    (Usage(201, 1, 1),                        TIERED, 200 * 3000 + 300 + 9000),
    (Usage(101, 10**7),                       TIERED, 101 * 2000 + 10**7 * 6000),
]
UNKNOWN = [
    (Usage(5, 5),                             Price()),
    (Usage(0, 5),                             Price()),
    (Usage(5, 5),                             Price(1.0)),
    (Usage(5, 0, 3),                          Price(1.0, 2.0)),
    (Usage(5, 0, 0, 3),                       Price(1.0, 2.0, 0.1)),
    (Usage(101, 1, 0, 1),                     TIERED),
    (Usage(5, 0, 9),                          FLAT),
    (Usage(5, 0, 0, 3, 0, 1),                 FLAT),
]
# fmt: on


@pytest.mark.parametrize(("usage", "price", "nanousd"), COSTS)
def test_each_token_is_charged_once_and_exactly(usage: Usage, price: Price, nanousd: int) -> None:
    assert bitrouter.cost_nanousd(usage, price) == nanousd


@pytest.mark.parametrize(("usage", "price"), UNKNOWN)
def test_a_rate_that_is_not_known_is_no_price_rather_than_none(usage: Usage, price: Price) -> None:
    assert bitrouter.cost_nanousd(usage, price) is None


def test_a_rate_that_is_not_known_does_not_matter_when_nothing_used_it() -> None:
    assert bitrouter.cost_nanousd(Usage(5, 0), Price(1.0)) == 5000


def test_a_model_costs_what_its_carrier_asks() -> None:
    theirs = catalogue()["openai/gpt-oss-120b"].carried
    assert theirs["cerebras"][1] == Price(0.35, 0.75)
    assert theirs["openrouter"][1] == catalogue()["openai/gpt-oss-120b"].price


def test_a_subscription_has_no_price_per_token() -> None:
    plans = {ident for ident, provider in PROVIDERS.items() if provider.kind == "plan"}
    theirs = [m.carried[ident][1] for m in catalogue().values() for ident in plans & set(m.carried)]
    assert theirs and set(theirs) == {Price()}


def test_an_hour_in_claudes_cache_costs_twice_the_input_at_every_length() -> None:
    price = bitrouter.find_model("claude-haiku-5.5").carried["anthropic"][1]  # type: ignore[union-attr]
    tiers = [price, *(tier for _, tier in price.tiers)]
    assert [tier.cache_write_1h for tier in tiers] == [0.2, 1.0]
    assert all(
        model.price.cache_write_1h is None
        for model in bitrouter.catalogue().values()
        if not model.id.startswith("anthropic/")
    )
