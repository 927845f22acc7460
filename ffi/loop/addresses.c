/* Chooses the socket that sends a packet, and writes the addresses of its message. */
#define _GNU_SOURCE
#include <string.h>

#include "loop/addresses_private.h"

/* How well the socket serves: 0, not at all; most, it has the address that the SA names. */
static int fitness(const struct loop_address *bound, const struct esp_packet *packet)
{
    if (bound->address.port != packet->local.port)
        return 0;
    if (bound->address.version != packet->peer.version)
        return bound->both ? 2 : 0;
    if (bound->any)
        return 3;
    return memcmp(bound->address.address, packet->local.address, sizeof packet->local.address) == 0 ? 4 : 1;
}

struct loop_socket *loop_find_socket(struct loop *loop, const struct esp_packet *packet)
{
    struct loop_socket *found = NULL;
    int best = 0;

    for (int number = 0; number < LOOP_SOCKETS && best < 4; number++) {
        struct loop_socket *each = loop->sockets[number];
        int fits = each ? fitness(&each->bound, packet) : 0;

        if (fits > best) {
            best = fits;
            found = each;
        }
    }
    return found;
}

socklen_t loop_write_name(const struct esp_endpoint *peer, const struct loop_socket *socket, struct sockaddr_in6 *name)
{
    memset(name, 0, sizeof *name);
    if (socket->bound.family == AF_INET) {
        struct sockaddr_in *v4 = (struct sockaddr_in *)name;

        v4->sin_family = AF_INET;
        v4->sin_port = htons(peer->port);
        memcpy(&v4->sin_addr, peer->address, 4);
        return sizeof *v4;
    }
    name->sin6_family = AF_INET6;
    name->sin6_port = htons(peer->port);
    if (peer->version == 4) {
        name->sin6_addr.s6_addr[10] = name->sin6_addr.s6_addr[11] = 0xFF;
        memcpy(name->sin6_addr.s6_addr + 12, peer->address, 4);
    } else {
        memcpy(&name->sin6_addr, peer->address, 16);
    }
    return sizeof *name;
}

void loop_add_control(struct msghdr *message, int level, int type, const void *value, size_t length)
{
    struct cmsghdr *control = (struct cmsghdr *)((uint8_t *)message->msg_control + message->msg_controllen);

    control->cmsg_level = level;
    control->cmsg_type = type;
    control->cmsg_len = CMSG_LEN(length);
    memcpy(CMSG_DATA(control), value, length);
    message->msg_controllen += CMSG_SPACE(length);
}

void loop_add_source(struct msghdr *message, const struct loop_socket *socket, const struct esp_endpoint *local)
{
    if (socket->bound.family == AF_INET) {
        struct in_pktinfo info = {0};

        memcpy(&info.ipi_spec_dst, local->address, 4);
        loop_add_control(message, IPPROTO_IP, IP_PKTINFO, &info, sizeof info);
    } else {
        struct in6_pktinfo info = {0};

        if (local->version == 4) {
            info.ipi6_addr.s6_addr[10] = info.ipi6_addr.s6_addr[11] = 0xFF;
            memcpy(info.ipi6_addr.s6_addr + 12, local->address, 4);
        } else {
            memcpy(&info.ipi6_addr, local->address, 16);
        }
        loop_add_control(message, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof info);
    }
}
