"""Segments that are nearly empty become one, or move to another extent, and lose nothing by it."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Final

import pytest
from support import MIB
from support.components import (
    NOW_MS,
    Components,
    FaultyWrites,
    FullDisk,
    open_components,
    replace_writes,
)
from support.consistency import assert_consistent
from support.platforms import needs_pwrite
from support.table import all_keys, assert_holds, counts, keys_where

import kvstore.file.platform
from kvstore import CorruptStoreError, StoreFullError
from kvstore.format.layout import (
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    KIND_FREE,
    KIND_SEGMENT,
    NO_EXTENT,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SPLIT_AT,
    map_entry_offset,
)

VALUE: Final = b'{"b":1}'
STRIPE: Final = 6
FIRST: Final = STRIPE << 11
MIDDLE: Final = FIRST + 1_024

Act = Callable[[Components], bool]


def split(parts: Components, left: int, *, expiring: int = 0) -> list[bytes]:
    """Fill a segment, have it split, and delete all but so many keys; return these.

    Some of them expire a second later.
    """
    several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == STRIPE)
    keys = list(islice(several, SPLIT_AT))
    for number, key in enumerate(keys):
        parts.store(key, VALUE, NOW_MS + 1_000 if number < expiring else 0)
    assert parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
    for key in keys[left:]:
        parts.remove(key)
    return keys[:left]


def segments(parts: Components) -> list[int]:
    return list(parts.segments.segments(STRIPE))


def kind_of(parts: Components, extent: int) -> int:
    return parts.file.map[map_entry_offset(extent)]


def free_extents(parts: Components) -> list[int]:
    """Return the extents on the list of free ones, in its order."""
    found = []
    extent = parts.file.shorts[FREE_EXTENTS_OFFSET >> 1]
    while extent != NO_EXTENT:
        found.append(extent)
        extent = parts.file.shorts[map_entry_offset(extent) + 10 >> 1]
    return found


@pytest.mark.parametrize("position", [FIRST, FIRST + 77, MIDDLE, MIDDLE + 1_023])
def test_buddies_that_are_nearly_empty_become_one(path: Path, position: int) -> None:
    with open_components(path) as parts:
        keys = split(parts, 300)
        lower, upper = segments(parts)
        assert parts.segments.is_mergeable(position) == (True, (position & -1_024) + 1_024)
        assert parts.segments.merge(position, NOW_MS)
        assert segments(parts) == [lower]
        assert parts.file.directory[FIRST : FIRST + 2_048].tolist() == [lower] * 2_048
        assert counts(parts, lower) == (300, 300)
        assert kind_of(parts, upper) == KIND_FREE
        assert free_extents(parts) == [upper]
        assert not any(parts.file.map[upper << EXTENT_SHIFT : (upper + 1) << EXTENT_SHIFT])
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter(()))
        assert sorted(all_keys(parts, STRIPE)) == sorted(keys)
        assert parts.segments.is_mergeable(position) == (False, FIRST + 2_048), "the least depth"
        assert not parts.segments.merge(position, NOW_MS)
    assert_consistent(path)


def test_buddies_with_more_than_half_a_segment_stay_two(path: Path) -> None:
    """Else the next few keys would have them split once more."""
    with open_components(path) as parts:
        keys = split(parts, SEGMENT_SLOTS // 2 + 1)
        assert not parts.segments.is_mergeable(FIRST)[0]
        assert not parts.segments.merge(FIRST, NOW_MS)
        parts.remove(keys[0])
        assert parts.segments.merge(FIRST, NOW_MS)
        assert_holds(parts, dict.fromkeys(keys[1:], VALUE), iter(keys[:1]))
    assert_consistent(path)


def test_segment_does_not_merge_with_one_that_was_split_further(path: Path) -> None:
    """The smaller ones have to become one first."""
    with open_components(path) as parts:
        keys = split(parts, 700)
        lowest = next(key for key in keys if parts.hash(key) >> 49 < MIDDLE)
        more = keys_where(parts, lambda hash_of_key: hash_of_key >> 59 == STRIPE * 2)
        for key in islice((key for key in more if key not in keys), 700):
            parts.store(key, VALUE)
            keys.append(key)
        assert parts.segments.split_or_compact(parts.hash(lowest), NOW_MS)
        assert len(segments(parts)) == 3
        for key in keys[30:]:
            parts.remove(key)
        assert not parts.segments.merge(MIDDLE, NOW_MS)
        assert parts.segments.merge(FIRST, NOW_MS)
        assert parts.segments.merge(FIRST, NOW_MS)
        assert len(segments(parts)) == 1
        assert_holds(parts, dict.fromkeys(keys[:30], VALUE), iter(keys[30:]))
    assert_consistent(path)


def test_merge_drops_what_has_expired_and_frees_its_records(path: Path) -> None:
    with open_components(path) as parts:
        keys = split(parts, 300, expiring=100)
        lower, _ = segments(parts)
        assert parts.segments.merge(FIRST, NOW_MS + 1_000)
        assert counts(parts, lower) == (200, 200)
        assert_holds(parts, dict.fromkeys(keys[100:], VALUE), iter(keys[:100]))
    assert_consistent(path)


@pytest.mark.parametrize("act", ["merge", "relocate"])
def test_nothing_is_merged_or_moved_where_a_slot_is_damaged(path: Path, act: str) -> None:
    """A rewrite drops it, for it must go on. Here nobody needs it to."""
    with open_components(path) as parts:
        keys = split(parts, 300)
        slot = parts.slots.find(parts.hash(keys[7]), keys[7])
        parts.file.write(slot, b"\xff")
        before = parts.file.map[: parts.file.size]
        if act == "merge":
            assert not parts.segments.merge(FIRST, NOW_MS)
        else:
            assert not parts.segments.relocate(
                parts.hash(keys[7]) >> 49, parts.file.extent_count, NOW_MS
            )
        assert parts.file.map[: parts.file.size] == before
        parts.file.write(slot, keys[7][:1])
    assert_consistent(path)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("page", [0, 5])
def test_damaged_page_keeps_a_segment_and_its_buddy_from_merging(
    path: Path, half: int, page: int
) -> None:
    with open_components(path) as parts:
        keys = split(parts, 300)
        bucket = (segments(parts)[half] << EXTENT_SHIFT) + page * 4_096
        was = parts.file.map[bucket : bucket + 8]
        parts.file.write(bucket, b"damaged!")
        before = parts.file.map[: parts.file.size]
        positions = (FIRST, MIDDLE)
        assert [parts.segments.is_mergeable(position) for position in positions] == [
            (page != 0, MIDDLE),
            (page != 0, FIRST + 2_048),
        ]
        for position in positions:
            with pytest.raises(CorruptStoreError, match="no bucket of the table"):
                parts.segments.merge(position, NOW_MS)
        assert parts.file.map[: parts.file.size] == before
        parts.file.write(bucket, was)
        assert parts.segments.merge(FIRST, NOW_MS)
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter(()))
    assert_consistent(path)


def test_entry_that_counts_too_few_slots_overfills_no_segment(path: Path) -> None:
    with open_components(path) as parts:
        split(parts, 900)
        for extent in segments(parts):
            parts.file.write(
                map_entry_offset(extent), SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, 3, 3, 0, 2**64 - 1)
            )
        assert parts.segments.is_mergeable(FIRST)[0]
        assert not parts.segments.merge(FIRST, NOW_MS)
        parts.file.require_rebuild()
    with open_components(path):
        pass
    assert_consistent(path)


# --- its extent --------------------------------------------------------------------------------


def test_extent_that_a_merge_has_freed_is_for_any_size_at_once(path: Path) -> None:
    with open_components(path, 8 * MIB) as parts:
        keys = split(parts, 300)
        _, upper = segments(parts)
        parts.slab.free_spare()
        fresh = parts.file.shorts[FRESH_EXTENT_OFFSET >> 1]
        assert parts.segments.merge(FIRST, NOW_MS)
        record = parts.slab.allocate(5_000)
        assert record >> EXTENT_SHIFT == upper
        assert parts.file.shorts[FRESH_EXTENT_OFFSET >> 1] == fresh
        parts.slab.free(record)
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter(()))
    assert_consistent(path)


def test_extent_that_a_merge_has_freed_is_for_the_table_at_once(path: Path) -> None:
    with open_components(path) as parts:
        split(parts, 300)
        _, upper = segments(parts)
        assert parts.segments.merge(FIRST, NOW_MS)
        others = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 9)
        keys = list(islice(others, SPLIT_AT))
        for key in keys:
            parts.store(key, VALUE)
        assert parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        assert list(parts.segments.segments(9))[1] == upper
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter(()))
    assert_consistent(path)


def test_extent_is_a_slab_a_segment_and_a_slab_of_another_size_in_one_opening(path: Path) -> None:
    """What is known of the records in it holds on: those of its time as a slab were cleared."""
    with open_components(path) as parts:
        keys = split(parts, 300)
        _, extent = segments(parts)
        parts.slab.free_spare()
        parts.file.flush()
        assert parts.segments.merge(FIRST, NOW_MS)
        record = parts.slab.allocate(5_000)
        assert record >> EXTENT_SHIFT == extent
        parts.slab.free(record)
        parts.slab.free_spare()
        parts.file.flush()
        more = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == STRIPE)
        added = list(islice((key for key in more if key not in keys), 400))
        for key in added:
            parts.store(key, VALUE)
        assert parts.segments.split_or_compact(parts.hash(keys[0]), NOW_MS)
        assert segments(parts)[1] == extent
        for key in added:
            parts.remove(key)
        assert parts.segments.merge(FIRST, NOW_MS)
        records = [parts.slab.allocate(900) for _ in range(20)]
        assert {record >> EXTENT_SHIFT for record in records} == {extent}
        for record in records:
            parts.slab.free(record)
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter(()))
    assert_consistent(path)


# --- moved -------------------------------------------------------------------------------------


def with_room_before(parts: Components) -> tuple[list[bytes], int, int]:
    """Have two segments, and a free extent before the second's; return keys and both extents."""
    fillers = [parts.slab.allocate(16_544) for _ in range(6)]
    keys = split(parts, 300)
    for filler in fillers:
        parts.slab.free(filler)
    parts.slab.free_spare()
    parts.file.flush()
    return keys, fillers[0] >> EXTENT_SHIFT, segments(parts)[1]


