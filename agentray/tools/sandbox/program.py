"""Run one program: the end of the road in a sandbox's child, which nothing comes back from.

What runs here can look at this module and all that it can reach, so that holds no secret: the
standard library only, no descriptors, no settings.
"""

# Without pathlib, which takes longer to import and to use than all else here.
# ruff: noqa: PTH103, PTH120, PTH123

from __future__ import annotations

import gc
import json
import linecache
import marshal
import os
import resource
import sys
import traceback
from types import ModuleType, TracebackType
from typing import Any

__all__ = [
    "BEGUN",
    "FAILED",
    "RESULT",
    "UNABLE",
    "prepare",
    "receive",
    "go_through",
    "mapped_bytes",
    "run",
    "tell",
    "warm",
]

BEGUN, RESULT, FAILED, UNABLE = b"B", b"R", b"E", b"U"
"""What is said to the supervisor: that a program begins; then a function's result, why there is
none, or why no program could be begun, each with its length."""

_OFTEN = (
    "collections",
    "datetime",
    "functools",
    "io",
    "itertools",
    "math",
    "random",
    "re",
    "statistics",
)
_HEADER_BYTES = 8
_MOST_ARGUMENT_BYTES = 100_000
# In the scratch, where there is room.
_SCRIPT = ".tmp/script"

Task = tuple[str, Any, Any, dict[str, int], list[tuple[str, int, int, bytes | None]]]
"""Kind, text or target, arguments or environment, rlimits by name, files of the scratch."""


def warm() -> None:
    """Import what programs often do, and go once through what each needs."""
    for name in _OFTEN:
        __import__(name)
    go_through()
    json.dumps(json.loads(b'{"a": [1, 2.5, "x", null, true]}'))
    try:
        raise ValueError
    except ValueError as error:
        "".join(traceback.format_exception(error))


def go_through() -> None:
    """Compile, run and print once: the way of each program."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("import io\nprint(sum(range(3)), file=io.StringIO())", "main.py", "exec"), space)  # noqa: S102
    marshal.loads(marshal.dumps(("python", "", None, {"CPU": 1}, [])))


def receive(task: int) -> Task | None:
    """Wait for what to run; None if the supervisor went away or has no use for this child."""
    wanted, size = _HEADER_BYTES, -1
    parts: list[bytes] = []
    while True:
        while wanted:
            part = os.read(task, min(wanted, 1 << 20))
            if not part:
                return None
            parts.append(part)
            wanted -= len(part)
        found = b"".join(parts)
        if size >= 0:
            return marshal.loads(found)
        size = wanted = int.from_bytes(found, "little")
        parts = []


def prepare(
    limits: dict[str, int],
    files: list[tuple[str, int, int, bytes | None]],
    size_bytes: int = 0,
) -> None:
    """Write the files that the program is to find, then take its limits on.

    ``size_bytes`` is the address space that this process had before it got them: for where there is
    no ``/proc`` to ask.
    """
    for name, mode, modified, content in files:
        if content is None:
            os.makedirs(name, 0o755, exist_ok=True)
            continue
        folder = os.path.dirname(name)
        if folder:
            os.makedirs(folder, 0o755, exist_ok=True)
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(file, view) :]
        finally:
            os.close(file)
        os.utime(name, (modified, modified))
    for name, value in limits.items():
        if name == "AS":
            # What the interpreter takes is not the program's, nor are the files' contents.
            given = sum(len(content) for *_, content in files if content is not None)
            value += mapped_bytes() or size_bytes + given  # noqa: PLW2901
        number = getattr(resource, "RLIMIT_" + name)
        # One second past the soft limit, which a program may catch, comes the kill.
        resource.setrlimit(number, (value, value + 1 if name == "CPU" else value))


def mapped_bytes() -> int:
    """Return the size of this process's address space; 0 where no ``/proc`` tells it."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def run(task: int, without: frozenset[str] = frozenset(), size_bytes: int = 0) -> None:
    """Receive a program on the descriptor ``task``, run it and end the process.

    ``size_bytes``: see :func:`prepare`.
    """
    status = 1
    try:
        # Once more, here: what it writes to is copied now, and not while someone waits.
        go_through()
        found = receive(task)
        if found is None:
            return
        os.write(task, BEGUN)
        kind, what, rest, limits, files = found
        try:
            prepare(limits, files, size_bytes)
        except OSError as error:
            tell(task, UNABLE, f"the files could not be put in place: {error.strerror}".encode())
            return
        if "reseed" not in without:
            sys.modules["random"].seed()
            if "numpy.random" in sys.modules:
                sys.modules["numpy.random"].seed()
        gc.enable()
        if kind == "function":
            status = _function(task, what, rest)
            return
        if kind == "exec":
            # What it is spoken to by, from here on.
            os.dup2(task, 0)
        os.close(task)
        status = _python(what) if kind == "python" else _execute(kind, what, rest)
    finally:
        _end(status)


def tell(task: int, kind: bytes, content: bytes) -> None:
    """Send a message to the supervisor."""
    view = memoryview(kind + len(content).to_bytes(_HEADER_BYTES, "little") + content)
    while view:
        view = view[os.write(task, view) :]


def _execute(kind: str, what: Any, environment: dict[str, str]) -> int:
    arguments: list[str] = what
    if kind == "shell":
        script: str = what
        arguments = ["/bin/sh", "-c", script]
        if len(script) > _MOST_ARGUMENT_BYTES:
            os.makedirs(os.path.dirname(_SCRIPT), exist_ok=True)
            with open(_SCRIPT, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(script)
            arguments = ["/bin/sh", _SCRIPT]
    try:
        os.execvpe(arguments[0], arguments, environment)  # noqa: S606
    except (OSError, ValueError) as error:
        os.write(2, f"{arguments[0]}: {error}\n".encode(errors="replace"))
    return 127


def _python(code: str) -> int:
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv[:] = ["main.py"]
    try:
        compiled = compile(code, "main.py", "exec", dont_inherit=True)
        exec(compiled, main.__dict__)  # noqa: S102
    except SystemExit as error:
        return _exit_code(error)
    except BaseException as error:  # noqa: BLE001
        _print(error, code)
        return 1
    return 0


def _print(error: BaseException, code: str) -> None:
    # The lines of the program, which no file has, and none of ours.
    lines = code.splitlines(keepends=True)
    linecache.cache["main.py"] = (len(code), None, lines, "main.py")
    _show(error)


def _show(error: BaseException) -> None:
    found: TracebackType | None = error.__traceback__
    shown = error.with_traceback(found and found.tb_next)
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), shown, shown.__traceback__)
        return
    traceback.print_exception(shown)


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)  # noqa: T201
    return 1


def _function(task: int, target: str, arguments: bytes) -> int:
    os.set_inheritable(task, False)
    try:
        function = _find(target)
        result: Any = function(**json.loads(arguments or b"{}"))
        if hasattr(result, "__await__"):
            import asyncio

            result = asyncio.run(_awaited(result))
        content = json.dumps(result, ensure_ascii=False).encode()
    except SystemExit as error:
        return _exit_code(error)
    except BaseException as error:  # noqa: BLE001
        _show(error)
        tell(task, FAILED, f"{type(error).__name__}: {error}"[:1000].encode(errors="replace"))
        return 1
    tell(task, RESULT, content)
    return 0


async def _awaited(result: Any) -> Any:
    return await result


def _find(target: str) -> Any:
    from importlib import import_module

    module, _, path = target.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _end(status: int) -> None:
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001
        status = status or 1
    finally:
        os._exit(status)
