"""What a slot of each tier does for programs that mean no harm, and for who runs them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentray.errors import SandboxUnavailableError, ToolError
from agentray.tools.sandbox import gvisor, launch, opening, supervisor
from agentray.tools.sandbox.base import FunctionCall, Limits, PythonCode, Run, ShellScript, Slot
from agentray.tools.sandbox.launch import JailLauncher
from agentray.tools.sandbox.opening import open_slot
from agentray.tools.sandbox.probe import examine
from tests.jail.attack import COUNTED

CEILING = Limits(wall_s=20.0, memory_bytes=256 << 20)


@contextlib.asynccontextmanager
async def opened(tier: str = "jail", **options: object) -> AsyncIterator[Slot]:
    slot = await open_slot(tier, ceiling=CEILING, **options)  # type: ignore[arg-type]
    try:
        yield slot
    finally:
        await slot.close()


def python(code: str, **limits: float) -> Run:
    return Run(PythonCode(code), Limits(**{"wall_s": 20.0, **limits}))  # type: ignore[arg-type]


@pytest.fixture(params=["jail", "process"])
async def slot(request: pytest.FixtureRequest) -> AsyncIterator[Slot]:
    async with opened(request.param) as found:
        yield found


async def test_what_a_program_prints_and_how_it_ends_comes_back(slot: Slot) -> None:
    code = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)"
    outcome = await slot.run(python(code))
    assert (outcome.reason, outcome.exit_code) == ("exit", 3)
    assert (outcome.stdout, outcome.stderr) == (b"out\n", b"err\n")
    outcome = await slot.run(python("import os\nos.abort()"))
    assert (outcome.reason, outcome.signal) == ("signal", signal.SIGABRT)
    outcome = await slot.run(Run(ShellScript("echo $HOME $0; kill -TERM $$"), CEILING))
    assert (outcome.reason, outcome.signal) == ("signal", signal.SIGTERM)


async def test_a_script_may_be_longer_than_an_argument(slot: Slot) -> None:
    script = f": {'x' * 200_000}\necho done"
    assert (await slot.run(Run(ShellScript(script), CEILING))).stdout == b"done\n"


async def test_an_exception_is_shown_with_the_programs_own_lines_only(slot: Slot) -> None:
    outcome = await slot.run(python("def f():\n    return 1 / 0\nf()"))
    assert outcome.exit_code == 1
    assert outcome.stderr.decode().count('File "') == 2
    assert b"return 1 / 0" in outcome.stderr


async def test_a_function_returns_its_result_whatever_it_prints(slot: Slot) -> None:
    call = FunctionCall("builtins:dict", b'{"a": [1, "\\u00e9"]}')
    outcome = await slot.run(Run(call, CEILING))
    assert (outcome.reason, outcome.result) == ("ok", '{"a": [1, "é"]}'.encode())
    outcome = await slot.run(Run(FunctionCall("json:loads", b'{"s": "{"}'), CEILING))
    assert outcome.reason == "exit"
    assert outcome.result is None
    assert outcome.error.startswith("JSONDecodeError: ")


async def test_at_the_deadline_all_ends_and_the_output_so_far_is_there(slot: Slot) -> None:
    code = """
import os, sys, time
sys.stdout.write("so far")
if os.fork() == 0:
    os.setsid()
time.sleep(60)
"""
    began = time.monotonic()
    outcome = await slot.run(python(code, wall_s=0.3))
    assert (outcome.reason, outcome.stdout) == ("timeout", b"so far")
    assert time.monotonic() - began < 5
    assert (await slot.run(python("print(1)"))).stdout == b"1\n"


async def test_output_past_the_cap_is_dropped_and_stderr_keeps_its_share(slot: Slot) -> None:
    code = "import sys\nprint('x' * 3000)\nprint('the end', file=sys.stderr)"
    outcome = await slot.run(python(code, output_bytes=1000))
    assert outcome.reason == "ok"
    assert outcome.truncated
    assert outcome.stderr == b"the end\n"
    assert outcome.stdout == b"x" * (1000 - len(outcome.stderr))


async def test_the_scratch_goes_from_call_to_call(slot: Slot) -> None:
    write = Run(PythonCode("open('n', 'w').write('1')"), CEILING, keep_scratch=True)
    first = await slot.run(write)
    assert first.scratch is not None
    read = Run(PythonCode("print(open('n').read())"), CEILING, scratch=first.scratch)
    assert (await slot.run(read)).stdout == b"1\n"
    assert b"FileNotFound" in (await slot.run(python("open('n')"))).stderr


async def test_a_deadline_keeps_the_scratch_too() -> None:
    async with opened() as slot:
        code = "import time\nopen('n', 'w').write('1')\ntime.sleep(60)"
        run = Run(PythonCode(code), Limits(wall_s=0.3), keep_scratch=True)
        outcome = await slot.run(run)
        assert outcome.reason == "timeout"
        assert outcome.scratch is not None
        with tarfile.open(fileobj=io.BytesIO(outcome.scratch)) as archive:
            assert archive.getnames() == ["n"]


async def test_each_run_has_limits_of_its_own() -> None:
    fill = "print(open('x', 'wb').write(b'y' * 3_000_000))"
    async with opened() as slot:
        assert (await slot.run(python(fill))).reason == "ok"
        small = await slot.run(python(fill, scratch_bytes=1 << 20))
        assert small.reason in ("scratch", "exit")
        assert (await slot.run(python(fill))).reason == "ok"
        with pytest.raises(ToolError, match="memory_bytes"):
            await slot.run(python("", memory_bytes=CEILING.memory_bytes + 1))


async def test_cpu_time_is_of_the_whole_tree() -> None:
    code = """
