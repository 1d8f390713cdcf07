"""Embeddings take down what a call used, whatever its answer says of that."""

from __future__ import annotations

from typing import Any

import pytest

from agentray.clock import ManualClock
from agentray.config.settings import ModelsSettings
from agentray.models.catalog import Catalog
from agentray.models.embeddings import Embeddings
from agentray.models.router import Router
from agentray.telemetry.metrics import Metrics


class Client:
    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    async def embed_raw(self, model: str, body: Any, *, timeout_s: float) -> bytes:
        return self.answer


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (b'{"prompt_tokens": 3, "completion_tokens": 9}', 3),
        (b'{"prompt_tokens": 12.5}', 0),
        (b'{"prompt_tokens": -1, "prompt_tokens_details": {"cached_tokens": 7}}', 0),
        (b"[]", 0),
        (b'"1"', 0),
    ],
)
async def test_an_answer_ends_its_call_whatever_it_says_of_its_tokens(
    usage: bytes, counted: int
) -> None:
    card = {"kind": "embedding"}
    endpoints = {"e": {"url": "http://h/v1", "card": card}, "c": {"url": "http://h/v1"}}
    settings = ModelsSettings.model_validate({"endpoints": endpoints})
    metrics = Metrics()
    router = Router(Catalog(settings, ""), settings, clock=ManualClock(), metrics=metrics)
    client = Client(b'{"data": [], "usage": ' + usage + b"}")
    embeddings = Embeddings(router, client, settings)  # type: ignore[arg-type]
    assert await embeddings.embed_raw("e", {"input": "a"}) == client.answer
    assert [model.running for model in router._models.values()] == [0, 0]
    labels = {"model": "e", "direction": "input"}
    found = metrics.registry.get_sample_value("agentray_model_tokens_total", labels)
    assert found == counted
