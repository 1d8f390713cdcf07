"""The simulator's protocol, spoken to as an ASGI application."""

import asyncio
import json
import random
from collections.abc import MutableMapping
from typing import Any

import pytest

from agentray.config.settings import SimulatorSettings
from agentray.models.simulator import Simulator


async def exchange(
    simulator: Simulator, path: str, body: bytes | None = None, root_path: str = ""
) -> list[MutableMapping[str, Any]]:
    """Return the messages that answer one request."""
    sent: list[MutableMapping[str, Any]] = []

    bodies = iter([body or b""])

    async def receive() -> MutableMapping[str, Any]:
        for whole in bodies:
            return {"type": "http.request", "body": whole, "more_body": False}
        return await asyncio.Future()  # this client does not hang up

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    method = "GET" if body is None else "POST"
    scope = {"type": "http", "method": method, "path": path, "root_path": root_path}
    await simulator(scope, receive, send)
    assert not sent[-1].get("more_body", False)
    return sent


async def call(
    simulator: Simulator, path: str, body: bytes | None = None, root_path: str = ""
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Return status, headers and body of the answer to one request."""
    start, *rest = await exchange(simulator, path, body, root_path)
    return start["status"], dict(start["headers"]), b"".join(message["body"] for message in rest)


def chat(*texts: str, **fields: Any) -> bytes:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"model": "simulator", "messages": messages, **fields}).encode()


def simulator(**profile: Any) -> Simulator:
    profile.setdefault("tps", 1e6)
    return Simulator(SimulatorSettings.model_validate(profile), rng=random.Random(7))


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("root_path", "path"),
    [
        ("", CHAT),
        ("", "/models/simulator" + CHAT),
        ("/models/simulator", "/models/simulator" + CHAT),
        ("/models/simulator", CHAT),
    ],
)
async def test_it_answers_mounted_under_a_prefix_and_with_the_full_path(
    root_path: str, path: str
) -> None:
    status, _, body = await call(simulator(), path, chat("hi"), root_path)
    assert status == 200
    assert json.loads(body)["choices"][0]["finish_reason"] == "stop"


async def test_it_lists_itself_and_says_that_it_is_well() -> None:
    _, _, models = await call(simulator(), "/v1/models")
    assert [model["id"] for model in json.loads(models)["data"]] == ["simulator"]
    assert (await call(simulator(), "/healthz"))[0] == 200


async def test_a_stream_has_one_chunk_per_token() -> None:
    body = chat('!sim {"tokens": 20}', stream=True, stream_options={"include_usage": True})
    status, headers, answer = await call(simulator(), CHAT, body)
    assert status == 200
    assert headers[b"content-type"].startswith(b"text/event-stream")
    *events, end, nothing = answer.split(b"\n\n")
    assert (end, nothing) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert len([delta for delta in deltas if "content" in delta]) == 20
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 20


async def test_all_chunks_that_are_due_are_written_at_once() -> None:
    body = chat('!sim {"tokens": 5000, "tps": 1e9}', stream=True)
    start, *writes = await exchange(simulator(), CHAT, body)
    assert start["status"] == 200
    assert len(writes) == 1


async def test_what_is_streamed_is_what_is_answered_whole() -> None:
    script = '!sim {"text": "Grüße, \\"you\\" 🥊"}'
    app = simulator()
    _, _, whole = await call(app, CHAT, chat(script))
    _, _, streamed = await call(app, CHAT, chat(script, stream=True))
    chunks = [json.loads(line[6:]) for line in streamed.split(b"\n\n")[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == json.loads(whole)["choices"][0]["message"]["content"] == 'Grüße, "you" 🥊'


async def test_nothing_is_said_before_the_first_token_is_due() -> None:
    body = chat('!sim {"text": "late but whole", "ttft_ms": 5}', stream=True)
    _, *writes = await exchange(simulator(), CHAT, body)
    assert b"".join(write["body"] for write in writes).count(b'"content":') == 3


async def test_the_prefix_of_a_conversation_is_cached_from_its_second_turn_on() -> None:
    app = simulator()

    async def usage(*texts: str) -> dict[str, Any]:
        _, _, body = await call(app, CHAT, chat(*texts))
        return json.loads(body)["usage"]

    first = await usage("one")
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    second = await usage("one", "said", "two")
    assert second["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"]
    assert (await usage("other", "said", "two"))["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{broken",
        b"\xff",
        b'{"messages": []}',
        chat(),
        chat("!sim {broken"),
        chat("hi", n=2),
        chat("hi", max_tokens="many"),
    ],
)
async def test_a_bad_request_gets_an_error_of_openais_shape(body: bytes) -> None:
    status, _, answer = await call(simulator(), CHAT, body)
    assert status == 400
    error = json.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, None, 405),
        ("/v1/embeddings", None, 405),
        ("/v1/embeddings", b"{}", 400),
        ("/v1/completions", b"{}", 404),
    ],
)
async def test_what_it_does_not_have_is_said(path: str, body: bytes | None, status: int) -> None:
    assert (await call(simulator(), path, body))[0] == status


async def test_the_context_window_holds_prompt_and_answer() -> None:
    app = simulator(context_window=50)
    status, _, body = await call(app, CHAT, chat("x" * 400))
    assert (status, json.loads(body)["error"]["code"]) == (400, "context_length_exceeded")
    assert (await call(app, CHAT, chat("hi", max_tokens=100)))[0] == 400
    _, _, body = await call(app, CHAT, chat('!sim {"tokens": 100}'))
    assert json.loads(body)["choices"][0]["finish_reason"] == "length"
    assert json.loads(body)["usage"]["total_tokens"] == 50


async def test_max_tokens_cuts_the_answer_short() -> None:
    _, _, body = await call(simulator(), CHAT, chat('!sim {"tokens": 9}', max_completion_tokens=4))
    answer = json.loads(body)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


async def test_a_scripted_status_is_answered_and_429_says_when_to_come_back() -> None:
    assert (await call(simulator(), CHAT, chat('!sim {"status": 503}')))[0] == 503
    status, headers, _ = await call(simulator(), CHAT, chat('!sim {"status": 429}'))
    assert (status, headers[b"retry-after"]) == (429, b"1")


async def test_a_share_of_calls_fails_as_the_profile_says() -> None:
    app = simulator(error_rate=0.3)
    failed = [(await call(app, CHAT, chat("hi")))[0] == 500 for _ in range(1000)]
    assert 250 < sum(failed) < 350


@pytest.mark.parametrize("status", [None, 503])
async def test_a_stream_breaks_off_after_so_many_tokens(status: int | None) -> None:
    script = {"tokens": 20, "fail_after": 10, **({"status": status} if status else {})}
    body = chat("!sim " + json.dumps(script), stream=True)
    _, _, answer = await call(simulator(), CHAT, body)
    assert answer.count(b'"content":') == 10
    assert b"[DONE]" not in answer
    assert b'"finish_reason":"' not in answer
    assert (b'"error":' in answer) == (status is not None)
