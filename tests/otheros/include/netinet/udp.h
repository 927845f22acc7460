/* What ffi/solaris/build_solaris.py takes of Solaris' netinet/udp.h, written from udp(4P). */
#pragma once

#define UDP_NAT_T_ENDPOINT 0x0103
