"""Jails for the tests: whole ones, and ones that lack a defence, which only tests can open."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
    slot = await open_jail(ceiling=CEILING, without=without)
    try:
        yield slot
    finally:
        await slot.close()


class Jails:
    """Jails that lack a defence, opened once for all controls that need the same one."""

    def __init__(self) -> None:
        self._open: dict[frozenset[str], Slot] = {}

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
