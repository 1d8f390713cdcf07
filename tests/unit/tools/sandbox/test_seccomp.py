"""Which system calls the filter lets through: its program is run here as the kernel would."""

from __future__ import annotations

import errno
import struct

import pytest

from agentray.tools.sandbox.seccomp import program

X86_64, I386 = 0xC000003E, 0x40000003
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
CLONE_NEWUSER, CLONE_THREAD, CLONE_VM = 0x10000000, 0x00010000, 0x100
CLONE_PARENT = 0x8000


def answer(code: bytes, number: int, *arguments: int, arch: int = X86_64) -> int:
    """Return what the filter answers to a call."""
    facts = struct.pack("=iIQ6Q", number, arch, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
    steps = list(struct.iter_unpack("=HBBI", code))
    accumulator = at = 0
    while True:
        operation, yes, no, value = steps[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", facts, value)
        elif operation == 0x06:
            return value
        elif operation == 0x05:
            at += value
        else:
            true = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[operation]
            at += yes if true else no


@pytest.mark.parametrize("number", [0, 1, 9, 39, 57, 59, 231, 257, 262, 318, 332, 439], ids=str)
def test_what_programs_live_by_is_allowed(number: int) -> None:
    assert answer(program(), number) == ALLOW


@pytest.mark.parametrize(
    ("name", "number"),
    {
        "ptrace": 101, "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166,
        "sethostname": 170, "init_module": 175, "settimeofday": 164, "clock_settime": 227,
        "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "keyctl": 250, "add_key": 248,
        "unshare": 272, "setns": 308, "perf_event_open": 298, "process_vm_readv": 310,
        "kcmp": 312, "seccomp": 317, "memfd_create": 319, "bpf": 321, "userfaultfd": 323,
        "open_by_handle_at": 304, "iopl": 172, "modify_ldt": 154, "reboot": 169,
        "sync": 162, "inotify_init": 253, "inotify_init1": 294,
    }.items(),
)  # fmt: skip
def test_what_reaches_past_the_jail_is_refused(name: str, number: int) -> None:
    assert answer(program(), number) == ERRNO | errno.EPERM, name


@pytest.mark.parametrize("number", [425, 426, 427, 428, 429, 430, 435, 438, 442, 447, 500])
def test_newer_calls_do_not_exist_so_that_libraries_fall_back(number: int) -> None:
    assert answer(program(), number) == ERRNO | errno.ENOSYS


def test_other_abis_are_no_way_around() -> None:
    assert answer(program(), 20, arch=I386) == KILL
    assert answer(program(), 0x40000000 + 39) == ERRNO | errno.ENOSYS


def test_threads_may_be_made_and_namespaces_not() -> None:
    assert answer(program(), 56, CLONE_VM | CLONE_THREAD) == ALLOW
    assert answer(program(), 56, CLONE_NEWUSER | 17) == ERRNO | errno.EPERM


def test_a_child_of_the_zygotes_cannot_be_made() -> None:
    assert answer(program(), 56, CLONE_PARENT | 17) == ERRNO | errno.EPERM
    # With a thread, it is the thread's process that it concerns: nothing needs it.
    assert answer(program(), 56, CLONE_PARENT | CLONE_VM | CLONE_THREAD) == ERRNO | errno.EPERM
    assert answer(program(), 435, 0x1000, 88) == ERRNO | errno.ENOSYS


MMAP = 9
PRIVATE, SHARED, SHARED_VALIDATE, ANONYMOUS = 0x2, 0x1, 0x3, 0x20


@pytest.mark.parametrize(
    ("flags", "uncounted"),
    [
        (PRIVATE | ANONYMOUS, ALLOW),
        (SHARED, ALLOW),
        (SHARED | ANONYMOUS, ERRNO | errno.EPERM),
        (SHARED_VALIDATE | ANONYMOUS, ERRNO | errno.EPERM),
        (SHARED | ANONYMOUS | 0x40000, ERRNO | errno.EPERM),
    ],
)
def test_shared_memory_without_a_file_can_be_refused(flags: int, uncounted: int) -> None:
    assert answer(program(shared_memory=False), MMAP, 0, 4096, 3, flags) == uncounted
    assert answer(program(), MMAP, 0, 4096, 3, flags) == ALLOW


def test_pipes_stay_as_small_as_they_are() -> None:
    assert answer(program(), 72, 3, 1031, 1 << 20) == ERRNO | errno.EPERM
    assert answer(program(), 72, 3, 1032) == ALLOW
    assert answer(program(), 72, 3, 2, 1) == ALLOW


@pytest.mark.parametrize(
    ("number", "first", "second", "expected"),
    [
        (41, 1, 0, ALLOW),
        (41, 2, 0, ERRNO | errno.EAFNOSUPPORT),
        (41, 16, 0, ERRNO | errno.EAFNOSUPPORT),
        (41, 40, 0, ERRNO | errno.EAFNOSUPPORT),
        (16, 0, 0x5413, ALLOW),
        (16, 0, 0x5412, ERRNO | errno.ENOTTY),
        (157, 15, 0, ALLOW),
        (157, 24, 0, ERRNO | errno.EINVAL),
        (135, 0xFFFFFFFF, 0, ALLOW),
        (135, 0x0040000, 0, ERRNO | errno.EPERM),
        (302, 0, 7, ALLOW),
        (302, 1, 7, ERRNO | errno.EPERM),
    ],
)
def test_some_calls_depend_on_their_arguments(
    number: int, first: int, second: int, expected: int
) -> None:
    assert answer(program(), number, first, second) == expected


CORE, NOFILE, POINTER = 4, 7, 0x7F0000000000


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ((160, NOFILE, POINTER), ALLOW),
        ((160, CORE, POINTER), ERRNO | errno.EPERM),
        ((302, 0, NOFILE, POINTER), ALLOW),
        ((302, 0, CORE, POINTER), ERRNO | errno.EPERM),
        ((302, 0, CORE, 0x1000), ERRNO | errno.EPERM),
        ((302, 0, CORE, 0, POINTER), ALLOW),
    ],
)
def test_the_limit_of_core_dumps_can_be_asked_for_and_not_be_set(
    call: tuple[int, ...], expected: int
) -> None:
    assert answer(program(), *call) == expected


