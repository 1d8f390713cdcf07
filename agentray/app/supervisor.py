"""Start a whole system in order, keep its parts running, and end it without a trace.

This process never imports Ray: a driver dies with its cluster, the supervisor brings it back.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pydantic import SecretStr

import agentray
from agentray.app.address import in_url, url
from agentray.app.environment import (
    DRAIN_MARGIN_S,
    base_environment,
    find_haproxy,
    find_ports,
    provide_token,
    ray_environment,
)
from agentray.app.jobs import dump_settings, run_job
from agentray.app.keeper import keep
from agentray.app.layout import Layout
from agentray.app.lock import exclusive
from agentray.app.processes import end_processes, owned_processes
from agentray.app.ray_head import RayHead
from agentray.app.report import Report
from agentray.app.stores import Stores, without_password
from agentray.config.settings import Settings
from agentray.config.state import RunState, remove_state, write_state
from agentray.errors import AgentRayError, ConfigError, NotReadyError
from agentray.http import haproxy

__all__ = ["Supervisor"]

_LOOPBACK = "127.0.0.1"
_DEPLOY_S = 300.0
_CURL_BODY = """-H 'content-type: application/json' -d '{"input": "hello"}'"""


class Supervisor:
    """One system: its stores, Ray, Serve and the applications on it."""

    def __init__(
        self,
        settings: Settings,
        *,
        report: Report,
        hosts_app: str = "agentray.app.hosts:build_hosts_app",
    ) -> None:
        self._report = report
        self._hosts_app = hosts_app
        self._layout = Layout.of(settings.data_dir)
        self._environ: Mapping[str, str] = base_environment(self._layout)
        self._stores = Stores(settings, self._layout, self._environ)
        self._settings = self._resolved(settings)
        self._head = RayHead(self._settings, self._layout)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._deployed = False
        self._started_at = time.time()

    async def run(self) -> int:
        """Run the system until it is told to stop; return the exit code."""
        try:
            self._layout.make()
            with exclusive(self._layout.lock_file):
                return await self._run_locked()
        except AgentRayError as error:
            self._report.error(error.message)
            return 1

    async def _run_locked(self) -> int:
        self._listen_to_signals()
        # What a killed supervisor left behind would hold ports, sockets and the database.
        await end_processes(owned_processes(self._layout), grace_s=0)
        remove_state(self._layout.data_dir)
        self._check_port()
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            return 0
        except (AgentRayError, ExceptionGroup) as error:
            self._report.error(_ours(error).message)
            return 1
        finally:
            for task in (stop, work):
                task.cancel()
            await asyncio.gather(stop, work, return_exceptions=True)
            await self._shut_down()

    async def _work(self) -> None:
        await self._start()
        async with asyncio.TaskGroup() as parts:
            for store, restart in (
                (self._stores.postgres, self._restart_postgres),
                (self._stores.redis, self._restart_redis),
            ):
                if store is not None:
                    parts.create_task(
                        keep(
                            store.name,
                            wait_dead=store.wait_dead,
                            restart=restart,
                            report=self._report,
                        )
                    )
            parts.create_task(
                keep(
                    self._head.name,
                    wait_dead=self._head_dead,
                    restart=self._start_ray_again,
                    report=self._report,
                )
            )

    # Starting

    async def _start(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._start_postgres())
            group.create_task(self._start_redis())
            group.create_task(self._start_ray())
        with self._report.step("applications") as detail:
            await self._deploy()
            detail(f"{self._settings.host_count()} session hosts")
        self._note(ready=True)
        self._say_ready()

    async def _start_postgres(self) -> None:
        with self._report.step("PostgreSQL") as detail:
            detail(await self._stores.start_postgres())

    async def _start_redis(self) -> None:
        with self._report.step("Redis") as detail:
            detail(await self._stores.start_redis())

    async def _start_ray(self) -> None:
        with self._report.step("Ray") as detail:
            program = find_haproxy()
            self._write_shim()
            ports = find_ports(_LOOPBACK, self._layout)
            self._environ = {
                **ray_environment(self._settings, self._layout, ports, haproxy=program),
                **provide_token(),
            }
            await self._head.start(ports, self._environ)
            detail(self._head.address)

    async def _start_ray_again(self) -> None:
        self._deployed = False
        self._note(ready=False)
        await self._head.stop()
        await self._stores.forget_hosts()
        ports = find_ports(_LOOPBACK, self._layout)
        self._environ = {
            **ray_environment(self._settings, self._layout, ports, haproxy=find_haproxy()),
            **provide_token(),
        }
        await self._head.start(ports, self._environ)
        await self._deploy()
        self._note(ready=True)

    async def _deploy(self) -> None:
        job = asyncio.create_task(
            run_job(
                {
                    "do": "deploy",
                    "address": self._head.address,
                    "settings": dump_settings(self._settings),
                    "hosts_app": self._hosts_app,
                },
                environ=self._environ,
                log_file=self._layout.logs_dir / "deploy.log",
                timeout_s=_DEPLOY_S,
            )
        )
        death = asyncio.create_task(self._head.wait_dead())
        try:
            await asyncio.wait({job, death}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise NotReadyError(f"Ray died while the applications started: {death.result()}")
            await job
            self._deployed = True
        finally:
            for task in (job, death):
                task.cancel()
            await asyncio.gather(job, death, return_exceptions=True)

    async def _restart_postgres(self) -> None:
        assert self._stores.postgres is not None
        await self._stores.postgres.start()

    async def _restart_redis(self) -> None:
        assert self._stores.redis is not None
        await self._stores.redis.start()

    # Ending

    async def _shut_down(self) -> None:
        hurry = self._hurry.is_set()
        if self._deployed and not hurry:
            self._report.info("stopping: running turns are finished or handed over …")
            await self._drain()
        await self._head.stop()
        await self._stores.stop(hurry=hurry)
        await end_processes(owned_processes(self._layout))
        remove_state(self._layout.data_dir)

    async def _drain(self) -> None:
        wait_s = self._settings.sessions.drain_s + DRAIN_MARGIN_S + 20
        job = asyncio.create_task(
            run_job(
                {"do": "stop", "address": self._head.address},
                environ=self._environ,
                log_file=self._layout.logs_dir / "deploy.log",
                timeout_s=wait_s,
            )
        )
        hurry = asyncio.create_task(self._hurry.wait())
        death = asyncio.create_task(self._head.wait_dead())
        await asyncio.wait({job, hurry, death}, return_when=asyncio.FIRST_COMPLETED)
        for task in (job, hurry, death):
            task.cancel()
        results = await asyncio.gather(job, hurry, death, return_exceptions=True)
        if isinstance(results[0], AgentRayError):
            self._report.warn(results[0].message)

    # Smaller things

    def _resolved(self, settings: Settings) -> Settings:
        """Return the settings with the addresses of what runs here filled in."""
        return settings.model_copy(
            update={
                "data_dir": str(self._layout.data_dir),
                "postgres": settings.postgres.model_copy(
                    update={"url": SecretStr(self._stores.postgres_url)}
                ),
                "redis": settings.redis.model_copy(
                    update={"url": SecretStr(self._stores.redis_url)}
                ),
            }
        )

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _check_port(self) -> None:
        host, port = self._settings.http.host, self._settings.http.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {in_url(host)}:{port}: {error.strerror}; "
                    "choose another --port"
                ) from error

    def _write_shim(self) -> None:
        # -I -S: nothing of the user's or the site's is loaded, which takes most of the start.
        script = Path(haproxy.__file__).resolve()
        text = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "$@"\n'
        self._layout.haproxy_shim.write_text(text)
        self._layout.haproxy_shim.chmod(0o700)

    def _note(self, *, ready: bool) -> None:
        write_state(
            self._layout.data_dir,
            RunState(
                pid=os.getpid(),
                version=agentray.__version__,
                started_at=self._started_at,
                ready=ready,
                url=url(self._settings.http),
                ray_address=self._head.address,
                postgres=without_password(self._stores.postgres_url),
                redis=without_password(self._stores.redis_url),
                models=list(self._settings.models.names()),
                hosts=self._settings.host_count(),
            ),
        )

    async def _head_dead(self) -> str:
        return await self._head.wait_dead()

    def _say_ready(self) -> None:
        models = self._settings.models
        default = models.default or models.names()[0]
        change = "agentray up --model NAME=URL   (an OpenAI-compatible endpoint)"
        self._report.ready(
            url(self._settings.http),
            [
                f"model      {default}; another one: {change}",
                "talk       agentray chat",
                f"curl       curl {url(self._settings.http)}/v1/responses {_CURL_BODY}",
                f'openai     OpenAI(base_url="{url(self._settings.http)}/v1", api_key="none")',
                f"logs       {self._layout.logs_dir}",
                "stop       Ctrl-C",
            ],
        )


def _ours(error: Exception) -> AgentRayError:
    """Return the first error of ours in a group of such; anything else is raised."""
    while isinstance(error, ExceptionGroup):
        errors = cast("ExceptionGroup[Exception]", error).exceptions
        foreign = [inner for inner in errors if not isinstance(inner, AgentRayError)]
        error = (foreign or list(errors))[0]
    if not isinstance(error, AgentRayError):
        raise error
    return error
