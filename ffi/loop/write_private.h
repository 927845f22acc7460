/* The function of write.c that receive.c calls. */
#ifndef NATCOMPAT_LOOP_WRITE_PRIVATE_H
#define NATCOMPAT_LOOP_WRITE_PRIVATE_H

#include "loop/state_private.h"

/* Writes the frames of the batch, and counts them. */
void loop_write(struct worker *worker);

#endif
