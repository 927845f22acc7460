/* Events for Python: a ring of bounded size, and an eventfd that is readable while the ring holds one. */
#define _GNU_SOURCE
#include <string.h>
#include <unistd.h>

#include "loop/state_private.h"

double loop_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void ring_write(struct loop *loop, uint64_t at, const void *data, size_t length)
{
    size_t start = at % EVENT_BYTES, first = length < EVENT_BYTES - start ? length : EVENT_BYTES - start;

    memcpy(loop->events + start, data, first);
    memcpy(loop->events, (const uint8_t *)data + first, length - first);
}

static void ring_read(struct loop *loop, uint64_t at, void *data, size_t length)
{
    size_t start = at % EVENT_BYTES, first = length < EVENT_BYTES - start ? length : EVENT_BYTES - start;

    memcpy(data, loop->events + start, first);
    memcpy((uint8_t *)data + first, loop->events, length - first);
}

void loop_wake_python(struct loop *loop)
{
    uint64_t one = 1;
    ssize_t ignored = write(loop->event_fd, &one, sizeof one); /* EAGAIN: it is readable anyway */

    (void)ignored;
}

/* Whose share of the ring an event takes: of its SA, or of the host that sent the inner packet. */
static uint32_t owner_of(const struct loop_event *event, const uint8_t *packet, uint32_t length)
{
    uint64_t owner = event->sa;

    if (!owner && length >= 40 && packet[0] >> 4 == 6)
        for (int at = 8; at < 24; at += 8) {
            uint64_t part;
            memcpy(&part, packet + at, 8);
            owner = owner * 31 + part;
        }
    else if (!owner && length >= 20 && packet[0] >> 4 == 4)
        memcpy(&owner, packet + 12, 4);
    return (uint32_t)((owner * 0x9E3779B97F4A7C15u) >> 32) % EVENT_OWNERS;
}

void loop_put_event(struct loop *loop, const struct loop_event *event, const uint8_t *packet)
{
    uint32_t length = packet ? event->length : 0;
    uint32_t record[2] = {length, owner_of(event, packet, length)}, *share = &loop->event_share[record[1]];
    uint64_t needed = sizeof *event + sizeof record + length;
    int first, fits;

    pthread_mutex_lock(&loop->event_lock);
    first = loop->event_head == loop->event_tail;
    fits = loop->event_head - loop->event_tail + needed <= EVENT_BYTES;
    if (packet && *share + needed > EVENT_BYTES / 2)
        fits = 0;   /* the other half is for the others */
    if (fits) {
        ring_write(loop, loop->event_head, event, sizeof *event);
        ring_write(loop, loop->event_head + sizeof *event, record, sizeof record);
        if (length)
            ring_write(loop, loop->event_head + sizeof *event + sizeof record, packet, length);
        loop->event_head += needed;
        *share += (uint32_t)needed;
        loop->events_up++;
    } else {
        loop->events_lost++;
    }
    pthread_mutex_unlock(&loop->event_lock);
    if (first && fits)
        loop_wake_python(loop);
}

int loop_next_event(struct loop *loop, struct loop_event *event, uint8_t *packet, uint32_t room)
{
    uint32_t record[2];
    uint64_t ignored;
    int found;

    pthread_mutex_lock(&loop->event_lock);
    found = loop->event_head != loop->event_tail;
    if (found) {
        ring_read(loop, loop->event_tail, event, sizeof *event);
        uint32_t length;

        ring_read(loop, loop->event_tail + sizeof *event, record, sizeof record);
        length = record[0];
        if (length)
            ring_read(loop, loop->event_tail + sizeof *event + sizeof record, packet, length < room ? length : room);
        if (length > room)
            event->length = room;
        loop->event_tail += sizeof *event + sizeof record + length;
        loop->event_share[record[1]] -= (uint32_t)(sizeof *event + sizeof record + length);
    } else if (read(loop->event_fd, &ignored, sizeof ignored) < 0) {
        ignored = 0; /* it was not readable */
    }
    pthread_mutex_unlock(&loop->event_lock);
    return found;
}

int loop_event_descriptor(struct loop *loop)
{
    return loop->event_fd;
}

void loop_tun_failed(struct loop *loop, int error)
{
    struct loop_event event = {.kind = LOOP_TUN_GONE, .length = (uint32_t)error};

    if (!__atomic_exchange_n(&loop->tun_failed, 1, __ATOMIC_RELAXED))
        loop_put_event(loop, &event, NULL);
}
