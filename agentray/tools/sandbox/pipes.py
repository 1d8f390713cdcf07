"""Read what a run prints, up to a limit, without blocking and without keeping more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

__all__ = ["Drain"]

_PART_BYTES = 64 * 1024


class Drain:
    """One end of a pipe or socket: reads it whenever there is something, keeps ``most`` bytes.

    What comes past that is read and dropped, so that the writer goes on; ``flooded`` is called
    when ``enough`` bytes have come. ``closed`` is called once at the end.
    """

    __slots__ = ("_closed", "_loop", "_on_data", "content", "descriptor", "enough", "most", "total")

    def __init__(
        self,
        descriptor: int,
        on_data: Callable[[], None],
        *,
        most: int = 0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_data = on_data
        self._closed = False
        self.descriptor = descriptor
        self.content = bytearray()
        self.most = most
        self.total = 0
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._readable)

    @property
    def closed(self) -> bool:
        """Whether the other end is closed by all who had it."""
        return self._closed

    def read(self) -> bool:
        """Read one part; return whether there may be more right now."""
        if self._closed:
            return False
        try:
            part = os.read(self.descriptor, _PART_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        if not part:
            self.close()
            return False
        self.total += len(part)
        room = self.most - len(self.content)
        if room > 0:
            self.content += part[:room]
        return True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self.descriptor)
            os.close(self.descriptor)

    def _readable(self) -> None:
        self.read()
        self._on_data()
