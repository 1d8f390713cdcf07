"""Attacks on what everybody shares: memory, processors, processes, descriptors, disk, output."""

from __future__ import annotations

from agentray.tools.sandbox.base import Limits, Outcome
from tests.jail.attack import BRIEF, COUNTED, Attack, said

__all__ = ["EXHAUSTION"]

MIB = 1024 * 1024


def limits(**changes: float) -> Limits:
    known = {name: getattr(BRIEF, name) for name in BRIEF.__struct_fields__}
    return Limits(**{**known, **changes})


SMALL = limits(memory_bytes=96 * MIB)
"""Twice and a half this is what a memory bomb takes."""


# What is in no process and in no file system only a cgroup counts: without, there is one layer.
_UNSEEN = frozenset({"memory", "seccomp"} if COUNTED else {"seccomp"})
# There, what is shared and in no file is refused besides: the watchdog sees only what is in a
# process's memory at the moment.
_SHARED = frozenset({"memory"} if COUNTED else {"memory", "seccomp"})

# Piece by piece, no process has much of it; and a process by itself is held by its address space.
_LET_GO = """
import mmap
ready_r, ready_w = os.pipe()
children = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        at = -1
        try:
            block = {mapping}
            for at in range(0, 40 << 20, 1 << 20):
                block[at : at + (1 << 20)] = b"x" * (1 << 20)
                block.madvise(mmap.MADV_DONTNEED, at, 1 << 20)
            os.write(ready_w, b"x")
            time.sleep(1.0)
        finally:
            os._exit(0 if at == 39 << 20 else 1)
    children.append(child)
ends = [os.waitpid(child, 0)[1] for child in children]
if any(ends):
    raise Refused(repr(ends))
"""


def _within_memory(outcome: Outcome) -> None:
    # Between two looks of the watchdog there can be more, on a busy machine much more.
    assert outcome.usage.memory_bytes < 160 * MIB or not COUNTED, said(outcome)
    assert outcome.reason != "ok" or b"refused" in outcome.stdout, said(outcome)


def _within_cpu(outcome: Outcome) -> None:
    # On all cores and a busy machine, some time goes by before it is looked at.
    assert outcome.usage.cpu_s < 1.6, said(outcome)


def _cut(outcome: Outcome) -> None:
    assert outcome.truncated, said(outcome)
    assert len(outcome.stdout) + len(outcome.stderr) <= 2 * BRIEF.output_bytes, said(outcome)
    assert len(outcome.stdout) <= BRIEF.output_bytes, said(outcome)
    assert len(outcome.stderr) <= BRIEF.output_bytes, said(outcome)


def _flooded(outcome: Outcome) -> bool:
    return len(outcome.stdout) + len(outcome.stderr) >= 2 * MIB


PROCESSES = (
    Attack(
        name="fork bomb",
        body="""
        for _ in range(60):
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
        """,
        off=frozenset({"pids"}),
    ),
    Attack(
        name="fork bomb that doubles",
        body="""
        first = os.getpid()
        counted = os.open("count", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            for _ in range(6):
                os.fork()
        except OSError:
            open("refused", "w").close()
        os.write(counted, b"x")
        until = time.monotonic() + 8
        while os.path.getsize("count") < 64 and time.monotonic() < until:
            if os.path.exists("refused"):
                break
            time.sleep(0.01)
        if os.getpid() != first:
            os._exit(0)
        if os.path.getsize("count") < 64:
            raise Refused("%d processes" % os.path.getsize("count"))
        """,
        off=frozenset({"pids"}),
    ),
    Attack(
        name="bomb of threads",
        body="""
        stop = threading.Event()
        # Small: it is not by their memory that they are to be stopped.
        threading.stack_size(64 * 1024)
        threads = []
        try:
            for _ in range(60):
                thread = threading.Thread(target=stop.wait, args=(3,), daemon=True)
                thread.start()
                threads.append(thread)
        finally:
            stop.set()
        """,
        off=frozenset({"pids"}),
    ),
    Attack(
        name="fork bomb of the shell",
        script="""
        i=0
        while [ $i -lt 60 ]; do sleep 3 & i=$((i+1)); done
        echo ATTACK worked
        """,
        ends=("exit", "timeout"),
        off=frozenset({"pids"}),
    ),
)

