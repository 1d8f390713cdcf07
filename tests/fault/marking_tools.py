"""Tools that leave a mark in a file each time they begin and end: whether they ran is known."""

from __future__ import annotations

import os
import time

import agentray


@agentray.tool(on_crash="retry", timeout_s=20)
def repeatable(file: str, name: str, takes_s: float) -> str:
    """Does something that may be done twice."""
    return _marked(file, name, takes_s)


@agentray.tool(on_crash="report", timeout_s=20)
def once(file: str, name: str, takes_s: float) -> str:
    """Does something that must not be done twice."""
    return _marked(file, name, takes_s)


def _marked(file: str, name: str, takes_s: float) -> str:
    _mark(file, name, "began")
    time.sleep(takes_s)
    _mark(file, name, "ended")
    return name


def _mark(file: str, name: str, what: str) -> None:
    # A single write to a file that is open for appending is not mixed with others'.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{name} {what} {time.time()}\n".encode())
    os.close(descriptor)
