"""Say how a machine gets what its sandboxes lack: packages, sysctls, cgroups, rights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from agentray.tools.sandbox.base import Tier
from agentray.tools.sandbox.probe import Probe

__all__ = ["Surroundings", "look", "remedies"]

_SYSCTLS = {
    "kernel.unprivileged_userns_clone": 1,
    "kernel.apparmor_restrict_unprivileged_userns": 0,
}
_MOST_NAMESPACES = "user.max_user_namespaces"


class Surroundings(msgspec.Struct, frozen=True):
    """What a remedy depends on. ``sysctls`` has those that are there."""

    platform: str = "linux"
    root: bool = True
    container: bool = False
    sysctls: dict[str, int] = {}


def look(root: Path = Path("/")) -> Surroundings:
    """Look at this machine; ``root`` is where its ``/proc`` and ``/run`` are."""
    found: dict[str, int] = {}
    for name in (*_SYSCTLS, _MOST_NAMESPACES):
        try:
            found[name] = int((root / "proc/sys" / name.replace(".", "/")).read_text())
        except (OSError, ValueError):
            continue
    marks = (root / ".dockerenv", root / "run/.containerenv", root / "run/systemd/container")
    return Surroundings(
        platform=sys.platform,
        root=os.geteuid() == 0,
        container=any(each.exists() for each in marks),
        sysctls=found,
    )


def remedies(probe: Probe, around: Surroundings, wanted: Tier) -> tuple[str, ...]:
    """Return in a sentence each what would give the tier that is wanted, and its quotas."""
    if around.platform != "linux":
        return ("run the workers on Linux: there are no other systems that code is contained on",)
    found: list[str] = []
    if wanted == "gvisor" and "no runsc" in probe.unavailable.get("gvisor", ""):
        found.append("put runsc on PATH: apt-get install runsc, or a release of gVisor's")
    if wanted != "process" and {wanted, "jail"} & set(probe.unavailable):
        found += _namespaces(around)
    had = wanted if wanted in probe.held else probe.tier
    if had is not None and any(probe.cgroup_missing in line for line in probe.lacking(had)):
        found.append(_cgroups(around))
    if wanted != "process" and not around.root and wanted in probe.held:
        found.append("run the workers as root: each slot gets a uid of its own then")
    return tuple(found)


def _namespaces(around: Surroundings) -> list[str]:
    found: list[str] = []
    if not around.root:
        wrong = [
            f"{name}={value}"
            for name, value in _SYSCTLS.items()
            if around.sysctls.get(name, value) != value
        ]
        if around.sysctls.get(_MOST_NAMESPACES) == 0:
            wrong.append(f"{_MOST_NAMESPACES}=15000")
        found += [f"let users make namespaces: sysctl -w {each}" for each in wrong]
    if around.container:
        found.append(
            "let the container make namespaces and mounts: --cap-add SYS_ADMIN with profiles of "
            "seccomp and AppArmor that allow unshare, mount and pivot_root (docker: --security-opt"
            " seccomp=… and apparmor=…), or --privileged"
        )
    return found


def _cgroups(around: Surroundings) -> str:
    if around.container:
        return "mount /sys/fs/cgroup writable into the container, with memory, pids and cpu"
    if around.root:
        return "have the workers' cgroup be theirs: systemd-run -p Delegate=yes … or a unit with it"
    how = "delegate a cgroup to this user: systemd-run --user --scope -p Delegate=yes …"
    return f"{how}, or Delegate=yes in its unit"
