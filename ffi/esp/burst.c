/* Bursts: finds the SA and the flow of each packet, and opens or seals it. */
#include "esp/path_private.h"

#include <string.h>

/* The lock of an SA that a burst holds; packets come in runs of one SA. */
static void hold(pthread_mutex_t **held, pthread_mutex_t *lock)
{
    if (*held == lock)
        return;
    if (*held)
        pthread_mutex_unlock(*held);
    if (lock)
        pthread_mutex_lock(lock);
    *held = lock;
}

static void note_use(double *used, double now)
{
    if (used)
        __atomic_store(used, &now, __ATOMIC_RELAXED);
}

/* A burst, and the packets of it whose cipher does many at once (`struct crypto_many`). Sealing, all else is done in
 * their turn, and those that wait are encrypted before the burst ends. Opening, check values are computed ahead, and
 * all else is done in their turn: behind a stop packets are as they came, and what was computed is thrown away. */
struct burst {
    struct esp_path *path;
    struct esp_packet *packets;
    int count, done;
    double now;
    pthread_mutex_t *held;
    uint64_t drops[ESP_REASONS];
    int waiting;        /* how many there are of the last two */
    int next, looked;   /* opening: the next of them, and the first packet that has not been looked at */
    struct {
        int packet;
        struct esp_sa *sa;
    } of[MOST_JOBS];
    struct crypto_job jobs[MOST_JOBS];
};

static const struct spi_slot *find_spi(const struct esp_path *path, const struct esp_packet *packet)
{
    uint32_t spi = load32(packet->data);
    const struct spi_slot *slot = spi ? &path->spis[path_index_find(path, spi)] : NULL;
    return slot && slot->spi ? slot : NULL;
}

static void look_ahead(struct burst *burst, const struct crypto_many *many)
{
    int left = burst->count - burst->done;
    burst->looked = burst->done + (left < MOST_JOBS ? left : MOST_JOBS);
    burst->waiting = burst->next = 0;
    if (left < FEWEST_JOBS)
        return;
    for (int each = burst->done; each < burst->looked; ++each) {
        const struct esp_packet *packet = &burst->packets[each];
        const struct spi_slot *slot = packet->length < ESP_HEADER ? NULL : find_spi(burst->path, packet);
        if (!slot || !slot->sa || !slot->sa->cipher->many)
            continue;
        hold(&burst->held, sa_lock(slot->sa));
        if (sa_look_ahead(slot->sa, packet, &burst->jobs[burst->waiting]))
            burst->of[burst->waiting++].packet = each;
    }
    hold(&burst->held, NULL);
    if (burst->waiting < FEWEST_JOBS || !many->work(burst->jobs, burst->waiting, false))
        burst->waiting = 0;
}

/* Returns the job that has computed the check value of the packet whose turn it is, or NULL. */
static const struct crypto_job *find_job(struct burst *burst, const struct crypto_many *many)
{
    if (burst->done >= burst->looked)
        look_ahead(burst, many);
    while (burst->next < burst->waiting && burst->of[burst->next].packet < burst->done)
        ++burst->next;
    bool found = burst->next < burst->waiting && burst->of[burst->next].packet == burst->done;
    return found && burst->jobs[burst->next].done ? &burst->jobs[burst->next] : NULL;
}

static enum esp_result open_one(struct burst *burst, struct esp_packet *packet)
{
    struct esp_path *path = burst->path;
    packet->sa = 0;
    if (packet->length < ESP_HEADER)
        return ESP_SHORT;
    const struct spi_slot *slot = find_spi(path, packet);
    if (!slot)
        return ESP_NO_SA;
    if (!slot->sa)
        return ESP_UP;
    struct esp_sa *sa = slot->sa;
    const struct crypto_job *known = sa->cipher->many ? find_job(burst, sa->cipher->many) : NULL;
    hold(&burst->held, sa_lock(sa));
    packet->sa = sa->serial;
    enum esp_result result = sa_open(sa, packet, burst->now, known);
    if (result != ESP_DONE)
        return result;
    struct esp_flow flow;
    if (!inner_flow(packet->data, packet->length, &flow))
        return ESP_MALFORMED;
    const struct flow_slot *entry = path_flow(path, &path->admitted, &flow, sa);
    if (!entry)
        return ESP_ADMIT;
    if (entry->verdict == ESP_DONE)
        note_use(entry->used, burst->now);
    return entry->verdict;
}

/* Encrypts what waits for it. */
static void seal_waiting(struct burst *burst)
{
    const struct crypto_many *many = burst->of[0].sa->cipher->many;
    hold(&burst->held, NULL);
    bool worked = burst->waiting >= FEWEST_JOBS && many->work(burst->jobs, burst->waiting, true);
    for (int each = 0; each < burst->waiting; ++each) {
        const struct crypto_job *job = &burst->jobs[each];
        struct esp_sa *sa = burst->of[each].sa;
        if (worked && job->done)
            continue;
        hold(&burst->held, sa_lock(sa));
        if (worked || !sa_encrypt(sa, job)) {
            sa_give_up(sa, job);
            burst->packets[burst->of[each].packet].result = ESP_SEQUENCE;
            ++burst->drops[ESP_SEQUENCE];
        }
    }
    burst->waiting = 0;
}

