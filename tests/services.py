"""Real PostgreSQL and Redis for tests, on files and sockets of their own."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import psycopg
from redis.asyncio import Redis

from agentray.storage.embedded import EmbeddedPostgres, EmbeddedRedis
from agentray.storage.postgres import migrate

__all__ = ["Services", "until"]

T = TypeVar("T")
_PATIENCE_S = 20.0


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    """Return when the condition holds, which is asked for again and again."""
    deadline = time.monotonic() + _PATIENCE_S
    while not await condition():
        assert time.monotonic() < deadline, f"not within {_PATIENCE_S:g} s: {what}"
        await asyncio.sleep(0.005)


class Services:
    """Both servers, started once a test run; tests may stop and start them again.

    They run in an event loop of their own thread, so that they outlive the loops of tests.
    """

    def __init__(self) -> None:
        # Paths of sockets are short; pytest's own folders are kept, and this is a database.
        self._folder = Path(tempfile.mkdtemp(prefix="agentray-test-"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="services")
        self._thread.start()
        environ = dict(os.environ)
        self.postgres = EmbeddedPostgres(
            data_dir=self._folder / "pg",
            socket_dir=self._folder / "s",
            log_file=self._folder / "postgres.log",
            environ=environ,
        )
        self.redis = EmbeddedRedis(
            work_dir=self._folder / "redis",
            socket_file=self._folder / "redis.sock",
            log_file=self._folder / "redis.log",
            environ=environ,
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something of the servers' and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=90)

    async def aside(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something of the servers' while the test's own loop goes on."""
        return await asyncio.to_thread(self.run, work)

    def start(self) -> None:
        self.run(self.postgres.start())
        self.run(self.redis.start())
        self.run(migrate(self.postgres.url))

    def stop(self) -> None:
        self.run(self.redis.stop(hurry=True))
        self.run(self.postgres.stop(hurry=True))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ensure(self) -> None:
        """See that both run and are empty, whatever the last test did to them."""
        for server in (self.postgres, self.redis):
            if server.pid is None:
                self.run(server.start())
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            connection.execute(
                "TRUNCATE hosts, sessions, turns, events, scratch, files, file_pieces, batches,"
                " batch_lines"
            )
        self.run(self._flush_redis())

    def let_in(self, user: str) -> str:
        """Have PostgreSQL, which takes its own user alone, take another one too; return the URL."""
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            row = connection.execute("SHOW hba_file").fetchone()
            assert row is not None
            rules = Path(row[0])
            rules.write_text(f"local all {user} trust\n{rules.read_text()}")
            connection.execute("SELECT pg_reload_conf()")
            found = connection.info
            return f"postgresql://{user}@/{found.dbname}?host={quote(found.host, safe='')}"

    async def _flush_redis(self) -> None:
        async with Redis.from_url(self.redis.url) as redis:
            await redis.flushall()
