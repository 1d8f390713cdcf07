"""The settings of every room: frozen sections, composed, each default written once."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, SecretStr

from agentray.config.section import Count, Seconds
from agentray.config.section import Section as _Section
from agentray.config.tool_settings import (
    CodeSettings,
    GatewaySettings,
    HttpToolSettings,
    OpenApiSettings,
    SandboxSettings,
)
from agentray.config.worker_settings import ToolWorkersSettings

__all__ = [
    "SIMULATOR",
    "AgentSettings",
    "BatchSettings",
    "BreakerSettings",
    "CacheSettings",
    "CardSettings",
    "EndpointSettings",
    "HttpSettings",
    "LogSettings",
    "McpSettings",
    "ModelsSettings",
    "PostgresSettings",
    "PriceSettings",
    "RaySettings",
    "RedisSettings",
    "RoutingSettings",
    "ServedModelSettings",
    "SessionsSettings",
    "Settings",
    "SimulatorSettings",
    "SqlSettings",
    "ToolsSettings",
]

SIMULATOR = "simulator"
"""The name of the model that the built-in simulator serves."""


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
        default=4,
        description="Connections of one host for its sessions; it takes two more for journal and "
        "heartbeat, and up to five for files and batches.",
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


class PriceSettings(_Section):
    """What a model costs, in US dollars; all that is set is added up."""

    input: float = Field(default=0.0, ge=0, description="A million input tokens.")
    cached_input: float | None = Field(
        default=None,
        ge=0,
        description="A million input tokens from the model's cache; as `input` if none.",
    )
    output: float = Field(default=0.0, ge=0, description="A million output tokens.")
    gpu_second: float = Field(
        default=0.0, ge=0, description="A second of a call, for models on GPUs of one's own."
    )


class CardSettings(_Section):
    """What the router has to know of a model."""

    kind: Literal["chat", "embedding"] = Field(default="chat", description="What it answers with.")
    tier: Literal["small", "large"] = Field(
        default="large", description="Small for easy steps, large for the others."
    )
    context_window: Count | None = Field(
        default=None, description="Tokens of prompt and answer together; no bound is known if none."
    )
    modalities: tuple[Literal["text", "image"], ...] = Field(
        default=("text", "image"), description="What it takes: text, image."
    )
    tools: bool = Field(default=True, description="It can ask for tools.")
    output_schema: bool = Field(
        default=True, description="It takes response_format: answers that follow a JSON schema."
    )
    region: str | None = Field(default=None, description="Where it runs.")
    max_concurrent: Count | None = Field(
        default=None, description="Calls of one host at once, past which others are preferred."
    )
    price: PriceSettings = PriceSettings()


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
    card: CardSettings = CardSettings()


class ServedModelSettings(_Section):
    """A model that agentray serves itself: vLLM in a Ray Serve application of its own."""

    source: str = Field(
        min_length=1, description="Hugging Face id, bucket address or folder of the model."
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="Options of vLLM's engine, by their names there."
    )
    accelerator: str | None = Field(
        default=None, description="Ray's name of the accelerator, e.g. L4 or H100; or cpu."
    )
    tensor_parallel: Count = Field(
        default=1, description="Accelerators that one replica is split over."
    )
    min_replicas: int = Field(default=1, ge=0, description="Least replicas; 0 starts on demand.")
    max_replicas: Count = Field(default=1, description="Most replicas.")
    target_ongoing_requests: Count = Field(
        default=32, description="Requests of one replica at once, past which another is started."
    )
    max_ongoing_requests: Count = Field(
        default=256, description="Requests of one replica at once; more wait in front of it."
    )
    upscale_delay_s: float = Field(
        default=10.0, ge=0, description="Time of high load after which a replica is added."
    )
    downscale_delay_s: float = Field(
        default=300.0, ge=0, description="Time of low load after which a replica is removed."
    )
    affinity: Literal["session", "prefix", "kv"] = Field(
        default="session",
        description="Which replica gets a call: session, the one of its session, else the least "
        "busy; prefix or kv, the one that Ray's router of this kind picks by the prompt.",
    )
    continues_text: bool = Field(
        default=True, description="It continues a last assistant message; vLLM does."
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of Ray's LLMConfig, by their names there."
    )
    card: CardSettings = CardSettings()


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


class RoutingSettings(_Section):
    """How the model of a step is picked."""

    difficulty: float = Field(
        default=0.5, ge=0, le=1, description="Steps at least this difficult go to the large tier."
    )
    holdout: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Share of the small tier's calls that the large one gets, to compare them.",
    )
    escalate: bool = Field(
        default=True,
        description="A step whose answer fails its checks goes to the next tier, once.",
    )
    region: str | None = Field(default=None, description="Models of this region are preferred.")
    step_cost_cap: float | None = Field(
        default=None, gt=0, description="Most US dollars that one step may cost, all its calls."
    )
    session_budget: float | None = Field(
        default=None,
        gt=0,
        description="US dollars that a session may cost before it gets the cheapest models: they"
        " come first from four fifths of it on. Nothing is refused.",
    )
    hedge_after_s: Seconds | None = Field(
        default=None,
        description="Wait for a first token, after which another model is called as well.",
    )


class BreakerSettings(_Section):
    """When a model is left alone for a while."""

    failure_share: float = Field(
        default=0.5, gt=0, le=1, description="Share of failed calls that opens it."
    )
    min_calls: Count = Field(default=5, description="Calls below which it stays closed.")
    window_s: Seconds = Field(default=30.0, description="Time that the share is taken over.")
    open_s: Seconds = Field(default=5.0, description="Time after which one call may try again.")


class CacheSettings(_Section):
    """The exact cache of answers, in Redis."""

    enabled: bool = Field(
        default=True, description="Answer equal calls at temperature 0 from the cache."
    )
    tools: bool = Field(default=False, description="Also calls that offer tools.")
    ttl_s: Seconds = Field(default=3_600.0, description="Age after which an answer is forgotten.")
    max_entry_bytes: Count = Field(
        default=256 * 1024, description="Largest answer that is kept, in bytes."
    )
    max_bytes: Count = Field(
        default=64 * 1024 * 1024, description="All answers together; the oldest go first."
    )


class ModelsSettings(_Section):
    """The models that agents may use."""

    default: str | None = Field(
        default=None, description="Model of agents that name none; the router's choice if none."
    )
    endpoints: dict[str, EndpointSettings] = Field(
        default_factory=dict, description="Endpoints by the model's name."
    )
    serve: dict[str, ServedModelSettings] = Field(
        default_factory=dict, description="Models to be served here, by name."
    )
    simulator: SimulatorSettings = SimulatorSettings()
    routing: RoutingSettings = RoutingSettings()
    breaker: BreakerSettings = BreakerSettings()
    cache: CacheSettings = CacheSettings()
    connect_timeout_s: Seconds = Field(default=5.0, description="Longest wait for a connection.")
    first_token_timeout_s: Seconds = Field(
        default=60.0, description="Longest wait for the first token."
    )
    stall_timeout_s: Seconds = Field(default=30.0, description="Longest pause within an answer.")
    step_timeout_s: Seconds = Field(
        default=300.0, description="Longest time of one model step, all its calls together."
    )
    attempts: Count = Field(default=3, description="Calls that one step may make.")

    def simulated(self) -> bool:
        """Return whether the simulator runs: as configured, else if there is no other model."""
        enabled = self.simulator.enabled
        return not (self.endpoints or self.serve) if enabled is None else enabled

    def names(self) -> tuple[str, ...]:
        """Return the names of all models, in the order of preference: endpoints, served ones,
        the simulator."""
        named = dict.fromkeys((*self.endpoints, *self.serve))
        return (*named, SIMULATOR) if self.simulated() else tuple(named)

    def card(self, name: str) -> CardSettings:
        """Return the card of a model; of the simulator, that its profile tells."""
        found = self.endpoints.get(name) or self.serve.get(name)
        if found is not None:
            return found.card
        return CardSettings(context_window=self.simulator.context_window)


class AgentSettings(_Section):
    """One agent: its instructions, its model and its tools."""

    instructions: str = Field(default="You are a helpful assistant.", description="System message.")
    model: str | None = Field(
        default=None, description="Its first choice; `models.default`, else the router's, if none."
    )
    models: tuple[str, ...] = Field(
        default=(), description="The only models it may use, the preferred ones first; all if none."
    )
    output_schema: dict[str, Any] | None = Field(
        default=None, description="JSON schema that each answer has to follow."
    )
    cache: bool | None = Field(
        default=None, description="Answer equal calls from the cache; at temperature 0 if not said."
    )
    tools: tuple[str, ...] = Field(
        default=("echo", "python", "shell"), description="Names of its tools."
    )
    max_steps: Count = Field(default=16, description="Model calls that one turn may make.")
    max_output_tokens: Count | None = Field(default=None, description="Tokens of one answer.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="Sampling temperature.")


class SqlSettings(_Section):
    """A database that agents may query."""

    url: SecretStr = Field(
        description="postgresql://… through psycopg; all else as SQLAlchemy writes it, "
        "e.g. sqlite:///file.db. The user in it should have no more than its due."
    )
    description: str = Field(
        default="", description="What is in it, for the model; tables and columns help."
    )
    role: str | None = Field(
        default=None, description="PostgreSQL's role that statements run as: SET ROLE."
    )
    read_only: bool = Field(
        default=True, description="Transactions may only read; without it they may write."
    )
    statement_timeout_s: Seconds = Field(default=15.0, description="Longest run of one statement.")
    connect_timeout_s: Seconds = Field(default=5.0, description="Longest wait for a connection.")
    max_rows: Count = Field(default=200, description="Rows of one result.")
    max_bytes: Count = Field(default=64 * 1024, description="Bytes of one result, as JSON.")
    pool_size: Count = Field(default=2, description="Connections of one worker.")


class McpSettings(_Section):
    """An MCP server: a command that is started, or the address of one that runs."""

    command: str | None = Field(default=None, description="Program that speaks over stdio.")
    args: tuple[str, ...] = Field(default=(), description="Its arguments.")
    env: dict[str, SecretStr] = Field(
        default_factory=dict, description="Its whole environment, besides PATH, HOME and LANG."
    )
    sandbox: Literal["jail", "process"] = Field(
        default="jail", description="Where it runs; process contains nothing."
    )
    paths: tuple[str, ...] = Field(
        default=(),
        description="Folders that it sees in its jail, read-only, besides the system's: its own "
        "files, its Python environment.",
    )
    network: bool = Field(
        default=False, description="It has the machine's network; a jail has none otherwise."
    )
    url: str | None = Field(default=None, description="Address that speaks streamable HTTP.")
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Headers of each request, e.g. Authorization."
    )
    private: bool = Field(
        default=False, description="The address may be a private or local one: it is your own."
    )
    tools: tuple[str, ...] = Field(
        default=(), description="The only tools of it that are offered; all if none."
    )
    timeout_s: Seconds = Field(default=60.0, description="Longest run of one call.")
    start_timeout_s: Seconds = Field(
        default=30.0, description="Longest wait until it has started and listed its tools."
    )
    max_concurrent: Count = Field(default=8, description="Calls of one worker at once.")
    max_tools: Count = Field(default=128, description="Tools, past which the rest is left out.")
    max_message_bytes: Count = Field(
        default=4 * 1024 * 1024, description="Largest message; a server that sends more is ended."
    )
    max_output_bytes: Count = Field(
        default=64 * 1024, description="Bytes of a result that the model is shown."
    )


class ToolsSettings(_Section):
    """What agents may call, where it runs and how much of it."""

    workers: ToolWorkersSettings = ToolWorkersSettings()
    functions: tuple[str, ...] = Field(
        default=(),
        description="Modules of functions with `@agentray.tool`; `package.module:name` for one.",
    )
    http: dict[str, HttpToolSettings] = Field(
        default_factory=dict, description="Tools that are one HTTP request, by name."
    )
    openapi: dict[str, OpenApiSettings] = Field(
        default_factory=dict, description="OpenAPI documents, by the name of their tools' group."
    )
    sql: dict[str, SqlSettings] = Field(
        default_factory=dict, description="Databases that agents may query, by name."
    )
    mcp: dict[str, McpSettings] = Field(
        default_factory=dict, description="MCP servers, by the name that their tools begin with."
    )
    secrets: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="What `${secret:NAME}` stands for; AGENTRAY_SECRET_NAME sets one too.",
    )
    cache_bytes: Count = Field(
        default=64 * 1024 * 1024,
        description="Results that are shared, all together; the oldest go first.",
    )
    sandbox: SandboxSettings = SandboxSettings()
    code: CodeSettings = CodeSettings()
    gateway: GatewaySettings = GatewaySettings()


class BatchSettings(_Section):
    """Offline requests, run in capacity that nobody else wants."""

    concurrency: Count = Field(default=4, description="Requests of batches that one host runs.")
    idle_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of max_running_turns, and of a model's max_concurrent, above which "
        "batches wait.",
    )
    idle_turns: Count = Field(
        default=32,
        description="Turns, or calls without a session, of one host above which batches wait.",
    )
    max_file_bytes: Count = Field(
        default=100 * 1024 * 1024, description="Largest file that may be uploaded, in bytes."
    )
    max_requests: Count = Field(default=50_000, description="Requests of one batch.")
    sweep_s: Seconds = Field(default=1.0, description="Pause between two looks for work.")
    lease_s: Seconds = Field(
        default=30.0, description="Time after which requests of a host that died are run again."
    )


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
    tools: ToolsSettings = ToolsSettings()
    batch: BatchSettings = BatchSettings()
    log: LogSettings = LogSettings()

    def host_count(self) -> int:
        """Return how many session hosts run: as configured, else one per core and two at least."""
        return self.sessions.hosts or max(2, os.cpu_count() or 2)
