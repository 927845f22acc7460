/*
 * Preloaded into a process on Linux: its UDP sockets then behave as those of another kernel, which model.h
 * (made of tests/otheros/kernels.py) describes. What that kernel keeps from a socket a socket filter of
 * Linux's drops, so that select() sees what it would see there.
 *
 * Whether the option is on is kept in the socket itself, in SO_PRIORITY: so it is shared by duplicates and
 * by forked children. NATCOMPAT_MODEL_PRIVILEGES has what the process may ("root" on the BSDs), a word that
 * begins with "no-" in NATCOMPAT_MODEL_KERNEL what the kernel lacks.
 *
 * Not modelled: what was queued before the option was set is stripped like what comes later.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "model.h"

enum { ON = 1, EXEMPT = 2, RAW = 4 };
enum { MOST_DESCRIPTORS = 1024, MOST_PIECES = 1025, PF_KEY_V2_ = 2 };

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
	return dlsym(RTLD_NEXT, name);
}

static int fail(int code)
{
	errno = code;
	return -1;
}

static int listed(const char *variable, const char *word)
{
	const char *list = getenv(variable);

	return list != NULL && strstr(list, word) != NULL;
}

static int may(const char *privilege)
{
	return listed("NATCOMPAT_MODEL_PRIVILEGES", privilege);
}

static int integer(int fd, int level, int option)
{
	int value = -1;
	socklen_t size = sizeof value;

	return REAL(getsockopt)(fd, level, option, &value, &size) == 0 ? value : -1;
}

static int is_udp(int fd)
{
	int family = integer(fd, SOL_SOCKET, SO_DOMAIN);

	return (family == AF_INET || family == AF_INET6) && integer(fd, SOL_SOCKET, SO_TYPE) == SOCK_DGRAM;
}

static int state(int fd)
{
	return is_udp(fd) ? integer(fd, SOL_SOCKET, SO_PRIORITY) : 0;
}

static int change(int fd, int flag, int set)
{
	int now = (state(fd) & ~flag) | (set ? flag : 0);
	struct sock_filter program[] = PROGRAM;
	struct sock_fprog filter = { sizeof program / sizeof *program, program };

	if (flag == ON && set && !listed("NATCOMPAT_MODEL_KERNEL", "no-demultiplexing") &&
	    REAL(setsockopt)(fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter) != 0)
		return -1;
	if (flag == ON && !set && (state(fd) & ON))
		REAL(setsockopt)(fd, SOL_SOCKET, SO_DETACH_FILTER, &now, sizeof now);
	return REAL(setsockopt)(fd, SOL_SOCKET, SO_PRIORITY, &now, sizeof now);
}

static int port_of(int fd)
{
	struct sockaddr_in6 address = { 0 };  /* the port is at the same place in both */
	socklen_t size = sizeof address;

	return is_udp(fd) && getsockname(fd, (struct sockaddr *)&address, &size) == 0 ? ntohs(address.sin6_port) : 0;
}

/* --- the option of one socket ------------------------------------------------------------------------ */

static int set_option(int fd, const void *value, socklen_t size)
{
	static const int values[] = VALUES;
	int wanted = 0, known = ANY_VALUE;

	if (size != sizeof wanted)
		return fail(EINVAL);
	memcpy(&wanted, value, sizeof wanted);
	if (STRIPS && !may("sys_ip_config") && !may("sys_net_config"))
		return fail(EPERM);  /* Solaris: the privilege first, then the family */
	if (!TAKES_IPV6 && integer(fd, SOL_SOCKET, SO_DOMAIN) != AF_INET)
		return fail(EAFNOSUPPORT);
	for (size_t i = 0; i < sizeof values / sizeof *values; i++)
		known |= values[i] == wanted;
	return known ? change(fd, ON, wanted != 0) : fail(EINVAL);
}

static int exempt(int fd, const void *value, socklen_t size)
{
	static const char nothing[16];

	if (size != sizeof nothing)
		return fail(EINVAL);
	if (STRIPS) {  /* ipsec_set_req(), ip.c */
		struct sockaddr_in6 peer;
		socklen_t length = sizeof peer;

		if (memcmp(value, nothing, sizeof nothing) && !may("sys_ip_config"))
			return fail(EPERM);
		if (getpeername(fd, (struct sockaddr *)&peer, &length) == 0)
			return fail(EINVAL);
		return change(fd, EXEMPT, memcmp(value, nothing, sizeof nothing) != 0);
	}
	if (!may("root"))
		return fail(EACCES);
	return change(fd, EXEMPT, ((const uint16_t *)value)[2] == 4);  /* IPSEC_POLICY_BYPASS */
}

