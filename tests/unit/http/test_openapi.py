from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from agentray.http.routes import REFUSALS, ROUTES

SERVED = [(route.method, route.path) for route in ROUTES]


@pytest.fixture
async def document(http: httpx.AsyncClient) -> dict[str, Any]:
    return (await http.get("/openapi.json")).json()


async def test_what_is_served_is_described_and_nothing_else(document: dict[str, Any]) -> None:
    described = [
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    ]
    assert sorted(described) == sorted(SERVED)


@pytest.mark.parametrize(("method", "path"), SERVED)
async def test_what_is_described_is_served(http: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await http.request(method, re.sub(r"\{\w+\}", "x", path), content=b"?")
    code = answer.json()["error"]["code"] if answer.status_code >= 400 else None
    assert code not in ("not_found", "method_not_allowed", "internal_error")


async def test_what_openai_has_and_agentray_has_not_says_why(http: httpx.AsyncClient) -> None:
    for (method, path), why in REFUSALS.items():
        answer = await http.request(method, re.sub(r"\{\w+\}", "x", path))
        assert answer.status_code == 405
        assert why in answer.json()["error"]["message"]


async def test_every_reference_and_schema_is_sound(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    references = re.findall(r"'\$ref': '#/components/schemas/([^']+)'", str(document))
    assert references
    assert set(references) <= set(schemas)


async def test_every_body_query_and_path_is_typed(document: dict[str, Any]) -> None:
    ids = []
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        ids.append(operation["operationId"])
        named = {(p["in"], p["name"]) for p in operation.get("parameters", [])}
        assert {("path", name) for name in re.findall(r"\{(\w+)\}", route.path)} <= named
        if route.query is not None:
            fields = route.query.__struct_fields__
            assert {("query", name) for name in fields} <= named
        assert ("requestBody" in operation) == (route.body is not None)
    assert len(set(ids)) == len(ids)


async def test_an_answer_fits_its_description(
    http: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    def check(path: str, method: str, status: str, body: Any) -> None:
        answer = document["paths"][path][method]["responses"][status]
        schema = answer["content"]["application/json"]["schema"]
        components = {"components": document["components"]}
        Draft202012Validator({**schema, **components}).validate(body)

    made = await http.post("/v1/sessions", json={"id": "s"})
    check("/v1/sessions", "post", "201", made.json())
    turn = await http.post("/v1/sessions/s/turns", json={"input": "hi"})
    check("/v1/sessions/{session_id}/turns", "post", "200", turn.json())
    events = await http.get("/v1/sessions/s/events")
    check("/v1/sessions/{session_id}/events", "get", "200", events.json())
    response = await http.post("/v1/responses", json={"input": "hi"})
    check("/v1/responses", "post", "200", response.json())
    items = await http.get("/v1/conversations/s/items")
    check("/v1/conversations/{conversation_id}/items", "get", "200", items.json())
    missing = await http.get("/v1/sessions/nobody")
    check("/v1/sessions/{session_id}", "get", "404", missing.json())
