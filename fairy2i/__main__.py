"""`python -m fairy2i` is the `fairy2i` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
