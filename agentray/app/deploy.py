"""Put the applications on a Ray cluster, or take them off: a process of its own, for one job.

The supervisor never imports Ray: a driver dies with its cluster, the supervisor must not. It
runs ``python -m agentray.app.deploy`` with a job as JSON on its standard input. On standard
output stands a line for each application that runs, or why the job failed; the exit code is 0
when the job is done, else 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from importlib import import_module
from typing import Any, cast

from agentray.app.address import door
from agentray.app.jobs import BROKEN, FAILED, RUNNING, dump_settings, say
from agentray.config.settings import SIMULATOR, Settings
from agentray.errors import AgentRayError, ConfigError, NotReadyError
from agentray.models.serving import app_name

__all__ = ["HOSTS_APP", "TOOLS", "answers", "connect", "main", "report_failure"]

HOSTS_APP = "hosts"
TOOLS = "tools"
_POLL_S = 0.1
# For what dedicated sessions do behind their drain. The supervisor waits longer than two of it.
_END_MARGIN_S = 6.0


def main() -> None:
    """Do what standard input says."""
    # Serve refuses a request router of one's own on an application behind HAProxy, whose requests
    # it would not see. Ours is for the calls of handles. Serve looks here, in the driver, alone.
    os.environ.pop("RAY_SERVE_ENABLE_HA_PROXY", None)
    # Now: the cluster is still starting.
    import_module("ray.serve")
    # Not by the supervisor, which imports this module.
    from agentray.app.tool_workers import check_tools

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    job = json.load(sys.stdin)
    try:
        connect(job["address"])
        if job["do"] == "deploy":
            settings = Settings.model_validate(job["settings"])
            asyncio.run(check_tools(settings))
            if not job["alone"]:
                _check_cluster(job["address"])
            _deploy(settings, job["hosts_app"], alone=job["alone"])
        else:
            _stop(job["drain_s"], job["models"], alone=job["alone"])
    except Exception as error:
        logging.getLogger("agentray").exception("job_failed")
        report_failure(error)
        sys.exit(1)


def report_failure(error: Exception) -> None:
    """Say in one line why the job failed."""
    # Ray wraps what a task raised, and shows the traceback first.
    error = getattr(error, "cause", None) or error
    reason = str(error).strip().splitlines()
    kind = "" if isinstance(error, AgentRayError) else f"{type(error).__name__}: "
    say(FAILED, f"{kind}{reason[0] if reason else 'no reason given'}")


def connect(address: str) -> None:
    """Become a driver of the cluster."""
    import ray

    cast(Any, ray).init(
        address=address, namespace="agentray", log_to_driver=False, configure_logging=False
    )


def _check_cluster(address: str) -> None:
    """See that the cluster was started with our environment: Serve would run without HAProxy."""
    ray: Any = import_module("ray")

    def has_environment() -> bool:
        return "RAY_SERVE_HAPROXY_BINARY_PATH" in os.environ

    if not ray.get(ray.remote(num_cpus=0)(has_environment).remote()):
        raise ConfigError(
            f"the Ray cluster at {address} lacks agentray's environment: on each node, "
            '`eval "$(agentray env)"` before `ray start`'
        )


def _deploy(settings: Settings, hosts_app: str, *, alone: bool) -> None:
    from ray.serve.config import HTTPOptions, ProxyLocation

    from agentray.app.tool_workers import WorkerTools, sandbox_trouble
    from agentray.tools.scheduler import start_pool

    serve: Any = import_module("ray.serve")
    # Replicas listen at this address, and the HAProxy of another node must reach them. Its own
    # is what the wrapper binds it to.
    host = "127.0.0.1" if alone else settings.http.host
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(host=host, port=settings.http.port),
    )
    module, _, name = hosts_app.partition(":")
    build = getattr(import_module(module), name)
    targets = [serve.RunTarget(build(settings), name=HOSTS_APP, route_prefix="/")]
    if settings.models.simulated():
        from agentray.http.ingress import mount
        from agentray.models.simulator import SIMULATOR_PREFIX, build_simulator_app

        simulator = build_simulator_app(settings.models.simulator, mount=mount)
        targets.append(serve.RunTarget(simulator, name=SIMULATOR, route_prefix=SIMULATOR_PREFIX))
    serve.run_many(
        targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    # Meanwhile Serve starts them.
    start_pool(settings, WorkerTools(settings), alone=alone, made_of=_digest(settings))
    trouble = asyncio.run(sandbox_trouble(settings.tools.sandbox)) if alone else ""
    say(*((BROKEN, f"{TOOLS} {trouble}") if trouble else (RUNNING, TOOLS)))
    waiting = {target.name for target in targets}
    # Not left to Serve: it says only after a minute, and without a reason, that a start failed.
    while waiting:
        for name in waiting & _running(serve.status(), waiting):
            if name != HOSTS_APP or answers(settings, "/healthz"):
                waiting.remove(name)
                say(RUNNING, name)
        time.sleep(_POLL_S)


def _digest(settings: Settings) -> str:
    """Return what tells settings of tools apart, secrets included."""
    text = json.dumps([dump_settings(settings.tools), dump_settings(settings.log)])
    return hashlib.sha256(text.encode()).hexdigest()


def _running(status: Any, names: set[str]) -> set[str]:
    """Return which applications run; raise ``NotReadyError`` if one of ``names`` never will."""
    for name, application in status.applications.items():
        if name in names and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            said = [application.message, *(d.message for d in application.deployments.values())]
            lines = [line.strip() for text in said for line in text.splitlines() if line.strip()]
            raise NotReadyError(f"{name}: {lines[-1] if lines else 'no reason given'}")
    return {name for name, app in status.applications.items() if app.status == "RUNNING"}


def answers(settings: Settings, path: str) -> bool:
    """Return whether the front door has an answer to ``GET path`` by now.

    Serve says that a replica runs before HAProxy knows of it.
    """
    connection = HTTPConnection(door(settings.http), settings.http.port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _stop(drain_s: float, models: list[str], *, alone: bool) -> None:
    """Take the session hosts and the dedicated sessions off and return when they have drained.

    The models stay until then: running turns need them. Where Ray ends next, they end with it.
    """
    from agentray.sessions.dedicated import end_all
    from agentray.tools.scheduler import end_pool

    with ThreadPoolExecutor(1) as beside:
        ending = beside.submit(end_all, timeout_s=drain_s + _END_MARGIN_S)
        _delete(HOSTS_APP)
        ending.result()
    # A host that had not begun to drain may have started one anew.
    end_all(timeout_s=_END_MARGIN_S)
    end_pool()
    if not alone:
        apps = [SIMULATOR, *map(app_name, models)]
        with ThreadPoolExecutor(len(apps)) as beside:
            # At once: one that drains long must not keep the others' accelerators.
            list(beside.map(_delete, apps))


def _delete(app: str) -> None:
    serve: Any = import_module("ray.serve")
    deleted = False
    while not deleted:
        # Serve waits a minute; how long is the supervisor's to say.
        with contextlib.suppress(TimeoutError):
            serve.delete(app)
            deleted = True


if __name__ == "__main__":
    main()
