"""A configuration of TensorZero becomes one of ours, and no key is passed over in silence."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Ran, router_of

import bitrouter
from bitrouter import (
    CHAT_OP,
    Migration,
    MigrationError,
    migrate_tensorzero,
    parse_config,
    preset_name,
    shorthand,
)

FILES = {
    "static.txt": "You are terse. Costs ${5}.\n",
    "system.minijinja": "You are {{ name }}.\n{% include 'rules.txt' %}",
    "rules.txt": "Rules of {{ name }}.",
    "user.minijinja": "Say {{ x }}.",
    "broken.minijinja": "{% macro x() %}{% endmacro %}",
    "out.json": '{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}',
    "tool.json": '{"type": "object", "properties": {"q": {"type": "string"}}}',
    "not.json": "{",
}


def read(file: str, name: str) -> str:
    del file
    if name not in FILES:
        raise FileNotFoundError(2, "No such file or directory", name)
    return FILES[name]


def moved(*texts: str) -> Migration:
    return migrate_tensorzero([(f"t{n}.toml", text) for n, text in enumerate(texts)], read)


def ours(migration: Migration) -> dict[str, Any]:
    assert parse_config(migration.text, {}).problems == []
    return tomllib.loads(migration.text)


def one_model(kind: str, more: str = "", model: str = "") -> str:
    return f"""
