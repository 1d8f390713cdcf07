"""The live end of a stream: every reader gets each event once, and text without a seam."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentray.events import (
    AnyEvent,
    ModelCalled,
    ModelFinished,
    ModelVoided,
    TurnAccepted,
    TurnFinished,
    TurnResumed,
    encode_event,
)
from agentray.sessions.base import Cursor, Delta, StreamItem, item_cursor
from agentray.sessions.stream import Hub, TailWriter, WireMessage, tail_key
from agentray.storage.base import Wire

# One session, told in bytes

Choices = list[int]


class Told:
    """A session's owner with its hub, the journal, a hub of another process, and readers of both.

    Messages to the other process arrive in order or not at all.
    """

    def __init__(self, choices: bytes) -> None:
        self.choices = list(choices)
        self.journal: list[AnyEvent] = []
        self.owner, self.mirror = Hub(), Hub()
        self.owner.local = True
        self.wire: list[WireMessage] = []
        self.readers: list[Reader] = []
        self.running = False

    def choose(self, options: int) -> int:
        return self.choices.pop(0) % options if self.choices else 0

    def happen(self) -> None:
        what = self.choose(12)
        if what < 3:
            self.write()
        elif what < 6 and self.owner.called_seq:
            self.stream()
        elif what < 8:
            self.deliver()
        elif what == 8:
            self.fill()
        elif what == 9:
            self.join()
        elif self.readers:
            self.readers[self.choose(len(self.readers))].read()

    def write(self) -> None:
        """Let the next events land in the journal, then in the owner's hub and on the wire."""
        at: dict[str, Any] = {"seq": len(self.journal) + 1, "turn_id": "t", "at": 0.0}
        last = self.journal[-1] if self.journal else None
        step: dict[str, Any] = {"step": 1, "attempt": 1}
        events: list[AnyEvent]
        if last is None or isinstance(last, TurnFinished):
            # As Residents does: a turn has the hub to itself.
            self.owner.rebase(len(self.journal))
            call = ModelCalled(**{**at, "seq": at["seq"] + 1}, **step, model="m")
            events = [TurnAccepted(**at, input=[], agent="a"), call]
        elif isinstance(last, ModelCalled):
            text = self.known + self.owner.text
            if self.choose(2):
                # As behind a takeover.
                resumed = TurnResumed(**at, phase="model", epoch=2, owner="o")
                at["seq"] += 1
                voided = ModelVoided(**at, **step, reason="r", text=text, continues=True)
                again = {"continued_from": len(text), "model": "m"}
                events = [resumed, voided]
                events += [ModelCalled(**{**at, "seq": at["seq"] + 1}, **step, **again)]
                self.known = text
            else:
                end = TurnFinished(**{**at, "seq": at["seq"] + 1}, status="completed")
                finished = ModelFinished(**at, **step, text=text, finish_reason="stop")
                events = [finished, end]
                self.known = ""
        else:
            raise AssertionError(last)
        self.journal += events
        self.owner.feed(events)
        raw = [msgspec.Raw(encode_event(event)) for event in events]
        self.wire.append(WireMessage("live", "t", "s", events=raw))

    known = ""
    """Text of the step before the running call."""

    def stream(self) -> None:
        """Add text, or show what was added."""
        hub = self.owner
        if self.choose(2) or not hub.text:
            piece = f"{hub.called_seq}:{len(hub.text)};"
            hub.append_text(piece)
            return
        start = hub.visible
        text = hub.text[start:]
        hub.show(hub.called_seq, len(hub.text))
        self.wire.append(
            WireMessage(
                "live",
                "t",
                "s",
                called_seq=hub.called_seq,
                start=hub.start + start,
                text=text,
            )
        )

    def deliver(self) -> None:
        """Bring the next message to the other process, or lose it."""
        if self.wire:
            message = self.wire.pop(0)
            if self.choose(3) < 2 and not self.mirror.apply(message):
                assert self.mirror.apply(self.owner.snapshot("t", "s"))

    def fill(self) -> None:
        """Feed the other process from the journal."""
        self.mirror.feed(self.journal[self.mirror.last_seq :])

    def join(self) -> None:
        """Let somebody begin to read, from anywhere in what there is."""
        seq = self.choose(len(self.journal) + 1)
        cursor = Cursor(0)
        for event in self.journal[:seq]:
            cursor = item_cursor(event, cursor)
        hub = self.owner if self.choose(2) else self.mirror
        self.readers.append(Reader(self, hub, cursor))

    def settle(self) -> None:
        while not self.journal or not isinstance(self.journal[-1], TurnFinished):
            self.write()
        while self.wire:
            self.deliver()
        self.fill()
        for reader in self.readers:
            while reader.read():
                pass


