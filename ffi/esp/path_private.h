/* The path's own structures, and how they are guarded.
 *
 * Bursts hold `guard` shared. Who changes a table holds it alone, for as long as it takes to write an
 * entry; tables grow beside the old one. So what a burst has found stays there until its end, and who
 * has held the guard alone after taking something out may free it. Locks are taken in this order:
 * `changes`, `guard`, the lock of one SA, `due_lock`.
 */
#ifndef NATCOMPAT_ESP_PATH_H
#define NATCOMPAT_ESP_PATH_H

#include <sys/types.h>

#include "esp/sa_private.h"

enum { LOCKS = 64, FLOWS = 32768, FLOW_WAYS = 8, FEWEST_SPIS = 64 };

struct spi_slot {
    uint32_t spi;         /* 0: empty (RFC 4303, 2.1) */
    struct esp_sa *sa;    /* NULL: Python has it */
};

struct flow_slot {
    struct esp_flow flow;
    struct esp_sa *sa;
    double *used;
    uint64_t generation : 56, verdict : 8;   /* another generation than the path's: empty */
};

struct flows {
    struct flow_slot *slots;   /* FLOWS of them, in sets of FLOW_WAYS */
    uint32_t turn;
};

struct esp_path {
    int references;
    uint64_t maker;       /* the stamp of the process that may use it */
    const char *provider;
    uint64_t seed[2];
    pthread_mutex_t changes;
    pthread_rwlock_t guard;
    struct {
        _Alignas(64) pthread_mutex_t lock;
    } locks[LOCKS];       /* of SAs, by the upper half of their serials, which count up */
    struct spi_slot *spis;
    uint32_t spi_mask, spi_count;
    struct flows admitted, ways;
    uint64_t generation;
    pthread_mutex_t due_lock;
    struct esp_sa *first_due, *last_due;
    int due_count;
    uint64_t drops[ESP_REASONS];
};

/* With `guard` held. Returns the slot of `spi`, or the empty one where it would be. */
uint32_t path_index_find(const struct esp_path *path, uint32_t spi);

/* With `guard` held alone. */
void path_index_remove(struct esp_path *path, uint32_t slot);
void path_forget(struct esp_path *path);

/* With `guard` held: what is known of a flow, and of `sa` if that is not NULL; NULL: nothing. */
const struct flow_slot *path_flow(const struct esp_path *path, const struct flows *flows,
                                  const struct esp_flow *flow, const struct esp_sa *sa);

#endif
