"""The loss of a whole model, with the output head made part of it so that whole logits never exist.

The head cannot simply be called a second time, some tokens at a time: DDP, FSDP2, ZeRO-3 and offloading only promise
its parameters inside the forward of the wrapped model. So the loss goes to where the parameters are. While a loss is
wanted, the forward of the head module hands its input to :func:`fairy2i.training.loss.chunked_loss` and returns, in
place of logits, one number that carries the gradient. With a teacher, the teacher runs right there, and the loss is
made in the forward of *its* head, inside which the parameters of both heads are whole.

Models that do more to their logits than the head (soft-capping in Gemma, a scale in Cohere and Granite) cannot be
handled so. They are found by what they do, not by name: they change the number on its way out. Those take whole logits.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..qat import QATLinear, autocast_dtype
from .loss import Head, check_mixture, chunked_loss, distillation_loss, hidden_loss, next_tokens

logger = logging.getLogger(__name__)

MARK = 1000.0  # what a head returns instead of logits: exact in every float type, and no fixed point of a soft cap

Job = Callable[[nn.Module, Tensor], Tensor | None]


class TappedHead:
    """Puts a job between a model's output head and its input, while there is one.

    Args:
        model: a causal language model of transformers; the forward of its head is replaced, in place.

    Attributes:
        job: called with the head and its input; what it returns is returned by the head, logits if that is None.
        usable: whether the head is a plain or a QAT linear layer, the parameters of which a job may use.
    """

    def __init__(self, model: nn.Module) -> None:
        getter = getattr(model, "get_output_embeddings", None)
        self.head: Any = getter() if getter is not None else None
        self.usable = getattr(type(self.head), "forward", None) in (nn.Linear.forward, QATLinear.forward)
        self.job: Job | None = None
        if self.usable:
            name = "_old_forward" if hasattr(self.head, "_old_forward") else "forward"  # accelerate's hooks go around
            self.plain = getattr(self.head, name)
            setattr(self.head, name, self._forward)

    @torch.compiler.disable
    def _forward(self, hidden: Tensor) -> Tensor:
        output = None if self.job is None else self.job(self.head, hidden)
        return self.plain(hidden) if output is None else output

    def run(self, job: Job, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Return the output of the model (or of what wraps it) with the job done in its head."""
        self.job = job
        try:
            return model(**inputs)
        finally:
            self.job = None


def _head_of(module: Any, hidden: Tensor) -> Head:
    """Return the head as data, (batch, length, features) flattened, in the dtype that the module would use."""
    hidden = hidden.flatten(0, -2)
    weight = module.trained_weight() if isinstance(module, QATLinear) else module.weight
    return Head(hidden.to(autocast_dtype(hidden) or hidden.dtype), weight, module.bias)