def test_with_the_network_there_are_sockets_of_the_internet_and_no_others() -> None:
    assert answer(program(network=True), 41, 2) == ALLOW
    assert answer(program(network=True), 41, 10) == ALLOW
    assert answer(program(network=True), 41, 17) == ERRNO | errno.EAFNOSUPPORT


SOCKET, SETSOCKOPT, GETSOCKOPT = 41, 54, 55
INET, STREAM, DATAGRAM, RAW, NONBLOCK_CLOEXEC = 2, 1, 2, 3, 0x80800
IP, TCP, MPTCP, SCTP = 0, 6, 262, 132


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ((SOCKET, 1, DATAGRAM), ALLOW),
        ((SOCKET, INET, STREAM, 0), ALLOW),
        ((SOCKET, INET, STREAM | NONBLOCK_CLOEXEC, TCP), ALLOW),
        ((SOCKET, INET, STREAM, MPTCP), ERRNO | errno.EPERM),
        ((SOCKET, INET, STREAM, SCTP), ERRNO | errno.EPERM),
        ((SOCKET, INET, DATAGRAM, 0), ERRNO | errno.EPROTONOSUPPORT),
        ((SOCKET, INET, RAW, 1), ERRNO | errno.EPROTONOSUPPORT),
        ((SOCKET, 10, STREAM, 0), ERRNO | errno.EAFNOSUPPORT),
        ((SOCKET, 16, RAW, 0), ERRNO | errno.EAFNOSUPPORT),
        ((SETSOCKOPT, 3, 1, 9), ALLOW),
        # The size of a buffer: taken for a hint, and not passed on.
        ((SETSOCKOPT, 3, 1, 8), ERRNO),
        ((GETSOCKOPT, 3, 1, 8), ALLOW),
        ((SETSOCKOPT, 3, TCP, 1), ALLOW),
        ((SETSOCKOPT, 3, TCP, 31), ERRNO | errno.ENOPROTOOPT),
        ((GETSOCKOPT, 3, TCP, 35), ERRNO | errno.ENOPROTOOPT),
        ((SETSOCKOPT, 3, IP, 35), ERRNO | errno.ENOPROTOOPT),
    ],
)
def test_with_a_proxy_there_is_tcp_and_little_of_it(call: tuple[int, ...], expected: int) -> None:
    assert answer(program(proxied=True), *call) == expected


def test_without_a_network_buffers_cannot_be_made_large() -> None:
    assert answer(program(), SETSOCKOPT, 3, 1, 7) == ERRNO
    assert answer(program(), SETSOCKOPT, 3, 1, 8) == ERRNO
    assert answer(program(), GETSOCKOPT, 3, 1, 8) == ALLOW
    assert answer(program(network=True), SETSOCKOPT, 3, 1, 8) == ALLOW
    assert answer(program(network=True), SETSOCKOPT, 3, IP, 1) == ALLOW


@pytest.mark.parametrize("option", [26, 50, 51, 52])
@pytest.mark.parametrize("kind", [{}, {"network": True}, {"proxied": True}], ids=str)
def test_no_program_is_attached_to_a_socket(option: int, kind: dict[str, bool]) -> None:
    assert answer(program(**kind), SETSOCKOPT, 3, 1, option) == ERRNO | errno.EPERM
    assert answer(program(**kind), SETSOCKOPT, 3, 1, 9) == ALLOW
