"""Decide what is to be done with a batch, with one of its lines, and with free capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from agentray.storage.batches import BatchRow, EndStatus

__all__ = [
    "LONGEST_REST_S",
    "MAX_ATTEMPTS",
    "Rests",
    "Step",
    "Verdict",
    "next_step",
    "pause_s",
    "shares",
    "verdict",
]

T = TypeVar("T")

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 600.0
LONGEST_REST_S = 60.0
MAX_ATTEMPTS = 10
"""How often a line is tried whose own fault it may be that the model's server fails: the pauses
in between are four to nine minutes together."""

# A key that is being rotated, a model that is being loaded.
_REFUSED = (401, 402, 403, 404)

Step = Literal["validate", "run", "finalize", "wait"] | tuple[Literal["end"], EndStatus]
Verdict = Literal["succeeded", "failed", "again", "later"]


def next_step(batch: BatchRow) -> Step:
    """Return what an open batch needs now; ``("end", status)`` if it is to be ended so."""
    if batch.status == "finalizing":
        return "end", "completed"
    if batch.status == "cancelling":
        return "wait" if batch.running else ("end", "cancelled")
    if batch.status == "in_progress" and batch.completed + batch.failed >= batch.total:
        return "finalize"
    if batch.overdue:
        return "wait" if batch.running else ("end", "expired")
    if batch.status == "validating":
        return "validate"
    return "run" if batch.status == "in_progress" else "wait"


class _Details(msgspec.Struct):
    status: int | None = None


class _Error(msgspec.Struct):
    code: str | None = None
    details: _Details | None = None


class _Refusal(msgspec.Struct):
    error: _Error | None = None


_refusal = msgspec.json.Decoder(_Refusal)


def verdict(status: int, body: bytes, attempts: int) -> Verdict:
    """Return what an answer means for its line: a result of either kind, or another attempt.

    ``later`` is what says nothing of the line, and may pass: a limit (429), a model or a store
    that is away. ``again`` is an attempt that counts: the model's server itself answered 500, or
    refused its key or its model's name. The last of ``MAX_ATTEMPTS`` of those is a result, and
    so is at once whatever else the server refuses: a 502 with the code ``model_error``.
    """
    if status < 300:
        return "succeeded"
    if status == 429:
        return "later"
    if status < 500:
        return "failed"
    error = _error_of(body)
    said = None if error.details is None else error.details.status
    if error.code == "model_error" and said not in _REFUSED:
        return "failed"
    if status == 500 or said == 500 or error.code == "model_error":
        return "again" if attempts < MAX_ATTEMPTS else "failed"
    return "later"


def _error_of(body: bytes) -> _Error:
    try:
        return _refusal.decode(body).error or _Error()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Error()


def pause_s(attempts: int, retry_after_s: float | None, jitter: float) -> float:
    """Return how long to wait before the next attempt; ``jitter`` is drawn from 0 to 1.

    It doubles with each attempt, up to ten minutes, and is never shorter than what was asked for.
    """
    doubled = min(FIRST_PAUSE_S * 2.0 ** min(attempts - 1, 32), LONGEST_PAUSE_S)
    return max(retry_after_s or 0.0, doubled * (0.5 + 0.5 * jitter))


def shares(free: int, batches: Sequence[T], turn: int) -> list[tuple[T, int]]:
    """Return how many lines of each batch may begin; what cannot be shared goes round by turns."""
    if not batches or free <= 0:
        return []
    at = turn % len(batches)
    order = [*batches[at:], *batches[:at]]
    each, more = divmod(free, len(order))
    counts = [each + (i < more) for i in range(len(order))]
    return [(batch, count) for batch, count in zip(order, counts, strict=True) if count]


class Rests:
    """How long batches are left alone whose lines cannot be answered now.

    Pure: times are in seconds of one clock, and passed in. A rest doubles, up to
    ``LONGEST_REST_S``, until a line is answered: so a model that is away is asked by few lines of
    each batch, and those find out that it is back.
    """

    def __init__(self) -> None:
        # How often in a row, and until when.
        self._of: dict[str, tuple[int, float]] = {}

    def put_off(self, batch_id: str, now: float, asked_s: float | None, jitter: float) -> None:
        """A line of a batch was put off; ``asked_s`` is how long it was told to wait, ``jitter``
        is drawn from 0 to 1."""
        times, until = self._of.get(batch_id, (0, now))
        if until <= now:
            # Lines that began with one that was put off before say nothing new.
            doubled = min(FIRST_PAUSE_S * 2.0 ** min(times, 32), LONGEST_REST_S)
            times, until = times + 1, now + doubled * (0.5 + 0.5 * jitter)
        asked = min(asked_s or 0.0, LONGEST_REST_S)
        self._of[batch_id] = (times, max(until, now + asked))

    def answered(self, batch_id: str) -> None:
        """A line of a batch was answered."""
        self._of.pop(batch_id, None)

    def resting(self, now: float) -> list[str]:
        """Return the batches that are to be left alone now."""
        # One that was not tried again in all this time begins anew.
        self._of = {k: v for k, v in self._of.items() if now < v[1] + 2 * LONGEST_REST_S}
        return [batch_id for batch_id, (_, until) in self._of.items() if now < until]
