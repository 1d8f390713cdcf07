"""Answer statements of models from any database that SQLAlchemy speaks to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, CursorResult, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    NoSuchModuleError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from agentray.config.settings import SqlSettings
from agentray.errors import ConfigError, StorageError, StorageUnavailableError
from agentray.storage.sql_base import Column, Table, refused
from agentray.storage.sql_rows import Rows
from agentray.storage.sql_statement import READING, WRITING, admitted
from agentray.telemetry.logging import get_logger

__all__ = ["AlchemyDatabase"]

log = get_logger(__name__)
T = TypeVar("T")

_PLACEHOLDERS = {"qmark": "?", "format": "%s", "pyformat": "%s", "numeric": ":1"}
_BATCH_ROWS = 100
_MOST_MESSAGE = 2_000
_INTERRUPT_S = 5.0
# Of one value, so that one call cannot fill a worker's memory.
_SQLITE_VALUE_BYTES = 16 * 1024 * 1024
_SQLITE_LIMIT_LENGTH = 0
