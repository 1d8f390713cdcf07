"""The settings of tools: secrets by name, and the names that agents may say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agentray.config import load_settings
from agentray.errors import ConfigError

WEATHER = "{description: d, url: 'https://api.example.com/{city}'}"
KEYED = (
    "{description: d, url: 'https://a.example/${secret:A}', "
    "headers: {Authorization: 'Bearer ${secret:B}'}}"
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "agentray.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, env or {})
    return [line.replace(str(path), "FILE") for line in caught.value.message.splitlines()]


def test_a_secret_comes_from_the_file_or_the_environment(write: Callable[[str], Path]) -> None:
    path = write(f"tools: {{http: {{w: {KEYED}}}, secrets: {{A: '${{FROM}}'}}}}")
    env = {"FROM": "value-a", "AGENTRAY_SECRET_B": "value-b: {"}
    tools = load_settings(path, env).tools
    assert {name: value.get_secret_value() for name, value in tools.secrets.items()} == {
        "A": "value-a",
        "B": "value-b: {",
    }
    # It stands in the settings by its name alone.
    assert tools.http["w"].headers == {"Authorization": "Bearer ${secret:B}"}
    assert "value" not in repr(tools)


def test_a_secret_that_is_not_there_names_the_key_that_wants_it(
    write: Callable[[str], Path],
) -> None:
    in_url, in_header = problems(write(f"tools: {{http: {{w: {KEYED}}}}}"))
    assert in_url == (
        "FILE: tools.http.w.url: found the unknown secret 'A'; expected one in tools.secrets, or "
        "AGENTRAY_SECRET_A in the environment"
    )
    found = "FILE: tools.http.w.headers.Authorization: found the unknown secret 'B'"
    assert in_header.startswith(found)


def test_secrets_have_no_place_outside_of_tools(write: Callable[[str], Path]) -> None:
    path = write("models: {endpoints: {m: {url: 'https://a/v1', api_key: '${secret:A}'}}}")
    (problem,) = problems(path, {"AGENTRAY_SECRET_A": "value-a"})
    assert problem.startswith("FILE: models.endpoints.m.api_key: found ${secret:A}")


TOOLS = """
tools:
  http: {weather: %s}
  sql: {my.db: {url: 'postgresql://u@h/d'}}
  openapi: {shop: {document: a.yaml}, few: {document: b.yaml, operations: [get.item]}}
  mcp: {files: {command: serve}}
""" % (WEATHER)  # noqa: UP031 - it is full of braces


@pytest.mark.parametrize(
    "tool",
    [
        *("echo", "python", "shell", "weather", "sql_my_db"),
        *("shop.*", "shop__anything", "few.*", "few__get_item", "files.*", "files__read"),
    ],
)
def test_agents_may_name_what_the_configuration_knows(
    write: Callable[[str], Path], tool: str
) -> None:
    path = write(TOOLS + f"agents: {{a: {{tools: [{tool!r}]}}}}")
    assert load_settings(path, {}).agents["a"].tools == (tool,)


@pytest.mark.parametrize(
    "tool", ["weathr", "my.db", "sql_other", "few__other", "none.*", "none__x", "*", ".*", "shop"]
)
def test_other_names_are_refused_with_those_that_there_are(
    write: Callable[[str], Path], tool: str
) -> None:
    (problem,) = problems(write(TOOLS + f"agents: {{a: {{tools: [{tool!r}]}}}}"))
    assert problem.startswith(f"FILE: agents.a.tools: found the unknown tool {tool!r}; expected")
    assert "python, shell, sql_my_db, weather, few.*, files.*, shop.*" in problem


def test_the_names_of_functions_are_known_at_the_start_only(write: Callable[[str], Path]) -> None:
    path = write("tools: {functions: [my.module]}\nagents: {a: {tools: [price_of]}}")
    assert load_settings(path, {}).agents["a"].tools == ("price_of",)
    path = write("tools: {functions: [my.module]}\nagents: {a: {tools: [none__x]}}")
    assert "unknown tool 'none__x'" in problems(path)[0]


@pytest.mark.parametrize(
    ("tools", "key", "problem"),
    [
        (f"{{http: {{echo: {WEATHER}}}}}", "http.echo", "a built-in tool has this name"),
        (f"{{http: {{a b: {WEATHER}}}}}", "http.a b", "is a part of what models call it"),
        ("{openapi: {a__b: {document: x}}}", "openapi.a__b", "is a part of what models call it"),
        (
            "{openapi: {a: {document: x}}, mcp: {a: {command: x}}}",
            "mcp.a",
            "one in tools.openapi has this name",
        ),
    ],
)
def test_names_are_unique_and_fit_what_models_take(
    write: Callable[[str], Path], tools: str, key: str, problem: str
) -> None:
    (found,) = problems(write(f"tools: {tools}"))
    assert found.startswith(f"FILE: tools.{key}: {problem}")


def test_there_are_no_more_workers_at_least_than_at_most(write: Callable[[str], Path]) -> None:
    (found,) = problems(write("tools: {workers: {min: 5, max: 4}}"))
    assert found == "FILE: tools.workers.min: found 5; expected at most 4"
