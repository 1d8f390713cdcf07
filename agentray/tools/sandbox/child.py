"""Be the init of one run: jail this process, fork the one that runs the program, and outlast it.

The init counts what its tree uses, ends all of it at a limit or when the program ends, reports,
and sends what the program left in its scratch. The program can neither signal it, being in its pid
namespace, nor look into it, for it is not dumpable.
"""

# Without pathlib, which takes longer to import and to use than all else here.
# ruff: noqa: PTH101, PTH102, PTH109, PTH123, PTH208

from __future__ import annotations

import os
import resource
import signal
import stat
import struct
from typing import Any

from agentray.tools.sandbox import census, kernel

__all__ = ["ENTRY", "FOLDER", "ORDER", "REPORT", "Why", "begin", "trial"]

REPORT = struct.Struct("<BiddQB")
"""Of an init: why it ended the tree, the program's wait status, seconds of user and of system
time, the peak of memory in bytes, and whether the scratch is full. Entries of the scratch follow
if it is wanted, the last one nameless."""

ENTRY = struct.Struct("<HHqQ")
"""Of a scratch entry: length of its name, mode, time of modification, length of its content."""

ORDER = struct.Struct("<dQQB")
"""To an init, before its program: seconds of CPU, bytes of memory (0: a cgroup limits them), bytes
of scratch, whether the scratch is wanted."""

FOLDER = 0xFFFFFFFFFFFFFFFF
"""The length of a folder's content."""


class Why:
    """Why a tree was ended: because the program did, at a limit, or because it was told to."""

    ENDED, CPU, MEMORY, STOPPED = range(4)


_TICK_S = 0.05
_DEEPEST = 64
_LONGEST_NAME = 4096
_TASK, _STATUS = 3, 4


def trial(config: dict[str, Any]) -> str:
    """Find out, in a child, how ``/proc`` can be mounted; the answer goes into ``config``.

    ``pid``: processes only; ``all``; or empty, where the machine's own is not whole and the
    kernel therefore refuses a new one.

    Raises:
        OSError: if a child cannot be jailed at all.
    """
    for kind in ("pid", "all", ""):
        read, write = os.pipe()
        pid = kernel.clone(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS)
        if pid == 0:
            try:
                if kind:
                    kernel.attach(kernel.proc_mount(processes_only=kind == "pid"), b"/proc")
                _give_up(config)
            except OSError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        said = os.read(read, 1000).decode(errors="replace")
        os.close(read)
        os.waitpid(pid, 0)
        if not said:
            config["proc"] = kind
            return kind
    raise OSError(said)


