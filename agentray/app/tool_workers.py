"""Put together what a tool worker runs calls with: the tools, and a runner for each slot."""

from __future__ import annotations

__all__ = ["WorkerTools"]
