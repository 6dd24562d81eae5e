"""What is told from the extent map alone, by both implementations."""

import random
from typing import Final

import pytest
from support import scaled, seeded_random
from support.implementations import IMPLEMENTATIONS

from kvstore.compiled import Implementation
from kvstore.format.layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    KIND_FIXED,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    SEGMENT_ENTRY,
    SLAB_ENTRY,
)

NEVER: Final = (1 << 64) - 1


def slab(size_class: int, live: int, retired: int = 0) -> bytes:
    return SLAB_ENTRY.pack(KIND_SLAB, size_class, live, 0, 0, 0, 0, retired, 0)


def segment(live: int, earliest: int) -> bytes:
    return SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, live, live, 0, earliest)


def other(kind: int) -> bytes:
    return SLAB_ENTRY.pack(kind, 1, 5, 0, 0, 0, 0, 0, 0)


def word(size_class: int, current: int, live: int, extent: int) -> int:
    return size_class << 48 | current << 32 | live << 16 | extent


def test_what_is_live_is_counted_but_for_what_is_retired(implementation: Implementation) -> None:
    entries = [other(KIND_FIXED), slab(0, 7), slab(3, 5, 2), other(KIND_FREE), segment(9, NEVER)]
    assert implementation.count_in_use(b"".join(entries)) == (
        7 * BLOCK_SIZES[0] + 3 * BLOCK_SIZES[3],
        9,
        1,
        NEVER,
    )
    assert implementation.count_in_use(b"") == (0, 0, 0, NEVER)


def test_first_expiry_of_all_segments_is_told(implementation: Implementation) -> None:
    entries = segment(9, NEVER) + segment(3, 1_000) + segment(0, 5_000)
    assert implementation.count_in_use(entries) == (0, 12, 3, 1_000)


def test_extents_are_partly_used_where_some_blocks_are_live_and_some_not(
    implementation: Implementation,
) -> None:
    full = BLOCKS_PER_EXTENT[2]
    entries = [other(KIND_FIXED), slab(2, 0), slab(2, full), slab(2, full - 1, 4), segment(3, 0)]
    entries.append(slab(7, 1))
    assert implementation.find_partly_used(b"".join(entries)) == [
        word(2, full - 5, full - 1, 3),
        word(7, 1, 1, 5),
    ]


def test_damaged_entries_count_for_nothing(implementation: Implementation) -> None:
    entries = slab(len(BLOCK_SIZES), 5) + slab(255, 5) + slab(1, 2, 3)
    assert implementation.count_in_use(entries) == (0, 0, 0, NEVER)
    assert implementation.find_partly_used(entries) == [word(1, 0, 2, 2)]


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="there is one implementation")
@pytest.mark.parametrize("number", range(scaled(5)))
def test_both_tell_the_same_of_whatever_is_there(number: int) -> None:
    rng = random.Random(f"{seeded_random().random()} {number}")
    entries = bytearray(rng.randbytes(16 * 500))
    for entry in range(0, len(entries), 16):
        entries[entry] = rng.randrange(5)
        entries[entry + 1] = rng.choice((rng.randrange(len(BLOCK_SIZES)), entries[entry + 1]))
        entries[entry + 3] = rng.choice((0, entries[entry + 3]))
        entries[entry + 13] = rng.choice((0, entries[entry + 13]))
    plain, compiled = IMPLEMENTATIONS
    assert plain.count_in_use(bytes(entries)) == compiled.count_in_use(bytes(entries))
    assert plain.find_partly_used(bytes(entries)) == compiled.find_partly_used(bytes(entries))
