"""Attacks that read or write what is not the program's: files, processes, memory, descriptors."""

from __future__ import annotations

from agentray.tools.sandbox.base import Outcome
from tests.jail.attack import Attack, said

__all__ = ["LOOKING"]


def none(*names: str) -> frozenset[str]:
    return frozenset(names)


FILES = (
    Attack(name="reading /etc/shadow", body="open('/etc/shadow').read()"),
    Attack(
        name="reading the repository",
        body="""
        # Its own files, and such as everybody may read.
        for path in facts["repository_files"]:
            try:
                open(path).close()
            except OSError:
                continue
            return
        raise Refused("none of them is there")
        """,
        off=none("root"),
    ),
    Attack(
        name="reading the homes and the caller's files",
        body="""
        # The interpreter may lie in a home, whose folder is there then, and cannot be looked into.
        for look, path in ((open, facts["host_file"]), (os.listdir, facts["home"]),
                           (os.listdir, "/root"), (os.stat, "/root/.ssh"),
                           (os.stat, "/root/.bashrc")):
            try:
                look(path)
            except OSError:
                continue
            return
        raise Refused("none of them is there")
        """,
        off=none("root"),
    ),
    Attack(
        name="climbing out of the root",
        body="""
        for path in ("/..", "/../..", "/proc/1/root", "/proc/self/root", "/proc/1/cwd/../../../..",
                     "/proc/self/cwd/../../../../.."):
            try:
                open(path + facts["host_file"]).close()
            except OSError:
                continue
            return
        raise Refused("the root is the root")
        """,
        off=none("root"),
    ),
    Attack(
        name="leaving the root with chroot",
        body="""
        os.makedirs("inner")
        up = os.open(".", os.O_RDONLY)
        os.chroot("inner")
        os.fchdir(up)
        for _ in range(20):
            os.chdir("..")
        os.chroot(".")
        open(facts["host_file"]).close()
        """,
    ),
    Attack(
        name="reading /sys",
        body="""
        found = os.listdir("/sys")
        if not found:
            raise Refused("it is empty")
        """,
        off=none("root"),
    ),
    Attack(
        name="the machine's mounts listed",
        body="""
        mounts = open("/proc/self/mountinfo").read()
        if "/sys/fs/cgroup" not in mounts and "/dev/pts" not in mounts:
            raise Refused("only its own")
        """,
        off=none("root"),
    ),
    Attack(
        name="writing outside of the scratch directory",
        body="""
        here = os.path.realpath(".")
        found = []
        for folder, folders, _ in os.walk("/"):
            inside = (folder + "/").startswith((here + "/", "/proc/"))
            if inside or folder.count("/") > 3:
                folders[:] = []
            if inside:
                continue
            try:
                path = os.path.join(folder, "planted")
                open(path, "x").close()
            except OSError:
                continue
            # What is on the scratch's own file system has its limits and its end.
            if os.stat(path).st_dev != os.stat(here).st_dev:
                found.append(path)
            os.unlink(path)
        if not found:
            raise Refused("nowhere")
        say(repr(found))
        """,
        off=none("readonly_root"),
    ),
    Attack(
        name="writing into the programs and libraries that are there",
        body="""
        import encodings
        for path in ("/bin/sh", "/etc/passwd", "/etc/hosts", "/etc/ld.so.cache", sys.executable,
                     os.__file__, encodings.__file__, "/lib64/ld-linux-x86-64.so.2"):
            try:
                os.close(os.open(path, os.O_WRONLY))
            except OSError:
                continue
            return
        raise Refused("none of them")
        """,
    ),
    Attack(
        name="sysctls and core_pattern open for writing",
        body="""
        found = []
        paths = ["/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern"]
        for folder, _, files in os.walk("/proc/sys"):
            # Everybody may open this one, and whoever then writes needs a capability.
            paths += [os.path.join(folder, name) for name in files if name != "ns_last_pid"]
        for path in paths:
            try:
                os.close(os.open(path, os.O_WRONLY))
            except OSError:
                continue
            found.append(path)
        if not found:
            raise Refused("none of %d" % len(paths))
        say(repr(found[:5]))
        """,
        off=none("uid", "proc_readonly"),
        control_only="root",
        why="without root's uid nobody may write them, whatever the jail does",
    ),
    Attack(
        name="protected from the killer of processes that use too much",
        body="open('/proc/self/oom_score_adj', 'w').write('-1000')",
    ),
)


