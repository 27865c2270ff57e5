"""Quantization-aware training on the Hugging Face Trainer: arguments, and one function that runs them."""

import copy
import dataclasses
import fnmatch
import itertools
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, default_data_collator, set_seed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from ..allocate import CHOICE_TOKENS, allocate_stages
from ..calibrate import calibrate
from ..convert import Method, replace_modules_for_qat
from ..integrations.transformers import Fairy2iConfig
from ..loading import (
    check_learned_rows,
    check_phase_codes,
    context_length,
    load_config,
    load_model_and_tokenizer,
    local_files,
    move_to_device,
    parse_method,
    read_documents,
)
from ..qat import QATLinear
from ..reuse import Kept, Reuse, reuse_quantized
from .anneal import Anneal
from .callbacks import LogLines, StopAndSave
from .checkpoints import STATE, WholeCheckpoints, checkpoints, last_checkpoint
from .dampen import Dampen
from .data import TokenBlocks, tokenize_documents
from .heldout import HeldOutLoss
from .monitor import MonitoredTrainer
from .objective import Objective
from .schedule import parse_schedule, segment_scheduler
from .sharding import keep_scales_exact, place_teacher
from .shards import is_prepared, prepared_blocks
from .sources import is_table, read_sources
from .stream import check_source, stream_blocks

logger = logging.getLogger(__name__)

SMALL = 1 << 30  # bytes of dense quantized weights that are kept without being asked for
PRECISION = "ACCELERATE_MIXED_PRECISION"
SHARDED_LAUNCH = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # "true" where accelerate launched it so


