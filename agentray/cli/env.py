"""Print what each node of a Ray cluster needs in its environment."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from agentray.config import load_settings

__all__ = ["env"]


def env(
    config: Annotated[
        Path | None, typer.Option("--config", help="The YAML file that `agentray up` gets.")
    ] = None,
) -> None:
    """Print the environment of a cluster's node: eval "$(agentray env)"; ray start …

    Ray and Serve read it when they are imported, so it must be there before `ray start`, on each
    node. `agentray up` does this by itself where it starts Ray.
    """
    from agentray.app.environment import find_haproxy, find_ports, ray_environment, write_shim
    from agentray.app.layout import Layout
    from agentray.models.checks import schema_problem

    settings = load_settings(config, os.environ, schema_problem=schema_problem)
    layout = Layout.of(settings.data_dir)
    layout.make()
    write_shim(layout)
    found = ray_environment(
        settings, layout, find_ports(layout), haproxy=find_haproxy(), alone=False
    )
    for name, value in {**found, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}.items():
        typer.echo(f"export {name}={shlex.quote(value)}")
