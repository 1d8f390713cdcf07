"""Carry out what ``state.py`` decides: the only place where a turn touches the world."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from agentray.agents.spec import Agents
from agentray.clock import Clock
from agentray.errors import OwnershipLostError
from agentray.events import (
    AnyEvent,
    Message,
    ToolCall,
    ToolCalled,
    ToolFinished,
    TurnAccepted,
    TurnFinished,
    TurnOptions,
    TurnResumed,
)
from agentray.models.base import ModelCaller
from agentray.models.router import Router
from agentray.sessions.actor import SessionActor
from agentray.sessions.journal import Journal
from agentray.sessions.model_steps import ModelSteps
from agentray.sessions.state import (
    CANCELLED,
    CallModel,
    CallTools,
    Command,
    EndTurn,
    RecoverModel,
    RunModel,
    SettleUnknown,
    resume,
)
from agentray.sessions.stream import TailWriter, WireMessage, tail_key
from agentray.sessions.tool_calls import ToolCalls
from agentray.storage.base import HotCopy, HotStore, TurnBirth, TurnRow, Wire
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics
from agentray.tools.spec import Toolbox, ToolResult

__all__ = ["SessionRuntime", "TurnNotBorn"]

log = get_logger(__name__)

UNKNOWN_OUTCOME = (
    "The process that ran this tool died. Whether the call took effect is unknown; "
    "check before you repeat it."
)
OUTCOME_UNKNOWN = ToolResult("error", UNKNOWN_OUTCOME, "died")
_inputs = msgspec.json.Decoder(list[Message])
_options = msgspec.json.Decoder(TurnOptions)


class TurnNotBorn(Exception):  # noqa: N818 - it is an outcome, not an error
    """The turn could not begin at once; the session is as it was."""


class SessionRuntime:
    """Runs the turns of sessions that this process owns, whichever placement they have."""

    def __init__(
        self,
        *,
        owner_id: str,
        journal: Journal,
        hot: HotStore,
        wire: Wire,
        tails: TailWriter,
        confirm: Callable[[], Awaitable[None]],
        router: Router,
        models: ModelCaller,
        agents: Agents,
        tools: Toolbox,
        tool_calls: ToolCalls,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._owner_id = owner_id
        self._journal = journal
        self._hot = hot
        self._wire = wire
        self._tails = tails
        self._confirm = confirm
        self._tools = tools
        self._tool_calls = tool_calls
        self._clock = clock
        self._metrics = metrics
        self._model_steps = ModelSteps(
            router=router,
            models=models,
            agents=agents,
            tools=tools,
            tails=tails,
            clock=clock,
            metrics=metrics,
            flush=self._flush,
        )

    # Beginning and ending turns

    async def run_born(
        self, actor: SessionActor, birth: TurnBirth, input: Sequence[Message], options: TurnOptions
    ) -> tuple[Command, ...]:
        """Accept a turn and begin to run it with one append; return what is to be done next.

        Raises:
            TurnNotBorn: the idempotency key exists, or others accepted turns meanwhile.
            OwnershipLostError: the session is another's.
        """
        if actor.mailbox:
            raise TurnNotBorn  # it came in before this task began
        before = actor.state
        commands = self._accept(actor, birth.turn_id, list(input), options)
        append, events = actor.take_append(born=birth)
        result = await self._journal.append(append)
        if result.outcome != "landed":
            actor.state = before
            raise TurnNotBorn
        actor.latest_turn = birth.turn_id
        self._landed(actor, events)
        return commands

    async def run_accepted(self, actor: SessionActor, row: TurnRow) -> tuple[Command, ...]:
        """Begin to run a turn that was accepted before."""
        messages = _inputs.decode(row.input or b"[]")
        options = _options.decode(row.options)
        if row.cancel_requested:
            actor.record(self._accepted_event(actor, row.id, messages, options))
            await self._flush(actor, started=row.id)
            return (CANCELLED,)
        commands = self._accept(actor, row.id, messages, options)
        await self._flush(actor, started=row.id)
        return commands

    async def run_resumed(
        self, actor: SessionActor, *, cancel_requested: bool
    ) -> tuple[Command, ...]:
        """Take over the turn that another owner left; return what is to be done next."""
        turn = actor.turn
        phase = turn.phase
        tail = b""
        if phase == "model":
            name = tail_key(actor.tenant, actor.id, turn.called_seq)
            tail = await self._wire.read_tail(name) or b""
        elif phase == "tools":
            await self._tool_calls.fence(actor)
        resumed = TurnResumed(
            **actor.stamp(self._clock.now()),
            phase="streaming" if tail else phase,
            epoch=actor.epoch,
            owner=self._owner_id,
        )
        actor.record(resumed)
        self._metrics.takeovers.inc()
        await self._flush(actor)
        return resume(
            actor.turn,
            actor.rules,
            self._tools.on_crash,
            tail=tail.decode(),
            cancelled=cancel_requested,
        )

    def _accept(
        self, actor: SessionActor, turn_id: str, input: list[Message], options: TurnOptions
    ) -> tuple[Command, ...]:
        commands = actor.record(self._accepted_event(actor, turn_id, input, options))
        for command in commands:
            if isinstance(command, CallModel):
                # The first call is journaled with the acceptance: one append less a turn.
                commands = self._model_steps.record_call(actor, command)
        return commands

    def _accepted_event(
        self, actor: SessionActor, turn_id: str, input: list[Message], options: TurnOptions
    ) -> TurnAccepted:
        return TurnAccepted(
            seq=actor.state.seq + 1,
            turn_id=turn_id,
            at=self._clock.now(),
            input=input,
            agent=actor.agent,
            options=options,
        )

    # The loop of a turn

    async def carry_out(self, actor: SessionActor, commands: tuple[Command, ...]) -> None:
        """Carry commands out until the turn has ended and its end is durable.

        Raises:
            OwnershipLostError: the session is another's; nothing more may be done for it.
        """
        while commands:
            commands = await self._step(actor, commands)

    async def _step(
        self, actor: SessionActor, commands: tuple[Command, ...]
    ) -> tuple[Command, ...]:
        following: tuple[Command, ...] = ()
        for command in commands:
            if isinstance(command, EndTurn):
                await self._end(actor, command)
                return ()
            if isinstance(command, CallModel):
                following = self._model_steps.record_call(actor, command)
                if actor.recorded:
                    await self._flush(actor)
            elif isinstance(command, RunModel):
                following = await self._model_steps.run(actor)
            elif isinstance(command, RecoverModel):
                following = self._model_steps.recover(actor, command)
            elif isinstance(command, SettleUnknown):
                following = await self._settle(actor, command.call, OUTCOME_UNKNOWN)
            else:
                following = await self._call_tools(actor, command)
        return following

    async def _end(self, actor: SessionActor, end: EndTurn) -> None:
        turn = actor.turn
        actor.record(
            TurnFinished(
                **actor.stamp(self._clock.now()),
                status=end.status,
                usage=turn.usage,
                error=end.error,
                cost=turn.cost,
            )
        )
        actor.cancel_requested = False
        await self._flush(actor, ended=turn.id, ended_status=end.status, cost=turn.cost)
        self._metrics.turns.labels(end.status).inc()
        state = actor.state
        copy = HotCopy(actor.epoch, state.seq, state.turns, state.window, state.cost)
        self._hot.save(actor.tenant, actor.id, copy, newest=1)

    # Tool calls

    async def _call_tools(self, actor: SessionActor, command: CallTools) -> tuple[Command, ...]:
        for call, attempt in command.calls:
            actor.record(
                ToolCalled(
                    **actor.stamp(self._clock.now()),
                    call_id=call.call_id,
                    name=call.name,
                    arguments=call.arguments,
                    attempt=attempt,
                )
            )
        # Durable before the first of them is dispatched: what may have begun is known.
        await self._flush(actor)
        # This process may have slept since: another owner may have run and settled them.
        await self._confirm()
        if actor.dropped:
            raise OwnershipLostError("lost before its tools were called", session_id=actor.id)
        following: tuple[Command, ...] = ()
        turn = actor.turn
        prefix = f"{turn.id}/{turn.step}"
        files = asyncio.Lock()
        tasks = [
            asyncio.ensure_future(self._run_tool(actor, call, f"{prefix}/{call.call_id}", files))
            for call, _ in command.calls
        ]
        try:
            waiting = set(tasks)
            while waiting and not actor.cancel_requested:
                with actor.allow_interrupt():
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in tasks if task in waiting and task.done()]:
                    waiting.discard(task)
                    following = await self._settle(actor, *task.result())
        finally:
            for task in tasks:
                task.cancel()
        return (CANCELLED,) if actor.cancel_requested else following

    async def _settle(
        self, actor: SessionActor, call: ToolCall, result: ToolResult, took_s: float = 0.0
    ) -> tuple[Command, ...]:
        died = result.reason == "died"
        commands = actor.record(
            ToolFinished(
                **actor.stamp(self._clock.now()),
                call_id=call.call_id,
                name=call.name,
                status="unknown" if died else result.status,
                output=UNKNOWN_OUTCOME if died else result.output,
                reason=result.reason,
                took_s=took_s,
                cpu_s=result.cpu_s,
                memory_bytes=result.memory_bytes,
                cached=result.cached,
            )
        )
        await self._flush(actor)
        return commands

    async def _run_tool(
        self, actor: SessionActor, call: ToolCall, key: str, files: asyncio.Lock
    ) -> tuple[ToolCall, ToolResult, float]:
        (seq,) = [t.called_seq for t in actor.turn.tools if t.call.call_id == call.call_id]
        began = self._clock.monotonic()
        result = await self._tool_calls.run(actor, call, key, seq, files)
        return call, result, round(self._clock.monotonic() - began, 6)

    # The journal

    async def _flush(
        self,
        actor: SessionActor,
        *,
        started: str | None = None,
        ended: str | None = None,
        ended_status: str | None = None,
        cost: float = 0.0,
    ) -> None:
        append, events = actor.take_append(
            started=started, ended=ended, ended_status=ended_status, cost=cost
        )
        await self._journal.append(append)
        self._landed(actor, events)

    def _landed(self, actor: SessionActor, events: Sequence[AnyEvent]) -> None:
        hub = actor.hub
        if hub is None:
            return
        hub.feed(events)
        if hub.followers:
            message = WireMessage(
                kind="live",
                tenant=actor.tenant,
                session_id=actor.id,
                events=[msgspec.Raw(msgspec.json.encode(event)) for event in events],
            )
            self._tails.send(hub.followers, message)
