"""Handles to session actors, for programs inside the cluster."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

from agentray.config.state import read_state
from agentray.errors import AgentRayError, InvalidRequestError, NotReadyError
from agentray.sessions.base import SessionInfo

__all__ = ["Connection", "Reply", "ReplyStream", "SessionHandle", "connect"]

T_co = TypeVar("T_co", covariant=True)

NAMESPACE = "agentray"
DEFAULT_DATA_DIR = "~/.agentray"
HOSTS_APP = "hosts"
_LOOPBACK = ("127.", "localhost:", "[::1]")


class Reply(Protocol[T_co]):
    """An answer to come: await it, or take ``result(timeout_s=...)`` outside of an event loop."""

    def __await__(self) -> Generator[Any, None, T_co]: ...

    def result(self, *, timeout_s: float | None = None) -> T_co:
        """Return the answer. Raises ``TimeoutError`` and whatever the call raised."""
        ...


class ReplyStream(Protocol[T_co]):
    """Answers to come: iterate with ``for`` or ``async for``."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __aiter__(self) -> AsyncIterator[T_co]: ...


class _Method:
    """A method of a session, called as ``.remote(...)`` like those of any Ray actor."""

    def __init__(self, method: Any, session_id: str, defaults: Mapping[str, Any]) -> None:
        self._method = method
        self._session_id = session_id
        self._defaults = dict(defaults)

    def remote(self, *args: Any, **options: Any) -> Any:
        """Call it; returns at once with a ``Reply`` or ``ReplyStream``."""
        return self._method.remote(self._session_id, *args, **{**self._defaults, **options})


class SessionHandle:
    """A session, wherever it lives. Calls go to its owner; whichever host gets them serves them.

    ``send.remote(input, *, if_busy, idempotency_key, options)`` runs a turn and gives a
    ``Reply[TurnInfo]``; ``submit.remote(...)`` accepts it and gives the turn as it is then;
    ``stream.remote(...)`` gives a ``ReplyStream[StreamItem]`` of its events and deltas;
    ``events.remote(after=0, limit=100)`` a ``Reply[list[AnyEvent]]`` of the journal;
    ``cancel.remote(turn_id=None)`` a ``Reply[list[str]]`` of the turns concerned.
    """

    def __init__(self, hosts: Any, info: SessionInfo) -> None:
        self.info = info
        # Where the owner is, is looked up by this key on each call.
        handle = hosts.options(session_id=f"{info.tenant}/{info.id}")
        scope = {"tenant": info.tenant}
        self.send = _Method(handle.send, info.id, scope)
        self.submit = _Method(handle.submit, info.id, scope)
        self.stream = _Method(handle.options(stream=True).stream, info.id, scope)
        self.events = _Method(handle.events, info.id, scope)
        self.cancel = _Method(handle.cancel, info.id, scope)

    @property
    def id(self) -> str:
        return self.info.id

    def __repr__(self) -> str:
        return f"SessionHandle({self.info.id!r}, placement={self.info.placement!r})"


class Connection:
    """A running agentray, as seen from inside its Ray cluster."""

    def __init__(self, hosts: Any) -> None:
        self._hosts = hosts

    def session(
        self,
        session_id: str,
        *,
        agent: str | None = None,
        user: str | None = None,
        placement: Literal["shared", "dedicated"] | None = None,
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        tenant: str = "default",
        timeout_s: float = 30.0,
    ) -> SessionHandle:
        """Return a handle to a session; make the session if there is none.

        A new session is shared if no ``placement`` is given; an existing one keeps its agent and
        placement. A dedicated one is activated: its actor can then be had with
        ``ray.get_actor("session/<id>", namespace="agentray")``.

        Raises:
            InvalidRequestError: an impossible id, an unknown agent, or the session exists with
                another placement than the one given.
            NotReadyError: no host answered within ``timeout_s``.
        """
        response = self._hosts.options(session_id=f"{tenant}/{session_id}").activate.remote(
            session_id,
            tenant=tenant,
            agent=agent,
            user=user,
            placement=placement or "shared",
            ttl_s=ttl_s,
            metadata=dict(metadata or {}),
        )
        info: SessionInfo = _wait(response, timeout_s)
        if placement is not None and info.placement != placement:
            raise InvalidRequestError(
                f"session {session_id} exists, and its placement is {info.placement}",
                param="placement",
            )
        return SessionHandle(self._hosts, info)


def _wait(response: Any, timeout_s: float) -> Any:
    # Serve refuses to block in a thread that runs an event loop: this works there too.
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        try:
            return threads.submit(response.result, timeout_s=timeout_s).result()
        except TimeoutError as error:
            raise NotReadyError(f"no session host answered within {timeout_s:g} s") from error
        except Exception as error:
            # Ray wraps what a replica raised: callers get our own errors.
            cause = getattr(error, "cause", None)
            if isinstance(cause, AgentRayError):
                raise cause from error
            raise


def _prepare(address: str | None) -> None:
    """Let a program that did not come from ``agentray up`` in, whether it imported Ray or not."""
    if address is not None and address.startswith(_LOOPBACK):
        # Else Ray takes 127.0.0.1 for an address of the network. It reads this at its import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        cast(Any, import_module("ray._private.ray_constants")).ENABLE_RAY_CLUSTER = False
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray uses this user's token by itself only where it starts a cluster.
        setup: Any = import_module("ray._private.authentication.authentication_token_setup")
        if setup.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            setup._enable_token_auth()


def _of_this_node() -> str | None:
    """Return the cluster that this node is told to be in; Ray itself would also take any other
    whose processes it sees."""
    told = os.environ.get("RAY_ADDRESS")
    if told is None:
        with contextlib.suppress(OSError):
            told = Path("/tmp/ray/ray_current_cluster").read_text().strip()
    return told or None


def connect(address: str | None = None, *, data_dir: str | Path | None = None) -> Connection:
    """Connect to the agentray of this machine or cluster.

    Inside a Ray program (a job, a task, an actor) its cluster is taken. Elsewhere ``address`` is
    that of the cluster, or it is read from the state file that ``agentray up`` keeps in
    ``data_dir``. With neither, it is the one in ``~/.agentray``, else the cluster of this node.

    Raises:
        NotReadyError: there is no running agentray.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    untyped = cast(Any, ray)
    if not untyped.is_initialized():
        if address is None:
            state = read_state(data_dir or DEFAULT_DATA_DIR)
            address = state.ray_address if state is not None else None
            if address is None and data_dir is None:
                address = _of_this_node()
            if address is None:
                where = data_dir or DEFAULT_DATA_DIR
                raise NotReadyError(f"nothing runs in {where}: start it with agentray up")
        _prepare(address)
        try:
            untyped.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level="warning",
            )
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
        except ConnectionError as error:
            raise NotReadyError(f"there is no Ray cluster at {address}") from error
    try:
        hosts = cast(Any, serve).get_app_handle(HOSTS_APP)
    except RayServeException as error:
        raise NotReadyError("this cluster runs no agentray: start it with agentray up") from error
    return Connection(hosts)
