/* The loop: ESP sockets -> path -> TUN and back, in threads that never hold Python's lock.
 *
 * What it cannot do it hands up, as events in a bounded ring, and goes on. Sockets come and go while
 * it runs. All of them belong to the caller, who closes them when they are out of it.
 */
#ifndef NATCOMPAT_LOOP_H
#define NATCOMPAT_LOOP_H

#include <stddef.h>
#include <stdint.h>

#include "esp/esp.h"

/* cffi: begin */
enum loop_event_kind {
    LOOP_OPEN = 1,  /* ESP that the path left alone (ESP_UP): all of it is Python's */
    LOOP_ADMIT,     /* an inner packet, authentic; Python decides (ESP_ADMIT) */
    LOOP_SEAL,      /* an inner packet that the path left alone */
    LOOP_TOO_BIG,   /* an inner packet whose ESP was too big for the path to `peer`, and was not sent */
    LOOP_SEND,      /* ESP for a local port that no socket here has */
    LOOP_TUN_GONE   /* errno is in `length`: nothing is read from the TUN, or written to it, any more */
};

struct loop_event {
    uint32_t kind;
    uint32_t length;            /* of the packet */
    uint64_t sa;
    struct esp_endpoint peer;
    uint8_t traffic_class, dont_fragment;
    uint8_t unused[2];
};

/* Since the socket was added. */
struct loop_socket_counters {
    uint64_t esp, keepalives, runts, handed_back, errors;
    uint64_t shed;              /* ESP that was dropped unread to rescue IKE glued to it from a full queue */
    uint64_t sent, send_calls, unsent;   /* ESP packets; system calls that carried them; given up */
};

struct loop_counters {
    uint64_t received, receive_calls;    /* ESP packets; calls of recvmmsg that brought some */
    uint64_t opened, written, unwritten; /* inner packets; frames written to the TUN; those it did not take */
    uint64_t merged;                     /* inner packets that went into another's frame */
    uint64_t bad_checksums;              /* inner packets left alone because theirs were wrong */
    uint64_t frames, packets, malformed; /* read from the TUN; inner packets made of them; frames that were none */
    uint64_t too_big;                    /* sealed packets that did not fit in the path MTU */
    uint64_t events, events_lost;        /* handed up; not, because the ring was full */
};

/* Where a socket is bound. */
struct loop_address {
    struct esp_endpoint address;   /* of the version that the packets have, also on a socket of IPv6 */
    int family;                    /* of the socket */
    int any;                       /* no address of this host's in particular, so each packet says its own */
    int both;                      /* and of either version */
};

struct loop;

/* One thread at the least: the first serves the TUN. NULL and errno: no memory, no descriptors. */
struct loop *loop_new(struct esp_path *path, int threads);

/* `tun`: with IFF_VNET_HDR, not blocking. `udp`: whether it takes super-packets of UDP. Before loop_start.
 * The loop has a descriptor of its own of it, which stays good when the caller closes his. 0 or an errno. */
int loop_set_tun(struct loop *loop, int tun, int udp);

/* Start, and stop, the threads. Both return 0 or an errno; stopping takes milliseconds. */
int loop_start(struct loop *loop);
int loop_stop(struct loop *loop);

/* Read, and send from, `descriptor`, a UDP socket that does not block, in thread `thread` (modulo their
 * number). `prefix`: 20 bytes, in front of what is handed back; NULL: nothing can
 * be. Return its number, or a negative errno. */
int loop_add_socket(struct loop *loop, int descriptor, int thread, const struct loop_address *bound,
                    const uint8_t *prefix);

/* Return when no thread touches the socket any more. */
void loop_remove_socket(struct loop *loop, int number);

int loop_event_descriptor(struct loop *loop);   /* readable when there are events or something is due */
/* Take the oldest event; its packet is cut to `room`. 0: there is none. */
int loop_next_event(struct loop *loop, struct loop_event *event, uint8_t *packet, uint32_t room);

void loop_read_counters(struct loop *loop, struct loop_counters *counters);
int loop_read_socket_counters(struct loop *loop, int number, struct loop_socket_counters *counters);

/* Stop if it runs, and free. In a forked child: close the child's descriptors, free nothing. */
void loop_free(struct loop *loop);
void loop_abandon(struct loop *loop);
/* cffi: end */

#endif
