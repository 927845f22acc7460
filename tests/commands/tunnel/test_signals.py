"""Signals that come at the worst moment."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading

import pytest

from natcompat.commands.tunnel.signals import Ended, EndingSignals
from tests.support.linux import isolated

if not hasattr(signal, "setitimer"):
    pytest.skip("needs SIGALRM", allow_module_level=True)


@isolated()
def test_a_write_that_a_signal_came_just_before() -> None:
    """Its handler has run, and the write waits all the same: nothing has interrupted it."""
    near, far = socket.socketpair()
    with near, far, EndingSignals() as signals:
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(4096), socket.MSG_DONTWAIT)
        late = threading.Timer(0.2, lambda: setattr(signals, "number", signal.SIGTERM))
        late.start()
        with pytest.raises(Ended), signals.writing():
            os.write(near.fileno(), bytes(4096))
        late.join()


@isolated()
def test_a_handler_that_has_not_run_yet() -> None:
    """What waits for `fileno` is woken by the signal itself."""
    with EndingSignals() as signals:
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # as if its turn never came
        os.kill(os.getpid(), signal.SIGTERM)
        assert select.select([signals], [], [], 5)[0] == [signals]
        signals.rest()
        assert select.select([signals], [], [], 0)[0] == []
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
    assert signal.set_wakeup_fd(-1) == -1
