"""Token blocks for language modelling, by the rule of the paper.

Documents are tokenized without BOS, each gets an EOS, all are joined and cut into blocks of one length; the rest is
dropped. The label right after an EOS is masked: the first token of a document cannot be told from the one before.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .loss import IGNORE_INDEX

logger = logging.getLogger(__name__)


class Tokens(Protocol):
    """A row of tokens of which slices can be had: an array, a memory map, or shards."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> NDArray[np.integer]: ...


class TokenBlocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Blocks of one length from one long row of tokens, with masked labels.

    Args:
        tokens: (total,), any integer dtype; a memory map or :class:`.shards.ShardedTokens` will do.
        block_size: tokens in a block.
        eos_token_id: token whose successor is not a label.

    Raises:
        ValueError: fewer tokens than one block.
    """

    def __init__(self, tokens: Tokens, block_size: int, eos_token_id: int) -> None:
        if block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {block_size}")
        if len(tokens) < block_size:
            raise ValueError(f"the text has {len(tokens)} tokens, less than one block of {block_size}; give more text")
        self.tokens = tokens
        self.block_size = block_size
        self.eos_token_id = eos_token_id

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels``, int64 (block_size,) each; the model shifts the labels."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.block_size
        ids = torch.from_numpy(self.tokens[start : start + self.block_size].astype(np.int64))
        labels = ids.clone()
        labels[1:][ids[:-1] == self.eos_token_id] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels}


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the EOS token of a tokenizer.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which parts documents; set tokenizer.eos_token and save it")
    return tokenizer.eos_token_id


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text, without BOS and with EOS behind it.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    eos = require_eos(tokenizer)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*ids, eos] for ids in encoded["input_ids"]]


def tokenize_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None
) -> NDArray[np.int32]:
    """Tokenize and join documents, each with EOS behind it.

    Args:
        documents: has a column "text".
        tokenizer: must have an EOS token.
        num_proc: worker processes; None for one.

    Returns:
        int32 (total tokens,), in memory. The result of each document set and tokenizer is cached by ``datasets``.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    require_eos(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": encode_documents(tokenizer, batch["text"])}

    workers = num_proc if num_proc and num_proc > 1 and len(documents) >= 1000 else None
    encoded = documents.map(encode, batched=True, num_proc=workers, remove_columns=["text"], desc="Tokenizing")
    chunks = encoded.with_format("arrow")[:]["input_ids"].chunks  # together they may be too long for 32-bit offsets
    tokens = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32) for chunk in chunks])
    logger.info("%s documents, %s tokens", f"{len(documents):,}", f"{len(tokens):,}")
    return tokens
