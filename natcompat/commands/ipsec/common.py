"""What the commands have in common: the option ``--json``, and how they open IPsec."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    from natcompat.ipsec import IPsec

_Command = TypeVar("_Command", bound=Callable[..., Any])
as_json: Callable[[_Command], _Command] = click.option(
    "--json",
    "json_output",
    is_flag=True,
    help="Print JSON; natcompat/commands/ipsec/__init__.py documents its keys.",
)


def open_ipsec() -> IPsec:
    """Open the IPsec of this machine's kernel: XFRM, or PF_KEY where that is what there is."""
    from natcompat.backends.linux import LinuxBackend
    from natcompat.kernel import pfkey
    from natcompat.kernel.pfkey.examine import dialect_here

    dialect = dialect_here()
    if dialect is None:
        raise click.ClickException(f"natcompat knows no IPsec databases of {sys.platform}")
    return LinuxBackend().open_ipsec() if dialect.name == "linux" else pfkey.open_ipsec(dialect.name)


@contextmanager
def opened() -> Iterator[IPsec]:
    """Open IPsec; say what goes wrong in one sentence and end with status 1."""
    try:
        ipsec = open_ipsec()
        try:
            yield ipsec
        finally:
            ipsec.close()
    except NatCompatError as error:
        raise click.ClickException(f"{error.strerror}. {error.remedy}") from None
