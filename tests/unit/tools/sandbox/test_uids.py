"""Uids of slots: no two have the same."""

from __future__ import annotations

from pathlib import Path

from agentray.tools.sandbox.uids import FIRST_UID, UidLease


def test_no_two_slots_share_a_uid_and_a_free_one_is_given_again(tmp_path: Path) -> None:
    first, second = UidLease(tmp_path), UidLease(tmp_path)
    assert [first.uid, second.uid] == [FIRST_UID, FIRST_UID + 1]
    first.close()
    first.close()
    third = UidLease(tmp_path)
    assert third.uid == FIRST_UID
    second.close()
    third.close()
