"""The tools that run a model's own code: ``python`` and ``shell``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from agentray.config.tool_settings import CodeSettings, SandboxSettings
from agentray.tools.sandbox.base import Limits, Outcome, PythonCode, Serve, ShellScript, Tier
from agentray.tools.spec import ToolSpec

__all__ = ["ceiling", "code_tools", "limits_of", "printed"]

_WHERE = (
    "It runs in a sandbox {network}. Its working directory is empty at first and is kept "
    "for later calls. What it prints comes back, so print what you want to see. It may take "
    "{wall_s:g} s and {memory} MiB of memory."
)


_PROXIED = (
    "whose only network is the proxy that http_proxy and https_proxy name; it leads to {hosts} and "
    "nowhere else"
)


def code_tools(
    code: CodeSettings,
    sandbox: SandboxSettings,
    network: Callable[[str, float], Serve] | None = None,
) -> tuple[ToolSpec, ToolSpec]:
    """Return ``python`` and ``shell``, with the way to the hosts of the settings; see ``ToolSpec``.

    A call whose worker died is reported and not run again: what the code did is anybody's guess.
    """
    limits = limits_of(code)
    proxied = _PROXIED.format(hosts=", ".join(code.hosts)) if code.hosts else "without network"
    where = _WHERE.format(
        network=proxied, wall_s=code.wall_s, memory=code.memory_bytes // (1024 * 1024)
    )
    python = ToolSpec(
        name="python",
        description=f"Runs Python code as a program of its own. {where}",
        parameters=_one_text("code", "The program."),
        program=lambda arguments: PythonCode(arguments["code"]),
        # The sandbox ends it first, and brings what was printed until then.
        timeout_s=code.wall_s + 5,
        tier=sandbox.tier,
        limits=limits,
        keeps_scratch=True,
        network=network,
    )
    shell = ToolSpec(
        name="shell",
        description=f"Runs a script with /bin/sh. {where}",
        parameters=_one_text("script", "The script."),
        program=lambda arguments: ShellScript(arguments["script"]),
        timeout_s=code.wall_s + 5,
        tier=sandbox.tier,
        limits=limits,
        keeps_scratch=True,
        network=network,
    )
    return python, shell


def limits_of(code: CodeSettings) -> Limits:
    """Return the limits that the settings say."""
    return Limits(
        wall_s=code.wall_s,
        cpu_s=code.cpu_s,
        memory_bytes=code.memory_bytes,
        pids=code.pids,
        scratch_bytes=code.scratch_bytes,
        scratch_files=code.scratch_files,
        output_bytes=code.output_bytes,
    )


def ceiling(specs: Iterable[ToolSpec], tier: Tier) -> Limits:
    """Return the most that any tool of a tier may use: what its sandboxes have to allow."""
    found = Limits()
    for spec in specs:
        if spec.program is not None and spec.tier == tier:
            fields = Limits.__struct_fields__
            found = Limits(**{f: max(getattr(found, f), getattr(spec.limits, f)) for f in fields})
    return found


def printed(outcome: Outcome, limits: Limits) -> str:
    """Return what the model is told of a program's end: why it ended, if not by itself and well,
    then what it printed."""
    out = outcome.stdout.decode(errors="replace").rstrip("\n")
    err = outcome.stderr.decode(errors="replace").rstrip("\n")
    parts = [out] if out else []
    if err:
        parts.append(f"[stderr]\n{err}")
    if outcome.truncated:
        parts.append(f"[cut here: it printed more than {limits.output_bytes} bytes]")
    text = "\n".join(parts)
    ended = _ended(outcome, limits)
    if not ended:
        return text or "(it printed nothing)"
    so_far = "output" if outcome.reason in ("exit", "signal") else "output so far"
    return f"[{ended}; {so_far}:]\n{text}" if text else f"[{ended}; it printed nothing]"


def _ended(outcome: Outcome, limits: Limits) -> str:
    mebibytes = limits.memory_bytes // (1024 * 1024)
    match outcome.reason:
        case "ok":
            return ""
        case "exit":
            return f"exit code {outcome.exit_code}"
        case "signal":
            return f"killed by signal {outcome.signal}"
        case "timeout":
            return f"killed after {limits.wall_s:g} s"
        case "cpu":
            return f"killed after {limits.cpu_s:g} s of CPU time"
        case "memory":
            return f"killed because it needed more than {mebibytes} MiB of memory"
        case "output":
            return f"killed because it printed more than {limits.output_bytes} bytes"
        case "scratch":
            return (
                f"its files are more than {limits.scratch_bytes} bytes or too many: {outcome.error}"
            )
        case "failed":
            return f"the sandbox failed: {outcome.error or 'it did not say why'}"


def _one_text(name: str, description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": description}},
        "required": [name],
        "additionalProperties": False,
    }
