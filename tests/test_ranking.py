"""Which target a request goes to first: what it needs, what was measured, whose turn it is."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from bitrouter import (
    CHAT_OP,
    NO_WISHES,
    BadRequest,
    Breaker,
    Chosen,
    Health,
    Needs,
    Router,
    Target,
    UpstreamBroken,
    Wishes,
    active_providers,
    choose,
    needs_of,
    parse_config,
    rooms_in,
    session_of,
    share_of,
)

FLEET = """
[providers.aa]
api_base = "http://10.0.0.1/v1"
models = [{id = "m", context = 1000, pricing = {input = 5, output = 5}}]
[providers.bb]
api_base = "http://10.0.0.2/v1"
models = [{id = "m", pricing = {input = 1, output = 2}}]
[providers.cc]
api_base = "http://10.0.0.3/v1"
models = [{id = "m"}]
[providers.declared]
api_base = "http://10.0.0.4/v1"
models = [
  {id = "d", capabilities = ["tools", "reasoning"], reasoning_effort = {levels = ["low"]}},
  {id = "limited", rate_limits = {requests_per_minute = 2, tokens_per_minute = 100}},
]
[providers.other]
api_base = "http://10.0.0.5/v1"
models = [{id = "d"}]
[models.shared]
strategy = "balance"
endpoints = [
  {provider = "aa", service_id = "m", weight = 3},
  {provider = "bb", service_id = "m", weight = 1},
  {provider = "cc", service_id = "m", weight = 0},
]
[presets.trial]
candidates = [{model = "aa:m", weight = 3}, {model = "bb:m"}]
fallbacks = ["cc:m"]
"""


class Fleet:
    def __init__(self, **environ: str) -> None:
        loaded = parse_config(FLEET, environ)
        assert loaded.problems == []
        self.router = Router(loaded.config, active_providers(loaded.config, environ)[0])
        self.health = Health(Breaker())

    def choose(
        self,
        model: str = "m",
        needs: Needs | None = None,
        wishes: Wishes = NO_WISHES,
        now: float = 100.0,
        **more: Any,
    ) -> Chosen:
        route = self.router.resolve(model, CHAT_OP, wishes)
        return choose(route, needs, self.health, now, **more)

    def order(self, model: str = "m", **more: Any) -> list[str]:
        return [target.provider for target in self.choose(model, **more).chain]

    def target(self, provider: str, model: str = "m") -> Target:
        [found] = self.router.resolve(f"{provider}:{model}", CHAT_OP).chain
        return found


# --- what a request needs

IMAGE = "data:image/png;base64,AAAA"
NEEDS: list[tuple[dict[str, Any], set[str]]] = [
    ({"messages": [{"role": "user", "content": "hi"}]}, set()),
    ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]},
     {"image_input"}),
    ({"messages": [{"content": [{"type": "input_audio"}, {"type": "file"}]}]},
     {"audio_input", "file_input"}),
    ({"messages": [{"content": [{"type": "image", "source": {}}, {"type": "document"}]}]},
     {"image_input", "file_input"}),
    ({"input": [{"content": [{"type": "input_image"}, {"type": "input_file"}]}]},
     {"image_input", "file_input"}),
    ({"contents": [{"parts": [{"inlineData": {"mimeType": "video/mp4"}}]}]}, {"video_input"}),
    ({"contents": [{"parts": [{"inline_data": {"mime_type": "image/png"}}]}]}, {"image_input"}),
    ({"contents": [{"parts": [{"fileData": {"mimeType": "application/pdf"}}]}]}, {"file_input"}),
    ({"messages": [], "tools": [{"type": "function"}]}, {"tools"}),
    ({"functions": [{"name": "f"}]}, {"tools"}),
    ({"response_format": {"type": "json_schema"}}, {"structured_outputs"}),
    ({"response_format": {"type": "json_object"}}, set()),
    ({"text": {"format": {"type": "json_schema"}}}, {"structured_outputs"}),
    ({"output_config": {"format": {"type": "json_schema"}}}, {"structured_outputs"}),
    ({"generationConfig": {"responseJsonSchema": {"type": "object"}}}, {"structured_outputs"}),
    ({"reasoning_effort": "high"}, {"reasoning"}),
    ({"reasoning": {"effort": "none"}}, set()),
    ({"thinking": {"type": "enabled", "budget_tokens": 9}}, {"reasoning"}),
    ({"generationConfig": {"thinkingConfig": {"thinkingLevel": "LOW"}}}, {"reasoning"}),
    ({"messages": [{"content": 'the words {"type": "image_url"} in a text'}]}, set()),
    ({"messages": [{"content": [{"type": "tool_use", "input": {"type": "file"}}]}]}, set()),
    ({"tools": [{"function": {"parameters": {"properties": {"a": {"type": "file"}}}}}]}, {"tools"}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "able"), NEEDS)
def test_what_a_request_needs_is_seen_in_any_protocol(body: Any, able: set[str]) -> None:
    assert needs_of(body).able == able


def test_the_length_of_a_prompt_is_guessed_without_its_pictures() -> None:
    text = {"type": "text", "text": "x" * 4000}
    picture = {"type": "image_url", "image_url": {"url": IMAGE + "A" * 1_000_000}}
    assert needs_of({"messages": [{"role": "", "content": [text]}]}).tokens == 1001
    assert needs_of({"messages": [{"content": [text, picture]}]}).tokens < 2000


def test_who_cannot_is_left_out_while_somebody_can() -> None:
    fleet = Fleet()
    chosen = fleet.choose(needs=Needs(tokens=5000))
    assert [target.provider for target in chosen.chain] == ["bb", "cc"]
    assert chosen.left_out == ("aa/m: about 5000 tokens do not fit its context of 1000",)
    alone = fleet.choose("aa:m", needs=Needs(tokens=5000))
    assert [target.provider for target in alone.chain] == ["aa"]


def test_what_the_file_says_of_a_model_counts_even_if_nobody_is_left() -> None:
    fleet = Fleet()
    assert fleet.order("d", needs=Needs(frozenset({"image_input"}))) == ["other"]
    assert fleet.order("d", needs=Needs(frozenset({"tools"}))) == ["declared", "other"]
    assert fleet.order("d", needs=Needs(effort="high")) == ["other"]
    with pytest.raises(BadRequest, match="declared/d: cannot do image_input") as refused:
        fleet.choose("declared:d", needs=Needs(frozenset({"image_input"})))
    assert refused.value.code == "no_capable_provider"


def test_the_catalogue_is_a_hint() -> None:
    fleet = Fleet(OPENAI_API_KEY="k", OPENROUTER_API_KEY="k")
    blind = Needs(frozenset({"audio_input"}))
    assert fleet.order("gpt-4o-mini", needs=blind) == ["openai", "openrouter"]


# --- rankings


def measure(fleet: Fleet, provider: str, ttft_s: float, rate: float, at: float = 99.0) -> None:
    fleet.health.meter.answered(fleet.target(provider), True, ttft_s, rate, at)


def test_the_cheapest_goes_first_and_an_unknown_price_last() -> None:
    chosen = Fleet().choose("m:cost")
    assert [target.provider for target in chosen.chain] == ["bb", "aa", "cc"]
    assert chosen.notes[chosen.chain[0].key] == "$1.25 per million tokens"
    assert chosen.notes[chosen.chain[2].key] == "its price is not known"


def test_the_quickest_goes_first_and_who_is_not_known_yet_is_tried() -> None:
    fleet = Fleet()
    measure(fleet, "aa", 0.5, 10)
    assert fleet.order("m:latency") == ["bb", "cc", "aa"]
    measure(fleet, "bb", 0.9, 90)
    measure(fleet, "cc", 0.1, 5)
    assert fleet.order("m:latency") == ["cc", "aa", "bb"]
    assert fleet.order("m:throughput") == ["bb", "aa", "cc"]
    measure(fleet, "cc", 0.5, 10)
    measure(fleet, "cc", 0.5, 10)
    assert fleet.order("m:latency") == ["aa", "cc", "bb"]  # the same: by id


def test_who_has_only_failed_is_not_taken_for_new() -> None:
    fleet = Fleet()
    measure(fleet, "aa", 0.5, 10)
    measure(fleet, "bb", 0.9, 90)
    fleet.health.meter.failed(fleet.target("cc"), 99.0)
    assert fleet.order("m:latency") == ["aa", "bb", "cc"]
    assert fleet.order("m:throughput") == ["bb", "aa", "cc"]


def test_what_was_measured_is_forgotten_after_an_hour() -> None:
    fleet = Fleet()
    measure(fleet, "aa", 0.5, 10, at=0.0)
    measure(fleet, "aa", 0.7, 30, at=3000.0)
    meter, target = fleet.health.meter, fleet.target("aa")
    assert meter.speed(target, 3001.0).answers == 2
    late = meter.speed(target, 3700.0)
    assert (late.answers, late.ttft_s, late.tokens_per_s) == (1, 0.7, 30)
    assert meter.speed(target, 9000.0).ttft_s is None


def test_the_median_counts_and_streams_tell_more_than_whole_answers() -> None:
    fleet = Fleet()
    target, meter = fleet.target("aa"), fleet.health.meter
    meter.answered(target, False, 9.0, 1.0, 50.0)
    assert meter.speed(target, 51.0).ttft_s == 9.0
    for ttft_s in (0.1, 0.3, 7.0):
        meter.answered(target, True, ttft_s, None, 50.0)
    meter.failed(target, 50.0)
    speed = meter.speed(target, 51.0)
    assert (speed.ttft_s, speed.tokens_per_s, speed.uptime) == (0.3, 1.0, 0.8)
    assert meter.all(51.0)["aa/m"]["p50_ttft_ms"] == 300.0


def test_an_order_that_was_asked_for_goes_before_the_ranking() -> None:
    assert Fleet().order("m:cost", wishes=Wishes(order=("cc",))) == ["cc", "bb", "aa"]


def test_without_fallbacks_only_the_first_is_asked() -> None:
    fleet = Fleet(OPENAI_API_KEY="k1,k2", OPENROUTER_API_KEY="k")
    assert fleet.order("m:cost", wishes=Wishes(allow_fallbacks=False)) == ["bb"]
    both = fleet.order("gpt-4o", wishes=Wishes(allow_fallbacks=False))
    assert both == ["openai", "openai"]  # its accounts


# --- turns and draws


def test_each_endpoint_gets_its_share_in_any_stretch() -> None:
    fleet = Fleet()
    firsts = [fleet.order("shared")[0] for _ in range(40)]
    assert all(Counter(firsts[n : n + 4]) == {"aa": 3, "bb": 1} for n in range(36))
    assert sorted(fleet.order("shared")) == ["aa", "bb", "cc"]


def test_candidates_are_drawn_by_weight_and_the_fallbacks_come_last() -> None:
    fleet = Fleet()

    def drawn(n: int) -> list[str]:
        return fleet.order("@trial", draw=lambda: n / 400)

    draws = [drawn(n) for n in range(400)]
    assert Counter(draw[0] for draw in draws) == {"aa": 300, "bb": 100}
    assert all(draw[2] == "cc" and set(draw[:2]) == {"aa", "bb"} for draw in draws)
    again = fleet.order("@trial", draw=lambda: 0.9)
    assert again == fleet.order("@trial", draw=lambda: 0.9) == ["bb", "aa", "cc"]


def test_names_of_conversations_spread_evenly() -> None:
    shares = [share_of(f"session-{n}") for n in range(4000)]
    assert share_of("session-7") == shares[7] and min(shares) >= 0 and max(shares) < 1
    assert 900 < sum(share < 0.25 for share in shares) < 1100


def test_a_conversation_stays_unless_its_target_is_ill() -> None:
    fleet = Fleet()
    warm = fleet.target("cc").key
    assert fleet.order("m:cost", first=warm) == ["cc", "bb", "aa"]
    for now in (98.0, 98.1, 98.2, 98.3, 98.4):
        fleet.health.failed(fleet.target("cc"), UpstreamBroken("no"), now)
    assert fleet.order("m:cost", first=warm) == ["bb", "aa", "cc"]


CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]},
    {"system": "S", "messages": [{"role": "user", "content": "Hi"}]},
    {"instructions": "S", "input": "Hi"},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
    {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]},
]
LATER: list[list[dict[str, Any]]] = [
    [{"role": "assistant", "content": "Ho"}, {"role": "user", "content": "More"}],
    [{"role": "assistant", "content": "Ho"}, {"role": "user", "content": "More"}],
    [],
    [{"type": "function_call", "name": "f"}, {"type": "function_call_output"}],
    [{"role": "model", "parts": [{"text": "Ho"}]}, {"role": "user", "parts": [{"text": "x"}]}],
]


@pytest.mark.parametrize(("body", "later"), list(zip(CONVERSATIONS, LATER, strict=True)))
def test_a_conversation_is_known_by_how_it_began(body: Any, later: Any) -> None:
    first = session_of({}, body, "me")
    assert not first.goes_on and not first.named
    assert session_of({}, body, "you").key != first.key
    if later:
        turns = next(key for key in ("messages", "input", "contents") if key in body)
        grown = {**body, turns: [*body[turns], *later]}
        assert session_of({}, grown, "me") == first._replace(goes_on=True)


@pytest.mark.parametrize(
    ("headers", "more"),
    [
        ({"x-session-id": "s1"}, {}),
        ({"session_id": "s1"}, {}),
        ({}, {"prompt_cache_key": "s1"}),
        ({}, {"metadata": {"user_id": "s1"}}),
    ],
)
def test_a_conversation_that_has_a_name_is_known_by_it(
    headers: dict[str, str], more: dict[str, Any]
) -> None:
    sessions = {session_of(headers, {**body, **more}, "me").key for body in CONVERSATIONS}
    assert len(sessions) == 1
    assert session_of(headers, {**CONVERSATIONS[0], **more}, "me").named


# --- limits


def test_a_limit_of_requests_is_exact_over_any_minute() -> None:
    fleet = Fleet()
    limits, target = fleet.health.limits, fleet.target("declared", "limited")
    rng, taken = random.Random(1), []
    now = 0.0
    for _ in range(500):
        now += rng.random() * 20
        if not limits.wait_s(target, 0, now):
            limits.take(target, 0, now)
            taken.append(now)
        assert sum(at > now - 60 for at in taken) <= 2
    assert len(taken) > 50
    wait_s = limits.wait_s(target, 0, taken[-1])
    assert wait_s == pytest.approx(taken[-2] + 60 - taken[-1])


def test_a_limit_of_tokens_counts_what_was_used_in_the_end() -> None:
    fleet = Fleet()
    limits, target = fleet.health.limits, fleet.target("declared", "limited")
    limits.take(target, 30, 0.0)
    assert limits.wait_s(target, 70, 1.0) == 0
    assert limits.wait_s(target, 71, 1.0) == 59.0
    limits.settle(target, 50, 0.0, 10.0)  # it was more: 80
    assert limits.wait_s(target, 30, 11.0) == 49.0
    limits.take(target, 20, 12.0)
    limits.settle(target, -15, 12.0, 13.0)  # it was less: 5
    assert limits.used(14.0)["declared/limited"] == {"requests": 2, "tokens": 85}
    limits.settle(target, -500, 12.0, 14.0)  # but never less than nothing
    assert limits.used(14.0)["declared/limited"] == {"requests": 2, "tokens": 80}
    limits.settle(target, -30, 0.0, 61.0)  # what is forgotten is given back no more
    assert limits.used(61.0)["declared/limited"] == {"requests": 1, "tokens": 50}
    assert limits.wait_s(target, 10_000, 61.0) == 9.0  # as soon as there is nothing else
    assert limits.used(100.0)["declared/limited"] == {"requests": 0, "tokens": 0}


OPENAI_LIMITS = {
    "x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "{left}",
    "x-ratelimit-reset-requests": "1m30s",
}  # fmt: skip
ANTHROPIC_LIMITS = {
    "anthropic-ratelimit-input-tokens-limit": "1000",
    "anthropic-ratelimit-input-tokens-remaining": "{left}",
    "anthropic-ratelimit-input-tokens-reset": "1970-01-01T00:01:30Z",
}


@pytest.mark.parametrize("headers", [OPENAI_LIMITS, ANTHROPIC_LIMITS])
def test_who_is_near_a_limit_of_its_vendor_goes_later_until_it_is_reset(headers: Any) -> None:
    fleet = Fleet()
    target = fleet.target("aa")
    for left, near in (("50", False), ("1", True), ("0", True)):
        told = {name: text.format(left=left) for name, text in headers.items()}
        fleet.health.saw(target, told, 100.0, 0.0)
        assert fleet.health.is_near_limit(target, 101.0) is near
    assert fleet.order("m", now=101.0) == ["bb", "cc", "aa"]
    assert fleet.order("m", now=191.0) == ["aa", "bb", "cc"]
    assert not fleet.health.troubled


def test_requests_that_are_on_their_way_count_against_what_is_left() -> None:
    fleet = Fleet()
    target = fleet.target("aa")
    told = {name: text.format(left="4") for name, text in OPENAI_LIMITS.items()}
    fleet.health.saw(target, told, 100.0, 0.0)
    for _ in range(2):
        assert not fleet.health.is_near_limit(target, 101.0)
        fleet.health.begin(target, 101.0, 5.0)
    assert fleet.health.is_near_limit(target, 101.0)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-ratelimit-remaining-requests": "x", "x-ratelimit-reset-requests": "1s"},
        {"x-ratelimit-remaining-requests": "0"},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "soon"},
        {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "1s"},
        {"x-ratelimit-remaining-requests": "nan", "x-ratelimit-reset-requests": "1s"},
    ],
)
def test_limits_that_make_no_sense_are_none(headers: dict[str, str]) -> None:
    assert rooms_in(headers, 0.0, 0.0) == []
