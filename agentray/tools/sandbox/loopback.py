"""Make the network of one run: a loopback of its own, with a listener that others serve.

The zygote runs this, so it needs the standard library only.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import struct

from agentray.tools.sandbox import kernel

__all__ = ["PORT", "Loopback", "proxy_variables"]

PORT = 3128
"""Where programs find the listener of their run, at 127.0.0.1."""

# Connections that wait to be accepted.
_BACKLOG = 8
_SIOCGSKNS, _SIOCSIFFLAGS, _SIOCSIFNETMASK, _SIOCSIFMTU = 0x894C, 0x8914, 0x891C, 0x8922
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
    # Ports are free again at once: in there nothing of a connection can come late.
    "ipv4/tcp_max_tw_buckets": "0",
    "core/somaxconn": "16",
}


def proxy_variables(port: int) -> dict[str, str]:
    """Return the variables by which programs find a proxy on this loopback."""
    names = ("http_proxy", "https_proxy", "all_proxy")
    found = dict.fromkeys(names, f"http://127.0.0.1:{port}")
    return {**found, **{name.upper(): value for name, value in found.items()}}


class Loopback:
    """Furnishes the network namespaces of runs, from a process that may enter them."""

    def __init__(self) -> None:
        """Try it, so that what is missing is known at once.

        Raises:
            OSError: this process cannot make such a network.
        """
        own = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        # Of a socket, because there may be no /proc with a name for it.
        self._home = fcntl.ioctl(own.fileno(), _SIOCGSKNS)
        os.set_inheritable(self._home, False)
        own.close()
        self._enter = kernel.enter(kernel.CLONE_NEWNET)
        try:
            kernel.unshare(kernel.CLONE_NEWNET)
            os.close(_furnished())
        finally:
            self._enter(self._home)

    def make(self, process: int) -> int:
        """Make the network of a process's namespace, by its pidfd, and return its listener."""
        self._enter(process)
        try:
            return _furnished()
        finally:
            self._enter(self._home)


def _furnished() -> int:
    for name, value in _LIMITS.items():
        file = os.open(f"/proc/sys/net/{name}", os.O_WRONLY)
        try:
            os.write(file, value.encode())
        finally:
            os.close(file)
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


def _set(any_socket: _socket.socket, what: int, value: bytes) -> None:
    fcntl.ioctl(any_socket.fileno(), what, struct.pack("16s24s", b"lo", value))
