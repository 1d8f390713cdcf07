"""What a slot of the tier ``gvisor`` does, and what it contains; see also ``test_basics.py``.

Without ``runsc`` these are skipped, but not in CI: there, and with AGENTRAY_TEST_REQUIRE_RUNSC=1,
they fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from agentray.errors import SandboxUnavailableError, ToolError
from agentray.tools.sandbox import gvisor
from agentray.tools.sandbox.base import (
    FunctionCall,
    Limits,
    Outcome,
    Program,
    PythonCode,
    Run,
    ShellScript,
    Slot,
)
from agentray.tools.sandbox.opening import open_slot
from agentray.tools.sandbox.probe import examine
from tests.jail.scene import Scene

CEILING = Limits(
    wall_s=20.0,
    cpu_s=10.0,
    memory_bytes=256 << 20,
    pids=16,
    open_files=64,
    scratch_bytes=32 << 20,
    scratch_files=200,
    output_bytes=64 << 10,
)
REQUIRED = bool(os.environ.get("CI")) or os.environ.get("AGENTRAY_TEST_REQUIRE_RUNSC") == "1"

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(
        not REQUIRED and shutil.which("runsc") is None, reason="there is no runsc on PATH"
    ),
]


@contextlib.asynccontextmanager
async def opened(**options: object) -> AsyncIterator[Slot]:
    slot = await open_slot("gvisor", ceiling=CEILING, **options)  # type: ignore[arg-type]
    try:
        yield slot
    finally:
        await slot.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sandbox(scene: Scene) -> AsyncIterator[Slot]:
    """One slot for all: that it still works after each is part of the test."""
    async with opened() as slot:
        yield slot


async def after(slot: Slot, program: Program, **limits: float) -> Outcome:
    """Run a program, see that the next one finds everything new, and return how it went."""
    found = await slot.run(_run(program, **limits))
    shown = (
        "import os\nprint(sum(range(100)), os.listdir('/tmp'), len(os.listdir('/proc/self/fd')))"
    )
    plain = await slot.run(_run(PythonCode(shown)))
    assert (plain.reason, plain.stdout, plain.stderr) == ("ok", b"4950 [] 4\n", b"")
    return found


def _run(program: Program, **limits: float) -> Run:
    return Run(program, msgspec.structs.replace(CEILING, **limits))


async def test_it_is_a_kernel_of_its_own(sandbox: Slot) -> None:
    assert sandbox.tier == "gvisor"
    found = await after(sandbox, PythonCode("print(open('/proc/version').read())"))
    # Which says the same on every machine.
    assert found.stdout.startswith(b"Linux version 4.4.0 "), found
    assert platform.release() != "4.4.0"


async def test_what_programs_print_and_how_they_end_comes_back(sandbox: Slot) -> None:
    code = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)"
    found = await after(sandbox, PythonCode(code))
    assert (found.reason, found.exit_code) == ("exit", 3)
    assert (found.stdout, found.stderr) == (b"out\n", b"err\n")
    found = await after(sandbox, PythonCode("import os\nos.abort()"))
    assert (found.reason, found.signal, found.exit_code) == ("signal", signal.SIGABRT, None)
    found = await after(sandbox, ShellScript("echo $HOME $0; kill -TERM $$"))
    assert (found.reason, found.signal) == ("signal", signal.SIGTERM)
    assert found.stdout == b"/work /bin/sh\n"
    found = await after(sandbox, PythonCode("1 / 0"))
    assert found.exit_code == 1
    assert found.stderr.count(b'File "') == 1
    long = ShellScript(f": {'x' * 200_000}\necho done")
    assert (await after(sandbox, long)).stdout == b"done\n"


async def test_a_function_returns_its_result_whatever_it_prints(sandbox: Slot) -> None:
    found = await after(sandbox, FunctionCall("builtins:dict", b'{"a": [1, "\\u00e9"]}'))
    assert (found.reason, found.result) == ("ok", '{"a": [1, "é"]}'.encode())
    found = await after(sandbox, FunctionCall("json:loads", b'{"s": "{"}'))
    assert (found.reason, found.result) == ("exit", None)
    assert found.error.startswith("JSONDecodeError: ")


async def test_an_operators_modules_are_there_and_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "operators.py").write_text("def double(n): return 2 * n\n")
    async with opened(parked=False, paths=(str(tmp_path),), libraries=("operators",)) as slot:
        found = await slot.run(_run(FunctionCall("operators:double", b'{"n": 21}')))
        assert found.result == b"42", found
        found = await slot.run(_run(PythonCode("import operators\nopen(operators.__file__, 'a')")))
        assert found.exit_code == 1
    assert (tmp_path / "operators.py").read_text() == "def double(n): return 2 * n\n"


async def test_at_the_deadline_all_ends_and_the_output_so_far_is_there(sandbox: Slot) -> None:
    code = """
