"""Affinity by session, on the real HAProxy with the configuration that Ray's own code makes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentray.app.environment import find_haproxy
from agentray.http import haproxy
from agentray.ids import new_session_id, new_turn_id, response_id

SESSIONS = [new_session_id() for _ in range(600)]


class Host:
    """A tiny backend that answers with its name and with what it got.

    One that ``picks`` answers as Ray's router does that has picked this replica.
    """

    def __init__(self, name: str, *, picks: str = "") -> None:
        self.name = name
        self._connections: list[socket.socket] = []
        connections = self._connections

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Else each answer waits for the acknowledgement of its headers.
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {key.lower(): value for key, value in self.headers.items()}
                found = {"host": name, "headers": headers, "size": len(body), "replica_id": picks}
                answer = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET  # noqa: N815 - the server looks for these names

            def log_message(self, format: str, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def process_request(self, request: Any, client_address: Any) -> None:
                connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                """HAProxy resets its idle connections when it ends."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        # One that HAProxy keeps would still be answered.
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Proxy:
    """HAProxy as Ray runs it: started through the wrapper, reloaded with ``-sf`` and ``-x``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self._metrics, self._stats = free_ports(3)
        self.config = folder / "haproxy.cfg"
        self.process: subprocess.Popen[bytes] | None = None
        self._old: list[subprocess.Popen[bytes]] = []
        self._connection: HTTPConnection | None = None

    def load(
        self,
        backends: dict[str, list[Host]],
        *,
        models: str = "",
        routers: dict[str, Host] | None = None,
        fallback: Host | None = None,
    ) -> None:
        """Start with these backends by their routes, or reload.

        ``models`` is what the wrapper is told of the models, ``routers`` are Ray's that pick the
        replicas of a route, ``fallback`` is in the place of Ray's own proxy.
        """
        servers = {
            route: [[host.name, host.port] for host in hosts] for route, hosts in backends.items()
        }
        subprocess.run(
            [sys.executable, "-m", "tests.integration.ray_haproxy_config"],
            input=json.dumps(
                {
                    "dir": str(self.folder),
                    "port": self.port,
                    "metrics_port": self._metrics,
                    "stats_port": self._stats,
                    "backends": servers,
                    "routers": {route: host.port for route, host in (routers or {}).items()},
                    "fallback_port": 1 if fallback is None else fallback.port,
                }
            ),
            text=True,
            check=True,
        )
        arguments: list[str] = []
        if self.process is not None:
            (self.folder / "state").write_text(self.ask("show servers state"))
            arguments = ["-sf", str(self.process.pid), "-x", str(self.folder / "a.sock")]
            self._old.append(self.process)
        with (self.folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", haproxy.__file__),
                    *("-db", "-f", str(self.config), *arguments),
                ],
                env={
                    **os.environ,
                    "AGENTRAY_INTERNAL_HAPROXY": find_haproxy(),
                    "AGENTRAY_INTERNAL_BIND": "127.0.0.1",
                    haproxy.MODELS_VARIABLE: models,
                },
                stderr=stderr,
            )
        self.process = process
        eventually(
            lambda: process.poll() is not None or f"Pid: {process.pid}\n" in self.ask("show info")
        )
        assert process.poll() is None, (self.folder / "stderr").read_text()
        # An idle connection stays with the old worker until its next answer.
        self._hang_up()
        if self._old:
            eventually(lambda: self._old[-1].poll() is not None)
        self._connection = HTTPConnection("127.0.0.1", self.port, timeout=10)

    def ask(self, command: str) -> str:
        """Return the answer to a command on the admin socket, empty if nobody listens."""
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.folder / "a.sock"))
                client.sendall(f"{command}\n".encode())
                return "".join(iter(lambda: client.recv(65536).decode(), ""))
            except OSError:
                return ""

    def request(
        self, method: str, path: str, *, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        assert self._connection is not None
        payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        self._connection.request(method, path, body=payload, headers=headers or {})
        response = self._connection.getresponse()
        answer = response.read()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(answer)

    def host_of(self, session_id: str) -> str:
        return self.request("GET", "/x", headers={"x-session-id": session_id})[2]["host"]

    def post(self, path: str, body: Any) -> Any:
        return self.request("POST", path, body=body)[2]

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def close(self) -> None:
        self._hang_up()
        for process in filter(None, [self.process, *self._old]):
            process.send_signal(signal.SIGKILL)
            process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, from where the system takes none by itself."""
    found: list[int] = []
    for port in random.sample(range(10_000, 20_000), 200):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free port in 200 tries")


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    # Names as Ray makes them, in no order.
    made = [Host(f"SERVE_REPLICA__hosts-SessionHost-{tag}") for tag in ("x3f9", "a81c", "m2qd")]
    yield made
    for host in made:
        host.close()


