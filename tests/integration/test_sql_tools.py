"""The SQL tools on a real PostgreSQL and a real SQLite, against what models may try."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import AsyncConnection

from agentray.config.settings import SqlSettings
from agentray.errors import ConfigError, ToolError
from agentray.tools.spec import ToolContext
from agentray.tools.sql import SqlTools
from tests.services import Services, until

CONTEXT = ToolContext("acme", "s1", "k1")
SETUP = """
DROP OWNED BY sql_login CASCADE;
DROP OWNED BY sql_reader CASCADE;
CREATE TABLE shop (id int PRIMARY KEY, name text NOT NULL);
INSERT INTO shop VALUES (1, 'tea'), (2, 'salt');
CREATE TABLE hidden (x int);
GRANT SELECT, INSERT, UPDATE, DELETE ON shop TO sql_login;
GRANT SELECT ON shop TO sql_reader;
GRANT SELECT ON hidden TO sql_login;
CREATE SEQUENCE counter;
GRANT USAGE ON SEQUENCE counter TO sql_login;
CREATE FUNCTION sneak() RETURNS int LANGUAGE plpgsql VOLATILE AS
    $$ BEGIN SET TRANSACTION READ WRITE; DELETE FROM shop; RETURN 1; END $$;
CREATE FUNCTION leave() RETURNS int LANGUAGE plpgsql VOLATILE AS
    $$ BEGIN CREATE TEMP TABLE left_over (x int); RETURN 1; END $$;
