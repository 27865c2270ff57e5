"""Stages for each layer under a budget of bits: more where they lower the loss more.

To second order, and with a diagonal Fisher matrix in place of the Hessian, quantizing the weight W of a layer to Q
raises the loss of a token by

    e = 1/2 sum_ij G_i H_j (W - Q)_ij^2,

H_j the mean over tokens of the squared input j, G_i that of the squared gradient of the loss by the output i. (The
Fisher matrix has the mean of their product. Taking one from the other as independent is what KFAC does, and leaves two
vectors to keep.) Both come from one forward and backward over a few sequences of the model as it is.

A layer that goes from T to T' stages costs so many bits more and has so much less error. The best gain per bit comes
first, over and over, until nothing more fits: a walk along the lower convex hulls of (bits, error).
"""

import dataclasses
import heapq
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .convert import Method, is_conv1d, plan_replacement
from .qat import QATLinear
from .schemes import PhaseScheme, method_name

logger = logging.getLogger(__name__)

STAGES = (1, 2, 3, 4)
CHOICE_TOKENS = 16_384  # what commands take of a text: these means settle sooner than the Gram matrices of calibration


@dataclass
class _Moments:
    """What the tokens say of one layer, summed; float32, on the device of the layer.

    Attributes:
        inputs: (in,), squared inputs.
        gradients: (out,), squared gradients of the summed loss by the outputs.
        count: tokens that the layer has seen, which are not all of them in an expert.
    """

    inputs: Tensor
    gradients: Tensor
    count: int = 0


@dataclass(frozen=True)
class _Layer:
    """One layer to choose for: its name, its module, (out, in), and a scheme whose stages are open."""

    name: str
    module: nn.Module
    shape: tuple[int, int]
    scheme: PhaseScheme

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def staged(self, stages: int) -> PhaseScheme:
        return dataclasses.replace(self.scheme, stages=stages)

    def stored_bits(self, stages: int) -> int:
        return round(self.staged(stages).bits_per_weight(*self.shape) * self.numel)


def allocate_stages(
    model: nn.Module,
    tokens: Tensor,
    method: Method,
    bits: float,
    *,
    stages: Iterable[int] = STAGES,
    skip_lm_head: bool | None = None,
    skip_modules: Iterable[str] = (),
    batch_size: int = 1,
    progress: bool = True,
) -> dict[str, PhaseScheme]:
    """Choose the stages of each layer of a model, so that all of them together keep to a budget of bits.

    The model stays as it is: weights, gradients, what is trainable, training or eval mode.

    Args:
        model: a transformers causal language model, not quantized, in any floating dtype, on any device.
        tokens: int64 (sequences, length), on any device; some 10,000 will do. Never text that the model is measured on.
        method: as for replace_modules_for_qat, of phase codes only; ``stages`` of its schemes count for nothing, all
            else stays.
        bits: stored bits per weight, the mean over the layers that are quantized, scales counted
            (:func:`~fairy2i.schemes.mean_bits_per_weight`). Never exceeded.
        stages: the numbers of stages to choose from.
        skip_lm_head, skip_modules: as for replace_modules_for_qat, which should be told the same.
        batch_size: sequences at a time; the logits of one batch and their gradients are in memory.
        progress: show progress bars.

    Returns:
        {full name: scheme} of the layers that replace_modules_for_qat would replace, in its order: a ``method`` for it.

    Raises:
        ValueError: a budget that cannot be kept, or that is more than all layers can use (says what is possible);
            layers without phase codes, or quantized already; no tokens; NaN or infinite weights, activations or
            gradients (names the layer); whatever replace_modules_for_qat refuses.

    Source: the empirical Fisher information, factored as in KFAC (arXiv 1503.05671); greedy choice as in
        multiple-choice knapsacks.
    """
    counts = sorted(set(stages))
    layers = _layers_to_choose(model, method, skip_lm_head, skip_modules)
    stored = {layer.name: {count: layer.stored_bits(count) for count in counts} for layer in layers}
    budget = _budget(bits, sum(layer.numel for layer in layers), list(stored.values()))
    errors = _expected_errors(model, tokens, layers, counts, batch_size, progress)
    chosen = choose_stages(stored, errors, budget)
    return {layer.name: layer.staged(chosen[layer.name]) for layer in layers}


def choose_stages(
    bits: Mapping[str, Mapping[int, int]], errors: Mapping[str, Mapping[int, float]], budget: int
) -> dict[str, int]:
    """Return the stages of each layer: from the fewest on, the best gain per bit first, until nothing more fits.

    Args:
        bits: by layer and number of stages what is stored; more for more stages.
        errors: by layer and number of stages what to lower, summed over the layers.
        budget: bits of all layers, at least what the fewest stages take.
    """
    chosen = {name: min(options) for name, options in bits.items()}
    left = budget - sum(bits[name][stages] for name, stages in chosen.items())
    queue: list[tuple[float, str, int]] = []  # (-gain per bit, name, stages): one step of each layer; names part ties

    def add_best_step(name: str) -> None:
        """The next vertex of the layer's hull, of the points that fit: what does not fit now never will."""
        now, steps = chosen[name], []
        for stages in bits[name]:
            cost = bits[name][stages] - bits[name][now]
            if 0 < cost <= left and errors[name][stages] <= errors[name][now]:
                steps.append(((errors[name][stages] - errors[name][now]) / cost, name, stages))
        if steps:
            heapq.heappush(queue, min(steps))

    for name in bits:
        add_best_step(name)
    while queue:
        _, name, stages = heapq.heappop(queue)
        cost = bits[name][stages] - bits[name][chosen[name]]
        if cost <= left:
            left -= cost
            chosen[name] = stages
        add_best_step(name)
    return chosen


