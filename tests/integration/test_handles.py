"""Sessions from Python: handles in a driver of the cluster, and the HTTP clients outside of it."""

from __future__ import annotations

import asyncio
import multiprocessing
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import pytest
import redis

import agentray
from agentray import errors
from agentray.config.state import read_state
from agentray.events import ModelFinished, TurnFinished, TurnOptions, TurnResumed
from agentray.sessions.base import Cursor, Delta, StreamItem, TurnInfo
from tests.followed_turn import script
from tests.integration.wire import CuttingProxy, Session, eventually
from tests.system import System

STORY = "Once upon a time an actor kept a journal of all that it did."
SLOW = script(STORY, tokens=12, tps=20)
ENDLESS = script("never read to its end", tokens=10_000, tps=10)
T = TypeVar("T")
Placement = Literal["shared", "dedicated"]


def told(items: list[StreamItem]) -> str:
    """Return the text of a stream's deltas; assert that it is what the model finished with."""
    text = "".join(item.text for item in items if isinstance(item, Delta))
    assert text == "".join(item.text for item in items if isinstance(item, ModelFinished))
    return text


def new_id() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"


# In the cluster: what follows up to the next heading runs in the driver, a process of its own.

_connection: Any = None


def connect(data_dir: str) -> None:
    global _connection
    _connection = agentray.connect(data_dir=data_dir)


def talk(session_id: str, placement: Placement) -> tuple[TurnInfo, TurnInfo]:
    session = _connection.session(session_id, placement=placement)
    first = session.send.remote("My name is Ada.").result(timeout_s=30)

    async def ask() -> TurnInfo:
        return await session.send.remote("What is my name?")

    return first, asyncio.run(ask())


def stream(session_id: str, placement: Placement) -> tuple[list[StreamItem], list[StreamItem]]:
    session = _connection.session(session_id, placement=placement)
    first = list(session.stream.remote(SLOW))

    async def again() -> list[StreamItem]:
        return [item async for item in session.stream.remote(SLOW)]

    return first, asyncio.run(again())


def submit_and_cancel(session_id: str, placement: Placement) -> tuple[TurnInfo, list[str], Any]:
    session = _connection.session(session_id, placement=placement)
    turn = session.submit.remote(ENDLESS).result()
    waiting = session.submit.remote("I wait").result()
    cancelled = session.cancel.remote(turn.id).result()
    assert session.cancel.remote(waiting.id).result() == [waiting.id]
    done = session.send.remote("still there?", options=TurnOptions(max_output_tokens=3)).result()
    assert done.status == "incomplete"
    return turn, cancelled, session.events.remote(after=1, limit=1_000).result()


def keys(session_id: str, placement: Placement) -> list[TurnInfo]:
    session = _connection.session(session_id, placement=placement)
    replies = [session.send.remote("hello", idempotency_key="once") for _ in range(3)]
    return [reply.result() for reply in replies]


def errors_of(session_id: str, placement: Placement) -> list[Exception]:
    session = _connection.session(session_id, placement=placement)
    session.submit.remote(ENDLESS).result()
    found: list[Exception] = []
    for call in (
        lambda: session.send.remote("now", if_busy="reject").result(),
        lambda: list(session.stream.remote("now", if_busy="reject")),
        lambda: session.send.remote("x", options=TurnOptions(model="gpt-99")).result(),
        lambda: session.cancel.remote("0" * 26).result(),
        lambda: _connection.session("odd id"),
        lambda: _connection.session(new_id(), agent="nobody"),
    ):
        try:
            call()
        except errors.AgentRayError as error:
            # What Ray raises is of the error's class, and has it as its cause.
            cause = getattr(error, "cause", error)
            found.append(cause)
    session.cancel.remote().result()
    return found


def named_actor(session_id: str, tenant: str) -> tuple[str, TurnInfo, TurnInfo]:
    import ray

    _connection.session(session_id, placement="dedicated", tenant=tenant)
    name = f"session/{session_id}" if tenant == "default" else f"session/{tenant}/{session_id}"
    actor: Any = ray.get_actor(name, namespace="agentray")
    reference = actor.send.remote("My name is Ada.")
    first: Any = ray.get(reference)
    second: Any = ray.get(actor.send.remote("What is my name?"))
    return type(reference).__name__, first, second


