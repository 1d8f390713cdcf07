"""What all tests share: real stores, and how many examples hypothesis tries.

``--hypothesis-profile=nightly`` tries many; CI and everyday runs try fewer.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.services import Services

# A system without a configured model would take it for the key to one.
os.environ.pop("OPENAI_API_KEY", None)
# A shell starts what runs in its background with interrupts ignored, and all that is started here
# would inherit it: Ctrl-C would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", max_examples=200, deadline=None)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile("default")


@pytest.fixture(scope="session")
def _services() -> Iterator[Services]:
    services = Services()
    try:
        services.start()
        yield services
    finally:
        services.stop()


@pytest.fixture
def services(_services: Services) -> Services:
    """PostgreSQL, migrated, and Redis: running, and empty."""
    _services.ensure()
    return _services
