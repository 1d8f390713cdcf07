"""What every route needs: the sessions, the models, the agents, and the rules of this door."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from agentray.clock import Clock
from agentray.config.settings import AgentSettings, BatchSettings, HttpSettings
from agentray.errors import (
    BackpressureError,
    InvalidRequestError,
    ModelNotFoundError,
    TurnNotFoundError,
)
from agentray.http.answers import Answers
from agentray.http.sse import Watchdog
from agentray.models.base import ModelHealth
from agentray.models.completions import Completion
from agentray.sessions.base import Sessions
from agentray.storage.batches import BatchBook, FileStore

__all__ = [
    "TENANT",
    "Admission",
    "ChatModels",
    "Door",
    "EmbeddingModels",
    "Healths",
    "Metrics",
    "ModelNames",
    "turn_id_of",
]

TENANT = "default"
"""The tenant of every request, until requests say whose they are."""

Metrics = Callable[[], bytes | Awaitable[bytes]]
Healths = Callable[[], Mapping[str, ModelHealth]]


class ModelNames(Protocol):
    """What the door asks of the catalog of models."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def kind(self, name: str) -> Literal["chat", "embedding"]: ...


class ChatModels(Protocol):
    """What the door asks of the models: see ``Completions``."""

    async def complete(
        self,
        model: str | None,
        body: bytes | Mapping[str, Any],
        *,
        tenant: str = "default",
        session_id: str | None = None,
        preferred: str | None = None,
        allowed: Sequence[str] = (),
        cache: bool | None = None,
    ) -> Completion: ...


class EmbeddingModels(Protocol):
    """What the door asks of the models that embed: see ``Embeddings``."""

    async def embed_raw(self, model: str, body: Mapping[str, Any]) -> bytes: ...


class Admission:
    """A bound on how many requests of a kind are served at once."""

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self._limit = limit
        self._running = 0

    @property
    def running(self) -> int:
        """How many are being served now."""
        return self._running

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
    embeddings: EmbeddingModels
    files: FileStore
    batches: BatchBook
    catalog: ModelNames
    agents: Mapping[str, AgentSettings]
    settings: HttpSettings
    batch: BatchSettings
    watchdog: Watchdog
    answers: Answers
    completions: Admission
    uploads: Admission
    draining: asyncio.Event
    metrics: Metrics
    model_health: Healths
    clock: Clock
    openapi: bytes

    @property
    def default_agent(self) -> str:
        return next(iter(self.agents))

    def resolve(self, name: str | None, *, chats: bool = True) -> tuple[str | None, str | None]:
        """Return what ``model`` names: an agent, or else a model; of the same name, the agent.

        Raises:
            ModelNotFoundError: neither is called so.
            InvalidRequestError: it has to chat, and is a model for embeddings.
        """
        if name is None:
            return None, None
        if name in self.agents:
            return name, None
        if name in self.catalog.names:
            if chats:
                self._check_chats(name)
            return None, name
        known = ", ".join([*self.agents, *self.catalog.names])
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise ModelNotFoundError(
            f"there is no agent or model {shown!r}; there are: {known}", param="model", model=shown
        )

    def check_model(self, name: str | None) -> None:
        """Refuse a name, if there is one, that is not that of a model which chats.

        Raises:
            ModelNotFoundError, InvalidRequestError: as they say.
        """
        if name is not None:
            if name not in self.catalog.names:
                raise _no_model(name, self.catalog.names)
            self._check_chats(name)

    def _check_chats(self, model: str) -> None:
        if self.catalog.kind(model) != "chat":
            raise InvalidRequestError(
                f"model {model!r} is for embeddings and does not chat", param="model"
            )

    def embedding_model(self, name: str | None) -> str:
        """Return the model for embeddings that is named, or else the first one.

        Raises:
            ModelNotFoundError: there is none, or none called so.
            InvalidRequestError: the name is an agent's, or that of a model which chats.
        """
        models = [n for n in self.catalog.names if self.catalog.kind(n) == "embedding"]
        if name in models or (name is None and models):
            return name or models[0]
        if name in self.catalog.names or name in self.agents:
            raise InvalidRequestError(f"{name!r} chats and makes no embeddings", param="model")
        raise _no_model(name or "", models)

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


def _no_model(name: str, known: Sequence[str]) -> ModelNotFoundError:
    shown = name if len(name) <= 80 else name[:80] + "…"
    there = ", ".join(known) or "none of this kind"
    said = f"there is no model {shown!r}; there are: {there}"
    return ModelNotFoundError(said, param="model", model=shown)


def turn_id_of(value: str) -> str:
    """Return the turn's id in a path, if it can be one; else there is no such turn."""
    if len(value) != 26 or not value.isascii() or not value.isalnum():
        shown = value if len(value) <= 40 else value[:40] + "…"
        raise TurnNotFoundError(f"there is no turn {shown!r}")
    return value
