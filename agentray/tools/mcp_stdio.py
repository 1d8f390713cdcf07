"""Speak MCP with a program over its standard input and output, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCNotification, JSONRPCRequest, jsonrpc_message_adapter

from agentray.tools.mcp_inbound import Inbound
from agentray.tools.mcp_launch import Started

if TYPE_CHECKING:
    from mcp.client._transport import TransportStreams

__all__ = ["stdio"]

_CHUNK = 64 * 1024
# What a program has not read yet; past it, it counts as hung.
_MOST_UNREAD = 8 * 1024 * 1024
_LEAVE_S = 1.0
_CANCELLED = "notifications/cancelled"

_Items = MemoryObjectSendStream[SessionMessage | Exception]


class _Writer:
    """What the session writes to: never waits, so that nothing can hang on a program that does
    not read."""

    def __init__(self, started: Started, inbound: Inbound) -> None:
        self._stdin = started.stdin
        self._inbound = inbound

    async def send(self, item: SessionMessage, /) -> None:
        message = item.message
        if self._stdin.is_closing() or self._unread() > _MOST_UNREAD:
            raise anyio.BrokenResourceError
        if isinstance(message, JSONRPCRequest):
            self._inbound.asked(message.id)
        elif isinstance(message, JSONRPCNotification) and message.method == _CANCELLED:
            self._inbound.gave_up((message.params or {}).get("requestId"))
        line = message.model_dump_json(by_alias=True, exclude_unset=True)
        self._stdin.write(line.encode() + b"\n")

    def _unread(self) -> int:
        return self._stdin.transport.get_write_buffer_size()

    async def aclose(self) -> None:
        self._stdin.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.aclose()


@asynccontextmanager
async def stdio(
    started: Started, inbound: Inbound, ended: Callable[[], None]
) -> AsyncGenerator[TransportStreams]:
    """Yield the streams of a session with a program, and end it at the end.

    ``ended`` is called when the program ends. One that sends what ``inbound`` does not let pass
    ends the context with that error.
    """
    send, receive = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, started, inbound, send, ended)
            try:
                yield receive, _Writer(started, inbound)
            finally:
                tasks.cancel_scope.cancel()
    finally:
        receive.close()
        send.close()
        await _finished(asyncio.create_task(_leave(started), name="mcp-leave"))


async def _leave(started: Started) -> None:
    started.stdin.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LEAVE_S):
            await started.wait()
    await started.kill()


async def _finished(task: asyncio.Task[None]) -> None:
    """Wait for a task to the end, whoever cancels meanwhile: a program must not stay behind."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def _read(
    started: Started, inbound: Inbound, items: _Items, ended: Callable[[], None]
) -> None:
    buffer = bytearray()
    searched = 0
    async with items:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            while chunk := await started.stdout.read(_CHUNK):
                buffer += chunk
                while (end := buffer.find(b"\n", searched)) >= 0:
                    line = bytes(buffer[:end])
                    del buffer[: end + 1]
                    searched = 0
                    if line.strip() and inbound.wanted(line, time.monotonic()):
                        await items.send(_parsed(line))
                searched = len(buffer)
                inbound.check_size(searched)
                # Reading what is there already gives way to nobody else.
                await asyncio.sleep(0)
    ended()


def _parsed(line: bytes) -> SessionMessage | Exception:
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:
        return error
