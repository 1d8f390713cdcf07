"""The live end of a session's stream: events as they commit, and text in flight.

A hub holds what is live once for all of its readers; a reader is nothing but a cursor, so a slow
one costs no buffer. On the session's owner the runtime feeds the hub; elsewhere messages of the
owner do, and the journal fills what they leave out.

Text becomes visible only when the wire has it, or has been away for a while: whoever takes the
session over can then go on behind whatever any client was shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Literal

import msgspec

from agentray.events import AnyEvent, ModelCalled, TurnAccepted, decode_event, encode_event
from agentray.sessions.base import Cursor, Delta, StreamItem
from agentray.storage.base import TurnRow, Wire

__all__ = ["Hub", "TailWriter", "WireMessage", "tail_key"]

# A little longer than the wire tries nothing after a failure.
_AGAIN_S = 0.6
_HOLD_S = 2.0


def tail_key(tenant: str, session_id: str, called_seq: int) -> str:
    """Return the name of the text that the call of ``model.called`` number ``called_seq`` left."""
    return f"{{{tenant}/{session_id}}}:{called_seq}"


class WireMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What owners say to each other about a session.

    ``wake``: its inbox changed, by ``turn`` alone if that is given, ``epoch`` is the session's
    and the owner's count was one less than ``inbox``. ``follow``: ``sender`` has readers of it
    and wants what is live.
    ``live``: to a follower, ``events`` that committed and ``text`` of the call ``called_seq``
    from offset ``start`` on. ``deleted``: drop it.
    """

    kind: Literal["wake", "follow", "live", "deleted"]
    tenant: str
    session_id: str
    sender: str = ""
    turn: TurnRow | None = None
    epoch: int = 0
    inbox: int = 0
    events: list[msgspec.Raw] = []
    called_seq: int = 0
    start: int = 0
    text: str = ""


class Hub:
    """What is live of one session: the events behind ``base_seq``, then text of a running call.

    ``readers`` counts who follows in this process; ``followers`` are other owners that do, with
    the time until which they said so. ``local``: the session is ours; ``live``: a turn runs.
    ``born`` is the session's ``first_epoch``, 0 where it is not known: another session may have
    the id later. ``parked_at``: elsewhere the session was seen parked, at this ``last_seq``.
    """

    __slots__ = (
        "_waiting",
        "base_seq",
        "born",
        "called_seq",
        "events",
        "followers",
        "live",
        "local",
        "parked_at",
        "readers",
        "start",
        "text",
        "visible",
    )

    def __init__(self, base_seq: int = 0, born: int = 0) -> None:
        self.base_seq = base_seq
        self.born = born
        self.events: list[AnyEvent] = []
        self.called_seq = 0
        self.start = 0
        self.text = ""
        self.visible = 0
        self.readers = 0
        self.followers: dict[str, float] = {}
        self.local = False
        self.live = False
        self.parked_at: int | None = None
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def wanted(self) -> bool:
        """Whether anybody reads, here or elsewhere."""
        return bool(self.readers or self.followers)

    @property
    def last_seq(self) -> int:
        return self.base_seq + len(self.events)

    def is_of(self, born: int) -> bool:
        """Return whether this is of the session born then, as far as that is known."""
        if not self.born:
            self.born = born
        return not born or self.born == born

    def prune(self, now: float) -> None:
        """Forget followers that no longer say that they are."""
        if self.followers:
            self.followers = {f: until for f, until in self.followers.items() if until > now}

    def rebase(self, seq: int) -> None:
        """Forget the events up to ``seq``; readers that are not there yet read the journal."""
        self.base_seq, self.events = seq, []
        self.called_seq, self.start, self.text, self.visible = 0, 0, "", 0

    def feed(self, events: Sequence[AnyEvent]) -> None:
        """Add committed events; those that are known already are left out."""
        for event in events:
            behind_call = event.seq == self.base_seq and isinstance(event, ModelCalled)
            if event.seq <= self.last_seq and not (behind_call and not self.events):
                continue
            # A hub that began right behind a call has to have it, to take its text.
            # On the owner each turn begins with a rebase; elsewhere nothing else forgets.
            begins = isinstance(event, TurnAccepted) and not self.local
            if begins or event.seq != self.last_seq + 1:
                self.rebase(event.seq - 1)
            self.events.append(event)
            if isinstance(event, ModelCalled):
                self.called_seq, self.start = event.seq, event.continued_from
                self.text, self.visible = "", 0
            else:
                self.called_seq = 0
                self.text, self.visible = "", 0
        self.notify()

    def append_text(self, text: str) -> None:
        """Add text of the running call that is not to be seen yet."""
        self.text += text

    def show(self, called_seq: int, visible: int) -> None:
        """Make the first ``visible`` characters that the call added visible to readers."""
        if called_seq == self.called_seq and visible > self.visible:
            self.visible = visible
            self.notify()

    def feed_text(self, called_seq: int, start: int, text: str) -> bool:
        """Add visible text that another process sent; False if something before it is missing."""
        if called_seq != self.called_seq:
            return called_seq < self.called_seq or not text
        known = self.start + len(self.text)
        if start > known:
            return False
        self.text += text[known - start :]
        self.show(called_seq, len(self.text))
        return True

    def read(self, cursor: Cursor) -> list[StreamItem] | None:
        """Return what is live behind the cursor; None if the journal has to be read first."""
        if cursor.seq < self.base_seq:
            return None
        items: list[StreamItem] = list(self.events[cursor.seq - self.base_seq :])
        # A reader of the journal can be ahead of what was told here.
        if self.called_seq and self.visible and cursor.seq <= self.called_seq:
            at = max(cursor.offset - self.start, 0) if cursor.seq == self.called_seq else 0
            if at < self.visible:
                text = self.text[at : self.visible]
                turn_id = self.events[-1].turn_id
                items.append(Delta(turn_id, self.called_seq, self.start + self.visible, text))
        return items

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    async def changed(self) -> None:
        """Return at the next change."""
        # One for each reader: a reader that leaves cancels its own.
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)

    def snapshot(self, tenant: str, session_id: str) -> WireMessage:
        """Return all that is live and visible, for a follower that begins."""
        return WireMessage(
            kind="live",
            tenant=tenant,
            session_id=session_id,
            events=[msgspec.Raw(encode_event(event)) for event in self.events],
            called_seq=self.called_seq,
            start=self.start,
            text=self.text[: self.visible],
        )

    def apply(self, message: WireMessage) -> bool:
        """Take a ``live`` message in; False if text before it is missing."""
        self.feed([decode_event(bytes(event)) for event in message.events])
        if message.called_seq:
            return self.feed_text(message.called_seq, message.start, message.text)
        return True


