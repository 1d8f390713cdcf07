"""Whatever interleaves, dies or sleeps: one writer per epoch, and each turn ends exactly once."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from agentray.events import (
    AnyEvent,
    ModelCalled,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    ToolCalled,
    ToolFinished,
    TurnAccepted,
    TurnFinished,
    TurnResumed,
)
from agentray.memory.window import join
from tests.unit.sessions.world import RULES, World, fold_from

# Each byte is one choice: an empty string is a quiet world, and shorter ones are simpler.
schedules = st.integers(0, 600).flatmap(lambda size: st.binary(min_size=size, max_size=size))


def play(schedule: bytes) -> World:
    world = World(schedule)
    world.ask(None)
    while not world.quiet:
        world.happen()
    world.settle()
    return world


def turns_of(events: list[AnyEvent]) -> dict[str, list[AnyEvent]]:
    found: dict[str, list[AnyEvent]] = {}
    for each in events:
        found.setdefault(each.turn_id, []).append(each)
    return found


def check_journal(world: World) -> None:
    fence = world.fence
    epochs = [epoch for epoch, _ in fence.journal]
    events = [each for _, each in fence.journal]
    assert [each.seq for each in events] == list(range(1, len(events) + 1)), "seq has a gap"
    assert epochs == sorted(epochs), "an owner wrote behind its successor"
    for epoch, each in fence.journal:
        if isinstance(each, TurnResumed):
            assert (each.epoch, each.owner) == (epoch, fence.owner_of[epoch])
    # Each message is one turn; only those may be missing whose sender saw an owner die.
    asked = {f"turn{number + 1}" for number in range(world.asked)}
    assert asked - world.unanswered <= set(fence.turns) <= asked
    # In the order of their acceptance, one at a time, each to its end.
    assert fence.begun() == list(fence.turns)
    for row in fence.turns.values():
        assert row.state == "done"
    for turn_id, own in turns_of(events).items():
        assert isinstance(own[0], TurnAccepted)
        assert isinstance(own[-1], TurnFinished)
        kinds = Counter(type(each) for each in own)
        assert kinds[TurnAccepted] == kinds[TurnFinished] == 1, turn_id
        assert own[-1].seq - own[0].seq == len(own) - 1
        check_tools(own)
        check_recovery(own)


def check_tools(own: list[AnyEvent]) -> None:
    settled: set[str] = set()
    for each in own:
        if isinstance(each, ModelFinished):
            settled.clear()
        elif isinstance(each, ToolFinished):
            assert each.call_id not in settled, "settled twice"
            settled.add(each.call_id)
        elif isinstance(each, ToolCalled):
            assert each.call_id not in settled, "called although it is settled"
            assert each.name == "again" or each.attempt == 1, "a report tool was called twice"


def check_recovery(own: list[AnyEvent]) -> None:
    fruitless = 0
    for each in own:
        if isinstance(each, TurnResumed):
            fruitless += 1
        elif isinstance(each, ModelFinished | ToolFinished):
            fruitless = 0
        elif fruitless > RULES.recovery_attempts:
            assert isinstance(each, ModelVoided | TurnFinished), f"{each} after too many takeovers"


def check_text(world: World) -> None:
    called: ModelCalled | None = None
    voided = ""
    for _, each in world.fence.journal:
        if isinstance(each, ModelCalled):
            called = each
            assert each.continued_from in (0, len(voided))
        elif isinstance(each, ModelFinished | ModelVoided | ModelFailed):
            assert called is not None
            lost = world.tails.get(called.seq, "") is None
            shown = world.shown.get(called.seq, "")
            assert lost or each.text.startswith(shown), "what was shown is not what there is"
            if called.continued_from:
                assert each.text.startswith(voided[: called.continued_from])
            voided = each.text if isinstance(each, ModelVoided) else ""


def check_windows(world: World) -> None:
    events = [each for _, each in world.fence.journal]
    whole = fold_from(events)
    assert whole.turn is None
    assert whole.turns == len(world.fence.turns)
    assert whole.cost == world.fence.cost
    for copy in world.hot:
        then = fold_from(events[: copy.seq])
        assert (copy.window, copy.cost) == (then.window, then.cost), "a hot copy differs"
    begins = [index for index, each in enumerate(events) if isinstance(each, TurnAccepted)]
    for count, index in enumerate(reversed(begins), start=1):
        shown = min(count, RULES.window_turns)
        assert fold_from(events[index:]).window == whole.window[-shown:], "a suffix differs"
    messages = json.loads(b"[" + join(whole.window) + b"]")
    open_calls: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            open_calls.remove(message["tool_call_id"])
            continue
        assert not open_calls, "a call is parted from its result"
        open_calls = {call["id"] for call in message.get("tool_calls", ())}
    assert not open_calls


def check(world: World) -> None:
    check_journal(world)
    check_text(world)
    check_windows(world)


# Seven schedules in two thousand tell that the epoch is not looked at.
@given(schedules)
@settings(max_examples=1_000)
def test_every_accepted_turn_ends_once_whatever_interleaves(schedule: bytes) -> None:
    world = play(schedule)
    event(f"{min(len(world.fence.owner_of), 5)}+ claims")
    check(world)


@pytest.mark.nightly
@given(schedules)
@settings(max_examples=10_000)
def test_every_accepted_turn_ends_once_whatever_interleaves_ten_thousand_times(
    schedule: bytes,
) -> None:
    check(play(schedule))
