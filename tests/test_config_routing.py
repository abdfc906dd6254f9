"""The keys that say where requests go: providers, models, presets, variants; what is refused of
them and where; the schema of the file, what is in force, and the commands that show both."""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
from support import Ran
from test_config import FULL, SECRETS

import bitrouter
from bitrouter import (
    ActiveProvider,
    ApiProtocol,
    Candidate,
    Config,
    ContextTier,
    Loaded,
    MaxPrice,
    RateLimit,
    Retry,
    Secret,
    parse_config,
)

CHAT, RESPONSES = ApiProtocol.CHAT_COMPLETIONS, ApiProtocol.RESPONSES
MESSAGES, GOOGLE = ApiProtocol.MESSAGES, ApiProtocol.GENERATE_CONTENT

# Every key of these sections, with a value that is not its default.
ROUTED = """
provider_priority = ["gateway", "local"]
inherit_defaults = false

[providers.base]
api_base = "https://base.example/v1"
api_key = "file:base.key"
protocol_endpoints = {messages = "https://base.example/anthropic/v1"}
tags = ["eu", "fast"]
class = "gateway"
priority = 0
auth = "bearer"
rate_limits = {"gpt-5*" = {requests_per_minute = 6}, "*" = {tokens_per_minute = 1000}}
compatibility.chat_completions = {token_limit_field = "max_tokens", supports_store = false}
auto_discover = true
account_strategy = "balance"
params = {temperature = 0.5, stop = ["x"], metadata = {team = "red"}}
extra_body = [{pointer = "/metadata/a", value = {b = [1]}}, {pointer = "/user", delete = true}]
extra_headers = [{name = "X-Team", value = "red"}, {name = "User-Agent", delete = true}]
timeouts = {connect_s = 1, first_token_s = 2, idle_s = 3, total_s = 4}
retry = {max = 0, base_ms = 1, max_ms = 2}

[[providers.base.models]]
id = "team/writer"
provider_model_id = "writer-1"
api_protocol = ["responses", "chat_completions"]
context = 1000
max_output = 500
capabilities = ["tools", "reasoning"]
reasoning_effort = {levels = ["low", "high"], default = "low"}
rate_limits = {requests_per_minute = 7, tokens_per_minute = 70}
compatibility.chat_completions.supports_stream_options = false
params = {top_p = 0.25}
timeouts = {idle_s = 8}
retry.max = 1

[providers.base.models.pricing]
input = 3
output = 12
cache_read = 1.5
cache_write = 4
context_tiers = [{above_input_tokens = 100, input = 6, output = 24, cache_read = 2}]

[providers.copy]
derives = "base"
active = false
api_key = "request:X-Team-Key"

[models.both]
strategy = "balance"
pricing = {input = 2.5, output = 10}
params = {seed = 1}
timeouts.total_s = 9

[[models.both.endpoints]]
provider = "base"
service_id = "writer-1"
name = "main"
weight = 3
rate_limits.requests_per_minute = 5
params = {seed = 2}
extra_body = [{pointer = "/seed", delete = true}]
extra_headers = {X-Endpoint = "1"}
timeouts.idle_s = 10
retry.base_ms = 11

[[models.both.endpoints]]
provider = "copy"
service_id = "writer-2"
weight = 0

[presets.writer]
model = "team/writer"
system_prompt = "You write."
system_mode = "prepend"
templates = {user = "Write about {{ user_text }}."}
structured = "tool"
output = "json"
params = {temperature = 0}
extra_body = [{pointer = "/list/-", value = false}]
extra_headers = {X-Preset = "1"}
timeouts.first_token_s = 12
retry.max_ms = 13
fallbacks = ["both", "@plain"]

[presets.writer.routing]
sort = "latency"
order = ["base"]
only = ["base", "copy"]
ignore = ["azure"]
require_tags = ["eu"]
allow_fallbacks = false
require_parameters = true
max_price = {input = 5, output = 20}

[presets.plain]
model = "both"

[presets.trial]
candidates = [{model = "both", weight = 9}, {preset = "writer"}]

[variants.cheap.routing]
sort = "cost"
only = ["base"]
"""
KEY_FILE = "sk-of-the-file-0123456789"


def read_key(name: str) -> str:
    """The files that there are."""
    if name == "base.key":
        return f"{KEY_FILE}\n"
    raise FileNotFoundError(2, "No such file or directory")


def read(text: str, name: str = "bitrouter.toml", **environ: str) -> Loaded:
    return parse_config(text, environ, name, read_key)


def config_of(text: str, **environ: str) -> Config:
    found = read(text, **environ)
    assert (found.problems, found.unset) == ([], [])
    return found.config


def active(text: str, **environ: str) -> dict[str, ActiveProvider]:
    return bitrouter.active_providers(config_of(text, **environ), environ)[0]


@pytest.fixture(scope="module")
def routed() -> Config:
    return config_of(ROUTED)


# What is read.

# fmt: off
READ: list[tuple[Callable[[Config], Any], Any]] = [
    (lambda c: c.provider_priority,                         ("gateway", "local")),
    (lambda c: c.inherit_defaults,                          False),
    # a provider
    (lambda c: c.providers["base"].api_key,                 Secret(KEY_FILE)),
    (lambda c: c.providers["base"].protocol_endpoints,
     {"messages": "https://base.example/anthropic/v1"}),
    (lambda c: c.providers["base"].tags,                    ("eu", "fast")),
    (lambda c: c.providers["base"].class_,                  "gateway"),
    (lambda c: c.providers["base"].priority,                0),
    (lambda c: c.providers["base"].auth,                    "bearer"),
    (lambda c: dict(c.providers["base"].rate_limits.rules),
     {"gpt-5*": RateLimit(6, None), "*": RateLimit(None, 1000)}),
    (lambda c: c.providers["base"].compatibility.chat_completions,
     bitrouter.ChatCompatibility("max_tokens", supports_store=False)),
    (lambda c: c.providers["base"].auto_discover,           True),
    (lambda c: c.providers["base"].active,                  True),
    (lambda c: c.providers["base"].params,
     {"temperature": 0.5, "stop": ["x"], "metadata": {"team": "red"}}),
    (lambda c: c.providers["base"].extra_body,
     (bitrouter.BodyEdit("/metadata/a", {"b": [1]}), bitrouter.BodyEdit("/user", None, True))),
    (lambda c: c.providers["base"].extra_headers,           ({"X-Team": "red"}, ("user-agent",))),
    (lambda c: c.providers["base"].timeouts,                bitrouter.SomeTimeouts(1, 2, 3, 4)),
    (lambda c: c.providers["base"].retry,                   Retry(0, 1, 2)),
    (lambda c: c.providers["copy"].derives,                 "base"),
    (lambda c: c.providers["copy"].active,                  False),
    (lambda c: c.providers["copy"].api_key,                 Secret("request:X-Team-Key")),
    # a model of a provider
    (lambda c: c.providers["base"].models[0].api_protocol.spoken("m"), (RESPONSES, CHAT)),
    (lambda c: c.providers["base"].models[0].capabilities,  ("tools", "reasoning")),
    (lambda c: c.providers["base"].models[0].reasoning_effort,
     bitrouter.ReasoningEffort(("low", "high"), "low")),
    (lambda c: c.providers["base"].models[0].rate_limits,   RateLimit(7, 70)),
    (lambda c: c.providers["base"].models[0].compatibility.chat_completions,
     bitrouter.ChatCompatibility(supports_stream_options=False)),
    (lambda c: c.providers["base"].models[0].pricing,
     bitrouter.Pricing(3, 12, 1.5, 4, None, (ContextTier(6, 24, 2, None, None, 100),))),
    (lambda c: c.providers["base"].models[0].params,        {"top_p": 0.25}),
    (lambda c: c.providers["base"].models[0].timeouts.idle_s, 8),
    (lambda c: c.providers["base"].models[0].retry,         Retry(max=1)),
    # a model of one's own
    (lambda c: c.models["both"].strategy,                   "balance"),
    (lambda c: c.models["both"].pricing,                    bitrouter.Pricing(2.5, 10)),
    (lambda c: c.models["both"].params,                     {"seed": 1}),
    (lambda c: c.models["both"].timeouts.total_s,           9),
    (lambda c: [e.service_id for e in c.models["both"].endpoints], ["writer-1", "writer-2"]),
    (lambda c: [e.weight for e in c.models["both"].endpoints], [3, 0]),
    (lambda c: [e.name for e in c.models["both"].endpoints], ["main", ""]),
    (lambda c: c.models["both"].endpoints[0].rate_limits,   RateLimit(5, None)),
    (lambda c: c.models["both"].endpoints[0].params,        {"seed": 2}),
    (lambda c: c.models["both"].endpoints[0].extra_body,
     (bitrouter.BodyEdit("/seed", delete=True),)),
    (lambda c: c.models["both"].endpoints[0].extra_headers, ({"X-Endpoint": "1"}, ())),
    (lambda c: c.models["both"].endpoints[0].timeouts.idle_s, 10),
    (lambda c: c.models["both"].endpoints[0].retry,         Retry(base_ms=11)),
    (lambda c: c.models["both"].endpoints[1].retry,         None),
    # presets and variants
    (lambda c: c.presets["writer"].model,                   "team/writer"),
    (lambda c: c.presets["writer"].system_prompt,           "You write."),
    (lambda c: c.presets["writer"].system_mode,             "prepend"),
    (lambda c: c.presets["writer"].templates,  {"user": "Write about {{ user_text }}."}),
    (lambda c: c.presets["writer"].structured,              "tool"),
    (lambda c: c.presets["writer"].output,                  "json"),
    (lambda c: c.presets["writer"].params,                  {"temperature": 0}),
    (lambda c: c.presets["writer"].extra_body,       (bitrouter.BodyEdit("/list/-", False),)),
    (lambda c: c.presets["writer"].extra_headers,           ({"X-Preset": "1"}, ())),
    (lambda c: c.presets["writer"].timeouts.first_token_s,  12),
    (lambda c: c.presets["writer"].retry,                   Retry(max_ms=13)),
    (lambda c: c.presets["writer"].fallbacks,               ("both", "@plain")),
    (lambda c: c.presets["writer"].routing,
     bitrouter.Routing("latency", ("base",), ("base", "copy"), ("azure",), ("eu",), False, True,
                       MaxPrice(5, 20))),
    (lambda c: c.presets["trial"].candidates,
     (Candidate("both", "", 9), Candidate("", "writer", 1))),
    (lambda c: c.variants["cheap"].routing, bitrouter.Routing("cost", only=("base",))),
]
# fmt: on


@pytest.mark.parametrize(("found", "wanted"), READ, ids=range(len(READ)))
def test_what_the_file_says_is_read(
    found: Callable[[Config], Any], wanted: Any, routed: Config
) -> None:
    assert found(routed) == wanted


