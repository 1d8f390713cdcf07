"""Find the agentray that a command talks to."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from agentray.config.state import read_state

if TYPE_CHECKING:
    from agentray.client.http import Client

__all__ = ["DATA_DIR", "DataDir", "Url", "connected", "options", "url_of"]

DATA_DIR = "~/.agentray"

Url = Annotated[
    str | None,
    typer.Option("--url", help="Where agentray is; else what runs on --data-dir."),
]
DataDir = Annotated[str, typer.Option("--data-dir", help="Folder of a system on this machine.")]


def url_of(url: str | None, data_dir: str) -> str:
    """Return the address that was given, else that of the system that runs on the folder."""
    if url is not None:
        return url if "://" in url else f"http://{url}"
    from agentray.client.http_protocol import DEFAULT_URL

    state = read_state(data_dir)
    return DEFAULT_URL if state is None else state.url


def connected(url: str | None, data_dir: str) -> Client:
    """Return a client of the agentray that is meant."""
    from agentray.client.http import Client

    return Client(url_of(url, data_dir))


def options(url: str | None, data_dir: str) -> str:
    """Return the options, each behind a blank, that name the same agentray in another command."""
    if url is not None:
        return f" --url {shlex.quote(url)}"
    return "" if data_dir == DATA_DIR else f" --data-dir {shlex.quote(data_dir)}"
