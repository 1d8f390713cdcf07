"""List, show, cancel and delete sessions."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Literal

import msgspec
import typer

from agentray.cli.target import DATA_DIR, DataDir, Url, connected
from agentray.events import (
    AnyEvent,
    Message,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    ToolCalled,
    ToolFinished,
    TurnAccepted,
    TurnFinished,
)
from agentray.sessions.base import SessionInfo

__all__ = ["app"]

app = typer.Typer(help="Look at sessions and end them.", no_args_is_help=True)

SessionId = Annotated[str, typer.Argument(help="The session's id.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Status = Literal["idle", "running", "closed", "parked"]
_COLUMNS = ("id", "agent", "user", "status", "turns", "updated")


@app.command()
def ls(
    user: Annotated[str | None, typer.Option("--user", help="Of this user alone.")] = None,
    agent: Annotated[str | None, typer.Option("--agent", help="Of this agent alone.")] = None,
    status: Annotated[Status | None, typer.Option("--status", help="In this state alone.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many at most.")] = 50,
    json: AsJson = False,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """List sessions, newest first."""
    found: list[SessionInfo] = []
    with connected(url, data_dir) as client:
        after: str | None = None
        while len(found) < limit:
            page = client.sessions.list(
                user=user,
                agent=agent,
                status=status,
                after=after,
                limit=min(100, limit - len(found)),
            )
            found += page.data
            after = page.next
            if after is None:
                break
    if json:
        _print_json(found)
    else:
        _print_table(found)


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def _print_table(sessions: list[SessionInfo]) -> None:
    rows = [
        (s.id, s.agent, s.user or "", s.status, str(s.turns), _when(s.updated_at)) for s in sessions
    ]
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*_COLUMNS, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@app.command()
def show(
    session: SessionId, json: AsJson = False, url: Url = None, data_dir: DataDir = DATA_DIR
) -> None:
    """Show a session and what was said in it."""
    with connected(url, data_dir) as client:
        handle = client.session(session)
        info = handle.info()
        if json:
            _print_json({"session": info, "events": list(handle.events())})
            return
        state = f"{info.status} ({info.parked_reason})" if info.parked_reason else info.status
        turns = "1 turn" if info.turns == 1 else f"{info.turns} turns"
        typer.echo(f"{info.id}: {state}, agent {info.agent}, {info.placement}, {turns}")
        for event in handle.events():
            for line in _told(event):
                typer.echo(line.replace("\x1b", ""))


def _told(event: AnyEvent) -> list[str]:
    if isinstance(event, TurnAccepted):
        return ["", *(f"{message.role}: {_text(message)}" for message in event.input)]
    if isinstance(event, ModelFinished):
        return [f"assistant: {event.text}"] if event.text else []
    if isinstance(event, (ModelVoided, ModelFailed)):
        return [f"(broken off) {event.text}"] if event.text else []
    if isinstance(event, ToolCalled):
        return [f"calls {event.name} {event.arguments}"]
    if isinstance(event, ToolFinished):
        return [f"{event.name} ({event.status}): {event.output}"]
    if isinstance(event, TurnFinished) and event.status != "completed":
        return [f"({event.status}: {event.error.message if event.error else 'no reason given'})"]
    return []


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in message.content)


@app.command()
def cancel(
    session: SessionId,
    turn: Annotated[
        str | None, typer.Option("--turn", help="A turn's id; all that run or wait if not given.")
    ] = None,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Cancel what runs and waits in a session."""
    with connected(url, data_dir) as client:
        for turn_id in client.session(session).cancel(turn):
            typer.echo(f"cancelled {turn_id}")


@app.command()
def rm(
    sessions: Annotated[list[str], typer.Argument(help="Their ids.", show_default=False)],
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Delete sessions with all that is in them."""
    with connected(url, data_dir) as client:
        for session in sessions:
            client.sessions.delete(session)
            typer.echo(f"deleted {session}")
