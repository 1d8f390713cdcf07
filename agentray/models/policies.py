"""Decide which model a step is for: small parts that rule models out or rank them, and why.

Pure: what the models do and how they are doing goes in, an order of preference with its reason
comes out. A ``Bar`` rules models out. A ``Rank`` says how well one suits, the smaller the better;
the first rank in which two models differ decides between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from agentray.config.settings import CardSettings
from agentray.errors import ModelError
from agentray.events import StepKind, Usage
from agentray.models.catalog import cost

__all__ = [
    "BARS",
    "RANKS",
    "Bar",
    "Candidate",
    "NoModelError",
    "Rank",
    "Step",
    "difficulty",
    "order",
    "step_kind",
]

# What an answer is taken to have where its length is not bounded: for estimates alone.
USUAL_OUTPUT_TOKENS = 512


class NoModelError(ModelError):
    """None of the models may be used for a step; the message says what ruled the last one out."""

    code = "no_model"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model step before its call.

    ``forced`` is the only model that the caller wants, ``allowed`` are those that the agent may
    use (all if none), ``preferred`` is its first choice, ``kept`` the model of the tool loop that
    the step belongs to, ``goes_on`` the one whose text is to be continued. ``lost`` are models
    that failed this step already, ``overflowed`` is one whose context window was too short and
    ``outgrown`` that window's tokens, 0 if they are not known. ``budget`` is what the step may
    still cost and ``session_left`` what its session should, in US dollars; ``frugal`` says that
    the session has spent most of its budget.
    """

    kind: StepKind
    difficulty: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int | None = None
    images: bool = False
    tools: bool = False
    output_schema: bool = False
    forced: str | None = None
    allowed: tuple[str, ...] = ()
    preferred: str | None = None
    kept: str | None = None
    goes_on: str | None = None
    lost: tuple[str, ...] = ()
    overflowed: str | None = None
    outgrown: int = 0
    escalated: bool = False
    budget: float | None = None
    session_left: float | None = None
    frugal: bool = False

    @property
    def usage(self) -> Usage:
        """An estimate of what the step will use."""
        return Usage(self.prompt_tokens, self.output_tokens or USUAL_OUTPUT_TOKENS)


class Candidate(msgspec.Struct, frozen=True):
    """A model as it is now. ``position`` is its place in the configuration, ``away_s`` the time
    after which it may be called again (0 now), ``running`` the calls of this host."""

    name: str
    card: CardSettings
    position: int
    away_s: float = 0.0
    running: int = 0

    @property
    def crowded(self) -> bool:
        """Whether it runs as many calls as it should."""
        most = self.card.max_concurrent
        return most is not None and self.running >= most


@dataclass(frozen=True, slots=True)
class Bar:
    """Rules models out. ``soft``: if it ruled out all that are left, it rules out none."""

    says: str
    fits: Callable[[Step, Candidate], bool]
    soft: bool = False


@dataclass(frozen=True, slots=True)
class Rank:
    """Ranks models; ``says`` explains the best ones."""

    says: Callable[[Step, Candidate], str]
    of: Callable[[Step, Candidate], float]


def wanted_tier(step: Step, threshold: float) -> Literal["small", "large"]:
    """Return the tier that suits a step, by its kind's difficulty and its features'."""
    return "large" if step.difficulty >= threshold else "small"


def _fits_window(step: Step, model: Candidate) -> bool:
    window = model.card.context_window
    return window is None or step.prompt_tokens + (step.output_tokens or 1) <= window


def _is_longer(step: Step, model: Candidate) -> bool:
    if step.overflowed is None:
        return True
    window = model.card.context_window
    return model.name != step.overflowed and (window is None or window > step.outgrown)


def _affordable(step: Step, model: Candidate, budget: float | None) -> bool:
    if budget is None:
        return True
    # Output is only counted where it is bounded: an estimate must not rule out what would fit.
    usage = Usage(step.prompt_tokens, step.output_tokens or 0)
    return cost(model.card.price, usage, 0.0) <= budget


