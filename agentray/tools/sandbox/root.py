"""Build the root that a slot's zygote lives in, read-only and no larger than needed, and go there."""

# Without pathlib, which takes longer to import and to use than all else here.
# ruff: noqa: PTH102, PTH103, PTH112, PTH120, PTH211

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


def enter(config: dict[str, Any]) -> None:
    """Move this process into namespaces and a root of its own, for good.

    ``config``: ``root`` (whether the caller is), ``mounts`` (source and target), ``links``,
    ``files``, ``devices``, ``network`` (the host's).
    """
    _namespaces(config)
    kernel.private_mounts()
    # Before anything is mounted over what they may lie under.
    trees = [(kernel.copy_tree(source.encode()), target) for source, target in config["mounts"]]
    devices = [(kernel.copy_tree(each.encode()), each) for each in config["devices"]]
    shown = not config["root"] or "proc" in config["without"]
    proc = kernel.copy_tree(b"/proc") if shown else -1
    # A user namespace knows no other owner than its own.
    owner = 0 if config["root"] else config["uid"]
    base = kernel.tmpfs(_ROOT_BYTES, _ROOT_FILES, uid=owner, gid=owner)
    kernel.attach(base, _AT)
    _furnish(config)
    for tree, target in trees:
        kernel.restrict(tree, _READ_ONLY | kernel.MOUNT_NODEV)
        _put(tree, target)
    for tree, target in devices:
        kernel.restrict(tree, _READ_ONLY | kernel.MOUNT_NOEXEC)
        _put(tree, target)
    if proc >= 0:
        # A user namespace may mount a new /proc only where a whole one is visible.
        _put(proc, "/proc")
    kernel.switch_root(_AT)
    kernel.restrict(base, _READ_ONLY | kernel.MOUNT_NODEV, recursive=False)
    os.close(base)
    _harden()


def _namespaces(config: dict[str, Any]) -> None:
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    flags |= kernel.CLONE_NEWCGROUP
    if not config["network"]:
        flags |= kernel.CLONE_NEWNET
    if not config["root"]:
        uid, gid = os.getuid(), os.getgid()
        flags |= kernel.CLONE_NEWUSER
        kernel.unshare(flags)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{config['uid']} {uid} 1")
        _write("/proc/self/gid_map", f"{config['gid']} {gid} 1")
    else:
        kernel.unshare(flags)
    kernel.set_hostname(b"jail")


def _write(path: str, content: str) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, content.encode())
    finally:
        os.close(file)


def _furnish(config: dict[str, Any]) -> None:
    at = _AT.decode()
    for folder in ("proc", "work", "dev", "etc", "run", "var"):
        os.mkdir(f"{at}/{folder}", 0o755)
    for link, target in config["links"]:
        os.makedirs(os.path.dirname(at + link), 0o755, exist_ok=True)
        os.symlink(target, at + link)
    for path, content in config["files"]:
        os.makedirs(os.path.dirname(at + path), 0o755, exist_ok=True)
        file = os.open(at + path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(file, content)
        os.close(file)


def _put(tree: int, target: str) -> None:
    path = _AT.decode() + target
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    if os.path.isdir(f"/proc/self/fd/{tree}"):
        os.makedirs(path, 0o755, exist_ok=True)
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
    kernel.attach(tree, path.encode())
    os.close(tree)


def _harden() -> None:
    """Do once what all children inherit."""
    kernel.drop_bounding_set()
    kernel.no_new_privileges()
    os.umask(0o022)
    for name in ("CORE", "MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO"):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (0, 0))
