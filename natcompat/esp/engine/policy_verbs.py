"""The verbs of `natcompat.ipsec.IPsec` for policies, on the databases of an engine."""

from __future__ import annotations

import errno
import time

from natcompat.errors import NatCompatError
from natcompat.esp.engine.databases import PolicyEntry
from natcompat.esp.engine.state import EngineState
from natcompat.ipsec import Policy, PolicyUsage


class PolicyVerbs(EngineState):
    """Adds, lists and deletes policies."""

    def add_policy(self, policy: Policy, *, replace: bool = False) -> None:
        """Install `policy`. EEXIST: there is one with this selector and direction.

        With `replace` it takes the place of that one; packets meet either the one or the other.
        """
        if policy.kernel_services:
            names = " and ".join(policy.kernel_services)
            raise NatCompatError(
                errno.EOPNOTSUPP,
                f"the ESP of this process has no {names}: only a kernel does that",
                f"Leave {names} away, or use the linux backend",
            )
        with self._usable():
            if self._policies.get(policy) is not None and not replace:
                raise NatCompatError(
                    errno.EEXIST,
                    f"there is a policy for {policy.selector} ({policy.direction.value})",
                    "Delete it first, or add this one with replace=True",
                )
            self._policies.add(policy, time.time())
            self._path.forget()

    def get_policy(self, policy: Policy) -> PolicyUsage:
        """Return the installed policy with the selector and direction of `policy`. ESRCH: there is none."""
        with self._usable():
            return _policy_usage(self._policy(policy))

    def delete_policy(self, policy: Policy) -> None:
        """Remove the policy with the selector and direction of `policy`. ESRCH: there is none."""
        with self._usable():
            self._policies.remove(self._policy(policy))
            self._path.forget()

    def flush_policies(self, *, reqid: int | None = None) -> None:
        """Remove every policy of this engine; with `reqid`, those that have it."""
        with self._usable():
            for entry in self._policies:
                if reqid in (None, entry.policy.reqid):
                    self._policies.remove(entry)
            self._path.forget()

    def list_policies(self) -> list[PolicyUsage]:
        """Return every policy."""
        with self._usable():
            return [_policy_usage(entry) for entry in self._policies]

    def _policy(self, policy: Policy) -> PolicyEntry:
        entry = self._policies.get(policy)
        if entry is None:
            raise NatCompatError(errno.ESRCH, "there is no policy with this selector and direction")
        return entry


def _policy_usage(entry: PolicyEntry) -> PolicyUsage:
    return PolicyUsage(policy=entry.policy, added=entry.added, last_used=entry.when_used())
