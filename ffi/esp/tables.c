/* Two tables: inbound SAs by SPI, and the decisions on flows that Python has made. */
#include "esp/path_private.h"

#include <stdlib.h>
#include <string.h>

/* Inbound SAs by SPI: open addressing, half full at most. The caller holds `changes` to change it. */

static uint32_t index_home(const struct esp_path *path, uint32_t mask, uint32_t spi)
{
    return (uint32_t)((spi ^ path->seed[0]) * (path->seed[1] | 1) >> 32) & mask;
}

uint32_t path_index_find(const struct esp_path *path, uint32_t spi)
{
    uint32_t slot = index_home(path, path->spi_mask, spi);
    while (path->spis[slot].spi && path->spis[slot].spi != spi)
        slot = (slot + 1) & path->spi_mask;
    return slot;
}

void path_index_remove(struct esp_path *path, uint32_t slot)
{
    uint32_t mask = path->spi_mask;
    for (uint32_t next = (slot + 1) & mask; path->spis[next].spi; next = (next + 1) & mask) {
        uint32_t home = index_home(path, mask, path->spis[next].spi);
        if (((next - home) & mask) >= ((next - slot) & mask)) {   /* it may stand further to the front */
            path->spis[slot] = path->spis[next];
            slot = next;
        }
    }
    path->spis[slot] = (struct spi_slot){0, NULL};
    --path->spi_count;
}

static bool index_grow(struct esp_path *path)
{
    uint32_t mask = path->spi_mask * 2 + 1;
    struct spi_slot *old = path->spis, *new = calloc((size_t)mask + 1, sizeof *new);
    if (!new)
        return false;
    for (uint32_t each = 0; each <= path->spi_mask; ++each) {
        if (!old[each].spi)
            continue;
        uint32_t slot = index_home(path, mask, old[each].spi);
        while (new[slot].spi)
            slot = (slot + 1) & mask;
        new[slot] = old[each];
    }
    pthread_rwlock_wrlock(&path->guard);
    path->spis = new;
    path->spi_mask = mask;
    pthread_rwlock_unlock(&path->guard);
    free(old);
    return true;
}

int esp_index(struct esp_path *path, uint32_t spi, struct esp_sa *sa, int python)
{
    bool done = true;
    pthread_mutex_lock(&path->changes);
    if ((sa || python) && 2 * (path->spi_count + 1) > path->spi_mask)
        done = index_grow(path);
    if (done) {
        pthread_rwlock_wrlock(&path->guard);
        uint32_t slot = path_index_find(path, spi);
        bool there = path->spis[slot].spi != 0;
        if (sa || python) {
            path->spis[slot] = (struct spi_slot){spi, sa};
            path->spi_count += !there;
        } else if (there) {
            path_index_remove(path, slot);
        }
        pthread_rwlock_unlock(&path->guard);
    }
    pthread_mutex_unlock(&path->changes);
    return done;
}

/* Flows: sets of FLOW_WAYS entries. An entry goes when its set is full, and then its owner is the one who wants a
 * new one, if there is one of his; else he who has most of the set. So nobody loses what is known of his flows to
 * somebody who has very many, and nothing is forgotten all at once but when the databases change. */

