"""Go on with a streamed completion that broke off: the same model, from the text so far."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError
from agentray.events import Route
from agentray.models.client import ModelClient, RawStream
from agentray.models.router import Attempt, Router
from agentray.models.usage import tokens

__all__ = ["Continuation", "can_go_on"]

# Grammars begin anew with each call: their text cannot be put together from parts.
_GRAMMARS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
_LIMITS = ("max_tokens", "max_completion_tokens")
_TOLD = b": the model's stream broke off (%b) and goes on\n\n"


class _Format(msgspec.Struct):
    type: str = "text"


class _Asked(msgspec.Struct):
    n: int | None = None
    logprobs: Any = None
    response_format: _Format | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None


class _Chunk(msgspec.Struct):
    """The head that all chunks of a stream have in common, and whether this one has text."""

    id: Any = None
    created: Any = None
    model: Any = None
    choices: list[dict[str, Any]] | None = None


_encode = msgspec.json.encode
_asked = msgspec.json.Decoder(_Asked)
_chunk = msgspec.json.Decoder(_Chunk)
_object = msgspec.json.Decoder(dict[str, Any])


def can_go_on(fields: Mapping[str, Any]) -> bool:
    """Return whether the text of an answer to this body can be put together from parts: there is
    one choice, without log-probabilities, in no form that is enforced."""
    if any(name in fields for name in _GRAMMARS):
        return False
    known = {name: fields[name] for name in _Asked.__struct_fields__ if name in fields}
    try:
        asked = _asked.decode(_encode(known))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    plain = asked.response_format is None or asked.response_format.type == "text"
    single = asked.n is None or asked.n == 1
    return (
        plain
        and single
        and not asked.logprobs
        and not asked.continue_final_message
        and not asked.echo
    )


class Continuation:
    """Goes on with one streamed answer, and makes its parts one stream.

    ``fields`` is the body that was sent to ``model``, ``deadline`` the loop's time at which the
    step ends, ``failures`` the calls that were lost before the first token came.
    """

    def __init__(
        self,
        router: Router,
        client: ModelClient,
        settings: ModelsSettings,
        *,
        model: str,
        route: Route,
        fields: Mapping[str, Any],
        session_id: str | None,
        deadline: float,
        failures: int,
    ) -> None:
        self._router = router
        self._client = client
        self._settings = settings
        self._model = model
        self._route = route
        self._fields = fields
        self._session_id = session_id
        self._deadline = deadline
        self._failures = failures
        self._opening = b""
        self._head: dict[str, Any] | None = None
        self._text = ""
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """About as many tokens as the parts that broke off had."""
        return self._tokens

    def passed(self, data: bytes) -> bytes:
        """Return whole lines of the stream as its client is to see them: as one answer's, with
        the first part's head, one role, and the tokens of all parts."""
        if self._head is None:
            # Only needed if it breaks off: its first event says how all of them begin.
            if b"data:" not in self._opening:
                self._opening += data
            return data
        lines = data.split(b"\n")
        return b"\n".join(
            self._joined(line, self._head) if line.startswith(b"data:") else line for line in lines
        )

    async def after(
        self, stream: RawStream, error: ModelError
    ) -> tuple[RawStream, Attempt, bytes] | None:
        """Call again behind the text of a stream that broke off.

        Return the stream that goes on, its call, and what its client is told; None if the same
        model cannot go on, not in time, or not within the attempts of one step. Never inside a
        tool call.
        """
        self._failures += 1
        self._take(stream)
        if stream.ended or stream.calls_tools or not self._text or not self._can():
            return None
        reason = error.code.encode()
        loop = asyncio.get_running_loop()
        while error.retryable and self._failures < self._settings.attempts:
            wait_s = self._router.backoff_s(self._failures - 1, error)
            wait_s = max(wait_s, self._router.wait_s(self._model))
            longest_s = self._settings.first_token_timeout_s
            if wait_s > longest_s or loop.time() + wait_s >= self._deadline:
                return None
            await asyncio.sleep(wait_s)
            if self._router.wait_s(self._model):
                continue  # another one is the probe that finds it back
            attempt = self._router.begin(self._model, self._route)
            try:
                answer = await self._client.complete_raw(
                    self._model,
                    self._body(),
                    session_id=self._session_id,
                    timeout_s=self._deadline - loop.time(),
                    continues=True,
                )
            except ModelError as failed:
                attempt.lost(failed)
                error = failed
                self._failures += 1
            except BaseException:
                attempt.cancelled()
                raise
            else:
                assert isinstance(answer, RawStream)
                attempt.spoke()
                return answer, attempt, b"\n\n" + _TOLD % reason
        return None

    def _can(self) -> bool:
        endpoint = self._router.catalog.resolve(self._model)
        return endpoint.continues_text and can_go_on(self._fields)

    def _take(self, stream: RawStream) -> None:
        """Add what a part brought before it broke off."""
        tokens = stream.chunks
        if self._head is None:
            opening = _first_chunk(self._opening)
            self._head = {"id": opening.id, "created": opening.created, "model": opening.model}
            # Many servers say the role in a chunk of its own.
            tokens -= not any(_has_text(choice) for choice in opening.choices or ())
        self._text += stream.text
        self._tokens += stream.usage.output_tokens or max(0, tokens)

    def _body(self) -> dict[str, Any]:
        messages = _encode(self._fields["messages"]).strip()
        so_far = _encode({"role": "assistant", "content": self._text})
        body = {
            **self._fields,
            "messages": msgspec.Raw(messages[:-1] + b"," + so_far + b"]"),
            "continue_final_message": True,
            "add_generation_prompt": False,
        }
        for name in _LIMITS:
            if name in body:
                limit = msgspec.json.decode(_encode(body[name]), type=int | None)
                if limit is not None:
                    body[name] = max(1, limit - self._tokens)
        return body

    def _joined(self, line: bytes, head: dict[str, Any]) -> bytes:
        payload = line[5:].strip()
        if not payload.startswith(b"{"):
            return line
        chunk = {**_object.decode(payload), **head}
        for choice in cast("list[dict[str, Any]]", chunk.get("choices") or []):
            delta = choice.get("delta")
            if isinstance(delta, dict):
                cast("dict[str, Any]", delta).pop("role", None)
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            # To its endpoint the text so far was a part of the prompt.
            counts = cast("dict[str, Any]", usage)
            counts["prompt_tokens"] = max(0, tokens(counts.get("prompt_tokens")) - self._tokens)
            counts["completion_tokens"] = tokens(counts.get("completion_tokens")) + self._tokens
        return b"data: " + _encode(chunk)


def _first_chunk(data: bytes) -> _Chunk:
    for line in data.split(b"\n"):
        if line.startswith(b"data:"):
            return _chunk.decode(line[5:])
    return _Chunk()


def _has_text(choice: dict[str, Any]) -> bool:
    delta: Any = choice.get("delta")
    return isinstance(delta, dict) and bool(cast("dict[str, Any]", delta).get("content"))
