/* What ffi/solaris/build_solaris.py takes of Solaris' priv.h, written from priv_set(3C) and privileges(7). */
#pragma once

#define PRIV_SYS_IP_CONFIG ((const char *)"sys_ip_config")
#define PRIV_SYS_NET_CONFIG ((const char *)"sys_net_config")
#define PRIV_NET_RAWACCESS ((const char *)"net_rawaccess")

int priv_ineffect(const char *);
