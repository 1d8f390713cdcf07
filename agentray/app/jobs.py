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

__all__ = ["FAILED", "RUNNING", "dump_settings", "run_job"]

RUNNING = "running"
FAILED = "failed"
"""First words of the lines that a job writes."""


async def run_job(
    job: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    log_file: Path,
    timeout_s: float,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Have ``agentray.app.deploy`` do a job; being cancelled ends it.

    Args:
        progress: is called with the name of each application when it runs.

    Raises:
        NotReadyError: if the job failed or took too long; the message says why.
    """
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "agentray.app.deploy",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=dict(environ),
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    reason = ""
    try:
        async with asyncio.timeout(timeout_s):
            process.stdin.write(json.dumps(job).encode())
            process.stdin.write_eof()
            while line := (await process.stdout.readline()).decode(errors="replace").strip():
                kind, _, text = line.partition(" ")
                if kind == RUNNING:
                    progress(text)
                elif kind == FAILED:
                    reason = text
            code = await process.wait()
    except TimeoutError as error:
        raise NotReadyError(
            f"to {job['do']} took longer than {timeout_s:.0f} s, see {log_file}"
        ) from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if code != 0:
        raise NotReadyError(f"{job['do']} failed: {reason or f'exit code {code}'} (see {log_file})")


def dump_settings(settings: BaseModel) -> Any:
    """Return settings as JSON values, secrets in clear: for the pipe to a child only."""
    return json.loads(json.dumps(settings.model_dump(mode="python"), default=_plain))


def _plain(value: object) -> object:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    raise TypeError(f"{type(value).__name__} is not a setting")
