"""The backends of FreeBSD, NetBSD, OpenBSD and macOS under the models of their kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from natcompat.backends import bsd_kernels
from natcompat.backends.sysctl import Sysctl
from natcompat.contract import TABLE, Duty
from tests.otheros.conftest import MakeModel
from tests.otheros.kernels import KERNELS, Fate
from tests.otheros.running import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the models run on Linux")

SYSTEMS = list(bsd_kernels.KERNEL_SUPPORT)
WITH_OPTION = [name for name, support in bsd_kernels.KERNEL_SUPPORT.items() if support.option]

START = """
import atexit, errno, gc, logging, os, select, socket
def at_exit():
    for each in PRINTED:
        print(each.name, each.read())
PRINTED = []
atexit.register(at_exit)  # before natcompat's own, so that it runs behind it
import natcompat
from natcompat import backends, get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.backends.bsd_kernels import KERNEL_SUPPORT
from natcompat.contract import Duty, Performer
NAME = os.environ["NATCOMPAT_MODEL"]
SUPPORT = KERNEL_SUPPORT[NAME]
PORT = int(os.environ["NATCOMPAT_MODEL_PORT"])
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
def udp(family=socket.AF_INET, port=0, bound=True):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(5)
    if bound:
        sock.bind((LOOPBACK[family], port))
    return sock
def error(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except OSError as raised:
        return raised
    raise AssertionError("nothing was raised")
def exempt(sock):
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) & 2)  # as model.c keeps it
KERNEL, PROCESS = Performer.KERNEL, Performer.PROCESS
"""


@pytest.fixture
def run(make_model: MakeModel) -> Callable[..., str]:
    """Run a program under a model; return what it printed."""

    def run(system: str, code: str, **options: Any) -> str:
        done = make_model(system).run(START + code, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


# --- the data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_data_fit_the_table_of_the_kernel(system: str) -> None:
    """What a backend says that its kernel does is what the table of verdicts says, row by row."""
    support, kernel = bsd_kernels.KERNEL_SUPPORT[system], KERNELS[system]
    for version in kernel.versions:
        for row in TABLE:
            gone = kernel.fate(row.payload, version) in (Fate.DROP, Fate.ESP)
            if row.delivered is not None:
                assert not gone
                continue
            duty = Duty.DIVERT_ESP if len(row.payload) >= 4 else Duty.DROP_RUNTS
            if duty in support.duties:
                assert gone == (row.name not in support.leaks)
    for duty, rows in (
        (Duty.DROP_RUNTS, [row for row in TABLE if len(row.payload) < 4]),
        (Duty.DIVERT_ESP, [row for row in TABLE if row.delivered is None and len(row.payload) >= 4]),
    ):
        fates = {kernel.fate(row.payload, 4) for row in rows}
        if fates <= {Fate.DROP, Fate.ESP}:
            assert duty in support.duties
    assert (support.option, support.value) == ((kernel.option, kernel.value) if kernel.option else (0, 0))
    assert support.readable == kernel.readable


# --- every one of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_auto_chooses_the_backend_of_the_system(run: Callable[..., str], system: str) -> None:
    run(
        system,
        """
found = {each.backend: each for each in natcompat.probe()}
assert found[NAME].viable and found[NAME].automatic, found[NAME]
assert backends.select().name == NAME
assert not found["linux"].viable and found["linux"].reason.startswith("it is for linux; this is ")
with udp(port=PORT) as sock:
    endpoint = set_nat_t_endpoint(sock)
    assert endpoint.backend == NAME and endpoint.duties[Duty.DIVERT_ESP] is KERNEL
    assert endpoint.duties[Duty.STRIP_MARKER] is endpoint.duties[Duty.INSERT_MARKER] is PROCESS
    assert error(set_nat_t_endpoint, sock, esp=print, backend=NAME).errno == errno.ENOTSUP
""",
        port=free_port() if system == "openbsd" else 0,
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_without_the_privilege_for_sas_the_backend_is_requested_by_name(
    run: Callable[..., str], system: str
) -> None:
    port = 0 if bsd_kernels.KERNEL_SUPPORT[system].option else free_port()  # as another daemon has set it
    run(
        system,
        """