def leave_in_mid_turn(session_id: str) -> tuple[TurnInfo, list[type[Exception]], TurnInfo]:
    import ray

    session = _connection.session(session_id, placement="dedicated")
    actor: Any = ray.get_actor(f"session/{session_id}", namespace="agentray")
    running = actor.send.remote(script(STORY, tokens=12, tps=6))
    followed = actor.follow.options(num_returns="streaming").remote()
    ray.get(next(followed))
    session.submit.remote("I wait").result()
    drained = actor.drain.remote()
    refused: list[type[Exception]] = []
    for call in (
        lambda: ray.get(actor.send.remote("too late")),
        lambda: ray.get(actor.submit.remote("too late")),
        lambda: [ray.get(item) for item in followed],
    ):
        try:
            call()
        except errors.AgentRayError as error:
            refused.append(type(getattr(error, "cause", error)))
    ray.get(drained)
    # What is gone comes back for the next call, and runs what it left.
    after = session.send.remote("still there?").result(timeout_s=60)
    answered: Any = ray.get(running)
    return answered, refused, after


def send_often(session_ids: list[str], times: int) -> list[str]:
    sessions = [_connection.session(session_id) for session_id in session_ids]
    return [
        session.send.remote(script(f"{session.id} {number}")).result().text
        for number in range(times)
        for session in sessions
    ]


# Here again

Driver = Callable[..., Any]


