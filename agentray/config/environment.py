"""Bring the environment into a configuration: ``${VAR}`` in its texts, and overrides by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, cast

import yaml

from agentray.config.fields import ROOT, Setting, leaves
from agentray.config.source import Path, Problem, Source

__all__ = ["PREFIX", "RESERVED_PREFIXES", "SECRET_PREFIX", "interpolate", "override"]

PREFIX = "AGENTRAY_"
RESERVED_PREFIXES = ("AGENTRAY_TEST_", "AGENTRAY_BENCH_", "AGENTRAY_INTERNAL_")
"""Variables with these prefixes are no overrides: tests, benchmarks and agentray's own
processes use them."""
SECRET_PREFIX = "AGENTRAY_SECRET_"  # noqa: S105 - where secrets are, not one
"""AGENTRAY_SECRET_NAME sets tools.secrets.NAME, its case kept."""

_REFERENCE = re.compile(r"\$?\$\{([^}]*)\}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def interpolate(source: Source, env: Mapping[str, str]) -> None:
    """Replace each ``${VAR}`` in the texts of ``source``; ``$${`` stands for ``${`` itself.

    A variable that is missing or empty becomes a problem of the source. ``${secret:NAME}`` of a
    tool stays: only the request that it is for gets its value.
    """
    source.values = _interpolated(source, source.values, (), env)


def _interpolated(source: Source, value: Any, path: Path, env: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {key: _interpolated(source, item, (*path, key), env) for key, item in items}
    if isinstance(value, list):
        items = enumerate(cast("list[Any]", value))
        return [_interpolated(source, item, (*path, index), env) for index, item in items]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        name = match[1]
        if path[:1] == ("tools",) and name.startswith("secret:"):
            return match[0]
        if not _VARIABLE.fullmatch(name):
            source.broken(path, f"found ${{{name}}}; expected ${{VARIABLE}} and nothing more")
        elif not env.get(name):
            state = "empty" if name in env else "not set"
            source.broken(path, f"expected the environment variable {name}, which is {state}")
        else:
            source.hidden[path] = f"the value of ${{{name}}}"
            return env[name]
        return ""

    return _REFERENCE.sub(replaced, value)


def override(source: Source, env: Mapping[str, str]) -> None:
    """Lay ``AGENTRAY_SECTION__KEY=value`` over ``source``.

    Values are read as YAML, those of texts are taken as they stand. A variable that names no
    setting becomes a problem. ``AGENTRAY_SECRET_NAME`` is the secret NAME of the tools.
    """
    for name in sorted(env):
        if not name.startswith(PREFIX) or name.startswith(RESERVED_PREFIXES):
            continue
        if name.startswith(SECRET_PREFIX):
            secret = name.removeprefix(SECRET_PREFIX)
            source.put(("tools", "secrets", secret), env[name], _variable(name))
            continue
        found = _locate(name, source.values)
        if found is None:
            source.problems.append(Problem(_variable(name), None, "names no setting" + _near(name)))
            continue
        path, setting = found
        try:
            value = _parsed(env[name], setting)
        except yaml.YAMLError:
            problem = f"found no valid YAML; expected {setting.expected()}"
            source.problems.append(Problem(_variable(name), path, problem))
            continue
        source.put(path, value, _variable(name))


def _variable(name: str) -> str:
    return f"environment variable {name}"


def _locate(name: str, values: Any) -> tuple[Path, Setting] | None:
    path: tuple[str | int, ...] = ()
    setting = ROOT
    for part in name.removeprefix(PREFIX).lower().split("__"):
        key = part
        if setting.entries is not None:
            # gpt-4o is GPT_4O in a variable: shells allow no other characters.
            names = [str(entry) for entry in cast("dict[Any, Any]", values or {})]
            key = next((entry for entry in names if _as_variable(entry) == part.upper()), part)
        below = setting.child(key) if key else None
        if below is None:
            return None
        path, setting = (*path, key), below
        values = cast("dict[Any, Any]", values).get(key) if isinstance(values, dict) else None
    return path, setting


def _as_variable(name: str) -> str:
    return re.sub(r"[^A-Z0-9_]", "_", name.upper())


def _near(name: str) -> str:
    known = [PREFIX + "__".join(path).upper() for path in leaves()]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else "; see docs/configuration.md for their names"


def _parsed(text: str, setting: Setting) -> Any:
    if setting.text:
        return None if setting.optional and text in ("", "null") else text
    return yaml.safe_load(text)
