"""Where the shipped mix of steps goes with the default settings."""

from __future__ import annotations

from collections import Counter

import pytest

from agentray.config.settings import RoutingSettings
from benchmarks.step_mix import STEPS, main, routed, share_of_small, steps


def test_seven_to_eight_of_ten_calls_of_the_shipped_mix_go_to_the_small_tier() -> None:
    assert 0.7 <= share_of_small(routed(steps())) <= 0.8


def test_it_is_not_the_seed_that_makes_it_so() -> None:
    shares = [share_of_small(routed(steps(seed), seed=seed)) for seed in range(8)]
    assert 0.7 <= sum(shares) / len(shares) <= 0.8


def test_the_mix_is_the_same_for_a_seed_and_another_one_for_another() -> None:
    assert steps() == steps()
    assert steps(1) != steps(2)
    assert STEPS <= len(steps()) < STEPS + 20


def test_every_kind_of_step_is_in_the_mix_and_no_kind_is_all_of_it() -> None:
    kinds = Counter(step.kind for step in steps())
    assert set(kinds) == {"plan", "tool_follow_up", "summarise", "format", "answer"}
    assert max(kinds.values()) < 0.7 * STEPS


def test_chance_takes_the_share_that_is_held_out() -> None:
    mix = steps()
    assert not any(call.held_out for call in routed(mix, RoutingSettings(holdout=0.0)))
    free = [call for call in routed(mix, RoutingSettings(holdout=1.0)) if call.tier == "small"]
    assert not free, "whatever may be held out is, and its tool loop follows"


def test_the_table_has_a_line_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "steps", "share", "small", "large"]
    assert {line.split()[0] for line in lines[1:6]} == {step.kind for step in steps()}
    assert lines[6].startswith("all")
