"""Who gets a slot, and what becomes of calls when hosts, workers or the scheduler are lost."""

from __future__ import annotations

import pytest

from agentray.tools.fair_queue import Share
from agentray.tools.messages import (
    Fenced,
    Gone,
    Granted,
    Kill,
    Peer,
    Queued,
    Refused,
    Revoke,
)
from agentray.tools.roster import LOST_S
from tests.unit.tools.lease_scene import Scene, key_of

# Slots


def test_a_free_slot_is_leased_at_once_and_its_worker_is_told_of_first() -> None:
    scene = Scene()
    scene.worker("w", slots=2)
    scene.want("a")
    kinds = [type(send.message) for send in scene.sent if send.to == "host"]
    assert kinds == [Peer, Granted]
    scene.granted("a")
    scene.want("b")
    assert scene.nothing_said(Peer) is False
    assert scene.granted("b").worker == "w"
    assert scene.said(Peer) == []


def test_a_call_that_waits_is_told_where_it_stands_and_gets_the_next_slot() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a")
    first = scene.granted("a")
    scene.want("b")
    scene.want("c")
    assert [queued.position for queued in scene.said(Queued)] == [1, 2]
    scene.finished("w", first.lease, "a")
    assert scene.granted("b").lease != first.lease
    scene.sent += scene.leases.places()
    (queued,) = scene.said(Queued)
    assert (queued.key, queued.position) == (key_of("c"), 1)
    assert queued.wait_s > 0


def test_calls_go_to_the_worker_with_the_most_free_slots() -> None:
    scene = Scene()
    scene.worker("small", slots=1)
    scene.worker("large", slots=3)
    for number in range(4):
        scene.want(str(number))
    workers = [granted.worker for granted in scene.said(Granted)]
    assert sorted(workers) == ["large", "large", "large", "small"]
    assert workers[0] == "large"


def test_a_full_queue_refuses_with_the_time_after_which_to_try_again() -> None:
    scene = Scene(share=Share(max_queued=2))
    scene.worker("w")
    for number in range(4):
        scene.want(str(number))
    (refused,) = scene.said(Refused)
    assert (refused.key, refused.reason) == (key_of("3"), "queue_full")
    assert refused.retry_after_s >= 1
    assert scene.leases.state().queued == 2


def test_what_makes_room_for_another_tenants_call_is_refused_at_its_host() -> None:
    scene = Scene(max_queued=3)
    scene.worker("w")
    for number in range(4):
        scene.want(str(number), link="flood", tenant="eve")
    scene.want("mine", link="light", tenant="ada")
    assert [refused.key for refused in scene.said(Refused, "flood")] == [key_of("3", "eve")]
    assert scene.nothing_said(Refused, "light")


def test_a_call_whose_deadline_passes_while_it_waits_is_dropped_with_that_reason() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a")
    first = scene.granted("a")
    scene.want("b", left_s=2.0)
    scene.after(1.9)
    assert scene.nothing_said(Refused)
    scene.after(0.2)
    assert [(said.key, said.reason) for said in scene.said(Refused)] == [(key_of("b"), "expired")]
    scene.finished("w", first.lease, "a")
    assert scene.nothing_said(Granted)


def test_a_call_that_runs_is_not_touched_by_its_deadline() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a", left_s=2.0)
    scene.granted("a")
    scene.after(3.0)
    assert scene.nothing_said(Refused)
    assert scene.nothing_said(Kill, "w")


def test_who_asks_again_brings_a_new_deadline() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a")
    scene.want("b", left_s=2.0)
    scene.want("b", link="next", epoch=2, left_s=60.0)
    scene.after(3.0)
    assert scene.nothing_said(Refused, "next")
    assert scene.leases.state().queued == 1


