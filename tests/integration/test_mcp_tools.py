"""MCP servers, a real one and many that misbehave, as tools."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentray.config.settings import McpSettings
from agentray.errors import ToolError
from agentray.models.checks import schema_problem
from agentray.tools.egress import Lookup, look_up
from agentray.tools.mcp import McpServers
from agentray.tools.mcp_launch import Launcher, ProcessLauncher, Started
from agentray.tools.sandbox.launch import JailLauncher
from agentray.tools.spec import ToolContext, ToolSpec
from tests.services import until

HERE = Path(__file__).parent
CONTEXT = ToolContext("acme", "s1", "k1")


class Plain(ProcessLauncher):
    """Plain processes, whose ids tests want to know."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    async def start(self, argv: Any, env: Any) -> Started:
        started = await super().start(argv, env)
        self.pids.append(started._process.pid)  # type: ignore[attr-defined]
        return started


class Servers:
    """One server named ``it``, and what was heard of its tools."""

    def __init__(self, settings: dict[str, Any], lookup: Lookup = look_up) -> None:
        self.launcher = Plain()
        self.mark = "of nothing that runs here"
        self.heard: list[tuple[list[str], tuple[str, ...]]] = []
        self.all = McpServers(
            {"it": McpSettings.model_validate(settings)},
            launchers=self._launcher,
            schema_problem=schema_problem,
            changed=self._changed,
            lookup=lookup,
        )

    def _launcher(self, asked: McpSettings) -> Launcher:
        if asked.sandbox == "process":
            return self.launcher
        return JailLauncher(paths=asked.paths, network=asked.network)

    def _changed(self, specs: list[ToolSpec], instead_of: tuple[str, ...]) -> None:
        self.heard.append(([spec.name for spec in specs], instead_of))

    async def call(self, tool: str, **arguments: Any) -> str:
        run = self.all.run(f"it__{tool}")
        assert run is not None
        return await run(arguments, CONTEXT)

    async def error(self, tool: str, **arguments: Any) -> ToolError:
        with pytest.raises(ToolError) as caught:
            await self.call(tool, **arguments)
        return caught.value

    def names(self) -> list[str]:
        return [spec.name.removeprefix("it__") for spec in self.all.specs()]


Start = Callable[..., Servers]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """What makes a server of a script beside this one, not started yet."""
    made: list[Servers] = []

    def make(script: str, *args: str, **settings: Any) -> Servers:
        mark = f"mark-{uuid.uuid4().hex}"
        command = {"command": sys.executable, "args": (str(HERE / script), *args, mark)}
        servers = Servers({"sandbox": "process", **command, **settings})
        servers.mark = mark
        made.append(servers)
        return servers

    yield make
    for servers in made:
        await servers.all.close()
        assert not any(map(runs, servers.launcher.pids)), "a server outlived its session"
        assert not marked(servers.mark), "a jailed server outlived its session"


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def marked(mark: str) -> int:
    """How many processes of this machine have been given this, in whatever jail they are."""
    found = 0
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += mark.encode() in each.read_bytes()
    return found


def real(start: Start, **settings: Any) -> Servers:
    return start("mcp_server.py", "stdio", **settings)


def bad(start: Start, name: str, **settings: Any) -> Servers:
    return start("bad_mcp_server.py", name, **settings)


async def test_a_server_is_started_by_the_first_call_and_once(start: Start) -> None:
    servers = real(start)
    assert servers.launcher.pids == []
    found = await asyncio.gather(*(servers.call("add", a=n, b=1) for n in range(20)))
    assert found == [str(n + 1) for n in range(20)]
    assert len(servers.launcher.pids) == 1


async def test_tools_are_listed_with_schema_and_what_a_crash_means(start: Start) -> None:
    servers = real(start)
    await servers.all.start()
    specs = {spec.name: spec for spec in servers.all.specs()}
    assert specs["it__add"].parameters["required"] == ["a", "b"]
    assert specs["it__add"].description == "Adds two numbers."
    assert specs["it__add"].on_crash == "retry"
    assert specs["it__die"].on_crash == "report"


