"""The slabs of a file: their blocks, and the records that no slot points to.

Of these some are retired or marked, in a file that is in use or was not closed: each retired one
has a later record of its key, and each marked one is later than what the slot of its key leads to.
"""

from collections.abc import Iterator

from kvstore.format.extent_records import is_of_table
from kvstore.format.layout import (
    BLOCK_SIZES,
    DIRECTORY_ENTRIES,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_BLOCK,
    FREE_MAGIC,
    KIND_SLAB,
    MARKED_MAGIC,
    NO_BLOCK,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    STAMP_LIMIT,
    STATE_OFFSET,
)
from kvstore.format.records import is_valid_record, magics, size_class_at

from .check_table import stamp_in_slot
from .checked_file import CheckedFile, entry_problem
from .problems import Breach, Problem


def check_slabs(file: CheckedFile) -> Iterator[Problem]:
    """Check every slab extent's blocks: each is live, on the free list, or fresh."""
    unslotted = _Unslotted(file)
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
        yield from _stamps(file, base, contents, found)
        if file.kinds[extent] == KIND_SLAB:
            yield from _slab(file, extent, contents, found, unslotted)
        else:
            for position in sorted(found):
                offset = base + position
                message = "its magic is outside of any slab extent"
                yield Problem(offset, "record", message, Breach.RECORD_OUTSIDE)
    yield from unslotted.check()
    stamp, offset = file.latest_found
    if file.is_clean and stamp > file.latest_stamp:
        message = f"says stamp {file.latest_stamp}, the record at byte {offset:,} has {stamp}"
        yield Problem(STATE_OFFSET, "state", message, Breach.STATE_STAMP)


def _stamps(file: CheckedFile, base: int, contents: bytes, found: set[int]) -> Iterator[Problem]:
    """Check the stamps of records, and note the latest."""
    for position in sorted(found):
        if position + RECORD_HEADER_SIZE > EXTENT_SIZE:
            continue
        stamp = RECORD.unpack_from(contents, position)[4]
        if stamp >= STAMP_LIMIT:
            message = f"its stamp is {stamp}, the limit {STAMP_LIMIT}"
            yield Problem(base + position, "record", message, Breach.RECORD_STAMP)
        elif stamp > file.latest_found[0] and _is_whole(file, base, contents, position):
            file.latest_found = (stamp, base + position)


def _is_whole(file: CheckedFile, base: int, contents: bytes, position: int) -> bool:
    return size_class_at(contents, position) >= 0 and is_valid_record(
        contents, position, base, file.hash_seed
    )


class _Unslotted:
    """The retired and marked records of a file, each of which another one of its key explains."""

    def __init__(self, file: CheckedFile) -> None:
        self._file = file
        self._retired: list[tuple[int, bytes, int]] = []
        self._marked: dict[bytes, tuple[int, int]] = {}

    def add(self, offset: int, magic: int, stamp: int, key: bytes) -> None:
        """Remember the record at that offset."""
        if magic == RECORD_MAGIC:
            self._retired.append((offset, key, stamp))
        else:
            self._marked[key] = max(self._marked.get(key, (-1, 0)), (stamp, offset))

    def check(self) -> Iterator[Problem]:
        """Check them, once all are there."""
        for offset, key, stamp in self._retired:
            latest = max(stamp_in_slot(self._file, key) or -1, self._marked.get(key, (-1, 0))[0])
            if latest < stamp:
                message = "is retired, and there is no later one of its key"
                yield Problem(offset, "record", message, Breach.RECORD_LATEST)
        for key, (stamp, offset) in self._marked.items():
            live = stamp_in_slot(self._file, key)
            if live is not None and live <= stamp:
                message = "is marked as deleted, and later than what the slot of its key leads to"
                yield Problem(offset, "record", message, Breach.RECORD_LATEST)


def _slab(
    file: CheckedFile, extent: int, contents: bytes, found: set[int], unslotted: _Unslotted
) -> Iterator[Problem]:
    _, size_class, live, first_free, fresh, _, _, retired, _ = file.entry(extent)
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
    retired_found = 0
    for position in sorted(found):
        offset = base + position
        if position % block_size or position // block_size >= fresh:
            message = "its magic is not at a block in use"
            yield Problem(offset, "record", message, Breach.RECORD_MISPLACED)
        elif _is_retired(contents, position):
            retired_found += 1
            if not file.is_pointed_to(offset):
                yield from _retired(file, contents, position, offset, unslotted)
        elif not file.is_pointed_to(offset):
            yield Problem(offset, "record", "no slot points to it", Breach.RECORD_UNSLOTTED)
    if len(blocks) != live:
        message = f"says {live} live blocks, has {len(blocks)}"
        yield entry_problem(extent, Breach.SLAB_COUNT, message)
    if retired_found != retired:
        message = f"says {retired} retired blocks, has {retired_found}"
        yield entry_problem(extent, Breach.SLAB_RETIRED, message)
    for block in sorted(set(range(fresh)) - blocks - set(free)):
        message = "neither live nor on the free list"
        yield Problem(base + block * block_size, "block", message, Breach.BLOCK_LEAKED)


def _is_retired(contents: bytes, position: int) -> bool:
    """Return whether a record is retired or marked."""
    magic, _, _, generation, *_ = RECORD.unpack_from(contents, position)
    return bool(generation) or magic == MARKED_MAGIC


def _retired(
    file: CheckedFile, contents: bytes, position: int, offset: int, unslotted: _Unslotted
) -> Iterator[Problem]:
    """Check a retired or marked record that no slot points to."""
    if file.is_clean:
        message = "is retired or marked as deleted, and the file was closed"
        yield Problem(offset, "record", message, Breach.RECORD_RETIRED)
    elif _is_whole(file, offset - position, contents, position):
        magic, _, key_size, _, stamp, *_ = RECORD.unpack_from(contents, position)
        start = position + RECORD_HEADER_SIZE
        unslotted.add(offset, magic, stamp, contents[start : start + key_size])


def _no_free_block(offset: int, magic: int) -> Problem:
    """Return what is wrong with a block on a free list that has not the magic of one."""
    if magic in (RECORD_MAGIC, MARKED_MAGIC):
        message = "has the magic of a record, and is on the free list"
        return Problem(offset, "free block", message, Breach.FREE_BLOCKS_LIVE)
    return Problem(offset, "free block", "has not the magic of one", Breach.FREE_BLOCKS_BROKEN)