# fmt: off
WRITTEN_TWICE = [
    # section and key,             one spelling,                     and another that says the same
    ("providers.openai.rate_limits",
     '{"a*" = {requests_per_minute = 1}, "*" = {tokens_per_minute = 2}}',
     '[{"a*" = {requests_per_minute = 1}}, {"*" = {tokens_per_minute = 2}}]'),
    ("providers.openai.rate_limits",
     '{"a*" = {requests_per_minute = 1}, "ab" = {tokens_per_minute = 2}}',
     '[{"ab" = {tokens_per_minute = 2}, "a*" = {requests_per_minute = 1}}]'),
    ("providers.openai.extra_headers",
     '{X-A = "1", x-b = "2"}',     '[{name = "X-A", value = "1"}, {name = "x-b", value = "2"}]'),
    ("providers.openai.api_protocol", '"messages"',                  '["messages"]'),
    ("providers.openai.api_protocol", '"messages"',                  '{"*" = "messages"}'),
    ("providers.openai.api_protocol",
     '{"c*" = "messages", "*" = ["responses", "openai"]}',
     '[{"c*" = ["anthropic"]}, {"*" = ["responses", "chat_completions"]}]'),
    ("providers.openai.timeouts",  "{idle_s = 1}",                   "{idle_s = 1.0}"),
    ("upstream.fallback_backoff_ms", "[1, 20]",                      "[1.0, 2e1]"),
]
# fmt: on


@pytest.mark.parametrize(("key", "one", "other"), WRITTEN_TWICE)
def test_two_spellings_say_the_same(key: str, one: str, other: str) -> None:
    assert config_of(f"{key} = {one}") == config_of(f"{key} = {other}") != config_of("")


def test_the_most_particular_limit_stands_first() -> None:
    text = '{"*" = {}, "gpt-*" = {}, "gpt-5" = {}, "gpt-5-*" = {}}'
    rules = config_of(f"providers.openai.rate_limits = {text}").providers["openai"].rate_limits
    assert [glob for glob, _ in rules.rules] == ["gpt-5", "gpt-5-*", "gpt-*", "*"]


@pytest.mark.parametrize("strategy", ["priority", "balance", "cascade"])
def test_every_strategy_is_known(strategy: str) -> None:
    endpoints = '[{provider = "openai", service_id = "gpt-4o"}]'
    text = f'[models.m]\nstrategy = "{strategy}"\nendpoints = {endpoints}'
    assert config_of(text).models["m"].strategy == strategy


@pytest.mark.parametrize("sort", [*bitrouter.SORTS, *bitrouter.SORT_ALIASES])
@pytest.mark.parametrize("table", ["presets.p", "variants.v"])
def test_every_order_is_known(sort: str, table: str) -> None:
    config = config_of(f'[{table}.routing]\nsort = "{sort}"')
    orders = [one.routing.sort for one in config.presets.values()]
    orders += [one.routing.sort for one in config.variants.values()]
    assert orders == [sort]


@pytest.mark.parametrize("mode", ["fill", "prepend", "replace"])
def test_every_system_mode_is_known(mode: str) -> None:
    text = f'[presets.p]\nsystem_prompt = "x"\nsystem_mode = "{mode}"'
    assert config_of(text).presets["p"].system_mode == mode


def test_nothing_said_is_nothing_changed() -> None:
    config = config_of("")
    assert (config.server.workers, config.inherit_defaults) == (1, True)
    assert (config.upstream.hedge_after_ms, config.upstream.fallback_backoff_ms) == (None, ())
    assert (config.presets, config.variants, config.provider_priority) == ({}, {}, ())
    given = config_of("[providers.openai]").providers["openai"]
    assert given == bitrouter.ProviderConfig()
    assert (given.active, given.auto_discover, given.priority, given.retry) == (
        (True, False, None, None)
    )


# fmt: off
ROUTABLE = [
    # what a preset may lead to
    "openai/gpt-4o", "openai:gpt-4o", "gpt-4o", "gpt-4o:cost", "claude-sonnet-4-6", "echo/echo",
    "openrouter/meta-llama/llama-4", "meta-llama/llama-4", "openai/not-yet-known", "mine/anything",
    "own", "own:cheap", "declared/one", "openai/ft:gpt-4o:team::1", "gemini:gemini-3-pro",
]
# fmt: on


@pytest.mark.parametrize("model", ROUTABLE)
@pytest.mark.parametrize(
    "key", ["model = '{}'", "fallbacks = ['{}']", "candidates=[{{model='{}'}}]"]
)
def test_a_preset_may_lead_to_any_model_that_may_exist(model: str, key: str) -> None:
    config_of(f"""
[providers.mine]
api_base = "http://m/v1"
models = [{{id = "declared/one"}}]
[models.own]
endpoints = [{{provider = "mine", service_id = "x"}}]
[variants.cheap.routing]
sort = "cost"
[presets.p]
{key.format(model)}
""")


@pytest.mark.parametrize("pointer", ["/a", "/a/b", "/a/0/-", "/~0~1", "/", "/a//b", "/é x"])
def test_a_json_pointer_is_taken_as_rfc_6901_writes_it(pointer: str) -> None:
    text = f'[presets.p]\nextra_body = [{{pointer = "{pointer}", value = 0}}]'
    [edit] = config_of(text).presets["p"].extra_body
    assert edit == bitrouter.BodyEdit(pointer, 0)


# What is refused. Each text has one fault; where its line is, and the beginning of what is said.

OWN = "[providers.m]\napi_base = 'http://h/v1'\n"  # lines 1 and 2
MODEL = OWN + "[[providers.m.models]]\nid = 'a'\n"  # lines 3 and 4
PRESET = "[presets.p]\nmodel = 'openai/gpt-4o'\n"  # lines 1 and 2
CHAIN = "[[models.s.endpoints]]\nprovider = 'openai'\nservice_id = 'x'\n"  # lines 1 to 3
M = "providers.m.models[0]"
BASE = "expected http(s)://HOST/PATH, got "
BOOL, LIST, TABLE = (
    "expected true or false, got ",
    "expected a list, got ",
    "expected a table, got ",
)
WHOLE, NUMBER, STRING = (
    "expected a whole number, got",
    "expected a number, got",
    "expected a string",
)
WORD = "expected one of "
POINTER = "expected a JSON pointer such as /a/b, got "
HEADER = "expected {name, value} or {name, delete = true}"
NAME = "expected a name of letters, digits, `.`, `_`, `+` and `-`"
EDIT = "expected a value, or delete = true"
OTHER = "expected another preset that has a model"
WEIGHT = "expected a weight above 0 for one of them"

# fmt: off
UNKNOWN = [
    # an unknown key, and what is offered instead
    ("inherit_default = true",                      "1: inherit_default", "inherit_defaults?"),
    (MODEL + "[providers.m.models.reasoning_effort]\nlevel = []",
     f"6: {M}.reasoning_effort.level", "levels?"),
    (MODEL + "[providers.m.models.pricing]\ncached_read = 1",
     f"6: {M}.pricing.cached_read", "cache_read?"),
    (MODEL + "[[providers.m.models.pricing.context_tiers]]\nabove_tokens = 1",
     f"6: {M}.pricing.context_tiers[0].above_tokens", "above_input_tokens?"),
    (CHAIN + "[models.s.endpoints.timeouts]\nidl_s = 1",
     "5: models.s.endpoints[0].timeouts.idl_s", "idle_s?"),
    (PRESET + "system_prompt = '''\n[server]\nzzz = 3\n'''\nfallback = []",
     "7: presets.p.fallback", "fallbacks?"),
    ("provider_priorities = []",                    "1: provider_priorities", "provider_priority?"),
    ("[preset]\np = {}",                             "1: preset", "presets?"),
    ("[server]\nworker = 2",                        "2: server.worker", "workers?"),
    ("[upstream]\nhedge_after_s = 2",               "2: upstream.hedge_after_s", "hedge_after_ms?"),
    ("[upstream]\nfallback_backoff = []",           "2: upstream.fallback_backoff",
     "fallback_backoff_ms?"),
    (OWN + "derive = 'openai'",                     "3: providers.m.derive", "derives?"),
    (OWN + "tag = []",                              "3: providers.m.tag", "tags?"),
    (OWN + "class_ = 'local'",                      "3: providers.m.class_", "class?"),
    (OWN + "protocol_endpoint = {}",                "3: providers.m.protocol_endpoint",
     "protocol_endpoints?"),
    (OWN + "timeouts = {pool_idle_s = 1}",          "3: providers.m.timeouts.pool_idle_s",
     "idle_s?"),
    (OWN + "[providers.m.timeouts]\nidle = 1",      "4: providers.m.timeouts.idle", "idle_s?"),
    (OWN + "retry.maxx = 1",                        "3: providers.m.retry.maxx", "max?"),
    (OWN + "rate_limits = {'*' = {request_per_minute = 1}}",
     "3: providers.m.rate_limits.*.request_per_minute", "requests_per_minute?"),
    (OWN + "rate_limits = [{'*' = {token_per_minute = 1}}]",
     "3: providers.m.rate_limits.*.token_per_minute", "tokens_per_minute?"),
    (OWN + "compatibility.chat_completion = {}",
     "3: providers.m.compatibility.chat_completion", "chat_completions?"),
    (OWN + "[providers.m.compatibility.chat_completions]\nsupport_store = true",
     "4: providers.m.compatibility.chat_completions.support_store", "supports_store?"),
    (OWN + "extra_body = [{pointer = '/a', value = 1, deletes = 1}]",
     "3: providers.m.extra_body[0].deletes", "delete?"),
    (MODEL + "capability = []",                     f"5: {M}.capability", "capabilities?"),
    (CHAIN + "wieght = 1",                          "4: models.s.endpoints[0].wieght", "weight?"),
    (CHAIN + "time_outs = {}",                      "4: models.s.endpoints[0].time_outs",
     "timeouts?"),
    (CHAIN + "[models.s]\nstrategie = 'x'",         "5: models.s.strategie", "strategy?"),
    (PRESET + "systemprompt = 'x'",                 "3: presets.p.systemprompt", "system_prompt?"),
    (PRESET + "fallback = []",                      "3: presets.p.fallback", "fallbacks?"),
    (PRESET + "routing.require_tag = []",           "3: presets.p.routing.require_tag",
     "require_tags?"),
    (PRESET + "[presets.p.routing]\nallow_fallback = true", "4: presets.p.routing.allow_fallback",
     "allow_fallbacks?"),
    (PRESET + "[presets.p.routing.max_price]\ninputs = 1", "4: presets.p.routing.max_price.inputs",
     "input?"),
    ("[presets.p]\ncandidates = [{model = 'gpt-4o', wight = 1}]",
     "2: presets.p.candidates[0].wight",
     "weight?"),
    ("[variants.v]\nroutings = {}",                 "2: variants.v.routings", "routing?"),
    ("[variants.v.routing]\nsorts = 'cost'",        "2: variants.v.routing.sorts", "sort?"),
]
# fmt: on


@pytest.mark.parametrize(("text", "place", "meant"), UNKNOWN)
def test_an_unknown_key_is_told_with_its_near_miss(text: str, place: str, meant: str) -> None:
    said = f"bitrouter.toml:{place}: unknown key; did you mean {meant}"
    assert read(text).problems == [said]


