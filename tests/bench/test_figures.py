"""The benchmark: percentiles, ratios and verdicts of known figures, and who takes turns."""

import os
import random
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import batches
import durable
import engines.record
import failures
import pytest
from engines import ENGINES
from engines.batches import TransactionBatches
from engines.locked import DictEngine
from failures import flip_byte, how_it_ended, show, verdict_of
from footprint import allocated, copy_folder
from operations import OPERATIONS, Case, run_round
from records import TEXT, WORDS, key_of, make_values
from support.clock import FakeClock
from support.processes import PATIENCE_SECONDS
from support.tasks import meet_an_end
from targets import judge
from workers import Job, Worker, WorkerError, rounds_in_turns

from harness import Plan, ratio, spread, to_json

HOLE: Final = 1 << 17  # bytes


def plan_of(place: Path, *engines: str) -> Plan:
    return Plan(place, {engine: ENGINES[engine] for engine in engines}, "tiny")


# --- figures -------------------------------------------------------------------------------------


def test_percentiles_are_those_of_all_times_and_the_longest_is_exact() -> None:
    pytest.importorskip("percentiles", reason="percentiles take hdrhistogram (extra `bench`)")
    from percentiles import percentiles

    times = random.Random(1).sample(range(1000, 1_001_000), 100_000)
    found = percentiles([times[:7], times[7:]])
    for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("p99.99", 0.9999)):
        exact = sorted(times)[round(share * len(times)) - 1] / 1000
        assert found[name] == pytest.approx(exact, rel=0.002)
    assert found["max"] == max(times) / 1000


def test_percentile_that_no_time_exceeds_is_not_given() -> None:
    pytest.importorskip("percentiles", reason="percentiles take hdrhistogram (extra `bench`)")
    from percentiles import percentiles

    assert list(percentiles([range(999)])) == ["p50", "p90", "p99", "max"]
    assert percentiles([[]]) == {}


def test_ratio_is_of_medians() -> None:
    figures, base = spread([3.0, 30.0, 4.0]), spread([2.0, 1.0])
    assert figures == {"median": 4.0, "min": 3.0, "max": 30.0, "rounds": 3}
    assert ratio(figures, base) == pytest.approx(4 / 1.5)


def test_result_is_kept_with_four_digits_and_what_is_flat_on_a_line() -> None:
    text = to_json({"figures": {"median": 1.23456, "rounds": 3}, "nested": [[1, 2], ["a, b"]]})
    assert '"figures": { "median": 1.235, "rounds": 3 }' in text
    assert "[ 1, 2 ]" in text


@pytest.mark.parametrize("shape", [WORDS, TEXT])
@pytest.mark.parametrize("size", [100, 1000, 16_000])
def test_values_are_of_their_size_and_differ(size: int, shape: str) -> None:
    import orjson

    values = make_values(size, 20, shape)
    assert {len(orjson.dumps(value)) for value in values} == {size}
    assert len({orjson.dumps(value) for value in values}) == 20
    assert values == make_values(size, 20, shape)


