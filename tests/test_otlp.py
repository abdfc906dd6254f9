"""Section otlp: spans and metrics for the collector, its answers, its variables, trace context."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from bitrouter import (
    OTLP_RETRYABLE,
    SAMPLERS,
    Answer,
    Exporting,
    Metrics,
    Pairs,
    Receipt,
    Secret,
    Span,
    Tried,
    Usage,
    child_span,
    context_headers,
    cut_text,
    encode_metrics,
    encode_metrics_json,
    encode_traces,
    is_sampled,
    otel_settings,
    read_answer,
    read_traceparent,
    span_json,
    spans_of,
    spans_wire,
    write_traceparent,
)

TRACE, SPAN, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7"
AT = 1_764_086_400_123
TRIED = Tried(
    "openai", "gpt-5.4", "main", "chat_completions", "api.openai.com", 443, 0.25, 1.0, 200, ""
)
BUSY = TRIED._replace(provider="azure", began=0.0, took=0.2, status=429, code="upstream_overloaded")
RESOURCE: Pairs = (("service.name", "bitrouter"),)


def receipt(**more: Any) -> Receipt:
    plain: dict[str, Any] = dict.fromkeys(Receipt._fields, "")
    plain |= {"id": "9f3a", "at": AT, "op": "chat_completions", "key": "ci", "asked": "openai/gpt"}
    plain |= {"provider": "openai", "model": "gpt-5.4", "account": "main", "status": 200}
    plain |= {"stream": True, "tried": (TRIED,), "usage": Usage(12, 5, 8, 3, 2), "estimated": False}
    plain |= {"cost_nano": 1_234_567, "price": None, "ttft": 0.5, "took": 1.5, "upstream": 1.25}
    plain |= {"finish": "stop", "response_id": "chatcmpl-1", "trace": TRACE, "span": SPAN}
    return Receipt(**(plain | {"parent": PARENT, "tags": (), "facts": ()} | more))


def request_of(spans: list[Span], *, as_json: bool = False) -> bytes:
    """A request to the collector, put together from two pieces."""
    pieces = [spans_wire(some, as_json=as_json) for some in (spans[:1], spans[1:]) if some]
    return encode_traces(RESOURCE, pieces, as_json=as_json)


ODD = receipt(
    id="é\ud800" * 900,
    asked="models/" + "x" * 5000,
    warnings="seed ignored,cut",
    session="s1",
    tags=(("team", "search"),),
    facts=(("temperature", 1), ("seed", 10**30), ("top_p", float("inf")), ("tools", 3), ("n", -2)),
)
RECEIPTS = [
    receipt(),
    receipt(parent="", usage=None, cost_nano=None, ttft=None, stream=False, finish=""),
    receipt(tried=(BUSY, TRIED), usage=Usage(2**33, 300)),
    receipt(tried=(), status=404, code="model_not_found", usage=None, cost_nano=None),
    ODD,
]


# A reader of protobuf that knows nothing of ours: numbers, wire types, bytes.


def fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = raw[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(raw):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        assert wire in (1, 2, 5) and at + size <= len(raw)
        yield number, raw[at : at + size]
        at += size


def every(raw: bytes, *path: int) -> list[Any]:
    """The values at a path of field numbers."""
    found = [value for number, value in fields(raw) if number == path[0]]
    if len(path) == 1:
        return found
    return [
        value for inner in found if isinstance(inner, bytes) for value in every(inner, *path[1:])
    ]


def any_value(raw: bytes) -> Any:
    ((number, value),) = fields(raw)
    if isinstance(value, int):
        return bool(value) if number == 2 else value - 2**64 * (value >= 2**63)
    if number == 4:
        return struct.unpack("<d", value)[0]
    return value.decode() if number == 1 else [any_value(item) for item in every(value, 1)]


def attributes(raw: bytes, number: int = 9) -> dict[str, Any]:
    pairs = [
        (every(pair, 1)[0].decode(), any_value(every(pair, 2)[0])) for pair in every(raw, number)
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def told(span: Span) -> dict[str, Any]:
    """A span's attributes, as it is encoded."""
    return attributes(every(request_of([span]), 1, 2, 2)[0])


def from_json(values: list[Any]) -> dict[str, Any]:
    def plain(value: dict[str, Any]) -> Any:
        ((kind, inner),) = value.items()
        if kind == "arrayValue":
            return [plain(item) for item in inner["values"]]
        return int(inner) if kind == "intValue" else inner

    return {pair["key"]: plain(pair["value"]) for pair in values}


# Spans.


