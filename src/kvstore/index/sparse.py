"""Which extents of the slab are worth emptying, told from the extent map alone.

The records of an extent can move only into free blocks of the other extents of its class. So of
each class the emptiest extents are chosen, as long as what is live in them fits into the others.
What is retired is not moved: it goes when it is reclaimed.
"""

from collections.abc import Container
from typing import Final, NamedTuple

from kvstore.file.datafile import DataFile
from kvstore.format.layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    ENTRY_CLASS_SHIFT,
    ENTRY_KIND_MASK,
    ENTRY_LIVE_SHIFT,
    EXTENT_MAP_OFFSET,
    EXTENT_SIZE,
    KIND_SEGMENT,
    KIND_SLAB,
    SLAB_RETIRED_OFFSET,
    SLOT_SIZE,
    map_entry_offset,
)

_MOST_FOUND: Final = 1024
_RETIRED_SHIFT: Final = 8 * (SLAB_RETIRED_OFFSET - 8)  # in the second word of an entry


class Sparse(NamedTuple):
    """What `find_sparse` found."""

    extents: list[tuple[int, int]]
    """Bytes to move, and number, of some whose records fit into others; fewest bytes first."""
    missing: int
    """Where there are none: how many bytes have to be freed at the least before there is one."""


def find_sparse(file: DataFile, besides: Container[int] = ()) -> Sparse:
    """Find extents to empty, but for those in `besides`.

    What others do meanwhile may make it wrong: then fewer records find a place.
    """
    by_class: dict[int, list[int]] = {}  # each: what is to move, what is live, extent
    start, end = EXTENT_MAP_OFFSET, map_entry_offset(file.extent_count)
    for extent, entry in enumerate(file.words[start >> 3 : end >> 3 : 2].tolist()):
        if entry & ENTRY_KIND_MASK == KIND_SLAB:
            live, size_class = entry >> ENTRY_LIVE_SHIFT & 0xFFFF, entry >> ENTRY_CLASS_SHIFT & 0xFF
            if 0 < live < BLOCKS_PER_EXTENT[size_class]:  # one without room gains nothing
                moved = live - file.shorts[map_entry_offset(extent) + SLAB_RETIRED_OFFSET >> 1]
                by_class.setdefault(size_class, []).append(moved << 32 | live << 16 | extent)
    found: list[tuple[int, int]] = []
    missing = EXTENT_SIZE
    for size_class, extents in by_class.items():
        size, count = BLOCK_SIZES[size_class], BLOCKS_PER_EXTENT[size_class]
        room = sum(count - (each >> 16 & 0xFFFF) for each in extents)
        for each in sorted(extents):
            moved, live, extent = each >> 32, each >> 16 & 0xFFFF, each & 0xFFFF
            if extent in besides:
                continue
            room -= count - live + moved
            if room < 0:
                missing = min(missing, -room * size)
                break
            found.append((moved * size, extent))
    return Sparse(sorted(found)[:_MOST_FOUND], missing)


class Usage(NamedTuple):
    """What `count_usage` found."""

    used: int
    """Bytes of live blocks, retired ones left out, and of live slots; expired ones included."""
    taken: int
    """Bytes of these blocks, and of the segments of the table."""
    has_expired: bool
    """Something may have expired that was not taken back."""


def count_usage(file: DataFile, now_ms: int) -> Usage:
    """Count how much of the file is in use."""
    blocks = slots = segments = 0
    has_expired = False
    words = file.words[EXTENT_MAP_OFFSET >> 3 : map_entry_offset(file.extent_count) >> 3]
    for first, second in zip(words[::2], words[1::2], strict=True):
        kind, live = first & ENTRY_KIND_MASK, first >> ENTRY_LIVE_SHIFT & 0xFFFF
        if kind == KIND_SLAB:
            live -= second >> _RETIRED_SHIFT & 0xFFFF
            blocks += live * BLOCK_SIZES[first >> ENTRY_CLASS_SHIFT & 0xFF]
        elif kind == KIND_SEGMENT:
            slots += live * SLOT_SIZE
            segments += EXTENT_SIZE
            has_expired = has_expired or second <= now_ms
    return Usage(blocks + slots, blocks + segments, has_expired)
