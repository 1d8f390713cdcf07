"""The model client over real sockets: against the simulator, and against servers that misbehave."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import pytest
import uvicorn

from agentray.config.settings import ModelsSettings, SimulatorSettings
from agentray.errors import (
    ModelError,
    ModelNotFoundError,
    ModelRateLimitedError,
    ModelUnavailableError,
)
from agentray.events import Usage
from agentray.models.base import ModelProgress, ModelRequest
from agentray.models.catalog import Catalog
from agentray.models.client import ModelClient, RawStream
from agentray.models.simulator import Simulator
from tests.integration.misbehaving import (
    CLOSE,
    COMMENT,
    DONE,
    END,
    HANG,
    SSE,
    error_body,
    event,
    part,
    response,
    script,
    speaking,
)

FIRST_S, STALL_S, STEP_S = 0.4, 0.3, 1.2
IMPATIENT = {
    "connect_timeout_s": 0.4,
    "first_token_timeout_s": FIRST_S,
    "stall_timeout_s": STALL_S,
    "step_timeout_s": STEP_S,
}


def client_of(url: str, **settings: Any) -> ModelClient:
    endpoints = {
        "m": {"url": url, "upstream": "org/upstream", "api_key": "sk-secret"},
        "simulator": {"url": url, "continues_text": True},
    }
    models = ModelsSettings.model_validate({"endpoints": endpoints, **settings})
    return ModelClient(Catalog(models, "http://127.0.0.1:1/models"), models)


@asynccontextmanager
async def calling(url: str, **settings: Any) -> AsyncIterator[ModelClient]:
    client = client_of(url, **settings)
    try:
        yield client
    finally:
        await client.close()


def asks(*contents: str, **fields: Any) -> ModelRequest:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    encoded = json.dumps(messages)[1:-1].encode()
    return ModelRequest(**{"model": "simulator", "messages": encoded, **fields})


async def collect(client: ModelClient, request: ModelRequest) -> list[ModelProgress]:
    async with aclosing(client.stream(request)) as answer:
        return [progress async for progress in answer]


def text_of(answer: list[ModelProgress]) -> str:
    return "".join(progress.text for progress in answer)


async def until(condition: Callable[[], bool], deadline_s: float = 5.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the condition is another thread's
            await asyncio.sleep(0.005)


# --- the simulator ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator() -> Iterator[tuple[Simulator, str]]:
    """A simulator behind a real server in a thread of its own, and its base URL."""
    app = Simulator(SimulatorSettings.model_validate({"tps": 1e6, "max_concurrent": 50}))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="httptools"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield app, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
async def client(simulator: tuple[Simulator, str]) -> AsyncIterator[ModelClient]:
    async with calling(simulator[1]) as client:
        yield client


async def test_a_streamed_answer_arrives_whole_with_its_usage(client: ModelClient) -> None:
    answer = await collect(client, asks('!sim {"text": "Grüße an alle", "tokens": 5}'))
    assert text_of(answer) == "Grüße an alle"
    assert [progress.finish_reason for progress in answer[:-1]] == [None] * (len(answer) - 1)
    assert answer[-1].finish_reason == "stop"
    assert answer[-1].usage.output_tokens == 5
    assert answer[-1].usage.input_tokens > 0


async def test_text_arrives_while_the_model_still_speaks(client: ModelClient) -> None:
    answer = await collect(client, asks('!sim {"tokens": 8, "tps": 200}'))
    assert len(answer) >= 4
    assert answer[-1].usage.output_tokens == 8


async def test_the_pace_of_a_stream_is_kept(client: ModelClient) -> None:
    began = time.monotonic()
    await collect(client, asks('!sim {"tokens": 301, "tps": 1000, "ttft_ms": 100}'))
    assert 0.38 < time.monotonic() - began < 1.0


async def test_parallel_tool_calls_and_their_results_go_round(client: ModelClient) -> None:
    script = {
        "tools": [{"name": "a", "arguments": {"text": "x" * 50}}, {"name": "b"}],
        "parallel": True,
        "text": "got {tool_results}",
    }
    prompt = json.dumps({"role": "user", "content": "!sim " + json.dumps(script)}).encode()
    answer = await collect(client, ModelRequest(model="simulator", messages=prompt))
    first, second = answer[-1].tool_calls
    assert answer[-1].finish_reason == "tool_calls"
    assert (first.name, json.loads(first.arguments)) == ("a", {"text": "x" * 50})
    assert (second.name, second.arguments) == ("b", "{}")
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": "{}"}}
        for call in answer[-1].tool_calls
    ]
    behind = [{"role": "assistant", "content": None, "tool_calls": calls}]
    behind += [
        {"role": "tool", "tool_call_id": call["id"], "content": str(i)}
        for i, call in enumerate(calls)
    ]
    messages = prompt + b"," + json.dumps(behind)[1:-1].encode()
    answer = await collect(client, ModelRequest(model="simulator", messages=messages))
    assert text_of(answer) == "got 0, 1"


async def test_a_broken_answer_is_continued_to_the_same_text(client: ModelClient) -> None:
    prompt = '!sim {"text": "one two three four five", "tokens": 10, "fail_after": 4}'
    said, attempts = "", 0
    while True:
        attempts += 1
        contents = (prompt, said) if said else (prompt,)
        request = asks(*contents, continue_text=bool(said))
        try:
            async with aclosing(client.stream(request)) as answer:
                async for progress in answer:
                    said += progress.text
            break
        except ModelUnavailableError:
            assert attempts < 10
    assert said == "one two three four five"
    assert attempts == 3


async def test_a_complete_text_can_be_continued_by_nothing(client: ModelClient) -> None:
    answer = await collect(client, asks('!sim {"text": "all"}', "all", continue_text=True))
    assert text_of(answer) == ""
    assert answer[-1].finish_reason == "stop"


async def test_closing_the_iterator_stops_the_model(
    client: ModelClient, simulator: tuple[Simulator, str]
) -> None:
    async with aclosing(client.stream(asks('!sim {"tokens": 1000, "tps": 100}'))) as answer:
        assert (await anext(answer)).text
        assert simulator[0].running == 1
    await until(lambda: simulator[0].running == 0)


async def test_cancelling_the_caller_stops_the_model(
    client: ModelClient, simulator: tuple[Simulator, str]
) -> None:
    call = asyncio.create_task(collect(client, asks('!sim {"ttft_ms": 60000}')))
    await until(lambda: simulator[0].running == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: simulator[0].running == 0)


async def test_more_calls_at_once_than_the_simulator_serves_are_told_to_wait(
    client: ModelClient,
) -> None:
    request = asks('!sim {"ttft_ms": 300}')
    results = await asyncio.gather(
        *(collect(client, request) for _ in range(60)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, ModelRateLimitedError)]
    assert len(refused) == 10
    assert {error.fields["retry_after_s"] for error in refused} == {1.0}


async def test_a_context_that_is_too_long_is_a_lasting_error(client: ModelClient) -> None:
    with pytest.raises(ModelError) as caught:
        await collect(client, asks("x" * 200_000))
    assert not caught.value.retryable
    assert caught.value.fields["upstream_code"] == "context_length_exceeded"


async def test_a_body_of_megabytes_gets_through(client: ModelClient) -> None:
    padding = json.dumps("x" * 3_000_000).encode()
    request = ModelRequest(
        model="simulator",
        messages=b'{"role":"user","content":"!sim {\\"text\\": \\"ok\\"}"}',
        tools=b'{"type":"function","function":{"name":"f","description":' + padding + b"}}",
    )
    assert text_of(await collect(client, request)) == "ok"


async def test_a_raw_body_is_passed_on_and_back(client: ModelClient) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": '!sim {"text": "raw"}'}]}
    whole = await client.complete_raw("m", body)
    assert isinstance(whole, bytes)
    answer = json.loads(whole)
    assert answer["choices"][0]["message"]["content"] == "raw"
    assert answer["model"] == "org/upstream"

    fields = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in body.items()}
    for given in ({**body, "stream": True}, {**fields, "stream": msgspec.Raw(b"true")}):
        stream = await client.complete_raw("m", given)
        assert isinstance(stream, RawStream)
        async with aclosing(stream):
            received = b"".join([chunk async for chunk in stream])
        assert received.endswith(b"data: [DONE]\n\n")
        assert b'"content":"raw"' in received


async def test_a_raw_body_is_refused_before_its_stream_begins(client: ModelClient) -> None:
    for stream in (False, True):
        message = {"role": "user", "content": '!sim {"status": 503}'}
        with pytest.raises(ModelUnavailableError):
            await client.complete_raw("m", {"messages": [message], "stream": stream})


async def test_a_raw_stream_that_breaks_off_raises_behind_its_text(client: ModelClient) -> None:
    script = '!sim {"tokens": 20, "tps": 500, "fail_after": 10}'
    body = {"messages": [{"role": "user", "content": script}], "stream": True}
    stream = await client.complete_raw("m", body)
    assert isinstance(stream, RawStream)
    received: list[bytes] = []

    async def receive() -> None:
        async for chunk in stream:
            received.append(chunk)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(ModelUnavailableError, match="before the answer was whole"):
        await receive()
    assert b"".join(received).count(b'"content":') == 10


async def test_closing_a_raw_stream_stops_the_model(
    client: ModelClient, simulator: tuple[Simulator, str]
) -> None:
    script = '!sim {"tokens": 1000, "tps": 100}'
    body = {"messages": [{"role": "user", "content": script}], "stream": True}
    stream = await client.complete_raw("m", body)
    assert isinstance(stream, RawStream)
    assert simulator[0].running == 1
    await stream.aclose()
    await until(lambda: simulator[0].running == 0)


async def test_the_openai_package_reads_the_simulators_answers(
    simulator: tuple[Simulator, str],
) -> None:
    from openai import APIStatusError, AsyncOpenAI

    async with AsyncOpenAI(base_url=simulator[1], api_key="none", max_retries=0) as openai:
        script = '!sim {"tools": [{"name": "echo", "arguments": {"text": "hi"}}]}'
        stream = await openai.chat.completions.create(
            model="simulator", messages=[{"role": "user", "content": script}], stream=True
        )
        arguments = ""
        async for chunk in stream:
            for part in chunk.choices[0].delta.tool_calls or ():
                assert part.function is not None
                arguments += part.function.arguments or ""
        assert json.loads(arguments) == {"text": "hi"}
        whole = await openai.chat.completions.create(
            model="simulator", messages=[{"role": "user", "content": '!sim {"text": "hello"}'}]
        )
        assert whole.choices[0].message.content == "hello"
        assert whole.usage is not None
        with pytest.raises(APIStatusError) as caught:
            await openai.chat.completions.create(
                model="simulator", messages=[{"role": "user", "content": '!sim {"status": 503}'}]
            )
        assert caught.value.status_code == 503


async def test_an_unknown_model_is_not_called(client: ModelClient) -> None:
    with pytest.raises(ModelNotFoundError):
        await collect(client, asks("hi", model="gpt"))


async def test_a_closed_client_says_so(simulator: tuple[Simulator, str]) -> None:
    client = client_of(simulator[1])
    await collect(client, asks("hi"))
    await client.close()
    with pytest.raises(ModelUnavailableError, match="closed"):
        await collect(client, asks("hi"))


# --- servers that misbehave --------------------------------------------------------------------

COMPLETION = json.dumps({"choices": [{"message": {"content": "hi"}}]}).encode()

Case = tuple[list[bytes | float], type[ModelError], str, float]
FAULTS: dict[str, Case] = {
    # name: what is spoken, the error, what it says, and its latest time
    "never answers": ([HANG], ModelUnavailableError, "in time", FIRST_S),
    "only a head": ([SSE, HANG], ModelUnavailableError, "no token in time", FIRST_S),
    "comments without end": (
        [SSE, *[COMMENT, 0.02] * 200, HANG],
        ModelUnavailableError,
        "no token in time",
        FIRST_S,
    ),
    "stalls": ([SSE, event("a"), HANG], ModelUnavailableError, "stalled", STALL_S),
    "stalls with comments": (
        [SSE, event("a"), *[COMMENT, 0.02] * 200, HANG],
        ModelUnavailableError,
        "stalled",
        STALL_S,
    ),
    "never ends": (
        [SSE, *[event("a"), 0.05] * 100],
        ModelUnavailableError,
        "finish in time",
        STEP_S,
    ),
    "ends early": ([SSE, event("a"), END], ModelUnavailableError, "before the answer", 0),
    "marks the end early": ([SSE, event("a"), DONE, END], ModelUnavailableError, "before the", 0),
    "is cut off": ([SSE, event("a"), CLOSE], ModelUnavailableError, "broke off", 0),
    "closes at once": ([CLOSE], ModelUnavailableError, "broke off", 0),
    "closes in its head": ([SSE[:40], CLOSE], ModelUnavailableError, "broke off", 0),
    "speaks no HTTP": ([b"SSH-2.0-x\r\n\r\n"], ModelUnavailableError, "broke off", 0),
    "breaks its framing": (
        [SSE, event("a"), b"zz\r\nno\r\n", HANG],
        ModelUnavailableError,
        "broke off",
        0,
    ),
    "malformed events": (
        [SSE, event("a"), part(b"data: {broken\n\n"), HANG],
        ModelUnavailableError,
        "malformed",
        0,
    ),
    "no events": ([SSE, part(b"<html>\n"), HANG], ModelUnavailableError, "malformed", 0),
    "answers nothing": ([SSE, event("", "stop"), DONE, END], ModelUnavailableError, "empty", 0),
    "gives its answer up": (
        [SSE, event("a"), event("", "abort"), DONE, END],
        ModelUnavailableError,
        "broke its answer off",
        0,
    ),
    "an error in its stream": (
        [SSE, event("a"), part(b"data: " + error_body(message="oops", code=500) + b"\n\n"), HANG],
        ModelUnavailableError,
        "500: oops",
        0,
    ),
    "a page": (response(200, b"<html>", "text/html"), ModelUnavailableError, "text/html", 0),
    "not streamed": (response(200, COMPLETION), ModelUnavailableError, "not with a stream", 0),
    "an error as success": (
        response(200, error_body(message="busy")),
        ModelUnavailableError,
        "busy",
        0,
    ),
    "a limit as success": (
        response(200, error_body(message="busy", code=429)),
        ModelRateLimitedError,
        "busy",
        0,
    ),
    "half a page": (
        [response(200, b"x" * 99, "text/html")[0], CLOSE],
        ModelUnavailableError,
        "text/html",
        0,
    ),
    "500 in plain text": (response(500, b"oh no", "text/plain"), ModelUnavailableError, "oh no", 0),
    "500 and hangs": (
        [b"HTTP/1.1 500 X\r\ncontent-length: 9\r\n\r\n", HANG],
        ModelUnavailableError,
        "in time",
        FIRST_S,
    ),
    "400": (response(400, error_body(message="bad")), ModelError, "400: bad", 0),
    "a key that is shown": (response(401, b"bad key sk-secret"), ModelError, r"bad key \*\*\*", 0),
    "elsewhere": (response(302, b"", location="http://h/"), ModelError, "302", 0),
    "429": (response(429, b"{}"), ModelRateLimitedError, "429", 0),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_an_error_in_time_and_never_an_answer(name: str) -> None:
    steps, kind, said, latest_s = FAULTS[name]
    async with speaking(script(steps)) as endpoint, calling(endpoint.url, **IMPATIENT) as client:
        began = time.monotonic()
        with pytest.raises(ModelError, match=said) as caught:
            await collect(client, asks("hi", model="m"))
        took_s = time.monotonic() - began
    assert type(caught.value) is kind
    assert caught.value.fields["model"] == "m"
    assert latest_s - 0.02 <= took_s < latest_s + 0.35
    assert len(endpoint.requests) == 1


async def test_an_address_where_nobody_listens_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with calling(url, **IMPATIENT) as client:
        with pytest.raises(ModelUnavailableError, match="cannot be reached"):
            await collect(client, asks("hi", model="m"))


@pytest.mark.parametrize(("headers", "wait_s"), [({}, None), ({"retry_after": "7"}, 7.0)])
async def test_a_limit_says_how_long_to_wait_where_the_endpoint_does(
    headers: dict[str, str], wait_s: float | None
) -> None:
    steps = response(429, b"{}", **headers)
    async with speaking(script(steps)) as endpoint, calling(endpoint.url) as client:
        with pytest.raises(ModelRateLimitedError) as caught:
            await collect(client, asks("hi", model="m"))
    assert caught.value.fields.get("retry_after_s") == wait_s


async def test_text_that_came_before_a_fault_was_delivered() -> None:
    steps: list[bytes | float] = [SSE, event("one "), event("two"), 0.05, event(" three"), HANG]
    said: list[str] = []
    async with speaking(script(steps)) as endpoint, calling(endpoint.url, **IMPATIENT) as client:

        async def listen() -> None:
            async for progress in client.stream(asks("hi", model="m")):
                said.append(progress.text)  # noqa: PERF401 - what came before the error counts

        with pytest.raises(ModelUnavailableError):
            await listen()
    assert "".join(said) == "one two three"


@pytest.mark.parametrize("end", [[CLOSE], [HANG], [END]], ids=["cut", "hangs", "unmarked"])
async def test_an_answer_with_its_finish_reason_is_whole_however_its_stream_ends(
    end: list[bytes | float],
) -> None:
    steps: list[bytes | float] = [SSE, event("all"), event("", "stop"), *end]
    async with speaking(script(steps)) as endpoint, calling(endpoint.url, **IMPATIENT) as client:
        answer = await collect(client, asks("hi", model="m"))
    assert text_of(answer) == "all"
    assert (answer[-1].finish_reason, answer[-1].usage) == ("stop", Usage())


async def test_a_slow_consumer_is_no_stall() -> None:
    steps: list[bytes | float] = [SSE, event("a"), 0.05, event("b"), event("", "stop"), DONE, END]
    patient = {**IMPATIENT, "step_timeout_s": 30.0}
    said = ""
    async with speaking(script(steps)) as endpoint, calling(endpoint.url, **patient) as client:
        async for progress in client.stream(asks("hi", model="m")):
            said += progress.text
            await asyncio.sleep(2 * STALL_S)
    assert said == "ab"


async def test_a_connection_is_used_again_even_if_the_end_of_its_answer_comes_late() -> None:
    steps: list[bytes | float] = [SSE, event("a", "stop"), DONE, 0.05, END]
    async with speaking(script(steps)) as endpoint, calling(endpoint.url) as client:
        for _ in range(3):
            began = time.monotonic()
            await collect(client, asks("hi", model="m"))
            assert time.monotonic() - began < 0.04
            await asyncio.sleep(0.1)  # The server says the rest.
    assert endpoint.connections == 1


def test_a_client_that_is_closed_right_behind_an_answer_leaves_nothing_open() -> None:
    async def call_and_close() -> None:
        steps: list[bytes | float] = [SSE, event("a", "stop"), DONE, HANG]
        async with speaking(script(steps)) as endpoint, calling(endpoint.url) as client:
            await collect(client, asks("hi", model="m"))

    asyncio.run(call_and_close())
    gc.collect()  # What was left open warns here, and pytest makes that a failure.


async def test_a_request_carries_what_was_asked_and_nothing_else() -> None:
    steps: list[bytes | float] = [SSE, event("a", "stop"), DONE, END]
    async with speaking(script(steps)) as endpoint, calling(endpoint.url) as client:
        await collect(client, asks("hi", model="m"))
        await collect(
            client,
            asks(
                "hi",
                "I am",
                model="m",
                tools=b'{"type":"function","function":{"name":"f"}}',
                temperature=0.0,
                top_p=0.5,
                max_output_tokens=7,
                session_id="sess_1",
                continue_text=True,
            ),
        )
    (plain_headers, plain), (headers, full) = endpoint.requests
    base = {"model": "org/upstream", "stream": True, "stream_options": {"include_usage": True}}
    hi = {"role": "user", "content": "hi"}
    assert json.loads(plain) == {**base, "messages": [hi]}
    assert json.loads(full) == {
        **base,
        "messages": [hi, {"role": "assistant", "content": "I am"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "temperature": 0.0,
        "top_p": 0.5,
        "max_completion_tokens": 7,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert headers["x-session-id"] == "sess_1"
    assert "x-session-id" not in plain_headers
    assert headers["authorization"] == "Bearer sk-secret"
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        (response(200, error_body(message="busy")), ModelUnavailableError),
        (response(200, b"<html>"), ModelUnavailableError),
        (response(200, b'{"choices": []}'), ModelUnavailableError),
        (response(200, b"[" * 100_000), ModelUnavailableError),
        (
            response(200, b'{"choices":[{"message":{"content":null},"finish_reason":"stop"}]}'),
            ModelUnavailableError,
        ),
        (
            response(200, b'{"choices":[{"message":{"content":"a"},"finish_reason":"abort"}]}'),
            ModelUnavailableError,
        ),
        ([response(200, b"x" * 99)[0][:-9], CLOSE], ModelUnavailableError),  # type: ignore[index]
        (response(429, b"{}"), ModelRateLimitedError),
        (response(404, b"{}"), ModelError),
        ([HANG], ModelUnavailableError),
    ],
)
async def test_a_raw_answer_that_is_no_completion_is_an_error(
    steps: list[bytes | float], kind: type[ModelError]
) -> None:
    async with speaking(script(steps)) as endpoint, calling(endpoint.url, **IMPATIENT) as client:
        with pytest.raises(ModelError) as caught:
            await client.complete_raw("m", {"messages": []})
    assert type(caught.value) is kind