def test_a_request_is_a_server_span_with_a_client_span_for_each_attempt() -> None:
    root, first, second = spans_of(receipt(tried=(BUSY, TRIED)))
    assert [span_json(s)["name"] for s in (root, first, second)] == [
        "POST /v1/chat/completions",
        "chat gpt-5.4",
        "chat gpt-5.4",
    ]
    assert [span_json(s)["kind"] for s in (root, first, second)] == [2, 3, 3]
    assert (root.trace, root.span, root.parent) == (TRACE, SPAN, PARENT)
    assert (first.parent, second.parent) == (SPAN, SPAN)
    assert {root.trace, first.trace, second.trace} == {TRACE}
    assert len({root.span, first.span, second.span}) == 3


def test_times_are_those_of_the_request_and_of_its_attempts() -> None:
    root, attempt = spans_of(receipt())
    start = AT * 1_000_000
    assert (root.start, root.end) == (start, start + 1_500_000_000)
    assert (attempt.start, attempt.end) == (start + 250_000_000, start + 1_250_000_000)


def test_a_failed_attempt_has_its_error_and_the_answer_its_usage() -> None:
    root, failed, answer = spans_of(receipt(tried=(BUSY, TRIED)))
    assert told(failed)["error.type"] == "upstream_overloaded"
    assert span_json(failed)["status"] == {"code": 2, "message": "upstream_overloaded"}
    assert "status" not in span_json(root) and "status" not in span_json(answer)
    assert not [name for name in told(failed) if "usage" in name or "response.id" in name]
    assert told(answer)["gen_ai.usage.input_tokens"] == 12


def test_a_client_span_follows_the_conventions() -> None:
    facts = (("temperature", 1), ("max_tokens", 99), ("tools", 2), ("n", 3))
    assert told(spans_of(receipt(facts=facts))[1]) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-5.4",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.max_tokens": 99,
        "gen_ai.request.choice.count": 3,
        "gen_ai.response.model": "gpt-5.4",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "gen_ai.usage.cache_creation.input_tokens": 3,
        "gen_ai.usage.reasoning.output_tokens": 2,
        "server.address": "api.openai.com",
        "server.port": 443,
        "http.response.status_code": 200,
        "bitrouter.provider_id": "openai",
        "bitrouter.account_label": "main",
        "bitrouter.protocol": "chat_completions",
        "bitrouter.cost_usd": 0.001234567,
        "bitrouter.request.tools": 2,
    }


def test_the_server_span_tells_of_the_whole_request() -> None:
    one = receipt(session="s1", tags=(("team", "search"),), warnings="a,b", estimated=True)
    assert told(spans_of(one)[0]) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.conversation.id": "s1",
        "bitrouter.outcome": "completed",
        "bitrouter.api_key_id": "ci",
        "bitrouter.requested_model": "openai/gpt",
        "bitrouter.provider_id": "openai",
        "bitrouter.model_id": "gpt-5.4",
        "bitrouter.account_label": "main",
        "bitrouter.stream": True,
        "bitrouter.attempts": 1,
        "bitrouter.usage_estimated": True,
        "bitrouter.warnings": ["a", "b"],
        "bitrouter.tag.team": "search",
        "bitrouter.request_id": "9f3a",
        "bitrouter.overhead_ms": 250.0,
        "bitrouter.cost_usd": 0.001234567,
        "bitrouter.ttft_ms": 500.0,
    }


OPERATIONS = [
    # what was asked             span                                        attempt
    ("responses",                "POST /v1/responses",                       "chat"),
    ("messages",                 "POST /v1/messages",                        "chat"),
    ("generate_content",         "POST /v1beta/models/{model}:generateContent", "generate_content"),
    ("embeddings",               "POST /v1/embeddings",                      "embeddings"),
    ("completions",              "POST /v1/completions",                     "text_completion"),
    ("something_new",            "POST",                                     "something_new"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "operation"), OPERATIONS)
def test_spans_are_named_by_what_was_asked(op: str, name: str, operation: str) -> None:
    root, attempt = spans_of(receipt(op=op, stream=False))
    assert span_json(root)["name"] == name
    assert span_json(attempt)["name"] == f"{operation} gpt-5.4"
    assert told(attempt)["gen_ai.operation.name"] == operation


OUTCOMES = [
    # status, code                 is an error  outcome
    (200, "",                      False,       "completed"),
    (200, "upstream_broken",       True,        "failed"),  # in the middle of a stream
    (404, "model_not_found",       False,       "failed"),
    (499, "caller_gone",           False,       "disconnected"),
    (503, "upstream_unreachable",  True,        "failed"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "code", "is_error", "outcome"), OUTCOMES)
