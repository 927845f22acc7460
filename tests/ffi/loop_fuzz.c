/* A fuzzer of the loop: hostile frames from the TUN, hostile datagrams from the network, both ways at once.
 *
 *     loop_fuzz BURSTS [SEED]
 *
 * From the TUN come frames with any virtio_net_hdr in front of packets that are right, cut, or noise. From the network
 * come noise, ESP that was tampered with, and authentic ESP with inner packets of the same kinds, many in one datagram of
 * odd segment sizes (UDP_SEGMENT, and UDP_GRO on the other side). Every frame that comes out at the TUN is taken apart
 * again and its checksums are computed anew; every ESP packet that leaves has to open. Socket pairs stand for the TUN.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/virtio_net.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "esp/path_private.h"
#include "loop/loop.h"
#include "offload/offload.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#define UDP_GRO 104
#endif

#define REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s (burst %lu of seed %lu)\n", __FILE__, __LINE__, #condition, burst, first_seed); \
            abort(); \
        } \
    } while (0)

enum { FLOWS_TRIED = 6, ROOM = 2048, LARGEST_FRAME = OFFLOAD_HEADER + 65575 };

static uint64_t seed, first_seed, burst;
static struct esp_path *gateway, *peer;
static struct esp_sa *in, *out, *peer_in, *peer_out;
static struct loop *loop;
static int tun, other, inside, outside;
static double used;
static uint64_t ivs[2], frames, merged, opened, checked;

static uint32_t random_number(uint32_t below)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (uint32_t)(seed >> 32) % below;
}

static void noise(uint8_t *to, size_t length)
{
    for (size_t at = 0; at < length; ++at)
        to[at] = (uint8_t)random_number(256);
}

/* ---- checksums, by the book (RFC 1071) */

static uint32_t add(uint32_t sum, const uint8_t *data, size_t length)
{
    for (size_t at = 0; at < length; ++at)
        sum += at % 2 ? data[at] : (uint32_t)data[at] << 8;
    return sum;
}

static uint16_t fold(uint32_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return (uint16_t)sum;
}

static uint32_t pseudo_sum(const uint8_t *packet, uint8_t protocol, uint32_t length)
{
    uint32_t sum = packet[0] >> 4 == 4 ? add(0, packet + 12, 8) : add(0, packet + 8, 32);
    return sum + protocol + length;
}

/* ---- inner packets */

static uint32_t sequences[FLOWS_TRIED];

/* Writes a packet of a flow: TCP or UDP, IPv4 or IPv6, right in all its fields. Returns the length. */
static uint32_t right_packet(uint8_t *packet, uint32_t flow, uint32_t payload)
{
    int v4 = flow % 2 == 0, tcp = flow % 3 != 2;
    uint32_t ip = v4 ? 20 : 40, transport = tcp ? 20 : 8, rest = transport + payload, length = ip + rest;
    uint8_t *header = packet + ip, protocol = tcp ? 6 : 17;

    memset(packet, 0, ip + transport);
    if (v4) {
        packet[0] = 0x45, packet[2] = (uint8_t)(length >> 8), packet[3] = (uint8_t)length;
        packet[6] = 0x40, packet[8] = 64, packet[9] = protocol;
        memcpy(packet + 12, (uint8_t[]){10, 2, 0, 1, 10, 1, 0, (uint8_t)flow}, 8);
        uint16_t sum = (uint16_t)~fold(add(0, packet, 20));
        packet[10] = (uint8_t)(sum >> 8), packet[11] = (uint8_t)sum;
    } else {
        packet[0] = 0x60, packet[4] = (uint8_t)(rest >> 8), packet[5] = (uint8_t)rest;
        packet[6] = protocol, packet[7] = 64;
        packet[8] = packet[24] = 0xFD, packet[23] = 2, packet[39] = (uint8_t)flow;
    }
    noise(header + transport, payload);
    header[0] = 4, header[1] = (uint8_t)flow, header[2] = 8, header[3] = 1;
    uint32_t checksum_at = tcp ? 16 : 6;
    if (tcp) {
        uint32_t next = htonl(sequences[flow]);
        memcpy(header + 4, &next, 4);
        sequences[flow] += payload;
        header[12] = 5 << 4, header[13] = random_number(20) ? 0x10 : (uint8_t)random_number(256), header[14] = 1;
    } else {
        header[4] = (uint8_t)(rest >> 8), header[5] = (uint8_t)rest;
        if (v4 && flow == 2)
            return length;   /* no checksum */
    }
    uint16_t sum = (uint16_t)~fold(add(pseudo_sum(packet, protocol, rest), header, rest));
    if (!sum)
        sum = 0xFFFF;
    header[checksum_at] = (uint8_t)(sum >> 8), header[checksum_at + 1] = (uint8_t)sum;
    return length;
}

