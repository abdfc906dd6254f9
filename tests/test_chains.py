"""What belongs to each part of a chain: wishes, turns, ties, and what is left out of it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from bitrouter import (
    CHAT_OP,
    NO_WISHES,
    PLAIN,
    ApiProtocol,
    BadRequest,
    Breaker,
    Change,
    Document,
    Health,
    KeyMissing,
    Price,
    Router,
    Shape,
    Unset,
    Wishes,
    active_providers,
    choose,
    needs_of,
    parse_config,
    session_of,
    shaped,
    wishes_in,
)

CHAT, RESPONSES, MESSAGES, GEMINI = ApiProtocol
FLEET = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
tags = ["eu"]
models = [{id = "m", pricing = {input = 5, output = 5}}, {id = "a"}]
[providers.bb]
api_base = "http://10.0.0.2/v1"
models = [{id = "m", pricing = {input = 1, output = 2}}, {id = "b"}, {id = "cc/m"}]
[providers.cc]
api_base = "http://10.0.0.3/v1"
models = [{id = "m"}, {id = "n"}, {id = "x:free"}]
[providers.far]
api_base = "http://10.0.0.4/v1"
models = [{id = "deep", pricing = {input = 1, output = 2}, context = 9}]
api_protocol = {"d*" = "messages", "*" = "openai"}
[providers.farther]
derives = "far"
api_base = "http://10.0.0.5/v1"
[providers.mine]
derives = "openai"

[variants.strict.routing]
allow_fallbacks = false
sort = "cost"
[variants.eu.routing]
require_tags = ["eu"]
[variants.lost.routing]
only = ["${NOBODY}"]

[presets.ordered]
model = "m"
routing = {order = ["cc"], sort = "cost"}
fallbacks = ["cc:n"]
[presets.chain]
model = "m"
fallbacks = ["cc:n"]
[presets.one]
model = "m:strict"
fallbacks = ["cc:n"]
[presets.drawn]
candidates = [{model = "aa:m", weight = 3}, {model = "bb:m"}]
routing = {allow_fallbacks = false}
fallbacks = ["cc:n"]
[presets.exact]
model = "m"
routing = {require_parameters = true, only = ["aa"]}
fallbacks = ["cc:n"]
[presets.who]
model = "m"
system_prompt = "${WHO}"
[presets.patient]
model = "n"
fallbacks = ["@who", "a:lost"]
[presets.patiently]
candidates = [{preset = "who"}, {model = "n"}]
[presets.free]
model = "x:free"
fallbacks = ["ft:gpt-4o:team::1"]

[models.three]
strategy = "balance"
endpoints = [
  {provider = "aa", service_id = "m"}, {provider = "bb", service_id = "m"},
  {provider = "cc", service_id = "m"},
]
[models.priced]
endpoints = [{provider = "cc", service_id = "m"}]
pricing = {input = 3, output = 4}
[models.spoken]
endpoints = [{provider = "cc", service_id = "m"}, {provider = "echo", service_id = "echo"}]
"""


def routed(text: str = FLEET, **environ: str) -> Router:
    loaded = parse_config(text, environ)
    assert not loaded.problems
    return Router(loaded.config, active_providers(loaded.config, environ)[0])


def asked(
    router: Router,
    model: str | tuple[str, ...],
    wishes: Wishes = NO_WISHES,
    health: Health | None = None,
    draw: float = 0.0,
) -> list[str]:
    route = router.resolve(model, CHAT_OP, wishes)
    chosen = choose(route, None, health or Health(Breaker()), 0.0, draw=lambda: draw)
    return [f"{target.name}/{target.model}" for target in chosen.chain]


