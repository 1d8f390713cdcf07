"""Say every error in OpenAI's shape, with its status: the one place that knows both."""

from __future__ import annotations

import math
import re
from typing import Any, cast

import msgspec

from agentray.errors import AgentRayError, InvalidRequestError

__all__ = [
    "BatchEndedError",
    "BatchUnknownError",
    "BodyTooLargeError",
    "ErrorBody",
    "ErrorDetail",
    "FileUnknownError",
    "ItemNotFoundError",
    "MethodNotAllowedError",
    "RouteNotFoundError",
    "UnsupportedParameterError",
    "describe",
    "headers",
    "status",
    "validation_error",
]


class RouteNotFoundError(AgentRayError):
    """Nothing is served at this path."""

    code = "not_found"


class ItemNotFoundError(AgentRayError):
    """A conversation has no such item."""

    code = "item_not_found"


class FileUnknownError(AgentRayError):
    """There is no such file."""

    code = "file_not_found"


class BatchUnknownError(AgentRayError):
    """There is no such batch."""

    code = "batch_not_found"


class BatchEndedError(AgentRayError):
    """The batch has ended, or is about to: it cannot be cancelled."""

    code = "batch_ended"


class MethodNotAllowedError(AgentRayError):
    """The path is served, but not with this method; ``allow`` in the fields names those."""

    code = "method_not_allowed"


class BodyTooLargeError(AgentRayError):
    """The body is larger than the limit."""

    code = "body_too_large"


class UnsupportedParameterError(InvalidRequestError):
    """A parameter that OpenAI knows, and whose meaning agentray would not honour."""

    code = "unsupported_parameter"


_STATUSES = {
    "invalid_request": 400,
    "invalid_cursor": 400,
    "unsupported_parameter": 400,
    "context_length_exceeded": 400,
    "no_model": 400,
    "not_found": 404,
    "item_not_found": 404,
    "file_not_found": 404,
    "batch_not_found": 404,
    "session_not_found": 404,
    "turn_not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "batch_ended": 409,
    "session_busy": 409,
    "session_closed": 409,
    "session_parked": 409,
    "duplicate_turn": 409,
    "idempotency_conflict": 409,
    "body_too_large": 413,
    "overloaded": 429,
    "model_rate_limited": 429,
    "model_error": 502,
    "model_unavailable": 502,
    "not_ready": 503,
    "ownership_lost": 503,
    "storage_unavailable": 503,
}
_DEFAULT_RETRY_AFTER_S = 1


class ErrorDetail(msgspec.Struct, frozen=True):
    """``code`` is stable; ``details`` holds the facts that belong to it."""

    message: str
    type: str
    param: str | None
    code: str | None
    details: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error shape."""

    error: ErrorDetail


def status(error: AgentRayError) -> int:
    """Return the HTTP status of an error."""
    if error.code == "model_error":
        # A refusal of the model's server (a prompt that is too long) is the caller's to mend.
        upstream = error.fields.get("status")
        return 400 if upstream in (400, 413, 422) else 502
    return _STATUSES.get(error.code, 500)


def describe(error: AgentRayError) -> ErrorBody:
    """Return the body of an error."""
    code = status(error)
    kind = "server_error" if code >= 500 else "invalid_request_error"
    facts = {key: value for key, value in error.fields.items() if key != "param" and _plain(value)}
    return ErrorBody(
        ErrorDetail(
            error.message,
            "rate_limit_error" if code == 429 else kind,
            error.fields.get("param"),
            error.code,
            facts or msgspec.UNSET,
        )
    )


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_plain, cast("list[object]", value)))
    return value is None or isinstance(value, (str, int, float))


def headers(error: AgentRayError) -> list[tuple[bytes, bytes]]:
    """Return the headers that go with an error.

    ``x-should-retry`` is what clients made by Stainless, openai's among them, obey before they
    look at the status: they would try a 409 again although it will be refused again.
    """
    code = status(error)
    found: list[tuple[bytes, bytes]] = []
    after = error.fields.get("retry_after_s")
    known = isinstance(after, (int, float))
    if code in (429, 503) or (code == 502 and known):
        seconds = after if known else _DEFAULT_RETRY_AFTER_S
        found.append((b"retry-after", b"%d" % max(1, math.ceil(seconds))))
    if code == 409:
        found.append((b"x-should-retry", b"false"))
    if code == 405:
        found.append((b"allow", str(error.fields.get("allow", "")).encode()))
    if code == 413:
        found.append((b"connection", b"close"))  # the rest of the body is not read
    return found


_ITEM_TYPE = re.compile(r"input\[\d+\](\.content\[\d+\])?\.type")
# What is wrong inside a format that is known.
_FORMAT_FIELD = re.compile(r"text\.format(?!\.type)(\..*)?")
_REFUSED = {
    "background_options": "only the default",
    "completion_window": "only 24h",
    "context_management": "agentray manages the context itself",
    "endpoint": "only chat completions and embeddings",
    "image": "only the default",
    "include": "logprobs are not kept",
    "max_tool_calls": "an agent's max_steps bounds its calls",
    "moderation": "agentray does not moderate",
    "prompt": "templates are the agent's instructions",
    "purpose": "only batch",
    "reasoning": "set it where the model is served",
    "service_tier": "only auto and default",
    "text": "only the formats text, json_object and json_schema, at medium verbosity",
    "tool_choice": "only auto",
    "tools": "an agent's tools are in its configuration",
    "top_logprobs": "logprobs are not kept",
    "truncation": "only disabled",
}
"""Parameters of OpenAI's responses that are accepted only with a value that changes nothing."""


def validation_error(error: Exception, *, openai: bool = False) -> InvalidRequestError:
    """Return what is wrong with a body or query that could not be decoded.

    ``error`` is msgspec's, whose message ends with the path of the value it means.
    """
    if not isinstance(error, msgspec.ValidationError):
        deep = isinstance(error, RecursionError)
        return InvalidRequestError(f"malformed JSON: {'nested too deeply' if deep else error}")
    message, _, path = str(error).rpartition(" - at `")
    if not message:
        return InvalidRequestError(str(error), param=_missing(str(error)))
    param = path.rstrip("`").removeprefix("$").removeprefix(".")
    if openai:
        first = re.split(r"[.\[]", param, maxsplit=1)[0]
        why = "only messages of text and images" if _ITEM_TYPE.fullmatch(param) else None
        why = _REFUSED.get(first, why)
        if why and not _FORMAT_FIELD.fullmatch(param):
            return UnsupportedParameterError(
                f"{param} is not supported here ({why}): {message}", param=param
            )
    return InvalidRequestError(f"{message}, at {param}" if param else message, param=param or None)


def _missing(message: str) -> str | None:
    # "Object missing required field `input`", "Object contains unknown field `inptu`"
    return message.split("`")[1] if "field `" in message else None
