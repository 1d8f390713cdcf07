"""A whole system with real session hosts and dedicated sessions: its sockets, and its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agentray.app.processes import owned_processes
from agentray.config.state import read_state
from agentray.events import TurnResumed
from tests.followed_turn import script
from tests.integration.wire import Session, eventually
from tests.system import STOP_S, System

SETTINGS = {"sessions": {"hosts": 1, "max_dedicated": 1, "drain_s": 20.0}}
LOOPBACK = ("127.0.0.1", "[::ffff:127.0.0.1]", "[::1]")
LONG = script("It is read to its end.", tokens=60, tps=10)
# Beyond the end of the hosts, which wait for theirs.
LONGER = script("This one too.", tokens=160, tps=10)


def supervisor_of(system: System) -> int:
    state = read_state(system.data_dir)
    assert state is not None
    return state.pid


def test_every_listener_is_on_loopback(system: System, http: httpx.Client) -> None:
    if shutil.which("ss") is None and "CI" not in os.environ:
        pytest.skip("ss is missing: install iproute2")
    session = Session.make(http, placement="dedicated")
    session.turn("hello")
    dedicated = system.owner_of(session.id)
    assert dedicated is not None
    pids = {*owned_processes(system.layout), supervisor_of(system)}
    listed = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    ours = [
        (line.split()[3], int(pid))
        for line in listed.splitlines()
        for pid in re.findall(r"pid=(\d+)", line)
        if int(pid) in pids
    ]
    # Else the test looks elsewhere.
    listening = {pid for _, pid in ours}
    assert listening >= {dedicated[0].pid, *(host.pid for host in system.hosts())}
    abroad = [entry for entry in ours if entry[0].rpartition(":")[0] not in LOOPBACK]
    assert not abroad


@pytest.fixture
def own() -> Iterator[System]:
    """A system for one test, in which one dedicated session may be active."""
    folder = Path(tempfile.mkdtemp(prefix="agentray-test-"))
    system = System(folder / "data", settings=SETTINGS)
    try:
        yield system.start()
    finally:
        system.destroy()
        shutil.rmtree(folder, ignore_errors=True)


def test_running_turns_end_before_the_system_does_and_waiting_ones_are_run_by_the_next(
    own: System,
) -> None:
    with httpx.Client(base_url=own.url, timeout=30) as http:
        dedicated = Session.make(http, placement="dedicated")
        dedicated.streaming(dedicated.begin(LONGER))
        # All dedicated sessions that may be active are: a turn of another one is accepted, waits.
        waiting = Session.make(http, placement="dedicated")
        turn_id = waiting.begin("My name is Ada.")
        eventually(lambda: own.log("which is all that may be"), what="the launch is refused")
        assert waiting.found(turn_id)["state"] == "accepted"
        assert [o.name for o in own.owners(kind="dedicated")] == [f"session/{dedicated.id}"]
        shared = Session.make(http)
        shared.streaming(shared.begin(LONG))
        os.kill(supervisor_of(own), signal.SIGTERM)
    own.close_sql()
    eventually(lambda: read_state(own.data_dir) is None, what="it has ended", timeout_s=STOP_S)
    own.stop()
    own.restart()
    for session in (shared, dedicated):
        journal = own.assert_journal_sound(session.id)
        (turn,) = journal.turns()
        assert turn.status == "completed"
        assert not turn.of(TurnResumed)
    eventually(
        lambda: own.sql("SELECT state FROM turns WHERE id = %s", turn_id) == [("done",)],
        what="the waiting turn has run",
    )
    (turn,) = own.assert_journal_sound(waiting.id).turns()
    assert turn.status == "completed"
    assert not turn.of(TurnResumed)
    own.stop()
