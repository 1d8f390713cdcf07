"""What an owner process learns of the tools that only workers know."""

from __future__ import annotations

from typing import Any

import pytest

from agentray.agents.spec import Agents
from agentray.clock import ManualClock
from agentray.config.settings import AgentSettings, Settings
from agentray.sessions.owner_tools import OwnerTools
from agentray.telemetry.metrics import Metrics
from agentray.tools.listing import Listing, decode_listing, encode_listing
from agentray.tools.spec import ToolSpec

NOWHERE: Any = None


def listing(*groups: str, tools: tuple[str, ...] = ()) -> Listing:
    specs = [ToolSpec(name, "Does it.", {"type": "object"}) for name in tools]
    return decode_listing(encode_listing(groups, specs))


@pytest.fixture
def tools() -> OwnerTools:
    mcp = {"files": {"url": "http://a"}, "web": {"url": "http://b"}}
    settings = Settings.model_validate({"redis": {"url": "redis://a"}, "tools": {"mcp": mcp}})
    return OwnerTools(
        settings,
        owner_id="o",
        agents=Agents({"assistant": AgentSettings()}),
        locate=None,
        scratch=NOWHERE,
        waiting=NOWHERE,
        clock=ManualClock(),
        metrics=Metrics(),
    )


def test_the_tools_of_all_servers_are_known_when_each_was_listed_once(tools: OwnerTools) -> None:
    assert not tools.learn(listing())
    assert not tools.learn(listing("files", tools=("files__read",)))
    assert tools.learn(listing("web", tools=("web__search",)))
    assert tools.box.names == ("files__read", "web__search")


def test_a_worker_that_does_not_know_a_server_yet_takes_none_of_its_tools(
    tools: OwnerTools,
) -> None:
    tools.learn(listing("files", "web", tools=("files__read", "web__search")))
    assert tools.learn(listing("web", tools=("web__find",)))
    assert tools.box.names == ("files__read", "web__find")
    assert tools.learn(listing("files", "web", tools=("web__find",)))
    assert tools.box.names == ("web__find",)
