"""Answer like an OpenAI-compatible model server, with a latency profile and no model.

Load tests and first steps run against it. An ASGI application without a framework: it must be
several times faster than what is measured with it. What it answers is decided in
``simulator_script``, how an answer leaves is in ``simulator_call``.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec

from agentray.config.settings import SimulatorSettings
from agentray.models.catalog import MODELS_PREFIX, SIMULATOR_MODEL
from agentray.models.simulator_call import (
    Call,
    ClientGoneError,
    Pauses,
    Receive,
    RefusedError,
    Send,
    scripted_failure,
    send_json,
)
from agentray.models.simulator_embeddings import EmbeddingError, embed
from agentray.models.simulator_script import (
    ChatMessage,
    ChatRequest,
    ScriptError,
    find_script,
    prompt_tokens,
)

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["SIMULATOR_PREFIX", "Simulator", "build_simulator_app"]

Scope = MutableMapping[str, Any]

SIMULATOR_PREFIX = f"{MODELS_PREFIX}/{SIMULATOR_MODEL}"
MAX_BODY_BYTES = 32 * 1024 * 1024
PREFIXES_KEPT = 100_000

_encode = msgspec.json.encode
_request_decoder = msgspec.json.Decoder(ChatRequest)


class _Prefixes:
    """Remembers the prompts it saw, by hashes of their prefixes, as a model's KV cache would."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: dict[int, None] = {}

    def count(self, model: str, messages: Sequence[ChatMessage]) -> tuple[int, int]:
        """Return the tokens of a prompt and how many of them are a known prefix; learn it."""
        seen = self._seen
        state = hash(model)
        tokens = cached = 0
        states: list[int] = []
        known = 0
        for message in messages:
            calls = message.tool_calls
            state = hash((state, message.role, message.text, bytes(calls) if calls else None))
            states.append(state)
            tokens += prompt_tokens(message)
            if state in seen:
                known, cached = len(states), tokens
        for state in states[max(known - 1, 0) :]:
            # Again at the end: the oldest are forgotten first.
            seen.pop(state, None)
            seen[state] = None
        while len(seen) > self._limit:
            del seen[next(iter(seen))]
        return tokens, cached


class Simulator:
    """The ASGI application: ``/v1/chat/completions``, ``/v1/embeddings``, ``/v1/models``
    and ``/healthz``.

    It answers under ``prefix`` as well as under the root, whatever ``root_path`` says.
    """

    def __init__(
        self,
        settings: SimulatorSettings,
        *,
        prefix: str = SIMULATOR_PREFIX,
        rng: random.Random | None = None,
    ) -> None:
        self._settings = settings
        self._prefix = prefix
        self._rng = rng or random.Random()
        self._prefixes = _Prefixes(PREFIXES_KEPT)
        self._running = 0
        self._calls = 0
        self._name = secrets.token_hex(6)

    @property
    def running(self) -> int:
        """Calls that are being answered now."""
        return self._running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _serve_lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        pauses = Pauses(receive)
        try:
            await self._route(scope, receive, send, pauses)
        except RefusedError as refused:
            headers: list[tuple[bytes, bytes]] = []
            if refused.retry_after_s is not None:
                headers.append((b"retry-after", b"%d" % refused.retry_after_s))
            await send_json(send, refused.status, refused.body, headers)
        except (ClientGoneError, OSError):
            pass  # Nobody is left to be told.
        finally:
            pauses.close()

    async def _route(self, scope: Scope, receive: Receive, send: Send, pauses: Pauses) -> None:
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        path = path.removeprefix(root) if root else path
        path = path.removeprefix(self._prefix)
        if path == "/v1/chat/completions":
            if scope["method"] != "POST":
                raise RefusedError(405, "use POST", "method_not_allowed")
            await self._complete(await _read_body(receive), send, pauses)
        elif path == "/v1/embeddings":
            if scope["method"] != "POST":
                raise RefusedError(405, "use POST", "method_not_allowed")
            try:
                answer = embed(await _read_body(receive))
            except EmbeddingError as error:
                raise RefusedError(400, str(error), "invalid_request") from error
            await send_json(send, 200, answer)
        elif path == "/v1/models":
            model = {
                "id": SIMULATOR_MODEL,
                "object": "model",
                "created": 0,
                "owned_by": "agentray",
                "max_model_len": self._settings.context_window,
            }
            await send_json(send, 200, _encode({"object": "list", "data": [model]}))
        elif path == "/healthz":
            await send_json(send, 200, b'{"status":"ok"}')
        else:
            raise RefusedError(404, f"there is nothing at {path[:200]}", "not_found")

    async def _complete(self, body: bytes, send: Send, pauses: Pauses) -> None:
        started = asyncio.get_running_loop().time()
        try:
            request = _request_decoder.decode(body)
            script = find_script(request.messages, request.model)
        except (msgspec.DecodeError, ScriptError, UnicodeDecodeError) as error:
            raise RefusedError(400, str(error), "invalid_request") from error
        settings = self._settings
        if self._running >= settings.max_concurrent:
            raise RefusedError(
                429, "too many concurrent requests", "rate_limit_exceeded", retry_after_s=1
            )
        if settings.error_rate and self._rng.random() < settings.error_rate:
            raise RefusedError(500, "simulated failure", "internal_error")
        if script and script.status is not None and script.fail_after is None:
            raise scripted_failure(script.status)
        prompt, cached = self._prefixes.count(request.model, request.messages)
        limit = request.max_completion_tokens or request.max_tokens
        room = settings.context_window - prompt
        if room < (limit or 1):
            raise RefusedError(
                400,
                f"the context window is {settings.context_window} tokens; {prompt} are in the "
                f"messages and {limit or 1} in the completion",
                "context_length_exceeded",
            )
        self._calls += 1
        call = Call(
            f"{self._name}{self._calls:06x}", request, script, min(limit or room, room), settings
        )
        call.prompt_tokens, call.cached_tokens = prompt, cached
        call.first_at = started + call.ttft_s
        self._running += 1
        try:
            await (call.stream(send, pauses) if request.stream else call.answer(send, pauses))
        finally:
            self._running -= 1


async def _read_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise RefusedError(413, "the request body is too large", "body_too_large")
        if not message.get("more_body", False):
            return body


async def _serve_lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": kind + ".complete"})
        if kind == "lifespan.shutdown":
            return


class _SimulatorReplica:
    def __init__(
        self, settings: SimulatorSettings, mount: Callable[[Simulator], None] | None
    ) -> None:
        self._simulator = Simulator(settings)
        if mount is not None:
            mount(self._simulator)

    def __serve_build_asgi_app__(self) -> Simulator:
        return self._simulator


def build_simulator_app(
    settings: SimulatorSettings, *, mount: Callable[[Simulator], None] | None = None
) -> Application:
    """Return the Serve application; run it with the route prefix ``SIMULATOR_PREFIX``.

    ``mount`` is called in each replica with its simulator before the replica serves.
    """
    from ray import serve

    # Serve's decorators are not typed.
    deploy: Any = cast(Any, serve).deployment(
        name=SIMULATOR_MODEL,
        num_replicas=settings.replicas,
        # Admission is the simulator's own: it answers 429, Serve would queue without bound.
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    replica: Any = cast(Any, serve).ingress()(_SimulatorReplica)
    return deploy(replica).bind(settings, mount)
