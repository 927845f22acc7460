"""Endpoints on event loops."""

from __future__ import annotations

import asyncio
import warnings


def warn_of_bypassing_loop() -> None:
    """Warn if the running event loop reads descriptors behind Python's back."""
    loop = asyncio._get_running_loop()
    if loop is not None and type(loop).__module__.partition(".")[0] == "uvloop":
        warnings.warn(
            "uvloop's datagram transports read the descriptor without this socket object, so that the "
            "application would see the non-ESP marker: use natcompat.aio.create_nat_t_endpoint()",
            RuntimeWarning,
            stacklevel=3,
        )
