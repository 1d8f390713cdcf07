"""Find the address at which this machine reaches the front door, and write it in URLs."""

from __future__ import annotations

from agentray.config.settings import HttpSettings

__all__ = ["door", "in_url", "url"]

_FROM_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def door(settings: HttpSettings) -> str:
    """Return the address to connect to from this machine."""
    return _FROM_HERE.get(settings.host, settings.host)


def in_url(host: str) -> str:
    """Return a host as URLs and HAProxy have it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def url(settings: HttpSettings) -> str:
    """Return the front door's base URL, for use on this machine."""
    return f"http://{in_url(door(settings))}:{settings.port}"
