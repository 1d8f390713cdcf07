"""Attacks on the kernel and on the network: sockets, namespaces, privileges, rare system calls."""

from __future__ import annotations

from pathlib import Path

from tests.jail.attack import Attack
from tests.jail.exhaustion import limits
from tests.jail.looking import none

__all__ = ["KERNEL"]

# An argument that no call can take: a filter refuses before the kernel looks at it.
BAD = -4096


def _bpf_is_for_all() -> bool:
    """Return whether the machine lets everybody use bpf; else it needs a capability."""
    setting = Path("/proc/sys/kernel/unprivileged_bpf_disabled")
    return setting.exists() and setting.read_text().strip() == "0"


def raw(name: str, number: int, *arguments: int, control: bool = False) -> Attack:
    """Return an attack whose call must not even be looked at by the kernel.

    ``control``: without the filter, the kernel would look at it, whoever asks.
    """
    numbers = ", ".join(str(part) for part in (number, *arguments))
    return Attack(
        name=name,
        body=f"reaches_kernel({numbers})",
        ends=("ok", "signal"),
        off=none("seccomp") if control else none(),
    )


def connects(name: str, body: str, *layers: str) -> Attack:
    return Attack(name=name, body=body, off=none(*layers))


SOCKETS = (
    connects(
        "a TCP connection to this machine",
        "socket.create_connection(('127.0.0.1', facts['port']), timeout=2).close()",
        "net_ns",
        "seccomp",
    ),
    Attack(
        name="a TCP connection to the cloud's metadata address",
        body="socket.create_connection(('169.254.169.254', 80), timeout=0.5).close()",
    ),
    Attack(
        name="a datagram to the outside",
        body="""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            datagrams.sendto(b"x", ("192.0.2.1", 53))
        """,
    ),
    Attack(
        name="an IPv6 connection",
        body="socket.create_connection(('::1', facts['port']), timeout=0.5).close()",
    ),
    connects(
        "a Unix socket of this machine",
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(facts["unix_path"])
        """,
        "root",
    ),
    connects(
        "an abstract Unix socket of this machine",
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\\0" + facts["abstract"])
        """,
        "net_ns",
    ),
    connects(
        "the kernel's netlink",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()",
        "seccomp",
    ),
    Attack(
        name="raw sockets",
        body="socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()",
    ),
    Attack(
        name="packets past the network stack",
        body="socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300).close()",
    ),
    connects(
        "the hypervisor's socket",
        "socket.socket(40, socket.SOCK_STREAM).close()",
        "seccomp",
    ),
)

ATTACHED = (
    Attack(
        name="a program of the kernel's attached to a socket",
        body="""
        # One that takes all: BPF_RET.
        code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0xFFFF))
        program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(code))
        one, _ = socket.socketpair()
        one.setsockopt(socket.SOL_SOCKET, 26, program)
        """,
        off=none("seccomp"),
    ),
)