[models.m]
routing = ["p"]
[models.m.providers.p]
type = "{kind}"
{model}
{more}
"""


NAMED = 'model_name = "n"'
NO_KEY = 'api_key_location = "none"'
DEPLOYMENT = "openai/deployments/n?api-version=2025-04-01-preview"
LIMIT = {"chat_completions": {"token_limit_field": "max_completion_tokens"}}
AZURE = {"derives": "azure", "auth": "api-key", "api_protocol": "chat_completions",
         "compatibility": LIMIT}  # fmt: skip
PLAIN_LIMIT = {"chat_completions": {"token_limit_field": "max_tokens"}}
# fmt: off
PROVIDERS: list[tuple[str, str, str, dict[str, Any]]] = [
    # type and its keys                                      our provider     its table
    ("openai", NAMED, "openai", {"compatibility": LIMIT}),
    ("openai", f'{NAMED}\napi_base = "http://10.0.0.1:8000/v1/"\n{NO_KEY}', "p",
     {"api_base": "http://10.0.0.1:8000/v1", "compatibility": LIMIT}),
    ("openai", f'{NAMED}\napi_key_location = "env::OTHER"', "p",
     {"api_key": "${OTHER}", "derives": "openai", "compatibility": LIMIT}),
    ("openai", f'{NAMED}\napi_key_location = "path::/run/key"', "p",
     {"api_key": "file:/run/key", "derives": "openai", "compatibility": LIMIT}),
    ("openai", f'{NAMED}\napi_key_location = "path_from_env::KEY_FILE"', "p",
     {"api_key": "file:${KEY_FILE}", "derives": "openai", "compatibility": LIMIT}),
    ("openai", f'{NAMED}\napi_key_location = "dynamic::team"', "p",
     {"api_key": "request:team", "derives": "openai", "compatibility": LIMIT}),
    ("openai", f'{NAMED}\napi_key_location = {{default = "dynamic::k", fallback = "env::V"}}', "p",
     {"accounts": [{"label": "default", "api_key": "request:k"},
                   {"label": "fallback", "api_key": "${V}"}],
      "derives": "openai", "compatibility": LIMIT}),
    ("openai", f'{NAMED}\napi_type = "responses"\ninclude_encrypted_reasoning = true', "p",
     {"api_key": "${OPENAI_API_KEY}", "api_protocol": "responses", "derives": "openai",
      "compatibility": LIMIT}),
    ("anthropic", NAMED, "anthropic", {}),
    ("anthropic", f'{NAMED}\napi_base = "https://a.example/v1/messages"', "p",
     {"api_key": "${ANTHROPIC_API_KEY}", "api_base": "https://a.example/v1",
      "api_protocol": "messages"}),
    ("google_ai_studio_gemini", NAMED, "google", {"api_protocol": "generate_content"}),
    ("azure", 'deployment_id = "n"\nendpoint = "https://x.openai.azure.com/"', "p",
     {"api_key": "${AZURE_API_KEY}", "api_base": f"https://x.openai.azure.com/{DEPLOYMENT}",
      **AZURE}),
    ("azure", 'deployment_id = "n"\nendpoint = "env::AZURE_URL"', "p",
     {"api_key": "${AZURE_API_KEY}", "api_base": f"${{AZURE_URL}}/{DEPLOYMENT}", **AZURE}),
    ("groq", NAMED, "groq", {}),
    ("mistral", NAMED, "mistral", {}),
    ("deepseek", NAMED, "deepseek", {}),
    ("xai", NAMED, "xai", {}),
    ("together", NAMED, "together", {}),
    ("fireworks", NAMED, "fireworks", {}),
    ("hyperbolic", NAMED, "hyperbolic", {}),
    ("openrouter", NAMED, "openrouter", {}),
    ("vllm", f'{NAMED}\napi_base = "http://10.0.0.1/v1"\n{NO_KEY}', "p",
     {"api_base": "http://10.0.0.1/v1", "compatibility": PLAIN_LIMIT}),
    ("sglang", f'{NAMED}\napi_base = "http://10.0.0.1/v1"', "p",
     {"api_key": "${SGLANG_API_KEY}", "api_base": "http://10.0.0.1/v1",
      "compatibility": PLAIN_LIMIT}),
    ("tgi", f'api_base = "http://10.0.0.1/v1"\n{NO_KEY}', "p",
     {"api_base": "http://10.0.0.1/v1", "compatibility": PLAIN_LIMIT}),
    ("aws_bedrock", 'model_id = "n"\nallow_auto_detect_region = true', "aws-bedrock", {}),
    ("gcp_vertex_gemini", 'model_id = "n"\nlocation = "us-east5"\nproject_id = "pr"', "p",
     {"api_key": "${VERTEX_ACCESS_TOKEN}", "auth": "bearer", "api_protocol": "generate_content",
      "api_base": "https://us-east5-aiplatform.googleapis.com/v1/projects/pr/locations/us-east5/"
                  "publishers/google"}),
]
# fmt: on


@pytest.mark.parametrize(("kind", "keys", "provider", "table"), PROVIDERS)
def test_each_type_of_provider_becomes_one_of_ours(
    kind: str, keys: str, provider: str, table: dict[str, Any]
) -> None:
    migration = moved(one_model(kind, keys))
    found = ours(migration)
    service = "tgi" if kind == "tgi" else "n"
    [endpoint] = found["models"]["m"]["endpoints"]
    assert endpoint == {"provider": provider, "service_id": service, "name": "p"}
    assert found.get("providers", {}).get(provider, {}) == table
    assert migration.is_clean
    assert migration.edits == {"tensorzero::model_name::m": "m"}


@pytest.mark.parametrize("kind", ["gcp_vertex_anthropic", "aws_sagemaker", "dummy", "nonesuch", ""])
def test_a_type_without_counterpart_is_told_with_a_way_out(kind: str) -> None:
    migration = moved(one_model(kind, NAMED))
    assert "models" not in ours(migration) and not migration.is_clean
    assert any("type" in note.where for note in migration.notes)


def test_equal_instances_share_a_provider_and_others_do_not() -> None:
    text = "".join(
        f"""