def test_segment_moves_to_a_free_extent_before_its_own(path: Path) -> None:
    with open_components(path) as parts:
        keys, free, upper = with_room_before(parts)
        lower = segments(parts)[0]
        assert not parts.segments.relocate(MIDDLE, free, NOW_MS), "none is before that"
        assert parts.segments.relocate(MIDDLE, free + 1, NOW_MS)
        assert segments(parts) == [lower, free]
        assert kind_of(parts, upper) == KIND_FREE
        assert upper in free_extents(parts)
        assert free not in free_extents(parts)
        assert not any(parts.file.map[upper << EXTENT_SHIFT : (upper + 1) << EXTENT_SHIFT])
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter(()))
        assert sorted(all_keys(parts, STRIPE)) == sorted(keys)
    assert_consistent(path)


def test_segment_moves_to_no_extent_whose_records_may_come_back(path: Path) -> None:
    """Power loss could bring back what was in it: the table would lose it to deleted records."""
    with open_components(path) as parts:
        filler = parts.slab.allocate(16_544)
        split(parts, 300)
        parts.slab.free(filler)
        parts.slab.free_spare()
        assert not parts.segments.relocate(MIDDLE, parts.file.extent_count, NOW_MS)
        parts.file.flush()
        assert parts.segments.relocate(MIDDLE, parts.file.extent_count, NOW_MS)
    assert_consistent(path)


