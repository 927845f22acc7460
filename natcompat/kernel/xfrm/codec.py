"""The classes of pyroute2 that encode and decode netlink messages, with the types that pyroute2 lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from natcompat.kernel.xfrm.layouts import Fields

__all__ = ["nla", "nlmsg"]

if TYPE_CHECKING:

    class nla(dict[str, Any]):
        """A netlink attribute, or a structure in one. Only the methods that natcompat calls."""

        data: bytearray
        fields: Fields
        offset: int
        length: int

        def __init__(self, data: bytes | bytearray | None = None) -> None: ...
        def encode(self) -> None: ...
        def decode(self) -> None: ...
        def encode_field(self, fmt: str, data: bytearray, offset: int, value: Any) -> int: ...
        def decode_field(self, fmt: str, data: bytearray, offset: int) -> tuple[Any, int]: ...
        def get_attr(self, name: str) -> Any: ...

    class nlmsg(nla):
        """A netlink message."""

else:
    from pyroute2.netlink import nla, nlmsg
