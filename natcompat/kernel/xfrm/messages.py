"""The messages of XFRM netlink (linux/xfrm.h) as pyroute2 classes.

Fields come in header order and under header names; a field of an embedded structure carries the
name of that structure's member in front (``id.spi`` is ``id_spi``). What the header stores in
network byte order is ``>``; addresses are arrays of 16 bytes (``16B``, tuples of integers) whatever
their family. ``_pad`` fields are the padding that a C compiler adds.

Importing this takes as long as pyroute2 takes, so natcompat does it only when IPsec is opened.
"""

from __future__ import annotations

import struct
from typing import Any

from natcompat.kernel.xfrm.codec import nla, nlmsg
from natcompat.kernel.xfrm.layouts import (
    XFRM_ID,
    XFRM_LIFETIME_CUR,
    XFRM_SELECTOR,
    XFRM_USER_KMADDRESS,
    XFRM_USER_TMPL,
    XFRM_USERPOLICY_INFO,
    XFRM_USERSA_ID,
    XFRM_USERSA_INFO,
    Fields,
    embedded,
    size_of,
)

XFRM_MSG_NEWSA = 0x10
XFRM_MSG_DELSA = 0x11
XFRM_MSG_GETSA = 0x12
XFRM_MSG_NEWPOLICY = 0x13
XFRM_MSG_DELPOLICY = 0x14
XFRM_MSG_GETPOLICY = 0x15
XFRM_MSG_ALLOCSPI = 0x16
XFRM_MSG_ACQUIRE = 0x17
XFRM_MSG_EXPIRE = 0x18
XFRM_MSG_UPDPOLICY = 0x19
XFRM_MSG_UPDSA = 0x1A
XFRM_MSG_POLEXPIRE = 0x1B
XFRM_MSG_FLUSHSA = 0x1C
XFRM_MSG_FLUSHPOLICY = 0x1D
XFRM_MSG_NEWAE = 0x1E
XFRM_MSG_GETAE = 0x1F
XFRM_MSG_REPORT = 0x20
XFRM_MSG_MIGRATE = 0x21
XFRM_MSG_MAPPING = 0x26

XFRMNLGRP_ACQUIRE = 1
XFRMNLGRP_EXPIRE = 2
XFRMNLGRP_SA = 3
XFRMNLGRP_POLICY = 4
XFRMNLGRP_AEVENTS = 5
XFRMNLGRP_REPORT = 6
XFRMNLGRP_MIGRATE = 7
XFRMNLGRP_MAPPING = 8

XFRM_MODE_TRANSPORT = 0
XFRM_MODE_TUNNEL = 1

XFRM_POLICY_IN = 0
XFRM_POLICY_OUT = 1
XFRM_POLICY_FWD = 2
XFRM_POLICY_ALLOW = 0
XFRM_POLICY_BLOCK = 1

XFRM_STATE_NOECN = 1
XFRM_STATE_DECAP_DSCP = 2
XFRM_STATE_NOPMTUDISC = 4
XFRM_STATE_AF_UNSPEC = 32
XFRM_STATE_ESN = 128
XFRM_SA_XFLAG_DONT_ENCAP_DSCP = 1
XFRM_SA_DIR_IN = 1
XFRM_SA_DIR_OUT = 2
XFRM_INF = (1 << 64) - 1