def test_a_tenants_cap_holds_over_calls_that_end_and_are_lost() -> None:
    scene = Scene(share=Share(max_running=2))
    scene.worker("w", slots=8)
    scene.worker("v", slots=8)
    for number in range(6):
        scene.want(str(number))
    one, two = scene.said(Granted)
    assert {one.worker, two.worker} == {"w", "v"}
    scene.died(one.worker)
    (three,) = scene.said(Granted)
    scene.finished(two.worker, two.lease, "1")
    assert len(scene.said(Granted)) == 1
    assert three.worker == two.worker
    assert scene.leases.state().running == 2


def test_what_a_call_used_counts_for_who_is_next() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("0", tenant="ada")
    for number in range(1, 6):
        scene.want(str(number), tenant="ada")
        scene.want(str(number), tenant="bob")
    # It took 2 s of CPU, of which a slot has half a core: 4 slot-seconds.
    first = scene.said(Granted)[0]
    done = key_of("0", "ada")
    scene.finished("w", first.lease, "0", wall_s=1.0, cpu_s=2.0)
    tenants: list[str] = []
    for _ in range(3):
        (granted,) = scene.said(Granted)
        tenant, _, key = granted.key.split("\0")
        tenants.append(tenant)
        scene.finished("w", granted.lease, key)
    assert done not in tenants
    assert tenants == ["bob"] * 3


def test_a_killed_call_is_charged_what_calls_like_it_use() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("busy", tenant="cy")
    (busy,) = scene.said(Granted)
    # Four times a slot's part of the memory.
    scene.want("big", tenant="ada", tool="big", memory_bytes=400)
    for number in range(8):
        scene.want(str(number), tenant="ada")
        scene.want(str(number), tenant="bob")
    scene.finished("w", busy.lease, "busy")
    (first,) = scene.said(Granted)
    assert first.key == key_of("big", "ada")
    scene.finished("w", first.lease, "big", wall_s=1.0, killed=True)
    tenants: list[str] = []
    for _ in range(4):
        (granted,) = scene.said(Granted)
        tenant, _, key = granted.key.split("\0")
        tenants.append(tenant)
        scene.finished("w", granted.lease, key)
    assert tenants == ["bob"] * 4


def test_what_no_other_worker_could_help_is_no_reason_to_add_one() -> None:
    scene = Scene(share=Share(max_running=2))
    scene.worker("w", slots=4)
    for number in range(10):
        scene.want(str(number))
    assert scene.leases.state().queued == 8
    assert scene.leases.queued_s() == 0
    scene.want("busy", tenant="ada")
    scene.want("busy", tenant="bob")
    scene.want("busy", tenant="bob", session="t")
    # The slots are taken, so that one of bob's waits for nothing but a slot.
    assert scene.leases.queued_s() == pytest.approx(0.25)


def test_a_call_is_charged_by_what_is_known_when_it_begins_not_when_it_was_asked_for() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("learn", tenant="ada")
    learn = scene.said(Granted)[0]
    for number in range(6):
        scene.want(str(number), tenant="ada")
        scene.want(str(number), tenant="bob", tool="other")
    # Ada's calls take a hundredth of the second that a tool is taken to need at first.
    scene.finished("w", learn.lease, "learn", wall_s=0.01)
    scene.worker("v", slots=4)
    tenants = [granted.key.split("\0")[0] for granted in scene.said(Granted)]
    assert (tenants.count("ada"), tenants.count("bob")) == (4, 1)


# Kills and fences


def test_a_host_that_waits_no_longer_gives_its_place_up() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a")
    first = scene.granted("a")
    scene.want("b")
    scene.left("b")
    scene.left("a")
    assert scene.said(Kill, "w") == [Kill(key_of("a"), 1)]
    scene.finished("w", first.lease, "a", killed=True)
    assert scene.nothing_said(Granted)
    assert scene.leases.state().running == 0


def test_a_lease_that_never_came_to_its_worker_is_taken_back() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a")
    first = scene.granted("a")
    scene.want("b")
    # Its files may be on their way.
    scene.after(9.0)
    scene.alive("w")
    assert scene.nothing_said(Revoke, "w")
    scene.after(2.0)
    scene.alive("w")
    assert scene.said(Revoke, "w") == [Revoke(first.lease)]
    scene.revoked(first.lease)
    assert scene.granted("b").lease > first.lease


