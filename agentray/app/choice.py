"""Choose the model of a start that has none configured, and say which it is and why."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from agentray.config.settings import SIMULATOR, EndpointSettings, ModelsSettings, Settings
from agentray.errors import ConfigError

__all__ = ["Choice", "asked_models", "choose"]

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_MODEL = "gpt-5-mini"
"""The model that a key of OpenAI's is used for, unless ``OPENAI_MODEL`` names another one."""

_HTTP = ("http://", "https://")
_NO_VLLM = (
    "vLLM, which would serve it, is not installed: pip install 'ray[llm]'; "
    "for a model behind an endpoint: --model NAME=URL"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The models of a start, and ``why`` they are these."""

    models: ModelsSettings
    why: str


def asked_models(texts: Iterable[str], *, vllm: bool, gpu: bool) -> dict[str, Any]:
    """Return the section ``models`` that ``--model`` asks for.

    ``NAME=URL`` is a model behind an endpoint. ``SOURCE`` or ``NAME=SOURCE``, a Hugging Face id
    or a folder, is one to serve here.

    Args:
        vllm: whether vLLM is installed.
        gpu: whether this machine has a GPU; else the model is served on the CPU.

    Raises:
        ConfigError: a text that is neither, or a model to be served without vLLM.
    """
    endpoints: dict[str, Any] = {}
    serve: dict[str, Any] = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            name, value = _name_of(text), text
        if not name or not value or (not found and text.startswith(_HTTP)):
            raise ConfigError(
                f"--model {text}: expected NAME=URL, e.g. tiny=http://127.0.0.1:8001/v1, or the "
                "Hugging Face id or folder of a model that vLLM is to serve"
            )
        if value.startswith(_HTTP):
            endpoints[name] = {"url": value}
        elif not vllm:
            raise ConfigError(f"--model {text}: {_NO_VLLM}")
        else:
            serve[name] = {"source": _located(value), **({} if gpu else _ON_CPU)}
    sections = {"endpoints": endpoints, "serve": serve}
    return {section: values for section, values in sections.items() if values}


# bfloat16, which most models come in, kills vLLM's worker on some processors.
_ON_CPU = {"accelerator": "cpu", "engine": {"dtype": "float32", "enforce_eager": True}}


def _name_of(source: str) -> str:
    """Return a name for a model, fit for an address: the last part of where it comes from."""
    last = source.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")


def _located(source: str) -> str:
    # Whoever loads it does so in another folder.
    return os.path.abspath(os.path.expanduser(source)) if source[0] in "./~" else source  # noqa: PTH100, PTH111


def choose(settings: Settings, env: Mapping[str, str]) -> Choice:
    """Return the models to start with: those configured, else what the environment has a key
    for, else the simulator."""
    models = settings.models
    named = models.default or any(agent.model or agent.models for agent in settings.agents.values())
    if models.endpoints or models.serve or models.simulator.enabled is not None or named:
        return Choice(models, "as configured")
    key, url = env.get("OPENAI_API_KEY"), env.get("OPENAI_BASE_URL")
    if not key:
        return Choice(models, f"the {SIMULATOR}, for no model is configured")
    if url and not url.startswith(_HTTP):
        raise ConfigError("OPENAI_BASE_URL: expected an address such as https://host/v1")
    name = env.get("OPENAI_MODEL") or (None if url else OPENAI_MODEL)
    if name is None:
        # What somebody else's server calls its models nobody can guess.
        return Choice(
            models,
            f"the {SIMULATOR}, for no model is configured; OPENAI_BASE_URL is set, "
            "and OPENAI_MODEL, which would name one there, is not",
        )
    endpoint = EndpointSettings(url=url or OPENAI_URL, api_key=SecretStr(key), upstream=name)
    chosen = models.model_copy(update={"endpoints": {name: endpoint}})
    source = "OPENAI_MODEL names it" if env.get("OPENAI_MODEL") else "OPENAI_MODEL names another"
    why = f"OPENAI_API_KEY is set; {source}; without the key it would be the {SIMULATOR}"
    return Choice(chosen, why)