static int is_option(int fd, int level, int option)
{
	return OPTION && level == IPPROTO_UDP && option == OPTION && is_udp(fd);
}

static int is_exemption(int fd, int level, int option)
{
	return is_udp(fd) && ((IPV4_EXEMPTION && level == IPPROTO_IP && option == IPV4_EXEMPTION) ||
			      (IPV6_EXEMPTION && level == IPPROTO_IPV6 && option == IPV6_EXEMPTION));
}

/* OpenBSD: what it takes is kept nowhere, since the tests never ask for protection */
static int is_level(int fd, int level, int option)
{
	static const int levels[2][4] = { IPV4_LEVELS, IPV6_LEVELS };

	if ((level != IPPROTO_IP && level != IPPROTO_IPV6) || !is_udp(fd))
		return 0;
	for (int i = 0; i < 4; i++)
		if (levels[level == IPPROTO_IPV6][i] > 0 && levels[level == IPPROTO_IPV6][i] == option)
			return 1;
	return 0;
}

int setsockopt(int fd, int level, int option, const void *value, socklen_t size)
{
	if (is_option(fd, level, option))
		return listed("NATCOMPAT_MODEL_KERNEL", "no-ipsec") ? fail(ENOPROTOOPT) : set_option(fd, value, size);
	if (is_exemption(fd, level, option))
		return exempt(fd, value, size);
	if (is_level(fd, level, option))
		return size == sizeof(int) && *(const int *)value == 0 ? 0 : fail(EINVAL);
	return REAL(setsockopt)(fd, level, option, value, size);
}

int getsockopt(int fd, int level, int option, void *value, socklen_t *size)
{
	if (is_option(fd, level, option)) {
		int now = state(fd) & ON ? VALUE : 0;

		if (listed("NATCOMPAT_MODEL_KERNEL", "no-ipsec"))
			return fail(ENOPROTOOPT);
		if (!READABLE || *size < sizeof now)
			return fail(EINVAL);
		memcpy(value, &now, sizeof now);
		*size = sizeof now;
		return 0;
	}
	if (STRIPS && is_exemption(fd, level, option)) {
		uint32_t request[4] = { 0 };

		if (state(fd) & EXEMPT)
			request[0] = request[1] = request[2] = 1;  /* IPSEC_PREF_NEVER */
		if (*size < sizeof request)
			return fail(EINVAL);
		memcpy(value, request, sizeof request);
		*size = sizeof request;
		return 0;
	}
	if (is_level(fd, level, option)) {
		if (*size < sizeof(int))
			return fail(EINVAL);
		memset(value, 0, sizeof(int));
		*size = sizeof(int);
		return 0;
	}
	return REAL(getsockopt)(fd, level, option, value, size);
}

/* --- the one port of the system ---------------------------------------------------------------------- */

static int esp_enabled = 1, esp_port, bypass = -1;

static void read_settings(void)
{
	const char *port = getenv("NATCOMPAT_MODEL_PORT");

	if (bypass >= 0)
		return;
	bypass = listed("NATCOMPAT_MODEL_KERNEL", "no-sa");
	esp_enabled = !listed("NATCOMPAT_MODEL_KERNEL", "no-udpencap");
	esp_port = port != NULL ? atoi(port) : 0;
}

static void apply(int fd)
{
	int port = port_of(fd);

	read_settings();
	if (!OPTION && port != 0)
		change(fd, ON, port == esp_port && esp_enabled && !bypass);
}

static int set_system_wide(int *setting, const int *value)
{
	if (value == NULL)
		return 0;
	if (!may("root"))
		return fail(EPERM);
	*setting = *value;
	for (int fd = 0; fd < MOST_DESCRIPTORS; fd++)
		apply(fd);
	return 0;
}