def test_a_lease_that_a_lost_host_may_not_have_used_is_taken_back_at_once() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a", link="dies")
    first = scene.granted("a", to="dies")
    scene.want("b")
    scene.host_left("dies")
    assert scene.said(Revoke, "w") == [Revoke(first.lease)]
    scene.revoked(first.lease)
    assert scene.granted("b").lease > first.lease


def test_a_lease_that_began_is_not_taken_back() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a")
    first = scene.granted("a")
    scene.after(11.0)
    scene.alive("w", first.lease)
    scene.after(11.0)
    scene.alive("w", first.lease)
    assert scene.nothing_said(Revoke, "w")


def test_a_slot_is_free_when_its_worker_lists_the_lease_no_more() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a")
    first = scene.granted("a")
    scene.alive("w", first.lease)
    scene.want("b")
    # Its end was never told.
    scene.alive("w")
    assert scene.granted("b").lease > first.lease
    scene.want("a", was_at="w")
    assert [said.reason for said in scene.said(Refused)] == ["died"]


def test_a_fence_is_told_only_when_all_that_was_older_has_ended() -> None:
    scene = Scene()
    scene.worker("w", slots=2)
    scene.want("a", link="old")
    scene.want("b", link="old")
    scene.want("waits", link="old")
    one, two = scene.said(Granted, "old")
    scene.fence(2)
    assert {kill.key for kill in scene.said(Kill, "w")} == {key_of("a"), key_of("b")}
    assert [(said.key, said.reason) for said in scene.said(Refused, "old")] == [
        (key_of("waits"), "refused")
    ]
    scene.finished("w", one.lease, "a", killed=True)
    assert scene.nothing_said(Fenced)
    scene.finished("w", two.lease, "b", killed=True)
    assert scene.said(Fenced) == [Fenced(1)]


def test_a_fence_of_a_session_with_nothing_is_told_at_once() -> None:
    scene = Scene()
    scene.want("other", session="t")
    scene.fence(2)
    assert scene.said(Fenced) == [Fenced(1)]
    assert scene.leases.state().queued == 1


def test_an_older_owner_gets_no_slot_after_a_fence_or_a_newer_call() -> None:
    scene = Scene()
    scene.worker("w")
    scene.fence(3)
    scene.want("a", epoch=2)
    assert [said.reason for said in scene.said(Refused)] == ["refused"]
    scene.want("b", epoch=4)
    scene.granted("b")
    scene.want("c", epoch=3)
    assert [said.reason for said in scene.said(Refused)] == ["refused"]


def test_a_newer_owner_that_asks_for_a_running_call_is_led_to_it() -> None:
    scene = Scene()
    scene.worker("w", slots=2)
    scene.want("a", link="old")
    first = scene.granted("a", to="old")
    scene.alive("w", first.lease)
    scene.want("a", link="new", epoch=2)
    assert scene.granted("a", to="new") == Granted(key_of("a"), "w", 0)
    assert scene.nothing_said(Kill, "w")
    scene.fence(2, link="new")
    assert scene.said(Fenced, "new") == [Fenced(1)]


def test_what_an_older_owner_gives_up_late_does_not_end_the_newer_owners_question() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a", link="old", on_crash="retry")
    first = scene.granted("a", to="old")
    scene.fence(2, link="new")
    scene.want("a", link="new", epoch=2, on_crash="retry")
    scene.left("a", link="old", epoch=1)
    scene.finished("w", first.lease, "a", killed=True)
    assert scene.granted("a", to="new").lease > first.lease


def test_who_is_pushed_aside_by_another_question_for_the_same_call_is_told() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("busy", session="t")
    scene.want("a", link="old")
    scene.want("a", link="new", epoch=2)
    assert [said.reason for said in scene.said(Refused, "old")] == ["refused"]
    assert scene.leases.state().queued == 1


