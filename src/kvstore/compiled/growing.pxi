# Part of `_fast_path`: a store takes more of its file, and no operation waits long for that.

from cpython.mem cimport PyMem_Free, PyMem_Malloc

include "systems.pxi"

cdef enum:
    LEAST_LARGE = 8192  # bytes of a record whose block is to be in large pages
    LARGE_PAGE_SIZE = 16_384
    PREPARED = 2 * 65_536  # bytes: while an extent is brought in, the one before it may be wanted
    PREPARED_AT_ONCE = 16_384


@cython.no_gc
cdef class Growing(Blocks):
    """Opens extents, splits segments, and brings in their pages ahead: a part of `FastPath`."""

    cdef int fd
    cdef uint64_t device, number  # of the file
    cdef uint64_t zeros_from  # from here on, what was never used holds zeros
    cdef uint64_t first_fresh  # where those extents began, at opening, that nobody had taken
    cdef uint64_t prepared  # up to here, they are in memory
    cdef Member *members  # room for a split, of two segments' slots and of what numbers these
    cdef uint16_t *numbers
    cdef uint64_t splits  # how many there were: each has moved slots

    def __dealloc__(self):
        PyMem_Free(self.members)
        PyMem_Free(self.numbers)

    # --- pages -----------------------------------------------------------------------------------

    @cython.final
    cdef inline void prepare(self) noexcept:
        """Bring in some pages of the next fresh extents, unless all of these are in memory.

        Each page that is not there costs a fault as it is first stored to, which takes longer than
        that of a small record. The sixteen of an extent at once, as a segment wants them, would be
        a pause; one at a time, they would cost a third more. They are small ones, for a flush
        writes each of them whole. Where no extent was taken so far, none may be for long.
        """
        cdef uint64_t first = load_short(self.base + FRESH_EXTENT_OFFSET) << EXTENT_SHIFT
        cdef uint64_t end = min(first + PREPARED, self.live[0])
        if first == self.first_fresh:
            return
        if not first <= self.prepared <= end:
            self.prepared = first
        if self.prepared < end:
            bring_in(self.base + self.prepared, PREPARED_AT_ONCE)
            self.prepared += PREPARED_AT_ONCE

    @cython.final
    cdef void start_growing(self, int fd) noexcept:
        """Remember how long the file is so far, and which of its extents were taken."""
        self.fd = fd if identify(fd, &self.device, &self.number) else -1
        self.zeros_from = self.live[0]
        self.first_fresh = load_short(self.base + FRESH_EXTENT_OFFSET) << EXTENT_SHIFT

    @cython.final
    cdef void bring_in_block(self, uint64_t block, uint64_t size) noexcept:
        """Bring in a large block that was never used, in pages of up to 16 KiB.

        What one call writes the system keeps as one page, where it can: that takes one fault, and a
        third of the time. A flush writes it whole, so it is never larger than the block. Zeros are
        written over zeros, and pages that this fails to bring in, faults do.

        Whether `fd` is still the file is asked each time: a program may have closed it, as daemons
        do with all that they find open, and have another one by that number.
        """
        cdef uint64_t device = 0, number = 0
        cdef uint64_t step = LARGE_PAGE_SIZE if size >= LARGE_PAGE_SIZE else LARGE_PAGE_SIZE // 2
        # What of the block is before that came in with the one before it.
        cdef uint64_t page = (block + step - 1) & ~(step - 1)
        if (
            page < self.zeros_from
            or page < self.prepared
            or not identify(self.fd, &device, &number)
            or device != self.device
            or number != self.number
        ):
            return
        while page < block + size:
            write_zeros(self.fd, page, step)
            page += step

    # --- extents ---------------------------------------------------------------------------------

    @cython.final
    cdef inline uint64_t next_extent(self) noexcept:
        """Return the fresh extent that `Extents.allocate` would give; 0 for RARE."""
        cdef uint64_t extent = load_short(self.base + FRESH_EXTENT_OFFSET)
        if load_short(self.base + FREE_EXTENTS_OFFSET) != NO_EXTENT or not self.is_extent(extent):
            return 0
        return extent

    @cython.final
    cdef inline void take_extent(self, uint64_t extent, uint64_t entry, uint64_t rest) noexcept:
        """Take what `next_extent` gave, with these words for its entry in the extent map."""
        store_short(self.base + FRESH_EXTENT_OFFSET, extent + 1)
        keep_order()
        self.store_entry(extent, entry, rest)

    @cython.final
    cdef inline void store_entry(self, uint64_t extent, uint64_t entry, uint64_t rest) noexcept:
        store(self.base + map_entry_of(extent), entry)
        store(self.base + map_entry_of(extent) + sizeof(entry), rest)
        keep_order()

    @cython.final
    cdef bint open_extent(self, uint64_t size_class) noexcept:
        """As `Slab._open_extent`, for a class that has none with room; False for RARE."""
        cdef uint64_t extent = self.next_extent()
        if (
            self.plan is not None
            or not extent
            or not self.looked_at[extent]
            or load_short(self.base + CLASS_HEADS_OFFSET + 2 * size_class) != NO_EXTENT
            or self.has_empty_spare()
            or self.versions[RETIRED_SIZE_WORD] > LEAST_RECLAIMED
        ):
            return False
        self.take_extent(
            extent,
            KIND_SLAB | size_class << ENTRY_CLASS_SHIFT | NO_BLOCK << ENTRY_FIRST_FREE_SHIFT,
            0,
        )
        store_short(self.base + CLASS_HEADS_OFFSET + 2 * size_class, extent)
        keep_order()
        self.spare[0] = extent
        return True

    # --- segments --------------------------------------------------------------------------------

    @cython.final
    cdef bint split(
        self, uint64_t key_hash, uint64_t now_ms, uint64_t seed, uint64_t index_shape
    ) noexcept:
        """As `Segments.split_or_compact`, where it splits; False for RARE.

        That is where a slot has expired or is damaged, too, or no fresh extent is there for it.
        """
        cdef uint64_t position = key_hash >> DIRECTORY_SHIFT
        cdef uint64_t lower = load_short(self.base + DIRECTORY_OFFSET + 2 * position)
        cdef uint64_t upper = self.next_extent()
        cdef uint64_t shape, depth, prefix, half, index
        cdef uint64_t counts[2]
        if self.plan is not None or not upper or not self.is_extent(lower):
            return False
        shape = load(self.base + (lower << EXTENT_SHIFT) + SHAPE_OFFSET)
        depth, prefix = shape & SHAPE_DEPTH_MASK, shape >> SHAPE_PREFIX_SHIFT & 0xFFFF
        if (
            not self.is_segment(lower, position, shape, index_shape)
            or depth == MAX_DEPTH
            or not self.make_room()
            or not self.partition(lower, depth, prefix, now_ms, seed, counts)
            or counts[0] + counts[1] <= SEGMENT_SLOTS // 2
        ):
            return False
        # Nothing was stored so far, and from here on all is.
        self.splits += 1
        shape &= (<uint64_t>1 << SHAPE_REWRITES_SHIFT) - 1 ^ SHAPE_DEPTH_MASK
        shape |= depth + 1
        shape |= (
            load(self.base + (lower << EXTENT_SHIFT) + SHAPE_OFFSET) >> SHAPE_REWRITES_SHIFT
        ) + 1 + self.versions[UNDONE_WORD] << SHAPE_REWRITES_SHIFT
        half = <uint64_t>1 << DIRECTORY_BITS - depth - 1
        self.take_extent(upper, KIND_SEGMENT, NO_EXPIRY)
        self.write_segment(
            upper, shape | half << SHAPE_PREFIX_SHIFT, self.members + SEGMENT_SLOTS, counts[1]
        )
        for index in range(prefix + half, prefix + 2 * half):
            store_short(self.base + DIRECTORY_OFFSET + 2 * index, upper)
        keep_order()
        self.write_segment(lower, shape, self.members, counts[0])
        return True

    @cython.final
    cdef bint is_segment(
        self, uint64_t extent, uint64_t position, uint64_t shape, uint64_t index_shape
    ) noexcept:
        """Return whether `buckets.depth_and_prefix` and `check_buckets` would let it pass."""
        cdef const uint8_t *directory = self.base + DIRECTORY_OFFSET
        cdef uint64_t depth = shape & SHAPE_DEPTH_MASK
        cdef uint64_t start = shape >> SHAPE_PREFIX_SHIFT & 0xFFFF, end, bucket
        if not MIN_DEPTH <= depth <= MAX_DEPTH:
            return False
        end = start + (<uint64_t>1 << DIRECTORY_BITS - depth)
        if (
            start != (position & ~((<uint64_t>1 << DIRECTORY_BITS - depth) - 1))
            or (shape ^ index_shape) >> SHAPE_REBUILDS_SHIFT & 0xFFFF
            or load_short(directory + 2 * (end - 1)) != extent
            or (end < DIRECTORY_ENTRIES and load_short(directory + 2 * end) == extent)
            or (start and load_short(directory + 2 * (start - 1)) == extent)
        ):
            return False
        for bucket in range(extent << EXTENT_SHIFT, extent + 1 << EXTENT_SHIFT, BUCKET_SIZE):
            if (
                load(self.base + bucket) != (BUCKET_MARKER | bucket >> BUCKET_SHIFT)
                or load(self.base + bucket + SHAPE_OFFSET) != shape
            ):
                return False
        return True

    @cython.final
    cdef bint make_room(self) noexcept:
        """Have room for the members of two segments, which stays for the next split."""
        if self.members is NULL:
            self.members = <Member *>PyMem_Malloc(2 * SEGMENT_SLOTS * sizeof(Member))
        if self.numbers is NULL:
            self.numbers = <uint16_t *>PyMem_Malloc(MOST_NUMBERS * sizeof(uint16_t))
        return self.members is not NULL and self.numbers is not NULL

    @cython.final
    cdef bint partition(
        self,
        uint64_t extent,
        uint64_t depth,
        uint64_t prefix,
        uint64_t now_ms,
        uint64_t seed,
        uint64_t *counts,
    ) noexcept:
        """As `segment.partition_slots`, into `members`; False where one would be left out."""
        cdef const uint8_t *bucket = self.base + (extent << EXTENT_SHIFT)
        cdef const uint8_t *slot
        cdef uint64_t number, index, key_hash, expires_at, half
        cdef Member *member
        counts[0] = counts[1] = 0
        for number in range(BUCKET_COUNT):
            for index in range(SLOT_COUNT):
                if bucket[CONTROL_OFFSET + index] <= CONTROL_TOMBSTONE:
                    continue
                slot = bucket + BUCKET_HEADER_SIZE + index * SLOT_SIZE
                expires_at = load(slot + SLOT_EXPIRES_OFFSET)
                if 0 < expires_at <= now_ms or slot[SLOT_KEY_SIZE_OFFSET] > MAX_KEY_SIZE:
                    return False
                key_hash = hash_of_slot(self.base, self.live[0], slot, seed)
                if (
                    key_hash >> 64 - depth != prefix >> DIRECTORY_BITS - depth
                    or bucket[CONTROL_OFFSET + index]
                    != FINGERPRINT_CODES[key_hash >> FINGERPRINT_SHIFT & 0xFF]
                ):
                    return False
                half = key_hash >> 63 - depth & 1
                member = self.members + half * SEGMENT_SLOTS + counts[half]
                counts[half] += 1
                store(member.word, key_hash)
                memcpy(member.slot, slot, SLOT_SIZE)
            bucket += BUCKET_SIZE
        return True

    @cython.final
    cdef void write_segment(
        self, uint64_t extent, uint64_t shape, const Member *members, uint64_t count
    ) noexcept:
        """As `Segments._write_segment`."""
        cdef uint64_t earliest = fill_segment(
            self.base + (extent << EXTENT_SHIFT), extent, shape, members, count, self.numbers
        )
        keep_order()
        self.store_entry(
            extent,
            KIND_SEGMENT | count << ENTRY_LIVE_SHIFT | count << ENTRY_USED_SHIFT,
            earliest,
        )
