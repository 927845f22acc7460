/* To the TUN: frames of one packet or of several. Kernels refuse the latter here and there, by kind and by length;
 * what is refused is written packet by packet, and that kind is merged no more. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "loop/write_private.h"

enum { FRAME_ROOM = OFFLOAD_HEADER + OFFLOAD_LARGEST_PACKET, UDP_PROTOCOL = 17, UDP_CHECKSUM_AT = 6 };

static void note_failure(struct loop *loop, int error)
{
    if (error == EBADFD || error == EBADF || error == ENODEV)
        loop_tun_failed(loop, error);
}

static int write_packet(struct loop *loop, uint8_t *header, uint8_t *packet, uint32_t length)
{
    struct iovec pieces[2] = {{header, OFFLOAD_HEADER}, {packet, length}};

    if (writev(loop->tun, pieces, 2) >= 0)
        return 1;
    note_failure(loop, errno);
    return 0;
}

/* Takes `pieces` apart again and writes the packets. Returns how many the TUN took. */
static uint32_t write_singly(struct worker *worker, const struct merge_frame *frame, const struct iovec *pieces, int count)
{
    struct receiver *receiver = worker->receiver;
    uint8_t header[OFFLOAD_HEADER] = {0}, *whole, *packet;
    uint32_t written = 0, length = 0;
    struct split split;

    if (!receiver->frame)
        receiver->frame = malloc(2 * FRAME_ROOM);
    if (!receiver->frame)
        return 0;
    whole = receiver->frame;
    packet = whole + FRAME_ROOM;
    for (int piece = 0; piece < count; piece++) {
        memcpy(whole + length, pieces[piece].iov_base, pieces[piece].iov_len);
        length += (uint32_t)pieces[piece].iov_len;
    }
    if (split_begin(&split, whole, length) < 0)
        return 0;
    while ((length = split_next(&split, packet))) {
        if (frame->protocol == UDP_PROTOCOL && frame->flags) /* they came without a checksum */
            memset(packet + frame->transport + UDP_CHECKSUM_AT, 0, 2);
        written += (uint32_t)write_packet(worker->loop, header, packet, length);
    }
    return written;
}

static void give_up(struct loop *loop, int kind, int error)
{
    struct loop_event event = {.kind = LOOP_REFUSED, .length = (uint32_t)kind, .sa = (uint64_t)error};

    if (__atomic_fetch_and(&loop->kinds, ~kind, __ATOMIC_RELAXED) & kind)
        loop_put_event(loop, &event, NULL);
}

static int is_refusal(int error)
{
    return error == EINVAL || error == EIO || error == EOPNOTSUPP || error == EMSGSIZE || error == E2BIG;
}

void loop_write(struct worker *worker)
{
    struct receiver *receiver = worker->receiver;
    struct loop *loop = worker->loop;
    uint8_t header[OFFLOAD_HEADER];

    for (uint32_t number = 0; number < receiver->merge.frames; number++) {
        const struct merge_frame *frame = &receiver->merge.frame[number];
        uint32_t parts = frame->parts, written = 0;
        int pieces = merge_finish(&receiver->merge, number, header, receiver->pieces, MERGE_TCP_PARTS + 1), error;

        if (READ(loop->tun_failed) || loop->tun < 0) {
            COUNT(worker->counters.unwritten, parts);
            continue;
        }
        if (writev(loop->tun, receiver->pieces, pieces) >= 0) {
            COUNT(worker->counters.written, 1);
            continue;
        }
        error = errno;
        note_failure(loop, error);
        if (parts > 1 && is_refusal(error)) {
            written = write_singly(worker, frame, receiver->pieces, pieces);
            if (written) { /* else it is down, and takes nothing at all */
                give_up(loop, merge_kind(frame), error);
                COUNT(worker->counters.refused, 1);
            }
        }
        COUNT(worker->counters.written, written);
        COUNT(worker->counters.unwritten, parts - written);
    }
}
