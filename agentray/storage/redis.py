"""The hot tier and the wire on Redis. Whatever fails here is logged, counted and done without."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from agentray.clock import Clock
from agentray.config.settings import RedisSettings
from agentray.storage.base import HotCopy

__all__ = ["RedisStore"]

_FAILURES = (RedisError, OSError, TimeoutError, asyncio.TimeoutError)
_TAIL_TTL_S = 900
_WAITING_TTL_S = 60
_RETRY_PAUSE_S = 0.5
_TAIL_PATIENCE_S = 4.0
_GATHER_S = 0.005
_MAX_PENDING_SAVES = 10_000
_KEEPALIVE: dict[str, Any] = {
    "socket_keepalive": True,
    "socket_keepalive_options": {
        socket.TCP_KEEPIDLE: 10,
        socket.TCP_KEEPINTVL: 5,
        socket.TCP_KEEPCNT: 3,
    },
}

# A copy is one list, so that it is evicted whole: "epoch seq turns cost", then the entries of the
# window. ARGV: epoch, seq, "turns cost", time to live in ms, the seq that the stored copy must have
# for the new entries to follow it (-1: replace), the bound of the window, then the entries.
# Returns 1 if stored, 0 if the stored copy is newer, -1 if entries are missing.
_SAVE = """
local head = redis.call('LINDEX', KEYS[1], 0) or '-1 -1 '
local epoch, seq = string.match(head, '^(%S+) (%S+) ')
epoch, seq = tonumber(epoch), tonumber(seq)
local new_epoch, new_seq, follows = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[5])
if epoch > new_epoch or (epoch == new_epoch and seq >= new_seq) then
  return 0
end
if follows == -1 then
  redis.call('DEL', KEYS[1])
elseif epoch ~= new_epoch or seq ~= follows then
  return -1
else
  redis.call('LPOP', KEYS[1])
