"""Where cgroups can be made, and what is written to them: on hierarchies of plain files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentray.tools.sandbox.cgroups import Cgroup, Found, find, make


class Machine:
    """What /proc/self says of cgroups, and folders in the place of the hierarchies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proc = folder / "self"
        self.proc.mkdir()
        self._mounts = ["proc /proc proc rw 0 0"]
        self._own: list[str] = []

    def v2(self, own: str, enabled: dict[str, str]) -> Path:
        root = self.folder / "unified"
        (root / own.strip("/")).mkdir(parents=True)
        for path, controllers in enabled.items():
            (root / path.strip("/") / "cgroup.subtree_control").write_text(controllers)
            (root / path.strip("/") / "cgroup.procs").touch()
        self._mounts.append(f"cgroup2 {root} cgroup2 rw 0 0")
        self._own.append(f"0::{own}")
        return root

    def unit(
        self,
        root: Path,
        path: str,
        *,
        controllers: str,
        processes: tuple[int, ...] = (),
        handed_over: bool = False,
    ) -> Path:
        """Put a unit's files there; ``handed_over``: as systemd marks it with Delegate=yes."""
        unit = root / path.strip("/")
        (unit / "cgroup.controllers").write_text(controllers)
        (unit / "cgroup.subtree_control").touch()
        (unit / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in processes))
        if handed_over:
            os.setxattr(unit, "user.delegate", b"1")
        return unit

    def v1(self, controllers: str, own: str, *, writable: bool = True) -> Path:
        root = self.folder / controllers
        place = root / own.strip("/")
        place.mkdir(parents=True)
        if writable:
            (place / "cgroup.procs").touch()
        self._mounts.append(f"cgroup {root} cgroup rw,relatime,{controllers} 0 0")
        self._own.append(f"3:{controllers}:{own}")
        return root

    def found(self) -> Found:
        (self.proc / "mounts").write_text("\n".join(self._mounts))
        (self.proc / "cgroup").write_text("\n".join(self._own))
        return find(self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


WITHOUT_CPU = ("memory", "pids", "cpuacct")
ALL = (*WITHOUT_CPU, "cpu")


def test_the_own_group_is_taken_that_gives_controllers_to_its_children(machine: Machine) -> None:
    root = machine.v2("/user/app", {"/": "", "/user": "", "/user/app": "memory pids"})
    assert machine.found() == Found(2, dict.fromkeys(WITHOUT_CPU, str(root / "user/app")))


def test_what_is_above_the_own_unit_is_left_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manager's slices have controllers for their children, and are its own."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    root = machine.v2("/slice/app", {"/": "cpu memory pids", "/slice": "memory pids"})
    machine.unit(root, "/slice/app", controllers="cpu memory pids", processes=(12,))
    found = machine.found()
    assert found.version == 0
    assert "memory and pids" in found.missing
    assert list(root.rglob("agentray-*")) == []
    assert (root / "slice/app/cgroup.subtree_control").read_text() == ""


def test_a_unit_that_was_handed_over_is_divided(machine: Machine) -> None:
    root = machine.v2("/slice/app", {"/": "cpu memory pids", "/slice": "memory pids"})
    unit = machine.unit(
        root, "/slice/app", controllers="cpu memory pids", processes=(12, 13), handed_over=True
    )
    assert machine.found() == Found(2, dict.fromkeys(ALL, str(unit)))
    assert (unit / "agentray-rest/cgroup.procs").read_text() == "13"
    assert (unit / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_a_unit_that_is_divided_already_is_found_from_its_child(machine: Machine) -> None:
    root = machine.v2("/slice/app/agentray-rest", {"/": "memory pids", "/slice": "memory pids"})
    unit = machine.unit(root, "/slice/app", controllers="memory pids", handed_over=True)
    (unit / "cgroup.subtree_control").write_text("memory pids")
    assert machine.found() == Found(2, dict.fromkeys(WITHOUT_CPU, str(unit)))


def test_a_unit_without_the_controllers_is_not_divided(machine: Machine) -> None:
    root = machine.v2("/app", {"/": "cpu"})
    unit = machine.unit(root, "/app", controllers="cpu", processes=(12,), handed_over=True)
    assert machine.found().version == 0
    assert not (unit / "agentray-rest").exists()


def test_a_containers_own_root_is_divided_and_the_machines_is_not(machine: Machine) -> None:
    root = machine.v2("/", {"/": ""})
    (root / "cgroup.controllers").write_text("memory pids")
    assert machine.found().version == 0
    (root / "cgroup.type").write_text("domain")
    assert machine.found().version == 2


def test_a_users_manager_keeps_what_was_handed_over_to_it(machine: Machine) -> None:
    root = machine.v2("/user@7.service/app", {"/": ""})
    manager = machine.unit(root, "/user@7.service", controllers="memory pids", handed_over=True)
    machine.unit(root, "/user@7.service/app", controllers="memory pids")
    (manager / "cgroup.subtree_control").write_text("memory pids")
    assert machine.found().version == 0


def test_version_1_is_taken_per_controller_where_version_2_has_none(machine: Machine) -> None:
    machine.v2("/", {"/": ""})
    memory, cpu = machine.v1("memory", "/own"), machine.v1("cpu,cpuacct", "/")
    machine.v1("pids", "/", writable=False)
    found = machine.found()
    assert found.version == 1
    assert found.folders == {
        "memory": str(memory / "own"),
        "cpu": str(cpu),
        "cpuacct": str(cpu),
    }


def test_none_at_all_says_why(machine: Machine) -> None:
    assert machine.found() == Found(missing="no hierarchy is mounted")


def written(group: Cgroup, folder: Path, *names: str) -> list[str]:
    group.limit(pids=12, cpu_share=0.5)
    group.limit_memory(1000)
    group.hold_cpu()
    (made,) = folder.glob("agentray-*")
    held = [(made / name).read_text() for name in names]
    group.free_cpu()
    return [*held, (made / names[-1]).read_text()]


def test_version_2_is_limited_by_its_files(machine: Machine) -> None:
    root = machine.v2("/", {"/": "cpu memory pids"})
    group = make(machine.found())
    assert group is not None
    assert group.quotas == {"cpu", "cpuacct", "memory", "pids"}
    names = ("memory.max", "memory.swap.max", "pids.max", "cpu.max")
    assert written(group, root, *names) == ["1000", "0", "12", "50000 100000", "max 100000"]


def test_version_1_is_limited_by_its_files(machine: Machine) -> None:
    root = machine.v1("memory,pids,cpu,cpuacct", "/")
    group = make(machine.found())
    assert group is not None
    names = ("memory.limit_in_bytes", "pids.max", "cpu.cfs_period_us", "cpu.cfs_quota_us")
    assert written(group, root, *names) == ["1000", "12", "100000", "50000", "-1"]


@pytest.mark.parametrize("refused", ["pids.max", "memory.max", "cpu.max"])
def test_a_limit_that_cannot_be_set_is_told(machine: Machine, refused: str) -> None:
    root = machine.v2("/", {"/": "cpu memory pids"})
    group = make(machine.found())
    assert group is not None
    (made,) = root.glob("agentray-*")
    # Nobody can write there.
    (made / refused).mkdir()
    with pytest.raises(OSError, match=refused.partition(".")[0]):
        group.limit(pids=12, cpu_share=0.5)


@pytest.mark.parametrize(
    ("version", "files", "cpu_s", "kills", "memory_bytes"),
    [
        (
            2,
            {
                "cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
                "memory.events": "low 0\noom 3\noom_kill 2\n",
                "memory.current": "4096\n",
            },
            1.5,
            2,
            4096,
        ),
        (
            1,
            {
                "cpuacct.usage": "2500000000\n",
                "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
                "memory.usage_in_bytes": "8192\n",
            },
            2.5,
            1,
            8192,
        ),
        (1, {}, 0.0, 0, 0),
    ],
)
def test_what_was_used_is_read(
    tmp_path: Path,
    version: int,
    files: dict[str, str],
    cpu_s: float,
    kills: int,
    memory_bytes: int,
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    group = Cgroup(version, {"memory": tmp_path, "cpuacct": tmp_path})
    assert (group.cpu_s(), group.oom_kills(), group.memory_bytes()) == (cpu_s, kills, memory_bytes)


def test_what_a_killed_process_left_is_removed(machine: Machine) -> None:
    root = machine.v2("/", {"/": "cpu memory pids"})
    left = root / f"agentray-{2**22 + 1}-aa"
    left.mkdir()
    others = root / "agentray-1-bb"
    others.mkdir()
    assert make(machine.found()) is not None
    assert not left.exists()
    assert others.exists()
