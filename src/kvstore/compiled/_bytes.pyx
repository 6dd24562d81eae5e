# cython: boundscheck=False, wraparound=False, cdivision=True, binding=False
# cython: auto_pickle=False, freethreading_compatible=True
"""What splits and recovery do for each slot and record, or for each extent: pure functions of bytes.

Each has a function of the same name, arguments and results in `kvstore.format`, which tells what it
does: see `kvstore.compiled.Implementation`.

Whatever is read is bounded before it is followed. Words are read and written by `memcpy`, which
asks for no alignment. A number of more than 31 bits is never written out but as a name or with a
type: Cython would go through objects. Nor is there a typed memoryview: what Cython has for these
would be half of this module.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset

from array import array

from xxhash import xxh3_64_intdigest

include "layout_constants.pxi"
include "words.pxi"
include "members.pxi"

cdef inline uint8_t *bytes_of(bytes object_) noexcept:
    return <uint8_t *>PyBytes_AS_STRING(object_)


@cython.final
@cython.no_gc
cdef class View:
    """The memory of an object, which keeps it for as long as this is there."""

    cdef Py_buffer buffer
    cdef uint8_t *start

    def __cinit__(self, viewed):
        PyObject_GetBuffer(viewed, &self.buffer, PyBUF_SIMPLE)
        self.start = <uint8_t *>self.buffer.buf

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)

    cdef Py_ssize_t count(self, Py_ssize_t size) except -1:
        """Return how many items there are, each of so many bytes."""
        if self.buffer.itemsize != size:
            raise ValueError(f"items of {self.buffer.itemsize} bytes, not of {size}")
        return self.buffer.len // size


# --- records: `format.extent_records` ------------------------------------------------------------


def find_magics(bytes contents not None):
    cdef const uint8_t *start = bytes_of(contents)
    cdef const uint8_t *place = start
    cdef const uint8_t *first = NULL
    cdef uint64_t count = 0, aligned = 0, left = len(contents)
    cdef uint32_t magic
    while left >= sizeof(magic):
        # Both begin with this byte.
        place = <const uint8_t *>memchr(place, <uint8_t>RECORD_MAGIC, left - sizeof(magic) + 1)
        if place is NULL:
            break
        memcpy(&magic, place, sizeof(magic))
        if magic == RECORD_MAGIC or magic == MARKED_MAGIC:
            count += 1
            if <uint64_t>(place - start) % BLOCK_ALIGNMENT == 0:
                aligned += 1
                first = place if first is NULL else first
        place += 1
        left = len(contents) - <uint64_t>(place - start)
    return count, aligned, -1 if first is NULL else first - start


def scan_blocks(
    bytes contents not None,
    uint64_t base,
    uint64_t size_class,
    uint64_t hash_seed,
    uint64_t now_ms,
    uint64_t void_stamp,
):
    if len(contents) != EXTENT_SIZE:
        raise ValueError(f"{len(contents):,} bytes, an extent has {EXTENT_SIZE:,}")
    if size_class >= sizeof(BLOCK_SIZES) // sizeof(BLOCK_SIZES[0]):
        raise IndexError(f"there is no size class {size_class}")
    cdef uint64_t block_size = BLOCK_SIZES[size_class]
    cdef uint64_t least = BLOCK_SIZES[size_class - 1] if size_class else RECORD_HEADER_SIZE
    cdef uint64_t number = BLOCKS_PER_EXTENT[size_class]
    cdef bytes positions = PyBytes_FromStringAndSize(NULL, number * sizeof(uint16_t))
    cdef bytes words = PyBytes_FromStringAndSize(NULL, number * sizeof(uint64_t))
    cdef uint16_t *next_position = <uint16_t *>bytes_of(positions)
    cdef const uint8_t *record
    cdef const uint8_t *key
    cdef uint64_t position, head, key_size, value_size, key_hash, stamp, expires_at, seed, word
    cdef uint64_t latest = 0
    cdef Py_ssize_t count = 0
    cdef list doubtful = []
    for position in range(0, number * block_size, block_size):
        record = bytes_of(contents) + position
        head = load(record)
        key_size = head >> SLOT_KEY_SIZE_SHIFT & 0xFF
        value_size = head >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF
        if not (
            (<uint32_t>head == RECORD_MAGIC or <uint32_t>head == MARKED_MAGIC)
            and 0 < key_size <= MAX_KEY_SIZE
            and MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE
            and least < RECORD_HEADER_SIZE + key_size + value_size <= block_size
        ):
            continue
        stamp = load(record + RECORD_STAMP_OFFSET)
        expires_at = load(record + RECORD_EXPIRES_OFFSET)
        if stamp >= STAMP_LIMIT or expires_at >= TIME_LIMIT:
            continue
        key = record + RECORD_HEADER_SIZE
        key_hash = digest(key, key_size, hash_seed)
        seed = key_hash ^ stamp ^ expires_at << EXPIRY_SEED_SHIFT ^ base + position
        if digest(key + key_size, value_size, seed) == load(record + RECORD_CHECKSUM_OFFSET):
            word = key_hash & FOUND_HASH_MASK | base + position << FOUND_OFFSET_SHIFT
            next_position[count] = <uint16_t>position
            store(bytes_of(words) + count * sizeof(uint64_t), word)
            count += 1
            latest = max(latest, stamp)
            if (
                <uint32_t>head == MARKED_MAGIC
                or head >> GENERATION_SHIFT
                or stamp <= void_stamp
                or 0 < expires_at <= now_ms
            ):
                doubtful.append(word)
    from kvstore.format.extent_records import FoundBlocks  # by recovery only

    return FoundBlocks(
        array("H", positions[: count * <Py_ssize_t>sizeof(uint16_t)]),
        array("Q", words[: count * <Py_ssize_t>sizeof(uint64_t)]),
        array("Q", doubtful),
        latest,
    )


def link_free_blocks(positions, uint64_t block_size):
    cdef View view = View(positions)
    cdef Py_ssize_t last = view.count(sizeof(uint16_t)) - 1
    cdef uint64_t block, first_free = NO_BLOCK
    cdef list links = []
    if last < 0 or not block_size:
        raise ValueError("no live block, or no size of one")
    block = load_short(view.start + 2 * last) // block_size
    while True:
        if last >= 0 and load_short(view.start + 2 * last) == block * block_size:
            last -= 1
        else:
            links.append((block * block_size, FREE_MAGIC | first_free << FREE_NEXT_SHIFT))
            first_free = block
        if not block:
            return first_free, links
        block -= 1


# --- found records as words: `format.found_words` ------------------------------------------------


def sort_words(list found not None):
    words = array("Q")
    while found:
        words.extend(found.pop())
    cdef View view = View(words)
    sort_by(56, <uint64_t *>view.start, view.count(sizeof(uint64_t)))
    return words


cdef void sort_by(int shift, uint64_t *words, Py_ssize_t count) noexcept:
    """Sort words that are equal above the byte at `shift`, in place and in any case fast.

    Part them by that byte, then sort each part by the next one; a few are inserted one by one.
    """
    cdef Py_ssize_t ends[256]
    cdef Py_ssize_t places[256]
    cdef Py_ssize_t index, place, start = 0
    cdef uint64_t word, byte
    if count <= 24:
        for index in range(1, count):
            word, place = words[index], index
            while place and words[place - 1] > word:
                words[place] = words[place - 1]
                place -= 1
            words[place] = word
        return
    memset(ends, 0, sizeof(ends))
    for index in range(count):
        ends[words[index] >> shift & 0xFF] += 1
    for byte in range(256):
        places[byte] = start
        start += ends[byte]
        ends[byte] = start
    for byte in range(256):
        while places[byte] < ends[byte]:
            word = words[places[byte]]
            # Put it where it goes, and go on with the one that was there, until one goes here.
            while word >> shift & 0xFF != byte:
                place = places[word >> shift & 0xFF]
                places[word >> shift & 0xFF] += 1
                words[place], word = word, words[place]
            words[places[byte]] = word
            places[byte] += 1
    if shift:
        start = 0
        for byte in range(256):
            sort_by(shift - 8, words + start, ends[byte] - start)
            start = ends[byte]


def has_equal_hashes(found):
    cdef View view = View(found)
    cdef const uint64_t *words = <uint64_t *>view.start
    cdef Py_ssize_t count = view.count(sizeof(uint64_t)), index, earlier
    for index in range(1, count):
        earlier = index - 1
        while earlier >= 0 and words[earlier] >> FOUND_UPPER_SHIFT == words[index] >> FOUND_UPPER_SHIFT:
            if not (words[earlier] ^ words[index]) & FOUND_HASH_MASK:
                return True
            earlier -= 1
    return False


def judge_words(mapped, uint64_t file_size, found, uint64_t now_ms, uint64_t void_stamp):
    cdef View file = View(mapped), view = View(found)
    cdef const uint64_t *words = <uint64_t *>view.start
    cdef Py_ssize_t count = view.count(sizeof(uint64_t))
    cdef Py_ssize_t index, earlier
    cdef bytes scratch = PyBytes_FromStringAndSize(NULL, count)
    cdef uint8_t *is_loser = bytes_of(scratch)
    cdef uint64_t offset, head
    cdef const uint8_t *record
    cdef const uint8_t *other
    cdef list live = [], retired = [], losers = [], gone = []
    file_size = min(file_size, <uint64_t>file.buffer.len)
    for index in range(count):
        offset = words[index] >> FOUND_OFFSET_SHIFT & FOUND_OFFSET_MASK
        if offset + RECORD_HEADER_SIZE > file_size or (
            offset + RECORD_HEADER_SIZE + file.start[offset + RECORD_KEY_SIZE_OFFSET] > file_size
        ):
            raise ValueError(f"a found word leads to byte {offset:,} of a file of {file_size:,}")
        record = file.start + offset
        is_loser[index] = load(record + RECORD_STAMP_OFFSET) <= void_stamp
        if is_loser[index]:
            continue
        # Of the earlier ones of its key, all but one at the most have lost by now.
        earlier = index - 1
        while earlier >= 0 and words[earlier] >> FOUND_UPPER_SHIFT == words[index] >> FOUND_UPPER_SHIFT:
            if not is_loser[earlier] and not (words[earlier] ^ words[index]) & FOUND_HASH_MASK:
                other = file.start + (words[earlier] >> FOUND_OFFSET_SHIFT & FOUND_OFFSET_MASK)
                if is_of_same_key(record, other):
                    is_loser[earlier if outranks(record, other) else index] = True
                    break
            earlier -= 1
    for index in range(count):
        if is_loser[index]:
            losers.append(words[index])
            continue
        record = file.start + (words[index] >> FOUND_OFFSET_SHIFT & FOUND_OFFSET_MASK)
        head = load(record)
        if <uint32_t>head == MARKED_MAGIC or 0 < load(record + RECORD_EXPIRES_OFFSET) <= now_ms:
            gone.append(words[index])
            continue
        live.append(words[index])
        if head >> GENERATION_SHIFT:
            retired.append(words[index])
    return array("Q", live), array("Q", retired), array("Q", losers), array("Q", gone)


cdef inline bint is_of_same_key(const uint8_t *record, const uint8_t *other) noexcept:
    cdef uint64_t size = record[RECORD_KEY_SIZE_OFFSET]
    return size == other[RECORD_KEY_SIZE_OFFSET] and not memcmp(
        record + RECORD_HEADER_SIZE, other + RECORD_HEADER_SIZE, size
    )


cdef inline bint outranks(const uint8_t *record, const uint8_t *other) noexcept:
    cdef uint64_t stamp = load(record + RECORD_STAMP_OFFSET)
    cdef uint64_t stamp_of_other = load(other + RECORD_STAMP_OFFSET)
    if stamp != stamp_of_other:
        return stamp > stamp_of_other
    return <uint32_t>load(record) == MARKED_MAGIC and <uint32_t>load(other) != MARKED_MAGIC


def members_of_words(mapped, uint64_t file_size, found):
    cdef View file = View(mapped), view = View(found)
    cdef const uint64_t *words = <uint64_t *>view.start
    cdef Py_ssize_t count = view.count(sizeof(uint64_t)), index
    cdef bytes members = PyBytes_FromStringAndSize(NULL, count * sizeof(Member))
    cdef Member *member = <Member *>bytes_of(members)
    cdef const uint8_t *record
    cdef uint64_t offset, head
    file_size = min(file_size, <uint64_t>file.buffer.len)
    for index in range(count):
        offset = words[index] >> FOUND_OFFSET_SHIFT & FOUND_OFFSET_MASK
        if offset + RECORD_HEADER_SIZE + SLOT_KEY_SIZE > file_size:
            raise ValueError(f"a found word leads to byte {offset:,} of a file of {file_size:,}")
        record = file.start + offset
        head = load(record)
        memset(member, 0, sizeof(Member))
        store(member.word, words[index])
        memcpy(
            member.slot,
            record + RECORD_HEADER_SIZE,
            min(head >> SLOT_KEY_SIZE_SHIFT & 0xFF, SLOT_KEY_SIZE),
        )
        store(member.slot + SLOT_EXPIRES_OFFSET, load(record + RECORD_EXPIRES_OFFSET))
        store(member.slot + SLOT_RECORD_OFFSET, head - RECORD_MAGIC + offset)
        member += 1
    return members


# --- segments: `format.members`, `format.segment` ------------------------------------------------


def count_members(bytes members not None):
    return len(members) // <Py_ssize_t>sizeof(Member)


def partition_slots(
    mapped,
    uint64_t file_size,
    uint64_t extent,
    uint64_t depth,
    uint64_t prefix,
    uint64_t now_ms,
    uint64_t hash_seed,
):
    cdef View file = View(mapped)
    file_size = min(file_size, <uint64_t>file.buffer.len)
    if extent >= file_size >> EXTENT_SHIFT or not MIN_DEPTH <= depth <= MAX_DEPTH:
        raise IndexError(f"extent {extent} of {file_size:,} bytes is no segment of depth {depth}")
    cdef const uint8_t *memory = file.start
    cdef const uint8_t *bucket = memory + (extent << EXTENT_SHIFT)
    cdef const uint8_t *slot
    # What of a hash tells the segment, and which half of it.
    cdef uint64_t own = prefix << DIRECTORY_SHIFT
    cdef uint64_t of_segment = ~<uint64_t>0 << 64 - depth
    cdef uint64_t of_half = <uint64_t>1 << 63 - depth
    cdef uint64_t number, index, key_hash, lost = 0
    cdef bytes lower = PyBytes_FromStringAndSize(NULL, SEGMENT_SLOTS * sizeof(Member))
    cdef bytes upper = PyBytes_FromStringAndSize(NULL, SEGMENT_SLOTS * sizeof(Member))
    cdef Member *halves[2]
    cdef Py_ssize_t counts[2]
    cdef Member *member
    cdef list expired = []
    cdef uint64_t earliest = NO_EXPIRY
    halves[0], halves[1] = <Member *>bytes_of(lower), <Member *>bytes_of(upper)
    counts[0] = counts[1] = 0
    for number in range(BUCKET_COUNT):
        earliest = min(earliest, load(bucket + number * BUCKET_SIZE + EARLIEST_OFFSET))
    for number in range(BUCKET_COUNT):
        for index in range(SLOT_COUNT):
            if bucket[CONTROL_OFFSET + index] <= CONTROL_TOMBSTONE:
                continue
            slot = bucket + BUCKET_HEADER_SIZE + index * SLOT_SIZE
            if earliest <= now_ms and is_expired(memory, file_size, slot, now_ms):
                expired.append(PyBytes_FromStringAndSize(<const char *>slot, SLOT_SIZE))
                continue
            key_hash = hash_of_slot(memory, file_size, slot, hash_seed)
            if key_hash & of_segment != own or not (
                bucket[CONTROL_OFFSET + index]
                == FINGERPRINT_CODES[key_hash >> FINGERPRINT_SHIFT & 0xFF]
                or has_its_key(memory, file_size, slot)
            ):
                lost += 1
                continue
            member = halves[key_hash & of_half != 0] + counts[key_hash & of_half != 0]
            counts[key_hash & of_half != 0] += 1
            store(member.word, key_hash)
            memcpy(member.slot, slot, SLOT_SIZE)
        bucket += BUCKET_SIZE
    return (
        lower[: counts[0] * <Py_ssize_t>sizeof(Member)],
        upper[: counts[1] * <Py_ssize_t>sizeof(Member)],
        expired,
        lost,
    )


cdef inline bint has_its_key(
    const uint8_t *memory, uint64_t file_size, const uint8_t *slot
) noexcept:
    """As `segment._has_its_key`."""
    cdef uint64_t size = min(<uint64_t>slot[SLOT_KEY_SIZE_OFFSET], <uint64_t>SLOT_KEY_SIZE)
    cdef uint64_t start = load(slot + SLOT_RECORD_OFFSET) & SLOT_RECORD_MASK
    start += RECORD_HEADER_SIZE
    return start + size <= file_size and memcmp(memory + start, slot, size) == 0


cdef inline bint is_expired(
    const uint8_t *memory, uint64_t file_size, const uint8_t *slot, uint64_t now_ms
) noexcept:
    """As `_record_expiry` is asked of a slot that is past its expiry."""
    cdef uint64_t expires_at = load(slot + SLOT_EXPIRES_OFFSET)
    cdef uint64_t offset = load(slot + SLOT_RECORD_OFFSET) & SLOT_RECORD_MASK
    return (
        0 < expires_at <= now_ms
        and offset + RECORD_HEADER_SIZE <= file_size
        and load(memory + (offset + RECORD_EXPIRES_OFFSET & ~<uint64_t>7)) == expires_at
    )


def build_segment(uint64_t extent, uint64_t shape, bytes members not None):
    cdef uint64_t count = len(members) // sizeof(Member)
    if len(members) % sizeof(Member) or count > SEGMENT_SLOTS:
        raise ValueError(
            f"{len(members):,} bytes of members, a segment has {SEGMENT_SLOTS:,} slots of "
            f"{sizeof(Member)}"
        )
    cdef bytes scratch = PyBytes_FromStringAndSize(NULL, MOST_NUMBERS * sizeof(uint16_t))
    cdef bytes image = PyBytes_FromStringAndSize(NULL, EXTENT_SIZE)
    cdef uint64_t earliest = fill_segment(
        bytes_of(image),
        extent,
        shape,
        <const Member *>bytes_of(members),
        count,
        <uint16_t *>bytes_of(scratch),
    )
    return image, earliest


# --- all extents: `format.extent_map` ------------------------------------------------------------

cdef uint64_t CLASS_COUNT = sizeof(BLOCK_SIZES) // sizeof(BLOCK_SIZES[0])


cdef struct Entry:  # of the extent map
    uint64_t kind, size_class, live, second


cdef inline Entry load_entry(const uint8_t *place) noexcept:
    cdef uint64_t first = load(place)
    return Entry(
        first & ENTRY_KIND_MASK,
        first >> ENTRY_CLASS_SHIFT & 0xFF,
        first >> ENTRY_LIVE_SHIFT & 0xFFFF,
        load(place + sizeof(first)),
    )


cdef inline uint64_t current_blocks(Entry entry) noexcept:
    """Live blocks of a slab extent that are not retired."""
    cdef uint64_t retired = entry.second >> 8 * (SLAB_RETIRED_OFFSET - 8) & 0xFFFF
    return entry.live - retired if entry.live > retired else 0


def count_in_use(bytes entries not None):
    cdef const uint8_t *place = bytes_of(entries)
    cdef const uint8_t *end = place + len(entries)
    cdef uint64_t blocks = 0, slots = 0, segments = 0, earliest = ~<uint64_t>0
    cdef Entry entry
    while place < end:
        entry = load_entry(place)
        if entry.kind == KIND_SLAB:
            if entry.size_class < CLASS_COUNT:
                blocks += current_blocks(entry) * BLOCK_SIZES[entry.size_class]
        elif entry.kind == KIND_SEGMENT:
            slots += entry.live
            segments += 1
            earliest = min(earliest, entry.second)
        place += 1 << MAP_ENTRY_SHIFT
    return blocks, slots, segments, earliest


def find_partly_used(bytes entries not None):
    cdef const uint8_t *start = bytes_of(entries)
    cdef uint64_t extent, word
    cdef Entry entry
    cdef list found = []
    for extent in range(<uint64_t>len(entries) >> MAP_ENTRY_SHIFT):
        entry = load_entry(start + (extent << MAP_ENTRY_SHIFT))
        if (
            entry.kind == KIND_SLAB
            and entry.size_class < CLASS_COUNT
            and 0 < entry.live < <uint64_t>BLOCKS_PER_EXTENT[entry.size_class]
        ):
            word = entry.size_class << 48 | current_blocks(entry) << 32 | entry.live << 16 | extent
            found.append(word)
    return found
