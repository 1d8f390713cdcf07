"""Make tools of the operator's Python functions: ``@agentray.tool``."""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import sys
import typing
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

import msgspec
from pydantic import TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from agentray.errors import ConfigError
from agentray.tools.sandbox.base import FunctionCall, Limits
from agentray.tools.spec import OnCrash, ToolContext, ToolSpec

__all__ = ["FunctionTool", "load_functions", "size_of", "tool"]

P = ParamSpec("P")
R = TypeVar("R")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power
# Threads of numeric libraries count too.
_PIDS = 256
# Where a docstring stops to say what the function does.
_SECTION = re.compile(
    r"^\s*(args|arguments|parameters|returns?|yields?|raises|examples?|notes?):\s*$"
)
_ARGUMENT = re.compile(r"^(\s+)\*{0,2}([A-Za-z_]\w*)\s*(?:\([^)]*\))?:\s*(.*)$")
_FIELD = re.compile(r"^\s*:param\s+(?:[^:]*\s)?([A-Za-z_]\w*):\s*(.*)$")


class FunctionTool(Generic[P, R]):
    """A function that is a tool: it is called as before, and ``spec`` says what agents see."""

    spec: ToolSpec
    __name__: str
    __qualname__: str
    __wrapped__: Callable[P, R]

    def __init__(self, function: Callable[P, R], spec: ToolSpec, arguments: _Arguments) -> None:
        functools.update_wrapper(self, function)
        self.spec = spec
        self._function = function
        self._arguments = arguments

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*args, **kwargs)

    def call_json(self, **arguments: Any) -> Any:
        """Call with arguments as JSON has them, and return a result that JSON can have.

        Sandboxes call this. An async function is run to its end in a loop of its own.
        """
        found: Any = self._function(**self._arguments.python(arguments))  # pyright: ignore[reportCallIssue]
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
        try:
            return to_jsonable_python(found)
        except PydanticSerializationError as error:
            raise TypeError(f"the result is nothing that JSON can have: {error}") from error


@overload
def tool(function: Callable[P, R], /) -> FunctionTool[P, R]: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    cpu: float = 1.0,
    memory: int | str = "256MiB",
    timeout_s: float = 60.0,
    on_crash: OnCrash = "report",
    cache_s: float = 0.0,
    sandbox: Literal["process", "jail"] = "process",
    version: str = "1",
) -> Callable[[Callable[P, R]], FunctionTool[P, R]]: ...
def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    cpu: float = 1.0,
    memory: int | str = "256MiB",
    timeout_s: float = 60.0,
    on_crash: OnCrash = "report",
    cache_s: float = 0.0,
    sandbox: Literal["process", "jail"] = "process",
    version: str = "1",
) -> Any:
    """Make a tool of a function, plain or async, that its module has at the top.

    Its parameters need annotations: they are the JSON schema, with descriptions from the
    docstring's ``Args:`` or from ``Annotated[…, Field(description=…)]``. One that is annotated
    ``ToolContext`` is not shown to models, and gets the call's tenant, session and idempotency key.
    What it returns goes to the model, a str as it is, all else as JSON.

    Args:
        name: what models call it; the function's name if none.
        description: what it does, for models; the docstring's beginning if none.
        cpu: cores that a call is expected to use.
        memory: bytes that a call may use, or a text like ``"512MiB"``.
        timeout_s: time after which a call is killed.
        on_crash: ``retry`` if it may run twice with the same arguments and idempotency key.
        cache_s: time for which equal calls of a tenant share a result.
        sandbox: ``process`` for code that you trust, ``jail`` to contain it.
        version: results of another version are not shared.

    Raises:
        TypeError: the function cannot be a tool; the message says why.
        ValueError: an option is out of its range.
    """

    def decorated(function: Callable[P, R]) -> FunctionTool[P, R]:
        known = name or function.__name__
        if not _NAME.fullmatch(known):
            raise ValueError(f"tool {known!r}: a name has up to 64 letters, digits, _ and -")
        if cpu <= 0 or timeout_s <= 0 or cache_s < 0:
            raise ValueError(f"tool {known!r}: cpu and timeout_s are above 0, cache_s is not below")
        arguments = _Arguments(function, known)
        if cache_s and arguments.context:
            raise ValueError(
                f"tool {known!r}: results that depend on the session cannot be shared (cache_s)"
            )
        target = f"{function.__module__}:{function.__qualname__}.call_json"

        def program(values: dict[str, Any]) -> FunctionCall:
            return FunctionCall(target, msgspec.json.encode(values))

        spec = ToolSpec(
            name=known,
            description=description or arguments.description or known,
            parameters=arguments.schema,
            program=program,
            on_crash=on_crash,
            timeout_s=timeout_s,
            cache_s=cache_s,
            version=version,
            tier=sandbox,
            limits=Limits(
                wall_s=timeout_s,
                cpu_s=timeout_s * max(1.0, cpu),
                memory_bytes=size_of(memory),
                pids=_PIDS,
            ),
            cpu=cpu,
            operator=True,
            context_argument=arguments.context,
        )
        return FunctionTool(function, spec, arguments)

    return decorated if function is None else decorated(function)


