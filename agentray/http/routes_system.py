"""What operators and tools ask: models, health, metrics, and the description of all routes."""

from __future__ import annotations

from inspect import isawaitable
from typing import Literal

import msgspec

from agentray.http.door import Door
from agentray.http.exchange import Exchange, Header
from agentray.http.objects import Model, ModelList
from agentray.models.base import ModelHealth

__all__ = [
    "Health",
    "Readiness",
    "health",
    "list_models",
    "metrics",
    "openapi",
    "readiness",
    "retrieve_model",
]

_JSON: Header = (b"content-type", b"application/json")
_PLAIN: Header = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")


class Health(msgspec.Struct, frozen=True):
    """This process answers."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """Whether this process takes new work, and what it holds.

    A model that cannot be called leaves it ready: others are called instead.
    """

    ready: bool
    owner_id: str
    resident: int
    running: int
    queued: int
    draining: bool
    store_ok: bool
    cache_ok: bool
    models: dict[str, ModelHealth]


async def list_models(door: Door, exchange: Exchange) -> None:
    agents = [Model(name, "agents") for name in door.agents]
    models = [Model(name, "models") for name in door.catalog.names if name not in door.agents]
    await exchange.reply(ModelList([*agents, *models]))


async def retrieve_model(door: Door, exchange: Exchange) -> None:
    name = exchange.params[0]
    agent, _ = door.resolve(name, chats=False)
    await exchange.reply(Model(name, "agents" if agent is not None else "models"))


async def health(door: Door, exchange: Exchange) -> None:
    await exchange.reply(Health())


async def readiness(door: Door, exchange: Exchange) -> None:
    facts = door.sessions.describe()
    # A lost cache slows sessions down and stops none.
    ready = bool(facts["store_ok"]) and not facts["draining"] and not door.draining.is_set()
    known = {key: facts[key] for key in Readiness.__struct_fields__ if key in facts}
    known |= {"ready": ready, "models": dict(door.model_health())}
    await exchange.reply(Readiness(**known), status=200 if ready else 503)


async def metrics(door: Door, exchange: Exchange) -> None:
    found = door.metrics()
    body = await found if isawaitable(found) else found
    await exchange.reply_bytes(body, _PLAIN)


async def openapi(door: Door, exchange: Exchange) -> None:
    await exchange.reply_bytes(door.openapi, _JSON)
