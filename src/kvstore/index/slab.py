"""The slab: blocks of size classes, for `records`.

Invariants, under the space lock of `extents`:
1. A record's magic is overwritten before anyone may take its block, and a block is off the free
   list before a record is written to it.
2. An extent of a class is on that class's list exactly while it has a free or a fresh block.
3. A block is taken only from an extent that was looked at in this opening: every whole record in
   it is of its class, and in a block that was taken. In a copy that was torn while it was made
   others may be there, of a later moment, which the next rebuild would take for the right ones.
   What was looked at once stays so: a segment that it becomes leaves nothing but zeros.
4. A block whose record is retired, or marked, counts as live, and as `retired` in its extent's
   entry, until `sweep` frees it.
5. One extent without a live block, the spare, stays with its class, so that a record that comes and
   goes as the only one of its size opens and frees none. It goes to the pool when another extent is
   emptied, when any class opens one, and when the file is closed.
"""

from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from kvstore.errors import CorruptStoreError, KVStoreError
from kvstore.file.datafile import DataFile
from kvstore.file.rollback import Rollback
from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    CLASS_HEADS_OFFSET,
    ENTRY_CLASS_SHIFT,
    ENTRY_FIRST_FREE_SHIFT,
    ENTRY_FRESH_ONE,
    ENTRY_FRESH_SHIFT,
    ENTRY_KIND_MASK,
    ENTRY_LIVE_ONE,
    ENTRY_LIVE_SHIFT,
    EXTENT_MAP_ENTRIES,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FREE_MAGIC,
    FREE_NEXT_SHIFT,
    FRESH_EXTENT_OFFSET,
    GENERATION_SHIFT,
    KIND_SLAB,
    LEAST_RECLAIMED,
    MARKED_MAGIC,
    MARKS_WORD,
    NO_BLOCK,
    NO_EXTENT,
    RECORD_MAGIC,
    RELEASED_WORD,
    RETIRED_SIZE_WORD,
    SIZE_CLASSES,
    SLAB_ENTRY,
    SLAB_NEXT_OFFSET,
    SLAB_PREVIOUS_OFFSET,
    SLAB_RETIRED_OFFSET,
    U16,
    U64,
    class_head_offset,
    map_entry_offset,
)
from kvstore.format.records import is_valid_record, magics, size_class_at

from .buckets import advice
from .extents import Extents
from .versions import Versions

if TYPE_CHECKING:
    from kvstore.compiled.interface import FastPath

_NO_FREE_BLOCK: Final = NO_BLOCK << ENTRY_FIRST_FREE_SHIFT
# The upper half of an entry's first word where no block of its class is left.
_FULL: Final = tuple(count << 16 | NO_BLOCK for count in BLOCKS_PER_EXTENT)
_MAGIC: Final = 0xFFFF_FFFF
_SIZES: Final = (1 << GENERATION_SHIFT) - 1 ^ _MAGIC  # in a record's first word
# How much may be retired before the file grows: this part of what is in use, or so many bytes.
_MOST_RETIRED: Final = 7 / 16
# An entry's first word without its first free block.
_REST: Final = ~(0xFFFF << ENTRY_FIRST_FREE_SHIFT)


class NoOtherBlockError(Exception):
    """A record cannot be moved: no other extent of its class has a free block."""


