"""Files come out of a jail, and go into one, as plain files below its scratch directory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from agentray.tools.sandbox.base import Outcome, PythonCode, Run, Slot
from tests.jail.attack import BRIEF, said
from tests.jail.exhaustion import limits
from tests.jail.scene import Scene, assert_usable

pytestmark = pytest.mark.asyncio(loop_scope="session")

MIB = 1024 * 1024


async def kept(slot: Slot, code: str, **changes: float) -> tuple[Outcome, dict[str, bytes]]:
    """Run code; return the files that it left, after looking at each name and kind."""
    source = "import os, socket, sys\n" + code
    outcome = await slot.run(
        Run(PythonCode(source), limits(wall_s=5.0, **changes), keep_scratch=True)
    )
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(outcome.scratch or tar()), mode="r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            assert not path.is_absolute(), member.name
            assert ".." not in path.parts, member.name
            assert member.isreg() or member.isdir(), (member.name, member.type)
            assert member.mode & 0o7000 == 0, (member.name, oct(member.mode))
            if member.isreg():
                content = archive.extractfile(member)
                assert content is not None
                files[member.name.removeprefix("./")] = content.read()
    return outcome, files


def tar(*members: tuple[str, bytes], links: tuple[tuple[str, str, bytes], ...] = ()) -> bytes:
    """Return an archive of files, after links of a kind from a name to a target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


async def test_plain_files_and_folders_come_out(slot: Slot) -> None:
    _, files = await kept(
        slot,
        "os.makedirs('a/b')\nopen('a/b/c.txt', 'w').write('deep')\nopen('é', 'wb').write(b'\\0')",
    )
    assert files == {"a/b/c.txt": b"deep", "é": b"\0"}
    await assert_usable(slot)


async def test_links_in_artifacts_lead_nowhere(slot: Slot, scene: Scene) -> None:
    code = f"""
host_file = {str(scene.host_file)!r}
targets = host_file, "/etc/passwd", "/proc/self/environ", "../../../etc/passwd", "/"
for number, target in enumerate(targets):
    os.symlink(target, "link%d" % number)
os.mkdir("folder")
os.symlink("..", "folder/up")
open("real", "w").write("real")
os.link("real", "hard")
os.symlink("real", "soft")
"""
    outcome, files = await kept(slot, code)
    assert outcome.reason == "ok", said(outcome)
    assert files["real"] == b"real"
    assert set(files) <= {"real", "hard", "soft"}
    assert set(files.values()) == {b"real"}
    assert scene.secret.encode() not in (outcome.scratch or b"")
    await assert_usable(slot)


async def test_pipes_sockets_and_devices_are_no_artifacts(slot: Slot) -> None:
    code = """
os.mkfifo("pipe")
try:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
except OSError:
    pass
open("real", "w").write("real")
"""
    outcome, files = await kept(slot, code)
    assert outcome.reason == "ok", said(outcome)
    assert files == {"real": b"real"}
    await assert_usable(slot)


async def test_artifacts_with_odd_names_come_out_or_are_left_out(slot: Slot) -> None:
    code = r"""
for name in (b"\xff\xfe", b"new\nline", b"-rf", b"C:\\x", b"x" * 255, b" ", b"\x1b[2J", b"..."):
    open(name, "w").write("odd")
"""
    outcome, files = await kept(slot, code)
    assert outcome.reason == "ok", said(outcome)
    assert files["-rf"] == b"odd"
    assert set(files.values()) == {b"odd"}
    await assert_usable(slot)


async def test_artifacts_that_their_owner_locked_do_not_break_the_slot(slot: Slot) -> None:
    code = """
os.makedirs("closed/inner")
open("closed/inner/file", "w").write("x")
open("unreadable", "w").write("x")
os.chmod("unreadable", 0)
os.chmod("closed", 0)
os.chmod(".", 0)
"""
    outcome, _ = await kept(slot, code)
    assert outcome.reason == "ok", said(outcome)
    await assert_usable(slot)


async def test_folders_nested_past_every_path_do_not_break_the_slot(slot: Slot) -> None:
    code = """
for _ in range(190):
    os.mkdir("d" * 250)
    os.chdir("d" * 250)
open("deepest", "w").write("x")
"""
    outcome, _ = await kept(slot, code)
    assert outcome.reason in ("ok", "scratch"), said(outcome)
    await assert_usable(slot)


async def test_artifacts_are_no_larger_than_the_scratch(slot: Slot) -> None:
    code = """
with open("sparse", "wb") as file:
    file.truncate(12 << 20)
for number in range(20):
    os.link("sparse", "again%d" % number)
print("made")
"""
    outcome, _ = await kept(slot, code)
    assert b"made" in outcome.stdout, said(outcome)
    assert len(outcome.scratch or b"") <= BRIEF.scratch_bytes + 2 * MIB
    await assert_usable(slot)


