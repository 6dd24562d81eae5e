"""The table against a dictionary and against a plain search written from the format's description.

`Reader` knows nothing of the library but what the docstring of `layout` says, in numbers of its
own. It sees every file that these tests make.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from support import MIB, scaled, seeded_random
from support.clock import FakeClock
from support.parts import NOW_MS, FaultyDoor, Parts, open_parts, replace_door
from xxhash import xxh3_64_intdigest

import kvstore.file.platform
from kvstore import CorruptStoreError, KVStore, StoreFullError
from kvstore.file.rollback import Rollback
from kvstore.format.codec import Value
from kvstore.format.layout import (
    BUCKET_SIZE,
    CONTROL_EMPTY,
    CONTROL_OFFSET,
    CONTROL_TOMBSTONE,
    DIRECTORY_ENTRIES,
    EARLIEST_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    KIND_SEGMENT,
    NO_EXPIRY,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SLOT_COUNT,
    SPLIT_AT,
    U64,
    map_entry_offset,
)
from kvstore.recovery.check import check_file

VALUE: Final = b'{"b":1}'


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power loss, and waiting for the disk is most of an opening's time."""
    monkeypatch.setattr(os, "fdatasync", lambda _fd: None)
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


class Reader:
    """A search in the bytes of a file, after the docstring of `layout`, as plain as can be."""

    def __init__(self, image: bytes) -> None:
        self._image = image
        self._seed = self._number(32, 8)

    def _number(self, offset: int, size: int) -> int:
        return int.from_bytes(self._image[offset : offset + size], "little")

    def find(self, key: bytes) -> int:
        """Return the offset of the slot of `key`; -1 where it is absent."""
        hash_of_key = xxh3_64_intdigest(key, self._seed)
        segment = self._number(65_536 + 2 * (hash_of_key >> 49), 2) * 65_536
        fingerprint = hash_of_key >> 4 & 255
        for step in range(16):
            bucket = segment + (hash_of_key + step) % 16 * 4_096
            assert self._number(bucket, 8) == 0x4B425630 << 32 | bucket // 4_096
            control = self._image[bucket + 32 : bucket + 112]
            for index in range(80):
                slot = bucket + 256 + 48 * index
                if control[index] == fingerprint + 2 * (fingerprint < 2) and self._is(slot, key):
                    return slot
            if 0 in control:
                return -1
        return -1

    def _is(self, slot: int, key: bytes) -> bool:
        record = self._number(slot + 40, 4)
        size = self._number(slot + 46, 1)
        start = self._image[slot : slot + 32]
        whole = self._image[record + 32 : record + 32 + size]
        return size == len(key) and start == key[:32].ljust(32, b"\0") and whole == key

    def value(self, key: bytes) -> bytes | None:
        """Return the value of `key`; None where it is absent."""
        slot = self.find(key)
        if slot < 0:
            return None
        record = self._number(slot + 40, 4)
        value_size = self._number(slot + 44, 2)
        start = record + 32 + len(key)
        value = self._image[start : start + value_size]
        created_at, expires_at = self._number(record + 8, 8), self._number(record + 16, 8)
        assert self._number(slot + 32, 8) == expires_at
        hash_of_key = xxh3_64_intdigest(key, self._seed)
        seed = (hash_of_key ^ created_at ^ expires_at << 16 ^ record) % 2**64
        assert self._number(record + 24, 8) == xxh3_64_intdigest(value, seed)
        return value


def assert_consistent(path: Path) -> None:
    assert [str(problem) for problem in check_file(path)] == []


def assert_holds(parts: Parts, expected: dict[bytes, bytes], absent: Iterator[bytes]) -> None:
    """Assert that the table and the plain search find just this."""
    reader = Reader(parts.file.map[: parts.file.size])
    for key, value in expected.items():
        slot = parts.slots.find(parts.hash(key), key)
        assert slot == reader.find(key) > 0
        assert reader.value(key) == value
    for key in absent:
        assert parts.slots.find(parts.hash(key), key) <= 0
        assert reader.find(key) == -1


def controls(parts: Parts, extent: int) -> list[bytes]:
    """Return the control bytes of each bucket of a segment."""
    start = extent << EXTENT_SHIFT
    return [
        parts.file.map[bucket + CONTROL_OFFSET : bucket + CONTROL_OFFSET + SLOT_COUNT]
        for bucket in range(start, start + EXTENT_SIZE, BUCKET_SIZE)
    ]


