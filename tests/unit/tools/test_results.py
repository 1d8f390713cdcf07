"""Which results a worker keeps, and for how long."""

from __future__ import annotations

from agentray.tools.results import Kept, Results
from agentray.tools.spec import ToolResult


def kept(at: float = 0.0, *, size: int = 500) -> Kept:
    return Kept(ToolResult("ok", "x" * size), 1.0, at)


def results(max_bytes: int = 3_000) -> Results:
    return Results(max_bytes=max_bytes, arrived_s=10.0, lost_s=100.0)


def test_a_result_is_kept_longer_if_nobody_has_read_it() -> None:
    ours = results()
    ours.keep("read", kept())
    ours.keep("unread", kept())
    ours.arrived("read")
    assert ours.expire(9.9) == []
    assert ours.expire(10.0) == ["read"]
    assert ours.expire(99.9) == []
    assert ours.expire(100.0) == ["unread"]
    assert list(ours) == []


def test_results_that_have_arrived_make_room_first_then_the_oldest() -> None:
    ours = results()
    for key in "abc":
        assert ours.keep(key, kept()) == []
    ours.arrived("b")
    assert ours.keep("d", kept()) == ["b"]
    assert ours.keep("e", kept()) == ["a"]
    assert set(ours) == {"c", "d", "e"}


def test_a_result_that_is_too_large_is_not_kept_and_that_is_said() -> None:
    ours = results()
    assert ours.keep("large", kept(size=10_000)) == ["large"]
    assert ours.get("large") is None


def test_the_same_result_again_counts_once() -> None:
    ours = results()
    for _ in range(10):
        assert ours.keep("same", kept(size=2_000)) == []
    assert ours.get("same") is not None


def test_scratch_counts_too() -> None:
    ours = results()
    scratch = Kept(ToolResult("ok", "", scratch=b"x" * 2_400), 1.0, 0.0)
    ours.keep("a", scratch)
    assert ours.keep("b", scratch) == ["a"]
    ours.clear()
    assert ours.keep("c", scratch) == []
