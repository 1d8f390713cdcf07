"""Answers of models and tools on Redis, bounded in age and size, and marks of calls under way."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from agentray.clock import Clock
from agentray.config.settings import CacheSettings, RedisSettings
from agentray.errors import StorageUnavailableError
from agentray.storage.base import FlightBegun

__all__ = ["RedisAnswers"]

_FAILURES = (RedisError, OSError, TimeoutError)
_RETRY_PAUSE_S = 0.5
# Answers come in bursts, and hundreds of connections take longer to open than to wait for.
_CONNECTIONS = 8

# Braces keep all of it in one slot of a Redis cluster: one script has to see the whole, or the
# bound would be one for each slot. The name is the store's.
_BODIES = "ar:{%s}:bodies"  # hash: key -> answer
_AGES = "ar:{%s}:ages"  # sorted set: key -> milliseconds at which it was stored
_TOTAL = "ar:{%s}:total"  # bytes of all answers and their keys
_FLIGHTS = "ar:{%s}:flight:"

# KEYS: bodies, ages, the flight's mark. ARGV: key, flight, its term in ms, an answer's age in ms.
_BEGIN = """
local body = redis.call('HGET', KEYS[1], ARGV[1])
if body then
  local stored = tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or 0)
  local time = redis.call('TIME')
  if time[1] * 1000 + math.floor(time[2] / 1000) - stored < tonumber(ARGV[4]) then
    return {'answer', body}
  end
end
if redis.call('SET', KEYS[3], ARGV[2], 'NX', 'PX', ARGV[3]) then return {'leads'} end
local mark = redis.call('GET', KEYS[3])
-- The client may say a thing twice, if the first acknowledgement was lost.
if mark == ARGV[2] then return {'leads'} end
return {mark == 'alone' and 'alone' or 'waits'}
"""

# KEYS: the flight's mark. ARGV: flight, its term in ms.
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS: the flight's mark. ARGV: flight, time in ms for which others are told to call alone.
_END = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if tonumber(ARGV[2]) > 0 then
  redis.call('SET', KEYS[1], 'alone', 'PX', ARGV[2])
else
  redis.call('DEL', KEYS[1])
end
return 1
"""

# KEYS: bodies, ages, total, the flight's mark. ARGV: key, flight, answer, an answer's age in ms,
# the bound in bytes.
_PUT = """
if redis.call('GET', KEYS[4]) == ARGV[2] then redis.call('DEL', KEYS[4]) end
local time = redis.call('TIME')
local now, age = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[4])
local size, bound = #ARGV[3] + #ARGV[1], tonumber(ARGV[5])
local count = redis.call('ZCARD', KEYS[2])
local total = tonumber(redis.call('GET', KEYS[3]) or 0)
-- A server short of memory may have evicted one of the three: what is left cannot be counted.
if count ~= redis.call('HLEN', KEYS[1]) or (count == 0) ~= (total == 0) then
  redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
  count, total = 0, 0
end
local function drop(key)
  total = total - redis.call('HSTRLEN', KEYS[1], key) - #key
  redis.call('HDEL', KEYS[1], key)
  count = count - redis.call('ZREM', KEYS[2], key)
end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then drop(ARGV[1]) end
if size <= bound then
  local swept = 0
  while count > 0 do
    local oldest = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
    -- Each put brings one: to sweep some is to keep up, to sweep all at once could take long.
    local expired = now - tonumber(oldest[2]) >= age and swept < 100
    if not expired and total + size <= bound then break end
    drop(oldest[1])
    swept = swept + 1
  end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
  redis.call('ZADD', KEYS[2], now, ARGV[1])
  total = total + size
end
redis.call('SET', KEYS[3], string.format('%.0f', total))
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ARGV[4]) end
return 1
"""


class RedisAnswers:
    """``AnswerStore`` and ``ResultStore`` on a Redis server; ``name`` tells stores apart.

    No answer is older than ``cache.ttl_s`` when it is given, and all together never have more
    than ``cache.max_bytes``, keys included, however many hosts write: one script does both, by
    the server's clock. Nothing takes longer than ``redis.timeout_s``; after a failure nothing is
    tried for half a second, so that a server that is away costs its callers nothing.
    """

    def __init__(
        self,
        url: str,
        redis: RedisSettings,
        cache: CacheSettings,
        *,
        clock: Clock,
        name: str = "answers",
    ) -> None:
        self._bodies, self._ages, self._total, self._flights = (
            key % name for key in (_BODIES, _AGES, _TOTAL, _FLIGHTS)
        )
        self._timeout_s = redis.timeout_s
        self._cache = cache
        self._clock = clock
        pool = cast(Any, BlockingConnectionPool).from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=redis.timeout_s,
            socket_timeout=redis.timeout_s,
            socket_connect_timeout=redis.timeout_s,
            protocol=3,
        )
        self._redis: Any = cast(Any, Redis).from_pool(pool)
        self._begin = self._redis.register_script(_BEGIN)
        self._renew = self._redis.register_script(_RENEW)
        self._end = self._redis.register_script(_END)
        self._put = self._redis.register_script(_PUT)
        self._retry_at = 0.0
        self.failures = 0

    async def close(self) -> None:
        await self._redis.aclose()

    async def begin_flight(
        self, key: str, flight: str, *, term_s: float, age_s: float | None = None
    ) -> FlightBegun:
        age_s = min(age_s or self._cache.ttl_s, self._cache.ttl_s)
        found = await self._run(
            self._begin,
            [self._bodies, self._ages, self._flights + key],
            [key, flight, _ms(term_s), _ms(age_s)],
        )
        outcome: Any = found[0].decode()
        return FlightBegun(outcome, found[1] if outcome == "answer" else b"")

    async def renew_flight(self, key: str, flight: str, *, term_s: float) -> bool:
        return bool(await self._run(self._renew, [self._flights + key], [flight, _ms(term_s)]))

    async def put(self, key: str, flight: str, answer: bytes) -> None:
        await self._run(
            self._put,
            [self._bodies, self._ages, self._total, self._flights + key],
            [key, flight, answer, _ms(self._cache.ttl_s), self._cache.max_bytes],
        )

    async def end_flight(self, key: str, flight: str, *, alone_s: float = 0.0) -> None:
        alone_ms = _ms(alone_s) if alone_s else 0
        await self._run(self._end, [self._flights + key], [flight, alone_ms])

    async def _run(self, script: Any, keys: list[str], arguments: list[Any]) -> Any:
        if self._clock.monotonic() < self._retry_at:
            raise StorageUnavailableError("Redis was away a moment ago")
        try:
            # The client's own limits are for one read each, and it may try more than once.
            async with asyncio.timeout(self._timeout_s):
                return await script(keys, arguments)
        except _FAILURES as error:
            self.failures += 1
            self._retry_at = self._clock.monotonic() + _RETRY_PAUSE_S
            shown = str(error) or type(error).__name__
            raise StorageUnavailableError(f"Redis: {shown}") from error


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
