"""The answer cache: what may be kept, what is the same call, and one flight for all that ask."""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from agentray.clock import ManualClock
from agentray.config.settings import CacheSettings
from agentray.errors import (
    InvalidRequestError,
    ModelError,
    ModelRateLimitedError,
    ModelUnavailableError,
    StorageUnavailableError,
)
from agentray.events import ToolCall, Usage
from agentray.models.base import ModelRequest
from agentray.models.cache import (
    CachedAnswer,
    CacheKey,
    ResponseCache,
    UnkeptAnswer,
    completion_key,
    may_cache,
    request_key,
    worth_keeping,
)
from agentray.storage.base import FlightBegun
from agentray.telemetry.metrics import Metrics

KEY = CacheKey("d1", "tiny", raw=False)
ANSWER = CachedAnswer("hello", "stop", usage=Usage(3, 2)).encode()
CUT = CachedAnswer("hel", "length").encode()
LOST = StorageUnavailableError("away")


class Time(ManualClock):
    """A clock whose sleepers wake as it is advanced."""

    def __init__(self) -> None:
        super().__init__()
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._count = 0

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        woken = asyncio.Event()
        heapq.heappush(self._sleepers, (self.monotonic() + seconds, self._count, woken))
        await woken.wait()

    async def pass_by(self, seconds: float) -> None:
        """Advance in small steps, and let everybody do at each what is due."""
        end = self.monotonic() + seconds
        while self.monotonic() < end:
            self.advance(min(0.05, end - self.monotonic()))
            while self._sleepers and self._sleepers[0][0] <= self.monotonic():
                heapq.heappop(self._sleepers)[2].set()
            await settled()


async def settled() -> None:
    """Let all tasks go on until they wait for something that only the test brings."""
    for _ in range(30):
        await asyncio.sleep(0)


