"""The stores of a system: embedded servers, or those at the configured addresses."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from agentray.app.layout import Layout
from agentray.clock import SystemClock
from agentray.config.settings import Settings
from agentray.errors import StorageUnavailableError
from agentray.storage.embedded import EmbeddedPostgres, EmbeddedRedis
from agentray.storage.postgres import forget_hosts, migrate
from agentray.storage.postgres_batches import DOOR_CONNECTIONS, RUNNER_CONNECTIONS
from agentray.storage.redis import RedisStore

__all__ = ["Stores"]

# As a parameter, libpq and Redis clients take one too.
_PASSWORD = re.compile(r"((?:^|&)password=)[^&]*")

_MIGRATION_S = 120.0


def _connections(settings: Settings) -> int:
    """Return how many connections one host takes at most: two are the journal's and the life's."""
    return settings.postgres.pool_size + 2 + DOOR_CONNECTIONS + RUNNER_CONNECTIONS


class Stores:
    """PostgreSQL and Redis, started here where no address is configured."""

    def __init__(self, settings: Settings, layout: Layout, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self.postgres: EmbeddedPostgres | None = None
        self.redis: EmbeddedRedis | None = None
        if settings.postgres.url is None:
            hosts = settings.host_count()
            self.postgres = EmbeddedPostgres(
                data_dir=layout.postgres_dir,
                socket_dir=layout.runtime_dir / "pg",
                log_file=layout.logs_dir / "postgres.log",
                environ=environ,
                # Twice the hosts: during a rolling restart old and new ones are there.
                max_connections=50 + 2 * hosts * _connections(settings),
            )
        if settings.redis.url is None:
            self.redis = EmbeddedRedis(
                work_dir=layout.redis_dir,
                socket_file=layout.runtime_dir / "redis.sock",
                log_file=layout.logs_dir / "redis.log",
                environ=environ,
            )

    @property
    def postgres_url(self) -> str:
        if self.postgres is not None:
            return self.postgres.url
        assert self._settings.postgres.url is not None
        return self._settings.postgres.url.get_secret_value()

    @property
    def redis_url(self) -> str:
        if self.redis is not None:
            return self.redis.url
        assert self._settings.redis.url is not None
        return self._settings.redis.url.get_secret_value()

    async def start_postgres(self) -> str:
        """Start PostgreSQL, or see that it answers, and bring its schema up to date.

        Returns what to say about it. Raises ``StorageError``.
        """
        if self.postgres is not None:
            await self.postgres.start()
        try:
            async with asyncio.timeout(_MIGRATION_S):
                await migrate(self.postgres_url)
        except TimeoutError as error:
            raise StorageUnavailableError(
                f"PostgreSQL at {without_password(self.postgres_url)}: the schema could not be "
                f"brought up to date within {_MIGRATION_S:.0f} s"
            ) from error
        except StorageUnavailableError as error:
            raise StorageUnavailableError(
                f"PostgreSQL at {without_password(self.postgres_url)} does not answer: "
                f"{error.message}"
            ) from error
        await self.forget_hosts()
        return "embedded" if self.postgres is not None else without_password(self.postgres_url)

    async def start_redis(self) -> str:
        """Start Redis, or see that it answers; as :meth:`start_postgres`."""
        if self.redis is not None:
            await self.redis.start()
            return "embedded"
        store = RedisStore(
            self.redis_url,
            self._settings.redis,
            window_turns=self._settings.sessions.window_turns,
            clock=SystemClock(),
        )
        try:
            if not await store.ping():
                raise StorageUnavailableError(
                    f"Redis at {without_password(self.redis_url)} does not answer"
                )
        finally:
            await store.close()
        return without_password(self.redis_url)

    async def forget_hosts(self) -> None:
        """Declare every owner dead, where nobody else can have one: in our own PostgreSQL.

        Only while no session host runs.
        """
        if self.postgres is not None:
            await forget_hosts(self.postgres_url)

    async def stop(self, *, hurry: bool) -> None:
        """End what was started here."""
        if self.redis is not None:
            await self.redis.stop(hurry=hurry)
        if self.postgres is not None:
            await self.postgres.stop(hurry=hurry)


def without_password(url: str) -> str:
    """Return an address that can be shown."""
    parts = urlsplit(url)
    query = _PASSWORD.sub(r"\1***", parts.query)
    if parts.password is None:
        return parts._replace(query=query).geturl() if query != parts.query else url
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username or ''}:***@{host}", query=query).geturl()
