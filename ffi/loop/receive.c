/* From the ESP sockets to the TUN: receive, classify, open, merge. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sock_diag.h>
#include <netinet/udp.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "loop/hand_back_private.h"
#include "loop/receive_private.h"
#include "loop/write_private.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif

enum { MARKER = 4 };
enum { MOST_QUEUED = 6 << 20, LARGE_QUEUE = 64 << 20 }; /* bytes as the kernel counts them: half are packets */
enum { WATCHED = 256 };          /* batches after one with coalesced messages */
enum { AT_ONCE = 128 * 1024 };   /* bytes of a batch: it is read four times, so it has to stay in the cache */

/* What the ancillary data of a message says. */
struct arrival {
    uint32_t size;            /* of the segments; 0: it is one */
    uint8_t traffic_class;
    uint8_t unicast;          /* it was sent to `destination`, an address of this host alone */
    uint8_t destination[16];  /* of the socket's family */
    uint32_t interface;
};

static void read_ancillary(struct msghdr *message, const struct loop_socket *from, struct arrival *arrival)
{
    memset(arrival, 0, sizeof *arrival);
    for (struct cmsghdr *each = CMSG_FIRSTHDR(message); each; each = CMSG_NXTHDR(message, each)) {
        size_t length = each->cmsg_len - CMSG_LEN(0);
        const uint8_t *data = CMSG_DATA(each);

        if (each->cmsg_level == IPPROTO_UDP && each->cmsg_type == UDP_GRO && length >= sizeof(int)) {
            int size;

            memcpy(&size, data, sizeof size);
            arrival->size = size > 0 ? (uint32_t)size : 0;
        } else if (each->cmsg_level == IPPROTO_IP && each->cmsg_type == IP_TOS && length >= 1) {
            arrival->traffic_class = data[0];
        } else if (each->cmsg_level == IPPROTO_IPV6 && each->cmsg_type == IPV6_TCLASS && length >= sizeof(int)) {
            int class;

            memcpy(&class, data, sizeof class);
            arrival->traffic_class = (uint8_t)class;
        } else if (each->cmsg_level == IPPROTO_IP && each->cmsg_type == IP_PKTINFO
                   && length >= sizeof(struct in_pktinfo)) {
            struct in_pktinfo info;

            memcpy(&info, data, sizeof info);
            if (from->bound.family != AF_INET)
                continue;
            arrival->unicast = info.ipi_spec_dst.s_addr == info.ipi_addr.s_addr;
            memcpy(arrival->destination, &info.ipi_addr, 4);
            arrival->interface = (uint32_t)info.ipi_ifindex;
        } else if (each->cmsg_level == IPPROTO_IPV6 && each->cmsg_type == IPV6_PKTINFO
                   && length >= sizeof(struct in6_pktinfo)) {
            struct in6_pktinfo info;
            const uint8_t *address = info.ipi6_addr.s6_addr;

            memcpy(&info, data, sizeof info);
            arrival->unicast = address[0] != 0xFF && !(IN6_IS_ADDR_V4MAPPED(&info.ipi6_addr) && address[12] >= 0xE0);
            memcpy(arrival->destination, &info.ipi6_addr, 16);
            arrival->interface = info.ipi6_ifindex;
        }
    }
}

static void read_peer(const struct sockaddr_in6 *name, struct esp_endpoint *peer)
{
    memset(peer, 0, sizeof *peer);
    if (name->sin6_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)name;

        peer->version = 4;
        memcpy(peer->address, &v4->sin_addr, 4);
        peer->port = ntohs(v4->sin_port);
        return;
    }
    if (IN6_IS_ADDR_V4MAPPED(&name->sin6_addr)) {
        peer->version = 4;
        memcpy(peer->address, name->sin6_addr.s6_addr + 12, 4);
    } else {
        peer->version = 6;
        memcpy(peer->address, &name->sin6_addr, 16);
    }
    peer->port = ntohs(name->sin6_port);
}

/* ---- IKE */

