from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, cast

import httpx
import pytest

from agentray.errors import BackpressureError, StorageUnavailableError
from agentray.ids import new_turn_id, response_id
from tests.unit.http.conftest import DEADLINE_S, Client, Models
from tests.unit.http.memory import MemorySessions

NO_RESPONSE = response_id("nobody", new_turn_id())


def error_of(answer: httpx.Response) -> dict[str, Any]:
    (error,) = answer.json().values()
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("POST", "/v1/responses", b"{", 400, "invalid_request", None),
        ("POST", "/v1/responses", b'{"input": "\xff"}', 400, "invalid_request", None),
        ("POST", "/v1/responses", b'{"input": "\\ud800"}', 400, "invalid_request", None),
        (
            "POST",
            "/v1/responses",
            b'{"metadata":' + b"[" * 1500,
            400,
            "invalid_request",
            "metadata",
        ),
        ("POST", "/v1/responses", b'{"tomorrow":' + b"[" * 1900, 400, "invalid_request", None),
        ("POST", "/v1/responses", b"[]", 400, "invalid_request", None),
        ("POST", "/v1/responses", b"", 400, "invalid_request", "input"),
        ("POST", "/v1/responses", b'{"input": ""}', 400, "invalid_request", "input"),
        ("POST", "/v1/responses", b'{"input": []}', 400, "invalid_request", "input"),
        (
            "POST",
            "/v1/responses",
            b'{"input": "x", "model": "no"}',
            404,
            "model_not_found",
            "model",
        ),
        (
            "POST",
            "/v1/responses",
            b'{"input": "x", "temperature": "hot"}',
            400,
            "invalid_request",
            "temperature",
        ),
        (
            "POST",
            "/v1/responses",
            b'{"input": "x", "metadata": {"a": 1}}',
            400,
            "invalid_request",
            "metadata[...]",
        ),
        (
            "POST",
            "/v1/responses",
            b'{"input": "x", "conversation": "a b"}',
            400,
            "invalid_request",
            "conversation",
        ),
        (
            "POST",
            "/v1/responses",
            b'{"input": "x", "conversation": {"id": "nobody"}}',
            404,
            "session_not_found",
            None,
        ),
        (
            "POST",
            "/v1/responses",
            b'{"input": "x", "previous_response_id": "resp_1"}',
            400,
            "invalid_request",
            "previous_response_id",
        ),
        (
            "POST",
            "/v1/responses",
            b'{"input":"x","conversation":"a","previous_response_id":"b"}',
            400,
            "invalid_request",
            "previous_response_id",
        ),
        ("GET", "/v1/responses/resp_1", b"", 400, "invalid_request", "response_id"),
        ("GET", f"/v1/responses/{NO_RESPONSE}", b"", 404, "session_not_found", None),
        ("DELETE", f"/v1/responses/{NO_RESPONSE}", b"", 405, "method_not_allowed", None),
        ("POST", f"/v1/responses/{NO_RESPONSE}/cancel", b"", 404, "session_not_found", None),
        ("GET", "/v1/sessions/" + "x" * 10_000, b"", 400, "invalid_request", "session_id"),
        ("GET", "/v1/sessions/%00%F0%9F%98%80", b"", 400, "invalid_request", "session_id"),
        ("GET", "/v1/sessions/a%2Fb", b"", 400, "invalid_request", "session_id"),
        ("GET", "/v1/sessions/nobody", b"", 404, "session_not_found", None),
        ("GET", "/v1/sessions?limit=0", b"", 400, "invalid_request", "limit"),
        ("GET", "/v1/sessions?status=odd", b"", 400, "invalid_request", "status"),
        ("GET", "/v1/sessions?colour=red", b"", 400, "invalid_request", "colour"),
        ("GET", "/v1/sessions?user=%00", b"", 400, "invalid_request", "user"),
        ("POST", "/v1/sessions", b'{"agnet": "x"}', 400, "invalid_request", "agnet"),
        ("POST", "/v1/sessions", b'{"ttl_s": 0}', 400, "invalid_request", "ttl_s"),
        ("POST", "/v1/sessions/s/turns", b'{"input": 5}', 400, "invalid_request", "input"),
        ("POST", "/v1/sessions/nobody/turns", b'{"input":"x"}', 404, "session_not_found", None),
        (
            "POST",
            "/v1/sessions/s/turns",
            b'{"input": "x", "model": "assistant"}',
            404,
            "model_not_found",
            "model",
        ),
        (
            "POST",
            "/v1/sessions/s/turns",
            b'{"input": "x", "if_busy": "wait"}',
            400,
            "invalid_request",
            "if_busy",
        ),
        ("GET", "/v1/sessions/s/turns/odd%00", b"", 404, "turn_not_found", None),
        ("POST", "/v1/sessions/s/cancel", b"", 400, "invalid_request", "turn_id"),
        ("POST", "/v1/sessions/nobody/cancel", b"{}", 404, "session_not_found", None),
        ("GET", "/v1/sessions/s/events?after=later", b"", 400, "invalid_request", "after"),
        ("GET", "/v1/conversations/s/items/odd", b"", 404, "item_not_found", "item_id"),
        ("POST", "/v1/conversations/s/items", b"{}", 405, "method_not_allowed", None),
        ("GET", "/v1/models/none", b"", 404, "model_not_found", "model"),
        ("POST", "/v1/chat/completions", b'{"model":"tiny"}', 400, "invalid_request", "messages"),
        ("GET", "/v1/nothing", b"", 404, "not_found", None),
        ("GET", "/v1/responses/", b"", 404, "not_found", None),
        ("GET", "/", b"", 404, "not_found", None),
        ("PUT", "/v1/sessions", b"", 405, "method_not_allowed", None),
    ],
)
async def test_bad_input_is_a_clear_error_in_openais_shape(
    http: httpx.AsyncClient,
    sessions: MemorySessions,
    method: str,
    path: str,
    body: bytes,
    status: int,
    code: str,
    param: str | None,
) -> None:
    await sessions.create("default", session_id="s")
    answer = await http.request(method, path, content=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert not sessions.turns


@pytest.mark.parametrize(
    "field",
    [
        {"store": False},
        {"tools": [{"type": "function", "name": "f"}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "name": "f"}},
        {"text": {"format": {"type": "grammar", "grammar": "x"}}},
        {"text": {"verbosity": "low"}},
        {"truncation": "auto"},
        {"parallel_tool_calls": False},
        {"reasoning": {"effort": "low"}},
        {"prompt": {"id": "p"}},
        {"include": ["message.output_text.logprobs"]},
        {"top_logprobs": 3},
        {"max_tool_calls": 1},
        {"service_tier": "flex"},
        {"background_options": {"completion_window": "8h"}},
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
    ],
)
async def test_a_parameter_that_would_not_be_honoured_is_refused(
    http: httpx.AsyncClient, field: dict[str, Any]
) -> None:
    answer = await http.post("/v1/responses", json={"input": "x", **field})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"].startswith(next(iter(field)))


WORD = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}


