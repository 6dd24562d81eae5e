"""Room for records of any size: what is deleted or expires makes it, whatever was there before."""

import random
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
from support import MIB, scaled
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.stores import OpenStore, after_death
from support.threads import run_together

from kvstore import CorruptStoreError, KVStore, StoreClosedError, StoreFullError
from kvstore.compiled import Implementation
from kvstore.format.layout import (
    EXTENT_SHIFT,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    STRIPE_COUNT,
    STRIPE_SHIFT,
    key_hash,
)
from kvstore.index import sparse
from kvstore.one_key import OneKey
from kvstore.room import Room

SMALL: Final = 8 * MIB
SIZES: Final = (60, 900, 16_000)
PAIRS: Final = [(one, other) for one in SIZES for other in SIZES if one != other]
DAY: Final = 86_400


def sized(size: int) -> dict[str, Any]:
    return {"v": "x" * size}


def fill(store: KVStore, prefix: str, size: int, ttl: int | None = None) -> list[str]:
    """Create records until the store is full; return their keys. Every tenth has no `ttl`."""
    keys: list[str] = []
    for number in count():
        try:
            store.create(f"{prefix}{number}", sized(size), ttl if number % 10 else None)
        except StoreFullError:
            return keys
        keys.append(f"{prefix}{number}")
    raise AssertionError


def delete_some(store: KVStore, keys: list[str], part: float) -> list[str]:
    """Delete a part of these keys, chosen at random; return those that are left."""
    shuffled = random.Random(1).sample(keys, len(keys))
    gone = round(len(keys) * part)
    for key in shuffled[:gone]:
        store.delete(key)
    return shuffled[gone:]


def fits_in_new_file(path: Path, left: list[str], size: int, other: int) -> int:
    """Return how many records of a size fit beside some of another in a new file."""
    with KVStore(path.with_suffix(".new"), max_bytes=SMALL) as store:
        for key in left:
            store.create(key, sized(size))
        return len(fill(store, "new ", other))


# --- any size ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "other"), PAIRS)
@pytest.mark.parametrize("part", [0.9, 1.0])
def test_deleting_makes_room_for_records_of_any_size(
    open_store: OpenStore, path: Path, size: int, other: int, part: float
) -> None:
    store = open_store(max_bytes=SMALL)
    left = delete_some(store, fill(store, "old ", size), part)
    found = len(fill(store, "new ", other))
    assert found >= 0.95 * fits_in_new_file(path, left, size, other)
    assert all(store[key] == sized(size) for key in left)
    assert len(store) == len(left) + found


def test_both_implementations_make_room(
    implementation: Implementation, open_store: OpenStore, path: Path
) -> None:
    store = open_store(max_bytes=SMALL)
    left = delete_some(store, fill(store, "old ", 300), 0.9)
    found = len(fill(store, "new ", 4_000))
    assert found >= 0.95 * fits_in_new_file(path, left, 300, 4_000)
    assert all(store[key] == sized(300) for key in left)


@pytest.mark.parametrize(("size", "other"), [(60, 16_000), (16_000, 60)])
def test_what_expires_makes_room_for_records_of_any_size(
    open_store: OpenStore, path: Path, clock: FakeClock, size: int, other: int
) -> None:
    store = open_store(max_bytes=SMALL)
    keys = fill(store, "old ", size, ttl=100)
    left = keys[::10]
    clock.advance(200)
    assert len(fill(store, "new ", other)) >= 0.95 * fits_in_new_file(path, left, size, other)
    assert all(store[key] == sized(size) for key in left)


def test_room_is_made_for_what_replaces_a_smaller_one(open_store: OpenStore) -> None:
    store = open_store(max_bytes=SMALL)
    left = delete_some(store, fill(store, "old ", 60), 0.9)
    for key in left[:200]:
        store.put(key, sized(5_000))
    assert [store[key] for key in left[:201]] == [sized(5_000)] * 200 + [sized(60)]


