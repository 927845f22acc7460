/* The counters of the loop and of its sockets, read while its threads go on. */
#define _GNU_SOURCE
#include "loop/loop.h"

#include <string.h>

#include "loop/state_private.h"

void loop_read_counters(struct loop *loop, struct loop_counters *counters)
{
    uint64_t *total = (uint64_t *)counters;

    memset(counters, 0, sizeof *counters);
    for (int number = 0; number < loop->threads; number++) {
        uint64_t *each = (uint64_t *)&loop->workers[number].counters;

        for (size_t field = 0; field < sizeof *counters / sizeof *total; field++)
            total[field] += READ(each[field]);
    }
    pthread_mutex_lock(&loop->event_lock);
    counters->events = loop->events_up;
    counters->events_lost = loop->events_lost;
    pthread_mutex_unlock(&loop->event_lock);
}

int loop_read_socket_counters(struct loop *loop, int number, struct loop_socket_counters *counters)
{
    uint64_t *total = (uint64_t *)counters;
    int found = 0;

    memset(counters, 0, sizeof *counters);
    pthread_mutex_lock(&loop->lock);
    if (number >= 0 && number < LOOP_SOCKETS && loop->sockets[number]) {
        uint64_t *each = (uint64_t *)&loop->sockets[number]->counters;

        for (size_t field = 0; field < sizeof *counters / sizeof *total; field++)
            total[field] = READ(each[field]);
        found = 1;
    }
    pthread_mutex_unlock(&loop->lock);
    return found;
}
