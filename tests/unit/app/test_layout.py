"""Where a system's files are."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentray.app.layout import Layout
from agentray.errors import ConfigError

# What a unix socket's path may hold, less what HAProxy adds while it takes a socket over.
SOCKET_PATH = 107 - len(".12345678.tmp")
NODE_ID = "0" * 56


def test_the_longest_socket_path_fits_whatever_the_data_folder_is_called() -> None:
    layout = Layout.of("/" + "x" * 200)
    assert len(str(layout.runtime_dir / NODE_ID / "a.sock")) <= SOCKET_PATH
    session = "session_2026-01-01_00-00-00_000000_4194304"
    assert len(str(layout.ray_dir / session / "sockets" / "plasma_store")) <= SOCKET_PATH


def test_a_folder_has_one_layout_by_whatever_path_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert Layout.of(str(tmp_path / "link")) == Layout.of(str(tmp_path / "x" / ".." / "real"))
    assert Layout.of(str(tmp_path / "real")).key != Layout.of(str(tmp_path / "other")).key


def test_a_runtime_folder_that_somebody_else_put_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    layout = Layout(data_dir=tmp_path / "data", runtime_dir=tmp_path / "link")
    layout.runtime_dir.symlink_to("theirs")
    with pytest.raises(ConfigError, match="not a folder of this user"):
        layout.make()


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    layout = Layout(data_dir=tmp_path / "file" / "data", runtime_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"file/data"):
        layout.make()


def test_a_killed_run_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    layout = Layout(data_dir=tmp_path / "data", runtime_dir=tmp_path / "run")
    layout.make()
    (layout.runtime_dir / NODE_ID).mkdir()
    (layout.runtime_dir / "redis.sock").touch()
    layout.prepare()
    layout.prepare()
    assert list(layout.runtime_dir.iterdir()) == []


def test_rays_logs_are_found_among_the_others_also_when_it_has_failed(tmp_path: Path) -> None:
    layout = Layout(data_dir=tmp_path / "data", runtime_dir=tmp_path / "run")
    layout.make()
    layout.prepare()
    logs = layout.ray_dir / "session_1" / "logs"
    logs.mkdir(parents=True)
    (layout.ray_dir / "session_latest").symlink_to("session_1")
    (logs / "raylet.out").write_text("why")
    assert (layout.logs_dir / "ray" / "raylet.out").read_text() == "why"
    layout.keep_ray_logs()
    layout.remove_runtime()
    assert (layout.logs_dir / "ray" / "raylet.out").read_text() == "why"
    layout.make()
    layout.prepare()
    assert not (layout.logs_dir / "ray" / "raylet.out").exists()
