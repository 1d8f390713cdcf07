"""OpenAI's files: what batches read and write."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from agentray.errors import InvalidRequestError
from agentray.http.batch_bodies import FileForm, FilesQuery
from agentray.http.batch_objects import FileDeleted, file_object, file_page
from agentray.http.door import TENANT, Door
from agentray.http.errors import BodyTooLargeError, FileUnknownError, validation_error
from agentray.http.exchange import Exchange, Header
from agentray.ids import new_file_id
from agentray.storage.batches import FileRow

__all__ = [
    "create_file",
    "delete_file",
    "find_file",
    "list_files",
    "retrieve_file",
    "retrieve_file_content",
]

DEFAULT_LIFETIME_S = 30 * 86_400
PIECE_BYTES = 256 * 1024
# What a form has around its file.
_FORM_BYTES = 64 * 1024
_MAX_NAME_CHARS = 255

_FILE_ID = re.compile(r"file-[0-9a-hjkmnp-tv-z]{26}")
_BYTES: Header = (b"content-type", b"application/octet-stream")


async def create_file(door: Door, exchange: Exchange) -> None:
    most = door.batch.max_file_bytes
    with door.uploads.admit():
        await exchange.reply(file_object(await _kept(door, exchange, most)))


async def _kept(door: Door, exchange: Exchange, most: int) -> FileRow:
    """Take in a form's file, of ``most`` bytes, and store it."""
    async with _form(exchange, most + _FORM_BYTES) as (fields, upload):
        try:
            form = msgspec.convert(fields, FileForm, strict=False)
        except msgspec.ValidationError as error:
            raise validation_error(error, openai=True) from error
        if upload.size is not None and upload.size > most:
            raise BodyTooLargeError(f"the file is larger than {most} bytes", limit_bytes=most)
        name = (upload.filename or "").replace("\0", "")[:_MAX_NAME_CHARS]
        return await door.files.create_file(
            TENANT,
            new_file_id(),
            _pieces(upload),
            purpose="batch",
            # Half a character, as UTF-7 may name it, is none that could be stored or sent.
            filename=name.encode("utf-8", "replace").decode() or "upload.jsonl",
            ttl_s=form.seconds or DEFAULT_LIFETIME_S,
        )


@asynccontextmanager
async def _form(
    exchange: Exchange, limit_bytes: int
) -> AsyncGenerator[tuple[dict[str, str], UploadFile]]:
    """Give a form's fields and its file, which is on disk if it is large.

    Raises:
        BodyTooLargeError: as it says.
        InvalidRequestError: it is no such form, or has no file.
        ClientGoneError: the client left.
    """
    kind = exchange.header(b"content-type") or ""
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise InvalidRequestError("expected a form: multipart/form-data with `purpose` and `file`")
    parser = MultiPartParser(
        Headers(raw=exchange.scope["headers"]),
        exchange.pieces(limit_bytes),
        max_files=1,
        max_fields=16,
        max_part_size=_FORM_BYTES,
    )
    try:
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise InvalidRequestError(f"malformed form: {error.message}") from error
        except UnicodeError as error:
            said = "malformed form: it is not in the charset that its type names"
            raise InvalidRequestError(said) from error
        fields = {key: value for key, value in form.multi_items() if isinstance(value, str)}
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise InvalidRequestError("`file` is missing, or has no file name", param="file")
        yield fields, upload
    finally:
        # Not the form's own close: a file that was cut off is in none, and would stay open.
        for file in parser._files_to_close_on_error:  # pyright: ignore[reportPrivateUsage]
            file.close()


async def _pieces(upload: UploadFile) -> AsyncGenerator[bytes]:
    while piece := await upload.read(PIECE_BYTES):
        yield piece


async def list_files(door: Door, exchange: Exchange) -> None:
    query = exchange.query(FilesQuery)
    rows = await door.files.files(
        TENANT,
        purpose=query.purpose or None,
        after=query.after,
        limit=query.limit + 1,
        newest_first=query.order == "desc",
    )
    await exchange.reply(file_page(rows, query.limit))


async def find_file(door: Door, file_id: str, *, param: str | None = None) -> FileRow:
    """Return a file. Raises ``FileUnknownError``."""
    row = await door.files.file(TENANT, file_id) if _FILE_ID.fullmatch(file_id) else None
    if row is None:
        raise _unknown(file_id, param)
    return row


def _unknown(file_id: str, param: str | None = None) -> FileUnknownError:
    shown = file_id if len(file_id) <= 40 else file_id[:40] + "…"
    return FileUnknownError(f"there is no file {shown!r}", param=param)


async def retrieve_file(door: Door, exchange: Exchange) -> None:
    await exchange.reply(file_object(await find_file(door, exchange.params[0])))


async def retrieve_file_content(door: Door, exchange: Exchange) -> None:
    row = await find_file(door, exchange.params[0])
    await exchange.reply_pieces(_content(door, row), row.size_bytes, _BYTES)


async def _content(door: Door, row: FileRow) -> AsyncGenerator[bytes]:
    number = 0
    while (piece := await door.files.read_piece(TENANT, row.id, number)) is not None:
        yield piece
        number += 1


async def delete_file(door: Door, exchange: Exchange) -> None:
    row = await find_file(door, exchange.params[0])
    if not await door.files.delete_file(TENANT, row.id):
        raise _unknown(row.id)
    await exchange.reply(FileDeleted(row.id))
