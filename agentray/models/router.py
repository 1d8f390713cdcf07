"""Pick the model of each step, and know of each model how it is doing and what it costs.

It lives in the session's owner, where budget, history and the step's kind are known. What decides
is in ``policies`` and ``breaker``; here it meets the catalog, the clock and chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace
from prometheus_client import Counter

from agentray.clock import Clock
from agentray.config.settings import ModelsSettings
from agentray.errors import (
    ModelContextLengthError,
    ModelError,
    ModelNotFoundError,
    ModelRateLimitedError,
    ModelUnavailableError,
)
from agentray.events import Route, Usage
from agentray.models.base import ModelHealth
from agentray.models.breaker import Breaker
from agentray.models.catalog import Catalog, Endpoint, cost
from agentray.models.policies import Candidate, Step, order, ranks
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics

__all__ = ["Attempt", "Choice", "Router", "may_succeed_elsewhere"]

log = get_logger(__name__)

# A limit whose end the endpoint does not name.
_LIMITED_S = 1.0
# Until a model that runs much may have room.
_CROWDED_S = 1.0
# Whoever says to come back tomorrow is asked again before: a mistake must not last that long.
_LONGEST_LIMIT_S = 600.0
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 30.0
# What another endpoint, or another key, may well answer: no credit, no right, no such model.
_ELSEWHERE = (401, 402, 403, 404)


@dataclass(frozen=True, slots=True)
class Choice:
    """The model for a step, and why it is that one."""

    model: str
    route: Route


class _Model:
    """A model as this process knows it, with its counters at hand: each call needs them."""

    __slots__ = (
        "_calls",
        "_metrics",
        "breaker",
        "cached",
        "chats",
        "cost",
        "endpoint",
        "input",
        "open",
        "output",
        "position",
        "running",
        "tier",
    )

    def __init__(
        self, endpoint: Endpoint, position: int, breaker: Breaker, metrics: Metrics
    ) -> None:
        self.endpoint = endpoint
        self.position = position
        self.breaker = breaker
        self.running = 0
        name = endpoint.name
        self.chats = endpoint.card.kind == "chat"
        # What has no step to be picked for is in no tier that could be compared with the other.
        self.tier = endpoint.card.tier if self.chats else "none"
        self.input = metrics.model_tokens.labels(name, "input")
        self.cached = metrics.model_tokens.labels(name, "cached")
        self.output = metrics.model_tokens.labels(name, "output")
        self.cost = metrics.model_cost.labels(name, self.tier)
        self.open = metrics.breaker_open.labels(name)
        self._metrics = metrics
        self._calls: dict[tuple[str, str, bool], Counter] = {}

    def calls(self, kind: str, outcome: str, held_out: bool) -> Counter:
        """Return the counter of calls that ended so."""
        key = (kind, outcome, held_out)
        found = self._calls.get(key)
        if found is None:
            found = self._calls[key] = self._metrics.model_calls.labels(
                self.endpoint.name,
                self.tier,
                kind,
                outcome,
                "yes" if held_out else "no",
            )
        return found


class Router:
    """Picks models, one per process. ``served_health`` tells how models are that are served here.

    The settings' random choices (what is held out, jitter) are made by ``rng``.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: ModelsSettings,
        *,
        clock: Clock,
        metrics: Metrics,
        served_health: Callable[[str], ModelHealth] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.catalog = catalog
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._served_health = served_health
        self._rng = rng or random.Random()
        self._ranks = ranks(settings.routing.difficulty, settings.routing.region)
        self._models = {
            endpoint.name: _Model(endpoint, position, Breaker(settings.breaker), metrics)
            for position, endpoint in enumerate(catalog.endpoints)
        }
        self._alone: dict[tuple[object, ...], Choice] = {}
        # What nobody asks about need not be found out.
        self.compares = len(self._models) > 1
        self.minds_images = any(
            "image" not in endpoint.card.modalities for endpoint in catalog.endpoints
        )
        large = [
            model.endpoint.card
            for model in self._models.values()
            if model.endpoint.card.tier == "large" and model.endpoint.card.kind == "chat"
        ]
        self._always_large = large[0] if large else None

    # Choosing

    def choose(self, step: Step) -> Choice:
        """Return the model for a step.

        Raises:
            ModelNotFoundError: the forced model does not exist.
            NoModelError: no model may be used.
        """
        if self.compares:
            return self._chosen(step)
        # With one model, what bars it is all that there is to decide, and seldom changes.
        if step.overflowed is not None or step.budget is not None or step.goes_on is not None:
            return self._chosen(step)
        bars = (step.kind, step.forced, step.allowed, step.images, step.tools, step.output_schema)
        found = self._alone.get(bars)
        if found is None:
            found = self._alone[bars] = self._chosen(step)
        return found

    def _chosen(self, step: Step) -> Choice:
        if step.forced is not None:
            self.catalog.resolve(step.forced)
        if step.overflowed in self._models:
            window = self._models[step.overflowed].endpoint.card.context_window
            step = replace(step, outgrown=window or 0)
        ordered, reason = self._ordered(step)
        if len(ordered) == 1 and step.goes_on in (None, ordered[0].name):
            return Choice(ordered[0].name, Route(step.kind, [ordered[0].name], reason))
        if step.goes_on is not None:
            # Whatever else is better: two models' texts are never spliced.
            others = [m.name for m in ordered if m.name != step.goes_on]
            route = Route(step.kind, [step.goes_on, *others], "goes on with its own text")
            return Choice(step.goes_on, route)
        best = ordered[0]
        held_out = False
        if self._may_hold_out(step, best) and self._rng.random() < self._settings.routing.holdout:
            for other in ordered[1:]:
                if other.card.tier == "large" and not other.away_s and not other.crowded:
                    best, held_out = other, True
                    reason = f"held out from the small tier, which had: {reason}"
                    break
        hedge = None
        hedges = self._settings.routing.hedge_after_s is not None
        if hedges and step.forced is None and not step.frugal:
            others = [m.name for m in ordered if m.name != best.name and not m.away_s]
            hedge = others[0] if others else None
        route = Route(step.kind, [m.name for m in ordered], reason, held_out, hedge)
        return Choice(best.name, route)

    def has_other(self, route: Route | None, model: str, lost: Sequence[str] = ()) -> bool:
        """Return whether a candidate of a route other than this model, and than those that are
        ``lost`` to the step, may be called now."""
        return route is not None and any(
            name != model and name not in lost and self._is_there(name) for name in route.candidates
        )

    def can_escalate(self, route: Route | None, model: str, lost: Sequence[str] = ()) -> bool:
        """Return whether a step whose answer by ``model`` is no good can go to the next tier, to a
        model that is not ``lost`` to the step."""
        if route is None or not self._settings.routing.escalate or self._tier(model) == "large":
            return False
        larger = [name for name in route.candidates if self._tier(name) == "large"]
        return any(name not in lost and self._is_there(name) for name in larger)

    def _tier(self, model: str) -> str:
        return self._models[model].endpoint.card.tier

    def _is_there(self, model: str) -> bool:
        return not self._away_s(self._models[model], self._clock.monotonic())

    def _ordered(self, step: Step) -> tuple[list[Candidate], str]:
        now = self._clock.monotonic()
        models = [
            Candidate(
                model.endpoint.name,
                model.endpoint.card,
                model.position,
                self._away_s(model, now),
                model.running,
            )
            for model in self._models.values()
        ]
        return order(step, models, ranks=self._ranks)

    def _away_s(self, model: _Model, now: float) -> float:
        served = self._served_health if model.endpoint.served else None
        if served is not None and not served(model.endpoint.name).healthy:
            return _LONGEST_BACKOFF_S
        return model.breaker.wait_s(now)

    def _may_hold_out(self, step: Step, best: Candidate) -> bool:
        return (
            best.card.tier == "small"
            and step.forced is None
            and step.preferred is None
            and step.kept is None
            and not step.lost
            and step.overflowed is None
            and not step.frugal
        )

    # Calling

    def wait_s(self, model: str) -> float:
        """Return the time after which the model may be called: 0 for now, or if there is none."""
        found = self._models.get(model)
        return 0.0 if found is None else found.breaker.wait_s(self._clock.monotonic())

    def spare_s(self, model: str, share: float) -> float:
        """Return the time after which a call that can wait may look again: 0 if the model may be
        called now, and runs less than ``share`` of what it may run for this host."""
        found = self._models.get(model)
        if found is None:
            return 0.0
        most = found.endpoint.card.max_concurrent
        if most is not None and found.running >= share * most:
            return _CROWDED_S
        return self._away_s(found, self._clock.monotonic())

    def away(self, model: str, wait_s: float) -> ModelError:
        """Return the error for a model that may only be called after ``wait_s``: it failed, or it
        said that it was called too often."""
        why = self.health()[model].reason
        kind = ModelUnavailableError if why else ModelRateLimitedError
        return kind(
            f"model {model!r} is left alone for {wait_s:.1f} s: "
            f"{why or 'it is rate limited: it takes no more calls for now'}",
            model=model,
            retry_after_s=wait_s,
            unsent=True,
        )

    def begin(self, model: str, route: Route | None) -> Attempt:
        """Return a call that begins now; whoever makes it says how it ended.

        Raises:
            ModelNotFoundError: there is no such model (any more).
        """
        found = self._models.get(model)
        if found is None:
            self.catalog.resolve(model)
            raise ModelNotFoundError(f"there is no model {model!r}", model=model)
        return Attempt(self, found, route)

    def backoff_s(self, failures: int, error: ModelError) -> float:
        """Return how long to wait before the same model is called again: what it asked for, or
        twice as long each time; jittered, so that those who failed together do not return so."""
        asked_s = float(error.fields.get("retry_after_s") or 0.0)
        usual_s = _FIRST_BACKOFF_S * 2.0**failures * self._rng.uniform(0.5, 1.5)
        return max(asked_s * self._rng.uniform(1.0, 1.1), min(usual_s, _LONGEST_BACKOFF_S))

    # Health

    def health(self) -> Mapping[str, ModelHealth]:
        """Return how each model is, and why if it is not well."""
        found: dict[str, ModelHealth] = {}
        for name, model in self._models.items():
            health = ModelHealth(healthy=True)
            if model.endpoint.served and self._served_health is not None:
                health = self._served_health(name)
            if health.healthy and model.breaker.opened:
                health = ModelHealth(healthy=False, reason=model.breaker.reason)
            found[name] = health
        return found

    # What attempts tell

    def found_back(self, model: _Model) -> None:
        """Close the breaker of a model whose probe speaks. For ``Attempt``."""
        model.breaker.succeeded(self._clock.monotonic(), probe=True)
        model.open.set(model.breaker.opened)

    def settle(
        self, attempt: Attempt, outcome: str, usage: Usage, error: ModelError | None
    ) -> float:
        """Take down how a call ended and return its cost, in US dollars. For ``Attempt``."""
        model, route = attempt.model, attempt.route
        now = self._clock.monotonic()
        model.running -= 1
        was_open = model.breaker.opened
        self._tell_breaker(attempt, outcome, error, now)
        if model.breaker.opened != was_open:
            model.open.set(model.breaker.opened)
        if model.chats:
            kind, held_out = (route.kind, route.held_out) if route else ("answer", False)
        else:
            kind, held_out = "embedding", False
        model.calls(kind, outcome, held_out).inc()
        seconds = now - attempt.began_at
        spent = cost(model.endpoint.card.price, usage, seconds)
        model.input.inc(usage.input_tokens - usage.cached_tokens)
        model.output.inc(usage.output_tokens)
        if usage.cached_tokens:
            model.cached.inc(usage.cached_tokens)
        if spent:
            model.cost.inc(spent)
        if outcome == "answered" and model.chats and self._always_large is not None:
            same = self._always_large is model.endpoint.card
            large = spent if same else cost(self._always_large.price, usage, seconds)
            if large:
                self._metrics.always_large_cost.inc(large)
        return spent

    def _tell_breaker(
        self, attempt: Attempt, outcome: str, error: ModelError | None, now: float
    ) -> None:
        breaker, probe = attempt.model.breaker, attempt.probe
        if outcome in ("answered", "rejected"):
            # What it says is wrong, but it is there.
            breaker.succeeded(now, probe=probe)
        elif isinstance(error, ModelRateLimitedError):
            asked_s = error.fields.get("retry_after_s")
            limited_s = _LIMITED_S if asked_s is None else min(float(asked_s), _LONGEST_LIMIT_S)
            breaker.limited(now, limited_s, probe=probe)
        elif error is not None and (error.retryable or error.fields.get("status") in _ELSEWHERE):
            was_open = breaker.opened
            breaker.failed(now, _why(error), probe=probe)
            if breaker.opened and not was_open:
                name = attempt.model.endpoint.name
                log.warning("breaker_opened", model=name, why=breaker.reason)
        elif error is not None:
            # It refused what it was asked: it is there.
            breaker.succeeded(now, probe=probe)
        else:
            breaker.left(probe=probe)


