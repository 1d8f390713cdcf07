"""What programs reach of the network where the settings name hosts, and that it is nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agentray.app import tool_workers
from agentray.clock import SystemClock
from agentray.config.settings import Settings, ToolsSettings
from agentray.errors import SandboxUnavailableError, ToolError
from agentray.tools.code import ceiling
from agentray.tools.runner import Ask, Runner
from agentray.tools.sandbox.base import Limits, PythonCode, Run, Slot
from agentray.tools.sandbox.opening import open_slot
from agentray.tools.sandbox.serving import begin, end
from agentray.tools.spec import ToolResult
from agentray.tools.spec_runner import Place, SpecRunner
from agentray.tools.toolbox import open_toolbox

PATIENCE_S = 10.0
DIRECT = "urllib.request.build_opener(urllib.request.ProxyHandler({}))"


class World:
    """Servers of this machine, one of which programs may reach, and a worker's runners."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.held = asyncio.Event()
        self.port = 0
        self.echo_port = 0
        self.other_port = 0
        self._stack = contextlib.AsyncExitStack()

    async def open(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port, self.other_port = (address[1] for address in runner.addresses)
        echo = await asyncio.start_server(_echo, "127.0.0.1", 0)
        self._stack.callback(echo.close)
        self.echo_port = echo.sockets[0].getsockname()[1]

    async def close(self) -> None:
        await self._stack.aclose()

    async def _answer(self, request: web.Request) -> web.Response:
        self.seen.append(request.path)
        if request.path == "/held":
            self.held.set()
        if request.path == "/large":
            return web.Response(body=b"x" * 3_000_000)
        return web.Response(text=f"answer to {request.path}")

    async def runners(
        self, count: int = 1, *, tier: str = "jail", **tools: Any
    ) -> Sequence[Runner]:
        """Open what a worker with these settings runs code with."""
        allowed = [f"http://127.0.0.1:{self.port}", f"https://127.0.0.1:{self.echo_port}"]
        given = {"code": {"hosts": allowed}, "gateway": {"allow_private": allowed}}
        settings = ToolsSettings.model_validate({**given, "sandbox": {"tier": tier}, **tools})
        box = await open_toolbox(settings, breaker=_unused, clock=SystemClock())
        self._stack.push_async_callback(box.close)

        async def open_place(place: Place) -> Slot:
            specs = [spec for spec in box.specs if spec.program is not None]
            proxied = any(spec.network is not None for spec in specs)
            return await open_slot(place.tier, ceiling=ceiling(specs, place.tier), proxied=proxied)

        found = [SpecRunner(box, open_place) for _ in range(count)]
        for each in found:
            self._stack.push_async_callback(each.close)
        return found

    def facts(self, code: str) -> str:
        ports = f"PORT, ECHO, OTHER = {self.port}, {self.echo_port}, {self.other_port}\n"
        return f"import os, socket, time, urllib.request\n{ports}{code}"


def _unused(host: str) -> Any:
    raise AssertionError(host)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while part := await reader.read(65536):
            writer.write(part)
            await writer.drain()
    writer.close()


async def run(runner: Runner, code: str, tool: str = "python", tenant: str = "acme") -> ToolResult:
    argument = {"python": "code", "shell": "script"}[tool]
    body = json.dumps({argument: code}).encode()
    return await asyncio.wait_for(runner.run(Ask(tenant, "s", 1, "key", tool, body)), 60)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.open()
    yield world
    await world.close()


@pytest.mark.parametrize("tier", ["jail", "process"])
async def test_a_program_reaches_a_listed_host(world: World, tier: str) -> None:
    (runner,) = await world.runners(tier=tier)
    code = world.facts("print(urllib.request.urlopen(f'http://127.0.0.1:{PORT}/a').read())")
    for _ in range(3):
        result = await run(runner, code)
        assert (result.status, result.output) == ("ok", "b'answer to /a'")


async def test_a_worker_opens_sandboxes_that_lead_to_the_hosts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How many there are is asked of Ray, which is not needed for anything else here.
    monkeypatch.setattr(tool_workers, "_nodes", lambda: 1)
    hosts = [f"http://127.0.0.1:{world.port}"]
    tools = {"code": {"hosts": hosts}, "gateway": {"allow_private": hosts}}
    (runner,) = await tool_workers.WorkerTools(Settings.model_validate({"tools": tools}))(1)
    try:
        code = world.facts("print(urllib.request.urlopen(f'http://127.0.0.1:{PORT}/a').read())")
        assert (await run(runner, code)).output == "b'answer to /a'"
    finally:
        await runner.close()


async def test_a_shell_reaches_a_listed_host(world: World) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    (runner,) = await world.runners()
    result = await run(runner, f"curl -sS http://127.0.0.1:{world.port}/b", "shell")
    assert (result.status, result.output) == ("ok", "answer to /b")
    result = await run(runner, f"curl -sS http://127.0.0.1:{world.other_port}/b", "shell")
    assert "is no host" in result.output
    result = await run(runner, "curl -sS https://evil.example/", "shell")
    assert "403" in result.output


async def test_a_tunnel_leads_to_a_listed_host(world: World) -> None:
    (runner,) = await world.runners()
    code = """
import http.client
link = http.client.HTTPConnection("127.0.0.1", 3128)
link.set_tunnel("127.0.0.1", ECHO)
link.connect()
link.sock.sendall(b"x" * 200_000)
link.sock.shutdown(socket.SHUT_WR)
got = b""
while part := link.sock.recv(65536):
    got += part
print(len(got))
"""
    assert (await run(runner, world.facts(code))).output == "200000"


async def test_nothing_else_is_reached(world: World) -> None:
    (runner,) = await world.runners()
    code = """
def through(url):
    return urllib.request.urlopen(url, timeout=5).read()

def directly(host, port):
    return socket.create_connection((host, port), 5)

def tunnel(target):
    link = socket.create_connection(("127.0.0.1", 3128), 5)
    link.sendall(f"CONNECT {target} HTTP/1.1\\r\\n\\r\\n".encode())
    answer = link.recv(1000).decode()
    if " 200 " not in answer:
        raise OSError(answer.splitlines()[0])

for name, attempt in {
    "another host": lambda: through("http://evil.example/"),
    "another port": lambda: through(f"http://127.0.0.1:{OTHER}/"),
    "metadata": lambda: through("http://169.254.169.254/latest/meta-data"),
    "https": lambda: through("https://evil.example/"),
    "a tunnel to another port": lambda: tunnel(f"127.0.0.1:{OTHER}"),
    "a tunnel to plain http": lambda: tunnel(f"127.0.0.1:{PORT}"),
    "a tunnel to metadata": lambda: tunnel("169.254.169.254:443"),
    "the host itself": lambda: directly("127.0.0.1", PORT),
    "the other port itself": lambda: directly("127.0.0.1", OTHER),
    "metadata itself": lambda: directly("169.254.169.254", 80),
    "a public address": lambda: directly("93.184.215.14", 80),
    "another loopback address": lambda: directly("127.0.0.2", 3128),
    "a name": lambda: socket.getaddrinfo("example.com", 80),
    "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "IPv6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
    "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "MPTCP": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262),
    "a port of its choice": lambda: socket.create_server(("127.0.0.1", 8000)),
}.items():
    try:
        attempt()
    except OSError as error:
        print("refused:", name, error)
    else:
        print("REACHED:", name)
"""
    result = await run(runner, world.facts(code))
    assert "REACHED" not in result.output
    assert result.output.count("refused:") == 20, result.output
    assert world.seen == []


async def test_a_program_may_serve_itself(world: World) -> None:
    (runner,) = await world.runners()
    code = """
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
client.sendall(b"own")
print(server.accept()[0].recv(10))
"""
    assert (await run(runner, world.facts(code))).output == "b'own'"


async def test_bytes_past_the_cap_end_and_the_next_call_has_its_own(world: World) -> None:
    (runner,) = await world.runners()
    code = """
total = 0
try:
    for _ in range(3):
        total += len(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/large").read())
except Exception as error:
    print(type(error).__name__, total)
try:
    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/a")
except OSError as error:
    print(error)
"""
    for _ in range(2):
        result = await run(runner, world.facts(code))
        assert result.output.split()[:2] == ["ConnectionResetError", "3000000"], result.output
        assert "more bytes than it may" in result.output


async def test_two_slots_do_not_see_each_others_network(world: World) -> None:
    one, other = await world.runners(2)
    code = """
server = socket.create_server(("127.0.0.1", 65535))
server.settimeout(2)
print(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/held").status)
try:
    server.accept()
except TimeoutError:
    print("alone")
"""
    held = asyncio.create_task(run(one, world.facts(code)))
    await asyncio.wait_for(world.held.wait(), PATIENCE_S)
    code = """
try:
    socket.create_connection(("127.0.0.1", 65535), 2)
except ConnectionRefusedError:
    print("nobody")
"""
    assert (await run(other, world.facts(code))).output == "nobody"
    assert (await held).output == "200\nalone"


async def test_what_a_call_leaves_open_ends_with_it(world: World) -> None:
    (runner,) = await world.runners()
    code = """
held = []
try:
    for _ in range(200):
        held.append(socket.create_connection(("127.0.0.1", 3128), 0.2))
except OSError as error:
    print(len(held))
    if os.fork() == 0:
        time.sleep(60)
"""
    before = _connections()
    for _ in range(3):
        # Its own ports end before its descriptors do.
        assert int((await run(runner, world.facts(code))).output) < 40
        # What is parked has its listener, and nothing else is left.
        assert _connections() <= before + 2
    code = world.facts("print(urllib.request.urlopen(f'http://127.0.0.1:{PORT}/a').status)")
    assert (await run(runner, code)).output == "200"


async def test_who_waits_from_the_run_before_is_not_served() -> None:
    served: list[bytes] = []

    async def network(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            with connection:
                served.append(await loop.sock_recv(connection, 10))

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as stale,
    ):
        stale.sendall(b"stale")
        serving = begin(listener, network)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"new")
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()
        await end(serving)
    assert served == [b"new"]


