"""Check what a model answered before anything is done with it: tool calls, and its form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol, cast

import msgspec
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, relevance
from jsonschema.validators import extend  # pyright: ignore[reportUnknownVariableType]
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from agentray.errors import InvalidRequestError
from agentray.events import ToolCall

__all__ = [
    "arguments_problem",
    "check_schema",
    "output_problem",
    "schema_problem",
    "tool_calls_problem",
]

_SHOWN_CHARS = 200
_MOST_BYTES = 64 * 1024
# Lists of anything but texts or numbers are compared each item with each.
_MOST_ITEMS = 256
# A check is synchronous: this is a quarter of a second or so of a host's loop. A row of ten fields
# takes about 25 of it.
_MOST_WORK = 50_000
# A reference is looked up each time.
_WORK_OF_REFERENCE = 4
_NOTHING_ELSE: Registry[Any] = Registry()

_encode = msgspec.json.Encoder(order="deterministic").encode


class _Validator(Protocol):
    def iter_errors(self, instance: Any) -> Iterable[ValidationError]: ...


_Keyword = Callable[[Any, Any, Any, Any], Iterable[ValidationError] | None]


# Schemas


def check_schema(schema: dict[str, Any], *, param: str) -> None:
    """See that a caller's JSON schema can be used: see ``schema_problem``.

    Raises:
        InvalidRequestError: it cannot; the message says why.
    """
    if (problem := schema_problem(schema)) is not None:
        raise InvalidRequestError(f"{param} {problem}", param=param)


def schema_problem(schema: dict[str, Any]) -> str | None:
    """Return why something cannot be the JSON schema of answers, or None if it can.

    It has to be a schema of draft 2020-12 of at most 64 KiB, whose references lead to schemas in
    it, by ``$ref`` and a JSON pointer.
    """
    try:
        body = _encode(schema)
        if len(body) > _MOST_BYTES:
            return f"is larger than {_MOST_BYTES} bytes"
        parsed = msgspec.json.decode(body)
        if (problem := _problem_in_any_part(parsed)) is not None:
            return problem
        Draft202012Validator.check_schema(parsed)
        return _reference_problem(parsed)
    except SchemaError as error:
        return f"is no valid JSON schema: {_short(error.message)}"
    except RecursionError:
        return "is nested too deeply"
    except Exception as error:  # noqa: BLE001 - e.g. a pattern that `re` cannot compile
        return f"is no valid JSON schema: {_short(str(error))}"


def _problem_in_any_part(schema: Any) -> str | None:
    """Look at all parts of a schema, also those that are none themselves."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            facts = cast("dict[str, Any]", part)
            for name in ("$ref", "$dynamicRef"):
                reference = facts.get(name)
                if isinstance(reference, str) and not (name == "$ref" and _is_inside(reference)):
                    return f"refers to {_short(reference)}: only # and what is behind #/ may be"
            waiting += facts.values()
        elif isinstance(part, list):
            items = cast("list[Any]", part)
            kinds = set(map(type, items))
            if len(items) > _MOST_ITEMS and not (kinds <= {str} or kinds <= {int, float}):
                return f"has a list of more than {_MOST_ITEMS} other than texts or numbers"
            waiting += items
    return None


def _is_inside(reference: str) -> bool:
    return reference == "#" or reference.startswith("#/")


def _reference_problem(schema: dict[str, Any]) -> str | None:
    """Return which reference of a schema does not lead to a schema in it that was checked."""
    schema = _without_name(schema)
    parts = list(_subschemas(schema))
    for part in parts:
        for name in ("$schema", "$id"):
            if name in part:
                return f"has a {name} inside of it"
    resolver = _NOTHING_ELSE.resolver_with_root(DRAFT202012.create_resource(schema))
    known = set(map(id, parts))
    for reference in {part["$ref"] for part in parts if "$ref" in part}:
        try:
            found = resolver.lookup(reference).contents
        except Exception:  # noqa: BLE001 - `#/allOf/x` and its like raise what they will
            return f"refers to {_short(reference)}, which is not there"
        if not isinstance(found, bool) and id(found) not in known:
            return f"refers to {_short(reference)}, which is no schema"
    return None


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a valid schema and those in it."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield cast("dict[str, Any]", part)
            waiting += DRAFT202012.subresources_of(cast("dict[str, Any]", part))


