"""``python -m dynablocks``."""

import sys

from dynablocks.cli import main

if __name__ == "__main__":
    sys.exit(main())
