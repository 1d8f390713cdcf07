"""Workers, connections and schedulers lost in any order: no call is lost, and none runs twice."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentray.tools.messages import Gone, Granted, Held, Kill, Refused, Revoke, Welcome
from tests.unit.tools.lease_scene import Scene, key_of

KEYS = ("a", "b", "c", "d")


class _Worker:
    def __init__(self, number: int) -> None:
        self.id = f"w{number}"
        self.connected = True
        self.jobs: dict[str, int] = {}
        self.kept: set[str] = set()
        self.void: set[int] = set()
        self.first_lease = 0


class _Question:
    """A host's question for a call: what it knows of where it was."""

    def __init__(self, on_crash: str) -> None:
        self.on_crash = on_crash
        self.was_at = ""
        self.lead: Granted | None = None
        self.asked = False


class Pool(RuleBasedStateMachine):
    """One host, workers with two slots, and a scheduler; each of them may be lost at any time.

    Messages arrive at once or never: a broken connection is a lost worker here. One that is cut
    off for longer than it is waited for goes on with what it has, which may run elsewhere by then
    (decision 0107): what it runs and keeps counts when it is connected.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.workers: dict[str, _Worker] = {}
        self.questions: dict[str, _Question] = {}
        self.begun: list[tuple[str, str]] = []
        self.settled: set[str] = set()
        self.ran_to_end: list[str] = []
        self.number = 0
        self.schedulers = 0
        self.start_worker()

    def start_worker(self) -> None:
        self.number += 1
        worker = self.workers[f"w{self.number}"] = _Worker(self.number)
        self.register(worker)

    def register(self, worker: _Worker) -> None:
        worker.connected = True
        held: list[Held] = [
            self.scene.held(key, lease, on_crash=self.questions[key].on_crash)
            for key, lease in worker.jobs.items()
        ]
        self.scene.worker(worker.id, slots=2, held=held, kept=map(key_of, worker.kept))
        self.deliver()

    def ask(self, key: str) -> None:
        question = self.questions[key]
        question.asked, question.lead = True, None
        self.scene.want(key, was_at=question.was_at, on_crash=question.on_crash)
        self.deliver()

    def deliver(self) -> None:
        """Have what was sent arrive."""
        while self.scene.sent:
            sent, self.scene.sent = self.scene.sent, []
            for send in sent:
                message = send.message
                worker = self.workers.get(send.to)
                match message:
                    case Granted():
                        self.granted(message)
                    case Refused():
                        key = message.key.split("\0")[2]
                        self.settle(key)
                        assert message.reason == "died"
                        assert self.questions[key].on_crash == "report"
                        assert self.questions[key].was_at
                    case Kill() if worker is not None and worker.connected:
                        key = message.key.split("\0")[2]
                        if (lease := worker.jobs.pop(key, 0)) != 0:
                            worker.void.add(lease)
                            self.scene.finished(worker.id, lease, key, killed=True)
                    case Revoke() if worker is not None and worker.connected:
                        if message.lease not in worker.jobs.values():
                            worker.void.add(message.lease)
                            self.scene.revoked(message.lease)
                    case Welcome() if worker is not None:
                        worker.first_lease = message.first_lease
                    case Gone() if worker is not None:
                        # It begins anew: nothing of what it ran or kept counts any more.
                        del self.workers[worker.id]
                        self.start_worker()
                        self.lost(worker.id)
                    case Gone():
                        self.lost(message.worker)
                    case _:
                        pass

    def granted(self, granted: Granted) -> None:
        key = granted.key.split("\0")[2]
        question = self.questions[key]
        assert question.asked
        question.asked, question.lead = False, granted

    def settle(self, key: str) -> None:
        self.settled.add(key)
        self.questions[key].asked, self.questions[key].lead = False, None

    def lost(self, worker: str) -> None:
        for key, question in self.questions.items():
            if question.lead is not None and question.lead.worker == worker:
                question.lead = None
                if key not in self.settled:
                    self.ask(key)

    @precondition(lambda self: len(self.questions) < len(KEYS))
    @rule(on_crash=st.sampled_from(["retry", "report"]))
    def asks(self, on_crash: str) -> None:
        key = KEYS[len(self.questions)]
        self.questions[key] = _Question(on_crash)
        self.ask(key)

    @precondition(lambda self: any(each.lead for each in self.questions.values()))
    @rule(which=st.integers(0))
    def host_reaches_worker(self, which: int) -> None:
        leads = [(key, each) for key, each in self.questions.items() if each.lead is not None]
        key, question = leads[which % len(leads)]
        lead = question.lead
        assert lead is not None
        worker = self.workers.get(lead.worker)
        if worker is None:
            question.lead = None
            self.ask(key)
            return
        if key in worker.jobs:
            question.was_at = worker.id
        elif key in worker.kept:
            self.settle(key)
        elif lead.lease < max(1, worker.first_lease) or lead.lease in worker.void:
            question.lead = None
            self.ask(key)
        else:
            question.was_at = worker.id
            worker.jobs[key] = lead.lease
            self.begun.append((key, question.on_crash))

    @precondition(lambda self: any(each.lead for each in self.questions.values()))
    @rule(which=st.integers(0))
    def host_loses_worker(self, which: int) -> None:
        leads = [key for key, each in self.questions.items() if each.lead is not None]
        self.ask(leads[which % len(leads)])

    @precondition(lambda self: any(each.jobs for each in self.workers.values()))
    @rule(which=st.integers(0), told=st.booleans())
    def call_ends(self, which: int, told: bool) -> None:
        jobs = [(worker, key) for worker in self.workers.values() for key in worker.jobs]
        worker, key = jobs[which % len(jobs)]
        lease = worker.jobs.pop(key)
        worker.void.add(lease)
        worker.kept.add(key)
        self.ran_to_end.append(key)
        if told and self.questions[key].lead is not None:
            self.settle(key)
        if worker.connected:
            self.scene.finished(worker.id, lease, key)
            self.deliver()

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0))
    def worker_dies(self, which: int) -> None:
        worker = list(self.workers.values())[which % len(self.workers)]
        del self.workers[worker.id]
        self.scene.died(worker.id)
        self.deliver()
        self.lost(worker.id)
        self.start_worker()

    @precondition(lambda self: any(each.connected for each in self.workers.values()))
    @rule(which=st.integers(0))
    def worker_is_cut_off(self, which: int) -> None:
        there = [each for each in self.workers.values() if each.connected]
        worker = there[which % len(there)]
        worker.connected = False
        self.scene.lost(worker.id)

    @precondition(lambda self: not all(each.connected for each in self.workers.values()))
    @rule()
    def workers_come_back(self) -> None:
        for worker in list(self.workers.values()):
            if not worker.connected:
                self.register(worker)

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def another_worker(self) -> None:
        self.start_worker()

    @rule()
    def scheduler_dies(self) -> None:
        self.schedulers += 1
        expected = list(self.workers)
        self.scene = Scene(expected=expected, first_lease=1 + 1_000 * self.schedulers)
        for worker in self.workers.values():
            worker.connected = False
        for key, question in self.questions.items():
            if question.asked:
                self.ask(key)

    @rule()
    def workers_beat(self) -> None:
        self.scene.after(0.5)
        self.deliver()
        for worker in self.workers.values():
            if worker.connected:
                self.scene.alive(worker.id, *worker.jobs.values())
                self.deliver()

    @invariant()
    def no_call_runs_twice(self) -> None:
        there = [worker for worker in self.workers.values() if worker.connected]
        running = [key for worker in there for key in worker.jobs]
        assert len(running) == len(set(running))

    @invariant()
    def a_call_that_ended_is_not_begun_again_while_its_result_is_there(self) -> None:
        there = [worker for worker in self.workers.values() if worker.connected]
        kept = [key for worker in there for key in worker.kept]
        assert len(kept) == len(set(kept))

    @invariant()
    def calls_to_be_reported_begin_once(self) -> None:
        reported = [key for key, on_crash in self.begun if on_crash == "report"]
        assert len(reported) == len(set(reported))

    def teardown(self) -> None:
        """No call is lost: with all connected and nothing dying any more, each one settles."""
        for _ in range(60):
            for worker in list(self.workers.values()):
                if not worker.connected:
                    self.register(worker)
            self.workers_beat()
            while any(each.lead for each in self.questions.values()):
                before = [each.lead for each in self.questions.values()]
                for _ in range(len(before)):
                    if any(each.lead for each in self.questions.values()):
                        self.host_reaches_worker(0)
                if any(each.jobs for each in self.workers.values()):
                    self.call_ends(0, True)
                elif before == [each.lead for each in self.questions.values()]:
                    break
            while any(each.jobs for each in self.workers.values()):
                self.call_ends(0, True)
            if self.settled >= self.questions.keys():
                return
        raise AssertionError(f"not settled: {self.questions.keys() - self.settled}")


TestPool = Pool.TestCase
