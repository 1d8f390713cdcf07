"""The settings of the tools that run code, call functions and call HTTP APIs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from agentray.config.section import Count, Seconds, Section

__all__ = [
    "CodeSettings",
    "GatewaySettings",
    "HttpToolSettings",
    "OpenApiSettings",
    "SandboxSettings",
]

_MIB = 1024 * 1024


class SandboxSettings(Section):
    """Where code of models runs."""

    tier: Literal["process", "jail", "gvisor"] = Field(
        default="jail", description="How strongly it is contained."
    )
    allow_weaker: Literal["none", "jail", "process"] = Field(
        default="none",
        description="The weakest tier to be taken where this one cannot be had; with none its "
        "calls are refused there.",
    )

    @property
    def weakest(self) -> Literal["jail", "process"] | None:
        """The weakest tier that may be taken, if a weaker one may."""
        return None if self.allow_weaker == "none" else self.allow_weaker


class CodeSettings(Section):
    """What one run of the tools `python` and `shell` may use."""

    wall_s: Seconds = Field(default=30.0, description="Time, after which it is killed.")
    cpu_s: Seconds = Field(default=30.0, description="CPU-seconds of all its processes.")
    cpus: Seconds = Field(default=1.0, description="Cores that it may use at once.")
    memory_bytes: Count = Field(default=256 * _MIB, description="Memory, in bytes.")
    pids: Count = Field(default=32, description="Processes and threads at once.")
    scratch_bytes: Count = Field(
        default=64 * _MIB, description="Files in its working directory, in bytes."
    )
    scratch_files: Count = Field(default=4096, description="Files in its working directory.")
    output_bytes: Count = Field(
        default=64 * 1024, description="Bytes of what it prints that the model is shown."
    )
    hosts: tuple[str, ...] = Field(
        default=(),
        description="Hosts that its programs may reach, through the gateway and within its bounds; "
        "no network if empty. Written as in `tools.gateway.allow`.",
    )


class HttpToolSettings(Section):
    """A tool that is one HTTP request."""

    description: str = Field(description="What it does, for the model.")
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] = Field(
        default="GET", description="Method of the request."
    )
    url: str = Field(description="Its address; `{name}` in the path stands for an argument.")
    query: dict[str, str] = Field(
        default_factory=dict, description="Query, with `{name}` and `${secret:NAME}`."
    )
    headers: dict[str, str] = Field(
        default_factory=dict, description="Headers, with `{name}` and `${secret:NAME}`."
    )
    body: dict[str, Any] | None = Field(
        default=None, description="JSON body, with `{name}` in its texts."
    )
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the arguments; a text each if none."
    )
    timeout_s: Seconds = Field(default=30.0, description="Longest run of a call, retries included.")
    on_crash: Literal["retry", "report"] | None = Field(
        default=None,
        description="What becomes of a call whose worker died: run again or reported as unknown; "
        "retry for idempotent methods if not given.",
    )
    cache_s: float = Field(
        default=0.0, ge=0, description="Time for which equal calls of a tenant share a result."
    )
    version: str = Field(default="1", description="Results of another one are not shared.")


class OpenApiSettings(Section):
    """Tools from the operations of an OpenAPI document."""

    document: str = Field(description="File or address of an OpenAPI 3.0 or 3.1 document.")
    base_url: str | None = Field(
        default=None, description="Address that the paths are below; the document's if none."
    )
    operations: tuple[str, ...] = Field(
        default=(), description="The only operations (operationId); all that can be if none."
    )
    query: dict[str, str] = Field(
        default_factory=dict, description="Query of each request, with `${secret:NAME}`."
    )
    headers: dict[str, str] = Field(
        default_factory=dict, description="Headers of each request, with `${secret:NAME}`."
    )
    timeout_s: Seconds = Field(default=30.0, description="Longest run of a call, retries included.")
    cache_s: float = Field(
        default=0.0, ge=0, description="Time for which equal GETs of a tenant share a result."
    )


class GatewaySettings(Section):
    """What HTTP tools may reach, and how much of it."""

    allow: tuple[str, ...] = Field(
        default=(),
        description="Hosts that redirects may lead to, besides those of the tools, and those of "
        "`allow_private` that other hosts may redirect to: "
        "`api.example.com`, `*.example.com`, `http://host:8080`.",
    )
    allow_private: tuple[str, ...] = Field(
        default=(),
        description="Hosts, of those allowed, whose addresses may be private: your own services.",
    )
    attempts: Count = Field(default=3, description="Requests that one call may make.")
    max_redirects: int = Field(default=5, ge=0, description="Redirects that are followed.")
    connect_timeout_s: Seconds = Field(default=5.0, description="Longest wait for a connection.")
    max_response_bytes: Count = Field(
        default=64 * 1024, description="Bytes of a response that the model is shown."
    )
    max_request_bytes: Count = Field(
        default=_MIB, description="Largest request, with address and headers."
    )
    call_bytes: Count = Field(
        default=4 * _MIB, description="Bytes of one call, both ways and all its requests."
    )
    call_bytes_per_s: Count = Field(default=2 * _MIB, description="Bytes per second of one call.")
    tenant_bytes_per_s: Count = Field(
        default=8 * _MIB, description="Bytes per second of a tenant, all workers together."
    )
    tenant_bytes_per_day: Count = Field(
        default=2048 * _MIB,
        description="Bytes of a tenant in a day of UTC, all workers together; a worker that "
        "starts anew counts anew.",
    )
    requests_per_s: float = Field(
        default=10.0, gt=0, description="Requests per second of a tenant to one host."
    )
    burst: Count = Field(default=20, description="Requests to one host at once, before it counts.")
