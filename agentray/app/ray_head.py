"""Start, watch and end Ray's head on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

from agentray.app.environment import Ports
from agentray.app.layout import Layout
from agentray.app.processes import alive, children, end_processes, owned_processes
from agentray.config.settings import Settings
from agentray.errors import NotReadyError

__all__ = ["RayHead"]

_POLL_S = 0.05
_WATCH_S = 0.1
# Ray listens on loopback alone if that is its address, and on all interfaces if any other is.
_LOOPBACK = "127.0.0.1"
_VITAL = {"gcs_server", "raylet"}


class RayHead:
    """Ray's head: ``ray start --head --block`` and what it starts, in a session of their own."""

    name = "Ray"

    def __init__(
        self, settings: Settings, layout: Layout, *, start_timeout_s: float = 90.0
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._vital: dict[int, str] = {}
        self.address = ""

    async def start(self, ports: Ports, environ: Mapping[str, str]) -> None:
        """Start the head; ``environ`` becomes that of every process of the cluster.

        Raises:
            NotReadyError: if it ends at once or is not up in time.
        """
        log_file = self._layout.logs_dir / "ray.log"
        address_file = self._layout.ray_dir / "ray_current_cluster"
        address_file.unlink(missing_ok=True)
        with log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(ports),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environ),
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(self._start_timeout_s):
                # Ray writes this file when all of the head's processes run.
                while not address_file.exists():
                    if self._process.returncode is not None:
                        raise NotReadyError(
                            f"Ray ended with exit code {self._process.returncode} at its start: "
                            f"{_last_error(log_file)}"
                        )
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise NotReadyError(
                f"Ray was not up within {self._start_timeout_s:.0f} s, see {log_file}"
            ) from error
        self.address = address_file.read_text().strip()
        found = children(self._process.pid)
        self._vital = {pid: name for pid, name in found.items() if name in _VITAL}

    async def wait_dead(self) -> str:
        """Return what happened when one of the head's vital processes has ended."""
        assert self._process is not None
        watched = {self._process.pid: "ray start", **self._vital}
        while True:
            for pid, name in watched.items():
                if not alive(pid):
                    return f"{name} has ended"
            await asyncio.sleep(_WATCH_S)

    async def stop(self) -> None:
        """End every process of the head and of all that ran in it.

        At once: whatever had to be finished in an orderly way is behind us, and nothing of
        Ray's outlives its head.
        """
        await end_processes(self._pids())
        if self._process is not None:
            await self._process.wait()

    def _pids(self) -> list[int]:
        apart = {self._layout.postgres_dir, self._layout.redis_dir}
        pids: list[int] = []
        for pid in owned_processes(self._layout):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cwd").readlink() not in apart:
                    pids.append(pid)
        return pids

    def _command(self, ports: Ports) -> list[str]:
        dashboard = self._settings.ray.dashboard
        return [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            f"--node-ip-address={_LOOPBACK}",
            f"--port={ports.gcs}",
            f"--temp-dir={self._layout.ray_dir}",
            f"--include-dashboard={str(dashboard).lower()}",
            f"--dashboard-host={_LOOPBACK}",
            f"--dashboard-port={ports.dashboard}",
            "--dashboard-agent-listen-port=0",
            # Each worker takes a free port: ranges of two systems would overlap.
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--object-store-memory={self._settings.ray.object_store_bytes}",
            "--no-monitor",
            # It carries what workers print to drivers; ours do not ask for it.
            "--include-log-monitor=false",
        ]


def _last_error(log_file: Path) -> str:
    lines = [line.strip() for line in log_file.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line]
    return f"{said[-1][:300] if said else 'nothing was said'} (see {log_file})"
