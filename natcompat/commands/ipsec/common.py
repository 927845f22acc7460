"""The option ``--json`` of the commands that show IPsec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])
as_json: Callable[[_Command], _Command] = click.option(
    "--json",
    "json_output",
    is_flag=True,
    help="Print JSON; natcompat/commands/ipsec/__init__.py documents its keys.",
)
