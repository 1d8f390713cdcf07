"""Serve models with vLLM, each in a ``ray.serve.llm`` application, and know how each one is.

``ray.serve.llm`` and vLLM are imported inside functions alone: session hosts and the supervisor
have neither.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentray.config.settings import ModelsSettings, ServedModelSettings
from agentray.errors import ModelError
from agentray.models.base import ModelHealth
from agentray.models.catalog import MODELS_PREFIX
from agentray.telemetry.logging import get_logger

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = [
    "FAILED_STATUSES",
    "AppReport",
    "ServedModels",
    "app_name",
    "build_failed_app",
    "build_served_app",
    "config_fields",
    "explain",
    "health_of",
    "root_cause",
    "route_prefix",
    "serve_reports",
]

log = get_logger(__name__)

_ROUTERS = {
    "session": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    "prefix": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
    "kv": "ray.serve.llm.request_router.KVAwareRouter",
}
# The deployment in an application of ray.serve.llm that picks replicas, and is none.
_PICKER = "LLMRouter"
FAILED_STATUSES = ("DEPLOY_FAILED", "UNHEALTHY")
"""What Serve calls an application whose replicas do not start, or no longer answer."""

_POLL_S = 2.0
_CPU_NICENESS = 10
_REASON_CHARS = 500
_LOG_TAIL_BYTES = 256 * 1024

_ERROR_LINE = re.compile(r"(?:^|[\])] |\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): \S.*)$")
# What vLLM says of an engine that died in a process of its own, whose log has the reason.
_SEE_ABOVE = re.compile(r"root cause above|Engine core initialization failed|EngineDeadError")


def app_name(model: str) -> str:
    """Return the name of a model's Serve application."""
    return f"model-{model}"


def route_prefix(model: str) -> str:
    """Return the route that a model's Serve application is at; its API is at ``/v1`` below."""
    return f"{MODELS_PREFIX}/{model}"


# Building


