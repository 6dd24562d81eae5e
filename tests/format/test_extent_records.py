"""The records of one extent: their magics, those that are whole, and the blocks between them."""

import random
from array import array
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import scaled, seeded_random
from support.implementations import IMPLEMENTATIONS
from xxhash import xxh3_64_intdigest

from kvstore.compiled import Implementation
from kvstore.format.extent_records import classify
from kvstore.format.found_words import found_word
from kvstore.format.layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    EXTENT_SIZE,
    FREE_BLOCK,
    FREE_MAGIC,
    MARKED_MAGIC,
    MARKED_MAGIC_BYTES,
    NO_BLOCK,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    RECORD_MAGIC_SIZE,
    SIZE_CLASSES,
    STAMP_LIMIT,
    STAMP_SHIFT,
    TIME_LIMIT,
    U64,
    record_checksum,
)
from kvstore.format.records import magics

SEED: Final = 0x0123456789ABCDEF
NOW_MS: Final = 1_700_000_000_000
STAMP: Final = NOW_MS << STAMP_SHIFT
VOID: Final = (NOW_MS << STAMP_SHIFT) - 5
BASE: Final = 9 * EXTENT_SIZE


@given(
    st.lists(
        st.tuples(
            st.integers(0, 200), st.sampled_from([b"\xff\xfeKR", b"\xff\xfeKD", b"\xff", b"\xfeKR"])
        )
    ),
    st.integers(0, 3),
)
def test_magics_are_counted(pieces: list[tuple[int, bytes]], rest: int) -> None:
    contents = b"".join(bytes(size) + piece for size, piece in pieces)
    contents += bytes(-len(contents) % 32 + 32 * rest)
    places = [
        place
        for place in range(len(contents))
        if contents[place : place + RECORD_MAGIC_SIZE] in (RECORD_MAGIC_BYTES, MARKED_MAGIC_BYTES)
    ]
    aligned = [place for place in places if place % 32 == 0]
    expected = (len(places), len(aligned), min(aligned, default=-1))
    for implementation in IMPLEMENTATIONS:
        assert implementation.find_magics(contents) == expected
    assert list(magics(contents)) == aligned


def record_at(
    position: int,
    key: bytes,
    value: bytes,
    *,
    stamp: int = STAMP,
    expires_at: int = 0,
    generation: int = 0,
    magic: int = RECORD_MAGIC,
) -> bytes:
    """Return a record with a true checksum, whatever else is wrong with it."""
    checksum = record_checksum(
        value, xxh3_64_intdigest(key, SEED), stamp, expires_at, BASE + position
    )
    header = RECORD.pack(magic, len(value), len(key), generation, stamp, expires_at, checksum)
    return header + key + value


def some_extent(
    rng: random.Random, size_class: int, fill: float, fields: Callable[[], dict[str, int]] = dict
) -> tuple[bytes, list[bytes]]:
    """Return an extent with whole records in some of its blocks, and the key of each block."""
    contents = bytearray(EXTENT_SIZE)
    size = BLOCK_SIZES[size_class]
    least = BLOCK_SIZES[size_class - 1] + 1 if size_class else RECORD_HEADER_SIZE + 3
    keys = [b""] * BLOCKS_PER_EXTENT[size_class]
    for block in range(len(keys)):
        if rng.random() < fill:
            whole = rng.randrange(least, size + 1) - RECORD_HEADER_SIZE
            key = rng.randbytes(rng.randint(max(1, whole - 16_384), min(128, whole - 2)))
            value = rng.randbytes(whole - len(key))
            expires_at = rng.choice((0, 0, NOW_MS + 1))
            record = record_at(block * size, key, value, expires_at=expires_at, **fields())
            contents[block * size : block * size + len(record)] = record
            keys[block] = key
    return bytes(contents), keys


