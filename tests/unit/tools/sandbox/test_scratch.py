"""What comes into a scratch and out of it: folders and plain files, within the limits."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from agentray.tools.sandbox import harvest
from agentray.tools.sandbox.base import Limits
from agentray.tools.sandbox.scratch import ScratchError, pack, unpack

LIMITS = Limits(scratch_bytes=1000, scratch_files=5)


def tar(*members: tuple[str, bytes | None], kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind if content is not None else tarfile.DIRTYPE
            member.linkname = link
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    return out.getvalue()


def test_folders_and_files_come_in() -> None:
    found = unpack(tar(("a", None), ("./a/b.txt", b"text"), (".tmp/x", b"")), LIMITS)
    assert [(each.name, each.content) for each in found] == [("a", None), ("a/b.txt", b"text")]


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a/..", "x\udcff/../y"])
def test_a_name_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(ScratchError, match="outside"):
        unpack(tar((name, b"x")), LIMITS)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_devices_and_pipes_are_refused(kind: bytes) -> None:
    with pytest.raises(ScratchError, match="no file or folder"):
        unpack(tar(("x", b""), kind=kind, link="/etc/passwd"), LIMITS)


@pytest.mark.parametrize(
    "content",
    [
        tar(("x", b"y" * 1001)),
        tar(("x", b"y" * 600), ("z", b"y" * 600)),
        tar(*((str(number), b"") for number in range(6))),
    ],
    ids=["one large", "two", "many"],
)
def test_more_than_the_limits_is_refused(content: bytes) -> None:
    with pytest.raises(ScratchError, match="more than"):
        unpack(content, LIMITS)


@pytest.mark.parametrize("content", [b"no tar at all", tar(("x", b"y" * 600))[:700]])
def test_what_is_no_whole_tar_is_refused(content: bytes) -> None:
    with pytest.raises(ScratchError):
        unpack(content, LIMITS)


def sent(folder: Path, most_bytes: int, channel: Path) -> bytes:
    """Return what would be sent of a folder."""
    before = Path.cwd()
    with channel.open("wb") as file:
        os.chdir(folder)
        try:
            harvest.send(file.fileno(), most_bytes)
        finally:
            os.chdir(before)
    return channel.read_bytes()


async def test_folders_and_files_come_out_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c.txt").write_bytes(b"text")
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "up").symlink_to("..")
    (folder / ".tmp").mkdir()
    (folder / ".tmp" / "x").touch()
    os.mkfifo(folder / "pipe")
    packed = await pack(sent(folder, 1000, tmp_path / "channel"), LIMITS)
    assert packed is not None
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        found = {each.name: each for each in archive}
        assert set(found) == {"a", "a/b", "a/b/c.txt"}
        file = archive.extractfile("a/b/c.txt")
        assert file is not None
        assert file.read() == b"text"
    assert [each.name for each in unpack(packed, LIMITS)] == ["a", "a/b", "a/b/c.txt"]


async def test_a_file_that_is_too_large_stays_and_the_rest_comes(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "small").write_bytes(b"x")
    packed = await pack(sent(folder, 1000, tmp_path / "channel"), LIMITS)
    assert packed is not None
    assert [each.name for each in unpack(packed, LIMITS)] == ["small"]


async def test_entries_that_break_off_or_lie_are_no_tar() -> None:
    entry = harvest.ENTRY.pack(1, 0o644, 0, 10) + b"x"
    end = harvest.ENTRY.pack(0, 0, 0, 0)
    assert await pack(entry + b"y" * 5, LIMITS) is None
    assert await pack(entry + b"y" * 10, LIMITS) is None
    assert await pack(entry + b"y" * 10 + end, LIMITS) is not None
    assert await pack(end[:-1], LIMITS) is None
    assert await pack(harvest.ENTRY.pack(4, 0o644, 0, 0) + b"../x" + end, LIMITS) is None