def _without_name(schema: dict[str, Any]) -> dict[str, Any]:
    # `$schema` would have another validator take over, `$id` another place to look references up.
    return {name: value for name, value in schema.items() if name not in ("$schema", "$id")}


# Answers and calls


def output_problem(text: str, schema: dict[str, Any]) -> str | None:
    """Return why a text does not follow a caller's JSON schema, or None if it does.

    Patterns and ``unevaluated…`` are not looked at, nor ``additionalProperties`` beside
    ``patternProperties``. Whatever the schema says, this returns, and soon.
    """
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"the answer is no JSON: {error}"
    return _against(found, schema, "the answer", trusted=False)


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
    what = f"arguments of {call.name}"
    return _against(cast("dict[str, Any]", arguments), schema, what, trusted=True)


def _against(found: Any, schema: dict[str, Any], what: str, *, trusted: bool) -> str | None:
    spent = _work.set([_MOST_WORK])
    try:
        errors = list(_validator(_encode(schema), trusted).iter_errors(found))
    except _TooMuchWork:
        return f"{what}: its schema makes too much work"
    except (Unresolvable, RecursionError):
        return f"{what}: its schema refers to what is not there, or to itself without end"
    except ArithmeticError:
        return f"{what}: a number is too large"
    except Exception as error:  # noqa: BLE001 - no schema may break its session
        return f"{what}: its schema cannot be checked: {_short(repr(error))}"
    finally:
        _work.reset(spent)
    if not errors:
        return None
    error = max(errors, key=relevance)
    where = error.json_path.removeprefix("$").removeprefix(".")
    return f"{what}{': ' + where if where else ''}: {_short(error.message)}"


@lru_cache(maxsize=256)
def _validator(schema: bytes, trusted: bool) -> _Validator:
    # Without a registry of its own it would fetch what a schema refers to from the network.
    parsed = _without_name(msgspec.json.decode(schema))
    validator = _TRUSTING if trusted else _BOUNDED
    return validator(parsed, registry=_NOTHING_ELSE)


# What a caller's schema may cost


class _TooMuchWork(Exception):  # noqa: N818 - it ends a check, and is no error of agentray's
    pass


_work: ContextVar[list[int]] = ContextVar("work")


def _spend(work: int) -> None:
    left = _work.get()
    left[0] -= work
    if left[0] < 0:
        raise _TooMuchWork


def _size(thing: Any) -> int:
    return len(cast("str", thing)) if isinstance(thing, str | list | dict) else 0


def _bounded(name: str, keyword: _Keyword) -> _Keyword:
    work = _WORK_OF_REFERENCE if name == "$ref" else 1

    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        _spend(work + (_size(value) + _size(instance)) // 16)
        for error in keyword(validator, value, instance, schema) or ():
            # It repeats what was found, and any branch may.
            _spend(len(error.message) // 64)
            yield error

    return check


def _unchecked(validator: Any, value: Any, instance: Any, schema: Any) -> None:
    """Nothing: a pattern can keep `re` busy for ever, and ``unevaluated…`` looks again and again
    at the same (and at patterns)."""


def _unique_items(
    validator: Any, value: Any, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    # The library compares each with each, where they cannot be sorted.
    if value and isinstance(instance, list):
        items = cast("list[Any]", instance)
        if len(set(map(_encode, items))) < len(items):
            yield ValidationError("it has non-unique elements")


_KEYWORDS = cast("dict[str, _Keyword]", Draft202012Validator.VALIDATORS)


def _additional(
    validator: Any, value: Any, instance: Any, schema: Any
) -> Iterable[ValidationError] | None:
    # Which properties are additional, the patterns say.
    if "patternProperties" in schema:
        return None
    return _KEYWORDS["additionalProperties"](validator, value, instance, schema)


_OWN: dict[str, _Keyword] = {
    "additionalProperties": _additional,
    "uniqueItems": _unique_items,
    "pattern": _unchecked,
    "patternProperties": _unchecked,
    "unevaluatedItems": _unchecked,
    "unevaluatedProperties": _unchecked,
}
_TRUSTING = cast("Callable[..., _Validator]", Draft202012Validator)
_BOUNDED = cast(
    "Callable[..., _Validator]",
    extend(
        Draft202012Validator,
        {name: _bounded(name, keyword) for name, keyword in {**_KEYWORDS, **_OWN}.items()},
    ),
)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
