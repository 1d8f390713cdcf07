"""A session's state from its hot copy and its journal, and from its journal alone."""

from __future__ import annotations

from typing import Any, cast

import pytest

from agentray.events import encode_event
from agentray.sessions.restoring import restore
from agentray.sessions.state import Rules
from agentray.storage.base import DurableStore, HotCopy
from tests.unit.sessions.fence import FIRST_EPOCH, row_of
from tests.unit.sessions.story import Story

RULES = Rules(window_turns=2)
EVENTS_OF_A_TURN = 4


class Told:
    """A store that has the journal of a story."""

    def __init__(self, story: Story) -> None:
        self._bodies = [encode_event(event) for event in story.events]

    async def events(
        self, tenant: str, session_id: str, *, after: int, limit: int, up_to: int
    ) -> list[bytes]:
        return self._bodies[after:up_to][:limit]

    async def recent_events(self, tenant: str, session_id: str, *, turns: int) -> list[bytes]:
        return self._bodies[-turns * EVENTS_OF_A_TURN :]


@pytest.mark.parametrize("copied", [None, 0, 2, 5], ids=["no copy", "all", "most", "some"])
async def test_what_is_restored_is_what_was(copied: int | None) -> None:
    story, states = Story(RULES), []
    for number in range(5):
        states.append(story.state)
        story.accepted(f"q{number}").called().answered(cost=0.25).finished(cost=0.25)
    row = row_of(FIRST_EPOCH, 0, story.state)
    copy = None
    if copied is not None:
        old = [*states, story.state][5 - copied]
        copy = HotCopy(row.epoch, old.seq, old.turns, old.window, old.cost)
    store: Any = Told(story)
    assert await restore(cast(DurableStore, store), row, copy, RULES) == story.state
    assert story.state.cost == 1.25
