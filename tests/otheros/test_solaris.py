"""The backend `solaris` under the model of its kernel, by the extension and by ctypes."""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import runpy
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from natcompat.backends import sunos
from natcompat.backends.solaris import send_raw_keepalive
from natcompat.contract import NAT_KEEPALIVE
from natcompat.kernel.pfkey import numbers as pf_key
from tests.otheros.conftest import MakeModel
from tests.otheros.running import COMPILER, HERE
from tests.support.running import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the model runs on Linux")

START = """
import errno, gc, os, select, socket, natcompat
from natcompat import backends, get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.contract import Duty, Performer
OPTION = socket.IPPROTO_UDP, 0x0103
EXEMPTION = socket.IPPROTO_IP, 0x22
NEVER = (1).to_bytes(4, sys.byteorder) * 3 + bytes(4)
def udp(family=socket.AF_INET):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(5)
    return sock
def error(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except OSError as raised:
        return raised
    raise AssertionError("nothing was raised")
"""


@pytest.fixture(scope="session")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with ``_solaris``, built as on SunOS, with the headers of the model."""
    if COMPILER is None or importlib.util.find_spec("cffi") is None:
        pytest.skip("it is built by cffi with a C compiler")
    from setuptools import Distribution, Extension

    directory = tmp_path_factory.mktemp("extension")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "system", lambda: "SunOS")
        build = runpy.run_path(str(ROOT / "ffi/build_datapath.py"))["BuildDatapath"]
        # as pyproject.toml has it, without the libraries
        made = Extension("natcompat.backends._solaris", ["ffi/solaris/build_solaris.py"])
        made.include_dirs = [str(HERE / "include")]
        command = build(Distribution({"name": "natcompat", "ext_modules": [made]}))
        command.build_temp = command.build_lib = str(directory)
        command.ensure_finalized()
        command.run()
    return directory / "natcompat" / "backends"


@pytest.fixture(params=["ctypes", "extension"])
def way(request: pytest.FixtureRequest) -> tuple[str, tuple[Path, ...]]:
    """Both ways to the system: what goes in front of the program, and of its ``sys.path``."""
    if request.param == "ctypes":
        return "import natcompat.backends.sunos\nassert natcompat.backends.sunos.extension() is None\n", ()
    code = """
import importlib, _solaris
sys.modules["natcompat.backends._solaris"] = _solaris
import natcompat.backends.sunos
assert natcompat.backends.sunos.extension() is _solaris
"""
    return code, (request.getfixturevalue("extension"),)


@pytest.fixture
def solaris(make_model: MakeModel, way: tuple[str, tuple[Path, ...]]) -> Any:
    """Run a program under the model; its last words are those of its assertions."""

    def run(code: str, **options: Any) -> None:
        done = make_model("solaris").run(START + way[0] + code, path=way[1], **options)
        assert done.returncode == 0, done.stderr

    return run


def test_the_socket_is_left_alone(solaris: Any) -> None:
    solaris("""
class Mine(socket.socket):
    pass