def _only_its_own(outcome: Outcome) -> None:
    assert b"refused" in outcome.stdout, said(outcome)
    assert b"half" not in outcome.stdout, said(outcome)


MEMORY_SCAN = """
    first, second = facts["{half}_1"].encode(), facts["{half}_2"].encode()
    memory = open("/proc/self/mem", "rb", buffering=0)
    for line in open("/proc/self/maps"):
        span, rights = line.split()[:2]
        if not rights.startswith("r") or "[v" in line:
            continue
        at, end = (int(part, 16) for part in span.split("-"))
        memory.seek(at)
        while at < end:
            try:
                block = memory.read(min(1 << 20, end - at))
            except OSError:
                break
            if not block:
                break
            where = block.find(first)
            while where >= 0:
                if block[where + len(first):].startswith(second):
                    return
                where = block.find(first, where + 1)
            at += len(block)
    raise Refused("it is nowhere in memory")
"""

SECRETS = (
    Attack(
        name="reading the environment",
        body="""
        whole = facts["secret_1"] + facts["secret_2"]
        if whole in repr(dict(os.environ)):
            return
        if whole.encode() in open("/proc/self/environ", "rb").read():
            return
        raise Refused(repr(sorted(os.environ)))
        """,
        check=_only_its_own,
        off=none("clean_env"),
    ),
    Attack(
        name="looking for a secret of the caller in memory",
        body=MEMORY_SCAN.format(half="secret"),
        off=none("clean_env"),
    ),
    Attack(
        name="reading inherited descriptors",
        body="""
        found = []
        for descriptor in range(3, 1024):
            try:
                os.fstat(descriptor)
            except OSError:
                continue
            found.append((descriptor, os.readlink("/proc/self/fd/%d" % descriptor)))
        if not found:
            raise Refused("none is open")
        say(repr(found))
        """,
        off=none("close_fds"),
    ),
    Attack(
        name="reading the caller's stdin",
        body="""
        if os.read(0, 1):
            return
        raise Refused("it is at its end")
        """,
    ),
    Attack(
        name="frames, globals and objects of the zygote",
        body="""
        import gc
        # All that can be reached from the callers' frames, down to what they are made of.
        frame, waiting = sys._getframe(), []
        while frame is not None:
            waiting += [frame.f_globals, frame.f_locals]
            frame = frame.f_back
        waiting += [sys.modules, gc.get_objects()]
        seen, found = set(), set()
        while waiting and len(seen) < 300_000:
            thing = waiting.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            # Only what can hold something of others: no numbers, and texts are not followed.
            module = getattr(type(thing), "__module__", "")
            if isinstance(module, str) and module.startswith("agentray"):
                found.add("an object of " + module)
            if isinstance(thing, dict) and isinstance(thing.get("__name__"), str):
                if thing["__name__"].startswith("agentray"):
                    found.add(thing["__name__"])
            if isinstance(thing, socket.socket) and thing.fileno() >= 0:
                found.add(repr(thing))
            if gc.is_tracked(thing):
                waiting += gc.get_referents(thing)
        # The module that runs programs is there, and knows nothing.
        found.discard("agentray.tools.sandbox.program")
        if not found:
            raise Refused("nothing of it among %d objects" % len(seen))
        say(repr(sorted(found)))
        """,
        off=none("globals"),
    ),
    Attack(
        name="modules of the zygote imported",
        body="""
        names = [name for name in sys.modules if "agentray" in name or "zygote" in name]
        for name in ("agentray", "agentray.tools.sandbox.zygote", "agentray.tools.sandbox.child"):
            try:
                __import__(name)
            except ImportError:
                continue
            names.append(name)
        if not names:
            raise Refused("there are none")
        say(repr(names))
        """,
    ),
)

