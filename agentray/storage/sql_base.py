"""What a database is to the SQL tools: it answers one statement with a bounded table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from agentray.errors import StorageError

__all__ = ["Column", "Database", "Table", "refused"]


class Column(msgspec.Struct, frozen=True):
    """A column of a result, with the type's name as the database writes it, if it told."""

    name: str
    type: str


class Table(msgspec.Struct, frozen=True):
    """A result. ``rows`` are JSON arrays; ``truncated``: there was more than its bounds let
    through. ``affected``: how many rows a statement without a result changed."""

    columns: list[Column]
    rows: list[msgspec.Raw]
    truncated: bool = False
    affected: int | None = None


class Database(Protocol):
    """A database of which each statement is a transaction of its own.

    Nothing of a call, neither settings nor locks nor temporary tables, is left for the next.
    """

    @property
    def dialect(self) -> str:
        """The name of its SQL, e.g. PostgreSQL."""
        ...

    @property
    def placeholder(self) -> str:
        """How a statement refers to its first parameter, e.g. $1."""
        ...

    async def query(self, statement: str, params: Sequence[Any]) -> Table:
        """Run one statement, within the configured time, rows and bytes.

        A caller that is cancelled has the statement cancelled on the server.

        Raises:
            StorageError: the statement was refused or failed; ``reason`` in the fields is a
                word of the tools' metrics, ``sqlstate`` is there where the database told one.
            StorageUnavailableError: the database could not be reached, or was lost on the way.
        """
        ...

    async def close(self) -> None: ...


def refused(message: str) -> StorageError:
    """Return the error of a statement that is not handed to the database."""
    return StorageError(message, reason="refused")
