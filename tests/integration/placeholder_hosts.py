"""A stand-in for the session hosts: it says which process answers, and nothing more."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from agentray.http.ingress import mount

busy = 0


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the process id, the path and how many slow requests run here."""
    global busy
    if scope["path"] == "/slow":
        busy += 1
        await asyncio.sleep(float(dict(scope["headers"])[b"x-seconds"]))
        busy -= 1
    body = json.dumps({"pid": os.getpid(), "path": scope["path"], "busy": busy}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Hosts:
    def __init__(self) -> None:
        mount(answer)


class BrokenHosts:
    def __init__(self) -> None:
        raise RuntimeError("the door is stuck")


def build(settings: Any) -> Any:
    return deployment(settings)(Hosts).bind()


def build_broken(settings: Any) -> Any:
    return deployment(settings)(BrokenHosts).bind()


def deployment(settings: Any) -> Any:
    from ray import serve

    return serve.deployment(
        name="hosts",
        num_replicas=settings.host_count(),
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.sessions.drain_s + 15,
        health_check_period_s=1,
        max_constructor_retry_count=1,
    )
