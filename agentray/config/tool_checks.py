"""Find what contradicts itself in the settings of tools, and in what agents say of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from agentray.config.settings import Settings, ToolsSettings
from agentray.config.source import Path

__all__ = ["bad_tools"]

_BUILT_IN: tuple[str, ...] = ("echo", "python", "shell")

# What models' endpoints take as the name of a function is up to 64 of these.
_MOST_NAME_CHARS = 64
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Its tools are called NAME__TOOL; the name itself must not look like one.
_GROUP_NAME = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9_-]{0,30}")
_UNFIT = re.compile(r"[^A-Za-z0-9_-]")
_SECRET = re.compile(r"\$\{secret:([^}]*)\}")


def bad_tools(settings: Settings) -> Iterator[tuple[Path, str]]:
    """Yield the key of each problem, and what was found and expected.

    An agent's tools are names that the configuration knows, ``GROUP__TOOL`` and ``GROUP.*`` of the
    groups in ``openapi`` and ``mcp``, whose tools are known at the start only, and, if there are
    ``functions``, any other name: those are known when their modules are imported.
    """
    tools = settings.tools
    groups = {
        **dict.fromkeys(tools.openapi, "openapi"),
        **dict.fromkeys(tools.mcp, "mcp"),
    }
    known = {*_BUILT_IN, *tools.http, *map(_sql_tool, tools.sql)}
    yield from _bad_names(tools)
    yield from _bad_secrets(tools)
    workers = tools.workers
    if workers.min is not None and workers.min > workers.max:
        yield ("tools", "workers", "min"), f"found {workers.min}; expected at most {workers.max}"
    for name, agent in settings.agents.items():
        for tool in agent.tools:
            if tool in known or _in_group(tool, groups, tools):
                continue
            if tools.functions and _TOOL_NAME.fullmatch(tool) and "__" not in tool:
                continue
            offered = sorted(known) + sorted(f"{group}.*" for group in groups)
            yield (
                ("agents", name, "tools"),
                f"found the unknown tool {tool!r}; expected one of {', '.join(offered)}",
            )


def _sql_tool(name: str) -> str:
    return "sql_" + _UNFIT.sub("_", name)


def _in_group(tool: str, groups: Mapping[str, str], tools: ToolsSettings) -> bool:
    if tool.endswith(".*"):
        return tool[:-2] in groups
    group, found, _ = tool.partition("__")
    if not found or group not in groups or not _TOOL_NAME.fullmatch(tool):
        return False
    listed = tools.openapi[group].operations if groups[group] == "openapi" else ()
    names = [f"{group}__{_UNFIT.sub('_', name)}"[:_MOST_NAME_CHARS] for name in listed]
    return not listed or tool in names


def _bad_names(tools: ToolsSettings) -> Iterator[tuple[Path, str]]:
    taken: dict[str, str] = dict.fromkeys(_BUILT_IN, "a built-in tool")
    tool = "expected up to 64 letters, digits, _ and -"
    group = "expected up to 31 letters, digits, - and single _"
    for kind, entries, pattern, expected in (
        ("http", tools.http, _TOOL_NAME, tool),
        ("sql", tools.sql, _TOOL_NAME, tool),
        ("openapi", tools.openapi, _GROUP_NAME, group),
        ("mcp", tools.mcp, _GROUP_NAME, group),
    ):
        for name in entries:
            path = ("tools", kind, name)
            called = _sql_tool(name) if kind == "sql" else name
            if not pattern.fullmatch(called):
                yield path, f"is a part of what models call it; {expected}"
            if called in taken:
                yield path, f"{taken[called]} has this name; expected another one"
            taken[called] = f"one in tools.{kind}"


def _bad_secrets(tools: ToolsSettings) -> Iterator[tuple[Path, str]]:
    for name, value in tools.secrets.items():
        if not value.get_secret_value():
            yield ("tools", "secrets", name), "is empty; expected a text"
    for path, text in _texts(tools):
        for secret in _SECRET.findall(text):
            if secret not in tools.secrets:
                expected = f"one in tools.secrets, or AGENTRAY_SECRET_{secret} in the environment"
                yield path, f"found the unknown secret {secret!r}; expected {expected}"


def _texts(tools: ToolsSettings) -> Iterator[tuple[Path, str]]:
    """Yield the texts that may have secrets in them."""
    for name, entry in tools.http.items():
        yield ("tools", "http", name, "url"), entry.url
    for kind, entries in (("http", tools.http), ("openapi", tools.openapi)):
        for name, entry in entries.items():
            for part, texts in (("query", entry.query), ("headers", entry.headers)):
                for key, text in texts.items():
                    yield ("tools", kind, name, part, key), text
