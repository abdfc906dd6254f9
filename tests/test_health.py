"""Failing targets are spared for a while, probed one at a time, and never given up."""

from __future__ import annotations

import random
import sys
import threading
from dataclasses import replace

import pytest
from support import router_of

import bitrouter
from bitrouter import (
    CHAT_OP,
    Breaker,
    Health,
    Target,
    UpstreamBroken,
    UpstreamError,
    UpstreamKeyRefused,
    UpstreamLimited,
    UpstreamNoCredit,
)

RULES = Breaker(failures=3, window_s=60.0, cooldown_s=30.0)
BROKEN = UpstreamBroken("no")
BOTH = {"OPENAI_API_KEY": "k1", "OPENROUTER_API_KEY": "k2"}
BALANCED = '[providers.openai]\naccount_strategy = "balance"\n'


def chain_of(
    model: str = "openai/gpt-4o", toml: str = "", environ: dict[str, str] | None = None
) -> tuple[Target, ...]:
    environ = BOTH if environ is None else environ
    return router_of(toml, environ).resolve(model, CHAT_OP).chain


def limited(retry_after_s: float) -> UpstreamError:
    return UpstreamLimited("slow down", retry_after_s=retry_after_s)


def fail(health: Health, target: Target, *at: float, error: UpstreamError = BROKEN) -> None:
    for now in at:
        health.begin(target, now, 5)
        health.failed(target, error, now)


def names(targets: tuple[Target, ...]) -> list[str]:
    return [target.name for target in targets]


def test_a_healthy_chain_keeps_its_order() -> None:
    chain = chain_of()
    assert Health(RULES).order(chain, 0.0) == chain


def test_the_breaker_opens_after_so_many_failures() -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 1, 2)
    assert health.cooling_s(first, 2) == 0
    fail(health, first, 3)
    assert health.cooling_s(first, 3) == 30


def test_failures_out_of_the_window_do_not_count() -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 0, 1, 60)
    assert health.cooling_s(first, 60) == 0
    fail(health, first, 60.5)
    assert health.cooling_s(first, 60.5) == 30


def test_a_success_between_failures_starts_the_count_again() -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 1, 2)
    health.succeeded(first)
    fail(health, first, 3, 4)
    assert health.cooling_s(first, 4) == 0


def test_targets_fail_one_by_one() -> None:
    health, (first, second) = Health(RULES), chain_of()
    fail(health, first, 1, 2, 3)
    assert health.cooling_s(second, 3) == 0


def test_who_cools_down_goes_last_and_stays_in_the_chain() -> None:
    health, (first, second) = Health(RULES), chain_of()
    fail(health, first, 1, 2, 3)
    assert health.order((first, second), 3) == (second, first)


def test_when_all_cool_down_the_soonest_back_is_first() -> None:
    health, (first, second) = Health(RULES), chain_of()
    fail(health, first, 1, 2, 3)
    fail(health, second, 0, 1, 2)
    assert health.order((first, second), 4) == (second, first)


def test_after_the_cool_down_the_order_is_as_before() -> None:
    health, (first, second) = Health(RULES), chain_of()
    fail(health, first, 1, 2, 3)
    assert health.order((first, second), 33) == (first, second)


# fmt: off
WAITS = [
    # what the provider said           how long it is spared, after this one failure
    (limited(7),                       7),
    (limited(45),                      45),
    (limited(10**9),                   3600),
    (UpstreamLimited("no"),            0),
    (BROKEN,                           0),
    (UpstreamKeyRefused("no"),         30),
    (UpstreamNoCredit("no"),           30),
    (UpstreamNoCredit("no", retry_after_s=90), 90),
]
# fmt: on


@pytest.mark.parametrize(("error", "seconds"), WAITS, ids=range(len(WAITS)))
def test_one_failure_spares_a_target_as_long_as_it_asked(
    error: UpstreamError, seconds: float
) -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 100, error=error)
    assert health.cooling_s(first, 100) == seconds


@pytest.mark.parametrize(("retry_after_s", "seconds"), [(5, 30), (50, 50)])
def test_the_longer_of_cool_down_and_retry_after_holds(
    retry_after_s: float, seconds: float
) -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 1, 1)
    fail(health, first, 1, error=limited(retry_after_s))
    assert health.cooling_s(first, 1) == seconds


def test_a_later_failure_does_not_shorten_the_wait() -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 1, error=limited(100))
    fail(health, first, 2, error=limited(1))
    assert health.cooling_s(first, 2) == 99


def probing() -> tuple[Health, Target, Target]:
    """The first of two targets has failed, rested, and is probed from 33 on for 5 s at the most."""
    health, (first, second) = Health(RULES), chain_of()
    fail(health, first, 1, 2, 3)
    health.begin(first, 33, 5)
    return health, first, second


def test_one_request_at_a_time_probes() -> None:
    health, first, second = probing()
    assert health.cooling_s(first, 34) == 4
    assert health.order((first, second), 34) == (second, first)


def test_a_probe_that_is_never_heard_of_again_gives_way_to_another() -> None:
    health, first, _ = probing()
    assert health.cooling_s(first, 38) == 0


def test_a_second_attempt_does_not_prolong_the_probe() -> None:
    health, first, _ = probing()
    health.begin(first, 36, 5)
    assert health.cooling_s(first, 36) == 2


