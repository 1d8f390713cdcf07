"""What a sandbox is to the workers: slots that run one program at a time, within limits."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol

import msgspec

__all__ = [
    "FunctionCall",
    "Limits",
    "Outcome",
    "Program",
    "PythonCode",
    "Reason",
    "Run",
    "Serve",
    "ShellScript",
    "Slot",
    "Start",
    "Tier",
    "Usage",
]

Tier = Literal["process", "jail", "gvisor"]
"""How strongly a slot contains what it runs: ``process`` for trusted functions, ``jail`` for code
of models, ``gvisor`` for hostile tenants."""

Reason = Literal["ok", "exit", "signal", "timeout", "cpu", "memory", "output", "scratch", "failed"]
"""Why a program ended: by itself (``ok``, or ``exit`` with another code than 0), by a ``signal`` of
its own making, at a limit (``timeout`` is of wall time), or because the sandbox ``failed``."""

Start = Literal["parked", "warm", "cold"]
"""What a run began from: a child prepared ahead, a fork of a warm zygote, or a new zygote."""


class Limits(msgspec.Struct, frozen=True):
    """What one run may use. Sizes in bytes, times in seconds."""

    wall_s: float = 30.0
    cpu_s: float = 30.0
    memory_bytes: int = 256 * 1024 * 1024
    pids: int = 32
    open_files: int = 128
    scratch_bytes: int = 64 * 1024 * 1024
    scratch_files: int = 4096
    output_bytes: int = 256 * 1024


class PythonCode(msgspec.Struct, frozen=True, tag="python"):
    """Source that runs as ``__main__`` of a fresh interpreter state."""

    code: str


class ShellScript(msgspec.Struct, frozen=True, tag="shell"):
    """A script for ``/bin/sh``."""

    script: str


class FunctionCall(msgspec.Struct, frozen=True, tag="function"):
    """A call of an operator's function ``module:qualname``, with keyword arguments as JSON."""

    target: str
    arguments: bytes


Program = PythonCode | ShellScript | FunctionCall


Serve = Callable[[socket.socket], Coroutine[Any, Any, None]]
"""Serves a listener, which it does not close, until it is cancelled. Then nothing of the
connections is left."""


class Run(msgspec.Struct, frozen=True):
    """One run. ``scratch`` is a tar of files that the program finds in its working directory;
    with ``keep_scratch`` the outcome brings one of those it leaves there. ``network`` serves what
    the program connects to, all that it can reach of any network; the slot has to be ``proxied``.
    """

    program: Program
    limits: Limits = Limits()
    scratch: bytes = b""
    keep_scratch: bool = False
    network: Serve | None = None


class Usage(msgspec.Struct, frozen=True):
    """What a run really used: ``cpu_s`` of all its processes, ``memory_bytes`` at its peak."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory_bytes: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended. Output until then is there whatever the reason.

    ``result`` is the JSON that a function returned; ``error`` says in a sentence what went wrong
    where the reason alone does not (the exception of a function, why the sandbox failed).
    ``truncated``: output past ``output_bytes`` was dropped.
    """

    reason: Reason
    exit_code: int | None = None
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    result: bytes | None = None
    error: str = ""
    scratch: bytes | None = None
    usage: Usage = Usage()
    start: Start = "warm"


class Slot(Protocol):
    """A place that runs one program at a time and is as new for the next.

    Whatever a program does, its end, or that of the task that awaits :meth:`run`, is the end of
    all its processes, and the slot can be used again.
    """

    @property
    def tier(self) -> Tier: ...

    async def run(self, run: Run) -> Outcome:
        """Run a program to its end or its limits. Never raises for what the program did."""
        ...

    async def close(self) -> None:
        """End whatever runs and give everything back."""
        ...
