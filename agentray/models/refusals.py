"""Turn what an endpoint says when it refuses, in whatever shape, into our errors."""

from __future__ import annotations

import math
import re
from email.utils import parsedate_to_datetime
from typing import Any, cast

import msgspec

from agentray.errors import (
    ModelContextLengthError,
    ModelError,
    ModelRateLimitedError,
    ModelUnavailableError,
)

__all__ = ["refusal", "refusal_in_answer", "retry_after_s", "unavailable"]

MAX_MESSAGE_CHARS = 500

# Refusals that come back unchanged however often the call is made.
_LASTING = {
    "authentication_error",
    "context_length_exceeded",
    "invalid_api_key",
    "invalid_request_error",
    "model_not_found",
    "permission_error",
    "BadRequestError",
    "NotFoundError",
}
# Servers have no code for it in common: what OpenAI, vLLM, Anthropic and llama.cpp say.
_TOO_LONG = re.compile(
    r"(?i)context (?:length|window|size)|maximum (?:model|input|prompt) length|prompt is too long"
)
_RATE_LIMITED = {"rate_limit_error", "rate_limit_exceeded", "RateLimitError", "Too Many Requests"}


def refusal(
    model: str,
    status: int,
    body: bytes,
    *,
    retry_after: float | None = None,
    secret: str | None = None,
) -> ModelError:
    """Return the error for an answer with a status other than 200.

    408, 409, 425 and 5xx may pass (``ModelUnavailableError``), 429 passes after
    ``retry_after``, and everything else is a plain ``ModelError``.
    """
    message, code, _ = _facts(body, secret)
    said = f"model {model!r} answered {status}" + (f": {message}" if message else "")
    fields: dict[str, Any] = {"model": model, "status": status}
    if code is not None:
        fields["upstream_code"] = code
    if status == 429:
        if retry_after is not None:
            fields["retry_after_s"] = retry_after
        return ModelRateLimitedError(said, **fields)
    if status >= 500 or status in (408, 409, 425):
        return ModelUnavailableError(said, **fields)
    if code == "context_length_exceeded" or (status in (400, 413) and _TOO_LONG.search(message)):
        return ModelContextLengthError(said, **fields)
    return ModelError(said, **fields)


def refusal_in_answer(model: str, body: bytes, secret: str | None = None) -> ModelError:
    """Return the error for an error that came with status 200, or in the middle of a stream.

    Its code or type says what status it would have had; one that says nothing may pass.
    """
    message, code, kinds = _facts(body, secret)
    status = None
    for kind in kinds:
        if kind.isdecimal() and 400 <= int(kind) <= 599:
            status = int(kind)
            break
        if kind in _RATE_LIMITED:
            status = 429
            break
        if kind in _LASTING:
            status = 400
    if status is not None:
        return refusal(model, status, body, secret=secret)
    fields: dict[str, Any] = {"model": model, "status": 200}
    if code is not None:
        fields["upstream_code"] = code
    said = f"model {model!r} answered with an error" + (f": {message}" if message else "")
    return ModelUnavailableError(said, **fields)


def unavailable(model: str, what: str, **fields: Any) -> ModelUnavailableError:
    """Return the error for a model that did not answer, or not as it should."""
    return ModelUnavailableError(f"model {model!r} {what}", model=model, **fields)


def retry_after_s(value: str | None, now: float) -> float | None:
    """Return the seconds of a ``Retry-After`` header, given as such or as a date; else None."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _facts(body: bytes, secret: str | None) -> tuple[str, str | None, list[str]]:
    """Return the message, the endpoint's code, and all that may name the kind of the error."""
    found: Any = None
    kinds: list[str] = []
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        message = body.decode("utf-8", "replace")
    else:
        # {"error": {...}}, {"error": "..."}, {"detail": ...}, or the error itself.
        for key in ("error", "detail"):
            if isinstance(found, dict):
                facts = cast(dict[str, Any], found)
                found = facts.get(key) or facts
        if isinstance(found, dict):
            facts = cast(dict[str, Any], found)
            kinds = [str(facts[key]) for key in ("code", "type", "status") if facts.get(key)]
            found = facts.get("message") or facts
        message = found if isinstance(found, str) else msgspec.json.encode(found).decode()
    if secret:
        message = message.replace(secret, "***")
    message = " ".join(message.split())
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + "…"
    return message, (kinds[0][:100] if kinds else None), kinds
