"""Calibration: a good start without training, from a few thousand tokens of text.

Rounding every weight to its nearest code minimizes the error of the weight; what counts is the error of the layer's
output. With the Gram matrix H = sum x x^T of the layer's inputs, that is tr((R - Q) H (R - Q)^T), and columns depend on
one another: the error made in one column can be made good in those that are not rounded yet (GPTQ, arXiv 2210.17323).

Complex codes tie the columns j and m + j of a real (2n, 2m) matrix, and the rows i and n + i, into 2 x 2 blocks, one
code of U and one of W per stage. So columns go two at a time. With the upper Cholesky factor C of H^-1, columns ordered
in such pairs b, and E the error of a pair,

    Q_b = round(R_b)        R_rest -= (R_b - Q_b) C_bb^-1 C_b,rest.

Then the scales are fitted anew by least squares in the metric H for the codes as they are, and both take turns.

The result needs no format of its own. It is a master weight and learned scales of a QATLinear whose forward gives just
these codes: it can be packed, or trained on.

Layers go in the order in which the model calls them. Each sees the inputs that the quantized layers before it give; the
activations of one decoder block are in memory at a time.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .calibrated_blocks import CalibratedBlocks
from .granularity import expand_groups
from .ops.training import has_kernels
from .phase_quant import SCALE_MIN, phase_encode, phase_units
from .qat import QATLinear
from .rotation import rotate
from .schemes import PhaseScheme, method_name
from .widely_linear import from_parts, to_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibratedLayer:
    """What calibration did to one layer.

    Attributes:
        name: name of the module.
        before, after: ||(w - q) x||^2 / ||w x||^2 over the calibration text, of plain rounding with the fitted scales,
            and of what the layer has now.
    """

    name: str
    before: float
    after: float


def _damped(gram: Tensor, damping: float) -> Tensor:
    """Add a share of the mean of its diagonal to the diagonal of a Gram matrix."""
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return gram + damping * mean * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a Gram matrix.

    Args:
        gram: (k, k), float32 or float64, positive semidefinite and finite. Inputs that never occur are no obstacle.
        damping: added to the diagonal, as a share of its mean; ten times as much where that is too little.

    Raises:
        ValueError: no damping helps.
    """
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(_damped(gram, damping))
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError("the Gram matrix of a layer's inputs is not positive definite")


def _pairs_first(m: int, order: Tensor) -> Tensor:
    """Column indices with the two columns of a pair side by side: (j, m + j) for j in ``order``."""
    return torch.stack((order, order + m), dim=1).flatten()


