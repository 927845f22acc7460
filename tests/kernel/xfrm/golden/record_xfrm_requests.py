"""Record the requests that `ip xfrm` sends, as tests/kernel/xfrm/golden/xfrm_requests.json.

Run as root on Linux with iproute2 and strace. Each command runs in a network namespace of its own;
whether the kernel obeys does not matter, only what it was asked.
"""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "tunnel AEAD with UDP": (
        "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0xc0de0001 reqid 7 mode tunnel "
        "replay-window 32 aead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128 "
        "encap espinudp 4500 34567 0.0.0.0"
    ),
    "transport CBC with ESN": (
        "ip xfrm state add src 2001:db8::1 dst 2001:db8::2 proto esp spi 0xc0de0002 reqid 8 mode transport "
        "replay-window 128 flag esn enc cbc(aes) 0x000102030405060708090a0b0c0d0e0f "
        "auth-trunc hmac(sha256) 0x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f 128"
    ),
    "mark, interface and limits": (
        "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0xc0de0003 mode tunnel "
        "mark 0x2a mask 0xff if_id 0x11 flag noecn flag nopmtudisc "
        "aead rfc7539esp(chacha20,poly1305) "
        "0x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20212223 128 "
        "limit byte-soft 1000 limit byte-hard 2000 limit packet-soft 10 limit packet-hard 20 "
        "limit time-soft 100 limit time-hard 200"
    ),
    "get an SA": "ip xfrm state get src 192.0.2.1 dst 192.0.2.2 proto esp spi 0xc0de0001",
    "delete an SA": "ip xfrm state delete src 2001:db8::1 dst 2001:db8::2 proto esp spi 0xc0de0002 mark 1",
    "flush SAs": "ip xfrm state flush proto esp",
    "allocate an SPI": (
        "ip xfrm state allocspi src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel reqid 7 "
        "min 0x1000 max 0x2000"
    ),
    "tunnel policy": (
        "ip xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/24 proto tcp sport 80 dport 8080 dir out "
        "priority 1234 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 7 mode tunnel"
    ),
    "optional policy over IPv6": (
        "ip xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir in mark 5 mask 7 if_id 3 "
        "tmpl src 2001:db8::1 dst 2001:db8::2 proto esp reqid 9 mode tunnel level use"
    ),
    "discard": "ip xfrm policy add src ::/0 dst ::/0 proto udp dir fwd action block",
    "delete a policy": "ip xfrm policy delete src 10.1.0.0/16 dst 10.2.0.0/24 proto tcp dir out",
}

# -X raw: constants as numbers; -xx: all text in hexadecimal.
TRACE = ["unshare", "-n", "strace", "-X", "raw", "-xx", "-v", "-s", "8192", "-e", "trace=sendmsg"]


def record(command: str) -> bytes:
    """Return the first XFRM request (0x10 to 0x29) among what `command` sends."""
    trace = subprocess.run(
        [*TRACE, *command.split()],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    header = r"nlmsg_len=(\w+), nlmsg_type=(\w+), nlmsg_flags=(\w+), nlmsg_seq=\w+, nlmsg_pid=\w+\}, "
    for found in re.finditer(header + r'"((?:\\x[0-9a-f]{2})*)"', trace):
        length, kind, flags = (int(found[group], 0) for group in (1, 2, 3))
        if 0x10 <= kind < 0x2A:
            octets = bytes.fromhex(found[4].replace("\\x", ""))
            return struct.pack("=IHHII", length, kind, flags, 0, 0) + octets
    sys.exit(f"nothing recorded for {command}\n{trace}")


if __name__ == "__main__":
    recorded = {
        name: {"command": command, "bytes": record(command).hex()} for name, command in COMMANDS.items()
    }
    Path(__file__).with_name("xfrm_requests.json").write_text(json.dumps(recorded, indent=1) + "\n")
