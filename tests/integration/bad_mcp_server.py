"""MCP servers that misbehave, one for each name: what they speak is right until then."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

TOOL = {"name": "go", "description": "Goes.", "inputSchema": {"type": "object"}}


def requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message and "method" in message:
            yield message


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def answer(request: dict[str, Any], tools: list[dict[str, Any]]) -> None:
    """Answer what comes before the first call, by the protocol of 2025."""
    result: dict[str, Any]
    if request["method"] == "initialize":
        result = {
            "protocolVersion": "2025-11-25",
            "capabilities": {"tools": {"listChanged": True}},
            "serverInfo": {"name": "bad", "version": "1"},
        }
    elif request["method"] == "tools/list":
        result = {"tools": tools}
    else:
        say({"id": request["id"], "error": {"code": -32601, "message": "unknown"}})
        return
    say({"id": request["id"], "result": result})


def text(request: dict[str, Any], said: str) -> None:
    say({"id": request["id"], "result": {"content": [{"type": "text", "text": said}]}})


def called(name: str, request: dict[str, Any]) -> None:
    if name == "flood":
        while True:
            say({"method": "notifications/message", "params": {"level": "info", "data": "x"}})
    elif name == "endless":
        while True:
            sys.stdout.write("x" * 65_536)
    elif name == "huge":
        text(request, "x" * 3_000_000)
    elif name == "deaf":
        time.sleep(3_600)
    elif name == "nested":
        sys.stdout.write(f'{{"jsonrpc":"2.0","id":{request["id"]},"result":{"[" * 500_000}\n')
        sys.stdout.flush()
    elif name == "invalid":
        say({"id": request["id"], "result": {"content": "no list"}})
    elif name == "asks":
        say({"id": "s1", "method": "sampling/createMessage", "params": {"messages": []}})
        for line in sys.stdin:
            reply = json.loads(line)
            if reply.get("id") == "s1":
                text(request, "refused" if "error" in reply else "answered")
                return
    else:
        text(request, "went")


def main(name: str) -> None:
    if name == "silent":
        time.sleep(3_600)
    if name == "garbage":
        for number in range(100):
            sys.stdout.write(f"starting up, step {number} {{\n\n")
    tools = [TOOL]
    if name == "tools":
        tools = [
            {**TOOL, "name": "files/read file"},
            {**TOOL, "name": "a" * 100},
            {**TOOL, "name": "a" * 99},
            {**TOOL, "name": "wild", "inputSchema": {"type": "object", "$ref": "http://x/y"}},
        ]
    if name == "list":
        tools.append({**TOOL, "name": "text", "inputSchema": {"type": "string"}})
    for request in requests():
        if request["method"] == "tools/call":
            called(name, request)
        elif request["method"] == "tools/list" and name == "pages":
            page = int((request.get("params") or {}).get("cursor", "0"))
            found = [{**TOOL, "name": f"go{page}"}]
            result = {"tools": found, "nextCursor": str(page + 1)}
            say({"id": request["id"], "result": result})
        else:
            answer(request, tools)


if __name__ == "__main__":
    main(sys.argv[1])
