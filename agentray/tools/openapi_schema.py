"""Turn the schemas of an OpenAPI document into JSON schemas that stand alone: pure."""

from __future__ import annotations

import re
from typing import Any, cast
from urllib.parse import unquote

__all__ = ["Unsupported", "referred", "schema_of"]

# Not of JSON Schema, or of no use to a model.
_DROPPED = frozenset(
    {"discriminator", "xml", "externalDocs", "example", "examples", "nullable", "readOnly"}
    | {"writeOnly", "$schema", "$id", "$anchor", "$comment"}
)
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SINGLE = frozenset(
    {"items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else"}
    | {"unevaluatedItems", "unevaluatedProperties"}
)
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_.-]")
_DEEPEST = 100


class Unsupported(Exception):  # noqa: N818 - what the message says is not supported
    """A part of a document that no tool can be made of; the message says which."""


def referred(document: dict[str, Any], reference: str) -> Any:
    """Return what a reference inside of a document leads to (RFC 6901); raises ``Unsupported``."""
    if not reference.startswith("#/"):
        raise Unsupported(f"it refers to {reference[:80]!r}, which is another document")
    found: Any = document
    for part in reference[2:].split("/"):
        step = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and step in found:
            found = cast("dict[str, Any]", found)[step]
        elif isinstance(found, list) and step.isdigit() and int(step) < len(cast("Any", found)):
            found = cast("list[Any]", found)[int(step)]
        else:
            raise Unsupported(f"it refers to {reference[:80]!r}, which is not there")
    return found


def schema_of(
    document: dict[str, Any], schema: Any, definitions: dict[str, Any], depth: int = 0
) -> dict[str, Any]:
    """Return a schema as JSON Schema of draft 2020-12.

    What it refers to is put into ``definitions``, which are to be the ``$defs`` at the root of
    what it becomes a part of. What of it only answers have is left out. Raises ``Unsupported``.
    """
    if depth > _DEEPEST:
        raise Unsupported("a schema is nested too deeply")
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise Unsupported("a schema is no object")
    found = cast("dict[str, Any]", schema)
    made: dict[str, Any] = {}
    for name, value in found.items():
        if name == "$ref":
            made["$ref"] = _defined(document, str(value), definitions, depth)
        elif name in _MAPS and isinstance(value, dict):
            made[name] = {
                key: schema_of(document, item, definitions, depth + 1)
                for key, item in cast("dict[str, Any]", value).items()
                if not (isinstance(item, dict) and cast("dict[str, Any]", item).get("readOnly"))
            }
        elif name in _LISTS and isinstance(value, list):
            items = cast("list[Any]", value)
            made[name] = [schema_of(document, item, definitions, depth + 1) for item in items]
        elif name in _SINGLE and isinstance(value, dict | bool):
            whole = isinstance(value, bool)
            made[name] = value if whole else schema_of(document, value, definitions, depth + 1)
        elif name not in _DROPPED and not name.startswith("x-"):
            made[name] = value
    return _nullable(_bounded(_required(made)), found)


def _defined(
    document: dict[str, Any], reference: str, definitions: dict[str, Any], depth: int
) -> str:
    name = _NOT_A_NAME.sub("_", reference.removeprefix("#/components/schemas/").strip("#/"))
    if name not in definitions:
        # In front of what is in it, which may lead back to it.
        definitions[name] = {}
        target = referred(document, reference)
        definitions[name] = schema_of(document, target, definitions, depth + 1)
    return f"#/$defs/{name}"


def _required(schema: dict[str, Any]) -> dict[str, Any]:
    # Those that only answers have may be required there.
    if isinstance(schema.get("required"), list) and isinstance(schema.get("properties"), dict):
        names = [name for name in schema["required"] if name in schema["properties"]]
        return {**schema, "required": names}
    return schema


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    # OpenAPI 3.0 has JSON Schema of draft 5 here: true beside the bound.
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        flag = schema.get(exclusive)
        if isinstance(flag, bool):
            rest = {key: value for key, value in schema.items() if key != exclusive}
            if flag and inclusive in rest:
                rest[exclusive] = rest.pop(inclusive)
            schema = rest
    return schema


def _nullable(schema: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    if found.get("nullable") is not True:
        return schema
    kind = schema.get("type")
    if isinstance(kind, str) and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}
