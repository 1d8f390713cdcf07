"""A wire that breaks: it hands connections on, and cuts the answers of some."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

__all__ = ["unreliable"]

Limit = Callable[[int], int | None]

_TICK_S = 0.1


class _Wire(socketserver.ThreadingTCPServer):
    def __init__(self, target: tuple[str, int], limit: Limit) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.target = target
        self.limit = limit
        self.numbers = itertools.count()
        self.closing = threading.Event()


class _Connection(socketserver.BaseRequestHandler):
    server: Any

    def handle(self) -> None:
        left: int | None = self.server.limit(next(self.server.numbers))
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(self.server.target) as there,
        ):
            while not self.server.closing.is_set():
                ready, _, _ = select.select([self.request, there], [], [], _TICK_S)
                if self.request in ready:
                    if not (asked := self.request.recv(65536)):
                        return
                    there.sendall(asked)
                if there in ready:
                    if not (said := there.recv(65536)):
                        return
                    self.request.sendall(said if left is None else said[:left])
                    if left is not None and (left := left - len(said)) <= 0:
                        return


@contextlib.contextmanager
def unreliable(url: str, limit: Limit) -> Iterator[str]:
    """Yield an address that leads to ``url``.

    The answer on connection number ``n`` is cut behind ``limit(n)`` bytes, if that is a number.
    """
    target = urlsplit(url)
    assert target.hostname is not None
    assert target.port is not None
    with _Wire((target.hostname, target.port), limit) as wire:
        thread = threading.Thread(target=wire.serve_forever, args=(_TICK_S,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{wire.server_address[1]}"
        finally:
            wire.closing.set()
            wire.shutdown()
            thread.join()
