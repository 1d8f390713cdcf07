"""Start everything on this machine and keep it running."""

from __future__ import annotations

import asyncio
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from agentray.config import load_settings

__all__ = ["up"]


def up(
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file; see configs/.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port of the HTTP endpoint.")] = None,
    data_dir: Annotated[
        str | None, typer.Option("--data-dir", help="Folder of everything that is embedded.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME=URL|SOURCE",
            help="A model at an OpenAI-compatible endpoint, or the Hugging Face id or folder of "
            "one that vLLM is to serve; may be given more than once.",
        ),
    ] = None,
) -> None:
    """Start PostgreSQL, Redis, Ray and the session hosts; Ctrl-C ends them in order.

    What is configured at a URL is used instead of being started. Without any model configured,
    OPENAI_API_KEY leads to OpenAI's; without that, the built-in simulator answers.
    """
    from agentray.app.choice import asked_models, choose
    from agentray.app.report import Report
    from agentray.app.supervisor import Supervisor
    from agentray.models.checks import schema_problem

    flags: dict[str, Any] = {}
    if port is not None:
        flags["http"] = {"port": port}
    if data_dir is not None:
        flags["data_dir"] = data_dir
    if model:
        flags["models"] = asked_models(model, vllm=find_spec("vllm") is not None, gpu=_has_gpu())
    settings = load_settings(config, os.environ, flags=flags, schema_problem=schema_problem)
    choice = choose(settings, os.environ)
    settings = settings.model_copy(update={"models": choice.models})

    async def run() -> int:
        return await Supervisor(settings, report=Report(), why=choice.why).run()

    raise typer.Exit(asyncio.run(run()))


def _has_gpu() -> bool:
    """Return whether the driver of NVIDIA's or AMD's GPUs is there."""
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd"))
