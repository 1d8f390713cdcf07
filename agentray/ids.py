"""Make and check the identifiers of sessions, turns, responses and owners.

A response's id carries its session's id, so that a proxy can find the session's host from it::

    resp_<turn id, 26 characters>_<session id>
"""

from __future__ import annotations

import os
import re
import time
import uuid

from agentray.errors import InvalidRequestError

__all__ = [
    "RESPONSE_SESSION_OFFSET",
    "check_name",
    "check_session_id",
    "new_batch_id",
    "new_conversation_id",
    "new_file_id",
    "new_owner_id",
    "new_session_id",
    "new_turn_id",
    "response_id",
    "split_response_id",
]

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}")
_TURN_ID = re.compile(r"[0-9a-hjkmnp-tv-z]{26}")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"

RESPONSE_SESSION_OFFSET = len("resp_") + 26 + 1
"""Characters of a response id in front of its session id."""


def _ulid() -> str:
    # Crockford's base 32 of 48 bits of milliseconds and 80 random bits (github.com/ulid/spec).
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    return "".join(_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5))


def new_session_id() -> str:
    """Return a fresh session id, sortable by the time of its making."""
    return "sess_" + _ulid()


def new_conversation_id() -> str:
    """Return a fresh id for a session that was made through ``/v1/conversations``."""
    return "conv_" + _ulid()


def new_turn_id() -> str:
    """Return a fresh turn id: 26 characters, sortable by the time of its making."""
    return _ulid()


def new_file_id() -> str:
    """Return a fresh id of a file, sortable by the time of its making."""
    return "file-" + _ulid()


def new_batch_id() -> str:
    """Return a fresh id of a batch, sortable by the time of its making."""
    return "batch_" + _ulid()


def new_owner_id() -> str:
    """Return the id of an owner: fresh for each process, never used again."""
    return str(uuid.uuid4())


def check_session_id(value: str, *, param: str = "session_id") -> str:
    """Return ``value`` if it can be a session id.

    Raises:
        InvalidRequestError: if it is not 1 to 128 of ``A-Z a-z 0-9 . _ : @ + -``, the first a
            letter or digit.
    """
    if not _SESSION_ID.fullmatch(value):
        shown = value if len(value) <= 40 else value[:40] + "…"
        raise InvalidRequestError(
            f"{shown!r} is not a session id: expected 1 to 128 characters of letters, digits "
            "and ._:@+-, the first a letter or digit",
            param=param,
        )
    return value


def check_name(value: str, *, param: str) -> str:
    """Return ``value`` if it can be a user, tenant or agent name (1 to 256 printable characters).

    Raises:
        InvalidRequestError: otherwise.
    """
    if not 1 <= len(value) <= 256 or not value.isprintable():
        raise InvalidRequestError(f"{param} must be 1 to 256 printable characters", param=param)
    return value


def response_id(session_id: str, turn_id: str) -> str:
    """Return the OpenAI response id of a turn."""
    return f"resp_{turn_id}_{session_id}"


def split_response_id(value: str, *, param: str = "response_id") -> tuple[str, str]:
    """Return ``(session_id, turn_id)`` of a response id.

    Raises:
        InvalidRequestError: if ``value`` was not made by :func:`response_id`.
    """
    turn_id = value[5 : RESPONSE_SESSION_OFFSET - 1]
    rest = value[RESPONSE_SESSION_OFFSET:]
    if not (
        value.startswith("resp_")
        and _TURN_ID.fullmatch(turn_id)
        and value[RESPONSE_SESSION_OFFSET - 1 : RESPONSE_SESSION_OFFSET] == "_"
        and _SESSION_ID.fullmatch(rest)
    ):
        shown = value if len(value) <= 40 else value[:40] + "…"
        raise InvalidRequestError(f"{shown!r} is not a response id", param=param)
    return rest, turn_id
