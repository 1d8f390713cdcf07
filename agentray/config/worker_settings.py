"""The settings of the tool workers and of the queue in front of them."""

from __future__ import annotations

from pydantic import Field

from agentray.config.section import Count, Seconds, Section

__all__ = ["TenantShareSettings", "ToolWorkersSettings"]


class TenantShareSettings(Section):
    """What a tenant gets of the tool workers."""

    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Its share, beside those of others."
    )
    max_running: Count | None = Field(
        default=None, description="Calls of it that run at once; no bound of its own if none."
    )
    max_queued: Count | None = Field(
        default=None, description="Calls of it that may wait; `max_queued_per_tenant` if none."
    )


class ToolWorkersSettings(Section):
    """The processes that run tool calls, and the queue in front of them."""

    min: Count | None = Field(
        default=None, description="Least workers; one for each node of the cluster if none."
    )
    max: Count = Field(default=4, description="Most workers, but for one on each node.")
    slots: int = Field(default=8, ge=1, le=256, description="Calls that one worker runs at once.")
    cpus: float = Field(
        default=0.5,
        gt=0,
        allow_inf_nan=False,
        description="Cores that Ray sets aside for a worker.",
    )
    memory_bytes: Count = Field(
        default=1024**3, description="Memory that Ray sets aside for a worker, in bytes."
    )
    max_queued: Count = Field(default=10_000, description="Calls of all tenants that may wait.")
    max_queued_per_tenant: Count = Field(
        default=1_000, description="Calls of one tenant that may wait."
    )
    max_wait_s: Seconds = Field(
        default=60.0, description="Time after which a call that still waits is dropped."
    )
    up_after_wait_s: Seconds = Field(
        default=1.0, description="Expected wait of a new call, above which a worker is added."
    )
    up_delay_s: float = Field(
        default=2.0, ge=0, description="Time that it has to last before a worker is added."
    )
    down_after_idle_s: Seconds = Field(
        default=300.0, description="Time without a call after which a worker is removed."
    )
    tenants: dict[str, TenantShareSettings] = Field(
        default_factory=dict, description="Shares of tenants by name; of others, the defaults."
    )