[models.m{n}]
routing = ["p"]
[models.m{n}.providers.p]
type = "openai"
model_name = "n{n}"
api_base = "{base}"
"""
        for n, base in enumerate(["http://10.0.0.1/v1", "http://10.0.0.1/v1", "http://10.0.0.2/v1"])
    )
    found = ours(moved(text))
    assert sorted(found["providers"]) == ["m2-p", "p"]
    used = [found["models"][f"m{n}"]["endpoints"][0]["provider"] for n in range(3)]
    assert used == ["p", "p", "m2-p"]


SHAPED = """
[provider_types.openai.defaults]
api_key_location = "env::TEAM_KEY"
[models.m]
routing = ["a", "b"]
timeouts = {non_streaming.total_ms = 9000}
[models.m.providers.a]
type = "openai"
model_name = "x"
extra_body = [{pointer = "/user", delete = true}, {pointer = "/m", value = "${V}"}]
extra_headers = [{name = "x-a", value = "1"}]
timeouts = {streaming.ttft_ms = 500}
cost = [
  {pointer = "/usage/prompt_tokens", cost_per_million = 2.5},
  {pointer = "/usage/prompt_tokens_details/cached_tokens", cost_per_million = -1.25},
  {pointer = "/usage/completion_tokens", cost_per_million = 10},
]
provider_tools = [{type = "web_search"}]
[models.m.providers.b]
type = "groq"
model_name = "y"
reasoning_format = "parsed"
[models.m.providers.spare]
type = "xai"
model_name = "z"
[embedding_models.e]
routing = ["p"]
[embedding_models.e.providers.p]
type = "openai"
model_name = "text-embedding-3-small"
[embedding_models.m]
routing = ["p"]
[embedding_models.m.providers.p]
type = "openai"
model_name = "text-embedding-3-large"
"""


def test_endpoints_keep_what_shapes_their_requests() -> None:
    migration = moved(SHAPED)
    found = ours(migration)
    model = found["models"]["m"]
    first, second = model["endpoints"]
    assert model["timeouts"] == {"total_s": 9.0}
    assert first["timeouts"] == {"first_token_s": 0.5}
    assert first["extra_body"] == [
        {"pointer": "/user", "delete": True},
        {"pointer": "/m", "value": "$${V}"},
        {"pointer": "/tools/-", "value": {"type": "web_search"}},
    ]
    assert first["extra_headers"] == [{"name": "x-a", "value": "1"}]
    assert second["params"] == {"reasoning_format": "parsed"}
    [priced] = found["providers"]["a"]["models"]
    assert priced["pricing"] == {"input": 2.5, "cache_read": 1.25, "output": 10.0}
    assert found["providers"]["a"]["api_key"] == "${TEAM_KEY}"
    assert [n.where for n in migration.notes if "never used" in n.said] == [
        "t0.toml: models.m.providers.spare"
    ]
    assert migration.edits["tensorzero::embedding_model_name::e"] == "e"
    assert migration.edits["tensorzero::embedding_model_name::m"] == "embedding/m"


FUNCTIONS = """
[tools.search]
description = "Searches"
parameters = "tool.json"
strict = true
[functions.answer]
type = "chat"
tools = ["search"]
tool_choice = {specific = "search"}
parallel_tool_calls = false
experimentation.type = "static"
experimentation.candidate_variants = {b = 0.3, a = 0.7}
experimentation.fallback_variants = ["c"]
[functions.answer.variants.a]
type = "chat_completion"
model = "openai::gpt-4o"
system_template = "static.txt"
temperature = 0.5
max_tokens = 10
stop_sequences = ["X"]
retries = {num_retries = 2, max_delay_s = 3}
extra_body = [{pointer = "/a", value = 1}]
timeouts = {streaming.ttft_ms = 100}
[functions.answer.variants.b]
type = "chat_completion"
model = "anthropic::claude-sonnet-4-5"
thinking_budget_tokens = 2000
max_tokens = 4000
templates.system.path = "system.minijinja"
user_template = "user.minijinja"
[functions.answer.variants.c]
type = "chat_completion"
model = "openai::responses::gpt-5-codex"
[functions."odd name!"]
type = "json"
output_schema = "out.json"
[functions."odd name!".variants.v]
type = "chat_completion"
model = "google_ai_studio_gemini::gemini-2.5-flash"
json_mode = "tool"
[functions."odd name!".variants.w]
type = "chat_completion"
model = "openai::gpt-4o"
json_mode = "strict"
[functions."odd name!".variants.x]
type = "chat_completion"
model = "openai::gpt-4o"
json_mode = "on"
"""


def test_functions_become_presets_and_their_variants_candidates() -> None:
    migration = moved(FUNCTIONS)
    presets = ours(migration)["presets"]
    assert presets["answer"] == {
        "candidates": [
            {"preset": "answer.a", "weight": 0.7},
            {"preset": "answer.b", "weight": 0.3},
        ],
        "fallbacks": ["@answer.c"],
    }
    a, b, c = (presets[f"answer.{v}"] for v in "abc")
    assert (a["model"], a["system_prompt"]) == ("openai/gpt-4o", "You are terse. Costs $${5}.")
    assert a["retry"] == {"max": 2, "max_ms": 3000.0} and a["timeouts"] == {"first_token_s": 0.1}
    assert a["extra_body"] == [{"pointer": "/a", "value": 1}]
    params = a["params"]
    assert (params["temperature"], params["max_completion_tokens"], params["stop"]) == (
        0.5,
        10,
        ["X"],
    )
    [tool] = params["tools"]
    assert tool["function"]["name"] == "search" and tool["function"]["strict"] is True
    assert tool["function"]["parameters"] == json.loads(FILES["tool.json"])
    assert params["tool_choice"] == {"type": "function", "function": {"name": "search"}}
    assert params["parallel_tool_calls"] is False
    assert (b["model"], b["params"]["max_tokens"]) == ("anthropic/claude-sonnet-4-5", 4000)
    assert b["params"]["reasoning"] == {"max_tokens": 2000}
    assert {*b["templates"]} == {"system", "user", "rules.txt"}
    assert c["model"] == "openai-responses:gpt-5-codex"
    assert migration.edits["tensorzero::function_name::odd name!"] == "@odd_name_"
    v, w, x = (presets[f"odd_name_.{one}"] for one in "vwx")
    told = {"name": "response", "strict": True, "schema": json.loads(FILES["out.json"])}
    assert v["structured"] == "tool" and v["params"]["response_format"]["json_schema"] == told
    assert "structured" not in w and w["params"]["response_format"]["json_schema"] == told
    assert x["params"]["response_format"] == {"type": "json_object"}
    assert presets["odd_name_"]["output"] == "json"
    assert [one["weight"] for one in presets["odd_name_"]["candidates"]] == [1.0] * 3
    assert migration.is_clean


def test_what_was_migrated_can_be_asked_for() -> None:
    environ = dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"), "k")
    router = router_of(moved(FUNCTIONS).text, environ)
    chain = router.resolve("@answer", CHAT_OP).chain
    assert [target.preset for target in chain] == ["answer.a", "answer.b", "answer.c"]
    assert chain[0].shape.system == "You are terse. Costs ${5}."


def function(*lines: str) -> str:
    """A function with one variant, of more lines."""
    head = ["[functions.f.variants.v]", 'type = "chat_completion"', 'model = "openai::m"']
    return "\n".join([*head, *lines])


NOT_CARRIED = [
    # what the file says, what that is, and what is said of it
    ("gateway.observability.enabled = false", "info", "no database"),
    ("clickhouse.disable_automatic_migrations = true", "info", "no database"),
    ("metrics.ok = {type = 'boolean', level = 'inference'}", "warning", "feedback loop"),
    ("evaluations.e.type = 'inference'", "warning", "feedback loop"),
    (
        "rate_limiting.rules = [{always = true, tokens_per_hour = 5}]",
        "warning",
        "tokens_per_hour for everybody: no such limit is shipped yet",
    ),
    (
        "rate_limiting.rules = [{priority = 1, tokens_per_minute = 5, scope = [{tag_key = 'u'}]}]",
        "warning",
        "tokens_per_minute by ",
    ),
    ("rate_limiting.default_cost = 2.0", "warning", "limits of cost"),
    ("rate_limiting.foo = 1", "unknown", "no such key"),
    ("gateway.export.otlp.traces.enabled = true", "note", "port 4318, and unset"),
    (
        "gateway.export.otlp.traces = {enabled = true, format = 'openinference'}",
        "warning",
        "openinference: spans follow",
    ),
    ("gateway.export.otlp.traces.foo = 1", "unknown", "no such key"),
    ("gateway.export.otlp.foo.enabled = true", "unknown", "no such key"),
    (
        "gateway.metrics.tensorzero_inference_latency_overhead_seconds_buckets = [1.0]",
        "info",
        "GET /metrics",
    ),
    ("gateway.auth.enabled = true", "note", "new ones"),
    ("gateway.bind_address = '0.0.0.0:3000'", "note", "not loopback"),
    ("gateway.foo = 1", "unknown", "no such key"),
    ("modles.m.routing = []", "unknown", "no such key"),
    (one_model("openai", f"{NAMED}\nfoo = 1"), "unknown", "no such key"),
    (one_model("openai", f"{NAMED}\napi_key_location = 'sdk'"), "warning", "give a key"),
    (one_model("openai", "model_name = 3"), "warning", "expected a string"),
    (one_model("openai", ""), "warning", "required"),
    (one_model("vllm", NAMED), "warning", "required"),
    (one_model("openai", f"{NAMED}\napi_base = 'nowhere'"), "warning", "expected http"),
    (one_model("openai", f"{NAMED}\nextra_body = [{{value = 1}}]"), "warning", "expected pointer"),
    (one_model("openai", f"{NAMED}\ncost = [{{pointer = '/x'}}]"), "warning", "no counterpart"),
    ("models.m.routing = ['zz']", "warning", "no provider"),
    ("functions.f.variants.v.type = 'experimental_best_of_n'", "warning", "not shipped"),
    (
        function("model = 'q'").replace('model = "openai::m"\n', ""),
        "warning",
        "could not be carried",
    ),
    ("functions.f.experimentation.type = 'adaptive'\n" + function(), "warning", "equal weights"),
    (function("system_template = 'nowhere.txt'"), "warning", "cannot be read"),
    (function("user_template = 'broken.minijinja'"), "warning", "macro"),
    ("tools.t.parameters = 'not.json'", "warning", "no JSON"),
]


@pytest.mark.parametrize(("text", "level", "said"), NOT_CARRIED)
def test_what_is_not_carried_over_is_told_with_its_place(text: str, level: str, said: str) -> None:
    migration = moved(text)
    ours(migration)
    found = [note for note in migration.notes if note.level == level and said in note.said]
    assert found and all(note.where.startswith("t0.toml: ") for note in found)
    assert migration.is_clean is (level in ("info", "note"))


def test_several_files_are_one_configuration() -> None:
    first = "[models.m]\nrouting = ['p']"
    second = one_model("groq", NAMED).replace('[models.m]\nrouting = ["p"]', "")
    assert ours(moved(first, second))["models"]["m"]["endpoints"][0]["provider"] == "groq"
    with pytest.raises(
        MigrationError, match=r"models\.m\.routing is defined in t0\.toml and again in t1\.toml"
    ):
        moved(first, first)
    with pytest.raises(MigrationError, match=r"t0\.toml: "):
        moved("[")


def test_the_result_is_always_the_same_and_names_its_origins() -> None:
    text = moved(FUNCTIONS).text
    assert text == moved(FUNCTIONS).text
    assert "[presets.answer]  # t0.toml: functions.answer\n" in text


def test_shorthand_names_lead_to_our_models() -> None:
    assert shorthand("openai::gpt-4o") == ("openai/gpt-4o", False)
    assert shorthand("openai::responses::gpt-5") == ("openai/gpt-5", True)
    assert shorthand("openrouter::a/b") == ("openrouter/a/b", False)
    assert shorthand("fireworks::accounts/x/y") == ("fireworks/accounts/x/y", False)
    assert shorthand("openai::ft:gpt-4o:x::1") == ("openai/ft:gpt-4o:x::1", False)
    assert shorthand("gcp_vertex_gemini::projects/p/locations/l/publishers/google/models/g")[0] == (
        "vertex/g"
    )
    assert shorthand("gpt-4o") == shorthand("vllm::m") == shorthand("nobody::m") == ("", False)
    assert (preset_name("a b/c"), preset_name("-x")) == ("a_b_c", "f-x")


def test_no_change_of_a_file_breaks_the_migration() -> None:
    rng = random.Random(9)
    odd: list[Any] = [
        1,
        -1.5,
        True,
        "x",
        "env::",
        "none",
        "${X}",
        [],
        [1],
        {},
        {"a": 1},
        [{}],
        "'''",
    ]

    def places(value: Any) -> list[tuple[Any, Any]]:
        entries = list(value.items() if isinstance(value, dict) else enumerate(value))
        inner = [p for _, one in entries if isinstance(one, dict | list) for p in places(one)]
        return [(value, key) for key, _ in entries] + inner

    for _ in range(400):
        tree = tomllib.loads(rng.choice([SHAPED, FUNCTIONS]))
        for _ in range(rng.randrange(1, 4)):
            holder, key = rng.choice(places(tree))
            holder[key] = rng.choice(odd)
        migration = migrate_tensorzero([("t.toml", written(tree))], read)
        tomllib.loads(migration.text)


def written(tree: dict[str, Any]) -> str:
    """A tree as TOML, all of it inline."""

    def value(one: Any) -> str:
        if isinstance(one, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in one.items()) + "}"
        if isinstance(one, list):
            return "[" + ", ".join(map(value, one)) + "]"
        return json.dumps(one)

    return "\n".join(f"{json.dumps(key)} = {value(one)}" for key, one in tree.items())


# --- the command


MIGRATE = ("migrate", "tensorzero")


def test_the_command_writes_a_file_and_a_report(tmp_path: Path, run: Callable[..., Ran]) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "a.toml").write_text(FUNCTIONS)
    (folder / "b.toml").write_text("[metrics.m]\ntype = 'float'\n")
    pattern = str(folder / "**" / "*.toml")
    status, out, err = run(*MIGRATE, pattern, "-o", "new.toml", "--report", "report.md")
    assert (status, out) == (3, "") and "1 warnings" in err
    assert parse_config((tmp_path / "new.toml").read_text(), {}).problems == []
    report = (tmp_path / "report.md").read_text()
    assert "metrics`: needs TensorZero" in report and "`@answer`" in report
    assert run(*MIGRATE, pattern, "--check")[:2] == (3, "")
    assert run(*MIGRATE, pattern, "--strict", "-o", "no.toml")[0] == 1
    assert not (tmp_path / "no.toml").exists()
    status, out, _ = run(*MIGRATE, str(folder / "a.toml"), "--json")
    assert status == 0 and json.loads(out)["converted"]["presets"] == 8


@pytest.mark.parametrize("args", [["nowhere.toml"], ["*.nothing"]])
def test_files_that_cannot_be_read_exit_with_2(args: list[str], run: Callable[..., Ran]) -> None:
    status, out, err = run(*MIGRATE, *args)
    assert (status, out) == (2, "") and args[0] in err and "Traceback" not in err


def test_where_traces_went_they_go_on_to() -> None:
    text = """
