"""Which of a server's tools are offered."""

from __future__ import annotations

from typing import Any

import msgspec

from agentray.tools.mcp_tools import Listed, Offers, offers_of


def listed(name: str, told: str = "", description: str = "d") -> Listed:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"description": told}}}
    return Listed(name, description, schema)


def offers(*tools: Listed) -> Offers:
    return offers_of("it", tools, only=(), most=1_000, schema_problem=lambda _: None)


def test_a_servers_tools_are_bounded_together_and_the_rest_is_left_out_with_the_reason() -> None:
    found = offers(*(listed(f"t{number}", "x" * 50_000) for number in range(10)), listed("small"))
    assert [offer.tool for offer in found.offers] == ["t0", "t1", "t2", "t3", "t4", "small"]
    assert [name for name, _ in found.left_out] == [f"it__t{number}" for number in range(5, 10)]
    assert {reason for _, reason in found.left_out} == {
        "the server's tools would be more than 262144 bytes together"
    }


def test_descriptions_count_as_the_bytes_that_they_are() -> None:
    found = offers(*(listed(f"t{number}", description="€" * 4_096) for number in range(50)))
    assert 1 < len(found.offers) <= 256 * 1024 // (3 * 4_096)
    assert sum(len(msgspec.json.encode(offer)) for offer in found.offers) < 260 * 1024
    assert len(found.offers) + len(found.left_out) == 50
