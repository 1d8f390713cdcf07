"""Let one supervisor at a time work on a data folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from agentray.errors import ConfigError

__all__ = ["exclusive"]


@contextmanager
def exclusive(file: Path) -> Generator[None]:
    """Hold the lock of a data folder; the kernel lets go of it however the process ends.

    Raises:
        ConfigError: if another process holds it; the message has its id.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode().strip() or "unknown"
            raise ConfigError(
                f"agentray already runs on {file.parent} (process {holder}): "
                "stop it, or use another --data-dir and --port"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
