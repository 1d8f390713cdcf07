"""Find and end the processes of one system, by their ids and never by their names.

Every process that is started for a system carries a marker in its environment, and what it
starts inherits it. Some programs write over their environment (PostgreSQL's and Redis's workers,
Ray's workers); they are known by the folder that they work in, or by the session that a marked
process leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from agentray.app.layout import Layout

__all__ = ["MARKER", "alive", "children", "end_processes", "owned_processes", "wait_for_end"]

MARKER = "AGENTRAY_INTERNAL_SYSTEM"
_POLL_S = 0.05
# A shell may work in their folders too. The last is what redis-server is on some systems.
_STORES = ("postgres", "redis-server", "valkey-server")


def owned_processes(layout: Layout) -> list[int]:
    """Return the ids of the system's living processes, this one and its ancestors excepted."""
    mark = f"{MARKER}={layout.key}".encode()
    folders = {layout.postgres_dir, layout.redis_dir}
    ours: dict[int, int] = {}
    strangers: dict[int, int] = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            session = os.getsid(pid)
            if not alive(pid):
                continue
            strangers[pid] = session
            marked = mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            store = Path(f"/proc/{pid}/exe").readlink().name in _STORES
            if marked or (store and Path(f"/proc/{pid}/cwd").readlink() in folders):
                ours[pid] = strangers.pop(pid)
    # Sessions that a process of ours leads, or led; not one that a stranger leads, nor this one,
    # whose leader may have ended. Nothing leads session 0: its leader is outside our PID
    # namespace, or there is none (a container's first process and what it starts).
    sessions = set(ours.values()) - set(strangers) - {0, os.getsid(0)}
    ours |= {pid: session for pid, session in strangers.items() if session in sessions}
    return sorted(ours.keys() - _ancestors(os.getpid()))


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and waits to be reaped does not."""
    return _field(pid, 0) not in (None, b"Z", b"X")


def children(pid: int) -> dict[int, str]:
    """Return the ids of a process's living children, each with the name of its program."""
    names: dict[int, str] = {}
    for other in _pids():
        if _field(other, 1) == str(pid).encode() and alive(other):
            with contextlib.suppress(OSError):
                names[other] = Path(f"/proc/{other}/exe").readlink().name
    return names


async def end_processes(pids: Iterable[int], *, grace_s: float = 0.0) -> None:
    """End processes: SIGTERM first if there is a grace, then SIGKILL; return when none is left."""
    left = [pid for pid in pids if alive(pid)]
    if grace_s > 0:
        _signal(left, signal.SIGTERM)
        left = await wait_for_end(left, timeout_s=grace_s)
    _signal(left, signal.SIGKILL)
    await wait_for_end(left, timeout_s=10.0)


async def wait_for_end(pids: Iterable[int], *, timeout_s: float) -> list[int]:
    """Wait until the processes have ended; return those that have not in time."""
    deadline = time.monotonic() + timeout_s
    left = [pid for pid in pids if alive(pid)]
    while left and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
        left = [pid for pid in left if alive(pid)]
    return left


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _field(pid: int, index: int) -> bytes | None:
    # /proc/PID/stat: "pid (name) state ppid …", and the name may hold blanks and brackets.
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return text[text.rindex(b")") + 2 :].split()[index]


def _ancestors(pid: int) -> set[int]:
    line: set[int] = set()
    while pid > 1 and pid not in line:
        line.add(pid)
        pid = int(_field(pid, 1) or 0)
    return line
