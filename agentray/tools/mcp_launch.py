"""Start a program that is spoken to over its standard input and output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["Launcher", "ProcessLauncher", "Started"]

_GONE_S = 5.0
_CHUNK_BYTES = 64 * 1024
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")


class Started(Protocol):
    """A running program. Ending it is up to whoever had it started."""

    @property
    def stdin(self) -> asyncio.StreamWriter: ...

    @property
    def stdout(self) -> asyncio.StreamReader: ...

    async def wait(self) -> int:
        """Return the exit code, negative for a signal, once the program has ended."""
        ...

    async def kill(self) -> None:
        """End it and what it started, at once; returns when it is gone. Can be called again."""
        ...


class Launcher(Protocol):
    """Starts programs somewhere: in a jail, or as plain processes."""

    async def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Started:
        """Start a program with ``env`` as all that is given to its environment.

        Raises:
            OSError: it cannot be started.
        """
        ...


class _Process:
    """A child with a process group of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self.stdin = process.stdin
        self.stdout = process.stdout

    async def wait(self) -> int:
        return await self._process.wait()

    async def kill(self) -> None:
        # The group may outlive its first process.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GONE_S):
                # A pipe that is not read to its end keeps the process from being over.
                while await self.stdout.read(_CHUNK_BYTES):
                    pass
                await self._process.wait()


class ProcessLauncher:
    """Starts plain processes, for operators who trust what they run: nothing contains them.

    A child that leaves its process group outlives ``kill``.
    """

    async def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Started:
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            *argv,
            env={**kept, **env},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        return _Process(process)
