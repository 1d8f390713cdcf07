"""Count what the processes of a run use, where no cgroup does, and end what has no namespace."""

from __future__ import annotations

# Without pathlib, which takes longer to import and to use than all else here.
# ruff: noqa: PTH123
import contextlib
import os
import signal
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Census", "end_strays"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_CLOCK = os.sysconf("SC_CLK_TCK")
# Up to here pages that processes share are counted for each of them: that is quicker.
_ROUGHLY_BYTES = 32 * 1024 * 1024


class _Facts(NamedTuple):
    pid: int
    parent: int
    begun: int
    own_s: float
    cpu_s: float
    memory_bytes: int


class Census:
    """What the processes of a run use.

    They are found in the slot's ``/proc``, which this process is in too: what it shows of them no
    program can hide, while of the run's own a program that makes itself undumpable closes the door.
    ``scratch`` is a descriptor of their tmpfs, and stays the caller's.
    """

    def __init__(self, scratch: int) -> None:
        self._scratch = scratch
        self.peak_bytes = 0
        self.cpu_s = 0.0
        self._own_s: dict[tuple[int, int], float] = {}
        self._gone_s = 0.0

    def count(self, init: int, others: set[int]) -> tuple[float, int]:
        """Return CPU seconds so far and bytes of memory now, those of the scratch included.

        All count but this process, the run's ``init``, which shares its memory, and ``others``,
        children that wait for later runs, with all below them.

        Of a process that ended and that nobody waited for, what the last look at it found counts.
        """
        proc = os.open("/proc", os.O_RDONLY)
        try:
            return self._count(proc, {os.getpid(), init}, others)
        finally:
            os.close(proc)

    def _count(self, proc: int, but: set[int], others: set[int]) -> tuple[float, int]:
        everyone = list(_all(proc))
        but = but | _below(everyone, others)
        found = [each for each in everyone if each.pid not in but]
        scratch = os.fstatvfs(self._scratch)
        on_scratch = (scratch.f_blocks - scratch.f_bfree) * scratch.f_bsize
        memory = on_scratch + sum(each.memory_bytes for each in found)
        if memory > _ROUGHLY_BYTES:
            memory = on_scratch + sum(_fairly(proc, each) for each in found)
        self.peak_bytes = max(self.peak_bytes, memory)
        waited_for_s = sum(each.cpu_s for each in found)
        self.cpu_s = max(self.cpu_s, waited_for_s, self._seen_s(found))
        return self.cpu_s, memory

    def _seen_s(self, found: Iterable[_Facts]) -> float:
        """Return what each process used as it was last seen, of those that are gone too."""
        now = {(each.pid, each.begun): each.own_s for each in found}
        self._gone_s += sum(used for who, used in self._own_s.items() if who not in now)
        self._own_s = now
        return self._gone_s + sum(now.values())


def _fairly(proc: int, each: _Facts) -> int:
    """Return a process's memory with each shared page divided by those who share it."""
    try:
        for line in _read(proc, f"{each.pid}/smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        # It can keep others from looking: at worst it counts for more.
        pass
    return each.memory_bytes


def _read(proc: int, path: str) -> bytes:
    with open(os.open(path, os.O_RDONLY, dir_fd=proc), "rb") as file:
        return file.read()


def _all(proc: int) -> Iterable[_Facts]:
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            fields = _read(proc, f"{name}/stat").rpartition(b")")[2].split()
        except OSError:
            continue
        # Fields 4, 14 to 17, 22 and 24 of proc(5), whose third is the first here: what it used,
        # and what those children did that it waited for.
        own_s = (int(fields[11]) + int(fields[12])) / _CLOCK
        cpu_s = own_s + (int(fields[13]) + int(fields[14])) / _CLOCK
        memory_bytes = int(fields[21]) * _PAGE
        yield _Facts(int(name), int(fields[1]), int(fields[19]), own_s, cpu_s, memory_bytes)


def _below(everyone: list[_Facts], roots: set[int]) -> set[int]:
    """Return processes and those that descend from them."""
    found, size = set(roots), 0
    while len(found) > size:
        size = len(found)
        found.update(each.pid for each in everyone if each.parent in found)
    return found


def end_strays(known: set[int]) -> None:
    """End and reap all below this process that is not ``known`` or below one of those.

    For runs without a pid namespace, whose orphans come to this process, their subreaper. One
    after the other, so again until none is left.
    """
    proc = os.open("/proc", os.O_RDONLY)
    try:
        while strays := _strays(proc, known):
            for pid in strays:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in strays:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
    finally:
        os.close(proc)


def _strays(proc: int, known: set[int]) -> list[int]:
    everyone = [each for each in _all(proc) if each.pid not in known]
    below = _below(everyone, {os.getpid()})
    # Children first: who is waited for above its own would never be reaped here.
    return [each.pid for each in everyone if each.pid in below and each.pid != os.getpid()]
