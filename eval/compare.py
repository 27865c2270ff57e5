"""Compare models or methods in one table and a picture: the command `fairy2i eval compare` as a script.

    python eval/compare.py --models MODEL outputs/my-w2-packed --output_folder outputs/comparison

`--help` shows all there is.
"""

import sys

from fairy2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "compare", *sys.argv[1:]]))
