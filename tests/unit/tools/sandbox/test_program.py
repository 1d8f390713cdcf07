"""How a program's message is read, whatever the pieces that it comes in."""

from __future__ import annotations

import marshal
import os
from typing import Any

import pytest

from agentray.tools.sandbox.program import receive


def message(content: Any) -> bytes:
    packed = marshal.dumps(content)
    return len(packed).to_bytes(8, "little") + packed


@pytest.mark.parametrize("sent", [b"", message(("python", "", None, {}, []))[:-1], b"\1"])
def test_a_supervisor_that_goes_away_is_no_program(sent: bytes) -> None:
    read, write = os.pipe()
    os.write(write, sent)
    os.close(write)
    assert receive(read) is None
    os.close(read)


def test_a_program_is_what_was_sent() -> None:
    task = ("python", "x" * 10_000, None, {"CPU": 1}, [("a", 0o644, 0, b"\0")])
    read, write = os.pipe()
    os.write(write, message(task))
    assert receive(read) == task
    os.close(read)
    os.close(write)