/* Return IKE that came here, coalesced with ESP, to the application's own socket. */
static void hand_back(struct loop_socket *from, const uint8_t *data, uint32_t length, const struct sockaddr_in6 *source,
                      const struct arrival *arrival)
{
    if (!arrival->unicast)
        return; /* sent to several: the application has a copy of its own */
    if (!from->hand_back || hand_back_made(from->hand_back, data, length)) {
        COUNT(from->counters.errors, 1); /* there is no way, or an envelope came: another program steers this port */
        return;
    }
    if (hand_back_send(from->hand_back, data + MARKER, length - MARKER, source, arrival->destination, arrival->interface))
        COUNT(from->counters.handed_back, 1);
    else
        COUNT(from->counters.errors, 1);
}

/* ---- a full queue */

static void set_queue(struct loop_socket *from, int size)
{
    size /= 2; /* the kernel doubles it */
    setsockopt(from->fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size); /* with CAP_NET_ADMIN; else it stays */
}

/* A coalesced message that finds the queue full is dropped whole, with the IKE that is glued to its ESP. So
 * while messages come coalesced the queue is kept from getting full: ESP is dropped here, unread. And it is
 * larger then, for what comes while a batch is opened, or others have the processor. Else the kernel drops
 * for less. */
static void set_watch(struct loop_socket *from, int coalesced)
{
    socklen_t length = sizeof from->usual_queue;

    if (coalesced && !from->watched) {
        getsockopt(from->fd, SOL_SOCKET, SO_RCVBUF, &from->usual_queue, &length);
        if (from->usual_queue < LARGE_QUEUE)
            set_queue(from, LARGE_QUEUE);
    } else if (!coalesced && from->watched == 1) {
        set_queue(from, from->usual_queue);
        from->shedding = 0;
    }
    from->watched = coalesced ? WATCHED : from->watched - (from->watched > 0);
}

void loop_restore_queue(struct loop_socket *from)
{
    if (from->watched)
        set_queue(from, from->usual_queue);
}

static void watch_queue(struct loop_socket *from)
{
    uint32_t info[SK_MEMINFO_VARS], limit;
    socklen_t length = sizeof info;

    if (getsockopt(from->fd, SOL_SOCKET, SO_MEMINFO, info, &length) < 0 || length <= SK_MEMINFO_RCVBUF * sizeof info[0])
        return;
    limit = info[SK_MEMINFO_RCVBUF] / 4 * 3 < MOST_QUEUED ? info[SK_MEMINFO_RCVBUF] / 4 * 3 : MOST_QUEUED;
    from->shedding = info[SK_MEMINFO_RMEM_ALLOC] > (from->shedding ? limit / 3 * 2 : limit);
}

/* Open what has been collected, hand up what is Python's, and write the rest. */
static void open_packets(struct worker *worker, int count)
{
    struct receiver *receiver = worker->receiver;
    struct loop *loop = worker->loop;
    uint64_t merged = receiver->merge.merged, bad = receiver->merge.bad_checksums, opened = 0;
    double now = loop_now();

    receiver->merge.kinds = READ(loop->kinds);
    merge_begin(&receiver->merge);
    for (int done = 0; done < count;) {
        struct esp_packet *packets = receiver->packets + done;
        int part = esp_open_burst(loop->path, packets, count - done, now);

        for (int i = 0; i < part; i++) {
            if (packets[i].result == ESP_DONE) {
                merge_add(&receiver->merge, packets[i].data, packets[i].length);
                opened++;
            } else if (packets[i].result == ESP_UP || packets[i].result == ESP_ADMIT) {
                struct loop_event event = {
                    .kind = packets[i].result == ESP_UP ? LOOP_OPEN : LOOP_ADMIT,
                    .length = packets[i].length,
                    .sa = packets[i].sa,
                    .peer = packets[i].peer,
                    .traffic_class = packets[i].traffic_class,
                };

                loop_put_event(loop, &event, packets[i].data);
            }
        }
        done += part;
    }
    loop_write(worker);
    COUNT(worker->counters.opened, opened);
    COUNT(worker->counters.merged, receiver->merge.merged - merged);
    COUNT(worker->counters.bad_checksums, receiver->merge.bad_checksums - bad);
    if (esp_due_pending(loop->path))
        loop_wake_python(loop);
}

