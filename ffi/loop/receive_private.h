/* The functions of receive.c that loop.c calls. */
#ifndef NATCOMPAT_LOOP_RECEIVE_PRIVATE_H
#define NATCOMPAT_LOOP_RECEIVE_PRIVATE_H

#include "loop/state_private.h"

/* Takes one batch; returns whether there may be more. */
int loop_receive(struct worker *worker, struct loop_socket *from);

/* Gives the socket, which no thread has any more, the queue that it had before the loop made it larger. */
void loop_restore_queue(struct loop_socket *from);

#endif
