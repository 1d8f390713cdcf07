"""Give a slot a cgroup of its own, of version 2 or 1, and read there what it used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Cgroup", "Found", "find", "make"]

Quota = Literal["memory", "pids", "cpu", "cpuacct"]
_V1: tuple[Quota, ...] = ("memory", "pids", "cpu", "cpuacct")
_V2_WITHOUT_CPU: tuple[Quota, ...] = ("memory", "pids", "cpuacct")
_PERIOD_US = 100_000
_UNLIMITED_BYTES = 1 << 60
# With the pid of who made it.
_PREFIX = "agentray-"
_NEEDED = frozenset({"memory", "pids"})
# Where the processes are that were in a cgroup which is divided now.
_REST = f"{_PREFIX}rest"
_MOST_MOVES = 20


class Found(msgspec.Struct, frozen=True):
    """Where sub-cgroups can be made: a folder per controller (in version 2 the same for all)."""

    version: Literal[0, 1, 2] = 0
    folders: dict[Quota, str] = {}
    missing: str = ""


def _hierarchies(mounts: str) -> tuple[str, dict[Quota, str]]:
    """Return the mount point of version 2 and those of version 1, from /proc/self/mounts."""
    unified, v1 = "", dict[Quota, str]()
    for line in mounts.splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup2":
            unified = unified or point
        elif kind == "cgroup":
            for name in _V1:
                if name in options.split(","):
                    v1.setdefault(name, point)
    return unified, v1


def _own(membership: str) -> dict[str, str]:
    """Return the path of this process by controller ("" for version 2), of /proc/self/cgroup."""
    found: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            found[name] = path
    return found


def _can_make(folder: Path) -> bool:
    if not os.access(folder / "cgroup.procs", os.W_OK):
        return False
    probe = folder / f"{_PREFIX}{os.getpid()}-probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def _folder(mount: str, path: str) -> Path:
    return Path(mount + path) if path != "/" else Path(mount)


def _upward(mount: str, path: str) -> list[Path]:
    """Return the own cgroup and those above it, up to the mount point."""
    here = _folder(mount, path)
    return [each for each in (here, *here.parents) if each.is_relative_to(mount)]


def _handed_over(folder: Path, mount: str) -> bool:
    """Return whether a cgroup of version 2 and all below it are its processes' own to arrange."""
    if folder.name.startswith("user@"):
        # It is the user's manager's, which arranges those of its units.
        return False
    if str(folder) == mount:
        # A container's, with a namespace of its own; the machine's has no type.
        return (folder / "cgroup.type").exists()
    for mark in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(folder, mark) == b"1":
                return True
    # Older managers mark it so that only root can see; what they do for a unit's user all can.
    within_a_manager = any(each.name.startswith("user@") for each in folder.parents)
    uid = os.geteuid()
    with contextlib.suppress(OSError):
        return uid != 0 and not within_a_manager and folder.stat().st_uid == uid
    return False


def _find_v2(mount: str, path: str) -> Found | None:
    """Look for a cgroup of version 2 that has controllers for its children, or can get them.

    No further up than what was handed over to this process's unit: above are others, and to be in
    there would be to leave the unit's own limits.
    """
    own = _folder(mount, path)
    above = [own.parent] if own.name == _REST else []
    for number, folder in enumerate(_upward(mount, path)):
        if _handed_over(folder, mount):
            above = _upward(mount, path)[1 : number + 1]
            break
    for folder in (own, *above):
        with contextlib.suppress(OSError):
            enabled = (folder / "cgroup.subtree_control").read_text().split()
            if not set(enabled) >= _NEEDED and _handed_over(folder, mount):
                enabled = _divide(folder)
            if set(enabled) >= _NEEDED and _can_make(folder):
                quotas = _V1 if "cpu" in enabled else _V2_WITHOUT_CPU
                return Found(2, dict.fromkeys(quotas, str(folder)))
    return None


