/* The functions of addresses.c that send.c calls. */
#ifndef NATCOMPAT_LOOP_ADDRESSES_PRIVATE_H
#define NATCOMPAT_LOOP_ADDRESSES_PRIVATE_H

#include "loop/state_private.h"

/* Returns the socket that serves best: with the local port of the packet, and its address or any. NULL: none. */
struct loop_socket *loop_find_socket(struct loop *loop, const struct esp_packet *packet);

/* Writes the socket address of `peer`, as the family of `socket` has it, and returns its length. */
socklen_t loop_write_name(const struct esp_endpoint *peer, const struct loop_socket *socket, struct sockaddr_in6 *name);

/* Appends ancillary data; the message has room for it. */
void loop_add_control(struct msghdr *message, int level, int type, const void *value, size_t length);

/* Says where the packet comes from, where the socket does not. */
void loop_add_source(struct msghdr *message, const struct loop_socket *socket, const struct esp_endpoint *local);

#endif
