"""Run model servers, each a process of its own, and let one die whenever enough turns went by."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.model_server import Counts, read_counts, server_command
from benchmarks.system import free_port, running

__all__ = ["Deaths", "ModelServer"]

_CUT, _EARLY, _KILLED = "streams cut", "cut before the first token", "killed"
_KINDS = {_CUT: 7, _EARLY: 2, _KILLED: 2}
"""How one dies, and how often it is that way."""
_DOWN_S = (0.2, 0.8)


class ModelServer:
    """A model server that can be killed and started again, at the same port."""

    def __init__(self, name: str, folder: Path, *, tps: float, ttft_ms: float) -> None:
        self.name = name
        self.port = free_port()
        self._counts_file = folder / f"{name}.counts"
        self._command = server_command(
            sys.executable, self.port, self._counts_file, tps=tps, ttft_ms=ttft_ms
        )
        self._stack = AsyncExitStack()
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def counts(self) -> Counts:
        return read_counts(self._counts_file)

    async def __aenter__(self) -> ModelServer:
        program = running(*self._command, port=self.port)
        self.process = await self._stack.enter_async_context(program)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process = None
        await self._stack.aclose()

    async def kill(self, down_s: float) -> None:
        """Kill the process, and start another one after a while."""
        process, self.process = self.process, None
        assert process is not None
        process.kill()
        await process.wait()
        await asyncio.sleep(down_s)
        await self._stack.aclose()
        await self.__aenter__()


class Deaths:
    """Lets servers die: the more streams one has open, the likelier it is the next one.

    Between two deaths lie ``every`` turns, at least and at most; a process that was killed may
    still be away at the next death. ``happened`` counts them by how it was.
    """

    def __init__(
        self, servers: list[ModelServer], rng: random.Random, every: tuple[int, int]
    ) -> None:
        self._servers = servers
        self._rng = rng
        self._every = every
        self._left = rng.randint(*every)
        self._due = asyncio.Event()
        self._over = False
        self.happened: Counter[str] = Counter()

    def turn_ended(self) -> None:
        """Count a turn towards the next death."""
        self._left -= 1
        if self._left <= 0:
            self._due.set()

    def stop(self) -> None:
        """Let none die any more; ``run`` returns when all of them are back."""
        self._over = True
        self._due.set()

    async def run(self) -> None:
        """Let them die until stopped."""
        async with asyncio.TaskGroup() as restarts:
            while True:
                await self._due.wait()
                self._due.clear()
                # At any moment of the turns under way, not at the one at which a turn ended.
                await asyncio.sleep(self._rng.uniform(0.0, 0.25))
                if self._over:
                    return
                alive = [server for server in self._servers if server.process is not None]
                weights = [server.counts.open for server in alive]
                if any(weights):
                    self._die(self._rng.choices(alive, weights)[0], restarts)
                self._left = self._rng.randint(*self._every)

    def _die(self, server: ModelServer, restarts: asyncio.TaskGroup) -> None:
        kind = self._rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        self.happened[f"{server.name}: {kind}"] += 1
        if kind == _KILLED:
            restarts.create_task(server.kill(self._rng.uniform(*_DOWN_S)))
            return
        assert server.process is not None
        server.process.send_signal(signal.SIGUSR2 if kind == _EARLY else signal.SIGUSR1)