async def test_the_scratch_directory_removed_or_replaced_does_not_break_the_slot(
    slot: Slot, scene: Scene
) -> None:
    code = f"""
here = os.getcwd()
for attempt in (
    lambda: os.rmdir(here),
    lambda: os.rename(here, here + "-gone"),
    lambda: os.symlink({str(scene.host_file.parent)!r}, here),
):
    try:
        attempt()
    except OSError:
        pass
"""
    outcome, files = await kept(slot, code)
    assert outcome.reason == "ok", said(outcome)
    assert files == {}
    await assert_usable(slot)


async def test_what_a_killed_program_left_comes_out_too(slot: Slot) -> None:
    code = "open('half', 'w').write('half')\nimport time\ntime.sleep(5)"
    outcome = await slot.run(Run(PythonCode(code), limits(wall_s=0.5), keep_scratch=True))
    assert outcome.reason == "timeout", said(outcome)
    with tarfile.open(fileobj=io.BytesIO(outcome.scratch or b"")) as archive:
        assert [Path(name).name for name in archive.getnames() if name != "."] == ["half"]
    await assert_usable(slot)


OUTSIDE = "the tar names a path outside the scratch: "
NO_FILE = "the tar holds what is no file or folder: "
TOO_MUCH = "the tar holds more than the scratch may"
NO_TAR = "not a tar: "


def links(name: str, target: str, kind: bytes, *members: tuple[str, bytes]) -> bytes:
    return tar(*members, links=((name, target, kind),))


ESCAPES: dict[str, tuple[Callable[[str], bytes], str]] = {
    "a name that climbs to a folder": (
        lambda mark: tar((f"../../../../tmp/{mark}", b"owned")),
        OUTSIDE,
    ),
    "a name that climbs": (lambda mark: tar((f"../{mark}", b"owned")), OUTSIDE),
    "a name that climbs later": (lambda mark: tar((f"a/../../{mark}", b"owned")), OUTSIDE),
    "an absolute name": (lambda mark: tar((f"/tmp/{mark}", b"owned")), OUTSIDE),
    "an absolute name of the root": (lambda mark: tar((f"/{mark}", b"owned")), OUTSIDE),
    "a symbolic link and a file behind it": (
        lambda mark: links("out", "/tmp", tarfile.SYMTYPE, (f"out/{mark}", b"owned")),
        NO_FILE,
    ),
    "a climbing link and a file behind it": (
        lambda mark: links("out", "../../../../tmp", tarfile.SYMTYPE, (f"out/{mark}", b"owned")),
        NO_FILE,
    ),
    "a hard link to a file of the machine": (
        lambda mark: links("passwd", "/etc/passwd", tarfile.LNKTYPE),
        NO_FILE,
    ),
    "a device": (lambda mark: links("device", "", tarfile.BLKTYPE), NO_FILE),
    "no archive at all": (lambda mark: b"\xff" * 2048, NO_TAR),
    "an archive cut short": (lambda mark: tar(("file", b"x" * 4096))[:1500], NO_TAR),
    "more than fits": (lambda mark: tar(("big", b"x" * (20 * MIB))), TOO_MUCH),
    "more files than fit": (
        lambda mark: tar(*((f"file{number}", b"") for number in range(500))),
        TOO_MUCH,
    ),
}


@pytest.mark.parametrize("name", ESCAPES)
async def test_files_that_go_in_stay_in(name: str, slot: Slot, scene: Scene) -> None:
    mark = str(scene.facts["mark"])
    build, why = ESCAPES[name]
    code = PythonCode("import os\nprint(os.listdir('.'))")
    outcome = await slot.run(Run(code, BRIEF, scratch=build(mark)))
    # Refused as a whole, before anything of it is there: for what it is, not for a broken tar.
    assert outcome.reason == "scratch", said(outcome)
    assert outcome.error.startswith(why), said(outcome)
    assert outcome.stdout == b"", said(outcome)
    for folder in (Path("/tmp"), Path("/"), Path.cwd(), Path.cwd().parent):
        assert not (folder / mark).exists()
    await assert_usable(slot)


async def test_files_that_go_in_come_out_again(slot: Slot) -> None:
    archive = tar(("notes/a.txt", b"kept"), ("b", b"\0\xff"))
    code = PythonCode("print(open('notes/a.txt').read())\nopen('notes/a.txt', 'a').write('!')")
    outcome = await slot.run(Run(code, BRIEF, scratch=archive, keep_scratch=True))
    assert outcome.stdout == b"kept\n", said(outcome)
    with tarfile.open(fileobj=io.BytesIO(outcome.scratch or b"")) as back:
        found = {member.name.removeprefix("./"): member for member in back if member.isreg()}
        assert set(found) == {"notes/a.txt", "b"}
        changed = back.extractfile(found["notes/a.txt"])
        assert changed is not None
        assert changed.read() == b"kept!"
    await assert_usable(slot)