@contextmanager
def running_proxy() -> Generator[Proxy]:
    # Not pytest's folder: the path of a unix socket is short.
    folder = Path(tempfile.mkdtemp(prefix="ar-test-", dir="/tmp"))
    proxy = Proxy(folder)
    try:
        yield proxy
    finally:
        proxy.close()
        shutil.rmtree(folder)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """HAProxy to be loaded by the test."""
    with running_proxy() as made:
        yield made


@pytest.fixture(scope="module")
def front(hosts: list[Host]) -> Iterator[Proxy]:
    """HAProxy in front of the three hosts, which stay."""
    with running_proxy() as made:
        made.load({"/": hosts})
        yield made


def test_header_path_and_body_lead_a_session_to_the_same_host(
    front: Proxy, hosts: list[Host]
) -> None:
    seen = set[str]()
    for name in [*SESSIONS[:60], "a:b@c+d", "x.y-z_0"]:
        response = response_id(name, new_turn_id())
        quoted = "".join(f"%{ord(c):02X}" for c in name)
        answers = {
            "header": front.host_of(name),
            "session path": front.request("GET", f"/v1/sessions/{name}/events?after=3")[2]["host"],
            "session itself": front.request("GET", f"/v1/sessions/{name}")[2]["host"],
            "quoted path": front.request("GET", f"/v1/sessions/{quoted}/turns")[2]["host"],
            "conversation path": front.post(f"/v1/conversations/{name}/items", {})["host"],
            "response path": front.post(f"/v1/responses/{response}/cancel", {})["host"],
            "conversation": front.post("/v1/responses", {"conversation": name})["host"],
            "conversation as object": front.post(
                "/v1/responses", {"input": "hi", "conversation": {"id": name}}
            )["host"],
            "previous response": front.post("/v1/responses", {"previous_response_id": response})[
                "host"
            ],
            "chosen id": front.post("/v1/sessions", {"id": name})["host"],
        }
        assert len(set(answers.values())) == 1, (name, answers)
        seen.add(answers["header"])
    assert seen == {host.name for host in hosts}


def test_few_sessions_move_when_any_host_leaves_or_joins(proxy: Proxy, hosts: list[Host]) -> None:
    proxy.load({"/": hosts})
    before = {name: proxy.host_of(name) for name in SESSIONS}
    for gone in hosts:
        proxy.load({"/": [host for host in hosts if host is not gone]})
        without = {name: proxy.host_of(name) for name in SESSIONS}
        left = [name for name in SESSIONS if without[name] != before[name]]
        # Of those that lived elsewhere none may move, and what must move is about a third.
        assert all(before[name] == gone.name for name in left)
        assert len(left) / len(SESSIONS) <= 1.5 / 3
        proxy.load({"/": hosts})
        assert {name: proxy.host_of(name) for name in SESSIONS} == before


def test_the_order_of_hosts_does_not_matter(proxy: Proxy, hosts: list[Host]) -> None:
    proxy.load({"/": hosts})
    before = {name: proxy.host_of(name) for name in SESSIONS}
    proxy.load({"/": hosts[::-1]})
    assert {name: proxy.host_of(name) for name in SESSIONS} == before


