"""Two owners of the same sessions, on real stores and the simulator, in one event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import pytest

from agentray.errors import (
    IdempotencyConflictError,
    SessionBusyError,
    SessionClosedError,
    SessionNotFoundError,
    SessionParkedError,
    StorageUnavailableError,
)
from agentray.events import (
    ModelCalled,
    ModelFinished,
    ModelVoided,
    ToolCalled,
    ToolFinished,
    TurnFinished,
    TurnResumed,
)
from agentray.sessions.base import Cursor
from agentray.sessions.process import OwnerProcess
from tests.followed_turn import echo, script
from tests.owners import TENANT, Owners, Reader, SimulatorServer, send
from tests.services import Services, until

names = (f"s{n}" for n in itertools.count())

ENDLESS = script("on and on", tokens=5_000, tps=100)


@pytest.fixture(scope="module")
def simulator() -> Iterator[SimulatorServer]:
    server = SimulatorServer()
    yield server
    server.stop()


@pytest.fixture
async def owners(services: Services, simulator: SimulatorServer) -> AsyncIterator[Owners]:
    owners = Owners(services, simulator)
    yield owners
    await owners.stop()


@pytest.fixture
async def a(owners: Owners) -> OwnerProcess:
    """The owner of the session."""
    return await owners.start()


@pytest.fixture
async def b(owners: Owners, a: OwnerProcess) -> OwnerProcess:
    """Another owner."""
    return await owners.start()


@pytest.fixture
async def session(a: OwnerProcess) -> str:
    """A session that is resident in the first owner, behind a first turn."""
    session_id = next(names)
    await a.sessions.create(TENANT, session_id=session_id)
    await a.sessions.wait(TENANT, session_id, (await send(a, session_id, "hello")).id)
    assert a.residents.peek((TENANT, session_id)) is not None
    return session_id


def resident(owner: OwnerProcess, session_id: str) -> bool:
    return owner.residents.peek((TENANT, session_id)) is not None


async def eventually(condition: Callable[[], object], what: str) -> None:
    async def holds() -> object:
        return condition()

    await until(holds, what)


async def run(owner: OwnerProcess, session_id: str, text: str) -> Any:
    """Run a turn to its end and return it."""
    turn = await send(owner, session_id, text)
    return await owner.sessions.wait(TENANT, session_id, turn.id)


def streams(reader: Reader) -> bool:
    return len(reader.deltas) >= 3


# One session, two ways to it


async def test_a_turn_through_the_other_owner_streams_live(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    turn = await send(b, session, script("one two three four", tokens=40, tps=100))
    readers = [Reader(b, session, turn.id), Reader(a, session, turn.id)]
    for reader in readers:
        await reader.until(streams, "text comes")
        assert not reader.of(ModelFinished), "text comes when the answer is whole"
    for reader in readers:
        await reader.to_the_end()
        [answer] = reader.of(ModelFinished)
        assert reader.text == answer.text
        assert reader.text.startswith("one two three four")
    assert resident(a, session)
    assert not resident(b, session)
    owners.journal(session).assert_sound()


async def test_a_reader_takes_up_where_another_one_left(
    a: OwnerProcess, b: OwnerProcess, session: str
) -> None:
    turn = await send(a, session, script("a b c d e f g h", tokens=80, tps=100))
    first = Reader(a, session, turn.id)
    await first.until(streams, "text comes")
    await first.leave()
    assert first.cursor is not None
    for owner in (b, a):
        rest = await Reader(owner, session, turn.id, after=first.cursor).to_the_end()
        [answer] = rest.of(ModelFinished)
        assert first.text + "".join(delta.text for delta in rest.deltas) == answer.text


async def test_an_endless_reader_gets_every_turn_wherever_it_reads(
    a: OwnerProcess, b: OwnerProcess, session: str
) -> None:
    readers = [Reader(a, session), Reader(b, session)]
    for owner in (a, b, a):
        await run(owner, session, "hi")
    for reader in readers:
        await reader.until(lambda r: len(r.of(TurnFinished)) == 4, "four turns have ended")
        await reader.leave()
        assert [item.seq for item in reader.items if item not in reader.deltas] == list(
            range(1, len(reader.items) - len(reader.deltas) + 1)
        )


@pytest.mark.parametrize("through", ["owner", "other"])
async def test_a_turn_is_cancelled_from_anywhere(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners, through: str
) -> None:
    turn = await send(a, session, ENDLESS)
    reader = Reader(a, session, turn.id)
    await reader.until(streams, "text comes")
    by = a if through == "owner" else b
    assert await by.sessions.cancel(TENANT, session) == [turn.id]
    await reader.to_the_end()
    done = await b.sessions.turn(TENANT, session, turn.id)
    assert (done.status, done.text) == ("cancelled", reader.text)
    assert done.error is not None
    assert done.error.code == "cancelled"
    assert await by.sessions.cancel(TENANT, session, turn.id) == []
    # What was said stays a part of the conversation.
    journal = owners.journal(session)
    journal.assert_sound()
    assert (await run(b, session, "hi")).status == "completed"


async def test_a_tool_call_is_cancelled(a: OwnerProcess, session: str, owners: Owners) -> None:
    turn = await send(
        a, session, script("x", tools=[echo("fast"), echo("slow", 20)], parallel=True)
    )
    reader = Reader(a, session, turn.id)
    await reader.until(lambda r: r.of(ToolFinished), "one tool is done")
    await a.sessions.cancel(TENANT, session, turn.id)
    await reader.to_the_end()
    assert reader.finished is not None
    assert reader.finished.status == "cancelled"
    assert [event.output for event in reader.of(ToolFinished)] == ["fast"]
    owners.journal(session).assert_sound()


async def test_a_cancelled_turn_that_waits_never_calls_a_model(
    a: OwnerProcess, b: OwnerProcess, session: str
) -> None:
    running = await send(a, session, ENDLESS)
    waiting = [await send(owner, session, "hi") for owner in (a, b)]
    for turn, owner in zip(waiting, (b, a), strict=True):
        assert await owner.sessions.cancel(TENANT, session, turn.id) == [turn.id]
    await a.sessions.cancel(TENANT, session, running.id)
    for turn in waiting:
        reader = await Reader(b, session, turn.id).to_the_end()
        assert reader.finished is not None
        assert reader.finished.status == "cancelled"
        assert not reader.of(ModelCalled)


# A busy session


async def test_messages_wait_their_turn_in_the_order_of_their_acceptance(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    busy = await send(a, session, script("busy", tokens=30, tps=100))
    waiting = [await send(owner, session, "hi") for owner in (b, a, b, b, a)]
    await b.sessions.wait(TENANT, session, waiting[-1].id)
    journal = owners.journal(session)
    journal.assert_sound()
    assert [turn.id for turn in journal.turns()][1:] == [turn.id for turn in (busy, *waiting)]


async def test_a_message_that_may_not_wait_is_refused_everywhere(
    a: OwnerProcess, b: OwnerProcess, session: str
) -> None:
    turn = await send(a, session, ENDLESS)
    for owner in (a, b):
        with pytest.raises(SessionBusyError):
            await send(owner, session, "hi", if_busy="reject")
    await a.sessions.cancel(TENANT, session, turn.id)
    await a.sessions.wait(TENANT, session, turn.id)
    assert (await send(b, session, "hi", if_busy="reject")).id


@pytest.mark.parametrize("through", ["owner", "other"])
async def test_a_message_that_interrupts_comes_next(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners, through: str
) -> None:
    running = await send(a, session, ENDLESS)
    waiting = await send(a, session, "hi")
    by = a if through == "owner" else b
    urgent = await send(by, session, "now", if_busy="interrupt")
    assert (await by.sessions.wait(TENANT, session, urgent.id)).status == "completed"
    for turn in (running, waiting):
        assert (await by.sessions.turn(TENANT, session, turn.id)).status == "cancelled"
    owners.journal(session).assert_sound()


# Accepted once


async def test_one_key_at_once_on_both_owners_is_one_turn(
    a: OwnerProcess, b: OwnerProcess, owners: Owners
) -> None:
    for _ in range(15):
        session_id = next(names)
        await a.sessions.create(TENANT, session_id=session_id)
        turns = await asyncio.gather(
            *[send(owner, session_id, "hi", key="k") for owner in (a, b, a, b)]
        )
        assert len({turn.id for turn in turns}) == 1
        await b.sessions.wait(TENANT, session_id, turns[0].id)
        journal = owners.journal(session_id)
        journal.assert_sound()
        assert len(journal.turns()) == 1
        again = await send(b, session_id, "hi", key="k")
        assert (again.id, again.state) == (turns[0].id, "done")
        for owner in (a, b):
            with pytest.raises(IdempotencyConflictError):
                await send(owner, session_id, "something else", key="k")


async def test_of_two_that_continue_the_same_turn_one_is_refused(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    for _ in range(15):
        latest = await a.sessions.latest_turn(TENANT, session)
        assert latest is not None
        outcomes = await asyncio.gather(
            *[send(owner, session, "hi", after_turn=latest) for owner in (a, b)],
            return_exceptions=True,
        )
        [refused] = [each for each in outcomes if isinstance(each, SessionBusyError)]
        [turn] = [each for each in outcomes if not isinstance(each, BaseException)]
        assert refused.fields["outdated"]
        await a.sessions.wait(TENANT, session, turn.id)
    owners.journal(session).assert_sound()


async def test_what_another_owner_accepted_is_the_latest_turn_here_too(
    a: OwnerProcess, b: OwnerProcess, session: str
) -> None:
    before = await a.sessions.latest_turn(TENANT, session)
    turn = await run(b, session, "hi")
    assert resident(a, session)
    assert await a.sessions.latest_turn(TENANT, session) == turn.id
    with pytest.raises(SessionBusyError):
        await send(a, session, "hi", after_turn=before)


async def test_a_session_whose_time_is_over_is_read_and_not_continued(
    a: OwnerProcess, b: OwnerProcess
) -> None:
    session_id = next(names)
    await a.sessions.create(TENANT, session_id=session_id, ttl_s=1.0)
    turn = await run(a, session_id, "hi")

    async def is_closed() -> bool:
        return (await b.sessions.get(TENANT, session_id)).status == "closed"

    await until(is_closed, "the session's time is over")
    for owner in (a, b):
        with pytest.raises(SessionClosedError):
            await send(owner, session_id, "hi")
        assert (await owner.sessions.turn(TENANT, session_id, turn.id)).text == turn.text


# Where a session lives


async def converse(owner: OwnerProcess, session_id: str) -> None:
    """Run turns of every kind; fewer of them than there are fit the window."""
    for text in ("my name is Ada", script("{tool_results}", tools=[echo("A"), echo("B")])):
        await run(owner, session_id, text)
    turn = await send(owner, session_id, ENDLESS)
    reader = Reader(owner, session_id, turn.id)
    await reader.until(streams, "text comes")
    await owner.sessions.cancel(TENANT, session_id)
    await reader.to_the_end()
    await run(owner, session_id, '!sim {"status": 400}')
    await run(owner, session_id, script("two at once", tools=[echo("C"), echo("D")], parallel=True))


@pytest.mark.parametrize("tier", ["hot", "durable"])
async def test_a_session_comes_back_from_either_tier_as_it_left(
    services: Services, a: OwnerProcess, b: OwnerProcess, session: str, tier: str
) -> None:
    await converse(a, session)
    actor = a.residents.peek((TENANT, session))
    assert actor is not None
    if tier == "hot":

        async def is_copied() -> bool:
            copy = await a.redis.load(TENANT, session)
            return copy is not None and copy.seq == actor.state.seq

        await until(is_copied, "the hot copy is stored")
    else:
        a.redis.drop(TENANT, session)

        async def is_dropped() -> bool:
            return await a.redis.load(TENANT, session) is None

        await until(is_dropped, "the hot copy is gone")
    assert await a.residents.release(actor)
    back = await b.residents.activate((TENANT, session))
    assert back is not None
    assert back.state == actor.state
    assert len(back.state.window) == 3
    page = (await b.metrics_page()).decode()
    assert f'agentray_activations_total{{tier="{tier}"' in page or f'tier="{tier}"' in page
    assert (await run(b, session, "hi")).status == "completed"


async def test_an_idle_session_leaves_memory_and_comes_back(
    services: Services, simulator: SimulatorServer
) -> None:
    owners = Owners(services, simulator, idle_s=0.2)
    owner = await owners.start()
    session_id = next(names)
    await owner.sessions.create(TENANT, session_id=session_id)
    await run(owner, session_id, "my name is Ada")
    await eventually(lambda: not resident(owner, session_id), "the session leaves memory")
    assert owners.journal(session_id).owner is None
    assert (await run(owner, session_id, "what is my name?")).text == "Your name is Ada."
    await owners.stop()


async def test_the_oldest_of_too_many_sessions_leave_memory(
    services: Services, simulator: SimulatorServer
) -> None:
    owners = Owners(services, simulator, max_resident=3)
    owner = await owners.start()
    made = [next(names) for _ in range(6)]
    for session_id in made:
        await owner.sessions.create(TENANT, session_id=session_id)
        await run(owner, session_id, "hi")
    await eventually(lambda: len(owner.residents) == 3, "three sessions stay")
    assert [resident(owner, session_id) for session_id in made] == [False] * 3 + [True] * 3
    await owners.stop()


async def test_two_messages_in_a_row_through_another_owner_move_the_session(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    await run(b, session, "hi")
    assert resident(a, session)
    await run(a, session, "hi")
    await run(b, session, "hi")
    assert resident(a, session), "those two were not in a row"
    await run(b, session, "hi")
    await eventually(lambda: not resident(a, session), "the session is given up")
    await run(b, session, "hi")
    assert resident(b, session)
    owners.journal(session).assert_sound()


async def test_a_fork_remembers_up_to_its_place(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    await run(a, session, "my name is Ada")
    place = await run(a, session, "hi")
    await run(a, session, "my name is Bob")
    running = await send(a, session, ENDLESS)
    with pytest.raises(SessionBusyError):
        await b.sessions.fork(TENANT, session, after_turn=running.id)
    fork = await b.sessions.fork(TENANT, session, after_turn=place.id)
    assert (await run(b, fork.id, "what is my name?")).text == "Your name is Ada."
    assert fork.turns == 3
    await a.sessions.cancel(TENANT, session)
    await a.sessions.wait(TENANT, session, running.id)
    for session_id in (session, fork.id):
        owners.journal(session_id).assert_sound()


@pytest.mark.parametrize("through", ["owner", "other"])
async def test_a_session_is_deleted_in_the_middle_of_a_turn(
    a: OwnerProcess, b: OwnerProcess, session: str, through: str
) -> None:
    turn = await send(a, session, ENDLESS)
    readers = [Reader(owner, session, turn.id) for owner in (a, b)]
    for reader in readers:
        await reader.until(streams, "text comes")
    by = a if through == "owner" else b
    await by.sessions.delete(TENANT, session)
    for reader in readers:
        await reader.to_the_end()
        assert isinstance(reader.error, SessionNotFoundError)
    await eventually(lambda: not resident(a, session), "the owner drops it")
    for owner in (a, b):
        with pytest.raises(SessionNotFoundError):
            await send(owner, session, "hi")
    # Another session of that name knows nothing of the one before.
    _, new = await b.sessions.create(TENANT, session_id=session)
    assert new
    again = await Reader(b, session, (await send(b, session, "what is my name?")).id).to_the_end()
    assert again.items[0].seq == 1
    assert again.text == "You have not told me your name yet."


async def test_what_waits_for_a_reader_is_let_go(
    a: OwnerProcess, b: OwnerProcess, session: str
) -> None:
    for _ in range(3):
        reader = await Reader(b, session, (await send(b, session, "hi")).id).to_the_end()
        await reader.leave()
    hubs = [owner.following._hubs for owner in (a, b)]
    await eventually(lambda: not b.following._hubs, "the other owner keeps nothing")
    assert len(hubs[0]) <= 1


# Owners that die


PHASES = {
    "before the first token": script("one two three", ttft_ms=2_500, tokens=20, tps=200),
    "streaming": script("one two three four five six", tokens=250, tps=100),
    "in a tool call": script("got {tool_results}", tools=[echo("A"), echo("B", 2.0)]),
    "in two tool calls": script(
        "got {tool_results}", tools=[echo("A"), echo("B", 2.0)], parallel=True
    ),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_a_turn_whose_owner_dies_ends_once(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners, phase: str
) -> None:
    turn = await send(a, session, PHASES[phase])
    near, far = Reader(a, session, turn.id), Reader(b, session, turn.id)
    if phase == "streaming":
        await near.until(streams, "text comes")
        await far.until(streams, "text comes")
    elif phase == "before the first token":
        await near.until(lambda r: r.of(ModelCalled), "the model is called")
    else:
        await near.until(
            lambda r: len(r.of(ToolCalled)) == 2 and r.of(ToolFinished), "one tool is done"
        )
    waiting = await send(b, session, "and then?")
    await near.leave()
    await owners.die(a)
    await far.to_the_end()
    assert far.finished is not None
    assert far.finished.status == "completed"
    [resumed] = far.of(TurnResumed)
    assert resumed.owner == b.ownership.owner_id
    expected = {"before the first token": "model", "streaming": "streaming"}
    assert resumed.phase == expected.get(phase, "tools")
    assert far.text == far.of(ModelFinished)[-1].text
    if phase == "streaming":
        [voided] = far.of(ModelVoided)
        assert voided.continues
        assert voided.text.startswith(near.text), "what a reader saw is lost"
        assert far.text.startswith("one two three four five six")
    if "tool" in phase:
        assert far.text == "got A, B"
        assert [call.output for call in far.of(ToolFinished)].count("A") == 1
    assert (await b.sessions.wait(TENANT, session, waiting.id)).status == "completed"
    owners.journal(session).assert_sound()


async def test_a_turn_that_was_cancelled_while_nobody_ran_it_ends_as_cancelled(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    turn = await send(a, session, ENDLESS)
    reader = Reader(b, session, turn.id)
    await reader.until(streams, "text comes")
    await owners.die(a)
    assert await b.sessions.cancel(TENANT, session) == [turn.id]
    await reader.to_the_end()
    done = await b.sessions.turn(TENANT, session, turn.id)
    assert done.status == "cancelled"
    assert done.text == reader.text
    owners.journal(session).assert_sound()


async def test_a_turn_that_takes_its_owners_with_it_is_given_up(
    services: Services, simulator: SimulatorServer
) -> None:
    owners = Owners(services, simulator, recovery_attempts=1, term_s=0.5)
    first = await owners.start()
    session_id = next(names)
    await first.sessions.create(TENANT, session_id=session_id)
    turn = await send(first, session_id, ENDLESS)
    doomed = first

    def takeovers() -> int:
        events = owners.journal(session_id).events
        return sum(isinstance(event, TurnResumed) for event in events)

    for number in (1, 2):
        successor = await owners.start()
        await owners.die(doomed)
        doomed = successor
        # Journaled: one that dies before that has not been there.
        await eventually(lambda: takeovers() == number, "it is taken over")  # noqa: B023
    done = await doomed.sessions.wait(TENANT, session_id, turn.id)
    assert done.status == "failed"
    assert done.error is not None
    assert done.error.code == "recovery_exhausted"
    assert (await run(doomed, session_id, "hi")).status == "completed"
    owners.journal(session_id).assert_sound()
    await owners.stop()


async def test_an_owner_that_leaves_hands_its_sessions_over(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    turn = await send(a, session, script("the end", tokens=30, tps=100))
    waiting = await send(a, session, "hi")
    reader = Reader(b, session, turn.id)
    await reader.until(streams, "text comes")
    await a.stop()
    await reader.to_the_end()
    assert not reader.of(TurnResumed), "it was run to its end"
    assert (await b.sessions.wait(TENANT, session, waiting.id)).status == "completed"
    assert resident(b, session)
    owners.journal(session).assert_sound()


async def test_an_owner_that_stops_waits_for_the_drain_under_way(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    """As when Serve stops a host: who began the drain is cancelled long before its end."""
    turn = await send(a, session, script("the end", tokens=150, tps=100))
    watching = asyncio.create_task(a.drain())
    await eventually(lambda: a.residents.draining, "the drain begins")
    watching.cancel()
    await a.stop()
    done = await b.sessions.wait(TENANT, session, turn.id)
    assert done.status == "completed"
    journal = owners.journal(session)
    journal.assert_sound()
    assert not journal.turn(turn.id).of(TurnResumed), "the turn was cut"


async def resident_sessions(owner: OwnerProcess, count: int) -> list[str]:
    made = [next(names) for _ in range(count)]
    for session_id in made:
        await owner.sessions.create(TENANT, session_id=session_id)
        assert await owner.residents.activate((TENANT, session_id)) is not None
    return made


async def test_idle_sessions_are_given_up_at_once_while_turns_run_on(
    a: OwnerProcess, b: OwnerProcess, session: str
) -> None:
    turn = await send(a, session, ENDLESS)
    idle = await resident_sessions(a, 80)
    release = a.store.release
    under_way: list[None] = []
    most = 0

    async def slowly(*args: Any, **how: Any) -> Any:
        nonlocal most
        under_way.append(None)
        most = max(most, len(under_way))
        await asyncio.sleep(0.1)
        under_way.pop()
        return await release(*args, **how)

    a.store.release = slowly
    draining = asyncio.create_task(a.drain())
    # One after another they would take 8 s, of the 5 s in which the owner has to leave.
    await eventually(lambda: len(a.residents) == 1, "the idle sessions are given up")
    assert resident(a, session)
    assert not draining.done()
    assert 8 <= most <= 32
    assert (await run(b, idle[-1], "hi")).status == "completed"
    assert resident(b, idle[-1])
    await b.sessions.cancel(TENANT, session, turn.id)
    await draining


async def test_a_drain_ends_in_time_whatever_is_left(
    services: Services, simulator: SimulatorServer
) -> None:
    owners = Owners(services, simulator, drain_s=0.5)
    leaving, staying = await owners.start(), await owners.start()
    idle = await resident_sessions(leaving, 40)

    async def hang(*args: Any, **how: Any) -> Any:
        del args, how
        await asyncio.sleep(60)

    leaving.store.release = hang
    async with asyncio.timeout(5):
        await leaving.stop()
    assert not len(leaving.residents)
    for session_id in (idle[0], idle[-1]):
        assert owners.journal(session_id).owner is not None, "somebody released it"
        assert (await run(staying, session_id, "hi")).status == "completed"
    await owners.stop()


async def test_clients_of_a_turn_learn_that_its_session_is_parked(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    running = await send(a, session, ENDLESS)
    waiting = await send(b, session, "hi")
    readers = [Reader(owner, session, waiting.id) for owner in (a, b)]
    tail = Reader(b, session)
    waits = asyncio.create_task(a.sessions.wait(TENANT, session, waiting.id))
    runtime = cast(Any, a.residents)._runtime

    async def fail(*args: Any) -> None:
        raise RuntimeError(f"a defect in {args}")

    runtime.run_accepted = fail
    await a.sessions.cancel(TENANT, session, running.id)
    for reader in (*readers, Reader(b, session, waiting.id)):
        await reader.to_the_end()
        assert isinstance(reader.error, SessionParkedError)
    with pytest.raises(SessionParkedError):
        await waits
    assert (await b.sessions.get(TENANT, session)).status == "parked"
    del runtime.run_accepted
    # The next message has it tried again, and nobody who waits hears of what was before.
    assert (await run(b, session, "hi")).status == "completed"
    assert (await b.sessions.wait(TENANT, session, waiting.id)).status == "completed"
    await tail.until(lambda r: len(r.of(TurnFinished)) == 4, "the tail went on")
    await tail.leave()
    owners.journal(session).assert_sound()


async def test_a_paused_owner_shows_nothing_and_drops_the_session(
    a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    """The owner's beats hang; all else of it goes on, which no real pause would let it."""
    turn = await send(a, session, ENDLESS)
    reader = Reader(a, session, turn.id)
    await reader.until(streams, "text comes")
    held = asyncio.Event()
    beat = a.store.beat

    async def hang(*args: Any, **kwargs: Any) -> None:
        await held.wait()
        await beat(*args, **kwargs)

    a.store.beat = hang
    await eventually(lambda: not a.ownership.fresh(), "its term is over")
    shown = len(reader.deltas)
    await eventually(lambda: resident(b, session), "it is taken over")
    other = Reader(b, session, turn.id)
    await other.until(lambda r: len(r.of(ModelCalled)) == 2, "the new owner goes on")
    # It still owns the session, as far as it knows, and has text that it has not shown.
    assert resident(a, session)
    assert len([each for each in reader.deltas if each.seq != reader.of(ModelCalled)[-1].seq]) <= (
        shown
    )
    held.set()
    await eventually(lambda: not resident(a, session), "the session is dropped")
    await b.sessions.cancel(TENANT, session)
    for each in (reader, other):
        await each.to_the_end()
        assert each.finished is not None
    [voided] = [event for event in other.of(ModelVoided) if event.reason == "owner_lost"]
    streamed = [delta for delta in reader.deltas if delta.seq < voided.seq]
    assert voided.text.startswith("".join(delta.text for delta in streamed))
    owners.journal(session).assert_sound()
    # As if nothing had been: it is an owner like any other.
    assert (await run(a, session, "hi")).status == "completed"


