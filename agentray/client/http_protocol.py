"""What the HTTP clients, sync and async, have in common: requests, answers and streams, no I/O."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, cast
from urllib.parse import quote

import httpx
import msgspec

from agentray import errors
from agentray.errors import AgentRayError, InvalidRequestError, NotReadyError
from agentray.events import (
    AnyEvent,
    Message,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    TurnError,
    TurnFinished,
    TurnOptions,
    TurnStatus,
    Usage,
    decode_event,
)
from agentray.ids import new_session_id
from agentray.sessions.base import Cursor, Delta, IfBusy, Placement, SessionInfo, StreamItem

__all__ = [
    "DEFAULT_URL",
    "STREAM_SILENCE_S",
    "Attempts",
    "Cancelled",
    "EventPage",
    "Following",
    "Input",
    "Request",
    "SessionFile",
    "SessionFiles",
    "SessionPage",
    "Status",
    "TurnFacts",
    "cancel_request",
    "create_request",
    "creation",
    "decode",
    "delete_request",
    "ended_early",
    "error_of",
    "events_request",
    "file_request",
    "files_request",
    "list_request",
    "session_path",
    "turn_request",
]

Input = str | Sequence[Message]
T = TypeVar("T")
Status = Literal["idle", "running", "closed", "parked"]

DEFAULT_URL = "http://127.0.0.1:8000"
STREAM_SILENCE_S = 60.0
"""A stream that says nothing for this long, not even a comment, is taken for broken."""

_LONGEST_PAUSE_S = 2.0
_UNREACHABLE = (502, 503, 504)


class Request(msgspec.Struct, frozen=True):
    """A request; one that is ``repeatable`` has the same effect sent twice as once."""

    method: str
    path: str
    body: Any = None
    query: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    repeatable: bool = True

    @property
    def content(self) -> bytes | None:
        return None if self.body is None else msgspec.json.encode(self.body)


class SessionPage(msgspec.Struct, frozen=True):
    """A page of sessions, newest first; ``next`` is the ``after`` of the page behind it."""

    data: list[SessionInfo]
    has_more: bool
    next: str | None = None


class EventPage(msgspec.Struct, frozen=True):
    data: list[AnyEvent]
    has_more: bool


class SessionFile(msgspec.Struct, frozen=True):
    """A file that tools left in a session, by its path below their working directory."""

    path: str
    size_bytes: int


class SessionFiles(msgspec.Struct, frozen=True):
    data: list[SessionFile]


class Cancelled(msgspec.Struct, frozen=True):
    cancelled: list[str]


def session_path(session_id: str, *rest: str) -> str:
    """Return a path below a session."""
    return "/".join(["/v1/sessions", *(quote(part, safe="") for part in (session_id, *rest))])


def creation(
    session_id: str | None,
    agent: str | None,
    user: str | None,
    placement: Placement,
    ttl_s: float | None,
    metadata: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Return what a session is made with."""
    # The id is drawn here where none is given: so that a repeated create makes one session.
    return {
        "id": session_id or new_session_id(),
        "agent": agent,
        "user": user,
        "placement": placement,
        "ttl_s": ttl_s,
        "metadata": metadata,
    }


def create_request(facts: dict[str, Any]) -> Request:
    """Return the request that makes a session."""
    return Request("POST", "/v1/sessions", facts)


def list_request(limit: int, **filters: str | None) -> Request:
    """Return the request for a page of sessions."""
    query = {key: value for key, value in filters.items() if value is not None}
    return Request("GET", "/v1/sessions", query={**query, "limit": str(limit)})


def delete_request(session_id: str) -> Request:
    """Return the request that deletes a session; sent twice, it would find none."""
    return Request("DELETE", session_path(session_id), repeatable=False)


def events_request(session_id: str, after: int) -> Request:
    """Return the request for a page of a journal."""
    query = {"after": str(after), "limit": "500"}
    return Request("GET", session_path(session_id, "events"), query=query)


