"""Say whether agentray runs, and what it holds."""

from __future__ import annotations

from typing import Annotated, Any, cast

import msgspec
import typer

from agentray.cli.target import DATA_DIR, DataDir, Url, url_of
from agentray.config.state import read_state

__all__ = ["status"]

_TIMEOUT_S = 5.0
_COUNTS = ("resident", "running", "queued")
_TROUBLES = (
    ("draining", True, "it is draining"),
    ("store_ok", False, "PostgreSQL is away"),
    ("cache_ok", False, "Redis is away"),
)


def status(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Say whether agentray takes work; the exit code is 0 if it does, else 1."""
    address = url_of(url, data_dir)
    state = None if url is not None else read_state(data_dir)
    host, error = _ask(address)
    ready = bool(host and host.get("ready")) and (state is None or state.ready)
    if json:
        found = {"url": address, "ready": ready, "host": host, "error": error, "system": state}
        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        typer.echo(f"agentray at {address}: {'ready' if ready else error or 'not ready'}")
        if host is not None:
            counts = ", ".join(f"{host[key]} {key}" for key in _COUNTS if key in host)
            troubles = [text for key, bad, text in _TROUBLES if host.get(key) is bad]
            models = cast("dict[str, dict[str, Any]]", host.get("models") or {})
            troubles += [
                f"model {name}: {health.get('reason') or 'it cannot be called'}"
                for name, health in models.items()
                if not health.get("healthy")
            ]
            shown = "; ".join([counts, *troubles])
            typer.echo(f"  the host that answered, {host.get('owner_id', '?')}: {shown}")
        if state is not None:
            models = ", ".join(state.models)
            typer.echo(f"  process {state.pid}, {state.hosts} hosts, models: {models}")
    raise typer.Exit(0 if ready else 1)


def _ask(address: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return what the host that answered says of itself, or why none did."""
    import httpx

    try:
        answer = httpx.get(f"{address}/readyz", timeout=_TIMEOUT_S)
        found = msgspec.json.decode(answer.content)
    except httpx.HTTPError as error:
        return None, f"cannot be reached: {error}"
    except msgspec.DecodeError:
        return None, "what answers is not agentray"
    if not isinstance(found, dict) or "ready" not in found:
        return None, "no host is ready"
    return cast("dict[str, Any]", found), None
