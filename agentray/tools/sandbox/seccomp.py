"""Assemble the filter of system calls: a list of what is allowed, as a BPF program for x86_64.

Calls that are not on the list fail: with ENOSYS those newer than Linux 5.0, so that libraries
fall back, with EPERM the others. Calls of the other two ABIs of the architecture end the process
(i386) or do not exist (x32).
"""

from __future__ import annotations

import errno
import struct

__all__ = ["program"]

_NUMBERS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
    "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19,
    "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25,
    "msync": 26, "mincore": 27, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34,
    "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "sendfile": 40,
    "connect": 42, "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47,
    "shutdown": 48, "bind": 49, "listen": 50, "getsockname": 51, "getpeername": 52,
    "getsockopt": 55, "fork": 57, "vfork": 58, "execve": 59, "exit": 60,
    "wait4": 61, "kill": 62, "uname": 63, "flock": 73, "fsync": 74,
    "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80,
    "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
    "symlink": 88, "readlink": 89, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93,
    "lchown": 94, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
    "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "setuid": 105, "setgid": 106,
    "geteuid": 107, "getegid": 108, "setpgid": 109, "getppid": 110, "getpgrp": 111,
    "setsid": 112, "setreuid": 113, "setregid": 114, "getgroups": 115, "setresuid": 117,
    "getresuid": 118, "setresgid": 119, "getresgid": 120, "getpgid": 121, "getsid": 124,
    "setgroups": 116, "capget": 125, "capset": 126, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "rt_sigqueueinfo": 129,
    "rt_sigsuspend": 130, "sigaltstack": 131, "utime": 132, "mknod": 133, "statfs": 137,
    "fstatfs": 138, "getpriority": 140, "setpriority": 141, "sched_getparam": 143,
    "sched_getscheduler": 145, "sched_get_priority_max": 146, "sched_get_priority_min": 147,
    "mlock": 149, "munlock": 150, "arch_prctl": 158,
    "gettid": 186, "readahead": 187, "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193,
    "listxattr": 194, "llistxattr": 195, "flistxattr": 196, "tkill": 200, "time": 201,
    "futex": 202, "sched_setaffinity": 203, "sched_getaffinity": 204, "epoll_create": 213,
    "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221,
    "timer_create": 222, "timer_settime": 223, "timer_gettime": 224, "timer_getoverrun": 225,
    "timer_delete": 226, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234, "utimes": 235,
    "waitid": 247,
    "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "futimesat": 261,
    "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "get_robust_list": 274, "sync_file_range": 277, "utimensat": 280,
    "epoll_pwait": 281, "signalfd": 282, "timerfd_create": 283, "eventfd": 284,
    "fallocate": 285, "timerfd_settime": 286, "timerfd_gettime": 287, "accept4": 288,
    "signalfd4": 289, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
    "preadv": 295, "pwritev": 296, "rt_tgsigqueueinfo": 297,
    "recvmmsg": 299, "sendmmsg": 307, "getcpu": 309, "sched_getattr": 315,
    "renameat2": 316, "getrandom": 318, "execveat": 322, "membarrier": 324,
    "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332, "rseq": 334,
    "pidfd_send_signal": 424, "pidfd_open": 434, "close_range": 436, "openat2": 437,
    "faccessat2": 439, "epoll_pwait2": 441, "futex_waitv": 449,
}  # fmt: skip

# Allowed for some arguments only.
_IOCTL, _SOCKET, _SOCKETPAIR, _CLONE, _PERSONALITY, _PRCTL = 16, 41, 53, 56, 135, 157
_SETSOCKOPT, _GETSOCKOPT = 54, 55
_MMAP, _FCNTL = 9, 72
_SETRLIMIT, _PRLIMIT = 160, 302

