"""What a jail's root consists of, given what the operator wants to have in it."""

from __future__ import annotations

import sys
from pathlib import Path

from agentray.tools.sandbox.layout import layout


def test_the_interpreter_is_there_and_nothing_is_there_twice() -> None:
    found = layout((), 1000)
    targets = [target for _, target in found["mounts"]]
    prefix = Path(sys.base_prefix).resolve()
    assert any(prefix.is_relative_to(target) for target in targets)
    for each in targets:
        assert not any(Path(each).is_relative_to(other) for other in targets if other != each)
    assert found["place"] == found["environment"]["HOME"] == "/work"
    assert set(found["environment"]) == {"HOME", "LANG", "PATH"}


def test_the_operators_folders_are_where_they_were_and_programs_run_elsewhere() -> None:
    found = layout(("/work/code", "/work/code/more"), 1000)
    assert ("/work/code", "/work/code") in found["mounts"]
    assert ("/work/code/more", "/work/code/more") not in found["mounts"]
    assert found["place"] == "/scratch"
    assert ("/tmp", "/scratch/.tmp") in found["links"]


def test_a_folder_of_the_operator_below_tmp_moves_temporary_files() -> None:
    found = layout(("/tmp/code",), 1000)
    assert found["environment"]["TMPDIR"] == "/work/.tmp"
    assert "/tmp" not in dict(found["links"])
