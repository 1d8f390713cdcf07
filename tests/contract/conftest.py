"""A durable store on real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from psycopg import AsyncConnection

from agentray.config.settings import PostgresSettings
from agentray.storage.postgres import PostgresStore
from tests.contract.durable import TERM_S
from tests.services import Services


@pytest.fixture
async def store(services: Services) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(services.postgres.url, PostgresSettings(), term_s=TERM_S)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def other(services: Services) -> AsyncIterator[AsyncConnection[Any]]:
    """A connection that holds locks, sets clocks back and looks at rows."""
    async with await AsyncConnection.connect(services.postgres.url, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def long_up(services: Services, other: AsyncConnection[Any]) -> None:
    """Wait until nobody is spared because the server came up less than a term ago."""
    cursor = await other.execute(
        "SELECT extract(epoch FROM now() - pg_postmaster_start_time())::float8"
    )
    row = await cursor.fetchone()
    assert row is not None
    if row[0] < TERM_S:
        await asyncio.sleep(TERM_S - row[0] + 0.05)
