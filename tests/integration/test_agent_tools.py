"""What an agent can do with tools, asked for with the ``openai`` package on a whole system."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest
from openai import OpenAI

from tests.followed_turn import script
from tests.integration.wire import Session, eventually
from tests.services import Services
from tests.system import System


@pytest.fixture(scope="module")
def client(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def shop(_services: Services) -> Iterator[None]:
    with psycopg.connect(_services.postgres.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE items (name text, price numeric)")
        connection.execute("INSERT INTO items VALUES ('pen', 2.5), ('ink', 12)")
        connection.execute("CREATE ROLE shopper LOGIN")
        connection.execute("GRANT SELECT ON items TO shopper")
        yield
        connection.execute("DROP TABLE items")
        connection.execute("DROP ROLE shopper")


def ask(client: OpenAI, *calls: dict[str, Any]) -> str:
    """Return what the model was told by tools, each called once the last one has answered."""
    said = script("{tool_results}", tools=[*calls])
    return client.responses.create(model="tooled", input=said).output_text


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    return {"name": tool, "arguments": arguments}


def test_code_is_run(client: OpenAI) -> None:
    assert ask(client, call("python", code="print(6 * 7)")) == "42"
    assert "uid=" in ask(client, call("shell", script="id"))


def test_code_that_does_not_end_well_is_told_with_what_it_printed(client: OpenAI) -> None:
    said = ask(client, call("python", code="print('so far', flush=True); 1 / 0"))
    assert "exit code 1" in said
    assert "so far" in said
    assert "ZeroDivisionError" in said


def test_a_database_is_asked(client: OpenAI) -> None:
    said = ask(client, call("sql_shop", statement="SELECT name, price FROM items ORDER BY price"))
    assert said.startswith("{"), said
    found = json.loads(said)
    assert [column["name"] for column in found["columns"]] == ["name", "price"]
    assert [row[0] for row in found["rows"]] == ["pen", "ink"]
    assert "found DROP" in ask(client, call("sql_shop", statement="DROP TABLE items"))


def test_an_http_service_is_called(client: OpenAI) -> None:
    said = ask(client, call("models"))
    assert said.startswith("{"), said
    found = json.loads(said)
    assert "tooled" in [model["id"] for model in found["data"]]


def test_a_tool_of_an_mcp_server_in_a_jail_is_called(client: OpenAI) -> None:
    assert ask(client, call("small__add", a=2, b=3)) == "5"
    # Whose environment is its own.
    assert ask(client, call("small__environment", name="RAY_ADDRESS")) == "not there"


def test_a_function_of_the_operator_is_called(client: OpenAI) -> None:
    assert ask(client, call("greet", name="Ada")) == "Hello, Ada!"


def test_tools_follow_one_another_in_one_turn(client: OpenAI) -> None:
    said = ask(
        client,
        call("python", code="open('a.txt', 'w').write('kept')"),
        call("shell", script="cat a.txt"),
        call("small__add", a=1, b=1),
    )
    assert said.endswith("kept, 2")


def test_files_are_kept_between_turns_and_can_be_fetched(http: httpx.Client) -> None:
    session = Session.make(http, agent="tooled")
    write = call("python", code="open('notes.txt', 'w').write('from the first turn')")
    assert session.turn(script("{tool_results}", tools=[write]))["text"] == "(it printed nothing)"
    read = call("shell", script="cat notes.txt")
    turn = session.turn(script("{tool_results}", tools=[read]))
    assert turn["text"] == "from the first turn"
    files = http.get(f"/v1/sessions/{session.id}/files").json()["data"]
    assert [file["path"] for file in files] == ["notes.txt"]
    content = http.get(f"/v1/sessions/{session.id}/files/content", params={"path": "notes.txt"})
    assert content.content == b"from the first turn"


def test_where_a_call_waits_in_the_queue_is_told_with_its_turn(http: httpx.Client) -> None:
    sleep = script("{tool_results}", tools=[call("python", code="import time; time.sleep(1)")])
    turns: list[tuple[Session, str]] = []
    # As many as the pool has slots for at most, and one more: it waits until another has ended.
    for _ in range(4 * 8 + 1):
        session = Session.make(http, agent="tooled")
        turns.append((session, session.begin(sleep)))

    def waiting() -> Any:
        for session, turn_id in turns:
            turn = http.get(f"/v1/sessions/{session.id}/turns/{turn_id}").json()
            if turn["waiting"]:
                return turn["waiting"]
        return None

    (place,) = eventually(waiting, what="a call is seen to wait")
    assert place["tool"] == "python"
    assert place["position"] >= 1
    assert place["wait_s"] > 0
    for session, turn_id in turns:
        ended = session.ended(turn_id)
        assert ended["status"] == "completed"
        assert ended["waiting"] == []


def test_an_agent_has_no_other_tools_than_its_own(client: OpenAI) -> None:
    said = script("{tool_results}", tools=[call("sql_shop", statement="SELECT 1")])
    told = client.responses.create(model="assistant", input=said).output_text
    assert told == "There is no tool 'sql_shop'."


def test_what_calls_took_is_in_the_metrics(client: OpenAI, http: httpx.Client) -> None:
    assert ask(client, call("python", code="print(sum(range(3_000_000)))")) == "4499998500000"
    page = http.get("/metrics").text
    lines = page.splitlines()
    for name, labels in (
        ("calls_total", 'outcome="ok",tenant="default",tool="python"'),
        ("run_seconds_count", 'tool="python"'),
        ("wait_seconds_count", 'tool="python"'),
        ("cpu_seconds_total", 'tenant="default",tool="python"'),
        ("memory_byte_seconds_total", 'tenant="default",tool="python"'),
        ("starts_total", 'start="parked"'),
        ("workers", ""),
    ):
        found = [line for line in lines if line.startswith(f"agentray_tool_{name}{{")]
        assert any(labels in line and float(line.split()[-1]) > 0 for line in found), name
