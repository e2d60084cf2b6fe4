"""``python -m hijack`` is the command line."""

import sys

from hijack.cli import main

if __name__ == "__main__":
    sys.exit(main())
