"""The file never grows past `max_bytes`; a full store reads, deletes and takes what fits again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support import MAX_MAX_BYTES, MIB, MIN_MAX_BYTES, seeded_random
from support.clock import FakeClock
from support.files import open_size, size
from support.stores import OpenStore
from support.values import sized_value

from kvstore import KeyExistsError, KVStore, StoreFullError


def _fill(store: KVStore, value_size: int, name: str = "k", ttl: int | None = None) -> list[str]:
    """Create until the store is full; return the keys."""
    keys: list[str] = []
    with pytest.raises(StoreFullError):
        while True:
            key = f"{name}{len(keys)}"
            store.create(key, sized_value(value_size, len(keys)), ttl)
            keys.append(key)
    return keys


def _holds(store: KVStore, keys: list[str], value_size: int) -> bool:
    return all(store[key] == sized_value(value_size, int(key.lstrip("klmn"))) for key in keys)


@pytest.mark.parametrize(
    "max_bytes", [MIN_MAX_BYTES, MIN_MAX_BYTES + 1, 5_000_001, MAX_MAX_BYTES - 1, MAX_MAX_BYTES]
)
def test_max_bytes_in_its_range_opens_a_small_file_that_never_is_larger(
    open_store: OpenStore, max_bytes: int
) -> None:
    store = open_store(max_bytes=max_bytes)
    store.create("k", {"n": 1})
    assert open_size(store) <= MIN_MAX_BYTES
    if max_bytes < 2 * MIN_MAX_BYTES:
        _fill(store, 16_384)
        assert open_size(store) <= max_bytes
    store.close()
    assert open_size(store) <= max_bytes


@pytest.mark.parametrize("value_size", [2, 100, 1000, 16_384])
def test_a_store_fills_to_its_limit_and_stays_readable(
    open_store: OpenStore, value_size: int
) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    keys = _fill(store, value_size)
    assert len(keys) * (value_size + 32) > MIN_MAX_BYTES // 5
    assert open_size(store) <= MIN_MAX_BYTES
    assert len(store) == len(keys)
    assert _holds(store, keys, value_size)
    assert set(store) == set(keys)
    store.close()
    assert open_size(store) <= MIN_MAX_BYTES
    again = open_store(max_bytes=MIN_MAX_BYTES)
    assert len(again) == len(keys)
    assert _holds(again, keys, value_size)
    with pytest.raises(StoreFullError):
        again.create("new", sized_value(16_384))
    with pytest.raises(KeyExistsError):
        again.create(keys[0], {})


@pytest.mark.parametrize("max_bytes", [MIN_MAX_BYTES, 80 * 65_536])
@pytest.mark.parametrize("value_size", [2, 16_384])
def test_a_full_store_whose_process_died_opens_again_with_everything_in_it(
    open_store: OpenStore, tmp_path: Path, max_bytes: int, value_size: int
) -> None:
    """Its index is rebuilt in the room that there is: as much as the old one had."""
    store = open_store(max_bytes=max_bytes)
    keys = _fill(store, value_size)
    shutil.copyfile(store.path, tmp_path / "copy.kvs")
    again = open_store(tmp_path / "copy.kvs", max_bytes=max_bytes)
    assert len(again) == len(keys)
    assert _holds(again, keys, value_size)
    again.delete(keys[0])
    again.create(keys[0], sized_value(value_size, 0))
    assert size(again.path) <= max_bytes


def test_a_create_that_finds_no_room_leaves_no_trace(open_store: OpenStore) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    keys = _fill(store, 16_384)
    for _ in range(100):
        with pytest.raises(StoreFullError):
            store.create("new", sized_value(16_384))
    assert "new" not in store
    assert len(store) == len(keys) == len(list(store))
    store.delete(keys[0])
    store.create("new", sized_value(16_384))
    assert store["new"] == sized_value(16_384)


@pytest.mark.parametrize("value_size", [12, 1000, 16_384])
def test_deleting_makes_room_for_as_many_of_the_same_size(
    open_store: OpenStore, value_size: int
) -> None:
    random = seeded_random()
    store = open_store(max_bytes=MIN_MAX_BYTES)
    keys = _fill(store, value_size)
    for round_name in "lm":
        gone = set(random.sample(range(len(keys)), len(keys) // 3))
        for place in gone:
            store.delete(keys[place])
        keys = [key for place, key in enumerate(keys) if place not in gone]
        for number in range(len(gone)):
            key = f"{round_name}{number}"
            store.create(key, sized_value(value_size, number))
            keys.append(key)
    assert set(store) == set(keys)
    assert _holds(store, keys, value_size)


def test_a_full_store_trades_one_record_for_another_for_long(open_store: OpenStore) -> None:
    random = seeded_random()
    store = open_store(max_bytes=MIN_MAX_BYTES)
    keys = _fill(store, 1000)
    for number in range(10_000):
        place = random.randrange(len(keys))
        store.delete(keys[place])
        keys[place] = f"l{number}"
        store.create(keys[place], sized_value(1000, number))
    assert set(store) == set(keys)
    assert open_size(store) <= MIN_MAX_BYTES


@pytest.mark.parametrize("sizes", [(1000, 16_384), (16_384, 1000), (500, 4000), (4000, 500)])
def test_deleting_everything_makes_room_for_as_much_of_any_other_size(
    open_store: OpenStore, path: Path, tmp_path: Path, sizes: tuple[int, int]
) -> None:
    with open_store(tmp_path / "fresh.kvs", max_bytes=MIN_MAX_BYTES) as fresh:
        capacity = len(_fill(fresh, sizes[1]))
    store = open_store(max_bytes=MIN_MAX_BYTES)
    for key in _fill(store, sizes[0]):
        store.delete(key)
    keys = _fill(store, sizes[1], "l")
    assert len(keys) >= capacity * 0.9
    assert _holds(store, keys, sizes[1])


def test_deleting_a_whole_extent_of_small_values_makes_room_for_large_ones(
    open_store: OpenStore,
) -> None:
    """The first half of what was created lies in extents of its own: these become free."""
    store = open_store(max_bytes=MIN_MAX_BYTES)
    keys = _fill(store, 500)
    half = len(keys) // 2
    for key in keys[:half]:
        store.delete(key)
    assert len(_fill(store, 16_384, "l")) >= 40
    assert _holds(store, keys[half:], 500)


def test_what_has_expired_is_taken_back_before_a_store_is_full(
    open_store: OpenStore, clock: FakeClock
) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    capacity = len(_fill(store, 1000, ttl=60))
    for name in "lmn":
        clock.advance(60)
        assert len(store) == 0
        assert len(_fill(store, 1000, name, ttl=60)) >= capacity
    assert _holds(store, list(store), 1000)


def test_what_has_expired_makes_room_for_other_sizes_too(
    open_store: OpenStore, clock: FakeClock
) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    kept = [f"k{number}" for number in range(100)]
    for number, key in enumerate(kept):
        store.create(key, sized_value(1000, number))
    capacity = len(_fill(store, 1000, "l", ttl=60))
    clock.advance(60)
    assert len(_fill(store, 4000, "m")) >= capacity // 5
    assert _holds(store, kept, 1000)


def test_the_last_expired_record_makes_room_for_the_next(
    open_store: OpenStore, clock: FakeClock
) -> None:
    """One record in a full store has expired: one more fits, a second does not."""
    store = open_store(max_bytes=MIN_MAX_BYTES)
    store.create("short", sized_value(16_384), ttl=60)
    _fill(store, 16_384)
    clock.advance(60)
    store.create("one", sized_value(16_384))
    with pytest.raises(StoreFullError):
        store.create("two", sized_value(16_384))


def test_a_larger_file_opens_under_a_smaller_limit_and_does_not_grow(
    open_store: OpenStore,
) -> None:
    contents: dict[str, Any] = {}
    with open_store(max_bytes=16 * MIB) as store:
        while open_size(store) < 8 * MIB:
            contents[f"k{len(contents)}"] = sized_value(4000, len(contents))
            store.create(f"k{len(contents) - 1}", sized_value(4000, len(contents) - 1))
    large = open_size(store)
    with open_store(max_bytes=MIN_MAX_BYTES) as again:
        assert dict(again) == contents
        more = _fill(again, 4000, "l")
        assert size(again.path) <= large
        for key in [*more, *list(contents)[:100]]:
            again.delete(key)
            contents.pop(key, None)
        assert len(_fill(again, 4000, "m")) >= 100
        assert size(again.path) <= large
    assert size(again.path) <= large
    with open_store(max_bytes=16 * MIB) as last:
        for key, value in contents.items():
            assert last[key] == value
        last.create("grows again", {})


def test_a_limit_can_be_raised_when_the_store_is_opened_again(open_store: OpenStore) -> None:
    with open_store(max_bytes=MIN_MAX_BYTES) as store:
        keys = _fill(store, 4000)
    with open_store(max_bytes=MIN_MAX_BYTES + 2 * MIB) as again:
        more = _fill(again, 4000, "l")
        assert len(more) * 4000 > 1.5 * MIB
        assert _holds(again, keys + more, 4000)
        assert size(again.path) <= MIN_MAX_BYTES + 2 * MIB


def test_a_full_store_can_be_emptied_and_used_like_a_new_one(open_store: OpenStore) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    for value_size in (100, 16_384, 500):
        keys = _fill(store, value_size)
        for key in keys:
            store.delete(key)
        assert len(store) == 0
        assert list(store) == []
    store.create("k", {"n": 1})
    assert dict(store) == {"k": {"n": 1}}
