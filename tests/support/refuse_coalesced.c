/* A kernel whose TUN takes no coalesced packets, or not all kinds of them: preloaded, by $REFUSE.
 *
 * $REFUSE is a list of kinds (tcp4, tcp6, udp, all) with an errno behind it: "tcp4:22,udp:5". */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

static const char *const kinds[] = {"", "tcp4", "", "", "tcp6", "udp"}; /* by gso_type, linux/virtio_net.h */

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
    static ssize_t (*real)(int, const struct iovec *, int);
    const char *refuse = getenv("REFUSE");

    if (!real)
        real = (ssize_t(*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "writev");
    if (refuse && count > 1 && pieces[0].iov_len == 10) {
        uint8_t type = ((const uint8_t *)pieces[0].iov_base)[1] & 0x7F;
        const char *kind = type < 6 ? kinds[type] : "", *found = NULL;

        if (type && *kind && !(found = strstr(refuse, kind)))
            found = strstr(refuse, "all");
        if (found && (found = strchr(found, ':'))) {
            errno = atoi(found + 1);
            return -1;
        }
    }
    return real(fd, pieces, count);
}