[gateway.export.otlp.traces]
enabled = true
extra_headers = {authorization = "Bearer t"}
include_content = true
"""
    moved = migrate_tensorzero([("t.toml", text)], lambda *_: "")
    told = tomllib.loads(moved.text)["otel"]
    assert told == {
        "metrics": False, "content": "full", "headers": {"authorization": "Bearer t"},
    }  # fmt: skip
    settings = bitrouter.otel_of(parse_config(moved.text, {}).config, {})
    assert settings.metrics is None and settings.content
    assert settings.traces and settings.traces.url == "http://localhost:4318/v1/traces"
    off = migrate_tensorzero(
        [("t.toml", text.replace("= true\nextra", "= false\nextra"))], lambda *_: ""
    )
    assert "otel" not in tomllib.loads(off.text)


def test_a_limit_for_everybody_is_that_of_the_only_provider() -> None:
    rule = "{always = true, model_inferences_per_minute = 60, tokens_per_minute = 900}"
    text = f"{one_model('openai', NAMED)}\n[rate_limiting]\nrules = [{rule}]\n"
    moved = migrate_tensorzero([("t.toml", text)], lambda *_: "")
    [provider] = tomllib.loads(moved.text)["providers"].values()
    assert provider["rate_limits"] == {
        "*": {"requests_per_minute": 60, "tokens_per_minute": 900},
    }  # fmt: skip
    assert moved.is_clean and not parse_config(moved.text, {}).problems
    second = one_model("groq", NAMED).replace("models.", "models.z")
    two = text.replace("[rate_limiting]", f"{second}\n[rate_limiting]")
    moved = migrate_tensorzero([("t.toml", two)], lambda *_: "")
    assert not moved.is_clean and "rate_limits" not in moved.text


# What cannot be carried over is told, and never stops the rest.

REST = one_model("groq", NAMED).replace("models.m", "models.rest")

REFUSED = [
    # what one value is, where the file has it, and what is said of it
    one_model("openai", f"{NAMED}\ntimeouts = {{non_streaming.total_ms = 3}}"),
    one_model("openai", f"{NAMED}\ntimeouts = {{non_streaming.total_ms = inf}}"),
    one_model("openai", f'{NAMED}\nextra_headers = [{{name = "host", value = "x"}}]'),
    one_model("openai", f'{NAMED}\nextra_headers = [{{name = "a b", value = "x"}}]'),
    one_model("openai", f'{NAMED}\napi_key_location = "OPENAI_API_KEY"'),
    one_model("openai", f"{NAMED}\napi_key_location = 5"),
    one_model("azure", 'deployment_id = "n"'),
    one_model("azure", 'deployment_id = "n"\nendpoint = "x.openai.azure.com"'),
    one_model("gcp_vertex_gemini", 'endpoint_id = "1"\nlocation = "l"\nproject_id = "p"'),
    one_model("aws_bedrock", 'model_id = "n"\nregion = "dynamic::place"'),
    '[gateway]\nbind_address = "nonsense"',
    '[rate_limiting]\nrules = [{always = true, tokens_per_minute = 0}]',
    '[rate_limiting]\nrules = [{always = true, tokens_per_minute = -3}]',
    '[rate_limiting]\nrules = [5]',
    function('temperature = "hot"'),
    function("temperature = nan"),
    function("retries = {num_retries = -1}"),
    function('json_mode = "bogus"'),
    '[functions.f]\ntype = "wat"\n' + function(),
    function() + '\n[functions.f.experimentation]\ntype = "static"\nfallback_variants = ["w"]',
    function() + "\n" + function().replace("functions.f.", 'functions."f.v".'),
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_a_value_that_we_refuse_is_told_and_the_rest_is_carried_over(text: str) -> None:
    migration = moved(f"{text}\n", REST)
    assert not migration.is_clean
    assert ours(migration)["models"]["rest"]["endpoints"]


def test_a_region_of_bedrock_is_where_its_models_are_asked() -> None:
    text = ""
    for name, region in (("a", "eu-west-1"), ("b", "us-west-2"), ("c", "env::MY_REGION")):
        more = f'model_id = "n"\nregion = "{region}"'
        text += one_model("aws_bedrock", more).replace("models.m", f"models.{name}")
    found = ours(moved(text))
    bases = [
        found["providers"][found["models"][name]["endpoints"][0]["provider"]]["api_base"]
        for name in "abc"
    ]
    assert bases == [
        f"https://bedrock-mantle.{region}.api.aws/v1"
        for region in ("eu-west-1", "us-west-2", "${MY_REGION}")
    ]


def test_the_default_key_of_a_type_is_that_of_its_shorthands_too() -> None:
    text = '[provider_types.openai.defaults]\napi_key_location = "env::MINE"\n' + function()
    text += "\n"
    text += function().replace("variants.v", "variants.w").replace("::m", "::responses::m")
    found = ours(moved(text))
    assert found["providers"]["openai"]["api_key"] == "${MINE}"
    assert found["providers"]["openai-responses"]["api_key"] == "${MINE}"
    assert found["presets"]["f.v"]["model"] == "openai/m"


def test_of_two_limits_the_lower_one_counts() -> None:
    rules = "{always = true, tokens_per_minute = 10}, {always = true, tokens_per_minute = 99}"
    found = ours(moved(one_model("openai", NAMED), f"[rate_limiting]\nrules = [{rules}]"))
    [provider] = found["providers"].values()
    assert provider["rate_limits"]["*"] == {"tokens_per_minute": 10}


def test_names_of_any_characters_stay_names() -> None:
    text = one_model("openai", NAMED).replace("models.m", r'models."a\nb\u007f"')
    assert list(ours(moved(text))["models"]) == ["a\nb\x7f"]


def test_no_value_that_may_be_a_secret_is_printed() -> None:
    text = '[gateway.export.otlp.traces]\nenabled = true\nextra_headers = "Bearer sk-hidden"'
    assert "sk-hidden" not in repr(moved(text).notes)