import os, signal, sys, time
for number in range(1, 32):
    if number not in (9, 19):
        signal.signal(number, signal.SIG_IGN)
sys.stdout.write("so far")
sys.stdout.flush()
if os.fork() == 0:
    os.setsid()
time.sleep(60)
"""
    await settled(sandbox)
    of_the_run = host_processes()
    assert of_the_run
    began = time.monotonic()
    found = await sandbox.run(_run(PythonCode(code), wall_s=1.0))
    assert (found.reason, found.stdout) == ("timeout", b"so far")
    assert time.monotonic() - began < 5
    await until(lambda: not host_processes() & of_the_run)
    await after(sandbox, PythonCode(""))


LIMITED: Sequence[tuple[str, str, dict[str, float], tuple[str, ...]]] = [
    ("one block", "x = bytearray(600 << 20)\nx[::4096] = x[::4096]", {}, ("memory",)),
    ("many blocks", "x = []\nwhile True: x.append(b'y' * 100_000 + bytes(9))", {}, ("memory",)),
    (
        "memory in files without a name",
        "import os\nwhile True:\n f = os.memfd_create('x')\n os.write(f, b'x' * 4_000_000)",
        {"open_files": 64},
        ("memory", "exit"),
    ),
    ("a loop", "while True: pass", {"cpu_s": 1.0}, ("cpu",)),
    (
        "two loops",
        "import os, time\nfor _ in '12':\n if os.fork() == 0:\n  while True: pass\ntime.sleep(19)",
        {"cpu_s": 1.0},
        ("cpu",),
    ),
    ("a flood", "while True: print('x' * 1000)", {}, ("output",)),
    (
        "many files",
        "for n in range(300): open(f'f{n}', 'w')",
        {},
        ("scratch",),
    ),
    (
        "large files",
        "for n in range(5): open(f'f{n}', 'wb').write(bytes(8 << 20))",
        {},
        ("scratch",),
    ),
]


@pytest.mark.parametrize(
    ("code", "limits", "reasons"), [row[1:] for row in LIMITED], ids=[row[0] for row in LIMITED]
)
async def test_a_limit_ends_a_program_and_is_named(
    sandbox: Slot, code: str, limits: dict[str, float], reasons: tuple[str, ...]
) -> None:
    found = await after(sandbox, PythonCode(code), **limits)
    assert found.reason in reasons, found


async def test_processes_and_descriptors_are_limited(sandbox: Slot) -> None:
    bomb = "import os\ntry:\n while True: n = os.fork()\nexcept OSError as e: print('no more')"
    found = await after(sandbox, PythonCode(bomb), wall_s=5.0)
    assert b"no more" in found.stdout
    count = """
import os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0: time.sleep(60)
        made += 1