MEMORY = (
    Attack(
        name="memory bomb of one block",
        body="block = b'x' * (240 << 20)",
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        off=frozenset({"memory"}),
    ),
    Attack(
        name="memory bomb of many small blocks",
        body="blocks = [b'%1000d' % i for i in range(240_000)]",
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        off=frozenset({"memory"}),
    ),
    Attack(
        name="memory bomb of shared mappings",
        body="""
        import mmap
        maps = []
        for _ in range(60):
            maps.append(mmap.mmap(-1, 4 << 20))
            maps[-1].write(b"x" * (4 << 20))
        """,
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        off=_SHARED,
    ),
    Attack(
        name="memory bomb of shared mappings that no process has in its memory",
        body=_LET_GO.format(mapping="mmap.mmap(-1, 40 << 20)"),
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        off=frozenset({"memory"} if COUNTED else {"seccomp"}),
    ),
    Attack(
        name="memory bomb of a device, mapped",
        body=_LET_GO.format(mapping="mmap.mmap(os.open('/dev/zero', os.O_RDWR), 40 << 20)"),
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        # The device itself is not there where no cgroup counts.
        off=frozenset({"memory"} if COUNTED else {"root"}),
    ),
    Attack(
        name="memory bomb in the buffers of sockets",
        body="""
        pairs, sent = [], 0
        for _ in range(20):
            pairs.append(socket.socketpair())
            for each in pairs[-1]:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
                each.setblocking(False)
                try:
                    while True:
                        sent += each.send(b"x" * 65536)
                except BlockingIOError:
                    pass
            if sent > 10 << 20:
                return
        raise Refused("%d bytes" % sent)
        """,
        off=frozenset({"seccomp"}),
    ),
    Attack(
        name="memory bomb in pipes made large",
        body="""
        import fcntl
        held = []
        for _ in range(10):
            held.append(os.pipe())
            fcntl.fcntl(held[-1][1], 1031, 1 << 20)
            if os.write(held[-1][1], b"x" * (1 << 20)) != 1 << 20:
                raise Refused("a short write")
        """,
        off=frozenset({"seccomp"}),
    ),
    Attack(
        name="memory bomb of several processes",
        body="""
        ready_r, ready_w = os.pipe()
        children = []
        for _ in range(6):
            child = os.fork()
            if child == 0:
                block = b"x" * (40 << 20)
                os.write(ready_w, b"x")
                time.sleep(1.0)
                os._exit(0)
            children.append(child)
        ends = [os.waitpid(child, 0)[1] for child in children]
        if any(ends):
            raise Refused(repr(ends))
        """,
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        off=frozenset({"memory"}),
    ),
    Attack(
        name="memory bomb in files in memory",
        body="""
        held = [os.memfd_create("m%d" % i) for i in range(15)]
        for descriptor in held:
            for _ in range(16):
                if os.write(descriptor, b"x" * (1 << 20)) != 1 << 20:
                    raise Refused("a short write")
        """,
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        off=_UNSEEN,
    ),
    Attack(
        name="memory bomb of a process that hides",
        body="""
        libc.prctl(4, 0, 0, 0, 0)
        blocks = []
        for _ in range(6):
            if os.fork() == 0:
                block = b"x" * (40 << 20)
                time.sleep(1.0)
                os._exit(0)
        if any(os.wait()[1] for _ in range(6)):
            raise Refused("not all came to their end")
        """,
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        off=frozenset({"memory"}),
    ),
    Attack(
        name="memory bomb in detached System V segments",
        body="""
        libc.shmat.restype = ctypes.c_void_p
        for _ in range(60):
            segment = libc.shmget(0, ctypes.c_size_t(4 << 20), 0o1600)
            if segment < 0:
                raise OSError(ctypes.get_errno(), "shmget")
            where = libc.shmat(segment, None, 0)
            if where in (None, ctypes.c_void_p(-1).value):
                raise OSError(ctypes.get_errno(), "shmat")
            ctypes.memset(where, 1, 4 << 20)
            libc.shmdt(ctypes.c_void_p(where))
        """,
        limits=SMALL,
        ends=("ok", "memory"),
        check=_within_memory,
        off=_UNSEEN,
    ),
    Attack(
        name="memory bomb in every place that can be written",
        body="""
        written = 0
        for folder in ("/", ".", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/run", "/home", "/mnt"):
            try:
                with open(os.path.join(folder, "filler"), "wb", buffering=0) as filler:
                    for _ in range(40):
                        written += filler.write(b"x" * (1 << 20))
            except OSError:
                pass
        if written <= 34 << 20:
            raise Refused("%d bytes" % written)
        """,
        ends=("ok", "memory", "scratch"),
        off=frozenset({"scratch_size"}),
    ),
    Attack(
        name="memory bomb in /dev/shm",
        body="""
        for name in range(10):
            with open("/dev/shm/block%d" % name, "wb", buffering=0) as file:
                if file.write(b"x" * (4 << 20)) != 4 << 20:
                    raise Refused("a short write")
        """,
        ends=("ok", "memory", "scratch"),
        off=frozenset({"scratch_size"}),
    ),
    Attack(
        name="deep recursion of Python",
        body="""
        sys.setrecursionlimit(1 << 30)
        def deeper(depth):
            return deeper(depth + 1) if depth < 1_200_000 else depth
        deeper(0)
        """,
        limits=SMALL,
        ends=("ok", "memory", "signal", "cpu"),
        check=_within_memory,
        off=frozenset({"memory"}),
    ),
    Attack(
        name="deep recursion of C",
        body="""
        sys.setrecursionlimit(1 << 30)
        nested = []
        for _ in range(1_000_000):
            nested = [nested]
        repr(nested)
        """,
        limits=limits(wall_s=20.0),
        ends=("ok", "memory", "signal"),
        check=_within_memory,
        within_s=20.0,
    ),
    Attack(
        name="source that breaks the compiler",
        code="x = " + "-" * 200_000 + "1\nprint('ATTACK worked')",
        ends=("exit", "memory", "signal"),
    ),
)

