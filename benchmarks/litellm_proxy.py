"""Run the LiteLLM proxy as its package ships it, in an environment that is made once and kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.cpu import descendants
from benchmarks.system import free_port, running, tail

__all__ = ["COST_HEADER", "MODEL", "LiteLLM", "install_litellm", "litellm_version"]

ENVIRONMENT = Path(__file__).resolve().parent.parent / ".venv-litellm"
CONSTRAINTS = Path(__file__).with_name("litellm-constraints.txt")
MODEL = "assistant"
"""The name of its group of models: the proxy picks one of them for each request."""
COST_HEADER = "x-litellm-response-cost"
"""Where an answer that comes whole says what it cost."""

_READY_S = 120.0
_SETTINGS = {
    # Prices of models would be fetched from the network at the start; ours are in the config.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    # No key is asked for: agentray asks for none either.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


def install_litellm() -> Path:
    """Return the proxy's program; make its environment first, unless it is there and current.

    Raises:
        RuntimeError: it could not be made; the message has the installer's last words.
    """
    program = ENVIRONMENT / "bin" / "litellm"
    stamp = ENVIRONMENT / ".stamp"
    wanted = hashlib.sha256(platform.python_version().encode() + CONSTRAINTS.read_bytes())
    if stamp.exists() and stamp.read_text() == wanted.hexdigest():
        return program
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    _run(sys.executable, "-m", "venv", str(ENVIRONMENT))
    # The environment keeps itself out of version control and out of the linters' sight.
    (ENVIRONMENT / ".gitignore").write_text("*\n")
    pip = (str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "install", "-q", "-c", str(CONSTRAINTS), "litellm[proxy]")
    stamp.write_text(wanted.hexdigest())
    return program


def litellm_version() -> str:
    """Return the version that the constraints name."""
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith("litellm=="):
            return line.removeprefix("litellm==").strip()
    raise RuntimeError(f"{CONSTRAINTS.name} does not pin litellm")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:5])} …: {done.stderr.strip()[-800:]}")


class LiteLLM:
    """A running proxy."""

    def __init__(self, port: int, pid: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._pid = pid

    def processes(self) -> set[int]:
        """Return all of its processes."""
        return descendants([self._pid])


@asynccontextmanager
async def litellm(
    program: Path,
    folder: Path,
    *,
    workers: int,
    urls: Mapping[str, str],
    prices: Mapping[str, Mapping[str, float]],
) -> AsyncIterator[LiteLLM]:
    """Run the proxy, with no database, until the block ends.

    ``urls`` are those of the models, ``prices`` what a million tokens of each costs. The cost of
    a request is worked out in any case; with prices of its own it is not zero.
    """
    port = free_port()
    config = folder / "litellm.yaml"
    # JSON is YAML.
    config.write_text(json.dumps(_config(urls, prices)))
    command = (
        *("env", *(f"{name}={value}" for name, value in _SETTINGS.items())),
        *(str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)),
        *("--num_workers", str(workers), "--telemetry", "False", "--keepalive_timeout", "75"),
    )
    log_file = folder / "litellm.log"
    async with running(*command, port=port, log_file=log_file) as process:
        await _ready(port, process, log_file)
        yield LiteLLM(port, process.pid)


def _config(
    urls: Mapping[str, str], prices: Mapping[str, Mapping[str, float]]
) -> dict[str, object]:
    models: list[dict[str, Any]] = []
    for name, url in urls.items():
        params = {
            "model": f"openai/{name}",
            "api_base": url,
            "api_key": "none",
            "input_cost_per_token": prices[name]["input"] / 1e6,
            "output_cost_per_token": prices[name]["output"] / 1e6,
        }
        models.append({"model_name": MODEL, "litellm_params": params})
    return {
        "model_list": models,
        "litellm_settings": {"telemetry": False, "set_verbose": False, "request_timeout": 60},
    }


async def _ready(port: int, process: asyncio.subprocess.Process, log_file: Path) -> None:
    """Wait for its answer: its port takes connections long before it does."""
    url = f"http://127.0.0.1:{port}/health/liveliness"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    async with asyncio.timeout(_READY_S):
        while not await asyncio.to_thread(answers):
            if process.returncode is not None:
                raise RuntimeError(f"LiteLLM ended: {tail(log_file)}")
            await asyncio.sleep(0.2)
