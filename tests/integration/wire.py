"""Sessions over agentray's own routes, as the tests speak to them: plain HTTP, nothing hidden."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx

__all__ = ["CuttingProxy", "Event", "Session", "eventually", "read_sse", "texts_of"]

T = TypeVar("T")
_WAIT_S = 30.0


def eventually(condition: Callable[[], T], *, what: str, timeout_s: float = _WAIT_S) -> T:
    """Return what the condition returns when that is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Event:
    """A server-sent event."""

    id: str
    name: str
    data: dict[str, Any]


def read_sse(response: httpx.Response) -> Iterator[Event]:
    """Yield the events of a streamed answer as they come."""
    event_id = name = ""
    for line in response.iter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield Event(event_id, name, json.loads(line[6:]))


def texts_of(events: Iterable[Event]) -> list[str]:
    """Return the text of each call of a model, from its deltas; assert that they are it."""
    texts: list[str] = []
    streamed = ""
    for event in events:
        if event.name == "model.called":
            assert event.data.get("continued_from", 0) == len(streamed)
        elif event.name == "model.delta":
            streamed += event.data["text"]
            assert event.data["offset"] == len(streamed)
        elif event.name in ("model.finished", "model.failed", "model.voided"):
            assert event.data.get("text", "") == streamed
            if not event.data.get("continues"):
                texts.append(streamed)
                streamed = ""
    return texts


class Session:
    """A session that exists."""

    def __init__(self, http: httpx.Client, session_id: str) -> None:
        self.http = http
        self.id = session_id
        self.path = f"/v1/sessions/{session_id}"

    @classmethod
    def make(cls, http: httpx.Client, **fields: Any) -> Session:
        """Make one; its id is drawn here."""
        fields.setdefault("id", f"t-{uuid.uuid4().hex[:12]}")
        answer = http.post("/v1/sessions", json=fields)
        assert answer.status_code == 201, answer.text
        return cls(http, answer.json()["id"])

    def info(self) -> dict[str, Any]:
        answer = self.http.get(self.path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(
        self, input: Any, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        """Ask for a turn and return the answer, whatever it is."""
        body = {"input": input, **fields}
        return self.http.post(f"{self.path}/turns", json=body, headers=headers)

    def turn(self, input: Any, **fields: Any) -> dict[str, Any]:
        """Run a turn and return it."""
        answer = self.post(input, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def begin(self, input: Any, **fields: Any) -> str:
        """Have a turn accepted and return its id."""
        answer = self.post(input, background=True, **fields)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def found(self, turn_id: str) -> dict[str, Any]:
        answer = self.http.get(f"{self.path}/turns/{turn_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ended(self, turn_id: str) -> dict[str, Any]:
        """Return a turn when it is done."""
        for _ in self.follow(turn_id=turn_id):
            pass
        turn = self.found(turn_id)
        assert turn["state"] == "done", turn
        return turn

    def streaming(self, turn_id: str) -> None:
        """Return when a turn's first text came."""
        assert any(event.name == "model.delta" for event in self.follow(turn_id=turn_id))

    @contextmanager
    def stream(self, input: Any, **fields: Any) -> Iterator[Iterator[Event]]:
        """Run a turn and give its events as they come."""
        body = {"input": input, "stream": True, **fields}
        with self.http.stream("POST", f"{self.path}/turns", json=body) as response:
            if response.status_code != 200:
                raise AssertionError(response.read())
            assert response.headers["content-type"].startswith("text/event-stream")
            yield read_sse(response)

    def follow(self, **query: Any) -> Iterator[Event]:
        """Yield events, what was missed first and then live; of a turn to its end."""
        headers = {"Accept": "text/event-stream"}
        url = f"{self.path}/events"
        with self.http.stream("GET", url, params=query, headers=headers) as response:
            if response.status_code != 200:
                raise AssertionError(response.read())
            yield from read_sse(response)

    def page(self, **query: Any) -> dict[str, Any]:
        answer = self.http.get(f"{self.path}/events", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, **query: Any) -> list[dict[str, Any]]:
        """Return the journal."""
        found = self.page(limit=1_000, **query)
        assert not found["has_more"]
        return found["data"]

    def types(self, turn_id: str) -> list[str]:
        """Return the types of a turn's events."""
        return [event["type"] for event in self.events(turn_id=turn_id)]

    def cancel(self, turn_id: str | None = None) -> httpx.Response:
        body = {} if turn_id is None else {"turn_id": turn_id}
        return self.http.post(f"{self.path}/cancel", json=body)


class CuttingProxy:
    """Passes connections on; cuts the first ones when so many bytes of an answer went through.

    With 0 an answer is lost as it begins.
    """

    def __init__(self, port: int, *, cuts: Sequence[int]) -> None:
        self._port = port
        self._cuts = list(cuts)
        self.connections = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            cut = self._cuts[self.connections] if self.connections < len(self._cuts) else None
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(client, cut), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, cut: int | None) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as upstream:
            asking = threading.Thread(target=_pass_on, args=(client, upstream, None), daemon=True)
            asking.start()
            _pass_on(upstream, client, cut)
            asking.join()


def _pass_on(source: socket.socket, target: socket.socket, cut: int | None) -> None:
    passed = 0
    try:
        while chunk := source.recv(1 << 16):
            passed += len(chunk)
            if cut is not None and passed > cut:
                target.sendall(chunk[: len(chunk) - (passed - cut)])
                break
            target.sendall(chunk)
        # Both directions end, for both sides.
        target.shutdown(socket.SHUT_RDWR)
        source.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
