"""Judge what an MCP server sends before anything is built of it, and end one that floods: pure."""

from __future__ import annotations

import msgspec

from agentray.errors import ToolError

__all__ = ["FloodError", "Inbound"]

# What nobody asked for: so many at once, and so many a second for ever. Bytes count too.
_BURST = 2_000.0
_PER_S = 200.0
_BYTES_EACH = 4096
# Other notifications, such as logs and progress, are not heeded, and so not even parsed.
_HEEDED = frozenset(
    {
        "notifications/tools/list_changed",
        "notifications/subscriptions/acknowledged",
        "notifications/cancelled",
    }
)


class FloodError(ToolError):
    """A server sends more than it may."""


class _Envelope(msgspec.Struct):
    id: int | str | None = None
    method: str | None = None


_decoder = msgspec.json.Decoder(_Envelope)


class Inbound:
    """The judge of one connection's messages. Times are passed in, in seconds."""

    def __init__(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self._asked: set[str] = set()
        self._left = _BURST
        self._at = 0.0

    def asked(self, request_id: int | str) -> None:
        """A request goes out: one answer to it is wanted."""
        self._asked.add(str(request_id))

    def gave_up(self, request_id: object) -> None:
        """An answer is no longer wanted."""
        self._asked.discard(str(request_id))

    def wanted(self, line: bytes | bytearray | memoryview, now: float) -> bool:
        """Return whether a message is to be handed on.

        Raises:
            FloodError: this was one too many, or too large.
        """
        size = len(line)
        self.check_size(size)
        try:
            found = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # Many print to their standard output what belongs elsewhere.
            self._spend(size, now)
            return False
        if found.method is None and found.id is not None and str(found.id) in self._asked:
            self._asked.discard(str(found.id))
            return True
        self._spend(size, now)
        if found.method is None:
            return False
        # Requests are answered, with a refusal.
        return found.id is not None or found.method in _HEEDED

    def check_size(self, size_bytes: int) -> None:
        """See that a message, or the part of one that has come so far, is not too large.

        Raises:
            FloodError: it is.
        """
        if size_bytes > self.max_message_bytes:
            raise FloodError(f"it sent a message of more than {self.max_message_bytes} bytes")

    def _spend(self, size_bytes: int, now: float) -> None:
        self._left = min(_BURST, self._left + (now - self._at) * _PER_S)
        self._at = now
        self._left -= 1 + size_bytes // _BYTES_EACH
        if self._left < 0:
            raise FloodError("it sent too much that nobody had asked for")
