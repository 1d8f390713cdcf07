"""The tools of a process: which an agent is offered, and what is wrong with them at the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from agentray.clock import ManualClock
from agentray.config.settings import AgentSettings, ToolsSettings
from agentray.errors import ConfigError
from agentray.tools.spec import Toolbox, ToolSpec
from agentray.tools.toolbox import check_agents, open_toolbox


def box(*names: str, closers: Any = ()) -> Toolbox:
    return Toolbox([ToolSpec(name, "d", {}) for name in names], closers=closers)


def test_a_group_is_all_tools_that_begin_with_its_name() -> None:
    tools = box("echo", "files__read", "files__write", "filesystem__read")
    assert tools.offered(["echo", "files.*"]) == ("echo", "files__read", "files__write")
    assert tools.offered(["files__write", "files.*"]) == ("files__write", "files__read")
    assert tools.offered(["files", "*", ".*"]) == ()
    assert tools.offers(["files.*"], "files__read")
    assert not tools.offers(["files.*"], "filesystem__read")
    assert not tools.offers(["files.*"], "files__none")


def test_models_are_offered_a_group_as_it_is_now() -> None:
    tools = box("files__read")

    def names() -> list[str]:
        wire = msgspec.json.decode(b"[" + (tools.wire(["files.*"]) or b"") + b"]")
        return [tool["function"]["name"] for tool in wire]

    assert names() == ["files__read"]
    tools.put([ToolSpec("files__write", "d", {})], instead_of=["files__read"])
    assert names() == ["files__write"]


async def test_what_was_opened_last_is_closed_first_and_once() -> None:
    closed: list[str] = []

    def closer(name: str) -> Callable[[], Any]:
        async def close() -> None:
            closed.append(name)

        return close

    tools = box(closers=[closer("a"), closer("b")])
    await tools.close()
    await tools.close()
    assert closed == ["b", "a"]


@pytest.mark.parametrize(
    ("tools", "fits"),
    [
        (("echo", "shop.*", "shop__get"), True),
        (("files.*", "files__read"), True),
        (("ech",), False),
        (("shop__put",), False),
        (("other.*",), False),
    ],
)
def test_agents_may_name_tools_that_are_there_or_may_come(
    tools: tuple[str, ...], fits: bool
) -> None:
    agents = {"helper": AgentSettings(tools=tools)}
    if fits:
        check_agents(agents, box("echo", "shop__get"), late=["files"])
    else:
        with pytest.raises(ConfigError, match=rf"agents\.helper\.tools: .*{tools[-1][:4]}"):
            check_agents(agents, box("echo", "shop__get"), late=["files"])


class Source:
    def __init__(self, *names: str) -> None:
        self.names = names
        self.closed = False

    def specs(self) -> list[ToolSpec]:
        return [ToolSpec(name, "d", {}) for name in self.names]

    async def close(self) -> None:
        self.closed = True


async def opened(source: Source, **settings: Any) -> Toolbox:
    return await open_toolbox(
        ToolsSettings.model_validate(settings),
        breaker=lambda _: pytest.fail("nothing is called"),
        clock=ManualClock(),
        sources=[source],
    )


async def test_all_kinds_come_together_and_close_together() -> None:
    source = Source("files__read")
    weather = {"description": "d", "url": "https://api.example.com/{city}"}
    tools = await opened(source, http={"weather": weather})
    assert tools.names == ("echo", "python", "shell", "weather", "files__read")
    await tools.close()
    assert source.closed


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"gateway": {"allow": ["a/b"]}}, r"tools\.gateway\.allow: found 'a/b'"),
        ({"gateway": {"allow_private": ["*"]}}, r"tools\.gateway\.allow_private: found '\*'"),
        ({"openapi": {"a": {"document": "none.yaml"}}}, r"tools\.openapi\.a\.document: .* read"),
        ({"functions": ["no.such"]}, r"tools\.functions: 'no\.such' cannot be imported"),
        ({"http": {"w": {"description": "d", "url": "https://{h}/"}}}, r"tools\.http\.w\.url"),
    ],
)
async def test_settings_that_cannot_be_used_name_their_key_and_leave_nothing_open(
    settings: dict[str, Any], problem: str
) -> None:
    source = Source()
    with pytest.raises(ConfigError, match=problem):
        await opened(source, **settings)
    assert source.closed


async def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two are named 'python'"):
        await opened(Source("python"))
