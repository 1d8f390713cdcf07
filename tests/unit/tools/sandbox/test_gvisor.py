"""What runsc is told; that it is so is seen in ``tests/jail/test_gvisor.py``."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentray.tools.sandbox import gvisor, layout


def made(*paths: str, root: bool = True, runsc: str = "/usr/bin/runsc") -> dict[str, Any]:
    return gvisor.config(paths, ("json",), runsc=runsc, root=root, uid=200_123)


def spec(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(dict(config["files"])["/var/bundle/config.json"])


@pytest.mark.parametrize("root", [True, False])
def test_only_the_scratch_can_be_written_to(root: bool) -> None:
    config = made(root=root)
    found = spec(config)
    assert found["root"] == {"path": "/", "readonly": True}
    writable = [m for m in found["mounts"] if "ro" not in m.get("options", ["ro"])]
    place = config["place"]
    assert {m["source"] for m in writable} == {place, f"{place}/.tmp"}
    assert {m["destination"] for m in writable} == {place, "/tmp", "/dev/shm"}
    # The slot's own files are not to be seen.
    assert {"/run", "/var"} <= {m["destination"] for m in found["mounts"]}


def test_a_program_may_do_nothing_but_become_another_user() -> None:
    process = spec(made())["process"]
    assert process["noNewPrivileges"]
    assert process["capabilities"]["effective"] == ["CAP_SETUID", "CAP_SETGID"]
    assert "200123" in process["args"][-1]
    unprivileged = made(root=False)
    assert set(map(tuple, spec(unprivileged)["process"]["capabilities"].values())) == {()}
    # It is the only user that there is in there.
    assert unprivileged["uid"] == 0


def test_links_that_runsc_would_follow_are_folders() -> None:
    config = made()
    assert "/tmp" in config["folders"]
    assert not [to for _, to in config["links"] if to.startswith(config["place"])]


def test_folders_of_the_operator_below_tmp_stay_to_be_seen() -> None:
    config = made("/tmp/operator")
    assert ("/tmp/operator", "/tmp/operator") in config["mounts"]
    assert "/tmp" not in {m["destination"] for m in spec(config)["mounts"]}
    assert spec(config)["process"]["env"].count(f"TMPDIR={config['place']}/.tmp") == 1


def test_a_runsc_that_lies_elsewhere_is_brought_along() -> None:
    config = made(runsc="/opt/gvisor/runsc")
    assert ("/opt/gvisor/runsc", "/opt/gvisor/runsc") in config["mounts"]
    assert ("/usr/bin/runsc", "/usr/bin/runsc") not in made()["mounts"]


def test_the_interpreter_is_the_one_of_jails() -> None:
    assert spec(made())["process"]["args"][0] == layout.interpreter()


def test_without_runsc_on_path_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gvisor.find_runsc() == ""
