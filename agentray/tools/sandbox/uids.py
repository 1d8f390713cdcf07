"""Give each slot of the machine a uid of its own, so that no two share what a uid can reach."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

__all__ = ["FIRST_UID", "UidLease"]

FIRST_UID = 200_000
_MOST = 4096
_FOLDER = Path("/run/agentray-uids")


class UidLease:
    """A uid that no other slot has; it is free again when this is closed or its process ends."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        """Take the first free one.

        Raises:
            OSError: if the folder of locks cannot be used, or all are taken.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(_MOST):
            lock = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            self._lock = lock
            self.uid = FIRST_UID + number
            return
        raise OSError(f"all {_MOST} uids of {folder} are taken")

    def close(self) -> None:
        """Let it go."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)
