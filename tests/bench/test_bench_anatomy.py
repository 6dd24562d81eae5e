"""The pieces of the benchmark that takes an operation apart."""

import random
from itertools import cycle, islice
from threading import Lock
from typing import Any

import loops
import outside
import pytest
from loops import make_loop, make_undoing_loop, time_loops
from outside import DIFFERENCES, HOT, LOOKS, format_outside, summarise

from harness import key_of

PAIRS = [("a", 1), ("b", 2)]


class Clock:
    """Goes on by what it is told, and a nanosecond with each reading."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1
        return self.now

    def wait(self, nanoseconds: int) -> None:
        self.now += nanoseconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(loops, "perf_counter_ns", fake)
    return fake


def test_loop_times_its_statements_for_each_pair(clock: Clock) -> None:
    seen: list[Any] = []
    names = {"seen": seen, "wait": clock.wait}
    loop = make_loop(["if key:", "    seen.append((key, value))\n    wait(10)"], names)
    assert loop(PAIRS) == 21
    assert seen == PAIRS


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("statements", [[], ["with lock:"]])
def test_loop_of_nothing_does_nothing(statements: list[str]) -> None:
    assert make_loop(statements, {"lock": Lock()})(PAIRS) == 1


def test_what_is_undone_is_not_timed(clock: Clock) -> None:
    loop = make_undoing_loop("wait(10)", "wait(1000)", {"wait": clock.wait})
    assert loop(PAIRS) == 22


def test_loops_take_turns_each_with_pairs_of_its_own(clock: Clock) -> None:
    seen: dict[str, list[Any]] = {"short": [], "long": []}
    waits = {"short": 9, "long": 99}

    def loop_of(name: str) -> loops.Loop:
        names = {"note": seen[name].append, "wait": clock.wait, "nanoseconds": waits[name]}
        return make_loop(["note(key)\nwait(nanoseconds)"], names)

    samples = {name: cycle([[(f"{name} {turn}", None)] for turn in range(3)]) for name in seen}
    taken = time_loops([(loop_of(name), samples[name]) for name in seen], 3, random.Random(1))
    assert taken == [10, 100]
    assert seen == {name: [f"{name} {turn}" for turn in range(3)] for name in seen}


def test_statements_know_their_keys_and_differences_their_statements() -> None:
    names = [look.what for look in LOOKS]
    assert len(set(names)) == len(names)
    cold = outside._cold_samples(100, 1000, [{}])
    hot = outside._hot_samples(100, [{}] * 8)
    assert {look.keys for look in LOOKS} <= cold.keys() == hot.keys()
    assert {name for each in DIFFERENCES for name in (each.longer, each.shorter)} <= set(names)


def test_cold_keys_are_deleted_after_they_were_created_and_once() -> None:
    samples = outside._cold_samples(10, 600, [{}])
    there = {key_of(index) for index in range(10, 610)}
    for _ in range(10):
        created = [key for key, _ in next(samples["new"])]
        assert there.isdisjoint(created)
        there.update(map(str, created))
        next(samples["new to other"])
        for key, _ in next(samples["old"]):
            there.remove(str(key))
    assert len(there) == 600
    present = {key for pairs in islice(samples["present"], 3) for key, _ in pairs}
    assert present == {key_of(index) for index in range(10)}


def test_differences_are_those_of_the_same_round() -> None:
    figures = {look.what: {HOT: [10.0, 20.0, 30.0]} for look in LOOKS}
    figures[outside.READ] = {HOT: [11.0, 25.0, 39.0]}
    result = summarise(figures)
    assert result["differences"]["parse: `read` less `read_bytes`"][HOT] == {
        "median": 5,
        "min": 1,
        "max": 9,
    }
    statements, differences = format_outside("kvstore", result)
    assert "| **`read`**" in statements
    assert "5 (1–9)" in differences
