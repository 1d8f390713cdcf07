"""Open slots: the one entry to the sandboxes, whatever their tier."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from agentray.errors import SandboxUnavailableError
from agentray.tools.sandbox import cgroups, gvisor, layout, loopback, seccomp
from agentray.tools.sandbox.base import Limits, Slot, Tier
from agentray.tools.sandbox.cgroups import Cgroup
from agentray.tools.sandbox.jail import JailSlot
from agentray.tools.sandbox.supervisor import Zygote
from agentray.tools.sandbox.uids import UidLease

__all__ = ["DEFENCES", "open_jail", "open_slot", "unsupported"]

DEFENCES = frozenset(
    {
        "capabilities",
        "clean_env",
        "close_fds",
        "cpu",
        "globals",
        "ipc_ns",
        "memory",
        "net_ns",
        "no_new_privs",
        "nosuid",
        "output_cap",
        "pid_ns",
        "pids",
        "proc_readonly",
        "readonly_root",
        "reseed",
        "rlimit_fsize",
        "rlimit_nofile",
        "root",
        "scratch_inodes",
        "scratch_size",
        "scratch_wipe",
        "seccomp",
        "uid",
    }
)
"""What of a jail can be left off, one by one, to see that an attack works without it."""

# Within the namespace of an unprivileged caller, where its own uid goes by this number.
_UID_INSIDE = 1000
_WEAKER: dict[Tier, tuple[Tier, ...]] = {
    "gvisor": ("jail", "process"),
    "jail": ("process",),
    "process": (),
}
# Two, so that calls in a row find one while the next is made.
_PARKED = 2


async def open_slot(
    tier: Tier,
    *,
    ceiling: Limits = Limits(),
    parked: bool = True,
    libraries: Sequence[str] = (),
    paths: Sequence[str] = (),
    cpu_share: float = 1.0,
    proxied: bool = False,
    weakest: Tier | None = None,
) -> Slot:
    """Open a slot of a tier.

    Args:
        ceiling: the most that any run in the slot may ask for.
        parked: fork the next run's child ahead.
        libraries: modules to import once, before the forks.
        paths: folders of the operator's code: there read-only, and on ``sys.path``.
        cpu_share: cores that all of the slot may use.
        proxied: programs may reach what serves their run (see ``Run.network``), where the
            variables ``http_proxy`` … say; a jail's nothing else. Not to be had with gVisor.
        weakest: where the tier cannot be had, take the strongest weaker one that can, down to this
            one; the slot's ``tier`` says which it is. None: no weaker one.

    Raises:
        SandboxUnavailableError: if this machine cannot give the tier; what it lacks is in it.
    """
    try:
        if tier == "process":
            return await _open_process(ceiling, parked, libraries, paths, cpu_share, proxied)
        if tier == "jail":
            return await open_jail(
                ceiling=ceiling,
                parked=parked,
                libraries=libraries,
                paths=paths,
                cpu_share=cpu_share,
                proxied=proxied,
            )
        if proxied:
            raise SandboxUnavailableError("programs under gVisor have no network yet", tier=tier)
        return await _open_gvisor(ceiling, parked, libraries, paths, cpu_share)
    except SandboxUnavailableError as error:
        weaker = _WEAKER[tier]
        if weakest not in weaker:
            raise SandboxUnavailableError(
                f"the tier {tier!r} cannot be had here: {error.message}; "
                + (
                    f"weaker tiers to opt into: {', '.join(weaker)}" if weaker else "none is weaker"
                ),
                tier=tier,
                missing=error.message,
                weaker=list(weaker),
            ) from error
    return await open_slot(
        _WEAKER[tier][0],
        ceiling=ceiling,
        parked=parked,
        libraries=libraries,
        paths=paths,
        cpu_share=cpu_share,
        proxied=proxied,
        weakest=weakest,
    )


def unsupported() -> str:
    """Return why this machine cannot have jails at all, or nothing."""
    if sys.platform != "linux":
        return f"jails are made of Linux namespaces, and this is {sys.platform}"
    machine = platform.machine()
    if machine != "x86_64" or sys.maxsize < 2**32:
        return f"the filter of system calls is written for x86_64, and this is {machine}"
    return ""


async def open_jail(
    *,
    ceiling: Limits = Limits(),
    parked: bool = True,
    libraries: Sequence[str] = (),
    paths: Sequence[str] = (),
    cpu_share: float = 1.0,
    network: bool = False,
    proxied: bool = False,
    without: frozenset[str] = frozenset(),
) -> JailSlot:
    """Open a jail; :func:`open_slot` is the way to one.

    ``network`` gives it the machine's network, ``without`` names defences to leave off: for
    tests, which show that each of them holds something back.

    Raises:
        SandboxUnavailableError: if this machine cannot give it.
    """
    if why := unsupported():
        raise SandboxUnavailableError(why, tier="jail")
    if proxied and (network or "net_ns" in without):
        raise ValueError("a proxied jail has a network of its own")
    if unknown := without - DEFENCES:
        raise ValueError(f"no such defences: {', '.join(sorted(unknown))}")
    with ExitStack() as held:
        lease = _lease("jail", held)
        cgroup = _cgroup("jail", ceiling, parked, cpu_share, without, held)
        uid = _UID_INSIDE if lease is None else lease.uid
        if lease is not None and "uid" in without:
            uid = 0
        counted = _counts_memory(cgroup)
        calls = seccomp.program(network=network, proxied=proxied, shared_memory=counted)
        config: dict[str, Any] = {
            **layout.layout(paths, uid),
            "isolated": True,
            "root": lease is not None,
            "uid": uid,
            "gid": uid,
            "network": network or "net_ns" in without,
            "filter": b"" if "seccomp" in without else calls,
            "paths": list(paths),
            "loopback": proxied,
        }
        if not counted:
            # Mapped, it is shared memory as well, which nothing would count.
            config["devices"] = [each for each in config["devices"] if each != "/dev/zero"]
        if proxied:
            config["environment"] |= loopback.proxy_variables(loopback.PORT)
        if "root" in without:
            # Where everything of the machine is, a folder that every machine has.
            config["place"] = "/mnt"
        slot = _slot("jail", config, ceiling, parked, libraries, cgroup, lease, without)
        held.pop_all()
    return await _started(slot)


async def _open_process(
    ceiling: Limits,
    parked: bool,
    libraries: Sequence[str],
    paths: Sequence[str],
    cpu_share: float,
    proxied: bool,
) -> JailSlot:
    with ExitStack() as held:
        listener = None
        environment = dict(os.environ)
        try:
            if proxied:
                # They share the machine's network, and so the port cannot be one for all.
                listener = held.enter_context(socket.create_server(("127.0.0.1", 0)))
                environment |= loopback.proxy_variables(listener.getsockname()[1])
            place = tempfile.mkdtemp(prefix="agentray-")
        except OSError as error:
            raise SandboxUnavailableError(f"no folder or port: {error}", tier="process") from error
        held.callback(shutil.rmtree, place, ignore_errors=True)
        config: dict[str, Any] = {
            "isolated": False,
            "root": os.geteuid() == 0,
            "uid": os.geteuid(),
            "gid": os.getegid(),
            "filter": b"",
            "paths": [*paths, *(each for each in sys.path if each)],
            # It runs the operator's own functions, with what the operator gave this process.
            "environment": environment,
            "place": place,
        }
        cgroup = _cgroup("process", ceiling, parked, cpu_share, _ALL, held)
        slot = _slot(
            *("process", config, ceiling, parked, libraries, cgroup, None, _ALL), listener=listener
        )
        held.pop_all()
    return await _started(slot)


async def _open_gvisor(
    ceiling: Limits,
    parked: bool,
    libraries: Sequence[str],
    paths: Sequence[str],
    cpu_share: float,
) -> JailSlot:
    if sys.platform != "linux":
        raise SandboxUnavailableError(f"gVisor is for Linux, and this is {sys.platform}")
    if not (runsc := gvisor.find_runsc()):
        raise SandboxUnavailableError(gvisor.ABSENT, tier="gvisor")
    without = gvisor.LEFT_TO_RUNSC
    with ExitStack() as held:
        lease = _lease("gvisor", held)
        cgroup = _cgroup("gvisor", ceiling, parked, cpu_share, without, held)
        uid = _UID_INSIDE if lease is None else lease.uid
        config = gvisor.config(
            paths,
            libraries,
            runsc=runsc,
            root=lease is not None,
            uid=uid,
            shared_memory=_counts_memory(cgroup),
        )
        slot = _slot("gvisor", config, ceiling, parked, (), cgroup, lease, without)
        held.pop_all()
    return await _started(slot)


_ALL = frozenset[str]()


def _lease(tier: Tier, held: ExitStack) -> UidLease | None:
    """Return a uid for a slot, where there are any to be had: as root."""
    if os.geteuid() != 0:
        return None
    try:
        lease = UidLease()
    except OSError as error:
        raise SandboxUnavailableError(f"no uid for the slot: {error}", tier=tier) from error
    held.callback(lease.close)
    return lease


def _depth(tier: Tier, parked: bool) -> int:
    """Return how many children are made ahead."""
    return (1 if tier == "gvisor" else _PARKED) if parked else 0


def _cgroup(
    tier: Tier,
    ceiling: Limits,
    parked: bool,
    cpu_share: float,
    without: frozenset[str],
    held: ExitStack,
) -> Cgroup | None:
    """Return a cgroup with its limits set, but for the memory that depends on the run."""
    cgroup = cgroups.make(cgroups.find())
    if cgroup is None:
        return None
    held.callback(cgroup.remove)
    depth = _depth(tier, parked)
    # Beside the program: the zygote, and an init each for it and what is parked.
    pids = 1_000_000 if "pids" in without else ceiling.pids + 6 + 2 * depth
    if tier == "gvisor":
        pids = gvisor.host_pids(ceiling.pids, sandboxes=1 + depth)
    try:
        cgroup.limit(pids=pids, cpu_share=cpu_share)
    except OSError as error:
        raise SandboxUnavailableError(
            f"its cgroup cannot be limited: {error}", tier=tier
        ) from error
    return cgroup


def _counts_memory(cgroup: Cgroup | None) -> bool:
    return cgroup is not None and "memory" in cgroup.quotas


def _slot(
    tier: Tier,
    config: dict[str, Any],
    ceiling: Limits,
    parked: bool,
    libraries: Sequence[str],
    cgroup: Cgroup | None,
    lease: UidLease | None,
    without: frozenset[str],
    *,
    listener: socket.socket | None = None,
) -> JailSlot:
    config |= {
        "python": layout.interpreter(),
        "libraries": list(libraries),
        "without": sorted(without),
    }
    return JailSlot(
        (gvisor.Runsc if tier == "gvisor" else Zygote)(config, cgroup, tier),
        tier=tier,
        ceiling=ceiling,
        parked=_depth(tier, parked),
        cgroup=cgroup,
        lease=lease,
        folder="" if config["isolated"] else config["place"],
        proxied=config.get("loopback", False) or listener is not None,
        listener=listener,
        without=without,
    )


async def _started(slot: JailSlot) -> JailSlot:
    try:
        await slot.start()
    except BaseException:
        await slot.close()
        raise
    slot.park()
    return slot
