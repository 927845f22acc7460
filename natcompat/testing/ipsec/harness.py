"""The set-up that the suites of IPsec share: SAs, policies and parameters."""

from __future__ import annotations

import contextlib
import itertools
import select
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Direction,
    Encr,
    Event,
    Events,
    Integ,
    IPsec,
    Mode,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)

if TYPE_CHECKING:
    import pytest

PATIENCE = 10.0
"""Seconds to wait for a datagram, a packet or an event before it counts as lost."""

OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
"""Outer addresses of this end and of its peer, by IP version."""

NETWORKS = {4: ("10.1.0.0/16", "10.2.0.0/16"), 6: ("fd00:1::/64", "fd00:2::/64")}
"""Networks behind this end and behind the peer, by IP version."""

HOSTS = {4: ("10.1.0.1", "10.2.0.1"), 6: ("fd00:1::1", "fd00:2::1")}

TRANSFORMS: Sequence[tuple[Encr, Integ]] = (
    *(
        (encryption, Integ.NONE)
        for encryption in (Encr.AES_GCM_8, Encr.AES_GCM_12, Encr.AES_GCM_16, Encr.CHACHA20_POLY1305)
    ),
    *itertools.product(
        (Encr.AES_CBC, Encr.AES_CTR, Encr.NULL),
        (Integ.HMAC_SHA1_96, Integ.HMAC_SHA2_256_128, Integ.HMAC_SHA2_384_192, Integ.HMAC_SHA2_512_256),
    ),
)
"""Transforms that every implementation has."""

PORTS = UDPEncapsulation(local_port=4500, remote_port=4500)
SPI = 0xC0DE0001
REQID = 7


def keys(encryption: Encr, integrity: Integ = Integ.NONE, length: int | None = None) -> dict[str, Any]:
    """Return the transforms of an SA with keys: the longest, or of `length` bytes."""
    size = max(encryption.key_lengths) if length is None else length
    return {
        "encryption": encryption,
        "encryption_key": bytes(range(1, size + 1)),
        "integrity": integrity,
        "integrity_key": bytes(range(101, 101 + integrity.key_length)),
    }


def policy(direction: Direction, version: int = 4, inner: int | None = None, **changes: Any) -> Policy:
    """Return the policy that belongs to `IPsecHarness.association`."""
    local, remote = OUTER[version]
    near, far = NETWORKS[inner or version]
    if changes.get("mode") is Mode.TRANSPORT:
        near, far = local, remote
    out = direction is Direction.OUT
    arguments: dict[str, Any] = {
        "direction": direction,
        "selector": TrafficSelector(source=near if out else far, destination=far if out else near),
        "reqid": REQID,
        **changes,
    }
    if "mode" not in changes and "action" not in changes:
        arguments |= {"source": local if out else remote, "destination": remote if out else local}
    return Policy(**arguments)


def wait_for(events: Events, seconds: float = PATIENCE) -> list[Event]:
    """Return the next events; empty after `patience` seconds without one."""
    readable = select.select([events], [], [], seconds)[0]
    return list(events.read()) if readable else []


@contextlib.contextmanager
def raises(*numbers: int) -> Iterator[None]:
    """Expect a `NatCompatError` with one of these errnos."""
    import pytest

    with pytest.raises(NatCompatError) as caught:
        yield
    assert caught.value.errno in numbers, caught.value  # noqa: S101


class IPsecHarness:
    """The parameters of the suites without their tests."""

    transforms: ClassVar[Sequence[tuple[Encr, Integ]]] = TRANSFORMS
    """Combinations of transforms to test."""
    common: ClassVar[Mapping[str, Any]] = keys(Encr.AES_GCM_16, length=20)
    """Transforms and keys of the suite's SAs, unless a test is about them."""
    sequences: ClassVar[Sequence[bool]] = (False, True)
    """Values of `esn` to test."""
    windows: ClassVar[Sequence[int]] = (32, 64, 1024)
    """Sizes of the replay window to test."""
    versions: ClassVar[Sequence[int]] = (4, 6)
    """IP versions to test."""
    modes: ClassVar[Sequence[Mode]] = tuple(Mode)
    """Modes to test."""
    moves_ports: ClassVar[bool] = True
    """Whether `update_sa` changes UDP ports; False: EOPNOTSUPP."""
    moves: ClassVar[bool] = True
    """Whether `update_sa` changes addresses and keeps sequence numbers; False: EOPNOTSUPP."""
    cross_family: ClassVar[bool] = True
    """Whether a tunnel carries the other IP version; False: refused."""
    pads: ClassVar[bool] = True
    """Whether packets can be padded (TFC); False: refused."""
    refuses_a_second_policy: ClassVar[bool] = True
    """Whether a second policy with the same selector is EEXIST; False: both are installed (Solaris)."""
    counts: ClassVar[bool] = True
    """Whether `get_sa` tells sequence numbers and drops; False: None."""

    def association(self, direction: Direction, version: int = 4, **changes: Any) -> SecurityAssociation:
        """Return an SA between this end and the peer."""
        local, remote = OUTER[version]
        arguments: dict[str, Any] = {
            "spi": SPI,
            "source": local if direction is Direction.OUT else remote,
            "destination": remote if direction is Direction.OUT else local,
            "direction": direction,
            "encapsulation": PORTS,
            "reqid": REQID,
            **self.common,
            **changes,
        }
        return SecurityAssociation(**arguments)

    def open_ipsec(self) -> IPsec:
        """Open the implementation, without SAs and policies."""
        raise NotImplementedError

    @contextlib.contextmanager
    def opened(self) -> Iterator[IPsec]:
        """Open the implementation; remove all SAs and policies at the end."""
        ipsec = self.open_ipsec()
        try:
            yield ipsec
        finally:
            try:
                ipsec.flush_policies()
                ipsec.flush_sas()
            finally:
                ipsec.close()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise a test by the names in its signature; for pytest."""
        for parameter, values, name in (
            (
                "transforms",
                self.transforms,
                lambda pair: "-".join(transform.name for transform in pair if transform is not Integ.NONE),
            ),
            ("version", self.versions, lambda version: f"IPv{version}"),
            ("mode", self.modes, lambda mode: mode.value),
            ("esn", self.sequences, lambda esn: "64 bits" if esn else "32 bits"),
            ("window", self.windows, str),
            ("direction", tuple(Direction), lambda direction: direction.value),
        ):
            if parameter in metafunc.fixturenames:
                metafunc.parametrize(parameter, list(values), ids=[name(value) for value in values])
