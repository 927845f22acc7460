/* Merging packets of one flow, as tcp_gro_receive() and udp_gro_receive() do. */
#include "offload/offload_private.h"

/* What the headers of a packet say that may be merged. */
struct parsed {
    uint16_t transport, header;
    uint32_t payload;
    uint8_t protocol, flags;
    uint32_t bucket;
};

/* Return whether `packet` is of a kind that can be merged at all. */
static int parse(const uint8_t *packet, uint32_t length, int kinds, struct parsed *parsed)
{
    const uint8_t *transport;
    uint32_t hash;

    if (!is_whole(packet, length))
        return 0;
    if (packet[0] == 0x45) {
        if (packet[6] & 0x3F || packet[7]) /* no fragments */
            return 0;
        kinds &= MERGE_TCP4 | MERGE_UDP4;
        parsed->protocol = packet[9];
        parsed->transport = 20;
        hash = get32(packet + 12) * 3 ^ get32(packet + 16);
    } else if (packet[0] >> 4 == 6) {
        parsed->protocol = packet[6];
        parsed->transport = 40;
        kinds &= MERGE_TCP6 | MERGE_UDP6;
        hash = get32(packet + 20) * 3 ^ get32(packet + 36);
    } else {
        return 0; /* IPv4 options */
    }
    transport = packet + parsed->transport;
    length -= parsed->transport;
    if (parsed->protocol == TCP && kinds & (MERGE_TCP4 | MERGE_TCP6) && length >= TCP_HEADER) {
        uint32_t size = (transport[TCP_OFFSET] >> 4) * 4u;

        parsed->flags = transport[TCP_FLAGS];
        if (size < TCP_HEADER || size > length)
            return 0;
        parsed->header = (uint16_t)(parsed->transport + size);
        parsed->payload = length - size;
    } else if (parsed->protocol == UDP && kinds & (MERGE_UDP4 | MERGE_UDP6) && length >= UDP_HEADER) {
        if (get16(transport + UDP_LENGTH) != length)
            return 0;
        parsed->flags = !get16(transport + UDP_CHECKSUM);
        if (parsed->flags && parsed->transport == 40)
            return 0; /* IPv6 has no UDP without a checksum (RFC 8200, 8.1) but for tunnels (RFC 6935) */
        parsed->header = (uint16_t)(parsed->transport + UDP_HEADER);
        parsed->payload = length - UDP_HEADER;
    } else {
        return 0;
    }
    hash ^= get32(transport) * 0x9E3779B1u ^ parsed->protocol;
    parsed->bucket = (hash ^ hash >> 8 ^ hash >> 16 ^ hash >> 24) % MERGE_BUCKETS;
    return 1;
}

/* Return whether the checksums of IP header and transport are right. */
static int verify(const uint8_t *packet, uint32_t length, uint16_t transport, uint8_t protocol)
{
    uint32_t rest = length - transport;
    uint64_t sum;

    if (packet[0] == 0x45 && checksum_fold(checksum_header(0, packet, 20)) != 0xFFFF)
        return 0;
    if (protocol == UDP && !get16(packet + transport + UDP_CHECKSUM))
        return 1; /* it has none */
    sum = checksum_add(pseudo(packet, protocol) + word(rest), packet + transport, rest);
    return checksum_fold(sum) == 0xFFFF;
}

static int same_flow(const uint8_t *one, const uint8_t *other, const struct merge_frame *frame, const struct parsed *parsed)
{
    if (frame->protocol != parsed->protocol || frame->transport != parsed->transport || one[0] >> 4 != other[0] >> 4)
        return 0;
    if (memcmp(one + parsed->transport, other + parsed->transport, 4) != 0)
        return 0;
    return parsed->transport == 20 ? memcmp(one + 12, other + 12, 8) == 0 : memcmp(one + 8, other + 8, 32) == 0;
}

/* Return whether all that the frame says for all of its packets holds for the new one. */
static int same_headers(const uint8_t *first, const uint8_t *new, struct merge_frame *frame, const struct parsed *parsed)
{
    const uint8_t *a = first + parsed->transport, *b = new + parsed->transport;

    if (frame->header != parsed->header)
        return 0;
    if (parsed->transport == 20) {
        uint16_t id = get16(new + 4), step = (uint16_t)(id - frame->id);

        /* traffic class; DF and reserved; TTL. Who cuts it up again counts identifiers on; with DF they mean nothing. */
        if (first[1] != new[1] || first[6] != new[6] || first[8] != new[8])
            return 0;
        if (step > 1 || (!step && !(new[6] & 0x40)))
            return 0;
        if (frame->parts > 1 && step != frame->id_step)
            return 0;
        frame->id_step = step;
    } else if (memcmp(first, new, 4) != 0 || first[7] != new[7]) { /* class and flow label; hop limit */
        return 0;
    }
    if (parsed->protocol == UDP)
        return frame->flags == parsed->flags; /* all have a checksum, or none (udp_gro_receive()) */
    return get32(b + TCP_SEQUENCE) == frame->sequence && memcmp(a + 8, b + 8, 4) == 0 /* acknowledged */
        && a[TCP_OFFSET] == b[TCP_OFFSET]                                              /* with reserved bits and AE */
        && !((frame->flags ^ parsed->flags) & ~(FIN | PSH) & 0xFF) && memcmp(a + 14, b + 14, 2) == 0 /* window */
        && memcmp(a + TCP_HEADER, b + TCP_HEADER, parsed->header - parsed->transport - TCP_HEADER) == 0;
}

