"""A slot is as new for each call, whatever the last one left, and whatever ended it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentray.tools.sandbox.base import PythonCode, Run, Slot
from agentray.tools.sandbox.opening import open_jail
from tests.jail.attack import BRIEF, WORKED, python_program, said
from tests.jail.exhaustion import limits
from tests.jail.looking import MEMORY_SCAN
from tests.jail.scene import Scene, assert_usable, marked_processes
from tests.jail.slots import opened_jail

pytestmark = pytest.mark.asyncio(loop_scope="session")

RANDOM = (
    "import os, random, secrets, tempfile, uuid\n"
    "print(random.random(), random.getrandbits(64), uuid.uuid4(), secrets.token_hex(8),\n"
    "    next(tempfile._get_candidate_names()), os.urandom(8).hex())"
)

LEAVE = """
import builtins, ctypes, os, random, sys
os.environ["LEFT"] = builtins.LEFT = sys.LEFT = "left"
os.umask(0o777)
random.seed(1)
for folder in ("/tmp", "/dev/shm", "/var/tmp", "/run", "."):
    try:
        open(os.path.join(folder, "left"), "w").close()
    except OSError:
        pass
segment = ctypes.CDLL(None).shmget(0x1EF7, 4096, 0o1666)
os.nice(5)
print("left")
"""

FIND = """
import builtins, ctypes, os, random, sys
found = [name for name in ("LEFT",) if name in os.environ or hasattr(builtins, name)
         or hasattr(sys, name)]
for folder in ("/tmp", "/dev/shm", "/var/tmp", "/run", "."):
    path = os.path.join(folder, "left")
    if os.path.exists(path):
        found.append(path)
libc = ctypes.CDLL(None)
segment = libc.shmget(0x1EF7, 4096, 0o666)
if segment >= 0:
    libc.shmctl(segment, 0, None)
    found.append("shared memory")
if os.umask(0o022) == 0o777:
    found.append("umask")
print(found, os.nice(0))
"""


async def out(slot: Slot, code: str, **changes: float) -> bytes:
    outcome = await slot.run(Run(PythonCode(code), limits(**changes)))
    assert outcome.reason == "ok", said(outcome)
    return outcome.stdout


async def test_random_numbers_do_not_repeat_from_call_to_call(slot: Slot) -> None:
    values: list[bytes] = []
    for _ in range(8):
        values += (await out(slot, RANDOM)).split()
    assert len(values) == 48
    assert len(set(values)) == 48


async def test_random_numbers_repeat_where_nothing_seeds_them(scene: Scene) -> None:
    async with opened_jail(without=frozenset({"reseed"})) as slot:
        code = "import random\nprint(random.random())"
        assert len({await out(slot, code) for _ in range(3)}) == 1


async def test_nothing_is_left_of_the_previous_call(slot: Slot) -> None:
    before = await out(slot, FIND)
    assert before.startswith(b"[] ")
    for _ in range(3):
        assert await out(slot, LEAVE) == b"left\n"
        assert await out(slot, FIND) == before
    await assert_usable(slot)


@pytest.mark.parametrize(
    ("defences", "found"),
    [
        ({"ipc_ns", "seccomp"}, b"shared memory"),
        ({"scratch_wipe"}, b"./left"),
    ],
    ids=["System V shared memory", "files"],
)
async def test_something_is_left_where_its_defence_is_left_out(
    defences: set[str], found: bytes, scene: Scene
) -> None:
    async with opened_jail(without=frozenset(defences)) as slot:
        await out(slot, LEAVE)
        assert found in await out(slot, FIND)


async def test_the_source_of_the_previous_call_is_not_in_memory(slot: Slot, scene: Scene) -> None:
    halves = {"past_1": os.urandom(12).hex(), "past_2": os.urandom(12).hex()}
    await out(slot, f"secret = '{halves['past_1']}{halves['past_2']}'\nprint(secret)")
    outcome = await slot.run(Run(python_program(MEMORY_SCAN.format(half="past"), halves), BRIEF))
    assert WORKED not in outcome.stdout, said(outcome)
    assert b"nowhere" in outcome.stdout, said(outcome)
    # And it would be found: the same program, told of it.
    told = {**halves, "whole": halves["past_1"] + halves["past_2"]}
    outcome = await slot.run(Run(python_program(MEMORY_SCAN.format(half="past"), told), BRIEF))
    assert WORKED in outcome.stdout, said(outcome)


async def test_the_host_name_is_that_of_the_jail_and_the_machine_keeps_its_own(
    scene: Scene,
) -> None:
    before = socket.gethostname()
    ask = "import socket\nprint(socket.gethostname())"
    async with opened_jail(without=frozenset({"seccomp", "capabilities"})) as slot:
        usual = await out(slot, ask)
        await out(slot, "import socket\nsocket.sethostname('owned')")
        assert await out(slot, ask) == usual
    assert socket.gethostname() == before
    assert usual.strip() != before.encode()


HIDE = """
import ctypes, os, socket, time
ctypes.CDLL(None).prctl(15, b"{mark}", 0, 0, 0)
for folder in (".", "/tmp", "/dev/shm"):
    try:
        open(os.path.join(folder, "{mark}"), "w").write("mine")
    except OSError:
        pass
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0{mark}")
listener.listen()
print("hidden", flush=True)
time.sleep(10)
"""

SEEK = """
import os, signal, socket
found = []
for name, attempt in (
    ("process", lambda: os.kill({pid}, 0)),
    ("its group", lambda: os.killpg({pid}, 0)),
    ("proc", lambda: os.stat("/proc/{pid}")),
    ("file", lambda: os.stat("/tmp/{mark}")),
    ("file", lambda: os.stat("/dev/shm/{mark}")),
    ("file", lambda: os.stat("{mark}")),
    ("socket", lambda: socket.socket(socket.AF_UNIX).connect("\\0{mark}")),
):
    try:
        attempt()
    except (FileNotFoundError, ProcessLookupError, ConnectionRefusedError):
        continue
    except OSError as error:
        # It is there, and may not be reached: that is told, too.
        name = "%s: %s" % (name, error)
    found.append(name)
