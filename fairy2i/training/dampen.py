"""Dampened oscillation: behind each step the master weights are pulled towards what they quantize to.

Step s of n with learning rate lr is followed by w <- w + r (q(w) - w), r = lr strength s / n, at most 1. Weights that
would sit between two codes, and swing from one to the other, are drawn to one of them while the rate falls. After
arXiv 2203.11086, which has it as a term of the loss; here it is a step of its own, as decoupled weight decay is.
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..qat import QATLinear


class Dampen(TrainerCallback):
    """Pulls the weights of QATLinear layers to their quantized values.

    Args:
        model: its QATLinear layers that train; their weights are whole, not sharded.
        strength: of the pull, 0 or more.
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        layers = (module for module in model.modules() if isinstance(module, QATLinear))
        self.layers = [layer for layer in layers if layer.weight.requires_grad]
        self.strength = strength

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Pull, by the learning rate of the step that has just been done."""
        pull = optimizer.param_groups[0]["lr"] * self.strength * (state.global_step + 1) / state.max_steps
        for layer in self.layers:
            layer.matrix.lerp_(layer.quantized_weight(), min(pull, 1.0))
