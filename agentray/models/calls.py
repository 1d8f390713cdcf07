"""Make a model call with all that belongs around it: breaker, cache, hedge, checks and cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from msgspec.structs import replace

from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError, ModelUnavailableError
from agentray.events import ToolCall
from agentray.models.base import Bill, ModelCaller, ModelProgress, ModelRequest
from agentray.models.cache import CachedAnswer, ResponseCache, may_cache, request_key
from agentray.models.refusals import unavailable
from agentray.models.router import Attempt, Router
from agentray.models.usage import estimate

__all__ = ["ModelCalls"]

_LONGEST_PAUSE_S = 1.0
# In front of the reason why an answer ended that failed its checks, or is another model's: it is
# shared by those who wait, and not kept.
_REJECTED = "rejected:"
# Why an answer's text can end before its end.
_CUT = ("length", "content_filter")


_Racers = dict[asyncio.Future[ModelProgress], tuple[AsyncGenerator[ModelProgress], str]]


class ModelCalls:
    """A ``ModelCaller`` that keeps the rules of ``Router``; one per process.

    What comes out of it ends with the call's cost and with what the request's check found. The
    attempts of a step, and which model each takes, are its caller's to decide.
    """

    def __init__(
        self,
        router: Router,
        models: ModelCaller,
        settings: ModelsSettings,
        cache: ResponseCache | None = None,
    ) -> None:
        self._router = router
        self._models = models
        self._settings = settings
        self._cache = cache
        # Since when a model that another one overtook has not said anything, in the loop's time.
        self._silent_since: dict[str, float] = {}

    def stream(self, request: ModelRequest) -> AsyncGenerator[ModelProgress]:
        """Call and yield progress until the answer is whole. See ``ModelCaller.stream``.

        All waits and calls together take the request's time at most.
        """
        left_s = request.timeout_s
        left_s = self._settings.step_timeout_s if left_s is None else left_s
        deadline = asyncio.get_running_loop().time() + left_s
        if self._cache is None or request.continue_text or not self._may_cache(request):
            return self._hedged(request, deadline)
        return self._through_cache(self._cache, request, deadline)

    # The cache

    def _may_cache(self, request: ModelRequest) -> bool:
        return may_cache(
            self._settings.cache,
            temperature=request.temperature,
            opted=request.cache,
            offers_tools=request.tools is not None,
        )

    async def _through_cache(
        self, cache: ResponseCache, request: ModelRequest, deadline: float
    ) -> AsyncGenerator[ModelProgress]:
        """Answer from the cache; else call, let the text through as it comes, and keep it."""
        arriving: asyncio.Queue[ModelProgress] = asyncio.Queue()

        async def call() -> bytes:
            texts: list[str] = []
            async with aclosing(self._hedged(request, deadline)) as progresses:
                async for progress in progresses:
                    texts.append(progress.text)
                    arriving.put_nowait(progress)
                    if progress.finish_reason is not None:
                        good = progress.problem is None and progress.model is None
                        reason = ("" if good else _REJECTED) + progress.finish_reason
                        return CachedAnswer(
                            "".join(texts),
                            reason,
                            progress.tool_calls,
                            progress.usage,
                            progress.model,
                            progress.cost,
                        ).encode()
            raise ModelUnavailableError("the answer has no end", model=request.model)

        answer = asyncio.ensure_future(
            cache.get_or_call(request_key(request.tenant, request), call, until=deadline)
        )
        try:
            own = False
            while not own or not answer.done() or not arriving.empty():
                arrived = asyncio.ensure_future(arriving.get())
                try:
                    await asyncio.wait({answer, arrived}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    arrived.cancel()
                if not arrived.done():
                    break
                own = True
                yield arrived.result()
            # What broke an own call off is raised here.
            body, others = await answer
            if not own:
                yield _again(request, CachedAnswer.decode(body), others=others)
        finally:
            answer.cancel()
            await asyncio.wait({answer})
            if not answer.cancelled():
                answer.exception()  # whoever has left does not mind it

    # One call, or two of which the first to speak goes on

    def _hedged(self, request: ModelRequest, deadline: float) -> AsyncGenerator[ModelProgress]:
        hedge = request.route.hedge if request.route else None
        after_s = self._settings.routing.hedge_after_s
        if hedge is None or after_s is None or request.continue_text:
            return self._attempt(request, deadline)
        return self._race(request, hedge, after_s, deadline)

    async def _race(
        self, request: ModelRequest, hedge: str, after_s: float, deadline: float
    ) -> AsyncGenerator[ModelProgress]:
        # What the one that loses has cost is told with the other one's end.
        beside = Bill()
        began_at = asyncio.get_running_loop().time()
        racing = replace(request, bill=beside)
        first = self._attempt(racing, deadline)
        begun = asyncio.ensure_future(anext(first))
        racers: _Racers = {begun: (first, request.model)}
        try:
            await asyncio.wait({begun}, timeout=after_s)
            if not begun.done():
                second = self._attempt(replace(racing, model=hedge, patient=False), deadline)
                racers[asyncio.ensure_future(anext(second))] = (second, hedge)
            winner = await _first_good(list(racers))
            if not begun.done():
                self._silent_since.setdefault(request.model, began_at)
            stream, model = racers.pop(winner)
            async with aclosing(stream):
                await _end(racers, beside)
                try:
                    yield _by(model, request, winner.result(), beside)
                    async for progress in stream:
                        yield _by(model, request, progress, beside)
                except ModelError as error:
                    error.fields["answering"] = model
                    if beside.cost:
                        error.fields["cost"] = error.fields.get("cost", 0.0) + beside.take()
                    raise
        finally:
            await _end(racers, beside)
            if request.bill is not None:
                request.bill.cost += beside.take()

    async def _attempt(
        self, request: ModelRequest, deadline: float
    ) -> AsyncGenerator[ModelProgress]:
        left_s = deadline - asyncio.get_running_loop().time()
        if self._router.wait_s(request.model):
            await self._admitted(request, deadline)
            left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise unavailable(request.model, "did not answer in time", out_of_time=True)
        request = replace(request, timeout_s=left_s)
        attempt = self._router.begin(request.model, request.route)
        texts: list[str] = []
        answer = cast("AsyncGenerator[ModelProgress]", self._models.stream(request))
        try:
            async with aclosing(answer):
                async for progress in answer:
                    if not texts:
                        self._silent_since.pop(request.model, None)
                    texts.append(progress.text)
                    if attempt.probe:
                        attempt.spoke()
                    if progress.finish_reason is None:
                        yield progress
                    else:
                        yield _ended(request, attempt, texts, progress)
        except ModelError as error:
            spent = attempt.lost(error, estimate([request.messages], sum(map(len, texts))))
            if spent:
                error.fields["cost"] = spent
            raise
        finally:
            if not attempt.settled:
                spent = self._given_up(attempt, request, texts)
                if request.bill is not None:
                    request.bill.cost += spent

    def _given_up(self, attempt: Attempt, request: ModelRequest, texts: list[str]) -> float:
        """Settle a call that its caller leaves: a fault of a model that says nothing at all, for
        as long as a first token may take, however often others overtake it before."""
        since = self._silent_since.get(request.model)
        longest_s = self._settings.first_token_timeout_s
        if texts or since is None or asyncio.get_running_loop().time() - since < longest_s:
            return attempt.cancelled(estimate([request.messages], sum(map(len, texts))))
        return attempt.lost(unavailable(request.model, f"has said nothing for {longest_s:g} s"))

    async def _admitted(self, request: ModelRequest, deadline: float) -> None:
        """Wait until the model's breaker lets a call through, if the request is patient.

        Raises:
            ModelUnavailableError: it is not, or that would take longer than a first token may.
        """
        loop = asyncio.get_running_loop()
        until = min(loop.time() + self._settings.first_token_timeout_s, deadline)
        while (wait_s := self._router.wait_s(request.model)) > 0:
            if not request.patient or loop.time() + wait_s > until:
                raise self._router.away(request.model, wait_s)
            # It may close before.
            await asyncio.sleep(min(wait_s, _LONGEST_PAUSE_S))


def _ended(
    request: ModelRequest, attempt: Attempt, texts: list[str], progress: ModelProgress
) -> ModelProgress:
    problem = _problem(request, "".join(texts), progress.finish_reason, progress.tool_calls)
    spent = attempt.answered(progress.usage, rejected=problem is not None)
    return replace(progress, cost=spent, problem=problem)


def _problem(
    request: ModelRequest, text: str, reason: str | None, calls: tuple[ToolCall, ...]
) -> str | None:
    """Return what the request's check finds; nothing in a text that is not whole."""
    if request.check is None or (reason in _CUT and not calls):
        return None
    return request.check(text, calls)


