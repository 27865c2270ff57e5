"""What a log line says of a run beside its loss, and the end of a run that has no future.

- ``tokens_per_s``, over all processes, without the time of evaluations and checkpoints; ``mfu``, the share of the
  hardware's peak that this is, where the peak is known (:data:`PEAK_TFLOPS`, --peak_tflops).
- ``loss_max``, the largest loss of a step since the last line.
- ``flipped``, the fraction of codes that changed since the last line: how much the quantized model still moves.
  ``scale_mean`` and ``scale_min`` beside it. All three are of a few layers, evenly spread over the model.

The tokens of all steps so far are in ``state.num_input_tokens_seen``, and so in checkpoints.

A loss or gradient that is not finite, or a loss that climbs far above what it has been, ends the run with an error,
before that step can get into a checkpoint.
"""

import json
import logging
import os
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..packing import pack_codes, unpack_codes
from ..qat import QATLinear
from .checkpoints import last_checkpoint

logger = logging.getLogger(__name__)

PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float], ...] = (  # words of the device name, dense bf16 or fp16 TFLOP/s
    (("GB200",), 2500),
    (("B200",), 2250),
    (("GH200",), 989),
    (("H200",), 989),
    (("H20",), 148),
    (("H100", "PCIe"), 756),
    (("H100", "NVL"), 835),
    (("H100",), 989),
    (("H800",), 989),
    (("A100",), 312),
    (("A800",), 312),
    (("A40",), 150),
    (("A10",), 125),
    (("L40S",), 362),
    (("L40",), 181),
    (("L4",), 121),
    (("V100",), 125),
    (("T4",), 65),
    (("A6000",), 155),
    (("RTX", "4090"), 165),
    (("RTX", "3090"), 71),
    (("MI300X",), 1307),
)
SMOOTHING = 0.9  # of the loss, where its rise is watched: one odd batch does not end a run


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a device in half precision, or None for one that is not in the table."""
    words = device_name.replace("-", " ").split()
    if "Laptop" in words:
        return None
    return next((peak * 1e12 for names, peak in PEAK_TFLOPS if all(name in words for name in names)), None)


def flops_per_token(model: nn.Module, length: int) -> float:
    """Return the floating-point operations of one token, forward and backward: 6 N + 12 layers x heads x dim x length.

    N counts all parameters but an untied input embedding, which is looked up and not multiplied. What gradient
    checkpointing does twice counts once.
    """
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # DeepSpeed's own count, if split
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if not getattr(config, "tie_word_embeddings", False):
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        weights -= getattr(embedding.weight, "ds_numel", embedding.weight.numel())
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6 * weights + 12 * config.num_hidden_layers * heads * dim * length


class CodeWatch:
    """The codes of a few quantized layers, kept packed between two looks at them.

    Args:
        model: its QATLinear layers are watched.
        count: how many, evenly spread; -1 for all.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        layers = [module for module in model.modules() if isinstance(module, QATLinear)]
        if 0 <= count < len(layers):
            layers = [layers[i * (len(layers) - 1) // max(count - 1, 1)] for i in range(count)]
        self.layers = layers
        self.before: list[Tensor] = []

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Return ``flipped`` since the last look, unless this is the first, with ``scale_mean`` and ``scale_min``.

        All processes must call it, for FSDP2 gathers a weight from them. Empty where weights are out of reach (ZeRO-3,
        the first FSDP).
        """
        if any(layer.weight.numel() != layer.in_features * layer.out_features for layer in self.layers):
            self.layers = []
        if not self.layers:
            return {}
        packed, means, lowest = [], [], []
        changed, total = torch.zeros((), dtype=torch.int64), 0
        for i, layer in enumerate(self.layers):
            weight = _whole(layer.weight)
            learned = None
            if layer.scales is not None:
                learned = _whole(layer.scales).view(layer.scheme.scale_shape(layer.out_features, layer.in_features))
            codes, scales = layer.scheme.quantize(weight.T if layer.fan_in_fan_out else weight, learned)
            means.append(scales.mean())
            lowest.append(scales.min())
            packed.append(pack_codes(codes, layer.scheme.code_width))
            if self.before:
                before = unpack_codes(self.before[i], codes.shape[-1], layer.scheme.code_width)
                changed = changed.to(codes.device) + (codes != before).sum()
                total += codes.numel()
        result = {"flipped": changed.item() / total} if self.before else {}
        self.before = packed
        return {**result, "scale_mean": torch.stack(means).mean().item(), "scale_min": torch.stack(lowest).min().item()}


def _whole(parameter: Tensor) -> Tensor:
    """Return a parameter as it is, or gathered where FSDP2 has split it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


class MonitoredTrainer(Trainer):
    """A Trainer with more in its log lines, that ends a run which has diverged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        self._watch = CodeWatch(model, getattr(self.args, "watch_layers", 0))
        self._peak = (getattr(self.args, "peak_tflops", None) or 0) * 1e12 or None
        if self._peak is None and self.args.device.type == "cuda" and (self.args.bf16 or self.args.fp16):
            self._peak = peak_flops(torch.cuda.get_device_name(self.args.device))
        self._flops: float | None = None
        self._total_flos: float | None = None  # of a token, as the Trainer counts them
        self._since: float | None = None  # when the time of the next log line began
        self._tokens = 0
        self._batches: list[tuple[Tensor, Tensor]] = []  # losses and tokens of this step
        self._smoothed = self._lowest = self._loss_max = float("-inf")

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Do a micro-batch; keep its loss, for the check at the end of the step, and its number of tokens."""
        ids = inputs["input_ids"]
        if self._since is None:
            if self._peak is not None:
                self._flops = flops_per_token(self.accelerator.unwrap_model(model), ids.shape[-1])
            self._watch.look()
            self._since = time.perf_counter()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append((loss.detach().clone(), ids))
        self._tokens += ids.numel()
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Return what the Trainer adds to ``total_flos``; it would count the parameters in each step."""
        tokens = inputs["input_ids"].numel()
        if self._total_flos is None:
            self._total_flos = super().floating_point_ops(inputs) / max(tokens, 1)
        return int(self._total_flos * tokens)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self._batches:  # none at the end of an epoch, where this is called once more
            self._check(grad_norm)
            self._batches = []
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _check(self, grad_norm: Any) -> None:
        """Count the tokens of this step; raise if it has diverged, in all processes alike.

        Raises:
            FloatingPointError: names the step, and the batch if it is a single one.
        """
        losses = torch.stack([loss.float() for loss, _ in self._batches])
        norm = _whole(grad_norm) if isinstance(grad_norm, Tensor) else torch.tensor(float(grad_norm or 0))
        if self.accelerator.scaler is not None:
            norm = torch.zeros(())  # float16: the scaler tries how far it can go, and skips a step that went too far
        bad = ~(torch.isfinite(losses).all() & torch.isfinite(norm).to(losses.device))
        tokens = losses.new_tensor(sum(ids.numel() for _, ids in self._batches))  # float32: exact up to 16 M
        over_all = torch.stack([losses.sum(), bad.float(), tokens])
        if self.args.world_size > 1:
            torch.distributed.all_reduce(over_all)
        loss, bad_processes, seen = over_all.tolist()
        loss /= self.args.world_size
        if self.args.include_num_input_tokens_seen == "no":  # else the Trainer counts, at more cost
            self.state.num_input_tokens_seen += int(seen)
        if bad_processes:
            raise self._diverged("the loss or its gradient is not finite", losses.tolist(), norm.item())
        smoothed = loss if self._smoothed == float("-inf") else SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        lowest = smoothed if self._lowest == float("-inf") else min(self._lowest, smoothed)
        self._smoothed, self._lowest, self._loss_max = smoothed, lowest, max(self._loss_max, loss)
        rise = getattr(self.args, "max_loss_rise", 0)
        if rise and smoothed > lowest + rise:
            what = f"the loss has climbed from {lowest:.3g} to {smoothed:.3g}, more than --max_loss_rise {rise:g}"
            raise self._diverged(what, losses.tolist(), norm.item())

    def _diverged(self, what: str, losses: list[float], norm: float) -> FloatingPointError:
        """Keep the log and the batches of this step; return the error that names them."""
        step, process = self.state.global_step, self.args.process_index
        folder = self.args.output_dir or "."
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"diverged-{process}.json")
        ids = [tokens.tolist() for _, tokens in self._batches]
        record = {"step": step, "process": process, "losses": losses, "grad_norm": norm, "input_ids": ids}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file)
        self.save_state()
        where = f"step {step}, process {process}"
        bad = [i for i, loss in enumerate(losses) if not torch.isfinite(torch.tensor(loss))]
        if bad:
            where += f", batch {bad[0] + 1} of {len(losses)}"
            tokenizer: Any = self.processing_class
            if hasattr(tokenizer, "decode"):
                where += f", which begins {tokenizer.decode(ids[bad[0]][0][:16])!r}"
        last = last_checkpoint(folder)
        return FloatingPointError(
            f"{what}: {where}; losses {', '.join(f'{loss:.4g}' for loss in losses)}, gradient norm {norm:.4g}. The "
            f"batches of this step are in {path}, the log in trainer_state.json; "
            + (f"{os.path.basename(last)} is the last checkpoint" if last else "there is no checkpoint")
            + ". A lower learning rate or a longer warm-up is what usually helps"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what this module adds to a line of training."""
        if "loss" in logs and self._since is not None:
            rate = self._tokens * self.args.world_size / (time.perf_counter() - self._since)
            if self.args.logging_steps != 1:
                logs["loss_max"] = self._loss_max
            logs["tokens_per_s"] = round(rate)
            if self._flops is not None and self._peak is not None:
                logs["mfu"] = rate * self._flops / (self._peak * self.args.world_size)
            logs.update(self._watch.look())
            self._tokens, self._loss_max, self._since = 0, float("-inf"), time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the time it takes is not that of training."""
        begun = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._pause(begun)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        begun = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self._pause(begun)

    def _pause(self, begun: float) -> None:
        if self._since is not None:
            self._since += time.perf_counter() - begun