def config_fields(name: str, served: ServedModelSettings, *, drain_s: float) -> dict[str, Any]:
    """Return the fields of Ray's ``LLMConfig`` for a model, ``extra`` laid over ours.

    Tensor parallelism becomes a placement group with a bundle for each accelerator. ``drain_s``
    is how long calls may go on in a replica that is stopped.
    """
    engine: dict[str, Any] = {
        "tensor_parallel_size": served.tensor_parallel,
        # What a session's turns have in common is charged at the price of cached tokens.
        "enable_prompt_tokens_details": True,
    }
    if served.card.kind == "chat" and served.card.tools:
        # Without a parser vLLM refuses calls that offer tools.
        engine |= {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    fields: dict[str, Any] = {
        "model_loading_config": {"model_id": name, "model_source": served.source},
        "engine_kwargs": engine | served.engine,
        "deployment_config": {
            "autoscaling_config": {
                "min_replicas": served.min_replicas,
                "max_replicas": served.max_replicas,
                "target_ongoing_requests": served.target_ongoing_requests,
                "upscale_delay_s": served.upscale_delay_s,
                "downscale_delay_s": served.downscale_delay_s,
            },
            "max_ongoing_requests": served.max_ongoing_requests,
            "graceful_shutdown_timeout_s": drain_s,
            "request_router_config": {"request_router_class": _ROUTERS[served.affinity]},
        },
    }
    if served.accelerator == "cpu":
        fields["accelerator_config"] = {"kind": "cpu"}
    elif served.accelerator is not None:
        fields["accelerator_type"] = served.accelerator
    return _merged(fields, served.extra)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            sections = cast("tuple[Mapping[str, Any], Mapping[str, Any]]", (below, value))
            merged[key] = _merged(*sections)
        else:
            merged[key] = value
    return merged


def build_served_app(name: str, served: ServedModelSettings, *, drain_s: float) -> Application:
    """Return the Serve application of a model, to be served at :func:`route_prefix`.

    Raises whatever ``ray.serve.llm`` and vLLM do of options that they do not know, and
    ``ImportError`` where they are not installed.
    """
    # Ray's types are incomplete.
    llm: Any = import_module("ray.serve.llm")
    server = _server_class(on_cpu=served.accelerator == "cpu")
    config = llm.LLMConfig(**config_fields(name, served, drain_s=drain_s), server_cls=server)
    return llm.build_openai_app({"llm_configs": [config]})


def _server_class(*, on_cpu: bool) -> Any:
    """Return Ray's server with two changes.

    If its start fails, it tells the reason in one line: vLLM's engine is a process of its own, and
    of its failure Serve would only hear that there was one. On the CPU it leaves the cores to
    everything else first.
    """
    base: Any = import_module("ray.serve.llm.deployment").LLMServer

    # The name is shown by Serve, as Ray's own would be.
    class LLMServer(base):
        async def start(self) -> None:
            if on_cpu:
                # Of this thread and all that it starts, the engine first of all: owners of sessions
                # have to say in time that they live.
                os.nice(_CPU_NICENESS)
            # The engine inherits them, and writes its traceback to either.
            logs = [Path("/proc/self/fd/1"), Path("/proc/self/fd/2")]
            began = [_size(log) for log in logs]
            try:
                await base.start(self)
            except Exception as error:
                reason = explain(error)
                if _SEE_ABOVE.search(reason):
                    said = [_text(*log) for log in zip(logs, began, strict=True)]
                    reason = root_cause("\n".join(said)) or reason
                raise ModelError(reason) from error

    return LLMServer


def build_failed_app(name: str, reason: str) -> Application:
    """Return an application in place of a model that could not be built: whoever asks Serve how
    the model is hears the reason, as of one that does not start."""
    serve: Any = import_module("ray.serve")

    class Unbuilt:
        def __init__(self) -> None:
            raise ModelError(reason)

    deployment = serve.deployment(
        Unbuilt, name=f"Unbuilt:{name}", ray_actor_options={"num_cpus": 0}
    )
    return deployment.bind()


# Why a model does not load


def explain(error: BaseException) -> str:
    """Return the one line of an error that says the most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else "no reason given"
    if re.match(r"\d+ validation errors? for ", said) and len(lines) > 1:
        # pydantic's: the field on a line of its own or not, then what is wrong with it.
        said = next((line for line in lines[1:] if " [type=" in line), lines[1])
        said = said.split(" [type=")[0].removeprefix("Value error, ")
    return f"{type(error).__name__}: {said}"[:_REASON_CHARS]


def root_cause(text: str) -> str | None:
    """Return the last error in the log of vLLM's processes that is not about another one."""
    for line in reversed(text.splitlines()):
        found = _ERROR_LINE.search(line.rstrip())
        if found and not _SEE_ABOVE.search(line):
            return found[1].split(" [type=")[0][:_REASON_CHARS]
    return None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _text(file: Path, began: int) -> str:
    """Return what was written to a log since it had this size; of much, the end."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(began, _size(file) - _LOG_TAIL_BYTES))
            return opened.read().decode(errors="replace")
    except OSError:
        return ""


# How the models are


@dataclass(frozen=True, slots=True)
class AppReport:
    """What Serve says of an application: its status, how many replicas answer, its messages."""

    status: str
    running: int
    messages: tuple[str, ...] = ()


def serve_reports() -> dict[str, AppReport]:
    """Ask Serve for all applications, by their names. It blocks; empty if Serve does not run."""
    serve: Any = import_module("ray.serve")
    return {
        name: AppReport(
            status=str(app.status.value),
            running=sum(
                count
                for deployment, found in app.deployments.items()
                if deployment != _PICKER
                for state, count in found.replica_states.items()
                if state == "RUNNING"
            ),
            messages=(app.message, *(found.message for found in app.deployments.values())),
        )
        for name, app in serve.status().applications.items()
    }


def health_of(report: AppReport | None, *, on_demand: bool) -> ModelHealth:
    """Return what a report means for calls to the model.

    A model that starts ``on_demand`` is healthy without replicas: a call brings one.
    """
    if report is None:
        return ModelHealth(False, "it is not deployed yet")
    if report.running:
        return ModelHealth(True)
    cause = _cause(report.messages)
    if report.status in FAILED_STATUSES:
        return ModelHealth(False, f"it does not load: {cause or 'no reason given'}")
    if cause is not None:
        return ModelHealth(False, f"it is loading again, the last try failed: {cause}")
    if on_demand and report.status == "RUNNING":
        return ModelHealth(True, "it has no replica until it is called")
    # What Serve waits for, e.g. an accelerator that the cluster does not have.
    waits = next((text.strip() for text in report.messages if text.strip()), "")
    told = " ".join(waits.split())[:_REASON_CHARS]
    return ModelHealth(False, f"it is loading: {told}" if told else "it is loading")


def _cause(messages: Sequence[str]) -> str | None:
    """Return the last line of the error that Serve quotes, if it quotes one."""
    for message in messages:
        _, found, error = message.partition("Error:\n")
        lines = [line.strip() for line in error.splitlines() if line.strip()]
        if found and lines:
            # Ours has been put into one line already, with its own kind in front.
            return lines[-1].removeprefix("agentray.errors.ModelError: ")[:_REASON_CHARS]
    return None


class ServedModels:
    """Knows how the models are that agentray serves, for the router and for ``/readyz``.

    ``reports`` asks Serve; it is called in a thread, one call at a time. While Serve's controller
    is away, what was last heard counts: replicas go on without it.
    """

    def __init__(
        self,
        settings: ModelsSettings,
        *,
        reports: Callable[[], Mapping[str, AppReport]] = serve_reports,
        poll_s: float = _POLL_S,
    ) -> None:
        self._on_demand = {
            name: served.min_replicas == 0 for name, served in settings.serve.items()
        }
        self._reports = reports
        self._poll_s = poll_s
        self._health = {name: health_of(None, on_demand=False) for name in settings.serve}

    def health(self, name: str) -> ModelHealth:
        """Return the health of a model; one that agentray does not serve is healthy here."""
        return self._health.get(name) or ModelHealth(True)

    async def run(self) -> None:
        """Keep looking, for ever; return at once if there is no model to look at."""
        while self._health:
            await self.look()
            await asyncio.sleep(self._poll_s)

    async def look(self) -> None:
        """Ask Serve once."""
        try:
            reports = await asyncio.to_thread(self._reports)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises: they are as they were
            log.warning("serve_status_failed", error=type(error).__name__)
            return
        for name, before in self._health.items():
            now = health_of(reports.get(app_name(name)), on_demand=self._on_demand[name])
            if now != before:
                say = log.info if now.healthy else log.warning
                say("model_health_changed", model=name, healthy=now.healthy, reason=now.reason)
                self._health[name] = now
