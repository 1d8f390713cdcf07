"""Which model a start takes when none is configured, and what ``--model`` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentray.app.choice import OPENAI_MODEL, OPENAI_URL, asked_models, choose
from agentray.config.settings import AgentSettings, ModelsSettings, Settings, SimulatorSettings
from agentray.errors import ConfigError

KEY = {"OPENAI_API_KEY": "sk-test"}


def endpoint_of(env: dict[str, str]) -> tuple[str, str, str | None]:
    choice = choose(Settings(), env)
    [(name, endpoint)] = choice.models.endpoints.items()
    assert endpoint.api_key is not None
    assert endpoint.api_key.get_secret_value() == "sk-test"
    assert "sk-test" not in choice.why
    return name, endpoint.url, endpoint.upstream


def test_without_anything_the_simulator_answers_and_says_so() -> None:
    choice = choose(Settings(), {"HOME": "/root", "OPENAI_API_KEY": ""})
    assert choice.models.names() == ("simulator",)
    assert "no model is configured" in choice.why


def test_a_key_leads_to_openai_and_the_simulator_stays_away() -> None:
    assert endpoint_of(KEY) == (OPENAI_MODEL, OPENAI_URL, OPENAI_MODEL)
    assert choose(Settings(), KEY).models.names() == (OPENAI_MODEL,)
    assert "OPENAI_API_KEY" in choose(Settings(), KEY).why


def test_the_environment_names_another_model_and_another_address() -> None:
    env = {**KEY, "OPENAI_MODEL": "big", "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
    assert endpoint_of(env) == ("big", "http://127.0.0.1:1/v1", "big")


def test_no_model_is_guessed_at_an_address_of_ones_own() -> None:
    choice = choose(Settings(), {**KEY, "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"})
    assert choice.models.names() == ("simulator",)
    assert "OPENAI_MODEL" in choice.why


@pytest.mark.parametrize(
    "settings",
    [
        Settings(models=ModelsSettings.model_validate({"endpoints": {"m": {"url": "http://h"}}})),
        Settings(models=ModelsSettings.model_validate({"serve": {"m": {"source": "org/m"}}})),
        Settings(models=ModelsSettings(simulator=SimulatorSettings(enabled=True))),
        Settings(models=ModelsSettings(default="simulator")),
        Settings(agents={"a": AgentSettings(model="simulator")}),
        Settings(agents={"a": AgentSettings(models=("simulator",))}),
    ],
)
def test_what_is_configured_is_not_changed_by_a_key(settings: Settings) -> None:
    choice = choose(settings, KEY)
    assert (choice.models, choice.why) == (settings.models, "as configured")


def test_a_name_and_a_url_are_a_model_behind_an_endpoint() -> None:
    asked = ["tiny=http://127.0.0.1:1/v1", "big=https://h/v1?x=y"]
    urls = {"tiny": {"url": "http://127.0.0.1:1/v1"}, "big": {"url": "https://h/v1?x=y"}}
    assert asked_models(asked, vllm=False, gpu=False) == {"endpoints": urls}


def test_a_source_is_served_under_its_last_part_or_the_name_it_is_given() -> None:
    asked = ["Qwen/Qwen3-8B", "mine=org/other", "/models/my llama/", "s3://bucket/_x"]
    found = asked_models(asked, vllm=True, gpu=True)["serve"]
    assert {name: model["source"] for name, model in found.items()} == {
        "Qwen3-8B": "Qwen/Qwen3-8B",
        "mine": "org/other",
        "my-llama": "/models/my llama",
        "x": "s3://bucket/_x",
    }
    ModelsSettings.model_validate({"serve": found})


def test_a_folder_is_found_from_elsewhere_too() -> None:
    found = asked_models(["./models/tiny"], vllm=True, gpu=True)["serve"]["tiny"]
    assert found["source"] == str(Path.cwd() / "models" / "tiny")


def test_without_a_gpu_the_cpu_serves() -> None:
    on_cpu = asked_models(["org/m"], vllm=True, gpu=False)["serve"]["m"]
    assert (on_cpu["accelerator"], on_cpu["engine"]["dtype"]) == ("cpu", "float32")
    assert set(asked_models(["org/m"], vllm=True, gpu=True)["serve"]["m"]) == {"source"}


def test_a_source_without_vllm_is_refused_with_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"ray\[llm\]"):
        asked_models(["org/m"], vllm=False, gpu=True)


@pytest.mark.parametrize("text", ["", "=http://h/v1", "tiny=", "http://127.0.0.1:1/v1", "/"])
def test_what_names_no_model_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME=URL"):
        asked_models([text], vllm=True, gpu=True)
