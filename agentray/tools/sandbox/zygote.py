"""Be the zygote of a slot: go into a root and namespaces of its own, and fork children there.

The supervisor execs this clean: no environment, no descriptors but one, no packages. It speaks
over that one socket: it has the zygote fork children and gets their descriptors, and is told how
they ended. The zygote is the parent of each program and outlives it, so that nothing of what it
tells comes from where a program was.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import gc
import json
import marshal
import os
import select
import signal
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from agentray.tools.sandbox import census, child, kernel, loopback, program, root

__all__ = ["main"]

_CONTROL = 3
# What children are given lies above, so that they can take their numbers in any order.
_FIRST_FREE = 10
_MESSAGE_BYTES = 1 << 20
_MOST_SIZES = 100
# How often what no cgroup counts is counted: memory can grow by gigabytes a second.
_TICK_MS = 10


def main() -> Callable[[], None]:
    """Serve until the supervisor goes away; returns in children only, what they have to do."""
    control = _socket.socket(fileno=_CONTROL)
    try:
        config: dict[str, Any] = marshal.loads(control.recv(_MESSAGE_BYTES))
        jail, size_bytes = _settle(config)
        listener = loopback.open_listener() if config.get("loopback") else -1
    except BaseException as error:  # noqa: BLE001
        control.send(json.dumps(["failed", f"{type(error).__name__}: {error}"]).encode())
        os._exit(1)
    run = partial(program.run, without=frozenset(config["without"]), size_bytes=size_bytes)
    zygote = _Zygote(control, jail)
    # Never freed in a child, which would copy all its pages for it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(zygote))
    if "globals" not in config["without"]:
        gc.collect()
        gc.freeze()
        gc.disable()
    ready = json.dumps(["ready"]).encode()
    _send(control, ready, (listener,) if listener >= 0 else ())
    if listener >= 0:
        os.close(listener)
    return partial(run, zygote.serve())


def _settle(config: dict[str, Any]) -> tuple[child.Jail, int]:
    """Go where children are to be forked, and return their jail and the size that they will have.

    For where they have no ``/proc``: they do not see it themselves.
    """
    null = os.open("/dev/null", os.O_RDONLY)
    while null < _FIRST_FREE:
        null = os.dup(null)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    statm = -1
    if config["isolated"]:
        statm = root.enter(config)
        if not config["network"]:
            # Where there is no /proc, no count of memory is whole.
            with contextlib.suppress(OSError):
                loopback.bound_backlogs()
    else:
        kernel.adopt()
    # The modules' way of reseeding after a fork would do it a second time.
    register, os.register_at_fork = os.register_at_fork, _not_after_forks
    program.warm()
    os.register_at_fork = register
    jail = child.trial(config) if config["isolated"] else child.Jail(config, "")
    sys.path[:] = [*sys.path, *config["paths"]]
    sys.executable = config["python"]
    if "clean_env" not in config["without"]:
        os.environ.clear()
    os.environ.update(config["environment"])
    if "globals" not in config["without"]:
        _vanish()
    for name in config["libraries"]:
        __import__(name)
    if not jail.fresh:
        jail.attach(kernel.Tmpfs(0, 0, **jail.owner).make())
    size_bytes = 0
    if statm >= 0:
        size_bytes = int(os.read(statm, 100).split()[0]) * os.sysconf("SC_PAGE_SIZE")
        os.close(statm)
    return jail, size_bytes


def _not_after_forks(**_: object) -> None:
    pass


def _vanish() -> None:
    """Let nothing lead from a program to here, and libraries find the real package."""
    mine = [name for name in sys.modules if name.partition(".")[0] == "agentray"]
    for name in mine:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(sys.modules.pop(name)))


class _Child:
    """A child: its process, the init of its namespaces, its scratch and what is to be watched."""

    __slots__ = (
        "census",
        "folder",
        "init",
        "kept_bytes",
        "limits",
        "pid",
        "scratch",
        "why",
    )

    def __init__(self, pid: int, init: int, scratch: int, folder: str) -> None:
        self.pid = pid
        # Its pid; there is none without isolation.
        self.init = init
        self.scratch = scratch
        self.folder = folder
        self.kept_bytes = -1
        self.limits: tuple[float, int] = (0.0, 0)
        self.why = ""
        self.census: census.Census | None = None


class _Zygote:
    def __init__(self, control: _socket.socket, jail: child.Jail) -> None:
        self._control = control
        self._jail = jail
        self._children: dict[int, _Child] = {}
        self._ends: dict[int, int] = {}
        self._collectors: dict[int, int] = {}
        self._scratches: dict[tuple[int, int], kernel.Tmpfs] = {}
        self._me = os.pidfd_open(os.getpid())
        self._enter = kernel.enter(kernel.CLONE_NEWPID)
        # Without a namespace of pids, this is the machine's and says nothing of a run.
        isolated = bool(jail.own & kernel.CLONE_NEWPID)
        self._sees_processes = isolated and os.access("/proc/1/stat", os.F_OK)
        self._watched: set[int] = set()
        self._poll = select.poll()
        self._poll.register(_CONTROL, select.POLLIN)

    def serve(self) -> int:
        """Serve for good; return in a child, with the descriptor that its program comes on."""
        while True:
            ready = self._poll.poll(_TICK_MS if self._watched else None)
            for descriptor, _ in ready:
                if descriptor in self._ends:
                    self._reap(descriptor)
                elif descriptor in self._collectors:
                    self._forget(descriptor, self._collectors.pop(descriptor))
                else:
                    task = self._listen()
                    if task is not None:
                        return task
            for serial in self._watched:
                with contextlib.suppress(OSError):
                    self._look(self._children[serial])

    def _listen(self) -> int | None:
        """Do all that was asked for so far: of an end that is seen now, it was asked before."""
        while True:
            try:
                message = self._control.recv(_MESSAGE_BYTES, _socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not message:
                self._end()
            task = self._do(*marshal.loads(message))
            if task is not None:
                return task

    def _do(self, what: str, serial: int, first: Any, second: Any) -> int | None:
        try:
            if what == "fork":
                return self._fork(serial, (first, second))
            found = self._children.get(serial)
            if found is None:
                return None
            if what == "keep":
                found.kept_bytes = first
            elif what == "watch":
                self._watch(serial, found, (first, second))
            elif self._jail.isolated:
                self._tmpfs((first, second)).resize(found.scratch)
            if what == "resize":
                self._tell(["resized", serial])
        except OSError as error:
            self._tell(["refused", serial, str(error)])
        return None

    def _tmpfs(self, sizes: tuple[int, int]) -> kernel.Tmpfs:
        found = self._scratches.get(sizes)
        if found is None:
            if len(self._scratches) >= _MOST_SIZES:
                self._scratches.clear()
            found = self._scratches[sizes] = kernel.Tmpfs(*sizes, **self._jail.owner)
        return found

    def _fork(self, serial: int, sizes: tuple[int, int]) -> int | None:
        jail, folder, init, init_end = self._jail, "", -1, -1
        if jail.isolated:
            scratch = self._tmpfs(sizes).make()
        else:
            folder = child.new_folder(jail.place)
            scratch = os.open(folder, os.O_PATH)
        ours, theirs = _ends()
        try:
            if jail.isolated:
                init = kernel.clone_init(jail.own)
                init_end = os.pidfd_open(init)
                self._into(init_end)
            pid = os.fork()
        except OSError:
            with contextlib.suppress(OSError):
                self._into(self._me)
            self._close(scratch, *ours, *theirs, init_end)
            if init > 0:
                _end_init(init)
            raise
        if pid == 0:
            return child.begin(jail, theirs, scratch, init_end, folder)
        self._into(self._me)
        ended = os.pidfd_open(pid)
        self._children[serial] = _Child(pid, init, scratch, folder)
        self._ends[ended] = serial
        self._poll.register(ended, select.POLLIN)
        self._send_ends(serial, (*ours, init_end if jail.isolated else ended))
        self._close(*ours, *theirs, init_end)
        return None

    def _into(self, process: int) -> None:
        """Have what is forked from now on be in a process's pid namespace."""
        if self._jail.own & kernel.CLONE_NEWPID and self._jail.isolated:
            self._enter(process)

    def _send_ends(self, serial: int, descriptors: tuple[int, ...]) -> None:
        self._send(b'["forked", %d]' % serial, descriptors)

    def _send(self, message: bytes, descriptors: tuple[int, ...] = ()) -> None:
        try:
            _send(self._control, message, descriptors)
        except BrokenPipeError:
            # The supervisor went away with something still asked for.
            self._end()

    def _close(self, *descriptors: int) -> None:
        for each in descriptors:
            if each >= 0:
                os.close(each)

    def _watch(self, serial: int, found: _Child, limits: tuple[float, int]) -> None:
        """Begin to count what a child uses, where it can be seen."""
        if self._sees_processes:
            found.limits = limits
            found.census = census.Census(found.scratch)
            self._watched.add(serial)

    def _look(self, found: _Child) -> None:
        if found.census is None:
            return
        others = {pid for each in self._children.values() for pid in (each.pid, each.init)}
        others -= {found.pid, found.init}
        cpu_s, memory_bytes = found.census.count(found.init, others | {*self._collectors.values()})
        why = "cpu" if cpu_s > found.limits[0] else ""
        if 0 < found.limits[1] < memory_bytes:
            why = "memory"
        if why:
            found.limits = (float("inf"), 0)
            found.why = why
            os.kill(found.init, signal.SIGKILL)

    def _reap(self, ended: int) -> None:
        """See a child's process off, and all that it leaves, and tell how it ended."""
        serial = self._ends.pop(ended)
        found = self._children.pop(serial)
        _, status, used = os.wait4(found.pid, 0)
        cpu_s = used.ru_utime + used.ru_stime
        peak_bytes = used.ru_maxrss * 1024
        if found.init > 0:
            cpu_s += _end_init(found.init)
        else:
            census.end_strays({each.pid for each in self._children.values()})
        if found.census is not None:
            # Of what is killed with its init, the kernel tells nothing.
            cpu_s = max(cpu_s, found.census.cpu_s)
            peak_bytes = max(peak_bytes, found.census.peak_bytes)
        facts = ["ended", serial, status, cpu_s, peak_bytes, _full(found.scratch), found.why]
        if found.kept_bytes >= 0:
            self._collect(found, facts)
        else:
            self._tell(facts)
        self._watched.discard(serial)
        self._poll.unregister(ended)
        self._close(ended, found.scratch)
        if found.folder and found.kept_bytes < 0:
            child.remove(found.folder)

    def _collect(self, found: _Child, facts: list[Any]) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            child.collect(self._jail, found.scratch, write, found.kept_bytes, found.folder)
        ended = os.pidfd_open(pid)
        self._collectors[ended] = pid
        self._poll.register(ended, select.POLLIN)
        self._send(json.dumps(facts).encode(), (read,))
        self._close(read, write)

    def _forget(self, ended: int, pid: int) -> None:
        os.waitpid(pid, 0)
        self._poll.unregister(ended)
        os.close(ended)

    def _end(self) -> None:
        """Leave nothing behind: who is not reaped still counts for its uid."""
        for each in self._children.values():
            os.kill(each.pid, signal.SIGKILL)
            os.waitpid(each.pid, 0)
            if each.init > 0:
                _end_init(each.init)
        if not self._jail.isolated:
            census.end_strays(set())
        os._exit(0)

    def _tell(self, message: list[Any]) -> None:
        self._send(json.dumps(message).encode())


def _send(control: _socket.socket, message: bytes, descriptors: tuple[int, ...]) -> None:
    rights = struct.pack(f"{len(descriptors)}i", *descriptors)
    control.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if rights else [])


def _end_init(pid: int) -> float:
    """End an init and with it all in its namespace, and return what CPU they used in seconds."""
    os.kill(pid, signal.SIGKILL)
    used = os.wait4(pid, 0)[2]
    return used.ru_utime + used.ru_stime


def _full(scratch: int) -> bool:
    found = os.fstatvfs(scratch)
    return found.f_bfree == 0 or found.f_ffree == 0


_Ends = tuple[int, int, int]


def _ends() -> tuple[_Ends, _Ends]:
    """Return the supervisor's and a child's ends: of the program, of stdout and of stderr."""
    task, task_ = _socket.socketpair()
    (out, out_), (err, err_) = os.pipe(), os.pipe()
    return (task.detach(), out, err), (task_.detach(), out_, err_)