_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_STREAMS = (0x1, 0x801, 0x80001, 0x80801)
_IPPROTO_TCP = 6
_SOL_SOCKET, _SO_SNDBUF, _SO_RCVBUF = 1, 7, 8
# Programs for the kernel to run on what arrives: SO_ATTACH_FILTER, _BPF, _REUSEPORT_CBPF, _EBPF.
_ATTACH = (26, 50, 51, 52)
# A pipe holds 64 KiB, and with this 1 MiB: memory of the kernel's that is in no process.
_F_SETPIPE_SZ = 1031
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
# No delay, segments, cork, keepalives (3), quick ack, its state, timeout: what clients set. Not
# zero-copy, repair, and the protocols that can be laid over a connection.
_TCP_OPTIONS = (1, 2, 3, 4, 5, 6, 11, 12, 18)
# What a clone may not do: a user namespace would give back every capability inside it, and a
# child of its own parent (CLONE_PARENT) would be one of the zygote's, which never waits for it.
_CLONE_NEW = 0x7E020000
_CLONE_PARENT = 0x8000
_PERSONALITY_QUERY = 0xFFFFFFFF
# Where the machine hands core dumps to a program, a limit of 0 does not keep it from being started,
# as root and outside; one of 1 does. So that one, which is set before, is not to be lowered.
_CORE = 4
# Set and get: name, death signal, dumpable; get: seccomp, bounding set, timer slack, and
# no_new_privs, which can only be set; names of memory areas.
_PRCTLS = (1, 2, 3, 4, 15, 16, 21, 23, 30, 38, 39, 0x53564D41)
# Terminals are asked what they are (and there are none), pipes how full they are, descriptors
# whether they block and outlive an execve. TIOCSTI and the like are not among them.
_IOCTLS = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x5452)

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARGUMENT = 0, 4, 16
_ARCH_X86_64 = 0xC000003E
_X32 = 0x40000000
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_FIRST_NEW = 334

Instruction = tuple[int, int, int, int]


def _refuse(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | number)


_allow: Instruction = (_RETURN, 0, 0, _ALLOW)


def _one_of(values: tuple[int, ...], refusal: int) -> list[Instruction]:
    """Allow a call whose first argument (for ioctl, second) is among the values."""
    code: list[Instruction] = [(_EQUAL, 0, 1, each) for each in values]
    return [step for each in code for step in (each, _allow)] + [_refuse(refusal)]


def _stream() -> list[Instruction]:
    """Allow a socket of TCP."""
    kind, protocol = ((_LOAD, 0, 0, _ARGUMENT + 8 * n) for n in (1, 2))
    left = len(_STREAMS)
    code: list[Instruction] = [kind]
    code += [(_EQUAL, left - n, 0, each) for n, each in enumerate(_STREAMS)]
    code += [_refuse(errno.EPROTONOSUPPORT), protocol]
    return [*code, (_EQUAL, 1, 0, 0), (_EQUAL, 0, 1, _IPPROTO_TCP), _allow, _refuse(errno.EPERM)]


def _own_options() -> list[Instruction]:
    """Go on behind what refuses the options of any socket that are not to be set."""
    # Done, it seems: how large buffers are is a hint. With large ones a socket holds megabytes.
    code = [s for each in (_SO_SNDBUF, _SO_RCVBUF) for s in ((_EQUAL, 0, 1, each), _refuse(0))]
    no = _refuse(errno.EPERM)
    return [*code, *(s for each in _ATTACH for s in ((_EQUAL, 0, 1, each), no))]


def _options(*, setting: bool, network: bool, proxied: bool) -> list[Instruction]:
    """Allow options of sockets, and what clients need of those of TCP where that is proxied."""
    level, option = ((_LOAD, 0, 0, _ARGUMENT + 8 * n) for n in (1, 2))
    refused = _own_options() if setting else []
    if network:
        # It is the machine's, and its buffers are not bounded by this anyway.
        refused = refused[4:]
    own = [option, *refused, _allow]
    code: list[Instruction] = [level, (_EQUAL, 0, len(own), _SOL_SOCKET), *own]
    if not proxied:
        return [*code, _allow]
    tcp = [option, *_one_of(_TCP_OPTIONS, errno.ENOPROTOOPT)]
    code += [(_EQUAL, 0, len(tcp), _IPPROTO_TCP), *tcp]
    return [*code, _refuse(errno.ENOPROTOOPT)]