def test_a_callers_mistake_is_no_error_of_the_server(
    status: int, code: str, is_error: bool, outcome: str
) -> None:
    root = spans_of(receipt(status=status, code=code))[0]
    assert ("status" in span_json(root)) is is_error
    assert told(root).get("error.type") == (code if is_error else None)
    assert told(root).get("bitrouter.error_code") == (code or None)
    assert told(root)["bitrouter.outcome"] == outcome


def test_what_is_not_known_is_left_out() -> None:
    bare = receipt(usage=None, cost_nano=None, ttft=None, finish="", response_id="", stream=False)
    known = {name for span in spans_of(bare) for name in told(span)}
    assert not [name for name in known if "usage" in name or "cost" in name or "ttft" in name]
    assert not {"gen_ai.response.id", "gen_ai.response.finish_reasons"} & known


def test_a_stream_that_broke_keeps_what_it_used() -> None:
    broken = receipt(code="upstream_broken", tried=(TRIED._replace(code="upstream_broken"),))
    assert told(spans_of(broken)[1])["gen_ai.usage.output_tokens"] == 5


def test_contents_go_with_the_attempt_that_answered() -> None:
    said: Pairs = (("gen_ai.output.messages", "[" + "x" * 9000 + "]"),)
    _, failed, answer = spans_of(receipt(tried=(BUSY, TRIED)), said)
    assert told(answer)["gen_ai.output.messages"] == said[0][1]
    assert "gen_ai.output.messages" not in told(failed)


@pytest.mark.parametrize(("name", "value"), [("temperature", 0), ("max_tokens", 0)])
def test_a_parameter_of_zero_is_one(name: str, value: float) -> None:
    assert told(spans_of(receipt(facts=((name, value),)))[1])[f"gen_ai.request.{name}"] == 0


def test_a_parameter_that_is_false_is_told() -> None:
    answer = told(spans_of(receipt(facts=(("store", False),)))[1])
    assert answer["bitrouter.request.store"] is False


@pytest.mark.parametrize("most", range(5, 30))
def test_text_is_cut_to_whole_characters(most: int) -> None:
    text = "añ€𝄞" * 3
    cut = cut_text(text, most)
    assert len(cut.encode()) <= most
    assert cut.endswith("[cut]") and text.startswith(cut.removesuffix("[cut]"))
    assert cut_text(text, 30) == text


def test_the_id_of_an_attempts_span_is_known_before_the_attempt_is_made() -> None:
    _, first, second = spans_of(receipt(tried=(BUSY, TRIED)))
    assert (first.span, second.span) == (child_span(SPAN, 0), child_span(SPAN, 1))


@pytest.mark.parametrize("span", [SPAN, "0" * 15 + "1", "f" * 16, "61c8864680b583eb"])
def test_span_ids_differ_and_none_is_all_zero(span: str) -> None:
    ids = {child_span(span, n) for n in range(1000)}
    assert len(ids | {span}) == 1001
    assert all(len(i) == 16 and int(i, 16) for i in ids)


# Requests to the collector.


