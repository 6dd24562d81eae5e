# Part of `_hot`: locks, the door for changes, and the mapped bytes.

@cython.final
cdef class Lock:
    """A lock as `threading.Lock` is one; code in C takes it without a call of Python.

    To wait for it can be interrupted: where `take` raises, the lock is not held.
    """

    cdef PyThread_type_lock _handle

    def __cinit__(self):
        self._handle = PyThread_allocate_lock()
        if self._handle is NULL:
            raise MemoryError("no memory for a lock")

    def __dealloc__(self):
        if self._handle is not NULL:
            PyThread_free_lock(self._handle)

    cdef inline int take(self) except -1:
        if not PyThread_acquire_lock(self._handle, NOWAIT_LOCK):
            self._wait()
        return 0

    cdef int _wait(self) except -1:
        cdef int status
        while True:
            with nogil:
                status = PyThread_acquire_lock_timed(self._handle, -1, True)
            if status == PY_LOCK_ACQUIRED:
                return 0
            PyErr_CheckSignals()

    cdef inline void let_go(self) noexcept:
        PyThread_release_lock(self._handle)

    def acquire(self, blocking=True):
        """Take the lock; return False where it is held and `blocking` is false."""
        if not blocking:
            return bool(PyThread_acquire_lock(self._handle, NOWAIT_LOCK))
        self.take()
        return True

    def release(self):
        """Let go of the lock."""
        if PyThread_acquire_lock(self._handle, NOWAIT_LOCK):
            PyThread_release_lock(self._handle)
            raise RuntimeError("release of a lock that nobody holds")
        PyThread_release_lock(self._handle)

    def locked(self):
        """Tell whether somebody holds it."""
        if PyThread_acquire_lock(self._handle, NOWAIT_LOCK):
            PyThread_release_lock(self._handle)
            return False
        return True

    def __enter__(self):
        self.take()
        return True

    def __exit__(self, *_):
        self.let_go()


@cython.final
cdef class MapWriter:
    """The door for changes where it stores through the map: `write(offset, data)`.

    Code in C that finds the door to be one of these stores by itself.
    """

    cdef object _map

    def __init__(self, mapped):
        self._map = mapped

    def __call__(self, uint64_t offset, data):
        cdef Py_buffer target, source
        PyObject_GetBuffer(self._map, &target, PyBUF_WRITABLE)
        try:
            PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
            try:
                if offset > <uint64_t>target.len or source.len > target.len - <Py_ssize_t>offset:
                    raise IndexError(
                        f"{source.len:,} bytes at {offset:,} are not in a map of {target.len:,}"
                    )
                memcpy(<uint8_t *>target.buf + offset, source.buf, source.len)
            finally:
                PyBuffer_Release(&source)
        finally:
            PyBuffer_Release(&target)


@cython.final
cdef class Window:
    """The mapped bytes of an open data file, for code in C.

    Attributes:
        size: as `DataFile.size`; 0 once the file is closed, so that nothing is in it any more.
    """

    cdef uint8_t *base
    cdef public uint64_t size
    cdef bint direct

    def __init__(self, mapped, size):
        cdef Py_buffer view
        PyObject_GetBuffer(mapped, &view, PyBUF_SIMPLE)
        # The map outlives its use here: `DataFile.close` calls `close` before it unmaps.
        self.base = <uint8_t *>view.buf
        PyBuffer_Release(&view)
        self.size = size

    def close(self):
        """Forget the map, which is about to go."""
        self.size = 0
        self.base = NULL

    cdef inline int look_at_door(self, object file) except -1:
        """Note whether changes of `file` may be stored right here. The caller holds a lock."""
        self.direct = type(file.write) is MapWriter
        return 0

    cdef inline int check(self, uint64_t offset) except -1:
        """Raise for an offset, of a caller in Python, at which there can be no slot or record."""
        if self.size < SLOT_SIZE or offset > self.size - SLOT_SIZE:
            raise IndexError(f"byte {offset:,} is not in the open file of {self.size:,} bytes")
        return 0

    cdef inline int check_slot(self, uint64_t offset) except -1:
        """Raise for an offset, of a caller in Python, at which no bucket has slots."""
        self.check(offset)
        if offset & BUCKET_SIZE - 1 < BUCKET_HEADER_SIZE:
            raise IndexError(f"byte {offset:,} is in the header of a page, and no slot")
        return 0

    cdef inline int put(self, object file, uint64_t offset, const void *data, size_t size) except -1:
        """As `file.write`."""
        if self.direct:
            memcpy(self.base + offset, data, size)
            keep_order()
        else:
            file.write(offset, PyBytes_FromStringAndSize(<const char *>data, size))
        return 0

    cdef inline int put_word(self, object file, uint64_t offset, uint64_t word) except -1:
        """As `file.write_word`, of the word at an offset in bytes."""
        if self.direct:
            set_word(self.base + offset, word)
            keep_order()
        else:
            file.write_word(offset >> 3, word)
        return 0


cdef inline bytes word_bytes(uint64_t word):
    return PyBytes_FromStringAndSize(<const char *>&word, 8)


cdef inline const uint8_t *text_of(bytes key) noexcept:
    return <const uint8_t *>PyBytes_AS_STRING(key)