# fmt: off
REFUSED = [
    # values of a wrong type
    (MODEL + "[providers.m.models.pricing]\ninput = -1",
     f"6: {M}.pricing.input: expected 0 or more, "),
    (("[presets.p]\ncandidates = [{model = 'gpt-4o'}]\n[[presets.q.candidates]]\n"
      "model = 'gpt-4o'\n[[presets.q.candidates]]\nweight = 3"),
     "5: presets.q.candidates[1]: expected model or preset"),
    ("[presets.p]\ncandidates = [\n{model = 'gpt-4o'},\n{weight = 1},\n]",
     "4: presets.p.candidates[1]: expected model or preset"),
    ("inherit_defaults = 'no'",                     f"1: inherit_defaults: {BOOL}\"no\""),
    ("provider_priority = 'local'",                 f"1: provider_priority: {LIST}\"local\""),
    ("provider_priority = [1]",                     f"1: provider_priority[0]: {STRING}, got 1"),
    ("[server]\nworkers = 1.5",                     f"2: server.workers: {WHOLE} 1.5"),
    ("[server]\nworkers = true",                    f"2: server.workers: {WHOLE} true"),
    ("[upstream]\nfallback_backoff_ms = 5",         f"2: upstream.fallback_backoff_ms: {LIST}5"),
    ("[upstream]\nfallback_backoff_ms = [1, 'x']",
     f"2: upstream.fallback_backoff_ms[1]: {NUMBER} \"x\""),
    ("[upstream]\nhedge_after_ms = '1'",            f"2: upstream.hedge_after_ms: {NUMBER} \"1\""),
    (OWN + "tags = 'eu'",                           f"3: providers.m.tags: {LIST}a string"),
    (OWN + "tags = [1]",                            f"3: providers.m.tags[0]: {STRING}, got "),
    (OWN + "class = 1",                             f"3: providers.m.class: {STRING}, got "),
    (OWN + "priority = '1'",                        f"3: providers.m.priority: {WHOLE} a string"),
    (OWN + "derives = ['openai']",
     f"3: providers.m.derives: {STRING}, got a list"),
    (OWN + "protocol_endpoints = 'x'",
     f"3: providers.m.protocol_endpoints: {TABLE}a string"),
    (OWN + "protocol_endpoints = {responses = 3}",
     f"3: providers.m.protocol_endpoints.responses: {STRING}, got "),
    (OWN + "rate_limits = 3",
     "3: providers.m.rate_limits: expected a table of model globs, got "),
    (OWN + "rate_limits = [3]",
     "3: providers.m.rate_limits: expected a table of model globs, got "),
    (OWN + "rate_limits = {'*' = 3}",               f"3: providers.m.rate_limits.*: {TABLE}"),
    (OWN + "rate_limits = {requests_per_minute = 3}",
     f"3: providers.m.rate_limits.requests_per_minute: {TABLE}"),
    (OWN + "compatibility = true",                  f"3: providers.m.compatibility: {TABLE}"),
    (OWN + "compatibility.chat_completions.supports_store = 'no'",
     f"3: providers.m.compatibility.chat_completions.supports_store: {BOOL}a string"),
    (OWN + "auto_discover = 'yes'",
     f"3: providers.m.auto_discover: {BOOL}a string"),
    (OWN + "active = 1",                            f"3: providers.m.active: {BOOL}"),
    (OWN + "params = 3",                            f"3: providers.m.params: {TABLE}"),
    (OWN + "params = {a = 2020-01-01}",             "3: providers.m.params.a: expected JSON"),
    (OWN + "extra_headers = 3",
     "3: providers.m.extra_headers: expected a table or a list, got "),
    (OWN + "extra_headers = {a = 3}",
     f"3: providers.m.extra_headers.a: {STRING}, got "),
    (OWN + "extra_headers = [3]",                   f"3: providers.m.extra_headers[0]: {HEADER}"),
    (OWN + "extra_headers = [{name='a', value=3}]",
     f"3: providers.m.extra_headers[0]: {STRING}, got "),
    (OWN + "extra_body = {a = 1}",                  f"3: providers.m.extra_body: {LIST}a table"),
    (OWN + "extra_body = [{pointer='/a', value=1, delete=1}]",
     f"3: providers.m.extra_body[0].delete: {BOOL}"),
    (OWN + "timeouts = {idle_s = '1'}",
     f"3: providers.m.timeouts.idle_s: {NUMBER} a string"),
    (OWN + "retry = 0",                             f"3: providers.m.retry: {TABLE}"),
    (OWN + "models = {a = {}}",                     f"3: providers.m.models: {LIST}a table"),
    (MODEL + "capabilities = 'tools'",              f"5: {M}.capabilities: {LIST}a string"),
    (MODEL + "context = 1.5",                       f"5: {M}.context: {WHOLE} "),
    (MODEL + "pricing = 3",                         f"5: {M}.pricing: {TABLE}"),
    (MODEL + "pricing.context_tiers = {}",          f": {M}.pricing.context_tiers: {LIST}a table"),
    (MODEL + "rate_limits = [{'*' = {}}]",          f"5: {M}.rate_limits: {TABLE}a list"),
    (CHAIN + "weight = '1'",
     f"4: models.s.endpoints[0].weight: {NUMBER} \"1\""),
    (CHAIN + "params = []",                         f"4: models.s.endpoints[0].params: {TABLE}[]"),
    ("[models.s]\nendpoints = {provider = 'openai'}", f"2: models.s.endpoints: {LIST}"),
    (PRESET + "params = []",                        f"3: presets.p.params: {TABLE}[]"),
    (PRESET + "templates = {user = 3}",
     f"3: presets.p.templates.user: {STRING}, got 3"),
    (PRESET + "fallbacks = 'x'",                    f"3: presets.p.fallbacks: {LIST}\"x\""),
    (PRESET + "candidates = {}",                    f"3: presets.p.candidates: {LIST}{{}}"),
    (PRESET + "routing = 3",                        f"3: presets.p.routing: {TABLE}3"),
    (PRESET + "routing = {only = 'openai'}",        f"3: presets.p.routing.only: {LIST}\"openai\""),
    (PRESET + "routing = {allow_fallbacks = 'x'}",
     f"3: presets.p.routing.allow_fallbacks: {BOOL}\"x\""),
    (PRESET + "routing = {max_price = 3}",          f"3: presets.p.routing.max_price: {TABLE}3"),
    ("[presets]\np = 3",                            f"2: presets.p: {TABLE}3"),
    ("[presets.p]\nmodel = 3",                      f"2: presets.p.model: {STRING}, got 3"),
    ("variants = 3",                                f"1: variants: {TABLE}3"),
    ("[variants]\nv = 'cost'",                      f"2: variants.v: {TABLE}\"cost\""),
    # words that are not known
    ("provider_priority = ['lokal']",
     f"1: provider_priority: {WORD}first-party-api, "),
    ("provider_priority = ['subscription']",
     f"1: provider_priority: {WORD}first-party-api, "),
    (OWN + "class = 'gatway'",
     f"3: providers.m.class: {WORD}first-party-api, "),
    (OWN + "auth = 'basic'",
     f"3: providers.m.auth: {WORD}native, bearer, api-key, got "),
    (OWN + "protocol_endpoints = {chat = 'https://x/v1'}",
     f"3: providers.m.protocol_endpoints.chat: {WORD}chat_completions, responses, "),
    (OWN + "compatibility.chat_completions.token_limit_field = 'max'",
     f"3: providers.m.compatibility.chat_completions.token_limit_field: {WORD}max_tokens, "),
    (MODEL + "capabilities = ['tool']",             f"5: {M}.capabilities: {WORD}tools, "),
    (MODEL + "reasoning_effort.levels = ['hi']",    f": {M}.reasoning_effort.levels: {WORD}none, "),
    (CHAIN + "[models.s]\nstrategy = 'ranked'",
     f"5: models.s.strategy: {WORD}priority, balance, "),
    (PRESET + "system_prompt = 'x'\nsystem_mode = 'append'",
     f"4: presets.p.system_mode: {WORD}fill, prepend, replace, got \"append\""),
    (PRESET + "structured = 'json'",
     f"3: presets.p.structured: {WORD}tool, got \"json\""),
    (PRESET + "output = 'xml'",
     f"3: presets.p.output: {WORD}json, got \"xml\""),
    (PRESET + "routing = {sort = 'latncy'}",        f"3: presets.p.routing.sort: {WORD}balanced, "),
    ("[variants.v.routing]\nsort = 'cheap'",
     f"2: variants.v.routing.sort: {WORD}balanced, "),
    # values that are out of bounds
    ("[server]\nworkers = 0",                       "2: server.workers: expected 1 or more, got 0"),
    ("[server]\nworkers = 257",
     "2: server.workers: expected 256 or less, got 257"),
    ("[upstream]\nfallback_backoff_ms = [1, -1]",
     "2: upstream.fallback_backoff_ms: expected 0 or more, got -1"),
    ("[upstream]\nhedge_after_ms = 0",
     "2: upstream.hedge_after_ms: expected 1 or more, "),
    (OWN + "priority = -1",
     "3: providers.m.priority: expected 0 or more, got -1"),
    (OWN + "rate_limits = {'*' = {requests_per_minute = 0}}",
     "3: providers.m.rate_limits.*.requests_per_minute: expected 1 or more, got 0"),
    (OWN + "timeouts = {connect_s = 0}",
     "3: providers.m.timeouts.connect_s: expected 0.01 or"),
    (OWN + "retry = {max = -1}",
     "3: providers.m.retry.max: expected 0 or more, got -1"),
    (MODEL + "context = -1",                        f"5: {M}.context: expected 0 or more, got -1"),
    (CHAIN + "weight = -1",
     "4: models.s.endpoints[0].weight: expected 0 or more"),
    (CHAIN + "weight = 0",                          f": models.s.endpoints: {WEIGHT}"),
    (PRESET + "routing.max_price.input = -1",
     "3: presets.p.routing.max_price.input: expected 0 or more, got -1"),
    ("[presets.p]\ncandidates = [{model = 'gpt-4o', weight = 0}]",
     f"2: presets.p.candidates: {WEIGHT}"),
    # names of what is not there
    (OWN + "derives = 'opnai'",
     "3: providers.m.derives: there is no provider 'opnai'; did you mean openai?"),
    (CHAIN.replace("openai", "opnai"),
     "2: models.s.endpoints[0].provider: there is no provider 'opnai'; did you mean openai?"),
    (PRESET + "routing = {order = ['opnai']}",
     "3: presets.p.routing.order[0]: there is no provider 'opnai'; did you mean openai?"),
    (PRESET + "routing = {only = ['opnai']}",
     "3: presets.p.routing.only[0]: there is no provider"),
    (PRESET + "routing = {ignore = ['xai', 'opnai']}",
     "3: presets.p.routing.ignore[1]: there is no provider 'opnai'"),
    (PRESET + "routing = {require_tags = ['eu']}",
     "3: presets.p.routing.require_tags[0]: no provider has the tag \"eu\""),
    ("[variants.v.routing]\nonly = ['opnai']",
     "2: variants.v.routing.only[0]: there is no provider 'opnai'; did you mean openai?"),
    ("[presets.p]\nmodel = 'zzz'",
     "2: presets.p.model: nobody serves a model \"zzz\"; "),
    ("[presets.p]\nmodel = '@q'",
     "2: presets.p.model: expected a model, not a preset"),
    ("[presets.p]\nmodel = 'opnai/gpt-4o'",
     "2: presets.p.model: there is no provider 'opnai'; did you mean openai?"),
    (PRESET + "params = {stream = true}",
     "3: presets.p.params.stream: only the request itself can say this"),
    (PRESET + "params = {temperature = nan}",
     "3: presets.p.params.temperature: expected JSON"),
    (PRESET + "params = {tools = 'x'}",
     "3: presets.p.params: tools: expected"),
    ("[presets.p]\nmodel = 'smrt'\n" + CHAIN.replace("models.s", "models.smart"),
     "2: presets.p.model: nobody serves a model \"smrt\"; did you mean smart?"),
    (PRESET + "fallbacks = ['gpt-4o', 'zzz']",
     "3: presets.p.fallbacks[1]: nobody serves a model"),
    (PRESET + "fallbacks = ['@fats']\n[presets.fast]\nmodel = 'gpt-4o'",
     "3: presets.p.fallbacks[0]: there is no preset \"fats\"; did you mean fast?"),
    ("[presets.p]\ncandidates = [{preset = 'q'}]",
     "2: presets.p.candidates[0].preset: there is no preset \"q\""),
    ("[presets.p]\ncandidates = [{model = 'zzz'}]",
     "2: presets.p.candidates[0].model: nobody serves a model \"zzz\""),
    # what contradicts itself
    (PRESET + "routing = {only = ['openai'], ignore = ['openai']}",
     "3: presets.p.routing.ignore: nobody is left of `only`"),
    (PRESET + "routing = {only = ['openai'], ignore = ['openai', 'xai']}",
     "3: presets.p.routing.ignore: nobody is left of `only`"),
    (PRESET + "routing = {only = ['gemini', 'xai'], ignore = ['xai', 'google']}",
     "3: presets.p.routing.ignore: nobody is left of `only`"),
    (PRESET + "system_mode = 'prepend'",
     "3: presets.p.system_mode: says nothing without a system_prompt"),
    (PRESET + "candidates = [{model = 'gpt-4o'}]",
     "3: presets.p.candidates: give model or candidates, not both"),
    ("[presets.p]\ncandidates = [{weight = 1}]",
     "2: presets.p.candidates[0]: expected model or preset, one of them"),
    (PRESET + "[presets.q]\ncandidates = [{model = 'gpt-4o', preset = 'p'}]",
     "4: presets.q.candidates[0]: expected model or preset, one of them"),
    (PRESET + "fallbacks = ['@p']",                 f"3: presets.p.fallbacks[0]: {OTHER}"),
    ("[presets.p]\ncandidates = [{preset = 'p'}]",  f"2: presets.p.candidates[0].preset: {OTHER}"),
    ("[presets.p]\ncandidates = [{preset = 'q'}]\n[presets.q]\nsystem_prompt = 'x'",
     f"2: presets.p.candidates[0].preset: {OTHER}"),
    (MODEL + "reasoning_effort = {levels = ['low'], default = 'high'}",
     f": {M}.reasoning_effort.default: expected one of levels, got \"high\""),
    (OWN + "extra_headers = [{name = 'a'}]",        f"3: providers.m.extra_headers[0]: {HEADER}"),
    (OWN + "extra_headers = [{name = 'a', delete = false}]",
     f"3: providers.m.extra_headers[0]: {HEADER}"),
    (OWN + "extra_headers = [{name = 'a', value = 'b', delete = true}]",
     f"3: providers.m.extra_headers[0]: {HEADER}"),
    (OWN + "extra_headers = [{name = 'a b', delete = true}]",
     "3: providers.m.extra_headers[0]: not fit for an HTTP header"),
    (OWN + "extra_headers = [{name = 'Host', delete = true}]",
     "3: providers.m.extra_headers[0]: this header is not yours to set"),
    (PRESET + "extra_headers = {Host = 'x'}",
     "3: presets.p.extra_headers.Host: this header is not yours to set"),
    (CHAIN + "extra_headers = {a = \"b\\n\"}",
     ": models.s.endpoints[0].extra_headers.a: not fit for an HTTP header"),
    # changes of the body
    (OWN + "extra_body = [{pointer = 'a', value = 1}]",
     f"3: providers.m.extra_body[0].pointer: {POINTER}\"a\""),
    (OWN + "extra_body = [{pointer = '', value = 1}]",
     f"3: providers.m.extra_body[0].pointer: {POINTER}\"\""),
    (OWN + "extra_body = [{pointer = '/~2', value = 1}]",
     f"3: providers.m.extra_body[0].pointer: {POINTER}\"/~2\""),
    (OWN + "extra_body = [{pointer = '/a~', value = 1}]",
     f"3: providers.m.extra_body[0].pointer: {POINTER}\"/a~\""),
    (OWN + "extra_body = [{pointer = '/a'}]",       f"3: providers.m.extra_body[0]: {EDIT}"),
    (OWN + "extra_body = [{pointer = '/a', delete = false}]",
     f"3: providers.m.extra_body[0]: {EDIT}"),
    (OWN + "extra_body = [{pointer = '/a', value = 1, delete = true}]",
     f"3: providers.m.extra_body[0]: {EDIT}"),
    (MODEL + "extra_body = [{pointer = 'a', value = 1}]",
     f": {M}.extra_body[0].pointer: {POINTER}"),
    (CHAIN + "extra_body = [{pointer = 'a', value = 1}]",
     f": models.s.endpoints[0].extra_body[0].pointer: {POINTER}"),
    (CHAIN + "[models.s]\nextra_body = [{pointer = '/a'}]", f": models.s.extra_body[0]: {EDIT}"),
    (PRESET + "extra_body = [{pointer = 'a', value = 1}]",
     f"3: presets.p.extra_body[0].pointer: {POINTER}"),
    # addresses
    (OWN + "protocol_endpoints = {responses = 'ftp://x'}",
     f"3: providers.m.protocol_endpoints.responses: {BASE}ftp://x/..."),
    (OWN + "protocol_endpoints = {messages = 'http://api.example.com'}",
     "3: providers.m.protocol_endpoints.messages: http:// would send your key in clear text to "),
    # names that clash, or that no request could ask for
    ("provider_priority = ['local', 'local']",
     "1: provider_priority: a class stands in it twice"),
    (MODEL + "[[providers.m.models]]\nid = 'a'",    f": {M}.id: \"a\" is declared 2 times"),
    ("[providers.google]\nactive = true\n[providers.gemini]\nactive = true",
     "3: providers.gemini: gemini is the same provider as google"),
    ("[providers.echo]\napi_base = 'http://h/v1'",  "1: providers.echo: echo is built in"),
    ("[providers.'a b']\napi_base = 'http://h/v1'",
     "1: providers.a b: expected an id of letters, "),
    ("[models.'@s']\nendpoints = [{provider = 'openai', service_id = 'x'}]",
     "1: models.@s: no request could ask for it"),
    ("[models.'']\nendpoints = [{provider = 'openai', service_id = 'x'}]",
     "1: models.: no request could ask for it"),
    ("[presets.'a b']\nmodel = 'gpt-4o'",           f"1: presets.a b: {NAME}"),
    ("[presets.'a/b']\nmodel = 'gpt-4o'",           f"1: presets.a/b: {NAME}"),
    ("[presets.'a:b']\nmodel = 'gpt-4o'",           f"1: presets.a:b: {NAME}"),
    ("[presets.'@a']\nmodel = 'gpt-4o'",            f"1: presets.@a: {NAME}"),
    ("[presets.'']\nmodel = 'gpt-4o'",              f"1: presets.: {NAME}"),
    ("[variants.'a b']\nrouting = {sort = 'cost'}", f"1: variants.a b: {NAME}"),
    *[(f"[variants.{name}]\nrouting = {{}}", f"1: variants.{name}: this variant is built in")
      for name in (*bitrouter.SORTS, *bitrouter.SORT_ALIASES)],
    # providers that derive from one another in a circle
    ("[providers.a]\nderives = 'a'",
     "2: providers.a.derives: goes round in a circle: a -> a"),
]
# fmt: on


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_what_cannot_be_is_refused_in_its_place(text: str, said: str) -> None:
    [problem] = read(text).problems
    line, _, message = problem.removeprefix("bitrouter.toml:").partition(": ")
    wanted_line, _, wanted = said.partition(": ")
    assert message.startswith(wanted)
    assert line == wanted_line or (not wanted_line and 0 < int(line) <= 1 + text.count("\n"))


