/* ESP in C under libFuzzer, or with its corpus under sanitizers and valgrind.
 *
 * An input: a byte that chooses the SAs, then steps of a byte, a length (two bytes) and so much payload.
 * Some payloads are sealed here first, as a peer with the keys and no manners does it. A burst is as many copies
 * as the highest bit of the step says. Buffers are as long as what they hold, so that the sanitizer sees every
 * byte too far.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "esp/path_private.h"

enum { SPI_IN = 0x1001, SPI_OUT = 0x2002, MANY = MOST_JOBS + FEWEST_JOBS + 1 };

#define REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

struct world {
    struct esp_path *path;
    struct esp_sa *in, *out;
    const struct crypto_cipher *cipher;
    struct crypto_transform transform;
    void *key;
    bool esn;
    uint64_t sequence, ivs;
    double now, used;
    uint8_t key_material[64];
    int copies;
};

static void setup(struct world *world, uint8_t choice)
{
    static const uint32_t windows[] = {0, 1, 64, 4096};
    static const uint8_t encryptions[] = {ENCR_AES_GCM_16, ENCR_CHACHA20_POLY1305, ENCR_AES_CBC, ENCR_AES_CTR};
    static const size_t lengths[] = {20, 36, 32, 20};
    memset(world, 0, sizeof *world);
    for (size_t each = 0; each < sizeof world->key_material; ++each)
        world->key_material[each] = (uint8_t)each;
    static struct esp_path *paths[2];   /* making one takes long */
    const char *provider = choice & 1 ? NULL : "libcrypto";
    if (!paths[choice & 1])
        paths[choice & 1] = esp_path_new(provider);
    world->path = paths[choice & 1];
    REQUIRE(world->path);
    world->esn = choice & 2;
    struct esp_parameters parameters = {
        .serial = 1ULL << 32,
        .spi = SPI_IN,
        .encryption = encryptions[choice >> 2 & 3],
        .integrity = (choice >> 2 & 3) == 2   ? AUTH_HMAC_SHA2_512_256
                     : (choice >> 2 & 3) == 3 ? AUTH_AES_CMAC_96
                                              : AUTH_NONE,
        .esn = world->esn,
        .copy_dscp = 1,
        .copy_ecn = 1,
        .copy_df = 1,
        .tfc = choice & 32 ? 100 : 0,
        .replay_window = windows[choice >> 4 & 3],
        .permitted = UINT64_MAX,
        .soft_packets = choice & 64 ? 3 : 0,
        .hard_bytes = choice & 128 ? 500 : 0,
        .key = world->key_material,
        .key_length = lengths[choice >> 2 & 3],
        .mac_key = world->key_material,
        .mac_key_length = (choice >> 2 & 3) == 2 ? 64 : 16,
    };
    if (world->esn && !parameters.replay_window)
        parameters.replay_window = 64;
    world->in = esp_inbound_new(world->path, &parameters);
    parameters.spi = SPI_OUT, parameters.serial = 2ULL << 32;
    world->out = esp_outbound_new(world->path, &parameters);
    REQUIRE(world->in && world->out && esp_index(world->path, SPI_IN, world->in, 0));
    if ((choice >> 2 & 3) != 2)
        esp_sa_draw_ivs(world->out, &world->ivs);
    struct esp_endpoint peer = {.address = {192, 0, 2, 1}, .port = 4500, .version = 4};
    esp_sa_place(world->in, &peer, &peer);
    esp_sa_place(world->out, &peer, &peer);

    struct crypto_transform transform;
    REQUIRE(crypto_describe(&transform, parameters.encryption, parameters.integrity, parameters.key_length));
    transform.sealing = true;
    world->transform = transform;
    world->cipher = crypto_find(provider, &transform);
    REQUIRE(!posix_memalign(&world->key, 64, world->cipher->key_size));
    memset(world->key, 0, world->cipher->key_size);
    REQUIRE(world->cipher->expand(world->key, &transform, world->key_material, parameters.mac_key,
                                   parameters.mac_key_length));
}

static void end(struct world *world)
{
    esp_sa_free(world->in);
    esp_sa_free(world->out);
    world->cipher->wipe(world->key);
    free(world->key);
}

static void open_packets(struct world *world, const uint8_t *data, size_t length)
{
    struct esp_packet packets[MANY];
    uint8_t *memory[MANY];
    for (int each = 0; each < world->copies; ++each) {
        memory[each] = malloc(length);
        memcpy(memory[each], data, length);
        packets[each] = (struct esp_packet){
            .data = memory[each],
            .length = (uint32_t)length,
            .room = (uint32_t)length,
            .peer = {.address = {192, 0, 2, 1}, .port = (uint16_t)(4500 + length % 2), .version = 4},
            .traffic_class = (uint8_t)length,
        };
    }
    for (int at = 0; at < world->copies;) {
        int done = esp_open_burst(world->path, packets + at, world->copies - at, world->now += 1);
        REQUIRE(done >= 1 && done <= world->copies - at);
        for (; done; --done, ++at) {
            struct esp_packet *packet = &packets[at];
            struct esp_flow flow;
            if (packet->result == ESP_DONE || packet->result == ESP_ADMIT) {
                REQUIRE(packet->data >= memory[at] && packet->data + packet->length <= memory[at] + length);
                REQUIRE(packet->length == inner_length(packet->data, packet->length));
            }
            if (packet->result == ESP_ADMIT && inner_flow(packet->data, packet->length, &flow))
                esp_admit(world->path, esp_generation(world->path), &flow, world->in, &world->used,
                          packet->length % 5 ? ESP_DONE : ESP_SELECTOR);
        }
        for (int rest = at; rest < world->copies; ++rest)   /* as it came */
            REQUIRE(!length || !memcmp(memory[rest], data, length));
    }
    for (int each = 0; each < world->copies; ++each)
        free(memory[each]);
}

