"""Models that play what a test prepared for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from agentray.events import ToolCall, Usage
from agentray.models.base import ModelProgress, ModelRequest

__all__ = ["USAGE", "PlayedModels", "said", "whole"]

USAGE = Usage(1_000_000, 500_000)


def said(text: str) -> ModelProgress:
    return ModelProgress(text)


def whole(text: str = "", reason: str = "stop", *calls: ToolCall) -> ModelProgress:
    """Return the last of an answer, with ``USAGE``."""
    return ModelProgress(text, reason, calls, USAGE)


class PlayedModels:
    """Plays what is prepared for each model, call by call: progress is yielded, an event waited
    for, a function called, and an error raised."""

    def __init__(self, **scripts: list[list[Any]]) -> None:
        self.scripts = scripts
        self.requests: list[ModelRequest] = []
        self.closed: list[str] = []

    async def stream(self, request: ModelRequest) -> AsyncGenerator[ModelProgress]:
        self.requests.append(request)
        try:
            for item in self.scripts[request.model].pop(0):
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                elif isinstance(item, ModelProgress):
                    yield item
                else:
                    item()
        finally:
            self.closed.append(request.model)

    @property
    def called(self) -> list[str]:
        return [request.model for request in self.requests]
