/* What ffi/solaris/build_solaris.py takes of Solaris' netinet/in.h, written from ipsec(4P); the rest is this system's. */
#pragma once
#include_next <netinet/in.h>
#include <stdint.h>

#define IP_SEC_OPT 0x22
#define IPV6_SEC_OPT 0x22
#define IPSEC_PREF_NEVER 0x01
#define IPSEC_PREF_REQUIRED 0x02
#define IPSEC_PREF_UNIQUE 0x04

typedef struct ipsec_req {
	unsigned int ipsr_ah_req;
	unsigned int ipsr_esp_req;
	unsigned int ipsr_self_encap_req;
	uint8_t ipsr_auth_alg;
	uint8_t ipsr_esp_alg;
	uint8_t ipsr_esp_auth_alg;
} ipsec_req_t;
