"""What an error carries, and what it stands for."""

from __future__ import annotations

import pytest

import bitrouter
from bitrouter import Kind

STANDS_FOR = [
    # what is raised                status  kind                  code
    (bitrouter.ConfigError, 500, Kind.INTERNAL, "config_invalid"),
    (bitrouter.BadRequest, 400, Kind.INVALID_REQUEST, "invalid_request"),
    (bitrouter.Unauthorized, 401, Kind.AUTH, "invalid_api_key"),
    (bitrouter.KeyMissing, 402, Kind.BILLING, "provider_key_missing"),
    (bitrouter.Forbidden, 403, Kind.PERMISSION, "forbidden"),
    (bitrouter.NotFound, 404, Kind.NOT_FOUND, "not_found"),
    (bitrouter.MethodNotAllowed, 405, Kind.INVALID_REQUEST, "method_not_allowed"),
    (bitrouter.RequestTimeout, 408, Kind.TIMEOUT, "request_timeout"),
    (bitrouter.TooLarge, 413, Kind.TOO_LARGE, "request_too_large"),
    (bitrouter.UnsupportedMedia, 415, Kind.INVALID_REQUEST, "unsupported_media_type"),
    (bitrouter.HeadTooLarge, 431, Kind.INVALID_REQUEST, "headers_too_large"),
    (bitrouter.ProtocolUnsupported, 501, Kind.UNSUPPORTED, "protocol_unsupported"),
    (bitrouter.UpstreamError, 502, Kind.BAD_GATEWAY, "upstream_error"),
    (bitrouter.UpstreamUnreachable, 503, Kind.BAD_GATEWAY, "upstream_unreachable"),
    (bitrouter.UpstreamTimeout, 504, Kind.TIMEOUT, "upstream_timeout"),
    (bitrouter.UpstreamLimited, 429, Kind.RATE_LIMIT, "rate_limit_exceeded"),
    (bitrouter.UpstreamNoCredit, 402, Kind.BILLING, "upstream_payment_required"),
    (bitrouter.UpstreamKeyRefused, 502, Kind.BAD_GATEWAY, "upstream_authentication_failed"),
    (bitrouter.UpstreamGarbled, 502, Kind.BAD_GATEWAY, "upstream_invalid_response"),
    (bitrouter.UpstreamRejected, 400, Kind.INVALID_REQUEST, "upstream_error"),
    (bitrouter.AllAttemptsFailed, 503, Kind.BAD_GATEWAY, "all_attempts_failed"),
]


@pytest.mark.parametrize(("raised", "status", "kind", "code"), STANDS_FOR)
def test_an_error_stands_for_a_status_a_kind_and_a_code(
    raised: type[bitrouter.BitrouterError], status: int, kind: Kind, code: str
) -> None:
    error = raised("said")
    assert (error.status, error.kind, error.code, error.message) == (status, kind, code, "said")


def test_a_code_given_is_the_code_told() -> None:
    assert bitrouter.BadRequest("said", code="odd").code == "odd"
    assert bitrouter.BadRequest("said").code == "invalid_request"


def test_an_upstream_error_takes_the_provider_s_status_and_kind() -> None:
    error = bitrouter.UpstreamError("said", status=529, kind=Kind.OVERLOADED)
    assert (error.status, error.kind) == (529, Kind.OVERLOADED)


def test_two_errors_share_no_facts() -> None:
    one, other = bitrouter.UpstreamError("a"), bitrouter.UpstreamError("b")
    one.extra["variable"] = one.headers["x"] = "KEY"
    assert (other.extra, other.headers) == ({}, {})


def test_only_what_is_final_forbids_another_target() -> None:
    raised = [r for r, *_ in STANDS_FOR if issubclass(r, bitrouter.UpstreamError)]
    final = {r for r in raised if not r.retryable}
    assert final == {bitrouter.UpstreamRejected, bitrouter.AllAttemptsFailed}


def test_the_exception_s_own_text_is_the_message_alone() -> None:
    error = bitrouter.UpstreamGarbled("for the caller", detail="for the log")
    assert str(error) == "for the caller"
