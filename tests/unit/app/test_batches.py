"""How a host's batches reach its own door, and when they may."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from agentray.app.batches import is_idle, through_door
from agentray.config.settings import BatchSettings, SessionsSettings, Settings


@pytest.mark.parametrize(
    ("turns", "completions", "idle"), [(0, 0, True), (4, 4, True), (5, 0, False), (0, 5, False)]
)
def test_a_host_is_idle_below_its_share_of_both(turns: int, completions: int, idle: bool) -> None:
    settings = Settings(
        sessions=SessionsSettings(max_running_turns=10), batch=BatchSettings(idle_share=0.5)
    )
    assert is_idle(settings, turns=turns, completions=completions) is idle


async def test_a_line_is_a_request_at_the_door() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        seen.append((request.method, request.url.path, await request.json()))
        answer = JSONResponse({"a": 1}, status_code=429, headers={"retry-after": "7"})
        await answer(scope, receive, send)

    reply = await through_door(app, lambda: 0.0)("/v1/embeddings", b'{"input": "x"}')
    assert seen == [("POST", "/v1/embeddings", {"input": "x"})]
    assert (reply.status, json.loads(reply.body), reply.retry_after_s) == (429, {"a": 1}, 7.0)


async def test_a_door_that_breaks_is_a_failure_that_may_pass() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError

    reply = await through_door(app, lambda: 0.0)("/v1/embeddings", b"{}")
    assert reply.status == 500
