"""``natcompat run``: runs a Python program that knows the option from Solaris.

``natcompat run script.py [argument...]`` runs a file, ``natcompat run -m module [argument...]`` a module;
``python -m natcompat.commands.run script.py`` does the same. Every socket of the program answers
``setsockopt(IPPROTO_UDP, 0x0103, ...)``. NATCOMPAT_BACKEND chooses the backend that serves these sockets.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from natcompat.commands.report import complain

_USAGE_ERROR = 2


@dataclass(frozen=True, slots=True)
class PythonProgram:
    """A program to run in this process in place of the command."""

    arguments: tuple[str, ...]
    """``script.py argument...`` or ``-m module argument...``."""

    def run(self) -> int:
        """Run the program as the interpreter would; exceptions, SystemExit included, are the program's own.

        Returns 0 at its end, or 2 if there is no such program.
        """
        name = self.arguments[0]
        if name == "-m":
            return self._run_module()
        script = Path(name)
        if not script.is_file():
            complain(f"there is no file {script}")
            return _USAGE_ERROR
        _install()
        sys.argv = list(self.arguments)
        sys.path[0] = str(script.resolve().parent)  # as for `python script.py`
        runpy.run_path(str(script), run_name="__main__")
        return 0

    def _run_module(self) -> int:
        if len(self.arguments) < 2:
            complain("-m needs the name of a module")
            return _USAGE_ERROR
        _install()
        sys.argv = list(self.arguments[1:])
        sys.path[0] = os.getcwd()  # as for `python -m module`
        runpy.run_module(self.arguments[1], run_name="__main__", alter_sys=True)
        return 0


def _install() -> None:
    from natcompat.endpoint.solaris_option import install  # which loads sockets and more

    install()


@click.command(
    "run",
    short_help="Run a Python program that sets the option itself, as on Solaris.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("program", metavar="{script.py | -m module} [ARGUMENT]...", nargs=-1, type=click.UNPROCESSED)
def command(program: Sequence[str]) -> PythonProgram:
    """Run a Python program that sets the option itself, as on Solaris.

    Every socket of the program answers setsockopt(IPPROTO_UDP, UDP_NAT_T_ENDPOINT, ...) and getsockopt as a
    socket on Solaris does: the number of the option is 0x0103. natcompat does the work, by the backend that
    NATCOMPAT_BACKEND names or, without it, by the automatic choice. The program is not changed. It runs in
    this process, under this interpreter, with all that follows its name as its own command line.

    Sockets that a library makes in C are out of reach, as are child processes that run other programs.

    \b
    Exit status:
      that of the program; 1 after an uncaught exception
      2  the command line is wrong, or there is no such file

    \b
    Examples:
      natcompat run daemon.py --port 4500
      natcompat run -m mydaemon --verbose
      NATCOMPAT_BACKEND=userspace natcompat run daemon.py
    """
    if not program:
        raise click.UsageError("Missing the program: a script, or -m and the name of a module.")
    return PythonProgram(tuple(program))


def main() -> int:
    """Run what the command line of ``python -m natcompat.commands.run`` names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else _USAGE_ERROR
    return PythonProgram(tuple(arguments)).run()


if __name__ == "__main__":
    sys.exit(main())
