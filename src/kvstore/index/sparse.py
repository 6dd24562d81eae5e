"""Which extents of the slab are worth emptying, told from the extent map alone.

The records of an extent can move only into free blocks of the other extents of its class. So of
each class the emptiest extents are chosen, as long as what is live in them fits into the others.
What is retired is not moved: it goes when it is reclaimed.
"""

from collections.abc import Container
from itertools import groupby
from typing import Final, NamedTuple

from kvstore import compiled
from kvstore.file.datafile import DataFile
from kvstore.format.layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    EXTENT_MAP_OFFSET,
    EXTENT_SIZE,
    SLOT_SIZE,
    map_entry_offset,
)

_MOST_FOUND: Final = 1024


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
    found: list[tuple[int, int]] = []
    missing = EXTENT_SIZE
    partly_used = sorted(compiled.selected.find_partly_used(_entries(file)))
    for size_class, group in groupby(partly_used, lambda word: word >> 48):
        extents = list(group)  # the one with the fewest to move first
        size, count = BLOCK_SIZES[size_class], BLOCKS_PER_EXTENT[size_class]
        room = count * len(extents) - sum(word >> 16 & 0xFFFF for word in extents)
        for word in extents:
            moved, live, extent = word >> 32 & 0xFFFF, word >> 16 & 0xFFFF, word & 0xFFFF
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
    earliest: int
    """Nothing has expired before then that was not taken back, in ms."""


def count_usage(file: DataFile) -> Usage:
    """Count how much of the file is in use."""
    blocks, slots, segments, earliest = compiled.selected.count_in_use(_entries(file))
    return Usage(blocks + slots * SLOT_SIZE, blocks + segments * EXTENT_SIZE, earliest)


def _entries(file: DataFile) -> bytes:
    return file.map[EXTENT_MAP_OFFSET : map_entry_offset(file.extent_count)]
