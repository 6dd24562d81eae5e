# Part of `_fast_path`: the blocks of records, as `Slab` allocates, frees, retires and sweeps them.


@cython.no_gc
cdef class Blocks:
    """The blocks of one open store's file: see `FastPath`, of which this is a part.

    What begins with "may" is asked before a byte is stored; what it allows cannot fail then.

    Args:
        mapped: the mapped file. It cannot be unmapped before `close`.
        live: of the data file, two words: how many of its bytes may be touched, and whether changes
            are stored through the map.
        spare: of the slab, one word: the extent that is its spare.
        looked_at: of the slab, a byte for each extent: whether it was looked at.
        versions: the words of the store's `Versions`.
    """

    cdef Py_buffer map_view, live_view, spare_view, looked_at_view, versions_view
    cdef uint8_t *base
    cdef const uint64_t *live
    cdef uint64_t *spare
    cdef const uint8_t *looked_at
    cdef uint64_t *versions
    cdef Lock space
    cdef bint is_open
    cdef bint awaits_spare  # nothing but the spare kept a block from being freed
    # Where changes go that are not to be stored here: see `FastPath.begin_under_locks`.
    cdef list plan

    def __cinit__(self, mapped, live, spare, bytearray looked_at not None, versions, *_):
        if len(looked_at) != EXTENT_MAP_ENTRIES:
            raise ValueError(f"not a byte for each of {EXTENT_MAP_ENTRIES:,} extents")
        PyObject_GetBuffer(mapped, &self.map_view, PyBUF_SIMPLE)
        PyObject_GetBuffer(live, &self.live_view, PyBUF_SIMPLE)
        PyObject_GetBuffer(spare, &self.spare_view, PyBUF_WRITABLE)
        PyObject_GetBuffer(looked_at, &self.looked_at_view, PyBUF_SIMPLE)
        PyObject_GetBuffer(versions, &self.versions_view, PyBUF_WRITABLE)
        if self.live_view.len != 16 or self.spare_view.len != 8:
            raise ValueError("not the words of a data file and its slab")
        if <uint64_t>self.versions_view.len != 8 * VERSION_WORDS:
            raise ValueError(f"{self.versions_view.len} bytes of versions, not {VERSION_WORDS} words")
        self.live = <const uint64_t *>self.live_view.buf
        self.spare = <uint64_t *>self.spare_view.buf
        self.looked_at = <const uint8_t *>self.looked_at_view.buf
        self.versions = <uint64_t *>self.versions_view.buf
        if not first_record < self.live[0] <= <uint64_t>self.map_view.len:
            raise ValueError(f"{self.live[0]:,} bytes of a map of {self.map_view.len:,}")
        self.base = <uint8_t *>self.map_view.buf
        self.is_open = True

    def __dealloc__(self):
        self.close()

    def close(self):
        """Answer RARE from now on, and let go of the map. A second call does nothing."""
        self.is_open = False
        self.base = NULL
        PyBuffer_Release(&self.map_view)
        PyBuffer_Release(&self.live_view)
        PyBuffer_Release(&self.spare_view)
        PyBuffer_Release(&self.looked_at_view)
        PyBuffer_Release(&self.versions_view)

    # --- allocated and freed ---------------------------------------------------------------------

    @cython.final
    cdef uint64_t next_block(self, uint64_t size_class, uint64_t *after) noexcept:
        """Return the offset of the block that a class has next; 0 for RARE.

        Sets the first word of its extent's entry as it is when the block is taken.
        """
        cdef const uint8_t *base = self.base
        cdef uint64_t extent = load_short(base + CLASS_HEADS_OFFSET + 2 * size_class)
        cdef uint64_t entry, block, fresh, offset, link, rest
        if not self.is_extent(extent) or not self.looked_at[extent]:
            return 0
        entry = load(base + map_entry_of(extent))
        block = entry >> ENTRY_FIRST_FREE_SHIFT & 0xFFFF
        fresh = entry >> ENTRY_FRESH_SHIFT
        if block == NO_BLOCK:
            block = fresh
            after[0] = entry + ENTRY_LIVE_ONE + ENTRY_FRESH_ONE
        elif block < fresh:
            offset = (extent << EXTENT_SHIFT) + block * BLOCK_SIZES[size_class]
            if (block + 1) * BLOCK_SIZES[size_class] > EXTENT_SIZE:
                return 0
            link = load(base + offset)
            rest = link >> FREE_NEXT_SHIFT
            if <uint32_t>link != FREE_MAGIC or (rest >= fresh and rest != NO_BLOCK):
                return 0
            after[0] = (
                (entry & rest_mask) + ENTRY_LIVE_ONE + (rest << ENTRY_FIRST_FREE_SHIFT)
            )
        else:
            return 0
        if (block + 1) * BLOCK_SIZES[size_class] > EXTENT_SIZE:
            return 0
        return (extent << EXTENT_SHIFT) + block * BLOCK_SIZES[size_class]

    @cython.final
    cdef bint take_block(self, uint64_t extent, uint64_t size_class, uint64_t after) except -1:
        """Store the entry of an extent of which a block is taken; False for RARE."""
        cdef uint64_t entry_offset = map_entry_of(extent)
        if after >> ENTRY_FIRST_FREE_SHIFT != full_entry(size_class):
            self.write(entry_offset, &after, 8)
            return True
        if self.plan is not None or not self.has_neighbours(extent):
            return False
        store(self.base + entry_offset, after)
        self.unlink(extent, size_class)
        keep_order()
        return True

    @cython.final
    cdef bint contains_record_of(self, uint64_t tail, const uint8_t *key, uint64_t size) noexcept:
        """As `Records.contains_record_of`."""
        cdef uint64_t offset = tail & SLOT_RECORD_MASK
        cdef uint64_t entry, size_class
        if offset < first_record or offset + RECORD_HEADER_SIZE + size > self.live[0]:
            return False
        entry = load(self.base + map_entry_of(offset >> EXTENT_SHIFT))
        size_class = entry >> ENTRY_CLASS_SHIFT & 0xFF
        return (
            entry & ENTRY_KIND_MASK == KIND_SLAB
            and size_class < CLASS_COUNT
            and (offset & EXTENT_SIZE - 1) % BLOCK_SIZES[size_class] == 0
            and load(self.base + offset) == (tail ^ offset | RECORD_MAGIC)
            and memcmp(self.base + offset + RECORD_HEADER_SIZE, key, size) == 0
        )

    def free(self, uint64_t record):
        """Free the block of a record that no slot points to; True or RARE (None)."""
        cdef uint64_t after, slab
        if (
            not self.is_open
            or not self.live[1]
            or self.space._owner
            or record < first_record
            or record > self.live[0] - RECORD_HEADER_SIZE
        ):
            return RARE
        slab = load(self.base + map_entry_of(record >> EXTENT_SHIFT))
        if not self.may_free(record, slab, &after):
            return RARE
        self.free_(record, slab, after)
        return True

    @cython.final
    cdef bint may_free(self, uint64_t record, uint64_t entry, uint64_t *after) noexcept:
        """Return whether a block can be freed here; set its extent's entry as it is then.

        `entry` is the first word of that before it.
        """
        cdef uint64_t extent = record >> EXTENT_SHIFT
        cdef uint64_t size_class = entry >> ENTRY_CLASS_SHIFT & 0xFF
        cdef uint64_t live = entry >> ENTRY_LIVE_SHIFT & 0xFFFF
        cdef uint64_t block, head
        if entry & ENTRY_KIND_MASK != KIND_SLAB or size_class >= CLASS_COUNT:
            return False
        block = (record & EXTENT_SIZE - 1) // BLOCK_SIZES[size_class]
        after[0] = (entry & rest_mask) - ENTRY_LIVE_ONE + (block << ENTRY_FIRST_FREE_SHIFT)
        if block >= entry >> ENTRY_FRESH_SHIFT or not live:
            return False
        if entry >> ENTRY_FIRST_FREE_SHIFT == full_entry(size_class):
            head = load_short(self.base + CLASS_HEADS_OFFSET + 2 * size_class)
            if self.plan is not None or (head != NO_EXTENT and not self.is_extent(head)):
                return False
        if live > 1:
            return True
        # The extent becomes empty, and so the spare. One that is that already must go first.
        if self.plan is not None or not self.is_last(extent, block, size_class):
            return False
        self.awaits_spare = self.spare[0] != extent and self.has_empty_spare()
        return not self.awaits_spare

    @cython.final
    cdef inline bint has_empty_spare(self) noexcept:
        """Return whether an extent waits to be put on the list of free ones."""
        cdef uint64_t entry = load(self.base + map_entry_of(self.spare[0]))
        return entry & ENTRY_KIND_MASK == KIND_SLAB and not entry >> ENTRY_LIVE_SHIFT & 0xFFFF

    @cython.final
    cdef bint is_last(self, uint64_t extent, uint64_t block, uint64_t size_class) noexcept:
        """Return whether `Slab._check_is_last` would let a block pass."""
        cdef const uint8_t *start = self.base + (extent << EXTENT_SHIFT)
        cdef uint64_t entry = load(self.base + map_entry_of(extent))
        cdef uint64_t size = BLOCK_SIZES[size_class]
        cdef uint64_t end = min((entry >> ENTRY_FRESH_SHIFT) * size, EXTENT_SIZE)
        cdef uint64_t place = 0
        while place < end:
            if is_magic(load(start + place)) and place != block * size:
                return False
            place += size
        return True

    @cython.final
    cdef int free_(self, uint64_t record, uint64_t slab, uint64_t after) except -1:
        """Free a block of which `may_free` was true."""
        cdef uint64_t extent = record >> EXTENT_SHIFT
        cdef uint64_t head = load(self.base + record)
        cdef uint64_t link = (
            FREE_MAGIC | (slab >> ENTRY_FIRST_FREE_SHIFT & 0xFFFF) << FREE_NEXT_SHIFT
        )
        cdef uint64_t size_class = slab >> ENTRY_CLASS_SHIFT & 0xFF
        if not after >> ENTRY_LIVE_SHIFT & 0xFFFF:
            self.spare[0] = extent
        self.versions[RELEASED_WORD] += BLOCK_SIZES[size_class]
        self.write(map_entry_of(extent), &after, 8)
        if slab >> ENTRY_FIRST_FREE_SHIFT == full_entry(size_class):
            self.link(extent, size_class)
            keep_order()
        if head >> GENERATION_SHIFT and is_magic(head):
            self.count_retired(map_entry_of(extent), -1)
        # Last: it ends the record.
        self.write(record, &link, 8)
        return 0

    @cython.final
    cdef inline int write(self, uint64_t offset, const void *data, size_t size) except -1:
        """Store bytes, or plan to."""
        if self.plan is None:
            memcpy(self.base + offset, data, size)
            keep_order()
        else:
            self.plan.append((
                offset,
                PyBytes_FromStringAndSize(<const char *>data, size),
                PyBytes_FromStringAndSize(<const char *>self.base + offset, size),
            ))
        return 0

    # --- retired and marked records ------------------------------------------------------------

    @cython.final
    cdef inline bint may_retire(self, uint64_t record) noexcept:
        """Return whether a block that `contains_record_of` was true of can be retired here."""
        cdef const uint8_t *place = self.base + map_entry_of(record >> EXTENT_SHIFT)
        cdef uint64_t entry = load(place)
        cdef uint64_t size = BLOCK_SIZES[entry >> ENTRY_CLASS_SHIFT & 0xFF]
        return (
            record & EXTENT_SIZE - 1 < (entry >> ENTRY_FRESH_SHIFT) * size
            and load_short(place + SLAB_RETIRED_OFFSET) < (entry >> ENTRY_LIVE_SHIFT & 0xFFFF)
        )

    @cython.final
    cdef inline int retire(self, uint64_t record, uint64_t magic) except -1:
        """Have a record, with this magic from now on, stay in its block until it is reclaimed."""
        cdef uint64_t entry_offset = map_entry_of(record >> EXTENT_SHIFT)
        cdef uint64_t word = load(self.base + record) ^ RECORD_MAGIC ^ magic
        word |= self.versions[GENERATION_WORD] << GENERATION_SHIFT
        cdef uint64_t size = BLOCK_SIZES[load(self.base + entry_offset) >> ENTRY_CLASS_SHIFT & 0xFF]
        self.versions[RETIRED_SIZE_WORD] += size
        self.versions[RELEASED_WORD] += size
        self.versions[MARKS_WORD] += magic == MARKED_MAGIC
        self.count_retired(entry_offset, 1)
        # Last: a mark takes the record away.
        return self.write(record, &word, 8)

    @cython.final
    cdef inline int count_retired(self, uint64_t entry_offset, int difference) except -1:
        """As `Slab._count_retired`, not below 0."""
        cdef uint64_t place = entry_offset + SLAB_RETIRED_OFFSET
        cdef int count = <int>load_short(self.base + place) + difference
        store_short(self.base + place, <uint64_t>max(count, 0))
        keep_order()
        return 0

    def sweep(self, uint64_t extent, uint64_t magic, uint64_t generation):
        """Free the blocks of an extent that were retired, or marked, in another generation.

        The caller holds a stripe, so that the map stays, and not the space lock.

        Returns:
            How many; or RARE where one of them cannot be freed here: those before it were.
        """
        cdef uint64_t entry_offset, entry, after, size, place, end, word, start
        cdef long freed = 0
        if (
            not self.is_open
            or not self.live[1]
            or self.space._owner
            or not self.is_extent(extent)
        ):
            return RARE
        entry_offset = map_entry_of(extent)
        entry = load(self.base + entry_offset)
        if entry & ENTRY_KIND_MASK != KIND_SLAB or entry >> ENTRY_CLASS_SHIFT & 0xFF >= CLASS_COUNT:
            return RARE
        size = BLOCK_SIZES[entry >> ENTRY_CLASS_SHIFT & 0xFF]
        start = place = extent << EXTENT_SHIFT
        end = start + min((entry >> ENTRY_FRESH_SHIFT) * size, EXTENT_SIZE)
        while place < end:
            word = load(self.base + place)
            if (
                <uint32_t>word == magic
                and word >> GENERATION_SHIFT
                and word >> GENERATION_SHIFT != generation
            ):
                if not self.may_free(place, entry, &after):
                    return RARE
                self.free_(place, entry, after)
                self.versions[RETIRED_SIZE_WORD] -= min(size, self.versions[RETIRED_SIZE_WORD])
                if magic == MARKED_MAGIC and self.versions[MARKS_WORD]:
                    self.versions[MARKS_WORD] -= 1
                entry = after
                freed += 1
            place += size
        return freed

    def has_magic(self, uint64_t extent):
        """Return whether an extent has a magic where a record can begin; RARE (None)."""
        cdef const uint8_t *start
        cdef uint64_t place = 0
        if not self.is_open or not self.is_extent(extent):
            return RARE
        start = self.base + (extent << EXTENT_SHIFT)
        while place < EXTENT_SIZE and not is_magic(load(start + place)):
            place += BLOCK_ALIGNMENT
        return place < EXTENT_SIZE

    # --- lists of extents ------------------------------------------------------------------------

    @cython.final
    cdef inline bint is_extent(self, uint64_t extent) noexcept:
        """Return whether `Extents.check` would let a number pass."""
        return FIXED_EXTENTS <= extent < self.live[0] >> EXTENT_SHIFT

    @cython.final
    cdef inline bint has_neighbours(self, uint64_t extent) noexcept:
        cdef const uint8_t *entry = self.base + map_entry_of(extent)
        cdef uint64_t before = load_short(entry + SLAB_PREVIOUS_OFFSET)
        cdef uint64_t after = load_short(entry + SLAB_NEXT_OFFSET)
        return (before == NO_EXTENT or self.is_extent(before)) and (
            after == NO_EXTENT or self.is_extent(after)
        )

    @cython.final
    cdef inline void link(self, uint64_t extent, uint64_t size_class) noexcept:
        """As `Slab._link`."""
        cdef uint8_t *head = self.base + CLASS_HEADS_OFFSET + 2 * size_class
        cdef uint8_t *entry = self.base + map_entry_of(extent)
        cdef uint64_t after = load_short(head)
        store_short(entry + SLAB_PREVIOUS_OFFSET, NO_EXTENT)
        store_short(entry + SLAB_NEXT_OFFSET, after)
        if after != NO_EXTENT:
            store_short(self.base + map_entry_of(after) + SLAB_PREVIOUS_OFFSET, extent)
        store_short(head, extent)

    @cython.final
    cdef inline void unlink(self, uint64_t extent, uint64_t size_class) noexcept:
        """As `Slab._unlink`."""
        cdef uint8_t *entry = self.base + map_entry_of(extent)
        cdef uint64_t before = load_short(entry + SLAB_PREVIOUS_OFFSET)
        cdef uint64_t after = load_short(entry + SLAB_NEXT_OFFSET)
        if before == NO_EXTENT:
            store_short(self.base + CLASS_HEADS_OFFSET + 2 * size_class, after)
        else:
            store_short(self.base + map_entry_of(before) + SLAB_NEXT_OFFSET, after)
        if after != NO_EXTENT:
            store_short(self.base + map_entry_of(after) + SLAB_PREVIOUS_OFFSET, before)
