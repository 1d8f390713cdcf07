"""Tell the person at the terminal what starts, what is ready and what went wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.status import Status

__all__ = ["Report"]


class Report:
    """Lines about the system: coloured and with what is under way on a terminal, else plain."""

    def __init__(self, console: Console | None = None, errors: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._errors = errors or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._under_way: dict[str, None] = {}
        self._status: Status | None = None
        unicode = self._console.encoding.lower().startswith("utf")
        self._done_mark = "✓" if unicode else "+"

    def begin(self, name: str) -> Callable[[str], None]:
        """Say that something is being done; call the result with a detail when it is."""
        began = time.monotonic()
        self._under_way[name] = None
        self._show()

        def done(detail: str) -> None:
            self._under_way.pop(name, None)
            self._show()
            seconds = f"{time.monotonic() - began:5.1f} s"
            self._console.print(
                f"[green]{self._done_mark}[/] {name:<14} [dim]{seconds}[/]  {escape(detail)}"
            )

        return done

    def info(self, text: str) -> None:
        self._console.print(escape(text))

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]![/] {escape(text)}")

    def error(self, text: str) -> None:
        """Say on standard error why the command fails."""
        self.quiet()
        for line in text.splitlines():
            self._errors.print(f"[red]agentray:[/] {escape(line)}")

    def ready(self, url: str, lines: list[str]) -> None:
        """Say that everything runs, and what can be done with it."""
        seconds = time.monotonic() - self._began
        self._console.print(f"\n[bold green]ready[/] after {seconds:.1f} s at [bold]{url}[/]\n")
        for line in lines:
            self._console.print(f"  {escape(line)}")
        self._console.print()

    def quiet(self) -> None:
        """Forget what was under way: it will not be done."""
        self._under_way.clear()
        self._show()

    def _show(self) -> None:
        if not self._console.is_terminal:
            return
        if not self._under_way:
            if self._status is not None:
                self._status.stop()
                self._status = None
            return
        text = f"[dim]{', '.join(self._under_way)} …[/]"
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)