def test_record_that_moved_keeps_value_time_to_live_and_time_of_creation(
    open_store: OpenStore, clock: FakeClock
) -> None:
    store = open_store(max_bytes=SMALL)
    keys = fill(store, "old ", 300, ttl=1_000)
    left = [key for key in delete_some(store, keys, 0.9) if store.ttl(key)]
    places = {key: place_of(store, key) for key in left}
    before = {key: store._whole(key) for key in left}
    store.sync()
    clock.advance(50)
    fill(store, "new ", 10_000)
    assert sum(place_of(store, key) != places[key] for key in left) > len(left) // 2
    assert {key: store._whole(key) for key in left} == before
    assert {store.ttl(key) for key in left} == {950}
    for key in left[::2]:
        store.delete(key)
    for key in left[1::2]:
        store.put(key, sized(10))
    contents = {key: value for key, value in after_death(store).items() if key in places}
    assert contents == {key: sized(10) for key in left[1::2]}


def place_of(store: KVStore, key: str) -> int:
    """Return the offset of a key's record."""
    encoded = key.encode()
    slot = store._parts.slots.find(key_hash(encoded, store._file.hash_seed), encoded)
    return store._file.words[slot + SLOT_RECORD_OFFSET >> 3] & SLOT_RECORD_MASK


def test_damaged_record_stays_where_it_is_and_others_make_room(open_store: OpenStore) -> None:
    store = open_store(max_bytes=SMALL, check=False)
    left = delete_some(store, fill(store, "old ", 300), 0.95)
    damaged = left[0]
    place = place_of(store, damaged)
    store._file.write(place + 60, b"\0\0\0\0")
    assert len(fill(store, "new ", 9_000)) > 100
    assert place_of(store, damaged) == place
    with pytest.raises(CorruptStoreError, match="fails its checksum"):
        store[damaged]
    assert all(store[key] == sized(300) for key in left[1:])
    store.delete(damaged)


@pytest.mark.parametrize("max_bytes", [12 * MIB, 64 * MIB])
def test_damaged_page_of_the_table_does_not_keep_what_has_expired_from_making_room(
    open_store: OpenStore, clock: FakeClock, max_bytes: int
) -> None:
    """Nothing after it was taken back, and a file that had to grow was refused that."""
    store = open_store(max_bytes=max_bytes, check=False)
    for number in range(3_000):
        store.create(f"k{number}", sized(3_000), ttl=100 if number % 2 else None)
    store._file.write(store._file.directory[0] << EXTENT_SHIFT, bytes(8))
    clock.advance(100)
    damaged = 0
    for number in range(1_400):
        try:
            store.create(f"new {number}", sized(3_000))
        except CorruptStoreError:
            damaged += 1
    assert damaged < 200
    assert store.stats().file_size <= 12 * MIB
    for number in range(1_400, 4_000):
        try:
            store.create(f"new {number}", sized(3_000))
        except CorruptStoreError:
            damaged += 1
        except StoreFullError:
            break
    assert (number < 3_999) == (max_bytes < 64 * MIB)
    with pytest.raises(CorruptStoreError, match="no bucket"):
        store.purge_expired()


def test_threads_that_wait_for_room_all_get_it(open_store: OpenStore) -> None:
    store = open_store(max_bytes=SMALL)
    left = delete_some(store, fill(store, "old ", 60), 0.9)

    def create(thread: int) -> None:
        for number in range(60):
            store.create(f"{thread} {number}", sized(3_000 * thread + 3_000))

    run_together(*(partial(create, thread) for thread in range(4)))
    assert all(store[key] == sized(60) for key in left)
    assert len(store) == len(left) + 240


# --- full --------------------------------------------------------------------------------------


