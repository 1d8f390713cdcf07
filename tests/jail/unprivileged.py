"""Run this interpreter again as a user without any rights: ``python -m tests.jail.unprivileged …``.

What follows goes to the interpreter: ``python -m tests.jail.unprivileged -m pytest tests/jail``.
The user has a uid that nobody else has, no groups and an empty home. The interpreter and the
repository may lie where only root can look (``/root``): within a mount namespace of its own, such
a folder is covered by one that everybody may enter and that holds nothing else but these two. The
machine is left as it is. With ``--covered-proc`` before it, a part of ``/proc`` is covered, as in
most containers: the kernel then gives a user namespace no ``/proc`` of its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path

COVERED = "--covered-proc"

UID = 64_321
"""No account has it, and it is not that of ``nobody``, which stands for every unmapped uid."""

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run the interpreter with the arguments of the command line; return its exit code."""
    covered = sys.argv[1:2] == [COVERED]
    command = [sys.executable, *sys.argv[1 + covered :]]
    if os.getuid() != 0:
        if covered:
            _cover_as_nobody_else()
        # Nothing to give up.
        os.execv(sys.executable, command)  # noqa: S606 - an interpreter, without a shell
    with tempfile.TemporaryDirectory(prefix="agentray-unprivileged-") as home:
        os.chown(home, UID, UID)
        child = os.fork()
        if child == 0:
            _become(covered=covered)
            os.execve(sys.executable, command, _environment(home))  # noqa: S606 - the same
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _environment(home: str) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "HOME": home,
        "TMPDIR": home,
        "USER": "unprivileged",
        "LOGNAME": "unprivileged",
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{home}/hypothesis",
        # The repository is not this user's.
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _cover_as_nobody_else() -> None:
    """Cover it in a user namespace, in which this user stays who it is."""
    uid, gid = os.getuid(), os.getgid()
    _checked(_libc.unshare(CLONE_NEWNS | CLONE_NEWUSER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _cover()


def _cover() -> None:
    _mount("tmpfs", "/proc/tty", "tmpfs", 0, "size=4k")


def _become(*, covered: bool) -> None:
    _checked(_libc.unshare(CLONE_NEWNS), "unshare")
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    if covered:
        _cover()
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), Path.cwd().resolve()}
    for closed in sorted({top for path in needed if (top := _closed_above(path)) is not None}):
        _open_up(closed, [path for path in sorted(needed) if path.is_relative_to(closed)])
    os.setgroups([])
    os.setgid(UID)
    os.setuid(UID)


def _closed_above(path: Path) -> Path | None:
    """Return the uppermost folder on the way to ``path`` that others may not enter."""
    for folder in [*reversed(path.parents), path]:
        if folder.stat().st_mode & 0o001 == 0:
            return folder
    return None


def _open_up(closed: Path, needed: list[Path]) -> None:
    # Held open, they can be reached when their folder is covered.
    held = [(path, os.open(path, os.O_PATH)) for path in needed]
    where = Path.cwd()
    _mount("tmpfs", str(closed), "tmpfs", 0, "mode=0755,size=1m")
    for path, descriptor in held:
        path.mkdir(parents=True, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", str(path), None, MS_BIND | MS_REC)
        os.close(descriptor)
    os.chdir(where)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _checked(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), target)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main())
