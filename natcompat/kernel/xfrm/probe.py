"""Probes whether this process can install an ESP SA in this kernel, without installing one.

That a UDP socket accepts UDP_ENCAP says nothing: a kernel with XFRM but without ESP accepts it, too,
and then loses every ESP packet. `probe_esp` therefore asks XFRM itself, with a request for an SA
which the kernel must refuse, but only after it has looked for ESP and for the algorithms:
xfrm_state_construct() in net/xfrm/xfrm_user.c attaches the algorithms, calls the ``init_state`` of
ESP, and last of all compares the anti-replay window with the bitmap that came with it, and here the
bitmap is too small. Nothing is installed, nobody is notified; the kernel may load the modules
that a real SA would load, which is the only trace.

Hand-packed, since pyroute2 takes longer to import than all of the rest of natcompat. All functions
are free of state: any thread, any process.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys

from natcompat.kernel.xfrm.esp_support import EspProbe, EspSupport, XfrmAttributes

SOL_NETLINK = 270  # linux/socket.h
NETLINK_XFRM = 6  # linux/netlink.h, as all NETLINK_* and NLM*
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NLMSG_ERROR = 2
NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLMSGERR_ATTR_MSG = 1
NLA_TYPE_MASK = 0x3FFF
XFRM_MSG_NEWSA = 0x10  # linux/xfrm.h, as all XFRM*
XFRM_MSG_DELSA = 0x11
XFRMA_ALG_CRYPT = 2
XFRMA_ALG_AEAD = 18
XFRMA_ALG_AUTH_TRUNC = 20
XFRMA_REPLAY_ESN_VAL = 23
XFRMA_OFFLOAD_DEV = 28
XFRMA_SET_MARK_MASK = 30
XFRMA_SA_DIR = 33
XFRMA_NAT_KEEPALIVE_INTERVAL = 34
XFRMA_SA_PCPU = 35
UDP_ENCAP = 100  # linux/udp.h
UDP_ENCAP_ESPINUDP = 2

_ANSWER_TIMEOUT = 10.0
"""Seconds for the kernel's answer: it loads modules in that time, 1.5 s on a cold and slow machine."""

_SILENCE = 0.1
"""Seconds without an ICMP error that count as none; on loopback it comes before sendto() returns."""

KEY_BITS = {
    "cbc(aes)": 128,
    "rfc3686(ctr(aes))": 160,
    "rfc4106(gcm(aes))": 160,
    "rfc4309(ccm(aes))": 152,
    "rfc4543(gcm(aes))": 160,
    "rfc7539esp(chacha20,poly1305)": 288,
    "cbc(camellia)": 128,
    "cbc(des3_ede)": 192,
    "ecb(cipher_null)": 0,
    "hmac(md5)": 128,
    "hmac(sha1)": 160,
    "hmac(sha256)": 256,
    "hmac(sha384)": 384,
    "hmac(sha512)": 512,
    "xcbc(aes)": 128,
    "cmac(aes)": 128,
    "digest_null": 0,
}
"""Smallest key of each algorithm, salt or nonce included, by the name in net/xfrm/xfrm_algo.c."""

_ICV_BITS = {"hmac(sha256)": 128, "hmac(sha384)": 192, "hmac(sha512)": 256, "digest_null": 0}
_DEFAULT_ICV_BITS = 96

MODULES = {
    "cbc(aes)": "cbc and aes",
    "rfc3686(ctr(aes))": "ctr and aes",
    "rfc4106(gcm(aes))": "gcm, ctr and ghash",
    "rfc4309(ccm(aes))": "ccm and ctr",
    "rfc4543(gcm(aes))": "gcm, ctr and ghash",
    "rfc7539esp(chacha20,poly1305)": "chacha20poly1305",
    "cbc(camellia)": "camellia_generic and cbc",
    "cbc(des3_ede)": "des_generic and cbc",
    "ecb(cipher_null)": "crypto_null",
    "hmac(md5)": "md5 and hmac",
    "hmac(sha1)": "sha1_generic and hmac",
    "hmac(sha256)": "sha256_generic and hmac",
    "hmac(sha384)": "sha512_generic and hmac",
    "hmac(sha512)": "sha512_generic and hmac",
    "xcbc(aes)": "xcbc and aes",
    "cmac(aes)": "cmac and aes",
    "digest_null": "crypto_null",
}
"""The modules that bring each algorithm, by the names that modprobe takes."""

MARKER = bytes(4)