def counts(parts: Parts, extent: int) -> tuple[int, int]:
    """Return how many slots are live and how many used, as the segment's entry says."""
    _, _, live, used, _, _ = SEGMENT_ENTRY.unpack_from(parts.file.map, map_entry_offset(extent))
    return live, used


def keys_where(
    parts: Parts, wanted: Callable[[int], bool], *, long: bool = False
) -> Iterator[bytes]:
    """Yield keys, without end, whose hashes are wanted."""
    number = 0
    while True:
        number += 1
        key = f"{'é' * 16 if long else ''}{number}".encode()
        if wanted(parts.hash(key)):
            yield key


def home_in(directory: int, bucket: int) -> Callable[[int], bool]:
    """Tell hashes of one stripe's first segment and one home bucket."""
    return lambda hash_of_key: hash_of_key >> 60 == directory and hash_of_key & 15 == bucket


# --- find, insert, delete ----------------------------------------------------------------------


@pytest.mark.parametrize("tails", [1, 3])
def test_random_inserts_and_deletes_do_as_a_dictionary_does(path: Path, tails: int) -> None:
    """Also with keys longer than 32 bytes, of which several share the first 32."""
    rng = seeded_random()
    keys = [
        (f"{'é' * 16 if number % tails else ''}{number}" + "\0" * (number % 2)).encode()
        for number in range(600)
    ]
    model: dict[bytes, bytes] = {}
    with open_parts(path) as parts:
        for count in range(scaled(6_000)):
            key = rng.choice(keys)
            slot = parts.slots.find(parts.hash(key), key)
            assert (slot > 0) == (key in model)
            if key in model:
                parts.remove(key)
                del model[key]
            else:
                model[key] = b'{"n":%d}' % count
                parts.store(key, model[key], rng.choice((0, NOW_MS + 5)))
        assert_holds(parts, model, (key for key in keys if key not in model))
        found = [key for stripe in range(16) for key in all_keys(parts, stripe)]
        assert sorted(found) == sorted(model)
    assert_consistent(path)


def all_keys(parts: Parts, stripe: int, now_ms: int = NOW_MS) -> list[bytes]:
    """Return the keys of a stripe as iteration gives them."""
    run = DIRECTORY_ENTRIES // 16
    position, found = stripe * run, []
    while position < (stripe + 1) * run:
        keys, position, damage = parts.segments.segment_keys(position, now_ms)
        assert damage == []
        found += keys
    return found


def test_keys_that_differ_only_in_length_or_behind_their_first_32_bytes_are_apart(
    path: Path,
) -> None:
    start = b"s" * 32
    keys = [b"", b"\0", b"\0\0", b"x", b"xy", b"\0" * 96, b"x" * 96, b"x" * 95 + b"y"]
    family = [*(start + tail for tail in keys), start[:31], start[:31] + b"\0", b"s", b"s\0"]
    with open_parts(path) as parts:
        for number, key in enumerate(family):
            parts.store(key, b'{"n":%d}' % number)
        expected = {key: b'{"n":%d}' % number for number, key in enumerate(family)}
        assert_holds(parts, expected, iter([start + b"y", start[:30]]))
        for key in family:
            parts.remove(key)
            del expected[key]
            assert_holds(parts, expected, iter([key]))
    assert_consistent(path)


@pytest.mark.parametrize("long", [False, True])
def test_keys_of_one_fingerprint_and_home_are_told_apart(path: Path, long: bool) -> None:
    """The control bytes say that each of them may be each other."""
    with open_parts(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key & 0xFFF == 0x123, long=long)
        keys = [next(several) for _ in range(12)]
        for key in keys[:10]:
            parts.store(key, b'{"k":"%s"}' % key[-3:])
        expected = {key: b'{"k":"%s"}' % key[-3:] for key in keys[:10]}
        assert_holds(parts, expected, iter(keys[10:]))
        for key in keys[:10:2]:
            parts.remove(key)
            del expected[key]
        assert_holds(parts, expected, iter(keys[10:] + keys[:10:2]))
    assert_consistent(path)


