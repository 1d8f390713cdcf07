"""Owners of one session, stepped one at a time, in a world where every step can be the last.

An owner is made of generators that yield in front of each of its effects. Whoever holds the
choices decides which generator goes on, what models and tools do, which owner dies or sleeps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

from msgspec.structs import replace

from agentray.events import (
    AnyEvent,
    Message,
    ModelCalled,
    ModelFinished,
    ModelVoided,
    ToolCall,
    ToolCalled,
    ToolFinished,
    TurnAccepted,
    TurnError,
    TurnFinished,
    TurnResumed,
)
from agentray.sessions.actor import SessionActor
from agentray.sessions.state import (
    CANCELLED,
    CONTEXT_LENGTH,
    OWNER_LOST,
    CallModel,
    CallTools,
    Command,
    EndTurn,
    RecoverModel,
    Rules,
    RunModel,
    SessionState,
    SettleUnknown,
    Turn,
    fold,
    resume,
)
from agentray.sessions.steps import after_lost_call
from agentray.storage.base import Append, AppendResult, TurnBirth, TurnRow
from tests.unit.sessions.fence import Fence, actor_of

__all__ = ["RULES", "World", "fold_from"]

RULES = Rules(window_turns=2, max_steps=3, model_attempts=2, recovery_attempts=2)
OWNERS = 3
TURNS = 6

Steps = Generator[None, None, Any]


class LostError(Exception):
    """The fence refused: the session is another's."""


def on_crash(tool: str) -> Any:
    return "retry" if tool == "again" else "report"


def fold_from(events: Iterable[AnyEvent], rules: Rules = RULES) -> SessionState:
    """Fold events that begin at a turn's beginning."""
    events = list(events)
    first = events[0].seq if events else 1
    return fold(SessionState(seq=first - 1), events, rules)


class World:
    """All that exists: the fence, owners, clients that wait, text in Redis, what tools did."""

    def __init__(self, choices: bytes) -> None:
        self._choices = choices
        self._at = 0
        self.fence = Fence()
        self.owners = [Owner(self, f"o{i}") for i in range(OWNERS)]
        self.on_the_way: list[Append] = []
        self.clients: list[str] = []
        self.asked = 0
        self.unanswered: set[str] = set()
        self.born = OWNERS
        self.hot: list[SessionState] = []
        self.tails: dict[int, str | None] = {}
        self.shown: dict[int, str] = {}
        self.tool_runs: dict[tuple[str, int, str], int] = {}
        self.resumed_by_hot = 0

    def choose(self, options: int) -> int:
        """Return a number below ``options``; 0, the quiet choice, when nobody chooses any more."""
        if self.quiet:
            return 0
        self._at += 1
        return self._choices[self._at - 1] % options

    @property
    def quiet(self) -> bool:
        """Whether all choices are made."""
        return self._at >= len(self._choices)

    # What can happen

    def happen(self) -> None:
        """Let one thing happen."""
        owner = self.owners[self.choose(OWNERS)]
        what = self.choose(40)
        if what < 22:
            self.go_on()
        elif what < 24:
            owner.sweep()
        elif what < 26:
            self.ask(None)
        elif what < 28:
            self.ask(owner)
        elif what < 34:
            # Another owner is quick to find the turn that this one leaves behind.
            if what < 30:
                self.crash(owner)
            else:
                owner.sleep()
            self.owners[self.choose(OWNERS)].sweep()
        elif what == 34:
            owner.stir()
        elif what == 35:
            owner.leave()
        elif what == 36:
            owner.wake()
        elif what == 37:
            owner.lose()
        elif what == 38:
            # Redis loses everything; text that follows lands behind a hole.
            self.tails = dict.fromkeys(self.tails)
        elif self.choose(3) == 1 and (open_turns := self.fence.open()):
            self.fence.cancel(open_turns[self.choose(len(open_turns))].id)

    def go_on(self) -> None:
        """Take one step of whatever can go on."""
        ways = [way for owner in self.owners if not owner.asleep for way in owner.ways()]
        ways += [self._deliver] * bool(self.on_the_way) + [self._accept] * bool(self.clients)
        if ways:
            ways[self.choose(len(ways))]()

    def _deliver(self) -> None:
        self.fence.append(self.on_the_way.pop(self.choose(len(self.on_the_way))))

    def _accept(self) -> None:
        self.fence.accept(self.clients.pop(0))

    def ask(self, owner: Owner | None) -> None:
        """Let a client send a message, through an owner or straight to the store."""
        if self.asked < TURNS:
            self.asked += 1
            turn_id = f"turn{self.asked}"
            if owner is None or not owner.begin(turn_id):
                self.clients.append(turn_id)

    def crash(self, owner: Owner) -> None:
        """Kill an owner; what it had sent may still arrive. Another process takes its place."""
        if owner.sent is not None:
            self.on_the_way.append(owner.sent)
        if owner.asking is not None:
            self.unanswered.add(owner.asking)
        self.fence.silent.add(owner.name)
        self.born += 1
        self.owners[self.owners.index(owner)] = Owner(self, f"o{self.born}")

    def settle(self) -> None:
        """Let nothing more go wrong until all is done."""
        for _ in range(500):
            busy = any(owner.ways() for owner in self.owners)
            if not (busy or self.fence.open() or self.clients or self.on_the_way):
                return
            self.fence.silent |= {
                name
                for name in self.fence.owner_of.values()
                if name not in {owner.name for owner in self.owners}
            }
            for owner in self.owners:
                # Who slept goes on where it was, before it knows how long that took.
                owner.stir()
                for way in owner.ways():
                    way()
            for owner in self.owners:
                owner.wake()
                if self.fence.open():
                    owner.sweep()
            while self.on_the_way:
                self._deliver()
            while self.clients:
                self._accept()
        raise AssertionError(f"never quiet: {self.fence.open()}")


