"""Hosts, scheduler and workers of the tool pool: real connections, one process, no Ray."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agentray.clock import SystemClock
from agentray.errors import NotReadyError
from agentray.telemetry.metrics import Metrics
from agentray.tools import asked_call, wire, workplace
from agentray.tools import client as client_module
from agentray.tools import roster as roster_module
from agentray.tools.client import ToolClient, ToolPoolUnreachableError
from agentray.tools.cost import Estimates, SlotShare
from agentray.tools.dispatch import Dispatch
from agentray.tools.fair_queue import FairQueue, Share
from agentray.tools.leases import Leases
from agentray.tools.location import Location
from agentray.tools.messages import Hello, Run, Unknown
from agentray.tools.roster import Roster
from agentray.tools.runner import Ask
from agentray.tools.spec import ToolResult
from agentray.tools.wire import Link, connect, listen
from agentray.tools.workplace import Workplace
from tests.tool_pool import ask

CLOCK = SystemClock()
HOST = "127.0.0.1"
SLOT = SlotShare(1.0, 1e9)


class Notes:
    """What ran, of all workers."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.killed: Counter[str] = Counter()
        self.outputs: dict[str, Any] = {}
        self.may_end = asyncio.Event()
        self.may_die = asyncio.Event()
        self.may_die.set()