found = backends.viability(NAME)
assert found.viable and not found.automatic and "root" in found.remedy, found
assert backends.select().name == "userspace"
with udp(port=PORT) as sock:
    endpoint = set_nat_t_endpoint(sock, backend=NAME)
    assert endpoint.duties[Duty.DIVERT_ESP] is KERNEL
    if NAME != "openbsd":  # whose levels take no privilege
        assert endpoint.stats().bypassed is False
    endpoint.close()
""",
        privileges="",
        port=port,
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_kernel_without_ipsec(run: Callable[..., str], system: str) -> None:
    run(
        system,
        """
found = backends.viability(NAME)
assert not found.viable and "no IPsec" in found.reason and found.remedy == SUPPORT.without_ipsec
assert backends.select().name == "userspace"
if SUPPORT.option:
    with udp() as sock:
        raised = error(backends.get(NAME).attach, sock, None)
        assert raised.errno == errno.ENOPROTOOPT and raised.remedy == SUPPORT.without_ipsec
""",
        kernel="no-ipsec",
        port=4500,
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_socket_is_exempt_from_policies_until_the_option_is_off(
    run: Callable[..., str], system: str
) -> None:
    run(
        system,
        """
for family in LOOPBACK:
    with udp(family, PORT) as sock:
        endpoint = set_nat_t_endpoint(sock)
        assert endpoint.stats().bypassed is True
        assert exempt(sock) == (NAME != "openbsd")  # whose sockets are, unless they ask for more
        endpoint.close()
        assert not exempt(sock)
""",
        port=free_port() if system == "openbsd" else 0,
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_doctor_and_verify(make_model: MakeModel, system: str) -> None:
    options: dict[str, Any] = {"port": free_port() if system == "openbsd" else 0}
    for arguments in (["doctor"], ["verify", "--no-nat", "--backend", system]):
        code = f"from natcompat.commands.main import main\nsys.argv = ['natcompat', *{arguments!r}]\nmain()\n"
        done = make_model(system).run(code, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        if arguments == ["doctor"]:
            assert f"auto takes {system} here" in done.stdout
            if not bsd_kernels.KERNEL_SUPPORT[system].option:
                assert "on every socket of the system" in " ".join(done.stdout.split())
                assert ("endpoints set net.inet.ipsec.esp_port" in done.stdout) == (system == "macos")


# --- an option on each socket -----------------------------------------------------------------------


@pytest.mark.parametrize("system", WITH_OPTION)
def test_the_option_is_set_and_given_back(run: Callable[..., str], system: str) -> None:
    run(
        system,
        """
option = socket.IPPROTO_UDP, SUPPORT.option
for before in (0, SUPPORT.value):
    with udp() as sock:
        sock.setsockopt(*option, before)
        endpoint = set_nat_t_endpoint(sock)
        if SUPPORT.readable:
            assert sock.getsockopt(*option) == SUPPORT.value
        sock.setsockopt(*option, 0)  # of the application's, and it stays switched on meanwhile
        assert get_nat_t_endpoint(sock) is endpoint and endpoint.duties[Duty.DIVERT_ESP] is KERNEL
        endpoint.close()
        if SUPPORT.readable:
            assert sock.getsockopt(*option) == 0
""",
    )


@pytest.mark.parametrize("system", WITH_OPTION)
def test_ipv6_is_left_to_the_process(run: Callable[..., str], system: str) -> None:
    run(
        system,
        """
with udp(socket.AF_INET6) as sock, udp(socket.AF_INET6) as peer:
    endpoint = set_nat_t_endpoint(sock)
    assert set(endpoint.duties.values()) == {PROCESS} and endpoint.leaks == frozenset()
    assert "IPv4 alone" in endpoint.reason and endpoint.mode == "in line"
    peer.sendto(b"ESP packet", sock.getsockname())
    peer.sendto(bytes(4) + b"IKE", sock.getsockname())
    assert sock.recv(64) == b"IKE" and endpoint.stats().esp == 1
""",
    )


@pytest.mark.parametrize("system", WITH_OPTION)
def test_a_kernel_that_takes_the_option_and_delivers_esp(run: Callable[..., str], system: str) -> None:
    """That setsockopt succeeds proves nothing."""
    code = """
