/* The loop: ESP sockets -> path -> TUN and back, in threads that never hold Python's lock.
 *
 * What it cannot do it hands up, as events in a bounded ring, and goes on. Sockets come and go while
 * it runs. All of them belong to the caller, who closes them when they are out of it.
 */
#ifndef NATCOMPAT_LOOP_H
#define NATCOMPAT_LOOP_H

#include "loop/values.h"

/* cffi: begin */
struct loop;

/* One thread at the least: the first serves the TUN. NULL and errno: no memory, no descriptors. */
struct loop *loop_new(struct esp_path *path, int threads);

/* `tun`: with IFF_VNET_HDR, not blocking. `kinds`: of super-packets that it takes (MERGE_TCP4 ...). Before loop_start.
 * The loop has a descriptor of its own of it, which stays good when the caller closes his. 0 or an errno. */
int loop_set_tun(struct loop *loop, int tun, int kinds);

/* Start, and stop, the threads. Both return 0 or an errno; stopping takes milliseconds. */
int loop_start(struct loop *loop);
int loop_stop(struct loop *loop);

/* Read, and send from, `descriptor`, a UDP socket that does not block, in thread `thread` (modulo their
 * number). `way`: how IKE returns from it to the application; NULL: it is lost, and counted as an error.
 * Return its number, or a negative errno. */
int loop_add_socket(struct loop *loop, int descriptor, int thread, const struct loop_address *bound,
                    const struct loop_hand_back *way);

/* Return when no thread touches the socket any more. */
void loop_remove_socket(struct loop *loop, int number);

int loop_event_descriptor(struct loop *loop);   /* readable when there are events or something is due */
/* Take the oldest event; its packet is cut to `room`. 0: there is none. */
int loop_next_event(struct loop *loop, struct loop_event *event, uint8_t *packet, uint32_t room);

void loop_read_counters(struct loop *loop, struct loop_counters *counters);
int loop_read_socket_counters(struct loop *loop, int number, struct loop_socket_counters *counters);

/* Stop if it runs, and free. In a forked child: close the child's descriptors, free nothing. */
void loop_free(struct loop *loop);
void loop_abandon(struct loop *loop);
/* cffi: end */

#endif