def _round_pair(block: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Round one pair of columns: block (2n, 2), scales (T, 2, 2, n) -> codes (T, 2, n), values (2n, 2)."""
    re, im = (part[..., 0] for part in to_parts(block))  # (2, n)
    rest_re, rest_im, codes = re, im, []  # the same arithmetic as phase_quantize: the same codes
    for scale in scales:
        code = phase_encode(rest_re, rest_im)
        unit_re, unit_im = phase_units(code)
        rest_re = torch.addcmul(rest_re, scale[:, 0], unit_re, value=-1)
        rest_im = torch.addcmul(rest_im, scale[:, 1], unit_im, value=-1)
        codes.append(code)
    return torch.stack(codes), from_parts((re - rest_re)[..., None], (im - rest_im)[..., None])


def _round_columns(rest: Tensor, codes: Tensor, factor: Tensor, scales: Tensor, start: int, end: int) -> Tensor:
    """Round columns ``start`` to ``end``, pairs side by side, and return their errors, (2n, end - start).

    Args:
        rest: (2n, 2m); in the group what each column was when it was rounded, afterwards.
        codes: uint8 (T, 2, n, m), pairs in the same order; written.
        factor: (2m, 2m), upper.
        scales: (T, 2, 2, n, m), pairs in the same order.
    """
    errors = torch.empty_like(rest[:, start:end])
    for k in range(start, end, 2):
        block = rest[:, k : k + 2]
        codes[..., k // 2], value = _round_pair(block, scales[..., k // 2])
        # solve E C_bb = block - value for E, C_bb = [[a, b], [0, d]]
        difference = block - value
        first = difference[:, 0] / factor[k, k]
        second = (difference[:, 1] - first * factor[k, k + 1]) / factor[k + 1, k + 1]
        error = torch.stack((first, second), dim=1)
        rest[:, k + 2 : end] -= error @ factor[k : k + 2, k + 2 : end]
        errors[:, k - start : k - start + 2] = error
    return errors


def round_with_feedback(
    weight: Tensor, gram: Tensor, scales: Tensor, scheme: PhaseScheme, *, damping: float = 0.01, lazy: int = 64
) -> tuple[Tensor, Tensor]:
    """Round a matrix to phase codes, making good the error of each pair of columns in those that follow.

    Args:
        weight: float32 (2n, 2m); not changed.
        gram: float32 (2m, 2m), sum of x x^T over the inputs of the layer.
        scales: float32 (T, 2, 2, *group), fixed.
        scheme: says what the groups are.
        damping: added to the diagonal, as a share of its mean.
        lazy: pairs of columns after which the columns further on are brought up to date.

    Returns:
        codes: uint8 (T, 2, n, m).
        moved: float32 (2n, 2m), what each column was when it was rounded: nearest rounding of it gives the codes.
    """
    rows, columns = weight.shape
    n, m = rows // 2, columns // 2
    energy = gram.diagonal()
    order = (energy[:m] + energy[m:]).argsort(descending=True)  # the inputs that matter most are rounded first
    columns_in_order = _pairs_first(m, order)
    factor = inverse_factor(gram[columns_in_order][:, columns_in_order], damping)
    rest = weight[:, columns_in_order].contiguous()
    codes = torch.empty((scheme.stages, 2, n, m), dtype=torch.uint8, device=weight.device)  # in this order
    kernel = scheme.granularity == "row" and weight.dtype == torch.float32 and has_kernels(weight.device, weight.dtype)
    if kernel:
        factor, scales = factor.contiguous(), scales.contiguous()
    else:
        full = expand_groups(scales, n, m, scheme.granularity, scheme.tile).expand(scheme.stages, 2, 2, n, m)[
            ..., order
        ]
    for start in range(0, columns, 2 * lazy):
        end = min(start + 2 * lazy, columns)
        if kernel:
            from .ops.triton.feedback import round_columns

            errors = round_columns(rest, codes, factor, scales, start, end - start)
        else:
            errors = _round_columns(rest, codes, factor, full, start, end)
        rest[:, end:] -= errors @ factor[start:end, end:]
    back = torch.empty_like(columns_in_order)
    back[columns_in_order] = torch.arange(columns, device=weight.device)
    in_place = torch.empty_like(codes)
    in_place[..., order] = codes
    return in_place, rest[:, back]


def refit_row_scales(weight: Tensor, gram: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Fit row scales by least squares in the metric of the Gram matrix, for codes as they are.

    The real rows i and n + i are linear in the 4T scales of row i of U and W: 4T normal equations for each i.

    Args:
        weight: float32 (2n, 2m), what to come near to.
        gram: float32 (2m, 2m).
        codes: uint8 (T, 2, n, m).
        scales: float32 (T, 2, 2, n), kept in rows whose fit is not positive.

    Returns:
        float32 (T, 2, 2, n).
    """
    stages, _, n, _ = codes.shape
    unit_re, unit_im = (unit.to(weight.dtype) for unit in phase_units(codes))  # (T, 2, n, m)
    zero = torch.zeros_like(unit_re[0, 0])
    upper, lower = [], []  # what a scale of 1 puts into the rows i and n + i: (n, 2m) each
    for t in range(stages):
        for part, sign in ((0, 1), (1, -1)):  # U: re on both diagonal quarters; W: with a minus on the second
            upper.append(torch.cat((unit_re[t, part], zero), 1))
            lower.append(torch.cat((zero, sign * unit_re[t, part]), 1))
            upper.append(torch.cat((zero, -sign * unit_im[t, part]), 1))
            lower.append(torch.cat((unit_im[t, part], zero), 1))
    basis = torch.stack((torch.stack(upper), torch.stack(lower)), dim=2)  # (4T, n, 2, 2m)
    weighted = basis @ gram
    normal = torch.einsum("knrc,lnrc->nkl", basis, weighted)
    right = torch.einsum("knrc,nrc->nk", weighted, torch.stack((weight[:n], weight[n:]), dim=1))
    size = normal.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * size.mean(dim=1, keepdim=True) + torch.finfo(size.dtype).tiny
    fit = torch.linalg.solve(normal + torch.diag_embed(ridge.expand_as(size)), right)  # (n, 4T)
    fit = torch.where((fit > 0).all(dim=1, keepdim=True) & torch.isfinite(fit).all(dim=1, keepdim=True), fit, 0)
    fitted = fit.T.reshape(stages, 2, 2, n)
    return torch.where(fitted > 0, fitted.clamp(min=SCALE_MIN), scales)


def output_error(weight: Tensor, quantized: Tensor, gram: Tensor) -> float:
    """Return ||(w - q) x||^2 / ||w x||^2 from the Gram matrix of x."""
    difference = weight - quantized
    return float(((difference @ gram) * difference).sum() / ((weight @ gram) * weight).sum().clamp(min=1e-30))


def loosen(master: Tensor, target: Tensor, scales: Tensor, scheme: PhaseScheme) -> Tensor:
    """Bring each complex entry of a master weight as near to a target as its codes allow.

    A master weight that equals its quantized value sits in the middle of its cells: training could not move a code for
    hundreds of steps. One near the boundary on the side of the target has the same forward, and can.

    Args:
        master, target: float32 (2n, 2m).
        scales: float32 (T, 2, 2, *group).

    Returns:
        float32 (2n, 2m), of the same codes as ``master``, entries a quarter, half, three quarters or all of the way.
    """
    codes, _ = scheme.quantize(master, scales)
    start, goal = torch.stack(to_parts(master)), torch.stack(to_parts(target))  # (2, 2, n, m): re and im of U and W
    best = start
    for share in (0.25, 0.5, 0.75, 1.0):
        moved = torch.lerp(start, goal, share)
        same = (scheme.quantize(from_parts(moved[0], moved[1]), scales)[0] == codes).all(dim=0)
        best = torch.where(same, moved, best)
    return from_parts(best[0], best[1])


@torch.no_grad()
def calibrate_layer(
    layer: QATLinear, gram: Tensor, target: Tensor | None = None, *, damping: float = 0.01, rounds: int = 2
) -> tuple[float, float]:
    """Give a layer the master weight and the scales that fit its inputs, in place.

    Args:
        layer: its scheme is a PhaseScheme with learned row scales.
        gram: float32 (in_features, in_features), on the device of the layer.
        target: float32 (out_features, in_features), what to come near to; the layer's weight if None.
        damping: see :func:`round_with_feedback`.
        rounds: how often rounding and scales take turns.

    Returns:
        The relative error of the output before and after.
    """
    assert isinstance(layer.scheme, PhaseScheme)
    scheme = dataclasses.replace(layer.scheme, rotation=0)  # all of this goes on in the basis of the codes
    weight = rotate(layer.matrix.detach().float() if target is None else target, layer.scheme.rotation)
    gram = rotate(rotate(gram, layer.scheme.rotation).T, layer.scheme.rotation)
    codes, scales = scheme.quantize(weight)
    before = output_error(weight, scheme.dequantize(codes, scales), gram)
    best, master = before, weight
    for _ in range(rounds):
        codes, moved = round_with_feedback(weight, gram, scales, scheme, damping=damping)
        error = output_error(weight, scheme.dequantize(codes, scales), gram)
        if error < best:
            best, master = error, moved
            layer.group_scales.copy_(scales)  # type: ignore[union-attr]
        refitted = refit_row_scales(weight, gram, codes, scales)
        dense = scheme.dequantize(codes, refitted)
        same = (scheme.quantize(dense, refitted)[0] == codes).all(dim=-1).all(dim=0).all(dim=0)  # (n,): rows that stay
        scales = torch.where(same, refitted, scales)
        dense = torch.where(same.repeat(2)[:, None], dense, moved)
        error = output_error(weight, scheme.dequantize(*scheme.quantize(dense, scales)), gram)
        if error < best:
            best, master = error, dense
            layer.group_scales.copy_(scales)  # type: ignore[union-attr]
    master = loosen(master, weight, layer.group_scales, scheme)  # type: ignore[arg-type]
    layer.matrix.copy_(rotate(master, layer.scheme.rotation))
    return before, best


class _Stop(Exception):
    """Ends a forward as soon as the inputs of the first block are known."""


def _decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of blocks that holds most quantized layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    counts = [sum(isinstance(layer, QATLinear) for layer in blocks.modules()) for blocks in lists]
    if not counts or not max(counts):
        raise ValueError("the model has no list of decoder blocks with quantized layers; convert it first")
    return lists[counts.index(max(counts))]  # of equals the first: the outermost


class _Batch(NamedTuple):
    """What a decoder block is called with: hidden states (batch, length, width), and the rest."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _first_batch(model: nn.Module, first: nn.Module, tokens: Tensor) -> _Batch:
    """Run a model up to its first block and return what that is called with."""
    seen: list[_Batch] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        seen.append(_Batch(hidden, tuple(rest), kwargs))
        raise _Stop

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Stop:
        pass
    finally:
        hook.remove()
    return seen[0]


def _run(block: nn.Module, batch: _Batch) -> Tensor:
    """Return the hidden states that a block makes of a batch."""
    output = block(batch.hidden, *batch.args, **batch.kwargs)
    return output[0] if isinstance(output, tuple) else output


def _use_dense(layer: QATLinear, weight: Tensor) -> None:
    """Have a layer multiply with this (out, in) weight until :func:`_use_codes`, without quantizing in each call."""
    layer.forward = lambda x: F.linear(x, weight.to(x.dtype), layer.bias)  # type: ignore[method-assign]


def _use_codes(layer: QATLinear) -> None:
    vars(layer).pop("forward", None)


def _groups_by_input(block: nn.Module, layers: dict[str, QATLinear], batch: _Batch) -> list[list[str]]:
    """Return the names of layers in the order of their calls, neighbours with the same input together."""
    groups: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if groups and groups[-1][0] is args[0]:
                groups[-1][1].append(name)
            else:
                groups.append((args[0], [name]))

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        _run(block, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [names for _, names in groups]


def _input_of(block: nn.Module, layer: QATLinear, batch: _Batch) -> Tensor:
    """Run a block as far as a layer, and return what that is called with, float32 (tokens, in)."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].reshape(-1, layer.in_features).float())
        raise _Stop

    hook = layer.register_forward_pre_hook(stop)
    try:
        _run(block, batch)
    except _Stop:
        pass
    finally:
        hook.remove()
    return seen[0]


class _Weights:
    """The two sets of weights of a block: as the model came, and what is made of them."""

    def __init__(self, layers: dict[str, QATLinear]) -> None:
        self.layers = layers
        self.original = {name: layer.matrix.detach().clone() for name, layer in layers.items()}
        self.present = dict(self.original)

    def use(self, weights: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            _use_dense(layer, weights[name])


def _moments_of_input(
    block: nn.Module, layer: QATLinear, weights: _Weights, batches: list[_Batch], originals: list[_Batch]
) -> tuple[Tensor, Tensor]:
    """Return sum x x^T and sum (o - x) x^T, float32 (in, in).

    x is what the layer is called with behind the quantized layers, o what it would be called with in the model as it
    came.
    """
    size = (layer.in_features, layer.in_features)
    gram, drift = torch.zeros(size, device=layer.weight.device), torch.zeros(size, device=layer.weight.device)
    for batch, original in zip(batches, originals, strict=True):
        weights.use(weights.original)
        o = _input_of(block, layer, original)
        weights.use(weights.present)
        x = _input_of(block, layer, batch)
        gram.addmm_(x.T, x)
        drift.addmm_((o - x).T, x)
    return gram, drift


def follow_drift(weight: Tensor, gram: Tensor, drift: Tensor, damping: float) -> Tensor:
    """Return the real weight that makes of the present inputs what ``weight`` made of the original ones, nearly.

    The least-squares solution w + w D (H + d I)^-1 with D = sum (o - x) x^T and H = sum x x^T.
    """
    return weight + torch.linalg.solve(_damped(gram, damping), (weight @ drift).T).T


@torch.no_grad()
def calibrate(
    model: nn.Module,
    tokens: Tensor,
    *,
    damping: float = 0.01,
    rounds: int = 2,
    drift_damping: float | None = 0.1,
    batch_size: int = 8,
    progress: bool = True,
    keep: str | None = None,
) -> list[CalibratedLayer]:
    """Fit the quantized layers of a model to a text, block by block, in place.

    Args:
        model: a transformers causal language model, converted by replace_modules_for_qat with a PhaseScheme of learned
            row scales, on any one device. Layers outside the decoder blocks (a quantized head) keep their first fit.
        tokens: int64 (sequences, length), on any device. Never text that the model is measured on later.
        damping, rounds: see :func:`calibrate_layer`.
        batch_size: sequences at a time.
        progress: show a progress bar.
        keep: a folder for the blocks that are done, so that another call with the same model, text and settings goes on
            behind them. Whoever has the result removes it. None: nothing is kept.

    Returns:
        What was done, layer by layer. The model's forward uses it, packing keeps it, and training goes on from it.

    Raises:
        ValueError: the model has no quantized decoder blocks, or a scheme without learned row scales; NaN or infinite
            weights or activations (names the layer).

    Source: GPTQ (arXiv 2210.17323), for pairs of columns and residual stages.
    """
    blocks = _decoder_blocks(model)
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, QATLinear)}
    inside = [layer for layer in blocks.modules() if isinstance(layer, QATLinear)]
    for layer in inside:
        scheme = layer.scheme
        if not (isinstance(scheme, PhaseScheme) and scheme.learned and scheme.granularity == "row"):
            raise ValueError(
                f"{names[layer]} has {method_name(scheme)}; calibration needs learned row scales, as in "
                'PhaseScheme(stages=2, granularity="row", scales="learned")'
            )
    was_training = model.training
    model.eval()
    done: list[CalibratedLayer] = []
    try:
        for layer in names:
            _use_dense(layer, layer.matrix)
        device = next(model.parameters()).device
        batches = [_first_batch(model, blocks[0], batch.to(device)) for batch in tokens.split(batch_size)]
        originals = batches
        kept = None
        if keep is not None:
            schemes = {name: layer.scheme.to_dict() for layer, name in names.items()}
            settings = [schemes, damping, rounds, drift_damping]
            kept = CalibratedBlocks(keep, settings, tokens, *(batch.hidden for batch in batches))
        bar = tqdm(total=len(inside), desc="Calibrating", unit="layer", disable=None if progress else True)
        for index, block in enumerate(blocks):
            layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, QATLinear)}
            weights, first, found = _Weights(layers), len(done), None
            if kept is not None:
                kept.next(block)
                found = kept.load(layers)
            if found is not None:
                done += [CalibratedLayer(**entry) for entry in found]
                weights.present = {name: layer.quantized_weight() for name, layer in layers.items()}
                bar.update(len(found))
            for group in [] if found is not None else _groups_by_input(block, layers, batches[0]):
                gram, drift = _moments_of_input(block, layers[group[0]], weights, batches, originals)
                for what, tensor in [("inputs", gram), *(("weight", layers[name].weight) for name in group)]:
                    if not torch.isfinite(tensor).all():
                        raise ValueError(f"{names[layers[group[0]]]}: its {what} have NaN or infinite entries")
                for name in group:
                    layer, target = layers[name], weights.original[name].float()
                    if drift_damping is not None:
                        target = follow_drift(target, gram, drift, drift_damping)
                    before, after = calibrate_layer(layer, gram, target, damping=damping, rounds=rounds)
                    weights.present[name] = layer.quantized_weight()
                    done.append(CalibratedLayer(names[layer], before, after))
                    bar.update()
            if kept is not None and found is None:
                kept.save(layers, done[first:])
            if fresh := done[first:]:
                error = sum(layer.after for layer in fresh) / len(fresh)
                bar.set_postfix(error=f"{error:.3f}")
                logger.info("block %d of %d: mean error %.4f", index + 1, len(blocks), error)
            weights.use(weights.original)
            originals = [batch._replace(hidden=_run(block, batch)) for batch in originals]
            weights.use(weights.present)
            batches = [batch._replace(hidden=_run(block, batch)) for batch in batches]
        bar.close()
    finally:
        for layer in names:
            _use_codes(layer)
        model.train(was_training)
    return done
