"""Receipts: their JSON, rows and CSV, and the questions that are asked about them."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from support import NOON_MS, PRICES, receipt, tried

import bitrouter

DAY_MS = 86_400_000


def of_row(one: bitrouter.Receipt) -> bitrouter.Receipt:
    return bitrouter.receipt_of(bitrouter.receipt_row(one))


# JSON.


def test_a_receipt_tells_everything_in_json() -> None:
    first = tried("azure", "4o", account="b", began=0.0005, took=0.1, status=429, code="busy")
    one = receipt(tried=(first,), tags=(("team", "search"),), warnings="fallback,cut", session="s")
    assert bitrouter.receipt_json(one) == {
        "id": "00000000000000000000002a",
        "time": "2026-11-25T12:00:00.000Z",
        "op": "chat_completions",
        "caller": "openai-python/3.57.0",
        "key": "search",
        "asked": "openai/gpt-4o-mini",
        "provider": "openai",
        "model": "gpt-4o-mini",
        "account": "",
        "status": 200,
        "code": "",
        "stream": True,
        "attempts": [
            {
                "provider": "azure",
                "model": "4o",
                "account": "b",
                "protocol": "chat_completions",
                "status": 429,
                "code": "busy",
                "began_ms": 0.5,
                "took_ms": 100.0,
            }
        ],
        "usage": {
            "input_tokens": 1000,
            "output_tokens": 200,
            "cached_tokens": 600,
            "cache_write_tokens": 0,
            "reasoning_tokens": 0,
            "cache_write_1h_tokens": 0,
            "estimated": False,
        },
        "cost_usd": 0.000225,
        "cost_nano": 225_000,
        "price": {
            "input": 0.15,
            "output": 0.6,
            "cache_read": 0.075,
            "cache_write": None,
            "cache_write_1h": None,
        },
        "ttft_ms": 250.0,
        "took_ms": 812.5,
        "overhead_ms": 12.5,
        "finish": "stop",
        "warnings": ["fallback", "cut"],
        "session": "s",
        "tags": {"team": "search"},
        "trace": "",
    }


def test_what_is_unknown_is_null_and_not_zero() -> None:
    told = bitrouter.receipt_json(receipt(usage=None, cost_nano=None, price=None, ttft=None))
    assert {told[n] for n in ("usage", "cost_usd", "cost_nano", "price", "ttft_ms")} == {None}


def test_the_price_told_is_that_of_the_tier_that_was_charged() -> None:
    above = bitrouter.Usage(200_001, 1)
    for one in (
        receipt(usage=above, price=PRICES[2]),
        of_row(receipt(usage=above, price=PRICES[2])),
    ):
        assert bitrouter.receipt_json(one)["price"]["input"] == 2.5
    below = receipt(usage=bitrouter.Usage(200_000, 1), price=PRICES[2])
    assert bitrouter.receipt_json(of_row(below))["price"]["input"] == 1.25


def test_overhead_is_never_negative() -> None:
    assert bitrouter.receipt_json(receipt(took=1.0, upstream=1.1))["overhead_ms"] == 0.0


# Rows.

RECEIPTS = {
    "plain": receipt(),
    "unknown": receipt(usage=None, cost_nano=None, price=None, ttft=None, stream=False),
    "nobody": receipt(provider="", model="", tried=(), status=402, code="provider_key_missing"),
    "tagged": receipt(tags=(("team", 'a "quoted" one'), ("ключ", "\N{SNOWMAN}"))),
    "tried": receipt(
        tried=(tried("a", "m", status=503, code="upstream_error"), tried("b", "m", began=0.5))
    ),
    "estimated": receipt(estimated=True, warnings="cut,estimated", trace="a" * 32),
    "free": receipt(cost_nano=0, price=bitrouter.Price(0.0, 0.0)),
}


@pytest.mark.parametrize("one", RECEIPTS.values(), ids=RECEIPTS)
def test_a_row_gives_back_the_receipt_it_was_made_of(one: bitrouter.Receipt) -> None:
    assert of_row(one) == one


def test_what_only_spans_need_is_not_in_a_row() -> None:
    one = receipt(response_id="r", span="b" * 16, parent="c" * 16, facts=(("top_p", 1.0),))
    assert of_row(one) == receipt()


@pytest.mark.parametrize(
    "garbage", [{"cost_nano": 10**18}, {"usage": bitrouter.Usage(10**14, 1)}], ids=str
)
def test_numbers_that_no_request_can_reach_are_unknown(garbage: dict[str, Any]) -> None:
    assert of_row(receipt(**garbage)) == receipt(**dict.fromkeys(garbage))


# Questions.


def test_without_parameters_sums_are_of_thirty_days_by_model() -> None:
    query = bitrouter.usage_query({}, NOON_MS)
    assert query == bitrouter.UsageQuery(NOON_MS - 30 * DAY_MS, NOON_MS, "model", (), False)


def test_without_parameters_the_latest_receipts_of_all_are_listed() -> None:
    query = bitrouter.requests_query({}, NOON_MS)
    assert query == bitrouter.RequestsQuery(None, NOON_MS, (), 50, None, False)


@pytest.mark.parametrize(
    ("text", "since", "until"),
    [
        ("2026-11-24", "2026-11-24T00:00:00.000Z", "2026-11-25T00:00:00.000Z"),
        ("20261124", "2026-11-24T00:00:00.000Z", "2026-11-25T00:00:00.000Z"),
        ("2026-11-24T06", *["2026-11-24T06:00:00.000Z"] * 2),
        ("2026-11-24T06:07", *["2026-11-24T06:07:00.000Z"] * 2),
        ("2026-11-24 06:07", *["2026-11-24T06:07:00.000Z"] * 2),
        ("2026-11-24T06:07:08.9Z", *["2026-11-24T06:07:08.900Z"] * 2),
        ("2026-11-24T06:07:08+02:00", *["2026-11-24T04:07:08.000Z"] * 2),
        ("2026-11-24T06:07:08 02:00", *["2026-11-24T04:07:08.000Z"] * 2),
        ("2026-11-24T06:07:08-0230", *["2026-11-24T08:37:08.000Z"] * 2),
        ("24h", *["2026-11-24T12:00:00.000Z"] * 2),
        ("7d", *["2026-11-18T12:00:00.000Z"] * 2),
        ("1w", *["2026-11-18T12:00:00.000Z"] * 2),
        ("99999w", *["1970-01-01T00:00:00.000Z"] * 2),
        ("0001-01-01T00:00+14:00", *["1970-01-01T00:00:00.000Z"] * 2),
    ],
)
def test_times_are_dates_instants_or_spans_until_now(text: str, since: str, until: str) -> None:
    begun = bitrouter.usage_query({"from": text}, NOON_MS).since
    assert begun is not None
    assert bitrouter.iso_time(begun) == since
    if begun:
        ended = bitrouter.usage_query({"from": "all", "to": text}, NOON_MS).until
        assert bitrouter.iso_time(ended) == until


def test_all_has_no_beginning_and_the_last_day_has_an_end() -> None:
    query = bitrouter.usage_query({"from": "all", "to": "9999-12-31"}, NOON_MS)
    assert query.since is None
    assert bitrouter.iso_time(query.until) == "9999-12-31T23:59:59.999Z"


def test_each_filter_is_read() -> None:
    texts = {name: name.upper() for name in ("id", "model", "provider", "key", "caller", "session")}
    asked = {**texts, "tag": "team:a:b", "status": "4xx", "limit": "7", "before": "12-34"}
    query = bitrouter.requests_query(asked, NOON_MS)
    assert dict(query.where) == {
        **{name: (text,) for name, text in texts.items()},
        "tag": ('"team":"a:b"',),
        "status": (400, 499),
    }
    assert (query.limit, query.before) == (7, (12, 34))


def test_what_is_left_empty_is_not_asked() -> None:
    empty = dict.fromkeys(("from", "to", "limit", "before", "format", "model", "tag"), "")
    assert bitrouter.requests_query(empty, 1) == bitrouter.requests_query({}, 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [("200", (200, 200)), ("5xx", (500, 599)), ("4xx", (400, 499)), ("499", (499, 499))],
)
def test_a_status_is_one_or_a_class(text: str, found: tuple[int, int]) -> None:
    assert bitrouter.usage_query({"status": text}, NOON_MS).where == (("status", found),)


# fmt: off
ODD = [
    ({"modle": "x"},               "modle: there is no such parameter; did you mean model?"),
    ({"a\nb": "x"},                "a b: there is no such parameter; known are from, to, "),
    ({"from": "yesterday"},        "from: expected a date (2026-11-25), a time "),
    ({"from": "2026-13-01"},       "got '2026-13-01'"),
    ({"from": "2026-11-24T25:00"}, "got '2026-11-24T25:00'"),
    ({"from": "7m"},               "got '7m'"),
    ({"from": "-7d"},              "got '-7d'"),
    ({"from": "1764000000"},       "got '1764000000'"),
    ({"to": "all"},                "to: expected a date"),
    ({"to": "\x00"},               "to: expected a date"),
    ({"from": "0h"},               "from: expected `from` before `to`, which is 2026-11-25T12:00"),
    ({"from": "2026-11-26"},       "from: expected `from` before `to`"),
    ({"to": "2026-01-01"},         "to: expected `from` before `to`"),
    ({"status": "6xx"},            "status: expected a status such as 429, a class such as 4xx"),
    ({"status": "20"},             "got '20'"),
    ({"status": "ok"},             "got 'ok'"),
    ({"tag": "team"},              "tag: expected NAME:VALUE, got 'team'"),
    ({"tag": ":a"},                "tag: expected NAME:VALUE"),
    ({"format": "xml"},            "format: expected one of json, csv, got 'xml'"),
    ({"model": "x" * 257},         "model: expected at most 256 printable characters"),
    ({"key": "a\nb"},              "key: expected at most 256 printable characters, got 'a b'"),
    ({"session": "\ud800"},        "session: expected at most 256 printable characters"),
]
ODD_USAGE = [
    ({"group_by": "modle"},        "group_by: expected one of model, provider, key, session, tag"),
    ({"group_by": "modle"},        "(did you mean model?), got 'modle'"),
    ({"limit": "5"},               "limit: there is no such parameter"),
]
ODD_REQUESTS = [
    ({"limit": "0"},               "limit: expected a number from 1 to 1000, got '0'"),
    ({"limit": "1001"},            "limit: expected a number from 1 to 1000"),
    ({"limit": "-1"},              "got '-1'"),
    ({"limit": "\N{ARABIC-INDIC DIGIT FIVE}"}, "limit: expected a number"),
    ({"before": "12"},             "before: expected the `next` of an earlier answer, got '12'"),
    ({"before": "1-2; DROP"},      "before: expected the `next`"),
    ({"before": f"{10**19}-1"},    "before: expected the `next`"),
    ({"group_by": "model"},        "group_by: there is no such parameter"),
]
# fmt: on


@pytest.mark.parametrize(("asked", "said"), ODD + ODD_USAGE, ids=ascii)
def test_an_odd_question_for_sums_is_refused(asked: dict[str, str], said: str) -> None:
    with pytest.raises(bitrouter.BadRequest) as refused:
        bitrouter.usage_query(asked, NOON_MS)
    assert said in refused.value.message
    assert refused.value.param == bitrouter.printable(next(iter(asked)))


@pytest.mark.parametrize(
    ("asked", "said"), [odd for odd in ODD if "from" not in str(odd[1])] + ODD_REQUESTS, ids=ascii
)
def test_an_odd_question_for_receipts_is_refused(asked: dict[str, str], said: str) -> None:
    with pytest.raises(bitrouter.BadRequest) as refused:
        bitrouter.requests_query(asked, NOON_MS)
    assert said in refused.value.message


# Answers.


def summed(**facts: int | None) -> tuple[int | None, ...]:
    return tuple(facts.get(name, 0) for name in bitrouter.USAGE_SUMS)


def answer(group_by: str, *rows: tuple[Any, ...]) -> bitrouter.JsonObject:
    return bitrouter.usage_answer(bitrouter.UsageQuery(0, 1, group_by, (), False), rows)


def test_a_group_of_which_no_price_is_known_has_no_cost() -> None:
    told = answer("model", ("m", *summed(requests=2, unpriced=2, cost_nano=None)))
    assert (told["data"][0]["cost_usd"], told["data"][0]["cost_nano"]) == (None, None)
    assert told["total"]["cost_nano"] is None


def test_a_group_that_used_nothing_cost_nothing() -> None:
    told = answer("model", ("m", *summed(requests=2, cost_nano=None)))
    assert told["data"][0]["cost_nano"] == 0


def test_what_is_known_of_a_cost_is_told_beside_what_is_not() -> None:
    told = answer("model", ("m", *summed(requests=3, priced=1, unpriced=2, cost_nano=5)))
    assert (told["data"][0]["cost_nano"], told["data"][0]["unpriced"]) == (5, 2)


def test_nothing_has_no_means() -> None:
    assert answer("model")["total"]["took_ms"] is None
    assert answer("model")["total"]["ttft_ms"] is None


def test_means_are_of_those_that_have_the_time() -> None:
    told = answer("model", ("m", *summed(requests=4, took_us=10_000, ttft_us=6_000, with_ttft=3)))
    assert (told["total"]["took_ms"], told["total"]["ttft_ms"]) == (2.5, 2.0)


def test_days_and_hours_are_of_utc_and_in_order() -> None:
    days = answer("day", (20_782, *summed(cost_nano=9)), (20_781, *summed(cost_nano=1)))
    assert [one["group"] for one in days["data"]] == ["2026-11-24", "2026-11-25"]
    assert answer("hour", (498_780, *summed()))["data"][0]["group"] == "2026-11-25T12:00Z"


def test_a_request_is_in_the_group_of_each_of_its_tags() -> None:
    rows = [('{"team":"a","env":"p"}', *summed(requests=2)), ('{"team":"a"}', *summed(requests=3))]
    told = answer("tag", *rows, ("", *summed(requests=1)))
    found = {one["group"]: one["requests"] for one in told["data"]}
    assert found == {"team=a": 5, "env=p": 2, "": 1}
    assert told["total"]["requests"] == 6


def test_beyond_ten_thousand_groups_the_smallest_are_one() -> None:
    rows = [(f"s{n}", *summed(requests=1, cost_nano=20_000 - n)) for n in range(10_005)]
    told = answer("session", *rows)
    assert len(told["data"]) == 10_001
    others = next(one for one in told["data"] if one["group"] == "(others)")
    assert (others["requests"], others["cost_nano"]) == (5, sum(range(9_996, 10_001)))
    assert told["total"]["requests"] == 10_005


# CSV.


def listed(*receipts: bitrouter.Receipt) -> bitrouter.JsonObject:
    rows = [(n, *bitrouter.receipt_row(one)) for n, one in enumerate(receipts)]
    return bitrouter.requests_answer(bitrouter.requests_query({}, NOON_MS), rows)


def read_csv(answer: bitrouter.JsonObject) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(bitrouter.answer_csv(answer), newline="")))


def test_receipts_are_flat_in_csv() -> None:
    first = tried("azure", "4o", status=429, code="busy")
    one = receipt(tried=(first, *receipt().tried), tags=(("a", "1"), ("b", "2")), warnings="x,y")
    row = read_csv(listed(one))[0]
    wanted = {"id": one.id, "stream": "true", "input_tokens": "1000", "cost_usd": "0.000225000"}
    wanted |= {"attempts": "azure/4o busy; openai/gpt-4o-mini 200", "tags": "a=1,b=2"}
    wanted |= {"price_input": "0.15", "price_cache_write": "", "warnings": "x,y"}
    assert wanted.items() <= row.items()


def test_unknown_is_empty_in_csv() -> None:
    row = read_csv(listed(receipt(usage=None, cost_nano=None, price=None, ttft=None)))[0]
    unknown = ("input_tokens", "estimated", "cost_usd", "cost_nano", "price_input", "ttft_ms")
    assert {row[name] for name in unknown} == {""}


def test_sums_are_csv_without_their_total() -> None:
    rows = read_csv(answer("model", ("m", *summed(requests=2, priced=2, cost_nano=12 * 10**9 + 7))))
    assert [(row["group"], row["cost_usd"]) for row in rows] == [("m", "12.000000007")]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(text: str) -> None:
    row = read_csv(listed(receipt(asked=text, session='=HYPERLINK("x")')))[0]
    assert (row["asked"], row["session"]) == ("'" + text, '\'=HYPERLINK("x")')


@pytest.mark.parametrize("text", ['a "b"', "a,b", "a\nb", "a\r\nb", "", " a ", "ü"])
def test_any_text_comes_back_out_of_csv(text: str) -> None:
    assert read_csv(listed(receipt(asked=text)))[0]["asked"] == text
