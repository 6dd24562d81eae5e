"""The pieces of the benchmark of harm, space and real data that no run of it would show wrong."""

import os
import random
from pathlib import Path

import pytest
from cities import absent_names
from files import allocated, copy_folder
from flipped import flip_byte, verdict_of
from full_disk import measure_full_disks
from outcomes import ABSENT, RIGHT, WRONG, Outcomes, how_it_ended, show
from workers import Plan, WorkerError

from harness import Progress

HOLE = 1 << 17  # bytes


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
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("flush", [False, True])
def test_copy_is_the_same_and_keeps_holes(folder: Path, tmp_path: Path, flush: bool) -> None:
    copy = tmp_path / "copy"
    copy_folder(folder, copy, flush=flush)
    assert contents(copy) == contents(folder)
    if allocated(folder) < HOLE:  # else holes are not to be had here
        assert allocated(copy) < HOLE


def test_flip_changes_one_byte_that_was_not_zero(folder: Path) -> None:
    before = contents(folder)
    rng = random.Random(1)
    for _ in range(20):
        flip_byte(folder, rng)
        after = contents(folder)
        changed = [
            (old, new)
            for name in before
            for old, new in zip(before[name], after[name], strict=True)
            if old != new
        ]
        assert len(changed) == 1
        assert changed[0][0] != 0
        before = after


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ({RIGHT: 10}, "all right"),
        ({RIGHT: 9, "Error": 1}, "errors"),
        ({RIGHT: 10, "closing: Error": 1}, "errors"),
        ({"not opened: Error": 1}, "not opened"),
        ({RIGHT: 9, ABSENT: 1}, "absent"),
        ({RIGHT: 7, "Error": 1, ABSENT: 1, WRONG: 1}, "wrong"),
        ({"dies: SIGBUS": 1}, "dies"),
        ({"no sign of life in 20 s": 1}, "hangs"),
    ],
)
def test_worst_of_what_came_of_a_trial_is_its_verdict(outcomes: Outcomes, verdict: str) -> None:
    assert verdict_of(outcomes) == verdict


def test_end_of_a_process_is_told_by_its_signal() -> None:
    assert how_it_ended(WorkerError("lmdb", "died, exit code -7", -7)) == "dies: SIGBUS"
    assert how_it_ended(WorkerError("lmdb", "died, exit code 1", 1)) == "dies"
    assert how_it_ended(WorkerError("lmdb", "no sign of life in 9 s")) == "no sign of life in 9 s"


def test_outcomes_are_shown_in_a_word_or_one_by_one() -> None:
    assert show({RIGHT: 5}, "all") == "all"
    assert show({}, "all") == "all"
    assert show({RIGHT: 1200, WRONG: 3}, "all") == "1,200 right, 3 wrong"


def test_full_disk_that_cannot_be_mounted_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    plan = Plan(tmp_path, ["kvstore"], True, None, Progress())
    assert "mount" in measure_full_disks(plan, plan.engines)["skipped"]


def test_absent_names_are_as_many_and_are_no_cities() -> None:
    cities = {str(number): {"name": "x"} for number in range(3, 3000, 3)}
    names = absent_names(cities)
    assert len(set(names)) == len(names) == len(cities)
    assert not set(names) & set(cities)