def test_move_drops_what_has_expired(path: Path) -> None:
    with open_components(path) as parts:
        keys, free, _ = with_room_before(parts)
        upper = [key for key in keys if parts.hash(key) >> 49 >= MIDDLE]
        for key in upper[:40]:
            parts.remove(key)
            parts.store(key, VALUE, NOW_MS + 1_000)
        assert parts.segments.relocate(MIDDLE, free + 1, NOW_MS + 1_000)
        assert counts(parts, free) == (len(upper) - 40, len(upper) - 40)
        assert_holds(parts, dict.fromkeys(set(keys) - set(upper[:40]), VALUE), iter(upper[:40]))
    assert_consistent(path)


@pytest.mark.parametrize("link", [0, 5, 60_000])
def test_list_of_free_extents_that_leads_astray_moves_nothing(path: Path, link: int) -> None:
    with open_components(path) as parts:
        with_room_before(parts)
        place = map_entry_offset(free_extents(parts)[0]) + 10
        was = parts.file.map[place : place + 2]
        parts.file.write(place, (link or free_extents(parts)[0]).to_bytes(2, "little"))
        before = parts.file.map[: parts.file.size]
        with pytest.raises(CorruptStoreError, match="list"):
            parts.segments.relocate(MIDDLE, 0, NOW_MS)
        assert parts.file.map[: parts.file.size] == before
        parts.file.write(place, was)
    assert_consistent(path)


# --- cut short ---------------------------------------------------------------------------------


def merge(parts: Components) -> bool:
    return parts.segments.merge(FIRST, NOW_MS)


def move(parts: Components) -> bool:
    return parts.segments.relocate(MIDDLE, parts.file.extent_count, NOW_MS)


ACTS: Final = {"merge": merge, "move": move}
ERRORS: Final = {"interrupt": KeyboardInterrupt(), "full disk": StoreFullError("no room")}


def prepared(path: Path) -> tuple[bytes, list[bytes]]:
    """Return a file with a segment to merge and to move, closed, and the keys in it."""
    with open_components(path) as parts:
        keys, _, _ = with_room_before(parts)
    return path.read_bytes(), keys


