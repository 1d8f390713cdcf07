"""Receive one streamed answer: read by read, under its deadlines, until it is whole."""

from __future__ import annotations

import asyncio

import aiohttp

from agentray.events import Usage
from agentray.models.chat_stream import ChatStream
from agentray.models.refusals import unavailable

__all__ = ["RawStream", "StreamedAnswer", "shown"]

# Time for the last bytes behind the end of an answer, so that its connection can be used again.
LINGER_S = 1.0


class StreamedAnswer:
    """One streamed answer under way, with the one timer that watches over its deadlines.

    The first token is due at ``first_due``, everything at ``end_due`` (both in the loop's time),
    and in between no read may wait longer than ``stall_s``. Time that the consumer takes between
    two reads is its own and only ``end_due`` looks at it. An answer that has begun by ``end_due``
    was only ``out_of_time``, as is one that was ``hurried`` to begin.

    ``ending`` holds the responses whose answer is whole and whose body's end is still to come;
    whoever owns it closes them in the end.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        chat: ChatStream,
        *,
        model: str,
        first_due: float,
        end_due: float,
        stall_s: float,
        hurried: bool,
        ending: set[aiohttp.ClientResponse],
    ) -> None:
        self.text = ""
        """What the last read brought."""
        self._response = response
        self._content = response.content
        self._chat = chat
        self._model = model
        self._end_due = end_due
        self._stall_s = stall_s
        self._hurried = hurried
        self._ending = ending
        self._loop = asyncio.get_running_loop()
        self._due = first_due
        self._began = False
        self._advanced = False
        self._reading = False
        self._late: str | None = None
        self._out_of_time = False
        self._timer = self._loop.call_at(min(first_due, end_due), self._look)

    async def read(self) -> bytes:
        """Return the next bytes, with their text in ``text``; none when the stream is over."""
        chat = self._chat
        self.text = ""
        if chat.done:
            return b""
        self._reading = True
        if self._advanced:
            self._due = self._loop.time() + self._stall_s
        chunks = chat.chunks
        try:
            data = await self._content.readany()
            if data:
                self.text = chat.feed(data)
        except (aiohttp.ClientError, OSError) as error:
            if chat.finish_reason is not None:
                return b""
            why = self._late or f"broke off: {shown(error)}"
            facts = {"out_of_time": True} if self._out_of_time else {}
            raise unavailable(self._model, why, **facts) from error
        finally:
            self._reading = False
        # Comments that only keep the connection open are no progress.
        self._advanced = chat.started and chat.chunks != chunks
        if self._advanced and not self._began:
            self._began = True
            self._due = self._loop.time() + self._stall_s
            self._timer.cancel()
            self._timer = self._loop.call_at(min(self._due, self._end_due), self._look)
        return data

    def close(self) -> None:
        """End the call; a connection whose answer is whole can be used again."""
        self._timer.cancel()
        if self._response.closed:
            return  # Its end was received, and its connection is free already.
        if self._chat.done:
            # The end of the body follows the end of the stream; then the response frees its
            # connection by itself.
            self._ending.add(self._response)
            self._loop.call_later(LINGER_S, self._end)
        else:
            self._response.close()

    def _end(self) -> None:
        self._ending.discard(self._response)
        self._response.close()

    def _look(self) -> None:
        now = self._loop.time()
        if now >= self._end_due:
            self._late = "did not finish in time"
            self._out_of_time = self._began or self._hurried
        elif not self._reading:
            self._due = now + self._stall_s
        elif now >= self._due:
            self._late = "stalled" if self._began else "gave no token in time"
        if self._late is None:
            self._timer = self._loop.call_at(min(self._due, self._end_due), self._look)
        else:
            # The read that waits ends with an error of aiohttp's.
            self._response.close()


class RawStream:
    """The bytes of a streamed answer as they came, checked on their way, in whole lines.

    Raises while iterating what ``ModelClient.stream`` raises; bytes that are wrong are not passed
    on. ``usage`` is known at the end, if the endpoint gives it. ``first`` are the bytes that were
    read already, and ``text`` is what is in them.
    """

    def __init__(self, answer: StreamedAnswer, chat: ChatStream, first: bytes, text: str) -> None:
        self._answer = answer
        self._chat = chat
        self._texts = [text]
        # What follows the last whole line is passed on with its rest: what breaks off within a
        # line can be gone on with, or be told, on a new one.
        end = first.rfind(b"\n") + 1
        self._next, self._rest = first[:end], first[end:]

    @property
    def text(self) -> str:
        """The text of the answer in what was passed on."""
        return "".join(self._texts)

    @property
    def calls_tools(self) -> bool:
        """Whether a tool call has begun in it."""
        return self._chat.calls_tools

    @property
    def ended(self) -> bool:
        """Whether the answer said why it ends."""
        return self._chat.finish_reason is not None

    @property
    def usage(self) -> Usage:
        """The tokens that the endpoint has reported so far."""
        return self._chat.usage

    @property
    def chunks(self) -> int:
        """The chunks that came so far: about as many as there are tokens."""
        return self._chat.chunks

    def __aiter__(self) -> RawStream:
        return self

    async def __anext__(self) -> bytes:
        if chunk := self._next:
            self._next = b""
            return chunk
        try:
            while data := await self._answer.read():
                if text := self._answer.text:
                    self._texts.append(text)
                if self._rest:
                    data = self._rest + data
                end = data.rfind(b"\n") + 1
                self._rest = data[end:]
                if end:
                    return data if end == len(data) else data[:end]
            self._chat.finish()
            if not self._chat.done:
                # It was whole, but for the mark of its end.
                self._chat.done = True
                return b"\n\ndata: [DONE]\n\n"
        except BaseException:
            self._answer.close()
            raise
        self._answer.close()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the call if it has not ended; harmless to repeat."""
        self._answer.close()


def shown(error: Exception) -> str:
    """Return what can be said of an error of the connection's."""
    return str(error)[:200] or type(error).__name__