@pytest.mark.parametrize("size_class", [0, 1, 5, 14, 15, 30, len(BLOCK_SIZES) - 1])
@pytest.mark.parametrize("fill", [0, 0.5, 1])
def test_whole_records_of_the_class_are_found(
    implementation: Implementation, size_class: int, fill: float
) -> None:
    """With their places, ascending, and the hashes of their keys."""
    contents, keys = some_extent(seeded_random(), size_class, fill)
    positions, words, doubtful, latest = implementation.scan_blocks(
        contents, BASE, size_class, SEED, NOW_MS, STAMP - 1
    )
    assert doubtful.tolist() == []
    assert latest == (STAMP if any(keys) else 0)
    size = BLOCK_SIZES[size_class]
    assert positions.tolist() == [block * size for block, key in enumerate(keys) if key]
    assert words.tolist() == [
        found_word(xxh3_64_intdigest(key, SEED), BASE + block * size)
        for block, key in enumerate(keys)
        if key
    ]


@pytest.mark.parametrize(
    ("key_size", "value_size", "stamp", "expires_at"),
    [
        (0, 60, STAMP, 0),
        (129, 60, STAMP, 0),
        (60, 1, STAMP, 0),
        (60, 0, STAMP, 0),
        (4, 60, STAMP_LIMIT, 0),
        (4, 60, 2**64 - 1, 0),
        (4, 60, STAMP, TIME_LIMIT),
        (4, 60, STAMP, 2**64 - 1),
    ],
)
def test_record_that_nobody_can_have_written_is_not_found(
    implementation: Implementation, key_size: int, value_size: int, stamp: int, expires_at: int
) -> None:
    """Though its checksum is right."""
    record = record_at(0, b"k" * key_size, b"v" * value_size, stamp=stamp, expires_at=expires_at)
    size_class = SIZE_CLASSES[len(record) + 31 >> 5]
    contents = record.ljust(EXTENT_SIZE, b"\0")
    found = implementation.scan_blocks(contents, BASE, size_class, SEED, NOW_MS, 0)
    assert [len(found.positions), len(found.words), found.latest_stamp] == [0, 0, 0]
    assert classify(contents, BASE, SEED).whole == []


@pytest.mark.parametrize(
    ("fields", "is_in_doubt"),
    [
        ({}, False),
        ({"stamp": VOID + 1}, False),
        ({"stamp": VOID}, True),
        ({"stamp": 0}, True),
        ({"stamp": STAMP_LIMIT - 1}, False),
        ({"generation": 1}, True),
        ({"generation": 255}, True),
        ({"magic": MARKED_MAGIC}, True),
        ({"magic": MARKED_MAGIC, "generation": 7}, True),
        ({"expires_at": NOW_MS + 1}, False),
        ({"expires_at": NOW_MS}, True),
        ({"expires_at": 1}, True),
        ({"expires_at": TIME_LIMIT - 1}, False),
    ],
)
def test_whatever_is_whole_is_found_and_told_whether_it_is_in_doubt(
    implementation: Implementation, fields: dict[str, int], is_in_doubt: bool
) -> None:
    """What is marked, retired, void or expired is a whole record: it may outrank others."""
    before = record_at(0, b"before", b"v" * 50)
    record = record_at(96, b"k" * 30, b"v" * 34, **fields)
    contents = (before.ljust(96, b"\0") + record).ljust(EXTENT_SIZE, b"\0")
    word = found_word(xxh3_64_intdigest(b"k" * 30, SEED), BASE + 96)
    found = implementation.scan_blocks(contents, BASE, 1, SEED, NOW_MS, VOID)
    assert found.positions.tolist() == [0, 96]
    assert found.words[1] == word
    assert found.doubtful.tolist() == ([word] if is_in_doubt else [])
    assert found.latest_stamp == max(STAMP, fields.get("stamp", 0))
    assert implementation.find_magics(contents) == (2, 2, 0)
    assert classify(contents, BASE, SEED)[:2] == (1, [0, 96])


