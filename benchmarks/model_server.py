"""A model server in a process of its own: the simulator, which counts its calls and can die.

``python -m benchmarks.model_server --port P --counts FILE``. SIGUSR1 cuts all streams that are
under way, each at its next token; SIGUSR2 cuts the next few in front of their first token. What
it counts is in a mapped file, so that SIGKILL leaves it: a stream that was open then died then.
"""

from __future__ import annotations

import argparse
import mmap
import signal
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from agentray.config.settings import SimulatorSettings
from agentray.models.simulator import Simulator
from agentray.models.simulator_call import Receive, Send

__all__ = ["EARLY_CUTS", "Counts", "read_counts", "server_command"]

EARLY_CUTS = 4
"""How many streams one SIGUSR2 cuts."""

_NAMES = ("calls", "open_before", "open_after", "died_before", "died_after")
_WORD_BYTES = 8


class Counts(msgspec.Struct, frozen=True):
    """Calls since the file was made; streams that are open or died, by whether they had a token."""

    calls: int = 0
    open_before: int = 0
    open_after: int = 0
    died_before: int = 0
    died_after: int = 0

    @property
    def open(self) -> int:
        return self.open_before + self.open_after


def read_counts(file: Path) -> Counts:
    """Return what a server has counted so far."""
    words = memoryview(file.read_bytes()).cast("q")
    return Counts(**dict(zip(_NAMES, words, strict=True)))


def server_command(
    python: str, port: int, counts: Path, *, tps: float, ttft_ms: float = 0.0
) -> tuple[str, ...]:
    """Return the command that runs a server."""
    numbers = {"--port": port, "--counts": counts, "--tps": tps, "--ttft-ms": ttft_ms}
    options = (str(part) for pair in numbers.items() for part in pair)
    return (python, "-m", "benchmarks.model_server", *options)


class _CutError(Exception):
    """A stream is cut: whoever serves the application closes its connection."""


class _Tally:
    """The counts, in the mapped file."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            file.write_bytes(bytes(_WORD_BYTES * len(_NAMES)))
        with file.open("r+b") as opened:
            self._words = memoryview(mmap.mmap(opened.fileno(), 0)).cast("q")
        # What was open when the process before this one ended died with it.
        for when in ("before", "after"):
            self.move(f"open_{when}", f"died_{when}", self._words[_NAMES.index(f"open_{when}")])

    def add(self, name: str, number: int = 1) -> None:
        self._words[_NAMES.index(name)] += number

    def move(self, source: str, target: str, number: int = 1) -> None:
        self.add(source, -number)
        self.add(target, number)


class DyingModel:
    """The ASGI application."""

    def __init__(self, simulator: Simulator, tally: _Tally) -> None:
        self._simulator = simulator
        self.tally = tally
        self.cuts = 0
        self.early_cuts = 0

    def cut(self, *_: object) -> None:
        """Cut the streams that are under way."""
        self.cuts += 1

    def cut_early(self, *_: object) -> None:
        """Cut the next streams in front of their first token."""
        self.early_cuts = EARLY_CUTS

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._simulator(scope, receive, send)
            return
        call = _Call(self, send)
        try:
            await self._simulator(scope, receive, call.send)
        finally:
            call.close()


class _Call:
    """One call on its way: where it is counted, and whether it is cut."""

    def __init__(self, model: DyingModel, send: Send) -> None:
        self._model = model
        self._send = send
        self._cuts = model.cuts
        self._early = model.early_cuts > 0
        model.early_cuts -= self._early
        self._counted = "open_before"
        model.tally.add("calls")
        model.tally.add("open_before")

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass on what the simulator sends; after the headers every message has tokens."""
        if message["type"] == "http.response.body":
            if self._early or self._cuts != self._model.cuts:
                died = self._counted.replace("open", "died")
                self._model.tally.move(self._counted, died)
                self._counted = ""
                raise _CutError
            if self._counted == "open_before":
                self._model.tally.move("open_before", "open_after")
                self._counted = "open_after"
        await self._send(message)

    def close(self) -> None:
        """Count it no more: it ended well, or its client left."""
        if self._counted:
            self._model.tally.add(self._counted, -1)


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--counts", type=Path, required=True)
    parser.add_argument("--tps", type=float, required=True)
    parser.add_argument("--ttft-ms", type=float, default=0.0)
    given = parser.parse_args()
    settings = SimulatorSettings(tps=given.tps, ttft_ms=given.ttft_ms)
    model = DyingModel(Simulator(settings), _Tally(given.counts))
    signal.signal(signal.SIGUSR1, model.cut)
    signal.signal(signal.SIGUSR2, model.cut_early)
    uvicorn.run(
        model,
        host="127.0.0.1",
        port=given.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        # A cut stream is no news.
        log_level="critical",
        # Connections that rest between two requests of a slow schedule stay.
        timeout_keep_alive=75,
        # What these do costs and tells nothing here.
        proxy_headers=False,
        server_header=False,
        date_header=False,
    )


if __name__ == "__main__":
    main()