def test_all_of_a_circle_are_told_its_way() -> None:
    tables = "".join(f"[providers.{a}]\nderives = '{b}'\n" for a, b in ("ab", "bc", "cb"))
    assert read(tables).problems == [
        "bitrouter.toml:2: providers.a.derives: goes round in a circle: a -> b -> c -> b",
        "bitrouter.toml:4: providers.b.derives: goes round in a circle: b -> c -> b",
        "bitrouter.toml:6: providers.c.derives: goes round in a circle: c -> b -> c",
    ]


def test_a_bad_word_is_told_with_its_near_miss() -> None:
    [problem] = read(OWN + "class = 'gatway'").problems
    assert problem.endswith('subscription, got "gatway"; did you mean gateway?')


MANY = """
inherit_default = true
[server]
workers = 0
[upstream]
hedge_after_ms = "1"
[providers.a]
derives = "b"
class = "gatway"
[providers.b]
derives = "a"
priority = -1
[models.s]
strategy = "ranked"
[[models.s.endpoints]]
provider = "opnai"
service_id = "x"
wieght = 1
[presets.p]
system_mode = "append"
extra_body = [{pointer = "a", value = 1}]
[presets.p.routing]
only = ["nobody"]
require_tags = ["nowhere"]
[presets.'x y']
model = "@fast"
fallbacks = ["@nobody"]
[variants.cost]
rooting = 1
"""


def test_all_problems_of_all_sections_are_told_at_once() -> None:
    assert sorted(
        (int(line), key)
        for line, key, _ in (said.split(":", 3)[1:] for said in read(MANY).problems)
    ) == [
        (2, " inherit_default"),
        (4, " server.workers"),
        (6, " upstream.hedge_after_ms"),
        (8, " providers.a.derives"),
        (9, " providers.a.class"),
        (11, " providers.b.derives"),
        (12, " providers.b.priority"),
        (14, " models.s.strategy"),
        (16, " models.s.endpoints[0].provider"),
        (18, " models.s.endpoints[0].wieght"),
        (20, " presets.p.system_mode"),
        (20, " presets.p.system_mode"),
        (21, " presets.p.extra_body[0].pointer"),
        (23, " presets.p.routing.only[0]"),
        (24, " presets.p.routing.require_tags[0]"),
        (25, " presets.x y"),
        (26, " presets.x y.model"),
        (27, " presets.x y.fallbacks[0]"),
        (28, " variants.cost"),
        (29, " variants.cost.rooting"),
    ]


# Variables that are not set, keys in files and keys of callers.

