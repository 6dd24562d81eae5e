"""The pieces of the benchmark of loads: what is chosen, what is counted, and who takes turns."""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any

import growth
import latency
import pytest
from engines import OpenEngine
from engines.locked import DictEngine
from growth import OPERATIONS, SAMPLED, GrowingStore, own_cost, run_growth, sample_both
from histogram import SHARES, Histogram
from latency import LONGEST, Watch, run_latency
from threads import LOADS, make_orders, run_together
from workers import Plan, Say, Worker, WorkerError, failed_rows, failures, steps_in_turns
from zipf import Zipf

from harness import Progress, key_of, make_values


class FakeClock:
    """Stands still until told how far to go."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns

    def seconds(self) -> float:
        return self.ns / 1e9


class SlowStore(DictEngine):
    """A dict whose creates and deletes take as long as a function of their count says."""

    def __init__(self, folder: Path, clock: FakeClock, create_ns: Callable[[int], int]) -> None:
        super().__init__(folder)
        self._clock = clock
        self._create_ns = create_ns
        self.size = 0

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        super().create(key, value, ttl)
        self._clock.ns += self._create_ns(self.size)
        self.size += 1

    def read(self, key: str) -> dict[str, Any]:
        self._clock.ns += 500
        return super().read(key)

    def delete(self, key: str) -> None:
        super().delete(key)
        self._clock.ns += 2000
        self.size -= 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(latency, "perf_counter_ns", fake)
    monkeypatch.setattr(latency, "perf_counter", fake.seconds)
    monkeypatch.setattr(growth, "perf_counter", fake.seconds)
    return fake


def say_nothing(text: str, /) -> None: ...


# --- the Zipfian choice --------------------------------------------------------------------------


def test_zipf_ranks_are_as_likely_as_theory_has_it() -> None:
    chosen = Zipf(1000, random.Random(1))
    harmonic = sum(rank**-0.99 for rank in range(1, 1001))
    for rank in range(1000):
        assert chosen.probability(rank) == pytest.approx((rank + 1) ** -0.99 / harmonic)


def test_zipf_chooses_each_record_as_often_as_its_rank_has_it() -> None:
    """By a chi-squared test: 199 degrees of freedom, 275 is exceeded once in 4,000 tries."""
    draws = 200_000
    chosen = Zipf(200, random.Random(2))
    seen = Counter(chosen.choose(draws))
    assert seen.keys() <= set(range(200))
    expected = [chosen.probability(rank) * draws for rank in range(200)]
    counted = (seen[record] for record in chosen.by_rank)
    distance = sum((a - b) ** 2 / b for a, b in zip(counted, expected, strict=True))
    assert 130 < distance < 275


def test_zipf_scatters_the_ranks_over_all_records() -> None:
    by_rank = Zipf(1000, random.Random(3)).by_rank
    assert sorted(by_rank) == list(range(1000))
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(by_rank))
    assert neighbours < 10


def test_zipf_chooses_the_same_from_the_same_seed() -> None:
    first, again = (Zipf(500, random.Random(4)).choose(100) for _ in range(2))
    assert first == again


# --- the histogram -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [*SHARES.values(), 0.001, 1.0])
def test_percentile_is_within_a_percent_of_the_exact_one(share: float) -> None:
    rng = random.Random(5)
    numbers = [int(rng.lognormvariate(10, 2)) for _ in range(30_000)]
    histogram = Histogram()
    for start in range(0, len(numbers), 7000):
        histogram.add(numbers[start : start + 7000])
    exact = sorted(numbers)[ceil(share * len(numbers)) - 1]
    assert exact <= histogram.percentile(share) <= exact * 1.01
    assert histogram.total == len(numbers)


def test_numbers_below_256_are_counted_exactly() -> None:
    histogram = Histogram()
    histogram.add(range(256))
    assert [histogram.percentile((n + 1) / 256) for n in range(256)] == list(range(256))


def test_largest_number_is_exact() -> None:
    histogram = Histogram()
    histogram.add([3, 1_234_567_891, 5])
    histogram.add([])
    assert histogram.largest == histogram.percentile(1) == 1_234_567_891
    assert histogram.summary()["max"] == 1_234_567.891


def test_histogram_without_numbers_has_percentiles_of_nothing() -> None:
    assert set(Histogram().summary().values()) == {0}


def test_histogram_comes_back_from_json() -> None:
    rng = random.Random(6)
    histogram = Histogram()
    histogram.add(rng.randrange(10 ** rng.randrange(1, 12)) for _ in range(2000))
    again = Histogram.from_json(histogram.to_json())
    assert again.to_json() == histogram.to_json()
    assert again.summary() == histogram.summary()
    assert again.total == 2000


# --- growth --------------------------------------------------------------------------------------


def test_own_cost_is_not_moved_by_a_machine_that_slows_down_between_rounds() -> None:
    small = {operation: [10.0, 11.0, 30.0, 32.0, 90.0] for operation in OPERATIONS}
    large = {operation: [1.5 * each for each in rounds] for operation, rounds in small.items()}
    assert own_cost(large, small) == pytest.approx(dict.fromkeys(OPERATIONS, 1.5))


def test_own_cost_of_sampled_operations_forgives_one_bad_round_and_that_of_growth_none() -> None:
    small = {operation: [2.0, 2.0, 2.0] for operation in OPERATIONS}
    large = {operation: [3.0, 30.0, 3.0] for operation in OPERATIONS}
    assert own_cost(large, small) == {**dict.fromkeys(SAMPLED, 1.5), "grow": 6.0}


def test_own_cost_of_a_size_without_a_second_store_is_not_told() -> None:
    assert own_cost({operation: [1.0] for operation in OPERATIONS}, {"grow": []}) == {}


def open_slow(clock: FakeClock) -> OpenEngine:
    """Creates take a microsecond, and one more for each hundred records."""

    def open_engine(directory: Path, *, durable: bool = False) -> SlowStore:
        return SlowStore(directory, clock, lambda size: 1000 * (1 + size // 100))

    return open_engine


def test_sampling_a_store_times_each_operation_and_leaves_its_size(
    clock: FakeClock, tmp_path: Path
) -> None:
    store = GrowingStore(open_slow(clock), tmp_path / "store", random.Random(7))
    assert store.grow(200, seconds_left=1) == pytest.approx(1.5)
    for _ in range(5):
        figures = store.sample(100)
        assert figures == pytest.approx({"read": 0.5, "miss": 0.5, "create": 3, "delete": 2})
        assert len(store) == 200
    assert store.sample(200)["read"] == pytest.approx(0.5)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_growing_ends_when_the_time_is_used_up(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "CHUNK", 10)
    store = GrowingStore(open_slow(clock), tmp_path / "store", random.Random(8))
    with pytest.raises(TimeoutError, match=r"^60 records"):
        store.grow(1000, seconds_left=55e-6)


def test_growth_tells_each_size_and_measures_a_second_store_where_there_is_one(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "PART", 150)
    steps = run_growth(
        open_slow(clock), say_nothing, tmp_path, (100, 300), 100, sample=20, rounds=3, allowance=60
    )
    small, on_the_way, large = steps
    assert small["small"] == {"grow": []}
    assert small["large"]["grow"] == pytest.approx([1.0])
    assert on_the_way == {}
    assert large["large"]["grow"] == pytest.approx([(100 * 2 + 50 * 3) / 150, 3.0])
    assert large["small"]["grow"] == pytest.approx([1.0, 1.0])
    assert own_cost(large["large"], large["small"])["create"] == pytest.approx(4 / 2)
    assert list(tmp_path.iterdir()) == []


def test_growth_of_an_engine_whose_time_is_used_up_says_how_far_it_came(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "CHUNK", 50)
    steps = run_growth(
        open_slow(clock), say_nothing, tmp_path, (100, 10_000), 100, 20, 1, allowance=11e-3
    )
    reached, ended = steps
    assert "large" in reached
    assert "records when its time was used up" in ended["stopped"]
    assert list(tmp_path.iterdir()) == []


def test_growth_ends_before_a_size_that_the_time_left_would_not_do_for(
    clock: FakeClock, tmp_path: Path
) -> None:
    steps = run_growth(
        open_slow(clock), say_nothing, tmp_path, (100, 10_000), 100, 20, 1, allowance=1e-3
    )
    *_, ended = steps
    assert ended == {"stopped": "100 records, for 10,000 its time would not do"}


def test_two_stores_are_sampled_alternately_each_first_as_often(
    clock: FakeClock, tmp_path: Path
) -> None:
    turns: list[str] = []

    class Told(GrowingStore):
        def sample(self, count: int) -> dict[str, float]:
            turns.append(self._folder.name)
            return super().sample(count)

    large, small = (
        Told(open_slow(clock), tmp_path / name, random.Random(9)) for name in ("large", "small")
    )
    large.grow(50, seconds_left=1)
    small.grow(50, seconds_left=1)
    sample_both(large, small, sample=10, rounds=4)
    assert turns == ["large", "small", "small", "large"] * 2


# --- latency -------------------------------------------------------------------------------------


def test_watch_tells_percentiles_and_where_the_longest_creates_were(
    clock: FakeClock, tmp_path: Path
) -> None:
    pauses = {1234: 9_000_000, 77: 5_000_000}
    watch = Watch(SlowStore(tmp_path, clock, lambda size: pauses.get(size, 1000)))
    for _ in range(2):
        watch.go_on(1000)
    seen = watch.result()
    assert seen["records"] == 2000
    assert seen["longest_creates"][:2] == [
        {"record": 1234, "microseconds": 9000.0},
        {"record": 77, "microseconds": 5000.0},
    ]
    assert len(seen["longest_creates"]) == LONGEST
    assert seen["longest_create_of_each_row"] == [5000.0, 9000.0]
    assert seen["microseconds"]["create"]["max"] == 9000.0
    assert seen["microseconds"]["create"]["p99.9"] == pytest.approx(1, rel=0.01)
    assert seen["microseconds"]["create"]["p99.99"] == 9000.0
    assert seen["microseconds"]["read"]["p99.99"] == pytest.approx(0.5, rel=0.01)
    assert Histogram.from_json(seen["histograms"]["create"]).total == 2000


def test_latency_ends_at_its_number_of_records_or_with_its_time(
    clock: FakeClock, tmp_path: Path
) -> None:
    def records(allowance: float) -> list[int]:
        steps = run_latency(open_slow(clock), say_nothing, tmp_path, 70_000, allowance)
        return [seen["records"] for seen in steps]

    assert records(allowance=1e9) == [50_000, 70_000]
    # 5,000 creates and 1,000 reads take 0.1325 s, the next 5,000 already 0.38 s.
    assert records(allowance=0.2) == [10_000]


# --- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", LOADS.values())
def test_orders_read_what_is_there_and_create_what_is_not(reads: float) -> None:
    orders = make_orders(4000, 100, reads, make_values(100, 10), random.Random(10))
    there = {key_of(index) for index in range(100)}
    assert all((value is None) == (key in there) for key, value in orders)
    created = [key for key, value in orders if value is not None]
    assert len(set(created)) == len(created)
    assert len(created) == pytest.approx(4000 * (1 - reads), abs=60)


def test_threads_work_together_each_on_its_part() -> None:
    _, results = run_together(sum, [[1, 2], [3], []])
    assert results == [3, 3, 0]


def test_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        run_together(lambda part: 1 // part, [1, 0, 2])


# --- turns of processes --------------------------------------------------------------------------


def count_in_steps(
    open_engine: OpenEngine, say: Say, folder: Path, trouble: dict[str, str]
) -> Iterator[int]:
    """Task: yield 0, 1 and 2; at 1, come to the end that is meant for the engine."""
    assert list(folder.iterdir()) == []
    (folder / "file").touch()
    for number in range(3):
        if number == 1 and trouble.get(folder.name) == "raise":
            raise RuntimeError("out of\nluck")
        if number == 1 and trouble.get(folder.name) == "die":
            os._exit(7)
        say(f"at {number}")
        yield number


def test_engine_that_fails_is_out_and_the_others_go_on(tmp_path: Path) -> None:
    names = ["kvstore", "dict", "sqlite3"]
    plan = Plan(tmp_path, names, quick=True, rounds=None, progress=Progress())
    courses = steps_in_turns(plan, count_in_steps, {"kvstore": "raise", "sqlite3": "die"})
    assert list(courses) == names
    assert {engine: course.items for engine, course in courses.items()} == {
        "kvstore": [0],
        "dict": [0, 1, 2],
        "sqlite3": [0],
    }
    reasons = failures(courses)
    assert reasons == {"kvstore": "luck", "sqlite3": "died, exit code 7"}
    assert failed_rows(reasons, 3)[0] == ["kvstore", "luck", ""]
    assert list(tmp_path.iterdir()) == []


def test_worker_is_free_for_another_task_after_steps_that_were_ended_early(tmp_path: Path) -> None:
    with Worker("dict") as worker:
        for _ in range(2):
            folder = tmp_path / "new"
            folder.mkdir()
            assert list(islice(worker.steps(count_in_steps, folder, {}), 2)) == [0, 1]
            (folder / "file").unlink()
            folder.rmdir()


def test_steps_of_a_dead_worker_say_how_it_died(tmp_path: Path) -> None:
    with Worker("dict") as worker:
        steps = worker.steps(count_in_steps, tmp_path, {})
        assert next(steps) == 0
        worker.kill()
        with pytest.raises(WorkerError, match="exit code -9") as error:
            next(steps)
        assert error.value.exit_code == -9
