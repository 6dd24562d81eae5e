# What differs by compiler: all of it is here, and the rest is C99.
#
# gcc and clang have what MSVC has not, and the other way round. What is neither gets what the C of
# 2011 has, or plain arithmetic.

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #if defined(_MSC_VER)
    #include <intrin.h>
    #else
    #include <stdatomic.h>
    #endif

    /* The processor may fetch this line. */
    #if defined(__GNUC__) || defined(__clang__)
    #define KVSTORE_PREFETCH(address) __builtin_prefetch(address)
    #elif defined(_M_X64)
    #define KVSTORE_PREFETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)
    #elif defined(_M_ARM64)
    #define KVSTORE_PREFETCH(address) __prefetch(address)
    #else
    #define KVSTORE_PREFETCH(address) ((void)(address))
    #endif

    /* The compiler moves no load or store across this; the processor is not asked. */
    #if defined(_MSC_VER)
    #define KVSTORE_KEEP_ORDER() _ReadWriteBarrier()
    #else
    #define KVSTORE_KEEP_ORDER() atomic_signal_fence(memory_order_seq_cst)
    #endif

    /* A variable that each thread has one of. */
    #if defined(_MSC_VER)
    #define KVSTORE_OF_THREAD __declspec(thread)
    #elif defined(__GLIBC__) && defined(__GNUC__)
    /* What is so small has room in what every thread has from its start, and is reached at once. */
    #define KVSTORE_OF_THREAD _Thread_local __attribute__((tls_model("initial-exec")))
    #else
    #define KVSTORE_OF_THREAD _Thread_local
    #endif

    /* The upper and the lower half of a product of 128 bits, one xored with the other. */
    static inline uint64_t kvstore_fold(uint64_t a, uint64_t b) {
    #if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_ARM64))
        return (a * b) ^ __umulh(a, b);
    #elif defined(__SIZEOF_INT128__)
        __extension__ typedef unsigned __int128 wide;
        wide product = (wide)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    #else
        uint64_t lo_lo = (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF), hi_lo = (a >> 32) * (b & 0xFFFFFFFF);
        uint64_t lo_hi = (a & 0xFFFFFFFF) * (b >> 32), hi_hi = (a >> 32) * (b >> 32);
        uint64_t cross = (lo_lo >> 32) + (hi_lo & 0xFFFFFFFF) + lo_hi;
        return (cross << 32 | (lo_lo & 0xFFFFFFFF)) ^ ((hi_lo >> 32) + (cross >> 32) + hi_hi);
    #endif
    }
    """
    void prefetch "KVSTORE_PREFETCH"(const void *address) noexcept nogil
    # What was stored before it is stored before what follows: a process may be killed in between,
    # and nothing else would keep a compiler from exchanging the two.
    void keep_order "KVSTORE_KEEP_ORDER"() noexcept nogil
