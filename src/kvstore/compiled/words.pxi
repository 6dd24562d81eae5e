# Words of the file's bytes, which ask for no alignment, and the hash of some.

include "compilers.pxi"
include "hashing.pxi"


cdef inline uint64_t load(const uint8_t *place) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, place, sizeof(word))
    return word


cdef inline void store(uint8_t *place, uint64_t word) noexcept nogil:
    memcpy(place, &word, sizeof(word))


cdef inline uint64_t load_short(const uint8_t *place) noexcept nogil:
    cdef uint16_t short_word
    memcpy(&short_word, place, sizeof(short_word))
    return short_word


cdef inline void store_short(uint8_t *place, uint64_t number) noexcept nogil:
    cdef uint16_t short_word = <uint16_t>number
    memcpy(place, &short_word, sizeof(short_word))


cdef inline uint64_t digest(const uint8_t *text, uint64_t size, uint64_t seed) except? 0:
    """As `xxhash.xxh3_64_intdigest`."""
    if size <= MOST_HASHED:
        return xxh3(text, size, seed)
    return xxh3_64_intdigest(PyBytes_FromStringAndSize(<const char *>text, size), seed)
