"""Ship what tools are from the workers, which can run them, to the hosts, whose models see them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

from agentray.tools.sandbox.base import Limits, Tier
from agentray.tools.spec import OnCrash, ToolContext, ToolSpec

__all__ = ["LISTING", "decode_specs", "encode_specs", "listing_tool"]

LISTING = ".listing"
"""A tool that workers have and no agent can name: it returns the tools that only workers know."""

_MOST_BYTES = 8 * 1024 * 1024

Run = Callable[[dict[str, Any], ToolContext], Awaitable[str]]


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


_decoder = msgspec.json.Decoder(list[_Shipped])


def encode_specs(specs: Iterable[ToolSpec]) -> bytes:
    """Return everything of tools but what runs them, as JSON."""
    fields = _Shipped.__struct_fields__
    return msgspec.json.encode(
        [_Shipped(**{field: getattr(spec, field) for field in fields}) for spec in specs]
    )


def decode_specs(
    encoded: bytes, run: Callable[[str], Run | None] = lambda name: None
) -> list[ToolSpec]:
    """Return tools that were shipped. ``run`` finds what runs the one of a name; a host, which
    sends its calls to workers, needs none.

    Raises:
        msgspec.DecodeError: it is no such list.
    """
    return [
        ToolSpec(**msgspec.structs.asdict(found), run=run(found.name))
        for found in _decoder.decode(encoded)
    ]


def listing_tool(specs: Callable[[], Iterable[ToolSpec]]) -> ToolSpec:
    """Return the tool ``LISTING``, whose result ``decode_specs`` reads."""

    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        return encode_specs(specs()).decode()

    return ToolSpec(
        name=LISTING,
        description="Lists tools.",
        parameters={"type": "object"},
        run=run,
        on_crash="retry",
        limits=Limits(output_bytes=_MOST_BYTES),
        cpu=0.01,
    )