print(found)
"""

KILL = """
import os, signal
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass
"""


@contextlib.asynccontextmanager
async def hidden(mark: str, without: frozenset[str] = frozenset()) -> AsyncIterator[int]:
    """Have a program run in a slot of its own; yield the program's pid."""
    async with opened_jail(without) as slot:
        program = PythonCode(HIDE.format(mark=mark))
        running = asyncio.ensure_future(slot.run(Run(program, limits(wall_s=10.0))))
        pid = await process_named(mark)
        yield pid
        if without:
            # It has no namespace's end to end with.
            os.kill(pid, signal.SIGKILL)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        if not without:
            assert marked_processes(mark) == []
            await assert_usable(slot)


async def test_two_slots_do_not_see_each_other(slot: Slot, scene: Scene) -> None:
    mark = str(scene.facts["mark"])
    async with hidden(mark) as pid:
        # Small numbers may be its own: kill(2) then tells nothing of the other's.
        assert pid > 64
        assert await out(slot, SEEK.format(mark=mark, pid=pid)) == b"[]\n"
        await slot.run(Run(PythonCode(KILL), BRIEF))
        assert marked_processes(mark) == [pid], "the other's program was reached"
    await assert_usable(slot)


@pytest.mark.parametrize(
    ("defence", "found"), [("pid_ns", b"process"), ("net_ns", b"socket")], ids=["pid", "net"]
)
async def test_two_slots_see_each_other_where_a_defence_is_left_out(
    defence: str, found: bytes, scene: Scene
) -> None:
    mark, without = str(scene.facts["mark"]), frozenset({defence})
    async with hidden(mark, without) as pid, opened_jail(without) as slot:
        assert found in await out(slot, SEEK.format(mark=mark, pid=pid))
    await none_left({pid})


async def process_named(mark: str) -> int:
    deadline = time.monotonic() + 5
    while not (found := marked_processes(mark)):
        assert time.monotonic() < deadline, f"nothing calls itself {mark}"
        await asyncio.sleep(0.005)
    return found[0]


MARKED = """
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b"{mark}", 0, 0, 0)
if os.fork() == 0:
    os.setsid()
time.sleep(10)
"""


@pytest.mark.parametrize("after_ms", [0.0, 0.3, 0.7, 1, 1.5, 2, 3, 4, 6, 9, 20, None])
async def test_a_call_that_is_cancelled_at_any_time_leaves_a_usable_slot(
    after_ms: float | None, slot: Slot, scene: Scene
) -> None:
    mark = str(scene.facts["mark"])
    program = PythonCode(MARKED.format(mark=mark))
    running = asyncio.ensure_future(slot.run(Run(program, limits(wall_s=10.0))))
    if after_ms is None:
        await process_named(mark)
    else:
        await asyncio.sleep(after_ms / 1000)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert marked_processes(mark) == []
    await assert_usable(slot)


@pytest.mark.parametrize("after_ms", [0, 1, 3, 6, 10, 20, 30, 40])
async def test_a_slot_that_is_cancelled_while_it_opens_leaves_nothing(
    after_ms: float, scene: Scene
) -> None:
    before = children()
    opening = asyncio.ensure_future(open_jail(ceiling=BRIEF))
    await asyncio.sleep(after_ms / 1000)
    made = below(children() - before)
    opening.cancel()
    await asyncio.wait([opening])
    if not opening.cancelled():
        # It was open by then.
        await opening.result().close()
    await none_left(made | below(children() - before))


