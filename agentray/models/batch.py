"""Run the lines of batches in capacity that nobody else wants, whoever dies meanwhile.

Each host has a runner. What it takes is its own for as long as its lease, which it renews; the
lines of a host that died are run again by others. The first result of a line counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import msgspec

from agentray.clock import Clock
from agentray.config.settings import BatchSettings
from agentray.errors import AgentRayError, StorageUnavailableError
from agentray.ids import new_file_id
from agentray.models.batch_lines import InputReader, answer, asks_for_stream, failure, usage_of
from agentray.models.batch_rules import Rests, next_step, pause_s, shares, verdict
from agentray.storage.batches import (
    BatchFault,
    BatchRow,
    BatchWork,
    ClaimedLine,
    EndStatus,
    FileStore,
)
from agentray.telemetry.logging import get_logger

__all__ = ["BatchRunner", "BatchStore", "Call", "Reply"]

log = get_logger(__name__)

# Of each kind of work: those of the oldest batches. The others come when these have ended.
BATCHES_AT_ONCE = 100
DELETE_EXPIRED_S = 60.0
CANCEL_AGAIN_S = 0.5

_UNFINISHED: dict[EndStatus, bytes] = {
    "completed": failure("internal_error", "This request has no result."),
    "cancelled": failure(
        "batch_cancelled", "The batch was cancelled before this request was executed."
    ),
    "expired": failure(
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
}
_BROKE = msgspec.json.encode(
    {
        "error": {
            "message": "the request, or what was answered, could not be dealt with",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
)
_STREAM_REFUSED = msgspec.json.encode(
    {
        "error": {
            "message": "stream: true is not supported in a batch: its answers are lines of a file",
            "type": "invalid_request_error",
            "param": "stream",
            "code": "unsupported_parameter",
        }
    }
)


class Reply(msgspec.Struct, frozen=True):
    """An answer to a line's request: its status and its body, which is JSON."""

    status: int
    body: bytes
    retry_after_s: float | None = None


Call = Callable[[str, bytes], Awaitable[Reply]]
"""Asks an endpoint, named by its path, with a body; it has a deadline of its own, and whatever
goes wrong is a status and a body."""


class BatchStore(BatchWork, FileStore, Protocol):
    """What a runner needs of the store."""


