"""How the benchmark of operations shares out its time, and what it counts."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import million
import operations
import pytest
from engines.locked import DictEngine
from million import Turns
from operations import OPERATIONS, rows_of, run_cycles, time_cycle
from workers import Plan, ratios

from harness import Progress, make_keys, make_values


class Recorder(DictEngine):
    """Notes the keys of each operation."""

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        super().__init__(folder, durable=durable)
        self.seen: dict[str, list[str]] = {"create": [], "read": [], "delete": []}

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        self.seen["create"].append(key)
        super().create(key, value, ttl)

    def read(self, key: str) -> dict[str, Any]:
        self.seen["read"].append(key)
        return super().read(key)

    def delete(self, key: str) -> None:
        self.seen["delete"].append(key)
        super().delete(key)


def say_nothing(text: str, /) -> None: ...


def test_cycle_creates_all_and_does_the_rest_as_often_as_there_are_absent_keys(
    tmp_path: Path,
) -> None:
    keys, absent = make_keys(50), make_keys(10, first=50)
    store = Recorder(tmp_path)
    micros = time_cycle(store, keys, absent, make_values(100, 7), 60, random.Random(1))
    assert micros.keys() == set(OPERATIONS)
    assert store.seen["create"][:50] == keys
    read, deleted = store.seen["read"], store.seen["delete"]
    assert set(read[:10]) <= set(keys)
    assert read[10:20] == absent
    assert len(set(deleted[:10])) == 10
    assert set(deleted[:10]) <= set(keys)


def test_cycle_ends_where_its_creates_take_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "CHUNK", 10)
    monkeypatch.setattr(operations, "perf_counter", iter(range(100)).__next__)
    keys = make_keys(50)
    with pytest.raises(TimeoutError, match=r"^30 of 50 records"):
        time_cycle(
            DictEngine(tmp_path), keys, keys, make_values(100, 7), 60, random.Random(1), patience=3
        )


def test_round_that_there_is_no_time_for_is_nothing_and_the_sizes_stay_in_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock() -> Iterator[float]:
        """Each second reading, at the end of a round, is 5 seconds after the first."""
        time = 0.0
        while True:
            yield time
            time += 5.0
            yield time

    monkeypatch.setattr(operations, "run_cycle", lambda *_: dict.fromkeys(OPERATIONS, 1.0))
    monkeypatch.setattr(operations, "perf_counter", clock().__next__)
    monkeypatch.setattr(operations, "ALLOWANCE", 12.0)
    sizes = {100: 10, 200: 10}
    done = [bool(each) for each in run_cycles(DictEngine, say_nothing, tmp_path, sizes, 4, least=1)]
    assert done == [True, True, False, False] * 2
    done = [bool(each) for each in run_cycles(DictEngine, say_nothing, tmp_path, sizes, 4, least=3)]
    assert done == [True, True, True, False] * 2


def test_engine_of_fewer_rounds_than_asked_for_has_no_row_entry() -> None:
    cycle = dict.fromkeys(OPERATIONS, 2.0)
    row, *_ = rows_of({"kvstore": [cycle] * 5, "lmdb": [cycle] * 3, "dict": [cycle]}, 100, 3)
    assert list(row["microseconds"]) == ["kvstore", "lmdb"]


def test_ratio_is_of_the_rounds_that_both_did() -> None:
    figures = {"kvstore": [1.0, 2.0, 9.0, 9.0, 9.0], "lmdb": [3.0, 6.0]}
    assert ratios(figures) == {"lmdb": 3.0}


def test_turns_go_on_for_those_whose_next_round_fits_into_their_time() -> None:
    turns = Turns(["fast", "slow", "fails"], allowance=10)
    for engine, seconds in (("fast", 3), ("slow", 6)):
        turns.note(engine, seconds)
    turns.give_up("fails")
    assert turns.left == ["fast"]
    turns.note("fast", 3)
    assert turns.left == ["fast"]
    turns.note("fast", 3)
    assert turns.left == []


def test_engine_that_takes_too_long_for_a_million_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(million, "PATIENCE", -1.0)
    plan = Plan(tmp_path, ["dict"], quick=True, rounds=1, progress=Progress(), tiny=True)
    result = million.measure(plan)
    assert result["failures"] == {
        "dict, 100 B": "TimeoutError: 0 of 1,000 records when its time was used up"
    }
