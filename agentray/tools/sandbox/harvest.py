"""Send what a program left in its scratch: folders and plain files, and nothing else."""

from __future__ import annotations

# Without pathlib, which takes longer to import and to use than all else here.
# ruff: noqa: PTH101, PTH123, PTH208
import os
import stat
import struct

__all__ = ["ENTRY", "FOLDER", "send"]

ENTRY = struct.Struct("<HHqQ")
"""Of each entry: length of its name, mode, time of modification, length of its content. The name
follows, then the content; an entry without a name is the last one."""

FOLDER = 0xFFFFFFFFFFFFFFFF
"""The length of a folder's content."""

_DEEPEST = 64
_LONGEST_NAME = 4096
_PART_BYTES = 1 << 18


def send(channel: int, most_bytes: int) -> None:
    """Send the working directory's entries, in order, and no more content than that.

    Nothing else runs in it: a name means the same at each look.
    """
    _walk(channel, ".", "", [most_bytes], 0)
    _write(channel, ENTRY.pack(0, 0, 0, 0))


def _write(channel: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(channel, view) :]


def _walk(channel: int, folder: str, prefix: str, left: list[int], depth: int) -> None:
    for name in sorted(os.listdir(folder)):
        path, shown = f"{folder}/{name}", f"{prefix}{name}"
        encoded = shown.encode(errors="surrogateescape")
        if shown == ".tmp" or len(encoded) > _LONGEST_NAME:
            continue
        facts = os.lstat(path)
        mode, modified = stat.S_IMODE(facts.st_mode) & 0o777, int(facts.st_mtime)
        if stat.S_ISDIR(facts.st_mode) and depth < _DEEPEST:
            os.chmod(path, 0o700)
            _write(channel, ENTRY.pack(len(encoded), mode, modified, FOLDER) + encoded)
            _walk(channel, path, shown + "/", left, depth + 1)
        elif stat.S_ISREG(facts.st_mode) and facts.st_size <= left[0]:
            left[0] -= facts.st_size
            os.chmod(path, 0o600)
            _write(channel, ENTRY.pack(len(encoded), mode, modified, facts.st_size) + encoded)
            with open(path, "rb") as file:
                while part := file.read(_PART_BYTES):
                    _write(channel, part)
