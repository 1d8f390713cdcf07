"""OpenAI's conversations: sessions by another name."""

from __future__ import annotations

import msgspec

from agentray.http.bodies import ConversationCreate, ConversationUpdate, ItemsQuery
from agentray.http.door import TENANT, Door
from agentray.http.exchange import Exchange
from agentray.http.haproxy import NEW_SESSION_HEADER
from agentray.http.items import (
    conversation_items,
    find_item,
    input_items,
    turn_events,
    turn_items,
    turn_of_item,
)
from agentray.http.objects import Conversation, Deleted
from agentray.ids import check_session_id, new_conversation_id
from agentray.sessions.base import SessionInfo

__all__ = [
    "create_conversation",
    "delete_conversation",
    "list_items",
    "retrieve_conversation",
    "retrieve_item",
    "update_conversation",
]

_create = msgspec.json.Decoder(ConversationCreate)
_update = msgspec.json.Decoder(ConversationUpdate)
_NEW_SESSION_HEADER = NEW_SESSION_HEADER.encode()


def _shown(session: SessionInfo) -> Conversation:
    return Conversation(session.id, int(session.created_at), session.metadata)


async def create_conversation(door: Door, exchange: Exchange) -> None:
    body = await exchange.decode(_create, door.settings.max_body_bytes, openai=True)
    session, _ = await door.sessions.create(
        TENANT,
        session_id=exchange.header(_NEW_SESSION_HEADER) or new_conversation_id(),
        agent=body.agent,
        metadata=body.metadata,
        origin="conversation",
    )
    await exchange.reply(_shown(session))


async def retrieve_conversation(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    await exchange.reply(_shown(await door.sessions.get(TENANT, session_id)))


async def update_conversation(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    body = await exchange.decode(_update, door.settings.max_body_bytes, openai=True)
    metadata = body.metadata or {}
    await exchange.reply(_shown(await door.sessions.update(TENANT, session_id, metadata=metadata)))


async def delete_conversation(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    await door.sessions.delete(TENANT, session_id)
    await exchange.reply(Deleted(session_id, "conversation.deleted"))


async def list_items(door: Door, exchange: Exchange) -> None:
    query = exchange.query(ItemsQuery)
    session_id = check_session_id(exchange.params[0])
    page = await conversation_items(
        door.sessions, session_id, after=query.after, limit=query.limit, order=query.order
    )
    await exchange.reply(page)


async def retrieve_item(door: Door, exchange: Exchange) -> None:
    session_id, item_id = check_session_id(exchange.params[0]), exchange.params[1]
    turn = await door.sessions.turn(TENANT, session_id, turn_of_item(item_id))
    if turn.first_seq is None:
        items = input_items(turn.id, turn.input)
    else:
        items = turn_items(await turn_events(door.sessions, session_id, turn))
    await exchange.reply(find_item(items, item_id))
