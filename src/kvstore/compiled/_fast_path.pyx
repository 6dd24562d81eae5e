# cython: boundscheck=False, wraparound=False, cdivision=True, binding=False, auto_pickle=False
"""The common case of the operations on one key in C, or "do it in Python"; and locks that C sees.

A `FastPath` belongs to one store and works on the mapped bytes of its file. Each of its methods
either does the whole of an operation, or answers RARE (None) before it has stored a byte: whatever
is out of the ordinary is done by the Python code from the start. So nothing here is undone, and
nothing but a want of memory is raised.

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
include "locks.pxi"

# Where Python can do without its lock, importing this module switches that on, unless forbidden.
if hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled():
    raise ImportError(
        f"{__name__} relies on the interpreter's lock (GIL), which is switched off in this process"
    )

cdef extern from *:
    """
    #if defined(__GNUC__)
    #define KVSTORE_PREFETCH(address) __builtin_prefetch(address)
    #define KVSTORE_KEEP_ORDER() __asm__ __volatile__("" ::: "memory")
    #else
    #define KVSTORE_PREFETCH(address) ((void)(address))
    #if defined(_MSC_VER)
    #include <intrin.h>
    #define KVSTORE_KEEP_ORDER() _ReadWriteBarrier()
    #else
    #define KVSTORE_KEEP_ORDER() ((void)0)
    #endif
    #endif
    """
    void prefetch "KVSTORE_PREFETCH"(const void *address) noexcept nogil
    # What was stored before it is stored before what follows: a process may be killed in between,
    # and nothing else would keep a compiler from exchanging the two.
    void keep_order "KVSTORE_KEEP_ORDER"() noexcept nogil

cdef extern from *:
    """
    #include <time.h>
    static int64_t kvstore_read_system_clock(void) {
    #if defined(CLOCK_REALTIME)
        struct timespec now;
        if (!clock_gettime(CLOCK_REALTIME, &now))
            return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    #endif
        return -1;
    }
    """
    # Milliseconds since 1970; a negative number where only Python knows them.
    int64_t read_system_clock "kvstore_read_system_clock"() noexcept nogil

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


# --- keys and values -----------------------------------------------------------------------------

cdef inline const uint8_t *text_of(object key, uint64_t *size) noexcept:
    """Return the UTF-8 of a key and set its size in bytes; NULL for what `encode_key` must see."""
    cdef Py_ssize_t length
    cdef const char *text
    if not PyUnicode_CheckExact(key) or not 0 < PyUnicode_GET_LENGTH(key) <= <Py_ssize_t>MAX_KEY_CHARACTERS:
        return NULL
    text = PyUnicode_AsUTF8AndSize(key, &length)
    if text is NULL:
        PyErr_Clear()  # a lone surrogate
    size[0] = length
    return <const uint8_t *>text


cdef inline int64_t lifetime_of(object ttl) except -1:
    """Return a time-to-live in ms, 0 for None; -2 for what `check_ttl` must see."""
    cdef int overflow = 0
    cdef long long seconds
    if ttl is None:
        return 0
    if PyLong_CheckExact(ttl):
        seconds = PyLong_AsLongLongAndOverflow(ttl, &overflow)
        if not overflow and 1 <= seconds <= most_seconds:
            return seconds * 1000
    return -2


cdef bytes json_of(object value):
    """Return a value as JSON; None for one that `encode_value` must see."""
    cdef bytes encoded
    if PyDict_CheckExact(value) and is_plain_json(value, 1):
        try:
            encoded = dumps(value, None, json_options)
        except (TypeError, RecursionError):
            return None
        if <uint64_t>PyBytes_GET_SIZE(encoded) <= MAX_VALUE_SIZE:
            return encoded
    return None


cdef bint is_plain_json(object container, int depth) noexcept:
    """Return whether `codec` would walk through a container's members without a halt."""
    if PyDict_CheckExact(container):
        for member in (<dict>container).values():
            if not is_plain_member(member, depth):
                return False
    elif PyList_CheckExact(container):
        for member in <list>container:
            if not is_plain_member(member, depth):
                return False
    else:
        for member in <tuple>container:
            if not is_plain_member(member, depth):
                return False
    return True


