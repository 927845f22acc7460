/* Envelopes as natcompat.backends.hand_back makes and opens them: the layout stands there.
 *
 * From the number of the sender on an envelope is an ESP packet with NULL encryption and HMAC-SHA2-256-128,
 * so the providers of ciphers authenticate it.
 */
#define _GNU_SOURCE
#include "loop/hand_back_private.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "crypto/crypto.h"

enum { MARKER = 4, TAG = 8, COUNT_AT = MARKER + TAG, SOURCE_AT = COUNT_AT + 8, DESTINATION_AT = SOURCE_AT + 26 };
enum { MESSAGE_AT = DESTINATION_AT + 20, MAC = 16, KEY = 32, LARGEST = 65507 };
enum { ATTEMPTS = 20, PAUSE = 5 };   /* milliseconds for which a full buffer is waited for, each time */

struct hand_back {
    int fd;
    struct sockaddr_in6 to;   /* or a sockaddr_in */
    socklen_t to_length;
    uint8_t tag[TAG];
    uint32_t sender, count;
    const struct crypto_cipher *cipher;
    void *key;
    uint8_t envelope[LARGEST];
};

static void set_address(struct hand_back *hand_back, const struct loop_hand_back *way)
{
    struct sockaddr_in *v4 = (struct sockaddr_in *)&hand_back->to;

    if (way->family == AF_INET) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons(way->port);
        memcpy(&v4->sin_addr, way->address, 4);
        hand_back->to_length = sizeof *v4;
        return;
    }
    hand_back->to.sin6_family = AF_INET6;
    hand_back->to.sin6_port = htons(way->port);
    memcpy(&hand_back->to.sin6_addr, way->address, 16);
    hand_back->to_length = sizeof hand_back->to;
}

int hand_back_new(const struct loop_hand_back *way, struct hand_back **made)
{
    struct hand_back *hand_back = calloc(1, sizeof *hand_back);
    struct crypto_transform transform;
    size_t size;

    if (!hand_back)
        return ENOMEM;
    hand_back->fd = -1;
    set_address(hand_back, way);
    memcpy(hand_back->tag, way->tag, TAG);
    hand_back->sender = way->sender;
    if (crypto_describe(&transform, ENCR_NULL, AUTH_HMAC_SHA2_256_128, 0)) {
        transform.sealing = true;
        hand_back->cipher = crypto_find(NULL, &transform);
    }
    if (!hand_back->cipher) {
        hand_back_free(hand_back);
        return ENOTSUP;
    }
    size = (hand_back->cipher->key_size + 63) & ~(size_t)63;
    hand_back->key = aligned_alloc(64, size);
    if (hand_back->key)
        memset(hand_back->key, 0, size);
    if (!hand_back->key || !hand_back->cipher->expand(hand_back->key, &transform, way->key, way->key, KEY)) {
        free(hand_back->key);
        hand_back->key = NULL;
        hand_back_free(hand_back);
        return ENOMEM;
    }
    hand_back->fd = fcntl(way->descriptor, F_DUPFD_CLOEXEC, 0);
    if (hand_back->fd < 0) {
        int error = errno;

        hand_back_free(hand_back);
        return error;
    }
    *made = hand_back;
    return 0;
}

void hand_back_abandon(struct hand_back *hand_back)
{
    if (hand_back && hand_back->fd >= 0)
        close(hand_back->fd);
    if (hand_back)
        hand_back->fd = -1;
}

void hand_back_free(struct hand_back *hand_back)
{
    if (!hand_back)
        return;
    hand_back_abandon(hand_back);
    if (hand_back->key) {
        hand_back->cipher->wipe(hand_back->key);
        free(hand_back->key);
    }
    free(hand_back);
}

bool hand_back_made(const struct hand_back *hand_back, const uint8_t *data, uint32_t length)
{
    return length >= COUNT_AT && !memcmp(data + MARKER, hand_back->tag, TAG);   /* the caller saw the marker */
}

static void put32(uint8_t *to, uint32_t value)
{
    value = htonl(value);
    memcpy(to, &value, 4);
}

static void put_source(uint8_t *to, const struct sockaddr_in6 *name)
{
    memset(to, 0, DESTINATION_AT - SOURCE_AT);
    if (name->sin6_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)name;

        memcpy(to, &v4->sin_addr, 4);
        memcpy(to + 16, &v4->sin_port, 2);
        return;
    }
    memcpy(to, &name->sin6_addr, 16);
    memcpy(to + 16, &name->sin6_port, 2);
    memcpy(to + 18, &name->sin6_flowinfo, 4);
    put32(to + 22, name->sin6_scope_id);
}

bool hand_back_send(struct hand_back *hand_back, const uint8_t *message, uint32_t length,
                    const struct sockaddr_in6 *source, const uint8_t destination[16], uint32_t interface)
{
    uint8_t *envelope = hand_back->envelope;

    if (length > LARGEST - MESSAGE_AT - MAC || hand_back->count == UINT32_MAX)
        return false;
    memset(envelope, 0, MARKER);
    memcpy(envelope + MARKER, hand_back->tag, TAG);
    put32(envelope + COUNT_AT, hand_back->sender);
    put32(envelope + COUNT_AT + 4, ++hand_back->count);
    put_source(envelope + SOURCE_AT, source);
    memcpy(envelope + DESTINATION_AT, destination, 16);
    put32(envelope + DESTINATION_AT + 16, interface);
    memcpy(envelope + MESSAGE_AT, message, length);
    if (!hand_back->cipher->seal(hand_back->key, envelope + COUNT_AT, MESSAGE_AT - SOURCE_AT + length, NULL))
        return false;
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        struct pollfd room = {.fd = hand_back->fd, .events = POLLOUT};

        if (sendto(hand_back->fd, envelope, MESSAGE_AT + length + MAC, MSG_DONTWAIT | MSG_NOSIGNAL,
                   (struct sockaddr *)&hand_back->to, hand_back->to_length) >= 0)
            return true;
        if (errno != EAGAIN && errno != ENOBUFS)
            break;
        poll(&room, 1, PAUSE);
    }
    return false;
}