except OSError: pass
print(made)
"""
    assert (await after(sandbox, PythonCode(count))).stdout == b"15\n"
    # A user namespace would have a count of its own.
    found = await after(sandbox, ShellScript("unshare -U true && echo made"))
    assert found.stdout == b"", found
    many = "import os\nfor n in range(100): last = os.open('/dev/null', 0); print(last)"
    found = await after(sandbox, PythonCode(many))
    assert b"Too many open files" in found.stderr
    assert int(found.stdout.split()[-1]) == 63


async def test_output_past_the_cap_is_dropped_and_stderr_keeps_its_share(sandbox: Slot) -> None:
    code = "import sys\nprint('x' * 3000)\nprint('the end', file=sys.stderr)"
    found = await after(sandbox, PythonCode(code), output_bytes=1000)
    assert (found.reason, found.truncated, found.stderr) == ("ok", True, b"the end\n")
    assert found.stdout == b"x" * (1000 - len(found.stderr))


async def test_the_scratch_goes_from_call_to_call(sandbox: Slot) -> None:
    code = "import os\nos.mkdir('d')\nopen('d/n', 'w').write('1')\nos.symlink('/etc/passwd', 'l')"
    first = await sandbox.run(Run(PythonCode(code), CEILING, keep_scratch=True))
    assert first.scratch is not None
    with tarfile.open(fileobj=io.BytesIO(first.scratch)) as archive:
        assert archive.getnames() == ["d", "d/n"]
    read = Run(PythonCode("print(open('d/n').read())"), CEILING, scratch=first.scratch)
    assert (await sandbox.run(read)).stdout == b"1\n"
    assert b"FileNotFound" in (await after(sandbox, PythonCode("open('d/n')"))).stderr
    slow = PythonCode("import time\nopen('n', 'w').write('1')\ntime.sleep(60)")
    limits = msgspec.structs.replace(CEILING, wall_s=1.0)
    late = await sandbox.run(Run(slow, limits, keep_scratch=True))
    assert late.reason == "timeout"
    assert late.scratch is not None
    with tarfile.open(fileobj=io.BytesIO(late.scratch)) as archive:
        assert archive.getnames() == ["n"]


async def test_there_is_no_network(sandbox: Slot, scene: Scene) -> None:
    code = f"""
import socket
targets = [("127.0.0.1", {scene.facts["port"]}), ("169.254.169.254", 80), ("1.1.1.1", 53)]
for target in targets:
    try:
        socket.create_connection(target, 2)
    except OSError:
        print("no")
for path in ({scene.facts["unix_path"]!r}, "\\0" + {scene.facts["abstract"]!r}):
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.connect(path)
        except OSError:
            print("no")
try:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
except OSError:
    print("no")
"""
    found = await after(sandbox, PythonCode(code))
    assert found.stdout.split() == [b"no"] * 6, found


async def test_nothing_of_the_machine_is_to_be_seen(sandbox: Slot, scene: Scene) -> None:
    halves = scene.secret[:24], scene.secret[24:]
    code = f"""
import os
for path in {[str(scene.host_file), __file__, "/etc/shadow"]!r}:
    try:
        open(path)
    except OSError:
        print("no")
print(sorted(name for name in os.listdir("/proc") if name.isdigit()))
seen = []
for folder, folders, names in os.walk("/"):
    if folder.startswith(("/usr", "/proc", "/sys", "/bin", "/lib", "/sbin")):
        folders.clear()
    for name in names:
        try:
            file = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue
        if os.path.isfile(os.path.join(folder, name)):
            seen.append(os.read(file, 10_000_000))
        os.close(file)
everything = b"".join(seen) + repr(dict(os.environ)).encode()
print("".join({halves!r}).encode() in everything)
"""
    found = await after(sandbox, PythonCode(code))
    assert found.stdout.splitlines() == [b"no"] * 3 + [b"['1']", b"False"], found


async def test_nothing_is_written_outside_the_scratch(sandbox: Slot) -> None:
    code = """
import os
wrote = []
for folder, folders, _ in os.walk("/"):
    if folder.startswith("/proc/") or folder == "/work":
        folders.clear()
        continue
    try:
        open(folder + "/written", "w").close()
        wrote.append(folder)
    except OSError:
        pass
print(wrote, os.path.exists("/work/.tmp/written"))
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/etc/passwd"):
    try:
        open(path, "w").write("x")
        print(path)
    except OSError:
        pass
