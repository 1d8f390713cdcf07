"""Know the newest epoch of each session, and who waits for the end of what is older. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

__all__ = ["Fences", "Session"]

Session = tuple[str, str]
"""A tenant, and the id of one of its sessions."""

_MAX_EPOCHS = 50_000


class Fences:
    """Epochs are bounded: those of the sessions that were not heard of for longest are forgotten.

    That is safe where the session's journal is fenced too: an owner of an older epoch could have
    a call run, and not note its result.
    """

    def __init__(self, *, max_epochs: int = _MAX_EPOCHS) -> None:
        self._max_epochs = max_epochs
        self._epochs: OrderedDict[Session, int] = OrderedDict()
        self._waiting: dict[tuple[str, int], tuple[Session, int]] = {}

    def epoch(self, session: Session) -> int:
        """Return the newest epoch that was heard of, -1 if none was."""
        return self._epochs.get(session, -1)

    def heard(self, session: Session, epoch: int) -> None:
        """Note an epoch."""
        self._epochs[session] = max(epoch, self.epoch(session))
        self._epochs.move_to_end(session)
        if len(self._epochs) > self._max_epochs:
            self._epochs.popitem(last=False)

    def wait(self, link: str, number: int, session: Session, epoch: int) -> None:
        """A host waits, by a number of its own, for the end of what is older than an epoch."""
        self._waiting[link, number] = session, epoch

    def left(self, link: str) -> None:
        """A host is gone."""
        for fence in [fence for fence in self._waiting if fence[0] == link]:
            del self._waiting[fence]

    def settle(self, is_over: Callable[[Session, int], bool]) -> list[tuple[str, int]]:
        """Return those that wait no longer: for whom ``is_over`` says so."""
        over = [
            fence for fence, (session, epoch) in self._waiting.items() if is_over(session, epoch)
        ]
        for fence in over:
            del self._waiting[fence]
        return over
