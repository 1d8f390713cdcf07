"""OpenAI's chat completions: stateless, the whole conversation is in the request."""

from __future__ import annotations

from typing import Any

import msgspec

from agentray.config.settings import AgentSettings
from agentray.errors import AgentRayError
from agentray.http.bodies import ChatCreate
from agentray.http.door import TENANT, Door
from agentray.http.errors import UnsupportedParameterError, describe
from agentray.http.exchange import Exchange, Header
from agentray.http.sse import EventStream, data_frame
from agentray.memory.window import instructions_fragment
from agentray.models.completions import Completion, CompletionStream

__all__ = ["create_chat_completion"]

_create = msgspec.json.Decoder(ChatCreate)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_JSON: Header = (b"content-type", b"application/json")
_MODEL, _ROUTE, _CACHE = b"x-agentray-model", b"x-agentray-route", b"x-agentray-cache"


async def create_chat_completion(door: Door, exchange: Exchange) -> None:
    body = await exchange.decode(_create, door.settings.max_body_bytes, openai=True)
    if body.store:
        raise UnsupportedParameterError(
            "store: true is not supported: completions are stateless", param="store"
        )
    fields: dict[str, Any] = dict(_fields.decode(exchange.raw))
    agent, model = door.resolve(body.model)
    chosen: dict[str, Any] = {}
    if agent is not None:
        spec = _as_agent(door, agent, body, fields)
        chosen = {"preferred": spec.model, "allowed": spec.models, "cache": spec.cache}
    with door.completions.admit():
        answer = await door.models.complete(
            model,
            fields,
            tenant=TENANT,
            session_id=exchange.header(b"x-session-id"),
            **chosen,
        )
        told = _told(answer)
        if isinstance(answer.body, bytes):
            await exchange.reply_bytes(answer.body, _JSON, headers=told)
        else:
            await _stream(door, exchange, answer.body, told)


def _told(answer: Completion) -> tuple[Header, ...]:
    """Return the headers that say which model answered, and why."""
    headers = [
        (_MODEL, answer.model.encode()),
        (_ROUTE, f"{answer.route.kind}: {answer.route.reason}".encode("ascii", "replace")),
    ]
    if answer.cached:
        headers.append((_CACHE, b"hit"))
    return tuple(headers)


def _as_agent(door: Door, agent: str, body: ChatCreate, fields: dict[str, Any]) -> AgentSettings:
    """Give a request what the agent sets, where the caller left it open; return the agent.

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
    return spec


async def _stream(
    door: Door, exchange: Exchange, answer: CompletionStream, told: tuple[Header, ...]
) -> None:
    # The chunks are the model server's, cut anywhere: no comment may come in between.
    stream = EventStream(exchange, door.watchdog, told, comments=False)
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
