"""The agents that sessions run: names, instructions, models and tools."""

from __future__ import annotations

from collections.abc import Mapping

from agentray.config.settings import AgentSettings
from agentray.errors import InvalidRequestError

__all__ = ["Agents"]


class Agents:
    """The configured agents; the first one is the default."""

    def __init__(self, settings: Mapping[str, AgentSettings]) -> None:
        self._settings = dict(settings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._settings)

    @property
    def default(self) -> str:
        return next(iter(self._settings))

    def get(self, name: str) -> AgentSettings:
        """Return an agent's settings.

        Raises:
            InvalidRequestError: there is no such agent.
        """
        found = self._settings.get(name)
        if found is None:
            known = ", ".join(self._settings)
            raise InvalidRequestError(
                f"unknown agent {name[:80]!r}; there are: {known}", param="agent"
            )
        return found
