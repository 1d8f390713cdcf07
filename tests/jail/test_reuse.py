"""A slot is as new for each call, whatever the last one left, and whatever ended it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from agentray.tools.sandbox.base import PythonCode, Run, ShellScript, Slot
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
if os.nice(0) != 0:
    found.append("nice")
print(found)
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
    for _ in range(3):
        assert await out(slot, LEAVE) == b"left\n"
        assert await out(slot, FIND) == b"[]\n"
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


async def test_two_slots_do_not_see_each_other(slot: Slot, scene: Scene) -> None:
    mark = str(scene.facts["mark"])
    hide = f"""
import os, socket, time
open("/proc/self/comm", "w").write({mark!r})
for folder in (".", "/tmp", "/dev/shm"):
    try:
        open(os.path.join(folder, "{mark}"), "w").write("mine")
    except OSError:
        pass
try:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\\0{mark}")
    listener.listen()
except OSError:
    pass
time.sleep(10)
"""
    async with opened_jail() as other:
        hiding = asyncio.ensure_future(other.run(Run(PythonCode(hide), limits(wall_s=10.0))))
        pid = await process_named(mark)
        seek = f"""
import os, signal, socket
found = []
for attempt in (
    lambda: os.kill({pid}, 0),
    lambda: os.stat("/proc/{pid}"),
    lambda: os.stat("/tmp/{mark}"),
    lambda: os.stat("/dev/shm/{mark}"),
    lambda: os.stat("{mark}"),
    lambda: socket.socket(socket.AF_UNIX).connect("\\0{mark}"),
):
    try:
        attempt()
    except ProcessLookupError:
        continue
    except PermissionError as error:
        if "not permitted" not in str(error):
            found.append(repr(error))
    except OSError:
        continue
    else:
        found.append("something")
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass
print(found)
"""
        # Small numbers may be its own: kill(2) then tells nothing of the other's.
        assert pid > 64
        outcome = await slot.run(Run(PythonCode(seek), BRIEF))
        assert outcome.stdout in (b"[]\n", b""), said(outcome)
        assert marked_processes(mark) == [pid], "the other's program was reached"
        hiding.cancel()
        await asyncio.gather(hiding, return_exceptions=True)
        await none_named(mark)
        await assert_usable(other)
    await assert_usable(slot)


async def process_named(mark: str) -> int:
    deadline = time.monotonic() + 5
    while not (found := marked_processes(mark)):
        assert time.monotonic() < deadline, f"nothing calls itself {mark}"
        await asyncio.sleep(0.005)
    return found[0]


async def none_named(mark: str) -> None:
    deadline = time.monotonic() + 2
    while marked_processes(mark):
        assert time.monotonic() < deadline, f"something still calls itself {mark}"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("after_ms", [0.0, 0.3, 0.7, 1, 1.5, 2, 3, 4, 6, 9, 20])
async def test_a_call_that_is_cancelled_at_any_time_leaves_a_usable_slot(
    after_ms: float, slot: Slot, scene: Scene
) -> None:
    mark = str(scene.facts["mark"])
    program = ShellScript(f"echo {mark} > /proc/self/comm\nsleep 10")
    running = asyncio.ensure_future(slot.run(Run(program, BRIEF)))
    await asyncio.sleep(after_ms / 1000)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await none_named(mark)
    await assert_usable(slot)


@pytest.mark.parametrize("after_ms", [None, 0.5, 2.0, 30.0])
async def test_a_zygote_that_is_killed_is_replaced(after_ms: float | None, scene: Scene) -> None:
    before = children_of(os.getpid())
    async with opened_jail() as slot:
        await assert_usable(slot)
        zygotes = children_of(os.getpid()) - before
        assert zygotes
        running = None
        if after_ms is not None:
            running = asyncio.ensure_future(
                slot.run(Run(ShellScript("sleep 10"), limits(wall_s=10)))
            )
            await asyncio.sleep(after_ms / 1000)
        for zygote in zygotes:
            os.kill(zygote, signal.SIGKILL)
        if running is not None:
            outcome = await asyncio.wait_for(running, 5)
            assert outcome.reason == "failed", said(outcome)
        await assert_usable(slot)


def children_of(parent: int) -> set[int]:
    """Return the processes that a process started and that live."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == parent and after_name[0] != "Z":
            found.add(int(entry.name))
    return found
