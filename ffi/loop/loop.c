/* The loop's threads, the sockets that come and go, and its beginning and end. */
#define _GNU_SOURCE
#include "loop/loop.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "loop/hand_back_private.h"
#include "loop/receive_private.h"
#include "loop/send_private.h"

#define MOST_EVENTS 32
#define BATCHES 4 /* of one socket, before the next has its turn */
#define LOOKS 5   /* for more work, before a thread sleeps */

/* What stands for a descriptor in epoll: a socket's number and generation, or one of these. */
#define THE_TUN UINT64_MAX
#define THE_WAKE (UINT64_MAX - 1)

static void close_if_open(int fd)
{
    if (fd >= 0)
        close(fd);
}

static int watch(int epoll, int fd, uint64_t what)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = what};

    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

static void kick(struct worker *worker)
{
    uint64_t one = 1;
    ssize_t ignored = write(worker->wake, &one, sizeof one);

    (void)ignored;
}

/* ---- threads */

/* Say that every event that was waiting when somebody asked has been seen to. */
static void report_pass(struct worker *worker)
{
    struct loop *loop = worker->loop;

    pthread_mutex_lock(&loop->lock);
    if (worker->quiesced != worker->requested) {
        worker->quiesced = worker->requested;
        pthread_cond_broadcast(&loop->passed);
    }
    pthread_mutex_unlock(&loop->lock);
}

static void serve_socket(struct worker *worker, uint64_t what)
{
    uint32_t number = (uint32_t)what;
    struct loop *loop = worker->loop;
    struct loop_socket *from;

    /* it cannot go away before this pass is over: see loop_remove_socket */
    pthread_mutex_lock(&loop->lock);
    from = loop->sockets[number];
    if (from && from->generation != what >> 32)
        from = NULL;
    pthread_mutex_unlock(&loop->lock);
    for (int batch = 0; from && batch < BATCHES && loop_receive(worker, from); batch++)
        ;
}

/* To sleep and be woken by another processor costs more than to look a few times whether there is something
 * to do. Whoever else wants this processor has it in between, and often makes what is waited for. */
static int wait_for_events(struct worker *worker, struct epoll_event *events)
{
    for (int look = 0; look < LOOKS; look++) {
        int count = epoll_wait(worker->epoll, events, MOST_EVENTS, 0);

        if (count > 0)
            return count;
        sched_yield();
    }
    return epoll_wait(worker->epoll, events, MOST_EVENTS, -1);
}

static void *run(void *argument)
{
    struct worker *worker = argument;
    struct loop *loop = worker->loop;
    struct epoll_event events[MOST_EVENTS];
    uint64_t ignored;

    while (!__atomic_load_n(&loop->stopping, __ATOMIC_ACQUIRE)) {
        int count = wait_for_events(worker, events), asked = 0;

        for (int i = 0; i < count; i++) {
            if (events[i].data.u64 == THE_WAKE) {
                asked = read(worker->wake, &ignored, sizeof ignored) > 0;
            } else if (events[i].data.u64 == THE_TUN) {
                if (!loop_send(worker) && READ(loop->tun_failed))
                    epoll_ctl(worker->epoll, EPOLL_CTL_DEL, loop->tun, NULL);
            } else {
                serve_socket(worker, events[i].data.u64);
            }
        }
        if (asked)
            report_pass(worker);
    }
    return NULL;
}

static int make_buffers(struct worker *worker)
{
    if (!worker->receiver) {
        worker->receiver = calloc(1, sizeof *worker->receiver);
        if (!worker->receiver || !(worker->receiver->buffer = malloc(RECEIVE_MESSAGES * (size_t)RECEIVE_SLOT)))
            return ENOMEM;
    }
    if (!worker->sender && worker->number == 0 && worker->loop->tun >= 0) {
        worker->sender = calloc(1, sizeof *worker->sender);
        if (!worker->sender || !(worker->sender->arena = malloc(SEND_ARENA))
            || !(worker->sender->frames = malloc(SEND_FRAMES)))
            return ENOMEM;
    }
    return 0;
}

static void free_buffers(struct worker *worker)
{
    if (worker->receiver) {
        free(worker->receiver->buffer);
        free(worker->receiver->frame);
    }
    if (worker->sender) {
        free(worker->sender->arena);
        free(worker->sender->frames);
    }
    free(worker->receiver);
    free(worker->sender);
    worker->receiver = NULL;
    worker->sender = NULL;
}

struct loop *loop_new(struct esp_path *path, int threads)
{
    struct loop *loop;
    int number, failed = 0;

    if (threads < 1)
        threads = 1;
    loop = calloc(1, sizeof *loop + (size_t)threads * sizeof loop->workers[0]);
    if (!loop)
        return NULL;
    loop->path = path;
    loop->tun = -1;
    loop->threads = threads;
    pthread_mutex_init(&loop->lock, NULL);
    pthread_mutex_init(&loop->send_lock, NULL);
    pthread_mutex_init(&loop->event_lock, NULL);
    pthread_cond_init(&loop->passed, NULL);
    loop->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    loop->events = malloc(EVENT_BYTES);
    failed = loop->event_fd < 0 || !loop->events;
    for (number = 0; number < threads; number++) {
        struct worker *worker = &loop->workers[number];

        worker->loop = loop;
        worker->number = number;
        worker->epoll = epoll_create1(EPOLL_CLOEXEC);
        worker->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (worker->epoll < 0 || worker->wake < 0 || watch(worker->epoll, worker->wake, THE_WAKE))
            failed = 1;
    }
    esp_path_hold(path);
    if (failed) {
        int error = errno;

        loop_free(loop);
        errno = error;
        return NULL;
    }
    return loop;
}

