"""The fork in front of Serve's own application."""

from __future__ import annotations

from typing import Any

import pytest

from agentray.http import ingress


class App:
    """Answers everything with its name and a status."""

    def __init__(self, name: str, status: int = 200) -> None:
        self.name = name
        self.status = status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.name.encode()})


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "_mounted", None)
    monkeypatch.setattr(ingress, "_inner", None)


def behind_serve(inner: App) -> Any:
    (middleware,) = ingress.middlewares()
    return middleware.cls(inner, *middleware.args, **middleware.kwargs)


async def get(app: Any, path: str) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    await app({"type": "http", "path": path, "headers": []}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


async def test_the_mounted_application_gets_everything_but_serves_own_paths() -> None:
    app = behind_serve(App("serve"))
    assert await get(app, "/v1/models") == (200, b"serve")
    ingress.mount(App("ours", 201))
    assert await get(app, "/v1/models") == (201, b"ours")
    assert await get(app, "/-/routes") == (200, b"serve")
    assert await get(app, "/-/healthz") == (200, b"serve")


async def test_a_replica_that_is_being_stopped_knows_it_and_passes_for_healthy() -> None:
    inner = App("success")
    app = behind_serve(inner)
    assert not await ingress.replica_is_draining()
    inner.name, inner.status = "UNHEALTHY", 503
    assert not await ingress.replica_is_draining()
    assert await get(app, "/-/healthz") == (503, b"UNHEALTHY")
    inner.name = "DRAINING"
    assert await ingress.replica_is_draining()
    assert await get(app, "/-/healthz") == (200, b"DRAINING")


async def test_a_process_without_replica_is_not_draining() -> None:
    assert not await ingress.replica_is_draining()
