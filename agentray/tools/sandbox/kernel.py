"""Ask the kernel for what Python has no names for: namespaces, mounts, capabilities, filters.

The jail's processes import this with nothing of agentray beside it: the standard library only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

__all__ = [
    "AT_RECURSIVE",
    "CLONE_NEWCGROUP",
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWUSER",
    "CLONE_NEWUTS",
    "MOUNT_NODEV",
    "MOUNT_NOEXEC",
    "MOUNT_NOSUID",
    "MOUNT_RDONLY",
    "attach",
    "call",
    "clone",
    "close_from",
    "copy_tree",
    "drop_bounding_set",
    "drop_capabilities",
    "filter_calls",
    "no_new_privileges",
    "private_mounts",
    "proc_mount",
    "prctl",
    "restrict",
    "set_hostname",
    "switch_root",
    "tmpfs",
    "tmpfs_resize",
    "unshare",
]

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MOUNT_RDONLY = 0x1
MOUNT_NOSUID = 0x2
MOUNT_NODEV = 0x4
MOUNT_NOEXEC = 0x8

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 0x4
FSPICK_EMPTY_PATH = 0x8
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7
CLOEXEC = 0x80000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

# Of x86_64, the one architecture that the filter is written for.
SYS_CLONE = 56
SYS_CAPSET = 126
SYS_PIVOT_ROOT = 155
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_FSOPEN = 430
SYS_FSCONFIG = 431
SYS_FSMOUNT = 432
SYS_FSPICK = 433
SYS_CLOSE_RANGE = 436
SYS_MOUNT_SETATTR = 442

MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
SIGCHLD = 17

# The interpreter's lock stays held: a fork must not leave it to a thread that the child lacks.
_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_before_fork: Callable[[], Any] = ctypes.pythonapi.PyOS_BeforeFork
_after_fork_in_child: Callable[[], Any] = ctypes.pythonapi.PyOS_AfterFork_Child
_after_fork_in_parent: Callable[[], Any] = ctypes.pythonapi.PyOS_AfterFork_Parent


def call(what: str, number: int, *arguments: int | bytes | Any) -> int:
    """Make a system call; an error names ``what`` was tried."""
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    found = int(_syscall(ctypes.c_long(number), *words))
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return found


def _checked(what: str, found: int) -> int:
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return found


def clone(flags: int) -> int:
    """Fork into new namespaces: one call instead of ``unshare`` and ``fork``.

    The C library does not know of this fork: a thread id that it keeps is the parent's in the
    child, until the child forks through it.
    """
    _before_fork()
    pid = int(_syscall(SYS_CLONE, ctypes.c_long(flags | SIGCHLD), 0, 0, 0, 0))
    if pid == 0:
        _after_fork_in_child()
        return 0
    number = ctypes.get_errno()
    _after_fork_in_parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def prctl(what: str, option: int, *arguments: int | bytes) -> None:
    """Change how the kernel treats this process."""
    words = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    _checked(what, _libc.prctl(ctypes.c_int(option), *words))


def no_new_privileges() -> None:
    """Let no program, setuid ones neither, give this process or its children more rights."""
    prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Make sure that no capability can come back by executing a file."""
    for capability in range(64):
        try:
            prctl("capbset_drop", PR_CAPBSET_DROP, capability)
        except OSError:
            return


