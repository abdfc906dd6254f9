"""bitrouter.toml and the environment: what is accepted, what is refused and where, who is on."""

from __future__ import annotations

import json
import random
import tomllib
from dataclasses import asdict
from typing import Any

import pytest

import bitrouter
from bitrouter import ActiveProvider, ApiProtocol, Config, Loaded, Secret, parse_config

CHAT, RESPONSES = ApiProtocol.CHAT_COMPLETIONS, ApiProtocol.RESPONSES
MESSAGES, GOOGLE = ApiProtocol.MESSAGES, ApiProtocol.GENERATE_CONTENT

# Every key of the file, with a value that is not its default.
FULL = """
[server]
listen = "127.0.0.1:5000"
workers = 2
auth = "required"
base_path = "/llm"
max_body_mb = 2.5
log_format = "json"
allowed_hosts = ["router.lan"]
cors_origins = ["https://app.example"]
health_listen = "127.0.0.1:5001"

[upstream]
timeouts = {connect_s = 1, first_token_s = 2, idle_s = 3.5, total_s = 4, pool_idle_s = 5}
retry = {max = 1, base_ms = 10, max_ms = 20}
breaker.failures = 3
breaker.window_s = 10
breaker.cooldown_s = 7
fallback_backoff_ms = [10, 20]
hedge_after_ms = 900

[keys.laptop]
key = "${CALLER_KEY}"

[providers.openai]
accounts = [
  {label = "a", api_key = "${KEY_A}"},
  {label = "b", api_key = "plain-key", api_base = "https://eu.example/v1"},
]
account_strategy = "balance"
extra_headers = {"X-Team" = "red"}

[providers."my-cluster"]
api_base = "http://10.0.0.5:8000/v1"
api_key = "${NOWHERE:-fallback-key}"
api_protocol = {"claude-*" = "messages", "*" = ["chat_completions", "responses"]}

[providers.my-cluster.timeouts]
first_token_s = 9

[[providers.my-cluster.models]]
id = "my-team/llama-3.1-8b"
provider_model_id = "llama"
api_protocol = "anthropic"
context = 131072
max_output = 4096
pricing = {input = 1, output = 2, cache_read = 0.5, cache_write = 0, cache_write_1h = 4}

[models.smart]
strategy = "priority"
endpoints = [{provider = "anthropic", service_id = "claude-sonnet-4-6"}]

[state]
url = "memory:"
keep_days = 7

[otel]
endpoint = "http://127.0.0.1:4318"
headers = {authorization = "Bearer o"}
protocol = "http/json"
compression = "gzip"
timeout_s = 5
service_name = "gate"
resource_attributes = {a = "b"}
sampler = "traceidratio"
sampler_arg = 0.5
traces = true
metrics = false
metrics_interval_s = 30
content = "full"
content_max_bytes = 100
"""
SECRETS = {"KEY_A": "sk-file-key-a", "CALLER_KEY": "caller-key"}


def problems(text: str, name: str = "bitrouter.toml", **environ: str) -> list[str]:
    return parse_config(text, environ, name).problems


def loaded(text: str = "", **environ: str) -> Config:
    found = parse_config(text, environ)
    assert found.problems == []
    return found.config


def active(text: str = "", **environ: str) -> dict[str, ActiveProvider]:
    return bitrouter.active_providers(loaded(text, **environ), environ)[0]


def warnings(text: str = "", **environ: str) -> list[str]:
    return bitrouter.active_providers(loaded(text, **environ), environ)[1]


def test_no_file_means_the_documented_defaults() -> None:
    server, upstream = loaded().server, loaded().upstream
    assert (server.listen, server.auth, server.log_format) == ("127.0.0.1:4356", "auto", "auto")
    assert (server.max_body_mb, server.base_path, server.health_listen) == (100, "", "")
    assert (server.allowed_hosts, server.cors_origins) == ((), ())
    t = upstream.timeouts
    assert (t.connect_s, t.first_token_s, t.idle_s, t.total_s) == (10, 120, 120, 600)
    assert 0 < t.pool_idle_s < 60


def test_every_key_of_the_file_is_read() -> None:
    config, raw = loaded(FULL, **SECRETS), tomllib.loads(FULL)
    as_lists = json.loads(json.dumps([asdict(config.server), asdict(config.upstream)]))
    assert as_lists == [raw["server"], raw["upstream"]]


