"""What a decorated function is to models, to sandboxes and to its own module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

import agentray
from agentray.errors import ConfigError
from agentray.tools.functions import FunctionTool, load_functions, size_of
from agentray.tools.sandbox.base import FunctionCall
from agentray.tools.sandbox.program import _find as found_by_the_sandbox
from agentray.tools.spec import ToolContext
from tests.unit.tools.schemas import arguments_problem

MODULE = "operator_functions"
CONTEXT = {"tenant": "acme", "session_id": "s", "idempotency_key": "k"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def specs() -> dict[str, Any]:
    return {spec.name: spec for spec in load_functions([MODULE])}


def run_as_a_sandbox(name: str, **arguments: Any) -> Any:
    program = specs()[name].program(arguments)
    assert isinstance(program, FunctionCall)
    function = found_by_the_sandbox(program.target)
    return json.loads(json.dumps(function(**json.loads(program.arguments))))


def test_type_hints_and_docstring_become_the_schema() -> None:
    spec = specs()["forecast"]
    assert spec.description == "Forecast the weather.\n\nIt is always good."
    properties = spec.parameters["properties"]
    assert spec.parameters["required"] == ["place", "unit"]
    assert properties["place"]["description"] == "where it is asked for."
    assert properties["days"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 7,
        "description": "How many days.",
        "default": 1,
    }
    fits = {"place": {"city": "Bern"}, "unit": "C", "detail": None}
    assert arguments_problem(fits, spec.parameters) is None
    for wrong in ({"unit": "K"}, {"days": 8}, {"detail": "none"}, {"place": {}}, {"more": 1}):
        assert arguments_problem({**fits, **wrong}, spec.parameters), wrong


def test_options_become_limits() -> None:
    spec = specs()["forecast"]
    assert (spec.tier, spec.on_crash, spec.cache_s, spec.version) == ("process", "retry", 60, "2")
    assert (spec.cpu, spec.timeout_s, spec.limits.wall_s, spec.limits.cpu_s) == (2, 5, 5, 10)
    assert spec.limits.memory_bytes == 512 * 1024**2
    assert specs()["shout"].tier == "jail"


def test_a_sandbox_gives_types_and_gets_json_back() -> None:
    found = run_as_a_sandbox("forecast", place={"city": "Bern"}, unit="C", days=2)
    assert found == {"place": {"city": "Bern", "country": "CH"}, "degrees": 41.0}


def test_an_async_function_runs_to_its_end_and_gets_its_context() -> None:
    spec = specs()["shout"]
    assert "context" not in spec.parameters["properties"]
    assert spec.context_argument == "context"
    assert run_as_a_sandbox("shout", text="hey", context=CONTEXT) == "HEY acme"


def test_a_result_that_json_cannot_have_is_an_error_that_says_so() -> None:
    with pytest.raises(TypeError, match="nothing that JSON can have"):
        run_as_a_sandbox("unjsonable", value=1)


def test_a_decorated_function_is_called_as_before() -> None:
    @agentray.tool
    def add(a: int, b: int = 1) -> int:
        """Add."""
        return a + b

    assert add(1) == 2
    assert add(a=1, b=3) == 4
    assert (add.__name__, add.__doc__) == ("add", "Add.")
    assert get_type_hints(add.__wrapped__)["a"] is int


def any_number(*values: int) -> None: ...
def any_name(**values: int) -> None: ...
def by_place(value: int, /) -> None: ...
def untold(value) -> None: ...  # type: ignore[no-untyped-def]
def without_schema(value: type[FunctionTool[..., Any]]) -> None: ...


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (any_number, "'values' takes any number"),
        (any_name, "'values' takes any number"),
        (by_place, "'value' is positional only"),
        (untold, "'value' needs an annotation"),
        (without_schema, "has a type that JSON has nothing for"),
    ],
)
def test_what_models_cannot_call_is_refused_where_it_is_decorated(
    function: Any, problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        agentray.tool(function)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("no.such.module", "cannot be imported: ModuleNotFoundError"),
        (f"{MODULE}:no_tool", "has no function with @agentray.tool"),
        (f"{MODULE}:missing", "has no function with @agentray.tool"),
        ("json", "has no function with @agentray.tool"),
    ],
)
def test_an_entry_without_tools_is_named(entry: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"tools\.functions: '{entry}' {problem}"):
        load_functions([entry])


def test_a_function_that_no_sandbox_could_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hidden_tool.py").write_text(
        "import agentray\n"
        "def make():\n"
        "    @agentray.tool\n"
        "    def inner(a: int) -> int:\n"
        "        return a\n"
        "    return inner\n"
        "found = make()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="is not at the top of a module"):
        load_functions(["hidden_tool"])


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1024, 1024), ("512MiB", 512 * 1024**2), ("1.5 GB", 1_500_000_000), ("10", 10), ("1kb", 1000)],
)
def test_a_size_is_bytes_or_a_text(size: int | str, expected: int) -> None:
    assert size_of(size) == expected


@pytest.mark.parametrize("size", [0, -1, True, "", "MiB", "1 parsec", "-1MiB"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="number of bytes above 0"):
        size_of(size)


def test_the_arguments_in_a_program_are_json() -> None:
    program = specs()["unjsonable"].program({"value": 1})
    assert msgspec.json.decode(program.arguments) == {"value": 1}


def test_results_that_depend_on_the_session_are_not_shared() -> None:
    def of_the_user(context: ToolContext) -> str:
        return context.session_id

    with pytest.raises(ValueError, match="cannot be shared"):
        agentray.tool(cache_s=60)(of_the_user)
