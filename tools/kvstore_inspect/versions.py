"""Which records are no key's any more: superseded, void, or marked as deleted.

See `layout`, "Records that follow each other". In a file that is in use these are in no slot, and
the extent map counts them. In one that was not closed it takes all records of a key to tell.
"""

from array import array
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

from kvstore import compiled
from kvstore.format.extent_records import classify
from kvstore.format.found_words import found_offset
from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FOUND_UPPER_SHIFT,
    KIND_SLAB,
    MARKED_MAGIC,
    MARKED_MAGIC_BYTES,
    MAX_KEY_SIZE,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_STAMP_OFFSET,
    SLAB_ENTRY,
    U64,
    map_entry_offset,
)
from kvstore.format.records import size_class_at
from kvstore.format.superblock import State

from .file_view import FileView


class BlockSet:
    """Offsets of blocks in so many extents of a file, in a bit for each 32 bytes."""

    def __init__(self, extent_count: int) -> None:
        self._bits = bytearray(extent_count * EXTENT_SIZE // BLOCK_ALIGNMENT // 8)

    def add(self, offset: int) -> None:
        """Add an offset; what is past the extents is left out."""
        place = offset // BLOCK_ALIGNMENT
        if place >> 3 < len(self._bits):
            self._bits[place >> 3] |= 1 << (place & 7)

    def __contains__(self, offset: int) -> bool:
        place = offset // BLOCK_ALIGNMENT
        return place >> 3 < len(self._bits) and bool(self._bits[place >> 3] & 1 << (place & 7))


class Retired(NamedTuple):
    """Blocks of an extent whose records are no key's any more, and not yet reclaimed.

    `marked` of them are marked as deleted; later ones of their keys have superseded the others.
    """

    extent: int
    size_class: int
    blocks: int
    marked: int


def slab_extents(view: FileView) -> range:
    """Return the numbers of the extents that can hold records."""
    return range(FIXED_EXTENTS, view.extent_count)


def stamp_at(contents: bytes, position: int) -> int:
    """Return the stamp of the record at `position`."""
    stamp: int = U64.unpack_from(contents, position + RECORD_STAMP_OFFSET)[0]
    return stamp


def void_stamp(state: State) -> int:
    """Return the stamp up to which the records of a file are void; 0 where none are."""
    return state.stamp if state.intact and not state.clean else 0


def retired_blocks(view: FileView) -> Iterator[Retired]:
    """Yield what is retired by the extent map; how much of that is marked, its blocks tell."""
    entries = view.exactly(map_entry_offset(0), SLAB_ENTRY.size * view.extent_count)
    for extent, entry in enumerate(SLAB_ENTRY.iter_unpack(entries)):
        kind, size_class, live, _, _, _, _, blocks, _ = entry
        if kind == KIND_SLAB and 0 < blocks <= live and size_class < len(BLOCK_SIZES):
            contents, size = view.padded_extent(extent), BLOCK_SIZES[size_class]
            marked = sum(
                contents.startswith(MARKED_MAGIC_BYTES, block * size)
                for block in range(BLOCKS_PER_EXTENT[size_class])
            )
            yield Retired(extent, size_class, blocks, min(marked, blocks))


# --- all records of a key -------------------------------------------------------------------------


def find_losers(view: FileView, show: Callable[[int], object]) -> BlockSet:
    """Return where the records are that another one of their key outranks.

    `show` is called with the number of each extent that is read for that.
    """
    found: list[array[int]] = []
    for extent in slab_extents(view):
        show(extent)
        found.append(_words(view.padded_extent(extent), extent << EXTENT_SHIFT, view.seed))
    losers = BlockSet(view.extent_count)
    words = compiled.selected.sort_words(found)
    for _, close in groupby(words, lambda word: word >> FOUND_UPPER_SHIFT):
        offsets = [found_offset(word) for word in close]
        if len(offsets) > 1:
            for offset in _outranked(view, offsets):
                losers.add(offset)
    return losers


def _words(contents: bytes, base: int, seed: int) -> "array[int]":
    """Return a word for each whole record of the class of an extent; see `found_words`."""
    implementation = compiled.selected
    count, aligned, first = implementation.find_magics(contents)
    # As a rule all magics are those of whole records of one class.
    size_class = size_class_at(contents, first) if 0 < aligned == count else -1
    if size_class >= 0:
        blocks = implementation.scan_blocks(contents, base, size_class, seed, 0, 0)
        if len(blocks.positions) == count:
            return blocks.words
    size_class = classify(contents, base, seed).winner if aligned else -1
    if size_class < 0:
        return array("Q")
    return implementation.scan_blocks(contents, base, size_class, seed, 0, 0).words


def _outranked(view: FileView, offsets: list[int]) -> set[int]:
    """Return those of these records that another one of their key outranks.

    The latest stamp does; of equal ones, a mark.
    """
    best: dict[bytes, tuple[int, bool, int]] = {}
    for offset in offsets:
        contents = view.exactly(offset, RECORD_HEADER_SIZE + MAX_KEY_SIZE)
        magic, _, key_size, _, stamp, _, _ = RECORD.unpack_from(contents)
        key = contents[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + key_size]
        mine = (stamp, magic == MARKED_MAGIC, -offset)
        best[key] = max(mine, best.get(key, mine))
    return set(offsets) - {-offset for *_, offset in best.values()}
