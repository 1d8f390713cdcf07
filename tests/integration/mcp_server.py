"""A small real MCP server: ``stdio``, or ``http`` with a port, which it prints once it listens."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import anyio
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp_types import ToolAnnotations

server = MCPServer("small")
READS = ToolAnnotations(read_only_hint=True)


@server.tool(annotations=READS)
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
def environment(name: str) -> str:
    """Says a variable of its environment."""
    return os.environ.get(name, "not there")


@server.tool()
def look(path: str) -> str:
    """Says whether a file is there."""
    return "there" if Path(path).exists() else "not there"


@server.tool()
def reach(port: int) -> str:
    """Says whether something listens here."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return "not reached"
    return "reached"


@server.tool()
def user() -> int:
    """Says who runs it."""
    return os.getuid()


@server.tool()
def leave(mark: str) -> str:
    """Starts a program that is to outlive it, in a session of its own."""
    program = [sys.executable, "-c", "import time; time.sleep(600)", mark]
    subprocess.Popen(program, start_new_session=True)
    return "left"


@server.tool()
def picture() -> Image:
    """Gives a picture."""
    return Image(data=b"\x89PNG" * 100, format="png")


@server.tool(structured_output=False)
def long(size: int) -> str:
    """Says much."""
    return "x" * size


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("it is broken")


@server.tool()
async def slow(path: str, seconds: float = 60.0) -> str:
    """Sleeps, and leaves a file when it begins and another when it is cancelled."""
    await asyncio.to_thread(Path(path + ".begun").touch)
    try:
        await anyio.sleep(seconds)
    except anyio.get_cancelled_exc_class():
        Path(path + ".cancelled").touch()  # noqa: ASYNC240 - a thread would be cancelled too
        raise
    return "slept"


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
async def grow(ctx: Context) -> str:
    """Adds a tool, and tells of it."""

    def grown() -> str:
        """Came later."""
        return "grown"

    server.add_tool(grown)
    await ctx.notify_tools_changed()
    return "done"


if __name__ == "__main__":
    if sys.argv[1] == "http":
        server.run("streamable-http", port=int(sys.argv[2]))
    else:
        server.run("stdio")
