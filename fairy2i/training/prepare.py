"""`fairy2i prepare`, which is train/prepare_data.py: texts to token shards."""

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from .shards import MANIFEST, SHARD_TOKENS, prepare
from .sources import read_sources

logger = logging.getLogger(__name__)

DESCRIPTION = """Tokenize texts once, into shards that training reads at random.

Run again, the same command goes on where it was stopped; on a finished folder it checks every shard and writes damaged
ones anew. Text sources are a file, folder, glob or URL (text, JSONL, parquet, also compressed), a Hub data set (id or
id:config), or a YAML table that mixes several of them by weight."""

EPILOG = """examples:
  fairy2i prepare --data my_texts/ --tokenizer MODEL --output shards/mine
  fairy2i prepare --data configs/data/redpajama_1t.yaml --tokenizer MODEL --output shards/redpajama --tokens 1e9
  fairy2i train --data shards/mine --model MODEL ..."""


def _count(text: str) -> int:
    number = float(text)
    if number != int(number) or number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(number)


def build_parser(default_data: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; with ``default_data``, --data may be left out."""
    parser = argparse.ArgumentParser(
        prog="fairy2i prepare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", default=default_data, required=default_data is None, help="where the text comes from")
    add("--tokenizer", required=True, help="folder or Hub id of the model, or of its tokenizer")
    add("--output", required=True, help="folder of the shards")
    add("--tokens", type=_count, help="tokens in all, as 1e9 (default: those of the table, or all there are)")
    add("--seed", type=int, default=0, help="draws files and documents where not all are used (default %(default)s)")
    add("--skip", nargs="+", default=[], metavar="SUBSET", help="subsets of the table to leave out")
    add("--split", default="train", help="split of a Hub data set (default %(default)s)")
    add("--text_column", default="text", help="column that holds the text (default %(default)s)")
    add("--shard_tokens", type=_count, default=SHARD_TOKENS, help="tokens in a shard (default %(default)s)")
    add("--num_proc", type=_count, help="threads that tokenize (default: all cores)")
    return parser


def main(argv: Sequence[str], default_data: str | None = None) -> dict[str, Any]:
    """Prepare as the command line says; return the manifest.

    Raises:
        ValueError, OSError: an argument is wrong, a source cannot be read, or the disk is full.
    """
    args = build_parser(default_data).parse_args(argv)
    if args.num_proc:
        os.environ["RAYON_NUM_THREADS"] = str(args.num_proc)  # read when the first text is tokenized
    subsets, tokens, _ = read_sources(args.data, split=args.split, text_column=args.text_column, skip=args.skip)
    tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(args.tokenizer))
    manifest = prepare(
        subsets,
        tokenizer,
        args.output,
        tokens=args.tokens or tokens,
        seed=args.seed,
        shard_tokens=args.shard_tokens,
        tokenizer_name=args.tokenizer,
    )
    total = f"{manifest['tokens']:,} tokens of {manifest['documents']:,} documents in {len(manifest['shards'])} shards"
    logger.info("%s; %s", total, os.path.join(args.output, MANIFEST))
    return manifest
