"""Where a part of the machine's ``/proc`` is covered, as in most containers, jails have none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.jail.unprivileged import COVERED

RUNS = """
import asyncio, json, sys
from agentray.tools.sandbox.base import Limits, PythonCode, Run
from agentray.tools.sandbox.opening import open_slot
from agentray.tools.sandbox.probe import examine

PROGRAMS = {
    "proc": "import os\\nprint(os.listdir('/proc'))",
    "small": "print(len(b'x' * (84 << 20)))",
    "large": "print(len(b'x' * (240 << 20)))",
}

async def main():
    found = {}
    slot = await open_slot("jail", ceiling=Limits(memory_bytes=96 << 20))
    try:
        for name, code in PROGRAMS.items():
            outcome = await slot.run(Run(PythonCode(code), Limits(memory_bytes=96 << 20)))
            found[name] = [outcome.reason, outcome.stdout.decode(), outcome.error]
    finally:
        await slot.close()
    found["lacking"] = (await examine()).lacking("jail")
    print(json.dumps(found))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    command = (sys.executable, "-m", "tests.jail.unprivileged", COVERED, "-c", RUNS)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_programs_run_without_a_proc(found: dict[str, list[str]]) -> None:
    assert found["proc"] == ["ok", "[]\n", ""]


def test_their_memory_is_limited_and_what_the_interpreter_takes_is_not_theirs(
    found: dict[str, list[str]],
) -> None:
    assert found["small"] == ["ok", f"{84 << 20}\n", ""]
    assert found["large"][0] == "memory"


def test_the_doctor_names_what_is_not_held(found: dict[str, list[str]]) -> None:
    memory = [line for line in found["lacking"] if line.startswith("memory")]
    assert memory == [] or "each process by itself" in memory[0]
