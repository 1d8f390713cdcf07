"""Requests that come to another host than the session's owner."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import httpx
import pytest

from tests.followed_turn import script
from tests.integration.wire import Session
from tests.system import System

ENDLESS = script("never read to its end", tokens=10_000, tps=10)


@pytest.fixture
def two_hosts(system: System) -> Iterator[list[httpx.Client]]:
    """Two clients, each of whose requests all come to one host."""
    clients: dict[str, httpx.Client] = {}
    while len(clients) < 2:
        headers = {"x-session-id": uuid.uuid4().hex}
        client = httpx.Client(base_url=system.url, timeout=30, headers=headers)
        owner = client.get("/readyz").json()["owner_id"]
        if owner in clients:
            client.close()
        else:
            clients[owner] = client
    yield list(clients.values())
    for client in clients.values():
        client.close()


def test_an_answer_is_read_as_it_comes_wherever_the_reader_is(
    two_hosts: list[httpx.Client],
) -> None:
    here = Session.make(two_hosts[0])
    there = Session(two_hosts[1], here.id)
    turn_id = here.begin(ENDLESS)
    # A host that has sent a message to the owner hears of the session from there on.
    waiting = there.begin("I wait")
    began = time.monotonic()
    for session in (there, here, there):
        session.streaming(turn_id)
    assert time.monotonic() - began < 5
    assert there.cancel(turn_id).json() == {"cancelled": [turn_id]}
    assert there.ended(turn_id)["status"] == here.ended(turn_id)["status"] == "cancelled"
    assert here.ended(waiting)["status"] == "completed"


def test_a_session_moves_to_the_host_that_its_messages_come_to(
    system: System, two_hosts: list[httpx.Client]
) -> None:
    here = Session.make(two_hosts[0])
    there = Session(two_hosts[1], here.id)
    here.turn("My name is Ada.")
    first = system.owner_of(here.id)
    assert first is not None
    for _ in range(4):
        assert there.turn("What is my name?")["text"] == "Your name is Ada."
    last = system.owner_of(here.id)
    assert last is not None
    assert last[0].id != first[0].id
    journal = system.assert_journal_sound(here.id)
    assert len({epoch for _, epoch, _ in journal.entries}) == 2