@pytest.mark.parametrize(("model", "wishes", "chain"), [
    ("@ordered",   NO_WISHES,                      "cc/m bb/m aa/m cc/n"),
    (("@ordered", "a"), NO_WISHES,                 "cc/m bb/m aa/m cc/n aa/a"),
    ("@one",       NO_WISHES,                      "bb/m cc/n"),
    ("@one",       Wishes(sort="latency"),         "aa/m cc/n"),
    ("@one",       Wishes(allow_fallbacks=False),  "bb/m"),
    (("@one", "a"), NO_WISHES,                     "bb/m cc/n aa/a"),
    (("m", "a"),   Wishes(allow_fallbacks=False),  "aa/m"),
    ("@drawn",     NO_WISHES,                      "aa/m cc/n"),
    ("@chain:eu",  NO_WISHES,                      "aa/m"),
    ("@chain/m:eu", NO_WISHES,                     "aa/m"),
    ("@chain:strict", NO_WISHES,                   "bb/m cc/n"),
    ("@chain/m:strict", NO_WISHES,                 "bb/m cc/n"),
])  # fmt: skip
def test_a_presets_wishes_hold_for_its_own_model_and_a_requests_for_all(
    model: str | tuple[str, ...], wishes: Wishes, chain: str
) -> None:
    assert asked(routed(), model, wishes) == chain.split()


def test_of_candidates_without_fallbacks_only_the_drawn_one_is_asked() -> None:
    firsts = {tuple(asked(routed(), "@drawn", draw=n / 100)) for n in range(100)}
    assert firsts == {("aa/m", "cc/n"), ("bb/m", "cc/n")}


def test_a_presets_parameters_are_required_of_its_own_model() -> None:
    chain = routed().resolve("@exact", CHAT_OP).chain
    assert [(t.provider, t.exacting) for t in chain] == [("aa", True), ("cc", False)]
    asked_for = routed().resolve("@exact", CHAT_OP, Wishes(require_parameters=True)).chain
    assert all(target.exacting for target in asked_for)


def test_requests_that_leave_some_out_do_not_take_the_others_turns() -> None:
    router, health = routed(), Health(Breaker())
    firsts: Counter[str] = Counter()
    for _ in range(300):
        asked(router, "three", Wishes(only=("aa",)), health)
        firsts[asked(router, "three", health=health)[0]] += 1
        firsts[asked(router, "three", Wishes(ignore=("cc",)), health)[0]] += 1
    assert firsts["cc/m"] == 100
    assert abs(firsts["aa/m"] - firsts["bb/m"]) <= 2


ACCOUNTS = """
[providers.openai]
accounts = [{label = "main", api_key = "1"}, {label = "backup", api_key = "2"}]
"""


def test_equals_in_a_ranking_stay_in_the_order_of_accounts_and_priorities() -> None:
    assert asked(routed(ACCOUNTS), "gpt-4o:cost") == ["openai:main/gpt-4o", "openai:backup/gpt-4o"]
    ten = routed("", OPENAI_API_KEY=",".join(f"k{n}" for n in range(1, 11)))
    expected = [f"openai:{n}/gpt-4o" for n in range(1, 11)]
    assert asked(ten, "gpt-4o:latency") == expected
    text = "[providers.openrouter]\npriority = 0\n[providers.openai]\npriority = 1"
    both = routed(text, OPENROUTER_API_KEY="1", OPENAI_API_KEY="2")
    assert asked(both, "gpt-5.4:cost") == ["openrouter/openai/gpt-5.4", "openai/gpt-5.4"]


@pytest.mark.parametrize(("models", "wishes", "chain", "lost"), [
    (("a", "m"),    Wishes(only=("bb",)),    "bb/m", "a: "),
    (("n", "b"),    Wishes(max_input=3.0, tags=()), "", ""),
    (("m", "@who"), NO_WISHES,               "aa/m bb/m cc/m", "@who: presets.who cannot be used"),
    (("@who", "n"), NO_WISHES,               "cc/n", "@who: presets.who cannot be used"),
    (("a:lost", "n"), NO_WISHES,             "cc/n", "a:lost: variants.lost cannot be used"),
])  # fmt: skip
def test_an_entry_that_cannot_be_served_is_left_out_and_told(
    models: tuple[str, ...], wishes: Wishes, chain: str, lost: str
) -> None:
    router = routed()
    if not chain:
        with pytest.raises(BadRequest) as refused:
            router.resolve(models, CHAT_OP, wishes)
        assert refused.value.code == "no_eligible_provider"
        return
    route = router.resolve(models, CHAT_OP, wishes)
    assert [f"{t.name}/{t.model}" for t in route.chain] == chain.split()
    assert any(why.startswith(lost) for why in route.left_out)


