"""What models that agentray serves are made of, and what Serve's reports mean; without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from pydantic import BaseModel, ValidationError

from agentray.config.settings import CardSettings, ModelsSettings, ServedModelSettings
from agentray.models.base import ModelHealth
from agentray.models.serving import (
    AppReport,
    ServedModels,
    config_fields,
    explain,
    health_of,
    root_cause,
)

# As Serve quotes an error of a replica's constructor.
LOADING_AGAIN = """\
A replica failed to start with exception. Retrying 2 more time(s). Error:
ray::ServeReplica:model-tiny:LLMServer:tiny.initialize_and_get_metadata() (pid=7, ip=127.0.0.1)
  File "replica.py", line 1, in initialize_and_get_metadata
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "serving.py", line 9, in start
    raise ModelError(reason) from error
agentray.errors.ModelError: OSError: there is no config.json in /models/tiny
"""
ENGINE_LOG = """\
(EngineCore pid=41) ERROR 11-24 15:00:01 [core.py:842] EngineCore failed to start.
(EngineCore pid=41) ERROR 11-24 15:00:01 [core.py:842] Traceback (most recent call last):
(EngineCore pid=41) ERROR 11-24 15:00:01 [core.py:842]   File "core.py", line 833, in run
(EngineCore pid=41) ERROR 11-24 15:00:01 [core.py:842] ValueError: No available memory for the cache
(EngineCore pid=41) Process EngineCore:
Traceback (most recent call last):
  File "async_llm.py", line 3, in start
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def fields(**values: object) -> dict[str, object]:
    settings = ServedModelSettings.model_validate({"source": "org/model", **values})
    return config_fields("tiny", settings, drain_s=300)


def test_a_model_is_known_by_its_name_and_loaded_from_its_source() -> None:
    loading = {"model_id": "tiny", "model_source": "org/model"}
    assert fields()["model_loading_config"] == loading


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [
        (None, {}),
        ("cpu", {"accelerator_config": {"kind": "cpu"}}),
        ("H100", {"accelerator_type": "H100"}),
    ],
)
def test_the_accelerator_is_said_as_ray_has_it(
    accelerator: str | None, expected: dict[str, object]
) -> None:
    found = fields(accelerator=accelerator)
    assert {key: found[key] for key in found if key.startswith("accelerator")} == expected


def test_parallelism_replicas_and_routing_reach_ray() -> None:
    found = fields(tensor_parallel=4, min_replicas=0, max_replicas=3, target_ongoing_requests=8)
    deployment = found["deployment_config"]
    assert isinstance(deployment, dict)
    scaling = deployment["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (0, 3)
    assert scaling["target_ongoing_requests"] == 8
    router = deployment["request_router_config"]["request_router_class"]
    assert router.endswith(".ConsistentHashRouter")
    engine = found["engine_kwargs"]
    assert isinstance(engine, dict)
    assert engine["tensor_parallel_size"] == 4


def test_options_of_the_engine_win_over_what_agentray_says_of_it() -> None:
    engine = fields(engine={"enable_prompt_tokens_details": False, "dtype": "float32"})[
        "engine_kwargs"
    ]
    assert isinstance(engine, dict)
    assert (engine["enable_prompt_tokens_details"], engine["dtype"]) == (False, "float32")


def test_tools_are_parsed_of_models_that_may_ask_for_them() -> None:
    without = [CardSettings(tools=False), CardSettings(kind="embedding")]
    engines = [fields(card=card)["engine_kwargs"] for card in (CardSettings(), *without)]
    assert ["tool_call_parser" in str(engine) for engine in engines] == [True, False, False]


def test_extra_fields_are_laid_over_ours_key_by_key() -> None:
    extra = {
        "deployment_config": {"autoscaling_config": {"look_back_period_s": 5}},
        "log_engine_metrics": False,
        "model_loading_config": {"model_source": {"bucket_uri": "s3://b/m"}},
    }
    found = fields(extra=extra, max_replicas=2)
    deployment = found["deployment_config"]
    assert isinstance(deployment, dict)
    assert deployment["autoscaling_config"]["look_back_period_s"] == 5
    assert deployment["autoscaling_config"]["max_replicas"] == 2
    assert found["log_engine_metrics"] is False
    source = {"bucket_uri": "s3://b/m"}
    assert found["model_loading_config"] == {"model_id": "tiny", "model_source": source}


@pytest.mark.parametrize(
    ("report", "on_demand", "expected"),
    [
        (None, False, ModelHealth(False, "it is not deployed yet")),
        (AppReport("DEPLOYING", 0, ("", "")), False, ModelHealth(False, "it is loading")),
        (AppReport("RUNNING", 2), False, ModelHealth(True)),
        # A replica of several that does not start takes nothing from those that run.
        (AppReport("UNHEALTHY", 1, (LOADING_AGAIN,)), False, ModelHealth(True)),
        (
            AppReport("RUNNING", 0),
            True,
            ModelHealth(True, "it has no replica until it is called"),
        ),
        (AppReport("RUNNING", 0), False, ModelHealth(False, "it is loading")),
        (
            AppReport("DEPLOYING", 0, ("", LOADING_AGAIN)),
            False,
            ModelHealth(
                False,
                "it is loading again, the last try failed: "
                "OSError: there is no config.json in /models/tiny",
            ),
        ),
        (
            AppReport("DEPLOY_FAILED", 0, ("Failed to update the deployments.", LOADING_AGAIN)),
            True,
            ModelHealth(
                False, "it does not load: OSError: there is no config.json in /models/tiny"
            ),
        ),
    ],
)
def test_serves_report_says_whether_a_model_can_be_called_and_why_not(
    report: AppReport | None, on_demand: bool, expected: ModelHealth
) -> None:
    assert health_of(report, on_demand=on_demand) == expected


def test_the_root_cause_is_the_engines_own_error_not_that_there_was_one() -> None:
    assert root_cause(ENGINE_LOG) == "ValueError: No available memory for the cache"
    assert root_cause("INFO all is well\nRuntimeError: See root cause above.") is None


def test_an_error_is_explained_by_its_most_telling_line() -> None:
    assert explain(OSError("no such model\nCheck your connection.")) == "OSError: no such model"
    assert explain(ValueError()) == "ValueError: no reason given"

    class Options(BaseModel):
        seed: int

    with pytest.raises(ValidationError) as caught:
        Options.model_validate({"seed": "x"})
    assert explain(caught.value).startswith("ValidationError: Input should be a valid integer")


def settings(**serve: dict[str, object]) -> ModelsSettings:
    return ModelsSettings.model_validate({"serve": serve})


async def test_models_are_as_serve_last_said_while_it_cannot_be_asked() -> None:
    answers: list[Mapping[str, AppReport] | Exception] = [
        {"model-tiny": AppReport("RUNNING", 1), "hosts": AppReport("RUNNING", 2)},
        RuntimeError("the controller is away"),
        {"model-tiny": AppReport("DEPLOYING", 0)},
    ]

    def reports() -> Mapping[str, AppReport]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    models = ServedModels(settings(tiny={"source": "m"}), reports=reports)
    assert not models.health("tiny").healthy
    seen: list[bool] = []
    for _ in range(3):
        await models.look()
        seen.append(models.health("tiny").healthy)
    assert seen == [True, True, False]


async def test_a_model_that_agentray_does_not_serve_is_not_for_serve_to_judge() -> None:
    def reports() -> Mapping[str, AppReport]:
        raise AssertionError("Serve is asked although nothing is served")

    models = ServedModels(settings(), reports=reports)
    assert models.health("gpt") == ModelHealth(True)
    await asyncio.wait_for(models.run(), 5)