class MemoryAnswers:
    """What all hosts see; ``away`` and ``hold`` are faults."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.answers: dict[str, bytes] = {}
        self.marks: dict[str, tuple[str, float]] = {}
        self.away = False
        self.putting: asyncio.Event | None = None
        self.asked = 0

    def _mark(self, key: str) -> str | None:
        if self.away:
            raise LOST
        mark, until = self.marks.get(key, (None, 0.0))
        return mark if self.clock.monotonic() < until else None

    async def begin_flight(self, key: str, flight: str, *, term_s: float) -> FlightBegun:
        self.asked += 1
        mark = self._mark(key)
        if key in self.answers:
            return FlightBegun("answer", self.answers[key])
        if mark is None:
            self.marks[key] = (flight, self.clock.monotonic() + term_s)
            return FlightBegun("leads")
        return FlightBegun("alone" if mark == "alone" else "waits")

    async def renew_flight(self, key: str, flight: str, *, term_s: float) -> bool:
        if self._mark(key) != flight:
            return False
        self.marks[key] = (flight, self.clock.monotonic() + term_s)
        return True

    async def put(self, key: str, flight: str, answer: bytes) -> None:
        if self.putting is not None:
            await self.putting.wait()
        if self._mark(key) == flight:
            del self.marks[key]
        self.answers[key] = answer

    async def end_flight(self, key: str, flight: str, *, alone_s: float = 0.0) -> None:
        if self._mark(key) == flight:
            self.marks[key] = ("alone", self.clock.monotonic() + alone_s)


class World:
    """Hosts that share a store and a time, and an endpoint that answers when it is told to."""

    def __init__(self) -> None:
        self.time = Time()
        self.store = MemoryAnswers(self.time)
        self.metrics = Metrics()
        self.hosts: list[ResponseCache] = []
        self.calls: list[asyncio.Future[bytes]] = []

    def host(self, **settings: Any) -> ResponseCache:
        cache = ResponseCache(
            self.store,
            CacheSettings(**settings),
            self.time,
            self.metrics,
            owner=f"host{len(self.hosts)}",
            wait_s=10.0,
            sleep=self.time.sleep,
        )
        self.hosts.append(cache)
        return cache

    async def call(self) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.calls.append(answer)
        return await answer

    def ask(self, host: ResponseCache, key: CacheKey = KEY) -> asyncio.Task[tuple[bytes, bool]]:
        return asyncio.get_running_loop().create_task(host.get_or_call(key, self.call))

    def counted(self) -> dict[str, float]:
        (family,) = self.metrics.answer_cache.collect()
        return {
            sample.labels["result"]: sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }


@pytest.fixture
def world() -> World:
    return World()


# What may be cached


@pytest.mark.parametrize(
    ("expected", "asked"),
    [
        (True, {"temperature": 0}),
        (True, {"temperature": 0.0, "n": 1}),
        (False, {"temperature": None}),
        (False, {"temperature": 1e-9}),
        (False, {"temperature": 0, "opted": False}),
        (True, {"temperature": 1.0, "opted": True}),
        (True, {"temperature": None, "opted": True}),
        (False, {"temperature": 0, "n": 2}),
        (False, {"temperature": 0, "n": 2, "opted": True}),
        (False, {"temperature": 0, "offers_tools": True}),
        (True, {"temperature": 0, "offers_tools": True, "opted": True}),
        (False, {"temperature": 0.5, "offers_tools": True}),
    ],
)
def test_calls_are_cached_at_temperature_0_or_when_somebody_said_so(
    expected: bool, asked: dict[str, Any]
) -> None:
    asked = {"opted": None, "offers_tools": False, **asked}
    assert may_cache(CacheSettings(), **asked) is expected
    assert may_cache(CacheSettings(enabled=False), **asked) is False


def test_calls_that_offer_tools_are_cached_where_the_settings_say_so() -> None:
    for temperature, expected in ((0, True), (0.5, False)):
        found = may_cache(
            CacheSettings(tools=True), temperature=temperature, opted=None, offers_tools=True
        )
        assert found is expected


# Which calls are the same


BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": True, "stream_options": {"include_usage": True}},
        {"user": "u", "metadata": {"a": "b"}, "session_id": "s"},
        {"temperature": 0.0},
        {"seed": None},
        {"model": "a name that the endpoint has"},
    ],
)
def test_what_does_not_decide_the_answer_is_not_in_the_key(changes: dict[str, Any]) -> None:
    assert completion_key("t", "tiny", {**BODY, **changes}) == completion_key("t", "tiny", BODY)


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "user", "content": "ho"}]},
        {"messages": [{"role": "system", "content": "hi"}]},
        {"temperature": 0.1},
        {"tools": []},
        {"seed": 1},
        {"stop": ["x"]},
        {"something_of_the_endpoints": 1},
        {"seed": 2**53 + 1},
        {"seed": 2**53},
        {"logprobs": True},
    ],
)
def test_what_may_decide_the_answer_is_in_the_key(changes: dict[str, Any]) -> None:
    others = [BODY, {**BODY, "seed": 2.0**53 + 2}, {**BODY, "logprobs": 1}, {**BODY, "stop": "x"}]
    changed = completion_key("t", "tiny", {**BODY, **changes})
    assert changed.digest not in [completion_key("t", "tiny", other).digest for other in others]


def test_the_order_and_the_white_space_of_a_body_do_not_count() -> None:
    loose = {
        name: msgspec.Raw(json.dumps(value, indent=2).encode())
        for name, value in reversed(BODY.items())
    }
    assert completion_key("t", "tiny", loose) == completion_key("t", "tiny", BODY)


def test_tenants_and_models_and_kinds_of_answers_do_not_share() -> None:
    request = ModelRequest(
        model="tiny", messages=b'{"role":"user","content":"hi"}', temperature=0, session_id="s"
    )
    keys = [
        completion_key("t", "tiny", BODY),
        completion_key("u", "tiny", BODY),
        completion_key("t", "big", BODY),
        request_key("t", request),
        request_key("t", msgspec.structs.replace(request, tools=b'{"type":"function"}')),
    ]
    assert len({key.digest for key in keys}) == len(keys)
    other_session = msgspec.structs.replace(request, session_id="another")
    assert request_key("t", other_session) == request_key("t", request)
    assert [key.raw for key in keys] == [True, True, True, False, False]


@pytest.mark.parametrize("field", [b"1e999", b'"\xff"', b"{"])
def test_a_body_with_a_field_that_is_no_json_is_refused(field: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        completion_key("t", "tiny", {"a": msgspec.Raw(field)})


# What is worth keeping


CALL = (ToolCall("c", "echo", "{}"),)


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        (True, CachedAnswer("hello", "stop")),
        (True, CachedAnswer("", "tool_calls", CALL)),
        (True, CachedAnswer("", "stop", CALL)),
        (False, CachedAnswer("hel", "length")),
        (False, CachedAnswer("", "stop")),
        (False, CachedAnswer("x", "tool_calls")),
        (False, CachedAnswer("x", "content_filter")),
    ],
)
def test_only_whole_and_good_answers_are_kept(expected: bool, answer: CachedAnswer) -> None:
    assert worth_keeping(answer.encode(), raw=False) is expected
    assert CachedAnswer.decode(answer.encode()) == answer
    calls = [{"id": c.call_id} for c in answer.tool_calls]
    message = {"content": answer.text, **({"tool_calls": calls} if calls else {})}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    assert worth_keeping(json.dumps({"choices": [choice]}).encode(), raw=True) is expected


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"error":{"message":"no"}}', b'{"choices":[]}', b'{"choices":[{"message":{}}]}'],
)
def test_what_is_no_answer_is_not_kept(body: bytes) -> None:
    assert not worth_keeping(body, raw=True)
    assert not worth_keeping(body, raw=False)


# One host


async def test_a_thousand_equal_calls_are_one_and_one_of_them_is_told_that_it_was_his(
    world: World,
) -> None:
    host = world.host()
    asked = [world.ask(host) for _ in range(1_000)]
    await settled()
    assert len(world.calls) == 1
    world.calls[0].set_result(ANSWER)
    assert sorted(await asyncio.gather(*asked)) == [(ANSWER, False)] + [(ANSWER, True)] * 999
    assert await world.ask(host) == (ANSWER, True)
    assert len(world.calls) == 1
    assert world.counted() == {"miss": 1, "shared": 999, "hit": 1}


async def test_calls_that_differ_do_not_wait_for_each_other(world: World) -> None:
    host = world.host()
    first, second = world.ask(host), world.ask(host, CacheKey("d2", "tiny", raw=False))
    await settled()
    world.calls[1].set_result(ANSWER)
    assert await second == (ANSWER, False)
    assert not first.done()
    world.calls[0].set_result(ANSWER)
    assert await first == (ANSWER, False)


async def test_who_asks_while_the_answer_is_being_stored_shares_it_and_waits_for_nothing(
    world: World,
) -> None:
    host = world.host()
    world.store.putting = asyncio.Event()
    first = world.ask(host)
    await settled()
    world.calls[0].set_result(ANSWER)
    assert await first == (ANSWER, False)
    assert await world.ask(host) == (ANSWER, True)
    assert (len(world.calls), world.store.answers) == (1, {})
    world.store.putting.set()
    await settled()
    assert world.store.answers == {KEY.digest: ANSWER}


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_whoever_leaves_the_others_get_the_answer_and_one_of_them_accounts_for_it(
    world: World, leaver: int
) -> None:
    host = world.host()
    asked = [world.ask(host) for _ in range(3)]
    await settled()
    asked.pop(leaver).cancel()
    await settled()
    assert not world.calls[0].cancelled()
    world.calls[0].set_result(ANSWER)
    assert await asyncio.gather(*asked) == [(ANSWER, False), (ANSWER, True)]


@pytest.mark.parametrize("begun", [False, True])
async def test_when_the_last_one_leaves_the_call_ends_and_the_next_makes_its_own(
    world: World, begun: bool
) -> None:
    host = world.host()
    asked = [world.ask(host) for _ in range(3)]
    if begun:
        await settled()
    for task in asked:
        task.cancel()
    await settled()
    assert all(task.cancelled() for task in asked)
    assert [call.cancelled() for call in world.calls] == ([True] if begun else [])
    again = world.ask(host)
    await world.time.pass_by(0.1)
    world.calls[-1].set_result(ANSWER)
    assert await again == (ANSWER, False)


async def test_an_error_goes_to_all_that_shared_the_call_and_is_not_kept(world: World) -> None:
    host = world.host()
    asked = [world.ask(host) for _ in range(3)]
    await settled()
    world.calls[0].set_exception(ModelRateLimitedError("slow down", model="tiny"))
    for error in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(error, ModelRateLimitedError)
    again = [world.ask(host) for _ in range(3)]
    await world.time.pass_by(0.1)
    assert len(world.calls) == 2
    world.calls[1].set_result(ANSWER)
    assert (await asyncio.gather(*again))[0] == (ANSWER, False)
    assert world.counted() == {"miss": 2, "shared": 4}


async def test_what_a_lost_call_cost_is_told_to_one(world: World) -> None:
    host = world.host()
    asked = [world.ask(host) for _ in range(3)]
    await settled()
    world.calls[0].set_exception(ModelRateLimitedError("slow down", model="tiny", cost=1.0))
    errors = await asyncio.gather(*asked, return_exceptions=True)
    facts = [error.fields for error in errors if isinstance(error, ModelError)]
    assert facts == [{"model": "tiny", "cost": 1.0}, {"model": "tiny"}, {"model": "tiny"}]
    assert {type(error) for error in errors} == {ModelRateLimitedError}


async def test_who_waits_for_anothers_call_does_so_until_his_time_is_over(world: World) -> None:
    host = world.host()
    leader = world.ask(host)
    await settled()
    soon = asyncio.get_running_loop().time() + 0.01
    with pytest.raises(ModelUnavailableError) as caught:
        await host.get_or_call(KEY, world.call, until=soon)
    assert caught.value.fields["out_of_time"]
    world.calls[0].set_result(ANSWER)
    assert await leader == (ANSWER, False)


async def test_an_own_call_ends_when_it_says(world: World) -> None:
    host = world.host()
    soon = asyncio.get_running_loop().time() + 0.01
    asked = asyncio.ensure_future(host.get_or_call(KEY, world.call, until=soon))
    await asyncio.wait({asked}, timeout=0.05)
    world.calls[0].set_result(ANSWER)
    assert await asked == (ANSWER, False)


async def test_the_wait_for_another_host_ends_with_the_time_of_those_who_wait(
    world: World,
) -> None:
    world.store.marks[KEY.digest] = ("another host", world.time.monotonic() + 3.0)
    host = world.host()
    soon = asyncio.get_running_loop().time() + 0.01
    first = asyncio.ensure_future(host.get_or_call(KEY, world.call, until=soon))
    await settled()

    async def other_call() -> bytes:
        return CUT

    second = asyncio.ensure_future(host.get_or_call(KEY, other_call))
    with pytest.raises(ModelUnavailableError):
        await first
    # The call of one who is still there is made, and he accounts for it.
    await world.time.pass_by(3.5)
    assert await second == (CUT, False)
    assert world.calls == []


async def test_the_last_to_leave_waits_for_the_end_of_the_call(world: World) -> None:
    ended = False

    async def call() -> bytes:
        nonlocal ended
        try:
            return await world.call()
        finally:
            await settled()
            ended = True

    asked = asyncio.ensure_future(world.host().get_or_call(KEY, call))
    await settled()
    asked.cancel()
    await asyncio.wait({asked})
    assert ended


async def test_a_call_that_cancels_itself_is_an_error_and_cancels_nobody(world: World) -> None:
    asked = [world.ask(world.host()) for _ in range(2)]
    await settled()
    world.calls[0].cancel()
    with pytest.raises(ModelUnavailableError):
        await asked[0]
    await world.time.pass_by(0.1)
    world.calls[1].set_result(ANSWER)
    assert await asked[1] == (ANSWER, False)


@pytest.mark.parametrize("settings", [{"max_entry_bytes": 10}, {}])
async def test_an_answer_that_is_too_large_or_cut_off_is_given_and_not_kept(
    world: World, settings: dict[str, Any]
) -> None:
    host = world.host(**settings)
    answer = ANSWER if settings else CUT
    for count in (1, 2):
        asked = [world.ask(host), world.ask(host)]
        await settled()
        assert len(world.calls) == count
        world.calls[-1].set_result(answer)
        assert await asyncio.gather(*asked) == [(answer, False), (answer, True)]
    assert world.store.answers == {}


async def test_an_entry_that_is_damaged_counts_as_none_and_is_replaced(world: World) -> None:
    host = world.host()
    world.store.answers[KEY.digest] = b"{"
    asked = world.ask(host)
    await settled()
    world.calls[0].set_result(ANSWER)
    assert await asked == (ANSWER, False)
    await settled()
    assert world.store.answers == {KEY.digest: ANSWER}


@pytest.mark.parametrize("begun", [False, True])
async def test_closing_ends_calls_and_those_who_wait_are_told(world: World, begun: bool) -> None:
    host = world.host()
    asked = world.ask(host)
    await asyncio.sleep(0)
    if begun:
        await settled()
    await host.close()
    with pytest.raises(ModelUnavailableError):
        await asked
    assert [call.cancelled() for call in world.calls] == ([True] if begun else [])


# Many hosts


async def test_hosts_make_one_call_and_the_others_wait_for_its_answer(world: World) -> None:
    hosts = [world.host() for _ in range(3)]
    asked = [world.ask(host) for host in hosts for _ in range(5)]
    await world.time.pass_by(8.0)  # longer than a flight that gives no sign of life
    assert len(world.calls) == 1
    world.calls[0].set_result(ANSWER)
    await world.time.pass_by(0.3)
    assert sorted(await asyncio.gather(*asked)) == [(ANSWER, False)] + [(ANSWER, True)] * 14
    assert world.counted() == {"miss": 1, "shared": 14}
    # They ask less and less often: three hosts, 8 s, four times a second and some at first.
    assert world.store.asked < 2 * 8 * 4 + 30


async def test_when_the_leader_fails_one_of_those_who_wait_takes_over(world: World) -> None:
    first, second, third = [world.ask(world.host()) for _ in range(3)]
    await settled()
    world.calls[0].set_exception(ModelUnavailableError("died", model="tiny"))
    await world.time.pass_by(0.5)
    with pytest.raises(ModelUnavailableError):
        await first
    assert len(world.calls) == 2
    world.calls[1].set_result(ANSWER)
    await world.time.pass_by(0.5)
    assert sorted([await second, await third]) == [(ANSWER, False), (ANSWER, True)]


async def test_when_the_leader_dies_its_flight_ends_with_its_term(world: World) -> None:
    world.store.marks[KEY.digest] = ("a host that is no more", world.time.monotonic() + 3.0)
    asked = world.ask(world.host())
    await world.time.pass_by(2.5)
    assert not world.calls
    await world.time.pass_by(1.0)
    world.calls[0].set_result(ANSWER)
    assert await asked == (ANSWER, False)


async def test_who_waited_for_long_calls_too(world: World) -> None:
    leader = world.ask(world.host())
    await settled()
    other = world.ask(world.host())
    await world.time.pass_by(9.5)
    assert len(world.calls) == 1
    await world.time.pass_by(1.0)
    world.calls[1].set_result(ANSWER)
    assert await other == (ANSWER, False)
    world.calls[0].set_result(ANSWER)
    assert await leader == (ANSWER, False)


async def test_an_answer_that_cannot_be_kept_does_not_make_the_others_call_in_a_row(
    world: World,
) -> None:
    asked = [world.ask(world.host()) for _ in range(3)]
    await settled()
    world.calls[0].set_result(CUT)
    await world.time.pass_by(0.3)
    assert len(world.calls) == 3  # both at once
    for call in world.calls[1:]:
        call.set_result(CUT)
    assert await asyncio.gather(*asked) == [(CUT, False)] * 3


async def test_neither_does_one_that_is_said_to_be_for_those_here_alone(world: World) -> None:
    asked = [world.ask(world.host()) for _ in range(3)]
    await settled()
    world.calls[0].set_exception(UnkeptAnswer())
    await world.time.pass_by(0.3)
    assert len(world.calls) == 3  # both at once
    for call in world.calls[1:]:
        call.set_result(ANSWER)
    with pytest.raises(UnkeptAnswer):
        await asked[0]
    assert await asyncio.gather(*asked[1:]) == [(ANSWER, False)] * 2


# Without the store


async def test_with_the_store_away_equal_calls_of_a_host_are_still_one(world: World) -> None:
    world.store.away = True
    host, other = world.host(), world.host()
    asked = [world.ask(host) for _ in range(3)]
    elsewhere = world.ask(other)
    await settled()
    assert len(world.calls) == 2
    for call in world.calls:
        call.set_result(ANSWER)
    assert sorted(await asyncio.gather(*asked)) == [(ANSWER, False)] + [(ANSWER, True)] * 2
    assert await elsewhere == (ANSWER, False)
    assert world.counted() == {"unavailable": 2, "shared": 2}


def leave(world: World) -> None:
    world.store.away = True


def forget(world: World) -> None:
    world.store.marks.clear()


@pytest.mark.parametrize("fault", [leave, forget])
async def test_a_store_that_goes_in_the_middle_disturbs_no_call(
    world: World, fault: Callable[[World], None]
) -> None:
    leader = world.ask(world.host())
    await settled()
    waiter = world.ask(world.host())
    await settled()
    fault(world)
    await world.time.pass_by(2.5)
    assert len(world.calls) == 2
    for call in world.calls:
        call.set_result(ANSWER)
    assert await asyncio.gather(leader, waiter) == [(ANSWER, False), (ANSWER, False)]
    await settled()
    world.store.away = False
    again = world.ask(world.hosts[0])
    await world.time.pass_by(1.0)  # the mark of a call whose end could not be told is gone
    for call in world.calls[2:]:
        call.set_result(ANSWER)
    assert (await again)[0] == ANSWER


async def test_nothing_is_left_behind(world: World) -> None:
    host = world.host()
    endings: list[Callable[[asyncio.Future[bytes]], object]] = [
        lambda call: call.set_result(ANSWER),
        lambda call: call.set_exception(ModelUnavailableError("no", model="tiny")),
        lambda call: call.cancel(),
    ]
    for number, end in enumerate(endings):
        asked: Awaitable[Any] = world.ask(host, CacheKey(f"k{number}", "tiny", raw=False))
        await settled()
        end(world.calls[-1])
        await asyncio.gather(asked, return_exceptions=True)
    await world.time.pass_by(1.5)
    assert not host._flights
    assert not host._tasks