@pytest.mark.parametrize("model", ["@nope", "nope", "@chain:nope", "@free/"])
def test_an_entry_that_nobody_knows_is_told_by_its_number(model: str) -> None:
    with pytest.raises(BadRequest) as refused:
        routed().resolve(("m", model), CHAT_OP)
    assert refused.value.param == "models[1]"
    assert refused.value.message.startswith("models[1]: ")
    assert "model: " not in refused.value.message


def test_what_a_preset_cannot_use_is_left_out_of_it() -> None:
    router = routed()
    assert asked(router, "@patient") == ["cc/n"]
    assert asked(router, "@patiently") == ["cc/n"]
    assert any("presets.who" in why for why in router.resolve("@patient", CHAT_OP).left_out)
    assert any("variants.lost" in why for why in router.resolve("@patient", CHAT_OP).left_out)
    with pytest.raises(Unset, match="who cannot be used"):
        router.resolve("@who", CHAT_OP)


def test_a_virtual_models_own_price_is_what_it_costs() -> None:
    router = routed()
    assert router.resolve("priced", CHAT_OP).chain[0].price == Price(3.0, 4.0)
    assert asked(router, "priced", Wishes(max_input=3.0)) == ["cc/m"]
    with pytest.raises(BadRequest, match="costs 3 per million input tokens"):
        router.resolve("priced", CHAT_OP, Wishes(max_input=2.0))


def test_the_echo_can_be_an_endpoint() -> None:
    assert asked(routed(), "spoken") == ["cc/m", "echo/echo"]


def test_a_subscription_is_asked_only_where_it_is_named() -> None:
    text, keys = '[providers.{}]\nclass = "subscription"', {"NOVITA_API_KEY": "1"}
    router = routed(text.format("novita"), ZAI_API_KEY="2", **keys)
    assert asked(router, "glm-4.7") == ["zai/glm-4.7"]
    named = Wishes(only=("novita",))
    assert asked(router, "glm-4.7", named) == ["novita/zai-org/glm-4.7"]
    assert asked(router, "novita/zai-org/glm-4.7") == ["novita/zai-org/glm-4.7"]

    keys = {"OPENAI_API_KEY": "1", "OPENROUTER_API_KEY": "2"}
    router = routed(text.format("openai"), **keys)
    assert asked(router, "gpt-4o") == ["openrouter/openai/gpt-4o"]
    assert asked(router, "openai/gpt-4o") == ["openai/gpt-4o", "openrouter/openai/gpt-4o"]
    router = routed(text.format("openrouter"), **keys)
    assert asked(router, "openai/gpt-4o") == ["openai/gpt-4o"]
    router = routed('[providers.zai_coding_plan]\nclass = "gateway"', ZAI_CODING_PLAN_API_KEY="1")
    assert asked(router, "glm-4.7") == ["zai_coding_plan/glm-4.7"]


def test_a_preset_may_name_a_model_with_colons_in_its_id() -> None:
    router = routed(OPENAI_API_KEY="1")
    assert asked(router, "@free") == ["cc/x:free", "openai/ft:gpt-4o:team::1"]


def test_who_derives_shares_models_prices_and_protocols() -> None:
    router = routed()
    assert asked(router, "deep") == ["far/deep"]
    target = router.resolve("farther:deep", CHAT_OP).chain[0]
    assert (target.price, target.context) == (Price(1.0, 2.0), 9)
    assert (target.protocol, target.base) == (MESSAGES, "http://10.0.0.5/v1")
    ranked = routed(FLEET.replace('derives = "far"', 'derives = "far"\npriority = 5'))
    assert asked(ranked, "deep") == ["far/deep", "farther/deep"]


