"""Turn the items of a session's stream into OpenAI's response events and objects: pure.

A response is a turn. ``sequence_number`` is its cursor: monotonic, and computed from the journal
alone, so that any host gives the same numbers to the same events::

    (seq of the journal's event - seq of turn.accepted) * 2**24 + k        its k-th event
    (seq of model.called        - seq of turn.accepted) * 2**24 + 16 + n   a delta that ends n
                                                                           characters into the step

How the text of a step was cut into deltas is not kept, only how far a number says it had come;
so whoever resumes behind a number gets exactly the text that follows it.

An attempt that broke off is told by ``agentray.model.fallback`` if it had shown text: its number
is one of ``model.voided``, although it is only said when the next model is known.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from agentray.errors import CursorError
from agentray.events import (
    ModelCalled,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    ToolCalled,
    ToolFinished,
    TurnAccepted,
    TurnFinished,
)
from agentray.http.objects import (
    ContentPartAdded,
    ContentPartDone,
    ConversationMessage,
    Item,
    ItemStatus,
    McpArgumentsDone,
    McpCall,
    McpCallCompleted,
    McpCallFailed,
    McpCallInProgress,
    McpToolError,
    ModelFallback,
    OutputItemAdded,
    OutputItemDone,
    OutputText,
    Response,
    ResponseCompleted,
    ResponseCreated,
    ResponseEvent,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseQueued,
    ResponseStatus,
    TextDelta,
    TextDone,
)
from agentray.http.response_object import ended, message_id
from agentray.sessions.base import Delta, StreamItem

__all__ = ["ResponseFold", "attempt_number"]

SEQ_SHIFT = 24
DELTA_BASE = 16
# Behind the three events that close an item.
_FALLBACK = 3


def attempt_number(sequence_number: int) -> int:
    """Return how many events behind ``turn.accepted`` the cause of an event lies."""
    return sequence_number >> SEQ_SHIFT


class _OpenMessage:
    """The message that is being streamed: ``known`` characters of it are."""

    __slots__ = ("id", "index", "known", "parts")

    def __init__(self, item_id: str, index: int) -> None:
        self.id = item_id
        self.index = index
        self.known = 0
        self.parts: list[str] = []


class ResponseFold:
    """Fold the items of one turn, from its first on, into OpenAI's events.

    ``after`` is the number behind which a client resumes: what it has is left out, text cut at
    the character. ``response`` is what the response has come to at any time, ``last_number`` the
    number of the last event returned.
    """

    __slots__ = (
        "_after",
        "_base",
        "_calls",
        "_created",
        "_events",
        "_fallback",
        "_first",
        "_items",
        "_message",
        "_model",
        "_relative",
        "_response",
        "_turn_id",
        "done",
        "last_number",
    )

    def __init__(self, response: Response, turn_id: str, *, after: int = -1) -> None:
        self._response = response
        self._turn_id = turn_id
        self._after = after
        self._first = 0
        self._relative = 0
        self._base = 0
        self._items: list[Item] = []
        self._message: _OpenMessage | None = None
        self._model = ""
        self._fallback: ModelFallback | None = None
        self._calls: dict[str, int] = {}
        self._created = False
        self._events: list[ResponseEvent] = []
        self.last_number = max(after, 0)
        self.done = False

    @property
    def response(self) -> Response:
        items = list(self._items)
        if (message := self._message) is not None:
            items[message.index] = self._written(message, "in_progress", "".join(message.parts))
        return replace(self._response, output=items)

    def queued(self) -> list[ResponseEvent]:
        """Return what to say while the turn has not begun: it was created and waits."""
        if self._created:
            return []
        self._created = True
        response = self._response
        self._emit(ResponseCreated(sequence_number=0, response=response))
        self._emit(ResponseQueued(sequence_number=1, response=replace(response, status="queued")))
        return self._taken()

    def feed(self, items: Iterable[StreamItem]) -> list[ResponseEvent]:
        """Return the events that these items cause.

        Raises:
            CursorError: the text that ``after`` counts was lost with its owner, and the answer
                went on from an earlier place.
        """
        for item in items:
            if isinstance(item, Delta):
                if item.seq - self._first == self._relative:
                    self._text(item.text, item.offset)
            else:
                self._event(item)
        return self._taken()

    def _taken(self) -> list[ResponseEvent]:
        events = self._events
        if events:
            self._events = []
            self.last_number = events[-1].sequence_number
        return events

    def _emit(self, event: ResponseEvent) -> None:
        if event.sequence_number > self._after:
            self._events.append(event)

    def _event(self, event: StreamItem) -> None:
        number = (event.seq - self._first) << SEQ_SHIFT
        match event:
            case ModelCalled():
                self._calls.clear()  # ids of calls are unique within a step only
                self._model = event.model
                if (fallback := self._fallback) is not None:
                    self._fallback = None
                    self._emit(replace(fallback, to_model=event.model))
                self._relative = event.seq - self._first
                self._base = number + DELTA_BASE
            case ModelFinished():
                cut = event.finish_reason in ("length", "content_filter")
                if event.text or not event.tool_calls:
                    self._open()
                self._rest(event.text)
                self._close(number, "incomplete" if cut else "completed", event.text)
            case ModelVoided(continues=True):
                self._continue(event.text)
                self._broken_off(number, event)
            case ModelVoided():
                self._rest(event.text)
                self._broken_off(number, event)
                self._close(number, "incomplete", event.text)
            case ModelFailed():
                self._rest(event.text)
                self._close(number, "incomplete", event.text)
            case ToolCalled():
                self._tool_called(number, event)
            case ToolFinished():
                self._tool_finished(number, event)
            case TurnAccepted():
                self._accepted(event)
            case TurnFinished():
                self._finished(number, event)
            case _:
                pass

    def _accepted(self, event: TurnAccepted) -> None:
        self._first = event.seq
        model = event.options.model or event.agent
        self._response = response = replace(self._response, status="in_progress", model=model)
        if not self._created:
            self._created = True
            self._emit(ResponseCreated(sequence_number=0, response=response))
        self._emit(ResponseInProgress(sequence_number=2, response=response))

    def _open(self) -> _OpenMessage:
        message = self._message
        if message is None:
            item_id, index = message_id(self._turn_id, self._relative), len(self._items)
            self._message = message = _OpenMessage(item_id, index)
            empty = ConversationMessage(item_id, "in_progress", [])
            self._items.append(empty)
            # The numbers of model.called, although the item shows only with its first text: a
            # step that only calls tools has no message.
            number = self._relative << SEQ_SHIFT
            self._emit(OutputItemAdded(sequence_number=number, output_index=index, item=empty))
            self._emit(
                ContentPartAdded(
                    sequence_number=number + 1,
                    item_id=item_id,
                    output_index=index,
                    part=OutputText(""),
                )
            )
        return message

    def _text(self, text: str, end: int) -> None:
        """Add text that ends ``end`` characters into the step, as far as it is new."""
        message = self._message or self._open()
        known = message.known
        start = end - len(text)
        # Behind a hole nothing can be shown: the event that ends the attempt has the whole text.
        if end <= known or start > known:
            return
        if start < known:
            text = text[known - start :]
        message.known = end
        message.parts.append(text)
        number = self._base + end
        after = self._after
        if number > after:
            if after - self._base > known:
                text = text[after - self._base - known :]
            self._events.append(TextDelta(number, message.id, message.index, text))

    def _rest(self, text: str) -> None:
        if text:
            self._text(text, len(text))

    def _continue(self, text: str) -> None:
        shown = self._message.known if self._message else 0
        if self._after >> SEQ_SHIFT == self._relative:
            shown = max(shown, self._after - self._base)
        if shown > len(text):
            raise CursorError(
                "the text before this cursor was lost with its host and written anew: "
                "retrieve the response from its beginning",
                param="starting_after",
            )
        self._rest(text)

    def _broken_off(self, number: int, event: ModelVoided) -> None:
        """Keep what is to be said of an attempt whose text is seen, until the next begins."""
        message = self._message
        if message is None:
            return
        self._fallback = ModelFallback(
            sequence_number=number + _FALLBACK,
            item_id=message.id,
            output_index=message.index,
            reason=event.reason,
            continues=event.continues,
            from_model=event.model or self._model,
            to_model="",
        )

    def _close(self, number: int, status: ItemStatus, text: str) -> None:
        self._relative = -1  # text of this attempt that is still on its way is known now
        message = self._message
        if message is None:
            return
        # A host that lost its tail keeps less than it showed: what was shown stays.
        if len(text) < message.known:
            text = "".join(message.parts)
        self._message = None
        item = self._written(message, status, text)
        self._items[message.index] = item
        item_id, index = message.id, message.index
        self._emit(TextDone(sequence_number=number, item_id=item_id, output_index=index, text=text))
        self._emit(
            ContentPartDone(
                sequence_number=number + 1,
                item_id=item_id,
                output_index=index,
                part=OutputText(text),
            )
        )
        self._emit(OutputItemDone(sequence_number=number + 2, output_index=index, item=item))

    def _written(self, message: _OpenMessage, status: ItemStatus, text: str) -> ConversationMessage:
        return ConversationMessage(message.id, status, [OutputText(text)])

    def _tool_called(self, number: int, event: ToolCalled) -> None:
        if event.call_id in self._calls:  # tried again after a crash: the same item
            return
        index = len(self._items)
        item_id = f"mcp_{self._turn_id}_{event.seq - self._first}"
        item = McpCall(item_id, event.name, event.arguments, "in_progress")
        self._calls[event.call_id] = index
        self._items.append(item)
        self._emit(OutputItemAdded(sequence_number=number, output_index=index, item=item))
        self._emit(
            McpCallInProgress(sequence_number=number + 1, item_id=item_id, output_index=index)
        )
        self._emit(
            McpArgumentsDone(
                sequence_number=number + 2,
                item_id=item_id,
                output_index=index,
                arguments=event.arguments,
            )
        )

    def _tool_finished(self, number: int, event: ToolFinished) -> None:
        index = self._calls[event.call_id]
        open_item = self._items[index]
        assert isinstance(open_item, McpCall)
        if event.status == "ok":
            item = replace(open_item, status="completed", output=event.output)
        else:
            item = replace(open_item, status="failed", error=McpToolError(event.output))
        ending = McpCallCompleted if event.status == "ok" else McpCallFailed
        self._emit(ending(sequence_number=number, item_id=item.id, output_index=index))
        self._items[index] = item
        self._emit(OutputItemDone(sequence_number=number + 1, output_index=index, item=item))

    def _finished(self, number: int, event: TurnFinished) -> None:
        self._close(number, "incomplete", "")
        number += 3
        for index, item in enumerate(self._items):
            if item.status == "in_progress" and isinstance(item, McpCall):
                cut = replace(item, status="incomplete")
                self._items[index] = cut
                self._emit(OutputItemDone(sequence_number=number, output_index=index, item=cut))
                number += 1
        response = replace(self._response, output=list(self._items))
        response = ended(response, event.status, event.error, event.usage, event.at)
        self._response = response
        self.done = True
        ending = _ENDINGS.get(response.status, ResponseIncomplete)
        self._emit(ending(sequence_number=number, response=response))


_ENDINGS: dict[
    ResponseStatus, type[ResponseCompleted] | type[ResponseFailed] | type[ResponseIncomplete]
] = {"completed": ResponseCompleted, "failed": ResponseFailed}