class HeldRunner:
    """Runs a call until it may end; one that is killed dies when it may."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    async def run(self, call: Ask) -> ToolResult:
        self._notes.begun[call.call_key] += 1
        try:
            await self._notes.may_end.wait()
        except asyncio.CancelledError:
            await self._notes.may_die.wait()
            self._notes.killed[call.call_key] += 1
            raise
        self._notes.ended[call.call_key] += 1
        return ToolResult("ok", self._notes.outputs.get(call.call_key, call.call_key))

    async def close(self) -> None:
        pass


class Gate:
    """Finds the scheduler while it is open."""

    def __init__(self, dispatch: Dispatch) -> None:
        self.open = True
        self._dispatch = dispatch

    async def __call__(self) -> Location:
        if not self.open:
            raise NotReadyError("the gate is shut")
        return Location(HOST, self._dispatch.port, "secret")


class Stage:
    """A scheduler, and workers and hosts of it."""

    def __init__(self, dispatch: Dispatch, tasks: asyncio.TaskGroup) -> None:
        self.dispatch = dispatch
        self.notes = Notes()
        self._tasks = tasks
        self.running: list[asyncio.Task[None]] = []
        self.places: list[Workplace] = []
        self.clients: list[ToolClient] = []

    async def worker(
        self, name: str, kind: type[Workplace] = Workplace, **how: Any
    ) -> tuple[Workplace, Gate]:
        gate = Gate(self.dispatch)
        place = kind(name, HOST, "own", [HeldRunner(self.notes)], gate, CLOCK, **how)
        await place.start()
        self.running.append(self._tasks.create_task(place.run()))
        self.places.append(place)
        count = len(self.places)
        await until(lambda: self.dispatch.leases.state().workers == count)
        return place, gate

    def client(self, owner: str = "host", **how: Any) -> ToolClient:
        client = ToolClient(owner, Gate(self.dispatch), clock=CLOCK, **how)
        self.clients.append(client)
        return client


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with staged() as stage:
        yield stage


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    roster = Roster([], CLOCK.monotonic(), settle_s=1.0)
    queue = FairQueue(lambda _: Share(), max_queued=100)
    leases = Leases(queue, Estimates(SLOT), SLOT, roster, 1)
    dispatch = Dispatch(leases, HOST, "secret", CLOCK)
    await dispatch.start()
    async with asyncio.TaskGroup() as tasks:
        stage = Stage(dispatch, tasks)
        stage.running.append(tasks.create_task(dispatch.run()))
        try:
            yield stage
        finally:
            stage.notes.may_die.set()
            for client in stage.clients:
                await client.close()
            for running in stage.running:
                running.cancel()
            for place in stage.places:
                await place.close()
            # A scheduler ends with its process.
            assert dispatch._server is not None
            dispatch._server.close()
            for link in dispatch._links.values():
                link.close()


async def until(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that in time"
        await asyncio.sleep(0.005)


async def test_a_host_that_loses_its_worker_connection_is_led_back_to_the_call(
    stage: Stage,
) -> None:
    await stage.worker("w")
    client = stage.client()
    call = asyncio.create_task(client.call(ask("a")))
    for _ in range(2):
        await until(lambda: bool(list(client._doors.links())) and stage.notes.begun["a"] == 1)
        (link,) = client._doors.links()
        link.abort()
        await until(lambda link=link: link not in list(client._doors.links()))
    await until(lambda: bool(list(client._doors.links())))
    stage.notes.may_end.set()
    assert (await call).status == "ok"
    assert stage.notes.begun == stage.notes.ended == {"a": 1}


class Dropping(Workplace):
    """Breaks the connection of whoever runs something."""

    def received(self, link: Link, message: object) -> None:
        super().received(link, message)
        if isinstance(message, Run):
            link.abort()


async def test_a_call_that_loses_worker_after_worker_is_given_up(stage: Stage) -> None:
    await stage.worker("w", Dropping)
    result = await stage.client().call(ask("poison", on_crash="retry"))
    assert (result.status, result.reason) == ("error", "died")


async def test_who_asks_for_a_call_that_is_being_killed_has_it_run_after_that(
    stage: Stage,
) -> None:
    place, _ = await stage.worker("w")
    stage.notes.may_die.clear()
    old, new = stage.client("old"), stage.client("new")
    first = asyncio.create_task(old.call(ask("a", on_crash="retry")))
    await until(lambda: stage.notes.begun["a"] == 1)
    # The newer owner is led to the call, which the older one kills before it gets there.
    again = asyncio.create_task(new.call(ask("a", epoch=2, on_crash="retry")))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await until(lambda: new._doors.get(place._id) is not None)
    assert not again.done()
    stage.notes.may_die.set()
    stage.notes.may_end.set()
    assert (await asyncio.wait_for(again, 5)).status == "ok"
    assert stage.notes.begun["a"] - stage.notes.killed["a"] == stage.notes.ended["a"]


async def test_a_worker_that_was_given_up_kills_what_it_ran_and_begins_anew(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster_module, "LOST_S", 0.3)
    away, gate = await stage.worker("away")
    client = stage.client()
    call = asyncio.create_task(client.call(ask("a", on_crash="retry")))
    await until(lambda: stage.notes.begun["a"] == 1)
    await stage.worker("there")
    gate.open = False
    assert away._scheduler is not None
    away._scheduler.abort()
    await until(lambda: stage.notes.begun["a"] == 2)
    gate.open = True
    await until(lambda: stage.notes.killed["a"] == 1)
    await until(lambda: stage.dispatch.leases.state().workers == 2)
    stage.notes.may_end.set()
    assert (await call).status == "ok"
    assert stage.notes.ended == {"a": 1}
    assert (await client.call(ask("b"))).status == "ok"


async def test_results_are_kept_for_a_host_that_comes_for_them_later(stage: Stage) -> None:
    await stage.worker("w")
    lost = stage.client("lost")
    call = asyncio.create_task(lost.call(ask("a")))
    await until(lambda: stage.notes.begun["a"] == 1)
    for link in [lost._scheduler, *lost._doors.links()]:
        assert link is not None
        link.abort()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    stage.notes.may_end.set()
    again = await stage.client("next").call(ask("a", epoch=2))
    assert again.output == "a"
    assert stage.notes.begun == {"a": 1}


async def test_nothing_begins_with_a_lease_of_a_scheduler_that_is_gone(stage: Stage) -> None:
    place, _ = await stage.worker("w")
    ears = Ears()
    link = await connect(ears, HOST, place._port, token="own", name="host", timeout_s=5)
    given = ask("a")
    link.send(Run(7 << 32, given))
    await until(lambda: ears.heard == [Unknown(given.key)])
    link.send(Run(1_000, given))
    await until(lambda: stage.notes.begun["a"] == 1)
    link.close()


async def test_a_call_that_waited_longer_than_patience_gets_over_a_lost_scheduler(
    stage: Stage,
) -> None:
    await stage.worker("w")
    client = stage.client(patience_s=0.3)
    first = asyncio.create_task(client.call(ask("first")))
    await until(lambda: stage.notes.begun["first"] == 1)
    waits = asyncio.create_task(client.call(ask("waits", deadline=time.time() + 60)))
    endless = asyncio.create_task(client.call(ask("endless")))
    await until(lambda: stage.dispatch.leases.state().queued == 2)
    waited = time.monotonic()
    await until(lambda: time.monotonic() - waited > 0.4)
    assert client._scheduler is not None
    client._scheduler.abort()
    await until(lambda: client._scheduler is None)
    await until(lambda: stage.dispatch.leases.state().queued == 2)
    stage.notes.may_end.set()
    results = await asyncio.gather(first, waits, endless)
    assert [result.status for result in results] == ["ok"] * 3


class Forgetful(Workplace):
    """Does not know a call when it is asked to run it for the first time."""

    def received(self, link: Link, message: object) -> None:
        if isinstance(message, Run) and message.ask.call_key == "waits" and not self._void_once:
            self._void_once = True
            link.send(Unknown(message.ask.key))
            self._unused(message.lease)
        else:
            super().received(link, message)

    _void_once = False


async def test_a_call_that_waited_longer_than_patience_is_asked_for_again(stage: Stage) -> None:
    await stage.worker("w", Forgetful)
    client = stage.client(patience_s=0.3)
    first = asyncio.create_task(client.call(ask("first")))
    await until(lambda: stage.notes.begun["first"] == 1)
    waits = asyncio.create_task(client.call(ask("waits")))
    await until(lambda: stage.dispatch.leases.state().queued == 1)
    waited = time.monotonic()
    await until(lambda: time.monotonic() - waited > 0.4)
    stage.notes.may_end.set()
    assert [each.status for each in await asyncio.gather(first, waits)] == ["ok", "ok"]


async def test_a_call_that_runs_at_its_deadline_gets_over_a_lost_connection(stage: Stage) -> None:
    await stage.worker("w")
    client = stage.client()
    deadline = time.time() + 0.3
    call = asyncio.create_task(client.call(ask("a", on_crash="retry", deadline=deadline)))
    await until(lambda: stage.notes.begun["a"] == 1)
    await until(lambda: time.time() > deadline)
    (link,) = client._doors.links()
    link.abort()
    await until(lambda: link not in client._doors.links())
    await until(lambda: bool(list(client._doors.links())))
    stage.notes.may_end.set()
    assert (await call).status == "ok"
    assert stage.notes.begun == {"a": 1}


async def test_a_call_that_began_is_never_said_to_have_not() -> None:
    async with staged() as stage:
        await stage.worker("w")
        gate = Gate(stage.dispatch)
        client = ToolClient("host", gate, clock=CLOCK, patience_s=0.2)
        stage.clients.append(client)
        call = asyncio.create_task(client.call(ask("a")))
        await until(lambda: stage.notes.begun["a"] == 1)
        gate.open = False
        for link in [client._scheduler, *client._doors.links()]:
            assert link is not None
            link.abort()
        result = await asyncio.wait_for(call, 5)
        assert (result.status, result.reason) == ("error", "died")
        assert "unknown" in result.output
        with pytest.raises(ToolPoolUnreachableError):
            await client.call(ask("b"))


async def test_a_scheduler_that_hangs_is_given_up_by_its_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "_SILENT_S", 0.2)
    ears = Ears()
    server, port = await listen(ears, HOST, "secret")

    async def locate() -> Location:
        return Location(HOST, port, "secret")

    async with server:
        client = ToolClient("host", locate, clock=CLOCK, patience_s=0.5)
        with pytest.raises(ToolPoolUnreachableError):
            await asyncio.wait_for(client.call(ask("a")), 10)
        result = await asyncio.wait_for(client.call(ask("b", deadline=time.time() + 0.3)), 10)
        assert result.reason == "expired"
        await client.close()


async def test_a_scheduler_that_hangs_is_replaced_by_its_workers(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workplace, "_SILENT_S", 2.5)
    asked = asyncio.Event()

    async def replace() -> None:
        asked.set()

    await stage.worker("w", replace=replace)
    states = stage.dispatch.leases.state
    began = time.monotonic()
    # While it says how the pool is, it lives.
    await until(lambda: time.monotonic() - began > 3.5)
    assert not asked.is_set()
    stage.running[0].cancel()
    await asyncio.wait_for(asked.wait(), 10)
    await until(lambda: states().workers == 1)


async def test_output_that_cannot_be_encoded_costs_no_slot(stage: Stage) -> None:
    await stage.worker("w")
    stage.notes.may_end.set()
    stage.notes.outputs = {"odd": "half \ud800 a pair", "none": None}
    client = stage.client()
    assert (await asyncio.wait_for(client.call(ask("odd")), 5)).output == "half ? a pair"
    assert (await asyncio.wait_for(client.call(ask("none")), 5)).reason == "failed"
    assert (await asyncio.wait_for(client.call(ask("next")), 5)).status == "ok"


async def test_a_fence_waits_for_killed_calls_whose_worker_was_cut_off(stage: Stage) -> None:
    place, _ = await stage.worker("w")
    stage.notes.may_die.clear()
    old, new = stage.client("old"), stage.client("new")
    call = asyncio.create_task(old.call(ask("a")))
    await until(lambda: stage.notes.begun["a"] == 1)
    leases = stage.dispatch.leases
    await until(lambda: any(entry.confirmed for entry in leases._leases.values()))
    fence = asyncio.create_task(new.fence("acme", "s", 2))
    await until(lambda: all(job.killed for job in place._jobs.values()))
    assert place._scheduler is not None
    place._scheduler.abort()
    await until(lambda: leases.state().workers == 0)
    await until(lambda: leases.state().workers == 1)
    assert leases.state().running == 1
    assert not fence.done()
    stage.notes.may_die.set()
    await asyncio.wait_for(fence, 5)
    assert stage.notes.killed == {"a": 1}
    await asyncio.gather(call)


async def test_a_worker_whose_connection_broke_is_probed_without_a_stumble(stage: Stage) -> None:
    stumbles: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: stumbles.append(what))
    place, gate = await stage.worker("w")
    gate.open = False
    assert place._scheduler is not None
    place._scheduler.abort()
    await until(lambda: bool(stage.dispatch._probes))
    began = time.monotonic()
    await until(lambda: time.monotonic() - began > 0.5)
    gate.open = True
    await until(lambda: stage.dispatch.leases.state().workers == 1)
    assert stumbles == []


async def test_who_waits_is_told_when_it_waits_no_longer_and_every_end_is_counted(
    stage: Stage,
) -> None:
    await stage.worker("w")
    metrics = Metrics()
    client = stage.client(metrics=metrics)
    told: list[object] = []
    first = asyncio.create_task(client.call(ask("first")))
    await until(lambda: stage.notes.begun["first"] == 1)
    waits = asyncio.create_task(
        client.call(
            ask("waits"),
            on_queued=lambda position, _: told.append(position),
            on_granted=lambda: told.append("granted"),
        )
    )
    await until(lambda: told == [1])
    left = asyncio.create_task(client.call(ask("left")))
    await until(lambda: stage.dispatch.leases.state().queued == 2)
    await until(lambda: count(metrics, "agentray_tool_workers") == 1)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    stage.notes.may_end.set()
    await asyncio.gather(first, waits)
    assert told[-1] == "granted"
    assert told.count("granted") == 1
    assert client._scheduler is not None
    client._scheduler.abort()
    await until(lambda: client._scheduler is None)
    assert count(metrics, "agentray_tool_workers") == 0
    lost = ToolClient("host", shut, clock=CLOCK, patience_s=0.1, metrics=metrics)
    with pytest.raises(ToolPoolUnreachableError):
        await lost.call(ask("lost"))
    ends = {
        outcome: count(
            metrics, "agentray_tool_calls_total", tenant="acme", tool="wait", outcome=outcome
        )
        for outcome in ("ok", "cancelled", "unreachable")
    }
    assert ends == {"ok": 2, "cancelled": 1, "unreachable": 1}


def count(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


async def test_who_is_not_told_anew_where_it_waits_is_told_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked_call, "_TOLD_EVERY_S", 0.5)
    monkeypatch.setattr(stage.dispatch.leases, "places", list)
    await stage.worker("w")
    client = stage.client()
    told: list[int] = []
    calls = [
        asyncio.create_task(client.call(ask(f"a{n}"), on_queued=lambda at, _: told.append(at)))
        for n in range(2)
    ]
    await until(lambda: told == [1, 1])
    stage.notes.may_end.set()
    await asyncio.gather(*calls)


async def shut() -> Location:
    raise NotReadyError("nowhere")


async def test_a_pool_that_is_not_there_is_given_up_after_a_while() -> None:
    client = ToolClient("host", shut, clock=CLOCK, patience_s=0.2)
    began = time.monotonic()
    with pytest.raises(ToolPoolUnreachableError):
        await client.call(ask("a"))
    assert 0.2 <= time.monotonic() - began < 2
    with pytest.raises(ToolPoolUnreachableError):
        await client.fence("acme", "s", 2, timeout_s=0.1)


async def test_a_calls_own_deadline_counts_while_another_one_looks_for_the_scheduler() -> None:
    client = ToolClient("host", shut, clock=CLOCK, patience_s=30.0)
    patient = asyncio.create_task(client.call(ask("patient")))
    began = time.monotonic()
    with pytest.raises(ToolPoolUnreachableError):
        await client.call(ask("urgent", deadline=time.time() + 0.3))
    assert time.monotonic() - began < 3
    patient.cancel()
    await asyncio.gather(patient, return_exceptions=True)


class Ears:
    """Notes what a listener is told."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.is_closed = asyncio.Event()

    def opened(self, link: Link, hello: Hello) -> None:
        self.heard.append(hello)

    def received(self, link: Link, message: object) -> None:
        self.heard.append(message)

    def closed(self, link: Link) -> None:
        self.is_closed.set()


