"""Files and batches in memory: what the door asks of their store, and nobody who runs them."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Any

import msgspec

from agentray.storage.batches import BatchRow, FileRow
from tests.unit.http.memory import AT

__all__ = ["MemoryBatches"]


class MemoryBatches:
    """``FileStore`` and ``BatchBook`` for one tenant."""

    def __init__(self) -> None:
        self.made: dict[str, FileRow] = {}
        self.pieces: dict[str, list[bytes]] = {}
        self.ordered: dict[str, BatchRow] = {}

    async def create_file(
        self, tenant: str, file_id: str, pieces: AsyncIterable[bytes], **facts: Any
    ) -> FileRow:
        found = [piece async for piece in pieces]
        ttl_s = facts.pop("ttl_s")
        self.pieces[file_id] = found
        self.made[file_id] = FileRow(
            tenant=tenant,
            id=file_id,
            size_bytes=sum(map(len, found)),
            created_at=AT,
            expires_at=AT + ttl_s if ttl_s else None,
            **facts,
        )
        return self.made[file_id]

    async def file(self, tenant: str, file_id: str) -> FileRow | None:
        return self.made.get(file_id)

    async def files(
        self,
        tenant: str,
        *,
        purpose: str | None,
        after: str | None,
        limit: int,
        newest_first: bool,
    ) -> list[FileRow]:
        names = sorted(self.made, reverse=newest_first)
        if after is not None:
            names = [n for n in names if (n < after if newest_first else n > after)]
        rows = [self.made[name] for name in names]
        return [row for row in rows if purpose in (None, row.purpose)][:limit]

    async def read_piece(self, tenant: str, file_id: str, number: int) -> bytes | None:
        pieces = self.pieces.get(file_id, [])
        return pieces[number] if number < len(pieces) else None

    async def delete_file(self, tenant: str, file_id: str) -> bool:
        return self.made.pop(file_id, None) is not None

    async def delete_expired_files(self) -> int:
        raise NotImplementedError

    async def create_batch(
        self, tenant: str, batch_id: str, *, window_s: float, **facts: Any
    ) -> BatchRow:
        fields: dict[str, Any] = dict.fromkeys(BatchRow.__struct_fields__)
        counts = ("total", "completed", "failed", "input_tokens", "cached_tokens")
        fields |= dict.fromkeys((*counts, "output_tokens", "reasoning_tokens"), 0)
        fields |= {"tenant": tenant, "id": batch_id, "status": "validating"}
        fields |= {"created_at": AT, "expires_at": AT + window_s, "overdue": False}
        self.ordered[batch_id] = BatchRow(**{**fields, "running": False, **facts})
        return self.ordered[batch_id]

    async def batch(self, tenant: str, batch_id: str) -> BatchRow | None:
        return self.ordered.get(batch_id)

    async def batches(self, tenant: str, *, after: str | None, limit: int) -> list[BatchRow]:
        names = sorted(self.ordered, reverse=True)
        return [self.ordered[n] for n in names if after is None or n < after][:limit]

    async def cancel_batch(self, tenant: str, batch_id: str) -> BatchRow | None:
        row = self.ordered.get(batch_id)
        if row is not None and row.status in ("validating", "in_progress"):
            row = msgspec.structs.replace(row, status="cancelling", cancelling_at=AT)
            self.ordered[batch_id] = row
        return row
