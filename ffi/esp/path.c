/* The path, and its SAs from their beginning to their end. */
#include "esp/path_private.h"

#include "esp/secret_private.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* A forked child has a copy of everything, locks held by threads that it does not have included. */
static bool foreign(const struct esp_path *path)
{
    return path->maker != process_stamp();
}

struct esp_path *esp_path_new(const char *provider)
{
    const struct crypto_cipher *cipher = crypto_find(provider, NULL);
    struct esp_path *path = cipher ? aligned_alloc(64, sizeof *path) : NULL;
    if (!path)
        return NULL;
    memset(path, 0, sizeof *path);
    path->spis = calloc(FEWEST_SPIS, sizeof *path->spis);
    path->admitted.slots = calloc(FLOWS, sizeof *path->admitted.slots);
    path->ways.slots = calloc(FLOWS, sizeof *path->ways.slots);
    bool seeded = getrandom(path->seed, sizeof path->seed, 0) == sizeof path->seed;
    if (!path->spis || !path->admitted.slots || !path->ways.slots || !seeded) {
        free(path->spis), free(path->admitted.slots), free(path->ways.slots), free(path);
        return NULL;
    }
    path->references = 1;
    path->maker = process_stamp();
    path->provider = provider ? cipher->provider : NULL;
    path->spi_mask = FEWEST_SPIS - 1;
    path->generation = 1;
    pthread_mutex_init(&path->changes, NULL);
    pthread_mutex_init(&path->due_lock, NULL);
    for (int each = 0; each < LOCKS; ++each)
        pthread_mutex_init(&path->locks[each].lock, NULL);
    pthread_rwlockattr_t writers_first;   /* else two busy threads keep every change out */
    pthread_rwlockattr_init(&writers_first);
    pthread_rwlockattr_setkind_np(&writers_first, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&path->guard, &writers_first);
    pthread_rwlockattr_destroy(&writers_first);
    return path;
}

uint64_t esp_process_stamp(void)
{
    return process_stamp();
}

void esp_path_hold(struct esp_path *path)
{
    __atomic_add_fetch(&path->references, 1, __ATOMIC_RELAXED);
}

void esp_path_release(struct esp_path *path)
{
    if (foreign(path) || __atomic_sub_fetch(&path->references, 1, __ATOMIC_ACQ_REL))
        return;
    pthread_rwlock_destroy(&path->guard);
    pthread_mutex_destroy(&path->changes);
    pthread_mutex_destroy(&path->due_lock);
    for (int each = 0; each < LOCKS; ++each)
        pthread_mutex_destroy(&path->locks[each].lock);
    free(path->spis), free(path->admitted.slots), free(path->ways.slots), free(path);
}

const char *esp_provider(struct esp_path *path, int encryption, int integrity, size_t key_length)
{
    struct crypto_transform transform;
    if (!crypto_describe(&transform, encryption, integrity, key_length))
        return NULL;
    const struct crypto_cipher *cipher = crypto_find(path->provider, &transform);
    return cipher ? cipher->provider : NULL;
}

/* SAs */

static bool limits_new(struct limits **limits, const struct esp_parameters *parameters)
{
    uint64_t values[] = {parameters->soft_packets, parameters->hard_packets, parameters->soft_bytes,
                         parameters->hard_bytes};
    if (!(values[0] | values[1] | values[2] | values[3]))
        return true;
    for (int each = 0; each < 4; ++each)
        values[each] = values[each] ? values[each] : UINT64_MAX;
    *limits = malloc(sizeof **limits);
    if (*limits)
        **limits = (struct limits){values[0], values[1], values[2], values[3]};
    return *limits;
}

/* Bytes of an SA and its keys; `blocks`: of its replay window. */
static size_t sa_size(const struct crypto_cipher *cipher, bool outbound, size_t blocks)
{
    return sa_key_size(cipher) + (outbound ? offsetof(struct esp_sa, out) + sizeof(((struct esp_sa *)NULL)->out)
                                           : offsetof(struct esp_sa, in.window) + blocks * sizeof(uint64_t));
}

