"""`agentray routing report`, with a metrics page that is given."""

from __future__ import annotations

import httpx
import msgspec
import pytest
from prometheus_client.exposition import generate_latest
from typer.testing import CliRunner

from agentray.cli import app
from agentray.errors import NotReadyError
from agentray.telemetry.metrics import Metrics


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    """The metrics of the only host there is."""
    metrics = Metrics()

    def get(url: str, *, timeout: float) -> httpx.Response:
        assert url == "http://somewhere:1/metrics"
        return httpx.Response(200, content=generate_latest(metrics.registry))

    monkeypatch.setattr(httpx, "get", get)
    return metrics


def report(*options: str) -> str:
    asked = ["routing", "report", "--url", "somewhere:1", *options]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_a_report_shows_shares_costs_and_escalations(metrics: Metrics) -> None:
    metrics.model_calls.labels("mini[1]", "small", "format", "answered", "no").inc(3)
    metrics.model_calls.labels("max", "large", "plan", "answered", "yes").inc()
    metrics.model_cost.labels("mini[1]", "small").inc(0.5)
    metrics.always_large_cost.inc(2.5)
    metrics.escalations.labels("mini[1]").inc(2)
    shown = [line.split() for line in report().splitlines()]
    assert ["small", "3", "75.0%", "100.0%"] in shown
    assert ["format", "3", "100.0%"] in shown
    text = report()
    assert "escalations: 2 from mini[1]\n" in text
    assert "held out: 1 calls on large, success 100.0%; small without them 100.0%\n" in text
    assert "cost: $0.500000; $2.50 on large alone: 20.0% of it, $2.00 saved\n" in text
    assert msgspec.json.decode(report("--json"))["cost"]["ratio"] == 0.2


def test_a_report_of_nothing_says_so(metrics: Metrics) -> None:
    assert report() == "no model was called yet\n"
    assert msgspec.json.decode(report("--json"))["calls"] == 0


@pytest.mark.parametrize("body", [b"<html>", b"", b"python_info 1\n"])
def test_what_is_not_agentray_is_an_error(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, content=body))
    with pytest.raises(NotReadyError, match="is not agentray"):
        report()


def test_a_system_that_is_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_: object, **__: object) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(httpx, "get", get)
    with pytest.raises(NotReadyError, match="cannot be reached: refused"):
        report()
