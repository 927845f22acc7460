/* Inner packets: headers, flows, ECN and checksums. */
#include "esp/inner.h"

#include <string.h>

enum { ICMP = 1, TCP = 6, UDP = 17, DCCP = 33, ICMPV6 = 58, SCTP = 132, MOBILITY = 135, UDP_LITE = 136 };
enum { HOP_BY_HOP = 0, ROUTING = 43, FRAGMENT = 44, AH = 51, DESTINATION = 60 };

#define MOST_EXTENSIONS 8   /* extension headers that are walked; who sends more wants to cost time */

size_t inner_length(const uint8_t *packet, size_t size)
{
    if (size >= 20 && packet[0] >> 4 == 4) {
        size_t total = load16(packet + 2), header = (packet[0] & 15) * 4u;
        return header >= 20 && header <= total && total <= size ? total : 0;
    }
    if (size >= 40 && packet[0] >> 4 == 6) {
        size_t total = 40u + load16(packet + 4);
        return total <= size ? total : 0;
    }
    return 0;
}

/* The ports, or what stands in for them (RFC 4301, 4.4.1.1). */
static void find_ports(const uint8_t *packet, size_t length, size_t offset, struct esp_flow *flow)
{
    if (offset + 4 > length)
        return;
    const uint8_t *start = packet + offset;
    switch (flow->protocol) {
    case TCP:
    case UDP:
    case DCCP:
    case SCTP:
    case UDP_LITE:
        flow->source_port = load16(start);
        flow->destination_port = load16(start + 2);
        break;
    case ICMP:
    case ICMPV6:
        flow->source_port = start[0];
        flow->destination_port = start[1];
        break;
    case MOBILITY: flow->source_port = start[2]; break;
    }
}

/* Sets the protocol, and `*offset` to the transport header, or to 0 in a later fragment. */
static bool walk(const uint8_t *packet, size_t length, struct esp_flow *flow, size_t *offset)
{
    size_t at = 40;
    uint8_t protocol = packet[6];
    for (int each = 0; each < MOST_EXTENSIONS; ++each) {
        size_t size;
        switch (protocol) {
        default:
            flow->protocol = protocol;
            *offset = at;
            return true;
        case HOP_BY_HOP:
        case ROUTING:
        case DESTINATION:
        case FRAGMENT:
        case AH: break;
        }
        if (at + 8 > length)
            return false;
        size = packet[at + 1];
        if (protocol == FRAGMENT) {
            if (packet[at + 2] || packet[at + 3] & 0xF8) {
                flow->protocol = packet[at];
                *offset = 0;
                return true;
            }
            size = 0;
        }
        size = protocol == AH ? (size + 2) * 4 : (size + 1) * 8;
        protocol = packet[at];
        at += size;
    }
    return false;
}

bool inner_flow(const uint8_t *packet, size_t length, struct esp_flow *flow)
{
    size_t offset;
    memset(flow, 0, sizeof *flow);
    if (packet[0] >> 4 == 4) {
        flow->version = 4;
        flow->protocol = packet[9];
        memcpy(flow->source, packet + 12, 4);
        memcpy(flow->destination, packet + 16, 4);
        offset = packet[6] & 0x1F || packet[7] ? 0 : (packet[0] & 15) * 4u;
    } else {
        flow->version = 6;
        memcpy(flow->source, packet + 8, 16);
        memcpy(flow->destination, packet + 24, 16);
        if (!walk(packet, length, flow, &offset))
            return false;
    }
    if (offset)
        find_ports(packet, length, offset, flow);
    return true;
}

uint8_t inner_traffic_class(const uint8_t *packet)
{
    return packet[0] >> 4 == 4 ? packet[1] : (uint8_t)((packet[0] & 15) << 4 | packet[1] >> 4);
}

bool inner_dont_fragment(const uint8_t *packet)
{
    return packet[0] >> 4 == 6 || packet[6] & 0x40;
}

static void set_ecn(uint8_t *packet, uint8_t ecn)
{
    if (packet[0] >> 4 == 6) {
        packet[1] = (uint8_t)((packet[1] & 0xCF) | ecn << 4);
        return;
    }
    uint32_t old = load16(packet), sum;
    packet[1] = (uint8_t)((packet[1] & 0xFC) | ecn);
    sum = (uint16_t)~load16(packet + 10) + (uint16_t)~old + load16(packet);   /* RFC 1624, equation 3 */
    sum = (sum & 0xFFFF) + (sum >> 16);
    sum = (sum & 0xFFFF) + (sum >> 16);
    store16(packet + 10, (uint16_t)~sum);
}

bool inner_decapsulate_ecn(uint8_t *packet, uint8_t outer)
{
    enum { NOT_ECT, ECT_1, ECT_0, CE };
    uint8_t mine = inner_traffic_class(packet) & 3;
    outer &= 3;
    if ((outer != CE && outer != ECT_1) || mine == outer || mine == CE)
        return true;
    if (mine == NOT_ECT)
        return outer != CE;
    set_ecn(packet, outer);
    return true;
}
