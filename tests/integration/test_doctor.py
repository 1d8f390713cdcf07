"""`agentray doctor` on this machine, as root and without rights, held against what is true here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

UNPRIVILEGED = ("-m", "tests.jail.unprivileged")
# What is true is found out by a process with the same rights, not by the code that is tested.
TRUTH = """
import json, os
mounts = [line.split() for line in open("/proc/self/mounts")]
where = [mount[1] for mount in mounts if mount[2] in ("cgroup", "cgroup2")]
def can(folder):
    made = os.path.join(folder, f"agentray-{os.getpid()}-test")
    try:
        os.mkdir(made)
        os.rmdir(made)
    except OSError:
        return False
    return os.access(os.path.join(folder, "cgroup.procs"), os.W_OK)
print(json.dumps({"root": os.geteuid() == 0, "cgroups": any(can(each) for each in where)}))
"""


@pytest.fixture(params=["as we are", "unprivileged"])
def rights(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return UNPRIVILEGED if request.param == "unprivileged" else ()


def run(rights: tuple[str, ...], *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *rights, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


def asked(rights: tuple[str, ...], *options: str, **env: str) -> tuple[int, dict[str, Any]]:
    done = run(rights, "-m", "agentray", "doctor", "--json", *options, **env)
    assert done.stdout, done.stderr
    return done.returncode, msgspec.json.decode(done.stdout)


def test_it_tells_what_is_true_here(rights: tuple[str, ...]) -> None:
    done = run(rights, "-c", TRUTH)
    truth = msgspec.json.decode(done.stdout)
    code, found = asked(rights)
    assert (code, found["ready"], found["tier"]) == (0, True, "jail")
    runsc = shutil.which("runsc") is not None
    assert ("gvisor" not in found["unavailable"]) == runsc
    assert found["strongest"] == ("gvisor" if runsc else "jail")
    by = {quota["name"]: quota["by"] for quota in found["quotas"]}
    assert by["memory"].startswith("cgroup") == truth["cgroups"], truth
    assert found["cgroup"].startswith("version") == truth["cgroups"]
    named = [line.partition(" is ")[0] for line in found["not_enforced"]]
    if not truth["cgroups"]:
        assert by["cpu share"] == "nothing"
        assert {"cpu share", "memory", "cpu time"} <= set(named)
    unnamed = [name for name, what in by.items() if what == "nothing" and name not in named]
    assert unnamed == []
    shared = any("share this user's uid" in line for line in found["not_enforced"])
    assert shared is not truth["root"]
    assert all(check["state"] == "ok" for check in found["checks"] if check["name"] != "runsc")


def test_people_are_told_the_same(rights: tuple[str, ...]) -> None:
    done = run(rights, "-m", "agentray", "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "sandbox: jail (configured: jail)"
    assert lines[-1] == "ready"
    _, found = asked(rights)
    for quota in found["quotas"]:
        assert any(line.startswith(f"  {quota['name']} ") for line in lines)
    for line in found["not_enforced"]:
        assert f"  ! {line}" in lines


def test_a_tier_that_cannot_be_had_exits_1(tmp_path: Path) -> None:
    bare = {"PATH": str(tmp_path), "AGENTRAY_TOOLS__SANDBOX__TIER": "gvisor"}
    code, found = asked((), **bare)
    assert (code, found["tier"], found["strongest"]) == (1, None, "jail")
    assert "no runsc was found on PATH" in found["reason"]
    assert any("install runsc" in line for line in found["remedies"])
    code, found = asked((), **bare, AGENTRAY_TOOLS__SANDBOX__ALLOW_WEAKER="process")
    assert (code, found["tier"]) == (0, "jail")


def test_a_file_that_cannot_be_used_exits_1_and_the_rest_is_told(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("http: {prot: 1}\n")
    code, found = asked((), "--config", str(path))
    bad = [check for check in found["checks"] if check["state"] == "bad"]
    assert (code, [check["name"] for check in bad]) == (1, ["configuration"])
    assert "http.prot: unknown key" in bad[0]["found"]
    assert found["tier"] == "jail"