"""
    found = await after(sandbox, PythonCode(code))
    # Both are the scratch's folder for temporary files.
    shown = found.stdout.decode()
    assert shown in (
        "['/tmp', '/dev/shm'] True\n",
        "['/dev/shm', '/tmp'] True\n",
    ), found


async def test_it_has_no_rights(sandbox: Slot) -> None:
    script = "grep -E '^(CapEff|CapPrm|CapInh)' /proc/self/status; mount -t tmpfs x /tmp"
    found = await after(sandbox, ShellScript(f"{script} || echo none"))
    lines = found.stdout.decode().split()
    assert lines.count("0000000000000000") == 3, found
    assert lines[-1] == "none", found
    if os.geteuid() == 0:
        assert int((await after(sandbox, ShellScript("id -u"))).stdout) >= 100_000


async def test_a_cancelled_run_leaves_nothing_running(sandbox: Slot) -> None:
    running = asyncio.create_task(sandbox.run(_run(PythonCode("import time\ntime.sleep(60)"))))
    await asyncio.wait([running], timeout=0.5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await after(sandbox, PythonCode(""))


async def test_starts_are_told_apart_and_a_slot_can_be_closed_at_any_time(
    sandbox: Slot,
) -> None:
    await settled(sandbox)
    before = host_processes()
    async with opened() as slot:
        assert (await slot.run(_run(PythonCode("")))).start == "parked"
        # The next sandbox is on its way.
    with pytest.raises(ToolError, match="closed"):
        await slot.run(_run(PythonCode("")))
    async with opened(parked=False) as slot:
        await slot.run(_run(PythonCode("")))
        assert (await slot.run(_run(PythonCode("")))).start == "cold"
        with pytest.raises(ToolError, match="memory_bytes"):
            await slot.run(_run(PythonCode(""), memory_bytes=CEILING.memory_bytes + 1))
    await until(lambda: host_processes() <= before)


OPENS_AND_DIES = """
import asyncio, os, signal
from agentray.tools.sandbox.base import Run, ShellScript
from agentray.tools.sandbox.opening import open_slot

async def main():
    slot = await open_slot("gvisor")
    running = asyncio.create_task(slot.run(Run(ShellScript("sleep 4242 & sleep 4242"))))
    await asyncio.wait([running], timeout=1)
    print("up", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_nothing_outlives_a_supervisor_that_is_killed(sandbox: Slot) -> None:
    await settled(sandbox)
    before = host_processes()
    command = [sys.executable, "-c", OPENS_AND_DIES]
    died = await asyncio.to_thread(
        subprocess.run, command, timeout=30, check=False, capture_output=True
    )
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, b"up\n"), died.stderr
    await until(lambda: host_processes() <= before)


async def test_the_probe_finds_it_and_says_what_holds_its_quotas() -> None:
    found = await examine()
    assert found.tier == "gvisor", found.unavailable
    held = {quota.name: quota.by for quota in found.held["gvisor"]}
    assert held["pids"] == held["open files"] == "gVisor"
    assert held["wall time"] == held["output"] == "supervisor"
    assert held["scratch size"] == "tmpfs"
    for name, by in held.items():
        if by == "nothing":
            assert any(line.startswith(name) for line in found.missing)


async def test_without_runsc_it_is_refused_with_that_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailableError, match="no runsc was found on PATH") as caught:
        await open_slot("gvisor")
    assert caught.value.fields["weaker"] == ["jail", "process"]
    slot = await open_slot("gvisor", weakest="jail")
    await slot.close()
    assert slot.tier == "jail"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    found = tmp_path / "runsc"
    found.write_text("#!/bin/sh\necho 'no such platform' >&2\nexit 128\n")
    found.chmod(0o755)
    return found


async def test_a_runsc_that_does_not_work_is_refused_with_what_it_says(
    monkeypatch: pytest.MonkeyPatch, broken: Path
) -> None:
    monkeypatch.setattr(gvisor, "find_runsc", lambda: str(broken))
    with pytest.raises(SandboxUnavailableError, match="no such platform"):
        await open_slot("gvisor")


async def settled(slot: Slot) -> None:
    """Wait until the next sandbox is booted."""
    parking = slot._parking  # type: ignore[attr-defined]
    while parking:
        await asyncio.wait(parking, timeout=10)


def host_processes() -> set[int]:
    """Return the processes of the machine that belong to gVisor."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"runsc" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found


async def until(true: object) -> None:
    deadline = time.monotonic() + 10
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, host_processes()
        await asyncio.sleep(0.02)