/* Seals `payload`, a plaintext with its trailer, behind its first two bytes, which move the sequence number. */
static void authentic(struct world *world, const uint8_t *payload, size_t length, bool tamper)
{
    if (length < 2)
        return;
    world->sequence += (uint64_t)(int64_t)((int16_t)load16(payload));
    payload += 2, length -= 2;
    if (length % world->transform.block_length)
        return;
    size_t iv_length = world->transform.iv_length;
    size_t whole = ESP_HEADER + iv_length + length + world->transform.icv_length;
    uint8_t *packet = malloc(whole), high[4];
    REQUIRE(packet);
    store32(packet, SPI_IN);
    store32(packet + 4, (uint32_t)world->sequence);
    store32(high, (uint32_t)(world->sequence >> 32));
    memset(packet + ESP_HEADER, 7, iv_length);
    memcpy(packet + ESP_HEADER + iv_length, payload, length);
    REQUIRE(world->cipher->seal(world->key, packet, length, world->esn ? high : NULL));
    if (tamper)
        packet[whole * 5 / 7] ^= 1;
    open_packets(world, packet, whole);
    free(packet);
}

static void seal_packets(struct world *world, const uint8_t *payload, size_t length, uint32_t room)
{
    struct esp_packet packets[MANY];
    uint8_t *memory[MANY];
    for (int each = 0; each < world->copies; ++each) {
        memory[each] = malloc(ESP_HEADROOM + length + room);
        REQUIRE(memory[each]);
        memcpy(memory[each] + ESP_HEADROOM, payload, length);
        packets[each] = (struct esp_packet){
            .data = memory[each] + ESP_HEADROOM, .length = (uint32_t)length, .room = (uint32_t)length + room};
    }
    for (int at = 0; at < world->copies;) {
        int done = esp_seal_burst(world->path, packets + at, world->copies - at, world->now += 1);
        REQUIRE(done >= 1 && done <= world->copies - at);
        for (; done; --done, ++at) {
            const struct esp_packet *packet = &packets[at];
            uint8_t *data = memory[at] + ESP_HEADROOM;
            struct esp_flow flow;
            if (packet->result == ESP_DONE) {
                REQUIRE(packet->data == data - ESP_HEADER - world->transform.iv_length);
                REQUIRE(packet->data + packet->length <= data + length + room);
                REQUIRE(load32(packet->data) == SPI_OUT);
            } else if (packet->result == ESP_UP && inner_length(payload, length) == length &&
                       inner_flow(payload, length, &flow)) {
                esp_way(world->path, esp_generation(world->path), &flow, length % 7 ? world->out : NULL, &world->used,
                        length % 7 ? ESP_DONE : ESP_DISCARD);
            }
        }
        for (int rest = at; rest < world->copies; ++rest)
            REQUIRE(!length || !memcmp(memory[rest] + ESP_HEADROOM, payload, length));
    }
    for (int each = 0; each < world->copies; ++each)
        free(memory[each]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct world world;
    if (!size)
        return 0;
    setup(&world, *data);
    for (++data, --size; size >= 3;) {
        size_t length = load16(data + 1);
        const uint8_t *payload = data + 3;
        if (length > size - 3)
            length = size - 3;
        uint8_t step = *data;
        world.copies = step & 128 ? MANY : 1;
        switch (step % 8) {
        case 0:
        case 1: authentic(&world, payload, length, false); break;
        case 2: authentic(&world, payload, length, true); break;
        case 3: open_packets(&world, payload, length); break;
        case 4:
        case 5: seal_packets(&world, payload, length, step & 8 ? ESP_TAILROOM : ESP_TAILROOM + 100); break;
        case 6: seal_packets(&world, payload, length, step >> 3); break;
        case 7: esp_forget(world.path); break;
        }
        data = payload + length, size -= length + 3;
    }
    while (esp_due_next(world.path))
        ;
    end(&world);
    return 0;
}

#ifdef MAIN
/* Tries every line of a corpus: hexadecimal. */
int main(int count, char **arguments)
{
    static char line[1 << 20];
    static uint8_t input[sizeof line / 2];
    FILE *corpus = count == 2 ? fopen(arguments[1], "r") : NULL;
    int tried = 0;
    REQUIRE(corpus);
    for (; fgets(line, sizeof line, corpus); ++tried) {
        size_t length = 0;
        for (unsigned byte; sscanf(line + 2 * length, "%2x", &byte) == 1; ++length)
            input[length] = (uint8_t)byte;
        uint8_t *exact = malloc(length);
        memcpy(exact, input, length);
        LLVMFuzzerTestOneInput(exact, length);
        free(exact);
    }
    fclose(corpus);
    printf("%d inputs\n", tried);
    return tried ? 0 : 1;
}
#endif
