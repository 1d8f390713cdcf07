"""What is asked of the store of files and batches: records, and the protocols."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from typing import Literal, Protocol

import msgspec

__all__ = [
    "BatchBook",
    "BatchFault",
    "BatchRow",
    "BatchStatus",
    "BatchWork",
    "ClaimedLine",
    "EndStatus",
    "FileRow",
    "FileStore",
    "LineUsage",
    "NewLine",
]

EndStatus = Literal["completed", "expired", "cancelled"]
BatchStatus = Literal["validating", "in_progress", "finalizing", "cancelling", "failed", EndStatus]


class FileRow(msgspec.Struct, frozen=True, kw_only=True):
    """A file; times in seconds since the epoch, by PostgreSQL's clock."""

    tenant: str
    id: str
    purpose: Literal["batch", "batch_output"]
    filename: str
    size_bytes: int
    created_at: float
    expires_at: float | None


class BatchFault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch cannot run; ``line`` counts the lines of its file from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class LineUsage(msgspec.Struct, frozen=True):
    """Tokens of one answer; cached ones are among the input's, reasoning ones the output's."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """A batch; times in seconds since the epoch, by PostgreSQL's clock.

    ``total``, ``completed`` and ``failed`` count its lines. ``overdue`` says that its window is
    over. ``running`` says, of a batch that is overdue or being cancelled, that some of its lines
    still run.
    """

    tenant: str
    id: str
    input_file_id: str
    endpoint: str
    metadata: dict[str, str] | None
    status: BatchStatus
    errors: list[BatchFault] | None
    created_at: float
    expires_at: float
    in_progress_at: float | None
    finalizing_at: float | None
    completed_at: float | None
    failed_at: float | None
    expired_at: float | None
    cancelling_at: float | None
    cancelled_at: float | None
    total: int
    completed: int
    failed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    output_file_id: str | None
    error_file_id: str | None
    output_ttl_s: float
    overdue: bool
    running: bool


class NewLine(msgspec.Struct, frozen=True):
    """A line of a batch's input: its number from 1, what its result begins with, and the body
    of its request."""

    number: int
    head: bytes
    body: bytes


class ClaimedLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that is ours to run until its lease ends; ``attempts`` counts this one too."""

    tenant: str
    batch_id: str
    number: int
    endpoint: str
    body: bytes
    attempts: int


class FileStore(Protocol):
    """Files, in numbered pieces. Each method raises ``StorageUnavailableError``."""

    async def create_file(
        self,
        tenant: str,
        file_id: str,
        pieces: AsyncIterable[bytes],
        *,
        purpose: Literal["batch", "batch_output"],
        filename: str,
        ttl_s: float | None,
    ) -> FileRow:
        """Store a file whole or not at all; no piece is larger than it was given."""
        ...

    async def file(self, tenant: str, file_id: str) -> FileRow | None: ...

    async def files(
        self,
        tenant: str,
        *,
        purpose: str | None,
        after: str | None,
        limit: int,
        newest_first: bool,
    ) -> list[FileRow]:
        """Return files behind the one called ``after``, by their age."""
        ...

    async def read_piece(self, tenant: str, file_id: str, number: int) -> bytes | None:
        """Return a piece, numbered from 0; None behind the last one, or if there is no file."""
        ...

    async def delete_file(self, tenant: str, file_id: str) -> bool:
        """Return whether there was such a file."""
        ...

    async def delete_expired_files(self) -> int:
        """Delete files whose time is over; return how many."""
        ...


class BatchBook(Protocol):
    """Batches, for those who order them. Each method raises ``StorageUnavailableError``."""

    async def create_batch(
        self,
        tenant: str,
        batch_id: str,
        *,
        input_file_id: str,
        endpoint: str,
        metadata: dict[str, str] | None,
        window_s: float,
        output_ttl_s: float,
    ) -> BatchRow: ...

    async def batch(self, tenant: str, batch_id: str) -> BatchRow | None: ...

    async def batches(self, tenant: str, *, after: str | None, limit: int) -> list[BatchRow]:
        """Return batches behind the one called ``after``, newest first."""
        ...

    async def cancel_batch(self, tenant: str, batch_id: str) -> BatchRow | None:
        """Let no more lines of a batch begin, if it is still validating or in progress; return
        the batch as it is now."""
        ...


class BatchWork(Protocol):
    """Batches, for those who run them. Each method raises ``StorageUnavailableError``.

    ``by`` names a runner. A lease is a time by the store's clock until which something is the
    runner's own; work whose lease is over may be taken by any other.
    """

    async def open_batches(self, limit: int, *, resting: Sequence[str] = ()) -> list[BatchRow]:
        """Return batches that there is something to do for, of all tenants, the oldest first: at
        most ``limit`` of each kind of work, so that none waits behind another kind.

        Those in progress have a line that is due, and are not among ``resting``.
        """
        ...

    async def claim_batch(self, tenant: str, batch_id: str, by: str, *, lease_s: float) -> bool:
        """Take the validation of a batch, unless another runner has it."""
        ...

    async def add_lines(
        self, tenant: str, batch_id: str, by: str, lines: Sequence[NewLine], *, lease_s: float
    ) -> bool:
        """Add lines to a batch that this runner validates, and renew the lease; False if it is
        no longer this one's. A line that is there already stays as it is."""
        ...

    async def begin_batch(self, tenant: str, batch_id: str, by: str, *, total: int) -> bool:
        """End a validation well: the lines may be claimed from now on."""
        ...

    async def fail_batch(
        self, tenant: str, batch_id: str, by: str, faults: Sequence[BatchFault]
    ) -> bool:
        """End a validation, and with it the batch."""
        ...

    async def claim_lines(
        self, tenant: str, batch_id: str, by: str, *, limit: int, lease_s: float
    ) -> list[ClaimedLine]:
        """Take lines that are due and nobody's; none of a batch that may not run (any more)."""
        ...

    async def renew_lines(self, by: str, lines: Sequence[ClaimedLine], *, lease_s: float) -> None:
        """Extend the leases of lines, as far as they are this runner's (still)."""
        ...

    async def give_back(self, by: str) -> None:
        """End all leases of a runner now, of lines and of a validation."""
        ...

    async def put_off(
        self, line: ClaimedLine, by: str, delay_s: float, *, counts: bool = True
    ) -> None:
        """Give a line back, to be taken again after a while; ``counts`` says whether this was one
        of its attempts."""
        ...

    async def record(
        self, line: ClaimedLine, *, succeeded: bool, result: bytes, usage: LineUsage
    ) -> bool:
        """Write a line's result; False if it has one already, or its batch has ended.

        The first result counts, whoever brings it: the work is done, and the same either way.
        """
        ...

    async def finalize_batch(self, tenant: str, batch_id: str) -> None:
        """Mark a batch in progress, all of whose lines have a result, as being finalized."""
        ...

    async def finish_batch(
        self,
        tenant: str,
        batch_id: str,
        status: EndStatus,
        *,
        unfinished: bytes,
        output_file_id: str,
        error_file_id: str,
    ) -> bool:
        """Write the files of a batch and end it, all at once; False if it is not the time yet.

        Lines without a result get ``unfinished``, among the errors. A file without lines is not
        made. A batch that never was in progress has none.
        """
        ...
