"""Say where a system's files and sockets are."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from agentray.errors import ConfigError

__all__ = ["Layout"]

_LOG_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one system; ``runtime_dir`` holds what must have a short path.

    A unix socket's path ends at 107 characters, and HAProxy's admin socket adds Ray's node id
    (56) and more to the folder that it is given: 25 are left.
    """

    data_dir: Path
    runtime_dir: Path

    @classmethod
    def of(cls, data_dir: str) -> Layout:
        """Return the layout of the system that lives in ``data_dir``; nothing is made."""
        path = Path(data_dir).expanduser().resolve()
        key = hashlib.sha256(f"{os.getuid()}:{path}".encode()).hexdigest()[:8]
        return cls(path, Path("/tmp") / f"agentray-{key}")

    @property
    def key(self) -> str:
        """What tells this system from others on the machine."""
        return self.runtime_dir.name

    @property
    def lock_file(self) -> Path:
        return self.data_dir / "lock"

    @property
    def run_dir(self) -> Path:
        return self.data_dir / "run"

    @property
    def logs_dir(self) -> Path:
        return self.data_dir / "logs"

    @property
    def postgres_dir(self) -> Path:
        return self.data_dir / "postgres"

    @property
    def redis_dir(self) -> Path:
        return self.data_dir / "redis"

    @property
    def ray_dir(self) -> Path:
        return self.runtime_dir / "ray"

    @property
    def haproxy_shim(self) -> Path:
        return self.run_dir / "haproxy"

    def make(self) -> None:
        """Make the folders, for us alone.

        Raises:
            ConfigError: if one cannot be made or belongs to somebody else.
        """
        for folder in (self.data_dir, self.run_dir, self.logs_dir, self.runtime_dir):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ConfigError(f"the folder {folder} cannot be written to")
        # In a folder that everybody can write to, somebody else could have been there first.
        found = self.runtime_dir.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigError(f"{self.runtime_dir} exists and is not a folder of this user")
        self.runtime_dir.chmod(0o700)

    def prepare(self) -> None:
        """Begin with an empty ``runtime_dir``, and with Ray's logs among the others."""
        self.remove_runtime()
        self.runtime_dir.mkdir(mode=0o700)
        self._remove_ray_logs()
        self._ray_logs.symlink_to(self.ray_dir / "session_latest" / "logs")
        for log in self.logs_dir.glob("*.log"):
            if log.stat().st_size > _LOG_BYTES:
                log.replace(log.with_suffix(".log.1"))

    def keep_ray_logs(self) -> None:
        """Copy Ray's logs to where they outlive ``runtime_dir``."""
        logs = self.ray_dir / "session_latest" / "logs"
        if logs.is_dir():
            self._remove_ray_logs()
            shutil.copytree(logs, self._ray_logs, symlinks=True, ignore_dangling_symlinks=True)

    def remove_runtime(self) -> None:
        """Remove ``runtime_dir``, in which nothing outlives the system."""
        shutil.rmtree(self.runtime_dir, ignore_errors=True)

    @property
    def _ray_logs(self) -> Path:
        return self.logs_dir / "ray"

    def _remove_ray_logs(self) -> None:
        if self._ray_logs.is_symlink():
            self._ray_logs.unlink()
        shutil.rmtree(self._ray_logs, ignore_errors=True)
