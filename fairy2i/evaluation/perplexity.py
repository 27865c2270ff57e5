"""Perplexity under a named protocol.

`gptq`: the whole text is tokenized at once as the tokenizer does by default, cut into windows of equal length that do
not overlap, the rest dropped; in each window all tokens but the first are predicted. This is what GPTQ, QuIP#, QTIP,
AQLM and EfficientQAT report. A number without its window length means nothing: LLaMA-2-7B has 6.97 on C4 at 2048
tokens and 6.63 at 4096.
"""

import hashlib
import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import Tensor, nn
from tqdm import tqdm

from ..loading import read_documents

logger = logging.getLogger(__name__)

PROTOCOL = "gptq"


@dataclass(frozen=True)
class EvalText:
    """A text to measure on: its name, the text, and what it was made of."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class PerplexityResult:
    """One measurement.

    Attributes:
        perplexity: exp of ``nll``.
        nll: mean negative log-likelihood of the predicted tokens, in nats.
        standard_error: of ``nll``, from the spread between windows; None for a single window.
        tokens, windows: how many tokens were predicted, in how many windows.
        window: tokens in a window.
        protocol: name of the protocol.
    """

    perplexity: float
    nll: float
    standard_error: float | None
    tokens: int
    windows: int
    window: int
    protocol: str = PROTOCOL

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)


def _wikitext2() -> str:
    return "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])


def _c4() -> str:
    shard = "en/c4-validation.00000-of-00008.json.gz"  # the first 1,100 documents of it, as GPTQ's script takes
    documents = load_dataset("allenai/c4", data_files={"validation": shard}, split="validation")
    return " ".join(documents[:1100]["text"])


NAMED_TEXTS = {"wikitext2": _wikitext2, "c4": _c4}


def load_eval_text(source: str, text_column: str = "text") -> EvalText:
    """Load a text to measure on.

    Args:
        source: "wikitext2" (WikiText-2 raw test), "c4" (C4 validation, first shard), both from the Hub; or what
            :func:`fairy2i.loading.read_documents` takes, whose documents are joined by a blank line.
        text_column: the column that holds the text.

    Raises:
        ConnectionError: a named text could not be fetched; the message says how to give a local file.
        FileNotFoundError, ValueError: as read_documents.
    """
    if source not in NAMED_TEXTS:
        documents = read_documents(source, split="test", text_column=text_column)
        return EvalText(source, "\n\n".join(documents["text"]))
    try:
        return EvalText(source, NAMED_TEXTS[source]())
    except Exception as error:  # datasets raises many kinds, for no network, no cache and no such file alike
        raise ConnectionError(
            f"{source} could not be fetched from the Hub ({type(error).__name__}); give a local file instead"
        ) from error


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    window: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> PerplexityResult:
    """Measure the perplexity of a causal language model by protocol `gptq`.

    Args:
        model: takes ``input_ids`` (batch, window) and returns an output with ``logits``; on any device. Its mode is put
            back afterwards.
        tokens: int64 (total,), the tokenized text.
        window: tokens in a window.
        max_windows: measure on the first so many only.
        batch_size: windows at a time; does not change the result beyond rounding.
        progress: show a progress bar.

    Raises:
        ValueError: the text is shorter than a window, or the window longer than the model's context.
    """
    config = getattr(model, "config", None)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    if context and window > context:
        raise ValueError(f"a window of {window} tokens is longer than the model's context of {context}; use --window")
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise ValueError(f"window must be at least 2 and max_windows at least 1, got {window} and {max_windows}")
    count = len(tokens) // window
    count = count if max_windows is None else min(count, max_windows)
    if count < 1:
        raise ValueError(f"the text has {len(tokens)} tokens, less than one window of {window}; use a smaller --window")
    device = next(model.parameters()).device
    windows = tokens[: count * window].view(count, window)
    was_training = model.training
    model.eval()
    sums: list[Tensor] = []  # negative log-likelihood of each window, in nats
    try:
        for ids in tqdm(windows.split(batch_size), desc="Perplexity", unit="batch", disable=None if progress else True):
            ids = ids.to(device)
            logits = model(input_ids=ids).logits
            for row, target in zip(logits, ids, strict=True):  # one row at a time: float32 logits of a batch are large
                sums.append(F.cross_entropy(row[:-1].float(), target[1:], reduction="sum"))
    finally:
        model.train(was_training)
    means = torch.stack(sums).double().cpu() / (window - 1)
    nll = float(means.mean())
    error = float(means.std() / math.sqrt(count)) if count > 1 else None
    return PerplexityResult(math.exp(min(nll, 700)), nll, error, count * (window - 1), count, window)


def tokenize_text(text: str, tokenizer: Any) -> Tensor:
    """Tokenize a whole text as the tokenizer does by default (BOS where it adds one): int64 (total,)."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
