"""The numbers of PF_KEY v2: RFC 2367's, and those that several or single systems added.

What is above 11 (messages) or 16 (extensions) means something else on other systems.
"""

from __future__ import annotations

from typing import Final

PF_KEY_V2: Final = 2

# messages (RFC 2367, 3.1)
SADB_GETSPI: Final = 1
SADB_UPDATE: Final = 2
SADB_ADD: Final = 3
SADB_DELETE: Final = 4
SADB_GET: Final = 5
SADB_ACQUIRE: Final = 6
SADB_REGISTER: Final = 7
SADB_EXPIRE: Final = 8
SADB_FLUSH: Final = 9
SADB_DUMP: Final = 10

# messages of KAME and its descendants, and of Linux
SADB_X_SPDUPDATE: Final = 13
SADB_X_SPDADD: Final = 14
SADB_X_SPDDELETE: Final = 15
SADB_X_SPDGET: Final = 16
SADB_X_SPDDUMP: Final = 18
SADB_X_SPDFLUSH: Final = 19
SADB_X_NAT_T_NEW_MAPPING: Final = 23  # Linux

# messages of OpenBSD
SADB_X_ADDFLOW: Final = 12
SADB_X_DELFLOW: Final = 13
SADB_X_ASKPOLICY: Final = 15

# extensions (RFC 2367, 2.3)
SADB_EXT_SA: Final = 1
SADB_EXT_LIFETIME_CURRENT: Final = 2
SADB_EXT_LIFETIME_HARD: Final = 3
SADB_EXT_LIFETIME_SOFT: Final = 4
SADB_EXT_ADDRESS_SRC: Final = 5
SADB_EXT_ADDRESS_DST: Final = 6
SADB_EXT_ADDRESS_PROXY: Final = 7
SADB_EXT_KEY_AUTH: Final = 8
SADB_EXT_KEY_ENCRYPT: Final = 9
SADB_EXT_SUPPORTED_AUTH: Final = 14
SADB_EXT_SUPPORTED_ENCRYPT: Final = 15
SADB_EXT_SPIRANGE: Final = 16

# extensions of KAME and its descendants, and of Linux
SADB_X_EXT_POLICY: Final = 18
SADB_X_EXT_SA2: Final = 19
SADB_X_EXT_NAT_T_TYPE: Final = 20
SADB_X_EXT_NAT_T_SPORT: Final = 21
SADB_X_EXT_NAT_T_DPORT: Final = 22
SADB_X_EXT_NAT_T_OA: Final = 23  # FreeBSD and NetBSD: OAI, that of the source
SADB_X_EXT_SA_REPLAY: Final = 26  # FreeBSD
SADB_X_EXT_NEW_ADDRESS_SRC: Final = 27  # FreeBSD
SADB_X_EXT_NEW_ADDRESS_DST: Final = 28  # FreeBSD

# extensions of OpenBSD
SADB_X_EXT_SRC_MASK: Final = 17
SADB_X_EXT_DST_MASK: Final = 18
SADB_X_EXT_PROTOCOL: Final = 19
SADB_X_EXT_FLOW_TYPE: Final = 20
SADB_X_EXT_SRC_FLOW: Final = 21
SADB_X_EXT_DST_FLOW: Final = 22
SADB_X_EXT_ASKED_POLICY: Final = 25  # its SADB_X_EXT_POLICY: the number of a question
SADB_X_EXT_UDPENCAP: Final = 31
SADB_X_EXT_LIFETIME_LASTUSE: Final = 32
SADB_X_EXT_COUNTER: Final = 36
SADB_X_EXT_REPLAY: Final = 39

# extensions of Solaris
SADB_X_EXT_ADDRESS_INNER_SRC: Final = 7
SADB_X_EXT_ADDRESS_NATT_LOC: Final = 20
SADB_X_EXT_ADDRESS_NATT_REM: Final = 21
SADB_X_EXT_ADDRESS_INNER_DST: Final = 22
SADB_X_EXT_REPLAY_VALUE: Final = 24

# sadb_sa_state
SADB_SASTATE_LARVAL: Final = 0
SADB_SASTATE_MATURE: Final = 1

# sadb_sa_flags
SOLARIS_NOREPLAY: Final = 0x2
SOLARIS_NATTED: Final = 0x1000
SOLARIS_INBOUND: Final = 0x4000
SOLARIS_OUTBOUND: Final = 0x8000
SOLARIS_TUNNEL: Final = 0x2_0000
SOLARIS_NATT_REM: Final = 0x8_0000
SOLARIS_NATT_LOC: Final = 0x10_0000
OPENBSD_TUNNEL: Final = 0x4
OPENBSD_UDPENCAP: Final = 0x200
MACOS_NATT: Final = 0x2
MACOS_NATT_KEEPALIVE: Final = 0x4

# sadb_x_sa2_mode
IPSEC_MODE_TRANSPORT: Final = 1
IPSEC_MODE_TUNNEL: Final = 2

UDP_ENCAP_ESPINUDP: Final = 2

# sadb_x_policy and sadb_x_ipsecrequest
IPSEC_POLICY_DISCARD: Final = 0
IPSEC_POLICY_NONE: Final = 1
IPSEC_POLICY_IPSEC: Final = 2
IPSEC_POLICY_ENTRUST: Final = 3
IPSEC_POLICY_BYPASS: Final = 4
IPSEC_DIR_INBOUND: Final = 1
IPSEC_DIR_OUTBOUND: Final = 2
IPSEC_DIR_FWD: Final = 3  # Linux
IPSEC_LEVEL_USE: Final = 1
IPSEC_LEVEL_REQUIRE: Final = 2
IPSEC_LEVEL_UNIQUE: Final = 3
IPSEC_MANUAL_REQID_MAX: Final = 0x3FFF
"""The largest reqid of a policy; for a larger one the kernel takes another in silence."""

# OpenBSD's sadb_protocol of a flow
SADB_X_FLOW_TYPE_USE: Final = 1
SADB_X_FLOW_TYPE_REQUIRE: Final = 3
SADB_X_FLOW_TYPE_BYPASS: Final = 4
SADB_X_FLOW_TYPE_DENY: Final = 5
IPSP_DIRECTION_IN: Final = 1
IPSP_DIRECTION_OUT: Final = 2