def probe_attributes() -> XfrmAttributes:
    """Ask which attributes the kernel knows, with bad values for them; installs nothing, never raises.

    A kernel ignores attributes that it does not know, and refuses bad values of those that it knows
    (xfrma_policy in xfrm_user.c; ERANGE or EINVAL) before it looks at anything else. What is asked for
    is an SA of no address family, which is refused in any case, but in other words.
    """
    try:
        with _xfrm_socket() as netlink:

            def ask(attribute: bytes) -> tuple[int, str]:
                return _request(netlink, XFRM_MSG_NEWSA, NLM_F_REQUEST | NLM_F_ACK, bytes(224) + attribute)

            bare = ask(b"")
            if bare[0] != errno.EINVAL:
                return XfrmAttributes(errno=bare[0])
            return XfrmAttributes(
                sa_direction=ask(_attribute(XFRMA_SA_DIR, b"\xff")) != bare,
                keepalive=ask(_attribute(XFRMA_NAT_KEEPALIVE_INTERVAL, b"\0")) != bare,
                # One byte is too short for each of these.
                output_mark=ask(_attribute(XFRMA_SET_MARK_MASK, b"\0")) != bare,
                hw_offload=ask(_attribute(XFRMA_OFFLOAD_DEV, b"\0")) != bare,
                cpu=ask(_attribute(XFRMA_SA_PCPU, b"\0")) != bare,
            )
    except (AttributeError, OSError) as error:
        return XfrmAttributes(errno=getattr(error, "errno", None) or errno.EAFNOSUPPORT)


def probe_esp(
    encryption: str = "cbc(aes)",
    integrity: str = "hmac(sha256)",
    *,
    family: int = socket.AF_INET,
    key_bits: int | None = None,
    icv_bits: int | None = None,
) -> EspProbe:
    """Tell whether this process could install an ESP SA with these algorithms; installs nothing.

    `encryption` and `integrity` are the kernel's names (net/xfrm/xfrm_algo.c); an empty `integrity`
    makes `encryption` an AEAD. `key_bits` counts the key of `encryption` with its salt, `icv_bits`
    the integrity check value; both default to something that fits. `family` is that of the SA's
    addresses. Never raises. Takes well below a millisecond once the modules are loaded.
    """
    try:
        code, text = _dry_run(encryption, integrity, family, key_bits, icv_bits)
        if code == errno.ENOSYS and encryption != "ecb(cipher_null)":
            # The kernel looks for algorithms first: without ESP, loading them would not help.
            null = _dry_run("ecb(cipher_null)", "digest_null", family, None, None)
            if null[0] == errno.EPROTONOSUPPORT:
                code, text = null
    except (AttributeError, OSError, ValueError, struct.error) as error:
        return _no_xfrm(error)
    return _judge(code, text, encryption, integrity, family)


def probe_esp_unprivileged(family: int = socket.AF_INET) -> EspProbe:
    """Tell without any privilege whether the kernel takes the ESP packets that UDP_ENCAP gives it.

    Sends one ESP packet with an unknown SPI from a connected loopback socket to an own socket with
    UDP_ENCAP. A kernel without ESP answers with ICMP unreachable (ECONNREFUSED), one with ESP is
    silent. `AVAILABLE` says nothing about algorithms; a module that nobody has loaded yet looks like
    one that is not there. Never raises. Takes about 0.6 ms without ESP and 0.1 s with it.
    """
    try:
        return _ask_loopback(family)
    except (AttributeError, OSError) as error:
        code = getattr(error, "errno", None) or 0
        if code == errno.ENOPROTOOPT:
            return EspProbe(
                support=EspSupport.NO_XFRM,
                errno=code,
                kernel_text=os.strerror(code),
                reason="The kernel refuses UDP_ENCAP: it has no XFRM.",
                remedy="Run a kernel with CONFIG_XFRM_USER and CONFIG_INET_ESP, or use another backend.",
            )
        return EspProbe(
            support=EspSupport.UNKNOWN,
            errno=code,
            kernel_text=os.strerror(code) if code else str(error),
            reason=f"The probe on loopback failed ({error}).",
            remedy="Set the loopback interface up (ip link set lo up), or allow UDP on it.",
        )


