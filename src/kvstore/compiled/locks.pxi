# Part of `_fast_path`: locks that know their thread, and whether a thread holds any.

cdef extern from *:
    """
    static KVSTORE_OF_THREAD int kvstore_depth;
    #define KVSTORE_ENTER() ((void)++kvstore_depth)
    #define KVSTORE_LEAVE() ((void)--kvstore_depth)
    #define KVSTORE_IS_INSIDE() (kvstore_depth > 0)
    """
    # How many locks this thread holds: see `reentry`.
    void count_lock "KVSTORE_ENTER"() noexcept nogil
    void discount_lock "KVSTORE_LEAVE"() noexcept nogil
    bint is_inside_ "KVSTORE_IS_INSIDE"() noexcept nogil

cdef extern from "Python.h":
    int PY_LOCK_ACQUIRED
    int PyThread_acquire_lock_timed(
        PyThread_type_lock lock, long long microseconds, bint interruptible
    ) noexcept nogil


@cython.final
cdef class Inside:
    """`reentry.thread.inside` where locks count for themselves: one does for all threads."""

    def __enter__(self):
        count_lock()
        return True

    def __exit__(self, *_):
        discount_lock()

    def _is_owned(self):
        return is_inside_()


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