static uint64_t mix(uint64_t one, uint64_t other)
{
    __uint128_t product = (__uint128_t)one * other;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint32_t flow_home(const struct esp_path *path, const struct esp_flow *flow)
{
    uint64_t words[sizeof *flow / 8];
    memcpy(words, flow, sizeof words);
    uint64_t hash = path->seed[0];
    for (size_t each = 0; each < sizeof words / sizeof *words; ++each)
        hash = mix(hash ^ words[each], path->seed[1] ^ 0x9E3779B97F4A7C15);
    return (uint32_t)hash & (FLOWS - FLOW_WAYS);   /* where a set begins */
}

/* `sa`: one that the entry has to have; NULL: any. Returns NULL where the set has no such entry. */
static struct flow_slot *flow_find(const struct esp_path *path, struct flow_slot *set, const struct esp_flow *flow,
                                   const struct esp_sa *sa)
{
    for (struct flow_slot *slot = set; slot < set + FLOW_WAYS && slot->generation == path->generation; ++slot)
        if (!memcmp(&slot->flow, flow, sizeof *flow) && (!sa || slot->sa == sa))
            return slot;
    return NULL;
}

const struct flow_slot *path_flow(const struct esp_path *path, const struct flows *flows,
                                  const struct esp_flow *flow, const struct esp_sa *sa)
{
    return flow_find(path, &flows->slots[flow_home(path, flow)], flow, sa);
}

void path_forget(struct esp_path *path)
{
    ++path->generation;
}

/* The owner of an inbound flow is its SA; that of an outbound one is the host that sends. */
static bool same_owner(const struct flow_slot *one, const struct flow_slot *other, bool by_sa)
{
    return by_sa ? one->sa == other->sa
                 : !memcmp(one->flow.source, other->flow.source, sizeof one->flow.source);
}

/* Returns the entry of a full set that has to go for `learnt`. */
static struct flow_slot *flow_evict(struct flows *flows, struct flow_slot *set, const struct flow_slot *learnt,
                                    bool by_sa)
{
    uint32_t turn = flows->turn++;   /* not always the same one */
    struct flow_slot *chosen = &set[turn % FLOW_WAYS];
    int most = 0;
    for (uint32_t way = 0; way < FLOW_WAYS; ++way) {
        struct flow_slot *slot = &set[(turn + way) % FLOW_WAYS];
        int owned = 0;
        if (same_owner(slot, learnt, by_sa))
            return slot;
        for (uint32_t other = 0; other < FLOW_WAYS; ++other)
            owned += same_owner(slot, &set[other], by_sa);
        if (owned > most) {
            most = owned;
            chosen = slot;
        }
    }
    return chosen;
}

static void learn(struct esp_path *path, struct flows *flows, uint64_t generation, const struct flow_slot *learnt,
                  const struct esp_sa *with)
{
    pthread_mutex_lock(&path->changes);
    pthread_rwlock_wrlock(&path->guard);
    if (generation == path->generation) {
        struct flow_slot *set = &flows->slots[flow_home(path, &learnt->flow)];
        struct flow_slot *slot = flow_find(path, set, &learnt->flow, with);
        for (uint32_t way = 0; !slot && way < FLOW_WAYS; ++way)
            if (set[way].generation != path->generation)
                slot = &set[way];
        if (!slot)
            slot = flow_evict(flows, set, learnt, with != NULL);
        *slot = *learnt;
        slot->generation = path->generation;
        if (slot->sa)
            slot->sa->cached = path->generation;
    }
    pthread_rwlock_unlock(&path->guard);
    pthread_mutex_unlock(&path->changes);
}

void esp_admit(struct esp_path *path, uint64_t generation, const struct esp_flow *flow, struct esp_sa *sa,
               double *used, int verdict)
{
    struct flow_slot learnt = {.flow = *flow, .sa = sa, .used = used, .verdict = (uint8_t)verdict};
    learn(path, &path->admitted, generation, &learnt, sa);
}

void esp_way(struct esp_path *path, uint64_t generation, const struct esp_flow *flow, struct esp_sa *sa,
             double *used, int verdict)
{
    struct flow_slot learnt = {.flow = *flow, .sa = sa, .used = used, .verdict = (uint8_t)verdict};
    learn(path, &path->ways, generation, &learnt, NULL);
}

uint64_t esp_generation(struct esp_path *path)
{
    pthread_rwlock_rdlock(&path->guard);
    uint64_t generation = path->generation;
    pthread_rwlock_unlock(&path->guard);
    return generation;
}

void esp_forget(struct esp_path *path)
{
    pthread_mutex_lock(&path->changes);
    pthread_rwlock_wrlock(&path->guard);
    path_forget(path);
    pthread_rwlock_unlock(&path->guard);
    pthread_mutex_unlock(&path->changes);
}
