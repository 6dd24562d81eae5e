"""The table of a file: directory, segments, buckets and slots, and the records they point to."""

from collections.abc import Generator, Iterator
from struct import Struct
from typing import Final

from kvstore.format.bucket import live_slots
from kvstore.format.layout import (
    BLOCK_SIZES,
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_SIZE,
    BUCKET_WORDS,
    CONTROL_EMPTY,
    CONTROL_TOMBSTONE,
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    DIRECTORY_SHIFT,
    DIRECTORY_SIZE,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_CODES,
    FINGERPRINT_SHIFT,
    KIND_SEGMENT,
    KIND_SLAB,
    MARKED_MAGIC,
    MAX_DEPTH,
    MIN_DEPTH,
    REBUILDS_OFFSET,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SEGMENT_ENTRY,
    SIZE_CLASSES,
    SLOT,
    SLOT_FLAGS,
    SLOT_KEY_SIZE,
    SLOT_RECORD_MASK,
    bucket_marker,
    key_hash,
    map_entry_offset,
    record_checksum,
    segment_run,
    slot_offset,
)

from .checked_file import CheckedFile, entry_problem
from .problems import Breach, Problem

_DIRECTORY: Final = Struct(f"<{DIRECTORY_ENTRIES}H")


def check_table(file: CheckedFile) -> Iterator[Problem]:
    """Check the directory's runs, and every segment that it leads to."""
    file.expect_slots()
    directory = _DIRECTORY.unpack(file.read(DIRECTORY_OFFSET, DIRECTORY_SIZE))
    seen: set[int] = set()
    position = 0
    while position < DIRECTORY_ENTRIES:
        file.progress(position, DIRECTORY_ENTRIES + file.extent_count)
        start, extent = position, directory[position]
        offset = DIRECTORY_OFFSET + 2 * start
        while position < DIRECTORY_ENTRIES and directory[position] == extent:
            position += 1
        if not extent < file.extent_count or file.kinds[extent] != KIND_SEGMENT:
            message = f"extent {extent} is no segment (entries {start} to {position - 1})"
            yield Problem(offset, "directory", message, Breach.DIRECTORY_ENTRY)
            continue
        depth = yield from _depth(file, extent, start, position)
        if depth < 0:
            continue
        run = segment_run(depth)
        if position != start + run or extent in seen:
            message = f"not the one run of {run} x {extent}"
            yield Problem(offset, "directory", message, Breach.DIRECTORY_RUN)
        seen.add(extent)
        yield from _segment(file, extent, depth, start)
        position = start + run
    for extent, kind in enumerate(file.kinds):
        if kind == KIND_SEGMENT and extent not in seen:
            message = "is a segment that the directory does not name"
            yield entry_problem(extent, Breach.SEGMENT_UNNAMED, message)


def _depth(file: CheckedFile, extent: int, start: int, end: int) -> Generator[Problem, None, int]:
    """Yield what is wrong with a segment's first header; return its depth, -1 where unknown.

    The directory's entries from `start` to before `end` lead to it.
    """
    base = extent << EXTENT_SHIFT
    marker, _, depth, prefix, rebuilds, *_ = BUCKET_HEADER.unpack(
        file.read(base, BUCKET_HEADER.size)
    )
    if marker == bucket_marker(base):
        expected = file.u16(REBUILDS_OFFSET)
        if rebuilds != expected:
            message = f"of {rebuilds} rebuilds of the index, the allocator says {expected}"
            yield Problem(base, "segment", message, Breach.SEGMENT_HEADER)
        if MIN_DEPTH <= depth <= MAX_DEPTH and prefix == start:
            return int(depth)
        message = f"depth {depth}, prefix {prefix} at {start}"
        yield Problem(base, "segment", message, Breach.SEGMENT_HEADER)
    # What else is in the segment can be found by the directory alone, and so is checked.
    for depth in range(MIN_DEPTH, MAX_DEPTH + 1):
        if segment_run(depth) == end - start and start % (end - start) == 0:
            return int(depth)
    if marker != bucket_marker(base):
        yield _no_marker(base)
    return -1


