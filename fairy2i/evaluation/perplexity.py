"""Perplexity under a named protocol.

A protocol says which windows a text is cut into and which tokens of each window are scored; measuring is the same for
all. docs/evaluation.md tells which papers use which.

`gptq`: the whole text is tokenized at once as the tokenizer does by default, cut into windows of equal length that do
not overlap, the rest dropped; in each window all tokens but the first are predicted. This is what GPTQ, QuIP#, QTIP,
AQLM and EfficientQAT report. A number without its window length means nothing: LLaMA-2-7B has 6.97 on C4 at 2048
tokens and 6.63 at 4096.

`fairy2i`: each document is BOS, its tokens, EOS. Whole documents fill a window in their order; one that does not fit
any more starts the next window, one that fits no window is dropped. A token that stands after an EOS is not scored.

`strided`: the whole text as for gptq, under windows that begin every `stride` tokens. Each window scores the tokens
that no earlier one has seen, so each token but the first is scored once, with at least `window - stride` tokens before
it (or all there are).
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .texts import EvalText

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Windows:
    """What a protocol makes of a text.

    Attributes:
        ids: int64 (length,) each, the tokens of a window; lengths may differ.
        scored: bool (length - 1,) each: is the token at i + 1 scored?
        protocol, window, stride: what they were made by.
        bytes: UTF-8 bytes of text that the scored tokens stand for; None if that is not known.
        documents, dropped_documents, dropped_tokens: only where documents count: how many there are in the windows,
            and how many, with how many tokens, were too long for one.
    """

    ids: list[Tensor]
    scored: list[Tensor]
    protocol: str
    window: int
    stride: int | None = None
    bytes: float | None = None
    documents: int | None = None
    dropped_documents: int | None = None
    dropped_tokens: int | None = None


@dataclass(frozen=True)
class PerplexityResult:
    """One measurement.

    Attributes:
        perplexity: exp of ``nll``.
        nll: mean negative log-likelihood of the scored tokens, in nats.
        standard_error: of ``nll``, from the spread between windows; None for a single window.
        tokens, windows: how many tokens were scored, in how many windows.
        window: tokens in a window, at most.
        protocol: name of the protocol.
    """

    perplexity: float
    nll: float
    standard_error: float | None
    tokens: int
    windows: int
    window: int
    protocol: str = "gptq"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)

    def bits_per_byte(self, windows: Windows) -> float | None:
        """Return the bits that a byte of the text costs: comparable between tokenizers, as perplexity is not."""
        return self.nll * self.tokens / math.log(2) / windows.bytes if windows.bytes else None


def tokenize_text(text: str, tokenizer: Any) -> Tensor:
    """Tokenize a whole text as the tokenizer does by default (BOS where it adds one): int64 (total,)."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def gptq_windows(tokens: Tensor, window: int = 2048, max_windows: int | None = None) -> Windows:
    """Cut a tokenized text by protocol `gptq`.

    Args:
        tokens: int64 (total,).
        window: tokens in a window.
        max_windows: the first so many only.

    Raises:
        ValueError: the text is shorter than a window, or an argument is out of range.
    """
    _check(window, max_windows)
    count = len(tokens) // window
    count = count if max_windows is None else min(count, max_windows)
    if count < 1:
        raise ValueError(f"the text has {len(tokens)} tokens, less than one window of {window}; use a smaller --window")
    ids = list(tokens[: count * window].view(count, window))
    return Windows(ids, [torch.ones(window - 1, dtype=torch.bool)] * count, "gptq", window)