def test_a_kill_that_its_worker_did_not_hear_is_said_again_when_it_is_back() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a", link="old")
    first = scene.granted("a", to="old")
    scene.lost("w")
    scene.fence(2)
    scene.said(Kill, "w")
    scene.after(1.0)
    scene.worker("w", held=[scene.held("a", first.lease)])
    assert scene.said(Kill, "w") == [Kill(key_of("a"), 1)]
    assert scene.nothing_said(Fenced)
    scene.finished("w", first.lease, "a", killed=True)
    assert scene.said(Fenced) == [Fenced(1)]


@pytest.mark.parametrize("expected", [[], ["w"]])
def test_a_killed_call_holds_its_slot_and_its_fence_until_it_has_ended(
    expected: list[str],
) -> None:
    scene = Scene(expected=expected, first_lease=1_000)
    scene.fence(2)
    scene.said(Fenced)
    scene.want("a", link="new", epoch=2, on_crash="retry")
    scene.worker("w", held=[scene.held("a", 7, epoch=1, killed=True)])
    scene.fence(2, number=2)
    assert scene.nothing_said(Fenced)
    assert scene.nothing_said(Granted, "new")
    scene.finished("w", 7, "a", killed=True)
    assert Fenced(2) in scene.said(Fenced)
    assert scene.granted("a", to="new").lease >= 1_000


@pytest.mark.parametrize("asked", ["before", "after"])
def test_who_asks_for_a_killed_call_is_not_led_to_it_but_has_it_run_after_that(asked: str) -> None:
    scene = Scene(expected=["w"], first_lease=1_000)
    if asked == "before":
        scene.want("a", on_crash="retry")
    scene.worker("w", held=[scene.held("a", 7, killed=True)])
    if asked == "after":
        scene.want("a", on_crash="retry")
    assert scene.nothing_said(Granted)
    scene.finished("w", 7, "a", killed=True)
    assert scene.granted("a").lease >= 1_000


def test_a_killed_call_that_must_not_run_twice_is_reported_when_it_has_ended() -> None:
    scene = Scene(expected=["w"], first_lease=1_000)
    scene.want("a", link="new", epoch=2)
    scene.worker("w", held=[scene.held("a", 7, epoch=1, killed=True)])
    assert scene.nothing_said(Refused, "new")
    scene.finished("w", 7, "a", killed=True)
    assert [said.reason for said in scene.said(Refused, "new")] == ["died"]


# Results


def test_a_call_that_has_ended_is_not_run_again_while_its_result_is_kept() -> None:
    scene = Scene()
    scene.worker("w", slots=2)
    scene.want("a", on_crash="retry")
    first = scene.granted("a")
    scene.finished("w", first.lease, "a")
    scene.want("a", on_crash="retry", was_at="w")
    assert scene.granted("a") == Granted(key_of("a"), "w", 0)
    scene.leases.forgot("w", [key_of("a")])
    scene.want("a", on_crash="retry", was_at="w")
    assert scene.granted("a").lease > first.lease


def test_a_call_that_began_and_left_no_result_is_reported_and_not_run_again() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a")
    first = scene.granted("a")
    scene.finished("w", first.lease, "a")
    scene.leases.forgot("w", [key_of("a")])
    scene.want("a", was_at="w")
    assert [said.reason for said in scene.said(Refused)] == ["died"]
    assert scene.nothing_said(Granted)


# Workers that die


@pytest.mark.parametrize(("on_crash", "again"), [("retry", True), ("report", False)])
def test_a_dead_workers_slots_are_free_and_its_calls_follow_their_on_crash(
    on_crash: str, again: bool
) -> None:
    scene = Scene()
    scene.worker("w")
    scene.worker("v")
    scene.want("a", on_crash=on_crash)
    first = scene.granted("a")
    other = ({"w", "v"} - {first.worker}).pop()
    scene.died(first.worker)
    assert scene.said(Gone) == [Gone(first.worker)]
    assert scene.leases.state().running == 0
    scene.want("a", on_crash=on_crash, was_at=first.worker)
    if again:
        assert scene.granted("a").worker == other
    else:
        assert [said.reason for said in scene.said(Refused)] == ["died"]
        assert scene.nothing_said(Granted)