@pytest.mark.parametrize("model", ["mine/gpt-4o", "mine:gpt-4o"])
def test_who_derives_and_has_no_key_is_told_which_one_it_lacks(model: str) -> None:
    with pytest.raises(KeyMissing) as refused:
        routed().resolve(model, CHAT_OP)
    assert refused.value.extra["env"] == "MINE_API_KEY"


def test_an_id_that_is_a_place_and_is_declared_elsewhere_lists_both() -> None:
    router = routed()
    listed = next(one for one in router.listing() if one.id == "cc/m")
    assert listed.providers == ("bb", "cc")
    assert asked(router, "cc/m") == ["bb/cc/m", "cc/m"]


def test_null_tags_are_no_tags() -> None:
    assert wishes_in({"require_tags": None, "tags": ["eu"]}).tags == ("eu",)
    for name in ("tags", "require_tags"):
        with pytest.raises(BadRequest) as refused:
            wishes_in({name: 5})
        assert refused.value.param == f"provider.{name}"


@pytest.mark.parametrize(("protocol", "body", "params", "expected"), [
    (RESPONSES, {"reasoning": None},        {"reasoning_effort": "low"},
     {"reasoning": {"effort": "low"}}),
    (RESPONSES, {"text": None},             {"verbosity": "low"}, {"text": {"verbosity": "low"}}),
    (GEMINI,    {"generationConfig": None}, {"temperature": 1},
     {"generationConfig": {"temperature": 1}}),
    (GEMINI,    {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}},
     {"reasoning_effort": "low"}, None),
    (GEMINI,    {"generationConfig": {"thinkingConfig": {"thinking_budget": 0}}},
     {"reasoning_effort": "low"}, None),
    (MESSAGES,  {"thinking": {"type": "disabled"}}, {"reasoning_effort": "low"}, None),
    (CHAT,      {"reasoning": {"effort": "high"}},  {"reasoning_effort": "low"}, None),
    (CHAT,      {"functions": [{"name": "f"}]},     {"tools": [{"type": "function"}]}, None),
    (CHAT,      {}, {"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 5}),
    (CHAT,      {}, {"max_completion_tokens": 7, "max_tokens": 5}, {"max_completion_tokens": 7}),
    (RESPONSES, {}, {"max_tokens": 5, "max_completion_tokens": 7}, {"max_output_tokens": 5}),
])  # fmt: skip
def test_a_field_is_added_only_where_nothing_says_the_same(
    protocol: ApiProtocol, body: dict[str, Any], params: dict[str, Any], expected: Any
) -> None:
    document = Document(json.dumps(body).encode())
    value = shaped(document, Shape(params), protocol).value
    assert value == (body if expected is None else expected)


def test_of_fields_that_say_the_same_the_nearest_counts() -> None:
    text = """
[providers.cc]
api_base = "http://10.0.0.3/v1"
params = {max_completion_tokens = 7, seed = 1, user = "p"}
models = [{id = "m"}]
[presets.short]
model = "m"
params = {max_tokens = 5, seed = 2}
"""
    shape = routed(text).resolve("@short", CHAT_OP).chain[0].shape
    body = shaped(Document(b"{}"), shape, CHAT).value
    assert body == {"max_tokens": 5, "seed": 2, "user": "p"}
    assert shaped(Document(b"{}"), PLAIN, CHAT).value == {}


@pytest.mark.parametrize("part", ["3", "x", "00", "-1", "9" * 5000])
def test_a_place_beyond_a_lists_end_is_refused_and_nothing_there_is_taken_out(part: str) -> None:
    document = Document(b'{"a": [1, 2]}')
    with pytest.raises(BadRequest, match="/a is a list of 2; expected `-` or an index"):
        document.changed([Change(f"/a/{part}", 3)])
    assert document.changed([Change(f"/a/{part}", delete=True)]).raw == document.raw


@pytest.mark.parametrize("part", ["-", "2"])
def test_a_lists_end_can_be_named_in_two_ways(part: str) -> None:
    assert Document(b'{"a": [1, 2]}').changed([Change(f"/a/{part}", 3)]).value == {"a": [1, 2, 3]}


def test_null_on_the_way_is_as_good_as_nothing() -> None:
    document = Document(b'{"a": null, "b": 1}')
    assert document.changed([Change("/a/x/-", 3)]).value == {"a": {"x": [3]}, "b": 1}
    assert document.changed([Change("/a/x", delete=True)]).raw == document.raw
    with pytest.raises(BadRequest, match="no object or list at /b"):
        document.changed([Change("/b/x", 3)])


def _turn(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text, **more}]}


