"""Check a configuration before anything is started with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from agentray.config import Settings, load_settings

app = typer.Typer(help="Look at configurations.", no_args_is_help=True)


@app.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction] - keeps `check` a command of its own
    ...


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The YAML file.", show_default=False)],
) -> None:
    """Say whether a file can be used, with the environment as it is here; exit 1 if not."""
    from agentray.models.checks import schema_problem

    settings = load_settings(file, os.environ, schema_problem=schema_problem)
    typer.echo(f"{file}: ok")
    for line in _summary(settings):
        typer.echo(f"  {line}")


def _summary(settings: Settings) -> list[str]:
    # Addresses can hold passwords: none of them is shown.
    def store(configured: object) -> str:
        return "embedded" if configured is None else "at its URL"

    models = settings.models.names()
    default = settings.models.default or models[0]
    stores = f"PostgreSQL {store(settings.postgres.url)}, Redis {store(settings.redis.url)}"
    return [
        f"listens on {settings.http.host}:{settings.http.port}, {settings.host_count()} hosts",
        f"{stores}, Ray {settings.ray.address or 'started here'}",
        f"models: {', '.join(models)}; default {default}",
        f"agents: {', '.join(settings.agents)}",
    ]
