"""Run a supervisor: the builder of the hosts app and the settings are the arguments."""

from __future__ import annotations

import asyncio
import sys

from agentray.app.report import Report
from agentray.app.supervisor import Supervisor
from agentray.config.settings import Settings


async def run(hosts_app: str, settings: Settings) -> int:
    return await Supervisor(settings, report=Report(), hosts_app=hosts_app).run()


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1], Settings.model_validate_json(sys.argv[2]))))
