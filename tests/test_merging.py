"""Segments of the table merge while others go through the store, and give their extents back."""

import threading
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Final

import pytest
from support import MIB
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.threads import run_together

from kvstore import CorruptStoreError, KVStore, StoreClosedError, StoreFullError
from kvstore.format.layout import BUCKET_SIZE, EXTENT_SHIFT, STRIPE_SHIFT, key_hash
from kvstore.index.segments import Segments

MANY: Final = 20_000  # have each stripe of the table be split


def merge(store: KVStore) -> int:
    return store._all_keys.merge_segments()


def names_in_stripe(store: KVStore, stripe: int) -> Iterator[str]:
    seed = store._file.hash_seed
    names = map("{}".format, count())
    return (name for name in names if key_hash(name.encode(), seed) >> STRIPE_SHIFT == stripe)


def split_twice(store: KVStore, stripe: int = 3, left: int = 200) -> set[str]:
    """Create so many keys of a stripe that it has four segments or more, delete all but a few."""
    names = list(islice(names_in_stripe(store, stripe), 3_000))
    for name in names:
        store.create(name, {"of": name})
    assert store.stats().segments >= 19
    for name in names[left:]:
        store.delete(name)
    return set(names[:left])


def test_store_that_was_emptied_gives_the_extents_of_its_table_back(path: Path) -> None:
    with KVStore(path) as store:
        for number in range(MANY):
            store.create(f"{number}", {})
        many = store.stats().segments
        assert many > 30
        assert merge(store) == 0
        for number in range(100, MANY):
            store.delete(f"{number}")
        assert merge(store) == many - 16
        assert store.stats().segments == 16
        assert merge(store) == 0
        assert dict(store) == {f"{number}": {} for number in range(100)}
    assert_consistent(path)
    with KVStore(path) as store:
        assert len(store) == 100


def test_table_that_has_merged_leaves_its_room_to_large_records(path: Path) -> None:
    """A store of tiny records that was emptied held half of what a new one does."""

    def fill(store: KVStore) -> int:
        for number in count():
            try:
                store.create(f"large {number}", {"text": "x" * 16_000})
            except StoreFullError:
                return number
        raise AssertionError

    with KVStore(path.with_suffix(".new"), max_bytes=4 * MIB) as store:
        of_a_new_one = fill(store)
    with KVStore(path, max_bytes=4 * MIB) as store:
        created: list[str] = []
        with pytest.raises(StoreFullError):
            for number in count():
                store.create(f"{number}", {})
                created.append(f"{number}")
        for name in created:
            store.delete(name)
        assert merge(store) > 5
        store.sync()
        assert fill(store) == of_a_new_one


def test_key_that_is_there_throughout_is_told_once_while_the_same_loop_deletes_and_merges(
    path: Path,
) -> None:
    with KVStore(path) as store:
        staying = split_twice(store, left=300)
        for name in islice(names_in_stripe(store, 3), 300, 3_000):
            store.create(name, {})
        seen: list[str] = []
        for number, name in enumerate(store):
            seen.append(name)
            if number % 400 == 0:
                for other in islice(names_in_stripe(store, 3), 300, 3_000):
                    if other in store:
                        store.delete(other)
                assert merge(store) or number
        assert len(seen) == len(set(seen))
        assert staying <= set(seen)
    assert_consistent(path)


def test_every_step_of_an_iteration_may_meet_another_table(path: Path) -> None:
    """Split and merged between any two of its steps: it goes on where it was."""
    with KVStore(path) as store:
        staying = split_twice(store)
        others = list(islice(names_in_stripe(store, 3), 200, 3_000))
        tables: set[int] = set()
        keys_at = store._all_keys._keys_at
        seen: list[str] = []

        def change_and_look(position: int) -> tuple[list[bytes], int, list[str]]:
            if 3 << 11 <= position < 4 << 11:
                if len(tables) % 2:
                    for name in others:
                        store.delete(name)
                    assert merge(store)
                else:
                    for name in others:
                        store.create(name, {})
                tables.add(store.stats().segments + len(tables))
            return keys_at(position)

        store._all_keys._keys_at = change_and_look  # type: ignore[method-assign]
        seen = list(store)
        assert len(tables) > 1
        assert len(seen) == len(set(seen))
        assert staying <= set(seen)


def test_key_that_is_there_throughout_is_told_once_while_other_threads_split_and_merge(
    path: Path,
) -> None:
    with KVStore(path) as store:
        staying = split_twice(store)
        others = list(islice(names_in_stripe(store, 3), 200, 2_500))
        has_ended = threading.Event()
        merged = 0

        def split_and_merge() -> None:
            nonlocal merged
            while not has_ended.is_set() or not merged:
                for name in others:
                    store.create(name, {})
                for name in others:
                    store.delete(name)
                merged += merge(store)

        def go_through() -> None:
            try:
                for _ in range(30):
                    seen = list(store)
                    assert len(seen) == len(set(seen))
                    assert staying <= set(seen)
                    assert len(store) >= len(staying)
                    assert all(store.read(name) == {"of": name} for name in list(staying)[::9])
                    assert dict(store.items()).keys() >= staying
            finally:
                has_ended.set()

        run_together(split_and_merge, go_through, go_through)
        assert merged
    assert_consistent(path)


