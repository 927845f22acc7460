/* Opens and seals one packet by one SA. The order of the checks is that of natcompat/esp/engine/association.py. */
#include "esp/sa_private.h"

#include <string.h>

enum { LARGEST_UDP_IPV4 = 65535 - 20 - 8, LARGEST_UDP_IPV6 = 65535 - 8 };

static uint64_t smaller(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

/* The last sequence number there is. */
static uint64_t last_number(const struct esp_sa *sa)
{
    return sa->esn ? UINT64_MAX : UINT32_MAX;
}

static void make_due(struct esp_sa *sa, uint8_t what)
{
    sa->due |= what;
    path_note_due(sa->path, sa);
}

static void expire(struct esp_sa *sa, bool hard)
{
    if (hard) {
        sa->gone = true;
        make_due(sa, ESP_HARD);
    } else if (!sa->soft) {
        sa->soft = true;
        make_due(sa, ESP_SOFT);
    }
}

static void check_limits(struct esp_sa *sa, const struct limits *limits)
{
    bool hard = sa->packets >= limits->hard_packets || sa->octets >= limits->hard_bytes;
    if (hard || sa->packets >= limits->soft_packets || sa->octets >= limits->soft_bytes)
        expire(sa, hard);
}

static void use(struct esp_sa *sa, size_t octets, double now)
{
    if (!sa->packets++)
        sa->first_used = now;
    sa->last_used = now;
    sa->octets += octets;
    if (sa->limits)
        check_limits(sa, sa->limits);
}

/* The anti-replay window (natcompat/esp/engine/replay.py): checked before, committed after authentication. */

enum { BLOCK = 64 };

/* The whole number whose lower half is `low` (RFC 4303, A2.2); false: one from before the first. */
static bool infer(const struct esp_sa *sa, uint32_t low, uint64_t *sequence)
{
    uint32_t top_low = (uint32_t)sa->highest, high = (uint32_t)(sa->highest >> 32);
    int64_t bottom = (int64_t)top_low - sa->in.window_size + 1;
    if (bottom >= 0) {   /* case A: the window lies within one subspace */
        if (low < bottom && ++high == 0)
            return false;   /* there is no number behind the last */
    } else if (low >= bottom + 0x100000000LL) {   /* case B: it spans two */
        if (high-- == 0)
            return false;
    }
    *sequence = (uint64_t)high << 32 | low;
    return true;
}

static enum esp_result window_check(const struct esp_sa *sa, uint64_t sequence)
{
    if (!sa->in.window_size || sequence > sa->highest)
        return ESP_DONE;
    if (sequence == 0)
        return ESP_REPLAYED;   /* the first packet has number 1 */
    if (sa->highest - sequence >= sa->in.window_size)
        return ESP_TOO_OLD;
    return sa->in.window[sequence / BLOCK & sa->in.window_mask] >> sequence % BLOCK & 1 ? ESP_REPLAYED : ESP_DONE;
}

/* Whether a packet may be one that has not been here, if it is authentic. */
static enum esp_result check(const struct esp_sa *sa, const struct esp_packet *packet, uint64_t *sequence)
{
    uint32_t low = load32(packet->data + 4);
    *sequence = low;
    if (sa->esn && !infer(sa, low, sequence))
        return ESP_TOO_OLD;
    return window_check(sa, *sequence);
}

/* A length that cannot be right is told as a check value that is not, which is what the kernel finds. */
static bool has_length(const struct esp_sa *sa, const struct esp_packet *packet)
{
    uint32_t length = packet->length - sa->fixed;
    return packet->length >= sa->fixed + 2u && !(length & (sa->block_length - 1u));
}

static void window_commit(struct esp_sa *sa, uint64_t sequence)
{
    uint64_t block = sequence / BLOCK;
    if (sequence > sa->highest) {
        uint64_t fresh = block - sa->highest / BLOCK;
        sa->highest = sequence;
        if (!sa->in.window_size)
            return;
        if (fresh > sa->in.window_mask)
            memset(sa->in.window, 0, (sa->in.window_mask + (size_t)1) * sizeof *sa->in.window);
        else
            for (; fresh; --fresh)
                sa->in.window[(block - fresh + 1) & sa->in.window_mask] = 0;
    }
    if (sa->in.window_size)
        sa->in.window[block & sa->in.window_mask] |= 1ULL << sequence % BLOCK;
}

static bool same(const struct esp_endpoint *one, const struct esp_endpoint *other)
{
    return !memcmp(one, other, sizeof *one);
}

/* The newest packet came from elsewhere than expected. */
static void notice(struct esp_sa *sa, const struct esp_endpoint *source)
{
    if (!source->version)
        return;   /* the caller does not want to know */
    sa->in.home = *source;
    if (same(source, &sa->peer))
        sa->due &= (uint8_t)~ESP_MOVED;
    else
        make_due(sa, ESP_MOVED);
}

/* How long the payload in front of the trailer is; -1 if the padding is not 1, 2, 3... */
static int64_t payload_length(const uint8_t *text, size_t length)
{
    uint8_t padding = text[length - 2];
    int64_t rest = (int64_t)length - 2 - padding;
    if (rest < 0)
        return -1;
    for (uint8_t each = 0; each < padding; ++each)
        if (text[rest + each] != each + 1)
            return -1;
    return rest;
}

bool sa_look_ahead(const struct esp_sa *sa, const struct esp_packet *packet, struct crypto_job *job)
{
    uint64_t sequence;
    if (sa->gone || check(sa, packet, &sequence) != ESP_DONE || !has_length(sa, packet))
        return false;
    job->key = sa_key(sa);
    job->packet = packet->data;
    job->length = packet->length - sa->fixed;
    job->esn = sa->esn;
    store32(job->high, (uint32_t)(sequence >> 32));
    return true;
}

static bool authentic(struct esp_sa *sa, uint8_t *packet, size_t length, uint64_t sequence,
                      const struct crypto_job *known)
{
    uint8_t high[4];
    store32(high, (uint32_t)(sequence >> 32));
    /* packets in between may have moved the window to another upper half */
    if (known && (!sa->esn || !memcmp(known->high, high, sizeof high)))
        return sa->cipher->many->open(sa_key(sa), packet, length, known->icv);
    return sa->cipher->open(sa_key(sa), packet, length, sa->esn ? high : NULL);
}

enum esp_result sa_open(struct esp_sa *sa, struct esp_packet *packet, double now, const struct crypto_job *known)
{
    uint64_t sequence;
    if (sa->gone)
        return ESP_NO_SA;
    enum esp_result verdict = check(sa, packet, &sequence);
    if (verdict != ESP_DONE) {
        ++*(verdict == ESP_REPLAYED ? &sa->in.replay_drops : &sa->in.window_drops);
        return verdict;
    }
    if (packet->length < sa->fixed)
        return ESP_SHORT;
    size_t length = packet->length - sa->fixed;
    if (!has_length(sa, packet) || !authentic(sa, packet->data, length, sequence, known)) {
        ++sa->in.integrity_drops;
        return ESP_INTEGRITY;
    }

    /* authentic from here on */
    bool newest = sequence > sa->highest;
    window_commit(sa, sequence);
    if (newest && !same(&packet->peer, &sa->in.home))
        notice(sa, &packet->peer);
    uint8_t *text = packet->data + sa->prefix;
    int64_t payload = payload_length(text, length);
    use(sa, payload > 0 ? (size_t)payload : 0, now);
    if (payload < 0)
        return ESP_PADDING;
    uint8_t next_header = text[length - 1];
    if (next_header == NEXT_DUMMY)
        return ESP_DUMMY;
    if (next_header != NEXT_IPV4 && next_header != NEXT_IPV6)
        return ESP_NEXT_HEADER;
    size_t total = inner_length(text, (size_t)payload);
    if (!total || text[0] >> 4 != (next_header == NEXT_IPV4 ? 4 : 6))
        return ESP_MALFORMED;
    packet->room -= sa->prefix;
    packet->data = text;
    packet->length = (uint32_t)total;   /* the rest is TFC padding (RFC 4303, 2.7) */
    if (packet->traffic_class & 3 && sa->copy_ecn && !inner_decapsulate_ecn(text, packet->traffic_class))
        return ESP_ECN;
    return ESP_DONE;
}

bool sa_encrypt(struct esp_sa *sa, const struct crypto_job *job)
{
    return sa->cipher->seal(sa_key(sa), job->packet, job->length, job->esn ? job->high : NULL);
}

void sa_give_up(struct esp_sa *sa, const struct crypto_job *job)
{
    memset(job->packet, 0, sa->prefix + job->length);   /* plaintext does not leave */
    expire(sa, true);
}

/* Seals `packet`, whose payload counts as `octets`, less than it has when there is TFC padding. */
static enum esp_result seal(struct esp_sa *sa, struct esp_packet *packet, uint8_t next_header, double now,
                            struct crypto_job *later)
{
    uint32_t octets = packet->length, length = octets < sa->tfc ? sa->tfc : octets;
    uint32_t block = sa->block_length > 4 ? sa->block_length : 4, padding = -(length + 2) & (block - 1);
    uint32_t plain = length + padding + 2, largest = sa->peer.version == 4 ? LARGEST_UDP_IPV4 : LARGEST_UDP_IPV6;
    if (octets > largest || plain + sa->fixed > largest)
        return ESP_TOO_BIG;
    if (plain + sa->icv_length > packet->room)
        return ESP_UP;
    if (sa->highest >= sa->out.permitted) {
        if (sa->highest < last_number(sa))
            return ESP_UNRESERVED;
        expire(sa, true);
        return ESP_SEQUENCE;
    }
    uint64_t sequence = ++sa->highest;   /* from here on it is used, whatever happens */

    uint8_t *text = packet->data, *start = text - sa->prefix;
    memset(text + octets, 0, length - octets);
    for (uint32_t each = 0; each < padding; ++each)
        text[length + each] = (uint8_t)(each + 1);
    text[plain - 2] = (uint8_t)padding;
    text[plain - 1] = next_header;
    store32(start, sa->spi);
    store32(start + 4, (uint32_t)sequence);
    if (sa->out.ivs) {
        uint64_t iv = esp_next_iv(sa->out.ivs);
        store32(start + 8, (uint32_t)(iv >> 32));
        store32(start + 12, (uint32_t)iv);
    }
    struct crypto_job own, *job = later ? later : &own;
    job->key = sa_key(sa);
    job->packet = start;
    job->length = plain;
    job->esn = sa->esn;
    store32(job->high, (uint32_t)(sequence >> 32));
    if (!later && !sa_encrypt(sa, job)) {
        sa_give_up(sa, job);
        return ESP_SEQUENCE;
    }
    use(sa, octets, now);
    packet->data = start;
    packet->room += sa->prefix;
    packet->length = plain + sa->fixed;
    packet->sa = sa->serial;
    packet->peer = sa->peer;
    packet->local = sa->out.local;
    return ESP_DONE;
}

enum esp_result sa_seal(struct esp_sa *sa, struct esp_packet *packet, double now, struct crypto_job *later)
{
    if (sa->gone)
        return ESP_UP;
    /* the outer header's, before the packet is overwritten (RFC 4301, 5.1.2; RFC 6040, 4.1) */
    uint8_t mask = (uint8_t)((sa->copy_dscp ? 0xFC : 0) | (sa->copy_ecn ? 3 : 0));
    uint8_t traffic_class = inner_traffic_class(packet->data) & mask;
    bool dont_fragment = sa->copy_df && inner_dont_fragment(packet->data);
    enum esp_result result = seal(sa, packet, packet->data[0] >> 4 == 4 ? NEXT_IPV4 : NEXT_IPV6, now,
                                  later);
    packet->traffic_class = traffic_class;
    packet->dont_fragment = dont_fragment;
    return result;
}

int esp_sa_open(struct esp_sa *sa, struct esp_packet *packet, double now)
{
    if (packet->length < ESP_HEADER)
        return packet->result = ESP_SHORT;
    pthread_mutex_lock(sa_lock(sa));
    packet->result = (uint8_t)sa_open(sa, packet, now, NULL);
    pthread_mutex_unlock(sa_lock(sa));
    return packet->result;
}

int esp_sa_seal(struct esp_sa *sa, struct esp_packet *packet, double now)
{
    pthread_mutex_lock(sa_lock(sa));
    packet->result = (uint8_t)(sa->gone ? ESP_NO_SA : sa_seal(sa, packet, now, NULL));
    pthread_mutex_unlock(sa_lock(sa));
    return packet->result;
}

int esp_sa_seal_dummy(struct esp_sa *sa, struct esp_packet *packet, double now)
{
    pthread_mutex_lock(sa_lock(sa));
    uint16_t tfc = sa->tfc;
    sa->tfc = 0;   /* it is as long as it is */
    packet->result = (uint8_t)(sa->gone ? ESP_NO_SA : seal(sa, packet, NEXT_DUMMY, now, NULL));
    packet->traffic_class = packet->dont_fragment = 0;
    sa->tfc = tfc;
    pthread_mutex_unlock(sa_lock(sa));
    return packet->result;
}

void esp_sa_place(struct esp_sa *sa, const struct esp_endpoint *peer, const struct esp_endpoint *local)
{
    pthread_mutex_lock(sa_lock(sa));
    sa->peer = *peer;
    *(sa->outbound ? &sa->out.local : &sa->in.home) = *(sa->outbound ? local : peer);
    sa->due &= (uint8_t)~ESP_MOVED;
    pthread_mutex_unlock(sa_lock(sa));
}

void esp_sa_draw_ivs(struct esp_sa *sa, uint64_t *counter)
{
    sa->out.ivs = counter;
}

uint64_t esp_next_iv(uint64_t *counter)
{
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

void esp_sa_permit(struct esp_sa *sa, uint64_t number)
{
    pthread_mutex_lock(sa_lock(sa));
    number = smaller(number, last_number(sa));
    if (number > sa->out.permitted)
        sa->out.permitted = number;
    pthread_mutex_unlock(sa_lock(sa));
}

void esp_sa_expire(struct esp_sa *sa, int hard)
{
    pthread_mutex_lock(sa_lock(sa));
    expire(sa, hard);
    pthread_mutex_unlock(sa_lock(sa));
}

void esp_sa_retire(struct esp_sa *sa)
{
    pthread_mutex_lock(sa_lock(sa));
    sa->gone = true;
    pthread_mutex_unlock(sa_lock(sa));
}

int esp_sa_take_due(struct esp_sa *sa, struct esp_endpoint *moved_to)
{
    pthread_mutex_lock(sa_lock(sa));
    int due = sa->due;
    sa->due = 0;
    if (due & ESP_MOVED)
        *moved_to = sa->in.home;
    path_forget_due(sa->path, sa);
    pthread_mutex_unlock(sa_lock(sa));
    return due;
}

void esp_sa_usage(struct esp_sa *sa, struct esp_usage *usage)
{
    pthread_mutex_lock(sa_lock(sa));
    *usage = (struct esp_usage){
        .packets = sa->packets,
        .octets = sa->octets,
        .sequence = sa->highest,
        .added = sa->added,
        .serial = sa->serial,
        .first_used = sa->first_used,
        .last_used = sa->last_used,
        .gone = sa->gone, .soft = sa->soft,
        .due = sa->due,
        .moved = !sa->outbound && !same(&sa->in.home, &sa->peer),
    };
    if (!sa->outbound) {
        usage->replay_drops = sa->in.replay_drops;
        usage->window_drops = sa->in.window_drops;
        usage->integrity_drops = sa->in.integrity_drops;
    }
    pthread_mutex_unlock(sa_lock(sa));
}
