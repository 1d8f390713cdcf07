"""Ask the kernel for what Python has no names for: namespaces, mounts, capabilities, filters.

The jail's processes import this with nothing of agentray beside it: the standard library only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

__all__ = [
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
    "Prepared",
    "Tmpfs",
    "adopt",
    "attach",
    "become",
    "clone",
    "clone_init",
    "close_from",
    "copy_tree",
    "die_with_parent",
    "drop_bounding_set",
    "drop_capabilities",
    "enter",
    "filter_calls",
    "keep_capabilities",
    "no_new_privileges",
    "private_mounts",
    "proc_mount",
    "proc_tree",
    "restrict",
    "set_hostname",
    "show",
    "switch_root",
    "unshare",
    "use_capabilities",
]

CLONE_VM = 0x00000100
CLONE_FILES = 0x00000400
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
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7
CLOEXEC = 0x80000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

# Of x86_64, the one architecture that the filter is written for.
SYS_CLONE = 56
SYS_SETGROUPS = 116
SYS_SETRESUID = 117
SYS_SETRESGID = 119
SYS_PRCTL = 157
SYS_MOUNT = 165
SYS_CAPGET = 125
SYS_CAPSET = 126
SYS_PIVOT_ROOT = 155
SYS_SETNS = 308
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_FSOPEN = 430
SYS_FSCONFIG = 431
SYS_FSMOUNT = 432
SYS_FSPICK = 433
SYS_CLOSE_RANGE = 436
SYS_MOUNT_SETATTR = 442

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
SIGCHLD = 17
SIGKILL = 9

# The interpreter's lock stays held: a fork must not leave it to a thread that the child lacks.
_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_before_fork: Callable[[], Any] = ctypes.pythonapi.PyOS_BeforeFork
_after_fork_in_child: Callable[[], Any] = ctypes.pythonapi.PyOS_AfterFork_Child
_after_fork_in_parent: Callable[[], Any] = ctypes.pythonapi.PyOS_AfterFork_Parent


_word = ctypes.c_long


class Prepared:
    """A system call whose arguments are made once: forked children have few pages to copy.

    ``first``, where it is given as None, is given at each call.
    """

    __slots__ = ("_arguments", "_first", "_what")

    def __init__(self, what: str, number: int, *arguments: int | bytes | Any | None) -> None:
        words = [_word(each) if isinstance(each, int) else each for each in arguments]
        self._what = what
        self._first = _word(0)
        self._arguments = (
            _word(number),
            *(self._first if each is None else each for each in words),
        )

    def __call__(self, first: int = 0) -> int:
        self._first.value = first
        found: int = _syscall(*self._arguments)
        if found < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{self._what}: {os.strerror(number)}")
        return found


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
    pid: int = _syscall(SYS_CLONE, _word(flags | SIGCHLD), 0, 0, 0, 0)
    if pid == 0:
        _after_fork_in_child()
        return 0
    number = ctypes.get_errno()
    _after_fork_in_parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


# Nothing of it is used but where a call returns to, which is the same for all.
_stack = ctypes.create_string_buffer(64 * 1024)
_stack_top = ctypes.c_void_p((ctypes.addressof(_stack) + len(_stack)) & ~0xFF)
_pause = ctypes.cast(_libc.pause, ctypes.c_void_p)


def clone_init(namespaces: int) -> int:
    """Make a process in new namespaces that does nothing for good, and return its pid.

    It shares this process's memory and descriptors, as a thread would, and costs next to nothing;
    all that it runs is the C library's ``pause``. As the init of a pid namespace it keeps the
    namespace alive, and its end is the end of all in there.
    """
    flags = ctypes.c_int(namespaces | CLONE_VM | CLONE_FILES | SIGCHLD)
    return _checked("clone of an init", _libc.clone(_pause, _stack_top, flags, None))


def enter(namespaces: int) -> Prepared:
    """Prepare to move into namespaces of a process, given by its pidfd: for pids, the children."""
    return Prepared("setns", SYS_SETNS, None, namespaces)


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def prctl(what: str, option: int, *arguments: int | Any) -> Prepared:
    """Prepare a change of how the kernel treats this process."""
    return Prepared(what, SYS_PRCTL, option, *arguments, *([0] * (4 - len(arguments))))


no_new_privileges = prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
"""Let no program, setuid ones neither, give this process or its children more rights."""

die_with_parent = prctl("death signal", PR_SET_PDEATHSIG, SIGKILL)
"""End this process when its parent ends; a change of uid resets it."""

show = prctl("dumpable", PR_SET_DUMPABLE, 1)
"""Let a process of its own uid see what /proc tells of it; a change of uid hides that."""

adopt = prctl("subreaper", PR_SET_CHILD_SUBREAPER, 1)
"""Make this process the parent of what its descendants leave behind."""


def drop_bounding_set() -> None:
    """Make sure that no capability can come back by executing a file."""
    for capability in range(64):
        try:
            prctl("capbset_drop", PR_CAPBSET_DROP, capability)()
        except OSError:
            return


_NO_CAPABILITIES = ((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
drop_capabilities = Prepared(
    "capset", SYS_CAPSET, *(ctypes.byref(each) for each in _NO_CAPABILITIES)
)
"""Give up every capability, in all sets but the bounding one."""

keep_capabilities = prctl("keep capabilities", PR_SET_KEEPCAPS, 1)
"""Let a change of uid take none away: for tests of what the lack of them holds back."""


def use_capabilities() -> Prepared:
    """Prepare to have all capabilities effective that this process has now."""
    found = (ctypes.c_uint32 * 6)()
    Prepared("capget", SYS_CAPGET, ctypes.byref(_NO_CAPABILITIES[0]), ctypes.byref(found))()
    found[0], found[3] = found[1], found[4]
    found[2] = found[5] = 0
    return Prepared("capset", SYS_CAPSET, ctypes.byref(_NO_CAPABILITIES[0]), ctypes.byref(found))


def become(uid: int, gid: int) -> tuple[Prepared, ...]:
    """Prepare to take a uid and gid, and give up all groups."""
    return (
        Prepared("setgroups", SYS_SETGROUPS, 0, ctypes.c_char_p(None)),
        Prepared("setresgid", SYS_SETRESGID, gid, gid, gid),
        Prepared("setresuid", SYS_SETRESUID, uid, uid, uid),
    )


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def filter_calls(code: bytes) -> Prepared:
    """Prepare to refuse the calls that a BPF program refuses, for good and for all children."""
    return prctl("seccomp", PR_SET_SECCOMP, 2, ctypes.pointer(_Filter(len(code) // 8, code)))


def close_from(first: int) -> Prepared:
    """Prepare to close every descriptor from ``first`` up."""
    return Prepared("close_range", SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0)


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


def attach(path: bytes) -> Prepared:
    """Prepare to put a detached mount, given by its descriptor, at ``path``."""
    words = (None, b"", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH)
    return Prepared(f"move_mount {path!r}", SYS_MOVE_MOUNT, *words)


class Tmpfs:
    """A tmpfs of a limited size and number of files (0: unlimited) that can be made many times."""

    def __init__(self, size_bytes: int, files: int, *, uid: int, gid: int) -> None:
        none = ctypes.c_char_p(None)
        options = {b"mode": b"0755", b"uid": b"%d" % uid, b"gid": b"%d" % gid}
        sizes = {b"size": b"%d" % size_bytes, b"nr_inodes": b"%d" % files}
        self._open = Prepared("fsopen", SYS_FSOPEN, b"tmpfs", 1)
        self._pick = Prepared("fspick", SYS_FSPICK, None, b"", FSPICK_EMPTY_PATH | 1)
        self._own = [self._option(*each) for each in options.items()]
        self._sizes = [self._option(*each) for each in sizes.items()]
        self._create, self._change = (
            Prepared("fsconfig", SYS_FSCONFIG, None, command, none, none, 0)
            for command in (FSCONFIG_CMD_CREATE, FSCONFIG_CMD_RECONFIGURE)
        )
        attributes = MOUNT_NOSUID | MOUNT_NODEV
        self._mount = Prepared("fsmount", SYS_FSMOUNT, None, 1, attributes)

    @staticmethod
    def _option(name: bytes, value: bytes) -> Prepared:
        what = f"tmpfs {name.decode()}"
        return Prepared(what, SYS_FSCONFIG, None, FSCONFIG_SET_STRING, name, value, 0)

    def make(self) -> int:
        """Return a descriptor of a new one, mounted nowhere."""
        system = self._open()
        try:
            for option in self._own:
                option(system)
            for option in self._sizes:
                option(system)
            self._create(system)
            return self._mount(system)
        finally:
            os.close(system)

    def resize(self, mount: int) -> None:
        """Give an existing one these limits, wherever it is mounted."""
        system = self._pick(mount)
        try:
            for option in self._sizes:
                option(system)
            self._change(system)
        finally:
            os.close(system)


def proc_tree() -> int:
    """Return a descriptor of a detached ``/proc`` of this pid namespace."""
    nothing = ctypes.c_char_p(None)
    system = call("fsopen proc", SYS_FSOPEN, b"proc", 1)
    try:
        call("create proc", SYS_FSCONFIG, system, FSCONFIG_CMD_CREATE, nothing, nothing, 0)
        attributes = MOUNT_NOSUID | MOUNT_NODEV | MOUNT_NOEXEC
        return call("fsmount proc", SYS_FSMOUNT, system, 1, attributes)
    finally:
        os.close(system)


def proc_mount(*, processes_only: bool, writable: bool = False) -> Prepared:
    """Prepare to mount a read-only ``/proc`` of this pid namespace at ``/proc``."""
    flags = (0 if writable else MS_RDONLY) | MS_NOSUID | MS_NODEV | MS_NOEXEC
    options = b"subset=pid" if processes_only else ctypes.c_char_p(None)
    return Prepared("mount /proc", SYS_MOUNT, b"proc", b"/proc", b"proc", flags, options)


def switch_root(path: bytes) -> None:
    """Make ``path``, a mount, the root, and let go of the old one."""
    os.chdir(path)
    call("pivot_root", SYS_PIVOT_ROOT, b".", b".")
    _checked("umount of the old root", _libc.umount2(b".", ctypes.c_int(MNT_DETACH)))
    os.chdir(b"/")
