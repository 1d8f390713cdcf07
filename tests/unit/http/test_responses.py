from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai._models import construct_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from agentray.errors import CursorError
from agentray.events import (
    ModelCalled,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    ToolCall,
    ToolCalled,
    ToolFinished,
    TurnAccepted,
    TurnError,
    TurnFinished,
    TurnOptions,
    Usage,
)
from agentray.http.objects import (
    ConversationMessage,
    ModelFallback,
    OutputItemDone,
    OutputText,
    Response,
    ResponseEvent,
    TextDelta,
    TextDone,
)
from agentray.http.response_object import begin, one_message
from agentray.http.responses import ResponseFold
from agentray.sessions.base import Delta, StreamItem
from tests.unit.http.turns import SESSION, TURN, Script, cut_again, scripts, turn_info

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def fold(items: list[StreamItem], after: int = -1) -> tuple[list[ResponseEvent], Response]:
    """Fold one item at a time, as they come live."""
    folded = ResponseFold(begin(SESSION, turn_info(), agent="assistant"), TURN, after=after)
    events = [event for item in items for event in folded.feed([item])]
    return events, folded.response


def texts(events: list[ResponseEvent]) -> dict[str, str]:
    found: dict[str, str] = defaultdict(str)
    for event in events:
        if isinstance(event, TextDelta):
            found[event.item_id] += event.delta
    return found


def others(events: list[ResponseEvent]) -> list[ResponseEvent]:
    return [event for event in events if not isinstance(event, TextDelta)]


@given(scripts())
def test_numbers_only_grow_and_fit_a_double(script: Script) -> None:
    events, _ = fold(script.items)
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert numbers[-1] < 2**53


@given(scripts())
def test_the_deltas_put_together_are_the_final_texts(script: Script) -> None:
    events, response = fold(script.items)
    done = {event.item_id: event.text for event in events if isinstance(event, TextDone)}
    assert {key: text for key, text in done.items() if text} == texts(events)
    messages = [item for item in response.output if isinstance(item, ConversationMessage)]
    shown = {
        message.id: "".join(part.text for part in message.content if isinstance(part, OutputText))
        for message in messages
    }
    assert shown == done


@given(scripts(), st.data())
def test_whoever_resumes_gets_exactly_what_is_missing(script: Script, data: st.DataObject) -> None:
    # What was seen until the connection broke, with the deltas cut in one way …
    seen, _ = fold(cut_again(script.items, data))
    count = data.draw(st.integers(1, len(seen)))
    seen = seen[:count]
    # … and what another host shows behind that number, with them cut in another way.
    rest, response = fold(cut_again(script.items, data), after=seen[-1].sequence_number)
    whole, expected = fold(script.items)
    assert others(seen) + others(rest) == others(whole)
    together = texts(seen)
    for item_id, text in texts(rest).items():
        together[item_id] = together.get(item_id, "") + text
    assert together == texts(whole)
    assert response == expected


@given(scripts())
def test_the_journal_alone_gives_the_same_response(script: Script) -> None:
    _, live = fold(script.items)
    _, later = fold([*script.events])
    assert live == later


@given(scripts())
def test_the_openai_package_accepts_every_event_and_puts_them_together(script: Script) -> None:

    state = ResponseStreamState(input_tools=[], text_format=omit)
    events, response = fold(script.items)
    for event in events:
        if isinstance(event, ModelFallback):
            # Not one of OpenAI's: its client lets what it does not know through.
            parsed: Any = construct_type(
                type_=ResponseStreamEvent, value=msgspec.to_builtins(event)
            )
            assert parsed.type == "agentray.model.fallback"
            assert parsed.to_dict() == msgspec.to_builtins(event)
        else:
            parsed = EVENTS.validate_json(msgspec.json.encode(event))
            assert not parsed.model_extra or parsed.type == "error"
        state.handle_event(parsed)
    OpenAIResponse.model_validate_json(msgspec.json.encode(response), strict=True)


def test_a_plain_answer_is_told_without_its_events() -> None:
    script = Script(first=7)
    script.add(TurnAccepted, input=[], agent="assistant")
    called = script.add(ModelCalled, step=1, attempt=1, model="m")
    script.show(called, 0, ["Hel"])
    script.add(ModelFinished, step=1, attempt=1, text="Hello", finish_reason="stop")
    script.add(TurnFinished, status="completed", usage=Usage(9, 2, 4))
    turn = turn_info(
        state="done",
        status="completed",
        first_seq=7,
        last_seq=10,
        text="Hello",
        usage=Usage(9, 2, 4),
        finished_at=script.events[-1].at,
    )
    _, response = fold(script.items)
    assert one_message(begin(SESSION, turn, agent="a"), turn) == response
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 4