# fmt: off
UNSET = [
    # what names the variable, its place, and what cannot be used without it
    ("[providers.openai]\napi_key = '${V}'",       "2: providers.openai.api_key",
     "providers.openai"),
    ("[providers.openai]\nparams = {a = ['${V}']}", "2: providers.openai.params.a[0]",
     "providers.openai"),
    ("[providers.openai]\nextra_headers = {a = 'x${V}'}", "2: providers.openai.extra_headers.a",
     "providers.openai"),
    ("[providers.openai]\nextra_headers = [{name = 'a', value = '${V}'}]",
     "2: providers.openai.extra_headers[0]",       "providers.openai"),
    ("[providers.openai]\nextra_body = [{pointer = '/a', value = '${V}'}]",
     "2: providers.openai.extra_body[0].value",    "providers.openai"),
    (OWN.replace("//h", "//${V}"),                 "2: providers.m.api_base",      "providers.m"),
    (OWN + "protocol_endpoints = {messages = 'http://${V}/v1'}",
     "3: providers.m.protocol_endpoints.messages", "providers.m"),
    (MODEL + "provider_model_id = '${V}'",         f"5: {M}.provider_model_id",    "providers.m"),
    (CHAIN.replace("'x'", "'${V}'"),               "3: models.s.endpoints[0].service_id",
     "models.s"),
    (PRESET + "system_prompt = '${V}'",            "3: presets.p.system_prompt",   "presets.p"),
    (PRESET + "templates = {user = '${V}'}",       "3: presets.p.templates.user",  "presets.p"),
    (PRESET + "params = {user = '${V}'}",          "3: presets.p.params.user",     "presets.p"),
    ("[presets.p]\nmodel = '${V}'",                "2: presets.p.model",           "presets.p"),
    ("[variants.v.routing]\nsort = '${V}'",        "2: variants.v.routing.sort",   "variants.v"),
    ("[keys.me]\nkey = '${V}'",                    "2: keys.me.key",               "keys.me"),
    # the server itself
    ("[server]\nlisten = '${V}'",                  "2: server.listen",             ""),
    ("[server]\n\nbase_path = '${V}'",             "3: server.base_path",          ""),
    ("[server]\nallowed_hosts = ['a', '${V}']",    "2: server.allowed_hosts[1]",   ""),
]
# fmt: on


@pytest.mark.parametrize(("text", "place", "name"), UNSET)
def test_a_variable_that_is_not_set_breaks_what_uses_it(text: str, place: str, name: str) -> None:
    whole = (
        "[providers.xai]\napi_key = 'k'\n[models.w]\nendpoints = [{provider='xai', service_id='w'}]"
    )
    found = read(f"{text}\n{whole}")
    why = "the environment variable V is not set"
    said = f"bitrouter.toml:{place}: {why}"
    assert (found.problems, found.unset) == ([], [said])
    assert found.fatal == ([] if name else [said])
    broken = {(section, one): why for section, _, one in [name.partition(".")] if name}
    assert found.config.broken == broken
    assert "xai" in bitrouter.active_providers(found.config, {})[0]


@pytest.mark.parametrize(("text", "place", "name"), UNSET)
def test_a_variable_that_is_set_breaks_nothing(text: str, place: str, name: str) -> None:
    value = {"server.listen": "h:1", "server.base_path": "/x", "variants.v.routing.sort": "cost"}
    found = read(text, V=value.get(place.partition(": ")[2], "gpt-4o"))
    assert (found.problems, found.unset, found.fatal, found.config.broken) == ([], [], [], {})


def test_each_variable_that_is_not_set_is_told() -> None:
    text = "[providers.openai]\napi_key = '${A}${B}'\n[keys.me]\nkey = '${A}'"
    assert [said.partition(": ")[2] for said in read(text).unset] == [
        "providers.openai.api_key: the environment variable A is not set",
        "providers.openai.api_key: the environment variable B is not set",
        "keys.me.key: the environment variable A is not set",
    ]


def test_a_caller_s_key_that_is_not_there_is_nobody_s() -> None:
    text = "[keys.me]\nkey = '${A}'\n[keys.you]\nkey = 'file:nowhere'\n[keys.she]\nkey = 'k'"
    assert list(read(text).config.keys) == ["she"]
    assert list(read(text, A="k2").config.keys) == ["me", "she"]


@pytest.mark.parametrize("text", ["${V:-gpt-4o}", "${V:-}gpt-4o", "gpt-4o"])
def test_a_variable_with_a_default_need_not_be_set(text: str) -> None:
    assert config_of(f"[presets.p]\nmodel = '{text}'").presets["p"].model == "gpt-4o"


def test_a_sum_in_a_prompt_is_written_with_two_dollars() -> None:
    text = "[presets.p]\nmodel = 'gpt-4o'\nsystem_prompt = 'say $${NAME} and $5'"
    assert config_of(text).presets["p"].system_prompt == "say ${NAME} and $5"


def test_variables_are_put_into_the_leaves_of_params() -> None:
    text = "[presets.p]\nparams = {a = {b = ['${V}', 1, true]}, '${V}' = '${V}'}"
    assert config_of(text, V="x").presets["p"].params == {"a": {"b": ["x", 1, True]}, "${V}": "x"}


def test_a_key_is_read_from_a_file() -> None:
    text = "[providers.openai]\napi_key = 'file:base.key'\n[keys.me]\nkey = 'file:${D}base.key'"
    found = read(text, D="")
    assert found.config.providers["openai"].api_key == Secret(KEY_FILE)
    assert found.files == ("base.key", "base.key")
    on = active("[providers.openai]\naccounts = [{label = 'a', api_key = 'file:base.key'}]")
    assert [a.api_key for a in on["openai"].accounts] == [Secret(KEY_FILE)]


