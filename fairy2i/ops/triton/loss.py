"""A kernel that makes the training loss and its gradient from logits: each is read twice and written once.

A program has a token: a row of student logits, and of teacher logits where there is a divergence. The first pass over
the row finds the logarithms of the sums of exponentials, block by block with a running maximum; the second one has the
probabilities, adds up the divergence and writes the gradient over the student's logits. All arithmetic is in float32.
What it makes is in :mod:`fairy2i.training.loss`; sums are in one order, without atomics.
"""

# mypy: ignore-errors
# a kernel is written in a language of its own

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device, power

BLOCK = 8192  # logits at a time: 32 for each thread


@triton.jit
def _grow(largest, total, z):
    """Return the running maximum and the sum of exponentials below it, with a block of logits taken in."""
    larger = tl.maximum(largest, tl.max(z, 0))
    base = tl.where(larger == -float("inf"), 0.0, larger)  # nothing but -inf so far
    return larger, total * tl.exp(largest - base) + tl.sum(tl.exp(z - base), 0)


@triton.jit
def mix_losses(
    student, teacher, labels, count, losses, vocabulary, student_stride, teacher_stride, weight, temperature,
    IGNORE: tl.constexpr, CROSS: tl.constexpr, DIVERGE: tl.constexpr, WARM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the summed loss of a token, and over its logits their gradient, divided by ``count``.

    CROSS and DIVERGE say which of the two losses there are, WARM whether the temperature is another than 1.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    columns = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    if label == IGNORE:
        tl.store(losses + row, 0.0)
        for start in range(0, vocabulary, BLOCK):
            zero = tl.zeros([BLOCK], tl.float32).to(student.dtype.element_ty)
            tl.store(student + start + columns, zero, start + columns < vocabulary)
        return
    least = -float("inf")
    top, total = least, 0.0  # of the student at temperature 1
    top_q, total_q = least, 0.0  # at the temperature
    top_p, total_p = least, 0.0  # of the teacher
    cool = 1.0 / temperature
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        z = tl.load(student + start + columns, inside, least).to(tl.float32)
        if CROSS or not WARM:
            top, total = _grow(top, total, z)
        if DIVERGE:
            if WARM:
                top_q, total_q = _grow(top_q, total_q, z * cool)
            z = tl.load(teacher + start + columns, inside, least).to(tl.float32)
            top_p, total_p = _grow(top_p, total_p, z * cool)
    if CROSS or not WARM:
        log = top + tl.log(total)
    if DIVERGE:
        log_q = top_q + tl.log(total_q) if WARM else log
        log_p = top_p + tl.log(total_p)
    share = 1.0 - weight
    loss = 0.0
    if CROSS:
        loss = share * (log - tl.load(student + label).to(tl.float32))
    tl.debug_barrier()  # the label's logit has been read before its gradient is written
    once = 1.0 / tl.load(count)
    divergence = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        z = tl.load(student + start + columns, inside, 0.0).to(tl.float32)
        grad = tl.zeros([BLOCK], tl.float32)
        if CROSS:
            grad = share * (tl.exp(z - log) - tl.where(start + columns == label, 1.0, 0.0))
        if DIVERGE:
            log_student = z * cool - log_q
            log_teacher = tl.load(teacher + start + columns, inside, 0.0).to(tl.float32) * cool - log_p
            p = tl.exp(log_teacher)
            divergence += tl.where(inside, p * (log_teacher - log_student), 0.0)
            grad += weight * temperature * (tl.exp(log_student) - p)
        tl.store(student + start + columns, (grad * once).to(student.dtype.element_ty), inside)
    if DIVERGE:
        loss += weight * temperature * temperature * tl.sum(divergence, 0)
    tl.store(losses + row, loss)


def loss_over_logits(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weight: float,
    temperature: float,
    count: Tensor,
    ignore: int,
) -> Tensor:
    """Return the summed loss of each token, float32 (tokens,), and write the gradient over the student's logits.

    Args:
        student: (tokens, vocabulary), rows contiguous.
        teacher: the same, or None where ``weight`` is 0.
        labels: int64 (tokens,), contiguous.
        count: what the gradient is divided by, one float32 on the device.
        ignore: the label of a token that is not to be predicted.
    """
    losses = student.new_empty(len(student), dtype=torch.float32)
    diverge = teacher is not None and weight > 0
    given: Any = teacher if diverge else student
    if not len(student):
        return losses
    with on_device(student):
        mix_losses[(len(student),)](
            student, given, labels, count, losses, student.shape[1], student.stride(0), given.stride(0),
            float(weight), float(temperature),
            IGNORE=ignore, CROSS=weight < 1, DIVERGE=diverge, WARM=diverge and temperature != 1,
            BLOCK=min(power(student.shape[1]), BLOCK), num_warps=8,
        )  # fmt: skip
    return losses