int loop_set_tun(struct loop *loop, int tun, int kinds)
{
    int own = fcntl(tun, F_DUPFD_CLOEXEC, 0);

    if (own < 0)
        return errno;
    close_if_open(loop->tun);
    loop->tun = own;
    loop->kinds = kinds;
    return 0;
}

int loop_start(struct loop *loop)
{
    int error = 0;

    if (loop->started)
        return EALREADY;
    if (loop->tun >= 0)
        error = watch(loop->workers[0].epoll, loop->tun, THE_TUN);
    loop->started = !error;
    for (int number = 0; number < loop->threads && !error; number++) {
        struct worker *worker = &loop->workers[number];

        error = make_buffers(worker);
        if (!error)
            error = pthread_create(&worker->thread, NULL, run, worker);
        worker->running = !error;
    }
    if (error)
        loop_stop(loop);
    return error;
}

int loop_stop(struct loop *loop)
{
    if (!loop->started)
        return EALREADY;
    __atomic_store_n(&loop->stopping, 1, __ATOMIC_RELEASE);
    for (int number = 0; number < loop->threads; number++)
        kick(&loop->workers[number]);
    for (int number = 0; number < loop->threads; number++) {
        struct worker *worker = &loop->workers[number];

        if (worker->running)
            pthread_join(worker->thread, NULL);
        pthread_mutex_lock(&loop->lock);
        worker->running = 0;
        pthread_cond_broadcast(&loop->passed);
        pthread_mutex_unlock(&loop->lock);
        free_buffers(worker);
    }
    if (loop->tun >= 0)
        epoll_ctl(loop->workers[0].epoll, EPOLL_CTL_DEL, loop->tun, NULL);
    loop->started = loop->stopping = 0;
    return 0;
}

static void free_socket(struct loop_socket *socket)
{
    hand_back_free(socket->hand_back);
    free(socket);
}

void loop_abandon(struct loop *loop)
{
    close_if_open(loop->tun);
    close_if_open(loop->event_fd);
    for (int number = 0; number < LOOP_SOCKETS; number++)
        if (loop->sockets[number])
            hand_back_abandon(loop->sockets[number]->hand_back);
    for (int number = 0; number < loop->threads; number++) {
        close_if_open(loop->workers[number].epoll);
        close_if_open(loop->workers[number].wake);
    }
}

void loop_free(struct loop *loop)
{
    loop_stop(loop);
    loop_abandon(loop);
    for (int number = 0; number < LOOP_SOCKETS; number++)
        if (loop->sockets[number])
            free_socket(loop->sockets[number]);
    pthread_cond_destroy(&loop->passed);
    pthread_mutex_destroy(&loop->event_lock);
    pthread_mutex_destroy(&loop->send_lock);
    pthread_mutex_destroy(&loop->lock);
    free(loop->events);
    esp_path_release(loop->path);
    free(loop);
}

/* ---- sockets */

/* Put a socket into the table, or take one out. The lock is held. */
static void set_socket(struct loop *loop, int number, struct loop_socket *socket)
{
    __atomic_store_n(&loop->wanted, 1, __ATOMIC_SEQ_CST);
    kick(&loop->workers[0]);
    pthread_mutex_lock(&loop->send_lock);
    loop->sockets[number] = socket;
    __atomic_store_n(&loop->wanted, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&loop->send_lock);
}

int loop_add_socket(struct loop *loop, int descriptor, int thread, const struct loop_address *bound,
                    const struct loop_hand_back *way)
{
    struct worker *worker = &loop->workers[(unsigned)thread % (unsigned)loop->threads];
    struct loop_socket *added = calloc(1, sizeof *added);
    int number, error = 0;

    if (!added)
        return -ENOMEM;
    added->fd = descriptor;
    added->bound = *bound;
    added->worker = worker;
    added->discover = -1;
    added->segments = 1;
    if (way) {
        error = hand_back_new(way, &added->hand_back);
        if (error) {
            free(added);
            return -error;
        }
    }
    pthread_mutex_lock(&loop->lock);
    for (number = 0; number < LOOP_SOCKETS && loop->sockets[number]; number++)
        ;
    if (number == LOOP_SOCKETS) {
        error = ENOSPC;
    } else {
        added->generation = ++loop->generation & 0x7FFFFFFF; /* so it is never one of the others */
        error = watch(worker->epoll, descriptor, (uint64_t)added->generation << 32 | (uint32_t)number);
    }
    if (!error)
        set_socket(loop, number, added);
    pthread_mutex_unlock(&loop->lock);
    if (error) {
        free_socket(added);
        return -error;
    }
    return number;
}

void loop_remove_socket(struct loop *loop, int number)
{
    struct loop_socket *removed;
    struct worker *worker;

    if (number < 0 || number >= LOOP_SOCKETS)
        return;
    pthread_mutex_lock(&loop->lock);
    removed = loop->sockets[number];
    if (removed) {
        worker = removed->worker;
        epoll_ctl(worker->epoll, EPOLL_CTL_DEL, removed->fd, NULL);
        set_socket(loop, number, NULL);
        if (worker->running) {        /* who receives may have it in hand until its pass is over */
            uint64_t pass = ++worker->requested;

            kick(worker);
            while (worker->running && worker->quiesced < pass)
                pthread_cond_wait(&loop->passed, &loop->lock);
        }
    }
    pthread_mutex_unlock(&loop->lock);
    if (removed) {
        loop_restore_queue(removed);
        free_socket(removed);
    }
}