@pytest.mark.parametrize(
    ("form", "schema", "facts"),
    [
        ({"type": "json_object"}, {"type": "object"}, {}),
        (
            {"type": "json_schema", "name": "word", "schema": WORD, "strict": False},
            WORD,
            {"name": "word", "strict": False},
        ),
        (
            {"type": "json_schema", "name": "word", "schema": WORD, "description": "One."},
            WORD,
            {"name": "word", "description": "One."},
        ),
        ({"type": "text"}, None, {}),
    ],
)
async def test_the_form_of_an_answer_is_the_turns_and_is_shown_again(
    http: httpx.AsyncClient,
    sessions: MemorySessions,
    form: dict[str, Any],
    schema: dict[str, Any] | None,
    facts: dict[str, Any],
) -> None:
    answer = await http.post("/v1/responses", json={"input": "x", "text": {"format": form}})
    assert answer.status_code == 200
    shown = answer.json()["text"]["format"]
    assert {name: fact for name, fact in shown.items() if fact is not None} == form
    (turn,) = sessions.turns.values()
    assert (turn.options.output_schema, turn.options.output_form) == (schema, facts)
    again = await http.get(f"/v1/responses/{answer.json()['id']}")
    assert again.json()["text"]["format"] == shown


async def test_a_native_turn_takes_a_schema(
    http: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    session = (await http.post("/v1/sessions", json={})).json()["id"]
    turns = f"/v1/sessions/{session}/turns"
    answer = await http.post(turns, json={"input": "x", "output_schema": WORD})
    assert answer.status_code == 200
    (turn,) = sessions.turns.values()
    assert turn.options.output_schema == WORD
    refused = await http.post(turns, json={"input": "x", "output_schema": {"type": "words"}})
    error = error_of(refused)
    assert (refused.status_code, error["code"]) == (400, "invalid_request")
    assert error["param"] == "output_schema"
    assert len(sessions.turns) == 1


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"schema": {"type": "words"}}, "text.format.schema"),
        ({"schema": {"$ref": "http://127.0.0.1:9/schema"}}, "text.format.schema"),
        ({"schema": {"properties": {"a": {"$ref": "file:///etc/passwd"}}}}, "text.format.schema"),
        ({"schema": {"pattern": "("}}, "text.format.schema"),
        ({"schema": [1]}, "text.format.schema"),
        ({"name": "not a name"}, "text.format.name"),
        ({"strict": "yes"}, "text.format.strict"),
    ],
)
async def test_a_form_that_is_none_is_refused_by_its_part(
    http: httpx.AsyncClient, sessions: MemorySessions, form: dict[str, Any], param: str
) -> None:
    whole = {"type": "json_schema", "name": "word", "schema": WORD, **form}
    answer = await http.post("/v1/responses", json={"input": "x", "text": {"format": whole}})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert not sessions.turns


