"""Make a network that is a loopback alone, with a listener that somebody outside serves.

The zygote runs this, so it needs the standard library only.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import struct

__all__ = ["PORT", "bound_backlogs", "open_listener", "proxy_variables"]

PORT = 3128
"""Where programs find the listener, at 127.0.0.1."""

# Connections that wait to be accepted.
_BACKLOG = 8
_SIOCSIFFLAGS, _SIOCSIFNETMASK, _SIOCSIFMTU = 0x8914, 0x891C, 0x8922
_UP = 0x1
_MTU_BYTES = 4096
# The kernel's buffers of TCP are counted by no quota but cgroup v2's. So there are few ports, one
# address and small buffers: no more connections than pairs of these, whoever holds them open.
_FIRST_PORT = 65_504
_LIMITS = {
    "ipv4/ip_local_port_range": f"{_FIRST_PORT} 65535",
    "ipv4/ip_unprivileged_port_start": f"{_FIRST_PORT}",
    "ipv4/tcp_rmem": "4096 32768 32768",
    "ipv4/tcp_wmem": "4096 32768 32768",
    # Ports are free again at once, for the next run too: nothing of a connection comes late here.
    "ipv4/tcp_max_tw_buckets": "0",
}


def proxy_variables(port: int) -> dict[str, str]:
    """Return the variables by which programs find a proxy on this loopback."""
    names = ("http_proxy", "https_proxy", "all_proxy")
    found = dict.fromkeys(names, f"http://127.0.0.1:{port}")
    return {**found, **{name.upper(): value for name, value in found.items()}}


def bound_backlogs() -> None:
    """Let few connections wait at each listener of this network namespace, Unix ones too.

    What was sent to them needs no descriptor, and so it would be bounded by no quota.
    """
    _write("core/somaxconn", f"{_BACKLOG}")


def open_listener() -> int:
    """Make this process's network namespace a loopback, and return the descriptor of a listener.

    Raises:
        OSError: it cannot be made, or not be bounded.
    """
    bound_backlogs()
    for name, value in _LIMITS.items():
        _write(name, value)
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    _set(any_socket, _SIOCSIFMTU, struct.pack("i", _MTU_BYTES))
    _set(any_socket, _SIOCSIFFLAGS, struct.pack("h", _UP))
    # One address, not all that begin with 127.
    _set(any_socket, _SIOCSIFNETMASK, struct.pack("HH4s", _socket.AF_INET, 0, b"\xff" * 4))
    any_socket.close()
    listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", PORT))
    listener.listen(_BACKLOG)
    return listener.detach()


def _write(name: str, value: str) -> None:
    file = os.open(f"/proc/sys/net/{name}", os.O_WRONLY)
    try:
        os.write(file, value.encode())
    finally:
        os.close(file)


def _set(any_socket: _socket.socket, what: int, value: bytes) -> None:
    fcntl.ioctl(any_socket.fileno(), what, struct.pack("16s24s", b"lo", value))
