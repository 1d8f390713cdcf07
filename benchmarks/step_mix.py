"""Steps as assistants make them, a thousand or more from a seed: what the router is judged by.

What is asked for follows what is published of how people use chat assistants (Chatterji et al.,
"How People Use ChatGPT", NBER 34255, 2025): practical guidance and information before all, then
writing, of which two thirds change a text that is given; few ask for technical help. An agent
with tools is taken to do things for them as well. How many tools each kind of turn calls, how
often a tool fails, how long texts and conversations are, is our estimate. Nothing here looks at
what the router makes of it: texts are filled templates, each written as somebody would ask.

The first version of ``difficulty`` sent 87 % of it to the small tier, proofs and derivations
among them. Its bases were raised so that one word that asks for reasoning is enough for a first
step, and one more feature for a follow-up; the mix stayed as it was.

Pure: ``steps`` generates, ``routed`` asks a real ``Router`` with the default settings, keeping the
model of a tool loop as sessions do. ``python -m benchmarks.step_mix`` prints the shares.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from agentray.clock import ManualClock
from agentray.config.settings import ModelsSettings, RoutingSettings
from agentray.events import Message, StepKind
from agentray.memory.window import input_fragment
from agentray.models.catalog import Catalog
from agentray.models.policies import Step, difficulty, step_kind
from agentray.models.router import Router
from agentray.telemetry.metrics import Metrics

__all__ = ["MixStep", "Routed", "routed", "share_of_small", "steps"]

SEED = 20_261
STEPS = 1_000


@dataclass(frozen=True, slots=True)
class MixStep:
    """One model step of a turn. ``asked`` is the turn's input as JSON, ``step`` counts from 1,
    ``turns`` those of its session so far, ``past_bytes`` what is shown of them."""

    asked: bytes
    step: int
    tools: int
    turns: int
    past_bytes: int
    failed_tools: int = 0
    output_schema: bool = False

    @property
    def kind(self) -> StepKind:
        return step_kind(
            self.asked, step=self.step, tools=bool(self.tools), output_schema=self.output_schema
        )

    @property
    def difficulty(self) -> float:
        return difficulty(
            self.kind,
            self.asked,
            tools=self.tools,
            turns=self.turns,
            failed_tools=self.failed_tools,
        )


@dataclass(frozen=True, slots=True)
class _Task:
    """A kind of turn: its ``share`` of all turns, texts to fill, and how its tools are used.

    ``calls`` are the least and the most tool calls behind its first step, ``fails`` the share of
    them that fail; ``text`` is the words of a text that is given with it, ``code`` its lines.
    """

    share: float
    texts: tuple[str, ...]
    tools: tuple[int, int] = (0, 0)
    calls: tuple[int, int] = (0, 0)
    fails: float = 0.03
    text: tuple[int, int] = (0, 0)
    code: tuple[int, int] = (0, 0)
    output_schema: bool = False


_TASKS = (
    # Information, 24 %: most is looked up.
    _Task(
        0.18,
        (
            "Where is my order {number}?",
            "What is on my calendar on {day}?",
            "Who is our contact at {firm}, and what is the phone number?",
            "How much did we spend with {firm} in {month}?",
            "What's the weather in {city} on {day}?",
            "Is the {thing} still in stock in {city}?",
            "When does the last train to {city} leave on {day}?",
            "Has {person} answered my mail about the {thing}?",
        ),
        tools=(2, 6),
        calls=(1, 3),
    ),
    _Task(
        0.06,
        (
            "Compare what {firm} and {other} charge for a {thing}, delivery included.",
            "Why was invoice {number} of {firm} paid twice?",
            "Which of our suppliers got slower since {month}, and by how much?",
            "Analyze last quarter's returns of the {thing}: which causes come up most?",
            "Is there a cheaper {thing} than the one of {firm} that does the same?",
        ),
        tools=(3, 10),
        calls=(2, 5),
        fails=0.06,
    ),
    # Practical guidance, 29 %: most is explained at once.
    _Task(
        0.2,
        (
            "How do I descale a {thing}?",
            "What is the difference between a fixed and a variable rate?",
            "What should I pack for four days in {city} in {month}?",
            "Can I freeze cooked rice?",
            "Give me three ideas for a birthday present for {person}, who likes cycling.",
            "Thanks! And for six people?",
            "How long do I have to keep receipts?",
            "Explain what a deductible is, in simple words.",
            "What do I say when {person} asks for a discount again?",
            "I slept badly for a week. What can I do?",
        ),
    ),
    _Task(
        0.05,
        (
            (
                "Plan a three-day trip to {city} for {few} people in {month}, trains and hotels"
                " included, for less than {number} euros."
            ),
            (
                "Put together a training plan for a half marathon in {month} and enter it in my"
                " calendar."
            ),
            (
                "We are {few} people and move to {city} in {month}. Make a list of what has to be"
                " done until then, with dates, and check which of them are free."
            ),
        ),
        tools=(4, 10),
        calls=(2, 5),
    ),
    _Task(
        0.04,
        (
            "Should we lease or buy {few} {thing}s? Evaluate both over five years, step by step.",
            "Prove that the sum of the first n odd numbers is a square.",
            (
                "Design a fair rota for {few} people with two night shifts a week. What are the"
                " trade-offs?"
            ),
            (
                "Two of my three best people want to leave. What would be a good strategy for the"
                " next {few} months?"
            ),
            "Derive the monthly rate of a loan of {number} euros over ten years at four percent.",
        ),
    ),
    # Writing, 24 %, of which two thirds change a text that is given.
    _Task(
        0.07,
        (
            "Summarize this thread for {person}:\n\n{text}",
            "{text}\n\nTL;DR?",
            "What are the key points of these minutes?\n{text}",
            "Condense this to {few} sentences.\n\n{text}",
        ),
        tools=(0, 4),
        text=(200, 3_000),
    ),
    _Task(
        0.06,
        (
            "Translate this to Spanish: {text}",
            "Rewrite this so that it sounds friendlier:\n{text}",
            "Proofread, please:\n\n{text}",
            "Make this shorter. {text}",
        ),
        tools=(0, 4),
        text=(30, 500),
    ),
    _Task(
        0.03,
        (
            "{text}\nConvert this to CSV with the columns date, name and amount.",
            "Put the numbers of this mail into a table: {text}",
            "Who wrote this, when, and what do they want?\n{text}",
        ),
        text=(50, 800),
        output_schema=True,
    ),
    _Task(
        0.08,
        (
            "Write a mail to {person}: the {thing} comes on {day}, not on Monday.",
            "Draft a job advert for a driver in {city}.",
            "A short toast for {person}, who retires on {day}.",
            "Write a description of our new {thing} for the shop, about {few} sentences.",
        ),
        tools=(0, 4),
    ),
    # What an agent does for its user, 15 %.
    _Task(
        0.15,
        (
            "Book a table for {few} at {firm} on {day}.",
            "Send {person} the minutes of {day}.",
            "Cancel my subscription at {firm}, please.",
            "Move my appointment with {person} to {day}.",
            "Order another {thing}, the same as last time.",
            "Remind everybody who has not answered yet.",
            "Add {person} to the channel of the {thing} project and say hello.",
        ),
        tools=(3, 12),
        calls=(1, 4),
        fails=0.05,
    ),
    # Technical help, 8 %.
    _Task(
        0.05,
        (
            "This test fails since {day}, find out why and fix it:\n```\n{code}\n```",
            "Debug this, it sometimes returns nothing:\n```\n{code}\n```",
            "Refactor this so that it can be tested without the network.\n```\n{code}\n```",
            "Requests take twice as long since {month}. Diagnose it; the logs are in {firm}/.",
        ),
        tools=(5, 12),
        calls=(3, 9),
        fails=0.12,
        code=(15, 120),
    ),
    _Task(
        0.03,
        (
            "Rename the field {thing} to item everywhere.",
            "Add a unit test for this:\n```\n{code}\n```",
            "What does this do?\n```\n{code}\n```",
            "Write a query for the {few} customers with the highest revenue in {month}.",
        ),
        tools=(5, 12),
        calls=(1, 6),
        fails=0.08,
        code=(5, 60),
    ),
    # The rest: greetings, feelings, play.
    _Task(
        0.1,
        (
            "Hi!",
            "Thank you, that's all.",
            "Tell me a story about a {thing} that wanted to see {city}.",
            "I had a long day.",
            "What do you think of {city}?",
            "No, the other one.",
        ),
        tools=(0, 4),
    ),
)

_WORDS: dict[str, tuple[str, ...]] = {
    "number": ("4711", "80233", "1500", "902"),
    "few": ("two", "four", "five", "eight"),
    "day": ("Tuesday", "Friday", "March 3", "the 14th"),
    "month": ("May", "January", "October", "August"),
    "city": ("Lyon", "Turin", "Leeds", "Graz", "Porto"),
    "firm": ("Nordlicht", "Casa Verde", "Miller & Sons", "Helix"),
    "other": ("Blau", "Two Rivers", "Tanaka"),
    "person": ("Ada", "Mr. Okafor", "Ines", "Wei"),
    "thing": ("coffee machine", "printer", "desk lamp", "rain jacket", "router"),
}
_PROSE = (
    "the delivery came late and two boxes were open",
    "we agreed to meet again in two weeks",
    "nobody has answered the customer yet",
    "the price includes the installation but not the old device",
    "please let me know by the end of the week",
    "the new office has room for twelve people",
    "sales in the north were better than we thought",
)
_CODE = (
    "def load(path: str) -> dict[str, str]:",
    "    rows = [row.split(',') for row in open(path)]",
    "    if not rows: return {}",
    "    return {row[0]: row[1] for row in rows}",
    "for name, value in load('items.csv').items():",
    "    print(name, value)",
)
# Sessions are short: the chance that a turn is not its session's last.
_GOES_ON = 0.8


def steps(seed: int = SEED, count: int = STEPS) -> list[MixStep]:
    """Return at least ``count`` steps, whole turns one after another; the same for a seed."""
    rng = random.Random(seed)
    found: list[MixStep] = []
    turns = past_bytes = 0
    while len(found) < count:
        task = rng.choices(_TASKS, [task.share for task in _TASKS])[0]
        first = _first_step(rng, task, turns, past_bytes)
        found += _turn(rng, task, first)
        turns += 1
        past_bytes += len(first.asked) + rng.randint(200, 3_000)
        if rng.random() > _GOES_ON:
            turns = past_bytes = 0
    return found


def _first_step(rng: random.Random, task: _Task, turns: int, past_bytes: int) -> MixStep:
    facts = {name: rng.choice(words) for name, words in _WORDS.items()}
    sentences = rng.randint(*task.text) // 8
    facts["text"] = ". ".join(rng.choice(_PROSE) for _ in range(sentences))
    facts["code"] = "\n".join(rng.choice(_CODE) for _ in range(rng.randint(*task.code)))
    asked = input_fragment([Message("user", rng.choice(task.texts).format(**facts))])
    return MixStep(
        asked=asked,
        step=1,
        tools=rng.randint(*task.tools),
        turns=turns,
        past_bytes=past_bytes,
        output_schema=task.output_schema,
    )


def _turn(rng: random.Random, task: _Task, first: MixStep) -> Iterator[MixStep]:
    """Yield a turn's steps: its first one, and one behind each round of tool calls."""
    yield first
    step = first
    for _ in range(rng.randint(*task.calls)):
        step = replace(
            step,
            step=step.step + 1,
            past_bytes=step.past_bytes + rng.randint(100, 4_000),
            failed_tools=step.failed_tools + (rng.random() < task.fails),
        )
        yield step