PROCESSES = (
    Attack(
        name="reading /proc of others",
        body="""
        import re
        seen = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    line = open("/proc/%s/cmdline" % name, "rb").read()
                except OSError:
                    line = b""
                seen.append((name, line))
        # Its own namespace's first process may be there, and is no stranger.
        strangers = [entry for entry in seen if entry[0] != "1"]
        if not strangers and len(seen) <= 1:
            raise Refused("only %r" % seen)
        say(repr(strangers[:3]))
        """,
        off=none("pid_ns"),
    ),
    Attack(
        name="reading the supervisor's environment and memory",
        body="""
        for pid in (1, os.getppid(), facts["supervisor"]):
            if pid in (0, os.getpid()):
                continue
            for name in ("environ", "mem", "maps", "fd/0", "cwd", "root/etc/shadow"):
                path = "/proc/%d/%s" % (pid, name)
                try:
                    text = os.readlink(path) if name == "cwd" else open(path, "rb").read(100_000)
                except OSError:
                    continue
                if facts["secret_1"] in str(text):
                    return
        raise Refused("nothing of it")
        """,
    ),
    Attack(
        name="signals to the supervisor",
        body="""
        try:
            os.kill(facts["supervisor"], 0)
        except PermissionError:
            say("it can be seen")
        """,
        off=none("pid_ns"),
    ),
    Attack(
        name="ptrace of the parent",
        body="call(101, 16, os.getppid() or 1, 0, 0)",
    ),
    Attack(
        name="being traced",
        body="""
        child = os.fork()
        if child == 0:
            try:
                call(101, 0, 0, 0, 0)
            except OSError:
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise Refused("PTRACE_TRACEME")
        """,
        off=none("seccomp"),
    ),
    Attack(
        name="another process's memory by its number",
        body="""
        class Vector(ctypes.Structure):
            _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
        mine, theirs = ctypes.create_string_buffer(8), ctypes.create_string_buffer(b"secret")
        local = Vector(ctypes.addressof(mine), 6)
        remote = Vector(ctypes.addressof(theirs), 6)
        call(310, os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        """,
        off=none("seccomp"),
    ),
    Attack(
        name="another process's descriptors by its number",
        body="call(438, call(434, os.getpid(), 0), 0, 0)",
        off=none("seccomp"),
    ),
)

CORE_DUMPS = (
    Attack(
        name="a core dump where the machine hands them to a program",
        body="""
        import resource
        # With a limit of 1 that program is not started, with any other one it is.
        if resource.getrlimit(resource.RLIMIT_CORE) != (1, 1):
            return
        resource.setrlimit(resource.RLIMIT_CORE, (0, 1))
        """,
        off=none("seccomp"),
    ),
)

DEVICES = (
    Attack(
        name="devices of the machine",
        body="""
        known = {"null", "zero", "full", "random", "urandom", "fd", "stdin", "stdout", "stderr",
                 "shm", "tty", "ptmx", "pts"}
        found = set(os.listdir("/dev")) - known
        for name in os.listdir("/dev"):
            try:
                os.close(os.open("/dev/" + name, os.O_RDWR | os.O_NONBLOCK))
            except OSError:
                continue
            if name in ("tty", "ptmx", "pts"):
                found.add(name)
        if not found:
            raise Refused("none")
        say(repr(sorted(found)))
        """,
        off=none("root"),
    ),
    Attack(
        name="a device node of its own",
        body="""
        import stat
        os.mknod("null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        """,
        off=none("capabilities"),
        control_only="root",
        why="only the machine's root may make one, whatever the jail does",
    ),
    Attack(
        name="the machine's memory or a disk by a device node of its own",
        body="""
        import stat
        for kind, numbers in ((stat.S_IFCHR, (1, 1)), (stat.S_IFBLK, (254, 0))):
            os.mknod("device", kind | 0o600, os.makedev(*numbers))
            os.close(os.open("device", os.O_RDONLY))
            os.unlink("device")
        """,
    ),
)

LOOKING = (*FILES, *SECRETS, *PROCESSES, *CORE_DUMPS, *DEVICES)
