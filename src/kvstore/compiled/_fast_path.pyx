# cython: boundscheck=False, wraparound=False, cdivision=True, binding=False, auto_pickle=False
"""The common case of the operations on one key in C, or "do it in Python"; and locks that C sees.

A `FastPath` belongs to one store and works on the mapped bytes of its file. Each of its methods
either does the whole of an operation, or answers RARE (None) before it has stored a byte: whatever
is out of the ordinary is done by the Python code from the start. So nothing here is undone, and
nothing but a want of memory is raised. (By then a segment may have been split for it, or an extent
opened: each is whole by itself, and would be what the Python code does first.)

1. From the look at the locks until the last byte is stored or copied nothing of Python's runs, so
   the interpreter's lock is never let go of: no other thread, signal handler, finalizer or trace
   function comes in between. So no lock is taken; it is enough that nobody holds those that the
   Python code would take (a thread that waits for one has not begun). Garbage, which Python 3.11
   collects as it makes a tuple, is not collected meanwhile.
2. A thread that is inside an operation already is left to the Python code, which has the rules for
   calls from within: see `reentry`.
3. Bytes are stored in the order in which the Python code stores them (`keep_order`): a process that
   is killed in between leaves what recovery expects.
4. Whatever number is read from the file is compared with the file's size, or with how many there
   can be, before it is followed.

Offsets and sizes are constants of C that `tools/build_hot.py` made of `layout`, and that
`kvstore.compiled` compares with it.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_Clear
from cpython.pythread cimport (
    NOWAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_get_thread_ident,
    PyThread_release_lock,
    PyThread_type_lock,
)
from libc.math cimport isfinite
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset

import sys
from time import time_ns

from orjson import dumps
from xxhash import xxh3_64_intdigest

from kvstore.errors import StoreBusyError
from kvstore.format import codec, layout

include "layout_constants.pxi"
include "words.pxi"
include "members.pxi"
include "locks.pxi"
include "arguments.pxi"

# Where Python can do without its lock, importing this module switches that on, unless forbidden.
if hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled():
    raise ImportError(
        f"{__name__} relies on the interpreter's lock (GIL), which is switched off in this process"
    )

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) noexcept
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    bint PyUnicode_CheckExact(object o)
    bint PyLong_CheckExact(object o)
    bint PyFloat_CheckExact(object o)
    bint PyDict_CheckExact(object o)
    bint PyList_CheckExact(object o)
    bint PyTuple_CheckExact(object o)
    double PyFloat_AS_DOUBLE(object o)
    long long PyLong_AsLongLongAndOverflow(object o, int *overflow) except? -1
    bint PyGC_Disable() noexcept
    bint PyGC_Enable() noexcept

cdef enum:
    RECORD_SIZE_SHIFT = 32  # above what SLOT_RECORD_MASK covers

cdef object RARE = None
cdef object ABSENT = False
cdef object EXISTS = 0

cdef enum:
    MOST_PREFETCHED = 1024  # bytes; more than that the processor sees coming by itself

cdef uint64_t CLASS_COUNT = sizeof(BLOCK_SIZES) // sizeof(BLOCK_SIZES[0])
cdef uint64_t UNUSED_BITS = 64 - SHAPE_REWRITES_SHIFT  # those of the rewrites in a shape
cdef uint64_t first_record = FIXED_EXTENTS << EXTENT_SHIFT
cdef uint64_t rest_mask = ~(<uint64_t>0xFFFF << ENTRY_FIRST_FREE_SHIFT)
cdef long long most_seconds = codec.MAX_TTL_SECONDS
cdef int max_depth = codec.MAX_DEPTH
cdef object json_options = codec.JSON_OPTIONS
cdef object system_clock = time_ns


cdef struct Superseded:
    # The record that a new one of its key supersedes.
    uint64_t record
    uint64_t stamp
    bint is_fresh  # it is freed; else retired
    uint64_t entry  # if so, of its extent, before that
    uint64_t after  # and after it


cdef inline bint is_magic(uint64_t word) noexcept nogil:
    """Return whether a block that begins with this word has a record, retired or marked or not."""
    return <uint32_t>word == RECORD_MAGIC or <uint32_t>word == MARKED_MAGIC


cdef inline uint64_t full_entry(uint64_t size_class) noexcept nogil:
    """Return the upper half of an entry's first word where no block of its class is left."""
    return BLOCKS_PER_EXTENT[size_class] << ENTRY_FRESH_SHIFT - ENTRY_FIRST_FREE_SHIFT | NO_BLOCK


cdef inline uint64_t map_entry_of(uint64_t extent) noexcept nogil:
    """As `layout.map_entry_offset`."""
    return EXTENT_MAP_OFFSET + (extent << MAP_ENTRY_SHIFT)


cdef inline uint64_t control_of(uint64_t slot) noexcept nogil:
    """As `slots.control_offset_of`."""
    cdef uint64_t index = ((slot & BUCKET_SIZE - 1) - BUCKET_HEADER_SIZE) // SLOT_SIZE
    return (slot & ~(BUCKET_SIZE - 1)) + CONTROL_OFFSET + index