def test_sessions_spread_over_all_hosts(front: Proxy, hosts: list[Host]) -> None:
    homes = [front.host_of(name) for name in SESSIONS]
    for host in hosts:
        assert 0.2 < homes.count(host.name) / len(homes) < 0.5


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/conversations", "/v1/sessions"])
def test_a_new_session_is_born_on_the_host_where_it_will_be_looked_for(
    front: Proxy, path: str
) -> None:
    drawn = set[str]()
    for _ in range(50):
        _, _, answer = front.request(
            "POST", path, body={"input": "hi"}, headers={"X-Agentray-New-Session": "sess_forged"}
        )
        name = answer["headers"][haproxy.NEW_SESSION_HEADER]
        prefix = "conv" if path == "/v1/conversations" else "sess"
        assert re.fullmatch(rf"{prefix}_[0-9a-f]{{32}}", name)
        assert front.host_of(name) == answer["host"]
        drawn.add(name)
    assert len(drawn) == 50


def test_no_session_is_drawn_for_a_request_that_names_one_or_makes_none(front: Proxy) -> None:
    forged = {haproxy.NEW_SESSION_HEADER: "sess_forged"}
    for method, path, body, headers in (
        ("POST", "/v1/responses", {"conversation": "alice"}, {}),
        ("POST", "/v1/responses", {}, {"x-session-id": "alice"}),
        ("POST", "/v1/sessions", {"id": "alice"}, {}),
        ("POST", "/v1/sessions/alice/turns", {}, {}),
        ("POST", "/v1/chat/completions", {}, {}),
        ("GET", "/v1/sessions", None, {}),
    ):
        answer = front.request(method, path, body=body, headers={**headers, **forged})[2]
        assert haproxy.NEW_SESSION_HEADER not in answer["headers"], (method, path)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"conversation": 5, "previous_response_id": {}}',
        b'{"conversation": null}',
        b'{"conversation": {"id": []}}',
        b'{"previous_response_id": "resp_short"}',
        b'{"input": "' + b"x" * 1_000_000 + b'", "conversation": "alice"}',
        b"[" * 10_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_body_that_names_no_session_arrives_whole(front: Proxy, body: bytes) -> None:
    status, _, answer = front.request("POST", "/v1/responses", body=body)
    assert (status, answer["size"]) == (200, len(body))


def test_odd_keys_arrive(front: Proxy) -> None:
    for path in ("/v1/sessions/" + "x" * 10_000, "/v1/sessions/%00%ff%zz", "/v1/responses/r", "//"):
        assert front.request("GET", path)[0] == 200
    assert front.request("GET", "/x", headers={"x-session-id": "é" * 50})[0] == 200


def test_other_applications_are_balanced_by_load_and_see_no_key(
    proxy: Proxy, hosts: list[Host]
) -> None:
    models = [Host("model-a"), Host("model-b")]
    try:
        proxy.load({"/": hosts, "/models/m": models})
        seen = [
            proxy.request("POST", "/models/m/v1/responses", headers={"x-session-id": "alice"})[2]
            for _ in range(10)
        ]
    finally:
        for model in models:
            model.close()
    assert {answer["host"] for answer in seen} == {"model-a", "model-b"}
    assert all(haproxy.NEW_SESSION_HEADER not in answer["headers"] for answer in seen)


@pytest.fixture
def replicas() -> Iterator[list[Host]]:
    made = [Host(f"SERVE_REPLICA__model-m-LLMServer-{tag}") for tag in ("q1", "b2", "z3")]
    yield made
    for host in made:
        host.close()


@pytest.fixture
def router() -> Iterator[Host]:
    """Return what answers HAProxy in the place of Ray's router: with no replica's name."""
    made = Host("router")
    yield made
    made.close()


