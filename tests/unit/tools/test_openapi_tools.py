"""Which tools an OpenAPI document makes, and which of its operations cannot be tools."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from pydantic import SecretStr

from agentray.config.tool_settings import OpenApiSettings
from agentray.errors import ConfigError
from agentray.tools.openapi import openapi_tools
from agentray.tools.secrets import Secrets
from tests.unit.tools.schemas import arguments_problem

SECRETS = Secrets({"KEY": SecretStr("secret-key")})
PET = {
    "type": "object",
    "required": ["id", "name"],
    "properties": {
        "id": {"type": "integer", "readOnly": True},
        "name": {"type": "string", "nullable": True},
        "weight": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        "friends": {"type": "array", "items": {"$ref": "#/components/schemas/Pet"}},
    },
}
DOCUMENT: dict[str, Any] = {
    "openapi": "3.0.3",
    "info": {"title": "Pets", "version": "7"},
    "servers": [{"url": "https://{env}.pets.example/v1", "variables": {"env": {"default": "api"}}}],
    "paths": {
        "/pets/{pet-id}": {
            "parameters": [
                {"name": "pet-id", "in": "path", "required": True, "schema": {"type": "integer"}}
            ],
            "get": {
                "operationId": "getPet",
                "summary": "Get a pet.",
                "parameters": [
                    {"$ref": "#/components/parameters/Fields"},
                    {"name": "X-Trace", "in": "header", "schema": {"type": "string"}},
                    {"name": "Authorization", "in": "header", "schema": {"type": "string"}},
                    {"name": "api_key", "in": "query", "schema": {"type": "string"}},
                    {"name": "c", "in": "cookie", "schema": {"type": "string"}},
                ],
            },
        },
        "/pets": {
            "post": {
                "operationId": "addPet",
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/xml": {},
                        "application/json": {"schema": {"$ref": "#/components/schemas/Pet"}},
                    },
                },
            },
            "put": {
                "operationId": "upload",
                "requestBody": {"required": True, "content": {"image/png": {}}},
            },
        },
    },
    "components": {
        "schemas": {"Pet": PET},
        "parameters": {
            "Fields": {
                "name": "fields",
                "in": "query",
                "explode": False,
                "schema": {"type": "array", "items": {"type": "string"}},
            }
        },
    },
}


def tools(document: dict[str, Any] = DOCUMENT, **settings: Any) -> dict[str, Any]:
    made = openapi_tools(
        "pets",
        OpenApiSettings(document="pets.yaml", **settings),
        document,
        SECRETS,
        lambda: pytest.fail("nothing is sent"),
    )
    return {spec.name: (spec, template) for spec, template in made}


def test_operations_become_tools_and_unsupported_ones_are_left_out() -> None:
    assert set(tools()) == {"pets__getPet", "pets__addPet"}


@pytest.mark.parametrize("name", ["getPet", "addPet"])
def test_of_operations_that_are_named_no_other_becomes_a_tool(name: str) -> None:
    # Neither those before nor those behind it, which may write.
    assert set(tools(operations=(name,))) == {f"pets__{name}"}


def test_parameters_become_arguments_and_go_where_the_document_says() -> None:
    found = tools(query={"api_key": "${secret:KEY}"}, cache_s=5)
    spec, template = found["pets__getPet"]
    assert spec.description == "Get a pet."
    assert spec.parameters["required"] == ["pet_id"]
    assert set(spec.parameters["properties"]) == {"pet_id", "fields", "X_Trace"}
    arguments = {"pet_id": 3, "fields": ["a", "b c"], "X_Trace": "t"}
    assert arguments_problem(arguments, spec.parameters) is None
    request = template.request(arguments, SECRETS, "k")
    expected = "https://api.pets.example/v1/pets/3?fields=a%2Cb%20c&api_key=secret-key"
    assert (request.method, request.url) == ("GET", expected)
    assert ("X-Trace", "t") in request.headers
    assert (spec.on_crash, spec.cache_s, spec.version) == ("retry", 5, "7")


def test_a_body_is_one_argument_with_a_schema_that_stands_alone() -> None:
    spec, template = tools(cache_s=5)["pets__addPet"]
    pet = {"name": None, "weight": 0.5, "friends": [{"name": "Rex"}]}
    assert arguments_problem({"body": pet}, spec.parameters) is None
    for wrong in ({**pet, "weight": 0}, {**pet, "friends": [{}]}, {}):
        assert arguments_problem({"body": wrong}, spec.parameters), wrong
    request = template.request({"body": pet}, SECRETS, "k")
    assert request.body == b'{"name":null,"weight":0.5,"friends":[{"name":"Rex"}]}'
    assert ("Idempotency-Key", "k") in request.headers
    assert (spec.on_crash, spec.cache_s) == ("report", 0)


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    place: Any = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return document


GET = ["paths", "/pets/{pet-id}", "get", "parameters"]
PARAMETER = {"name": "q", "in": "query", "schema": {"type": "string"}}


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (GET, [{**PARAMETER, "in": "cookie", "required": True}], "'q' is in cookie"),
        (GET, [{**PARAMETER, "style": "deepObject"}], "the style deepObject"),
        (GET, [{**PARAMETER, "schema": {"type": "object"}}], "'q' is an object"),
        (GET, [{"name": "q", "in": "query", "content": {}}], "'q' has no schema"),
        (GET, [{"$ref": "other.yaml#/x"}], "which is another document"),
        (GET, [{"$ref": "#/components/nothing"}], "which is not there"),
        (["paths", "/pets/{pet-id}", "parameters"], [], "has a place that no parameter fills"),
        (["paths", "/pets/{pet-id}", "servers"], [{"url": "https://x"}], "servers of its own"),
    ],
)
def test_an_operation_that_is_named_and_not_supported_says_why(
    path: list[Any], value: Any, problem: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"tools\.openapi\.pets\.operations: getPet: .*{problem}"
    ):
        tools(changed(path, value), operations=("getPet",))


def test_an_operation_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="the document has no getDog"):
        tools(operations=("getPet", "getDog"))


def test_a_document_cannot_ask_for_secrets() -> None:
    # Whoever writes the document would get them at his own host.
    paths = {"/x/${secret:KEY}": {"get": {"operationId": "steal"}}}
    with pytest.raises(ConfigError, match="has a place that no parameter fills"):
        tools(changed(["paths"], paths), operations=("steal",))
    parameter = {"name": "${secret:KEY}", "in": "query", "schema": {"type": "string"}}
    paths = {"/x": {"get": {"operationId": "steal", "parameters": [parameter]}}}
    spec, template = tools(changed(["paths"], paths))["pets__steal"]
    (argument,) = spec.parameters["properties"]
    assert "secret-key" not in template.request({argument: "v"}, SECRETS, "k").url


def test_a_document_without_an_address_needs_one() -> None:
    document = changed(["servers"], [{"url": "/v1"}])
    with pytest.raises(ConfigError, match=r"tools\.openapi\.pets\.base_url"):
        tools(document)
    spec, template = tools(document, base_url="http://localhost:1/api/")["pets__getPet"]
    assert template.request({"pet_id": 1}, SECRETS, "k").url == "http://localhost:1/api/pets/1"
    assert spec.name == "pets__getPet"