@pytest.mark.parametrize("when", ["idle", "at its start", "while it runs"])
async def test_a_zygote_that_is_killed_is_replaced(when: str, scene: Scene) -> None:
    before, mark = children(), str(scene.facts["mark"])
    async with opened_jail() as slot:
        await assert_usable(slot)
        outer = children() - before
        made = below(outer)
        # One that waits, and below it the one that forks, which is another namespace's init.
        zygotes = [pid for pid, parent in parents().items() if parent in outer or pid in outer]
        assert len(zygotes) == 2
        # It may be run a second time if it had not begun: then it comes to its end.
        code = MARKED.format(mark=mark).replace("sleep(10)", "sleep(0.5)")
        running = None
        if when != "idle":
            running = asyncio.ensure_future(slot.run(Run(PythonCode(code), BRIEF)))
            await asyncio.sleep(0)
        if when == "while it runs":
            await process_named(mark)
        for zygote in zygotes:
            # With the first, others go.
            with contextlib.suppress(ProcessLookupError):
                os.kill(zygote, signal.SIGKILL)
        if running is not None:
            outcome = await running
            assert outcome.reason == "failed" or when == "at its start", said(outcome)
        else:
            await none_left(made)
        await assert_usable(slot)
        made |= below(children() - before)
    await none_left(made)


CHILD_OF_THE_ZYGOTE = """
import ctypes, time
libc = ctypes.CDLL(None)
if libc.syscall(ctypes.c_long(56), ctypes.c_long(0x8000 | 17), None, None, None, None) == 0:
    libc.prctl(15, b"{mark}", 0, 0, 0)
    while True:
        libc.pause()
print("made", flush=True)
time.sleep(0.2)
"""


@pytest.mark.parametrize("how", ["at its deadline", "cancelled"])
async def test_a_zygote_that_is_held_up_is_replaced(how: str, scene: Scene) -> None:
    """Even where a program finds a way to hold it up, as here one that the filter closes."""
    before, mark = children(), str(scene.facts["mark"])
    program = PythonCode(CHILD_OF_THE_ZYGOTE.format(mark=mark))
    async with opened_jail(without=frozenset({"seccomp"})) as slot:
        await assert_usable(slot)
        made = below(children() - before)
        began = time.monotonic()
        running = asyncio.ensure_future(slot.run(Run(program, limits(wall_s=1.0))))
        if how == "cancelled":
            await process_named(mark)
            running.cancel()
            await asyncio.wait([running], timeout=8)
            assert running.cancelled()
        else:
            outcome = await running
            assert outcome.reason == "timeout", said(outcome)
            assert outcome.stdout == b"made\n", said(outcome)
        assert time.monotonic() - began < 8
        await none_left(made)
        await assert_usable(slot)


HELD_UP = """
import asyncio, sys
from agentray.tools.sandbox.base import PythonCode, Run
from agentray.tools.sandbox.opening import open_jail

async def main():
    slot = await open_jail(without=frozenset({"seccomp"}))
    await slot.run(Run(PythonCode(sys.argv[1])))

asyncio.run(main())
"""


async def test_a_zygote_that_is_held_up_ends_with_its_supervisor(scene: Scene) -> None:
    mark = str(scene.facts["mark"])
    source = CHILD_OF_THE_ZYGOTE.format(mark=mark)
    supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", HELD_UP, source)
    try:
        await process_named(mark)
        made = below({supervisor.pid})
        await until_gone(mark)
    finally:
        supervisor.kill()
        await supervisor.wait()
    await none_left(made)


async def until_gone(mark: str) -> None:
    deadline = time.monotonic() + 5
    while marked_processes(mark):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def none_left(processes: set[int]) -> None:
    deadline = time.monotonic() + 5
    while left := processes & parents().keys():
        assert time.monotonic() < deadline, f"still there: {left}"
        await asyncio.sleep(0.005)


def parents() -> dict[int, int]:
    """Return the processes of the machine that live, each with its parent."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if after_name[0] != "Z":
            found[int(entry.name)] = int(after_name[1])
    return found


def children() -> set[int]:
    """Return the processes that this one started: of a jail, one."""
    return {pid for pid, parent in parents().items() if parent == os.getpid()}


def below(processes: set[int]) -> set[int]:
    """Return processes and all below them."""
    parent_of, found = parents(), set(processes)
    while more := {pid for pid, parent in parent_of.items() if parent in found} - found:
        found |= more
    return found
