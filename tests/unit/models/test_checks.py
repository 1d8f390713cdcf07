"""What is wrong with an answer, and that looking for it is harmless."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import pytest

from agentray.errors import InvalidRequestError
from agentray.events import ToolCall
from agentray.models.checks import (
    arguments_problem,
    check_schema,
    output_problem,
    schema_problem,
    tool_calls_problem,
)

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
DEEP = "[" * 100_000


@pytest.mark.parametrize("text", ['{"name":"Ada"}', ' {"name": "Ada", "age": 36}\n'])
def test_a_text_that_follows_the_schema_has_no_problem(text: str) -> None:
    assert output_problem(text, PERSON) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the answer is no JSON"),
        ("Here you are: {}", "the answer is no JSON"),
        ('{"name":"Ada"', "the answer is no JSON"),
        (DEEP, "the answer is no JSON"),
        ("[]", "the answer: [] is not of type 'object'"),
        ("{}", "the answer: 'name' is a required property"),
        ('{"name":7}', "the answer: name: 7 is not of type 'string'"),
        ('{"name":"Ada","age":-1}', "the answer: age: -1 is less than the minimum of 0"),
        ('{"name":"Ada","job":1}', "the answer: Additional properties are not allowed"),
    ],
)
def test_the_problem_says_where_and_what(text: str, said: str) -> None:
    problem = output_problem(text, PERSON)
    assert problem is not None
    assert problem.startswith(said)


def test_a_place_deep_inside_is_named() -> None:
    schema = {"properties": {"rows": {"items": {"properties": {"n": {"type": "integer"}}}}}}
    problem = output_problem('{"rows":[{"n":1},{"n":"x"}]}', schema)
    assert problem == "the answer: rows[1].n: 'x' is not of type 'integer'"


def test_what_a_model_said_is_not_repeated_at_length() -> None:
    problem = output_problem('{"name":' + str([1] * 10_000) + "}", PERSON)
    assert problem is not None
    assert len(problem) < 300


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("1" + "0" * 400, {"multipleOf": 0.1}),
        ('"x"', {"$ref": "#/$defs/none"}),
        ('"x"', {"$ref": "#"}),
        ('"x"', {"$ref": "http://127.0.0.1:9/schema.json"}),
    ],
)
def test_no_schema_breaks_its_check(
    text: str, schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a schema was fetched")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert output_problem(text, schema) is not None


FANS_OUT = {
    "$ref": "#/$defs/0",
    "$defs": {
        **{str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(15)},
        "15": {},
    },
}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/allOf/x", "allOf": [{}]},
        {"$ref": "#/required", "required": ["a"]},
        {"$ref": "#/type", "type": "string"},
        {"$ref": "#/const", "const": {"type": "bogus"}},
        {"$ref": "#/x-y", "x-y": {"type": "bogus"}},
        {"$ref": "#/x-y", "x-y": 5},
    ],
)
def test_a_schema_that_slipped_through_is_a_problem_and_no_error(schema: dict[str, Any]) -> None:
    assert output_problem('"x"', schema) is not None


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ('"x"', FANS_OUT),
        (
            '{"a":' * 15 + "1" + "}" * 15,
            {"allOf": [{"properties": {"a": {"$ref": "#"}}} for _ in range(2)]},
        ),
        ("[" + "1," * 50_000 + "1]", {"allOf": [{"type": "string"}] * 2_000}),
    ],
    ids=["by its references", "by what it looks at", "by what it says"],
)
def test_a_check_ends_when_it_makes_too_much_work(text: str, schema: dict[str, Any]) -> None:
    assert output_problem(text, schema) == "the answer: its schema makes too much work"


EVIL = "^(a+)+$"
A_LOT = "a" * 18 + "!"


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        (f'"{A_LOT}"', {"pattern": EVIL}),
        (f'{{"{A_LOT}":1}}', {"patternProperties": {EVIL: {}}, "additionalProperties": False}),
        (f'{{"{A_LOT}":1}}', {"patternProperties": {EVIL: {}}, "unevaluatedProperties": False}),
        (
            f'{{"b":"{A_LOT}"}}',
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "anyOf": [{"properties": {"b": {"$ref": "#"}}}],
                "pattern": EVIL,
            },
        ),
    ],
)
def test_patterns_of_callers_are_not_looked_at(text: str, schema: dict[str, Any]) -> None:
    assert schema_problem(schema) is None
    assert output_problem(text, schema) is None


def test_patterns_of_tools_are() -> None:
    schema = {"properties": {"name": {"pattern": "^A"}}}
    assert arguments_problem(call('{"name":"Ada"}'), schema) is None
    assert arguments_problem(call('{"name":"Eve"}'), schema) is not None


@pytest.mark.parametrize(
    ("text", "unique"), [('[{"a":1},{"a":2}]', True), ('[{"a":1},1,{"a":1}]', False), ("[1]", True)]
)
def test_items_are_unique_or_not(text: str, unique: bool) -> None:
    assert (output_problem(text, {"uniqueItems": True}) is None) is unique
    assert output_problem(text, {"uniqueItems": False}) is None


def test_a_long_answer_is_not_too_much_work() -> None:
    rows = [{"name": "x" * 50, "age": n} for n in range(2_000)]
    schema = {"type": "array", "items": {"$ref": "#/$defs/p"}, "$defs": {"p": PERSON}}
    assert output_problem(msgspec.json.encode(rows).decode(), schema) is None


# Schemas


@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        {},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
        {"properties": {"$ref": {"type": "string"}}},
        {"properties": {"a": {"items": {"$ref": "#"}}, "b": {"$ref": "#/properties/a/items"}}},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "http://h/s"},
        {"$id": "http://h/s", "$ref": "#/$defs/a", "$defs": {"a": True}},
        {"enum": [str(n) for n in range(1_000)]},
    ],
)
def test_a_schema_is_one(schema: dict[str, Any]) -> None:
    check_schema(schema, param="text.format.schema")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "thing"}, "no valid JSON schema"),
        ({"properties": []}, "no valid JSON schema"),
        ({"pattern": "("}, "no valid JSON schema"),
        ({"$ref": "http://169.254.169.254/x"}, "refers to http://169.254.169.254/x"),
        ({"allOf": [{"items": {"$ref": "file:///etc/passwd"}}]}, "refers to file"),
        ({"properties": {"a": {"$dynamicRef": "other#a"}}}, "refers to other#a"),
        ({"$dynamicRef": "#a"}, "refers to #a"),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}}, "refers to #a"),
        ({"$ref": "#/$defs/none"}, "refers to #/.defs/none, which is not there"),
        ({"$ref": "#/allOf/x", "allOf": [{}]}, "which is not there"),
        ({"$ref": "#/required", "required": ["a"]}, "which is no schema"),
        ({"$ref": "#/type", "type": "string"}, "which is no schema"),
        ({"$ref": "#/const", "const": {"type": "bogus"}}, "which is no schema"),
        ({"$ref": "#/x-y", "x-y": {"pattern": "("}}, "which is no schema"),
        ({"$ref": "#/x-y", "x-y": 5}, "which is no schema"),
        ({"pattern": "a{99999999999999999999}"}, "no valid JSON schema"),
        ({"type": [{"a": n} for n in range(300)]}, "a list of more than 256"),
        ({"const": "x" * 70_000}, "larger than 65536 bytes"),
        ({"items": {"$schema": "http://json-schema.org/draft-07/schema#"}}, "a .schema inside"),
        ({"items": {"$id": "http://h/s"}}, "a .id inside"),
    ],
)
def test_what_is_no_schema_or_refers_elsewhere_is_refused(
    schema: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        check_schema(schema, param="text.format.schema")
    assert caught.value.fields["param"] == "text.format.schema"


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(2_000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        check_schema(schema, param="p")


# Tool calls


def call(arguments: str, name: str = "person") -> ToolCall:
    return ToolCall("c", name, arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"name":"Ada"}', None),
        ("", "arguments of person: 'name' is a required property"),
        ("{name: Ada}", "the arguments of person are no JSON:"),
        (DEEP, "the arguments of person are no JSON:"),
        ('["Ada"]', "the arguments of person are no JSON object"),
        ("null", "the arguments of person are no JSON object"),
        ('{"name":"Ada","age":"x"}', "arguments of person: age: 'x' is not of type 'integer'"),
    ],
)
def test_arguments_fit_the_tools_schema_or_it_is_said_why_not(
    arguments: str, said: str | None
) -> None:
    problem = arguments_problem(call(arguments), PERSON)
    if said is None:
        assert problem is None
    else:
        assert problem is not None
        assert problem.startswith(said)


def test_no_arguments_are_an_empty_object() -> None:
    assert arguments_problem(call(""), {"type": "object"}) is None


def test_the_first_bad_call_is_named() -> None:
    def parameters(name: str) -> dict[str, Any] | None:
        return PERSON if name == "person" else None

    good, bad = call('{"name":"Ada"}'), call("{}")
    assert tool_calls_problem((good, good), parameters) is None
    assert tool_calls_problem((), parameters) is None
    assert tool_calls_problem((good, call("{}", "x" * 200), bad), parameters) == (
        f"there is no tool {'x' * 80!r}"
    )
    problem = tool_calls_problem((good, bad), parameters)
    assert problem is not None
    assert "required" in problem
