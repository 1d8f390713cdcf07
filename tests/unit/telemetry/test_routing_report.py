"""The routing report: what a metrics page of two hosts adds up to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agentray.telemetry.metrics import Metrics
from agentray.telemetry.routing_report import RoutingReport, Sample, routing_report


def samples(*hosts: Metrics) -> Iterator[Sample]:
    for number, metrics in enumerate(hosts):
        page = generate_latest(metrics.registry).decode()
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                yield sample._replace(labels={**sample.labels, "host": str(number)})


def called(
    metrics: Metrics,
    count: int,
    model: str,
    tier: str,
    kind: str = "answer",
    *,
    outcome: str = "answered",
    held_out: str = "no",
) -> None:
    metrics.model_calls.labels(model, tier, kind, outcome, held_out).inc(count)


def two_hosts() -> tuple[Metrics, Metrics]:
    one, two = Metrics(), Metrics()
    called(one, 60, "mini", "small", "tool_follow_up")
    called(two, 10, "mini", "small", "tool_follow_up")
    called(two, 4, "mini", "small", "format", outcome="rejected")
    called(two, 1, "mini", "small", "format", outcome="lost")
    called(two, 5, "mini", "small", "format", outcome="cancelled")
    called(one, 10, "max", "large", "plan")
    called(one, 6, "max", "large", "format", held_out="yes")
    called(two, 2, "max", "large", "format", held_out="yes", outcome="rejected")
    called(two, 2, "other", "large", "plan", outcome="lost")
    for metrics in (one, two):
        metrics.model_tokens.labels("mini", "input").inc(100)
        metrics.model_tokens.labels("mini", "cached").inc(20)
        metrics.model_tokens.labels("mini", "output").inc(3)
        metrics.model_cost.labels("mini", "small").inc(0.25)
        metrics.always_large_cost.inc(2.0)
    one.model_cost.labels("max", "large").inc(0.5)
    two.escalations.labels("mini").inc(4)
    for result, count in (("hit", 5), ("shared", 1), ("miss", 3), ("unavailable", 1)):
        two.answer_cache.labels(result).inc(count)
    return one, two


def plain(report: RoutingReport) -> dict[str, Any]:
    return msgspec.to_builtins(report)


def test_a_report_adds_all_hosts_up() -> None:
    report = plain(routing_report(samples(*two_hosts())))
    assert report["calls"] == 100
    assert report["tiers"] == [
        {"tier": "small", "calls": 80, "share": 0.8, "success": 70 / 75},
        {"tier": "large", "calls": 20, "share": 0.2, "success": 16 / 20},
    ]
    assert report["models"][0] == {
        "model": "mini",
        "tier": "small",
        "calls": 80,
        "success": 70 / 75,
        "input_tokens": 200,
        "cached_tokens": 40,
        "output_tokens": 6,
        "cost_dollars": 0.5,
    }
    assert [line["model"] for line in report["models"]] == ["mini", "max", "other"]
    assert report["models"][2]["success"] == 0.0
    assert report["kinds"] == [
        {"kind": "format", "calls": 18, "small_share": 10 / 18},
        {"kind": "plan", "calls": 12, "small_share": 0.0},
        {"kind": "tool_follow_up", "calls": 70, "small_share": 1.0},
    ]
    assert report["escalations"] == [{"model": "mini", "escalations": 4}]
    assert report["held_out"] == {
        "large_calls": 8,
        "large_success": 6 / 8,
        "small_calls": 80,
        "small_success": 70 / 75,
    }
    assert report["cost"] == {
        "dollars": 1.0,
        "always_large_dollars": 4.0,
        "ratio": 0.25,
        "saved_dollars": 3.0,
    }
    assert report["cache"] == {
        "hit": 5,
        "shared": 1,
        "miss": 3,
        "unavailable": 1,
        "saved_share": 0.6,
    }


def test_embeddings_change_nothing_in_what_is_compared() -> None:
    metrics = Metrics()
    called(metrics, 50, "embedder", "none", "embedding")
    metrics.model_cost.labels("embedder", "none").inc(9.0)
    before = routing_report(samples(*two_hosts()))
    report = routing_report(samples(*two_hosts(), metrics))
    assert (report.tiers, report.cost) == (before.tiers, before.cost)
    (kind,) = (line for line in report.kinds if line.kind == "embedding")
    assert (kind.calls, kind.small_share) == (50, None)
    (model,) = (line for line in report.models if line.model == "embedder")
    assert (model.tier, model.calls, model.cost_dollars) == ("", 50, 9.0)


def test_a_report_of_nothing_has_no_shares() -> None:
    report = plain(routing_report(samples(Metrics())))
    assert report["calls"] == 0
    assert [tier["share"] for tier in report["tiers"]] == [None, None]
    assert report["models"] == report["kinds"] == report["escalations"] == []
    assert report["held_out"]["large_success"] is None
    assert report["cost"]["ratio"] is None


def test_a_model_that_changed_its_tier_is_one_model() -> None:
    metrics = Metrics()
    called(metrics, 1, "mini", "small")
    called(metrics, 2, "mini", "large")
    (line,) = routing_report(samples(metrics)).models
    assert (line.tier, line.calls) == ("small/large", 3)
