"""Turn what MCP servers say, whom nobody vouches for, into tools and texts for models: pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec

from agentray.tools.spec import OnCrash

__all__ = ["Listed", "Offer", "Offers", "offers_of", "server_prefix", "shown_result", "tool_name"]

_MOST_NAME = 64
_UNFIT = re.compile(r"[^a-zA-Z0-9_-]")
_HASH_CHARS = 8
_MOST_DESCRIPTION = 4_096
# Of all tools of a server: the model reads them at each turn, and pays for them.
_MOST_BYTES = 256 * 1024
_NAMES_BELOW = ("properties", "$defs", "definitions", "dependentSchemas")


class Listed(msgspec.Struct, frozen=True):
    """A tool as its server lists it. The hints are the server's word."""

    name: str
    description: str
    schema: Mapping[str, Any]
    read_only: bool = False
    idempotent: bool = False


class Offer(msgspec.Struct, frozen=True):
    """A tool as models see it; ``tool`` is its name at the server."""

    tool: str
    name: str
    description: str
    parameters: dict[str, Any]
    on_crash: OnCrash


class Offers(msgspec.Struct, frozen=True):
    """What of a server's tools is offered, and why each of the others is not."""

    offers: tuple[Offer, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def server_prefix(server: str) -> str:
    """Return what the names of a server's tools begin with, without the ``__`` behind it."""
    return _UNFIT.sub("_", server)


def tool_name(server: str, tool: str) -> str:
    """Return a tool's name for models: of the 64 letters, digits, _ and - that OpenAI takes.

    Where letters had to go, a hash of the original tells apart what would be equal.
    """
    prefix = server_prefix(server) + "__"
    plain = _UNFIT.sub("_", tool)
    if plain == tool and len(prefix) + len(plain) <= _MOST_NAME:
        return prefix + plain
    mark = "_" + hashlib.sha256(tool.encode(errors="replace")).hexdigest()[:_HASH_CHARS]
    return prefix + plain[: _MOST_NAME - len(prefix) - len(mark)] + mark


def offers_of(
    server: str,
    tools: Iterable[Listed],
    *,
    only: Collection[str],
    most: int,
    schema_problem: Callable[[dict[str, Any]], str | None],
) -> Offers:
    """Return what is offered of a server's tools: those that are asked for and can be used, as
    far as all together are not too large."""
    offers: dict[str, Offer] = {}
    used_bytes = 0
    left_out: list[tuple[str, str]] = []
    for tool in tools:
        if only and tool.name not in only:
            continue
        name = tool_name(server, tool.name)
        problem = None
        if name in offers:
            problem = "another tool has its name"
        elif len(offers) >= most:
            problem = f"the server has more than {most} tools"
        parameters = _tamed(tool.schema)
        problem = problem or _parameters_problem(parameters, schema_problem)
        description = tool.description[:_MOST_DESCRIPTION].encode(errors="replace")
        if problem is None:
            size_bytes = len(name) + len(description) + len(msgspec.json.encode(parameters))
            if used_bytes + size_bytes > _MOST_BYTES:
                problem = f"the server's tools would be more than {_MOST_BYTES} bytes together"
            else:
                used_bytes += size_bytes
        if problem is not None:
            left_out.append((name, problem))
            continue
        safe = tool.read_only or tool.idempotent
        on_crash: OnCrash = "retry" if safe else "report"
        offers[name] = Offer(tool.name, name, description.decode(), parameters, on_crash)
    return Offers(tuple(offers.values()), tuple(left_out))


def _parameters_problem(
    parameters: dict[str, Any], schema_problem: Callable[[dict[str, Any]], str | None]
) -> str | None:
    if parameters.get("type") != "object":
        return "its arguments are no object"
    problem = schema_problem(parameters)
    return None if problem is None else f"the schema of its arguments {problem}"


def _tamed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Leave regular expressions out of a schema: checking arguments by a hostile one has no end.

    The server checks its arguments itself.
    """
    try:
        return _without_patterns(schema)
    except RecursionError:
        return {}


def _without_patterns(schema: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("pattern", "patternProperties"):
            continue
        if key in _NAMES_BELOW and isinstance(value, dict):
            named = cast("dict[str, Any]", value)
            kept[key] = {name: _tamed_part(part) for name, part in named.items()}
        else:
            kept[key] = _tamed_part(value)
    return kept


def _tamed_part(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_patterns(cast("dict[str, Any]", value))
    if isinstance(value, list):
        return [_tamed_part(item) for item in cast("list[Any]", value)]
    return value


def shown_result(content: Sequence[Mapping[str, Any]], structured: Any, max_bytes: int) -> str:
    """Return the text of a result: its texts, a note for what is none, the structured part if
    there is no text; at most about ``max_bytes``, and what is cut is said."""
    parts = [_shown_block(block) for block in content]
    if structured is not None and not any(block.get("type") == "text" for block in content):
        parts.append(msgspec.json.encode(structured).decode())
    encoded = "\n".join(parts).encode(errors="replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    kept = encoded[:max_bytes].decode(errors="ignore")
    return f"{kept}\n[cut here: {len(encoded) - max_bytes} more bytes are not shown]"


def _shown_block(block: Mapping[str, Any]) -> str:
    match block.get("type"):
        case "text":
            return str(block.get("text", ""))
        case "image" | "audio" as kind:
            return f"[{kind}: {_media(block, 'data')}; not shown]"
        case "resource_link":
            return f"[resource {block.get('name', '')}: {block.get('uri', '')}]"
        case "resource":
            found = cast("Mapping[str, Any]", block.get("resource") or {})
            if "text" in found:
                return f"[resource {found.get('uri', '')}]\n{found['text']}"
            return f"[resource {found.get('uri', '')}: {_media(found, 'blob')}; not shown]"
        case kind:
            return f"[{kind}; not shown]"


def _media(block: Mapping[str, Any], key: str) -> str:
    size = len(str(block.get(key, ""))) * 3 // 4
    return f"{block.get('mimeType') or 'unknown type'}, about {size} bytes"
