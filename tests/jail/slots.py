"""Jails for the tests: whole ones, and ones that lack a defence, which only tests can open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from agentray.tools.sandbox.base import Limits, Outcome, PythonCode, Run, Slot
from agentray.tools.sandbox.opening import open_jail
from tests.jail.attack import BRIEF

__all__ = ["Jails", "opened_jail"]

CEILING = Limits(
    wall_s=20.0,
    cpu_s=10.0,
    memory_bytes=256 * 1024 * 1024,
    pids=16,
    open_files=64,
    scratch_bytes=64 * 1024 * 1024,
    scratch_files=200,
    output_bytes=64 * 1024,
)


@asynccontextmanager
async def opened_jail(without: frozenset[str] = frozenset()) -> AsyncIterator[Slot]:
    """Open a jail; ``without`` names the defences that it is to leave off."""
    before = orphans()
    slot = await open_jail(ceiling=CEILING, without=without)
    try:
        yield slot
    finally:
        await slot.close()
    await none_but(before)


def orphans() -> set[int]:
    """Return the processes of zygotes and their children that have nobody any more."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            if not entry.name.isdigit():
                continue
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            named = b"agentray.tools.sandbox.zygote" in (entry / "cmdline").read_bytes()
            if named and parent == "1" and state != "Z":
                found.add(int(entry.name))
    return found


async def none_but(before: set[int]) -> None:
    """Assert that a closed jail leaves no process on the machine, one without a defence neither."""
    deadline = time.monotonic() + 5
    while left := orphans() - before:
        assert time.monotonic() < deadline, f"still there: {left}"
        await asyncio.sleep(0.005)


class Jails:
    """Jails that lack a defence, opened once for all controls that need the same one."""

    def __init__(self) -> None:
        self._open: dict[frozenset[str], Slot] = {}
        self._before = orphans()

    async def run(self, run: Run, *, without: frozenset[str]) -> Outcome:
        slot = self._open.get(without)
        if slot is None:
            slot = await open_jail(ceiling=CEILING, without=without)
            self._open[without] = slot
        outcome = await slot.run(run)
        # An attack that worked may have broken the place for the next one.
        after = await slot.run(Run(PythonCode("print(1)"), BRIEF))
        if after.stdout != b"1\n":
            await self._open.pop(without).close()
        return outcome

    async def close(self) -> None:
        while self._open:
            await self._open.popitem()[1].close()
        await none_but(self._before)
