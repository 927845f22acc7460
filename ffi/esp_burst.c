/* Bursts: from a packet to its SA and its flow, and on. */
#include "esp_path.h"

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

static enum esp_result open_one(struct esp_path *path, struct esp_packet *packet, pthread_mutex_t **held, double now)
{
    packet->sa = 0;
    if (packet->length < ESP_HEADER)
        return ESP_SHORT;
    uint32_t spi = load32(packet->data);
    const struct spi_slot *slot = spi ? &path->spis[path_index_find(path, spi)] : NULL;
    if (!slot || !slot->spi)
        return ESP_NO_SA;
    if (!slot->sa)
        return ESP_UP;
    struct esp_sa *sa = slot->sa;
    hold(held, sa_lock(sa));
    packet->sa = sa->serial;
    enum esp_result result = sa_open(sa, packet, now);
    if (result != ESP_DONE)
        return result;
    struct esp_flow flow;
    if (!inner_flow(packet->data, packet->length, &flow))
        return ESP_MALFORMED;
    const struct flow_slot *known = path_flow(path, &path->admitted, &flow, sa);
    if (!known)
        return ESP_ADMIT;
    if (known->verdict == ESP_DONE)
        note_use(known->used, now);
    return known->verdict;
}

static enum esp_result seal_one(struct esp_path *path, struct esp_packet *packet, pthread_mutex_t **held, double now)
{
    packet->sa = 0;
    size_t length = inner_length(packet->data, packet->length);
    struct esp_flow flow;
    if (!length || length != packet->length || !inner_flow(packet->data, length, &flow))
        return ESP_MALFORMED;
    const struct flow_slot *known = path_flow(path, &path->ways, &flow, NULL);
    if (!known)
        return ESP_UP;
    note_use(known->used, now);
    if (!known->sa)
        return known->verdict;
    hold(held, sa_lock(known->sa));
    return sa_seal(known->sa, packet, now);
}

typedef enum esp_result (*carry_one)(struct esp_path *, struct esp_packet *, pthread_mutex_t **, double);

static int carry(struct esp_path *path, struct esp_packet *packets, int count, double now, carry_one one)
{
    uint64_t drops[ESP_REASONS] = {0};
    pthread_mutex_t *held = NULL;
    int done = 0, due = esp_due_pending(path);
    bool stop = false;
    pthread_rwlock_rdlock(&path->guard);
    while (done < count && !stop) {
        enum esp_result result = one(path, &packets[done], &held, now);
        packets[done++].result = (uint8_t)result;
        if (result < ESP_REASONS)
            ++drops[result];
        stop = result >= ESP_REASONS || esp_due_pending(path) != due;
    }
    hold(&held, NULL);
    pthread_rwlock_unlock(&path->guard);
    for (int each = ESP_DONE + 1; each < ESP_REASONS; ++each)
        if (drops[each])
            __atomic_add_fetch(&path->drops[each], drops[each], __ATOMIC_RELAXED);
    return done;
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
