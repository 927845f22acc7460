/* The state of one SA, and what it does with a packet (natcompat/esp/engine/association.py). */
#ifndef NATCOMPAT_ESP_SA_H
#define NATCOMPAT_ESP_SA_H

#include <pthread.h>

#include "crypto/crypto.h"
#include "esp/control.h"
#include "esp/inner.h"

struct limits {
    uint64_t soft_packets, hard_packets, soft_bytes, hard_bytes;   /* UINT64_MAX: none */
};

enum { LARGEST_WINDOW = 4096 };   /* packets */

/* There may be very many, so each byte counts: an SA has as much memory as its direction needs, and its keys
 * in front. All behind `queued` changes under the lock. */
struct esp_sa {
    struct esp_path *path;
    const struct crypto_cipher *cipher;
    struct limits *limits;  /* NULL: none */
    uint64_t serial;
    double added;
    uint32_t spi;
    uint16_t tfc;
    uint8_t fixed;          /* bytes of header, IV and integrity check value */
    uint8_t prefix;         /* bytes of header and IV */
    uint8_t icv_length, block_length;
    bool outbound, esn, copy_dscp, copy_ecn, copy_df;

    struct esp_sa *next_due;
    bool queued;            /* with the SAs that have something due; both under the lock of those */

    bool gone, soft;
    uint8_t due;
    struct esp_endpoint peer;
    uint64_t cached;        /* the generation in which a flow last came to know this SA */
    uint64_t packets, octets;
    double first_used, last_used;
    uint64_t highest;       /* the sequence number of the last packet sent, or the highest received */
    union {
        struct {
            uint64_t *ivs;        /* where the IV comes from, for ciphers that count */
            uint64_t permitted;   /* the highest that may be used now */
            struct esp_endpoint local;
        } out;
        struct {
            uint64_t replay_drops, window_drops, integrity_drops;
            struct esp_endpoint home;   /* where the newest packet came from */
            uint16_t window_size;       /* packets; 0: everything passes */
            uint8_t window_mask;        /* of blocks */
            uint64_t window[];          /* blocks of a ring, RFC 6479 */
        } in;
    };
};

/* The keys of an SA, in front of it in one piece of memory. */
static inline size_t sa_key_size(const struct crypto_cipher *cipher)
{
    return (cipher->key_size + 7) & ~(size_t)7;
}

static inline void *sa_key(const struct esp_sa *sa)
{
    return (uint8_t *)sa - sa_key_size(sa->cipher);
}

/* The lock of an SA, which it shares with some others: they are held for microseconds. */
pthread_mutex_t *sa_lock(const struct esp_sa *sa);

/* The caller holds the lock. Opening: ESP_DONE or a reason; `packet` has a header. `known`: the job that has
 * computed its check value, or NULL. */
enum esp_result sa_open(struct esp_sa *sa, struct esp_packet *packet, double now, const struct crypto_job *known);

/* Makes the job that computes the check value of `packet`. False: as it looks now, it will not be needed. */
bool sa_look_ahead(const struct esp_sa *sa, const struct esp_packet *packet, struct crypto_job *job);

/* `packet` is an IP packet of the right length. ESP_UP: there is too little room, or the SA is gone. `later`: the
 * job that is then still to be done, or NULL. */
enum esp_result sa_seal(struct esp_sa *sa, struct esp_packet *packet, double now, struct crypto_job *later);

/* Does such a job by itself. */
bool sa_encrypt(struct esp_sa *sa, const struct crypto_job *job);

/* It could not be done. */
void sa_give_up(struct esp_sa *sa, const struct crypto_job *job);

/* By the path: remembers that `sa` has something due. */
void path_note_due(struct esp_path *path, struct esp_sa *sa);
void path_forget_due(struct esp_path *path, struct esp_sa *sa);

#endif
