"""Know every model by its name: where it is served, and what it is called there."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import SecretStr

from agentray.config.settings import ModelsSettings
from agentray.errors import ConfigError, ModelNotFoundError

__all__ = ["SIMULATOR_MODEL", "Catalog", "Endpoint"]

SIMULATOR_MODEL = "simulator"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is served. ``url`` ends in its ``/v1``, without a slash behind it."""

    name: str
    url: str
    upstream: str
    api_key: SecretStr | None = None
    continues_text: bool = False


class Catalog:
    """The models of the configuration, and the simulator if it is served at ``simulator_url``.

    An endpoint that is configured under the simulator's name takes its place.

    Raises:
        ConfigError: no model at all, a default that is none of them, or a URL that is none.
    """

    def __init__(self, settings: ModelsSettings, simulator_url: str | None) -> None:
        endpoints = {
            name: Endpoint(
                name=name,
                url=_checked_url(name, endpoint.url),
                upstream=endpoint.upstream or name,
                api_key=endpoint.api_key,
                continues_text=endpoint.continues_text,
            )
            for name, endpoint in settings.endpoints.items()
        }
        if simulator_url is not None and SIMULATOR_MODEL not in endpoints:
            endpoints[SIMULATOR_MODEL] = Endpoint(
                name=SIMULATOR_MODEL,
                url=_checked_url(SIMULATOR_MODEL, simulator_url),
                upstream=SIMULATOR_MODEL,
                continues_text=True,
            )
        if not endpoints:
            raise ConfigError(
                "no model: expected one in models.endpoints, or models.simulator.enabled: true"
            )
        self._endpoints = endpoints
        self.default: str = settings.default or next(iter(endpoints))
        if self.default not in endpoints:
            raise ConfigError(
                f"models.default is {self.default!r}: expected one of {', '.join(endpoints)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models, as configured."""
        return tuple(self._endpoints)

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
