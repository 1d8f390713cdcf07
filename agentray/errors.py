"""Every error that agentray raises: one root, one child per room, a stable code each."""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "AgentRayError",
    "BackpressureError",
    "ConfigError",
    "CursorError",
    "DuplicateTurnError",
    "IdempotencyConflictError",
    "InvalidRequestError",
    "ModelContextLengthError",
    "ModelError",
    "ModelNotFoundError",
    "ModelRateLimitedError",
    "ModelUnavailableError",
    "NotReadyError",
    "OwnershipLostError",
    "SandboxUnavailableError",
    "SessionBusyError",
    "SessionClosedError",
    "SessionNotFoundError",
    "SessionParkedError",
    "SessionsError",
    "StorageError",
    "StorageUnavailableError",
    "ToolError",
    "TurnNotFoundError",
]


def _rebuild(cls: type[AgentRayError], message: str, fields: dict[str, Any]) -> AgentRayError:
    return cls(message, **fields)


class AgentRayError(Exception):
    """The root of all errors.

    ``code`` is stable and meant for programs, ``retryable`` says whether the same call may
    succeed later unchanged, ``fields`` holds the facts. Instances survive pickling, so they can
    cross Ray's process boundaries.
    """

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields)


class ConfigError(AgentRayError):
    """A configuration that cannot be used; the message names file, key and what was expected."""

    code = "config_invalid"


class InvalidRequestError(AgentRayError):
    """A caller's input that cannot be accepted; ``param`` in the fields names the part."""

    code = "invalid_request"


class CursorError(InvalidRequestError):
    """A stream cursor that is malformed or lies in the future."""

    code = "invalid_cursor"


class NotReadyError(AgentRayError):
    """The platform, or the part of it that was asked for, is starting, draining or unreachable."""

    code = "not_ready"
    retryable = True


class StorageError(AgentRayError):
    """A store refused an operation."""

    code = "storage_error"


class StorageUnavailableError(StorageError):
    """A store could not be reached, or its answer was lost: the outcome is unknown."""

    code = "storage_unavailable"
    retryable = True


class SessionsError(AgentRayError):
    """Something about a session or one of its turns."""

    code = "session_error"


class SessionNotFoundError(SessionsError):
    code = "session_not_found"


class TurnNotFoundError(SessionsError):
    code = "turn_not_found"


class SessionBusyError(SessionsError):
    """The session runs a turn and the caller asked for ``if_busy="reject"``."""

    code = "session_busy"
    retryable = True


class SessionClosedError(SessionsError):
    """The session's time to live is over: it can be read and deleted, not continued."""

    code = "session_closed"


class SessionParkedError(SessionsError):
    """The session could not be brought back; ``reason`` in the fields says why."""

    code = "session_parked"


class OwnershipLostError(SessionsError):
    """The fence refused an append: another owner holds the session now."""

    code = "ownership_lost"
    retryable = True


class DuplicateTurnError(SessionsError):
    """A turn with the same idempotency key exists; ``turn_id`` in the fields names it."""

    code = "duplicate_turn"


class IdempotencyConflictError(SessionsError):
    """An idempotency key was used again with another input."""

    code = "idempotency_conflict"


class BackpressureError(SessionsError):
    """A bounded queue is full; ``retry_after_s`` in the fields says when to come back."""

    code = "overloaded"
    retryable = True


class ModelError(AgentRayError):
    """A model call failed; ``model`` and, where there was one, ``status`` are in the fields."""

    code = "model_error"


class ModelNotFoundError(ModelError):
    code = "model_not_found"


class ModelContextLengthError(ModelError):
    """The endpoint says that prompt and answer do not fit its context window."""

    code = "context_length_exceeded"


class ModelUnavailableError(ModelError):
    """The endpoint could not be reached, stalled, closed early or answered 5xx."""

    code = "model_unavailable"
    retryable = True


class ModelRateLimitedError(ModelError):
    """The endpoint answered 429; ``retry_after_s`` is in the fields when it named one."""

    code = "model_rate_limited"
    retryable = True


class ToolError(AgentRayError):
    """A tool is unknown or could not be run at all; its own failures are results, not errors."""

    code = "tool_error"


class SandboxUnavailableError(ToolError):
    """This machine cannot give the tier that was asked for.

    ``tier``, ``missing`` (what it lacks, and why) and ``weaker`` (tiers that an operator may opt
    into by name) are in the fields.
    """

    code = "sandbox_unavailable"