/* Writes a packet that may be anything. */
static uint32_t hostile_packet(uint8_t *packet, uint32_t payload)
{
    uint32_t length = right_packet(packet, random_number(FLOWS_TRIED), payload), changes = 1 + random_number(3);

    switch (random_number(8)) {
    case 0: noise(packet, length); break;
    case 1: length = random_number(length + 1); break;
    case 2: /* a field of a header */
        for (; changes; --changes)
            packet[random_number(length < 60 ? length : 60)] = (uint8_t)random_number(256);
        break;
    }
    return length;
}

/* ---- what comes out */

static void check_transport(const uint8_t *packet, uint32_t length)
{
    uint32_t ip = packet[0] >> 4 == 4 ? 20 : 40;
    uint8_t protocol = packet[0] >> 4 == 4 ? packet[9] : packet[6];

    if (protocol == 17 && !packet[ip + 6] && !packet[ip + 7])
        return;
    REQUIRE(fold(add(pseudo_sum(packet, protocol, length - ip), packet + ip, length - ip)) == 0xFFFF);
    if (ip == 20)
        REQUIRE(fold(add(0, packet, 20)) == 0xFFFF);
    ++checked;
}

static void drain_tun(void)
{
    static uint8_t frame[LARGEST_FRAME], packet[LARGEST_FRAME];
    ssize_t length;

    while ((length = read(other, frame, sizeof frame)) > 0) {
        struct virtio_net_hdr header;
        struct split split;
        uint32_t made, count = 0;

        REQUIRE(length >= OFFLOAD_HEADER);
        memcpy(&header, frame, sizeof header);
        ++frames;
        if (header.gso_type == VIRTIO_NET_HDR_GSO_NONE)
            continue;
        REQUIRE(header.flags == VIRTIO_NET_HDR_F_NEEDS_CSUM);
        REQUIRE(header.hdr_len <= length - OFFLOAD_HEADER && header.csum_start < header.hdr_len);
        REQUIRE(split_begin(&split, frame, (size_t)length) > 1);
        while ((made = split_next(&split, packet))) {
            check_transport(packet, made);
            ++count;
        }
        REQUIRE(count > 1);
        merged += count;
    }
}

static void drain_network(void)
{
    static uint8_t datagram[65536];
    ssize_t length;

    while ((length = recv(outside, datagram, sizeof datagram, MSG_DONTWAIT)) > 0) {
        struct esp_packet packet = {.data = datagram, .length = (uint32_t)length, .room = sizeof datagram};

        esp_open_burst(peer, &packet, 1, 1.0);
        REQUIRE(packet.result == ESP_DONE || packet.result == ESP_ADMIT || packet.result == ESP_MALFORMED);
        ++opened;
    }
}

static void take_events(void)
{
    static uint8_t packet[70000];
    struct loop_event event;

    while (loop_next_event(loop, &event, packet, sizeof packet)) {
        struct esp_flow flow;

        REQUIRE(event.kind != LOOP_TUN_GONE && event.kind != LOOP_REFUSED && event.length <= sizeof packet);
        if (event.kind != LOOP_ADMIT && event.kind != LOOP_SEAL)
            continue;
        if (!inner_flow(packet, event.length, &flow) || random_number(4) == 0)
            continue;
        if (event.kind == LOOP_ADMIT)
            esp_admit(gateway, esp_generation(gateway), &flow, in, &used, ESP_DONE);
        else
            esp_way(gateway, esp_generation(gateway), &flow, out, &used, ESP_DONE);
    }
    while (esp_due_next(gateway))
        ;
}

/* ---- what goes in */

static void feed_tun(void)
{
    uint8_t frame[OFFLOAD_HEADER + 9000];
    struct virtio_net_hdr header = {0};
    uint32_t length = hostile_packet(frame + OFFLOAD_HEADER, random_number(random_number(4) ? 400 : 8000));

    if (random_number(3) == 0) {
        noise((uint8_t *)&header, sizeof header);
        if (random_number(2)) {   /* near to what a kernel would say */
            static const uint8_t types[] = {0, 1, 4, 5, 0x81, 3};
            header.flags = (uint8_t)random_number(3);
            header.gso_type = types[random_number(6)];
            header.hdr_len = (uint16_t)random_number(80);
            header.gso_size = (uint16_t)random_number(2000);
            header.csum_start = (uint16_t)(random_number(2) ? 20 : random_number(100));
            header.csum_offset = (uint16_t)(random_number(2) ? 16 : random_number(30));
        }
    }
    memcpy(frame, &header, sizeof header);
    (void)!write(other, frame, OFFLOAD_HEADER + length);
}

