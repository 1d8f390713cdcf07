"""Run programs under gVisor: each in a kernel of its own, which runs in a slot's namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import marshal
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentray.errors import SandboxUnavailableError
from agentray.tools.sandbox import layout, seccomp
from agentray.tools.sandbox.base import Start
from agentray.tools.sandbox.supervisor import Child, Zygote

__all__ = ["ABSENT", "LEFT_TO_RUNSC", "Runsc", "config", "find_runsc", "specification"]

ABSENT = "no runsc was found on PATH"

LEFT_TO_RUNSC = frozenset({"capabilities", "no_new_privs", "proc_readonly", "seccomp", "uid"})
"""What a slot's zygote does not do to its children here: runsc needs it to set its own up, and
gives up by itself what it does not need. The program is told from the zygote by two kernels."""

# Within the slot's root. The state's folder is each child's own, and not to be seen by programs.
_STATE = "/run"
_BUNDLE = "/var/bundle"
_PROGRAM = "/etc/agentray"
# Threads of runsc, its kernel and its file server; some more come with each blocking call.
_KERNEL_PIDS = 256
_BOOT_S = 20.0
_ERROR_BYTES = 8192
_READY = b"P"
_TASK = 3
_SET_SECCOMP = 22
# What runsc answers with for a program that a signal ended: this and the signal's number.
_SIGNALLED = 128
_MOST_SIGNALS = 64

# It has no descriptors but three, so stdin is the socket that the program comes on.
_BOOTSTRAP = f"""
import os, sys
os.dup2(0, {_TASK}, inheritable=False)
null = os.open("/dev/null", os.O_RDONLY)
os.dup2(null, 0)
os.close(null)
sys.path.insert(0, {_PROGRAM!r})
import program
sys.path.pop(0)
del sys.modules["program"], null
program.warm()
sys.path.extend(PATHS)
for name in LIBRARIES:
    __import__(name)
if UID != os.getuid():
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
import ctypes
code = ctypes.create_string_buffer(FILTER, len(FILTER))
rows = (len(FILTER) // 8).to_bytes(8, "little") + ctypes.addressof(code).to_bytes(8, "little")
if ctypes.CDLL(None, use_errno=True).prctl({_SET_SECCOMP}, 2, rows, 0, 0) != 0:
    raise OSError(ctypes.get_errno(), "seccomp")
for name in [name for name in sys.modules if name in ("ctypes", "_ctypes", "ctypes._endian")]:
    del sys.modules[name]
del ctypes, code, rows
os.write({_TASK}, {_READY!r})
program.run({_TASK})
"""


def host_pids(pids: int, *, sandboxes: int) -> int:
    """Return how many threads of the machine sandboxes may need that run so many processes each.

    A process's limit within is held by its own kernel: this is for that kernel itself.
    """
    return sandboxes * (_KERNEL_PIDS + 4 * pids)


def find_runsc() -> str:
    """Return where runsc is, or nothing."""
    found = shutil.which("runsc")
    return os.path.realpath(found) if found else ""


def config(
    paths: Sequence[str],
    libraries: Sequence[str],
    *,
    runsc: str,
    root: bool,
    uid: int,
    shared_memory: bool = True,
) -> dict[str, Any]:
    """Return what a zygote is to be told, so that its children can be runsc.

    ``uid`` is the program's. Unprivileged, the only one that there is goes by 0 in there: it is
    root of a kernel that gives it no capability. ``shared_memory``: see the filter.
    """
    guest = uid if root else 0
    found = layout.layout(paths, guest)
    # Links there would be followed by runsc, too, which mounts its kernel's root at one of them.
    into = [(at, to) for at, to in found["links"] if to.startswith(found["place"])]
    found["links"] = [each for each in found["links"] if each not in into]
    given = (list(paths), list(libraries), guest, seccomp.program(shared_memory=shared_memory))
    boot = f"PATHS, LIBRARIES, UID, FILTER = {given!r}\n{_BOOTSTRAP}"
    spec = specification(boot, root=root, found=found, into=into)
    source = Path(__file__).with_name("program.py").read_bytes()
    found["files"] += [
        (f"{_BUNDLE}/config.json", json.dumps(spec).encode()),
        (f"{_PROGRAM}/program.py", source),
    ]
    if not any(os.path.commonpath((runsc, target)) == target for _, target in found["mounts"]):
        found["mounts"].append((runsc, runsc))
    return {
        **found,
        "isolated": True,
        "root": root,
        "uid": guest,
        "gid": guest,
        "network": False,
        "filter": b"",
        "paths": [],
        "folders": [at for at, _ in into],
        "state": _STATE,
        "runsc": runsc,
    }


def specification(
    boot: str, *, root: bool, found: dict[str, Any], into: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return the OCI configuration of a program's container: the slot's root and scratch.

    As in a jail, what is imported ahead may be readable to root only: its process is root of that
    kernel until then, and may do no more with it than become another.

    Limits that vary from run to run the program's process takes on itself, as in a jail: to the
    kernel there, they are a process's own as anywhere.
    """

    place = found["place"]

    def covered(folder: str) -> dict[str, Any]:
        return {
            "destination": folder,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["ro", "nosuid", "nodev", "noexec", "mode=0555"],
        }

    def scratch(folder: str, source: str) -> dict[str, Any]:
        options = ["rw", "nosuid", "nodev"]
        return {"destination": folder, "type": "bind", "source": source, "options": options}

    return {
        "ociVersion": "1.0.0",
        "hostname": "jail",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [layout.interpreter(), "-I", "-S", "-u", "-X", "utf8", "-c", boot],
            "env": [f"{name}={value}" for name, value in found["environment"].items()],
            "cwd": place,
            "capabilities": {
                name: ["CAP_SETUID", "CAP_SETGID"] if root else []
                for name in ("bounding", "effective", "permitted")
            },
            "noNewPrivileges": True,
            "rlimits": [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}],
        },
        "root": {"path": "/", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "devtmpfs", "source": "devtmpfs", "options": ["ro"]},
            covered("/run"),
            covered("/var"),
            scratch(place, place),
            *(scratch(*each) for each in into),
        ],
        "linux": {
            "namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "uts", "network")]
        },
    }


