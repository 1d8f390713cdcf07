"""Which epochs of sessions are known, and who waits for the end of older ones."""

from __future__ import annotations

from agentray.tools.fences import Fences

SESSION = ("acme", "s")


def test_the_newest_epoch_that_was_heard_of_counts() -> None:
    fences = Fences()
    assert fences.epoch(SESSION) == -1
    fences.heard(SESSION, 3)
    fences.heard(SESSION, 2)
    assert fences.epoch(SESSION) == 3


def test_epochs_are_forgotten_of_the_sessions_that_are_quiet_for_longest() -> None:
    fences = Fences(max_epochs=2)
    for session in ("a", "b", "a", "c"):
        fences.heard(("acme", session), 1)
    assert [fences.epoch(("acme", session)) for session in "abc"] == [1, -1, 1]


def test_each_fence_is_told_once_when_it_is_over() -> None:
    fences = Fences()
    fences.wait("host", 1, SESSION, 2)
    fences.wait("host", 2, SESSION, 3)
    fences.wait("gone", 1, SESSION, 2)
    fences.left("gone")
    assert fences.settle(lambda _, epoch: epoch == 2) == [("host", 1)]
    assert fences.settle(lambda _, epoch: epoch == 2) == []
    assert fences.settle(lambda *_: True) == [("host", 2)]
