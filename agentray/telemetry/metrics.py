"""Every metric of agentray, with its unit. A session id is never a label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics"]

_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one process."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        r = self.registry
        self.turns = Counter(
            "agentray_turns", "Turns that ended, by status.", ["status"], registry=r
        )
        self.turn_seconds = Histogram(
            "agentray_turn_seconds",
            "Time from a turn's first step to its end.",
            registry=r,
            buckets=_SECONDS,
        )
        self.takeovers = Counter(
            "agentray_takeovers", "Unfinished turns taken over from another owner.", registry=r
        )
        self.activations = Counter(
            "agentray_activations", "Sessions brought to memory, by tier.", ["tier"], registry=r
        )
        self.passivations = Counter(
            "agentray_passivations", "Sessions that left memory.", registry=r
        )
        self.ownership_lost = Counter(
            "agentray_ownership_lost", "Sessions dropped because the fence refused.", registry=r
        )
        self.model_errors = Counter(
            "agentray_model_errors", "Model calls that were lost, by code.", ["code"], registry=r
        )
        self.model_calls = Counter(
            "agentray_model_calls",
            "Model calls of steps, by how they ended: answered, lost, rejected (the answer failed"
            " its checks), cancelled. Embeddings are a kind of their own, in the tier none.",
            ["model", "tier", "kind", "outcome", "held_out"],
            registry=r,
        )
        self.model_tokens = Counter(
            "agentray_model_tokens",
            "Tokens of model calls, by direction: input (not cached), cached, output.",
            ["model", "direction"],
            registry=r,
        )
        self.model_cost = Counter(
            "agentray_model_cost_dollars",
            "Cost of model calls, lost ones too, in US dollars.",
            ["model", "tier"],
            registry=r,
        )
        self.always_large_cost = Counter(
            "agentray_always_large_cost_dollars",
            "What the answered calls would have cost on the first model of the large tier, in US"
            " dollars.",
            registry=r,
        )
        self.escalations = Counter(
            "agentray_escalations",
            "Steps that went to the next tier because an answer failed its checks, by the model"
            " that gave it.",
            ["model"],
            registry=r,
        )
        self.answer_cache = Counter(
            "agentray_answer_cache",
            "Calls that the answer cache was asked about: hit, shared (with an equal call), miss,"
            " unavailable (Redis was away).",
            ["result"],
            registry=r,
        )
        self.breaker_open = Gauge(
            "agentray_breaker_open", "1 while a model's breaker is open.", ["model"], registry=r
        )
        self.resident = Gauge("agentray_sessions_resident", "Sessions in memory.", registry=r)
        self.running = Gauge("agentray_turns_running", "Turns that run now.", registry=r)
        self.cache_failures = Gauge(
            "agentray_cache_failures", "Operations that Redis failed so far.", registry=r
        )
        self.streams = Gauge("agentray_streams_open", "Streams to clients now.", registry=r)
        self._add_tools()

    def _add_tools(self) -> None:
        r = self.registry
        of_tool = ["tenant", "tool"]
        self.tool_calls = Counter(
            "agentray_tool_calls",
            "Calls of tools in the pool, by how they ended: ok, or the reason of the error.",
            [*of_tool, "outcome"],
            registry=r,
        )
        self.tool_wait_seconds = Histogram(
            "agentray_tool_wait_seconds",
            "Time from asking for a slot to having it.",
            ["tool"],
            registry=r,
            buckets=_SHORT_SECONDS,
        )
        self.tool_run_seconds = Histogram(
            "agentray_tool_run_seconds",
            "Time that a call ran in its slot.",
            ["tool"],
            registry=r,
            buckets=_SHORT_SECONDS,
        )
        self.tool_starts = Counter(
            "agentray_tool_starts",
            "Sandboxes that were begun, by what from: parked, warm, cold.",
            ["start"],
            registry=r,
        )
        self.tool_cpu_seconds = Counter(
            "agentray_tool_cpu_seconds", "CPU time that calls used.", of_tool, registry=r
        )
        self.tool_memory_byte_seconds = Counter(
            "agentray_tool_memory_byte_seconds",
            "Peak memory of calls in bytes, times the seconds that they ran.",
            of_tool,
            registry=r,
        )
        self.tool_cache = Counter(
            "agentray_tool_cache",
            "Calls of tools whose results are shared: hit, shared (with an equal call), miss,"
            " unavailable (Redis).",
            ["outcome"],
            registry=r,
        )
        self.tool_queue = Gauge(
            "agentray_tool_queue", "Calls that wait for a slot, of all hosts.", registry=r
        )
        self.tool_slots_busy = Gauge(
            "agentray_tool_slots_busy", "Slots that are leased, of all workers.", registry=r
        )
        self.tool_workers = Gauge("agentray_tool_workers", "Workers that run.", registry=r)

    def tool_called(
        self,
        tenant: str,
        tool: str,
        outcome: str,
        start: str,
        *,
        waited_s: float,
        ran_s: float,
        cpu_s: float,
        memory_bytes: int,
    ) -> None:
        """Count a call of a tool that is settled."""
        self.tool_calls.labels(tenant, tool, outcome).inc()
        self.tool_wait_seconds.labels(tool).observe(waited_s)
        if ran_s:
            self.tool_run_seconds.labels(tool).observe(ran_s)
            self.tool_cpu_seconds.labels(tenant, tool).inc(cpu_s)
            self.tool_memory_byte_seconds.labels(tenant, tool).inc(memory_bytes * ran_s)
        if start:
            self.tool_starts.labels(start).inc()