@pytest.mark.parametrize("on_crash", ["retry", "report"])
def test_who_asks_before_it_is_known_that_the_worker_died_is_answered_then(on_crash: str) -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a", on_crash=on_crash)
    first = scene.granted("a")
    scene.alive("w", first.lease)
    scene.lost("w")
    scene.want("a", on_crash=on_crash, was_at="w")
    assert scene.nothing_said(Granted)
    scene.worker("v")
    scene.after(LOST_S - 0.1)
    assert scene.nothing_said(Granted)
    assert scene.nothing_said(Refused)
    scene.after(0.2)
    if on_crash == "retry":
        assert scene.granted("a").worker == "v"
    else:
        assert [said.reason for said in scene.said(Refused)] == ["died"]


def test_a_worker_that_comes_back_in_time_goes_on_with_what_it_has() -> None:
    scene = Scene()
    scene.worker("w", slots=3)
    for key in ("runs", "ended", "unread"):
        scene.want(key, on_crash="retry")
    leases = {granted.key: granted.lease for granted in scene.said(Granted)}
    scene.alive("w", *leases.values())
    scene.lost("w")
    scene.want("runs", on_crash="retry", was_at="w")
    scene.want("ended", on_crash="retry", was_at="w")
    assert scene.nothing_said(Granted)
    scene.after(1.0)
    held = [scene.held("runs", leases[key_of("runs")])]
    scene.worker("w", slots=3, held=held, kept=[key_of("ended"), key_of("unread")])
    led = {granted.key: granted.lease for granted in scene.said(Granted)}
    assert led == {key_of("ended"): 0, key_of("runs"): 0}
    assert scene.leases.state().running == 1


def test_a_process_in_the_place_of_another_takes_its_leases_back() -> None:
    scene = Scene()
    scene.worker("w1", name="actor")
    scene.want("a", on_crash="retry")
    scene.granted("a")
    scene.worker("w2", name="actor")
    assert scene.said(Gone) == [Gone("w1")]
    scene.want("a", on_crash="retry", was_at="w1")
    assert scene.granted("a").worker == "w2"


def test_a_worker_that_was_given_up_has_to_begin_anew() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a", on_crash="retry")
    first = scene.granted("a")
    scene.lost("w")
    scene.after(LOST_S + 0.1)
    scene.worker("w", held=[scene.held("a", first.lease)])
    assert scene.said(Gone, "w") == [Gone("w")]
    assert scene.leases.state().slots == 0


def test_nothing_is_leased_at_a_worker_that_is_away() -> None:
    scene = Scene()
    scene.worker("w")
    scene.lost("w")
    scene.want("a")
    assert scene.nothing_said(Granted)
    scene.worker("w")
    scene.granted("a")


# A scheduler in the place of another


def test_nothing_is_leased_until_the_workers_have_told_what_they_run() -> None:
    scene = Scene(expected=["one", "two"])
    scene.worker("w1", name="one", slots=2)
    scene.want("a")
    assert scene.nothing_said(Granted)
    scene.worker("w2", name="two", slots=2)
    scene.granted("a")


def test_a_worker_that_does_not_come_is_not_waited_for_for_ever() -> None:
    scene = Scene(expected=["one", "two"])
    scene.worker("w1", name="one")
    scene.want("a")
    scene.after(7.9)
    assert scene.nothing_said(Granted)
    scene.after(0.2)
    scene.granted("a")