def _divide(folder: Path) -> list[str]:
    """Give a cgroup's children controllers, which it may when no process is in itself.

    So those that are go to a child of their own.

    Raises:
        OSError: if the kernel refuses.
    """
    there = (folder / "cgroup.controllers").read_text().split()
    wanted = [name for name in ("memory", "pids", "cpu") if name in there]
    if not set(wanted) >= _NEEDED or not _can_make(folder):
        return []
    rest = folder / _REST
    rest.mkdir(exist_ok=True)
    for _ in range(_MOST_MOVES):
        # New ones come from those that were not moved yet.
        for pid in (moving := (folder / "cgroup.procs").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                (rest / "cgroup.procs").write_text(pid)
        if not moving:
            break
    (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
    return wanted


def find(proc: Path = Path("/proc/self")) -> Found:
    """Find where this process may make cgroups with memory and pids limits.

    In version 2 that is its own cgroup or, within what was handed over to its unit, one above. If
    that has no controllers for its children yet, it gets them, and the unit's processes go to a
    child of it. Cgroups that are not the unit's are never changed.
    """
    try:
        unified, v1 = _hierarchies((proc / "mounts").read_text())
        own = _own((proc / "cgroup").read_text())
    except OSError as error:
        return Found(missing=f"cgroups cannot be read: {error}")
    if unified and (found := _find_v2(unified, own.get("", "/"))) is not None:
        return found
    folders: dict[Quota, str] = {}
    for name, point in v1.items():
        for folder in _upward(point, own.get(name, "/")):
            if _can_make(folder):
                folders[name] = str(folder)
                break
    if folders:
        return Found(1, folders)
    why = "no hierarchy is mounted" if not (unified or v1) else "no cgroup is writable here"
    if unified and not v1:
        why = (
            "this process's cgroup is not handed over to it (Delegate=yes), or has no memory and "
            "pids controllers"
        )
    return Found(missing=why)


class Cgroup:
    """The cgroup of one slot; in version 1 one folder per controller."""

    def __init__(self, version: int, folders: Mapping[Quota, Path]) -> None:
        self._version = version
        self._folders = folders
        self._memory_bytes = 0
        self._quota_us = 0

    @property
    def quotas(self) -> frozenset[Quota]:
        """What it limits or counts."""
        return frozenset(self._folders)

    def limit_memory(self, size_bytes: int) -> bool:
        """Set the most memory; return whether it is limited now."""
        if size_bytes == self._memory_bytes:
            return True
        name = "memory.max" if self._version == 2 else "memory.limit_in_bytes"
        if self._write("memory", name, size_bytes):
            self._memory_bytes = size_bytes
            return True
        return False

    def limit(self, *, pids: int, cpu_share: float) -> None:
        """Set the most processes and the share of a core.

        Raises:
            OSError: if a limit cannot be set that it is there for.
        """
        self._quota_us = max(1000, int(cpu_share * _PERIOD_US))
        if not self._write("pids", "pids.max", pids):
            self._fail("pids")
        # Without swap there are no such files.
        if self._version == 2:
            self._write("memory", "memory.swap.max", 0)
        else:
            self._write("memory", "memory.swappiness", 0)
            self._write("cpu", "cpu.cfs_period_us", _PERIOD_US)
        if not self._set_cpu(0):
            self._fail("cpu")
        if not self.limit_memory(_UNLIMITED_BYTES):
            self._fail("memory")

    def _fail(self, quota: Quota) -> None:
        if quota in self._folders:
            raise OSError(f"no limit of {quota} can be set in {self._folders[quota]}")

    def hold_cpu(self) -> None:
        """Hold it to its share of a core."""
        self._set_cpu(self._quota_us)

    def free_cpu(self) -> None:
        """Let go of the share: what was killed needs CPU to end, and may have used its share up."""
        self._set_cpu(0)

    def _set_cpu(self, quota_us: int) -> bool:
        if self._version == 2:
            return self._write("cpu", "cpu.max", f"{quota_us or 'max'} {_PERIOD_US}")
        return self._write("cpu", "cpu.cfs_quota_us", quota_us or -1)

    def add(self, pid: int) -> None:
        """Move a process in; its children follow.

        Raises:
            OSError: if the kernel refuses.
        """
        for folder in set(self._folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def cpu_s(self) -> float:
        """Return the CPU seconds of all that was ever in it, or 0."""
        if self._version == 2:
            found = self._fields("cpuacct", "cpu.stat").get("usage_usec", 0)
            return found / 1e6
        return self._number("cpuacct", "cpuacct.usage") / 1e9

    def oom_kills(self) -> int:
        """Return how often the kernel killed a process in it for memory."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        return self._fields("memory", name).get("oom_kill", 0)

    def memory_bytes(self) -> int:
        """Return what is used now."""
        name = "memory.current" if self._version == 2 else "memory.usage_in_bytes"
        return self._number("memory", name)

    def remove(self) -> bool:
        """Remove it; return False while a process is left in it."""
        for folder in set(self._folders.values()):
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    def _write(self, quota: Quota, name: str, value: int | str) -> bool:
        folder = self._folders.get(quota)
        if folder is None:
            return False
        try:
            (folder / name).write_text(str(value))
        except OSError:
            return False
        return True

    def _number(self, quota: Quota, name: str) -> int:
        folder = self._folders.get(quota)
        if folder is None:
            return 0
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):
            return 0

    def _fields(self, quota: Quota, name: str) -> dict[str, int]:
        folder = self._folders.get(quota)
        if folder is None:
            return {}
        try:
            lines = (folder / name).read_text().splitlines()
        except OSError:
            return {}
        return {key: int(value) for key, value in (line.split() for line in lines)}


def make(found: Found) -> Cgroup | None:
    """Make a cgroup of a name of its own; None where none can be made."""
    name = f"{_PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    folders: dict[Quota, Path] = {}
    for quota, parent in found.folders.items():
        folder = Path(parent) / name
        _sweep(Path(parent))
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            folders[quota] = folder
    return Cgroup(found.version, folders) if folders else None


def _sweep(parent: Path) -> None:
    """Remove what processes that were killed could not: cgroups of ours, empty by now."""
    for each in parent.glob(f"{_PREFIX}*"):
        pid = each.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                each.rmdir()
