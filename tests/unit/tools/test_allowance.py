"""How rates and daily bounds of tenants are counted."""

from __future__ import annotations

from agentray.tools.allowance import Bucket, DailyBytes, TenantBuckets

DAY_S = 86_400


def test_whoever_takes_more_than_there_is_waits_until_it_has_come() -> None:
    bucket = Bucket(rate=10, burst=20, now=0)
    assert bucket.take(20, 0) == 0
    assert bucket.take(5, 0) == 0.5
    assert bucket.take(5, 0) == 1.0
    assert bucket.take(10, 2.0) == 0
    assert bucket.take(30, 100.0) == 1.0


def test_what_was_not_used_is_given_back_up_to_the_burst() -> None:
    bucket = Bucket(rate=1, burst=2, now=0)
    bucket.take(2, 0)
    bucket.give_back(5, 0)
    assert bucket.take(2, 0) == 0
    assert bucket.take(1, 0) == 1


def test_full_buckets_are_forgotten_and_empty_ones_are_not() -> None:
    buckets = TenantBuckets(rate=1, burst=1)
    buckets.get(("busy",), 0).take(1_000_000, 0)
    for number in range(20_000):
        buckets.get((str(number),), 0)
    assert buckets.get(("busy",), 0).take(1, 0) > 1_000_000 - 2
    assert len(buckets) <= 10_001


def test_the_bytes_of_a_day_come_back_with_the_next() -> None:
    daily = DailyBytes(100)
    daily.add("a", 60, DAY_S - 1)
    assert (daily.left("a", DAY_S - 1), daily.left("b", DAY_S - 1)) == (40, 100)
    daily.add("a", 60, DAY_S - 1)
    assert daily.left("a", DAY_S - 1) == 0
    assert daily.left("a", DAY_S) == 100
