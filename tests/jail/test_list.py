"""The list of attacks is whole: each entry has cases, each case is there, enough have controls."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.jail.attacks import ALL, HERE, LIST, control_here

NAMES = {attack.name for attack in ALL}
CONTROLLED = {attack.name for attack in HERE if attack.off and control_here(attack)}


def exists(case: str) -> bool:
    module, _, name = case.partition("::")
    return hasattr(import_module(f"tests.jail.{module}"), name) if name else case in NAMES


@pytest.mark.parametrize("entry", LIST)
def test_every_entry_has_cases_and_they_are_run(entry: str) -> None:
    assert LIST[entry]
    assert [case for case in LIST[entry] if not exists(case)] == []
    run_here = {attack.name for attack in HERE}
    assert any("::" in case or case in run_here for case in LIST[entry])


def test_no_two_attacks_have_the_same_name() -> None:
    assert len(NAMES) == len(ALL)


def test_the_list_is_as_long_as_it_has_to_be_and_enough_of_it_has_controls() -> None:
    assert len(LIST) >= 45
    with_control = [entry for entry, cases in LIST.items() if CONTROLLED & {*cases}]
    assert len(with_control) >= 15, with_control