def test_a_provider_of_the_file_is_read_whole() -> None:
    mine = loaded(FULL, **SECRETS).providers["my-cluster"]
    assert (mine.api_base, mine.api_key) == ("http://10.0.0.5:8000/v1", Secret("fallback-key"))
    assert mine.api_protocol.spoken("claude-x") == (MESSAGES,)
    assert mine.api_protocol.spoken("other") == (CHAT, RESPONSES)
    assert mine.timeouts.first_token_s == 9 and mine.timeouts.idle_s is None
    [model] = mine.models
    assert (model.id, model.provider_model_id) == ("my-team/llama-3.1-8b", "llama")
    assert (model.context, model.max_output) == (131072, 4096)
    rates = {"input": 1, "output": 2, "cache_read": 0.5, "cache_write": 0, "cache_write_1h": 4}
    assert asdict(model.pricing) == {**rates, "context_tiers": ()}
    assert model.api_protocol.spoken("my-team/llama-3.1-8b") == (MESSAGES,)


def test_accounts_keys_and_virtual_models_are_read() -> None:
    config = loaded(FULL, **SECRETS)
    openai = config.providers["openai"]
    keys = [(a.label, a.api_key.reveal(), a.api_base) for a in openai.accounts]
    assert keys == [("a", "sk-file-key-a", ""), ("b", "plain-key", "https://eu.example/v1")]
    assert (openai.account_strategy, openai.extra_headers.put) == ("balance", {"X-Team": "red"})
    assert config.keys["laptop"].key == Secret("caller-key")
    [endpoint] = config.models["smart"].endpoints
    assert (endpoint.provider, endpoint.service_id) == ("anthropic", "claude-sonnet-4-6")


def test_json_says_the_same_as_toml() -> None:
    text = json.dumps(tomllib.loads(FULL), indent=2)
    ours, theirs = parse_config(text, SECRETS, "c.json"), parse_config(FULL, SECRETS, "c.toml")
    assert ours[:3] == theirs[:3]


# fmt: off
REFUSED = [
    # file                                       line, and what is said of it
    ('[server]\nlisten = 1',                     ":2: server.listen: expected a string, got 1"),
    ('[server]\nmax_body_mb = "1"',              ":2: server.max_body_mb: expected a number"),
    ('[server]\nmax_body_mb = 0',                ":2: server.max_body_mb: expected 0.001 or more"),
    ('[server]\nauth = "nope"',                  ":2: server.auth: expected one of auto, none,"),
    ('[server]\nlog_format = "xml"',             ":2: server.log_format: expected one of auto,"),
    ('[server]\nallowed_hosts = "a"',            ":2: server.allowed_hosts: expected a list"),
    ('[server]\nallowed_hosts = ["a", 1]',       ":2: server.allowed_hosts[1]: expected a string"),
    ('[server]\nlisten = "here"',                ":2: server.listen: expected HOST:PORT or unix:"),
    ('[server]\nlisten = "127.0.0.1:70000"',     ":2: server.listen: expected HOST:PORT or unix:"),
    ('[server]\nhealth_listen = ":"',            ":2: server.health_listen: expected HOST:PORT"),
    ('[server]\nbase_path = "llm"',              ":2: server.base_path: expected a path such as"),
    ('[server]\nbase_path = "/"',                ":2: server.base_path: expected a path such as"),
    ('server = 3',                               ":1: server: expected a table, got 3"),
    ('\nproviders = [1]',                        ":2: providers: expected a table, got a list"),
    ('[upstream.retry]\nmax = true',             ":2: upstream.retry.max: expected a whole number"),
    ('[upstream.retry]\nmax = 1.5',              ":2: upstream.retry.max: expected a whole number"),
    ('[upstream.retry]\nmax = -1',               ":2: upstream.retry.max: expected 0 or more"),
    ('[upstream.breaker]\nfailures = 0',         ":2: upstream.breaker.failures: expected 1 or"),
    ('[upstream.timeouts]\n\nidle_s = nan',      ":3: upstream.timeouts.idle_s: expected 0.01 or"),
    ('[upstream.timeouts]\n\nidle_s = inf',      ":3: upstream.timeouts.idle_s: expected 0.01 or"),
    ('[upstream.timeouts]\nconnect_s = true',    ":2: upstream.timeouts.connect_s: expected a nu"),
    ('[providers.openai]\napi_protocol = "chat"', ":2: providers.openai.api_protocol: expected on"),
    ('[providers.openai]\napi_protocol = 3',     ":2: providers.openai.api_protocol: expected on"),
    ('[providers.openai]\naccount_strategy = "x"', ":2: providers.openai.account_strategy: expect"),
    ('[providers.openai]\naccounts = [{label="x"}]', ":2: providers.openai.accounts[0].api_key: t"),
    ('[providers.openai]\nextra_headers={"a b"="c"}', ':2: providers.openai.extra_headers.a b: no'),
    ('[providers.openai]\nextra_headers={a="c\\r\\nd"}', ':2: providers.openai.extra_headers.a: n'),
    ('[providers.openai]\napi_key = "k"\naccounts = [{api_key="l"}]', ":1: providers.openai: give"),
    ('[providers.openai]\napi_key = "k\\n"',     ": providers.openai: a key holds a character th"),
    ('[providers.x]\napi_key = "k"',             ":1: providers.x: this provider is not known;"),
    ('[providers.opnai]\napi_key = "k"',         "not known; did you mean openai?"),
    ('[providers.a]\napi_base="https://h"\n[[providers.a.models]]\ncontext = 1', ":3: providers.a"),
    ('[keys.me]',                                ":1: keys.me.key: this key is required"),
    ('[models.a]',                               ":1: models.a.endpoints: this key is required"),
    ('[models.a]\nendpoints = []',               ":2: models.a.endpoints: expected at least one"),
    ('models.a={strategy="x", endpoints=[{provider="xai", service_id="x"}]}', ":1: models.a.strat"),
    ('[models.a]\nendpoints = [{provider="opnai", service_id="x"}]', "no provider 'opnai'; did yo"),
    ('[models.a]\nendpoints = [{provider="openai"}]', ":2: models.a.endpoints[0].service_id: this"),
]
# fmt: on


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_what_does_not_fit_is_refused_with_its_line(text: str, said: str) -> None:
    [problem] = problems(text)
    assert problem.startswith("bitrouter.toml:") and said in problem