static enum esp_result seal_one(struct burst *burst, struct esp_packet *packet)
{
    struct esp_path *path = burst->path;
    packet->sa = 0;
    size_t length = inner_length(packet->data, packet->length);
    struct esp_flow flow;
    if (!length || length != packet->length || !inner_flow(packet->data, length, &flow))
        return ESP_MALFORMED;
    const struct flow_slot *known = path_flow(path, &path->ways, &flow, NULL);
    if (!known)
        return ESP_UP;
    note_use(known->used, burst->now);
    struct esp_sa *sa = known->sa;
    if (!sa)
        return known->verdict;
    if (!sa->cipher->many) {
        hold(&burst->held, sa_lock(sa));
        return sa_seal(sa, packet, burst->now, NULL);
    }
    if (burst->waiting == MOST_JOBS)
        seal_waiting(burst);
    hold(&burst->held, sa_lock(sa));
    enum esp_result result = sa_seal(sa, packet, burst->now, &burst->jobs[burst->waiting]);
    if (result == ESP_DONE) {
        burst->of[burst->waiting].packet = burst->done;
        burst->of[burst->waiting++].sa = sa;
    }
    return result;
}

typedef enum esp_result (*carry_one)(struct burst *, struct esp_packet *);

static int carry(struct esp_path *path, struct esp_packet *packets, int count, double now, carry_one one)
{
    struct burst burst;   /* most of it stays as it is if nothing waits */
    burst.path = path, burst.packets = packets, burst.count = count, burst.now = now;
    burst.held = NULL;
    burst.done = burst.waiting = burst.next = burst.looked = 0;
    memset(burst.drops, 0, sizeof burst.drops);
    int due = esp_due_pending(path);
    bool stop = false;
    pthread_rwlock_rdlock(&path->guard);
    while (burst.done < count && !stop) {
        enum esp_result result = one(&burst, &packets[burst.done]);
        packets[burst.done++].result = (uint8_t)result;
        if (result < ESP_REASONS)
            ++burst.drops[result];
        stop = result >= ESP_REASONS || esp_due_pending(path) != due;
    }
    if (one == seal_one && burst.waiting)
        seal_waiting(&burst);
    hold(&burst.held, NULL);
    pthread_rwlock_unlock(&path->guard);
    for (int each = ESP_DONE + 1; each < ESP_REASONS; ++each)
        if (burst.drops[each])
            __atomic_add_fetch(&path->drops[each], burst.drops[each], __ATOMIC_RELAXED);
    return burst.done;
}

int esp_open_burst(struct esp_path *path, struct esp_packet *packets, int count, double now)
{
    return carry(path, packets, count, now, open_one);
}

int esp_seal_burst(struct esp_path *path, struct esp_packet *packets, int count, double now)
{
    return carry(path, packets, count, now, seal_one);
}

/* Bursts as Python has them */

enum { CHUNK = 64 };

static void view(struct esp_view *views, const struct esp_packet *packets, int count, const uint8_t *start)
{
    for (int each = 0; each < count; ++each)
        views[each] = (struct esp_view){
            .sa = packets[each].sa,
            .offset = (uint32_t)(packets[each].data - start),
            .length = packets[each].length,
            .result = packets[each].result,
            .traffic_class = packets[each].traffic_class,
            .dont_fragment = packets[each].dont_fragment,
        };
}

int esp_open_joined(struct esp_path *path, uint8_t *packets, const uint32_t *lengths,
                    const struct esp_endpoint *peers, const uint8_t *traffic_classes, int count, double now,
                    struct esp_view *views)
{
    uint8_t *at = packets;
    int done = 0, due = esp_due_pending(path);
    while (done < count) {
        struct esp_packet chunk[CHUNK];
        int size = count - done < CHUNK ? count - done : CHUNK;
        for (int each = 0; each < size; ++each) {
            uint32_t length = lengths[done + each];
            chunk[each] = (struct esp_packet){
                .data = at,
                .length = length,
                .room = length,
                .peer = peers[done + each],
                .traffic_class = traffic_classes ? traffic_classes[done + each] : 0,
            };
            at += length;
        }
        int carried = esp_open_burst(path, chunk, size, now);
        view(views + done, chunk, carried, packets);
        done += carried;
        if (carried < size || chunk[carried - 1].result >= ESP_REASONS || esp_due_pending(path) != due)
            break;
    }
    return done;
}

int esp_seal_joined(struct esp_path *path, const uint8_t *packets, const uint32_t *lengths, int count, double now,
                    uint8_t *sealed, size_t room, uint32_t spare, struct esp_view *views)
{
    uint8_t *to = sealed;
    int done = 0, due = esp_due_pending(path);
    while (done < count) {
        struct esp_packet chunk[CHUNK];
        int size = 0;
        for (; size < CHUNK && done + size < count; ++size) {
            uint32_t length = lengths[done + size];
            if ((size_t)(sealed + room - to) < (size_t)length + ESP_ROOM + spare)
                break;
            memcpy(to + ESP_HEADROOM, packets, length);
            chunk[size] = (struct esp_packet){
                .data = to + ESP_HEADROOM, .length = length, .room = length + ESP_TAILROOM + spare};
            packets += length;
            to += length + ESP_ROOM + spare;
        }
        int carried = size ? esp_seal_burst(path, chunk, size, now) : 0;
        view(views + done, chunk, carried, sealed);
        done += carried;
        if (carried < CHUNK || chunk[carried - 1].result >= ESP_REASONS || esp_due_pending(path) != due)
            break;
    }
    return done;
}
