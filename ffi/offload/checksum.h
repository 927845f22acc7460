/* The Internet checksum (RFC 1071), fast: sums of 16-bit words in the machine's byte order.
 *
 * A sum is kept unfolded in 64 bits, where 2^32 words fit. Pieces that are summed one after the
 * other have even lengths, all but the last.
 */
#ifndef NATCOMPAT_CHECKSUM_H
#define NATCOMPAT_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* cffi: begin */
/* Return `sum` plus the words of `data`; an odd byte at the end counts as if a zero followed. */
uint64_t checksum_add(uint64_t sum, const uint8_t *data, size_t length);

/* The same, and copy `data` to `to`, which does not overlap it. */
uint64_t checksum_copy(uint64_t sum, uint8_t *to, const uint8_t *data, size_t length);

/* Return `sum` in 16 bits, not complemented, as it would be stored in memory. */
uint16_t checksum_fold(uint64_t sum);
/* cffi: end */

/* checksum_add for headers: `length` is a multiple of four. */
static inline uint64_t checksum_header(uint64_t sum, const uint8_t *data, size_t length)
{
    for (uint32_t words; length; data += 4, length -= 4) {
        memcpy(&words, data, 4);
        sum += words;
    }
    return sum;
}

#endif
