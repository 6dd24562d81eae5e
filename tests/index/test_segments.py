"""Segments are split and compacted, counted and purged; damaged ones harm no others."""

from pathlib import Path
from typing import Final

import pytest
from support import MIB
from support.components import NOW_MS, open_components
from support.consistency import assert_consistent
from support.table import all_keys, assert_holds, controls, counts, home_in, keys_where

from kvstore import CorruptStoreError, StoreFullError
from kvstore.format.layout import (
    CONTROL_TOMBSTONE,
    EARLIEST_OFFSET,
    EXTENT_SHIFT,
    KIND_SEGMENT,
    NO_EXPIRY,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SLOT_COUNT,
    SPLIT_AT,
    map_entry_offset,
)

VALUE: Final = b'{"b":1}'


def test_segment_more_than_half_full_is_split_in_two(path: Path) -> None:
    with open_components(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 6)
        keys = [next(several) for _ in range(SPLIT_AT)]
        for key in keys:
            parts.store(key, VALUE)
        assert list(parts.segments.segments(6)) == [parts.file.directory[6 << 11]]
        assert parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        lower, upper = parts.segments.segments(6)
        run = parts.file.directory[6 << 11 : 7 << 11].tolist()
        assert run == [lower] * 1_024 + [upper] * 1_024
        assert counts(parts, lower)[0] + counts(parts, upper)[0] == SPLIT_AT
        assert_holds(parts, dict.fromkeys(keys, VALUE), (next(several) for _ in range(50)))
        assert sorted(all_keys(parts, 6)) == sorted(keys)
    assert_consistent(path)


def test_segments_split_as_far_as_the_directory_goes(path: Path) -> None:
    """All keys begin with one hash prefix of 12 bits, then 13, and so on to the 15 there are."""
    with open_components(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 56 == 0x5A)
        keys = [next(several) for _ in range(900)]
        for key in keys:
            parts.store(key, VALUE)
        for _ in range(4):
            assert parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        depths = [
            parts.file.map[(extent << EXTENT_SHIFT) + 16] for extent in parts.segments.segments(5)
        ]
        assert sorted(depths) == [5, 6, 7, 8, 8]
        assert_holds(parts, dict.fromkeys(keys, VALUE), (next(several) for _ in range(50)))
    assert_consistent(path)


def test_segment_of_tombstones_is_rewritten_into_itself(path: Path) -> None:
    with open_components(path) as parts:
        several = keys_where(parts, home_in(1, 8))
        keys = [next(several) for _ in range(4 * SLOT_COUNT)]
        for key in keys:
            parts.store(key, VALUE)
        for key in keys[10:]:
            parts.remove(key)
        extent = parts.file.directory[1 << 11]
        assert counts(parts, extent) == (10, 4 * SLOT_COUNT)
        assert parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        assert counts(parts, extent) == (10, 10)
        assert CONTROL_TOMBSTONE not in b"".join(controls(parts, extent))
        assert_holds(parts, dict.fromkeys(keys[:10], VALUE), iter(keys[10:]))
        assert not parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS), (
            "nothing is left to drop"
        )
    assert_consistent(path)


@pytest.mark.parametrize("live", [100, 900])
def test_rewrite_drops_what_has_expired_and_frees_its_records(path: Path, live: int) -> None:
    """Into itself with few that live, into two with many."""
    with open_components(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 4, long=True)
        keys = [next(several) for _ in range(live + 200)]
        for number, key in enumerate(keys):
            expires_at = NOW_MS + 1_000 if number >= live else (NOW_MS + 5_000) * (number % 2)
            parts.store(key, VALUE, expires_at)
        extent = parts.file.directory[4 << 11]
        now_ms = NOW_MS + 1_000
        assert parts.segments.count(extent, now_ms - 1) == live + 200
        assert parts.segments.count(extent, now_ms) == live
        assert parts.segments.split_or_compact(parts.hash(keys[0]), now_ms)
        segments = list(parts.segments.segments(4))
        assert len(segments) == (1 if live == 100 else 2)
        assert sum(counts(parts, each)[0] for each in segments) == live
        assert_holds(parts, dict.fromkeys(keys[:live], VALUE), iter(keys[live:]))
        assert sorted(all_keys(parts, 4, now_ms)) == sorted(keys[:live])
        for each in segments:
            earliest = parts.file.words[map_entry_offset(each) + EARLIEST_OFFSET >> 3]
            assert earliest in (NOW_MS + 5_000, NO_EXPIRY)
    assert_consistent(path)


def test_purge_frees_what_has_expired_and_tells_how_many(path: Path) -> None:
    with open_components(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 4, long=True)
        keys = [next(several) for _ in range(300)]
        for number, key in enumerate(keys):
            parts.store(key, VALUE, NOW_MS + number if number else 0)
        extent = parts.file.directory[4 << 11]
        assert parts.segments.segment_expiry(4 << 11, NOW_MS) == (extent, 5 << 11, False)
        assert parts.segments.segment_expiry(4 << 11, NOW_MS + 1) == (extent, 5 << 11, True)
        assert parts.segments.purge(extent, NOW_MS) == 0
        assert parts.segments.purge(extent, NOW_MS + 100) == 100
        assert counts(parts, extent)[0] == 200
        left = {key: VALUE for number, key in enumerate(keys) if not number or number > 100}
        assert_holds(parts, left, iter(keys[1:101]))
        assert parts.segments.segment_expiry(4 << 11, NOW_MS + 100) == (extent, 5 << 11, False)
        assert parts.segments.segment_expiry(4 << 11, NOW_MS + 101) == (extent, 5 << 11, True)
    assert_consistent(path)


