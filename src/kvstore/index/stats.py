"""What is in a file, counted from its extent map."""

from typing import NamedTuple

from kvstore.file.datafile import DataFile
from kvstore.format.layout import (
    BLOCK_SIZES,
    EXTENT_SIZE,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    SEGMENT_SLOTS,
    SLAB_ENTRY,
    map_entry_offset,
)


class StoreStats(NamedTuple):
    """What `KVStore.stats` tells; sizes in bytes."""

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


def count_extents(file: DataFile, max_bytes: int) -> StoreStats:
    """Return what the extent map tells. The caller holds the space lock."""
    records = segments = slabs = live_size = free_size = 0
    for extent in range(file.extent_count):
        kind, size_class, live, *_ = SLAB_ENTRY.unpack_from(file.map, map_entry_offset(extent))
        if kind == KIND_SEGMENT:
            segments += 1
            records += live
        elif kind == KIND_FREE:
            free_size += EXTENT_SIZE
        elif kind == KIND_SLAB:
            slabs += 1
            live_size += live * BLOCK_SIZES[size_class]
    return StoreStats(
        records=records,
        file_size=file.size,
        max_bytes=max_bytes,
        table_size=segments * EXTENT_SIZE,
        slab_size=slabs * EXTENT_SIZE,
        live_size=live_size,
        free_size=free_size + slabs * EXTENT_SIZE - live_size,
        segments=segments,
        load=records / (segments * SEGMENT_SLOTS),
    )