def size_of(size: int | str) -> int:
    """Return bytes of a number or of a text like ``512MiB`` or ``1.5 GB``.

    Raises:
        ValueError: it is neither, or is not above 0.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        size = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if isinstance(size, bool) or size <= 0:
        raise ValueError("a size is a number of bytes above 0, or a text like '512MiB'")
    return size


def load_functions(entries: Sequence[str]) -> list[ToolSpec]:
    """Return the tools of ``package.module`` (all in it) and ``package.module:name``.

    Raises:
        ConfigError: an entry cannot be imported, or has no tools; the message names the key.
    """
    found: dict[int, FunctionTool[..., Any]] = {}
    for entry in entries:
        module, _, path = entry.partition(":")
        place: Any = _imported(module, entry)
        for part in path.split(".") if path else ():
            place = getattr(place, part, None)
        named = [place] if path else list(cast("dict[str, Any]", place.__dict__).values())
        tools = [cast("FunctionTool[..., Any]", it) for it in named if isinstance(it, FunctionTool)]
        if not tools:
            raise ConfigError(f"tools.functions: {entry!r} has no function with @agentray.tool")
        found.update({id(function): function for function in tools})
    for function in found.values():
        _check_place(function)
    return [function.spec for function in found.values()]


def _imported(module: str, entry: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(f"tools.functions: {entry!r} cannot be imported: {problem}") from error


def _check_place(function: FunctionTool[..., Any]) -> None:
    """See that a sandbox finds the same function."""
    module, path = function.__module__, function.__qualname__
    place: Any = sys.modules.get(module)
    for part in path.split("."):
        place = getattr(place, part, None)
    if place is not function or module == "__main__":
        problem = "is not at the top of a module under its own name, where a sandbox can import it"
        raise ConfigError(f"tools.functions: {module}:{path} {problem}")


async def _awaited(found: Awaitable[Any]) -> Any:
    return await found


class _Arguments:
    """The parameters of a function: as a JSON schema, and from JSON to what it takes."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.description, told = _docstring(inspect.getdoc(function) or "")
        self.context = ""
        self._adapters: dict[str, TypeAdapter[Any]] = {}
        required: list[str] = []
        defaults: dict[str, Any] = {}
        for parameter, annotation in _parameters(function, name):
            if annotation is ToolContext:
                self.context = parameter.name
                continue
            self._adapters[parameter.name] = _adapter(annotation, parameter.name, name)
            if parameter.default is inspect.Parameter.empty:
                required.append(parameter.name)
            elif (default := _plain(parameter.default)) is not None:
                defaults[parameter.name] = default
        self.schema = self._schema(name, required, defaults, told)

    def python(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return what the function takes; raises ``ValueError`` with what does not fit."""
        found = {
            name: self._adapters[name].validate_json(msgspec.json.encode(value))
            for name, value in arguments.items()
            if name != self.context
        }
        if self.context:
            found[self.context] = msgspec.convert(arguments[self.context], ToolContext)
        return found

    def _schema(
        self, name: str, required: list[str], defaults: dict[str, Any], told: dict[str, str]
    ) -> dict[str, Any]:
        mode: Literal["validation"] = "validation"
        try:
            schemas, shared = TypeAdapter.json_schemas(
                [(parameter, mode, adapter) for parameter, adapter in self._adapters.items()],
                ref_template="#/$defs/{model}",
            )
        except PydanticUserError as error:
            problem = f"a parameter has no JSON schema: {error.message}"
            raise TypeError(f"tool {name!r}: {problem}") from error
        properties: dict[str, Any] = {}
        for parameter in self._adapters:
            schema: dict[str, Any] = dict(schemas[parameter, mode])
            if parameter in told:
                schema.setdefault("description", told[parameter])
            if parameter in defaults:
                schema["default"] = defaults[parameter]
            properties[parameter] = schema
        whole: dict[str, Any] = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        return whole | ({"$defs": shared["$defs"]} if "$defs" in shared else {})


def _parameters(function: Callable[..., Any], name: str) -> list[tuple[inspect.Parameter, Any]]:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        problem = f"an annotation cannot be read: {error}"
        raise TypeError(f"tool {name!r}: {problem}") from error
    found: list[tuple[inspect.Parameter, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        shown = f"tool {name!r}: the parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{shown} takes any number; models need to know each")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{shown} is positional only; arguments come by name")
        if parameter.name not in hints:
            raise TypeError(f"{shown} needs an annotation: it is what models are told")
        found.append((parameter, hints[parameter.name]))
    return found


def _adapter(annotation: Any, parameter: str, name: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        problem = f"the parameter {parameter!r} has a type that JSON has nothing for"
        raise TypeError(f"tool {name!r}: {problem}: {annotation!r}") from error


def _plain(default: Any) -> Any:
    try:
        return to_jsonable_python(default)
    except PydanticSerializationError:
        return None


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of a function, and of each of its parameters."""
    said: list[str] = []
    told: dict[str, str] = {}
    section = last = ""
    depth = 0
    for line in text.splitlines():
        if (match := _SECTION.match(line.lower())) is not None:
            section, last, depth = match[1], "", 0
        elif (match := _FIELD.match(line)) is not None:
            section, last = "param", match[1]
            told[last] = match[2]
        elif section in ("args", "arguments", "parameters"):
            match = _ARGUMENT.match(line)
            if match is not None and len(match[1]) <= (depth or len(match[1])):
                depth, last = len(match[1]), match[2]
                told[last] = match[3]
            elif last and line.strip():
                told[last] = f"{told[last]} {line.strip()}".strip()
        elif not section and not line.lstrip().startswith(":"):
            said.append(line)
        elif section == "param" and last and line.startswith(" "):
            told[last] = f"{told[last]} {line.strip()}".strip()
    return "\n".join(said).strip(), {name: words for name, words in told.items() if words}
