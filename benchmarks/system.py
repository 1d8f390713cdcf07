"""Start what a benchmark needs, on temporary folders and free ports, and end it again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agentray.app.layout import Layout
from agentray.app.processes import end_processes, owned_processes
from agentray.config.state import RunState, read_state
from agentray.models.simulator import SIMULATOR_PREFIX
from agentray.storage.embedded import EmbeddedPostgres, EmbeddedRedis
from benchmarks.cpu import command_of, descendants
from benchmarks.load import DRIVER_ENVIRON

__all__ = ["AgentRay", "Stores", "free_port", "measure", "running", "tail", "workspace"]

_START_S = 180.0
_STOP_S = 90.0
_POLL_S = 0.05


def measure(work: Coroutine[Any, Any, None]) -> None:
    """Run a benchmark to its end; SIGTERM, like Ctrl-C, ends what it started first."""

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    asyncio.run(run())


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Give a folder of this run, with a short path, and take it away behind it."""
    folder = Path(tempfile.mkdtemp(prefix="arb-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Stores:
    """One PostgreSQL and one Redis, which everything that is compared shares.

    Those that ``agentray up`` starts by itself, with room for the connections of all.
    """

    def __init__(self, folder: Path) -> None:
        self.postgres = EmbeddedPostgres(
            data_dir=folder / "postgres",
            socket_dir=folder / "pg",
            log_file=folder / "postgres.log",
            environ=os.environ,
            max_connections=250,
        )
        self.redis = EmbeddedRedis(
            work_dir=folder / "redis",
            socket_file=folder / "redis.sock",
            log_file=folder / "redis.log",
            environ=os.environ,
        )

    async def __aenter__(self) -> Stores:
        await self.postgres.start()
        try:
            await self.redis.start()
        except BaseException:
            await self.postgres.stop(hurry=True)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.redis.stop(hurry=True)
        await self.postgres.stop(hurry=True)

    def groups(self) -> dict[int, str]:
        """Return the group of each of their processes."""
        found: dict[int, str] = {}
        if self.postgres.pid is not None:
            found |= dict.fromkeys(descendants([self.postgres.pid]), "PostgreSQL")
        if self.redis.pid is not None:
            found[self.redis.pid] = "Redis"
        return found


class AgentRay:
    """A system started by ``agentray up``, on given stores, its simulator at its highest speed."""

    def __init__(self, folder: Path, stores: Stores, settings: Mapping[str, str]) -> None:
        self.data_dir = folder / "agentray"
        self.port = free_port()
        self.layout = Layout.of(str(self.data_dir))
        folder.mkdir(exist_ok=True)
        self._log = folder / "up.log"
        self._environ = {
            **os.environ,
            "AGENTRAY_POSTGRES__URL": stores.postgres.url,
            "AGENTRAY_REDIS__URL": stores.redis.url,
            # A key of OpenAI's in the environment would lead the load there.
            "AGENTRAY_MODELS__SIMULATOR__ENABLED": "true",
            "AGENTRAY_MODELS__SIMULATOR__TPS": "1000000",
            "AGENTRAY_LOG__LEVEL": "warning",
            **settings,
        }
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> AgentRay:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agentray", "up"),
                *("--data-dir", str(self.data_dir), "--port", str(self.port)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(_START_S):
                while (state := self.state) is None or not state.ready:
                    if self._process.returncode is not None:
                        raise RuntimeError(f"agentray up ended: {self._last_words()}")
                    await asyncio.sleep(_POLL_S)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def state(self) -> RunState | None:
        """Return what the system says of itself once it is up."""
        return read_state(self.data_dir)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def simulator_url(self) -> str:
        return f"http://{self.address}{SIMULATOR_PREFIX}/v1"

    async def stop(self, *, drain: bool = False) -> None:
        """End it, after its sessions were released if it is to ``drain``."""
        process, self._process = self._process, None
        if process is None:
            return
        if not drain and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            # The second one tells it to hurry.
            await asyncio.sleep(0.2)
        await _end(process, _STOP_S)
        await end_processes(owned_processes(self.layout))
        shutil.rmtree(self.layout.runtime_dir, ignore_errors=True)

    def groups(self) -> dict[int, str]:
        """Return the group of each process of the system."""
        found = {pid: _group(command_of(pid)) for pid in owned_processes(self.layout)}
        if self._process is not None:
            found[self._process.pid] = "supervisor"
        return found

    def hosts(self) -> list[int]:
        """Return the processes of the session hosts."""
        return [pid for pid, group in self.groups().items() if group == "session hosts"]

    async def settled(self, *, quiet_s: float = 1.0, timeout_s: float = 30.0) -> None:
        """Return when HAProxy has not been reloaded for some time; applications cause that."""
        last: frozenset[int] = frozenset()
        since = began = time.monotonic()
        while time.monotonic() - since < quiet_s and time.monotonic() - began < timeout_s:
            now = frozenset(pid for pid, group in self.groups().items() if group == "HAProxy")
            if now != last:
                last, since = now, time.monotonic()
            await asyncio.sleep(0.1)

    def fallback_port(self) -> int:
        """Return the port of Serve's Python proxy, which runs beside HAProxy."""
        mark = b"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT="
        for pid in owned_processes(self.layout):
            with contextlib.suppress(OSError):
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(mark):
                        return int(entry.removeprefix(mark))
        raise RuntimeError("no process of the system knows the port of Serve's Python proxy")

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace").strip()[-600:]


def _group(command: str) -> str:
    for mark, group in (
        ("ray::ServeReplica:hosts:", "session hosts"),
        ("ray::ServeReplica:simulator:", "simulator"),
        ("ray::ServeReplica:actors:", "actors' Serve replicas"),
        ("ray::NaiveSession", "session actors"),
        ("ray::DedicatedSession", "dedicated sessions"),
        ("haproxy", "HAProxy"),
    ):
        if mark in command.partition(" -f ")[0]:
            return group
    return "rest of Ray"


@asynccontextmanager
async def running(
    *command: str, port: int | None = None, says: bytes = b"", log_file: Path | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program from when it is ready until the block ends.

    It is ready when something listens on ``port``, or when it has said a line on its standard
    output.
    """
    with (log_file or Path(os.devnull)).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE if says else log,
            stderr=log if log_file else None,
            start_new_session=True,
            env={**os.environ, **DRIVER_ENVIRON},
        )
    try:
        async with asyncio.timeout(_START_S):
            if says:
                assert process.stdout is not None
                # Ray says things of its own there.
                while (line := await process.stdout.readline()).strip() != says:
                    if not line:
                        raise RuntimeError(f"{command[:4]} ended: {tail(log_file)}")
            while port is not None and not _listens(port):
                if process.returncode is not None:
                    raise RuntimeError(f"{command[:4]} ended: {tail(log_file)}")
                await asyncio.sleep(_POLL_S)
        yield process
    finally:
        await _end(process, 10.0)


async def _end(process: asyncio.subprocess.Process, timeout_s: float) -> None:
    """End a process by SIGTERM, or by SIGKILL if that takes too long."""
    for number, wait_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 10.0)):
        if process.returncode is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await process.wait()


def tail(log_file: Path | None) -> str:
    """Return the last words of a program's log."""
    return log_file.read_text(errors="replace").strip()[-800:] if log_file else "see above"


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
