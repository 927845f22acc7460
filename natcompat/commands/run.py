"""Run a Python program that knows the option from Solaris.

``python -m natcompat.commands.run script.py [argument...]`` runs a file,
``python -m natcompat.commands.run -m module [argument...]`` a module. Every socket of the program answers
``setsockopt(IPPROTO_UDP, 0x0103, ...)``; NATCOMPAT_BACKEND chooses who does the work.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from natcompat.endpoint.solaris_option import install


def main() -> int:
    """Run what the command line names; exits as it exits."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    install()
    if arguments[0] == "-m":
        if len(arguments) < 2:
            print("natcompat.commands.run: -m needs the name of a module", file=sys.stderr)
            return 2
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return 0
    script = Path(arguments[0])
    if not script.is_file():
        print(f"natcompat.commands.run: there is no file {script}", file=sys.stderr)
        return 2
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)  # as for `python script.py`
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
