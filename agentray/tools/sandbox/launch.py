"""Start long-lived programs in a jail and speak to them over their standard input and output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from io import FileIO

from agentray.errors import SandboxUnavailableError
from agentray.tools.sandbox.base import Limits
from agentray.tools.sandbox.jail import JailSlot
from agentray.tools.sandbox.opening import open_jail
from agentray.tools.sandbox.supervisor import Child

__all__ = ["JailLauncher", "Launched"]

_GONE_S = 5.0
_LINE_BYTES = 16 * 1024 * 1024
# Names are looked up as the machine does it.
_RESOLVER = ("/etc/resolv.conf",)
_LIMITS = Limits(wall_s=0.0, cpu_s=86_400.0, memory_bytes=1024 * 1024 * 1024, pids=128)


class Launched:
    """A running program, alone in a jail of its own."""

    def __init__(
        self,
        slot: JailSlot,
        child: Child,
        stdin: asyncio.StreamWriter,
        stdout: asyncio.StreamReader,
    ) -> None:
        self._slot = slot
        self._child = child
        self.stdin = stdin
        self.stdout = stdout

    async def wait(self) -> int:
        """Return the exit code, negative for a signal, once the program has ended."""
        ended = await asyncio.shield(self._child.over)
        return -9 if ended is None else os.waitstatus_to_exitcode(ended.status)

    async def kill(self) -> None:
        """End it and what it started, at once; returns when it is gone. Can be called again."""
        self._child.kill()
        await asyncio.wait([self._child.over], timeout=_GONE_S)
        self.stdin.close()
        self._child.close()
        await self._slot.close()


class JailLauncher:
    """Starts each program in a jail of its own.

    ``paths`` are folders that are there read-only, at the same place; ``network`` gives programs
    the machine's network, of which they have none otherwise. There is no limit of wall time.
    """

    def __init__(
        self,
        *,
        paths: Sequence[str] = (),
        network: bool = False,
        limits: Limits = _LIMITS,
        cpu_share: float = 1.0,
    ) -> None:
        self._paths = tuple(paths)
        self._network = network
        self._limits = limits
        self._cpu_share = cpu_share

    async def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Launched:
        """Start a program with ``env`` as all that is given to its environment.

        Raises:
            OSError: it cannot be started.
        """
        try:
            slot = await open_jail(
                ceiling=self._limits,
                parked=False,
                paths=(*self._paths, *(_RESOLVER if self._network else ())),
                cpu_share=self._cpu_share,
                network=self._network,
            )
        except SandboxUnavailableError as error:
            raise OSError(str(error)) from error
        try:
            with contextlib.ExitStack() as held:
                child, stdin, stdout = await slot.launch(argv, {**slot.environment, **env})
                held.callback(child.close)
                inward = held.enter_context(socket.socket(fileno=stdin))
                outward = held.enter_context(os.fdopen(stdout, "rb", 0))
                writer = await _writer(inward)
                held.callback(writer.close)
                launched = Launched(slot, child, writer, await _reader(outward))
                held.pop_all()
            return launched
        except SandboxUnavailableError as error:
            await slot.close()
            raise OSError(str(error)) from error
        except BaseException:
            await slot.close()
            raise


async def _writer(inward: socket.socket) -> asyncio.StreamWriter:
    # It has both ways, as a socket, so that it can be written to by a stream; what is read from
    # it is nothing.
    inward.setblocking(False)
    return (await asyncio.open_unix_connection(sock=inward))[1]


async def _reader(file: FileIO) -> asyncio.StreamReader:
    found = asyncio.StreamReader(limit=_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(found), file)
    return found