def _segment(file: CheckedFile, extent: int, depth: int, prefix: int) -> Iterator[Problem]:
    _, _, live, used, _, earliest_of_segment = SEGMENT_ENTRY.unpack(
        file.read(map_entry_offset(extent), SEGMENT_ENTRY.size)
    )
    live_found = used_found = 0
    whole = True
    expected: int | None = None
    full = [False] * BUCKET_COUNT
    homes: list[tuple[int, int, int]] = []
    keys: dict[bytes, tuple[int, int]] = {}
    for number in range(BUCKET_COUNT):
        bucket = (extent << EXTENT_SHIFT) + number * BUCKET_SIZE
        page = file.read(bucket, BUCKET_SIZE)
        marker, earliest, shape, control = BUCKET_WORDS.unpack_from(page)
        if marker != bucket_marker(bucket):
            yield _no_marker(bucket)
            whole, full[number] = False, True
            continue
        expected = shape if expected is None else expected
        if shape != expected:
            message = "depth, prefix, rebuilds and rewrites are not those of its segment"
            yield Problem(bucket, "bucket", message, Breach.BUCKET_SHAPE)
        empty = control.count(CONTROL_EMPTY)
        tombstones = control.count(CONTROL_TOMBSTONE)
        full[number] = not empty
        if empty and tombstones:
            message = "has both an empty slot and a tombstone"
            yield Problem(bucket, "bucket", message, Breach.BUCKET_TOMBSTONE)
        used_found += len(control) - empty
        live_found += len(control) - empty - tombstones
        least = max(earliest, earliest_of_segment)
        for index, _, slot in live_slots(page):
            offset = slot_offset(bucket, index)
            expires_at = SLOT.unpack(slot)[1]
            if expires_at and expires_at < least:
                message = "expires before what its bucket or segment says"
                yield Problem(offset, "slot", message, Breach.SLOT_EXPIRY)
            held = yield from _slot(file, offset, slot)
            if held is not None:
                key, hash_of_key = held
                homes.append((hash_of_key & BUCKET_COUNT - 1, number, offset))
                yield from _placed(offset, hash_of_key, depth, prefix, control[index])
                place = SLOT.unpack(slot)[2] & SLOT_RECORD_MASK
                record, first = keys.setdefault(key, (place, offset))
                if record != place:
                    message = f"has the key of the slot at byte {first:,}"
                    yield Problem(offset, "slot", message, Breach.SLOT_SAME_KEY)
    if whole and (live, used) != (live_found, used_found):
        message = f"says {live} live and {used} used slots, has {live_found} and {used_found}"
        yield entry_problem(extent, Breach.SEGMENT_COUNTS, message)
    for home, number, offset in homes:
        passed = range(home, home + (number - home) % BUCKET_COUNT)
        if not all(full[bucket % BUCKET_COUNT] for bucket in passed):
            message = f"cannot be found from bucket {home}, its home"
            yield Problem(offset, "slot", message, Breach.SLOT_UNREACHED)


