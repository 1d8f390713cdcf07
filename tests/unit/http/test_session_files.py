"""Files that tools left in a session, as its routes and clients show them."""

from __future__ import annotations

import io
import tarfile

import httpx
import pytest

from tests.unit.http.memory import MemorySessions


def tar(**files: bytes) -> bytes:
    """Return a tar of files in folders, one of them a link."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as written:
        folder = tarfile.TarInfo("./out")
        folder.type = tarfile.DIRTYPE
        written.addfile(folder)
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./out/{name}.txt")
            entry.size = len(content)
            written.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("./link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        written.addfile(link)
    return body.getvalue()


@pytest.fixture
async def session(sessions: MemorySessions) -> str:
    info, _ = await sessions.create("default")
    return info.id


async def test_a_session_whose_tools_left_nothing_has_no_files(
    http: httpx.AsyncClient, session: str
) -> None:
    answer = await http.get(f"/v1/sessions/{session}/files")
    assert (answer.status_code, answer.json()) == (200, {"data": []})
    answer = await http.get(f"/v1/sessions/{session}/files/content", params={"path": "a"})
    assert answer.status_code == 404


async def test_files_are_listed_and_read_by_their_paths(
    http: httpx.AsyncClient, sessions: MemorySessions, session: str
) -> None:
    sessions.left = tar(b=b"<script>", a=b"")
    answer = await http.get(f"/v1/sessions/{session}/files")
    assert answer.json() == {
        "data": [
            {"path": "out/a.txt", "size_bytes": 0},
            {"path": "out/b.txt", "size_bytes": 8},
        ]
    }
    content = f"/v1/sessions/{session}/files/content"
    answer = await http.get(content, params={"path": "out/b.txt"})
    assert answer.content == b"<script>"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"] == "attachment"


@pytest.mark.parametrize("path", ["out", "link", "../etc/passwd", "/etc/passwd", "out/c.txt"])
async def test_what_is_no_file_is_not_found(
    http: httpx.AsyncClient, sessions: MemorySessions, session: str, path: str
) -> None:
    sessions.left = tar(b=b"b")
    answer = await http.get(f"/v1/sessions/{session}/files/content", params={"path": path})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "file_not_found"


async def test_files_of_no_session_are_not_found(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/sessions/none/files")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "session_not_found"