def test_a_call_that_runs_already_is_found_and_not_run_again() -> None:
    scene = Scene(expected=["one"], first_lease=1_000)
    scene.want("a", link="new", epoch=2, on_crash="retry")
    scene.worker("w", name="one", slots=2, held=[scene.held("a", 7)])
    assert scene.granted("a", to="new") == Granted(key_of("a"), "w", 0)
    assert scene.leases.state() == type(scene.leases.state())(0, 1, 1, 2)
    scene.finished("w", 7, "a")
    assert scene.leases.state().running == 0


def test_a_call_that_ended_meanwhile_is_found_and_not_run_again() -> None:
    scene = Scene(expected=["one"])
    scene.want("a", on_crash="retry")
    scene.worker("w", name="one", kept=[key_of("a")])
    assert scene.granted("a") == Granted(key_of("a"), "w", 0)
    assert scene.leases.state().queued == 0


def test_a_fence_is_not_told_before_it_is_known_what_runs() -> None:
    scene = Scene(expected=["one"])
    scene.fence(2)
    assert scene.nothing_said(Fenced)
    scene.worker("w", name="one", held=[scene.held("a", 7, epoch=1)])
    assert scene.said(Kill, "w") == [Kill(key_of("a"), 1)]
    assert scene.nothing_said(Fenced)
    scene.finished("w", 7, "a", killed=True)
    assert scene.said(Fenced) == [Fenced(1)]


def test_the_epochs_of_calls_that_run_fence_older_ones() -> None:
    scene = Scene(expected=["one", "two"])
    scene.worker("w1", name="one", held=[scene.held("new", 7, epoch=5)])
    scene.worker("w2", name="two", held=[scene.held("old", 8, epoch=4)])
    assert scene.said(Kill, "w2") == [Kill(key_of("old"), 4)]
    scene.want("late", epoch=4)
    assert [said.reason for said in scene.said(Refused)] == ["refused"]


def test_what_calls_ran_before_counts_against_their_tenant() -> None:
    scene = Scene(expected=["one"])
    scene.worker("w", name="one", held=[scene.held("long", 7, tenant="eve", ran_s=60.0)])
    scene.want("a", tenant="eve")
    scene.want("b", tenant="ada")
    scene.after(0.1)
    for key in ("c", "d", "e"):
        scene.want(key, tenant="ada")
    scene.worker("v", slots=3)
    assert {granted.key.split("\0")[0] for granted in scene.said(Granted)} == {"ada"}


def test_a_worker_that_comes_late_does_not_run_what_runs_elsewhere_by_now() -> None:
    scene = Scene(expected=["one"], first_lease=1_000)
    scene.worker("v")
    scene.want("a", on_crash="retry")
    scene.after(9.0)
    scene.granted("a")
    scene.worker("w", name="one", held=[scene.held("a", 7)])
    assert scene.said(Kill, "w") == [Kill(key_of("a"), 1)]


@pytest.mark.parametrize("on_crash", ["retry", "report"])
def test_a_call_of_a_worker_that_did_not_come_back_follows_its_on_crash(on_crash: str) -> None:
    scene = Scene(expected=["one"])
    scene.worker("v")
    scene.want("a", was_at="w", on_crash=on_crash)
    assert scene.nothing_said(Granted)
    scene.after(8.1)
    if on_crash == "retry":
        assert scene.granted("a").worker == "v"
    else:
        assert [said.reason for said in scene.said(Refused)] == ["died"]


# Hosts that are lost


def test_what_a_lost_host_waited_for_is_dropped_and_what_runs_goes_on() -> None:
    scene = Scene()
    scene.worker("w")
    scene.want("a", link="dies")
    first = scene.granted("a", to="dies")
    scene.want("b", link="dies")
    scene.host_left("dies")
    assert scene.leases.state().queued == 0
    assert scene.nothing_said(Kill, "w")
    scene.alive("w", first.lease)
    scene.finished("w", first.lease, "a")
    scene.want("a", link="next", epoch=2)
    assert scene.granted("a", to="next") == Granted(key_of("a"), "w", 0)
