"""The settings of every room: frozen sections, composed, each default written once."""

from __future__ import annotations

import os
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

__all__ = [
    "SIMULATOR",
    "AgentSettings",
    "EndpointSettings",
    "HttpSettings",
    "LogSettings",
    "ModelsSettings",
    "PostgresSettings",
    "RaySettings",
    "RedisSettings",
    "SessionsSettings",
    "Settings",
    "SimulatorSettings",
]

SIMULATOR = "simulator"
"""The name of the model that the built-in simulator serves."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would take true for 1.
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("neither true nor false is meant here")
        return value


class HttpSettings(_Section):
    """The front door."""

    host: str = Field(default="127.0.0.1", description="Address that every listener binds to.")
    port: int = Field(default=8000, ge=1, le=65535, description="Port of the HTTP endpoint.")
    max_body_bytes: Count = Field(
        default=4 * 1024 * 1024, description="Largest request body, in bytes."
    )
    stream_write_timeout_s: Seconds = Field(
        default=30.0, description="A stream whose client takes nothing for this long is dropped."
    )
    keepalive_s: Seconds = Field(
        default=15.0, description="Pause after which a stream sends a comment."
    )


class PostgresSettings(_Section):
    """The durable tier."""

    url: SecretStr | None = Field(
        default=None,
        description="Address of PostgreSQL; without one an embedded server is started.",
    )
    pool_size: Count = Field(
        default=4, description="Connections of one host besides the journal's own."
    )
    connect_timeout_s: Seconds = Field(default=5.0, description="Longest wait for a connection.")
    statement_timeout_s: Seconds = Field(default=30.0, description="Longest run of one statement.")


class RedisSettings(_Section):
    """The hot tier and the wire between hosts. All that it holds can be lost."""

    url: SecretStr | None = Field(
        default=None, description="Address of Redis; without one an embedded server is started."
    )
    timeout_s: Seconds = Field(default=0.5, description="Longest wait for one answer.")
    hot_ttl_s: Seconds = Field(
        default=86_400.0, description="Idle time after which a hot copy expires."
    )


class RaySettings(_Section):
    """The cluster."""

    address: str | None = Field(
        default=None,
        description="Address of a running cluster; without one a local head is started.",
    )
    dashboard: bool = Field(default=False, description="Start Ray's dashboard with the local head.")
    object_store_bytes: Count = Field(
        default=200 * 1024 * 1024, description="Object store of the local head, in bytes."
    )


class SessionsSettings(_Section):
    """Session hosts and the sessions that live in them."""

    hosts: Count | None = Field(
        default=None, description="Session hosts; one per core and two at least when not given."
    )
    idle_s: Seconds = Field(
        default=300.0, description="Idle time after which a session leaves memory."
    )
    max_resident: Count = Field(default=20_000, description="Resident sessions of one host.")
    max_dedicated: Count = Field(
        default=64,
        description="Dedicated sessions active at once in the cluster; turns of others wait.",
    )
    max_queued_turns: Count = Field(default=100, description="Turns that may wait in one session.")
    max_running_turns: Count = Field(default=2_000, description="Turns that one host runs at once.")
    window_turns: Count = Field(default=20, description="Past turns that are shown to the model.")
    beat_s: Seconds = Field(default=2.0, description="Pause between two heartbeats of an owner.")
    term_s: Seconds = Field(default=6.0, description="Silence after which an owner counts as dead.")
    sweep_s: Seconds = Field(
        default=1.0, description="Pause between two looks for turns without owner."
    )
    recovery_attempts: Count = Field(
        default=5, description="Takeovers without progress after which a turn is given up."
    )
    drain_s: Seconds = Field(
        default=30.0, description="Time that running turns get when a host stops."
    )


class EndpointSettings(_Section):
    """A model behind an OpenAI-compatible endpoint."""

    url: str = Field(description="Base URL, with its /v1.")
    api_key: SecretStr | None = Field(
        default=None, description="Bearer token, e.g. ${OPENAI_API_KEY}."
    )
    upstream: str | None = Field(
        default=None, description="The model's name there; its name here if none."
    )
    continues_text: bool = Field(
        default=False,
        description="The endpoint continues a last assistant message (continue_final_message).",
    )


class SimulatorSettings(_Section):
    """The profile of the built-in simulator."""

    enabled: bool | None = Field(
        default=None,
        description="Serve the simulator; when not given, only if no model is configured.",
    )
    replicas: Count = Field(default=1, description="Processes that serve it.")
    ttft_ms: float = Field(default=0.0, ge=0, description="Time to first token, in milliseconds.")
    tps: float = Field(default=2_000.0, gt=0, description="Tokens per second.")
    error_rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of calls that answer 500."
    )
    context_window: Count = Field(
        default=32_768, description="Tokens of prompt and answer together."
    )
    max_concurrent: Count = Field(
        default=1_000, description="Requests served at once; more get 429."
    )


class ModelsSettings(_Section):
    """The models that agents may use."""

    default: str | None = Field(
        default=None, description="Model of agents that name none; else the first."
    )
    endpoints: dict[str, EndpointSettings] = Field(
        default_factory=dict, description="Endpoints by the model's name."
    )
    simulator: SimulatorSettings = SimulatorSettings()
    connect_timeout_s: Seconds = Field(default=5.0, description="Longest wait for a connection.")
    first_token_timeout_s: Seconds = Field(
        default=60.0, description="Longest wait for the first token."
    )
    stall_timeout_s: Seconds = Field(default=30.0, description="Longest pause within an answer.")
    step_timeout_s: Seconds = Field(default=300.0, description="Longest time of one model step.")
    attempts: Count = Field(default=3, description="Calls that one step may make.")

    def simulated(self) -> bool:
        """Return whether the simulator runs: as configured, else if there is no endpoint."""
        enabled = self.simulator.enabled
        return not self.endpoints if enabled is None else enabled

    def names(self) -> tuple[str, ...]:
        """Return the names of all models, the endpoints first."""
        return (*self.endpoints, SIMULATOR) if self.simulated() else tuple(self.endpoints)


class AgentSettings(_Section):
    """One agent: its instructions, its model and its tools."""

    instructions: str = Field(default="You are a helpful assistant.", description="System message.")
    model: str | None = Field(default=None, description="Model; the default one when not given.")
    tools: tuple[str, ...] = Field(default=("echo",), description="Names of its tools.")
    max_steps: Count = Field(default=16, description="Model calls that one turn may make.")
    max_output_tokens: Count | None = Field(default=None, description="Tokens of one answer.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="Sampling temperature.")


class LogSettings(_Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level."
    )
    format: Literal["console", "json"] = Field(
        default="console", description="Lines for people or JSON."
    )


class Settings(_Section):
    """The whole configuration."""

    data_dir: str = Field(
        default="~/.agentray", description="Folder of everything that is embedded."
    )
    http: HttpSettings = HttpSettings()
    postgres: PostgresSettings = PostgresSettings()
    redis: RedisSettings = RedisSettings()
    ray: RaySettings = RaySettings()
    sessions: SessionsSettings = SessionsSettings()
    models: ModelsSettings = ModelsSettings()
    agents: dict[str, AgentSettings] = Field(
        default_factory=lambda: {"assistant": AgentSettings()},
        description="Agents by name; the first one is the default.",
    )
    log: LogSettings = LogSettings()

    def host_count(self) -> int:
        """Return how many session hosts run: as configured, else one per core and two at least."""
        return self.sessions.hosts or max(2, os.cpu_count() or 2)
