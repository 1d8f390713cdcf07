"""One connection to an MCP server: list its tools, call them, and notice its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import mcp_types as types
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import SubscriptionLost
from mcp.shared.exceptions import MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import TypeAdapter, ValidationError

from agentray.config.settings import McpSettings
from agentray.errors import ToolError
from agentray.tools.egress import Lookup
from agentray.tools.mcp_http import open_http
from agentray.tools.mcp_inbound import Inbound
from agentray.tools.mcp_launch import Launcher
from agentray.tools.mcp_stdio import stdio
from agentray.tools.mcp_tools import Listed, shown_result

if TYPE_CHECKING:
    from mcp.client._transport import TransportStreams

__all__ = ["Connection"]

_MOST_PAGES = 50
_PROBE_S = 5.0
_LEAST_BETWEEN_LISTS_S = 1.0
_MOST_MESSAGE = 2_000
_MOST_PLACE = 100
# What a server's error means; all others say that the server, or the way to it, failed.
_REASONS = {types.INVALID_PARAMS: "invalid", types.METHOD_NOT_FOUND: "invalid"}
_ENDED = ("Connection closed", "Session terminated")
_RESULT: TypeAdapter[types.CallToolResult | types.InputRequiredResult] = TypeAdapter(
    types.CallToolResult | types.InputRequiredResult
)


class Connection:
    """A connection that lives as long as :meth:`run`.

    Requests of the server's are refused by its session; what it says of progress and logs is not
    listened to.
    """

    def __init__(
        self,
        name: str,
        settings: McpSettings,
        *,
        launcher: Launcher | None,
        lookup: Lookup,
    ) -> None:
        self._name = name
        self._settings = settings
        self._launcher = launcher
        self._lookup = lookup
        self._client: Client | None = None
        self._ended = asyncio.Event()
        self._outdated = asyncio.Event()
        self._probing: asyncio.Task[None] | None = None

    async def run(self, listed: Callable[[Sequence[Listed]], None]) -> None:
        """Connect, tell the tools now and whenever they change, and return when it has ended.

        Raises:
            Exception: of many kinds, in groups: what ended it, or did not let it begin.
        """
        _hush()
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(self._settings.start_timeout_s):
                client = await stack.enter_async_context(self._new_client())
                tools = await self._list(client)
            self._client = client
            stack.callback(self._over)
            listed(tools)
            async with asyncio.TaskGroup() as tasks:
                aside = [
                    tasks.create_task(self._listen(client)),
                    tasks.create_task(self._list_again(client, listed)),
                ]
                await self._ended.wait()
                for task in aside:
                    task.cancel()

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """Call a tool and return its text. A cancelled call is cancelled at the server.

        Raises:
            ToolError: it failed; ``reason`` in the fields says at whose hands.
        """
        if self._client is None or not self.alive:
            raise self._lost()
        params = types.CallToolRequestParams(name=tool, arguments=arguments)
        request = types.CallToolRequest(params=params)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                result = await self._client.session.send_request(request, _RESULT)
        except TimeoutError as error:
            self._suspect()
            limit_s = self._settings.timeout_s
            raise ToolError(f"{tool} took longer than {limit_s:g} s", reason="timeout") from error
        except MCPError as error:
            raise self._failed(error) from error
        except ValidationError:
            # Without its cause, which quotes the answer.
            what = f"the server {self._name!r} gave no valid answer"
            raise ToolError(what, reason="upstream") from None
        return self._shown(result)

    def end(self) -> None:
        """Have :meth:`run` return."""
        self._ended.set()

    @property
    def alive(self) -> bool:
        """Whether calls can be made."""
        return self._client is not None and not self._ended.is_set()

    def _over(self) -> None:
        self._client = None
        if self._probing is not None:
            self._probing.cancel()

    def _shown(self, result: types.CallToolResult | types.InputRequiredResult) -> str:
        if isinstance(result, types.InputRequiredResult):
            raise ToolError("the tool asks for input, which nobody gives", reason="refused")
        blocks = [block.model_dump(by_alias=True, mode="json") for block in result.content]
        text = shown_result(blocks, result.structured_content, self._settings.max_output_bytes)
        if result.is_error:
            raise ToolError(text or "the tool failed and did not say why", reason="error")
        return text

    def _failed(self, error: MCPError) -> ToolError:
        if error.code == types.CONNECTION_CLOSED or error.message in _ENDED:
            self.end()
            return self._lost()
        return ToolError(
            f"the server {self._name!r} answered: {error.message[:_MOST_MESSAGE]}",
            reason=_REASONS.get(error.code, "upstream"),
        )

    def _lost(self) -> ToolError:
        return ToolError(f"the server {self._name!r} was lost", reason="upstream")

    def _suspect(self) -> None:
        """See whether a server that let a call run out of time still answers anything."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        try:
            # Who waits for calls no longer than that does not wait longer for a sign of life.
            async with asyncio.timeout(max(1.0, min(_PROBE_S, self._settings.timeout_s))):
                if self._client is not None:
                    await self._client.session.list_tools()
        except (TimeoutError, MCPError, ValidationError):
            self.end()

    async def _list_again(self, client: Client, listed: Callable[[Sequence[Listed]], None]) -> None:
        while True:
            await self._outdated.wait()
            self._outdated.clear()
            async with asyncio.timeout(self._settings.start_timeout_s):
                listed(await self._list(client))
            # A server that says so again and again is not asked any faster.
            await asyncio.sleep(_LEAST_BETWEEN_LISTS_S)

    async def _listen(self, client: Client) -> None:
        """Hear of changed tools where the protocol has it that one asks for it."""
        tools = client.server_capabilities.tools
        if client.protocol_version not in MODERN_PROTOCOL_VERSIONS or not (
            tools and tools.list_changed
        ):
            return
        try:
            async with client.listen(tools_list_changed=True) as changes:
                async for _ in changes:
                    self._outdated.set()
        except (SubscriptionLost, MCPError):
            # The tools that are known stay known; the next connection asks again.
            return

    async def _heard(self, message: types.ServerNotification | Exception) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self._outdated.set()

    async def _list(self, client: Client) -> list[Listed]:
        found: list[Listed] = []
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            params = types.PaginatedRequestParams(cursor=cursor) if cursor else None
            try:
                page = await client.session.list_tools(params=params)
            except ValidationError as error:
                # Where it is wrong, and not with what: that is the server's word.
                place = ".".join(map(str, error.errors(include_input=False)[0]["loc"]))
                what = f"its list of tools is not valid at {place[:_MOST_PLACE]}"
                raise ToolError(what, reason="upstream") from None
            found.extend(map(_listed, page.tools))
            cursor = page.next_cursor
            if not cursor or len(found) > 4 * self._settings.max_tools:
                break
        return found

    def _new_client(self) -> Client:
        version = types.Implementation(name="agentray", version="1")
        return Client(
            self._transport(),
            mode="auto",
            cache=None,
            client_info=version,
            message_handler=self._heard,
        )

    @asynccontextmanager
    async def _transport(self) -> AsyncGenerator[TransportStreams]:
        settings = self._settings
        if settings.url is not None:
            http = open_http(
                {name: value.get_secret_value() for name, value in settings.headers.items()},
                self._lookup,
                private=settings.private,
                most_bytes=settings.max_message_bytes,
                read_timeout_s=settings.timeout_s + _PROBE_S,
            )
            async with (
                http,
                streamable_http_client(
                    settings.url, http_client=http, max_sse_event_size=settings.max_message_bytes
                ) as streams,
            ):
                yield streams
            return
        assert settings.command is not None
        assert self._launcher is not None
        env = {name: value.get_secret_value() for name, value in settings.env.items()}
        started = await self._launcher.start([settings.command, *settings.args], env)
        async with stdio(started, Inbound(settings.max_message_bytes), self.end) as streams:
            yield streams


def _listed(tool: types.Tool) -> Listed:
    hints = tool.annotations
    return Listed(
        name=tool.name,
        description=tool.description or tool.title or "",
        schema=tool.input_schema,
        read_only=bool(hints and hints.read_only_hint),
        idempotent=bool(hints and hints.idempotent_hint),
    )


def _hush() -> None:
    # These loggers quote messages of servers, and so results; `client` is the session's.
    for name in ("mcp", "client", "httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
