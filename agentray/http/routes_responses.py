"""OpenAI's responses: create, stream, retrieve, resume, cancel, and what was put in."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from hashlib import blake2b
from typing import Any, cast

import msgspec

from agentray.errors import (
    AgentRayError,
    CursorError,
    InvalidRequestError,
    SessionBusyError,
    SessionNotFoundError,
)
from agentray.events import Message, TurnOptions
from agentray.http.bodies import (
    ItemsQuery,
    ResponseCreate,
    RetrieveQuery,
    response_messages,
    turn_options,
)
from agentray.http.door import TENANT, Door
from agentray.http.exchange import Exchange
from agentray.http.haproxy import NEW_SESSION_HEADER
from agentray.http.items import input_items, page_of, turn_events
from agentray.http.objects import ErrorEvent, Response
from agentray.http.response_object import begin, one_message
from agentray.http.responses import ResponseFold, attempt_number
from agentray.http.retries import Attempt, attempt_of, earlier_attempt
from agentray.http.sse import EventStream, response_frames
from agentray.ids import (
    check_name,
    check_session_id,
    new_session_id,
    response_id,
    split_response_id,
)
from agentray.sessions.base import TurnInfo

__all__ = ["cancel_response", "create_response", "list_input_items", "retrieve_response"]

_create = msgspec.json.Decoder(ResponseCreate)
_CANCEL_WAIT_S = 5.0
_NEW_SESSION_HEADER = NEW_SESSION_HEADER.encode()


class _Request(msgspec.Struct, frozen=True):
    """A create, decoded and checked; ``key`` is the caller's idempotency key."""

    messages: list[Message]
    options: TurnOptions
    agent: str | None
    user: str | None
    key: str | None
    attempt: Attempt | None

    @property
    def turn_key(self) -> str | None:
        return self.key or (self.attempt.key() if self.attempt else None)

    def session_for_key(self) -> str | None:
        # A repeated create must find the session that the first one made.
        if self.key is None:
            return None
        return "sess_" + blake2b(self.key.encode(), digest_size=16, person=b"responses").hexdigest()


async def create_response(door: Door, exchange: Exchange) -> None:
    body = await exchange.decode(_create, door.settings.max_body_bytes, openai=True)
    body.check()
    agent, model = door.resolve(body.model)
    key = exchange.idempotency_key()
    request = _Request(
        response_messages(body.input),
        turn_options(body, model),
        agent,
        None if body.user is None else check_name(body.user, param="user"),
        key,
        attempt_of(exchange) if key is None else None,
    )
    previous = body.previous_response_id
    if body.conversation is not None:
        given = body.conversation
        session_id = check_session_id(
            given if isinstance(given, str) else given.id, param="conversation"
        )
    elif previous is not None:
        session_id, _ = split_response_id(previous, param="previous_response_id")
    else:
        session_id = None
    session_id, turn = await _accepted(door, exchange, request, session_id, previous)
    response = begin(
        session_id,
        turn,
        agent=agent or door.default_agent,
        previous=previous,
        conversation=body.conversation is not None,
    )
    if body.stream:
        whole = await _stream(door, exchange, session_id, turn, response, after=-1)
    else:
        if not body.background:
            turn = await door.sessions.wait(TENANT, session_id, turn.id)
        await exchange.reply(await _written(door, session_id, turn, response))
        whole = not exchange.gone
    if whole and request.attempt is not None:
        door.answers.given(turn.id)


async def _accepted(
    door: Door, exchange: Exchange, request: _Request, session_id: str | None, previous: str | None
) -> tuple[str, TurnInfo]:
    """Return the session and the turn that the request made, now or when it was sent before."""
    attempt = request.attempt
    if attempt is not None and attempt.repeated:
        # What is sent to a conversation is in that conversation or nowhere.
        elsewhere = session_id is None or previous is not None
        found = await earlier_attempt(door, attempt, session_id, elsewhere=elsewhere)
        if found is not None:
            return found
    elif attempt is not None:
        door.answers.asked(attempt.fingerprint)
    if session_id is None:
        session_id = (
            request.session_for_key() or exchange.header(_NEW_SESSION_HEADER) or new_session_id()
        )
        await door.sessions.create(
            TENANT,
            session_id=session_id,
            agent=request.agent,
            user=request.user,
            metadata=attempt.metadata if attempt else None,
            origin="response",
        )
    else:
        await door.check_agent(session_id, request.agent)
    after_turn = None
    if previous is not None:
        _, after_turn = split_response_id(previous, param="previous_response_id")
    try:
        return session_id, await _submit(door, request, session_id, after_turn)
    except SessionBusyError:
        if after_turn is None:
            raise
    session_id = await _forked(door, request, session_id, after_turn)
    return session_id, await _submit(door, request, session_id, None)


async def _submit(
    door: Door, request: _Request, session_id: str, after_turn: str | None
) -> TurnInfo:
    return await door.sessions.submit(
        TENANT,
        session_id,
        request.messages,
        options=request.options,
        idempotency_key=request.turn_key,
        after_turn=after_turn,
    )


