"""`python -m reallm`: run the command `reallm` without an installed script."""

import sys

from reallm.cli import main

if __name__ == "__main__":
    sys.exit(main())
