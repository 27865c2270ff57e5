"""Annealed quantization: the forward goes from the unquantized weights to the quantized ones over the first steps.

In step s of the first n the forward multiplies with (1 - a) w + a q, a = (s + 1) / n. The gradient of w is
straight-through as always; that of learned scales is a times what it would be. Held-out loss and saved models are those
of the quantized model at any time. The share follows from the number of the step, so a resumed run needs no state.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from ..qat import QATLinear


class Anneal(TrainerCallback):
    """Has QATLinear layers multiply with a mixture of weights in the first steps of training.

    Make it before the output head is tapped (:class:`fairy2i.training.objective.TappedHead`): the tap goes around it.

    Args:
        model: the forward of its layers is replaced, in place.
        part: of all steps, that it lasts; 0 to 1. With 0 the model is left alone.

    Attributes:
        active: whether weights are a mixture in this step; layers do as without it where not, and in evaluation.
    """

    def __init__(self, model: nn.Module, part: float) -> None:
        self.part = part
        self.active = False
        self.share = torch.ones(())  # a tensor: a compiled forward takes the new value without being compiled anew
        for layer in (module for module in model.modules() if part and isinstance(module, QATLinear)):
            name = "_old_forward" if hasattr(layer, "_old_forward") else "forward"  # accelerate's hooks go around
            weight = self._weight(layer, layer.trained_weight)
            setattr(layer, name, self._forward(layer, getattr(layer, name), weight))
            layer.__dict__["trained_weight"] = weight

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the share of this step."""
        steps = self.part * state.max_steps
        self.active = state.global_step + 1 < steps
        if self.active:
            self.share.fill_((state.global_step + 1) / steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let layers be as they were, wherever training has stopped."""
        self.active = False

    def _weight(self, layer: QATLinear, quantized: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def trained_weight() -> Tensor:
            if not (self.active and layer.training):
                return quantized()
            return (1 - self.share) * layer.matrix + self.share * quantized()

        return trained_weight

    def _forward(
        self, layer: QATLinear, plain: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return F.linear(x, weight(), layer.bias) if self.active and layer.training else plain(x)

        return forward
