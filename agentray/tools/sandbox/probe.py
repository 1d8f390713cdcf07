"""Find out what this machine can contain, by what, and what it lacks: by trying it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from agentray.errors import SandboxUnavailableError
from agentray.tools.sandbox import cgroups
from agentray.tools.sandbox.base import Limits, PythonCode, Run, Slot, Tier
from agentray.tools.sandbox.opening import open_slot

__all__ = ["TIERS", "Enforcer", "Opener", "Probe", "Quota", "examine", "probe"]

TIERS: tuple[Tier, ...] = ("gvisor", "jail", "process")
"""All there are, the strongest first."""

Enforcer = Literal[
    "cgroup v2",
    "cgroup v1",
    "rlimit",
    "rlimit and watchdog",
    "watchdog",
    "tmpfs",
    "namespace",
    "gVisor",
    "supervisor",
    "nothing",
]
"""What holds a quota. A ``watchdog`` looks every 10 ms and ends what is over: between two looks
more can be used. An ``rlimit`` of memory or CPU time alone is each process's own; ``gVisor`` is
one, too, held by the sandbox's own kernel."""

Opener = Callable[[Tier], Awaitable[Slot]]
"""Opens a slot of exactly that tier; raises ``SandboxUnavailableError`` where it cannot be had."""


class Quota(msgspec.Struct, frozen=True):
    """A quota and what enforces it; ``note`` says how far where it is not all the way."""

    name: str
    by: Enforcer
    note: str = ""


class Probe(msgspec.Struct, frozen=True):
    """What was found. ``tier`` is the strongest that works, if any does, ``unavailable`` has the
    reason for each that does not, ``held`` what enforces each quota in each that does, ``missing``
    names what is lacking and why: tiers, and of the strongest the quotas that are not enforced, or
    not all the way."""

    tier: Tier | None
    unavailable: dict[Tier, str]
    held: dict[Tier, tuple[Quota, ...]]
    missing: tuple[str, ...]
    cgroup: cgroups.Found
    root: bool = True

    @property
    def quotas(self) -> tuple[Quota, ...]:
        """What enforces each quota in jails."""
        return self.held.get("jail", ())

    @property
    def cgroup_missing(self) -> str:
        """Why a quota that a cgroup would hold has none."""
        return self.cgroup.missing or f"cgroup v{self.cgroup.version} has no such controller here"

    def lacking(self, tier: Tier) -> tuple[str, ...]:
        """Return a sentence for each quota that a tier does not enforce, or not all the way."""
        why = self.cgroup_missing
        found: list[str] = []
        for quota in self.held.get(tier, ()):
            reason = quota.note if quota.name not in _OF_CGROUPS else why
            if quota.by == "nothing":
                found.append(f"{quota.name} is not enforced: {reason}")
            elif "rlimit" in quota.by and quota.name in ("memory", "cpu time"):
                found.append(f"{quota.name} is enforced by {quota.by} only, {quota.note}: {why}")
        if tier != "process" and not self.root:
            found.append("slots share this user's uid: without root there is one to map only")
        return tuple(found)


_OF_CGROUPS = ("cpu time", "cpu share", "memory", "pids")
_SEES_PROC = "import os; print('proc' if os.path.exists('/proc/self/stat') else '')"
_TRIAL_S = 20.0


async def _open(tier: Tier) -> Slot:
    return await open_slot(tier, parked=False)


async def examine(
    opener: Opener = _open, find: Callable[[], cgroups.Found] = cgroups.find
) -> Probe:
    """Open a slot of each tier, run a program in it, and say what was found."""
    unavailable: dict[Tier, str] = {}
    held: dict[Tier, tuple[Quota, ...]] = {}
    found = find()
    for tier in TIERS:
        printed, why = await _try(tier, opener)
        if why:
            unavailable[tier] = why
        else:
            # In gVisor it is the sandbox's whole kernel that is watched, from outside.
            held[tier] = _quotas(tier, found, watched=tier == "gvisor" or printed == "proc")
    best: Tier | None = next(iter(held), None)
    probe = Probe(best, unavailable, held, (), found, os.geteuid() == 0)
    missing = [f"{tier}: {why}" for tier, why in unavailable.items()]
    if best is not None:
        missing += probe.lacking(best)
    return msgspec.structs.replace(probe, missing=tuple(missing))


async def _try(tier: Tier, opener: Opener) -> tuple[str, str]:
    """Return what a program printed in a slot of a tier, and why it could not."""
    try:
        slot = await opener(tier)
    except SandboxUnavailableError as error:
        return "", str(error.fields.get("missing") or error.message)
    try:
        outcome = await slot.run(Run(PythonCode(_SEES_PROC), Limits(wall_s=_TRIAL_S)))
    finally:
        await slot.close()
    if outcome.reason != "ok":
        return "", outcome.error or f"a program ended with {outcome.reason}"
    return outcome.stdout.decode().strip(), ""


def probe() -> Probe:
    """Do :func:`examine` from where no event loop can be awaited; takes some 200 ms, and 600 ms
    with gVisor."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, examine()).result()


_EACH = "each process by itself: the sum of a tree is not limited"
_TREE = "looked at every 10 ms: a tree can be over in between"
_UNCONTAINED = "the process tier contains nothing"


def _quotas(tier: Tier, found: cgroups.Found, *, watched: bool) -> tuple[Quota, ...]:
    group: Enforcer = "cgroup v2" if found.version == 2 else "cgroup v1"
    contained = tier != "process"
    watchdog: Enforcer = "rlimit and watchdog" if watched and contained else "rlimit"
    note = _TREE if watchdog != "rlimit" else _EACH
    own = "with 48 MiB more for the sandbox's own kernel" if tier == "gvisor" else ""

    def grouped(name: str, controller: str, note_: str = "") -> Quota:
        counted = controller in found.folders
        return Quota(name, group, note_) if counted else Quota(name, watchdog, note)

    share = Quota("cpu share", group if "cpu" in found.folders else "nothing")
    return (
        Quota("wall time", "supervisor"),
        grouped("cpu time", "cpuacct", "looked at every 100 ms"),
        share,
        grouped("memory", "memory", own),
        _pids(tier, found, group),
        _files(tier),
        Quota("scratch size", "tmpfs") if contained else _not("scratch size"),
        Quota("scratch files", "tmpfs") if contained else _not("scratch files"),
        Quota("output", "supervisor"),
        Quota("network", "namespace", "none: an empty one") if contained else _not("network"),
    )


def _not(name: str) -> Quota:
    return Quota(name, "nothing", _UNCONTAINED)


def _files(tier: Tier) -> Quota:
    by: Enforcer = "gVisor" if tier == "gvisor" else "rlimit"
    return Quota("open files", by, "each process by itself")


def _pids(tier: Tier, found: cgroups.Found, group: Enforcer) -> Quota:
    if tier == "gvisor":
        return Quota("pids", "gVisor")
    if "pids" in found.folders:
        return Quota("pids", group)
    return (
        Quota("pids", "rlimit", "of the slot's uid") if tier == "jail" else Quota("pids", "nothing")
    )
