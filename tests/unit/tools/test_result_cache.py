"""Which calls share a result, across hosts, tenants, failures and cancellations."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentray.clock import ManualClock
from agentray.errors import StorageUnavailableError
from agentray.storage.base import FlightBegun
from agentray.tools.cache import ResultCache, result_key
from agentray.tools.spec import ToolResult, ToolSpec

SPEC = ToolSpec("weather", "d", {}, cache_s=60, timeout_s=10)
ARGUMENTS = {"city": "Bern"}


class MemoryResults:
    """A store that all hosts see."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.answers: dict[str, tuple[bytes, float]] = {}
        self.marks: dict[str, tuple[str, float]] = {}
        self.away = False

    def _mark(self, key: str) -> str | None:
        if self.away:
            raise StorageUnavailableError("away")
        mark, until = self.marks.get(key, (None, 0.0))
        return mark if self.clock.monotonic() < until else None

    async def begin_flight(
        self, key: str, flight: str, *, term_s: float, age_s: float | None = None
    ) -> FlightBegun:
        mark = self._mark(key)
        if key in self.answers and age_s is not None:
            answer, stored = self.answers[key]
            if self.clock.monotonic() - stored < age_s:
                return FlightBegun("answer", answer)
        if mark is None:
            self.marks[key] = (flight, self.clock.monotonic() + term_s)
            return FlightBegun("leads")
        return FlightBegun("alone" if mark == "alone" else "waits")

    async def renew_flight(self, key: str, flight: str, *, term_s: float) -> bool:
        return self._mark(key) == flight

    async def put(self, key: str, flight: str, answer: bytes) -> None:
        self._mark(key)
        self.marks.pop(key, None)
        self.answers[key] = (answer, self.clock.monotonic())

    async def end_flight(self, key: str, flight: str, *, alone_s: float = 0.0) -> None:
        if self._mark(key) == flight:
            self.marks[key] = ("alone", self.clock.monotonic() + alone_s)


