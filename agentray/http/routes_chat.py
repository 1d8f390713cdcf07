"""OpenAI's chat completions: stateless, the whole conversation is in the request."""

from __future__ import annotations

from typing import Any

import msgspec

from agentray.errors import AgentRayError
from agentray.http.bodies import ChatCreate
from agentray.http.door import Door
from agentray.http.errors import UnsupportedParameterError, describe
from agentray.http.exchange import Exchange, Header
from agentray.http.sse import EventStream, data_frame
from agentray.memory.window import instructions_fragment
from agentray.models.client import RawStream

__all__ = ["create_chat_completion"]

_create = msgspec.json.Decoder(ChatCreate)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_JSON: Header = (b"content-type", b"application/json")


async def create_chat_completion(door: Door, exchange: Exchange) -> None:
    body = await exchange.decode(_create, door.settings.max_body_bytes, openai=True)
    if body.store:
        raise UnsupportedParameterError(
            "store: true is not supported: completions are stateless", param="store"
        )
    fields: dict[str, Any] = dict(_fields.decode(exchange.raw))
    agent, model = door.resolve(body.model)
    if agent is not None:
        model = _as_agent(door, agent, body, fields)
    assert model is not None
    with door.completions.admit():
        answer = await door.models.complete_raw(
            model, fields, session_id=exchange.header(b"x-session-id")
        )
        if isinstance(answer, bytes):
            await exchange.reply_bytes(answer, _JSON)
        else:
            await _stream(door, exchange, answer)


def _as_agent(door: Door, agent: str, body: ChatCreate, fields: dict[str, Any]) -> str:
    """Give a request what the agent sets, where the caller left it open; return its model.

    Its tools are not offered: only a session runs them. The caller's own go to the model.
    """
    spec = door.agents[agent]
    instructions = instructions_fragment(spec.instructions)
    if instructions:
        messages = bytes(fields["messages"]).strip()
        fields["messages"] = msgspec.Raw(b"[" + instructions + b"," + messages[1:])
    if spec.temperature is not None and body.temperature is None:
        fields["temperature"] = spec.temperature
    limited = body.max_tokens is not None or body.max_completion_tokens is not None
    if spec.max_output_tokens is not None and not limited:
        fields["max_completion_tokens"] = spec.max_output_tokens
    return spec.model or door.catalog.default


async def _stream(door: Door, exchange: Exchange, answer: RawStream) -> None:
    # The chunks are the model server's, cut anywhere: no comment may come in between.
    stream = EventStream(exchange, door.watchdog, comments=False)
    try:
        async with stream:
            try:
                async for chunk in answer:
                    await stream.write(chunk)
            except AgentRayError as error:
                await stream.write(b"\n\n" + data_frame(describe(error)), last=True)
                return
            await stream.write(b"", last=True)
    finally:
        await answer.aclose()
