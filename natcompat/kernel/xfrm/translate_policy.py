"""Between the policies of `natcompat.ipsec` and the messages of XFRM, both ways."""

from __future__ import annotations

import errno
import socket
from typing import Any

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Action,
    Direction,
    Mark,
    Mode,
    Policy,
    PolicyUsage,
)
from natcompat.ipsec.policies import default_priority
from natcompat.kernel.xfrm import messages
from natcompat.kernel.xfrm.netlink import failure
from natcompat.kernel.xfrm.offload import XFRM_OFFLOAD_PACKET, offload_fields, offload_of
from natcompat.kernel.xfrm.readback import decode
from natcompat.kernel.xfrm.translate import (
    KERNEL_DIRECTIONS,
    address_of,
    family_of,
    lifetime_fields,
    octets,
    selector_fields,
    selector_of,
)


def kernel_directions(policy: Policy) -> tuple[int, ...]:
    """Return the kernel's directions of `policy`: what comes in may be for this host or be forwarded."""
    if policy.direction is Direction.OUT:
        return (messages.XFRM_POLICY_OUT,)
    if policy.action is Action.PROTECT and policy.mode is Mode.TRANSPORT:
        return (messages.XFRM_POLICY_IN,)
    return (messages.XFRM_POLICY_IN, messages.XFRM_POLICY_FWD)


def encode_policy(policy: Policy, direction: int) -> bytearray:
    """Return the message that installs `policy` in the kernel's `direction` (XFRM_MSG_NEWPOLICY)."""
    message = messages.xfrm_userpolicy_info()
    discard = policy.action is Action.DISCARD
    message.update(
        {
            **selector_fields(policy.selector, "sel_"),
            **lifetime_fields(None),
            "priority": default_priority(policy.selector) if policy.priority is None else policy.priority,
            "dir": direction,
            "action": messages.XFRM_POLICY_BLOCK if discard else messages.XFRM_POLICY_ALLOW,
        }
    )
    attrs: list[tuple[str, Any]] = []
    if policy.action is Action.PROTECT:
        outer = policy.destination or policy.selector.destination.network_address
        template = {
            "id_daddr": tuple(octets(policy.destination)),
            "id_proto": socket.IPPROTO_ESP,
            "family": family_of(outer),
            "saddr": tuple(octets(policy.source)),
            "reqid": policy.reqid,
            "mode": messages.XFRM_MODE_TUNNEL if policy.mode is Mode.TUNNEL else messages.XFRM_MODE_TRANSPORT,
            "optional": int(policy.optional),
            "aalgos": 0xFFFF_FFFF,
            "ealgos": 0xFFFF_FFFF,
            "calgos": 0xFFFF_FFFF,
        }
        attrs.append(("XFRMA_TMPL", [template]))
    if policy.mark is not None:
        attrs.append(("XFRMA_MARK", {"v": policy.mark.value, "m": policy.mark.mask}))
    if policy.interface_id is not None:
        attrs.append(("XFRMA_IF_ID", policy.interface_id))
    if policy.hw_offload is not None and direction != messages.XFRM_POLICY_FWD:
        index, _ = offload_fields(policy.hw_offload, policy.direction)
        attrs.append(("XFRMA_OFFLOAD_DEV", {"ifindex": index, "flags": XFRM_OFFLOAD_PACKET}))
    message["attrs"] = attrs
    message.encode()
    return bytearray(message.data)


def encode_policy_id(policy: Policy, direction: int) -> bytearray:
    """Return the message that names a policy (XFRM_MSG_GETPOLICY, XFRM_MSG_DELPOLICY)."""
    message = messages.xfrm_userpolicy_id()
    message.update({**selector_fields(policy.selector, "sel_"), "dir": direction})
    attrs: list[tuple[str, Any]] = []
    if policy.mark is not None:
        attrs.append(("XFRMA_MARK", {"v": policy.mark.value, "m": policy.mark.mask}))
    if policy.interface_id is not None:
        attrs.append(("XFRMA_IF_ID", policy.interface_id))
    message["attrs"] = attrs
    message.encode()
    return bytearray(message.data)


def policy_of(message: Any) -> Policy:
    """Return the policy in an xfrm_userpolicy_info; NatCompatError for what natcompat has no words for."""
    templates = message.get_attr("XFRMA_TMPL") or []
    direction = {number: name for name, number in KERNEL_DIRECTIONS.items()}.get(message["dir"])
    if len(templates) > 1 or direction is None or any(template["id_proto"] != 50 for template in templates):
        raise NatCompatError(errno.EPROTONOSUPPORT, "The policy is not one that natcompat installs")
    action = Action.PROTECT if templates else Action.BYPASS
    if message["action"] == messages.XFRM_POLICY_BLOCK:
        action = Action.DISCARD
    mark = message.get_attr("XFRMA_MARK")
    template = templates[0] if templates else None
    tunnel = template is not None and template["mode"] == messages.XFRM_MODE_TUNNEL
    return Policy(
        direction=direction,
        selector=selector_of(message),
        source=address_of(template["saddr"], template["family"]) if template and tunnel else None,
        destination=address_of(template["id_daddr"], template["family"]) if template and tunnel else None,
        mode=Mode.TRANSPORT if template and not tunnel else Mode.TUNNEL,
        reqid=template["reqid"] if template else 0,
        action=action,
        priority=message["priority"],
        optional=bool(template and template["optional"]),
        mark=Mark(value=mark["v"], mask=mark["m"]) if mark else None,
        interface_id=message.get_attr("XFRMA_IF_ID") or None,
        hw_offload=offload_of(message),
    )


def no_policy(error: NatCompatError) -> NatCompatError:
    """Say ESRCH for a policy that is not there, as for an SA; the kernel says ENOENT."""
    if error.errno != errno.ENOENT:
        return error
    return failure((error.strerror or "").split(":")[0], errno.ESRCH, "there is no such policy")


def policy_usage_of(answer: bytes) -> PolicyUsage:
    """Return the policy in a message that starts with an xfrm_userpolicy_info, and its usage."""
    message = decode(messages.xfrm_userpolicy_info, answer)
    last_used = float(message["curlft_use_time"])
    return PolicyUsage(
        policy=policy_of(message), added=float(message["curlft_add_time"]), last_used=last_used or None
    )
