/* The Internet checksum (RFC 1071), vectorised where the processor allows it. */
#include "offload/checksum.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

uint16_t checksum_fold(uint64_t sum)
{
    sum = (sum & 0xFFFFFFFF) + (sum >> 32);
    sum = (sum & 0xFFFF) + (sum >> 16 & 0xFFFF) + (sum >> 32);
    sum = (sum & 0xFFFF) + (sum >> 16);
    return (uint16_t)(sum + (sum >> 16));
}

/* What is left behind the whole vectors. The halves of a 64-bit word are added apart, so nothing is carried. */
static inline uint64_t add_rest(uint64_t sum, uint8_t *to, const uint8_t *data, size_t length)
{
    uint64_t word = 0;

    for (; length >= 8; data += 8, length -= 8) {
        memcpy(&word, data, 8);
        if (to) {
            memcpy(to, &word, 8);
            to += 8;
        }
        sum += (word & 0xFFFFFFFF) + (word >> 32);
    }
    if (length) {
        word = 0;
        memcpy(&word, data, length);
        if (to)
            memcpy(to, data, length);
        sum += (word & 0xFFFFFFFF) + (word >> 32);
    }
    return sum;
}

#ifdef HAVE_AVX2
__attribute__((target("avx2"))) static uint64_t add_avx2(uint64_t sum, uint8_t *to, const uint8_t *data, size_t length)
{
    const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
    __m256i even = _mm256_setzero_si256(), odd = even;
    uint64_t lanes[4];

    for (; length >= 32; data += 32, length -= 32) {
        __m256i words = _mm256_loadu_si256((const __m256i *)data);

        if (to) {
            _mm256_storeu_si256((__m256i *)to, words);
            to += 32;
        }
        even = _mm256_add_epi64(even, _mm256_and_si256(words, low));
        odd = _mm256_add_epi64(odd, _mm256_srli_epi64(words, 32));
    }
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi64(even, odd));
    return add_rest(sum + lanes[0] + lanes[1] + lanes[2] + lanes[3], to, data, length);
}
#endif

static inline uint64_t add(uint64_t sum, uint8_t *to, const uint8_t *data, size_t length)
{
#ifdef HAVE_AVX2
    if (length >= 64 && __builtin_cpu_supports("avx2"))
        return add_avx2(sum, to, data, length);
#endif
    return add_rest(sum, to, data, length);
}

uint64_t checksum_add(uint64_t sum, const uint8_t *data, size_t length)
{
    return add(sum, NULL, data, length);
}

uint64_t checksum_copy(uint64_t sum, uint8_t *to, const uint8_t *data, size_t length)
{
    return add(sum, to, data, length);
}
