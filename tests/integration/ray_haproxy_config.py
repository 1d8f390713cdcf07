"""Write the HAProxy configuration that Ray Serve makes for given backends, by Ray's own code.

Reads ``{"dir", "port", "metrics_port", "stats_port", "backends": {route: [[name, port], …]},
"routers": {route: port}, "fallback_port"}`` from standard input; the configuration is
``dir/haproxy.cfg``. ``routers`` are Ray's, which pick the replica of each call to a route.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions

if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    folder = Path(wanted["dir"])
    api = haproxy.HAProxyApi(
        cfg=haproxy.HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=wanted["port"]),
            metrics_port=wanted["metrics_port"],
            stats_port=wanted["stats_port"],
            socket_path=str(folder / "a.sock"),
            server_state_base=str(folder),
            server_state_file=str(folder / "state"),
            metrics_enabled=False,
            has_received_routes=True,
            is_head=True,
            nbthread=1,
        ),
        backend_configs={
            f"http-{number}": haproxy.BackendConfig(
                name=f"http-{number}",
                path_prefix=route,
                app_name=f"app-{number}",
                servers=[
                    haproxy.ServerConfig(name=name, host="127.0.0.1", port=port, replica_id=name)
                    for name, port in servers
                ],
                ingress_request_router_servers=[
                    haproxy.ServerConfig(name="router", host="127.0.0.1", port=port)
                    for routed, port in wanted["routers"].items()
                    if routed == route
                ],
                fallback_server=haproxy.ServerConfig(
                    name="proxy", host="127.0.0.1", port=wanted["fallback_port"]
                ),
            )
            for number, (route, servers) in enumerate(wanted["backends"].items())
        },
        config_file_path=str(folder / "haproxy.cfg"),
    )
    api._generate_config_file_internal()
