"""Jail a forked process, and make it ready for the program that it will run."""

from __future__ import annotations

import gc
import os
from typing import Any

from agentray.tools.sandbox import harvest, kernel, program

__all__ = ["Jail", "begin", "collect", "new_folder", "remove", "trial"]

# What the program comes on; stdin, stdout and stderr are the only others.
_TASK = 3
_STATE_BYTES = 4 * 1024 * 1024
_STATE_FILES = 256


class Jail:
    """What makes a jail of a process: prepared in the zygote, done in the child.

    A child's pid namespace has an init that does nothing: with it, all in the namespace ends. It
    also holds the child's mounts and host name.
    """

    def __init__(self, config: dict[str, Any], proc: str) -> None:
        without = config["without"]
        self.isolated: bool = config["isolated"]
        # Of the network and of System V objects each slot has one, empty; see the filter.
        self.own = kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS
        if "pid_ns" in without:
            self.own &= ~kernel.CLONE_NEWPID
        self.enter = kernel.enter(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS)
        self.place: str = config["place"]
        # Without it, the zygote's own is there.
        self.fresh = "scratch_wipe" not in without
        self.attach = kernel.attach(self.place.encode())
        self.owner = {"uid": config["uid"], "gid": config["gid"]}
        # A folder for what the child itself has to write, if it has to.
        self.state: str = config.get("state", "")
        self.proc = None
        if proc and "proc_readonly" in without:
            self.proc = kernel.proc_mount(processes_only=False, writable=True)
        elif proc:
            self.proc = kernel.proc_mount(processes_only=proc == "pid")
        self.close_others = None if "close_fds" in without else kernel.close_from(_TASK + 1)
        self.give_up = self._give_up(config)

    def _give_up(self, config: dict[str, Any]) -> tuple[kernel.Prepared, ...]:
        without = config["without"]
        steps: list[kernel.Prepared] = []
        if self.isolated and config["root"] and "uid" not in without:
            if "capabilities" in without:
                steps.append(kernel.keep_capabilities)
            steps += kernel.become(config["uid"], config["gid"])
        if self.isolated:
            kept = "capabilities" in without
            steps.append(kernel.use_capabilities() if kept else kernel.drop_capabilities)
        # A change of uid resets both.
        steps += [kernel.die_with_parent, kernel.show]
        if config["filter"]:
            # Who may gain privileges needs a capability to have a filter.
            place = 0 if "no_new_privs" in without else len(steps)
            steps.insert(place, kernel.filter_calls(config["filter"]))
        return tuple(steps)

    def mount(self, scratch: int) -> None:
        """Mount what is the child's own, in the namespace that it is in."""
        if self.fresh:
            self.attach(scratch)
        if self.state:
            state = kernel.Tmpfs(_STATE_BYTES, _STATE_FILES, uid=0, gid=0).make()
            kernel.attach(self.state.encode())(state)
        if self.proc is not None:
            self.proc()
        elif self.own & kernel.CLONE_NEWPID:
            # The zygote's, if there is one, shows the slot's other children.
            kernel.attach(b"/proc")(kernel.Tmpfs(4096, 1, **self.owner).make())


def trial(config: dict[str, Any]) -> Jail:
    """Return the jail that works here, found by trying it in a child.

    Where the machine's own ``/proc`` is not whole, the kernel refuses a new one to a user
    namespace; jails have none then.

    Raises:
        OSError: if a child cannot be jailed at all.
    """
    said = ""
    for proc in ("pid", "all", ""):
        jail = Jail(config, proc)
        scratch = kernel.Tmpfs(4096, 2, **jail.owner).make()
        read, write = os.pipe()
        pid = kernel.clone(jail.own)
        if pid == 0:
            try:
                jail.mount(scratch)
                for step in jail.give_up:
                    step()
            except OSError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        os.close(scratch)
        said = os.read(read, 1000).decode(errors="replace")
        os.close(read)
        os.waitpid(pid, 0)
        if not said:
            return jail
    raise OSError(said)


def begin(jail: Jail, fds: tuple[int, int, int], scratch: int, init: int, folder: str) -> int:
    """Jail this process, and return the descriptor that its program comes on.

    ``fds``: of the program, of its stdout and of its stderr, all larger than what they become.
    ``folder``: where it runs if it is not isolated.
    """
    task, out, err = fds
    try:
        if jail.isolated:
            jail.enter(init)
            jail.mount(scratch)
        os.chdir(jail.place if jail.isolated else folder)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(task, _TASK, inheritable=False)
        if jail.close_others is not None:
            jail.close_others()
        task = _TASK
        for step in jail.give_up:
            step()
        if jail.isolated and (jail.fresh or not os.access(".tmp", os.F_OK)):
            os.mkdir(".tmp", 0o700)  # noqa: PTH102 - without pathlib, for its time
            if jail.state:
                # It is still root, and the program's process will not be.
                os.chown(".tmp", jail.owner["uid"], jail.owner["gid"])
        # A group of its own, whatever it signals; a session would cost more than all else here.
        os.setpgid(0, 0)
        # What is frozen is not listed by ``gc.get_objects``.
        gc.freeze()
    except BaseException as error:  # noqa: BLE001
        try:
            os.write(task, program.BEGUN)
            program.tell(task, program.UNABLE, str(error).encode())
        finally:
            # Whatever comes: this process is not to go on as a zygote.
            os._exit(1)
    return task


def new_folder(parent: str) -> str:
    """Return a new folder for a program that has no tmpfs."""
    import tempfile

    return tempfile.mkdtemp(dir=parent)


def remove(folder: str) -> None:
    """Remove such a folder and all in it."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def collect(jail: Jail, scratch: int, channel: int, most_bytes: int, folder: str) -> None:
    """Send what a program left in its scratch, from a process that may do nothing else."""
    try:
        os.fchdir(scratch)
        # While it may: the program can have closed the folder to itself.
        os.chmod(".", 0o700)  # noqa: PTH101
        for number in (0, 1, 2):
            if number != channel:
                os.dup2(0, number)
        for step in jail.give_up:
            step()
        harvest.send(channel, most_bytes)
        if folder:
            remove(folder)
    finally:
        os._exit(0)
