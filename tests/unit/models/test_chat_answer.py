"""Which of its deadlines ends a streamed answer, and whose fault that is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import aiohttp
import pytest

from agentray.errors import ModelUnavailableError
from agentray.models.chat_answer import StreamedAnswer
from agentray.models.chat_stream import ChatStream

TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


class Response:
    """A response that has brought some chunks and then brings nothing until it is closed."""

    status = 200
    headers: Mapping[str, str] = {"Content-Type": "text/event-stream"}

    def __init__(self, *chunks: bytes) -> None:
        self.closed = False
        self.content = self
        self._chunks = list(chunks)
        self._end = asyncio.Event()

    async def readany(self) -> bytes:
        if self._chunks:
            return self._chunks.pop(0)
        await self._end.wait()
        raise aiohttp.ClientConnectionError("Connection closed")

    def close(self) -> None:
        self.closed = True
        self._end.set()


@pytest.mark.parametrize(
    ("chunks", "about", "why", "out_of_time"),
    [
        ([], {"first_s": 0.01}, "gave no token in time", False),
        ([], {"end_s": 0.01}, "did not finish in time", False),
        ([], {"end_s": 0.01, "hurried": True}, "did not finish in time", True),
        ([TOKEN], {"end_s": 0.02}, "did not finish in time", True),
        ([TOKEN], {"stall_s": 0.01}, "stalled", False),
        ([TOKEN], {"stall_s": 0.01, "hurried": True}, "stalled", False),
    ],
)
async def test_only_the_steps_own_end_is_no_fault_of_the_models(
    chunks: list[bytes], about: dict[str, Any], why: str, out_of_time: bool
) -> None:
    limits = {"first_s": 60.0, "end_s": 60.0, "stall_s": 60.0, "hurried": False, **about}
    now = asyncio.get_running_loop().time()
    answer = StreamedAnswer(
        cast("aiohttp.ClientResponse", Response(*chunks)),
        ChatStream("m"),
        model="m",
        first_due=now + limits["first_s"],
        end_due=now + limits["end_s"],
        stall_s=limits["stall_s"],
        hurried=limits["hurried"],
        ending=set(),
    )
    for _ in chunks:
        await answer.read()
    with pytest.raises(ModelUnavailableError, match=why) as caught:
        await asyncio.wait_for(answer.read(), 5)
    answer.close()
    assert caught.value.fields.get("out_of_time", False) is out_of_time
