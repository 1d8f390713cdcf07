"""Read what a child writes, up to a limit, without blocking and without keeping more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

__all__ = ["Drain"]

_PART_BYTES = 64 * 1024


class Drain:
    """One end of a pipe or socket: reads it whenever there is something, keeps ``most`` bytes.

    What comes past that is read, counted in ``total`` and dropped, so that the writer goes on.
    ``listener`` is called after each read, and at the end.
    """

    __slots__ = (
        "_loop",
        "_watched",
        "closed",
        "content",
        "descriptor",
        "listener",
        "most",
        "total",
    )

    def __init__(self, descriptor: int, *, at_once: bool = True) -> None:
        self._loop = asyncio.get_running_loop()
        self.listener: Callable[[], None] | None = None
        # By all who had the other end, or by this side.
        self.closed = False
        self.descriptor = descriptor
        self.content = bytearray()
        self.most = 0
        self.total = 0
        os.set_blocking(descriptor, False)
        if at_once:
            self.watch()
        else:
            self._watched = False

    def watch(self) -> None:
        """Read from now on whenever there is something; before, only when asked to."""
        self._watched = True
        self._loop.add_reader(self.descriptor, self._readable)

    def read(self) -> bool:
        """Read one part; return whether there may be more right now."""
        if self.closed:
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

    def release(self) -> int:
        """Leave the descriptor, which is the caller's from now on."""
        self.closed = True
        if self._watched:
            self._loop.remove_reader(self.descriptor)
        return self.descriptor

    def close(self) -> None:
        """Close this end."""
        if not self.closed:
            self.closed = True
            if self._watched:
                self._loop.remove_reader(self.descriptor)
            # Whoever waits to write to it: the loop must not know a number that others get.
            self._loop.remove_writer(self.descriptor)
            os.close(self.descriptor)

    def _readable(self) -> None:
        self.read()
        if self.listener is not None:
            self.listener()