def test_segment_goes_on_filling_where_no_extent_is_left_to_split_it(path: Path) -> None:
    with open_components(path, 4 * MIB) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 11)
        keys = [next(several) for _ in range(SEGMENT_SLOTS)]
        for key in keys[:SPLIT_AT]:
            parts.store(key, VALUE)
        fillers = []
        with pytest.raises(StoreFullError):
            while True:
                fillers.append(parts.slab.allocate(16_544))
        assert not parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        for filler in fillers[3:]:
            parts.slab.free(filler)
        more = []
        with pytest.raises(StoreFullError):
            while True:
                more.append(parts.slab.allocate(16_544))
        assert not parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        # A few deleted ones are worth a rewrite into itself.
        for key in keys[:50]:
            parts.remove(key)
        expected = dict.fromkeys(keys[50:SPLIT_AT], VALUE)
        parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        assert_holds(parts, expected, iter(keys[:50]))
        for filler in fillers[:3] + more:
            parts.slab.free(filler)
        assert not parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS), (
            "of what is not flushed"
        )
        parts.slab.free_spare()
        parts.file.flush()
        assert parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        assert len(list(parts.segments.segments(11))) == 2
        assert_holds(parts, expected, iter(keys[:50]))
    assert_consistent(path)


def test_slot_that_landed_in_the_wrong_segment_is_dropped_at_a_rewrite(path: Path) -> None:
    """No search comes there for its key. The next opening finds the record, if it is whole."""
    with open_components(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 4)
        keys = [next(several) for _ in range(50)]
        slots = [parts.store(key, VALUE) for key in keys]
        parts.file.write(slots[7], b"\xff")
        parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        stranger = parts.hash(b"\xff" + keys[7][1:])
        rest = [key for key in keys if key != keys[7]]
        if stranger >> 60 != 4:
            assert counts(parts, parts.file.directory[4 << 11])[0] == 49
        assert_holds(parts, dict.fromkeys(rest, VALUE), iter([keys[7]]))
        parts.file.require_rebuild()
    with open_components(path) as parts:
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter([]))
    assert_consistent(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_segment_whose_depth_is_damaged_hides_and_harms_none_of_its_neighbours(
    path: Path, change: int
) -> None:
    """One too low, its keys would seem to be all that two segments hold, and a rewrite make it so.

    The prefix of a lower half is a possible one for the whole, too.
    """
    with open_components(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 6)
        keys = [next(several) for _ in range(SPLIT_AT)]
        for key in keys:
            parts.store(key, VALUE)
        for _ in range(2):
            parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        lower, *others = parts.segments.segments(6)
        boundary = parts.file.directory[6 << 11 :].tolist().index(others[0]) + (6 << 11)
        neighbours = [key for key in keys if parts.hash(key) >> 49 >= boundary]
        depth = parts.file.map[(lower << EXTENT_SHIFT) + 16]
        parts.file.write((lower << EXTENT_SHIFT) + 16, bytes([depth + change]))
        with pytest.raises(CorruptStoreError, match="depth"):
            list(parts.segments.segments(6))
        _, position, damage = parts.segments.segment_keys(6 << 11, NOW_MS)
        assert position == boundary
        assert len(damage) == 1
        hash_of_lower = next(parts.hash(key) for key in keys if key not in neighbours)
        with pytest.raises(CorruptStoreError, match="depth"):
            parts.segments.split_or_compact(hash_of_lower, NOW_MS)
        found = 0
        for key in keys:
            try:
                assert parts.slots.find(parts.hash(key), key) > 0
                found += 1
            except CorruptStoreError:  # its way leads through the damaged bucket
                assert key not in neighbours
        assert len(neighbours) <= found <= len(keys)
        parts.file.require_rebuild()
    with open_components(path) as parts:
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter([]))
    assert_consistent(path)


def test_segment_that_counts_fewer_slots_than_it_has_can_be_emptied(path: Path) -> None:
    with open_components(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 6)
        keys = [next(several) for _ in range(5)]
        for key in keys:
            parts.store(key, VALUE)
        extent = parts.file.directory[6 << 11]
        entry = map_entry_offset(extent)
        parts.file.write(entry, SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, 0, 3, 0, 2**64 - 1))
        for number, key in enumerate(keys):
            parts.remove(key)
            assert_holds(parts, dict.fromkeys(keys[number + 1 :], VALUE), iter(keys[: number + 1]))
        with pytest.raises(CorruptStoreError, match=f"extent {extent} "):
            parts.segments.count(extent, NOW_MS)
    with open_components(path) as parts:
        assert parts.segments.count(extent, NOW_MS) == 0
    assert_consistent(path)
