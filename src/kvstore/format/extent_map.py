"""What the extent map tells of all extents at once: how much of them is in use, which are sparse.

Both go by the entries alone, `entries`: a copy of the map up to where the file ends, 16 bytes each.
"""

from .layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    ENTRY_CLASS_SHIFT,
    ENTRY_KIND_MASK,
    ENTRY_LIVE_SHIFT,
    KIND_SEGMENT,
    KIND_SLAB,
    SLAB_RETIRED_OFFSET,
)

_RETIRED_SHIFT = 8 * (SLAB_RETIRED_OFFSET - 8)  # in the second word of an entry


def count_in_use(entries: bytes) -> tuple[int, int, int, int]:
    """Count what is live.

    Returns:
        Bytes of live blocks, retired ones left out; live slots; segments; and when the first record
        may expire that these lead to, in ms.
    """
    blocks = slots = segments = 0
    earliest = (1 << 64) - 1
    words = memoryview(entries).cast("Q")
    for first, second in zip(words[::2].tolist(), words[1::2].tolist(), strict=True):
        kind, live = first & ENTRY_KIND_MASK, first >> ENTRY_LIVE_SHIFT & 0xFFFF
        if kind == KIND_SLAB:
            size_class = first >> ENTRY_CLASS_SHIFT & 0xFF
            live -= second >> _RETIRED_SHIFT & 0xFFFF
            if live > 0 and size_class < len(BLOCK_SIZES):
                blocks += live * BLOCK_SIZES[size_class]
        elif kind == KIND_SEGMENT:
            slots += live
            segments += 1
            earliest = min(earliest, second)
    return blocks, slots, segments, earliest


def find_partly_used(entries: bytes) -> list[int]:
    """Find the slab extents in which some blocks are live and some are not.

    Returns:
        For each one number: its class << 48 | live blocks that are not retired << 32 | live blocks
        << 16 | extent.
    """
    found = []
    words = memoryview(entries).cast("Q")
    for extent, entry in enumerate(words[::2].tolist()):
        if entry & ENTRY_KIND_MASK == KIND_SLAB:
            live, size_class = entry >> ENTRY_LIVE_SHIFT & 0xFFFF, entry >> ENTRY_CLASS_SHIFT & 0xFF
            if size_class < len(BLOCK_SIZES) and 0 < live < BLOCKS_PER_EXTENT[size_class]:
                retired = words[2 * extent + 1] >> _RETIRED_SHIFT & 0xFFFF
                current = max(live - retired, 0)
                found.append(size_class << 48 | current << 32 | live << 16 | extent)
    return found
