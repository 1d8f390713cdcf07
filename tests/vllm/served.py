"""A system whose models are served by vLLM on the CPU, and what the tests look at in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from agentray.app.processes import owned_processes
from agentray.models.serving import route_prefix
from tests.system import System, command, until

__all__ = ["BROKEN", "LOAD_S", "MODEL", "TINY", "TOKENS", "ServedSystem", "needs_vllm"]

MODEL = os.environ.get("AGENTRAY_TEST_VLLM_MODEL", "")
needs_vllm = pytest.mark.skipif(not MODEL, reason="make test-vllm makes the model that this needs")

TINY = "tiny"
BROKEN = "broken"
# The model never ends by itself, and says one character per token.
TOKENS = 2_000
CONTEXT = 8_192
LOAD_S = 240.0

_ENGINE = {
    # bfloat16 kills the worker on some processors.
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": CONTEXT,
    "max_num_seqs": 32,
    "seed": 0,
}
_EXTRA = {
    # vLLM's metrics at each replica's /metrics, in place of Ray's.
    "log_engine_metrics": False,
    # Two replicas and more on the fewest cores.
    "placement_group_config": {"bundle_per_worker": {"CPU": 0.2}},
    "deployment_config": {
        "ray_actor_options": {"num_cpus": 0},
        "autoscaling_config": {"metrics_interval_s": 1, "look_back_period_s": 3},
        # One failure is as good as three, and each takes half a minute.
        "max_constructor_retry_count": 1,
        "health_check_period_s": 2,
    },
}


def _half_downloaded(folder: Path) -> str:
    """Make a copy of the model whose weights are cut off; only the engine's process looks at them.
    Return where it is."""
    shutil.copytree(MODEL, folder)
    for file in folder.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    return str(folder)


def _settings(broken_model: str) -> dict[str, Any]:
    tiny = {
        "source": MODEL,
        "accelerator": "cpu",
        "engine": _ENGINE,
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 4,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3_600,
        "extra": _EXTRA,
        "card": {"tier": "large", "context_window": CONTEXT},
    }
    agent = {
        "model": TINY,
        "models": [TINY, "simulator"],
        "temperature": 0,
        "max_output_tokens": TOKENS,
        "tools": [],
    }
    return {
        "models": {
            "serve": {TINY: tiny, BROKEN: {**tiny, "source": broken_model}},
            "simulator": {"enabled": True, "tps": 200},
            "routing": {"holdout": 0, "escalate": False},
            # The same conversation is held more than once, and the model must be asked each time.
            "cache": {"enabled": False},
        },
        "agents": {"assistant": agent},
    }


class ServedSystem(System):
    """``agentray up`` with a model that loads and one that cannot."""

    def __init__(self, data_dir: Path) -> None:
        broken = _half_downloaded(data_dir.with_name("half-downloaded"))
        super().__init__(data_dir, settings=_settings(broken))
        self.at_start: dict[str, Any] = {}
        """What ``/readyz`` said when ``agentray up`` was ready."""

    @property
    def model_url(self) -> str:
        """The base URL of the model that loads."""
        return f"{self.url}{route_prefix(TINY)}/v1"

    def start(self) -> ServedSystem:
        """Return when the platform is ready; the models are loading then."""
        super().start()
        with urlopen(f"{self.url}/readyz", timeout=5) as answer:
            self.at_start = json.load(answer)
        return self

    async def until_loaded(self) -> None:
        """Return when the model can be called."""
        said = f"model {TINY} can be called"
        loaded = lambda: self.health(TINY)["healthy"] and said in self.output.read_text()  # noqa: E731
        await until(loaded, timeout_s=LOAD_S, what=f"{TINY} is loaded")

    async def until_replicas(self, count: int) -> None:
        """Return when HAProxy sends calls to that many replicas of the model."""
        there = lambda: len(self.replicas()) >= count  # noqa: E731
        await until(there, timeout_s=LOAD_S, what=f"{count} replicas of {TINY}")

    def health(self, model: str) -> Mapping[str, Any]:
        """Return what ``/readyz`` says of a model, or that no host is ready to say it."""
        try:
            with urlopen(f"{self.url}/readyz", timeout=5) as answer:
                said = json.load(answer)
        except HTTPError as error:
            # A machine that stood still for seconds: hosts have to say first that they live.
            said = json.load(error)
        return said.get("models", {}).get(model, {"healthy": False, "reason": str(said)})

    def replicas(self) -> dict[str, str]:
        """Return the addresses of the model's replicas that HAProxy sends calls to, by name."""
        backend = re.compile(r"^backend http-model-tiny\n((?:\s.*\n)*)", re.MULTILINE)
        for file in self.layout.runtime_dir.glob("*/haproxy.cfg"):
            if found := backend.search(file.read_text()):
                return dict(re.findall(r"^\s*server (\S+) (\S+)", found[1], re.MULTILINE))
        return {}

    def metric(self, name: str) -> float:
        """Return a metric of vLLM's, summed over the model's replicas."""
        total = 0.0
        for address in self.replicas().values():
            with urlopen(f"http://{address}{route_prefix(TINY)}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            values = [float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")]
            assert values, f"{address} has no metric {name}"
            total += sum(values)
        return total

    def replica_pids(self) -> list[int]:
        """Return the processes of the model's replicas, without their engines'."""
        mark = f"ray::ServeReplica:model-{TINY}:LLMServer"
        pids = owned_processes(self.layout)
        return [pid for pid in pids if command(pid).startswith(mark)]
