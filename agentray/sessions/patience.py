"""Wait a few seconds for a model that nobody answers for: something in front of it restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from msgspec.structs import replace

from agentray.clock import Clock
from agentray.errors import ModelUnavailableError
from agentray.models.base import ModelCaller, ModelProgress, ModelRequest

__all__ = ["PatientModels"]

# Serve brings a HAProxy or a replica that was killed back in four to six seconds.
_PATIENCE_S = 8.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
_NOBODY_THERE = (502, 503, 504)


class PatientModels:
    """A ``ModelCaller`` that calls again while no connection comes about, or a proxy says that
    nobody is behind it, if the request is ``patient``.

    Nothing of an answer has come then, so nothing is repeated and nothing was paid for; it counts
    as one call. Every other error is for the caller to judge.
    """

    def __init__(self, models: ModelCaller, clock: Clock, *, patience_s: float = _PATIENCE_S):
        self._models = models
        self._clock = clock
        self._patience_s = patience_s

    async def stream(self, request: ModelRequest) -> AsyncGenerator[ModelProgress]:
        """Call and yield progress. Raises as ``ModelCaller.stream`` does."""
        clock = self._clock
        began_at = clock.monotonic()
        ends_at = None if request.timeout_s is None else began_at + request.timeout_s
        give_up_at = began_at + self._patience_s
        pause_s = _FIRST_PAUSE_S
        while True:
            answer = cast("AsyncGenerator[ModelProgress]", self._models.stream(request))
            begun = False
            try:
                async with aclosing(answer):
                    async for progress in answer:
                        begun = True
                        yield progress
                return
            except ModelUnavailableError as error:
                nobody = error.fields.get("status") in _NOBODY_THERE
                if begun or not request.patient or not (nobody or error.fields.get("unreached")):
                    raise
                resumes_at = clock.monotonic() + pause_s
                if resumes_at > give_up_at or (ends_at is not None and resumes_at >= ends_at):
                    raise
            await asyncio.sleep(pause_s)
            if ends_at is not None:
                # All the calls together have the time of one.
                request = replace(request, timeout_s=max(0.0, ends_at - clock.monotonic()))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