SPIN = limits(cpu_s=0.3, wall_s=20.0)
"""Much time for little CPU: the machine may be busy."""

PROCESSORS = (
    Attack(
        name="spinning processor",
        body="""
        until = time.process_time() + 0.9
        while time.process_time() < until:
            pass
        """,
        limits=SPIN,
        ends=("cpu",),
        within_s=20.0,
        off=frozenset({"cpu"}),
    ),
    Attack(
        name="spinning processor in several processes",
        body="""
        children = []
        for _ in range(6):
            child = os.fork()
            if child == 0:
                until = time.process_time() + 0.3
                while time.process_time() < until:
                    pass
                os._exit(0)
            children.append(child)
        ends = [os.waitpid(child, 0)[1] for child in children]
        if any(ends):
            raise Refused(repr(ends))
        """,
        limits=SPIN,
        ends=("cpu",),
        check=_within_cpu,
        within_s=20.0,
        off=frozenset({"cpu"}),
    ),
    Attack(
        name="spinning processor in children that come and go",
        body="""
        for _ in range(45):
            child = os.fork()
            if child == 0:
                until = time.process_time() + 0.02
                while time.process_time() < until:
                    pass
                os._exit(0)
            os.waitpid(child, 0)
        """,
        limits=SPIN,
        ends=("cpu",),
        within_s=20.0,
        off=frozenset({"cpu"}),
    ),
    Attack(
        name="spinning processor in children that nobody waits for",
        body="""
        # Who ignores this is told of no child's end, and counts none of its time.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        for _ in range(15):
            child = os.fork()
            if child == 0:
                until = time.process_time() + 0.06
                while time.process_time() < until:
                    pass
                os._exit(0)
            try:
                os.waitpid(child, 0)
            except ChildProcessError:
                pass
        """,
        limits=SPIN,
        ends=("cpu",),
        within_s=20.0,
        off=frozenset({"cpu"}),
    ),
    Attack(
        name="spinning processor with the limit's signal ignored",
        body="""
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        until = time.process_time() + 0.9
        while time.process_time() < until:
            pass
        """,
        limits=SPIN,
        ends=("cpu",),
        within_s=20.0,
        off=frozenset({"cpu"}),
    ),
    Attack(
        name="giant integer",
        body="""
        sys.set_int_max_str_digits(0)
        str(3 ** 4_000_000)
        """,
        limits=SPIN,
        ends=("cpu",),
        within_s=20.0,
    ),
    Attack(
        name="realtime priority",
        body="""
        # Cgroups of version 1 have no time for the first; the second asks for 0.1 ms in 100.
        deadline = struct.pack("=IIQiIQQQ", 48, 6, 0, 0, 0, 100_000, 100_000_000, 100_000_000)
        for attempt in (lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
                        lambda: call(314, 0, deadline, 0)):
            try:
                attempt()
            except OSError:
                continue
            return
        raise Refused("neither")
        """,
        off=frozenset({"seccomp", "capabilities"}),
        control_only="root",
        why="the capability of a user namespace does not reach the machine's scheduler",
    ),
    Attack(
        name="a better place in the queue of the processor",
        body="os.setpriority(os.PRIO_PROCESS, 0, -10)",
        off=frozenset({"capabilities"}),
        control_only="root",
        why="the capability of a user namespace does not reach the machine's scheduler",
    ),
)

