"""Event loops that read a descriptor without its socket object: a warning, or a refusal."""

from __future__ import annotations

import asyncio
import errno
import warnings

import pytest

from natcompat import NatCompatError, get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.endpoint.loops import create_nat_t_endpoint, open_nat_t_endpoint
from tests.support.loops import LOOPS, NewSocket, ProactorModel, Receiver, run_on


class TestUvloop:
    """A warning at the application's line names `create_nat_t_endpoint`."""

    def test_warns_of_a_transport_made_after_the_option(self, new_socket: NewSocket) -> None:
        sock = new_socket()
        set_nat_t_endpoint(sock)

        async def main() -> None:
            loop = asyncio.get_running_loop()
            with pytest.warns(RuntimeWarning, match=r"create_nat_t_endpoint\(\)") as caught:
                transport, _ = await loop.create_datagram_endpoint(Receiver, sock=sock)
            assert [warning.filename for warning in caught] == [__file__]
            transport.close()

        run_on(LOOPS["uvloop"], main)

    def test_warns_of_an_option_set_after_the_transport(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            sock = new_socket()
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Receiver, sock=sock)
            with pytest.warns(RuntimeWarning, match=r"create_nat_t_endpoint\(\)") as caught:
                set_nat_t_endpoint(sock)
            assert [warning.filename for warning in caught] == [__file__]
            transport.close()

        run_on(LOOPS["uvloop"], main)

    def test_a_warning_raised_as_an_error_changes_nothing(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            sock = new_socket()
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Receiver, sock=sock)
            with pytest.raises(RuntimeWarning):
                set_nat_t_endpoint(sock)
            assert get_nat_t_endpoint(sock) is None
            transport.close()

        run_on(LOOPS["uvloop"], main)

    def test_warns_once_for_a_socket(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            sock = new_socket()
            set_nat_t_endpoint(sock)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sock.setblocking(False)
                sock.setblocking(False)
            assert len(caught) == 1

        run_on(LOOPS["uvloop"], main)

    def test_does_not_warn_of_transports_of_natcompat(self, new_socket: NewSocket) -> None:
        async def main() -> None:  # warnings are errors here
            transport, _ = await create_nat_t_endpoint(Receiver, new_socket())
            transport.close()
            open_nat_t_endpoint(new_socket()).close()
            sock = new_socket()
            set_nat_t_endpoint(sock)
            transport, _ = await create_nat_t_endpoint(Receiver, sock)
            transport.close()

        run_on(LOOPS["uvloop"], main)

    def test_does_not_warn_outside_of_a_loop(self, new_socket: NewSocket) -> None:
        sock = new_socket()
        set_nat_t_endpoint(sock)
        sock.setblocking(False)

    def test_refuses_a_socket_of_a_transport_of_uvloop(self) -> None:
        async def main() -> None:
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                Receiver, local_addr=("127.0.0.1", 0)
            )
            with pytest.raises(TypeError, match="create_nat_t_endpoint"):
                set_nat_t_endpoint(transport.get_extra_info("socket"))
            transport.close()

        run_on(LOOPS["uvloop"], main)


class TestProactor:
    """The error names `create_nat_t_endpoint`, and nothing has changed."""

    def test_refuses_a_transport_made_after_the_option(self, new_socket: NewSocket) -> None:
        sock = new_socket()
        set_nat_t_endpoint(sock)

        async def main() -> None:
            loop = asyncio.get_running_loop()
            with pytest.raises(NatCompatError, match=r"ProactorModel") as caught:
                await loop.create_datagram_endpoint(Receiver, sock=sock)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert "create_nat_t_endpoint()" in caught.value.remedy
            assert sock.gettimeout() != 0
            assert get_nat_t_endpoint(sock) is not None
            transport, _ = await create_nat_t_endpoint(Receiver, sock)
            transport.close()

        run_on(ProactorModel, main)

    def test_refuses_an_option_set_after_the_transport(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            sock = new_socket()
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Receiver, sock=sock)
            with pytest.raises(NatCompatError, match=r"ProactorModel") as caught:
                set_nat_t_endpoint(sock)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert get_nat_t_endpoint(sock) is None
            transport.close()

        run_on(ProactorModel, main)

    def test_accepts_transports_of_natcompat_and_blocking_sockets(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            transport, _ = await create_nat_t_endpoint(Receiver, new_socket())
            transport.close()
            sock = new_socket()
            set_nat_t_endpoint(sock)
            sock.settimeout(5)

        run_on(ProactorModel, main)