def test_text_that_came_only_with_the_answer_is_one_delta() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    script.add(ModelCalled, step=1, attempt=1, model="m")
    script.add(ModelFinished, step=1, attempt=1, text="Hello", finish_reason="stop")
    events, _ = fold(script.items)
    assert [event.delta for event in events if isinstance(event, TextDelta)] == ["Hello"]
    types = [event.__struct_config__.tag for event in events]
    assert types == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]


def test_a_step_that_only_calls_tools_has_no_message() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    script.add(ModelCalled, step=1, attempt=1, model="m")
    call = ToolCall("call_1", "echo", '{"text": "x"}')
    script.add(
        ModelFinished,
        step=1,
        attempt=1,
        text="",
        finish_reason="tool_calls",
        tool_calls=[call],
    )
    script.add(ToolCalled, call_id="call_1", name="echo", arguments=call.arguments)
    script.add(ToolFinished, call_id="call_1", name="echo", status="ok", output="x")
    _, response = fold(script.items)
    (item,) = msgspec.to_builtins(response.output)
    assert item["type"] == "mcp_call"
    assert (item["name"], item["arguments"], item["output"]) == ("echo", call.arguments, "x")
    assert item["status"] == "completed"


def test_an_attempt_that_is_not_continued_closes_its_item_and_the_next_opens_one() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    called = script.add(ModelCalled, step=1, attempt=1, model="m")
    script.show(called, 0, ["One "])
    voided = script.add(ModelVoided, step=1, attempt=1, reason="stalled", text="One two")
    called = script.add(ModelCalled, step=1, attempt=2, model="other")
    script.show(called, 0, ["Uno "])
    script.add(ModelFinished, step=1, attempt=2, text="Uno dos", finish_reason="stop")
    events, _ = fold(script.items)
    done = [event.item for event in events if isinstance(event, OutputItemDone)]
    assert [item.status for item in done] == ["incomplete", "completed"]
    assert list(texts(events).values()) == ["One two", "Uno dos"]
    (told,) = [event for event in events if isinstance(event, ModelFallback)]
    assert told == ModelFallback(
        sequence_number=(voided - 1) * 2**24 + 3,
        item_id=done[0].id,
        output_index=0,
        reason="stalled",
        continues=False,
        from_model="m",
        to_model="other",
    )
    tags = [event.__struct_config__.tag for event in events]
    assert tags[tags.index("agentray.model.fallback") - 1] == "response.output_item.done"
    assert tags[tags.index("agentray.model.fallback") + 1] == "response.output_item.added"


def test_a_continued_attempt_goes_on_in_the_same_item() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    called = script.add(ModelCalled, step=1, attempt=1, model="m")
    script.show(called, 0, ["One "])
    script.add(ModelVoided, step=1, attempt=1, reason="o", text="One two ", continues=True)
    called = script.add(ModelCalled, step=1, attempt=2, model="m", continued_from=8)
    script.show(called, 8, ["three"])
    script.add(ModelFinished, step=1, attempt=2, text="One two three", finish_reason="stop")
    events, _ = fold(script.items)
    deltas = [event.delta for event in events if isinstance(event, TextDelta)]
    assert deltas == ["One ", "two ", "three"]
    assert len(texts(events)) == 1
    (told,) = [event for event in events if isinstance(event, ModelFallback)]
    assert (told.continues, told.reason, told.from_model, told.to_model) == (True, "o", "m", "m")
    behind = events[events.index(told) + 1]
    assert isinstance(behind, TextDelta)
    assert (behind.delta, behind.item_id) == ("three", told.item_id)


def test_an_attempt_that_had_shown_nothing_leaves_no_trace() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    script.add(ModelCalled, step=1, attempt=1, model="m")
    script.add(ModelVoided, step=1, attempt=1, reason="model_unavailable")
    script.add(ModelCalled, step=1, attempt=2, model="other")
    script.add(ModelFinished, step=1, attempt=2, text="Hello", finish_reason="stop")
    script.add(TurnFinished, status="completed")
    plain = Script()
    plain.add(TurnAccepted, input=[], agent="assistant")
    plain.add(ModelCalled, step=1, attempt=1, model="other")
    plain.add(ModelFinished, step=1, attempt=1, text="Hello", finish_reason="stop")
    plain.add(TurnFinished, status="completed")
    kinds = [[event.__struct_config__.tag for event in fold(s.items)[0]] for s in (script, plain)]
    assert kinds[0] == kinds[1]


