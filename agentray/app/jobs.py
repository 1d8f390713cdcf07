"""Run what needs a Ray driver in a process of its own, with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from agentray.errors import NotReadyError

__all__ = ["BROKEN", "FAILED", "RUNNING", "Job", "Progress", "dump_settings", "say"]

RUNNING = "running"
BROKEN = "broken"
FAILED = "failed"
"""First words of the lines that a job writes: of an application, of another, of the job."""

Progress = Callable[[str, str], None]
"""Is called with the name of each application when it runs, or cannot, and then why."""


def say(kind: str, text: str) -> None:
    """Write a line about a job, in the job's process."""
    sys.stdout.write(f"{kind} {text}\n")
    sys.stdout.flush()


class Job:
    """A process that imports Ray and then waits for what to do."""

    def __init__(self, process: asyncio.subprocess.Process, log_file: Path) -> None:
        self._process = process
        self._log_file = log_file

    @classmethod
    async def prepare(
        cls, environ: Mapping[str, str], log_file: Path, *, module: str = "agentray.app.deploy"
    ) -> Job:
        """Start the process, which runs ``module``; the cluster need not be there yet."""
        with log_file.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=dict(environ),
                start_new_session=True,
            )
        return cls(process, log_file)

    async def run(
        self,
        task: Mapping[str, Any],
        *,
        timeout_s: float | None,
        progress: Progress = lambda name, trouble: None,
    ) -> None:
        """Have it do something, once. Without ``timeout_s`` it may take as long as it takes.

        Raises:
            NotReadyError: if it failed or took too long; the message says why.
        """
        try:
            async with asyncio.timeout(timeout_s):
                code, reason = await self._done(task, progress)
        except TimeoutError as error:
            raise NotReadyError(
                f"to {task['do']} took longer than {timeout_s:.0f} s, see {self._log_file}"
            ) from error
        if code != 0:
            why = reason or f"exit code {code}"
            raise NotReadyError(f"{task['do']} failed: {why} (see {self._log_file})")

    async def close(self) -> None:
        """End the process, wherever it is."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _done(self, task: Mapping[str, Any], progress: Progress) -> tuple[int, str]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(ConnectionError):
            stdin.write(json.dumps(task).encode())
            await stdin.drain()
        stdin.close()
        reason = ""
        while line := await stdout.readline():
            kind, _, text = line.decode(errors="replace").strip().partition(" ")
            if kind == RUNNING:
                progress(text, "")
            elif kind == BROKEN:
                name, _, trouble = text.partition(" ")
                progress(name, trouble)
            elif kind == FAILED:
                reason = text
        return await self._process.wait(), reason


def dump_settings(settings: BaseModel) -> Any:
    """Return settings as JSON values, secrets in clear: for the pipe to a child only."""
    return json.loads(json.dumps(settings.model_dump(mode="python"), default=_plain))


def _plain(value: object) -> object:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    raise TypeError(f"{type(value).__name__} is not a setting")