found = backends.viability(NAME)
assert not found.viable and "delivers ESP all the same" in found.reason, found
"""
    run(system, code, kernel="no-demultiplexing")


def test_netbsd_delivers_bare_spis(run: Callable[..., str]) -> None:
    run(
        "netbsd",
        """
from natcompat.contract import TABLE
with udp() as sock, udp() as peer:
    endpoint = set_nat_t_endpoint(sock)
    assert endpoint.leaks == {row.name for row in TABLE if len(row.payload) == 4 and any(row.payload)}
    peer.sendto(b"\\xc0\\xde\\0\\1", sock.getsockname())
    assert select.select([sock], [], [], 5)[0]
    sock.setblocking(False)
    assert isinstance(error(sock.recv, 64), BlockingIOError)
    endpoint.close()
    assert endpoint.leaks == frozenset()
""",
    )


# --- one port of the system -------------------------------------------------------------------------


def test_macos_sets_the_port_while_it_is_needed(run: Callable[..., str]) -> None:
    said = run(
        "macos",
        """
assert SUPPORT.port.read() == 0
with udp() as sock:
    endpoint = set_nat_t_endpoint(sock)
    port = sock.getsockname()[1]
    assert SUPPORT.port.read() == port == backends.get(NAME).port
    with udp(socket.AF_INET6, port) as other:
        second = set_nat_t_endpoint(other)  # of the same port
        endpoint.close()
        assert SUPPORT.port.read() == port
    assert SUPPORT.port.read() == 0
    endpoint = set_nat_t_endpoint(sock)
    with udp() as other:
        raised = error(set_nat_t_endpoint, other)
        assert raised.errno == errno.EBUSY and str(port) in str(raised) and "this process" in raised.remedy
        assert get_nat_t_endpoint(other) is None and type(other) is socket.socket
    assert SUPPORT.port.read() == port
    child = os.fork()
    if not child:
        get_nat_t_endpoint(sock).close()
        assert SUPPORT.port.read() == port  # in the model, the child's own copy
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    SUPPORT.port.write(1)  # another daemon
    assert endpoint.duties[Duty.DIVERT_ESP] is PROCESS and "esp_port is 1" in endpoint.reason
    endpoint.close()
    assert SUPPORT.port.read() == 1
    SUPPORT.port.write(0)
sock = udp()
endpoint = set_nat_t_endpoint(sock)
assert SUPPORT.port.read()
sock.close()
assert SUPPORT.port.read() == 0
sock = udp()
endpoint = set_nat_t_endpoint(sock)
assert SUPPORT.port.read()
PRINTED.append(SUPPORT.port)  # it stays open, until the process exits
""",
    )
    assert said == "net.inet.ipsec.esp_port 0\n"


def test_macos_with_a_port_of_somebody_else(run: Callable[..., str]) -> None:
    port = free_port()
    said = run(
        "macos",
        """
with udp(port=PORT) as sock:
    endpoint = set_nat_t_endpoint(sock)
    assert endpoint.duties[Duty.DIVERT_ESP] is KERNEL
    endpoint.close()
assert SUPPORT.port.read() == PORT
with udp() as sock:
    raised = error(set_nat_t_endpoint, sock)
    assert raised.errno == errno.EBUSY and "another daemon" in raised.remedy
with udp(bound=False) as sock:
    endpoint = set_nat_t_endpoint(sock)
    assert endpoint.mode == "unbound"
    logging.getLogger("natcompat").setLevel(logging.CRITICAL)
    sock.bind(("127.0.0.1", 0))
    assert endpoint.mode == "in line" and "whole system" in endpoint.reason
    assert endpoint.stats().errors == 1
PRINTED.append(SUPPORT.port)
""",
        port=port,
    )
    assert said == f"net.inet.ipsec.esp_port {port}\n"


def test_macos_without_root(run: Callable[..., str]) -> None:
    run(
        "macos",
        """
