"""scapy's SecurityAssociation opens what the engine seals, and seals what the engine opens."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.ipsec import ESP
from scapy.layers.ipsec import SecurityAssociation as ScapySA

from natcompat.ipsec import Encr, Integ, Mode
from tests.support.esp import OUTER, SPI, TRANSFORMS, Pair, inner, ip_packet, keys, name, udp

pytestmark = pytest.mark.usefixtures("datapath")

ENCRYPTION = {
    Encr.NULL: "NULL",
    Encr.AES_CBC: "AES-CBC",
    Encr.AES_CTR: "AES-CTR",
    Encr.NULL_AUTH_AES_GMAC: "AES-NULL-GMAC",
    Encr.CHACHA20_POLY1305: "CHACHA20-POLY1305",
    **dict.fromkeys((Encr.AES_CCM_8, Encr.AES_CCM_12, Encr.AES_CCM_16), "AES-CCM"),
    Encr.AES_GCM_16: "AES-GCM",
}
INTEGRITY = {
    Integ.HMAC_SHA1_96: "HMAC-SHA1-96",
    Integ.AES_CMAC_96: "AES-CMAC-96",
    Integ.HMAC_SHA2_256_128: "SHA2-256-128",
    Integ.HMAC_SHA2_384_192: "SHA2-384-192",
    Integ.HMAC_SHA2_512_256: "SHA2-512-256",
}
HEADER = {4: IP, 6: IPv6}

CAPABLE = [each for each in TRANSFORMS if each[0] in ENCRYPTION]
"""Not AES_GCM_8 and AES_GCM_12: scapy's AES-GCM has 16 bytes only. `test_vectors` has them."""


def scapy_sa(transforms: tuple[Encr, Integ], version: int, *, tunnel: bool, **changes: Any) -> Any:
    encryption, integrity = transforms
    arguments = keys(encryption, integrity, length=changes.pop("length", None))
    make: Any = ScapySA
    local, remote = OUTER[version]
    return make(
        ESP,
        spi=SPI,
        crypt_algo=ENCRYPTION[encryption],
        crypt_key=arguments["encryption_key"],
        crypt_icv_size=encryption.icv_length or None,
        auth_algo=INTEGRITY.get(integrity),
        auth_key=arguments["integrity_key"],
        tunnel_header=HEADER[version](src=local, dst=remote) if tunnel else None,
        nat_t_header=UDP(sport=4500, dport=4500),
        **changes,
    )


def on_the_wire(packet: bytes, version: int) -> Any:
    """Return an ESP packet with the headers that a socket puts in front of it."""
    local, remote = OUTER[version]
    return HEADER[version](
        ip_packet(local, remote, udp(packet, source_port=4500, destination_port=4500), protocol=17)
    )


def esp_in(wire: Any, version: int) -> bytes:
    """Return the UDP payload of what scapy made."""
    return bytes(wire)[(20 if version == 4 else 40) + 8 :]


@pytest.mark.parametrize("esn", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("inner_version", [4, 6], ids=["IPv4 inside", "IPv6 inside"])
@pytest.mark.parametrize("version", [4, 6], ids=["IPv4 outside", "IPv6 outside"])
@pytest.mark.parametrize("transforms", CAPABLE, ids=name)
def test_tunnel(transforms: tuple[Encr, Integ], version: int, inner_version: int, esn: bool) -> None:
    for length in transforms[0].key_lengths:
        arguments = keys(*transforms, length=length)
        pair = Pair(version=version, inner=inner_version, esn=esn, **arguments)
        peer = scapy_sa(transforms, version, tunnel=True, esn_en=esn, length=length)
        sizes = range(17 if transforms[0] is Encr.AES_CBC else 5) if not esn else range(1)
        packets = [inner(inner_version, udp(bytes(size))) for size in sizes]
        for packet in packets:
            sealed, destination = pair.seal(packet)
            assert destination == (OUTER[version][1], 4500)
            assert bytes(peer.decrypt(on_the_wire(sealed, version))) == packet
        far = scapy_sa(transforms, version, tunnel=True, esn_en=esn, length=length)
        for packet in packets:
            wire = far.encrypt(HEADER[inner_version](packet))
            assert pair.open(esp_in(wire, version)) == packet
        assert pair.near.get_sa(pair.sent).packets == pair.far.get_sa(pair.expected).packets == len(packets)


@pytest.mark.parametrize("esn", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("transforms", CAPABLE, ids=name)
def test_transport(transforms: tuple[Encr, Integ], version: int, esn: bool) -> None:
    pair = Pair(version=version, mode=Mode.TRANSPORT, esn=esn, **keys(*transforms))
    peer = scapy_sa(transforms, version, tunnel=False, esn_en=esn)
    packet = ip_packet(*OUTER[version], b"\x7f" * 33, protocol=47)
    sealed, _ = pair.seal(packet)
    decrypted = peer.decrypt(on_the_wire(sealed, version))
    assert bytes(decrypted.payload) == packet[20 if version == 4 else 40 :]
    assert (decrypted.proto if version == 4 else decrypted.nh) == 47
    far = scapy_sa(transforms, version, tunnel=False, esn_en=esn)
    assert pair.open(esp_in(far.encrypt(HEADER[version](packet)), version)) == packet


@pytest.mark.parametrize(
    "transforms", [(Encr.AES_GCM_16, Integ.NONE), (Encr.AES_CBC, Integ.HMAC_SHA2_256_128)], ids=name
)
def test_extended_numbers_go_on_behind_32_bits(transforms: tuple[Encr, Integ]) -> None:
    """The upper half is not in the packet, and yet authenticated: on both sides of the border."""
    border = 1 << 32
    pair = Pair(esn=True, sequence=border - 100, **keys(*transforms))
    for number in range(border - 99, border + 100):
        sealed, _ = pair.seal(inner())
        assert sealed[4:8] == (number % border).to_bytes(4)
        peer = scapy_sa(transforms, 4, tunnel=True, esn_en=True, esn=number >> 32)
        assert bytes(peer.decrypt(on_the_wire(sealed, 4))) == inner()
        assert pair.open(sealed) == inner()
    assert pair.near.get_sa(pair.sent).sequence == pair.far.get_sa(pair.expected).sequence == border + 99
