"""Have the models that agentray serves loaded, in a process of its own, and say how each fares.

Apart from ``agentray.app.deploy``, whose applications wait for nothing of this: importing vLLM
takes long, and Serve wants another environment of who deploys a model. The job comes as JSON on
standard input. On standard output stands a line for each model that can be called or does not
load; the process ends when there is one for each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from importlib import import_module
from typing import Any

from agentray.app.deploy import answers, connect, report_failure
from agentray.app.jobs import BROKEN, RUNNING, say
from agentray.config.settings import Settings
from agentray.models import serving

__all__ = ["main"]

_POLL_S = 1.0
_INSTALL = "what serves models is not installed, pip install 'ray[llm]'"


def main() -> None:
    """Do what standard input says."""
    # In the driver too: without them the replicas would be behind one more deployment of Ray's.
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    os.environ["RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"] = "1"
    job = json.load(sys.stdin)
    try:
        connect(job["address"])
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        _load(Settings.model_validate(job["settings"]))
    except Exception as error:
        logging.getLogger("agentray").exception("job_failed")
        report_failure(error)
        sys.exit(1)


def _load(settings: Settings) -> None:
    serve: Any = import_module("ray.serve")
    models = settings.models.serve
    targets = [
        serve.RunTarget(
            _build(name, settings),
            name=serving.app_name(name),
            route_prefix=serving.route_prefix(name),
        )
        for name in models
    ]
    serve.run_many(
        targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    waiting = set(models)
    while waiting:
        try:
            reports = serving.serve_reports()
        except Exception:
            # Serve's controller may be starting anew; the replicas go on without it.
            logging.getLogger("agentray").exception("serve_status_failed")
            reports = {}
        for name in sorted(waiting):
            report = reports.get(serving.app_name(name))
            on_demand = models[name].min_replicas == 0
            health = serving.health_of(report, on_demand=on_demand)
            if health.healthy and (on_demand or answers(settings, _listing(name))):
                say(RUNNING, name)
                waiting.remove(name)
            elif report is not None and report.status in serving.FAILED_STATUSES:
                say(BROKEN, f"{name} {health.reason}")
                waiting.remove(name)
        time.sleep(_POLL_S)


def _listing(name: str) -> str:
    return f"{serving.route_prefix(name)}/v1/models"


def _build(name: str, settings: Settings) -> Any:
    """Return a model's application, or one that says why there is none."""
    try:
        return serving.build_served_app(
            name, settings.models.serve[name], drain_s=settings.models.step_timeout_s
        )
    except Exception as error:
        logging.getLogger("agentray").exception("model_not_built")
        reason = serving.explain(error)
        missing = isinstance(error, ImportError)
        return serving.build_failed_app(name, f"{_INSTALL}: {reason}" if missing else reason)


if __name__ == "__main__":
    main()
