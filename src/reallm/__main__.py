"""`python -m reallm`: the command `reallm` where no script is on the path."""

import sys

from reallm.cli import main

if __name__ == "__main__":
    sys.exit(main())