# fmt: off
UNREADABLE: list[tuple[Exception, str]] = [
    (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
    (PermissionError(13, "Permission denied"),          "Permission denied"),
    (IsADirectoryError(21, "Is a directory"),           "Is a directory"),
    (OSError("gone"),                                   "gone"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "'utf-8' codec"),
]
# fmt: on


@pytest.mark.parametrize(("error", "why"), UNREADABLE, ids=repr)
def test_a_key_file_that_cannot_be_read_is_told_and_breaks_its_provider(
    error: Exception, why: str
) -> None:
    def fails(name: str) -> str:
        raise error

    text = "[providers.openai]\napi_key = 'file:no/such.key'\n[providers.xai]\napi_key = 'k'"
    found = parse_config(text, {}, read_file=fails)
    said = "bitrouter.toml:2: providers.openai.api_key: the file no/such.key cannot be read: "
    [unset] = found.unset
    assert unset.startswith(said + why) and (found.problems, found.fatal) == ([], [])
    assert found.files == ("no/such.key",)
    assert list(found.config.broken) == [("providers", "openai")]
    on, warnings = bitrouter.active_providers(found.config, {})
    assert list(on) == ["xai"] and ["openai is off: " in one for one in warnings] == [True]


def test_without_a_reader_no_file_is_opened() -> None:
    found = parse_config("[providers.openai]\napi_key = 'file:/etc/hostname'", {})
    assert found.config.providers["openai"].api_key == Secret("")
    assert (found.problems, found.unset, found.files) == ([], [], ("/etc/hostname",))


def test_only_keys_are_read_from_files() -> None:
    text = "[presets.p]\nmodel = 'gpt-4o'\nsystem_prompt = 'file:base.key'"
    found = read(text)
    assert found.config.presets["p"].system_prompt == "file:base.key" and found.files == ()


@pytest.mark.parametrize("name", ["x-team-key", "X-Team-Key", "x-api-key"])
def test_a_key_may_be_taken_from_the_caller_s_header(name: str) -> None:
    on = active(f"[providers.openai]\napi_key = 'request:{name}'")["openai"]
    [account] = on.accounts
    assert bitrouter.header_of(account.api_key) == name.lower()
    assert on.enabled_by == f"the caller's header {name}"


def test_a_plain_key_is_of_no_header() -> None:
    assert not bitrouter.header_of(Secret("sk-request:x"))


# Who is on, by these keys.


def test_a_provider_that_derives_has_the_ways_of_another_and_a_key_of_its_own() -> None:
    on = active("[providers.eu]\nderives = 'gemini'\napi_key = 'k'", GEMINI_API_KEY="g")
    assert on["eu"].facts.bases == bitrouter.PROVIDERS["google"].bases
    assert (on["eu"].like, on["eu"].facts.id, on["google"].like) == ("google", "eu", "google")
    assert [a.api_key.reveal() for one in on.values() for a in one.accounts] == ["g", "k"]


@pytest.mark.parametrize("base", ["openai", "mine"])
def test_a_provider_that_derives_does_not_borrow_the_key(base: str) -> None:
    text = f"[providers.eu]\nderives = '{base}'\n{OWN.replace('.m]', '.mine]')}api_key = 'k'"
    assert list(active(text, OPENAI_API_KEY="k")) == ["openai", "mine"]
    assert "eu" in active(text, OPENAI_API_KEY="k", EU_API_KEY="e")


def test_a_provider_may_derive_from_one_that_derives() -> None:
    text = """
providers.a = {derives = "b", api_key = "k"}
providers.b = {derives = "mistral"}
"""
    on = active(text)
    assert list(on) == ["a"] and on["a"].like == "mistral"
    assert on["a"].facts.bases == bitrouter.PROVIDERS["mistral"].bases


def test_protocol_endpoints_are_bases_of_their_own() -> None:
    text = OWN + "protocol_endpoints = {messages = 'https://h/claude/v1/', openai = 'https://o/v1'}"
    assert active(text)["m"].facts.bases == {
        MESSAGES: "https://h/claude/v1",
        CHAT: "https://o/v1",
    }
    text = "[providers.openai]\napi_key = 'k'\nprotocol_endpoints = {responses = 'https://r/v1'}"
    bases = active(text)["openai"].accounts[0].bases
    assert bases == {CHAT: "https://api.openai.com/v1", RESPONSES: "https://r/v1"}


# fmt: off
KINDS = [
    ("first-party-api", "api"), ("third-party-api", "api"), ("local", "local"),
    ("gateway", "gateway"), ("bitrouter-cloud", "gateway"), ("subscription", "plan"),
]
# fmt: on


@pytest.mark.parametrize(("word", "kind"), KINDS)
def test_a_class_makes_a_provider_one_of_its_kind(word: str, kind: str) -> None:
    assert active(OWN + f"class = '{word}'")["m"].facts.kind == kind


def test_every_class_has_a_kind() -> None:
    assert {word for word, _ in KINDS} == {*bitrouter.CLASSES, "subscription"}


def test_a_provider_that_is_not_active_is_not_used() -> None:
    assert active(OWN + "active = false") == {}
    text = "[providers.gemini]\nactive = false\napi_key = 'k'"
    assert list(active(text, GEMINI_API_KEY="k", OPENAI_API_KEY="k")) == ["openai"]


def test_without_defaults_only_the_file_s_providers_are_on() -> None:
    keys = {"OPENAI_API_KEY": "k", "GEMINI_API_KEY": "k", "XAI_API_KEY": "k"}
    text = "inherit_defaults = false\n[providers.gemini]\n" + OWN
    assert {*active(text, **keys)} == {"google", "m"}
    assert {*active(text.replace("false", "true"), **keys)} == {"google", "openai", "xai", "m"}
    assert active("inherit_defaults = false", **keys) == {}


def test_header_lines_and_the_way_of_the_key_are_the_file_s() -> None:
    text = OWN + "auth = 'native'\nextra_headers = {X-A = '1'}\ntimeouts = {idle_s = 3}"
    on = active(text + "\n[upstream.timeouts]\nconnect_s = 4")["m"]
    assert (on.facts.headers, on.facts.auth) == ({"x-a": "1"}, "native")
    assert (on.timeouts.idle_s, on.timeouts.connect_s, on.given.timeouts.connect_s) == (3, 4, None)


# The same in JSON.


def test_a_json_file_says_the_same() -> None:
    text = json.dumps(tomllib.loads(ROUTED), indent=1)
    assert read(text, "c.json").problems == []
    assert read(text, "c.json").config == read(ROUTED).config


def as_json(text: str) -> str:
    return json.dumps(tomllib.loads(text), indent=1, default=str)


@pytest.mark.parametrize("text", [text for text, *_ in UNKNOWN])
def test_a_json_file_has_the_same_faults(text: str) -> None:
    [problem] = read(as_json(text), "c.json").problems
    place, _, said = problem.partition(": ")
    assert read(text).problems[0].partition(": ")[2] == said
    key = said.partition(": unknown key")[0].rpartition(".")[2]
    assert f'"{key}"' in as_json(text).split("\n")[int(place.removeprefix("c.json:")) - 1]


# Secrets.

HELD = "sk-very-secret-0123456789"
# fmt: off
LEAKS = [
    # a problem beside a key, or a key in a wrong place
    f"[providers.m]\napi_key = '{HELD}'",
    f"[providers.m]\napi_base = 'http://h'\napi_keys = ['{HELD}']",
    f"[providers.openai]\napi_key = '{HELD}'\nderives = 'opnai'",
    f"[providers.openai]\napi_key = 'file:{HELD}\n'",
    f"[providers.openai]\nprotocol_endpoints = {{messages = 'ftp://{HELD}@h/v1'}}",
    f"[providers.openai]\nprotocol_endpoints = '{HELD}'",
    f"[providers.openai]\nextra_headers = ['{HELD}']",
    f"[providers.openai]\nextra_headers = [{{name = 'a', valu = '{HELD}'}}]",
    f"[providers.openai]\nextra_headers = [{{name = 'a', value = ['{HELD}']}}]",
    f"[providers.openai]\nextra_headers = [{{name = 'a', value = '{HELD}', delete = true}}]",
    f"[providers.openai]\nparams = '{HELD}'",
    f"[providers.openai]\nextra_body = '{HELD}'",
    f"[providers.openai]\nextra_body = [{{pointer = '/a', valu = '{HELD}'}}]",
    f"[providers.openai]\nextra_body = ['{HELD}']",
    f"[providers.openai]\nrate_limits = '{HELD}'",
    f"[providers.openai]\ntags = '{HELD}'",
    f"[keys.me]\nkey = '{HELD}'\nname = 1",
    f"api_key = '{HELD}'",
]
# fmt: on


@pytest.mark.parametrize("text", LEAKS)
def test_no_problem_shows_a_key(text: str) -> None:
    assert read(text).problems and HELD not in "".join(read(text).problems)


HIDDEN = f"""
[keys.me]
key = "{HELD}"
[providers.openai]
accounts = [{{label = "a", api_key = "{HELD}"}}]
extra_headers = {{authorization = "{HELD}"}}
[providers.xai]
api_key = "${{SECRET}}"
[[models.s.endpoints]]
provider = "openai"
service_id = "x"
extra_headers = [{{name = "authorization", value = "{HELD}"}}]
[presets.p]
model = "gpt-4o"
extra_headers = {{x-key = "${{SECRET}}"}}
"""


def test_no_setting_shows_a_key() -> None:
    found = read(HIDDEN, SECRET=HELD)
    shown = list(bitrouter.settings_of(found))
    assert found.problems == [] and HELD not in repr(shown)
    assert {one.key for one in shown if one.value in ("[redacted]", "[from SECRET]")} == {
        "keys.me.key",
        "providers.openai.accounts[0].api_key",
        "providers.openai.extra_headers.authorization",
        "providers.xai.api_key",
        "models.s.endpoints[0].extra_headers.authorization",
        "presets.p.extra_headers.x-key",
    }


def test_a_setting_from_a_variable_is_shown_unless_it_may_hold_a_key() -> None:
    found = read(
        "[providers.m]\napi_base = 'http://${HOST}/v1'\nclass = '${CLASS}'\n"
        "[presets.p]\nmodel = 'openai/${MODEL}'\nparams = {a = '${SECRET}'}",
        HOST=f"u:{HELD}@h", CLASS="gateway", MODEL="gpt-4o", SECRET=HELD,
    )  # fmt: skip
    shown = {one.key: one.value for one in bitrouter.settings_of(found)}
    assert HELD not in repr(shown)
    assert (shown["providers.m.class"], shown["presets.p.model"]) == ("gateway", "openai/gpt-4o")
    assert shown["providers.m.api_base"] == "http://h/[from HOST]"


def test_a_prompt_from_a_variable_is_shown_as_it_is() -> None:
    found = read("[presets.p]\nmodel = 'm'\nsystem_prompt = 'In ${TONGUE}.'", TONGUE="Welsh")
    shown = {one.key: one.value for one in bitrouter.settings_of(found)}
    assert shown["presets.p.system_prompt"] == "In Welsh."


def test_a_name_that_stands_twice_in_a_json_file_is_a_problem() -> None:
    text = '{"presets": {"p": {"model": "a"}, "q": {"model": "b"}, "p": {"model": "c"}}}'
    found = bitrouter.parse_config(text, {}, "bitrouter.json")
    assert found.problems == ['bitrouter.json: given twice in one object: "p"']


@pytest.mark.parametrize("name", ["bitrouter.toml", "bitrouter.json"])
def test_a_byte_order_mark_is_no_problem(name: str) -> None:
    text = (
        '{"presets": {"p": {"modle": "a"}}}'
        if name.endswith("json")
        else "[presets.p]\nmodle = 'a'"
    )
    [problem] = bitrouter.parse_config(f"\ufeff{text}", {}, name).problems
    assert problem.startswith(f"{name}:") and "modle" in problem


def test_virtual_models_and_presets_are_listed_with_what_their_targets_can_do() -> None:
    own = """
    [providers.one]
    api_base = "http://127.0.0.1:1/v1"
    api_key = "k"
    [[providers.one.models]]
    id = "m"
    context = 900
    capabilities = ["tools", "reasoning"]
    pricing = {input = 1, output = 2}
    [[providers.one.models]]
    id = "n"
    context = 500
    capabilities = ["reasoning", "image_input"]
    pricing = {input = 9, output = 9}
    [models.both]
    endpoints = [{provider = "one", service_id = "m"}, {provider = "one", service_id = "n"}]
    [presets.first]
    model = "one:m"
    """
    config = read(own).config
    active, _ = bitrouter.active_providers(config, {})
    listed = {one.id: one for one in bitrouter.Router(config, active).listing()}
    both, first = listed["both"], listed["@first"]
    assert (both.able, both.context, both.price.input) == (("reasoning",), 500, 1.0)
    assert (first.able, first.context, first.price.input) == (("tools", "reasoning"), 900, 1.0)


def test_a_number_in_a_wrong_place_is_shown_unless_it_may_be_a_key() -> None:
    found = read(OWN + "priority = 1.5\napi_key = 12345\nextra_headers = {a = 6789}")
    assert "got 1.5" in found.problems[0]
    assert "12345" not in repr(found.problems) and "6789" not in repr(found.problems)


# The schema.

SCHEMA = bitrouter.config_schema()
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
    "integer": (int,), "number": (int, float),
}  # fmt: skip


def is_type(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean") is isinstance(value, bool)


# fmt: off
CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    # what each keyword asks of a value, and what is asked of the values inside it
    "type":     is_type,
    "enum":     lambda value, words: value in words,
    "pattern":  lambda value, regex: isinstance(value, str) and bool(re.search(regex, value)),
    "const":    lambda value, wanted: value == wanted and type(value) is type(wanted),
    "minimum":  lambda value, least: not is_type(value, "number") or value >= least,
    "maximum":  lambda value, most: not is_type(value, "number") or value <= most,
    "required": lambda value, names: not isinstance(value, dict) or {*names} <= {*value},
    "anyOf":    lambda value, schemas: any(not [*misfits(value, one)] for one in schemas),
    "$ref":     lambda value, name: not [*misfits(value, SCHEMA["$defs"][name.split("/")[-1]])],
}
# fmt: on
INNER = {"properties", "additionalProperties", "items", "$defs"}
SILENT = {"$schema", "title", "description"}


