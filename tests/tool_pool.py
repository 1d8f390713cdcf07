"""A pool of tool workers for tests: real actors, and runners that wait and note what they ran."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec

from agentray.config.settings import Settings
from agentray.tools.runner import Ask, Runner
from agentray.tools.spec import ToolResult

__all__ = ["ROOT", "Pool", "WaitingRunner", "ask", "open_waiting", "running_pool"]

ROOT = Path(__file__).parents[1]


class Waits(msgspec.Struct):
    """Arguments: wait so long, and write a line to the file when it begins and when it ends."""

    wait_s: float = 0.0
    file: str = ""
    output: str = ""


class WaitingRunner:
    """Occupies its slot as long as the arguments say."""

    async def run(self, call: Ask) -> ToolResult:
        waits = msgspec.json.decode(call.arguments, type=Waits)
        _note(waits.file, f"begun {call.call_key} {os.getpid()}")
        try:
            if waits.wait_s:
                await asyncio.sleep(waits.wait_s)
        except asyncio.CancelledError:
            _note(waits.file, f"killed {call.call_key} {os.getpid()}")
            raise
        _note(waits.file, f"ended {call.call_key} {os.getpid()}")
        return ToolResult("ok", waits.output or call.call_key)

    async def close(self) -> None:
        pass


def _note(file: str, line: str) -> None:
    if file:
        # One write to a file opened for appending is whole, whoever else writes.
        with Path(file).open("ab", buffering=0) as notes:
            notes.write(f"{line}\n".encode())


async def open_waiting(count: int) -> Sequence[Runner]:
    """Open runners that wait."""
    return [WaitingRunner() for _ in range(count)]


def ask(key: str, *, tenant: str = "acme", session: str = "s", epoch: int = 1, **given: Any) -> Ask:
    """Return a call of a tool; what is not a field of it is an argument of the runner."""
    fields = {name: given.pop(name) for name in list(given) if name in Ask.__struct_fields__}
    fields.setdefault("tool", "wait")
    return Ask(tenant, session, epoch, key, arguments=msgspec.json.encode(given), **fields)


class Pool:
    """The actors of a pool, to be looked at and killed."""

    def pid(self, name: str) -> int:
        """Return the process of an actor."""
        ray = _ray()
        from agentray.tools.worker import NAMESPACE

        return ray.get(ray.get_actor(name, namespace=NAMESPACE).pid.remote(), timeout=60)

    def workers(self) -> list[str]:
        """Return the names of the workers' actors."""
        from agentray.tools.scheduler import worker_names

        return worker_names()

    def connected(self) -> int:
        """Return how many workers are registered with the scheduler."""
        ray = _ray()
        from agentray.tools.worker import NAMESPACE, SCHEDULER

        actor = ray.get_actor(SCHEDULER, namespace=NAMESPACE)
        return ray.get(actor.workers.remote(), timeout=60)


@contextmanager
def running_pool(settings: Settings, **how: Any) -> Iterator[Pool]:
    """Run a pool on the cluster that this process is connected to."""
    from agentray.tools.scheduler import end_pool, start_pool

    how.setdefault("open_runners", open_waiting)
    start_pool(settings, alone=True, **how)
    pool = Pool()
    least = settings.tools.workers.min or 1
    deadline = time.monotonic() + 60
    while pool.connected() < least:
        assert time.monotonic() < deadline, "not all workers came"
        time.sleep(0.05)
    try:
        yield pool
    finally:
        end_pool()


def _ray() -> Any:
    import ray

    return cast(Any, ray)
