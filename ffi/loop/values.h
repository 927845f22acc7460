/* The events and counters of the loop. */
#ifndef NATCOMPAT_LOOP_VALUES_H
#define NATCOMPAT_LOOP_VALUES_H

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
    LOOP_TUN_GONE,  /* errno is in `length`: nothing is read from the TUN, or written to it, any more */
    LOOP_REFUSED    /* the TUN does not take super-packets of the kind in `length`, by the errno in `sa` */
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
    uint64_t refused;                    /* frames of several packets that the TUN did not take, so written one by one */
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

/* How IKE that comes to an ESP socket returns to the application; see natcompat.backends.hand_back. */
struct loop_hand_back {
    int descriptor;       /* a UDP socket that sends by the interface lo alone; it is duplicated */
    int family;           /* of both sockets, AF_INET or AF_INET6 */
    uint8_t address[16];  /* where `descriptor` reaches the application's socket; 4 bytes for AF_INET */
    uint16_t port;        /* in host byte order */
    uint32_t sender;      /* a number that no other sender of the endpoint has */
    uint8_t tag[8];
    uint8_t key[32];
};
/* cffi: end */

#endif
