"""The XFRM messages have the layout of linux/xfrm.h, and say what `ip xfrm` and the kernel say."""

import ctypes
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("XFRM is the IPsec of Linux", allow_module_level=True)

from natcompat.kernel.xfrm import layouts, messages

REQUESTS = json.loads((Path(__file__).parent / "golden" / "xfrm_requests.json").read_text())

# As a C compiler lays them out on x86-64 and every other 64-bit ABI: name, size, some offsets.
STRUCTURES: list[tuple[str, int, dict[str, int]]] = [
    ("xfrm_usersa_info", 224, {"id_daddr": 56, "id_spi": 72, "saddr": 80, "lft_soft_byte_limit": 96,
        "curlft_bytes": 160, "stats_replay_window": 192, "seq": 204, "reqid": 208, "family": 212,
        "mode": 214, "replay_window": 215, "flags": 216}),
    ("xfrm_usersa_id", 24, {"daddr": 0, "spi": 16, "family": 20, "proto": 22}),
    ("xfrm_userspi_info", 232, {"min": 224, "max": 228}),
    ("xfrm_usersa_flush", 1, {}),
    ("xfrm_userpolicy_info", 168, {"lft_soft_byte_limit": 56, "curlft_bytes": 120, "priority": 152,
        "index": 156, "dir": 160, "action": 161, "flags": 162, "share": 163}),
    ("xfrm_userpolicy_id", 64, {"index": 56, "dir": 60}),
    ("xfrm_user_acquire", 280, {"id_daddr": 0, "saddr": 24, "sel_daddr": 40, "policy_sel_daddr": 96,
        "aalgos": 264, "ealgos": 268, "calgos": 272, "seq": 276}),
    ("xfrm_user_expire", 232, {"hard": 224}),
    ("xfrm_user_polexpire", 176, {"hard": 168}),
    ("xfrm_user_mapping", 64, {"reqid": 24, "old_saddr": 28, "new_saddr": 44, "old_sport": 60,
        "new_sport": 62}),
    ("xfrm_aevent_id", 48, {"saddr": 24, "flags": 40, "reqid": 44}),
    ("xfrm_user_report", 60, {"sel_daddr": 4}),
]  # fmt: skip

ATTRIBUTES = {
    "xfrm_algo": 68,
    "xfrm_algo_auth": 72,
    "xfrm_algo_aead": 72,
    "xfrm_encap_tmpl": 24,
    "xfrm_usersa": 224,
    "xfrm_userpolicy": 168,
    "xfrm_lifetime_cur": 32,
    "xfrm_replay_state": 12,
    "xfrm_replay_state_esn": 24,
    "xfrm_address": 16,
    "xfrm_userpolicy_type": 6,
    "xfrm_user_kmaddress": 40,
    "xfrm_mark": 8,
    "xfrm_address_filter": 36,
    "xfrm_user_offload": 8,
}


@pytest.mark.parametrize(("name", "size", "offsets"), STRUCTURES, ids=[row[0] for row in STRUCTURES])
def test_messages_are_laid_out_as_in_c(name: str, size: int, offsets: dict[str, int]) -> None:
    fields = getattr(messages, name).fields
    assert layouts.size_of(fields) == size
    assert {field: layouts.offset_of(fields, field) for field in offsets} == offsets


@pytest.mark.parametrize(("name", "size"), ATTRIBUTES.items())
def test_attributes_are_laid_out_as_in_c(name: str, size: int) -> None:
    assert layouts.size_of(getattr(messages.xfrm_attributes, name).fields) == size


def test_embedded_structures() -> None:
    assert layouts.size_of(layouts.XFRM_SELECTOR) == 56
    assert layouts.size_of(layouts.XFRM_ID) == 24
    assert layouts.size_of(layouts.XFRM_USER_TMPL) == 64
    assert layouts.size_of(layouts.XFRM_LIFETIME_CFG) == 64
    assert layouts.offset_of(layouts.XFRM_USER_TMPL, "reqid") == 44
    assert layouts.offset_of(layouts.XFRM_USER_TMPL, "optional") == 50
    assert layouts.offset_of(layouts.XFRM_USER_TMPL, "aalgos") == 52
    with pytest.raises(KeyError):
        layouts.offset_of(layouts.XFRM_ID, "colour")


def test_attribute_numbers() -> None:
    numbers = {name: number for number, (name, _) in enumerate(messages.xfrm_attributes.nla_map)}
    assert len(numbers) == 42
    expected = {"ENCAP": 4, "TMPL": 5, "LTIME_VAL": 9, "LASTUSED": 15, "ALG_AEAD": 18, "MARK": 21,
        "REPLAY_ESN_VAL": 23, "IF_ID": 31, "MTIMER_THRESH": 32, "SA_DIR": 33,
        "NAT_KEEPALIVE_INTERVAL": 34, "IPTFS_PKT_SIZE": 41}  # fmt: skip
    assert {name: numbers["XFRMA_" + name] for name in expected} == expected


def decode(octets: bytes) -> Any:
    kind = struct.unpack_from("=H", octets, 4)[0]
    message = messages.MESSAGES[kind](octets)
    message.decode()
    return message


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_survive_decoding_and_encoding(name: str) -> None:
    """What `ip xfrm` sent is understood without a rest, and comes out as the same bytes."""
    octets = bytes.fromhex(REQUESTS[name]["bytes"])
    decoded = decode(octets)
    again = type(decoded)()
    for field, _ in decoded.fields:
        again[field] = decoded[field]
    again["header"] = dict(decoded["header"])
    again["attrs"] = [(slot.name, slot.value) for slot in decoded["attrs"]]
    assert "UNKNOWN" not in [name for name, _ in again["attrs"]]
    again.encode()
    # ip leaves the last attribute or field unpadded in the length, or pads it: both are right.
    assert bytes(again.data).rstrip(b"\0")[4:] == octets.rstrip(b"\0")[4:]
    assert abs(len(again.data) - len(octets)) < 4


def test_a_request_in_words() -> None:
    message = decode(bytes.fromhex(REQUESTS["tunnel AEAD with UDP"]["bytes"]))
    assert message["id_spi"] == 0xC0DE0001
    assert bytes(message["id_daddr"])[:4] == bytes([192, 0, 2, 2])
    assert message["mode"] == messages.XFRM_MODE_TUNNEL
    assert message["lft_hard_packet_limit"] == messages.XFRM_INF
    algorithm = message.get_attr("XFRMA_ALG_AEAD")
    assert (algorithm["alg_name"], algorithm["alg_icv_len"]) == ("rfc4106(gcm(aes))", 128)
    assert algorithm["alg_key"] == bytes(range(20))
    encapsulation = message.get_attr("XFRMA_ENCAP")
    assert (encapsulation["encap_sport"], encapsulation["encap_dport"]) == (4500, 34567)
    policy = decode(bytes.fromhex(REQUESTS["tunnel policy"]["bytes"]))
    (template,) = policy.get_attr("XFRMA_TMPL")
    assert (template["reqid"], template["id_proto"], template["aalgos"]) == (7, 50, 0xFFFFFFFF)
    esn = decode(bytes.fromhex(REQUESTS["transport CBC with ESN"]["bytes"])).get_attr("XFRMA_REPLAY_ESN_VAL")
    assert (esn["replay_window"], esn["bmp_len"], esn["bmp"]) == (128, 4, ())  # ip sends no words


def test_this_machine_has_the_usual_byte_sizes() -> None:
    assert ctypes.sizeof(ctypes.c_uint64) == ctypes.alignment(ctypes.c_uint64) == 8