BARS: tuple[Bar, ...] = (
    # First, so that what rules the forced one out is said of it.
    Bar("another one is forced", lambda step, model: step.forced in (None, model.name)),
    Bar("it answers no chats", lambda step, model: model.card.kind == "chat"),
    Bar(
        "the agent may not use it",
        lambda step, model: not step.allowed or model.name in step.allowed,
    ),
    Bar(
        "it takes no images",
        lambda step, model: not step.images or "image" in model.card.modalities,
    ),
    Bar("it cannot ask for tools", lambda step, model: not step.tools or model.card.tools),
    Bar(
        "it follows no schema",
        lambda step, model: not step.output_schema or model.card.output_schema,
        soft=True,
    ),
    Bar("its context window is too short", _is_longer, soft=True),
    # An estimate: where it rules out all, the model itself is asked.
    Bar("its context window is too short", _fits_window, soft=True),
    Bar(
        "it costs more than the step may",
        lambda step, model: _affordable(step, model, step.budget),
    ),
)


def _price(step: Step, model: Candidate) -> float:
    price = model.card.price
    # A model that is billed by time costs about as much as its tokens take.
    return cost(price, step.usage, step.usage.output_tokens / 50)


def ranks(threshold: float, region: str | None) -> tuple[Rank, ...]:
    """Return the ranks in the order in which they decide."""
    return (
        Rank(lambda step, model: "the others are unhealthy", lambda step, model: model.away_s),
        Rank(
            lambda step, model: "the others failed this step",
            lambda step, model: step.lost.count(model.name),
        ),
        Rank(
            # It is shown less of the past then; a shorter one would need even less.
            lambda step, model: "no other one has a longer window",
            lambda step, model: step.overflowed is not None and step.overflowed != model.name,
        ),
        Rank(
            # Before what is preferred: that is the one that failed.
            lambda step, model: "escalated",
            lambda step, model: step.escalated and model.card.tier != "large",
        ),
        Rank(
            lambda step, model: "kept for the tool loop",
            lambda step, model: step.kept is not None and step.kept != model.name,
        ),
        Rank(
            # The others are still there if it fails: a session's budget refuses nothing.
            lambda step, model: "the others cost more than its session has left",
            lambda step, model: not _affordable(step, model, step.session_left),
        ),
        Rank(
            lambda step, model: "cheapest, its session's budget is nearly spent",
            lambda step, model: _price(step, model) if step.frugal else 0.0,
        ),
        Rank(
            lambda step, model: "the agent prefers it",
            lambda step, model: step.preferred is not None and step.preferred != model.name,
        ),
        Rank(
            lambda step, model: (
                f"{model.card.tier} for {step.kind} of difficulty {step.difficulty:.2f}"
            ),
            lambda step, model: model.card.tier != wanted_tier(step, threshold),
        ),
        Rank(lambda step, model: "the others are busy", lambda step, model: model.crowded),
        Rank(
            lambda step, model: f"in {region}",
            lambda step, model: region is not None and model.card.region != region,
        ),
        Rank(
            # The order in which the agent names its models.
            lambda step, model: "the agent's order",
            lambda step, model: step.allowed.index(model.name) if step.allowed else 0,
        ),
        Rank(lambda step, model: "cheapest", _price),
        Rank(
            lambda step, model: "a longer window is not needed",
            lambda step, model: model.card.context_window or 0,
        ),
        Rank(lambda step, model: "first in the configuration", lambda step, model: model.position),
    )


RANKS = ranks(0.5, None)


def order(
    step: Step,
    models: Sequence[Candidate],
    *,
    bars: Sequence[Bar] = BARS,
    ranks: Sequence[Rank] = RANKS,
) -> tuple[list[Candidate], str]:
    """Return the models that may be used, the best first, and why that one is.

    Raises:
        NoModelError: there is none; the message says what ruled the last ones out.
    """
    notes: list[str] = []
    left = list(models)
    for bar in bars:
        fitting = [model for model in left if bar.fits(step, model)]
        if len(fitting) == len(left):
            continue
        if not fitting:
            if bar.soft:
                continue
            names = ", ".join(model.name for model in left)
            raise NoModelError(f"no model for this step: {names}: {bar.says}")
        if bar.says not in _OBVIOUS:
            out = ", ".join(model.name for model in left if model not in fitting)
            notes.append(f"not {out}: {bar.says}")
        left = fitting
    if len(left) == 1:
        return left, "; ".join([*notes, "the only one left" if notes else "the only one"])
    keys = {model.name: [rank.of(step, model) for rank in ranks] for model in left}
    left.sort(key=lambda model: keys[model.name])
    best, rivals = left[0], left[1:]
    for i, rank in enumerate(ranks):
        beaten = [rival for rival in rivals if keys[rival.name][i] > keys[best.name][i]]
        if beaten:
            notes.append(rank.says(step, best))
            rivals = [rival for rival in rivals if rival not in beaten]
            if not rivals:
                break
    return left, "; ".join(notes)


