"""Hold the values of a configuration while it is put together, and where each came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

__all__ = ["Path", "Problem", "Source"]

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it came from, the key, and what was found and expected."""

    origin: str
    path: Path | None
    text: str

    def __str__(self) -> str:
        parts = [self.origin, ".".join(map(str, self.path)) if self.path else "", self.text]
        return ": ".join(part for part in parts if part)


@dataclass
class Source:
    """Values with their origin. Later layers are laid over the first one."""

    origin: str
    values: Any
    problems: list[Problem] = field(default_factory=list[Problem])
    hidden: dict[Path, str] = field(default_factory=dict[Path, str])
    """Values that came out of the environment, and how to call them in a message."""
    _layers: dict[Path, str] = field(default_factory=dict[Path, str])
    _broken: set[Path] = field(default_factory=set[Path])

    def put(self, path: Path, value: Any, origin: str) -> None:
        """Lay ``value`` over what is at ``path``; sections are merged key by key.

        Where the path leads through something that is no section, nothing happens: validation
        names that.
        """
        if isinstance(value, Mapping) and value:
            for key, item in cast("Mapping[Any, Any]", value).items():
                self.put((*path, key), item, origin)
            return
        node = self.values
        for part in path[:-1]:
            if not isinstance(node, dict):
                return
            node = cast("dict[Any, Any]", node).setdefault(part, {})
        if isinstance(node, dict):
            node[path[-1]] = value
            self._layers[path] = origin
            self._broken.discard(path)
            self.hidden.pop(path, None)
            self.problems = [p for p in self.problems if p.path != path]

    def broken(self, path: Path, text: str) -> None:
        """Note a problem that leaves no value at ``path``."""
        self._broken.add(path)
        self.problems.append(Problem(self.origin_of(path), path, text))

    def is_broken(self, path: Path) -> bool:
        """Return whether the value at ``path`` is known to be wrong already."""
        return any(path[: len(known)] == known for known in self._broken)

    def origin_of(self, path: Path) -> str:
        """Return where the value at ``path``, or the nearest one above it, came from."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._layers:
                return self._layers[path[:length]]
        return self.origin
