"""The one system that all tests of this folder share: a start of vLLM takes a minute."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.vllm.served import MODEL, ServedSystem


@pytest.fixture(scope="session")
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedSystem]:
    """A system that is ready, its models loading."""
    if not MODEL:
        pytest.skip("make test-vllm makes the model that this needs")
    system = ServedSystem(tmp_path_factory.mktemp("served") / "data")
    system.start()
    yield system
    system.stop()


@pytest.fixture(scope="session")
def system(starting: ServedSystem) -> ServedSystem:
    """The system, its model loaded."""
    asyncio.run(starting.until_loaded())
    return starting
