"""Server-sent events: frames as bytes, and streams that one watchdog keeps alive or ends.

A stream costs one ``send`` a batch of events and no task of its own. What is rare is the
watchdog's: it looks at all streams about once a second, sends the comments that keep a silent
connection open, notices clients that left, and drops those that take nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from agentray.config.settings import HttpSettings
from agentray.events import encode_event
from agentray.http.exchange import Exchange, Header
from agentray.http.objects import ResponseEvent
from agentray.sessions.base import Cursor, Delta, StreamItem, item_cursor
from agentray.telemetry.logging import get_logger

__all__ = [
    "EventStream",
    "ModelDelta",
    "Watchdog",
    "comment",
    "data_frame",
    "error_frame",
    "native_frames",
    "response_frames",
]

log = get_logger(__name__)

_encode = msgspec.json.Encoder().encode
_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
_LONGEST_TICK_S = 1.0
_PIECE_BYTES = 64 * 1024


class ModelDelta(msgspec.Struct, frozen=True, tag_field="type", tag="model.delta"):
    """Text of a running model call; it is not in the journal, ``model.finished`` has it whole.

    ``text`` ends ``offset`` characters into the step whose ``model.called`` is number ``seq``.
    """

    turn_id: str
    seq: int
    offset: int
    text: str


def response_frames(events: Iterable[ResponseEvent]) -> bytes:
    """Return OpenAI's events as server-sent ones."""
    return b"".join(
        [b"event: %b\ndata: %b\n\n" % (_name(type(event)), _encode(event)) for event in events]
    )


_names: dict[type, bytes] = {}


def _name(kind: type[msgspec.Struct]) -> bytes:
    name = _names.get(kind)
    if name is None:
        _names[kind] = name = str(kind.__struct_config__.tag).encode()
    return name


def native_frames(items: Iterable[StreamItem], at: Cursor) -> tuple[bytes, Cursor]:
    """Return items of a session's stream behind ``at`` as server-sent events, and the cursor
    behind them; the events' ids are cursors."""
    frames: list[bytes] = []
    for item in items:
        at = item_cursor(item, at)
        if isinstance(item, Delta):
            name = b"model.delta"
            data = _encode(ModelDelta(item.turn_id, item.seq, item.offset, item.text))
        else:
            name, data = _name(type(item)), encode_event(item)
        frames.append(b"id: %d.%d\nevent: %b\ndata: %b\n\n" % (at.seq, at.offset, name, data))
    return b"".join(frames), at


def data_frame(payload: msgspec.Struct) -> bytes:
    """Return an object as an event without a name."""
    return b"data: %b\n\n" % _encode(payload)


def error_frame(payload: msgspec.Struct) -> bytes:
    """Return an error as the last event of a stream."""
    return b"event: error\n" + data_frame(payload)


def comment(text: str) -> bytes:
    """Return a comment: clients ignore it."""
    return b": %b\n\n" % text.encode()


_KEEPALIVE = comment("keep-alive")