class Reader:
    """What ``Following`` does for one caller, and what it must never see."""

    def __init__(self, told: Told, hub: Hub, cursor: Cursor) -> None:
        self.told, self.hub, self.cursor = told, hub, cursor
        self.seqs = [cursor.seq]
        self.texts: dict[int, str] = {}
        self.called_seq = 0

    def read(self) -> bool:
        items: Sequence[StreamItem] | None = self.hub.read(self.cursor)
        if items is None:
            items = self.told.journal[self.cursor.seq : self.hub.base_seq]
        for item in items:
            self.take(item)
        return bool(items)

    def take(self, item: StreamItem) -> None:
        behind = item_cursor(item, self.cursor)
        assert behind > self.cursor, "the stream goes back"
        if isinstance(item, Delta):
            assert item.seq == self.seqs[-1], "text of a call that is not the last event"
            assert item.offset - len(item.text) == self.cursor.offset, "text with a seam"
            self.texts[item.seq] = self.texts.get(item.seq, "") + item.text
        else:
            assert item.seq == self.seqs[-1] + 1, "an event twice, or never"
            assert item == self.told.journal[item.seq - 1]
            self.seqs.append(item.seq)
            if isinstance(item, ModelFinished | ModelVoided):
                # Of the step's text, the reader has what it streamed of this call.
                streamed = self.texts.get(self.called_seq, "")
                assert streamed in item.text
                assert item.text[: self.cursor.offset].endswith(streamed)
            elif isinstance(item, ModelCalled):
                self.called_seq = item.seq
        self.cursor = behind


@given(st.integers(0, 300).flatmap(lambda size: st.binary(min_size=size, max_size=size)))
def test_each_reader_gets_every_event_once_and_text_without_a_seam(choices: bytes) -> None:
    told = Told(choices)
    told.join()
    while told.choices:
        told.happen()
    told.settle()
    for reader in told.readers:
        assert reader.seqs[-1] == len(told.journal)


def called(seq: int, continued_from: int = 0) -> ModelCalled:
    return ModelCalled(
        seq=seq, turn_id="t", at=0.0, step=1, attempt=1, model="m", continued_from=continued_from
    )


def test_text_is_not_read_before_it_is_shown() -> None:
    hub = Hub()
    hub.feed([called(1)])
    hub.append_text("abc")
    assert hub.read(Cursor(1)) == []
    hub.show(1, 2)
    assert hub.read(Cursor(1)) == [Delta("t", 1, 2, "ab")]
    assert hub.read(Cursor(1, 1)) == [Delta("t", 1, 2, "b")]


def test_text_of_a_call_that_goes_on_begins_where_the_one_before_ended() -> None:
    hub = Hub()
    hub.feed([called(1, continued_from=10)])
    hub.append_text("abc")
    hub.show(1, 3)
    assert hub.read(Cursor(1, 10)) == [Delta("t", 1, 13, "abc")]
    assert hub.read(Cursor(1, 12)) == [Delta("t", 1, 13, "c")]


def test_a_reader_ahead_of_a_mirror_is_told_nothing_old() -> None:
    hub = Hub()
    hub.feed([called(1)])
    hub.append_text("abc")
    hub.show(1, 3)
    assert hub.read(Cursor(4)) == []


def test_text_behind_a_gap_is_refused() -> None:
    hub = Hub()
    hub.feed([called(1)])
    assert hub.feed_text(1, 0, "abc")
    assert not hub.feed_text(1, 5, "fg")
    assert hub.feed_text(1, 2, "cde")
    assert hub.text == "abcde"


