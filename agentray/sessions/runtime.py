"""Carry out what ``state.py`` decides: the only place where a turn touches the world."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from agentray.agents.spec import Agents
from agentray.clock import Clock
from agentray.errors import ModelError, OwnershipLostError
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
    TurnOptions,
    TurnResumed,
)
from agentray.memory.window import assemble
from agentray.models.base import ModelCaller, ModelProgress, ModelRequest
from agentray.sessions.actor import SessionActor
from agentray.sessions.journal import Journal
from agentray.sessions.state import (
    CANCELLED,
    OWNER_LOST,
    CallModel,
    CallTools,
    Command,
    EndTurn,
    RecoverModel,
    RunModel,
    SettleUnknown,
    Turn,
    after_model_error,
    resume,
)
from agentray.sessions.stream import TailWriter, WireMessage, tail_key
from agentray.storage.base import HotCopy, HotStore, TurnBirth, TurnRow, Wire
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics
from agentray.tools.spec import Toolbox

__all__ = ["SessionRuntime", "TurnNotBorn"]

log = get_logger(__name__)

UNKNOWN_OUTCOME = (
    "The process that ran this tool died. Whether the call took effect is unknown; "
    "check before you repeat it."
)
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
        models: ModelCaller,
        continues_text: Callable[[str], bool],
        default_model: str,
        agents: Agents,
        tools: Toolbox,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._owner_id = owner_id
        self._journal = journal
        self._hot = hot
        self._wire = wire
        self._tails = tails
        self._confirm = confirm
        self._models = models
        self._continues_text = continues_text
        self._default_model = default_model
        self._agents = agents
        self._tools = tools
        self._clock = clock
        self._metrics = metrics

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
        turn = _running(actor)
        phase = turn.phase
        tail: bytes | None = None
        if phase == "model":
            tail = await self._wire.read_tail(tail_key(actor.tenant, actor.id, turn.called_seq))
        resumed = TurnResumed(
            **self._stamp(actor),
            phase="streaming" if tail else phase,
            epoch=actor.epoch,
            owner=self._owner_id,
        )
        actor.record(resumed)
        self._metrics.takeovers.inc()
        await self._flush(actor)
        return resume(
            _running(actor), actor.rules, self._tools.on_crash, cancelled=cancel_requested
        )

    def _accept(
        self, actor: SessionActor, turn_id: str, input: list[Message], options: TurnOptions
    ) -> tuple[Command, ...]:
        commands = actor.record(self._accepted_event(actor, turn_id, input, options))
        for command in commands:
            if isinstance(command, CallModel):
                # The first call is journaled with the acceptance: one append less a turn.
                commands = self._record_call(actor, command)
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
                following = self._record_call(actor, command)
                await self._flush(actor)
            elif isinstance(command, RunModel):
                following = await self._call_model(actor)
            elif isinstance(command, RecoverModel):
                following = await self._recover_model(actor, command)
            elif isinstance(command, SettleUnknown):
                following = await self._settle(actor, command.call, "unknown", UNKNOWN_OUTCOME)
            else:
                following = await self._call_tools(actor, command)
        return following

    async def _end(self, actor: SessionActor, end: EndTurn) -> None:
        turn = _running(actor)
        actor.record(
            TurnFinished(**self._stamp(actor), status=end.status, usage=turn.usage, error=end.error)
        )
        actor.cancel_requested = False
        await self._flush(actor, ended=turn.id, ended_status=end.status)
        self._metrics.turns.labels(end.status).inc()
        state = actor.state
        copy = HotCopy(actor.epoch, state.seq, state.turns, state.window)
        self._hot.save(actor.tenant, actor.id, copy, newest=1)

    # Model calls

    def _model_of(self, turn: Turn) -> str:
        return turn.options.model or self._agents.get(turn.agent).model or self._default_model

    def _may_continue(self, turn: Turn) -> bool:
        try:
            return self._continues_text(self._model_of(turn))
        except ModelError:  # no longer in the catalog: the call to come says so
            return False

    def _record_call(self, actor: SessionActor, command: CallModel) -> tuple[Command, ...]:
        return actor.record(
            ModelCalled(
                **self._stamp(actor),
                step=command.step,
                attempt=command.attempt,
                model=self._model_of(_running(actor)),
                continued_from=command.continued_from,
            )
        )

    def _request(self, actor: SessionActor, turn: Turn) -> ModelRequest:
        agent, options = self._agents.get(turn.agent), turn.options
        instructions = (
            options.instructions if options.instructions is not None else agent.instructions
        )
        return ModelRequest(
            model=self._model_of(turn),
            messages=assemble(instructions, actor.state.window, turn.messages, turn.text),
            tools=self._tools.wire(agent.tools),
            temperature=(
                options.temperature if options.temperature is not None else agent.temperature
            ),
            top_p=options.top_p,
            max_output_tokens=options.max_output_tokens or agent.max_output_tokens,
            session_id=actor.id,
            continue_text=bool(turn.text),
        )

    async def _call_model(self, actor: SessionActor) -> tuple[Command, ...]:
        turn, hub = _running(actor), actor.hub
        if actor.cancel_requested:
            return (CANCELLED,)
        assert hub is not None
        final: ModelProgress | None = None
        called_seq = hub.called_seq
        self._tails.begin(actor.tenant, actor.id, hub)
        error: ModelError | None = None
        try:
            with _interruptible(actor):
                stream = self._models.stream(self._request(actor, turn))
                async with aclosing(cast("AsyncGenerator[ModelProgress]", stream)):
                    async for progress in stream:
                        if hub.called_seq != called_seq:
                            break
                        if progress.text:
                            hub.append_text(progress.text)
                        if progress.finish_reason is not None:
                            final = progress
                        elif progress.text:
                            self._tails.grew(actor.tenant, actor.id)
        except ModelError as caught:
            error = caught
        finally:
            self._tails.end(actor.tenant, actor.id, called_seq)
        text = turn.text + hub.text
        if final is not None:
            return self._model_finished(actor, turn, text, final)
        if actor.cancel_requested:
            if text:
                self._void(actor, turn, "cancelled", text, continues=False)
                await self._flush(actor)
            return (CANCELLED,)
        if error is None:
            error = ModelError("the call ended without an answer")
        return await self._model_lost(actor, turn, text, error)

    def _model_finished(
        self, actor: SessionActor, turn: Turn, text: str, final: ModelProgress
    ) -> tuple[Command, ...]:
        # What follows at once (the turn's end, or the tools' calls) goes out in the same append.
        return actor.record(
            ModelFinished(
                **self._stamp(actor),
                step=turn.step,
                attempt=turn.attempt,
                text=text,
                finish_reason=final.finish_reason or "stop",
                tool_calls=_distinct(final.tool_calls),
                usage=final.usage,
            )
        )

    async def _model_lost(
        self, actor: SessionActor, turn: Turn, text: str, error: ModelError
    ) -> tuple[Command, ...]:
        event = after_model_error(
            turn,
            retryable=error.retryable,
            error=TurnError(error.code, error.message),
            text=text,
            continues=error.retryable and bool(text) and self._may_continue(turn),
            rules=actor.rules,
        )
        log.info("model_call_lost", session=actor.id, turn=turn.id, code=error.code)
        self._metrics.model_errors.labels(error.code).inc()
        commands = actor.record(replace(event, seq=actor.state.seq + 1, at=self._clock.now()))
        if isinstance(event, ModelVoided):
            await self._flush(actor)
            retry_after_s = float(error.fields.get("retry_after_s") or 0.0)
            if not actor.cancel_requested:
                with _interruptible(actor):
                    await asyncio.sleep(min(max(retry_after_s, 0.1 * 2**turn.failures), 30.0))
            if actor.cancel_requested:
                return (CANCELLED,)
        return commands

    def _void(
        self, actor: SessionActor, turn: Turn, reason: str, text: str, *, continues: bool
    ) -> tuple[Command, ...]:
        return actor.record(
            ModelVoided(
                **self._stamp(actor),
                step=turn.step,
                attempt=turn.attempt,
                reason=reason,
                text=text,
                continues=continues,
            )
        )

    async def _recover_model(
        self, actor: SessionActor, command: RecoverModel
    ) -> tuple[Command, ...]:
        """Void the attempt that died with its owner, and go on where its text ends."""
        turn = _running(actor)
        tail = await self._wire.read_tail(tail_key(actor.tenant, actor.id, command.called_seq))
        text = turn.text + (tail or b"").decode()
        continues = bool(text) and self._may_continue(turn)
        return self._void(actor, turn, OWNER_LOST, text, continues=continues)

    # Tool calls

    async def _call_tools(self, actor: SessionActor, command: CallTools) -> tuple[Command, ...]:
        for call, attempt in command.calls:
            actor.record(
                ToolCalled(
                    **self._stamp(actor),
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
        turn = _running(actor)
        prefix = f"{actor.tenant}/{actor.id}/{turn.id}/{turn.step}"
        tasks = [
            asyncio.ensure_future(self._run_tool(actor, call, f"{prefix}/{call.call_id}"))
            for call, _ in command.calls
        ]
        try:
            waiting = set(tasks)
            while waiting and not actor.cancel_requested:
                with _interruptible(actor):
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in tasks if task in waiting and task.done()]:
                    waiting.discard(task)
                    call, status, output = task.result()
                    following = await self._settle(actor, call, status, output)
        finally:
            for task in tasks:
                task.cancel()
        return (CANCELLED,) if actor.cancel_requested else following

    async def _settle(
        self, actor: SessionActor, call: ToolCall, status: Any, output: str
    ) -> tuple[Command, ...]:
        commands = actor.record(
            ToolFinished(
                **self._stamp(actor),
                call_id=call.call_id,
                name=call.name,
                status=status,
                output=output,
            )
        )
        await self._flush(actor)
        return commands

    async def _run_tool(
        self, actor: SessionActor, call: ToolCall, key: str
    ) -> tuple[ToolCall, str, str]:
        spec = self._tools.get(call.name)
        if spec is None or call.name not in self._agents.get(actor.agent).tools:
            return call, "error", f"There is no tool {call.name!r}."
        try:
            arguments = msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
        except msgspec.MsgspecError as error:
            return call, "error", f"The arguments are not a JSON object: {error}"
        deadline = asyncio.timeout(spec.timeout_s)
        try:
            async with deadline:
                return call, "ok", await spec.run(arguments, key)
        except Exception as error:  # noqa: BLE001 - its own failure is a result for the model
            log.info("tool_failed", tool=call.name, error=type(error).__name__)
            if deadline.expired():
                return call, "error", f"The tool took longer than {spec.timeout_s:g} s."
            return call, "error", f"{type(error).__name__}: {error}"

    # The journal

    def _stamp(self, actor: SessionActor) -> dict[str, Any]:
        return {
            "seq": actor.state.seq + 1,
            "turn_id": _running(actor).id,
            "at": self._clock.now(),
        }

    async def _flush(
        self,
        actor: SessionActor,
        *,
        started: str | None = None,
        ended: str | None = None,
        ended_status: str | None = None,
    ) -> None:
        append, events = actor.take_append(started=started, ended=ended, ended_status=ended_status)
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


def _distinct(calls: Sequence[ToolCall]) -> list[ToolCall]:
    """Return the calls with ids that differ: results are matched by them."""
    known: dict[str, ToolCall] = {}
    for call in calls:
        call_id, again = call.call_id, 1
        while call_id in known:
            again += 1
            call_id = f"{call.call_id}_{again}"
        known[call_id] = call if again == 1 else replace(call, call_id=call_id)
    return list(known.values())


def _running(actor: SessionActor) -> Turn:
    turn = actor.state.turn
    if turn is None:
        raise AssertionError(f"session {actor.id} runs no turn")
    return turn


@contextmanager
def _interruptible(actor: SessionActor) -> Generator[None]:
    """Let ``actor.cancel`` end what is awaited inside, and nothing outside."""
    task = cast("asyncio.Task[None]", asyncio.current_task())
    actor.interruptible = task
    try:
        yield
    except asyncio.CancelledError:
        if not actor.cancel_requested or actor.dropped:
            raise
        task.uncancel()
    finally:
        actor.interruptible = None