async def test_only_the_tools_that_are_asked_for_are_offered(start: Start) -> None:
    servers = real(start, tools=("add",))
    await servers.all.start()
    assert servers.names() == ["add"]
    assert (await servers.error("die")).fields["reason"] == "refused"


async def test_results_are_text_and_bounded(start: Start) -> None:
    servers = real(start, max_output_bytes=1_000)
    assert await servers.call("picture") == "[image: image/png, about 402 bytes; not shown]"
    found = await servers.call("long", size=5_000)
    assert found == "x" * 1_000 + "\n[cut here: 4000 more bytes are not shown]"
    error = await servers.error("fail")
    assert error.fields["reason"] == "error"
    assert "fail" in error.message


async def test_a_server_sees_the_environment_that_it_was_given_and_no_more(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_SECRET", "hush")
    servers = real(start, env={"TOKEN": "t0ken"})
    assert await servers.call("environment", name="TOKEN") == "t0ken"
    assert await servers.call("environment", name="OTHER_SECRET") == "not there"


async def test_a_changed_list_is_told(start: Start) -> None:
    servers = real(start)
    await servers.all.start()
    before = servers.names()
    await servers.call("grow")

    async def told() -> bool:
        return len(servers.heard) == 2

    await until(told, "the new list")
    names, instead_of = servers.heard[1]
    assert set(names) - set(instead_of) == {"it__grown"}
    assert [name.removeprefix("it__") for name in instead_of] == before
    assert await servers.call("grown") == "grown"


async def test_a_call_on_a_server_that_dies_fails_and_the_next_finds_a_new_one(
    start: Start, tmp_path: Path
) -> None:
    servers = real(start)
    slow = asyncio.ensure_future(servers.error("slow", path=str(tmp_path / "slow")))
    await until(lambda: exists(tmp_path / "slow.begun"), "the slow call has begun")
    assert (await servers.error("die")).fields["reason"] == "upstream"
    assert (await slow).fields["reason"] == "upstream"
    assert await servers.call("add", a=1, b=2) == "3"
    assert len(servers.launcher.pids) == 2


async def exists(path: Path) -> bool:
    return await asyncio.to_thread(path.exists)


async def test_a_server_that_is_killed_between_calls_is_started_again(start: Start) -> None:
    servers = real(start)
    await servers.call("add", a=1, b=2)
    [pid] = servers.launcher.pids
    os.kill(pid, 9)

    async def noticed() -> bool:
        try:
            return await servers.call("add", a=2, b=2) == "4"
        except ToolError:
            return False

    await until(noticed, "a call that works")
    assert len(servers.launcher.pids) == 2


async def test_a_cancelled_call_is_cancelled_at_the_server(start: Start, tmp_path: Path) -> None:
    servers = real(start)
    call = asyncio.ensure_future(servers.call("slow", path=str(tmp_path / "slow")))
    await until(lambda: exists(tmp_path / "slow.begun"), "the call has begun")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: exists(tmp_path / "slow.cancelled"), "the server hears of it")
    assert await servers.call("add", a=1, b=2) == "3"


async def test_a_call_that_takes_too_long_is_cancelled_and_the_server_kept(
    start: Start, tmp_path: Path
) -> None:
    servers = real(start, timeout_s=1.0)
    error = await servers.error("slow", path=str(tmp_path / "slow"))
    assert error.fields["reason"] == "timeout"
    await until(lambda: exists(tmp_path / "slow.cancelled"), "the server hears of it")
    assert await servers.call("add", a=1, b=2) == "3"
    assert len(servers.launcher.pids) == 1


async def test_calls_wait_for_each_other_where_the_server_takes_few(
    start: Start, tmp_path: Path
) -> None:
    servers = real(start, max_concurrent=1)
    slow = asyncio.ensure_future(servers.call("slow", path=str(tmp_path / "a"), seconds=0.3))
    await until(lambda: exists(tmp_path / "a.begun"), "the first has begun")
    second = asyncio.ensure_future(servers.call("slow", path=str(tmp_path / "b"), seconds=0))
    assert await slow == "slept"
    assert not (tmp_path / "b.begun").exists()
    assert await second == "slept"


