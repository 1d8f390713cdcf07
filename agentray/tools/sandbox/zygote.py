"""Be the zygote of a slot: go into a root and namespaces of its own, and fork children there.

The supervisor execs this clean: no environment, no descriptors but one, no packages. It speaks
over that one socket: it tells the zygote to fork a child, and gets the child's descriptors.
"""

from __future__ import annotations

import _socket
import gc
import json
import marshal
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from agentray.tools.sandbox import child, kernel, program, root

__all__ = ["main"]

_CONTROL = 3
_MESSAGE_BYTES = 1 << 20


def main() -> Callable[[], None]:
    """Serve until the supervisor goes away; returns in children only, what they have to do."""
    control = socket.socket(fileno=_CONTROL)
    try:
        config: dict[str, Any] = marshal.loads(control.recv(_MESSAGE_BYTES))
        _settle(config)
    except BaseException as error:  # noqa: BLE001
        control.send(json.dumps(["failed", f"{type(error).__name__}: {error}"]).encode())
        os._exit(1)
    control.send(json.dumps(["ready", config["proc"]]).encode())
    task = _Zygote(control, config).serve()
    # A child that runs what nobody trusts: nothing of the zygote is to be found in it.
    control.detach()
    for name in [name for name in sys.modules if name.partition(".")[0] == "agentray"]:
        del sys.modules[name]
    return partial(program.run, task, frozenset(config["without"]))


def _settle(config: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if config["isolated"]:
        root.enter(config)
        if "proc" not in config["without"]:
            child.trial(config)
    sys.path[:] = [*sys.path, *config["paths"]]
    sys.executable = config["python"]
    os.environ.clear()
    os.environ.update(config["environment"])
    program.warm()
    for name in config["libraries"]:
        __import__(name)
    gc.collect()
    gc.freeze()
    gc.disable()


class _Zygote:
    """Children by the descriptor that tells of their end."""

    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self._control = control
        self._config = config
        self._children: dict[int, tuple[int, int, int]] = {}
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> int:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._control.fileno():
                    self._reap(descriptor)
                    continue
                message = self._control.recv(_MESSAGE_BYTES)
                if not message:
                    os._exit(0)
                task = self._do(*marshal.loads(message))
                if task is not None:
                    return task

    def _do(self, what: str, serial: int, size_bytes: int, files: int) -> int | None:
        try:
            if what == "fork":
                return self._fork(serial, size_bytes, files)
            for number, _, scratch in self._children.values():
                if number == serial and self._config["isolated"]:
                    kernel.tmpfs_resize(scratch, size_bytes, files)
            self._tell(["resized", serial])
        except OSError as error:
            self._tell(["refused", serial, str(error)])
        return None

    def _fork(self, serial: int, size_bytes: int, files: int) -> int | None:
        config = self._config
        scratch = os.open("/dev/null", os.O_RDONLY)
        flags = 0
        if config["isolated"]:
            os.close(scratch)
            scratch = kernel.tmpfs(size_bytes, files, uid=config["uid"], gid=config["gid"])
            flags = kernel.CLONE_NEWPID | kernel.CLONE_NEWNS
        mine, theirs = _ends()
        try:
            pid = kernel.clone(flags)
        except OSError:
            for each in (scratch, *mine, *theirs):
                os.close(each)
            raise
        if pid == 0:
            task, status, out, err = theirs
            return child.begin(config, (task, out, err, status), scratch)
        ended = os.pidfd_open(pid)
        self._children[ended] = (serial, pid, scratch)
        self._poll.register(ended, select.POLLIN)
        message = json.dumps(["forked", serial]).encode()
        socket.send_fds(self._control, [message], [*mine, ended])
        for each in mine + theirs:
            os.close(each)
        return None

    def _reap(self, ended: int) -> None:
        serial, pid, scratch = self._children.pop(ended)
        self._poll.unregister(ended)
        _, status, used = os.wait4(pid, 0)
        os.close(ended)
        os.close(scratch)
        self._tell(["ended", serial, status, used.ru_utime, used.ru_stime, used.ru_maxrss * 1024])

    def _tell(self, message: list[Any]) -> None:
        self._control.send(json.dumps(message).encode())


def _ends() -> tuple[list[int], list[int]]:
    """Return the supervisor's and a child's ends: of the program, the reports, out and err."""
    mine: list[int] = []
    theirs: list[int] = []
    for _ in range(2):
        ends = _socket.socketpair()
        mine.append(ends[0].detach())
        theirs.append(ends[1].detach())
    for _ in range(2):
        read, write = os.pipe()
        mine.append(read)
        theirs.append(write)
    return mine, theirs
