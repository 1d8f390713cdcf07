"""Make tools of the operations of an OpenAPI document, 3.0 or 3.1."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urljoin

import aiohttp
import msgspec
import yaml

from agentray.config.tool_settings import OpenApiSettings
from agentray.errors import ConfigError
from agentray.telemetry.logging import get_logger
from agentray.tools.http_tools import HttpTemplate, Sender, check_template, spec_of_template
from agentray.tools.openapi_schema import Unsupported, referred, schema_of
from agentray.tools.secrets import Secrets
from agentray.tools.spec import ToolSpec

__all__ = ["openapi_tools", "read_document"]

log = get_logger(__name__)

_METHODS = ("get", "head", "post", "put", "patch", "delete")
_READING = ("GET", "HEAD")
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_-]")
_NOT_A_PLACE = re.compile(r"[^A-Za-z0-9_]")
# Nothing that a template would fill in.
_JSON = re.compile(r"application/(json|[a-z0-9.+-]+\+json)")
_MOST_DOCUMENT_BYTES = 16 * 1024 * 1024
_MOST_NAME_CHARS = 64
_MOST_DESCRIPTION_CHARS = 1024
_FETCH_TIMEOUT_S = 20.0
# The standard has them ignored where they are parameters.
_IGNORED_HEADERS = frozenset({"accept", "content-type", "authorization"})


async def read_document(document: str, *, key: str) -> dict[str, Any]:
    """Return the document of a file or an address, which is the operator's own.

    Raises:
        ConfigError: it cannot be read, or is no OpenAPI 3 document; the message names the key.
    """
    try:
        if document.startswith(("http://", "https://")):
            text = await _fetched(document)
        else:
            text = await asyncio.to_thread(_read, document)
        # JSON is YAML, and is read a hundred times as fast as such.
        found = msgspec.json.decode(text) if text.lstrip()[:1] == b"{" else yaml.safe_load(text)
    except (OSError, aiohttp.ClientError, TimeoutError) as error:
        shown = str(error) or type(error).__name__
        raise ConfigError(f"{key}: {document!r} cannot be read: {shown}") from error
    except (yaml.YAMLError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{key}: {document!r} is neither JSON nor YAML") from error
    version = str(cast("dict[str, Any]", found).get("openapi")) if isinstance(found, dict) else ""
    if not re.match(r"3\.[01](\.|\Z)", version):
        raise ConfigError(f"{key}: {document!r} is no OpenAPI document of version 3.0 or 3.1")
    return cast("dict[str, Any]", found)


def _read(document: str) -> bytes:
    return Path(document).expanduser().read_bytes()


async def _fetched(address: str) -> bytes:
    timeout = aiohttp.ClientTimeout(total=_FETCH_TIMEOUT_S)
    async with (
        aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session,
        session.get(address) as response,
    ):
        text = await response.content.read(_MOST_DOCUMENT_BYTES + 1)
        while len(text) <= _MOST_DOCUMENT_BYTES and (more := await response.content.readany()):
            text += more
    if len(text) > _MOST_DOCUMENT_BYTES:
        raise OSError(f"it has more than {_MOST_DOCUMENT_BYTES} bytes")
    return text


def openapi_tools(
    name: str,
    settings: OpenApiSettings,
    document: dict[str, Any],
    secrets: Secrets,
    sender: Callable[[], Sender],
) -> list[tuple[ToolSpec, HttpTemplate]]:
    """Return the tools of a document, ``NAME__operationId`` each, and how they are sent.

    Of those that the settings name each has to be there and supported. If they name none, those
    that are not supported are left out, and logged.

    Raises:
        ConfigError: the settings or the document cannot be used; the message names the key.
    """
    key = f"tools.openapi.{name}"
    tools: dict[str, tuple[ToolSpec, HttpTemplate]] = {}
    for identity, description, template, parameters in _wanted(name, settings, document):
        check_template(template, secrets, key=f"{key}: {identity}")
        known = f"{name}__{_NOT_A_NAME.sub('_', identity)}"[:_MOST_NAME_CHARS]
        if known in tools:
            raise ConfigError(f"{key}: two operations would be the tool {known}")
        spec = spec_of_template(
            known,
            description,
            parameters,
            template,
            secrets,
            sender,
            timeout_s=settings.timeout_s,
            cache_s=settings.cache_s if template.method in _READING else 0.0,
            version=str(_section(document, "info").get("version", "1")),
        )
        tools[known] = spec, template
    if not tools:
        raise ConfigError(f"{key}: the document has no operation that can be a tool")
    return list(tools.values())


def _wanted(
    name: str, settings: OpenApiSettings, document: dict[str, Any]
) -> Iterator[tuple[str, str, HttpTemplate, dict[str, Any]]]:
    """Yield what is to be a tool: identity, description, how it is sent, schema of arguments."""
    key = f"tools.openapi.{name}"
    base = _base_url(settings, document, key)
    missing = set(settings.operations)
    for identity, method, path, item in _operations(document):
        if settings.operations and identity not in settings.operations:
            continue
        missing.discard(identity)
        try:
            template, parameters = _Operation(document, settings, base, method, path, item).made()
        except Unsupported as error:
            if settings.operations:
                raise ConfigError(f"{key}.operations: {identity}: {error}") from error
            log.warning(
                "openapi_operation_left_out", source=name, operation=identity, why=str(error)
            )
            continue
        yield identity, _description(item, method, path), template, parameters
    if missing:
        named = ", ".join(sorted(missing))
        raise ConfigError(f"{key}.operations: the document has no {named}")


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for path, found in _section(document, "paths").items():
        item = _resolved(document, found)
        for method in _METHODS:
            if method in item:
                operation = dict(item[method])
                shared: list[Any] = item.get("parameters", [])
                operation["parameters"] = [*shared, *operation.get("parameters", [])]
                if "servers" in item:
                    operation.setdefault("servers", item["servers"])
                identity = str(operation.get("operationId") or f"{method}_{path.strip('/')}")
                yield identity, method, path, operation


class _Operation:
    """Puts one operation together."""

    def __init__(
        self,
        document: dict[str, Any],
        settings: OpenApiSettings,
        base: tuple[str, str],
        method: str,
        path: str,
        item: dict[str, Any],
    ) -> None:
        self._document = document
        self._settings = settings
        self._base = base
        self._method = method
        self._path = path
        self._item = item
        self._properties: dict[str, Any] = {}
        self._required: list[str] = []
        self._definitions: dict[str, Any] = {}
        self._query: list[tuple[str, str]] = []
        self._headers: list[tuple[str, str]] = []
        self._joined: set[str] = set()

    def made(self) -> tuple[HttpTemplate, dict[str, Any]]:
        """Return how it is sent, and the JSON schema of its arguments; raises ``Unsupported``."""
        if "servers" in self._item and self._settings.base_url is None:
            raise Unsupported("it has servers of its own; say base_url")
        for parameter in self._parameters():
            self._add(parameter)
        whole_body = self._add_body()
        if re.search(r"[{}]", re.sub(r"\{[A-Za-z_]\w*\}", "", self._path)):
            raise Unsupported("its path has a place that no parameter fills")
        for place in re.findall(r"\{([A-Za-z_]\w*)\}", self._path):
            if place not in self._properties:
                raise Unsupported(f"its path has {{{place}}}, which is no parameter")
        origin, prefix = self._base
        template = HttpTemplate(
            method=self._method.upper(),
            base=origin,
            path=prefix + self._path,
            query=(*self._query, *self._settings.query.items()),
            headers=(*self._headers, *self._settings.headers.items()),
            whole_body=whole_body,
            joined=frozenset(self._joined),
        )
        parameters: dict[str, Any] = {
            "type": "object",
            "properties": self._properties,
            "required": self._required,
            "additionalProperties": False,
        }
        if self._definitions:
            parameters["$defs"] = self._definitions
        return template, parameters

    def _parameters(self) -> list[dict[str, Any]]:
        # One of the operation takes the place of the path's.
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for parameter in self._item["parameters"]:
            resolved = _resolved(self._document, parameter)
            found[str(resolved.get("name")), str(resolved.get("in"))] = resolved
        return list(found.values())

    def _add(self, parameter: dict[str, Any]) -> None:
        name, place = str(parameter.get("name")), str(parameter.get("in"))
        required = bool(parameter.get("required")) or place == "path"
        said = {*self._settings.headers} if place == "header" else {*self._settings.query}
        if place == "header" and name.lower() in _IGNORED_HEADERS:
            return
        if place in ("header", "query") and name.lower() in map(str.lower, said):
            return  # the operator's own
        if place == "cookie" or place not in ("path", "query", "header"):
            if required:
                raise Unsupported(f"the parameter {name!r} is in {place}")
            return
        schema = self._schema_of(parameter, name, place)
        known = _NOT_A_PLACE.sub("_", name)
        known = f"p_{known}" if known[:1].isdigit() else known
        if known in self._properties or known == "body":
            known = f"{known}_{place}"
        if known in self._properties:
            raise Unsupported(f"two parameters are {known}")
        if place == "path":
            self._path = self._path.replace(f"{{{name}}}", f"{{{known}}}")
        elif place == "query":
            self._query.append((name, f"{{{known}}}"))
            if parameter.get("explode") is False:
                self._joined.add(known)
        else:
            self._headers.append((name, f"{{{known}}}"))
        if "description" in parameter:
            schema = {"description": str(parameter["description"]), **schema}
        self._properties[known] = schema
        if required:
            self._required.append(known)

    def _schema_of(self, parameter: dict[str, Any], name: str, place: str) -> dict[str, Any]:
        style = parameter.get("style", "form" if place == "query" else "simple")
        if "schema" not in parameter:
            raise Unsupported(f"the parameter {name!r} has no schema")
        if style not in ("form", "simple"):
            raise Unsupported(f"the parameter {name!r} has the style {style}")
        schema = self._converted(parameter["schema"])
        kind = schema.get("type")
        if kind == "object" or "properties" in schema:
            raise Unsupported(f"the parameter {name!r} is an object")
        return schema

    def _add_body(self) -> str:
        if "requestBody" not in self._item:
            return ""
        body = _resolved(self._document, self._item["requestBody"])
        for kind, media in _section(body, "content").items():
            bare = kind.partition(";")[0].strip().lower()
            if _JSON.fullmatch(bare):
                if bare != "application/json":
                    self._headers.append(("Content-Type", bare))
                known = "body"
                self._properties[known] = self._converted(media.get("schema", {}))
                if body.get("required"):
                    self._required.append(known)
                return known
        if body.get("required"):
            raise Unsupported("its body is no JSON")
        return ""

    def _converted(self, schema: Any) -> dict[str, Any]:
        return schema_of(self._document, schema, self._definitions)


def _base_url(settings: OpenApiSettings, document: dict[str, Any], key: str) -> tuple[str, str]:
    """Return the origin and the path in front of all paths."""
    url = settings.base_url
    if url is None:
        servers: list[dict[str, Any]] = document.get("servers") or [{"url": "/"}]
        url = str(servers[0].get("url", "/"))
        for name, variable in _section(servers[0], "variables").items():
            url = url.replace(f"{{{name}}}", str(variable.get("default", "")))
        if settings.document.startswith(("http://", "https://")):
            url = urljoin(settings.document, url)
    match = re.fullmatch(r"(https?://[^/?#{}]+)(/[^?#{}]*)?", url, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{key}.base_url: expected http(s)://HOST/PATH, as the document has none")
    return match[1], (match[2] or "").rstrip("/")


def _description(item: dict[str, Any], method: str, path: str) -> str:
    said = [str(item[part]).strip() for part in ("summary", "description") if item.get(part)]
    return ("\n".join(dict.fromkeys(said)) or f"{method.upper()} {path}")[:_MOST_DESCRIPTION_CHARS]


def _resolved(document: dict[str, Any], part: Any) -> dict[str, Any]:
    """Follow references until there is none."""
    for _ in range(16):
        if not isinstance(part, dict):
            raise Unsupported("a part of it is no object")
        found = cast("dict[str, Any]", part)
        if "$ref" not in found:
            return found
        part = referred(document, str(found["$ref"]))
    raise Unsupported("a reference leads to itself")


def _section(part: dict[str, Any], name: str) -> dict[str, Any]:
    found = part.get(name)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