@pytest.mark.parametrize("home", [0, 7, 15])
def test_full_buckets_are_passed_and_the_last_is_followed_by_the_first(
    path: Path, home: int
) -> None:
    with open_parts(path) as parts:
        several = keys_where(parts, home_in(3, home))
        keys = [next(several) for _ in range(3 * SLOT_COUNT + 5)]
        for number, key in enumerate(keys):
            slot = parts.store(key, VALUE)
            bucket = (slot & EXTENT_SIZE - 1) // BUCKET_SIZE
            assert bucket == (home + number // SLOT_COUNT) % 16
        extent = parts.file.directory[3 << 11]
        full = [not each.count(CONTROL_EMPTY) for each in controls(parts, extent)]
        assert [b for b in range(16) if full[b]] == sorted((home + n) % 16 for n in range(3))
        assert_holds(parts, dict.fromkeys(keys, VALUE), (next(several) for _ in range(20)))
    assert_consistent(path)


def test_full_segment_has_no_slot_to_give_and_still_finds_all(path: Path) -> None:
    with open_parts(path) as parts:
        several = keys_where(parts, lambda hash_of_key: hash_of_key >> 60 == 5)
        keys = [next(several) for _ in range(SEGMENT_SLOTS)]
        for key in keys:
            parts.store(key, VALUE)
        stranger = next(several)
        assert parts.slots.find(parts.hash(stranger), stranger) == 0
        extent = parts.file.directory[5 << 11]
        assert counts(parts, extent) == (SEGMENT_SLOTS, SEGMENT_SLOTS)
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter([stranger]))
        # Its only free slot is a tombstone, which serves the next one, wherever its home is.
        parts.remove(keys[77])
        assert counts(parts, extent) == (SEGMENT_SLOTS - 1, SEGMENT_SLOTS)
        assert parts.slots.find(parts.hash(stranger), stranger) < 0
        parts.store(stranger, VALUE)
        assert parts.slots.find(parts.hash(keys[77]), keys[77]) == 0
    assert_consistent(path)


def test_bucket_with_an_empty_slot_never_has_a_tombstone(path: Path) -> None:
    """However inserts and deletes follow each other, in buckets that are nearly full."""
    rng = seeded_random()
    with open_parts(path) as parts:
        several = keys_where(
            parts, lambda hash_of_key: hash_of_key >> 60 == 9 and hash_of_key & 15 < 8
        )
        keys = [next(several) for _ in range(960)]
        extent = parts.file.directory[9 << 11]
        live: set[bytes] = set()
        tombstones = 0
        for _ in range(scaled(5_000)):
            key = rng.choice(keys)
            if key not in live:
                parts.store(key, VALUE)
                live.add(key)
            elif rng.random() < 0.4:
                parts.remove(key)
                live.remove(key)
            if rng.random() < 0.02:
                each = controls(parts, extent)
                assert not [c for c in each if CONTROL_EMPTY in c and CONTROL_TOMBSTONE in c]
                used = SEGMENT_SLOTS - sum(c.count(CONTROL_EMPTY) for c in each)
                assert counts(parts, extent) == (len(live), used)
                tombstones = max(tombstones, used - len(live))
        assert tombstones, "the test met no tombstone"
        assert_holds(parts, dict.fromkeys(live, VALUE), (key for key in keys if key not in live))
    assert_consistent(path)


def test_delete_leaves_an_empty_slot_or_a_tombstone_which_the_next_insert_takes(
    path: Path,
) -> None:
    with open_parts(path) as parts:
        several = keys_where(parts, home_in(0, 4))
        keys = [next(several) for _ in range(SLOT_COUNT + 1)]
        extent = parts.file.directory[0]
        slots = [parts.store(key, VALUE) for key in keys[:-2]]
        parts.remove(keys[10])
        assert controls(parts, extent)[4][10] == CONTROL_EMPTY
        assert parts.store(keys[10], VALUE) == slots[10]
        slots += [parts.store(key, VALUE) for key in keys[-2:]]
        assert slots[-1] & EXTENT_SIZE - 1 > 5 * BUCKET_SIZE, "bucket 4 is full, 5 has one"
        parts.remove(keys[10])
        parts.remove(keys[40])
        assert controls(parts, extent)[4].count(CONTROL_TOMBSTONE) == 2
        assert controls(parts, extent)[4].count(CONTROL_EMPTY) == 0
        assert parts.slots.find(parts.hash(keys[-1]), keys[-1]) == slots[-1]
        assert parts.store(keys[40], VALUE) == slots[10]
        assert counts(parts, extent) == (SLOT_COUNT, SLOT_COUNT + 1)
    assert_consistent(path)


def test_delete_leaves_a_damaged_record_alone_and_the_next_opening_sorts_it_out(
    path: Path,
) -> None:
    with open_parts(path) as parts:
        slot = parts.store(b"a", VALUE)
        parts.store(b"b", VALUE)
        record = parts.file.words[slot + 40 >> 3] & 0xFFFF_FFFF
        parts.file.write(record + 4, b"\x7f")
        before = parts.file.map[record : record + 64]
        parts.remove(b"a")
        assert parts.slots.find(parts.hash(b"a"), b"a") < 0
        assert parts.file.map[record : record + 64] == before
    with open_parts(path) as parts:
        assert_holds(parts, {b"b": VALUE}, iter([b"a"]))
    assert_consistent(path)


