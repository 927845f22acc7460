/* Cutting super-packets, as tcp_gso_segment() and __udp_gso_segment() do. */
#include "offload/offload_private.h"

/* Find TCP or UDP behind the IP header of a super-packet; fragments have none. */
static int find_transport(struct split *split)
{
    const uint8_t *packet = split->packet;
    uint32_t at = 40;

    if (packet[0] >> 4 == 4) {
        if (packet[6] & 0x3F || packet[7])
            return OFFLOAD_MALFORMED;
        split->protocol = packet[9];
        split->transport = (packet[0] & 15u) * 4;
        return 0;
    }
    split->protocol = packet[6];
    for (int headers = 0; headers < 8; headers++) {
        if (split->protocol != HOP_BY_HOP && split->protocol != ROUTING && split->protocol != DESTINATION) {
            split->transport = at;
            return 0;
        }
        if (at + 8 > split->length)
            return OFFLOAD_MALFORMED;
        split->protocol = packet[at];
        at += (packet[at + 1] + 1u) * 8;
        if (at > split->length)
            return OFFLOAD_MALFORMED;
    }
    return OFFLOAD_UNSUPPORTED;
}

static int begin_whole(struct split *split, const struct virtio_net_hdr *header)
{
    split->header = split->length;
    split->count = 1;
    if (header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        uint32_t start = header->csum_start, at = start + header->csum_offset;

        if (start < 20 || at + 2 > split->length)
            return OFFLOAD_MALFORMED;
        split->transport = start;
        split->checksum_at = at;
    }
    return 1;
}

static int begin_segments(struct split *split, const struct virtio_net_hdr *header)
{
    const uint8_t *transport;
    uint32_t rest, at;
    int needs = header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM, failed = find_transport(split);

    if (failed)
        return failed;
    transport = split->packet + split->transport;
    rest = split->length - split->transport;
    if (split->protocol == TCP && rest >= TCP_HEADER) {
        uint32_t size = (transport[TCP_OFFSET] >> 4) * 4u;

        if (size < TCP_HEADER || size > rest)
            return OFFLOAD_MALFORMED;
        split->header = split->transport + size;
        at = TCP_CHECKSUM;
    } else if (split->protocol == UDP && rest >= UDP_HEADER) {
        split->header = split->transport + UDP_HEADER;
        at = UDP_CHECKSUM;
    } else {
        return OFFLOAD_MALFORMED;
    }
    if (needs && (header->csum_start != split->transport || header->csum_offset != at))
        return OFFLOAD_MALFORMED;
    split->checksum_at = split->transport + at;
    split->size = header->gso_size;
    split->count = (split->length - split->header + split->size - 1) / split->size;
    if (!split->count)
        split->count = 1;

    /* What stays the same: pseudo-header and header, without lengths, checksum, and sequence number and flags. */
    split->sum = pseudo(split->packet, split->protocol);
    if (!needs) { /* who gave it away did not finish it, nor ask for it to be finished: it has to be right */
        uint64_t sum = checksum_add(split->sum + word(rest), transport, rest);

        if (checksum_fold(sum) != 0xFFFF)
            return OFFLOAD_CHECKSUM;
    }
    if (split->protocol == TCP) {
        uint8_t fixed[60];

        memcpy(fixed, transport, split->header - split->transport);
        memset(fixed + TCP_SEQUENCE, 0, 4);
        memset(fixed + TCP_CHECKSUM, 0, 2);
        fixed[TCP_FLAGS] = 0;
        split->sum = checksum_add(split->sum, fixed, split->header - split->transport);
    } else {
        split->sum = checksum_add(split->sum, transport, 4);
    }
    return (int)split->count;
}

int split_begin(struct split *split, const uint8_t *frame, size_t length)
{
    struct virtio_net_hdr header;
    int version;

    memset(split, 0, sizeof *split);
    if (length < OFFLOAD_HEADER + 20 || length > OFFLOAD_HEADER + OFFLOAD_LARGEST_PACKET)
        return OFFLOAD_MALFORMED;
    memcpy(&header, frame, sizeof header);
    split->packet = frame + OFFLOAD_HEADER;
    split->length = (uint32_t)(length - OFFLOAD_HEADER);
    if (!is_whole(split->packet, split->length))
        return OFFLOAD_MALFORMED;
    version = split->packet[0] >> 4;
    switch (header.gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_NONE:
        return begin_whole(split, &header);
    case VIRTIO_NET_HDR_GSO_TCPV4:
    case VIRTIO_NET_HDR_GSO_TCPV6:
        split->protocol = TCP;
        break;
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        split->protocol = UDP;
        break;
    default:
        return OFFLOAD_UNSUPPORTED;
    }
    {
        uint8_t protocol = split->protocol;
        int count;

        if (!header.gso_size)
            return OFFLOAD_MALFORMED;
        count = begin_segments(split, &header);
        if (count < 0)
            return count;
        if (split->protocol != protocol)
            return OFFLOAD_MALFORMED;
        if (protocol == TCP && ((header.gso_type & 7) == VIRTIO_NET_HDR_GSO_TCPV4) != (version == 4))
            return OFFLOAD_MALFORMED;
        return count;
    }
}

uint32_t split_length(const struct split *split)
{
    uint32_t done, left;

    if (split->next >= split->count)
        return 0;
    done = split->next * split->size;
    left = split->length - split->header - done;
    return split->header + (left < split->size ? left : split->size);
}

/* Copy the packet, and complete its checksum as skb_checksum_help() does. */
static uint32_t copy_whole(struct split *split, uint8_t *to)
{
    memcpy(to, split->packet, split->length);
    if (split->checksum_at) {
        uint64_t sum = checksum_add(0, to + split->transport, split->length - split->transport);
        uint16_t field = (uint16_t)~checksum_fold(sum);

        store(to + split->checksum_at, field ? field : 0xFFFF);
    }
    split->next = 1;
    return split->length;
}

uint32_t split_next(struct split *split, uint8_t *to)
{
    uint32_t length = split_length(split), number = split->next, done = number * split->size;
    uint32_t payload, last = number + 1 == split->count;
    uint8_t *transport = to + split->transport;
    uint64_t sum;
    uint16_t field;

    if (!length)
        return 0;
    if (!split->size)
        return copy_whole(split, to);
    payload = length - split->header;
    memcpy(to, split->packet, split->header);
    if (to[0] >> 4 == 4) {
        put16(to + 2, length);
        put16(to + 4, get16(to + 4) + number);
        checksum_ip4(to, split->transport);
    } else {
        put16(to + 4, length - 40);
    }
    sum = split->sum + word(length - split->transport);
    if (split->protocol == TCP) {
        put32(transport + TCP_SEQUENCE, get32(transport + TCP_SEQUENCE) + done);
        if (number)
            transport[TCP_FLAGS] &= (uint8_t)~CWR;
        if (!last)
            transport[TCP_FLAGS] &= (uint8_t) ~(FIN | PSH);
        sum = checksum_header(sum, transport + TCP_SEQUENCE, 4) + word(transport[TCP_FLAGS]);
    } else {
        put16(transport + UDP_LENGTH, length - split->transport);
        sum += word(length - split->transport);
    }
    sum = checksum_copy(sum, to + split->header, split->packet + split->header + done, payload);
    field = (uint16_t)~checksum_fold(sum);
    store(to + split->checksum_at, field || split->protocol == TCP ? field : 0xFFFF);
    split->next++;
    return length;
}