static void feed_network(void)
{
    static uint8_t datagram[65000];
    uint32_t size = 60 + random_number(1000), many = 1 + random_number(12), used_up = 0;
    int hostile = random_number(3) == 0, segment = (int)(random_number(4) ? size : 1 + random_number(1500));
    uint32_t flow = random_number(FLOWS_TRIED);

    if (random_number(16) == 0) {   /* no ESP at all */
        used_up = 1 + random_number(3000);
        noise(datagram, used_up);
    }
    for (uint32_t each = 0; !used_up && each < 1; ++each)
        for (uint32_t number = 0; number < many; ++number) {
            uint8_t buffer[64 + ROOM + 128];
            uint8_t *start = buffer + 64;
            uint32_t length = hostile ? hostile_packet(start, size) : right_packet(start, flow, size);
            struct esp_packet packet = {.data = start, .length = length, .room = ROOM + 128};

            if (esp_sa_seal(peer_out, &packet, 1.0) != ESP_DONE)
                continue;
            if (random_number(40) == 0)
                packet.data[random_number(packet.length)] ^= 1;
            if (used_up + packet.length > sizeof datagram)
                break;
            memcpy(datagram + used_up, packet.data, packet.length);
            used_up += packet.length;
            if (number == 0 && segment == (int)size)
                segment = (int)packet.length;
        }
    setsockopt(outside, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof segment);
    if (send(outside, datagram, used_up, MSG_DONTWAIT) < 0 && errno != EAGAIN) {   /* too many segments, or too long */
        int none = 0;
        setsockopt(outside, IPPROTO_UDP, UDP_SEGMENT, &none, sizeof none);
        (void)!send(outside, datagram, used_up < 1400 ? used_up : 1400, MSG_DONTWAIT);
    }
}

/* ---- the world */

static int udp_socket(struct esp_endpoint *address)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof name;
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);

    REQUIRE(!bind(sock, (struct sockaddr *)&name, length) && !getsockname(sock, (struct sockaddr *)&name, &length));
    *address = (struct esp_endpoint){.address = {127, 0, 0, 1}, .port = ntohs(name.sin_port), .version = 4};
    return sock;
}

static struct esp_sa *association(struct esp_path *path, uint32_t spi, int outbound, uint64_t *counter)
{
    static const uint8_t key[20] = "not much of a secret";
    struct esp_parameters parameters = {
        .serial = (uint64_t)spi << 32 | 1, .spi = spi, .encryption = ENCR_AES_GCM_16, .replay_window = 4096,
        .esn = 1, .permitted = UINT64_MAX, .key = key, .key_length = sizeof key,
    };
    struct esp_sa *sa = outbound ? esp_outbound_new(path, &parameters) : esp_inbound_new(path, &parameters);

    REQUIRE(sa);
    if (outbound)
        esp_sa_draw_ivs(sa, counter);
    else
        REQUIRE(esp_index(path, spi, sa, 0));
    return sa;
}

static void make_world(void)
{
    struct esp_endpoint here, there;
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int pair[2], on = 1, size = 1 << 22;

    REQUIRE(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair));
    tun = pair[0], other = pair[1];
    setsockopt(tun, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(other, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    inside = udp_socket(&here);
    outside = udp_socket(&there);
    setsockopt(inside, IPPROTO_UDP, UDP_GRO, &on, sizeof on);
    name.sin_port = htons(here.port);
    REQUIRE(!connect(outside, (struct sockaddr *)&name, sizeof name));
    REQUIRE((gateway = esp_path_new(NULL)) && (peer = esp_path_new("libcrypto")));
    in = association(gateway, 0x1001, 0, NULL), out = association(gateway, 0x2002, 1, &ivs[0]);
    peer_in = association(peer, 0x2002, 0, NULL), peer_out = association(peer, 0x1001, 1, &ivs[1]);
    esp_sa_place(in, &there, &here), esp_sa_place(out, &there, &here);
    esp_sa_place(peer_in, &here, &there), esp_sa_place(peer_out, &here, &there);
    REQUIRE((loop = loop_new(gateway, 2)));
    REQUIRE(!loop_set_tun(loop, tun, MERGE_TCP4 | MERGE_TCP6 | MERGE_UDP4 | MERGE_UDP6));
    struct loop_address bound = {.address = here, .family = AF_INET};
    REQUIRE(loop_add_socket(loop, inside, 1, &bound, NULL) >= 0);
    REQUIRE(!loop_start(loop));
}

int main(int count, char **arguments)
{
    uint64_t bursts = count > 1 ? strtoull(arguments[1], NULL, 10) : 10000;

    first_seed = seed = count > 2 ? strtoull(arguments[2], NULL, 10) : 0x9E3779B97F4A7C15u;
    make_world();
    for (burst = 0; burst < bursts; ++burst) {
        if (random_number(2))
            feed_tun();
        else
            feed_network();
        if (burst % 8 == 0) {
            drain_tun();
            drain_network();
            take_events();
        }
    }
    usleep(100000);
    drain_tun(), drain_network(), take_events();
    REQUIRE(!loop_stop(loop));
    loop_free(loop);
    esp_sa_free(in), esp_sa_free(out), esp_sa_free(peer_in), esp_sa_free(peer_out);
    esp_path_release(gateway), esp_path_release(peer);
    close(inside), close(outside), close(tun), close(other);
    printf("%lu bursts; %lu frames written, %lu packets of them merged, %lu checksums right, %lu ESP packets opened\n",
           (unsigned long)bursts, frames, merged, checked, opened);
    return 0;
}
