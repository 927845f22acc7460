/* What ffi/solaris/build_solaris.py takes of Solaris' net/pfkeyv2.h, written from RFC 2367 and pf_key(4P). */
#pragma once
#include <stdint.h>

#define PF_KEY_V2 2
#define SADB_SATYPE_ESP 3
#define SADB_X_EXT_ADDRESS_NATT_LOC 20
#define SADB_X_EXT_ADDRESS_NATT_REM 21
#define SADB_X_SAFLAGS_TUNNEL 0x20000
#define SADB_X_SAFLAGS_NATT_REM 0x80000
#define SADB_X_SAFLAGS_NATT_LOC 0x100000

typedef struct sadb_msg {
	uint8_t sadb_msg_version, sadb_msg_type, sadb_msg_errno, sadb_msg_satype;
	uint16_t sadb_msg_len, sadb_msg_reserved;
	uint32_t sadb_msg_seq, sadb_msg_pid;
} sadb_msg_t;

typedef struct sadb_sa {
	uint16_t sadb_sa_len, sadb_sa_exttype;
	uint32_t sadb_sa_spi;
	uint8_t sadb_sa_replay, sadb_sa_state, sadb_sa_auth, sadb_sa_encrypt;
	uint32_t sadb_sa_flags;
} sadb_sa_t;

typedef struct sadb_address {
	uint16_t sadb_address_len, sadb_address_exttype;
	uint8_t sadb_address_proto, sadb_address_prefixlen;
	uint16_t sadb_address_reserved;
} sadb_address_t;
