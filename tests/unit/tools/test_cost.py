"""What calls cost, and what they are expected to."""

from __future__ import annotations

import pytest

from agentray.tools.cost import Estimate, Estimates, SlotShare, call_cost

SLOT = SlotShare(cpu=0.5, memory_bytes=100.0)


@pytest.mark.parametrize(
    ("wall_s", "cpu_s", "memory_bytes", "cost"),
    [
        (2.0, 0.0, 0, 2.0),  # it only holds the slot
        (2.0, 1.0, 100, 2.0),  # exactly a slot's part
        (2.0, 3.0, 0, 6.0),  # three times its CPU
        (2.0, 0.0, 400, 8.0),  # four times its memory
        (2.0, 3.0, 400, 8.0),  # the dominant one counts, not the sum
        (0.0, 0.0, 1_000, 0.0),
    ],
)
def test_a_call_costs_its_dominant_share_in_slot_seconds(
    wall_s: float, cpu_s: float, memory_bytes: int, cost: float
) -> None:
    assert call_cost(wall_s, cpu_s, memory_bytes, SLOT) == cost


def test_an_unknown_tool_is_judged_by_what_it_was_declared_to_take() -> None:
    estimates = Estimates(SLOT)
    declared = estimates.of("ada", "new", cpu=1.0, memory_bytes=0, timeout_s=60.0)
    assert declared == Estimate(1.0, 2.0)
    assert declared.rate == 2.0
    short = estimates.of("ada", "new", cpu=0.0, memory_bytes=0, timeout_s=0.2)
    assert short == Estimate(0.2, 0.2)
    assert estimates.of("ada", "new", cpu=0.0, memory_bytes=0, timeout_s=0.0).rate == 1.0


def known(estimates: Estimates, tenant: str, tool: str = "tool") -> Estimate:
    return estimates.of(tenant, tool, cpu=0.0, memory_bytes=0, timeout_s=60.0)


def test_a_tenants_own_calls_tell_more_than_those_of_others() -> None:
    estimates = Estimates(SLOT)
    estimates.learn("ada", "tool", wall_s=10.0, cost=20.0)
    assert known(estimates, "bob") == Estimate(10.0, 20.0)
    estimates.learn("bob", "tool", wall_s=0.1, cost=0.1)
    assert known(estimates, "bob") == Estimate(0.1, 0.1)
    assert known(estimates, "ada") == Estimate(10.0, 20.0)
    assert 0.1 < known(estimates, "eve").wall_s < 10.0


def test_estimates_follow_what_calls_take_now() -> None:
    estimates = Estimates(SLOT)
    estimates.learn("ada", "tool", wall_s=10.0, cost=10.0)
    for _ in range(30):
        estimates.learn("ada", "tool", wall_s=1.0, cost=2.0)
    assert known(estimates, "ada").wall_s == pytest.approx(1.0, abs=0.05)
    assert known(estimates, "ada").rate == pytest.approx(2.0, abs=0.1)


def test_the_estimates_that_are_used_least_are_forgotten() -> None:
    estimates = Estimates(SLOT, max_known=4)
    estimates.learn("ada", "often", wall_s=5.0, cost=5.0)
    for number in range(20):
        assert known(estimates, "ada", "often").wall_s == 5.0
        estimates.learn("", f"once{number}", wall_s=9.0, cost=9.0)
    assert known(estimates, "ada", "once0").wall_s == 1.0
    assert known(estimates, "ada", "once19").wall_s == 9.0