def _special(
    network: bool, proxied: bool, shared_memory: bool
) -> list[tuple[int, list[Instruction]]]:
    first: Instruction = (_LOAD, 0, 0, _ARGUMENT)
    second: Instruction = (_LOAD, 0, 0, _ARGUMENT + 8)
    families = (_AF_UNIX, _AF_INET, _AF_INET6) if network else (_AF_UNIX,)
    third: tuple[Instruction, ...] = tuple((_LOAD, 0, 0, _ARGUMENT + 16 + n) for n in (0, 4))
    no = _refuse(errno.EPERM)
    sockets = [first, *_one_of(families, errno.EAFNOSUPPORT)]
    setting = _options(setting=True, network=network, proxied=proxied)
    more: list[tuple[int, list[Instruction]]] = [(_SETSOCKOPT, setting)]
    if proxied:
        stream = _stream()
        sockets = [first, (_EQUAL, 0, len(stream), _AF_INET), *stream, *sockets[1:]]
        more.append((_GETSOCKOPT, _options(setting=False, network=False, proxied=True)))
    if not shared_memory:
        bits = [(_ANY_BIT, 0, 2, _MAP_ANONYMOUS), (_ANY_BIT, 0, 1, _MAP_SHARED)]
        more.append((_MMAP, [(_LOAD, 0, 0, _ARGUMENT + 24), *bits, no, _allow]))
    clone = [first, (_ANY_BIT, 0, 1, _CLONE_NEW | _CLONE_PARENT), no, _allow]
    # Its own limits only: those of its init have the same uid. Asked for, they may be all.
    prlimit = [first, (_EQUAL, 1, 0, 0), no, second, (_EQUAL, 1, 0, _CORE), _allow]
    prlimit += [step for half in third for step in (half, (_EQUAL, 1, 0, 0), no)]
    return [
        (_IOCTL, [second, *_one_of(_IOCTLS, errno.ENOTTY)]),
        (_SOCKET, sockets),
        (_SOCKETPAIR, [first, *_one_of((_AF_UNIX,), errno.EAFNOSUPPORT)]),
        (_CLONE, clone),
        (_PERSONALITY, [first, *_one_of((_PERSONALITY_QUERY,), errno.EPERM)]),
        (_PRCTL, [first, *_one_of(_PRCTLS, errno.EINVAL)]),
        (_SETRLIMIT, [first, (_EQUAL, 0, 1, _CORE), no, _allow]),
        (_PRLIMIT, [*prlimit, _allow]),
        (_FCNTL, [second, (_EQUAL, 0, 1, _F_SETPIPE_SZ), no, _allow]),
        *more,
    ]


def _ranges() -> list[tuple[int, bool]]:
    """Return where being allowed begins and ends: the first number, and what holds from it on."""
    numbers = set(_NUMBERS.values())
    found: list[tuple[int, bool]] = []
    for number in range(max(numbers) + 2):
        if not found or found[-1][1] != (number in numbers):
            found.append((number, number in numbers))
    return found


def _search(ranges: list[tuple[int, bool]]) -> list[Instruction]:
    """Return a binary search: the kernel tries each number when the filter is installed."""
    if len(ranges) == 1:
        start, allowed = ranges[0]
        if allowed:
            return [_allow]
        return [_refuse(errno.ENOSYS if start >= _FIRST_NEW else errno.EPERM)]
    middle = len(ranges) // 2
    low, high = _search(ranges[:middle]), _search(ranges[middle:])
    if len(low) < 256:
        return [(_AT_LEAST, len(low), 0, ranges[middle][0]), *low, *high]
    return [(_AT_LEAST, 0, 1, ranges[middle][0]), (_JUMP, 0, 0, len(low)), *low, *high]


def program(*, network: bool = False, proxied: bool = False, shared_memory: bool = True) -> bytes:
    """Return the filter as the kernel takes it.

    ``network`` allows sockets of the internet, ``proxied`` those of TCP over IPv4, with few
    options. Without ``shared_memory`` there is none that is in no file: nothing but a cgroup
    counts what of it no process has in its memory at the moment.
    """
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _ARCH_X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
        (_AT_LEAST, 0, 1, _X32),
        _refuse(errno.ENOSYS),
    ]
    for number, body in _special(network, proxied, shared_memory):
        code += [(_EQUAL, 0, len(body), number), *body]
    code += _search(_ranges())
    return b"".join(struct.pack("=HBBI", *each) for each in code)
