"""What the simulator answers."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentray.models.simulator_script import (
    ChatRequest,
    ScriptError,
    find_script,
    plan_answer,
    prompt_tokens,
    split_text,
)


def request(*messages: tuple[str, str], **fields: Any) -> ChatRequest:
    return msgspec.convert(
        {
            "model": "simulator",
            "messages": [{"role": role, "content": content} for role, content in messages],
            **fields,
        },
        ChatRequest,
    )


def answer(*messages: tuple[str, str], **fields: Any) -> str:
    asked = request(*messages, **fields)
    return "".join(plan_answer(asked, find_script(asked.messages, asked.model), "call").pieces)


def calls(*messages: tuple[str, str]) -> list[dict[str, Any]]:
    asked = request(*messages)
    plan = plan_answer(asked, find_script(asked.messages, asked.model), "call")
    return [json.loads(call) for call in plan.calls]


def test_the_script_is_a_line_of_its_own_in_the_last_user_message() -> None:
    assert answer(("user", 'hi\n  !sim {"text": "hello"}\r\nthanks')) == "hello"
    assert answer(("user", '!sim {"text": "a"}'), ("assistant", "a"), ("user", "hi")) != "a"
    assert "hello" not in answer(("user", 'say !sim {"text": "well"}')).split()


def test_a_script_in_content_parts_is_found() -> None:
    asked = msgspec.convert(
        {
            "model": "m",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:"}},
                        {"type": "text", "text": '!sim {"text": "seen"}'},
                    ],
                }
            ],
        },
        ChatRequest,
    )
    script = find_script(asked.messages, "m")
    assert script is not None
    assert script.text == "seen"


@pytest.mark.parametrize(
    "line",
    [
        '{"text": ',
        '{"txet": "unknown key"}',
        '{"tokens": "many"}',
        '{"tokens": 0}',
        '{"tps": 0}',
        '{"status": 200}',
        '{"tools": [{}]}',
        '{"text": "a"} and more',
    ],
)
def test_a_script_that_cannot_be_followed_is_refused(line: str) -> None:
    with pytest.raises(ScriptError, match="cannot be followed"):
        find_script(request(("user", f"!sim {line}")).messages, "simulator")


def test_on_restricts_a_script_to_one_model() -> None:
    text = '!sim {"on": "small", "text": "s"}\n!sim {"on": "large", "text": "l"}'
    messages = request(("user", text)).messages
    for model, said in (("small", "s"), ("large", "l")):
        script = find_script(messages, model)
        assert script is not None
        assert script.text == said
    assert find_script(messages, "other") is None


@given(st.text(max_size=200), st.integers(1, 60))
def test_tokens_is_the_number_of_pieces_and_the_pieces_are_the_text(text: str, tokens: int) -> None:
    pieces = split_text(text, tokens)
    assert len(pieces) == tokens
    assert "".join(pieces).startswith(text)
    if len(text) >= tokens:
        assert "".join(pieces) == text
    assert "".join(split_text(text, None)) == text


@given(st.data(), st.text(min_size=1, max_size=80), st.none() | st.integers(1, 40))
def test_a_continued_text_goes_on_exactly_where_it_stopped(
    data: st.DataObject, text: str, tokens: int | None
) -> None:
    script: dict[str, Any] = {"text": text}
    if tokens:
        script["tokens"] = tokens
    prompt = ("user", "!sim " + json.dumps(script))
    whole = answer(prompt)
    cut = data.draw(st.integers(1, len(whole)))
    rest = answer(prompt, ("assistant", whole[:cut]), continue_final_message=True)
    assert whole[:cut] + rest == whole


def test_a_text_that_is_not_its_own_is_answered_anew() -> None:
    said = answer(
        ("user", '!sim {"text": "one two"}'), ("assistant", "uno"), continue_final_message=True
    )
    assert said == "one two"


def test_tools_are_asked_for_one_step_after_another_and_then_the_text() -> None:
    script = {
        "tools": [{"name": "a", "arguments": {"x": 1}}, {"name": "b"}],
        "text": "got {tool_results}",
    }
    turn = [("user", "!sim " + json.dumps(script))]
    first = calls(*turn)
    assert [call["function"] for call in first] == [{"name": "a", "arguments": '{"x":1}'}]
    turn += [("assistant", ""), ("tool", "one")]
    assert [call["function"]["name"] for call in calls(*turn)] == ["b"]
    turn += [("assistant", ""), ("tool", "two")]
    assert calls(*turn) == []
    assert answer(*turn) == "got one, two"


def test_parallel_tools_are_asked_for_at_once_with_ids_of_their_own() -> None:
    script = {"tools": [{"name": "a"}, {"name": "b"}], "parallel": True, "text": "{tool_results}"}
    turn = [("user", "!sim " + json.dumps(script))]
    asked = calls(*turn)
    assert [call["function"]["name"] for call in asked] == ["a", "b"]
    assert len({call["id"] for call in asked}) == 2
    assert answer(*turn, ("assistant", ""), ("tool", "1"), ("tool", "2")) == "1, 2"


def test_tool_results_of_earlier_turns_do_not_count() -> None:
    script = "!sim " + json.dumps({"tools": [{"name": "a"}], "text": "done"})
    before = [("user", script), ("assistant", ""), ("tool", "old"), ("assistant", "done")]
    assert len(calls(*before, ("user", script))) == 1


def test_arguments_given_as_a_string_are_sent_as_they_stand() -> None:
    script = '!sim {"tools": [{"name": "a", "arguments": "{broken"}]}'
    assert calls(("user", script))[0]["function"]["arguments"] == "{broken"


def test_without_a_script_the_conversation_is_remembered() -> None:
    told = ("user", "Hi, my name is Ada!")
    assert "Ada" in answer(told)
    asked = ("user", "What is my name?")
    assert answer(told, ("assistant", "Nice"), asked) == "Your name is Ada."
    assert answer(asked) == "You have not told me your name yet."
    said = answer(("user", "a"), ("assistant", "b"), ("user", "lovely weather"))
    assert "lovely weather" in said
    assert "message 2" in said


def test_a_script_without_text_sets_only_the_pace() -> None:
    said = answer(("user", 'good morning\n!sim {"tps": 5}'))
    assert "good morning" in said
    assert "!sim" not in said


def test_tokens_of_a_prompt_follow_its_length() -> None:
    short, long = (
        prompt_tokens(request(("user", text)).messages[0]) for text in ("x" * 4, "x" * 400)
    )
    assert long - short == 99
