"""Recognise a create that openai's client sends again, so that no turn is doubled.

That client repeats a POST whose answer it did not get, after a timeout, a cut connection or a
5xx, and sends no idempotency key for a response (3.54). What it sends is
``x-stainless-retry-count``. So a first attempt leaves its fingerprint (in the turn's idempotency
key, and in the metadata of a session that it made), and a repeated one looks for that: in the
latest turn of its session, else in the sessions that are young enough.

A turn that ended longer ago than that client pauses is not meant: then the first attempt never
arrived, and the same was asked and answered before. Nor is a turn whose answer left this process
whole, if the same was asked anew since, or the retry is later than its own pauses explain. What
is left open: the same asked twice at once, or again within those seconds, by a request that got
nowhere. No header tells these from a lost answer; then the earlier answer is given.
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
# A client that lost an answer comes back after a pause that begins at half a second and doubles.
_ANSWER_LOST_S = 10.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
# What an attempt may take until it is here, or has failed, on top of the pause before it.
_ON_ITS_WAY_S = 2.0
_PAGES = 10
_PAGE = 100


class Attempt(msgspec.Struct, frozen=True):
    """One sending of a request, recognised by what it says and for whom."""

    fingerprint: str
    retries: int
    timeout_s: float

    @property
    def repeated(self) -> bool:
        return self.retries > 0

    @property
    def pause_s(self) -> float:
        """The longest time from the loss of the first attempt's answer to this attempt."""
        counts = range(min(self.retries, 8))
        pauses = [min(_FIRST_PAUSE_S * 2**n, _LONGEST_PAUSE_S) + _ON_ITS_WAY_S for n in counts]
        return min(sum(pauses), _ANSWER_LOST_S)

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
    retries = int(count) if count.isdecimal() and len(count) < 10 else int(count != "")
    timeout_s = _CLIENT_TIMEOUT_S
    if retries and (given := exchange.header(b"x-stainless-read-timeout")) is not None:
        with contextlib.suppress(ValueError):
            timeout_s = min(float(given), 24 * 3600.0)
    return Attempt(digest.hexdigest(), retries, timeout_s)


async def earlier_attempt(
    door: Door, attempt: Attempt, session_id: str | None, *, elsewhere: bool
) -> tuple[str, TurnInfo] | None:
    """Return the session and turn that an earlier attempt of this request made, if any.

    ``elsewhere`` says whether that may be another session than the given one: a new or forked one.
    """
    if session_id is not None and (turn := await _made(door, attempt, session_id)) is not None:
        return session_id, turn
    if not elsewhere:
        return None
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
    if not attempt.made(turn, door.clock.now()):
        return None
    return None if door.answers.had(turn.id, attempt.fingerprint, attempt.pause_s) else turn
