"""Answer equal calls once: an exact cache of answers, and one flight for all that ask at a time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Literal

import msgspec

from agentray.clock import Clock
from agentray.config.settings import CacheSettings
from agentray.errors import (
    InvalidRequestError,
    ModelError,
    ModelUnavailableError,
    StorageError,
)
from agentray.events import ToolCall, Usage
from agentray.models.base import ModelRequest
from agentray.models.refusals import unavailable
from agentray.storage.base import AnswerStore, FlightBegun
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics

__all__ = [
    "CacheKey",
    "CachedAnswer",
    "ResponseCache",
    "UnkeptAnswer",
    "completion_key",
    "may_cache",
    "request_key",
    "worth_keeping",
]

log = get_logger(__name__)

# Part of every key: entries of another layout are never found.
_LAYOUT = 1
# Who asks, how the answer travels and how calls are told apart: none of it decides the answer.
_UNDECISIVE = frozenset(
    {
        *("stream", "stream_options", "user", "metadata", "store", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "service_tier"),
        *("session_id", "request_id", "priority"),
    }
)

_FLIGHT_TERM_S = 3.0
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.25
_PAUSE_GROWTH = 1.5
# As long as the slowest of the waiting hosts may need to ask once more.
_ALONE_S = 2.0

_Taken = Literal["hit", "shared", "miss", "unavailable"]


class CacheKey(msgspec.Struct, frozen=True):
    """A call as the cache knows it: ``digest`` is of everything that decides the answer.

    ``raw`` says that the answer is a completion's whole JSON; else it is a ``CachedAnswer``'s.
    """

    digest: str
    model: str
    raw: bool


class CachedAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A whole answer to a step of a session, and what it cost the first time."""

    text: str
    finish_reason: str
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = Usage()
    model: str | None = None
    cost: float = 0.0

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def decode(answer: bytes) -> CachedAnswer:
        """Return what ``encode`` gave; raises ``msgspec.DecodeError`` for anything else."""
        return _answers.decode(answer)


class _RawMessage(msgspec.Struct):
    content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _RawChoice(msgspec.Struct):
    message: _RawMessage
    finish_reason: str | None = None


class _RawCompletion(msgspec.Struct):
    choices: list[_RawChoice]


_answers = msgspec.json.Decoder(CachedAnswer)
_completions = msgspec.json.Decoder(_RawCompletion)


def may_cache(
    settings: CacheSettings,
    *,
    temperature: float | None,
    opted: bool | None,
    offers_tools: bool,
    n: int | None = None,
) -> bool:
    """Return whether a call may be answered from the cache, and its answer kept.

    ``opted`` is what the request says, else its agent: False is never, True is always but for
    several answers at once. Who says nothing gets it at temperature 0, where the same question
    has the same answer; not where tools are offered, because what a tool call leads to depends
    on more than the question, unless ``settings.tools`` allows it.
    """
    if not settings.enabled or opted is False or n not in (None, 1):
        return False
    return bool(opted) or (temperature == 0 and (settings.tools or not offers_tools))


def request_key(tenant: str, request: ModelRequest) -> CacheKey:
    """Return the key of a session's call; ``request.model`` is its name in the catalog."""
    asked = {
        "messages": msgspec.Raw(b"[" + request.messages + b"]"),
        "tools": msgspec.Raw(b"[" + request.tools + b"]") if request.tools else None,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_completion_tokens": request.max_output_tokens,
        "response_format": msgspec.Raw(request.output_schema) if request.output_schema else None,
    }
    return _key(tenant, request.model, asked, raw=False)


def completion_key(tenant: str, model: str, body: Mapping[str, Any]) -> CacheKey:
    """Return the key of a stateless completion; its body's own ``model`` is not looked at.

    Fields that are not known to be without effect count, whatever they are; a field that is null
    is one that is not there.

    Raises:
        InvalidRequestError: a field of ``body`` is no JSON.
    """
    return _key(tenant, model, body, raw=True)