cdef inline uint64_t checksum_of(bytes value, uint64_t seed) except? 0:
    """As `layout.record_checksum`, of a value and the seed that is made of all else.

    Nothing of Python's runs: for a long value this calls a function of C, which may make a tuple,
    but does not let go of the interpreter's lock for so few bytes.
    """
    cdef uint64_t size = PyBytes_GET_SIZE(value)
    cdef bint collects
    if size <= MOST_HASHED:
        return xxh3(<const uint8_t *>PyBytes_AS_STRING(value), size, seed)
    collects = PyGC_Disable()
    try:
        return xxh3_64_intdigest(value, seed)  # without a copy, as `digest` would make
    finally:
        if collects:
            PyGC_Enable()


include "blocks.pxi"
include "growing.pxi"


# --- the operations ------------------------------------------------------------------------------


@cython.final
@cython.no_gc
cdef class FastPath(Growing):
    """The common case of the operations on one key of one open store.

    Args:
        mapped, live, spare, looked_at, versions: as for `Blocks`.
        stripes: the store's locks of keys.
        space: the space lock.
        hash_seed: of the file.
        shape: what the shapes of the file's buckets have in common: `buckets.wanted_shape`.
        clock: the names of `kvstore.clock`.
        fd: of the file; -1: the system is not asked for large pages.
    """

    cdef tuple stripes
    cdef uint64_t seed, shape, last_ms
    cdef dict clock
    cdef bint is_begun
    cdef bint awaits_extent  # nothing but an extent of its class was missing for a block

    def __cinit__(
        self,
        mapped,
        live,
        spare,
        looked_at,
        versions,
        tuple stripes not None,
        Lock space not None,
        uint64_t hash_seed,
        uint64_t shape,
        dict clock not None,
        int fd=-1,
    ):
        if len(stripes) != STRIPE_COUNT or set(map(type, stripes)) != {Lock}:
            raise TypeError(f"not the {STRIPE_COUNT} locks of a store")
        self.stripes, self.space, self.clock = stripes, space, clock
        self.seed, self.shape, self.last_ms = hash_seed, shape, clock["LAST_MS"]
        self.start_growing(fd)

    def begin(self):
        """Allow changes: the disk knows that the index is in flux."""
        self.is_begun = True

    def use_shape(self, uint64_t shape):
        """Go on with an index that was built anew: `shape` as for the constructor."""
        self.shape = shape

    cdef inline bint may_read(self, uint64_t key_hash) noexcept:
        """Return whether a key may be looked up now. Until Python runs, it stays so."""
        return (
            self.is_open
            and not is_inside_()
            and not (<Lock>self.stripes[key_hash >> STRIPE_SHIFT])._owner
        )

    cdef inline bint may_change(self, uint64_t key_hash) noexcept:
        """Likewise for changes that are stored here."""
        return (
            self.may_read(key_hash) and self.is_begun and self.live[1] and not self.space._owner
        )

    cdef inline uint64_t now_ms(self) except? 0:
        """As `clock.now_ms`. May run Python."""
        cdef int64_t now
        # The same clock without a call of Python, unless someone put another one in its place.
        if self.clock["time_ns"] is system_clock:
            now = read_system_clock()
            if 0 <= now <= <int64_t>self.last_ms:
                return <uint64_t>now
        return self.clock["now_ms"]()

    # --- looking up ------------------------------------------------------------------------------

    cdef int64_t find(self, uint64_t key_hash, const uint8_t *key, uint64_t size) noexcept:
        """As `slots.Slots.find`; 0 as well for whatever is damaged, or takes a second look."""
        cdef const uint8_t *memory = self.base
        cdef uint64_t position = key_hash >> DIRECTORY_SHIFT
        cdef uint64_t extent = load_short(memory + DIRECTORY_OFFSET + 2 * position)
        cdef uint64_t base = extent << EXTENT_SHIFT
        cdef uint64_t home = base | (key_hash & BUCKET_COUNT - 1) << BUCKET_SHIFT
        cdef uint64_t bucket = home, slot, tail, shape, depth, differing
        cdef int64_t vacant = 0
        cdef int fingerprint = FINGERPRINT_CODES[key_hash >> FINGERPRINT_SHIFT & 0xFF]
        cdef const uint8_t *control
        cdef const uint8_t *place
        if base + EXTENT_SIZE > self.live[0] or extent < FIXED_EXTENTS:
            return 0
        prefetch(memory + home + CONTROL_OFFSET + 64)
        shape = load(memory + home + SHAPE_OFFSET)
        depth = shape & SHAPE_DEPTH_MASK
        # But for the rewrites, and those bits of the prefix that are the segment's own.
        differing = (shape ^ (self.shape | position << SHAPE_PREFIX_SHIFT)) << UNUSED_BITS
        if depth - MIN_DEPTH > MAX_DEPTH - MIN_DEPTH or (
            differing >> UNUSED_BITS + SHAPE_PREFIX_SHIFT + DIRECTORY_BITS - depth
        ):
            return 0
        while True:
            control = memory + bucket + CONTROL_OFFSET
            prefetch(control + 64)
            if (
                load(memory + bucket) != (BUCKET_MARKER | bucket >> BUCKET_SHIFT)
                or load(memory + bucket + SHAPE_OFFSET) != shape
            ):
                return 0
            place = <const uint8_t *>memchr(control, fingerprint, SLOT_COUNT)
            while place is not NULL:
                slot = bucket + BUCKET_HEADER_SIZE + <uint64_t>(place - control) * SLOT_SIZE
                tail = load(memory + slot + SLOT_RECORD_OFFSET)
                if tail >> SLOT_KEY_SIZE_SHIFT == size:
                    prefetch(memory + (tail & SLOT_RECORD_MASK))  # harmless wherever it leads
                    prefetch(memory + (tail & SLOT_RECORD_MASK) + 64)
                    if not memcmp(memory + slot, key, min(size, SLOT_KEY_SIZE)):
                        return <int64_t>slot if self.has_rest(tail, key, size) else 0
                place += 1
                place = <const uint8_t *>memchr(place, fingerprint, SLOT_COUNT - (place - control))
            place = <const uint8_t *>memchr(control, CONTROL_EMPTY, SLOT_COUNT)
            if place is not NULL:
                slot = bucket + BUCKET_HEADER_SIZE + <uint64_t>(place - control) * SLOT_SIZE
                return vacant or -<int64_t>slot
            if not vacant:
                place = <const uint8_t *>memchr(control, CONTROL_TOMBSTONE, SLOT_COUNT)
                if place is not NULL:
                    slot = bucket + BUCKET_HEADER_SIZE + <uint64_t>(place - control) * SLOT_SIZE
                    vacant = -<int64_t>slot
            bucket = base | bucket + BUCKET_SIZE & EXTENT_SIZE - 1
            if bucket == home:
                return vacant

    cdef inline bint has_rest(self, uint64_t tail, const uint8_t *key, uint64_t size) noexcept:
        """Return whether a record has the end of a key that its slot has no room for."""
        cdef uint64_t offset = (tail & SLOT_RECORD_MASK) + RECORD_HEADER_SIZE
        return size <= SLOT_KEY_SIZE or (
            offset + size <= self.live[0] and not memcmp(self.base + offset, key, size)
        )

    cdef inline void expect(self, uint64_t key_hash) noexcept:
        """Have the processor fetch where a key is looked up next, while its value is encoded."""
        cdef const uint8_t *memory = self.base
        cdef uint64_t extent = load_short(memory + DIRECTORY_OFFSET + 2 * (key_hash >> DIRECTORY_SHIFT))
        cdef const uint8_t *bucket = memory + (
            extent << EXTENT_SHIFT | (key_hash & BUCKET_COUNT - 1) << BUCKET_SHIFT
        )
        prefetch(bucket)  # harmless, wherever a damaged directory leads
        prefetch(bucket + 64)
        prefetch(memory + map_entry_of(extent))

    cdef inline int64_t look_up(self, object key, uint64_t *key_hash, uint64_t *size) noexcept:
        """Return the slot of a key, a negative number where it is absent, 0 for RARE."""
        cdef const uint8_t *text = text_of(key, size)
        if text is NULL:
            return 0
        key_hash[0] = xxh3(text, size[0], self.seed)
        return self.find(key_hash[0], text, size[0]) if self.may_read(key_hash[0]) else 0

    def read_bytes(self, key):
        """Return the value of a key as JSON; ABSENT (False) or RARE (None)."""
        cdef uint64_t size = 0, key_hash = 0, expires_at
        cdef int64_t slot = self.look_up(key, &key_hash, &size)
        cdef bytes value
        if slot <= 0:
            return ABSENT if slot else RARE
        expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET)
        value = self.value_in(slot, key_hash, size)
        # Last, for it may run Python.
        if value is not None and expires_at and expires_at <= self.now_ms():
            return RARE
        return value

    def read_record(self, bytes key not None, uint64_t now_ms):
        """Return value, stamp and expires_at of a key not expired by `now_ms`; ABSENT or RARE."""
        cdef uint64_t size = PyBytes_GET_SIZE(key), key_hash, expires_at, stamp
        cdef const uint8_t *text = <const uint8_t *>PyBytes_AS_STRING(key)
        cdef int64_t slot
        cdef bytes value
        if not 0 < size <= MAX_KEY_SIZE:
            return RARE
        key_hash = xxh3(text, size, self.seed)
        slot = self.find(key_hash, text, size) if self.may_read(key_hash) else 0
        if slot <= 0:
            return ABSENT if slot else RARE
        value = self.value_in(slot, key_hash, size)
        expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET)
        if value is None or 0 < expires_at <= now_ms:
            return RARE
        stamp = load(
            self.base
            + (load(self.base + slot + SLOT_RECORD_OFFSET) & SLOT_RECORD_MASK)
            + RECORD_STAMP_OFFSET
        )
        return value, stamp, expires_at

    cdef inline bytes value_in(self, uint64_t slot, uint64_t key_hash, uint64_t key_size):
        """Return the value of the key in a live slot, be it expired or not; None where damaged."""
        cdef uint64_t expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET)
        cdef uint64_t tail = load(self.base + slot + SLOT_RECORD_OFFSET)
        cdef uint64_t offset = tail & SLOT_RECORD_MASK
        cdef uint64_t start = offset + RECORD_HEADER_SIZE + key_size
        cdef uint64_t value_size = tail >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF, line
        cdef uint64_t header[4]
        cdef bytes value
        if (
            start + value_size > self.live[0]
            or offset < first_record
            or not value_size  # what is empty would seem ABSENT
        ):
            return None
        for line in range(64, min(value_size, <uint64_t>MOST_PREFETCHED), 64):
            prefetch(self.base + offset + line)
        memcpy(header, self.base + offset, RECORD_HEADER_SIZE)
        value = PyBytes_FromStringAndSize(<const char *>self.base + start, value_size)
        if (
            header[0] != (tail ^ offset | RECORD_MAGIC)
            or header[2] != expires_at
            or header[3] != checksum_of(value, seed_of(key_hash, header[1], expires_at, offset))
        ):
            return None
        return value

    def expiry(self, key):
        """Return whether a key is there: False, True, or (expires_at, the time now); RARE (None)."""
        cdef uint64_t size = 0, key_hash = 0, expires_at, offset, now_ms
        cdef int64_t slot = self.look_up(key, &key_hash, &size)
        if slot <= 0:
            return ABSENT if slot else RARE
        expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET)
        offset = load(self.base + slot + SLOT_RECORD_OFFSET) & SLOT_RECORD_MASK
        if (
            offset + RECORD_HEADER_SIZE > self.live[0]
            or load(self.base + offset + RECORD_EXPIRES_OFFSET) != expires_at
        ):
            return RARE
        if not expires_at:
            return True
        now_ms = self.now_ms()
        return RARE if expires_at <= now_ms else (expires_at, now_ms)

    # --- storing ---------------------------------------------------------------------------------

    def create(self, key, value, ttl=None):
        """Create a key; return where its record is, EXISTS (0), or RARE.

        That is its offset, with its size in the bits above SLOT_RECORD_MASK. RARE is None, or the
        value as JSON where that was made already.
        """
        return self.store_value(key, value, ttl, False)

    def put(self, key, value, ttl=None):
        """Create a key, or replace its record, expired or not; return as `create`, never EXISTS."""
        return self.store_value(key, value, ttl, True)

    cdef inline object store_value(self, object key, object value, object ttl, bint replaces):
        cdef uint64_t size = 0, key_hash, now_ms
        cdef const uint8_t *text = text_of(key, &size)
        cdef int64_t lifetime = lifetime_of(ttl)
        cdef bytes encoded
        if text is NULL or lifetime < 0 or not self.is_open:
            return RARE
        key_hash = xxh3(text, size, self.seed)
        self.expect(key_hash)
        encoded = json_of(value)
        if encoded is None:
            return RARE
        now_ms = self.now_ms()
        if not self.may_change(key_hash):
            return encoded
        return self.store_record(
            self.find(key_hash, text, size),
            key_hash,
            text,
            size,
            encoded,
            0,
            now_ms + lifetime if lifetime else 0,
            now_ms,
            replaces,
        )

    def touch(self, key, ttl=None):
        """Replace a record by one of the same value and another expiry; as `put`, or ABSENT (False)."""
        cdef uint64_t size = 0, key_hash, expires_at, now_ms
        cdef const uint8_t *text = text_of(key, &size)
        cdef int64_t lifetime = lifetime_of(ttl), slot
        cdef bytes value
        if text is NULL or lifetime < 0:
            return RARE
        key_hash = xxh3(text, size, self.seed)
        now_ms = self.now_ms()
        if not self.may_change(key_hash):
            return RARE
        slot = self.find(key_hash, text, size)
        if slot <= 0:
            return ABSENT if slot else RARE
        value = self.value_in(slot, key_hash, size)
        expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET)
        if value is None or (expires_at and expires_at <= now_ms):
            return RARE
        expires_at = now_ms + lifetime if lifetime else 0
        stored = self.store_record(
            slot, key_hash, text, size, value, 0, expires_at, now_ms, True
        )
        return RARE if stored is value else stored

    def create_under_locks(
        self,
        bytes key not None,
        bytes encoded not None,
        uint64_t stamp,
        uint64_t expires_at,
        uint64_t now_ms,
        bint replaces,
    ):
        """Create a key whose stripe the caller holds; RARE, or 0 where its class has no extent.

        Or replace its record, if `replaces`. The stamp 0 stands for the next one.

        Returns:
            As `create`. Where the file is written by calls, and the caller holds the space lock:
            what is to be done, as (slot, record, changes). A change is an offset, and
            the bytes to be there and those that are there (none for a record's). First comes the
            block's entry, then the record but for its magic, ..., and last the magic. Between them,
            of a new key: the slot, earliest expiries, entry and control byte of the segment; of one
            that is there: earliest expiries, the last 16 bytes of its slot. What becomes of the
            record before is left to the caller.
        """
        cdef uint64_t size = PyBytes_GET_SIZE(key), key_hash
        cdef const uint8_t *text = <const uint8_t *>PyBytes_AS_STRING(key)
        cdef bint collects
        if size > MAX_KEY_SIZE or <uint64_t>PyBytes_GET_SIZE(encoded) > MAX_VALUE_SIZE:
            return RARE
        self.awaits_extent = False
        collects = PyGC_Disable()
        try:
            if not self.begin_under_locks():
                return RARE
            key_hash = xxh3(text, size, self.seed)
            stored = self.store_record(
                self.find(key_hash, text, size),
                key_hash,
                text,
                size,
                encoded,
                stamp,
                expires_at,
                now_ms,
                replaces,
            )
            if stored is EXISTS or stored is encoded:
                return 0 if self.awaits_extent else RARE
            return stored
        finally:
            self.plan = None
            if collects:
                PyGC_Enable()

    cdef bint begin_under_locks(self) except -1:
        """Return whether changes may be stored here; plan them where they are written by calls.

        A caller that does not hold the space lock cannot carry out a plan.
        """
        if not self.is_open or not self.is_begun:
            return False
        if self.live[1]:
            return not self.space._owner
        if self.space._owner != PyThread_get_thread_ident():
            return False
        self.plan = []
        return True

    cdef object store_record(
        self,
        int64_t found,
        uint64_t key_hash,
        const uint8_t *key,
        uint64_t key_size,
        bytes encoded,
        uint64_t stamp,
        uint64_t expires_at,
        uint64_t now_ms,
        bint replaces,
    ):
        """Create a key for which `find` gave `found`, or replace its record. RARE is `encoded`."""
        cdef uint64_t value_size = PyBytes_GET_SIZE(encoded)
        cdef uint64_t size = RECORD_HEADER_SIZE + key_size + value_size
        cdef uint64_t size_class = SIZE_CLASSES[size + BLOCK_ALIGNMENT - 1 >> BLOCK_SHIFT]
        cdef uint64_t slot = <uint64_t>(found if found > 0 else -found)
        cdef uint64_t entry_offset = map_entry_of(slot >> EXTENT_SHIFT)
        cdef uint64_t stripe = key_hash >> STRIPE_SHIFT
        cdef uint64_t flags = 0, entry = 0, after = 0, used, record, checksum, tail, earliest
        cdef bint is_first_use  # of the block, since its extent was opened
        cdef Superseded old
        cdef uint8_t control
        cdef uint8_t image[48]
        old.stamp = 0
        if found > 0:
            if not replaces:
                earliest = load(self.base + slot + SLOT_EXPIRES_OFFSET)
                return encoded if earliest and earliest <= now_ms else EXISTS
            tail = load(self.base + slot + SLOT_RECORD_OFFSET)
            # Harmless, wherever it leads.
            prefetch(self.base + map_entry_of((tail & SLOT_RECORD_MASK) >> EXTENT_SHIFT))
        else:
            entry = load(self.base + entry_offset)
            used = entry >> ENTRY_USED_SHIFT & 0xFFFF
            if not found or used > SPLIT_AT:
                return encoded
            if used == SPLIT_AT:
                if not self.split(key_hash, now_ms, self.seed, self.shape):
                    return encoded
                found = self.find(key_hash, key, key_size)
                if found >= 0:
                    return encoded
                slot = <uint64_t>-found
                entry_offset = map_entry_of(slot >> EXTENT_SHIFT)
                entry = load(self.base + entry_offset)
        record = self.next_block(size_class, &after)
        if not record and self.open_extent(size_class):
            record = self.next_block(size_class, &after)
        if not record:
            self.awaits_extent = not load_short(self.base + CLASS_HEADS_OFFSET + 2 * size_class)
            return encoded
        if found > 0:
            if stamp or not self.may_supersede(&old, stripe, tail, key, key_size, record, after):
                return encoded
            flags = tail & SLOT_FLAGS | (0 if old.is_fresh else SLOT_OLDER)
        if not stamp:
            stamp = self.next_stamp(stripe, now_ms, old.stamp)
            if not stamp:
                return encoded
        checksum = checksum_of(encoded, seed_of(key_hash, stamp, expires_at, record))
        is_first_use = (
            load(self.base + map_entry_of(record >> EXTENT_SHIFT)) ^ after
        ) >> ENTRY_FRESH_SHIFT != 0
        # Nothing was stored so far, and from here on all is.
        if not self.take_block(record >> EXTENT_SHIFT, size_class, after):
            return encoded
        self.versions[LAST_STAMPS + stripe] = max(stamp, self.versions[LAST_STAMPS + stripe])
        if self.plan is None:
            if is_first_use and size > LEAST_LARGE:
                self.bring_in_block(record, BLOCK_SIZES[size_class])
            self.write_record(
                self.base + record, key, key_size, encoded, stamp, expires_at, checksum
            )
            keep_order()
        else:
            whole = PyBytes_FromStringAndSize(NULL, size)
            self.write_record(
                <uint8_t *>PyBytes_AS_STRING(whole),
                key, key_size, encoded, stamp, expires_at, checksum,
            )
            self.plan.append((record + RECORD_MAGIC_SIZE, whole[RECORD_MAGIC_SIZE:], b""))
        store(image + SLOT_EXPIRES_OFFSET, expires_at)
        store(
            image + SLOT_RECORD_OFFSET,
            record
            | flags
            | value_size << SLOT_VALUE_SIZE_SHIFT
            | key_size << SLOT_KEY_SIZE_SHIFT,
        )
        if found < 0:
            memset(image, 0, SLOT_KEY_SIZE)
            memcpy(image, key, min(key_size, SLOT_KEY_SIZE))
            self.write(slot, image, SLOT_SIZE)
        if expires_at:
            earliest = (slot & ~(BUCKET_SIZE - 1)) + EARLIEST_OFFSET
            if expires_at < load(self.base + earliest):
                self.write(earliest, &expires_at, 8)
            earliest = entry_offset + SEGMENT_EARLIEST_OFFSET
            if expires_at < load(self.base + earliest):
                self.write(earliest, &expires_at, 8)
        if found > 0:
            self.write(
                slot + SLOT_EXPIRES_OFFSET,
                image + SLOT_EXPIRES_OFFSET,
                SLOT_SIZE - SLOT_EXPIRES_OFFSET,
            )
        else:
            control = self.base[control_of(slot)]
            entry += ENTRY_LIVE_ONE + (0 if control else ENTRY_USED_ONE)
            self.write(entry_offset, &entry, 8)
            control = FINGERPRINT_CODES[key_hash >> FINGERPRINT_SHIFT & 0xFF]
            # Last: until it is stored, a reader ignores the slot.
            self.write(control_of(slot), &control, 1)
        if self.plan is not None:
            self.plan.append((record, layout.RECORD_MAGIC_BYTES, b""))
            return slot, record, self.plan
        if found > 0:
            if old.is_fresh:
                self.free_(old.record, old.entry, old.after)
            else:
                self.retire(old.record, RECORD_MAGIC)
        elif size <= LEAST_LARGE:
            self.prepare()
        return record | size << RECORD_SIZE_SHIFT

    cdef inline uint64_t next_stamp(
        self, uint64_t stripe, uint64_t now_ms, uint64_t older_than
    ) noexcept:
        """As `Versions.next_stamp`, but 0 where there is none, and it is not taken yet."""
        cdef uint64_t newest = max(self.versions[LAST_STAMPS + stripe], older_than)
        cdef uint64_t stamp = max(now_ms << STAMP_SHIFT, newest + 1)
        return stamp if newest < stamp < STAMP_LIMIT else 0

    cdef inline bint may_supersede(
        self,
        Superseded *old,
        uint64_t stripe,
        uint64_t tail,
        const uint8_t *key,
        uint64_t key_size,
        uint64_t record,
        uint64_t taken,
    ) noexcept:
        """Return whether a key's record can be superseded by one at `record`; set `old`.

        It is the one that `tail`, the last word of the key's slot, leads to. `taken` is the first
        word of the entry of the new record's extent once its block is taken.
        """
        cdef uint64_t extent
        old.record = tail & SLOT_RECORD_MASK
        if not self.contains_record_of(tail, key, key_size) or not self.may_retire(old.record):
            return False
        extent = old.record >> EXTENT_SHIFT
        old.stamp = load(self.base + old.record + RECORD_STAMP_OFFSET)
        if old.stamp > self.versions[LAST_STAMPS + stripe]:
            return False  # damaged
        old.is_fresh = (
            self.plan is None
            and old.stamp > self.versions[PROMISED_STAMPS + stripe]
            and not tail & SLOT_OLDER_UNDATED
            and not self.versions[ALWAYS_PROMISED_WORD]
        )
        if not old.is_fresh:
            return True
        old.entry = load(self.base + map_entry_of(extent))
        if extent == record >> EXTENT_SHIFT:
            old.entry = taken
        self.awaits_spare = False
        # A spare that a block is about to be taken from is none any more.
        return self.may_free(old.record, old.entry, &old.after) or (
            self.awaits_spare and self.spare[0] == record >> EXTENT_SHIFT
        )

    cdef inline void write_record(
        self,
        uint8_t *place,
        const uint8_t *key,
        uint64_t key_size,
        bytes encoded,
        uint64_t stamp,
        uint64_t expires_at,
        uint64_t checksum,
    ) noexcept:
        cdef uint64_t value_size = PyBytes_GET_SIZE(encoded)
        store(
            place,
            RECORD_MAGIC | value_size << SLOT_VALUE_SIZE_SHIFT | key_size << SLOT_KEY_SIZE_SHIFT,
        )
        store(place + RECORD_STAMP_OFFSET, stamp)
        store(place + RECORD_EXPIRES_OFFSET, expires_at)
        store(place + RECORD_CHECKSUM_OFFSET, checksum)
        memcpy(place + RECORD_HEADER_SIZE, key, key_size)
        memcpy(place + RECORD_HEADER_SIZE + key_size, PyBytes_AS_STRING(encoded), value_size)

    # --- moving ----------------------------------------------------------------------------------

    def move(self, uint64_t place, long most):
        """Move the records of a slab extent from the block at `place` on to others of its class.

        As `Changes.move` does, `most` of them at the most. The caller has marked the file dirty,
        and holds no stripe but one that keeps the store open.

        Returns:
            Where it stopped: at the end of the extent, or at the block that is next. Where that is
            `place`, that block is for Python to move.
        """
        cdef uint64_t extent = place >> EXTENT_SHIFT, entry, size_class, end, word
        if (
            not self.is_open
            or not self.live[1]
            or self.space._owner
            or not self.is_extent(extent)
        ):
            return place
        entry = load(self.base + map_entry_of(extent))
        size_class = entry >> ENTRY_CLASS_SHIFT & 0xFF
        if (
            entry & ENTRY_KIND_MASK != KIND_SLAB
            or size_class >= CLASS_COUNT
            or (place & EXTENT_SIZE - 1) % BLOCK_SIZES[size_class]
        ):
            return place
        end = extent << EXTENT_SHIFT
        end += min(entry >> ENTRY_FRESH_SHIFT, BLOCKS_PER_EXTENT[size_class]) * BLOCK_SIZES[size_class]
        while place < end:
            word = load(self.base + place)
            if <uint32_t>word == RECORD_MAGIC and not word >> GENERATION_SHIFT:
                if most <= 0 or not self.move_(place, size_class):
                    return place
                most -= 1
            place += BLOCK_SIZES[size_class]
        return (extent + 1) << EXTENT_SHIFT

    cdef bint move_(self, uint64_t record, uint64_t size_class) except -1:
        """Move one record; False for RARE."""
        cdef const uint8_t *key = self.base + record + RECORD_HEADER_SIZE
        cdef uint64_t word = load(self.base + record)
        cdef uint64_t key_size = word >> SLOT_KEY_SIZE_SHIFT & 0xFF
        cdef uint64_t key_hash, stripe, tail, flags, copy, checksum, expires_at, after = 0
        cdef int64_t slot
        cdef Superseded old
        cdef bytes value
        cdef uint8_t image[16]
        old.stamp = 0
        if not 0 < key_size <= MAX_KEY_SIZE:
            return False
        key_hash = xxh3(key, key_size, self.seed)
        stripe = key_hash >> STRIPE_SHIFT
        if (<Lock>self.stripes[stripe])._owner:
            return False
        slot = self.find(key_hash, key, key_size)
        if slot <= 0:
            return False
        tail = load(self.base + slot + SLOT_RECORD_OFFSET)
        if tail & SLOT_RECORD_MASK != record:
            return False
        value = self.value_in(slot, key_hash, key_size)
        copy = self.next_block(size_class, &after)
        if (
            value is None
            or not copy
            or copy >> EXTENT_SHIFT == record >> EXTENT_SHIFT
            or not self.may_supersede(&old, stripe, tail, key, key_size, copy, after)
        ):
            return False
        expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET)
        checksum = checksum_of(value, seed_of(key_hash, old.stamp, expires_at, copy))
        # Nothing was stored so far, and from here on all is.
        if not self.take_block(copy >> EXTENT_SHIFT, size_class, after):
            return False
        self.write_record(
            self.base + copy, key, key_size, value, old.stamp, expires_at, checksum
        )
        keep_order()
        flags = tail & SLOT_FLAGS
        if not old.is_fresh:
            flags |= SLOT_OLDER
            if old.stamp <= self.versions[SETTLED_STAMPS + stripe]:
                self.versions[SETTLED_STAMPS + stripe] = max(old.stamp, <uint64_t>1) - 1
        store(image, expires_at)
        store(image + 8, (tail & ~<uint64_t>(SLOT_RECORD_MASK | SLOT_FLAGS)) | copy | flags)
        self.write(slot + SLOT_EXPIRES_OFFSET, image, 16)
        if old.is_fresh:
            self.free_(old.record, old.entry, old.after)
        else:
            self.retire(old.record, RECORD_MAGIC)
        return True

    # --- deleting --------------------------------------------------------------------------------

    def delete(self, key):
        """Delete a key; return True, ABSENT (False) or RARE (None)."""
        cdef uint64_t size = 0, key_hash, expires_at, now_ms
        cdef const uint8_t *text = text_of(key, &size)
        cdef int64_t slot
        if text is NULL:
            return RARE
        key_hash = xxh3(text, size, self.seed)
        if not self.may_change(key_hash):
            return RARE
        slot = self.find(key_hash, text, size)
        if slot > 0 and load(self.base + slot + SLOT_EXPIRES_OFFSET):
            now_ms = self.now_ms()
            # That may have run Python.
            if not self.may_change(key_hash):
                return RARE
            slot = self.find(key_hash, text, size)
            expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET) if slot > 0 else 0
            if expires_at and expires_at <= now_ms:
                return RARE
        if slot <= 0:
            return ABSENT if slot else RARE
        return True if self.delete_(slot, text, size) else RARE

    def pop(self, key):
        """Delete a key and return its value as JSON; ABSENT (False) or RARE (None)."""
        cdef uint64_t size = 0, key_hash, expires_at, now_ms
        cdef const uint8_t *text = text_of(key, &size)
        cdef int64_t slot
        cdef bytes value
        if text is NULL:
            return RARE
        key_hash = xxh3(text, size, self.seed)
        now_ms = self.now_ms()
        if not self.may_change(key_hash):
            return RARE
        slot = self.find(key_hash, text, size)
        if slot <= 0:
            return ABSENT if slot else RARE
        value = self.value_in(slot, key_hash, size)
        expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET)
        if (
            value is None
            or (expires_at and expires_at <= now_ms)
            or not self.delete_(slot, text, size)
        ):
            return RARE
        return value

    def delete_slot(self, uint64_t slot, bytes key not None):
        """Delete the key that is in a live slot; True or RARE (None). The caller holds its stripe."""
        if (
            not self.is_open
            or not self.live[1]
            or self.space._owner
            or slot > self.live[0] - SLOT_SIZE
            or slot & BUCKET_SIZE - 1 < BUCKET_HEADER_SIZE
        ):
            return RARE
        return True if self.delete_(
            slot, <const uint8_t *>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key)
        ) else RARE

    def delete_under_locks(self, bytes key not None, uint64_t now_ms):
        """Delete a key whose stripe the caller holds; RARE, or 0 where the spare must go first.

        Returns:
            The offset of its record. Where the file is written by calls, and the caller holds the
            space lock: what is to be done, as (slot, record, changes): control byte and entry of the
            segment, entry and block of the slab.
        """
        cdef uint64_t size = PyBytes_GET_SIZE(key), expires_at, record
        cdef const uint8_t *text = <const uint8_t *>PyBytes_AS_STRING(key)
        cdef int64_t slot
        cdef bint collects = PyGC_Disable()
        try:
            if not self.begin_under_locks():
                return RARE
            slot = self.find(xxh3(text, size, self.seed), text, size)
            if slot <= 0:
                return RARE
            expires_at = load(self.base + slot + SLOT_EXPIRES_OFFSET)
            if expires_at and expires_at <= now_ms:
                return RARE
            record = load(self.base + slot + SLOT_RECORD_OFFSET) & SLOT_RECORD_MASK
            self.awaits_spare = False
            if not self.delete_(slot, text, size):
                return 0 if self.awaits_spare else RARE
            return record if self.plan is None else (slot, record, self.plan)
        finally:
            self.plan = None
            if collects:
                PyGC_Enable()

    cdef bint delete_(self, uint64_t slot, const uint8_t *key, uint64_t key_size) except -1:
        """Delete the key in a live slot; False for RARE."""
        cdef uint8_t *base = self.base
        cdef uint64_t tail = load(base + slot + SLOT_RECORD_OFFSET)
        cdef uint64_t record = tail & SLOT_RECORD_MASK
        cdef uint64_t entry_offset = map_entry_of(slot >> EXTENT_SHIFT)
        cdef uint64_t entry = load(base + entry_offset), taken = ENTRY_LIVE_ONE
        cdef uint8_t control = CONTROL_TOMBSTONE
        cdef uint64_t slab = 0, after = 0
        cdef bint has_older
        if memchr(base + (slot & ~(BUCKET_SIZE - 1)) + CONTROL_OFFSET, CONTROL_EMPTY, SLOT_COUNT):
            control, taken = CONTROL_EMPTY, ENTRY_LIVE_ONE + ENTRY_USED_ONE
        if entry < taken or not self.contains_record_of(tail, key, key_size):
            return False
        has_older = tail & SLOT_FLAGS and self.may_have_older(tail, key, key_size)
        if has_older:
            if not self.may_mark(slot, record, key, key_size):
                return False
        else:
            slab = load(base + map_entry_of(record >> EXTENT_SHIFT))
            if not self.may_free(record, slab, &after):
                return False
        entry -= taken
        self.write(control_of(slot), &control, 1)
        self.write(entry_offset, &entry, 8)
        if has_older:
            self.retire(record, MARKED_MAGIC)
        else:
            self.free_(record, slab, after)
        return True

    cdef bint may_have_older(self, uint64_t tail, const uint8_t *key, uint64_t key_size) noexcept:
        """As `Versions.may_have_older`, of a slot with flags whose record is there."""
        cdef uint64_t stamp = load(self.base + (tail & SLOT_RECORD_MASK) + RECORD_STAMP_OFFSET)
        cdef uint64_t stripe = xxh3(key, key_size, self.seed) >> STRIPE_SHIFT
        return tail & SLOT_OLDER_UNDATED or stamp > self.versions[SETTLED_STAMPS + stripe]

    cdef bint may_mark(
        self, uint64_t slot, uint64_t record, const uint8_t *key, uint64_t key_size
    ) except -1:
        """Return whether a record can be marked here: it outranks older ones only if it is whole."""
        return (
            self.plan is None
            and self.may_retire(record)
            and self.value_in(slot, xxh3(key, key_size, self.seed), key_size) is not None
        )

    # --- many keys -------------------------------------------------------------------------------

    def read_many(self, keys, dict found not None, parse, rare):
        """Read a group of keys into `found`; return whether there may be more: see "batches"."""
        return read_group(self, keys, found, parse, rare)

    def put_many(self, pairs, ttl, written, rare):
        """Put a group of pairs; return whether there may be more: see "batches"."""
        return put_group(self, pairs, ttl, written, rare)

    def delete_many(self, keys, rare):
        """Delete a group of keys; return how many, and whether there may be more."""
        return delete_group(self, keys, rare)


include "batches.pxi"


cdef inline uint64_t seed_of(
    uint64_t key_hash, uint64_t stamp, uint64_t expires_at, uint64_t offset
) noexcept:
    """Return the seed of a record's checksum: see `layout`, "Slab"."""
    return key_hash ^ stamp ^ expires_at << EXPIRY_SEED_SHIFT ^ offset
