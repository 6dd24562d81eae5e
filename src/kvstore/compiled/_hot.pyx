# cython: boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
# cython: auto_pickle=False
"""The compiled twin of the hot path: `slab.Slab`, `slots.Slots` and `operations.Operations`.

It works on the same bytes of the same file as the plain twin, under the same locks, makes the same
changes in the same order through the same door, and raises the same errors. Each class is a base of
the one that is used, with the plain class as the other base: what is rare (growth, damage, several
writes that must be undone together) it finds there. Each method has the name of its counterpart,
which tells what it does and why; one that ends in `_` is the same with arguments of C.

Offsets and sizes are constants of C that `tools/build_hot.py` made of `layout`, and that
`implementation` compares with it. Whatever number is read from the file is compared with the file's
size, or with how many there can be, before it is followed.

Locks are real ones, held exactly as long as in the plain twin. With the interpreter's lock, no
other thread runs within a critical section but where it calls Python. Without, nothing here
is shared but the file's bytes, which the locks cover, and three numbers of `Window`, each written
by whoever holds the space lock or as the file is closed.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
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

from time import time_ns

from orjson import dumps, loads
from xxhash import xxh3_64_intdigest

from .. import clock
from ..format import codec, layout
from ..format.codec import check_ttl, decode_value, encode_key, encode_value
from ..errors import (
    CorruptStoreError,
    InvalidKeyError,
    KeyNotFoundError,
    KVStoreError,
    StoreBusyError,
    StoreFullError,
)
from ..index.buckets import torn_bucket_error, wanted_shape, wrong_bucket_error
from ..index.records import no_record_error
from ..file.rollback import Rollback

include "layout_constants.pxi"

cdef extern from *:
    """
    #if defined(__GNUC__)
    #define KVSTORE_PREFETCH(address) __builtin_prefetch(address)
    #else
    #define KVSTORE_PREFETCH(address) ((void)(address))
    #endif
    #if defined(Py_GIL_DISABLED)
    #define KVSTORE_HAS_GIL 0
    #else
    #define KVSTORE_HAS_GIL 1
    #endif
    """
    void prefetch "KVSTORE_PREFETCH"(const void *address) noexcept nogil
    bint HAS_GIL "KVSTORE_HAS_GIL"

cdef extern from *:
    """
    #if defined(__GNUC__)
    #define KVSTORE_KEEP_ORDER() __asm__ __volatile__("" ::: "memory")
    #elif defined(_MSC_VER)
    #include <intrin.h>
    #define KVSTORE_KEEP_ORDER() _ReadWriteBarrier()
    #else
    #define KVSTORE_KEEP_ORDER() ((void)0)
    #endif
    """
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
    int PY_LOCK_ACQUIRED
    int PyThread_acquire_lock_timed(
        PyThread_type_lock lock, long long microseconds, bint interruptible
    ) noexcept nogil
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    const void *PyUnicode_1BYTE_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    bint PyUnicode_CheckExact(object o)
    bint PyLong_CheckExact(object o)
    bint PyFloat_CheckExact(object o)
    bint PyDict_CheckExact(object o)
    bint PyList_CheckExact(object o)
    bint PyTuple_CheckExact(object o)
    double PyFloat_AS_DOUBLE(object o)
    long long PyLong_AsLongLongAndOverflow(object o, int *overflow) except? -1

# --- what `layout` has as tables, and what the plain modules have of their own ------------------

cdef enum:
    CLASSES = 64
    RETRY_EVERY = 16
    FREE_BLOCK_SIZE = 8
    MOST_EXPECTED = 1024  # bytes; more than that the processor sees coming by itself

cdef uint64_t block_sizes[CLASSES]
cdef uint64_t full_entries[CLASSES]
cdef uint8_t size_classes[1024]
cdef uint8_t fingerprint_codes[256]

cdef int class_count = len(layout.BLOCK_SIZES)
if (
    class_count > CLASSES
    or len(layout.SIZE_CLASSES) > 1024
    or layout.FREE_BLOCK.size != FREE_BLOCK_SIZE
):
    raise ImportError("kvstore._hot: it has other sizes than the tables and structs of layout.py")

cdef int _index
for _index in range(class_count):
    block_sizes[_index] = layout.BLOCK_SIZES[_index]
    full_entries[_index] = layout.BLOCKS_PER_EXTENT[_index] << 16 | NO_BLOCK
for _index in range(len(layout.SIZE_CLASSES)):
    size_classes[_index] = layout.SIZE_CLASSES[_index]
for _index in range(256):
    fingerprint_codes[_index] = layout.FINGERPRINT_CODES[_index]

cdef uint64_t first_record = FIXED_EXTENTS << EXTENT_SHIFT
cdef uint64_t least_size = first_record + EXTENT_SIZE  # of a file, whatever is in it
cdef uint64_t rest_mask = ~(<uint64_t>0xFFFF << ENTRY_FIRST_FREE_SHIFT)
cdef uint64_t placing_bits = (
    <uint64_t>0xF << STRIPE_SHIFT | <uint64_t>0xFF << FINGERPRINT_SHIFT | BUCKET_COUNT - 1
)
cdef uint64_t last_ms = clock.LAST_MS
cdef long long most_seconds = codec.MAX_TTL_SECONDS
cdef int max_depth = codec.MAX_DEPTH
cdef object json_options = codec._OPTIONS
cdef dict clock_names = vars(clock)
cdef object system_clock = time_ns


cdef inline uint64_t get_word(const uint8_t *place) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, place, 8)
    return word


cdef inline uint64_t get_short(const uint8_t *place) noexcept nogil:
    cdef uint16_t short_word
    memcpy(&short_word, place, 2)
    return short_word


cdef inline void set_short(uint8_t *place, uint64_t number) noexcept nogil:
    cdef uint16_t short_word = <uint16_t>number
    memcpy(place, &short_word, 2)


cdef inline void set_word(uint8_t *place, uint64_t word) noexcept nogil:
    memcpy(place, &word, 8)


# Looked up at each call: they may be others.
digest_of_key = digest_of_value = xxh3_64_intdigest


cdef inline uint64_t hash_of(bytes key, object seed) except? 0:
    """As `layout.key_hash`."""
    return digest_of_key(key, seed)


cdef inline uint64_t checksum_of(bytes value, uint64_t seed) except? 0:
    return digest_of_value(value, seed)


cdef inline uint64_t now_ms_() except? 0:
    """As `clock.now_ms`."""
    cdef int64_t now
    # The same clock without a call of Python, unless someone put another one in its place.
    if clock_names["time_ns"] is not system_clock:
        return clock.now_ms()
    now = read_system_clock()
    return <uint64_t>now if 0 <= now <= <int64_t>last_ms else clock.now_ms()


cdef inline object needed(object part):
    """Return a part of the store that must be there: C would look into it without asking."""
    if part is None:
        raise TypeError("a part of the store is missing")
    return part


# One module in parts, lowest first: so that the compiler sees all of them at once.
include "_hot_window.pxi"
include "_hot_slab.pxi"
include "_hot_slots.pxi"


# --- keys and values ----------------------------------------------------------------------------

cdef inline bytes encode_key_(object key):
    """As `codec.encode_key`."""
    cdef Py_ssize_t size
    if PyUnicode_CheckExact(key) and PyUnicode_IS_COMPACT_ASCII(key):
        size = PyUnicode_GET_LENGTH(key)
        if 0 < size <= <Py_ssize_t>MAX_KEY_CHARACTERS:
            return PyBytes_FromStringAndSize(<const char *>PyUnicode_1BYTE_DATA(key), size)
    return encode_key(key)


cdef inline uint64_t check_ttl_(object key, object ttl) except? 0:
    """As `codec.check_ttl`."""
    cdef int overflow = 0
    cdef long long seconds
    if PyLong_CheckExact(ttl):
        seconds = PyLong_AsLongLongAndOverflow(ttl, &overflow)
        if not overflow and 1 <= seconds <= most_seconds:
            return <uint64_t>seconds * 1000
    return check_ttl(key, ttl)


cdef bytes encode_value_(object key, object value):
    """As `codec.encode_value`, which gets what is out of the ordinary."""
    cdef bytes encoded
    if PyDict_CheckExact(value) and is_plain_json(value, 1):
        try:
            encoded = dumps(value, None, json_options)
            if <uint64_t>PyBytes_GET_SIZE(encoded) <= MAX_VALUE_SIZE:
                return encoded
        except (TypeError, RecursionError):
            pass
    return encode_value(key, value)


cdef bint is_plain_json(object container, int depth) except -1:
    """Return whether `codec._walk` would go through a container's members without raising."""
    if PyDict_CheckExact(container):
        with cython.critical_section(container):
            for member in (<dict>container).values():
                if not is_usual_member(member, depth):
                    return False
    elif PyList_CheckExact(container):
        with cython.critical_section(container):
            for member in <list>container:
                if not is_usual_member(member, depth):
                    return False
    else:
        for member in <tuple>container:
            if not is_usual_member(member, depth):
                return False
    return True


