/* Offers UDP datagrams at a steady rate, and counts what arrives; for bench_datapath.py.
 *
 *     udp_load send ADDRESS PORT SIZE PER_SECOND SECONDS [DESTINATIONS STRIDE]
 *     udp_load count PORT SECONDS
 *
 * Without UDP_SEGMENT: as programs do that know nothing of it. Prints one number: of datagrams sent, or received.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, LARGEST = 9000 };

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void pause_for(double seconds)
{
    struct timespec t = {.tv_nsec = (long)(seconds * 1e9)};

    nanosleep(&t, NULL);
}

static int run_send(char **argv, int argc)
{
    static uint8_t payload[LARGEST];
    static struct mmsghdr messages[BATCH];
    static struct sockaddr_in names[BATCH];
    struct iovec iov = {payload, (size_t)atoi(argv[4])};
    double rate = atof(argv[5]), seconds = atof(argv[6]), start;
    uint32_t destinations = argc > 7 ? (uint32_t)atoi(argv[7]) : 1, stride = argc > 8 ? (uint32_t)atoi(argv[8]) : 1;
    uint64_t sent = 0, offered = 0;
    uint32_t base;
    int sock = socket(AF_INET, SOCK_DGRAM, 0), size = 4 << 20;

    if (iov.iov_len > LARGEST || inet_pton(AF_INET, argv[2], &base) != 1)
        return 2;
    base = ntohl(base);
    setsockopt(sock, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    for (int i = 0; i < BATCH; i++) {
        names[i].sin_family = AF_INET;
        names[i].sin_port = htons((uint16_t)atoi(argv[3]));
        messages[i].msg_hdr.msg_iov = &iov;
        messages[i].msg_hdr.msg_iovlen = 1;
        messages[i].msg_hdr.msg_name = &names[i];
        messages[i].msg_hdr.msg_namelen = sizeof names[i];
    }
    start = now();
    for (double elapsed = 0; elapsed < seconds; elapsed = now() - start) {
        uint64_t due = (uint64_t)(elapsed * rate);

        if (due <= offered) {
            pause_for(50e-6);
            continue;
        }
        if (due - offered > rate / 100) /* it could not keep up for 10 ms: what was missed is not made up for */
            offered = due - (uint64_t)(rate / 100);
        while (offered < due) {
            unsigned count = due - offered < BATCH ? (unsigned)(due - offered) : BATCH;
            int done;

            for (unsigned i = 0; i < count; i++)
                names[i].sin_addr.s_addr = htonl(base + (uint32_t)((offered + i) % destinations) * stride);
            done = sendmmsg(sock, messages, count, 0);
            if (done > 0)
                sent += (uint64_t)done;
            offered += count;
        }
    }
    printf("%llu\n", (unsigned long long)sent);
    return 0;
}

static int run_count(char **argv)
{
    static uint8_t payload[BATCH][64];
    static struct mmsghdr messages[BATCH];
    static struct iovec iov[BATCH];
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2]))};
    double end = now() + atof(argv[3]);
    uint64_t received = 0;
    int sock = socket(AF_INET, SOCK_DGRAM, 0), size = 16 << 20;

    setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
    if (bind(sock, (struct sockaddr *)&name, sizeof name) < 0) {
        perror("bind");
        return 1;
    }
    for (int i = 0; i < BATCH; i++) {
        iov[i] = (struct iovec){payload[i], sizeof payload[i]};
        messages[i].msg_hdr.msg_iov = &iov[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    puts("ready");
    fflush(stdout);
    while (now() < end) {
        struct pollfd wanted = {.fd = sock, .events = POLLIN};
        int count;

        if (poll(&wanted, 1, 50) <= 0)
            continue;
        count = recvmmsg(sock, messages, BATCH, MSG_DONTWAIT | MSG_TRUNC, NULL);
        if (count > 0)
            received += (uint64_t)count;
    }
    printf("%llu\n", (unsigned long long)received);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc >= 7 && strcmp(argv[1], "send") == 0)
        return run_send(argv, argc);
    if (argc == 4 && strcmp(argv[1], "count") == 0)
        return run_count(argv);
    fputs("usage: udp_load send|count ...\n", stderr);
    return 2;
}
