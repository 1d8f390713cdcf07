"""Have tools called in the pool, from a session's process: ask for a slot, then its worker."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from agentray.clock import Clock
from agentray.errors import NotReadyError, ToolError
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics
from agentray.tools.asked_call import AskedCall, OnQueued
from agentray.tools.doors import Doors
from agentray.tools.location import Locate
from agentray.tools.messages import (
    Ack,
    Done,
    Fence,
    Fenced,
    Gone,
    Granted,
    Hello,
    Kill,
    Left,
    Peer,
    Queued,
    Refused,
    Run,
    State,
    Unknown,
    Want,
)
from agentray.tools.patience import Patience
from agentray.tools.runner import Ask
from agentray.tools.spec import ToolResult
from agentray.tools.wire import MAX_FRAME, Link, connect

__all__ = ["OnQueued", "ToolClient", "ToolPoolUnreachableError"]

log = get_logger(__name__)

_CONNECT_S = 5.0
# A worker ends its call in time by itself; this is for one that hangs.
_OVERTIME_S = 30.0
# And the scheduler drops a call at its deadline by itself.
_MARGIN_S = 5.0
# It says how the pool is every second: one that does not hangs.
_SILENT_S = 10.0
# A call that has lost so many workers may be what kills them.
_MAX_LOST = 5

_WHY = {
    "queue_full": "too many tool calls wait; it can be tried again in {0:.0f} s",
    "expired": "no slot was free before the call's deadline",
    "died": "the worker died while the call ran: its outcome is unknown",
    "refused": "the session has another owner by now",
}


class ToolPoolUnreachableError(ToolError):
    """Scheduler or workers could not be reached in time; a call has not begun, as far as who asked
    for it knows."""

    code = "tool_pool_unreachable"
    retryable = True


class ToolClient:
    """The tools of one owner of sessions; ``owner_id`` says in logs who it is.

    ``patience_s`` is how long a pool that cannot be reached is tried again, by calls without a
    deadline.
    """

    def __init__(
        self,
        owner_id: str,
        locate: Locate,
        *,
        clock: Clock,
        metrics: Metrics | None = None,
        patience_s: float = 30.0,
    ) -> None:
        self._owner_id = owner_id
        self._locate = locate
        self._clock = clock
        self._metrics = metrics
        self._patience_s = patience_s
        self._scheduler: Link | None = None
        self._finding = asyncio.Lock()
        self._calls: dict[str, AskedCall] = {}
        self._wanting: set[AskedCall] = set()
        self._doors = Doors(self, owner_id)
        self._numbers = itertools.count(1)
        self._fences: dict[int, asyncio.Future[bool]] = {}

    async def call(
        self,
        ask: Ask,
        *,
        on_queued: OnQueued | None = None,
        on_granted: Callable[[], None] | None = None,
    ) -> ToolResult:
        """Return a call's result, whatever the tool does: its failures are results.

        A worker that dies, a scheduler that restarts and connections that break are got over:
        the call is asked for again under its key. Cancelling kills the call. ``on_granted`` is
        called when the call waits no longer, for a worker to run it or to bring its result: again
        if that worker is lost and it waits again.

        Raises:
            ToolPoolUnreachableError: if the pool cannot be reached until the deadline, and the
                call has not begun. One that has, has the result ``died``.
        """
        call = AskedCall(ask, self._clock.monotonic(), on_queued, on_granted)
        try:
            result, ran_s = await self._only(call)
        except ToolPoolUnreachableError:
            self._count(call, ToolResult("error", "", "unreachable"), 0.0)
            raise
        except asyncio.CancelledError:
            self._count(call, ToolResult("error", "", "cancelled"), 0.0)
            raise
        self._count(call, result, ran_s)
        return result

    async def fence(
        self, tenant: str, session_id: str, epoch: int, *, timeout_s: float = 10.0
    ) -> None:
        """End what older epochs of a session have waiting or running; return when it has ended,
        or its worker was given up: one that is only cut off may still run it.

        Raises:
            ToolPoolUnreachableError: if it is not known to have ended in time.
        """
        number = next(self._numbers)
        ends_at = self._clock.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                done = False
                while not done:
                    link = await self._connected(ends_at)
                    ended = self._fences[number] = asyncio.get_running_loop().create_future()
                    link.send(Fence(number, tenant, session_id, epoch))
                    done = await ended
        except TimeoutError as error:
            raise ToolPoolUnreachableError(
                f"calls of older owners of {session_id} may still run"
            ) from error
        finally:
            self._fences.pop(number, None)

    async def close(self) -> None:
        """Close the connections; calls that wait are cancelled by whoever made them."""
        for link in filter(None, [self._scheduler, *self._doors.links()]):
            link.close()

    # A call's way

    async def _only(self, call: AskedCall) -> tuple[ToolResult, float]:
        """Settle a call, as the only one with its key; return its result and how long it ran."""
        ask = call.ask
        if len(ask.scratch) + len(ask.arguments) > MAX_FRAME // 2:
            why = "arguments and files of the call are too large"
            return ToolResult("error", why, "refused"), 0.0
        key = ask.key
        if (before := self._calls.get(key)) is not None:
            before.answer(Refused(key, "refused"))
        self._calls[key] = call
        try:
            return await self._settled(call)
        except ToolPoolUnreachableError:
            if not call.was_at:
                raise
            return ToolResult("error", _WHY["died"], "died"), 0.0
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        finally:
            self._wanting.discard(call)
            if self._calls.get(key) is call:
                del self._calls[key]

    async def _settled(self, call: AskedCall) -> tuple[ToolResult, float]:
        """Ask until the call is settled."""
        left_s = call.ask.deadline and call.ask.deadline - self._clock.now()
        call.ends_at = left_s and call.asked_at + left_s
        patience, lost = Patience(self._clock, self._patience_s), 0
        while True:
            answer = await self._slot(call, patience)
            if isinstance(answer, Refused):
                why = _WHY[answer.reason].format(answer.retry_after_s)
                return ToolResult("error", why, answer.reason), 0.0
            if isinstance(answer, Granted):
                call.granted(self._clock.monotonic())
                answer = await self._run(call, answer)
                if isinstance(answer, Done):
                    return answer.result, answer.wall_s
                if isinstance(answer, Refused):
                    return ToolResult("error", _WHY[answer.reason], answer.reason), 0.0
                if answer is None and call.began:
                    # The worker was reached: that it is lost now is a new trouble.
                    patience.restart()
                    lost += 1
                    if lost >= _MAX_LOST:
                        return ToolResult("error", _WHY["died"], "died"), 0.0
                    if call.ends_at:
                        # The deadline was for its first slot. It has had that.
                        wait_s = max(left_s, self._patience_s)
                        call.ends_at = self._clock.monotonic() + wait_s
            if patience.is_over:
                raise _unreachable(call.ask)
            await patience.pause()

    async def _slot(self, call: AskedCall, patience: Patience) -> Granted | Refused | None:
        """Return the slot, or why there is none; None if the scheduler was lost."""
        ask, asked_at, left_s = call.ask, self._clock.monotonic(), 0.0
        too_late = Refused(ask.key, "died" if call.was_at else "expired")
        if call.ends_at and (left_s := call.ends_at - asked_at) <= 0:
            return too_late
        try:
            link = self._scheduler or await self._connected(call.ends_at or patience.ends_at)
        except ToolPoolUnreachableError as error:
            raise _unreachable(ask) from error
        self._wanting.add(call)
        link.send(
            Want(
                *(ask.key, ask.tenant, ask.session_id, ask.epoch, ask.tool, ask.priority),
                *(ask.cpu, ask.memory_bytes, ask.timeout_s, left_s, ask.on_crash, call.was_at),
            )
        )
        asked_at = self._clock.monotonic()
        try:
            async with asyncio.timeout(left_s + _MARGIN_S if left_s else None):
                answer = await call.answered()
        except TimeoutError:
            link.send(Left(ask.key, ask.epoch))
            answer = too_late
        # One that is cancelled stays, for its host to know whom to tell.
        self._wanting.discard(call)
        if answer is not None:
            patience.answered(self._clock.monotonic() - asked_at)
        elif link.has_spoken:
            patience.restart()
        return answer

    async def _run(self, call: AskedCall, granted: Granted) -> Done | Unknown | Refused | None:
        """Return the worker's answer; None if it was lost."""
        call.began = False
        door = self._doors.get(granted.worker)
        if door is None:
            return None
        link = door.link or await self._doors.enter(door)
        if link is None:
            return None
        door.calls.add(call)
        before, call.was_at, call.began = call.was_at, granted.worker, True
        link.send(Run(granted.lease, call.ask))
        try:
            async with asyncio.timeout(call.ask.timeout_s + _OVERTIME_S):
                answer = await call.answered()
        except TimeoutError:
            link.send(Kill(call.ask.key, call.ask.epoch))
            answer = Refused(call.ask.key, "died")
        finally:
            door.calls.discard(call)
        if isinstance(answer, Done):
            link.send(Ack(call.ask.key))
        elif isinstance(answer, Unknown):
            # It has not begun with this lease; it may have before.
            call.was_at = before
        return answer

    def _count(self, call: AskedCall, result: ToolResult, ran_s: float) -> None:
        if self._metrics is None:
            return
        waited_s = call.waited_s
        if waited_s is None:
            waited_s = self._clock.monotonic() - call.asked_at
        self._metrics.tool_called(
            *(call.ask.tenant, call.ask.tool, result.reason or "ok", result.start),
            waited_s=waited_s,
            ran_s=ran_s,
            cpu_s=result.cpu_s,
            memory_bytes=result.memory_bytes,
        )

    def _show(self, state: State) -> None:
        if self._metrics is not None:
            self._metrics.tool_queue.set(state.queued)
            self._metrics.tool_workers.set(state.workers)
            self._metrics.tool_slots_busy.set(state.running)

    def _abandon(self, call: AskedCall) -> None:
        ask = call.ask
        door = None if call in self._wanting else self._doors.get(call.was_at)
        if door is not None and door.link is not None:
            door.link.send(Kill(ask.key, ask.epoch))
        elif self._scheduler is not None:
            self._scheduler.send(Left(ask.key, ask.epoch))

    # Connections

    async def _connected(self, gives_up_at: float) -> Link:
        """Return the connection to the scheduler; make one if there is none."""
        patience = Patience(self._clock, 0.0)
        try:
            async with asyncio.timeout(gives_up_at - self._clock.monotonic()), self._finding:
                while self._scheduler is None:
                    try:
                        where = await self._locate()
                        link = await connect(
                            *(self, where.host, where.port),
                            token=where.token,
                            name=self._owner_id,
                            timeout_s=_CONNECT_S,
                        )
                        link.expect(_SILENT_S, lambda link=link: self._hangs(link))
                        self._scheduler = link
                    except (OSError, NotReadyError) as error:
                        log.warning("tool_scheduler_unreachable", error=str(error))
                        await patience.pause()
                return self._scheduler
        except TimeoutError as error:
            raise ToolPoolUnreachableError("the tool scheduler could not be reached") from error

    def _hangs(self, scheduler: Link) -> None:
        log.warning("tool_scheduler_silent")
        scheduler.abort()

    def opened(self, link: Link, hello: Hello) -> None:
        """Never: only listeners are said hello to."""

    def received(self, link: Link, message: Any) -> None:
        match message:
            case Granted() | Refused() | Done() | Unknown():
                call = self._calls.get(message.key)
                # What a call was granted that was cancelled since is not for the one that follows.
                asks = isinstance(message, Granted | Refused)
                if call is not None and (call in self._wanting) == asks:
                    call.answer(message)
            case Queued():
                call = self._calls.get(message.key)
                if call is not None and call in self._wanting:
                    call.queued(message, self._clock.monotonic())
            case Peer():
                self._doors.add(message)
            case Gone():
                self._doors.gone(message.worker)
            case Fenced():
                if (ended := self._fences.get(message.number)) is not None and not ended.done():
                    ended.set_result(True)
            case State():
                self._show(message)
                now = self._clock.monotonic()
                for call in self._wanting:
                    call.waits_still(now)
            case _:
                log.warning("tool_message_unexpected", kind=type(message).__name__)

    def closed(self, link: Link) -> None:
        if link is self._scheduler:
            self._scheduler = None
            self._show(State(0, 0, 0, 0))
            lost = list(self._wanting)
            for ended in self._fences.values():
                if not ended.done():
                    ended.set_result(False)
        else:
            lost = self._doors.closed(link)
        for call in lost:
            call.answer(None)


def _unreachable(ask: Ask) -> ToolPoolUnreachableError:
    return ToolPoolUnreachableError(f"{ask.tool} could not be called: the pool is not reachable")
