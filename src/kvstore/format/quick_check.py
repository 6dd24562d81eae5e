"""Whether the parts of the index that its checksum covers agree with each other.

The checksum finds damage. What passes it may still be forged, or written by a program with a fault:
an entry that leads out of the file would end the process by a signal, a list that turns in a circle
would never end. Looked at once, before a file is opened; from then on the operations keep it so.
Reads the directory, the extent map and the allocator, and no page of table or slab.
"""

from typing import Final

from .layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_MAP_OFFSET,
    FIXED_EXTENTS,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    KIND_FIXED,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    MIN_DEPTH,
    NO_BLOCK,
    NO_EXTENT,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SLAB_ENTRY,
    U16,
    class_head_offset,
    map_entry_offset,
    segment_run,
)
from .superblock import State, index_checksum

_KINDS: Final = bytes((KIND_FREE, KIND_SEGMENT, KIND_SLAB))


def index_is_consistent(start: bytes, extent_count: int) -> bool:
    """Return whether directory, extent map and allocator make sense together in a clean file.

    There no record is retired or marked. `start` is the file up to and with the entries of its
    extents in the extent map.
    """
    return _Index(start, extent_count).index_is_consistent()


def clean_state(start: bytes, extent_count: int, hash_seed: int) -> State | None:
    """Return the state that vouches for an index, all of it durable; None for a contradictory one.

    `start` is as in `index_is_consistent`.
    """
    if not index_is_consistent(start, extent_count):
        return None
    records = count_records(start[EXTENT_MAP_OFFSET:])
    checksum = index_checksum(start, extent_count, hash_seed)
    return State(True, extent_count, extent_count, records, checksum)


def count_by_map(start: bytes, extent_count: int) -> int:
    """Return how many records the extent map tells of, or -1 where it is damaged for sure.

    Those that are retired or marked count too. Asked where nothing vouches for it, as the state is
    damaged; `start` is as in `index_is_consistent`.
    """
    index = _Index(start, extent_count)
    return index.count_records() if index.has_possible_entries() else -1


def count_records(extent_map: bytes) -> int:
    """Return how many records the slabs in the extent map, or a part of it, say that they hold."""
    lives: list[int] = memoryview(extent_map).cast("H")[1 :: SLAB_ENTRY.size // U16.size].tolist()
    kinds = extent_map[:: SLAB_ENTRY.size]
    return sum(live for kind, live in zip(kinds, lives, strict=True) if kind == KIND_SLAB)


class _Index:
    """The start of a file, and what is asked of it."""

    def __init__(self, start: bytes, extent_count: int) -> None:
        self._shorts: memoryview[int] = memoryview(start).cast("H")
        self._directory: memoryview[int] = memoryview(start)[
            DIRECTORY_OFFSET : DIRECTORY_OFFSET + DIRECTORY_SIZE
        ].cast("H")
        self._entries = start[EXTENT_MAP_OFFSET : map_entry_offset(extent_count)]
        self._kinds = self._entries[:: SLAB_ENTRY.size]

    def index_is_consistent(self) -> bool:
        fresh = self._shorts[FRESH_EXTENT_OFFSET >> 1]
        kinds = self._kinds
        return (
            FIXED_EXTENTS <= fresh <= len(kinds)
            and kinds[:FIXED_EXTENTS] == bytes((KIND_FIXED,)) * FIXED_EXTENTS
            and not kinds[FIXED_EXTENTS:fresh].strip(_KINDS)
            and kinds.count(KIND_FREE, fresh) == len(kinds) - fresh
            and self._free_list_is_consistent(fresh)
            and self._slabs_are_consistent()
            and self._segments_are_consistent()
        )

    def _free_list_is_consistent(self, fresh: int) -> bool:
        """Return whether the list leads to each free extent before the fresh one, and ends."""
        left = self._kinds.count(KIND_FREE, FIXED_EXTENTS, fresh)
        extent = self._shorts[FREE_EXTENTS_OFFSET >> 1]
        while extent != NO_EXTENT:
            if not left or extent >= fresh or self._kinds[extent] != KIND_FREE:
                return False
            extent = self._entry(extent)[6]
            left -= 1
        return not left

    def has_possible_entries(self) -> bool:
        """Return whether each entry by itself could be right."""
        kinds = self._kinds
        return (
            kinds[:FIXED_EXTENTS] == bytes((KIND_FIXED,)) * FIXED_EXTENTS
            and not kinds[FIXED_EXTENTS:].strip(_KINDS)
            and all(
                kind != KIND_SLAB
                or (
                    size_class < len(BLOCK_SIZES)
                    and retired <= live <= fresh <= BLOCKS_PER_EXTENT[size_class]
                )
                for kind, size_class, live, _, fresh, _, _, retired, _ in SLAB_ENTRY.iter_unpack(
                    self._entries
                )
            )
        )

    def count_records(self) -> int:
        """Return how many live blocks the slabs' entries tell of."""
        return count_records(self._entries)

    def _slabs_are_consistent(self) -> bool:
        """Return whether slabs' entries are possible, and class lists lead to those with room."""
        with_room = [0] * len(BLOCK_SIZES)
        for entry in SLAB_ENTRY.iter_unpack(self._entries):
            kind, size_class, live, first_free, fresh, _, _, retired, _ = entry
            if kind == KIND_SLAB:
                if size_class >= len(BLOCK_SIZES) or retired:
                    return False
                most = BLOCKS_PER_EXTENT[size_class]
                if not 0 < live <= fresh <= most or fresh <= first_free != NO_BLOCK:
                    return False
                with_room[size_class] += first_free != NO_BLOCK or fresh < most
        return all(
            self._class_list_is_consistent(size_class, left)
            for size_class, left in enumerate(with_room)
        )

    def _class_list_is_consistent(self, size_class: int, left: int) -> bool:
        """Return whether the list of a class leads to as many extents of it as have room."""
        extent = self._shorts[class_head_offset(size_class) >> 1]
        before = NO_EXTENT
        while extent != NO_EXTENT:
            if not left or extent >= len(self._kinds):
                return False
            kind, own_class, _, first_free, fresh, previous, following, *_ = self._entry(extent)
            if (kind, own_class, previous) != (KIND_SLAB, size_class, before) or (
                first_free == NO_BLOCK and fresh == BLOCKS_PER_EXTENT[size_class]
            ):
                return False
            before, extent = extent, following
            left -= 1
        return not left

    def _segments_are_consistent(self) -> bool:
        """Return whether each segment has one run of the directory, and each run a segment."""
        directory = self._directory
        seen: set[int] = set()
        start = 0
        while start < DIRECTORY_ENTRIES:
            extent = directory[start]
            if extent >= len(self._kinds):
                return False
            kind, _, live, used, zero, _ = SEGMENT_ENTRY.unpack_from(
                self._entries, extent * SEGMENT_ENTRY.size
            )
            if kind != KIND_SEGMENT or not live <= used <= SEGMENT_SLOTS or zero or extent in seen:
                return False
            seen.add(extent)
            run = segment_run(MIN_DEPTH)
            while start & run - 1 or directory[start + run - 1] != extent:
                run >>= 1
            if bytes(directory[start : start + run]) != U16.pack(extent) * run:
                return False
            start += run
        return len(seen) == self._kinds.count(KIND_SEGMENT)

    def _entry(self, extent: int) -> tuple[int, ...]:
        return SLAB_ENTRY.unpack_from(self._entries, extent * SLAB_ENTRY.size)
