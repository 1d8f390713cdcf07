"""What ``/readyz`` says of models."""

from __future__ import annotations

import httpx

from agentray.clock import ManualClock
from agentray.config.settings import Settings
from agentray.http.app import build_http_app
from agentray.models.base import ModelHealth
from tests.unit.http.conftest import Models
from tests.unit.http.memory import MemorySessions
from tests.unit.http.memory_batches import MemoryBatches


async def test_a_model_that_does_not_load_is_told_and_leaves_the_host_ready(
    sessions: MemorySessions, models: Models, batches: MemoryBatches, clock: ManualClock
) -> None:
    health = {
        "tiny": ModelHealth(True),
        "broken": ModelHealth(False, "it does not load: OSError: no such folder"),
    }
    app = build_http_app(
        sessions=sessions,
        models=models,
        embeddings=models,
        files=batches,
        batches=batches,
        catalog=models,
        settings=Settings(),
        metrics=lambda: b"",
        model_health=lambda: health,
        clock=clock,
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://door"
    ) as http:
        answer = await http.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["ready"] is True
    assert answer.json()["models"] == {
        "tiny": {"healthy": True},
        "broken": {"healthy": False, "reason": "it does not load: OSError: no such folder"},
    }
