"""The command line: each module of this package is one command, put together here.

A command's module imports what is heavy (ray, the stores) inside its function, so that
``agentray --version`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import agentray
from agentray.cli import chat, config, doctor, env, routing, sessions, status, up
from agentray.errors import AgentRayError

__all__ = ["app", "main"]

app = typer.Typer(
    name="agentray",
    help="Run AI-agent sessions as actors, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(config.app, name="config")
app.command()(up.up)
app.command()(env.env)
app.command()(doctor.doctor)
app.command()(chat.chat)
app.add_typer(sessions.app, name="sessions")
app.add_typer(routing.app, name="routing")
app.command()(status.status)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"agentray {agentray.__version__}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction] - typer calls it
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command of ``sys.argv``; an error of ours is said plainly and exits with 1."""
    try:
        app()
    except AgentRayError as error:
        for line in error.message.splitlines():
            typer.echo(f"agentray: {line}", err=True)
        sys.exit(1)