ENDPOINTS = "[[models.a.endpoints]]\nprovider = '{}'\nservice_id = 'x'\n"

# fmt: off
MISTYPED = [
    # an unknown key `listn` or so, in every way that TOML and JSON can spell its place
    ("c.toml", "[server]\nlistn = 1",  2, "server.listn"),
    ("c.toml", "# x\nserver.listn = 1",  2, "server.listn"),
    ("c.toml", "# x\nserver = {auth = 'auto', listn = 1}",  2, "server.listn"),
    ("c.toml", "[ server ]  # here\n\n  listn=1",  3, "server.listn"),
    ("c.toml", '["server"]\n\n"listn" = 1',  3, "server.listn"),
    ("c.toml", "['server']\n'listn' = 1",  2, "server.listn"),
    ("c.toml", "[upstream]\nretry.mx = 1",  2, "upstream.retry.mx"),
    ("c.toml", "[upstream]\nretry . mx = 1",  2, "upstream.retry.mx"),
    ("c.toml", "[upstream.retry]\nmax = 1\n[upstream.breaker]\nmx = 1",  4, "upstream.breaker.mx"),
    ("c.toml", "[providers.'a.b']\napi_base='https://h'\nx_key = 1",  3, "providers.a.b.x_key"),
    ("c.toml", "[serv]\na = 1",  1, "serv"),
    ("c.toml", ENDPOINTS.format("openai") + ENDPOINTS.format("xai") + "z = 1", 7,
               "models.a.endpoints[1].z"),
    ("c.toml", "[[providers.xai.models]]\nid='x'\n[[providers.xai.models]]\nid='y'\nz=1", 5,
               "providers.xai.models[1].z"),
    ("c.json", '{\n "server": {\n  "listn": 1}}',  3, "server.listn"),
    ("c.json", '{"upstream": {"retry": {"max": 1},\n "breaker":\n {"mx": 1}}}', 3,
               "upstream.breaker.mx"),
    ("c.json", '{"models": {"listn": {"endpoints": []}},\n "server":\n {"listn": 1}}', 3,
               "server.listn"),
]
# fmt: on


@pytest.mark.parametrize(("name", "text", "line", "key"), MISTYPED)
def test_an_unknown_key_is_shown_where_it_stands(name: str, text: str, line: int, key: str) -> None:
    said = [problem for problem in problems(text, name) if "unknown key" in problem]
    assert [problem.partition("; ")[0] for problem in said] == [
        f"{name}:{line}: {key}: unknown key"
    ]


def test_a_dangling_endpoint_is_shown_in_its_own_table() -> None:
    [problem] = problems(ENDPOINTS.format("openai") + ENDPOINTS.format("opnai"))
    assert problem.startswith("bitrouter.toml:5: models.a.endpoints[1].provider: ")


def test_a_near_miss_is_offered_and_otherwise_what_is_allowed() -> None:
    near, far = problems("[upstream.retry]\nbase_mss = 1\nzzz = 1")
    assert near.endswith("did you mean base_ms?")
    assert far.endswith("allowed here: max, base_ms, max_ms")


