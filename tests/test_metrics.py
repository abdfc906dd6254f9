"""Section metrics: what is counted of a request, and Prometheus' text of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bitrouter import (
    INSTRUMENTS,
    Labels,
    Metrics,
    Receipt,
    Tried,
    Usage,
    prometheus_name,
    prometheus_text,
)

CALL = ("chat", "openai", "gpt-5.4")
TRIED = Tried("openai", "gpt-5.4", "a", "chat_completions", "h", 443, 0.001, 1.0, 200, "")


def receipt(**more: Any) -> Receipt:
    plain: dict[str, Any] = dict.fromkeys(Receipt._fields, "")
    plain |= {"at": 1_764_086_400_123, "op": "chat_completions", "key": "ci", "asked": "gpt"}
    plain |= {"provider": "openai", "model": "gpt-5.4", "account": "a", "status": 200}
    plain |= {"stream": False, "tried": (TRIED,), "usage": None, "estimated": False}
    plain |= {"cost_nano": None, "price": None, "ttft": None, "took": 1.0, "upstream": 0.9}
    return Receipt(**(plain | {"tags": (), "facts": ()} | more))


def counted(*receipts: Receipt, cap: int = 1000) -> Metrics:
    metrics = Metrics(cap)
    for each in receipts:
        metrics.take(each)
    return metrics


def table(metrics: Metrics, name: str) -> dict[Labels, list[float]]:
    return next(dict(points) for instrument, points in metrics.points() if instrument.name == name)


def samples(text: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {series: float(value) for series, _, value in lines}


# What is counted.


def test_a_request_is_counted_once_whatever_it_took() -> None:
    metrics = counted(receipt(), receipt(tried=(TRIED._replace(code="upstream_error"), TRIED)))
    assert table(metrics, "bitrouter.requests") == {(*CALL, "ci", 200): [2]}
    assert table(metrics, "bitrouter.errors") == {}


def test_an_error_is_counted_by_its_code_and_who_failed() -> None:
    metrics = counted(receipt(status=503, code="upstream_overloaded"), receipt())
    assert table(metrics, "bitrouter.errors") == {(*CALL, "ci", "upstream_overloaded"): [1]}
    assert table(metrics, "bitrouter.requests")[(*CALL, "ci", 503)] == [1]


def test_each_attempt_is_counted_and_timed_by_its_target() -> None:
    bad = TRIED._replace(provider="azure", took=0.5, code="upstream_timeout")
    metrics = counted(receipt(tried=(bad, TRIED)))
    failed = ("chat", "azure.ai.openai", "gpt-5.4", "upstream_timeout")
    assert table(metrics, "bitrouter.attempts") == {(*CALL, ""): [1], failed: [1]}
    assert table(metrics, "gen_ai.client.operation.duration")[failed][-1] == 0.5


@pytest.mark.parametrize(
    ("after", "fallbacks"),
    [
        (TRIED, 0),  # the same target once more is a retry
        (TRIED._replace(account="b"), 1),
        (TRIED._replace(model="gpt-5"), 1),
        (TRIED._replace(provider="azure"), 1),
    ],
)
def test_a_fallback_is_an_attempt_at_another_target(after: Tried, fallbacks: int) -> None:
    metrics = counted(receipt(tried=(TRIED._replace(code="upstream_error"), after)))
    cells = table(metrics, "bitrouter.fallbacks")
    assert sum(cell[0] for cell in cells.values()) == fallbacks


def test_tokens_are_counted_by_type_and_inclusively() -> None:
    metrics = counted(receipt(usage=Usage(100, 50, 30, 20, 10)))
    cells = table(metrics, "bitrouter.tokens")
    assert {labels[-1]: cell for labels, cell in cells.items()} == {
        "input": [100], "output": [50], "cache_read": [30], "cache_write": [20], "reasoning": [10],
    }  # fmt: skip


def test_costs_add_up_to_the_nano_dollar_and_unknown_is_not_zero() -> None:
    one = receipt(usage=Usage(1, 1), cost_nano=100_000_001)
    metrics = counted(*[one] * 1000, receipt(usage=Usage(1, 1)), receipt())
    assert table(metrics, "bitrouter.cost_usd") == {(*CALL, "ci"): [100_000_001_000]}
    assert table(metrics, "bitrouter.unpriced") == {(*CALL, "ci"): [1]}
    assert any(line.endswith("} 100.000001") for line in prometheus_text(metrics).splitlines())


def test_a_streams_pace_is_the_time_after_the_first_token_by_the_tokens_after_it() -> None:
    metrics = counted(receipt(stream=True, ttft=0.5, took=2.5, usage=Usage(9, 41)))
    assert table(metrics, "gen_ai.server.time_to_first_token")[CALL][-1] == 0.5
    assert table(metrics, "gen_ai.server.time_per_output_token")[CALL][-1] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "more",
    [
        {"stream": True, "usage": Usage(9, 1)},  # nothing after the first token
        {"stream": True, "usage": None},
        {"stream": False, "usage": Usage(9, 41)},
        {"stream": True, "usage": Usage(9, 41), "code": "upstream_error"},
    ],
)
def test_what_has_no_pace_gets_none(more: dict[str, Any]) -> None:
    metrics = counted(receipt(ttft=0.5, **more))
    assert table(metrics, "gen_ai.server.time_per_output_token") == {}


def test_overhead_leaves_out_the_time_spent_waiting_for_providers() -> None:
    metrics = counted(receipt(took=1.0, upstream=0.99975))
    name = "bitrouter_overhead_seconds_bucket"
    shown = samples(prometheus_text(metrics))
    assert shown[f'{name}{{gen_ai_operation_name="chat",le="0.0002"}}'] == 0
    assert shown[f'{name}{{gen_ai_operation_name="chat",le="0.0003"}}'] == 1


@pytest.mark.parametrize(("took", "le"), [(0.0, "0.01"), (0.01, "0.01"), (0.011, "0.02")])
def test_a_bucket_includes_its_bound(took: float, le: str) -> None:
    shown = samples(prometheus_text(counted(receipt(took=took, tried=()))))
    buckets = [s for s, v in shown.items() if "request_duration_seconds_bucket" in s and v == 1]
    assert f'le="{le}"' in buckets[0]


def test_beyond_the_cap_what_callers_make_up_becomes_other() -> None:
    many = [receipt(model=f"m{n}", tried=(), usage=Usage(1, 1)) for n in range(50)]
    metrics = counted(*many, *many, cap=10)
    cells = table(metrics, "bitrouter.requests")
    assert len(cells) == 11
    assert cells[("chat", "openai", "other", "other", 200)] == [80]
    assert sum(cell[0] for cell in cells.values()) == 100


def test_a_flood_of_names_keeps_memory_bounded() -> None:
    metrics = counted(*(receipt(model=f"m{n}", status=n % 7) for n in range(500)), cap=5)
    assert len(metrics._served) <= 20
    assert len(metrics._attempted) <= 20


def test_long_and_broken_names_are_cut_and_mended() -> None:
    text = prometheus_text(counted(receipt(model="\ud800" + "x" * 500, tried=())))
    text.encode()
    assert max(map(len, re.findall(r'gen_ai_request_model="([^"]*)"', text))) == 128


def test_a_gauge_forgets_what_is_no_longer_there() -> None:
    metrics = Metrics()
    metrics.set("bitrouter.cooling", {("openai/a",): 12.5, ("openai/b",): 3.0})
    metrics.set("bitrouter.cooling", {("openai/b",): 2.0})
    assert table(metrics, "bitrouter.cooling") == {("openai/b",): [2.0]}


# Prometheus' text.


FULL = counted(
    receipt(stream=True, ttft=0.2, usage=Usage(9, 4), cost_nano=5),
    receipt(status=502, code="upstream_error", tried=(TRIED._replace(code="x"),) * 2),
)
FULL.set("bitrouter.in_flight", {(): 3})
FULL.set("bitrouter.queue.dropped", {("traces",): 7})


def test_every_instrument_is_announced_even_before_it_has_a_value() -> None:
    lines = prometheus_text(Metrics()).splitlines()
    assert len(lines) == 2 * len(INSTRUMENTS)
    for i, (help_line, type_line) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        instrument = list(INSTRUMENTS.values())[i]
        name = prometheus_name(instrument) + "_total" * (instrument.kind == "counter")
        assert help_line == f"# HELP {name} {instrument.help}"
        assert type_line == f"# TYPE {name} {instrument.kind}"


@pytest.mark.parametrize("instrument", INSTRUMENTS.values(), ids=lambda i: i.name)
def test_names_follow_the_rules_of_promtool(instrument: Any) -> None:
    name = prometheus_name(instrument)
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    words = name.split("_")
    assert not {"counter", "gauge", "histogram", "summary", "total", "count", "sum"} & set(words)
    assert not {"ms", "milliseconds", "us", "kb", "minutes", "hours"} & set(words)
    assert name.endswith("_seconds") == (instrument.unit == "s")
    assert instrument.help.endswith(".")
    assert not set('\n\\"') & set(instrument.help)


def test_text_holds_samples_under_their_own_announcement() -> None:
    family = ""
    for line in prometheus_text(FULL).splitlines():
        if line.startswith("# TYPE "):
            family = line.split()[2]
        elif not line.startswith("#"):
            assert re.fullmatch(rf"{family}(_bucket|_sum|_count)?(\{{.*\}})? \S+", line)


def test_buckets_only_grow_and_end_in_the_count() -> None:
    shown = samples(prometheus_text(FULL))
    counts = {s: v for s, v in shown.items() if "_count" in s}
    assert len(counts) == 9
    for series, count in counts.items():
        start = series.replace("_count", "_bucket").rstrip("}")
        buckets = [v for s, v in shown.items() if s.startswith(f"{start},le=")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == count


def test_labels_are_escaped_and_empty_ones_left_out() -> None:
    text = prometheus_text(counted(receipt(model='a"b\\c\nd', tried=(), key="")))
    assert 'gen_ai_request_model="a\\"b\\\\c\\nd"' in text
    assert "bitrouter_api_key_id" not in text


def test_openmetrics_names_counters_without_their_suffix_and_says_where_it_ends() -> None:
    lines = prometheus_text(FULL, openmetrics=True).splitlines()
    assert "# TYPE bitrouter_requests counter" in lines
    assert any(line.startswith("bitrouter_requests_total{") for line in lines)
    assert lines[-1] == "# EOF"


def test_a_value_without_labels_has_no_braces() -> None:
    assert "\nbitrouter_in_flight 3\n" in prometheus_text(FULL)
