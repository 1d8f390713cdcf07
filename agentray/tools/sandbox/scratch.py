"""Take scratch folders in and out as tars, and let nothing through but folders and plain files."""

from __future__ import annotations

import asyncio
import io
import tarfile
from typing import NamedTuple

from agentray.tools.sandbox import harvest
from agentray.tools.sandbox.base import Limits

__all__ = ["Entry", "ScratchError", "most_bytes", "pack", "unpack", "unpacked"]

_LARGE_BYTES = 1 << 20
_LONGEST_NAME = 4096


class ScratchError(Exception):
    """A tar that may not be unpacked; the message says why."""


class Entry(NamedTuple):
    """A folder (no content) or a file."""

    name: str
    mode: int
    modified: int
    content: bytes | None

    def wire(self) -> tuple[str, int, int, bytes | None]:
        return self.name, self.mode, self.modified, self.content


def most_bytes(limits: Limits) -> int:
    """Return the most that entries of a scratch within the limits can take."""
    return limits.scratch_bytes + limits.scratch_files * (_LONGEST_NAME + harvest.ENTRY.size)


def _safe(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or len(name) > _LONGEST_NAME:
        raise ScratchError(f"the tar names a path outside the scratch: {name[:80]!r}")
    return "/".join(parts)


def unpack(tar: bytes, limits: Limits) -> list[Entry]:
    """Return the files and folders of a tar.

    Raises:
        ScratchError: if it is no tar, holds links or devices, names paths outside, or more than
            the limits.
    """
    found: list[Entry] = []
    size_bytes = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
            for member in archive:
                name = _safe(member.name)
                if not (member.isreg() or member.isdir()):
                    raise ScratchError(f"the tar holds what is no file or folder: {name[:80]!r}")
                if member.issparse():
                    raise ScratchError(f"the tar holds a sparse file: {name[:80]!r}")
                size_bytes += member.size
                if len(found) >= limits.scratch_files or size_bytes > limits.scratch_bytes:
                    raise ScratchError("the tar holds more than the scratch may")
                if not name or name == ".tmp" or name.startswith(".tmp/"):
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                content = file.read() if file else None
                mode = (member.mode & 0o777) | (0o600 if file else 0o700)
                found.append(Entry(name, mode, max(0, int(member.mtime)), content))
    except (tarfile.TarError, EOFError, ValueError, OverflowError, UnicodeError) as error:
        raise ScratchError(f"not a tar: {error}") from error
    return found


async def unpacked(tar: bytes, limits: Limits) -> list[Entry]:
    """Do :func:`unpack`; a large one does not hold up what else this process does."""
    if len(tar) > _LARGE_BYTES:
        return await asyncio.to_thread(unpack, tar, limits)
    return unpack(tar, limits)


async def pack(entries: bytes, limits: Limits) -> bytes | None:
    """Return the tar of what a zygote collected; None if that is not whole, or more than may be."""
    try:
        if len(entries) > _LARGE_BYTES:
            return await asyncio.to_thread(_pack, entries, limits)
        return _pack(entries, limits)
    except ScratchError:
        return None


def _pack(entries: bytes, limits: Limits) -> bytes | None:
    out = io.BytesIO()
    position = count = 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        while len(entries) - position >= harvest.ENTRY.size:
            name_size, mode, modified, size = harvest.ENTRY.unpack_from(entries, position)
            position += harvest.ENTRY.size
            if name_size == 0:
                return out.getvalue() if _closed(archive) else None
            name = entries[position : position + name_size].decode(errors="surrogateescape")
            position += name_size
            count += 1
            folder = size == harvest.FOLDER
            size = 0 if folder else size
            if count > limits.scratch_files or position + size > len(entries):
                return None
            member = tarfile.TarInfo(_safe(name))
            member.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
            member.mode, member.mtime, member.size = mode, modified, size
            archive.addfile(member, io.BytesIO(entries[position : position + size]))
            position += size
    return None


def _closed(archive: tarfile.TarFile) -> bool:
    archive.close()
    return True
