"""When a worker is added, and when one is removed."""

from __future__ import annotations

from typing import Any

import pytest

from agentray.config.worker_settings import ToolWorkersSettings
from agentray.tools.scaling import Idle, Scaling

SETTINGS: dict[str, Any] = {
    "min": 1,
    "max": 3,
    "up_after_wait_s": 1.0,
    "up_delay_s": 2.0,
    "down_after_idle_s": 60.0,
}


class Watch:
    """Asks once a second, as the scheduler does."""

    def __init__(self, **settings: Any) -> None:
        self.scaling = Scaling(ToolWorkersSettings(**{**SETTINGS, **settings}))
        self.now = 1_000.0

    def said(
        self,
        wait_s: float,
        *,
        there: int = 1,
        started: int | None = None,
        nodes: int = 1,
        idle: tuple[float | None, ...] = (),
    ) -> str:
        workers = [Idle(f"w{n}", None) for n in range(there - len(idle))]
        workers += [
            Idle(f"idle{n}", None if since is None else self.now - since)
            for n, since in enumerate(idle)
        ]
        self.now += 1.0
        return self.scaling.decide(
            now=self.now,
            nodes=nodes,
            started=there if started is None else started,
            workers=workers,
            wait_s=wait_s,
        )


def test_the_least_workers_are_started_one_after_the_other() -> None:
    watch = Watch(min=2)
    assert watch.said(0, there=0) == "add"
    assert watch.said(0, there=0, started=1) == "add"
    assert watch.said(0, there=0, started=2) == ""


def test_without_a_least_number_there_is_a_worker_for_each_node() -> None:
    watch = Watch(min=None)
    assert watch.said(0, there=1, nodes=2) == "add"
    assert watch.said(0, there=2, nodes=2) == ""
    # More nodes than workers at most: each has its own nevertheless.
    assert watch.said(0, there=4, nodes=5) == "add"


def test_a_long_wait_adds_a_worker_when_it_has_lasted() -> None:
    watch = Watch()
    assert [watch.said(5.0) for _ in range(3)] == ["", "", "add"]


def test_a_wait_that_was_long_for_a_moment_adds_none() -> None:
    watch = Watch()
    for _ in range(10):
        assert watch.said(5.0) == ""
        assert watch.said(5.0) == ""
        assert watch.said(1.0) == ""


def test_none_is_added_while_another_is_on_its_way() -> None:
    watch = Watch()
    for _ in range(20):
        assert watch.said(5.0, there=1, started=2) == ""
    assert watch.said(5.0, there=2) == "add"


def test_there_are_never_more_than_the_most() -> None:
    watch = Watch()
    assert {watch.said(100.0, there=3) for _ in range(20)} == {""}


@pytest.mark.parametrize(("idle_s", "removed"), [(50.0, ""), (70.0, "idle0")])
def test_a_worker_is_removed_when_it_has_long_been_idle(idle_s: float, removed: str) -> None:
    assert Watch().said(0, there=2, idle=(idle_s,)) == removed


def test_the_last_workers_stay_however_long_they_are_idle() -> None:
    assert Watch().said(0, there=1, idle=(1e6,)) == ""


def test_one_is_removed_at_a_time() -> None:
    watch = Watch()
    assert watch.said(0, there=3, idle=(100.0, 100.0)) == "idle0"
    assert watch.said(0, there=2, idle=(100.0,)) == "idle0"
    assert watch.said(0, there=1, idle=(100.0,)) == ""


def test_a_worker_that_does_not_come_is_given_up_and_one_that_came_back_is_not() -> None:
    scaling = Scaling(ToolWorkersSettings(**SETTINGS))
    assert scaling.overdue(0.0, {"a", "b"}, {"a"}) == []
    assert scaling.overdue(100.0, {"a", "b"}, {"b"}) == []
    assert scaling.overdue(119.0, {"a", "b"}, set[str]()) == []
    assert scaling.overdue(220.0, {"a", "b"}, set[str]()) == ["a"]
    # Another one of its name has its own time.
    assert scaling.overdue(221.0, {"b"}, set[str]()) == []
    assert scaling.overdue(239.5, {"a", "b"}, set[str]()) == ["b"]


def test_none_is_removed_while_calls_wait_long() -> None:
    assert Watch().said(5.0, there=3, idle=(100.0,)) == ""
