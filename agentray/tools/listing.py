"""Ship what tools are from the workers, which can run them, to the hosts, whose models see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from agentray.tools.sandbox.base import Limits, Tier
from agentray.tools.spec import OnCrash, ToolContext, ToolSpec

__all__ = ["LISTING", "Listing", "decode_listing", "encode_listing", "listing_tool"]

LISTING = ".listing"
"""A tool that workers have and no agent can name: it returns the tools that only workers know."""

_MOST_BYTES = 8 * 1024 * 1024


class _Shipped(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    description: str
    parameters: dict[str, Any]
    on_crash: OnCrash = "report"
    timeout_s: float = 60.0
    cache_s: float = 0.0
    version: str = "1"
    tier: Tier = "jail"
    limits: Limits = Limits()
    cpu: float = 1.0
    keeps_scratch: bool = False
    operator: bool = False
    context_argument: str = ""


class Listing(msgspec.Struct, frozen=True):
    """The tools of the groups that a worker knows; of others it cannot tell yet."""

    groups: tuple[str, ...]
    tools: list[_Shipped]

    def specs(self) -> list[ToolSpec]:
        """Return the tools, without what runs them: a host sends its calls to workers."""
        return [ToolSpec(**msgspec.structs.asdict(tool)) for tool in self.tools]

    def has(self, name: str) -> bool:
        """Return whether the tool of this name, if it is there, is one of ``tools``."""
        return name.partition("__")[0] in self.groups


_decoder = msgspec.json.Decoder(Listing)


def encode_listing(groups: Iterable[str], specs: Iterable[ToolSpec]) -> bytes:
    """Return everything of the tools of some groups but what runs them, as JSON."""
    fields = _Shipped.__struct_fields__
    tools = [_Shipped(**{field: getattr(spec, field) for field in fields}) for spec in specs]
    return msgspec.json.encode(Listing(tuple(groups), tools))


def decode_listing(encoded: bytes) -> Listing:
    """Return a listing that was shipped.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(encoded)


def listing_tool(
    groups: Callable[[], Iterable[str]], specs: Callable[[], Iterable[ToolSpec]]
) -> ToolSpec:
    """Return the tool ``LISTING``, whose result ``decode_listing`` reads."""

    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        return encode_listing(groups(), specs()).decode()

    return ToolSpec(
        name=LISTING,
        description="Lists tools.",
        parameters={"type": "object"},
        run=run,
        on_crash="retry",
        limits=Limits(output_bytes=_MOST_BYTES),
        cpu=0.01,
    )
