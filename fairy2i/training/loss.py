"""The training loss: cross-entropy, and distillation from the unquantized model.

    loss = (1 - a) CE(labels, student) + a t^2 KL(softmax(teacher / t) || softmax(student / t)) + h H

with mixing weight a and temperature t (arXiv 1503.02531), averaged over the predicted tokens. H compares what goes into
the two output heads, per token |student - teacher|^2 / |teacher|^2: the squared error of TinyBERT's hidden-state term
(arXiv 1909.10351) on the last state alone, which DistilBERT (arXiv 1910.01108) found to be enough, relative so that h
means the same for every model.

A vocabulary of 150,000 makes logits of 1.2 GB in float32 for 2048 tokens, and the loss holds several of that size.
:func:`chunked_loss` goes from the inputs of the head to the loss some tokens at a time, and makes the gradients in the
same pass, as a fused cross-entropy does (arXiv 2410.10989): on a GPU by a kernel that reads logits twice and writes
once (:mod:`fairy2i.ops.triton.loss`), where PyTorch's operations go over them some twenty times. It is written here
because torch's `linear_cross_entropy` (from 2.13 on) and the fused losses of other libraries have no mixture with a
divergence from a second head, and not all of them run on a CPU.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..ops.training import has_kernels

IGNORE_INDEX = -100  # the label of a token that is not to be predicted, as in transformers


class Head(NamedTuple):
    """The input and the parameters of an output head: logits = hidden weight^T + bias."""

    hidden: Tensor  # (tokens, features), in the dtype that the product is made in
    weight: Tensor  # (vocabulary, features), any dtype
    bias: Tensor | None  # (vocabulary,)

    def cast(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in the dtype of the input, without their graph."""
        dtype = self.hidden.dtype
        return self.weight.detach().to(dtype), None if self.bias is None else self.bias.detach().to(dtype)


def check_mixture(weight: float, temperature: float) -> None:
    """Raise ValueError unless weight is in [0, 1] and temperature positive."""
    if not 0 <= weight <= 1 or temperature <= 0:
        raise ValueError(f"weight must be in [0, 1] and temperature positive, got {weight} and {temperature}")


