"""When an owner may believe that another one is dead."""

from __future__ import annotations

from typing import Any, cast

import pytest

from agentray.clock import ManualClock
from agentray.config.settings import SessionsSettings
from agentray.errors import StorageUnavailableError
from agentray.sessions.ownership import Ownership

SETTINGS = SessionsSettings(beat_s=2.0, term_s=6.0)


class Store:
    """A store that takes its time, or is away."""

    def __init__(self, clock: ManualClock) -> None:
        self.takes_s = 0.0
        self.away = False
        self._clock = clock

    async def beat(self, owner: str, *, kind: str, address: str) -> None:
        self._clock.advance(self.takes_s)
        if self.away:
            raise StorageUnavailableError("away")


class Owner(Ownership):
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = Store(self.clock)
        super().__init__(cast(Any, self.store), SETTINGS, self.clock, kind="shared", address="here")
        self.verified = 0
        self.verify = self._count

    async def _count(self) -> None:
        self.verified += 1


async def test_the_silence_of_others_counts_while_our_own_beats_are_in_time() -> None:
    owner = Owner()
    for _ in range(3):
        await owner.beat()
        assert owner.may_take_over()
        owner.clock.advance(SETTINGS.beat_s)
    assert owner.may_take_over()


async def test_while_our_own_beat_is_overdue_nobody_is_dead() -> None:
    owner = Owner()
    await owner.beat()
    owner.clock.advance(4.5)
    assert owner.fresh()
    assert not owner.may_take_over()


@pytest.mark.parametrize("takes_s", [2.5, 7.0])
async def test_behind_a_slow_beat_nobody_is_dead_for_a_term(takes_s: float) -> None:
    owner = Owner()
    await owner.beat()
    owner.store.takes_s = takes_s
    await owner.beat()
    owner.store.takes_s = 0.0
    for _ in range(3):
        await owner.beat()
        assert not owner.may_take_over()
        owner.clock.advance(1.9)
    owner.clock.advance(0.4)
    await owner.beat()
    assert owner.may_take_over()
    # Past its term it has to ask which of its sessions it has lost.
    assert (owner.verified > 0) == (takes_s > SETTINGS.term_s)


async def test_behind_a_gap_in_the_beats_what_was_lost_is_dropped_first() -> None:
    owner = Owner()
    await owner.beat()
    owner.clock.advance(7.0)
    assert not owner.fresh()
    await owner.confirm()
    assert owner.fresh()
    assert owner.verified == 1
    assert not owner.may_take_over()