/* Put the packet into `frame`, if it fits there. */
static int join(struct merge *merge, struct merge_frame *frame, uint8_t *packet, uint32_t length, const struct parsed *parsed)
{
    uint32_t most = parsed->protocol == UDP ? MERGE_UDP_PARTS : MERGE_TCP_PARTS;

    if (frame->closed || !parsed->payload || parsed->payload > frame->size || frame->parts >= most)
        return 0;
    if (frame->length + parsed->payload > 65535)
        return 0;
    if (parsed->protocol == TCP && parsed->flags & (SYN | RST | URG | CWR))
        return 0;
    if (!same_headers(frame->packet, packet, frame, parsed))
        return 0;
    if (!verify(packet, length, parsed->transport, parsed->protocol)) {
        merge->bad_checksums++;
        return 0;
    }
    if (!frame->verified) {
        if (!verify(frame->packet, frame->length, frame->transport, frame->protocol)) {
            merge->bad_checksums++;
            return 0;
        }
        frame->verified = 1;
    }
    merge->part[merge->parts].data = packet + parsed->header;
    merge->part[merge->parts].length = parsed->payload;
    merge->part[frame->last].next = (uint16_t)merge->parts;
    frame->last = (uint16_t)merge->parts++;
    frame->parts++;
    frame->length += parsed->payload;
    frame->sequence += parsed->payload;
    frame->id = (uint16_t)(frame->id + frame->id_step);
    frame->closed = parsed->payload < frame->size;
    if (parsed->protocol == TCP) {
        frame->flags |= parsed->flags & (FIN | PSH);
        frame->closed |= (parsed->flags & (FIN | PSH)) != 0;
    }
    merge->merged++;
    return 1;
}

void merge_begin(struct merge *merge)
{
    merge->parts = merge->frames = 0;
    memset(merge->bucket, 0, sizeof merge->bucket);
}

int merge_add(struct merge *merge, uint8_t *packet, uint32_t length)
{
    struct merge_frame *frame;
    struct parsed parsed;
    int may;

    if (merge->parts >= MERGE_MOST)
        return -1;
    may = parse(packet, length, merge->kinds, &parsed);
    if (may && merge->bucket[parsed.bucket]) {
        frame = &merge->frame[merge->bucket[parsed.bucket] - 1];
        if (same_flow(frame->packet, packet, frame, &parsed) && join(merge, frame, packet, length, &parsed))
            return 0;
    }
    frame = &merge->frame[merge->frames++];
    frame->packet = packet;
    frame->length = length;
    frame->parts = 1;
    frame->first = frame->last = (uint16_t)merge->parts;
    frame->closed = 1;
    if (may) { /* what follows of the flow may not pass it, so it takes the older one's place in any case */
        merge->bucket[parsed.bucket] = (uint16_t)merge->frames;
        frame->size = parsed.payload;
        frame->transport = parsed.transport;
        frame->header = parsed.header;
        frame->protocol = parsed.protocol;
        frame->flags = parsed.flags;
        frame->verified = 0;
        frame->id = parsed.transport == 20 ? get16(packet + 4) : 0;
        frame->id_step = 0;
        frame->sequence = parsed.protocol == TCP ? get32(packet + parsed.transport + TCP_SEQUENCE) + parsed.payload : 0;
        frame->closed = !parsed.payload;
        if (parsed.protocol == TCP)
            frame->closed |= (parsed.flags & (FIN | SYN | RST | PSH | URG | CWR)) != 0;
    }
    merge->part[merge->parts].data = packet;
    merge->part[merge->parts].length = length;
    merge->parts++;
    return 0;
}

int merge_kind(const struct merge_frame *frame)
{
    int v4 = frame->transport == 20;

    if (frame->protocol == TCP)
        return v4 ? MERGE_TCP4 : MERGE_TCP6;
    return v4 ? MERGE_UDP4 : MERGE_UDP6;
}

/* Make the headers of the first packet those of the whole. */
static void write_headers(const struct merge_frame *frame, struct virtio_net_hdr *header)
{
    uint8_t *packet = frame->packet, *transport = packet + frame->transport;
    uint32_t rest = frame->length - frame->transport;
    uint64_t sum = pseudo(packet, frame->protocol) + word(rest);
    int v4 = packet[0] >> 4 == 4;

    if (v4) {
        put16(packet + 2, frame->length);
        checksum_ip4(packet, frame->transport);
    } else {
        put16(packet + 4, frame->length - 40);
    }
    header->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    header->hdr_len = frame->header;
    header->gso_size = (uint16_t)frame->size;
    header->csum_start = frame->transport;
    if (frame->protocol == TCP) {
        transport[TCP_FLAGS] = frame->flags;
        header->gso_type = v4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
        header->csum_offset = TCP_CHECKSUM;
    } else {
        put16(transport + UDP_LENGTH, rest);
        header->gso_type = VIRTIO_NET_HDR_GSO_UDP_L4;
        header->csum_offset = UDP_CHECKSUM;
    }
    store(transport + header->csum_offset, checksum_fold(sum));
}

int merge_finish(struct merge *merge, uint32_t number, uint8_t *header, struct iovec *iov, int room)
{
    const struct merge_frame *frame = &merge->frame[number];
    struct virtio_net_hdr virtio;
    uint32_t part = frame->first;

    if (number >= merge->frames || room < 0 || (uint32_t)room < frame->parts + 1)
        return -1;
    memset(&virtio, 0, sizeof virtio);
    if (frame->parts > 1)
        write_headers(frame, &virtio);
    memcpy(header, &virtio, sizeof virtio);
    iov[0].iov_base = header;
    iov[0].iov_len = sizeof virtio;
    for (uint32_t piece = 1; piece <= frame->parts; piece++) {
        iov[piece].iov_base = merge->part[part].data;
        iov[piece].iov_len = merge->part[part].length;
        part = merge->part[part].next;
    }
    return (int)frame->parts + 1;
}
