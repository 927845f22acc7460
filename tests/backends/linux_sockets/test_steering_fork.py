"""Steering and processes that fork."""

from __future__ import annotations

import os
import socket
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, get_nat_t_endpoint, set_nat_t_endpoint
from tests.support.linux import (
    ESP,
    KEEPALIVE,
    LINUX,
    Collector,
    at,
    check_demultiplexing,
    descriptors,
    ike,
    queued,
    send_ike,
    state,
    udp,
    wait_until,
)
from tests.support.steering import (
    GRO,
    RECVERR,
    steered,
)

pytestmark = LINUX


def in_child(body: Callable[[], object]) -> int:
    """Run `body` in a forked child and return its exit status: 0 if it raised nothing."""
    child = os.fork()
    if not child:
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_actions_of_a_child_leave_the_parent_alone() -> None:
    consumer = Collector()
    with udp() as sock, udp() as peer:
        endpoint = steered(sock, consumer)

        def switch_off() -> None:
            endpoint.close()
            assert endpoint.closed
            assert type(sock) is socket.socket

        def reconnect() -> None:
            sock.setsockopt(*GRO, 1)

        def take_part_and_switch_off() -> None:
            assert set_nat_t_endpoint(sock) is endpoint
            endpoint.close()

        for body in (
            lambda: None,
            sock.close,
            switch_off,
            reconnect,
            take_part_and_switch_off,
            collect(sock),
        ):
            assert in_child(body) == 0
            assert endpoint.mode == "steering"
            check_demultiplexing(sock, consumer, peer, at(sock))


def collect(sock: socket.socket) -> Callable[[], None]:
    def body() -> None:
        endpoint = get_nat_t_endpoint(sock)
        assert endpoint is not None
        endpoint._switch.aliases._collected(id(sock))  # what the finalizer of the last object does
        assert endpoint.closed

    return body


def test_a_child_strips_and_inserts() -> None:
    with udp() as sock, udp() as peer:
        steered(sock)

        def body() -> None:
            send_ike(peer, at(sock), 1)
            assert sock.recv(64) == ike(1)
            sock.sendto(b"from the child", at(peer))

        assert in_child(body) == 0
        assert peer.recv(64) == NON_ESP_MARKER + b"from the child"


def test_a_child_that_sets_the_option_again_gets_esp() -> None:
    """Each packet comes to the one or the other; so the parent's thread is kept busy here."""
    entered, leave = threading.Event(), threading.Event()

    def busy(packet: memoryview, source: Any) -> None:
        entered.set()
        leave.wait(20)

    with udp() as sock, udp() as peer:
        endpoint = steered(sock, busy)
        peer.sendto(ESP, at(sock))
        assert entered.wait(5)

        def body() -> None:
            consumer = Collector()
            count = len(descriptors())
            assert set_nat_t_endpoint(sock, esp=consumer) is endpoint
            assert len(descriptors()) == count  # the parent's are closed
            assert endpoint.mode == "steering"
            check_demultiplexing(sock, consumer, peer, at(sock))
            with pytest.raises(OSError, match="steers its ESP"):
                set_nat_t_endpoint(sock, backend="userspace:in-line")
            threads = [thread.name for thread in threading.enumerate()]
            assert threads.count("natcompat-esp") == 1

        try:
            assert in_child(body) == 0
        finally:
            leave.set()
        send_ike(peer, at(sock), 3)
        assert sock.recv(64) == ike(3)


def test_a_daemon_that_outlives_its_parent_has_the_endpoint_to_itself() -> None:
    """Set the option, fork, let the parent end: the way of every daemon."""
    reader, writer = os.pipe()
    middle = os.fork()
    if not middle:
        daemonize_and_report(writer)
    os.close(writer)
    os.waitpid(middle, 0)
    with open(reader) as report:
        assert report.read() == "done"


def daemonize_and_report(writer: int) -> None:
    """Run in a process whose child reports by `writer` when all held; never returns."""
    outcome = "nothing"
    try:
        consumer = Collector()
        sock, peer = udp(), udp()
        before = {**state(sock), "descriptors": None, "threads": None}
        endpoint = steered(sock, consumer)
        parent = os.getpid()
        if os.fork():
            os._exit(0)
        wait_until(lambda: not alive(parent))
        assert set_nat_t_endpoint(sock) is endpoint
        check_demultiplexing(sock, consumer, peer, at(sock))
        sock.setsockopt(*RECVERR, 1)
        assert endpoint.mode == "in line"
        sock.setsockopt(*RECVERR, 0)
        assert endpoint.mode == "steering"
        endpoint.close()
        assert {**state(sock), "descriptors": None, "threads": None} == before
        for payload in (ESP, KEEPALIVE):
            peer.sendto(payload, at(sock))
        assert queued(sock) == [ESP, KEEPALIVE]
        outcome = "done"
    except BaseException:
        outcome = traceback.format_exc()
    finally:
        os.write(writer, outcome.encode())
        os._exit(0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
