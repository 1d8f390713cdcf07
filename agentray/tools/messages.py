"""What hosts, scheduler and workers of the tool pool say to each other."""

from __future__ import annotations

import msgspec

from agentray.tools.runner import Ask, Priority
from agentray.tools.spec import OnCrash, ToolResult

__all__ = [
    "Ack",
    "Alive",
    "Done",
    "Fence",
    "Fenced",
    "Finished",
    "Forgot",
    "Gone",
    "Granted",
    "Held",
    "Hello",
    "Kill",
    "Left",
    "Message",
    "Peer",
    "Queued",
    "Refused",
    "Register",
    "Revoke",
    "Revoked",
    "Run",
    "State",
    "Unknown",
    "Want",
    "Welcome",
]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The first of a connection. ``name`` says who it is, for the log."""

    token: str
    name: str


# From a host to the scheduler


class Want(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A slot for a call. ``left_s`` is the time within which it has to begin, 0 for no bound;
    ``was_at`` the worker that it may have begun at."""

    key: str
    tenant: str
    session_id: str
    epoch: int
    tool: str
    priority: Priority
    cpu: float
    memory_bytes: int
    timeout_s: float
    left_s: float
    on_crash: OnCrash
    was_at: str = ""


class Left(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nobody waits for the call any more."""

    key: str
    epoch: int


class Fence(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Calls of a session that are of an older epoch have to end. Asked by ``number``."""

    number: int
    tenant: str
    session_id: str
    epoch: int


# From the scheduler to a host


class Peer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Where a worker listens; sent before its first lease."""

    worker: str
    host: str
    port: int
    token: str


class Granted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A slot, or the place where the call already runs or ended: then ``lease`` is 0."""

    key: str
    worker: str
    lease: int


class Queued(msgspec.Struct, frozen=True, array_like=True, tag=True):
    key: str
    position: int
    wait_s: float


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The call does not begin: queue_full, expired, died (it had begun), refused (its epoch)."""

    key: str
    reason: str
    retry_after_s: float = 0.0


class Fenced(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """All calls that a fence was to end have ended."""

    number: int


class Gone(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A worker is dead."""

    worker: str


class State(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How the pool is, every second: for hosts and workers a sign of life, too."""

    queued: int
    running: int
    workers: int
    slots: int


# From a worker to the scheduler


class Held(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A call that runs at a worker; ``killed``: it has not ended yet."""

    lease: int
    key: str
    tenant: str
    session_id: str
    epoch: int
    tool: str
    priority: Priority
    on_crash: OnCrash
    ran_s: float
    killed: bool = False


class Register(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A worker, what it runs and whose results it keeps. ``worker`` is fresh for each process,
    ``name`` is its actor's."""

    worker: str
    name: str
    host: str
    port: int
    token: str
    slots: int
    held: list[Held]
    kept: list[str]


class Finished(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A slot is free again: what its call used. The result is kept if ``kept``."""

    lease: int
    key: str
    wall_s: float
    cpu_s: float
    memory_bytes: int
    killed: bool
    kept: bool


class Alive(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A beat, with the leases that run or wait there."""

    leases: list[int]


class Forgot(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Results that are no longer kept."""

    keys: list[str]


class Revoked(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A lease that had not begun is void."""

    lease: int


# From the scheduler to a worker


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The answer to a registration. Leases from ``first_lease`` on are this scheduler's; with those
    of one before it nothing begins any more, as it would not know of that."""

    first_lease: int


class Revoke(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A lease is void if it has not begun."""

    lease: int


# From a host, or the scheduler, to a worker


class Run(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run a call with a lease, or with lease 0 tell the result of one that runs or ended."""

    lease: int
    ask: Ask


class Kill(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End a call of this epoch or an older one."""

    key: str
    epoch: int


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A result has arrived."""

    key: str


# From a worker to a host


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A call's result, and for how long it ran."""

    key: str
    result: ToolResult
    wall_s: float


class Unknown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The call neither runs nor ended here, and the lease is void."""

    key: str


Message = (
    Hello
    | Want
    | Left
    | Fence
    | Peer
    | Granted
    | Queued
    | Refused
    | Fenced
    | Gone
    | State
    | Register
    | Finished
    | Alive
    | Forgot
    | Revoked
    | Welcome
    | Revoke
    | Run
    | Kill
    | Ack
    | Done
    | Unknown
)
