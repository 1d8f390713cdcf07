"""One slot for the whole list: that it still works at the end is part of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from agentray.tools.sandbox.base import Slot
from tests.jail.attack import MODE
from tests.jail.attacks import left_out
from tests.jail.scene import Scene, set_scene
from tests.jail.slots import Jails, opened_jail


def pytest_report_header() -> list[str]:
    return [f"jail: as {MODE}", *(f"jail: not run: {line}" for line in left_out())]


@pytest.fixture(scope="session")
def scene() -> Iterator[Scene]:
    with set_scene() as found:
        yield found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def slot(scene: Scene) -> AsyncIterator[Slot]:
    async with opened_jail() as found:
        yield found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def jails(scene: Scene) -> AsyncIterator[Jails]:
    """Jails that each lack something."""
    found = Jails()
    yield found
    await found.close()