def _dry_run(
    encryption: str, integrity: str, family: int, key_bits: int | None, icv_bits: int | None
) -> tuple[int, str]:
    """Send the request that cannot succeed; return errno and the kernel's words."""
    bits = KEY_BITS.get(encryption, 128) if key_bits is None else key_bits
    if not 0 <= bits <= 4096:
        raise ValueError("a key has 0 to 4096 bits")
    # Never a real key: the kernel only wants its length to fit, and some ciphers refuse weak ones.
    key = bytes((index * 37 + 11) & 0xFF for index in range((bits + 7) // 8))
    if integrity:
        digest_bits = KEY_BITS.get(integrity, 160)
        icv = _ICV_BITS.get(integrity, _DEFAULT_ICV_BITS) if icv_bits is None else icv_bits
        algorithms = _attribute(
            XFRMA_ALG_CRYPT, struct.pack("=64sI", encryption.encode(), bits) + key
        ) + _attribute(
            XFRMA_ALG_AUTH_TRUNC,
            struct.pack("=64sII", integrity.encode(), digest_bits, icv) + bytes((digest_bits + 7) // 8),
        )
    else:
        icv = 128 if icv_bits is None else icv_bits
        algorithms = _attribute(XFRMA_ALG_AEAD, struct.pack("=64sII", encryption.encode(), bits, icv) + key)
    # xfrm_replay_state_esn with one word of bitmap and a window of 64: what the kernel refuses last.
    bitmap = _attribute(XFRMA_REPLAY_ESN_VAL, struct.pack("=6II", 1, 0, 0, 0, 0, 64, 0))

    spi = int.from_bytes(os.urandom(4), "big") | 0x8000_0000
    source = socket.inet_pton(family, "192.0.2.1" if family == socket.AF_INET else "2001:db8::1")
    destination = socket.inet_pton(family, "192.0.2.2" if family == socket.AF_INET else "2001:db8::2")
    # xfrm_usersa_info: selector (family 40), id, saddr, lft, curlft, stats, seq, reqid, family, mode...
    everything = (1 << 64) - 1
    info = (
        struct.pack("=40xH14x", family)
        + struct.pack("=16s4sB3x", destination, spi.to_bytes(4, "big"), socket.IPPROTO_ESP)
        + struct.pack("=16s", source)
        + struct.pack("=8Q", everything, everything, everything, everything, 0, 1, 0, 0)
        + bytes(32 + 12)
        + struct.pack("=IIHBBB7x", 0, 0, family, 1, 0, 0)
    )
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    with _xfrm_socket() as netlink:
        code, text = _request(netlink, XFRM_MSG_NEWSA, flags, info + algorithms + bitmap)
        if code == 0:
            # No kernel is known to take it. Should one: it lives for a second, and not even that.
            same = struct.pack("=16s4sHBx", destination, spi.to_bytes(4, "big"), family, socket.IPPROTO_ESP)
            _request(netlink, XFRM_MSG_DELSA, NLM_F_REQUEST | NLM_F_ACK, same)
        return code, text


def _xfrm_socket() -> socket.socket:
    """Open XFRM, such that it explains its refusals where it can."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
    try:
        netlink.settimeout(_ANSWER_TIMEOUT)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):  # since 4.3 and 4.12; worth having, not needed
            try:
                netlink.setsockopt(SOL_NETLINK, option, 1)
            except OSError as error:
                if error.errno != errno.ENOPROTOOPT:
                    raise
    except BaseException:
        netlink.close()
        raise
    return netlink


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _request(netlink: socket.socket, kind: int, flags: int, body: bytes) -> tuple[int, str]:
    """Send one request with NLM_F_ACK; return the errno and the text of the acknowledgement."""
    netlink.sendto(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body, (0, 0))
    while True:
        data, (port, _) = netlink.recvfrom(65536)
        if port != 0 or len(data) < 20:
            continue  # only the kernel's word counts
        length, answer, answer_flags, _, _ = struct.unpack_from("=IHHII", data)
        if answer != NLMSG_ERROR:
            continue
        code = -int(struct.unpack_from("=i", data, 16)[0])
        offset = 36
        if not answer_flags & NLM_F_CAPPED:
            offset = 20 + -(-int(struct.unpack_from("=I", data, 20)[0]) // 4) * 4
        text = os.strerror(code) if code else ""
        while answer_flags & NLM_F_ACK_TLVS and offset + 4 <= length:
            size, tag = struct.unpack_from("=HH", data, offset)
            if size < 4:
                break
            if tag & NLA_TYPE_MASK == NLMSGERR_ATTR_MSG:
                text = data[offset + 4 : offset + size].rstrip(b"\0").decode("utf-8", "replace")
            offset += -(-size // 4) * 4
        return code, text


def _judge(code: int, text: str, encryption: str, integrity: str, family: int) -> EspProbe:
    """Say in words what the answer to the dry run means."""
    esp = "esp4" if family == socket.AF_INET else "esp6"
    version = "IPv4" if family == socket.AF_INET else "IPv6"
    names = f"{encryption} with {integrity}" if integrity else encryption
    modules = " and ".join(MODULES.get(name, name) for name in (encryption, integrity) if name)
    # Kernels before 6.1 give no text; the request is well-formed, so their EINVAL is the bitmap.
    if code == 0 or (code == errno.EINVAL and ("bitmap size" in text or text == os.strerror(code))):
        support, reason, remedy = EspSupport.AVAILABLE, f"The kernel has ESP for {version} and {names}.", ""
    elif code == errno.EPERM:
        support = EspSupport.NO_PRIVILEGE
        reason = "This process may not install SAs: it lacks CAP_NET_ADMIN."
        remedy = "Run as root, grant CAP_NET_ADMIN (docker run --cap-add NET_ADMIN), or use another backend."
    elif code == errno.EPROTONOSUPPORT:
        support = EspSupport.NO_ESP
        reason = f"The kernel has XFRM but no ESP for {version}: it would lose every ESP packet."
        remedy = (
            f"Load the module {esp} (modprobe {esp}), run a kernel with CONFIG_INET_ESP and "
            "CONFIG_INET6_ESP, or use another backend."
        )
    elif code in (errno.ENOSYS, errno.ENOENT, errno.EAGAIN):
        support = EspSupport.NO_ALGORITHM
        reason = f"The kernel has no {names} for ESP ({text})."
        remedy = f"Load the modules {modules} (and drbg, seqiv and echainiv), or choose another algorithm."
    else:
        support = EspSupport.UNKNOWN
        reason = f"The kernel answered the dry run with {errno.errorcode.get(code, code)} ({text})."
        remedy = "Compare with what `ip xfrm state add` says for the same algorithms."
    return EspProbe(support=support, errno=code, kernel_text=text, reason=reason, remedy=remedy)


def _no_xfrm(error: Exception) -> EspProbe:
    code = getattr(error, "errno", None) or 0
    if isinstance(error, (ValueError, struct.error)):
        return EspProbe(support=EspSupport.UNKNOWN, kernel_text=str(error), reason=f"Bad argument: {error}.")
    if sys.platform != "linux":
        reason, remedy = "XFRM is the IPsec of Linux; this is not Linux.", "Use the backend of this OS."
    elif code in (errno.EPERM, errno.EACCES):
        reason = "A sandbox keeps this process from opening an XFRM netlink socket."
        remedy = "Allow AF_NETLINK sockets (seccomp, SELinux), or use another backend."
    else:
        reason = f"The kernel has no XFRM netlink ({error})."
        remedy = "Load the module xfrm_user, run a kernel with CONFIG_XFRM_USER, or use another backend."
    text = os.strerror(code) if code else str(error)
    return EspProbe(support=EspSupport.NO_XFRM, errno=code, kernel_text=text, reason=reason, remedy=remedy)


def _ask_loopback(family: int) -> EspProbe:
    loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
    with (
        socket.socket(family, socket.SOCK_DGRAM) as receiver,
        socket.socket(family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.setsockopt(socket.IPPROTO_UDP, UDP_ENCAP, UDP_ENCAP_ESPINUDP)
        receiver.bind((loopback, 0))
        receiver.setblocking(False)
        sender.connect(receiver.getsockname())
        sender.setblocking(False)
        # 40 bytes is the least that draws an ICMP error over IPv6; 20 over IPv4.
        sender.send(b"\xff" + os.urandom(3) + b"\0\0\0\1" + bytes(56))
        # Not ESP, so it must arrive: silence then is an answer and not a dead loopback.
        delivered: list[bytes] = []
        refused = 0
        try:
            sender.send(MARKER + b"probe")
            poll = select.poll()
            poll.register(sender, 0)  # errors only
            if poll.poll(_SILENCE * 1000):
                refused = sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except ConnectionRefusedError as error:
            refused = error.errno or errno.ECONNREFUSED
            sender.send(MARKER + b"probe")
        select.select([receiver], [], [], _SILENCE)
        while True:
            try:
                delivered.append(receiver.recv(256))
            except BlockingIOError:
                break
    if refused or any(not payload.startswith(MARKER) for payload in delivered):
        return EspProbe(
            support=EspSupport.NO_ESP,
            errno=refused,
            kernel_text=os.strerror(refused) if refused else "",
            reason="The kernel does not take ESP packets out of UDP: it has no ESP, or it is not loaded.",
            remedy="Load the modules esp4 and esp6 as root, or use another backend.",
        )
    if not delivered:
        return EspProbe(
            support=EspSupport.UNKNOWN,
            reason="Nothing arrives over loopback, so that silence says nothing about ESP.",
            remedy="Set the loopback interface up (ip link set lo up), or allow UDP on it.",
        )
    return EspProbe(
        support=EspSupport.AVAILABLE, reason="The kernel takes ESP packets out of UDP (algorithms unknown)."
    )
