"""What Ray handles call on sessions: the same few methods on hosts and on dedicated actors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from msgspec.structs import replace

from agentray.events import AnyEvent, Message, TurnOptions
from agentray.sessions.base import (
    Cursor,
    IfBusy,
    Placement,
    SessionInfo,
    Sessions,
    StreamItem,
    TurnInfo,
)

__all__ = ["SessionCalls"]


class SessionCalls:
    """Sessions by id, made on their first use."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def ensure(
        self,
        session_id: str,
        *,
        tenant: str = "default",
        agent: str | None = None,
        user: str | None = None,
        placement: Placement = "shared",
        ttl_s: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> SessionInfo:
        """Return the session; make it if there is none."""
        info, _ = await self._sessions.create(
            tenant,
            session_id=session_id,
            agent=agent,
            user=user,
            placement=placement,
            ttl_s=ttl_s,
            metadata=metadata,
        )
        return info

    async def submit(
        self,
        session_id: str,
        input: str | Sequence[Message],
        *,
        tenant: str = "default",
        if_busy: IfBusy = "enqueue",
        idempotency_key: str | None = None,
        options: TurnOptions = TurnOptions(),
    ) -> TurnInfo:
        """Accept a turn and return it as it is then."""
        messages = [Message("user", input)] if isinstance(input, str) else input
        return await self._sessions.submit(
            tenant,
            session_id,
            messages,
            options=options,
            if_busy=if_busy,
            idempotency_key=idempotency_key,
        )

    async def send(
        self,
        session_id: str,
        input: str | Sequence[Message],
        *,
        tenant: str = "default",
        **how: Any,
    ) -> TurnInfo:
        """Accept a turn and return it when it is done."""
        turn = await self.submit(session_id, input, tenant=tenant, **how)
        done = await self._sessions.wait(tenant, session_id, turn.id)
        return replace(done, idempotency_key=turn.idempotency_key)

    async def stream(
        self,
        session_id: str,
        input: str | Sequence[Message],
        *,
        tenant: str = "default",
        **how: Any,
    ) -> AsyncIterator[StreamItem]:
        """Accept a turn and yield its events and deltas."""
        turn = await self.submit(session_id, input, tenant=tenant, **how)
        async for items in self._sessions.follow(tenant, session_id, turn_id=turn.id):
            for item in items:
                yield item

    async def follow(
        self, session_id: str, *, tenant: str = "default", after: Cursor = Cursor(0)
    ) -> AsyncIterator[StreamItem]:
        """Yield what comes after the cursor, endlessly."""
        async for items in self._sessions.follow(tenant, session_id, after=after):
            for item in items:
                yield item

    async def events(
        self, session_id: str, *, tenant: str = "default", after: int = 0, limit: int = 100
    ) -> list[AnyEvent]:
        """Return committed events behind ``seq`` ``after``."""
        events, _ = await self._sessions.events(tenant, session_id, after=after, limit=limit)
        return list(events)

    async def cancel(
        self, session_id: str, turn_id: str | None = None, *, tenant: str = "default"
    ) -> list[str]:
        """Request the end of a turn, or of all that run or wait."""
        return await self._sessions.cancel(tenant, session_id, turn_id)
