"""Call models over HTTP: streamed, with deadlines, and never an answer that is not whole.

Its cost per call is on the path of every turn: requests are put together as bytes, all chunks
of one read are taken at once, and one timer watches over all deadlines of a call.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from agentray.clock import Clock, SystemClock
from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError, ModelUnavailableError
from agentray.models.base import ModelProgress, ModelRequest
from agentray.models.catalog import Catalog
from agentray.models.chat_answer import RawStream, StreamedAnswer, shown
from agentray.models.chat_stream import ChatStream
from agentray.models.refusals import refusal, refusal_in_answer, retry_after_s, unavailable
from agentray.models.whole_answer import is_completion, is_embeddings, is_error

__all__ = ["ModelClient", "RawStream"]

# Below the five seconds after which uvicorn, and with it vLLM, closes an idle connection: a
# request on a connection that is just being closed would fail.
KEEPALIVE_S = 3.0
MAX_REFUSAL_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024
# Larger bodies are written in pieces, so that a write never holds up the loop.
MAX_PLAIN_BODY_BYTES = 1024 * 1024

_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class _Target:
    """A model's endpoint, ready to be called."""

    model: str
    upstream: bytes
    url: URL
    embeddings_url: URL
    headers: dict[str, str]
    secret: str | None


class ModelClient:
    """Calls the models of a catalog; one per process and event loop. See ``ModelCaller``."""

    def __init__(
        self, catalog: Catalog, settings: ModelsSettings, *, clock: Clock | None = None
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._clock = clock or SystemClock()
        self._targets: dict[str, _Target] = {}
        self._http: aiohttp.ClientSession | None = None
        self._ending: set[aiohttp.ClientResponse] = set()
        self._closed = False

    async def close(self) -> None:
        """Close all connections; calls under way end with ``ModelUnavailableError``."""
        self._closed = True
        for response in self._ending:
            response.close()
        self._ending.clear()
        if self._http is not None:
            await self._http.close()

    async def stream(self, request: ModelRequest) -> AsyncGenerator[ModelProgress, None]:
        """Call and yield progress until the answer is whole. See ``ModelCaller.stream``.

        An answer is whole with its ``finish_reason``; if the stream breaks off behind that, only
        its usage is lost.
        """
        target = self._target(request.model)
        chat = ChatStream(
            request.model,
            may_be_empty=request.continue_text,
            secret=target.secret,
            max_tokens=request.max_output_tokens,
        )
        body = _chat_body(target, request)
        answer = await self._open(target, body, request.session_id, chat, request.timeout_s)
        text = ""
        try:
            while await answer.read():
                text = answer.text
                if text and not chat.done:
                    yield ModelProgress(text)
                    text = ""
            calls = chat.finish()
        finally:
            answer.close()
        yield ModelProgress(text, chat.finish_reason, calls, chat.usage)

    async def complete_raw(
        self,
        model: str,
        body: Mapping[str, Any],
        *,
        session_id: str | None = None,
        timeout_s: float | None = None,
        continues: bool = False,
    ) -> bytes | RawStream:
        """Pass a body for ``/v1/chat/completions`` on, and the answer back as it comes.

        Only the model's name is replaced by its name at the endpoint. With ``"stream": true`` the
        result is a stream whose first token is there already, so that a refusal is raised here;
        the caller must ``aclose`` it. Else it is the whole JSON. ``continues`` says that the body
        asks to go on with a text, which may turn out to have been complete.

        Raises:
            ModelError: as for ``stream``.
        """
        target = self._target(model)
        streams = body.get("stream")
        payload = _encode({**body, "model": msgspec.Raw(target.upstream)})
        if streams is True or (isinstance(streams, msgspec.Raw) and bytes(streams) == b"true"):
            chat = ChatStream(model, may_be_empty=continues, passed_on=True, secret=target.secret)
            answer = await self._open(target, payload, session_id, chat, timeout_s)
            return await _begun(answer, chat)
        return await self._complete(target, payload, session_id, timeout_s)

    async def embed_raw(
        self, model: str, body: Mapping[str, Any], *, timeout_s: float | None = None
    ) -> bytes:
        """Pass a body for ``/v1/embeddings`` on, and the whole answer back as it comes.

        Raises:
            ModelError: as for ``stream``.
        """
        target = self._target(model)
        payload = _encode({**body, "model": msgspec.Raw(target.upstream)})
        url = target.embeddings_url
        answer = await self._whole(target, payload, None, timeout_s, url=url)
        if not is_embeddings(answer):
            raise self._no_answer(target, answer, "embeddings")
        return answer

    def _target(self, model: str) -> _Target:
        target = self._targets.get(model)
        if target is None:
            endpoint = self._catalog.resolve(model)
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            secret = endpoint.api_key.get_secret_value() if endpoint.api_key else None
            if secret:
                headers["Authorization"] = f"Bearer {secret}"
            target = self._targets[model] = _Target(
                model=model,
                upstream=_encode(endpoint.upstream),
                url=URL(endpoint.url + "/chat/completions"),
                embeddings_url=URL(endpoint.url + "/embeddings"),
                headers=headers,
                secret=secret,
            )
        return target

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, connect=self._settings.connect_timeout_s),
                skip_auto_headers=("User-Agent", "Accept"),
            )
        return self._http

    def _is_hurried(self, timeout_s: float) -> bool:
        """Return whether a call has less time than a model may take to begin: if it is silent for
        so long, that says nothing of the model. A step that has less as a whole has that, and its
        first call must be able to find a model out."""
        settings = self._settings
        return timeout_s < min(settings.first_token_timeout_s, settings.step_timeout_s / 2)

    async def _post(
        self,
        target: _Target,
        body: bytes,
        session_id: str | None,
        deadline: float,
        *,
        hurried: bool,
        url: URL | None = None,
    ) -> aiohttp.ClientResponse:
        """Return the response once it is known to be neither a refusal nor unreachable."""
        if self._closed:
            raise ModelUnavailableError("the model client is closed", model=target.model)
        headers = target.headers
        if session_id is not None:
            headers = {**headers, "x-session-id": session_id}
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._session().post(
                    url or target.url,
                    data=body if len(body) <= MAX_PLAIN_BODY_BYTES else io.BytesIO(body),
                    headers=headers,
                    allow_redirects=False,
                )
                if response.status == 200:
                    return response
                try:
                    said = await _read_at_most(response, MAX_REFUSAL_BYTES)
                finally:
                    response.close()
        except TimeoutError as error:
            # One of aiohttp's own is that no connection came about in its time.
            hurried = hurried and not isinstance(error, aiohttp.ClientError)
            raise _late(target.model, hurried) from error
        except (aiohttp.ClientError, OSError) as error:
            reached = not isinstance(error, aiohttp.ClientConnectorError)
            if not reached:
                said = f"cannot be reached: {shown(error)}"
                raise unavailable(target.model, said, unreached=True) from error
            raise unavailable(target.model, f"broke off: {shown(error)}") from error
        wait = retry_after_s(response.headers.get("Retry-After"), self._clock.now())
        raise refusal(target.model, response.status, said, retry_after=wait, secret=target.secret)

    async def _open(
        self,
        target: _Target,
        body: bytes,
        session_id: str | None,
        chat: ChatStream,
        timeout_s: float | None = None,
    ) -> StreamedAnswer:
        settings = self._settings
        now = asyncio.get_running_loop().time()
        timeout_s = settings.step_timeout_s if timeout_s is None else timeout_s
        first = now + min(settings.first_token_timeout_s, timeout_s)
        hurried = self._is_hurried(timeout_s)
        response = await self._post(target, body, session_id, first, hurried=hurried)
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise await self._not_a_stream(target, response, first)
        return StreamedAnswer(
            response,
            chat,
            model=target.model,
            first_due=first,
            end_due=now + timeout_s,
            stall_s=settings.stall_timeout_s,
            hurried=hurried,
            ending=self._ending,
        )

    async def _not_a_stream(
        self, target: _Target, response: aiohttp.ClientResponse, deadline: float
    ) -> ModelError:
        kind = response.headers.get("Content-Type", "nothing")[:100]
        try:
            async with asyncio.timeout_at(deadline):
                said = await _read_at_most(response, MAX_REFUSAL_BYTES)
        except (TimeoutError, aiohttp.ClientError, OSError):
            said = b""  # That it is no stream is the error; the rest would have explained it.
        finally:
            response.close()
        if is_error(said):
            return refusal_in_answer(target.model, said, target.secret)
        return unavailable(target.model, f"answered with {kind}, not with a stream")

    async def _complete(
        self, target: _Target, body: bytes, session_id: str | None, timeout_s: float | None
    ) -> bytes:
        answer = await self._whole(target, body, session_id, timeout_s)
        if not is_completion(target.model, answer):
            raise self._no_answer(target, answer, "completion")
        return answer

    def _no_answer(self, target: _Target, said: bytes, kind: str) -> ModelError:
        if is_error(said):
            return refusal_in_answer(target.model, said, target.secret)
        return unavailable(target.model, f"answered with something that is no {kind}")

    async def _whole(
        self,
        target: _Target,
        body: bytes,
        session_id: str | None,
        timeout_s: float | None,
        *,
        url: URL | None = None,
    ) -> bytes:
        timeout_s = self._settings.step_timeout_s if timeout_s is None else timeout_s
        deadline = asyncio.get_running_loop().time() + timeout_s
        hurried = self._is_hurried(timeout_s)
        response = await self._post(target, body, session_id, deadline, hurried=hurried, url=url)
        try:
            async with asyncio.timeout_at(deadline):
                answer = await _read_at_most(response, MAX_ANSWER_BYTES + 1)
        except TimeoutError as error:
            raise _late(target.model, hurried) from error
        except (aiohttp.ClientError, OSError) as error:
            raise unavailable(target.model, f"broke off: {shown(error)}") from error
        finally:
            response.close()
        if len(answer) > MAX_ANSWER_BYTES:
            # Asked again, it would be as large.
            most = MAX_ANSWER_BYTES // 1024**2
            raise ModelError(
                f"model {target.model!r} gave an answer of more than {most} MiB",
                model=target.model,
            )
        return answer


