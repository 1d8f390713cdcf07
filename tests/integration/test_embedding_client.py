"""Embeddings over real sockets, from a server that the tests script."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from agentray.clock import SystemClock
from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError, ModelUnavailableError
from agentray.models.catalog import Catalog
from agentray.models.client import ModelClient
from agentray.models.embeddings import Embeddings
from agentray.models.router import Router
from agentray.telemetry.metrics import Metrics

GOOD = '{"data": [{"embedding": [1.0], "index": 0}],\n "usage": {"prompt_tokens": 3}}'


class Served:
    """What the server answered with, first to last (the last one again and again), and heard."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.answers = list(answers)
        self.heard: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.heard.append(await request.json())
        status, text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, text=text, content_type="application/json")


@asynccontextmanager
async def embedding(served: Served) -> AsyncIterator[tuple[Embeddings, Metrics]]:
    app = web.Application()
    app.router.add_post("/v1/embeddings", served.answer)
    server = web.AppRunner(app)
    await server.setup()
    site = web.TCPSite(server, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{server.addresses[0][1]}/v1"
    endpoint = {"url": url, "upstream": "org/there", "card": {"kind": "embedding"}}
    settings = ModelsSettings.model_validate({"endpoints": {"e": endpoint}, "attempts": 3})
    catalog, metrics = Catalog(settings, "http://127.0.0.1:1/models"), Metrics()
    client = ModelClient(catalog, settings)
    router = Router(catalog, settings, clock=SystemClock(), metrics=metrics)
    try:
        yield Embeddings(router, client, settings), metrics
    finally:
        await client.close()
        await server.cleanup()


async def test_an_answer_comes_back_as_it_is_and_its_tokens_are_counted() -> None:
    served = Served((200, GOOD))
    async with embedding(served) as (embeddings, metrics):
        body = {"input": ["a"], "model": "e", "unheard": {"of": 1}}
        assert await embeddings.embed_raw("e", body) == GOOD.encode()
        assert served.heard == [{**body, "model": "org/there"}]
        tokens = metrics.registry.get_sample_value(
            "agentray_model_tokens_total", {"model": "e", "direction": "input"}
        )
        assert tokens == 3


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (200, '{"data": []}', ModelUnavailableError),
        (200, '{"data": [{"index": 0}]}', ModelUnavailableError),
        (200, '{"choices": [1]}', ModelUnavailableError),
        (200, "<html>", ModelUnavailableError),
        (200, '{"error": {"message": "no", "code": 400}}', ModelError),
        (400, '{"error": {"message": "no"}}', ModelError),
        (500, '{"error": {"message": "no"}}', ModelUnavailableError),
    ],
)
async def test_what_is_no_list_of_embeddings_is_an_error(
    status: int, text: str, error: type[ModelError]
) -> None:
    served = Served((status, text))
    async with embedding(served) as (embeddings, _):
        with pytest.raises(ModelError) as raised:
            await embeddings.embed_raw("e", {"input": "a"})
    assert type(raised.value) is error
    assert len(served.heard) == (3 if raised.value.retryable else 1)


async def test_what_may_pass_is_tried_again() -> None:
    served = Served((503, "{}"), (500, "{}"), (200, GOOD))
    async with embedding(served) as (embeddings, _):
        assert await embeddings.embed_raw("e", {"input": "a"}) == GOOD.encode()
    assert len(served.heard) == 3


async def test_a_limit_keeps_the_next_call_away_until_it_has_passed() -> None:
    served = Served((429, "{}"), (200, GOOD))
    async with embedding(served) as (embeddings, _):
        assert await embeddings.embed_raw("e", {"input": "a"}) == GOOD.encode()
    assert len(served.heard) == 2
