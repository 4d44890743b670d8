"""`python -m peftkit` is the command `peftkit`."""

import sys

from peftkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
