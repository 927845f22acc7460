/* Threads that carry packets while another one changes everything, for ThreadSanitizer.
 *
 *     esp_threads ROUNDS
 *
 * Every sequence number comes out once, every packet is opened once, and a packet that was opened is whole.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "esp/path_private.h"

#define REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

enum { CARRIERS = 3, BURST = 16, LENGTH = 100, SAS = 4, ROOM = ESP_HEADROOM + LENGTH + ESP_TAILROOM };

static struct esp_path *path;
static uint64_t ivs;
static double used;
static int finished;
static uint64_t opened, sealed;

static void packet_of(uint8_t *packet, int flow)
{
    memset(packet, 0, LENGTH);
    packet[0] = 0x45, packet[3] = LENGTH, packet[8] = 64, packet[9] = 17;
    memcpy(packet + 12, (uint8_t[]){10, 1, 0, 1, 10, 2, 0, (uint8_t)flow}, 8);
    memset(packet + 28, flow, LENGTH - 28);
}

static struct esp_sa *make(bool outbound, int number, int life)
{
    static const struct {
        uint8_t encryption, integrity, key_length;
    } transforms[SAS] = {   /* half of the packets can be done many at once */
        {ENCR_AES_GCM_16, AUTH_NONE, 20},
        {ENCR_CHACHA20_POLY1305, AUTH_NONE, 36},
        {ENCR_AES_CBC, AUTH_HMAC_SHA2_256_128, 16},
        {ENCR_AES_CBC, AUTH_HMAC_SHA2_512_256, 32},
    };
    static const uint8_t key[64] = "not much of a secret";
    struct esp_parameters parameters = {
        .serial = (uint64_t)(2 * number + outbound + 1) << 32 | (uint32_t)life,
        .spi = 0x1000u + (uint32_t)number,
        .encryption = transforms[number].encryption,
        .integrity = transforms[number].integrity,
        .esn = 1,
        .replay_window = 1024,
        .permitted = UINT64_MAX,
        .soft_packets = 50,
        .key = key,
        .key_length = transforms[number].key_length,
        .mac_key = key,
        .mac_key_length = sizeof key,
    };
    struct esp_sa *sa = (outbound ? esp_outbound_new : esp_inbound_new)(path, &parameters);
    REQUIRE(sa);
    if (outbound && transforms[number].encryption != ENCR_AES_CBC)
        esp_sa_draw_ivs(sa, &ivs);
    struct esp_endpoint peer = {.address = {192, 0, 2, 1}, .port = 4500, .version = 4};
    esp_sa_place(sa, &peer, &peer);
    return sa;
}

static void *carry_packets(void *argument)
{
    uint8_t memory[BURST][ROOM];
    for (int round = 0; !__atomic_load_n(&finished, __ATOMIC_RELAXED); ++round) {
        struct esp_packet packets[BURST];
        for (int each = 0; each < BURST; ++each) {
            packet_of(memory[each] + ESP_HEADROOM, (each + round) % (2 * SAS));
            packets[each] = (struct esp_packet){
                .data = memory[each] + ESP_HEADROOM, .length = LENGTH, .room = LENGTH + ESP_TAILROOM};
        }
        for (int done = 0; done < BURST;)
            done += esp_seal_burst(path, packets + done, BURST - done, round + 1);
        int count = 0;
        for (int each = 0; each < BURST; ++each) {
            if (packets[each].result != ESP_DONE)
                continue;
            packets[count] = packets[each];
            packets[count].peer.port = (uint16_t)(4500 + round % 3);
            ++count;
        }
        __atomic_add_fetch(&sealed, (uint64_t)count, __ATOMIC_RELAXED);
        for (int done = 0; done < count;)
            done += esp_open_burst(path, packets + done, count - done, round + 1);
        for (int each = 0; each < count; ++each) {
            if (packets[each].result != ESP_DONE && packets[each].result != ESP_ADMIT)
                continue;
            uint8_t expected[LENGTH];
            packet_of(expected, packets[each].data[19]);
            REQUIRE(packets[each].length == LENGTH && !memcmp(packets[each].data, expected, LENGTH));
            __atomic_add_fetch(&opened, 1, __ATOMIC_RELAXED);
        }
    }
    return argument;
}

