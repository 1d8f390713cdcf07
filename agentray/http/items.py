"""Show what is in a conversation as OpenAI's items: read from its journal, a page at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Literal, cast

from agentray.events import AnyEvent, Message, TurnAccepted
from agentray.http.door import TENANT
from agentray.http.errors import ItemNotFoundError
from agentray.http.objects import (
    ConversationMessage,
    InputImage,
    InputText,
    Item,
    ItemList,
    OutputText,
    Response,
)
from agentray.http.responses import ResponseFold
from agentray.sessions.base import Sessions, TurnInfo

__all__ = [
    "conversation_items",
    "find_item",
    "input_items",
    "page_of",
    "turn_events",
    "turn_items",
    "turn_of_item",
]

Order = Literal["asc", "desc"]
_PAGE = 500


def input_items(turn_id: str, messages: Iterable[Message]) -> list[Item]:
    """Return what a caller gave to a turn."""
    return [
        ConversationMessage(f"msg_{turn_id}_in{k}", "completed", _parts(message), message.role)
        for k, message in enumerate(messages)
    ]


def _parts(message: Message) -> list[InputText | InputImage | OutputText]:
    text = OutputText if message.role == "assistant" else InputText
    if isinstance(message.content, str):
        return [text(message.content)]
    parts: list[InputText | InputImage | OutputText] = []
    for part in message.content:
        image = part.get("image_url")
        if isinstance(image, dict):
            facts = cast("dict[str, Any]", image)
            parts.append(InputImage(str(facts.get("url", "")), facts.get("detail") or "auto"))
        else:
            parts.append(text(str(part.get("text", ""))))
    return parts


def turn_items(events: Sequence[AnyEvent]) -> list[Item]:
    """Return the items of one turn, whose events these are, from its first on."""
    accepted = events[0]
    assert isinstance(accepted, TurnAccepted)
    fold = ResponseFold(
        Response(id="", created_at=0, status="in_progress", model=""), accepted.turn_id
    )
    fold.feed(events)
    return [*input_items(accepted.turn_id, accepted.input), *fold.response.output]


def turn_of_item(item_id: str) -> str:
    """Return the id of the turn that an item belongs to.

    Raises:
        ItemNotFoundError: it is no item's id.
    """
    parts = item_id.split("_")
    if len(parts) != 3 or len(parts[1]) != 26 or not parts[1].isascii() or not parts[1].isalnum():
        raise _no_item(item_id)
    return parts[1]


def find_item(items: Iterable[Item], item_id: str) -> Item:
    """Return the item of that id; raise ``ItemNotFoundError`` if there is none."""
    for item in items:
        if item.id == item_id:
            return item
    raise _no_item(item_id)


def _no_item(item_id: str) -> ItemNotFoundError:
    shown = item_id if len(item_id) <= 40 else item_id[:40] + "…"
    return ItemNotFoundError(f"there is no item {shown!r}", param="item_id")


def page_of(items: Sequence[Item], *, after: str | None, limit: int, order: Order) -> ItemList:
    """Return a page of items that are all at hand, given in ascending order."""
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        ordered = ordered[ordered.index(find_item(ordered, after)) + 1 :]
    return ItemList.of(ordered[:limit], len(ordered) > limit)


async def conversation_items(
    sessions: Sessions, session_id: str, *, after: str | None, limit: int, order: Order
) -> ItemList:
    """Return a page of a conversation's items.

    Raises:
        SessionNotFoundError: there is no such session.
        TurnNotFoundError, ItemNotFoundError: there is no such ``after``.
    """
    first_seq = last_seq = None
    if after is not None:
        turn = await sessions.turn(TENANT, session_id, turn_of_item(after))
        first_seq, last_seq = turn.first_seq, turn.last_seq
    session = await sessions.get(TENANT, session_id)
    if order == "asc":
        turns = _turns_up(sessions, session_id, (first_seq or 1) - 1)
    else:
        turns = _turns_down(sessions, session_id, last_seq or session.last_seq)
    found: list[Item] = []
    async for events in turns:
        items = turn_items(events)
        if order == "desc":
            items.reverse()
        if after is not None:
            items = items[items.index(find_item(items, after)) + 1 :]
            after = None
        found += items
        if len(found) > limit:
            break
    return ItemList.of(found[:limit], len(found) > limit)


async def turn_events(sessions: Sessions, session_id: str, turn: TurnInfo) -> list[AnyEvent]:
    """Return the events that a turn has so far."""
    found: list[AnyEvent] = []
    if turn.first_seq is None:
        return found
    after, more = turn.first_seq - 1, True
    while more:
        events, more = await sessions.events(TENANT, session_id, after=after, limit=_PAGE)
        own = [event for event in events if event.turn_id == turn.id]
        found += own
        after += len(events)
        more = more and len(own) == len(events)
    return found


async def _turns_up(
    sessions: Sessions, session_id: str, after: int
) -> AsyncIterator[list[AnyEvent]]:
    """Yield the events of turn after turn; ``after`` lies between two of them."""
    turn: list[AnyEvent] = []
    more = True
    while more:
        events, more = await sessions.events(TENANT, session_id, after=after, limit=_PAGE)
        after += len(events)
        for event in events:
            if isinstance(event, TurnAccepted) and turn:
                yield turn
                turn = []
            turn.append(event)
    if turn:
        yield turn


async def _turns_down(
    sessions: Sessions, session_id: str, up_to: int
) -> AsyncIterator[list[AnyEvent]]:
    """Yield the events of turn before turn, down from the one that ends at ``up_to``."""
    window = _PAGE
    while up_to > 0:
        after = max(0, up_to - window)
        events, _ = await sessions.events(TENANT, session_id, after=after, limit=up_to - after)
        starts = [k for k, event in enumerate(events) if isinstance(event, TurnAccepted)]
        if not starts and after > 0:  # a turn longer than the window
            window *= 2
            continue
        end = len(events)
        for start in reversed(starts):
            yield list(events[start:end])
            end = start
        up_to = after + end
