# Part of `_hot`: the twin of `slab`.

@cython.no_gc_clear
cdef class Slab:
    """See `slab.Slab`."""

    cdef public object _file
    cdef public object _extents
    cdef public uint64_t _spare
    cdef bytearray looked_at
    cdef Lock lock
    cdef Window window

    def __cinit__(self, file not None, extents not None):
        self.looked_at = bytearray(EXTENT_MAP_ENTRIES)
        self._file = file
        self._extents = extents
        self.lock = needed(extents.lock)
        self.window = needed(file.window)

    @property
    def _lock(self):
        return self.lock

    @_lock.setter
    def _lock(self, Lock lock not None):
        self.lock = lock

    @property
    def _looked_at(self):
        return self.looked_at

    @_looked_at.setter
    def _looked_at(self, bytearray looked_at not None):
        if len(looked_at) != EXTENT_MAP_ENTRIES:
            raise ValueError(f"not a byte for each of {EXTENT_MAP_ENTRIES:,} extents")
        self.looked_at = looked_at

    def allocate(self, size):
        """See `slab.Slab.allocate`."""
        self.window.look_at_door(self._file)
        return self.take_(size)

    cdef uint64_t take_(self, uint64_t size) except 0:
        if size > MAX_RECORD_SIZE:
            raise ValueError(f"a record of {size:,} bytes, the largest has {MAX_RECORD_SIZE:,}")
        self.window.check(0)
        cdef uint64_t size_class = size_classes[size + BLOCK_ALIGNMENT - 1 >> 5]
        cdef Window window = self.window
        cdef uint64_t extent, entry_offset, entry, block, after
        cdef int64_t rest
        self.lock.take()
        try:
            while True:
                extent = get_short(window.base + CLASS_HEADS_OFFSET + 2 * size_class)
                if extent == NO_EXTENT:
                    extent = self._open_extent(size_class)
                elif (extent + 1) << EXTENT_SHIFT > window._size:
                    self._extents.check(extent)
                entry_offset = EXTENT_MAP_OFFSET + (extent << 4)
                entry = get_word(window.base + entry_offset)
                if not self.looked_at[extent]:
                    self.look_at(extent, size_class, entry >> ENTRY_FRESH_SHIFT)
                block = entry >> ENTRY_FIRST_FREE_SHIFT & 0xFFFF
                if block == NO_BLOCK:
                    block = entry >> ENTRY_FRESH_SHIFT
                    after = entry + ENTRY_LIVE_ONE + ENTRY_FRESH_ONE
                else:
                    rest = self._after_first_free(extent, entry, block, size_class)
                    if rest < 0:
                        self._abandon_free_list(extent, entry, size_class)
                        continue
                    after = (
                        (entry & rest_mask)
                        + ENTRY_LIVE_ONE
                        + (<uint64_t>rest << ENTRY_FIRST_FREE_SHIFT)
                    )
                if (block + 1) * block_sizes[size_class] > EXTENT_SIZE:
                    raise CorruptStoreError(
                        f"{self._file.path}: the entry of extent {extent} at byte {entry_offset:,} "
                        f"leads to block {block}, which is not in it"
                    )
                if after >> ENTRY_FIRST_FREE_SHIFT != full_entries[size_class]:
                    if window.direct:
                        set_word(window.base + entry_offset, after)
                        keep_order()
                    else:
                        try:
                            self._file.write_word(entry_offset >> 3, after)
                        except BaseException:  # it was written, or not
                            self._file.restore(entry_offset, word_bytes(entry))
                            raise
                elif window.direct:
                    self.check_neighbours(extent)
                    set_word(window.base + entry_offset, after)
                    self.unlink_(extent, size_class)
                else:
                    with Rollback(self._file) as rollback:
                        rollback.write(entry_offset, word_bytes(after))
                        self._unlink(extent, size_class, rollback)
                return (extent << EXTENT_SHIFT) + block * block_sizes[size_class]
        finally:
            self.lock.let_go()

    def _look_at(self, extent, size_class, fresh):
        """See `slab.Slab._look_at`."""
        if extent >= self.window._size >> EXTENT_SHIFT or size_class >= class_count:
            raise IndexError(f"extent {extent} of class {size_class} is not in the open file")
        self.look_at(extent, size_class, fresh)

    cdef int look_at(self, uint64_t extent, uint64_t size_class, uint64_t fresh) except -1:
        """As `_look_at`."""
        cdef const uint8_t *start = self.window.base + (extent << EXTENT_SHIFT)
        cdef uint64_t block_size = block_sizes[size_class]
        cdef uint64_t end = min(fresh * block_size, EXTENT_SIZE)
        cdef uint64_t place = 0, head, size
        while place < EXTENT_SIZE:
            head = get_word(start + place)
            if <uint32_t>head == RECORD_MAGIC:
                size = RECORD_HEADER_SIZE + (head >> 32 & 0xFFFF) + (head >> 48 & 0xFF)
                if (
                    place >= end
                    or size > MAX_RECORD_SIZE
                    or size_classes[size + BLOCK_ALIGNMENT - 1 >> 5] != size_class
                ):
                    self._look_closely(extent, size_class, fresh)
                    break
            place += BLOCK_ALIGNMENT
        self.looked_at[extent] = True
        return 0

    cdef int64_t _after_first_free(
        self, uint64_t extent, uint64_t entry, uint64_t block, uint64_t size_class
    ) noexcept:
        cdef uint64_t fresh = entry >> ENTRY_FRESH_SHIFT
        cdef uint64_t offset = block * block_sizes[size_class]
        cdef uint64_t link, rest
        if block < fresh and offset + 8 <= EXTENT_SIZE:
            link = get_word(self.window.base + (extent << EXTENT_SHIFT) + offset)
            rest = link >> FREE_NEXT_SHIFT
            if <uint32_t>link == FREE_MAGIC and (rest < fresh or rest == NO_BLOCK):
                return <int64_t>rest
        return -1

    def free(self, offset):
        """See `slab.Slab.free`."""
        self.window.look_at_door(self._file)
        self.give_(offset)

    cdef int give_(self, uint64_t offset) except -1:
        cdef uint64_t extent = offset >> EXTENT_SHIFT
        cdef uint64_t entry_offset = EXTENT_MAP_OFFSET + (extent << 4)
        cdef Window window = self.window
        cdef uint64_t entry, size_class, was_first, block, after, head, link
        cdef bint was_full
        window.check(offset)
        self.lock.take()
        try:
            entry = get_word(window.base + entry_offset)
            size_class = entry >> 8 & 0xFF
            if size_class >= <uint64_t>class_count:
                raise IndexError(f"size class {size_class}, there are {class_count}")
            was_first = entry >> ENTRY_FIRST_FREE_SHIFT & 0xFFFF
            block = (offset & EXTENT_SIZE - 1) // block_sizes[size_class]
            after = (entry & rest_mask) - ENTRY_LIVE_ONE + (block << ENTRY_FIRST_FREE_SHIFT)
            was_full = entry >> ENTRY_FIRST_FREE_SHIFT == full_entries[size_class]
            if block >= entry >> ENTRY_FRESH_SHIFT:
                self._refuse_untaken(extent, block, entry)
            if entry >> ENTRY_LIVE_SHIFT & 0xFFFF <= 1 and self.has_other_records(
                extent, block, entry
            ):
                self._check_is_last(extent, block, entry)
            head = get_word(window.base + offset)
            link = FREE_MAGIC | was_first << FREE_NEXT_SHIFT
            if not after >> ENTRY_LIVE_SHIFT & 0xFFFF and extent != self._spare:
                self._make_spare(extent)
            if window.direct:
                if was_full:
                    self.check_head(size_class)
                set_word(window.base + entry_offset, after)
                if was_full:
                    self.link_(extent, size_class)
                keep_order()
                set_word(window.base + offset, link)
                keep_order()
            elif was_full:
                with Rollback(self._file) as rollback:
                    rollback.write(entry_offset, word_bytes(after))
                    self._link(extent, size_class, rollback)
                    rollback.write(offset, word_bytes(link))
            else:
                try:
                    self._file.write_word(entry_offset >> 3, after)
                    self._file.write_word(offset >> 3, link)
                except BaseException:
                    self._file.restore(offset, word_bytes(head))
                    self._file.restore(entry_offset, word_bytes(entry))
                    raise
        finally:
            self.lock.let_go()
        return 0

    cdef bint has_other_records(self, uint64_t extent, uint64_t block, uint64_t entry) noexcept:
        """Return whether `slab.Slab._check_is_last` would raise."""
        cdef const uint8_t *start = self.window.base + (extent << EXTENT_SHIFT)
        cdef uint64_t size = block_sizes[entry >> 8 & 0xFF]
        cdef uint64_t end = min((entry >> ENTRY_FRESH_SHIFT) * size, EXTENT_SIZE)
        cdef uint64_t place = 0
        if not entry >> ENTRY_LIVE_SHIFT & 0xFFFF:
            return True
        while place < end:
            if <uint32_t>get_word(start + place) == RECORD_MAGIC and place != block * size:
                return True
            place += size
        return False

    # As `_link` and `_unlink` where the door stores through the map: then nothing can cut them short
    # once they have begun, so what they may raise is looked for before.

    cdef inline int check_head(self, uint64_t size_class) except -1:
        self.check_extent(get_short(self.window.base + CLASS_HEADS_OFFSET + 2 * size_class))
        return 0

    cdef inline int check_neighbours(self, uint64_t extent) except -1:
        cdef const uint8_t *entry = self.window.base + EXTENT_MAP_OFFSET + (extent << 4)
        self.check_extent(get_short(entry + SLAB_PREVIOUS_OFFSET))
        self.check_extent(get_short(entry + SLAB_NEXT_OFFSET))
        return 0

    cdef inline int check_extent(self, uint64_t extent) except -1:
        """As `Extents.check`, of an extent on a list or none."""
        if extent != NO_EXTENT and (
            extent < FIXED_EXTENTS or (extent + 1) << EXTENT_SHIFT > self.window._size
        ):
            self._extents.check(extent)
        return 0

    cdef inline void link_(self, uint64_t extent, uint64_t size_class) noexcept:
        cdef uint8_t *base = self.window.base
        cdef uint8_t *head = base + CLASS_HEADS_OFFSET + 2 * size_class
        cdef uint8_t *entry = base + EXTENT_MAP_OFFSET + (extent << 4)
        cdef uint64_t after = get_short(head)
        set_short(entry + SLAB_PREVIOUS_OFFSET, NO_EXTENT)
        set_short(entry + SLAB_NEXT_OFFSET, after)
        if after != NO_EXTENT:
            set_short(base + EXTENT_MAP_OFFSET + (after << 4) + SLAB_PREVIOUS_OFFSET, extent)
        set_short(head, extent)

    cdef inline void unlink_(self, uint64_t extent, uint64_t size_class) noexcept:
        cdef uint8_t *base = self.window.base
        cdef uint8_t *entry = base + EXTENT_MAP_OFFSET + (extent << 4)
        cdef uint64_t before = get_short(entry + SLAB_PREVIOUS_OFFSET)
        cdef uint64_t after = get_short(entry + SLAB_NEXT_OFFSET)
        if before == NO_EXTENT:
            set_short(base + CLASS_HEADS_OFFSET + 2 * size_class, after)
        else:
            set_short(base + EXTENT_MAP_OFFSET + (before << 4) + SLAB_NEXT_OFFSET, after)
        if after != NO_EXTENT:
            set_short(base + EXTENT_MAP_OFFSET + (after << 4) + SLAB_PREVIOUS_OFFSET, before)

    cdef int write_record_(
        self,
        uint64_t offset,
        bytes key,
        bytes value,
        uint64_t key_hash,
        uint64_t created_at,
        uint64_t expires_at,
    ) except -1:
        cdef uint64_t checksum = checksum_of(value, key_hash ^ created_at ^ expires_at << 16 ^ offset)
        cdef uint64_t key_size = PyBytes_GET_SIZE(key), value_size = PyBytes_GET_SIZE(value)
        cdef uint64_t size = RECORD_HEADER_SIZE + key_size + value_size
        cdef Window window = self.window
        cdef bytes record
        cdef uint8_t *place
        if size > window._size or offset > window._size - size:
            raise IndexError(f"{size:,} bytes at {offset:,} are not in the file")
        if window.direct:
            place = window.base + offset
        else:
            record = PyBytes_FromStringAndSize(NULL, size)
            place = <uint8_t *>PyBytes_AS_STRING(record)
        set_word(
            place,
            RECORD_MAGIC
            | value_size << SLOT_VALUE_SIZE_SHIFT
            | key_size << SLOT_KEY_SIZE_SHIFT,
        )
        set_word(place + 8, created_at)
        set_word(place + RECORD_EXPIRES_OFFSET, expires_at)
        set_word(place + 24, checksum)
        memcpy(place + RECORD_HEADER_SIZE, text_of(key), key_size)
        memcpy(place + RECORD_HEADER_SIZE + key_size, text_of(value), value_size)
        if window.direct:
            keep_order()
        elif self._file.in_place:
            self._file.write(offset, record)
        else:
            self._file.write(offset + 4, record[4:])
        return 0

    cdef bytes read_record_(self, uint64_t slot_tail, uint64_t *header):
        cdef uint64_t offset = slot_tail & SLOT_RECORD_MASK
        cdef uint64_t start = offset + RECORD_HEADER_SIZE + (slot_tail >> SLOT_KEY_SIZE_SHIFT)
        cdef uint64_t size = slot_tail >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF
        if start + size > self.window._size or offset < first_record or offset & 7:
            raise no_record_error(self._file, offset, start + size)
        memcpy(header, self.window.base + offset, RECORD_HEADER_SIZE)
        return PyBytes_FromStringAndSize(<const char *>self.window.base + start, size)

    cdef inline void expect_(self, uint64_t slot_tail) noexcept:
        """Have the processor fetch the record that is read next, while other things are done."""
        cdef uint64_t size = slot_tail >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF
        cdef const uint8_t *record = self.window.base + (slot_tail & SLOT_RECORD_MASK)
        cdef uint64_t line
        for line in range(64, min(size, <uint64_t>MOST_EXPECTED), 64):
            prefetch(record + line)  # harmless, wherever a damaged slot leads

    cdef bint holds_(self, uint64_t slot_tail, bytes key) noexcept:
        cdef uint64_t offset = slot_tail & SLOT_RECORD_MASK
        cdef uint64_t size = PyBytes_GET_SIZE(key)
        cdef const uint8_t *base = self.window.base
        cdef uint64_t entry, size_class
        if offset < first_record or offset + RECORD_HEADER_SIZE + size > self.window._size:
            return False
        entry = get_word(base + EXTENT_MAP_OFFSET + (offset >> EXTENT_SHIFT << 4))
        size_class = entry >> 8 & 0xFF
        return (
            entry & ENTRY_KIND_MASK == KIND_SLAB
            and size_class < <uint64_t>class_count
            and (offset & EXTENT_SIZE - 1) % block_sizes[size_class] == 0
            and get_word(base + offset) == (slot_tail ^ offset | RECORD_MAGIC)
            and memcmp(base + offset + RECORD_HEADER_SIZE, text_of(key), size) == 0
        )

    cdef bint is_record_(self, uint64_t offset) noexcept:
        return (
            offset + 8 <= self.window._size
            and <uint32_t>get_word(self.window.base + offset) == RECORD_MAGIC
        )

    cdef uint64_t expiry_at_(self, uint64_t offset) noexcept:
        if offset > MAX_FILE_SIZE or offset + RECORD_HEADER_SIZE > self.window._size:
            return 0
        # As through a view of words, wherever a damaged slot leads.
        return get_word(self.window.base + (offset & ~<uint64_t>7) + RECORD_EXPIRES_OFFSET)

    cdef bytes key_at_(self, uint64_t offset, uint64_t size):
        cdef uint64_t start = offset + RECORD_HEADER_SIZE
        if offset > MAX_FILE_SIZE or size > MAX_FILE_SIZE or start + size > self.window._size:
            return b""
        return PyBytes_FromStringAndSize(<const char *>self.window.base + start, size)


cdef bint verify_(
    const uint64_t *header, bytes value, uint64_t slot_tail, uint64_t expires_at, uint64_t key_hash
) except -1:
    """As `slab.verify`."""
    cdef uint64_t offset = slot_tail & SLOT_RECORD_MASK
    return (
        header[3] == checksum_of(value, key_hash ^ header[1] ^ header[2] << 16 ^ offset)
        and header[0] == (slot_tail ^ offset | RECORD_MAGIC)
        and header[2] == expires_at
    )