def call(proxy: Proxy, session: str | None = None) -> str:
    headers = {} if session is None else {"x-session-id": session}
    return proxy.request("POST", "/models/m/v1/chat", body={}, headers=headers)[2]["host"]


def test_a_session_stays_on_its_replica_of_a_model_and_few_move_when_one_leaves(
    proxy: Proxy, hosts: list[Host], replicas: list[Host], router: Host
) -> None:
    backends = {"/": hosts, "/models/m": replicas}
    proxy.load(backends, models="/models/m", routers={"/models/m": router})
    names = SESSIONS[:120]
    before = {name: call(proxy, name) for name in names}
    assert {name: call(proxy, name) for name in names} == before
    assert set(before.values()) == {replica.name for replica in replicas}
    # Calls without a session are spread, not hashed: no key would be one and the same replica.
    assert {call(proxy) for _ in range(12)} == {replica.name for replica in replicas}
    gone, *left = replicas
    proxy.load({**backends, "/models/m": left}, models="/models/m", routers={"/models/m": router})
    for name in names:
        assert before[name] == gone.name or call(proxy, name) == before[name]


def test_a_call_to_a_model_without_replicas_says_when_to_come_back(
    proxy: Proxy, hosts: list[Host]
) -> None:
    for backends in ({"/": hosts}, {"/": hosts, "/models/m": []}):
        proxy.load(backends, models="/models/m")
        status, headers, answer = proxy.request("POST", "/models/m/v1/chat", body={})
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert proxy.host_of("alice") in {host.name for host in hosts}


def test_a_call_to_a_model_that_starts_on_demand_is_held_by_rays_own_proxy(
    proxy: Proxy, hosts: list[Host], router: Host
) -> None:
    backends = {"/": hosts, "/models/m": []}
    proxy.load(backends, models="/models/m:on-demand", fallback=router)
    assert call(proxy, "alice") == router.name


def test_where_rays_router_is_to_pick_it_is_asked(
    proxy: Proxy, hosts: list[Host], replicas: list[Host]
) -> None:
    picker = Host("picker", picks=replicas[-1].name)
    try:
        backends = {"/": hosts, "/models/m": replicas}
        proxy.load(backends, models="/models/m:routed", routers={"/models/m": picker})
        assert {call(proxy, name) for name in SESSIONS[:10]} == {replicas[-1].name}
    finally:
        picker.close()
    # A router that does not answer fails the call, as Ray has it, in our words.
    status, _, answer = proxy.request("POST", "/models/m/v1/chat", body={})
    assert status == 503
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_request_for_a_dead_host_is_answered_by_another(proxy: Proxy, hosts: list[Host]) -> None:
    doomed = Host("SERVE_REPLICA__hosts-SessionHost-dead")
    proxy.load({"/": [*hosts, doomed]})
    name = next(name for name in SESSIONS if proxy.host_of(name) == doomed.name)
    doomed.close()
    assert proxy.host_of(name) in {host.name for host in hosts}


def test_without_hosts_the_error_is_json_and_says_when_to_come_back(proxy: Proxy) -> None:
    gone = Host("gone")
    gone.close()
    for backends in ({"/": [gone]}, {"/": []}, {"/models/m": []}):
        proxy.load(backends)
        status, headers, answer = proxy.request("POST", "/v1/responses", body={})
        assert status == 503
        assert headers["content-type"] == "application/json"
        assert int(headers["retry-after"]) >= 1
        assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_all_listeners_are_on_the_address_that_was_asked_for(front: Proxy) -> None:
    assert front.process is not None
    inodes = {
        link.readlink().name[8:-1]
        for link in Path(f"/proc/{front.process.pid}/fd").iterdir()
        if link.readlink().name.startswith("socket:[")
    }
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    addresses = {row[1] for row in listening if row[3] == "0A" and row[9] in inodes}
    assert len(addresses) == 3
    assert {address.split(":")[0] for address in addresses} == {"0100007F"}