class Runsc(Zygote):
    """A zygote whose children are sandboxes of gVisor: booted ahead, to wait for their program.

    All processes of a sandbox (runsc, its kernel, its file server, the stubs that run the
    program's code) are in the child's pid namespace, and end with its init.
    """

    kind: Start = "cold"
    child_cpu_s = 0.5
    child_bytes = 48 * 1024 * 1024
    _first: Child | None = None

    async def start(self) -> None:
        """Start it and boot a first sandbox, which is the next one that is asked for.

        Raises:
            SandboxUnavailableError: if it cannot be; the message says what failed.
        """
        await super().start()
        try:
            self._first = await self.fork((1 << 20, 64))
        except OSError as error:
            await self.close()
            raise SandboxUnavailableError(str(error), tier="gvisor") from error

    async def fork(self, sizes: tuple[int, int]) -> Child:
        """Boot a sandbox and return it when it waits for a program.

        Raises:
            OSError: if it could not be booted; what runsc said is in it.
            SandboxUnavailableError: if the zygote is gone.
        """
        first, self._first = self._first, None
        child = first or await super().fork(sizes)
        try:
            if first is None:
                await self._boot(child)
            elif first.sizes != sizes:
                await self.resize(first, sizes)
        except BaseException:
            child.close()
            raise
        return child

    async def close(self) -> None:
        """End it and all its sandboxes, and remove its cgroup."""
        first, self._first = self._first, None
        if first is not None:
            first.close()
        await super().close()

    async def _boot(self, child: Child) -> None:
        task, err = child.task, child.err
        up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look() -> None:
            if (task.closed or task.total > 1) and not up.done():
                up.set_result(None)

        # The child says that it begins, then the program's process that it is ready.
        task.most, err.most = 2, _ERROR_BYTES
        task.listener = look
        task.watch()
        content = marshal.dumps(("exec", self._command(), {"PATH": os.defpath}, {}, []))
        child.send(len(content).to_bytes(8, "little") + content)
        try:
            # Not wait_for, which before Python 3.12 may take a cancellation for nothing.
            async with asyncio.timeout(_BOOT_S):
                await up
        except TimeoutError:
            raise OSError(f"runsc was not ready after {_BOOT_S:g} s") from None
        if bytes(task.content[1:]) != _READY:
            raise OSError(await _said(child))
        task.listener = None
        for each in (task, child.out, err):
            each.content.clear()
            each.total = 0

    def _command(self) -> list[str]:
        rootless = () if self._config["root"] else ("-rootless",)
        return [
            self._config["runsc"],
            *("-root", _STATE, "-network=none", "-ignore-cgroups", *rootless),
            *("run", "-bundle", _BUNDLE, "sandbox"),
        ]

    def _told(self, message: list[Any], fds: list[int]) -> None:
        if message[0] == "ended":
            code = os.waitstatus_to_exitcode(message[2])
            if _SIGNALLED < code <= _SIGNALLED + _MOST_SIGNALS:
                message[2] = code - _SIGNALLED
        super()._told(message, fds)


async def _said(child: Child) -> str:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await asyncio.shield(child.over)
    while child.err.read():
        pass
    lines = bytes(child.err.content).decode(errors="replace").strip().splitlines()
    return f"runsc: {lines[-1][:500]}" if lines else "runsc ended before it was ready"
