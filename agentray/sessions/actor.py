"""One session in memory: its state, its epoch, its mailbox. Idle, it has no task and no queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from agentray.events import AnyEvent, Route, encode_event
from agentray.sessions.state import Command, Rules, SessionState, Turn, advance
from agentray.sessions.stream import Hub
from agentray.storage.base import Append, SessionRow, TurnBirth, TurnRow

__all__ = ["SessionActor"]


class SessionActor:
    """A session that this process owns at ``epoch``.

    Events are recorded, which moves the state, and then flushed, which makes them durable and
    visible. A refused flush means that the session is another's: the actor is dropped with
    whatever it recorded.
    """

    __slots__ = (
        "agent",
        "begun_ordinal",
        "born",
        "cancel_requested",
        "dropped",
        "epoch",
        "expires_at",
        "files",
        "hub",
        "id",
        "inbox",
        "interruptible",
        "last_sender",
        "latest_turn",
        "mailbox",
        "other_host",
        "recorded",
        "route",
        "rules",
        "state",
        "task",
        "tenant",
        "used_at",
    )

    def __init__(self, row: SessionRow, state: SessionState, rules: Rules) -> None:
        self.tenant = row.tenant
        self.id = row.id
        self.agent = row.agent
        self.epoch = row.epoch
        self.born = row.first_epoch
        self.inbox = row.inbox
        self.expires_at = row.expires_at
        self.latest_turn = row.latest_turn
        self.state = state
        self.rules = rules
        # The stream's live end, while a turn runs.
        self.hub: Hub | None = None
        self.mailbox: deque[TurnRow] | None = None
        # Of the last turn taken from the mailbox: what is read late may still show it waiting.
        self.begun_ordinal = 0
        self.recorded: list[AnyEvent] = []
        self.task: asyncio.Task[None] | None = None
        self.interruptible: asyncio.Task[None] | None = None
        # What the tool call of this seq left in the working directory; None if that is not known.
        self.files: tuple[int, bytes] | None = None
        # Why the model was picked that is called now.
        self.route: Route | None = None
        self.cancel_requested = False
        self.dropped = False
        self.last_sender: str | None = None
        self.other_host: str | None = None
        self.used_at = 0.0

    @property
    def key(self) -> tuple[str, str]:
        return self.tenant, self.id

    @property
    def busy(self) -> bool:
        return self.task is not None

    @property
    def turn(self) -> Turn:
        """The turn that runs; there must be one."""
        turn = self.state.turn
        if turn is None:
            raise AssertionError(f"session {self.id} runs no turn")
        return turn

    def stamp(self, now: float) -> dict[str, Any]:
        """Return what each event of the running turn has; ``now`` in seconds since the epoch."""
        return {"seq": self.state.seq + 1, "turn_id": self.turn.id, "at": now}

    def record(self, event: AnyEvent) -> tuple[Command, ...]:
        """Move the state by an event that is not durable yet; return what follows from it."""
        self.state, commands = advance(self.state, event, self.rules)
        self.recorded.append(event)
        return commands

    def take_append(
        self,
        *,
        born: TurnBirth | None = None,
        started: str | None = None,
        ended: str | None = None,
        ended_status: str | None = None,
        cost: float = 0.0,
    ) -> tuple[Append, Sequence[AnyEvent]]:
        """Return the recorded events as an append, and themselves."""
        events, self.recorded = self.recorded, []
        append = Append(
            tenant=self.tenant,
            session_id=self.id,
            epoch=self.epoch,
            first_seq=events[0].seq,
            inbox=self.inbox if born else None,
            events=tuple([encode_event(event) for event in events]),
            born=born,
            started_turn=started,
            ended_turn=ended,
            ended_status=ended_status,
            cost=cost,
        )
        return append, events

    @contextmanager
    def allow_interrupt(self) -> Generator[None]:
        """Let ``cancel`` end what is awaited inside, and nothing outside."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self.interruptible = task
        try:
            yield
        except asyncio.CancelledError:
            if not self.cancel_requested or self.dropped:
                raise
            task.uncancel()
        finally:
            self.interruptible = None

    def cancel(self, turn_id: str) -> bool:
        """Interrupt the turn if it runs; return whether it does."""
        turn = self.state.turn
        if turn is None or turn.id != turn_id:
            return False
        if not self.cancel_requested:
            self.cancel_requested = True
            if self.interruptible is not None:
                self.interruptible.cancel()
        return True