def strided_windows(
    tokens: Tensor, window: int = 2048, stride: int | None = None, max_windows: int | None = None
) -> Windows:
    """Cut a tokenized text by protocol `strided`.

    Args:
        tokens: int64 (total,).
        window: tokens in a window.
        stride: from the start of a window to that of the next; half a window by default.
        max_windows: the first so many only.

    Raises:
        ValueError: there is nothing to predict, or an argument is out of range.
    """
    _check(window, max_windows)
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"--stride must be at least 1 and less than the window of {window}, got {stride}")
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens, nothing to predict")
    ids, scored, seen = [], [], 1
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        ids.append(tokens[start:end])
        scored.append(torch.arange(start + 1, end) >= seen)
        seen = end
        if end == len(tokens) or len(ids) == max_windows:
            break
    return Windows(ids, scored, "strided", window, stride)


def document_windows(
    documents: Sequence[str], tokenizer: Any, window: int = 2048, max_windows: int | None = None
) -> Windows:
    """Pack documents by protocol `fairy2i`.

    Args:
        documents: texts; those without any text are left out.
        tokenizer: has a BOS and an EOS token.
        window: tokens in a window, at most.
        max_windows: the first so many only; what would follow is neither counted nor dropped.

    Raises:
        ValueError: the tokenizer has no BOS or no EOS, no document fits a window, or an argument is out of range.
    """
    _check(window, max_windows)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    missing = [name for name, token in (("BOS", bos), ("EOS", eos)) if token is None]
    if missing:
        raise ValueError(
            "protocol fairy2i puts BOS and EOS around each document, but the tokenizer has no "
            f"{' and no '.join(missing)} token; use --protocol gptq, or a --tokenizer that has both"
        )
    packed: list[list[int]] = []
    sizes: list[int] = []
    kept = dropped = dropped_tokens = 0
    for document, tokens in _tokenized(documents, tokenizer):
        ids = [bos, *tokens, eos]
        if len(ids) > window:
            dropped, dropped_tokens = dropped + 1, dropped_tokens + len(ids)
            continue
        if not packed or len(packed[-1]) + len(ids) > window:
            if len(packed) == max_windows:
                break
            packed.append([])
            sizes.append(0)
        packed[-1] += ids
        sizes[-1] += len(document.encode())
        kept += 1
    if not packed:
        raise ValueError(
            f"none of {dropped} documents fits a window of {window} tokens; use a larger --window, or part the text "
            "into documents: JSONL, or lines of <|endoftext|> between them"
        )
    windows = [torch.tensor(ids) for ids in packed]
    result = Windows(windows, [ids[:-1] != eos for ids in windows], "fairy2i", window, bytes=float(sum(sizes)))
    return replace(result, documents=kept, dropped_documents=dropped, dropped_tokens=dropped_tokens)


def _tokenized(documents: Sequence[str], tokenizer: Any, at_once: int = 1000) -> Iterator[tuple[str, list[int]]]:
    """Yield each document that has text with its tokens, no special ones added; many at once are many times faster."""
    texts = [document for document in documents if document.strip()]
    for start in range(0, len(texts), at_once):
        part = texts[start : start + at_once]
        yield from zip(part, tokenizer(part, add_special_tokens=False, verbose=False).input_ids, strict=True)


def _check(window: int, max_windows: int | None) -> None:
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise ValueError(f"window must be at least 2 and max_windows at least 1, got {window} and {max_windows}")


def _joined(
    cut: Callable[..., Windows], text: EvalText, tokenizer: Any, window: int, max_windows: int | None, **extra: Any
) -> Windows:
    """Cut the joined text; its bytes are counted at the text's mean of bytes a token, BOS left out."""
    joined = text.text
    tokens = tokenize_text(joined, tokenizer)
    result = cut(tokens, window, max_windows=max_windows, **extra)
    scored = sum(int(mask.sum()) for mask in result.scored)
    special = int(len(tokens) > 0 and int(tokens[0]) == tokenizer.bos_token_id)
    return replace(result, bytes=scored * len(joined.encode()) / max(len(tokens) - special, 1))


def _gptq(text: EvalText, tokenizer: Any, window: int, stride: int | None, most: int | None) -> Windows:
    most = text.most_windows if most is None else min(most, text.most_windows or most)
    return _joined(gptq_windows, text, tokenizer, window, most)