def jailed(start: Start, **settings: Any) -> Servers:
    paths = (sys.prefix, str(HERE))
    return real(start, sandbox="jail", **{"paths": paths, "timeout_s": 20, **settings})


async def test_a_jailed_server_sees_its_paths_alone_and_is_started_again(
    start: Start, tmp_path: Path
) -> None:
    servers = jailed(start, env={"TOKEN": "t0ken"})
    await servers.all.start()
    assert "add" in servers.names()
    assert await servers.call("add", a=1, b=2) == "3"
    assert await servers.call("environment", name="TOKEN") == "t0ken"
    assert await servers.call("look", path=str(HERE / "mcp_server.py")) == "there"
    for hidden in (HERE.parent / "services.py", tmp_path, Path("/etc/shadow")):
        assert await asyncio.to_thread(hidden.exists)
        assert await servers.call("look", path=str(hidden)) == "not there"
    assert await servers.call("user") != "0"
    assert (await servers.error("die")).fields["reason"] == "upstream"
    assert await servers.call("add", a=2, b=2) == "4"


async def test_a_jailed_server_ends_with_all_that_it_has_started(start: Start) -> None:
    servers = jailed(start)
    assert await servers.call("leave", mark=servers.mark) == "left"

    async def both() -> bool:
        return marked(servers.mark) >= 2

    await until(both, "the server and what it has left run")
    call = asyncio.ensure_future(servers.error("slow", path="slow"))

    async def amid() -> bool:
        return await servers.call("look", path="slow.begun") == "there"

    await until(amid, "a call has begun")
    await servers.all.close()
    assert marked(servers.mark) == 0
    assert (await call).fields["reason"] in ("upstream", "refused")


async def test_a_jailed_server_that_dies_leaves_nothing(start: Start) -> None:
    servers = jailed(start)
    await servers.call("leave", mark=servers.mark)
    assert (await servers.error("die")).fields["reason"] == "upstream"

    async def none() -> bool:
        return marked(servers.mark) == 0

    await until(none, "what the server has left is ended")


