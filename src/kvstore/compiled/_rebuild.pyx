# cython: boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The compiled twin of what recovery does for each record: see `implementation`.

Each function does the work of the plain one that it names, with the same results, byte for byte,
and the same calls of the door in the same order. What is rare, two records of one key or more of
them than a segment has slots, is left to the plain code.

Whatever is read from the file is bounded before it is followed. Words are read and written by
`memcpy`, which asks for no alignment. Nothing here is shared: recovery runs before a store is
anyone's. A number of more than 31 bits is never written out but as a name or with a type: Cython
would go through objects.
"""

from array import array

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from xxhash import xxh3_64_intdigest

include "layout_constants.pxi"

cdef enum:
    # As in `notes`: what a word notes of a record.
    UPPER_SHIFT = 37
    OFFSET_SHIFT = 7
    OFFSET_MASK = 0x3FFFFFE0
    MOST_BLOCKS = 2048  # of an extent

cdef uint64_t HASH_MASK = ~(<uint64_t>OFFSET_MASK << OFFSET_SHIFT)


cdef inline uint64_t load(const uint8_t *place) noexcept:
    cdef uint64_t word
    memcpy(&word, place, sizeof(word))
    return word


cdef inline void store(uint8_t *place, uint64_t word) noexcept:
    memcpy(place, &word, sizeof(word))


# --- records, extent by extent -------------------------------------------------------------------


def find_magics(bytes contents not None):
    """`CompiledFoundRecords.find_magics`: those that are not aligned as a block is do not count."""
    cdef const uint8_t *start = <const uint8_t *>PyBytes_AS_STRING(contents)
    cdef uint64_t index, count = 0, first = 0
    for index in range(<uint64_t>len(contents) // BLOCK_ALIGNMENT):
        if <uint32_t>load(start + index * BLOCK_ALIGNMENT) == RECORD_MAGIC:
            if not count:
                first = index * BLOCK_ALIGNMENT
            count += 1
    return count, first


def count_magics(bytes contents not None):
    """`FoundRecords.count_magics`."""
    cdef const uint8_t *start = <const uint8_t *>PyBytes_AS_STRING(contents)
    cdef const uint8_t *place = start
    cdef uint64_t count = 0, aligned = 0, left = len(contents)
    cdef uint32_t magic
    while left >= sizeof(magic):
        place = <const uint8_t *>memchr(place, <uint8_t>RECORD_MAGIC, left)
        if place is NULL:
            break
        left = len(contents) - <uint64_t>(place - start)
        if left < sizeof(magic):
            break
        memcpy(&magic, place, sizeof(magic))
        if magic == RECORD_MAGIC:
            count += 1
            aligned += <uint64_t>(place - start) % BLOCK_ALIGNMENT == 0
        place += 1
        left -= 1
    return count, aligned


def scan_blocks(
    bytes contents not None, uint64_t base, uint64_t block_size, uint64_t least,
    seed, uint64_t now_ms, words not None,
):
    """`FoundRecords.scan_blocks`, in blocks of this size; a record of the class takes more than `least`.

    What is noted is added to the array `words`.
    """
    if len(contents) != EXTENT_SIZE or not block_size or EXTENT_SIZE // block_size > MOST_BLOCKS:
        raise ValueError("not the contents of an extent, or not the size of a block")
    digest = xxh3_64_intdigest
    cdef const uint8_t *record
    cdef const uint8_t *key
    cdef uint64_t index, position, head, key_size, value_size
    cdef uint64_t key_hash, expires_at, checksum_seed, checksum
    cdef uint16_t positions[MOST_BLOCKS]
    cdef uint64_t noted[MOST_BLOCKS]
    cdef Py_ssize_t count = 0
    for index in range(EXTENT_SIZE // block_size):
        position = index * block_size
        record = <const uint8_t *>PyBytes_AS_STRING(contents) + position
        head = load(record)
        key_size = head >> SLOT_KEY_SIZE_SHIFT
        value_size = head >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF
        if not has_shape(head, key_size, value_size, least, block_size):
            continue
        key = record + RECORD_HEADER_SIZE
        key_hash = digest(PyBytes_FromStringAndSize(<const char *>key, key_size), seed)
        checksum_seed = key_hash ^ load(record + RECORD_CREATED_OFFSET) ^ base + position
        expires_at = load(record + RECORD_EXPIRES_OFFSET)
        if expires_at:
            if not now_ms < expires_at < TIME_LIMIT:
                continue
            checksum_seed ^= expires_at << 16
        checksum = digest(
            PyBytes_FromStringAndSize(<const char *>key + key_size, value_size), checksum_seed
        )
        if checksum == load(record + RECORD_CHECKSUM_OFFSET):
            positions[count] = <uint16_t>position
            noted[count] = key_hash & HASH_MASK | base + position << OFFSET_SHIFT
            count += 1
    words.frombytes(PyBytes_FromStringAndSize(<const char *>noted, count * sizeof(uint64_t)))
    return array("H", PyBytes_FromStringAndSize(<const char *>positions, count * sizeof(uint16_t)))


cdef inline bint has_shape(
    uint64_t head, uint64_t key_size, uint64_t value_size, uint64_t least, uint64_t most
) noexcept:
    """`notes._shape`: whether a record of a class, in a block of `most` bytes, can begin so."""
    return (
        <uint32_t>head == RECORD_MAGIC
        and 0 < key_size <= MAX_KEY_SIZE
        and MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE
        and least < RECORD_HEADER_SIZE + key_size + value_size <= most
    )


def link_free_blocks(
    write, uint64_t base, uint64_t block_size, const uint16_t[::1] positions not None
):
    """`_Rebuild._link_free_blocks`, through the door `write`."""
    cdef Py_ssize_t last = len(positions) - 1
    cdef uint64_t block, link, first_free = NO_BLOCK
    if last < 0 or not block_size:
        raise ValueError("no blocks to go by")
    block = positions[last] // block_size
    while True:
        if last >= 0 and positions[last] == block * block_size:
            last -= 1
        else:
            link = FREE_MAGIC | first_free << FREE_NEXT_SHIFT
            write(
                base + block * block_size,
                PyBytes_FromStringAndSize(<const char *>&link, sizeof(link)),
            )
            first_free = block
        if not block:
            return first_free
        block -= 1


# --- the table, segment by segment ---------------------------------------------------------------


def sort_words(uint64_t[::1] words not None):
    """`FoundRecords.sort`, of one part."""
    if len(words):
        sort_by(56, &words[0], len(words))


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


def build_segment(
    const uint8_t[::1] mapped not None, uint64_t file_size, list slices not None,
    uint64_t extent, uint64_t shape,
):
    """`_Rebuild._build_segment` of the records noted in these slices; None: leave it to that.

    Its members are put together in their buckets as by `segment.build`.
    """
    cdef uint64_t words[SEGMENT_SLOTS]
    cdef uint64_t expiries[SEGMENT_SLOTS]
    cdef uint16_t members[BUCKET_COUNT][SEGMENT_SLOTS]  # of each bucket
    cdef uint64_t counts[BUCKET_COUNT]
    cdef uint64_t earliest[BUCKET_COUNT]
    cdef uint64_t bucket, offset, first = NO_EXPIRY
    cdef Py_ssize_t index, count = collect(slices, words)
    if count < 0:
        return None
    for bucket in range(BUCKET_COUNT):
        counts[bucket], earliest[bucket] = 0, NO_EXPIRY
    for index in range(count):
        offset = words[index] >> OFFSET_SHIFT & OFFSET_MASK
        if offset + RECORD_HEADER_SIZE + SLOT_KEY_SIZE > min(file_size, <uint64_t>len(mapped)):
            raise ValueError("a note of what is no record")
        bucket = words[index] & BUCKET_COUNT - 1
        members[bucket][counts[bucket]] = <uint16_t>index
        counts[bucket] += 1
        expiries[index] = load(&mapped[offset] + RECORD_EXPIRES_OFFSET)
        if expiries[index] and expiries[index] < earliest[bucket]:
            earliest[bucket] = expiries[index]
    spill(members, counts, earliest)
    image = PyBytes_FromStringAndSize(NULL, EXTENT_SIZE)
    cdef uint8_t *page = <uint8_t *>PyBytes_AS_STRING(image)
    memset(page, 0, EXTENT_SIZE)
    for bucket in range(BUCKET_COUNT):
        store(page, BUCKET_MARKER | (extent << EXTENT_SHIFT) + bucket * BUCKET_SIZE >> BUCKET_SHIFT)
        store(page + EARLIEST_OFFSET, earliest[bucket])
        store(page + SHAPE_OFFSET, shape)
        first = min(first, earliest[bucket])
        for index in range(<Py_ssize_t>counts[bucket]):
            put_slot(
                page, index, words[members[bucket][index]], expiries[members[bucket][index]],
                &mapped[0],
            )
        page += BUCKET_SIZE
    return image, first, count


cdef Py_ssize_t collect(list slices, uint64_t *words) except -2:
    """Copy the words in these slices of parts; -1: too many, or two of one hash, as it seems."""
    cdef const uint64_t[::1] part
    cdef Py_ssize_t start, end, index, earlier, count = 0
    for part, start, end in slices:
        if not 0 <= start <= end <= len(part):
            raise ValueError("no slice of a part")
        if count + end - start > <Py_ssize_t>SEGMENT_SLOTS:
            return -1
        for index in range(start, end):
            words[count] = part[index]
            earlier = count - 1
            while earlier >= 0 and words[earlier] >> UPPER_SHIFT == words[count] >> UPPER_SHIFT:
                if not (words[earlier] ^ words[count]) & HASH_MASK:
                    return -1
                earlier -= 1
            count += 1
    return count


cdef void spill(
    uint16_t (*members)[SEGMENT_SLOTS], uint64_t *counts, uint64_t *earliest
) noexcept:
    """`segment._spill`."""
    cdef uint64_t start, bucket, following, excess
    for start in range(BUCKET_COUNT):
        bucket = start
        while counts[bucket] > SLOT_COUNT:
            following = (bucket + 1) % BUCKET_COUNT
            excess = counts[bucket] - SLOT_COUNT
            memcpy(
                &members[following][counts[following]],
                &members[bucket][SLOT_COUNT],
                excess * sizeof(uint16_t),
            )
            counts[following] += excess
            counts[bucket] = SLOT_COUNT
            earliest[following] = min(earliest[following], earliest[bucket])
            bucket = following


cdef inline void put_slot(
    uint8_t *page, uint64_t index, uint64_t word, uint64_t expires_at, const uint8_t *mapped
) noexcept:
    """Put the slot of the record that `word` notes, as in `_Rebuild._members`, and its control."""
    cdef uint64_t offset = word >> OFFSET_SHIFT & OFFSET_MASK
    cdef uint64_t head = load(mapped + offset)
    cdef uint64_t fingerprint = word >> FINGERPRINT_SHIFT & 0xFF
    cdef uint8_t *slot = page + BUCKET_HEADER_SIZE + index * SLOT_SIZE
    page[CONTROL_OFFSET + index] = <uint8_t>(fingerprint if fingerprint > 1 else fingerprint + 2)
    memcpy(
        slot, mapped + offset + RECORD_HEADER_SIZE, min(head >> SLOT_KEY_SIZE_SHIFT, SLOT_KEY_SIZE)
    )
    store(slot + SLOT_EXPIRES_OFFSET, expires_at)
    # The sizes are in the same place in both: change the magic for the offset.
    store(slot + SLOT_RECORD_OFFSET, head - RECORD_MAGIC + offset)
