"""Say what a jail's root consists of: which of the machine's folders are there, read-only."""

# The paths here are of strings that the jail's processes take.
# ruff: noqa: PTH100, PTH110, PTH112, PTH114, PTH115

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["HOME", "environment", "interpreter", "layout"]

HOME = "/work"

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_TOP = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32")
_ETC = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl/certs",
    "/etc/alternatives",
    "/etc/mime.types",
)


def interpreter() -> str:
    """Return the path of the interpreter itself, not of a virtual environment's link to it."""
    found: str = getattr(sys, "_base_executable", "") or sys.executable
    return os.path.realpath(found)


def environment(paths: Sequence[str] = ()) -> dict[str, str]:
    """Return all that a program sees as its environment."""
    folders = ["/usr/local/bin", "/usr/bin", "/bin", str(Path(interpreter()).parent)]
    found = {"PATH": ":".join(dict.fromkeys(folders)), "HOME": HOME, "LANG": "C.UTF-8"}
    if paths:
        found["PYTHONPATH"] = ":".join(paths)
    return found


def layout(paths: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mounts, links, files and devices of a root that the interpreter works in."""
    links = [("/tmp", "work/.tmp"), ("/dev/shm", "/tmp"), ("/dev/fd", "/proc/self/fd")]
    links += [(f"/dev/{name}", f"/proc/self/fd/{n}") for n, name in enumerate(_STREAMS)]
    mounts: list[tuple[str, str]] = []
    for top in _TOP:
        if os.path.islink(top):
            links.append((top, os.readlink(top)))
        elif os.path.isdir(top):
            mounts.append((top, top))
    wanted = [os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)]
    wanted += [each for each in _ETC if os.path.exists(each)]
    wanted += [os.path.abspath(each) for each in paths]
    for each in sorted(set(wanted)):
        if not any(_below(each, target) for _, target in mounts):
            mounts.append((each, each))
    return {
        "mounts": mounts,
        "links": links,
        "files": _files(),
        "devices": [each for each in _DEVICES if os.path.exists(each)],
    }


_STREAMS = ("stdin", "stdout", "stderr")


def _below(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _files() -> list[tuple[str, bytes]]:
    return [
        ("/etc/passwd", b"root:x:0:0::/:/bin/false\njail:x:1000:1000::/work:/bin/sh\n"),
        ("/etc/group", b"root:x:0:\njail:x:1000:\n"),
        ("/etc/hosts", b"127.0.0.1 localhost jail\n"),
        ("/etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n"),
    ]