for cls in (socket.socket, Mine):
    with cls(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        endpoint = set_nat_t_endpoint(sock)
        assert type(sock) is cls and endpoint.backend == "solaris"
        assert endpoint.mode == "kernel" and endpoint.reason == ""
        assert set(endpoint.duties.values()) == {Performer.KERNEL} and len(endpoint.duties) == 4
        assert get_nat_t_endpoint(sock) is endpoint is set_nat_t_endpoint(sock)
        assert sock.getsockopt(*OPTION) == 1
        endpoint.close()
        assert sock.getsockopt(*OPTION) == 0 and get_nat_t_endpoint(sock) is None and endpoint.mode == "off"
""")


def test_the_option_is_read_from_the_kernel(solaris: Any) -> None:
    """The application may set and clear the option itself; aliases have it as well."""
    solaris("""
with udp() as sock:
    endpoint = set_nat_t_endpoint(sock)
    sock.setsockopt(*OPTION, 0)
    assert get_nat_t_endpoint(sock) is None and endpoint.closed and endpoint.mode == "off"
    assert error(endpoint.send_keepalive, ("127.0.0.1", 9)).errno == errno.EBADF
    sock.setsockopt(*OPTION, 7)
    found = get_nat_t_endpoint(sock)
    assert found is get_nat_t_endpoint(sock) and found is not endpoint and found.backend == "solaris"
    with sock.dup() as other:
        assert get_nat_t_endpoint(other).mode == "kernel"
        found.close()
        assert get_nat_t_endpoint(other) is None
    assert get_nat_t_endpoint(sock) is None
with udp() as sock:
    endpoint = set_nat_t_endpoint(sock)
    number = id(sock)
assert endpoint.closed
for odd in (None, 7, object()):
    assert get_nat_t_endpoint(odd) is None
del sock
gc.collect()
from natcompat.endpoint import aliases
assert aliases._plain == {}
""")


def test_errors_are_eperm_first_and_then_the_family(solaris: Any) -> None:
    solaris(
        """
for family in (socket.AF_INET, socket.AF_INET6):
    with udp(family) as sock:
        raised = error(set_nat_t_endpoint, sock, backend="solaris")
        assert raised.errno == errno.EPERM, raised
        assert "PRIV_SYS_IP_CONFIG" in str(raised) and "sys_ip_config" in str(raised)
        assert get_nat_t_endpoint(sock) is None and type(sock) is socket.socket
found = backends.viability("solaris")
assert not found.viable and found.code == errno.EPERM and "PRIV_SYS_IP_CONFIG" in found.remedy
assert backends.select().name == "userspace"
raised = error(set_nat_t_endpoint, udp(), backend="solaris,linux")
assert raised.errno == errno.ENOTSUP
""".replace("set_nat_t_endpoint, udp(),", "backends.select,").replace(
            'backend="solaris,linux"', '"solaris,linux"'
        ),
        privileges="net_rawaccess",
    )
    solaris("""
with udp(socket.AF_INET6) as sock:
    for backend in ("solaris", None):
        raised = error(set_nat_t_endpoint, sock, backend=backend)
        assert raised.errno == errno.EAFNOSUPPORT and "userspace" in raised.remedy
    endpoint = set_nat_t_endpoint(sock, backend="userspace")
    assert endpoint.backend == "userspace" and endpoint.mode == "in line"
""")


def test_either_privilege_will_do(solaris: Any) -> None:
    solaris("assert backends.viability('solaris').viable", privileges="sys_net_config")


def test_a_privilege_that_was_dropped_meanwhile(solaris: Any) -> None:
    solaris("""
with udp() as sock:
    endpoint = set_nat_t_endpoint(sock)
    os.environ["NATCOMPAT_MODEL_PRIVILEGES"] = ""
    raised = error(endpoint.close)
    assert raised.errno == errno.EPERM and "sys_ip_config" in raised.remedy
    found = get_nat_t_endpoint(sock)  # for the kernel has it still
    assert found.mode == "kernel" and sock.getsockopt(*OPTION) == 1
""")


def test_a_kernel_without_the_option(solaris: Any) -> None:
    solaris(
        """
found = backends.viability("solaris")
assert not found.viable and "userspace" in found.remedy and found.code == errno.ENOPROTOOPT
assert backends.select().name == "userspace"
""",
        kernel="no-ipsec",
    )


def test_a_kernel_that_takes_the_option_and_does_not_have_it(solaris: Any) -> None:
    """That setsockopt succeeds proves nothing."""
    solaris("""
plain = socket.socket.setsockopt
socket.socket.setsockopt = lambda sock, *option: plain(sock, *option) if option[:2] != OPTION else None
found = backends.viability("solaris")
assert not found.viable and "does not have it" in found.reason
""")


def test_the_socket_is_exempt_from_policies_unless_it_is_connected(solaris: Any) -> None:
    solaris("""
with udp() as sock:
    endpoint = set_nat_t_endpoint(sock)
    assert endpoint.stats().bypassed and sock.getsockopt(*EXEMPTION, 16) == NEVER
    endpoint.close()
    assert sock.getsockopt(*EXEMPTION, 16) == bytes(16)
    sock.setsockopt(*EXEMPTION, NEVER)  # the application's own stays
    endpoint = set_nat_t_endpoint(sock)
    assert endpoint.stats().bypassed
    endpoint.close()
with udp() as sock:
    sock.connect(("127.0.0.1", 9))
    endpoint = set_nat_t_endpoint(sock)
    assert endpoint.mode == "kernel" and endpoint.stats().bypassed is False
""")


def test_statistics_of_the_kernel(solaris: Any) -> None:
    solaris("""
with udp() as sock:
    found = set_nat_t_endpoint(sock).stats().system_wide
    assert found == {
        "ip:0:ipdrop:esp_nat_t_ka": 70000000001,
        "ip:0:ipdrop:esp_no_sa": 3,
        "ipsecesp:0:esp_stat:sa_port_renumbers": 4,
    }, found
    os.environ["NATCOMPAT_MODEL_KERNEL"] = "no-kstat"
    assert get_nat_t_endpoint(sock).stats().system_wide == {}
""")


def test_keepalives_take_a_raw_socket(solaris: Any) -> None:
    solaris("""
with udp() as sock, udp() as peer:
    peer.bind(("127.0.0.1", 0))
    endpoint = set_nat_t_endpoint(sock)
    endpoint.send_keepalive(peer.getsockname())  # which binds it
    data, source = peer.recvfrom(64)
    assert data == b"\\xff" and source[1] == sock.getsockname()[1]
    sock.connect(peer.getsockname())
    endpoint.send_keepalive()
    assert peer.recv(64) == b"\\xff"
    assert endpoint.stats().keepalives_sent == 2
    with natcompat.Keepalive(endpoint, interval=0.05) as keepalive:
        keepalive.add()
        assert peer.recv(64) == b"\\xff"
    os.environ["NATCOMPAT_MODEL_PRIVILEGES"] = "sys_ip_config"
    raised = error(endpoint.send_keepalive)
    assert raised.errno == errno.EPERM, raised
    assert "PRIV_NET_RAWACCESS" in raised.remedy and "nat_keepalive" in raised.remedy
    assert endpoint.stats().keepalives_sent >= 3
found = backends.viability("solaris")
assert found.viable and "PRIV_NET_RAWACCESS" in found.reason and found.remedy
""")


def test_from_one_backend_to_the_other(solaris: Any) -> None:
    solaris("""
with udp() as sock, udp() as peer:
    for each in (sock, peer):
        each.bind(("127.0.0.1", 0))
    endpoint = set_nat_t_endpoint(sock)
    for backend, plain in (("userspace", False), ("solaris", True)):
        assert set_nat_t_endpoint(sock, backend=backend) is endpoint
        assert (type(sock) is socket.socket) == plain and endpoint.backend == backend
        assert get_nat_t_endpoint(sock) is endpoint
        assert peer.sendto(b"\\0\\0\\0\\0IKE", sock.getsockname())
        assert sock.recv(64) == b"IKE"
    endpoint.close()
    packets = []
    with_consumer = set_nat_t_endpoint(sock, esp=lambda packet, source: packets.append(bytes(packet)))
    assert with_consumer.backend == "userspace"
    peer.sendto(b"ESP packet", sock.getsockname())
    peer.sendto(b"\\0\\0\\0\\0IKE", sock.getsockname())
    assert sock.recv(64) == b"IKE" and packets == [b"ESP packet"]
""")


def test_doctor_and_verify(make_model: MakeModel) -> None:
    done = make_model("solaris").run("""
from natcompat.commands.main import main
sys.argv = ["natcompat", "doctor"]
main()
""")
    assert done.returncode == 0, done.stderr
    assert "auto takes solaris here" in done.stdout
    done = make_model("solaris").run("""
from natcompat.commands.main import main
sys.argv = ["natcompat", "verify", "--no-nat", "--backend", "solaris"]
main()
""")
    assert done.returncode == 0, done.stdout + done.stderr


# --- the extension, as far as it can be built here ----------------------------------------------------


def test_the_numbers_and_layouts_of_the_extension(extension: Path) -> None:
    """Against the documented ones: the headers of the test are no Solaris, but cffi looked at them alone."""
    made = _load(extension)
    ffi = made.ffi
    assert ffi.sizeof("ipsec_req_t") == 16
    offsets = {
        "ipsr_ah_req": 0,
        "ipsr_esp_req": 4,
        "ipsr_self_encap_req": 8,
        "ipsr_auth_alg": 12,
        "ipsr_esp_alg": 13,
        "ipsr_esp_auth_alg": 14,
    }
    assert {name: ffi.offsetof("ipsec_req_t", name) for name in offsets} == offsets
    assert [ffi.sizeof(each) for each in ("sadb_msg_t", "sadb_sa_t", "sadb_address_t")] == [16, 16, 8]
    lib = made.lib
    assert (lib.UDP_NAT_T_ENDPOINT, lib.IP_SEC_OPT, lib.IPV6_SEC_OPT) == (0x0103, 0x22, 0x22)
    assert (lib.SADB_X_EXT_ADDRESS_NATT_LOC, lib.SADB_X_EXT_ADDRESS_NATT_REM) == (
        pf_key.SADB_X_EXT_ADDRESS_NATT_LOC,
        pf_key.SADB_X_EXT_ADDRESS_NATT_REM,
    )
    assert (lib.SADB_X_SAFLAGS_NATT_LOC, lib.SADB_X_SAFLAGS_NATT_REM, lib.SADB_X_SAFLAGS_TUNNEL) == (
        pf_key.SOLARIS_NATT_LOC,
        pf_key.SOLARIS_NATT_REM,
        pf_key.SOLARIS_TUNNEL,
    )
    assert ffi.string(lib.PRIV_SYS_IP_CONFIG) == sunos.SYS_IP_CONFIG.encode()
    assert ffi.string(lib.PRIV_SYS_NET_CONFIG) == sunos.SYS_NET_CONFIG.encode()
    assert ffi.string(lib.PRIV_NET_RAWACCESS) == sunos.NET_RAWACCESS.encode()


def _load(directory: Path) -> Any:
    """Import the extension here: by lazy binding, since nothing of Solaris' libraries is called."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        (path,) = directory.glob("_solaris*.so")
        spec = importlib.util.spec_from_file_location("_solaris", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
        sys.modules.pop("natcompat.backends._solaris", None)  # where it puts itself
    return module


def test_both_ways_say_the_same(extension: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sunos, "extension", lambda: None)
    numbers, request = sunos.numbers(), sunos.security_request(1)
    made = _load(extension)
    monkeypatch.setattr(sunos, "extension", lambda: made)
    assert sunos.numbers() == numbers
    assert sunos.security_request(1) == request == struct.pack("=IIII", 1, 1, 1, 0)
    assert sunos.security_request(0) == bytes(16)


def test_on_another_system_nothing_is_found() -> None:
    assert sunos.extension() is None
    assert sunos.in_effect(sunos.SYS_IP_CONFIG) is None
    assert sunos.statistics() == {}


def test_it_is_built_on_sunos_alone() -> None:
    builder = runpy.run_path(str(ROOT / "ffi/solaris/build_solaris.py"))
    with pytest.raises(SystemExit, match="for Solaris"):
        builder["main"]()


# --- a raw socket of this system's ----------------------------------------------------------------------


def test_a_raw_keepalive_on_the_wire() -> None:
    """Linux takes it as Solaris would: the UDP header is the sender's, the IP header the kernel's."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP).close()
    except PermissionError:
        with pytest.raises(OSError, match="PRIV_NET_RAWACCESS") as raised:
            send_raw_keepalive(("127.0.0.1", 4500), ("127.0.0.1", 4500))
        assert raised.value.errno == errno.EPERM
        return
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        for each in (sock, peer):
            each.bind(("127.0.0.1", 0))
            each.settimeout(5)
        for source in (sock.getsockname(), ("0.0.0.0", sock.getsockname()[1])):
            send_raw_keepalive(source, peer.getsockname())
            assert peer.recvfrom(64) == (NAT_KEEPALIVE, sock.getsockname())
