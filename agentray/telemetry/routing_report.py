"""Sum up what the router did, from the metrics of all hosts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec

__all__ = [
    "CacheLine",
    "CostLine",
    "EscalationLine",
    "HeldOut",
    "KindLine",
    "ModelLine",
    "RoutingReport",
    "Sample",
    "TierLine",
    "routing_report",
]

_TIERS = ("small", "large")


class Sample(Protocol):
    """A value of a metrics page, as Prometheus' parser gives it."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> dict[str, str]: ...

    @property
    def value(self) -> float: ...


class TierLine(msgspec.Struct, frozen=True):
    """A tier: its share of the calls of both tiers, and of its calls that ended by themselves those
    that gave an answer that was taken. Shares of nothing are None."""

    tier: str
    calls: int
    share: float | None
    success: float | None


class ModelLine(msgspec.Struct, frozen=True):
    """A model; one for embeddings has no tier. ``input_tokens`` are those that it did not have in
    its cache; dollars are US."""

    model: str
    tier: str
    calls: int
    success: float | None
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_dollars: float


class KindLine(msgspec.Struct, frozen=True):
    """A kind of steps, and the share of its calls that went to the small tier."""

    kind: str
    calls: int
    small_share: float | None


class EscalationLine(msgspec.Struct, frozen=True):
    """A model, and how many of its answers failed their checks and went to the next tier."""

    model: str
    escalations: int


class HeldOut(msgspec.Struct, frozen=True):
    """Calls for the small tier that the large one got by lot, against those that it did not get.

    Both are of the same steps, so their successes can be compared.
    """

    large_calls: int
    large_success: float | None
    small_calls: int
    small_success: float | None


class CostLine(msgspec.Struct, frozen=True):
    """What the calls of both tiers cost, and what the answered ones would have on the large model
    alone."""

    dollars: float
    always_large_dollars: float
    ratio: float | None
    saved_dollars: float


class CacheLine(msgspec.Struct, frozen=True):
    """Calls that the answer cache was asked about; ``saved_share`` of them were not made."""

    hit: int
    shared: int
    miss: int
    unavailable: int
    saved_share: float | None


class RoutingReport(msgspec.Struct, frozen=True):
    """What the router did since the hosts started, those that left within a day included."""

    calls: int
    tiers: list[TierLine]
    models: list[ModelLine]
    kinds: list[KindLine]
    escalations: list[EscalationLine]
    held_out: HeldOut
    cost: CostLine
    cache: CacheLine


class _Sums:
    """The values of one metric, summed over hosts and over labels that are not asked for."""

    def __init__(self, samples: Iterable[Sample], name: str) -> None:
        self._found = [(s.labels, s.value) for s in samples if s.name == name]

    def of(self, **labels: str) -> float:
        wanted = labels.items()
        return sum(value for found, value in self._found if wanted <= found.items())

    def of_steps(self, **labels: str) -> float:
        # Embeddings are in no tier.
        return sum(self.of(**labels, tier=tier) for tier in _TIERS)

    def values(self, label: str) -> list[str]:
        return sorted({found[label] for found, _ in self._found if label in found})

    def success(self, **labels: str) -> float | None:
        # Who cancels a call says nothing about the model.
        good = self.of(**labels, outcome="answered")
        bad = self.of(**labels, outcome="lost") + self.of(**labels, outcome="rejected")
        return _share(good, good + bad)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def routing_report(samples: Iterable[Sample]) -> RoutingReport:
    """Return the report that a metrics page gives; all zero if nothing was called yet."""
    samples = list(samples)
    calls = _Sums(samples, "agentray_model_calls_total")
    cost = _Sums(samples, "agentray_model_cost_dollars_total")
    escalations = _Sums(samples, "agentray_escalations_total")
    spent = cost.of_steps()
    always_large = _Sums(samples, "agentray_always_large_cost_dollars_total").of()
    return RoutingReport(
        calls=int(calls.of()),
        tiers=[_tier(calls, tier) for tier in _TIERS],
        models=_models(calls, cost, _Sums(samples, "agentray_model_tokens_total")),
        kinds=[_kind(calls, kind) for kind in calls.values("kind")],
        escalations=[
            EscalationLine(model, int(count))
            for model in escalations.values("model")
            if (count := escalations.of(model=model))
        ],
        held_out=HeldOut(
            large_calls=int(calls.of(tier="large", held_out="yes")),
            large_success=calls.success(tier="large", held_out="yes"),
            small_calls=int(calls.of(tier="small", held_out="no")),
            small_success=calls.success(tier="small", held_out="no"),
        ),
        cost=CostLine(spent, always_large, _share(spent, always_large), always_large - spent),
        cache=_cache(_Sums(samples, "agentray_answer_cache_total")),
    )


def _tier(calls: _Sums, tier: str) -> TierLine:
    count = calls.of(tier=tier)
    return TierLine(tier, int(count), _share(count, calls.of_steps()), calls.success(tier=tier))


def _models(calls: _Sums, cost: _Sums, tokens: _Sums) -> list[ModelLine]:
    found: list[ModelLine] = []
    for model in calls.values("model"):
        # A model may have changed its tier while some hosts were running.
        tiers = [tier for tier in _TIERS if calls.of(model=model, tier=tier)]
        found.append(
            ModelLine(
                model=model,
                tier="/".join(tiers),
                calls=int(calls.of(model=model)),
                success=calls.success(model=model),
                input_tokens=int(tokens.of(model=model, direction="input")),
                cached_tokens=int(tokens.of(model=model, direction="cached")),
                output_tokens=int(tokens.of(model=model, direction="output")),
                cost_dollars=cost.of(model=model),
            )
        )
    return sorted(found, key=lambda line: (-line.calls, line.model))


def _kind(calls: _Sums, kind: str) -> KindLine:
    count = calls.of(kind=kind)
    small = calls.of(kind=kind, tier="small")
    return KindLine(kind, int(count), _share(small, calls.of_steps(kind=kind)))


def _cache(results: _Sums) -> CacheLine:
    hit, shared, miss, unavailable = (
        int(results.of(result=name)) for name in ("hit", "shared", "miss", "unavailable")
    )
    saved = _share(hit + shared, hit + shared + miss + unavailable)
    return CacheLine(hit, shared, miss, unavailable, saved)
