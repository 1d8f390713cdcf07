"""Batches with the openai package, unmodified, on a system of their own, parts of which die."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.followed_turn import script
from tests.integration.conftest import add_embedder
from tests.integration.wire import eventually
from tests.system import System

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
SETTINGS = {
    "sessions": {"hosts": 2},
    "models": {"simulator": {"enabled": True, "tps": 2_000}},
    "batch": {"sweep_s": 0.2, "lease_s": 2.0, "concurrency": 4},
}
# A third of a second each: long enough to be interrupted, 8 of them at once on two hosts.
SLOW = script("an answer that takes its time", tokens=6, tps=20)
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def own() -> Iterator[System]:
    folder = Path(tempfile.mkdtemp(prefix="agentray-test-"))
    system = add_embedder(System(folder / "data", settings=SETTINGS))
    try:
        yield system.start()
        system.stop()
    finally:
        system.destroy()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ai(own: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=5) as client:
        yield client


def chat(custom_id: str, text: str, *, model: str = "simulator", **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def order(ai: OpenAI, lines: Sequence[dict[str, Any]], endpoint: str = CHAT) -> Batch:
    text = "\n".join(map(json.dumps, lines)).encode()
    file = ai.files.create(file=("in.jsonl", text), purpose="batch")
    return ai.batches.create(
        input_file_id=file.id, endpoint=cast(Any, endpoint), completion_window="24h"
    )


def until(ai: OpenAI, batch: Batch, condition: Callable[[Batch], bool], *, what: str) -> Batch:
    found = batch

    def holds() -> bool:
        nonlocal found
        found = ai.batches.retrieve(batch.id)
        return condition(found)

    eventually(holds, what=what, timeout_s=60)
    return found


def end(ai: OpenAI, batch: Batch) -> Batch:
    return until(ai, batch, lambda found: found.status in ENDED, what="the batch ends")


def results(ai: OpenAI, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what was answered and what was not, by custom_id; each is there exactly once."""

    def lines(file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        text = ai.files.content(file_id).text
        assert ai.files.retrieve(file_id).bytes == len(text.encode())
        return [json.loads(line) for line in text.splitlines()]

    output, errors = lines(batch.output_file_id), lines(batch.error_file_id)
    counts = batch.request_counts
    assert counts is not None
    assert (counts.completed, counts.failed) == (len(output), len(errors))
    assert counts.total == len(output) + len(errors)
    seen = Counter(line["custom_id"] for line in (*output, *errors))
    assert set(seen.values()) == {1}
    assert len({line["id"] for line in (*output, *errors)}) == counts.total
    return (
        {line["custom_id"]: line for line in output},
        {line["custom_id"]: line for line in errors},
    )


def text_of(line: dict[str, Any]) -> str:
    return line["response"]["body"]["choices"][0]["message"]["content"]


def done(count: int) -> Callable[[Batch], bool]:
    return lambda batch: (
        batch.request_counts is not None and batch.request_counts.completed >= count
    )


def test_each_line_is_answered_or_says_why_not(ai: OpenAI) -> None:
    lines = [chat(f"well-{n}", script(f"answer {n}")) for n in range(100)]
    lines += [chat(f"bad-{n}", '!sim {"status": 400}') for n in range(10)]
    lines += [chat("agent", script("as an agent"), model="assistant")]
    lines += [chat("nobody", "hi", model="nobody"), chat("stream", "hi", stream=True)]
    lines += [chat("embeds", "hi", model="embedder"), chat("empty", "hi", messages=[])]
    batch = end(ai, order(ai, lines))
    assert batch.status == "completed"
    output, errors = results(ai, batch)
    assert set(output) == {"agent", *(f"well-{n}" for n in range(100))}
    assert all(text_of(output[f"well-{n}"]) == f"answer {n}" for n in range(100))
    assert text_of(output["agent"]) == "as an agent"
    assert {name: line["response"]["status_code"] for name, line in errors.items()} == {
        **{f"bad-{n}": 400 for n in range(10)},
        "nobody": 404,
        "stream": 400,
        "embeds": 400,
        "empty": 400,
    }
    assert errors["nobody"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert batch.usage is not None
    answers = [line["response"]["body"]["usage"] for line in output.values()]
    assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in answers)
    assert batch.usage.total_tokens == sum(usage["total_tokens"] for usage in answers)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(cast("list[int]", times))
    assert batch.id in [found.id for found in ai.batches.list()]
    files = {file.id: file.purpose for file in ai.files.list()}
    assert files[batch.input_file_id] == "batch"
    assert files[batch.output_file_id or ""] == files[batch.error_file_id or ""] == "batch_output"
    with pytest.raises(openai.ConflictError):
        ai.batches.cancel(batch.id)


def test_texts_become_vectors_one_by_one_and_in_batches(ai: OpenAI) -> None:
    made = ai.embeddings.create(model="embedder", input=["a text", "another"], dimensions=8)
    assert made.usage.prompt_tokens > 0
    first, second = (one.embedding for one in made.data)
    assert len(first) == 8
    assert math.hypot(*first) == pytest.approx(1.0, abs=1e-5)
    assert first != second
    with pytest.raises(openai.BadRequestError):
        ai.embeddings.create(model="simulator", input="a")
    with pytest.raises(openai.NotFoundError):
        ai.embeddings.create(model="nobody", input="a")
    body = {"model": "embedder", "input": "a text", "dimensions": 8}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": EMBEDDINGS, "body": body} for n in range(5)
    ]
    output, errors = results(ai, end(ai, order(ai, lines, EMBEDDINGS)))
    assert not errors
    for line in output.values():
        assert line["response"]["body"]["data"][0]["embedding"] == pytest.approx(first, abs=1e-6)


def test_a_file_that_is_no_batch_says_which_lines_are_wrong(ai: OpenAI) -> None:
    text = json.dumps(chat("a", "hi")).encode()
    file = ai.files.create(file=("in.jsonl", text + b"\nbroken\n" + text), purpose="batch")
    batch = ai.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    batch = end(ai, batch)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(fault.code, fault.line) for fault in batch.errors.data] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
    ]


def test_a_cancelled_batch_keeps_what_is_done(ai: OpenAI) -> None:
    batch = order(ai, [chat(str(n), SLOW) for n in range(400)])
    until(ai, batch, done(4), what="some lines are done")
    assert ai.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = end(ai, batch)
    assert batch.status == "cancelled"
    output, errors = results(ai, batch)
    assert 4 <= len(output) < 400
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    assert batch.cancelling_at is not None
    assert batch.cancelled_at is not None


def test_no_line_is_lost_or_doubled_when_a_host_is_killed(ai: OpenAI, own: System) -> None:
    batch = order(ai, [chat(str(n), SLOW) for n in range(60)])
    until(ai, batch, done(4), what="some lines are done")
    claims = "SELECT DISTINCT claimed_by FROM batch_lines WHERE claimed_by IS NOT NULL"
    working = {name for (name,) in own.sql(claims)}
    killed = next(host for host in own.hosts() if host.id in working)
    os.kill(killed.pid, signal.SIGKILL)
    batch = end(ai, batch)
    assert batch.status == "completed"
    output, errors = results(ai, batch)
    assert (len(output), errors) == (60, {})


def test_a_batch_goes_on_after_the_death_of_everything(ai: OpenAI, own: System) -> None:
    batch = order(ai, [chat(str(n), SLOW) for n in range(60)])
    until(ai, batch, done(4), what="some lines are done")
    own.kill_everything()
    own.restart()
    batch = end(ai, batch)
    assert batch.status == "completed"
    output, errors = results(ai, batch)
    assert (len(output), errors) == (60, {})
