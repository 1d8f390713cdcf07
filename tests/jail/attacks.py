"""The list of attacks on the jail, entry by entry, and what of it makes sense for who runs it."""

from __future__ import annotations

from tests.jail.attack import MODE, Attack
from tests.jail.endings import ENDINGS
from tests.jail.exhaustion import EXHAUSTION
from tests.jail.kernel import KERNEL
from tests.jail.looking import LOOKING

__all__ = ["ALL", "BEYOND", "HERE", "LIST", "control_here", "left_out"]

LIST: dict[str, tuple[str, ...]] = {
    # What everybody shares: exhaustion.py
    "fork bomb": (
        "fork bomb",
        "fork bomb that doubles",
        "fork bomb of the shell",
        "bomb of threads",
    ),
    "memory bomb: one block": ("memory bomb of one block",),
    "memory bomb: many small": ("memory bomb of many small blocks",),
    "memory bomb: mmap": (
        "memory bomb of shared mappings",
        "memory bomb of shared mappings that no process has in its memory",
        "memory bomb of a device, mapped",
        "memory bomb of several processes",
        "memory bomb of a process that hides",
        "memory bomb in detached System V segments",
    ),
    "memory bomb: buffers": (
        "memory bomb in the buffers of sockets",
        "memory bomb in pipes made large",
    ),
    "memory bomb: tmpfs": (
        "memory bomb in every place that can be written",
        "memory bomb in files in memory",
    ),
    "CPU spin": (
        "spinning processor",
        "spinning processor in several processes",
        "spinning processor in children that come and go",
        "spinning processor in children that nobody waits for",
        "spinning processor with the limit's signal ignored",
    ),
    "giant integer": ("giant integer",),
    "deep recursion": (
        "deep recursion of Python",
        "deep recursion of C",
        "source that breaks the compiler",
    ),
    "descriptor exhaustion": ("descriptors without end", "limits lifted again"),
    "one huge file": ("one huge file", "a sparse file, kept"),
    "many files": ("several big files", "many files"),
    "inode fill": ("inodes filled with folders and links",),
    "output flood on stdout": (
        "flood on stdout",
        "flood on both until the deadline",
        "flood of a child in the background",
    ),
    "output flood on stderr": ("flood on stderr", "flood on both until the deadline"),
    # How programs end, and lie about it: endings.py
    "invalid UTF-8": ("invalid UTF-8", "half a character in the source"),
    "NUL bytes": ("NUL bytes on stdout", "a NUL byte in the source"),
    "a fake result protocol on stdout": (
        "results forged on stdout and on every descriptor",
        "the runner's own tools replaced",
        "every descriptor closed",
    ),
    "ignored signals": ("ignored signals",),
    "blocked signals": ("blocked signals",),
    "double-forked daemon": ("a daemon, forked twice",),
    "child that holds the pipe": ("a child that holds the pipe",),
    "sleep past the deadline": (
        "sleep past the deadline",
        "a program that stops itself",
        "a program that stops all that it can reach",
        "a tree of processes in sessions of their own",
        "its output closed before the deadline",
        "a child that the deadline finds in vfork",
        "a thread that never ends",
        "a child of its parent's, which nobody waits for",
        "test_reuse::test_a_zygote_that_is_held_up_is_replaced",
        "test_reuse::test_a_zygote_that_is_held_up_ends_with_its_supervisor",
    ),
    "segfault": ("segmentation fault",),
    "abort": ("abort", "its own death", "the death of its own group"),
    "exit codes": (
        "exit code 7",
        "exit code 255",
        "exit code of no meaning",
        "exit with a text",
        "an exception that cannot be shown",
    ),
    # What is not the program's: looking.py
    "reading /etc/shadow": ("reading /etc/shadow", "climbing out of the root"),
    "reading the repository": (
        "reading the repository",
        "reading the homes and the caller's files",
        "leaving the root with chroot",
    ),
    "reading the environment": (
        "reading the environment",
        "looking for a secret of the caller in memory",
        "reading the supervisor's environment and memory",
    ),
    "reading /proc of others": ("reading /proc of others", "the machine's mounts listed"),
    "reading /sys": ("reading /sys",),
    "reaching the cloud metadata address": ("a TCP connection to the cloud's metadata address",),
    "writing anywhere outside scratch": (
        "writing outside of the scratch directory",
        "writing into the programs and libraries that are there",
        "the root made writable again",
        "a core dump where the machine hands them to a program",
    ),
    "core_pattern and other sysctls": ("sysctls and core_pattern open for writing",),
    # Other processes, sockets, namespaces and rare calls: looking.py and kernel.py
    "ptrace": (
        "ptrace of the parent",
        "being traced",
        "another process's memory by its number",
        "another process's descriptors by its number",
        "kcmp",
    ),
    "kill and signals to siblings": (
        "test_reuse::test_two_slots_do_not_see_each_other",
        "test_reuse::test_two_slots_see_each_other_where_a_defence_is_left_out",
        "the death of all that it can reach",
    ),
    "kill and signals to the supervisor": (
        "signals to the supervisor",
        "the death of its parent",
    ),
    "sockets: INET": (
        "a TCP connection to this machine",
        "a datagram to the outside",
        "an IPv6 connection",
    ),
    "sockets: UNIX": ("a Unix socket of this machine",),
    "sockets: abstract": ("an abstract Unix socket of this machine",),
    "sockets: NETLINK": ("the kernel's netlink",),
    "sockets: raw": (
        "raw sockets",
        "packets past the network stack",
        "the hypervisor's socket",
    ),
    "mount": (
        "a mount",
        "a mount taken away",
        "mounts by the new calls: fsopen",
        "mounts by the new calls: open_tree",
        "mounts by the new calls: move_mount",
        "pivot_root",
    ),
    "unshare": ("a new user namespace", "other namespaces of its own"),
    "setns": ("the namespaces of another process entered",),
    "clone with new user namespace": (
        "a new user namespace by clone",
        "a new user namespace by clone3",
    ),
    "bpf": ("bpf", "a program of the kernel's attached to a socket"),
    "io_uring": ("io_uring",),
    "keyctl": ("keyctl", "add_key", "request_key"),
    "userfaultfd": ("userfaultfd",),
    "perf": ("perf_event_open",),
    "memfd exec": ("a file in memory, run",),
    "x32 calls": ("calls of x32",),
    "i386 calls": ("calls of i386",),
    "inherited descriptors": ("reading inherited descriptors", "reading the caller's stdin"),
    "/dev/shm": (
        "memory bomb in /dev/shm",
        "test_reuse::test_nothing_is_left_of_the_previous_call",
    ),
    # What goes from call to call, in and out: test_artifacts.py and test_reuse.py
    "symlink traversal in fetched artifacts": (
        "test_artifacts::test_links_in_artifacts_lead_nowhere",
        "test_artifacts::test_pipes_sockets_and_devices_are_no_artifacts",
        "test_artifacts::test_the_scratch_directory_removed_or_replaced_does_not_break_the_slot",
    ),
    "tar traversal in fetched artifacts": (
        "test_artifacts::test_artifacts_with_odd_names_come_out_or_are_left_out",
        "test_artifacts::test_files_that_go_in_stay_in",
    ),
    "zygote globals": (
        "frames, globals and objects of the zygote",
        "modules of the zygote imported",
    ),
    "repeated PRNG state between calls": (
        "test_reuse::test_random_numbers_do_not_repeat_from_call_to_call",
        "test_reuse::test_random_numbers_repeat_where_nothing_seeds_them",
    ),
    "state left from the previous call": (
        "test_reuse::test_nothing_is_left_of_the_previous_call",
        "test_reuse::test_something_is_left_where_its_defence_is_left_out",
        "test_reuse::test_the_source_of_the_previous_call_is_not_in_memory",
    ),
    "a kill during setup": (
        "test_reuse::test_a_call_that_is_cancelled_at_any_time_leaves_a_usable_slot",
        "test_reuse::test_a_slot_that_is_cancelled_while_it_opens_leaves_nothing",
        "test_reuse::test_a_zygote_that_is_killed_is_replaced",
    ),
    "setuid binaries": (
        "a setuid program",
        "a setuid program of its own",
        "programs that may give privileges",
    ),
    "a device node": (
        "a device node of its own",
        "the machine's memory or a disk by a device node of its own",
        "devices of the machine",
    ),
    "a clock change": ("a change of the clock",),
    "a hostname change": (
        "a change of the host's name",
        "a change of the domain's name",
        "test_reuse::test_the_host_name_is_that_of_the_jail_and_the_machine_keeps_its_own",
    ),
}
"""Every attack that the jail is held to, in order, with the cases for it: names of attacks, and
tests of this folder. What is below an entry beside its namesake is a variant that another way of
containing it would miss."""

ALL = (*EXHAUSTION, *ENDINGS, *LOOKING, *KERNEL)
HERE = tuple(attack for attack in ALL if attack.only in (None, MODE))

_LISTED = {case for cases in LIST.values() for case in cases}
BEYOND = tuple(attack for attack in ALL if attack.name not in _LISTED)
"""Attacks that are held to as well: priorities, capabilities, kernel objects and single calls."""


def control_here(attack: Attack) -> bool:
    """Say whether the attack's control makes sense for this user."""
    return attack.control_only in (None, MODE)


def left_out() -> list[str]:
    """Return a line for each case that is not run for this user, with its reason."""
    cases = [f"{attack.name}: {attack.why}" for attack in ALL if attack not in HERE]
    controls = [
        f"the control of {attack.name}: {attack.why}"
        for attack in HERE
        if attack.off and not control_here(attack)
    ]
    return [*cases, *controls]
