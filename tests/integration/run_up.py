"""Run a supervisor on settings from standard input, with stand-ins for the session hosts."""

from __future__ import annotations

import asyncio
import sys

from agentray.app.report import Report
from agentray.app.supervisor import Supervisor
from agentray.config.settings import Settings

if __name__ == "__main__":
    settings = Settings.model_validate_json(sys.argv[1])
    supervisor = Supervisor(
        settings, report=Report(), hosts_app="tests.integration.placeholder_hosts:build"
    )
    sys.exit(asyncio.run(supervisor.run()))