def test_record_is_refused_though_others_retire_as_fast_as_that_is_reclaimed(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was tried for seconds, again and again: they took what had become free."""
    store = open_store(max_bytes=SMALL)
    fill(store, "old ", 16_000)
    reclaims = count()

    def reclaim(_room: Room) -> bool:
        assert next(reclaims) < 100
        return True

    monkeypatch.setattr(Room, "_reclaim", reclaim)
    monkeypatch.setattr(Room, "is_full", lambda _: False)
    with pytest.raises(StoreFullError):
        store.create("new", sized(16_000))


def test_full_store_does_not_look_for_room_again_before_something_was_freed(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(max_bytes=SMALL)
    keys = fill(store, "old ", 900)
    searches = counted(monkeypatch, "kvstore.moving.find_sparse", sparse.find_sparse)
    purges = counted(monkeypatch, "kvstore.index.segments.Segments.segment_expiry")
    for number in range(100):
        with pytest.raises(StoreFullError):
            store.create(f"refused {number}", sized(16_000))
    assert not searches
    assert not purges  # the extent map tells that nothing has expired
    delete_some(store, keys, 0.5)
    store.create("taken", sized(16_000))
    assert searches


def test_segments_that_may_merge_are_looked_for_from_where_the_search_ended(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(max_bytes=SMALL)
    keys = fill(store, "old ", 60)
    looks = counted(monkeypatch, "kvstore.index.segments.Segments.is_mergeable")
    delete_some(store, keys, 0.95)
    before = store.stats().segments
    for number in range(300):
        store.create(f"new {number}", sized(16_000))
    assert store.stats().segments < before
    # A round through all, and for each that merges one more look at what became of it.
    assert len(looks) <= 2 * before


def counted(
    monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Any] | None = None
) -> list[None]:
    """Return a list that gets longer with each call of a function."""
    calls: list[None] = []
    if function is None:
        module, kind, method = name.rsplit(".", 2)
        function = getattr(getattr(__import__(module, fromlist=[kind]), kind), method)

    def count_and_call(*arguments: Any) -> Any:
        calls.append(None)
        return function(*arguments)

    monkeypatch.setattr(name, count_and_call)
    return calls


def test_full_store_that_is_closed_meanwhile_says_that_it_is_closed(
    open_store: OpenStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once more whether it is full, without a lock."""
    store = open_store(max_bytes=SMALL)
    fill(store, "old ", 16_000)
    clock.advance(10)
    store_one = OneKey.store

    def store_and_close(*arguments: Any, **options: Any) -> int:
        try:
            return store_one(*arguments, **options)
        finally:
            store.close()

    monkeypatch.setattr(OneKey, "store", store_and_close)
    with pytest.raises(StoreClosedError):
        store.create("new", sized(16_000))


def test_full_store_takes_records_again_as_soon_as_others_expire(
    open_store: OpenStore, clock: FakeClock
) -> None:
    store = open_store(max_bytes=SMALL)
    for number in range(60):  # four an extent
        store.create(f"brief {number}", sized(16_000), ttl=100)
    fill(store, "old ", 900)
    for _ in range(3):
        with pytest.raises(StoreFullError):
            store.create("new", sized(16_000))
    clock.advance(99.5)
    with pytest.raises(StoreFullError):
        store.create("new", sized(16_000))
    clock.advance(0.5)
    for number in range(60):
        store.create(f"new {number}", sized(16_000))


def test_one_out_one_in_is_never_refused_while_sizes_shift(open_store: OpenStore) -> None:
    store = open_store(max_bytes=SMALL)
    rng = random.Random(1)
    sizes: dict[str, int] = dict.fromkeys(fill(store, "old ", 200), 200)
    most = sum(sizes.values()) * 0.9
    used = sum(sizes.values())
    keys = list(sizes)
    for number in range(scaled(3_000)):
        size = rng.choice((100, 1_000, 5_000, 16_000)[number % 4 :])
        while used + size > most:
            key = keys.pop(rng.randrange(len(keys)))
            store.delete(key)
            used -= sizes.pop(key)
        store.create(f"{number}", sized(size))
        keys.append(f"{number}")
        sizes[f"{number}"] = size
        used += size
    assert {key: len(value["v"]) for key, value in store.items()} == sizes


# --- simulated days ----------------------------------------------------------------------------


class Days:
    """A cache with TTLs whose typical size shifts from day to day; 3 % live for a month."""

    TYPICAL: Final = (80, 300, 1_200, 5_000, 600, 150, 2_500, 12_000)

    def __init__(self, store: KVStore, clock: FakeClock, per_day: int) -> None:
        self._store = store
        self._clock = clock
        self._per_day = per_day
        self._rng = random.Random(7)
        self._number = 0
        self._ends: list[tuple[float, int]] = []
        self._now = 0.0
        self.peak = 0
        """The most that live records ever took, with their slots."""

    def live(self, day: int) -> None:
        """Create a day's records."""
        written = 0
        while written < self._per_day:
            typical = self.TYPICAL[day % len(self.TYPICAL)]
            size = max(10, min(16_000, int(self._rng.lognormvariate(0, 0.25) * typical)))
            brief = self._rng.random() > 0.03
            ttl = self._rng.randrange(3_600, DAY) if brief else 30 * DAY
            self._store.create(f"k{self._number}", sized(size), ttl)
            self._number += 1
            written += size
            self._ends.append((self._now + ttl, size + 100))
            self._clock.advance(DAY * size / self._per_day)
            self._now += DAY * size / self._per_day
            if self._number % 500 == 0:
                self._ends = [each for each in self._ends if each[0] > self._now]
                self.peak = max(self.peak, sum(size for _, size in self._ends))


def test_days_of_shifting_sizes_are_not_refused(open_store: OpenStore, clock: FakeClock) -> None:
    store = open_store(max_bytes=SMALL)
    days = Days(store, clock, MIB)
    for day in range(scaled(10)):
        days.live(day)
        store.purge_expired()


def test_file_stays_within_twice_what_it_ever_held_and_a_few_mib(
    open_store: OpenStore, clock: FakeClock
) -> None:
    """Nobody purges; and it may grow as it likes."""
    store = open_store()
    days = Days(store, clock, 3 * MIB)
    for day in range(scaled(10)):
        days.live(day)
        assert store.stats().file_size <= 2 * days.peak + 8 * MIB


# --- what is told of it ------------------------------------------------------------------------


def test_file_grows_though_something_may_have_expired_while_no_room_was_made(
    open_store: OpenStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused as full, at a hundredth of what it may become."""
    store = open_store()
    for number in range(3_000):
        store.create(f"k{number}", sized(3_000))
    # In each part of the table the next to expire, but deleted: to take it back makes no room.
    for stripe in range(STRIPE_COUNT):
        key = next(key for key in map(str, count()) if stripe_of(store, key) == stripe)
        store.create(key, {}, ttl=10 * stripe + 10)
        store.delete(key)
    make = Room.make

    def make_for_long(room: Room, step: int) -> bool:
        made = make(room, step)
        clock.advance(10)
        return made

    monkeypatch.setattr(Room, "make", make_for_long)
    clock.advance(10)
    for number in range(1_000):
        store.create(f"new {number}", sized(3_000))


def stripe_of(store: KVStore, key: str) -> int:
    return key_hash(key.encode(), store._file.hash_seed) >> STRIPE_SHIFT


def test_stats_tell_for_which_sizes_there_is_room(open_store: OpenStore) -> None:
    store = open_store(max_bytes=SMALL)
    new = store.stats()
    assert new.free_for_any_size == SMALL - new.table_size - (6 << EXTENT_SHIFT)
    assert new.free_for_some_sizes == new.retired_size == 0
    keys = fill(store, "old ", 900)
    full = store.stats()
    assert full.free_for_any_size == 0
    assert full.free_for_some_sizes < 1 << EXTENT_SHIFT
    left = delete_some(store, keys, 0.9)
    sparse = store.stats()
    assert sparse.free_for_some_sizes > sparse.free_for_any_size
    assert sparse.live_size < full.live_size / 9
    store.compact()
    dense = store.stats()
    assert dense.free_for_any_size > 0.8 * SMALL - dense.table_size
    assert dense.free_for_some_sizes < 1 << EXTENT_SHIFT
    assert dense.records == len(left)


def test_stats_tell_how_much_waits_for_a_flush(open_store: OpenStore) -> None:
    store = open_store()
    for number in range(100):
        store.create(f"{number}", sized(900))
    store.sync()
    for number in range(100):
        store.put(f"{number}", sized(900))
    stats = store.stats()
    assert stats.retired_size == 100 * 960
    assert stats.live_size == 200 * 960
    store._parts.reclaimer.reclaim()
    assert store.stats().retired_size == 0


def test_file_is_consistent_after_room_was_made_and_it_was_closed(path: Path) -> None:
    with KVStore(path, max_bytes=SMALL) as store:
        left = delete_some(store, fill(store, "old ", 60), 0.9)
        store.sync()
        fill(store, "new ", 16_000)
    assert_consistent(path)
    with KVStore(path, max_bytes=SMALL) as store:
        assert all(store[key] == sized(60) for key in left)


def test_all_that_has_expired_is_taken_back_before_a_record_is_refused(
    open_store: OpenStore, clock: FakeClock
) -> None:
    """However much that is, and however little of it is of use."""
    store = open_store(max_bytes=SMALL)
    keys = fill(store, "old ", 10, ttl=100)
    clock.advance(100)
    for number in range(300):
        store.create(f"new {number}", sized(16_000))
    assert len(store) == 300 + len(keys[::10])
