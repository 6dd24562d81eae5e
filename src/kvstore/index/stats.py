"""What is in a file, counted from its extent map."""

from typing import NamedTuple

from kvstore.file.datafile import DataFile
from kvstore.format.layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    SEGMENT_SLOTS,
    SLAB_ENTRY,
    map_entry_offset,
)


class StoreStats(NamedTuple):
    """What `KVStore.stats` tells; sizes in bytes.

    >>> stats = store.stats()
    >>> stats.records, stats.live_size
    (0, 0)
    """

    records: int
    """Keys in the table, expired ones that were not yet taken back included."""
    file_size: int
    """Length of the file, all of it reserved on disk."""
    max_bytes: int
    """What the file does not grow past in this opening."""
    table_size: int
    """Extents of the file that are segments of the table."""
    slab_size: int
    """Extents of the file that are cut into blocks for records."""
    live_size: int
    """Blocks that hold records, padding included."""
    free_size: int
    """What is reserved and unused: free extents, and free blocks of slab extents."""
    segments: int
    """Segments of the table, of 1,280 slots each."""
    load: float
    """Records by slots of the table, 0 to 1."""
    free_for_any_size: int
    """Room for records of any size: free extents, and what the file may still grow by."""
    free_for_some_sizes: int
    """Free blocks: each for records of the sizes of its extent, until those there have moved."""
    retired_size: int
    """Blocks, counted as live too, of records that were replaced or deleted: free once flushed."""


def count_extents(file: DataFile, max_bytes: int) -> StoreStats:
    """Return what the extent map tells. The caller holds the space lock."""
    records = segments = slabs = live_size = free = free_blocks = retired_size = 0
    for extent in range(file.extent_count):
        entry = SLAB_ENTRY.unpack_from(file.map, map_entry_offset(extent))
        kind, size_class, live, *_, retired, _ = entry
        if kind == KIND_SEGMENT:
            segments += 1
            records += live
        elif kind == KIND_FREE:
            free += EXTENT_SIZE
        elif kind == KIND_SLAB:
            slabs += 1
            live_size += live * BLOCK_SIZES[size_class]
            retired_size += retired * BLOCK_SIZES[size_class]
            free_blocks += (BLOCKS_PER_EXTENT[size_class] - live) * BLOCK_SIZES[size_class]
    return StoreStats(
        records=records,
        file_size=file.size,
        max_bytes=max_bytes,
        table_size=segments * EXTENT_SIZE,
        slab_size=slabs * EXTENT_SIZE,
        live_size=live_size,
        free_size=free + slabs * EXTENT_SIZE - live_size,
        segments=segments,
        load=records / (segments * SEGMENT_SLOTS),
        free_for_any_size=free + (file.max_extents - file.extent_count << EXTENT_SHIFT),
        free_for_some_sizes=free_blocks,
        retired_size=retired_size,
    )
