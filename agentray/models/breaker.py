"""Leave a model alone that fails, and let one call at a time find out whether it is back: pure.

The circuit breaker of Nygard's "Release It!": closed, it lets everything through and counts; it
opens when the share of failed calls in a window is too large; after a while it lets one probe
through, whose outcome closes it or opens it again. Times are passed in, in seconds of one clock.
"""

from __future__ import annotations

from agentray.config.settings import BreakerSettings

__all__ = ["Breaker"]

# Each time a probe fails in a row, the wait doubles, up to this many times.
_MOST_DOUBLINGS = 4


class Breaker:
    """The breaker of one model at one endpoint.

    Whoever calls asks ``wait_s`` first, says ``begun``, which tells whether the call is a probe,
    and then exactly one of ``succeeded``, ``failed``, ``limited`` or ``left`` with what it told.
    """

    __slots__ = (
        "_calls",
        "_failed",
        "_open_since",
        "_past",
        "_probing",
        "_settings",
        "_tries",
        "_until",
        "_window_since",
        "reason",
    )

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        # Nothing may be called before this time; 0 while it is closed and no limit is in force.
        self._until = 0.0
        self._open_since: float | None = None
        self._probing = False
        self._tries = 0
        self._calls = self._failed = 0
        # What the half window before this one had: the share is taken over both.
        self._past = (0, 0)
        self._window_since = 0.0
        self.reason = ""
        """Why it is open, or what the last failure was."""

    @property
    def opened(self) -> bool:
        """Whether it is open: calls are refused, but for one probe at a time."""
        return self._open_since is not None

    def wait_s(self, now: float) -> float:
        """Return the time after which a call may be made; 0 for now, and that a probe may."""
        if not self._until:
            return 0.0
        if now < self._until:
            return self._until - now
        if self._open_since is None:
            self._until = 0.0
            return 0.0
        return self._settings.open_s if self._probing else 0.0

    def begun(self) -> bool:
        """A call is made; return whether it is the probe of an open breaker."""
        if self._open_since is None or self._probing:
            return False
        self._probing = True
        return True

    def succeeded(self, now: float, *, probe: bool) -> None:
        """A call was answered: a probe closes the breaker."""
        if self._open_since is None:
            self._count(now, failed=False)
        elif probe:
            self._close()

    def failed(self, now: float, reason: str, *, probe: bool) -> None:
        """A call failed: 5xx, unreachable, stalled, broken off, or answered with nothing."""
        if self._open_since is not None:
            # Calls that had begun before it opened say nothing new.
            if probe:
                self.reason = reason
                self._open(now)
            return
        self.reason = reason
        self._count(now, failed=True)
        calls, failed = self._calls + self._past[0], self._failed + self._past[1]
        if calls >= self._settings.min_calls and failed >= self._settings.failure_share * calls:
            self._open(now)

    def limited(self, now: float, retry_after_s: float, *, probe: bool) -> None:
        """A call was answered 429: a gate until then, and no fault of the model's."""
        self._until = max(self._until, now + retry_after_s)
        if probe:
            self._close(until=self._until)

    def left(self, *, probe: bool) -> None:
        """The caller gave up: that says nothing of the model."""
        if probe:
            self._probing = False

    def _open(self, now: float) -> None:
        self._open_since = now
        self._probing = False
        wait_s = self._settings.open_s * 2 ** min(self._tries, _MOST_DOUBLINGS)
        # A limit that is in force stays so.
        self._until = max(self._until, now + wait_s)
        self._tries += 1

    def _close(self, *, until: float = 0.0) -> None:
        self._open_since = None
        self._probing = False
        self._until = until
        self._tries = 0
        self._calls = self._failed = 0
        self._past = (0, 0)

    def _count(self, now: float, *, failed: bool) -> None:
        half_s = self._settings.window_s / 2
        if now - self._window_since >= half_s:
            fresh = now - self._window_since < 2 * half_s
            self._past = (self._calls, self._failed) if fresh else (0, 0)
            self._calls = self._failed = 0
            self._window_since = now
        self._calls += 1
        self._failed += failed
