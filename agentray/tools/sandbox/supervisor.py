"""Start a slot's zygote, and hold the ends of its children: what the worker's process does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import marshal
import os
import signal
import socket
from pathlib import Path
from typing import Any, Literal

import msgspec

from agentray.errors import SandboxUnavailableError
from agentray.tools.sandbox import layout
from agentray.tools.sandbox.base import Start, Tier
from agentray.tools.sandbox.cgroups import Cgroup
from agentray.tools.sandbox.pipes import Drain

__all__ = ["Child", "Ended", "Zygote"]

_START_S = 20.0
_FORK_S = 10.0
_END_S = 2.0
_DESCRIPTORS = 4
_BOOTSTRAP = """
import os, sys
from types import ModuleType
given = int(sys.argv.pop())
if given != 3:
    os.dup2(given, 3, inheritable=False)
    os.close(given)
at = os.read(3, 4096).decode()
for name in ("agentray", "agentray.tools", "agentray.tools.sandbox"):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [at]
del os, at, given, name, ModuleType
__import__("agentray.tools.sandbox.zygote", fromlist=["main"]).main()()
"""


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """What the zygote tells of a child that is over: its wait status, the CPU seconds of its
    processes, the peak memory in bytes of the largest or of all where that was counted, whether
    its scratch is full, and the limit that the zygote ended it at."""

    status: int
    cpu_s: float
    memory_bytes: int
    full: bool
    why: Literal["", "cpu", "memory"]


class Child:
    """A child in its jail, that waits for a program or runs it."""

    def __init__(self, serial: int, sizes: tuple[int, int], fds: list[int]) -> None:
        task, out, err, self._pidfd = fds
        self.serial = serial
        self.sizes = sizes
        self.task = Drain(task, at_once=False)
        self.out = Drain(out)
        self.err = Drain(err)
        self.left: Drain | None = None
        """The entries of its scratch, when it is over and they were to be kept."""
        self.over: asyncio.Future[Ended | None] = asyncio.get_running_loop().create_future()
        """Set when no process of it is left: to how it ended, or None if its zygote died."""
        self._rest = memoryview(b"")
        self._open = True

    def send(self, message: bytes) -> bool:
        """Send the program; return whether all of it is sent."""
        self._rest = memoryview(message)
        return self._write()

    async def send_rest(self) -> None:
        """Send what did not fit, as the child reads it."""
        loop = asyncio.get_running_loop()
        while not self._write():
            writable = loop.create_future()
            loop.add_writer(self.task.descriptor, _settle, writable)
            try:
                await writable
            finally:
                if not self.task.closed:
                    loop.remove_writer(self.task.descriptor)

    def _write(self) -> bool:
        while self._rest:
            if self.task.closed:
                return True
            try:
                self._rest = self._rest[os.write(self.task.descriptor, self._rest) :]
            except BlockingIOError:
                return False
            except OSError:
                return True
        return True

    def kill(self) -> None:
        """End all its processes: with the init of a pid namespace goes all that is in it.

        Without one, its zygote finds and ends what its process leaves.
        """
        if self._open:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """End it, and let go of its descriptors."""
        if self._open:
            self.kill()
            self._open = False
            os.close(self._pidfd)
            for each in (self.task, self.out, self.err, self.left):
                if each is not None:
                    each.close()

    def ended(self, found: Ended | None, left: int = -1) -> None:
        """Take note of its end."""
        if not self.over.done():
            if left >= 0 and self._open:
                # Read when it is known how much of it is to be kept.
                self.left = Drain(left, at_once=False)
            elif left >= 0:
                os.close(left)
            self.over.set_result(found)


def _handed_on(control: socket.socket, *, all_others: bool) -> dict[str, Any]:
    if not all_others:
        return {"pass_fds": (control.fileno(),)}
    control.set_inheritable(True)
    return {"close_fds": False}


async def _first(control: socket.socket) -> tuple[bytes, list[int]]:
    """Return the first message, and the descriptors that came with it."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(control, _settle, readable)
    try:
        await readable
    finally:
        loop.remove_reader(control)
    message, fds, _, _ = socket.recv_fds(control, 65536, 1)
    return message, list(fds)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """End a process; one that the kernel does not let end yet is waited for some seconds only."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            await process.wait()


def _let_go(child: Child | None) -> None:
    if child is not None:
        child.close()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Zygote:
    """The process that a slot's children are forked from."""

    kind: Start = "warm"
    """What a run begins from that no child was parked for."""
    child_cpu_s = 0.0
    child_bytes = 0
    """What a child has used itself before its program begins, where all of it is counted."""

    def __init__(self, config: dict[str, Any], cgroup: Cgroup | None, tier: Tier) -> None:
        self._config = config
        self._cgroup = cgroup
        self._tier = tier
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._children: dict[int, Child] = {}
        self._serial = 0
        self.oom_kills = 0
        self.own_bytes = 0
        self.listener: socket.socket | None = None
        """What its children's programs can connect to, if to anything."""

    @property
    def alive(self) -> bool:
        return self._control is not None

    @property
    def environment(self) -> dict[str, str]:
        """What programs have as their environment."""
        return self._config["environment"]

    async def start(self) -> None:
        """Start it and wait until it is in its root.

        Raises:
            SandboxUnavailableError: if it cannot go there; the message says what failed.
        """
        # What is left of the last one counts for the same uid.
        await self._gone()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        process = None
        try:
            process = await self._spawn(theirs)
            theirs.close()
            if self._cgroup is not None:
                self._cgroup.add(process.pid)
            ours.send(str(Path(__file__).parent).encode())
            ours.send(marshal.dumps(self._config))
            async with asyncio.timeout(_START_S):
                answer, fds = await _first(ours)
            if not answer:
                raise SandboxUnavailableError("the zygote died as it started", tier=self._tier)
            kind, *facts = json.loads(answer)
            if kind != "ready":
                raise SandboxUnavailableError(
                    f"it could not be set up: {facts[0]}", tier=self._tier
                )
        except BaseException as error:
            ours.close()
            theirs.close()
            if process is not None:
                await _ended(process)
            if not isinstance(error, OSError):
                raise
            late = isinstance(error, TimeoutError)
            why = f"the zygote was not ready after {_START_S:g} s" if late else str(error)
            raise SandboxUnavailableError(why, tier=self._tier) from error
        if self.listener is not None:
            self.listener.close()
        self.listener = socket.socket(fileno=fds[0]) if fds else None
        self._process, self._control = process, ours
        if self._cgroup is not None:
            self.own_bytes = self._cgroup.memory_bytes()
            self.oom_kills = self._cgroup.oom_kills()
        asyncio.get_running_loop().add_reader(ours, self._readable)

    async def _spawn(self, control: socket.socket) -> asyncio.subprocess.Process:
        without = self._config["without"]
        # The socket becomes descriptor 3 there, and is the only one above stderr.
        return await asyncio.create_subprocess_exec(
            layout.interpreter(),
            *("-I", "-S", "-u", "-X", "utf8", "-c", _BOOTSTRAP, str(control.fileno())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=dict(os.environ) if "clean_env" in without else {},
            cwd="/",
            **_handed_on(control, all_others="close_fds" in without),
            start_new_session=True,
        )

    async def fork(self, sizes: tuple[int, int]) -> Child:
        """Return a new child that jails itself and waits for a program.

        Raises:
            OSError: if the zygote could not make one.
            SandboxUnavailableError: if the zygote is gone.
        """
        self._serial += 1
        self._sizes[self._serial] = sizes
        return await self._ask("fork", self._serial, sizes)

    async def resize(self, child: Child, sizes: tuple[int, int]) -> None:
        """Give a parked child's scratch other limits."""
        await self._ask("resize", child.serial, sizes)
        child.sizes = sizes

    def keep(self, child: Child, most_bytes: int) -> None:
        """Have the zygote collect what the child leaves in its scratch."""
        self._send("keep", child.serial, (most_bytes, None))

    def watch(self, child: Child, cpu_s: float, memory_bytes: int) -> None:
        """Have the zygote count what the child uses, and end it past the limits (0: none)."""
        self._send("watch", child.serial, (cpu_s, memory_bytes))

    def abandon(self) -> None:
        """End it and all its children by force, as it does not do what it is told: it is gone."""
        # One that is not isolated has to find its strays itself: it is left the time for that.
        if self._process is not None and self.alive and self._config["isolated"]:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._lost()

    async def close(self) -> None:
        """End it and all its children, and remove its cgroup."""
        self._lost()
        if self.listener is not None:
            self.listener.close()
        await self._gone()
        for _ in range(100):
            if self._cgroup is None or self._cgroup.remove():
                return
            await asyncio.sleep(0.01)

    async def _gone(self) -> None:
        """Wait for its end, which the end of its socket is to it."""
        process = self._process
        if process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await process.wait()
            await _ended(process)

    async def _ask(self, what: str, serial: int, sizes: tuple[int, int]) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[serial] = future
        try:
            self._send(what, serial, sizes)
            # Not wait_for, which before Python 3.12 may take a cancellation for nothing.
            async with asyncio.timeout(_FORK_S):
                return await future
        except TimeoutError:
            self.abandon()
            raise SandboxUnavailableError("the zygote does not answer", tier=self._tier) from None
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                # It came, and nobody takes it any more.
                _let_go(future.result())
            raise
        finally:
            self._waiting.pop(serial, None)

    def _send(self, what: str, serial: int, values: tuple[Any, Any]) -> None:
        if self._control is None:
            raise SandboxUnavailableError("the zygote is gone", tier=self._tier)
        try:
            self._control.send(marshal.dumps((what, serial, *values)))
        except BrokenPipeError:
            raise SandboxUnavailableError("the zygote is gone", tier=self._tier) from None

    def _readable(self) -> None:
        while self._control is not None:
            try:
                message, fds, _, _ = socket.recv_fds(self._control, 65536, _DESCRIPTORS)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not message:
                self._lost()
                return
            self._told(json.loads(message), list(fds))

    def _told(self, message: list[Any], fds: list[int]) -> None:
        kind, serial, *facts = message
        if kind == "ended":
            child = self._children.pop(serial, None)
            if child is not None:
                child.ended(msgspec.convert(facts, Ended), *fds)
            return
        future = self._waiting.get(serial)
        found: Any = None
        if kind == "forked":
            found = self._children[serial] = Child(serial, self._sizes.pop(serial), fds)
        if future is None or future.done():
            if found is not None:
                found.close()
        elif kind == "refused":
            self._sizes.pop(serial, None)
            future.set_exception(OSError(facts[0]))
        else:
            future.set_result(found)

    def _lost(self) -> None:
        control, self._control = self._control, None
        if control is None:
            return
        asyncio.get_running_loop().remove_reader(control)
        control.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SandboxUnavailableError("the zygote died", tier=self._tier))
        for child in self._children.values():
            # Its process dies with the zygote; its namespace's init, and with it others, may not.
            child.kill()
            child.ended(None)
        self._children.clear()
