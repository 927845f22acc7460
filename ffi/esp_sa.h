/* The state of one SA, and what it does with a packet (natcompat/esp/association.py). */
#ifndef NATCOMPAT_ESP_SA_H
#define NATCOMPAT_ESP_SA_H

#include <pthread.h>

#include "crypto.h"
#include "esp_control.h"
#include "inner.h"

struct esp_sa {
    pthread_mutex_t lock;   /* over all that changes, from `peer` on */
    struct esp_path *path;
    const struct crypto_cipher *cipher;
    void *key;
    uint64_t serial;
    uint64_t soft_packets, hard_packets, soft_bytes, hard_bytes;
    uint64_t *ivs;          /* outbound: the IV comes from there, for ciphers that count */
    double added;
    uint64_t last;          /* outbound: the last sequence number there is */
    struct esp_sa *next_due;
    uint32_t spi;
    uint32_t window_size;   /* packets; 0: everything passes */
    uint32_t window_mask;   /* of blocks */
    uint64_t cached;        /* the generation in which a flow last came to know this SA */
    uint16_t tfc;
    uint8_t fixed;          /* bytes of header, IV and integrity check value */
    uint8_t prefix;         /* bytes of header and IV */
    uint8_t icv_length, block_length;
    bool outbound, esn, copy_dscp, copy_ecn, copy_df;
    bool queued;            /* with the SAs that have something due; under the lock of those */

    bool gone, soft;
    uint8_t due;
    uint16_t local_port;
    struct esp_endpoint peer, home, moved_to;
    uint64_t packets, octets, next_packets, next_bytes;
    uint64_t replay_drops, window_drops, integrity_drops;
    uint64_t permitted;     /* outbound: the highest sequence number that may be used now */
    uint64_t highest;       /* the sequence number of the last packet sent, or the highest received */
    double first_used, last_used;
    uint64_t window[];      /* inbound: blocks of a ring, RFC 6479 */
};

/* The caller holds the lock. Opening: ESP_DONE or a reason; `packet` has a header. */
enum esp_result sa_open(struct esp_sa *sa, struct esp_packet *packet, double now);

/* `packet` is an IP packet of the right length. ESP_UP: there is too little room, or the SA is gone. */
enum esp_result sa_seal(struct esp_sa *sa, struct esp_packet *packet, double now);

/* By the path: remembers that `sa` has something due. */
void path_note_due(struct esp_path *path, struct esp_sa *sa);
void path_forget_due(struct esp_path *path, struct esp_sa *sa);

#endif