@pytest.mark.parametrize("one", RECEIPTS)
def test_protobuf_and_json_say_the_same(one: Receipt) -> None:
    spans = spans_of(one)
    wire = every(request_of(spans), 1, 2, 2)
    body = json.loads(request_of(spans, as_json=True))
    read = body["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert len(wire) == len(read) == 1 + len(one.tried)
    for raw, span in zip(wire, read, strict=True):
        plain: dict[int, Any] = {number: value for number, value in fields(raw) if number != 9}
        assert plain[1].hex() == span["traceId"]
        assert plain[2].hex() == span["spanId"]
        assert plain.get(4, b"").hex() == span.get("parentSpanId", "")
        assert plain[5].decode() == span["name"]
        assert plain[6] == span["kind"]
        assert int.from_bytes(plain[7], "little") == int(span["startTimeUnixNano"])
        assert int.from_bytes(plain[8], "little") == int(span["endTimeUnixNano"])
        assert int.from_bytes(plain[16], "little") == span["flags"]
        assert attributes(raw) == from_json(span["attributes"])
        status = {2: every(raw, 15, 2), 3: every(raw, 15, 3)}
        assert [value.decode() for value in status[2]] == [
            span["status"]["message"] for _ in status[3]
        ]
        assert not plain.keys() - {1, 2, 4, 5, 6, 7, 8, 15, 16}


def test_resource_and_scope_come_once() -> None:
    raw = request_of([span for one in RECEIPTS for span in spans_of(one)])
    (resource,) = every(raw, 1, 1)
    assert attributes(resource, 1) == {"service.name": "bitrouter"}
    assert every(raw, 1, 2, 1, 1) == [b"bitrouter"]


def test_what_callers_send_is_short_in_spans_and_whole_numbers_fit() -> None:
    root, attempt = map(told, spans_of(ODD))
    assert len(root["bitrouter.requested_model"]) == len(root["bitrouter.request_id"]) == 1024
    assert attempt["gen_ai.request.seed"] == str(10**30)
    assert attempt["gen_ai.request.top_p"] == "inf"
    assert attempt["gen_ai.request.choice.count"] == -2


def test_a_parent_is_marked_as_somebody_elses_only_if_there_is_one() -> None:
    assert [span_json(span)["flags"] for span in spans_of(receipt())] == [0x301, 0x101]
    assert [span_json(span)["flags"] for span in spans_of(receipt(parent=""))] == [0x101, 0x101]


def some_metrics() -> Metrics:
    metrics = Metrics()
    for one in RECEIPTS:
        metrics.take(one)
    metrics.set("bitrouter.in_flight", {(): 3})
    metrics.set("bitrouter.loop_lag", {(): 0.25})
    return metrics


def test_metrics_are_cumulative_in_protobuf() -> None:
    raw = encode_metrics(RESOURCE, some_metrics(), 5, 7)
    found = {every(metric, 1)[0].decode(): metric for metric in every(raw, 1, 2, 2)}
    requests, durations = found["bitrouter.requests"], found["gen_ai.server.request.duration"]
    assert every(requests, 3) == [b"{request}"]
    assert every(requests, 7, 2) == every(durations, 9, 2) == [2]
    assert every(requests, 7, 3) == [1]  # it only grows
    points = every(requests, 7, 1)
    assert sum(int.from_bytes(every(point, 6)[0], "little") for point in points) == len(RECEIPTS)
    assert [every(points[0], number)[0][0] for number in (2, 3)] == [5, 7]
    assert attributes(points[0], 7)["http.response.status_code"] == 200
    assert struct.unpack("<d", every(found["bitrouter.loop_lag"], 5, 1, 4)[0]) == (0.25,)
    cost = every(found["bitrouter.cost_usd"], 7, 1, 4)[0]
    assert struct.unpack("<d", cost)[0] == pytest.approx(3 * 0.001234567)


def test_a_histogram_has_a_bucket_more_than_bounds() -> None:
    raw = encode_metrics(RESOURCE, some_metrics(), 5, 7)
    (metric,) = [m for m in every(raw, 1, 2, 2) if every(m, 1) == [b"gen_ai.client.token.usage"]]
    for point in every(metric, 9, 1):
        buckets = struct.unpack(f"<{len(every(point, 6)[0]) // 8}Q", every(point, 6)[0])
        assert len(buckets) == len(every(point, 7)[0]) // 8 + 1 == 15
        assert sum(buckets) == int.from_bytes(every(point, 4)[0], "little") > 0


def test_metrics_in_json_hold_64_bits_as_strings() -> None:
    body = json.loads(encode_metrics_json(RESOURCE, some_metrics(), 5, 7))
    found = {m["name"]: m for m in body["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]}
    point = found["bitrouter.requests"]["sum"]["dataPoints"][0]
    assert (point["startTimeUnixNano"], point["timeUnixNano"]) == ("5", "7")
    assert point["asInt"] == "4"
    point = found["gen_ai.server.request.duration"]["histogram"]["dataPoints"][0]
    assert all(isinstance(n, str) for n in [point["count"], *point["bucketCounts"]])
    assert all(isinstance(n, float) for n in [point["sum"], *point["explicitBounds"]])
    assert found["bitrouter.in_flight"]["gauge"]["dataPoints"][0]["asInt"] == "3"
    assert "bitrouter.errors" in found and "bitrouter.cooling" not in found


# What the collector answers.

PROTO, JSON = "application/x-protobuf", "application/json; charset=utf-8"
ANSWERS = [
    # status, type, body                                               what is read
    (200, PROTO, b"",                                                   Answer(0, "")),
    (200, PROTO, b"\x0a\x0a\x08\xac\x02\x12\x05stale",                  Answer(300, "stale")),
    (200, PROTO, b"\x0a\x08\x12\x06use v2",                             Answer(0, "use v2")),
    (400, PROTO, b"\x08\x03\x12\x08no spans",                           Answer(0, "no spans")),
    (200, JSON,  b"{}",                                                 Answer(0, "")),
    (200, JSON,  b'{"partialSuccess":{}}',                              Answer(0, "")),
    (200, JSON,  b'{"partialSuccess":{"rejectedSpans":"3","errorMessage":"x"}}', Answer(3, "x")),
    (200, JSON,  b'{"partialSuccess":{"rejectedDataPoints":4}}',        Answer(4, "")),
    (200, JSON,  b'{"partialSuccess":{"rejectedSpans":[1],"errorMessage":7}}', Answer(0, "")),
    (200, JSON,  b"[" * 100_000,                                        Answer(0, "")),
    (400, JSON,  b'{"code":3,"message":"no\\nspans"}',                  Answer(0, "no spans")),
    (401, JSON,  b"\xff",                                               Answer(0, "")),
    (404, "text/plain", b"404 not found\n",                             Answer(0, "404 not found")),
    (200, "text/html", b"<html>hello",                                  Answer(0, "")),
    (502, "",    b"",                                                   Answer(0, "")),
]  # fmt: skip


@pytest.mark.parametrize(("status", "kind", "body", "answer"), ANSWERS)
def test_a_collectors_answer_is_read(status: int, kind: str, body: bytes, answer: Answer) -> None:
    assert read_answer(status, kind, body) == answer


@pytest.mark.parametrize("seed", range(20))
def test_no_answer_is_too_odd(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        body = chance.randbytes(chance.randrange(60))
        read = read_answer(chance.choice([200, 400]), chance.choice([PROTO, JSON, ""]), body)
        assert 0 <= read.rejected < 10**15
        assert read.message.isascii()


@pytest.mark.parametrize("size", [0, 1, 5, 2**31, 2**63, 2**69])
def test_lengths_that_lie_do_no_harm(size: int) -> None:
    told = bytes((size >> 7 * n) & 0x7F | 0x80 for n in range(9)) + bytes([size >> 63 & 0x7F])
    assert read_answer(400, PROTO, b"\x12" + told + b"abc").message in ("", "a", "abc")


def test_a_long_answer_is_cut() -> None:
    assert len(read_answer(500, "text/plain", b"x" * 10**6).message) <= 200


def test_retries_are_for_what_the_specification_lists() -> None:
    assert sorted(OTLP_RETRYABLE) == [429, 502, 503, 504]


# Settings.

BASE = "OTEL_EXPORTER_OTLP_"
ENDPOINT = {BASE + "ENDPOINT": "http://collector:4318"}


def traces(environ: dict[str, str], section: dict[str, Any] | None = None) -> Exporting:
    found = otel_settings(environ, section)
    assert found.traces is not None
    return found.traces


def test_nothing_is_exported_unless_somebody_said_where() -> None:
    found = otel_settings({})
    assert (found.traces, found.metrics, found.warnings) == (None, None, ())
    assert found.resource == (("service.name", "bitrouter"),)


def test_the_specifications_defaults_hold() -> None:
    found = otel_settings(ENDPOINT)
    assert found.traces == Exporting("http://collector:4318/v1/traces", (), False, False, 10.0)
    assert found.metrics == Exporting("http://collector:4318/v1/metrics", (), False, False, 10.0)
    assert (found.queue, found.delay_s, found.batch, found.batch_timeout_s) == (2048, 5, 512, 30)
    assert (found.metrics_interval_s, found.content, found.content_max_bytes) == (60, False, 131072)
    assert (found.sampler, found.sampler_arg) == ("parentbased_always_on", 1.0)


ENDPOINTS = [
    # variables                                                        traces go to
    ({"ENDPOINT": "http://c:4318/"},                                   "http://c:4318/v1/traces"),
    ({"ENDPOINT": "https://c/otlp"},                                   "https://c/otlp/v1/traces"),
    ({"ENDPOINT": "https://c/otlp/?k=1"},                              "https://c/otlp/v1/traces?k=1"),
    ({"TRACES_ENDPOINT": "http://c:4318/custom"},                      "http://c:4318/custom"),
    ({"TRACES_ENDPOINT": "http://c:4318"},                             "http://c:4318/"),
    ({"TRACES_ENDPOINT": "http://a/x", "ENDPOINT": "http://b"},        "http://a/x"),
    ({"TRACES_ENDPOINT": "", "ENDPOINT": " http://b "},                "http://b/v1/traces"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "url"), ENDPOINTS)
def test_a_base_gets_a_path_and_a_signals_own_endpoint_none(
    variables: dict[str, str], url: str
) -> None:
    assert traces({BASE + name: value for name, value in variables.items()}).url == url


def test_one_signals_endpoint_says_nothing_of_the_others() -> None:
    assert otel_settings({BASE + "TRACES_ENDPOINT": "http://c/x"}).metrics is None


@pytest.mark.parametrize("url", ["collector:4318", "ftp://c", "http://", "http://c:port", "//c"])
def test_an_endpoint_that_is_no_url_is_warned_of_and_not_used(url: str) -> None:
    found = otel_settings({BASE + "ENDPOINT": url})
    assert found.traces is None
    assert found.warnings == (
        "OTEL_EXPORTER_OTLP_ENDPOINT: expected a URL such as http://localhost:4318; it is not used",
    )


def test_a_signals_own_variable_wins_over_the_common_one() -> None:
    common = {"PROTOCOL": "http/json", "COMPRESSION": "gzip", "TIMEOUT": "2500", "HEADERS": "a=1"}
    own = {"PROTOCOL": "http/protobuf", "COMPRESSION": "none", "TIMEOUT": "500", "HEADERS": "b=2"}
    environ = ENDPOINT | {BASE + name: value for name, value in common.items()}
    environ |= {BASE + "TRACES_" + name: value for name, value in own.items()}
    found = otel_settings(environ)
    assert found.traces is not None and found.metrics is not None
    assert found.traces[1:] == ((("b", Secret("2")),), False, False, 0.5)
    assert found.metrics[1:] == ((("a", Secret("1")),), True, True, 2.5)


def test_headers_are_decoded_and_secret() -> None:
    found = traces(ENDPOINT | {BASE + "HEADERS": "Api-Key = s3cret%2Cword , x-team=a%20b=c,"})
    assert [(k, v.reveal()) for k, v in found.headers] == [
        ("api-key", "s3cret,word"),
        ("x-team", "a b=c"),
    ]
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize("text", ["s3cret", "a=%0d%0aX: s3cret", "a b=s3cret", "a=s3cret%zz", "a="])
def test_headers_that_are_none_are_not_sent_nor_shown(text: str) -> None:
    found = otel_settings(ENDPOINT | {BASE + "HEADERS": text})
    assert found.traces is not None and found.traces.headers == ()
    (warning,) = found.warnings
    assert warning.startswith("OTEL_EXPORTER_OTLP_HEADERS: ") and "s3cret" not in warning


def test_grpc_is_warned_of_once() -> None:
    found = otel_settings(ENDPOINT | {BASE + "PROTOCOL": "grpc"})
    assert found.traces is not None and not found.traces.as_json
    (warning,) = found.warnings
    assert warning.startswith("OTEL_EXPORTER_OTLP_PROTOCOL: there is no gRPC here")


WRONG = [
    # variable                           value            what is used instead
    ("OTEL_SDK_DISABLED",                "yes",           "traces", None),
    (BASE + "PROTOCOL",                  "thrift",        "traces", None),
    (BASE + "COMPRESSION",               "zstd",          "traces", None),
    (BASE + "TIMEOUT",                   "10s",           "traces", None),
    (BASE + "TIMEOUT",                   "-1",            "traces", None),
    ("OTEL_TRACES_EXPORTER",             "zipkin",        "traces", None),
    ("OTEL_TRACES_SAMPLER",              "jaeger_remote", "sampler", "parentbased_always_on"),
    ("OTEL_TRACES_SAMPLER_ARG",          "1.5",           "sampler_arg", 1.0),
    ("OTEL_TRACES_SAMPLER_ARG",          "nan",           "sampler_arg", 1.0),
    ("OTEL_BSP_MAX_QUEUE_SIZE",          "0",             "queue", 2048),
    ("OTEL_BSP_SCHEDULE_DELAY",          "soon",          "delay_s", 5.0),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE",   "many",          "batch", 512),
    ("OTEL_BSP_EXPORT_TIMEOUT",          "",              "batch_timeout_s", 30.0),
    ("OTEL_METRIC_EXPORT_INTERVAL",      "0",             "metrics_interval_s", 60.0),
    ("OTEL_RESOURCE_ATTRIBUTES",         "a=1,b",         "resource", RESOURCE),
    ("OTEL_RESOURCE_ATTRIBUTES",         "a=1,b=%zz",     "resource", RESOURCE),
    ("OTEL_RESOURCE_ATTRIBUTES",         "a=1,b=%ff",     "resource", RESOURCE),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "field", "instead"), WRONG)
def test_a_wrong_value_is_warned_of_and_taken_as_not_said(
    name: str, value: str, field: str, instead: Any
) -> None:
    found = otel_settings(ENDPOINT | {name: value})
    expected = otel_settings(ENDPOINT).traces if field == "traces" else instead
    assert getattr(found, field) == expected
    assert [warning.partition(":")[0] for warning in found.warnings] == [name] * bool(value)


def test_numbers_are_milliseconds_in_variables_and_seconds_here() -> None:
    found = otel_settings(
        {
            "OTEL_BSP_SCHEDULE_DELAY": "250",
            "OTEL_BSP_EXPORT_TIMEOUT": "1000",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
            "OTEL_BSP_MAX_QUEUE_SIZE": "100",
        }
    )
    assert (found.delay_s, found.batch_timeout_s, found.metrics_interval_s) == (0.25, 1.0, 0.5)
    assert (found.queue, found.batch) == (100, 100)  # no batch is larger than the queue


@pytest.mark.parametrize("word", ["true", "TRUE", "True"])
def test_the_sdk_can_be_disabled(word: str) -> None:
    found = otel_settings(ENDPOINT | {"OTEL_SDK_DISABLED": word}, {"endpoint": "http://c"})
    assert (found.traces, found.metrics, found.warnings) == (None, None, ())


@pytest.mark.parametrize(
    ("variables", "section", "exported"),
    [
        ({"OTEL_TRACES_EXPORTER": "none"}, {}, ("metrics",)),
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, {}, ("traces",)),
        ({"OTEL_METRICS_EXPORTER": "none"}, {"metrics": True}, ("traces",)),
        ({}, {"metrics": False}, ("traces",)),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, {"metrics": False}, ("traces", "metrics")),
    ],
)
def test_a_signal_can_be_left_out(
    variables: dict[str, str], section: dict[str, Any], exported: tuple[str, ...]
) -> None:
    found = otel_settings(ENDPOINT | variables, section)
    assert tuple(name for name in ("traces", "metrics") if getattr(found, name)) == exported


def test_asking_for_the_exporter_is_asking_for_the_usual_endpoint() -> None:
    assert traces({"OTEL_TRACES_EXPORTER": "otlp"}).url == "http://localhost:4318/v1/traces"
    assert traces({}, {"sampler": "always_on"}).url == "http://localhost:4318/v1/traces"


SECTION: dict[str, Any] = {
    "endpoint": "https://o.example/base", "headers": {"X-Key": Secret("s3cret")},
    "protocol": "http/json", "compression": "gzip", "timeout_s": 3, "service_name": "gateway",
    "resource_attributes": {"team": "ml"}, "sampler": "traceidratio", "sampler_arg": 0.5,
    "metrics_interval_s": 15, "content": "full", "content_max_bytes": 1000,
}  # fmt: skip


def test_the_section_says_the_same() -> None:
    found = otel_settings({}, SECTION, {"service.version": "1"})
    headers = (("x-key", Secret("s3cret")),)
    assert found.traces == Exporting("https://o.example/base/v1/traces", headers, True, True, 3.0)
    assert dict(found.resource) == {
        "service.name": "gateway",
        "service.version": "1",
        "team": "ml",
    }
    assert (found.sampler, found.sampler_arg) == ("traceidratio", 0.5)
    assert (found.metrics_interval_s, found.content, found.content_max_bytes) == (15, True, 1000)


def test_variables_win_over_the_section() -> None:
    environ = {
        BASE + "ENDPOINT": "http://c", BASE + "HEADERS": "b=2", BASE + "PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "named", "OTEL_RESOURCE_ATTRIBUTES": "service.name=x,team=a%20b",
        "OTEL_TRACES_SAMPLER": "always_off", "OTEL_METRIC_EXPORT_INTERVAL": "1000",
    }  # fmt: skip
    found = otel_settings(environ, SECTION)
    assert found.traces is not None
    assert found.traces == Exporting("http://c/v1/traces", (("b", Secret("2")),), False, True, 3.0)
    assert dict(found.resource) == {"service.name": "named", "team": "a b"}
    assert (found.sampler, found.metrics_interval_s) == ("always_off", 1.0)


def test_a_wrong_variable_gives_way_to_the_section() -> None:
    environ = {BASE + "TIMEOUT": "x", BASE + "PROTOCOL": "x", BASE + "ENDPOINT": "x"}
    found = otel_settings(environ, SECTION)
    assert found.traces == otel_settings({}, SECTION).traces
    assert len(found.warnings) == 3


# Trace context.

PARENTS = [
    # header                                    what it says
    (f"00-{TRACE}-{PARENT}-01",                 (TRACE, PARENT, 1)),
    (f"00-{TRACE}-{PARENT}-00",                 (TRACE, PARENT, 0)),
    (f"00-{TRACE}-{PARENT}-ff",                 (TRACE, PARENT, 255)),
    (f"cc-{TRACE}-{PARENT}-01",                 (TRACE, PARENT, 1)),
    (f"cc-{TRACE}-{PARENT}-01-what-comes",      (TRACE, PARENT, 1)),
    (f"cc-{TRACE}-{PARENT}-01.what",            None),
    (f"00-{TRACE}-{PARENT}-01-more",            None),
    (f"ff-{TRACE}-{PARENT}-01",                 None),
    (f"00-{TRACE.upper()}-{PARENT}-01",         None),
    (f"00-{'0' * 32}-{PARENT}-01",              None),
    (f"00-{TRACE}-{'0' * 16}-01",               None),
    (f"00-{TRACE[:-1]}-{PARENT}-01",            None),
    (f"00-{TRACE}-{PARENT}-1",                  None),
    (f"00-{TRACE}-{PARENT}",                    None),
    (f"00-{TRACE}-{PARENT}-01\n",               None),
    (f" 00-{TRACE}-{PARENT}-01",                None),
    (f"0-{TRACE}-{PARENT}-01",                  None),
    (f"00-{chr(0x661) * 32}-{PARENT}-01",         None),
    (f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01", None),
    ("",                                        None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "read"), PARENTS)
def test_a_traceparent_is_read_strictly(text: str, read: Any) -> None:
    assert read_traceparent(text) == read


@pytest.mark.parametrize("sampled", [True, False])
def test_a_traceparent_written_is_one_that_can_be_read(sampled: bool) -> None:
    assert read_traceparent(write_traceparent(TRACE, SPAN, sampled=sampled)) == (
        TRACE,
        SPAN,
        int(sampled),
    )


def test_a_trace_goes_on_with_its_state_and_a_new_one_without() -> None:
    headers = {"tracestate": "a=1,b=2", "baggage": "user=7", "traceparent": "old", "x": "y"}
    assert context_headers(headers, "new", continued=True) == {
        "traceparent": "new",
        "tracestate": "a=1,b=2",
        "baggage": "user=7",
    }
    assert context_headers(headers, "new", continued=False).keys() == {"traceparent", "baggage"}


BOUNDED = [
    # tracestate                           what is passed on
    ("a=" + "x" * 510,                     "a=" + "x" * 510),
    ("a=" + "x" * 511,                     None),
    ("a=1,b=" + "x" * 509,                 "a=1"),
    ("a=1,b=" + "x" * 506,                 "a=1,b=" + "x" * 506),
    ("a=1,b=" + "x" * 506 + ",c=2",        "a=1,b=" + "x" * 506),
    (",".join(f"k{n}=1" for n in range(40)), ",".join(f"k{n}=1" for n in range(32))),
]  # fmt: skip


@pytest.mark.parametrize(("state", "kept"), BOUNDED)
def test_too_long_a_tracestate_loses_whole_members_at_its_end(state: str, kept: str | None) -> None:
    assert context_headers({"tracestate": state}, "t", continued=True).get("tracestate") == kept


SAMPLING = [
    # sampler, parent's flags        is it exported
    ("always_on",             None,  True),
    ("always_on",             0,     True),
    ("always_off",            1,     False),
    ("parentbased_always_on", None,  True),
    ("parentbased_always_on", 0,     False),
    ("parentbased_always_off", None, False),
    ("parentbased_always_off", 1,    True),
    ("parentbased_always_off", 2,    False),  # another flag
    ("parentbased_traceidratio", 1,  True),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "flags", "sampled"), SAMPLING)
def test_a_sampler_decides_by_itself_or_by_its_parent(
    sampler: str, flags: int | None, sampled: bool
) -> None:
    assert sampler in SAMPLERS
    assert is_sampled(TRACE, flags, sampler, 0.0) is sampled


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_a_ratio_takes_its_share_of_traces_and_always_the_same(ratio: float) -> None:
    chance = random.Random(7)
    ids = [f"{chance.getrandbits(128):032x}" for _ in range(4000)]
    taken = [is_sampled(trace, None, "parentbased_traceidratio", ratio) for trace in ids]
    assert sum(taken) / len(ids) == pytest.approx(ratio, abs=0.03)
    assert taken == [is_sampled(trace, 0, "traceidratio", ratio) for trace in ids]


@pytest.mark.parametrize("most", range(12))
def test_a_text_is_never_longer_than_it_may_be(most: int) -> None:
    assert len(cut_text("a" * 1000, most).encode()) <= most
    assert cut_text("ab", 2) == "ab"


def test_a_password_in_an_address_becomes_a_header() -> None:
    told = otel_settings({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:p%40ss@collector:4318"})
    assert told.traces and told.traces.url == "http://collector:4318/v1/traces"
    [(name, value)] = told.traces.headers
    assert (name, value.reveal()) == ("authorization", "Basic dXNlcjpwQHNz")


def test_the_port_of_grpc_is_warned_of() -> None:
    told = otel_settings({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4317"})
    assert any("over HTTP it is 4318" in said for said in told.warnings)
