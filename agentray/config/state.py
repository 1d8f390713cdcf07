"""The note that a running system leaves in its data folder for those who look for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

__all__ = ["RunState", "read_state", "remove_state", "write_state"]


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a system is; ``ready`` is false while a part of it is being brought back.

    Addresses of stores are shown without passwords.
    """

    pid: int
    version: str
    started_at: float
    ready: bool
    url: str
    ray_address: str
    postgres: str
    redis: str
    models: list[str]
    hosts: int


def state_file(data_dir: str | Path) -> Path:
    """Return where the note of the system in ``data_dir`` is."""
    return Path(data_dir).expanduser() / "run" / "state.json"


def read_state(data_dir: str | Path) -> RunState | None:
    """Return the note of the system in ``data_dir`` if its supervisor lives, else None."""
    try:
        state = msgspec.json.decode(state_file(data_dir).read_bytes(), type=RunState)
    except (OSError, msgspec.DecodeError):
        return None
    try:
        os.kill(state.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return state


def write_state(data_dir: str | Path, state: RunState) -> None:
    """Leave the note; readers see the old one or the new one whole."""
    file = state_file(data_dir)
    beside = file.with_suffix(".new")
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    beside.chmod(0o600)
    beside.replace(file)


def remove_state(data_dir: str | Path) -> None:
    """Take the note away."""
    with contextlib.suppress(FileNotFoundError):
        state_file(data_dir).unlink()