import os, time
for _ in range(2):
    if os.fork() == 0:
        while True: pass
time.sleep(20)
"""
    async with opened() as slot:
        outcome = await slot.run(python(code, cpu_s=0.5))
        assert outcome.reason == "cpu"
        assert outcome.usage.cpu_s >= 0.4


async def test_starts_are_told_apart() -> None:
    async with opened(parked=False) as slot:
        assert (await slot.run(python(""))).start == "warm"
    async with opened() as slot:
        await slot.run(python(""))
        assert (await slot.run(python(""))).start == "parked"


async def test_an_operators_modules_are_there_and_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "operators.py").write_text("def double(n): return 2 * n\n")
    async with opened(paths=(str(tmp_path),), libraries=("operators",)) as slot:
        outcome = await slot.run(Run(FunctionCall("operators:double", b'{"n": 21}'), CEILING))
        assert outcome.result == b"42", outcome
        outcome = await slot.run(python("import operators\nopen(operators.__file__, 'a')"))
        assert outcome.exit_code == 1


async def test_a_cancelled_run_leaves_nothing_running() -> None:
    async with opened() as slot:
        running = asyncio.create_task(slot.run(python("import time\ntime.sleep(60)")))
        await asyncio.wait([running], timeout=0.2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await slot.run(python("print(1)"))).stdout == b"1\n"


OPENS_AND_DIES = """
import asyncio, os, signal, sys
from agentray.tools.sandbox.base import Run, ShellScript
from agentray.tools.sandbox.opening import open_slot

async def main():
    slot = await open_slot("jail")
    running = asyncio.create_task(slot.run(Run(ShellScript("sleep 4242 & sleep 4242"))))
    await asyncio.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_nothing_outlives_a_supervisor_that_is_killed() -> None:
    assert sleepers() == []
    # A session of its own: what it leaves has no other way to end than the jail's.
    died = subprocess.run([sys.executable, "-c", OPENS_AND_DIES], timeout=30, check=False)
    assert died.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while sleepers() and time.monotonic() < deadline:
        os.sched_yield()
    assert sleepers() == []


def sleepers() -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"\x004242\x00" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


async def test_what_a_machine_cannot_give_is_refused_and_weaker_tiers_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "unsupported", lambda: "this is no Linux")
    with pytest.raises(SandboxUnavailableError, match=r"no Linux; .* process") as caught:
        await open_slot("jail")
    assert caught.value.fields["weaker"] == ["process"]
    monkeypatch.setattr(gvisor, "find_runsc", lambda: "")
    with pytest.raises(SandboxUnavailableError, match="no Linux"):
        await open_slot("gvisor", weakest="jail")
    slot = await open_slot("gvisor", weakest="process")
    assert slot.tier == "process"
    await slot.close()
    slot = await open_slot("jail", weakest="process")
    assert slot.tier == "process"
    await slot.close()


@pytest.mark.parametrize("tier", ["jail", "process"])
async def test_a_zygote_that_comes_too_late_is_refused_and_nothing_of_it_is_kept(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    monkeypatch.setattr(supervisor, "_START_S", 0.0)
    with pytest.raises(SandboxUnavailableError, match="not ready after"):
        await open_slot(tier)  # type: ignore[arg-type]
    assert descriptors() == before


def descriptors() -> set[str]:
    found: set[str] = set()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(f"{each.name} {each.readlink()}")
    return found


@pytest.mark.skipif(not COUNTED, reason="no cgroup counts memory here")
async def test_a_run_whose_memory_cannot_be_limited_is_not_begun(tmp_path: Path) -> None:
    async with opened() as slot:
        group = slot._cgroup  # type: ignore[attr-defined]
        folders = group._folders
        group._folders = {**folders, "memory": tmp_path / "gone"}
        outcome = await slot.run(python("print(1)", memory_bytes=96 << 20))
        assert (outcome.reason, outcome.stdout) == ("failed", b"")
        assert "memory" in outcome.error
        group._folders = folders
        assert (await slot.run(python("print(1)"))).stdout == b"1\n"


async def test_a_program_that_cannot_be_spoken_to_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(file: object) -> None:
        raise OSError("no more")

    monkeypatch.setattr(launch, "_reader", broken)
    launcher = JailLauncher()
    with pytest.raises(OSError, match="no more"):
        await launcher.start(["/bin/cat"], {})
    before = descriptors()
    with pytest.raises(OSError, match="no more"):
        await launcher.start(["/bin/cat"], {})
    await asyncio.sleep(0)
    assert len(descriptors()) <= len(before)


async def test_the_probe_finds_the_jail_and_names_what_holds_each_quota() -> None:
    found = await examine()
    assert found.tier in ("jail", "gvisor")
    held = {quota.name: quota.by for quota in found.quotas}
    assert held["wall time"] == "supervisor"
    assert held["network"] == "namespace"
    for name, by in held.items():
        if by == "nothing":
            assert any(line.startswith(name) for line in found.missing)


async def test_a_program_that_stays_is_spoken_to_and_ended() -> None:
    launcher = JailLauncher()
    script = "while read line; do echo got $line $WHO; done; exit 7"
    started = await launcher.start(["/bin/sh", "-c", script], {"WHO": "me"})
    started.stdin.write(b"a\nb\n")
    await started.stdin.drain()
    assert [await started.stdout.readline() for _ in range(2)] == [b"got a me\n", b"got b me\n"]
    started.stdin.close()
    assert await asyncio.wait_for(started.wait(), 5) == 7
    await started.kill()
    started = await launcher.start(["/bin/sh", "-c", "echo up; sleep 60"], {})
    assert await started.stdout.readline() == b"up\n"
    await started.kill()
    assert await started.wait() == -signal.SIGKILL
    await started.kill()