def test_all_problems_are_told_at_once() -> None:
    text = """
[server]
listn = "x"
auth = 1
max_body_mb = -1
base_path = "llm"
[providers.openia]
api_key = "x"
[models.smart]
endpoints = [{provider = "opnai", service_id = "x"}]
"""
    wanted = ["server.listn", "server.auth", "server.max_body_mb", "server.base_path"]
    wanted += ["providers.openia", "models.smart.endpoints"]
    assert [key for key in wanted if not any(key in said for said in problems(text))] == []


# fmt: off
CLASHES = [
    # two names for one thing: one of the two would be ignored without a word
    '[providers.gemini]\napi_key = "k1"\n[providers.google]\napi_key = "k2"',
    '[models."echo/echo"]\nendpoints = [{provider = "openai", service_id = "x"}]',
    '[providers.openai]\naccounts = [{label="a", api_key="k"}, {label="a", api_key="l"}]',
    '[providers.openai]\naccounts = [{label="2", api_key="k"}, {api_key="l"}]',
    '[providers.echo]\napi_base = "https://echo.example/v1"',
]
# fmt: on


@pytest.mark.parametrize("text", CLASHES)
def test_two_things_of_one_name_are_refused(text: str) -> None:
    assert problems(text) != []


@pytest.mark.parametrize("text", ["a = [[[", "[server]\nauth=1\nauth=2", "x", "\x00", "[[["])
def test_what_is_not_toml_is_one_problem(text: str) -> None:
    [problem] = problems(text)
    assert problem.startswith("bitrouter.toml: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"server": {"auth": "none"}} x'])
def test_what_is_not_a_json_object_is_one_problem(text: str) -> None:
    [problem] = problems(text, "c.json")
    assert problem.startswith("c.json: ")


# fmt: off
EXTREMES = [
    ("c.toml", "a = " + "[" * 5000 + "]" * 5000),
    ("c.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    ("c.toml", "[server]\nmax_body_mb = " + "9" * 400),
    ("c.toml", "[upstream.retry]\nmax = " + "9" * 400),
    ("c.json", '{"server": {"max_body_mb": ' + "9" * 5000 + "}}"),
    ("c.json", '{"upstream": {"retry": {"max": 1e400}}}'),
    ("c.json", '{"providers": {"\\ud800": {"api_base": "http://\\ud800"}}}'),
]
# fmt: on


@pytest.mark.parametrize(("name", "text"), EXTREMES, ids=range(len(EXTREMES)))
def test_an_absurd_file_is_a_problem_and_not_a_crash(name: str, text: str) -> None:
    said = problems(text, name)
    assert said and all(isinstance(one, str) for one in said)


def mutated(text: str, seed: int) -> str:
    """A valid file after a few accidents."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.choices(range(len(text)), k=2))
        end = min(end, at + rng.randint(0, 12))
        junk = ["", "[", "]", '"', "=", "{", "1", "-", ".", "\n", "\x00", "é", "true", "[]", "${X}"]
        text = text[:at] + rng.choice([*junk, text[at:end] * 2]) + text[end:]
    return text


@pytest.mark.parametrize("seed", range(200))
def test_a_damaged_file_never_raises(seed: int) -> None:
    for name, text in (("c.toml", FULL), ("c.json", json.dumps(tomllib.loads(FULL)))):
        found = parse_config(mutated(text, seed), SECRETS, name)
        assert isinstance(found, Loaded)
        bitrouter.active_providers(found.config, SECRETS)


# fmt: off
SWAPPED = [
    # a value of another type, at every key of the full file
    3, -1.5, True, "", "x", "${UNSET}", [], [1], [[]], {}, {"a": 1}, [{}], [{"id": 3}], None,
]
# fmt: on


def places(raw: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = raw.items() if isinstance(raw, dict) else enumerate(raw) if type(raw) is list else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@pytest.mark.parametrize("value", SWAPPED, ids=repr)
def test_no_value_in_any_place_raises(value: Any) -> None:
    for path in places(tomllib.loads(FULL))[1:]:
        raw = tomllib.loads(FULL)
        within: Any = raw
        for step in path[:-1]:
            within = within[step]
        within[path[-1]] = value
        assert isinstance(parse_config(json.dumps(raw), SECRETS, "c.json"), Loaded)


# fmt: off
EXPANDED = [
    ("plain",                  "plain",     []),
    ("${A}",                   "one",       []),
    ("x${A}y${B}z",            "xoney2z",   []),
    ("${A:-two}",              "one",       []),
    ("${NO:-two}",             "two",       []),
    ("${NO:-}",                "",          []),
    ("${EMPTY:-two}",          "two",       []),
    ("${NO:-http://h:1/x-y}",  "http://h:1/x-y", []),
    ("${NO}/${ALSO}",          "/",         ["NO", "ALSO"]),
    ("$A ${} ${1x} ${A",       "$A ${} ${1x} ${A", []),
    ("${NESTED}",              "${A}",      []),
]
# fmt: on


@pytest.mark.parametrize(("text", "value", "missing"), EXPANDED)
def test_variables_stand_in_strings(text: str, value: str, missing: list[str]) -> None:
    environ = {"A": "one", "B": "2", "EMPTY": "", "NESTED": "${A}"}
    assert bitrouter.expand(text, environ) == (value, missing)


def test_a_variable_that_is_not_set_is_told_with_its_line_and_is_no_error() -> None:
    found = parse_config('[providers.openai]\napi_key = "${NO_KEY}"', {})
    assert found.problems == []
    said = "providers.openai.api_key: the environment variable NO_KEY is not set"
    assert found.unset == [f"bitrouter.toml:2: {said}"]


def test_variables_are_put_in_after_parsing() -> None:
    text = '[server]\nbase_path = "${PREFIX}"\nallowed_hosts = ["${HOST}"]'
    server = loaded(text, PREFIX="/llm", HOST='a"]\nauth = "none').server
    assert (server.base_path, server.auth) == ("/llm", "auto")
    assert server.allowed_hosts == ('a"]\nauth = "none',)


# fmt: off
BASES = [
    ("https://x.openai.azure.com/openai/deployments/n?api-version=2025-04-01-preview", ""),
    # base                            what is wrong with it, or nothing
    ("https://api.example.com/v1",    ""),
    ("http://127.0.0.1:8000/v1",      ""),
    ("http://localhost:8000",         ""),
    ("http://[::1]:8000/v1",          ""),
    ("http://10.0.0.5:8000/v1",       ""),
    ("http://192.168.1.2",            ""),
    ("http://172.16.0.1",             ""),
    ("http://vllm:8000/v1",           ""),
    ("http://box.local/v1",           ""),
    ("http://llm.team.svc/v1",        ""),
    ("http://llm.team.svc.cluster.local/v1", ""),
    ("http://host.docker.internal:1", ""),
    ("http://api.example.com/v1",     "clear text"),
    ("http://8.8.8.8/v1",             "clear text"),
    ("http://[2001:4860:4860::8888]", "clear text"),
    ("http://local.example.com",      "clear text"),
    ("http://10.0.0.5.example.com",   "clear text"),
    ("http://134744072/v1",           "clear text"),
    ("ftp://x/v1",                    "expected http"),
    ("api.example.com/v1",            "expected http"),
    ("https://",                      "expected http"),
    ("https://a b/v1",                "expected http"),
    ("https://h\r\nx: y/v1",          "not a URL"),
    ("https://h:99999/v1",            "not a URL"),
    ("http://[::1/v1",                "not a URL"),
    ("https://h/v1?key=1",            "no fragment"),
    ("https://h/v1#a",                "no fragment"),
    ("https://me:pw@h/v1",            "no fragment"),
]
# fmt: on


@pytest.mark.parametrize(("base", "wrong"), BASES)
def test_a_base_is_https_or_near(base: str, wrong: str) -> None:
    said = bitrouter.base_problem(base)
    assert wrong in said and bool(said) == bool(wrong)


@pytest.mark.parametrize("key", ["api_base", "accounts = [{api_key = 'k', api_base"])
def test_a_far_base_in_clear_text_is_refused_in_the_file(key: str) -> None:
    end = "}]" if "[" in key else ""
    [problem] = problems(f"[providers.openai]\n{key} = 'http://api.example.com/v1'{end}")
    assert problem.startswith("bitrouter.toml:2: providers.openai") and "clear text" in problem


# fmt: off
HELD = "sk-very-secret-0123456789"
LEAKS = [
    f'[providers.openai]\napi_key = ["{HELD}"]',
    f'[providers.openai]\napi_key = {{value = "{HELD}"}}',
    f'[providers.openai]\napi_kye = "{HELD}"',
    f'[providers.openai]\napi_key = "{HELD}\\n"',
    f'[providers.openai]\naccounts = ["{HELD}"]',
    f'[providers.openai]\naccounts = "{HELD}"',
    f'[providers.openai]\naccounts = [{{api_key = ["{HELD}"]}}]',
    f'[providers]\nopenai = "{HELD}"',
    f'[keys]\nme = "{HELD}"',
    f'[keys.me]\nkey = ["{HELD}"]',
    f'[providers.openai]\nextra_headers = "Authorization: {HELD}"',
    f'[providers.openai]\nextra_headers = {{authorization = ["{HELD}"]}}',
    f'[providers.openai]\nextra_headers = {{authorization = "{HELD}\\n"}}',
    f'[providers.openai]\napi_base = "ftp://me:{HELD}@host/v1"',
    f'[providers.openai]\napi_key = "{HELD}" x',
]
# fmt: on


@pytest.mark.parametrize("text", LEAKS)
def test_no_message_holds_a_key(text: str) -> None:
    assert problems(text) and HELD not in "".join(problems(text))


def test_no_message_holds_what_a_variable_held() -> None:
    found = parse_config('[providers.openai]\napi_key = "${K} ${UNSET}\\n"', {"K": HELD})
    assert found.problems and found.unset
    assert HELD not in repr(found)


# Who is on.

ENVIRONMENT = [(p.id, name) for p in bitrouter.PROVIDERS.values() for name in p.env]


@pytest.mark.parametrize(("ident", "name"), ENVIRONMENT)
def test_a_key_in_the_environment_turns_its_provider_on(ident: str, name: str) -> None:
    found = active(**{name: "sk-1", "AZURE_OPENAI_RESOURCE": "mine"})[ident]
    assert found.enabled_by == name
    assert [(a.label, a.api_key.reveal()) for a in found.accounts] == [("", "sk-1")]
    assert "$" not in "".join(found.accounts[0].bases.values())


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_nobody_is_on_without_a_key(value: str) -> None:
    assert active(OPENAI_API_KEY=value) == {}


def test_several_keys_in_a_variable_are_several_accounts() -> None:
    found = active(OPENAI_API_KEY=" k1, k2 ,,k3")["openai"]
    labelled = [(a.label, a.api_key.reveal()) for a in found.accounts]
    assert labelled == [("1", "k1"), ("2", "k2"), ("3", "k3")]
    assert not found.balanced


@pytest.mark.parametrize("key", ["k\r\nx-evil: 1", "k\x00", "clé"])
def test_a_key_that_no_header_may_hold_is_not_used(key: str) -> None:
    assert active(OPENAI_API_KEY=key) == {}
    assert "OPENAI_API_KEY" in "".join(warnings(OPENAI_API_KEY=key))


# fmt: off
MOVED = [
    # variable, value, and the base of each protocol
    ("openai", "OPENAI_BASE_URL", "https://p.example/v1",
     {CHAT: "https://p.example/v1", RESPONSES: "https://p.example/v1"}),
    ("openai", "OPENAI_BASE_URL", "https://p.example/v1/",
     {CHAT: "https://p.example/v1", RESPONSES: "https://p.example/v1"}),
    ("openai", "OPENAI_BASE_URL", "http://127.0.0.1:9",
     {CHAT: "http://127.0.0.1:9/v1", RESPONSES: "http://127.0.0.1:9/v1"}),
    ("anthropic", "ANTHROPIC_BASE_URL", "https://p.example",
     {MESSAGES: "https://p.example/v1"}),
    ("anthropic", "ANTHROPIC_BASE_URL", "https://p.example/claude",
     {MESSAGES: "https://p.example/claude/v1"}),
    ("google", "GEMINI_BASE_URL", "https://p.example",
     {GOOGLE: "https://p.example/v1beta", CHAT: "https://p.example/v1beta/openai"}),
    ("google", "GOOGLE_BASE_URL", "https://p.example/g/v1",
     {GOOGLE: "https://p.example/g/v1", CHAT: "https://p.example/g/v1/openai"}),
    ("deepseek", "DEEPSEEK_BASE_URL", "https://p.example/ds",
     {CHAT: "https://p.example/ds", RESPONSES: "https://p.example/ds",
      MESSAGES: "https://p.example/ds/anthropic/v1"}),
    ("zai", "ZAI_BASE_URL", "https://p.example",
     {CHAT: "https://p.example/api/paas/v4", MESSAGES: "https://p.example/api/anthropic/v1"}),
    ("minimax", "MINIMAX_BASE_URL", "https://p.example",
     {MESSAGES: "https://p.example/anthropic/v1", CHAT: "https://p.example/v1"}),
    ("azure", "AZURE_OPENAI_BASE_URL", "https://p.example",
     {CHAT: "https://p.example/openai/v1", RESPONSES: "https://p.example/openai/v1"}),
    ("ollama", "OLLAMA_BASE_URL", "http://10.0.0.9:11434",
     {CHAT: "http://10.0.0.9:11434/v1", MESSAGES: "http://10.0.0.9:11434/v1"}),
]
# fmt: on


@pytest.mark.parametrize(("ident", "name", "value", "bases"), MOVED)
def test_a_base_variable_moves_its_provider(
    ident: str, name: str, value: str, bases: dict[ApiProtocol, str]
) -> None:
    environ = {bitrouter.PROVIDERS[ident].env[0]: "k", name: value}
    assert active(**environ)[ident].accounts[0].bases == bases


@pytest.mark.parametrize("ident", bitrouter.PROVIDERS)
def test_no_base_of_a_moved_provider_stays_behind(ident: str) -> None:
    known = bitrouter.PROVIDERS[ident]
    name = bitrouter.base_variables(known)[0]
    found = active(**{known.env[0]: "k", name: "https://p.example/some/where"})[ident]
    bases = [*found.facts.bases.values(), *found.accounts[0].bases.values()]
    assert all(base.startswith("https://p.example/") for base in bases)


def test_a_base_variable_moves_no_other_provider() -> None:
    found = active(OPENCODE_ZEN_API_KEY="k", OPENCODE_ZEN_BASE_URL="https://p.example/zen/v1")
    assert found["opencode-zen"].facts.bases == {CHAT: "https://p.example/zen/v1"}
    assert found["opencode-go"].facts.bases == bitrouter.PROVIDERS["opencode-go"].bases


def test_a_base_alone_turns_on_a_local_server_only() -> None:
    url = "http://127.0.0.1:9"
    found = active(OLLAMA_BASE_URL=url, OPENAI_BASE_URL=url)
    assert {ident: one.enabled_by for ident, one in found.items()} == {"ollama": "OLLAMA_BASE_URL"}


# fmt: off
OURSELVES = ["http://127.0.0.1:4356", "http://localhost:4356/v1", "http://[::1]:4356/"]
# fmt: on


@pytest.mark.parametrize("url", OURSELVES)
def test_a_base_that_points_at_ourselves_is_ignored(url: str) -> None:
    environ = {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": url}
    assert active(**environ)["anthropic"].facts.bases == bitrouter.PROVIDERS["anthropic"].bases
    assert ["ANTHROPIC_BASE_URL is ignored" in said for said in warnings(**environ)] == [True]


@pytest.mark.parametrize("url", ["http://127.0.0.1:14356/v1", "http://10.0.0.1:4356/v1"])
def test_a_base_next_to_ourselves_is_used(url: str) -> None:
    environ = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": url}
    assert active(**environ)["openai"].facts.bases[CHAT] == url
    assert warnings(**environ) == []


def test_a_base_that_makes_no_sense_is_ignored_with_a_warning() -> None:
    environ = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://api.example.com/v1"}
    assert active(**environ)["openai"].facts.bases == bitrouter.PROVIDERS["openai"].bases
    assert ["OPENAI_BASE_URL is ignored" in said for said in warnings(**environ)] == [True]


def test_azure_without_its_resource_is_off_and_says_why() -> None:
    assert active(AZURE_OPENAI_API_KEY="k") == {}
    [said] = warnings(AZURE_OPENAI_API_KEY="k")
    assert "azure is off" in said and "AZURE_OPENAI_RESOURCE" in said


def test_a_region_has_a_default_and_a_variable() -> None:
    environ = {"AWS_BEARER_TOKEN_BEDROCK": "k"}
    assert "us-east-1" in active(**environ)["aws-bedrock"].facts.bases[CHAT]
    assert "eu-west-3" in active(**environ, AWS_REGION="eu-west-3")["aws-bedrock"].facts.bases[CHAT]


# fmt: off
ONE, TWO, USUAL = "https://one.example/v1", "https://two.example/v1", "https://api.openai.com/v1"
ACCOUNTS = [
    # accounts, and which key goes to which base
    (f'{{label="a", api_key="k1", api_base="{ONE}"}}, {{label="b", api_key="k2"}}',
     {"k1": ONE, "k2": USUAL}),
    (f'{{api_key="k1", api_base="{ONE}"}}, {{api_key="k2"}}', {"k1": ONE, "k2": USUAL}),
    (f'{{api_key="k1"}}, {{api_key="k2", api_base="{TWO}"}}', {"k1": USUAL, "k2": TWO}),
    (f'{{label="a", api_key="k1", api_base="{ONE}/"}}', {"k1": ONE}),
]
# fmt: on


@pytest.mark.parametrize(("accounts", "bases"), ACCOUNTS)
def test_an_account_of_the_file_goes_to_its_own_base(accounts: str, bases: dict[str, str]) -> None:
    found = active(f"[providers.openai]\naccounts = [{accounts}]")["openai"]
    assert {a.api_key.reveal(): a.bases[CHAT] for a in found.accounts} == bases


def test_an_account_whose_variable_is_empty_is_left_out() -> None:
    text = '[providers.openai]\naccounts = [{api_key = "${NO}"}, {api_key = "k2"}]'
    config = parse_config(text, {}).config
    found, _ = bitrouter.active_providers(config, {})
    assert [a.api_key.reveal() for a in found["openai"].accounts] == ["k2"]


def test_the_file_comes_before_the_environment() -> None:
    text = '[providers.gemini]\napi_key = "file"\napi_base = "https://f.example/v1beta"'
    found = active(text, GEMINI_API_KEY="env", GEMINI_BASE_URL="https://e.example")["google"]
    assert [a.api_key.reveal() for a in found.accounts] == ["file"]
    assert found.facts.bases[GOOGLE] == "https://f.example/v1beta"
    assert found.enabled_by == "the configuration"


def test_a_section_of_the_file_fills_in_only_what_differs() -> None:
    text = '[providers.openai]\nextra_headers = {"X-Team" = "red"}\ntimeouts = {idle_s = 5}'
    found = active(text, OPENAI_API_KEY="k")["openai"]
    assert found.facts.headers == {"x-team": "red"} and found.enabled_by == "OPENAI_API_KEY"
    assert (found.timeouts.idle_s, found.timeouts.connect_s) == (5, 10)


def test_a_provider_of_ones_own_needs_a_base_and_no_key() -> None:
    found = active('[providers.mine]\napi_base = "http://10.0.0.5:8000/v1/"')["mine"]
    assert found.facts.bases == {CHAT: "http://10.0.0.5:8000/v1"}
    assert [bool(a.api_key) for a in found.accounts] == [False]


def test_a_provider_of_ones_own_finds_its_key_by_its_name() -> None:
    text = '[providers.my-cluster]\napi_base = "https://c.example/v1"'
    found = active(text, MY_CLUSTER_API_KEY="k")["my-cluster"]
    assert (found.enabled_by, found.accounts[0].api_key.reveal()) == ("MY_CLUSTER_API_KEY", "k")


def test_a_local_server_that_is_only_mentioned_waits_to_be_found() -> None:
    assert active("[providers.ollama.timeouts]\nidle_s = 5") == {}


@pytest.mark.parametrize("name", ["openai", "anthropic", "google", *ApiProtocol])
def test_protocols_are_known_by_their_names_and_by_their_makers(name: str) -> None:
    config = loaded(f"[providers.openai]\napi_protocol = '{name}'")
    assert config.providers["openai"].api_protocol.spoken("m") == (bitrouter.PROTOCOL_NAMES[name],)


def test_the_most_particular_glob_decides() -> None:
    text = "{'*' = 'responses', 'a-*' = 'messages', 'a-b-*' = 'google', 'a-b-c' = 'openai'}"
    rules = loaded(f"[providers.openai]\napi_protocol = {text}").providers["openai"].api_protocol
    spoken = [rules.spoken(model)[0] for model in ("x", "a-x", "a-b-x", "a-b-c")]
    assert spoken == [RESPONSES, MESSAGES, GOOGLE, CHAT]


@pytest.mark.parametrize("empty", ["[]", "{}", "{'*' = []}"])
def test_no_protocol_at_all_is_the_providers_own(empty: str) -> None:
    config = loaded(f"[providers.openai]\napi_protocol = {empty}")
    assert config.providers["openai"].api_protocol.spoken("m") == ()


@pytest.mark.parametrize(
    ("listen", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("[::1]", True),
     ("0.0.0.0", False), ("[::]", False), ("10.0.0.1", False), ("127.0.0.1.example", False)],
)  # fmt: skip
def test_only_this_machines_own_addresses_are_loopback(listen: str, loopback: bool) -> None:
    assert bitrouter.is_loopback(listen) == loopback


@pytest.mark.parametrize("name", ["Host", "content-length", "Transfer-Encoding", "CONNECTION"])
def test_a_header_that_frames_a_request_is_not_the_configuration_s_to_set(name: str) -> None:
    [problem] = problems(f'[providers.openai]\napi_key = "k"\nextra_headers = {{"{name}" = "1"}}')
    assert problem.startswith(f"bitrouter.toml:3: providers.openai.extra_headers.{name}: ")
