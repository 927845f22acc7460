"""Acquires, expiries and mapping changes, as the kernel multicasts them to whoever listens."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

from natcompat.ipsec import (
    Acquire,
    Event,
    Expire,
    MappingChange,
    Mark,
    SaId,
)
from natcompat.kernel.events import RECEIVE_BUFFER, KernelEvents, Known, passed_soft_limit
from natcompat.kernel.xfrm import messages
from natcompat.kernel.xfrm.integrity import IntegrityWatch
from natcompat.kernel.xfrm.netlink import NLMSG_OVERRUN, Netlink, messages_in
from natcompat.kernel.xfrm.readback import decode, sa_id_of, usage_of
from natcompat.kernel.xfrm.translate import address_of, lifetime_of, selector_of


class XfrmEvents(KernelEvents):
    """A netlink socket of its own in the multicast groups of acquires, expiries and mapping changes.

    Packets that fail authentication are told from counters, some seconds late (`IntegrityWatch`).

    The kernel says when events are lost. `read` then returns an `EventsLost`, and behind it what can be
    found out from the SAs themselves: acquires that wait (larval SAs), soft limits that are passed, and
    hard expiries of the SAs in `known`.
    """

    def __init__(
        self,
        dump: Callable[[], list[bytes]],
        known: dict[SaId, Known],
        is_there: Callable[[SaId], bool],
        *,
        receive_buffer: int = RECEIVE_BUFFER,
    ) -> None:
        """Listen. `dump` returns all SAs."""
        super().__init__(known, is_there)
        self._dump = dump
        groups = 0
        for group in (
            messages.XFRMNLGRP_ACQUIRE,
            messages.XFRMNLGRP_EXPIRE,
            messages.XFRMNLGRP_MAPPING,
        ):
            groups |= 1 << (group - 1)
        self._netlink = Netlink(groups=groups, receive_buffer=receive_buffer)
        self._netlink.socket.setblocking(False)
        with contextlib.ExitStack() as stack:
            stack.callback(self._netlink.close)
            self._integrity = stack.enter_context(contextlib.closing(IntegrityWatch(dump)))
            self._epoll = stack.enter_context(select.epoll())
            self._epoll.register(self._netlink.socket, select.EPOLLIN)
            if self._integrity.works:
                self._epoll.register(self._integrity, select.EPOLLIN)
            self._stack = stack.pop_all()

    def fileno(self) -> int:
        """Return the descriptor to wait on; it is readable while there are events, and at times without."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._stack.close()

    def read(self) -> list[Event]:
        """Return what has happened since the last call, oldest first; never waits."""
        return [*super().read(), *self._integrity.read()]

    def _receive(self, found: list[Event]) -> bool:
        try:
            data, (port, _) = self._netlink.socket.recvfrom(65536)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return True
        lost = False
        if port == 0:  # from the kernel, not from another process
            for kind, _, _, message in messages_in(data):
                lost |= kind == NLMSG_OVERRUN
                found.extend(self._event(kind, message))
        return lost

    def _event(self, kind: int, data: bytes) -> Iterator[Event]:
        if kind == messages.XFRM_MSG_ACQUIRE:
            yield from self._acquire(decode(messages.xfrm_user_acquire, data))
        elif kind == messages.XFRM_MSG_EXPIRE:
            message = decode(messages.xfrm_user_expire, data)
            if message["state_id_proto"] == socket.IPPROTO_ESP:
                sa_id = sa_id_of(message, "state_")
                yield from self._expired(sa_id, message["state_reqid"], hard=bool(message["hard"]))
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
        yield from self._missing(present)
