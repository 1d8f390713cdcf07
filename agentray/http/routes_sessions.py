"""agentray's own routes: sessions, their turns, and the stream of what happens in them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from agentray.errors import AgentRayError, CursorError, InvalidRequestError
from agentray.events import AnyEvent, TurnFinished
from agentray.http.bodies import (
    Cancel,
    EventsQuery,
    SessionCreate,
    SessionsQuery,
    TurnCreate,
    native_messages,
    turn_options,
)
from agentray.http.door import TENANT, Door, turn_id_of
from agentray.http.errors import describe
from agentray.http.exchange import Exchange, Header, check_idempotency_key
from agentray.http.haproxy import NEW_SESSION_HEADER
from agentray.http.items import turn_events
from agentray.http.objects import Deleted
from agentray.http.sse import EventStream, ModelDelta, comment, error_frame, native_frames
from agentray.ids import check_name, check_session_id
from agentray.sessions.base import Cursor, Delta, SessionInfo, StreamItem

__all__ = [
    "CancelledTurns",
    "EventPage",
    "SessionPage",
    "StreamEvent",
    "cancel_turns",
    "create_session",
    "create_turn",
    "delete_session",
    "list_sessions",
    "read_events",
    "retrieve_session",
    "retrieve_turn",
]

_session_create = msgspec.json.Decoder(SessionCreate)
_turn_create = msgspec.json.Decoder(TurnCreate)
_cancel = msgspec.json.Decoder(Cancel)
_NEW_SESSION_HEADER = NEW_SESSION_HEADER.encode()


class SessionPage(msgspec.Struct, frozen=True):
    """A page of sessions, newest first; ``next`` is the ``after`` of the page behind it."""

    data: list[SessionInfo]
    has_more: bool
    next: str | None


class EventPage(msgspec.Struct, frozen=True):
    """A page of a session's journal, in order."""

    data: list[AnyEvent]
    has_more: bool


StreamEvent = AnyEvent | ModelDelta


class CancelledTurns(msgspec.Struct, frozen=True):
    """The turns whose end was requested; it shows in their ``turn.finished``."""

    cancelled: list[str]


async def create_session(door: Door, exchange: Exchange) -> None:
    body = await exchange.decode(_session_create, door.settings.max_body_bytes)
    session, new = await door.sessions.create(
        TENANT,
        session_id=body.id or exchange.header(_NEW_SESSION_HEADER),
        agent=body.agent,
        user=None if body.user is None else check_name(body.user, param="user"),
        placement=body.placement,
        ttl_s=body.ttl_s,
        metadata=body.metadata,
    )
    await exchange.reply(session, status=201 if new else 200)


async def list_sessions(door: Door, exchange: Exchange) -> None:
    query = exchange.query(SessionsQuery)
    sessions, following = await door.sessions.list(
        TENANT,
        user=None if query.user is None else check_name(query.user, param="user"),
        agent=None if query.agent is None else check_name(query.agent, param="agent"),
        status=query.status,
        after=None if query.after is None else check_name(query.after, param="after"),
        limit=query.limit,
    )
    await exchange.reply(SessionPage(list(sessions), following is not None, following))


