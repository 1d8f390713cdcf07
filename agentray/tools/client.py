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
from agentray.tools.runner import Ask
from agentray.tools.spec import ToolResult
from agentray.tools.wire import MAX_FRAME, Link, connect

__all__ = ["OnQueued", "ToolClient", "ToolPoolUnreachableError"]

log = get_logger(__name__)

OnQueued = Callable[[int, float], None]
"""Is told where the call stands, 1 for the next to begin, and the wait expected in seconds."""

_CONNECT_S = 5.0
_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
# A worker ends its call in time by itself; this is for one that hangs.
_OVERTIME_S = 30.0
# A call that has lost so many workers may be what kills them.
_MAX_LOST = 5

_WHY = {
    "queue_full": "too many tool calls wait; it can be tried again in {0:.0f} s",
    "expired": "no slot was free before the call's deadline",
    "died": "the worker died while the call ran: its outcome is unknown",
    "refused": "the session has another owner by now",
}


class ToolPoolUnreachableError(ToolError):
    """Scheduler or workers could not be reached in time; the outcome of a call is unknown."""

    code = "tool_pool_unreachable"
    retryable = True


class _Call:
    """A call that waits: for a slot, or for its result."""

    __slots__ = ("answer", "ask", "began", "on_queued", "waited_s", "was_at")

    def __init__(self, ask: Ask, on_queued: OnQueued | None) -> None:
        self.ask = ask
        self.on_queued = on_queued
        self.answer: asyncio.Future[Any] | None = None
        self.was_at = ""
        self.began = False
        self.waited_s = 0.0


