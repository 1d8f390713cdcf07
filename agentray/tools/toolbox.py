"""Put the tools of a process together from the settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from agentray.clock import Clock
from agentray.config.settings import AgentSettings, ToolsSettings
from agentray.errors import ConfigError
from agentray.tools.code import code_tools
from agentray.tools.echo import ECHO
from agentray.tools.egress import Lookup, look_up
from agentray.tools.forward import ForwardProxy
from agentray.tools.functions import load_functions
from agentray.tools.gateway import BreakerLike, Gateway
from agentray.tools.hosts import HostRule, host_rule
from agentray.tools.http_tools import HttpTemplate, host_of, http_tool
from agentray.tools.openapi import openapi_tools, read_document
from agentray.tools.sandbox.base import Serve
from agentray.tools.secrets import Secrets
from agentray.tools.spec import GROUP, Toolbox, ToolSpec
from agentray.tools.sql import SqlTools

__all__ = ["ToolSource", "check_agents", "open_toolbox"]


class ToolSource(Protocol):
    """Where more tools come from."""

    def specs(self) -> Iterable[ToolSpec]: ...

    async def close(self) -> None: ...


async def open_toolbox(
    settings: ToolsSettings,
    *,
    breaker: Callable[[str], BreakerLike],
    clock: Clock,
    share: float = 1.0,
    sources: Sequence[ToolSource] = (),
    lookup: Lookup = look_up,
) -> Toolbox:
    """Return all tools that the settings say, for a host (which looks at them) or a worker (which
    runs them). OpenAPI documents are read, functions' modules imported, and ``sources`` asked;
    hosts and databases are connected to by the first call.

    Close it when its process ends: that closes ``sources`` too. ``breaker`` makes the breaker of a
    host that is called. ``share`` is this process's part of the gateway's rates.

    Raises:
        ConfigError: the settings cannot be used; the message names the key. Nothing stays open.
    """
    secrets = Secrets(settings.secrets)
    closers: list[Callable[[], Awaitable[None]]] = [source.close for source in sources]
    gateways: list[Gateway] = []
    try:
        made = [_http(name, settings, secrets, gateways) for name in settings.http]
        for name, section in settings.openapi.items():
            document = await read_document(section.document, key=f"tools.openapi.{name}.document")
            made += openapi_tools(name, section, document, secrets, lambda: gateways[0])
        gateway = Gateway(
            settings.gateway,
            hosts=_hosts(settings, [template for _, template in made]),
            secrets=secrets,
            breaker=breaker,
            clock=clock,
            share=share,
            lookup=lookup,
        )
        gateways.append(gateway)
        closers.append(gateway.close)
        databases = SqlTools(settings.sql)
        closers.append(databases.close)
        network = _programs_network(settings, gateway, clock)
        specs = [ECHO, *code_tools(settings.code, settings.sandbox, network)]
        specs += load_functions(settings.functions)
        specs += [spec for spec, _ in made]
        specs += databases.specs()
        specs += [spec for source in sources for spec in source.specs()]
        return Toolbox(_unique(specs), closers=closers)
    except BaseException:
        for close in reversed(closers):
            await close()
        raise


def check_agents(
    agents: Mapping[str, AgentSettings], toolbox: Toolbox, late: Iterable[str]
) -> None:
    """See that agents name tools that are there. The tools of the groups ``late`` may come later:
    those of MCP servers.

    Raises:
        ConfigError: one does not; the message names the key.
    """
    groups = tuple(late)
    for name, agent in agents.items():
        for tool in agent.tools:
            group = tool.removesuffix(GROUP) if tool.endswith(GROUP) else tool.partition("__")[0]
            if not toolbox.offered([tool]) and group not in groups:
                known = ", ".join(sorted(toolbox.names))
                problem = f"found the unknown tool {tool!r}; expected one of {known}"
                raise ConfigError(f"agents.{name}.tools: {problem}")


def _http(
    name: str, settings: ToolsSettings, secrets: Secrets, gateways: list[Gateway]
) -> tuple[ToolSpec, HttpTemplate]:
    # The gateway is made when all hosts are known.
    return http_tool(name, settings.http[name], secrets, lambda: gateways[0])


def _hosts(settings: ToolsSettings, templates: Sequence[HttpTemplate]) -> list[HostRule]:
    for key in ("allow", "allow_private"):
        _rules(getattr(settings.gateway, key), key=f"tools.gateway.{key}")
    return list(dict.fromkeys(map(host_of, templates)))


def _rules(texts: Iterable[str], *, key: str) -> list[HostRule]:
    found: list[HostRule] = []
    for text in texts:
        try:
            found.append(host_rule(text))
        except ValueError as error:
            raise ConfigError(f"{key}: found {text!r}; {error}") from error
    return found


def _programs_network(
    settings: ToolsSettings, gateway: Gateway, clock: Clock
) -> Callable[[str, float], Serve] | None:
    rules = _rules(settings.code.hosts, key="tools.code.hosts")
    if not rules:
        return None
    if settings.sandbox.tier == "gvisor":
        problem = "programs in the tier 'gvisor' have no network yet; expected none"
        raise ConfigError(f"tools.code.hosts: {problem}")

    def network(tenant: str, timeout_s: float) -> Serve:
        return ForwardProxy(gateway, rules, gateway.transfer(tenant, timeout_s), clock).serve

    return network


def _unique(specs: Iterable[ToolSpec]) -> list[ToolSpec]:
    found: dict[str, ToolSpec] = {}
    for spec in specs:
        if spec.name in found:
            raise ConfigError(f"tools: two are named {spec.name!r}")
        found[spec.name] = spec
    return list(found.values())
