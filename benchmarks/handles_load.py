"""Drive sessions by Python handles, as ``benchmarks.load`` does over HTTP, from one driver.

``python -m benchmarks.handles_load DATA_DIR``. The kinds are ``send`` (await the turn) and
``stream`` (iterate over its events and deltas).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from agentray.client.handles import Connection, SessionHandle, connect
from agentray.events import ModelFinished, TurnFinished
from benchmarks.answers import WrongAnswerError
from benchmarks.load import Client, Round, Turn, now, serve


def _turn_of(kind: str, handle: SessionHandle, client: Client) -> Turn:
    async def send() -> float:
        turn = await handle.send.remote(client.body)
        if turn.status != "completed" or turn.text != client.expect:
            raise WrongAnswerError(f"expected {client.expect!r}, got {turn!r}")
        return now()

    async def stream() -> float:
        first = 0.0
        text, ended = "", False
        async for item in handle.stream.remote(client.body):
            if isinstance(item, TurnFinished):
                ended = item.status == "completed"
            elif isinstance(item, ModelFinished):
                text = item.text
            first = first or (now() if getattr(item, "text", "") else 0.0)
        if not ended or text != client.expect:
            raise WrongAnswerError(f"expected {client.expect!r}, got {text!r}, ended: {ended}")
        return first

    return stream if kind == "stream" else send


def main() -> None:
    """Serve rounds."""
    connection: Connection = connect(data_dir=sys.argv[1])
    handles: dict[str, SessionHandle] = {}

    @asynccontextmanager
    async def with_handles(spec: Round) -> AsyncIterator[Sequence[Turn]]:
        for client in spec.clients:
            if client.session not in handles:
                handles[client.session] = connection.session(client.session)
        yield [_turn_of(spec.kind, handles[client.session], client) for client in spec.clients]

    # One loop for all rounds: the handles belong to it.
    loop = asyncio.new_event_loop()
    serve(with_handles, loop.run_until_complete)


if __name__ == "__main__":
    main()
