from __future__ import annotations

import pytest

from agentray.errors import (
    AgentRayError,
    ModelContextLengthError,
    ModelError,
    ModelNotFoundError,
    ModelRateLimitedError,
    ModelUnavailableError,
)
from agentray.http.errors import describe, headers, status
from agentray.models.policies import NoModelError


@pytest.mark.parametrize(
    ("error", "expected", "kind"),
    [
        (ModelNotFoundError("no"), 404, "invalid_request_error"),
        (ModelContextLengthError("no", status=400), 400, "invalid_request_error"),
        (NoModelError("no"), 400, "invalid_request_error"),
        (ModelError("no", status=422), 400, "invalid_request_error"),
        (ModelError("no", status=401), 502, "server_error"),
        (ModelUnavailableError("no", status=503), 502, "server_error"),
        (ModelRateLimitedError("no"), 429, "rate_limit_error"),
    ],
)
def test_what_a_model_refuses_is_the_callers_or_the_servers_to_mend(
    error: AgentRayError, expected: int, kind: str
) -> None:
    assert status(error) == expected
    assert describe(error).error.type == kind
    assert describe(error).error.code == error.code


def test_a_limit_says_when_to_come_back() -> None:
    limited = ModelRateLimitedError("no", retry_after_s=2.2)
    assert (b"retry-after", b"3") in headers(limited)


def test_a_model_that_is_away_says_when_to_come_back_if_that_is_known() -> None:
    away = ModelUnavailableError("no", retry_after_s=2.2)
    assert status(away) == 502
    assert (b"retry-after", b"3") in headers(away)
    assert headers(ModelUnavailableError("no")) == []