# Stores that go away


async def test_turns_go_on_without_redis(
    services: Services, a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    epoch = owners.journal(session).epoch
    turn = await send(a, session, script("on and on", tokens=600, tps=100))
    near, far = Reader(a, session, turn.id), Reader(b, session, turn.id)
    await near.until(streams, "text comes")
    await services.aside(services.redis.stop(hurry=True))
    before = len(near.deltas)
    await near.until(lambda r: len(r.deltas) > before + 3, "text goes on")
    assert (await run(b, session, "hi")).status == "completed"
    for reader in (near, far):
        await reader.to_the_end()
        assert reader.finished is not None
        assert reader.finished.status == "completed"
    assert owners.journal(session).epoch == epoch, "somebody was declared dead"
    await services.aside(services.redis.start())

    async def is_healed() -> bool:
        await run(a, session, "hi")
        copy = await b.redis.load(TENANT, session)
        actor = a.residents.peek((TENANT, session))
        return copy is not None and actor is not None and copy.window == actor.state.window

    await until(is_healed, "the hot tier has the session again")
    turn = await send(b, session, script("live", tokens=20, tps=100))
    reader = Reader(b, session, turn.id)
    await reader.until(lambda r: streams(r) and not r.of(ModelFinished), "text comes live")
    await reader.to_the_end()
    owners.journal(session).assert_sound()


async def test_turns_stall_and_go_on_when_postgres_restarts(
    services: Services, a: OwnerProcess, b: OwnerProcess, session: str, owners: Owners
) -> None:
    epoch = owners.journal(session).epoch
    accepted: list[str] = []
    down = asyncio.Event()

    async def load(owner: OwnerProcess, session_id: str) -> None:
        while not down.is_set() or len(accepted) < 10:
            try:
                accepted.append((await send(owner, session_id, "hi")).id)
            except StorageUnavailableError:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.01)

    others = [next(names) for _ in range(4)]
    for session_id in others:
        await a.sessions.create(TENANT, session_id=session_id)
    turn = await send(a, session, script("on and on", tokens=100, tps=100, tools=[echo("x", 0.5)]))
    reader = Reader(a, session, turn.id)
    await reader.until(lambda r: r.of(ToolCalled), "the tool runs")
    loading = [
        asyncio.create_task(load(owner, session_id))
        for owner, session_id in zip((a, b, a, b), others, strict=True)
    ]
    await asyncio.sleep(0.1)  # some turns are under way, whichever
    await services.aside(services.postgres.stop(hurry=True))
    await services.aside(services.postgres.start())
    down.set()
    await reader.to_the_end()
    assert reader.finished is not None
    assert reader.finished.status == "completed"
    async with asyncio.timeout(20):
        await asyncio.gather(*loading)

    async def is_quiet() -> bool:
        page, _ = await b.sessions.list(TENANT, status="running", limit=10)
        return not page

    await until(is_quiet, "all turns have ended")
    assert owners.journal(session).epoch == epoch, "somebody was declared dead"
    for session_id in (session, *others):
        journal = owners.journal(session_id)
        journal.assert_sound()
        begun = {each.id for each in journal.turns()}
        assert all(each in begun for each in accepted if each in begun)
    done = {each.id for session_id in others for each in owners.journal(session_id).turns()}
    assert set(accepted) <= done, "an accepted message is lost"


async def test_a_cursor_in_the_future_is_refused(a: OwnerProcess, session: str) -> None:
    reader = await Reader(a, session, after=Cursor(1_000)).to_the_end()
    assert type(reader.error).__name__ == "CursorError"
