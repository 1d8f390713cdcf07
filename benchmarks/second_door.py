"""A second HAProxy in front of the same session hosts, without affinity.

What it costs when a message arrives at the wrong host can be measured beside the rest then. Its
configuration is that of the first one but for ``balance roundrobin`` in place of the hash: of a
client's messages every second one arrives at the host that is not the session's owner.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["find_config", "without_affinity"]

_PRIVATE = re.compile(
    r"^[ \t]*(stats socket|stats timeout|server-state-|load-server-state|hard-stop).*\n",
    re.MULTILINE,
)
_BIND = re.compile(r"^[ \t]+bind .*$", re.MULTILINE)
_BALANCE = re.compile(r"^[ \t]+balance hash var\(.*\)\n[ \t]+hash-type .*$", re.MULTILINE)
_OTHER_LISTENERS = re.compile(r"^(frontend prometheus|listen stats)\n(?:[ \t]+.*\n)*", re.MULTILINE)


def find_config(runtime_dir: Path) -> Path:
    """Return the configuration of the running HAProxy: the newest below the folder."""
    found = sorted(runtime_dir.glob("**/haproxy.cfg"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise RuntimeError(f"there is no HAProxy configuration below {runtime_dir}")
    return found[-1]


def without_affinity(config: str, port: int) -> str:
    """Return the configuration of a door at ``port`` that takes turns between the hosts."""
    config = _OTHER_LISTENERS.sub("", _PRIVATE.sub("", config))
    config, bound = _BIND.subn(f"    bind 127.0.0.1:{port}", config)
    config, balanced = _BALANCE.subn("    balance roundrobin", config)
    if (bound, balanced) != (1, 1):
        raise RuntimeError("HAProxy's configuration is not what this benchmark knows")
    return config
