"""Sessions that run with models of which one is played by a test: what they come to."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from agentray.events import (
    ModelCalled,
    ModelFinished,
    ModelVoided,
    TurnFinished,
    TurnOptions,
)
from agentray.http.objects import ConversationMessage, ModelFallback, OutputText, Response
from agentray.http.response_object import begin
from agentray.http.responses import ResponseFold
from agentray.sessions.base import TurnInfo
from agentray.sessions.process import OwnerProcess
from tests.followed_turn import script as sim
from tests.integration.misbehaving import SSE, Steps, event
from tests.journal import Journal, TurnEvents
from tests.owners import TENANT, Owners, Reader, SimulatorServer, send
from tests.services import Services

__all__ = ["BAD", "FIRST_S", "ONE", "PLAIN", "SIMULATOR", "Play", "Scene", "Told", "stage"]

FIRST_S, STALL_S, STEP_S = 0.6, 0.4, 4.0
IMPATIENT = {
    "connect_timeout_s": FIRST_S,
    "first_token_timeout_s": FIRST_S,
    "stall_timeout_s": STALL_S,
    "step_timeout_s": STEP_S,
}
BAD = TurnOptions(model="bad")
SIMULATOR = TurnOptions(model="simulator")

names = (f"m{n}" for n in itertools.count())


ONE: Steps = [SSE, event("one "), 0.05]
"""A stream that said something, and may break off."""


PLAIN = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
"""The kinds of a response's events whose answer is one delta, as if nothing had happened."""


@dataclass
class Scene:
    """An owner with a model named bad, which an endpoint plays, and the simulator."""

    owners: Owners
    owner: OwnerProcess
    session: str = field(default_factory=lambda: next(names))

    async def run(self, text: str, options: TurnOptions = TurnOptions()) -> Told:
        """Run a turn to its end, followed by a client."""
        turn = await send(self.owner, self.session, text, options=options)
        reader = await Reader(self.owner, self.session, turn.id).to_the_end()
        assert reader.error is None
        return Told(self, turn, reader)

    async def still_answers(self) -> None:
        """Assert that the session goes on, and that its journal is sound."""
        told = await self.run(sim("well again"), SIMULATOR)
        assert (told.end.status, told.reader.text) == ("completed", "well again")
        self.journal().assert_sound()

    def journal(self) -> Journal:
        return self.owners.journal(self.session)

    def count(self, name: str, **labels: str) -> float:
        """Return what the owner counted."""
        found = 0.0
        for metric in self.owner.metrics.registry.collect():
            for sample in metric.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    found += sample.value
        return found


@dataclass
class Told:
    """What a turn came to: what its client was told, and what the journal has of it."""

    scene: Scene
    turn: TurnInfo
    reader: Reader

    def __post_init__(self) -> None:
        ends = self.reader.of(TurnFinished)
        assert len(ends) == 1
        self.end: TurnFinished = ends[0]
        fold = ResponseFold(begin(self.scene.session, self.turn, agent="assistant"), self.turn.id)
        events = fold.feed(self.reader.items)
        numbers = [event.sequence_number for event in events]
        assert numbers == sorted(set(numbers))
        self.response: Response = fold.response
        self.kinds = [str(event.__struct_config__.tag) for event in events]
        self.fallbacks = [event for event in events if isinstance(event, ModelFallback)]

    @property
    def called(self) -> list[ModelCalled]:
        return self.events.of(ModelCalled)

    @property
    def voided(self) -> list[ModelVoided]:
        return self.events.of(ModelVoided)

    @property
    def models(self) -> list[str]:
        """The models that were called, one after the other."""
        return [called.model for called in self.called]

    @property
    def events(self) -> TurnEvents:
        return self.scene.journal().turn(self.turn.id)

    @property
    def items(self) -> list[tuple[str, str]]:
        """The messages of the response: status and text."""
        found: list[tuple[str, str]] = []
        for item in self.response.output:
            assert isinstance(item, ConversationMessage)
            texts = [part.text for part in item.content if isinstance(part, OutputText)]
            found.append((item.status, "".join(texts)))
        return found

    def failed(self, code: str, says: str) -> None:
        """Assert that the turn failed with this, wherever one asks, and said nothing else."""
        assert (self.end.status, self.response.status) == ("failed", "failed")
        assert self.end.error is not None
        assert self.response.error is not None
        assert self.end.error.code == self.response.error.type == code
        assert says in self.end.error.message
        assert says in self.response.error.message
        assert not self.events.of(ModelFinished)
        assert "completed" not in [status for status, _ in self.items]

    def explained(self) -> None:
        """Assert that each call says why it is that model's."""
        for called in self.called:
            assert called.route is not None
            assert called.model in called.route.candidates
            assert called.route.reason


Play = Callable[..., Any]


def stage(services: Services, simulator: SimulatorServer) -> Play:
    """Return what makes a scene: with the URL of the bad model, its settings, and all models'."""

    @asynccontextmanager
    async def scene(
        url: str,
        *,
        bad: dict[str, Any] | None = None,
        agent: dict[str, Any] | None = None,
        **models: Any,
    ) -> AsyncIterator[Scene]:
        settings = {
            "default": "bad",
            "endpoints": {"bad": {"url": url, **(bad or {})}},
            "simulator": {"enabled": True},
            "routing": {"holdout": 0},
            **IMPATIENT,
        }
        for name, value in models.items():
            known = settings.get(name)
            settings[name] = {**known, **value} if isinstance(known, dict) else value
        owners = Owners(services, simulator, models=settings, agent=agent)
        try:
            scene = Scene(owners, await owners.start())
            await scene.owner.sessions.create(TENANT, session_id=scene.session)
            yield scene
        finally:
            await owners.stop()

    return scene