async def test_a_jailed_server_reaches_the_network_only_where_that_is_said(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert await jailed(start).call("reach", port=port) == "not reached"
        assert await jailed(start, network=True).call("reach", port=port) == "reached"


async def test_a_jailed_server_whose_paths_are_not_there_fails_its_calls(start: Start) -> None:
    servers = jailed(start, paths=("/nowhere/at-all",), start_timeout_s=5)
    assert (await servers.error("add", a=1, b=2)).fields["reason"] == "upstream"


async def test_garbage_on_standard_output_is_passed_over(start: Start) -> None:
    assert await bad(start, "garbage").call("go") == "went"


async def test_a_request_of_the_server_is_refused(start: Start) -> None:
    assert await bad(start, "asks").call("go") == "refused"


@pytest.mark.parametrize("name", ["flood", "endless", "nested", "invalid"])
async def test_a_server_that_sends_what_it_may_not_fails_its_call_alone(
    start: Start, name: str
) -> None:
    servers, other = bad(start, name, timeout_s=2.0), real(start)
    await other.call("add", a=1, b=2)
    call = asyncio.ensure_future(servers.error("go"))
    worst = 0.0
    while not call.done():
        began = time.monotonic()
        assert await other.call("add", a=1, b=2) == "3"
        worst = max(worst, time.monotonic() - began)
    assert (await call).fields["reason"] in ("upstream", "timeout")
    assert worst < 1.5


async def test_a_message_that_is_too_large_is_not_taken_in(start: Start) -> None:
    servers = bad(start, "huge", max_message_bytes=2_000_000)
    assert (await servers.error("go")).fields["reason"] == "upstream"
    assert len(await bad(start, "huge").call("go")) < 70_000


async def test_a_server_that_never_says_a_word_fails_in_time(start: Start) -> None:
    servers = bad(start, "silent", start_timeout_s=0.5)
    began = time.monotonic()
    assert (await servers.error("go")).fields["reason"] == "upstream"
    assert time.monotonic() - began < 5


async def test_a_server_that_hangs_is_replaced(start: Start) -> None:
    servers = bad(start, "deaf", timeout_s=0.3)
    assert (await servers.error("go")).fields["reason"] == "timeout"
    [pid] = servers.launcher.pids

    async def ended() -> bool:
        return not runs(pid)

    await until(ended, "the hung server is ended")


async def test_a_command_that_is_not_there_fails_and_is_tried_again(start: Start) -> None:
    servers = start("nothing", command="/nowhere/at-all")
    began = time.monotonic()
    await servers.all.start()
    for _ in range(2):
        assert (await servers.error("go")).fields["reason"] == "upstream"
    assert 0.4 < time.monotonic() - began < 5


async def test_names_are_fit_for_models_and_unusable_tools_are_left_out(start: Start) -> None:
    servers = bad(start, "tools")
    await servers.all.start()
    names = [spec.name for spec in servers.all.specs()]
    assert len(set(names)) == len(names) == 3
    assert all(len(name) <= 64 and name.replace("-", "_").isidentifier() for name in names)
    assert names[0].startswith("it__files_read_file_")
    assert await servers.call(names[0].removeprefix("it__")) == "went"


async def test_a_list_of_tools_against_the_protocol_is_logged_with_its_place(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    servers = bad(start, "list")
    await servers.all.start()
    assert servers.names() == []
    [record] = [one for one in caplog.records if one.getMessage() == "mcp_server_failed"]
    assert "tools.1.inputSchema.type" in str(vars(record))


async def test_pages_of_tools_come_to_an_end(start: Start) -> None:
    servers = bad(start, "pages", max_tools=20)
    await servers.all.start()
    assert servers.names() == [f"go{number}" for number in range(20)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A real server that speaks HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "mcp_server.py"), "http", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/mcp"
    process.terminate()
    process.wait()


@pytest.fixture
async def remote(address: str) -> AsyncIterator[Callable[..., Servers]]:
    """What makes a connection to the real server, not connected yet."""
    made: list[Servers] = []

    def make(url: str = address, lookup: Lookup = look_up, **settings: Any) -> Servers:
        made.append(Servers({"url": url, "private": True, **settings}, lookup))
        return made[-1]

    yield make
    for servers in made:
        await servers.all.close()


async def test_a_server_is_reached_over_http(remote: Start) -> None:
    servers = remote()
    await servers.all.start()
    assert "add" in servers.names()
    assert await servers.call("add", a=1, b=2) == "3"
    assert (await servers.error("fail")).fields["reason"] == "error"


async def test_a_call_over_http_is_cancelled_at_the_server(remote: Start, tmp_path: Path) -> None:
    servers = remote()
    call = asyncio.ensure_future(servers.call("slow", path=str(tmp_path / "slow")))
    await until(lambda: exists(tmp_path / "slow.begun"), "the call has begun")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: exists(tmp_path / "slow.cancelled"), "the server hears of it")


async def test_a_message_over_http_that_is_too_large_is_not_taken_in(remote: Start) -> None:
    servers = remote(max_message_bytes=100_000)
    assert (await servers.error("long", size=500_000)).fields["reason"] == "upstream"
    assert await servers.call("add", a=1, b=2) == "3"


async def test_a_private_address_is_refused_unless_it_is_configured(
    remote: Start, address: str
) -> None:
    servers = remote(private=False)
    assert (await servers.error("add", a=1, b=2)).fields["reason"] == "upstream"
    metadata = remote("http://169.254.169.254/mcp")
    assert (await metadata.error("add", a=1, b=2)).fields["reason"] == "upstream"


async def test_a_name_with_an_address_that_leads_nowhere_is_tried_at_the_next(
    remote: Start, address: str
) -> None:
    async def lookup(host: str, port: int) -> list[str]:
        assert host == "localhost"
        return ["::1", "127.0.0.1"]

    servers = remote(address.replace("127.0.0.1", "localhost"), lookup=lookup)
    assert await servers.call("add", a=1, b=2) == "3"


async def test_a_server_that_is_not_there_fails_its_calls(remote: Start) -> None:
    servers = remote("http://127.0.0.1:1/mcp")
    assert (await servers.error("add", a=1, b=2)).fields["reason"] == "upstream"
