"""How much of a result its bounds let through."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agentray.errors import StorageError
from agentray.storage.sql_base import Column
from agentray.storage.sql_rows import Rows


def columns(count: int, name: str = "c") -> list[Column]:
    return [Column(f"{name}{number}", "text") for number in range(count)]


def size_of(names: list[Column], rows: Rows) -> int:
    shown = {
        "columns": names,
        "rows": rows.encoded,
        "row_count": len(rows.encoded),
        "truncated": rows.truncated,
    }
    return len(msgspec.json.encode(shown))


@pytest.mark.parametrize(
    "value",
    [
        "x" * 9_000,
        "\x01" * 9_000,
        '"' * 9_000,
        "é" * 9_000,
        "\x01" * 100 + "x" * 9_000,
        b"a" * 9_000,
        {"key": "\x01" * 9_000},
    ],
    ids=["plain", "control", "quotes", "two bytes", "mixed", "bytes", "json"],
)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_first_row_is_cut_to_the_bytes_that_it_has_as_json(value: Any, count: int) -> None:
    names = columns(count)
    rows = Rows(names, 10, 4_000)
    assert not rows.add([value] * count)
    assert rows.truncated
    assert len(rows.encoded) == 1
    assert size_of(names, rows) <= 4_000
    # Of what there is room for, not much is left unused.
    assert size_of(names, rows) > 4_000 - count * 30 - 100
    assert msgspec.json.decode(rows.encoded[0])[0].endswith("…[cut]")


def test_a_value_that_fits_is_left_whole_beside_one_that_does_not() -> None:
    rows = Rows(columns(2), 10, 1_000)
    rows.add(["x" * 5_000, "next"])
    assert msgspec.json.decode(rows.encoded[0])[1] == "next"


def test_where_not_even_the_beginnings_have_room_they_are_left_out() -> None:
    rows = Rows(columns(40), 10, 1_650)
    rows.add(["x" * 100] * 40)
    assert size_of(columns(40), rows) <= 1_650
    rows = Rows(columns(30), 10, 1_100)
    assert not rows.add(["x" * 100] * 30)
    assert (rows.encoded, rows.truncated) == ([], True)


def test_rows_and_the_names_of_columns_count_together() -> None:
    names = columns(1, "n" * 500)
    rows = Rows(names, 1_000, 1_000)
    while rows.add(["x" * 20]):
        pass
    assert rows.truncated
    assert 900 < size_of(names, rows) <= 1_000
    with pytest.raises(StorageError, match="columns' names") as caught:
        Rows(names, 10, 400)
    assert caught.value.fields["reason"] == "output"


def test_the_next_batch_is_what_fits_by_the_rows_so_far() -> None:
    rows = Rows(columns(1), 1_000, 2_000)
    assert rows.next_batch(100) == 1
    rows.add(["x" * 96])
    assert 15 < rows.next_batch(100) <= 20
