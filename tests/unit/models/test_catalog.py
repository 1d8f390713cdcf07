"""Models by their names: where they are, what they can, what they cost."""

import pytest

from agentray.config.settings import ModelsSettings, PriceSettings
from agentray.errors import ConfigError, ModelNotFoundError
from agentray.events import Usage
from agentray.models.catalog import Catalog, cost

SERVED_URL = "http://127.0.0.1:8000/models"


def settings(**models: object) -> ModelsSettings:
    return ModelsSettings.model_validate(models)


def test_models_come_in_the_order_of_preference_and_the_simulator_last() -> None:
    endpoints = {
        "tiny": {"url": "http://h:1/v1/", "upstream": "org/tiny", "api_key": "sk-123"},
        "big": {"url": "https://h/v1"},
    }
    models = settings(
        endpoints=endpoints, serve={"own": {"source": "o/own"}}, simulator={"enabled": True}
    )
    catalog = Catalog(models, SERVED_URL)
    assert catalog.names == ("tiny", "big", "own", "simulator")
    assert catalog.default is None
    tiny = catalog.resolve("tiny")
    assert (tiny.url, tiny.upstream) == ("http://h:1/v1", "org/tiny")
    assert "sk-123" not in repr(tiny)
    assert catalog.resolve("big").upstream == "big"
    assert catalog.resolve("own").url == f"{SERVED_URL}/own/v1"
    assert catalog.resolve("simulator").url == f"{SERVED_URL}/simulator/v1"
    assert [endpoint.served for endpoint in catalog.endpoints] == [False, False, True, True]


def test_the_card_of_the_simulator_is_its_profile() -> None:
    catalog = Catalog(settings(simulator={"context_window": 77}), SERVED_URL)
    assert catalog.resolve("simulator").card.context_window == 77


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    catalog = Catalog(settings(), SERVED_URL)
    with pytest.raises(ModelNotFoundError, match="'gpt'; the models are simulator"):
        catalog.resolve("gpt")


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"simulator": {"enabled": False}}, "no model"),
        ({"endpoints": {"a": {"url": "h:1/v1"}}}, r"models\.endpoints\.a\.url"),
        ({"endpoints": {"a": {"url": "http://[::1/v1"}}}, r"models\.endpoints\.a\.url"),
        ({"endpoints": {"a": {"url": "http://h/v1"}}, "default": "b"}, r"models\.default"),
    ],
)
def test_models_that_cannot_be_used_are_refused(models: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Catalog(settings(**models), SERVED_URL)


@pytest.mark.parametrize(
    ("price", "dollars"),
    [
        ({"input": 1.0, "output": 4.0}, 1.0 + 2.0),
        ({"input": 1.0, "cached_input": 0.1, "output": 4.0}, 0.6 + 0.04 + 2.0),
        ({"gpu_second": 0.5}, 1.5),
        ({}, 0.0),
    ],
)
def test_cached_tokens_cost_what_cached_ones_do(price: dict[str, float], dollars: float) -> None:
    usage = Usage(input_tokens=1_000_000, output_tokens=500_000, cached_tokens=400_000)
    assert cost(PriceSettings(**price), usage, seconds=3.0) == pytest.approx(dollars)
