"""Know every model by its name: where it is served, what it can do and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from pydantic import SecretStr

from agentray.config.settings import CardSettings, ModelsSettings, PriceSettings
from agentray.errors import ConfigError, ModelNotFoundError
from agentray.events import Usage

__all__ = ["MODELS_PREFIX", "SIMULATOR_MODEL", "Catalog", "Endpoint", "cost"]

SIMULATOR_MODEL = "simulator"
MODELS_PREFIX = "/models"
"""The route below which agentray serves models, each under its name."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is served. ``url`` ends in its ``/v1``, without a slash behind it.

    ``served`` says that agentray serves it, as an application of its own.
    """

    name: str
    url: str
    upstream: str
    api_key: SecretStr | None = None
    continues_text: bool = False
    served: bool = False
    card: CardSettings = field(default_factory=CardSettings)


def cost(price: PriceSettings, usage: Usage, seconds: float) -> float:
    """Return what a call costs, in US dollars; ``seconds`` is how long it took.

    Tokens that the model had in its cache cost what cached ones do.
    """
    cached = price.input if price.cached_input is None else price.cached_input
    fresh_tokens = usage.input_tokens - usage.cached_tokens
    tokens = (
        fresh_tokens * price.input
        + usage.cached_tokens * cached
        + usage.output_tokens * price.output
    )
    return tokens / 1e6 + seconds * price.gpu_second


class Catalog:
    """The models of the configuration, in the order of preference.

    Those that agentray serves, the simulator among them, are each below ``served_url``, an
    address without a slash at its end: at ``/<name>/v1``.

    Raises:
        ConfigError: no model at all, a default that is none of them, or a URL that is none.
    """

    def __init__(self, settings: ModelsSettings, served_url: str) -> None:
        endpoints = {
            name: Endpoint(
                name=name,
                url=_checked_url(name, endpoint.url),
                upstream=endpoint.upstream or name,
                api_key=endpoint.api_key,
                continues_text=endpoint.continues_text,
                card=endpoint.card,
            )
            for name, endpoint in settings.endpoints.items()
        }
        for name, served in settings.serve.items():
            endpoints[name] = _served(name, served_url, served.continues_text, served.card)
        if settings.simulated():
            card = settings.card(SIMULATOR_MODEL)
            endpoints[SIMULATOR_MODEL] = _served(SIMULATOR_MODEL, served_url, True, card)
        if not endpoints:
            raise ConfigError(
                "no model: expected one in models.endpoints or models.serve, "
                "or models.simulator.enabled: true"
            )
        self._endpoints = endpoints
        self.default: str | None = settings.default
        """The model of those who name none; the router picks if there is no such model."""
        if self.default is not None and self.default not in endpoints:
            raise ConfigError(
                f"models.default is {self.default!r}: expected one of {', '.join(endpoints)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models, as configured."""
        return tuple(self._endpoints)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All models, the preferred ones first."""
        return tuple(self._endpoints.values())

    def kind(self, name: str) -> Literal["chat", "embedding"]:
        """Return what a model answers with. Raises ``ModelNotFoundError``."""
        return self.resolve(name).card.kind

    def resolve(self, name: str) -> Endpoint:
        """Return where a model is served.

        Raises:
            ModelNotFoundError: there is no such model; the message lists those that there are.
        """
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            shown = name if len(name) <= 80 else name[:80] + "…"
            raise ModelNotFoundError(
                f"there is no model {shown!r}; the models are {', '.join(self._endpoints)}",
                model=shown,
            )
        return endpoint


def _served(name: str, served_url: str, continues_text: bool, card: CardSettings) -> Endpoint:
    return Endpoint(
        name=name,
        url=f"{served_url}/{name}/v1",
        upstream=name,
        continues_text=continues_text,
        served=True,
        card=card,
    )


def _checked_url(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        valid = False
    if not valid:
        # The URL itself is not shown: it may carry a password.
        raise ConfigError(
            f"models.endpoints.{name}.url: expected an address such as http://127.0.0.1:8001/v1"
        )
    return url.rstrip("/")