@pytest.mark.parametrize(("before", "after"), [
    ({"messages": [_turn("Hi", cache_control={"type": "ephemeral"})]},
     {"messages": [_turn("Hi"), {"role": "assistant", "content": "Ho"}, _turn("x")]}),
    ({"messages": [{"role": "user", "content": "Hi"}]},
     {"messages": [_turn("Hi"), {"role": "assistant", "content": "Ho"}]}),
    ({"input": "Hi"},
     {"input": [{"id": "1", "role": "user", "content": "Hi"}, {"role": "assistant"}]}),
])  # fmt: skip
def test_a_conversation_is_the_same_whatever_else_stands_at_its_first_words(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    assert session_of({}, before, "me").key == session_of({}, after, "me").key
    assert session_of({}, after, "me").goes_on
    other = json.loads(json.dumps(before).replace("Hi", "Hey"))
    assert session_of({}, other, "me").key != session_of({}, before, "me").key


@pytest.mark.parametrize(("body", "able", "tokens"), [
    ({"modalities": ["text", "audio"]},                              {"audio_output"}, 0),
    ({"generationConfig": {"responseModalities": ["TEXT", "IMAGE"]}}, {"image_output"}, 0),
    ({"modalities": "audio"},                                        set(),            0),
    ({"input": [{"type": "image_generation_call", "result": "A" * 9000}]}, set(),      500),
    ({"input": [{"type": "computer_call_output", "output": {
        "type": "computer_screenshot", "image_url": "A" * 9000}}]},  {"image_input"},  505),
    ({"input": [{"type": "reasoning", "encrypted_content": "A" * 9000}]}, set(),       2),
    ({"messages": [{"content": [{"signature": "A" * 9000}]}]},       set(),            0),
])  # fmt: skip
def test_what_an_answer_is_to_be_made_of_is_needed_and_what_is_no_text_is_not_counted(
    body: dict[str, Any], able: set[str], tokens: int
) -> None:
    needs = needs_of(body)
    assert (set(needs.able), needs.tokens) == (able, tokens)


def test_whoever_makes_no_pictures_is_not_asked_for_any() -> None:
    text = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
models = [{id = "m", capabilities = ["tools"]}]
[providers.bb]
api_base = "http://10.0.0.2/v1"
models = [{id = "m", capabilities = ["tools", "image_output"]}]
"""
    route = routed(text).resolve("m", CHAT_OP)
    needs = needs_of({"modalities": ["image"]})
    chosen = choose(route, needs, Health(Breaker()), 0.0)
    assert [target.provider for target in chosen.chain] == ["bb"]
    assert chosen.left_out == ("aa/m: cannot do image_output",)


def test_a_suffix_that_is_part_of_a_declared_id_is_no_variant() -> None:
    text = '[providers.a]\napi_base = "http://a/v1"\nmodels = [{id = "q:cost"}, {id = "q"}]'
    router = routed(text)
    for asked_for, model in {
        "q:cost": "q:cost", "a:q:cost": "q:cost", "a/q:cost": "q:cost",
        "q:cost:cost": "q:cost", "a:q:latency": "q", "a/q:latency": "q",
    }.items():  # fmt: skip
        assert [target.model for target in router.resolve(asked_for, CHAT_OP).chain] == [model]


def test_an_error_lists_some_of_a_thousand_names() -> None:
    text = "".join(f"[presets.p{n}]\nmodel = 'openai/gpt-4o'\n" for n in range(1000))
    router = routed(text, OPENAI_API_KEY="1")
    with pytest.raises(BadRequest, match=r"@p0, @p1, .*, @p19 and 980 more$") as refused:
        router.resolve("@completely-else", CHAT_OP)
    assert len(refused.value.message) < 300
