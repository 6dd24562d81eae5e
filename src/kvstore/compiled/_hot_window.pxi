# Part of `_hot`: locks, the door for changes, and the mapped bytes.

cdef extern from *:
    """
    #if defined(_MSC_VER)
    #define KVSTORE_OF_THREAD static __declspec(thread)
    #elif defined(__GLIBC__)
    /* What is so small has room in what every thread has from its start, and is reached at once. */
    #define KVSTORE_OF_THREAD static __thread __attribute__((tls_model("initial-exec")))
    #else
    #define KVSTORE_OF_THREAD static __thread
    #endif
    KVSTORE_OF_THREAD int kvstore_depth;
    #define KVSTORE_ENTER() ((void)++kvstore_depth)
    #define KVSTORE_LEAVE() ((void)--kvstore_depth)
    #define KVSTORE_IS_INSIDE() (kvstore_depth > 0)
    """
    # How many locks this thread holds: see `reentry`.
    void count_lock "KVSTORE_ENTER"() noexcept nogil
    void discount_lock "KVSTORE_LEAVE"() noexcept nogil
    bint is_inside_ "KVSTORE_IS_INSIDE"() noexcept nogil

cdef dict waiting = {}
cdef object leave = None


def call_at_end(dict of_threads not None, function):
    """Have `function` called as an operation has ended while the dict is not empty."""
    global waiting, leave
    waiting, leave = of_threads, function


cdef inline int end_operation() except -1:
    """Call this where an operation has let go of its locks."""
    if len(waiting):
        leave()
    return 0


def is_inside():
    """See `reentry.is_inside`."""
    return is_inside_()


@cython.final
cdef class Inside:
    """`reentry.thread.inside` where locks count themselves: one for all threads."""

    def __enter__(self):
        count_lock()
        return True

    def __exit__(self, *_):
        discount_lock()


@cython.final
cdef class Lock:
    """A lock that knows its thread; code in C takes it without a call of Python.

    To wait for it can be interrupted: where `take` raises, the lock is not held. No thread waits
    for itself.
    """

    cdef PyThread_type_lock _handle
    cdef unsigned long _owner

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
        self._owner = PyThread_get_thread_ident()
        count_lock()
        return 0

    cdef int _wait(self) except -1:
        cdef int status
        if self._owner == PyThread_get_thread_ident():
            raise StoreBusyError("this thread holds the lock already, and would wait for itself")
        while True:
            with nogil:
                status = PyThread_acquire_lock_timed(self._handle, -1, True)
            if status == PY_LOCK_ACQUIRED:
                return 0
            PyErr_CheckSignals()

    cdef inline void let_go(self) noexcept:
        self._owner = 0
        discount_lock()
        PyThread_release_lock(self._handle)

    def acquire(self, blocking=True):
        """Take the lock; return False where it is held and `blocking` is false."""
        if blocking:
            self.take()
        elif PyThread_acquire_lock(self._handle, NOWAIT_LOCK):
            self._owner = PyThread_get_thread_ident()
            count_lock()
        else:
            return False
        return True

    def release(self):
        """Let go of the lock."""
        if not self._is_owned():
            raise RuntimeError("release of a lock that this thread does not hold")
        self.let_go()

    def _is_owned(self):
        """Return whether this thread holds it."""
        return self._owner == PyThread_get_thread_ident()

    def __enter__(self):
        self.take()
        return True

    def __exit__(self, *_):
        self.release()


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
    """The mapped bytes of an open data file, for code in C: nobody can unmap them before `close`.

    Attributes:
        size: as `DataFile.size`; 0 once the file is closed, so that nothing is in it any more.
    """

    cdef Py_buffer view
    cdef uint8_t *base
    cdef uint64_t _size
    # Whether changes may be stored right here. Not any more, once a signal handler has forked, in
    # the child that goes on with the operation: `DataFile.detach_after_fork` sees to that.
    cdef public bint direct

    def __cinit__(self, mapped, size):
        PyObject_GetBuffer(mapped, &self.view, PyBUF_SIMPLE)
        self.base = <uint8_t *>self.view.buf
        self.size = size

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    @property
    def size(self):
        return self._size

    @size.setter
    def size(self, uint64_t size):
        if self.base is NULL or not least_size <= size <= <uint64_t>self.view.len:
            raise ValueError(f"{size:,} bytes of a map of {self.view.len:,}, or of a closed one")
        self._size = size

    def close(self):
        """Let go of the map, which is about to go."""
        self._size = 0
        self.base = NULL
        PyBuffer_Release(&self.view)

    cdef inline int look_at_door(self, object file) except -1:
        """Note whether changes of `file` may be stored right here. The caller holds a lock."""
        self.direct = type(file.write) is MapWriter
        return 0

    cdef inline int check(self, uint64_t offset) except -1:
        """Raise for an offset, of a caller in Python, at which there can be no slot or record."""
        if self._size < SLOT_SIZE or offset > self._size - SLOT_SIZE:
            raise IndexError(f"byte {offset:,} is not in the open file of {self._size:,} bytes")
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
