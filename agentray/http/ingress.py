"""Stand in front of Ray Serve's HTTP wrapper, so that a request costs our application alone.

Serve builds each replica's HTTP server from its own application and the middlewares that
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` returns; the last one is the outermost. Ours hands
every request to the application that this process has mounted. Serve's own paths, below ``/-/``,
go on to Serve, and so does everything in a process without a mounted application.

Requests that do not reach Serve are not counted by it: its drain does not wait for them. The
HTTP server does, and whoever mounts minds the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

__all__ = ["Ingress", "middlewares", "mount", "replica_is_draining"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_DRAINING = b"DRAINING"

# One replica to a process, and Serve offers no other way from its HTTP server to the
# deployment's instance.
_mounted: AsgiApp | None = None
_inner: AsgiApp | None = None


def mount(app: AsgiApp) -> None:
    """Let ``app`` answer this process's requests from now on, in place of Serve's wrapper."""
    global _mounted
    _mounted = app


def middlewares() -> list[Middleware]:
    """Return what Serve puts around its application."""
    return [Middleware(Ingress)]


class Ingress:
    """The fork between the mounted application and Serve's own."""

    def __init__(self, app: AsgiApp) -> None:
        global _inner
        _inner = self._inner = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if _mounted is not None and not path.startswith("/-/"):
            await _mounted(scope, receive, send)
        elif path == "/-/healthz":
            await self._inner(scope, receive, _alive_while_draining(send))
        else:
            await self._inner(scope, receive, send)


def _alive_while_draining(send: Send) -> Send:
    """Return a ``send`` that lets a replica which is being stopped pass for healthy.

    It answers until its listener closes, and Serve takes it from HAProxy's list before. Were it
    down at once, HAProxy could be without any server while its successor is not listed yet.
    """
    start: Message = {}

    async def adjusted(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        if start:
            if _DRAINING in message.get("body", b""):
                start = {**start, "status": 200}
            await send(start)
            start = {}
        await send(message)

    return adjusted


async def replica_is_draining() -> bool:
    """Ask Serve's own health check, in this process, whether this replica is being stopped.

    False in a process that serves no HTTP (yet).
    """
    if _inner is None:
        return False
    draining = False

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal draining
        # 503 is also the answer of a replica that failed its health check; that one serves on.
        if message["type"] == "http.response.body":
            draining = draining or _DRAINING in message.get("body", b"")

    await _inner(
        {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/-/healthz",
            "raw_path": b"/-/healthz",
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "client": None,
            "server": None,
        },
        receive,
        send,
    )
    return draining
