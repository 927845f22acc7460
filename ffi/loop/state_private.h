/* The loop's own structures, shared by its files. */
#ifndef NATCOMPAT_LOOP_STATE_PRIVATE_H
#define NATCOMPAT_LOOP_STATE_PRIVATE_H

#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "esp/esp.h"
#include "loop/values.h"
#include "offload/offload.h"

#define LOOP_SOCKETS 256
#define RECEIVE_MESSAGES 64
#define RECEIVE_SLOT 65536
#define SEND_PACKETS 256
#define SEND_FRAMES (5 * 65664)   /* bytes of what was read from the TUN */
#define SEND_ARENA (768 * 1024)
#define EVENT_BYTES (1 << 20)
#define EVENT_OWNERS 256

/* Counters have one writer, and readers at any time. */
#define COUNT(counter, by) __atomic_store_n(&(counter), (counter) + (uint64_t)(by), __ATOMIC_RELAXED)
#define READ(counter) __atomic_load_n(&(counter), __ATOMIC_RELAXED)

struct worker;
struct hand_back;

struct loop_socket {
    int fd;
    struct loop_address bound;
    struct hand_back *hand_back;   /* NULL: IKE that comes here is lost */
    uint32_t generation;
    struct worker *worker;
    int watched;    /* batches for which its queue is large yet, and kept from getting full */
    int usual_queue;
    int shedding;
    int discover;   /* what IP_MTU_DISCOVER was set to last; -1: not yet */
    int segments;   /* whether the kernel cuts what is sent here; it said no once if not */
    struct loop_socket_counters counters;
};

/* Buffers of a thread that receives. */
struct receiver {
    struct mmsghdr messages[RECEIVE_MESSAGES];
    struct iovec iov[RECEIVE_MESSAGES];
    struct sockaddr_in6 names[RECEIVE_MESSAGES];
    _Alignas(8) uint8_t control[RECEIVE_MESSAGES][160];
    struct esp_packet packets[MERGE_MOST];
    struct merge merge;
    struct iovec pieces[MERGE_TCP_PARTS + 1];
    uint8_t *buffer;
    uint8_t *frame; /* room to take a frame apart that the TUN refused; NULL: none was yet */
    int most;       /* messages of the next batch, by how long those of the last were */
};

/* Buffers of the thread that sends. */
struct sender {
    struct esp_packet packets[SEND_PACKETS];
    struct { uint32_t frame, length, number; } origin[SEND_PACKETS];   /* of each: where its frame is, and which segment */
    struct mmsghdr messages[SEND_PACKETS];
    struct iovec iov[SEND_PACKETS];
    struct sockaddr_in6 names[SEND_PACKETS];
    _Alignas(8) uint8_t control[SEND_PACKETS][96];
    uint32_t first[SEND_PACKETS];     /* packet with which a message begins */
    uint32_t count, arena_used, frames_used;
    uint8_t *arena, *frames;
};

struct worker {
    struct loop *loop;
    int number, epoll, wake, running;
    pthread_t thread;
    uint64_t requested, quiesced;   /* under the loop's lock: passes that were asked for and done */
    struct receiver *receiver;
    struct sender *sender;
    struct loop_counters counters;
};

struct loop {
    struct esp_path *path;
    int tun, tun_failed;
    int kinds;                      /* of super-packets that the TUN takes; only ever less */
    int stopping, started;
    pthread_mutex_t lock;           /* of the table of sockets, and of passes */
    pthread_mutex_t send_lock;      /* of the table, too, for who sends, and holds it for as long as that takes */
    int wanted;                     /* somebody waits for the latter, so whoever has it does not wait for room */
    pthread_cond_t passed;
    struct loop_socket *sockets[LOOP_SOCKETS];
    uint32_t generation;

    pthread_mutex_t event_lock;
    int event_fd;
    uint8_t *events;                /* a ring */
    uint64_t event_head, event_tail, events_up, events_lost;
    uint32_t event_share[EVENT_OWNERS];   /* bytes of the ring, by SA or by the host that sends */

    int threads;
    struct worker workers[];
};

/* events.c. The wall clock, in seconds. */
double loop_now(void);
void loop_put_event(struct loop *loop, const struct loop_event *event, const uint8_t *packet);
void loop_wake_python(struct loop *loop);
void loop_tun_failed(struct loop *loop, int error);

#endif
