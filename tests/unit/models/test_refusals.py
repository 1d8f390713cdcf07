"""Errors of endpoints, in whatever shape."""

import pytest

from agentray.errors import (
    ModelContextLengthError,
    ModelError,
    ModelRateLimitedError,
    ModelUnavailableError,
)
from agentray.models.refusals import refusal, refusal_in_answer, retry_after_s


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, ModelError),
        (400, ModelError),
        (401, ModelError),
        (404, ModelError),
        (408, ModelUnavailableError),
        (422, ModelError),
        (429, ModelRateLimitedError),
        (500, ModelUnavailableError),
        (503, ModelUnavailableError),
        (529, ModelUnavailableError),
    ],
)
def test_the_status_decides_the_error(status: int, kind: type[ModelError]) -> None:
    error = refusal("m", status, b"")
    assert type(error) is kind
    assert error.fields == {"model": "m", "status": status}


@pytest.mark.parametrize(
    ("body", "said", "code"),
    [
        (b'{"error": {"message": "no", "type": "t", "code": "c"}}', "no", "c"),
        (b'{"error": {"message": "no", "type": "t", "code": null}}', "no", "t"),
        (b'{"error": "no"}', "no", None),
        (b'{"object": "error", "message": "no", "code": 400}', "no", "400"),
        (b'{"detail": "no"}', "no", None),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc":["body"]}]', None),
        (b"<html>\n <b>no</b></html>", "<html> <b>no</b></html>", None),
        (b"\xff", "\ufffd", None),
        (b"null", "null", None),
    ],
)
def test_every_shape_of_body_is_read(body: bytes, said: str, code: str | None) -> None:
    error = refusal("m", 400, body)
    assert error.message == f"model 'm' answered 400: {said}"
    assert error.fields.get("upstream_code") == code


def test_a_long_body_is_shortened_and_the_key_is_cut_out() -> None:
    error = refusal("m", 401, b"bad key sk-123 " + b"x" * 10_000, secret="sk-123")
    assert "sk-123" not in error.message
    assert len(error.message) < 600


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("soon", None),
        ("nan", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, now=10.0) == seconds


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b'{"error": {"message": "no", "code": "context_length_exceeded"}}'),
        (400, b'{"error": {"message": "This model\'s maximum context length is 8192 tokens."}}'),
        (400, b'{"error": {"message": "longer than the maximum model length of 4096"}}'),
        (400, b'{"error": {"type": "invalid_request_error", "message": "prompt is too long: 9"}}'),
        (400, b'{"error": {"message": "the request exceeds the available context size"}}'),
        (413, b'{"error": "exceeds the context window"}'),
    ],
)
def test_a_context_that_is_too_long_is_known_whoever_says_it(status: int, body: bytes) -> None:
    error = refusal("m", status, body)
    assert type(error) is ModelContextLengthError
    assert not error.retryable
    assert error.fields["status"] == status


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": {"message": "no such parameter"}}', ModelError),
        (404, b'{"error": {"message": "the context window is closed"}}', ModelError),
        (500, b'{"error": {"message": "context length"}}', ModelUnavailableError),
        (429, b'{"error": {"message": "context length"}}', ModelRateLimitedError),
    ],
)
def test_who_only_speaks_of_it_does_not_mean_it(
    status: int, body: bytes, kind: type[ModelError]
) -> None:
    assert type(refusal("m", status, body)) is kind


def test_it_may_come_in_the_middle_of_an_answer() -> None:
    body = b'{"error": {"message": "prompt is too long", "type": "BadRequestError"}}'
    assert type(refusal_in_answer("m", body)) is ModelContextLengthError


def test_what_is_nested_too_deeply_is_shown_as_text() -> None:
    error = refusal("m", 500, b"[" * 65_536)
    assert isinstance(error, ModelUnavailableError)
    assert error.fields["status"] == 500
