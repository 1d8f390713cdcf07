"""Recognise a create that openai's client sends again, so that no turn is doubled.

That client repeats a POST whose answer it did not get, after a timeout, a cut connection or a
5xx, and sends no idempotency key for a response (3.54). What it sends is
``x-stainless-retry-count``. So a first attempt leaves its fingerprint (in the turn's idempotency
key, and in the metadata of a session that it made), and a repeated one looks for that: in the
latest turn of its session, else in the sessions that are young enough. A turn that ended long
ago is not meant: then the first attempt never arrived, and the same was asked before. Two callers
that ask the very same at once are told apart by nothing; the one whose answer was lost may then
be given the other's.
"""

from __future__ import annotations

import contextlib
from hashlib import blake2b

import msgspec

from agentray.errors import SessionNotFoundError, TurnNotFoundError
from agentray.http.door import TENANT, Door
from agentray.http.exchange import Exchange
from agentray.ids import new_turn_id
from agentray.sessions.base import TurnInfo

__all__ = ["Attempt", "attempt_of", "earlier_attempt"]

METADATA_KEY = "agentray.request"
_PREFIX = "openai:"
_CLIENT_TIMEOUT_S = 600.0
_SLACK_S = 60.0
# A client that lost an answer comes back after its pause of at most 8 seconds.
_ANSWER_LOST_S = 60.0
_PAGES = 10
_PAGE = 100


class Attempt(msgspec.Struct, frozen=True):
    """One sending of a request, recognised by what it says and for whom."""

    fingerprint: str
    repeated: bool
    timeout_s: float

    def key(self) -> str:
        """Return a fresh idempotency key that carries the fingerprint."""
        return f"{_PREFIX}{self.fingerprint}:{new_turn_id()}"

    def made(self, turn: TurnInfo, now: float) -> bool:
        """Return whether this request, sent before, made that turn."""
        key = turn.idempotency_key
        if key is None or not key.startswith(f"{_PREFIX}{self.fingerprint}:"):
            return False
        return turn.finished_at is None or now - turn.finished_at <= _ANSWER_LOST_S

    @property
    def metadata(self) -> dict[str, str]:
        return {METADATA_KEY: self.fingerprint}


def attempt_of(exchange: Exchange) -> Attempt | None:
    """Return the attempt that a request is, if its client counts them."""
    count = exchange.header(b"x-stainless-retry-count")
    if count is None:
        return None
    digest = blake2b(exchange.raw, digest_size=16)
    digest.update((exchange.header(b"authorization") or "").encode())
    repeated = count not in ("", "0")
    timeout_s = _CLIENT_TIMEOUT_S
    if repeated and (given := exchange.header(b"x-stainless-read-timeout")) is not None:
        with contextlib.suppress(ValueError):
            timeout_s = min(float(given), 24 * 3600.0)
    return Attempt(digest.hexdigest(), repeated, timeout_s)


async def earlier_attempt(
    door: Door, attempt: Attempt, session_id: str | None
) -> tuple[str, TurnInfo] | None:
    """Return the session and turn that an earlier attempt of this request made, if any."""
    if session_id is not None and (turn := await _made(door, attempt, session_id)) is not None:
        return session_id, turn
    oldest = door.clock.now() - attempt.timeout_s - _SLACK_S
    after: str | None = None
    for _ in range(_PAGES):
        sessions, after = await door.sessions.list(TENANT, after=after, limit=_PAGE)
        for session in sessions:
            if session.created_at < oldest:
                return None
            if session.metadata.get(METADATA_KEY) == attempt.fingerprint:
                turn = await _made(door, attempt, session.id)
                if turn is not None:
                    return session.id, turn
        if after is None:
            break
    return None


async def _made(door: Door, attempt: Attempt, session_id: str) -> TurnInfo | None:
    try:
        latest = await door.sessions.latest_turn(TENANT, session_id)
        if latest is None:
            return None
        turn = await door.sessions.turn(TENANT, session_id, latest)
    except (SessionNotFoundError, TurnNotFoundError):
        return None
    return turn if attempt.made(turn, door.clock.now()) else None
