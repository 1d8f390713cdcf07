"""OpenAI's batches: requests of a file, answered in a file, when there is nothing else to do."""

from __future__ import annotations

import re

import msgspec

from agentray.errors import InvalidRequestError
from agentray.http.batch_bodies import BatchCreate, BatchesQuery
from agentray.http.batch_objects import batch_object, batch_page
from agentray.http.door import TENANT, Door
from agentray.http.errors import BatchEndedError, BatchUnknownError
from agentray.http.exchange import Exchange
from agentray.http.routes_files import DEFAULT_LIFETIME_S, find_file
from agentray.ids import new_batch_id
from agentray.storage.batches import BatchRow

__all__ = ["cancel_batch", "create_batch", "list_batches", "retrieve_batch"]

WINDOW_S = 86_400.0

_BATCH_ID = re.compile(r"batch_[0-9a-hjkmnp-tv-z]{26}")
_create = msgspec.json.Decoder(BatchCreate)


async def create_batch(door: Door, exchange: Exchange) -> None:
    body = await exchange.decode(_create, door.settings.max_body_bytes, openai=True)
    file = await find_file(door, body.input_file_id, param="input_file_id")
    if file.purpose != "batch":
        raise InvalidRequestError(
            f"file {file.id} has the purpose {file.purpose!r}: expected 'batch'",
            param="input_file_id",
        )
    lifetime = body.output_expires_after
    row = await door.batches.create_batch(
        TENANT,
        new_batch_id(),
        input_file_id=file.id,
        endpoint=body.endpoint,
        metadata=body.metadata,
        window_s=WINDOW_S,
        output_ttl_s=DEFAULT_LIFETIME_S if lifetime is None else lifetime.seconds,
    )
    await exchange.reply(batch_object(row))


async def list_batches(door: Door, exchange: Exchange) -> None:
    query = exchange.query(BatchesQuery)
    rows = await door.batches.batches(TENANT, after=query.after, limit=query.limit + 1)
    await exchange.reply(batch_page(rows, query.limit))


async def retrieve_batch(door: Door, exchange: Exchange) -> None:
    batch_id = _checked(exchange.params[0])
    row = await door.batches.batch(TENANT, batch_id)
    await exchange.reply(batch_object(_there(row, batch_id)))


async def cancel_batch(door: Door, exchange: Exchange) -> None:
    batch_id = _checked(exchange.params[0])
    row = _there(await door.batches.cancel_batch(TENANT, batch_id), batch_id)
    if row.status not in ("cancelling", "cancelled"):
        raise BatchEndedError(f"a batch with status {row.status!r} cannot be cancelled")
    await exchange.reply(batch_object(row))


def _checked(batch_id: str) -> str:
    if not _BATCH_ID.fullmatch(batch_id):
        raise _unknown(batch_id)
    return batch_id


def _there(row: BatchRow | None, batch_id: str) -> BatchRow:
    if row is None:
        raise _unknown(batch_id)
    return row


def _unknown(batch_id: str) -> BatchUnknownError:
    shown = batch_id if len(batch_id) <= 40 else batch_id[:40] + "…"
    return BatchUnknownError(f"there is no batch {shown!r}")
