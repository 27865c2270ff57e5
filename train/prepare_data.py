"""Tokenize texts into shards for training: the command `fairy2i prepare` as a script.

    python train/prepare_data.py --tokenizer MODEL --output shards/redpajama            # RedPajama, 100 B tokens
    python train/prepare_data.py --data my_texts/ --tokenizer MODEL --output shards/mine

`--help` shows all there is.
"""

import sys
from pathlib import Path

from fairy2i.cli import main

DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "data" / "redpajama_1t.yaml"

if __name__ == "__main__":
    data = [] if "-h" in sys.argv or "--help" in sys.argv else ["--data", str(DEFAULT)]
    sys.exit(main(["prepare", *data, *sys.argv[1:]]))