def misfits(value: Any, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """Where a value does not fit a schema, for the keywords that ours has."""
    assert {*schema} <= {*CHECKS} | INNER | SILENT
    if not all(check(value, schema[word]) for word, check in CHECKS.items() if word in schema):
        yield at
    for key, one in value.items() if isinstance(value, dict) else ():
        inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
        if inner is False:
            yield f"{at}.{key}"
        else:
            yield from misfits(one, inner, f"{at}.{key}")
    for i, one in enumerate(value if isinstance(value, list) else ()):
        yield from misfits(one, schema.get("items", {}), f"{at}[{i}]")


@pytest.mark.parametrize("text", [FULL, ROUTED, HIDDEN, ""], ids=["full", "routed", "hidden", "no"])
def test_what_is_valid_fits_the_schema(text: str) -> None:
    assert read(text, **SECRETS, SECRET="s").problems == []
    assert list(misfits(tomllib.loads(text), SCHEMA)) == []


@pytest.mark.parametrize("text", [text for text, *_ in UNKNOWN])
def test_no_unknown_key_fits_the_schema(text: str) -> None:
    assert list(misfits(tomllib.loads(text), SCHEMA)) != []


# fmt: off
KINDS_OF_FAULT = (
    "expected a ", "expected true", "expected one of ", "expected 0", "expected 1 ", "expected 256",
)
MISFITS = [
    text for text, said in REFUSED
    if said.partition(": ")[2].partition(": ")[2].startswith(KINDS_OF_FAULT)
    and WEIGHT not in said and NAME not in said and POINTER not in said and HEADER not in said
    and "pointer" not in text and "model, not a preset" not in said and "one of levels" not in said
    and "one of them" not in said and "protocol_endpoints.chat" not in said
]
# fmt: on


@pytest.mark.parametrize("text", MISFITS)
def test_no_value_of_another_kind_fits_the_schema(text: str) -> None:
    assert list(misfits(json.loads(as_json(text).replace('"2020-01-01"', "null")), SCHEMA)) != []


def tables(kind: Any, seen: dict[str, Any]) -> dict[str, Any]:
    """The dataclasses that a configuration is made of."""
    if is_dataclass(kind) and kind.__name__ not in seen:  # type: ignore[union-attr]
        seen[kind.__name__] = kind  # type: ignore[union-attr]
        for hint in get_type_hints(kind).values():
            tables(hint, seen)
    for inner in get_args(kind):
        tables(inner, seen)
    return seen


TABLES = tables(Config, {})


def test_there_are_tables_to_look_at() -> None:
    assert {"Config", "Server", "ProviderConfig", "DeclaredModel", "Endpoint", "Preset"} <= {
        *TABLES
    }
    assert {*SCHEMA["$defs"]} == {*TABLES} - {"Config"}


@pytest.mark.parametrize("name", TABLES)
def test_every_key_is_in_the_schema_and_no_other_is_allowed(name: str) -> None:
    schema = SCHEMA if name == "Config" else SCHEMA["$defs"][name]
    own = [one for one in fields(TABLES[name]) if not one.metadata.get("inner")]
    assert list(schema["properties"]) == [one.metadata.get("key") or one.name for one in own]
    assert (schema["type"], schema["additionalProperties"]) == ("object", False)


def test_the_examples_have_every_key_of_the_schema() -> None:
    named = {key for table in (SCHEMA, *SCHEMA["$defs"].values()) for key in table["properties"]}
    assert {
        key
        for key in named
        if f"{key} =" not in FULL + ROUTED
        and f"{key}." not in FULL + ROUTED
        and f"[{key}" not in FULL + ROUTED
        and f".{key}]" not in FULL + ROUTED
    } == set()


# What is in force.


def settings(text: str, name: str = "c.toml", **environ: str) -> dict[str, tuple[Any, str]]:
    found = read(text, name, **environ)
    assert found.problems == []
    return {one.key: (one.value, one.origin) for one in bitrouter.settings_of(found)}


IN_FORCE = """\
inherit_defaults = false
[server]
workers = 2
base_path = "/${WHERE}"
allowed_hosts = ["a", "${WHERE}"]
[upstream]
retry.max = 1
timeouts = {idle_s = 5}
[keys.me]
key = "${ME}"
[providers.openai]
api_key = "sk-plain"
class = "gateway"
priority = 3
params = {a = {b = [1, 2]}}
rate_limits = {"gpt-*" = {requests_per_minute = 9}}
api_protocol = {"*" = ["responses"]}
extra_headers = {x-a = "1"}
[providers.openai.timeouts]
total_s = 6
[[providers.openai.models]]
id = "first"
[[providers.openai.models]]
id = "second"
context = 7
[models.s]
strategy = "cascade"
[[models.s.endpoints]]
provider = "openai"
service_id = "${WHERE}/${ME}"
[presets.p]
model = "gpt-4o"
routing = {sort = "cost", max_price.input = 2}
[variants.v.routing]
require_parameters = true
"""

# fmt: off
ORIGINS = {  # ... for a value that may be shown or hidden
    "inherit_defaults":                       (False,         "c.toml:1"),
    "server.workers":                         (2,             "c.toml:3"),
    "server.base_path":                       ("/here",       "c.toml:4, from WHERE"),
    "server.allowed_hosts":                   (["a", "here"], "c.toml:5, from WHERE"),
    "server.listen":                          ("127.0.0.1:4356", "default"),
    "upstream.retry.max":                     (1,             "c.toml:7"),
    "upstream.retry.base_ms":                 (250,           "default"),
    "upstream.timeouts.idle_s":               (5,             "c.toml:8"),
    "upstream.timeouts.total_s":              (600,           "default"),
    "upstream.hedge_after_ms":                (None,          "default"),
    "keys.me.key":                            (..., "c.toml:10, from ME"),
    "providers.openai.api_key":               ("[redacted]",  "c.toml:12"),
    "providers.openai.class":                 ("gateway",     "c.toml:13"),
    "providers.openai.priority":              (3,             "c.toml:14"),
    "providers.openai.params.a.b":            ([1, 2],        "c.toml:15"),
    "providers.openai.rate_limits.gpt-*.requests_per_minute": (9, "c.toml:16"),
    "providers.openai.rate_limits.gpt-*.tokens_per_minute":   (None, "default"),
    "providers.openai.api_protocol.*":        (["responses"], "c.toml:17"),
    "providers.openai.extra_headers.x-a":     ("[redacted]",  "c.toml:18"),
    "providers.openai.timeouts.total_s":      (6,             "c.toml:20"),
    "providers.openai.timeouts.idle_s":       (None,          "default"),
    "providers.openai.active":                (True,          "default"),
    "providers.openai.models[0].id":          ("first",       "c.toml:22"),
    "providers.openai.models[1].id":          ("second",      "c.toml:24"),
    "providers.openai.models[1].context":     (7,             "c.toml:25"),
    "providers.openai.models[0].context":     (0,             "default"),
    "models.s.strategy":                      ("cascade",     "c.toml:27"),
    "models.s.endpoints[0].provider":         ("openai",      "c.toml:29"),
    "models.s.endpoints[0].service_id":       (..., "c.toml:30, from WHERE, from ME"),
    "models.s.endpoints[0].weight":           (1,             "default"),
    "presets.p.model":                        ("gpt-4o",      "c.toml:32"),
    "presets.p.routing.sort":                 ("cost",        "c.toml:33"),
    "presets.p.routing.max_price.input":      (2,             "c.toml:33"),
    "presets.p.routing.max_price.output":     (None,          "default"),
    "variants.v.routing.require_parameters":  (True,          "c.toml:35"),
    "variants.v.routing.sort":                ("",            "default"),
}
# fmt: on


@pytest.mark.parametrize("key", ORIGINS)
def test_a_value_in_force_is_shown_with_its_origin(key: str) -> None:
    (value, origin), (wanted, where) = settings(IN_FORCE, WHERE="here", ME="k")[key], ORIGINS[key]
    assert (value if wanted is not ... else ..., origin) == (wanted, where)


def test_in_a_json_file_values_have_lines_too() -> None:
    text = '{\n "server": {\n  "workers": 2,\n  "auth": "${A}"},\n "presets": {"p": {}}}'
    shown = settings(text, "c.json", A="none")
    assert shown["server.workers"] == (2, "c.json:3")
    assert shown["server.auth"] == ("none", "c.json:4, from A")
    assert shown["server.listen"] == ("127.0.0.1:4356", "default")


def test_without_a_file_all_is_by_default() -> None:
    shown = settings("")
    assert {origin for _, origin in shown.values()} == {"default"}
    assert shown["presets"] == (None, "default")


def test_what_is_in_force_is_json() -> None:
    for one in bitrouter.settings_of(read(ROUTED)):
        assert json.loads(json.dumps(one.value)) == one.value, one


def leaves(raw: Any, at: str = "") -> Iterator[str]:
    if isinstance(raw, dict):
        for key, one in raw.items():
            yield from leaves(one, f"{at}.{key}".lstrip("."))
    else:
        yield at


def test_all_that_the_file_says_is_shown() -> None:
    told = set(settings(IN_FORCE, WHERE="here", ME="k"))
    raw = tomllib.loads(IN_FORCE)
    raw["providers"]["openai"].pop("models")  # lists of tables have keys with numbers
    raw["models"]["s"].pop("endpoints")
    assert set(leaves(raw)) - told == set()


# The command line.


def test_a_file_is_validated_with_all_its_counts(run: Callable[..., Ran]) -> None:
    ran = run("config", "validate", text=IN_FORCE)
    facts = ran.json()
    counts = {name: facts[name] for name in ("providers", "models", "presets", "variants")}
    assert counts == {"providers": 1, "models": 1, "presets": 1, "variants": 1}
    assert (ran.status, facts["valid"], facts["path"], facts["errors"]) == (0, True, "c.toml", [])
    assert [said.partition(": ")[0] for said in facts["warnings"]] == [
        "c.toml:4", "c.toml:5", "c.toml:10", "c.toml:30", "c.toml:30",
    ]  # fmt: skip
    assert run("config", "validate", text=IN_FORCE, WHERE="x", ME="k").json()["warnings"] == []


def test_a_broken_file_is_told_all_its_problems(run: Callable[..., Ran]) -> None:
    ran = run("config", "validate", text=MANY)
    told = [said.replace("c.toml", "bitrouter.toml") for said in ran.json()["errors"]]
    assert (ran.status, ran.json()["valid"], told) == (1, False, read(MANY).problems)
    lines = run("config", "validate", "--human", text=MANY).out.splitlines()
    assert [line.split()[0] for line in lines] == ["error"] * len(told)


def test_a_key_file_is_looked_for_beside_the_configuration(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    text = "[providers.openai]\napi_key = 'file:keys/a.key'"
    [warning] = run("config", "validate", text=text).json()["warnings"]
    assert warning.startswith("c.toml:2: providers.openai.api_key: the file keys/a.key cannot be")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "a.key").write_text(f"{HELD}\n")
    assert run("config", "validate", text=text).json()["warnings"] == []
    ran = run("config", "show", text=text)
    assert ran.json()["providers"] == {"openai": "the configuration"} and HELD not in ran.out


def test_the_schema_is_printed(run: Callable[..., Ran]) -> None:
    ran = run("config", "schema")
    assert (ran.status, ran.json(), ran.err) == (0, SCHEMA, "")
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_what_is_in_force_is_printed_with_origins(run: Callable[..., Ran]) -> None:
    ran = run("config", "show", text=IN_FORCE, WHERE="here", ME="k", XAI_API_KEY="k")
    facts = ran.json()
    shown = {one["key"]: (one["value"], one["origin"]) for one in facts["settings"]}
    assert shown == settings(IN_FORCE, WHERE="here", ME="k")
    assert (ran.status, facts["path"], facts["warnings"]) == (0, "c.toml", [])
    assert facts["providers"] == {"openai": "the configuration"}
    human = run("config", "show", "--human", text=IN_FORCE, WHERE="here", ME="k").out
    rows = [line.split() for line in human.splitlines()]
    assert ["server.workers", "2", "c.toml:3"] in rows
    assert ["upstream.retry.base_ms", "250.0", "default"] in rows
    assert ["providers.openai", "on", "the", "configuration"] in rows


def test_without_a_file_the_defaults_are_printed(run: Callable[..., Ran]) -> None:
    facts = run("config", "show", XAI_API_KEY="k").json()
    assert (facts["path"], facts["providers"]) == (None, {"xai": "XAI_API_KEY"})
    assert {one["origin"] for one in facts["settings"]} == {"default"}


def test_what_is_unset_is_printed_and_no_error(run: Callable[..., Ran]) -> None:
    ran = run("config", "show", text="[keys.me]\nkey = '${ME}'\n[presets.p]\nmodel = '${P}'")
    told = [said.partition(": ")[0] for said in ran.json()["warnings"]]
    assert (ran.status, told) == (0, ["c.toml:2", "c.toml:4"])


def test_of_a_broken_file_nothing_is_printed_but_its_problems(run: Callable[..., Ran]) -> None:
    status, out, err = run("config", "show", text=MANY)
    assert (status, out) == (1, "")
    assert all(said.replace("bitrouter.toml", "c.toml") in err for said in read(MANY).problems)


@pytest.mark.parametrize("form", ["--json", "--human"])
def test_no_key_is_printed(form: str, run: Callable[..., Ran]) -> None:
    for command in ("show", "validate"):
        ran = run("config", command, form, text=HIDDEN, SECRET=HELD, OPENAI_API_KEY=HELD)
        assert ran.status == 0 and HELD not in ran.out + ran.err


@pytest.mark.parametrize("text", LEAKS)
def test_no_key_is_printed_with_a_problem(text: str, run: Callable[..., Ran]) -> None:
    for command in (("config", "show"), ("config", "validate"), ("models",)):
        ran = run(*command, text=text)
        assert ran.status == 1 and HELD not in ran.out + ran.err


# Random configurations: each valid, until one line of it is changed.


class Line(NamedTuple):
    """A line of a file. kind: what its value is, or "" for a header or a remark."""

    text: str
    kind: str = ""
    table: str = ""

    @property
    def key(self) -> str:
        return self.text.partition(" = ")[0]


# fmt: off
VALUES: dict[str, tuple[list[str], list[str]]] = {
    # kind:      values that fit,                          and that do not
    "text":      (['"x"', '"two words"', "'é'"],           ["3", "true", '["x"]']),
    "whole":     (["1", "7", "200"],                       ["1.5", '"1"', "true", "-1", "{}"]),
    "number":    (["1", "2.5", "1e3"],                     ['"1"', "true", "-1", "[1]", "nan"]),
    "flag":      (["true", "false"],                       ['"yes"', "0", "[]"]),
    "texts":     (["[]", '["a"]', '["a", "b"]'],           ['"a"', "3", "[[]]", "{}"]),
    "table":     (["{}", '{a = 1}', '{a = {b = [1, "x"]}}'], ["3", '"x"', "[]", "1979-05-27"]),
    "numbers":   (["[]", "[1]", "[1, 2.5]"],               ['"1"', '["1"]', "[-1]", "{}"]),
    "class":     (['"local"', '"gateway"'],                ['"lokal"', '"x"', "3"]),
    "strategy":  (['"priority"', '"balance"', '"cascade"'], ['"ranked"', "3", "[]"]),
    "sort":      (['"cost"', '"latency"', '"nitro"'],      ['"cheap"', "3", "[]"]),
    "able":      (["[]", '["tools"]', '["reasoning", "tools"]'], ['["tool"]', '"tools"', "3"]),
    "base":      (['"http://h/v1"', '"https://h.example/v1"'], ['"h/v1"', '"ftp://h"', "3"]),
    "provider":  (['"openai"', '"gemini"', '"p0"'],        ['"nobody"', '"opnai"', "3", "[]"]),
    "providers": (['["openai"]', '["p0", "xai"]'],         ['["nobody"]', '["xai", "opnai"]', "3"]),
    "model":     (['"gpt-4o"', '"openai/gpt-4o"', '"m0"'], ['"zzz"', '"@p"', "3", "[]"]),
    "models":    (["[]", '["gpt-4o", "m0"]'],              ['["zzz"]', '["gpt-4o", "@p"]', "3"]),
    "mode":      (['"fill"', '"prepend"', '"replace"'],    ['"append"', "3"]),
    "edits":     (["[]", '[{pointer = "/a", value = 1}]', '[{pointer = "/a/-", delete = true}]'],
                  ['[{pointer = "a", value = 1}]', '[{pointer = "/a"}]', "3",
                   '[{pointer = "/a", value = 1, delete = true}]', '[{pointr = "/a"}]']),
    "headers":   (["{}", '{x-a = "1"}', '[{name = "a", delete = true}]'],
                  ['{x-a = 1}', "3", '{"a b" = "1"}', '{host = "x"}', '[{name = "a"}]']),
    "limits":    (["{}", '{"*" = {requests_per_minute = 1}}', '[{"a*" = {tokens_per_minute = 9}}]'],
                  ['{"*" = {request_per_minute = 1}}', '{"*" = 3}', "3",
                   '[{"a*" = {tokens_per_minute = 0}}]']),
}
SHAPING = {"params": "table", "extra_body": "edits", "extra_headers": "headers"}
KEYS: dict[str, dict[str, str]] = {
    "server":    {"workers": "whole", "max_body_mb": "number", "allowed_hosts": "texts"},
    "upstream":  {"fallback_backoff_ms": "numbers", "hedge_after_ms": "number"},
    "upstream.retry": {"max": "whole", "base_ms": "number"},
    "provider":  {"priority": "whole", "class": "class", "tags": "texts", "active": "flag",
                  "auto_discover": "flag", "rate_limits": "limits", **SHAPING},
    "timeouts":  {"connect_s": "number", "idle_s": "number", "total_s": "number"},
    "declared":  {"context": "whole", "capabilities": "able", "provider_model_id": "text",
                  **SHAPING},
    "model":     {"strategy": "strategy", "params": "table"},
    "endpoint":  {"weight": "number", "name": "text", "params": "table"},
    "preset":    {"system_mode": "mode", "fallbacks": "models", **SHAPING},
    "routing":   {"sort": "sort", "order": "providers", "only": "providers",
                  "allow_fallbacks": "flag", "require_parameters": "flag"},
    "max_price": {"input": "number", "output": "number"},
}
# fmt: on


def keys(rng: random.Random, table: str, **needed: str) -> Iterator[Line]:
    some = [key for key in KEYS[table] if rng.random() < 0.5]
    chosen = [*needed, *some]
    rng.shuffle(chosen)
    for key in chosen:
        kind = needed.get(key) or KEYS[table][key]
        yield Line(f"{key} = {rng.choice(VALUES[kind][0])}", kind, table)


def configuration(rng: random.Random) -> Iterator[Line]:
    """A valid file, line by line."""
    for table in ("server", "upstream", "upstream.retry"):
        yield Line(f"[{table}]")
        yield from keys(rng, table)
    for n in range(rng.randint(1, 3)):
        yield Line(f"[providers.p{n}]")
        yield from keys(rng, "provider", api_base="base")
        if rng.random() < 0.5:
            yield Line(f"[providers.p{n}.timeouts]")
            yield from keys(rng, "timeouts")
        for i in range(rng.randint(0, 2)):
            yield Line(f"[[providers.p{n}.models]]")
            yield Line(f'id = "team/{i}"')
            yield from keys(rng, "declared")
    for n in range(rng.randint(1, 2)):
        yield Line(f"[models.m{n}]")
        yield from keys(rng, "model")
        for _ in range(rng.randint(1, 3)):
            yield Line(f"[[models.m{n}.endpoints]]")
            yield from keys(rng, "endpoint", provider="provider", service_id="text")
    for n in range(rng.randint(0, 2)):
        yield Line(f"[presets.a{n}]")
        yield from keys(rng, "preset", model="model", system_prompt="text")
        if rng.random() < 0.5:
            yield Line(f"[presets.a{n}.routing]")
            yield from keys(rng, "routing")
        if rng.random() < 0.5:
            yield Line(f"[presets.a{n}.routing.max_price]")
            yield from keys(rng, "max_price")
    for n in range(rng.randint(0, 2)):
        yield Line(f"[variants.v{n}.routing]")
        yield from keys(rng, "routing")


def with_remarks(rng: random.Random, lines: Iterator[Line]) -> Iterator[Line]:
    for line in lines:
        if rng.random() < 0.2:
            yield Line(rng.choice(["", "# a remark", "# [server]", "#max = 1"]))
        end = rng.choice(["", "", "  # here"])
        yield line._replace(text=f"{rng.choice(['', '', '  '])}{line.text}{end}")


def written(lines: list[Line]) -> str:
    return "\n".join(line.text for line in lines)


SOME = 10  # configurations in each test: a test of its own for each takes longer than what it tests


def generated(seed: int) -> tuple[random.Random, list[Line]]:
    rng = random.Random(seed)
    return rng, list(with_remarks(rng, configuration(rng)))


@pytest.mark.parametrize("first", range(0, 100, SOME))
def test_a_configuration_that_is_valid_has_no_problems(first: int) -> None:
    for seed in range(first, first + SOME):
        text = written(generated(seed)[1])
        found = read(text)
        assert (found.problems, found.unset, found.config.broken) == ([], [], {}), text
        assert [*misfits(tomllib.loads(text), SCHEMA)] == []
        assert read(as_json(text), "c.json").config == found.config
        on, warnings = bitrouter.active_providers(found.config, {})
        wanted = [name for name, given in found.config.providers.items() if given.active]
        assert (list(on), warnings) == (wanted, [])


def spoiled(rng: random.Random, line: Line) -> Line:
    """A line with another key that nobody knows, or a value that does not fit."""
    before, _, _ = line.text.partition(line.key.strip())
    key = line.key.strip()
    if rng.random() < 0.4:
        at = rng.randrange(len(key))
        renamed = rng.choice([f"{key}x", f"x{key}", f"{key[:at]}q{key[at:]}"])
        return line._replace(text=f"{before}{renamed}{line.text[len(before) + len(key) :]}")
    wrong = rng.choice(VALUES[line.kind][1])
    return line._replace(text=f"{before}{key} = {wrong}")


@pytest.mark.parametrize("first", range(0, 240, SOME))
def test_a_line_that_is_spoiled_is_told_by_its_number(first: int) -> None:
    for seed in range(first, first + SOME):
        rng, lines = generated(seed)
        at = rng.choice([n for n, line in enumerate(lines) if line.kind])
        lines[at] = spoiled(rng, lines[at])
        text, name = written(lines), f".{lines[at].key.strip()}"
        told = [said.split(":", 2)[1:] for said in read(text).problems]
        near = [said for line, said in told if int(line) == at + 1]
        assert any(name in said for said in near), (seed, lines[at].text, told)
        assert any(name in said for said in read(as_json(text), "c.json").problems)


@pytest.mark.parametrize("first", range(0, 120, SOME))
def test_many_lines_that_are_spoiled_are_all_told(first: int) -> None:
    for seed in range(first, first + SOME):
        rng, lines = generated(seed)
        places = [n for n, line in enumerate(lines) if line.kind not in ("", "base")]
        chosen = rng.sample(places, min(4, len(places)))
        for at in chosen:
            lines[at] = spoiled(rng, lines[at])
        told = {int(said.split(":")[1]) for said in read(written(lines)).problems}
        unseen = [lines[at].text for at in chosen if at + 1 not in told]
        assert unseen == [], (seed, read(written(lines)).problems)


@pytest.mark.parametrize("first", range(0, 100, SOME))
def test_lines_in_a_wrong_order_never_raise(first: int) -> None:
    for seed in range(first, first + SOME):
        rng, lines = generated(seed)
        for _ in range(rng.randint(1, 6)):
            at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines.insert(to, lines.pop(at) if rng.random() < 0.7 else lines[at])
        found = read(written(lines))
        assert isinstance(found, Loaded)
        assert all(said.startswith("bitrouter.toml") for said in found.problems)
        list(bitrouter.settings_of(found))


@pytest.mark.parametrize("text", ['[server]\nauth = "${AUTH:-none}"', "[presets.p]\noutput = ''"])
def test_a_word_may_come_from_a_variable_or_be_the_default(text: str) -> None:
    assert list(misfits(tomllib.loads(text), SCHEMA)) == []