def _slot(
    file: CheckedFile, offset: int, slot: bytes
) -> Generator[Problem, None, tuple[bytes, int] | None]:
    """Yield what is wrong between a slot and its record; return its key, and the hash of it."""
    start, expires_at, place, value_size, key_size = SLOT.unpack(slot)
    record = place & SLOT_RECORD_MASK
    if place - record & ~SLOT_FLAGS:
        message = f"has flags that there are not: 0x{place - record:02X}"
        yield Problem(offset, "slot", message, Breach.SLOT_FLAGS)
    extent = record >> EXTENT_SHIFT
    if extent >= file.extent_count or file.kinds[extent] != KIND_SLAB:
        message = f"its record at byte {record:,} is in no slab extent"
        yield Problem(offset, "slot", message, Breach.SLOT_RECORD)
        return None
    size = RECORD_HEADER_SIZE + key_size + value_size
    size_class = file.size_classes[extent]
    block_size = BLOCK_SIZES[size_class]
    if (record & EXTENT_SIZE - 1) % block_size or size > block_size:
        message = f"no block of its size begins at byte {record:,}"
        yield Problem(offset, "slot", message, Breach.SLOT_RECORD)
        return None
    if file.is_pointed_to(record):
        message = f"another one points to its record at byte {record:,}"
        yield Problem(offset, "slot", message, Breach.SLOT_SHARED)
    file.point_to(record)
    contents = file.read(record, size)
    magic, values, keys, generation, stamp, expires, checksum = RECORD.unpack_from(contents)
    if magic not in (RECORD_MAGIC, MARKED_MAGIC) or (values, keys) != (value_size, key_size):
        message = f"magic or sizes differ from its slot at {offset:,}"
        yield Problem(record, "record", message, Breach.RECORD_HEADER, offset)
        return None
    if magic == MARKED_MAGIC or generation:
        what = "marked as deleted" if magic == MARKED_MAGIC else "retired"
        message = f"its record at byte {record:,} is {what}"
        yield Problem(offset, "slot", message, Breach.SLOT_RETIRED)
    key = contents[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + key_size]
    of_slot = start == key[:SLOT_KEY_SIZE].ljust(SLOT_KEY_SIZE, b"\0")
    if not of_slot or expires != expires_at:
        message = f"key or expiry differs from its slot at {offset:,}"
        yield Problem(record, "record", message, Breach.RECORD_KEY, offset)
    hash_of_key = key_hash(key, file.hash_seed)
    value = contents[RECORD_HEADER_SIZE + key_size :]
    if checksum != record_checksum(value, hash_of_key, stamp, expires, record):
        message = "fails its checksum"
        yield Problem(record, "record", message, Breach.RECORD_CHECKSUM, offset)
        if not of_slot:
            return None  # nobody knows the key, and so where its slot should be
    if SIZE_CLASSES[size + 31 >> 5] != size_class:
        message = f"takes {size:,} bytes in a block of {block_size:,}"
        yield Problem(record, "record", message, Breach.RECORD_CLASS, offset)
    return key, hash_of_key


def stamp_in_slot(file: CheckedFile, key: bytes) -> int | None:
    """Return the stamp of the record that the slot of a key leads to; None where it has no slot."""
    hash_of_key = key_hash(key, file.hash_seed)
    extent = file.u16(DIRECTORY_OFFSET + 2 * (hash_of_key >> DIRECTORY_SHIFT))
    if extent >= file.extent_count or file.kinds[extent] != KIND_SEGMENT:
        return None
    for step in range(BUCKET_COUNT):
        number = (hash_of_key + step) % BUCKET_COUNT
        page = file.read((extent << EXTENT_SHIFT) + number * BUCKET_SIZE, BUCKET_SIZE)
        for _, _, slot in live_slots(page):
            start, _, place, _, key_size = SLOT.unpack(slot)
            if key_size == len(key) and key.startswith(start[:key_size]):
                record = file.read(place & SLOT_RECORD_MASK, RECORD_HEADER_SIZE + key_size)
                if record[RECORD_HEADER_SIZE:] == key:
                    return int(RECORD.unpack_from(record)[4])
        if CONTROL_EMPTY in BUCKET_WORDS.unpack_from(page)[3]:
            return None
    return None


def _placed(
    offset: int, hash_of_key: int, depth: int, prefix: int, control: int
) -> Iterator[Problem]:
    """Yield what is wrong with where a slot is, given the hash of its key."""
    if hash_of_key >> DIRECTORY_SHIFT & -segment_run(depth) != prefix:
        yield Problem(offset, "slot", "its key belongs to another segment", Breach.SLOT_SEGMENT)
    if control != FINGERPRINT_CODES[hash_of_key >> FINGERPRINT_SHIFT & 0xFF]:
        message = "its control byte is not its key's fingerprint"
        yield Problem(offset, "slot", message, Breach.SLOT_FINGERPRINT)


def _no_marker(bucket: int) -> Problem:
    return Problem(bucket, "bucket", "has no marker", Breach.BUCKET_MARKER)
