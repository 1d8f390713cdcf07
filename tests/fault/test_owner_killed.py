"""kill -9 of the owners of sessions under load, in each phase of a turn."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import count

import aiohttp

from tests.fault.attacks import PHASES, Attack, Phase
from tests.fault.conftest import HOSTS
from tests.fault.load import Load, assert_turns_whole
from tests.system import System, until

KILLS = 25
KILLS_A_PHASE = 5
TURNS = 200
WORKERS = 8
AT_ONCE = 4
DEDICATED: tuple[Phase, ...] = ("before_first_token", "streaming", "tools", "journaling")
LONGEST_S = 240.0


async def test_owners_killed_in_every_phase_under_load_lose_and_double_nothing(
    system: System, http: aiohttp.ClientSession
) -> None:
    load = Load(system, http)
    attacks: list[Attack] = []
    hits: Counter[Phase] = Counter()
    under_way: Counter[Phase] = Counter()
    variants = count()
    deadline = time.monotonic() + LONGEST_S

    def enough() -> bool:
        return hits.total() >= KILLS and all(hits[phase] >= KILLS_A_PHASE for phase in PHASES)

    async def kill_hosts() -> None:
        while not enough():
            assert time.monotonic() < deadline, f"only {hits}"
            await system.until_hosts(HOSTS - 2)
            phase = min(PHASES, key=lambda phase: hits[phase] + under_way[phase])
            attacks.append(attack := Attack(system, http, phase, next(variants)))
            under_way[phase] += 1
            # An attack that was late, or whose host another one killed, is no hit.
            hits[phase] += await attack.run()
            under_way[phase] -= 1

    async def kill_dedicated(phase: Phase) -> None:
        hit = False
        while not hit:
            assert time.monotonic() < deadline, f"no dedicated session was hit while {phase}"
            attacks.append(attack := Attack(system, http, phase, next(variants), "dedicated"))
            hit = await attack.run()

    async with asyncio.TaskGroup() as group:
        for number in range(WORKERS):
            group.create_task(load.work(number, "shared" if number else "dedicated"))
        async with asyncio.TaskGroup() as killers:
            for _ in range(AT_ONCE):
                killers.create_task(kill_hosts())
            for phase in DEDICATED:
                killers.create_task(kill_dedicated(phase))
        posted = sum(len(attack.turns) for attack in attacks)
        await until(lambda: len(load.turns) + posted >= TURNS, what=f"{TURNS} turns")
        load.enough.set()
    turns = load.turns + [turn for attack in attacks for turn in attack.turns]
    assert_turns_whole(system, turns)
    busy = [attack.hit.turns_there for attack in attacks if attack.hit is not None]
    assert sum(busy) > len(busy), f"the turns that ran where a kill hit: {busy}"
