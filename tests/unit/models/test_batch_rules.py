"""What is done with batches, lines and free capacity."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentray.models.batch_rules import next_step, pause_s, shares, verdict
from agentray.storage.batches import BatchRow


def batch(**facts: Any) -> BatchRow:
    fields: dict[str, Any] = dict.fromkeys(BatchRow.__struct_fields__)
    fields |= {"status": "in_progress", "total": 10, "completed": 0, "failed": 0}
    fields |= {"overdue": False, "running": False, **facts}
    return BatchRow(**fields)


@pytest.mark.parametrize(
    ("facts", "step"),
    [
        ({"status": "validating"}, "validate"),
        ({"status": "validating", "overdue": True}, ("end", "expired")),
        ({}, "run"),
        ({"completed": 6, "failed": 3}, "run"),
        ({"completed": 6, "failed": 4}, "finalize"),
        ({"completed": 6, "failed": 4, "overdue": True}, "finalize"),
        ({"completed": 6, "overdue": True, "running": True}, "wait"),
        ({"completed": 6, "overdue": True}, ("end", "expired")),
        ({"status": "finalizing"}, ("end", "completed")),
        ({"status": "finalizing", "overdue": True}, ("end", "completed")),
        ({"status": "cancelling", "running": True}, "wait"),
        ({"status": "cancelling"}, ("end", "cancelled")),
        ({"status": "cancelling", "overdue": True}, ("end", "cancelled")),
        ({"status": "completed"}, "wait"),
    ],
)
def test_a_batch_goes_from_status_to_status(facts: dict[str, Any], step: Any) -> None:
    assert next_step(batch(**facts)) == step


@pytest.mark.parametrize(
    ("status", "code", "means"),
    [
        (200, None, "succeeded"),
        (400, "model_error", "failed"),
        (404, "model_not_found", "failed"),
        (413, "body_too_large", "failed"),
        (429, "overloaded", "later"),
        (429, "model_rate_limited", "later"),
        (500, "internal_error", "later"),
        (502, "model_unavailable", "later"),
        (502, "model_error", "failed"),
        (503, "storage_unavailable", "later"),
    ],
)
def test_what_may_pass_is_tried_again_and_nothing_else(
    status: int, code: str | None, means: str
) -> None:
    assert verdict(status, b'{"error": {"code": "%b"}}' % (code or "").encode()) == means


def test_a_failure_that_says_nothing_may_pass() -> None:
    assert verdict(502, b"<html>") == "later"


@given(st.integers(1, 10_000), st.none() | st.floats(0, 1e4), st.floats(0, 1))
def test_a_pause_is_bounded_and_never_shorter_than_asked(
    attempts: int, asked: float | None, jitter: float
) -> None:
    pause = pause_s(attempts, asked, jitter)
    assert (asked or 0.0) <= pause <= max(600.0, asked or 0.0)
    assert pause >= 0.5


def test_pauses_double() -> None:
    assert [pause_s(n, None, 1.0) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 8.0]


@given(st.integers(0, 50), st.integers(0, 20), st.integers(0, 1_000))
def test_all_free_capacity_is_shared_as_evenly_as_it_goes(free: int, count: int, turn: int) -> None:
    found = shares(free, range(count), turn)
    assert sum(n for _, n in found) == (free if count else 0)
    assert len({batch for batch, _ in found}) == len(found)
    sizes = [n for _, n in found]
    assert not sizes or max(sizes) - min(sizes) <= 1
    if free >= count:
        assert len(found) == count


def test_one_place_goes_round() -> None:
    assert [shares(1, "abc", turn)[0][0] for turn in range(4)] == ["a", "b", "c", "a"]
