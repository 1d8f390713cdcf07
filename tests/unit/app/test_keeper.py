"""How long a part of the system is brought back."""

from __future__ import annotations

import pytest

from agentray.app.keeper import Patience, keep
from agentray.app.report import Report
from agentray.errors import NotReadyError


def pauses(patience: Patience) -> list[float]:
    found: list[float] = []
    while (pause_s := patience.next_pause_s()) is not None:
        found.append(pause_s)
    return found


def test_pauses_double_and_end() -> None:
    assert pauses(Patience()) == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4]


def test_a_part_that_lived_a_minute_is_tried_anew() -> None:
    patience = Patience()
    pauses(patience)
    patience.lived(59.9)
    assert pauses(patience) == []
    patience.lived(60.0)
    assert len(pauses(patience)) == Patience.TRIES


async def test_it_gives_up_with_the_last_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Patience, "FIRST_PAUSE_S", 0.0)
    starts = 0

    async def wait_dead() -> str:
        return "was killed"

    async def restart() -> None:
        nonlocal starts
        starts += 1
        if starts % 2:
            raise NotReadyError(f"failure {starts}")

    with pytest.raises(NotReadyError, match=r"Redis failed 6 times in a row.*was killed"):
        await keep("Redis", wait_dead=wait_dead, restart=restart, report=Report())
    assert starts == Patience.TRIES
    assert "failure 5; bringing it back" in capsys.readouterr().out
