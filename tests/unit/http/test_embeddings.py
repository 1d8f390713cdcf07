"""Embeddings at the door, and which models are asked for what."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.unit.http.conftest import Models


@pytest.fixture
def models() -> Models:
    models = Models()
    models.names = ("tiny", "embedder", "embedder/other")
    return models


async def ask(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post("/v1/embeddings", json=body)


@pytest.mark.parametrize("given", ["a", ["a", "b"], [1, 2], [[1, 2], [3]]])
async def test_an_input_goes_to_the_model_as_it_is(
    http: httpx.AsyncClient, models: Models, given: Any
) -> None:
    body = {"input": given, "model": "embedder/other", "dimensions": 3, "unheard": {"of": 1}}
    answer = await ask(http, **body)
    assert (answer.status_code, answer.content) == (200, b'{"object":"list","data":[]}')
    assert models.asked == [("embedder/other", body)]


async def test_the_first_model_that_embeds_answers_who_names_none(
    http: httpx.AsyncClient, models: Models
) -> None:
    assert (await ask(http, input="a")).status_code == 200
    assert models.asked[0][0] == "embedder"


@pytest.mark.parametrize("given", ["", [], [""], [[]], ["a", 1], [1, [2]], [-1], None, {"a": 1}])
async def test_what_is_no_input_is_refused(http: httpx.AsyncClient, given: Any) -> None:
    answer = await ask(http, input=given, model="embedder")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("input")


@pytest.mark.parametrize(("name", "status"), [("tiny", 400), ("assistant", 400), ("nobody", 404)])
async def test_a_model_that_does_not_embed_is_refused(
    http: httpx.AsyncClient, name: str, status: int
) -> None:
    answer = await ask(http, input="a", model=name)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, "model")


async def test_without_a_model_that_embeds_none_is_found(
    http: httpx.AsyncClient, models: Models
) -> None:
    models.names = ("tiny",)
    assert (await ask(http, input="a")).status_code == 404


async def test_a_model_that_embeds_does_not_chat(http: httpx.AsyncClient) -> None:
    chat = {"model": "embedder", "messages": [{"role": "user", "content": "x"}]}
    assert (await http.post("/v1/chat/completions", json=chat)).status_code == 400
    response = {"model": "embedder", "input": "x"}
    assert (await http.post("/v1/responses", json=response)).status_code == 400
    await http.post("/v1/sessions", json={"id": "s"})
    turn = {"model": "embedder", "input": "x"}
    assert (await http.post("/v1/sessions/s/turns", json=turn)).status_code == 400


async def test_a_model_that_embeds_is_shown(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models/embedder")).json()["id"] == "embedder"