def _late(model: str, hurried: bool) -> ModelError:
    facts = {"out_of_time": True} if hurried else {}
    return unavailable(model, "did not answer in time", **facts)


async def _begun(answer: StreamedAnswer, chat: ChatStream) -> RawStream:
    """Return a stream whose first token is there; what goes before it is no answer yet."""
    first: list[bytes] = []
    texts: list[str] = []
    try:
        while not chat.started and (data := await answer.read()):
            first.append(data)
            texts.append(answer.text)
        if not chat.started or chat.finish_reason is not None:
            chat.finish()
    except BaseException:
        answer.close()
        raise
    return RawStream(answer, chat, b"".join(first), "".join(texts))


def _chat_body(target: _Target, request: ModelRequest) -> bytes:
    parts = [b'{"model":', target.upstream, b',"messages":[', request.messages, b"]"]
    if request.tools:
        parts += (b',"tools":[', request.tools, b"]")
    if request.temperature is not None:
        parts.append(b',"temperature":' + _encode(request.temperature))
    if request.top_p is not None:
        parts.append(b',"top_p":' + _encode(request.top_p))
    if request.max_output_tokens is not None:
        parts.append(b',"max_completion_tokens":%d' % request.max_output_tokens)
    if request.output_schema is not None:
        parts.append(b',"response_format":' + request.output_schema)
    if request.continue_text:
        parts.append(b',"continue_final_message":true,"add_generation_prompt":false')
    parts.append(b',"stream":true,"stream_options":{"include_usage":true}}')
    return b"".join(parts)


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size < limit:
        part = await response.content.readany()
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)[:limit]
