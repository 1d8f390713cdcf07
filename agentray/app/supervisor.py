"""Start a whole system in order, keep its parts running, and end it without a trace.

This process never imports Ray: a driver dies with its cluster, the supervisor brings it back.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import SecretStr

import agentray
from agentray.app.address import in_url, url
from agentray.app.deploy import HOSTS_APP, TOOLS
from agentray.app.environment import (
    DRAIN_MARGIN_S,
    base_environment,
    find_haproxy,
    find_ports,
    provide_token,
    ray_environment,
    write_shim,
)
from agentray.app.jobs import Job, Progress, dump_settings
from agentray.app.keeper import keep
from agentray.app.layout import Layout
from agentray.app.loading import ModelLoading
from agentray.app.lock import exclusive
from agentray.app.processes import end_processes, owned_processes
from agentray.app.ray_head import RayHead
from agentray.app.report import Report
from agentray.app.stores import Stores, without_password
from agentray.config.program import program
from agentray.config.settings import SIMULATOR, Settings
from agentray.config.state import RunState, remove_state, write_state
from agentray.errors import AgentRayError, ConfigError, NotReadyError

__all__ = ["Supervisor"]

_DEPLOY_S = 300.0
# Until Serve has noticed that it shall stop, and for what follows the drain.
_STOP_MARGIN_S = 20.0
_DOUBLE_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CURL_BODY = """-H 'content-type: application/json' -d '{"input": "hello"}'"""


class Supervisor:
    """One system: its stores, Ray, Serve and the applications on it.

    ``why`` says why its models are these. ``hosts_app`` is the import path of what builds the
    application of the session hosts.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        report: Report,
        why: str = "as configured",
        hosts_app: str = "agentray.app.hosts:build_hosts_app",
    ) -> None:
        self._report = report
        self._why = why
        self._hosts_app = hosts_app
        self._layout = Layout.of(settings.data_dir)
        self._environ: Mapping[str, str] = base_environment(self._layout)
        self._stores = Stores(settings, self._layout, self._environ)
        self._settings = self._resolved(settings)
        self._loading = ModelLoading(
            self._settings, report=report, log_file=self._layout.logs_dir / "models.log"
        )
        cluster = settings.ray.address
        self._head = RayHead(self._settings, self._layout) if cluster is None else None
        self._ray_address = cluster or ""
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._deployer: Job | None = None
        self._deployed = False
        self._started_at = time.time()
        self._stopped_at = 0.0

    async def run(self) -> int:
        """Run the system until a signal ends it; return the exit code.

        SIGINT, SIGTERM and SIGHUP end it in order, a second one at once. Whatever happens, no
        process of the system is left.
        """
        try:
            self._layout.make()
            with exclusive(self._layout.lock_file):
                return await self._run_locked()
        except AgentRayError as error:
            self._report.error(error.message)
            return 1
        finally:
            # A process whose start was cancelled closes its pipes when it is collected: that has
            # to be while the loop still runs.
            gc.collect()

    async def _run_locked(self) -> int:
        self._listen_to_signals()
        # What a killed supervisor left behind would hold ports, sockets and the database.
        await end_processes(owned_processes(self._layout))
        remove_state(self._layout.data_dir)
        self._layout.remove_runtime()
        self._check_port()
        self._layout.prepare()
        _allow_many_files()
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._stop.wait())
        code = 1
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            code = 0
        except (AgentRayError, ExceptionGroup) as error:
            self._report.error(_ours(error).message)
        finally:
            for task in (stop, work):
                task.cancel()
            await asyncio.gather(stop, work, return_exceptions=True)
            await self._shut_down()
            self._ignore_signals()
        self._layout.keep_ray_logs()
        self._layout.remove_runtime()
        if code == 0:
            self._report.info("stopped")
        return code

    async def _work(self) -> None:
        await self._start()
        async with asyncio.TaskGroup() as parts:
            for store in (self._stores.postgres, self._stores.redis):
                if store is not None:
                    parts.create_task(
                        keep(
                            store.name,
                            wait_dead=store.wait_dead,
                            restart=store.start,
                            report=self._report,
                        )
                    )
            if self._head is not None:
                parts.create_task(
                    keep(
                        self._head.name,
                        wait_dead=self._head.wait_dead,
                        restart=self._restart_head,
                        report=self._report,
                    )
                )

    # Starting

    async def _start(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._start_postgres())
            group.create_task(self._start_redis())
            group.create_task(self._start_ray())
        models = self._report.begin("models")
        hosts = self._report.begin("session hosts")
        tools = self._report.begin("tool workers")
        served = [f"{name} (loading)" for name in self._settings.models.serve]
        others = [*self._settings.models.endpoints, *served]
        if not self._settings.models.simulated():
            models(", ".join(others))

        def running(name: str, trouble: str) -> None:
            if name == SIMULATOR:
                models(", ".join([*others, SIMULATOR]))
            elif name == HOSTS_APP:
                hosts(str(self._settings.host_count()))
            elif name == TOOLS:
                workers = self._settings.tools.workers
                tools(f"{workers.min or 1} to {workers.max}, with {workers.slots} slots each")
                if trouble:
                    self._report.warn(f"{trouble} (`agentray doctor` says more)")

        await self._deploy(running)
        self._note(ready=True)
        self._say_ready()
        self._loading.begin(self._ray_address, self._environ)

    async def _start_postgres(self) -> None:
        done = self._report.begin("PostgreSQL")
        done(await self._stores.start_postgres())

    async def _start_redis(self) -> None:
        done = self._report.begin("Redis")
        done(await self._stores.start_redis())

    async def _start_ray(self) -> None:
        done = self._report.begin("Ray")
        if self._head is None:
            self._deployer = await self._job()
            done(f"the cluster at {self._ray_address}")
        else:
            write_shim(self._layout)
            await self._start_head(self._head)
            done(self._ray_address)

    async def _start_head(self, head: RayHead) -> None:
        ports = find_ports(self._layout)
        self._environ = {
            **base_environment(self._layout),
            **ray_environment(
                self._settings, self._layout, ports, haproxy=find_haproxy(), alone=True
            ),
            **provide_token(),
        }
        # It imports Ray while Ray starts.
        self._deployer = await self._job()
        await head.start(ports, self._environ)
        self._ray_address = head.address

    async def _restart_head(self) -> None:
        assert self._head is not None
        self._deployed = False
        self._note(ready=False)
        await self._loading.end()
        if self._deployer is not None:
            await self._deployer.close()
        await self._head.stop()
        await self._stores.forget_hosts()
        await self._start_head(self._head)
        await self._deploy(lambda name, trouble: None)
        self._note(ready=True)
        self._loading.begin(self._ray_address, self._environ)

    async def _deploy(self, running: Progress) -> None:
        assert self._deployer is not None
        task = {
            "do": "deploy",
            "address": self._ray_address,
            "settings": dump_settings(self._settings),
            "hosts_app": self._hosts_app,
            "alone": self._head is not None,
        }
        job = asyncio.create_task(self._deployer.run(task, timeout_s=_DEPLOY_S, progress=running))
        death = asyncio.create_task(self._head_dead())
        try:
            await asyncio.wait({job, death}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise NotReadyError(f"Ray died while the applications started: {death.result()}")
            await job
            self._deployed = True
        finally:
            await _end_tasks(job, death)
            await self._deployer.close()

    async def _job(self) -> Job:
        return await Job.prepare(self._environ, self._layout.logs_dir / "deploy.log")

    async def _head_dead(self) -> str:
        """Return how Ray's head died; never, if it is not ours to watch."""
        if self._head is None:
            await asyncio.Event().wait()
        assert self._head is not None
        return await self._head.wait_dead()

    # Ending

    async def _shut_down(self) -> None:
        self._report.quiet()
        await self._loading.end()
        if self._deployed and not self._hurry.is_set():
            self._report.info("stopping: running turns are finished or handed over; again: at once")
            await self._drain()
        hurry = self._hurry.is_set()
        if self._deployer is not None:
            await self._deployer.close()
        if self._head is not None:
            await self._head.stop()
        await self._stores.stop(hurry=hurry)
        await end_processes(owned_processes(self._layout))
        remove_state(self._layout.data_dir)

    async def _drain(self) -> None:
        """Take the session hosts and the dedicated sessions off; return when they have drained, or
        at a second signal."""
        drain_s = self._settings.sessions.drain_s
        timeout_s = drain_s + DRAIN_MARGIN_S + _STOP_MARGIN_S
        stopper = await self._job()
        task = {
            "do": "stop",
            "address": self._ray_address,
            "drain_s": drain_s,
            "models": list(self._settings.models.serve),
            "alone": self._head is not None,
        }
        job = asyncio.create_task(stopper.run(task, timeout_s=timeout_s))
        hurry = asyncio.create_task(self._hurry.wait())
        death = asyncio.create_task(self._head_dead())
        await asyncio.wait({job, hurry, death}, return_when=asyncio.FIRST_COMPLETED)
        try:
            if job.done():
                await job
        except AgentRayError as error:
            self._report.warn(error.message)
        finally:
            await _end_tasks(job, hurry, death)
            await stopper.close()

    # Smaller things

    def _resolved(self, settings: Settings) -> Settings:
        """Return the settings with the addresses of what runs here filled in."""
        stores = {
            "postgres": settings.postgres.model_copy(
                update={"url": SecretStr(self._stores.postgres_url)}
            ),
            "redis": settings.redis.model_copy(update={"url": SecretStr(self._stores.redis_url)}),
        }
        return settings.model_copy(update={"data_dir": str(self._layout.data_dir), **stores})

    def _check_port(self) -> None:
        host, port = self._settings.http.host, self._settings.http.port
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As HAProxy does: connections of a past listener are no hindrance.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {in_url(host)}:{port}: {error.strerror}; choose another --port"
            ) from error

    def _listen_to_signals(self) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)

    def _ignore_signals(self) -> None:
        # All is done: the impatient shall not see a traceback.
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _signalled(self) -> None:
        now = time.monotonic()
        # Whoever signals a group as well as its leader means one signal.
        if self._stop.is_set() and now - self._stopped_at > _DOUBLE_S:
            self._hurry.set()
        if not self._stop.is_set():
            self._stopped_at = now
            self._stop.set()

    def _note(self, *, ready: bool) -> None:
        write_state(
            self._layout.data_dir,
            RunState(
                pid=os.getpid(),
                version=agentray.__version__,
                started_at=self._started_at,
                ready=ready,
                url=url(self._settings.http),
                ray_address=self._ray_address,
                postgres=without_password(self._stores.postgres_url),
                redis=without_password(self._stores.redis_url),
                models=list(self._settings.models.names()),
                hosts=self._settings.host_count(),
            ),
        )

    def _say_ready(self) -> None:
        models = self._settings.models
        default = models.default or models.names()[0]
        here, agentray_here = url(self._settings.http), program()
        default_dir = type(self._settings).model_fields["data_dir"].default
        default_dir = Path(default_dir).expanduser().resolve()
        elsewhere = "" if self._layout.data_dir == default_dir else f" --url {here}"
        self._report.ready(
            here,
            [
                f"model   {default}: {self._why}",
                f"others  {agentray_here} up --model NAME=URL, or --model SOURCE to serve one",
                f"talk    {agentray_here} chat{elsewhere}",
                f"curl    curl {here}/v1/responses {_CURL_BODY}",
                f'openai  OpenAI(base_url="{here}/v1", api_key="none")',
                f"logs    {self._layout.logs_dir}",
                "stop    Ctrl-C",
            ],
        )


async def _end_tasks(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _allow_many_files() -> None:
    # Every stream is a connection or two, in each process that it goes through.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 20 if most == resource.RLIM_INFINITY else min(most, 1 << 20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _ours(error: Exception) -> AgentRayError:
    """Return the first error of ours in a group of such; anything else is raised."""
    while isinstance(error, ExceptionGroup):
        errors = cast("ExceptionGroup[Exception]", error).exceptions
        foreign = [inner for inner in errors if not isinstance(inner, AgentRayError)]
        error = (foreign or list(errors))[0]
    if not isinstance(error, AgentRayError):
        raise error
    return error
