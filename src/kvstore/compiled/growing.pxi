# Part of `_fast_path`: pages are brought in before a store would have to wait for them.

cdef extern from *:
    """
    #if defined(__linux__)
    #include <errno.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <unistd.h>
    static void kvstore_bring_in(uint8_t *start, size_t size) {
        if (madvise(start, size, 23))  /* MADV_POPULATE_WRITE, as in `platform` */
            errno = 0;
    }
    static int kvstore_identify(int fd, uint64_t *device, uint64_t *number) {
        struct stat found;
        if (fd < 0 || fstat(fd, &found))
            return 0;
        *device = (uint64_t)found.st_dev;
        *number = (uint64_t)found.st_ino;
        return 1;
    }
    static void kvstore_write_zeros(int fd, uint64_t offset, size_t size) {
        static const char zeros[16384];
        if (pwrite(fd, zeros, size < sizeof(zeros) ? size : sizeof(zeros), (off_t)offset) < 0)
            errno = 0;
    }
    #else
    static void kvstore_bring_in(uint8_t *start, size_t size) {
        (void)start; (void)size;
    }
    static int kvstore_identify(int fd, uint64_t *device, uint64_t *number) {
        (void)fd; (void)device; (void)number;
        return 0;
    }
    static void kvstore_write_zeros(int fd, uint64_t offset, size_t size) {
        (void)fd; (void)offset; (void)size;
    }
    #endif
    """
    # As `platform.prefault`.
    void bring_in "kvstore_bring_in"(uint8_t *start, size_t size) noexcept nogil
    # Set what tells an open file from all others; False where there is none, or no large pages.
    bint identify "kvstore_identify"(int fd, uint64_t *device, uint64_t *number) noexcept nogil
    # By a call of the system, which may fail.
    void write_zeros "kvstore_write_zeros"(int fd, uint64_t offset, size_t size) noexcept nogil

cdef enum:
    LEAST_LARGE = 8192  # bytes of a record whose block is to be in large pages
    LARGE_PAGE_SIZE = 16_384
    PREPARED = 2 * 65_536  # bytes: while an extent is brought in, the one before it may be wanted
    PREPARED_AT_ONCE = 16_384


@cython.no_gc
cdef class Growing(Blocks):
    """What is done ahead of, or when, a store takes more of its file: a part of `FastPath`."""

    cdef int fd
    cdef uint64_t device, number  # of the file
    cdef uint64_t zeros_from  # from here on, what was never used holds zeros
    cdef uint64_t prepared  # up to here, fresh extents are in memory

    @cython.final
    cdef inline void prepare(self) noexcept:
        """Bring in some pages of the next fresh extents, unless all of these are in memory.

        Each page that is not there costs a fault as it is first stored to, which takes longer than
        that of a small record. The sixteen of an extent at once, as a segment wants them, would be
        a pause; one at a time, they would cost a third more. They are small ones, for a flush
        writes each of them whole.
        """
        cdef uint64_t first = load_short(self.base + FRESH_EXTENT_OFFSET) << EXTENT_SHIFT
        cdef uint64_t end = min(first + PREPARED, self.live[0])
        if not first <= self.prepared <= end:
            self.prepared = first
        if self.prepared < end:
            bring_in(self.base + self.prepared, PREPARED_AT_ONCE)
            self.prepared += PREPARED_AT_ONCE

    @cython.final
    cdef void use_large_pages(self, int fd) noexcept:
        """Let `bring_in_block` make some of what the file grows by from now on."""
        self.fd = fd if identify(fd, &self.device, &self.number) else -1
        self.zeros_from = self.live[0]

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
