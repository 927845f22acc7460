"""The parts of an IKE daemon beside its messages: NAT detection, keys, selectors, CHILD_SAs. No I/O.

`NatDetection` compares the hashes of NAT detection, `split_keymat` divides KEYMAT, `IkeSelector` and
`policy_selectors` turn negotiated ranges into selectors of policies, `ChildSa` installs, rekeys, moves and
deletes two SAs with their policies in any `natcompat.ipsec.IPsec`. `natcompat.ike.ikev1` has the numbers
of IKEv1.
"""

from natcompat.contract import Verdict
from natcompat.ike.child import ChildSa, OuterAddress
from natcompat.ike.keymat import ChildKeys, keymat_length, split_keymat
from natcompat.ike.marker import add_marker, split_marker
from natcompat.ike.nat import IkeAddress, NatDetection, nat_detection_hash
from natcompat.ike.selectors import IkeSelector, policy_selectors, selector_pairs

__all__ = [
    "ChildKeys",
    "ChildSa",
    "IkeAddress",
    "IkeSelector",
    "NatDetection",
    "OuterAddress",
    "Verdict",
    "add_marker",
    "keymat_length",
    "nat_detection_hash",
    "policy_selectors",
    "selector_pairs",
    "split_keymat",
    "split_marker",
]
