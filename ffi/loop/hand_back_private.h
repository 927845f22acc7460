/* The hand-back: IKE that came to an ESP socket returns to the application's socket, in an envelope. */
#ifndef NATCOMPAT_LOOP_HAND_BACK_PRIVATE_H
#define NATCOMPAT_LOOP_HAND_BACK_PRIVATE_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>

#include "loop/values.h"

struct hand_back;

/* Makes the sender of `way`, whose descriptor it duplicates. Returns 0 or an errno. */
int hand_back_new(const struct loop_hand_back *way, struct hand_back **made);

/* Closes its descriptor, wipes its key and frees it. NULL: nothing. */
void hand_back_free(struct hand_back *hand_back);

/* Closes its descriptor alone, in a forked child. NULL: nothing. */
void hand_back_abandon(struct hand_back *hand_back);

/* Returns whether `data` is an envelope of this endpoint. */
bool hand_back_made(const struct hand_back *hand_back, const uint8_t *data, uint32_t length);

/* Sends `message`, from `source` to the local address `destination`, which came by `interface`. One thread at a
 * time. False: it was lost. */
bool hand_back_send(struct hand_back *hand_back, const uint8_t *message, uint32_t length,
                    const struct sockaddr_in6 *source, const uint8_t destination[16], uint32_t interface);

#endif
