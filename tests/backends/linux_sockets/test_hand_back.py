"""IKE that comes to an ESP socket of the steering goes back to the application."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, set_nat_t_endpoint
from natcompat.backends.diversion import Diversion
from natcompat.backends.hand_back import HandBack
from natcompat.backends.linux_sockets import filters as bpf
from natcompat.backends.linux_sockets import options, steering
from tests.support.linux import (
    ESP,
    FAMILIES,
    LINUX,
    Collector,
    at,
    ike,
    readable,
    send_ike,
    udp,
    wait_until,
)
from tests.support.steering import (
    GRO,
    UDP_SEGMENT,
    glued_or_early,
    steered,
)

pytestmark = LINUX


def segments(peer: socket.socket, address: Any, payloads: list[bytes]) -> None:
    """Send `payloads`, all of one size, so that they stay glued: UDP_SEGMENT over loopback."""
    size = len(payloads[0])
    ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
    peer.sendmsg([b"".join(payloads)], ancillary, 0, address)


@FAMILIES
@pytest.mark.parametrize("wildcard", [False, True], ids=["address", "wildcard"])
def test_ike_glued_behind_esp_is_handed_back(family: socket.AddressFamily, wildcard: bool) -> None:
    """The program sees a coalesced packet once, so IKE inside goes where its first segment goes."""
    consumer = Collector(coalesce=True)
    host = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}[family] if wildcard else None
    batches, size = 20, 200
    with udp(family, host) as sock, udp(family) as peer:
        endpoint = steered(sock, consumer)
        expected = []
        for batch in range(batches):
            first, second = 2 * batch, 2 * batch + 1
            esp = [ESP.ljust(size - 4, b"%d" % part) + b"%04d" % batch for part in range(3)]
            glued = [esp[0], NON_ESP_MARKER + ike(first, size - 4), esp[1], esp[2]]
            glued.append(NON_ESP_MARKER + ike(second, size - 4))
            segments(peer, at(sock), glued)
            expected += [ike(first, size - 4), ike(second, size - 4)]
        received = [sock.recvfrom(65535) for _ in expected]
        assert sorted(message for message, _ in received) == expected
        assert {source[:2] for _, source in received} == {peer.getsockname()[:2]}
        consumer.wait_for(3 * batches)
        assert not readable(sock, 0.05)
        assert len({packet for packet, _ in consumer.packets}) == 3 * batches
        stats = endpoint.stats()
        assert (stats.ike, stats.handed_back, stats.errors) == (2 * batches, 2 * batches, 0)


@pytest.mark.parametrize(
    ("coalesce", "device", "gro"),
    [(True, b"", 1), (False, b"", 0), (True, b"lo", 0)],
    ids=["asked for", "not asked for", "bound to a device"],
)
def test_gro_is_on_where_it_is_asked_for_and_ike_can_be_handed_back(
    coalesce: bool, device: bytes, gro: int
) -> None:
    with udp() as sock:
        sock.setsockopt(socket.SOL_SOCKET, options.SO_BINDTODEVICE, device)
        group = steering.Steering(sock, Diversion(Collector(coalesce=coalesce), socket.AF_INET))
        assert [engine.getsockopt(*GRO) for engine in group._engines] == [gro]
        group.detach(sock)


def test_esp_glued_behind_ike_is_taken_from_the_application() -> None:
    """Such a packet goes to the application; its socket has no UDP_GRO, so the kernel cuts it first."""
    consumer = Collector(coalesce=True)
    with udp() as sock, udp() as peer:
        steered(sock, consumer)
        segments(peer, at(sock), [NON_ESP_MARKER + ike(1, 28), ESP, NON_ESP_MARKER + ike(2, 28), ESP])
        assert [sock.recv(64), sock.recv(64)] == [ike(1, 28), ike(2, 28)]
        assert not readable(sock)


@FAMILIES
def test_ike_that_came_before_the_program_is_handed_back(
    family: socket.AddressFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the join and the program the kernel spreads by hash: about half falls to the engine."""
    consumer = Collector()
    count = 40
    with udp(family) as sock:
        peers = [udp(family) for _ in range(count)]
        attach = bpf.attach_steering

        def late(steered_sock: socket.socket, engines: int) -> None:
            if steered_sock.getsockname() == sock.getsockname():
                for number, peer in enumerate(peers):
                    send_ike(peer, at(sock), number)
            attach(steered_sock, engines)

        monkeypatch.setattr(bpf, "attach_steering", late)
        endpoint = steered(sock, consumer)
        received = dict(sock.recvfrom(64) for _ in range(count))
        assert received == {ike(number): peer.getsockname() for number, peer in enumerate(peers)}
        assert 0 < endpoint.stats().handed_back < count
        for peer in peers:
            peer.close()


def test_an_envelope_of_a_peer_is_an_ordinary_datagram() -> None:
    """Only the secret makes an envelope, and it is another one for every endpoint."""
    with udp() as sock, udp() as peer:
        steered(sock)
        forged = HandBack(socket.AF_INET).wrap(b"message", ("192.0.2.99", 4500))
        peer.sendto(forged, at(sock))
        assert sock.recvfrom(2048) == (forged[4:], peer.getsockname())


def test_secrets_are_not_shown_and_not_repeated() -> None:
    made = [HandBack(socket.AF_INET) for _ in range(64)]
    assert len({hand_back.prefix for hand_back in made}) == 64
    assert made[0].prefix[4:].hex() not in repr(made[0]) + str(vars(Diversion(None, socket.AF_INET)))


def test_a_handed_back_datagram_never_loops(caplog: pytest.LogCaptureFixture) -> None:
    """If it comes again, another program steers the port: that is counted and said, once."""
    with udp() as sock, udp() as peer:
        endpoint = steered(sock)
        plain = socket.socket(fileno=os.dup(sock.fileno()))
        with plain:
            bpf._attach(plain, bpf.SO_ATTACH_REUSEPORT_CBPF, ((0x06, 0, 0, 1),))
            send_ike(peer, at(sock), 1)
            wait_until(lambda: endpoint.stats().errors)
            bpf.attach_steering(plain, 1)
        assert not readable(sock, 0.05)
        assert (endpoint.stats().handed_back, endpoint.stats().errors) == (1, 1)
        assert "another program steers this port" in caplog.text
        send_ike(peer, at(sock), 2)
        assert sock.recv(64) == ike(2)


def test_ike_to_a_device_that_cannot_be_handed_back_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    diversion = Diversion(lambda *_: None, socket.AF_INET)
    with udp() as sock, udp() as peer:
        sock.setsockopt(socket.SOL_SOCKET, options.SO_BINDTODEVICE, b"lo")
        group = steering.Steering(sock, diversion)
        bpf._attach(sock, bpf.SO_ATTACH_REUSEPORT_CBPF, ((0x06, 0, 0, 1),))
        send_ike(peer, at(sock), 1)
        wait_until(lambda: diversion.counters.errors == 1)
        group.detach(sock)
        assert "bound to a device" in caplog.text


@FAMILIES
def test_envelopes_are_opened_after_a_change_of_consumer(
    family: socket.AddressFamily,
) -> None:
    with udp(family) as sock, udp(family) as peer:
        endpoint = steered(sock)
        glued_or_early(endpoint, sock, at(sock), peer)
        assert endpoint.stats().handed_back == 1
        set_nat_t_endpoint(sock, esp=Collector())
        glued_or_early(endpoint, sock, at(sock), peer, 8)
        assert [sock.recvfrom(64) for _ in range(2)] == [(ike(n), peer.getsockname()) for n in (7, 8)]