def test_a_probe_that_succeeds_closes_the_breaker() -> None:
    health, first, _ = probing()
    health.succeeded(first)
    assert health.cooling_s(first, 33) == 0 and health.cooling(33) == {}
    fail(health, first, 34, 35)
    assert health.cooling_s(first, 35) == 0


def test_a_probe_that_fails_opens_it_again_at_once() -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 1, 2, 3, 1000)
    assert health.cooling_s(first, 1000) == 30


def test_a_probe_that_is_abandoned_says_nothing() -> None:
    health, first, _ = probing()
    health.abandoned(first)
    assert health.cooling_s(first, 33) == 0


def test_attempts_that_were_abandoned_do_not_count() -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 1, 2)
    for now in (3, 4, 5):
        health.begin(first, now, 5)
        health.abandoned(first)
    assert health.cooling_s(first, 5) == 0


def test_an_attempt_does_not_end_a_cool_down() -> None:
    health, (first, _) = Health(RULES), chain_of()
    fail(health, first, 1, 2, 3)
    health.begin(first, 10, 5)
    health.abandoned(first)
    assert health.cooling_s(first, 10) == 23


def test_the_status_names_who_cools_down_and_for_how_long() -> None:
    health = Health(RULES)
    first, second, _ = chain_of(environ={**BOTH, "OPENAI_API_KEY": "k1,k2"})
    fail(health, second, 1, 2, 3)
    fail(health, first, 3)
    assert health.cooling(4) == {"openai/2/gpt-4o": 29.0}
    assert health.cooling(34) == {}


def test_accounts_take_turns_with_balance() -> None:
    health = Health(RULES)
    chain = chain_of(toml=BALANCED, environ={**BOTH, "OPENAI_API_KEY": "k1,k2,k3"})
    orders = [names(health.order(chain, 0.0)) for _ in range(4)]
    assert [order[0] for order in orders] == ["openai:1", "openai:2", "openai:3", "openai:1"]
    assert all(order[3] == "openrouter" for order in orders)
    assert orders[1] == ["openai:2", "openai:3", "openai:1", "openrouter"]


def test_accounts_do_not_take_turns_without_balance() -> None:
    health, chain = Health(RULES), chain_of(environ={"OPENAI_API_KEY": "k1,k2"})
    assert [health.order(chain, 0.0) for _ in range(3)] == [chain] * 3


def test_taking_turns_does_not_mix_up_the_models_of_a_chain() -> None:
    endpoints = [f"{{provider = 'openai', service_id = '{model}'}}" for model in ("one", "two")]
    toml = f"{BALANCED}[models.s]\nendpoints = [{', '.join(endpoints)}]"
    health, chain = Health(RULES), chain_of("s", toml, {"OPENAI_API_KEY": "k1,k2"})
    orders = [[target.model for target in health.order(chain, 0.0)] for _ in range(4)]
    assert orders == [["one", "one", "two", "two"]] * 4


def test_an_account_that_cools_down_misses_its_turn() -> None:
    health, chain = Health(RULES), chain_of(toml=BALANCED, environ={"OPENAI_API_KEY": "k1,k2"})
    fail(health, chain[0], 1, 2, 3)
    firsts = {health.order(chain, 3)[0].name for _ in range(4)}
    assert firsts == {"openai:2"}


def test_what_is_remembered_of_failures_is_bounded() -> None:
    health, (first, _) = Health(RULES), chain_of()
    for n in range(bitrouter._MAX_HEALTH + 50):
        first = replace(first, model=f"m{n}")
        health.failed(first, BROKEN, 1.0)
    assert len(health._records) == bitrouter._MAX_HEALTH
    for n in range(1000):
        health.failed(first, BROKEN, 1.0 + n / 1000)
    assert len(health._records[first.key].failed_at) <= RULES.failures + 1


@pytest.mark.parametrize("seed", range(20))
def test_no_history_loses_a_target_or_makes_one_wait_for_ever(seed: int) -> None:
    rng, health = random.Random(seed), Health(RULES)
    chain = chain_of(toml=BALANCED, environ={**BOTH, "OPENAI_API_KEY": "k1,k2"})
    now = 0.0
    for _ in range(200):
        now += rng.random() * 20
        target = health.order(chain, now)[0]
        health.begin(target, now, 5)
        end = rng.randrange(3)
        if end:
            health.failed(target, rng.choice([BROKEN, limited(rng.random() * 99)]), now)
        else:
            rng.choice([health.succeeded, health.abandoned])(target)
        assert sorted(names(health.order(chain, now))) == sorted(names(chain))
    assert not any(health.cooling_s(target, now + 100) for target in chain)


def test_another_thread_may_ask_who_cools_down() -> None:
    health, (first, _) = Health(RULES), chain_of()
    targets = [replace(first, model=str(i)) for i in range(300)]
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for target in targets:
                health.failed(target, UpstreamKeyRefused("no"), 0.0)
            for target in targets:
                health.succeeded(target)

    changing = threading.Thread(target=change)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    changing.start()
    try:
        counts = [len(health.cooling(1.0)) for _ in range(300)]
    finally:
        done.set()
        changing.join()
        sys.setswitchinterval(before)
    assert max(counts) <= len(targets)


def test_only_the_probe_is_called_one() -> None:
    health, (first, _) = Health(RULES), chain_of()
    assert not health.begin(first, 0, 5)
    fail(health, first, 1, 2, 3)
    assert [health.begin(first, now, 5) for now in (4, 33, 34)] == [False, True, False]
