"""The anti-replay window of one inbound SA (RFC 4303, 3.4.3; RFC 6479; RFC 4303, appendix A)."""

from __future__ import annotations

from natcompat.esp.engine.results import Reason

_HALF = 1 << 31


class ReplayWindow:
    """The record of received sequence numbers: the last `size` of them, up to the highest, `top`.

    The shape of RFC 6479: a ring of blocks that is never shifted, one block larger than the window.
    `check` before the packet is authenticated and changes nothing; `commit` afterwards. The caller
    holds the lock of the SA over both. Sequence numbers are whole ones: 64 bits with ESN.
    """

    __slots__ = ("_blocks", "_mask", "size", "top")

    def __init__(self, size: int, top: int = 0) -> None:
        """Make a window of `size` packets (0: everything passes), with all up to `top` received."""
        self.size: int = size
        self.top: int = top
        blocks = 1
        while blocks * 8 < size + 8:
            blocks *= 2
        self._blocks = bytearray(blocks if size else 0)
        self._mask = blocks - 1
        if size and top:
            self._blocks[:] = b"\xff" * blocks
            self._blocks[(top >> 3) & self._mask] = (2 << (top & 7)) - 1

    def infer(self, low: int) -> int:
        """Return the 64-bit sequence number whose lower half is `low` (RFC 4303, A2.2).

        Without anti-replay there is no window to go by, and the nearest number is taken.
        Negative: one from before the first, or behind the last.
        """
        top_low = self.top & 0xFFFF_FFFF
        high = self.top >> 32
        bottom = top_low - (self.size or _HALF) + 1
        if bottom >= 0:  # case A: the window lies within one subspace
            if low < bottom:
                high += 1
                if high >> 32:
                    return -1
        elif low >= bottom + 0x1_0000_0000:  # case B: it spans two
            high -= 1
        return (high << 32) + low

    def check(self, sequence: int) -> Reason | None:
        """Return why `sequence` cannot be taken, or None."""
        if not self.size:
            return None if sequence >= 0 else Reason.TOO_OLD
        if sequence > self.top:
            return None
        if sequence == 0:
            return Reason.REPLAYED  # the first packet has number 1
        if sequence + self.size <= self.top or sequence < 0:
            return Reason.TOO_OLD
        seen = self._blocks[(sequence >> 3) & self._mask] >> (sequence & 7) & 1
        return Reason.REPLAYED if seen else None

    def commit(self, sequence: int) -> None:
        """Take `sequence`, which `check` has passed and whose packet is authentic."""
        top = self.top
        if not self.size:
            self.top = max(top, sequence)
            return
        block = sequence >> 3
        if sequence > top:
            if block != top >> 3:
                self._clear(top >> 3, block)
            self.top = sequence
        self._blocks[block & self._mask] |= 1 << (sequence & 7)

    def _clear(self, last: int, newest: int) -> None:
        """Make room for the blocks behind `last`, up to `newest`."""
        blocks, mask = self._blocks, self._mask
        if newest - last > mask:
            blocks[:] = bytes(len(blocks))
        else:
            for block in range(last + 1, newest + 1):
                blocks[block & mask] = 0