static struct esp_sa *sa_new(struct esp_path *path, const struct esp_parameters *parameters, bool outbound)
{
    struct crypto_transform transform;
    if (!crypto_describe(&transform, parameters->encryption, parameters->integrity, parameters->key_length))
        return NULL;
    transform.sealing = outbound;
    const struct crypto_cipher *cipher = crypto_find(path->provider, &transform);
    if (!cipher || parameters->replay_window > LARGEST_WINDOW)
        return NULL;
    size_t blocks = 0;
    if (!outbound && parameters->replay_window)   /* one block more than the window, in a ring of 2^n */
        for (blocks = 1; blocks * 64 < parameters->replay_window + 64; blocks *= 2)
            ;
    /* all in one piece, the key first: that has to be aligned */
    size_t key_size = sa_key_size(cipher), size = sa_size(cipher, outbound, blocks);
    void *memory = secret_new(size);
    if (!memory)
        return NULL;
    struct esp_sa *sa = (struct esp_sa *)((uint8_t *)memory + key_size);
    if (!limits_new(&sa->limits, parameters)
        || !cipher->expand(memory, &transform, parameters->key, parameters->mac_key, parameters->mac_key_length)) {
        free(sa->limits);
        cipher->wipe(memory);
        secret_free(memory, size);
        return NULL;
    }
    sa->cipher = cipher;
    sa->path = path;
    sa->serial = parameters->serial;
    sa->spi = parameters->spi;
    sa->outbound = outbound;
    sa->esn = parameters->esn;
    sa->copy_dscp = parameters->copy_dscp;
    sa->copy_ecn = parameters->copy_ecn;
    sa->copy_df = parameters->copy_df;
    sa->tfc = parameters->tfc;
    sa->highest = parameters->sequence;
    if (outbound) {
        esp_sa_permit(sa, parameters->permitted);
    } else if (blocks) {
        sa->in.window_size = (uint16_t)parameters->replay_window;
        sa->in.window_mask = (uint8_t)(blocks - 1);
        if (sa->highest) {   /* all up to there have been received */
            memset(sa->in.window, 0xFF, blocks * sizeof *sa->in.window);
            sa->in.window[sa->highest / 64 & sa->in.window_mask] = (2ULL << sa->highest % 64) - 1;
        }
    }
    sa->prefix = (uint8_t)(ESP_HEADER + transform.iv_length);
    sa->fixed = (uint8_t)(sa->prefix + transform.icv_length);
    sa->icv_length = transform.icv_length;
    sa->block_length = transform.block_length;
    sa->added = parameters->added;
    esp_path_hold(path);
    return sa;
}

int esp_crypt_once(struct esp_path *path, const struct esp_parameters *parameters, uint8_t *packet, size_t length,
                   const uint8_t *high, int sealing)
{
    struct esp_sa *sa = sa_new(path, parameters, sealing);
    if (!sa)
        return -1;
    int done = (sealing ? sa->cipher->seal : sa->cipher->open)(sa_key(sa), packet, length, high);
    esp_sa_free(sa);
    return done;
}

struct esp_sa *esp_inbound_new(struct esp_path *path, const struct esp_parameters *parameters)
{
    return sa_new(path, parameters, false);
}

struct esp_sa *esp_outbound_new(struct esp_path *path, const struct esp_parameters *parameters)
{
    return sa_new(path, parameters, true);
}

void esp_sa_free(struct esp_sa *sa)
{
    struct esp_path *path = sa->path;
    if (foreign(path))
        return;
    pthread_mutex_lock(&path->changes);
    pthread_rwlock_wrlock(&path->guard);   /* behind it nobody is using this SA */
    uint32_t slot = path_index_find(path, sa->spi);
    if (path->spis[slot].spi && path->spis[slot].sa == sa)
        path_index_remove(path, slot);
    if (sa->cached == path->generation)
        path_forget(path);
    pthread_rwlock_unlock(&path->guard);
    pthread_mutex_unlock(&path->changes);
    path_forget_due(path, sa);
    const struct crypto_cipher *cipher = sa->cipher;
    void *memory = sa_key(sa);
    size_t blocks = sa->outbound || !sa->in.window_size ? 0 : sa->in.window_mask + 1u;
    size_t size = sa_size(cipher, sa->outbound, blocks);
    free(sa->limits);
    cipher->wipe(memory);
    secret_free(memory, size);
    esp_path_release(path);
}

void esp_counters(struct esp_path *path, uint64_t *counters)
{
    for (int each = 0; each < ESP_REASONS; ++each)
        counters[each] = __atomic_load_n(&path->drops[each], __ATOMIC_RELAXED);
}