class Routed(msgspec.Struct, frozen=True):
    """Where a step went: ``tier`` of its model, and whether chance had a hand in it."""

    kind: StepKind
    tier: str
    held_out: bool


def routed(
    mix: list[MixStep], routing: RoutingSettings | None = None, *, seed: int = SEED
) -> list[Routed]:
    """Return where each step goes with one small and one large model, both well."""
    settings = ModelsSettings.model_validate(
        {
            "endpoints": {
                tier: {"url": "http://127.0.0.1:1/v1", "card": {"tier": tier}}
                for tier in ("small", "large")
            },
            "routing": routing or RoutingSettings(),
        }
    )
    router = Router(
        Catalog(settings, ""),
        settings,
        clock=ManualClock(),
        metrics=Metrics(),
        rng=random.Random(seed),
    )
    found: list[Routed] = []
    last = ""
    for step in mix:
        choice = router.choose(
            Step(
                kind=step.kind,
                difficulty=step.difficulty,
                prompt_tokens=(len(step.asked) + step.past_bytes) // 4,
                tools=bool(step.tools),
                output_schema=step.output_schema,
                # As sessions do: see ``step_of``.
                kept=last if step.step > 2 else None,
            )
        )
        last = choice.model
        found.append(Routed(step.kind, choice.model, choice.route.held_out))
    return found


def share_of_small(calls: list[Routed]) -> float:
    """Return the share of calls that went to the small tier."""
    return sum(call.tier == "small" for call in calls) / len(calls)


def _table(calls: list[Routed]) -> Iterator[str]:
    by_kind = Counter(call.kind for call in calls)
    by_tier = Counter((call.kind, call.tier) for call in calls)
    yield f"{'kind':<16}{'steps':>7}{'share':>8}{'small':>8}{'large':>8}"
    for kind, count in by_kind.most_common():
        small, large = (by_tier[kind, tier] / count for tier in ("small", "large"))
        yield f"{kind:<16}{count:>7}{count / len(calls):>8.1%}{small:>8.1%}{large:>8.1%}"
    small = share_of_small(calls)
    yield f"{'all':<16}{len(calls):>7}{1:>8.1%}{small:>8.1%}{1 - small:>8.1%}"
    held_out = sum(call.held_out for call in calls)
    yield f"held out to the large tier: {held_out / len(calls):.1%} of the calls"


def main() -> None:
    """Print the shares of the shipped mix."""
    print("\n".join(_table(routed(steps()))))


if __name__ == "__main__":
    main()
