"""A whole agentray for tests: started as users start it, looked into by SQL, killed by parts."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psycopg

from agentray.app.layout import Layout
from agentray.app.processes import alive, end_processes, owned_processes
from agentray.config.state import read_state
from tests.journal import Journal

__all__ = ["Lock", "Owner", "System", "command", "kill", "paused", "until"]

START_S = 180.0
STOP_S = 90.0
_POLL_S = 0.02


async def until(
    condition: Callable[[], Any | Awaitable[Any]], *, timeout_s: float = 60.0, what: str
) -> Any:
    """Return what the condition returns when that is true; a store that is away means not yet."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = condition()
            if inspect.isawaitable(last):
                last = await last
            if last:
                return last
        except psycopg.OperationalError as error:
            last = error
        await asyncio.sleep(_POLL_S)
    raise AssertionError(f"not within {timeout_s:.0f} s: {what} (last: {last!r})")


@dataclass(frozen=True)
class Owner:
    """A row of ``hosts``; ``name`` is the replica's tag, or the actor's name of a dedicated
    session; ``silent_s`` is the time since its last beat."""

    id: str
    kind: str
    name: str
    pid: int
    silent_s: float

    @property
    def lives(self) -> bool:
        return alive(self.pid)


class Lock:
    """A transaction of the test's that holds something, until it is let go."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self.pid = connection.info.backend_pid

    def let_go(self) -> None:
        """Roll the transaction back: whoever waited goes on."""
        self._connection.close()


class System:
    """``agentray up`` on a data folder and port of its own.

    ``settings`` is the configuration as nested sections, on top of times that are short;
    ``arguments`` go on to ``agentray up``.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: dict[str, Any] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.data_dir = data_dir
        self.arguments = arguments
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.layout = Layout.of(str(data_dir))
        self.settings: dict[str, Any] = {
            "sessions": {"beat_s": 0.5, "term_s": 2.0, "sweep_s": 0.3, "drain_s": 10.0},
        }
        for section, values in (settings or {}).items():
            self.settings.setdefault(section, {}).update(values)
        self.term_s: float = self.settings["sessions"]["term_s"]
        self._up: subprocess.Popen[bytes] | None = None
        self._sql: psycopg.Connection[Any] | None = None

    # Starting and ending

    def start(self) -> System:
        """Run ``agentray up`` and return when it is ready."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        config = self.data_dir.with_suffix(".yaml")
        config.write_text(json.dumps(self.settings))
        arguments = ["--config", config, "--data-dir", self.data_dir, "--port", str(self.port)]
        arguments += self.arguments
        environ = {key: value for key, value in os.environ.items() if key[:9] != "AGENTRAY_"}
        with self.output.open("ab") as output:
            self._up = subprocess.Popen(
                [sys.executable, "-m", "agentray", "up", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
                start_new_session=True,
            )
        try:
            self.wait_ready()
        except BaseException:
            self.destroy()
            raise
        return self

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Return when everything runs, after a start or after a part was brought back."""
        assert self._up is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._up.poll() is not None:
                raise AssertionError(f"agentray up ended:\n{self.output.read_text()[-4000:]}")
            state = read_state(self.data_dir)
            if state is not None and state.ready and self._answers():
                return
            time.sleep(0.1)
        raise AssertionError(f"not ready in {timeout_s} s:\n{self.output.read_text()[-4000:]}")

    def stop(self) -> None:
        """End it as Ctrl-C does; nothing of it may stay."""
        assert self._up is not None
        self.close_sql()
        self._up.send_signal(signal.SIGINT)
        code = self._up.wait(timeout=STOP_S)
        left = {pid: command(pid) for pid in owned_processes(self.layout)}
        assert not left, f"processes stayed: {left}"
        assert code == 0, self.output.read_text()[-4000:]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))

    def kill_everything(self) -> None:
        """Kill every process of the system, the supervisor included, and wait for their ends."""
        assert self._up is not None
        self.close_sql()
        asyncio.run(end_processes([self._up.pid, *owned_processes(self.layout)]))
        self._up.wait(timeout=10)

    def restart(self) -> System:
        """Run ``agentray up`` again on the same data folder."""
        assert self._up is None or self._up.poll() is not None
        return self.start()

    def destroy(self) -> None:
        """Leave nothing behind, whatever state the system is in."""
        if self._up is not None:
            self.kill_everything()
            shutil.rmtree(self.layout.runtime_dir, ignore_errors=True)

    @property
    def output(self) -> Path:
        """What ``agentray up`` says."""
        return self.data_dir.with_suffix(".out")

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/healthz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    # The journal

    def connect(self) -> psycopg.Connection[Any]:
        """Return a new connection to the system's PostgreSQL."""
        state = read_state(self.data_dir)
        if state is None:
            raise psycopg.OperationalError("the system does not run")
        return psycopg.connect(state.postgres, autocommit=True, connect_timeout=5)

    def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a statement. Raises ``psycopg.OperationalError`` while it is away."""
        if self._sql is not None:
            # A server that was restarted since leaves a connection that is dead.
            with contextlib.suppress(psycopg.OperationalError):
                return _rows(self._sql, statement, params)
            self.close_sql()
        self._sql = self.connect()
        return _rows(self._sql, statement, params)

    def close_sql(self) -> None:
        """Close the connection of :meth:`sql`; the next call opens another one."""
        if self._sql is not None:
            self._sql.close()
            self._sql = None

    def journal(self, session_id: str) -> Journal:
        """Return a session's journal with the rows that must agree with it."""
        return Journal.read(self.sql, session_id)

    def assert_journal_sound(self, session_id: str) -> Journal:
        """Assert what must hold of every journal at rest, and return it."""
        journal = self.journal(session_id)
        journal.assert_sound()
        return journal

    def last_event(self, session_id: str) -> tuple[int, int, str] | None:
        """Return seq, epoch and type of the journal's last event."""
        rows = self.sql(
            "SELECT seq, epoch, body::json->>'type' FROM events WHERE session_id = %s"
            " ORDER BY seq DESC LIMIT 1",
            session_id,
        )
        return rows[0] if rows else None

    def lock_row(self, session_id: str) -> Lock:
        """Hold a session's row: appends to it are put off, claims and releases of it wait."""
        return self._lock("SELECT 1 FROM sessions WHERE id = %s FOR UPDATE", session_id)

    def lock_beat(self, owner: Owner) -> Lock:
        """Hold an owner's row in ``hosts``: its heartbeat waits, so it cannot know its state."""
        return self._lock("SELECT 1 FROM hosts WHERE id = %s FOR UPDATE", owner.id)

    def lock_append(self, session_id: str) -> Lock:
        """Hold the place of a session's next event: the append that comes waits in the server.

        Raises ``psycopg.errors.UniqueViolation`` if an append was faster.
        """
        return self._lock(
            "INSERT INTO events SELECT tenant, id, last_seq + 1, epoch, '' FROM sessions"
            " WHERE id = %s",
            session_id,
        )

    def _lock(self, statement: str, name: str) -> Lock:
        connection = self.connect()
        try:
            connection.execute("BEGIN")
            # Whom it waits for may wait for another lock of the test.
            connection.execute("SET LOCAL lock_timeout = '500ms'")
            connection.execute(statement.encode(), [name])
        except psycopg.Error:
            connection.close()
            raise
        return Lock(connection)

    def waiting_for(self, lock: Lock, statement: str) -> int | None:
        """Return the server process that runs such a statement and waits for the lock."""
        rows = self.sql(
            "SELECT pid FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
            " AND query LIKE %s",
            lock.pid,
            statement,
        )
        return rows[0][0] if rows else None

    # Owners and other processes

    def owners(self, *, kind: str = "shared") -> list[Owner]:
        """Return the owners that PostgreSQL knows, dead ones too."""
        rows = self.sql(
            "SELECT id, kind, address, extract(epoch FROM now() - beat_at)::float8 FROM hosts"
            " WHERE kind = %s",
            kind,
        )
        return [_owner(*row) for row in rows]

    def hosts(self) -> list[Owner]:
        """Return the session hosts whose process lives and beats."""
        return [o for o in self.owners() if o.lives and o.silent_s < self.term_s]

    def owner_of(self, session_id: str) -> tuple[Owner, int] | None:
        """Return the living owner of a session and the session's epoch."""
        rows = self.sql(
            "SELECT h.id, h.kind, h.address,"
            " extract(epoch FROM now() - h.beat_at)::float8, s.epoch"
            " FROM sessions s JOIN hosts h ON h.id = s.owner WHERE s.id = %s",
            session_id,
        )
        if not rows:
            return None
        *facts, epoch = rows[0]
        owner = _owner(*facts)
        return (owner, epoch) if owner.lives and owner.silent_s < self.term_s else None

    def door_of(self, owner: Owner) -> str:
        """Return the base URL of one session host, past HAProxy."""
        line = re.compile(rf"^\s*server \S*-{re.escape(owner.name)} (\S+)", re.MULTILINE)
        for file in self.layout.runtime_dir.glob("*/haproxy.cfg"):
            if found := line.search(file.read_text()):
                return f"http://{found[1]}"
        raise AssertionError(f"HAProxy knows no {owner}")

    async def until_hosts(self, count: int, *, timeout_s: float = 120.0) -> list[Owner]:
        """Return the living hosts when there are that many."""
        return await until(
            lambda: found if len(found := self.hosts()) >= count else None,
            timeout_s=timeout_s,
            what=f"{count} session hosts",
        )

    def pids(self, role: str) -> list[int]:
        """Return the processes of a part: ``postgres``, ``redis``, ``haproxy``, ``controller``,
        ``gcs``, ``raylet``, ``tool_worker`` or ``tool_scheduler``; of PostgreSQL the one that the
        others descend from."""
        if role == "postgres":
            # PostgreSQL removes the file when it ends, and makes it before it writes into it.
            try:
                pid = int((self.layout.postgres_dir / "postmaster.pid").read_text().split()[0])
            except (FileNotFoundError, IndexError):
                return []
            return [pid] if alive(pid) else []
        mark = {
            "redis": "redis-server",
            "haproxy": "haproxy",
            "controller": "ray::ServeController",
            "gcs": "gcs_server",
            "raylet": "raylet",
            "tool_worker": "ray::ToolWorker",
            "tool_scheduler": "ray::ToolScheduler",
        }[role]
        found: list[int] = []
        for pid in owned_processes(self.layout):
            first = command(pid).partition(" ")[0]
            if first.startswith(mark) if mark.startswith("ray::") else Path(first).name == mark:
                found.append(pid)
        return found

    def log(self, *needles: str) -> list[str]:
        """Return the lines of the owners' logs in which all of these texts are."""
        return [
            line
            for file in (self.layout.ray_dir / "session_latest" / "logs").rglob("*")
            if file.is_file()
            for line in _lines(file)
            if all(needle in line for needle in needles)
        ]


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def paused(*pids: int) -> Generator[None]:
    """Stop processes within the block."""
    for pid in pids:
        kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            kill(pid, signal.SIGCONT)


def command(pid: int) -> str:
    """Return a process's command line, empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def _rows(
    connection: psycopg.Connection[Any], statement: str, params: tuple[Any, ...]
) -> list[tuple[Any, ...]]:
    cursor = connection.execute(statement.encode(), params)
    return cursor.fetchall() if cursor.description else []


def _lines(file: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from file.read_text(errors="replace").splitlines()


def _owner(owner_id: str, kind: str, address: str, silent_s: float) -> Owner:
    where, _, pid = address.rpartition("/")
    return Owner(owner_id, kind, where.partition("/")[2], int(pid), silent_s)


def _free_port() -> int:
    # Not from the range of outgoing connections: one could have it when the system restarts.
    while True:
        port = random.randrange(11_000, 19_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