def next_tokens(labels: Tensor) -> Tensor:
    """Return what each position is to predict, (batch, length): the label after it, and nothing for the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _chunk_loss(student: Tensor, teacher: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """Summed loss of some tokens: (tokens, vocabulary) logits, (tokens,) labels."""
    student = student.float()
    loss = student.new_zeros(())
    if weight > 0:
        log_student = F.log_softmax(student / temperature, dim=-1)
        log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        loss = weight * temperature**2 * torch.where(labels != IGNORE_INDEX, divergence, 0).sum()
    if weight < 1:
        loss = loss + (1 - weight) * F.cross_entropy(student, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    weight: float,
    temperature: float = 1.0,
    count: Tensor | int | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Return the mixed loss of next-token prediction from whole logits, a float32 scalar.

    Args:
        student, teacher: logits (batch, length, vocabulary); position t predicts label t + 1.
        labels: int64 (batch, length), -100 where nothing is to be predicted.
        weight: share of the divergence, 0 to 1; the rest is cross-entropy.
        temperature: softens both distributions.
        count: what to divide the sum by; the number of predicted tokens if None.
        chunk: tokens at a time; their softmaxes are made again in the backward, so that a large vocabulary fits.

    Raises:
        ValueError: the vocabularies differ, or weight or temperature is out of range.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    check_mixture(weight, temperature)
    targets = labels[:, 1:].flatten()
    parts = zip(
        student[:, :-1].flatten(0, 1).split(chunk),
        teacher[:, :-1].flatten(0, 1).split(chunk),
        targets.split(chunk),
        strict=True,
    )
    losses = [checkpoint(_chunk_loss, *part, weight, temperature, use_reentrant=False) for part in parts]
    total = torch.stack(losses).sum()
    return total / ((targets != IGNORE_INDEX).sum() if count is None else count)


def hidden_loss(student: Tensor, teacher: Tensor, targets: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Return the squared distance of the student's hidden states relative to the teacher's, a float32 scalar.

    Args:
        student, teacher: inputs of the output head, (tokens, features).
        targets: int64 (tokens,), -100 where nothing is to be predicted: such tokens do not count.
        count: what to divide the sum by; the number of predicted tokens if None.

    Raises:
        ValueError: the widths differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the hidden-state term needs a teacher of the same width: {student.shape[-1]}, {teacher.shape[-1]}"
        )
    scored = targets != IGNORE_INDEX
    teacher = teacher.float()
    distance = (student.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)
    return torch.where(scored, distance, 0).sum() / (scored.sum() if count is None else count)


def _loss_and_gradient(
    logits: Tensor, taught: Tensor | None, labels: Tensor, mix: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the student's logits and the summed loss of some tokens; the logits are used up.

    Args:
        logits: (tokens, vocabulary), float32 or float64.
        taught: the teacher's, in any dtype, or None.
    """
    scored = labels != IGNORE_INDEX
    total, grad = logits.new_zeros(()), logits.new_zeros(())
    log_student = None
    if mix < 1:
        log_student = logits.log_softmax(-1)
        picked = labels.where(scored, 0)[:, None]
        total -= (1 - mix) * log_student.gather(1, picked).squeeze(1).where(scored, 0).sum()
        grad = log_student.exp().mul_(1 - mix)
        grad.scatter_add_(1, picked, torch.full_like(picked, mix - 1, dtype=logits.dtype))
    if taught is not None:
        if log_student is None or temperature != 1:
            log_student = logits.div_(temperature).log_softmax(-1)
        log_teacher = taught.to(logits.dtype).div_(temperature).log_softmax(-1)
        p = log_teacher.exp()
        divergence = log_teacher.sub_(log_student).mul_(p).sum(-1)
        total += mix * temperature**2 * divergence.where(scored, 0).sum()
        grad = log_student.exp().sub_(p).mul_(mix * temperature).add_(grad)
    return grad.masked_fill_(~scored[:, None], 0), total


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of the head in one pass over chunks of tokens; the backward only hands them on."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        teacher: Head | None,
        mix: float,
        temperature: float,
        count: Tensor,
        chunk: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        cast_weight, cast_bias = Head(hidden, weight, bias).cast()
        teacher_weight, teacher_bias = (None, None) if teacher is None else teacher.cast()
        exact = torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else hidden.dtype
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and need_bias else None
        divisor = count.float()
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            rows, labels = hidden[part], targets[part]
            logits = F.linear(rows, cast_weight, cast_bias)
            taught = None
            if teacher is not None and mix > 0:
                assert teacher_weight is not None
                taught = F.linear(teacher.hidden[part], teacher_weight, teacher_bias)
            if has_kernels(logits.device, logits.dtype):
                from ..ops.triton.loss import loss_over_logits

                sums = loss_over_logits(logits, taught, labels.contiguous(), mix, temperature, divisor, IGNORE_INDEX)
                total += sums.sum()
                grad = logits
            else:
                grad, loss = _loss_and_gradient(logits.to(exact), taught, labels, mix, temperature)
                total += loss
                grad = grad.div_(count).to(hidden.dtype)
            del logits, taught
            if grad_hidden is not None:
                grad_hidden[part] = grad @ cast_weight
            if grad_weight is not None:
                if grad.dtype == exact:
                    grad_weight.addmm_(grad.mT, rows)
                else:
                    grad_weight += grad.mT @ rows
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=exact)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss goes backward once: its gradients are handed on, not kept")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(grad) for g in gradients), *[None] * 6)


def chunked_loss(
    student: Head,
    targets: Tensor,
    teacher: Head | None = None,
    *,
    weight: float = 0.0,
    temperature: float = 1.0,
    count: Tensor | int | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Return the mixed loss from what goes into the output heads, a scalar; no logits outlive their chunk.

    Args:
        student: gradients go to its three tensors.
        targets: int64 (tokens,), what each token is to predict, -100 for nothing.
        teacher: None for cross-entropy alone; it gets no gradient.
        weight: share of the divergence, 0 to 1; the rest is cross-entropy.
        temperature: softens both distributions.
        count: what to divide the sum by; the number of predicted tokens if None.
        chunk: tokens at a time; about five tensors (chunk, vocabulary) in float32 are alive at once without the kernel,
            logits of student and teacher with it.

    Raises:
        ValueError: the vocabularies differ, weight or temperature is out of range, or weight has no teacher.
    """
    check_mixture(weight, temperature)
    if teacher is None and weight:
        raise ValueError("a share of the divergence needs a teacher")
    if teacher is not None and len(teacher.weight) != len(student.weight):
        raise ValueError(
            f"student and teacher differ in vocabulary: {len(student.weight)}, {len(teacher.weight)} entries"
        )
    divisor = torch.as_tensor((targets != IGNORE_INDEX).sum() if count is None else count, device=targets.device)
    if teacher is not None:
        teacher = Head(*(None if tensor is None else tensor.detach() for tensor in teacher))  # type: ignore[arg-type]
    return _ChunkedLoss.apply(*student, targets, teacher, weight, temperature, divisor, chunk)
