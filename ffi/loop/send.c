/* From the TUN to the ESP sockets: read, split, seal, and send runs of equal size with one call. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/udp.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "loop/send_private.h"
#include "loop/addresses_private.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum {
    FRAME_ROOM = (OFFLOAD_HEADER + OFFLOAD_LARGEST_PACKET + 7) & ~7,
    READS = 64,             /* at most, before other descriptors have their turn */
    ENOUGH = 32,            /* packets that are worth a system call, even if there are more to come */
    MOST_SEGMENTS = 64,     /* UDP_MAX_SEGMENTS of older kernels */
    MOST_BYTES = 65507,     /* the UDP payload of IPv4 */
    PATIENCE = 20,          /* milliseconds that are waited for room in a socket's queue */
};

/* What a message to be sent is made of. */
struct message {
    struct loop_socket *socket;
    uint32_t first, count;
    uint8_t dont_fragment;
};

/* Makes message `slot` of `count` packets from `first` on. */
static void write_message(struct sender *sender, int slot, const struct loop_socket *socket, uint32_t first, uint32_t count,
                          int with_source)
{
    const struct esp_packet *packet = &sender->packets[first];
    struct msghdr *message = &sender->messages[slot].msg_hdr;

    memset(message, 0, sizeof *message);
    memset(sender->control[slot], 0, sizeof sender->control[slot]);
    message->msg_name = &sender->names[slot];
    message->msg_namelen = loop_write_name(&packet->peer, socket, &sender->names[slot]);
    message->msg_iov = &sender->iov[first];
    message->msg_iovlen = count;
    message->msg_control = sender->control[slot];
    if (count > 1) {
        uint16_t size = (uint16_t)packet->length;

        loop_add_control(message, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size);
    }
    if (packet->traffic_class) {
        int class = packet->traffic_class;

        if (packet->peer.version == 4)
            loop_add_control(message, IPPROTO_IP, IP_TOS, &class, sizeof class);
        else
            loop_add_control(message, IPPROTO_IPV6, IPV6_TCLASS, &class, sizeof class);
    }
    if (with_source && socket->bound.any && packet->local.version == packet->peer.version)
        loop_add_source(message, socket, &packet->local);
    if (!message->msg_controllen)
        message->msg_control = NULL;
}

/* DF is the socket's: the kernel takes no ancillary data for it. */
static void set_discovery(struct loop_socket *socket, int version, int dont_fragment)
{
    int value = dont_fragment ? IP_PMTUDISC_DO : IP_PMTUDISC_DONT;
    int key = value + (version == 4 ? 0 : 16);

    if (socket->discover == key)
        return;
    if (version == 4) {
        setsockopt(socket->fd, IPPROTO_IP, IP_MTU_DISCOVER, &value, sizeof value);
    } else {
        value = dont_fragment ? IPV6_PMTUDISC_DO : IPV6_PMTUDISC_DONT;
        setsockopt(socket->fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, &value, sizeof value);
    }
    socket->discover = key;
}

/* Wait until the socket takes more, for a bounded time and while nobody wants the thread to stop, or the table. */
static int wait_for_room(struct worker *worker, int fd)
{
    struct pollfd wanted[2] = {{.fd = fd, .events = POLLOUT}, {.fd = worker->wake, .events = POLLIN}};

    if (__atomic_load_n(&worker->loop->wanted, __ATOMIC_SEQ_CST))
        return 0; /* and who wanted it has woken this thread, so that the rest of the batch does not wait, either */
    return poll(wanted, 2, PATIENCE) > 0 && wanted[0].revents & POLLOUT;
}

static int send_messages(struct worker *worker, struct loop_socket *socket, int slot, int count)
{
    struct sender *sender = worker->sender;

    for (int attempt = 0;; attempt++) {
        int sent = sendmmsg(socket->fd, sender->messages + slot, (unsigned)count, MSG_DONTWAIT | MSG_NOSIGNAL);

        COUNT(socket->counters.send_calls, 1);
        if (sent > 0)
            return sent;
        if (errno == EINTR || (errno == ECONNREFUSED && attempt < 4)) /* the latter: of something sent before */
            continue;
        if (errno == EAGAIN && attempt < 4 && wait_for_room(worker, socket->fd))
            continue;
        if (errno == ENOBUFS && attempt < 4) { /* a device's queue is full, and nothing tells when it is not */
            poll(NULL, 0, 1);
            continue;
        }
        return -1;
    }
}

