"""Count CPU time by process, in groups, and what the rest of the machine took meanwhile."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["OTHERS", "CpuMeter", "CpuUse", "command_of", "descendants", "pss_bytes"]

OTHERS = "others"
"""The group of every process that belongs to nothing that is measured."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU seconds by group between two moments, ``seconds`` apart."""

    seconds: float
    groups: Mapping[str, float]
    others: Mapping[str, float]
    cores: int

    @property
    def other_share(self) -> float:
        """The share of all cores that processes took which are no part of the measurement."""
        return self.groups.get(OTHERS, 0.0) / (self.seconds * self.cores)


class CpuMeter:
    """Reads ``/proc`` before and after. ``classify`` gives the group of each process that counts.

    What a reaped child used is counted with its parent, so that a backend of PostgreSQL that
    ends is not lost.
    """

    def __init__(self, classify: Callable[[], Mapping[int, str]]) -> None:
        self._classify = classify
        self._groups: dict[int, str] = {}
        self._before: dict[int, tuple[float, float]] = {}
        self._at = 0.0

    def start(self) -> None:
        """Note where every process stands."""
        self._groups = dict(self._classify())
        self._before = _times()
        self._at = time.monotonic()

    def stop(self) -> CpuUse:
        """Return what was used since ``start``."""
        seconds = time.monotonic() - self._at
        after = _times()
        groups = {**self._groups, **self._classify()}
        used: defaultdict[str, float] = defaultdict(float)
        others: defaultdict[str, float] = defaultdict(float)
        ours = os.getpid()
        for pid in self._before.keys() | after.keys():
            if pid == ours:
                continue
            group = groups.get(pid, OTHERS)
            old, old_children = self._before.get(pid, (0.0, 0.0))
            new, new_children = after.get(pid, (old, old_children))
            spent = new - old
            if group != OTHERS:
                spent += new_children - old_children
                # Its parent has it by now.
                spent -= old if pid not in after else 0.0
            elif spent > 0.1 * seconds:
                others[command_of(pid)] += spent
            used[group] += spent
        return CpuUse(seconds, dict(used), dict(others), len(os.sched_getaffinity(0)))


def _times() -> dict[int, tuple[float, float]]:
    """Return, for each process, its CPU seconds and those of its reaped children."""
    found: dict[int, tuple[float, float]] = {}
    for pid in _pids():
        fields = _stat(pid)
        if fields is not None:
            own, children = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
            found[pid] = own * _TICK_S, children * _TICK_S
    return found


def descendants(roots: Iterable[int]) -> set[int]:
    """Return these processes and all that came from them, as far as the parents still live."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        fields = _stat(pid)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, ())
    return found


def command_of(pid: int) -> str:
    """Return a process's command line in one short line; its name where it has none."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return command[:120] or Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return "ended"


def pss_bytes(pid: int) -> int:
    """Return a process's memory, shared pages divided among those who share them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup has no Pss")


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - twice as fast


def _stat(pid: int) -> list[bytes] | None:
    """Return the fields of ``/proc/PID/stat`` behind the name, the state first."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return text[text.rindex(b")") + 2 :].split()