class BatchRunner:
    """Runs batches for as long as ``run`` does.

    ``name`` is this runner's alone. ``idle`` says whether the host has capacity to spare: only
    then lines begin.
    """

    def __init__(
        self,
        *,
        store: BatchStore,
        call: Call,
        idle: Callable[[], bool],
        settings: BatchSettings,
        name: str,
        clock: Clock,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._call = call
        self._idle = idle
        self._settings = settings
        self._name = name
        self._clock = clock
        self._rng = rng or random.Random()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lines: dict[asyncio.Task[None], ClaimedLine] = {}
        self._validation: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._rests = Rests()
        self._runnable: list[BatchRow] = []
        self._turn = 0
        self._look_at = 0.0
        self._delete_at = 0.0
        self._ended = asyncio.Event()

    @property
    def running(self) -> int:
        """Lines that this runner runs now."""
        return len(self._lines)

    async def run(self) -> None:
        """Run until cancelled; then :meth:`close` ends what is under way."""
        self._spawn(self._renew())
        while True:
            self._ended.clear()
            try:
                await self._look()
            except AgentRayError as error:
                log.warning("batch_sweep_failed", code=error.code, error=error.message)
            # A line that ended makes room for another, at once.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.sweep_s):
                    await self._ended.wait()

    async def close(self) -> None:
        """End what is under way, and give it back for others to take."""
        left = set(self._tasks)
        while left:
            # Again and again: the pool's wait_for may lose a cancellation (Python 3.11).
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
        with contextlib.suppress(AgentRayError):
            await self._store.give_back(self._name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside; it handles its own errors."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _renew(self) -> None:
        lease_s = self._settings.lease_s
        while True:
            await asyncio.sleep(lease_s / 3)
            try:
                # Those that somebody runs: a claim whose answer was lost is to end.
                if lines := list(self._lines.values()):
                    await self._store.renew_lines(self._name, lines, lease_s=lease_s)
            except Exception:  # the outer wall: without renewals, lines would run twice
                log.exception("batch_leases_not_renewed")

    async def _look(self) -> None:
        now = self._clock.monotonic()
        if now >= self._delete_at:
            self._delete_at = now + DELETE_EXPIRED_S
            await self._store.delete_expired_files()
        if now >= self._look_at:
            self._look_at = now + self._settings.sweep_s
            self._runnable = await self._tend(now)
        free = self._settings.concurrency - len(self._lines)
        resting = self._rests.resting(now)
        ready = [batch for batch in self._runnable if batch.id not in resting]
        if free > 0 and ready and self._idle():
            await self._begin(free, ready)

    async def _tend(self, now: float) -> list[BatchRow]:
        """Bring each open batch one step further; return those whose lines may run."""
        runnable: list[BatchRow] = []
        validating: list[BatchRow] = []
        ending: list[tuple[BatchRow, EndStatus]] = []
        resting = self._rests.resting(now)
        for batch in await self._store.open_batches(BATCHES_AT_ONCE, resting=resting):
            match next_step(batch):
                case "run":
                    runnable.append(batch)
                case "validate":
                    validating.append(batch)
                case "finalize":
                    ending.append((batch, "completed"))
                case ("end", status):
                    ending.append((batch, status))
                case _:
                    pass
        if ending and self._ending is None:
            self._ending = self._spawn(self._end_all(ending))
        if validating and self._validation is None and self._idle():
            self._validation = self._spawn(self._validate(validating))
        return runnable

    async def _end_all(self, batches: list[tuple[BatchRow, EndStatus]]) -> None:
        """End batches, one at a time beside what runs: writing their files may take long."""
        try:
            for batch, status in batches:
                try:
                    await self._end(batch, status)
                except Exception:  # the outer wall: the others are ended all the same
                    log.exception("batch_not_ended", batch=batch.id)
        finally:
            self._ending = None

    async def _end(self, batch: BatchRow, status: EndStatus) -> None:
        if batch.status == "in_progress" and status == "completed":
            await self._store.finalize_batch(batch.tenant, batch.id)
        ended = await self._store.finish_batch(
            batch.tenant,
            batch.id,
            status,
            unfinished=_UNFINISHED[status],
            output_file_id=new_file_id(),
            error_file_id=new_file_id(),
        )
        if ended:
            log.info("batch_ended", batch=batch.id, status=status)

    # Validation

    async def _validate(self, batches: list[BatchRow]) -> None:
        lease_s = self._settings.lease_s
        try:
            for batch in batches:
                try:
                    key = (batch.tenant, batch.id, self._name)
                    if await self._store.claim_batch(*key, lease_s=lease_s):
                        await self._read_input(batch)
                except Exception:
                    # The outer wall: the lease ends, and somebody reads it again.
                    log.exception("batch_validation_broke", batch=batch.id)
        finally:
            self._validation = None

    async def _read_input(self, batch: BatchRow) -> None:
        store, settings = self._store, self._settings
        reader = InputReader(batch.id, batch.endpoint, max_requests=settings.max_requests)
        key = (batch.tenant, batch.id, self._name)
        file = await store.file(batch.tenant, batch.input_file_id)
        number = size = 0
        while not reader.given_up:
            piece = await store.read_piece(batch.tenant, batch.input_file_id, number)
            size += len(piece or b"")
            if file is None or (piece is None and size != file.size_bytes):
                # Maybe only now: what is left of it is not what was ordered.
                gone = BatchFault(code="file_not_found", message="The input file was deleted.")
                await store.fail_batch(*key, [gone])
                return
            lines = reader.close() if piece is None else reader.feed(piece)
            wanted = bool(lines) and not reader.faults
            if wanted and not await store.add_lines(*key, lines, lease_s=settings.lease_s):
                return  # It was cancelled, or is another one's.
            if piece is None:
                break
            number += 1
        if reader.faults:
            await store.fail_batch(*key, reader.faults)
            log.info("batch_failed", batch=batch.id, code=reader.faults[0].code)
        else:
            await store.begin_batch(*key, total=reader.total)
            log.info("batch_begun", batch=batch.id, lines=reader.total)

    # Lines

    async def _begin(self, free: int, ready: list[BatchRow]) -> None:
        self._turn += 1
        for batch, count in shares(free, ready, self._turn):
            lines = await self._store.claim_lines(
                batch.tenant,
                batch.id,
                self._name,
                limit=count,
                lease_s=self._settings.lease_s,
            )
            for line in lines:
                task = self._spawn(self._run(line))
                self._lines[task] = line
                task.add_done_callback(self._line_ended)
            if len(lines) < count:
                # Until the next sweep; what it leaves free goes to the others.
                self._runnable.remove(batch)

    def _line_ended(self, task: asyncio.Task[None]) -> None:
        del self._lines[task]
        self._ended.set()

    async def _run(self, line: ClaimedLine) -> None:
        try:
            if asks_for_stream(line.body):
                reply = Reply(400, _STREAM_REFUSED)
            else:
                reply = await self._call(line.endpoint, line.body)
            await self._patiently(lambda: self._settle(line, reply))
        except Exception:
            # The outer wall: a line that breaks whatever is done with it has an end, too.
            log.exception("batch_line_broke", batch=line.batch_id, line=line.number)
            with contextlib.suppress(AgentRayError):  # then its lease ends
                await self._settle(line, Reply(500, _BROKE))

    async def _settle(self, line: ClaimedLine, reply: Reply) -> None:
        found = verdict(reply.status, reply.body, line.attempts)
        if found in ("later", "again"):
            asked_s, now = reply.retry_after_s, self._clock.monotonic()
            self._rests.put_off(line.batch_id, now, asked_s, self._rng.random())
            delay_s = pause_s(line.attempts, asked_s, self._rng.random())
            await self._store.put_off(line, self._name, delay_s, counts=found == "again")
            return
        self._rests.answered(line.batch_id)
        await self._store.record(
            line,
            succeeded=found == "succeeded",
            result=answer(line.batch_id, line.number, line.attempts, reply.status, reply.body),
            usage=usage_of(reply.body),
        )

    async def _patiently(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write what cost a model's work, however long the store is away."""
        while True:
            try:
                await write()
            except StorageUnavailableError as error:
                log.warning("batch_result_waits", error=error.message)
                await asyncio.sleep(self._settings.sweep_s)
            else:
                return
