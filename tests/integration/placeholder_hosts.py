"""A stand-in for the session hosts: it says which process answers, and nothing more."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from agentray.http.ingress import mount


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the process id, the path and the headers."""
    headers = {key.decode(): value.decode() for key, value in scope["headers"]}
    body = json.dumps({"pid": os.getpid(), "path": scope["path"], "headers": headers}).encode()
    if scope["path"] == "/slow":
        await asyncio.sleep(float(headers["x-seconds"]))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def build(settings: Any) -> Any:
    from ray import serve

    class Hosts:
        def __init__(self) -> None:
            mount(answer)

    deployment = serve.deployment(
        name="hosts",
        num_replicas=settings.host_count(),
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.sessions.drain_s,
        health_check_period_s=1,
    )
    return deployment(Hosts).bind()
