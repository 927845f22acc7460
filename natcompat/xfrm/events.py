"""Acquires, expiries and mapping changes, as the kernel multicasts them to whoever listens."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

from natcompat.ipsec import (
    Acquire,
    Direction,
    Event,
    EventsLost,
    Expire,
    Lifetime,
    MappingChange,
    Mark,
    SaId,
    Usage,
)
from natcompat.xfrm import _messages as messages
from natcompat.xfrm.netlink import NLMSG_OVERRUN, Netlink, messages_in
from natcompat.xfrm.readback import decode, sa_id_of, usage_of
from natcompat.xfrm.translate import address_of, lifetime_of, selector_of

RECEIVE_BUFFER = 4 << 20
"""Bytes of queue that are asked for: about 2000 acquires."""

_BURST = 256
"""Datagrams that one `read` takes at most, so that a flood of events does not keep it forever."""


class Known(NamedTuple):
    """What natcompat remembers of an SA that it has installed."""

    reqid: int
    direction: Direction


class XfrmEvents:
    """An own netlink socket in the multicast groups of acquires, expiries and mapping changes.

    The kernel never waits for a listener: when the queue is full, events are lost. `read` then
    returns an `EventsLost`, and behind it what can be found out from the SAs themselves: acquires
    that wait (larval SAs), soft limits that are passed, and hard expiries of the SAs in `known`.
    One thread reads at a time.
    """

    def __init__(
        self,
        dump: Callable[[], list[bytes]],
        known: dict[SaId, Known],
        is_there: Callable[[SaId], bool],
        *,
        receive_buffer: int = RECEIVE_BUFFER,
    ) -> None:
        """Listen. `dump` returns all SAs, `known` those to be missed.

        `is_there` tells whether an SPI is reserved or in use whatever an expiry of it says.
        """
        self._dump = dump
        self._known = known
        self._is_there = is_there
        groups = 0
        for group in (
            messages.XFRMNLGRP_ACQUIRE,
            messages.XFRMNLGRP_EXPIRE,
            messages.XFRMNLGRP_MAPPING,
        ):
            groups |= 1 << (group - 1)
        self._netlink = Netlink(groups=groups, receive_buffer=receive_buffer)
        self._netlink.socket.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to wait on; it is readable while there are events."""
        return self._netlink.socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> list[Event]:
        """Return what has happened since the last call, oldest first; never waits."""
        found: list[Event] = []
        lost = False
        for _ in range(_BURST):
            try:
                data, (port, _) = self._netlink.socket.recvfrom(65536)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            if port == 0:  # from the kernel, not from another process
                for kind, _, _, message in messages_in(data):
                    lost |= kind == NLMSG_OVERRUN
                    found.extend(self._event(kind, message))
        if lost:
            found.append(EventsLost())
            found.extend(self._find_out())
        return found

    def _event(self, kind: int, data: bytes) -> Iterator[Event]:
        if kind == messages.XFRM_MSG_ACQUIRE:
            yield from self._acquire(decode(messages.xfrm_user_acquire, data))
        elif kind == messages.XFRM_MSG_EXPIRE:
            message = decode(messages.xfrm_user_expire, data)
            sa_id = sa_id_of(message, "state_")
            hard = bool(message["hard"])
            if message["state_id_proto"] != socket.IPPROTO_ESP or not sa_id.spi:
                return
            # The kernel gives up its larval SA after 30 s; natcompat keeps the SPI reserved, and may
            # have completed the SA since.
            if hard and self._is_there(sa_id):
                return
            if hard:
                self._known.pop(sa_id, None)
            yield Expire(sa_id=sa_id, reqid=message["state_reqid"], hard=hard)
        elif kind == messages.XFRM_MSG_MAPPING:
            yield self._mapping(decode(messages.xfrm_user_mapping, data))

    def _acquire(self, message: Any) -> Iterator[Event]:
        templates = message.get_attr("XFRMA_TMPL") or []
        if message["id_proto"] != socket.IPPROTO_ESP:
            return
        family = templates[0]["family"] if templates else message["sel_family"]
        mark = message.get_attr("XFRMA_MARK")
        yield Acquire(
            source=address_of(message["saddr"], family),
            destination=address_of(message["id_daddr"], family),
            reqid=templates[0]["reqid"] if templates else 0,
            selector=selector_of(message),
            sequence=message["seq"],
            mark=Mark(value=mark["v"], mask=mark["m"]) if mark else None,
            interface_id=message.get_attr("XFRMA_IF_ID") or None,
        )

    def _mapping(self, message: Any) -> MappingChange:
        family = message["id_family"]
        old = address_of(message["old_saddr"], family)
        mark = message.get_attr("XFRMA_MARK")
        return MappingChange(
            sa_id=SaId(
                spi=message["id_spi"],
                destination=address_of(message["id_daddr"], family),
                source=old,
                mark=Mark(value=mark["v"], mask=mark["m"]) if mark else None,
            ),
            reqid=message["reqid"],
            old_address=old,
            old_port=message["old_sport"],
            new_address=address_of(message["new_saddr"], family),
            new_port=message["new_sport"],
        )

    def _find_out(self) -> Iterator[Event]:
        """Compare the SAs that are there with those that should be, after events were lost."""
        present: set[SaId] = set()
        for data in self._dump():
            message = decode(messages.xfrm_usersa_info, data)
            if message["id_proto"] != socket.IPPROTO_ESP:
                continue
            sa_id = sa_id_of(message)
            present.add(sa_id)
            if sa_id.spi == 0 and message["seq"]:
                yield Acquire(
                    source=address_of(message["saddr"], message["family"]),
                    destination=sa_id.destination,
                    reqid=message["reqid"],
                    selector=selector_of(message),
                    sequence=message["seq"],
                    mark=sa_id.mark,
                    interface_id=message.get_attr("XFRMA_IF_ID") or None,
                )
            elif passed_soft_limit(lifetime_of(message), usage_of(data)):
                yield Expire(sa_id=sa_id, reqid=message["reqid"], hard=False)
        for sa_id, each in list(self._known.items()):
            if sa_id not in present:
                self._known.pop(sa_id, None)
                yield Expire(sa_id=sa_id, reqid=each.reqid, hard=True)


def passed_soft_limit(lifetime: Lifetime, usage: Usage) -> bool:
    """Whether an SA with this `usage` is due for a rekey."""
    due = [
        (lifetime.soft_seconds, time.time() - usage.added),
        (lifetime.soft_bytes, usage.octets),
        (lifetime.soft_packets, usage.packets),
    ]
    return any(limit is not None and used >= limit for limit, used in due)
