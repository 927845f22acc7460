"""A program whose standard library gevent has patched; run by test_gevent.py with a backend's name."""

from gevent import monkey

monkey.patch_all()

# all of this has to come after the patch
import socket  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402

import gevent  # noqa: E402

from natcompat import NAT_KEEPALIVE, NON_ESP_MARKER, Keepalive, Verdict, set_nat_t_endpoint  # noqa: E402
from natcompat.contract import OUTBOUND_TABLE, TABLE  # noqa: E402

ESP = b"\xc0\xde\x00\x01\0\0\0\x01" + bytes(100)


def main(backend: str) -> None:
    turns = 0
    diverted: list[bytes] = []
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for each in (sock, peer):
        each.bind(("127.0.0.1", 0))
        each.settimeout(10)

    def take(packet: memoryview, source: object) -> None:
        diverted.append(bytes(packet))

    def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            time.sleep(0.001)

    endpoint = set_nat_t_endpoint(sock, backend=backend, esp=take)
    others = gevent.spawn(count)

    for row in TABLE:
        peer.sendto(row.payload, sock.getsockname())
    delivered = [row.delivered for row in TABLE if row.delivered is not None]
    assert [sock.recv(10000) for _ in delivered] == delivered
    wanted = sorted(row.payload for row in TABLE if row.verdict is Verdict.ESP)
    with gevent.Timeout(10):
        while len(diverted) < len(wanted):
            peer.sendto(NON_ESP_MARKER, sock.getsockname())
            assert sock.recv(1) == b""
            time.sleep(0.002)
    assert sorted(diverted) == wanted
    for outbound in OUTBOUND_TABLE:
        sock.sendto(outbound.message, peer.getsockname())
        assert peer.recv(10000) == outbound.wire

    def send_later() -> None:
        for payload in (NAT_KEEPALIVE, ESP, b"", NON_ESP_MARKER + b"IKE"):
            time.sleep(0.01)
            peer.sendto(payload, sock.getsockname())

    def send_esp() -> None:
        for _ in range(50):
            peer.sendto(ESP, sock.getsockname())
            time.sleep(0.02)

    for timeout in (None, 10):
        sock.settimeout(timeout)
        sender = threading.Thread(target=send_later)
        sender.start()
        turns = 0
        with gevent.Timeout(10):
            assert sock.recv(100) == b"IKE"
        assert turns > 5, "the receive let nobody else run"
        sender.join()

    sock.settimeout(0.2)
    begin = time.monotonic()
    sender = threading.Thread(target=send_esp)
    sender.start()
    try:
        sock.recv(100)
    except TimeoutError:
        assert 0.2 <= time.monotonic() - begin < 0.9
    else:
        raise AssertionError("ESP was delivered")
    sender.join()

    with Keepalive(endpoint, interval=0.05) as keepalive:
        keepalive.add(peer.getsockname())
        assert [peer.recv(100) for _ in range(2)] == [NAT_KEEPALIVE] * 2

    with sock.dup() as alias:
        alias.settimeout(10)
        peer.sendto(NON_ESP_MARKER + b"IKE", sock.getsockname())
        assert alias.recv(100) == b"IKE"
    sock.connect(peer.getsockname())
    sock.sendall(b"IKE")
    assert peer.recv(100) == NON_ESP_MARKER + b"IKE"
    sock.close()
    assert endpoint.closed
    others.kill()
    peer.close()
    print("all is well")


if __name__ == "__main__":
    main(sys.argv[1])
