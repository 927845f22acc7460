"""The single steps of `ChildSa`: verbs that can be undone, and deletions that may find nothing."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from functools import partial

from natcompat.errors import NatCompatError, get_logger, printable
from natcompat.ipsec import IPsec, Policy

_log = get_logger()


def add_policy(ipsec: IPsec, policy: Policy, may_replace: bool, undo: contextlib.ExitStack) -> None:
    """Install `policy`, and note in `undo` how to get back to what was there before."""
    before: Policy | None = None
    if may_replace:
        try:
            before = ipsec.get_policy(policy).policy
        except NatCompatError as error:
            if error.errno != errno.ESRCH:
                raise
    ipsec.add_policy(policy, replace=may_replace)
    if before is None:
        undo.callback(undo_quietly, ipsec.delete_policy, policy)
    else:
        undo.callback(undo_quietly, partial(ipsec.add_policy, before, replace=True))


def undo_quietly(verb: Callable[..., object], *arguments: object) -> None:
    """Call `verb` while another error is on its way to the caller; an error of `verb` itself is logged."""
    try:
        verb(*arguments)
    except OSError as error:
        _log.warning("a CHILD_SA could not be undone whole: %s", printable(error))


def failure_of(verb: Callable[[], object]) -> OSError | None:
    """Call `verb`, a deletion, and return its error. That there was nothing to delete is none."""
    try:
        delete_present(verb)
    except OSError as error:
        return error
    return None


def delete_present(verb: Callable[..., object], *arguments: object) -> None:
    """Call `verb`, a deletion; that there was nothing to delete is no error."""
    try:
        verb(*arguments)
    except NatCompatError as error:
        if error.errno != errno.ESRCH:
            raise
