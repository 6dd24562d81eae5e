"""Backups that are refused writes, flushes and other calls, or interrupted, or cut off with power.

Whatever is done to one, the store is untouched to the byte, and what is at the path is either what
was there before or the whole copy. A backup that failed leaves no other file behind.
"""

import itertools
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest
from support.consistency import assert_consistent
from support.images import PAGE, SECTOR
from support.workload import difference, make_value

import kvstore.backup
import kvstore.file.platform
from kvstore import KVStore, KVStoreError

from . import power
from .laboratory import Experiment
from .refusals import NUMBERS, SYSTEM_CALLS, Refusals, State, through

_CALLS: Final = (
    *SYSTEM_CALLS,
    *((os, name) for name in ("pwrite", "link", "replace", "rename") if hasattr(os, name)),
)
_SOURCES: Final = str(Path(kvstore.__file__).parent)
_OLDER: Final = b"an older backup"
_IMAGES: Final = 20  # a trial, of power lost


class _Trial:
    """A store with some keys, and the path of its backup, where another file may be already."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        through(rng.choice(("map", "pwrite")))
        self.path = folder / "store.kvs"
        self.out = folder / "backup.kvs"
        self.live: State = {}
        for number in range(rng.randrange(1, 60)):
            key = f"{'é' * 16 if number % 5 == 0 else ''}{number}"
            self.live[key] = make_value(key, number, rng.choice((0, 50, 700, 15_000)))
        with KVStore(self.path) as store:
            for key, value in self.live.items():
                store.create(key, value, ttl=10**6 if value["mark"] % 3 == 0 else None)

    @property
    def unnamed(self) -> Path:
        """Where the backup is before it has its name."""
        return self.out.with_name(f".{self.out.name}.backup-1")

    def prepare(self, overwrite: bool) -> None:
        """Have an older file at the path of the backup, or none."""
        self.out.unlink(missing_ok=True)
        if overwrite:
            self.out.write_bytes(_OLDER)

    def check(self, overwrite: bool, *, has_failed: bool) -> None:
        """Raise AssertionError where anything else is there than may be."""
        is_older = overwrite and self.out.read_bytes() == _OLDER
        if self.out.exists() and not is_older:
            assert_consistent(self.out)
            with KVStore(self.out) as copy:
                assert dict(copy.items()) == self.live, difference(dict(copy.items()), self.live)
        else:
            assert has_failed, "the backup said that it was made"
        left = {each.name for each in self.path.parent.iterdir()}
        assert left <= {self.path.name, self.out.name}, left


def refuse_calls(folder: Path, rng: random.Random) -> int:
    """Refuse each write, flush and other call to the system that a backup makes."""
    trial = _Trial(folder, rng)
    overwrite = rng.random() < 0.5
    with KVStore(trial.path) as store:
        before = trial.path.read_bytes()
        for fail_at in itertools.count(1):
            number = rng.choice(NUMBERS)
            refusals = Refusals(fail_at, number, lasting=fail_at % 2 == 0, rng=rng)
            trial.prepare(overwrite)
            failed: Exception | None = None
            try:
                with refusals.of(*_CALLS):
                    store.backup(trial.out, overwrite=overwrite)
            except (KVStoreError, OSError) as error:
                failed = error
            try:
                assert "backup-" not in str(failed), "names a file that nobody knows"
                trial.check(overwrite, has_failed=failed is not None)
                assert trial.path.read_bytes() == before, "the store was changed"
            except BaseException as error:
                error.add_note(f"call {fail_at} refused with {os.strerror(number)}")
                raise
            if not refusals.reached:
                return fail_at - 1
    raise AssertionError


class _Interrupted(BaseException):
    """As what the handler of a signal raises."""


class _Interrupt:
    """Raises at a step of the package's code: a line, a call or a return."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.steps = 0

    def trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        """Trace the package's own code only."""
        if not frame.f_code.co_filename.startswith(_SOURCES):
            return None
        self.steps += 1
        if self.steps == self._at:
            raise _Interrupted
        return self.trace


