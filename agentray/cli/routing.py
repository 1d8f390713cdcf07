"""Show which models the router picked, how that went, and what it saved."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from agentray.cli.target import DATA_DIR, DataDir, Url, url_of
from agentray.errors import NotReadyError

if TYPE_CHECKING:
    from rich.console import Console

    from agentray.telemetry.routing_report import RoutingReport

__all__ = ["app"]

_TIMEOUT_S = 10.0
_WIDTH = 100
_NOTHING = "–"

app = typer.Typer(help="Look at what the router does.", no_args_is_help=True)


@app.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction] - keeps `report` a command of its own
    ...


@app.command()
def report(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Show shares and success per tier, model and kind of step, and the cost against always-large.

    It counts since the hosts started, those that left within a day included.
    """
    found = _ask(url_of(url, data_dir))
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    _show(console, found)


def _ask(address: str) -> RoutingReport:
    """Read the metrics page of all hosts. Raises ``NotReadyError`` if there is none."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    from agentray.telemetry.routing_report import routing_report

    try:
        answer = httpx.get(f"{address}/metrics", timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise NotReadyError(f"agentray at {address} cannot be reached: {error}") from error
    if answer.status_code != 200:
        raise NotReadyError(f"agentray at {address} is not ready: it answered {answer.status_code}")
    try:
        families = list(text_string_to_metric_families(answer.text))
    except ValueError:
        families = []
    if not any(family.name.startswith("agentray_") for family in families):
        raise NotReadyError(f"what answers at {address} is not agentray")
    return routing_report(sample for family in families for sample in family.samples)


def _show(console: Console, found: RoutingReport) -> None:
    if not found.calls:
        console.print("no model was called yet")
        return
    _table(
        console,
        ("tier", "calls", "share", "success"),
        [(t.tier, str(t.calls), _percent(t.share), _percent(t.success)) for t in found.tiers],
    )
    _table(
        console,
        ("model", "tier", "calls", "success", "input", "cached", "output", "cost"),
        [
            (
                *(m.model, m.tier, str(m.calls), _percent(m.success), str(m.input_tokens)),
                *(str(m.cached_tokens), str(m.output_tokens), _dollars(m.cost_dollars)),
            )
            for m in found.models
        ],
    )
    _table(
        console,
        ("kind of step", "calls", "small tier"),
        [(k.kind, str(k.calls), _percent(k.small_share)) for k in found.kinds],
    )
    for line in _lines(found):
        console.print(line, markup=False)


def _lines(found: RoutingReport) -> list[str]:
    escalated = ", ".join(f"{line.escalations} from {line.model}" for line in found.escalations)
    held, cost, cache = found.held_out, found.cost, found.cache
    compared = (
        f"{held.large_calls} calls on large, success {_percent(held.large_success)}; "
        f"small without them {_percent(held.small_success)}"
        if held.large_calls
        else "none yet"
    )
    large = (
        f"{_dollars(cost.always_large_dollars)} on large alone: {_percent(cost.ratio)} of it, "
        f"{_dollars(cost.saved_dollars)} saved"
        if cost.always_large_dollars
        else "no price of a large model to compare with"
    )
    asked = f"{cache.hit} hits, {cache.shared} shared, {cache.miss} misses"
    if cache.unavailable:
        asked += f", {cache.unavailable} without Redis"
    return [
        f"escalations: {escalated or 'none'}",
        f"held out: {compared}",
        f"cost: {_dollars(cost.dollars)}; {large}",
        f"answer cache: {asked}; {_percent(cache.saved_share)} of these calls not made",
    ]


def _table(console: Console, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        words = number == 0 or column == "tier"
        table.add_column(column, justify="left" if words else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print()


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{share:.1%}"


def _dollars(value: float) -> str:
    sign, size = ("-" if value < 0 else ""), abs(value)
    return f"{sign}${size:.2f}" if size >= 1 or not size else f"{sign}${size:.6f}"