class Attempt:
    """One call of a model under way. Exactly one of its methods is to be called, once; what is
    called behind that does nothing. Each returns the cost in US dollars."""

    __slots__ = ("_router", "began_at", "model", "probe", "route", "settled")

    def __init__(self, router: Router, model: _Model, route: Route | None) -> None:
        self._router = router
        self.model = model
        self.route = route
        self.began_at = router._clock.monotonic()  # pyright: ignore[reportPrivateUsage]
        self.probe = model.breaker.begun()
        self.settled = False
        """It has ended, and was taken down."""
        model.running += 1

    def spoke(self) -> None:
        """The first token is there: a probe has found its model back, however long it goes on."""
        if self.probe:
            self.probe = False
            self._router.found_back(self.model)

    def answered(self, usage: Usage, *, rejected: bool = False) -> float:
        """The answer is whole; ``rejected`` says that it failed the step's checks."""
        return self._end("rejected" if rejected else "answered", usage, None)

    def lost(self, error: ModelError, usage: Usage = Usage()) -> float:
        """The call failed; ``usage`` is what it used as far as that is known. One that its caller
        had no more time for is one that was given up."""
        if error.fields.get("out_of_time"):
            return self.cancelled(usage)
        return self._end("lost", usage, error)

    def cancelled(self, usage: Usage = Usage()) -> float:
        """The caller gave up."""
        return self._end("cancelled", usage, None)

    def _end(self, outcome: str, usage: Usage, error: ModelError | None) -> float:
        if self.settled:
            return 0.0
        self.settled = True
        return self._router.settle(self, outcome, usage, error)


def may_succeed_elsewhere(error: ModelError) -> bool:
    """Return whether another model may answer what this one did not."""
    return (
        error.retryable
        or isinstance(error, ModelContextLengthError)
        or error.fields.get("status") in _ELSEWHERE
    )


def _why(error: ModelError) -> str:
    """Return what may be shown to anybody: what an endpoint says may repeat what it was asked."""
    status = error.fields.get("status")
    return error.message if status is None else f"it answered {status}"