def interrupt(folder: Path, rng: random.Random) -> int:
    """Interrupt a backup at steps chosen at random, as a signal's handler does that raises."""
    trial = _Trial(folder, rng)
    overwrite = rng.random() < 0.5
    tried = 0
    with KVStore(trial.path) as store:
        before = trial.path.read_bytes()
        whole = _Interrupt(0)
        for _ in range(2):  # the first one loads modules
            trial.prepare(overwrite)
            whole.steps = 0
            _traced(store, trial.out, overwrite, whole)
        for at in sorted(rng.sample(range(1, whole.steps), min(60, whole.steps - 1))):
            trial.prepare(overwrite)
            stopped = True
            with suppress(_Interrupted):
                _traced(store, trial.out, overwrite, _Interrupt(at))
                stopped = False
            # What was interrupted as it removed its file has left that to the next one.
            store.backup(folder / "next.kvs")
            (folder / "next.kvs").unlink()
            _remove_leftover(store, trial)
            trial.check(overwrite, has_failed=stopped)
            assert trial.path.read_bytes() == before, "the store was changed"
            assert dict(store.items()) == trial.live
            tried += 1
    return tried


def _traced(store: KVStore, out: Path, overwrite: bool, interrupt: _Interrupt) -> None:
    earlier = sys.gettrace()
    sys.settrace(interrupt.trace)
    try:
        store.backup(out, overwrite=overwrite)
    finally:
        sys.settrace(earlier)


def _remove_leftover(store: KVStore, trial: _Trial) -> None:
    """Have the next backup to the same path remove what is left, and put back what was there."""
    at_path = trial.out.read_bytes() if trial.out.exists() else None
    store.backup(trial.out, overwrite=True)
    trial.out.unlink()
    if at_path is not None:
        trial.out.write_bytes(at_path)


def lose_power(unit: int, folder: Path, rng: random.Random) -> int:
    """Lose power, or kill the process, after any write of a backup, and as it gets its name.

    Until that is on the disk, what was there before may have the name; the backup, no part of which
    may be missing, has it from then on. What is left under another name, the next one removes.
    """
    trial = _Trial(folder, rng)
    overwrite = rng.random() < 0.5
    trial.prepare(overwrite)
    disk = power.Disk(b"", {})
    steps: list[tuple[str, tuple[int, int]]] = []

    def noted(what: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> None:
            real(*arguments)
            steps.append((what, (len(disk.epochs) - 1, len(disk.epochs[-1].changes))))

        return call

    with KVStore(trial.path) as store:
        with (
            power.recording(disk, power.Clock(), in_place=rng.random() < 0.7),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(kvstore.backup, "MAX_FILE_SIZE", power.MAX_BYTES)
            patch.setattr(os, "link", noted("named", os.link))
            patch.setattr(os, "replace", noted("named", os.replace))
            system = kvstore.file.platform.system
            patch.setattr(system, "flush_folder", noted("flushed", system.flush_folder))
            store.backup(trial.out, overwrite=overwrite)
        # Flushed is the name that the copy has while it is written, too.
        assert [what for what, _ in steps] == ["flushed", "named", "flushed"]
        assert trial.out.read_bytes() == disk.contents, "a change went past the write path"
        named = steps[1][1]
        for _ in range(_IMAGES):
            epoch = rng.randrange(len(disk.epochs))
            moment = epoch, rng.randint(0, len(disk.epochs[epoch].changes))
            moment = rng.choice((moment, moment, named))
            image = power.Outage(disk.epochs[moment[0]], unit).image(moment[1], rng, 0.0)
            has_name = moment >= named and rng.random() < 0.7
            try:
                _find_after_power_loss(store, trial, image, overwrite, has_name=has_name)
            except BaseException as error:
                error.add_note(f"after change {moment[1]} in epoch {moment[0]}, named: {has_name}")
                raise
    return _IMAGES


def _find_after_power_loss(
    store: KVStore, trial: _Trial, image: bytes, overwrite: bool, *, has_name: bool
) -> None:
    trial.prepare(overwrite)
    trial.unnamed.write_bytes(image)
    if has_name and overwrite:
        trial.unnamed.replace(trial.out)
    elif has_name:
        trial.out.hardlink_to(trial.unnamed)  # and is yet to lose the other one
    _remove_leftover(store, trial)
    trial.check(overwrite, has_failed=not has_name)


EXPERIMENTS: Final = (
    Experiment(
        "refused-backup",
        "each call to the system that a backup makes, refused",
        "calls",
        refuse_calls,
    ),
    Experiment(
        "interrupted-backup", "an exception at any step of a backup", "interrupts", interrupt
    ),
    *(
        Experiment(
            f"power-backup-by-{word}",
            f"power lost, or a kill, after any write of a backup, by {word}",
            "images",
            partial(lose_power, unit),
            unavailable=power.unavailable,
        )
        for word, unit in (("sector", SECTOR), ("page", PAGE))
    ),
)
