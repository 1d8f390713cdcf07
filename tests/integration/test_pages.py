"""What operators look at: health, readiness, and the metrics of all hosts together."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.followed_turn import script
from tests.integration.wire import Session, eventually
from tests.system import System

ENDLESS = script("never read to its end", tokens=10_000, tps=10)


def metric(http: httpx.Client, name: str, **labels: str) -> dict[str, float]:
    """Return a metric by host, summed over other labels."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                host = sample.labels["host"]
                found[host] = found.get(host, 0.0) + sample.value
    return found


def test_a_host_says_that_it_is_well_and_ready(http: httpx.Client, system: System) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    ready = http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["owner_id"] in [host.id for host in system.hosts()]
    assert ready.json()["ready"] is ready.json()["store_ok"] is ready.json()["cache_ok"] is True


def test_the_metrics_are_of_all_hosts(http: httpx.Client, system: System) -> None:
    hosts = {host.id for host in system.hosts()}
    assert hosts <= metric(http, "agentray_sessions_resident").keys()
    session = Session.make(http)
    before = metric(http, "agentray_turns_total", status="completed")
    session.turn("hello")
    owner = system.owner_of(session.id)
    assert owner is not None

    def counted() -> bool:
        now = metric(http, "agentray_turns_total", status="completed")
        return now[owner[0].id] > before.get(owner[0].id, 0)

    eventually(counted, what="the turn is counted at its host")
    assert session.id not in http.get("/metrics").text


def test_open_streams_and_running_turns_are_shown_while_they_last(http: httpx.Client) -> None:
    session = Session.make(http)
    with session.stream(ENDLESS) as stream:
        next(stream)
        for name in ("agentray_streams_open", "agentray_turns_running"):
            eventually(lambda name=name: sum(metric(http, name).values()) >= 1, what=name)
        session.cancel()
        assert list(stream)[-1].data["status"] == "cancelled"
    eventually(lambda: sum(metric(http, "agentray_turns_running").values()) == 0, what="none runs")