@pytest.mark.parametrize(
    "first",
    [
        b"\x00\x00\x00\x05hello",
        b"\xff\xff\xff\xff",
        b"\x00\x01\x00\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x0e\x93\xa5Hello\xa5wrong\xa1n",
    ],
)
async def test_a_listener_hears_nothing_from_who_does_not_show_its_token(first: bytes) -> None:
    ears = Ears()
    server, port = await listen(ears, HOST, "secret")
    async with server:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(first)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
    assert ears.heard == []


async def test_who_shows_the_token_is_heard_in_order() -> None:
    ears = Ears()
    server, port = await listen(ears, HOST, "secret")
    async with server:
        link = await connect(Ears(), HOST, port, token="secret", name="me", timeout_s=5)
        runs = [Run(number, ask(f"k{number}", output="x" * 100_000)) for number in range(20)]
        for run in runs:
            link.send(run)
        link.close()
        await asyncio.wait_for(ears.is_closed.wait(), 5)
    assert ears.heard == [Hello("secret", "me"), *runs]


async def test_who_is_sent_more_than_it_can_take_at_once_gets_all_of_it() -> None:
    ears = Ears()
    server, port = await listen(ears, HOST, "secret")
    async with server:
        link = await connect(Ears(), HOST, port, token="secret", name="me", timeout_s=5)
        files = bytes(20 * 1024 * 1024)
        runs = [Run(number, ask(f"k{number}", scratch=files)) for number in range(16)]
        for run in runs:
            link.send(run)
        assert link._transport is not None
        assert link._transport.get_write_buffer_size() < 2 * len(files)
        await until(lambda: len(ears.heard) == 1 + len(runs), 30)
        link.close()
        await asyncio.wait_for(ears.is_closed.wait(), 5)
    assert [run.lease for run in ears.heard[1:] if isinstance(run, Run)] == list(range(16))


async def test_who_takes_nothing_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_STALLED_S", 0.3)
    deaf = asyncio.Event()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await deaf.wait()
        writer.close()

    server = await asyncio.start_server(hear, HOST, 0)
    async with server:
        ears = Ears()
        port = server.sockets[0].getsockname()[1]
        link = await connect(ears, HOST, port, token="secret", name="me", timeout_s=5)
        link.send(Run(1, ask("small")))
        began = time.monotonic()
        await until(lambda: time.monotonic() - began > 0.5)
        assert not ears.is_closed.is_set()
        link.send(Run(2, ask("large", scratch=bytes(30 * 1024 * 1024))))
        await asyncio.wait_for(ears.is_closed.wait(), 5)
        deaf.set()
