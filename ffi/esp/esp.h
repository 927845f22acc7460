/* ESP in C (RFC 4303): what the loop and Python call. Any thread may call anything here.
 *
 * The path has the SAs that it can do by itself and remembers what Python decided about flows. What
 * it cannot do it hands up (ESP_UP, ESP_ADMIT). Its results are those of the portable path of
 * natcompat.esp, which is the reference. What stands between the two marks below is read by cffi.
 */
#ifndef NATCOMPAT_ESP_H
#define NATCOMPAT_ESP_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* The result of a packet. From ESP_SHORT on: natcompat.esp.engine.results.Reason, in its order. */
enum esp_result {
    ESP_DONE,
    ESP_SHORT, ESP_NO_SA, ESP_REPLAYED, ESP_TOO_OLD, ESP_INTEGRITY, ESP_PADDING, ESP_NEXT_HEADER, ESP_DUMMY,
    ESP_MALFORMED, ESP_SELECTOR, ESP_ECN, ESP_NO_POLICY, ESP_DISCARD, ESP_BYPASS, ESP_ACQUIRE, ESP_SEQUENCE,
    ESP_UNRESERVED, ESP_FRAGMENT, ESP_HEADERS, ESP_TOO_BIG, ESP_QUEUE, ESP_FORKED, ESP_CLOSED,
    ESP_DEVICE, ESP_NO_ENDPOINT, ESP_PATH_MTU, ESP_SEND, ESP_CLEARTEXT, ESP_ENDPOINT, ESP_FAULT,
    ESP_REASONS,      /* how many results there are up to here */
    ESP_UP = 64,      /* untouched: Python does all of it */
    ESP_ADMIT = 65    /* opened and authentic; Python decides whether its SA may carry this flow */
};

/* An outer address and port, in host byte order. */
struct esp_endpoint {
    uint8_t address[16];   /* in network byte order; IPv4 takes the first four, the others are 0 */
    uint16_t port;
    uint8_t version;       /* 4 or 6; 0: not known */
    uint8_t unused;
};

#define ESP_HEADROOM 24   /* SPI, sequence number, and the longest IV */
#define ESP_TAILROOM 64   /* the longest padding, trailer and integrity check value */

/* A packet, which is opened and sealed in place.
 *
 * Opening: `data` begins with the SPI, and with the inner packet afterwards. Sealing: the other way
 * round; ESP_HEADROOM bytes in front of `data` are written to, and up to `room` from `data` on
 * (ESP_TAILROOM more than the packet has is enough without TFC; with too little it goes up). */
struct esp_packet {
    uint8_t *data;
    uint32_t length;
    uint32_t room;
    uint64_t sa;                /* out: which SA it was (the serial of its parameters), 0: none */
    struct esp_endpoint peer;   /* opening: where it came from; sealing, out: where it goes */
    struct esp_endpoint local;  /* sealing, out: where it comes from */
    uint8_t traffic_class;      /* of the outer header; opening: in, sealing: out */
    uint8_t dont_fragment;      /* sealing, out: for the outer header */
    uint8_t result;             /* out: enum esp_result */
    uint8_t unused[7];
};

struct esp_path;

/* Both return how many packets have a result, 1 at the least. It is fewer than `count` when the last
 * of them is Python's (ESP_UP, ESP_ADMIT), or made something due that Python should see to before the
 * others (`esp_due_pending`). Who cannot wait for Python goes on with the rest.
 * `now`: seconds since the epoch. They never allocate, and wait for other threads for microseconds. */
int esp_open_burst(struct esp_path *path, struct esp_packet *packets, int count, double now);
int esp_seal_burst(struct esp_path *path, struct esp_packet *packets, int count, double now);

/* How many SAs have something due: a limit that was reached, a peer that moved. */
int esp_due_pending(struct esp_path *path);

/* A path keeps itself alive as long as it is held; `esp_path_new` holds it once. */
struct esp_path *esp_path_new(const char *provider);   /* "ipsec-mb", "libcrypto", or NULL: the best; NULL: there is none */
void esp_path_hold(struct esp_path *path);
void esp_path_release(struct esp_path *path);
/* cffi: end */

#endif
