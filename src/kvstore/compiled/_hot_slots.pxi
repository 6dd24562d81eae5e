# Part of `_hot`: the twin of `slots`.

cdef inline uint64_t entry_offset_of(uint64_t slot) noexcept nogil:
    """Return where the extent map has the entry of a slot's segment."""
    return EXTENT_MAP_OFFSET + (slot >> EXTENT_SHIFT << 4)


cdef inline uint64_t control_offset_of(uint64_t slot) noexcept nogil:
    """As `slots.control_offset_of`."""
    cdef uint64_t index = ((slot & BUCKET_SIZE - 1) - BUCKET_HEADER_SIZE) // SLOT_SIZE
    return (slot & ~(BUCKET_SIZE - 1)) + CONTROL_OFFSET + index


@cython.no_gc_clear
cdef class Slots:
    """See `slots.Slots`."""

    cdef public object _file
    cdef public object _records
    cdef Slab slab
    cdef Window window
    cdef object _seed
    cdef uint64_t _of_file  # as `wanted_shape`

    def __cinit__(self, file not None, Slab slab not None, records not None):
        self._file = file
        self._records = records
        self.slab = slab
        self.window = needed(file.window)
        self._seed = file.hash_seed
        self._of_file = wanted_shape(file)

    @property
    def _slab(self):
        return self.slab

    @_slab.setter
    def _slab(self, Slab slab not None):
        self.slab = slab

    def find(self, key_hash, bytes key not None):
        """See `slots.Slots.find`."""
        return self.find_(key_hash, key)

    cdef int64_t find_(self, uint64_t key_hash, bytes key) except -1:
        self.window.check(0)
        cdef const uint8_t *memory = self.window.base
        cdef const uint8_t *text = text_of(key)
        cdef uint64_t size = PyBytes_GET_SIZE(key)
        cdef uint64_t base = self.segment_of(key_hash)
        cdef uint64_t home = base | (key_hash & BUCKET_COUNT - 1) << BUCKET_SHIFT
        cdef uint64_t bucket = home, slot, tail
        cdef int64_t vacant = 0, damaged = 0
        cdef int fingerprint = fingerprint_codes[key_hash >> FINGERPRINT_SHIFT & 0xFF]
        cdef const uint8_t *control
        cdef const uint8_t *place
        cdef int same
        prefetch(memory + home + CONTROL_OFFSET + 64)
        cdef uint64_t shape = get_word(memory + home + SHAPE_OFFSET)
        if not self.fits(shape, key_hash):
            raise wrong_bucket_error(self._file, home, key_hash)
        while True:
            control = memory + bucket + CONTROL_OFFSET
            prefetch(control + 64)
            if (
                get_word(memory + bucket) != (BUCKET_MARKER | bucket >> BUCKET_SHIFT)
                or get_word(memory + bucket + SHAPE_OFFSET) != shape
            ):
                raise torn_bucket_error(self._file, bucket, shape)
            place = <const uint8_t *>memchr(control, fingerprint, SLOT_COUNT)
            while place is not NULL:
                slot = bucket + BUCKET_HEADER_SIZE + <uint64_t>(place - control) * SLOT_SIZE
                tail = get_word(memory + slot + SLOT_RECORD_OFFSET)
                if tail >> SLOT_KEY_SIZE_SHIFT == size:
                    prefetch(memory + (tail & SLOT_RECORD_MASK))  # harmless wherever it leads
                    prefetch(memory + (tail & SLOT_RECORD_MASK) + 64)
                    if size <= SLOT_KEY_SIZE:
                        same = memcmp(memory + slot, text, size) == 0
                    else:
                        same = self._compare_long(slot, key_hash, key)
                    if same > 0:
                        return <int64_t>slot
                    if same < 0:
                        damaged = <int64_t>slot
                place += 1
                place = <const uint8_t *>memchr(place, fingerprint, SLOT_COUNT - (place - control))
            place = <const uint8_t *>memchr(control, CONTROL_EMPTY, SLOT_COUNT)
            if place is not NULL:
                slot = bucket + BUCKET_HEADER_SIZE + <uint64_t>(place - control) * SLOT_SIZE
                return damaged or vacant or -<int64_t>slot
            if not vacant:
                place = <const uint8_t *>memchr(control, CONTROL_TOMBSTONE, SLOT_COUNT)
                if place is not NULL:
                    slot = bucket + BUCKET_HEADER_SIZE + <uint64_t>(place - control) * SLOT_SIZE
                    vacant = -<int64_t>slot
            bucket = base | bucket + BUCKET_SIZE & EXTENT_SIZE - 1
            if bucket == home:
                return damaged or vacant

    cdef inline bint fits(self, uint64_t shape, uint64_t key_hash) noexcept:
        """Return whether a bucket of this shape is of the segment that a hash leads to."""
        cdef uint64_t depth = shape & SHAPE_DEPTH_MASK
        cdef uint64_t wanted = self._of_file | key_hash >> DIRECTORY_SHIFT << SHAPE_PREFIX_SHIFT
        # Without the rewrites, and without those bits of the prefix that are the segment's own.
        return (
            depth - MIN_DEPTH <= MAX_DEPTH - MIN_DEPTH
            and (shape ^ wanted) << 16 >> 47 - depth == 0
        )

    cdef inline void expect_(self, uint64_t key_hash) noexcept:
        """Have the processor fetch where a key is looked up next, while its value is encoded.

        Without a lock, which only the interpreter's makes safe: nobody closes the file meanwhile.
        """
        cdef const uint8_t *memory = self.window.base
        cdef const uint8_t *bucket
        cdef uint64_t extent
        if HAS_GIL and memory is not NULL:
            extent = get_short(memory + DIRECTORY_OFFSET + 2 * (key_hash >> DIRECTORY_SHIFT))
            bucket = memory + (extent << EXTENT_SHIFT | (key_hash & BUCKET_COUNT - 1) << BUCKET_SHIFT)
            prefetch(bucket)  # harmless, wherever a damaged directory leads
            prefetch(bucket + 64)
            prefetch(memory + EXTENT_MAP_OFFSET + (extent << 4))

    cdef inline uint64_t segment_of(self, uint64_t key_hash) except 0:
        """Return the offset of the segment that the directory names for a hash."""
        cdef uint64_t position = key_hash >> DIRECTORY_SHIFT
        cdef uint64_t extent = get_short(self.window.base + DIRECTORY_OFFSET + 2 * position)
        if (extent + 1) << EXTENT_SHIFT > self.window._size or extent < FIXED_EXTENTS:
            raise CorruptStoreError(
                f"{self._file.path}: the directory's entry {position} leads to extent {extent}, "
                f"which is no segment"
            )
        return extent << EXTENT_SHIFT

    cdef int _compare_long(self, uint64_t slot, uint64_t hash_of_key, bytes key) except -2:
        """Return 1 where the slot is that key's, 0 where not, -1 where nobody can tell."""
        cdef const uint8_t *memory = self.window.base
        if memcmp(memory + slot, text_of(key), SLOT_KEY_SIZE):
            return 0
        cdef uint64_t tail = get_word(memory + slot + SLOT_RECORD_OFFSET)
        cdef bytes found = self.slab.key_at_(tail & SLOT_RECORD_MASK, PyBytes_GET_SIZE(key))
        if found == key:
            return 1
        if self._records.is_valid_record(tail):
            return 0
        return -1 if (hash_of(found, self._seed) ^ hash_of_key) & placing_bits else 0

    def insert(self, slot, key_hash, bytes key not None, record, value_size, expires_at):
        """See `slots.Slots.insert`."""
        self.window.check_slot(slot)
        self.window.look_at_door(self._file)
        self.insert_(slot, key_hash, key, record, value_size, expires_at)

    cdef int insert_(
        self,
        uint64_t slot,
        uint64_t key_hash,
        bytes key,
        uint64_t record,
        uint64_t value_size,
        uint64_t expires_at,
    ) except -1:
        cdef Window window = self.window
        cdef object file = self._file
        cdef uint64_t key_size = PyBytes_GET_SIZE(key)
        cdef uint64_t entry_offset = entry_offset_of(slot)
        cdef uint64_t control_offset = control_offset_of(slot)
        cdef uint64_t earliest, entry, after
        cdef uint8_t control, code
        cdef uint8_t image[48]
        memset(image, 0, SLOT_KEY_SIZE)
        memcpy(image, text_of(key), min(key_size, SLOT_KEY_SIZE))
        set_word(image + SLOT_EXPIRES_OFFSET, expires_at)
        set_word(
            image + SLOT_RECORD_OFFSET,
            record | value_size << SLOT_VALUE_SIZE_SHIFT | key_size << SLOT_KEY_SIZE_SHIFT,
        )
        window.put(file, slot, image, SLOT_SIZE)
        if expires_at:
            earliest = (slot & ~(BUCKET_SIZE - 1)) + EARLIEST_OFFSET
            if expires_at < get_word(window.base + earliest):
                window.put_word(file, earliest, expires_at)
            earliest = entry_offset + SEGMENT_EARLIEST_OFFSET
            if expires_at < get_word(window.base + earliest):
                window.put_word(file, earliest, expires_at)
        control = window.base[control_offset]
        code = fingerprint_codes[key_hash >> FINGERPRINT_SHIFT & 0xFF]
        entry = get_word(window.base + entry_offset)
        after = entry + ENTRY_LIVE_ONE + (0 if control else ENTRY_USED_ONE)
        if window.direct:
            set_word(window.base + entry_offset, after)
            keep_order()
            window.base[control_offset] = code
            keep_order()
            return 0
        try:
            file.write_word(entry_offset >> 3, after)
            file.write(control_offset, bytes([code]))
        except BaseException:
            file.restore(control_offset, bytes([control]))
            file.restore(entry_offset, word_bytes(entry))
            raise
        return 0

    def delete(self, slot, bytes key not None):
        """See `slots.Slots.delete`."""
        self.window.check_slot(slot)
        self.window.look_at_door(self._file)
        return self.delete_(slot, key)

    cdef uint64_t delete_(self, uint64_t slot, bytes key) except? 0:
        cdef uint64_t tail = get_word(self.window.base + slot + SLOT_RECORD_OFFSET)
        cdef uint64_t record = tail & SLOT_RECORD_MASK
        if not self.slab.holds_(tail, key):
            self._file.require_rebuild()
            self.remove_(slot)
            return 0
        try:
            self.remove_(slot)
            self.slab.give_(record)
        except BaseException:
            if not self.is_live_(slot) and self.slab.is_record_(record):
                self._put_back(slot, key)
            raise
        return record

    def remove(self, slot):
        """See `slots.Slots.remove`."""
        self.window.check_slot(slot)
        self.window.look_at_door(self._file)
        self.remove_(slot)

    cdef int remove_(self, uint64_t slot) except -1:
        cdef Window window = self.window
        cdef uint64_t control_offset = control_offset_of(slot)
        cdef uint64_t entry_offset = entry_offset_of(slot)
        cdef uint64_t entry = get_word(window.base + entry_offset)
        cdef uint64_t taken
        cdef uint8_t control, was = window.base[control_offset]
        if memchr(
            window.base + (slot & ~(BUCKET_SIZE - 1)) + CONTROL_OFFSET, CONTROL_EMPTY, SLOT_COUNT
        ):
            control, taken = CONTROL_EMPTY, ENTRY_LIVE_ONE + ENTRY_USED_ONE
        else:
            control, taken = CONTROL_TOMBSTONE, ENTRY_LIVE_ONE
        if entry < taken:
            self._file.require_rebuild()
            taken = 0
        if window.direct:
            window.base[control_offset] = control
            keep_order()
            set_word(window.base + entry_offset, entry - taken)
            keep_order()
            return 0
        try:
            self._file.write(control_offset, bytes([control]))
            self._file.write_word(entry_offset >> 3, entry - taken)
        except BaseException:
            self._file.restore(entry_offset, word_bytes(entry))
            self._file.restore(control_offset, bytes([was]))
            raise
        return 0

    def is_live(self, slot):
        """See `slots.Slots.is_live`."""
        self.window.check_slot(slot)
        return self.is_live_(slot)

    cdef bint is_live_(self, uint64_t slot) noexcept:
        return self.window.base[control_offset_of(slot)] > CONTROL_TOMBSTONE

    def is_expired(self, slot, now_ms):
        """See `slots.Slots.is_expired`."""
        self.window.check(slot)
        return self.is_expired_(slot, now_ms)

    cdef bint is_expired_(self, uint64_t slot, uint64_t now_ms) noexcept:
        cdef uint64_t expires_at = get_word(self.window.base + slot + SLOT_EXPIRES_OFFSET)
        return 0 < expires_at <= now_ms and expires_at == self.slab.expiry_at_(
            get_word(self.window.base + slot + SLOT_RECORD_OFFSET) & SLOT_RECORD_MASK
        )

    def used_slot_count(self, slot):
        """See `slots.Slots.used`."""
        self.window.check(slot)
        return self.used_(slot)

    cdef uint64_t used_(self, uint64_t slot) noexcept:
        return get_word(self.window.base + entry_offset_of(slot)) >> ENTRY_USED_SHIFT & 0xFFFF
