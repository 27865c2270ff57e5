"""Held-out loss per token, and its perplexity.

The Trainer averages the means of batches, in which a token of a block with many masked labels counts more than others.
Here each predicted token counts once, whatever the batch size and the number of processes.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from .loss import IGNORE_INDEX


def token_loss(sums: EvalPrediction) -> dict[str, float]:
    """Return loss and perplexity from the summed loss and the number of predicted tokens of each block."""
    loss = float(np.sum(sums.predictions, dtype=np.float64) / max(np.sum(sums.label_ids), 1))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


class HeldOutLoss(Trainer):
    """A Trainer that evaluates language models per token, unless it is given another ``compute_metrics``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = token_loss
        super().__init__(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Return, where the Trainer has logits and labels, the summed loss and the predicted tokens of each block."""
        if self.compute_metrics is not token_loss:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        labels = inputs["labels"][:, 1:]
        sums = [  # row by row: logits in float32 are large
            F.cross_entropy(row[:-1].float(), target, ignore_index=IGNORE_INDEX, reduction="sum")
            for row, target in zip(logits, labels, strict=True)
        ]
        return None, torch.stack(sums)[:, None], (labels != IGNORE_INDEX).sum(1)[:, None]
