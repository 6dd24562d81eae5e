"""`compact()`: everything moves together and the file is cut, while others read and write."""

import errno
import logging
import random
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
from support import MAX_MAX_BYTES, MIB
from support.clock import FakeClock
from support.files import open_size
from support.stores import OpenStore, after_death
from support.threads import run_together

from kvstore import CorruptStoreError, KVStore, StoreClosedError
from kvstore.compiled import Implementation
from kvstore.file.platform import system
from kvstore.format.layout import EXTENT_SHIFT, FIRST_FILE_SIZE
from kvstore.index.records import Records
from kvstore.index.slab import Slab

SIZES: Final = (10, 300, 900, 5_000, 16_000)


def sized(number: int) -> dict[str, Any]:
    return {"n": number, "v": "x" * SIZES[number % len(SIZES)]}


def thinned_out(store: KVStore, part: int = 10, records: int = 3_000) -> dict[str, Any]:
    """Create records of several sizes, and delete all but one of `part`; return what is left."""
    for number in range(records):
        store.create(f"k{number}", sized(number), ttl=10**6 if number % 3 == 0 else None)
    left = set(random.Random(1).sample(range(records), records // part))
    for number in range(records):
        if number not in left:
            store.delete(f"k{number}")
    return {f"k{number}": sized(number) for number in left}


@pytest.mark.usefixtures("clock")  # so that no time-to-live becomes shorter meanwhile
def test_file_becomes_shorter_by_as_many_bytes_as_compact_says(
    implementation: Implementation, clock: FakeClock, open_store: OpenStore, path: Path
) -> None:
    store = open_store()
    contents = thinned_out(store)
    store.sync()
    lifetimes = {key: store.ttl(key) for key in contents}
    before = open_size(store)
    cut = store.compact()
    assert cut == before - open_size(store)
    stats = store.stats()
    assert stats.file_size == open_size(store)
    assert stats.free_size <= 6 << 20
    assert open_size(store) <= max(1.3 * (stats.live_size + stats.table_size), FIRST_FILE_SIZE)
    assert dict(store) == contents == after_death(store)
    assert {key: store.ttl(key) for key in contents} == lifetimes
    store.close()
    assert dict(open_store()) == contents


def test_compact_of_a_store_that_was_emptied_leaves_the_smallest_file(
    open_store: OpenStore, path: Path
) -> None:
    store = open_store(max_bytes=MAX_MAX_BYTES)
    for key in thinned_out(store, part=2, records=20_000):
        store.delete(key)
    assert store.compact() > 50 * MIB
    assert open_size(store) == FIRST_FILE_SIZE
    assert len(store) == 0
    assert store.compact() == 0


def test_compact_of_a_new_store_and_of_one_that_was_only_read_does_nothing(
    open_store: OpenStore,
) -> None:
    store = open_store()
    assert store.compact() == 0
    store.create("k", {})
    store.close()
    store = open_store()
    assert store.compact() == 0
    assert dict(store) == {"k": {}}


def test_compact_takes_back_what_has_expired(open_store: OpenStore, clock: FakeClock) -> None:
    store = open_store()
    for number in range(3_000):
        store.create(f"k{number}", sized(number), ttl=100)
    store.create("stays", {})
    clock.advance(100)
    assert store.compact() > 5 * MIB
    assert dict(store) == {"stays": {}}


def test_store_grows_again_after_it_was_compacted(open_store: OpenStore, path: Path) -> None:
    store = open_store()
    for _ in range(3):
        contents = thinned_out(store)
        assert store.compact() > 5 * MIB
        assert dict(store) == contents
        for key in contents:
            store.delete(key)
    assert store.stats().records == 0


def test_replaced_and_deleted_records_do_not_come_back(open_store: OpenStore) -> None:
    store = open_store()
    contents = thinned_out(store)
    store.sync()
    store.compact()
    keys = sorted(contents)
    for key in keys[::3]:
        store.put(key, {"new": key})
        contents[key] = {"new": key}
    for key in keys[1::3]:
        store.delete(key)
        del contents[key]
    assert after_death(store) == contents
    store.compact()
    assert after_death(store) == contents == dict(store)


def test_others_read_and_write_meanwhile(open_store: OpenStore) -> None:
    store = open_store()
    contents = thinned_out(store, records=2_000)
    stop = threading.Event()

    def compact() -> None:
        try:
            for _ in range(3):
                store.compact()
        finally:
            stop.set()

    def read() -> None:
        while not stop.is_set():
            for key, value in contents.items():
                assert store[key] == value

    def iterate() -> None:
        while not stop.is_set():
            found = [key for key in store if key in contents]
            assert len(found) == len(set(found)) == len(contents)

    def write() -> None:
        numbers = count()
        while not stop.is_set():
            number = next(numbers)
            store.put(f"w{number % 100}", sized(number))
            if number % 3 == 0:
                store.delete(f"w{number % 100}")

    run_together(compact, read, iterate, write)
    assert {key: store[key] for key in contents} == contents


def test_moving_is_under_a_lock_that_keeps_the_store_from_being_cleared_meanwhile(
    implementation: Implementation, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step amid which it was cleared changed the new index, or touched what had been cut off."""
    store = open_store()
    contents = thinned_out(store)
    stripes = store._locks.stripes
    kept: dict[str, bool] = {}

    def asking(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def ask_and_call(*arguments: Any) -> Any:
            kept[name] = kept.get(name, True) and any(stripe._is_owned() for stripe in stripes)
            return real(*arguments)

        return ask_and_call

    with monkeypatch.context() as patch:
        for owner, name in (
            (Slab, "put_last"),
            (Slab, "room_before"),
            (Slab, "free_spare"),
            (Records, "live_key_at"),
        ):
            patch.setattr(owner, name, asking(name, getattr(owner, name)))
        store.compact()
    assert kept.keys() >= {"put_last", "room_before", "free_spare"}
    assert all(kept.values()), kept
    assert dict(store) == contents


@pytest.mark.usefixtures("clock")  # so that no time-to-live becomes shorter meanwhile
@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no room"), KeyboardInterrupt()])
def test_cut_that_is_refused_or_interrupted_leaves_a_store_that_works_on(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, error: BaseException, is_done: bool
) -> None:
    """The list of free extents led past the end of the file, as it was said to be by then."""
    store = open_store()
    contents = thinned_out(store)
    cut = system.cut

    def cut_short(fd: int, size: int, end: int) -> None:
        monkeypatch.setattr(system, "cut", cut)
        if is_done:  # then an OSError is a signal handler's
            cut(fd, size, end)
        raise error

    monkeypatch.setattr(system, "cut", cut_short)
    with pytest.raises(type(error)):
        store.compact()
    assert store.stats().file_size == open_size(store)
    assert dict(store) == contents == after_death(store)
    for number in range(1_000):
        store.create(f"new {number}", sized(number))
        contents[f"new {number}"] = sized(number)
    assert dict(store) == contents == after_death(store)


def test_progress_is_logged_and_told_to_the_inspector(
    open_store: OpenStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.compacting._PROGRESS_SECONDS", 0)  # else only what takes long
    caplog.set_level(logging.INFO, logger="kvstore")
    store = open_store()
    thinned_out(store)
    shown: list[tuple[int, int]] = []
    store._parts.compactor().compact(lambda *place: shown.append(place))
    assert all(0 <= done <= whole for done, whole in shown)
    assert shown[-1][0] == shown[-1][1]
    assert any("compacting" in record.getMessage() for record in caplog.records)


def test_compact_of_a_damaged_table_says_so_and_does_not_cut_the_file(
    open_store: OpenStore,
) -> None:
    store = open_store(check=False)
    thinned_out(store)
    before = open_size(store)
    store._file.write(store._file.directory[0] << EXTENT_SHIFT, bytes(8))
    with pytest.raises(CorruptStoreError, match="kvstore-inspect repair"):
        store.compact()
    assert open_size(store) == before


def test_closed_store_is_not_compacted(store: KVStore) -> None:
    store.close()
    with pytest.raises(StoreClosedError):
        store.compact()