@pytest.fixture(scope="module")
def driver(system: System) -> Iterator[Driver]:
    """Run a function of this module in a process that is connected to the cluster."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=connect, initargs=(str(system.data_dir),)
    ) as process:
        yield lambda function, *args: process.submit(function, *args).result(timeout=90)


@pytest.fixture(params=["shared", "dedicated"])
def placement(request: pytest.FixtureRequest) -> Placement:
    return request.param


def test_a_handle_sends_and_its_reply_is_awaited_or_taken(
    driver: Driver, system: System, placement: Placement
) -> None:
    session_id = new_id()
    first, second = driver(talk, session_id, placement)
    assert (first.status, first.text.split(".")[0]) == ("completed", "Nice to meet you, Ada")
    assert second.text == "Your name is Ada."
    assert len(system.assert_journal_sound(session_id).turns()) == 2


def test_a_handle_streams_a_turn(driver: Driver, system: System, placement: Placement) -> None:
    session_id = new_id()
    for items in driver(stream, session_id, placement):
        assert told(items) == STORY
        assert isinstance(items[-1], TurnFinished)
        assert sum(isinstance(item, Delta) for item in items) > 1
    system.assert_journal_sound(session_id)


def test_a_handle_submits_cancels_and_reads_events(
    driver: Driver, system: System, placement: Placement
) -> None:
    session_id = new_id()
    turn, cancelled, events = driver(submit_and_cancel, session_id, placement)
    assert turn.state in ("accepted", "running")
    assert cancelled == [turn.id]
    assert [event.seq for event in events] == list(range(2, events[-1].seq + 1))
    ends = {e.turn_id: e.status for e in events if isinstance(e, TurnFinished)}
    assert list(ends.values()) == ["cancelled", "cancelled", "incomplete"]
    system.assert_journal_sound(session_id)


def test_a_key_makes_one_turn(driver: Driver, system: System, placement: Placement) -> None:
    session_id = new_id()
    turns = driver(keys, session_id, placement)
    assert len({turn.id for turn in turns}) == 1
    assert len(system.assert_journal_sound(session_id).turns()) == 1


def test_errors_are_agentrays_own(driver: Driver, placement: Placement) -> None:
    assert [type(error) for error in driver(errors_of, new_id(), placement)] == [
        errors.SessionBusyError,
        errors.SessionBusyError,
        errors.ModelNotFoundError,
        errors.TurnNotFoundError,
        errors.InvalidRequestError,
        errors.InvalidRequestError,
    ]


@pytest.mark.parametrize("tenant", ["default", "acme"])
def test_a_dedicated_session_is_a_ray_actor_with_a_name(
    driver: Driver, system: System, http: httpx.Client, tenant: str
) -> None:
    session_id = new_id()
    kind, first, second = driver(named_actor, session_id, tenant)
    assert kind == "ObjectRef"
    assert (first.status, second.text) == ("completed", "Your name is Ada.")
    if tenant == "default":
        assert Session(http, session_id).turn("What is my name?")["text"] == "Your name is Ada."
        found = system.owner_of(session_id)
        assert found is not None
        assert (found[0].kind, found[0].name) == ("dedicated", f"session/{session_id}")
    else:
        assert http.get(f"/v1/sessions/{session_id}").status_code == 404
    system.assert_journal_sound(session_id)


def test_a_dedicated_session_that_leaves_ends_its_turn_and_accepts_no_other(
    driver: Driver, system: System
) -> None:
    session_id = new_id()
    running, refused, after = driver(leave_in_mid_turn, session_id)
    assert (running.status, running.text) == ("completed", STORY)
    assert refused == [errors.NotReadyError] * 3
    assert after.status == "completed"
    turns = system.assert_journal_sound(session_id).turns()
    # The one that waited ran behind; none that was refused ever did.
    assert [turn.status for turn in turns] == ["completed"] * 3
    assert not [turn for turn in turns if turn.of(TurnResumed)]


def test_calls_land_on_the_owner(driver: Driver, system: System, http: httpx.Client) -> None:
    def owner_of(session_id: str) -> tuple[str, int]:
        found = system.owner_of(session_id)
        assert found is not None
        return found[0].id, found[1]

    sessions: dict[str, tuple[str, int]] = {}
    while len({owner for owner, _ in sessions.values()}) < 2 or len(sessions) < 4:
        session = Session.make(http)
        session.turn("HTTP comes first")
        sessions[session.id] = owner_of(session.id)
        assert len(sessions) < 40, "one host owns them all"
    texts = driver(send_often, list(sessions), 12)
    assert texts == [f"{session_id} {number}" for number in range(12) for session_id in sessions]
    # Two in a row that came through another host would have moved a session there.
    assert {session_id: owner_of(session_id) for session_id in sessions} == sessions


@pytest.mark.parametrize("wrong", ["the other host", "nobody", "nothing"])
def test_calls_arrive_in_spite_of_a_wrong_hint(
    driver: Driver, system: System, http: httpx.Client, wrong: str
) -> None:
    session = Session.make(http)
    session.turn("HTTP comes first")
    found = system.owner_of(session.id)
    assert found is not None
    (other,) = [host.name for host in system.hosts() if host.id != found[0].id]
    state = read_state(system.data_dir)
    assert state is not None
    with redis.Redis.from_url(state.redis) as hints:
        key = f"ar:own:default/{session.id}"
        assert hints.get(key) == found[0].name.encode()
        if wrong == "nothing":
            hints.delete(key)
        else:
            hints.set(key, other if wrong == "the other host" else "nobody")
        texts = driver(send_often, [session.id], 5)
        assert texts == [f"{session.id} {number}" for number in range(5)]
        if wrong == "the other host":
            # Where calls come in, the session goes: the hint is right by now.
            owner = system.owner_of(session.id)
            assert owner is not None
            assert owner[0].name == other
            assert hints.get(key) == other.encode()
    system.assert_journal_sound(session.id)


def test_to_connect_where_nothing_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.NotReadyError, match="agentray up"):
        agentray.connect(data_dir=tmp_path)


# Over HTTP


def test_the_client_sends_submits_and_reads(system: System, placement: Placement) -> None:
    with agentray.Client(system.url) as client:
        session = client.session(new_id(), placement=placement, user="ada")
        assert session.send("My name is Ada.").status == "completed"
        turn = session.submit("What is my name?")
        items = session.follow()
        for item in items:
            if isinstance(item, TurnFinished) and item.turn_id == turn.id:
                break
        items.close()
        assert session.turn(turn.id).text == "Your name is Ada."
        events = list(session.events())
        assert [event.seq for event in events] == list(range(1, 9))
        assert session.info().user == "ada"
        assert session.id in [info.id for info in client.sessions.list(user="ada").data]
        session.delete()
        with pytest.raises(errors.SessionNotFoundError):
            session.info()


def test_the_client_cancels(system: System) -> None:
    with agentray.Client(system.url) as client:
        session = client.session(new_id())
        with session.stream(ENDLESS) as running:
            for item in running:
                if isinstance(item, Delta) and running.status is None:
                    assert session.cancel(running.turn_id) == [running.turn_id]
        assert running.status == "cancelled"
        with pytest.raises(errors.InvalidRequestError, match="nothing to cancel"):
            session.cancel()


@pytest.mark.parametrize("first_cut", [0, 1, 150, 400, 700])
def test_a_stream_that_breaks_again_and_again_misses_and_doubles_nothing(
    system: System, first_cut: int
) -> None:
    # Each connection lives a little longer than the one before.
    cuts = [first_cut + 600 * number for number in range(40)]
    session_id, asked = new_id(), script(STORY * 10, tokens=40, tps=80)
    with (
        CuttingProxy(system.port, cuts=cuts) as proxy,
        agentray.Client(proxy.url, retries=40) as client,
    ):
        with client.session(session_id).stream(asked) as stream:
            items = list(stream)
        assert told(items) == STORY * 10
        assert (stream.text, stream.status) == (STORY * 10, "completed")
        assert proxy.connections > 3
    journal = system.assert_journal_sound(session_id)
    assert [item for item in items if not isinstance(item, Delta)] == journal.events


def test_a_send_whose_answer_is_lost_makes_one_turn(system: System) -> None:
    with CuttingProxy(system.port, cuts=[0, 0]) as proxy, agentray.Client(proxy.url) as client:
        session = client.session(new_id())
        assert session.send(script(STORY)).text == STORY
    assert len(system.assert_journal_sound(session.id).turns()) == 1


async def test_the_async_client_does_the_same(system: System) -> None:
    with CuttingProxy(system.port, cuts=[0, 900]) as proxy:
        async with agentray.AsyncClient(proxy.url) as client:
            session = client.session(new_id())
            first = await session.send("My name is Ada.")
            assert first.status == "completed"
            async with session.stream(SLOW) as stream:
                assert told([item async for item in stream]) == STORY
            assert (await session.send("What is my name?")).text == "Your name is Ada."
            events = [event async for event in session.events()]
            assert [event.seq for event in events] == list(range(1, 13))
            late = session.follow(after=Cursor(11))
            assert isinstance(await anext(late), TurnFinished)
            await late.aclose()
            turn = await session.submit(ENDLESS)
            assert await session.cancel() == [turn.id]
            with pytest.raises(errors.ModelNotFoundError):
                await session.send("x", options=TurnOptions(model="gpt-99"))
            await session.delete()
            with pytest.raises(errors.SessionNotFoundError):
                await session.info()


def test_errors_of_the_client_are_agentrays_own(system: System, http: httpx.Client) -> None:
    closing = Session.make(http, ttl_s=0.2)
    with agentray.Client(system.url) as client:
        session = client.session(new_id())
        turn = session.submit(ENDLESS, idempotency_key="once")
        with pytest.raises(errors.SessionBusyError):
            session.send("now", if_busy="reject")
        with pytest.raises(errors.SessionBusyError):
            list(session.stream("now", if_busy="reject"))
        with pytest.raises(errors.IdempotencyConflictError) as conflict:
            session.send("something else", idempotency_key="once")
        assert conflict.value.fields["turn_id"] == turn.id
        with pytest.raises(errors.TurnNotFoundError):
            session.turn("0" * 26)
        with pytest.raises(errors.CursorError):
            next(session.follow(after=Cursor(10_000)))
        with pytest.raises(errors.CursorError):
            list(session.events(after=10_000))
        with pytest.raises(errors.InvalidRequestError):
            client.sessions.create("odd id")
        with pytest.raises(errors.InvalidRequestError):
            client.sessions.create(agent="nobody")
        session.cancel()
        eventually(lambda: closing.info()["status"] == "closed", what="the session is closed")
        with pytest.raises(errors.SessionClosedError):
            client.session(closing.id).send("too late")
    with (
        agentray.Client("http://127.0.0.1:9", retries=1) as nowhere,
        pytest.raises(errors.NotReadyError),
    ):
        nowhere.sessions.get("alice")