"""


class Sql:
    """A tool on one database."""

    def __init__(self, url: str, **settings: Any) -> None:
        given = SqlSettings.model_validate({"url": url, **settings})
        self.tools = SqlTools({"shop": given})
        [self.spec] = self.tools.specs()

    async def __call__(self, statement: str, *params: Any) -> dict[str, Any]:
        assert self.spec.run is not None
        arguments = {"statement": statement, "params": list(params)}
        return json.loads(await self.spec.run(arguments, CONTEXT))

    async def error(self, statement: str, *params: Any) -> ToolError:
        with pytest.raises(ToolError) as caught:
            await self(statement, *params)
        return caught.value


@pytest.fixture(scope="session")
def _users(_services: Services) -> None:
    with psycopg.connect(_services.postgres.url, autocommit=True) as connection:
        for user, kind in (("sql_login", "LOGIN"), ("sql_reader", "NOLOGIN")):
            connection.execute(f"CREATE ROLE {user} {kind}".encode())
        connection.execute("GRANT sql_reader TO sql_login")
    _services.let_in("sql_login")


@pytest.fixture
def url(services: Services, _users: None) -> str:
    """The address of a database with a shop in it, for a user without much."""
    with psycopg.connect(services.postgres.url, autocommit=True) as connection:
        for thing in ("TABLE IF EXISTS shop", "TABLE IF EXISTS hidden"):
            connection.execute(f"DROP {thing}".encode())
        connection.execute("DROP SEQUENCE IF EXISTS counter")
        connection.execute("DROP FUNCTION IF EXISTS sneak(), leave()")
        connection.execute(SETUP.encode())
        host = connection.info.host
        database = connection.info.dbname
    return f"postgresql://sql_login:hush-hush@/{database}?host={quote(host, safe='')}"


Open = Callable[..., Sql]


@pytest.fixture
async def sql(url: str) -> AsyncIterator[Open]:
    """What opens the shop with settings of the test."""
    opened: list[Sql] = []

    def open_(address: str = url, **settings: Any) -> Sql:
        opened.append(Sql(address, **settings))
        return opened[-1]

    yield open_
    for one in opened:
        await one.tools.close()


@pytest.fixture
async def admin(services: Services) -> AsyncIterator[AsyncConnection[Any]]:
    async with await AsyncConnection.connect(services.postgres.url, autocommit=True) as connection:
        yield connection


async def running(admin: AsyncConnection[Any], what: str) -> int:
    """How many statements with this in their text the server runs for the tools."""
    cursor = await admin.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = 'sql_login' "
        "AND state = 'active' AND query LIKE %s",
        (f"%{what}%",),
    )
    row = await cursor.fetchone()
    assert row is not None
    return row[0]


async def test_a_result_is_a_table_with_types(sql: Open) -> None:
    found = await sql()(
        "SELECT 1 AS n, 'tea' AS t, 1.50::numeric AS d, date '2026-02-03' AS day, "
        "timestamptz '2026-02-03 04:05:06+00' AS at, 'infinity'::timestamp AS ever, "
        "'abc'::bytea AS raw, '{\"a\": [1]}'::jsonb AS j, array[1,2] AS list, 'NaN'::float8 AS x, "
        "true AS b, null::int AS nothing, interval '1 day' AS i",
    )
    assert [(column["name"], column["type"]) for column in found["columns"]][:5] == [
        ("n", "int4"),
        ("t", "text"),
        ("d", "numeric"),
        ("day", "date"),
        ("at", "timestamptz"),
    ]
    assert found["rows"] == [
        [
            1,
            "tea",
            "1.50",
            "2026-02-03",
            "2026-02-03T04:05:06+00",
            "infinity",
            {"base64": "YWJj"},
            {"a": [1]},
            [1, 2],
            "nan",
            True,
            None,
            "P1D",
        ]
    ]
    assert (found["row_count"], found["truncated"]) == (1, False)


async def test_parameters_are_values_and_never_statements(sql: Open) -> None:
    shop = sql()
    found = await shop("SELECT id FROM shop WHERE name = $1 OR id = ANY($2)", "tea' OR 1=1", [2])
    assert found["rows"] == [[2]]
    found = await shop("SELECT $1::jsonb->>'a'", {"a": "b"})
    assert found["rows"] == [["b"]]


async def test_rows_past_the_cap_are_left_on_the_server(sql: Open) -> None:
    found = await sql(max_rows=10)("SELECT generate_series(1, 1000000000)")
    assert found["rows"] == [[n] for n in range(1, 11)]
    assert found["truncated"] is True
    found = await sql(max_rows=10)("SELECT g FROM generate_series(1, 10) g")
    assert (found["row_count"], found["truncated"]) == (10, False)


async def test_bytes_past_the_cap_are_left_on_the_server(sql: Open) -> None:
    shop = sql(max_bytes=10_000)
    found = await shop("SELECT repeat('x', 1000) FROM generate_series(1, 1000000)")
    assert 5 <= found["row_count"] <= 10
    assert found["truncated"] is True
    found = await shop("SELECT repeat(chr(1), 1000000), 'next'")
    assert len(json.dumps(found, separators=(",", ":"))) <= 10_000
    assert found["rows"][0][1] == "next"
    assert found["truncated"] is True


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT repeat('x', 200000000)",
        "SELECT repeat('x', 200000000)::int",
        "SELECT repeat('x', 2000000) FROM generate_series(1, 100)",
    ],
    ids=["a value", "an error that quotes it", "many values"],
)
async def test_a_huge_answer_does_not_come_into_memory(sql: Open, statement: str) -> None:
    shop = sql(max_bytes=2_000_000 if "generate" in statement else 1_000)
    await shop("SELECT 1")
    # From here on: what other tests took is not of this one.
    await asyncio.to_thread(Path("/proc/self/clear_refs").write_text, "5")
    before = peak_kib()
    try:
        reason = "" if (await shop(statement))["truncated"] else "not truncated"
    except ToolError as error:
        reason = error.fields["reason"]
    assert reason in ("", "output")
    assert peak_kib() - before < 130_000
    assert (await shop("SELECT 1"))["rows"] == [[1]]


def peak_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO shop VALUES (3, 'x')",
        "WITH gone AS (DELETE FROM shop RETURNING id) SELECT * FROM gone",
        "SELECT 1; DELETE FROM shop",
        "COMMIT; DELETE FROM shop",
        "COMMIT",
        "SET TRANSACTION READ WRITE",
        "SELECT set_config('transaction_read_only', 'off', false)",
        "SELECT sneak()",
        "DO $$ BEGIN DELETE FROM shop; END $$",
        "COPY shop TO PROGRAM 'cat'",
        "COPY shop TO '/tmp/shop'",
        "COPY shop FROM STDIN",
        "SELECT * INTO TEMP copied FROM shop",
        "CREATE TEMP TABLE mine (x int)",
        "SELECT nextval('counter')",
        "SELECT lo_from_bytea(0, 'x')",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT pg_ls_dir('.')",
        "SELECT * FROM shop FOR UPDATE",
        "LOCK TABLE shop",
        "SET ROLE sql_reader",
        "RESET ROLE",
        "SET SESSION AUTHORIZATION DEFAULT",
        "LISTEN shop",
        "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
        "PREPARE p AS DELETE FROM shop",
        "CALL sneak()",
        "EXPLAIN ANALYZE DELETE FROM shop",
        "/* SELECT */ DELETE FROM shop",
        "/* /* */ SELECT */ DELETE FROM shop",
        "-- SELECT\nDELETE FROM shop",
        "SELECT 1 -- \n; DELETE FROM shop",
        "VALUES (1)\x00; DELETE FROM shop",
    ],
)
async def test_a_reading_tool_cannot_be_made_to_write(
    sql: Open, admin: AsyncConnection[Any], statement: str
) -> None:
    shop = sql()
    error = await shop.error(statement)
    assert error.fields["reason"] in ("refused", "error")
    cursor = await admin.execute("SELECT count(*) FROM shop")
    assert await cursor.fetchone() == (2,)
    # The next call finds a connection that is as new.
    found = await shop("SELECT current_setting('transaction_read_only'), current_user")
    assert found["rows"] == [["on", "sql_login"]]


@pytest.mark.parametrize(
    ("statement", "look", "expected"),
    [
        (
            "SELECT pg_advisory_lock(42)",
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
            0,
        ),
        (
            "SELECT set_config('statement_timeout', '0', false)",
            "SELECT current_setting('statement_timeout')",
            "3s",
        ),
        (
            "SELECT set_config('default_transaction_read_only', 'off', false)",
            "SELECT current_setting('default_transaction_read_only')",
            "on",
        ),
        (
            "SELECT set_config('search_path', 'pg_temp', false)",
            "SELECT current_setting('search_path')",
            '"$user", public',
        ),
        ("SELECT set_config('role', 'sql_reader', false)", "SELECT current_user", "sql_login"),
        ("SELECT set_config('my.secret', 'x', false)", "SELECT current_setting('my.secret')", ""),
    ],
)
async def test_nothing_is_left_for_the_next_call(
    sql: Open, statement: str, look: str, expected: object
) -> None:
    shop = sql(pool_size=1, statement_timeout_s=3)
    pids = [(await shop("SELECT pg_backend_pid()"))["rows"]]
    await shop(statement)
    assert (await shop(look))["rows"] == [[expected]]
    pids.append((await shop("SELECT pg_backend_pid()"))["rows"])
    assert pids[0] == pids[1], "the connection was not the same, so that this proves nothing"


async def test_temporary_tables_of_functions_are_gone_with_their_call(sql: Open) -> None:
    writer = sql(read_only=False, pool_size=1)
    await writer("SELECT leave()")
    found = await writer("SELECT count(*) FROM pg_class WHERE relname = 'left_over'")
    assert found["rows"] == [[0]]


async def test_notifications_of_a_reading_call_are_not_sent(
    sql: Open, admin: AsyncConnection[Any]
) -> None:
    await admin.execute("LISTEN rumour")
    await sql()("SELECT pg_notify('rumour', 'of the reader')")
    await admin.execute("SELECT pg_notify('rumour', 'of the test')")
    heard = [notice.payload async for notice in admin.notifies(timeout=5, stop_after=1)]
    assert heard == ["of the test"]


async def test_the_configured_role_narrows_what_is_read(sql: Open) -> None:
    assert (await sql()("SELECT count(*) FROM hidden"))["rows"] == [[0]]
    error = await sql(role="sql_reader").error("SELECT count(*) FROM hidden")
    assert error.fields["reason"] == "refused"
    assert "42501" in error.message
    assert (await sql(role="sql_reader")("SELECT count(*) FROM shop"))["rows"] == [[2]]


async def test_a_superuser_is_not_taken(services: Services, sql: Open) -> None:
    with psycopg.connect(services.postgres.url, autocommit=True) as connection:
        row = connection.execute("SELECT usesuper FROM pg_user WHERE usename = current_user")
        assert row.fetchone() == (True,), "the test needs one"
    error = await sql(services.postgres.url).error("SELECT 1")
    assert error.fields["reason"] == "refused"


async def test_a_writing_tool_commits_one_statement_and_no_more(
    sql: Open, admin: AsyncConnection[Any]
) -> None:
    writer = sql(read_only=False)
    assert writer.spec.on_crash == "report"
    assert (await writer("INSERT INTO shop VALUES (3, $1)", "oil"))["affected"] == 1
    found = await writer("UPDATE shop SET name = upper(name) RETURNING id")
    assert (found["row_count"], found["affected"]) == (3, 3)
    found = await writer("WITH gone AS (DELETE FROM shop WHERE id = 1 RETURNING id) TABLE gone")
    assert found["rows"] == [[1]]
    for statement in (
        "DELETE FROM shop; SELECT 1",
        "COMMIT",
        "DO $$ BEGIN DELETE FROM shop; END $$",
        "COPY shop TO PROGRAM 'cat'",
        "SET ROLE sql_reader",
        "DROP TABLE shop",
        "TRUNCATE shop",
    ):
        assert (await writer.error(statement)).fields["reason"] in ("refused", "error")
    error = await writer.error("INSERT INTO shop VALUES (2, 'again')")
    assert "23505" in error.message
    cursor = await admin.execute("SELECT name FROM shop ORDER BY id")
    assert await cursor.fetchall() == [("SALT",), ("OIL",)]


async def test_a_statement_that_takes_too_long_ends_on_the_server(
    sql: Open, admin: AsyncConnection[Any]
) -> None:
    shop = sql(statement_timeout_s=0.3)
    began = time.monotonic()
    error = await shop.error("SELECT pg_sleep(30)")
    assert error.fields["reason"] == "timeout"
    # Whoever turns the server's own timeout off meets the client's.
    error = await shop.error(
        "SELECT set_config('statement_timeout', '0', false), pg_sleep(0.2) "
        "FROM generate_series(1, 100)"
    )
    assert error.fields["reason"] == "timeout"
    assert time.monotonic() - began < 5

    async def gone() -> bool:
        return await running(admin, "pg_sleep") == 0

    await until(gone, "the statements end")


async def test_a_cancelled_call_is_cancelled_on_the_server(
    sql: Open, admin: AsyncConnection[Any]
) -> None:
    shop = sql(pool_size=1)
    call = asyncio.ensure_future(shop("SELECT pg_sleep(60)"))

    async def begun() -> bool:
        return await running(admin, "FETCH") == 1

    await until(begun, "the statement runs")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await running(admin, "FETCH") == 0
    assert (await shop("SELECT 1"))["rows"] == [[1]]


async def test_an_error_tells_the_state_and_no_secret(sql: Open) -> None:
    error = await sql().error("SELECT nope FROM shop")
    assert "42703" in error.message
    assert error.fields["reason"] == "error"
    error = await sql().error("SELECT $1::int", "x")
    assert "22P02" in error.message
    lost = sql("postgresql://someone:hush-hush@127.0.0.1:1/db", connect_timeout_s=0.3)
    error = await lost.error("SELECT 1")
    assert error.fields["reason"] == "upstream"
    for secret in ("hush", "someone", "127.0.0.1"):
        assert secret not in error.message


async def test_calls_wait_for_a_connection_and_not_for_ever(sql: Open) -> None:
    shop = sql(pool_size=1, connect_timeout_s=0.3, statement_timeout_s=5)
    await shop("SELECT 1")
    long = asyncio.ensure_future(shop("SELECT pg_sleep(2)"))
    await asyncio.sleep(0)
    error = await shop.error("SELECT 1")
    assert error.fields["reason"] == "upstream"
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long


async def test_a_server_that_restarted_is_found_again(services: Services, sql: Open) -> None:
    shop = sql(connect_timeout_s=2)
    await shop("SELECT 1")
    await services.aside(services.postgres.stop(hurry=True))
    assert (await shop.error("SELECT 1")).fields["reason"] == "upstream"
    await services.aside(services.postgres.start())
    services.let_in("sql_login")
    assert (await shop("SELECT 1"))["rows"] == [[1]]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The address of an SQLite database with a shop in it."""
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE shop (id INTEGER PRIMARY KEY, name TEXT)")
        connection.executemany("INSERT INTO shop VALUES (?, ?)", [(1, "tea"), (2, "salt")])
    connection.close()
    return f"sqlite+aiosqlite:///{path}"