found = backends.viability(NAME)
assert not found.viable and found.code == errno.EPERM, found
assert "esp_port" in found.reason and "root" in found.remedy
with udp() as sock:
    assert error(set_nat_t_endpoint, sock, backend=NAME).errno == errno.EPERM
    raised = error(backends.get(NAME).attach, sock, None)
    assert raised.errno == errno.EPERM and raised.remedy == "Run as root"
    assert set_nat_t_endpoint(sock).backend == "userspace"
""",
        privileges="",
    )


def test_macos_sleeps_before_the_first_sa(run: Callable[..., str]) -> None:
    run(
        "macos",
        """
with udp() as sock, udp() as peer:
    endpoint = set_nat_t_endpoint(sock)
    assert set(endpoint.duties.values()) == {PROCESS} and "once there is an SA" in endpoint.reason
    peer.sendto(b"ESP packet", sock.getsockname())
    peer.sendto(bytes(4) + b"IKE", sock.getsockname())
    assert sock.recv(64) == b"IKE" and endpoint.stats().esp == 1
""",
        kernel="no-sa",
    )


def test_openbsd_has_one_port(run: Callable[..., str]) -> None:
    run(
        "openbsd",
        """
assert backends.get(NAME).port == PORT
with udp() as sock:
    raised = error(set_nat_t_endpoint, sock)
    assert raised.errno == errno.EADDRNOTAVAIL and str(PORT) in raised.remedy and "userspace" in raised.remedy
    assert get_nat_t_endpoint(sock) is None and type(sock) is socket.socket
for family in LOOPBACK:
    with udp(family, bound=False) as sock:
        endpoint = set_nat_t_endpoint(sock)
        assert endpoint.mode == "unbound"
        sock.bind((LOOPBACK[family], PORT))
        assert endpoint.mode == "kernel" and endpoint.reason == ""
        assert endpoint.duties[Duty.DROP_RUNTS] is endpoint.duties[Duty.DIVERT_ESP] is KERNEL
""",
        port=free_port(),
    )


def test_openbsd_switched_off_by_the_administrator(run: Callable[..., str]) -> None:
    said = run(
        "openbsd",
        """
assert SUPPORT.enabled.read() == 0
with udp(port=PORT) as sock:
    endpoint = set_nat_t_endpoint(sock)
    assert SUPPORT.enabled.read() == 1 and endpoint.mode == "kernel"
    SUPPORT.enabled.write(0)  # the administrator again
    assert endpoint.mode == "in line" and "udpencap is 0" in endpoint.reason
    SUPPORT.enabled.write(1)
    endpoint.close()
    assert SUPPORT.enabled.read() == 0
    endpoint = set_nat_t_endpoint(sock)
with udp() as sock:
    error(set_nat_t_endpoint, sock)  # of another port: nothing is left of it
    assert SUPPORT.enabled.read() == 0
os.environ["NATCOMPAT_MODEL_PRIVILEGES"] = ""
found = backends.viability(NAME)
assert not found.viable and found.code == errno.EPERM and "udpencap" in found.reason
PRINTED.append(SUPPORT.enabled)
""",
        kernel="no-udpencap",
        port=free_port(),
    )
    assert said == "net.inet.esp.udpencap 0\n"


# --- sysctls where there are none ---------------------------------------------------------------------


@pytest.mark.parametrize("sysctl", [Sysctl("net.inet.ipsec.esp_port"), Sysctl("udpencap", (4, 2, 50, 2))])
def test_a_system_without_sysctls(sysctl: Sysctl) -> None:
    assert sysctl.read() is None
    with pytest.raises(OSError, match=r"."):
        sysctl.write(1)


# --- SAs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [*SYSTEMS, "solaris"])
def test_opening_the_sad_without_privilege(make_model: MakeModel, system: str) -> None:
    """By the dialect of PF_KEY that belongs to the backend, which names the privilege."""
    done = make_model(system).run(
        """
import errno, os
from natcompat import backends
try:
    backends.get(os.environ["NATCOMPAT_MODEL"]).open_ipsec()
except OSError as error:
    assert error.errno == errno.EPERM and error.remedy.startswith("Run as root"), error
else:
    raise AssertionError("it opened")
""",
        privileges="",
    )
    assert done.returncode == 0, done.stderr
