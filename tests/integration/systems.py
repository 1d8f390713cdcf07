"""Run a whole system in a test: a supervisor of its own, with stand-ins for the session hosts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from agentray.app.jobs import dump_settings
from agentray.app.layout import Layout
from agentray.app.processes import alive, owned_processes
from agentray.config.settings import Settings
from agentray.config.state import RunState, read_state

READY_S = 240.0
PLACEHOLDER = "tests.integration.placeholder_hosts:build"


class System:
    """What ``agentray up`` runs on a data folder; its output is in ``output``."""

    def __init__(
        self,
        data_dir: Path,
        *,
        hosts_app: str = PLACEHOLDER,
        settings: dict[str, Any] | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.layout = Layout.of(str(data_dir))
        self.port = free_port()
        self.output = data_dir.with_name(data_dir.name + ".out")
        self._arguments = [
            *(sys.executable, "-m", "tests.integration.run_up", hosts_app),
            json.dumps({"data_dir": str(data_dir), "http": {"port": self.port}} | (settings or {})),
        ]
        self._environ = environ
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the supervisor; return at once."""
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                self._arguments,
                env=self._environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        assert self.process is not None
        process = self.process

        def ready() -> bool:
            assert process.poll() is None, self.said()
            return "\nready " in self.said()

        eventually(ready, timeout_s=READY_S)

    def said(self) -> str:
        return self.output.read_text()

    @property
    def state(self) -> RunState:
        state = read_state(self.layout.data_dir)
        assert state is not None
        return state

    def get(self, path: str, *, timeout_s: float = 5.0, **headers: str) -> Any:
        """Return the stand-in's answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return "pid" in self.get("/healthz")
        return False

    def processes(self, *words: str) -> list[int]:
        """Return the system's processes, or those whose command line holds one of ``words``."""
        pids = owned_processes(self.layout)
        return [pid for pid in pids if not words or any(word in command(pid) for word in words)]

    def deploy_again(self) -> subprocess.Popen[bytes]:
        """Put the applications on Serve once more, which replaces each replica by a new one."""
        (raylet,) = self.processes("raylet/raylet")
        inherited = Path(f"/proc/{raylet}/environ").read_text().split("\0")
        settings = Settings.model_validate_json(self._arguments[-1])
        job = {
            "do": "deploy",
            "address": self.state.ray_address,
            "settings": dump_settings(settings),
            "hosts_app": self._arguments[-2],
            "alone": True,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "agentray.app.deploy"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(entry.split("=", 1) for entry in inherited if entry),
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
        return process

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait_end(self, *, timeout_s: float = 60.0) -> int:
        """Wait until the supervisor has ended; return its exit code."""
        assert self.process is not None
        return self.process.wait(timeout=timeout_s)

    def kill_all(self) -> None:
        """Kill the supervisor and everything that it runs, at once."""
        assert self.process is not None
        self.process.kill()
        kill(self.processes())
        self.process.wait()

    def close(self) -> None:
        """End the system, however it is."""
        if self.process is not None and self.process.poll() is None:
            self.kill_all()
        kill(self.processes())
        self.layout.remove_runtime()


def kill(pids: Iterable[int]) -> None:
    pids = list(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(alive, pids)))


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def free_port() -> int:
    """Return a port that nobody listens on, from where the system takes none by itself."""
    for port in random.sample(range(10_000, 20_000), 200):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port in 200 tries")


def eventually(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {timeout_s:.0f} s"
        time.sleep(0.05)
