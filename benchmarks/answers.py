"""Check that a streamed answer is whole, is the one that was asked for, and ends well."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

__all__ = ["Checker", "WrongAnswerError", "checker", "expected_text", "scripted_input"]

Checker = Callable[[bytes, str], None]

_WORDS = (
    *("The", "session", "keeps", "what", "it", "was", "told", "and", "answers", "in"),
    *("twenty", "pieces", "of", "text", "that", "arrive", "in", "their", "order", "here"),
)


class WrongAnswerError(Exception):
    """An answer that is not what it has to be."""


def expected_text(client: int, *, chunks: int = 20) -> str:
    """Return the text that a client's simulator answers: another one for each client."""
    words = [_WORDS[i % len(_WORDS)] for i in range(chunks)]
    words[-1] = f"{client}."
    return " ".join(words)


def scripted_input(text: str, *, chunks: int = 20, tps: float | None = None) -> str:
    """Return a message on which the simulator answers with ``text``, in so many chunks."""
    script: dict[str, object] = {"text": text, "tokens": chunks}
    if tps is not None:
        script["tps"] = tps
    return "!sim " + msgspec.json.encode(script).decode()


class _Frame(msgspec.Struct):
    """What is read of an event of a session's stream."""

    type: str = ""
    text: str = ""
    status: str = ""


_frame = msgspec.json.Decoder(_Frame)


def _session(body: bytes, expect: str) -> None:
    """Check a stream of ``model.delta``, ``model.finished`` and ``turn.finished`` events.

    Deltas are the text from its start; ``model.finished``, where there is one, has all of it.
    """
    deltas = ""
    whole: str | None = None
    last = _Frame()
    for event in body.split(b"\n\n"):
        at = event.find(b"data: ")
        if at < 0:
            continue
        last = _frame.decode(event[at + 6 :])
        if last.type == "model.delta":
            deltas += last.text
        elif last.type == "model.finished":
            whole = last.text
    if last.type != "turn.finished" or last.status != "completed":
        raise WrongAnswerError(f"the stream does not end well: {body[-300:]!r}")
    if (whole if whole is not None else deltas) != expect or not expect.startswith(deltas):
        raise WrongAnswerError(f"expected {expect!r}, got {deltas!r} and {whole!r}")


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


_chunk = msgspec.json.Decoder(_Chunk)


def _chat(body: bytes, expect: str) -> None:
    """Check a streamed chat completion."""
    text = ""
    finish: str | None = None
    events = body.split(b"\n\n")
    for event in events[:-2]:
        for choice in _chunk.decode(event[6:]).choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    if events[-2] != b"data: [DONE]" or finish != "stop":
        raise WrongAnswerError(f"the stream does not end well: {body[-300:]!r}")
    if text != expect:
        raise WrongAnswerError(f"expected {expect!r}, got {text!r}")


class _WholeChoice(msgspec.Struct):
    message: _Delta
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_WholeChoice]


_completion = msgspec.json.Decoder(_Completion)


def _complete(body: bytes, expect: str) -> None:
    """Check a chat completion that comes whole."""
    choice = _completion.decode(body).choices[0]
    if choice.finish_reason != "stop" or choice.message.content != expect:
        raise WrongAnswerError(f"expected {expect!r}, got {body[:300]!r}")


class _Done(msgspec.Struct):
    status: str | None = None
    text: str | None = None


_done = msgspec.json.Decoder(_Done)


def _json(body: bytes, expect: str) -> None:
    """Check a turn that comes whole."""
    turn = _done.decode(body)
    if turn.status != "completed" or turn.text != expect:
        raise WrongAnswerError(f"expected {expect!r}, got {body[:300]!r}")


def _any(body: bytes, expect: str) -> None:
    """Take any answer; its status was looked at."""
    del body, expect


_CHECKERS: dict[str, Checker] = {
    "session": _session,
    "chat": _chat,
    "completion": _complete,
    "json": _json,
    "any": _any,
}


def checker(kind: str) -> Checker:
    """Return what checks the answers of a kind of service."""
    return _CHECKERS[kind]
