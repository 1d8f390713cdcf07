"""Build the Serve application of the session hosts, and give each replica its door."""

from __future__ import annotations

from typing import Any, cast

from ray import serve
from ray.serve.config import RequestRouterConfig

from agentray.app.address import url
from agentray.app.batches import build_runner
from agentray.config.settings import Settings
from agentray.http import ingress
from agentray.http.app import build_http_app
from agentray.http.door import Admission
from agentray.models.catalog import MODELS_PREFIX
from agentray.sessions.host import DEPLOYMENT, SessionHost
from agentray.sessions.process import OwnerProcess
from agentray.sessions.routing import OwnerRouter, tell_redis_url
from agentray.storage.postgres_batches import RUNNER_CONNECTIONS, PostgresBatches

__all__ = ["build_hosts_app"]


def _open_door(process: OwnerProcess) -> None:
    settings = process.settings
    assert settings.postgres.url is not None
    postgres_url = settings.postgres.url.get_secret_value()
    batches = PostgresBatches(postgres_url, settings.postgres)
    # Connections of its own: no upload holds up what runs.
    work = PostgresBatches(postgres_url, settings.postgres, RUNNER_CONNECTIONS)
    # A call without a session costs a host about what a turn does.
    completions = Admission("calls of models", settings.sessions.max_running_turns)
    app = build_http_app(
        sessions=process.sessions,
        models=process.completions,
        embeddings=process.embeddings,
        files=batches,
        batches=batches,
        catalog=process.catalog,
        settings=settings,
        metrics=process.metrics_page,
        model_health=process.router.health,
        completions=completions,
        open_streams=process.metrics.streams,
        draining=process.stopping,
    )
    ingress.mount(app)
    runner = build_runner(process, app, work, completions)
    process.attach(runner.run(), runner.close, work.close, batches.close)


def build_hosts_app(settings: Settings) -> Any:
    """Return the application of the session hosts, to be served at ``/`` of the cluster that
    this process is connected to."""
    assert settings.redis.url is not None
    tell_redis_url(settings.redis.url.get_secret_value())
    models_url = f"{url(settings.http)}{MODELS_PREFIX}"
    deploy = cast(Any, serve).deployment(
        name=DEPLOYMENT,
        num_replicas=settings.host_count(),
        # Admission is ours: Serve would queue without bound behind its own limit.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=settings.sessions.drain_s + 15,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(
            request_router_class=cast(Any, OwnerRouter),
            request_router_kwargs={"timeout_s": settings.redis.timeout_s},
        ),
    )
    return deploy(SessionHost).bind(settings, models_url, _open_door, ingress.replica_is_draining)