def _again(request: ModelRequest, answer: CachedAnswer, *, others: bool) -> ModelProgress:
    """Return an answer that did not come as it was given: an ``others``, or that of a call whose
    maker has left, which is then the caller's to account for."""
    reason = answer.finish_reason.removeprefix(_REJECTED)
    problem = _problem(request, answer.text, reason, answer.tool_calls)
    last = ModelProgress(
        answer.text, reason, answer.tool_calls, answer.usage, answer.model, problem=problem
    )
    if not others:
        return replace(last, cost=answer.cost)
    # It came from a cache, all of it, and cost nothing again.
    usage = replace(answer.usage, cached_tokens=answer.usage.input_tokens)
    return replace(last, usage=usage, cached=True)


def _by(model: str, request: ModelRequest, progress: ModelProgress, beside: Bill) -> ModelProgress:
    """Return progress, the last one with the model that it is of, where that is not the one asked
    for, and with what was spent ``beside``."""
    if progress.finish_reason is None:
        return progress
    other = None if model == request.model else model
    return replace(progress, model=other, cost=progress.cost + beside.take())


async def _first_good(tasks: list[asyncio.Future[ModelProgress]]) -> asyncio.Future[ModelProgress]:
    """Return the first call that brought something; if all failed, the one that began first."""
    left = set(tasks)
    while left:
        _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done() and task.exception() is None:
                return task
    return tasks[0]


async def _end(racers: _Racers, beside: Bill) -> None:
    """End the calls that lost the race: nobody has seen anything of them."""
    for task, (stream, _) in list(racers.items()):
        task.cancel()
        await asyncio.wait({task})
        await stream.aclose()
        del racers[task]
        if task.cancelled():
            continue
        # It ended just then, or had failed before.
        error = task.exception()
        if error is None:
            beside.cost += task.result().cost
        elif isinstance(error, ModelError):
            beside.cost += error.fields.get("cost", 0.0)