async def test_sqlite_is_read_through_sqlalchemy(file: str) -> None:
    shop = Sql(file)
    found = await shop("SELECT id, name, x'61' AS raw, 1.5 AS r FROM shop WHERE id > ?", 1)
    assert found == {
        "columns": [
            {"name": "id", "type": "integer"},
            {"name": "name", "type": "text"},
            {"name": "raw", "type": "bytes"},
            {"name": "r", "type": "real"},
        ],
        "rows": [[2, "salt", {"base64": "YQ=="}, 1.5]],
        "row_count": 1,
        "truncated": False,
    }
    assert (await shop("SELECT name FROM sqlite_master"))["rows"] == [["shop"]]
    assert "no such column" in (await shop.error("SELECT nope FROM shop")).message


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM shop",
        "SELECT 1; DELETE FROM shop",
        "WITH x AS (SELECT 1) DELETE FROM shop",
        "ATTACH DATABASE '/tmp/x.db' AS x",
        "PRAGMA query_only = OFF",
        "SELECT * FROM pragma_wal_checkpoint",
        "SELECT load_extension('/tmp/x.so')",
        "SELECT zeroblob(900000000)",
    ],
)
async def test_sqlite_is_held_to_reading(file: str, statement: str) -> None:
    shop = Sql(file)
    assert (await shop.error(statement)).fields["reason"] in ("refused", "error", "invalid")
    assert (await shop("SELECT count(*) FROM shop"))["rows"] == [[2]]