def test_items_are_popped_one_by_one_while_segments_merge(path: Path) -> None:
    with KVStore(path) as store:
        staying = split_twice(store)
        popped = []
        for number in range(len(staying)):
            popped.append(store.popitem()[0])
            if number % 50 == 0:
                merge(store)
        assert sorted(popped) == sorted(staying)
        assert not store
        with pytest.raises(KeyError):
            store.popitem()
    assert_consistent(path)


def test_what_expired_is_taken_back_once_though_its_segment_merges_meanwhile(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A purge looks at a segment, marks the file dirty, then takes back what it saw.

    By then the extent may be another segment's, or hold records.
    """
    with KVStore(path) as store:
        staying = split_twice(store)
        expiring = list(islice(names_in_stripe(store, 3), 3_000, 3_050))
        for name in expiring:
            store.create(name, {}, ttl=5)
        clock.advance(10)
        look = Segments.segment_expiry
        merged: list[int] = []

        def merge_amid() -> int:
            """Merge as another thread would have before this one came to have the stripe again."""
            segments, done = store._parts.segments, 0
            for position in range(3 << 11, 4 << 11, 64):
                while segments.is_mergeable(position)[0]:
                    done += segments.merge(position, clock.now_ms)
            return done

        def look_and_merge(segments: Segments, position: int, now_ms: int) -> tuple[int, int, bool]:
            found = look(segments, position, now_ms)
            if 3 << 11 < position < 4 << 11 and not merged:
                clock.advance(-10)  # else the merge takes them back
                merged.append(merge_amid())
                clock.advance(10)
            return found

        monkeypatch.setattr(Segments, "segment_expiry", look_and_merge)
        assert store.purge_expired() == 50
        assert merged[0] > 0
        assert set(store) == staying
        assert store.stats().records == len(staying)
    assert_consistent(path)


def test_damaged_segment_stays_and_all_others_merge(path: Path) -> None:
    with KVStore(path) as store:
        split_twice(store, stripe=3)
        split_twice(store, stripe=9)
        many = store.stats().segments
        damaged = store._file.directory[9 << 11] << EXTENT_SHIFT
        store._file.write(damaged + 3 * BUCKET_SIZE, b"damaged!")
        halves = len(set(store._file.directory[3 << 11 : 4 << 11]))
        assert halves - 1 <= merge(store) < many - 16
        assert len(set(store._file.directory[3 << 11 : 4 << 11])) == 1
        assert len(set(store._file.directory[9 << 11 : 10 << 11])) > 1
        store._file.require_rebuild()


def test_nothing_to_merge_leaves_a_file_as_it_was_closed(path: Path) -> None:
    with KVStore(path) as store:
        store.create("key", {})
    with KVStore(path) as store:
        before = path.read_bytes()
        assert merge(store) == 0
        assert path.read_bytes() == before


def test_process_killed_right_after_a_first_change_that_is_a_merge_loses_nothing(
    path: Path,
) -> None:
    """The file says that it is in use before its table differs from what it was closed with."""
    with KVStore(path) as store:
        staying = split_twice(store)
    with KVStore(path) as store:
        assert merge(store)
        killed = path.read_bytes()
    path.write_bytes(killed)
    with KVStore(path) as store:
        assert {name: store.read(name) for name in store} == {
            name: {"of": name} for name in staying
        }
    assert_consistent(path)


def test_closed_store_merges_nothing(path: Path) -> None:
    store = KVStore(path)
    store.close()
    with pytest.raises(StoreClosedError, match="closed"):
        merge(store)


def test_lookups_go_on_in_a_table_in_which_a_merge_was_interrupted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken back; the next opening rebuilds the index all the same."""
    with KVStore(path) as store:
        staying = split_twice(store)
        many = store.stats().segments
        write = Segments._write_segment

        def interrupt(*arguments: object) -> None:
            write(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        monkeypatch.setattr(Segments, "_write_segment", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(store)
        monkeypatch.undo()
        assert store.stats().segments == many
        assert set(store) == staying
        store.create("more", {})
    with KVStore(path) as store:
        assert set(store) == staying | {"more"}
    assert_consistent(path)


def test_damage_is_told_of_by_lookups_as_before_once_its_buddy_could_have_merged(
    path: Path,
) -> None:
    with KVStore(path) as store:
        staying = split_twice(store)
        damaged = store._file.directory[3 << 11] << EXTENT_SHIFT
        store._file.write(damaged + 3 * BUCKET_SIZE, b"damaged!")
        merge(store)
        told = 0
        for name in staying:
            try:
                assert store.read(name) == {"of": name}
            except CorruptStoreError:
                told += 1
        assert 0 < told < len(staying)
        store._file.require_rebuild()
