"""Start everything on this machine and keep it running."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from agentray.config import load_settings
from agentray.errors import ConfigError

__all__ = ["up"]


def up(
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file; see configs/.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port of the HTTP endpoint.")] = None,
    data_dir: Annotated[
        str | None, typer.Option("--data-dir", help="Folder of everything that is embedded.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME=URL",
            help="A model at an OpenAI-compatible endpoint; may be given more than once.",
        ),
    ] = None,
) -> None:
    """Start PostgreSQL, Redis, Ray and the session hosts; Ctrl-C ends them in order.

    What is configured at a URL is used instead of being started.
    """
    from agentray.app.report import Report
    from agentray.app.supervisor import Supervisor

    flags: dict[str, Any] = {}
    if port is not None:
        flags["http"] = {"port": port}
    if data_dir is not None:
        flags["data_dir"] = data_dir
    if model:
        flags["models"] = {"endpoints": dict(_endpoint(text) for text in model)}
    settings = load_settings(config, os.environ, flags=flags)

    async def run() -> int:
        return await Supervisor(settings, report=Report()).run()

    raise typer.Exit(asyncio.run(run()))


def _endpoint(text: str) -> tuple[str, dict[str, str]]:
    name, found, url = text.partition("=")
    if not (name and found and url):
        raise ConfigError(f"--model {text}: expected NAME=URL, e.g. tiny=http://127.0.0.1:8001/v1")
    return name, {"url": url}
