"""What `agentray doctor` makes of what the probe found; real machines: integration tests."""

from __future__ import annotations

import msgspec
import pytest

from agentray.cli.doctor import Check, Diagnosis, diagnose, shown
from agentray.tools.sandbox.base import Tier
from agentray.tools.sandbox.cgroups import Found
from agentray.tools.sandbox.probe import Probe, Quota

WHY = "jails are made of Linux namespaces, and this is darwin"
HELD: dict[Tier, tuple[Quota, ...]] = {
    "jail": (Quota("wall time", "supervisor"), Quota("cpu share", "nothing")),
    "process": (Quota("wall time", "supervisor"), Quota("network", "nothing", "no containment")),
}
JAIL = Probe(
    "jail", {"gvisor": "no runsc was found on PATH"}, HELD, (), Found(missing="none is writable")
)
MAC = Probe(
    "process",
    {"gvisor": "gVisor is for Linux, and this is darwin", "jail": WHY},
    {"process": HELD["process"]},
    (),
    Found(missing="cgroups cannot be read"),
)
NOTHING = Probe(None, dict.fromkeys(("gvisor", "jail", "process"), "no"), {}, (), Found())
THERE = (Check("Ray", "ok", "2"), Check("extra mcp", "note", "not installed: agentray[mcp]"))


def of(
    probe: Probe, tier: Tier, weaker: str = "none", checks: tuple[Check, ...] = THERE
) -> Diagnosis:
    return diagnose(probe, tier, weaker, ("install it",), checks)


def test_a_machine_with_the_configured_tier_is_ready_and_names_what_is_not_enforced() -> None:
    found = of(JAIL, "jail")
    assert (found.ready, found.tier, found.reason) == (True, "jail", "")
    assert found.not_enforced == ("cpu share is not enforced: none is writable",)
    lines = shown(found)
    assert lines[0] == "sandbox: jail (configured: jail)"
    assert "  gvisor   cannot be had: no runsc was found on PATH" in lines
    assert "  cpu share      NOT ENFORCED" in lines
    assert "  ! cpu share is not enforced: none is writable" in lines
    assert "  cgroup   none to be used: none is writable" in lines
    assert "  - install it" in lines
    assert lines[-1] == "ready"


def test_untrusted_code_is_refused_unless_a_weaker_tier_is_named() -> None:
    refused = of(MAC, "jail")
    assert (refused.ready, refused.tier, refused.strongest) == (False, None, "process")
    assert refused.reason.startswith("code of models is refused: the configured tier jail cannot")
    assert WHY in refused.reason
    assert "tools.sandbox.allow_weaker: process" in refused.reason
    assert shown(refused)[0] == "sandbox: none (configured: jail)"
    assert shown(refused)[-1] == "not ready"
    named = of(MAC, "jail", "process")
    assert (named.ready, named.tier) == (True, "process")
    assert "allow_weaker lets process take its place" in named.reason
    assert named.not_enforced == ("network is not enforced: no containment",)
    assert any(named.reason in line for line in shown(named))


def test_a_weaker_tier_is_the_strongest_of_those() -> None:
    assert of(JAIL, "gvisor").tier is None
    assert of(JAIL, "gvisor", "process").tier == "jail"
    assert of(JAIL, "gvisor", "jail").tier == "jail"
    assert "tools.sandbox.allow_weaker: jail" in of(JAIL, "gvisor").reason


def test_no_tier_is_taken_that_is_weaker_than_the_weakest_allowed() -> None:
    refused = of(MAC, "gvisor", "jail")
    assert (refused.tier, refused.ready) == (None, False)
    assert "tools.sandbox.allow_weaker: process" in refused.reason


@pytest.mark.parametrize("weaker", ["none", "process"])
def test_where_nothing_works_nothing_is_offered(weaker: str) -> None:
    found = of(NOTHING, "jail", weaker)
    assert (found.ready, found.tier, found.quotas) == (False, None, ())
    assert "allow_weaker" not in found.reason
    assert shown(found)[-1] == "not ready"


def test_something_that_is_missing_is_not_ready_and_an_extra_is() -> None:
    bad = Check("HAProxy", "bad", "install ray[serve]")
    found = of(JAIL, "jail", checks=(*THERE, bad))
    assert not found.ready
    assert "  ! HAProxy          install ray[serve]" in shown(found)
    assert "  - extra mcp        not installed: agentray[mcp]" in shown(found)


def test_it_is_json_with_the_same_facts() -> None:
    found = of(MAC, "jail")
    assert msgspec.json.decode(msgspec.json.encode(found), type=Diagnosis) == found
