"""The files that tools left in a session: which there are, and what is in them."""

from __future__ import annotations

import asyncio
import io
import tarfile
from typing import Annotated

import msgspec
from msgspec import Meta

from agentray.http.door import TENANT, Door
from agentray.http.errors import FileUnknownError
from agentray.http.exchange import Exchange
from agentray.ids import check_session_id

__all__ = [
    "SessionFile",
    "SessionFilePath",
    "SessionFiles",
    "list_session_files",
    "read_session_file",
]

# Whatever a program called its file: no browser may take it for a page of this origin.
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"content-disposition", b"attachment")]
_BYTES = (b"content-type", b"application/octet-stream")


class SessionFile(msgspec.Struct, frozen=True):
    """A file, by its path below the working directory of the tools."""

    path: str
    size_bytes: int


class SessionFiles(msgspec.Struct, frozen=True):
    """All files that the last tool call left in a session."""

    data: list[SessionFile]


class SessionFilePath(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``GET /v1/sessions/{session_id}/files/content``."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]


async def list_session_files(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    scratch = await door.sessions.scratch(TENANT, session_id)
    # Beside the loop: it may be as large as a sandbox's disk.
    files = await asyncio.to_thread(_list, scratch) if scratch else []
    await exchange.reply(SessionFiles(files))


async def read_session_file(door: Door, exchange: Exchange) -> None:
    session_id = check_session_id(exchange.params[0])
    path = exchange.query(SessionFilePath).path
    scratch = await door.sessions.scratch(TENANT, session_id)
    found = await asyncio.to_thread(_find, scratch, path) if scratch else None
    if found is None:
        shown = path if len(path) <= 200 else path[:200] + "…"
        raise FileUnknownError(f"the session has no file {shown!r}", param="path")
    await exchange.reply_bytes(found, _BYTES, headers=_HEADERS)


def _list(scratch: bytes) -> list[SessionFile]:
    with tarfile.open(fileobj=io.BytesIO(scratch)) as tar:
        files = [SessionFile(_path(member), member.size) for member in tar if member.isreg()]
    return sorted(files, key=lambda file: file.path)


def _find(scratch: bytes, path: str) -> bytes | None:
    with tarfile.open(fileobj=io.BytesIO(scratch)) as tar:
        for member in tar:
            if member.isreg() and _path(member) == path:
                content = tar.extractfile(member)
                return content.read() if content is not None else None
    return None


def _path(member: tarfile.TarInfo) -> str:
    # A name need not be UTF-8 on the disk; an answer has to be.
    return member.name.removeprefix("./").encode(errors="surrogateescape").decode(errors="replace")