class Slab:
    """Allocates and frees blocks of `file`.

    Attributes:
        lock: the space lock.
        wants_reclaiming: much is retired, and the file would have to grow.
    """

    def __init__(self, file: DataFile, extents: Extents, versions: Versions | None = None) -> None:
        self._file = file
        self._map = file.map
        self._words = file.words
        self._shorts = file.shorts
        self._extents = extents
        # While an index is rebuilt there is no store, and none are needed.
        self._versions = versions or Versions(file.path, durable=False)
        self.lock = extents.lock
        self.wants_reclaiming = False
        # The extent that was last emptied or opened: the spare, while it has no live block.
        self.spare = array("Q", [NO_EXTENT])
        self.looked_at = extents.looked_at
        # Blocks of records that no slot points to: an operation that was to free them could not.
        self._pending: list[int] = []
        self.fast: FastPath | None = None  # of the store, once it is open

    def allocate(
        self, size: int, taken: list[int] | None = None, *, moved_from: int = NO_EXTENT
    ) -> int:
        """Return the offset of a block for a record of `size` bytes. Takes the space lock.

        For a record that is `moved_from` an extent only of another one of its class.

        It is also put in the empty list `taken`: there whoever is interrupted before the offset has
        come to him finds it. While nothing is in that, no block was taken.

        Raises:
            StoreFullError: no block, no free extent, and the file cannot grow.
            NoOtherBlockError: none to move to.
            CorruptStoreError: the extent has records that its entry does not know.
        """
        size_class = SIZE_CLASSES[size + BLOCK_ALIGNMENT - 1 >> 5]
        taken = [] if taken is None else taken
        with self.lock:
            while True:
                extent = self._shorts[(CLASS_HEADS_OFFSET >> 1) + size_class]
                if moved_from and extent in (NO_EXTENT, moved_from):
                    raise NoOtherBlockError
                if extent == NO_EXTENT:
                    extent = self._open_extent(size_class)
                entry_offset = EXTENT_MAP_OFFSET + (extent << 4)
                entry = self._words[entry_offset >> 3]
                if not self.looked_at[extent]:
                    self._look_at(extent, size_class, entry >> ENTRY_FRESH_SHIFT)
                block = entry >> ENTRY_FIRST_FREE_SHIFT & 0xFFFF
                if block == NO_BLOCK:
                    block = entry >> ENTRY_FRESH_SHIFT
                    after = entry + ENTRY_LIVE_ONE + ENTRY_FRESH_ONE
                else:
                    rest = self._after_first_free(extent, entry, block, size_class)
                    if rest < 0:
                        self._abandon_free_list(extent, entry, size_class)
                        continue
                    after = (entry & _REST) + ENTRY_LIVE_ONE + (rest << ENTRY_FIRST_FREE_SHIFT)
                offset = (extent << EXTENT_SHIFT) + block * BLOCK_SIZES[size_class]
                try:
                    if after >> ENTRY_FIRST_FREE_SHIFT == _FULL[size_class]:
                        with Rollback(self._file) as rollback:
                            rollback.write(entry_offset, U64.pack(after))
                            self._unlink(extent, size_class, rollback)
                    else:
                        self._file.write_word(entry_offset >> 3, after)
                    taken.append(offset)
                except BaseException:
                    if not taken and self._words[entry_offset >> 3] == after:
                        taken.append(offset)
                    raise
                return offset

    def _look_at(self, extent: int, size_class: int, fresh: int) -> None:
        """Raise where an extent has a whole record of another class, or in a block not yet taken.

        What only looks like one, in a former page of the table or in a damaged record, no rebuild
        takes for one. The caller holds the space lock.
        """
        if self.fast is None or self.fast.has_magic(extent) is not False:
            base = extent << EXTENT_SHIFT
            contents = self._map[base : base + EXTENT_SIZE]
            if contents != bytes(EXTENT_SIZE):  # a tenth of the time that it takes to search
                self._look_closely(extent, size_class, fresh)
        self.looked_at[extent] = True

    def _look_closely(self, extent: int, size_class: int, fresh: int) -> None:
        base, end = extent << EXTENT_SHIFT, fresh * BLOCK_SIZES[size_class]
        contents = self._map[base : base + EXTENT_SIZE]
        for position in magics(contents):
            found = size_class_at(contents, position)
            if (
                found >= 0
                and (found != size_class or position >= end)
                and is_valid_record(contents, position, base, self._file.hash_seed)
            ):
                self._file.require_rebuild()
                raise CorruptStoreError(
                    f"{self._file.path}: at byte {base + position:,} is a record that the entry of "
                    f"extent {extent} at byte {map_entry_offset(extent):,} does not know, and none "
                    f"can be created beside it; {advice(self._file)}"
                )

    def _after_first_free(self, extent: int, entry: int, block: int, size_class: int) -> int:
        """Return the second block of an extent's free list; -1 where the list is damaged."""
        fresh = entry >> ENTRY_FRESH_SHIFT
        if block < fresh:
            link = self._words[(extent << EXTENT_SHIFT) + block * BLOCK_SIZES[size_class] >> 3]
            rest = link >> FREE_NEXT_SHIFT
            if link & 0xFFFF_FFFF == FREE_MAGIC and (rest < fresh or rest == NO_BLOCK):
                return rest
        return -1

    def _abandon_free_list(self, extent: int, entry: int, size_class: int) -> None:
        """Go on without the free blocks of an extent whose list leads astray.

        The next opening finds them again. The caller holds the space lock.
        """
        self._file.require_rebuild()
        without = entry | _NO_FREE_BLOCK
        with Rollback(self._file) as rollback:
            rollback.write(map_entry_offset(extent), U64.pack(without))
            if without >> ENTRY_FRESH_SHIFT == BLOCKS_PER_EXTENT[size_class]:
                self._unlink(extent, size_class, rollback)

    def free(self, offset: int) -> None:
        """Free the block at `offset`, and with it the record there. Takes the space lock.

        Where it raises, either nothing has changed or the block is free.
        """
        if self.fast is not None and self.fast.free(offset):
            return
        with self.lock:
            self._free(offset)

    def _free(self, offset: int) -> None:
        """As `free`. The caller holds the space lock."""
        extent = offset >> EXTENT_SHIFT
        entry_offset = EXTENT_MAP_OFFSET + (extent << 4)
        entry = self._words[entry_offset >> 3]
        size_class = entry >> 8 & 0xFF
        was_first = entry >> ENTRY_FIRST_FREE_SHIFT & 0xFFFF
        block = (offset & EXTENT_SIZE - 1) // BLOCK_SIZES[size_class]
        after = (entry & _REST) - ENTRY_LIVE_ONE + (block << ENTRY_FIRST_FREE_SHIFT)
        was_full = entry >> ENTRY_FIRST_FREE_SHIFT == _FULL[size_class]
        if block >= entry >> ENTRY_FRESH_SHIFT:
            self._refuse_untaken(extent, block, entry)
        if entry >> ENTRY_LIVE_SHIFT & 0xFFFF <= 1:
            self._check_is_last(extent, block, entry)
        head = self._words[offset >> 3]
        # A block whose record was never written begins with whatever was there.
        is_retired = head >> GENERATION_SHIFT and head & _MAGIC in (RECORD_MAGIC, MARKED_MAGIC)
        link = FREE_MAGIC | was_first << FREE_NEXT_SHIFT
        # The link last: it ends the record. A disk that refuses a write before it, and then
        # the undoing too, has not taken the record away.
        if not after >> ENTRY_LIVE_SHIFT & 0xFFFF:
            self._make_spare(extent)
        self._versions.words[RELEASED_WORD] += BLOCK_SIZES[size_class]
        if was_full or is_retired:
            with Rollback(self._file) as rollback:
                rollback.write(entry_offset, U64.pack(after))
                if was_full:
                    self._link(extent, size_class, rollback)
                if is_retired:
                    self._count_retired(extent, -1, rollback)
                rollback.write(offset, U64.pack(link))
            return
        try:
            self._file.write_word(entry_offset >> 3, after)
            self._file.write_word(offset >> 3, link)
        except BaseException:
            self._file.restore(offset, U64.pack(head))
            self._file.restore(entry_offset, U64.pack(entry))
            raise

    def index_rebuilt(self) -> None:
        """Go on with an index that was built anew. The caller holds all stripes."""
        self.spare[0] = NO_EXTENT
        self.looked_at[:] = bytes(EXTENT_MAP_ENTRIES)
        self._pending.clear()
        self._versions.words[RETIRED_SIZE_WORD] = self._versions.words[MARKS_WORD] = 0

    # --- retired -------------------------------------------------------------------------------

    def retire(self, offset: int, magic: int = RECORD_MAGIC) -> None:
        """Retire the record at `offset`, or with `MARKED_MAGIC` mark it. Takes the space lock.

        Where it raises, nothing has changed.
        """
        with self.lock:
            self._retire(offset, magic)

    def _retire(self, offset: int, magic: int) -> None:
        """As `retire`. The caller holds the space lock."""
        size_class = self._words[map_entry_offset(offset >> EXTENT_SHIFT) >> 3] >> 8 & 0xFF
        sizes = self._words[offset >> 3] & _SIZES
        head = magic | sizes | self._versions.generation << GENERATION_SHIFT
        # Counted first, for too much does no harm.
        self._versions.words[RETIRED_SIZE_WORD] += BLOCK_SIZES[size_class]
        self._versions.words[RELEASED_WORD] += BLOCK_SIZES[size_class]
        self._versions.words[MARKS_WORD] += magic == MARKED_MAGIC
        with Rollback(self._file) as rollback:
            self._count_retired(offset >> EXTENT_SHIFT, 1, rollback)
            # Last: a mark takes the record away, and a disk may refuse the undoing too.
            rollback.write(offset, U64.pack(head))

    def _count_retired(self, extent: int, difference: int, rollback: Rollback) -> None:
        place = map_entry_offset(extent) + SLAB_RETIRED_OFFSET
        count = self._shorts[place >> 1] + difference
        rollback.write(place, U16.pack(max(count, 0)))

    def free_or_retire(self, offset: int, *, is_fresh: bool) -> None:
        """Have done with a record that was superseded. The caller holds the space lock."""
        if is_fresh:
            self._free(offset)
        else:
            self._retire(offset, RECORD_MAGIC)

    def note_promises(self) -> None:
        """Count all records as promised, for a flush that is about to be. Takes the space lock."""
        with self.lock:
            self._versions.note_promises()

    def _retires_more_than(self, part: float) -> bool:
        """Return whether more is retired than this part of what the file has in use."""
        used = self._shorts[FRESH_EXTENT_OFFSET >> 1] << EXTENT_SHIFT
        return self._versions.retired_size > used * part

    def retires_too_much(self) -> bool:
        """Return whether more is retired than not: then the file would grow past its bounds."""
        return self._retires_more_than(0.5)

    def count_retired(self) -> list[int]:
        """Return the extents that have retired blocks, and note how many bytes these are.

        Takes the space lock.
        """
        with self.lock:
            found = []
            size = 0
            start, end = EXTENT_MAP_OFFSET, map_entry_offset(self._file.extent_count)
            counts = self._shorts[
                start + SLAB_RETIRED_OFFSET >> 1 : end >> 1 : SLAB_ENTRY.size >> 1
            ]
            for extent, retired in enumerate(counts.tolist()):
                if retired:
                    entry = self._words[map_entry_offset(extent) >> 3]
                    if entry & ENTRY_KIND_MASK == KIND_SLAB:
                        found.append(extent)
                        size += retired * BLOCK_SIZES[entry >> ENTRY_CLASS_SHIFT & 0xFF]
            self._versions.words[RETIRED_SIZE_WORD] = size
            return found

    def sweep(self, extent: int, magic: int, generation: int) -> None:
        """Free the blocks of an extent that were retired in another generation than this.

        With `RECORD_MAGIC` those of superseded records, with `MARKED_MAGIC` those of marked ones.
        Takes the space lock; the caller holds a stripe, so that the store stays open meanwhile.
        """
        if self.fast is not None and self.fast.sweep(extent, magic, generation) is not None:
            return
        with self.lock:
            kind, size_class, _, _, fresh, *_, retired, _ = SLAB_ENTRY.unpack_from(
                self._map, map_entry_offset(extent)
            )
            if kind != KIND_SLAB or not retired:
                return
            size = BLOCK_SIZES[size_class]
            start = extent << EXTENT_SHIFT
            end = start + min(fresh * size, EXTENT_SIZE)
            heads = self._words[start >> 3 : end >> 3 : size >> 3].tolist()
            for offset, head in zip(range(start, end, size), heads, strict=True):
                if head & _MAGIC == magic and head >> GENERATION_SHIFT not in (0, generation):
                    self._free(offset)
                    self._uncount(size, magic)

    def _uncount(self, size: int, magic: int) -> None:
        words = self._versions.words
        words[RETIRED_SIZE_WORD] -= min(size, words[RETIRED_SIZE_WORD])
        words[MARKS_WORD] -= magic == MARKED_MAGIC and words[MARKS_WORD] > 0

    # --- extents -------------------------------------------------------------------------------

    def _make_spare(self, extent: int) -> None:
        """Have `extent`, which is about to be emptied or opened, be the spare from then on."""
        if extent != self.spare[0]:
            self._free_spare()
            self.spare[0] = extent

    def _free_spare(self) -> None:
        """Put the spare, if there is one, on the list of free extents: it is of no class then."""
        extent = self.spare[0]
        if extent == NO_EXTENT:
            return
        entry = self._words[map_entry_offset(extent) >> 3]
        # Not so where it was taken from again, or given back by a call that was then cut short.
        if entry & ENTRY_KIND_MASK == KIND_SLAB and not entry >> ENTRY_LIVE_SHIFT & 0xFFFF:
            with Rollback(self._file) as rollback:
                self._unlink(extent, entry >> 8 & 0xFF, rollback)
                self._extents.free(extent, rollback)
                self._file.note_freed()
        self.spare[0] = NO_EXTENT

    def has_free_extent(self) -> bool:
        """Return whether an extent can be had without growing the file."""
        return self._extents.has_free

    def free_spare(self) -> None:
        """Have no extent that is empty stay with its class. Takes the space lock."""
        with self.lock:
            self._free_spare()

    def _check_is_last(self, extent: int, block: int, entry: int) -> None:
        """Raise where an extent, whose entry says that `block` is its last live one, has others.

        Likewise where it says that none is.

        In a copy that was torn while it was made the entry may be older than records that were
        added: as many could be deleted then, and the extent with all others in it be given up.
        """
        size = BLOCK_SIZES[entry >> 8 & 0xFF]
        start = extent << EXTENT_SHIFT
        end = start + min((entry >> ENTRY_FRESH_SHIFT) * size, EXTENT_SIZE)
        heads = self._words[start >> 3 : end >> 3 : size >> 3].tolist()
        heads[block : block + 1] = []
        found = sum(head & _MAGIC in (RECORD_MAGIC, MARKED_MAGIC) for head in heads)
        if found or not entry >> ENTRY_LIVE_SHIFT & 0xFFFF:
            self._file.require_rebuild()
            raise CorruptStoreError(
                f"{self._file.path}: the entry of extent {extent} at byte "
                f"{map_entry_offset(extent):,} says that the last of its records is being "
                f"deleted, but it has {found:,} others; {advice(self._file)}"
            )

    def _refuse_untaken(self, extent: int, block: int, entry: int) -> None:
        """Raise for a block with a record that, as its extent's entry says, was never taken.

        In a copy that was torn while it was made a slot may be newer than the entry. On the free
        list, such a block would make the extent map contradict itself.
        """
        self._file.require_rebuild()
        raise CorruptStoreError(
            f"{self._file.path}: the entry of extent {extent} at byte "
            f"{map_entry_offset(extent):,} says that {entry >> ENTRY_FRESH_SHIFT:,} of its blocks "
            f"were ever taken, but a record in block {block:,} is being deleted; "
            f"{advice(self._file)}"
        )

    def discard(self, offset: int) -> None:
        """Free a block that was taken for a record that then failed.

        Where a full copy-on-write file system refuses even that, it is for `free_pending`, or for
        the next opening, which rebuilds the index.
        """
        with suppress(KVStoreError, OSError):
            self._free_or_keep(offset)

    def _free_or_keep(self, offset: int) -> None:
        try:
            self.free(offset)
            self._file.require_full_flush()
        except (KVStoreError, OSError):
            self._pending.append(offset)
            self._file.require_rebuild()
            raise

    def free_soon(self, offsets: list[int]) -> None:
        """Free the blocks of records that no slot points to any more.

        Where something cuts this short, the rest is for `free_pending`.
        """
        self._pending += offsets
        self.free_pending()

    def free_pending(self) -> None:
        """Free the blocks that should have been freed, and could not be."""
        # Each is given by one thread, and never twice: then another record might be in it. So an
        # interruption, which does not tell whether it was, costs one of them.
        while self._pending:
            try:
                offset = self._pending.pop()
            except IndexError:  # another thread has had the last one
                return
            self._free_or_keep(offset)

    def put_last(self, extents: list[int]) -> None:
        """Have blocks of these be taken only once no other extent of their class has any.

        Takes the space lock.
        """
        ends: dict[int, int] = {}
        with self.lock, Rollback(self._file) as rollback:
            for extent in extents:
                place = map_entry_offset(extent)
                entry = self._words[place >> 3]
                size_class = entry >> ENTRY_CLASS_SHIFT & 0xFF
                if (
                    entry & ENTRY_KIND_MASK == KIND_SLAB
                    and entry >> ENTRY_FIRST_FREE_SHIFT != _FULL[size_class]
                    and self._shorts[place + SLAB_NEXT_OFFSET >> 1] != NO_EXTENT
                ):
                    end = ends.get(size_class) or self._end_of_list(extent)
                    self._unlink(extent, size_class, rollback)
                    rollback.write(map_entry_offset(end) + SLAB_NEXT_OFFSET, U16.pack(extent))
                    rollback.write(
                        place + SLAB_PREVIOUS_OFFSET, U16.pack(end) + U16.pack(NO_EXTENT)
                    )
                    ends[size_class] = extent

    def _end_of_list(self, extent: int) -> int:
        """Return the last of the list that `extent` is on. The caller holds the space lock."""
        for _ in range(self._file.extent_count):
            following = self._shorts[map_entry_offset(extent) + SLAB_NEXT_OFFSET >> 1]
            if following == NO_EXTENT:
                break
            self._extents.check(following)
            extent = following
        return extent

    def open_extent_for(self, size: int) -> None:
        """Open an extent for records of `size` bytes where their class has none with room."""
        size_class = SIZE_CLASSES[size + BLOCK_ALIGNMENT - 1 >> 5]
        with self.lock:
            if self._shorts[(CLASS_HEADS_OFFSET >> 1) + size_class] == NO_EXTENT:
                self._open_extent(size_class)

    def room_before(self, size_class: int, limit: int) -> int:
        """Return how many blocks can be taken next that are in an extent before `limit`.

        One is opened for the class where that would be none; 0 where it cannot be.
        Takes the space lock.
        """
        with self.lock:
            extent = self._shorts[(CLASS_HEADS_OFFSET >> 1) + size_class]
            if extent == NO_EXTENT or extent >= limit:
                self._free_spare()
                with Rollback(self._file) as rollback:
                    extent = self._extents.allocate_before(limit, rollback, for_segment=False)
                    if extent == NO_EXTENT:
                        return 0
                    rollback.write(
                        map_entry_offset(extent),
                        SLAB_ENTRY.pack(KIND_SLAB, size_class, 0, NO_BLOCK, 0, 0, 0, 0, 0),
                    )
                    self._link(extent, size_class, rollback)
                    self._look_at(extent, size_class, 0)
                    self.spare[0] = extent
            live = self._words[map_entry_offset(extent) >> 3] >> ENTRY_LIVE_SHIFT & 0xFFFF
            return BLOCKS_PER_EXTENT[size_class] - live

    def _open_extent(self, size_class: int) -> int:
        """Take an extent for a class of which none has room. The caller holds the space lock.

        It is the spare, if there is one; and then itself, until a block of it is taken.
        """
        self._free_spare()
        if self._versions.retired_size > LEAST_RECLAIMED:
            self.wants_reclaiming = self._retires_more_than(_MOST_RETIRED)
        with Rollback(self._file) as rollback:
            extent = self._extents.allocate(rollback)
            rollback.write(
                map_entry_offset(extent),
                SLAB_ENTRY.pack(KIND_SLAB, size_class, 0, NO_BLOCK, 0, NO_EXTENT, NO_EXTENT, 0, 0),
            )
            rollback.write(class_head_offset(size_class), U16.pack(extent))  # the list was empty
            if not self.looked_at[extent]:
                self._look_at(extent, size_class, 0)
            self.spare[0] = extent
        return extent

    def _link(self, extent: int, size_class: int, rollback: Rollback) -> None:
        """Put `extent` at the head of its class's list. The caller holds the space lock."""
        head = self._shorts[class_head_offset(size_class) >> 1]
        entry = map_entry_offset(extent)
        rollback.write(entry + SLAB_PREVIOUS_OFFSET, U16.pack(NO_EXTENT) + U16.pack(head))
        if head != NO_EXTENT:
            rollback.write(map_entry_offset(head) + SLAB_PREVIOUS_OFFSET, U16.pack(extent))
        rollback.write(class_head_offset(size_class), U16.pack(extent))

    def _unlink(self, extent: int, size_class: int, rollback: Rollback) -> None:
        """Take `extent` off its class's list. The caller holds the space lock."""
        entry = map_entry_offset(extent)
        before = self._shorts[entry + SLAB_PREVIOUS_OFFSET >> 1]
        after = self._shorts[entry + SLAB_NEXT_OFFSET >> 1]
        if before == NO_EXTENT:
            rollback.write(class_head_offset(size_class), U16.pack(after))
        else:
            self._extents.check(before)
            rollback.write(map_entry_offset(before) + SLAB_NEXT_OFFSET, U16.pack(after))
        if after != NO_EXTENT:
            self._extents.check(after)
            rollback.write(map_entry_offset(after) + SLAB_PREVIOUS_OFFSET, U16.pack(before))
