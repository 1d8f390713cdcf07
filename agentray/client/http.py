"""Talk to agentray over HTTP, from anywhere; see ``http_async`` for the same with ``await``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from agentray.client.http_protocol import (
    DEFAULT_URL,
    STREAM_SILENCE_S,
    Attempts,
    Cancelled,
    EventPage,
    Following,
    Input,
    Request,
    SessionFile,
    SessionFiles,
    SessionPage,
    Status,
    TurnFacts,
    cancel_request,
    create_request,
    creation,
    decode,
    delete_request,
    ended_early,
    error_of,
    events_request,
    file_request,
    files_request,
    list_request,
    session_path,
    turn_request,
)
from agentray.errors import AgentRayError, SessionNotFoundError
from agentray.events import AnyEvent, TurnOptions
from agentray.sessions.base import (
    Cursor,
    Delta,
    IfBusy,
    Placement,
    SessionInfo,
    StreamItem,
    TurnInfo,
    item_cursor,
)

__all__ = ["Client", "Session", "SessionPage", "Sessions", "TurnStream"]

T = TypeVar("T")


class Client:
    """A connection to agentray; one for a program, closed at its end.

    What breaks on the way is tried again, up to ``retries`` times in a row, where that is
    harmless: a turn carries an idempotency key and runs once. All methods raise the errors of
    ``agentray.errors``; ``NotReadyError`` where nothing answers.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = 600.0,
        retries: int = 5,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            transport=transport,
        )
        self.sessions = Sessions(self)

    def session(
        self,
        session_id: str | None = None,
        *,
        agent: str | None = None,
        user: str | None = None,
        placement: Placement = "shared",
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Session:
        """Return a handle; the session is made when it is first used and there is none.

        An existing session keeps its agent, placement and all else.
        """
        facts = creation(session_id, agent, user, placement, ttl_s, metadata)
        return Session(self, facts["id"], facts)

    def call(self, request: Request, kind: type[T]) -> T:
        """Send a request and return its answer."""
        attempts = Attempts(self._retries, repeatable=request.repeatable)
        while True:
            try:
                return decode(self._http.send(self._built(request)), kind)
            except (httpx.TransportError, AgentRayError) as error:
                pause_s = attempts.pause_s(error)
            time.sleep(pause_s)

    def follow(self, following: Following) -> Generator[StreamItem]:
        """Yield the items of a stream; one that breaks is taken up where it was."""
        attempts = Attempts(self._retries, repeatable=True)
        while True:
            try:
                with closing(self._batches(following)) as batches:
                    for items in batches:
                        if items:
                            attempts.progressed()
                        for item in items:
                            following.cursor = item_cursor(item, following.cursor)
                            yield item
                        if following.finished is not None:
                            return
                raise ended_early()
            except (httpx.TransportError, AgentRayError) as error:
                pause_s = attempts.pause_s(error)
            time.sleep(pause_s)

    def _batches(self, following: Following) -> Generator[list[StreamItem]]:
        response = self._http.send(self._built(following.request(), streamed=True), stream=True)
        try:
            if response.status_code >= 400:
                raise error_of(response.status_code, response.read(), response.headers)
            following.opened(response.headers)
            for chunk in response.iter_bytes():
                yield following.feed(chunk)
        finally:
            response.close()

    def _built(self, request: Request, *, streamed: bool = False) -> httpx.Request:
        built = self._http.build_request(
            request.method,
            request.path,
            content=request.content,
            params=request.query,
            headers={"content-type": "application/json", **request.headers},
        )
        if streamed:
            built.extensions["timeout"]["read"] = STREAM_SILENCE_S
        return built

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Sessions:
    """All sessions."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        session_id: str | None = None,
        *,
        agent: str | None = None,
        user: str | None = None,
        placement: Placement = "shared",
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SessionInfo:
        """Make a session, or return the one that has this id."""
        facts = creation(session_id, agent, user, placement, ttl_s, metadata)
        return self._client.call(create_request(facts), SessionInfo)

    def get(self, session_id: str) -> SessionInfo:
        """Return a session. Raises ``SessionNotFoundError``."""
        return self._client.call(Request("GET", session_path(session_id)), SessionInfo)

    def list(
        self,
        *,
        user: str | None = None,
        agent: str | None = None,
        status: Status | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> SessionPage:
        """Return a page of sessions, newest first."""
        request = list_request(user=user, agent=agent, status=status, after=after, limit=limit)
        return self._client.call(request, SessionPage)

    def delete(self, session_id: str) -> None:
        """Delete a session and everything of it. Raises ``SessionNotFoundError``."""
        self._client.call(delete_request(session_id), dict)


class Session:
    """A session, wherever it lives. Made by ``Client.session``."""

    def __init__(self, client: Client, session_id: str, facts: dict[str, Any]) -> None:
        self._client = client
        self._facts = facts
        self.id = session_id

    def send(
        self,
        input: Input,
        *,
        if_busy: IfBusy = "enqueue",
        idempotency_key: str | None = None,
        options: TurnOptions = TurnOptions(),
    ) -> TurnInfo:
        """Run a turn and return it when it is done: its ``text``, ``usage``, ``status``."""
        key = idempotency_key or uuid.uuid4().hex
        return self._turn(turn_request(self.id, input, key=key, if_busy=if_busy, options=options))

    def submit(
        self,
        input: Input,
        *,
        if_busy: IfBusy = "enqueue",
        idempotency_key: str | None = None,
        options: TurnOptions = TurnOptions(),
    ) -> TurnInfo:
        """Have a turn accepted and return it as it is then; it runs, whoever waits."""
        key = idempotency_key or uuid.uuid4().hex
        request = turn_request(
            self.id, input, key=key, if_busy=if_busy, options=options, background=True
        )
        return self._turn(request)

    def _turn(self, request: Request) -> TurnInfo:
        try:
            return self._client.call(request, TurnInfo)
        except SessionNotFoundError:
            self._client.call(create_request(self._facts), SessionInfo)
            return self._client.call(request, TurnInfo)

    def stream(
        self,
        input: Input,
        *,
        if_busy: IfBusy = "enqueue",
        idempotency_key: str | None = None,
        options: TurnOptions = TurnOptions(),
    ) -> TurnStream:
        """Run a turn and return what happens in it, as it happens."""
        key = idempotency_key or uuid.uuid4().hex
        request = turn_request(
            self.id, input, key=key, if_busy=if_busy, options=options, stream=True
        )
        following = Following(self.id, first=request)
        return TurnStream(following, self._streamed(following))

    def _streamed(self, following: Following) -> Generator[StreamItem]:
        try:
            yield from self._client.follow(following)
        except SessionNotFoundError:
            if following.turn_id is not None:
                raise
            self._client.call(create_request(self._facts), SessionInfo)
            yield from self._client.follow(following)

    def turn(self, turn_id: str) -> TurnInfo:
        """Return a turn. Raises ``SessionNotFoundError`` or ``TurnNotFoundError``."""
        return self._client.call(Request("GET", session_path(self.id, "turns", turn_id)), TurnInfo)

    def events(self, *, after: int = 0) -> Iterator[AnyEvent]:
        """Yield the events of the journal behind ``seq`` ``after`` that are there now."""
        more = True
        while more:
            page = self._client.call(events_request(self.id, after), EventPage)
            yield from page.data
            more = page.has_more and bool(page.data)
            after = page.data[-1].seq if page.data else after

    def follow(self, *, after: Cursor = Cursor(0)) -> Generator[StreamItem]:
        """Yield what happened behind the cursor and what happens from now on, endlessly."""
        return self._client.follow(Following(self.id, cursor=after))

    def files(self) -> list[SessionFile]:
        """Return the files that the session's tools left. Raises ``SessionNotFoundError``."""
        return self._client.call(files_request(self.id), SessionFiles).data

    def read_file(self, path: str) -> bytes:
        """Return what is in a file that the session's tools left.

        Raises:
            AgentRayError: there is no such session, or no such file in it.
        """
        return self._client.call(file_request(self.id, path), bytes)

    def cancel(self, turn_id: str | None = None) -> list[str]:
        """Request the end of a turn, or of all that run or wait; return the ids concerned.

        Raises:
            InvalidRequestError: there is nothing to cancel.
        """
        return self._client.call(cancel_request(self.id, turn_id), Cancelled).cancelled

    def info(self) -> SessionInfo:
        """Return the session as it is now. Raises ``SessionNotFoundError``."""
        return self._client.sessions.get(self.id)

    def delete(self) -> None:
        """Delete the session and everything of it. Raises ``SessionNotFoundError``."""
        self._client.sessions.delete(self.id)


class TurnStream(TurnFacts):
    """A turn as it happens: iterate for its events and deltas, or ``texts()`` for its text alone.

    A connection that breaks is taken up again, nothing is missed or doubled. When the iteration
    is over, ``text``, ``status``, ``usage`` and ``error`` are those of the turn.
    """

    def __init__(self, following: Following, items: Generator[StreamItem]) -> None:
        super().__init__(following)
        self._items = items

    def __iter__(self) -> Iterator[StreamItem]:
        return self._items

    def texts(self) -> Iterator[str]:
        """Yield the text, piece by piece."""
        for item in self._items:
            if isinstance(item, Delta):
                yield item.text

    def close(self) -> None:
        """Stop listening; the turn goes on."""
        self._items.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
