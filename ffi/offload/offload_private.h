/* Header fields for splitting and merging: as bytes, at any alignment. */
#ifndef NATCOMPAT_OFFLOAD_PRIVATE_H
#define NATCOMPAT_OFFLOAD_PRIVATE_H

#include <linux/virtio_net.h>
#include <string.h>

#include "offload/checksum.h"
#include "offload/offload.h"

#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5 /* Linux 6.2 */
#endif

_Static_assert(sizeof(struct virtio_net_hdr) == OFFLOAD_HEADER, "struct virtio_net_hdr has 10 bytes");

enum { TCP = 6, UDP = 17, HOP_BY_HOP = 0, ROUTING = 43, DESTINATION = 60 };
enum { FIN = 0x01, SYN = 0x02, RST = 0x04, PSH = 0x08, URG = 0x20, CWR = 0x80 };
enum { TCP_HEADER = 20, TCP_SEQUENCE = 4, TCP_OFFSET = 12, TCP_FLAGS = 13, TCP_CHECKSUM = 16 };
enum { UDP_HEADER = 8, UDP_LENGTH = 4, UDP_CHECKSUM = 6 };

static inline uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static inline void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline uint32_t get32(const uint8_t *at)
{
    return (uint32_t)get16(at) << 16 | get16(at + 2);
}

static inline void put32(uint8_t *at, uint32_t value)
{
    put16(at, value >> 16);
    put16(at + 2, value & 0xFFFF);
}

/* A 16-bit number as checksum_add would read it from memory. */
static inline uint64_t word(uint32_t value)
{
    uint8_t bytes[2];
    uint16_t as_read;

    put16(bytes, value);
    memcpy(&as_read, bytes, 2);
    return as_read;
}

static inline void store(uint8_t *at, uint16_t sum)
{
    memcpy(at, &sum, 2);
}

static inline void checksum_ip4(uint8_t *packet, size_t header)
{
    put16(packet + 10, 0);
    store(packet + 10, (uint16_t)~checksum_fold(checksum_header(0, packet, header)));
}

/* The sum of the pseudo-header without the length (RFC 9293, 3.1; RFC 8200, 8.1). */
static inline uint64_t pseudo(const uint8_t *packet, uint8_t protocol)
{
    uint64_t sum = word(protocol);

    return packet[0] >> 4 == 4 ? checksum_header(sum, packet + 12, 8) : checksum_header(sum, packet + 8, 32);
}

/* Return whether `packet` says itself that it has `length` bytes. */
static inline int is_whole(const uint8_t *packet, size_t length)
{
    if (length >= 20 && packet[0] >> 4 == 4) {
        size_t header = (size_t)(packet[0] & 15) * 4;

        return header >= 20 && header <= length && get16(packet + 2) == length;
    }
    return length >= 40 && packet[0] >> 4 == 6 && get16(packet + 4) + 40u == length;
}

#endif
