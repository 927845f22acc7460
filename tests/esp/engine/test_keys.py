"""Keys: shown nowhere, copied nowhere, and gone from memory when the engine is closed."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import traceback

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.engine.engine import EspEngine
from natcompat.ipsec import Direction, Encr, Integ
from tests.support.esp import inner, keys, name, only, policy, sa

pytestmark = pytest.mark.usefixtures("datapath")


def test_keys_are_shown_nowhere() -> None:
    """Not in errors, not in the text of what the engine hands out."""
    secret = b"swordfish-swordfish!"
    with EspEngine(timer=False) as engine:
        engine.add_policy(policy(Direction.OUT))
        sa_id = engine.add_sa(sa(Direction.OUT, encryption_key=secret))
        texts = [repr(engine.list_sas()), repr(engine.get_sa(sa_id)), repr(vars(engine)), repr(sa_id)]
        association = engine._find(sa_id)
        texts += [repr(association), repr(getattr(association, "cipher", None))]
        twice = sa(Direction.OUT, encryption_key=secret)
        unknown = sa(
            Direction.IN, **{**keys(Encr.AES_CBC, Integ.AES_XCBC_96), "encryption_key": secret + secret[:12]}
        )
        for refused in (twice, unknown):
            with pytest.raises(NatCompatError) as caught:
                engine.add_sa(refused)
            trace = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
            texts += [
                str(frame.locals)
                for frame in trace.stack
                if os.path.join("natcompat", "esp") in frame.filename
            ]
            texts.append(str(caught.value))
    assert len(texts) > 10
    assert "sa" in "".join(texts)
    assert not any("swordfish" in text for text in texts)


@pytest.mark.parametrize("key", ["swordfish-swordfish!", list(b"swordfish-swordfish!")], ids=["str", "list"])
def test_keys_of_the_wrong_type_are_in_no_local_variable(key: object) -> None:
    with pytest.raises(TypeError, match="bytes are wanted") as caught:
        sa(Direction.OUT, encryption_key=key)
    trace = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    ours = [frame for frame in trace.stack if os.path.join("natcompat", "ipsec") in frame.filename]
    assert len(ours) == 2
    assert not any("sword" in str(frame.locals) or "115, 119" in str(frame.locals) for frame in ours)


def test_engines_and_installed_sas_are_neither_copied_nor_pickled() -> None:
    with EspEngine(timer=False) as engine:
        association = engine._find(engine.add_sa(sa(Direction.OUT)))
        for secret in (engine, association):
            for copies in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="copied"):
                    copies(secret)


SEARCH = """
import re, sys
pid, inverted = int(sys.argv[1]), bytes.fromhex(sys.argv[2])
wanted, found = bytes(octet ^ 255 for octet in inverted), 0
with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
    for line in maps:
        first, last, access = re.match(r"(\\w+)-(\\w+) (\\S+)", line).groups()
        if access.startswith("rw"):
            try:
                memory.seek(int(first, 16))
                found += memory.read(int(last, 16) - int(first, 16)).count(wanted)
            except OSError:
                pass
print(found)
"""


def occurrences(inverted: bytes) -> int:
    """Return how often another process finds the complement of `inverted` in the memory of this one."""
    searched = subprocess.run(
        [sys.executable, "-c", SEARCH, str(os.getpid()), inverted.hex()],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(searched.stdout)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs /proc/PID/mem, and root")
@pytest.mark.parametrize(
    "transforms",
    [
        (Encr.AES_GCM_16, Integ.NONE),
        (Encr.AES_GCM_8, Integ.NONE),
        (Encr.CHACHA20_POLY1305, Integ.NONE),
        (Encr.AES_CCM_16, Integ.NONE),
        (Encr.AES_CBC, Integ.HMAC_SHA2_256_128),
        (Encr.AES_CTR, Integ.HMAC_SHA1_96),
    ],
    ids=name,
)
def test_keys_are_gone_from_memory_after_close(transforms: tuple[Encr, Integ]) -> None:
    """Searched for by another process. Here the key is only where the SA has it, and inverted."""
    arguments = keys(*transforms)
    inverted = os.urandom(len(arguments["encryption_key"]))
    size = len(inverted) - transforms[0].salt_length
    with EspEngine(timer=False) as engine, EspEngine(timer=False) as peer:
        for direction, end in ((Direction.OUT, engine), (Direction.IN, peer)):
            key = bytearray(octet ^ 255 for octet in inverted)
            end.add_sa(sa(direction, **{**arguments, "encryption_key": key}))
            key[:] = bytes(len(key))
        engine.add_policy(policy(Direction.OUT))
        for _ in range(20):
            peer.open(only(engine.seal(inner()))[0], ("192.0.2.2", 4500))
        assert occurrences(inverted[:size]) > 0, "the search finds what is there"
    gc.collect()
    assert occurrences(inverted[:size]) == 0
