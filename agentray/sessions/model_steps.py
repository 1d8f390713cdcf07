"""Carry out the model calls of a turn's steps: pick, call, stream, check, and fall back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from agentray.agents.spec import Agents
from agentray.clock import Clock
from agentray.config.settings import AgentSettings
from agentray.errors import ModelError
from agentray.events import (
    ModelCalled,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    ToolCall,
    TurnError,
)
from agentray.memory.window import assemble
from agentray.models.base import Bill, ModelCaller, ModelProgress, ModelRequest
from agentray.models.catalog import cost
from agentray.models.checks import output_problem, tool_calls_problem
from agentray.models.router import Router, may_succeed_elsewhere
from agentray.models.usage import estimate
from agentray.sessions.actor import SessionActor
from agentray.sessions.state import (
    CANCELLED,
    CONTEXT_LENGTH,
    OWNER_LOST,
    CallModel,
    Command,
    EndTurn,
    RecoverModel,
    Turn,
)
from agentray.sessions.steps import (
    after_lost_call,
    may_go_on,
    output_schema,
    shown_window,
    step_of,
    time_left_s,
    tokens_left,
)
from agentray.sessions.stream import TailWriter
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics
from agentray.tools.spec import Toolbox

__all__ = ["ModelSteps"]

log = get_logger(__name__)

REJECTED = "answer_rejected"
"""The reason of an attempt whose answer failed its checks."""


class ModelSteps:
    """What ``SessionRuntime`` does with models; ``flush`` makes an actor's events durable."""

    def __init__(
        self,
        *,
        router: Router,
        models: ModelCaller,
        agents: Agents,
        tools: Toolbox,
        tails: TailWriter,
        clock: Clock,
        metrics: Metrics,
        flush: Callable[[SessionActor], Awaitable[None]],
    ) -> None:
        self._router = router
        self._models = models
        self._agents = agents
        self._tools = tools
        self._tails = tails
        self._clock = clock
        self._metrics = metrics
        self._flush = flush

    def record_call(self, actor: SessionActor, command: CallModel) -> tuple[Command, ...]:
        """Pick a model and record that it is called; end the turn if there is none for it."""
        turn = actor.turn
        agent = self._agents.get(turn.agent)
        tools = len(self._tools.offered(agent.tools))
        preferred = agent.model or self._router.catalog.default
        step = step_of(
            actor.state,
            turn,
            agent,
            preferred=preferred,
            tools=tools,
            minds_images=self._router.minds_images,
            compares=self._router.compares,
            rules=actor.rules,
        )
        try:
            choice = self._router.choose(step)
        except ModelError as error:
            log.info("no_model", session=actor.id, turn=turn.id, code=error.code)
            return (EndTurn("failed", TurnError(error.code, error.message)),)
        actor.route = choice.route
        return actor.record(
            ModelCalled(
                **actor.stamp(self._clock.now()),
                step=command.step,
                attempt=command.attempt,
                model=choice.model,
                continued_from=command.continued_from,
                route=choice.route,
            )
        )

    async def run(self, actor: SessionActor) -> tuple[Command, ...]:
        """Make the call that was recorded, and record how it ended."""
        turn, hub = actor.turn, actor.hub
        if actor.cancel_requested:
            return (CANCELLED,)
        assert hub is not None
        agent = self._agents.get(turn.agent)
        # What has to be checked as a whole is not shown before.
        held_back = output_schema(turn, agent) is not None
        final: ModelProgress | None = None
        called_seq = hub.called_seq
        self._tails.begin(actor.tenant, actor.id, hub)
        error: ModelError | None = None
        bill = Bill()
        withheld: list[str] = []
        try:
            with actor.allow_interrupt():
                stream = self._models.stream(self._request(actor, turn, agent, bill))
                async with aclosing(cast("AsyncGenerator[ModelProgress]", stream)):
                    async for progress in stream:
                        if hub.called_seq != called_seq:
                            break
                        if progress.finish_reason is not None:
                            final = progress
                        if not progress.text:
                            continue
                        if held_back:
                            withheld.append(progress.text)
                            continue
                        hub.append_text(progress.text)
                        if final is None:
                            self._tails.grew(actor.tenant, actor.id)
            if final is not None and final.problem is None and withheld:
                hub.append_text("".join(withheld))
        except ModelError as caught:
            error = caught
        finally:
            self._tails.end(actor.tenant, actor.id, called_seq)
        text = turn.text + hub.text
        if final is not None:
            if final.problem is not None:
                return await self._rejected(actor, turn, text, final, "".join(withheld))
            return self._finished(actor, turn, text, final)
        if actor.cancel_requested:
            cost = bill.cost + float(error.fields.get("cost") or 0.0 if error else 0.0)
            if text or cost:
                self._void(actor, "cancelled", text, cost=cost)
                await self._flush(actor)
            return (CANCELLED,)
        if error is None:
            error = ModelError("the call ended without an answer", cost=bill.cost)
        return await self._lost(actor, turn, text, error, progressed=bool(hub.text))

    def recover(self, actor: SessionActor, command: RecoverModel) -> tuple[Command, ...]:
        """Void the attempt that died with its owner, and go on where its text ends."""
        turn = actor.turn
        return self._void(
            actor,
            OWNER_LOST,
            turn.text + command.tail,
            # Of two models that were called, nobody knows which one spoke.
            continues=self._may_continue(turn) and not turn.hedged,
            cost=self._estimated_cost(actor, turn, command.tail),
        )

    # The request

    def _request(
        self, actor: SessionActor, turn: Turn, agent: AgentSettings, bill: Bill
    ) -> ModelRequest:
        options = turn.options
        instructions = (
            options.instructions if options.instructions is not None else agent.instructions
        )
        window = shown_window(actor.state.window, turn, turn.model)
        return ModelRequest(
            model=turn.model,
            messages=assemble(instructions, window, turn.messages, turn.text),
            tenant=actor.tenant,
            route=actor.route,
            timeout_s=time_left_s(turn, actor.rules, self._clock.now()),
            check=self._check(turn, agent),
            # With nowhere else to go, an endpoint that restarts is waited for.
            patient=not self._router.has_other(actor.route, turn.model, turn.lost),
            cache=agent.cache,
            bill=bill,
            output_schema=self._response_format(turn, agent),
            tools=self._tools.wire(agent.tools),
            temperature=(
                options.temperature if options.temperature is not None else agent.temperature
            ),
            top_p=options.top_p,
            max_output_tokens=tokens_left(
                options.max_output_tokens or agent.max_output_tokens, turn.text
            ),
            session_id=actor.id,
            continue_text=bool(turn.text),
        )

    def _response_format(self, turn: Turn, agent: AgentSettings) -> bytes | None:
        schema = output_schema(turn, agent)
        if schema is None or not self._router.catalog.resolve(turn.model).card.output_schema:
            return None
        if schema == {"type": "object"}:
            # What strict schemas have to say, this one does not.
            return b'{"type":"json_object"}'
        form = turn.options.output_form or {"name": "answer"}
        form = {**form, "schema": schema}
        return msgspec.json.encode({"type": "json_schema", "json_schema": form})

    def _check(
        self, turn: Turn, agent: AgentSettings
    ) -> Callable[[str, tuple[ToolCall, ...]], str | None]:
        def parameters(name: str) -> dict[str, Any] | None:
            spec = self._tools.get(name) if self._tools.offers(agent.tools, name) else None
            return spec.parameters if spec is not None else None

        def check(text: str, calls: tuple[ToolCall, ...]) -> str | None:
            if calls:
                return tool_calls_problem(calls, parameters)
            schema = output_schema(turn, agent)
            return None if schema is None else output_problem(turn.text + text, schema)

        return check

    def _estimated_cost(self, actor: SessionActor, turn: Turn, said: str) -> float:
        """Return what a call has cost of which only the text is known, in US dollars."""
        if not said:
            return 0.0
        try:
            price = self._router.catalog.resolve(turn.model).card.price
        except ModelError:  # no longer in the catalog
            return 0.0
        prompt = [*actor.state.window, *turn.messages, turn.text.encode()]
        return cost(price, estimate(prompt, len(said)), 0.0)

    def _may_continue(self, turn: Turn) -> bool:
        try:
            return self._router.catalog.resolve(turn.model).continues_text
        except ModelError:  # no longer in the catalog: the call to come says so
            return False

    # How a call ended

    def _finished(
        self, actor: SessionActor, turn: Turn, text: str, final: ModelProgress
    ) -> tuple[Command, ...]:
        # What follows at once (the turn's end, or the tools' calls) goes out in the same append.
        return actor.record(
            ModelFinished(
                **actor.stamp(self._clock.now()),
                step=turn.step,
                attempt=turn.attempt,
                text=text,
                finish_reason=final.finish_reason or "stop",
                tool_calls=_distinct(final.tool_calls),
                usage=final.usage,
                model=final.model,
                cached=final.cached,
                cost=final.cost,
            )
        )

    async def _rejected(
        self,
        actor: SessionActor,
        turn: Turn,
        text: str,
        final: ModelProgress,
        withheld: str,
    ) -> tuple[Command, ...]:
        """Let the next tier try, once. Without one, a bad tool call is answered by its problem,
        which the model may mend; an answer in the wrong form ends the turn."""
        model = final.model or turn.model
        log.info("answer_rejected", session=actor.id, turn=turn.id, model=model)
        has_time = may_go_on(turn, final.cost, self._clock.now(), actor.rules)
        next_tier = self._router.can_escalate(actor.route, model, turn.lost)
        if next_tier and has_time and not turn.escalated:
            self._metrics.escalations.labels(model).inc()
            commands = self._void(
                actor, REJECTED, text, escalates=True, model=final.model, cost=final.cost
            )
            await self._flush(actor)
            return commands
        if final.tool_calls:
            return self._finished(actor, turn, text + withheld, final)
        error = TurnError("output_invalid", f"model {model!r}: {final.problem}")
        return actor.record(
            ModelFailed(
                **actor.stamp(self._clock.now()),
                step=turn.step,
                attempt=turn.attempt,
                error=error,
                text=text,
                cost=final.cost,
            )
        )

    async def _lost(
        self,
        actor: SessionActor,
        turn: Turn,
        text: str,
        error: ModelError,
        *,
        progressed: bool,
    ) -> tuple[Command, ...]:
        model = error.fields.get("answering") or turn.model
        route = actor.route
        # A model that goes on is asked again; one that does not even begin, or that is left alone
        # from now on, makes way for another.
        elsewhere = self._router.has_other(route, model, turn.lost)
        # To wait for what the step has no time for is in vain.
        asked_s = float(error.fields.get("retry_after_s") or 0.0)
        in_time = elsewhere or asked_s < time_left_s(turn, actor.rules, self._clock.now())
        empty = bool(error.fields.get("empty")) and not turn.escalated
        escalates = empty and self._router.can_escalate(route, model, turn.lost)
        event = after_lost_call(
            turn,
            error=TurnError(error.code, error.message),
            may_pass=in_time and (error.retryable or (elsewhere and may_succeed_elsewhere(error))),
            text=text,
            continues=error.retryable
            and self._may_continue(replace(turn, model=model))
            and (not elsewhere or (progressed and not self._router.wait_s(model))),
            cost=float(error.fields.get("cost") or 0.0),
            now=self._clock.now(),
            rules=actor.rules,
            unsent=bool(error.fields.get("unsent")) and elsewhere,
        )
        log.info("model_call_lost", session=actor.id, turn=turn.id, code=error.code, model=model)
        self._metrics.model_errors.labels(error.code).inc()
        if isinstance(event, ModelVoided):
            other = model if model != turn.model else None
            event = replace(event, escalates=escalates, model=other)
            if escalates:
                self._metrics.escalations.labels(model).inc()
        commands = actor.record(replace(event, seq=actor.state.seq + 1))
        if not isinstance(event, ModelVoided):
            return commands
        await self._flush(actor)
        if event.reason != CONTEXT_LENGTH and not actor.cancel_requested:
            wait_s = 0.0 if elsewhere else self._router.backoff_s(turn.failures, error)
            with actor.allow_interrupt():
                await asyncio.sleep(min(wait_s, time_left_s(turn, actor.rules, self._clock.now())))
        return (CANCELLED,) if actor.cancel_requested else commands

    def _void(
        self, actor: SessionActor, reason: str, text: str, *, continues: bool = False, **how: Any
    ) -> tuple[Command, ...]:
        turn = actor.turn
        return actor.record(
            ModelVoided(
                **actor.stamp(self._clock.now()),
                step=turn.step,
                attempt=turn.attempt,
                reason=reason,
                text=text,
                continues=continues and bool(text),
                **how,
            )
        )


def _distinct(calls: tuple[ToolCall, ...]) -> list[ToolCall]:
    """Return the calls with ids that differ: results are matched by them."""
    known: dict[str, ToolCall] = {}
    for call in calls:
        call_id, again = call.call_id, 1
        while call_id in known:
            again += 1
            call_id = f"{call.call_id}_{again}"
        known[call_id] = call if again == 1 else replace(call, call_id=call_id)
    return list(known.values())
