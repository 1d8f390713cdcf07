"""Follow one run in one child, from its program's sending to its outcome."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Callable

import msgspec

from agentray.tools.sandbox import child as inside
from agentray.tools.sandbox import program, scratch
from agentray.tools.sandbox.base import FunctionCall, Outcome, Reason, Run, Start, Usage
from agentray.tools.sandbox.cgroups import Cgroup
from agentray.tools.sandbox.supervisor import Child

__all__ = ["Attempt"]

# Past the cap output is read and dropped; past this many times the cap the program is ended.
_FLOOD_TIMES = 16
_STOP_S = 2.0
_RESULT_HEADER_BYTES = 9
_UNLIMITED = 1 << 62
# The first look comes after what short runs take: they cost no reading of files.
_TICK_S = 0.1


class Attempt:
    """One run in one child. ``reported``: its init told how it ended, and all of it is over."""

    def __init__(
        self,
        child: Child,
        run: Run,
        start: Start,
        cgroup: Cgroup | None,
        *,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self._child = child
        self._run = run
        self._start: Start = start
        self._cgroup = cgroup if cgroup is not None and "cpuacct" in cgroup.quotas else None
        self._cpu_s = math.inf if "cpu" in without else run.limits.cpu_s
        self._cpu_before_s: float | None = None
        self._cpu_used_s = 0.0
        self._why: Reason | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.reported = False
        self._cap = _UNLIMITED if "output" in without else run.limits.output_bytes
        child.out.most = child.err.most = self._cap
        child.result.most = self._cap + _RESULT_HEADER_BYTES
        child.status.most = inside.REPORT.size + scratch.most_bytes(run.limits)
        child.listener = self._look

    async def go(self, message: bytes, order: bytes) -> None:
        """Send the program and wait until it is over, by itself or at a limit."""
        self._later("deadline", self._run.limits.wall_s, lambda: self._end("timeout"))
        self._later("tick", _TICK_S, self._tick)
        sending: asyncio.Task[None] | None = None
        try:
            if not self._child.send(order, message):
                sending = asyncio.create_task(self._child.send_rest())
            self._look()
            await self._done
        finally:
            for each in self._timers.values():
                each.cancel()
            if sending is not None:
                sending.cancel()

    def _later(self, name: str, delay_s: float, action: Callable[[], None]) -> None:
        self._timers[name] = asyncio.get_running_loop().call_later(delay_s, action)

    def _end(self, why: Reason) -> None:
        if self._why is not None:
            return
        self._why = why
        if self._run.keep_scratch:
            # Its init ends the tree and still brings the files; if it cannot, it goes too.
            self._child.signal(signal.SIGUSR1)
        else:
            self._child.kill()
        self._later("stop", _STOP_S, lambda: self._child.signal(signal.SIGKILL))

    def _tick(self) -> None:
        """Look at the cgroup's CPU time: the only count that nothing in a tree escapes."""
        if self._cgroup is None:
            return
        now_s = self._cgroup.cpu_s()
        if self._cpu_before_s is None:
            self._cpu_before_s = now_s
        self._cpu_used_s = now_s - self._cpu_before_s
        if self._cpu_used_s > self._cpu_s:
            self._end("cpu")
        self._later("tick", _TICK_S, self._tick)

    def _look(self) -> None:
        child = self._child
        if child.out.total + child.err.total > self._cap * _FLOOD_TIMES:
            self._end("output")
        whole = len(child.status.content) >= inside.REPORT.size and child.status.content[0] != 0xFF
        if self._done.done() or not (child.status.closed or whole):
            return
        if whole and self._run.keep_scratch and not child.status.closed:
            return
        self.reported = whole
        self._done.set_result(None)

    async def outcome(self, wall_s: float, oom_killed: Callable[[], bool]) -> Outcome:
        """Return how it ended, when all its processes have."""
        child = self._child
        # Nothing can write any more: what is there is all.
        for each in (child.out, child.err, child.result):
            while each.read():
                pass
        found = self._printed()
        if not self.reported:
            return self._unreported(found, wall_s, oom_killed)
        report = bytes(child.status.content)
        why, status, user_s, system_s, peak, full = inside.REPORT.unpack_from(report)
        cpu_s = max(user_s + system_s, self._cpu_used_s)
        found = msgspec.structs.replace(found, usage=Usage(wall_s, cpu_s, peak))
        if self._run.keep_scratch:
            packed = await scratch.pack(report[inside.REPORT.size :], self._run.limits)
            lost = "" if packed is not None else "its files could not be fetched"
            found = msgspec.structs.replace(found, scratch=packed, error=found.error or lost)
        if why != inside.Why.ENDED:
            stopped: Reason = "cpu" if why == inside.Why.CPU else "memory"
            reason = self._why or ("failed" if why == inside.Why.STOPPED else stopped)
            return msgspec.structs.replace(found, reason=reason)
        code = os.waitstatus_to_exitcode(status)
        return msgspec.structs.replace(
            found,
            reason=self._why or self._reason(code, bool(full), found.stderr, oom_killed),
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
        )

    def _reason(
        self, code: int, full: bool, stderr: bytes, oom_killed: Callable[[], bool]
    ) -> Reason:
        if code == 0:
            return "ok"
        if code == -signal.SIGXCPU:
            return "cpu"
        # A shell tells of its child's end by a signal with 128 and the signal's number.
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL) and oom_killed():
            return "memory"
        if code < 0:
            return "signal"
        if stderr.rstrip().endswith(b"MemoryError"):
            return "memory"
        return "scratch" if full else "exit"

    def _unreported(self, found: Outcome, wall_s: float, oom_killed: Callable[[], bool]) -> Outcome:
        child = self._child
        usage = Usage(wall_s, max(child.cpu_s, self._cpu_used_s), child.peak_bytes)
        found = msgspec.structs.replace(found, usage=usage)
        if self._why is not None:
            return msgspec.structs.replace(found, reason=self._why)
        if oom_killed():
            return msgspec.structs.replace(found, reason="memory")
        said = bytes(child.status.content)
        error = "its init died" if said[:1] != b"\xff" else said[1:].decode(errors="replace")
        return msgspec.structs.replace(found, error=error)

    def _printed(self) -> Outcome:
        """Return what came out of it: no more than the cap, a quarter kept for stderr."""
        child = self._child
        err = bytes(child.err.content)
        out = bytes(child.out.content[: self._cap - min(len(err), self._cap // 4)])
        err = err[: self._cap - len(out)]
        result, error = self._result()
        return Outcome(
            "failed",
            stdout=out,
            stderr=err,
            truncated=len(out) + len(err) < child.out.total + child.err.total,
            result=result,
            error=error,
            start=self._start,
        )

    def _result(self) -> tuple[bytes | None, str]:
        """Return what a function returned, or why it, or its program's start, failed."""
        content = bytes(self._child.result.content)
        if not content:
            return None, ""
        body = content[_RESULT_HEADER_BYTES:]
        size_bytes = int.from_bytes(content[1:_RESULT_HEADER_BYTES], "little")
        if self._child.result.total > len(content) or len(body) != size_bytes:
            return None, "the result is larger than the output may be, or broken off"
        if content[:1] != program.RESULT:
            return None, body.decode(errors="replace")
        return (body, "") if isinstance(self._run.program, FunctionCall) else (None, "")
