"""Slots are found, filled and emptied as a dictionary does, wherever the buckets have room."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support import scaled, seeded_random
from support.components import NOW_MS, open_components
from support.consistency import assert_consistent
from support.table import all_keys, assert_holds, controls, counts, home_in, keys_where

from kvstore import CorruptStoreError
from kvstore.format.layout import (
    BUCKET_SIZE,
    CONTROL_EMPTY,
    CONTROL_TOMBSTONE,
    EARLIEST_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    NO_EXPIRY,
    SEGMENT_SLOTS,
    SLOT_COUNT,
    U64,
    map_entry_offset,
)

VALUE: Final = b'{"b":1}'


@pytest.mark.parametrize("tails", [1, 3])
def test_random_inserts_and_deletes_do_as_a_dictionary_does(path: Path, tails: int) -> None:
    """Also with keys longer than 32 bytes, of which several share the first 32."""
    rng = seeded_random()
    keys = [
        (f"{'é' * 16 if number % tails else ''}{number}" + "\0" * (number % 2)).encode()
        for number in range(600)
    ]
    model: dict[bytes, bytes] = {}
    with open_components(path) as parts:
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


def test_keys_that_differ_only_in_length_or_behind_their_first_32_bytes_are_apart(
    path: Path,
) -> None:
    start = b"s" * 32
    keys = [b"", b"\0", b"\0\0", b"x", b"xy", b"\0" * 96, b"x" * 96, b"x" * 95 + b"y"]
    family = [*(start + tail for tail in keys), start[:31], start[:31] + b"\0", b"s", b"s\0"]
    with open_components(path) as parts:
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
    with open_components(path) as parts:
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
    with open_components(path) as parts:
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
    with open_components(path) as parts:
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
    with open_components(path) as parts:
        several = keys_where(
            parts, lambda hash_of_key: hash_of_key >> 60 == 9 and hash_of_key & 15 < 8
        )
        keys = [next(several) for _ in range(960)]
        extent = parts.file.directory[9 << 11]
        live: set[bytes] = set()
        tombstones = 0
        for _ in range(max(2_500, scaled(5_000))):
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
    with open_components(path) as parts:
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
    with open_components(path) as parts:
        slot = parts.store(b"a", VALUE)
        parts.store(b"b", VALUE)
        record = parts.file.words[slot + 40 >> 3] & 0xFFFF_FFFF
        parts.file.write(record + 4, b"\x7f")
        before = parts.file.map[record : record + 64]
        parts.remove(b"a")
        assert parts.slots.find(parts.hash(b"a"), b"a") < 0
        assert parts.file.map[record : record + 64] == before
    with open_components(path) as parts:
        assert_holds(parts, {b"b": VALUE}, iter([b"a"]))
    assert_consistent(path)


def test_page_without_its_marker_is_damage_to_every_use(path: Path) -> None:
    with open_components(path) as parts:
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
