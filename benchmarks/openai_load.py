"""Drive conversations with the ``openai`` package as it is, in the protocol of ``load``.

The kinds are ``header`` (with an ``x-session-id`` header of the caller's) and ``plain`` (with
nothing but the conversation in the body).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from openai import AsyncOpenAI

from benchmarks.answers import WrongAnswerError
from benchmarks.load import Client, Round, Turn, now, serve

_conversations: dict[str, str] = {}


async def _conversation(openai: AsyncOpenAI, client: Client) -> str:
    """Return the conversation of a client; made at its first round, then kept."""
    found = _conversations.get(client.session)
    if found is None:
        found = _conversations[client.session] = (await openai.conversations.create()).id
    return found


def _turn_of(openai: AsyncOpenAI, client: Client, conversation: str, kind: str) -> Turn:
    headers = {"x-session-id": conversation} if kind == "header" else {}

    async def turn() -> float:
        first = 0.0
        text, status = "", ""
        stream = await openai.responses.create(
            model="assistant",
            input=client.body,
            conversation=conversation,
            stream=True,
            extra_headers=headers,
        )
        async for event in stream:
            if event.type == "response.output_text.delta":
                first = first or now()
                text += event.delta
            elif event.type == "response.completed":
                status = event.response.status or ""
                if event.response.output_text != text:
                    raise WrongAnswerError(f"deltas {text!r} are not {event.response!r}")
        if status != "completed" or text != client.expect:
            raise WrongAnswerError(f"expected {client.expect!r}, got {text!r}, {status!r}")
        return first

    return turn


@asynccontextmanager
async def _openai(spec: Round) -> AsyncIterator[Sequence[Turn]]:
    async with AsyncOpenAI(base_url=f"http://{spec.address}/v1", api_key="none") as openai:
        turns: list[Turn] = []
        for client in spec.clients:
            conversation = await _conversation(openai, client)
            turns.append(_turn_of(openai, client, conversation, spec.kind))
        yield turns


def main() -> None:
    """Serve rounds."""
    import uvloop

    serve(_openai, uvloop.run)


if __name__ == "__main__":
    main()
