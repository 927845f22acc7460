/* Two loops that carry packets to each other while another thread changes everything, for ThreadSanitizer.
 *
 *     loop_threads ROUNDS
 *
 * Their sockets are on loopback; socket pairs, whose other ends feed and drain them, stand for the TUNs.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "esp/path_private.h"
#include "loop/loop.h"
#include "offload/offload.h"

#define REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

enum { FLOWS_EACH = 8, LARGEST = 900, BURST = 16 };

static struct end {
    struct esp_path *path;
    struct loop *loop;
    struct esp_sa *in, *out;
    struct esp_endpoint address;
    int tun, other;   /* what the loop has of the pair, and what we have */
    int socket, number;
    uint64_t ivs;
    uint64_t arrived;
} ends[2];
static double used;
static int finished;

static uint32_t packet_of(uint8_t *packet, int flow)
{
    uint32_t length = 60 + (uint32_t)flow % 3 * 400;
    memset(packet, flow, length);
    memcpy(packet, (uint8_t[]){0x45, 0, (uint8_t)(length >> 8), (uint8_t)length, 0, 0, 0, 0, 64, 253}, 10);
    memcpy(packet + 10, (uint8_t[]){0, 0, 10, 1, 0, 1, 10, 2, 0, (uint8_t)flow}, 10);
    return length;
}

static void learn(struct end *end)
{
    for (int flow = 0; flow < FLOWS_EACH; ++flow) {
        uint8_t packet[LARGEST];
        struct esp_flow learnt;
        REQUIRE(inner_flow(packet, packet_of(packet, flow), &learnt));
        uint64_t generation = esp_generation(end->path);
        esp_way(end->path, generation, &learnt, end->out, &used, ESP_DONE);
        esp_admit(end->path, generation, &learnt, end->in, &used, flow % 5 ? ESP_DONE : ESP_SELECTOR);
    }
}

/* Makes the SA from `end` to its peer, and lets both use it instead of the one before. */
static void renew(struct end *end, struct end *peer, int life)
{
    static const uint8_t key[20] = "not much of a secret";
    struct esp_parameters parameters = {
        .serial = (uint64_t)life << 32 | 1,
        .spi = 0x1000u + (uint32_t)(2 * life) + (end == ends),
        .encryption = ENCR_AES_GCM_16,
        .replay_window = 1024,
        .permitted = UINT64_MAX,
        .soft_packets = 50,
        .key = key,
        .key_length = sizeof key,
    };
    struct esp_sa *old_in = peer->in, *old_out = end->out;
    end->out = esp_outbound_new(end->path, &parameters);
    peer->in = esp_inbound_new(peer->path, &parameters);
    REQUIRE(end->out && peer->in);
    esp_sa_draw_ivs(end->out, &end->ivs);
    esp_sa_place(end->out, &peer->address, &end->address);
    esp_sa_place(peer->in, &end->address, &peer->address);
    REQUIRE(esp_index(peer->path, parameters.spi, peer->in, 0));
    esp_forget(end->path);
    esp_forget(peer->path);
    learn(end);
    learn(peer);
    if (!old_in)
        return;
    esp_sa_retire(old_out);
    esp_sa_retire(old_in);
    esp_sa_free(old_out);
    esp_sa_free(old_in);
}

static void add_socket(struct end *end)
{
    struct loop_address bound = {.address = end->address, .family = AF_INET};
    struct loop_hand_back way = {.descriptor = end->socket, .family = AF_INET, .address = {127, 0, 0, 1},
                                 .port = end->address.port, .sender = 1};
    end->number = loop_add_socket(end->loop, end->socket, 1, &bound, &way);
    REQUIRE(end->number >= 0);
}