/* Cut the inner packet again that packet `number` carries, and let Python say that it is too big. */
static void report_too_big(struct worker *worker, uint32_t number)
{
    struct sender *sender = worker->sender;
    const struct esp_packet *packet = &sender->packets[number];
    struct split split;
    static _Thread_local uint8_t inner[OFFLOAD_LARGEST_PACKET];
    uint32_t length = 0;
    struct loop_event event = {
        .kind = LOOP_TOO_BIG,
        .sa = packet->sa,
        .peer = packet->peer,
    };

    if (split_begin(&split, sender->frames + sender->origin[number].frame, sender->origin[number].length) < 0)
        return;
    split.next = sender->origin[number].number;
    if (split_length(&split) <= sizeof inner)
        length = split_next(&split, inner);
    event.length = length;
    if (length)
        loop_put_event(worker->loop, &event, inner);
}

/* Send the packets of a message that failed as a whole one by one. */
static void send_each(struct worker *worker, struct loop_socket *socket, uint32_t first, uint32_t count)
{
    struct sender *sender = worker->sender;
    int reported = 0, invalid = count > 1 && errno == EINVAL && sender->packets[first].dont_fragment;

    for (uint32_t number = first; number < first + count; number++) {
        int sent;

        write_message(sender, 0, socket, number, 1, 1);
        sent = send_messages(worker, socket, 0, 1);
        if (sent < 0 && socket->bound.any && errno != EMSGSIZE) { /* what the SA calls our address is none of this host */
            write_message(sender, 0, socket, number, 1, 0);
            sent = send_messages(worker, socket, 0, 1);
        }
        if (sent > 0) {
            COUNT(socket->counters.sent, 1);
            continue;
        }
        invalid = 0;
        if (errno == EMSGSIZE) {
            COUNT(worker->counters.too_big, 1);
            if (!reported++) /* one answer for a flight is enough */
                report_too_big(worker, number);
        } else {
            COUNT(socket->counters.unsent, 1);
        }
    }
    if (invalid) /* each was good, so it was not their size: as where SO_NO_CHECK is set */
        socket->segments = 0;
}

/* Send a series of messages by one socket. */
static void send_series(struct worker *worker, const struct message *series, int count)
{
    struct sender *sender = worker->sender;
    struct loop_socket *socket = series[0].socket;

    set_discovery(socket, sender->packets[series[0].first].peer.version, series[0].dont_fragment);
    for (int slot = 0; slot < count; slot++)
        write_message(sender, slot, socket, series[slot].first, series[slot].count, 1);
    for (int done = 0; done < count;) {
        int sent = send_messages(worker, socket, done, count - done);

        if (sent < 0) {
            if (series[done].count > 1 && (errno == EIO || errno == EOPNOTSUPP))
                socket->segments = 0; /* a device that computes no checksums */
            if (errno == EMSGSIZE || socket->bound.any
                || (series[done].count > 1 && (errno == EINVAL || !socket->segments))) {
                /* by the first slot, which is this one or has been sent */
                send_each(worker, socket, series[done].first, series[done].count);
            } else {
                COUNT(socket->counters.unsent, series[done].count);
            }
            done++;
            continue;
        }
        for (int slot = done; slot < done + sent; slot++)
            COUNT(socket->counters.sent, series[slot].count);
        done += sent;
    }
}

/* Return whether `next` can follow `first` in one message, in which all have a size but the last. */
static int continues(const struct esp_packet *first, const struct esp_packet *before, const struct esp_packet *next)
{
    return next->length <= first->length && before->length == first->length && memcmp(&next->local, &first->local, sizeof next->local) == 0
        && next->traffic_class == first->traffic_class && next->dont_fragment == first->dont_fragment
        && memcmp(&next->peer, &first->peer, sizeof next->peer) == 0;
}