class _Call(msgspec.Struct):
    """A running call, how much of its text the wire has, and how much was shown."""

    tenant: str
    session_id: str
    hub: Hub
    called_seq: int
    sent: int = 0
    sent_bytes: int = 0
    shown: int = 0


class TailWriter:
    """Writes the text of all running calls to the wire, a batch a round trip, then shows it.

    ``confirm`` is awaited before anything is shown: it returns when this process is known to be
    a live owner. A wire that takes nothing for ``hold_s`` is done without: its failures of a
    moment hold text back, its absence does not. Messages to followers leave in the order in which
    they were made.
    """

    def __init__(
        self, wire: Wire, confirm: Callable[[], Awaitable[None]], *, hold_s: float = _HOLD_S
    ) -> None:
        self._wire = wire
        self._confirm = confirm
        self._hold_s = hold_s
        self._away_since: float | None = None
        self._calls: dict[tuple[str, str], _Call] = {}
        self._dirty: dict[tuple[str, str], None] = {}
        self._outbox: list[tuple[str, bytes]] = []
        self._task: asyncio.Task[None] | None = None
        self._again_soon = False

    def begin(self, tenant: str, session_id: str, hub: Hub) -> None:
        """A call begins, whose text will be the hub's."""
        self._calls[tenant, session_id] = _Call(tenant, session_id, hub, hub.called_seq)

    def end(self, tenant: str, session_id: str, called_seq: int) -> None:
        """The call is over: what was not written by now goes to the journal instead."""
        call = self._calls.get((tenant, session_id))
        if call is not None and call.called_seq == called_seq:
            del self._calls[tenant, session_id]
            self._dirty.pop((tenant, session_id), None)

    def grew(self, tenant: str, session_id: str) -> None:
        """A call's hub has new text."""
        self._dirty[tenant, session_id] = None
        self._wake()

    def send(self, owners: Iterable[str], message: WireMessage) -> None:
        """Send a message to other owners, in the background."""
        body = msgspec.json.encode(message)
        self._outbox.extend((owner, body) for owner in owners)
        if self._outbox:
            self._wake()

    async def stop(self) -> None:
        """Send what is waiting."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=1.0)

    def _wake(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while self._dirty or self._outbox:
            grown = await self._write()
            if grown:
                await self._confirm()
            for call, text in grown:
                if not call.hub.local:
                    continue  # lost while this process slept: its text is nobody's any more
                start, call.shown = call.shown, call.shown + len(text)
                call.hub.show(call.called_seq, call.shown)
                if call.hub.followers and call.hub.called_seq == call.called_seq:
                    message = WireMessage(
                        kind="live",
                        tenant=call.tenant,
                        session_id=call.session_id,
                        called_seq=call.called_seq,
                        start=call.hub.start + start,
                        text=text,
                    )
                    self.send(call.hub.followers, message)
            messages, self._outbox = self._outbox, []
            await self._wire.publish(messages)

    async def _write(self) -> list[tuple[_Call, str]]:
        """Write what grew, as far as the wire takes it; return what may be shown of it."""
        keys, self._dirty = list(self._dirty), {}
        grown: list[tuple[_Call, str]] = []
        tails: list[tuple[str, int, bytes]] = []
        takes = self._wire.available
        for key in keys:
            call = self._calls.get(key)
            if call is None or call.hub.called_seq != call.called_seq:
                continue
            text = call.hub.text
            if len(text) > call.shown:
                grown.append((call, text[call.shown :]))
            if takes and len(text) > call.sent:
                body = text[call.sent :].encode()
                name = tail_key(call.tenant, call.session_id, call.called_seq)
                tails.append((name, call.sent_bytes, body))
                call.sent = len(text)
                call.sent_bytes += len(body)
        if not keys:
            return grown
        if takes and (not tails or await self._wire.write_tails(tails)):
            self._away_since = None
            return grown
        self._write_all_again()
        now = asyncio.get_running_loop().time()
        if self._away_since is None:
            self._away_since = now
        return grown if now - self._away_since >= self._hold_s else []

    def _write_all_again(self) -> None:
        """Write all texts anew in a while: the wire may have lost what it had, and a part behind
        a hole would be worth nothing."""
        for call in self._calls.values():
            call.sent = call.sent_bytes = 0
        if not self._again_soon:
            self._again_soon = True
            asyncio.get_running_loop().call_later(_AGAIN_S, self._begin_again)

    def _begin_again(self) -> None:
        self._again_soon = False
        self._dirty.update((key, None) for key, call in self._calls.items() if call.hub.text)
        if self._dirty:
            self._wake()
