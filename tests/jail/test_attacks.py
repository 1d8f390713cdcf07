"""Every attack is contained, and the slot that it ran in is as good as new."""

from __future__ import annotations

import time

import pytest

from agentray.tools.sandbox.base import Run, Slot
from tests.jail.attack import Attack
from tests.jail.attacks import HERE, control_here
from tests.jail.scene import Scene, assert_usable, marked_processes
from tests.jail.slots import Jails, opened_jail

pytestmark = pytest.mark.asyncio(loop_scope="session")

CONTROLS = [attack for attack in HERE if attack.off and control_here(attack)]
LAYERS = [
    pytest.param(attack, layer, id=f"{attack.name}, {layer} alone")
    for attack in CONTROLS
    for layer in sorted(attack.off)
    if len(attack.off) > 1
]


def run_of(attack: Attack, scene: Scene) -> Run:
    return Run(attack.program(scene.facts), attack.limits, keep_scratch=attack.keep_scratch)


@pytest.mark.parametrize("attack", HERE, ids=lambda attack: attack.name)
async def test_an_attack_is_contained_and_the_next_call_works(
    attack: Attack, slot: Slot, scene: Scene
) -> None:
    began = time.monotonic()
    outcome = await slot.run(run_of(attack, scene))
    took_s = time.monotonic() - began
    attack.assert_contained(outcome)
    assert took_s < attack.within_s, took_s
    assert marked_processes(str(scene.facts["mark"])) == []
    await assert_usable(slot)


@pytest.mark.parametrize("attack", CONTROLS, ids=lambda attack: attack.name)
async def test_an_attack_works_where_its_defence_is_left_out(attack: Attack, scene: Scene) -> None:
    async with opened_jail(without=attack.off) as slot:
        outcome = await slot.run(run_of(attack, scene))
        assert attack.worked(outcome), outcome


@pytest.mark.parametrize(("attack", "layer"), LAYERS)
async def test_each_layer_stops_an_attack_without_the_others(
    attack: Attack, layer: str, jails: Jails, scene: Scene
) -> None:
    attack.assert_contained(await jails.run(run_of(attack, scene), without=attack.off - {layer}))