NAMESPACES = (
    Attack(
        name="a mount",
        body="""
        os.mkdir("point")
        if libc.mount(b"tmpfs", b"point", b"tmpfs", ctypes.c_ulong(0), None) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        """,
        off=none("seccomp", "capabilities"),
    ),
    Attack(
        name="the root made writable again",
        body="""
        if libc.mount(None, b"/", None, ctypes.c_ulong(0x20 | 0x1000), None) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        open("/planted", "w").close()
        """,
    ),
    Attack(
        name="a mount taken away",
        body="""
        for point in (b"/proc", b"/dev/shm", b"/usr", b"/lib", b"/dev", b"/tmp"):
            if libc.umount2(point, 2) == 0:
                return
        raise Refused("none")
        """,
    ),
    Attack(
        name="a new user namespace",
        body="call(272, 0x10000000)",
        off=none("seccomp"),
    ),
    Attack(
        name="a new user namespace by clone",
        body="""
        flags = ctypes.c_long(0x10000000 | 17)
        child = libc.syscall(ctypes.c_long(56), flags, None, None, None, None)
        if child == 0:
            os._exit(0)
        if child < 0:
            raise OSError(ctypes.get_errno(), "clone")
        os.waitpid(child, 0)
        """,
        off=none("seccomp"),
    ),
    Attack(
        name="a child of its parent's, which nobody waits for",
        body="""
        child = libc.syscall(ctypes.c_long(56), ctypes.c_long(0x8000 | 17), None, None, None, None)
        if child == 0:
            while True:
                libc.pause()
        if child < 0:
            raise OSError(ctypes.get_errno(), "clone")
        """,
        limits=limits(wall_s=2.0),
        off=none("seccomp"),
    ),
    Attack(
        name="a new user namespace by clone3",
        body="""
        arguments = struct.pack("11Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)
        child = libc.syscall(ctypes.c_long(435), arguments, ctypes.c_size_t(len(arguments)))
        if child == 0:
            os._exit(0)
        if child < 0:
            raise OSError(ctypes.get_errno(), "clone3")
        os.waitpid(child, 0)
        """,
        off=none("seccomp"),
    ),
    Attack(
        name="other namespaces of its own",
        body="""
        for flag in (0x00020000, 0x40000000, 0x20000000, 0x04000000, 0x08000000, 0x02000000):
            try:
                call(272, flag)
            except OSError:
                continue
            return
        raise Refused("none")
        """,
        off=none("seccomp", "capabilities"),
    ),
    Attack(
        name="the namespaces of another process entered",
        body="""
        for pid in (1, os.getppid(), os.getpid()):
            for name in ("mnt", "net", "pid", "user", "uts", "ipc"):
                try:
                    descriptor = os.open("/proc/%d/ns/%s" % (pid, name), os.O_RDONLY)
                except OSError:
                    continue
                try:
                    call(308, descriptor, 0)
                except OSError:
                    continue
                return
        raise Refused("none")
        """,
        off=none("seccomp", "capabilities"),
    ),
    raw("mounts by the new calls: fsopen", 430, BAD, 0),
    raw("mounts by the new calls: open_tree", 428, -1, BAD, 0, control=True),
    raw("mounts by the new calls: move_mount", 429, -1, BAD, -1, BAD, 0),
    raw("pivot_root", 155, BAD, BAD),
)

PRIVILEGES = (
    Attack(
        name="becoming root",
        body="""
        for attempt in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0),
                        lambda: os.setgid(0), lambda: os.setgroups([0])):
            try:
                attempt()
            except OSError:
                continue
            return
        raise Refused("in no way")
        """,
        off=none("capabilities"),
        control_only="root",
        why="an unprivileged user's namespace knows no root",
    ),
    Attack(
        name="capabilities in any of the sets",
        body="""
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        sets = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        if all(int(lines[name], 16) == 0 for name in sets):
            raise Refused("all are empty")
        """,
        off=none("capabilities"),
    ),
    Attack(
        name="programs that may give privileges",
        body="""
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        if lines["NoNewPrivs"].strip() == "1":
            raise Refused("no_new_privs is set")
        """,
        off=none("no_new_privs"),
    ),
    Attack(
        name="a setuid program",
        body="""
        # Its output goes into a pipe that is full, so that it can be looked at while it runs.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        try:
            while True:
                os.write(writing, b"x" * 4096)
        except BlockingIOError:
            pass
        try:
            while True:
                os.write(writing, b"x")
        except BlockingIOError:
            os.set_blocking(writing, True)
        program = next(
            path for path in ("/usr/bin/su", "/bin/su", "/usr/bin/mount", "/usr/bin/passwd")
            if os.path.exists(path) and os.stat(path).st_mode & 0o4000
        )
        child = subprocess.Popen([program, "--help"], stdout=writing, stderr=writing)
        try:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                lines = dict(line.split(":", 1) for line in open("/proc/%d/status" % child.pid))
                if lines["Name"].strip() == os.path.basename(program):
                    break
                time.sleep(0.01)
            time.sleep(0.05)
            lines = dict(line.split(":", 1) for line in open("/proc/%d/status" % child.pid))
            real, effective = lines["Uid"].split()[:2]
            if real == effective:
                raise Refused("uid %s" % effective)
        finally:
            child.kill()
        """,
        off=none("no_new_privs", "nosuid"),
        control_only="root",
        why="a user namespace that maps one uid gives a setuid program no other",
    ),
    Attack(
        name="a setuid program of its own",
        body="""
        open("mine", "w").close()
        os.chown("mine", 0, 0)
        os.chmod("mine", 0o4755)
        """,
    ),
    raw("a file handle instead of a path", 304, -100, BAD, 0),
    Attack(
        name="a file in memory, run",
        body="""
        program = open("/bin/true", "rb").read()
        memory = os.memfd_create("true")
        os.write(memory, program)
        if os.fork() == 0:
            try:
                os.execve(memory, ["true"], {})
            finally:
                os._exit(1)
        if os.wait()[1]:
            raise Refused("execve")
        """,
        off=none("seccomp"),
    ),
)