def drop_capabilities() -> None:
    """Give up every capability, in all sets but the bounding one."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    call("capset", SYS_CAPSET, ctypes.byref(header), ctypes.byref(nothing))


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def filter_calls(code: bytes) -> None:
    """Refuse the system calls that a BPF program refuses, from now on and for all children."""
    program = _Filter(len(code) // 8, code)
    address = ctypes.addressof(program)
    prctl("seccomp", PR_SET_SECCOMP, 2, address)


def close_from(first: int) -> None:
    """Close every descriptor from ``first`` up."""
    call("close_range", SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0)


def set_hostname(name: bytes) -> None:
    _checked("sethostname", _libc.sethostname(name, ctypes.c_size_t(len(name))))


def private_mounts() -> None:
    """Let no mount made here be seen elsewhere, nor the other way round."""
    none = ctypes.c_char_p(None)
    flags = ctypes.c_ulong(MS_REC | MS_PRIVATE)
    _checked("private mounts", _libc.mount(b"none", b"/", none, flags, none))


def copy_tree(path: bytes) -> int:
    """Return a descriptor of a detached copy of the mounts at ``path``."""
    flags = OPEN_TREE_CLONE | AT_RECURSIVE | CLOEXEC
    return call(f"open_tree {path!r}", SYS_OPEN_TREE, AT_FDCWD, path, flags)


def restrict(mount: int, attributes: int, *, recursive: bool = True) -> None:
    """Add attributes (``MOUNT_RDONLY`` …) to a mount, and those below it."""
    words = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    call("mount_setattr", SYS_MOUNT_SETATTR, mount, b"", flags, ctypes.byref(words), 32)


def attach(mount: int, path: bytes) -> None:
    """Put a detached mount at ``path``."""
    call(
        f"move_mount {path!r}", SYS_MOVE_MOUNT, mount, b"", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH
    )


def _new_mount(kind: bytes, options: dict[bytes, bytes | None], attributes: int) -> int:
    system = call(f"fsopen {kind!r}", SYS_FSOPEN, kind, 1)
    try:
        for name, value in options.items():
            command = FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING
            words = (name, ctypes.c_char_p(value), 0)
            call(f"{kind!r} {name!r}", SYS_FSCONFIG, system, command, *words)
        nothing = ctypes.c_char_p(None)
        call(f"create {kind!r}", SYS_FSCONFIG, system, FSCONFIG_CMD_CREATE, nothing, nothing, 0)
        return call(f"fsmount {kind!r}", SYS_FSMOUNT, system, 1, attributes)
    finally:
        os.close(system)


def tmpfs(size_bytes: int, files: int, *, mode: bytes = b"0755", uid: int = 0, gid: int = 0) -> int:
    """Return a descriptor of a detached tmpfs of a limited size and number of files."""
    options: dict[bytes, bytes | None] = {
        b"size": b"%d" % size_bytes,
        b"nr_inodes": b"%d" % files,
        b"mode": mode,
        b"uid": b"%d" % uid,
        b"gid": b"%d" % gid,
    }
    return _new_mount(b"tmpfs", options, MOUNT_NOSUID | MOUNT_NODEV)


def tmpfs_resize(mount: int, size_bytes: int, files: int) -> None:
    """Give a tmpfs other limits, wherever it is mounted."""
    system = call("fspick", SYS_FSPICK, mount, b"", FSPICK_EMPTY_PATH | 1)
    try:
        for name, value in ((b"size", size_bytes), (b"nr_inodes", files)):
            words = (name, b"%d" % value, 0)
            call("resize", SYS_FSCONFIG, system, FSCONFIG_SET_STRING, *words)
        nothing = ctypes.c_char_p(None)
        call("resize", SYS_FSCONFIG, system, FSCONFIG_CMD_RECONFIGURE, nothing, nothing, 0)
    finally:
        os.close(system)


def proc_mount(*, processes_only: bool) -> int:
    """Return a descriptor of a read-only ``/proc`` of this pid namespace."""
    options: dict[bytes, bytes | None] = {b"subset": b"pid"} if processes_only else {}
    attributes = MOUNT_RDONLY | MOUNT_NOSUID | MOUNT_NODEV | MOUNT_NOEXEC
    return _new_mount(b"proc", options, attributes)


def switch_root(path: bytes) -> None:
    """Make ``path``, a mount, the root, and let go of the old one."""
    os.chdir(path)
    call("pivot_root", SYS_PIVOT_ROOT, b".", b".")
    _checked("umount of the old root", _libc.umount2(b".", ctypes.c_int(MNT_DETACH)))
    os.chdir(b"/")
