"""``python -m natcompat`` is the command ``natcompat``."""

import sys

from natcompat.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
