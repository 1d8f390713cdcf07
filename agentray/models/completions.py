"""Answer stateless chat completions: routed like a session's steps, bytes in and bytes out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from agentray.config.settings import ModelsSettings
from agentray.errors import InvalidRequestError, ModelContextLengthError, ModelError
from agentray.events import Route, Usage
from agentray.models.cache import ResponseCache, UnkeptAnswer, completion_key, may_cache
from agentray.models.client import ModelClient, RawStream
from agentray.models.continuation import Continuation
from agentray.models.policies import Step, difficulty, step_kind
from agentray.models.router import Attempt, Choice, Router, may_succeed_elsewhere
from agentray.models.usage import BYTES_PER_TOKEN, has_image, prompt_bytes, usage_of

__all__ = ["Completion", "Completions", "CompletionStream"]


class _Message(msgspec.Struct):
    role: str = ""


class _Facts(msgspec.Struct):
    """What the router has to know of a body; everything else goes through as it came."""

    messages: list[msgspec.Raw] = []
    stream: bool | None = None
    temperature: float | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[msgspec.Raw] | None = None
    response_format: msgspec.Raw = msgspec.Raw()


_encode = msgspec.json.encode
_raw_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_facts = msgspec.json.Decoder(_Facts)
_message = msgspec.json.Decoder(_Message)


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer and where it is from: the JSON of a whole one, or the stream of a streamed one,
    which its reader must ``aclose``. ``cached`` says that an equal call was answered before."""

    body: bytes | CompletionStream
    model: str
    route: Route
    cached: bool = False


class CompletionStream:
    """The bytes of a streamed answer as they come, whole lines at a time.

    One that breaks off goes on where its model can; else what its call raises is raised while
    iterating.
    """

    def __init__(
        self,
        stream: RawStream,
        attempt: Attempt,
        prompt_tokens: int,
        continuation: Continuation,
    ) -> None:
        self._stream = stream
        self._attempt = attempt
        self._prompt_tokens = prompt_tokens
        self._continuation = continuation

    def __aiter__(self) -> CompletionStream:
        return self

    async def __anext__(self) -> bytes:
        try:
            return self._continuation.passed(await anext(self._stream))
        except StopAsyncIteration:
            self._attempt.answered(self._usage())
            raise
        except ModelError as error:
            self._attempt.lost(error, self._usage())
            following = await self._continuation.after(self._stream, error)
            if following is None:
                raise
            self._stream, self._attempt, told = following
            return told

    async def aclose(self) -> None:
        """End the call if it has not ended; harmless to repeat."""
        self._attempt.cancelled(self._usage())
        await self._stream.aclose()

    def _usage(self) -> Usage:
        # Few callers ask for the usage of a stream: then its chunks are counted.
        told = self._stream.usage
        prompt_tokens = self._prompt_tokens + self._continuation.tokens
        counted = Usage(prompt_tokens, self._stream.chunks)
        return told if told.input_tokens or told.output_tokens else counted


class _AnsweredElsewhere(UnkeptAnswer):
    """Another model than the one of the cache's key answered."""

    def __init__(self, completion: Completion) -> None:
        super().__init__(completion.model)
        self.completion = completion


