"""One system for all fault tests: what each of them breaks has to be whole again for the next."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.system import System

HOSTS = 4


@pytest.fixture(scope="package")
def system() -> Iterator[System]:
    """A running system of four session hosts, which passivate a session after a second."""
    # Not below pytest's own folders: they are kept after the tests, and this is a database.
    folder = Path(tempfile.mkdtemp(prefix="agentray-test-"))
    settings = {
        "sessions": {"hosts": HOSTS, "idle_s": 1.0, "recovery_attempts": 30},
        "models": {"simulator": {"tps": 100.0}},
        "agents": {"assistant": {}, "marker": {"tools": ["once", "repeatable"]}},
        "tools": {
            "functions": ["tests.fault.marking_tools"],
            # Two from the start, and slots that all of the calls fill.
            "workers": {"min": 2, "max": 2, "slots": 4},
        },
        "log": {"format": "json"},
    }
    running = System(folder / "data", settings=settings).start()
    try:
        yield running
        running.stop()
    finally:
        running.destroy()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without limits of its own, apart from one for silence."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield session
