"""Bring calls of Python handles to the session's owner: Serve's request router for hosts."""

from __future__ import annotations

from typing import Any

from ray.experimental.internal_kv import (
    _internal_kv_get,  # pyright: ignore[reportPrivateUsage]
    _internal_kv_put,  # pyright: ignore[reportPrivateUsage]
)
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from agentray.clock import SystemClock
from agentray.config.settings import RedisSettings
from agentray.storage.redis import RedisStore

__all__ = ["OwnerRouter", "tell_redis_url"]

_KEY, _NAMESPACE = "redis_url", "agentray"


def tell_redis_url(url: str) -> None:
    """Leave the address of Redis with Ray's GCS, where the routers of all nodes find it.

    Serve would show a router's arguments, and the password with them, in its status and on the
    dashboard. Blocks for a moment; the process must be connected to the cluster.
    """
    _internal_kv_put(_KEY, url, namespace=_NAMESPACE)


class OwnerRouter(ConsistentHashRouter):
    """Routes by the owner that Redis hints at, and by load where there is no hint.

    The handle's ``session_id`` option is ``<tenant>/<session id>``. A wrong or missing hint costs
    a detour, nothing else: whichever host gets the call reaches the owner. The parent class is
    there for its loop, which routes each request for itself; its ring is not used.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Connect to the Redis of :func:`tell_redis_url`."""
        super().initialize_state()  # pyright: ignore[reportUnknownMemberType]
        self._hints = RedisStore(
            _internal_kv_get(_KEY, namespace=_NAMESPACE).decode(),
            RedisSettings(timeout_s=kwargs["timeout_s"]),  # type: ignore[call-arg]
            window_turns=1,
            clock=SystemClock(),
        )

    async def choose_replicas(  # type: ignore[override]
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Return the hinted owner first, then all, of which Serve takes the least loaded."""
        if not candidate_replicas:
            return []
        ranks = [candidate_replicas]
        session = "" if pending_request is None else pending_request.metadata.session_id
        if pending_request is not None and session:
            pending_request.routing_context.should_backoff = True
            tenant, _, session_id = session.partition("/")
            hint = await self._hints.owner_hint(tenant, session_id)
            owner = [r for r in candidate_replicas if r.replica_id.unique_id == hint]
            if owner:
                ranks.insert(0, owner)
        return ranks
