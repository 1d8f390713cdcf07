"""The whole list of attacks, and those of it that make sense for the user who runs it."""

from __future__ import annotations

from tests.jail.attack import MODE, Attack
from tests.jail.endings import ENDINGS
from tests.jail.exhaustion import EXHAUSTION
from tests.jail.kernel import KERNEL
from tests.jail.looking import LOOKING

__all__ = ["ALL", "HERE", "control_here", "left_out"]

ALL = (*EXHAUSTION, *ENDINGS, *LOOKING, *KERNEL)
HERE = tuple(attack for attack in ALL if attack.only in (None, MODE))


def control_here(attack: Attack) -> bool:
    """Say whether the attack's control makes sense for this user."""
    return attack.control_only in (None, MODE)


def left_out() -> list[str]:
    """Return a line for each case that is not run for this user, with its reason."""
    cases = [f"{attack.name}: {attack.why}" for attack in ALL if attack not in HERE]
    controls = [
        f"the control of {attack.name}: {attack.why}"
        for attack in HERE
        if attack.off and not control_here(attack)
    ]
    return [*cases, *controls]