static int system_wide(int *setting, void *old, size_t *old_size, const void *value, size_t size)
{
	read_settings();
	if (value != NULL && size != sizeof *setting)
		return fail(EINVAL);
	if (old != NULL) {
		if (*old_size < sizeof *setting)
			return fail(ENOMEM);
		memcpy(old, setting, sizeof *setting);
		*old_size = sizeof *setting;
	}
	return set_system_wide(setting, value);
}

/* macOS */
int sysctlbyname(const char *name, void *old, size_t *old_size, const void *value, size_t size)
{
	if (strcmp(name, "net.inet.ipsec.esp_port") == 0)
		return system_wide(&esp_port, old, old_size, value, size);
	if (strcmp(name, "net.inet.ipsec.bypass") == 0 && value == NULL)
		return system_wide(&bypass, old, old_size, NULL, 0);
	return fail(ENOENT);
}

/* OpenBSD, which has no names: CTL_NET, PF_INET, IPPROTO_ESP, ESPCTL_UDPENCAP_* */
int sysctl(const int *mib, unsigned int length, void *old, size_t *old_size, const void *value, size_t size)
{
	if (length == 4 && mib[0] == 4 && mib[1] == AF_INET && mib[2] == IPPROTO_ESP) {
		if (mib[3] == 2)
			return system_wide(&esp_enabled, old, old_size, value, size);
		if (mib[3] == 3)
			return system_wide(&esp_port, old, old_size, value, size);
	}
	return fail(ENOPROTOOPT);
}

int bind(int fd, const struct sockaddr *address, socklen_t size)
{
	int result = REAL(bind)(fd, address, size);

	if (result == 0)
		apply(fd);
	return result;
}

/* --- Solaris: what it strips and inserts, raw sockets, privileges, statistics ------------------------- */

int socket(int family, int type, int protocol)
{
	int kind = type & ~(SOCK_CLOEXEC | SOCK_NONBLOCK), flags = type - kind, raw;

	if (kind == SOCK_RAW && family == PF_KEY_FAMILY && protocol == PF_KEY_V2_) {
		if (listed("NATCOMPAT_MODEL_KERNEL", "no-ipsec"))
			return fail(EPROTONOSUPPORT);
		if (!may("root") && !may("sys_ip_config"))
			return fail(EPERM);
		return REAL(socket)(AF_UNIX, SOCK_DGRAM | flags, 0);
	}
	if (!STRIPS || family != AF_INET || kind != SOCK_RAW || protocol != IPPROTO_UDP)
		return REAL(socket)(family, type, protocol);
	if (!may("net_rawaccess"))
		return fail(EACCES);
	raw = REAL(socket)(AF_INET, SOCK_DGRAM | flags, 0);
	if (raw >= 0)
		change(raw, RAW, 1);
	return raw;
}

/* A raw socket's datagram leaves by the socket that has its source port. */
static ssize_t send_raw(const uint8_t *packet, size_t size, int flags, const struct sockaddr *to)
{
	uint16_t header[4];
	struct sockaddr_in destination;

	if (size < sizeof header || to == NULL)
		return fail(EINVAL);
	memcpy(header, packet, sizeof header);
	memcpy(&destination, to, sizeof destination);
	destination.sin_port = header[1];
	if (ntohs(header[2]) != size)
		return fail(EINVAL);
	for (int fd = 0; fd < MOST_DESCRIPTORS; fd++)
		if (port_of(fd) == ntohs(header[0]) && !(state(fd) & RAW)) {
			int connected = getpeername(fd, (struct sockaddr *)&(struct sockaddr_in6){ 0 },
						    &(socklen_t){ sizeof(struct sockaddr_in6) }) == 0;
			struct iovec piece = { (void *)(packet + sizeof header), size - sizeof header };
			struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1 };

			if (!connected) {
				message.msg_name = &destination;
				message.msg_namelen = sizeof destination;
			}
			return REAL(sendmsg)(fd, &message, flags) < 0 ? -1 : (ssize_t)size;
		}
	return fail(EADDRNOTAVAIL);
}

