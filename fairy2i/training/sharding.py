"""What training over several processes needs beyond its wrappers: a teacher in parts, and scales that stay exact."""

import logging
from typing import Any

import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..qat import QATLinear

logger = logging.getLogger(__name__)


def place_teacher(
    teacher: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    shard: bool = False,
    offload: bool = False,
    compile_blocks: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a model ready to be learned from, in place, and return it: frozen, in evaluation mode, and where it fits.

    Args:
        teacher: a causal language model of transformers.
        device: where it computes.
        dtype: of its weights and its computation; None leaves it.
        shard: divide it over the processes of the default group with FSDP2, one unit for each block; the blocks are
            gathered one after the other. Parameters of the blocks may be on any device, also all on the CPU.
        offload: keep the weights in CPU memory (its part of them with ``shard``) and bring them to the device layer by
            layer, in each forward.
        compile_blocks: arguments of torch.compile for its blocks, where it is neither divided nor offloaded; None
            leaves them as they are.
    """
    teacher.requires_grad_(False).eval()
    if (config := getattr(teacher, "config", None)) is not None:
        config.get_text_config().use_cache = False  # nothing reads it, and its blocks would be compiled one by one
    teacher.to(dtype=dtype)
    names = set(getattr(teacher, "_no_split_modules", None) or ())
    blocks = [module for module in teacher.modules() if type(module).__name__ in names]
    if shard:
        options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy(pin_memory=device.type != "cpu")}
        options = options if offload and device.type != "cpu" else {}
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(teacher, **options)
        return teacher
    if offload:
        teacher.to("cpu")
        return cpu_offload(teacher, execution_device=device)
    if compile_blocks is not None:
        for block in blocks:
            block.compile(**compile_blocks)
    return teacher.to(device)


class _ExactScales:
    """Gathers learned scales in float32 before a forward."""

    def __init__(self, layers: list[QATLinear]) -> None:
        self.layers = layers
        self.shards: list[Any] = [layer.scales for layer in layers]

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        for i, layer in enumerate(self.layers):
            if isinstance(layer.scales, DTensor):  # else FSDP2 keeps the layer whole a little longer
                self.shards[i] = layer.scales
            whole: Tensor = self.shards[i].full_tensor()
            old = layer.exact_scales
            if old is None or old.device != whole.device:
                layer.exact_scales = whole.clone()
            else:
                old.copy_(whole)  # in place: a compiled forward knows this tensor


def keep_scales_exact(model: nn.Module) -> nn.Module:
    """Let learned scales take part in the forward as float32 under an FSDP2 policy that casts parameters to bfloat16.

    FSDP2 casts all parameters of a unit alike before it gathers them. Scales rounded to 8 bits would move all weights
    of a group at once. So before each forward they are gathered a second time, unrounded, and the layers use those; the
    gradient takes the usual way. Costs one small collective for each layer and forward, and the scales' memory. Does
    nothing on models that FSDP2 does not shard.

    Args:
        model: as returned by FSDP2's ``fully_shard`` or ``Accelerator.prepare``; changed in place, and returned.
    """
    layers = [module for module in model.modules() if isinstance(module, QATLinear) and module.scales is not None]
    if layers and all(isinstance(layer.scales, DTensor) for layer in layers):
        model.register_forward_pre_hook(_ExactScales(layers), prepend=True)
    return model
