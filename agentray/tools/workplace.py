"""Run calls in a worker's slots, and answer for them to the scheduler and to hosts."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from msgspec.structs import replace

from agentray.clock import Clock
from agentray.errors import AgentRayError
from agentray.ids import new_owner_id
from agentray.telemetry.logging import get_logger
from agentray.tools.location import Locate
from agentray.tools.messages import (
    Ack,
    Alive,
    Done,
    Finished,
    Forgot,
    Gone,
    Held,
    Hello,
    Kill,
    Message,
    Register,
    Revoke,
    Revoked,
    Run,
    State,
    Unknown,
    Welcome,
)
from agentray.tools.results import Kept, Results
from agentray.tools.runner import Ask, Runner
from agentray.tools.spec import ToolResult
from agentray.tools.wire import MAX_FRAME, Link, connect, listen

__all__ = ["Workplace"]

log = get_logger(__name__)

BEAT_S = 1.0
# The scheduler says how the pool is every second. Hosts look for it sooner than it is replaced.
_SILENT_S = 15.0
# A runner ends its call at the timeout by itself; this is for one that does not.
_OVERTIME_S = 10.0
_CONNECT_S = 5.0
_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
_KEPT_BYTES = 256 * 1024 * 1024
_ARRIVED_S = 120.0
_LOST_S = 900.0
_MAX_VOID = 10_000


class _Job:
    """A call that runs here, or waits for its slot to be clean."""

    __slots__ = ("ask", "began_at", "epoch", "killed", "lease", "link", "task")

    def __init__(self, ask: Ask, lease: int, link: Link, began_at: float) -> None:
        self.ask = ask
        self.epoch = ask.epoch
        self.lease = lease
        self.link = link
        self.began_at = began_at
        self.killed = False
        self.task: asyncio.Task[tuple[ToolResult, float]] | None = None

    def kill(self) -> None:
        """End it, unless that has begun: a second time would break off how it ends."""
        if not self.killed and self.task is not None:
            self.killed = True
            self.task.cancel()


class Workplace:
    """A worker without its process: ``start``, then ``run`` until cancelled, then ``close``.

    ``host`` is the address to listen at. Calls that run go on while the scheduler is away, and
    their results are kept. ``replace`` is called when the scheduler has said nothing for long,
    though it is connected: it may hang, and has to be started anew then.
    """

    def __init__(
        self,
        name: str,
        host: str,
        token: str,
        runners: Sequence[Runner],
        locate: Locate,
        clock: Clock,
        *,
        new_id: Callable[[], str] = new_owner_id,
        replace: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._name = name
        self._host = host
        self._token = token
        self._runners = runners
        self._locate = locate
        self._clock = clock
        self._new_id = new_id
        self._replace = replace
        self._silent = False
        self._id = new_id()
        self._idle = deque(runners)
        self._slot_free = asyncio.Semaphore(len(runners))
        self._jobs: dict[str, _Job] = {}
        self._void: OrderedDict[int, None] = OrderedDict()
        # The first of the scheduler's leases; None until it has heard of what runs here.
        self._first_lease: int | None = None
        self._results = Results(max_bytes=_KEPT_BYTES, arrived_s=_ARRIVED_S, lost_s=_LOST_S)
        self._scheduler: Link | None = None
        self._cut = asyncio.Event()
        self._links: set[Link] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    async def start(self) -> None:
        """Listen."""
        self._server, self._port = await listen(self, self._host, self._token)

    async def run(self) -> None:
        """Stay connected with the scheduler, wherever it is, and beat."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            tasks.create_task(self._stay_connected())

    async def close(self) -> None:
        """End all calls and close the runners."""
        if self._server is not None:
            self._server.close()
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(runner.close() for runner in self._runners))
        for link in [*self._links, *filter(None, [self._scheduler])]:
            link.close()

    # What comes over connections

    def opened(self, link: Link, hello: Hello) -> None:
        self._links.add(link)

    def closed(self, link: Link) -> None:
        self._links.discard(link)
        if link is self._scheduler:
            self._scheduler = None
            self._cut.set()

    def received(self, link: Link, message: Any) -> None:
        match message:
            case Run():
                self._run(link, message)
            case Kill():
                self._kill(message)
            case Ack():
                self._results.arrived(message.key)
            case Revoke():
                self._revoke(message.lease)
            case Welcome():
                self._first_lease = message.first_lease
            case Gone():
                self._begin_anew()
            case State():
                # It lives.
                pass
            case _:
                log.warning("tool_message_unexpected", kind=type(message).__name__)

    def _run(self, link: Link, run: Run) -> None:
        key = run.ask.key
        job = self._jobs.get(key)
        if job is not None:
            if run.ask.epoch >= job.epoch and not job.killed:
                job.link, job.epoch = link, run.ask.epoch
            else:
                # Nobody but who asked before is told of its end: this one has to ask again.
                link.send(Unknown(key))
            self._unused(run.lease, job.lease)
        elif (kept := self._results.get(key)) is not None:
            link.send(Done(key, kept.result, kept.wall_s))
            self._unused(run.lease)
        elif not self._is_valid(run.lease) or self._is_full():
            link.send(Unknown(key))
            self._unused(run.lease)
        else:
            job = self._jobs[key] = _Job(run.ask, run.lease, link, self._clock.monotonic())
            job.task = asyncio.get_running_loop().create_task(self._perform(job))
            job.task.add_done_callback(lambda _: self._ended(key, job))

    def _is_valid(self, lease: int) -> bool:
        # A scheduler's leases are within 32 bits of its first one.
        first = self._first_lease
        return first is not None and 0 <= lease - first < 1 << 32 and lease not in self._void

    def _is_full(self) -> bool:
        # A scheduler that was restarted may not know of leases that it gave just before.
        return len(self._jobs) >= 2 * len(self._runners)

    def _unused(self, lease: int, own: int = 0) -> None:
        if lease and lease != own:
            self._revoke(lease)

    def _kill(self, kill: Kill) -> None:
        job = self._jobs.get(kill.key)
        if job is not None and job.epoch <= kill.epoch:
            job.kill()

    def _revoke(self, lease: int) -> None:
        if any(job.lease == lease for job in self._jobs.values()):
            return
        self._end_lease(lease)
        self._tell(Revoked(lease))

    def _end_lease(self, lease: int) -> None:
        """Let nothing begin with a lease any more."""
        self._void[lease] = None
        if len(self._void) > _MAX_VOID:
            self._void.popitem(last=False)

    def _begin_anew(self) -> None:
        """The scheduler took us for dead, and our calls run elsewhere or are given up."""
        log.warning("tool_worker_was_given_up", worker=self._id)
        for job in self._jobs.values():
            job.kill()
        self._results.clear()
        for link in list(self._links):
            # Who waits for them asks the scheduler; the calls' ends here count no more.
            link.abort()
        self._id = self._new_id()
        if self._scheduler is not None:
            self._scheduler.close()

    # Calls

    async def _perform(self, job: _Job) -> tuple[ToolResult, float]:
        """Run a call as soon as a slot is clean; return its result and how long it ran."""
        async with self._slot_free:
            runner = self._idle.popleft()
            job.began_at = self._clock.monotonic()
            try:
                return await _result(runner, job.ask), self._clock.monotonic() - job.began_at
            finally:
                self._idle.append(runner)

    def _ended(self, key: str, job: _Job) -> None:
        task = job.task
        assert task is not None
        now = self._clock.monotonic()
        # Nobody awaits the task: what cancels it is a kill, or our end.
        killed = job.killed or task.cancelled()
        if killed:
            result = ToolResult("error", "the call was cancelled", "cancelled")
            wall_s = now - job.began_at
        else:
            result, wall_s = task.result()
        del self._jobs[key]
        self._end_lease(job.lease)
        dropped = [] if killed else self._results.keep(key, Kept(result, wall_s, now))
        if dropped:
            self._tell(Forgot(dropped))
        used = (wall_s, result.cpu_s, result.memory_bytes)
        # First: whatever becomes of the result, the slot is free.
        self._tell(Finished(job.lease, key, *used, killed, not killed and key not in dropped))
        job.link.send(Done(key, result, wall_s))

    # The scheduler

    def _tell(self, message: Message) -> None:
        if self._scheduler is not None:
            self._scheduler.send(message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            if dropped := self._results.expire(self._clock.monotonic()):
                self._tell(Forgot(dropped))
            self._tell(Alive([job.lease for job in self._jobs.values()]))

    async def _stay_connected(self) -> None:
        pause_s = _PAUSE_S
        while True:
            try:
                await self._register()
                pause_s = _PAUSE_S
                await self._cut.wait()
                if self._silent and self._replace is not None:
                    await self._replace()
            except (OSError, AgentRayError) as error:
                log.warning("tool_scheduler_unreachable", error=str(error))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _register(self) -> None:
        where = await self._locate()
        self._cut.clear()
        self._silent = False
        link = await connect(
            *(self, where.host, where.port),
            token=where.token,
            name=self._name,
            timeout_s=_CONNECT_S,
        )
        now = self._clock.monotonic()
        # What begins from here on with an older lease would be in no list.
        self._first_lease = None
        held = [
            Held(
                *(job.lease, key, job.ask.tenant, job.ask.session_id, job.epoch, job.ask.tool),
                *(job.ask.priority, job.ask.on_crash, now - job.began_at, job.killed),
            )
            for key, job in self._jobs.items()
        ]
        link.send(
            Register(
                *(self._id, self._name, self._host, self._port, self._token),
                *(len(self._runners), held, list(self._results)),
            )
        )
        link.expect(_SILENT_S, lambda: self._hangs(link))
        self._scheduler = link

    def _hangs(self, scheduler: Link) -> None:
        log.warning("tool_scheduler_silent")
        self._silent = True
        scheduler.abort()


async def _result(runner: Runner, ask: Ask) -> ToolResult:
    """Run a call; whatever happens to it is a result."""
    running: Awaitable[ToolResult] = runner.run(ask)
    try:
        async with asyncio.timeout(ask.timeout_s + _OVERTIME_S):
            result = await running
        if len(result.output) * 4 + len(result.scratch or b"") > MAX_FRAME // 2:
            return ToolResult("error", "the result is too large", "output")
        return _sendable(result)
    except TimeoutError:
        return ToolResult("error", f"not done within {ask.timeout_s:g} s", "timeout")
    except Exception as error:  # the outer wall: a slot must stay usable
        log.exception("tool_runner_failed", tool=ask.tool, error=type(error).__name__)
        return ToolResult("error", f"{ask.tool} could not be run", "failed")


def _sendable(result: ToolResult) -> ToolResult:
    """Return a result whose texts can be encoded: half a surrogate pair cannot be."""
    texts = {name: getattr(result, name) for name in ("output", "reason", "start")}
    clean = {name: text.encode(errors="replace").decode() for name, text in texts.items()}
    return result if clean == texts else replace(result, **clean)