def begin(config: dict[str, Any], fds: tuple[int, int, int, int], scratch: int) -> int:
    """Jail this process and fork the program's.

    Returns, in the program's process only, the descriptor that the program comes on; the init
    never returns. ``fds``: of the program, of its stdout and stderr, and of the reports.
    """
    status = fds[3]
    try:
        if config["isolated"]:
            _mounts(config, scratch)
        else:
            _folder(config["scratch"])
            kernel.prctl("subreaper", kernel.PR_SET_CHILD_SUBREAPER, 1)
        _descriptors(fds)
        status = _STATUS
        _give_up(config)
        program = os.fork()
    except BaseException as error:  # noqa: BLE001
        os.write(status, b"\xff" + str(error).encode())
        os._exit(1)
    if program == 0:
        os.close(_STATUS)
        kernel.prctl("dumpable", kernel.PR_SET_DUMPABLE, 1)
        kernel.prctl("death signal", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        return _TASK
    try:
        os.dup2(0, 1)
        os.dup2(0, 2)
        os.close(_TASK)
        _watch(program)
        if not config["isolated"]:
            import shutil

            shutil.rmtree(os.getcwd(), ignore_errors=True)
    finally:
        os._exit(0)


def _mounts(config: dict[str, Any], scratch: int) -> None:
    kernel.attach(scratch, b"/work")
    os.mkdir(b"/work/.tmp", 0o700)
    os.chown(b"/work/.tmp", config["uid"], config["gid"])
    os.chdir(b"/work")
    if config["proc"]:
        kernel.attach(kernel.proc_mount(processes_only=config["proc"] == "pid"), b"/proc")


def _folder(parent: str) -> None:
    import tempfile

    os.chdir(tempfile.mkdtemp(dir=parent))


def _descriptors(fds: tuple[int, int, int, int]) -> None:
    """Leave stdin (nothing), stdout, stderr, the program's as 3 and the reports' as 4."""
    task, out, err, status = fds
    # First up and out of the way: a target may be the number of another one.
    high = [os.dup(each) for each in (out, err, task, status)]
    for target, each in enumerate(high, 1):
        os.dup2(each, target, inheritable=target < _TASK)
    kernel.close_from(_STATUS + 1)


def _give_up(config: dict[str, Any]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD, signal.SIGUSR1))
    if config["isolated"] and "user" not in config["without"]:
        if config["root"]:
            os.setgroups([])
            os.setresgid(config["gid"], config["gid"], config["gid"])
            os.setresuid(config["uid"], config["uid"], config["uid"])
        kernel.drop_capabilities()
    # After the change of uid, which resets both.
    kernel.prctl("death signal", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl("not dumpable", kernel.PR_SET_DUMPABLE, 0)
    if config["filter"]:
        kernel.filter_calls(config["filter"])


def _watch(program: int) -> None:
    """Wait for the program's end or a limit; end what is left of it, and report."""
    order = os.read(_STATUS, ORDER.size)
    if len(order) != ORDER.size:
        return
    cpu_s, memory_bytes, scratch_bytes, keep = ORDER.unpack(order)
    seen = census.Census()
    why, code = Why.ENDED, None
    while why == Why.ENDED:
        told = signal.sigtimedwait((signal.SIGCHLD, signal.SIGUSR1), _TICK_S)
        code = _reap(program)
        if code is not None:
            break
        # Signals from outside the namespace, the supervisor's, come without a pid.
        if told is not None and told.si_signo == signal.SIGUSR1 and _from_outside(told.si_pid):
            why = Why.STOPPED
        elif told is None:
            used_s, used_bytes = seen.count(memory_bytes)
            if used_s > cpu_s:
                why = Why.CPU
            elif 0 < memory_bytes < used_bytes:
                why = Why.MEMORY
    census.end_all()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = max(seen.peak_bytes, used.ru_maxrss * 1024)
    _send(REPORT.pack(why, code or 0, used.ru_utime, used.ru_stime, peak, _full()))
    if keep:
        _walk(".", "", [scratch_bytes], 0)
        _send(ENTRY.pack(0, 0, 0, 0))


def _from_outside(pid: int) -> bool:
    return pid == 0 or os.getpid() != 1


def _reap(program: int) -> int | None:
    """Reap what has ended; return the program's wait status if it is among it."""
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == program:
            return code
        if pid == 0:
            return None


def _full() -> bool:
    found = os.statvfs(".")
    return found.f_bfree == 0 or found.f_ffree == 0


def _send(content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(_STATUS, view) :]


def _walk(folder: str, prefix: str, left: list[int], depth: int) -> None:
    """Send folders and regular files of the scratch as entries: nothing else, no links."""
    os.chmod(folder, 0o700)
    for name in sorted(os.listdir(folder)):
        path, shown = f"{folder}/{name}", f"{prefix}{name}"
        encoded = shown.encode(errors="surrogateescape")
        if shown == ".tmp" or len(encoded) > _LONGEST_NAME:
            continue
        facts = os.lstat(path)
        mode, modified = stat.S_IMODE(facts.st_mode) & 0o777, int(facts.st_mtime)
        if stat.S_ISDIR(facts.st_mode) and depth < _DEEPEST:
            _send(ENTRY.pack(len(encoded), mode, modified, FOLDER) + encoded)
            _walk(path, shown + "/", left, depth + 1)
        elif stat.S_ISREG(facts.st_mode) and facts.st_size <= left[0]:
            left[0] -= facts.st_size
            os.chmod(path, 0o600)
            _send(ENTRY.pack(len(encoded), mode, modified, facts.st_size) + encoded)
            with open(path, "rb") as file:
                while part := file.read(1 << 18):
                    _send(part)