/* ---- from the sockets */

static int receive_messages(struct receiver *receiver, int fd, int most)
{
    for (int i = 0; i < most; i++) {
        struct msghdr *message = &receiver->messages[i].msg_hdr;

        receiver->iov[i].iov_base = receiver->buffer + (size_t)i * RECEIVE_SLOT;
        receiver->iov[i].iov_len = RECEIVE_SLOT;
        message->msg_name = &receiver->names[i];
        message->msg_namelen = sizeof receiver->names[i];
        message->msg_iov = &receiver->iov[i];
        message->msg_iovlen = 1;
        message->msg_control = receiver->control[i];
        message->msg_controllen = sizeof receiver->control[i];
    }
    return recvmmsg(fd, receiver->messages, (unsigned)most, MSG_DONTWAIT, NULL);
}

/* How many messages of that length make a batch. */
static int messages_at_once(uint64_t length)
{
    uint64_t most = length ? AT_ONCE / length : RECEIVE_MESSAGES;

    return most < 1 ? 1 : most > RECEIVE_MESSAGES ? RECEIVE_MESSAGES : (int)most;
}

int loop_receive(struct worker *worker, struct loop_socket *from)
{
    struct receiver *receiver = worker->receiver;
    int most = receiver->most ? receiver->most : RECEIVE_MESSAGES, coalesced = 0, waiting = 0, taken;
    uint64_t bytes = 0, esp = 0, keepalives = 0, runts = 0;

    taken = receive_messages(receiver, from->fd, most);
    if (taken <= 0) {
        if (taken < 0 && errno != EAGAIN && errno != EINTR)
            COUNT(from->counters.errors, 1); /* an ICMP error of something that was sent here */
        return 0;
    }
    if (from->watched)
        watch_queue(from);
    for (int i = 0; i < taken; i++) {
        uint8_t *data = receiver->iov[i].iov_base;
        uint32_t length = receiver->messages[i].msg_len, size;
        struct arrival arrival;
        struct esp_endpoint peer;

        read_ancillary(&receiver->messages[i].msg_hdr, from, &arrival);
        read_peer(&receiver->names[i], &peer);
        size = arrival.size ? arrival.size : length;
        bytes += length;
        if (size < length && !coalesced) {
            coalesced = 1;
            set_watch(from, 1);
        }
        if (!length)
            runts++;
        for (uint32_t at = 0; at < length; at += size) {
            uint32_t segment = length - at < size ? length - at : size;
            uint8_t *start = data + at;

            if (segment < MARKER) {
                if (segment == 1 && *start == 0xFF)
                    keepalives++;
                else
                    runts++;
            } else if (!start[0] && !start[1] && !start[2] && !start[3]) {
                hand_back(from, start, segment, &receiver->names[i], &arrival);
            } else {
                esp++;
                if (!from->shedding) {
                    struct esp_packet *packet = &receiver->packets[waiting++];

                    packet->data = start;
                    packet->length = packet->room = segment;
                    packet->peer = peer;
                    packet->traffic_class = arrival.traffic_class;
                    if (waiting == MERGE_MOST) {
                        open_packets(worker, waiting);
                        waiting = 0;
                    }
                } else {
                    COUNT(from->counters.shed, 1);
                }
            }
        }
    }
    COUNT(worker->counters.received, esp);
    COUNT(worker->counters.receive_calls, 1);
    COUNT(from->counters.esp, esp);
    COUNT(from->counters.keepalives, keepalives);
    COUNT(from->counters.runts, runts);
    if (waiting)
        open_packets(worker, waiting);
    if (!coalesced)
        set_watch(from, 0);
    receiver->most = messages_at_once(bytes / (uint64_t)taken);
    return taken == most;
}
