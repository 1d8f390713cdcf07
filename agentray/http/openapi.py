"""Describe the table of routes as OpenAPI 3.1, from the types that the routes decode and send."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any, cast

import msgspec

import agentray
from agentray.http.errors import ErrorBody
from agentray.http.routing import Answer, Route

__all__ = ["describe"]

_REFS = "#/components/schemas/{name}"
_PARAMETERS = {
    "session_id": ("A session's id", r"^[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}$"),
    "conversation_id": (
        "A conversation's id: that of a session",
        r"^[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}$",
    ),
    "response_id": (
        "A response's id",
        r"^resp_[0-9a-hjkmnp-tv-z]{26}_[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}$",
    ),
    "turn_id": ("A turn's id", r"^[0-9a-hjkmnp-tv-z]{26}$"),
    "item_id": ("An item's id", r"^(msg|mcp)_[0-9a-hjkmnp-tv-z]{26}_[0-9a-z]+$"),
    "model": ("The name of an agent or a model", r"^.{1,256}$"),
    "file_id": ("A file's id", r"^file-[0-9a-hjkmnp-tv-z]{26}$"),
    "batch_id": ("A batch's id", r"^batch_[0-9a-hjkmnp-tv-z]{26}$"),
}
_HEADERS = {
    "Idempotency-Key": (
        "The same key again gives the same turn: nothing is done twice",
        r"^[\x21-\x7e]{1,255}$",
    ),
    "Last-Event-ID": ("A cursor, where `after` is not given", r"^[0-9]{1,15}(\.[0-9]{1,15})?$"),
}


def describe(routes: Iterable[Route[Any]]) -> dict[str, Any]:
    """Return the OpenAPI document of a table of routes."""
    routes = list(routes)
    types = _types(routes)
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFS)
    by_type = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation = _operation(route, by_type, components)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agentray",
            "version": agentray.__version__,
            "summary": "Sessions of AI agents: OpenAI's routes, and agentray's own.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def _types(routes: Sequence[Route[Any]]) -> list[Any]:
    found: dict[str, Any] = {repr(ErrorBody): ErrorBody}
    for route in routes:
        for kind in (route.body, route.query, *(answer.body for answer in route.answers)):
            if kind is not None:
                found[repr(kind)] = kind
    return list(found.values())


def _operation(
    route: Route[Any], by_type: dict[str, Any], components: dict[str, Any]
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.endpoint.__name__,
        "summary": route.summary,
        "tags": [route.tag],
        "responses": _responses(route, by_type),
    }
    parameters = [
        *(_parameter("path", name, *_PARAMETERS[name]) for name in _path_names(route.path)),
        *(_parameter("header", name, *_HEADERS[name]) for name in route.headers),
        *_query(route, by_type, components),
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        schema = by_type[repr(route.body)]
        operation["requestBody"] = {
            "required": bool(_resolved(schema, components).get("required")),
            "content": {route.takes: {"schema": schema}},
        }
    return operation


def _path_names(path: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", path)


def _parameter(place: str, name: str, text: str, pattern: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": text,
        "schema": {"type": "string", "pattern": pattern},
    }


def _resolved(schema: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else components[reference.rpartition("/")[2]]


def _query(
    route: Route[Any], by_type: dict[str, Any], components: dict[str, Any]
) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    schema = _resolved(by_type[repr(route.query)], components)
    required = schema.get("required", ())
    return [
        {"name": name, "in": "query", "required": name in required, "schema": _in_query(facts)}
        for name, facts in schema["properties"].items()
    ]


def _in_query(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without null, which no query string can say."""
    options = [o for o in schema.get("anyOf", []) if o.get("type") != "null"]
    return cast("dict[str, Any]", options[0]) if len(options) == 1 else schema


def _responses(route: Route[Any], by_type: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for answer in route.answers:
        known = found.setdefault(str(answer.status), {"description": "", "content": {}})
        text = answer.text if answer.media_type == "application/json" else ""
        known["description"] = known["description"] or text or HTTPStatus(answer.status).phrase
        known["content"][answer.media_type] = {"schema": _answer_schema(answer, by_type)}
    error = {"application/json": {"schema": by_type[repr(ErrorBody)]}}
    for status in (*route.errors, 500):
        found.setdefault(str(status), {"description": HTTPStatus(status).phrase, "content": error})
    return found


def _answer_schema(answer: Answer, by_type: dict[str, Any]) -> dict[str, Any]:
    if answer.media_type == "application/json":
        return cast("dict[str, Any]", by_type[repr(answer.body)])
    if answer.media_type != "text/event-stream":
        return {"type": "string", "description": answer.text}
    # A schema is of the whole text to some readers, to others of each event (OpenAPI 3.2 has an
    # itemSchema for that): no type fits both.
    schema: dict[str, Any] = {"description": answer.text, "contentMediaType": answer.media_type}
    if answer.body is not None:
        schema["x-event-data"] = by_type[repr(answer.body)]
    return schema
