"""What attacks look for: secrets, listeners and descriptors of the process that opens the slots."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from agentray.tools.sandbox.base import Outcome, PythonCode, Run, Slot
from tests.jail.attack import BRIEF, said

__all__ = ["Scene", "assert_usable", "marked_processes", "set_scene"]


# Its folder for temporary files is there, and is empty too.
_PLAIN = (
    "import os\nprint(sum(range(100)), [*os.listdir('/tmp'), *(set(os.listdir('.')) - {'.tmp'})])"
)


_REPOSITORY_FILE = Path(__file__).resolve().parents[2] / "pyproject.toml"


class Scene(msgspec.Struct, frozen=True):
    """``facts`` is what an attack is told. Secrets come in two halves, so that the program that
    looks for one does not hold it."""

    facts: dict[str, object]
    secret: str
    host_file: Path


def _open_to_all(path: Path) -> Path:
    """Have nothing but the jail keep anybody from it."""
    path.chmod(0o777 if path.is_socket() else 0o755)
    return path


@contextmanager
def set_scene() -> Iterator[Scene]:
    """Put up what is there to be found, where everybody may go."""
    first, second = secrets.token_hex(12), secrets.token_hex(12)
    with ExitStack() as stack:
        folder = _open_to_all(Path(tempfile.mkdtemp(prefix="agentray-scene-")))
        stack.callback(shutil.rmtree, folder)
        host_file = folder / "of-the-host"
        host_file.write_text(first + second)
        of_repository = folder / "pyproject.toml"
        shutil.copy(_REPOSITORY_FILE, of_repository)
        for each in (host_file, of_repository):
            _open_to_all(each)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(folder / "socket"))
        unix.listen()
        _open_to_all(folder / "socket")
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        name = f"agentray-jail-{first}"
        abstract.bind("\0" + name)
        abstract.listen()
        # As careless as a library can be: open, and handed to every child.
        inherited = os.open(host_file, os.O_RDONLY)
        stack.callback(os.close, inherited)
        os.set_inheritable(inherited, True)
        os.environ["AGENTRAY_TEST_SECRET"] = first + second
        stack.callback(os.environ.pop, "AGENTRAY_TEST_SECRET")
        facts: dict[str, object] = {
            "secret_1": first,
            "secret_2": second,
            "host_file": str(host_file),
            "home": os.environ.get("HOME", "/root"),
            "repository_file": str(_REPOSITORY_FILE),
            "repository_files": [str(_REPOSITORY_FILE), str(of_repository)],
            "port": listener.getsockname()[1],
            "unix_path": str(folder / "socket"),
            "abstract": name,
            "supervisor": os.getpid(),
            "mark": "ar" + secrets.token_hex(5),
        }
        yield Scene(facts, first + second, host_file)


def marked_processes(mark: str) -> list[int]:
    """Return the processes of the machine that gave themselves that name and that live."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            facts = (entry / "stat").read_text()
        except OSError:
            continue
        name, _, rest = facts.partition("(")[2].rpartition(") ")
        if name == mark and not rest.startswith("Z"):
            found.append(int(entry.name))
    return found


async def assert_usable(slot: Slot) -> Outcome:
    """Assert that the next call on the slot works as if nothing had been."""
    outcome = await slot.run(Run(PythonCode(_PLAIN), BRIEF))
    assert outcome.reason == "ok", said(outcome)
    assert outcome.exit_code == 0, said(outcome)
    assert outcome.stdout == b"4950 []\n", said(outcome)
    assert outcome.stderr == b"", said(outcome)
    assert not outcome.truncated, said(outcome)
    return outcome
