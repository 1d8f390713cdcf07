"""Who is first by virtual time, and what those owe who come back."""

from __future__ import annotations

from agentray.tools.tag_order import Entrant, TagOrder


class One(Entrant):
    def __init__(self, name: str, rank: int = 0) -> None:
        super().__init__(rank)
        self.name = name

    def __repr__(self) -> str:
        return self.name


def order_of(*entrants: One) -> TagOrder[One]:
    order: TagOrder[One] = TagOrder()
    for one in entrants:
        order.enter(one)
    return order


def turn(order: TagOrder[One], time: float) -> One:
    """Give the first one its turn, which costs so much."""
    one = order.first()
    assert one is not None
    order.begin(one)
    order.charge(one, time)
    return one


def test_whose_tag_is_least_is_first_and_equals_in_the_order_they_came() -> None:
    a, b, c = One("a"), One("b"), One("c")
    order = order_of(a, b, c)
    assert [turn(order, time) for time in (3.0, 1.0, 2.0)] == [a, b, c]
    assert [turn(order, 2.0) for _ in range(4)] == [b, c, a, b]


def test_among_those_that_come_the_lowest_rank_is_first() -> None:
    low, high = One("low", rank=1), One("high", rank=0)
    assert order_of(low, high).first() is high


def test_who_leaves_is_not_first_and_keeps_its_tag() -> None:
    a, b = One("a"), One("b")
    order = order_of(a, b)
    turn(order, 5.0)
    order.leave(a)
    turn(order, 1.0)
    assert order.first() is b
    order.enter(a)
    assert order.owes(a)
    assert [turn(order, 1.0) for _ in range(4)] == [b] * 4
    order.leave(b)
    order.leave(b)
    assert order.first() is a


def test_who_comes_goes_before_those_that_are_given_something_back_afterwards() -> None:
    a, new = One("a"), One("new")
    order = order_of(a)
    for _ in range(3):
        turn(order, 10.0)
    order.enter(new)
    order.charge(a, -29.0)
    assert turn(order, 1.0) is new
    # From then on it has its turns as others do.
    assert [turn(order, 1.0) for _ in range(4)] == [a, new, a, new]


def test_what_was_used_while_nobody_waited_is_not_owed_nor_given_back() -> None:
    a, b = One("a"), One("b")
    order = order_of(a)
    turn(order, 100.0)
    order.leave(a)
    for one in (a, b):
        order.enter(one)
        assert not order.owes(one)
    order.charge(a, -90.0)
    assert {turn(order, 1.0), turn(order, 1.0)} == {a, b}


def test_what_one_uses_while_it_comes_counts() -> None:
    a, b = One("a"), One("b")
    order = order_of(a)
    turn(order, 1.0)
    turn(order, 1.0)
    order.enter(b)
    order.charge(b, 5.0)
    assert order.first() is a


def test_entries_that_count_no_more_do_not_pile_up() -> None:
    a, b = One("a"), One("b")
    order = order_of(a, b)
    turn(order, 1.0)
    turn(order, 1.0)
    for _ in range(10_000):
        order.charge(b, 0.001)
    assert len(order._heap) <= 100
    assert order.first() is a