static void send_packets(struct worker *worker)
{
    struct sender *sender = worker->sender;
    struct loop *loop = worker->loop;
    struct message series[SEND_PACKETS];
    int messages = 0;
    uint32_t at = 0;

    pthread_mutex_lock(&loop->send_lock);
    while (at < sender->count) {
        struct esp_packet *first = &sender->packets[at];
        uint32_t count = 1, bytes = first->length;
        struct loop_socket *socket;

        if (first->result != ESP_DONE) {
            at++;
            continue;
        }
        socket = loop_find_socket(loop, first);
        if (!socket) {
            struct loop_event event = {
                .kind = LOOP_SEND,
                .length = first->length,
                .sa = first->sa,
                .peer = first->peer,
                .traffic_class = first->traffic_class,
                .dont_fragment = first->dont_fragment,
            };

            loop_put_event(loop, &event, first->data);
            at++;
            continue;
        }
        while (socket->segments && at + count < sender->count && count < MOST_SEGMENTS) {
            const struct esp_packet *next = &sender->packets[at + count];

            if (next->result != ESP_DONE || bytes + next->length > MOST_BYTES || !continues(first, next - 1, next))
                break;
            bytes += next->length;
            count++;
        }
        for (uint32_t number = at; number < at + count; number++) {
            sender->iov[number].iov_base = sender->packets[number].data;
            sender->iov[number].iov_len = sender->packets[number].length;
        }
        if (messages
            && (series[0].socket != socket || series[0].dont_fragment != first->dont_fragment
                || sender->packets[series[0].first].peer.version != first->peer.version)) {
            send_series(worker, series, messages);
            messages = 0;
        }
        series[messages++] = (struct message){socket, at, count, first->dont_fragment};
        at += count;
    }
    if (messages)
        send_series(worker, series, messages);
    pthread_mutex_unlock(&loop->send_lock);
}

/* Seal what has been collected, hand up what is Python's, and send the rest. */
static void seal_packets(struct worker *worker)
{
    struct sender *sender = worker->sender;
    struct loop *loop = worker->loop;
    double now = loop_now();
    int count = (int)sender->count;

    for (int done = 0; done < count;) {
        struct esp_packet *packets = sender->packets + done;
        int part = esp_seal_burst(loop->path, packets, count - done, now);

        for (int i = 0; i < part; i++) {
            if (packets[i].result == ESP_UP) {
                struct loop_event event = {.kind = LOOP_SEAL, .length = packets[i].length};

                loop_put_event(loop, &event, packets[i].data);
            }
        }
        done += part;
    }
    send_packets(worker);
    COUNT(worker->counters.packets, count);
    if (esp_due_pending(loop->path))
        loop_wake_python(loop);
    sender->count = sender->arena_used = 0;
}

/* Cut one frame, and seal whenever there is no more room. */
static void take_frame(struct worker *worker, uint32_t at, uint32_t length)
{
    struct sender *sender = worker->sender;
    struct split split;
    uint32_t next;

    COUNT(worker->counters.frames, 1);
    if (split_begin(&split, sender->frames + at, length) < 0) {
        COUNT(worker->counters.malformed, 1);
        return;
    }
    while ((next = split_length(&split)) > 0) {
        uint32_t stride = (ESP_HEADROOM + next + ESP_TAILROOM + 63) & ~63u;
        struct esp_packet *packet;

        if (sender->count == SEND_PACKETS || sender->arena_used + stride > SEND_ARENA)
            seal_packets(worker);
        packet = &sender->packets[sender->count];
        memset(packet, 0, sizeof *packet);
        packet->data = sender->arena + sender->arena_used + ESP_HEADROOM;
        packet->room = stride - ESP_HEADROOM;
        sender->origin[sender->count].frame = at;
        sender->origin[sender->count].length = length;
        sender->origin[sender->count].number = split.next;
        packet->length = split_next(&split, packet->data);
        sender->arena_used += stride;
        sender->count++;
    }
}

int loop_send(struct worker *worker)
{
    struct sender *sender = worker->sender;
    struct loop *loop = worker->loop;
    int more = 1;

    sender->frames_used = 0;
    for (int reads = 0; reads < READS; reads++) {
        ssize_t length;

        if (sender->frames_used + FRAME_ROOM > SEND_FRAMES || sender->count >= ENOUGH) {
            seal_packets(worker);
            sender->frames_used = 0;
        }
        length = read(loop->tun, sender->frames + sender->frames_used, FRAME_ROOM);
        if (length <= 0) {
            if (length < 0 && errno != EAGAIN && errno != EINTR)
                loop_tun_failed(loop, errno);
            more = 0;
            break;
        }
        take_frame(worker, sender->frames_used, (uint32_t)length);
        sender->frames_used += ((uint32_t)length + 7) & ~7u;
    }
    if (sender->count)
        seal_packets(worker);
    return more;
}