@dataclass
class QATArguments:
    """What to train, how it is quantized, and on what text."""

    model: str = field(default="", metadata={"help": "Model to start from: a folder or a Hub id."})
    gguf_file: str | None = field(default=None, metadata={"help": "A GGUF file inside the model folder to load."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, if it does not lie with the model."})
    quant_method: str = field(
        default="complex_phase_v2",
        metadata={"help": "Method name, 'none', or JSON: a scheme, or a mapping of module patterns to methods."},
    )
    skip_lm_head: bool | None = field(
        default=None, metadata={"help": "Leave the output head in full precision. Default: only where it is tied."}
    )
    skip_modules: list[str] = field(default_factory=list, metadata={"help": "Patterns of layers to leave alone."})
    calibrate_tokens: int = field(
        default=0,
        metadata={"help": "Tokens of --data to calibrate on before training (learned row scales only). 0: none."},
    )
    bits: float | None = field(
        default=None,
        metadata={
            "help": "Mean bits per weight of the quantized layers, scales counted: each layer gets 1 to 4 stages of "
            "--quant_method, more where the first tokens of --data say that they lower the loss more."
        },
    )
    distill: float = field(
        default=0.0,
        metadata={"help": "Share of the loss that is KL to the unquantized model, 0 to 1 (try 0.5)."},
    )
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of the distillation."})
    distill_hidden: float = field(
        default=0.0,
        metadata={"help": "Weight of the relative squared distance to the teacher's last hidden states."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Model to distil from, with the same tokenizer. Default: --model before it is quantized."},
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "What the teacher computes in. auto: bfloat16 with --bf16, else its own."}
    )
    teacher_offload: bool = field(
        default=False, metadata={"help": "Keep the teacher in CPU memory and bring it to the device layer by layer."}
    )
    loss_chunk_tokens: int = field(
        default=1024, metadata={"help": "Tokens at a time that get logits, so that a large vocabulary fits. 0: all."}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Globs of parameter names to leave untrained, as '*embed_tokens*'."}
    )
    data: str = field(
        default="",
        metadata={"help": "Training text: file, folder, glob, Hub data set (id:config), or shards."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Tokenize --data while training, from the sources; needs --max_steps."}
    )
    data_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Held-out text; its perplexity is measured at the end and, with --eval_steps, on the way."},
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split of a Hub data set in --eval_data, as validation or test. Default: --data_split."},
    )
    block_size: int = field(default=2048, metadata={"help": "Tokens in a block."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize. Default: all cores."})
    resume: bool = field(
        default=False,
        metadata={
            "help": "Go on from the last complete checkpoint in output_dir; start afresh where there is none. "
            "--resume_from_checkpoint names another one."
        },
    )


@dataclass
class QATTrainingArguments(TrainingArguments):
    """TrainingArguments with the optimizer settings of the paper as defaults; bf16 where the GPU has it."""

    output_dir: str = field(default="outputs/qat", metadata={"help": "Where checkpoints and the model go."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the checkpoint to go on from, in output_dir or not; it must be there. --resume finds "
            "the last one in output_dir by itself."
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # a bool from __post_init__ on
        default=None, metadata={"help": "Compute in bfloat16 (autocast). Default: where the GPU has it."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    max_grad_norm: float = field(default=2.0, metadata={"help": "Gradient norm to clip at."})
    scale_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of learned scales. Default: a quarter of learning_rate."}
    )
    anneal: float = field(
        default=0.0,
        metadata={
            "help": "Part of the steps, from the first on, over which the forward goes from the unquantized weights to "
            "the quantized ones, 0 to 1 (try 0.25)."
        },
    )
    dampen: float = field(
        default=0.0,
        metadata={
            "help": "Pull weights to their quantized values behind each step, by the learning rate times this times "
            "the part of the steps that is done (try 5, at two stages and more)."
        },
    )
    lr_schedule: str | None = field(
        default=None,
        metadata={
            "help": "Schedule as segments [last step, factor of the peak, shape]: linear, cosine or none to hold, as "
            '[[300, 1.0, "linear"], [8000, 1.0], [10000, 0.1667, "cosine"]]. It takes the place of lr_scheduler_type.'
        },
    )
    reuse_quantized: Literal["auto", "off", "codes", "dense"] = field(
        default="auto",
        metadata={
            "help": "Keep quantized weights over the micro-batches of a step and over an evaluation: as codes (a byte "
            "for 4 weights at up to 2 stages) or dense. auto: dense where that takes at most 1 GiB, else codes, in "
            "steps of more than one micro-batch."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite from the log. They end the run here."}
    )
    max_loss_rise: float = field(
        default=4.0,
        metadata={"help": "Stop where the smoothed loss is so far above its lowest; 0 never stops for that."},
    )
    watch_layers: int = field(
        default=8,
        metadata={"help": "Layers whose codes and scales the log lines tell of, 0 for none, -1 for all."},
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "Peak TFLOP/s of a device, for the model FLOP utilization. Default: from a table of GPUs."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            able = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.bf16 = able and not self.fp16
        elif not self.bf16 and os.environ.get(PRECISION) == "bf16":
            os.environ[PRECISION] = "no"  # the flag wins over the file of `accelerate launch`, which has put it there
        if not 0 <= self.anneal <= 1:
            raise ValueError(f"--anneal {self.anneal} is no part of the steps; it is from 0 to 1")
        if not 0 <= self.dampen < math.inf:
            raise ValueError(f"--dampen {self.dampen} would push weights away; it is 0 or more")
        if self.dampen and _is_sharded(self):
            raise ValueError("--dampen needs whole weights; leave it out with FSDP and DeepSpeed")
        if self.lr_schedule:
            parse_schedule(self.lr_schedule)
            if self.warmup_steps:
                raise ValueError("--lr_schedule has the warm-up in it; leave out --warmup_steps")
        if self.eval_steps and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        check_report_to(self.report_to)


def check_report_to(names: Any) -> None:
    """Check that what shall get the log is installed.

    Raises:
        ValueError: one is not, or nobody knows it.
    """
    there = get_available_reporting_integrations()
    for name in names or []:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report_to {name}: unknown. There are none, all, {known}")
        if name not in there and name != "azure_ml":  # of two packages, of which only one is asked for
            raise ValueError(f"--report_to {name}: the package is not installed; pip install {name.replace('_', '-')}")


class QATTrainer(MonitoredTrainer, WholeCheckpoints, HeldOutLoss):
    """The Hugging Face Trainer for token blocks; train, evaluate and save with it as usual.

    Args:
        teacher: the unquantized model to distil from, or None for plain cross-entropy. It is moved to the device of
            training, and divided over the processes as the student is where that is FSDP2; never trained.
        distill, distill_temperature, distill_hidden: see :mod:`fairy2i.training.loss`.
        teacher_dtype: what the teacher computes in; None for bfloat16 where training is, else its own.
        teacher_offload: keep the teacher in CPU memory between its layers' turns.
        loss_chunk_tokens: tokens at a time that get logits; 0 for all.
        kwargs: as for Trainer.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module | None = None,
        distill: float = 0.0,
        distill_temperature: float = 1.0,
        distill_hidden: float = 0.0,
        teacher_dtype: torch.dtype | None = None,
        teacher_offload: bool = False,
        loss_chunk_tokens: int = 1024,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = default_data_collator  # blocks are of one length: nothing to pad
        super().__init__(**kwargs)
        self.objective: Objective | None = None
        self.objective_settings: dict[str, Any] = {
            "distill": distill,
            "temperature": distill_temperature,
            "hidden": distill_hidden,
            "chunk": loss_chunk_tokens if self.args.n_gpu <= 1 else 0,  # DataParallel would gather the logits
        }
        self.teacher = teacher
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        fsdp2 = plugin is not None and plugin.fsdp_version == 2
        if fsdp2 and plugin.mixed_precision_policy is not None:  # as DDP does; accelerate would round gradients
            policy = dataclasses.replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
            plugin.mixed_precision_policy = policy
        if teacher is not None:
            if plugin is not None and plugin.cpu_ram_efficient_loading:
                raise ValueError(
                    "fsdp_cpu_ram_efficient_loading leaves the teacher without weights in all processes but the first; "
                    "set it to false"
                )
            dtype = teacher_dtype or (torch.bfloat16 if self.args.bf16 else None)
            how = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
            how = {name: value for name, value in how.items() if value}
            place_teacher(
                teacher,
                self.args.device,
                dtype,
                shard=fsdp2,
                offload=teacher_offload,
                compile_blocks=how if self.args.torch_compile else None,
            )
            self.model_accepts_loss_kwargs = True  # the sum is divided by the tokens of all accumulated batches

        self._small: bool | None = None  # not known yet
        part = getattr(self.args, "anneal", 0.0)  # plain TrainingArguments do not have it
        self._anneal = Anneal(self._plain_model(), part)
        if part:
            self.add_callback(self._anneal)
        if strength := getattr(self.args, "dampen", 0.0):
            self.add_callback(Dampen(self._plain_model(), strength))
        self._reuse: Any = None
        self._open = False  # the scope of it: from the first to the last micro-batch of a step

    def _kept(self, steps: bool) -> Kept | None:
        """Return how to keep quantized weights over the micro-batches of a step, or over an evaluation; None: not."""
        if steps and self._anneal.active:  # what they multiply with is not the quantized weight
            return None
        asked = getattr(self.args, "reuse_quantized", "auto")
        if self.is_deepspeed_enabled or self.args.n_gpu > 1:  # weights in parts; replicas on other devices
            return None
        if asked == "auto" and self._dense_is_small():
            asked = "dense"
        if steps and asked == "auto" and self.args.gradient_accumulation_steps == 1:
            return None
        between = [callback for callback in self.callback_handler.callbacks if _is_called_between(callback)]
        if steps and between:
            return None  # they run between micro-batches, and could write weights past all notice
        kept: dict[str, Kept] = {"auto": "codes", "codes": "codes", "dense": "dense"}
        return kept.get(asked)

    def _plain_model(self) -> Any:
        """Return the model that is trained, without wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _dense_is_small(self) -> bool:
        """Return whether dense quantized weights of all layers take little beside what training takes anyway."""
        if self._small is None:
            layers = [module for module in self._plain_model().modules() if isinstance(module, QATLinear)]
            width = 2 if self.args.bf16 or self.args.fp16 else 4
            size = width * sum(layer.weight.numel() for layer in layers)
            self._small = size <= SMALL and not _is_sharded(self.args)
        return self._small

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do a micro-batch, with weights quantized in the first one of the step; the last one lets go of them."""
        if self._anneal.active:
            self._lowest = float("-inf")  # the loss climbs from that of the unquantized model: no divergence
        if self._open:
            self._reuse.refresh_all()
        elif (kept := self._kept(steps=True)) is not None:
            if self._reuse is None or self._reuse.what != kept:
                dtype = torch.bfloat16 if self.args.bf16 else None
                # elsewhere the gradient of a weight is not that of one backward, and the scales' would be rounded anew
                single = self.args.world_size == self.args.gradient_accumulation_steps == 1
                self._reuse = Reuse(model, kept, dtype, graph=kept == "dense", defer=single)
            self._reuse.begin()
            self._open = True
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            self._let_go()
            raise
        if self.accelerator.sync_gradients:  # the optimizer is next
            if self._open:
                self._reuse.scale_gradients()
            self._let_go()
        return loss

    def _let_go(self) -> None:
        if self._open:
            self._reuse.end()
            self._open = False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with weights quantized once."""
        self._let_go()
        kept = self._kept(steps=False)
        if kept is None:
            return super().evaluation_loop(*args, **kwargs)
        model: Any = self.model
        with reuse_quantized(model, kept, torch.bfloat16 if self.args.bf16 else None):
            return super().evaluation_loop(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer that the arguments ask for, with learned scales in a group of their own, undecayed."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        owner: Any = model if model is not None else self.model
        layers = [module for module in owner.modules() if isinstance(module, QATLinear)]
        scales = [layer.scales for layer in layers if layer.scales is not None and layer.scales.requires_grad]
        if fresh and scales:
            mine = set(map(id, scales))
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in mine]
            rate = getattr(self.args, "scale_learning_rate", None)  # plain TrainingArguments do not have it
            rate = self.args.learning_rate / 4 if rate is None else rate
            optimizer.add_param_group({"params": scales, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Return the scheduler of ``lr_schedule``, if that is given, or the one of the usual arguments."""
        schedule = getattr(self.args, "lr_schedule", None)
        if schedule and self.lr_scheduler is None:
            segments = parse_schedule(schedule)
            if segments[-1].until > num_training_steps:
                logger.warning("lr_schedule has %d steps, training %d", segments[-1].until, num_training_steps)
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = segment_scheduler(chosen, segments)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Return the loss of a batch; held-out loss is always plain cross-entropy."""
        if not model.training or (self.teacher is None and (return_outputs or not self._loss_in_chunks(model))):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        if self.objective is None:  # now the model is wrapped
            keep_scales_exact(model)
            self.objective = Objective(self._plain_model(), self.teacher, **self.objective_settings)
        count = num_items_in_batch
        if self.args.average_tokens_across_devices and count is not None:
            count = count / self.accelerator.num_processes  # as Trainer: gradients are averaged over the processes
        loss, outputs = self.objective(model, inputs, count)
        return (loss, outputs) if return_outputs else loss

    def _loss_in_chunks(self, model: nn.Module) -> bool:
        """Return whether the loss that the model itself would make can be made in chunks."""
        if self.objective is not None:
            return self.objective.chunked
        student = self._plain_model()
        return (
            self.objective_settings["chunk"] > 0
            and self.label_smoother is None
            and self.compute_loss_func is None
            and getattr(student, "loss_function", None) is ForCausalLMLoss
            and not getattr(student.config, "output_router_logits", False)  # their balance is part of the loss
        )


def _is_called_between(callback: TrainerCallback) -> bool:
    return type(callback).on_substep_end is not TrainerCallback.on_substep_end


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match a shell-style glob out of training, in place.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise ValueError(f"--freeze: no parameter matches {pattern!r}; names look like {next(iter(parameters))!r}")
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("--freeze leaves nothing to train")


def _checkpoint_to_resume(args: TrainingArguments, resume: bool) -> str | None:
    """Return the checkpoint to go on from, or None to start afresh.

    Raises:
        ValueError: there are checkpoints and nobody said to resume, or the one that was named is not there.
    """
    if named := args.resume_from_checkpoint:
        if not os.path.isfile(os.path.join(named, STATE)):
            raise ValueError(f"--resume_from_checkpoint {named} is no checkpoint: it has no {STATE}")
        return named
    there = checkpoints(args.output_dir or "")
    if there and not resume:
        raise ValueError(
            f"{args.output_dir} already has {os.path.basename(there[-1])}; add --resume to go on from it, or "
            "choose another --output_dir"
        )
    last = last_checkpoint(args.output_dir or "") if resume else None
    if resume and last is None:
        logger.warning("nothing to resume in %s, starting afresh", args.output_dir)
    return last


def _check_same_method(checkpoint: str, model: nn.Module) -> None:
    """Raise unless a checkpoint is of a model that is quantized as this one is.

    Raises:
        ValueError: names the checkpoint.
    """
    with open(os.path.join(checkpoint, "config.json"), encoding="utf-8") as file:
        saved = json.load(file).get("quantization_config")
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if saved != (config and config.to_dict()):
        raise ValueError(f"{checkpoint} was trained with another quant_method; give the same one to resume")


def _check_distillation(qat: QATArguments, quantizes: bool) -> bool:
    """Return whether there is to be a teacher, after a look at its settings.

    Raises:
        ValueError: a setting is out of range, they do not fit together, or the teacher is a quantized model.
    """
    if not 0 <= qat.distill <= 1 or qat.distill_temperature <= 0 or qat.distill_hidden < 0:
        raise ValueError(
            "--distill must be between 0 and 1, --distill_temperature above 0, --distill_hidden not negative"
        )
    if not qat.distill and not qat.distill_hidden:
        if qat.teacher:
            raise ValueError("--teacher says from what to distil but not how much; give --distill too (try 0.5)")
        return False
    if not qat.teacher and not quantizes:
        raise ValueError("--distill needs a --quant_method: an unquantized model has nothing to learn from itself")
    config = load_config(qat.teacher) if qat.teacher else load_config(qat.model, qat.gguf_file)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"--distill needs an unquantized teacher, and {qat.teacher or qat.model} is quantized; name the model that "
            "it came from with --teacher"
        )
    return True


def _is_sharded(args: TrainingArguments) -> bool:
    """Return whether the model will be divided over the processes."""
    return bool(args.fsdp or args.deepspeed or any(os.environ.get(name) == "true" for name in SHARDED_LAUNCH))


def _of_one_process(flag: str, args: TrainingArguments, method: Method | None) -> Method:
    """Return the method, or raise ValueError where there is none or several processes share the model."""
    if method is None or args.world_size > 1 or _is_sharded(args):
        raise ValueError(
            f"{flag} is for one process and a quantized model; for more processes train one step with it in one "
            "process, and start the others from the model that it saves"
        )
    return method


def _check_calibration(qat: QATArguments, args: TrainingArguments, method: Method | None) -> None:
    """Raise if calibration is asked for where it cannot be.

    Raises:
        ValueError: says what it needs.
    """
    if not qat.calibrate_tokens:
        return
    method = _of_one_process("--calibrate_tokens", args, method)
    check_learned_rows(method)
    if qat.calibrate_tokens < qat.block_size:
        raise ValueError(f"--calibrate_tokens {qat.calibrate_tokens} is less than one block of {qat.block_size}")


def _check_bits(qat: QATArguments, args: TrainingArguments, method: Method | None) -> None:
    """Raise if stages are to be chosen where they cannot be.

    Raises:
        ValueError: says what it needs.
    """
    if qat.bits is None:
        return
    check_phase_codes(_of_one_process("--bits", args, method))


def _check_data(qat: QATArguments, max_steps: int) -> None:
    """Find the texts, without reading them.

    Raises:
        ValueError, FileNotFoundError: one is not there, or cannot be used as the settings say.
    """
    check_source(qat.data, qat.streaming, max_steps)
    if qat.streaming:
        read_sources(qat.data, split=qat.data_split, text_column=qat.text_column)
    elif not is_prepared(qat.data):
        local_files(qat.data)
    if qat.eval_data and is_table(qat.eval_data):
        raise ValueError(f"--eval_data {qat.eval_data} is a table of subsets; `fairy2i prepare` it first")
    if qat.eval_data and not is_prepared(qat.eval_data):
        local_files(qat.eval_data)


def _check_arguments(qat: QATArguments, args: QATTrainingArguments) -> tuple[Method | None, bool, str | None]:
    """Check all that can be told before weights are loaded and texts are read.

    Returns:
        The method, whether there is to be a teacher, and the checkpoint to go on from.

    Raises:
        ValueError, FileNotFoundError: an argument is missing or wrong; the message says what to give instead.
    """
    for name in ("model", "data"):
        if not getattr(qat, name):
            raise ValueError(f"--{name} is missing; give it on the command line or in the --config file")
    if args.eval_strategy != "no" and not qat.eval_data:
        raise ValueError("--eval_steps and --eval_strategy need --eval_data")
    if qat.loss_chunk_tokens < 0:
        raise ValueError("--loss_chunk_tokens must not be negative")
    method = parse_method(qat.quant_method)
    _check_data(qat, args.max_steps)
    checkpoint = _checkpoint_to_resume(args, qat.resume)
    context = context_length(load_config(qat.model, qat.gguf_file))
    if qat.block_size < 2:
        raise ValueError(f"--block_size must be at least 2, got {qat.block_size}")
    if context and qat.block_size > context:
        raise ValueError(f"--block_size {qat.block_size} is longer than the model's context of {context}")
    _check_calibration(qat, args, method)
    _check_bits(qat, args, method)
    return method, _check_distillation(qat, method is not None), checkpoint


def _load_teacher(qat: QATArguments, model: nn.Module, tokenizer: Any) -> nn.Module:
    """Return the model to distil from: the one of --teacher, or a copy of ``model``, which is as it was loaded.

    Raises:
        ValueError: the tokenizers differ.
    """
    if not qat.teacher:
        return copy.deepcopy(model)
    teacher, its_tokenizer = load_model_and_tokenizer(qat.teacher)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {qat.teacher} has another vocabulary than {qat.model}")
    return teacher


def _load_blocks(source: str, split: str, qat: QATArguments, model: Any, tokenizer: Any) -> TokenBlocks:
    """Return the token blocks of a text, or of shards."""
    if is_prepared(source):
        return prepared_blocks(source, qat.block_size, tokenizer, model.config.get_text_config().vocab_size)
    documents = read_documents(source, split=split, text_column=qat.text_column)
    tokens = tokenize_documents(documents, tokenizer, qat.num_proc or os.cpu_count())
    return TokenBlocks(tokens, qat.block_size, tokenizer.eos_token_id)


def _load_data(
    qat: QATArguments, args: QATTrainingArguments, model: Any, tokenizer: Any
) -> tuple[Any, TokenBlocks | None]:
    """Return the blocks to train on, streamed or not, and those to evaluate on, if any.

    The first process of a machine goes first: the others find in the cache of ``datasets`` what it has tokenized.

    Raises:
        ValueError: a text cannot be read, is too short, or does not belong to this tokenizer.
    """
    with args.main_process_first(desc="tokenizing"):
        if qat.streaming:
            subsets, *_ = read_sources(qat.data, split=qat.data_split, text_column=qat.text_column)
            seed = args.seed if args.data_seed is None else args.data_seed
            train_data: Any = stream_blocks(subsets, tokenizer, qat.block_size, seed=seed)
        else:
            train_data = _load_blocks(qat.data, qat.data_split, qat, model, tokenizer)
        if not qat.eval_data:
            return train_data, None
        return train_data, _load_blocks(qat.eval_data, qat.eval_split or qat.data_split, qat, model, tokenizer)


def _first_blocks(data: Any, tokens: int, block_size: int) -> Tensor:
    """Return the first blocks of the training text, int64 (blocks, block_size): at most so many tokens, or one block.

    Raises:
        ValueError: there is no block.
    """
    count = max(tokens // block_size, 1)
    blocks = [torch.as_tensor(block["input_ids"]) for block in itertools.islice(iter(data), count)]
    if not blocks:
        raise ValueError("the text has not one block to calibrate on")
    return torch.stack(blocks).long()


def _calibrate(model: nn.Module, tokens: Tensor) -> None:
    """Calibrate a converted model on the first blocks of the training text, in place.

    Raises:
        ValueError: there is a layer without learned row scales.
    """
    done = calibrate(model, tokens)
    before, after = (sum(getattr(layer, when) for layer in done) / len(done) for when in ("before", "after"))
    logger.info("calibrated %d layers on %d tokens: mean error %.4f -> %.4f", len(done), tokens.numel(), before, after)


def _saved_conversion(checkpoint: str) -> tuple[Method, bool | None, list[str]]:
    """Return what replace_modules_for_qat is to be told to convert a model as that of a checkpoint."""
    with open(os.path.join(checkpoint, "config.json"), encoding="utf-8") as file:
        config = Fairy2iConfig(**(json.load(file).get("quantization_config") or {}))
    return config.method, config.skip_lm_head, config.skip_modules


def run_training(qat: QATArguments, args: QATTrainingArguments) -> dict[str, float]:
    """Load a model, quantize it, train it, save it.

    The trained model, its tokenizer and ``train_results.json`` lie in ``args.output_dir`` afterwards.

    Returns:
        The metrics of the Trainer, with ``train_tokens`` and, where there is held-out text, ``eval_perplexity``.

    Raises:
        ValueError, FileNotFoundError: an argument is missing or wrong; the message says what to give instead.
    """
    method, distils, checkpoint = _check_arguments(qat, args)
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(qat.model, gguf_file=qat.gguf_file, tokenizer=qat.tokenizer)
    teacher = _load_teacher(qat, model, tokenizer) if distils else None
    if not _is_sharded(args):  # else it may not fit on one device
        move_to_device(model, args.device)  # learned scales are fitted where that is fast
    skip_lm_head, skip_modules, data = qat.skip_lm_head, qat.skip_modules, None
    if qat.bits is not None and checkpoint:  # the choice was made: another run of it may come out otherwise on a GPU
        method, skip_lm_head, skip_modules = _saved_conversion(checkpoint)
    elif qat.bits is not None and method is not None:
        data = _load_data(qat, args, model, tokenizer)
        some = _first_blocks(data[0], CHOICE_TOKENS, qat.block_size)
        method = allocate_stages(model, some, method, qat.bits, skip_lm_head=skip_lm_head, skip_modules=skip_modules)
    if method is not None:
        logger.info("%s", replace_modules_for_qat(model, method, skip_lm_head, skip_modules))
    freeze_parameters(model, qat.freeze)
    if checkpoint:
        _check_same_method(checkpoint, model)
        logger.info("resuming from %s", checkpoint)
    train_data, eval_data = data or _load_data(qat, args, model, tokenizer)
    if qat.calibrate_tokens and checkpoint is None:
        _calibrate(model, _first_blocks(train_data, qat.calibrate_tokens, qat.block_size))

    use_cache = getattr(model.config, "use_cache", None)  # the Trainer turns it off
    trainer = QATTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        teacher=teacher,
        distill=qat.distill,
        distill_temperature=qat.distill_temperature,
        distill_hidden=qat.distill_hidden,
        teacher_dtype=None if qat.teacher_dtype == "auto" else getattr(torch, qat.teacher_dtype),
        teacher_offload=qat.teacher_offload,
        loss_chunk_tokens=qat.loss_chunk_tokens,
    )
    for lines in (PrinterCallback, ProgressCallback):  # dicts, and a bar that fills log files
        trainer.remove_callback(lines)
    trainer.add_callback(LogLines())
    stop = StopAndSave()
    trainer.add_callback(stop)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        stop.on_train_end(args, trainer.state, trainer.control)  # an error in training comes past the callback
    metrics = dict(result.metrics)
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        logger.warning("stopped at step %d of %d; --resume goes on", trainer.state.global_step, trainer.state.max_steps)
        return metrics
    metrics["train_tokens"] = trainer.state.num_input_tokens_seen
    if eval_data is not None:
        metrics |= trainer.evaluate()
    if use_cache is not None:
        model.config.use_cache = use_cache
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics
