"""Which processes belong to a system, and which do not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentray.app.layout import Layout
from agentray.app.processes import MARKER, alive, end_processes, owned_processes
from agentray.storage.embedded import redis_server
from tests.integration.systems import eventually

SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout.of(str(tmp_path / "data"))
    made.redis_dir.mkdir(parents=True)
    return made


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_the_marked_their_session_and_stores_in_our_folders_are_ours(
    layout: Layout, started: list[subprocess.Popen[bytes]]
) -> None:
    marked = {**os.environ, MARKER: layout.key}
    unmarked = {key: value for key, value in os.environ.items() if key != MARKER}
    # A leader with the marker, and in its session a child that lost it.
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], env={{}})"
    leader = subprocess.Popen([sys.executable, "-c", child], env=marked, start_new_session=True)
    redis = subprocess.Popen(
        [redis_server(), "--port", "0", "--unixsocket", "s"],
        env=unmarked,
        cwd=layout.redis_dir,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    strangers = [
        # A shell that looks around there.
        subprocess.Popen([sys.executable, "-c", SLEEP], env=unmarked, cwd=layout.redis_dir),
        subprocess.Popen([sys.executable, "-c", SLEEP], env=unmarked),
        subprocess.Popen([sys.executable, "-c", SLEEP], env=unmarked, start_new_session=True),
        subprocess.Popen([sys.executable, "-c", SLEEP], env={**unmarked, MARKER: "other"}),
    ]
    started += [leader, redis, *strangers]
    eventually(lambda: len(owned_processes(layout)) == 3)
    owned = owned_processes(layout)
    assert {leader.pid, redis.pid} < set(owned)
    (heir,) = set(owned) - {leader.pid, redis.pid}
    leader.kill()
    # A child whose leader is gone is nobody's whom we know: it is not touched.
    eventually(lambda: owned_processes(layout) == [redis.pid])
    os.kill(heir, signal.SIGKILL)


@pytest.mark.parametrize("session", ["led", "without a leader"])
def test_a_marked_process_in_a_strangers_session_does_not_make_the_session_ours(
    layout: Layout,
    started: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    session: str,
) -> None:
    if session == "without a leader":
        # As a container's first process sees it, and the kernel's threads.
        monkeypatch.setattr(os, "getsid", lambda pid: 0)
    marked = {**os.environ, MARKER: layout.key}
    started.append(subprocess.Popen([sys.executable, "-c", SLEEP], env=marked))
    eventually(lambda: bool(owned_processes(layout)))
    assert owned_processes(layout) == [started[0].pid]
    assert os.getpid() not in owned_processes(layout)


def test_who_ignores_the_polite_signal_is_killed_and_the_dead_are_no_more(
    started: list[subprocess.Popen[bytes]],
) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); " + SLEEP
    process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    started.append(process)
    assert process.stdout is not None
    with process.stdout as ready:
        ready.readline()
    asyncio.run(end_processes([process.pid, 4_194_304], grace_s=0.3))
    # Not reaped yet, and dead all the same.
    assert not alive(process.pid)
    assert process.wait() == -signal.SIGKILL
