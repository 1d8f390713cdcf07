"""How a host's batches reach its own door, and when they may."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from agentray.app.batches import SpareCalls, is_idle, models_of, through_door
from agentray.config.settings import AgentSettings, BatchSettings, SessionsSettings, Settings
from agentray.models.batch import Reply


@pytest.mark.parametrize(
    ("turns", "completions", "idle"), [(0, 0, True), (4, 4, True), (5, 0, False), (0, 5, False)]
)
def test_a_host_is_idle_below_its_share_of_both(turns: int, completions: int, idle: bool) -> None:
    settings = Settings(
        sessions=SessionsSettings(max_running_turns=10), batch=BatchSettings(idle_share=0.5)
    )
    assert is_idle(settings, turns=turns, completions=completions) is idle


def test_a_host_that_may_run_thousands_is_not_idle_with_hundreds() -> None:
    assert not is_idle(Settings(), turns=999, completions=0)
    assert not is_idle(Settings(), turns=0, completions=999)
    assert is_idle(Settings(), turns=3, completions=3)


class Models:
    names = ("tiny", "embedder", "large")

    def kind(self, name: str) -> Any:
        return "embedding" if name == "embedder" else "chat"


@pytest.mark.parametrize(
    ("path", "body", "models"),
    [
        ("/v1/chat/completions", b'{"model": "tiny"}', ["tiny"]),
        ("/v1/chat/completions", b'{"model": "assistant"}', ["tiny", "large"]),
        ("/v1/chat/completions", b'{"model": "critic"}', ["large"]),
        ("/v1/chat/completions", b"{}", ["tiny", "large"]),
        ("/v1/embeddings", b"{}", ["embedder"]),
        ("/v1/embeddings", b'{"model": "embedder"}', ["embedder"]),
        ("/v1/embeddings", b'{"model": 7}', []),
        ("/v1/embeddings", b"{broken", []),
    ],
)
def test_the_models_that_may_answer_a_line_are_known(
    path: str, body: bytes, models: list[str]
) -> None:
    agents = {"assistant": AgentSettings(), "critic": AgentSettings(models=("large",))}
    assert list(models_of(Settings(agents=agents), Models(), path, body)) == models


async def test_a_line_is_asked_only_while_a_model_has_room() -> None:
    wait_s, seen = 7.0, list[int]()

    async def call(path: str, body: bytes) -> Reply:
        seen.append(calls.running)
        return Reply(200, b"{}")

    calls = SpareCalls(call, lambda path, body: wait_s)
    reply = await calls("/v1/embeddings", b"{}")
    assert (reply.status, reply.retry_after_s, seen) == (429, 7.0, [])
    wait_s = 0.0
    assert (await calls("/v1/embeddings", b"{}")).status == 200
    assert (seen, calls.running) == ([1], 0)


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
