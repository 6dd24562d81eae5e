"""The checker: every structure of a file against every other, each breach in one plain line.

Reads the bytes of a file and trusts none of them, so it does not hang or die on a damaged one. Run
by the tests on every store as a test ends, and by ``kvstore-inspect verify``. It takes one bit of
memory for each 32 bytes of the file that it checks.
"""

import mmap
import os
from collections.abc import Callable, Generator, Iterator
from struct import Struct
from typing import Final, Protocol

from xxhash import xxh3_64_intdigest

from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
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
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_CODES,
    FINGERPRINT_SHIFT,
    FIXED_EXTENTS,
    FREE_BLOCK,
    FREE_EXTENTS_OFFSET,
    FREE_MAGIC,
    FRESH_EXTENT_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    KIND_FIXED,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    MAX_DEPTH,
    MAX_EXTENTS,
    MIN_DEPTH,
    NO_BLOCK,
    NO_EXTENT,
    REBUILDS_OFFSET,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SEGMENT_ENTRY,
    SIZE_CLASSES,
    SLAB_ENTRY,
    SLOT,
    SLOT_KEY_SIZE,
    STATE,
    STATE_OFFSET,
    U16,
    bucket_marker,
    class_head_offset,
    key_hash,
    map_entry_offset,
    record_checksum,
    segment_run,
    slot_offset,
)
from kvstore.format.quick_check import count_records
from kvstore.format.records import is_of_table, is_valid_record, magics
from kvstore.format.segment import live_slots
from kvstore.format.superblock import pack_identity, pack_state

from .problems import Breach, Problem

_DIRECTORY: Final = Struct(f"<{DIRECTORY_ENTRIES}H")


class Image(Protocol):
    """The bytes of a file: `bytes`, or a read-only map."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> bytes: ...


def check_file(path: str | os.PathLike[str]) -> list[Problem]:
    """Check the closed file at `path`; an empty list says that it is whole.

    Takes no lock and changes nothing. What a file in use shows may be half of a change.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return [Problem(0, "file", "is empty", Breach.FILE_EMPTY)]
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            return list(check_image(image))


def check_image(
    image: Image, progress: Callable[[int, int], object] = lambda _done, _whole: None
) -> Iterator[Problem]:
    """Yield every breach of the format in the bytes of a file; where it was cut off, read zeros.

    `progress` is called now and then with how much of the way is done, and the whole of it.
    """
    check = _Check(image, progress)
    yield from check.superblock()
    if check.extent_count:
        yield from check.extents()
        yield from check.segments()
        yield from check.slabs()


