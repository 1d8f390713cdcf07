"""The proxy of sandboxed programs against real sockets: what it lets out, what it says if not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from aiohttp import web

from agentray.clock import SystemClock
from agentray.config.tool_settings import GatewaySettings
from agentray.tools.forward import ForwardProxy
from agentray.tools.gateway import Gateway
from agentray.tools.hosts import host_rule
from agentray.tools.secrets import Secrets

PATIENCE_S = 10.0


class World:
    """A server, a name service, and a proxy for one call of a tenant."""

    def __init__(self) -> None:
        self.names: dict[str, Sequence[str]] = {"api.test": ["127.0.0.1"]}
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.tunnels = 0
        self.cut = asyncio.Event()
        self.port = 0
        self.echo_port = 0
        self._stack = contextlib.AsyncExitStack()

    async def lookup(self, host: str, port: int) -> Sequence[str]:
        if host not in self.names:
            raise OSError("there is no such name")
        return self.names[host]

    async def open(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        echo = await asyncio.start_server(self._echo, "127.0.0.1", 0)
        self._stack.callback(echo.close)
        self.echo_port = echo.sockets[0].getsockname()[1]

    async def close(self) -> None:
        await self._stack.aclose()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request.path_qs, dict(request.headers), await request.read()))
        if request.path == "/large":
            return web.Response(body=b"x" * 1_000_000)
        if request.path == "/away":
            return web.Response(status=302, headers={"Location": "http://evil.test/"})
        return web.Response(text=f"{request.method} {request.path_qs}", headers={"X-Own": "1"})

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tunnels += 1
        try:
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()
        except OSError:
            pass
        finally:
            self.cut.set()
            writer.close()

    def gateway(self, **settings: Any) -> Gateway:
        own = [f"http://api.test:{self.port}", f"https://api.test:{self.echo_port}"]
        return Gateway(
            GatewaySettings.model_validate({"allow_private": own} | settings),
            hosts=[host_rule("http://tools-only.test")],
            secrets=Secrets({}),
            breaker=lambda _: pytest.fail("programs have no breaker"),
            clock=SystemClock(),
            lookup=self.lookup,
        )

    @contextlib.asynccontextmanager
    async def proxy(
        self, gateway: Gateway | None = None, *, hosts: Sequence[str] = (), **settings: Any
    ) -> AsyncIterator[int]:
        """Serve one call; yields the proxy's port."""
        gateway = gateway or self.gateway(**settings)
        texts = hosts or (f"http://api.test:{self.port}", f"https://api.test:{self.echo_port}")
        transfer = gateway.transfer("acme", 30)
        proxy = ForwardProxy(gateway, [host_rule(each) for each in texts], transfer, SystemClock())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(proxy.serve(listener))
            try:
                yield listener.getsockname()[1]
            finally:
                serving.cancel()
                await asyncio.wait([serving], timeout=PATIENCE_S)
                assert serving.cancelled()
                await gateway.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.open()
    yield world
    await world.close()