cdef inline bint is_plain_member(object member, int depth) noexcept:
    if (
        PyUnicode_CheckExact(member)
        or PyLong_CheckExact(member)
        or member is None
        or member is True
        or member is False
    ):
        return True
    if PyFloat_CheckExact(member):
        return isfinite(PyFloat_AS_DOUBLE(member)) != 0
    if PyDict_CheckExact(member) or PyList_CheckExact(member) or PyTuple_CheckExact(member):
        return depth < max_depth and is_plain_json(member, depth + 1)
    return False


# --- the operations ------------------------------------------------------------------------------


@cython.final
@cython.no_gc
cdef class FastPath:
    """The common case of the operations on one key of one open store.

    Args:
        mapped: the mapped file. It cannot be unmapped before `close`.
        live: of the data file, two words: how many of its bytes may be touched, and whether changes
            are stored through the map.
        spare: of the slab, one word: the extent that is its spare.
        looked_at: of the slab, a byte for each extent: whether it was looked at.
        versions: the words of the store's `Versions`.
        stripes: the store's locks of keys.
        space: the space lock.
        hash_seed: of the file.
        shape: what the shapes of the file's buckets have in common: `buckets.wanted_shape`.
        clock: the names of `kvstore.clock`.
    """

    cdef Py_buffer map_view, live_view, spare_view, looked_at_view, versions_view
    cdef uint8_t *base
    cdef const uint64_t *live
    cdef uint64_t *spare
    cdef const uint8_t *looked_at
    cdef uint64_t *versions
    cdef tuple stripes
    cdef Lock space
    cdef uint64_t seed, shape, last_ms
    cdef dict clock
    cdef bint is_begun
    cdef bint is_open
    cdef bint awaits_extent  # nothing but an extent of its class was missing for a block
    cdef bint awaits_spare  # nothing but the spare kept a block from being freed
    # Where changes go that are not to be stored here: see `begin_under_locks`.
    cdef list plan

    def __cinit__(
        self,
        mapped,
        live,
        spare,
        bytearray looked_at not None,
        versions,
        tuple stripes not None,
        Lock space not None,
        uint64_t hash_seed,
        uint64_t shape,
        dict clock not None,
    ):
        cdef Py_buffer view
        if len(stripes) != STRIPE_COUNT or not all(type(stripe) is Lock for stripe in stripes):
            raise TypeError(f"not the {STRIPE_COUNT} locks of a store")
        if len(looked_at) != EXTENT_MAP_ENTRIES:
            raise ValueError(f"not a byte for each of {EXTENT_MAP_ENTRIES:,} extents")
        self.stripes, self.space, self.clock = stripes, space, clock
        self.seed, self.shape, self.last_ms = hash_seed, shape, clock["LAST_MS"]
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
        """Replace a record by one with the same value and another expiry; as `put`, or ABSENT (False)."""
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
            that is there: the last 16 bytes of its slot, earliest expiries. What becomes of the
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
        cdef uint64_t flags = 0, entry = 0, after = 0, record, checksum, tail, earliest
        cdef Superseded old
        cdef uint8_t control
        cdef uint8_t image[48]
        old.stamp = 0
        if found > 0:
            if not replaces:
                earliest = load(self.base + slot + SLOT_EXPIRES_OFFSET)
                return encoded if earliest and earliest <= now_ms else EXISTS
            tail = load(self.base + slot + SLOT_RECORD_OFFSET)
            prefetch(self.base + map_entry_of((tail & SLOT_RECORD_MASK) >> EXTENT_SHIFT))  # harmless
        else:
            entry = load(self.base + entry_offset)
            if not found or (entry >> ENTRY_USED_SHIFT & 0xFFFF) >= SPLIT_AT:
                return encoded
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
        # Nothing was stored so far, and from here on all is.
        if not self.take_block(record >> EXTENT_SHIFT, size_class, after):
            return encoded
        self.versions[LAST_STAMPS + stripe] = max(stamp, self.versions[LAST_STAMPS + stripe])
        if self.plan is None:
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
        if found > 0:
            self.write(
                slot + SLOT_EXPIRES_OFFSET,
                image + SLOT_EXPIRES_OFFSET,
                SLOT_SIZE - SLOT_EXPIRES_OFFSET,
            )
        else:
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
        if found < 0:
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
        """Return whether a key's record can be superseded by one at `record`; tell what becomes of it.

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

    cdef bint contains_record_of(self, uint64_t tail, const uint8_t *key, uint64_t size) noexcept:
        """As `Slab.contains_record_of`."""
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

    cdef inline bint may_retire(self, uint64_t record) noexcept:
        """Return whether a block that `contains_record_of` was true of can be retired here."""
        cdef const uint8_t *place = self.base + map_entry_of(record >> EXTENT_SHIFT)
        cdef uint64_t entry = load(place)
        cdef uint64_t size = BLOCK_SIZES[entry >> ENTRY_CLASS_SHIFT & 0xFF]
        return (
            record & EXTENT_SIZE - 1 < (entry >> ENTRY_FRESH_SHIFT) * size
            and load_short(place + SLAB_RETIRED_OFFSET) < (entry >> ENTRY_LIVE_SHIFT & 0xFFFF)
        )

    cdef inline int retire(self, uint64_t record, uint64_t magic) except -1:
        """Have a record, with this magic from now on, stay in its block until it is reclaimed."""
        cdef uint64_t entry_offset = map_entry_of(record >> EXTENT_SHIFT)
        cdef uint64_t word = load(self.base + record) ^ RECORD_MAGIC ^ magic
        word |= self.versions[GENERATION_WORD] << GENERATION_SHIFT
        self.versions[RETIRED_SIZE_WORD] += (
            BLOCK_SIZES[load(self.base + entry_offset) >> ENTRY_CLASS_SHIFT & 0xFF]
        )
        self.versions[MARKS_WORD] += magic == MARKED_MAGIC
        self.write(record, &word, 8)
        return self.count_retired(entry_offset, 1)

    cdef inline int count_retired(self, uint64_t entry_offset, int difference) except -1:
        """As `Slab._count_retired`, not below 0."""
        cdef uint64_t place = entry_offset + SLAB_RETIRED_OFFSET
        cdef int count = <int>load_short(self.base + place) + difference
        store_short(self.base + place, <uint64_t>max(count, 0))
        keep_order()
        return 0

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

    cdef inline bint has_empty_spare(self) noexcept:
        """Return whether an extent waits to be put on the list of free ones."""
        cdef uint64_t entry = load(self.base + map_entry_of(self.spare[0]))
        return entry & ENTRY_KIND_MASK == KIND_SLAB and not entry >> ENTRY_LIVE_SHIFT & 0xFFFF

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
        self.write(map_entry_of(extent), &after, 8)
        if slab >> ENTRY_FIRST_FREE_SHIFT == full_entry(size_class):
            self.link(extent, size_class)
            keep_order()
        if head >> GENERATION_SHIFT and is_magic(head):
            self.count_retired(map_entry_of(extent), -1)
        # Last: it ends the record.
        self.write(record, &link, 8)
        return 0

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

    cdef inline bint is_extent(self, uint64_t extent) noexcept:
        """Return whether `Extents.check` would let a number pass."""
        return FIXED_EXTENTS <= extent < self.live[0] >> EXTENT_SHIFT

    cdef inline bint has_neighbours(self, uint64_t extent) noexcept:
        cdef const uint8_t *entry = self.base + map_entry_of(extent)
        cdef uint64_t before = load_short(entry + SLAB_PREVIOUS_OFFSET)
        cdef uint64_t after = load_short(entry + SLAB_NEXT_OFFSET)
        return (before == NO_EXTENT or self.is_extent(before)) and (
            after == NO_EXTENT or self.is_extent(after)
        )

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


cdef inline uint64_t seed_of(
    uint64_t key_hash, uint64_t stamp, uint64_t expires_at, uint64_t offset
) noexcept:
    """Return the seed of a record's checksum: see `layout`, "Slab"."""
    return key_hash ^ stamp ^ expires_at << EXPIRY_SEED_SHIFT ^ offset