def assert_is_whole(parts: Components, keys: list[bytes]) -> None:
    assert_holds(parts, dict.fromkeys(keys, VALUE), iter(()))
    assert sorted(all_keys(parts, STRIPE)) == sorted(keys)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("act", ACTS)
def test_each_write_of_it_cut_short_is_undone(path: Path, act: str, error: str) -> None:
    """In this opening and in the next, also where the process is killed just before the write."""
    start, keys = prepared(path)
    fail_at, is_reached = 1, True
    while is_reached:
        path.write_bytes(start)
        with open_components(path) as parts:
            before = parts.file.map[: parts.file.size]
            write = parts.file.write
            fault = FaultyWrites(parts.file, fail_at, ERRORS[error])
            try:
                assert ACTS[act](parts)
            except (KeyboardInterrupt, StoreFullError):
                assert parts.file.map[: parts.file.size] == before, f"write {fail_at}"
            is_reached = fault.reached
            replace_writes(parts.file, write)
            assert_is_whole(parts, keys)
            killed = path.read_bytes()
            if is_reached:
                assert ACTS[act](parts), "not tried again"
                assert_is_whole(parts, keys)
        assert_consistent(path)
        path.write_bytes(killed)
        with open_components(path) as parts:
            assert_is_whole(parts, keys)
        assert_consistent(path)
        fail_at += 1
    assert fail_at > 6


@pytest.mark.parametrize("act", ACTS)
def test_process_killed_before_each_write_of_it_loses_nothing(path: Path, act: str) -> None:
    start, keys = prepared(path)
    path.write_bytes(start)
    images: list[bytes] = []
    with open_components(path) as parts:
        write = parts.file.write

        def watch(offset: int, data: bytes) -> None:
            images.append(path.read_bytes())
            write(offset, data)

        replace_writes(parts.file, watch)
        assert ACTS[act](parts)
        replace_writes(parts.file, write)
    for image in images:
        path.write_bytes(image)
        with open_components(path) as parts:
            assert_is_whole(parts, keys)
        assert_consistent(path)


@needs_pwrite
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("lasting", [False, True])
def test_disk_that_refuses_to_be_overwritten_loses_nothing(
    path: Path, act: str, lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copy-on-write, and full: what cannot be undone either leaves all keys in their places."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: False)
    start, keys = prepared(path)
    fail_at, is_reached = 1, True
    while is_reached:
        path.write_bytes(start)
        with open_components(path) as parts, monkeypatch.context() as patch:
            before = parts.file.map[: parts.file.size]
            disk = FullDisk(fail_at, lasting=lasting)
            patch.setattr("os.pwrite", disk)
            try:
                assert ACTS[act](parts)
            except StoreFullError:
                if not lasting:
                    assert parts.file.map[: parts.file.size] == before, f"write {fail_at}"
            is_reached = disk.reached
            assert_is_whole(parts, keys)
        with open_components(path) as parts:
            assert_is_whole(parts, keys)
        assert_consistent(path)
        fail_at += 1
    assert fail_at > 6


@pytest.mark.parametrize("act", ACTS)
def test_shape_of_what_was_undone_is_not_given_once_more(path: Path, act: str) -> None:
    """Its pages may be in a copy that some program makes of the file."""
    start, _ = prepared(path)
    path.write_bytes(start)
    shapes: list[bytes] = []
    with open_components(path) as parts:
        write = parts.file.write

        def fail(offset: int, data: bytes) -> None:
            write(offset, data)
            if len(data) == EXTENT_SIZE and any(data[:8]):
                shapes.append(data[16:24])
                if len(shapes) == 1:
                    raise KeyboardInterrupt

        replace_writes(parts.file, fail)
        with pytest.raises(KeyboardInterrupt):
            ACTS[act](parts)
        assert ACTS[act](parts)
        replace_writes(parts.file, write)
    assert len(shapes) == len(set(shapes)) > 1
    assert_consistent(path)


# --- gone through ------------------------------------------------------------------------------


def test_keys_from_a_position_on_are_told_wherever_their_segment_begins(path: Path) -> None:
    """Those before it were told of by another call, before the segments had become one."""
    with open_components(path) as parts:
        keys = split(parts, 300)
        lower, following, damage = parts.segments.segment_keys(FIRST, NOW_MS)
        assert (following, damage) == (MIDDLE, [])
        assert parts.segments.merge(FIRST, NOW_MS)
        upper, following, damage = parts.segments.segment_keys(MIDDLE, NOW_MS)
        assert (following, damage) == (FIRST + 2_048, [])
        assert sorted(lower + upper) == sorted(keys)
    assert_consistent(path)
