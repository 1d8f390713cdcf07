"""Make a model call with all that belongs around it: breaker, cache, hedge, checks and cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from msgspec.structs import replace

from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError, ModelUnavailableError
from agentray.events import Usage
from agentray.models.base import ModelCaller, ModelProgress, ModelRequest
from agentray.models.cache import CachedAnswer, ResponseCache, may_cache, request_key
from agentray.models.router import Attempt, Router

__all__ = ["ModelCalls"]

_BYTES_PER_TOKEN = 4
_LONGEST_PAUSE_S = 1.0
# In front of the reason why an answer ended that failed its checks, or is another model's: it is
# shared by those who wait, and not kept.
_REJECTED = "rejected:"


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

    def stream(self, request: ModelRequest) -> AsyncGenerator[ModelProgress]:
        """Call and yield progress until the answer is whole. See ``ModelCaller.stream``."""
        if self._cache is None or request.continue_text or not self._may_cache(request):
            return self._hedged(request)
        return self._through_cache(self._cache, request)

    # The cache

    def _may_cache(self, request: ModelRequest) -> bool:
        return may_cache(
            self._settings.cache,
            temperature=request.temperature,
            opted=request.cache,
            offers_tools=request.tools is not None,
        )

    async def _through_cache(
        self, cache: ResponseCache, request: ModelRequest
    ) -> AsyncGenerator[ModelProgress]:
        """Answer from the cache; else call, let the text through as it comes, and keep it."""
        arriving: asyncio.Queue[ModelProgress] = asyncio.Queue()

        async def call() -> bytes:
            texts: list[str] = []
            async with aclosing(self._hedged(request)) as progresses:
                async for progress in progresses:
                    texts.append(progress.text)
                    arriving.put_nowait(progress)
                    if progress.finish_reason is not None:
                        good = progress.problem is None and progress.model is None
                        reason = ("" if good else _REJECTED) + progress.finish_reason
                        return CachedAnswer(
                            "".join(texts), reason, progress.tool_calls, progress.usage
                        ).encode()
            raise ModelUnavailableError("the answer has no end", model=request.model)

        answer = asyncio.ensure_future(
            cache.get_or_call(request_key(request.tenant, request), call)
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
            body, _ = await answer
            if not own:
                yield _again(request, CachedAnswer.decode(body))
        finally:
            answer.cancel()
            await asyncio.wait({answer})
            if not answer.cancelled():
                answer.exception()  # whoever has left does not mind it

    # One call, or two of which the first to speak goes on

    def _hedged(self, request: ModelRequest) -> AsyncGenerator[ModelProgress]:
        hedge = request.route.hedge if request.route else None
        after_s = self._settings.routing.hedge_after_s
        if hedge is None or after_s is None or request.continue_text:
            return self._attempt(request)
        return self._race(request, hedge, after_s)

    async def _race(
        self, request: ModelRequest, hedge: str, after_s: float
    ) -> AsyncGenerator[ModelProgress]:
        first = self._attempt(request)
        begun = asyncio.ensure_future(anext(first))
        racers: _Racers = {begun: (first, request.model)}
        try:
            await asyncio.wait({begun}, timeout=after_s)
            if not begun.done():
                second = self._attempt(replace(request, model=hedge, patient=False))
                racers[asyncio.ensure_future(anext(second))] = (second, hedge)
            winner = await _first_good(set(racers))
            stream, model = racers.pop(winner)
            async with aclosing(stream):
                await _end(racers)
                yield _by(model, request, winner.result())
                try:
                    async for progress in stream:
                        yield _by(model, request, progress)
                except ModelError as error:
                    error.fields["answering"] = model
                    raise
        finally:
            await _end(racers)

    async def _attempt(self, request: ModelRequest) -> AsyncGenerator[ModelProgress]:
        await self._admitted(request)
        attempt = self._router.begin(request.model, request.route)
        texts: list[str] = []
        answer = cast("AsyncGenerator[ModelProgress]", self._models.stream(request))
        try:
            async with aclosing(answer):
                async for progress in answer:
                    texts.append(progress.text)
                    if progress.finish_reason is None:
                        yield progress
                    else:
                        yield _ended(request, attempt, texts, progress)
        except ModelError as error:
            spent = attempt.lost(error, _estimate(request, texts))
            if spent:
                error.fields["cost"] = spent
            raise
        finally:
            # The caller gave up, unless the call has ended.
            attempt.cancelled(_estimate(request, texts))

    async def _admitted(self, request: ModelRequest) -> None:
        """Wait until the model's breaker lets a call through, if the request is patient.

        Raises:
            ModelUnavailableError: it is not, or that would take longer than a first token may.
        """
        waits_s = self._settings.first_token_timeout_s
        if request.timeout_s is not None:
            waits_s = min(waits_s, request.timeout_s)
        loop = asyncio.get_running_loop()
        until = loop.time() + waits_s
        while (wait_s := self._router.wait_s(request.model)) > 0:
            if not request.patient or loop.time() + wait_s > until:
                raise self._router.away(request.model, wait_s)
            # It may close before.
            await asyncio.sleep(min(wait_s, _LONGEST_PAUSE_S))


def _ended(
    request: ModelRequest, attempt: Attempt, texts: list[str], progress: ModelProgress
) -> ModelProgress:
    problem = request.check("".join(texts), progress.tool_calls) if request.check else None
    spent = attempt.answered(progress.usage, rejected=problem is not None)
    return replace(progress, cost=spent, problem=problem)


def _again(request: ModelRequest, answer: CachedAnswer) -> ModelProgress:
    reason = answer.finish_reason.removeprefix(_REJECTED)
    problem = request.check(answer.text, answer.tool_calls) if request.check else None
    # It came from a cache, all of it, and cost nothing again.
    usage = replace(answer.usage, cached_tokens=answer.usage.input_tokens)
    return ModelProgress(
        answer.text, reason, answer.tool_calls, usage, cached=True, problem=problem
    )


def _by(model: str, request: ModelRequest, progress: ModelProgress) -> ModelProgress:
    """Return progress with the model that it is of, where that is not the one asked for."""
    if progress.finish_reason is None or model == request.model:
        return progress
    return replace(progress, model=model)


def _estimate(request: ModelRequest, texts: list[str]) -> Usage:
    """Return what a call that did not end has used: nothing is known if it said nothing."""
    if not texts:
        return Usage()
    said = sum(map(len, texts))
    return Usage(len(request.messages) // _BYTES_PER_TOKEN, -(-said // _BYTES_PER_TOKEN))


async def _first_good(tasks: set[asyncio.Future[ModelProgress]]) -> asyncio.Future[ModelProgress]:
    """Return the first call that brought something; if all failed, the last of them."""
    left = tasks
    done: asyncio.Future[ModelProgress] | None = None
    while left:
        finished, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for done in finished:
            if done.exception() is None:
                return done
    assert done is not None
    return done


async def _end(racers: _Racers) -> None:
    """End the calls that lost the race: they have said nothing."""
    for task, (stream, _) in racers.items():
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        await stream.aclose()
    racers.clear()
