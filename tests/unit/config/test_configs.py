import re
from pathlib import Path

import pytest

from agentray.config import Settings, load_settings

CONFIGS = Path(__file__).parents[3] / "configs"

ENV = {
    "OPENAI_API_KEY": "sk-test",
    "POSTGRES_URL": "postgresql://agentray@db/agentray",
    "RAY_ADDRESS": "10.0.0.1:6379",
    "REDIS_URL": "redis://cache:6379",
    "VLLM_API_KEY": "test",
    "VLLM_URL": "http://vllm:8000/v1",
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_file_is_valid_once_its_variables_are_set(path):
    load_settings(path, ENV)


def test_local_is_what_runs_without_a_file():
    assert load_settings(CONFIGS / "local.yaml", {}) == Settings()


def test_production_holds_no_secret_and_no_embedded_server():
    path = CONFIGS / "production.yaml"
    settings = load_settings(path, ENV)
    assert settings.postgres.url
    assert settings.redis.url
    assert settings.ray.address
    assert not settings.models.simulated()
    keys = re.findall(r"api_key: (.*)", path.read_text(encoding="utf-8"))
    assert keys
    assert all(re.fullmatch(r"\$\{\w+\}", key) for key in keys)
