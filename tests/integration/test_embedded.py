"""PostgreSQL and Redis as children of ours."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from agentray.errors import StorageUnavailableError
from agentray.storage.embedded import EmbeddedPostgres, EmbeddedRedis
from tests.integration.systems import kill


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not pytest's folder: the path of a unix socket is short.
    made = Path(tempfile.mkdtemp(prefix="ar-test-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def postgres(folder: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(
        data_dir=folder / "data",
        socket_dir=folder / "socket",
        log_file=folder / "log",
        environ=os.environ,
    )


@pytest.fixture
def redis(folder: Path) -> EmbeddedRedis:
    return EmbeddedRedis(
        work_dir=folder / "redis",
        socket_file=folder / "redis.sock",
        log_file=folder / "log",
        environ=os.environ,
    )


async def test_what_was_committed_outlives_a_kill(postgres: EmbeddedPostgres) -> None:
    await postgres.start()
    try:
        with psycopg.connect(postgres.url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 'whole' AS word")
        assert postgres.pid is not None
        kill([postgres.pid])
        assert await postgres.wait_dead() == "was killed by signal 9"
        assert postgres.pid is None
        await postgres.start()
        with psycopg.connect(postgres.url) as connection:
            assert connection.execute("SELECT word FROM kept").fetchone() == ("whole",)
    finally:
        await postgres.stop()
    assert postgres.pid is None
    assert "database system is shut down" in (postgres.data_dir.parent / "log").read_text()


async def test_only_this_user_gets_in_and_only_through_the_socket(
    postgres: EmbeddedPostgres,
) -> None:
    await postgres.start()
    try:
        with psycopg.connect(postgres.url) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
            assert connection.execute("SHOW unix_socket_permissions").fetchone() == ("0700",)
            rules = connection.execute("SELECT type, auth_method FROM pg_hba_file_rules").fetchall()
            assert rules == [("local", "peer")]
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(postgres.url.replace("agentray@", "postgres@"))
    finally:
        await postgres.stop(hurry=True)


async def test_data_of_a_version_that_is_not_there_is_left_alone(
    postgres: EmbeddedPostgres,
) -> None:
    postgres.data_dir.mkdir()
    (postgres.data_dir / "PG_VERSION").write_text("9\n")
    with pytest.raises(StorageUnavailableError, match="made by PostgreSQL 9, which is not"):
        await postgres.start()
    assert [path.name for path in postgres.data_dir.iterdir()] == ["PG_VERSION"]


async def test_a_server_that_refuses_to_start_says_why(postgres: EmbeddedPostgres) -> None:
    await postgres.start()
    await postgres.stop()
    (postgres.data_dir / "postgresql.conf").write_text("shared_buffers = many\n")
    with pytest.raises(StorageUnavailableError, match=r"PostgreSQL ended with exit code 1.*FATAL"):
        await postgres.start()


async def test_redis_comes_back_empty_and_bounded(redis: EmbeddedRedis) -> None:
    await redis.start()
    try:
        with Redis.from_url(redis.url) as client:
            client.set("word", "gone")
            limits: Any = client.config_get("maxmemory*")
            assert limits["maxmemory-policy"] == "allkeys-lru"
            assert int(limits["maxmemory"]) > 0
        assert redis.pid is not None
        kill([redis.pid])
        await redis.wait_dead()
        await redis.start()
        with Redis.from_url(redis.url) as client:
            assert client.get("word") is None
    finally:
        await redis.stop()
    assert redis.pid is None