def _connections() -> int:
    """Count the sockets of TCP that this process holds, whatever their namespace."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(each.name))) as own:
            found += own.family == socket.AF_INET
    return found


async def test_a_killed_call_and_a_flood_do_not_break_the_slot(world: World) -> None:
    code = """
import threading
def flood():
    while True:
        try:
            link = socket.create_connection(("127.0.0.1", 3128))
            link.sendall(b"nonsense" * 10_000)
        except OSError:
            pass
for _ in range(8):
    threading.Thread(target=flood).start()
"""
    hosts = [f"http://127.0.0.1:{world.port}"]
    (runner,) = await world.runners(code={"hosts": hosts, "wall_s": 1.0})
    assert (await run(runner, world.facts(code))).reason == "timeout"
    code = world.facts("print(urllib.request.urlopen(f'http://127.0.0.1:{PORT}/a').status)")
    assert (await run(runner, code)).output == "200"


async def test_buffers_of_connections_are_bounded(world: World) -> None:
    (runner,) = await world.runners()
    code = """
sent = count = 0
server = socket.create_server(("127.0.0.1", 0), backlog=4096)
server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
held = []
try:
    while time.monotonic() < began + 5:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
        link.settimeout(0.2)
        link.connect(server.getsockname())
        link.setblocking(False)
        try:
            while True:
                sent += link.send(b"x" * 65536)
        except BlockingIOError:
            pass
        count += 1
        # What was sent stays there without a descriptor.
        link.close()
