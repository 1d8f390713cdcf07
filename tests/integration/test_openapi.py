"""Whatever fits /openapi.json, and much that does not, sent to a whole system: nothing breaks it.

schemathesis makes the requests. Most would be about sessions that do not exist: every other one
is led to something that does.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from agentray.http.openapi import describe
from agentray.http.routes import ROUTES
from tests.followed_turn import echo, script
from tests.integration.wire import Session, eventually
from tests.system import System

ENDLESS = script("never read to its end", tokens=10_000, tps=10)
LINE = (
    b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body":'
    b' {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}}'
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

schema = schemathesis.openapi.from_dict(describe(ROUTES))


class Seeds:
    """Things that exist, for requests to be about."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.session = Session.make(http)
        write = {"name": "python", "arguments": {"code": "open('kept', 'w').write('x')"}}
        said = script("{tool_results}", tools=[echo("a"), write])
        self.turn_id = self.session.turn(said)["id"]
        self.conversation = http.post("/v1/conversations", json={}).json()["id"]
        body = {"input": "hi", "conversation": self.conversation}
        self.response = http.post("/v1/responses", json=body).json()
        self.item = self.response["output"][0]["id"]
        self.file = self.upload()
        self.batch = self.order()

    def upload(self) -> str:
        form = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", LINE)}}
        return self.http.post("/v1/files", **form).json()["id"]

    def order(self) -> str:
        return self.http.post("/v1/batches", json=self.batch_body()).json()["id"]

    def batch_body(self) -> dict[str, Any]:
        chat = "/v1/chat/completions"
        return {"input_file_id": self.file, "endpoint": chat, "completion_window": "24h"}

    def values(self, operation: str) -> dict[str, str]:
        """Return values for the parameters in an operation's path."""
        if operation in ("delete_session", "delete_conversation"):
            fresh = Session.make(self.http).id
            return {"session_id": fresh, "conversation_id": fresh}
        session = self.session
        response = self.response["id"]
        if operation == "cancel_turns":
            session = Session.make(self.http)
            session.begin(ENDLESS)
        if operation == "cancel_response":
            body = {"input": ENDLESS, "background": True}
            response = self.http.post("/v1/responses", json=body).json()["id"]
        return {
            "session_id": session.id,
            "turn_id": self.turn_id,
            "response_id": response,
            "conversation_id": self.conversation,
            "item_id": self.item,
            "model": "assistant",
            "file_id": self.upload() if operation == "delete_file" else self.file,
            "batch_id": self.order() if operation == "cancel_batch" else self.batch,
        }

    def body(self, operation: str, body: Any) -> Any:
        """Return a body that is about something that exists, like ``body`` for the rest."""
        rest = dict(body) if isinstance(body, dict) else {}
        if operation == "create_response":
            rest.pop("previous_response_id", None)
            return {**rest, "model": "assistant", "conversation": self.conversation}
        if operation == "create_turn":
            return {**rest, "model": "simulator", "idempotency_key": uuid.uuid4().hex}
        if operation == "create_chat_completion":
            return {**rest, "model": "assistant"}
        if operation == "create_embeddings":
            return {**rest, "model": "embedder"}
        if operation == "create_file":
            return {"purpose": "batch", "file": rest.get("file", LINE)}
        if operation == "create_batch":
            return {**rest, **self.batch_body()}
        if operation == "create_conversation":
            return {**rest, "agent": "assistant"}
        if operation == "create_session":
            return {**rest, "agent": "assistant", "id": f"t-{uuid.uuid4().hex}"}
        if operation == "cancel_turns":
            return {}
        return body


@pytest.fixture(scope="module")
def seeds(http: httpx.Client) -> Iterator[Seeds]:
    yield Seeds(http)

    def running() -> list[str]:
        page = http.get("/v1/sessions", params={"status": "running", "limit": 100}).json()
        return [session["id"] for session in page["data"]]

    # What was begun to be cancelled, and then was asked for something else.
    for session_id in running():
        Session(http, session_id).cancel()
    eventually(lambda: not running(), what="every turn that was accepted has ended")


@pytest.fixture(scope="module")
def connection() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


seen: Counter[tuple[str, bool]] = Counter()


@pytest.fixture(autouse=True)
def at_least_one_success() -> Iterator[None]:
    """Fail a test of an operation that refused everything."""
    seen.clear()
    yield
    for operation in {operation for operation, _ in seen}:
        assert seen[operation, True], f"{operation}: {seen}"


def test_the_description_that_is_served_is_the_one_that_is_tested(http: httpx.Client) -> None:
    assert http.get("/openapi.json").json() == describe(ROUTES)


@schema.parametrize()
@settings(
    # Each is a request to a whole system: an eighth of what the profile says, and 300 at most.
    max_examples=min(settings().max_examples // 8, 300),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_no_request_breaks_it(
    case: schemathesis.Case, system: System, seeds: Seeds, connection: requests.Session
) -> None:
    operation = case.operation.definition.raw["operationId"]
    if (seen[operation, True] + seen[operation, False]) % 2:
        if case.path_parameters:
            case.path_parameters = {**case.path_parameters, **_named(case, seeds, operation)}
        case.body = seeds.body(operation, case.body)
        if operation == "read_session_file":
            case.query = {"path": "kept"}
    response = case.call_and_validate(
        base_url=system.url, session=connection, checks=CHECKS, timeout=20
    )
    seen[operation, response.status_code < 300] += 1


def _named(case: schemathesis.Case, seeds: Seeds, operation: str) -> dict[str, str]:
    return {k: v for k, v in seeds.values(operation).items() if k in case.path_parameters}