def test_events_that_are_known_leave_the_running_text_alone() -> None:
    hub = Hub()
    hub.feed([called(1)])
    hub.append_text("abc")
    hub.show(1, 3)
    hub.feed([called(1)])
    assert hub.read(Cursor(1)) == [Delta("t", 1, 3, "abc")]


@pytest.mark.parametrize("local", [False, True])
def test_a_hub_that_others_feed_forgets_the_turn_before(local: bool) -> None:
    def turn(seq: int) -> list[AnyEvent]:
        return [TurnAccepted(seq=seq, turn_id="t", at=0.0, input=[], agent="a"), called(seq + 1)]

    hub = Hub()
    hub.local = local
    hub.feed([*turn(1), *turn(3)])
    hub.feed(turn(5))
    # Ours begins its turns with a rebase.
    assert hub.events == (turn(5) if not local else [*turn(1), *turn(3), *turn(5)])
    assert hub.last_seq == 6
    assert hub.read(Cursor(4)) == turn(5)
    assert hub.read(Cursor(3)) == (None if not local else [called(4), *turn(5)])


def test_a_follower_that_begins_is_told_what_is_shown_and_no_more() -> None:
    hub, mirror = Hub(), Hub()
    hub.feed([called(1, continued_from=4)])
    hub.append_text("abc")
    hub.show(1, 2)
    assert mirror.apply(hub.snapshot("t", "s"))
    assert mirror.read(Cursor(0)) == [called(1, continued_from=4), Delta("t", 1, 6, "ab")]


def test_a_cursor_never_goes_back() -> None:
    """The rest of a lost call's text comes behind the takeover that found it."""
    resumed = TurnResumed(seq=2, turn_id="t", at=0.0, phase="streaming", epoch=2, owner="o")
    cursor = Cursor(0)
    for item in (called(1), Delta("t", 1, 3, "abc"), resumed, Delta("t", 1, 5, "de")):
        behind = item_cursor(item, cursor)
        assert behind > cursor
        cursor = behind
    assert cursor == Cursor(2, 5)


async def test_a_change_wakes_all_who_wait_but_those_who_left() -> None:
    hub = Hub()
    loop = asyncio.get_running_loop()
    first, second, leaver = (loop.create_task(hub.changed()) for _ in range(3))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.sleep(0)
    hub.feed([called(1)])
    await asyncio.wait([first, second, leaver], timeout=5)
    assert leaver.cancelled()
    assert first.done()
    assert second.done()
    later = loop.create_task(hub.changed())
    await asyncio.sleep(0)
    assert not later.done()
    hub.notify()
    await later


# What goes to the wire


class PlainWire:
    """A wire in memory that keeps the order of what happens."""

    available = True

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.works = True
        self.written = asyncio.Event()

    async def write_tails(self, tails: Sequence[tuple[str, int, bytes]]) -> bool:
        await asyncio.sleep(0)
        self.log += [("tail", tail) for tail in tails]
        if self.works:
            self.written.set()
        return self.works

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        await asyncio.sleep(0)
        for owner, body in messages:
            message = msgspec.json.decode(body, type=WireMessage)
            self.log.append((owner, message.text or message.kind))


class Streaming:
    """A call whose text is on its way."""

    def __init__(self, hold_s: float = 3_600.0) -> None:
        self.wire = PlainWire()
        self.confirmed: list[Any] = []
        self.tails = TailWriter(cast(Wire, self.wire), self.confirm, hold_s=hold_s)
        self.hub = Hub()
        self.hub.local = True
        self.hub.feed([called(1)])
        self.tails.begin("t", "s", self.hub)

    async def confirm(self) -> None:
        self.confirmed.append((list(self.wire.log), self.hub.visible))
        for _ in range(3):
            await asyncio.sleep(0)

    def say(self, text: str) -> None:
        self.hub.append_text(text)
        self.tails.grew("t", "s")


@pytest.fixture
def streaming() -> Streaming:
    return Streaming()


KEY = tail_key("t", "s", 1)


