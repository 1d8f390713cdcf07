"""``agentray up`` as a whole: it starts, stays, is brought back and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import pytest
import redis

from agentray.app.layout import Layout
from agentray.app.processes import alive
from agentray.config.state import read_state
from tests.integration.systems import READY_S, System, eventually, kill
from tests.integration.wire import Session


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("up") / "system")
    running.start()
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


def agentray_up(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentray", "up", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_says_step_by_step_what_it_started_and_what_to_type(system: System) -> None:
    for step in ("PostgreSQL", "Redis", "Ray", "models", "session hosts"):
        assert re.search(rf"^\S {step} +\d+\.\d s  \S", system.said(), re.MULTILINE), step
    assert f"http://127.0.0.1:{system.port}" in system.said()
    assert "agentray chat" in system.said()
    assert "--model NAME=URL" in system.said()


def test_the_note_says_where_everything_is(system: System) -> None:
    state = system.state
    assert system.process is not None
    assert (state.pid, state.ready, state.models) == (system.process.pid, True, ["simulator"])
    assert state.url == f"http://127.0.0.1:{system.port}"
    with psycopg.connect(state.postgres) as connection:
        assert connection.execute("SELECT count(*) FROM hosts").fetchone() is not None
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
    with redis.Redis.from_url(state.redis) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}


def test_every_listener_is_on_loopback(system: System) -> None:
    if shutil.which("ss") is None and "CI" not in os.environ:
        pytest.skip("ss is missing: install iproute2")
    pids = {*system.processes(), system.state.pid}
    listed = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    ours = [
        (line.split()[3], line.split()[-1])
        for line in listed.splitlines()
        if pids & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}
    ]
    # GCS, raylet (2), HAProxy (3), two hosts and a simulator: else the test looks elsewhere.
    assert len(ours) >= 9
    abroad = [
        entry
        for entry in ours
        if entry[0].rpartition(":")[0] not in ("127.0.0.1", "[::ffff:127.0.0.1]", "[::1]")
    ]
    assert not abroad


def test_session_hosts_run_at_the_priority_of_everything_else(system: System) -> None:
    host = system.get("/")["pid"]
    assert os.getpriority(os.PRIO_PROCESS, host) == os.getpriority(os.PRIO_PROCESS, 0)


def test_the_simulator_is_behind_the_same_door(system: System) -> None:
    assert system.get("/models/simulator/v1/models")["data"][0]["id"] == "simulator"


def test_a_second_start_on_the_folder_names_the_first(system: System) -> None:
    second = agentray_up("--data-dir", str(system.layout.data_dir))
    assert second.returncode == 1
    assert f"process {system.state.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    assert system.answers()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("bin/postgres",), "PostgreSQL"),
        (("redis-server",), "Redis"),
        (("bin/haproxy",), None),
        (("ray::ServeController",), None),
        (("ray::ServeReplica:hosts",), None),
        (("bin/haproxy", "bin/postgres", "redis-server", "ray::", "gcs_server", "raylet"), "Ray"),
    ],
    ids=lambda value: None if value is None or isinstance(value, str) else value[-1],
)
def test_what_is_killed_comes_back(
    system: System, words: tuple[str, ...], part: str | None
) -> None:
    """A part of ours is brought back by the supervisor, a part of Serve's by Serve."""
    before = system.said().count("is back")
    state = system.state
    with psycopg.connect(state.postgres) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (word text)")
        connection.execute("INSERT INTO kept VALUES (%s)", [words[0]])
    victims = system.processes(*words)
    assert victims
    kill(victims)
    if part is not None:
        eventually(lambda: f"✓ {part} " in _since(system, before), timeout_s=READY_S)
    eventually(system.answers, timeout_s=READY_S)
    if part is None:
        eventually(lambda: bool(system.processes(*words)), timeout_s=READY_S)
        assert system.said().count("is back") == before

    def kept() -> bool:
        with contextlib.suppress(psycopg.Error), psycopg.connect(state.postgres) as connection:
            row = connection.execute("SELECT 1 FROM kept WHERE word = %s", [words[0]]).fetchone()
            return row == (1,)
        return False

    eventually(kept, timeout_s=60)
    eventually(lambda: system.state.ready)


def _since(system: System, count: int) -> str:
    """Return what was said behind the first ``count`` reports of something that is back."""
    lines = system.said().splitlines()
    back = [number for number, line in enumerate(lines) if "is back" in line]
    return "\n".join(line for number, line in enumerate(lines) if number in back[count:])


def test_a_rolling_restart_of_the_hosts_answers_every_request(system: System) -> None:
    old = set(system.processes("ray::ServeReplica:hosts"))
    with ThreadPoolExecutor(4) as pool:
        slow = [
            pool.submit(system.get, "/slow", timeout_s=60, **{"x-seconds": "6"}) for _ in range(4)
        ]
        deploying = system.deploy_again()
        answered: set[int] = set()

        def replaced() -> bool:
            answered.add(system.get("/")["pid"])
            now = set(system.processes("ray::ServeReplica:hosts"))
            return deploying.poll() is not None and not now & old and now <= answered

        eventually(replaced, timeout_s=READY_S)
        assert deploying.wait() == 0
        assert all(request.result()["path"] == "/slow" for request in slow)


