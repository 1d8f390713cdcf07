"""What is done with batches, lines and free capacity."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentray.models.batch_rules import (
    LONGEST_REST_S,
    MAX_ATTEMPTS,
    Rests,
    next_step,
    pause_s,
    shares,
    verdict,
)
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
    ("status", "code", "upstream", "means"),
    [
        (200, None, None, "succeeded"),
        (400, "model_error", 400, "failed"),
        (404, "model_not_found", None, "failed"),
        (413, "body_too_large", None, "failed"),
        (429, "overloaded", None, "later"),
        (429, "model_rate_limited", 429, "later"),
        (500, "internal_error", None, "again"),
        (502, "model_unavailable", None, "later"),
        (502, "model_unavailable", 500, "again"),
        (502, "model_unavailable", 503, "later"),
        (502, "model_error", 401, "again"),
        (502, "model_error", 404, "again"),
        (502, "model_error", 405, "failed"),
        (502, "model_error", None, "failed"),
        (503, "storage_unavailable", None, "later"),
    ],
)
def test_what_may_pass_is_tried_again_and_nothing_else(
    status: int, code: str | None, upstream: int | None, means: str
) -> None:
    body = msgspec.json.encode({"error": {"code": code, "details": {"status": upstream}}})
    assert verdict(status, body, 1) == means
    assert verdict(status, body, MAX_ATTEMPTS) == ("failed" if means == "again" else means)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"error": "x"}', b'{"error": null}'])
def test_a_failure_that_says_nothing_may_pass(body: bytes) -> None:
    assert verdict(502, body, 99) == "later"


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


def test_a_batch_rests_longer_each_time_until_a_line_is_answered() -> None:
    rests, now, waits = Rests(), 100.0, list[float]()
    for _ in range(9):
        rests.put_off("a", now, None, 1.0)
        began = now
        while rests.resting(now):
            now += 0.5
        waits.append(now - began)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    rests.put_off("a", now, None, 1.0)
    rests.answered("a")
    assert rests.resting(now) == []
    rests.put_off("a", now, None, 1.0)
    assert (rests.resting(now + 0.9), rests.resting(now + 1.0)) == (["a"], [])


def test_lines_that_fail_together_are_one_failure_of_their_batch() -> None:
    rests = Rests()
    for _ in range(8):
        rests.put_off("a", 0.0, None, 1.0)
    assert rests.resting(0.9) == ["a"]
    assert rests.resting(1.0) == []


def test_a_batch_rests_as_long_as_it_was_told_and_not_for_hours() -> None:
    rests = Rests()
    rests.put_off("a", 0.0, 20.0, 0.0)
    rests.put_off("b", 0.0, 3_600.0, 0.0)
    assert rests.resting(19.9) == ["a", "b"]
    assert rests.resting(20.0) == ["b"]
    assert rests.resting(LONGEST_REST_S) == []
