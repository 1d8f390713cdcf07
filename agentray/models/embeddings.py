"""Turn texts into vectors: one model, with the breaker and the bookkeeping of all others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError
from agentray.events import Usage
from agentray.models.client import ModelClient
from agentray.models.router import Router
from agentray.models.usage import usage_of

__all__ = ["Embeddings"]


class Embeddings:
    """Answers embeddings; one per process.

    There is no other model to go to: vectors of two models have nothing to do with each other.
    """

    def __init__(self, router: Router, client: ModelClient, settings: ModelsSettings) -> None:
        self._router = router
        self._client = client
        self._settings = settings

    async def embed_raw(self, model: str, body: Mapping[str, Any]) -> bytes:
        """Answer a body for ``/v1/embeddings``; only the model's name in it is replaced.

        What may pass is tried again, within the time and the attempts of one step.

        Raises:
            ModelNotFoundError: there is no such model.
            ModelError: as ``ModelCaller.stream``.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.step_timeout_s
        failures = 0
        while True:
            try:
                return await self._once(model, body, deadline - loop.time())
            except ModelError as error:
                pause_s = self._router.backoff_s(failures, error)
                failures += 1
                late = loop.time() + pause_s >= deadline
                if not error.retryable or late or failures >= self._settings.attempts:
                    raise
                await asyncio.sleep(pause_s)

    async def _once(self, model: str, body: Mapping[str, Any], timeout_s: float) -> bytes:
        wait_s = self._router.wait_s(model)
        if wait_s:
            raise self._router.away(model, wait_s)
        attempt = self._router.begin(model, None)
        try:
            answer = await self._client.embed_raw(model, body, timeout_s=timeout_s)
            usage = usage_of(answer)
        except ModelError as error:
            attempt.lost(error)
            raise
        except BaseException:
            attempt.cancelled()
            raise
        attempt.answered(Usage(usage.input_tokens, 0, usage.cached_tokens))
        return answer
