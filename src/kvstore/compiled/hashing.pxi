# XXH3 (64 bits) of up to 240 bytes, as `xxhash.xxh3_64_intdigest` gives it: keys are hashed for
# every operation, and a call of Python for each costs more than hashing does. The algorithm is Yann
# Collet's, from the specification in doc/xxhash_spec.md of https://github.com/Cyan4973/xxHash.

cdef extern from *:
    """
    static const uint8_t KVSTORE_XXH_SECRET[192] = {
        0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
        0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
        0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
        0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
        0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
        0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
        0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
        0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
        0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
        0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
        0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
        0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
    };
    #define KVSTORE_PRIME32_1 UINT64_C(0x9E3779B1)
    #define KVSTORE_PRIME32_2 UINT64_C(0x85EBCA77)
    #define KVSTORE_PRIME32_3 UINT64_C(0xC2B2AE3D)
    #define KVSTORE_PRIME64_1 UINT64_C(0x9E3779B185EBCA87)
    #define KVSTORE_PRIME64_2 UINT64_C(0xC2B2AE3D27D4EB4F)
    #define KVSTORE_PRIME64_3 UINT64_C(0x165667B19E3779F9)
    #define KVSTORE_PRIME_MX1 UINT64_C(0x165667919E3779F9)
    #define KVSTORE_PRIME_MX2 UINT64_C(0x9FB21C651E98DF25)
    static inline uint64_t kvstore_load64(const uint8_t *p) {
        uint64_t word; memcpy(&word, p, 8); return word;
    }
    static inline uint64_t kvstore_load32(const uint8_t *p) {
        uint32_t word; memcpy(&word, p, 4); return word;
    }
    static inline uint64_t kvstore_swap64(uint64_t x) {
        x = x >> 32 | x << 32;
        x = (x & UINT64_C(0xFFFF0000FFFF0000)) >> 16 | (x & UINT64_C(0x0000FFFF0000FFFF)) << 16;
        return (x & UINT64_C(0xFF00FF00FF00FF00)) >> 8 | (x & UINT64_C(0x00FF00FF00FF00FF)) << 8;
    }
    static inline uint64_t kvstore_avalanche(uint64_t h) {
        h ^= h >> 37; h *= KVSTORE_PRIME_MX1; return h ^ h >> 32;
    }
    static inline uint64_t kvstore_mix16(const uint8_t *in, int at, uint64_t seed) {
        const uint8_t *secret = KVSTORE_XXH_SECRET + at;
        return kvstore_fold(kvstore_load64(in) ^ (kvstore_load64(secret) + seed),
                            kvstore_load64(in + 8) ^ (kvstore_load64(secret + 8) - seed));
    }
    static inline uint64_t kvstore_xxh3_to16(const uint8_t *in, size_t size, uint64_t seed) {
        const uint8_t *secret = KVSTORE_XXH_SECRET;
        if (size > 8) {
            uint64_t low = kvstore_load64(in)
                ^ ((kvstore_load64(secret + 24) ^ kvstore_load64(secret + 32)) + seed);
            uint64_t high = kvstore_load64(in + size - 8)
                ^ ((kvstore_load64(secret + 40) ^ kvstore_load64(secret + 48)) - seed);
            return kvstore_avalanche(size + kvstore_swap64(low) + high + kvstore_fold(low, high));
        }
        if (size > 3) {
            uint64_t h;
            seed ^= kvstore_swap64((uint32_t)seed);
            h = (kvstore_load64(secret + 8) ^ kvstore_load64(secret + 16)) - seed;
            h ^= kvstore_load32(in + size - 4) + (kvstore_load32(in) << 32);
            h ^= (h << 49 | h >> 15) ^ (h << 24 | h >> 40);
            h *= KVSTORE_PRIME_MX2;
            h ^= (h >> 35) + size;
            h *= KVSTORE_PRIME_MX2;
            return h ^ h >> 28;
        }
        uint64_t h;
        if (size) {
            uint64_t joined = (uint64_t)in[0] << 16 | (uint64_t)in[size >> 1] << 24
                | in[size - 1] | (uint64_t)size << 8;
            h = joined ^ ((kvstore_load32(secret) ^ kvstore_load32(secret + 4)) + seed);
        } else {
            h = seed ^ kvstore_load64(secret + 56) ^ kvstore_load64(secret + 64);
        }
        h ^= h >> 33; h *= KVSTORE_PRIME64_2;
        h ^= h >> 29; h *= KVSTORE_PRIME64_3;
        return h ^ h >> 32;
    }
    static uint64_t kvstore_xxh3(const uint8_t *in, size_t size, uint64_t seed) {
        uint64_t sum, end;
        size_t at;
        if (size <= 16)
            return kvstore_xxh3_to16(in, size, seed);
        sum = size * KVSTORE_PRIME64_1;
        if (size <= 128) {
            for (at = (size - 1) / 32 + 1; at--;) {
                sum += kvstore_mix16(in + 16 * at, (int)(32 * at), seed);
                sum += kvstore_mix16(in + size - 16 * (at + 1), (int)(32 * at + 16), seed);
            }
            return kvstore_avalanche(sum);
        }
        for (at = 0; at < 8; at++)
            sum += kvstore_mix16(in + 16 * at, (int)(16 * at), seed);
        sum = kvstore_avalanche(sum);
        end = kvstore_mix16(in + size - 16, 136 - 17, seed);
        for (at = 8; at < size / 16; at++)
            end += kvstore_mix16(in + 16 * at, (int)(16 * (at - 8) + 3), seed);
        return kvstore_avalanche(sum + end);
    }
    """
    size_t MOST_HASHED "240"
    uint64_t xxh3 "kvstore_xxh3"(const uint8_t *bytes, size_t size, uint64_t seed) noexcept nogil