cdef inline bint is_usual_member(object member, int depth) except -1:
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


# --- the operations on one key ------------------------------------------------------------------

cdef tuple no_stripes = tuple(Lock() for _ in range(STRIPE_COUNT))


@cython.no_gc_clear
cdef class Operations:
    """See `operations.Operations`."""

    cdef public object _path
    cdef public object _file
    cdef Slab slab
    cdef Slots table
    cdef public object _words
    cdef public object _seed
    cdef tuple stripes
    cdef public bint _durable
    cdef bint closed_
    cdef bint _begun

    def __cinit__(self, *_, **__):
        # For whoever calls before a store is opened, or where it never is: then it counts as closed.
        self.closed_ = True
        self._seed = 0
        self.stripes = no_stripes

    # What C looks into without asking is what it is taken for.

    @property
    def _slab(self):
        return self.slab

    @_slab.setter
    def _slab(self, Slab slab not None):
        self.slab = slab

    @property
    def _slots(self):
        return self.table

    @_slots.setter
    def _slots(self, Slots table not None):
        self.table = table

    @property
    def _closed(self):
        return self.closed_

    @_closed.setter
    def _closed(self, bint closed):
        if not closed and (self.table is None or self.slab is None):
            raise ValueError("nothing is there that could be opened")
        self.closed_ = closed

    @property
    def _stripes(self):
        return self.stripes

    @_stripes.setter
    def _stripes(self, tuple stripes not None):
        if len(stripes) != STRIPE_COUNT or not all(type(stripe) is Lock for stripe in stripes):
            raise TypeError(f"not the {STRIPE_COUNT} locks of a store")
        self.stripes = stripes

    cdef inline int enter(self, bint flushes) except -1:
        """Begin an operation, before it takes a lock."""
        if is_inside_():
            self._check_reentry(flushes)
        return 0

    def create(self, key, value, ttl=None):
        """Store `value` under `key`, for `ttl` whole seconds or for good.

        Raises InvalidKeyError, InvalidTTLError, InvalidValueError, ValueTooLargeError,
        KeyExistsError, StoreFullError, StoreClosedError, OSError; see `kvstore.operations`.
        """
        cdef bytes encoded_key = encode_key_(key)
        cdef uint64_t lifetime = 0 if ttl is None else check_ttl_(key, ttl)
        cdef uint64_t key_hash = hash_of(encoded_key, self._seed), record
        cdef bytes encoded
        if self.table is not None:
            self.table.expect_(key_hash)
        encoded = encode_value_(key, value)
        try:
            record = self.create_(key, encoded_key, encoded, lifetime, None, key_hash)
        except StoreFullError:
            if self._file.read_only:
                raise
            self._purge_for_room()
            record = self.create_(key, encoded_key, encoded, lifetime, None, key_hash)
        if self._durable:
            self._file.flush_record(record, RECORD_HEADER_SIZE + len(encoded_key) + len(encoded))

    def _create(
        self, key, bytes encoded_key not None, bytes encoded not None, lifetime, times=None
    ):
        """See `operations.Operations._create`."""
        key_hash = hash_of(encoded_key, self._seed)
        return self.create_(key, encoded_key, encoded, lifetime, times, key_hash)

    cdef uint64_t create_(
        self,
        object key,
        bytes encoded_key,
        bytes encoded,
        uint64_t lifetime,
        object times,
        uint64_t key_hash,
    ) except 0:
        cdef Lock stripe
        if not self._begun:
            self._begin()
        self.enter(self._durable)
        stripe = <Lock>self.stripes[key_hash >> STRIPE_SHIFT]
        stripe.take()
        try:
            if self.closed_:
                self._raise_closed()
            try:
                return self._create_under_stripe(
                    key, encoded_key, encoded, lifetime, times, key_hash
                )
            except KVStoreError:
                raise
            except BaseException:
                self._file.require_rebuild()
                raise
        finally:
            stripe.let_go()
            end_operation()

    cdef uint64_t _create_under_stripe(
        self,
        object key,
        bytes encoded_key,
        bytes encoded,
        uint64_t lifetime,
        object times,
        uint64_t key_hash,
    ) except 0:
        cdef Slots table = self.table
        cdef Slab slab = self.slab
        cdef uint64_t now_ms = now_ms_()
        cdef uint64_t used, expires_at, record
        cdef int64_t slot
        table.window.look_at_door(self._file)
        slot = table.find_(key_hash, encoded_key)
        while slot > 0:
            if not table.is_expired_(slot, now_ms):
                raise self._exists_error(key)
            table.delete_(slot, encoded_key)
            self._file.require_full_flush()
            slot = table.find_(key_hash, encoded_key)
        used = table.used_(-slot) if slot else SEGMENT_SLOTS
        if used >= SPLIT_AT and (not slot or used % RETRY_EVERY == 0):
            slot = self._find_after_split(key_hash, encoded_key, now_ms)
        expires_at = now_ms + lifetime if lifetime else 0
        if times is not None:
            now_ms, expires_at = times
        record = slab.take_(
            RECORD_HEADER_SIZE + PyBytes_GET_SIZE(encoded_key) + PyBytes_GET_SIZE(encoded)
        )
        try:
            slab.write_record_(record, encoded_key, encoded, key_hash, now_ms, expires_at)
            table.insert_(
                -slot, key_hash, encoded_key, record, PyBytes_GET_SIZE(encoded), expires_at
            )
            if not table.window.direct and not self._file.in_place:
                self._records.finish_record(record)
        except BaseException:
            if not (table.is_live_(-slot) and slab.is_record_(record)):
                self._undo_create(-slot, record)
            raise
        return record

    cdef int _begin(self) except -1:
        """Begin changes, once; a file that was begun stays so."""
        if self.closed_:
            self._raise_closed()
        if self._file.pristine:
            self._mark_dirty()
        self._begun = True
        return 0

    cdef bytes _value_of(self, object key, int64_t *slot):
        """Return what `read_bytes` does; None where the key is absent, and the slot if expired."""
        cdef bytes encoded_key = encode_key_(key)
        cdef uint64_t key_hash = hash_of(encoded_key, self._seed)
        cdef Lock stripe = <Lock>self.stripes[key_hash >> STRIPE_SHIFT]
        cdef uint64_t expires_at = 0, tail = 0
        cdef uint64_t header[4]
        cdef bytes encoded = None
        self.enter(False)
        stripe.take()
        try:
            if self.closed_:
                self._raise_closed()
            slot[0] = self.table.find_(key_hash, encoded_key)
            if slot[0] > 0:
                expires_at = get_word(self.table.window.base + slot[0] + SLOT_EXPIRES_OFFSET)
                tail = get_word(self.table.window.base + slot[0] + SLOT_RECORD_OFFSET)
                self.slab.expect_(tail)
                if not expires_at or not self.table.is_expired_(slot[0], now_ms_()):
                    encoded = self.slab.read_record_(tail, header)
        finally:
            stripe.let_go()
            end_operation()
        if encoded is not None and not verify_(header, encoded, tail, expires_at, key_hash):
            raise self._damaged_error(key, slot[0], tail & SLOT_RECORD_MASK)
        return encoded

    # Each raises by itself for an absent key: every function that an error passes costs time.

    def read(self, key):
        """Return the value of `key` as a new dict.

        Raises InvalidKeyError, KeyNotFoundError, CorruptStoreError, StoreClosedError; see
        `kvstore.operations`.
        """
        cdef int64_t slot
        cdef bytes encoded = self._value_of(key, &slot)
        if encoded is None:
            raise absent(key, slot)
        return decode_value_(key, encoded)

    def __getitem__(self, key):
        cdef int64_t slot
        cdef bytes encoded = self._value_of(key, &slot)
        if encoded is None:
            raise absent(key, slot)
        return decode_value_(key, encoded)

    def read_bytes(self, key):
        """Return the value of `key` as JSON in UTF-8, not parsed. Raises as `read`."""
        cdef int64_t slot
        cdef bytes encoded = self._value_of(key, &slot)
        if encoded is None:
            raise absent(key, slot)
        return encoded

    def get(self, key, default=None):
        """Return the value of `key`, or `default` where it is absent; else raise as `read`."""
        cdef int64_t slot
        cdef bytes encoded = self._value_of(key, &slot)
        return default if encoded is None else decode_value_(key, encoded)

    def delete(self, key):
        """Remove `key`.

        Raises InvalidKeyError, KeyNotFoundError, StoreFullError, StoreClosedError, OSError; see
        `kvstore.operations`.
        """
        cdef bytes encoded_key = encode_key_(key)
        cdef uint64_t key_hash = hash_of(encoded_key, self._seed)
        cdef Slots table = self.table
        cdef Lock stripe
        cdef int64_t slot
        cdef uint64_t record = 0
        cdef bint is_there
        if not self._begun:
            self._begin()
        self.enter(self._durable)
        stripe = <Lock>self.stripes[key_hash >> STRIPE_SHIFT]
        stripe.take()
        try:
            if self.closed_:
                self._raise_closed()
            slot = table.find_(key_hash, encoded_key)
            is_there = slot > 0 and not (
                get_word(table.window.base + slot + SLOT_EXPIRES_OFFSET)
                and table.is_expired_(slot, now_ms_())
            )
            if is_there:
                try:
                    table.window.look_at_door(self._file)
                    record = table.delete_(slot, encoded_key)
                    if self._durable:
                        self._file.record_cleared(record)
                except KVStoreError:
                    raise
                except BaseException:
                    self._file.require_rebuild()
                    raise
        finally:
            stripe.let_go()
            end_operation()
        if not is_there:
            raise absent(key, slot)
        if self._durable:
            self._file.flush_record(record, FREE_BLOCK_SIZE)

    def ttl(self, key):
        """Return the whole seconds until `key` expires, rounded up; None if it never does.

        Raises InvalidKeyError, KeyNotFoundError, CorruptStoreError, StoreClosedError; see
        `kvstore.operations`.
        """
        cdef uint64_t expires_at, now_ms
        if not self._expiry(encode_key_(key), &expires_at, &now_ms, key):
            raise absent(key, 0)
        if not expires_at:
            return None
        # It is not past: then the key has expired, or its record does not agree.
        return (expires_at - now_ms - 1) // 1000 + 1

    def __contains__(self, key):
        cdef uint64_t expires_at, now_ms
        cdef bytes encoded_key
        try:
            encoded_key = encode_key_(key)
        except InvalidKeyError:
            if self.closed_:
                self._raise_closed()
            return False
        return self._expiry(encoded_key, &expires_at, &now_ms, None)

    cdef bint _expiry(
        self, bytes encoded_key, uint64_t *expires_at, uint64_t *now_ms, object key
    ) except -1:
        """Return whether a key is there; set its expires_at and, where it has one, the time now.

        Raises CorruptStoreError where its record says otherwise, if it has a `key` to name.
        """
        cdef uint64_t record
        cdef uint64_t key_hash = hash_of(encoded_key, self._seed)
        cdef Lock stripe = <Lock>self.stripes[key_hash >> STRIPE_SHIFT]
        cdef int64_t slot
        self.enter(False)
        stripe.take()
        try:
            if self.closed_:
                self._raise_closed()
            slot = self.table.find_(key_hash, encoded_key)
            if slot <= 0:
                return False
            expires_at[0] = get_word(self.table.window.base + slot + SLOT_EXPIRES_OFFSET)
            if expires_at[0]:
                now_ms[0] = now_ms_()
                if self.table.is_expired_(slot, now_ms[0]):
                    return False
            if key is not None:
                record = get_word(self.table.window.base + slot + SLOT_RECORD_OFFSET)
                record &= SLOT_RECORD_MASK
                if self.slab.expiry_at_(record) != expires_at[0]:
                    raise self._damaged_error(key, slot, record)
            return True
        finally:
            stripe.let_go()
            end_operation()


cdef object decode_value_(object key, bytes encoded):
    """As `codec.decode_value`, which tells what is wrong."""
    try:
        return loads(encoded)
    except ValueError:
        return decode_value(key, encoded)


cdef inline object absent(object key, int64_t slot):
    """Return the error for a key that is not there, or whose slot is but has expired."""
    return KeyNotFoundError(key, "has expired") if slot > 0 else KeyNotFoundError(key)