def files_request(session_id: str) -> Request:
    """Return the request for the names of a session's files."""
    return Request("GET", session_path(session_id, "files"))


def file_request(session_id: str, path: str) -> Request:
    """Return the request for what is in a file of a session."""
    return Request("GET", session_path(session_id, "files", "content"), query={"path": path})


def cancel_request(session_id: str, turn_id: str | None) -> Request:
    """Return the request that cancels; sent twice, it would find nothing to cancel."""
    body = {} if turn_id is None else {"turn_id": turn_id}
    return Request("POST", session_path(session_id, "cancel"), body, repeatable=False)


def turn_request(
    session_id: str,
    input: Input,
    *,
    key: str,
    if_busy: IfBusy,
    options: TurnOptions,
    stream: bool = False,
    background: bool = False,
) -> Request:
    """Return the request for a turn; with its key it can be sent again and is run once."""
    given = msgspec.to_builtins(options)
    given.pop("background", None)
    body = {
        **given,
        "input": input,
        "stream": stream,
        "background": background,
        "if_busy": if_busy,
        "idempotency_key": key,
    }
    accept = "text/event-stream" if stream else "application/json"
    return Request("POST", session_path(session_id, "turns"), body, headers={"accept": accept})


def _classes(root: type[AgentRayError]) -> dict[str, type[AgentRayError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            found |= _classes(child)
    return found


_BY_CODE = _classes(AgentRayError)


class _Said(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None
    param: str | None = None
    details: dict[str, Any] = {}


class _SaidError(msgspec.Struct, frozen=True):
    error: _Said


_said = msgspec.json.Decoder(_SaidError)


def error_of(status: int, body: bytes, headers: Mapping[str, str]) -> AgentRayError:
    """Return the error of an answer, of the class that its code belongs to."""
    try:
        said = _said.decode(body).error
    except msgspec.DecodeError:
        shown = body[:200].decode("utf-8", "replace")
        said = _Said(f"the server answered {status}: {shown}")
    fields = dict(said.details)
    if said.param is not None:
        fields["param"] = said.param
    if "retry-after" in headers and headers["retry-after"].isdecimal():
        fields.setdefault("retry_after_s", int(headers["retry-after"]))
    kind = _BY_CODE.get(said.code or "")
    if kind is None:
        fields["code"] = said.code
        if status in _UNREACHABLE:
            kind = NotReadyError
        else:
            kind = InvalidRequestError if 400 <= status < 500 else AgentRayError
    return kind(said.message, **fields)


def decode(response: httpx.Response, kind: type[T]) -> T:
    """Return what was answered: the bytes themselves where those are wanted.

    Raises:
        AgentRayError: the one that was answered, or of an answer that is not agentray's.
    """
    if response.status_code >= 400:
        raise error_of(response.status_code, response.content, response.headers)
    if kind is bytes:
        return cast(T, response.content)
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.DecodeError as error:
        raise AgentRayError(f"the server's answer is not agentray's: {error}") from error


class Attempts:
    """Decides whether to try again: a bounded number of times, as long as nothing comes."""

    def __init__(self, retries: int, *, repeatable: bool) -> None:
        self._retries = retries
        self._repeatable = repeatable
        self._failed = 0

    def pause_s(self, error: Exception) -> float:
        """Return how long to wait before the next attempt.

        Raises:
            AgentRayError: there is none; a broken connection becomes ``NotReadyError``.
        """
        broken = isinstance(error, httpx.TransportError)
        # Overload is the caller's to wait out: it was refused, and nothing is under way.
        again = broken or (isinstance(error, AgentRayError) and _passes(error))
        never_sent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
        self._failed += 1
        if again and (self._repeatable or never_sent) and self._failed <= self._retries:
            longest = min(_LONGEST_PAUSE_S, 0.1 * 2**self._failed)
            return longest * (0.5 + random.random() / 2)
        if broken:
            raise NotReadyError(
                f"cannot reach agentray at {_address(error)}: {error} (does `agentray up` run?)"
            ) from error
        raise error

    def progressed(self) -> None:
        """Begin to count anew."""
        self._failed = 0


def _address(error: Exception) -> str:
    try:
        url = error.request.url if isinstance(error, httpx.RequestError) else None
    except RuntimeError:  # it was raised without one
        url = None
    return f"{url.scheme}://{url.netloc.decode()}" if url is not None else "its address"


def _passes(error: AgentRayError) -> bool:
    return isinstance(
        error, (NotReadyError, errors.StorageUnavailableError, errors.OwnershipLostError)
    )


def ended_early() -> httpx.TransportError:
    """Return what to say of a stream that ended before its turn."""
    return httpx.RemoteProtocolError("the stream ended before the turn")


class Following:
    """A stream under way: of a turn that ``first`` asks for, or of a session from ``cursor`` on.

    It says how to take itself up when its connection broke, and puts together what came. Whoever
    hands its items on moves ``cursor`` behind each.
    """

    def __init__(
        self, session_id: str, *, first: Request | None = None, cursor: Cursor = Cursor(0)
    ) -> None:
        self._session_id = session_id
        self._first = first
        self._buffer = b""
        self.cursor = cursor
        self.turn_id: str | None = None
        self.text: str | None = None
        self.finished: TurnFinished | None = None

    @property
    def bounded(self) -> bool:
        """Whether it ends with a turn."""
        return self._first is not None

    def request(self) -> Request:
        """Return what to send now."""
        self._buffer = b""
        if self._first is not None and self.turn_id is None:
            return self._first
        query = {"after": f"{self.cursor.seq}.{self.cursor.offset}"}
        if self.turn_id is not None:
            query["turn_id"] = self.turn_id
        accept = {"accept": "text/event-stream"}
        return Request("GET", session_path(self._session_id, "events"), None, query, accept)

    def opened(self, headers: Mapping[str, str]) -> None:
        """Take in the head of an answer."""
        self.turn_id = self.turn_id or headers.get("x-agentray-turn-id")

    def feed(self, chunk: bytes) -> list[StreamItem]:
        """Return the items that these bytes complete.

        Raises:
            AgentRayError: the stream said so.
        """
        *frames, self._buffer = (self._buffer + chunk).split(b"\n\n")
        items: list[StreamItem] = []
        for frame in frames:
            lines = [line for line in frame.split(b"\n") if line and not line.startswith(b":")]
            fields = dict(line.split(b": ", 1) for line in lines if b": " in line)
            if b"data" in fields and (item := self._item(fields)) is not None:
                items.append(item)
        return items

    def _item(self, fields: dict[bytes, bytes]) -> StreamItem | None:
        data = fields[b"data"]
        if fields.get(b"event") == b"error":
            raise error_of(503, data, {})
        if fields.get(b"event") == b"model.delta":
            return msgspec.json.decode(data, type=Delta)
        try:
            event = decode_event(data)
        except msgspec.ValidationError:
            return None  # of a kind that only a newer agentray knows
        self._note(event)
        return event

    def _note(self, event: AnyEvent) -> None:
        if isinstance(event, (ModelFinished, ModelVoided, ModelFailed)):
            self.text = event.text or self.text
        elif isinstance(event, TurnFinished) and self.bounded:
            self.finished = event


class TurnFacts:
    """What a stream of a turn knows of it."""

    def __init__(self, following: Following) -> None:
        self._following = following

    @property
    def turn_id(self) -> str | None:
        """The turn's id, known from its first item on."""
        return self._following.turn_id

    @property
    def cursor(self) -> Cursor:
        """The place behind the last item."""
        return self._following.cursor

    @property
    def text(self) -> str | None:
        return self._following.text

    @property
    def status(self) -> TurnStatus | None:
        finished = self._following.finished
        return finished.status if finished else None

    @property
    def usage(self) -> Usage | None:
        finished = self._following.finished
        return finished.usage if finished else None

    @property
    def error(self) -> TurnError | None:
        finished = self._following.finished
        return finished.error if finished else None