def _key(tenant: str, model: str, body: Mapping[str, Any], *, raw: bool) -> CacheKey:
    try:
        asked = msgspec.json.decode(msgspec.json.encode(body), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError("the body is no JSON object", param="body") from error
    decisive = {
        name: _plain(value)
        for name, value in asked.items()
        if value is not None and name != "model" and name not in _UNDECISIVE
    }
    whole = msgspec.json.encode([_LAYOUT, raw, tenant, model, decisive], order="deterministic")
    return CacheKey(hashlib.sha256(whole).hexdigest(), model, raw)


def _plain(value: Any) -> Any:
    # A temperature of 0.0 asks for the same as one of 0.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def worth_keeping(answer: bytes, *, raw: bool) -> bool:
    """Return whether an answer is whole and good.

    One that was cut by its length is not kept, although the same call would be cut again: where
    it is cut is the endpoint's to say (``max_tokens`` may be its default or what is left of its
    window, and both change without notice), and half an answer is not worth defending for an
    hour. Neither is an empty one, which is more often a fault than an answer.
    """
    try:
        if raw:
            choices = [
                (choice.finish_reason, choice.message.content, choice.message.tool_calls)
                for choice in _completions.decode(answer).choices
            ]
        else:
            found = _answers.decode(answer)
            choices = [(found.finish_reason, found.text, found.tool_calls)]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return bool(choices) and all(
        (reason == "stop" and bool(text or calls)) or (reason == "tool_calls" and bool(calls))
        for reason, text, calls in choices
    )


class UnkeptAnswer(Exception):  # noqa: N818 - it is an outcome, not an error
    """Raised by a call whose answer is for those who wait for it here, and for nobody else."""


_Call = Callable[[], Awaitable[bytes]]


class _Flight:
    """A call that is being made or waited for, and the calls of all who wait for its answer."""

    __slots__ = ("answer", "key", "made", "owed", "taken", "waiting", "work")

    def __init__(self, key: CacheKey) -> None:
        self.key = key
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.taken: _Taken = "miss"
        self.waiting: dict[object, _Call] = {}
        # Whose call was made.
        self.made: object = None
        self.work: asyncio.Task[None] | None = None
        # The call was made, and none of those who wait has been told that it is his.
        self.owed = True

    async def call(self) -> bytes:
        """Make the call of the first who still waits."""
        self.made, call = next(iter(self.waiting.items()))
        return await call()


class ResponseCache:
    """The answers of one process and event loop; see ``get_or_call``.

    ``owner`` is the process's id, which no other has or had. ``wait_s`` is how long a call waits
    at most for an equal one of another host's before it is made here too.
    """

    def __init__(
        self,
        store: AnswerStore,
        settings: CacheSettings,
        clock: Clock,
        metrics: Metrics,
        *,
        owner: str,
        wait_s: float = 60.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._owner = owner
        self._wait_s = wait_s
        self._sleep = sleep
        self._flights: dict[str, _Flight] = {}
        self._begun = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def get_or_call(
        self, key: CacheKey, call: _Call, *, until: float = math.inf
    ) -> tuple[bytes, bool]:
        """Return the answer, and whether it came from the cache or from another's equal call.

        ``call`` is made at most once for all that ask at the same time, here and on other hosts,
        in a task of its own: cancelling this method ends it only if nobody else waits for it, and
        waits for its end. Of those who share a call made here one is told False, and it is his to
        account for: whose ``call`` it was, if he is cancelled another. The others' errors are
        without ``cost``. What must be accounted for whoever stays belongs into ``call``.

        Whoever waits for another's call does so ``until`` that time of the loop's at most; how long
        his own may take is his ``call``'s to keep.

        An answer is kept if it is ``worth_keeping``, without anybody waiting for that. With the
        store away nothing is kept, equal calls of this process still share one, and no call
        waits longer for the store than for its time limit.

        Raises:
            ModelUnavailableError: the call was cancelled from within, or the cache was closed; with
                ``out_of_time``, the wait was over.
            Exception: what ``call`` raised, for all that shared it here. Nothing of it is kept.
        """
        flight = self._flights.get(key.digest)
        if flight is None:
            flight = self._flights[key.digest] = _Flight(key)
            flight.work = self._start(self._fly(flight))
        me = object()
        flight.waiting[me] = call
        try:
            left_s = until - asyncio.get_running_loop().time()
            await asyncio.wait({flight.answer}, timeout=None if left_s == math.inf else left_s)
            late = not flight.answer.done() and flight.made is not me
            answer = b"" if late else await asyncio.shield(flight.answer)
        except Exception as error:
            others = self._count(flight, me)
            if others and isinstance(error, ModelError) and "cost" in error.fields:
                facts = {name: fact for name, fact in error.fields.items() if name != "cost"}
                raise type(error)(error.message, **facts) from error
            raise
        finally:
            del flight.waiting[me]
            if not flight.waiting and not flight.answer.done():
                await self._abandon(flight)
        if late:
            raise unavailable(key.model, "did not answer in time", out_of_time=True)
        return answer, self._count(flight, me)

    async def close(self) -> None:
        """End calls that are under way; those who wait for them get ``ModelUnavailableError``."""
        for flight in list(self._flights.values()):
            self._fail(flight, None)
            if flight.work is not None:
                flight.work.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _count(self, flight: _Flight, who: object) -> bool:
        """Count one who got the answer, and return whether it was not his own call."""
        own = flight.owed and flight.taken in ("miss", "unavailable")
        own = own and (flight.made is who or flight.made not in flight.waiting)
        flight.owed = flight.owed and not own
        taken = flight.taken if own or flight.taken == "hit" else "shared"
        self._metrics.answer_cache.labels(taken).inc()
        return not own

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _abandon(self, flight: _Flight) -> None:
        flight.answer.cancel()
        self._forget(flight)
        assert flight.work is not None
        flight.work.cancel()
        # Whoever leaves last is to know what the call has cost.
        await asyncio.wait({flight.work})

    def _forget(self, flight: _Flight) -> None:
        if self._flights.get(flight.key.digest) is flight:
            del self._flights[flight.key.digest]

    def _fail(self, flight: _Flight, error: BaseException | None) -> None:
        if flight.answer.done():
            return
        if not isinstance(error, Exception):
            # Not as a cancellation: those who wait were not cancelled.
            error = ModelUnavailableError("the call was cancelled", model=flight.key.model)
        flight.answer.set_exception(error)

    async def _fly(self, flight: _Flight) -> None:
        """Bring a flight's answer, or its error, to all that wait for it here."""
        self._begun += 1
        name = f"{self._owner}/{self._begun}"
        try:
            begun = await self._begin(flight, name)
            if begun.outcome == "answer":
                answer = begun.answer
            elif begun.outcome == "leads":
                answer = await self._lead(flight, name)
            else:
                answer = await flight.call()
        except BaseException as error:
            self._forget(flight)
            self._fail(flight, error)
            # It may lead without knowing, if the acknowledgement was lost.
            alone_s = _ALONE_S if isinstance(error, UnkeptAnswer) else 0.0
            self._start(self._end(flight.key.digest, name, alone_s=alone_s))
            if isinstance(error, Exception):
                return  # those who wait have it
            raise
        if not flight.answer.done():
            flight.answer.set_result(answer)
        if begun.outcome != "answer":
            # It stays known until it is stored: whoever asks in between shares it.
            await self._keep(flight.key, name, answer)
        self._forget(flight)

    async def _begin(self, flight: _Flight, name: str) -> FlightBegun:
        """Return what is to be done as soon as it is not to wait."""
        key = flight.key
        deadline = self._clock.monotonic() + self._wait_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                begun = await self._store.begin_flight(key.digest, name, term_s=_FLIGHT_TERM_S)
            except StorageError:
                flight.taken = "unavailable"
                return FlightBegun("alone")
            if begun.outcome == "answer":
                if not worth_keeping(begun.answer, raw=key.raw):
                    return FlightBegun("alone")  # damaged: the new one takes its place
                flight.taken = "hit" if pause_s == _FIRST_PAUSE_S else "shared"
            if begun.outcome != "waits":
                return begun
            if self._clock.monotonic() >= deadline:
                return FlightBegun("alone")
            await self._sleep(pause_s)
            pause_s = min(pause_s * _PAUSE_GROWTH, _LONGEST_PAUSE_S)

    async def _lead(self, flight: _Flight, name: str) -> bytes:
        renewing = self._start(self._renew(flight.key.digest, name))
        try:
            return await flight.call()
        finally:
            renewing.cancel()

    async def _renew(self, digest: str, name: str) -> None:
        leads = True
        while leads:
            await self._sleep(_FLIGHT_TERM_S / 3)
            with contextlib.suppress(StorageError):
                leads = await self._store.renew_flight(digest, name, term_s=_FLIGHT_TERM_S)

    async def _keep(self, key: CacheKey, name: str, answer: bytes) -> None:
        small = len(answer) <= self._settings.max_entry_bytes
        if small and worth_keeping(answer, raw=key.raw):
            try:
                await self._store.put(key.digest, name, answer)
            except StorageError as error:
                log.debug("answer_not_kept", model=key.model, error=error.message)
        else:
            # Those who wait elsewhere would else make the call one after another, each to find
            # that it cannot share the answer either.
            await self._end(key.digest, name, alone_s=_ALONE_S)

    async def _end(self, digest: str, name: str, *, alone_s: float = 0.0) -> None:
        # Else its term ends it.
        with contextlib.suppress(StorageError):
            await self._store.end_flight(digest, name, alone_s=alone_s)