# What an embedding model is for needs no explanation.
_OBVIOUS = ("it answers no chats",)


# The features of a step, each found by a look at its last message.

# One word that asks for reasoning takes a first step to the usual threshold; a follow-up needs
# another feature as well.
_BASE: dict[StepKind, float] = {
    "plan": 0.4,
    "answer": 0.35,
    "tool_follow_up": 0.25,
    "summarise": 0.1,
    "format": 0.05,
}
_SUMMARISE = frozenset(b"summary summaries summarise summarize condense recap".split())
_FORMAT = frozenset(b"reformat translate rewrite convert proofread capitalise capitalize".split())
_FORMS = frozenset(b"json csv yaml xml markdown table bullet bullets bulleted".split())
_INTO_FORM = re.compile(
    rb"\b(?:as|to|in|into)(?: an?)? (?:json|csv|yaml|xml|markdown|table|bullet)"
)
_REASONING = frozenset(
    b"prove proof derive design architect architects architecture architectural debug refactor"
    b" optimise optimize tradeoff tradeoffs analyse analyze diagnose plan strategy strategies"
    b" strategic compare evaluate why".split()
)
_REASONING_PHRASES = (b"root cause", b"step by step", b"trade-off")
# A word, and not the letter of an escape in JSON before it.
_WORDS = re.compile(rb"\\[nrt]|[a-z]+")
_LONG_BYTES = 8_000
_LOOK_BYTES = 1_000
_MANY_TOOLS = 8


def step_kind(asked: bytes, *, step: int, tools: bool, output_schema: bool) -> StepKind:
    """Return what a step is for.

    ``asked`` is the turn's input as JSON, ``step`` counts the turn's model steps from 1.
    """
    if step > 1:
        return "tool_follow_up"
    said = _looked_at(asked).lower()
    words = set(_WORDS.findall(said))
    if words & _SUMMARISE or b"tl;dr" in said or b"key points" in said:
        return "summarise"
    if output_schema or words & _FORMAT or b"re-format" in said:
        return "format"
    if words & _FORMS and _INTO_FORM.search(said):
        return "format"
    return "plan" if tools else "answer"


def difficulty(
    kind: StepKind, asked: bytes, *, tools: int = 0, turns: int = 0, failed_tools: int = 0
) -> float:
    """Return how hard a step looks, from 0 to 1, by features that cost nothing to find.

    The kind alone gives a base; length, code, words that ask for reasoning, many tools, a long
    conversation and tools that failed add to it.
    """
    score = _BASE[kind]
    if kind in ("summarise", "format"):
        # Long inputs are what these are for.
        return min(1.0, score + 0.1 * min(failed_tools, 2))
    score += 0.2 * min(1.0, len(asked) / _LONG_BYTES)
    said = _looked_at(asked).lower()
    reasoning = len(_REASONING.intersection(_WORDS.findall(said)))
    reasoning += sum(phrase in said for phrase in _REASONING_PHRASES)
    score += 0.1 if b"```" in said else 0.0
    score += 0.15 * min(2, reasoning)
    score += 0.05 if said.count(b"?") > 2 else 0.0
    score += 0.1 if tools > _MANY_TOOLS else 0.0
    score += 0.05 if turns > 10 else 0.0
    score += 0.15 * min(failed_tools, 2)
    return min(1.0, score)


def _looked_at(asked: bytes) -> bytes:
    # What is wanted is said at the beginning or at the end; what is in between may be long.
    return asked if len(asked) <= 2 * _LOOK_BYTES else asked[:_LOOK_BYTES] + asked[-_LOOK_BYTES:]
