"""Build the root that a slot's zygote lives in, read-only and no larger than needed; go there."""

# Without pathlib, which takes longer to import and to use than all else here.
# ruff: noqa: PTH101, PTH102, PTH103, PTH112, PTH116, PTH120, PTH211

from __future__ import annotations

import os
import resource
from typing import Any

from agentray.tools.sandbox import kernel

__all__ = ["enter"]

_ROOT_BYTES = 4 * 1024 * 1024
_ROOT_FILES = 4096
_READ_ONLY = kernel.MOUNT_RDONLY | kernel.MOUNT_NOSUID
_AT = b"/tmp"


def enter(config: dict[str, Any]) -> int:
    """Move this process into namespaces and a root of its own, for good.

    Returns a descriptor of its own ``statm`` in the machine's ``/proc``, or -1: in its root there
    may be none.

    ``config``: ``root`` (whether the caller is), ``mounts`` (source and target), ``links``,
    ``files``, ``devices``, ``network`` (the host's).
    """
    _namespaces(config)
    kernel.private_mounts()
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        statm = -1
    if "root" in config["without"]:
        _open_up(config)
        if (proc := _own_proc()) >= 0:
            kernel.attach(b"/proc")(proc)
        _harden(config)
        return statm
    # Before anything is mounted over what they may lie under.
    trees = [(kernel.copy_tree(source.encode()), target) for source, target in config["mounts"]]
    devices = [(kernel.copy_tree(each.encode()), each) for each in config["devices"]]
    without = config["without"]
    # Without a namespace of pids it is the machine's, which it may only have as it is.
    proc = kernel.copy_tree(b"/proc") if "pid_ns" in without else _own_proc()
    # A user namespace knows no other owner than its own.
    owner = 0 if config["root"] and "readonly_root" not in without else config["uid"]
    base = kernel.Tmpfs(_ROOT_BYTES, _ROOT_FILES, uid=owner, gid=owner).make()
    kernel.attach(_AT)(base)
    _furnish(config)
    for tree, target in trees:
        suid = 0 if "nosuid" in without else kernel.MOUNT_NOSUID
        kernel.restrict(tree, kernel.MOUNT_RDONLY | kernel.MOUNT_NODEV | suid)
        _put(tree, target)
    for tree, target in devices:
        kernel.restrict(tree, _READ_ONLY | kernel.MOUNT_NOEXEC)
        _put(tree, target)
    # For the zygote, which counts by it; children cover it with their own. A user namespace may
    # mount one only where a whole one is visible, too.
    if proc >= 0:
        _put(proc, "/proc")
    kernel.switch_root(_AT)
    if "readonly_root" not in without:
        kernel.restrict(base, _READ_ONLY | kernel.MOUNT_NODEV, recursive=False)
    os.close(base)
    _harden(config)
    return statm


def _namespaces(config: dict[str, Any]) -> None:
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    flags |= kernel.CLONE_NEWCGROUP
    if "pid_ns" not in config["without"]:
        flags |= kernel.CLONE_NEWPID
    if not config["network"]:
        flags |= kernel.CLONE_NEWNET
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(flags if config["root"] else flags | kernel.CLONE_NEWUSER)
    if not config["root"]:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{config['uid']} {uid} 1")
        _write("/proc/self/gid_map", f"{config['gid']} {gid} 1")
    _become_init()
    kernel.set_hostname(b"jail")


def _become_init() -> None:
    """Go on as the init of the new pid namespace: with it, however it ends, all in there does."""
    pid = os.fork()
    if pid:
        # The zygote sees by its socket that its supervisor is gone, if nothing holds it up.
        kernel.die_with_parent()
        # No descriptor is held here: that the zygote is gone is seen by its end of the socket.
        os.closerange(0, 100)
        os.waitpid(pid, 0)
        os._exit(0)
    kernel.die_with_parent()


def _open_up(config: dict[str, Any]) -> None:
    """Where all of the machine is to be seen, let the interpreter be found by others than root."""
    for source, _ in config["mounts"]:
        parts = source.split("/")
        above = ["/".join(parts[:n]) for n in range(2, len(parts) + 1)]
        closed = [
            each for each in above if os.path.isdir(each) and not os.stat(each).st_mode & 0o001
        ]
        if closed:
            tree = kernel.copy_tree(source.encode())
            kernel.attach(closed[0].encode())(kernel.Tmpfs(0, 0, uid=0, gid=0).make())
            os.makedirs(source, exist_ok=True)
            kernel.attach(source.encode())(tree)


def _write(path: str, content: str) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, content.encode())
    finally:
        os.close(file)


def _own_proc() -> int:
    """Return a ``/proc`` of this pid namespace, or -1 where the kernel refuses it."""
    try:
        return kernel.proc_tree()
    except OSError:
        return -1


def _furnish(config: dict[str, Any]) -> None:
    at = _AT.decode()
    own = ("/proc", "/dev", "/etc", "/run", "/var", config["place"], *config.get("folders", ()))
    for folder in own:
        os.mkdir(at + folder, 0o755)
    for link, target in config["links"]:
        os.makedirs(os.path.dirname(at + link), 0o755, exist_ok=True)
        os.symlink(target, at + link)
    for path, content in config["files"]:
        os.makedirs(os.path.dirname(at + path), 0o755, exist_ok=True)
        file = os.open(at + path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(file, content)
        os.close(file)


def _pass_through(folder: str) -> None:
    """Make a folder and those above it: to be gone through, and not to be looked into."""
    if not os.path.isdir(folder):
        _pass_through(os.path.dirname(folder))
        os.mkdir(folder)
        os.chmod(folder, 0o111)  # noqa: S103


def _put(tree: int, target: str) -> None:
    path = _AT.decode() + target
    _pass_through(os.path.dirname(path))
    if os.path.isdir(f"/proc/self/fd/{tree}"):
        os.makedirs(path, 0o755, exist_ok=True)
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
    kernel.attach(path.encode())(tree)
    os.close(tree)


def _harden(config: dict[str, Any]) -> None:
    """Do once what all children inherit."""
    if "capabilities" not in config["without"]:
        kernel.drop_bounding_set()
    if "no_new_privs" not in config["without"]:
        kernel.no_new_privileges()
    os.umask(0o022)
    # Of core dumps 1, not 0: see the filter.
    most = {"CORE": 1, "MEMLOCK": 0, "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0, "SIGPENDING": 256}
    for name, value in most.items():
        number = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)  # noqa: PLW2901
        resource.setrlimit(number, (value, value))
