"""Read the configuration from file, environment and flags; every problem is named at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, cast

import yaml
from pydantic import SecretStr, ValidationError

from agentray.config.environment import interpolate, override
from agentray.config.fields import ROOT, find
from agentray.config.settings import SIMULATOR, Settings
from agentray.config.source import Path, Problem, Source
from agentray.config.tool_checks import bad_tools
from agentray.errors import ConfigError

__all__ = ["load_settings"]

_DEEPEST = 20
_ROUTE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def load_settings(
    path: FilePath | None,
    env: Mapping[str, str],
    *,
    flags: Mapping[str, Any] | None = None,
    schema_problem: Callable[[dict[str, Any]], str | None] | None = None,
) -> Settings:
    """Return the settings of a YAML file, with what the environment and the flags say over it.

    Args:
        path: the file; without one the defaults are the base.
        env: the environment, for ``${VAR}`` in the file's texts and ``AGENTRAY_…`` overrides.
        flags: values of the command line as nested sections; they win over everything.
        schema_problem: returns why the JSON schema of an agent's answers cannot be used, or None.

    Raises:
        ConfigError: if something is wrong; its message has a line for each problem, with the
            file or variable, the dotted key, what was found and what was expected. The lines are
            in ``problems`` of the fields too. Secrets are never shown.
    """
    source = Source("the defaults", {}) if path is None else _read(path)
    interpolate(source, env)
    override(source, env)
    if flags:
        source.put((), flags, "command line")
    settings = None
    try:
        settings = Settings.model_validate(source.values)
    except ValidationError as error:
        source.problems.extend(_explained(error, source))
    if settings is not None:
        for key, text in _contradictions(settings):
            if not source.is_broken(key):
                source.problems.append(Problem(source.origin_of(key), key, text))
        for name, agent in settings.agents.items():
            key = ("agents", name, "output_schema")
            if schema_problem is None or agent.output_schema is None or source.is_broken(key):
                continue
            if (problem := schema_problem(agent.output_schema)) is not None:
                source.problems.append(Problem(source.origin_of(key), key, problem))
    if settings is None or source.problems:
        lines = [str(problem) for problem in source.problems]
        raise ConfigError("\n".join(lines), problems=lines)
    return settings


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys, of which the last one would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be text", problem_mark=key.start_mark
                )
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read(path: FilePath) -> Source:
    origin = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{origin}: there is no such file") from error
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin}: expected text in UTF-8") from error
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{origin}: {place}not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: nested too deeply") from error
    except ValueError as error:  # e.g. a date in a month 13
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: found {_shown(values)}; expected {ROOT.expected()}")
    _check_keys(origin, cast("dict[Any, Any]", values), ())
    return Source(origin, values)


def _check_keys(origin: str, value: Any, path: Path) -> None:
    if len(path) > _DEEPEST:
        raise ConfigError(f"{origin}: {path[0]}: nested too deeply")
    if isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            if not isinstance(key, str):
                where = ".".join(map(str, (*path, key)))
                raise ConfigError(
                    f"{origin}: {where}: found {_shown(key)} as a key; expected text, in quotes "
                    "if it looks like something else"
                )
            _check_keys(origin, item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(cast("list[Any]", value)):
            _check_keys(origin, item, (*path, index))


def _explained(error: ValidationError, source: Source) -> Iterator[Problem]:
    for details in error.errors(include_url=False, include_context=False):
        path: Path = details["loc"]
        if source.is_broken(path):
            continue
        origin = source.origin_of(path)
        setting = find(path)
        if details["type"] == "extra_forbidden":
            yield Problem(origin, path, _unknown(path))
        elif setting is None:
            yield Problem(origin, path, details["msg"])
        elif details["type"] == "missing":
            yield Problem(origin, path, f"is missing; expected {setting.expected()}")
        else:
            value = details["input"]
            found = "a value that is not shown" if setting.secret else _shown(value)
            found = source.hidden.get(path, found)
            hint = "; leave the key out for the defaults" if value is None else ""
            yield Problem(origin, path, f"found {found}; expected {setting.expected()}{hint}")


def _unknown(path: Path) -> str:
    above = find(path[:-1])
    known = list(above.section.model_fields) if above and above.section else []
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {hint}expected one of {', '.join(known)}"


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)[:40]
        case str():
            return repr(value if len(value) <= 40 else value[:40] + "…")
        case dict():
            return "a section"
        case list():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


def _contradictions(settings: Settings) -> Iterator[tuple[Path, str]]:
    term_s, beat_s = settings.sessions.term_s, settings.sessions.beat_s
    if term_s < 2 * beat_s:
        # One late beat must not make an owner dead.
        expected = f"expected at least twice sessions.beat_s, {2 * beat_s:g}"
        yield ("sessions", "term_s"), f"found {term_s:g}; {expected}"
    yield from _bad_addresses(settings)
    yield from _bad_models(settings)
    yield from bad_tools(settings)
    if not settings.agents:
        yield ("agents",), "found none; expected at least one agent, or no such key at all"


def _bad_addresses(settings: Settings) -> Iterator[tuple[Path, str]]:
    addresses: list[tuple[Path, SecretStr | str | None, tuple[str, ...]]] = [
        (("postgres", "url"), settings.postgres.url, ("postgresql://", "postgres://")),
        (("redis", "url"), settings.redis.url, ("redis://", "rediss://", "unix://")),
    ]
    for name, endpoint in settings.models.endpoints.items():
        path = ("models", "endpoints", name, "url")
        addresses.append((path, endpoint.url, ("http://", "https://")))
    for path, address, schemes in addresses:
        text = address.get_secret_value() if isinstance(address, SecretStr) else address
        if text is not None and not text.startswith(schemes):
            # The address may hold a password: it is not shown.
            yield path, f"found an address of another kind; expected {' or '.join(schemes)}…"


def _bad_models(settings: Settings) -> Iterator[tuple[Path, str]]:
    models = settings.models
    names = models.names()
    if not names:
        yield (
            ("models",),
            "found no model; expected models.endpoints, models.serve or the simulator",
        )
    if models.simulated() and SIMULATOR in models.endpoints:
        yield (
            ("models", "endpoints", SIMULATOR),
            "the built-in simulator has this name; expected another one",
        )
    for name, served in models.serve.items():
        where: Path = ("models", "serve", name)
        if name in models.endpoints or (name == SIMULATOR and models.simulated()):
            yield where, "another model has this name; expected another one"
        if not _ROUTE_NAME.fullmatch(name):
            yield where, "is a part of an address; expected letters, digits, dots, _ and - alone"
        if served.min_replicas > served.max_replicas:
            found = f"found {served.max_replicas}"
            yield (*where, "max_replicas"), f"{found}; expected at least {served.min_replicas}"
        if served.affinity != "session" and not served.min_replicas:
            # Ray's proxy holds the call that starts a replica, and hands these routers no prompt.
            expected = "expected session, or min_replicas of at least 1"
            yield (*where, "affinity"), f"found {served.affinity}; {expected}"
    asked: list[tuple[Path, str | None]] = [(("models", "default"), models.default)]
    for name, agent in settings.agents.items():
        path = ("agents", name, "model")
        asked.append((path, agent.model))
        asked += [(("agents", name, "models"), allowed) for allowed in agent.models]
        if agent.model is not None and agent.models and agent.model not in agent.models:
            yield path, f"found {agent.model!r}; expected one of its models"
    answering = [name for name in names if models.card(name).kind == "chat"]
    if names and not answering:
        yield ("models",), "found embedding models alone; expected one that answers chats"
    for path, model in asked:
        if model is not None and model not in answering:
            known = f"expected one of {', '.join(answering)}"
            yield path, f"found the unknown model {model!r}; {known}"