async def test_a_parameter_that_changes_nothing_is_accepted(http: httpx.AsyncClient) -> None:
    harmless: dict[str, Any] = {
        "store": True,
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "reasoning": None,
        "include": ["reasoning.encrypted_content"],
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "u",
        "stream_options": {"include_obfuscation": False},
        "top_logprobs": 0,
        "a_parameter_of_tomorrow": 1,
    }
    answer = await http.post("/v1/responses", json={"input": "x", **harmless})
    assert (answer.status_code, answer.json()["status"]) == (200, "completed")


async def test_a_body_over_the_limit_is_refused_although_it_never_comes(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentray.http.exchange._DISCARD_S", 0.02)
    client.left.clear()
    await client.open("POST", "/v1/sessions", headers={"content-length": "2001"})
    assert client.status == 413
    assert (b"connection", b"close") in client.sent[0]["headers"]
    assert json.loads(client.text)["error"]["code"] == "body_too_large"


async def test_a_body_over_the_limit_is_read_to_its_end_before_it_is_refused(
    http: httpx.AsyncClient,
) -> None:
    given = 0

    async def body() -> Any:
        nonlocal given
        for _ in range(5):
            given += 1_000
            yield b" " * 1_000

    for headers in ({}, {"content-length": "5000"}):
        answer = await http.post("/v1/sessions", content=cast("Any", body()), headers=headers)
        assert answer.status_code == 413
    # Closed in the middle, the connection could lose the answer, or the request behind it.
    assert given == 10_000


async def test_a_body_without_an_end_is_read_up_to_some_times_the_limit(
    http: httpx.AsyncClient,
) -> None:
    given = 0

    async def endless() -> Any:
        nonlocal given
        while True:
            given += 1_000
            yield b" " * 1_000

    answer = await http.post("/v1/sessions", content=cast("Any", endless()))
    assert answer.status_code == 413
    assert given <= 12_000


async def test_an_unexpected_exception_is_a_500_with_a_name_that_the_log_has(
    http: httpx.AsyncClient, sessions: MemorySessions, caplog: pytest.LogCaptureFixture
) -> None:
    sessions.failure = ZeroDivisionError("a secret")
    with caplog.at_level(logging.ERROR):
        answer = await http.get("/v1/sessions/s")
    error = error_of(answer)
    assert (answer.status_code, error["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    (record,) = caplog.records
    assert record.fields["failure"] == error["details"]["failure"]  # type: ignore[attr-defined]
    assert record.exc_info is not None


@pytest.mark.parametrize(
    ("failure", "status", "wait"),
    [
        (BackpressureError("full", retry_after_s=2.5), 429, "3"),
        (StorageUnavailableError("away"), 503, "1"),
    ],
)
async def test_an_overload_says_when_to_come_back(
    http: httpx.AsyncClient,
    sessions: MemorySessions,
    failure: Exception,
    status: int,
    wait: str,
) -> None:
    sessions.failure = failure
    answer = await http.get("/v1/sessions/s")
    assert (answer.status_code, answer.headers["retry-after"]) == (status, wait)


async def test_a_refusal_of_a_busy_session_tells_clients_not_to_try_again(
    http: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    await sessions.create("default", session_id="s")
    sessions.hold = True
    turns = "/v1/sessions/s/turns"
    await http.post(turns, json={"input": "x", "background": True})
    answer = await http.post(turns, json={"input": "y", "background": True, "if_busy": "reject"})
    assert (answer.status_code, error_of(answer)["code"]) == (409, "session_busy")
    assert answer.headers["x-should-retry"] == "false"


async def test_a_method_that_is_not_served_names_those_that_are(http: httpx.AsyncClient) -> None:
    answer = await http.put("/v1/sessions/s")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")


async def test_a_session_is_made_once(http: httpx.AsyncClient) -> None:
    first = await http.post("/v1/sessions", json={"id": "alice", "user": "u"})
    again = await http.post("/v1/sessions", json={"id": "alice"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()


async def test_what_the_proxy_chose_for_a_new_session_is_its_id(
    http: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    header = {"x-agentray-new-session": "sess_chosen"}
    await http.post("/v1/sessions", json={}, headers=header)
    assert list(sessions.sessions) == ["sess_chosen"]
    sessions.sessions.clear()
    answer = await http.post("/v1/responses", json={"input": "x"}, headers=header)
    assert answer.json()["id"].endswith("_sess_chosen")


async def test_a_cancel_of_nothing_is_an_error_and_of_something_names_it(
    http: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    await sessions.create("default", session_id="s")
    sessions.hold = True
    turn = await http.post("/v1/sessions/s/turns", json={"input": "x", "background": True})
    assert turn.status_code == 202
    answer = await http.post("/v1/sessions/s/cancel")
    assert answer.json() == {"cancelled": [turn.json()["id"]]}


async def test_a_completion_is_given_the_agents_instructions_and_model(
    http: httpx.AsyncClient, models: Models
) -> None:
    body = {"model": "assistant", "messages": [{"role": "user", "content": "x"}], "seed": 7}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.json()["object"] == "chat.completion"
    ((model, asked),) = models.asked
    assert model == "tiny"
    assert asked["temperature"] == 0.5
    assert asked["seed"] == 7
    roles = [message["role"] for message in asked["messages"]]
    assert roles == ["system", "user"]


async def test_a_completion_of_a_plain_model_is_passed_on_as_it_is(
    http: httpx.AsyncClient, models: Models
) -> None:
    body = {"model": "org/large", "messages": [{"role": "user", "content": "x"}]}
    await http.post("/v1/chat/completions", json=body)
    ((model, asked),) = models.asked
    assert model == "org/large"
    assert asked == body


async def test_a_host_serves_only_so_many_completions_at_once(
    http: httpx.AsyncClient, models: Models
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    models.ready.clear()
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        running = [group.create_task(http.post("/v1/chat/completions", json=body)) for _ in "ab"]
        for _ in running:
            await models.called.acquire()
        refused = await http.post("/v1/chat/completions", json=body)
        models.ready.set()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert error_of(refused)["code"] == "overloaded"
    assert [task.result().status_code for task in running] == [200, 200]
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert len(models.asked) == 3


async def test_a_completion_that_fails_makes_room_for_the_next(
    http: httpx.AsyncClient, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    with monkeypatch.context() as broken:
        broken.setattr(models, "asked", None)
        for _ in range(3):
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 500
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize("of_turn", [False, True])
async def test_a_page_behind_the_end_of_the_journal_is_refused(
    http: httpx.AsyncClient, sessions: MemorySessions, of_turn: bool
) -> None:
    await sessions.create("default", session_id="s")
    turn = (await http.post("/v1/sessions/s/turns", json={"input": "x"})).json()
    query = {"turn_id": turn["id"]} if of_turn else {}
    events = "/v1/sessions/s/events"
    at_the_end = await http.get(events, params={"after": turn["last_seq"], **query})
    assert (at_the_end.status_code, at_the_end.json()["data"]) == (200, [])
    answer = await http.get(events, params={"after": 999_999, **query})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_cursor", "after")


async def test_agents_and_models_are_listed_and_shown_by_name(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["assistant", "critic", "tiny", "org/large"]
    shown = await http.get("/v1/models/org%2Flarge")
    assert shown.json() == listed[-1]


async def test_an_agent_that_is_not_the_sessions_is_refused(
    http: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    await sessions.create("default", session_id="s", agent="critic")
    body = {"input": "x", "conversation": "s", "model": "assistant"}
    assert error_of(await http.post("/v1/responses", json=body))["param"] == "model"
    answer = await http.post("/v1/responses", json=body | {"model": "critic"})
    assert (answer.status_code, answer.json()["model"]) == (200, "critic")


async def test_metrics_and_health_are_answered(http: httpx.AsyncClient) -> None:
    assert (await http.get("/metrics")).text == "up 1\n"
    assert (await http.get("/healthz")).json() == {"status": "ok"}
    assert (await http.get("/readyz")).json()["ready"] is True
