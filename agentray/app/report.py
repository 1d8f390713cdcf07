"""Tell the person at the terminal what starts, what is ready and what went wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console

__all__ = ["Report"]


class Report:
    """Lines about the system: coloured on a terminal, plain elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._clock = time.monotonic
        self._began = self._clock()

    @contextmanager
    def step(self, name: str) -> Generator[Callable[[str], None]]:
        """Say that ``name`` is there, and how long it took, when the block ends well.

        The block may call what it gets with a detail to be shown.
        """
        began = self._clock()
        details: list[str] = []
        yield details.append
        seconds = self._clock() - began
        self._console.print(
            f"[green]✓[/] {name:<14} [dim]{seconds:5.1f} s[/]  {'  '.join(details)}".rstrip()
        )

    def info(self, text: str) -> None:
        self._console.print(text)

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]![/] {text}")

    def error(self, text: str) -> None:
        """Say on standard error why the command fails, in one line."""
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(
            f"[red]agentray:[/] {text}", markup=True
        )

    def ready(self, url: str, lines: list[str]) -> None:
        seconds = self._clock() - self._began
        self._console.print(f"\n[bold green]ready[/] after {seconds:.1f} s at [bold]{url}[/]\n")
        for line in lines:
            self._console.print(f"  {line}", markup=False)
        self._console.print()
