"""Whose fault it is that a model did not answer in time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import aiohttp
import pytest

from agentray.clock import ManualClock
from agentray.config.settings import ModelsSettings
from agentray.errors import ModelUnavailableError
from agentray.models.base import ModelRequest
from agentray.models.catalog import Catalog
from agentray.models.client import ModelClient
from tests.unit.models.test_chat_answer import Response

HI: dict[str, Any] = {"messages": []}


class Endpoint:
    """A model's HTTP session in which every call ends as ``plays`` says, or never."""

    def __init__(self, plays: Response | Exception | None = None) -> None:
        self._plays = plays

    async def post(self, *_: Any, **__: Any) -> Response:
        if isinstance(self._plays, Exception):
            raise self._plays
        if self._plays is None:
            await asyncio.Event().wait()
        assert self._plays is not None
        return self._plays


def client_of(
    monkeypatch: pytest.MonkeyPatch,
    plays: Response | Exception | None = None,
    **settings: Any,
) -> ModelClient:
    configured = ModelsSettings.model_validate(
        {"endpoints": {"m": {"url": "http://h/v1"}}, "first_token_timeout_s": 0.04, **settings}
    )
    client = ModelClient(Catalog(configured, ""), configured, clock=ManualClock())
    monkeypatch.setattr(client, "_session", lambda: Endpoint(plays))
    return client


async def error_of(client: ModelClient, how: str, timeout_s: float | None) -> ModelUnavailableError:
    if how == "step":
        request = ModelRequest(model="m", messages=b"", timeout_s=timeout_s)
        call: Awaitable[Any] = anext(client.stream(request))
    else:
        body = {**HI, "stream": True} if how == "stream" else HI
        call = client.complete_raw("m", body, timeout_s=timeout_s)
    with pytest.raises(ModelUnavailableError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("how", ["step", "stream", "whole"])
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize(
    ("timeout_s", "hurried"), [(0.01, True), (0.05, False)], ids=["hurried", "long enough"]
)
async def test_a_model_that_does_not_answer_is_to_blame_if_it_had_the_time_to(
    monkeypatch: pytest.MonkeyPatch, how: str, with_head: bool, timeout_s: float, hurried: bool
) -> None:
    plays = Response() if with_head else None
    error = await error_of(client_of(monkeypatch, plays), how, timeout_s)
    assert "in time" in error.message
    assert error.fields.get("out_of_time", False) is hurried


@pytest.mark.parametrize("how", ["step", "stream", "whole"])
async def test_a_step_that_is_shorter_than_a_first_token_may_take_finds_a_model_out_too(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    client = client_of(monkeypatch, first_token_timeout_s=60.0, step_timeout_s=0.02)
    error = await error_of(client, how, 0.019)
    assert "out_of_time" not in error.fields


async def test_a_connection_that_does_not_come_about_is_nobody_elses_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = client_of(monkeypatch, aiohttp.ConnectionTimeoutError("no connection"))
    error = await error_of(client, "step", 0.01)
    assert "out_of_time" not in error.fields
