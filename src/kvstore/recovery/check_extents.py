"""Superblock, extent map and allocator of a file, checked against each other."""

from collections.abc import Generator, Iterator

from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    KIND_FIXED,
    KIND_FREE,
    KIND_SLAB,
    MAX_EXTENTS,
    NO_BLOCK,
    NO_EXTENT,
    STATE,
    STATE_OFFSET,
    class_head_offset,
    map_entry_offset,
)
from kvstore.format.quick_check import count_records
from kvstore.format.superblock import index_checksum, unpack_identity, unpack_state

from .checked_file import CheckedFile, entry_problem
from .problems import Breach, Problem


def check_superblock(file: CheckedFile) -> Iterator[Problem]:
    """Check both identities and the state; learn the hash seed and the file's extents."""
    if len(file) < (FIXED_EXTENTS + 1) * EXTENT_SIZE:
        message = f"is {len(file):,} bytes, too short for a store"
        yield Problem(0, "file", message, Breach.FILE_TOO_SHORT)
        return
    copies = set()
    for offset in IDENTITY_OFFSETS:
        copy = file.read(offset, IDENTITY.size)
        identity = unpack_identity(copy)
        if identity is not None and identity.is_known_format:
            copies.add(copy)
            file.hash_seed = identity.hash_seed
        else:
            message = "magic, version or checksum is wrong"
            yield Problem(offset, "identity", message, Breach.IDENTITY_DAMAGED)
    if len(copies) != 1:
        breach = Breach.IDENTITIES_DIFFER if copies else Breach.IDENTITIES_LOST
        message = f"{len(copies)} valid copies, which do not agree"
        yield Problem(0, "identity", message, breach)
        return
    yield from _state(file)


def _state(file: CheckedFile) -> Iterator[Problem]:
    state = unpack_state(file.read(STATE_OFFSET, STATE.size), file.hash_seed)
    clean, count, durable, records, checksum, stamp, intact = state
    if not intact:
        message = "checksum or a reserved field is wrong"
        yield Problem(STATE_OFFSET, "state", message, Breach.STATE_DAMAGED)
        file.extent_count = min(len(file) >> EXTENT_SHIFT, MAX_EXTENTS)
        return
    file.least_live = 1 if clean else 0
    file.is_clean, file.latest_stamp = clean, stamp if clean else 0
    if not clean:
        message = "not clean: the next opening rebuilds the index"
        yield Problem(STATE_OFFSET, "state", message, Breach.NOT_CLOSED)
    if durable > count or not FIXED_EXTENTS < count <= MAX_EXTENTS:
        message = f"extent count {count}, durable count {durable}"
        yield Problem(STATE_OFFSET, "state", message, Breach.STATE_COUNTS)
        return
    size = len(file)
    if size != count * EXTENT_SIZE and not _ends_in_blank_extents(file, count):
        yield Problem(
            STATE_OFFSET,
            "state",
            f"extent count {count} means {count * EXTENT_SIZE:,} bytes, the file has {size:,}",
            _wrong_length(size, count, durable if not clean else count),
        )
    file.extent_count = count
    start = file.read(0, map_entry_offset(count))
    if clean and checksum != index_checksum(start, count, file.hash_seed):
        yield Problem(STATE_OFFSET, "state", "index checksum is wrong", Breach.INDEX_CHECKSUM)
    mapped = count_records(start[EXTENT_MAP_OFFSET:])
    if clean and records != mapped:
        message = f"says {records:,} records at closing, the extent map {mapped:,}"
        yield Problem(STATE_OFFSET, "state", message, Breach.STATE_RECORDS)


def _ends_in_blank_extents(file: CheckedFile, count: int) -> bool:
    """Return whether zeros follow the extents: a process died, or it cannot cut what is mapped."""
    end, size = count * EXTENT_SIZE, len(file)
    return end < size == size & -EXTENT_SIZE and not any(
        file.read(offset, EXTENT_SIZE).strip(b"\0") for offset in range(end, size, EXTENT_SIZE)
    )


def _wrong_length(size: int, count: int, durable: int) -> Breach:
    if size > count * EXTENT_SIZE:
        return Breach.FILE_TOO_LONG
    return Breach.FILE_CUT_OFF if size < durable * EXTENT_SIZE else Breach.GROWTH_LOST


