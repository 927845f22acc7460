"""The command ``natcompat``: finds the subcommand, and ends as commands of Unix end."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any, Final, NoReturn

import click

from natcompat import __version__
from natcompat.commands.report import complain
from natcompat.commands.run import PythonProgram
from natcompat.errors import printable

_COMMANDS: Final = {
    # name: the place of its click command, imported when it runs or when help lists it
    "doctor": "natcompat.commands.doctor.command:command",
    "verify": "natcompat.commands.verify.command:command",
    "tunnel": "natcompat.commands.tunnel.command:command",
    "sad": "natcompat.commands.ipsec.databases:sad",
    "spd": "natcompat.commands.ipsec.databases:spd",
    "events": "natcompat.commands.ipsec.events:events",
    "top": "natcompat.commands.ipsec.top:top",
    "run": "natcompat.commands.run:command",
}

_INTERRUPTED: Final = 128 + signal.SIGINT
_PIPE_CLOSED: Final = 128 + 13  # SIGPIPE, which Windows does not name


class _Commands(click.Group):
    """The subcommands of the table above."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            result = super().invoke(context)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except BrokenPipeError:  # here, since click would make it an error
            _forget_output()
            raise click.exceptions.Exit(_PIPE_CLOSED) from None


@click.command(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, message="natcompat %(version)s")
def natcompat() -> None:
    """The Solaris socket option UDP_NAT_T_ENDPOINT on every operating system.

    An IKE daemon shares UDP port 4500 with ESP and NAT-keepalives (RFC 3948). With the option a socket
    delivers IKE alone: keepalives and runts are dropped, ESP goes to IPsec, and the non-ESP marker is
    stripped and inserted. natcompat is a library for that. This command reports what the library can do
    on this machine, proves it on real sockets, and shows and runs IPsec.

    \b
    Environment:
      NATCOMPAT_BACKEND   the backend to use instead of the automatic choice, or a
                          comma-separated order of preference (auto, linux, userspace, ...)
      NATCOMPAT_DATAPATH  what carries ESP in this process: auto, c, python
      NATCOMPAT_IPSEC     on Linux, how to reach the kernel's IPsec: auto, xfrm, pfkey
      NATCOMPAT_OFFLOADS  which offloads the data path may use: a list, none, or names
                          with a minus (natcompat doctor names them)
      NATCOMPAT_CONTROL   none: user-space IPsec shows itself to no natcompat sad, spd,
                          events, top and tunnel status
      NO_COLOR            if set, no colours on a terminal

    \b
    Exit status:
      0    success
      1    failure; the last line says why and what to do
      2    the command line is wrong
      130  interrupted by Ctrl-C
      141  the reader of the output went away
      143  ended by SIGTERM

    \b
    Examples:
      natcompat doctor                      what works here, and what would help
      natcompat verify                      prove it on real sockets
      natcompat tunnel tunnel.toml          a tunnel with manual keys
      natcompat run daemon.py               run a program that sets the option itself
    """


def main() -> NoReturn:
    """Run the command line, and exit."""
    _end_by_sigterm()
    status: int = 1
    result: Any = None
    try:
        try:
            result = natcompat.main(prog_name="natcompat", standalone_mode=False)
            status = result if isinstance(result, int) else 0
        except click.UsageError as error:
            click.UsageError(printable(error.format_message()), error.ctx).show()
            status = error.exit_code
        except click.ClickException as error:
            complain(error.message)
            status = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        status = _INTERRUPTED
    except OSError as error:
        _forget_output()
        remedy = getattr(error, "remedy", "")  # of a NatCompatError
        sentences = [error.strerror or str(error), remedy] if remedy else [str(error)]
        complain(". ".join(sentence.rstrip(".") for sentence in sentences))
    if isinstance(result, PythonProgram):  # behind the handlers above: its errors are its own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = result.run()
    sys.exit(status)


def _end_by_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that cleanup code runs."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, end)


def _forget_output() -> None:
    """Discard what is still buffered, so that the interpreter does not complain when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        output: Any = sys.stdout
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), output.fileno())
