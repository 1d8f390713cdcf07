"""What an attack on the jail is: a bounded program, how it may end, and what lets it work."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from agentray.tools.sandbox import cgroups
from agentray.tools.sandbox.base import Limits, Outcome, Program, PythonCode, Reason, ShellScript

__all__ = ["COUNTED", "MODE", "WORKED", "Attack", "Mode", "python_program", "said"]

Mode = Literal["root", "unprivileged"]
MODE: Mode = "root" if os.getuid() == 0 else "unprivileged"

COUNTED = "memory" in cgroups.find().folders
"""Whether a cgroup counts memory: to the byte, in the kernel's buffers too, and at once."""

WORKED = b"ATTACK worked"
REFUSED = b"ATTACK refused"

BRIEF = Limits(
    wall_s=10.0,
    cpu_s=5.0,
    memory_bytes=128 * 1024 * 1024,
    pids=16,
    open_files=64,
    scratch_bytes=16 * 1024 * 1024,
    scratch_files=200,
    output_bytes=64 * 1024,
)

_PRELUDE = '''
import ctypes, errno, os, signal, socket, struct, subprocess, sys, threading, time

libc = ctypes.CDLL(None, use_errno=True)

class Refused(Exception):
    pass

def call(number, *arguments):
    """Make a system call by its number; raise what it says."""
    done = libc.syscall(ctypes.c_long(number), *(
        ctypes.c_long(a) if isinstance(a, int) else a for a in arguments
    ))
    if done == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return done

def reaches_kernel(number, *arguments):
    """Succeed if the kernel looks at the arguments, which are nonsense, rather than refuse."""
    try:
        call(number, *arguments)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            raise

def mark():
    """Take the name that the harness looks for among all processes of the machine."""
    libc.prctl(15, facts["mark"].encode(), 0, 0, 0)

def say(text):
    os.write(1, ("ATTACK " + text + "\\n").encode(errors="replace"))
'''

_END = """
try:
    attack()
except BaseException as error:
    say("refused: %s: %s" % (type(error).__name__, error))
else:
    say("worked")
"""


def python_program(body: str, facts: Mapping[str, Any]) -> PythonCode:
    """Return a program that says whether ``body`` came to its end or was refused something.

    What the harness knows, such as where it listens, is in the body's ``facts``.
    """
    attack = "def attack():\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return PythonCode(f"{_PRELUDE}\nfacts = {dict(facts)!r}\n\n{attack}\n{_END}")


def said(outcome: Outcome) -> str:
    """Return what a failed assertion has to show."""
    return (
        f"{outcome.reason} exit={outcome.exit_code} signal={outcome.signal} "
        f"truncated={outcome.truncated} error={outcome.error!r} usage={outcome.usage}\n"
        f"stdout: {outcome.stdout[-600:]!r}\nstderr: {outcome.stderr[-600:]!r}"
    )


class Attack(msgspec.Struct, frozen=True):
    """An attack, its bounds and its control.

    Attributes:
        name: what is tried.
        body: Python that comes to its end if it worked and raises if it was refused.
        script: a shell script in the place of ``body``; it says ``ATTACK worked`` itself.
        code: a whole program in the place of ``body``.
        limits: of the run. The attack itself is bounded too, so that its control harms nobody.
        ends: how the contained run may end. One that ends by itself must say that it was refused,
            unless ``check`` knows better.
        check: asserts what else holds of the contained run.
        off: the defences each of which stops it; without all of them it works. Empty: no control,
            for it would harm the machine, or there is nothing that could be left out.
        works: says of the control's outcome whether the attack worked.
        within_s: the longest that the contained run may take.
        only: the mode in which it makes sense, and ``why``.
    """

    name: str
    body: str = ""
    script: str = ""
    code: str = ""
    limits: Limits = BRIEF
    ends: tuple[Reason, ...] = ("ok",)
    check: Callable[[Outcome], None] | None = None
    off: frozenset[str] = frozenset()
    works: Callable[[Outcome], bool] | None = None
    within_s: float = 12.0
    keep_scratch: bool = False
    only: Mode | None = None
    control_only: Mode | None = None
    why: str = ""

    def program(self, facts: Mapping[str, Any]) -> Program:
        if self.script:
            return ShellScript(self.script)
        if self.code:
            return PythonCode(self.code)
        return python_program(self.body, facts)

    def assert_contained(self, outcome: Outcome) -> None:
        assert WORKED not in outcome.stdout, said(outcome)
        assert outcome.reason in self.ends, said(outcome)
        if outcome.reason == "ok" and self.check is None:
            assert REFUSED in outcome.stdout, said(outcome)
        assert outcome.usage.wall_s < self.within_s, said(outcome)
        if self.check is not None:
            self.check(outcome)

    def worked(self, outcome: Outcome) -> bool:
        return WORKED in outcome.stdout if self.works is None else self.works(outcome)
