"""Readers of sessions that live elsewhere: what a mirror feeds them, and when nothing comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentray.clock import ManualClock
from agentray.errors import SessionParkedError
from agentray.events import AnyEvent, ModelCalled, TurnAccepted, TurnFinished, encode_event
from agentray.sessions import following as following_module
from agentray.sessions.base import Cursor, StreamItem
from agentray.sessions.following import Following
from agentray.sessions.stream import Hub

KEY = ("t", "s")
TURN = "t1"


def turn(first_seq: int, turn_id: str = TURN) -> list[AnyEvent]:
    """Return a turn that has no end yet."""
    at: dict[str, Any] = {"turn_id": turn_id, "at": 0.0}
    call = ModelCalled(seq=first_seq + 1, **at, step=1, attempt=1, model="m")
    return [TurnAccepted(seq=first_seq, **at, input=[], agent="a"), call]


def end(seq: int) -> AnyEvent:
    return TurnFinished(seq=seq, turn_id=TURN, at=0.0, status="completed")


class Store:
    """One session's rows."""

    def __init__(self) -> None:
        self.bodies = [encode_event(event) for event in turn(1)]
        self.parked_reason: str | None = None

    async def session(self, tenant: str, session_id: str) -> Any:
        return SimpleNamespace(
            first_epoch=1,
            last_seq=len(self.bodies),
            owner=None,
            owner_alive=False,
            parked_reason=self.parked_reason,
        )

    async def turn(self, tenant: str, session_id: str, turn_id: str) -> Any:
        return SimpleNamespace(first_seq=1, last_seq=None)

    async def events(
        self, tenant: str, session_id: str, *, after: int, limit: int, up_to: int | None = None
    ) -> list[bytes]:
        return self.bodies[after:up_to][:limit]


class World:
    def __init__(self) -> None:
        self.store = Store()
        self.hubs: dict[tuple[str, str], Hub] = {}
        self.following = Following(
            store=cast(Any, self.store),
            tails=cast(Any, None),
            owner_id="o",
            hubs=self.hubs,
            clock=ManualClock(),
        )

    @property
    def mirror(self) -> asyncio.Task[None]:
        return cast(Any, self.following)._mirrors[KEY][1]

    @asynccontextmanager
    async def reader(self, turn_id: str | None = TURN) -> AsyncIterator[Reader]:
        reader = Reader(self.following, turn_id)
        try:
            yield reader
        finally:
            reader.task.cancel()
            await asyncio.wait([reader.task])


class Reader:
    def __init__(self, following: Following, turn_id: str | None) -> None:
        self.items: list[StreamItem] = []
        self.task = asyncio.create_task(self._read(following, turn_id))

    async def _read(self, following: Following, turn_id: str | None) -> None:
        async for items in following.follow(KEY, Cursor(0), turn_id):
            self.items += items

    @property
    def error(self) -> BaseException | None:
        return self.task.exception() if self.task.done() else None


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "_POLL_S", 0.0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.following.close()


async def steps(condition: Callable[[], object] = lambda: False, *, enough: int = 300) -> bool:
    """Let everything go on until the condition holds; return whether it does."""
    for _ in range(enough):
        if condition():
            return True
        await asyncio.sleep(0)
    return False


async def test_a_reader_of_a_turn_is_told_that_its_session_is_parked(world: World) -> None:
    async with world.reader() as reader:
        assert await steps(lambda: len(reader.items) == 2)
        world.store.parked_reason = "it broke"
        assert await steps(reader.task.done)
        assert isinstance(reader.error, SessionParkedError)
        assert reader.error.fields["reason"] == "it broke"
    async with world.reader() as late:
        assert await steps(late.task.done)
        assert isinstance(late.error, SessionParkedError)
        assert late.items == turn(1), "it has all that the journal has"


async def test_a_tail_of_a_parked_session_waits_for_what_comes(world: World) -> None:
    world.store.parked_reason = "it broke"
    async with world.reader(None) as reader:
        assert not await steps(reader.task.done)
        world.store.parked_reason = None
        world.store.bodies.append(encode_event(end(3)))
        assert await steps(lambda: reader.items == [*turn(1), end(3)])


async def test_a_turn_is_not_failed_for_what_parked_its_session_before(world: World) -> None:
    async with world.reader() as reader:
        assert await steps(lambda: len(reader.items) == 2)
        world.hubs[KEY].parked_at = 2
        world.hubs[KEY].notify()
        assert not await steps(reader.task.done)
        world.store.bodies.append(encode_event(end(3)))
        assert await steps(reader.task.done)
        assert reader.error is None


async def test_a_reader_of_what_cannot_be_read_learns_that_it_is_parked(world: World) -> None:
    async with world.reader() as reader:
        assert await steps(lambda: len(reader.items) == 2)
        world.store.bodies.append(b"{}")
        assert not await steps(reader.task.done)
        world.store.parked_reason = "it cannot be brought back"
        assert await steps(reader.task.done)
        assert isinstance(reader.error, SessionParkedError)


async def test_a_hub_that_takes_the_place_of_another_is_fed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mirror of the hub before sleeps: it does not find by itself that it is of no use.
    monkeypatch.setattr(following_module, "_POLL_S", 3_600.0)
    async with world.reader() as old:
        assert await steps(lambda: len(old.items) == 2)
        del world.hubs[KEY]
        world.store.bodies.append(encode_event(end(3)))
        async with world.reader() as new:
            assert await steps(lambda: new.task.done() and old.task.done())
            assert new.items == old.items == [*turn(1), end(3)]


async def test_readers_look_again_when_their_mirror_ends(world: World) -> None:
    async with world.reader() as reader:
        assert await steps(lambda: len(reader.items) == 2)
        world.mirror.cancel()
        world.store.bodies.append(encode_event(end(3)))
        assert await steps(reader.task.done)
        assert reader.error is None
