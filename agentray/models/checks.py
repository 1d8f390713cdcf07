"""Check what a model answered before anything is done with it: tool calls, and its form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Protocol, cast

import msgspec
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, relevance
from referencing import Registry
from referencing.exceptions import Unresolvable

from agentray.errors import InvalidRequestError
from agentray.events import ToolCall

__all__ = ["arguments_problem", "check_schema", "output_problem", "tool_calls_problem"]

_SHOWN_CHARS = 200
_NOTHING_ELSE: Registry[Any] = Registry()

_encode = msgspec.json.Encoder(order="deterministic").encode


class _Validator(Protocol):
    def iter_errors(self, instance: Any) -> Iterable[ValidationError]: ...


def check_schema(schema: dict[str, Any], *, param: str) -> None:
    """See that a caller's JSON schema is one, and that it refers to nothing outside itself.

    Raises:
        InvalidRequestError: it is none; the message says where.
    """
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        message = f"{param} is no valid JSON schema: {_short(error.message)}"
        raise InvalidRequestError(message, param=param) from error
    except RecursionError as error:
        raise InvalidRequestError(f"{param} is nested too deeply", param=param) from error
    for reference in _references(schema):
        if not reference.startswith("#"):
            message = f"{param} refers to {_short(reference)}: only # and what is behind it may be"
            raise InvalidRequestError(message, param=param)


def _references(schema: Any) -> Iterator[str]:
    """Yield what the parts of a schema refer to, or seem to."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            facts = cast("dict[str, Any]", part)
            for name in ("$ref", "$dynamicRef"):
                if isinstance(reference := facts.get(name), str):
                    yield reference
            waiting += facts.values()
        elif isinstance(part, list):
            waiting += cast("list[Any]", part)


def output_problem(text: str, schema: dict[str, Any]) -> str | None:
    """Return why a text does not follow a JSON schema, or None if it does."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"the answer is no JSON: {error}"
    return _against(found, _encode(schema), "the answer")


def tool_calls_problem(
    calls: tuple[ToolCall, ...], parameters: Callable[[str], dict[str, Any] | None]
) -> str | None:
    """Return what is wrong with the first bad call, or None; ``parameters`` returns a tool's JSON
    schema, or None if there is no such tool."""
    for call in calls:
        schema = parameters(call.name)
        if schema is None:
            return f"there is no tool {call.name[:80]!r}"
        if (problem := arguments_problem(call, schema)) is not None:
            return problem
    return None


def arguments_problem(call: ToolCall, schema: dict[str, Any]) -> str | None:
    """Return why a call's arguments do not fit the tool's JSON schema, or None if they do."""
    try:
        arguments = msgspec.json.decode(call.arguments or "{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"the arguments of {call.name} are no JSON: {error}"
    if not isinstance(arguments, dict):
        return f"the arguments of {call.name} are no JSON object"
    return _against(cast("dict[str, Any]", arguments), _encode(schema), f"arguments of {call.name}")


def _against(found: Any, schema: bytes, what: str) -> str | None:
    try:
        errors = list(_validator(schema).iter_errors(found))
    except (Unresolvable, RecursionError):
        return f"{what}: its schema refers to what is not there, or to itself without end"
    except ArithmeticError:
        return f"{what}: a number is too large"
    if not errors:
        return None
    error = max(errors, key=relevance)
    where = error.json_path.removeprefix("$").removeprefix(".")
    return f"{what}{': ' + where if where else ''}: {_short(error.message)}"


@lru_cache(maxsize=256)
def _validator(schema: bytes) -> _Validator:
    # Without a registry of its own it would fetch what a schema refers to from the network.
    parsed = msgspec.json.decode(schema)
    return cast("_Validator", Draft202012Validator(parsed, registry=_NOTHING_ELSE))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
