"""A kill after every single write of an operation, one by one and none left out.

The writes go through one path of the data file, and before it is mapped through a few calls of
the operating system. After each of them the file is copied as it is: that is what a kill at this
moment leaves. Every copy opens; all that was acknowledged is there, the call under way has happened
or has not, and the store works on.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

from support.cases import CASES, MAX_BYTES, Case, Prepared, State, make_probes, write_path
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.writing import telling_of_changes

import kvstore.clock
import kvstore.file.platform
from kvstore import KVStore, StoreFullError

from .laboratory import Experiment

_CASES: Final = 6  # a trial


class Trace:
    """Copies a file after each write to it; no two copies in a row are alike."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.images: list[bytes] = []

    def __call__(self) -> None:
        """Take a copy, if anything has changed."""
        image = self._file.read_bytes()
        if not self.images or image != self.images[-1]:
            self.images.append(image)

    @contextmanager
    def of_all_writes(self) -> Iterator[None]:
        """Take copies from now on, also while files are opened, created and grown."""
        with ExitStack() as patches:
            for name in (
                "kvstore.file.platform.system.write_at",
                "kvstore.file.platform.system.reserve",
                "os.ftruncate",
            ):
                module, _, function = name.rpartition(".")
                real = getattr(_module(module), function)
                patches.enter_context(mock.patch(name, partial(self._call, real)))
            patches.enter_context(telling_of_changes(after=lambda *_: self()))
            yield

    def _call(self, real: Callable[..., Any], *arguments: Any) -> Any:
        result = real(*arguments)
        self()
        return result


def _module(name: str) -> Any:
    return {
        "kvstore.file.platform.system": kvstore.file.platform.system,
        "os": os,
    }[name]


def kill_after_every_write(in_place: bool, folder: Path, rng: random.Random) -> int:
    """Kill some cases after every write, through the map or by `pwrite`."""
    return sum(kill_in_case(case, folder, in_place) for case in rng.sample(CASES, _CASES))


def kill_in_case(case: Case, folder: Path, in_place: bool) -> int:
    """Kill the call of one case after every write; return how many there were."""
    clock = FakeClock()
    setattr(kvstore.clock, "time_ns", clock)  # noqa: B010 - a plain one is no valid typing
    with write_path(in_place):
        prepared = Prepared(case, folder, clock)
        file = folder / "test.kvs"
        trace = Trace(file)
        with trace.of_all_writes():
            store = prepared.open(file)
            del trace.images[:]
            trace()
            case.run(store)
            images = list(trace.images)
            store.close()
        return _judge(
            images, [prepared.before, prepared.after], folder, case.probes, f"{case.name!r}"
        )


def kill_amid_openings(folder: Path, rng: random.Random) -> int:
    """Kill the creation, the opening and the recovery of a file after every write."""
    clock = FakeClock()
    setattr(kvstore.clock, "time_ns", clock)  # noqa: B010 - a plain one is no valid typing
    in_place = rng.random() < 0.5
    with write_path(in_place):
        tried = _kill_opening(folder, None, {}, True, "creation")
        prepared = Prepared(rng.choice(CASES), folder, clock)
        probes = prepared.case.probes
        tried += _kill_opening(folder, prepared.contents, prepared.closed, probes, "opening")
        file = folder / "unclean.kvs"
        store = prepared.open(file)
        before = dict(prepared.before)
        with suppress(StoreFullError):  # as a rule there is room for so little
            store.create("unclean", {})
            before["unclean"] = {}
        unclean = file.read_bytes()
        store.close()
        return tried + _kill_opening(
            folder, unclean, before, probes, f"recovery, {prepared.case.name!r}"
        )


def _kill_opening(
    folder: Path, contents: bytes | None, before: State, probes: bool, what: str
) -> int:
    file = folder / "test.kvs"
    file.unlink(missing_ok=True)
    if contents is not None:
        file.write_bytes(contents)
    trace = Trace(file)
    with trace.of_all_writes(), KVStore(file, max_bytes=MAX_BYTES) as store:
        assert dict(store.items()) == before, what
    return _judge(trace.images, [before], folder, probes, what)


def _judge(images: list[bytes], allowed: list[State], folder: Path, probes: bool, what: str) -> int:
    file = folder / "killed.kvs"
    for number, image in enumerate(images):
        file.write_bytes(image)
        try:
            _judge_one(file, allowed, probes)
        except BaseException as error:
            error.add_note(f"{what}, killed after write {number} of {len(images) - 1}")
            raise
    return len(images)


def _judge_one(file: Path, allowed: list[State], probes: bool) -> None:
    with KVStore(file, max_bytes=MAX_BYTES) as store:
        found = dict(store.items())
        assert found in allowed, f"found {sorted(found)[:50]}"
        assert len(store) == len(found)
        if probes:
            make_probes(store)
        assert dict(store.items()) == found
    assert_consistent(file)


EXPERIMENTS = (
    *(
        Experiment(
            f"kills-after-{name}",
            f"a kill after each single {what} of each operation",
            "kills",
            partial(kill_after_every_write, in_place),
        )
        for name, what, in_place in (("stores", "store", True), ("writes", "pwrite", False))
    ),
    Experiment(
        "kills-after-writes-of-openings",
        "a kill after each single write of creating, opening, recovering a file",
        "kills",
        kill_amid_openings,
        1,
    ),
)
