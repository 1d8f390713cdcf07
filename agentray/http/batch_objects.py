"""The objects of files and batches, as OpenAI has them."""

from __future__ import annotations

from typing import Literal

import msgspec

from agentray.storage.batches import BatchFault, BatchRow, BatchStatus, FileRow

__all__ = [
    "Batch",
    "BatchErrors",
    "BatchList",
    "BatchRequestCounts",
    "BatchUsage",
    "FileDeleted",
    "FileList",
    "FileObject",
    "batch_object",
    "batch_page",
    "file_object",
    "file_page",
]


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file; times in seconds since the epoch."""

    id: str
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(msgspec.Struct, frozen=True):
    """A page of files."""

    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class FileDeleted(msgspec.Struct, frozen=True):
    """What is left of a file that was deleted."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


class BatchErrors(msgspec.Struct, frozen=True):
    """Why a batch could not run."""

    data: list[BatchFault]
    object: Literal["list"] = "list"


class BatchRequestCounts(msgspec.Struct, frozen=True):
    """How many of a batch's requests there are, were answered, and were not."""

    total: int
    completed: int
    failed: int


class _InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class _OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class BatchUsage(msgspec.Struct, frozen=True):
    """What all answers of a batch took together."""

    input_tokens: int
    input_tokens_details: _InputDetails
    output_tokens: int
    output_tokens_details: _OutputDetails
    total_tokens: int


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch; times in seconds since the epoch."""

    id: str
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchRequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    completion_window: Literal["24h"] = "24h"
    object: Literal["batch"] = "batch"


class BatchList(msgspec.Struct, frozen=True):
    """A page of batches."""

    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


def file_object(row: FileRow) -> FileObject:
    """Return a file as OpenAI shows one."""
    return FileObject(
        id=row.id,
        bytes=row.size_bytes,
        created_at=int(row.created_at),
        expires_at=_seconds(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
    )


def batch_object(row: BatchRow) -> Batch:
    """Return a batch as OpenAI shows one."""
    return Batch(
        id=row.id,
        endpoint=row.endpoint,
        errors=None if row.errors is None else BatchErrors(row.errors),
        input_file_id=row.input_file_id,
        status=row.status,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        created_at=int(row.created_at),
        in_progress_at=_seconds(row.in_progress_at),
        expires_at=int(row.expires_at),
        finalizing_at=_seconds(row.finalizing_at),
        completed_at=_seconds(row.completed_at),
        failed_at=_seconds(row.failed_at),
        expired_at=_seconds(row.expired_at),
        cancelling_at=_seconds(row.cancelling_at),
        cancelled_at=_seconds(row.cancelled_at),
        request_counts=BatchRequestCounts(row.total, row.completed, row.failed),
        usage=BatchUsage(
            row.input_tokens,
            _InputDetails(row.cached_tokens),
            row.output_tokens,
            _OutputDetails(row.reasoning_tokens),
            row.input_tokens + row.output_tokens,
        ),
        metadata=row.metadata,
    )


def file_page(rows: list[FileRow], limit: int) -> FileList:
    """Return a page of at most ``limit`` files; one row more says that there are more."""
    data = [file_object(row) for row in rows[:limit]]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data, *ends, len(rows) > limit)


def batch_page(rows: list[BatchRow], limit: int) -> BatchList:
    """Return a page of at most ``limit`` batches; one row more says that there are more."""
    data = [batch_object(row) for row in rows[:limit]]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data, *ends, len(rows) > limit)


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