def _strided(text: EvalText, tokenizer: Any, window: int, stride: int | None, most: int | None) -> Windows:
    return _joined(strided_windows, text, tokenizer, window, most, stride=stride)


def _fairy2i(text: EvalText, tokenizer: Any, window: int, stride: int | None, most: int | None) -> Windows:
    return document_windows(text.documents, tokenizer, window, most)


PROTOCOLS: dict[str, Callable[[EvalText, Any, int, int | None, int | None], Windows]] = {
    "gptq": _gptq,
    "fairy2i": _fairy2i,
    "strided": _strided,
}


def make_windows(
    protocol: str,
    text: EvalText,
    tokenizer: Any,
    window: int = 2048,
    *,
    stride: int | None = None,
    max_windows: int | None = None,
) -> Windows:
    """Cut a text into windows by a protocol of PROTOCOLS.

    Raises:
        ValueError: as the function of the protocol: what to change is in the message.
    """
    return PROTOCOLS[protocol](text, tokenizer, window, stride, max_windows)


@torch.inference_mode()
def measure(model: nn.Module, windows: Windows, batch_size: int = 1, progress: bool = True) -> PerplexityResult:
    """Measure the perplexity of a causal language model on windows.

    Args:
        model: causal; takes ``input_ids`` (batch, length) and returns an output with ``logits``; on any device. Its
            mode is put back afterwards.
        windows: from a protocol.
        batch_size: windows at a time; does not change the result beyond rounding.
        progress: show a progress bar.

    Raises:
        ValueError: the window is longer than the model's context, or the batch size not positive.
    """
    config = getattr(model, "config", None)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    if context and windows.window > context:
        raise ValueError(
            f"a window of {windows.window} tokens is longer than the model's context of {context}; use --window"
        )
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []  # of the scored tokens of each window, in nats
    try:
        starts = range(0, len(windows.ids), batch_size)
        for start in tqdm(starts, desc="Perplexity", unit="batch", disable=None if progress else True):
            batch = windows.ids[start : start + batch_size]
            # filled up on the right, where a causal model looks at nothing that counts
            ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
            logits = model(input_ids=ids).logits
            for index, row in enumerate(batch):
                scored = windows.scored[start + index].to(logits.device)
                target = ids[index, 1 : len(row)].to(logits.device)
                losses.append(_losses(logits[index, : len(row) - 1][scored], target[scored]))
    finally:
        model.train(was_training)
    sums = torch.stack([part.sum().cpu() for part in losses])
    counts = torch.tensor([len(part) for part in losses], dtype=torch.float64)
    many, tokens = len(sums), int(counts.sum())
    nll = float(sums.sum()) / tokens
    # of a ratio of sums: where all windows score as many tokens, the standard error of the mean of their means
    spread = float((sums - nll * counts).square().sum()) * many / max(many - 1, 1)
    error = math.sqrt(spread) / tokens if many > 1 else None
    return PerplexityResult(
        math.exp(min(nll, 700)), nll, error, tokens, many, window=windows.window, protocol=windows.protocol
    )


def _losses(logits: Tensor, targets: Tensor, at_once: int = 256) -> Tensor:
    """Return the cross-entropy of each row in float64: in float32 it is 1e-5 too low for a vocabulary of 50,000."""
    if logits.device.type == "mps":  # has no float64
        logits, targets = logits.cpu(), targets.cpu()
    pairs = zip(logits.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([F.cross_entropy(row.double(), target, reduction="none") for row, target in pairs])


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    window: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> PerplexityResult:
    """Measure the perplexity of a tokenized text, int64 (total,), by protocol `gptq`.

    Args: as those of gptq_windows and measure.

    Raises:
        ValueError: the text is shorter than a window, or the window longer than the model's context.
    """
    return measure(model, gptq_windows(tokens, window, max_windows), batch_size, progress)
