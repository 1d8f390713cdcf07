"""When a model is left alone, for how long, and who finds out that it is back."""

from __future__ import annotations

from typing import Any

import pytest

from agentray.config.settings import BreakerSettings
from agentray.models.breaker import Breaker

NOW = 1_000.0


def breaker(**settings: Any) -> Breaker:
    return Breaker(BreakerSettings(min_calls=4, window_s=30.0, open_s=5.0, **settings))


def opened(at: float = NOW, **settings: Any) -> Breaker:
    """Return one that opened at that time."""
    found = breaker(**settings)
    for _ in range(4):
        found.failed(at, "it broke", probe=False)
    assert found.opened
    return found


def probe(of: Breaker, at: float) -> bool:
    """Make a call if it may be made; return whether it is the probe."""
    assert of.wait_s(at) == 0
    return of.begun()


@pytest.mark.parametrize(
    ("answered", "failed", "opens"),
    [(0, 3, False), (0, 4, True), (2, 2, True), (3, 2, False), (3, 3, True), (20, 19, False)],
)
def test_a_share_of_failures_over_a_least_number_of_calls_opens_it(
    answered: int, failed: int, opens: bool
) -> None:
    found = breaker()
    for _ in range(answered):
        found.succeeded(NOW, probe=found.begun())
    for _ in range(failed):
        found.failed(NOW, "it broke", probe=found.begun())
    assert found.opened is opens
    assert (found.wait_s(NOW) > 0) is opens
    assert found.reason == "it broke"


def test_the_share_can_be_another_one() -> None:
    found = breaker(failure_share=0.75)
    for outcome in "+--":
        found.succeeded(NOW, probe=False) if outcome == "+" else found.failed(NOW, "", probe=False)
    assert not found.opened
    found.failed(NOW, "", probe=False)
    assert found.opened


def test_an_answer_alone_never_opens_it() -> None:
    found = breaker()
    for _ in range(3):
        found.failed(NOW, "", probe=False)
    found.succeeded(NOW, probe=False)
    assert not found.opened


def test_failures_are_forgotten_with_their_window() -> None:
    found = breaker()
    for _ in range(3):
        found.failed(NOW, "", probe=False)
    found.failed(NOW + 31, "", probe=False)
    assert not found.opened


@pytest.mark.parametrize(("last_at", "opens"), [(16, True), (29, True), (32, False)])
def test_the_window_slides_by_its_halves(last_at: float, opens: bool) -> None:
    found = breaker()
    for _ in range(3):
        found.failed(NOW, "", probe=False)
    found.succeeded(NOW + 15, probe=False)
    found.failed(NOW + last_at, "", probe=False)
    assert found.opened is opens


def test_while_it_is_open_nobody_calls_and_the_wait_ends() -> None:
    found = opened()
    assert [found.wait_s(NOW + s) for s in (0, 2, 4.5)] == [5.0, 3.0, 0.5]
    assert found.wait_s(NOW + 5) == 0


def test_one_call_at_a_time_finds_out_whether_it_is_back() -> None:
    found = opened()
    assert probe(found, NOW + 5)
    assert found.wait_s(NOW + 5) > 0
    assert not found.begun()
    assert found.opened


def test_a_probe_that_is_answered_closes_it() -> None:
    found = opened()
    found.succeeded(NOW + 6, probe=probe(found, NOW + 5))
    assert not found.opened
    assert found.wait_s(NOW + 6) == 0
    # And nothing of before counts any more.
    found.failed(NOW + 6, "", probe=found.begun())
    assert not found.opened


def test_each_probe_that_fails_doubles_the_wait_up_to_a_bound() -> None:
    found, now = opened(), NOW
    waits: list[float] = []
    for _ in range(7):
        waits.append(found.wait_s(now))
        now += waits[-1]
        found.failed(now, "still", probe=probe(found, now))
    assert waits == [5, 10, 20, 40, 80, 80, 80]
    assert found.reason == "still"
    now += 80
    found.succeeded(now, probe=probe(found, now))
    for _ in range(4):
        found.failed(now, "again", probe=False)
    assert found.wait_s(now) == 5, "the wait begins anew once it was back"


def test_a_probe_that_is_given_up_makes_way_for_the_next() -> None:
    found = opened()
    found.left(probe=probe(found, NOW + 5))
    assert found.opened
    assert probe(found, NOW + 5)


def test_giving_up_says_nothing_while_it_is_closed() -> None:
    found = breaker()
    for _ in range(10):
        found.left(probe=found.begun())
    assert not found.opened


def test_calls_from_before_it_opened_neither_close_it_nor_keep_it_open() -> None:
    found = opened()
    found.succeeded(NOW + 1, probe=False)
    assert found.opened
    found.failed(NOW + 4, "late", probe=False)
    assert (found.wait_s(NOW + 5), found.reason) == (0, "it broke")
    # Nor do they take the probe's place.
    assert probe(found, NOW + 5)
    found.left(probe=False)
    assert found.wait_s(NOW + 5) > 0


def test_a_limit_is_a_gate_that_ends_by_itself_and_no_fault() -> None:
    found = breaker()
    for _ in range(10):
        found.limited(NOW, 2.0, probe=found.begun())
    assert not found.opened
    assert (found.wait_s(NOW), found.wait_s(NOW + 1.5)) == (2.0, 0.5)
    assert found.wait_s(NOW + 2) == 0
    assert not found.begun()


def test_the_longest_of_several_limits_is_in_force() -> None:
    found = breaker()
    found.limited(NOW, 9.0, probe=False)
    found.limited(NOW + 1, 2.0, probe=False)
    assert found.wait_s(NOW + 1) == 8.0


def test_a_limit_outlasts_a_breaker_that_opens_for_less() -> None:
    found = breaker()
    found.limited(NOW, 60.0, probe=False)
    for _ in range(4):
        found.failed(NOW, "", probe=False)
    assert found.opened
    assert found.wait_s(NOW) == 60.0


def test_a_probe_that_is_limited_closes_it_behind_the_gate() -> None:
    found = opened()
    found.limited(NOW + 5, 3.0, probe=probe(found, NOW + 5))
    assert not found.opened
    assert (found.wait_s(NOW + 5), found.wait_s(NOW + 8)) == (3.0, 0)
