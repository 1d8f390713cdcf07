"""What workers tell hosts of the tools that only they know."""

from __future__ import annotations

import pytest
from msgspec import DecodeError

from agentray.tools.listing import decode_listing, encode_listing, listing_tool
from agentray.tools.sandbox.base import Limits
from agentray.tools.spec import ToolContext, ToolSpec

READ = ToolSpec(
    name="files__read",
    description="Reads.",
    parameters={"type": "object", "properties": {"path": {"type": "string"}}},
    on_crash="retry",
    timeout_s=7,
    limits=Limits(output_bytes=100),
    cpu=0.1,
)


def test_all_but_what_runs_a_tool_arrives() -> None:
    found = decode_listing(encode_listing(["files"], [READ]))
    assert found.groups == ("files",)
    assert found.specs() == [READ]


def test_it_has_the_tools_of_its_groups_alone() -> None:
    found = decode_listing(encode_listing(["files"], []))
    assert found.has("files__gone")
    assert not found.has("web__search")


async def test_the_tool_lists_what_is_there_when_it_is_called() -> None:
    groups: list[str] = []
    tool = listing_tool(lambda: groups, lambda: [READ] if groups else [])
    assert tool.run is not None
    context = ToolContext("agentray", "host", "key")
    assert decode_listing((await tool.run({}, context)).encode()).groups == ()
    groups.append("files")
    assert decode_listing((await tool.run({}, context)).encode()).specs() == [READ]


@pytest.mark.parametrize("body", [b"", b"[]", b'{"groups": 1}'])
def test_what_is_no_listing_is_refused(body: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_listing(body)