class World:
    """Hosts that share a store, and a tool that answers when it is told to."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryResults(self.clock)
        self.counted: list[str] = []
        self.calls: list[asyncio.Future[ToolResult]] = []
        self.hosts = [self.host(name) for name in "ab"]

    def host(self, name: str) -> ResultCache:
        return ResultCache(
            self.store, self.clock, owner=name, count=self.counted.append, sleep=self.sleep
        )

    async def sleep(self, seconds: float) -> None:
        # Only pauses between two looks go on by themselves; signs of life wait for the test.
        await (asyncio.sleep(0) if seconds < 0.5 else asyncio.Event().wait())

    async def call(self) -> ToolResult:
        self.calls.append(asyncio.get_running_loop().create_future())
        return await self.calls[-1]

    def ask(
        self, host: int = 0, tenant: str = "acme", spec: ToolSpec = SPEC, **arguments: Any
    ) -> asyncio.Task[ToolResult]:
        asked = self.hosts[host].get(spec, tenant, arguments or ARGUMENTS, self.call)
        return asyncio.ensure_future(asked)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def answer(world: World, text: str, number: int = -1, status: Any = "ok") -> None:
    world.calls[number].set_result(ToolResult(status, text, cpu_s=2))


async def test_equal_calls_here_and_elsewhere_are_one() -> None:
    world = World()
    asked = [world.ask(), world.ask(), world.ask(host=1)]
    await settled()
    assert len(world.calls) == 1
    answer(world, "sunny")
    found = await asyncio.gather(*asked)
    assert [result.output for result in found] == ["sunny"] * 3
    assert [result.cached for result in found] == [False, True, True]
    # Whoever has another's result has spent nothing.
    assert found[2].cpu_s == 0
    assert world.counted == ["miss", "shared", "shared"]


async def test_a_result_is_found_until_it_is_too_old() -> None:
    world = World()
    first = world.ask()
    await settled()
    answer(world, "sunny")
    await first
    world.clock.advance(59)
    assert (await world.ask(host=1)).output == "sunny"
    world.clock.advance(1)
    late = world.ask(host=1)
    await settled()
    answer(world, "rainy")
    assert (await late).output == "rainy"


async def test_tenants_versions_and_arguments_are_told_apart() -> None:
    keys = {
        result_key("acme", SPEC, {"a": 1, "b": [2]}),
        result_key("other", SPEC, {"a": 1, "b": [2]}),
        result_key("acme", ToolSpec("weather", "d", {}, version="2"), {"a": 1, "b": [2]}),
        result_key("acme", ToolSpec("forecast", "d", {}), {"a": 1, "b": [2]}),
        result_key("acme", SPEC, {"a": 1, "b": [3]}),
        result_key("acme", SPEC, {"a": "1", "b": [2]}),
        result_key("acme", SPEC, {"a": True, "b": [2]}),
    }
    assert len(keys) == 7
    assert result_key("acme", SPEC, {"b": [2.0], "a": 1.0}) in keys


async def test_a_failure_is_its_own_callers_alone() -> None:
    world = World()
    first, second = world.ask(), world.ask()
    await settled()
    answer(world, "broken", status="error")
    assert (await first).output == "broken"
    await settled()
    answer(world, "sunny")
    assert (await second).output == "sunny"
    assert len(world.calls) == 2


async def test_hosts_that_waited_for_a_failure_call_at_once() -> None:
    world = World()
    asked = [world.ask(host=1)]
    await settled()
    asked += [world.ask(host=0)]
    world.hosts.append(world.host("c"))
    asked += [world.ask(host=2)]
    await settled()
    assert len(world.calls) == 1
    answer(world, "broken", status="error")
    await settled()
    # Both: had the second waited for the first, it could fail again.
    assert len(world.calls) == 3
    answer(world, "x", 1)
    answer(world, "y", 2)
    assert sorted(result.output for result in await asyncio.gather(*asked)) == ["broken", "x", "y"]


async def test_an_exception_is_its_own_callers_alone() -> None:
    world = World()
    first, second = world.ask(), world.ask()
    await settled()
    world.calls[0].set_exception(ValueError("mine"))
    with pytest.raises(ValueError, match="mine"):
        await first
    await settled()
    answer(world, "sunny")
    assert (await second).output == "sunny"


async def test_one_of_those_who_wait_goes_on_when_the_caller_is_cancelled() -> None:
    world = World()
    asked = [world.ask(), world.ask(), world.ask()]
    await settled()
    asked[0].cancel()
    await settled()
    assert len(world.calls) == 2
    answer(world, "sunny")
    assert [result.output for result in await asyncio.gather(*asked[1:])] == ["sunny"] * 2
    assert asked[0].cancelled()
    assert world.calls[0].cancelled()


async def test_without_the_store_equal_calls_of_a_process_are_still_one() -> None:
    world = World()
    world.store.away = True
    asked = [world.ask(), world.ask(), world.ask(host=1)]
    await settled()
    assert len(world.calls) == 2
    answer(world, "x", 0)
    answer(world, "y", 1)
    assert [result.output for result in await asyncio.gather(*asked)] == ["x", "x", "y"]


async def test_a_result_that_is_damaged_is_made_again() -> None:
    world = World()
    key = result_key("acme", SPEC, ARGUMENTS)
    world.store.answers[key] = (b"{", 0.0)
    asked = world.ask()
    await settled()
    answer(world, "sunny")
    assert (await asked).output == "sunny"
    assert (await world.ask(host=1)).output == "sunny"


@pytest.mark.parametrize(
    "spec",
    [ToolSpec("t", "d", {}), ToolSpec("t", "d", {}, cache_s=60, keeps_scratch=True)],
)
async def test_tools_without_a_cache_time_or_with_files_share_nothing(spec: ToolSpec) -> None:
    world = World()
    asked = [world.ask(spec=spec), world.ask(spec=spec)]
    await settled()
    assert len(world.calls) == 2
    for number in range(2):
        answer(world, "x", number)
    await asyncio.gather(*asked)
    assert not world.store.answers


async def test_a_result_with_files_is_not_shared() -> None:
    world = World()
    first = world.ask()
    await settled()
    world.calls[0].set_result(ToolResult("ok", "x", scratch=b"tar"))
    await first
    assert not world.store.answers