def test_no_fallback_is_told_of_a_turn_that_ended_before_another_model_was_called() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    called = script.add(ModelCalled, step=1, attempt=1, model="m")
    script.show(called, 0, ["One "])
    script.add(ModelVoided, step=1, attempt=1, reason="cancelled", text="One ")
    script.add(TurnFinished, status="cancelled")
    events, _ = fold(script.items)
    assert not [event for event in events if isinstance(event, ModelFallback)]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (TurnOptions(), {"type": "text"}),
        (TurnOptions(output_schema={"type": "object"}), {"type": "json_object"}),
        (
            TurnOptions(
                output_schema={"type": "string"}, output_form={"name": "word", "strict": True}
            ),
            {
                "type": "json_schema",
                "name": "word",
                "schema": {"type": "string"},
                "strict": True,
                "description": None,
            },
        ),
        (
            # As a native turn asks for it.
            TurnOptions(output_schema={"type": "string"}),
            {
                "type": "json_schema",
                "name": "answer",
                "schema": {"type": "string"},
                "strict": None,
                "description": None,
            },
        ),
    ],
)
def test_a_response_says_which_form_was_asked_for(
    options: TurnOptions, shown: dict[str, Any]
) -> None:
    response = begin(SESSION, turn_info(options=options), agent="assistant")
    encoded = msgspec.json.encode(response)
    assert msgspec.json.decode(encoded)["text"] == {"format": shown}
    OpenAIResponse.model_validate_json(encoded, strict=True)


def test_a_hole_in_the_tail_is_filled_when_the_answer_is_whole() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    called = script.add(ModelCalled, step=1, attempt=1, model="m")
    script.items.append(Delta(TURN, called, 3, "one"))
    script.items.append(Delta(TURN, called, 11, "three"))
    script.add(ModelFinished, step=1, attempt=1, text="one23three4", finish_reason="stop")
    events, _ = fold(script.items)
    deltas = [event.delta for event in events if isinstance(event, TextDelta)]
    assert deltas == ["one", "23three4"]


def test_text_that_comes_late_is_not_said_twice() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    called = script.add(ModelCalled, step=1, attempt=1, model="m")
    script.add(ModelFinished, step=1, attempt=1, text="Hello", finish_reason="stop")
    script.items.append(Delta(TURN, called, 5, "Hello"))
    events, response = fold(script.items)
    assert list(texts(events).values()) == ["Hello"]
    assert len(response.output) == 1


def test_a_cursor_in_text_that_was_lost_is_refused_when_the_answer_went_on_without_it() -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    called = script.add(ModelCalled, step=1, attempt=1, model="m")
    script.show(called, 0, ["One two three"])
    seen, _ = fold(script.items)
    journal = Script()
    journal.items = list(script.events)
    journal.add(ModelVoided, step=1, attempt=1, reason="o", text="One ", continues=True)
    with pytest.raises(CursorError):
        fold(journal.items, after=seen[-1].sequence_number)


@pytest.mark.parametrize(
    ("code", "expected"),
    [("model_rate_limited", "rate_limit_exceeded"), ("model_unavailable", "server_error")],
)
def test_a_failure_says_openais_code_and_ours(code: str, expected: str) -> None:
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    script.add(ModelCalled, step=1, attempt=1, model="m")
    script.add(ModelFailed, step=1, attempt=1, error=TurnError(code, "no"))
    script.add(TurnFinished, status="failed", error=TurnError(code, "no"))
    events, response = fold(script.items)
    assert events[-1].__struct_config__.tag == "response.failed"
    assert response.error is not None
    assert (response.error.code, response.error.type) == (expected, code)


def test_a_turn_that_waits_is_created_once() -> None:
    waiting = ResponseFold(begin(SESSION, turn_info(state="accepted"), agent="assistant"), TURN)
    script = Script()
    script.add(TurnAccepted, input=[], agent="assistant")
    events = [*waiting.queued(), *waiting.queued(), *waiting.feed(script.items)]
    assert [event.__struct_config__.tag for event in events] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert [event.sequence_number for event in events] == [0, 1, 2]


@given(scripts())
def test_every_tool_call_is_one_item_and_nothing_stays_in_progress(script: Script) -> None:
    _, response = fold(script.items)
    asked = [
        (event.step, call.call_id)
        for event in script.events
        if isinstance(event, ModelFinished)
        for call in event.tool_calls
    ]
    begun = {event.call_id for event in script.events if isinstance(event, ToolCalled)}
    shown = [item for item in response.output if not isinstance(item, ConversationMessage)]
    assert len(shown) == len(asked)
    assert begun == {call_id for _, call_id in asked}
    assert "in_progress" not in {item.status for item in response.output}
