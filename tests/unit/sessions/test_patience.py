"""What is waited for, and what is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from agentray.clock import ManualClock
from agentray.errors import ModelError, ModelUnavailableError
from agentray.models.base import ModelProgress, ModelRequest
from agentray.sessions.patience import PatientModels

REQUEST = ModelRequest(model="m", messages=b"")
NOBODY: list[dict[str, Any]] = [{"unreached": True}, {"status": 502}, {"status": 503}]


class Models:
    """Answers what is prepared, call by call: text, and an error behind it if there is one."""

    def __init__(self, clock: ManualClock, *answers: tuple[str, ModelError | None]) -> None:
        self._clock = clock
        self._answers = list(answers)
        self.calls = 0
        self.timeouts: list[float | None] = []

    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelProgress]:
        self.calls += 1
        self.timeouts.append(request.timeout_s)
        self._clock.advance(0.5)
        text, error = self._answers.pop(0)
        if text:
            yield ModelProgress(text)
        if error is not None:
            raise error


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


async def said(
    models: Models,
    clock: ManualClock,
    *,
    patience_s: float = 8.0,
    request: ModelRequest = REQUEST,
) -> str:
    patient = PatientModels(models, clock, patience_s=patience_s)
    return "".join([progress.text async for progress in patient.stream(request)])


@pytest.mark.parametrize("fields", NOBODY)
async def test_a_model_that_comes_back_is_called_again(
    clock: ManualClock, fields: dict[str, Any]
) -> None:
    models = Models(clock, ("", ModelUnavailableError("away", **fields)), ("hello", None))
    assert await said(models, clock) == "hello"


async def test_all_its_calls_together_have_the_time_of_one(clock: ManualClock) -> None:
    away = ModelUnavailableError("away", unreached=True)
    models = Models(clock, *[("", away)] * 9)
    with pytest.raises(ModelUnavailableError, match="away"):
        await said(models, clock, request=replace(REQUEST, timeout_s=1.05))
    assert models.calls == 2
    assert models.timeouts == [pytest.approx(1.05), pytest.approx(0.55)]


async def test_patience_ends(clock: ManualClock) -> None:
    away = ModelUnavailableError("away", unreached=True)
    models = Models(clock, ("", away), ("", away), ("", away))
    with pytest.raises(ModelUnavailableError, match="away"):
        await said(models, clock, patience_s=0.7)
    assert models.calls == 2


@pytest.mark.parametrize(
    "error",
    [
        ModelUnavailableError("broke off"),
        ModelUnavailableError("a proxy gave up in mid-stream", status=503),
        ModelUnavailableError("an error of its own", status=500),
        ModelError("refused", status=400),
    ],
)
async def test_what_a_model_said_itself_is_not_waited_out(
    clock: ManualClock, error: ModelError
) -> None:
    models = Models(clock, ("half an ans", error))
    with pytest.raises(type(error), match=error.message):
        await said(models, clock)
    assert models.calls == 1