MACHINE_CODE = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# mov eax, 20 (getpid of i386); int 0x80; ret
page.write(bytes.fromhex("b814000000cd80c3"))
function = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
answer = function()
if answer != os.getpid():
    raise Refused("answered %d" % answer)
"""

CALLS = (
    Attack(
        name="calls of i386",
        body=MACHINE_CODE,
        ends=("ok", "signal"),
        off=none("seccomp"),
    ),
    Attack(
        name="calls of x32",
        body="""
        # A kernel without x32 does not know them either; the filter must not confuse their numbers.
        for number in (39, 101, 165, 272):
            try:
                call(0x40000000 + number, 0, 0, 0, 0, 0)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOSYS):
                    continue
            return
        raise Refused("none")
        """,
        ends=("ok", "signal"),
    ),
    Attack(
        name="bpf",
        body="""
        # A table of one entry.
        os.close(call(321, 0, struct.pack("4I", 2, 4, 4, 1) + bytes(48), 64))
        """,
        off=none("seccomp") if _bpf_is_for_all() else none("seccomp", "capabilities"),
        control_only="root",
        why="the kernel refuses it to all but root",
    ),
    raw("io_uring", 425, 4, BAD, control=True),
    raw("keyctl", 250, 0, -3, 0, control=True),
    raw("add_key", 248, BAD, BAD, BAD, 1, -3, control=True),
    raw("request_key", 249, BAD, BAD, BAD, -3, control=True),
    raw("userfaultfd", 323, 1, control=True),
    raw("perf_event_open", 298, BAD, 0, -1, -1, 0, control=True),
    raw("modify_ldt", 154, 0, BAD, 16, control=True),
    raw("kcmp", 312, BAD, BAD, 0, 0, 0, control=True),
    raw("personality of another layout", 135, 0x0040000, control=True),
    raw("move_pages", 279, 0, 1, BAD, 0, BAD, 0, control=True),
    raw("kexec_load", 246, 0, 0, BAD, 0),
    raw("init_module", 175, BAD, 1, BAD),
    raw("finit_module", 313, -1, BAD, 0),
    raw("reboot", 169, 0, 0, 0, 0),
    raw("swapon", 167, BAD, 0),
    raw("acct", 163, BAD),
    raw("quotactl", 179, 0, BAD, 0, BAD),
    raw("iopl", 172, 3),
    raw("ioperm", 173, 0, 1, 1),
    raw("syslog", 103, 10, 0, 0),
    raw("fanotify_init", 300, 0, 0),
    raw("vhangup", 153),
    Attack(
        name="input typed into a terminal",
        body="""
        import fcntl
        for descriptor in (0, 1, 2):
            try:
                fcntl.ioctl(descriptor, 0x5412, b"x")
            except OSError:
                continue
            return
        raise Refused("none is a terminal")
        """,
    ),
)

CLOCKS = (
    Attack(
        name="a change of the clock",
        body="""
        # To what it is anyway.
        clock = time.CLOCK_REALTIME
        for attempt in (
            lambda: time.clock_settime(clock, time.clock_gettime(clock)),
            lambda: reaches_kernel(164, -4096, -4096),
            lambda: reaches_kernel(227, 0, -4096),
        ):
            try:
                attempt()
            except OSError:
                continue
            return
        raise Refused("in no way")
        """,
        off=none("seccomp"),
    ),
    Attack(
        name="a change of the host's name",
        body="""
        socket.sethostname("owned")
        if socket.gethostname() != "owned":
            raise Refused("it is still " + socket.gethostname())
        """,
        off=none("seccomp", "capabilities"),
    ),
    raw("a change of the domain's name", 171, BAD, 4),
)

KERNEL = (*SOCKETS, *ATTACHED, *NAMESPACES, *PRIVILEGES, *CALLS, *CLOCKS)