def test_whole_record_of_another_class_is_not_found(implementation: Implementation) -> None:
    for size_class in (0, 1, 2):
        record = record_at(0, b"k", b"v" * (BLOCK_SIZES[size_class] - RECORD_HEADER_SIZE - 1))
        contents = record.ljust(EXTENT_SIZE, b"\0")
        found = implementation.scan_blocks(contents, BASE, 1, SEED, NOW_MS, 0).positions.tolist()
        assert found == ([0] if size_class == 1 else [])


def some_fields(rng: random.Random) -> dict[str, int]:
    return {
        "stamp": rng.choice((STAMP, STAMP, VOID, VOID + 1, STAMP_LIMIT - 1, STAMP_LIMIT)),
        "generation": rng.choice((0, 0, 1, 255)),
        "magic": rng.choice((RECORD_MAGIC, RECORD_MAGIC, MARKED_MAGIC)),
    }


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="there is one implementation")
@pytest.mark.parametrize("number", range(scaled(20)))
def test_damaged_extents_are_scanned_the_same(number: int) -> None:
    rng = random.Random(f"{seeded_random().random()} {number}")
    size_class = rng.randrange(len(BLOCK_SIZES))
    contents = bytearray(some_extent(rng, size_class, 0.9, lambda: some_fields(rng))[0])
    for _ in range(rng.choice((1, 30, 1_000))):
        place = rng.randrange(0, EXTENT_SIZE, 32) + rng.randrange(64)
        contents[place % EXTENT_SIZE] = rng.choice((0, 255, rng.randrange(256)))
    scans = [
        each.scan_blocks(bytes(contents), BASE, rng_class, SEED, NOW_MS, VOID)
        for rng_class in (size_class, rng.randrange(len(BLOCK_SIZES)))
        for each in IMPLEMENTATIONS
    ]
    assert scans[0] == scans[1]
    assert scans[2] == scans[3]


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="the plain one has no pointers")
@pytest.mark.parametrize(
    ("size", "size_class"),
    [(EXTENT_SIZE - 1, 0), (0, 0), (EXTENT_SIZE, len(BLOCK_SIZES)), (EXTENT_SIZE, 2**63)],
)
def test_what_is_no_extent_or_no_class_is_not_scanned(size: int, size_class: int) -> None:
    with pytest.raises((ValueError, IndexError)):
        IMPLEMENTATIONS[1].scan_blocks(bytes(size), BASE, size_class, SEED, NOW_MS, 0)


@pytest.mark.parametrize(
    ("live", "free"),
    [
        ([0], []),
        ([0, 1, 2], []),
        ([3], [0, 1, 2]),
        ([0, 2, 5], [1, 3, 4]),
        ([1_023], [*range(1_023)]),
    ],
)
def test_blocks_before_and_between_live_ones_become_a_free_list(
    implementation: Implementation, live: list[int], free: list[int]
) -> None:
    """From the last to the first; what is behind the last live one was never used."""
    positions = array("H", [64 * block for block in live])
    first, links = implementation.link_free_blocks(positions, 64)
    contents = bytearray(EXTENT_SIZE)
    for position, word in links:
        U64.pack_into(contents, position, word)
    listed = []
    while first != NO_BLOCK:
        listed.append(first)
        magic, first, zero = FREE_BLOCK.unpack_from(contents, 64 * first)
        assert (magic, zero) == (FREE_MAGIC, 0)
    assert listed == free
    assert [position for position, _ in links] == [64 * block for block in reversed(free)]


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="the plain one has no pointers")
@pytest.mark.parametrize(("positions", "size"), [([], 64), ([0], 0)])
def test_free_list_without_a_live_block_is_refused(positions: list[int], size: int) -> None:
    with pytest.raises(ValueError, match="no live block"):
        IMPLEMENTATIONS[1].link_free_blocks(array("H", positions), size)