class EventStream:
    """One client's stream; use it as a context manager around the following and writing.

    Nothing is sent before the first ``write``: what raises before is still an ordinary error.
    Within the context the current task may be cancelled by the watchdog; that ends the context
    quietly, and ``ended_by`` says why: the client left (``gone``) or takes nothing (``slow``), or
    the host drains and this is a tail (``drain``), which can still be written to.

    ``opening`` gives what to send to a client that waits for its first event. Without
    ``comments`` a silent connection is not kept open: what is written need not end an event.
    """

    __slots__ = (
        "_exchange",
        "_headers",
        "_loop",
        "_opening",
        "_task",
        "_watchdog",
        "comments",
        "ended_by",
        "idle_since",
        "listener",
        "tail",
        "writing_since",
    )

    def __init__(
        self,
        exchange: Exchange,
        watchdog: Watchdog,
        headers: Sequence[Header] = (),
        *,
        opening: Callable[[], bytes] | None = None,
        tail: bool = False,
        comments: bool = True,
    ) -> None:
        self._exchange = exchange
        self._watchdog = watchdog
        self._headers = headers
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self.listener: asyncio.Task[None] | None = None
        self.ended_by: Literal["gone", "slow", "drain"] | None = None
        self.idle_since = self._loop.time()
        self.writing_since: float | None = None
        self._opening = opening
        self.tail = tail
        self.comments = comments

    async def write(self, frames: bytes, *, last: bool = False) -> None:
        """Send frames; returns when there is room for more."""
        # The server takes in whatever it is given at once, and waits for room only then.
        at = 0
        while len(frames) - at > _PIECE_BYTES:
            await self._send(frames[at : at + _PIECE_BYTES], last=False)
            self.writing_since = self._loop.time()
            at += _PIECE_BYTES
        await self._send(frames[at:], last=last)

    async def _send(self, frames: bytes, *, last: bool) -> None:
        exchange = self._exchange
        self.writing_since = now = self._loop.time()
        if not exchange.started:
            exchange.started = True
            headers = [*_HEADERS, *self._headers]
            await exchange.send({"type": "http.response.start", "status": 200, "headers": headers})
        await exchange.send({"type": "http.response.body", "body": frames, "more_body": not last})
        self.writing_since = None
        self.idle_since = now

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._watchdog.add(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._watchdog.remove(self)
        if self.listener is not None:
            self.listener.cancel()
        if self.ended_by == "slow":
            self._exchange.abort()
        if self.ended_by is None or self._task is None:
            return False
        # Somebody else may have cancelled the request too: that goes on.
        ours_alone = self._task.uncancel() == 0
        return ours_alone and kind is not None and issubclass(kind, asyncio.CancelledError)

    def end(self, reason: Literal["gone", "slow", "drain"]) -> None:
        """Leave the context, for this reason."""
        if self.ended_by is None and self._task is not None:
            self.ended_by = reason
            self._task.cancel()

    @property
    def unopened(self) -> bool:
        """Whether the client waits for its first event, and there is something to tell it."""
        return self._opening is not None and not self._exchange.started

    async def keep_alive(self) -> None:
        """Send what opens the stream if nothing was sent yet, else a comment."""
        if self.writing_since is not None:
            return  # a comment in the middle of a frame would spoil it
        opening = None if self._exchange.started else self._opening
        await self.write(opening() if opening else _KEEPALIVE)

    async def until_gone(self) -> None:
        """End the stream when its client leaves."""
        while (await self._exchange.receive())["type"] != "http.disconnect":
            pass
        self.end("gone")


class Watchdog:
    """Watches all streams of the process. ``draining`` is set when the host drains."""

    def __init__(self, settings: HttpSettings, draining: asyncio.Event) -> None:
        self._keepalive_s = settings.keepalive_s
        self._write_timeout_s = settings.stream_write_timeout_s
        self._tick_s = min(_LONGEST_TICK_S, self._keepalive_s / 2, self._write_timeout_s / 2)
        self._draining = draining
        self._streams: set[EventStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: EventStream) -> None:
        """Watch a stream."""
        self._streams.add(stream)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._tick_s, self._tick, loop)

    def remove(self, stream: EventStream) -> None:
        """Watch a stream no longer."""
        self._streams.discard(stream)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if not self._streams:
            return
        self._timer = loop.call_later(self._tick_s, self._tick, loop)
        now = loop.time()
        for stream in self._streams:
            self._look_at(stream, now)

    def _look_at(self, stream: EventStream, now: float) -> None:
        if stream.writing_since is not None:
            if now - stream.writing_since >= self._write_timeout_s:
                log.info("stream_dropped", reason="slow_reader")
                stream.end("slow")
            return
        if stream.tail and self._draining.is_set():
            stream.end("drain")
            return
        if stream.listener is None:
            # Only now: most streams are over before it would be worth a task.
            stream.listener = self._start(stream.until_gone())
        if not stream.comments:
            return
        idle_s = now - stream.idle_since
        if idle_s >= self._keepalive_s or (stream.unopened and idle_s >= self._tick_s / 2):
            self._start(stream.keep_alive())

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("stream_watch_failed", error=repr(error))