except OSError as error:
    pass
print(count, sent)
"""
    result = await run(runner, world.facts("began = time.monotonic()\n" + code))
    count, sent = map(int, result.output.split())
    assert 0 < count <= 40, result.output
    assert sent < 40 * 128 * 1024, result.output


async def test_what_waits_at_a_listener_is_bounded_without_a_network_too() -> None:
    code = """
import socket
server = socket.socket(socket.AF_UNIX)
server.bind("s")
server.listen(4096)
count = 0
try:
    while count < 100:
        link = socket.socket(socket.AF_UNIX)
        link.setblocking(False)
        link.connect("s")
        # What it sends would stay without a descriptor.
        link.close()
        count += 1
except BlockingIOError:
    pass
print(count)
"""
    ceiling = Limits(wall_s=10.0)
    slot = await open_slot("jail", ceiling=ceiling)
    try:
        outcome = await slot.run(Run(PythonCode(code), ceiling))
        assert 0 < int(outcome.stdout) < 20
    finally:
        await slot.close()


@pytest.mark.parametrize("hosts", [[], None])
async def test_without_the_setting_there_is_nothing(world: World, hosts: list[str] | None) -> None:
    (runner,) = await world.runners(code={} if hosts is None else {"hosts": hosts})
    code = """
print([name for name in os.environ if "proxy" in name.lower()])
for family in (socket.AF_INET, socket.AF_INET6):
    try:
        socket.socket(family)
    except OSError as error:
        print(error.errno)
"""
    assert (await run(runner, world.facts(code))).output == "[]\n97\n97"


async def test_a_slot_gives_a_way_out_to_runs_that_have_one_only() -> None:
    ceiling = Limits(wall_s=10.0)
    slot = await open_slot("jail", ceiling=ceiling, proxied=True)
    try:
        code = "import socket\nprint(socket.create_connection(('127.0.0.1', 3128), 5).recv(9))"
        assert (await slot.run(Run(PythonCode(code), ceiling))).stdout == b"b''\n"
    finally:
        await slot.close()

    async def network(listener: socket.socket) -> None:
        pass

    slot = await open_slot("jail", ceiling=ceiling)
    try:
        with pytest.raises(ToolError, match="network"):
            await slot.run(Run(PythonCode(""), ceiling, network=network))
    finally:
        await slot.close()
    with pytest.raises(SandboxUnavailableError, match="no network yet"):
        await open_slot("gvisor", proxied=True)