def test_round_works_on_every_key_and_on_none_that_is_absent(tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {name: [] for name in ("create", "read", "put", "touch", "delete")}

    class Recorder(DictEngine):
        def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
            super().create(key, value, ttl)
            seen["create"].append(key)

        def read(self, key: str) -> dict[str, Any]:
            value = super().read(key)
            seen["read"].append(key)
            return value

        def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
            super().read(key)  # it is there
            super().put(key, value, ttl)
            seen["put"].append(key)

        def touch(self, key: str, ttl: int | None) -> None:
            super().touch(key, ttl)
            seen["touch"].append(key)

        def delete(self, key: str) -> None:
            super().delete(key)
            seen["delete"].append(key)

    micros = run_round(Recorder, lambda _: None, tmp_path, 0, Case(100, 50))
    keys = {key_of(index) for index in range(50)}
    assert list(micros) == list(OPERATIONS)
    assert Counter(seen["create"]) == Counter(seen["put"] + seen["delete"]) == Counter(keys)
    assert set(seen["read"]) == keys
    assert Counter(seen["put"]) == Counter(seen["touch"])
    assert seen["create"] != seen["read"][:50]
    assert seen["put"] != seen["touch"]


def test_batches_and_single_calls_are_of_keys_that_are_there(tmp_path: Path) -> None:
    calls: Counter[str] = Counter()

    class Recorder(TransactionBatches, DictEngine):
        def transact(self) -> AbstractContextManager[object]:
            return nullcontext()

        def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
            found = super().get_many(keys)
            calls["get_many"] += len(found)
            return found

        def delete_many(self, keys: Iterable[str]) -> int:
            removed = super().delete_many(keys)
            calls["delete_many"] += removed
            return removed

    seconds = (PATIENCE_SECONDS, None)
    grown, micros = batches.run_round(Recorder, lambda _: None, tmp_path, 0, 4000, 3, seconds)
    assert grown == 4000
    assert calls["delete_many"] == 3 * batches.COLD
    assert calls["get_many"] > 3 * 0.9 * batches.COLD  # one may come twice in a batch
    assert set(micros) == {name for pair in batches.PAIRS[:3] for name in pair} | {"orjson.loads"}


def test_batch_is_told_in_times_a_single_call_and_without_what_parsing_takes() -> None:
    singles = {"create": 3.0, "read": 2.0, "read_bytes": 1.0, "delete": 1.0}
    micros = {"put_many": 1.0, "get_many": 1.0, "orjson.loads": 0.75, "delete_many": 0.5}
    row = batches.summarise([(1000, singles | micros), (900, singles | micros)])
    assert row["records"] == 900
    times = {"put_many": 3.0, "get_many": 2.0, "delete_many": 2.0, "get_many, unparsed": 4.0}
    assert row["times"] == times
    targets = judge({"batches": {"engines": {"kvstore": row}}})
    assert [each.measured for each in targets] == [4.0, 2.0, 3.0, 2.0]
    assert all(each.met for each in targets)


def test_targets_are_judged_by_the_worst_ratio_of_medians() -> None:
    def case(shape: str, kvstore: float, tkrzw: float) -> dict[str, Any]:
        figures = {"kvstore": spread([kvstore]), "sqlite3": spread([2.0, 9.0, 1.0])}
        figures |= {"tkrzw": spread([tkrzw]), "kvstore-plain": spread([4.0])}
        what = Case(100, 100_000, shape)
        return {**what._asdict(), "name": what.name, "microseconds": {"put": figures}}

    cases = [case(WORDS, 1.0, 1.5), case(TEXT, 1.6, 1.76), case(TEXT, 1.0, 9.0)]
    (target,) = judge({"operations": {"cases": cases}})
    assert (target.engine, target.what) == ("kvstore", "put beside the fastest on disk, 100 B")
    assert target.where == f"tkrzw, 100,000 records of 100 B, {TEXT}"
    assert target.measured == pytest.approx(1.1)
    assert not target.met
    cases[1] = case(TEXT, 1.0, 1.2)
    assert judge({"operations": {"cases": cases}})[0].met


def test_limit_is_met_by_what_is_within_it() -> None:
    rows = {"kvstore-plain": {"records": 1000, "killed": spread([2.0, 3.5, 9.0])}}
    (target,) = judge({"footprint": {"engines": rows}})
    assert target.what == "recovery of 1,000 records after SIGKILL, for each"
    assert (target.measured, target.bound, target.met) == (3.5, 3, False)
    rows["kvstore-plain"]["killed"] = spread([3.0])
    assert judge({"footprint": {"engines": rows}})[0].met


def test_bytes_that_reach_the_disk_are_counted_by_its_device_or_for_the_process(
    tmp_path: Path,
) -> None:
    before, who = durable.bytes_written(tmp_path)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"data" * 100_000)
        file.flush()
        os.fsync(file.fileno())
    after, still = durable.bytes_written(tmp_path)
    assert who == still
    assert after - before >= 400_000 or who != "the device"


# --- turns ---------------------------------------------------------------------------------------


def test_who_fails_is_out_who_is_late_does_its_least_rounds_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    jobs = [
        Job("dict", "goes on", ("",), rounds=3),
        Job("dict", "raises", ("raise",), rounds=3),
        Job("dict", "dies", ("die",), rounds=3),
        Job("dict", "is late", ("",), rounds=3, least=2, seconds=0),
    ]
    results, reasons = rounds_in_turns(plan_of(tmp_path, "dict"), meet_an_end, jobs)
    assert results == {"goes on": [0, 1, 2], "raises": [0], "dies": [0], "is late": [0, 1]}
    assert reasons == {"raises": "luck", "dies": "died, exit code 7"}
    assert list(tmp_path.iterdir()) == []


