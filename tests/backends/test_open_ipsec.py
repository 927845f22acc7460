"""The options of `natcompat.open_ipsec`, on backends whose ESP is the kernel's and on others."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from natcompat import open_ipsec
from natcompat.backends.base import Viability
from natcompat.backends.userspace import UserspaceBackend
from natcompat.errors import NatCompatError


class RecordingBackend(UserspaceBackend):
    """A third party's backend that records the options with which its SAD is opened."""

    def __init__(self, own_esp: object) -> None:
        super().__init__(in_line=True)
        self.name = "recording"
        self.own_esp = own_esp  # type: ignore[assignment]
        self.options: dict[str, Any] = {}

    def viability(self) -> Viability:
        return Viability(self.name, True)

    def open_ipsec(self, **options: Any) -> Any:
        self.options = options


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tun"},
        {"device": "queue"},
        {"netns": "blue"},
        {"netns": 5, "lockdown": True},
        {"follow_mapping": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_a_backend_whose_esp_is_the_kernels_refuses_options_of_esp_in_this_process(
    options: dict[str, Any],
) -> None:
    backend = RecordingBackend(own_esp=None)
    with pytest.raises(NatCompatError) as raised:
        open_ipsec(backend, **options)
    assert raised.value.errno == errno.EINVAL
    for name in options.keys() - {"lockdown"}:
        assert name in str(raised.value)
    assert "Ask for the backend userspace" in raised.value.remedy
    assert ("setns" in raised.value.remedy) == ("netns" in options)


def test_a_backend_whose_esp_is_the_kernels_takes_lockdown_since_its_policies_outlive_the_process() -> None:
    backend = RecordingBackend(own_esp=None)
    open_ipsec(backend, lockdown=True)
    assert backend.options == {}


def test_esp_in_this_process_gets_every_option_that_is_not_the_default() -> None:
    backend = RecordingBackend(own_esp=object())
    open_ipsec(backend)
    assert backend.options == {}
    given = {"device": "tun", "netns": "/run/netns/blue", "lockdown": True, "follow_mapping": True}
    open_ipsec(backend, **given)  # type: ignore[call-overload]
    assert backend.options == given