static ssize_t with_marker(int fd, const struct msghdr *message, int flags, int receiving)
{
	char marker[4] = { 0 };
	struct iovec pieces[MOST_PIECES];
	struct msghdr longer = *message;
	ssize_t size;

	if (message->msg_iovlen >= MOST_PIECES)
		return fail(EMSGSIZE);
	pieces[0] = (struct iovec){ marker, sizeof marker };
	memcpy(pieces + 1, message->msg_iov, message->msg_iovlen * sizeof *pieces);
	longer.msg_iov = pieces;
	longer.msg_iovlen = message->msg_iovlen + 1;
	size = receiving ? REAL(recvmsg)(fd, &longer, flags) : REAL(sendmsg)(fd, &longer, flags);
	if (size < 0)
		return -1;
	if (receiving) {
		struct msghdr *answer = (struct msghdr *)message;

		answer->msg_namelen = longer.msg_namelen;
		answer->msg_controllen = longer.msg_controllen;
		answer->msg_flags = longer.msg_flags;
	}
	return size < (ssize_t)sizeof marker ? 0 : size - (ssize_t)sizeof marker;
}

static int strips(int fd)
{
	return STRIPS && (state(fd) & ON);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	return strips(fd) ? with_marker(fd, message, flags, 1) : REAL(recvmsg)(fd, message, flags);
}

ssize_t recvfrom(int fd, void *buffer, size_t size, int flags, struct sockaddr *from, socklen_t *from_size)
{
	struct iovec piece = { buffer, size };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_name = from };
	ssize_t got;

	if (!strips(fd))
		return REAL(recvfrom)(fd, buffer, size, flags, from, from_size);
	message.msg_namelen = from != NULL ? *from_size : 0;
	got = with_marker(fd, &message, flags, 1);
	if (got >= 0 && from != NULL)
		*from_size = message.msg_namelen;
	return got;
}

ssize_t recv(int fd, void *buffer, size_t size, int flags)
{
	return recvfrom(fd, buffer, size, flags, NULL, NULL);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	return strips(fd) ? with_marker(fd, message, flags, 0) : REAL(sendmsg)(fd, message, flags);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t to_size)
{
	struct iovec piece = { (void *)data, size };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_name = (void *)to, .msg_namelen = to_size };

	if (STRIPS && (state(fd) & RAW))
		return send_raw(data, size, flags, to);
	return strips(fd) ? with_marker(fd, &message, flags, 0) : REAL(sendto)(fd, data, size, flags, to, to_size);
}

ssize_t send(int fd, const void *data, size_t size, int flags)
{
	return sendto(fd, data, size, flags, NULL, 0);
}

#if STRIPS
#include "kstat.h"

int priv_ineffect(const char *privilege)
{
	return may(privilege);
}

/* kstat(3KSTAT): instance 0 of ip:0:ipdrop and ipsecesp:0:esp_stat, with numbers that tell them apart */
static kstat_ctl_t control;
static kstat_t kstats[] = { { .ks_module = "ip", .ks_name = "ipdrop" }, { .ks_module = "ipsecesp", .ks_name = "esp_stat" } };
static kstat_named_t named[] = {
	{ "esp_nat_t_ka", KSTAT_DATA_UINT64, { .ui64 = 70000000001 } },
	{ "esp_no_sa", KSTAT_DATA_UINT64, { .ui64 = 3 } },
	{ "sa_port_renumbers", KSTAT_DATA_UINT32, { .ui32 = 4 } },
};

kstat_ctl_t *kstat_open(void)
{
	return listed("NATCOMPAT_MODEL_KERNEL", "no-kstat") ? NULL : &control;
}

int kstat_close(kstat_ctl_t *unused)
{
	return unused == &control ? 0 : -1;
}

kstat_t *kstat_lookup(kstat_ctl_t *unused, char *module, int instance, char *name)
{
	(void)unused;
	for (int i = 0; i < 2; i++)
		if (!strcmp(kstats[i].ks_module, module) && instance == 0 && !strcmp(kstats[i].ks_name, name))
			return &kstats[i];
	return NULL;
}

kid_t kstat_read(kstat_ctl_t *unused, kstat_t *kstat, void *data)
{
	(void)unused;
	kstat->ks_data = data != NULL ? data : named;
	return 1;
}

void *kstat_data_lookup(kstat_t *kstat, char *name)
{
	for (int i = 0; i < 3; i++)
		if (kstat->ks_data != NULL && (kstat == &kstats[1]) == (i == 2) && !strcmp(named[i].name, name))
			return &named[i];
	return NULL;
}
#endif
