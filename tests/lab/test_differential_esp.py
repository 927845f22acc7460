"""The kernel's ESP and the engine judge every packet alike: what comes out, and what is counted."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from natcompat.esp.engine.crypto import make_cipher
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.packet import DUMMY, IPV4, IPV6, PADDINGS
from natcompat.esp.engine.results import Dropped, Opened
from natcompat.ipsec import Direction, Encr, Integ, Mode, Policy, SecurityAssociation
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.testing.ipsec.harness import HOSTS, OUTER, SPI, IPsecHarness, policy
from natcompat.testing.ipsec.traffic import _comparable, udp_packet
from tests.lab.kernel_esp import KernelEsp
from tests.lab.topology import inside
from tests.support.esp import IN_C, TRANSFORMS, keys, name, native_providers

pytestmark = pytest.mark.kernel_esp

PACKETS = 2000
WINDOW = 32
BORDER = 1 << 32


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelEsp]:
    made = KernelEsp()
    yield made
    made.close()


class Peer:
    """Who has the keys, seals what it likes, and remembers all."""

    def __init__(
        self, sa: SecurityAssociation, mode: Mode, version: int, *, sequence: int = 0, seed: int = 4303
    ) -> None:
        """`sequence`: of the last packet that was sent before."""
        self.cipher = make_cipher(sa.encryption, sa.encryption_key, sa.integrity, sa.integrity_key)
        self.block = max(self.cipher.block_length, 4)
        self.mode, self.version = mode, version
        self.esn, self.sequence = sa.esn, sequence
        self.random = random.Random(seed)
        self.sent: list[bytes] = []

    def seal(self, payload: bytes, next_header: int, padding: int | None = None) -> bytes:
        """Return the next packet, with the smallest padding or with `padding` bytes."""
        padding = -(len(payload) + 2) % self.block if padding is None else padding
        return self.seal_plaintext(payload + PADDINGS[padding] + bytes((padding, next_header)))

    def seal_plaintext(self, plaintext: bytes) -> bytes:
        """Return the next packet, whatever is in it."""
        self.sequence += 1
        number = self.sequence.to_bytes(8)
        prefix = SPI.to_bytes(4) + number[4:] + self.random.randbytes(self.cipher.iv_length)
        self.sent.append(self.cipher.seal(prefix, plaintext, number[:4] if self.esn else b""))
        return self.sent[-1]

    def good(self) -> bytes:
        """Return the next packet that is as it should be."""
        payload = self.random.randbytes(self.random.randrange(90))
        if self.mode is Mode.TRANSPORT:
            near, far = OUTER[self.version]
            inner = udp_packet(far, near, payload + bytes(20))  # as long as Linux wants it
            return self.seal(inner[20 if self.version == 4 else 40 :], 17)
        near, far = HOSTS[self.version]
        return self.seal(udp_packet(far, near, payload), IPV4 if self.version == 4 else IPV6)

    def anything(self) -> bytes:
        """Return a packet that may be new, late, replayed, forged or garbage."""
        choice = self.random.randrange(10)
        if choice < 4 or len(self.sent) < 3:
            return self.good()
        if choice == 4:  # some get lost, or come later
            for _ in range(self.random.randrange(1, 2 * WINDOW)):
                self.good()
            return self.good()
        old = self.random.choice(self.sent[-2 * WINDOW :] if choice < 8 else self.sent)
        if choice < 7:
            return old
        new = self.random.choice((old, self.good()))
        change = self.random.randrange(4)
        at = self.random.randrange(4, len(new))  # not the SPI: that is whose SA
        if change == 0:
            return new[:at] + bytes((new[at] ^ 1 << self.random.randrange(8),)) + new[at + 1 :]
        if change == 1:  # not shorter than what Linux takes for ESP
            return new[: max(40, at)]
        if change == 2:
            return new + self.random.randbytes(4 * self.random.randrange(1, 9))
        return new[: self.random.choice((4, 8))] + self.random.randbytes(len(new) - 4)

    def odd(self) -> Iterator[bytes]:
        """Yield packets that are authentic and nevertheless not what they should be, or only unusual."""
        version = self.version
        own, other = (IPV4, IPV6) if version == 4 else (IPV6, IPV4)
        near, far = HOSTS[version]
        inner = udp_packet(far, near, b"odd")
        most = 255 - (255 + len(inner) + 2) % self.block
        yield self.seal(bytes(40), DUMMY)  # dummy
        yield self.seal(inner, own, most)  # much padding
        yield self.seal(inner + bytes(100), own)  # behind the packet
        yield self.seal(inner, 6)  # TCP in a tunnel
        yield self.seal(inner, other)  # the other family
        yield self.seal(inner[:-1], own)  # cut
        yield self.seal(inner[:15], own)  # cut in the header
        yield self.seal(b"", own)  # nothing
        yield self.seal_plaintext(bytes(self.block - 2) + bytes((200, own)))  # more padding than packet
        yield self.seal(udp_packet(HOSTS[version][0], near, b"spoofed"), own)  # from elsewhere


@contextlib.contextmanager
def engines_in_c(sa: SecurityAssociation) -> Iterator[list[EspEngine]]:
    """Yield an engine for each library that does the ciphers of `sa` in C."""
    with contextlib.ExitStack() as stack:
        engines = []
        for provider in native_providers():
            from natcompat.esp.datapath.native import NativeDataPath

            by = partial(NativeDataPath, provider=provider)
            engine = stack.enter_context(EspEngine(timer=False, datapath=by))
            assert isinstance(engine.path, NativeDataPath)
            if engine.path.providers(sa):
                engines.append(engine)
        yield engines


def open_in_bursts(engine: EspEngine, packets: Sequence[bytes], source: tuple[str, int]) -> list[bytes]:
    """Return what `engine` makes of `packets`, in bursts of any size."""
    sizes, start, inner = random.Random(4303), 0, []
    while start < len(packets):
        size = sizes.randrange(1, 2 * WINDOW)
        opened = engine.open_burst([(each, source) for each in packets[start : start + size]])
        inner += [each.inner for each in opened if isinstance(each, Opened)]
        start += size
    return inner


@pytest.mark.parametrize(
    ("transforms", "version", "mode", "sequence"),
    [
        ((Encr.AES_GCM_16, Integ.NONE), 4, Mode.TUNNEL, None),
        ((Encr.AES_CBC, Integ.HMAC_SHA2_256_128), 6, Mode.TUNNEL, 0),
        ((Encr.CHACHA20_POLY1305, Integ.NONE), 4, Mode.TRANSPORT, BORDER - 3 * PACKETS),
        ((Encr.AES_CTR, Integ.HMAC_SHA1_96), 6, Mode.TRANSPORT, None),
        ((Encr.NULL, Integ.HMAC_SHA2_512_256), 6, Mode.TUNNEL, None),
    ],
    ids=lambda value: name(value) if isinstance(value, tuple) else None,
)
def test_differences(
    kernel: KernelEsp, transforms: tuple[Encr, Integ], version: int, mode: Mode, sequence: int | None
) -> None:
    """Data paths in C have the packets in bursts.

    `sequence`: where extended sequence numbers begin; None: they have 32 bits.
    """
    changes: dict[str, Any] = {"mode": mode}
    sa = IPsecHarness().association(
        Direction.IN,
        version,
        spi=SPI,
        esn=sequence is not None,
        replay_window=WINDOW,
        **changes,
        **keys(*transforms),
    )
    wanted: Policy = policy(Direction.IN, version, **(changes if mode is Mode.TRANSPORT else {}))
    peer, source = Peer(sa, mode, version, sequence=sequence or 0), (OUTER[version][1], 4500)
    arrived: list[bytes] = []
    taken: list[bytes] = []
    with (
        inside("here"),
        XfrmIPsec() as xfrm,
        EspEngine(timer=False) as engine,
        engines_in_c(sa) as in_c,
    ):
        assert bool(in_c) == (mode is Mode.TUNNEL and bool(native_providers()))
        xfrm.flush_policies()
        xfrm.flush_sas()
        try:
            ipsecs: list[XfrmIPsec | EspEngine] = [xfrm, engine, *in_c]
            for ipsec in ipsecs:
                ipsec.add_sa(sa, sequence=sequence or None)
                ipsec.add_policy(wanted)

            def both(*packets: bytes) -> None:
                """Let packets arrive at both; the last is good where the kernel does not count all drops."""
                opened = [engine.open(each, source) for each in packets]
                arrived.extend(packets)
                mine = [_comparable(each.inner, mode) for each in opened if isinstance(each, Opened)]
                theirs = (
                    kernel.deliver(packets[0], source)
                    if len(packets) == 1
                    else kernel.deliver_all(packets, source, last=mine[-1])
                )
                assert [_comparable(each, mode) for each in theirs] == mine
                taken.extend(theirs)

            def in_bursts() -> None:
                """Let what has arrived since the last time arrive at those in C."""
                for each in in_c:
                    assert open_in_bursts(each, arrived, source) == taken
                    assert each.counters() == engine.counters()
                arrived.clear()
                taken.clear()

            for _ in range(PACKETS):
                both(peer.anything())
            in_bursts()
            usages = [ipsec.get_sa(sa.sa_id) for ipsec in ipsecs]
            for what in ("packets", "sequence", "replay_drops", "window_drops", "integrity_drops"):
                assert len({getattr(usage, what) for usage in usages}) == 1, (what, usages)
            assert usages[0].packets > PACKETS // 4
            assert usages[0].replay_drops
            if sequence:
                assert usages[0].sequence is not None
                assert usages[0].sequence > BORDER
            if mode is Mode.TUNNEL:
                for packet in peer.odd():
                    both(packet, peer.good())
                in_bursts()
        finally:
            xfrm.flush_policies()
            xfrm.flush_sas()


@pytest.mark.parametrize(
    ("datapath", "transforms"),
    [*(("python", each) for each in TRANSFORMS), *(("c", each) for each in IN_C)],
    indirect=["datapath"],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
@pytest.mark.usefixtures("datapath")
def test_extended_numbers_pass_32_bits(kernel: KernelEsp, transforms: tuple[Encr, Integ]) -> None:
    """Both ways: the upper half is not in the packet, and yet authenticated."""
    near, far = HOSTS[4]
    with inside("here"), XfrmIPsec() as xfrm, EspEngine(timer=False) as engine:
        xfrm.flush_policies()
        xfrm.flush_sas()
        try:
            local, remote = OUTER[4]
            ids = []
            for number, direction in enumerate(Direction):
                changes = {"spi": SPI + number, "esn": True, **keys(*transforms)}
                ours = IPsecHarness().association(direction, **changes)
                other = Direction.OUT if direction is Direction.IN else Direction.IN
                ends: dict[str, Any] = {"source": ours.source, "destination": ours.destination}
                theirs = IPsecHarness().association(other, **{**changes, **ends})
                selector = policy(direction).selector
                for ipsec, sa in ((xfrm, ours), (engine, theirs)):
                    ids.append((ipsec, ipsec.add_sa(sa, sequence=BORDER - 3)))
                    ipsec.add_policy(
                        Policy(direction=sa.direction, selector=selector, reqid=sa.reqid, **ends)
                    )
            for number in range(6):
                question, answer = udp_packet(near, far, b"question"), udp_packet(far, near, b"answer")
                (packet,) = kernel.seal(question)
                assert int.from_bytes(packet[4:8]) == (BORDER - 2 + number) % BORDER
                opened = engine.open(packet, (local, 4500))
                assert isinstance(opened, Opened), (number, opened)
                assert opened.inner == question
                sealed = engine.seal(answer)
                assert not isinstance(sealed, Dropped)
                assert kernel.deliver(sealed[0][0], (remote, 4500)) == [answer]
            assert {ipsec.get_sa(sa_id).sequence for ipsec, sa_id in ids} == {BORDER + 3}
        finally:
            xfrm.flush_policies()
            xfrm.flush_sas()
