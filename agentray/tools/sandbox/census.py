"""Count what the processes of a run use, and end them all: what an init asks of /proc."""

# Without pathlib, which takes longer to import and to use than all else here.
# ruff: noqa: PTH123, PTH208

from __future__ import annotations

import os
import signal
from typing import NamedTuple

__all__ = ["Census", "end_all"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_CLOCK = os.sysconf("SC_CLK_TCK")


class _Facts(NamedTuple):
    pid: int
    parent: int
    cpu_s: float
    memory_bytes: int


def _facts(pid: int) -> _Facts | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    # Fields 4, 14, 15 and 24 of proc(5); the first here is its third.
    cpu_s = (int(fields[11]) + int(fields[12])) / _CLOCK
    return _Facts(pid, int(fields[1]), cpu_s, int(fields[21]) * _PAGE)


def _tree() -> list[_Facts]:
    """Return all of this pid namespace if this is its init, else all below this process."""
    me = os.getpid()
    found = [_facts(int(name)) for name in os.listdir("/proc") if name.isdigit()]
    everyone = {each.pid: each for each in found if each is not None and each.pid != me}
    if me == 1:
        return list(everyone.values())
    below, size = {me}, 0
    while len(below) > size:
        size = len(below)
        below.update(each.pid for each in everyone.values() if each.parent in below)
    return [each for each in everyone.values() if each.pid in below]


def _shared_fairly(pid: int, otherwise: int) -> int:
    """Return a process's memory with each shared page divided by those who share it."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return otherwise


class Census:
    """What a run's processes have used so far, as seen at each count."""

    def __init__(self) -> None:
        self._cpu_s: dict[int, float] = {}
        self.peak_bytes = 0

    def count(self, most_bytes: int) -> tuple[float, int]:
        """Return CPU seconds so far and bytes of memory now, those of the scratch included.

        Pages that processes share are counted for each until the sum is past ``most_bytes``,
        and fairly then, which takes longer.
        """
        tree = _tree()
        self._cpu_s.update((each.pid, each.cpu_s) for each in tree)
        scratch = os.statvfs(".")
        on_scratch = (scratch.f_blocks - scratch.f_bfree) * scratch.f_bsize if _is_init() else 0
        memory = on_scratch + sum(each.memory_bytes for each in tree)
        if memory > most_bytes > 0:
            memory = on_scratch + sum(_shared_fairly(each.pid, each.memory_bytes) for each in tree)
        self.peak_bytes = max(self.peak_bytes, memory)
        return sum(self._cpu_s.values()), memory


def _is_init() -> bool:
    return os.getpid() == 1


def end_all() -> None:
    """End every process of the run, and reap them."""
    try:
        if _is_init():
            # The kernel sends it to all at once: nothing that forks meanwhile gets away.
            os.kill(-1, signal.SIGKILL)
        while True:
            if not _is_init():
                # One after the other, so again until none is left.
                for each in _tree():
                    os.kill(each.pid, signal.SIGKILL)
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
