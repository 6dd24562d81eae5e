"""An operation that a failing write cuts short loses nothing that was acknowledged."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.clock import FakeClock
from support.components import NOW_MS, FaultyWrites, open_components, replace_writes
from support.consistency import assert_consistent
from support.platforms import IN_PLACE
from support.table import assert_holds, keys_where
from xxhash import xxh3_64_intdigest

import kvstore.file.platform
from kvstore import CorruptStoreError, KVStore
from kvstore.file.rollback import Rollback
from kvstore.format.codec import JSONObject
from kvstore.format.layout import (
    SPLIT_AT,
)
from kvstore.recovery.check import check_file

VALUE: Final = b'{"b":1}'


Act = Callable[[KVStore, list[str]], None]


def fill(store: KVStore, count: int) -> list[str]:
    """Fill one segment of a store to `count` used slots; return its keys."""
    keys: list[str] = []
    number = 0
    while len(keys) < count:
        number += 1
        key = f"{'é' * 16 if number % 9 == 0 else ''}{number}"
        if xxh3_64_intdigest(key.encode(), store._file.hash_seed) >> 60 == 7:
            keys.append(key)
            store.create(key, {"n": number}, ttl=1_000 if number % 3 == 0 else None)
    return keys


def next_key(store: KVStore, keys: list[str]) -> str:
    """Return another key of the segment that `fill` filled."""
    number = int(keys[-1].strip("é"))
    while True:
        number += 1
        if xxh3_64_intdigest(str(number).encode(), store._file.hash_seed) >> 60 == 7:
            return str(number)


def create_the_first(store: KVStore, _keys: list[str]) -> None:
    store.create("new", {"new": "x" * 5_000}, ttl=500)


def create_beside_others(store: KVStore, keys: list[str]) -> None:
    store.create(next_key(store, keys), {"n": 0})


def delete_one(store: KVStore, keys: list[str]) -> None:
    store.delete(keys[0])


def delete_a_long_key(store: KVStore, keys: list[str]) -> None:
    store.delete(next(key for key in keys if len(key) > 16))


def replace_an_expired_one(store: KVStore, keys: list[str]) -> None:
    store.create(next(key for key in keys if int(key.strip("é")) % 3 == 0), {"again": 1})


def purge(store: KVStore, _keys: list[str]) -> None:
    store.purge_expired()


CASES: Final[dict[str, tuple[int, Act, float]]] = {
    "the first create": (0, create_the_first, 0),
    "a create": (40, create_beside_others, 0),
    "the last delete": (1, delete_one, 0),
    "a delete": (40, delete_one, 0),
    "a delete of a long key": (400, delete_a_long_key, 0),
    "a create over an expired one": (40, replace_an_expired_one, 2_000),
    "a purge": (40, purge, 2_000),
    "a split": (SPLIT_AT, create_beside_others, 0),
    "a split that drops expired ones": (SPLIT_AT, create_beside_others, 2_000),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind)
        for case in CASES
        for kind in ("interrupt", "interrupt of a pwrite")[: len(IN_PLACE)]
        if kind != "interrupt of a pwrite" or "split" not in case
    ],
)
def test_operation_cut_short_at_any_write_loses_nothing_acknowledged(
    path: Path, clock: FakeClock, case: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this opening, and in the next, also where the process is killed right after.

    Writes that the disk refuses are in the fault laboratory.
    """
    in_place = kind == "interrupt"
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: in_place)
    count, act, wait = CASES[case]
    with KVStore(path) as store:
        keys = fill(store, count)
    start = path.read_bytes()
    clock.advance(wait)
    rng = random.Random(1)
    fail_at, reached = 1, True
    while reached:
        path.write_bytes(start)
        store = KVStore(path)
        store._file.mark_dirty()
        before = dict(store)
        write = store._file.write
        outcome = "done"
        fault = FaultyWrites(store._file, fail_at, KeyboardInterrupt())
        try:
            act(store, keys)
        except KeyboardInterrupt as raised:
            outcome = type(raised).__name__
        reached = fault.reached
        note = f"write {fail_at}: {outcome}"
        assert reached or outcome == "done"
        if store._file.write is fault:  # else nothing may be written any more
            replace_writes(store._file, write)
        after = dict(store)
        in_doubt = {
            key for key in before.keys() | after.keys() if before.get(key) != after.get(key)
        }
        assert len(in_doubt) <= 1, note
        killed = path.read_bytes()
        try_to_go_on(store)
        store.close()
        problems = [str(problem) for problem in check_file(path)]
        # A file that is marked "not clean" may have leaked: the next opening repairs it.
        if any("not clean" in problem for problem in problems):
            assert_recovers(path, path.read_bytes(), before, after, outcome, note)
        else:
            assert problems == [], note
        assert_recovers(path, killed, before, after, outcome, note)
        fail_at += 1 if fail_at < 12 else rng.randrange(1, fail_at)
    assert fail_at > 3


def assert_recovers(
    path: Path,
    image: bytes,
    before: dict[str, JSONObject],
    after: dict[str, JSONObject],
    outcome: str,
    note: str,
) -> None:
    """Assert that a file with these bytes opens, and is whole, and holds what it should.

    An operation that raised may have happened or not, as for its one key.
    """
    path.write_bytes(image)
    with KVStore(path) as store:
        found = dict(store)
        found.pop("to go on", None)
    assert_consistent(path)
    if outcome == "done":
        assert found == after, note
    differing = {key for key in found.keys() | after.keys() if found.get(key) != after.get(key)}
    assert len(differing) <= 1, note
    for key in differing & before.keys():
        assert found.get(key, before[key]) == before[key], note


def try_to_go_on(store: KVStore) -> None:
    """Create something more, as a program would, unless changes are refused by now."""
    try:
        store.create("to go on", {})
    except CorruptStoreError:
        with pytest.raises(CorruptStoreError, match="could not be undone"):
            store.create("to go on", {})


def test_split_that_is_interrupted_at_its_very_end_keeps_both_halves(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new extent went back to the pool, although the directory led to it by then."""
    with open_components(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 4, long=False)
        keys = [next(several) for _ in range(SPLIT_AT)]
        for key in keys:
            parts.store(key, VALUE)
        ends = iter((False, True))

        def end(_undo: Rollback, kind: type[BaseException] | None, *_: object) -> None:
            if kind is None and next(ends, False):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Rollback, "__exit__", end)
            with pytest.raises(KeyboardInterrupt):
                parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        assert len(list(parts.segments.segments(4))) == 2
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter(()))
    assert_consistent(path)
