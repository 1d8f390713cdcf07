"""What Ray calls in its own processes, by the import paths that the environment names."""

from __future__ import annotations

import os
import sys
from typing import Any

from starlette.middleware import Middleware

from agentray.http import ingress

__all__ = ["ALONE", "adjust_start", "middlewares"]

ALONE = "AGENTRAY_INTERNAL_ALONE"
"""Set where the whole cluster is this machine: nothing of it needs to be reached from outside."""


def adjust_start(params: Any, head: bool) -> None:
    """Leave Ray's client server out, for which ``ray start`` has no option (``RAY_START_HOOK``)."""
    params.ray_client_server_port = None


def middlewares() -> list[Middleware]:
    """Return what Serve puts around its application, in each replica before it listens."""
    replica = sys.modules.get("ray.serve._private.replica")
    if replica is not None and os.environ.get(ALONE):
        _keep_on_loopback(replica)
    return ingress.middlewares()


def _keep_on_loopback(replica: Any) -> None:
    # Serve opens the replica's port for calls from handles on all interfaces and has no option.
    # A test lists the listeners: it fails when Ray changes this.
    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]:", "127.0.0.1:"))

    replica.add_port_to_grpc_server = add_loopback_port
