"""Find out what this machine can contain, by what, and what it lacks: by trying it."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from agentray.errors import SandboxUnavailableError
from agentray.tools.sandbox import cgroups
from agentray.tools.sandbox.base import Limits, PythonCode, Run, Tier
from agentray.tools.sandbox.opening import open_slot

__all__ = ["Enforcer", "Probe", "Quota", "examine", "probe"]

Enforcer = Literal[
    "cgroup v2",
    "cgroup v1",
    "rlimit",
    "rlimit and watchdog",
    "watchdog",
    "tmpfs",
    "namespace",
    "supervisor",
    "nothing",
]
"""What holds a quota. A ``watchdog`` looks every 10 ms and ends what is over: between two looks
more can be used. An ``rlimit`` of memory or CPU time alone is each process's own."""


class Quota(msgspec.Struct, frozen=True):
    """A quota and what enforces it in jails; ``note`` says how far where it is not all the way."""

    name: str
    by: Enforcer
    note: str = ""


class Probe(msgspec.Struct, frozen=True):
    """What was found. ``tier`` is the strongest that works, ``unavailable`` has the reason for
    each that does not, ``missing`` names what is not enforced and why."""

    tier: Tier
    unavailable: dict[Tier, str]
    quotas: tuple[Quota, ...]
    missing: tuple[str, ...]


async def examine() -> Probe:
    """Open a slot of each tier, run a program in it, and say what was found."""
    unavailable: dict[Tier, str] = {}
    proc = ""
    for each in _TIERS:
        why = ""
        try:
            slot = await open_slot(each, parked=False)
        except SandboxUnavailableError as error:
            unavailable[each] = str(error.fields.get("missing") or error.message)
            continue
        try:
            outcome = await slot.run(Run(PythonCode(_SEES_PROC), Limits(wall_s=20.0)))
            if outcome.reason != "ok":
                why = outcome.error or f"a program ended with {outcome.reason}"
            elif each == "jail":
                proc = outcome.stdout.decode().strip()
        finally:
            await slot.close()
        if why:
            unavailable[each] = why
    tier: Tier = "process"
    for each in reversed(_TIERS):
        if each not in unavailable:
            tier = each
    if "jail" in unavailable:
        missing = tuple(f"{name}: {why}" for name, why in unavailable.items())
        return Probe(tier, unavailable, (), missing)
    found = cgroups.find()
    quotas = _quotas(found, watched=proc == "proc")
    return Probe(tier, unavailable, quotas, _missing(quotas, found, unavailable))


_TIERS: tuple[Tier, ...] = ("gvisor", "jail", "process")
_SEES_PROC = "import os; print('proc' if os.path.exists('/proc/self/stat') else '')"


def probe() -> Probe:
    """Do :func:`examine` from where no event loop can be awaited; takes some 200 ms."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, examine()).result()


def _quotas(found: cgroups.Found, *, watched: bool) -> tuple[Quota, ...]:
    group: Enforcer = "cgroup v2" if found.version == 2 else "cgroup v1"
    held = set(found.folders)
    each = "each process by itself: the sum of a tree is not limited"
    tree = "looked at every 10 ms: a tree can be over in between"
    memory = Quota("memory", group)
    if "memory" not in held:
        by: Enforcer = "rlimit and watchdog" if watched else "rlimit"
        memory = Quota("memory", by, tree if watched else each)
    cpu = Quota("cpu time", group, "looked at every 100 ms")
    if "cpuacct" not in held:
        by = "rlimit and watchdog" if watched else "rlimit"
        cpu = Quota("cpu time", by, tree if watched else each)
    share = Quota("cpu share", group if "cpu" in held else "nothing")
    pids = Quota("pids", group) if "pids" in held else Quota("pids", "rlimit", "of the slot's uid")
    return (
        Quota("wall time", "supervisor"),
        cpu,
        share,
        memory,
        pids,
        Quota("open files", "rlimit", "each process by itself"),
        Quota("scratch size", "tmpfs"),
        Quota("scratch files", "tmpfs"),
        Quota("output", "supervisor"),
        Quota("network", "namespace", "none: an empty one"),
    )


def _missing(
    quotas: tuple[Quota, ...], found: cgroups.Found, unavailable: dict[Tier, str]
) -> tuple[str, ...]:
    missing = [f"{tier}: {why}" for tier, why in unavailable.items()]
    why = found.missing or f"cgroup v{found.version} has no such controller here"
    for quota in quotas:
        if quota.by == "nothing":
            missing.append(f"{quota.name} is not enforced: {why}")
        elif "rlimit" in quota.by and quota.name in ("memory", "cpu time"):
            missing.append(f"{quota.name} is enforced by {quota.by} only, {quota.note}: {why}")
    if os.geteuid() != 0:
        missing.append("slots share this user's uid: without root there is one to map only")
    return tuple(missing)
