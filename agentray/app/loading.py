"""Have the models that are served here loaded beside everything else, which waits for none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from agentray.app.jobs import Job, dump_settings
from agentray.app.report import Report
from agentray.config.settings import Settings
from agentray.errors import NotReadyError

__all__ = ["ModelLoading"]

_JOB = "agentray.app.deploy_models"


class ModelLoading:
    """The loading of all models that are served here, told in lines as each one can be called.

    A model that does not load is told too, and the system goes on: others are called instead.
    """

    def __init__(self, settings: Settings, *, report: Report, log_file: Path) -> None:
        self._settings = settings
        self._report = report
        self._log_file = log_file
        self._task: asyncio.Task[None] | None = None

    def begin(self, ray_address: str, environ: Mapping[str, str]) -> None:
        """Begin on a cluster on which Serve runs; return at once."""
        if self._settings.models.serve:
            self._task = asyncio.create_task(self._run(ray_address, environ))

    async def end(self) -> None:
        """Stop telling. What was begun goes on as long as its cluster."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, ray_address: str, environ: Mapping[str, str]) -> None:
        began = time.monotonic()

        def told(name: str, trouble: str) -> None:
            if trouble:
                self._report.warn(f"model {name}: {trouble}")
            else:
                seconds = time.monotonic() - began
                self._report.info(f"model {name} can be called, after {seconds:.0f} s")

        job = await Job.prepare(environ, self._log_file, module=_JOB)
        task = {
            "do": "load the models",
            "address": ray_address,
            "settings": dump_settings(self._settings),
        }
        try:
            # The largest models take an hour, and nobody waits for them.
            await job.run(task, timeout_s=None, progress=told)
        except NotReadyError as error:
            self._report.warn(error.message)
        finally:
            await job.close()
