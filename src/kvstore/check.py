"""The checker: every structure of a file against every other, each breach in one plain line.

Reads the bytes of a file and trusts none of them, so it does not hang or die on a damaged one. Run
by the tests on every store as a test ends, and by ``kvstore-inspect verify``. It takes one bit of
memory for each 32 bytes of the file that it checks.
"""

import mmap
import os
from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol

from xxhash import xxh3_64_intdigest

from .layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_SIZE,
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
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_KEY_SIZE_OFFSET,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
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
    pack_identity,
    pack_state,
    record_checksum,
    segment_run,
    slot_offset,
)
from .segment import live_slots


class Problem(NamedTuple):
    """One breach of the format: where in the file, in what, and what is wrong."""

    offset: int
    structure: str
    message: str

    def __str__(self) -> str:
        return f"byte {self.offset:,}: {self.structure}: {self.message}"


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
            return [Problem(0, "file", "is empty")]
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            return list(check_image(image))


def check_image(image: Image) -> Iterator[Problem]:
    """Yield every breach of the format in the bytes of a file."""
    check = _Check(image)
    yield from check.superblock()
    if check.extent_count:
        yield from check.extents()
        yield from check.segments()
        yield from check.slabs()


class _Check:
    """A walk over all structures, and what the later ones need of the earlier."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.extent_count = 0
        self._seed = 0
        self._kinds: list[int] = []
        # Offsets, in steps of 32, of the records that a slot points to.
        self._pointed_to = bytearray()

    def _unpack_state(self) -> tuple[int, ...]:
        return STATE.unpack(self._image[STATE_OFFSET : STATE_OFFSET + STATE.size])

    def superblock(self) -> Iterator[Problem]:
        """Check both identities and the state; learn the hash seed and the file's extents."""
        if len(self._image) < (FIXED_EXTENTS + 1) * EXTENT_SIZE:
            yield Problem(0, "file", f"is {len(self._image):,} bytes, too short for a store")
            return
        seeds = []
        for offset in IDENTITY_OFFSETS:
            copy = self._image[offset : offset + IDENTITY.size]
            _, _, _, file_id, seed, created_at, _ = IDENTITY.unpack(copy)
            if copy == pack_identity(file_id, seed, created_at):
                seeds.append(seed)
            else:
                yield Problem(offset, "identity", "magic, version or checksum is wrong")
        if len(set(seeds)) != 1:
            yield Problem(0, "identity", f"{len(seeds)} valid copies, which do not agree")
            return
        self._seed = seeds[0]
        clean, count, durable, zero, index_checksum, checksum = self._unpack_state()
        expected = pack_state(bool(clean), count, durable, index_checksum, self._seed)
        if zero or expected != STATE.pack(clean, count, durable, zero, index_checksum, checksum):
            yield Problem(STATE_OFFSET, "state", "checksum or a reserved field is wrong")
            return
        if not clean:
            yield Problem(STATE_OFFSET, "state", "not clean: the next opening rebuilds the index")
        if durable > count or not FIXED_EXTENTS < count <= MAX_EXTENTS:
            yield Problem(STATE_OFFSET, "state", f"extent count {count}, durable count {durable}")
            return
        if len(self._image) != count * EXTENT_SIZE:
            yield Problem(
                STATE_OFFSET,
                "state",
                f"extent count {count} means {count * EXTENT_SIZE:,} bytes, "
                f"the file has {len(self._image):,}",
            )
        if len(self._image) < count * EXTENT_SIZE:
            return
        self.extent_count = count
        if clean and index_checksum != self._index_checksum():
            yield Problem(STATE_OFFSET, "state", "index checksum is wrong")

    def _index_checksum(self) -> int:
        return xxh3_64_intdigest(
            self._image[DIRECTORY_OFFSET : DIRECTORY_OFFSET + DIRECTORY_SIZE]
            + self._image[EXTENT_MAP_OFFSET : map_entry_offset(self.extent_count)]
            + self._image[ALLOCATOR_OFFSET : ALLOCATOR_OFFSET + ALLOCATOR_SIZE],
            self._seed,
        )

    def _u16(self, offset: int) -> int:
        number: int = U16.unpack(self._image[offset : offset + 2])[0]
        return number

    def _entry(self, extent: int) -> tuple[int, ...]:
        offset = map_entry_offset(extent)
        return SLAB_ENTRY.unpack(self._image[offset : offset + SLAB_ENTRY.size])

    # --- extents -------------------------------------------------------------------------------

    def extents(self) -> Iterator[Problem]:
        """Check kinds, the list of free extents, and the lists of extents with room."""
        fresh = self._u16(FRESH_EXTENT_OFFSET)
        if not FIXED_EXTENTS <= fresh <= self.extent_count:
            yield Problem(FRESH_EXTENT_OFFSET, "allocator", f"fresh extent is {fresh}")
        self._kinds = [self._entry(extent)[0] for extent in range(self.extent_count)]
        for extent, kind in enumerate(self._kinds):
            if (kind == KIND_FIXED) != (extent < FIXED_EXTENTS) or kind > KIND_SLAB:
                yield self._entry_problem(extent, f"kind is {kind}")
            elif extent >= fresh and kind != KIND_FREE:
                yield self._entry_problem(extent, f"kind is {kind}, but it is past the fresh one")
        free = yield from self._walk(FREE_EXTENTS_OFFSET, "list of free extents")
        for extent in free:
            if self._kinds[extent] != KIND_FREE or extent >= fresh:
                yield self._entry_problem(extent, "is on the list of free extents, but not free")
        unlisted = {
            extent
            for extent in range(FIXED_EXTENTS, min(fresh, self.extent_count))
            if self._kinds[extent] == KIND_FREE
        } - set(free)
        for extent in sorted(unlisted):
            yield self._entry_problem(extent, "is free, but not on the list of free extents")
        yield from self._class_lists()

    def _class_lists(self) -> Iterator[Problem]:
        with_room: dict[int, set[int]] = {}
        for extent, kind in enumerate(self._kinds):
            _, size_class, live, first_free, block, *_ = self._entry(extent)
            if kind != KIND_SLAB:
                continue
            if size_class >= len(BLOCK_SIZES):
                yield self._entry_problem(extent, f"size class is {size_class}")
                self._kinds[extent] = -1
            elif block > BLOCKS_PER_EXTENT[size_class] or not 0 < live <= block:
                yield self._entry_problem(extent, f"{live} live blocks, fresh block {block}")
                self._kinds[extent] = -1
            elif first_free != NO_BLOCK or block < BLOCKS_PER_EXTENT[size_class]:
                with_room.setdefault(size_class, set()).add(extent)
        for size_class in range(len(BLOCK_SIZES)):
            name = f"list of extents with room of class {size_class}"
            listed = yield from self._walk(class_head_offset(size_class), name)
            previous = NO_EXTENT
            for extent in listed:
                if self._entry(extent)[5] != previous:
                    yield self._entry_problem(extent, f"{name}: previous is not {previous}")
                previous = extent
            for extent in sorted(set(listed) ^ with_room.get(size_class, set())):
                yield self._entry_problem(extent, f"{name}: on it without room, or the reverse")
        for offset in range(
            class_head_offset(len(BLOCK_SIZES)), ALLOCATOR_OFFSET + ALLOCATOR_SIZE, 2
        ):
            if self._u16(offset):
                yield Problem(offset, "allocator", "list head of a size class that there is not")

    def _walk(self, head_offset: int, name: str) -> Generator[Problem, None, list[int]]:
        """Yield what is wrong with a list of extents; return those it leads to."""
        seen: dict[int, None] = {}
        extent = self._u16(head_offset)
        while extent != NO_EXTENT:
            if not FIXED_EXTENTS <= extent < self.extent_count or extent in seen:
                yield Problem(head_offset, name, f"leads to extent {extent}, or there again")
                break
            seen[extent] = None
            extent = self._entry(extent)[6]
        return list(seen)

    def _entry_problem(self, extent: int, message: str) -> Problem:
        return Problem(map_entry_offset(extent), f"extent {extent}", message)

    # --- table ---------------------------------------------------------------------------------

    def segments(self) -> Iterator[Problem]:
        """Check the directory's runs, and every segment that it leads to."""
        self._pointed_to = bytearray(self.extent_count * EXTENT_SIZE // 32 // 8 + 1)
        seen: set[int] = set()
        position = 0
        while position < DIRECTORY_ENTRIES:
            offset = DIRECTORY_OFFSET + 2 * position
            extent = self._u16(offset)
            position += 1
            if not extent < self.extent_count or self._kinds[extent] != KIND_SEGMENT:
                yield Problem(offset, "directory", f"extent {extent} is no segment")
                continue
            base = extent << EXTENT_SHIFT
            header = self._image[base : base + BUCKET_HEADER.size]
            marker, _, depth, prefix, _ = BUCKET_HEADER.unpack(header)
            if marker != bucket_marker(base):
                yield Problem(base, "bucket", "has no marker")
                continue
            if not MIN_DEPTH <= depth <= MAX_DEPTH or prefix != position - 1:
                yield Problem(base, "segment", f"depth {depth}, prefix {prefix} at {position - 1}")
                continue
            run = segment_run(depth)
            entries = self._image[offset : offset + 2 * run]
            if entries != U16.pack(extent) * run or extent in seen:
                yield Problem(offset, "directory", f"not the one run of {run} x {extent}")
            seen.add(extent)
            yield from self._segment(extent, depth, prefix)
            position = prefix + run
        for extent, kind in enumerate(self._kinds):
            if kind == KIND_SEGMENT and extent not in seen:
                yield self._entry_problem(extent, "is a segment that the directory does not name")

    def _segment(self, extent: int, depth: int, prefix: int) -> Iterator[Problem]:
        entry_offset = map_entry_offset(extent)
        _, _, live, used, _, earliest_of_segment = SEGMENT_ENTRY.unpack(
            self._image[entry_offset : entry_offset + SEGMENT_ENTRY.size]
        )
        live_found = used_found = 0
        full = [False] * BUCKET_COUNT
        homes: list[tuple[int, int, int]] = []
        for number in range(BUCKET_COUNT):
            bucket = (extent << EXTENT_SHIFT) + number * BUCKET_SIZE
            page = self._image[bucket : bucket + BUCKET_SIZE]
            marker, earliest, _, _, control = BUCKET_HEADER.unpack_from(page)
            if marker != bucket_marker(bucket):
                yield Problem(bucket, "bucket", "has no marker")
                return
            empty = control.count(CONTROL_EMPTY)
            tombstones = control.count(CONTROL_TOMBSTONE)
            full[number] = not empty
            if empty and tombstones:
                yield Problem(bucket, "bucket", "has both an empty slot and a tombstone")
            used_found += len(control) - empty
            live_found += len(control) - empty - tombstones
            least = max(earliest, earliest_of_segment)
            for index, _, slot in live_slots(page):
                offset = slot_offset(bucket, index)
                expires_at = SLOT.unpack(slot)[1]
                if expires_at and expires_at < least:
                    yield Problem(offset, "slot", "expires before what its bucket or segment says")
                hash_of_key = yield from self._slot(offset, slot)
                if hash_of_key is not None:
                    homes.append((hash_of_key & BUCKET_COUNT - 1, number, offset))
                    yield from _placed(offset, hash_of_key, depth, prefix, control[index])
        if (live, used) != (live_found, used_found):
            yield self._entry_problem(
                extent, f"says {live} live and {used} used slots, has {live_found} and {used_found}"
            )
        for home, number, offset in homes:
            passed = range(home, home + (number - home) % BUCKET_COUNT)
            if not all(full[bucket % BUCKET_COUNT] for bucket in passed):
                yield Problem(offset, "slot", f"cannot be found from bucket {home}, its home")

    def _slot(self, offset: int, slot: bytes) -> Generator[Problem, None, int | None]:
        """Yield what is wrong between a slot and its record; return the hash of its key."""
        start, expires_at, record, value_size, key_size = SLOT.unpack(slot)
        extent = record >> EXTENT_SHIFT
        if extent >= self.extent_count or self._kinds[extent] != KIND_SLAB:
            yield Problem(offset, "slot", f"its record at byte {record:,} is in no slab extent")
            return None
        size = RECORD_HEADER_SIZE + key_size + value_size
        size_class = self._entry(extent)[1]
        block_size = BLOCK_SIZES[size_class]
        if (record & EXTENT_SIZE - 1) % block_size or size > block_size:
            yield Problem(offset, "slot", f"no block of its size begins at byte {record:,}")
            return None
        mark, bit = record >> 8, 1 << (record >> 5 & 7)
        if self._pointed_to[mark] & bit:
            yield Problem(offset, "slot", f"another one points to its record at byte {record:,}")
        self._pointed_to[mark] |= bit
        contents = self._image[record : record + size]
        magic, values, keys, flags, created_at, expires, checksum = RECORD.unpack_from(contents)
        if (magic, values, keys, flags) != (RECORD_MAGIC, value_size, key_size, 0):
            yield Problem(record, "record", f"magic or sizes differ from its slot at {offset:,}")
            return None
        key = contents[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + key_size]
        if start != key[:SLOT_KEY_SIZE].ljust(SLOT_KEY_SIZE, b"\0") or expires != expires_at:
            yield Problem(record, "record", f"key or expiry differs from its slot at {offset:,}")
        hash_of_key = key_hash(key, self._seed)
        value = contents[RECORD_HEADER_SIZE + key_size :]
        if checksum != record_checksum(value, hash_of_key, created_at, expires, record):
            yield Problem(record, "record", "fails its checksum")
        if SIZE_CLASSES[size + 31 >> 5] != size_class:
            yield Problem(record, "record", f"takes {size:,} bytes in a block of {block_size:,}")
        return hash_of_key

    # --- slabs ---------------------------------------------------------------------------------

    def slabs(self) -> Iterator[Problem]:
        """Check every slab extent's blocks: each is live, on the free list, or fresh."""
        for extent in range(FIXED_EXTENTS, self.extent_count):
            contents = self._image[extent << EXTENT_SHIFT : (extent + 1) << EXTENT_SHIFT]
            magics = {
                position
                for position in _find_all(contents, RECORD_MAGIC_BYTES)
                if not position % BLOCK_ALIGNMENT and not _is_time(contents, position)
            }
            if self._kinds[extent] == KIND_SLAB:
                yield from self._slab(extent, contents, magics)
            else:
                for position in sorted(magics):
                    offset = (extent << EXTENT_SHIFT) + position
                    yield Problem(offset, "record", "its magic is outside of any slab extent")

    def _slab(self, extent: int, contents: bytes, magics: set[int]) -> Iterator[Problem]:
        _, size_class, live, first_free, fresh, *_ = self._entry(extent)
        base, block_size = extent << EXTENT_SHIFT, BLOCK_SIZES[size_class]
        free: dict[int, None] = {}
        block = first_free
        while block != NO_BLOCK:
            if block >= fresh or block in free:
                yield self._entry_problem(extent, f"free list leads to block {block}, or again")
                break
            free[block] = None
            magic, following, _ = FREE_BLOCK.unpack_from(contents, block * block_size)
            if magic != FREE_MAGIC:
                yield Problem(base + block * block_size, "free block", "has not the magic of one")
                break
            block = following
        blocks = {position // block_size for position in magics if not position % block_size}
        for position in sorted(magics):
            offset = base + position
            if position % block_size or position // block_size >= fresh:
                yield Problem(offset, "record", "its magic is not at a block in use")
            elif not self._pointed_to[offset >> 8] & 1 << (offset >> 5 & 7):
                yield Problem(offset, "record", "no slot points to it")
        if len(blocks) != live:
            yield self._entry_problem(extent, f"says {live} live blocks, has {len(blocks)}")
        for block in sorted(set(range(fresh)) - blocks - set(free)):
            yield Problem(base + block * block_size, "block", "neither live nor on the free list")


def _placed(
    offset: int, hash_of_key: int, depth: int, prefix: int, control: int
) -> Iterator[Problem]:
    """Yield what is wrong with where a slot is, given the hash of its key."""
    if hash_of_key >> DIRECTORY_SHIFT & -segment_run(depth) != prefix:
        yield Problem(offset, "slot", "its key belongs to another segment")
    if control != FINGERPRINT_CODES[hash_of_key >> FINGERPRINT_SHIFT & 0xFF]:
        yield Problem(offset, "slot", "its control byte is not its key's fingerprint")


def _is_time(contents: bytes, position: int) -> bool:
    """Tell whether an aligned magic is but the lower half of a time in a slot, or in what was one.

    One millisecond in 49.7 days looks so. A record has a key, whose size is where a time has zero.
    """
    return contents[position + RECORD_KEY_SIZE_OFFSET] == 0


def _find_all(contents: bytes, wanted: bytes) -> Iterator[int]:
    position = contents.find(wanted)
    while position >= 0:
        yield position
        position = contents.find(wanted, position + 1)
