"""What every route needs: the sessions, the models, the agents, and the rules of this door."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from agentray.clock import Clock
from agentray.config.settings import AgentSettings, HttpSettings
from agentray.errors import (
    BackpressureError,
    InvalidRequestError,
    ModelNotFoundError,
    TurnNotFoundError,
)
from agentray.http.answers import Answers
from agentray.http.sse import Watchdog
from agentray.models.client import RawStream
from agentray.sessions.base import Sessions

__all__ = ["TENANT", "Admission", "ChatModels", "Door", "Metrics", "ModelNames", "turn_id_of"]

TENANT = "default"
"""The tenant of every request, until requests say whose they are."""

Metrics = Callable[[], bytes | Awaitable[bytes]]


class ModelNames(Protocol):
    """What the door asks of the catalog of models."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def default(self) -> str: ...


class ChatModels(Protocol):
    """What the door asks of the model client."""

    async def complete_raw(
        self, model: str, body: bytes | Mapping[str, Any], *, session_id: str | None = None
    ) -> bytes | RawStream: ...


class Admission:
    """A bound on how many requests of a kind are served at once."""

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self._limit = limit
        self._running = 0

    @contextmanager
    def admit(self) -> Generator[None]:
        """Serve one more, within the context.

        Raises:
            BackpressureError: there are as many already as there may be.
        """
        if self._running >= self._limit:
            raise BackpressureError(
                f"this host serves as many {self._what} as it may", retry_after_s=1
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


@dataclass(frozen=True, slots=True)
class Door:
    """What every route is given."""

    sessions: Sessions
    models: ChatModels
    catalog: ModelNames
    agents: Mapping[str, AgentSettings]
    settings: HttpSettings
    watchdog: Watchdog
    answers: Answers
    completions: Admission
    draining: asyncio.Event
    metrics: Metrics
    clock: Clock
    openapi: bytes

    @property
    def default_agent(self) -> str:
        return next(iter(self.agents))

    def resolve(self, name: str | None) -> tuple[str | None, str | None]:
        """Return what ``model`` names: an agent, or else a model; of the same name, the agent.

        Raises:
            ModelNotFoundError: neither is called so.
        """
        if name is None:
            return None, None
        if name in self.agents:
            return name, None
        if name in self.catalog.names:
            return None, name
        known = ", ".join([*self.agents, *self.catalog.names])
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise ModelNotFoundError(
            f"there is no agent or model {shown!r}; there are: {known}", param="model", model=shown
        )

    def check_model(self, name: str | None) -> None:
        """Raise ``ModelNotFoundError`` if a model is named, and none is called so."""
        if name is not None and name not in self.catalog.names:
            shown = name if len(name) <= 80 else name[:80] + "…"
            known = ", ".join(self.catalog.names)
            raise ModelNotFoundError(
                f"there is no model {shown!r}; there are: {known}", param="model", model=shown
            )

    async def check_agent(self, session_id: str, agent: str | None) -> None:
        """Refuse an agent that is not the one of an existing session.

        Raises:
            InvalidRequestError, SessionNotFoundError: as they say.
        """
        if agent is None or len(self.agents) == 1:
            return
        session = await self.sessions.get(TENANT, session_id)
        if session.agent != agent:
            raise InvalidRequestError(
                f"session {session_id} is of agent {session.agent!r}, not {agent!r}", param="model"
            )


def turn_id_of(value: str) -> str:
    """Return the turn's id in a path, if it can be one; else there is no such turn."""
    if len(value) != 26 or not value.isascii() or not value.isalnum():
        shown = value if len(value) <= 40 else value[:40] + "…"
        raise TurnNotFoundError(f"there is no turn {shown!r}")
    return value