async def _forked(door: Door, request: _Request, session_id: str, after_turn: str) -> str:
    """Return a new session that has the old one's events up to an earlier response."""
    new_id = request.session_for_key()
    if new_id is not None:
        try:
            return (await door.sessions.get(TENANT, new_id)).id
        except SessionNotFoundError:
            pass
    forked = await door.sessions.fork(TENANT, session_id, after_turn=after_turn, new_id=new_id)
    if request.attempt is not None:
        metadata = forked.metadata | request.attempt.metadata
        await door.sessions.update(TENANT, forked.id, metadata=metadata)
    return forked.id


async def _written(door: Door, session_id: str, turn: TurnInfo, response: Response) -> Response:
    """Return a response as far as it has come."""
    if turn.first_seq is None:
        return response
    if (whole := one_message(response, turn)) is not None:
        return whole
    fold = ResponseFold(response, turn.id)
    fold.feed(await turn_events(door.sessions, session_id, turn))
    return fold.response


async def _stream(
    door: Door,
    exchange: Exchange,
    session_id: str,
    turn: TurnInfo,
    response: Response,
    *,
    after: int,
) -> bool:
    """Stream a response; return whether its client was given all of it."""
    fold = ResponseFold(response, turn.id, after=after)
    headers = ((b"x-agentray-response-id", response.id.encode()),)

    def opening() -> bytes:
        return response_frames(fold.queued())

    stream = EventStream(exchange, door.watchdog, headers, opening=opening)
    items = door.sessions.follow(TENANT, session_id, turn_id=turn.id)
    async with stream, aclosing(cast("Any", items)):
        try:
            async for batch in items:
                events = fold.feed(batch)
                if events or fold.done:
                    await stream.write(response_frames(events), last=fold.done)
                if fold.done:
                    return not exchange.gone
        except AgentRayError as error:
            if not exchange.started:
                raise
            # Its number is that of the last event: whoever resumes behind it misses nothing.
            event = ErrorEvent(
                sequence_number=fold.last_number, code=error.code, message=error.message
            )
            await stream.write(response_frames([event]), last=True)
    return False


async def retrieve_response(door: Door, exchange: Exchange) -> None:
    query = exchange.query(RetrieveQuery)
    session_id, turn_id = split_response_id(exchange.params[0])
    turn, response = await _found(door, session_id, turn_id)
    if not query.stream:
        await exchange.reply(await _written(door, session_id, turn, response))
        return
    after = -1 if query.starting_after is None else query.starting_after
    await _check_cursor(door, session_id, turn, after)
    await _stream(door, exchange, session_id, turn, response, after=after)


async def _found(door: Door, session_id: str, turn_id: str) -> tuple[TurnInfo, Response]:
    turn = await door.sessions.turn(TENANT, session_id, turn_id)
    session = await door.sessions.get(TENANT, session_id)
    previous = None
    chained = session.origin == "response"
    if chained and turn.first_seq is not None and turn.first_seq > 1:
        # Turns do not overlap: the event before belongs to the turn before.
        events, _ = await door.sessions.events(
            TENANT, session_id, after=turn.first_seq - 2, limit=1
        )
        previous = response_id(session_id, events[0].turn_id)
    response = begin(
        session_id, turn, agent=session.agent, previous=previous, conversation=not chained
    )
    return turn, response


async def _check_cursor(door: Door, session_id: str, turn: TurnInfo, after: int) -> None:
    """Refuse a number that no event of the response can have yet."""
    if after <= 2:
        return
    last_seq = turn.last_seq or (await door.sessions.get(TENANT, session_id)).last_seq
    if turn.first_seq is None or turn.first_seq + attempt_number(after) > last_seq:
        raise CursorError(
            f"starting_after {after} lies in the future of this response", param="starting_after"
        )


async def cancel_response(door: Door, exchange: Exchange) -> None:
    session_id, turn_id = split_response_id(exchange.params[0])
    cancelled = await door.sessions.cancel(TENANT, session_id, turn_id)
    if cancelled:
        try:
            async with asyncio.timeout(_CANCEL_WAIT_S):
                await door.sessions.wait(TENANT, session_id, turn_id)
        except TimeoutError:
            pass  # It was requested and will come; the answer says how far it is.
    turn, response = await _found(door, session_id, turn_id)
    if not cancelled and turn.status != "cancelled":
        raise InvalidRequestError(
            f"the response is {turn.status}: there is nothing to cancel", param="response_id"
        )
    await exchange.reply(await _written(door, session_id, turn, response))


async def list_input_items(door: Door, exchange: Exchange) -> None:
    query = exchange.query(ItemsQuery)
    session_id, turn_id = split_response_id(exchange.params[0])
    turn = await door.sessions.turn(TENANT, session_id, turn_id)
    items = input_items(turn_id, turn.input)
    await exchange.reply(page_of(items, after=query.after, limit=query.limit, order=query.order))
