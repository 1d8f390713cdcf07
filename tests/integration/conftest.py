"""One system for the whole of the suite, and what its tests look at it through."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from agentray.config.state import read_state
from tests.integration.scenes import Play, stage
from tests.owners import SimulatorServer
from tests.services import Services
from tests.system import System

SETTINGS = {
    # Short, so that a reader that takes nothing is dropped while a test watches.
    "http": {"stream_write_timeout_s": 2, "keepalive_s": 1},
    "sessions": {"idle_s": 15},
    "models": {"simulator": {"enabled": True, "tps": 2_000}},
}


def add_embedder(system: System) -> System:
    """Let a system that has not started yet have a model for embeddings: the simulator's."""
    card = {"kind": "embedding"}
    embedder = {"url": f"{system.url}/models/simulator/v1", "card": card}
    models = {**system.settings["models"], "endpoints": {"embedder": embedder}}
    system.settings["models"] = models
    return system


def add_tools(system: System, services: Services) -> System:
    """Let a system that has not started yet have an agent with a tool of each kind."""
    here = Path(__file__).resolve().parent
    tools = ["echo", "python", "shell", "sql_shop", "models", "greet", "small.*"]
    libraries = [each for each in sys.path if Path(each).name == "site-packages"]
    # The first agent is the default.
    system.settings["agents"] = {"assistant": {}, "tooled": {"tools": tools}}
    system.settings["tools"] = {
        "functions": ["tests.integration.operator_tools"],
        "sql": {"shop": {"url": services.let_in("shopper")}},
        "http": {"models": {"description": "Lists models.", "url": f"{system.url}/v1/models"}},
        "gateway": {"allow_private": [system.url]},
        "mcp": {
            "small": {
                "command": "python3",
                "args": [str(here / "mcp_server.py"), "stdio"],
                "env": {"PYTHONPATH": os.pathsep.join(libraries)},
                "paths": [str(here), *libraries],
            }
        },
    }
    return system


@pytest.fixture(scope="package")
def system(_services: Services) -> Iterator[System]:
    """A whole system; one that runs already if AGENTRAY_TEST_DATA_DIR names its folder."""
    running = os.environ.get("AGENTRAY_TEST_DATA_DIR")
    if running:
        system = System(Path(running), settings=SETTINGS)
        state = read_state(running)
        assert state is not None, f"nothing runs in {running}"
        system.url, system.port = state.url, urlsplit(state.url).port or 80
        yield system
        system.close_sql()
        return
    # Not below pytest's own folders: they are kept after the tests, and this is a database.
    folder = Path(tempfile.mkdtemp(prefix="agentray-test-"))
    system = add_embedder(System(folder / "data", settings=SETTINGS))
    add_tools(system, _services).start()
    try:
        yield system
        system.stop()
    finally:
        system.destroy()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def http(system: System) -> Iterator[httpx.Client]:
    """A client without retries, with many connections."""
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=20)
    with httpx.Client(base_url=system.url, timeout=60, limits=limits) as client:
        yield client


@pytest.fixture(scope="package")
def good_model() -> Iterator[SimulatorServer]:
    """A simulator without Ray, for models that are played beside it."""
    server = SimulatorServer()
    yield server
    server.stop()


@pytest.fixture
def play(services: Services, good_model: SimulatorServer) -> Play:
    """What makes a scene: given the URL of a model named bad, its settings, and all models'."""
    return stage(services, good_model)