def test_a_second_system_runs_beside_it_outlives_its_supervisor_and_drains_at_its_end(
    system: System, tmp_path: Path
) -> None:
    second = System(tmp_path / "second", settings={"sessions": {"hosts": 1, "drain_s": 20}})
    second.start()
    try:
        second.wait_ready()
        assert system.answers()
        assert second.get("/")["pid"] not in system.processes()
        with psycopg.connect(second.state.postgres) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 'whole' AS word")
            connection.execute("INSERT INTO hosts (id, kind, address) VALUES ('h', 'shared', 'a')")
        # What its supervisor leaves behind is in the next one's way.
        assert second.process is not None
        second.process.kill()
        second.process.wait()
        left = second.processes()
        assert left
        assert read_state(second.layout.data_dir) is None
        second.start()
        second.wait_ready()
        assert not set(left) & set(second.processes())
        with psycopg.connect(second.state.postgres) as connection:
            assert connection.execute("SELECT word FROM kept").fetchone() == ("whole",)
            # Owners that were killed with everything are known to be dead.
            assert connection.execute("SELECT count(*) FROM hosts").fetchone() == (0,)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(
                second.get, "/slow", timeout_s=60, **{"x-seconds": "4", "x-session-id": "alice"}
            )
            eventually(lambda: second.get("/busy")["busy"] == 1)
            second.signal(signal.SIGTERM)
            assert slow.result()["path"] == "/slow"
        assert second.wait_end() == 0
        assert second.processes() == []
        assert read_state(second.layout.data_dir) is None
        assert not second.layout.runtime_dir.exists()
        assert system.answers()
    finally:
        second.close()


# The last one that the module's system serves.
def test_a_second_signal_ends_it_without_waiting_for_what_runs(system: System) -> None:
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(system.get, "/slow", timeout_s=60, **{"x-seconds": "60"})
        eventually(lambda: system.get("/busy")["busy"] == 1)
        system.signal(signal.SIGINT)
        running = system.state.pid
        # Signals that come together are one.
        system.signal(signal.SIGINT)
        eventually(lambda: "stopping" in system.said())
        assert system.processes("ray::ServeReplica:hosts")

        def ended() -> bool:
            system.signal(signal.SIGINT)
            return not alive(running)

        eventually(ended, timeout_s=15)
        assert system.wait_end() == 0
        assert endless.exception() is not None
    assert system.processes() == []


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray cluster of its own, started as the command says, and the environment that it has."""
    base = {
        **os.environ,
        "AGENTRAY_DATA_DIR": str(tmp_path / "node"),
        "PYTHONPATH": str(Path.cwd()),
    }
    printed = subprocess.run(
        [sys.executable, "-m", "agentray", "env"],
        env=base,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = [shlex.split(line) for line in printed.splitlines()]
    assert {word for word, _ in words} == {"export"}
    environ = {**base, **dict(pair.split("=", 1) for _, pair in words)}
    folder = tempfile.mkdtemp(prefix="ar-test-", dir="/tmp")
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--port=0", f"--temp-dir={folder}", "--include-dashboard=false"),
            *("--object-store-memory=100000000", "--num-cpus=2", "--no-monitor"),
            *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        ],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = Path(folder) / "ray_current_cluster"
        eventually(lambda: started.poll() is not None or address.exists(), timeout_s=READY_S)
        yield address.read_text().strip(), environ
    finally:
        kill(pid for pid in _everything() if _session(pid) == started.pid)
        started.wait()
        shutil.rmtree(folder, ignore_errors=True)
        Layout.of(str(tmp_path / "node")).remove_runtime()


def _everything() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _session(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return 0


def test_a_cluster_that_is_there_is_used_and_left_as_it_was(
    tmp_path: Path, cluster: tuple[str, dict[str, str]]
) -> None:
    address, environ = cluster
    settings = {"ray": {"address": address}, "sessions": {"hosts": 1}}
    hosts_app = "agentray.app.hosts:build_hosts_app"
    system = System(tmp_path / "d", hosts_app=hosts_app, settings=settings, environ=environ)
    system.start()
    try:
        system.wait_ready()
        assert system.state.ray_address == address
        with httpx.Client(base_url=system.state.url, timeout=60) as http:
            Session.make(http, placement="dedicated").turn("hello")
        with psycopg.connect(system.state.postgres) as connection:
            owners = connection.execute("SELECT kind, address FROM hosts").fetchall()
        assert sorted(kind for kind, _ in owners) == ["dedicated", "shared"]
        pids = [int(where.rpartition("/")[2]) for _, where in owners]
        assert all(map(alive, pids))
        assert not set(pids) & set(system.processes())
        system.signal(signal.SIGINT)
        assert system.wait_end() == 0
        # Ray ends an actor's process in its own time.
        eventually(lambda: not any(map(alive, pids)))
        assert system.processes() == []
    finally:
        system.close()


def test_a_taken_port_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed = agentray_up("--data-dir", str(tmp_path / "d"), "--port", str(port))
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert str(port) in failed.stderr
    assert System(tmp_path / "d").processes() == []
    assert not System(tmp_path / "d").layout.runtime_dir.exists()


@pytest.mark.parametrize(
    ("section", "url"),
    [
        ("postgres", "postgresql://u:geheim@127.0.0.1:9/db"),
        ("redis", "redis://:geheim@127.0.0.1:9/0"),
    ],
)
def test_a_store_that_does_not_answer_is_named_without_its_password(
    tmp_path: Path, section: str, url: str
) -> None:
    system = System(tmp_path / "d", settings={section: {"url": url}})
    system.start()
    try:
        assert system.wait_end() == 1
        assert "127.0.0.1:9" in system.said()
        assert "geheim" not in system.said()
        assert "Traceback" not in system.said()
        assert system.processes() == []
    finally:
        system.close()


def test_a_session_host_that_cannot_start_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    system = System(tmp_path / "d", hosts_app="tests.integration.placeholder_hosts:build_broken")
    system.start()
    try:
        assert system.wait_end(timeout_s=READY_S) == 1
        assert "the door is stuck" in system.said()
        assert system.processes() == []
        assert not system.layout.runtime_dir.exists()
        assert list((system.layout.logs_dir / "ray").glob("serve/replica_*.log"))
    finally:
        system.close()