static void learn(struct esp_sa *in[SAS], struct esp_sa *out[SAS])
{
    for (int flow = 0; flow < 2 * SAS; ++flow) {
        uint8_t packet[LENGTH];
        struct esp_flow learnt;
        packet_of(packet, flow);
        REQUIRE(inner_flow(packet, LENGTH, &learnt));
        uint64_t generation = esp_generation(path);
        esp_way(path, generation, &learnt, out[flow % SAS], &used, ESP_DONE);
        esp_admit(path, generation, &learnt, in[flow % SAS], &used, flow % 5 ? ESP_DONE : ESP_SELECTOR);
    }
}

int main(int count, char **arguments)
{
    int rounds = count == 2 ? atoi(arguments[1]) : 200;
    pthread_t carriers[CARRIERS];
    struct esp_sa *in[SAS], *out[SAS];
    path = esp_path_new(NULL);
    REQUIRE(path);
    for (int each = 0; each < SAS; ++each) {
        in[each] = make(false, each, 0), out[each] = make(true, each, 0);
        REQUIRE(esp_index(path, 0x1000u + (uint32_t)each, in[each], 0));
    }
    learn(in, out);
    for (int each = 0; each < CARRIERS; ++each)
        REQUIRE(!pthread_create(&carriers[each], NULL, carry_packets, NULL));
    for (int round = 1; round <= rounds; ++round) {
        int number = round % SAS;
        uint32_t spi = 0x1000u + (uint32_t)number;
        struct esp_usage usage;
        struct esp_endpoint moved, peer = {.address = {192, 0, 2, 9}, .port = 4501, .version = 4};
        uint64_t counters[ESP_REASONS];
        struct esp_sa *old_in = in[number], *old_out = out[number];
        in[number] = make(false, number, round), out[number] = make(true, number, round);
        REQUIRE(esp_index(path, spi, in[number], 0));
        for (int more = 0; more < 8; ++more)   /* the index grows, and shrinks again */
            REQUIRE(esp_index(path, 0x9000u + (uint32_t)(round * 8 + more) % 4000, NULL, 1));
        learn(in, out);
        esp_sa_retire(old_in);
        esp_sa_retire(old_out);
        esp_sa_usage(old_out, &usage);
        if (round % 2)
            esp_forget(path);
        esp_sa_free(old_in);
        esp_sa_free(old_out);
        learn(in, out);
        esp_sa_place(in[(number + 1) % SAS], &peer, &peer);
        esp_sa_take_due(in[(number + 2) % SAS], &moved);
        esp_sa_permit(out[(number + 2) % SAS], UINT64_MAX);
        while (esp_due_next(path))
            ;
        for (uint64_t before = __atomic_load_n(&opened, __ATOMIC_RELAXED);
             __atomic_load_n(&opened, __ATOMIC_RELAXED) == before;)
            sched_yield();   /* something gets through between any two changes */
        esp_counters(path, counters);
        for (int more = 0; more < 8; ++more)
            REQUIRE(esp_index(path, 0x9000u + (uint32_t)(round * 8 + more) % 4000, NULL, 0));
    }
    __atomic_store_n(&finished, 1, __ATOMIC_RELAXED);
    for (int each = 0; each < CARRIERS; ++each)
        pthread_join(carriers[each], NULL);
    for (int each = 0; each < SAS; ++each)
        esp_sa_free(in[each]), esp_sa_free(out[each]);
    esp_path_release(path);
    printf("%lu sealed, %lu opened, %d rounds\n", sealed, opened, rounds);
    return 0;
}