class Objective:
    """The training loss of a causal language model: cross-entropy, mixed with distillation where there is a teacher.

    Call it with the model, as wrapped for training, and a batch. Equal to the plain loss but for rounding.

    Args:
        student: the model that is trained, without wrappers; its output head is tapped.
        teacher: the unquantized model, already where it shall run (:func:`fairy2i.training.teacher.place_teacher`).
        distill, temperature: share of the divergence, and what softens it; see :mod:`fairy2i.training.loss`.
        hidden: weight of the hidden-state term.
        chunk: tokens at a time; 0 takes whole logits.

    Raises:
        ValueError: a setting is out of range, or asks for a teacher where there is none.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        distill: float = 0.0,
        temperature: float = 1.0,
        hidden: float = 0.0,
        chunk: int = 1024,
    ) -> None:
        check_mixture(distill, temperature)
        if hidden < 0 or chunk < 0:
            raise ValueError("the weight of the hidden-state term and the tokens of a chunk must not be negative")
        if teacher is None and (distill or hidden):
            raise ValueError("distillation needs a teacher")
        self.teacher, self.chunk = teacher, chunk
        self.distill, self.temperature, self.hidden = distill, temperature, hidden
        self.student_head = TappedHead(student)
        self.teacher_head = None if teacher is None else TappedHead(teacher)
        taps = [tap for tap in (self.student_head, self.teacher_head) if tap is not None]
        if hidden and not all(tap.usable for tap in taps):
            raise ValueError("the hidden-state term needs linear output heads; one of these is not")
        self.chunked = bool(chunk) and all(tap.usable for tap in taps)
        if chunk and not self.chunked:
            logger.info("an output head is not a linear layer: the loss takes whole logits")
        self.proved = False

    def _teach(self, job: Job, inputs: Mapping[str, Any], device: str) -> Any:
        assert self.teacher is not None and self.teacher_head is not None
        with torch.no_grad(), torch.autocast(device, enabled=False):  # it computes in the dtype it was given
            return self.teacher_head.run(job, self.teacher, inputs)

    def _in_chunks(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, count: Any
    ) -> tuple[Tensor | None, Any]:
        """Return the loss, or None where this model does not allow it, and the output of the model."""
        targets = next_tokens(labels).flatten()
        losses: list[Tensor] = []
        answers: list[Tensor] = []

        def total(student: Head, teacher: Head | None) -> Tensor:
            loss = chunked_loss(
                student,
                targets,
                teacher,
                weight=self.distill,
                temperature=self.temperature,
                count=count,
                chunk=self.chunk,
            )
            if self.hidden and teacher is not None:
                loss = loss + self.hidden * hidden_loss(student.hidden, teacher.hidden, targets, count)
            return loss

        def in_student(module: nn.Module, hidden: Tensor) -> Tensor | None:
            if hidden.shape[:-1] != labels.shape:
                return None
            student = _head_of(module, hidden)
            if self.teacher is None:
                losses.append(total(student, None))
            else:

                def in_teacher(module: nn.Module, hidden: Tensor) -> Tensor | None:
                    if hidden.shape[:-1] != labels.shape:
                        return None
                    teacher = _head_of(module, hidden)
                    with torch.enable_grad():
                        losses.append(total(student, teacher))
                    return hidden.new_full((*labels.shape, 1), MARK)

                answers.append(self._teach(in_teacher, inputs, hidden.device.type).logits)
            if not losses:
                return None
            carrier = losses[0] - losses[0].detach() + MARK
            return carrier.expand(*labels.shape, 1).clone()  # FSDP2 warns of views

        output = self.student_head.run(in_student, model, inputs)
        answers.append(output.logits)
        if not self.proved:  # once: looking at a number waits for the device
            if len(losses) != 1 or any(bool((a != MARK).any()) or a.shape != (*labels.shape, 1) for a in answers):
                return None, output
            self.proved = True
        carrier = output.logits.flatten()[0].float()
        return losses[0].detach() + (carrier - carrier.detach()), output

    def _whole(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, count: Any) -> tuple[Tensor, Any]:
        """Return the loss from the logits of all tokens, and the output of the model."""
        hidden: list[Tensor] = []

        def keep(module: nn.Module, x: Tensor) -> None:
            hidden.append(x.flatten(0, -2))

        output = self.student_head.run(keep, model, inputs)
        if self.teacher is None:
            teacher = output.logits.detach()
        else:
            teacher = self._teach(keep, inputs, labels.device.type).logits
        loss = distillation_loss(
            output.logits, teacher, labels, weight=self.distill, temperature=self.temperature, count=count
        )
        if self.hidden:
            loss = loss + self.hidden * hidden_loss(hidden[0], hidden[1], next_tokens(labels).flatten(), count)
        return loss, output

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], count: Tensor | float | None = None
    ) -> tuple[Tensor, Any]:
        """Return the loss of a batch, a float32 scalar, and the output of the model (not its logits, where chunked).

        Args:
            model: the student, or what wraps it.
            batch: ``labels`` int64 (batch, length), -100 where nothing is to be predicted, and the model's inputs.
            count: what to divide the summed loss by; the number of predicted tokens if None.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]
        if self.chunked:
            loss, output = self._in_chunks(model, inputs, labels, count)
            if loss is not None:
                return loss, output
            del output
            self.chunked = False
            logger.warning("the model does more to its logits than its output head: the loss takes whole logits")
        return self._whole(model, inputs, labels, count)