async def test_text_is_shown_when_the_wire_has_it_and_the_owner_is_confirmed(
    streaming: Streaming,
) -> None:
    streaming.say("äb")
    await streaming.tails.stop()
    assert streaming.confirmed == [([("tail", (KEY, 0, "äb".encode()))], 0)]
    assert streaming.hub.visible == 2
    streaming.say("cd")
    await streaming.tails.stop()
    assert streaming.wire.log[-1] == ("tail", (KEY, 3, b"cd"))
    assert streaming.hub.visible == 4


async def test_text_that_grows_meanwhile_is_the_next_batch(streaming: Streaming) -> None:
    streaming.say("a")
    await asyncio.sleep(0)
    for piece in "bcd":
        streaming.say(piece)
    await streaming.tails.stop()
    assert [what for _, what in streaming.wire.log] == [(KEY, 0, b"a"), (KEY, 1, b"bcd")]


@pytest.mark.parametrize("how", ["refuses", "away"])
async def test_a_wire_that_stays_away_stops_no_text(how: str) -> None:
    streaming = Streaming(hold_s=0.05)
    streaming.wire.works = False
    streaming.wire.available = how == "refuses"
    streaming.say("abc")
    await streaming.tails.stop()
    assert streaming.hub.visible == 0
    async with asyncio.timeout(5):
        await streaming.hub.changed()
    assert streaming.hub.visible == 3
    # It is not waited for again.
    streaming.say("d")
    await streaming.tails.stop()
    assert streaming.hub.visible == 4


async def test_what_a_wire_could_not_take_is_written_when_it_is_back(streaming: Streaming) -> None:
    streaming.say("äb")
    await streaming.tails.stop()
    streaming.wire.works = False
    streaming.say("c")
    await streaming.tails.stop()
    assert streaming.hub.visible == 2
    streaming.wire.works = True
    streaming.say("d")
    await streaming.tails.stop()
    assert streaming.wire.log[-1] == ("tail", (KEY, 0, "äbcd".encode()))
    assert streaming.hub.visible == 4


@pytest.mark.parametrize("how", ["refuses", "away"])
async def test_a_text_that_stays_as_it_is_is_written_when_the_wire_is_back(
    streaming: Streaming, how: str
) -> None:
    if how == "away":
        streaming.wire.available = False
    streaming.wire.works = False
    streaming.say("äb")
    await streaming.tails.stop()
    assert streaming.hub.visible == 0
    streaming.wire.log.clear()
    streaming.wire.available = streaming.wire.works = True
    async with asyncio.timeout(5):
        await streaming.wire.written.wait()
        while not streaming.hub.visible:
            await streaming.hub.changed()
    assert streaming.wire.log == [("tail", (KEY, 0, "äb".encode()))]
    assert streaming.hub.visible == 2


async def test_text_of_a_session_that_was_lost_meanwhile_is_not_shown(
    streaming: Streaming,
) -> None:
    streaming.hub.followers = {"o": 1.0}
    streaming.say("abc")
    await asyncio.sleep(0)
    streaming.hub.local = False
    await streaming.tails.stop()
    assert streaming.confirmed
    assert streaming.hub.visible == 0
    assert all(owner == "tail" for owner, _ in streaming.wire.log)


async def test_text_of_a_call_that_is_over_is_not_written(streaming: Streaming) -> None:
    streaming.say("abc")
    streaming.tails.end("t", "s", 1)
    await streaming.tails.stop()
    assert streaming.wire.log == []


async def test_the_late_end_of_an_old_call_leaves_the_new_one_alone(streaming: Streaming) -> None:
    streaming.hub.feed([called(2)])
    streaming.tails.begin("t", "s", streaming.hub)
    streaming.tails.end("t", "s", 1)
    streaming.say("abc")
    await streaming.tails.stop()
    assert streaming.hub.visible == 3


async def test_followers_get_text_and_messages_in_the_order_in_which_they_were_made(
    streaming: Streaming,
) -> None:
    streaming.hub.followers = {"o": 1.0}
    streaming.say("one")
    await asyncio.sleep(0)
    streaming.say("two")
    await streaming.tails.stop()
    streaming.tails.send(["o"], WireMessage("wake", "t", "s"))
    await streaming.tails.stop()
    said = [what for owner, what in streaming.wire.log if owner == "o"]
    assert said == ["one", "two", "wake"]
