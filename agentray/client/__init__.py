"""What callers import: handles to session actors, and the HTTP client."""

from agentray.client.handles import Connection, SessionHandle, connect
from agentray.client.http import Client, Session, TurnStream
from agentray.client.http_async import AsyncClient, AsyncSession, AsyncTurnStream

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "AsyncTurnStream",
    "Client",
    "Connection",
    "Session",
    "SessionHandle",
    "TurnStream",
    "connect",
]