async def ask(port: int, request: bytes) -> bytes:
    """Send a request and return all that comes back until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                writer.write(request)
                await writer.drain()
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := await reader.read(65536):
                    answer += part
            return answer
    finally:
        writer.close()


def get(url: str, headers: str = "") -> bytes:
    return f"GET {url} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def tunnel(port: int, target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
    assert status(head) == 200, head
    return reader, writer


async def test_a_request_goes_to_its_host_whatever_it_says_of_another(world: World) -> None:
    async with world.proxy() as port:
        url = f"http://api.test:{world.port}/a?b=%20c"
        answer = await ask(port, get(url, "X-Mine: 1\r\nProxy-Authorization: Basic eA==\r\n"))
    assert status(answer) == 200
    assert answer.endswith(b"GET /a?b=%20c")
    assert b"x-own: 1" in answer.lower()
    ((path, headers, _),) = world.seen
    assert path == "/a?b=%20c"
    assert headers["Host"] == f"api.test:{world.port}"
    assert headers["x-mine"] == "1"
    assert not any(name.lower().startswith("proxy") for name in headers)
    # The program's own, or none.
    assert "User-Agent" not in headers


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
async def test_a_body_arrives_and_what_follows_it_does_not(world: World, body: bytes) -> None:
    async with world.proxy() as port:
        head = f"POST http://api.test:{world.port}/p HTTP/1.1\r\nHost: x\r\n".encode()
        answer = await ask(port, head + body + get("/smuggled"))
    assert answer.endswith(b"POST /p")
    assert [(path, content) for path, _, content in world.seen] == [("/p", b"hello")]


async def test_a_tunnel_carries_both_ways_and_each_end_by_itself(world: World) -> None:
    async with world.proxy() as port:
        reader, writer = await tunnel(port, f"api.test:{world.echo_port}")
        writer.write(b"x" * 300_000)
        writer.write_eof()
        assert len(await asyncio.wait_for(reader.read(-1), PATIENCE_S)) == 300_000
        writer.close()
        early = f"CONNECT api.test:{world.echo_port} HTTP/1.0\r\n\r\nsent early".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(early)
        assert await asyncio.wait_for(reader.readuntil(b"sent early"), PATIENCE_S)
        writer.close()


@pytest.mark.parametrize(
    ("request_line", "expected", "said"),
    [
        ("GET http://evil.test/ HTTP/1.1", 403, b"http://evil.test is no host"),
        ("GET http://api.test/ HTTP/1.1", 403, b"http://api.test is no host"),
        ("GET http://tools-only.test/ HTTP/1.1", 403, b"is no host"),
        ("GET http://169.254.169.254/latest/meta-data HTTP/1.1", 403, b"is no host"),
        ("CONNECT evil.test:443 HTTP/1.1", 403, b"https://evil.test is no host"),
        ("CONNECT 127.0.0.1:22 HTTP/1.1", 403, b"is no host"),
        ("CONNECT api.test HTTP/1.1", 403, b"HOST:PORT"),
        ("GET / HTTP/1.1", 403, b"no http or https address"),
        ("GET https://api.test/ HTTP/1.1", 403, b"CONNECT"),
        ("GET http://user@api.test/ HTTP/1.1", 403, b"has a user"),
        ("GET http://api.test/\xff HTTP/1.1", 400, b""),
        ("nonsense", 400, b""),
        ("GET / HTTP/1.1\r\nX: " + "x" * 100_000, 431, b""),
    ],
)
async def test_what_is_not_let_through_is_answered_with_the_reason(
    world: World, request_line: str, expected: int, said: bytes
) -> None:
    async with world.proxy() as port:
        host = "\r\nHost: x\r\n\r\n"
        answer = await ask(port, (request_line + host).encode("latin-1"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status(answer) == expected, answer
    assert said in body
    # Clients show nothing but the status line of a tunnel that was refused.
    assert said in head.split(b"\r\n")[0]
    assert world.seen == []
    assert world.tunnels == 0


async def test_addresses_are_judged_after_names_are_looked_up(world: World) -> None:
    world.names |= {
        "private.test": ["127.0.0.1"],
        "both.test": ["93.184.215.14", "10.0.0.1"],
        "metadata.test": ["169.254.169.254"],
    }
    open_to = [f"{scheme}://{host}:{world.port}" for scheme in ("http", "https") for host in (
        "private.test", "both.test", "metadata.test", "127.0.0.1")]  # fmt: skip
    # Metadata is refused even where private addresses are allowed.
    private = [f"{scheme}://metadata.test:{world.port}" for scheme in ("http", "https")]
    async with world.proxy(hosts=open_to, allow_private=private) as port:
        for host in ("private.test", "both.test", "metadata.test", "127.0.0.1"):
            answer = await ask(port, get(f"http://{host}:{world.port}/"))
            assert status(answer) == 403, answer
            line = f"CONNECT {host}:{world.port} HTTP/1.1\r\nHost: x\r\n\r\n"
            assert status(await ask(port, line.encode())) == 403
    assert world.seen == []


async def test_a_host_that_does_not_answer_is_said_to_be_so(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = closed.getsockname()[1]
    world.names["gone.test"] = ["127.0.0.1"]
    hosts = [f"{scheme}://{name}:{gone}" for scheme in ("http", "https") for name in (
        "gone.test", "nowhere.test")]  # fmt: skip
    async with world.proxy(hosts=hosts, allow_private=hosts) as port:
        for name in ("gone.test", "nowhere.test"):
            assert status(await ask(port, get(f"http://{name}:{gone}/"))) == 502
            line = f"CONNECT {name}:{gone} HTTP/1.1\r\nHost: x\r\n\r\n"
            answer = await ask(port, line.encode())
            assert status(answer) == 502
            assert b"could not be reached" in answer


async def test_redirects_are_the_programs_own_business(world: World) -> None:
    async with world.proxy() as port:
        answer = await ask(port, get(f"http://api.test:{world.port}/away"))
        assert status(answer) == 302
        assert b"http://evil.test/" in answer
        assert status(await ask(port, get("http://evil.test/"))) == 403


async def test_bytes_past_the_calls_are_cut_off_and_then_refused(world: World) -> None:
    async with world.proxy(call_bytes=200_000) as port:
        url = f"http://api.test:{world.port}/large"
        answer = await ask(port, get(url))
        assert status(answer) == 200
        assert len(answer) < 250_000
        answer = await ask(port, get(f"http://api.test:{world.port}/"))
        assert status(answer) == 403
        assert b"more bytes than it may" in answer
    async with world.proxy(call_bytes=200_000) as port:
        reader, writer = await tunnel(port, f"api.test:{world.echo_port}")
        writer.write(b"x" * 300_000)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reader.read(-1), PATIENCE_S)
        writer.close()


async def test_a_day_of_a_tenant_is_shared_by_its_calls(world: World) -> None:
    gateway = world.gateway(tenant_bytes_per_day=150_000)
    async with world.proxy(gateway) as port:
        answer = await ask(port, get(f"http://api.test:{world.port}/large"))
        assert 50_000 < len(answer) < 200_000
    async with world.proxy(gateway) as port:
        head = f"POST http://api.test:{world.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 50000"
        answer = await ask(port, f"{head}\r\n\r\n{'x' * 50_000}".encode())
        assert status(answer) == 403
        assert b"The bytes of this day are used up." in answer


async def test_bytes_come_no_faster_than_they_may(world: World) -> None:
    async with world.proxy(call_bytes_per_s=1_000_000) as port:
        began = asyncio.get_running_loop().time()
        await ask(port, get(f"http://api.test:{world.port}/large"))
        # Half a second's worth is there at once.
        assert asyncio.get_running_loop().time() - began > 0.4


async def test_too_many_requests_to_a_host_are_refused(world: World) -> None:
    async with world.proxy(requests_per_s=0.01, burst=2) as port:
        answers = [await ask(port, get(f"http://api.test:{world.port}/{n}")) for n in range(3)]
    assert [status(each) for each in answers] == [200, 200, 403]
    assert b"Too many requests" in answers[2]


async def test_connections_at_once_are_few_and_the_next_wait(world: World) -> None:
    async with world.proxy() as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
        waiting = asyncio.create_task(ask(port, get(f"http://api.test:{world.port}/")))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done
        idle[0][1].close()
        assert status(await waiting) == 200
        for _, writer in idle[1:]:
            writer.close()


async def test_with_the_call_all_its_connections_end(world: World) -> None:
    async with world.proxy() as port:
        reader, writer = await tunnel(port, f"api.test:{world.echo_port}")
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        assert world.tunnels == 1
        assert not world.cut.is_set()
    for end in (reader, idle):
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(end.read(-1), PATIENCE_S) == b""
    await asyncio.wait_for(world.cut.wait(), PATIENCE_S)
    writer.close()
    idle_writer.close()
