"""Draw what a run of the fairness benchmark measured, as SVG: a column for each queue.

Above, what each backlogged tenant has got for its weight as time goes by: lines that run together
are a fair share. Below, how long each call of the light tenants took.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from benchmarks.fair_load import BACKLOGGED, Measured

__all__ = ["picture"]

_LEFT, _TOP, _GAP = 62, 70, 26
_WIDE, _HIGH, _BETWEEN = 270, 190, 64
_LINES = ("#3b82f6", "#e0862a", "#2aa876", "#d9507a")
_LEAST_MS, _MOST_MS = 100.0, 100_000.0
# Grey text and lines that can be read on white and on black, where the reader's choice is not
# told to a picture; the rest is sharper where it is.
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #64707d }
.title { font-size: 14px; font-weight: 600 }
.axis { stroke: #8b96a3; stroke-width: 1; fill: none }
.grid { stroke: #8b96a3; stroke-opacity: .25; stroke-width: 1 }
.bound { stroke: #8b96a3; stroke-dasharray: 5 4; stroke-width: 1.2 }
.line { fill: none; stroke-width: 2 }
.dot { fill: #8b7cf6; fill-opacity: .6 }
.open { fill: none; stroke: #8b7cf6; stroke-opacity: .7 }
@media (prefers-color-scheme: light) { text { fill: #30363d } }
@media (prefers-color-scheme: dark) { text { fill: #c9d1d9 } }
"""


class _Panel:
    """A plot, by its upper left corner."""

    def __init__(self, x: float, y: float, seconds: float) -> None:
        self.x, self.y, self._seconds = x, y, seconds
        self.parts = [
            f'<path class="axis" d="M{x} {y}v{_HIGH}h{_WIDE}"/>',
            *(
                self.text(self.at(share * seconds), y + _HIGH + 16, f"{share * seconds:.0f} s", at)
                for share, at in ((0, "start"), (0.5, "middle"), (1, "end"))
            ),
        ]

    def at(self, second: float) -> float:
        return self.x + _WIDE * min(1.0, second / self._seconds)

    def up(self, share: float) -> float:
        return self.y + _HIGH * (1 - min(1.0, max(0.0, share)))

    def level(self, share: float, label: str, kind: str = "grid") -> None:
        """Draw a line from left to right, with a label if there is one."""
        height = self.up(share)
        self.parts.append(f'<path class="{kind}" d="M{self.x} {height:.1f}h{_WIDE}"/>')
        if label:
            self.parts.append(self.text(self.x - 6, height + 4, label, "end"))

    @staticmethod
    def text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
        shown = f' class="{kind}"' if kind else ""
        return f'<text{shown} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def picture(alone: Measured, together: Mapping[str, Measured]) -> str:
    """Return the SVG."""
    bound_ms = 2 * alone.light_p99()
    most = max(
        found.slot_s(each.name) / each.weight for found in together.values() for each in BACKLOGGED
    )
    most = math.ceil(most / 20) * 20
    width = _LEFT + len(together) * (_WIDE + _GAP)
    height = _TOP + 2 * _HIGH + _BETWEEN + 34
    parts = [_legend()]
    for column, (name, found) in enumerate(together.items()):
        x = _LEFT + column * (_WIDE + _GAP)
        parts.append(_Panel.text(x, 20, name, kind="title"))
        parts += _shares(_Panel(x, _TOP, found.seconds), found, most, first=not column)
        lower = _Panel(x, _TOP + _HIGH + _BETWEEN, found.seconds)
        parts += _waits(lower, found, bound_ms, first=not column)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">\n'
        f"<title>How tool workers are shared, by three queues</title>\n"
        f"<style>{_STYLE}</style>\n{body}\n</svg>\n"
    )


def _legend() -> str:
    x, parts = float(_LEFT), list[str]()
    for each, color in zip(BACKLOGGED, _LINES, strict=True):
        parts.append(
            f'<path class="line" stroke="{color}" d="M{x} 40h18"/>'
            + _Panel.text(x + 23, 44, f"{each.name}, weight {each.weight:g}")
        )
        x += 130
    return "\n".join(parts)


def _shares(panel: _Panel, found: Measured, most: float, *, first: bool) -> list[str]:
    for step in range(5):
        panel.level(step / 4, f"{most * step / 4:g}" if first else "")
    panel.parts.append(
        panel.text(panel.x + 4, panel.y - 6, f"slot-seconds ÷ weight · Jain index {found.jain:.3f}")
    )
    for each, color in zip(BACKLOGGED, _LINES, strict=True):
        points = [
            (second, found.slot_s(each.name, until=found.since + second) / each.weight)
            for second in (found.seconds * step / 60 for step in range(61))
        ]
        path = " ".join(
            f"{panel.at(second):.1f},{panel.up(got / most):.1f}" for second, got in points
        )
        panel.parts.append(f'<polyline class="line" stroke="{color}" points="{path}"/>')
    return panel.parts


def _waits(panel: _Panel, found: Measured, bound_ms: float, *, first: bool) -> list[str]:
    def share(ms: float) -> float:
        return math.log(ms / _LEAST_MS) / math.log(_MOST_MS / _LEAST_MS)

    for ms in (100, 1_000, 10_000, 100_000):
        panel.level(share(ms), f"{ms / 1_000:g} s" if first else "")
    panel.level(share(bound_ms), "", "bound")
    calls, p99 = found.light(), found.light_p99()
    said = f"{p99 / 1_000:.1f} s" if p99 >= 1_000 else f"{p99:.0f} ms"
    panel.parts.append(
        panel.text(panel.x + 4, panel.y - 6, f"light tenants' calls, wait + run · p99 {said}")
    )
    panel.parts.append(
        panel.text(panel.x + _WIDE - 4, panel.up(share(bound_ms)) - 5, "2 × p99 alone", "end")
    )
    if not all(each.answered for each in calls):
        panel.parts.append(panel.text(panel.x + 8, panel.y + 16, "○ not answered by the end"))
    panel.parts += [
        f'<circle class="{"dot" if each.answered else "open"}" cx="{panel.at(each.at_s):.1f}" '
        f'cy="{panel.up(share(max(_LEAST_MS, each.ms))):.1f}" r="2"/>'
        for each in calls
    ]
    return panel.parts