class Owner:
    """A process. ``turn`` runs the session, ``side`` is whatever else it does with it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.fence = world.fence
        self.name = name
        self.actor: SessionActor | None = None
        self.turn: Steps | None = None
        self.side: Steps | None = None
        self.sent: Append | None = None
        self.asking: str | None = None
        self.asleep = False

    def ways(self) -> list[Any]:
        return [self._step_turn] * (self.turn is not None) + [self._step_side] * (
            self.side is not None
        )

    def _step_turn(self) -> None:
        assert self.turn is not None
        try:
            next(self.turn)
        except StopIteration:
            self.turn = None
        except LostError:
            self.turn = None
            self.actor = None

    def _step_side(self) -> None:
        assert self.side is not None
        try:
            next(self.side)
        except StopIteration:
            self.side = None

    # What it does of itself

    def sleep(self) -> None:
        """Stop in the middle of whatever it does, for longer than the term."""
        self.asleep = True
        self.fence.silent.add(self.name)

    def stir(self) -> None:
        """Go on there; it has not beaten yet."""
        self.asleep = False

    def wake(self) -> None:
        """Beat; after a silence, drop what is another's."""
        if self.name in self.fence.silent:
            self.fence.silent.discard(self.name)
            if self.actor is not None and self.actor.epoch != self.fence.epoch:
                self.lose()

    def lose(self) -> None:
        """Drop the session and stop its turn; what was sent may still arrive."""
        if self.sent is not None:
            self.world.on_the_way.append(self.sent)
            self.sent = None
        self._ask_store()
        self.actor = self.turn = None

    def _ask_store(self) -> None:
        """Accept the turn of a client that waits once more, under its id: it may have landed."""
        if self.asking is not None:
            self.world.clients.append(self.asking)
            self.asking = None

    def sweep(self) -> None:
        """Look at the inbox, or for a turn that nobody runs."""
        if self.side is not None:
            return
        if self.actor is not None:
            self.side = self._look(self.actor)
        elif self.fence.open():
            self.side = self._activate()

    def leave(self) -> None:
        """Give the session up, if it is idle."""
        if self.actor is not None and self.turn is None and self.side is None:
            self.side = self._release(self.actor)

    def begin(self, turn_id: str) -> bool:
        """Accept a turn in an idle session of its own."""
        actor = self.actor
        if actor is None or self.turn is not None or self.side is not None or actor.mailbox:
            return False
        self.asking = turn_id
        self.turn = self._run(actor, self._born(actor, turn_id))
        return True

    def _activate(self) -> Steps:
        seen = self.fence.epoch
        yield
        if not self.fence.claim(self.name, seen):
            return
        epoch, last_seq, inbox = self.fence.epoch, self.fence.last_seq, self.fence.inbox
        yield
        turns = self.fence.open()
        yield
        self.actor = actor = actor_of(epoch, inbox, self._restore(last_seq), RULES)
        turn = actor.state.turn
        self._queue(actor, turns)
        if turn is not None:
            cancelled = any(row.id == turn.id and row.cancel_requested for row in turns)
            self.turn = self._run(actor, self._resumed(actor, cancelled))
        elif actor.mailbox:
            self.turn = self._run(actor, None)

    def _restore(self, last_seq: int) -> SessionState:
        events = [event for _, event in self.fence.journal[:last_seq]]
        copies = [copy for copy in self.world.hot if copy.seq <= last_seq]
        how = self.world.choose(len(copies) + 1)
        if how:
            self.world.resumed_by_hot += 1
            copy = copies[how - 1]
            return fold(copy, events[copy.seq :], RULES)
        return fold_from(events)

    def _look(self, actor: SessionActor) -> Steps:
        epoch, inbox = self.fence.epoch, self.fence.inbox
        yield
        turns = self.fence.open()
        yield
        if self.actor is not actor:
            return
        if epoch != actor.epoch:
            self.lose()
            return
        actor.inbox = inbox
        for row in turns:
            if row.cancel_requested:
                actor.cancel(row.id)
        self._queue(actor, turns)
        if actor.mailbox and self.turn is None:
            self.turn = self._run(actor, None)

    def _queue(self, actor: SessionActor, turns: list[TurnRow]) -> None:
        known = {row.id for row in actor.mailbox or ()}
        current = actor.state.turn.id if actor.state.turn else None
        fresh = [
            row
            for row in turns
            if row.state == "accepted"
            and row.id not in known
            and row.id != current
            and row.ordinal > actor.begun_ordinal
        ]
        if fresh:
            actor.mailbox = actor.mailbox or deque()
            actor.mailbox.extend(fresh)

    def _release(self, actor: SessionActor) -> Steps:
        yield
        if self.actor is not actor or self.turn is not None:
            return
        if self.fence.release(actor.epoch, actor.inbox) == "inbox":
            yield from self._look(actor)
        else:
            # Nothing begins in between: a message waits for the end of a release.
            self.actor = None

    # Turns, as the runtime carries them out

    def _run(self, actor: SessionActor, first: Steps | None) -> Steps:
        if first is not None:
            commands: tuple[Command, ...] = yield from first
            yield from self._carry_out(actor, commands)
        while actor.mailbox:
            row = actor.mailbox.popleft()
            actor.begun_ordinal = row.ordinal
            commands = self._accept(actor, row.id, call=not row.cancel_requested)
            yield from self._flush(actor, started=row.id)
            yield from self._carry_out(actor, (CANCELLED,) if row.cancel_requested else commands)

    def _born(self, actor: SessionActor, turn_id: str) -> Steps:
        if actor.mailbox:
            self._ask_store()
            return ()
        before = actor.state
        commands = self._accept(actor, turn_id, call=True)
        result = yield from self._flush(actor, born=TurnBirth(turn_id, None, "", b"{}"))
        if result.outcome == "landed":
            self.asking = None
            return commands
        actor.state = before
        self._ask_store()
        return ()

    def _accept(self, actor: SessionActor, turn_id: str, *, call: bool) -> tuple[Command, ...]:
        commands = actor.record(
            TurnAccepted(
                seq=actor.state.seq + 1,
                turn_id=turn_id,
                at=0.0,
                input=[Message("user", turn_id)],
                agent="assistant",
            )
        )
        if call:
            [command] = commands
            assert isinstance(command, CallModel)
            commands = self._call(actor, command)
        return commands

    def _resumed(self, actor: SessionActor, cancelled: bool) -> Steps:
        turn = actor.state.turn
        assert turn is not None
        tail = self.world.tails.get(turn.called_seq) or ""
        actor.record(
            TurnResumed(**_stamp(actor), phase=turn.phase, epoch=actor.epoch, owner=self.name)
        )
        yield from self._flush(actor)
        turn = actor.state.turn
        assert turn is not None
        return resume(turn, RULES, on_crash, tail=tail, cancelled=cancelled)

    def _carry_out(self, actor: SessionActor, commands: tuple[Command, ...]) -> Steps:
        while commands:
            following: tuple[Command, ...] = ()
            for command in commands:
                following = yield from self._command(actor, command)
            commands = following

    def _command(self, actor: SessionActor, command: Command) -> Steps:
        if isinstance(command, EndTurn):
            return (yield from self._end(actor, command))
        if isinstance(command, CallModel):
            following = self._call(actor, command)
            yield from self._flush(actor)
            return following
        if isinstance(command, RunModel):
            return (yield from self._model(actor))
        if isinstance(command, RecoverModel):
            return self._recover(actor, command)
        if isinstance(command, SettleUnknown):
            return (yield from self._settle(actor, command.call, "unknown"))
        return (yield from self._tools(actor, command))

    def _end(self, actor: SessionActor, end: EndTurn) -> Steps:
        turn = actor.state.turn
        assert turn is not None
        actor.record(
            TurnFinished(**_stamp(actor), status=end.status, error=end.error, cost=turn.cost)
        )
        actor.cancel_requested = False
        yield from self._flush(actor, ended=turn.id, ended_status=end.status, cost=turn.cost)
        self.world.hot.append(actor.state)
        return ()

    def _call(self, actor: SessionActor, command: CallModel) -> tuple[Command, ...]:
        return actor.record(
            ModelCalled(
                **_stamp(actor),
                step=command.step,
                attempt=command.attempt,
                model="m",
                continued_from=command.continued_from,
            )
        )

    def _model(self, actor: SessionActor) -> Steps:
        turn, world = actor.state.turn, self.world
        assert turn is not None
        if actor.cancel_requested:
            return (CANCELLED,)
        text = turn.text
        where: dict[str, Any] = {"step": turn.step, "attempt": turn.attempt}
        for chunk in range(world.choose(4)):
            piece = f"<{turn.called_seq}.{chunk}>"
            known = "" if chunk == 0 else world.tails.get(turn.called_seq)
            world.tails[turn.called_seq] = None if known is None else known + piece
            text += piece
            yield
            if actor.cancel_requested:
                actor.record(ModelVoided(**_stamp(actor), **where, reason="cancelled", text=text))
                yield from self._flush(actor)
                return (CANCELLED,)
            self._confirm(actor)
            assert actor.epoch == self.fence.epoch, "a stale owner shows text"
            world.shown[turn.called_seq] = text
        outcome = world.choose(8)
        if outcome == 6 and not turn.escalated:
            # It failed its checks, and there is a next tier.
            return actor.record(
                ModelVoided(
                    **_stamp(actor), **where, reason="answer_rejected", text=text, escalates=True
                )
            )
        if outcome in (1, 2, 7):
            code = CONTEXT_LENGTH if outcome == 7 else "model_unavailable"
            event = after_lost_call(
                turn,
                error=TurnError(code, "it broke"),
                may_pass=outcome == 1,
                text=text,
                continues=bool(world.choose(2)),
                cost=0.0,
                now=0.0,
                rules=RULES,
            )
            return actor.record(replace(event, seq=actor.state.seq + 1))
        calls: list[ToolCall] = []
        if outcome in (3, 4):
            names = [("again", "once")[world.choose(2)] for _ in range(1 + world.choose(3))]
            calls = [ToolCall(f"c{i}", name, "{}") for i, name in enumerate(names)]
        reason = "length" if outcome == 5 else "stop"
        finished: dict[str, Any] = {"text": text, "finish_reason": reason, "tool_calls": calls}
        return actor.record(ModelFinished(**_stamp(actor), **where, **finished, cost=0.5))

    def _recover(self, actor: SessionActor, command: RecoverModel) -> tuple[Command, ...]:
        turn = actor.state.turn
        assert turn is not None
        text = turn.text + command.tail
        where: dict[str, Any] = {"step": turn.step, "attempt": turn.attempt}
        continues = bool(text) and bool(self.world.choose(2))
        return actor.record(
            ModelVoided(**_stamp(actor), **where, reason=OWNER_LOST, text=text, continues=continues)
        )

    def _tools(self, actor: SessionActor, command: CallTools) -> Steps:
        turn = actor.state.turn
        assert turn is not None
        for call, attempt in command.calls:
            actor.record(
                ToolCalled(
                    **_stamp(actor),
                    call_id=call.call_id,
                    name=call.name,
                    arguments="{}",
                    attempt=attempt,
                )
            )
        yield from self._flush(actor)
        self._confirm(actor)
        assert actor.epoch == self.fence.epoch, "a stale owner runs tools"
        for call, _ in command.calls:
            self._dispatch(turn, call)
        waiting = [call for call, _ in command.calls]
        following: tuple[Command, ...] = ()
        while waiting and not actor.cancel_requested:
            yield
            call = waiting.pop(self.world.choose(len(waiting)))
            following = yield from self._settle(actor, call, "ok")
        return (CANCELLED,) if actor.cancel_requested else following

    def _dispatch(self, turn: Turn, call: ToolCall) -> None:
        settled = [
            event
            for _, event in self.fence.journal
            if isinstance(event, ToolFinished)
            and (event.turn_id, event.call_id) == (turn.id, call.call_id)
            and event.seq > turn.called_seq
        ]
        assert not settled, f"{call} runs although it is settled: {settled}"
        key = (turn.id, turn.step, call.call_id)
        self.world.tool_runs[key] = self.world.tool_runs.get(key, 0) + 1
        assert call.name == "again" or self.world.tool_runs[key] == 1, f"{call} ran twice"

    def _settle(self, actor: SessionActor, call: ToolCall, status: Any) -> Steps:
        commands = actor.record(
            ToolFinished(
                **_stamp(actor),
                call_id=call.call_id,
                name=call.name,
                status=status,
                output=status,
            )
        )
        yield from self._flush(actor)
        return commands

    def _confirm(self, actor: SessionActor) -> None:
        """Go on only as an owner that is known to live."""
        self.wake()
        if self.actor is not actor:
            raise LostError

    def _flush(self, actor: SessionActor, **what: Any) -> Steps:
        append, _ = actor.take_append(**what)
        self.sent = append
        yield
        unsure, result = False, AppendResult("locked")
        while result.outcome == "locked":
            result = self.fence.append(append)
            yield
            if self.world.choose(5) == 4:
                # The acknowledgement is lost: it is sent again.
                unsure, result = True, AppendResult("locked")
                yield
        self.sent = None
        at = (append.epoch, append.last_seq)
        if unsure and result.outcome == "stale" and (result.epoch, result.last_seq) == at:
            result = AppendResult("landed", *at)
        if result.outcome == "stale":
            self._ask_store()
            raise LostError
        return result


def _stamp(actor: SessionActor) -> dict[str, Any]:
    turn = actor.state.turn
    assert turn is not None
    return {"seq": actor.state.seq + 1, "turn_id": turn.id, "at": 0.0}
