"""Programs that do not end as programs should, or lie about how they did."""

from __future__ import annotations

from collections.abc import Callable

from agentray.tools.sandbox.base import Outcome, Reason
from tests.jail.attack import Attack, said
from tests.jail.exhaustion import limits

__all__ = ["ENDINGS"]

SOON = limits(wall_s=0.5)


def ended(
    *,
    reason: Reason | None = None,
    code: int | None = None,
    signal: int | None = None,
    stdout: bytes | None = None,
    holds: bytes = b"",
) -> Callable[[Outcome], None]:
    """Return a check that a run ended exactly so."""

    def check(outcome: Outcome) -> None:
        assert reason is None or outcome.reason == reason, said(outcome)
        assert code is None or outcome.exit_code == code, said(outcome)
        assert signal is None or outcome.signal == signal, said(outcome)
        assert stdout is None or outcome.stdout == stdout, said(outcome)
        assert holds in outcome.stdout, said(outcome)
        assert outcome.result is None, said(outcome)

    return check


def ending(name: str, code: str, *reasons: Reason, check: Callable[[Outcome], None]) -> Attack:
    return Attack(name=name, code=code, ends=reasons, check=check)


LIES = """
import json, os, sys
body = json.dumps({
    "reason": "ok", "exit_code": 0, "signal": None, "result": "owned", "status": "ok",
    "stdout": "owned", "id": 1, "usage": {"cpu_s": 0, "wall_s": 0}, "pid": 1,
}).encode()
frames = (
    body + b"\\n",
    len(body).to_bytes(4, "big") + body,
    len(body).to_bytes(4, "little") + body,
    len(body).to_bytes(8, "little") + body,
    b"\\x00" * 4096,
    b"\\xff" * 4096,
)
for descriptor in range(256):
    for frame in frames:
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, frame)
        except OSError:
            break
sys.exit(3)
"""

OUTPUT = (
    ending(
        "invalid UTF-8",
        "import os\nos.write(1, bytes(range(256)))\nos.write(2, b'\\xff\\xfe')",
        "ok",
        check=ended(code=0, stdout=bytes(range(256))),
    ),
    ending(
        "NUL bytes on stdout",
        "import os\nos.write(1, b'a\\0b\\0' * 100)",
        "ok",
        check=ended(code=0, stdout=b"a\0b\0" * 100),
    ),
    ending("a NUL byte in the source", "print(1)\0", "exit", check=ended(code=1, stdout=b"")),
    ending("half a character in the source", "print('\ud800')", "exit", check=ended(stdout=b"")),
    ending(
        "results forged on stdout and on every descriptor",
        LIES,
        "exit",
        check=ended(code=3),
    ),
    ending(
        "every descriptor closed",
        "import os\nos.closerange(0, 1 << 16)\nos._exit(5)",
        "exit",
        check=ended(code=5, stdout=b""),
    ),
    ending(
        "the runner's own tools replaced",
        "import builtins, os, sys, json, io\n"
        "sys.stdout = sys.stderr = sys.stdin = None\n"
        "os._exit = os.write = os.close = os.waitpid = lambda *_: 1 / 0\n"
        "json.dumps = builtins.print = builtins.compile = builtins.exec = None\n"
        "sys.modules.clear()\n",
        "ok",
        "exit",
        "signal",
        check=ended(stdout=b""),
    ),
)

CODES = (
    ending("exit code 7", "raise SystemExit(7)", "exit", check=ended(code=7)),
    ending("exit code 255", "import os\nos._exit(255)", "exit", check=ended(code=255)),
    ending("exit code of no meaning", "raise SystemExit(1 << 40)", "ok", "exit", check=ended()),
    ending("exit with a text", "raise SystemExit('bye')", "exit", check=ended(code=1)),
    ending(
        "an exception that cannot be shown",
        "class E(BaseException):\n"
        "    def __str__(self):\n        raise self\n    __repr__ = __str__\n"
        "raise E()",
        "exit",
        check=ended(code=1),
    ),
    ending(
        "segmentation fault",
        "import ctypes\nctypes.string_at(0)",
        "signal",
        check=ended(signal=11),
    ),
    ending("abort", "import os\nos.abort()", "signal", check=ended(signal=6)),
    ending(
        "its own death",
        "import os\nos.kill(os.getpid(), 9)",
        "signal",
        check=ended(signal=9),
    ),
    ending(
        "the death of all that it can reach",
        "import os, time\nprint('before', flush=True)\n"
        "try:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\ntime.sleep(0.1)\nos._exit(0)",
        "ok",
        "signal",
        "failed",
        check=ended(holds=b"before"),
    ),
    ending(
        "the death of its own group",
        "import os\nprint('before', flush=True)\nos.killpg(0, 9)",
        "signal",
        check=ended(holds=b"before"),
    ),
    ending(
        "the death of its parent",
        "import os, time\nprint('before', flush=True)\n"
        "try:\n    os.kill(os.getppid(), 9)\nexcept OSError:\n    pass\n"
        "time.sleep(0.2)\nos._exit(0)",
        "ok",
        "signal",
        "failed",
        check=ended(holds=b"before"),
    ),
)


def at_deadline(name: str, code: str) -> Attack:
    return Attack(
        name=name,
        code="import os, signal, sys, time\nos.write(1, b'before\\n')\n" + code,
        limits=SOON,
        ends=("timeout",),
        check=ended(reason="timeout", stdout=b"before\n"),
        within_s=4.0,
    )


DEADLINES = (
    at_deadline("sleep past the deadline", "time.sleep(15)"),
    at_deadline(
        "ignored signals",
        "for number in range(1, 65):\n"
        "    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\n"
        "time.sleep(15)",
    ),
    at_deadline(
        "blocked signals",
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ntime.sleep(15)",
    ),
    at_deadline("a program that stops itself", "os.kill(os.getpid(), signal.SIGSTOP)"),
    at_deadline(
        "a program that stops all that it can reach",
        "if os.fork() == 0:\n    time.sleep(15)\n"
        "os.kill(-1, signal.SIGSTOP)\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(15)",
    ),
    at_deadline(
        "a tree of processes in sessions of their own",
        "for _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\ntime.sleep(15)",
    ),
    at_deadline("its output closed before the deadline", "os.closerange(0, 256)\ntime.sleep(15)"),
    at_deadline(
        "a child that the deadline finds in vfork",
        "import subprocess\nsubprocess.run(['sleep', '15'])",
    ),
)

LEFT_BEHIND = (
    Attack(
        name="a daemon, forked twice",
        body="""
        mark()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 256)
                time.sleep(15)
            os._exit(0)
        os.wait()
        raise Refused("that it lives on is for the harness to see")
        """,
        within_s=4.0,
    ),
    Attack(
        name="a child that holds the pipe",
        body="""
        mark()
        if os.fork() == 0:
            os.setsid()
            time.sleep(15)
            os._exit(0)
        raise Refused("that the run ends is for the harness to see")
        """,
        within_s=4.0,
    ),
    Attack(
        name="a thread that never ends",
        code="import threading, time\n"
        "print('before', flush=True)\n"
        "threading.Thread(target=time.sleep, args=(20,)).start()",
        limits=SOON,
        ends=("timeout", "ok"),
        check=ended(holds=b"before"),
        within_s=4.0,
    ),
)

ENDINGS = (*OUTPUT, *CODES, *DEADLINES, *LEFT_BEHIND)
