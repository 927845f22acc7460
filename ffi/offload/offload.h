/* Segmentation and its reversal for packets that a TUN device carries behind a struct virtio_net_hdr.
 *
 * The kernel hands out TCP (and UDP) super-packets of up to 64 KiB with unfinished checksums; `split`
 * makes the packets of them that go on the wire, as tcp_gso_segment() does. `merge` is the reverse for
 * received packets, by the rules of tcp_gro_receive() and udp_gro_receive(). Pure functions on memory:
 * no I/O, no allocation, nothing is read outside the lengths given.
 */
#ifndef NATCOMPAT_OFFLOAD_H
#define NATCOMPAT_OFFLOAD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* cffi: begin */
#define OFFLOAD_HEADER 10                   /* struct virtio_net_hdr, in the machine's byte order */
#define OFFLOAD_LARGEST_PACKET 65575        /* an IPv6 packet: 40 + 65535 */

/* Why a frame cannot be split. */
enum { OFFLOAD_MALFORMED = -1, OFFLOAD_UNSUPPORTED = -2, OFFLOAD_CHECKSUM = -3 };

struct split {
    const uint8_t *packet;
    uint32_t length;        /* of the whole packet */
    uint32_t transport;     /* where the TCP or UDP header is */
    uint32_t header;        /* bytes in front of the payload; of a frame that is not segmented, all */
    uint32_t size;          /* payload bytes per segment; 0: not segmented */
    uint32_t count;         /* packets that it makes */
    uint32_t next;          /* the one that is made next */
    uint32_t checksum_at;   /* of the field; 0: there is nothing to complete */
    uint64_t sum;           /* of what the checksums of all segments have in common */
    uint8_t protocol;
};

/* Begin to split `frame`: a virtio_net_hdr and one IP packet, which is not changed, and has to stay.
 * Return how many packets it makes, or a reason.
 */
int split_begin(struct split *split, const uint8_t *frame, size_t length);

/* Return how long the next packet will be; 0: there is no more. */
uint32_t split_length(const struct split *split);

/* Make the next packet at `to`, which has room for it, and return its length; 0: there is no more. */
uint32_t split_next(struct split *split, uint8_t *to);

/* ---- merging */

#define MERGE_MOST 1024    /* packets, and so frames, of one batch */
#define MERGE_BUCKETS 256
#define MERGE_TCP_PARTS 256 /* what fits in an iovec array that a system call takes, with room to spare */
#define MERGE_UDP_PARTS 64  /* UDP_MAX_SEGMENTS of older kernels */

/* Kinds of super-packets. */
enum { MERGE_TCP4 = 1, MERGE_TCP6 = 2, MERGE_UDP4 = 4, MERGE_UDP6 = 8 };

struct merge_frame {
    uint8_t *packet;    /* the first packet; its headers become those of the frame */
    uint32_t length;    /* of the packet that the frame holds */
    uint32_t parts;
    uint32_t size;      /* payload of the first, and of all but the last */
    uint32_t sequence;  /* TCP: what has to come next */
    uint16_t first, last;
    uint16_t transport, header;
    uint16_t id, id_step; /* IPv4: the identifier of the last packet, and how they go on: by 0 or 1 */
    uint8_t protocol, closed, verified;
    uint8_t flags;        /* of TCP; of UDP: whether its packets have no checksum */
};

struct merge_part {
    uint8_t *data;
    uint32_t length;
    uint16_t next;
};

struct merge {
    uint32_t parts, frames;
    int kinds;          /* of super-packets that the device takes: MERGE_TCP4 and so on, or'ed */
    uint64_t merged;    /* packets that went into another's frame, ever */
    uint64_t bad_checksums; /* that were left alone for theirs, ever */
    struct merge_part part[MERGE_MOST];
    struct merge_frame frame[MERGE_MOST];
    uint16_t bucket[MERGE_BUCKETS]; /* number of the newest frame of a flow, plus 1 */
};

/* Forget the batch. What is counted stays. */
void merge_begin(struct merge *merge);

/* Take an IP packet, which has to stay, and be writable, until the frames are written.
 * Return -1 when the batch is full.
 */
int merge_add(struct merge *merge, uint8_t *packet, uint32_t length);

/* Return the kind of a frame of several packets. */
int merge_kind(const struct merge_frame *frame);

/* Finish frame `number` (from 0, in the order to write them): its virtio_net_hdr goes to `header`, what
 * to write to `iov`, which has room for `room` pieces. Return their number, or -1 if there is not the room.
 * A frame of several packets has a checksum that the kernel takes on trust: all of them were right.
 */
int merge_finish(struct merge *merge, uint32_t number, uint8_t *header, struct iovec *iov, int room);
/* cffi: end */

#endif
