"""Sessions in a dictionary: just enough to drive the door's own logic, nothing of theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from msgspec.structs import replace

from agentray.errors import CursorError, SessionBusyError, SessionNotFoundError, TurnNotFoundError
from agentray.events import (
    AnyEvent,
    Message,
    ModelCalled,
    ModelFinished,
    ModelVoided,
    TurnAccepted,
    TurnFinished,
    TurnOptions,
    Usage,
)
from agentray.ids import new_session_id, new_turn_id
from agentray.sessions.base import Cursor, Delta, SessionInfo, StreamItem, TurnInfo

AT = 1_700_000_000.0


class MemorySessions:
    """Each turn answers ``chunks``; while ``hold`` is set, only when ``finish`` is called.

    With ``queue`` it does not even begin before. With ``breaks_off`` another model answers, behind
    one that said a part."""

    def __init__(self, chunks: Sequence[str] = ("Hel", "lo")) -> None:
        self.chunks = list(chunks)
        self.hold = False
        self.queue = False
        self.breaks_off = False
        self.failure: Exception | None = None
        self.sessions: dict[str, SessionInfo] = {}
        self.turns: dict[str, TurnInfo] = {}
        self.items: dict[str, list[StreamItem]] = {}
        self.followers = 0
        self.listed = 0
        self.cancelled: list[str] = []
        self.left: bytes | None = None
        self._changed = asyncio.Event()

    async def create(
        self, tenant: str, *, session_id: str | None = None, **facts: Any
    ) -> tuple[SessionInfo, bool]:
        session_id = session_id or new_session_id()
        if (known := self.sessions.get(session_id)) is not None:
            return known, False
        session = SessionInfo(
            id=session_id,
            tenant=tenant,
            agent=facts.get("agent") or "assistant",
            user=facts.get("user"),
            placement=facts.get("placement", "shared"),
            metadata=facts.get("metadata") or {},
            status="idle",
            parked_reason=None,
            created_at=AT,
            updated_at=AT,
            expires_at=None,
            last_seq=0,
            turns=0,
            origin=facts.get("origin", "session"),
        )
        self.sessions[session_id] = session
        self.items[session_id] = []
        return session, True

    async def get(self, tenant: str, session_id: str) -> SessionInfo:
        if self.failure is not None:
            raise self.failure
        if session_id not in self.sessions:
            raise SessionNotFoundError(f"there is no session {session_id!r}")
        last_seq = max((item.seq for item in self.items[session_id]), default=0)
        return replace(self.sessions[session_id], last_seq=last_seq)

    async def list(self, tenant: str, **query: Any) -> tuple[list[SessionInfo], str | None]:
        self.listed += 1
        return list(reversed(self.sessions.values())), None

    async def scratch(self, tenant: str, session_id: str) -> bytes | None:
        await self.get(tenant, session_id)
        return self.left

    async def update(
        self, tenant: str, session_id: str, *, metadata: dict[str, str]
    ) -> SessionInfo:
        session = await self.get(tenant, session_id)
        self.sessions[session_id] = replace(session, metadata=metadata)
        return self.sessions[session_id]

    async def delete(self, tenant: str, session_id: str) -> None:
        await self.get(tenant, session_id)
        del self.sessions[session_id]

    async def fork(
        self, tenant: str, session_id: str, *, after_turn: str, new_id: str | None = None
    ) -> SessionInfo:
        turn = await self.turn(tenant, session_id, after_turn)
        session, _ = await self.create(tenant, session_id=new_id, origin="response")
        last_seq = turn.last_seq or 0
        self.items[session.id] = [i for i in self.items[session_id] if i.seq <= last_seq]
        return session

    async def submit(
        self,
        tenant: str,
        session_id: str,
        input: Sequence[Message],
        *,
        options: TurnOptions = TurnOptions(),
        if_busy: str = "enqueue",
        idempotency_key: str | None = None,
        after_turn: str | None = None,
    ) -> TurnInfo:
        await self.get(tenant, session_id)
        for turn in self.turns.values():
            if turn.session_id == session_id and turn.idempotency_key == idempotency_key != None:  # noqa: E711
                return turn
        latest = await self.latest_turn(tenant, session_id)
        if after_turn not in (None, latest):
            raise SessionBusyError("not the latest", outdated=True)
        if if_busy == "reject" and latest and self.turns[latest].state != "done":
            raise SessionBusyError("busy")
        turn = TurnInfo(
            id=new_turn_id(),
            session_id=session_id,
            state="running",
            status=None,
            input=list(input),
            options=options,
            agent=self.sessions[session_id].agent,
            idempotency_key=idempotency_key,
            cancel_requested=False,
            accepted_at=AT,
            finished_at=None,
            first_seq=self._next(session_id),
            last_seq=None,
        )
        self.turns[turn.id] = turn
        if not self.queue:
            self._begin(turn)
            if not self.hold:
                self.finish(turn.id)
        return turn

    def _begin(self, turn: TurnInfo) -> None:
        self._add(turn, TurnAccepted, input=turn.input, agent=turn.agent, options=turn.options)

    def finish(self, turn_id: str) -> None:
        """Let a turn answer and end."""
        turn = self.turns[turn_id]
        if self.queue:
            self._begin(turn)
        attempt, model = 1, "m"
        called = self._add(turn, ModelCalled, step=1, attempt=attempt, model=model)
        if self.breaks_off:
            self.items[turn.session_id].append(Delta(turn_id, called, 2, "Br"))
            broken = {"reason": "model_unavailable", "text": "Br"}
            self._add(turn, ModelVoided, step=1, attempt=attempt, **broken)
            attempt, model = 2, "n"
            called = self._add(turn, ModelCalled, step=1, attempt=attempt, model=model)
        text = ""
        for chunk in self.chunks:
            text += chunk
            self.items[turn.session_id].append(Delta(turn_id, called, len(text), chunk))
        self._add(turn, ModelFinished, step=1, attempt=attempt, text=text, finish_reason="stop")
        last = self._add(turn, TurnFinished, status="completed", usage=Usage(3, 2))
        self.turns[turn_id] = replace(
            turn,
            state="done",
            status="completed",
            last_seq=last,
            text=text,
            usage=Usage(3, 2),
            finished_at=AT,
        )
        self._notify()

    def _next(self, session_id: str) -> int:
        return 1 + max((item.seq for item in self.items[session_id]), default=0)

    def _add(self, turn: TurnInfo, kind: type[Any], **fields: Any) -> int:
        seq = self._next(turn.session_id)
        event = kind(seq=seq, turn_id=turn.id, at=AT, **fields)
        self.items[turn.session_id].append(event)
        return seq

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def turn(self, tenant: str, session_id: str, turn_id: str) -> TurnInfo:
        await self.get(tenant, session_id)
        turn = self.turns.get(turn_id)
        if turn is None or turn.session_id != session_id:
            raise TurnNotFoundError(f"there is no turn {turn_id!r}")
        return turn

    async def latest_turn(self, tenant: str, session_id: str) -> str | None:
        await self.get(tenant, session_id)
        items = self.items[session_id]
        return items[-1].turn_id if items else None

    async def wait(self, tenant: str, session_id: str, turn_id: str) -> TurnInfo:
        while self.turns[turn_id].state != "done":
            await self._changed.wait()
        return self.turns[turn_id]

    async def follow(
        self,
        tenant: str,
        session_id: str,
        *,
        after: Cursor = Cursor(0),
        turn_id: str | None = None,
    ) -> AsyncIterator[list[StreamItem]]:
        self.followers += 1
        try:
            shown = 0
            while True:
                items = self.items[session_id][shown:]
                shown += len(items)
                own = [i for i in items if _cursor(i) > after and turn_id in (None, i.turn_id)]
                if own:
                    yield own
                if turn_id is not None and self.turns[turn_id].state == "done":
                    return
                if self.failure is not None:
                    raise self.failure
                await self._changed.wait()
        finally:
            self.followers -= 1

    async def events(
        self, tenant: str, session_id: str, *, after: int = 0, limit: int = 100, **_: Any
    ) -> tuple[Sequence[AnyEvent], bool]:
        await self.get(tenant, session_id)
        found: list[AnyEvent] = [
            i for i in self.items[session_id] if not isinstance(i, Delta) and i.seq > after
        ]
        if not found and after >= self._next(session_id):
            raise CursorError("the cursor lies in the future", param="after")
        return found[:limit], len(found) > limit

    async def cancel(self, tenant: str, session_id: str, turn_id: str | None = None) -> list[str]:
        await self.get(tenant, session_id)
        open_turns = [
            t.id for t in self.turns.values() if t.session_id == session_id and t.state != "done"
        ]
        self.cancelled += open_turns
        return [each for each in open_turns if turn_id in (None, each)]

    def describe(self) -> dict[str, Any]:
        return {
            "owner_id": "o",
            "resident": 0,
            "running": 0,
            "queued": 0,
            "draining": False,
            "store_ok": True,
            "cache_ok": True,
        }


def _cursor(item: StreamItem) -> Cursor:
    return item.cursor if isinstance(item, Delta) else Cursor(item.seq)