def test_page_without_its_marker_is_damage_to_every_use(path: Path) -> None:
    with open_parts(path) as parts:
        key = next(keys_where(parts, home_in(2, 6)))
        parts.store(key, VALUE)
        extent = parts.file.directory[2 << 11]
        bucket = (extent << EXTENT_SHIFT) + 6 * BUCKET_SIZE
        before = parts.file.map[bucket : bucket + BUCKET_SIZE]
        parts.file.write(bucket, bytes(BUCKET_SIZE))
        parts.file.write(map_entry_offset(extent) + EARLIEST_OFFSET, U64.pack(1))
        message = f"the page at byte {bucket:,} is no bucket"
        acts: tuple[Callable[[], object], ...] = (
            lambda: parts.slots.find(parts.hash(key), key),
            lambda: parts.segments.split_or_compact(parts.hash(key), NOW_MS),
            lambda: parts.segments.count(extent, NOW_MS),
            lambda: parts.segments.purge(extent, NOW_MS),
        )
        for act in acts:
            with pytest.raises(CorruptStoreError, match=message):
                act()
        _, _, damage = parts.segments.segment_keys(2 << 11, NOW_MS)
        assert len(damage) == 1
        assert message in damage[0]
        parts.file.write(bucket, before)
        parts.file.write(map_entry_offset(extent) + EARLIEST_OFFSET, U64.pack(NO_EXPIRY))
    assert_consistent(path)


# --- rewriting ---------------------------------------------------------------------------------


def test_segment_more_than_half_full_is_split_in_two(path: Path) -> None:
    with open_parts(path) as parts:
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
    with open_parts(path) as parts:
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
    with open_parts(path) as parts:
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
    with open_parts(path) as parts:
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
    with open_parts(path) as parts:
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
    with open_parts(path, 4 * MIB) as parts:
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
    with open_parts(path) as parts:
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
    with open_parts(path) as parts:
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter([]))
    assert_consistent(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_segment_whose_depth_is_damaged_hides_and_harms_none_of_its_neighbours(
    path: Path, change: int
) -> None:
    """One too low, its keys would seem to be all that two segments hold, and a rewrite make it so.

    The prefix of a lower half is a possible one for the whole, too.
    """
    with open_parts(path) as parts:
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
    with open_parts(path) as parts:
        assert_holds(parts, dict.fromkeys(keys, VALUE), iter([]))
    assert_consistent(path)


def test_segment_that_counts_fewer_slots_than_it_has_can_be_emptied(path: Path) -> None:
    with open_parts(path) as parts:
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
    with open_parts(path) as parts:
        assert parts.segments.count(extent, NOW_MS) == 0
    assert_consistent(path)


# --- cut short ---------------------------------------------------------------------------------


Act = Callable[[KVStore, list[str]], None]


def fill(store: KVStore, count: int) -> list[str]:
    """Fill one segment of a store to `count` used slots; return its keys."""
    keys: list[str] = []
    number = 0
    while len(keys) < count:
        number += 1
        key = f"{'é' * 16 if number % 9 == 0 else ''}{number}"
        if xxh3_64_intdigest(key.encode(), store._seed) >> 60 == 7:
            keys.append(key)
            store.create(key, {"n": number}, ttl=1_000 if number % 3 == 0 else None)
    return keys


def next_key(store: KVStore, keys: list[str]) -> str:
    """Return another key of the segment that `fill` filled."""
    number = int(keys[-1].strip("é"))
    while True:
        number += 1
        if xxh3_64_intdigest(str(number).encode(), store._seed) >> 60 == 7:
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
        for kind in ("interrupt", "interrupt of a pwrite")
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
    monkeypatch.setattr(kvstore.file.platform, "overwrites_in_place", lambda _fd: in_place)
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
        fault = FaultyDoor(store._file, fail_at, KeyboardInterrupt())
        try:
            act(store, keys)
        except KeyboardInterrupt as raised:
            outcome = type(raised).__name__
        reached = fault.reached
        note = f"write {fail_at}: {outcome}"
        assert reached or outcome == "done"
        if store._file.write is fault:  # else nothing may be written any more
            replace_door(store._file, write)
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
    before: dict[str, Value],
    after: dict[str, Value],
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
    with open_parts(path) as parts:
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