static void make(struct end *end)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof name;
    int pair[2];
    REQUIRE(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair));
    end->tun = pair[0], end->other = pair[1];
    end->socket = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    REQUIRE(!bind(end->socket, (struct sockaddr *)&name, length));
    REQUIRE(!getsockname(end->socket, (struct sockaddr *)&name, &length));
    end->address = (struct esp_endpoint){.address = {127, 0, 0, 1}, .port = ntohs(name.sin_port), .version = 4};
    REQUIRE((end->path = esp_path_new(NULL)) && (end->loop = loop_new(end->path, 2)));
    REQUIRE(!loop_set_tun(end->loop, end->tun, MERGE_TCP4 | MERGE_TCP6));
    add_socket(end);
    REQUIRE(!loop_start(end->loop));
}

/* Feeds both, and drains them. */
static void *carry_packets(void *argument)
{
    uint8_t frame[OFFLOAD_HEADER + 65536], expected[LARGEST];
    while (!__atomic_load_n(&finished, __ATOMIC_RELAXED)) {
        struct pollfd ready[2];
        for (int each = 0; each < 2; ++each) {
            ready[each] = (struct pollfd){.fd = ends[each].other, .events = POLLIN};
            memset(frame, 0, OFFLOAD_HEADER);
            for (int flow = 0; flow < BURST; ++flow) {
                uint32_t length = packet_of(frame + OFFLOAD_HEADER, flow % FLOWS_EACH);
                if (write(ends[each].other, frame, OFFLOAD_HEADER + length) < 0)
                    break;
            }
        }
        poll(ready, 2, 1);
        for (int each = 0; each < 2; ++each) {
            ssize_t length;
            while ((length = read(ends[each].other, frame, sizeof frame)) > 0) {
                uint8_t *packet = frame + OFFLOAD_HEADER;
                REQUIRE((uint32_t)length == OFFLOAD_HEADER + packet_of(expected, packet[19]));
                REQUIRE(!memcmp(packet, expected, (size_t)length - OFFLOAD_HEADER));
                __atomic_add_fetch(&ends[each].arrived, 1, __ATOMIC_RELAXED);
            }
        }
    }
    return argument;
}

static void take_events(struct end *end)
{
    static uint8_t packet[65536];
    struct loop_event event;
    struct loop_counters counters;
    struct loop_socket_counters socket_counters;
    while (loop_next_event(end->loop, &event, packet, sizeof packet))
        REQUIRE(event.kind != LOOP_TUN_GONE);
    while (esp_due_next(end->path))
        ;
    loop_read_counters(end->loop, &counters);
    REQUIRE(loop_read_socket_counters(end->loop, end->number, &socket_counters));
}

int main(int count, char **arguments)
{
    int rounds = count == 2 ? atoi(arguments[1]) : 200;
    pthread_t carrier;
    make(&ends[0]);
    make(&ends[1]);
    renew(&ends[0], &ends[1], 1);
    renew(&ends[1], &ends[0], 2);
    REQUIRE(!pthread_create(&carrier, NULL, carry_packets, NULL));
    for (int round = 0; round < rounds; ++round) {
        struct end *end = &ends[round % 2], *peer = &ends[1 - round % 2];
        renew(end, peer, round + 3);
        loop_remove_socket(end->loop, end->number);
        add_socket(end);
        take_events(peer);
        if (round % 10 == 0) {
            REQUIRE(!loop_stop(end->loop));
            REQUIRE(!loop_start(end->loop));
        }
        for (uint64_t before = __atomic_load_n(&peer->arrived, __ATOMIC_RELAXED);
             __atomic_load_n(&peer->arrived, __ATOMIC_RELAXED) == before;)
            take_events(end);   /* something gets through between any two changes */
    }
    __atomic_store_n(&finished, 1, __ATOMIC_RELAXED);
    pthread_join(carrier, NULL);
    printf("%lu and %lu arrived, %d rounds\n", ends[0].arrived, ends[1].arrived, rounds);
    for (int each = 0; each < 2; ++each) {
        struct end *end = &ends[each];
        loop_remove_socket(end->loop, end->number);
        loop_free(end->loop);
        esp_sa_free(end->in);
        esp_sa_free(end->out);
        esp_path_release(end->path);
        close(end->socket), close(end->tun), close(end->other);
    }
    return 0;
}
