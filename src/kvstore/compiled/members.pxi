# Live slots on their way from one segment to another: bytes, one member after the other.

cdef enum:
    MOST_NUMBERS = 16 * 1280  # each of a segment's buckets may be the home of all its members

cdef struct Member:
    uint8_t word[8]  # the hash of its key, or what a `found_words` word has of that
    uint8_t slot[SLOT_SIZE]


cdef inline uint64_t hash_of_slot(
    const uint8_t *memory, uint64_t file_size, const uint8_t *slot, uint64_t hash_seed
) except? 0:
    cdef uint64_t size = slot[SLOT_KEY_SIZE_OFFSET]
    cdef uint64_t start
    if size <= SLOT_KEY_SIZE:
        return digest(slot, size, hash_seed)
    start = (load(slot + SLOT_RECORD_OFFSET) & SLOT_RECORD_MASK) + RECORD_HEADER_SIZE
    if start + size > file_size:
        return digest(slot, 0, hash_seed)
    return digest(memory + start, size, hash_seed)


cdef uint64_t fill_segment(
    uint8_t *page,
    uint64_t extent,
    uint64_t shape,
    const Member *member,
    uint64_t count,
    uint16_t *numbers,
) noexcept nogil:
    """Write the bytes that `segment.build_segment` returns from `page` on; return the expiry.

    `numbers` has room for `MOST_NUMBERS`.
    """
    # Which members a bucket gets, in their order.
    cdef uint64_t counts[BUCKET_COUNT]
    cdef uint64_t bucket, number, index, expires_at, earliest, earliest_of_all = NO_EXPIRY
    for bucket in range(BUCKET_COUNT):
        counts[bucket] = 0
    for number in range(count):
        bucket = load(member[number].word) & BUCKET_COUNT - 1
        numbers[bucket * SEGMENT_SLOTS + counts[bucket]] = <uint16_t>number
        counts[bucket] += 1
    spill(numbers, counts)
    memset(page, 0, EXTENT_SIZE)
    for bucket in range(BUCKET_COUNT):
        earliest = NO_EXPIRY
        for index in range(counts[bucket]):
            number = numbers[bucket * SEGMENT_SLOTS + index]
            page[CONTROL_OFFSET + index] = FINGERPRINT_CODES[
                load(member[number].word) >> FINGERPRINT_SHIFT & 0xFF
            ]
            memcpy(page + BUCKET_HEADER_SIZE + index * SLOT_SIZE, member[number].slot, SLOT_SIZE)
            expires_at = load(member[number].slot + SLOT_EXPIRES_OFFSET)
            if expires_at and expires_at < earliest:
                earliest = expires_at
        store(page, BUCKET_MARKER | (extent << EXTENT_SHIFT >> BUCKET_SHIFT) + bucket)
        store(page + EARLIEST_OFFSET, earliest)
        store(page + SHAPE_OFFSET, shape)
        earliest_of_all = min(earliest_of_all, earliest)
        page += BUCKET_SIZE
    return earliest_of_all


cdef void spill(uint16_t *numbers, uint64_t *counts) noexcept nogil:
    cdef uint64_t start, bucket, following, excess
    for start in range(BUCKET_COUNT):
        bucket = start
        while counts[bucket] > SLOT_COUNT:
            following = (bucket + 1) % BUCKET_COUNT
            excess = counts[bucket] - SLOT_COUNT
            memcpy(
                numbers + following * SEGMENT_SLOTS + counts[following],
                numbers + bucket * SEGMENT_SLOTS + SLOT_COUNT,
                excess * sizeof(uint16_t),
            )
            counts[following] += excess
            counts[bucket] = SLOT_COUNT
            bucket = following
