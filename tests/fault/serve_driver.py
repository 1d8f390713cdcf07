"""Scale and restart the session hosts of a running system as an operator does: through Serve.

Run as a script it is the Ray driver, which takes commands on standard input. Serve offers no
call that changes a number of replicas alone: the application is deployed again, and it is the
version of its code that decides whether its replicas are replaced.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Any, Literal, cast

from agentray.config.settings import Settings
from agentray.config.state import read_state
from tests.system import System

__all__ = ["ServeDriver"]


class ServeDriver:
    """A Ray driver in a process of its own."""

    def __init__(self, system: System) -> None:
        state = read_state(system.data_dir)
        assert state is not None
        environ = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        with system.data_dir.with_suffix(".driver").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environ},
                text=True,
            )
        resolved = {
            "data_dir": str(system.data_dir),
            "http": {"port": system.port},
            "postgres": {"url": state.postgres},
            "redis": {"url": state.redis},
        }
        self._ask({"address": state.ray_address, "settings": {**system.settings, **resolved}})

    def close(self) -> None:
        """End the driver; the hosts stay as they are."""
        self._process.communicate()

    async def scale(self, hosts: int) -> None:
        """Return when there are that many session hosts; those that stop may still drain."""
        await asyncio.to_thread(self._ask, {"do": "scale", "hosts": hosts})

    async def restart(self, hosts: int) -> None:
        """Return when all session hosts were replaced, one after another."""
        await asyncio.to_thread(self._ask, {"do": "restart", "hosts": hosts})

    def _ask(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()) != "done\n":
            assert line, "the driver ended"


def _main() -> None:
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    from agentray.app.hosts import build_hosts_app
    from agentray.sessions.host import DEPLOYMENT

    DeploymentRoute: Any = import_module("ray.serve.generated.serve_pb2").DeploymentRoute  # noqa: N806
    begin = json.loads(sys.stdin.readline())
    cast(Any, ray).init(address=begin["address"], namespace="agentray", log_to_driver=False)
    settings = Settings.model_validate(begin["settings"])
    controller = cast(Any, ray).get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)

    def version() -> str:
        info = cast(Any, ray).get(controller.get_deployment_info.remote(DEPLOYMENT, "hosts"))
        return cast(str, DeploymentRoute.FromString(info).deployment_info.version)

    def deploy(hosts: int, do: Literal["scale", "restart"]) -> None:
        changed = settings.model_copy(
            update={"sessions": settings.sessions.model_copy(update={"hosts": hosts})}
        )
        app = build_hosts_app(changed)
        if do == "scale":
            app._bound_deployment._version = version()
        serve.run(app, name="hosts", route_prefix="/")

    _done()
    for line in sys.stdin:
        command = json.loads(line)
        deploy(command["hosts"], command["do"])
        _done()


def _done() -> None:
    sys.stdout.write("done\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