async def retrieve_session(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    await exchange.reply(await door.sessions.get(TENANT, session_id))


async def delete_session(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    await door.sessions.delete(TENANT, session_id)
    await exchange.reply(Deleted(session_id, "session.deleted"))


async def create_turn(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    body = await exchange.decode(_turn_create, door.settings.max_body_bytes)
    key = body.idempotency_key
    if key is None:
        key = exchange.idempotency_key()
    else:
        check_idempotency_key(key)
    door.check_model(body.model)
    turn = await door.sessions.submit(
        TENANT,
        session_id,
        native_messages(body.input),
        options=turn_options(body, body.model),
        if_busy=body.if_busy,
        idempotency_key=key,
    )
    if body.stream:
        items = door.sessions.follow(TENANT, session_id, turn_id=turn.id)
        headers: list[Header] = [(b"x-agentray-turn-id", turn.id.encode())]
        stream = EventStream(exchange, door.watchdog, headers, opening=lambda: comment("waiting"))
        await _follow(stream, exchange, items, Cursor(0), bounded=True)
    elif body.background:
        await exchange.reply(turn, status=202)
    else:
        done = await door.sessions.wait(TENANT, session_id, turn.id)
        # The key is not in the journal, from which that is told.
        await exchange.reply(replace(done, idempotency_key=turn.idempotency_key))


async def retrieve_turn(door: Door, exchange: Exchange) -> None:
    session_id, turn_id = check_session_id(exchange.params[0]), turn_id_of(exchange.params[1])
    await exchange.reply(await door.sessions.turn(TENANT, session_id, turn_id))


async def cancel_turns(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    body = await exchange.decode(_cancel, door.settings.max_body_bytes)
    turn_id = None if body.turn_id is None else turn_id_of(body.turn_id)
    cancelled = await door.sessions.cancel(TENANT, session_id, turn_id)
    if not cancelled and turn_id is not None:
        # Asked for twice, it is still true.
        turn = await door.sessions.turn(TENANT, session_id, turn_id)
        cancelled = [turn_id] if turn.status == "cancelled" else []
    if not cancelled:
        what = "no turn of this session runs or waits" if turn_id is None else "the turn has ended"
        raise InvalidRequestError(f"there is nothing to cancel: {what}", param="turn_id")
    await exchange.reply(CancelledTurns(cancelled))


async def read_events(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    query = exchange.query(EventsQuery)
    turn_id = None if query.turn_id is None else turn_id_of(query.turn_id)
    streamed = "text/event-stream" in (exchange.header(b"accept") or "")
    given = query.after
    if given is None and streamed:
        given = exchange.header(b"last-event-id")
    cursor = _cursor(given or "0")
    if streamed:
        await _stream_events(door, exchange, session_id, cursor, turn_id)
    else:
        await _page_events(door, exchange, session_id, cursor.seq, query.limit, turn_id)


def _cursor(text: str) -> Cursor:
    seq, _, offset = text.partition(".")
    digits = seq.isdecimal() and (not offset or offset.isdecimal())
    if not digits or not text.isascii() or len(text) > 31:
        raise CursorError("a cursor is SEQ or SEQ.OFFSET", param="after")
    return Cursor(int(seq), int(offset or 0))


def _check_cursor(session: SessionInfo, seq: int) -> None:
    if seq > session.last_seq:
        raise CursorError(
            f"the cursor {seq} lies in the future: the session is at {session.last_seq}",
            param="after",
        )


async def _page_events(
    door: Door, exchange: Exchange, session_id: str, after: int, limit: int, turn_id: str | None
) -> None:
    sessions = door.sessions
    if turn_id is None:
        events, more = await sessions.events(TENANT, session_id, after=after, limit=limit)
        await exchange.reply(EventPage(list(events), more))
        return
    turn = await sessions.turn(TENANT, session_id, turn_id)
    own = [event for event in await turn_events(sessions, session_id, turn) if event.seq > after]
    if not own:
        _check_cursor(await sessions.get(TENANT, session_id), after)
    await exchange.reply(EventPage(own[:limit], len(own) > limit))


async def _stream_events(
    door: Door, exchange: Exchange, session_id: str, cursor: Cursor, turn_id: str | None
) -> None:
    # The stream may have nothing to say for long: what is wrong with it is found out now.
    _check_cursor(await door.sessions.get(TENANT, session_id), cursor.seq)
    if turn_id is not None:
        await door.sessions.turn(TENANT, session_id, turn_id)
    items = door.sessions.follow(TENANT, session_id, after=cursor, turn_id=turn_id)
    stream = EventStream(exchange, door.watchdog, tail=True)
    await stream.write(comment("following"))
    await _follow(stream, exchange, items, cursor, bounded=turn_id is not None)


async def _follow(
    stream: EventStream,
    exchange: Exchange,
    items: AsyncIterator[list[StreamItem]],
    cursor: Cursor,
    *,
    bounded: bool,
) -> None:
    """Pass a stream on to its end; a tail that ends with its host can be taken up at its id.

    One that is ``bounded`` is of one turn and ends with it.
    """
    at = cursor
    async with stream, aclosing(cast("Any", items)):
        try:
            async for batch in items:
                behind = _behind(batch, cursor)
                if behind:
                    last = behind[-1]
                    ended = bounded and isinstance(last, TurnFinished)
                    frames, at = native_frames(behind, at)
                    await stream.write(frames, last=ended)
                    if ended:
                        return
        except AgentRayError as error:
            if not exchange.started:
                raise
            await stream.write(error_frame(describe(error)), last=True)
            return
    if stream.ended_by == "drain":
        await stream.write(
            comment(f"this host stops: resume after {at.seq}.{at.offset}"), last=True
        )
    elif stream.ended_by is None:
        await stream.write(b"", last=True)


def _behind(batch: list[StreamItem], cursor: Cursor) -> list[StreamItem]:
    """Return a batch without the text in front of the cursor: deltas may straddle it."""
    if not cursor.offset:
        return batch
    cut: list[StreamItem] = []
    for item in batch:
        if isinstance(item, Delta) and item.seq == cursor.seq:
            if item.offset <= cursor.offset:
                continue
            if item.offset - len(item.text) < cursor.offset:
                text = item.text[cursor.offset - item.offset :]
                cut.append(Delta(item.turn_id, item.seq, item.offset, text))
                continue
        cut.append(item)
    return cut
