"""Decide what is to be done with a batch, with one of its lines, and with free capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from agentray.storage.batches import BatchRow, EndStatus

__all__ = ["Step", "Verdict", "next_step", "pause_s", "shares", "verdict"]

T = TypeVar("T")

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 600.0

Step = Literal["validate", "run", "finalize", "wait"] | tuple[Literal["end"], EndStatus]
Verdict = Literal["succeeded", "failed", "later"]


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


class _Error(msgspec.Struct):
    code: str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | None = None


_refusal = msgspec.json.Decoder(_Refusal)


def verdict(status: int, body: bytes) -> Verdict:
    """Return what an answer means for its line: a result of either kind, or another attempt.

    Whatever may pass is tried again: a limit (429), a server that fails (5xx). A model's server
    that refuses for good is a 502 at agentray's door, with the code ``model_error``.
    """
    if status < 300:
        return "succeeded"
    if status == 429:
        return "later"
    if status < 500:
        return "failed"
    try:
        error = _refusal.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = None
    return "failed" if error is not None and error.code == "model_error" else "later"


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