end
for i = 7, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('LTRIM', KEYS[1], -tonumber(ARGV[6]), -1)
redis.call('LPUSH', KEYS[1], ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""


class _Save(msgspec.Struct):
    copy: HotCopy
    follows: int
    fresh: int


def _key(tenant: str, session_id: str) -> str:
    # Braces keep all keys of a session in one slot of a Redis cluster.
    return f"ar:hot:{{{tenant}/{session_id}}}"


class RedisStore:
    """``HotStore`` and ``Wire`` on a Redis server.

    Saves are gathered for some milliseconds and go out in one pipeline. After a failure nothing
    is tried for half a second, so that a server that is away costs its callers nothing; only a
    takeover waits for the text of its call, for four seconds.
    """

    def __init__(
        self, url: str, settings: RedisSettings, *, window_turns: int, clock: Clock
    ) -> None:
        self._settings = settings
        self._window_turns = window_turns
        self._clock = clock
        self._redis: Any = cast(Any, Redis).from_url(
            url,
            socket_timeout=settings.timeout_s,
            socket_connect_timeout=settings.timeout_s,
            protocol=3,
        )
        # A subscription waits for as long as nobody says anything: the kernel has to notice that
        # a server vanished without a word.
        self._subscriber: Any = cast(Any, Redis).from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=settings.timeout_s,
            protocol=3,
            **({} if url.startswith("unix:") else _KEEPALIVE),
        )
        self._retry_at = 0.0
        self._pending: dict[tuple[str, str], _Save | None] = {}
        self._stored: dict[tuple[str, str], int] = {}
        self._saver: asyncio.Task[None] | None = None
        self._save_sha = ""
        self.failures = 0

    @property
    def available(self) -> bool:
        return self._clock.monotonic() >= self._retry_at

    async def close(self) -> None:
        if self._saver is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._saver
        await self._redis.aclose()
        await self._subscriber.aclose()

    async def ping(self) -> bool:
        """Return whether the server answers."""
        try:
            await self._redis.ping()
        except _FAILURES:
            self._failed()
            return False
        self._retry_at = 0.0
        return True

    def _failed(self) -> None:
        self.failures += 1
        self._retry_at = self._clock.monotonic() + _RETRY_PAUSE_S
        # Whatever was stored may be gone when the server comes back.
        self._stored.clear()

    # The hot tier

    async def load(self, tenant: str, session_id: str) -> HotCopy | None:
        if not self.available:
            return None
        try:
            stored: list[bytes] = await self._redis.lrange(_key(tenant, session_id), 0, -1)
        except _FAILURES:
            self._failed()
            return None
        if not stored:
            return None
        try:
            epoch, seq, turns, cost = stored[0].split()
            return HotCopy(int(epoch), int(seq), int(turns), tuple(stored[1:]), float(cost))
        except ValueError:
            # Of another version of agentray: the journal has it all.
            return None

    def save(self, tenant: str, session_id: str, copy: HotCopy, *, newest: int) -> None:
        key = (tenant, session_id)
        waiting = self._pending.get(key)
        follows = self._stored.get(key, -1)
        fresh = min(len(copy.window), newest + (waiting.fresh if waiting else 0))
        if len(self._pending) < _MAX_PENDING_SAVES:
            self._pending[key] = _Save(copy, follows, fresh)
            self._wake()
        else:
            self._stored.pop(key, None)

    def forget(self, tenant: str, session_id: str) -> None:
        """Forget what is known of a session's copy, which stays where it is."""
        self._stored.pop((tenant, session_id), None)

    def drop(self, tenant: str, session_id: str) -> None:
        self.forget(tenant, session_id)
        if len(self._pending) < _MAX_PENDING_SAVES:  # else its time to live ends it
            self._pending[tenant, session_id] = None
            self._wake()

    def _wake(self) -> None:
        if self._saver is None or self._saver.done():
            self._saver = asyncio.get_running_loop().create_task(self._drain_saves())

    async def _drain_saves(self) -> None:
        while self._pending and self.available:
            # Nobody waits for it: the next turn does not have to, and there may be more by then.
            await asyncio.sleep(_GATHER_S)
            batch, self._pending = self._pending, {}
            try:
                await self._save_batch(batch)
            except _FAILURES:
                self._failed()
                # What was to be deleted is still to be deleted when the server is back.
                batch.update(self._pending)
                self._pending = batch
        self._pending = {key: None for key, save in self._pending.items() if save is None}

    async def _save_batch(self, batch: dict[tuple[str, str], _Save | None]) -> None:
        if not self._save_sha:
            self._save_sha = await self._redis.script_load(_SAVE)
        pipe = self._redis.pipeline(transaction=False)
        for (tenant, session_id), save in batch.items():
            name = _key(tenant, session_id)
            if save is None:
                pipe.delete(name)
                continue
            window = save.copy.window
            entries = window if save.follows == -1 else window[len(window) - save.fresh :]
            pipe.evalsha(
                self._save_sha,
                1,
                name,
                *(save.copy.epoch, save.copy.seq, f"{save.copy.turns} {save.copy.cost!r}"),
                *(int(self._settings.hot_ttl_s * 1000), save.follows, self._window_turns),
                *entries,
            )
        results: list[Any] = await pipe.execute(raise_on_error=False)
        for (key, save), result in zip(batch.items(), results, strict=True):
            if save is None:
                continue
            waiting = self._pending.get(key)
            if result == 1:
                self._stored[key] = save.copy.seq
                if waiting is not None and waiting.follows != -1:
                    waiting.follows = save.copy.seq
                continue
            self._stored.pop(key, None)
            if isinstance(result, NoScriptError):
                self._save_sha = ""  # the server restarted: it has to be told the script anew
            elif isinstance(result, Exception):
                self.failures += 1
            if waiting is not None:
                waiting.follows = -1  # what it was to follow is not there
            elif key not in self._pending and (result == -1 or not self._save_sha):
                self._pending[key] = _Save(save.copy, -1, 0)

    # The wire

    async def write_tails(self, tails: Sequence[tuple[str, int, bytes]]) -> bool:
        if not self.available:
            return False
        try:
            pipe = self._redis.pipeline(transaction=False)
            for key, offset, text in tails:
                if offset == 0:
                    pipe.set(f"ar:tail:{key}", text, ex=_TAIL_TTL_S)
                else:
                    # Not APPEND: what a server did behind a timeout is done again.
                    pipe.strlen(f"ar:tail:{key}")
                    pipe.setrange(f"ar:tail:{key}", offset, text)
            results = iter(await pipe.execute())
        except _FAILURES:
            self._failed()
            return False
        # A server that came back empty has a hole in front of what it was given.
        whole = True
        for _, offset, _ in tails:
            if offset:
                whole = next(results) >= offset and whole
            next(results)
        return whole

    async def read_tail(self, key: str) -> bytes | None:
        deadline = self._clock.monotonic() + _TAIL_PATIENCE_S
        while True:
            try:
                text: bytes | None = await self._redis.get(f"ar:tail:{key}")
                break
            except _FAILURES:
                self._failed()
                # What clients were shown must not be forgotten for one answer that came late.
                if self._clock.monotonic() >= deadline:
                    return None
                await asyncio.sleep(_RETRY_PAUSE_S)
        # SETRANGE fills what it skips with zeros: a hole is where the server lost a part.
        return None if text is None or b"\0" in text else text

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        if not messages or not self.available:
            return
        try:
            pipe = self._redis.pipeline(transaction=False)
            for owner, message in messages:
                pipe.publish(f"ar:owner:{owner}", message)
            await pipe.execute()
        except _FAILURES:
            self._failed()

    async def listen(self, owner: str) -> AsyncIterator[bytes]:
        while True:
            pubsub = self._subscriber.pubsub(ignore_subscribe_messages=True)
            try:
                await pubsub.subscribe(f"ar:owner:{owner}")
                async for message in pubsub.listen():
                    yield message["data"]
            except _FAILURES:
                self._failed()
                await asyncio.sleep(_RETRY_PAUSE_S)
            finally:
                await pubsub.aclose()

    # Calls that wait for a tool worker

    async def put_waiting(
        self, tenant: str, session_id: str, call_id: str, place: bytes | None
    ) -> None:
        """Note the place of a call, or with None that it waits no longer."""
        key = f"ar:wait:{tenant}/{session_id}"
        with contextlib.suppress(*_FAILURES):
            if place is None:
                await cast("Awaitable[int]", self._redis.hdel(key, call_id))
                return
            async with self._redis.pipeline(transaction=False) as both:
                both.hset(key, call_id, place)  # pyright: ignore[reportArgumentType]
                both.expire(key, _WAITING_TTL_S)
                await both.execute()

    async def waiting(self, tenant: str, session_id: str) -> list[bytes]:
        """Return the places of a session's calls."""
        if not self.available:
            return []
        try:
            key = f"ar:wait:{tenant}/{session_id}"
            return await cast("Awaitable[list[bytes]]", self._redis.hvals(key))
        except _FAILURES:
            self._failed()
            return []

    # Hints for the router of Python handles

    async def hint_owner(self, tenant: str, session_id: str, replica: str) -> None:
        """Note which replica owns a session."""
        with contextlib.suppress(*_FAILURES):
            await self._redis.set(f"ar:own:{tenant}/{session_id}", replica, ex=86_400)

    async def owner_hint(self, tenant: str, session_id: str) -> str | None:
        """Return the replica that is thought to own a session."""
        if not self.available:
            return None
        try:
            value: bytes | None = await self._redis.get(f"ar:own:{tenant}/{session_id}")
        except _FAILURES:
            self._failed()
            return None
        return value.decode() if value else None

    # Metrics of all hosts

    async def post_metrics(self, host: str, page: bytes, *, ttl_s: float) -> None:
        """Leave a host's metrics where the others find them."""
        if not self.available:
            return
        try:
            await self._redis.set(f"ar:metrics:{host}", page, px=int(ttl_s * 1000))
        except _FAILURES:
            self._failed()

    async def read_metrics(self) -> dict[str, bytes]:
        """Return the metrics that hosts left, by host; nothing while Redis is away."""
        if not self.available:
            return {}
        try:
            names: list[bytes] = [
                name async for name in self._redis.scan_iter("ar:metrics:*", count=1_000)
            ]
            pages: list[bytes | None] = await self._redis.mget(names) if names else []
        except _FAILURES:
            self._failed()
            return {}
        return {
            name.decode().rsplit(":", 1)[1]: page
            for name, page in zip(names, pages, strict=True)
            if page is not None
        }