async def test_sqlite_is_interrupted_at_the_deadline_and_by_a_cancelled_call(file: str) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    shop = Sql(file, statement_timeout_s=0.2, pool_size=1)
    assert (await shop.error(endless)).fields["reason"] == "timeout"
    patient = Sql(file, statement_timeout_s=60, pool_size=1)
    call = asyncio.ensure_future(patient(endless))
    await asyncio.to_thread(threading.Event().wait, 0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # With one place, this one had to wait for the thread of the other.
    assert (await patient("SELECT 1"))["rows"] == [[1]]


async def test_a_database_waits_for_no_thread_of_others_and_takes_none_of_theirs(
    file: str,
) -> None:
    # The loop's own threads look names up, among other things.
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        over = threading.Event()
        held = asyncio.ensure_future(asyncio.to_thread(over.wait, 60))
        try:
            assert (await asyncio.wait_for(Sql(file)("SELECT 1"), 10))["rows"] == [[1]]
        finally:
            over.set()
            await held


async def test_the_names_of_columns_count_as_bytes_of_a_result(file: str) -> None:
    shop = Sql(file, max_bytes=1_000)
    name = "n" * 5_000
    error = await shop.error(f'SELECT a.*, a.* FROM (SELECT 1 AS "{name}") a')
    assert error.fields["reason"] == "output"
    assert len(error.message) < 500


async def test_sqlite_may_be_written_where_it_is_configured(file: str) -> None:
    writer = Sql(file, read_only=False)
    assert (await writer("INSERT INTO shop VALUES (3, ?)", "oil"))["affected"] == 1
    assert (await Sql(file)("SELECT count(*) FROM shop"))["rows"] == [[3]]
    assert (await writer.error("DROP TABLE shop")).fields["reason"] == "refused"


def test_a_database_that_cannot_be_held_to_reading_is_refused() -> None:
    with pytest.raises(ConfigError, match="read_only: false") as caught:
        Sql("mysql+pymysql://root:hush@db/x")
    assert "hush" not in str(caught.value)
