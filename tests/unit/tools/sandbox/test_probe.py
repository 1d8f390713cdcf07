"""What the probe says of machines that are not at hand; real ones are in ``tests/jail``."""

from __future__ import annotations

import pytest

from agentray.errors import SandboxUnavailableError
from agentray.tools.sandbox.base import Outcome, Run, Slot, Tier
from agentray.tools.sandbox.cgroups import Found
from agentray.tools.sandbox.probe import Opener, Probe, examine
from agentray.tools.sandbox.remedies import Surroundings, look, remedies

NONE = Found(missing="no hierarchy is mounted")
NO_RUNSC = "no runsc was found on PATH"


class FakeSlot:
    """A slot of any tier, on a machine whose jails can or cannot mount a /proc."""

    def __init__(self, tier: Tier, outcome: Outcome) -> None:
        self.tier: Tier = tier
        self._outcome = outcome
        self.closed = False

    async def run(self, run: Run) -> Outcome:
        return self._outcome

    async def close(self) -> None:
        self.closed = True


def machine(had: dict[Tier, Outcome], why: dict[Tier, str]) -> tuple[Opener, list[FakeSlot]]:
    """Return what opens slots on a machine that has some tiers, and all that it opened."""
    opened: list[FakeSlot] = []

    async def open_one(tier: Tier) -> Slot:
        if tier not in had:
            raise SandboxUnavailableError(f"not {tier}", missing=why[tier])
        opened.append(FakeSlot(tier, had[tier]))
        return opened[-1]

    return open_one, opened


async def seen(
    had: dict[Tier, Outcome], why: dict[Tier, str], found: Found = NONE
) -> tuple[Probe, list[FakeSlot]]:
    opener, opened = machine(had, why)
    return await examine(opener, lambda: found), opened


OK = Outcome("ok", stdout=b"proc\n")


async def test_on_macos_only_what_contains_nothing_can_be_had() -> None:
    why = "jails are made of Linux namespaces, and this is darwin"
    found, opened = await seen({"process": OK}, {"gvisor": "gVisor is for Linux", "jail": why})
    assert found.tier == "process"
    assert found.unavailable == {"gvisor": "gVisor is for Linux", "jail": why}
    assert found.quotas == ()
    lacking = found.lacking("process")
    for name in ("cpu share", "pids", "scratch size", "scratch files", "network"):
        assert any(line.startswith(f"{name} is not enforced: ") for line in lacking), name
    assert f"jail: {why}" in found.missing
    assert all(slot.closed for slot in opened)
    mac = Surroundings(platform="darwin")
    assert remedies(found, mac, "jail") == (
        "run the workers on Linux: there are no other systems that code is contained on",
    )


async def test_in_a_locked_down_container_the_reason_and_the_way_out_are_named() -> None:
    why = "it could not be set up: PermissionError: unshare: Operation not permitted"
    found, _ = await seen({"process": OK}, {"gvisor": NO_RUNSC, "jail": why})
    locked = Surroundings(root=False, container=True, sysctls={"user.max_user_namespaces": 0})
    advice = "\n".join(remedies(found, locked, "jail"))
    assert "sysctl -w user.max_user_namespaces=15000" in advice
    assert "--cap-add SYS_ADMIN" in advice
    assert "runsc" not in advice
    assert "apt-get install runsc" in "\n".join(remedies(found, locked, "gvisor"))


async def test_where_nothing_works_there_is_no_tier() -> None:
    why: dict[Tier, str] = {"gvisor": NO_RUNSC, "jail": "no", "process": "no pidfd"}
    found, _ = await seen({}, why)
    assert (found.tier, found.held) == (None, {})
    assert "process: no pidfd" in found.missing
    assert remedies(found, Surroundings(), "jail") == ()


async def test_a_tier_whose_program_does_not_run_cannot_be_had() -> None:
    found, opened = await seen(
        {"jail": Outcome("failed", error="the filter was refused"), "process": OK},
        {"gvisor": NO_RUNSC},
    )
    assert found.unavailable["jail"] == "the filter was refused"
    assert found.tier == "process"
    assert all(slot.closed for slot in opened)


@pytest.mark.parametrize("version", [1, 2])
async def test_cgroups_hold_what_they_have_controllers_for(version: int) -> None:
    folders = dict.fromkeys(("memory", "pids", "cpuacct"), "/somewhere")
    cgroup = Found(version, folders)  # type: ignore[arg-type]
    found, _ = await seen({"gvisor": OK, "jail": OK, "process": OK}, {}, cgroup)
    by = {tier: {each.name: each.by for each in held} for tier, held in found.held.items()}
    for tier in ("gvisor", "jail", "process"):
        assert by[tier]["memory"] == by[tier]["cpu time"] == f"cgroup v{version}"
        assert by[tier]["cpu share"] == "nothing"
    assert (by["jail"]["pids"], by["gvisor"]["pids"]) == (f"cgroup v{version}", "gVisor")
    assert any(
        line.startswith("cpu share") and "no such controller" in line for line in found.missing
    )


@pytest.mark.parametrize(("printed", "by"), [(b"proc\n", "rlimit and watchdog"), (b"\n", "rlimit")])
async def test_a_jail_without_proc_is_not_watched(printed: bytes, by: str) -> None:
    jailed = Outcome("ok", stdout=printed)
    found, _ = await seen({"jail": jailed, "process": OK}, {"gvisor": NO_RUNSC})
    held = {quota.name: quota.by for quota in found.quotas}
    assert held["memory"] == held["cpu time"] == by
    process = {quota.name: quota.by for quota in found.held["process"]}
    assert process["memory"] == "rlimit"


def test_surroundings_are_read_from_proc(tmp_path) -> None:
    sysctls = tmp_path / "proc/sys/kernel"
    sysctls.mkdir(parents=True)
    (sysctls / "unprivileged_userns_clone").write_text("0\n")
    (tmp_path / ".dockerenv").touch()
    found = look(tmp_path)
    assert found.container
    assert found.sysctls == {"kernel.unprivileged_userns_clone": 0}
