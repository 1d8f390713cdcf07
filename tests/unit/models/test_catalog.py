"""Names of models."""

import pytest

from agentray.config.settings import ModelsSettings
from agentray.errors import ConfigError, ModelNotFoundError
from agentray.models.catalog import Catalog

SIMULATOR_URL = "http://127.0.0.1:8000/models/simulator/v1"


def settings(**models: object) -> ModelsSettings:
    return ModelsSettings.model_validate(models)


def test_the_first_model_is_the_default_and_the_simulator_comes_last() -> None:
    endpoints = {
        "tiny": {"url": "http://h:1/v1/", "upstream": "org/tiny", "api_key": "sk-123"},
        "big": {"url": "https://h/v1"},
    }
    catalog = Catalog(settings(endpoints=endpoints), SIMULATOR_URL)
    assert catalog.names == ("tiny", "big", "simulator")
    assert catalog.default == "tiny"
    tiny = catalog.resolve("tiny")
    assert (tiny.url, tiny.upstream) == ("http://h:1/v1", "org/tiny")
    assert "sk-123" not in repr(tiny)
    assert catalog.resolve("big").upstream == "big"
    assert catalog.resolve("simulator").url == SIMULATOR_URL
    assert catalog.resolve("simulator").continues_text


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    catalog = Catalog(settings(), SIMULATOR_URL)
    with pytest.raises(ModelNotFoundError, match="'gpt'; the models are simulator"):
        catalog.resolve("gpt")


def test_an_endpoint_of_the_simulators_name_takes_its_place() -> None:
    endpoints = {"simulator": {"url": "http://elsewhere/v1"}}
    catalog = Catalog(settings(endpoints=endpoints), SIMULATOR_URL)
    assert catalog.resolve("simulator").url == "http://elsewhere/v1"


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({}, "no model"),
        ({"endpoints": {"a": {"url": "h:1/v1"}}}, r"models\.endpoints\.a\.url"),
        ({"endpoints": {"a": {"url": "http://[::1/v1"}}}, r"models\.endpoints\.a\.url"),
        ({"endpoints": {"a": {"url": "http://h/v1"}}, "default": "b"}, r"models\.default"),
    ],
)
def test_models_that_cannot_be_used_are_refused(models: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Catalog(settings(**models), None)
