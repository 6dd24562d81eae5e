# Part of `_fast_path`: what differs by operating system. Linux alone is asked to bring in pages.

cdef extern from *:
    """
    #if defined(_WIN32)
    #ifndef WIN32_LEAN_AND_MEAN
    #define WIN32_LEAN_AND_MEAN
    #endif
    #ifndef NOMINMAX
    #define NOMINMAX
    #endif
    #include <windows.h>
    #else
    #include <time.h>
    #endif
    #if defined(__linux__)
    #include <errno.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <unistd.h>
    #endif

    static int64_t kvstore_read_system_clock(void) {
    #if defined(_WIN32)
        FILETIME now; /* in 100 ns since 1601 */
    #if PY_VERSION_HEX >= 0x030D0000 /* as its `time` does */
        GetSystemTimePreciseAsFileTime(&now);
    #else
        GetSystemTimeAsFileTime(&now);
    #endif
        return (int64_t)(((uint64_t)now.dwHighDateTime << 32 | now.dwLowDateTime) / 10000)
            - INT64_C(11644473600000);
    #elif defined(CLOCK_REALTIME)
        struct timespec now;
        if (!clock_gettime(CLOCK_REALTIME, &now))
            return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
        return -1;
    #else
        return -1;
    #endif
    }

    #if defined(__linux__)
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
    # Milliseconds since 1970; a negative number where only Python knows them.
    int64_t read_system_clock "kvstore_read_system_clock"() noexcept nogil
    # As `platform.prefault`.
    void bring_in "kvstore_bring_in"(uint8_t *start, size_t size) noexcept nogil
    # Set what tells an open file from all others; False where there is none, or no large pages.
    bint identify "kvstore_identify"(int fd, uint64_t *device, uint64_t *number) noexcept nogil
    # By a call of the system, which may fail.
    void write_zeros "kvstore_write_zeros"(int fd, uint64_t offset, size_t size) noexcept nogil
