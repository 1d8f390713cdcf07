"""Where the scheduler listens, and how hosts and workers come to know."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

__all__ = ["Locate", "Location"]


class Location(msgspec.Struct, frozen=True):
    """An address, and the token to show there."""

    host: str
    port: int
    token: str


Locate = Callable[[], Awaitable[Location]]
"""Finds the scheduler, also after it was restarted.

Raises:
    NotReadyError: if it is not there now.
"""