class _Check:
    """A walk over all structures, and what the later ones need of the earlier."""

    def __init__(self, image: Image, progress: Callable[[int, int], object]) -> None:
        self._image = image
        self._progress = progress
        self.extent_count = 0
        self._seed = 0
        # While a file is open, one extent that is empty may stay with its class.
        self._least_live = 0
        self._kinds: list[int] = []
        self._size_classes: list[int] = []
        # Offsets, in steps of 32, of the records that a slot points to.
        self._pointed_to = bytearray()

    def _bytes(self, offset: int, size: int) -> bytes:
        """Return so many bytes; zeros where the file ends, or is cut off meanwhile."""
        return self._image[offset : offset + size].ljust(size, b"\0")

    def superblock(self) -> Iterator[Problem]:
        """Check both identities and the state; learn the hash seed and the file's extents."""
        if len(self._image) < (FIXED_EXTENTS + 1) * EXTENT_SIZE:
            message = f"is {len(self._image):,} bytes, too short for a store"
            yield Problem(0, "file", message, Breach.FILE_TOO_SHORT)
            return
        copies = set()
        for offset in IDENTITY_OFFSETS:
            copy = self._bytes(offset, IDENTITY.size)
            _, _, _, file_id, seed, created_at, _ = IDENTITY.unpack(copy)
            if copy == pack_identity(file_id, seed, created_at):
                copies.add(copy)
                self._seed = seed
            else:
                message = "magic, version or checksum is wrong"
                yield Problem(offset, "identity", message, Breach.IDENTITY_DAMAGED)
        if len(copies) != 1:
            breach = Breach.IDENTITIES_DIFFER if copies else Breach.IDENTITIES_LOST
            message = f"{len(copies)} valid copies, which do not agree"
            yield Problem(0, "identity", message, breach)
            return
        yield from self._state()

    def _state(self) -> Iterator[Problem]:
        packed = self._bytes(STATE_OFFSET, STATE.size)
        clean, count, durable, records, index_checksum, _ = STATE.unpack(packed)
        if packed != pack_state(bool(clean), count, durable, records, index_checksum, self._seed):
            message = "checksum or a reserved field is wrong"
            yield Problem(STATE_OFFSET, "state", message, Breach.STATE_DAMAGED)
            self.extent_count = min(len(self._image) >> EXTENT_SHIFT, MAX_EXTENTS)
            return
        self._least_live = 1 if clean else 0
        if not clean:
            message = "not clean: the next opening rebuilds the index"
            yield Problem(STATE_OFFSET, "state", message, Breach.NOT_CLOSED)
        if durable > count or not FIXED_EXTENTS < count <= MAX_EXTENTS:
            message = f"extent count {count}, durable count {durable}"
            yield Problem(STATE_OFFSET, "state", message, Breach.STATE_COUNTS)
            return
        size = len(self._image)
        if size != count * EXTENT_SIZE:
            yield Problem(
                STATE_OFFSET,
                "state",
                f"extent count {count} means {count * EXTENT_SIZE:,} bytes, the file has {size:,}",
                _wrong_length(size, count, durable if not clean else count),
            )
        self.extent_count = count
        if clean and index_checksum != self._index_checksum():
            yield Problem(STATE_OFFSET, "state", "index checksum is wrong", Breach.INDEX_CHECKSUM)
        mapped = count_records(self._bytes(EXTENT_MAP_OFFSET, SLAB_ENTRY.size * count))
        if clean and records != mapped:
            message = f"says {records:,} records at closing, the extent map {mapped:,}"
            yield Problem(STATE_OFFSET, "state", message, Breach.STATE_RECORDS)

    def _index_checksum(self) -> int:
        return xxh3_64_intdigest(
            self._bytes(DIRECTORY_OFFSET, DIRECTORY_SIZE)
            + self._bytes(EXTENT_MAP_OFFSET, SLAB_ENTRY.size * self.extent_count)
            + self._bytes(ALLOCATOR_OFFSET, ALLOCATOR_SIZE),
            self._seed,
        )

    def _u16(self, offset: int) -> int:
        number: int = U16.unpack(self._bytes(offset, U16.size))[0]
        return number

    def _entry(self, extent: int) -> tuple[int, ...]:
        return SLAB_ENTRY.unpack(self._bytes(map_entry_offset(extent), SLAB_ENTRY.size))

    # --- extents -------------------------------------------------------------------------------

    def extents(self) -> Iterator[Problem]:
        """Check kinds, the list of free extents, and the lists of extents with room."""
        fresh = self._u16(FRESH_EXTENT_OFFSET)
        if not FIXED_EXTENTS <= fresh <= self.extent_count:
            message = f"fresh extent is {fresh}"
            yield Problem(FRESH_EXTENT_OFFSET, "allocator", message, Breach.FRESH_EXTENT)
        for extent in range(self.extent_count):
            kind, size_class, *_ = self._entry(extent)
            self._kinds.append(kind)
            self._size_classes.append(size_class)
        for extent, kind in enumerate(self._kinds):
            if (kind == KIND_FIXED) != (extent < FIXED_EXTENTS) or kind > KIND_SLAB:
                yield self._entry_problem(extent, Breach.EXTENT_KIND, f"kind is {kind}")
            elif extent >= fresh and kind != KIND_FREE:
                message = f"kind is {kind}, but it is past the fresh one"
                yield self._entry_problem(extent, Breach.EXTENT_KIND, message)
        free = yield from self._walk(
            FREE_EXTENTS_OFFSET, "list of free extents", Breach.FREE_EXTENTS_BROKEN
        )
        for extent in free:
            if self._kinds[extent] != KIND_FREE or extent >= fresh:
                message = "is on the list of free extents, but not free"
                yield self._entry_problem(extent, Breach.FREE_EXTENTS_IN_USE, message)
        unlisted = {
            extent
            for extent in range(FIXED_EXTENTS, min(fresh, self.extent_count))
            if self._kinds[extent] == KIND_FREE
        } - set(free)
        for extent in sorted(unlisted):
            message = "is free, but not on the list of free extents"
            yield self._entry_problem(extent, Breach.FREE_EXTENT_UNLISTED, message)
        yield from self._class_lists()

    def _class_lists(self) -> Iterator[Problem]:
        with_room: dict[int, set[int]] = {}
        for extent, kind in enumerate(self._kinds):
            _, size_class, live, first_free, block, *_ = self._entry(extent)
            if kind != KIND_SLAB:
                continue
            if size_class >= len(BLOCK_SIZES):
                yield self._entry_problem(extent, Breach.SLAB_ENTRY, f"size class is {size_class}")
                self._kinds[extent] = -1
            elif block > BLOCKS_PER_EXTENT[size_class] or not self._least_live <= live <= block:
                message = f"{live} live blocks, fresh block {block}"
                yield self._entry_problem(extent, Breach.SLAB_ENTRY, message)
                self._kinds[extent] = -1
            elif first_free != NO_BLOCK or block < BLOCKS_PER_EXTENT[size_class]:
                with_room.setdefault(size_class, set()).add(extent)
        for size_class in range(len(BLOCK_SIZES)):
            name = f"list of extents with room of class {size_class}"
            head = class_head_offset(size_class)
            listed = yield from self._walk(head, name, Breach.CLASS_LIST_BROKEN)
            previous = NO_EXTENT
            for extent in listed:
                if self._entry(extent)[5] != previous:
                    message = f"{name}: previous is not {previous}"
                    yield self._entry_problem(extent, Breach.CLASS_LIST_BROKEN, message)
                previous = extent
            for extent in sorted(set(listed) ^ with_room.get(size_class, set())):
                message = f"{name}: on it without room, or the reverse"
                yield self._entry_problem(extent, Breach.CLASS_LIST_MEMBERS, message)
        for offset in range(
            class_head_offset(len(BLOCK_SIZES)), ALLOCATOR_OFFSET + ALLOCATOR_SIZE, 2
        ):
            if self._u16(offset):
                message = "list head of a size class that there is not"
                yield Problem(offset, "allocator", message, Breach.CLASS_LIST_UNKNOWN)

    def _walk(
        self, head_offset: int, name: str, breach: Breach
    ) -> Generator[Problem, None, list[int]]:
        """Yield what is wrong with a list of extents; return those it leads to."""
        seen: dict[int, None] = {}
        extent = self._u16(head_offset)
        while extent != NO_EXTENT:
            if not FIXED_EXTENTS <= extent < self.extent_count or extent in seen:
                message = f"leads to extent {extent}, or there again"
                yield Problem(head_offset, name, message, breach)
                break
            seen[extent] = None
            extent = self._entry(extent)[6]
        return list(seen)

    def _entry_problem(self, extent: int, breach: Breach, message: str) -> Problem:
        return Problem(map_entry_offset(extent), f"extent {extent}", message, breach)

    # --- table ---------------------------------------------------------------------------------

    def segments(self) -> Iterator[Problem]:
        """Check the directory's runs, and every segment that it leads to."""
        self._pointed_to = bytearray(self.extent_count * EXTENT_SIZE // 32 // 8 + 1)
        directory = _DIRECTORY.unpack(self._bytes(DIRECTORY_OFFSET, DIRECTORY_SIZE))
        seen: set[int] = set()
        position = 0
        while position < DIRECTORY_ENTRIES:
            self._progress(position, DIRECTORY_ENTRIES + self.extent_count)
            start, extent = position, directory[position]
            offset = DIRECTORY_OFFSET + 2 * start
            while position < DIRECTORY_ENTRIES and directory[position] == extent:
                position += 1
            if not extent < self.extent_count or self._kinds[extent] != KIND_SEGMENT:
                message = f"extent {extent} is no segment (entries {start} to {position - 1})"
                yield Problem(offset, "directory", message, Breach.DIRECTORY_ENTRY)
                continue
            depth = yield from self._depth(extent, start, position)
            if depth < 0:
                continue
            run = segment_run(depth)
            if position != start + run or extent in seen:
                message = f"not the one run of {run} x {extent}"
                yield Problem(offset, "directory", message, Breach.DIRECTORY_RUN)
            seen.add(extent)
            yield from self._segment(extent, depth, start)
            position = start + run
        for extent, kind in enumerate(self._kinds):
            if kind == KIND_SEGMENT and extent not in seen:
                message = "is a segment that the directory does not name"
                yield self._entry_problem(extent, Breach.SEGMENT_UNNAMED, message)

    def _depth(self, extent: int, start: int, end: int) -> Generator[Problem, None, int]:
        """Yield what is wrong with a segment's first header; return its depth, -1 where unknown.

        The directory's entries from `start` to before `end` lead to it.
        """
        base = extent << EXTENT_SHIFT
        marker, _, depth, prefix, rebuilds, *_ = BUCKET_HEADER.unpack(
            self._bytes(base, BUCKET_HEADER.size)
        )
        if marker == bucket_marker(base):
            expected = self._u16(REBUILDS_OFFSET)
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

    def _segment(self, extent: int, depth: int, prefix: int) -> Iterator[Problem]:
        _, _, live, used, _, earliest_of_segment = SEGMENT_ENTRY.unpack(
            self._bytes(map_entry_offset(extent), SEGMENT_ENTRY.size)
        )
        live_found = used_found = 0
        whole = True
        expected: int | None = None
        full = [False] * BUCKET_COUNT
        homes: list[tuple[int, int, int]] = []
        keys: dict[bytes, tuple[int, int]] = {}
        for number in range(BUCKET_COUNT):
            bucket = (extent << EXTENT_SHIFT) + number * BUCKET_SIZE
            page = self._bytes(bucket, BUCKET_SIZE)
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
                held = yield from self._slot(offset, slot)
                if held is not None:
                    key, hash_of_key = held
                    homes.append((hash_of_key & BUCKET_COUNT - 1, number, offset))
                    yield from _placed(offset, hash_of_key, depth, prefix, control[index])
                    record, first = keys.setdefault(key, (SLOT.unpack(slot)[2], offset))
                    if record != SLOT.unpack(slot)[2]:
                        message = f"has the key of the slot at byte {first:,}"
                        yield Problem(offset, "slot", message, Breach.SLOT_SAME_KEY)
        if whole and (live, used) != (live_found, used_found):
            message = f"says {live} live and {used} used slots, has {live_found} and {used_found}"
            yield self._entry_problem(extent, Breach.SEGMENT_COUNTS, message)
        for home, number, offset in homes:
            passed = range(home, home + (number - home) % BUCKET_COUNT)
            if not all(full[bucket % BUCKET_COUNT] for bucket in passed):
                message = f"cannot be found from bucket {home}, its home"
                yield Problem(offset, "slot", message, Breach.SLOT_UNREACHED)

    def _slot(self, offset: int, slot: bytes) -> Generator[Problem, None, tuple[bytes, int] | None]:
        """Yield what is wrong between a slot and its record; return its key, and the hash of it."""
        start, expires_at, record, value_size, key_size = SLOT.unpack(slot)
        extent = record >> EXTENT_SHIFT
        if extent >= self.extent_count or self._kinds[extent] != KIND_SLAB:
            message = f"its record at byte {record:,} is in no slab extent"
            yield Problem(offset, "slot", message, Breach.SLOT_RECORD)
            return None
        size = RECORD_HEADER_SIZE + key_size + value_size
        size_class = self._size_classes[extent]
        block_size = BLOCK_SIZES[size_class]
        if (record & EXTENT_SIZE - 1) % block_size or size > block_size:
            message = f"no block of its size begins at byte {record:,}"
            yield Problem(offset, "slot", message, Breach.SLOT_RECORD)
            return None
        mark, bit = record >> 8, 1 << (record >> 5 & 7)
        if self._pointed_to[mark] & bit:
            message = f"another one points to its record at byte {record:,}"
            yield Problem(offset, "slot", message, Breach.SLOT_SHARED)
        self._pointed_to[mark] |= bit
        contents = self._bytes(record, size)
        magic, values, keys, flags, created_at, expires, checksum = RECORD.unpack_from(contents)
        if (magic, values, keys, flags) != (RECORD_MAGIC, value_size, key_size, 0):
            message = f"magic or sizes differ from its slot at {offset:,}"
            yield Problem(record, "record", message, Breach.RECORD_HEADER, offset)
            return None
        key = contents[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + key_size]
        of_slot = start == key[:SLOT_KEY_SIZE].ljust(SLOT_KEY_SIZE, b"\0")
        if not of_slot or expires != expires_at:
            message = f"key or expiry differs from its slot at {offset:,}"
            yield Problem(record, "record", message, Breach.RECORD_KEY, offset)
        hash_of_key = key_hash(key, self._seed)
        value = contents[RECORD_HEADER_SIZE + key_size :]
        if checksum != record_checksum(value, hash_of_key, created_at, expires, record):
            message = "fails its checksum"
            yield Problem(record, "record", message, Breach.RECORD_CHECKSUM, offset)
            if not of_slot:
                return None  # nobody knows the key, and so where its slot should be
        if SIZE_CLASSES[size + 31 >> 5] != size_class:
            message = f"takes {size:,} bytes in a block of {block_size:,}"
            yield Problem(record, "record", message, Breach.RECORD_CLASS, offset)
        return key, hash_of_key

    # --- slabs ---------------------------------------------------------------------------------

    def slabs(self) -> Iterator[Problem]:
        """Check every slab extent's blocks: each is live, on the free list, or fresh."""
        for extent in range(FIXED_EXTENTS, self.extent_count):
            self._progress(DIRECTORY_ENTRIES + extent, DIRECTORY_ENTRIES + self.extent_count)
            base = extent << EXTENT_SHIFT
            contents = self._bytes(base, EXTENT_SIZE)
            found = {
                position
                for position in magics(contents)
                if not is_of_table(contents, position, base)
                or is_valid_record(contents, position, base, self._seed)
            }
            if self._kinds[extent] == KIND_SLAB:
                yield from self._slab(extent, contents, found)
            else:
                for position in sorted(found):
                    offset = base + position
                    message = "its magic is outside of any slab extent"
                    yield Problem(offset, "record", message, Breach.RECORD_OUTSIDE)

    def _slab(self, extent: int, contents: bytes, found: set[int]) -> Iterator[Problem]:
        _, size_class, live, first_free, fresh, *_ = self._entry(extent)
        base, block_size = extent << EXTENT_SHIFT, BLOCK_SIZES[size_class]
        free: dict[int, None] = {}
        block = first_free
        while block != NO_BLOCK:
            if block >= fresh or block in free:
                message = f"free list leads to block {block}, or again"
                yield self._entry_problem(extent, Breach.FREE_BLOCKS_BROKEN, message)
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
            elif not self._pointed_to[offset >> 8] & 1 << (offset >> 5 & 7):
                yield Problem(offset, "record", "no slot points to it", Breach.RECORD_UNSLOTTED)
        if len(blocks) != live:
            message = f"says {live} live blocks, has {len(blocks)}"
            yield self._entry_problem(extent, Breach.SLAB_COUNT, message)
        for block in sorted(set(range(fresh)) - blocks - set(free)):
            message = "neither live nor on the free list"
            yield Problem(base + block * block_size, "block", message, Breach.BLOCK_LEAKED)


def _wrong_length(size: int, count: int, durable: int) -> Breach:
    if size > count * EXTENT_SIZE:
        return Breach.FILE_TOO_LONG
    return Breach.FILE_CUT_OFF if size < durable * EXTENT_SIZE else Breach.GROWTH_LOST


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


def _no_free_block(offset: int, magic: int) -> Problem:
    """Return what is wrong with a block on a free list that has not the magic of one."""
    if magic == RECORD_MAGIC:
        message = "has the magic of a record, and is on the free list"
        return Problem(offset, "free block", message, Breach.FREE_BLOCKS_LIVE)
    return Problem(offset, "free block", "has not the magic of one", Breach.FREE_BLOCKS_BROKEN)