def _layers_to_choose(
    model: nn.Module, method: Method, skip_lm_head: bool | None, skip_modules: Iterable[str]
) -> list[_Layer]:
    """Return the layers that replace_modules_for_qat would replace.

    Raises:
        ValueError: names a layer that is quantized already, has other than phase codes, or is not in memory.
    """
    for name, module in model.named_modules():
        if isinstance(module, QATLinear):
            raise ValueError(f"{name} is quantized already; choose stages before replace_modules_for_qat")
    report, plan = plan_replacement(model, method, skip_lm_head, skip_modules)
    layers = []
    for (module, scheme), replaced in zip(plan, report.replaced, strict=True):
        if not isinstance(scheme, PhaseScheme):
            raise ValueError(f"{replaced.name} has {method_name(scheme)}; only phase codes have stages to choose")
        if module.get_parameter("weight").is_meta:
            raise ValueError(f"the weight of {replaced.name} is not in memory; load the model without offloading")
        layers.append(_Layer(replaced.name, module, replaced.shape, scheme))
    return layers


def _budget(bits: float, weights: int, stored: Sequence[Mapping[int, int]]) -> int:
    """Return how many bits all layers together may take.

    Raises:
        ValueError: less than the fewest stages need or more than the most can use; says what is possible.
    """
    least, most = sum(min(options.values()) for options in stored), sum(max(options.values()) for options in stored)
    budget = bits * weights * (1 + 1e-12)  # a mean that was computed in floating point is one that can be kept
    if not least <= budget <= most * (1 + 2e-12):
        low, high = math.ceil(least / weights * 1e4) / 1e4, math.floor(most / weights * 1e4) / 1e4
        stages = f"{min(stored[0])} to {max(stored[0])} stages"
        raise ValueError(f"{bits:g} bits per weight cannot be had; here {stages} take {low:g} to {high:g} with scales")
    return math.floor(budget)


@torch.no_grad()
def _expected_errors(
    model: nn.Module, tokens: Tensor, layers: Sequence[_Layer], stages: Sequence[int], batch_size: int, progress: bool
) -> dict[str, dict[int, float]]:
    """Return by layer and number of stages how much higher quantizing it makes the loss of a token, in nats.

    The weights are those that a QATLinear multiplies with when nothing was trained or calibrated yet, in the basis of
    the model.
    """
    moments = _measure(model, tokens, layers, batch_size, progress)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    errors: dict[str, dict[int, float]] = {}
    for layer in tqdm(layers, desc="Choosing stages", unit="layer", delay=2, disable=None if progress else True):
        seen = moments[layer.name]
        errors[layer.name] = {}
        for count in stages:
            quantized = QATLinear.from_linear(layer.module, layer.staged(count), is_conv1d(layer.module))
            square = (quantized.matrix.float() - quantized.quantized_weight().float()).square()
            product = (seen.gradients / predicted) @ square @ (seen.inputs / max(seen.count, 1))
            errors[layer.name][count] = 0.5 * float(product)
    if unseen := [name for name, seen in moments.items() if not seen.count]:
        logger.warning("no token comes to %s; the budget goes elsewhere first: use more text", ", ".join(unseen[:4]))
    return errors


def _measure(
    model: nn.Module, tokens: Tensor, layers: Sequence[_Layer], batch_size: int, progress: bool
) -> dict[str, _Moments]:
    """Run a model forward and backward over the tokens and return the moments of its layers.

    Raises:
        ValueError: no tokens; NaN or infinite activations or gradients (names the layer).
    """
    if tokens.dim() != 2 or not tokens.shape[0] or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be (sequences, length) with a length of 2 at least, got {tuple(tokens.shape)}")
    moments: dict[str, _Moments] = {}
    order: list[str] = []  # of the calls
    for layer in layers:
        device = layer.module.get_parameter("weight").device
        out_features, in_features = layer.shape
        zeros = torch.zeros(in_features, device=device), torch.zeros(out_features, device=device)
        moments[layer.name] = _Moments(*zeros)
    device = next(model.parameters()).device
    handles = [layer.module.register_forward_hook(_watch(layer.name, moments, order)) for layer in layers]
    try:
        with _frozen(model):
            batches = tokens.split(batch_size)
            for batch in tqdm(batches, desc="Measuring layers", delay=2, disable=None if progress else True):
                order.clear()
                batch = batch.to(device)
                with torch.enable_grad():
                    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
                    labels = batch[:, 1:].to(logits.device)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
                _check_finite("inputs", [(name, moments[name].inputs) for name in order])
                loss.backward()
                _check_finite("gradients", [(name, moments[name].gradients) for name in reversed(order)])
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _watch(name: str, moments: Mapping[str, _Moments], order: list[str]) -> Callable[..., Tensor]:
    """Return a forward hook that adds to the moments of a layer, the gradient's when the backward comes by."""

    def of_gradient(gradient: Tensor) -> None:
        moments[name].gradients += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        order.append(name)
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        moments[name].inputs += x.float().square().sum(0)
        moments[name].count += x.shape[0]
        if not output.requires_grad:  # no parameter does: gradients begin at the first layers that are watched
            output = output.detach().requires_grad_().clone()  # no leaf, so that what follows may write into it
        output.register_hook(of_gradient)
        return output

    return hook


def _check_finite(what: str, sums: Iterable[tuple[str, Tensor]]) -> None:
    """Raise at the first layer with sums that are not finite: those after it have what it passed on."""
    for name, total in sums:
        if not torch.isfinite(total).all():
            raise ValueError(f"{name}: its {what} have NaN or infinite entries")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode and without trainable parameters, and then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
