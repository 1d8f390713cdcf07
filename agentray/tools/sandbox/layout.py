"""Say what a jail's root consists of: which of the machine's folders are there, read-only."""

# The paths here are of strings that the jail's processes take.
# ruff: noqa: PTH100, PTH110, PTH112, PTH114, PTH115

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["interpreter", "layout"]

# Where programs run: the first below which nothing of the operator's is to be seen.
_PLACES = ("/work", "/scratch", "/jail")
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


def layout(paths: Sequence[str], uid: int) -> dict[str, Any]:
    """Return the mounts, links, files and devices of a root that the interpreter works in.

    With them the ``place`` where programs run, and their ``environment``.
    """
    # Where a link in it leads has to be there too.
    paths = [each for path in paths for each in (os.path.abspath(path), os.path.realpath(path))]
    place = next(each for each in _PLACES if not any(_below(path, each) for path in paths))
    temporary = f"{place}/.tmp"
    links = [("/dev/shm", temporary), ("/dev/fd", "/proc/self/fd")]
    links += [(f"/dev/{name}", f"/proc/self/fd/{n}") for n, name in enumerate(_STREAMS)]
    folders = ["/usr/local/bin", "/usr/bin", "/bin", str(Path(interpreter()).parent)]
    environment = {"PATH": ":".join(dict.fromkeys(folders)), "HOME": place, "LANG": "C.UTF-8"}
    if any(_below(path, "/tmp") for path in paths):
        # It is theirs then, and cannot be a link to where there is room.
        environment["TMPDIR"] = temporary
    else:
        links.append(("/tmp", temporary))
    mounts: list[tuple[str, str]] = []
    for top in _TOP:
        if os.path.islink(top):
            links.append((top, os.readlink(top)))
        elif os.path.isdir(top):
            mounts.append((top, top))
    wanted = [os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)]
    wanted += [each for each in _ETC if os.path.exists(each)]
    wanted += paths
    for each in sorted(set(wanted)):
        if not any(_below(each, target) for _, target in mounts):
            mounts.append((each, each))
    return {
        "mounts": mounts,
        "links": links,
        "files": _files(place, uid),
        "devices": [each for each in _DEVICES if os.path.exists(each)],
        "place": place,
        "environment": environment,
    }


_STREAMS = ("stdin", "stdout", "stderr")


def _below(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _files(place: str, uid: int) -> list[tuple[str, bytes]]:
    user = f"jail:x:{uid}:{uid}::{place}:/bin/sh\n"
    return [
        ("/etc/passwd", b"root:x:0:0::/:/bin/false\n" + user.encode()),
        ("/etc/group", f"root:x:0:\njail:x:{uid}:\n".encode()),
        ("/etc/hosts", b"127.0.0.1 localhost jail\n"),
        ("/etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files dns\n"),
    ]