class _algorithm(nla):
    """A structure with ``alg_name[64]`` in front and a key of ``alg_key_len`` bits behind."""

    __slots__ = ()

    def ft_encode(self, offset: int) -> tuple[int, int]:
        for name, fmt in self.fields:
            default = "" if name == "alg_name" else 0
            offset = self.encode_field(fmt, self.data, offset, self.get(name) or default)
        key = bytes(self.get("alg_key") or b"")
        self.data.extend(key)
        padding = -(offset + len(key)) % 4
        self.data.extend(bytes(padding))
        return offset + len(key) + padding, padding

    def ft_decode(self, offset: int) -> None:
        for name, fmt in self.fields:
            self[name], offset = self.decode_field(fmt, self.data, offset)
        self["alg_name"] = self["alg_name"].rstrip(b"\0").decode("ascii", "replace")
        self["alg_key"] = bytes(self.data[offset : offset + (self["alg_key_len"] + 7) // 8])
        del self["attrs"]


class xfrm_attributes:
    """The attributes of all XFRM messages (enum xfrm_attr_type_t)."""

    __slots__ = ()

    prefix: str = "XFRMA_"
    nla_map: Fields = (
        ("XFRMA_UNSPEC", "none"),
        ("XFRMA_ALG_AUTH", "xfrm_algo"),
        ("XFRMA_ALG_CRYPT", "xfrm_algo"),
        ("XFRMA_ALG_COMP", "xfrm_algo"),
        ("XFRMA_ENCAP", "xfrm_encap_tmpl"),
        ("XFRMA_TMPL", "xfrm_user_tmpls"),
        ("XFRMA_SA", "xfrm_usersa"),
        ("XFRMA_POLICY", "xfrm_userpolicy"),
        ("XFRMA_SEC_CTX", "cdata"),
        ("XFRMA_LTIME_VAL", "xfrm_lifetime_cur"),
        ("XFRMA_REPLAY_VAL", "xfrm_replay_state"),
        ("XFRMA_REPLAY_THRESH", "uint32"),
        ("XFRMA_ETIMER_THRESH", "uint32"),
        ("XFRMA_SRCADDR", "xfrm_address"),
        ("XFRMA_COADDR", "xfrm_address"),
        ("XFRMA_LASTUSED", "uint64"),
        ("XFRMA_POLICY_TYPE", "xfrm_userpolicy_type"),
        ("XFRMA_MIGRATE", "cdata"),
        ("XFRMA_ALG_AEAD", "xfrm_algo_aead"),
        ("XFRMA_KMADDRESS", "xfrm_user_kmaddress"),
        ("XFRMA_ALG_AUTH_TRUNC", "xfrm_algo_auth"),
        ("XFRMA_MARK", "xfrm_mark"),
        ("XFRMA_TFCPAD", "uint32"),
        ("XFRMA_REPLAY_ESN_VAL", "xfrm_replay_state_esn"),
        ("XFRMA_SA_EXTRA_FLAGS", "uint32"),
        ("XFRMA_PROTO", "uint8"),
        ("XFRMA_ADDRESS_FILTER", "xfrm_address_filter"),
        ("XFRMA_PAD", "none"),
        ("XFRMA_OFFLOAD_DEV", "xfrm_user_offload"),
        ("XFRMA_SET_MARK", "uint32"),
        ("XFRMA_SET_MARK_MASK", "uint32"),
        ("XFRMA_IF_ID", "uint32"),
        ("XFRMA_MTIMER_THRESH", "uint32"),
        ("XFRMA_SA_DIR", "uint8"),
        ("XFRMA_NAT_KEEPALIVE_INTERVAL", "uint32"),
        ("XFRMA_SA_PCPU", "uint32"),
        ("XFRMA_IPTFS_DROP_TIME", "uint32"),
        ("XFRMA_IPTFS_REORDER_WINDOW", "uint16"),
        ("XFRMA_IPTFS_DONT_FRAG", "flag"),
        ("XFRMA_IPTFS_INIT_DELAY", "uint32"),
        ("XFRMA_IPTFS_MAX_QSIZE", "uint32"),
        ("XFRMA_IPTFS_PKT_SIZE", "uint32"),
    )

    class xfrm_algo(_algorithm):
        __slots__ = ()
        fields: Fields = (("alg_name", "64s"), ("alg_key_len", "I"))

    class xfrm_algo_auth(_algorithm):
        __slots__ = ()
        fields: Fields = (("alg_name", "64s"), ("alg_key_len", "I"), ("alg_trunc_len", "I"))

    class xfrm_algo_aead(_algorithm):
        __slots__ = ()
        fields: Fields = (("alg_name", "64s"), ("alg_key_len", "I"), ("alg_icv_len", "I"))

    class xfrm_encap_tmpl(nla):
        __slots__ = ()
        fields: Fields = (
            ("encap_type", "H"),
            ("encap_sport", ">H"),
            ("encap_dport", ">H"),
            ("_pad", "2x"),
            ("encap_oa", "16B"),
        )

    class xfrm_user_tmpls(nla):
        """An array of struct xfrm_user_tmpl: its value is a list of dictionaries."""

        def ft_encode(self, offset: int) -> tuple[int, int]:
            for template in self.value:
                for name, fmt in XFRM_USER_TMPL:
                    offset = self.encode_field(fmt, self.data, offset, template.get(name, 0))
            return offset, 0

        def ft_decode(self, offset: int) -> None:
            templates: list[dict[str, Any]] = []
            while offset + size_of(XFRM_USER_TMPL) <= self.offset + self.length:
                template: dict[str, Any] = {}
                for name, fmt in XFRM_USER_TMPL:
                    template[name], offset = self.decode_field(fmt, self.data, offset)
                templates.append(template)
            self.value = templates

    class xfrm_usersa(nla):
        __slots__ = ()
        fields: Fields = XFRM_USERSA_INFO

    class xfrm_userpolicy(nla):
        __slots__ = ()
        fields: Fields = XFRM_USERPOLICY_INFO

    class xfrm_lifetime_cur(nla):
        __slots__ = ()
        fields: Fields = XFRM_LIFETIME_CUR

    class xfrm_replay_state(nla):
        __slots__ = ()
        fields: Fields = (("oseq", "I"), ("seq", "I"), ("bitmap", "I"))

    class xfrm_replay_state_esn(nla):
        """Its last field is ``bmp``, a sequence of as many 32-bit words as ``bmp_len`` says, or of none.

        The kernel takes the attribute without its words, too (`ip xfrm` sends it so).
        """

        __slots__ = ()
        fields: Fields = (
            ("bmp_len", "I"),
            ("oseq", "I"),
            ("seq", "I"),
            ("oseq_hi", "I"),
            ("seq_hi", "I"),
            ("replay_window", "I"),
        )

        def ft_encode(self, offset: int) -> tuple[int, int]:
            for name, fmt in self.fields:
                offset = self.encode_field(fmt, self.data, offset, self.get(name) or 0)
            words = self.get("bmp")
            for word in (0,) * self["bmp_len"] if words is None else words:
                offset = self.encode_field("I", self.data, offset, word)
            return offset, 0

        def ft_decode(self, offset: int) -> None:
            for name, fmt in self.fields:
                self[name], offset = self.decode_field(fmt, self.data, offset)
            words = min(self["bmp_len"], (self.offset + self.length - offset) // 4)
            self["bmp"] = struct.unpack_from(f"{words}I", self.data, offset)
            del self["attrs"]

    class xfrm_address(nla):
        __slots__ = ()
        fields: Fields = (("value", "16B"),)

    class xfrm_userpolicy_type(nla):
        __slots__ = ()
        fields: Fields = (
            ("type", "B"),
            ("_pad", "x"),
            ("reserved1", "H"),
            ("reserved2", "B"),
            ("_pad2", "x"),
        )

    class xfrm_user_kmaddress(nla):
        __slots__ = ()
        fields: Fields = XFRM_USER_KMADDRESS

    class xfrm_mark(nla):
        __slots__ = ()
        fields: Fields = (("v", "I"), ("m", "I"))

    class xfrm_address_filter(nla):
        __slots__ = ()
        fields: Fields = (("saddr", "16B"), ("daddr", "16B"), ("family", "H"), ("splen", "B"), ("dplen", "B"))

    class xfrm_user_offload(nla):
        __slots__ = ()
        fields: Fields = (("ifindex", "i"), ("flags", "B"), ("_pad", "3x"))


class xfrm_usersa_info(xfrm_attributes, nlmsg):
    """XFRM_MSG_NEWSA, XFRM_MSG_UPDSA."""

    __slots__ = ()
    fields: Fields = XFRM_USERSA_INFO


class xfrm_usersa_id(xfrm_attributes, nlmsg):
    """XFRM_MSG_DELSA (as a notification with the SA in XFRMA_SA), XFRM_MSG_GETSA."""

    __slots__ = ()
    fields: Fields = XFRM_USERSA_ID


class xfrm_userspi_info(xfrm_attributes, nlmsg):
    """XFRM_MSG_ALLOCSPI; `min` and `max` are in host byte order."""

    __slots__ = ()
    fields: Fields = (*embedded("info", XFRM_USERSA_INFO), ("min", "I"), ("max", "I"))


class xfrm_usersa_flush(xfrm_attributes, nlmsg):
    """XFRM_MSG_FLUSHSA."""

    __slots__ = ()
    fields: Fields = (("proto", "B"),)


class xfrm_userpolicy_info(xfrm_attributes, nlmsg):
    """XFRM_MSG_NEWPOLICY, XFRM_MSG_UPDPOLICY."""

    __slots__ = ()
    fields: Fields = XFRM_USERPOLICY_INFO


class xfrm_userpolicy_id(xfrm_attributes, nlmsg):
    """XFRM_MSG_DELPOLICY, XFRM_MSG_GETPOLICY."""

    __slots__ = ()
    fields: Fields = (*embedded("sel", XFRM_SELECTOR), ("index", "I"), ("dir", "B"), ("_pad", "3x"))


class xfrm_userpolicy_flush(xfrm_attributes, nlmsg):
    """XFRM_MSG_FLUSHPOLICY: no body."""

    __slots__ = ()
    fields: Fields = ()


class xfrm_user_acquire(xfrm_attributes, nlmsg):
    """XFRM_MSG_ACQUIRE."""

    __slots__ = ()
    fields: Fields = (
        *embedded("id", XFRM_ID),
        ("saddr", "16B"),
        *embedded("sel", XFRM_SELECTOR),
        *embedded("policy", XFRM_USERPOLICY_INFO),
        ("aalgos", "I"),
        ("ealgos", "I"),
        ("calgos", "I"),
        ("seq", "I"),
    )


class xfrm_user_expire(xfrm_attributes, nlmsg):
    """XFRM_MSG_EXPIRE."""

    __slots__ = ()
    fields: Fields = (*embedded("state", XFRM_USERSA_INFO), ("hard", "B"), ("_pad", "7x"))


class xfrm_user_polexpire(xfrm_attributes, nlmsg):
    """XFRM_MSG_POLEXPIRE."""

    __slots__ = ()
    fields: Fields = (*embedded("pol", XFRM_USERPOLICY_INFO), ("hard", "B"), ("_pad", "7x"))


class xfrm_user_mapping(xfrm_attributes, nlmsg):
    """XFRM_MSG_MAPPING."""

    __slots__ = ()
    fields: Fields = (
        *embedded("id", XFRM_USERSA_ID),
        ("reqid", "I"),
        ("old_saddr", "16B"),
        ("new_saddr", "16B"),
        ("old_sport", ">H"),
        ("new_sport", ">H"),
    )


class xfrm_aevent_id(xfrm_attributes, nlmsg):
    """XFRM_MSG_NEWAE, XFRM_MSG_GETAE."""

    __slots__ = ()
    fields: Fields = (*embedded("sa_id", XFRM_USERSA_ID), ("saddr", "16B"), ("flags", "I"), ("reqid", "I"))


class xfrm_user_report(xfrm_attributes, nlmsg):
    """XFRM_MSG_REPORT."""

    __slots__ = ()
    fields: Fields = (("proto", "B"), ("_pad", "3x"), *embedded("sel", XFRM_SELECTOR))


MESSAGES: dict[int, type[nlmsg]] = {
    XFRM_MSG_NEWSA: xfrm_usersa_info,
    XFRM_MSG_DELSA: xfrm_usersa_id,
    XFRM_MSG_GETSA: xfrm_usersa_id,
    XFRM_MSG_NEWPOLICY: xfrm_userpolicy_info,
    XFRM_MSG_DELPOLICY: xfrm_userpolicy_id,
    XFRM_MSG_GETPOLICY: xfrm_userpolicy_id,
    XFRM_MSG_ALLOCSPI: xfrm_userspi_info,
    XFRM_MSG_ACQUIRE: xfrm_user_acquire,
    XFRM_MSG_EXPIRE: xfrm_user_expire,
    XFRM_MSG_UPDPOLICY: xfrm_userpolicy_info,
    XFRM_MSG_UPDSA: xfrm_usersa_info,
    XFRM_MSG_POLEXPIRE: xfrm_user_polexpire,
    XFRM_MSG_FLUSHSA: xfrm_usersa_flush,
    XFRM_MSG_FLUSHPOLICY: xfrm_userpolicy_flush,
    XFRM_MSG_NEWAE: xfrm_aevent_id,
    XFRM_MSG_GETAE: xfrm_aevent_id,
    XFRM_MSG_REPORT: xfrm_user_report,
    XFRM_MSG_MAPPING: xfrm_user_mapping,
}
"""The class of each message type; what both user and kernel send has the same one."""