class Completions:
    """Answers chat completions; one per process."""

    def __init__(
        self,
        router: Router,
        client: ModelClient,
        settings: ModelsSettings,
        cache: ResponseCache | None = None,
    ) -> None:
        self._router = router
        self._client = client
        self._settings = settings
        self._cache = cache

    async def complete(
        self,
        model: str | None,
        body: bytes | Mapping[str, Any],
        *,
        tenant: str = "default",
        session_id: str | None = None,
        preferred: str | None = None,
        allowed: Sequence[str] = (),
        cache: bool | None = None,
    ) -> Completion:
        """Answer a body for ``/v1/chat/completions``.

        ``model`` is the only one that may answer; without one the router picks among those
        ``allowed`` (all if none), ``preferred`` first. What fails before its first token is tried
        again, elsewhere if there is one to go to, within the time and the attempts of one step. A
        stream that breaks off behind it goes on where its model can continue a text.

        Raises:
            InvalidRequestError: ``body`` is no JSON object of this kind.
            ModelError: as ``ModelCaller.stream``; the last one, if several were tried.
        """
        fields = body if isinstance(body, Mapping) else _decoded(body)
        facts = _facts_of(fields)
        step = _step(facts, fields, model, preferred or self._router.catalog.default, allowed)
        step = replace(step, budget=self._settings.routing.step_cost_cap)
        deadline = asyncio.get_running_loop().time() + self._settings.step_timeout_s
        if self._cache is not None and self._may_cache(facts, cache):
            cached = self._cache
            return await self._through_cache(cached, step, fields, tenant, session_id, deadline)
        return await self._tried(step, fields, session_id, deadline)

    def _may_cache(self, facts: _Facts, cache: bool | None) -> bool:
        # A stream is passed through as it comes: there is nothing whole to keep.
        return not facts.stream and may_cache(
            self._settings.cache,
            temperature=facts.temperature,
            opted=cache,
            offers_tools=bool(facts.tools),
            n=facts.n,
        )

    async def _through_cache(
        self,
        cache: ResponseCache,
        step: Step,
        fields: Mapping[str, Any],
        tenant: str,
        session_id: str | None,
        deadline: float,
    ) -> Completion:
        # The model that would answer now is a part of the question.
        first = self._router.choose(step)
        answered: list[Completion] = []

        async def call() -> bytes:
            completion = await self._tried(step, fields, session_id, deadline, first)
            if completion.model != first.model:
                # For all that wait here, and kept under no other model's name.
                raise _AnsweredElsewhere(completion)
            assert isinstance(completion.body, bytes)
            answered.append(completion)
            return completion.body

        key = completion_key(tenant, first.model, fields)
        try:
            body, cached = await cache.get_or_call(key, call, until=deadline)
        except _AnsweredElsewhere as elsewhere:
            return elsewhere.completion
        if answered and not cached:
            return answered[0]
        return Completion(body, first.model, first.route, cached=cached)

    async def _tried(
        self,
        step: Step,
        fields: Mapping[str, Any],
        session_id: str | None,
        deadline: float,
        first: Choice | None = None,
    ) -> Completion:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            choice, first = first or self._router.choose(step), None
            wait_s = self._router.wait_s(choice.model)
            if wait_s:
                raise self._router.away(choice.model, wait_s)
            attempt = self._router.begin(choice.model, choice.route)
            try:
                return await self._called(
                    step, choice, attempt, fields, session_id, deadline, failures
                )
            except ModelError as error:
                step = _after(step, choice.model, error, attempt.lost(error))
                elsewhere = self._router.has_other(choice.route, choice.model, step.lost)
                may_pass = self._may_pass(step, choice, error, elsewhere=elsewhere)
                wait_s = 0.0 if elsewhere else self._backoff_s(failures, choice.model, error)
                failures += 1
                late = loop.time() + wait_s >= deadline
                if not may_pass or late or failures >= self._settings.attempts:
                    raise
                await asyncio.sleep(wait_s)
            except BaseException:
                attempt.cancelled()
                raise

    async def _called(
        self,
        step: Step,
        choice: Choice,
        attempt: Attempt,
        fields: Mapping[str, Any],
        session_id: str | None,
        deadline: float,
        failures: int,
    ) -> Completion:
        """Make one call; what it raises is for the caller to settle, as is being cancelled."""
        left_s = deadline - asyncio.get_running_loop().time()
        answer = await self._client.complete_raw(
            choice.model, fields, session_id=session_id, timeout_s=left_s
        )
        if isinstance(answer, bytes):
            attempt.answered(usage_of(answer))
            return Completion(answer, choice.model, choice.route)
        attempt.spoke()
        continuation = Continuation(
            self._router,
            self._client,
            self._settings,
            model=choice.model,
            route=choice.route,
            fields=fields,
            session_id=session_id,
            deadline=deadline,
            failures=failures,
        )
        stream = CompletionStream(answer, attempt, step.prompt_tokens, continuation)
        return Completion(stream, choice.model, choice.route)

    def _backoff_s(self, failures: int, model: str, error: ModelError) -> float:
        # Behind a limit whose end was not named, or an open breaker, an earlier call is refused.
        return max(self._router.backoff_s(failures, error), self._router.wait_s(model))

    def _may_pass(self, step: Step, choice: Choice, error: ModelError, *, elsewhere: bool) -> bool:
        if isinstance(error, ModelContextLengthError):
            # Nothing can be left out here: once, and only to a longer window.
            once = step.overflowed == choice.model
            return elsewhere and once and self._router.choose(step).model != choice.model
        return error.retryable or (elsewhere and may_succeed_elsewhere(error))


def _decoded(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _raw_object.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError("the body is no JSON object", param="body") from error


def _facts_of(fields: Mapping[str, Any]) -> _Facts:
    known = {name: fields[name] for name in _Facts.__struct_fields__ if name in fields}
    try:
        return _facts.decode(_encode(known))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is no chat completion: {error}") from error


def _step(
    facts: _Facts,
    fields: Mapping[str, Any],
    forced: str | None,
    preferred: str | None,
    allowed: Sequence[str],
) -> Step:
    messages = [bytes(message) for message in facts.messages]
    last = messages[-1] if messages else b""
    try:
        after_tools = _message.decode(last).role == "tool"
    except (msgspec.DecodeError, UnicodeDecodeError):
        after_tools = False
    tools = len(facts.tools or ())
    schema = b'"json_schema"' in bytes(facts.response_format)
    kind = step_kind(last, step=2 if after_tools else 1, tools=bool(tools), output_schema=schema)
    return Step(
        kind=kind,
        difficulty=difficulty(kind, last, tools=tools, turns=len(messages) // 2),
        prompt_tokens=prompt_bytes(messages) // BYTES_PER_TOKEN,
        output_tokens=facts.max_completion_tokens or facts.max_tokens,
        images=any(map(has_image, messages)),
        tools=bool(tools),
        output_schema=schema,
        forced=forced,
        preferred=preferred,
        allowed=tuple(allowed) if forced is None else (),
    )


def _after(step: Step, model: str, error: ModelError, spent: float) -> Step:
    """Return what is known of a step behind a call that a model lost; ``spent`` in US dollars."""
    if step.budget is not None:
        step = replace(step, budget=max(0.0, step.budget - spent))
    if isinstance(error, ModelContextLengthError) and step.overflowed is None:
        return replace(step, overflowed=model)
    return replace(step, lost=(*step.lost, model))