def test_task_without_a_sign_of_life_is_given_up(tmp_path: Path) -> None:
    with (
        Worker(plan_of(tmp_path, "dict"), "dict", patience=0) as worker,
        pytest.raises(WorkerError, match="no sign of life in 0 s"),
    ):
        worker.call(meet_an_end, tmp_path, 0, "")
    assert worker.is_dead


# --- failures ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file in a folder, an empty one, and one that is nearly all hole."""
    folder = tmp_path / "store"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "plain").write_bytes(bytes(range(256)) * 32)
    (folder / "empty").touch()
    with (folder / "sparse").open("wb") as file:
        file.seek(HOLE)
        file.write(b"data")
        file.truncate(2 * HOLE)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_copy_is_the_same_and_keeps_holes(folder: Path, tmp_path: Path) -> None:
    copy_folder(folder, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(folder)
    if allocated(folder) < HOLE:  # else holes are not to be had here
        assert allocated(tmp_path / "copy") < HOLE


def test_flip_changes_one_byte_that_was_not_zero(folder: Path) -> None:
    rng = random.Random(1)
    for _ in range(20):
        before = contents(folder)
        flip_byte(folder, rng)
        ((old, _),) = (
            pair
            for name, content in contents(folder).items()
            for pair in zip(before[name], content, strict=True)
            if pair[0] != pair[1]
        )
        assert old != 0


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ({"right": 10}, "no harm"),
        ({"right": 9, "Error": 1}, "errors for some keys"),
        ({"right": 10, "closing: Error": 1}, "errors for some keys"),
        ({"not opened: Error": 1}, "error on opening"),
        ({"right": 9, "absent": 1}, "keys lost without a word"),
        ({"right": 7, "Error": 1, "absent": 1, "wrong": 1}, "wrong values"),
        ({"dies: SIGBUS": 1}, "process dies"),
        ({"no sign of life in 20 s": 1}, "hangs"),
    ],
)
def test_worst_of_what_came_of_a_trial_is_its_verdict(
    outcomes: dict[str, int], verdict: str
) -> None:
    assert verdict_of(outcomes) == verdict


def test_end_of_a_process_is_told_by_its_signal() -> None:
    assert how_it_ended(WorkerError("died, exit code -7", -7)) == "dies: SIGBUS"
    assert how_it_ended(WorkerError("died, exit code 1", 1)) == "dies"
    assert how_it_ended(WorkerError("no sign of life in 9 s")) == "no sign of life in 9 s"


def test_outcomes_are_shown_in_a_word_or_one_by_one() -> None:
    assert show({"right": 5}) == show({}) == "all right"
    assert show({"right": 1200, "wrong": 3}) == "1,200 right, 3 wrong"


def test_full_disk_that_cannot_be_mounted_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(failures, "_flip_bytes", lambda *_: {"no harm": 2, "wrong values": 1})
    result = failures.measure(plan_of(tmp_path, "sqlite3"))
    assert "mount" in result["failures"]["the full disk"]
    shown = failures.format_result(result)
    assert "mount" in shown
    for cell in ("wrong values 1×, no harm 2×", "not tried", "no `len`, or no time to live"):
        assert f"| {cell} |" in " ".join(shown.split())


def test_full_disk_is_told_by_what_create_raises_and_what_goes_wrong_then() -> None:
    fine = {"records": 1200, "fill": {"OSError": 1}, "read": {"right": 1200}, "close": {"right": 1}}
    assert failures.show_phases(fine) == "OSError at 1,200; then all right"
    bad = {**fine, "again": {"right": 1100, "absent": 100}}
    assert failures.show_phases(bad) == "OSError at 1,200; again: 1,100 right, 100 absent"


def test_engine_is_asked_whether_it_counts_what_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(DictEngine):
        def __len__(self) -> int:
            return sum(not self._expired(each) for each in self._records.values())

    clock = FakeClock()
    monkeypatch.setattr(engines.record, "time_ns", clock)
    monkeypatch.setattr(failures, "sleep", clock.advance)
    opened = {"not counted": Counting, "no `len`, or no time to live": DictEngine}
    for number, (told, engine) in enumerate(opened.items()):
        folder = tmp_path / str(number)
        assert failures.count_expired(engine, lambda _: None, folder) == told