DESCRIPTORS = (
    Attack(
        name="descriptors without end",
        body="held = [os.dup(1) for _ in range(200)]",
        off=frozenset({"rlimit_nofile"}),
    ),
    Attack(
        name="limits lifted again",
        body="""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500))
        held = [os.dup(1) for _ in range(200)]
        """,
        off=frozenset({"rlimit_nofile"}),
    ),
)


def _no_scratch_left(outcome: Outcome) -> None:
    assert len(outcome.scratch or b"") <= BRIEF.scratch_bytes + 4 * MIB, said(outcome)


KERNEL_OBJECTS = (
    Attack(
        name="signals queued without end",
        body="""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
        information = struct.pack("iiiiii104x", signal.SIGRTMIN, 0, -1, 0, os.getpid(), os.getuid())
        for _ in range(2000):
            call(129, os.getpid(), int(signal.SIGRTMIN), information)
        """,
    ),
    Attack(
        name="timers without end",
        body="""
        for _ in range(2000):
            timer = ctypes.c_int()
            call(222, 1, None, ctypes.byref(timer))
        """,
    ),
    Attack(
        name="watchers of files, of which the machine has few",
        body="held = [call(294, 0) for _ in range(3)]",
        off=frozenset({"seccomp"}),
    ),
    Attack(
        name="the machine's disks, flushed",
        body="call(162)",
        off=frozenset({"seccomp"}),
    ),
)

DISK = (
    Attack(
        name="one huge file",
        body="""
        with open("huge", "wb", buffering=0) as file:
            for _ in range(40):
                if file.write(b"x" * (1 << 20)) != 1 << 20:
                    raise Refused("a short write")
        """,
        ends=("ok", "scratch", "signal"),
        off=frozenset({"scratch_size", "rlimit_fsize"}),
    ),
    Attack(
        name="several big files",
        body="""
        for name in range(10):
            with open("big%d" % name, "wb", buffering=0) as file:
                for _ in range(4):
                    if file.write(b"x" * (1 << 20)) != 1 << 20:
                        raise Refused("a short write")
        """,
        ends=("ok", "scratch"),
        off=frozenset({"scratch_size"}),
    ),
    Attack(
        name="a sparse file, kept",
        body="""
        with open("sparse", "wb") as file:
            file.truncate(1 << 30)
        """,
        ends=("ok", "scratch", "signal"),
        keep_scratch=True,
        check=_no_scratch_left,
        off=frozenset({"rlimit_fsize"}),
        works=lambda outcome: b"worked" in outcome.stdout,
    ),
    Attack(
        name="many files",
        body="""
        for name in range(1000):
            open(str(name), "w").close()
        """,
        ends=("ok", "scratch"),
        off=frozenset({"scratch_inodes"}),
    ),
    Attack(
        name="inodes filled with folders and links",
        body="""
        for name in range(500):
            os.mkdir("folder%d" % name)
            os.symlink("nowhere", "link%d" % name)
        """,
        ends=("ok", "scratch"),
        off=frozenset({"scratch_inodes"}),
    ),
)

FLOOD = """
block = b"x" * 65536
for _ in range(64):
    os.write({stream}, block)
"""

OUTPUT = (
    Attack(
        name="flood on stdout",
        code="import os\n" + FLOOD.format(stream=1),
        ends=("ok", "output"),
        check=_cut,
        off=frozenset({"output_cap"}),
        works=_flooded,
    ),
    Attack(
        name="flood on stderr",
        code="import os\n" + FLOOD.format(stream=2),
        ends=("ok", "output"),
        check=_cut,
        off=frozenset({"output_cap"}),
        works=_flooded,
    ),
    Attack(
        name="flood on both until the deadline",
        code="import os\nwhile True:\n    os.write(1, b'o' * 9000)\n    os.write(2, b'e' * 9000)",
        limits=limits(wall_s=1.0),
        ends=("timeout", "output"),
        check=_cut,
        within_s=4.0,
    ),
    Attack(
        name="flood of a child in the background",
        script="(while :; do echo flood flood flood flood flood flood; done) & exit 0",
        limits=limits(wall_s=1.0),
        ends=("ok", "output", "timeout"),
        check=lambda outcome: None,
        within_s=4.0,
    ),
)

EXHAUSTION = (
    *PROCESSES,
    *MEMORY,
    *PROCESSORS,
    *DESCRIPTORS,
    *KERNEL_OBJECTS,
    *DISK,
    *OUTPUT,
)
