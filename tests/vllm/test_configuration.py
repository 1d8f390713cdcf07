"""The shipped configuration for GPUs, checked by its readers: Ray's ``LLMConfig`` and vLLM."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from agentray.config import load_settings
from agentray.models.serving import config_fields

FILE = Path(__file__).parents[2] / "configs" / "gpu.yaml"

# vLLM's and PyTorch's own, while they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

pytest.importorskip("vllm", reason="make test-vllm makes an environment with vLLM")


def engine_of(name: str) -> tuple[Any, Any]:
    served = load_settings(FILE, {}).models.serve[name]
    config = import_module("ray.serve.llm").LLMConfig(**config_fields(name, served, drain_s=300))
    # It knows every option of vLLM's engine and refuses all others.
    return config, config.get_engine_config()


def test_the_small_model_takes_one_accelerator_a_replica() -> None:
    config, engine = engine_of("qwen3-8b")
    assert config.accelerator_type == "L4"
    assert engine.placement_bundles == [{"GPU": 1, "accelerator_type:L4": 0.001}]
    assert config.deployment_config["autoscaling_config"]["max_replicas"] == 8


def test_the_large_model_is_split_over_accelerators_of_one_node() -> None:
    config, engine = engine_of("qwen3-235b")
    assert config.accelerator_type == "H100"
    assert engine.tensor_parallel_degree == 4
    assert engine.placement_bundles == [{"GPU": 1, "accelerator_type:H100": 0.001}] * 4
    assert engine.placement_strategy == "STRICT_PACK"
    assert config.deployment_config["autoscaling_config"]["min_replicas"] == 0


def test_options_that_vllm_does_not_know_are_found() -> None:
    served = load_settings(FILE, {}).models.serve["qwen3-8b"]
    served = served.model_copy(update={"engine": {"max_model_length": 1}})
    config = import_module("ray.serve.llm").LLMConfig(**config_fields("m", served, drain_s=300))
    with pytest.raises(ValueError, match="max_model_length"):
        config.get_engine_config()