def check_extents(file: CheckedFile) -> Iterator[Problem]:
    """Check kinds, the list of free extents, and the lists of extents with room."""
    fresh = file.u16(FRESH_EXTENT_OFFSET)
    if not FIXED_EXTENTS <= fresh <= file.extent_count:
        message = f"fresh extent is {fresh}"
        yield Problem(FRESH_EXTENT_OFFSET, "allocator", message, Breach.FRESH_EXTENT)
    for extent in range(file.extent_count):
        kind, size_class, *_ = file.entry(extent)
        file.kinds.append(kind)
        file.size_classes.append(size_class)
    for extent, kind in enumerate(file.kinds):
        if (kind == KIND_FIXED) != (extent < FIXED_EXTENTS) or kind > KIND_SLAB:
            yield entry_problem(extent, Breach.EXTENT_KIND, f"kind is {kind}")
        elif extent >= fresh and kind != KIND_FREE:
            message = f"kind is {kind}, but it is past the fresh one"
            yield entry_problem(extent, Breach.EXTENT_KIND, message)
    free = yield from _walk(
        file, FREE_EXTENTS_OFFSET, "list of free extents", Breach.FREE_EXTENTS_BROKEN
    )
    for extent in free:
        if file.kinds[extent] != KIND_FREE or extent >= fresh:
            message = "is on the list of free extents, but not free"
            yield entry_problem(extent, Breach.FREE_EXTENTS_IN_USE, message)
    unlisted = {
        extent
        for extent in range(FIXED_EXTENTS, min(fresh, file.extent_count))
        if file.kinds[extent] == KIND_FREE
    } - set(free)
    for extent in sorted(unlisted):
        message = "is free, but not on the list of free extents"
        yield entry_problem(extent, Breach.FREE_EXTENT_UNLISTED, message)
    yield from _class_lists(file)


def _class_lists(file: CheckedFile) -> Iterator[Problem]:
    with_room: dict[int, set[int]] = {}
    for extent, kind in enumerate(file.kinds):
        _, size_class, live, first_free, block, *_ = file.entry(extent)
        if kind != KIND_SLAB:
            continue
        if size_class >= len(BLOCK_SIZES):
            yield entry_problem(extent, Breach.SLAB_ENTRY, f"size class is {size_class}")
            file.kinds[extent] = -1
        elif block > BLOCKS_PER_EXTENT[size_class] or not file.least_live <= live <= block:
            message = f"{live} live blocks, fresh block {block}"
            yield entry_problem(extent, Breach.SLAB_ENTRY, message)
            file.kinds[extent] = -1
        elif first_free != NO_BLOCK or block < BLOCKS_PER_EXTENT[size_class]:
            with_room.setdefault(size_class, set()).add(extent)
    for size_class in range(len(BLOCK_SIZES)):
        name = f"list of extents with room of class {size_class}"
        head = class_head_offset(size_class)
        listed = yield from _walk(file, head, name, Breach.CLASS_LIST_BROKEN)
        previous = NO_EXTENT
        for extent in listed:
            if file.entry(extent)[5] != previous:
                message = f"{name}: previous is not {previous}"
                yield entry_problem(extent, Breach.CLASS_LIST_BROKEN, message)
            previous = extent
        for extent in sorted(set(listed) ^ with_room.get(size_class, set())):
            message = f"{name}: on it without room, or the reverse"
            yield entry_problem(extent, Breach.CLASS_LIST_MEMBERS, message)
    for offset in range(class_head_offset(len(BLOCK_SIZES)), ALLOCATOR_OFFSET + ALLOCATOR_SIZE, 2):
        if file.u16(offset):
            message = "list head of a size class that there is not"
            yield Problem(offset, "allocator", message, Breach.CLASS_LIST_UNKNOWN)


def _walk(
    file: CheckedFile, head_offset: int, name: str, breach: Breach
) -> Generator[Problem, None, list[int]]:
    """Yield what is wrong with a list of extents; return those it leads to."""
    seen: dict[int, None] = {}
    extent = file.u16(head_offset)
    while extent != NO_EXTENT:
        if not FIXED_EXTENTS <= extent < file.extent_count or extent in seen:
            message = f"leads to extent {extent}, or there again"
            yield Problem(head_offset, name, message, breach)
            break
        seen[extent] = None
        extent = file.entry(extent)[6]
    return list(seen)
