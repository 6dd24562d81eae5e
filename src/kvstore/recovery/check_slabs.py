"""The slabs of a file: their blocks, and the records that no slot points to."""

from collections.abc import Iterator

from kvstore.format.layout import (
    BLOCK_SIZES,
    DIRECTORY_ENTRIES,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_BLOCK,
    FREE_MAGIC,
    KIND_SLAB,
    NO_BLOCK,
    RECORD_MAGIC,
)
from kvstore.format.records import is_of_table, is_valid_record, magics

from .checked_file import CheckedFile, entry_problem
from .problems import Breach, Problem


def check_slabs(file: CheckedFile) -> Iterator[Problem]:
    """Check every slab extent's blocks: each is live, on the free list, or fresh."""
    for extent in range(FIXED_EXTENTS, file.extent_count):
        file.progress(DIRECTORY_ENTRIES + extent, DIRECTORY_ENTRIES + file.extent_count)
        base = extent << EXTENT_SHIFT
        contents = file.read(base, EXTENT_SIZE)
        found = {
            position
            for position in magics(contents)
            if not is_of_table(contents, position, base)
            or is_valid_record(contents, position, base, file.hash_seed)
        }
        if file.kinds[extent] == KIND_SLAB:
            yield from _slab(file, extent, contents, found)
        else:
            for position in sorted(found):
                offset = base + position
                message = "its magic is outside of any slab extent"
                yield Problem(offset, "record", message, Breach.RECORD_OUTSIDE)


def _slab(file: CheckedFile, extent: int, contents: bytes, found: set[int]) -> Iterator[Problem]:
    _, size_class, live, first_free, fresh, *_ = file.entry(extent)
    base, block_size = extent << EXTENT_SHIFT, BLOCK_SIZES[size_class]
    free: dict[int, None] = {}
    block = first_free
    while block != NO_BLOCK:
        if block >= fresh or block in free:
            message = f"free list leads to block {block}, or again"
            yield entry_problem(extent, Breach.FREE_BLOCKS_BROKEN, message)
            break
        free[block] = None
        magic, following, _ = FREE_BLOCK.unpack_from(contents, block * block_size)
        if magic != FREE_MAGIC:
            yield _no_free_block(base + block * block_size, magic)
            break
        block = following
    blocks = {position // block_size for position in found if not position % block_size}
    for position in sorted(found):
        offset = base + position
        if position % block_size or position // block_size >= fresh:
            message = "its magic is not at a block in use"
            yield Problem(offset, "record", message, Breach.RECORD_MISPLACED)
        elif not file.is_pointed_to(offset):
            yield Problem(offset, "record", "no slot points to it", Breach.RECORD_UNSLOTTED)
    if len(blocks) != live:
        message = f"says {live} live blocks, has {len(blocks)}"
        yield entry_problem(extent, Breach.SLAB_COUNT, message)
    for block in sorted(set(range(fresh)) - blocks - set(free)):
        message = "neither live nor on the free list"
        yield Problem(base + block * block_size, "block", message, Breach.BLOCK_LEAKED)


def _no_free_block(offset: int, magic: int) -> Problem:
    """Return what is wrong with a block on a free list that has not the magic of one."""
    if magic == RECORD_MAGIC:
        message = "has the magic of a record, and is on the free list"
        return Problem(offset, "free block", message, Breach.FREE_BLOCKS_LIVE)
    return Problem(offset, "free block", "has not the magic of one", Breach.FREE_BLOCKS_BROKEN)
