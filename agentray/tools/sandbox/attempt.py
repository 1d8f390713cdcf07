"""Follow one run in one child, from its program's sending to its outcome."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Callable

from msgspec.structs import replace

from agentray.tools.sandbox import program, scratch
from agentray.tools.sandbox.base import FunctionCall, Outcome, Reason, Run, Start, Usage
from agentray.tools.sandbox.cgroups import Cgroup
from agentray.tools.sandbox.supervisor import Child, Ended, Zygote

__all__ = ["Attempt"]

# Past the cap output is read and dropped; past this many times the cap the program is ended.
_FLOOD_TIMES = 16
# Of a message, after the byte that says that the program began.
_HEADER_BYTES = 1 + 9
_UNLIMITED = 1 << 62
# The first look comes after what short runs take: they cost no reading of files.
_TICK_S = 0.1
_COLLECT_S = 10.0
# All that was killed is over by then; else its zygote is held up, by what it should not be.
_GONE_S = 3.0


class Attempt:
    """One run in one child."""

    def __init__(
        self,
        zygote: Zygote,
        child: Child,
        run: Run,
        start: Start,
        cgroup: Cgroup | None,
        *,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self._zygote = zygote
        self._child = child
        self._run = run
        self._start: Start = start
        self._cgroup = cgroup
        self._cpu_s = math.inf if "cpu" in without else run.limits.cpu_s
        self._cpu_before_s: float | None = None
        self._cpu_used_s = 0.0
        self._why: Reason | None = None
        self._last: asyncio.TimerHandle | None = None
        self._cap = _UNLIMITED if "output_cap" in without else run.limits.output_bytes
        child.out.most = child.err.most = self._cap
        child.out.listener = child.err.listener = self._printed
        child.task.most = self._cap + _HEADER_BYTES
        if isinstance(run.program, FunctionCall):
            # Its result may be more than fits into the socket at once.
            child.task.watch()

    async def go(self, message: bytes) -> None:
        """Send the program and wait until nothing of it is left, by itself or at a limit."""
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(self._run.limits.wall_s, self._end, "timeout")
        self._ticking = loop.call_later(_TICK_S, self._tick)
        sending: asyncio.Task[None] | None = None
        try:
            if not self._child.send(message):
                sending = asyncio.create_task(self._child.send_rest())
            # Not itself: a cancellation must leave it to tell when all is over.
            await asyncio.shield(self._child.over)
        finally:
            deadline.cancel()
            self._ticking.cancel()
            if self._last is not None:
                self._last.cancel()
            if sending is not None:
                sending.cancel()
            if self._cpu_before_s is not None and self._cgroup is not None:
                self._cgroup.free_cpu()

    def _end(self, why: Reason) -> None:
        if self._why is None:
            self._why = why
            self._kill()

    def _kill(self) -> None:
        if self._cgroup is not None:
            self._cgroup.free_cpu()
        self._child.kill()
        # Whatever a program found to hold its zygote up with, its time is over.
        self._last = asyncio.get_running_loop().call_later(_GONE_S, self._zygote.abandon)

    async def cancel(self) -> None:
        """End all its processes, now."""
        self._kill()
        await asyncio.wait([self._child.over])
        if self._last is not None:
            self._last.cancel()

    def _tick(self) -> None:
        """Look at the cgroup's CPU time: the only count that nothing in a tree escapes."""
        if self._cgroup is None or "cpuacct" not in self._cgroup.quotas:
            return
        now_s = self._cgroup.cpu_s()
        if self._cpu_before_s is None:
            self._cpu_before_s = now_s
            # Not before: short runs and the making of children are not worth the writing.
            self._cgroup.hold_cpu()
        self._cpu_used_s = now_s - self._cpu_before_s
        if self._cpu_used_s > self._cpu_s:
            self._end("cpu")
        self._ticking = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _printed(self) -> None:
        if self._child.out.total + self._child.err.total > self._cap * _FLOOD_TIMES:
            self._end("output")

    @property
    def begun(self) -> bool:
        """Whether the program began, as far as it could be heard of; when all is over."""
        task = self._child.task
        while task.read():
            pass
        return bool(task.content) or self._child.over.result() is not None

    async def outcome(self, wall_s: float, oom_killed: Callable[[], bool]) -> Outcome:
        """Return how it ended, when all its processes have."""
        child, ended = self._child, self._child.over.result()
        # Nothing can write any more: what is there is all.
        for each in (child.out, child.err, child.task):
            while each.read():
                pass
        found = self._output(ended, wall_s)
        if ended is None:
            if self._why is not None:
                return replace(found, reason=self._why)
            if oom_killed():
                return replace(found, reason="memory")
            return replace(found, error="the sandbox's own process died")
        if self._run.keep_scratch:
            packed = await self._files()
            lost = "" if packed is not None else "its files could not be fetched"
            found = replace(found, scratch=packed, error=found.error or lost)
        if self._kind() == program.UNABLE:
            return found
        why = self._why or ended.why
        if why:
            return replace(found, reason=why)
        code = os.waitstatus_to_exitcode(ended.status)
        return replace(
            found,
            reason=self._reason(code, ended, found.stderr, oom_killed),
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
        )

    def _reason(
        self, code: int, ended: Ended, stderr: bytes, oom_killed: Callable[[], bool]
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
        return "scratch" if ended.full else "exit"

    def _output(self, ended: Ended | None, wall_s: float) -> Outcome:
        """Return what came out of it: no more than the cap, a quarter kept for stderr."""
        child = self._child
        err = bytes(child.err.content)
        out = bytes(child.out.content[: self._cap - min(len(err), self._cap // 4)])
        err = err[: self._cap - len(out)]
        result, error = self._result()
        cpu_s, memory_bytes = (ended.cpu_s, ended.memory_bytes) if ended is not None else (0.0, 0)
        return Outcome(
            "failed",
            stdout=out,
            stderr=err,
            truncated=len(out) + len(err) < child.out.total + child.err.total,
            result=result,
            error=error,
            usage=Usage(wall_s, max(cpu_s, self._cpu_used_s), memory_bytes),
            start=self._start,
        )

    def _result(self) -> tuple[bytes | None, str]:
        """Return what a function returned, or why it, or its program's start, failed."""
        task, kind = self._child.task, self._kind()
        if not kind:
            return None, ""
        body = bytes(task.content[_HEADER_BYTES:])
        size_bytes = int.from_bytes(task.content[2:_HEADER_BYTES], "little")
        if task.total > len(task.content) or len(body) != size_bytes:
            return None, "the result is larger than the output may be, or broken off"
        if kind != program.RESULT:
            return None, body.decode(errors="replace")
        return (body, "") if isinstance(self._run.program, FunctionCall) else (None, "")

    def _kind(self) -> bytes:
        """Return what a message is, or nothing if there is none."""
        return bytes(self._child.task.content[1:2])

    async def _files(self) -> bytes | None:
        left = self._child.left
        if left is None:
            return None
        left.most = scratch.most_bytes(self._run.limits)
        whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look() -> None:
            if left.closed and not whole.done():
                whole.set_result(None)

        left.listener = look
        left.watch()
        try:
            async with asyncio.timeout(_COLLECT_S):
                await whole
        except TimeoutError:
            return None
        return await scratch.pack(bytes(left.content), self._run.limits)
