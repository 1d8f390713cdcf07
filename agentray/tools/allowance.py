"""Count requests and bytes of tenants against rates and daily bounds: pure, times are passed in."""

from __future__ import annotations

__all__ = ["Bucket", "DailyBytes", "TenantBuckets"]

_DAY_S = 86_400
_MOST_BUCKETS = 10_000


class Bucket:
    """A token bucket that may be overdrawn: whoever takes more than there is waits for it.

    ``rate`` is what comes back per second, ``burst`` is the most that it holds.
    """

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at = now

    def take(self, amount: float, now: float) -> float:
        """Take an amount, and return the seconds after which it is there."""
        self._level = self._filled(now) - amount
        self._at = now
        return max(0.0, -self._level / self.rate)

    def give_back(self, amount: float, now: float) -> None:
        """Return what was taken and not used."""
        self._level = min(self.burst, self._filled(now) + amount)
        self._at = now

    def full(self, now: float) -> bool:
        return self._filled(now) >= self.burst

    def _filled(self, now: float) -> float:
        return min(self.burst, self._level + (now - self._at) * self.rate)


class TenantBuckets:
    """A bucket for each key that is seen; those that are full are forgotten when there are many."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[tuple[str, ...], Bucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def get(self, key: tuple[str, ...], now: float) -> Bucket:
        found = self._buckets.get(key)
        if found is None:
            if len(self._buckets) >= _MOST_BUCKETS:
                kept = {key: one for key, one in self._buckets.items() if not one.full(now)}
                self._buckets = kept
            found = self._buckets[key] = Bucket(self._rate, self._burst, now)
        return found


class DailyBytes:
    """The bytes of each tenant in a day of UTC; ``now`` is wall-clock time."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._day = 0
        self._used: dict[str, int] = {}

    def left(self, tenant: str, now: float) -> int:
        self._turn(now)
        return max(0, int(self._most) - self._used.get(tenant, 0))

    def add(self, tenant: str, size_bytes: int, now: float) -> None:
        self._turn(now)
        self._used[tenant] = self._used.get(tenant, 0) + size_bytes

    def _turn(self, now: float) -> None:
        day = int(now // _DAY_S)
        if day != self._day:
            self._day = day
            self._used.clear()
