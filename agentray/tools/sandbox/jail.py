"""Run programs in a jail: the supervisor's side of a slot, its zygote and its parked children."""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import math
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from agentray.errors import SandboxUnavailableError, ToolError
from agentray.tools.sandbox import scratch, serving
from agentray.tools.sandbox.attempt import Attempt
from agentray.tools.sandbox.base import (
    FunctionCall,
    Limits,
    Outcome,
    PythonCode,
    Run,
    Start,
    Tier,
)
from agentray.tools.sandbox.cgroups import Cgroup
from agentray.tools.sandbox.supervisor import Child, Zygote
from agentray.tools.sandbox.uids import UidLease

__all__ = ["JailSlot"]

_RLIMITS = {
    "cpu": "CPU",
    "memory": "AS",
    "rlimit_fsize": "FSIZE",
    "rlimit_nofile": "NOFILE",
    "pids": "NPROC",
}
# What inits and parked children take of a slot's memory beside its zygote.
_OWN_BYTES = 24 * 1024 * 1024


class JailSlot:
    """A slot whose runs are children of a zygote: in namespaces and without rights, or plain.

    See ``docs/decisions/0106-jail.md``.
    """

    def __init__(
        self,
        zygote: Zygote,
        *,
        tier: Tier,
        ceiling: Limits,
        parked: int,
        cgroup: Cgroup | None,
        lease: UidLease | None = None,
        folder: str = "",
        proxied: bool = False,
        listener: socket.socket | None = None,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self._zygote = zygote
        self._tier: Tier = tier
        self._ceiling = ceiling
        self._wanted = parked
        self._cgroup = cgroup
        self._lease = lease
        self._folder = folder
        self._proxied = proxied
        # Where its zygote, which has the machine's network, has none.
        self._listener = listener
        self._without = without
        self._counts_memory = cgroup is not None and "memory" in cgroup.quotas
        self._sizes = self._sizes_of(ceiling)
        self._parked: list[Child] = []
        self._parking: set[asyncio.Task[None]] = set()
        self._running = False
        self._closed = False

    @property
    def tier(self) -> Tier:
        return self._tier

    @property
    def environment(self) -> dict[str, str]:
        """What programs have as their environment."""
        return self._zygote.environment

    async def start(self) -> None:
        """Start its zygote.

        Raises:
            SandboxUnavailableError: if it cannot be; the message says what failed.
        """
        await self._zygote.start()

    async def run(self, run: Run) -> Outcome:
        """Run a program to its end or its limits.

        Cancelled, it has ended all processes of the run before it raises.

        Raises:
            ToolError: if the run asks for more than the slot's ceiling, or the slot is busy or
                closed.
        """
        self._check(run)
        self._running = True
        try:
            return await self._run(run)
        finally:
            self._running = False
            self.park()

    async def close(self) -> None:
        """End whatever runs and give everything back."""
        self._closed = True
        for task in self._parking:
            task.cancel()
        for each in self._parked:
            each.close()
        self._parked.clear()
        await self._zygote.close()
        if self._lease is not None:
            self._lease.close()
        if self._listener is not None:
            self._listener.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def park(self) -> None:
        """Begin to make children for the runs to come, if some are wanted."""
        if self._closed or not self._zygote.alive:
            return
        while len(self._parked) + len(self._parking) < self._wanted:
            task = asyncio.create_task(self._park_one())
            self._parking.add(task)
            task.add_done_callback(self._parking.discard)

    async def _park_one(self) -> None:
        with contextlib.suppress(OSError, SandboxUnavailableError):
            self._parked.append(await self._zygote.fork(self._sizes))

    def _check(self, run: Run) -> None:
        if self._closed or self._running:
            raise ToolError("the slot is closed" if self._closed else "the slot runs a program")
        if run.network is not None and not self._proxied:
            raise ToolError("the slot gives no way to a network")
        for name in Limits.__struct_fields__:
            if getattr(run.limits, name) > getattr(self._ceiling, name):
                raise ToolError(f"the run asks for more {name} than the slot has", limit=name)

    async def _run(self, run: Run) -> Outcome:
        try:
            files = await scratch.unpacked(run.scratch, run.limits) if run.scratch else []
        except scratch.ScratchError as error:
            return Outcome("scratch", error=str(error))
        outcome = await self._attempt(run, files)
        if outcome is None:
            # Its zygote died under it before it began: nothing was lost, so it gets another.
            outcome = await self._attempt(run, files, last=True)
        return outcome or Outcome("failed")

    async def _attempt(
        self, run: Run, files: Sequence[scratch.Entry], *, last: bool = False
    ) -> Outcome | None:
        """Run a program in a child; None if it did not begin, where another try is to be had."""
        begun = monotonic()
        try:
            child, start = await self._take(run.limits)
        except (OSError, SandboxUnavailableError) as error:
            return Outcome("failed", error=f"no child could be made: {error}")
        try:
            self._limit_memory(run.limits)
        except OSError as error:
            child.close()
            return Outcome("failed", error=str(error), start=start)
        # What was killed for memory in the run before, it may not have asked about.
        self._oom_killed()
        attempt = Attempt(self._zygote, child, run, start, self._cgroup, without=self._without)
        listener = self._zygote.listener or self._listener
        network = None if listener is None else serving.begin(listener, run.network)
        try:
            self._prepare(child, run)
            await attempt.go(self._message(run, files))
            if not (last or attempt.begun):
                return None
            return await attempt.outcome(monotonic() - begun, self._oom_killed)
        except SandboxUnavailableError as error:
            return Outcome("failed", error=str(error), start=start) if last else None
        except asyncio.CancelledError:
            await attempt.cancel()
            raise
        finally:
            if network is not None:
                await serving.end(network)
            child.close()

    async def launch(self, argv: Sequence[str], env: Mapping[str, str]) -> tuple[Child, int, int]:
        """Start a program for as long as it wants, within the ceiling, but for its wall time.

        Returns its child, and descriptors for its stdin and of its stdout, which the caller
        closes. The slot is busy for good.

        Raises:
            OSError: if no child could be made.
            SandboxUnavailableError: if the zygote is gone.
        """
        self._running = True
        child, _ = await self._take(self._ceiling)
        try:
            self._limit_memory(self._ceiling)
            if self._cgroup is not None:
                self._cgroup.hold_cpu()
            run = Run(PythonCode(""), self._ceiling)
            self._prepare(child, run)
            if not child.send(self._packed(("exec", list(argv), dict(env)), run, [])):
                await child.send_rest()
        except BaseException:
            child.close()
            raise
        return child, child.task.release(), child.out.release()

    def _limit_memory(self, limits: Limits) -> None:
        if self._cgroup is None or not self._counts_memory or "memory" in self._without:
            return
        own_bytes = self._zygote.own_bytes + self._zygote.child_bytes + _OWN_BYTES
        if not self._cgroup.limit_memory(limits.memory_bytes + own_bytes):
            raise OSError("the memory of its cgroup could not be limited")

    def _prepare(self, child: Child, run: Run) -> None:
        """Tell the zygote what it has to do for a run; mostly nothing."""
        limits, without = run.limits, self._without
        if run.keep_scratch:
            self._zygote.keep(child, limits.scratch_bytes)
        counted = self._cgroup.quotas if self._cgroup is not None else frozenset[str]()
        if self._tier != "process" and not {"memory", "cpuacct"} <= counted:
            cpu_s = math.inf if "cpu" in without else limits.cpu_s + self._zygote.child_cpu_s
            memory_bytes = limits.memory_bytes + self._zygote.child_bytes
            self._zygote.watch(child, cpu_s, 0 if "memory" in without else memory_bytes)

    def _oom_killed(self) -> bool:
        """Return whether the kernel killed for memory since this was asked last."""
        if self._cgroup is None:
            return False
        before, self._zygote.oom_kills = self._zygote.oom_kills, self._cgroup.oom_kills()
        return self._zygote.oom_kills > before

    async def _take(self, limits: Limits) -> tuple[Child, Start]:
        self._sizes = sizes = self._sizes_of(limits)
        if not self._parked and self._parking:
            # One is on its way: sooner here than another would be.
            await asyncio.wait(self._parking, return_when=asyncio.FIRST_COMPLETED)
        while self._parked:
            child = self._parked.pop(0)
            if child.out.closed or child.over.done():
                child.close()
                continue
            if child.sizes != sizes:
                try:
                    await self._zygote.resize(child, sizes)
                except BaseException:
                    child.close()
                    raise
            return child, "parked"
        start: Start = self._zygote.kind
        if not self._zygote.alive:
            await self._zygote.start()
            start = "cold"
        return await self._zygote.fork(sizes), start

    def _sizes_of(self, limits: Limits) -> tuple[int, int]:
        # Nothing is how a tmpfs is told not to mind.
        size_bytes = 0 if "scratch_size" in self._without else limits.scratch_bytes
        # Two are its own: its root, and the folder for temporary files.
        return size_bytes, 0 if "scratch_inodes" in self._without else limits.scratch_files + 2

    def _message(self, run: Run, files: Sequence[scratch.Entry]) -> bytes:
        found = run.program
        if isinstance(found, PythonCode):
            task: tuple[str, Any, Any] = ("python", found.code, None)
        elif isinstance(found, FunctionCall):
            task = ("function", found.target, found.arguments)
        else:
            task = ("shell", found.script, self._zygote.environment)
        return self._packed(task, run, files)

    def _packed(
        self, task: tuple[str, Any, Any], run: Run, files: Sequence[scratch.Entry]
    ) -> bytes:
        limits = run.limits
        rlimits = {
            "CPU": max(1, math.ceil(limits.cpu_s)),
            "NOFILE": limits.open_files,
            "FSIZE": limits.scratch_bytes,
        }
        if self._tier == "jail":
            # Parked children have the same uid; unprivileged, the zygote and the inits as well.
            rlimits["NPROC"] = limits.pids + 2 + 2 * self._wanted
        elif self._tier == "gvisor":
            # Its kernel has no other processes, and counts the first one for who it began as.
            rlimits["NPROC"] = limits.pids - (os.geteuid() == 0)
        if not self._counts_memory:
            rlimits["AS"] = limits.memory_bytes
        for name in self._without:
            rlimits.pop(_RLIMITS.get(name, ""), None)
        content = marshal.dumps((*task, rlimits, [each.wire() for each in files]))
        return len(content).to_bytes(8, "little") + content