class _Door:
    """A worker, and the connection to it while there is one."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.link: Link | None = None
        self.lock = asyncio.Lock()
        self.calls: set[_Call] = set()


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
        self._calls: dict[str, _Call] = {}
        self._wanting: set[_Call] = set()
        self._doors: dict[str, _Door] = {}
        self._by_link: dict[Link, _Door] = {}
        self._numbers = itertools.count(1)
        self._fences: dict[int, asyncio.Future[bool]] = {}

    async def call(self, ask: Ask, *, on_queued: OnQueued | None = None) -> ToolResult:
        """Return a call's result, whatever the tool does: its failures are results.

        A worker that dies, a scheduler that restarts and connections that break are got over:
        the call is asked for again under its key. Cancelling kills the call.

        Raises:
            ToolPoolUnreachableError: if the pool cannot be reached until the deadline.
        """
        if len(ask.scratch) + len(ask.arguments) > MAX_FRAME // 2:
            return ToolResult("error", "arguments and files of the call are too large", "refused")
        key, call = ask.key, _Call(ask, on_queued)
        if (before := self._calls.get(key)) is not None:
            _answer(before, Refused(key, "refused"))
        self._calls[key] = call
        asked_at = self._clock.monotonic()
        try:
            result, ran_s = await self._settled(call, asked_at)
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        finally:
            self._wanting.discard(call)
            if self._calls.get(key) is call:
                del self._calls[key]
        if self._metrics is not None:
            self._metrics.tool_called(
                *(ask.tenant, ask.tool, result.reason or "ok", result.start),
                waited_s=call.waited_s,
                ran_s=ran_s,
                cpu_s=result.cpu_s,
                memory_bytes=result.memory_bytes,
            )
        return result

    async def fence(
        self, tenant: str, session_id: str, epoch: int, *, timeout_s: float = 10.0
    ) -> None:
        """End what older epochs of a session have waiting or running; return when it has ended.

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
        links = [door.link for door in self._doors.values()]
        for link in filter(None, [self._scheduler, *links]):
            link.close()

    # A call's way

    async def _settled(self, call: _Call, asked_at: float) -> tuple[ToolResult, float]:
        """Ask until the call is settled; return its result and how long it ran."""
        pause_s, trying_since, lost = _PAUSE_S, asked_at, 0
        while True:
            answer = await self._slot(call, trying_since)
            if isinstance(answer, Refused):
                call.waited_s = self._clock.monotonic() - asked_at
                why = _WHY[answer.reason].format(answer.retry_after_s)
                return ToolResult("error", why, answer.reason), 0.0
            if isinstance(answer, Granted):
                call.waited_s = self._clock.monotonic() - asked_at
                answer = await self._run(call, answer)
                if isinstance(answer, Done):
                    return answer.result, answer.wall_s
                if isinstance(answer, Refused):
                    return ToolResult("error", _WHY[answer.reason], answer.reason), 0.0
                if answer is None and call.began:
                    # The worker was reached: that it is lost now is a new trouble.
                    trying_since, pause_s, call.began = self._clock.monotonic(), _PAUSE_S, False
                    lost += 1
                    if lost >= _MAX_LOST:
                        return ToolResult("error", _WHY["died"], "died"), 0.0
            if self._clock.monotonic() - trying_since >= self._patience_s:
                raise _unreachable(call.ask)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _slot(self, call: _Call, trying_since: float) -> Granted | Refused | None:
        """Return the slot, or why there is none; None if the scheduler was lost."""
        ask, left_s = call.ask, 0.0
        gives_up_at = trying_since + self._patience_s
        if ask.deadline:
            left_s = ask.deadline - self._clock.now()
            if left_s <= 0:
                return Refused(ask.key, "died" if call.was_at else "expired")
            gives_up_at = self._clock.monotonic() + left_s
        try:
            link = self._scheduler or await self._connected(gives_up_at)
        except ToolPoolUnreachableError as error:
            raise _unreachable(ask) from error
        self._wanting.add(call)
        link.send(
            Want(
                *(ask.key, ask.tenant, ask.session_id, ask.epoch, ask.tool, ask.priority),
                *(ask.cpu, ask.memory_bytes, ask.timeout_s, left_s, ask.on_crash, call.was_at),
            )
        )
        answer = await _answered(call)
        self._wanting.discard(call)
        return answer

    async def _run(self, call: _Call, granted: Granted) -> Done | Unknown | Refused | None:
        """Return the worker's answer; None if it was lost."""
        call.began = False
        door = self._doors.get(granted.worker)
        if door is None:
            return None
        link = door.link or await self._enter(door)
        if link is None:
            return None
        door.calls.add(call)
        before, call.was_at, call.began = call.was_at, granted.worker, True
        link.send(Run(granted.lease, call.ask))
        try:
            async with asyncio.timeout(call.ask.timeout_s + _OVERTIME_S):
                answer = await _answered(call)
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

    def _abandon(self, call: _Call) -> None:
        ask = call.ask
        door = None if call in self._wanting else self._doors.get(call.was_at)
        if door is not None and door.link is not None:
            door.link.send(Kill(ask.key, ask.epoch))
        elif self._scheduler is not None:
            self._scheduler.send(Left(ask.key, ask.epoch))

    # Connections

    async def _connected(self, gives_up_at: float) -> Link:
        """Return the connection to the scheduler; make one if there is none."""
        pause_s = _PAUSE_S
        try:
            async with asyncio.timeout(gives_up_at - self._clock.monotonic()), self._finding:
                while self._scheduler is None:
                    try:
                        where = await self._locate()
                        self._scheduler = await connect(
                            *(self, where.host, where.port),
                            token=where.token,
                            name=self._owner_id,
                            timeout_s=_CONNECT_S,
                        )
                    except (OSError, NotReadyError) as error:
                        log.warning("tool_scheduler_unreachable", error=str(error))
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                return self._scheduler
        except TimeoutError as error:
            raise ToolPoolUnreachableError("the tool scheduler could not be reached") from error

    async def _enter(self, door: _Door) -> Link | None:
        """Return the connection to a worker, or None if it cannot be reached."""
        async with door.lock:
            if door.link is None:
                peer = door.peer
                try:
                    link = await connect(
                        *(self, peer.host, peer.port),
                        token=peer.token,
                        name=self._owner_id,
                        timeout_s=_CONNECT_S,
                    )
                except OSError as error:
                    log.warning("tool_worker_unreachable", worker=peer.worker, error=str(error))
                    return None
                door.link = link
                self._by_link[link] = door
            return door.link

    def opened(self, link: Link, hello: Hello) -> None:
        """Never: only listeners are said hello to."""

    def received(self, link: Link, message: Any) -> None:
        match message:
            case Granted() | Refused() | Done() | Unknown():
                call = self._calls.get(message.key)
                # What a call was granted that was cancelled since is not for the one that follows.
                asks = isinstance(message, Granted | Refused)
                if call is not None and (call in self._wanting) == asks:
                    _answer(call, message)
            case Queued():
                call = self._calls.get(message.key)
                if call is not None and call.on_queued is not None:
                    call.on_queued(message.position, message.wait_s)
            case Peer():
                self._doors.setdefault(message.worker, _Door(message))
            case Gone():
                door = self._doors.pop(message.worker, None)
                if door is not None and door.link is not None:
                    door.link.abort()
            case Fenced():
                if (ended := self._fences.get(message.number)) is not None and not ended.done():
                    ended.set_result(True)
            case State():
                if self._metrics is not None:
                    self._metrics.tool_queue.set(message.queued)
                    self._metrics.tool_workers.set(message.workers)
                    self._metrics.tool_slots_busy.set(message.running)
            case _:
                log.warning("tool_message_unexpected", kind=type(message).__name__)

    def closed(self, link: Link) -> None:
        if link is self._scheduler:
            self._scheduler = None
            lost = list(self._wanting)
            for ended in self._fences.values():
                if not ended.done():
                    ended.set_result(False)
        else:
            door = self._by_link.pop(link, None)
            if door is None:
                return
            door.link = None
            lost = list(door.calls)
        for call in lost:
            _answer(call, None)


def _answer(call: _Call, answer: Any) -> None:
    if call.answer is not None and not call.answer.done():
        call.answer.set_result(answer)


async def _answered(call: _Call) -> Any:
    call.answer = asyncio.get_running_loop().create_future()
    try:
        return await call.answer
    finally:
        call.answer = None


def _unreachable(ask: Ask) -> ToolPoolUnreachableError:
    return ToolPoolUnreachableError(f"{ask.tool} could not be called: the pool is not reachable")
