/* Inner packets, as natcompat/esp/engine/packet.py: lengths, flows, outer fields, ECN. Pure functions on bytes. */
#ifndef NATCOMPAT_INNER_H
#define NATCOMPAT_INNER_H

#include <stdbool.h>

#include "esp/control.h"

enum { NEXT_IPV4 = 4, NEXT_IPV6 = 41, NEXT_DUMMY = 59 };

/* How long the IP packet at the start says it is; 0 if it is none or is cut short. */
size_t inner_length(const uint8_t *packet, size_t size);

/* Finds the flow of a packet whose `inner_length` is good; false: its headers are malformed. */
bool inner_flow(const uint8_t *packet, size_t length, struct esp_flow *flow);

/* Of a packet whose `inner_length` is good. IPv6 is never fragmented on its way. */
uint8_t inner_traffic_class(const uint8_t *packet);
bool inner_dont_fragment(const uint8_t *packet);

/* Gives the packet the ECN field that it has after a tunnel (RFC 6040, 4.2); false: drop it.
 * `outer`: the traffic class of the outer header. */
bool inner_decapsulate_ecn(uint8_t *packet, uint8_t outer);

static inline uint16_t load16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static inline uint32_t load32(const uint8_t *at)
{
    return (uint32_t)load16(at) << 16 | load16(at + 2);
}

static inline void store16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)(value >> 8), at[1] = (uint8_t)value;
}

static inline void store32(uint8_t *at, uint32_t value)
{
    store16(at, (uint16_t)(value >> 16)), store16(at + 2, (uint16_t)value);
}

#endif
