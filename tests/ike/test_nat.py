"""NAT detection, held against what two strongSwan daemons sent each other through a NAT."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natcompat.commands.verify.conversation import Datagram, load
from natcompat.ike import NatDetection, nat_detection_hash
from natcompat.ipsec import IPAddress

NOTIFY, SOURCE_IP, DESTINATION_IP = 41, 16388, 16389
INITIATOR, NAT, RESPONDER = ("192.168.1.2", 500), ("203.0.113.1", 28015), ("203.0.113.2", 500)


def notifications(message: bytes, kind: int) -> Iterator[bytes]:
    """Return the data of the Notify payloads of one type (RFC 7296, 3.10)."""
    payload, offset = message[16], 28
    while payload:
        following, _, length = struct.unpack_from("!BBH", message, offset)
        body = message[offset + 4 : offset + length]
        if payload == NOTIFY and int.from_bytes(body[2:4]) == kind:
            yield body[4 + body[1] :]
        payload, offset = following, offset + length


@pytest.fixture(scope="module")
def init() -> tuple[Datagram, Datagram]:
    """IKE_SA_INIT, request and response, as the responder's interface saw them."""
    request, response = load().datagrams[:2]
    assert (request.source, request.source_port) == NAT
    return request, response


def test_the_hashes_are_those_that_strongswan_sends(init: tuple[Datagram, Datagram]) -> None:
    for datagram, source, destination in ((init[0], INITIATOR, RESPONDER), (init[1], RESPONDER, NAT)):
        message = datagram.payload
        hashes = NatDetection.hashes(message[:8], message[8:16], local=source, remote=destination)
        assert hashes == (
            next(notifications(message, SOURCE_IP)),
            next(notifications(message, DESTINATION_IP)),
        )


def test_the_responder_finds_its_peer_behind_the_nat(init: tuple[Datagram, Datagram]) -> None:
    request = init[0].payload
    detection = NatDetection.received(
        request[:8],
        0,
        local=RESPONDER,
        remote=NAT,
        sources=notifications(request, SOURCE_IP),
        destinations=notifications(request, DESTINATION_IP),
    )
    assert detection == NatDetection(supported=True, local_behind_nat=False, remote_behind_nat=True)
    assert detection.encapsulate
    assert not detection.needs_keepalive


def test_the_initiator_finds_itself_behind_the_nat(init: tuple[Datagram, Datagram]) -> None:
    response = init[1].payload
    detection = NatDetection.received(
        response[:8],
        int.from_bytes(response[8:16]),
        local=INITIATOR,
        remote=RESPONDER,
        sources=notifications(response, SOURCE_IP),
        destinations=notifications(response, DESTINATION_IP),
    )
    assert detection == NatDetection(supported=True, local_behind_nat=True, remote_behind_nat=False)
    assert detection.encapsulate
    assert detection.needs_keepalive


ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
ENDS = st.tuples(ADDRESSES, st.integers(0, 65535))
SPIS = st.binary(min_size=8, max_size=8)


@given(SPIS, SPIS, ENDS, ENDS, st.booleans())
def test_without_a_nat_only_force_encapsulates(
    spi_i: bytes, spi_r: bytes, here: tuple[IPAddress, int], there: tuple[IPAddress, int], force: bool
) -> None:
    source, destination = NatDetection.hashes(spi_i, spi_r, local=here, remote=there, force=force)
    at_peer = NatDetection.received(
        spi_i, spi_r, local=there, remote=here, sources=[source], destinations=[destination]
    )
    # the false source is 0.0.0.0 port 0; a real one would be no address of a packet
    plain = getattr(here[0], "ipv4_mapped", None) or here[0]
    assert at_peer.encapsulate == (force and (str(plain), here[1]) != ("0.0.0.0", 0))
    assert not at_peer.local_behind_nat
    answer = NatDetection.hashes(spi_i, spi_r, local=there, remote=here)
    at_home = NatDetection.received(
        spi_i, spi_r, local=here, remote=there, sources=[answer[0]], destinations=[answer[1]], forced=force
    )
    assert at_home.encapsulate == force
    assert not at_home.needs_keepalive


def test_one_matching_source_of_several_is_enough() -> None:
    sources = [nat_detection_hash(1, 2, address, 500) for address in ("10.0.0.1", "192.0.2.1", "10.0.0.2")]
    destinations = [nat_detection_hash(1, 2, "192.0.2.2", 500)]
    arguments = {"local": ("192.0.2.2", 500), "sources": sources, "destinations": destinations}
    assert not NatDetection.received(1, 2, remote=("192.0.2.1", 500), **arguments).remote_behind_nat  # type: ignore[arg-type]
    assert NatDetection.received(1, 2, remote=("192.0.2.1", 501), **arguments).remote_behind_nat  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["sources", "destinations"])
def test_a_peer_that_sends_no_hashes_has_no_nat_traversal(missing: str) -> None:
    detection = NatDetection.received(
        1,
        2,
        local=("192.0.2.2", 500),
        remote=("192.0.2.1", 500),
        sources=[] if missing == "sources" else [bytes(20)],
        destinations=[] if missing == "destinations" else [bytes(20)],
        forced=True,
    )
    assert not detection.supported
    assert not detection.encapsulate


def test_addresses_as_sockets_give_them() -> None:
    """An IPv6 socket names a zone, and IPv4 peers as mapped addresses: neither is in the packet."""
    assert nat_detection_hash(1, 2, "fe80::1%eth0", 500) == nat_detection_hash(1, 2, "fe80::1", 500)
    assert nat_detection_hash(1, 2, "::ffff:192.0.2.1", 500) == nat_detection_hash(1, 2, "192.0.2.1", 500)
    source, _ = NatDetection.hashes(1, 2, local=("fe80::1", 500, 0, 3)[:2], remote=("fe80::2", 500))
    assert source == nat_detection_hash(1, 2, "fe80::1", 500)


def test_ikev1_uses_the_hash_of_phase_1() -> None:
    assert len(nat_detection_hash(bytes(8), bytes(8), "192.0.2.1", 500, algorithm="md5")) == 16
    assert len(nat_detection_hash(bytes(8), bytes(8), "192.0.2.1", 500, algorithm="sha256")) == 32


@pytest.mark.parametrize(
    ("spi", "port", "words"),
    [(bytes(7), 500, "8 bytes"), (1 << 64, 500, "64 bits"), (-1, 500, "64 bits"), (0, 65536, "port")],
)
def test_impossible_values_are_refused(spi: bytes | int, port: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nat_detection_hash(spi, 0, "192.0.2.1", port)
