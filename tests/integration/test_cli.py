"""The real command line, against a whole system."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from tests.followed_turn import echo, script
from tests.integration.wire import Session, eventually
from tests.system import System

STORY = "Once upon a time an actor kept a journal of all that it did."
ENDLESS = script("never read to its end", tokens=10_000, tps=10)
ROOT = Path(__file__).parents[2]
AGENTRAY = [sys.executable, "-m", "agentray"]


class Command:
    """``agentray`` with the options that say which system is meant."""

    def __init__(self, system: System) -> None:
        self.where = ["--data-dir", str(system.data_dir)]

    def __call__(
        self, *arguments: str, input: str = "", fails: bool = False
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*AGENTRAY, *arguments, *self.where],
            input=input,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )
        assert done.returncode == int(fails), done
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture(scope="module")
def run(system: System) -> Command:
    return Command(system)


def new_id() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"


# Chat


def test_piped_lines_are_messages_and_answers_come_out(run: Command) -> None:
    session_id = new_id()
    first = run("chat", "--session", session_id, input="My name is Ada.\n\nWhat is my name?\n")
    answers = first.stdout.splitlines()
    assert answers[0].startswith("Nice to meet you, Ada.")
    assert answers[1:] == ["Your name is Ada."]
    again = run("chat", "--session", session_id, input="What is my name?")
    assert again.stdout == "Your name is Ada.\n"


def test_a_chat_shows_an_answer_as_it_comes_and_its_tools(run: Command) -> None:
    asked = script(STORY, tokens=12, tps=20, tools=[echo("a")])
    with subprocess.Popen(
        [*AGENTRAY, "chat", *run.where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write(asked.encode() + b"\n")
        chat.stdin.close()
        first = os.read(chat.stdout.fileno(), 4096).decode()
        assert 0 < len(first) < len(STORY)
        assert chat.poll() is None
        assert first + chat.stdout.read().decode() == STORY + "\n"
        assert b"calls echo" in chat.stderr.read()
    assert chat.returncode == 0


def test_ctrl_c_cancels_the_answer(run: Command, http: httpx.Client) -> None:
    session = Session.make(http)
    with subprocess.Popen(
        [*AGENTRAY, "chat", "--session", session.id, *run.where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(ENDLESS.encode() + b"\n")
        chat.stdin.close()
        assert os.read(chat.stdout.fileno(), 4096)
        chat.send_signal(signal.SIGINT)
        assert chat.wait(timeout=30) == 1
    (end,) = [event for event in session.events() if event["type"] == "turn.finished"]
    assert end["status"] == "cancelled"


def test_a_chat_in_a_terminal_is_a_conversation(run: Command) -> None:
    here, there = pty.openpty()
    session_id = new_id()
    shown = b""

    def wait_for(text: str) -> None:
        nonlocal shown
        while text.encode() not in shown:
            assert select.select([here], [], [], 30)[0], shown
            shown += os.read(here, 4096)
        shown = shown.partition(text.encode())[2]

    with subprocess.Popen(
        [*AGENTRAY, "chat", "--session", session_id, *run.where],
        stdin=there,
        stdout=there,
        stderr=there,
        cwd=ROOT,
        start_new_session=True,
    ) as chat:
        os.close(there)
        wait_for(f"session {session_id}")
        os.write(here, b"My name is Ada.\n")
        wait_for("Nice to meet you, Ada.")
        os.write(here, b"What is my name?\n")
        wait_for("Your name is Ada.")
        os.write(here, b"/exit\n")
        wait_for(f"agentray chat --session {session_id}")
        assert chat.wait(timeout=30) == 0
    os.close(here)


def test_a_failed_answer_is_an_exit_code(run: Command) -> None:
    failed = run("chat", input='!sim {"status": 400}\n', fails=True)
    assert "failed" in failed.stderr


# Sessions


def test_sessions_are_listed(run: Command, http: httpx.Client) -> None:
    user = f"user {uuid.uuid4().hex}"
    made = [Session.make(http, user=user) for _ in range(3)]
    turn_id = made[0].begin(ENDLESS)

    def listed(*options: str) -> list[str]:
        lines = run("sessions", "ls", "--user", user, *options).stdout.splitlines()
        return [line.split("\t")[0] for line in lines]

    assert listed() == [session.id for session in made[::-1]]
    assert listed("--status", "running") == [made[0].id]
    assert listed("--limit", "2") == [made[2].id, made[1].id]
    found = json.loads(run("sessions", "ls", "--user", user, "--json").stdout)
    assert found == [session.info() for session in made[::-1]]
    made[0].cancel(turn_id)


def test_a_session_is_shown(run: Command, http: httpx.Client) -> None:
    session = Session.make(http)
    session.turn("My name is Ada.")
    session.turn(script("They said: {tool_results}", tools=[echo("a")]))
    shown = run("sessions", "show", session.id).stdout
    assert shown.startswith(f"{session.id}: idle, agent assistant, shared, 2 turns\n")
    for line in ("user: My name is Ada.", "echo (ok): a", "assistant: They said: a"):
        assert line in shown.splitlines()
    found = json.loads(run("sessions", "show", session.id, "--json").stdout)
    assert found == {"session": session.info(), "events": session.events()}


def test_a_session_is_cancelled_and_deleted(run: Command, http: httpx.Client) -> None:
    session = Session.make(http)
    turns = [session.begin(ENDLESS) for _ in range(2)]
    said = run("sessions", "cancel", session.id, "--turn", turns[1]).stdout
    assert said == f"cancelled {turns[1]}\n"
    assert turns[0] in run("sessions", "cancel", session.id).stdout.split()
    eventually(lambda: session.info()["status"] == "idle", what="its turns have ended")
    nothing = run("sessions", "cancel", session.id, fails=True)
    assert "nothing to cancel" in nothing.stderr
    other = Session.make(http)
    run("sessions", "rm", session.id, other.id)
    assert http.get(session.path).status_code == http.get(other.path).status_code == 404
    gone = run("sessions", "show", session.id, fails=True)
    assert gone.stderr == f"agentray: there is no session '{session.id}'\n"


# The system


def test_the_status_is_told(run: Command, system: System) -> None:
    found = json.loads(run("status", "--json").stdout)
    assert found["ready"] is True
    assert found["url"] == system.url
    assert found["host"]["store_ok"] is found["host"]["cache_ok"] is True
    assert found["system"]["models"] == ["embedder", "simulator"]
    assert found["system"]["hosts"] == len(system.hosts())
    assert f"agentray at {system.url}: ready" in run("status").stdout


def test_the_status_of_nothing_is_an_exit_code(tmp_path: Path) -> None:
    nowhere = Command.__new__(Command)
    nowhere.where = ["--url", "http://127.0.0.1:9"]
    assert json.loads(nowhere("status", "--json", fails=True).stdout)["ready"] is False
    assert "cannot reach" in nowhere("sessions", "ls", fails=True).stderr


def test_configurations_are_checked(tmp_path: Path) -> None:
    def check(file: Path, code: int) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "DATABASE_URL": "postgresql://x", "REDIS_URL": "redis://x"}
        command = [*AGENTRAY, "config", "check", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)
        assert done.returncode == code, done
        return done

    assert "ok" in check(ROOT / "configs" / "local.yaml", 0).stdout
    bad = tmp_path / "bad.yaml"
    bad.write_text("http:\n  prot: 80\nsessions:\n  idle_s: soon\nmodels:\n  default: ${NO_SUCH}\n")
    said = check(bad, 1).stderr
    for key in ("http.prot", "sessions.idle_s", "NO_SUCH"):
        assert re.search(rf"bad\.yaml.*{re.escape(key)}", said), said
