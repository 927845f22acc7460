/* The function of send.c that loop.c calls. */
#ifndef NATCOMPAT_LOOP_SEND_PRIVATE_H
#define NATCOMPAT_LOOP_SEND_PRIVATE_H

#include "loop/state_private.h"

/* Takes what the TUN has, up to a limit; returns whether there may be more. */
int loop_send(struct worker *worker);

#endif
