"""Token blocks straight from the sources, without preparing them: quick to start, and less exact than shards.

Documents are shuffled in a buffer, a batch of them at a time is tokenized and cut into blocks, and the blocks of
several subsets are mixed by weight. What is left of a batch after its last whole block is dropped. All of it is an
IterableDataset of ``datasets``, of which the Trainer lets one process read and hands each rank its own batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .data import TokenBlocks, encode_documents, require_eos
from .shards import is_prepared
from .sources import Subset, is_table


def check_source(data: str, streaming: bool, max_steps: int) -> None:
    """Refuse what can only be streamed where it is not, and the other way round.

    Raises:
        ValueError: says what to do instead.
    """
    if streaming and max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: nobody knows how long the text is before it is read")
    if streaming and is_prepared(data):
        raise ValueError(f"{data} is prepared already; leave out --streaming")
    if not streaming and is_table(data):
        raise ValueError(f"{data} is a table of subsets; `fairy2i prepare` it first, or add --streaming")


def stream_blocks(
    subsets: Sequence[Subset],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    seed: int = 0,
    buffer: int = 10_000,
    batch: int = 1000,
) -> datasets.IterableDataset:
    """Return the blocks of documents that are read while training goes on, in an order that the seed draws.

    Args:
        subsets: sources; blocks are drawn from them in proportion to their weights. One that is at its end begins
            again, until all have been there.
        tokenizer: must have an EOS token.
        block_size: tokens in a block.
        seed: draws the order of files, of documents and of subsets, and documents where ``keep`` is below 1.
        buffer: documents among which the next one is drawn.
        batch: documents that are joined and cut together; the rest of each batch is dropped.

    Returns:
        Items as of :class:`TokenBlocks`: ``input_ids`` and ``labels``.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    eos = require_eos(tokenizer)

    def cut(rows: dict[str, list[str]]) -> dict[str, list[NDArray[np.int64]]]:
        tokens = np.concatenate([np.array(ids) for ids in encode_documents(tokenizer, rows["text"])])
        cuts = TokenBlocks(tokens, block_size, eos) if len(tokens) >= block_size else None
        blocks = [cuts[i] for i in range(len(cuts))] if cuts else []
        return {name: [block[name].numpy() for block in blocks] for name in ("input_ids", "labels")}

    columns = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels")})
    parts = []
    for subset in subsets:
        pieces = [replace(subset, pieces=(piece,)) for piece in subset.pieces]
        rows = datasets.IterableDataset.from_generator(_texts, gen_kwargs={"pieces": pieces, "seed": seed})
        rows = rows.shuffle(seed, buffer_size=buffer)
        parts.append(rows.map(cut, batched=True, batch_size=batch, remove_columns=["text"], features=columns))
    if len(parts) == 1:
        return parts[0].with_format("torch")
    shares = np.array([subset.weight for subset in subsets]) / sum(subset.weight for subset in subsets)
    mixed = datasets.interleave_datasets(parts, shares.tolist(), seed, stopping_strategy="all_exhausted")
    return mixed.with_format("torch")


def _texts(pieces: Sequence[Subset], seed: int) -> Iterator[dict[str, str]]:
    for subset in pieces:
        (piece,) = subset.pieces
        for row, text in enumerate(subset.documents(piece)):
            if text is not None and subset.keeps(seed, piece, row):
                yield {"text": text}
