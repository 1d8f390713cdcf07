"""Talk to an agent in the terminal, or send it the lines of a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from agentray.cli.target import DATA_DIR, DataDir, Url, connected, options
from agentray.config.program import program
from agentray.errors import AgentRayError, InvalidRequestError
from agentray.events import ModelVoided, ToolCalled, ToolFinished, TurnFinished
from agentray.sessions.base import Delta, StreamItem

if TYPE_CHECKING:
    from agentray.client.http import Session, TurnStream

__all__ = ["chat"]

_ESCAPE = "\x1b"


def chat(
    session: Annotated[
        str | None, typer.Option("--session", help="A session's id; a new one if not given.")
    ] = None,
    agent: Annotated[
        str | None, typer.Option("--agent", help="The agent of a session that is new.")
    ] = None,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Chat: an answer is shown as it comes. /exit or Ctrl-D ends, Ctrl-C cancels an answer.

    With its input piped, each line is a message; the exit code is 1 if an answer failed.
    """
    with connected(url, data_dir) as client:
        talk = client.session(session, agent=agent)
        interactive = sys.stdin.isatty()
        if interactive:
            _note(f"session {talk.id}; /exit ends, Ctrl-C cancels an answer")
        well = True
        for line in _lines(interactive):
            well = _answered(talk, line) and well
        if interactive:
            _note(f"to go on: {program()} chat --session {talk.id}{options(url, data_dir)}")
    raise typer.Exit(0 if well or interactive else 1)


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("› ") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if not interactive and not line:
            return
        line = line.strip()
        if line == "/exit":
            return
        if line:
            yield line


def _answered(talk: Session, line: str) -> bool:
    """Show the answer to a message; return whether there is a whole one."""
    stream = talk.stream(line)
    screen = _Screen()
    try:
        for item in stream:
            screen.show(item)
    except KeyboardInterrupt:
        stream.close()
        screen.note(_cancelled(talk, stream))
        return False
    except AgentRayError as error:
        screen.note(f"agentray: {error.message}")
        return False
    return stream.status == "completed"


def _cancelled(talk: Session, stream: TurnStream) -> str:
    try:
        talk.cancel(stream.turn_id)
    except InvalidRequestError:
        return "it had ended already"
    return "cancelled"


class _Screen:
    """An answer as it comes, and notes that are not the agent's, on lines of their own."""

    def __init__(self) -> None:
        self._within_line = False

    def show(self, item: StreamItem) -> None:
        if isinstance(item, Delta):
            # What a model says must not steer the terminal.
            typer.echo(item.text.replace(_ESCAPE, ""), nl=False)
            sys.stdout.flush()
            self._within_line = not item.text.endswith("\n")
        elif isinstance(item, ModelVoided) and not item.continues:
            self.note(f"the answer broke off ({item.reason}) and begins anew")
        elif isinstance(item, ToolCalled):
            self.note(f"calls {item.name} {item.arguments}")
        elif isinstance(item, ToolFinished) and item.status != "ok":
            self.note(f"{item.name}: {item.status}")
        elif isinstance(item, TurnFinished):
            self._end_line()
            if item.error is not None and item.status != "cancelled":
                self.note(f"{item.status}: {item.error.message}")

    def note(self, text: str) -> None:
        self._end_line()
        _note(text)

    def _end_line(self) -> None:
        if self._within_line:
            typer.echo()
            self._within_line = False


def _note(text: str) -> None:
    typer.secho(text.replace(_ESCAPE, ""), err=True, dim=True)
