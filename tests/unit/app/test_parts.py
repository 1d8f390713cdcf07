"""The small parts of starting a system: lock, addresses, environment, settings for a child."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr

from agentray.app.address import door, url
from agentray.app.environment import Ports, base_environment, find_ports, ray_environment
from agentray.app.jobs import dump_settings
from agentray.app.layout import Layout
from agentray.app.lock import exclusive
from agentray.app.processes import MARKER
from agentray.app.stores import without_password
from agentray.config.settings import (
    AgentSettings,
    EndpointSettings,
    HttpSettings,
    ModelsSettings,
    PostgresSettings,
    Settings,
)
from agentray.config.state import RunState, read_state, remove_state, write_state
from agentray.errors import ConfigError
from agentray.http.haproxy import MODELS_VARIABLE

PORTS = Ports(1, 2, 3, 4, 5, 6, range(20_000, 20_200))


def environment(settings: Settings) -> dict[str, str]:
    return ray_environment(settings, Layout.of("/tmp/x"), PORTS, haproxy="/bin/haproxy", alone=True)


def test_the_second_holder_of_a_lock_is_told_of_the_first(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "lock"),
        pytest.raises(ConfigError, match=f"process {os.getpid()}"),
        exclusive(tmp_path / "lock"),
    ):
        pass
    with exclusive(tmp_path / "lock"):
        pass


@pytest.mark.parametrize(
    ("host", "reached", "shown"),
    [
        ("127.0.0.1", "127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "127.0.0.1", "http://127.0.0.1:8000"),
        ("::", "::1", "http://[::1]:8000"),
    ],
)
def test_the_door_is_reached_from_here(host: str, reached: str, shown: str) -> None:
    settings = HttpSettings(host=host, port=8000)
    assert (door(settings), url(settings)) == (reached, shown)


def test_passwords_are_not_shown() -> None:
    assert without_password("postgresql://u:pw@h:5/d?x=y") == "postgresql://u:***@h:5/d?x=y"
    assert without_password("redis://:pw@h:5/0") == "redis://:***@h:5/0"
    assert without_password("unix:///tmp/redis.sock?db=0") == "unix:///tmp/redis.sock?db=0"


def test_settings_arrive_at_a_child_with_their_secrets() -> None:
    settings = Settings(
        postgres=PostgresSettings(url=SecretStr("postgresql://u:pw@h/d")),
        models=ModelsSettings(
            endpoints={"m": EndpointSettings(url="http://h/v1", api_key=SecretStr("key"))}
        ),
    )
    sent = json.loads(json.dumps(dump_settings(settings)))
    assert Settings.model_validate(sent) == settings


def test_streams_outlive_a_reload_and_silence_for_as_long_as_a_turn_may_take() -> None:
    settings = Settings(
        models=ModelsSettings(step_timeout_s=1_000),
        agents={"a": AgentSettings(max_steps=2), "b": AgentSettings(max_steps=5)},
    )
    found = environment(settings)
    assert int(found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 1_000
    assert int(found["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"]) > 5_000


def test_the_wrapper_of_haproxy_knows_every_model_that_is_served_here() -> None:
    served = {
        "tiny": {"source": "m"},
        "big": {"source": "m", "affinity": "prefix"},
        "rare": {"source": "m", "min_replicas": 0},
    }
    simulator = {"enabled": True}
    models = ModelsSettings.model_validate({"serve": served, "simulator": simulator})
    known = environment(Settings(models=models))[MODELS_VARIABLE]
    assert known == "/models/simulator /models/tiny /models/big:routed /models/rare:on-demand"


def test_prompts_reach_rays_router_only_where_it_looks_into_them() -> None:
    variable = "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY"
    for affinity, shown in (("session", False), ("prefix", True), ("kv", True)):
        serve = {"tiny": {"source": "m", "affinity": affinity}}
        models = ModelsSettings.model_validate({"serve": serve})
        assert (variable in environment(Settings(models=models))) is shown, affinity


def test_ports_are_kept_and_lie_where_linux_hands_out_none() -> None:
    layout = Layout.of("/tmp/x")
    ports = find_ports(layout)
    single = dataclasses.astuple(ports)[:-1]
    assert len(set(single)) == len(single)
    assert not set(single) & set(ports.replicas)
    assert all(1024 < port < 32_768 for port in (*single, *ports.replicas))
    assert find_ports(layout) == ports


def test_ports_that_somebody_listens_on_are_left_to_them() -> None:
    layout = Layout.of("/tmp/x")
    ports = find_ports(layout)
    with socket.create_server(("127.0.0.1", ports.haproxy_stats)):
        others = find_ports(layout)
    assert not {*dataclasses.astuple(ports)[:-1], *ports.replicas} & {*others.replicas, others.gcs}


def test_every_child_is_marked_and_finds_agentray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    layout = Layout.of("/tmp/x")
    found = base_environment(layout)
    assert found[MARKER] == layout.key
    assert "RAY_ADDRESS" not in found
    ours, theirs = found["PYTHONPATH"].split(os.pathsep)
    assert (Path(ours) / "agentray" / "__init__.py").exists()
    assert theirs == "/theirs"


def test_the_note_of_a_dead_supervisor_is_none(tmp_path: Path) -> None:
    state = RunState(
        pid=os.getpid(),
        version="1",
        started_at=0.0,
        ready=True,
        url="http://h",
        ray_address="h:1",
        postgres="p",
        redis="r",
        models=["m"],
        hosts=2,
    )
    (tmp_path / "run").mkdir()
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    # No process has the highest id.
    write_state(tmp_path, msgspec.structs.replace(state, pid=4_194_304))
    assert read_state(tmp_path) is None
    remove_state(tmp_path)
    remove_state(tmp_path)
    assert read_state(tmp_path) is None
